//! Open connections when their peer's verdict ends: appraised again, and kept or closed.

mod common;
mod fakes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use common::*;
use fakes::as_rest::{FakeAs, Mode as As};
use rcgen::{CertificateParams, CustomExtension, KeyPair, PublicKeyData};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tng::attest::{Attester, EVIDENCE_OID, RuntimeData, SampleAttester};
use tng::config::*;
use tng::daemon::{BoundListener, DataPlane};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const AFFIRMING: As = As::Status("affirming");
const REFUSING: As = As::Status("contraindicated");
const TTL: Duration = Duration::from_secs(2);

fn attest() -> Attest {
    Attest {
        provider: AttestProvider::Sample,
        refresh_interval: Duration::from_secs(600),
        additional_evidence: false,
        passport: None,
    }
}

fn verify(service: &FakeAs, verdict_ttl: Duration) -> Verify {
    Verify {
        provider: VerifyProvider::As(AsService {
            trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
            timeout: Duration::from_secs(2),
            ..AsService::at(service.url())
        }),
        policy_ids: vec!["default".into()],
        allow_sample: true,
        verdict_ttl,
        model: tng::config::Model::BackgroundCheck,
        rego: None,
    }
}

fn plane(name: &str, side: Side, target: SocketAddr, ra: Ra) -> (Arc<DataPlane>, SocketAddr) {
    let (mut endpoint, listener) = mapping(name, side, target, limits());
    endpoint.ra = ra;
    let at = listener.local;
    (serve(endpoint, listener), at)
}

fn serve(endpoint: Endpoint, listener: BoundListener) -> Arc<DataPlane> {
    DataPlane::start(&config(vec![endpoint]), vec![listener]).expect("data plane")
}

/// An ingress that verifies an egress in front of an echo.
struct Tunnel {
    service: FakeAs,
    ingress: Arc<DataPlane>,
    entry: SocketAddr,
    _egress: Arc<DataPlane>,
}

impl Tunnel {
    async fn with(verdict_ttl: Duration) -> Self {
        let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
        let (egress, tunnel) = plane("out", Side::Egress, echo().await, Ra { attest: Some(attest()), ..Ra::default() });
        let verify = Some(verify(&service, verdict_ttl));
        let (ingress, entry) = plane("in", Side::Ingress, tunnel, Ra { verify, ..Ra::default() });
        Self { service, ingress, entry, _egress: egress }
    }

    async fn open(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.entry).await.expect("connect");
        assert!(alive(&mut stream).await);
        stream
    }

    fn verdict_expires(&self) -> u64 {
        self.ingress.endpoint_views()[0].verdicts[0].expires_at
    }
}

/// Lets every server in: what these tests look at is the other direction.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// The client of an HTTP/2 tunnel, with evidence.
async fn attested_h2(at: SocketAddr) -> TlsStream<TcpStream> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("key");
    let data = RuntimeData::for_key(&key.subject_public_key_info());
    let evidence = SampleAttester.evidence(&data).await.expect("evidence").to_extension();
    let mut params = CertificateParams::default();
    params.not_before = SystemTime::now().into();
    params.not_after = (SystemTime::now() + Duration::from_secs(3600)).into();
    params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, evidence)];
    let der = params.self_signed(&key).expect("certificate").der().clone();
    let mut client = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_auth_cert(vec![der], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .expect("client");
    client.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(at).await.expect("connect");
    let name = ServerName::try_from("tng.test").expect("name");
    TlsConnector::from(Arc::new(client)).connect(name, tcp).await.expect("tls")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_survive_their_verdicts_while_the_service_affirms() {
    let tunnel = Tunnel::with(TTL).await;
    let mut open = Vec::new();
    for _ in 0..20 {
        open.push(tunnel.open().await);
    }
    let first = tunnel.verdict_expires();
    let begun = Instant::now();
    while begun.elapsed() < TTL * 3 + TTL / 2 {
        for stream in &mut open {
            assert!(alive(stream).await, "cut after {:?}", begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(tunnel.verdict_expires() >= first + 5, "the list of verdicts follows");
    let listed = tunnel.ingress.connections();
    assert!(listed.connections.iter().all(|c| c.verdict_expires >= Some(first + 5)), "{listed:?}");
    // One appraisal a period for all twenty.
    assert!((4..=8).contains(&tunnel.service.appraisals()), "{}", tunnel.service.appraisals());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_refused_later_loses_its_open_connections_with_the_reason() {
    let tunnel = Tunnel::with(TTL).await;
    let (mut first, mut second) = (tunnel.open().await, tunnel.open().await);
    tunnel.service.set(REFUSING);
    expect_reset(&mut first).await;
    expect_reset(&mut second).await;
    eventually("records", || ended(&tunnel.ingress, "token-status-contraindicated") == 2).await;
    // New ones are refused by the same answer, and let in again when the service changes its mind.
    expect_refusal(tunnel.entry).await;
    tunnel.service.set(AFFIRMING);
    tunnel.open().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_answer_the_connection_lasts_as_long_as_its_verdict() {
    let tunnel = Tunnel::with(TTL).await;
    let begun = Instant::now();
    let mut stream = tunnel.open().await;
    tunnel.service.set(As::Silent);
    expect_reset(&mut stream).await;
    assert!(begun.elapsed() >= TTL - Duration::from_millis(500), "{:?}", begun.elapsed());
    eventually("record", || ended(&tunnel.ingress, "verdict-expired") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_reuse_of_verdicts_is_no_end_of_connections() {
    let tunnel = Tunnel::with(Duration::ZERO).await;
    let (mut first, mut second) = (tunnel.open().await, tunnel.open().await);
    assert_eq!(tunnel.service.appraisals(), 2, "one each");
    assert!(alive(&mut first).await && alive(&mut second).await);
    // The token's own end, five minutes, still bounds them.
    let left = tunnel.verdict_expires() - std::time::UNIX_EPOCH.elapsed().expect("clock").as_secs();
    assert!((280..=300).contains(&left), "{left}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_streams_of_an_http2_tunnel_end_with_its_peer() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let ra = Ra { verify: Some(verify(&service, TTL)), ..Ra::default() };
    let (egress, at) = plane("out", Side::Egress, echo().await, ra);
    let (send, connection) = h2::client::handshake(attested_h2(at).await).await.expect("http/2");
    let carrier = tokio::spawn(connection);
    let mut send = send.ready().await.expect("ready");
    let mut streams = Vec::new();
    for _ in 0..2 {
        let request = http::Request::builder().method("CONNECT").uri("tng.internal:443").body(()).expect("request");
        let (response, body) = send.send_request(request, false).expect("request");
        streams.push((response.await.expect("response").into_body(), body));
    }
    eventually("the carrier's peer is appraised again, twice", || service.appraisals() >= 3).await;
    assert_eq!(egress.open_connections(), 3, "both streams and their carrier live on");
    service.set(REFUSING);
    for (body, _) in &mut streams {
        let end = timeout(Duration::from_secs(10), body.data()).await.expect("still open");
        assert!(end.expect("a clean end").is_err());
    }
    eventually("records", || ended(&egress, "token-status-contraindicated") == 3).await;
    let _ = timeout(Duration::from_secs(5), carrier).await.expect("the carrier is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_that_changes_nothing_keeps_connections_and_forgets_verdicts() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let (egress, target) = plane("out", Side::Egress, echo().await, Ra { attest: Some(attest()), ..Ra::default() });
    let (mut endpoint, listener) = mapping("in", Side::Ingress, target, limits());
    endpoint.ra = Ra { verify: Some(verify(&service, Duration::from_secs(300))), ..Ra::default() };
    let entry = listener.local;
    let ingress = serve(endpoint.clone(), listener);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(entry).await.expect("connect");
        assert!(alive(&mut stream).await);
        open.push(stream);
    }
    assert_eq!(service.appraisals(), 1);
    service.set(REFUSING);
    ingress.reload(&config(vec![endpoint]), ingress.listeners().expect("duplicates")).expect("reload");
    assert!(alive(&mut open[0]).await, "an open connection was cut");
    expect_refusal(entry).await;
    assert_eq!(service.appraisals(), 2, "the old verdict was used again");
    let metrics = egress.metrics_text().expect("metrics");
    for line in ["tng_evidence_age_seconds{endpoint=\"out\",side=\"egress\"} ", "event=\"evidence-failed\"} 0"] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}
