//! Metrics in the OpenMetrics text format (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).

use std::fmt;
use std::sync::atomic::Ordering;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::kernel_counts::{Captured, KernelCounts};
use super::scraped::{Reading, Scraped};
use super::status::{BoundView, RoomView};
use crate::capture::counted::Counts;
use crate::config::Side;

/// Upper bounds of the handshake histogram, in seconds: a resumed handshake takes about one
/// millisecond, a fresh appraisal through a service up to the handshake deadline.
const HANDSHAKE_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabels {
    endpoint: String,
    side: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    endpoint: String,
    side: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    endpoint: String,
    side: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    endpoint: String,
    side: String,
    event: &'static str,
}

/// Counters in a tunnel's status and the events they count.
const ATTESTATION_EVENTS: [(&str, &str); 12] = [
    ("/as_calls", "as-request"),
    ("/as_failovers", "as-failover"),
    ("/aa_calls", "aa-request"),
    ("/cache_hits", "verdict-reused"),
    ("/session_bound", "session-bound"),
    ("/session_confirmed", "session-confirmed"),
    ("/session_resumed", "session-resumed"),
    ("/certificate_bound", "certificate-bound"),
    ("/attest/failures", "evidence-failed"),
    ("/peers_reappraised", "peer-reappraised"),
    ("/peers_failed", "peer-failed"),
    ("/peers_recovered", "peer-recovered"),
];

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    attestation: Family<EventLabels, Counter>,
    connections: Family<ReasonLabels, Counter>,
    refused: Family<ReasonLabels, Counter>,
    accept_errors: Family<ReasonLabels, Counter>,
    active: Family<EndpointLabels, Gauge>,
    closing: Family<EndpointLabels, Gauge>,
    waiting: Family<EndpointLabels, Gauge>,
    bound_reached: Family<EndpointLabels, Counter>,
    arriving: Family<EndpointLabels, Gauge>,
    handshakes_waiting: Family<EndpointLabels, Gauge>,
    handshakes_full: Family<EndpointLabels, Counter>,
    scraped: Scraped,
    kernel: KernelCounts,
    bytes: Family<DirectionLabels, Counter>,
    handshake: Family<EndpointLabels, Histogram, fn() -> Histogram>,
}

impl Metrics {
    /// Registers everything.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("tng");
        let new = Self {
            connections: Family::default(),
            refused: Family::default(),
            accept_errors: Family::default(),
            active: Family::default(),
            closing: Family::default(),
            waiting: Family::default(),
            bound_reached: Family::default(),
            arriving: Family::default(),
            handshakes_waiting: Family::default(),
            handshakes_full: Family::default(),
            scraped: Scraped::default(),
            kernel: KernelCounts::default(),
            attestation: Family::default(),
            bytes: Family::default(),
            handshake: Family::new_with_constructor(|| Histogram::new(HANDSHAKE_BUCKETS)),
            registry: Registry::default(),
        };
        registry.register("connections", "Connections that ended, by reason", new.connections.clone());
        registry.register("refused", "Connections that never carried a byte, by reason", new.refused.clone());
        registry.register("accept_errors", "Failures of accept(2), by error", new.accept_errors.clone());
        registry.register(
            "attestation_events",
            "Requests to attestation services and agents, verdicts reused, and what evidence was bound to",
            new.attestation.clone(),
        );
        registry.register(
            "log_records_lost",
            "Log records dropped because nobody read the log",
            super::log_records_lost(),
        );
        registry.register("connections_active", "Connections open now", new.active.clone());
        registry.register(
            "connections_waiting",
            "Connections that wait because max_connections is reached",
            new.waiting.clone(),
        );
        registry.register("bound_reached", "How often max_connections was reached", new.bound_reached.clone());
        registry.register(
            "connections_arriving",
            "Connections of an egress that are not established yet",
            new.arriving.clone(),
        );
        registry.register(
            "handshakes_waiting",
            "Connections that wait for a place among the handshakes",
            new.handshakes_waiting.clone(),
        );
        registry.register(
            "handshakes_full",
            "How often a bound on what is not established yet was reached",
            new.handshakes_full.clone(),
        );
        registry.register(
            "peers_closing",
            "Peers that failed when they were appraised again and whose connections are open for the grace",
            new.closing.clone(),
        );
        registry.register_with_unit(
            "relayed",
            "Application bytes relayed, by direction",
            Unit::Bytes,
            new.bytes.clone(),
        );
        registry.register_with_unit(
            "handshake_duration",
            "From accept to the end of the appraisal",
            Unit::Seconds,
            new.handshake.clone(),
        );
        registry.register_collector(Box::new(new.scraped.clone()));
        registry.register_collector(Box::new(new.kernel.clone()));
        Self { registry, ..new }
    }

    /// One endpoint's metrics, labels resolved once.
    pub fn endpoint(&self, endpoint: &str, side: Side) -> EndpointMetrics {
        let labels = EndpointLabels { endpoint: endpoint.to_owned(), side: side.to_string() };
        let direction = |direction| {
            let labels = DirectionLabels { endpoint: labels.endpoint.clone(), side: labels.side.clone(), direction };
            self.bytes.get_or_create(&labels).clone()
        };
        EndpointMetrics {
            up: direction("up"),
            down: direction("down"),
            active: self.active.get_or_create(&labels).clone(),
            waiting: self.waiting.get_or_create(&labels).clone(),
            bound_reached: self.bound_reached.get_or_create(&labels).clone(),
            arriving: self.arriving.get_or_create(&labels).clone(),
            handshakes_waiting: self.handshakes_waiting.get_or_create(&labels).clone(),
            handshakes_full: self.handshakes_full.get_or_create(&labels).clone(),
            handshake: self.handshake.get_or_create(&labels).clone(),
            connections: self.connections.clone(),
            refused: self.refused.clone(),
            accept_errors: self.accept_errors.clone(),
            labels,
            side,
        }
    }

    /// Takes over what a tunnel counts itself. A counter it does not have is not shown.
    pub fn attestation(&self, endpoint: &str, side: Side, status: &serde_json::Value) {
        for (field, event) in ATTESTATION_EVENTS {
            if let Some(count) = status.pointer(field).and_then(serde_json::Value::as_u64) {
                let labels = EventLabels { endpoint: endpoint.to_owned(), side: side.to_string(), event };
                self.attestation.get_or_create(&labels).inner().store(count, Ordering::Relaxed);
            }
        }
        if let Some(closing) = status.pointer("/peers_closing").and_then(serde_json::Value::as_i64) {
            let labels = EndpointLabels { endpoint: endpoint.to_owned(), side: side.to_string() };
            self.closing.get_or_create(&labels).set(closing);
        }
    }

    /// Takes over what all endpoints measured, and the ages of what they have now.
    pub fn read(&self, readings: Vec<Reading>) {
        self.scraped.set(readings);
    }

    /// Takes over what the kernel counted for these captured endpoints and for the instance.
    pub fn kernel(&self, captured: Vec<Captured>, counts: Option<Counts>) {
        self.kernel.set(captured, counts);
    }

    /// The exposition text.
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// One endpoint's metrics.
pub struct EndpointMetrics {
    up: Counter,
    down: Counter,
    /// Connections open now.
    pub active: Gauge,
    waiting: Gauge,
    bound_reached: Counter,
    arriving: Gauge,
    handshakes_waiting: Gauge,
    handshakes_full: Counter,
    /// Seconds from accept to the end of the appraisal.
    pub handshake: Histogram,
    connections: Family<ReasonLabels, Counter>,
    refused: Family<ReasonLabels, Counter>,
    accept_errors: Family<ReasonLabels, Counter>,
    labels: EndpointLabels,
    side: Side,
}

impl EndpointMetrics {
    fn reason(&self, reason: &'static str) -> ReasonLabels {
        ReasonLabels { endpoint: self.labels.endpoint.clone(), side: self.labels.side.clone(), reason }
    }

    /// Takes over who waits, and how often the bounds were reached.
    pub fn bound(&self, bound: &BoundView) {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.waiting.set(number(bound.waiting));
        self.bound_reached.inner().store(bound.reached_times, Ordering::Relaxed);
        if self.side == Side::Egress {
            let handshakes = |of: fn(&RoomView) -> u64| bound.rooms.iter().map(of).sum::<u64>();
            self.arriving.set(number(bound.arriving));
            self.handshakes_waiting.set(number(handshakes(|room| room.waiting)));
            self.handshakes_full.inner().store(handshakes(|room| room.reached_times), Ordering::Relaxed);
        }
    }

    /// A connection ended.
    pub fn ended(&self, reason: &'static str) {
        self.connections.get_or_create(&self.reason(reason)).inc();
    }

    /// A connection was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&self.reason(reason)).inc();
    }

    /// accept(2) failed.
    pub fn accept_error(&self, error: &'static str) {
        self.accept_errors.get_or_create(&self.reason(error)).inc();
    }

    /// Counter of the bytes from the plain side into the tunnel.
    pub fn into_tunnel(&self) -> &Counter {
        match self.side {
            Side::Ingress => &self.up,
            Side::Egress => &self.down,
        }
    }

    /// Counter of the bytes out of the tunnel to the plain side.
    pub fn out_of_tunnel(&self) -> &Counter {
        match self.side {
            Side::Ingress => &self.down,
            Side::Egress => &self.up,
        }
    }

    /// Bytes from client to service, and from service to client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.up.get(), self.down.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_explained_in_tngd_8_and_every_explained_one_exists() {
        let metrics = Metrics::new();
        // A family without a sample is not shown.
        let endpoint = metrics.endpoint("x", Side::Ingress);
        endpoint.ended("closed");
        endpoint.refused("tls-alpn");
        endpoint.accept_error("emfile");
        metrics.attestation("x", Side::Ingress, &serde_json::json!({ "as_calls": 1 }));
        metrics.kernel(vec![("x".into(), "ingress".into())], Some([("captured_x".to_owned(), 1)].into()));
        let text = metrics.encode().unwrap();
        let named = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let mut known: Vec<_> = named
            .map(|(name, kind)| if kind == "counter" { format!("{name}_total") } else { name.to_owned() })
            .collect();
        let page = include_str!("../../man/tngd.8");
        let section = page.split(".SH METRICS").nth(1).unwrap().split("\n.SH ").next().unwrap();
        let words = section.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let mut explained: Vec<_> = words.filter(|w| w.starts_with("tng_")).map(str::to_owned).collect();
        known.sort();
        explained.sort();
        assert_eq!(explained, known);
    }
}
