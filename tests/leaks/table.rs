//! The table: rows, what each expects, and the run that prints every result before it judges.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::lab::Lab;
use super::netns::Family;

/// What became of the application's traffic, as the application sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The answer came, or the push arrived.
    Delivered,
    /// A reset, an end of stream or an unreachable.
    Refused,
    /// Nothing within the deadline.
    Dropped,
}

/// One observation: the fate, and where plaintext was met.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What the application met.
    pub fate: Fate,
    /// Where plaintext got past tng, if it did.
    pub plaintext: Option<String>,
}

/// What a row demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// The application is served, and the wire carries no plaintext.
    Tunnelled,
    /// The application is told at once that it may not.
    Refused,
    /// The application hears nothing.
    Dropped,
    /// Refused or dropped.
    Closed,
    /// Served, refused or dropped, and never in plaintext.
    Safe,
    /// Plaintext passes, as the manual says: a documented limit. A row that is closed one day
    /// fails here, so that the manual is corrected.
    Open,
    /// The scenario does not exist for this family.
    Absent,
}

impl Expect {
    fn accepts(self, seen: &Seen) -> bool {
        match (self, &seen.plaintext) {
            (Expect::Open, plaintext) => plaintext.is_some(),
            (_, Some(_)) | (Expect::Absent, _) => false,
            (Expect::Tunnelled, None) => seen.fate == Fate::Delivered,
            (Expect::Refused, None) => seen.fate == Fate::Refused,
            (Expect::Dropped, None) => seen.fate == Fate::Dropped,
            (Expect::Closed, None) => seen.fate != Fate::Delivered,
            (Expect::Safe, None) => true,
        }
    }
}

/// What a scenario saw, for IPv4 and for IPv6; `None` where it does not exist.
pub struct Outcome(pub [Option<Seen>; 2]);

impl From<[Seen; 2]> for Outcome {
    fn from(seen: [Seen; 2]) -> Self {
        Outcome(seen.map(Some))
    }
}

/// One row of the matrix.
pub struct Row {
    /// `ingress` or `egress`.
    pub side: &'static str,
    /// Its name in the leak matrix.
    pub scenario: &'static str,
    /// Demanded for IPv4 and for IPv6.
    pub expect: [Expect; 2],
    /// Kernel option without which the scenario cannot exist (`CONFIG_MPTCP`).
    pub needs: Option<&'static str>,
    /// Shows, with tng off, that the same kind of traffic is seen in plaintext.
    pub control: fn(&Lab, Family) -> Seen,
    /// Sets the scenario up, sends fresh markers and reports.
    pub run: fn(&Lab) -> Outcome,
}

/// A row with the same demand for both families.
pub const fn row(
    side: &'static str,
    scenario: &'static str,
    expect: Expect,
    control: fn(&Lab, Family) -> Seen,
    run: fn(&Lab) -> Outcome,
) -> Row {
    Row { side, scenario, expect: [expect, expect], needs: None, control, run }
}

impl Row {
    /// The same row with another demand for each family.
    pub const fn but(mut self, v4: Expect, v6: Expect) -> Self {
        self.expect = [v4, v6];
        self
    }

    /// The same row, which only a kernel with this option can run.
    pub const fn needing(mut self, option: &'static str) -> Self {
        self.needs = Some(option);
        self
    }
}

/// The result of one row.
struct Line {
    text: String,
    failed: bool,
    absent: bool,
}

/// How many rows run at once: they wait more than they work.
const WORKERS: usize = 4;

/// Runs the rows that `TNG_ROW` selects (a part of "side scenario"; all without it), prints the
/// table, and fails if any row is not as demanded.
pub fn run(title: &str, rows: &[Row]) {
    let wanted = std::env::var("TNG_ROW").unwrap_or_default();
    let rows: Vec<&Row> = rows.iter().filter(|r| format!("{} {}", r.side, r.scenario).contains(&wanted)).collect();
    let next = AtomicUsize::new(0);
    let lines: Mutex<Vec<(usize, Line)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS.min(rows.len()) {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let at = rows.iter().position(|r| std::ptr::eq(*r, *row)).unwrap_or_default();
                    let line = run_row(row);
                    lines.lock().unwrap().push((at, line));
                }
            });
        }
    });
    let mut lines = lines.into_inner().unwrap();
    lines.sort_by_key(|(at, _)| *at);
    let mut table = format!("\n{title}\n");
    for (_, line) in &lines {
        table.push_str(&line.text);
    }
    let failed = lines.iter().filter(|(_, l)| l.failed).count();
    let absent = lines.iter().filter(|(_, l)| l.absent).count();
    table.push_str(&format!("{} rows, {failed} failed, {absent} not on this kernel\n", lines.len()));
    println!("{table}");
    assert_eq!(failed, 0, "{table}");
}

fn run_row(row: &Row) -> Line {
    let start = Instant::now();
    let name = format!("{:<8}{}", row.side, row.scenario);
    if let Some(evidence) = row.needs.and_then(missing_option) {
        let text = format!("not on this kernel: {evidence}");
        return Line { absent: true, ..line(&name, "n/a", &text, start.elapsed(), false) };
    }
    let result = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new();
        for (family, expect) in Family::BOTH.into_iter().zip(row.expect) {
            if expect != Expect::Absent {
                let seen = (row.control)(&lab, family);
                assert!(
                    seen.fate == Fate::Delivered && seen.plaintext.is_some(),
                    "positive control, {family:?}: with tng off this traffic must pass in plaintext, but: {seen:?}"
                );
            }
        }
        (row.run)(&lab)
    }));
    let took = start.elapsed();
    match result {
        Err(panic) => {
            let why = panic.downcast_ref::<String>().cloned();
            let why = why.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
            line(&name, "FAIL", &why, took, true)
        }
        Ok(Outcome(seen)) => {
            let judged: Vec<(String, bool)> = Family::BOTH
                .into_iter()
                .zip(row.expect)
                .zip(&seen)
                .map(|((family, expect), seen)| judge(family, expect, seen.as_ref()))
                .collect();
            let failed = judged.iter().any(|(_, ok)| !ok);
            let text: Vec<String> = judged.into_iter().map(|(text, _)| text).collect();
            line(&name, if failed { "FAIL" } else { "ok" }, &text.join(" | "), took, failed)
        }
    }
}

/// The sentence about one family, and whether it is as demanded.
fn judge(family: Family, expect: Expect, seen: Option<&Seen>) -> (String, bool) {
    let Some(seen) = seen else { return (format!("{family:?} -"), expect == Expect::Absent) };
    let ok = expect.accepts(seen);
    let what = match &seen.plaintext {
        Some(place) => format!("PLAINTEXT {place}"),
        None if seen.fate == Fate::Delivered && expect == Expect::Safe => "no plaintext".to_owned(),
        None if seen.fate == Fate::Delivered => "tunnelled".to_owned(),
        None => format!("{:?}", seen.fate).to_lowercase(),
    };
    let demand = match (ok, expect) {
        (true, Expect::Open) => " (documented)".to_owned(),
        (true, _) => String::new(),
        (false, _) => format!(" (expected {expect:?})"),
    };
    (format!("{family:?} {what}{demand}"), ok)
}

fn line(name: &str, verdict: &str, text: &str, took: Duration, failed: bool) -> Line {
    let text = format!("{verdict:<5}{name:<64}{:>5.1}s  {text}\n", took.as_secs_f64());
    Line { text, failed, absent: false }
}

/// What the kernel's configuration says when it was built without `option`. Without a readable
/// configuration, or with the option, the row runs and fails if the feature does not work.
fn missing_option(option: &str) -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let boot = format!("/boot/config-{}", release.trim());
    let (file, text) = ["/proc/config.gz", &boot].into_iter().find_map(|file| {
        let out = std::process::Command::new("zcat").args(["-f", file]).output().ok()?;
        out.status.success().then(|| (file.to_owned(), String::from_utf8_lossy(&out.stdout).into_owned()))
    })?;
    let set = text.lines().any(|l| l.strip_prefix(option).is_some_and(|rest| rest == "=y" || rest == "=m"));
    let says = text.lines().find(|l| l.contains(&format!("{option} "))).unwrap_or("no such line");
    (!set).then(|| format!("{file}: {says}"))
}
