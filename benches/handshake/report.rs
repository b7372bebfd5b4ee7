//! The table, the budgets, and the JSON beside them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Outcome;
use crate::lane::Sample;
use crate::machine::Machine;
use crate::settings::{AT_ONCE, Settings};
use crate::stats::{median, quantile};
use crate::ways::Way;

/// Median and the middle half of samples.
#[derive(Clone, Copy)]
struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        Some(Self { median: median(&samples)?, low: quantile(&samples, 0.25), high: quantile(&samples, 0.75) })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "quartiles": [self.low, self.high] })
    }
}

/// One line of the table.
struct Line {
    way: Way,
    /// Absent when it was left out.
    measured: Option<Measured>,
}

struct Measured {
    per_second: Spread,
    cpu_us: Spread,
    /// CPU time by that of mutual TLS in the same round, where that was measured.
    ratio: Option<Spread>,
}

impl Line {
    /// Whether the budget is kept, where there is one and the way was measured.
    fn kept(&self) -> Option<bool> {
        let (most, less) = self.way.budget()?;
        let ratio = self.measured.as_ref()?.ratio?.median;
        Some(ratio < most || (!less && ratio <= most))
    }
}

/// Everything that is printed and written.
pub struct Report<'a> {
    settings: &'a Settings,
    primitives: String,
    rounds: &'a [BTreeMap<Way, Sample>],
    took: Duration,
    machine: Machine,
    lines: Vec<Line>,
}

impl<'a> Report<'a> {
    /// Reduces the rounds to medians and ratios of pairs.
    pub fn new(
        settings: &'a Settings,
        primitives: String,
        rounds: &'a [BTreeMap<Way, Sample>],
        took: Duration,
    ) -> Self {
        let lines = Way::ALL.into_iter().map(|way| Line { way, measured: measured(way, rounds) }).collect();
        Self { settings, primitives, rounds, took, machine: Machine::new(), lines }
    }

    /// Every budget that is judged is kept.
    pub fn good(&self) -> bool {
        let kept = |line: &Line| line.way.budget().is_none() || line.kept() == Some(true);
        !self.settings.judges() || self.lines.iter().all(kept)
    }

    /// Where, what, the table, and what is wrong.
    pub fn print(&self) {
        let s = self.settings;
        println!("\nhandshakes: {}", command());
        self.machine.print();
        if cfg!(debug_assertions) {
            println!("Not optimized: the figures say nothing about tng.");
        }
        println!(
            "medians of {} rounds of {} handshakes, {AT_ONCE} at once; middle half in brackets; both ends together on one thread, \
             without TCP's connect and the service; {}; {:.0} s",
            s.rounds,
            s.handshakes,
            self.primitives,
            self.took.as_secs_f64()
        );
        println!("{:<33}{:>10}   {:<22}{:<26}budget", "", "per s", "CPU us each", "CPU by mutual TLS");
        for line in &self.lines {
            let budget = self.verdict(line);
            match &line.measured {
                None => println!("{:<33}{:>10}   {:<22}{:<26}{budget}", line.way, "-", "-", "-"),
                Some(m) => {
                    let cpu = format!("{:.0} [{:.0}-{:.0}]", m.cpu_us.median, m.cpu_us.low, m.cpu_us.high);
                    let by = |r: Spread| format!("{:.3} [{:.3}-{:.3}]", r.median, r.low, r.high);
                    let ratio = m.ratio.map_or("-".to_owned(), by);
                    println!("{:<33}{:>10.0}   {cpu:<22}{ratio:<26}{budget}", line.way, m.per_second.median);
                }
            }
        }
        if !s.judges() {
            println!(
                "Budgets are not judged: that takes a full run (11 rounds of 50 handshakes or more, every way, not quick)."
            );
        }
    }

    fn verdict(&self, line: &Line) -> String {
        let Some((most, less)) = line.way.budget() else { return "-".to_owned() };
        let said = match line.kept() {
            Some(true) => "kept",
            Some(false) if self.settings.judges() => "MISSED",
            Some(false) => "over",
            None => "NOT MEASURED",
        };
        format!("{} {most:.2}: {said}", if less { "<" } else { "<=" })
    }

    /// Writes `target/bench/handshake.json`.
    pub fn write_json(&self) -> Outcome<PathBuf> {
        // Cargo gives a bench a scratch directory below target.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().ok_or("cargo's target directory is the root")?;
        let path = target.join("bench/handshake.json");
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        std::fs::create_dir_all(target.join("bench"))
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }

    fn json(&self) -> Value {
        let mut ways = serde_json::Map::new();
        for line in &self.lines {
            let samples: Vec<Value> = self
                .rounds
                .iter()
                .filter_map(|round| round.get(&line.way))
                .map(|sample| json!({ "per_second": sample.per_second, "cpu_us": sample.cpu_us }))
                .collect();
            let measured = line.measured.as_ref();
            ways.insert(
                line.way.names().0.to_owned(),
                json!({
                    "per_second": measured.map(|m| m.per_second.json()),
                    "cpu_us": measured.map(|m| m.cpu_us.json()),
                    "cpu_by_mutual_tls": measured.and_then(|m| m.ratio).map(Spread::json),
                    "budget": line.way.budget().map(|(most, less)| json!({ "ratio": most, "less": less, "kept": line.kept() })),
                    "rounds": samples,
                }),
            );
        }
        json!({
            "command": command(),
            "machine": self.machine.json(),
            "optimized": !cfg!(debug_assertions),
            "settings": {
                "rounds": self.settings.rounds,
                "handshakes": self.settings.handshakes,
                "at_once": AT_ONCE,
                "quick": self.settings.quick,
            },
            "primitives": self.primitives,
            "seconds": self.took.as_secs_f64(),
            "ways": ways,
            "budgets_judged": self.settings.judges(),
            "good": self.good(),
        })
    }
}

fn measured(way: Way, rounds: &[BTreeMap<Way, Sample>]) -> Option<Measured> {
    let of = |value: fn(&Sample) -> f64| Spread::of(rounds.iter().filter_map(|r| r.get(&way).map(value)).collect());
    let pairs = rounds.iter().filter_map(|r| Some(r.get(&way)?.cpu_us / r.get(&Way::Mutual)?.cpu_us));
    Some(Measured { per_second: of(|s| s.per_second)?, cpu_us: of(|s| s.cpu_us)?, ratio: Spread::of(pairs.collect()) })
}

/// What repeats this run.
fn command() -> String {
    let mut knobs: Vec<String> = std::env::vars()
        .filter(|(name, value)| name.starts_with("TNG_BENCH_") && !value.is_empty())
        .map(|(name, value)| format!("{name}={value} "))
        .collect();
    knobs.sort();
    let verb = if std::env::args().any(|a| a == "--bench") { "bench" } else { "test" };
    format!("{}cargo {verb} --locked --bench handshake", knobs.concat())
}
