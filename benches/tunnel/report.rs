//! The table, the budgets, and the JSON beside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Outcome;
use crate::checks::Seen;
use crate::measure::{Metric, Sample};
use crate::peers::Peer;
use crate::settings::Settings;
use crate::stats::median;
use crate::wire::Hello;

/// What counts as noise between two p99 on a small shared machine; the widest of what repeated runs differed by.
const P99_NOISE: f64 = 0.15;

impl Metric {
    const ALL: [Metric; 12] = [
        Metric::Bulk1,
        Metric::Bulk8,
        Metric::CpuGib1,
        Metric::CpuGib8,
        Metric::Connections,
        Metric::CpuConnection,
        Metric::P50,
        Metric::P99,
        Metric::P99Beside,
        Metric::Fairness,
        Metric::IdleUnused,
        Metric::Idle,
    ];

    /// Key in the JSON, and how the table calls it.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Metric::Bulk1 => ("bulk_1_stream_mib_s", "bulk, 1 stream, MiB/s"),
            Metric::Bulk8 => ("bulk_8_streams_mib_s", "bulk, 8 streams, MiB/s"),
            Metric::CpuGib1 => ("cpu_s_per_gib_1_stream", "CPU s per GiB, 1 stream"),
            Metric::CpuGib8 => ("cpu_s_per_gib_8_streams", "CPU s per GiB, 8 streams"),
            Metric::Connections => ("connections_s", "new connections per s"),
            Metric::CpuConnection => ("cpu_ms_per_connection", "CPU ms per new connection"),
            Metric::P50 => ("latency_p50_ms", "latency p50, ms"),
            Metric::P99 => ("latency_p99_ms", "latency p99, ms"),
            Metric::P99Beside => ("beside_4_streams_p99_ms", "p99 beside 4 streams, ms"),
            Metric::Fairness => ("fairness_8_streams", "slowest of 8 by fastest"),
            Metric::IdleUnused => ("idle_unused_kib_per_connection", "KiB per unused connection"),
            Metric::Idle => ("idle_kib_per_connection", "KiB per idle connection"),
        }
    }

    fn more_is_better(self) -> bool {
        matches!(self, Metric::Bulk1 | Metric::Bulk8 | Metric::Connections | Metric::Fairness)
    }

    fn budget(self) -> Option<Budget> {
        match self {
            Metric::CpuGib1 | Metric::CpuGib8 => Some(Budget::Ratio { most: 0.75, noise: 0.0 }),
            Metric::CpuConnection => Some(Budget::Ratio { most: 0.60, noise: 0.0 }),
            Metric::P99 => Some(Budget::Ratio { most: 1.0, noise: P99_NOISE }),
            Metric::P99Beside => Some(Budget::Most { value: 20.0, unit: " ms" }),
            Metric::Fairness => Some(Budget::Least { value: 0.6 }),
            Metric::Idle => Some(Budget::Most { value: 40.0, unit: " KiB" }),
            _ => None,
        }
    }
}

/// What tng may need.
#[derive(Clone, Copy)]
enum Budget {
    /// Of what the best of the three needs; `noise` is added before it counts as missed.
    Ratio { most: f64, noise: f64 },
    /// At most so much of the metric's unit.
    Most { value: f64, unit: &'static str },
    /// At least so much.
    Least { value: f64 },
}

/// tng beside the peer it does worst against.
#[derive(Clone, Copy)]
struct Comparison {
    best: Peer,
    ratio: f64,
}

/// One line of the table.
struct Line {
    metric: Metric,
    medians: BTreeMap<Peer, f64>,
    comparison: Option<Comparison>,
    /// Whether the budget is kept, where there is one and tng was measured.
    kept: Option<bool>,
}

/// Everything that is printed and written.
pub struct Report<'a> {
    settings: &'a Settings,
    seen: &'a [(Peer, Seen)],
    complaints: &'a [(Peer, String)],
    rounds: &'a [BTreeMap<Peer, Sample>],
    took: Duration,
    lines: Vec<Line>,
}

/// What each peer negotiated, a line each.
pub fn print_checks(all: &[(Peer, Seen)]) {
    let row = |cells: [&str; 10]| {
        let [peer, version, suite, group, shown, client, server, resumes, relay, seen] = cells;
        println!(
            "{peer:<9}{version:<9}{suite:<24}{group:<16}{shown:<13}{client:<10}{server:<10}{resumes:<9}{relay:<12}{seen}"
        );
    };
    row(["", "", "", "", "client", "client", "server", "", "bytes and", "payload"]);
    row([
        "",
        "version",
        "suite",
        "group",
        "certificate",
        "verified",
        "verified",
        "resumes",
        "half-close",
        "in plaintext",
    ]);
    let yes = |b: bool| if b { "yes" } else { "no" };
    for (peer, seen) in all {
        let named = |name: fn(&Hello) -> String| seen.hello.as_ref().map_or("?".to_owned(), name);
        row([
            &peer.to_string(),
            &named(Hello::version_name),
            &named(Hello::suite_name),
            &named(Hello::group_name),
            if seen.client_certificate { "shown" } else { "NOT SHOWN" },
            yes(seen.client_verified),
            yes(seen.server_verified),
            yes(seen.resumed),
            if seen.relay.is_ok() { "right" } else { "WRONG" },
            if seen.plaintext { "SEEN" } else { "not seen" },
        ]);
    }
    let groups: Vec<_> = all.iter().filter_map(|(_, seen)| Some(seen.hello.as_ref().ok()?.group_name())).collect();
    if groups.windows(2).any(|pair| pair[0] != pair[1]) {
        println!(
            "The groups differ: OpenSSL 3.0 has no ML-KEM, tng prefers X25519MLKEM768 and pays for the hybrid exchange \
             in every figure about new connections."
        );
    }
}

impl<'a> Report<'a> {
    /// Reduces the rounds to medians and ratios of pairs.
    pub fn new(
        settings: &'a Settings,
        seen: &'a [(Peer, Seen)],
        complaints: &'a [(Peer, String)],
        rounds: &'a [BTreeMap<Peer, Sample>],
        took: Duration,
    ) -> Self {
        let lines = Metric::ALL.into_iter().map(|metric| line(metric, rounds)).collect();
        Self { settings, seen, complaints, rounds, took, lines }
    }

    /// Nobody negotiated anything else, and every budget that is judged is kept.
    pub fn good(&self) -> bool {
        let is_kept = |line: &Line| match line.kept {
            // A part alone has measured nothing else.
            None => line.metric.budget().is_none() || self.settings.only_sharing,
            Some(kept) => kept,
        };
        let kept = self.lines.iter().all(is_kept);
        self.complaints.is_empty() && (kept || !self.settings.judges())
    }

    /// The table, then what is wrong.
    pub fn print(&self) {
        let s = self.settings;
        println!(
            "\nmedians of {} round{}; both ends together; bulk {} MiB; latency at {}/s open loop; {} idle connections",
            s.rounds,
            if s.rounds == 1 { "" } else { "s" },
            s.bulk_bytes >> 20,
            s.rate,
            s.idle_connections
        );
        print!("{:<27}", "");
        Peer::ALL.iter().for_each(|peer| print!("{:>10}", peer.to_string()));
        println!("  tng/best        budget");
        for line in &self.lines {
            print!("{:<27}", line.metric.names().1);
            for peer in Peer::ALL {
                match line.medians.get(&peer) {
                    Some(value) => print!("{:>10}", figure(*value)),
                    None => print!("{:>10}", "-"),
                }
            }
            let ratio = line.comparison.map_or("-".to_owned(), |c| format!("{:.2} {}", c.ratio, c.best));
            println!("  {ratio:<16}{}", verdict(line, s.judges()));
        }
        println!(
            "tng/best: tng's value by another's of the same round, the median of these, for whom tng does worst against."
        );
        for (peer, complaint) in self.complaints {
            println!("NOT COMPARED: {peer}: {complaint}");
        }
        if !s.judges() {
            println!("Budgets are not judged: that takes a full run (5 rounds or more, everyone in it, not quick).");
        }
    }

    /// Writes `target/bench/tunnel.json`.
    pub fn write_json(&self) -> Outcome<PathBuf> {
        // Cargo gives a bench a scratch directory below target.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().ok_or("cargo's target directory is the root")?;
        let path = target.join("bench/tunnel.json");
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        std::fs::create_dir_all(target.join("bench"))
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }

    fn json(&self) -> Value {
        let s = self.settings;
        let mut negotiated = serde_json::Map::new();
        for (peer, seen) in self.seen {
            let hello = seen.hello.as_ref().ok();
            negotiated.insert(
                peer.to_string(),
                json!({
                    "version": hello.map(|h| h.version_name()),
                    "suite": hello.map(|h| h.suite_name()),
                    "group": hello.map(|h| h.group_name()),
                    "client_certificate_shown": seen.client_certificate,
                    "client_verified": seen.client_verified,
                    "server_verified": seen.server_verified,
                    "resumes": seen.resumed,
                    "plaintext_seen": seen.plaintext,
                    "relay": seen.relay.as_ref().err().map_or("right", |e| e.as_str()),
                }),
            );
        }
        let by_name = |values: &BTreeMap<Peer, f64>| -> Value {
            values
                .iter()
                .map(|(peer, value)| (peer.to_string(), json!(value)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let mut metrics = serde_json::Map::new();
        for line in &self.lines {
            let budget = line.metric.budget().map(|budget| match budget {
                Budget::Ratio { most, noise } => json!({ "ratio": most, "noise": noise, "kept": line.kept }),
                Budget::Most { value, .. } => json!({ "most": value, "kept": line.kept }),
                Budget::Least { value } => json!({ "least": value, "kept": line.kept }),
            });
            metrics.insert(
                line.metric.names().0.to_owned(),
                json!({
                    "medians": by_name(&line.medians),
                    "tng_by_best": line.comparison.map(|c| c.ratio),
                    "best": line.comparison.map(|c| c.best.to_string()),
                    "budget": budget,
                    "rounds": self.rounds.iter().map(|round| by_name(&values(line.metric, round))).collect::<Vec<_>>(),
                }),
            );
        }
        json!({
            "settings": {
                "rounds": s.rounds,
                "quick": s.quick,
                "bulk_bytes": s.bulk_bytes,
                "latency_rate": s.rate,
                "idle_connections": s.idle_connections,
                "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            },
            "seconds": self.took.as_secs_f64(),
            "negotiated": negotiated,
            "not_compared": self.complaints.iter().map(|(p, c)| json!({ "peer": p.to_string(), "why": c })).collect::<Vec<_>>(),
            "metrics": metrics,
            "budgets_judged": s.judges(),
            "good": self.good(),
        })
    }
}

fn values(metric: Metric, round: &BTreeMap<Peer, Sample>) -> BTreeMap<Peer, f64> {
    round.iter().filter_map(|(peer, sample)| Some((*peer, *sample.get(&metric)?))).collect()
}

fn line(metric: Metric, rounds: &[BTreeMap<Peer, Sample>]) -> Line {
    let table: Vec<BTreeMap<Peer, f64>> = rounds.iter().map(|round| values(metric, round)).collect();
    let column = |peer: Peer| table.iter().filter_map(|round| round.get(&peer).copied()).collect::<Vec<f64>>();
    let medians: BTreeMap<Peer, f64> = Peer::ALL.iter().filter_map(|p| Some((*p, median(&column(*p))?))).collect();

    let against = |other: Peer| -> Option<Comparison> {
        let pairs: Vec<f64> =
            table.iter().filter_map(|round| Some(round.get(&Peer::Tng)? / round.get(&other)?)).collect();
        Some(Comparison { best: other, ratio: median(&pairs)? })
    };
    let comparisons = Peer::OTHERS.into_iter().filter_map(against);
    let comparison = if metric.more_is_better() {
        comparisons.min_by(|a, b| a.ratio.total_cmp(&b.ratio))
    } else {
        comparisons.max_by(|a, b| a.ratio.total_cmp(&b.ratio))
    };
    let kept = metric.budget().and_then(|budget| match budget {
        Budget::Ratio { most, noise } => Some(comparison?.ratio <= most + noise),
        Budget::Most { value, .. } => Some(*medians.get(&Peer::Tng)? <= value),
        Budget::Least { value } => Some(*medians.get(&Peer::Tng)? >= value),
    });
    Line { metric, medians, comparison, kept }
}

fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn verdict(line: &Line, judged: bool) -> String {
    let Some(budget) = line.metric.budget() else { return "-".to_owned() };
    let wanted = match budget {
        Budget::Ratio { most, noise: 0.0 } => format!("<= {most:.2}"),
        Budget::Ratio { most, noise } => format!("<= {most:.2} (+{noise:.2} noise)"),
        Budget::Most { value, unit } => format!("<= {value:.0}{unit}"),
        Budget::Least { value } => format!(">= {value:.2}"),
    };
    let said = match line.kept {
        Some(true) => "kept",
        Some(false) if judged => "MISSED",
        Some(false) => "over",
        None => "not measured",
    };
    format!("{wanted}: {said}")
}
