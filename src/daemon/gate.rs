//! The bound on an endpoint's connections, taken before accept: what exceeds it waits in the
//! kernel's listen queue and costs no descriptor.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts open connections against a limit that a reload may change.
#[derive(Debug)]
pub struct Gate {
    open: AtomicUsize,
    limit: AtomicUsize,
    freed: Notify,
}

impl Gate {
    /// Lets `limit` connections in.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { open: AtomicUsize::new(0), limit: AtomicUsize::new(limit), freed: Notify::new() })
    }

    /// A place, if one is free now.
    pub fn try_enter(self: &Arc<Self>) -> Option<Permit> {
        let limit = self.limit.load(Ordering::Acquire);
        self.open
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < limit).then_some(open + 1))
            .ok()
            .map(|_| Permit { gate: self.clone() })
    }

    /// A place, as soon as one is free.
    pub async fn enter(self: &Arc<Self>) -> Permit {
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

/// A place for one connection, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.open.fetch_sub(1, Ordering::AcqRel);
        // One waiter, the accept loop; a stored permit wakes it if it is about to wait.
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
