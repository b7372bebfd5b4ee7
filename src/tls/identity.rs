//! What this side shows of itself: kept fresh in the background, never made while a handshake waits
//! (unless the operator asks for new evidence in every handshake).

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::certificate::{self, Doubt, Made};
use super::standing::spread;
use crate::attest::{AttestError, Attester};
use crate::os::clock::Clock;
use crate::os::lock::Lock;

/// First pause after a failure; doubled up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest pause: how late this side notices that its attester is back.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Evidence is made anew after half of its life at the latest, this part of it earlier by chance: hosts that were
/// started together do not ask their services together for ever.
const JITTER: f64 = 0.2;
/// A host that was suspended, or whose clock was set, notices it after this time.
const MAX_NAP: Duration = Duration::from_secs(30);

/// A certificate and the moment its evidence was asked for.
struct Identity {
    shown: Arc<Fixed>,
    not_after: SystemTime,
    token_issued: Option<SystemTime>,
    doubt: Option<Doubt>,
    born: Instant,
    fresh_until: Instant,
    /// How long it took to get.
    took: Duration,
}

impl Identity {
    /// Evidence that may be shown for `interval`, and no longer than its certificate is valid.
    fn new(made: &Made, born: Instant, asked_at: SystemTime, interval: Duration) -> Self {
        let valid = made.not_after.duration_since(asked_at).unwrap_or_default();
        let fresh_until = born + interval.min(valid);
        Self {
            shown: Fixed::of(made),
            not_after: made.not_after,
            token_issued: made.token_issued,
            doubt: made.doubt.clone(),
            born,
            fresh_until,
            took: born.elapsed(),
        }
    }

    /// When newer evidence is to be asked for.
    fn refresh_at(&self) -> Instant {
        let half = (self.fresh_until - self.born) / 2;
        // Tokens that live for seconds must not make a busy loop.
        self.born + half.mul_f64(1.0 - JITTER * spread()).max(MIN_BACKOFF)
    }
}

/// The newest failure, kept when it is over.
#[derive(Clone)]
pub struct Failed {
    /// Why there was no evidence.
    pub error: AttestError,
    /// When.
    pub at: SystemTime,
}

#[derive(Clone, Default)]
struct State {
    current: Option<Arc<Identity>>,
    /// Why the newest attempt failed; none when it did not.
    failure: Option<AttestError>,
    last: Option<Failed>,
    failures: u64,
}

impl State {
    /// Evidence that grew older than the operator allows, or whose certificate is over, is not shown, whatever else
    /// fails.
    fn fresh(&self, clock: &dyn Clock) -> Option<&Arc<Identity>> {
        self.current.as_ref().filter(|i| Instant::now() < i.fresh_until && clock.now() < i.not_after)
    }

    fn made(&mut self, identity: Identity) {
        let before = self.current.as_ref().and_then(|current| current.doubt.as_ref());
        // Once, and not for each handshake or refresh.
        if let Some(doubt) = identity.doubt.as_ref().filter(|doubt| before != Some(doubt)) {
            tracing::warn!(reason = doubt.reason(), error = %doubt, "peers refuse this side");
        }
        self.current = Some(Arc::new(identity));
        self.failure = None;
    }

    fn failed(&mut self, error: AttestError, at: SystemTime) {
        self.failures += 1;
        self.last = Some(Failed { error: error.clone(), at });
        self.failure = Some(error);
    }
}

/// Shows one certificate.
#[derive(Debug)]
pub struct Fixed {
    certified: Arc<CertifiedKey>,
    /// DER SubjectPublicKeyInfo of its key.
    pub spki: Vec<u8>,
}

impl Fixed {
    fn of(made: &Made) -> Arc<Self> {
        Arc::new(Self { certified: made.certified.clone(), spki: made.spki.clone() })
    }
}

impl ResolvesServerCert for Fixed {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.clone())
    }
}

impl ResolvesClientCert for Fixed {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// Stands in a shared configuration until a handshake puts its certificate there.
#[derive(Debug)]
struct Nothing;

impl ResolvesServerCert for Nothing {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}

/// Where handshakes get this side's certificate from.
pub enum IdentityStore {
    /// No evidence: a certificate made at start.
    Plain(Arc<Fixed>),
    /// Evidence kept fresh in the background.
    Refreshed(Refreshed),
    /// Evidence made for each handshake.
    EachTime(EachTime),
}

/// Background refresh.
pub struct Refreshed {
    state: watch::Receiver<State>,
    clock: Arc<dyn Clock>,
    task: AbortHandle,
}

impl Drop for Refreshed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// New evidence for each handshake.
pub struct EachTime {
    attester: Arc<dyn Attester>,
    clock: Arc<dyn Clock>,
    last: Mutex<State>,
}

/// What status shows of it.
#[derive(Default)]
pub struct Condition {
    /// Why there is no (newer) evidence.
    pub failure: Option<AttestError>,
    /// Whether handshakes get a certificate now.
    pub usable: bool,
    /// Age of the evidence shown.
    pub age: Option<Duration>,
    /// How much longer it may be shown.
    pub left: Option<Duration>,
    /// How long it took to get.
    pub took: Option<Duration>,
    /// End of the certificate shown.
    pub not_after: Option<SystemTime>,
    /// When the token in it was made.
    pub token_issued: Option<SystemTime>,
    /// Why peers refuse it.
    pub doubt: Option<Doubt>,
    /// The newest failure, also when it is over.
    pub last: Option<Failed>,
    /// Failures since the start.
    pub failures: u64,
}

impl IdentityStore {
    /// A certificate without evidence.
    pub fn plain(clock: &dyn Clock) -> Result<Self, AttestError> {
        Ok(Self::Plain(Fixed::of(&certificate::unattested(clock.now())?)))
    }

    /// Evidence from `attester`, at most `interval` old; zero: for each handshake.
    pub fn attested(attester: Arc<dyn Attester>, interval: Duration, clock: Arc<dyn Clock>) -> Self {
        if interval.is_zero() {
            return Self::EachTime(EachTime { attester, clock, last: Mutex::default() });
        }
        // The evidence must be replaced before its certificate ends.
        let interval = interval.min(certificate::VALIDITY * 9 / 10);
        let (tx, rx) = watch::channel(State::default());
        let task = tokio::spawn(refresh(attester, interval, clock.clone(), tx)).abort_handle();
        Self::Refreshed(Refreshed { state: rx, clock, task })
    }

    /// For the shared server configuration.
    pub fn server_resolver(&self) -> Arc<dyn ResolvesServerCert> {
        match self {
            Self::Plain(fixed) => fixed.clone(),
            Self::Refreshed(_) | Self::EachTime(_) => Arc::new(Nothing),
        }
    }

    /// Waits until a handshake can be made. `Some`: with this certificate, which stays the handshake's own though a
    /// newer one is made meanwhile. `None`: with that of the shared configuration.
    pub async fn ready(&self) -> Result<Option<Arc<Fixed>>, AttestError> {
        match self {
            Self::Plain(_) => Ok(None),
            Self::Refreshed(r) => r.ready().await.map(Some),
            Self::EachTime(e) => e.make().await.map(Some),
        }
    }

    /// For status.
    pub fn condition(&self) -> Condition {
        let state = match self {
            Self::Plain(_) => return Condition { usable: true, ..Condition::default() },
            Self::Refreshed(r) => r.state.borrow().clone(),
            Self::EachTime(e) => e.last.locked().clone(),
        };
        let usable = match self {
            Self::EachTime(_) => state.failure.is_none(),
            Self::Refreshed(r) => state.fresh(&*r.clock).is_some(),
            Self::Plain(_) => true,
        };
        let shown = state.current.as_ref();
        Condition {
            usable,
            age: shown.map(|i| i.born.elapsed()),
            left: shown.map(|i| i.fresh_until.saturating_duration_since(Instant::now())),
            took: shown.map(|i| i.took),
            not_after: shown.map(|i| i.not_after),
            token_issued: shown.and_then(|i| i.token_issued),
            doubt: shown.and_then(|i| i.doubt.clone()),
            failure: state.failure,
            last: state.last,
            failures: state.failures,
        }
    }
}

impl Refreshed {
    /// Waits only for the very first evidence; afterwards either there is some or the reason why not.
    async fn ready(&self) -> Result<Arc<Fixed>, AttestError> {
        let (mut rx, clock) = (self.state.clone(), &*self.clock);
        let state =
            rx.wait_for(|s| s.fresh(clock).is_some() || s.failure.is_some()).await.map_err(|_| AttestError::Pending)?;
        match (state.fresh(clock), &state.failure) {
            (Some(identity), _) => Ok(identity.shown.clone()),
            (None, failure) => Err(failure.clone().unwrap_or(AttestError::Pending)),
        }
    }
}

impl EachTime {
    async fn make(&self) -> Result<Arc<Fixed>, AttestError> {
        let (born, asked_at) = (Instant::now(), self.clock.now());
        let made = certificate::attested(&*self.attester, asked_at).await;
        let mut last = self.last.locked();
        match made {
            Ok(made) => {
                let identity = Identity::new(&made, born, asked_at, Duration::ZERO);
                let shown = identity.shown.clone();
                last.made(identity);
                Ok(shown)
            }
            Err(e) => {
                last.failed(e.clone(), asked_at);
                Err(e)
            }
        }
    }
}

async fn refresh(attester: Arc<dyn Attester>, interval: Duration, clock: Arc<dyn Clock>, tx: watch::Sender<State>) {
    let mut backoff = MIN_BACKOFF;
    loop {
        let (born, asked_at) = (Instant::now(), clock.now());
        match certificate::attested(&*attester, asked_at).await {
            Ok(made) => {
                backoff = MIN_BACKOFF;
                let identity = Identity::new(&made, born, asked_at, interval);
                let next = identity.refresh_at();
                let over = identity.not_after;
                tx.send_modify(|s| s.made(identity));
                // A clock that was set, or a host that slept, may have ended the certificate before its time.
                while Instant::now() < next && clock.now() < over {
                    tokio::time::sleep_until(next.min(Instant::now() + MAX_NAP)).await;
                }
            }
            Err(e) => {
                tracing::warn!(reason = e.reason(), error = %e, "no new evidence");
                tx.send_modify(|s| s.failed(e, asked_at));
                tokio::time::sleep(backoff.mul_f64(1.0 - JITTER * spread())).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}
