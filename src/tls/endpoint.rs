//! TLS and attestation of one endpoint.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use rustls::{ClientConfig, ServerConfig};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use super::appraisal::Appraisal;
use super::bind::{self, BindingCounts, LetIn, Origin, Proving};
use super::identity::{Fixed, IdentityStore};
use super::resumption::{AsClient, AsServer, Handshake, Ticketing, Tickets};
use super::rules::{Oversight, Rules, Settings};
use super::session::{Door, Ending, SessionError};
use super::snapshot::Snapshot;
use super::standing::{Standing, Standings};
use super::status::{AttestStatus, FailureStatus, Ledger, TlsStatus, unix};
use super::{Alpn, Channel, ChannelError, Peer, PeerError, config, providers};
use crate::attest::Appraised;
use crate::config::{Attest, Endpoint, Verify};
use crate::os::clock::{Clock, SystemClock};

/// TLS and attestation of one endpoint: made once, shared by all its connections.
pub struct EndpointTls {
    identity: IdentityStore,
    proving: Option<Proving>,
    /// `background_check` or `passport`.
    shows: &'static str,
    appraisal: Option<Arc<Appraisal>>,
    oversight: Oversight,
    /// Files that its own evidence depends on.
    attest_files: Snapshot,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    handshake_timeout: Duration,
    clock: Arc<dyn Clock>,
    ledger: Ledger,
    require_session_binding: bool,
    counts: BindingCounts,
    /// Absent when sessions are not bound, or not resumed.
    tickets: Option<Tickets>,
}

pub(super) fn setup(e: impl std::fmt::Display) -> ChannelError {
    ChannelError::Setup(e.to_string())
}

/// What `work` ends in, unless `ending` is first.
async fn unless<T>(ending: Ending<'_>, work: impl Future<Output = Result<T, ChannelError>>) -> Result<T, ChannelError> {
    tokio::select! {
        biased;
        made = work => made,
        error = ending => Err(error),
    }
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
        Self::speaking(endpoint, clock, &bind::protocols(&endpoint.ra), true)
    }

    /// The same for an endpoint that speaks RATS-TLS alone, as one of TNG 2.8 does.
    pub fn rats_tls_only(endpoint: &Endpoint, clock: Arc<dyn Clock>) -> Result<Arc<Self>, ChannelError> {
        Self::speaking(endpoint, clock, &(vec![Alpn::RatsTls], vec![Alpn::RatsTls, Alpn::H2]), false)
    }

    /// The same for an endpoint whose connections each take a handshake of their own: none is in a resumed TLS session.
    pub fn without_resumption(endpoint: &Endpoint, clock: Arc<dyn Clock>) -> Result<Arc<Self>, ChannelError> {
        Self::speaking(endpoint, clock, &bind::protocols(&endpoint.ra), false)
    }

    fn speaking(
        endpoint: &Endpoint,
        clock: Arc<dyn Clock>,
        (as_client, as_server): &(Vec<Alpn>, Vec<Alpn>),
        tickets: bool,
    ) -> Result<Arc<Self>, ChannelError> {
        let timeout = endpoint.limits.handshake_timeout;
        let attest_files = Snapshot::of(endpoint.ra.attest.as_ref().map(Attest::files).unwrap_or_default());
        let verify_files = Snapshot::of(endpoint.ra.verify.as_ref().map(Verify::files).unwrap_or_default());
        let attester = match &endpoint.ra.attest {
            Some(attest) => Some((providers::attester(endpoint, attest, clock.clone())?, attest.refresh_interval)),
            None => None,
        };
        let identity = match &attester {
            Some((attester, interval)) => IdentityStore::attested(attester.clone(), *interval, clock.clone()),
            None => IdentityStore::plain(&*clock)?,
        };
        let appraisal = endpoint.ra.verify.as_ref().map(|v| Appraisal::new(endpoint, v, clock.clone())).transpose()?;
        let appraisal = appraisal.map(Arc::new);
        let rules = Rules::new(appraisal.clone(), &endpoint.ra);
        let settings = Settings::new(&endpoint.ra, verify_files.confirmed());
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
            appraisal,
            oversight: Oversight::new(rules, settings, clock.clone()),
            attest_files: attest_files.confirmed(),
            client: Arc::new(client),
            server: Arc::new(server),
            handshake_timeout: timeout,
            clock,
            ledger: Ledger::default(),
            require_session_binding: endpoint.ra.require_session_binding,
            counts: BindingCounts::default(),
            tickets: (tickets && as_client.contains(&Alpn::Tng1)).then(Tickets::default),
        }))
    }

    /// Client side: handshake over `tcp`, appraise the peer, all within the handshake deadline.
    /// `server_name`: the target's name, shown in SNI; `None` or an address: no SNI.
    pub async fn connect(&self, tcp: TcpStream, server_name: Option<&str>) -> Result<Channel, ChannelError> {
        self.connect_until(tcp, server_name, pin!(self.deadline())).await
    }

    /// The same until `ending` says why it ends, in the place of the handshake deadline.
    pub async fn connect_until(
        &self,
        tcp: TcpStream,
        server_name: Option<&str>,
        mut ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        let peer = tcp.peer_addr().ok();
        let work = async {
            let name = match server_name {
                Some(name) => ServerName::try_from(name.to_owned()).map_err(setup)?,
                // Never sent: rustls shows names alone.
                None => ServerName::from(tcp.peer_addr()?.ip()),
            };
            let shown = self.identity.ready().await?;
            let (at, tickets) = (tcp.peer_addr()?, self.tickets.as_ref());
            let ticketing = tickets.map(|t| t.as_client(at, server_name, self.appraisal.as_ref()));
            let stream = TlsConnector::from(self.client_config(shown.as_ref(), ticketing.as_ref())).connect(name, tcp);
            let stream = stream.await.inspect_err(|_| {
                if let (Some(tickets), Some(own)) = (tickets, &ticketing) {
                    tickets.failed(own);
                }
            })?;
            Ok((stream.into(), shown, ticketing.map(Ticketing::Client)))
        };
        let made = unless(ending.as_mut(), work).await;
        let outcome = match made {
            Ok((stream, shown, ticketing)) => self.finish(stream, shown, ticketing, None, ending).await,
            Err(error) => Err(error),
        };
        self.conclude(peer, outcome)
    }

    /// Server side of the same.
    pub async fn accept(&self, tcp: TcpStream) -> Result<Channel, ChannelError> {
        self.accepting(tcp, None, pin!(self.deadline())).await
    }

    /// The same until `ending` says why it ends, in the place of the handshake deadline. A peer that is appraised is told
    /// as well what keeps `door` shut.
    pub async fn accept_until(
        &self,
        tcp: TcpStream,
        door: &dyn Door,
        ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        self.accepting(tcp, Some(door), ending).await
    }

    async fn accepting(
        &self,
        tcp: TcpStream,
        door: Option<&dyn Door>,
        mut ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        let peer = tcp.peer_addr().ok();
        let work = async {
            let shown = self.identity.ready().await?;
            let hello = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
            // Tickets are of use to a client of tng/1 alone.
            let bindable = hello.client_hello().alpn().is_some_and(|mut p| p.any(|p| p == Alpn::Tng1.as_wire()));
            // Who resumes a session cannot be told why it is not served.
            let tells = self.appraisal.is_some() && door.is_some_and(Door::is_shut);
            let bindable = bindable && !tells;
            let tickets = self.tickets.as_ref().filter(|_| bindable);
            let ticketing = tickets.map(|t| t.as_server(shown.as_ref(), self.appraisal.as_ref()));
            let stream = hello.into_stream_with(self.server_config(shown.as_ref(), ticketing.as_ref()), |connection| {
                if let Some(own) = &ticketing {
                    own.label(connection);
                }
            });
            Ok((stream.await?.into(), shown, ticketing.map(Ticketing::Server)))
        };
        let made = unless(ending.as_mut(), work).await;
        let outcome = match made {
            Ok((stream, shown, ticketing)) => self.finish(stream, shown, ticketing, door, ending).await,
            Err(error) => Err(error),
        };
        self.conclude(peer, outcome)
    }

    /// Ends a handshake that takes too long.
    async fn deadline(&self) -> ChannelError {
        tokio::time::sleep(self.handshake_timeout).await;
        ChannelError::HandshakeTimeout
    }

    fn client_config(&self, shown: Option<&Arc<Fixed>>, ticketing: Option<&AsClient>) -> Arc<ClientConfig> {
        if shown.is_none() && ticketing.is_none() {
            return self.client.clone();
        }
        let mut own = ClientConfig::clone(&self.client);
        if let Some(identity) = shown {
            own.client_auth_cert_resolver = identity.clone();
        }
        if let Some(tickets) = ticketing {
            own.resumption = tickets.store();
        }
        Arc::new(own)
    }

    fn server_config(&self, shown: Option<&Arc<Fixed>>, ticketing: Option<&AsServer>) -> Arc<ServerConfig> {
        if shown.is_none() && ticketing.is_none() {
            return self.server.clone();
        }
        let mut own = ServerConfig::clone(&self.server);
        if let Some(identity) = shown {
            own.cert_resolver = identity.clone();
        }
        if let Some(tickets) = ticketing {
            (own.session_storage, own.send_tls13_tickets) = tickets.store();
        }
        Arc::new(own)
    }

    /// Everything between the handshake and the first application byte.
    async fn finish(
        &self,
        mut stream: TlsStream<TcpStream>,
        shown: Option<Arc<Fixed>>,
        ticketing: Option<Ticketing>,
        door: Option<&dyn Door>,
        ending: Ending<'_>,
    ) -> Result<Channel, ChannelError> {
        // From here on whatever drops the stream (refusal, deadline, cancellation) resets the connection:
        // the peer, whose handshake is over, must not take a refusal for a clean end.
        SockRef::from(stream.get_ref().0).set_linger(Some(Duration::ZERO))?;
        let (_, session) = stream.get_ref();
        let alpn = session.alpn_protocol().and_then(Alpn::from_wire).ok_or(ChannelError::Alpn)?;
        let handshake = ticketing.as_ref().map_or(Ok(Handshake::Full), |own| own.handshake(&stream))?;
        let mut origin = Origin::Evidence;
        let standing = match (alpn, &self.appraisal) {
            (Alpn::Tng1, appraisal) => {
                let let_in = match handshake {
                    Handshake::Resumed(session) => LetIn::resumed(session),
                    Handshake::Full => {
                        let (proving, shown) = (self.proving.as_ref(), shown.as_deref());
                        bind::bind(&mut stream, proving, shown, appraisal.as_ref(), door, ending).await?
                    }
                };
                let_in.check(appraisal.as_ref())?;
                if let (Some(tickets), Some(own), true) = (&self.tickets, ticketing, let_in.is_bound()) {
                    tickets.keep(own, let_in.session.as_ref(), appraisal.as_ref());
                }
                origin = let_in.origin;
                let_in.session.filter(|_| appraisal.is_some()).map(|session| self.oversight.admit_session(session))
            }
            // The certificate of a resumed handshake says nothing of who is there, and only tng/1 gives tickets.
            _ if matches!(handshake, Handshake::Resumed(_)) => return Err(SessionError::Ticket.into()),
            (_, None) => None,
            (_, Some(appraisal)) => {
                let der = session.peer_certificates().and_then(|c| c.first()).ok_or(PeerError::NoCertificate)?;
                Some(unless(ending, self.admit(appraisal, der)).await?)
            }
        };
        let standing = standing.unwrap_or_else(|| self.oversight.admit_anybody(alpn));
        let peer = standing.verdict().map_or(Peer::Unverified, Peer::Verified);
        SockRef::from(stream.get_ref().0).set_linger(None)?;
        self.counts.count(alpn, self.proving.is_none() && self.appraisal.is_none(), origin);
        Ok(Channel { stream, peer, alpn, standing: Some(standing) })
    }

    fn conclude(
        &self,
        peer: Option<SocketAddr>,
        outcome: Result<Channel, ChannelError>,
    ) -> Result<Channel, ChannelError> {
        let outcome = match outcome {
            // It offered nothing but tng/1, so this is what the peer lacks.
            Err(ChannelError::Alpn) if self.require_session_binding => Err(SessionError::Required.into()),
            outcome => outcome,
        };
        match &outcome {
            Ok(channel) => {
                self.ledger.established(peer, channel.standing.as_ref().and_then(|s| s.current()));
            }
            Err(e) => self.ledger.refused(peer, self.clock.now(), e),
        }
        outcome
    }

    /// Appraises the peer that showed `der`; an affirmed one stays while its standing lasts.
    async fn admit(&self, appraisal: &Arc<Appraisal>, der: &[u8]) -> Result<Arc<Standing>, ChannelError> {
        let key = appraisal.key(der);
        let Appraised { verdict, not_after } = appraisal.of(key, der).await?;
        Ok(self.oversight.admit_certificate(key.certificate, der, not_after, verdict))
    }

    /// Peers with open connections.
    pub fn peers(&self) -> Standings {
        self.oversight.peers()
    }

    /// Judges `peers`, who were let in under the configuration before, by this one from now on.
    pub fn take_over(&self, peers: &Standings) {
        self.oversight.take_over(peers);
    }

    /// Whether a file that it was made from holds something else now.
    pub fn is_stale(&self) -> bool {
        self.oversight.is_stale() || !self.attest_files.is_current()
    }

    /// Forgets what was found about peers: a reload may have changed what it rests on.
    pub fn reloaded(&self) {
        if let Some(tickets) = &self.tickets {
            tickets.clear();
        }
        if let Some(appraisal) = &self.appraisal {
            appraisal.forget_all();
        }
    }

    /// For `tngctl status`.
    pub fn status(&self) -> TlsStatus {
        let [session, confirmed, resumed, certificate] = self.counts.read();
        let mut status = TlsStatus {
            attest: self.proving.as_ref().map(|p| self.attest_status(p.attester.provider())),
            verify: self.appraisal.as_ref().map(|a| a.status()),
            as_calls: self.appraisal.as_ref().map_or(0, |a| a.verifier.calls()),
            as_failovers: self.appraisal.as_ref().map_or(0, |a| a.verifier.failovers()),
            as_latency: self.appraisal.as_ref().and_then(|a| a.verifier.latency()),
            cache_hits: self.appraisal.as_ref().map_or(0, |a| a.hits() + confirmed + resumed),
            aa_calls: self.proving.as_ref().map_or(0, |p| p.attester.calls()),
            aa_latency: self.proving.as_ref().and_then(|p| p.attester.latency()),
            token_latency: self.proving.as_ref().and_then(|p| p.attester.token_latency()),
            require_session_binding: self.require_session_binding,
            session_bound: session,
            session_confirmed: confirmed,
            session_resumed: resumed,
            certificate_bound: certificate,
            ..TlsStatus::default()
        };
        self.ledger.fill(&mut status);
        self.oversight.fill(&mut status);
        status
    }

    fn attest_status(&self, provider: &'static str) -> AttestStatus {
        let now = self.identity.condition();
        // A failure says more: it leads to what is shown, or to nothing.
        let doubt = now.doubt.as_ref().filter(|_| now.failure.is_none() && now.usable);
        AttestStatus {
            provider,
            model: self.shows,
            state: match doubt {
                Some(_) => "degraded",
                None if now.failure.is_none() && now.usable => "ok",
                None => "failing",
            },
            usable: now.usable,
            reason: now.failure.as_ref().map(|e| e.reason()).or(doubt.map(|d| d.reason())),
            error: now.failure.as_ref().map(ToString::to_string).or(doubt.map(ToString::to_string)),
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
