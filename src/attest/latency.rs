//! How long the services outside this process take to answer: the attestation agent, the attestation service.
//!
//! A call is timed from its first attempt to its outcome, whatever that is: one that failed, ran into its deadline or was
//! given up by its caller took that long too, and a histogram of good answers alone would hide a bad day.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{AttestError, Attester, Credential, Evidence, RuntimeData, VerifyError};
use crate::os::lock::Lock;

/// Upper bounds of the histogram's buckets, seconds. An agent on the same host answers within milliseconds, a service
/// that fetches collateral takes seconds, and no deadline in the configuration's reach is beyond a minute by default.
pub const BOUNDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Buckets: one for each bound, and one beyond.
const BUCKETS: usize = BOUNDS.len() + 1;

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ended {
    /// With what was asked for.
    Ok,
    /// With the service's refusal of the evidence.
    Refused,
    /// Any other failure.
    Error,
    /// At its deadline.
    Timeout,
    /// Its caller went before it ended.
    GivenUp,
}

impl Ended {
    /// As metrics and status name it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::GivenUp => "given-up",
        }
    }
}

impl From<&AttestError> for Ended {
    fn from(error: &AttestError) -> Self {
        match error {
            AttestError::AaTimeout | AttestError::AaTurn => Self::Timeout,
            AttestError::Host(e) if e.is_timeout() => Self::Timeout,
            _ => Self::Error,
        }
    }
}

impl From<&VerifyError> for Ended {
    fn from(error: &VerifyError) -> Self {
        match error {
            VerifyError::AsTimeout | VerifyError::AsStalled => Self::Timeout,
            VerifyError::AsRejected(_) | VerifyError::AsBinding(_) => Self::Refused,
            _ => Self::Error,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Histogram {
    buckets: [u64; BUCKETS],
    sum: Duration,
}

#[derive(Default)]
struct Kept {
    by: BTreeMap<Ended, Histogram>,
    last: Option<(Duration, Ended)>,
}

/// Times calls to one service.
pub struct Latency {
    what: &'static str,
    kept: Mutex<Kept>,
}

/// Notes a call also when its future is dropped: a handshake's deadline ends what it waits for.
struct Running<'a> {
    latency: &'a Latency,
    began: Instant,
    ended: Ended,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.latency.note(self.began.elapsed(), self.ended);
    }
}

impl Latency {
    /// Of calls to `what`, as a trace of the log names it.
    pub fn of(what: &'static str) -> Self {
        Self { what, kept: Mutex::default() }
    }

    /// Runs `call` and notes how long it took and how it ended.
    pub async fn time<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E>
    where
        for<'e> Ended: From<&'e E>,
    {
        let mut running = Running { latency: self, began: Instant::now(), ended: Ended::GivenUp };
        let outcome = call.await;
        running.ended = outcome.as_ref().map_or_else(Ended::from, |_| Ended::Ok);
        outcome
    }

    fn note(&self, took: Duration, ended: Ended) {
        tracing::trace!(outcome = ended.word(), took_ms = millis(took), "asked the {}", self.what);
        let mut kept = self.kept.locked();
        let histogram = kept.by.entry(ended).or_default();
        histogram.buckets[bucket(took)] += 1;
        histogram.sum += took;
        kept.last = Some((took, ended));
    }

    /// What was measured so far.
    pub fn status(&self) -> LatencyStatus {
        let kept = self.kept.locked();
        let mut all = [0; BUCKETS];
        let mut sum = Duration::ZERO;
        for histogram in kept.by.values() {
            all.iter_mut().zip(histogram.buckets).for_each(|(all, one)| *all += one);
            sum += histogram.sum;
        }
        let calls = all.iter().sum();
        let measured = |(ended, h): (&Ended, &Histogram)| {
            let measured = Measured {
                calls: h.buckets.iter().sum(),
                sum_seconds: h.sum.as_secs_f64(),
                buckets: h.buckets.to_vec(),
            };
            (ended.word().to_owned(), measured)
        };
        LatencyStatus {
            calls,
            last_ms: kept.last.map(|(took, _)| millis(took)),
            last_outcome: kept.last.map(|(_, ended)| ended.word().to_owned()),
            mean_ms: u32::try_from(calls).ok().and_then(|n| sum.checked_div(n)).map(millis),
            half_within: within(&all, 0.5),
            p99_within: within(&all, 0.99),
            bounds_seconds: BOUNDS.to_vec(),
            outcomes: kept.by.iter().map(measured).collect(),
        }
    }
}

fn millis(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e6).round() / 1e3
}

fn bucket(took: Duration) -> usize {
    BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len())
}

/// The bound, in seconds, within which this part of the calls ended; `None` without calls or when it is beyond all bounds.
fn within(buckets: &[u64; BUCKETS], part: f64) -> Option<f64> {
    let all: u64 = buckets.iter().sum();
    let wanted = (all as f64 * part).ceil() as u64;
    let mut seen = 0;
    let at = buckets.iter().position(|count| {
        seen += count;
        seen >= wanted
    })?;
    if all == 0 { None } else { BOUNDS.get(at).copied() }
}

/// What `status` shows of the calls to one service, all outcomes together unless it says otherwise.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LatencyStatus {
    /// How many ended.
    pub calls: u64,
    /// How long the newest took, milliseconds.
    pub last_ms: Option<f64>,
    /// How it ended: `ok`, `refused`, `error`, `timeout` or `given-up`.
    pub last_outcome: Option<String>,
    /// Mean, milliseconds.
    pub mean_ms: Option<f64>,
    /// Half of the calls took at most so many seconds: a bucket's bound, not an estimate. Absent beyond the last bound.
    pub half_within: Option<f64>,
    /// The same of 99 in a hundred.
    pub p99_within: Option<f64>,
    /// Upper bounds of the buckets, seconds.
    pub bounds_seconds: Vec<f64>,
    /// By outcome; only those that occurred.
    pub outcomes: BTreeMap<String, Measured>,
}

/// Calls of one outcome.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Measured {
    /// How many.
    pub calls: u64,
    /// How long they took together, seconds.
    pub sum_seconds: f64,
    /// How many took longer than the bound before and no longer than this one; the last: longer than all bounds.
    pub buckets: Vec<u64>,
}

/// An attester outside this process, timed. One piece of evidence is one call, though the agent may be asked for its
/// TEE and its devices too.
pub struct TimedAttester {
    inner: Box<dyn Attester>,
    latency: Latency,
}

impl TimedAttester {
    /// Times `inner`.
    pub fn new(inner: impl Attester + 'static) -> Self {
        Self { inner: Box::new(inner), latency: Latency::of("attestation agent") }
    }
}

#[async_trait]
impl Attester for TimedAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        self.latency.time(self.inner.evidence(runtime_data)).await
    }
    async fn credential(&self, runtime_data: &RuntimeData) -> Result<Credential, AttestError> {
        self.latency.time(self.inner.credential(runtime_data)).await
    }
    fn calls(&self) -> u64 {
        self.inner.calls()
    }
    fn provider(&self) -> &'static str {
        self.inner.provider()
    }
    fn latency(&self) -> Option<LatencyStatus> {
        Some(self.latency.status())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn took(latency: &Latency, millis: u64, ended: Ended) {
        latency.note(Duration::from_millis(millis), ended);
    }

    #[test]
    fn bounds_and_not_guesses_are_told() {
        let latency = Latency::of("test");
        assert_eq!(latency.status().half_within, None, "nothing was measured");
        assert_eq!((latency.status().calls, latency.status().mean_ms), (0, None));
        for _ in 0..98 {
            took(&latency, 8, Ended::Ok);
        }
        took(&latency, 100, Ended::Error);
        took(&latency, 90_000, Ended::Timeout);
        let status = latency.status();
        assert_eq!((status.calls, status.half_within, status.p99_within), (100, Some(0.01), Some(0.1)));
        assert_eq!((status.last_ms, status.last_outcome.as_deref()), (Some(90_000.0), Some("timeout")));
        assert_eq!(status.mean_ms, Some((98.0 * 8.0 + 100.0 + 90_000.0) / 100.0));
        took(&latency, 90_000, Ended::Timeout);
        assert_eq!(latency.status().p99_within, None, "two of a hundred and one are beyond all bounds");
        let timeouts = &status.outcomes["timeout"];
        assert_eq!((timeouts.calls, timeouts.buckets.last(), timeouts.sum_seconds), (1, Some(&1), 90.0));
        assert_eq!(status.outcomes["ok"].buckets[3], 98, "8 ms are between 5 and 10 ms: {status:?}");
        assert!(!status.outcomes.contains_key("refused"), "what never occurred is not listed");
    }

    #[test]
    fn a_duration_belongs_to_the_bucket_whose_bound_it_reaches() {
        for (millis, at) in [(0, 0), (1, 0), (2, 1), (10, 3), (11, 4), (60_000, 14), (60_001, 15)] {
            assert_eq!(bucket(Duration::from_millis(millis)), at, "{millis} ms");
        }
        assert!(BOUNDS.is_sorted());
    }

    #[tokio::test]
    async fn each_end_of_a_call_is_told_apart_and_a_dropped_call_is_counted_too() {
        let latency = Latency::of("test");
        let outcome = |result: Result<(), VerifyError>| async { result };
        for result in [
            Ok(()),
            Err(VerifyError::AsTimeout),
            Err(VerifyError::AsStalled),
            Err(VerifyError::AsRejected(String::new())),
            Err(VerifyError::AsBinding(String::new())),
            Err(VerifyError::AsUnreachable(String::new())),
        ] {
            let _ = latency.time(outcome(result)).await;
        }
        let endless = latency.time(std::future::pending::<Result<(), VerifyError>>());
        assert!(tokio::time::timeout(Duration::from_millis(2), endless).await.is_err());
        let outcomes = latency.status().outcomes;
        let counts: Vec<_> = outcomes.iter().map(|(name, m)| (name.as_str(), m.calls)).collect();
        assert_eq!(counts, [("error", 1), ("given-up", 1), ("ok", 1), ("refused", 2), ("timeout", 2)]);
        assert!(outcomes["given-up"].sum_seconds >= 0.002);
    }
}
