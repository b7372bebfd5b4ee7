//! Probes: a TLS client that tries a peer's server end, and a TLS server that a peer's client end is sent to.
//!
//! They see what the wire hides: whether certificates are asked for, shown and verified, and whether a session that
//! could be resumed is.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ServerSessionMemoryCache;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, Error, HandshakeKind, ProtocolVersion,
    ServerConfig, ServerConnection, SignatureScheme, Stream,
};

use crate::Outcome;
use crate::certs::{Identity, SERVER_NAME};
use crate::load;
use crate::peers::Peer;
use crate::sink::{Kind, MARKER, OPENING, expected, opening};

/// How long a peer may take to answer a probe.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// What a client saw of a server end.
#[derive(Debug, Default)]
pub struct ServerSeen {
    /// Version, when the handshake came that far.
    pub version: Option<ProtocolVersion>,
    /// Full or resumed.
    pub kind: Option<HandshakeKind>,
    /// It asked for the client's certificate. (Not said of a resumed handshake, in which nobody asks.)
    pub asked: bool,
    /// It let payload through to the service and back.
    pub echoed: bool,
}

/// A client that can be used again and again, with tickets kept: what could be resumed would be.
pub struct Client {
    config: Arc<ClientConfig>,
    asked: Arc<AtomicBool>,
}

impl Client {
    /// With that identity, or without any.
    pub fn new(peer: Peer, identity: Option<&Identity>) -> Outcome<Self> {
        let provider = provider();
        let key = match identity {
            Some(identity) => {
                let (chain, key) = identity.rustls()?;
                Some(Arc::new(CertifiedKey::new(chain, provider.key_provider.load_private_key(key)?)))
            }
            None => None,
        };
        let asked = Arc::new(AtomicBool::new(false));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyPeer))
            .with_client_cert_resolver(Arc::new(Asked { key, asked: asked.clone() }));
        config.alpn_protocols = peer.alpn();
        config.resumption = Resumption::in_memory_sessions(16);
        Ok(Self { config: Arc::new(config), asked })
    }

    /// One connection to a server end: handshake, then an echo through it. A refusal is an answer, not an error.
    pub fn probe(&self, addr: SocketAddr) -> Outcome<ServerSeen> {
        self.asked.store(false, Ordering::SeqCst);
        let mut tcp = TcpStream::connect(addr)?;
        tcp.set_read_timeout(Some(ANSWER_WITHIN))?;
        tcp.set_write_timeout(Some(ANSWER_WITHIN))?;
        let mut tls = ClientConnection::new(self.config.clone(), ServerName::try_from(SERVER_NAME)?)?;
        let echoed = echo(&mut Stream::new(&mut tls, &mut tcp)).is_ok();
        if echoed {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut tcp);
        }
        Ok(ServerSeen {
            version: tls.protocol_version(),
            kind: tls.handshake_kind(),
            asked: self.asked.load(Ordering::SeqCst) || tls.handshake_kind() == Some(HandshakeKind::Resumed),
            echoed,
        })
    }
}

fn echo(stream: &mut (impl Read + Write)) -> std::io::Result<()> {
    const LENGTH: usize = 64;
    stream.write_all(&opening(Kind::Echo, 0))?;
    stream.write_all(expected(0, LENGTH))?;
    stream.flush()?;
    let mut back = [0; LENGTH];
    stream.read_exact(&mut back)?;
    if back == *expected(0, LENGTH) { Ok(()) } else { Err(std::io::Error::other("wrong echo")) }
}

/// What a server saw of a client end.
#[derive(Debug, Default)]
pub struct ClientSeen {
    /// The handshake was finished, the client's signature with its key included.
    pub finished: bool,
    /// It showed a certificate.
    pub certificate: bool,
    /// Full or resumed.
    pub kind: Option<HandshakeKind>,
    /// It sent payload.
    pub payload: bool,
}

/// A TLS server that asks for a certificate, takes any, and would resume sessions.
pub struct Server {
    addr: SocketAddr,
    seen: Receiver<ClientSeen>,
    stop: Arc<AtomicBool>,
}

impl Server {
    /// Starts it with that identity.
    pub fn start(peer: Peer, identity: &Identity) -> Outcome<Self> {
        let (chain, key) = identity.rustls()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(AnyPeer))
            .with_single_cert(chain, key)?;
        config.alpn_protocols = peer.alpn();
        config.session_storage = ServerSessionMemoryCache::new(64);
        let config = Arc::new(config);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let (sender, seen) = channel();
        std::thread::spawn(move || {
            for tcp in listener.incoming().map_while(Result::ok) {
                if told.load(Ordering::SeqCst) {
                    break;
                }
                let (config, sender) = (config.clone(), sender.clone());
                // A connection that fails before TLS begins shows nothing, and so is not reported.
                std::thread::spawn(move || serve(tcp, config).map(|seen| sender.send(seen)));
            }
        });
        Ok(Self { addr, seen, stop })
    }

    /// Where it listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Sends `count` connections, one after the other, through the client end at `addr`, each until it is closed;
    /// returns what arrived here, at least as many. The connection that found the end listening may be among them.
    pub fn probe(&self, addr: SocketAddr, count: usize) -> Outcome<Vec<ClientSeen>> {
        let mut all = Vec::new();
        for _ in 0..count {
            // An error says that the end has already closed: it refuses what it is connected to. That is an answer too.
            let _ = load::echo_once(addr, 64);
            all.push(self.seen.recv_timeout(ANSWER_WITHIN).map_err(|_| "the client end does not connect")?);
        }
        all.extend(self.seen.try_iter());
        Ok(all)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that waits in accept.
        let _ = TcpStream::connect(self.addr);
    }
}

fn serve(mut tcp: TcpStream, config: Arc<ServerConfig>) -> Outcome<ClientSeen> {
    tcp.set_read_timeout(Some(ANSWER_WITHIN))?;
    tcp.set_write_timeout(Some(ANSWER_WITHIN))?;
    let mut tls = ServerConnection::new(config)?;
    let mut received = [0; OPENING];
    let read = Stream::new(&mut tls, &mut tcp).read_exact(&mut received);
    Ok(ClientSeen {
        finished: !tls.is_handshaking(),
        certificate: tls.peer_certificates().is_some_and(|chain| !chain.is_empty()),
        kind: tls.handshake_kind(),
        payload: read.is_ok() && received.starts_with(MARKER),
    })
}

/// Notes that a certificate was asked for, and shows ours if there is one.
#[derive(Debug)]
struct Asked {
    key: Option<Arc<CertifiedKey>>,
    asked: Arc<AtomicBool>,
}

impl ResolvesClientCert for Asked {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::SeqCst);
        self.key.clone()
    }
    fn has_certs(&self) -> bool {
        // Also without one: rustls must ask the resolver for the request to be noted.
        true
    }
}

/// Takes any certificate, but insists that the peer signs with its key. The probes look; they decide nothing.
#[derive(Debug)]
struct AnyPeer;

impl AnyPeer {
    fn check(
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }
}

fn never_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("only TLS 1.3 is offered".to_owned()))
}

impl ServerCertVerifier for AnyPeer {
    fn verify_server_cert(
        &self,
        _cert: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        never_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for AnyPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _cert: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }
    fn client_auth_mandatory(&self) -> bool {
        // A client that shows none is to be seen, not to be turned away.
        false
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        never_tls12()
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
