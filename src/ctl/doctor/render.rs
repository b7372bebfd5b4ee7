//! Findings for people: what is wrong first, by group, each with the reason and the command.

use super::finding::{Finding, Severity};
use crate::ctl::style::{Style, printable};

/// The text; `verbose` also lists what is well, a line each.
pub(super) fn render(findings: &[Finding], verbose: bool, style: Style) -> String {
    let mut text = String::new();
    for severity in [Severity::Error, Severity::Warning, Severity::Note] {
        let of: Vec<&Finding> = findings.iter().filter(|f| f.severity == severity).collect();
        let mut group = "";
        for finding in of {
            if finding.check.group() != group {
                group = finding.check.group();
                text.push_str(&format!("{}\n", heading(severity, group, style)));
            }
            text.push_str(&problem(finding, style));
        }
    }
    if verbose {
        for finding in findings.iter().filter(|f| f.severity == Severity::Ok) {
            text.push_str(&format!("ok {}: {}\n", name(finding), printable(&finding.what)));
        }
    }
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
    let summary = format!("{errors} errors, {warnings} warnings, {} notes, ", count(Severity::Note));
    let summary = match (errors, warnings) {
        (0, 0) => summary,
        (0, _) => style.yellow(&summary),
        _ => style.red(&summary),
    };
    text.push_str(&format!("{summary}{} checks found nothing wrong\n", count(Severity::Ok)));
    text
}

fn heading(severity: Severity, group: &str, style: Style) -> String {
    match severity {
        Severity::Error => style.red(&format!("ERROR, {group}")),
        Severity::Warning => style.yellow(&format!("warning, {group}")),
        Severity::Note | Severity::Ok => style.bold(&format!("note, {group}")),
    }
}

fn name(finding: &Finding) -> String {
    match &finding.instance {
        Some(instance) => format!("{} [{}]", printable(instance), finding.check.id()),
        None => format!("[{}]", finding.check.id()),
    }
}

fn problem(finding: &Finding, style: Style) -> String {
    let mut text = format!("  {} {}\n", style.bold(&name(finding)), printable(&finding.what));
    if !finding.why.is_empty() {
        text.push_str(&format!("    why: {}\n", printable(&finding.why)));
    }
    for (i, line) in finding.fix.lines().enumerate() {
        text.push_str(&format!("    {} {}\n", if i == 0 { "fix:" } else { "    " }, printable(line)));
    }
    text
}
