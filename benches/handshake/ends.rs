//! Two ends that meet.

use std::sync::Arc;
use std::time::Duration;

use rustls::HandshakeKind;
use tng::config::{AsKind, AsService, Attest, AttestProvider, Ra, TrustedSigners, Verify, VerifyProvider};
use tng::os::clock::SystemClock;
use tng::tls::{Channel, EndpointTls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::common::{attest, config, ra, verify_sample};
use crate::fakes::aa::{FakeAa, Mode as Agent};
use crate::service::Service;
use crate::ways::{Counters, Way};
use crate::{Outcome, fakes};

/// Name that clients ask for.
pub const SERVER_NAME: &str = "server.bench.test";
/// Longer than any run: a verdict that ended would make a cold handshake of a cached one.
const VERDICT_TTL: Duration = Duration::from_secs(12 * 3600);
/// The same of evidence: a newer certificate would have to be appraised.
const REFRESH_INTERVAL: Duration = VERDICT_TTL;
/// Evidence of TDX with its event log, and of SEV-SNP with its certificates, has about this size, bytes.
const LARGE: usize = 16 * 1024;
/// A handshake that takes longer is stuck.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(30);

/// A client and a server.
pub enum Ends {
    /// rustls alone.
    Plain {
        /// The client.
        client: TlsConnector,
        /// The server.
        server: TlsAcceptor,
    },
    /// Endpoints of tng; both attest and both verify.
    Attested {
        /// The client.
        client: Arc<EndpointTls>,
        /// The server.
        server: Arc<EndpointTls>,
        /// Where their evidence comes from, if not from within.
        _agent: Option<(FakeAa, tempfile::TempDir)>,
    },
}

/// One end of a connection that came about.
enum Open {
    Plain(TlsStream<TcpStream>),
    Attested(Channel),
}

impl Open {
    fn stream(&mut self) -> &mut TlsStream<TcpStream> {
        match self {
            Self::Plain(stream) => stream,
            Self::Attested(channel) => &mut channel.stream,
        }
    }
}

/// What came about.
pub struct Met {
    /// In a resumed TLS session.
    pub resumed: bool,
    /// Cipher suite and group of the key exchange.
    pub primitives: String,
}

impl Ends {
    /// Endpoints of tng for one of the attested ways.
    pub fn attested(way: Way, service: &Service) -> Outcome<Self> {
        let verify = Verify {
            provider: VerifyProvider::As(AsService {
                kind: Some(AsKind::Rest),
                trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
                ..AsService::at(service.url.clone())
            }),
            verdict_ttl: if way.is_cold() { Duration::ZERO } else { VERDICT_TTL },
            ..verify_sample(true)
        };
        let end = |role: Ra| {
            let (endpoint, clock) = (config(role, HANDSHAKE_WITHIN), Arc::new(SystemClock));
            match way {
                Way::ColdCertificate | Way::Cached | Way::CachedLarge => EndpointTls::rats_tls_only(&endpoint, clock),
                Way::Confirmed => EndpointTls::without_resumption(&endpoint, clock),
                _ => EndpointTls::with_clock(&endpoint, clock),
            }
        };
        let agent = match way {
            Way::CachedLarge => {
                let dir = tempfile::tempdir()?;
                Some((FakeAa::start(&dir.path().join("aa.sock"), Agent::Padded(LARGE)), dir))
            }
            _ => None,
        };
        let sample = attest(REFRESH_INTERVAL);
        let provider = agent.as_ref().map(|(agent, _)| AttestProvider::Aa { socket: agent.socket.clone() });
        let attest = Attest { provider: provider.unwrap_or(sample.provider.clone()), ..sample };
        let role = ra(Some(attest), Some(verify));
        Ok(Self::Attested { client: end(role.clone())?, server: end(role)?, _agent: agent })
    }

    /// What the ends counted, client and server; nothing of plain ones.
    pub fn counters(&self) -> Vec<Counters> {
        match self {
            Self::Plain { .. } => Vec::new(),
            Self::Attested { client, server, .. } => {
                [client, server].into_iter().map(|end| Counters::of(&end.status())).collect()
            }
        }
    }

    async fn connect(&self, tcp: TcpStream) -> Outcome<Open> {
        Ok(match self {
            Self::Plain { client, .. } => Open::Plain(client.connect(SERVER_NAME.try_into()?, tcp).await?.into()),
            Self::Attested { client, .. } => Open::Attested(client.connect(tcp, Some(SERVER_NAME)).await?),
        })
    }

    async fn accept(&self, tcp: TcpStream) -> Outcome<Open> {
        Ok(match self {
            Self::Plain { server, .. } => Open::Plain(server.accept(tcp).await?.into()),
            Self::Attested { server, .. } => Open::Attested(server.accept(tcp).await?),
        })
    }

    /// A connection from its first byte to its end. It has come about when each side has a byte from the other: until
    /// then a client does not know whether it was refused, and has not seen the server's tickets.
    pub async fn meet(&self, client: TcpStream, server: TcpStream) -> Outcome<Met> {
        let near = async {
            let mut open = self.connect(client).await?;
            let stream = open.stream();
            stream.write_all(b"?").await?;
            stream.flush().await?;
            stream.read_u8().await?;
            Outcome::Ok(open)
        };
        let far = async {
            let mut open = self.accept(server).await?;
            let stream = open.stream();
            stream.read_u8().await?;
            stream.write_all(b"!").await?;
            stream.flush().await?;
            Outcome::Ok(open)
        };
        let (mut near, _far) = tokio::try_join!(near, far)?;
        let (_, session) = near.stream().get_ref();
        let suite = session.negotiated_cipher_suite().ok_or("no cipher suite")?.suite();
        let group = session.negotiated_key_exchange_group().ok_or("no key exchange")?.name();
        Ok(Met {
            resumed: session.handshake_kind() == Some(HandshakeKind::Resumed),
            primitives: format!("{suite:?}, {group:?}"),
        })
    }
}
