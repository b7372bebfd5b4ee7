//! Waiting for a condition with a deadline, in place of sleeping for luck.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(5);

/// Whether `cond` became true within `deadline`.
pub fn wait_until(deadline: Duration, mut cond: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if cond() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(STEP);
    }
}

/// Waits for `cond`, or panics with `what` when the deadline passes.
#[track_caller]
pub fn wait_for(what: &str, deadline: Duration, cond: impl FnMut() -> bool) {
    assert!(wait_until(deadline, cond), "not within {deadline:?}: {what}");
}
