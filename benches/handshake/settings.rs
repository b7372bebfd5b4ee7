//! How much is measured. Everything has a bound.

use std::time::Duration;

use crate::Outcome;
use crate::ways::Way;

/// Connections that come about at once, in every way alike.
pub const AT_ONCE: usize = 4;

/// One run's bounds.
pub struct Settings {
    /// Rounds; each measures a slice of every way, in random order.
    pub rounds: usize,
    /// Handshakes in a slice.
    pub handshakes: usize,
    /// What is measured.
    pub ways: Vec<Way>,
    /// Few rounds and handshakes, budgets printed but not judged: for tests and while developing.
    pub quick: bool,
    /// The run is given up after this.
    pub deadline: Duration,
}

impl Settings {
    /// `TNG_BENCH_HANDSHAKE_ROUNDS` (1-1000), `TNG_BENCH_HANDSHAKES` (1-400), `TNG_BENCH_WAYS` (keys of the JSON, comma
    /// separated; for profiling), `TNG_BENCH_QUICK=1`.
    /// Without cargo's `--bench` argument (`cargo test`) the run is quick.
    pub fn from_environment() -> Outcome<Self> {
        let quick = set("TNG_BENCH_QUICK").is_some_and(|v| v != "0") || !std::env::args().any(|a| a == "--bench");
        let (rounds, handshakes) = if quick { (2, 10) } else { (41, 100) };
        let rounds = number("TNG_BENCH_HANDSHAKE_ROUNDS", 1000, rounds)?;
        // Each takes two of our descriptors, and 1024 are what a process has by default.
        let handshakes = number("TNG_BENCH_HANDSHAKES", 400, handshakes)?;
        let ways = match set("TNG_BENCH_WAYS") {
            None => Way::ALL.to_vec(),
            Some(text) => text.split(',').map(|name| Way::named(name.trim())).collect::<Outcome<Vec<_>>>()?,
        };
        // A round of 100 takes about a second on two cores; ten times that is not slow but stuck.
        Ok(Self { rounds, handshakes, ways, quick, deadline: Duration::from_secs(120 + 10 * rounds as u64) })
    }

    /// Whether budgets are judged: a full run with everything in it.
    pub fn judges(&self) -> bool {
        let all = Way::ALL.iter().all(|way| self.ways.contains(way));
        all && !self.quick && self.rounds >= 11 && self.handshakes >= 50
    }
}

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn number(name: &str, most: usize, default: usize) -> Outcome<usize> {
    let Some(text) = set(name) else { return Ok(default) };
    let number = text.parse().ok().filter(|n| (1..=most).contains(n));
    Ok(number.ok_or_else(|| format!("{name}=\"{text}\" is not 1-{most}"))?)
}
