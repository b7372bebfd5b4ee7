//! What `tngctl status` says of an endpoint's peers: verdicts with key claims, refusals, and who was asked how fast.
//!
//! Claims, addresses and details come from the network in part: all of it is made printable, and cut.

use serde_json::Value;

use crate::attest::LatencyStatus;
use crate::daemon::{EndpointView, PeerRefusals, RefusalView, VerdictView};

use super::status::closing;
use super::style::{human_age, printable};

/// Peers listed for people, of verdicts and of refusals; `--json` has all that are kept.
const MAX_LISTED: usize = 8;
/// Reasons counted in one line.
const MAX_REASONS: usize = 6;
/// Claims in one line.
const MAX_CLAIMS: usize = 6;
/// Characters of one claim, or of a trust anchor.
const MAX_CLAIM: usize = 32;
const MAX_ANCHOR: usize = 120;
/// Digests are shortened to so many characters; whoever compares them asks `--json`.
const DIGEST: usize = 12;
/// Last parts of the names of claims that tell one workload from another, or a good TEE from a bad one.
const KEY_CLAIMS: [&str; 11] = [
    "measurement",
    "launch_digest",
    "mr_td",
    "mr_enclave",
    "mr_signer",
    "rtmr0",
    "rtmr_0",
    "tcb_status",
    "debug",
    "svn",
    "platform_version",
];

/// Rows about the verdicts on peers.
pub(super) fn verdict_rows(endpoint: &EndpointView, now: u64) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for verdict in endpoint.verdicts.iter().take(MAX_LISTED) {
        rows.push(vec!["verdict".into(), verdict_line(verdict, now)]);
        rows.push(vec![String::new(), claims_line(verdict)]);
    }
    more(&mut rows, endpoint.verdicts.len(), "verdict");
    rows
}

/// Rows about refusals: the newest, those of other peers, and how many there were for each reason.
pub(super) fn refusal_rows(endpoint: &EndpointView, now: u64) -> Vec<Vec<String>> {
    let Some(last) = &endpoint.last_refusal else { return Vec::new() };
    let is_last = |r: &&PeerRefusals| r.last == *last;
    let of_last = endpoint.refusals.iter().find(is_last).map_or(1, |r| r.count);
    let mut rows = vec![vec!["refused".into(), refusal_line(last, of_last, now)]];
    let others = endpoint.refusals.iter().filter(|r| !is_last(r));
    rows.extend(others.take(MAX_LISTED - 1).map(|r| vec!["refused".into(), refusal_line(&r.last, r.count, now)]));
    more(&mut rows, endpoint.refusals.len(), "refused");
    let mut reasons: Vec<_> = endpoint.refused.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    if !reasons.is_empty() {
        let mut line: Vec<_> =
            reasons.iter().take(MAX_REASONS).map(|(reason, count)| format!("{} {count}", printable(reason))).collect();
        if reasons.len() > MAX_REASONS {
            line.push(format!("{} more", reasons.len() - MAX_REASONS));
        }
        rows.push(vec!["reasons".into(), line.join(", ")]);
    }
    rows
}

fn more(rows: &mut Vec<Vec<String>>, all: usize, label: &str) {
    if all > MAX_LISTED {
        rows.push(vec![label.into(), format!("{} more peers, see --json", all - MAX_LISTED)]);
    }
}

fn verdict_line(v: &VerdictView, now: u64) -> String {
    let left = match v.expires_at.checked_sub(now) {
        Some(left @ 1..) => format!("ends in {}", human_age(left)),
        _ => "ended".to_owned(),
    };
    let policy = match v.policy_ids.join(",") {
        none if none.is_empty() => none,
        ids => format!(" under policy {}", printable(&ids)),
    };
    let devices = v.devices.iter().map(|d| format!(" with {}", printable(d))).collect::<String>();
    format!(
        "{} is {}{devices} by {}{policy}, made {} ago, {left}, bound to the {}{}",
        printable(&v.peer),
        printable(&v.tee),
        printable(&v.verifier),
        human_age(now.saturating_sub(v.appraised_at)),
        if v.binding == "session" { "session" } else { "certificate" },
        v.closing.as_ref().map(|c| format!("; connections {}", closing(c))).unwrap_or_default(),
    )
}

fn claims_line(v: &VerdictView) -> String {
    let mut parts = Vec::new();
    for key in KEY_CLAIMS {
        let named = |name: &&String| name.rsplit('.').next() == Some(key);
        parts.extend(v.claims.keys().filter(named).map(|name| format!("{key} {}", short(&v.claims[name]))));
    }
    // A policy that claims nothing about an aspect is no news.
    let vector = v.claims.iter().filter_map(|(name, value)| Some((name.strip_prefix("ar4si.")?, value)));
    let vector: Vec<_> = vector
        .filter(|(_, value)| !value.starts_with("none"))
        .map(|(name, value)| format!("{} {}", printable(name), short(value.split(' ').next().unwrap_or_default())))
        .collect();
    parts.truncate(MAX_CLAIMS);
    let mut line = printable(&v.status);
    for list in [parts, vector] {
        if !list.is_empty() {
            line.push_str(&format!("; {}", list.join(", ")));
        }
    }
    let anchor: String = printable(&v.trust_anchor).chars().take(MAX_ANCHOR).collect();
    if !anchor.is_empty() {
        line.push_str(&format!("; trust: {anchor}"));
    }
    line
}

/// A claim's value, cut: a digest to its first digits.
fn short(value: &str) -> String {
    let value = printable(value);
    let digest = value.len() > DIGEST + 4 && value.bytes().all(|b| b.is_ascii_hexdigit());
    let keep = if digest { DIGEST } else { MAX_CLAIM };
    let cut: String = value.chars().take(keep).collect();
    if cut.len() < value.len() { format!("{cut}...") } else { cut }
}

fn refusal_line(r: &RefusalView, count: u64, now: u64) -> String {
    let age = human_age(now.saturating_sub(r.when));
    let often = if count > 1 { format!(" ({count} times)") } else { String::new() };
    format!("{} {age} ago, {}: {}{often}", printable(&r.reason), printable(&r.peer), printable(&r.detail))
}

/// Rows about who was asked outside the process: how long it took, and how often nobody had to be asked.
pub(super) fn latency_rows(attestation: &Value) -> Vec<Vec<String>> {
    let of = |label: &str, key: &str| {
        let status: LatencyStatus = serde_json::from_value(attestation.get(key)?.clone()).ok()?;
        Some(vec![label.to_owned(), latency_line(&status)])
    };
    let mut rows: Vec<_> =
        [of("aa latency", "aa_latency"), of("as latency", "as_latency"), of("as tokens", "token_latency")]
            .into_iter()
            .flatten()
            .collect();
    if attestation["verify"].is_object() {
        let count = |key: &str| attestation[key].as_u64().unwrap_or(0);
        let line = format!("{} verdicts reused, {} requests to services", count("cache_hits"), count("as_calls"));
        rows.push(vec!["cache".into(), line]);
    }
    rows
}

fn latency_line(status: &LatencyStatus) -> String {
    let (Some(last), Some(mean)) = (status.last_ms, status.mean_ms) else { return "not asked yet".to_owned() };
    let last_bound = status.bounds_seconds.last().copied().unwrap_or_default();
    // A bucket's bound: what is known, and not an estimate within it.
    let within = |bound: Option<f64>| match bound {
        Some(bound) => format!("within {}", human_millis(bound * 1e3)),
        None => format!("beyond {}", human_millis(last_bound * 1e3)),
    };
    let failed: Vec<_> = status
        .outcomes
        .iter()
        .filter(|(outcome, _)| outcome.as_str() != "ok")
        .map(|(outcome, calls)| format!("{} {}", calls.calls, printable(outcome)))
        .collect();
    format!(
        "last {} ({}), half {}, 99 of 100 {}, mean {} of {} calls{}",
        human_millis(last),
        printable(status.last_outcome.as_deref().unwrap_or("unknown")),
        within(status.half_within),
        within(status.p99_within),
        human_millis(mean),
        status.calls,
        if failed.is_empty() { String::new() } else { format!("; {}", failed.join(", ")) },
    )
}

/// `0.4 ms`, `12 ms`, `2.5 s`.
fn human_millis(millis: f64) -> String {
    match millis {
        ..10.0 => format!("{} ms", (millis * 10.0).round() / 10.0),
        ..1000.0 => format!("{} ms", millis.round()),
        _ => format!("{} s", (millis / 100.0).round() / 10.0),
    }
}

/// The collateral's dates; no row without any.
pub(super) fn collateral_row(attestation: &Value, now: u64) -> Vec<String> {
    let collateral = &attestation["verify"]["collateral"];
    let (Some(issued), Some(ends)) = (collateral["issued"].as_u64(), collateral["ends"].as_u64()) else {
        return Vec::new();
    };
    let left = match ends.checked_sub(now) {
        Some(left @ 1..) => format!("the first ends in {}", human_age(left)),
        _ => format!("THE FIRST ENDED {} ago", human_age(now.saturating_sub(ends))),
    };
    let families = collateral["families"].as_u64().unwrap_or(1);
    let age = human_age(now.saturating_sub(issued));
    vec!["collateral".into(), format!("of {families} platform families, the oldest issued {age} ago, {left}")]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn verdict(peer: &str, claims: Value) -> VerdictView {
        serde_json::from_value(json!({
            "peer": peer, "seen": 90, "tee": "tdx", "status": "affirming", "devices": [], "claims": claims,
            "policy_ids": ["default"], "verifier": "as", "trust_anchor": "CN=AS\n(file)", "sample": false,
            "binding": "session", "appraised_at": 100, "expires_at": 400,
        }))
        .unwrap()
    }

    #[test]
    fn the_claims_that_identify_a_peer_are_shown_short_and_harmless() {
        let digest = "ab".repeat(48);
        let claims = json!({
            "quote.body.mr_td": digest, "quote.body.x": "unimportant", "debug": "false", "svn": "\u{1b}[31m1",
            "tcb_status": "y".repeat(500), "ar4si.hardware": "affirming (2)", "ar4si.sourced-data": "none (0)",
        });
        let line = claims_line(&verdict("192.0.2.1", claims));
        assert_eq!(
            line,
            format!(
                "affirming; mr_td abababababab..., tcb_status {}..., debug false, svn \u{fffd}[31m1; hardware \
                 affirming; trust: CN=AS\u{fffd}(file)",
                "y".repeat(MAX_CLAIM)
            )
        );
        let line = verdict_line(&verdict("192.0.2.1", json!({})), 130);
        assert_eq!(
            line,
            "192.0.2.1 is tdx by as under policy default, made 30s ago, ends in 4m30s, bound to the session"
        );
        assert!(verdict_line(&verdict("192.0.2.1", json!({})), 400).contains(", ended,"));
    }

    #[test]
    fn what_is_known_of_the_times_is_told_and_no_more() {
        let mut status = LatencyStatus { bounds_seconds: vec![0.001, 60.0], ..LatencyStatus::default() };
        assert_eq!(latency_line(&status), "not asked yet");
        status = LatencyStatus {
            calls: 3,
            last_ms: Some(12.4),
            last_outcome: Some("timeout".into()),
            mean_ms: Some(2500.0),
            half_within: Some(0.025),
            ..status
        };
        status.outcomes.insert("ok".into(), Default::default());
        status.outcomes.insert("timeout".into(), crate::attest::Measured { calls: 2, ..Default::default() });
        let line = latency_line(&status);
        assert_eq!(
            line,
            "last 12 ms (timeout), half within 25 ms, 99 of 100 beyond 60 s, mean 2.5 s of 3 calls; 2 timeout"
        );
        assert_eq!([0.04, 1.25, 999.4].map(human_millis), ["0 ms", "1.3 ms", "999 ms"]);
        let rows = latency_rows(&json!({ "aa_latency": null, "verify": { "provider": "as" }, "cache_hits": 4 }));
        assert_eq!(rows, [["cache", "4 verdicts reused, 0 requests to services"]]);
        assert!(latency_rows(&Value::Null).is_empty());
    }

    #[test]
    fn collateral_that_is_over_is_said_loudly() {
        let row = |now| {
            collateral_row(&json!({ "verify": { "collateral": { "families": 2, "issued": 10, "ends": 70 } } }), now)
        };
        assert_eq!(row(40)[1], "of 2 platform families, the oldest issued 30s ago, the first ends in 30s");
        assert_eq!(row(90)[1], "of 2 platform families, the oldest issued 1m20s ago, THE FIRST ENDED 20s ago");
        assert!(collateral_row(&json!({ "verify": { "collateral": null } }), 1).is_empty());
    }
}
