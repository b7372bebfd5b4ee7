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
    made: Made,
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
pub struct Fixed(Arc<CertifiedKey>);

impl ResolvesServerCert for Fixed {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Fixed {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// Shows the newest certificate, or none when there is none fresh enough.
pub struct Newest(watch::Receiver<State>);

impl std::fmt::Debug for Newest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Newest")
    }
}

impl Newest {
    fn get(&self) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().fresh().map(|i| i.made.certified.clone())
    }
}

impl ResolvesServerCert for Newest {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

impl ResolvesClientCert for Newest {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
    fn has_certs(&self) -> bool {
        true
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
        Ok(Self::Plain(Arc::new(Fixed(certificate::unattested(clock.now())?.certified))))
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
            Self::Refreshed(r) => Arc::new(Newest(r.state.clone())),
            // Replaced in each handshake; alone it shows nothing.
            Self::EachTime(_) => Arc::new(Newest(watch::channel(State::default()).1)),
        }
    }

    /// For the shared client configuration.
    pub fn client_resolver(&self) -> Option<Arc<dyn ResolvesClientCert>> {
        match self {
            Self::Plain(_) | Self::EachTime(_) => None,
            Self::Refreshed(r) => Some(Arc::new(Newest(r.state.clone()))),
        }
    }

    /// Waits until a handshake can be made. `Some`: with this certificate, made for it alone.
    pub async fn ready(&self) -> Result<Option<Arc<Fixed>>, AttestError> {
        match self {
            Self::Plain(_) => Ok(None),
            Self::Refreshed(r) => r.ready().await.map(|()| None),
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
            not_after: state.current.as_ref().map(|i| i.made.not_after),
            failure: state.failure,
        }
    }
}

impl Refreshed {
    /// Waits only for the very first evidence; afterwards either there is some or the reason why not.
    async fn ready(&self) -> Result<(), AttestError> {
        let mut rx = self.state.clone();
        let state =
            rx.wait_for(|s| s.fresh().is_some() || s.failure.is_some()).await.map_err(|_| AttestError::Pending)?;
        match (state.fresh(), &state.failure) {
            (Some(_), _) => Ok(()),
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
                let fixed = Arc::new(Fixed(made.certified.clone()));
                *last = State { current: Some(Arc::new(Identity { made, born, fresh_until: born })), failure: None };
                Ok(fixed)
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
                let identity = Identity { made, born, fresh_until: born + interval };
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
