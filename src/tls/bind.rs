//! How an endpoint takes part in `tng/1`, and what it remembers of sessions that were bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsStream;

use super::certificate::VALIDITY;
use super::endpoint::{Appraisal, appraise};
use super::identity::Fixed;
use super::peer::PeerCertificate;
use super::session::{Asker, Bound, BoundSession, Exchange, Proven, Prover, Turn};
use super::standing::Renew;
use super::{Alpn, ChannelError};
use crate::attest::{Attester, Verdict, VerifyError};
use crate::config::{Model, Ra};

/// Sessions whose secrets an attesting side keeps: one for each verifier that came lately.
const PROVEN_CAPACITY: usize = 4096;
/// Evidence made for sessions at once: a TEE makes one after the other anyway, and the peers that ask are strangers.
const EVIDENCE_AT_ONCE: usize = 16;

/// A connection waits this part of the handshake's deadline for another one's exchange with the same peer.
const PATIENCE: u32 = 3;

/// What an attesting endpoint needs for `tng/1`.
pub(super) struct Proving {
    pub attester: Arc<dyn Attester>,
    proven: Proven,
    places: Semaphore,
}

impl Proving {
    pub fn new(attester: Arc<dyn Attester>) -> Self {
        Self { attester, proven: Proven::new(PROVEN_CAPACITY, VALIDITY), places: Semaphore::new(EVIDENCE_AT_ONCE) }
    }
}

/// Protocols that an endpoint offers as a client and takes as a server, the preferred one first. Without attestation
/// there is nothing to bind.
pub(super) fn protocols(ra: &Ra) -> (Vec<Alpn>, Vec<Alpn>) {
    let bare = ra.attest.is_none() && ra.verify.is_none();
    match (bare, ra.require_session_binding) {
        (true, _) => (vec![Alpn::RatsTls, Alpn::H2], vec![Alpn::RatsTls, Alpn::H2]),
        (false, true) => (vec![Alpn::Tng1], vec![Alpn::Tng1]),
        (false, false) => {
            // An egress of TNG 2.8 takes either of the last two, as it is configured.
            let all = vec![Alpn::Tng1, Alpn::RatsTls, Alpn::H2];
            (all.clone(), all)
        }
    }
}

/// Runs the exchange over a connection whose handshake is done. `shown`: the certificate this side showed in it.
pub(super) async fn bind(
    stream: &mut TlsStream<TcpStream>,
    proving: Option<&Proving>,
    shown: Option<&Fixed>,
    appraisal: Option<&Arc<Appraisal>>,
) -> Result<Option<Bound>, ChannelError> {
    let prover = proving.zip(shown).map(|(p, shown)| Prover {
        attester: &*p.attester,
        spki: &shown.spki,
        proven: &p.proven,
        places: &p.places,
    });
    Exchange::new(stream).run(prover, appraisal.map(|a| &**a as &dyn Asker)).await
}

#[async_trait]
impl Asker for Appraisal {
    async fn turn(&self, key: [u8; 32]) -> Result<Turn, ChannelError> {
        if self.verdict_ttl.is_zero() {
            return Ok(Turn::Alone);
        }
        // Whoever goes first may have a peer that is slow, or silent: the others do not share its fate.
        let enter = self.sessions.enter(key, || self.clock.now());
        tokio::time::timeout(self.deadline / PATIENCE, enter).await.unwrap_or(Ok(Turn::Alone))
    }

    async fn appraise(&self, shown: PeerCertificate) -> Result<Verdict, ChannelError> {
        Ok(appraise(self.verifier.clone(), shown, self.clock.now(), self.verdict_ttl).await?)
    }

    fn keep(&self, session: Arc<BoundSession>) {
        self.sessions.put(session);
    }

    fn model(&self) -> Model {
        self.model
    }

    fn now(&self) -> SystemTime {
        self.clock.now()
    }
}

/// Appraises the evidence of a bound session again. It says nothing newer of the peer than it did; that the peer is
/// still the one it was about is what the session's own keys show.
pub(super) struct BoundRenewal {
    pub appraisal: Arc<Appraisal>,
    pub session: Arc<BoundSession>,
}

#[async_trait]
impl Renew for BoundRenewal {
    async fn renew(&self, _: &[u8]) -> Result<Arc<Verdict>, ChannelError> {
        let (appraisal, session) = (&self.appraisal, &self.session);
        let work = async {
            let _place = appraisal.renewals.acquire().await.map_err(|_| VerifyError::Internal)?;
            Ok(Arc::new(appraisal.appraise(session.shown.clone()).await?))
        };
        let outcome =
            tokio::time::timeout(appraisal.deadline, work).await.unwrap_or(Err(ChannelError::HandshakeTimeout));
        if outcome.as_ref().is_err_and(ChannelError::is_about_peer) {
            appraisal.sessions.forget(session);
        }
        outcome
    }
}

/// How often evidence was bound to what.
#[derive(Default)]
pub(super) struct BindingCounts {
    pub session: AtomicU64,
    pub resumed: AtomicU64,
    pub certificate: AtomicU64,
}

impl BindingCounts {
    /// One more channel. `resumed`: an earlier session was referred to, as far as this side knows.
    pub fn count(&self, alpn: Alpn, bare: bool, resumed: bool) {
        let counter = match alpn {
            Alpn::Tng1 if resumed => &self.resumed,
            Alpn::Tng1 => &self.session,
            _ if bare => return,
            _ => &self.certificate,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
