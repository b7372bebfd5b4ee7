//! Why a `tng/1` exchange ended without a bound session.

use super::{MAX_EVIDENCE, VERSION};

/// Slug of [`SessionError::Unattested`], by which the peer knows what is wrong with it.
pub(super) const UNATTESTED: &str = "session-unattested";

/// Why a `tng/1` exchange ended without a bound session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The first byte of a message is not the version.
    #[error("byte {0:#04x} where a tng/1 message has its version {VERSION}: application bytes before the exchange?")]
    Version(u8),
    /// A message type that version 1 does not have.
    #[error("tng/1 message of unknown type {0}")]
    UnknownMessage(u8),
    /// A message longer than its type may be.
    #[error("tng/1 message {kind} of {len} bytes is too large")]
    TooLarge {
        /// Its type.
        kind: &'static str,
        /// Length of its body.
        len: usize,
    },
    /// A message whose body is not what its type asks for.
    #[error("tng/1 message {0} is malformed")]
    Malformed(&'static str),
    /// A message at a point where another one belongs.
    #[error("tng/1 message {0} out of turn")]
    Unexpected(&'static str),
    /// The connection ended within the exchange.
    #[error("the peer closed the connection during the tng/1 exchange")]
    Truncated,
    /// Evidence about another nonce: replayed.
    #[error("the peer's evidence is not about this side's nonce: it is old")]
    Nonce,
    /// Evidence about another connection: relayed or diverted.
    #[error("the peer's evidence is about another connection: somebody relays it")]
    Exporter,
    /// Evidence about another key than the connection's.
    #[error("the peer's evidence is about another key than that of this connection")]
    OtherKey,
    /// The peer does not know the secret of the session it was asked to confirm.
    #[error("the peer holds the key of a bound session and not its secret: the key may be stolen")]
    Confirmation,
    /// The peer refused this side.
    #[error("{why}: {0}", why = refusal(.0))]
    Refused(String),
    /// The peer asks for evidence, and this side is not configured to have any.
    #[error("the peer asks for evidence, and this endpoint has no `attest` table")]
    Unattested,
    /// This side's evidence is longer than a message may be.
    #[error("this side's evidence has {0} bytes, a tng/1 message holds {MAX_EVIDENCE}")]
    OwnEvidence(usize),
    /// A resumed TLS handshake that stands for no session.
    #[error("the peer resumed a TLS session that was not bound by tng/1")]
    Ticket,
    /// The session that a handshake refers to ended while it was made.
    #[error("the session that the peer refers to has ended meanwhile")]
    Ended,
    /// This side demands what the peer cannot do.
    #[error("this side has require_session_binding = true and the peer does not speak tng/1")]
    Required,
}

/// What kind of refusal the peer's slug stands for. A peer of another version may send any.
fn refusal(slug: &str) -> &'static str {
    match slug {
        "draining" => "the peer stops",
        "handshake-timeout" => "the peer waited for this side until its deadline",
        "too-many-connections" => "the peer has let this side in and has no room for the connection",
        "mark-denied" | "preserve-source-denied" | "source-ports-exhausted" | "socket-failed" => UNSERVED,
        _ if slug.starts_with("target-") => UNSERVED,
        _ => "the peer refuses this side",
    }
}

const UNSERVED: &str = "the peer has let this side in and cannot reach its service";

impl SessionError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Version(_) => "session-version",
            Self::UnknownMessage(_) => "session-unknown-message",
            Self::TooLarge { .. } => "session-too-large",
            Self::Malformed(_) => "session-malformed",
            Self::Unexpected(_) => "session-unexpected",
            Self::Truncated => "session-truncated",
            Self::Nonce => "session-nonce",
            Self::Exporter => "session-exporter",
            Self::OtherKey => "session-other-key",
            Self::Confirmation => "session-confirmation",
            Self::Refused(_) => "session-refused",
            Self::Unattested => "session-unattested",
            Self::OwnEvidence(_) => "session-own-evidence",
            Self::Ticket => "session-ticket",
            Self::Ended => "session-ended",
            Self::Required => "session-binding-required",
        }
    }
}
