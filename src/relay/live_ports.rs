//! The ports that clients' outer connections use now, so that a connection to the service that
//! carries the client's address never takes one of them: the kernel would then send the service's
//! answers into, or reset, the client's other connection.

use std::collections::{HashMap, HashSet};

use crate::os::lock::Lock;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

/// Clients of which it is remembered how many tried ports were taken.
const MAX_CLIENTS: usize = 4096;
/// Of the last 64 tried ports: with so many taken, nine tenths of the range are in use.
const NEARLY_ALL: u32 = 58;

/// Live outer addresses of one endpoint, bounded by its connections; and how full each client's range of ports is.
#[derive(Debug, Default)]
pub struct LivePorts {
    live: Mutex<HashSet<SocketAddr>>,
    /// A bit for each of a client's last 64 tried ports: set when it was taken. Picks are random, so their share is
    /// that of the range, TIME_WAIT included, which no table of ours would know.
    tried: Mutex<HashMap<IpAddr, u64>>,
}

impl LivePorts {
    /// Notes an accepted connection until the guard is dropped.
    pub fn enter(self: &Arc<Self>, client: SocketAddr) -> LivePort {
        self.live.locked().insert(client);
        LivePort { set: self.clone(), client }
    }

    /// Notes what became of a randomly picked port of the client's range.
    pub fn tried(&self, client: IpAddr, was_taken: bool) {
        let mut tried = self.tried.locked();
        if !was_taken && !tried.contains_key(&client) {
            return;
        }
        if tried.len() >= MAX_CLIENTS && !tried.contains_key(&client) {
            tried.clear();
        }
        let bits = tried.entry(client).or_default();
        *bits = *bits << 1 | u64::from(was_taken);
        if *bits == 0 {
            tried.remove(&client);
        }
    }

    /// Whether nine tenths of the client's range are in use.
    pub fn is_nearly_used_up(&self, client: IpAddr) -> bool {
        let tried = self.tried.locked();
        tried.get(&client).is_some_and(|bits| bits.count_ones() >= NEARLY_ALL)
    }

    /// Whether a live outer connection comes from exactly this address and port.
    pub fn contains(&self, addr: SocketAddr) -> bool {
        self.live.locked().contains(&addr)
    }
}

/// An outer connection that is alive.
#[derive(Debug)]
pub struct LivePort {
    set: Arc<LivePorts>,
    client: SocketAddr,
}

impl Drop for LivePort {
    fn drop(&mut self) {
        self.set.live.locked().remove(&self.client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_nearly_used_up_by_what_was_taken_lately() {
        let ports = LivePorts::default();
        let (busy, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        for _ in 0..NEARLY_ALL - 1 {
            ports.tried(busy, true);
        }
        assert!(!ports.is_nearly_used_up(busy));
        ports.tried(busy, true);
        assert!(ports.is_nearly_used_up(busy) && !ports.is_nearly_used_up(other));
        // Ports that are free again bring it back, and nothing stays of a client without taken ports.
        for _ in 0..64 {
            ports.tried(busy, false);
        }
        assert!(!ports.is_nearly_used_up(busy));
        ports.tried(other, false);
        assert!(ports.tried.lock().expect("lock").is_empty());
    }

    #[test]
    fn clients_that_are_remembered_are_bounded() {
        let ports = LivePorts::default();
        for n in 0..MAX_CLIENTS as u32 + 10 {
            ports.tried(IpAddr::from(n.to_be_bytes()), true);
        }
        assert!(ports.tried.lock().expect("lock").len() <= MAX_CLIENTS);
    }
}
