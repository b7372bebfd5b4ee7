//! How much is measured. Everything has a bound: bytes, connections and time.

use std::time::Duration;

use crate::Outcome;
use crate::peers::Peer;

/// One run's bounds.
pub struct Settings {
    /// Rounds; each measures every peer once with fresh processes.
    pub rounds: usize,
    /// Fewer rounds and bytes, budgets printed but not judged: for CI and while developing.
    pub quick: bool,
    /// Who takes part.
    pub peers: Vec<Peer>,
    /// Bytes of one bulk measurement, all streams together.
    pub bulk_bytes: u64,
    /// How long new connections are made, at most `connect_max` of them.
    pub connect_for: Duration,
    /// Bound of the above: ports in TIME_WAIT are finite, and the bare loopback is quick.
    pub connect_max: u64,
    /// Clients that make connections at once.
    pub connect_clients: usize,
    /// Requests a second, due at fixed times whether or not the earlier ones were answered.
    pub rate: u32,
    /// How long requests are due in one slice.
    pub latency_slice: Duration,
    /// Slices of each peer in a round.
    pub latency_slices: usize,
    /// Requests a second beside bulk streams.
    pub beside_rate: u32,
    /// How long small requests are sent beside bulk streams in one slice.
    pub beside_slice: Duration,
    /// How long bulk streams are compared in one slice.
    pub fairness_slice: Duration,
    /// Slices of each peer in a round.
    pub sharing_slices: usize,
    /// Nothing but [`crate::sharing`].
    pub only_sharing: bool,
    /// Connections held while memory is measured.
    pub idle_connections: usize,
    /// The run is given up after this.
    pub deadline: Duration,
}

impl Settings {
    /// `TNG_BENCH_ROUNDS` (1-100), `TNG_BENCH_QUICK=1`, `TNG_BENCH_PEERS` (names, comma separated),
    /// `TNG_BENCH_ONLY=sharing`.
    /// Without cargo's `--bench` argument (`cargo test --benches`) the run is quick.
    pub fn from_environment() -> Outcome<Self> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let quick = set("TNG_BENCH_QUICK").is_some_and(|v| v != "0") || !std::env::args().any(|a| a == "--bench");
        let rounds = match set("TNG_BENCH_ROUNDS") {
            None if quick => 1,
            None => 5,
            Some(text) => match text.parse() {
                Ok(rounds @ 1..=100) => rounds,
                _ => return Err(format!("TNG_BENCH_ROUNDS=\"{text}\" is not 1-100").into()),
            },
        };
        let peers = match set("TNG_BENCH_PEERS") {
            None => Peer::ALL.to_vec(),
            Some(text) => text.split(',').map(|name| Peer::named(name.trim())).collect::<Outcome<Vec<_>>>()?,
        };
        let only_sharing = match set("TNG_BENCH_ONLY").as_deref() {
            None => false,
            Some("sharing") => true,
            Some(other) => return Err(format!("TNG_BENCH_ONLY=\"{other}\" is not sharing").into()),
        };
        let mib = 1 << 20;
        Ok(Self {
            rounds,
            quick,
            peers,
            bulk_bytes: if quick { 64 * mib } else { 512 * mib },
            connect_for: Duration::from_millis(if quick { 300 } else { 1500 }),
            connect_max: if quick { 500 } else { 3000 },
            connect_clients: 4,
            rate: 1000,
            latency_slice: Duration::from_millis(if quick { 250 } else { 600 }),
            latency_slices: if quick { 1 } else { 5 },
            beside_rate: 500,
            beside_slice: Duration::from_millis(if quick { 250 } else { 800 }),
            fairness_slice: Duration::from_millis(if quick { 250 } else { 2000 }),
            sharing_slices: if quick { 1 } else { 3 },
            only_sharing,
            idle_connections: if quick { 100 } else { 1000 },
            // Five rounds take under seven minutes on two cores; more than twice that is not slow but stuck.
            deadline: Duration::from_secs(180 + 180 * rounds as u64),
        })
    }

    /// Whether budgets are judged: a full run with everyone in it.
    pub fn judges(&self) -> bool {
        !self.quick && self.rounds >= 5 && Peer::ALL.iter().all(|peer| self.peers.contains(peer))
    }
}
