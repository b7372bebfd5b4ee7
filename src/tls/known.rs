//! What is known of one peer with open connections, and what may become of it. All changes are made under one lock: a peer
//! that a new connection affirms cannot be ended at the same moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::standing::{Closing, Withdrawn};
use crate::attest::Verdict;
use crate::os::lock::Lock;

/// What became of peers with open connections, over all reloads.
#[derive(Default)]
pub(super) struct Counts {
    /// Affirmed again because the rules had changed.
    pub reappraised: AtomicU64,
    /// Refused, or their verdict ended.
    pub failed: AtomicU64,
    /// Of these affirmed again within the grace.
    pub recovered: AtomicU64,
}

/// A peer that failed.
#[derive(Debug, Clone)]
struct Failed {
    why: Withdrawn,
    since: Instant,
    by: Instant,
}

#[derive(Debug)]
struct State {
    /// Under which rules the verdict was made.
    term: u64,
    /// The rules of this term ask for no verdict.
    exempt: bool,
    failed: Option<Failed>,
    over: bool,
}

/// What the watch of a standing goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub term: u64,
    pub exempt: bool,
    /// Since when the peer has failed, and by when its connections end for it.
    pub failed: Option<(Instant, Instant)>,
    /// When the verdict ends.
    pub ends: SystemTime,
}

/// What became of a peer that failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its connections go on for so long.
    Grace(Duration),
    /// It was in its grace before.
    AsBefore,
    /// They are closed.
    Over,
}

/// What is known of a peer now. It outlives the peer's connections where it is shown.
#[derive(Debug)]
pub(super) struct Shared {
    current: ArcSwap<Verdict>,
    state: Mutex<State>,
    /// A new connection changed what the watch goes by.
    pub nudge: Notify,
    ended: CancellationToken,
    why: OnceLock<Withdrawn>,
}

impl Shared {
    /// Let in with `verdict` under the rules of `term`; `None`: as anybody is, since they ask for none.
    pub fn new(verdict: Option<Arc<Verdict>>, term: u64) -> Arc<Self> {
        let exempt = verdict.is_none();
        Arc::new(Self {
            current: ArcSwap::new(verdict.unwrap_or_default()),
            state: Mutex::new(State { term, exempt, failed: None, over: false }),
            nudge: Notify::new(),
            ended: CancellationToken::new(),
            why: OnceLock::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }

    /// The verdict in force; one on nothing when nobody was verified.
    pub fn verdict(&self) -> Arc<Verdict> {
        self.current.load_full()
    }

    /// As it is now.
    pub fn condition(&self) -> Condition {
        let state = self.state();
        Condition {
            term: state.term,
            exempt: state.exempt,
            failed: state.failed.as_ref().map(|f| (f.since, f.by)),
            ends: self.current.load().expires_at,
        }
    }

    /// Whether the connections are about to be closed.
    pub fn closing(&self) -> Option<Closing> {
        let state = self.state();
        let failed = state.failed.as_ref().filter(|_| !state.over)?;
        let left = failed.by.saturating_duration_since(Instant::now());
        Some(Closing { why: failed.why.clone(), left })
    }

    /// A new connection of the peer was let in with `verdict` under the rules of `term`. False when it is too late for
    /// the others, whose end has come.
    pub fn join(&self, verdict: Option<Arc<Verdict>>, term: u64, counts: &Counts) -> bool {
        let mut state = self.state();
        if state.over {
            return false;
        }
        let Some(verdict) = verdict else { return true };
        let age = |v: &Verdict| (v.expires_at, v.appraised_at);
        // One that is no newer may be from a cache, and from before the peer failed.
        let newer = age(&verdict) > age(&self.current.load());
        if term > state.term || (term == state.term && newer) {
            self.affirm(&mut state, verdict, term, counts);
            drop(state);
            self.nudge.notify_one();
        }
        true
    }

    /// The peer was affirmed again under the rules of `term`. False when that wins nothing.
    pub fn renew(&self, verdict: Arc<Verdict>, term: u64, now: SystemTime, counts: &Counts) -> bool {
        let mut state = self.state();
        let wanted = state.failed.is_some() || term != state.term || state.exempt;
        if verdict.expires_at <= now || !(wanted || verdict.expires_at > self.current.load().expires_at) {
            return false;
        }
        self.affirm(&mut state, verdict, term, counts);
        true
    }

    fn affirm(&self, state: &mut State, verdict: Arc<Verdict>, term: u64, counts: &Counts) {
        if term != state.term {
            counts.reappraised.fetch_add(1, Ordering::Relaxed);
        }
        self.current.store(verdict);
        (state.term, state.exempt) = (term, false);
        self.recover(state, counts);
    }

    fn recover(&self, state: &mut State, counts: &Counts) {
        if let Some(failed) = state.failed.take() {
            counts.recovered.fetch_add(1, Ordering::Relaxed);
            tracing::info!(failure = failed.why.reason, "the peer may stay after all: its open connections go on");
        }
    }

    /// The rules of `term` ask for no verdict.
    pub fn exempt(&self, term: u64, counts: &Counts) {
        let mut state = self.state();
        (state.term, state.exempt) = (term, true);
        self.recover(&mut state, counts);
    }

    /// The peer failed: its connections end when it has not been affirmed again within `grace` of its first failure.
    pub fn fail(&self, why: Withdrawn, grace: Duration, counts: &Counts) -> Fate {
        self.fail_in(&mut self.state(), why, grace, counts)
    }

    /// The same for a verdict that has ended by `now`. `None` when a new connection has just brought another one.
    pub fn expire(&self, now: SystemTime, why: Withdrawn, grace: Duration, counts: &Counts) -> Option<Fate> {
        let mut state = self.state();
        let ended = state.failed.is_none() && self.current.load().expires_at <= now;
        ended.then(|| self.fail_in(&mut state, why, grace, counts))
    }

    fn fail_in(&self, state: &mut State, why: Withdrawn, grace: Duration, counts: &Counts) -> Fate {
        let before = state.failed.as_ref().map(|f| f.since);
        let since = before.unwrap_or_else(Instant::now);
        if before.is_none() {
            counts.failed.fetch_add(1, Ordering::Relaxed);
        }
        state.failed = Some(Failed { why, since, by: since + grace });
        if self.end_if_due(state) {
            Fate::Over
        } else if before.is_some() {
            Fate::AsBefore
        } else {
            Fate::Grace(grace)
        }
    }

    /// Another grace is in force.
    pub fn regrace(&self, grace: Duration) {
        if let Some(failed) = &mut self.state().failed {
            failed.by = failed.since + grace;
        }
    }

    /// Ends the standing when the grace is over. False when the peer was affirmed in the meantime.
    pub fn end(&self) -> bool {
        self.end_if_due(&mut self.state())
    }

    fn end_if_due(&self, state: &mut State) -> bool {
        let Some(failed) = state.failed.as_ref().filter(|f| f.by <= Instant::now()) else { return false };
        state.over = true;
        let _ = self.why.set(failed.why.clone());
        self.ended.cancel();
        true
    }

    /// No connection is left that could be closed.
    pub fn leave(&self) {
        self.state().failed = None;
    }

    /// Ends when the peer may stay no longer.
    pub fn ended(&self) -> WaitForCancellationFutureOwned {
        // A token of its own: the shared one's lock would be taken for every poll of every connection.
        self.ended.child_token().cancelled_owned()
    }

    /// Why it ended, once it has.
    pub fn why(&self) -> Option<Withdrawn> {
        self.why.get().cloned()
    }
}
