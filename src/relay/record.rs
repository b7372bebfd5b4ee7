//! The one record every accepted connection ends in.

use std::sync::Arc;

use crate::config::Side;
use crate::daemon::{ConnState, Connection, Connections, EndpointStats};
use crate::tls::{Binding, Standing};

use super::addr::{ClientAddr, PeerAddr};
use super::copy::End;
use super::refusal::Refusal;
use super::vanished::Gone;

/// How a connection ended.
#[derive(Debug)]
pub enum Outcome {
    /// It carried bytes.
    Relayed(End),
    /// It never did.
    Refused(Refusal),
    /// An HTTP/2 tunnel that carried this many streams, each with a record of its own.
    Multiplexed(u64),
}

impl Outcome {
    /// Stable slug for records, metrics, status and docs. A failing plain side is the client on an
    /// ingress and the service on an egress.
    pub fn reason(&self, side: Side) -> &'static str {
        match (self, side) {
            (Outcome::Refused(refusal), _) => refusal.reason(),
            (Outcome::Multiplexed(_) | Outcome::Relayed(End::Closed), _) => "closed",
            (Outcome::Relayed(End::Idle(_)), _) => "idle-timeout",
            (Outcome::Relayed(End::Withdrawn(why)), _) => why.reason,
            (Outcome::Relayed(End::Drained), _) => "drained",
            (Outcome::Relayed(End::Plain(_)), Side::Ingress) => "client-reset",
            (Outcome::Relayed(End::Plain(_)), Side::Egress) => "target-reset",
            (Outcome::Relayed(End::Tunnel(_)), _) => "peer-reset",
            (Outcome::Relayed(End::Vanished(Gone::Tunnel, _)), _) => "peer-vanished",
            (Outcome::Relayed(End::Vanished(Gone::Plain, _)), Side::Ingress) => "client-vanished",
            (Outcome::Relayed(End::Vanished(Gone::Plain, _)), Side::Egress) => "target-vanished",
            (Outcome::Relayed(End::Truncated), _) => "tunnel-truncated",
            (Outcome::Relayed(End::Corrupt(_)), _) => "tunnel-corrupt",
            (Outcome::Relayed(End::Alert(_)), _) => "tls-alert",
            (Outcome::Relayed(End::Dismissed), _) => "peer-refused",
        }
    }

    /// Whether one side refused the other, and not just a connection that ended.
    fn is_refusal(&self) -> bool {
        match self {
            Outcome::Refused(_) | Outcome::Relayed(End::Alert(_) | End::Dismissed) => true,
            Outcome::Multiplexed(_)
            | Outcome::Relayed(
                End::Closed
                | End::Idle(_)
                | End::Withdrawn(_)
                | End::Drained
                | End::Vanished(..)
                | End::Plain(_)
                | End::Tunnel(_)
                | End::Truncated
                | End::Corrupt(_),
            ) => false,
        }
    }

    fn detail(&self) -> String {
        match self {
            Outcome::Relayed(End::Closed) => String::new(),
            Outcome::Relayed(end) => end.to_string(),
            Outcome::Refused(refusal) => refusal.to_string(),
            Outcome::Multiplexed(streams) => format!("{streams} HTTP/2 streams"),
        }
    }
}

/// A connection from accept to its record. Dropped without [`Record::finish`] (a panic, a cancelled
/// task) it writes the record itself, with reason `aborted`.
pub struct Record {
    connection: Arc<Connection>,
    connections: Arc<Connections>,
    stats: Arc<EndpointStats>,
    finished: bool,
}

impl Record {
    /// Enters an accepted connection into the list of live ones.
    pub fn begin(connections: &Arc<Connections>, stats: &Arc<EndpointStats>, client: ClientAddr) -> Self {
        stats.opened();
        let connection = connections.enter(stats.name.clone(), stats.side, client);
        Self { connection, connections: connections.clone(), stats: stats.clone(), finished: false }
    }

    /// Where the connection goes.
    pub fn set_target(&self, target: &dyn std::fmt::Display) {
        let _ = self.connection.dst.set(target.to_string());
    }

    /// The tunnel's other end, as soon as it is known.
    pub fn set_peer_addr(&self, peer: PeerAddr) {
        let _ = self.connection.peer.set(peer);
    }

    /// What the evidence of this connection is bound to. Before its standing is set.
    pub fn set_binding(&self, binding: Binding) {
        let _ = self.connection.binding.set(binding);
    }

    /// What the appraisal said of the peer.
    pub fn set_standing(&self, standing: Option<&Arc<Standing>>) {
        if let Some(standing) = standing {
            let _ = self.connection.standing.set(standing.clone());
            if let (Some(addr), Some(verdict)) = (self.connection.peer.get(), standing.current()) {
                let binding = self.connection.binding.get().copied().unwrap_or(Binding::Certificate);
                self.stats.note_verdict(*addr, verdict, binding);
            }
        }
    }

    /// The channel stands: handshake and appraisal are done. Not for a stream within a channel.
    pub fn established(&self, standing: Option<&Arc<Standing>>) {
        self.stats.handshake_took(self.connection.started.elapsed());
        self.set_standing(standing);
    }

    /// Bytes begin to flow.
    pub fn relaying(&self) {
        self.connection.set_state(ConnState::Relay);
    }

    /// The live view of the connection, which counts its bytes.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Writes the record.
    pub fn finish(mut self, outcome: Outcome) {
        let reason = outcome.reason(self.stats.side);
        self.write(reason, outcome.detail(), outcome.is_refusal());
    }

    fn write(&mut self, reason: &'static str, detail: String, refused: bool) {
        self.finished = true;
        self.connections.leave(self.connection.id);
        let c = &*self.connection;
        self.stats.closed(reason, refused.then(|| (c.peer.get().map(|p| p.0).unwrap_or(c.client.0), detail.as_str())));
        let shown = |v: Option<&dyn std::fmt::Display>| v.map(|v| v.to_string()).unwrap_or_default();
        let verdict = c.standing.get().and_then(|s| s.verdict());
        let (bytes_up, bytes_down) = c.bytes();
        let dst = c.dst.get().map(String::as_str).unwrap_or("");
        let duration_ms = c.started.elapsed().as_millis() as u64;
        // What a journal shows without its fields.
        let summary = format!(
            "{} {}: {} -> {}: {reason}{}{detail} ({bytes_up} B up, {bytes_down} B down, {duration_ms} ms)",
            c.side,
            c.endpoint.as_str(),
            c.client,
            if dst.is_empty() { "?" } else { dst },
            if detail.is_empty() { "" } else { ": " },
        );
        // Two call sites: a tracing event's level is part of its static metadata.
        macro_rules! event {
            ($level:ident) => {
                tracing::$level!(
                    target: "tng::access",
                    endpoint = c.endpoint.as_str(),
                    side = %c.side,
                    src = %c.client,
                    dst,
                    peer = shown(c.peer.get().map(|p| p as _)),
                    tee = verdict.as_ref().map(|v| v.tee.as_str()).unwrap_or(""),
                    verdict = if verdict.is_some() { "affirming" } else { "none" },
                    binding = c.binding.get().map_or("", |b| b.word()),
                    policy = verdict.as_ref().map(|v| v.policy_ids.join(",")).unwrap_or_default(),
                    bytes_up,
                    bytes_down,
                    duration_ms,
                    reason,
                    detail,
                    "{summary}"
                )
            };
        }
        if refused { event!(warn) } else { event!(info) }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.finished {
            self.write("aborted", "the task that served it ended early".to_owned(), false);
        }
    }
}
