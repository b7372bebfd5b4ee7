//! What this side shows of itself: kept fresh in the background, never made while a handshake waits
//! (unless the operator asks for new evidence in every handshake).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::certificate::{self, Made};
use crate::attest::{AttestError, Attester, Clock};

/// First pause after a failure; doubled up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(250);
/// Longest pause: how late this side notices that its attester is back.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// A certificate and the moment its evidence was asked for.
struct Identity {
    shown: Arc<Fixed>,
    not_after: SystemTime,
    born: Instant,
    fresh_until: Instant,
}

#[derive(Clone, Default)]
struct State {
    current: Option<Arc<Identity>>,
    failure: Option<AttestError>,
}

impl State {
    /// Evidence that grew older than the operator allows is not shown, whatever else fails.
    fn fresh(&self) -> Option<&Arc<Identity>> {
        self.current.as_ref().filter(|i| Instant::now() < i.fresh_until)
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
pub struct Condition {
    /// Why there is no (newer) evidence.
    pub failure: Option<AttestError>,
    /// Whether handshakes get a certificate now.
    pub usable: bool,
    /// Age of the evidence shown.
    pub age: Option<Duration>,
    /// End of the certificate shown.
    pub not_after: Option<SystemTime>,
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
        let task = tokio::spawn(refresh(attester, interval, clock, tx)).abort_handle();
        Self::Refreshed(Refreshed { state: rx, task })
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
            Self::Plain(_) => return Condition { failure: None, usable: true, age: None, not_after: None },
            Self::Refreshed(r) => r.state.borrow().clone(),
            Self::EachTime(e) => e.last.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        let usable = match self {
            Self::EachTime(_) => state.failure.is_none(),
            _ => state.fresh().is_some(),
        };
        Condition {
            usable,
            age: state.current.as_ref().map(|i| i.born.elapsed()),
            not_after: state.current.as_ref().map(|i| i.not_after),
            failure: state.failure,
        }
    }
}

impl Refreshed {
    /// Waits only for the very first evidence; afterwards either there is some or the reason why not.
    async fn ready(&self) -> Result<Arc<Fixed>, AttestError> {
        let mut rx = self.state.clone();
        let state =
            rx.wait_for(|s| s.fresh().is_some() || s.failure.is_some()).await.map_err(|_| AttestError::Pending)?;
        match (state.fresh(), &state.failure) {
            (Some(identity), _) => Ok(identity.shown.clone()),
            (None, failure) => Err(failure.clone().unwrap_or(AttestError::Pending)),
        }
    }
}

impl EachTime {
    async fn make(&self) -> Result<Arc<Fixed>, AttestError> {
        let born = Instant::now();
        let made = certificate::attested(&*self.attester, self.clock.now()).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match made {
            Ok(made) => {
                let shown = Fixed::of(&made);
                let identity = Identity { shown: shown.clone(), not_after: made.not_after, born, fresh_until: born };
                *last = State { current: Some(Arc::new(identity)), failure: None };
                Ok(shown)
            }
            Err(e) => {
                last.failure = Some(e.clone());
                Err(e)
            }
        }
    }
}

async fn refresh(attester: Arc<dyn Attester>, interval: Duration, clock: Arc<dyn Clock>, tx: watch::Sender<State>) {
    let mut backoff = MIN_BACKOFF;
    loop {
        let born = Instant::now();
        match certificate::attested(&*attester, clock.now()).await {
            Ok(made) => {
                backoff = MIN_BACKOFF;
                let (shown, not_after) = (Fixed::of(&made), made.not_after);
                let identity = Identity { shown, not_after, born, fresh_until: born + interval };
                tx.send_replace(State { current: Some(Arc::new(identity)), failure: None });
                // A third of the interval is left for an attester that is slow or away for a moment.
                tokio::time::sleep_until(born + interval * 2 / 3).await;
            }
            Err(e) => {
                tracing::warn!(reason = e.reason(), error = %e, "no new evidence");
                tx.send_modify(|s| s.failure = Some(e));
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        }
    }
}
