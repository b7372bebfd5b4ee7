//! Why no channel came about.

use std::io;

use rustls::{AlertDescription, InvalidMessage};

use super::{PeerError, SessionError};
use crate::attest::{AttestError, VerifyError};

/// Why no channel came about.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChannelError {
    /// The deadline passed.
    #[error("no handshake within the deadline")]
    HandshakeTimeout,
    /// The peer does not speak TLS.
    #[error("the peer does not speak TLS")]
    NotTls,
    /// The peer closed or reset the connection during the handshake.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The peer refused the handshake.
    #[error("{}", alert_text(*.0))]
    Alert(AlertDescription),
    /// No common application protocol.
    #[error(
        "no protocol in common: this side speaks RATS-TLS, and tng/1 if it attests or verifies; the peer wants another \
         one, tng/1 alone if it has require_session_binding = true"
    )]
    Alpn,
    /// The peer's certificate exceeds what a handshake message may hold (64 KiB).
    #[error("the peer's certificate is too large")]
    CertificateTooLarge,
    /// Any other breach of TLS.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
    /// The socket failed.
    #[error("socket failed during the handshake: {0}")]
    Io(String),
    /// This side has no evidence to show.
    #[error("this side cannot attest: {0}")]
    Attest(#[from] AttestError),
    /// The peer's certificate is not one that can be appraised.
    #[error("{0}")]
    Peer(#[from] PeerError),
    /// The appraisal ended without a verdict that lets the peer in.
    #[error("{0}")]
    Verify(#[from] VerifyError),
    /// The `tng/1` exchange failed.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// The peer was let in, or might have been, and this side cannot serve it.
    #[error("{text}")]
    Unserved {
        /// Slug.
        reason: &'static str,
        /// In words.
        text: String,
    },
    /// The endpoint could not be set up.
    #[error("TLS setup failed: {0}")]
    Setup(String),
}

/// What a fatal alert of the peer means here.
pub(crate) fn alert_text(alert: AlertDescription) -> String {
    let meaning = match alert {
        AlertDescription::CertificateRequired => {
            ": it demands evidence, and this side shows none: it has no attest table"
        }
        _ => "",
    };
    format!("the peer refused the connection by the TLS alert {alert:?}{meaning}")
}

impl ChannelError {
    /// Whether it says something of the peer, and not of this side or the service that was asked.
    pub(super) fn is_about_peer(&self) -> bool {
        match self {
            Self::Peer(_) => true,
            Self::Verify(e) => e.is_about_peer(),
            _ => false,
        }
    }

    /// Whether the rules in force were applied to the peer and not met, as opposed to an answer that could not be had. So
    /// it is with a token whose signer a reload took out of the trusted ones.
    pub(super) fn is_judgement(&self) -> bool {
        match self {
            Self::Session(SessionError::Required) => true,
            Self::Verify(VerifyError::Builtin(_)) => !self.is_silence(),
            Self::Verify(e) => e.is_about_token() || e.is_about_peer(),
            _ => self.is_about_peer(),
        }
    }

    /// Whether nobody gave an answer.
    pub(super) fn is_silence(&self) -> bool {
        use VerifyError as V;
        match self {
            Self::HandshakeTimeout => true,
            Self::Verify(V::Builtin(e)) => matches!(e, crate::attest::BuiltinError::Fetch { .. }),
            Self::Verify(e) => {
                matches!(e, V::AsUnreachable(_) | V::AsTls(_) | V::AsTimeout | V::AsStalled | V::Busy | V::Internal)
            }
            _ => false,
        }
    }

    /// Stable slug for records, metrics, status and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::HandshakeTimeout => "handshake-timeout",
            Self::NotTls => "tls-not-tls",
            Self::Closed => "tls-closed",
            Self::Alert(_) => "tls-alert",
            Self::Alpn => "tls-alpn",
            Self::CertificateTooLarge => "tls-certificate-too-large",
            Self::Tls(_) => "tls-error",
            Self::Io(_) => "tls-io",
            Self::Attest(e) => e.reason(),
            Self::Peer(e) => e.reason(),
            Self::Verify(e) => e.reason(),
            Self::Session(e) => e.reason(),
            Self::Unserved { reason, .. } => reason,
            Self::Setup(_) => "tls-setup",
        }
    }
}

impl From<io::Error> for ChannelError {
    /// tokio-rustls reports TLS failures as an [`io::Error`] around a [`rustls::Error`].
    fn from(e: io::Error) -> Self {
        if let Some(tls) = e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return tls.into();
        }
        // rustls has no other word for a handshake message that its buffer cannot hold to the end.
        if e.to_string() == "message buffer full" {
            return Self::CertificateTooLarge;
        }
        match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(e.to_string()),
        }
    }
}

impl From<&rustls::Error> for ChannelError {
    fn from(e: &rustls::Error) -> Self {
        use rustls::Error as E;
        match e {
            E::InvalidMessage(
                InvalidMessage::HandshakePayloadTooLarge | InvalidMessage::CertificatePayloadTooLarge,
            ) => Self::CertificateTooLarge,
            // What a record of TLS cannot begin with: an HTTP request, an SSH banner.
            E::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge,
            ) => Self::NotTls,
            E::NoApplicationProtocol | E::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Alpn,
            E::AlertReceived(alert) => Self::Alert(*alert),
            E::NoCertificatesPresented => Self::Peer(PeerError::NoCertificate),
            other => Self::Tls(other.to_string()),
        }
    }
}
