//! Metrics that are read when they are asked for: latencies that the tunnels measured themselves, and ages.
//!
//! What has no value now (no evidence, no verdict in force) is absent and not zero.

use std::fmt;
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use serde_json::Value;

use crate::attest::{LATENCY_BOUNDS, LatencyStatus};
use crate::os::lock::Lock;

/// Name and help of a histogram, and where a tunnel's status has it, by what was asked for.
type Asked = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const HISTOGRAMS: [Asked; 2] = [
    (
        "aa_request_duration",
        "From asking the attestation agent, or the host's own TEE, for evidence to the outcome",
        &[("evidence", "/aa_latency")],
    ),
    (
        "as_request_duration",
        "From asking the attestation service for a token to the outcome, all its addresses together",
        &[("appraisal", "/as_latency"), ("token", "/token_latency")],
    ),
];

/// One endpoint as it is now.
#[derive(Debug, Clone)]
pub struct Reading {
    /// Its name.
    pub endpoint: String,
    /// Its side.
    pub side: String,
    /// What its tunnel says of itself.
    pub status: Value,
    /// Age of the oldest verdict on a peer that is in force, seconds.
    pub verdict_age: Option<u64>,
    /// Seconds since 1970.
    pub now: u64,
}

/// Name, help and value of a gauge; all are in seconds.
type Age = (&'static str, &'static str, fn(&Reading) -> Option<u64>);

const AGES: [Age; 6] = [
    ("evidence_age", "Age of the evidence that this side shows", |r| number(&r.status, "/attest/evidence_age")),
    ("evidence_left", "Time until that evidence may be shown no more", |r| number(&r.status, "/attest/evidence_left")),
    ("token_age", "Age of the token that this side shows (passport)", |r| number(&r.status, "/attest/token_age")),
    ("verdict_age", "Age of the oldest verdict on a peer that is in force", |r| r.verdict_age),
    ("collateral_age", "Time since the oldest collateral at hand was issued (builtin)", |r| {
        Some(r.now.saturating_sub(number(&r.status, "/verify/collateral/issued")?))
    }),
    ("collateral_left", "Time until the first collateral at hand ends (builtin)", |r| {
        Some(number(&r.status, "/verify/collateral/ends")?.saturating_sub(r.now))
    }),
];

fn number(status: &Value, pointer: &str) -> Option<u64> {
    status.pointer(pointer)?.as_u64()
}

/// What the last reading found.
#[derive(Debug, Default, Clone)]
pub struct Scraped(Arc<Mutex<Vec<Reading>>>);

impl Scraped {
    /// Replaces it: an endpoint that is gone has no metrics here.
    pub fn set(&self, readings: Vec<Reading>) {
        *self.0.locked() = readings;
    }
}

impl Collector for Scraped {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let readings = self.0.locked().clone();
        for (name, help, value) in AGES {
            let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?;
            for reading in &readings {
                let Some(age) = value(reading) else { continue };
                let gauge = ConstGauge::new(i64::try_from(age).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&labels(reading))?)?;
            }
        }
        for (name, help, kinds) in HISTOGRAMS {
            let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
            for reading in &readings {
                for (request, pointer) in kinds {
                    let measured =
                        reading.status.pointer(pointer).cloned().and_then(|v| serde_json::from_value(v).ok());
                    let measured: LatencyStatus = measured.unwrap_or_default();
                    for (outcome, calls) in &measured.outcomes {
                        let bounds = LATENCY_BOUNDS.into_iter().chain([f64::INFINITY]);
                        let buckets: Vec<_> = bounds.zip(calls.buckets.iter().copied()).collect();
                        let [endpoint, side] = labels(reading);
                        let labels = [endpoint, side, ("request", request), ("outcome", outcome)];
                        let mut metric = family.encode_family(&labels)?;
                        metric.encode_histogram::<NoLabelSet>(calls.sum_seconds, calls.calls, &buckets, None)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn labels(reading: &Reading) -> [(&'static str, &str); 2] {
    [("endpoint", &reading.endpoint), ("side", &reading.side)]
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;
    use serde_json::json;

    use super::*;

    fn text(readings: Vec<Reading>) -> String {
        let scraped = Scraped::default();
        scraped.set(readings);
        let mut registry = Registry::with_prefix("tng");
        registry.register_collector(Box::new(scraped));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    fn reading(status: Value, verdict_age: Option<u64>) -> Reading {
        Reading { endpoint: "db".into(), side: "egress".into(), status, verdict_age, now: 1000 }
    }

    #[test]
    fn ages_are_shown_where_there_is_something_of_that_age() {
        let status = json!({
            "attest": { "evidence_age": 3, "evidence_left": 597, "token_age": 5 },
            "verify": { "collateral": { "families": 1, "issued": 900, "ends": 1500 } },
        });
        let shown = text(vec![reading(status, Some(7))]);
        for (name, value) in [
            ("evidence_age", 3),
            ("evidence_left", 597),
            ("token_age", 5),
            ("verdict_age", 7),
            ("collateral_age", 100),
            ("collateral_left", 500),
        ] {
            let line = format!("tng_{name}_seconds{{endpoint=\"db\",side=\"egress\"}} {value}\n");
            assert!(shown.contains(&line), "no {line} in {shown}");
        }
        let nothing = text(vec![reading(json!({ "attest": null, "verify": null }), None)]);
        assert!(!nothing.contains("db"), "{nothing}");
        // A clock that was set back makes no negative age.
        let future = json!({ "verify": { "collateral": { "issued": 2000, "ends": 500 } } });
        let shown = text(vec![reading(future, None)]);
        assert!(shown.contains("collateral_age_seconds{endpoint=\"db\",side=\"egress\"} 0\n"), "{shown}");
        assert!(shown.contains("collateral_left_seconds{endpoint=\"db\",side=\"egress\"} 0\n"), "{shown}");
    }

    #[test]
    fn latencies_become_cumulative_histograms_by_outcome() {
        let mut buckets = vec![0; LATENCY_BOUNDS.len() + 1];
        (buckets[0], buckets[2], buckets[LATENCY_BOUNDS.len()]) = (1, 2, 1);
        let calls = json!({ "calls": 4, "sum_seconds": 61.5, "buckets": buckets });
        let latency = json!({ "calls": 4, "bounds_seconds": [], "outcomes": { "timeout": calls } });
        let shown = text(vec![reading(json!({ "as_latency": latency, "token_latency": null }), None)]);
        let line = |suffix: &str, le: &str, value: &str| {
            format!(
                "tng_as_request_duration_seconds_{suffix}{{{le}endpoint=\"db\",side=\"egress\",request=\"appraisal\",outcome=\"timeout\"}} {value}\n"
            )
        };
        for (suffix, le, value) in [
            ("sum", "", "61.5"),
            ("count", "", "4"),
            ("bucket", "le=\"0.001\",", "1"),
            ("bucket", "le=\"0.005\",", "3"),
            ("bucket", "le=\"60.0\",", "3"),
            ("bucket", "le=\"+Inf\",", "4"),
        ] {
            assert!(shown.contains(&line(suffix, le, value)), "no {} in {shown}", line(suffix, le, value));
        }
        assert!(!shown.contains("request=\"token\""), "{shown}");
    }
}
