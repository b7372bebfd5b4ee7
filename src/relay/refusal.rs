//! Why a connection never got to carry bytes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::dial::MarkPolicy;
use crate::tls::ChannelError;

/// A connection was refused. The application sees a reset.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It came to the transparent listener itself and not through a capture rule.
    #[error("the connection went to the listener {0} itself, nothing captured it")]
    DirectToListener(SocketAddr),
    /// A connection arrived on a port that the endpoint's mapping does not list.
    #[error("port {0} is not among the endpoint's listening ports")]
    UnmappedPort(u16),
    /// The accepted socket has no addresses: the client is gone already.
    #[error("the client left before it was served: {0}")]
    ClientGone(io::Error),
    /// The name has no address.
    #[error("cannot resolve {name}: {error}")]
    Unresolved {
        /// The name.
        name: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// The target answered with a reset.
    #[error("{0} refused the connection")]
    TargetRefused(SocketAddr),
    /// No answer within the connect deadline.
    #[error("{addr} did not answer within {after:?}{mark}")]
    TargetTimeout {
        /// The target.
        addr: SocketAddr,
        /// The deadline.
        after: Duration,
        /// The socket's mark.
        mark: MarkPolicy,
    },
    /// No way to the target.
    #[error("{addr} is not reachable: {error}{mark}")]
    TargetUnreachable {
        /// The target.
        addr: SocketAddr,
        /// What connect(2) said.
        error: io::Error,
        /// The socket's mark.
        mark: MarkPolicy,
    },
    /// The socket could not be marked: it would be captured again.
    #[error("cannot set the socket's mark (CAP_NET_RAW missing?): {0}")]
    Mark(io::Error),
    /// The socket could not take the client's address.
    #[error("cannot use the client's address towards the service (CAP_NET_RAW missing?): {0}")]
    PreserveSource(io::Error),
    /// All tried source ports are in use.
    #[error(
        "no free source port for {0} in preserve_source_ports after {1} tries: widen the range, or keep connections open"
    )]
    SourcePorts(std::net::IpAddr, usize),
    /// No socket could be made.
    #[error("cannot make a socket: {0}")]
    Socket(io::Error),
    /// Handshake or appraisal failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The client of an egress connected and said nothing.
    #[error("no whole ClientHello within {0:?} of the connection")]
    Silent(Duration),
    /// The client's source has too many connections that are not established.
    #[error("{connections} connections of {of} are not established yet, and there is room for {room} of all others")]
    SourceFull {
        /// An IPv4 address, or a network of IPv6 with 64 bits.
        of: std::net::IpAddr,
        /// How many it has.
        connections: usize,
        /// How many more may arrive, of whomever.
        room: usize,
    },
    /// Handshake and appraisal took too long.
    #[error("no handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// The multiplexing peer did not open the stream.
    #[error("the peer answered the stream with status {0}")]
    StreamRefused(u16),
    /// The HTTP/2 peer asked for something else than CONNECT.
    #[error("the method was {0}, not CONNECT")]
    NotConnect(String),
    /// The HTTP/2 peer opened more streams than the endpoint's connection bound allows.
    #[error("max_connections is reached")]
    TooManyConnections,
    /// The HTTP/2 connection broke.
    #[error("HTTP/2: {0}")]
    Http2(h2::Error),
    /// The daemon stops.
    #[error("the daemon stops")]
    Draining,
}

impl From<h2::Error> for Refusal {
    /// What the connection under HTTP/2 did is named for what it is. h2 keeps the text of a TLS error and not the error.
    fn from(error: h2::Error) -> Self {
        let demanded = rustls::AlertDescription::CertificateRequired;
        match error.get_io() {
            Some(io) if io.to_string() == rustls::Error::AlertReceived(demanded).to_string() => {
                Refusal::Channel(ChannelError::Alert(demanded))
            }
            Some(io) if io.kind() != std::io::ErrorKind::InvalidData => {
                Refusal::Channel(std::io::Error::from(io.kind()).into())
            }
            _ => Refusal::Http2(error),
        }
    }
}

impl Refusal {
    /// Stable slug for records, metrics, status and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::DirectToListener(_) => "direct-to-listener",
            Refusal::UnmappedPort(_) => "unmapped-port",
            Refusal::ClientGone(_) => "client-gone",
            Refusal::Unresolved { .. } => "target-unresolved",
            Refusal::TargetRefused(_) => "target-refused",
            Refusal::TargetTimeout { .. } => "target-timeout",
            Refusal::TargetUnreachable { .. } => "target-unreachable",
            Refusal::Mark(_) => "mark-denied",
            Refusal::PreserveSource(_) => "preserve-source-denied",
            Refusal::SourcePorts(..) => "source-ports-exhausted",
            Refusal::Socket(_) => "socket-failed",
            Refusal::Channel(error) => error.reason(),
            Refusal::Silent(_) => "silent-client",
            Refusal::SourceFull { .. } => "source-full",
            Refusal::HandshakeTimeout(_) => "handshake-timeout",
            Refusal::StreamRefused(_) => "stream-refused",
            Refusal::NotConnect(_) => "not-connect",
            Refusal::TooManyConnections => "too-many-connections",
            Refusal::Http2(_) => "http2-error",
            Refusal::Draining => "draining",
        }
    }
}
