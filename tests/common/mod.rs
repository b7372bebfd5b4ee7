//! What the data plane's tests share: a channel of plain mutual-less TLS in the place of the attested
//! one, services to connect to, and configurations.
#![allow(dead_code, unused_imports)]

mod outcome;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tng::config::*;
use tng::daemon::{BoundListener, DataPlane};
use tng::relay::TunnelSide;
use tng::tls::{Alpn, Channel, ChannelError, Peer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls;
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use outcome::*;

/// Plain TLS 1.3 with one self-signed certificate.
pub struct PlainTls {
    server: TlsAcceptor,
    client: TlsConnector,
    /// What `status` says.
    pub status: std::sync::Mutex<serde_json::Value>,
}

impl PlainTls {
    pub fn new(alpn: &[&str]) -> Arc<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let made = rcgen::generate_simple_self_signed(vec!["tng.test".to_owned()]).expect("certificate");
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("key");
        let cert = made.cert.der().clone();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(cert.clone()).expect("root");
        let protocols: Vec<Vec<u8>> = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
        let mut server = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_no_client_auth()
            .with_single_cert(vec![cert], key)
            .expect("server");
        server.alpn_protocols = vec![b"rats-tls".to_vec(), b"h2".to_vec()];
        let mut client = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = protocols;
        Arc::new(Self { server: Arc::new(server).into(), client: Arc::new(client).into(), status: Default::default() })
    }

    pub async fn take(&self, tcp: TcpStream) -> std::io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
        self.server.accept(tcp).await
    }

    pub async fn dial(&self, tcp: TcpStream) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        self.client.connect("tng.test".try_into().expect("name"), tcp).await
    }
}

#[async_trait::async_trait]
impl TunnelSide for PlainTls {
    async fn connect(&self, tcp: TcpStream, _: Option<&str>) -> Result<Channel, ChannelError> {
        let stream = self.dial(tcp).await.map_err(|_| ChannelError::HandshakeTimeout)?;
        let alpn = if stream.get_ref().1.alpn_protocol() == Some(b"h2") { Alpn::H2 } else { Alpn::RatsTls };
        Ok(Channel { stream: stream.into(), peer: Peer::Unverified, alpn, standing: None })
    }

    async fn accept(&self, tcp: TcpStream) -> Result<Channel, ChannelError> {
        let stream = self.server.accept(tcp).await.map_err(|_| ChannelError::HandshakeTimeout)?;
        let alpn = if stream.get_ref().1.alpn_protocol() == Some(b"h2") { Alpn::H2 } else { Alpn::RatsTls };
        Ok(Channel { stream: stream.into(), peer: Peer::Unverified, alpn, standing: None })
    }

    fn status(&self) -> serde_json::Value {
        self.status.lock().expect("status").clone()
    }
}

pub const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

pub fn limits() -> Limits {
    Limits {
        max_connections: 4096,
        handshake_timeout: Duration::from_secs(5),
        connect_timeout: Duration::from_secs(2),
        idle_timeout: Duration::from_secs(600),
        ..Limits::default()
    }
}

/// A mapping endpoint and its listener on a port that the kernel chose.
pub fn mapping(name: &str, side: Side, target: SocketAddr, limits: Limits) -> (Endpoint, BoundListener) {
    let listener = std::net::TcpListener::bind((LOCALHOST, 0)).expect("bind");
    let local = listener.local_addr().expect("address");
    let name = EndpointName::new(name).expect("name");
    let endpoint = Endpoint {
        name: name.clone(),
        side,
        mode: Mode::Mapping(Mapping {
            listen_addr: local.ip(),
            listen_ports: PortRange::single(local.port()),
            target_host: TargetHost::Addr(target.ip()),
            target_ports: PortRange::single(target.port()),
            so_mark: if side == Side::Ingress { DEFAULT_INGRESS_MARK } else { DEFAULT_EGRESS_MARK },
        }),
        ra: Ra::default(),
        limits,
    };
    (endpoint, BoundListener { endpoint: name, local, listener })
}

pub fn config(endpoints: Vec<Endpoint>) -> Config {
    Config {
        instance: InstanceName::new("test").expect("name"),
        source: PathBuf::from("test.toml"),
        on_stop: OnStop::Open,
        drain_timeout: Duration::from_secs(5),
        control_listen: None,
        endpoints,
    }
}

pub fn start(tls: &Arc<PlainTls>, endpoints: Vec<Endpoint>, listeners: Vec<BoundListener>) -> Arc<DataPlane> {
    let tls = tls.clone();
    DataPlane::start_with(&config(endpoints), listeners, Box::new(move |_| Ok(tls.clone() as Arc<dyn TunnelSide>)))
        .expect("data plane")
}

/// Both ends of a tunnel to one service.
pub struct Pair {
    pub tls: Arc<PlainTls>,
    pub ingress: Arc<DataPlane>,
    pub egress: Arc<DataPlane>,
    pub entry: SocketAddr,
    pub tunnel: SocketAddr,
}

impl Pair {
    pub fn to(service: SocketAddr) -> Self {
        Self::with(service, limits(), limits())
    }

    pub fn with(service: SocketAddr, ingress: Limits, egress: Limits) -> Self {
        let tls = PlainTls::new(&["rats-tls"]);
        let (out, out_listener) = mapping("out", Side::Egress, service, egress);
        let tunnel = out_listener.local;
        let (inn, in_listener) = mapping("in", Side::Ingress, tunnel, ingress);
        let entry = in_listener.local;
        Self {
            ingress: start(&tls, vec![inn], vec![in_listener]),
            egress: start(&tls, vec![out], vec![out_listener]),
            tls,
            entry,
            tunnel,
        }
    }

    pub async fn client(&self) -> TcpStream {
        TcpStream::connect(self.entry).await.expect("connect")
    }
}

pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((LOCALHOST, 0)).await.expect("bind");
    let addr = listener.local_addr().expect("address");
    (listener, addr)
}

/// A service that sends back what it gets.
pub async fn echo() -> SocketAddr {
    let (listener, addr) = listen().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let mut reader = tokio::io::BufReader::with_capacity(1024, &mut reader);
                let _ = tokio::io::copy_buf(&mut reader, &mut writer).await;
                let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
            });
        }
    });
    addr
}

/// An address where nothing listens.
pub async fn closed_port() -> SocketAddr {
    listen().await.1
}

/// Waits until `condition` holds, at most ten seconds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The value of one metric line, 0 when there is none.
pub fn metric(plane: &DataPlane, line_start: &str) -> u64 {
    let text = plane.metrics().encode().expect("metrics");
    text.lines().find_map(|l| l.strip_prefix(line_start)).and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

/// How many connections of `plane` ended with `reason`.
pub fn ended(plane: &DataPlane, reason: &str) -> u64 {
    let text = plane.metrics().encode().expect("metrics");
    text.lines()
        .filter(|l| l.starts_with("tng_connections_total{") && l.contains(&format!("reason=\"{reason}\"")))
        .filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}
