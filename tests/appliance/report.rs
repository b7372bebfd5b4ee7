//! What was shown: one line a point, the evidence of those that failed, the count at the end.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

/// Points of one run.
pub struct Report {
    run: String,
    shown: Mutex<u32>,
    failed: Mutex<Vec<String>>,
    only: Option<String>,
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps panic messages for the report instead of printing them in the middle of it.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let message = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        LAST_PANIC.with(|last| *last.borrow_mut() = format!("{message}\n(at {place})"));
    }));
}

impl Report {
    /// An empty report of the run that lines will begin with.
    pub fn new(run: &str) -> Self {
        Self {
            run: run.to_owned(),
            shown: Mutex::default(),
            failed: Mutex::default(),
            only: std::env::var("TNG_E2E_ONLY").ok(),
        }
    }

    /// Whether the scenario is to run: all are, but for who debugs one with `TNG_E2E_ONLY=name,name`.
    pub fn wants(&self, scenario: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.split(',').any(|name| name == scenario))
    }

    /// One point: `show` returns what it saw in a few words, and panics where it does not hold. `evidence` is what
    /// an operator would look at then. Returns whether it held.
    pub fn point(&self, what: &str, evidence: impl Fn() -> String, show: impl FnOnce() -> String) -> bool {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(show));
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(seen) => {
                let mut shown = self.shown.lock().unwrap();
                *shown += 1;
                let seen = if seen.is_empty() { seen } else { format!(" ({seen})") };
                println!("[{}] ok {:>3} {what}{seen} [{seconds:.1}s]", self.run, *shown);
                true
            }
            Err(_) => {
                let why = LAST_PANIC.with(|last| last.borrow().clone());
                let evidence =
                    catch_unwind(AssertUnwindSafe(evidence)).unwrap_or_else(|_| "no evidence to be had".into());
                println!(
                    "[{run}] FAIL   {what} [{seconds:.1}s]\n{}\n{}",
                    indent(&why),
                    indent(&evidence),
                    run = self.run
                );
                self.failed.lock().unwrap().push(what.to_owned());
                false
            }
        }
    }

    /// Points that held, and the names of those that did not.
    pub fn totals(&self) -> (u32, Vec<String>) {
        (*self.shown.lock().unwrap(), self.failed.lock().unwrap().clone())
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    | {line}")).collect::<Vec<_>>().join("\n")
}
