//! The bounds of an endpoint and who is beyond them: for status, metrics, the log, and whether it counts as degraded.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::endpoint::EndpointRuntime;
use super::gate::Gate;
use super::status::{BoundView, BusySource, RoomView, unix_seconds};
use crate::config::Side;

/// Reasons in the log (tng-reasons(7)).
const CONNECTIONS_REASON: &str = "connections-full";
const ARRIVALS_REASON: &str = "arrivals-full";
const HANDSHAKES_REASON: &str = "handshakes-full";

/// How long a bound may be reached before the endpoint counts as degraded, in seconds.
const FULL: u64 = 30;
/// How long nothing is said again of a bound that is reached, left and reached.
const FULL_AGAIN: Duration = Duration::from_secs(60);

/// The bounds of one endpoint. `queued`: who waits for a place among its connections. `held`: places that the accept loop
/// has taken and nobody fills yet.
pub(super) fn view(runtime: &EndpointRuntime, queued: u64, held: usize) -> BoundView {
    let reached = runtime.gate.reached();
    let mut view = BoundView {
        limit: runtime.endpoint.limits.max_connections as u64,
        taken: runtime.gate.open().saturating_sub(held) as u64,
        waiting: queued,
        reached_times: reached.times,
        reached_at: reached.last.map(unix_seconds),
        reached_since: reached.since.map(unix_seconds),
        ..BoundView::default()
    };
    if runtime.endpoint.side == Side::Egress {
        let handshakes = &runtime.handshakes;
        view.arriving = handshakes.arrivals.open() as u64;
        view.rooms = vec![
            room("arrivals", &handshakes.arrivals),
            room("handshakes of strangers", &handshakes.strangers),
            room("handshakes of peers", &handshakes.peers),
        ];
        view.busiest = handshakes
            .busiest()
            .map(|(source, connections)| BusySource { source: source.to_string(), connections: connections as u64 });
    }
    view
}

fn room(name: &str, gate: &Arc<Gate>) -> RoomView {
    let reached = gate.reached();
    RoomView {
        room: name.to_owned(),
        limit: gate.limit() as u64,
        taken: gate.open() as u64,
        waiting: gate.waiting() as u64,
        reached_times: reached.times,
        reached_at: reached.last.map(unix_seconds),
        reached_since: reached.since.map(unix_seconds),
    }
}

/// Each bound that is reached now, in words, and since when: the reason, the words, seconds.
fn reached(view: &BoundView, now: u64) -> Vec<(&'static str, String, u64, u64)> {
    let mut found = Vec::new();
    if let Some(since) = view.reached_since {
        let what = format!("max_connections ({}) is reached", view.limit);
        found.push((CONNECTIONS_REASON, what, view.waiting, now.saturating_sub(since)));
    }
    for room in &view.rooms {
        let Some(since) = room.reached_since else { continue };
        let most = match &view.busiest {
            Some(busiest) => format!(", most of them ({}) from {}", busiest.connections, busiest.source),
            None => String::new(),
        };
        let what = format!("the room for {} ({}) is full{most}", room.room, room.limit);
        let reason = if room.room == "arrivals" { ARRIVALS_REASON } else { HANDSHAKES_REASON };
        found.push((reason, what, room.waiting, now.saturating_sub(since)));
    }
    found
}

/// Bounds that are reached for long and keep somebody out, in words.
pub(super) fn full(endpoint: &str, view: &BoundView, now: u64) -> Vec<String> {
    let long = |(_, what, waiting, seconds): (&str, String, u64, u64)| {
        // A bound that is just met keeps nobody out.
        let is_long = seconds >= FULL && waiting > 0;
        is_long.then(|| format!("endpoint {endpoint}: {what} since {seconds} s, {waiting} wait"))
    };
    reached(view, now).into_iter().filter_map(long).collect()
}

/// What was told in the log, once an episode and once a minute at most.
#[derive(Debug, Default)]
pub(super) struct Told(HashMap<&'static str, Instant>);

impl Told {
    /// Tells of bounds that are reached and were not told of.
    pub fn warn(&mut self, endpoint: &str, view: &BoundView) {
        for (reason, what, waiting, _) in reached(view, unix_seconds(SystemTime::now())) {
            if self.0.get(reason).is_some_and(|at| at.elapsed() < FULL_AGAIN) {
                continue;
            }
            self.0.insert(reason, Instant::now());
            tracing::warn!(reason, endpoint, waiting, "{what}, more connections wait");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(since: Option<u64>, waiting: u64) -> BoundView {
        BoundView {
            limit: 5,
            taken: 5,
            waiting,
            reached_times: 1,
            reached_at: Some(100),
            reached_since: since,
            ..BoundView::default()
        }
    }

    #[test]
    fn a_bound_that_keeps_somebody_out_for_half_a_minute_degrades() {
        assert_eq!(full("web", &bound(Some(100), 1), 129), [""; 0], "not for long");
        let said = full("web", &bound(Some(100), 1), 130);
        assert_eq!(said, ["endpoint web: max_connections (5) is reached since 30 s, 1 wait"]);
        assert_eq!(full("web", &bound(Some(100), 0), 500), [""; 0], "it keeps nobody out");
        assert_eq!(full("web", &bound(None, 1), 500), [""; 0], "it was met once and is free again");
    }

    #[test]
    fn a_full_room_says_who_fills_it() {
        let room = RoomView {
            room: "handshakes of strangers".into(),
            limit: 256,
            taken: 256,
            waiting: 7,
            reached_since: Some(100),
            ..RoomView::default()
        };
        let busiest = Some(BusySource { source: "192.0.2.9".into(), connections: 4000 });
        let view = BoundView { rooms: vec![room], busiest, ..bound(None, 0) };
        let said = full("web", &view, 140);
        assert_eq!(
            said,
            [
                "endpoint web: the room for handshakes of strangers (256) is full, most of them (4000) from 192.0.2.9 since 40 s, 7 wait"
            ]
        );
    }
}
