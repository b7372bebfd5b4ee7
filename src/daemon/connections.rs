//! The live connections, for `tngctl connections`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use crate::config::{EndpointName, Side};
use crate::relay::{ClientAddr, PeerAddr};
use crate::tls::{Binding, Standing};

use super::status::{ConnectionView, unix_seconds};
use crate::os::lock::Lock;

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ConnState {
    /// Connecting, TLS handshake, appraisal.
    Handshake,
    /// Carrying bytes.
    Relay,
}

/// A live connection.
#[derive(Debug)]
pub struct Connection {
    /// Unique in this process.
    pub id: u64,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// Its endpoint's side.
    pub side: Side,
    /// Who connected.
    pub client: ClientAddr,
    /// When it was accepted.
    pub started: Instant,
    /// Where it goes, as text: a name or an address with a port.
    pub dst: OnceLock<String>,
    /// The tunnel's other end.
    pub peer: OnceLock<PeerAddr>,
    /// What the evidence is bound to, once the channel stands.
    pub binding: OnceLock<Binding>,
    /// What the appraisal of the peer said, now.
    pub standing: OnceLock<Arc<Standing>>,
    /// Bytes from the plain side into the tunnel.
    pub into_tunnel: AtomicU64,
    /// Bytes out of the tunnel to the plain side.
    pub out_of_tunnel: AtomicU64,
    state: AtomicU8,
}

impl Connection {
    /// Notes what it does now.
    pub fn set_state(&self, state: ConnState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Bytes from client to service, and from service to client, so far.
    pub fn bytes(&self) -> (u64, u64) {
        let inward = self.into_tunnel.load(Ordering::Relaxed);
        let outward = self.out_of_tunnel.load(Ordering::Relaxed);
        match self.side {
            Side::Ingress => (inward, outward),
            Side::Egress => (outward, inward),
        }
    }

    fn view(&self, draining: bool) -> ConnectionView {
        let (bytes_up, bytes_down) = self.bytes();
        let state = match self.state.load(Ordering::Relaxed) {
            _ if draining => "draining",
            s if s == ConnState::Relay as u8 => "relay",
            _ => "handshake",
        };
        let standing = self.standing.get();
        let verdict = standing.and_then(|s| s.verdict());
        ConnectionView {
            id: self.id,
            endpoint: self.endpoint.to_string(),
            side: self.side.to_string(),
            src: self.client.to_string(),
            dst: self.dst.get().cloned().unwrap_or_default(),
            peer: self.peer.get().map(ToString::to_string).unwrap_or_default(),
            tee: verdict.as_ref().map(|v| v.tee.clone()).unwrap_or_default(),
            binding: self.binding.get().map(|b| b.word().to_owned()).unwrap_or_default(),
            verdict_expires: standing.and_then(|s| s.expires_at()).map(unix_seconds),
            closing: standing.and_then(|s| s.closing()).map(Into::into),
            age_ms: self.started.elapsed().as_millis() as u64,
            bytes_up,
            bytes_down,
            state: state.to_owned(),
        }
    }
}

/// All live connections of the process. Its size is bounded by the endpoints' connection bounds.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    live: Mutex<HashMap<u64, Arc<Connection>>>,
}

impl Connections {
    /// Adds a connection that was just accepted.
    pub fn enter(&self, endpoint: EndpointName, side: Side, client: ClientAddr) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            id: self.next.fetch_add(1, Ordering::Relaxed) + 1,
            endpoint,
            side,
            client,
            started: Instant::now(),
            dst: OnceLock::new(),
            peer: OnceLock::new(),
            binding: OnceLock::new(),
            standing: OnceLock::new(),
            into_tunnel: AtomicU64::new(0),
            out_of_tunnel: AtomicU64::new(0),
            state: AtomicU8::new(ConnState::Handshake as u8),
        });
        self.live.locked().insert(connection.id, connection.clone());
        connection
    }

    /// Removes one that ended.
    pub fn leave(&self, id: u64) {
        let mut live = self.live.locked();
        live.remove(&id);
        // After a burst the table's memory goes back too.
        if live.capacity() > 256 && live.len() * 8 < live.capacity() {
            live.shrink_to(64);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.live.locked().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The oldest `limit` of them, oldest first.
    pub fn views(&self, limit: usize, draining: bool) -> Vec<ConnectionView> {
        let mut all: Vec<_> = self.live.locked().values().cloned().collect();
        all.sort_by_key(|c| c.id);
        all.iter().take(limit).map(|c| c.view(draining)).collect()
    }
}
