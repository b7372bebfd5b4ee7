//! Tests of the configuration: each rule with what it accepts beside what it refuses.

use std::path::Path;

use super::*;

mod attestation;
mod builtin;
mod conflicts;
mod files;
mod host;
mod positions;
mod properties;
mod rego;
mod rules;

pub(super) fn parsed(text: &str) -> Result<Loaded, Report> {
    parse(InstanceName::new("t").unwrap(), Path::new("/etc/tng/t.toml"), text)
}

/// The configuration of a text that must be accepted.
#[track_caller]
pub(super) fn good(text: &str) -> Loaded {
    parsed(text).unwrap_or_else(|report| panic!("refused:\n{report}\n---\n{text}"))
}

/// `(path, reason)` of each error of a text that must be refused.
#[track_caller]
pub(super) fn errors(text: &str) -> Vec<(String, &'static str)> {
    let report = parsed(text).expect_err(text);
    report.errors().map(|d| (d.path.clone(), d.reason)).collect()
}

/// Asserts that exactly this one error is reported, and returns it.
#[track_caller]
pub(super) fn only_error(text: &str, path: &str, reason: &str) -> Diagnostic {
    let report = parsed(text).expect_err(text);
    let found: Vec<_> = report.errors().collect();
    assert_eq!(found.len(), 1, "{report}\n---\n{text}");
    assert_eq!((found[0].path.as_str(), found[0].reason), (path, reason), "{report}");
    assert!(found[0].hint.as_ref().is_some_and(|h| !h.is_empty()), "{report}");
    found[0].clone()
}

pub(super) fn warned(loaded: &Loaded, reason: &str) -> bool {
    loaded.warnings.iter().any(|d| d.reason == reason)
}

/// An ingress netfilter endpoint with these lines in its netfilter table.
pub(super) fn ingress(lines: &str) -> String {
    format!("[[ingress]]\nno_ra = true\n[ingress.netfilter]\n{lines}\n")
}

pub(super) fn egress(lines: &str) -> String {
    format!("[[egress]]\nno_ra = true\n[egress.netfilter]\n{lines}\n")
}

pub(super) fn mapping(side: &str, listen: &str, target: &str) -> String {
    format!("[[{side}]]\nno_ra = true\n[{side}.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n")
}
