//! `tngctl status` for people.

use crate::capture::compile::REFUSED;
use crate::daemon::{BoundView, ClosingView, EndpointView, State, StatusReport, shared_refusals};

use super::peers;
use super::style::{Style, human_age, human_bytes, printable, table};

/// Lines shown of one problem: a file with many errors has its own command, `tngctl check`.
const MAX_PROBLEM_LINES: usize = 12;

/// A text of several lines (an error with its hint) as lines, printable, none empty, the later ones indented.
fn lines(text: &str, most: usize) -> Vec<String> {
    let all: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let more = all.len().saturating_sub(most);
    let mut shown: Vec<_> = all.into_iter().take(most).map(printable).collect();
    shown.iter_mut().skip(1).for_each(|line| line.insert_str(0, "  "));
    shown.extend((more > 0).then(|| format!("  ... and {more} more lines")));
    shown
}

/// One instance's status as text; `now` in seconds since 1970.
pub(super) fn render(report: &StatusReport, style: Style, now: u64) -> String {
    let word = report.state.word();
    let state = match report.state {
        State::Ready => word.to_owned(),
        State::Degraded | State::Stopped => style.red(word),
        State::Starting | State::Reloading | State::Draining => style.yellow(word),
    };
    let mut text = format!(
        "{} {state} (tng {}, pid {}, landlock {})\n  config {} loaded {} ago\n",
        style.bold(&printable(&report.instance)),
        printable(&report.version),
        report.pid,
        printable(&report.confinement.landlock),
        printable(&report.config_path),
        human_age(now.saturating_sub(report.config_loaded_at)),
    );
    for problem in &report.problems {
        for line in lines(&format!("DEGRADED: {problem}"), MAX_PROBLEM_LINES) {
            text.push_str(&format!("  {}\n", style.red(&line)));
        }
    }
    if let Some(error) = &report.last_reload_error {
        let said = format!("last reload was refused, the old configuration goes on: {error}");
        for line in lines(&said, MAX_PROBLEM_LINES) {
            text.push_str(&format!("  {}\n", style.yellow(&line)));
        }
    }
    if report.log_records_lost > 0 {
        let line = format!("{} log records lost: the log was not read fast enough", report.log_records_lost);
        text.push_str(&format!("  {}\n", style.yellow(&line)));
    }
    for endpoint in &report.endpoints {
        text.push_str(&endpoint_text(report, endpoint, style, now));
    }
    if let Some(line) = shared_line(report) {
        text.push_str(&format!("\n  {line}\n"));
    }
    text
}

fn endpoint_text(report: &StatusReport, endpoint: &EndpointView, style: Style, now: u64) -> String {
    let mut text = format!("\n  {} {}\n", endpoint.side, style.bold(&printable(&endpoint.name)));
    let listeners: Vec<_> =
        report.listeners.iter().filter(|l| l.endpoint == endpoint.name).map(|l| l.local.as_str()).collect();
    let shown = listeners.iter().take(4).copied().collect::<Vec<_>>().join(" ");
    let more = listeners.len().saturating_sub(4);
    let c = &endpoint.counters;
    let mut rows = vec![
        vec![endpoint.mode.clone(), printable(&endpoint.traffic)],
        vec!["listens".into(), if more > 0 { format!("{shown} and {more} more") } else { shown }],
        vec!["attests".into(), endpoint.attest.as_deref().map_or("no".into(), printable)],
        evidence_row(&endpoint.attestation, now),
        vec!["verifies".into(), endpoint.verify.as_deref().map_or("no".into(), printable)],
        vec![
            "connections".into(),
            format!("{} open, {} in all, {} refused", c.connections_open, c.connections_total, c.connections_refused),
        ],
        bound_row(&endpoint.bound, now),
        room_row(&endpoint.bound, now),
        binding_row(&endpoint.attestation),
        kernel_row(report, &endpoint.name),
        vec!["bytes".into(), format!("{} up, {} down", human_bytes(c.bytes_up), human_bytes(c.bytes_down))],
    ];
    rows.extend(service_rows(&endpoint.attestation, now));
    rows.extend(peers::latency_rows(&endpoint.attestation));
    rows.push(peers::collateral_row(&endpoint.attestation, now));
    rows.extend(peers::verdict_rows(endpoint, now));
    rows.extend(peers::refusal_rows(endpoint, now));
    rows.retain(|row| !row.is_empty());
    text.push_str(&table(&rows, "    "));
    let mut loud = |line: &str| text.push_str(&format!("    {}\n", style.red(line)));
    if endpoint.no_ra {
        loud("NO ATTESTATION: no_ra = true, either side may be anyone");
    }
    if endpoint.sample || endpoint.verdicts.iter().any(|v| v.sample) {
        loud("SAMPLE EVIDENCE: shown or accepted here, it proves nothing");
    }
    text
}

/// What becomes of open connections whose peer has failed.
pub(super) fn closing(view: &ClosingView) -> String {
    format!("closing in {}: {}", human_age(view.in_ms.div_ceil(1000)), printable(&view.reason))
}

/// An endpoint whose bound was reached; no row for the others.
fn bound_row(bound: &BoundView, now: u64) -> Vec<String> {
    let Some(at) = bound.reached_at else { return Vec::new() };
    let when = match bound.reached_since {
        Some(since) => format!("bound reached for {}", human_age(now.saturating_sub(since))),
        None => format!("bound reached {} ago", human_age(now.saturating_sub(at))),
    };
    let line = format!("{} open of {}, {when}, {} waiting", bound.taken, bound.limit, bound.waiting);
    vec!["full".into(), line]
}

/// The room for what is not established that is full, or was last; no row where none was.
fn room_row(bound: &BoundView, now: u64) -> Vec<String> {
    let Some(room) = bound.rooms.iter().max_by_key(|room| (room.reached_since.is_some(), room.reached_at)) else {
        return Vec::new();
    };
    let Some(at) = room.reached_at else { return Vec::new() };
    let when = match room.reached_since {
        Some(since) => format!("full for {}", human_age(now.saturating_sub(since))),
        None => format!("full {} ago", human_age(now.saturating_sub(at))),
    };
    let most = bound.busiest.as_ref().filter(|_| room.reached_since.is_some());
    let most = most.map(|b| format!(", most from {} ({})", printable(&b.source), b.connections)).unwrap_or_default();
    let line =
        format!("{} {} of {}, {when}, {} waiting{most}", printable(&room.room), room.taken, room.limit, room.waiting);
    vec!["arriving".into(), line]
}

/// What the evidence of its connections was bound to; no row where nobody attests.
fn binding_row(attestation: &serde_json::Value) -> Vec<String> {
    let count = |field: &str| attestation.get(field).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let of = |field: &str| attestation.get(field).is_some_and(|v| !v.is_null());
    if !of("attest") && !of("verify") {
        return Vec::new();
    }
    let required = attestation.get("require_session_binding").and_then(serde_json::Value::as_bool) == Some(true);
    let line = format!(
        "{} to the session, {} to one bound before ({} confirmed it, {} resumed), {} to the certificate only{}",
        count("session_bound"),
        count("session_confirmed") + count("session_resumed"),
        count("session_confirmed"),
        count("session_resumed"),
        count("certificate_bound"),
        if required { "; session binding is required" } else { "" },
    );
    vec!["bound".into(), line]
}

/// Addresses of the attestation service: which one answers, and what is wrong with the others.
fn service_rows(attestation: &serde_json::Value, now: u64) -> Vec<Vec<String>> {
    let services = attestation["verify"]["services"].as_array().map_or(&[][..], Vec::as_slice);
    let rows = services.iter().map(|service| {
        let text = |key: &str| service[key].as_str().map(printable);
        let last = service["last_answer"].as_u64().map(|at| human_age(now.saturating_sub(at)));
        let fares = match (text("reason"), last) {
            (Some(reason), Some(age)) => format!("failing: {reason}, last answered {age} ago"),
            (Some(reason), None) => format!("failing: {reason}, never answered"),
            (None, Some(age)) => format!("answered {} times, last {age} ago", service["answered"]),
            (None, None) => "not asked yet".to_owned(),
        };
        let kind = text("kind").map(|kind| format!(" ({kind})")).unwrap_or_default();
        vec!["service".into(), format!("{}{kind}: {fares}", text("addr").unwrap_or_default())]
    });
    rows.collect()
}

/// Age of the evidence shown and the newest failure to get some; no row without evidence.
fn evidence_row(attestation: &serde_json::Value, now: u64) -> Vec<String> {
    let attest = &attestation["attest"];
    let mut parts = Vec::new();
    if let Some(age) = attest["evidence_age"].as_u64() {
        let left = attest["evidence_left"].as_u64().unwrap_or(0);
        let what = if attest["model"] == "passport" { "token" } else { "made" };
        parts.push(format!("{what} {} ago, shown for {} more", human_age(age), human_age(left)));
    }
    if let (Some("degraded"), Some(reason)) = (attest["state"].as_str(), attest["reason"].as_str()) {
        parts.push(format!("peers refuse it: {}", printable(reason)));
    }
    if let (Some(at), Some(reason)) = (attest["last_failure"]["at"].as_u64(), attest["last_failure"]["reason"].as_str())
    {
        let age = human_age(now.saturating_sub(at));
        let still = if attest["state"] == "failing" { "failing" } else { "last failure" };
        parts.push(format!("{still}: {} {age} ago", printable(reason)));
    }
    if parts.is_empty() { Vec::new() } else { vec!["evidence".into(), parts.join("; ")] }
}

/// The kernel's own counts of a captured endpoint; no row when they could not be seen.
fn kernel_row(report: &StatusReport, endpoint: &str) -> Vec<String> {
    let ident = endpoint.replace('-', "_");
    let counter = |name: String| report.kernel.as_ref().and_then(|k| k.counters.get(&name).copied());
    match (counter(format!("captured_{ident}")), counter(format!("refused_{ident}"))) {
        (Some(captured), Some(refused)) => {
            let guarded = counter(format!("guard_refused_{ident}")).unwrap_or(0);
            let line = format!("{captured} connections captured, {} packets refused", refused + guarded);
            vec!["kernel".into(), line]
        }
        _ => Vec::new(),
    }
}

/// What the rules refused beside the endpoints' own counts, once an instance; nothing when it could not be seen.
fn shared_line(report: &StatusReport) -> Option<String> {
    let counters = &report.kernel.as_ref()?.counters;
    counters.get(REFUSED)?;
    let [(_, not_tcp), (_, on_wire), (_, injected), (_, in_use), (_, undelivered)] = shared_refusals(counters);
    let all = not_tcp + on_wire + injected + in_use + undelivered;
    let parts = format!(
        "{not_tcp} not TCP (UDP, QUIC), {on_wire} kept off a wire (bound device, rule or route missing), {injected} \
         injected, {in_use} from a port borrowed of their client, {undelivered} that another socket would have taken"
    );
    Some(match all {
        0 => "kernel  no packets refused beside the endpoints' own".to_owned(),
        all => format!("kernel  {all} packets refused beside the endpoints' own: {parts}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_of_several_lines_stays_readable() {
        let problem = "DEGRADED: tngd: /etc/tng/x.toml:2:1: unknown field\n  hint: remove it\n\n\u{1b}[31mred\n";
        let shown = lines(problem, 9);
        assert_eq!(
            shown,
            ["DEGRADED: tngd: /etc/tng/x.toml:2:1: unknown field", "    hint: remove it", "  \u{fffd}[31mred"]
        );
        let many = "line\n".repeat(40);
        let shown = lines(&many, 12);
        assert_eq!((shown.len(), shown[12].as_str()), (13, "  ... and 28 more lines"));
    }
}
