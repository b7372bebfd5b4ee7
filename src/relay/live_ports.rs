//! The ports that clients' outer connections use now, so that a connection to the service that
//! carries the client's address never takes one of them: the kernel would then send the service's
//! answers into, or reset, the client's other connection.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Live outer addresses of one endpoint. Bounded by its connections.
#[derive(Debug, Default)]
pub struct LivePorts {
    live: Mutex<HashSet<SocketAddr>>,
}

impl LivePorts {
    /// Notes an accepted connection until the guard is dropped.
    pub fn enter(self: &Arc<Self>, client: SocketAddr) -> LivePort {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).insert(client);
        LivePort { set: self.clone(), client }
    }

    /// Whether a live outer connection comes from exactly this address and port.
    pub fn contains(&self, addr: SocketAddr) -> bool {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).contains(&addr)
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
        self.set.live.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.client);
    }
}
