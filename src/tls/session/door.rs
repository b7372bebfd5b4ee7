//! What a handshake is bound by from outside: who serves the peer that is let in, and what ends it early.

use std::pin::Pin;

use async_trait::async_trait;

use crate::attest::Verdict;
use crate::tls::ChannelError;

/// What ends a handshake early, and the reason that the peer is told. It is not polled again once it is ready.
pub type Ending<'a> = Pin<&'a mut (dyn Future<Output = ChannelError> + Send)>;

/// What a server has to do for a peer before it can serve it. What fails while the peer still waits for ACCEPT can be told.
#[async_trait]
pub trait Door: Send + Sync {
    /// Makes ready for a peer with this verdict. Called only for one that was appraised in this connection or confirmed
    /// an earlier session, never for one that resumed a TLS session, or that nobody appraises.
    ///
    /// # Errors
    /// [`ChannelError::Unserved`] with the reason that the peer is told.
    async fn open(&self, verdict: &Verdict) -> Result<(), ChannelError>;

    /// Whether it is likely that the peer cannot be served. In a resumed TLS session there is no message to say so.
    fn is_shut(&self) -> bool;
}
