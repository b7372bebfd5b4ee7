//! A folder of `src/` imports only what stands nearer to the operating system: read from the sources, re-exports followed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The folders of `src/`, lowest first. Each imports those before it. Names joined by `+` stand at one level and may import each other.
const ORDER: [&str; 12] = [
    "os",
    "notify+output",
    "relay",
    "attest",
    "config",
    "instance",
    "tls",
    "ingress+egress",
    "capture",
    "daemon",
    "units",
    "ctl",
];

/// What does not keep the order yet: who imports whom, and how many pairs of files do. It only shrinks.
const DEBT: [(&str, &str, usize); 6] = [
    ("relay", "config", 2),
    ("relay", "tls", 10),
    ("relay", "daemon", 2),
    ("attest", "config", 23),
    ("ingress+egress", "daemon", 7),
    ("daemon", "units", 1),
];

type Module = Vec<String>;

/// A file of `src/`: its module, and its text without comments, literals and unit tests.
struct File {
    path: String,
    module: Module,
    text: String,
}

fn files(dir: &Path, root: &Path, out: &mut Vec<File>) {
    for entry in std::fs::read_dir(dir).expect("src").flatten() {
        let path = entry.path();
        if path.is_dir() {
            if !path.ends_with("tests") {
                files(&path, root, out);
            }
            continue;
        }
        let name = path.strip_prefix(root).expect("below src").to_str().expect("UTF-8").to_owned();
        let Some(stem) = name.strip_suffix(".rs").filter(|stem| !stem.ends_with("tests")) else { continue };
        if name == "lib.rs" || name.starts_with("bin/") {
            continue;
        }
        let stem = stem.strip_suffix("/mod").unwrap_or(stem);
        let module = stem.split('/').map(str::to_owned).collect();
        let text = code_of(&std::fs::read_to_string(&path).expect("source"));
        let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
        out.push(File { path: name, module, text: product });
    }
}

/// `text` without comments and literals.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (String::new(), 0);
    while at < bytes.len() {
        let rest = &text[at..];
        let raw =
            rest.strip_prefix('r').filter(|r| r.starts_with('"') || r.starts_with("#\"") || r.starts_with("##\""));
        let end = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |e| e + 2)
        } else if let Some(raw) = raw.filter(|_| !out.ends_with(|c: char| c.is_alphanumeric() || c == '_')) {
            let hashes = raw.bytes().take_while(|b| *b == b'#').count();
            let close = format!("\"{}", "#".repeat(hashes));
            1 + hashes + 1 + raw[hashes + 1..].find(&close).expect("closed") + close.len()
        } else if rest.starts_with('"') {
            string_end(rest)
        } else if let Some(quoted) = rest.strip_prefix('\'') {
            // A character, or a lifetime.
            let mut chars = quoted.char_indices();
            match (chars.next(), chars.next()) {
                (Some((_, '\\')), _) => 2 + rest[3..].find('\'').expect("closed") + 2,
                (_, Some((e, '\''))) => e + 2,
                _ => 0,
            }
        } else {
            0
        };
        if end == 0 {
            let c = rest.chars().next().expect("not at the end");
            out.push(c);
            at += c.len_utf8();
        } else {
            out.push(' ');
            at += end;
        }
    }
    out
}

fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// One path that is named: its segments, the name it gets, and whether others see it.
struct Named {
    path: Vec<String>,
    name: String,
    is_public: bool,
}

/// The paths of `use a::{b, c as d}`.
fn expand(tree: &str, before: &[String], is_public: bool, out: &mut Vec<Named>) {
    let tree = tree.trim();
    if tree.is_empty() {
        return;
    }
    if let Some((head, group)) = tree.split_once('{').filter(|(head, _)| head.is_empty() || head.trim().ends_with("::"))
    {
        let mut path = before.to_vec();
        path.extend(segments(head));
        let (mut depth, mut from) = (0, 0);
        let group = group.trim_end().strip_suffix('}').expect("a closed group");
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(&group[from..at], &path, is_public, out);
                    from = at + 1;
                }
                _ => {}
            }
        }
        expand(&group[from..], &path, is_public, out);
        return;
    }
    let (tree, alias) = tree.split_once(" as ").map_or((tree, None), |(tree, alias)| (tree, Some(alias.trim())));
    let mut path = before.to_vec();
    path.extend(segments(tree).filter(|s| s != "self" || before.is_empty()));
    let name = alias.or(path.last().map(String::as_str)).unwrap_or_default().to_owned();
    out.push(Named { path, name, is_public });
}

fn segments(path: &str) -> impl Iterator<Item = String> {
    path.split("::").map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned)
}

fn named(text: &str) -> Vec<Named> {
    let mut out = Vec::new();
    let mut rest = String::new();
    let mut tail = text;
    while let Some(at) = tail.find("use ") {
        let head = &tail[..at];
        rest.push_str(head);
        let line = head.rsplit('\n').next().unwrap_or_default().trim();
        let starts = line.is_empty() || (line.starts_with("pub") && !line.contains(';'));
        let end = tail[at..].find(';').filter(|_| starts);
        match end {
            Some(end) => {
                expand(&tail[at + 4..at + end], &[], line.starts_with("pub"), &mut out);
                tail = &tail[at + end..];
            }
            None => {
                rest.push_str("use ");
                tail = &tail[at + 4..];
            }
        }
    }
    rest.push_str(tail);
    // Paths in the code itself.
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    for root in ["crate", "super", "self"] {
        for (at, _) in rest.match_indices(&format!("{root}::")) {
            if rest[..at].ends_with(|c| is_word(c) || c == ':' || c == '$') {
                continue;
            }
            let end = rest[at..].find(|c| !is_word(c) && c != ':').map_or(rest.len(), |e| at + e);
            out.push(Named { path: segments(&rest[at..end]).collect(), name: String::new(), is_public: false });
        }
    }
    out
}

/// `path` from the root of the crate, if it is of the crate.
fn absolute(module: &Module, path: &[String], modules: &BTreeSet<Module>) -> Option<Module> {
    let (mut base, mut rest) = match path.first()?.as_str() {
        "crate" => (Vec::new(), &path[1..]),
        "self" => (module.clone(), &path[1..]),
        "super" => (module.clone(), path),
        first => {
            let child = [module.as_slice(), &[first.to_owned()]].concat();
            return modules.contains(&child).then(|| [child.as_slice(), &path[1..]].concat());
        }
    };
    while let Some(("super", next)) = rest.split_first().map(|(first, next)| (first.as_str(), next)) {
        base.pop()?;
        rest = next;
    }
    base.extend(rest.iter().filter(|s| *s != "*").cloned());
    Some(base)
}

/// The module in which what `path` names is defined: re-exports are followed.
fn home(
    path: &Module,
    modules: &BTreeSet<Module>,
    exports: &BTreeMap<(Module, String), Module>,
    depth: u8,
) -> Option<Module> {
    let at = (1..=path.len()).rev().find(|at| modules.contains(&path[..*at].to_vec()))?;
    let (module, rest) = (path[..at].to_vec(), &path[at..]);
    let exported = rest.first().and_then(|name| exports.get(&(module.clone(), name.clone())));
    match exported.filter(|_| depth < 8) {
        Some(target) => home(&[target.as_slice(), &rest[1..]].concat(), modules, exports, depth + 1),
        None => Some(module),
    }
}

fn level(module: &Module) -> usize {
    let folder = module.first().expect("a module below the root");
    let at = ORDER.iter().position(|names| names.split('+').any(|name| name == folder));
    at.unwrap_or_else(|| panic!("src/{folder} has no place in ORDER"))
}

/// Pairs of folders that break the order, and the imports that do.
fn breaches() -> BTreeMap<(usize, usize), BTreeSet<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&root, &root, &mut all);
    assert!(all.len() > 200, "the sources are not where they were");
    let modules: BTreeSet<Module> = all.iter().map(|file| file.module.clone()).collect();
    let (mut exports, mut uses) = (BTreeMap::new(), Vec::new());
    for file in &all {
        for named in named(&file.text) {
            let Some(path) = absolute(&file.module, &named.path, &modules) else { continue };
            if named.is_public {
                exports.insert((file.module.clone(), named.name), path.clone());
            }
            uses.push((file, path));
        }
    }
    assert!(uses.len() > 1000, "the imports are not read: {}", uses.len());
    let mut out: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (file, path) in uses {
        let Some(target) = home(&path, &modules, &exports, 0) else { continue };
        let (from, to) = (level(&file.module), level(&target));
        if to > from {
            out.entry((from, to)).or_default().insert((file.path.clone(), target.join("::")));
        }
    }
    out
}

#[test]
fn a_folder_imports_only_what_stands_before_it() {
    let found = breaches();
    let mut wrong = Vec::new();
    for (from, to, allowed) in DEBT {
        let at = |names| ORDER.iter().position(|n| *n == names).expect("a level of ORDER");
        let count = found.get(&(at(from), at(to))).map_or(0, BTreeSet::len);
        if count < allowed {
            wrong.push(format!("{from} imports {to} only {count} times now: lower it in DEBT"));
        }
    }
    for ((from, to), imports) in &found {
        let (from, to) = (ORDER[*from], ORDER[*to]);
        let allowed = DEBT.iter().find(|(f, t, _)| (*f, *t) == (from, to)).map_or(0, |(_, _, n)| *n);
        if imports.len() > allowed {
            wrong.push(format!("{from} stands before {to} and imports it ({allowed} allowed):"));
            wrong.extend(imports.iter().map(|(file, module)| format!("  src/{file} -> {module}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reader_of_sources_sees_code_alone() {
    let text = "use crate::a; // use crate::b\nlet s = \"use crate::c;\"; let c = '\"'; fn f<'a>() { crate::d::e() } r#\"crate::f\"#";
    let code = code_of(text);
    assert!(code.contains("crate::a") && code.contains("crate::d::e") && code.contains("<'a>"), "{code}");
    for hidden in ["crate::b", "crate::c", "crate::f"] {
        assert!(!code.contains(hidden), "{code}");
    }
    let paths: Vec<String> = named("pub use super::x::{y, z::{self, w as v}};")
        .iter()
        .map(|n| format!("{} {}", n.path.join("::"), n.name))
        .collect();
    assert_eq!(paths, ["super::x::y y", "super::x::z z", "super::x::z::w v"]);
}
