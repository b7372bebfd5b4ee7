//! What an endpoint's configuration demands of its peers, and who is judged by it: those that connect, and after a
//! reload those that are there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use tokio::time::timeout;

use super::appraisal::{Appraisal, appraise};
use super::certificate::fingerprint;
use super::session::{BoundSession, SessionError};
use super::snapshot::Snapshot;
use super::standing::{Entry, Judge, Shown, Standing, Standings};
use super::status::TlsStatus;
use super::{Alpn, ChannelError, PeerError, peer};
use crate::attest::{Appraised, Verdict, VerifyError};
use crate::config::{Ra, Verify};
use crate::os::clock::Clock;

/// Peers of an endpoint that verifies nobody stand under one of these; no hash of anything real is so.
const NOBODY: [u8; 32] = [0; 32];
const NOBODY_BY_SESSION: [u8; 32] = [0xff; 32];

/// What verdicts and the right to stay rest on.
#[derive(Debug, Default)]
pub(super) struct Settings {
    verify: Option<Verify>,
    require_session_binding: bool,
    files: Snapshot,
}

impl Settings {
    /// Those of `ra`, with the contents of its files as they were read.
    pub fn new(ra: &Ra, files: Snapshot) -> Self {
        Self { verify: ra.verify.clone(), require_session_binding: ra.require_session_binding, files }
    }

    /// Whether what was found under the one holds under the other.
    pub fn demand_the_same(&self, other: &Self) -> bool {
        self.verify == other.verify
            && self.require_session_binding == other.require_session_binding
            && self.files.is_known()
            && self.files == other.files
    }
}

/// The rules of one configuration.
pub(super) struct Rules {
    appraisal: Option<Arc<Appraisal>>,
    require_session_binding: bool,
    grace: Duration,
}

impl Rules {
    pub fn new(appraisal: Option<Arc<Appraisal>>, ra: &Ra) -> Self {
        Self { appraisal, require_session_binding: ra.require_session_binding, grace: ra.grace }
    }
}

#[async_trait]
impl Judge for Rules {
    async fn judge(&self, shown: &Shown) -> Result<Option<Arc<Verdict>>, ChannelError> {
        if self.require_session_binding && !shown.is_session() {
            return Err(SessionError::Required.into());
        }
        let Some(appraisal) = &self.appraisal else { return Ok(None) };
        let _place = appraisal.renewals.acquire().await.map_err(|_| VerifyError::Internal)?;
        let judged = async {
            match shown {
                Shown::Nothing { .. } => Err(PeerError::NotAppraised.into()),
                Shown::Certificate(der) => appraisal.judge_certificate(der).await,
                Shown::Session(session) => appraisal.judge_session(session).await,
            }
        };
        let outcome = timeout(appraisal.deadline, judged).await.unwrap_or(Err(ChannelError::HandshakeTimeout));
        appraisal.note(shown, &outcome);
        outcome.map(Some)
    }

    fn grace(&self) -> Duration {
        self.grace
    }
}

impl Appraisal {
    async fn judge_certificate(&self, der: &[u8]) -> Result<Arc<Verdict>, ChannelError> {
        let now = self.clock.now();
        let shown = peer::inspect(der, self.model, now)?;
        let not_after = shown.not_after;
        let verdict = Arc::new(appraise(self.verifier.clone(), shown, now, self.verdict_ttl).await?);
        if !self.verdict_ttl.is_zero() {
            // New connections of the peer are let in by what was found now.
            self.cache.put(self.key(der), Appraised { verdict: verdict.clone(), not_after });
        }
        Ok(verdict)
    }

    /// The evidence of a bound session says nothing newer of the peer than it did; that the peer is still the one it
    /// was about is what the session's own keys show.
    async fn judge_session(&self, session: &BoundSession) -> Result<Arc<Verdict>, ChannelError> {
        peer::fits(&session.shown.credential, self.model)?;
        let (shown, now) = (session.shown.clone(), self.clock.now());
        Ok(Arc::new(appraise(self.verifier.clone(), shown, now, self.verdict_ttl).await?))
    }

    /// New connections of a peer that is refused are not let in by what was found before.
    fn note(&self, shown: &Shown, outcome: &Result<Arc<Verdict>, ChannelError>) {
        if !outcome.as_ref().is_err_and(ChannelError::is_about_peer) {
            return;
        }
        match shown {
            Shown::Certificate(der) => self.cache.forget(&self.key(der)),
            Shown::Session(session) => self.sessions.forget(session),
            Shown::Nothing { .. } => {}
        }
    }
}

/// One configuration's hold on the peers of its endpoint.
pub(super) struct Oversight {
    rules: Arc<Rules>,
    settings: Arc<Settings>,
    seat: ArcSwap<Seat>,
    clock: Arc<dyn Clock>,
}

/// The peers, and the term in which this configuration judges them.
struct Seat {
    peers: Standings,
    term: u64,
}

impl Oversight {
    /// Over nobody yet.
    pub fn new(rules: Rules, settings: Settings, clock: Arc<dyn Clock>) -> Self {
        let (rules, settings) = (Arc::new(rules), Arc::new(settings));
        let peers = Standings::new(rules.clone(), settings.clone());
        let term = peers.term();
        Self { rules, settings, seat: ArcSwap::from_pointee(Seat { peers, term }), clock }
    }

    /// Takes over the peers of the configuration before. Handshakes that go on under that one end in its term, and
    /// their peers are appraised again, too.
    pub fn take_over(&self, peers: &Standings) {
        let term = peers.enforce(self.rules.clone(), self.settings.clone());
        self.seat.store(Arc::new(Seat { peers: peers.clone(), term }));
    }

    /// The peers.
    pub fn peers(&self) -> Standings {
        self.seat.load().peers.clone()
    }

    /// A peer that showed the certificate `der` was let in.
    pub fn admit_certificate(
        &self,
        key: [u8; 32],
        der: &[u8],
        not_after: SystemTime,
        verdict: Arc<Verdict>,
    ) -> Arc<Standing> {
        self.admit(key, Shown::Certificate(der.into()), not_after, Some(verdict))
    }

    /// A peer was let in by the evidence of `session`.
    pub fn admit_session(&self, session: Arc<BoundSession>) -> Arc<Standing> {
        let (not_after, verdict) = (session.shown.not_after, session.verdict.clone());
        let key = fingerprint(session.shown.expected.canonical().as_bytes());
        self.admit(key, Shown::Session(session), not_after, Some(verdict))
    }

    /// A peer was let in as anybody is. It stays until a reload asks who it is.
    pub fn admit_anybody(&self, alpn: Alpn) -> Arc<Standing> {
        let session = alpn == Alpn::Tng1;
        let key = if session { NOBODY_BY_SESSION } else { NOBODY };
        self.admit(key, Shown::Nothing { session }, SystemTime::UNIX_EPOCH, None)
    }

    fn admit(
        &self,
        key: [u8; 32],
        shown: Shown,
        not_after: SystemTime,
        verdict: Option<Arc<Verdict>>,
    ) -> Arc<Standing> {
        let seat = self.seat.load();
        seat.peers.admit(Entry { key, shown, not_after, verdict, term: seat.term }, self.clock.clone())
    }

    /// Whether a file that the rules rest on holds something else now.
    pub fn is_stale(&self) -> bool {
        !self.settings.files.is_current()
    }

    /// For `tngctl status`.
    pub fn fill(&self, status: &mut TlsStatus) {
        let peers = self.peers();
        let counts = peers.counts();
        status.peers_reappraised = counts.reappraised.load(Ordering::Relaxed);
        status.peers_failed = counts.failed.load(Ordering::Relaxed);
        status.peers_recovered = counts.recovered.load(Ordering::Relaxed);
        status.peers_closing = peers.closing();
    }
}
