//! Keys, certificates with evidence, rustls configurations, and the attested channel.

mod appraisal;
mod bind;
mod certificate;
mod config;
mod endpoint;
mod error;
mod identity;
mod known;
mod peer;
pub mod probe;
mod providers;
mod reappraise;
mod resumption;
mod rules;
pub mod session;
mod snapshot;
mod standing;
mod status;

use std::sync::Arc;

use tokio::net::TcpStream;

use crate::attest::Verdict;
use crate::config::Ra;

pub use config::provider as crypto_provider;
pub use endpoint::EndpointTls;
pub use error::ChannelError;
pub(crate) use error::alert_text;
pub use peer::PeerError;
pub use session::{Door, Ending, SessionError};
pub use standing::{Closing, CurrentVerdict, Standing, Standings, WeakStandings, Withdrawn};
pub use status::{AttestStatus, FailureStatus, PeerStatus, RefusalStatus, TlsStatus, VerifyStatus};

/// An established tunnel connection whose peer was appraised, if this side verifies.
pub struct Channel {
    /// The TLS stream.
    pub stream: tokio_rustls::TlsStream<TcpStream>,
    /// Who is at the other end.
    pub peer: Peer,
    /// What was negotiated.
    pub alpn: Alpn,
    /// How long the peer may stay, also one that nobody verified: a reload may ask who it is. Absent in tests alone.
    pub standing: Option<Arc<Standing>>,
}

/// What this side knows of the other.
#[derive(Debug, Clone)]
pub enum Peer {
    /// This side does not verify.
    Unverified,
    /// The verdict of the appraisal.
    Verified(Arc<Verdict>),
}

/// Application protocol of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alpn {
    /// `rats-tls`: the bytes of one TCP connection.
    RatsTls,
    /// `h2`: one CONNECT stream a TCP connection (TNG's multiplex).
    H2,
    /// `tng/1`: as `rats-tls`, after evidence about this very connection (docs/tng-1.md).
    Tng1,
}

/// What the evidence that both sides showed is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Nobody showed any.
    None,
    /// The key of the certificate (RATS-TLS).
    Certificate,
    /// The connection (`tng/1`).
    Session,
}

impl Binding {
    /// That of a connection of an endpoint with these roles.
    pub fn of(alpn: Alpn, ra: &Ra) -> Self {
        match alpn {
            Alpn::Tng1 => Self::Session,
            _ if ra.attest.is_none() && ra.verify.is_none() => Self::None,
            _ => Self::Certificate,
        }
    }

    /// As records and status show it.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Certificate => "certificate",
            Self::Session => "session",
        }
    }
}

impl Alpn {
    /// The protocol of these bytes, if it is one of ours.
    fn from_wire(name: &[u8]) -> Option<Self> {
        match name {
            b"rats-tls" => Some(Self::RatsTls),
            b"h2" => Some(Self::H2),
            b"tng/1" => Some(Self::Tng1),
            _ => None,
        }
    }

    /// Its name on the wire (RFC 7301).
    pub fn as_wire(self) -> &'static [u8] {
        match self {
            Self::RatsTls => b"rats-tls",
            Self::H2 => b"h2",
            Self::Tng1 => b"tng/1",
        }
    }
}
