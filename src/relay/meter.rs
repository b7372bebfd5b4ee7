//! Where a connection's bytes are counted: once for itself, once for its endpoint.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::metrics::counter::Counter;

/// Counts one direction.
#[derive(Clone, Copy)]
pub struct Flow<'a> {
    /// Bytes of this connection.
    pub connection: &'a AtomicU64,
    /// Bytes of the endpoint, over all its connections.
    pub endpoint: &'a Counter,
}

impl Flow<'_> {
    /// `bytes` were handed to the other side.
    pub fn add(&self, bytes: usize) {
        self.connection.fetch_add(bytes as u64, Ordering::Relaxed);
        self.endpoint.inc_by(bytes as u64);
    }
}

/// Both directions as the relay sees them.
#[derive(Clone, Copy)]
pub struct Meter<'a> {
    /// From the plain side into the tunnel.
    pub into_tunnel: Flow<'a>,
    /// Out of the tunnel to the plain side.
    pub out_of_tunnel: Flow<'a>,
}
