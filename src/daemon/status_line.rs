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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::{Counters, RefusalView, State};

    fn endpoint(name: &str, total: u64, refused: u64, last: Option<(&str, u64)>) -> EndpointView {
        let reason = |(reason, when): (&str, u64)| RefusalView {
            reason: reason.into(),
            when,
            peer: String::new(),
            detail: String::new(),
        };
        let counters = Counters {
            connections_total: total,
            connections_open: 1,
            connections_refused: refused,
            ..Counters::default()
        };
        EndpointView {
            name: name.into(),
            side: "ingress".into(),
            mode: String::new(),
            traffic: String::new(),
            attest: None,
            verify: None,
            no_ra: false,
            sample: false,
            bound: crate::daemon::BoundView::default(),
            counters,
            verdicts: Vec::new(),
            last_refusal: last.map(reason),
            refusals: Vec::new(),
            refused: Default::default(),
            attestation: serde_json::Value::Null,
        }
    }

    fn line(state: State, problems: &[&str], endpoints: Vec<EndpointView>) -> String {
        let mut report = crate::daemon::ControlState::new("x", "/x.toml").report();
        report.state = state;
        report.problems = problems.iter().map(|&p| p.to_owned()).collect();
        report.endpoints = endpoints;
        status_line(&report)
    }

    #[test]
    fn it_says_what_is_served_what_is_wrong_and_what_was_refused_last() {
        let two = vec![endpoint("a", 10, 2, Some(("older", 5))), endpoint("b", 5, 1, Some(("newer", 6)))];
        assert_eq!(
            line(State::Ready, &[], two),
            "ready: ingress a, ingress b; 2 open, 12 tunnelled, 3 refused (last: newer)"
        );
        assert_eq!(line(State::Ready, &[], vec![endpoint("a", 0, 0, None)]), "ready: ingress a");
        let file = "tngd: /etc/tng/x.toml:2:1: unknown field\n  hint: remove it";
        assert_eq!(
            line(State::Degraded, &[file, "more"], Vec::new()),
            "degraded: tngd: /etc/tng/x.toml:2:1: unknown field"
        );
        let many = (0..20).map(|i| endpoint(&i.to_string(), 0, 0, None)).collect();
        assert!(line(State::Ready, &[], many).ends_with("ingress 7, 12 more"));
    }
}
