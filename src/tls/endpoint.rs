//! TLS and attestation of one endpoint.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::bind::{self, BindingCounts, BoundRenewal, Proving};
use super::certificate::fingerprint;
use super::identity::{Fixed, IdentityStore};
use super::peer::PeerCertificate;
use super::session::{BoundSession, SessionError, Sessions};
use super::standing::{Renew, Standing, Standings};
use super::status::{AttestStatus, FailureStatus, Ledger, TlsStatus, VerifyStatus, unix};
use super::{Alpn, Channel, ChannelError, Peer, PeerError, config, peer, providers};
use crate::attest::{CacheKey, Clock, Credential, SystemClock, Verdict, VerdictCache, Verifier, VerifyError};
use crate::config::{Endpoint, Model, Verify};

/// Verdicts kept by one endpoint.
const CACHE_CAPACITY: usize = 1024;
/// Peers of open connections that are appraised again at once.
const MAX_RENEWALS: usize = 16;

/// TLS and attestation of one endpoint: made once, shared by all its connections.
pub struct EndpointTls {
    identity: IdentityStore,
    proving: Option<Proving>,
    /// `background_check` or `passport`.
    shows: &'static str,
    appraisal: Option<Arc<Appraisal>>,
    standings: Standings,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    handshake_timeout: Duration,
    clock: Arc<dyn Clock>,
    ledger: Ledger,
    require_session_binding: bool,
    counts: BindingCounts,
}

/// What this side demands of the peer.
pub(super) struct Appraisal {
    pub(super) verifier: Arc<dyn Verifier>,
    /// Verdicts on certificates, as RATS-TLS shows them.
    cache: VerdictCache,
    /// Sessions bound by `tng/1`.
    pub(super) sessions: Sessions,
    policy: [u8; 32],
    policy_ids: Vec<String>,
    pub(super) model: Model,
    allow_sample: bool,
    pub(super) verdict_ttl: Duration,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) deadline: Duration,
    pub(super) renewals: Semaphore,
}

/// A new verdict on `shown`. Zero `ttl` is for verdicts that are not reused: only token and certificate end them.
pub(super) async fn appraise(
    verifier: Arc<dyn Verifier>,
    shown: PeerCertificate,
    now: SystemTime,
    ttl: Duration,
) -> Result<Verdict, VerifyError> {
    let mut verdict = match &shown.credential {
        Credential::Evidence(evidence) => verifier.appraise(evidence, &shown.expected).await?,
        Credential::Token(token) => verifier.check_token(token, &shown.expected).await?,
    };
    let by_ttl = if ttl.is_zero() { None } else { now.checked_add(ttl) };
    verdict.expires_at = verdict.expires_at.min(by_ttl.unwrap_or(shown.not_after)).min(shown.not_after);
    Ok(verdict)
}

#[async_trait]
impl Renew for Appraisal {
    async fn renew(&self, der: &[u8]) -> Result<Arc<Verdict>, ChannelError> {
        let work = async {
            let _place = self.renewals.acquire().await.map_err(|_| VerifyError::Internal)?;
            let now = self.clock.now();
            let shown = peer::inspect(der, self.model, now)?;
            Ok(Arc::new(appraise(self.verifier.clone(), shown, now, self.verdict_ttl).await?))
        };
        let outcome = tokio::time::timeout(self.deadline, work).await.unwrap_or(Err(ChannelError::HandshakeTimeout));
        match &outcome {
            Ok(verdict) if !self.verdict_ttl.is_zero() => self.cache.put(self.key(der), verdict.clone()),
            Err(error) if error.is_about_peer() => self.cache.forget(&self.key(der)),
            _ => {}
        }
        outcome
    }
}

pub(super) fn setup(e: impl std::fmt::Display) -> ChannelError {
    ChannelError::Setup(e.to_string())
}

impl EndpointTls {
    /// Builds the configurations and starts the background refresh of evidence.
    /// Never fails for a service that is down: connections are refused with a reason until it answers.
    /// To be called inside a tokio runtime.
    pub fn new(endpoint: &Endpoint) -> Result<Arc<Self>, ChannelError> {
        Self::with_clock(endpoint, Arc::new(SystemClock))
    }

    /// The same, with the time taken from `clock`.
    pub fn with_clock(endpoint: &Endpoint, clock: Arc<dyn Clock>) -> Result<Arc<Self>, ChannelError> {
        Self::speaking(endpoint, clock, &bind::protocols(&endpoint.ra))
    }

    /// The same for an endpoint that speaks RATS-TLS alone, as one of TNG 2.8 does.
    pub fn rats_tls_only(endpoint: &Endpoint, clock: Arc<dyn Clock>) -> Result<Arc<Self>, ChannelError> {
        Self::speaking(endpoint, clock, &(vec![Alpn::RatsTls], vec![Alpn::RatsTls, Alpn::H2]))
    }

    fn speaking(
        endpoint: &Endpoint,
        clock: Arc<dyn Clock>,
        (as_client, as_server): &(Vec<Alpn>, Vec<Alpn>),
    ) -> Result<Arc<Self>, ChannelError> {
        let timeout = endpoint.limits.handshake_timeout;
        let attester = match &endpoint.ra.attest {
            Some(attest) => Some((providers::attester(endpoint, attest, clock.clone())?, attest.refresh_interval)),
            None => None,
        };
        let identity = match &attester {
            Some((attester, interval)) => IdentityStore::attested(attester.clone(), *interval, clock.clone()),
            None => IdentityStore::plain(&*clock)?,
        };
        let appraisal = endpoint.ra.verify.as_ref().map(|v| Appraisal::new(endpoint, v, clock.clone())).transpose()?;
        let provider = config::provider();
        let client = config::client(provider.clone(), as_client).map_err(setup)?;
        let server =
            config::server(provider, identity.server_resolver(), appraisal.is_some(), as_server).map_err(setup)?;
        Ok(Arc::new(Self {
            identity,
            proving: attester.map(|(a, _)| Proving::new(a)),
            shows: if endpoint.ra.attest.as_ref().is_some_and(|a| a.passport.is_some()) {
                "passport"
            } else {
                "background_check"
            },
            appraisal: appraisal.map(Arc::new),
            standings: Standings::default(),
            client: Arc::new(client),
            server: Arc::new(server),
            handshake_timeout: timeout,
            clock,
            ledger: Ledger::default(),
            require_session_binding: endpoint.ra.require_session_binding,
            counts: BindingCounts::default(),
        }))
    }

    /// Client side: handshake over `tcp`, appraise the peer, all within the handshake deadline.
    /// `server_name`: the target's name, shown in SNI; `None` or an address: no SNI.
    pub async fn connect(&self, tcp: TcpStream, server_name: Option<&str>) -> Result<Channel, ChannelError> {
        let peer = tcp.peer_addr().ok();
        let work = async {
            let name = match server_name {
                Some(name) => ServerName::try_from(name.to_owned()).map_err(setup)?,
                // Never sent: rustls shows names alone.
                None => ServerName::from(tcp.peer_addr()?.ip()),
            };
            let shown = self.identity.ready().await?;
            let config = match &shown {
                None => self.client.clone(),
                Some(identity) => {
                    let mut own = ClientConfig::clone(&self.client);
                    own.client_auth_cert_resolver = identity.clone();
                    Arc::new(own)
                }
            };
            let stream = TlsConnector::from(config).connect(name, tcp).await?;
            self.finish(stream.into(), shown).await
        };
        self.conclude(peer, tokio::time::timeout(self.handshake_timeout, work).await)
    }

    /// Server side of the same.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Channel, ChannelError> {
        let peer = tcp.peer_addr().ok();
        let work = async {
            let shown = self.identity.ready().await?;
            let config = match &shown {
                None => self.server.clone(),
                Some(identity) => {
                    let mut own = ServerConfig::clone(&self.server);
                    own.cert_resolver = identity.clone();
                    Arc::new(own)
                }
            };
            let stream = TlsAcceptor::from(config).accept(tcp).await?;
            self.finish(stream.into(), shown).await
        };
        self.conclude(peer, tokio::time::timeout(self.handshake_timeout, work).await)
    }

    /// Everything between the handshake and the first application byte.
    async fn finish(
        &self,
        mut stream: TlsStream<TcpStream>,
        shown: Option<Arc<Fixed>>,
    ) -> Result<Channel, ChannelError> {
        // From here on whatever drops the stream (refusal, deadline, cancellation) resets the connection:
        // the peer, whose handshake is over, must not take a refusal for a clean end.
        SockRef::from(stream.get_ref().0).set_linger(Some(Duration::ZERO))?;
        let (_, session) = stream.get_ref();
        let alpn = session.alpn_protocol().and_then(Alpn::from_wire).ok_or(ChannelError::Alpn)?;
        let mut resumed = false;
        let standing = match (alpn, &self.appraisal) {
            (Alpn::Tng1, appraisal) => {
                let bound = bind::bind(&mut stream, self.proving.as_ref(), shown.as_deref(), appraisal.as_ref());
                let bound = bound.await?;
                resumed = bound.as_ref().is_some_and(|b| b.resumed);
                bound.zip(appraisal.as_ref()).map(|(bound, appraisal)| self.stands(appraisal, bound.session))
            }
            (_, None) => None,
            (_, Some(appraisal)) => {
                let der = session.peer_certificates().and_then(|c| c.first()).ok_or(PeerError::NoCertificate)?;
                Some(self.admit(appraisal, der).await?)
            }
        };
        let peer = standing.as_ref().map_or(Peer::Unverified, |s| Peer::Verified(s.verdict()));
        SockRef::from(stream.get_ref().0).set_linger(None)?;
        self.counts.count(alpn, self.proving.is_none() && self.appraisal.is_none(), resumed);
        Ok(Channel { stream, peer, alpn, standing })
    }

    fn conclude(
        &self,
        peer: Option<SocketAddr>,
        outcome: Result<Result<Channel, ChannelError>, tokio::time::error::Elapsed>,
    ) -> Result<Channel, ChannelError> {
        let outcome = match outcome.unwrap_or(Err(ChannelError::HandshakeTimeout)) {
            // It offered nothing but tng/1, so this is what the peer lacks.
            Err(ChannelError::Alpn) if self.require_session_binding => Err(SessionError::Required.into()),
            outcome => outcome,
        };
        match &outcome {
            Ok(channel) => {
                self.ledger.established(peer, channel.standing.as_ref().map(|s| s.current()));
            }
            Err(e) => self.ledger.refused(peer, self.clock.now(), e),
        }
        outcome
    }

    /// Appraises the peer that showed `der`; an affirmed one stays while its standing lasts.
    async fn admit(&self, appraisal: &Arc<Appraisal>, der: &[u8]) -> Result<Arc<Standing>, ChannelError> {
        // Also for a verdict from the cache: the certificate may have ended since.
        let shown = peer::inspect(der, appraisal.model, self.clock.now())?;
        let not_after = shown.not_after;
        let key = appraisal.key(der);
        let verdict = appraisal.of(key, shown).await?;
        let renew: Arc<dyn Renew> = appraisal.clone();
        Ok(self.standings.of(key.certificate, der, not_after, verdict, renew, self.clock.clone()))
    }

    /// The standing of a peer that was let in by the evidence of `session`.
    fn stands(&self, appraisal: &Arc<Appraisal>, session: Arc<BoundSession>) -> Arc<Standing> {
        let (not_after, verdict) = (session.shown.not_after, session.verdict.clone());
        let key = fingerprint(session.shown.expected.canonical().as_bytes());
        let renew = Arc::new(BoundRenewal { appraisal: appraisal.clone(), session });
        self.standings.of(key, &[], not_after, verdict, renew, self.clock.clone())
    }

    /// Forgets what was found about peers: a reload may have changed what it rests on.
    pub fn reloaded(&self) {
        if let Some(appraisal) = &self.appraisal {
            appraisal.cache.clear();
            appraisal.sessions.clear();
        }
    }

    /// For `tngctl status`.
    pub fn status(&self) -> TlsStatus {
        let resumed = self.counts.resumed.load(Ordering::Relaxed);
        let mut status = TlsStatus {
            attest: self.proving.as_ref().map(|p| self.attest_status(p.attester.provider())),
            verify: self.appraisal.as_ref().map(|a| a.status()),
            as_calls: self.appraisal.as_ref().map_or(0, |a| a.verifier.calls()),
            as_failovers: self.appraisal.as_ref().map_or(0, |a| a.verifier.failovers()),
            as_latency: self.appraisal.as_ref().and_then(|a| a.verifier.latency()),
            cache_hits: self.appraisal.as_ref().map_or(0, |a| a.cache.hits()) + resumed,
            aa_calls: self.proving.as_ref().map_or(0, |p| p.attester.calls()),
            aa_latency: self.proving.as_ref().and_then(|p| p.attester.latency()),
            token_latency: self.proving.as_ref().and_then(|p| p.attester.token_latency()),
            require_session_binding: self.require_session_binding,
            session_bound: self.counts.session.load(Ordering::Relaxed),
            session_resumed: resumed,
            certificate_bound: self.counts.certificate.load(Ordering::Relaxed),
            ..TlsStatus::default()
        };
        self.ledger.fill(&mut status);
        status
    }

    fn attest_status(&self, provider: &'static str) -> AttestStatus {
        let now = self.identity.condition();
        AttestStatus {
            provider,
            model: self.shows,
            state: if now.failure.is_none() && now.usable { "ok" } else { "failing" },
            usable: now.usable,
            reason: now.failure.as_ref().map(|e| e.reason()),
            error: now.failure.as_ref().map(ToString::to_string),
            evidence_age: now.age.map(|a| a.as_secs()),
            evidence_left: now.left.map(|l| l.as_secs()),
            token_age: now.token_issued.map(|at| self.clock.now().duration_since(at).unwrap_or_default().as_secs()),
            evidence_took_ms: now.took.map(|t| t.as_millis() as u64),
            certificate_expires: now.not_after.map(unix),
            last_failure: now.last.map(|f| FailureStatus {
                at: unix(f.at),
                reason: f.error.reason(),
                error: f.error.to_string(),
            }),
            failures: now.failures,
        }
    }
}

impl Appraisal {
    fn new(endpoint: &Endpoint, verify: &Verify, clock: Arc<dyn Clock>) -> Result<Self, ChannelError> {
        let verifier = providers::verifier(endpoint, verify, clock.clone())?;
        let policy =
            serde_json::json!([verifier.provider(), verify.policy_ids, verify.allow_sample, verify.model.to_string()]);
        Ok(Self {
            verifier,
            cache: VerdictCache::new(CACHE_CAPACITY, clock.clone()),
            sessions: Sessions::new(CACHE_CAPACITY),
            policy: fingerprint(policy.to_string().as_bytes()),
            policy_ids: verify.policy_ids.clone(),
            model: verify.model,
            allow_sample: verify.allow_sample,
            verdict_ttl: verify.verdict_ttl,
            clock,
            deadline: endpoint.limits.handshake_timeout,
            renewals: Semaphore::new(MAX_RENEWALS),
        })
    }

    fn key(&self, der: &[u8]) -> CacheKey {
        CacheKey { certificate: fingerprint(der), policy: self.policy }
    }

    /// The verdict on the certificate behind `key`, or why there is none.
    async fn of(&self, key: CacheKey, shown: PeerCertificate) -> Result<Arc<Verdict>, ChannelError> {
        let appraise = appraise(self.verifier.clone(), shown, self.clock.now(), self.verdict_ttl);
        if self.verdict_ttl.is_zero() {
            return Ok(Arc::new(appraise.await?));
        }
        Ok(self.cache.get(key, || appraise).await?)
    }

    fn status(&self) -> VerifyStatus {
        VerifyStatus {
            provider: self.verifier.provider(),
            model: self.model.to_string(),
            policy_ids: self.policy_ids.clone(),
            trust_anchor: self.verifier.trust_anchor(),
            allow_sample: self.allow_sample,
            services: self.verifier.services(),
            collateral: self.verifier.collateral(),
        }
    }
}
