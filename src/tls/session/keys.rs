//! What both ends of one TLS connection, and nobody else, can compute: exporter values (RFC 8446, section 7.5).

use aws_lc_rs::hmac;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use zeroize::Zeroize;

use crate::attest::RuntimeData;
use crate::tls::ChannelError;

/// Bytes of a nonce.
pub const NONCE_LEN: usize = 32;
/// Bytes of a session's name.
pub const ID_LEN: usize = 16;
/// Bytes of a confirmation, HMAC-SHA-256.
pub const CONFIRMATION_LEN: usize = 32;
/// Label of the value that goes into the evidence, 32 bytes.
pub const EVIDENCE_LABEL: &[u8] = b"EXPORTER-tng-1-evidence";
/// Label of a bound session's name, 16 bytes.
pub const ID_LABEL: &[u8] = b"EXPORTER-tng-1-session-id";
/// Label of a bound session's secret, 32 bytes.
pub const SECRET_LABEL: &[u8] = b"EXPORTER-tng-1-session-secret";

/// An end of the TLS connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The TLS client.
    Client = 1,
    /// The TLS server.
    Server = 2,
}

impl Role {
    /// The opposite end.
    pub fn peer(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// Name of a bound session. Says nothing about its secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; ID_LEN]);

/// Secret of a bound session; wiped when dropped.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// A secret of these bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Proof that this secret is known at the end of the connection that `about` describes.
    pub fn confirm(&self, about: &RuntimeData) -> [u8; CONFIRMATION_LEN] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        let mut tag = [0; CONFIRMATION_LEN];
        tag.copy_from_slice(hmac::sign(&key, about.canonical().as_bytes()).as_ref());
        tag
    }

    /// Whether `tag` is such a proof. Compared in constant time.
    pub fn confirms(&self, about: &RuntimeData, tag: &[u8; CONFIRMATION_LEN]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        hmac::verify(&key, about.canonical().as_bytes(), tag).is_ok()
    }
}

/// Context of all exporter values of one half of the exchange: who attests, about which nonce.
pub fn context(attester: Role, nonce: &[u8; NONCE_LEN]) -> [u8; 1 + NONCE_LEN] {
    let mut context = [attester as u8; 1 + NONCE_LEN];
    context[1..].copy_from_slice(nonce);
    context
}

/// The exporter values of one half of the exchange.
#[derive(Clone, Copy)]
pub(super) struct Half<'a> {
    pub stream: &'a TlsStream<TcpStream>,
    pub attester: Role,
    pub nonce: &'a [u8; NONCE_LEN],
}

impl Half<'_> {
    fn export<const N: usize>(self, label: &[u8]) -> Result<[u8; N], ChannelError> {
        let context = context(self.attester, self.nonce);
        let value = match self.stream {
            TlsStream::Client(s) => s.get_ref().1.export_keying_material([0; N], label, Some(&context)),
            TlsStream::Server(s) => s.get_ref().1.export_keying_material([0; N], label, Some(&context)),
        };
        value.map_err(|e| ChannelError::Tls(e.to_string()))
    }

    /// What the evidence is about, when the attester has the key with this SubjectPublicKeyInfo.
    pub fn about(self, spki: &[u8]) -> Result<RuntimeData, ChannelError> {
        Ok(RuntimeData::for_session(spki, self.nonce, &self.export(EVIDENCE_LABEL)?))
    }

    /// Name and secret of the session that the evidence binds.
    pub fn session(self) -> Result<(SessionId, Secret), ChannelError> {
        Ok((SessionId(self.export(ID_LABEL)?), Secret(self.export(SECRET_LABEL)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confirmation_is_about_one_connection_and_one_secret() {
        let here = RuntimeData::for_session(b"key", &[1; 32], &[2; 32]);
        let tag = Secret::new([3; 32]).confirm(&here);
        assert!(Secret::new([3; 32]).confirms(&here, &tag));
        assert!(!Secret::new([4; 32]).confirms(&here, &tag));
        for other in [
            RuntimeData::for_session(b"key", &[9; 32], &[2; 32]),
            RuntimeData::for_session(b"key", &[1; 32], &[9; 32]),
            RuntimeData::for_session(b"yek", &[1; 32], &[2; 32]),
        ] {
            assert!(!Secret::new([3; 32]).confirms(&other, &tag));
        }
        assert!(!format!("{:?}", Secret::new([3; 32])).contains('3'));
    }
}
