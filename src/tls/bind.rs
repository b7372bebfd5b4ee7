//! How an endpoint takes part in `tng/1`, and what it remembers of sessions that were bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsStream;

use super::appraisal::{Appraisal, appraise};
use super::certificate::VALIDITY;
use super::identity::Fixed;
use super::peer::PeerCertificate;
use super::session::{Asker, BoundSession, Door, Ending, Exchange, Outcome, Proof, Proven, Prover, SessionError, Turn};
use super::{Alpn, ChannelError};
use crate::attest::{Attester, Verdict};
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

/// Runs the exchange over a connection whose handshake is done. `shown`: the certificate this side showed in it; `door`: of
/// a server.
pub(super) async fn bind(
    stream: &mut TlsStream<TcpStream>,
    proving: Option<&Proving>,
    shown: Option<&Fixed>,
    appraisal: Option<&Arc<Appraisal>>,
    door: Option<&dyn Door>,
    ending: Ending<'_>,
) -> Result<LetIn, ChannelError> {
    let prover = proving.zip(shown).map(|(p, shown)| Prover {
        attester: &*p.attester,
        spki: &shown.spki,
        proven: &p.proven,
        places: &p.places,
    });
    let asker = appraisal.map(|a| &**a as &dyn Asker);
    let Outcome { bound, proved } = Exchange::new(stream).run(prover, asker, door, ending).await?;
    // A side that verifies goes by what it saw, one that does not by what it showed.
    let confirmed = bound.as_ref().map_or(proved == Some(Proof::Confirmation), |b| b.resumed);
    let origin = if confirmed { Origin::Confirmation } else { Origin::Evidence };
    Ok(LetIn { session: bound.map(|b| b.session), origin, proved: proved.is_some() })
}

/// How a connection of `tng/1` was let in.
pub(super) struct LetIn {
    /// The session in which the peer was appraised, if this side verifies.
    pub session: Option<Arc<BoundSession>>,
    pub origin: Origin,
    /// Whether the peer has let this side in, now or in the session that is resumed.
    pub proved: bool,
}

impl LetIn {
    /// By a ticket of this session.
    pub fn resumed(session: Option<Arc<BoundSession>>) -> Self {
        Self { session, origin: Origin::Ticket, proved: true }
    }

    /// Whether anybody attested anything: without that there is nothing to resume.
    pub fn is_bound(&self) -> bool {
        self.session.is_some() || self.proved
    }

    /// What was so when the handshake began must be so still: a peer could have taken its time.
    ///
    /// # Errors
    /// The session has ended meanwhile; or this side verifies, and there is none.
    pub fn check(&self, appraisal: Option<&Arc<Appraisal>>) -> Result<(), SessionError> {
        match (appraisal, &self.session) {
            (None, _) => Ok(()),
            (Some(_), None) => Err(SessionError::Ticket),
            (Some(_), Some(_)) if self.origin == Origin::Evidence => Ok(()),
            (Some(appraisal), Some(session)) if appraisal.still_bound(session) => Ok(()),
            (Some(_), Some(_)) => Err(SessionError::Ended),
        }
    }
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

    fn holds(&self, session: &BoundSession) -> bool {
        self.still_bound(session)
    }

    fn model(&self) -> Model {
        self.model
    }

    fn now(&self) -> SystemTime {
        self.clock.now()
    }
}

/// What lets a connection of `tng/1` in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Evidence about this connection.
    Evidence,
    /// The secret of an earlier session.
    Confirmation,
    /// A TLS ticket of an earlier session.
    Ticket,
}

/// How often evidence was bound to what.
#[derive(Default)]
pub(super) struct BindingCounts {
    session: AtomicU64,
    confirmed: AtomicU64,
    resumed: AtomicU64,
    certificate: AtomicU64,
}

impl BindingCounts {
    /// One more channel. `origin`: as far as this side knows.
    pub fn count(&self, alpn: Alpn, bare: bool, origin: Origin) {
        let counter = match (alpn, origin) {
            (Alpn::Tng1, Origin::Evidence) => &self.session,
            (Alpn::Tng1, Origin::Confirmation) => &self.confirmed,
            (Alpn::Tng1, Origin::Ticket) => &self.resumed,
            _ if bare => return,
            _ => &self.certificate,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// New sessions, confirmed ones, resumed ones, certificates.
    pub fn read(&self) -> [u64; 4] {
        [&self.session, &self.confirmed, &self.resumed, &self.certificate].map(|c| c.load(Ordering::Relaxed))
    }
}
