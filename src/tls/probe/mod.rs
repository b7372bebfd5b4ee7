//! One connection made to look at the peer: what it shows is kept, whatever becomes of its appraisal.
//!
//! Handshake, exchange and appraisal are those of an endpoint; nothing is cached, resumed or shared with one.

mod own;
mod showing;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::{TlsConnector, TlsStream};

use super::appraisal::appraise;
use super::certificate::{self, Made, VALIDITY};
use super::endpoint::setup;
use super::peer::PeerCertificate;
use super::session::{Asker, BoundSession, Exchange, Proven, Prover, SessionError, Turn};
use super::{Alpn, ChannelError, PeerError, bind, config, peer, providers};
use crate::attest::{Attester, Credential, RuntimeData, Verdict};
use crate::config::{Endpoint, Model, VerifyProvider};
use crate::os::clock::Clock;
use crate::os::lock::Lock;

pub use own::{OwnEvidence, attest};
use showing::Showing;

/// How long a peer that asked for a certificate and got none may take to say that it insists.
const INSISTS_WITHIN: Duration = Duration::from_secs(5);
/// How long the end of a connection may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// Certificates of a peer that are kept.
const MAX_CERTIFICATES: usize = 8;

/// What was negotiated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// TLS version: `TLSv1.3`.
    pub version: String,
    /// Cipher suite, by its IANA name.
    pub cipher_suite: String,
    /// Key exchange group, by its IANA name.
    pub group: String,
    /// Application protocol, bytes as the peer chose them.
    pub alpn: Option<Vec<u8>>,
}

/// What a `tng/1` exchange brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEvidence {
    /// In the form of the certificate extension, as received.
    pub extension: Vec<u8>,
    /// What it has to be about.
    pub expected: RuntimeData,
}

/// Everything seen of one peer.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// Once the handshake was over.
    pub negotiated: Option<Negotiated>,
    /// DER, the peer's own first.
    pub certificates: Vec<Vec<u8>>,
    /// Whether the peer asked for a certificate of this side's.
    pub wants_evidence: bool,
    /// Of a `tng/1` exchange that came so far.
    pub session: Option<SessionEvidence>,
    /// Token that an attestation service gave for the peer's evidence; believed or not.
    pub token: Option<String>,
    /// What the appraisal found; absent also when nobody appraises.
    pub verdict: Option<Verdict>,
    /// Why an endpoint would refuse this connection.
    pub failure: Option<ChannelError>,
}

/// Makes such connections.
pub struct Prober {
    protocols: Vec<Alpn>,
    attester: Option<Arc<dyn Attester>>,
    verifier: Option<Arc<Showing>>,
    /// What the peer has to show; `None`: whatever it shows is taken.
    model: Option<Model>,
    timeout: Duration,
    clock: Arc<dyn Clock>,
}

impl Prober {
    /// With the roles of `endpoint`. `only`: the one protocol to offer. `follow`: evidence and tokens are both taken, as
    /// far as the verifier can.
    ///
    /// # Errors
    /// What keeps an endpoint from being set up: an unreadable file, no system roots.
    pub fn new(
        endpoint: &Endpoint,
        only: Option<Alpn>,
        follow: bool,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ChannelError> {
        let (ra, timeout) = (&endpoint.ra, endpoint.limits.handshake_timeout);
        let attester = ra.attest.as_ref().map(|a| providers::attester(endpoint, a, clock.clone())).transpose()?;
        let verifier = ra.verify.as_ref().map(|v| Showing::new(endpoint, v, clock.clone())).transpose()?;
        let bare = ra.attest.is_none() && ra.verify.is_none();
        let protocols = match only {
            Some(one) => vec![one],
            // Also to look without any roles: what the peer would show to who asks.
            None if bare => vec![Alpn::Tng1, Alpn::RatsTls, Alpn::H2],
            None => bind::protocols(ra).0,
        };
        let service = ra.verify.as_ref().is_none_or(|v| matches!(v.provider, VerifyProvider::As(_)));
        let model = ra.verify.as_ref().map(|v| v.model).filter(|_| !(follow && service));
        Ok(Self { protocols, attester, verifier: verifier.map(Arc::new), model, timeout, clock })
    }

    /// Shakes hands over `tcp`, has the peer's evidence appraised if somebody appraises, and ends the connection.
    pub async fn look(&self, tcp: TcpStream, server_name: Option<&str>) -> Observation {
        let (seen, watching) = (Recorder::default(), Arc::new(Watching::default()));
        let work = self.run(tcp, server_name, &seen, &watching);
        let outcome = tokio::time::timeout(self.timeout, work).await.unwrap_or(Err(ChannelError::HandshakeTimeout));
        let mut observation = std::mem::take(&mut *seen.lock());
        observation.wants_evidence = watching.asked.load(Ordering::Relaxed);
        observation.token = self.verifier.as_ref().and_then(|v| v.token());
        observation.failure = outcome.err();
        observation
    }

    async fn run(
        &self,
        tcp: TcpStream,
        server_name: Option<&str>,
        seen: &Recorder,
        watching: &Arc<Watching>,
    ) -> Result<(), ChannelError> {
        let name = match server_name {
            Some(name) => ServerName::try_from(name.to_owned()).map_err(setup)?,
            None => ServerName::from(tcp.peer_addr()?.ip()),
        };
        let own = match &self.attester {
            Some(attester) => Some(certificate::attested(&**attester, self.clock.now()).await?),
            None => None,
        };
        let mut config = config::client(config::provider(), &self.protocols).map_err(setup)?;
        config.client_auth_cert_resolver = watching.showing(own.as_ref());
        let mut stream: TlsStream<_> = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?.into();
        // As an endpoint does: a refusal must not look like a clean end.
        SockRef::from(stream.get_ref().0).set_linger(Some(Duration::ZERO))?;
        let negotiated = negotiated(&stream);
        let chosen = negotiated.alpn.as_deref().and_then(Alpn::from_wire);
        {
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let mut seen = seen.lock();
            seen.negotiated = Some(negotiated);
            seen.certificates = certificates.iter().take(MAX_CERTIFICATES).map(|c| c.to_vec()).collect();
        }
        match chosen.filter(|c| self.protocols.contains(c)).ok_or(ChannelError::Alpn)? {
            Alpn::Tng1 => self.exchange(&mut stream, own.as_ref(), seen, watching).await?,
            _ => {
                self.by_certificate(seen).await?;
                if watching.is_unanswered(own.as_ref()) && insists(&mut stream).await {
                    return Err(SessionError::Unattested.into());
                }
            }
        }
        SockRef::from(stream.get_ref().0).set_linger(None)?;
        // A peer that does not read must not hold this side.
        let _ = tokio::time::timeout(GOODBYE, stream.shutdown()).await;
        Ok(())
    }

    /// The exchange of `tng/1`.
    async fn exchange(
        &self,
        stream: &mut TlsStream<TcpStream>,
        own: Option<&Made>,
        seen: &Recorder,
        watching: &Watching,
    ) -> Result<(), ChannelError> {
        let (proven, places) = (Proven::new(1, VALIDITY), Semaphore::new(1));
        let prover = self.attester.as_ref().zip(own).map(|(attester, own)| Prover {
            attester: &**attester,
            spki: &own.spki,
            proven: &proven,
            places: &places,
        });
        let witness = Witness { prober: self, seen };
        let (exchange, never) = (Exchange::new(stream), std::pin::pin!(std::future::pending()));
        let Err(error) = exchange.run(prover, Some(&witness), None, never).await else { return Ok(()) };
        use ChannelError as E;
        let cut = matches!(error, E::Alert(_) | E::Closed | E::Io(_) | E::Tls(_) | E::Session(SessionError::Truncated));
        if cut && watching.is_unanswered(own) {
            // It ended the connection for want of a certificate, before any evidence: its own can still be appraised.
            self.by_certificate(seen).await?;
            return Err(SessionError::Unattested.into());
        }
        Err(error)
    }

    /// Appraises the evidence in the certificate, as RATS-TLS does.
    async fn by_certificate(&self, seen: &Recorder) -> Result<(), ChannelError> {
        let der = seen.lock().certificates.first().cloned().ok_or(PeerError::NoCertificate)?;
        let now = self.clock.now();
        let inspected = match self.model {
            Some(model) => peer::inspect(&der, model, now),
            None => match peer::inspect(&der, Model::BackgroundCheck, now) {
                Err(e) if e == crate::attest::EvidenceError::Passport.into() => {
                    peer::inspect(&der, Model::Passport, now)
                }
                other => other,
            },
        };
        let verdict = self.appraised(inspected?).await?;
        seen.lock().verdict = verdict;
        Ok(())
    }

    /// The verdict; `None` when nobody appraises.
    async fn appraised(&self, shown: PeerCertificate) -> Result<Option<Verdict>, ChannelError> {
        let Some(verifier) = &self.verifier else { return Ok(None) };
        Ok(Some(appraise(verifier.clone(), shown, self.clock.now(), Duration::ZERO).await?))
    }
}

fn negotiated(stream: &TlsStream<TcpStream>) -> Negotiated {
    let (_, session) = stream.get_ref();
    let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".into());
    Negotiated {
        version: text(session.protocol_version().map(|v| format!("{v:?}").replace('_', "."))),
        cipher_suite: text(session.negotiated_cipher_suite().map(|s| format!("{:?}", s.suite()))),
        group: text(session.negotiated_key_exchange_group().map(|g| format!("{:?}", g.name()))),
        alpn: session.alpn_protocol().map(<[u8]>::to_vec),
    }
}

/// Whether the peer ends a connection in which it got no certificate. One that does not waits for bytes.
async fn insists(stream: &mut TlsStream<TcpStream>) -> bool {
    let read = tokio::time::timeout(INSISTS_WITHIN, stream.read(&mut [0])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

#[derive(Default)]
struct Recorder(Mutex<Observation>);

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, Observation> {
        self.0.locked()
    }
}

/// Knows whether the peer asked for a certificate, which rustls tells nobody else.
#[derive(Debug, Default)]
struct Watching {
    asked: AtomicBool,
}

impl Watching {
    fn showing(self: &Arc<Self>, own: Option<&Made>) -> Arc<dyn ResolvesClientCert> {
        Arc::new(Resolver { own: own.map(|o| o.certified.clone()), watching: self.clone() })
    }

    fn is_unanswered(&self, own: Option<&Made>) -> bool {
        own.is_none() && self.asked.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Resolver {
    own: Option<Arc<CertifiedKey>>,
    watching: Arc<Watching>,
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.watching.asked.store(true, Ordering::Relaxed);
        self.own.clone()
    }
    fn has_certs(&self) -> bool {
        self.own.is_some()
    }
}

/// The asking side of an exchange that keeps what it hears.
struct Witness<'a> {
    prober: &'a Prober,
    seen: &'a Recorder,
}

#[async_trait]
impl Asker for Witness<'_> {
    async fn turn(&self, _key: [u8; 32]) -> Result<Turn, ChannelError> {
        Ok(Turn::Alone)
    }

    async fn appraise(&self, shown: PeerCertificate) -> Result<Verdict, ChannelError> {
        let verdict = self.prober.appraised(shown).await?;
        self.seen.lock().verdict = verdict.clone();
        // Where nobody appraises, the exchange goes on to its end, so that all of it is seen.
        Ok(verdict.unwrap_or_default())
    }

    fn keep(&self, _session: Arc<BoundSession>) {}

    fn witness(&self, evidence: &[u8], expected: &RuntimeData) {
        self.seen.lock().session = Some(SessionEvidence { extension: evidence.to_vec(), expected: expected.clone() });
    }

    fn model(&self) -> Model {
        self.prober.model.unwrap_or_else(|| {
            let shown = self.seen.lock().session.as_ref().map(|s| Credential::from_extension(&s.extension));
            if matches!(shown, Some(Ok(Credential::Token(_)))) { Model::Passport } else { Model::BackgroundCheck }
        })
    }

    fn now(&self) -> SystemTime {
        self.prober.clock.now()
    }
}
