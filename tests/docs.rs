//! The manual names what the product has, and nothing else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A manual page without roff's escapes and macros.
fn page(name: &str) -> String {
    let text = std::fs::read_to_string(root().join("man").join(name)).expect(name);
    text.replace("\\-", "-")
}

fn sources(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(dir).expect("src").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
            let text = std::fs::read_to_string(&path).expect("source");
            // Unit tests stand at the end of their file.
            let product = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default().to_owned();
            out.push((path, product));
        }
    }
}

/// String literals of `text` that have the form of a reason.
fn literals(text: &str) -> impl Iterator<Item = String> {
    let slug = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    text.split('"').skip(1).step_by(2).filter(move |s| slug(s)).map(str::to_owned)
}

/// Reasons of findings in a configuration: arguments of the collector, constants of the conflicts.
fn is_config(path: &Path) -> bool {
    path.strip_prefix(root().join("src")).is_ok_and(|p| p.starts_with("config"))
}

/// Every reason in the sources: what the functions that give one return, and what is logged as one.
fn reasons() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    assert!(files.len() > 50, "the sources are not where they were");
    let mut out = BTreeSet::new();
    for (path, text) in files.iter().filter(|(path, _)| !is_config(path)) {
        for function in ["fn reason(", "fn accept_error("] {
            for (at, _) in text.match_indices(function) {
                let head = &text[at..];
                let body = head.find('{').map(|b| &head[b..]).unwrap_or_default();
                if !head[..head.len() - body.len()].contains("-> &'static str") {
                    continue;
                }
                // To the brace that closes the function, at its own indentation.
                let line = text[..at].rsplit('\n').next().unwrap_or_default();
                let indent = line.len() - line.trim_start().len();
                let end = body.find(&format!("\n{}}}", " ".repeat(indent))).expect("function ends");
                out.extend(literals(&body[..end]));
            }
        }
        for marker in ["reason = \"", ".write(\"", "REASON: &str = \""] {
            for (at, _) in text.match_indices(marker) {
                let rest = &text[at + marker.len()..];
                out.extend(rest.split('"').next().map(str::to_owned));
            }
        }
        assert!(!text.contains("reason: \""), "{}: a reason this test does not look for", path.display());
    }
    out
}

/// The terms of the page.
fn explained() -> Vec<String> {
    let text = page("tng-reasons.7");
    let lines: Vec<&str> = text.lines().collect();
    lines.windows(2).filter(|w| w[0] == ".TP").filter_map(|w| w[1].strip_prefix(".B ")).map(str::to_owned).collect()
}

#[test]
fn every_reason_is_explained_and_every_explained_one_exists() {
    let (product, manual) = (reasons(), explained());
    assert!(product.len() > 80 && product.contains("closed") && product.contains("token-policy"), "{product:?}");
    let listed: BTreeSet<String> = manual.iter().cloned().collect();
    assert_eq!(listed.len(), manual.len(), "a reason is explained twice");
    let missing: Vec<_> = product.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&product).collect();
    assert!(missing.is_empty(), "not in man/tng-reasons.7: {missing:?}");
    assert!(stale.is_empty(), "in man/tng-reasons.7, but no reason any more: {stale:?}");
}

#[test]
fn every_reason_has_a_sentence() {
    let text = page("tng-reasons.7");
    for part in text.split(".TP\n").skip(1) {
        let (term, rest) = part.split_once('\n').expect("a term and a text");
        let sentence = rest.split(".SH").next().unwrap_or_default().trim();
        assert!(sentence.len() > 8 && sentence.contains('.'), "{term}: {sentence:?}");
    }
}

fn help(program: &str, words: &[&str]) -> String {
    let out = Command::new(program).args(words).arg("--help").output().expect(program);
    assert!(out.status.success(), "{program} {words:?} --help");
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// Subcommands and long options of `--help`, those of subcommands too.
fn interface(program: &str, words: &mut Vec<String>, out: &mut BTreeSet<String>) {
    let text = help(program, &words.iter().map(String::as_str).collect::<Vec<_>>());
    let section = |name: &str| {
        let lines = text.lines().skip_while(move |l| *l != name).skip(1);
        lines.take_while(|l| l.starts_with("  ")).map(str::to_owned).collect::<Vec<_>>()
    };
    for line in section("Options:") {
        out.extend(line.split([' ', ',']).find(|w| w.starts_with("--")).map(str::to_owned));
    }
    for line in section("Commands:") {
        let Some(name) = line.split_whitespace().next().filter(|_| !line.starts_with("   ")) else { continue };
        words.push(name.to_owned());
        out.insert(words.join(" "));
        interface(program, words, out);
        words.pop();
    }
}

#[test]
fn every_command_and_option_is_in_the_manual() {
    for (program, name) in [(env!("CARGO_BIN_EXE_tngd"), "tngd.8"), (env!("CARGO_BIN_EXE_tngctl"), "tngctl.1")] {
        let mut found = BTreeSet::new();
        interface(program, &mut Vec::new(), &mut found);
        assert!(found.contains("check") && found.contains("--json"), "{found:?}");
        let manual = page(name);
        for item in found.iter().filter(|i| *i != "--help" && *i != "--version") {
            assert!(manual.contains(item.as_str()), "{item} is not in man/{name}");
        }
    }
}

#[test]
fn a_failed_command_ends_in_its_reason() {
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("free.toml");
    let text = "[[ingress]]\nno_ra = true\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:2\"\n";
    std::fs::write(&file, text).expect("file");
    let out = Command::new(env!("CARGO_BIN_EXE_tngd"))
        .args(["run", "--user", "no-such-user"])
        .arg(&file)
        .env("TNG_RUNTIME_DIR", dir.path())
        .output()
        .expect("tngd");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.trim_end().ends_with("[no-such-user]"), "{said}");
}

#[test]
fn the_pages_name_each_other() {
    let pages = ["tngctl.1", "tng.toml.5", "tng-reasons.7", "tngd.8"];
    for name in pages {
        let text = page(name);
        let also = text.split("SEE ALSO").nth(1).expect("SEE ALSO");
        for other in pages.iter().filter(|p| **p != name) {
            let (stem, section) = other.rsplit_once('.').expect("a section");
            assert!(also.contains(&format!("{stem} ({section})")), "{name} does not name {other}");
        }
    }
}

/// The test functions that a table of docs/ names, as file and function.
fn shown(row: &str) -> Vec<(String, String)> {
    let quoted = row.split('`').skip(1).step_by(2);
    quoted.filter_map(|q| q.split_once("::")).map(|(file, name)| (file.to_owned(), name.to_owned())).collect()
}

fn rows(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("docs").join(page)).expect(page);
    text.lines().filter(|l| l.starts_with("| ") && l.contains('`')).map(str::to_owned).collect()
}

fn assert_exists(row: &str, tests: &[(String, String)]) -> String {
    let mut all = String::new();
    for (file, name) in tests {
        let text = std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}: {row}"));
        let begins = text.find(&format!("fn {name}(")).unwrap_or_else(|| panic!("{file} has no {name}: {row}"));
        // To the next test: what stands elsewhere in the file shows nothing of this one.
        let body = &text[begins..];
        let ends = ["#[test]", "#[tokio::test"].iter().filter_map(|next| body.find(next)).min();
        all.push_str(&body[..ends.unwrap_or(body.len())]);
    }
    all
}

#[test]
fn bad_input_ends_in_explained_reasons_that_the_named_tests_show() {
    let manual: BTreeSet<String> = explained().into_iter().collect();
    let (mut reasons, mut parsers) = (0, 0);
    for row in rows("bad-input.md") {
        let tests = shown(&row);
        assert!(!tests.is_empty(), "no test: {row}");
        let text = assert_exists(&row, &tests);
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        match cells[..] {
            [_, reason, _] => {
                reasons += 1;
                let reason = reason.trim_matches('`');
                assert!(manual.contains(reason), "{reason} is not explained: {row}");
                assert!(text.contains(&format!("\"{reason}\"")), "not shown: {row}");
            }
            _ => parsers += 1,
        }
    }
    assert!(reasons > 40 && parsers > 10, "{reasons} {parsers}");
}

#[test]
fn what_interoperates_is_shown_by_the_named_tests() {
    let mut named = 0;
    for row in rows("interop.md") {
        let tests = shown(&row);
        assert_exists(&row, &tests);
        named += tests.len();
    }
    assert!(named > 20, "{named}");
}

/// What users reported: each number has a row, and a test or the evidence why there is none.
#[test]
fn every_report_of_the_field_names_its_test() {
    let (mut seen, mut named) = (BTreeSet::new(), 0);
    for row in rows("field.md").into_iter().chain(plain_rows("field.md")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let Some(number) = cells.first().filter(|c| c.starts_with(|c: char| c.is_ascii_digit())) else { continue };
        assert_eq!(cells.len(), 5, "number, report, kind, what is right, test: {row}");
        let tests = shown(&row);
        assert_exists(&row, &tests);
        assert!(!tests.is_empty() || cells[4].starts_with("No test:"), "no test and no evidence: {row}");
        seen.insert((*number).to_owned());
        named += tests.len();
    }
    let wanted = (1..=37).map(|n| n.to_string()).chain(["5a".to_owned()]);
    let missing: Vec<String> = wanted.filter(|n| !seen.contains(n)).collect();
    assert!(missing.is_empty(), "without a row: {missing:?}");
    assert!(named > 40, "{named}");
}

/// Rows of a table without a quoted name in them.
fn plain_rows(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("docs").join(page)).expect(page);
    text.lines().filter(|l| l.starts_with("| ") && !l.contains('`')).map(str::to_owned).collect()
}
