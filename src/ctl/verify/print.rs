//! The outcome as text. Everything from outside passes [`printable`]; widths and counts are bounded.

use std::collections::BTreeMap;

use serde_json::Value;

use super::checks::{Check, State};
use super::report::{Outcome, Report};
use super::view::{EvidenceView, TokenView};
use crate::ctl::style::{Style, printable, table};

/// Longest line of what a peer says, characters.
const MAX_TEXT: usize = 512;
/// Fields and claims listed of one part.
const MAX_ROWS: usize = 64;

/// A peer's text: no control characters, not endless.
fn clean(text: &str) -> String {
    let mut out: String = printable(text).chars().take(MAX_TEXT).collect();
    if out.chars().count() < text.chars().count() {
        out.push_str("...");
    }
    out
}

fn row(name: &str, value: impl AsRef<str>) -> Vec<String> {
    vec![clean(name), clean(value.as_ref())]
}

fn section(out: &mut String, title: &str, rows: &[Vec<String>], style: Style) {
    if !rows.is_empty() {
        out.push_str(&format!("{}\n{}", style.bold(title), table(rows, "  ")));
    }
}

/// Everything, in the order in which it was seen.
pub(super) fn render(report: &Report, style: Style) -> String {
    let mut out = String::new();
    connection(&mut out, report, style);
    if let Some(evidence) = &report.evidence {
        section(&mut out, "evidence", &evidence_rows(evidence), style);
    }
    if let Some(token) = &report.token {
        token_text(&mut out, token, style);
    }
    if let Some(appraiser) = &report.appraiser {
        let mut rows = vec![row("by", appraiser.provider), row("settings", &appraiser.settings)];
        rows.extend(appraiser.services.iter().map(|s| row("service", s)));
        if !appraiser.policy_ids.is_empty() {
            rows.push(row("policies", appraiser.policy_ids.join(", ")));
        }
        if appraiser.provider == "builtin" {
            rows.push(row("references", appraiser.references.to_string()));
        }
        // What only the appraisal found: of a quote, the status of its platform.
        let shown = |name: &String| {
            report.evidence.as_ref().is_some_and(|e| e.fields.contains_key(name) || e.claims.contains_key(name))
        };
        let found = report.verdict.appraisal.iter().filter(|_| appraiser.provider == "builtin").flat_map(|a| &a.claims);
        rows.extend(found.filter(|(name, _)| !shown(name)).take(MAX_ROWS).map(|(name, value)| row(name, value)));
        section(&mut out, "appraisal", &rows, style);
    }
    if !report.checks.is_empty() {
        out.push_str(&format!("{}\n", style.bold("checks")));
        report.checks.iter().for_each(|check| out.push_str(&check_line(check, style)));
    }
    for file in &report.saved {
        out.push_str(&format!("saved {}\n", clean(file)));
    }
    for note in &report.notes {
        out.push_str(&format!("{}\n", style.yellow(&format!("note: {}", clean(note)))));
    }
    out.push_str(&verdict(report, style));
    out
}

fn connection(out: &mut String, report: &Report, style: Style) {
    let Some(target) = &report.target else { return };
    let mut rows = vec![row("address", report.address.as_deref().unwrap_or("not reached"))];
    if let Some(tls) = &report.tls {
        rows.push(row("TLS", format!("{}, {}, {}", tls.version, tls.cipher_suite, tls.key_exchange)));
        let binding = match tls.binding {
            "session" => ": evidence bound to this connection",
            "certificate" => ": evidence bound to the certificate's key",
            _ => "",
        };
        rows.push(row("protocol", format!("{}{binding}", tls.protocol.as_deref().unwrap_or("none"))));
        rows.push(row("asks for evidence", if tls.wants_evidence { "yes" } else { "no" }));
    }
    section(out, &clean(target), &rows, style);
    if let Some(cert) = &report.certificate {
        let mut rows = vec![row("subject", &cert.subject)];
        if cert.issuer != cert.subject {
            rows.push(row("issuer", &cert.issuer));
        }
        if cert.shown > 1 {
            rows.push(row("certificates", cert.shown.to_string()));
        }
        rows.extend([
            row("key", format!("{}, SPKI sha256:{}", cert.key, cert.spki_sha256)),
            row("sha256", &cert.sha256),
            row("valid", format!("{} to {}", cert.not_before, cert.not_after)),
        ]);
        section(out, "certificate", &rows, style);
    }
}

fn evidence_rows(evidence: &EvidenceView) -> Vec<Vec<String>> {
    let source = match evidence.from {
        "session" => "made for this connection",
        "certificate" => "in the certificate",
        _ => "made for a new key",
    };
    let kind = format!("{}, {} bytes, {source}", evidence.kind, evidence.bytes);
    let mut rows = vec![row("TEE", evidence.tee.as_deref().unwrap_or("unknown")), row("kind", kind)];
    for device in &evidence.devices {
        let bound = if device.bound { "" } else { ", NOT bound: anybody can show it" };
        rows.push(row("device", format!("{}{bound}", device.tee)));
    }
    if let Some(problem) = &evidence.problem {
        rows.push(row("unreadable", &problem.text));
    }
    for (name, value) in evidence.fields.iter().take(MAX_ROWS) {
        rows.push(row(name, text_of(value)));
    }
    rows.extend(claim_rows(&evidence.claims));
    match evidence.debug {
        Some(true) => rows.push(row("debug", "YES: the host can read the TEE")),
        Some(false) => rows.push(row("debug", "no")),
        None => {}
    }
    if let Some(data) = &evidence.report_data {
        rows.push(row("report_data", data));
    }
    for (name, value) in evidence.runtime_data.as_object().into_iter().flatten().take(MAX_ROWS) {
        rows.push(row(name, text_of(value)));
    }
    rows
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn claim_rows(claims: &BTreeMap<String, String>) -> impl Iterator<Item = Vec<String>> {
    claims.iter().take(MAX_ROWS).map(|(name, value)| row(name, value))
}

fn token_text(out: &mut String, token: &TokenView, style: Style) {
    let from = if token.from == "peer" { "shown by the peer" } else { "given by the attestation service" };
    let unknown = || "unknown".to_owned();
    let mut rows = vec![
        row("token", format!("{from}, signed with {}", token.algorithm.clone().unwrap_or_else(unknown))),
        row("issuer", token.issuer.clone().unwrap_or_else(unknown)),
        row(
            "valid",
            format!(
                "{} to {}",
                token.issued_at.clone().unwrap_or_else(unknown),
                token.expires_at.clone().unwrap_or_else(unknown)
            ),
        ),
    ];
    for part in &token.parts {
        let status = part.status.as_deref().unwrap_or("no status");
        let policy = part.policy.as_deref().unwrap_or("none");
        rows.push(row(&part.name, format!("{}, {status}, policy {policy}", part.tee.as_deref().unwrap_or("no TEE"))));
        rows.extend(claim_rows(&part.claims).map(|r| vec![format!("  {}", r[0]), r[1].clone()]));
    }
    section(out, "token", &rows, style);
}

fn check_line(check: &Check, style: Style) -> String {
    let (word, paint): (&str, fn(Style, &str) -> String) = match check.state {
        State::Passed => ("passed", |_, text| text.to_owned()),
        State::Failed => ("FAILED", Style::red),
        State::NotDone => ("not done", |_, text| text.to_owned()),
    };
    let mut line = format!("{word:<8}  {}", check.title);
    if let Some(detail) = &check.detail {
        line.push_str(&format!(": {}", clean(detail)));
    }
    if let Some(reason) = &check.reason {
        line.push_str(&format!(" [{}]", clean(reason)));
    }
    format!("  {}\n", paint(style, &line))
}

fn headline(report: &Report) -> String {
    let what = if report.target.is_some() { "the peer" } else { "this host" };
    let tee = report.evidence.as_ref().and_then(|e| e.tee.as_deref()).unwrap_or("no TEE");
    match report.verdict.outcome {
        Outcome::Verified => {
            let appraisal = report.verdict.appraisal.as_ref();
            let nothing = if appraisal.is_some_and(|a| a.sample) { ", which proves nothing" } else { "" };
            let trust = appraisal.map_or("", |a| a.trust_anchor.as_str());
            format!("VERIFIED: {what} is {}{nothing}; trust anchor: {}", clean(tee), clean(trust))
        }
        Outcome::Refused => format!("REFUSED: {what} failed a check"),
        Outcome::NotJudged if report.target.is_none() => "NO VERDICT: this host could not be judged".into(),
        Outcome::NotJudged => "NO VERDICT: the peer could not be judged".into(),
        Outcome::NotAppraised => format!("NOT APPRAISED: {what} says that it is {}", clean(tee)),
    }
}

fn reason_lines(report: &Report) -> Vec<String> {
    let verdict = &report.verdict;
    let mut lines = Vec::new();
    if let Some(appraisal) = verdict.appraisal.as_ref().filter(|_| verdict.outcome == Outcome::Verified) {
        let until = appraisal.expires_at.as_deref().unwrap_or("unknown");
        let devices = appraisal.devices.iter().map(|d| format!(", with {d}")).collect::<String>();
        lines.push(clean(&format!("status {}{devices}, holds until {until}", appraisal.status)));
    }
    if let Some(reason) = &verdict.reason {
        let detail = verdict.detail.as_deref().unwrap_or("no detail");
        lines.push(format!("why: {} [{}]", clean(detail), clean(reason)));
    }
    lines.extend(verdict.explanation.as_ref().map(|text| format!("then: {}", printable(text))));
    lines
}

fn verdict(report: &Report, style: Style) -> String {
    let headline = headline(report);
    let sample = report.verdict.appraisal.as_ref().is_some_and(|a| a.sample);
    let painted = match report.verdict.outcome {
        Outcome::Verified if !sample => style.bold(&headline),
        Outcome::NotAppraised => style.yellow(&headline),
        _ => style.red(&headline),
    };
    let lines: String = reason_lines(report).iter().map(|line| format!("  {line}\n")).collect();
    format!("{painted}\n{lines}")
}

/// What goes to standard error where standard output holds a block alone.
pub(super) fn on_the_side(report: &Report) -> Vec<String> {
    let mut lines = vec![headline(report)];
    lines.extend(reason_lines(report));
    if report.reference.is_none() {
        lines.push("no evidence of a TEE that reference values are about: tdx, sgx, snp or tpm".into());
    } else if report.target.is_some() && report.verdict.outcome != Outcome::Verified {
        lines
            .push("warning: this block is trust on first use: compare it with what you built before you use it".into());
    }
    lines
}
