//! The line that `systemctl status` shows (STATUS of sd_notify(3)).

use super::status::{EndpointView, StatusReport};

/// Endpoints named in the line; a terminal has one line for it.
const MAX_NAMED: usize = 8;

/// `ready: ingress model-api, egress db; 3 open, 120 tunnelled, 2 refused (last: verdict-contraindicated)`; what is
/// wrong, with its place in the file, comes before the counts.
pub(super) fn status_line(report: &StatusReport) -> String {
    let endpoints = &report.endpoints;
    let mut names: Vec<String> = endpoints.iter().take(MAX_NAMED).map(|e| format!("{} {}", e.side, e.name)).collect();
    if endpoints.len() > MAX_NAMED {
        names.push(format!("{} more", endpoints.len() - MAX_NAMED));
    }
    let problem = report.problems.first().and_then(|p| p.lines().next()).map(str::to_owned);
    // An instance that refuses everything has no endpoint to name or count.
    let names = Some(names.join(", ")).filter(|n| !n.is_empty());
    let parts: Vec<String> = names.into_iter().chain(problem).chain(counts(endpoints)).collect();
    format!("{}: {}", report.state.word(), parts.join("; "))
}

fn counts(endpoints: &[EndpointView]) -> Option<String> {
    let sum = |of: fn(&EndpointView) -> u64| endpoints.iter().map(of).sum::<u64>();
    let total = sum(|e| e.counters.connections_total);
    if total == 0 {
        return None;
    }
    let (open, refused) = (sum(|e| e.counters.connections_open), sum(|e| e.counters.connections_refused));
    let last = endpoints.iter().filter_map(|e| e.last_refusal.as_ref()).max_by_key(|r| r.when);
    let last = last.map(|r| format!(" (last: {})", r.reason)).unwrap_or_default();
    Some(format!("{open} open, {} tunnelled, {refused} refused{last}", total.saturating_sub(refused)))
}
