//! A saved ruleset with tng's tables in it. `nft list ruleset` prints them as well, and a file that holds them cannot be
//! loaded while the guard runs: the kernel refuses (EPERM) who is not the owner, and with it the operator's own tables.

use std::collections::BTreeSet;
use std::path::Path;

use super::finding::{Check, Finding};
use super::host::{Host, Ran};

/// What Debian's unit loads.
const DEFAULT_FILE: &str = "/etc/nftables.conf";
const UNIT: &str = "nftables.service";
/// Where nft looks for included files of relative names (its default `--includepath`).
const INCLUDE_DIR: &str = "/etc";
/// Files looked into at most.
const MAX_FILES: usize = 256;

/// Files that nftables.service loads, included ones too.
pub(super) fn check(host: &dyn Host) -> Vec<Finding> {
    let check = Check::SavedRules;
    let mut found = Vec::new();
    let mut read_any = false;
    for file in all_files(host) {
        let Some(text) = host.read(&file) else { continue };
        read_any = true;
        let named = tng_tables(&text);
        if named.is_empty() {
            continue;
        }
        let tables: Vec<String> = named.into_iter().collect();
        let what = format!("{file}, which {UNIT} loads, holds tables of tng: {}", tables.join(", "));
        let finding = if is_off(host) { Finding::warning(check, what) } else { Finding::error(check, what) };
        found.push(
            finding
                .why(
                    "while the guard runs the kernel refuses that file as a whole: after a restart of nftables the \
                     firewall's own tables are absent",
                )
                .fix(format!(
                    "sed -i '/^table inet tng\\(guard\\)\\{{0,1\\}}_/,/^}}/d' {file} && nft -c -f {file}  # saving \
                     without them: tngd(8), BESIDE A FIREWALL"
                )),
        );
    }
    if found.is_empty() && read_any {
        found.push(Finding::ok(check, format!("what {UNIT} loads holds no table of tng")));
    }
    found
}

/// Nobody loads the file now, nor at the next boot.
fn is_off(host: &dyn Host) -> bool {
    let enabled = match host.run(&["systemctl", "is-enabled", UNIT], None) {
        Ran::Done { stdout, .. } => stdout,
        _ => return false,
    };
    matches!(enabled.trim(), "disabled" | "masked") && !host.is_active(UNIT)
}

/// The files that the unit names, and what they include, in the order in which nft reads them.
fn all_files(host: &dyn Host) -> Vec<String> {
    let mut waiting = loaded_files(host);
    let mut all = Vec::new();
    while !waiting.is_empty() && all.len() < MAX_FILES {
        let file = waiting.remove(0);
        if all.contains(&file) {
            continue;
        }
        for pattern in included(&host.read(&file).unwrap_or_default()) {
            let pattern = if pattern.starts_with('/') { pattern } else { format!("{INCLUDE_DIR}/{pattern}") };
            waiting.extend(expand(host, &pattern));
        }
        all.push(file);
    }
    all
}

/// Files after `-f` in the unit's commands, drop-ins included; Debian's where systemd cannot be asked.
fn loaded_files(host: &dyn Host) -> Vec<String> {
    let properties = "ExecStart,ExecStartPost,ExecReload";
    let shown =
        if host.has_systemd() { host.run(&["systemctl", "show", "-p", properties, UNIT], None) } else { Ran::Timeout };
    let mut files = Vec::new();
    for line in shown.text().unwrap_or_default().lines() {
        let Some(argv) = line.split("argv[]=").nth(1).and_then(|rest| rest.split(" ; ").next()) else { continue };
        let mut words = argv.split_whitespace();
        while let Some(word) = words.next() {
            let file = match word {
                "-f" | "--file" => words.next(),
                _ => word.strip_prefix("--file=").or_else(|| word.strip_prefix("-f").filter(|f| f.starts_with('/'))),
            };
            files.extend(file.filter(|f| f.starts_with('/')).map(str::to_owned));
        }
    }
    if files.is_empty() {
        files.push(DEFAULT_FILE.to_owned());
    }
    files
}

/// A line without its comment. A `#` in quotes begins none.
fn code(line: &str) -> &str {
    let mut quoted = false;
    for (at, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted => return &line[..at],
            _ => {}
        }
    }
    line
}

/// What a file includes, as written.
fn included(text: &str) -> Vec<String> {
    let statements = text.lines().flat_map(|line| code(line).split(';'));
    let named =
        statements.filter_map(|s| s.trim().strip_prefix("include")?.trim().strip_prefix('"')?.strip_suffix('"'));
    named.map(str::to_owned).collect()
}

/// Tables of tng that a file names in any statement; all are of family inet.
fn tng_tables(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in text.lines() {
        let words: Vec<&str> =
            code(line).split(|c: char| c.is_whitespace() || "{};\"".contains(c)).filter(|w| !w.is_empty()).collect();
        let named = words.windows(2).filter(|pair| pair[0] == "inet").map(|pair| pair[1]);
        found.extend(named.filter(|n| n.starts_with("tng_") || n.starts_with("tngguard_")).map(str::to_owned));
    }
    found
}

/// The files that a pattern of glob(7) means, sorted, as nft's include takes them.
fn expand(host: &dyn Host, pattern: &str) -> Vec<String> {
    let mut paths = vec![String::new()];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        let is_pattern = part.contains(['*', '?', '[']);
        let mut next = Vec::new();
        for dir in paths {
            if !is_pattern {
                next.push(format!("{dir}/{part}"));
                continue;
            }
            let entries = std::fs::read_dir(host.path(if dir.is_empty() { "/" } else { &dir }));
            let names = entries.into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
            // glob(7): a leading dot must be matched by a dot.
            let names = names.filter(|name| (!name.starts_with('.') || part.starts_with('.')) && matches(part, name));
            next.extend(names.map(|name| format!("{dir}/{name}")));
        }
        next.sort();
        next.truncate(MAX_FILES);
        paths = next;
    }
    paths.retain(|path| Path::new(&host.path(path)).is_file());
    paths
}

/// glob(7) within one name: `*`, `?`, and `[...]` with ranges and `!`.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last star was, and how far it has eaten: going back to it alone is enough, and linear in space.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        let one = match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some('?') => Some(p + 1),
            Some('[') => class(&pattern[p..], name[n]).map(|length| p + length),
            Some(c) if *c == name[n] => Some(p + 1),
            _ => None,
        };
        match (one, star) {
            (Some(next), _) => (p, n) = (next, n + 1),
            (None, Some((at, eaten))) => {
                star = Some((at, eaten + 1));
                (p, n) = (at + 1, eaten + 1);
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Length of the class that `pattern` begins with, when `c` is in it.
fn class(pattern: &[char], c: char) -> Option<usize> {
    let not = matches!(pattern.get(1), Some('!' | '^'));
    let first = if not { 2 } else { 1 };
    // A bracket right at the beginning is a member.
    let end = (first + 1..pattern.len()).find(|at| pattern[*at] == ']')?;
    let members = &pattern[first..end];
    let mut at = 0;
    let mut is_in = false;
    while at < members.len() {
        if at + 2 < members.len() && members[at + 1] == '-' {
            is_in |= (members[at]..=members[at + 2]).contains(&c);
            at += 3;
        } else {
            is_in |= members[at] == c;
            at += 1;
        }
    }
    (is_in != not).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_tng_are_seen_in_any_statement_and_not_in_comments() {
        let names = |text: &str| tng_tables(text).into_iter().collect::<Vec<_>>().join(" ");
        assert_eq!(
            names("flush ruleset\ntable inet tng_in {\n}\ntable inet tngguard_in { # progname nft"),
            "tng_in tngguard_in"
        );
        assert_eq!(names("add rule inet tng_web output accept;delete table inet tngguard_a"), "tng_web tngguard_a");
        assert_eq!(names("table inet \"tng_in\" {"), "tng_in");
        assert_eq!(names("# table inet tng_in {\ntable inet filter { # inet tng_x\n}\ntable ip tng_in {"), "");
        assert_eq!(names("table inet tngx { }\niifname \"inet tng\" accept"), "");
    }

    #[test]
    fn includes_are_read_as_nft_reads_them() {
        assert_eq!(
            included(
                "include \"/etc/nftables.d/*.nft\"\n  include \"a.conf\"; include \"b\"\n# include \"no\"\nincluded \"x"
            ),
            ["/etc/nftables.d/*.nft", "a.conf", "b"]
        );
    }

    #[test]
    fn patterns_are_those_of_glob() {
        for (pattern, name, expected) in [
            ("*.nft", "a.nft", true),
            ("*.nft", "a.nft.bak", false),
            ("*", "", true),
            ("??.conf", "10.conf", true),
            ("??.conf", "1.conf", false),
            ("[0-9]*", "10-a", true),
            ("[!0-9]*", "10-a", false),
            ("[]a]x", "]x", true),
            ("[a", "[a", false),
            ("*a*b*c", "xxaxxbxxbc", true),
            ("*a*b*c", "xxbxxaxxc", false),
            ("ab", "abc", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
