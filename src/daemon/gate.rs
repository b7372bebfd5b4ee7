//! The bound on an endpoint's connections, taken before accept: what exceeds it waits in the
//! kernel's listen queue and costs no descriptor.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::Notify;

use crate::os::lock::Lock;

/// Counts open connections against a limit that a reload may change.
#[derive(Debug)]
pub struct Gate {
    open: AtomicUsize,
    limit: AtomicUsize,
    freed: Notify,
    waiting: AtomicUsize,
    reached: Mutex<Reached>,
}

/// When the limit was reached.
#[derive(Debug, Default, Clone, Copy)]
pub struct Reached {
    /// How often.
    pub times: u64,
    /// Last.
    pub last: Option<SystemTime>,
    /// Since when without a break, while it is.
    pub since: Option<SystemTime>,
}

impl Gate {
    /// Lets `limit` connections in.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            open: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
            freed: Notify::new(),
            waiting: AtomicUsize::new(0),
            reached: Mutex::default(),
        })
    }

    /// A place, if one is free now.
    pub fn try_enter(self: &Arc<Self>) -> Option<Permit> {
        let limit = self.limit.load(Ordering::Acquire);
        let entered =
            self.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < limit).then_some(open + 1));
        if entered.is_err() {
            self.note_reached();
        }
        entered.ok().map(|_| Permit { gate: self.clone() })
    }

    fn note_reached(&self) {
        let mut reached = self.reached.locked();
        let now = SystemTime::now();
        if reached.since.is_none() {
            reached.since = Some(now);
            reached.times += 1;
        }
        reached.last = Some(now);
    }

    /// A place was had by who waits for all others: the limit is reached no longer.
    pub fn left(&self) {
        self.reached.locked().since = None;
    }

    /// Places taken now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Places in all.
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether no place is free now.
    pub fn is_full(&self) -> bool {
        self.open() >= self.limit.load(Ordering::Relaxed)
    }

    /// Who waits for a place.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// When the limit was reached.
    pub fn reached(&self) -> Reached {
        let mut reached = self.reached.locked();
        if self.open() < self.limit.load(Ordering::Relaxed) {
            reached.since = None;
        }
        *reached
    }

    /// A place, as soon as one is free.
    pub async fn enter(self: &Arc<Self>) -> Permit {
        if let Some(permit) = self.try_enter() {
            return permit;
        }
        let _waiting = Waiting::new(&self.waiting);
        loop {
            let freed = self.freed.notified();
            if let Some(permit) = self.try_enter() {
                return permit;
            }
            freed.await;
        }
    }

    /// Changes the limit. Connections above a lower one go on; no new one enters until they ended.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Release);
        self.freed.notify_one();
    }
}

/// Counts as waiting until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place for one connection, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.open.fetch_sub(1, Ordering::AcqRel);
        // One waiter for one place; a stored permit wakes one that is about to wait.
        self.gate.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_gate_opens_when_a_place_is_freed_or_added() {
        let gate = Gate::new(1);
        let first = gate.enter().await;
        assert!(gate.try_enter().is_none());
        drop(first);
        let _second = gate.enter().await;
        gate.set_limit(2);
        let _third = gate.enter().await;
        assert!(gate.try_enter().is_none());
        gate.set_limit(1);
        drop(_third);
        assert!(gate.try_enter().is_none(), "a lowered limit lets nobody in while it is reached");
    }
}
