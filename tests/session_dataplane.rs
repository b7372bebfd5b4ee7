//! `tng/1` seen from the service behind an egress, from who is refused, and in status, connections and metrics.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use raw::{Keys, Raw, message};
use tng::config::*;
use tng::daemon::DataPlane;
use tng::tls::session::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const TNG1: &[&str] = &["tng/1"];
const REQUEST: &[u8] = b"GET /secret HTTP/1.1\r\n\r\n";

fn attest() -> Attest {
    Attest {
        provider: AttestProvider::Sample,
        refresh_interval: Duration::from_secs(600),
        additional_evidence: false,
        passport: None,
    }
}

fn verify() -> Verify {
    Verify {
        provider: VerifyProvider::Sample,
        policy_ids: vec!["default".into()],
        allow_sample: true,
        verdict_ttl: Duration::from_secs(300),
        model: Model::BackgroundCheck,
        rego: None,
    }
}

fn plane(side: Side, target: SocketAddr, ra: Ra) -> (Arc<DataPlane>, SocketAddr) {
    plane_within(side, target, ra, limits())
}

/// It listens on the loopback address of the target's family.
fn plane_within(side: Side, target: SocketAddr, ra: Ra, limits: Limits) -> (Arc<DataPlane>, SocketAddr) {
    let (mut endpoint, mut listener) = mapping("model", side, target, limits);
    if target.is_ipv6() {
        listener.listener = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).expect("bind");
        listener.local = listener.listener.local_addr().expect("address");
        let Mode::Mapping(mapping) = &mut endpoint.mode else { panic!("a mapping") };
        mapping.listen_addr = listener.local.ip();
        mapping.listen_ports = PortRange::single(listener.local.port());
    }
    endpoint.ra = ra;
    let at = listener.local;
    (DataPlane::start(&config(vec![endpoint]), vec![listener]).expect("data plane"), at)
}

/// An egress that verifies its clients, in front of a service that this test is.
struct Behind {
    service: TcpListener,
    egress: Arc<DataPlane>,
    tunnel: SocketAddr,
}

impl Behind {
    async fn new() -> Self {
        let (service, addr) = listen().await;
        let (egress, tunnel) = plane(Side::Egress, addr, Ra { verify: Some(verify()), ..Ra::default() });
        Self { service, egress, tunnel }
    }

    async fn client(&self) -> Raw {
        let tcp = TcpStream::connect(self.tunnel).await.expect("connect");
        Keys::new().await.connect(tcp, TNG1).await.expect("handshake")
    }

    /// The egress has refused for `reason`, and nobody has come to the service.
    async fn refused_unseen(&self, reason: &str) {
        eventually(reason, || ended(&self.egress, reason) == 1).await;
        let nobody = tokio::time::timeout(Duration::from_millis(1), self.service.accept()).await;
        assert!(nobody.is_err(), "the service was connected to");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_an_appraised_client_reach_the_service_and_only_then() {
    let behind = Behind::new().await;
    let mut client = behind.client().await;
    client.say(Message::Pass).await;
    let (nonce, _) = client.asked().await;
    let evidence = message(&client.evidence(&nonce).await);
    client.say(evidence).await;
    // Sent without waiting for ACCEPT; it is the exchange that lets them through, not their time.
    client.bytes(REQUEST).await;
    let (mut served, _) = behind.service.accept().await.expect("accept");
    let mut seen = vec![0; REQUEST.len()];
    served.read_exact(&mut seen).await.expect("read");
    assert_eq!((client.hear().await, &seen[..]), (Message::Accept, REQUEST));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn application_bytes_before_the_exchange_do_not_reach_the_service() {
    let behind = Behind::new().await;
    let mut client = behind.client().await;
    client.bytes(REQUEST).await;
    assert_eq!(client.refusal().await.as_deref(), Some("session-version"));
    behind.refused_unseen("session-version").await;

    // Instead of the evidence.
    let behind = Behind::new().await;
    let mut client = behind.client().await;
    client.say(Message::Pass).await;
    client.asked().await;
    client.bytes(REQUEST).await;
    behind.refused_unseen("session-version").await;

    // Right behind evidence that is refused.
    let behind = Behind::new().await;
    let mut client = behind.client().await;
    client.say(Message::Pass).await;
    client.asked().await;
    let old = message(&client.evidence(&[0; 32]).await).encode();
    client.bytes(&[&old, REQUEST].concat()).await;
    behind.refused_unseen("session-nonce").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_connections_and_metrics_say_what_the_evidence_was_bound_to() {
    let (egress, tunnel) = plane(Side::Egress, echo().await, Ra { attest: Some(attest()), ..Ra::default() });
    let strict = Ra { verify: Some(verify()), require_session_binding: true, ..Ra::default() };
    let (ingress, entry) = plane(Side::Ingress, tunnel, strict);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut client = TcpStream::connect(entry).await.expect("connect");
        client.write_all(b"hello").await.expect("write");
        client.read_exact(&mut [0; 5]).await.expect("echo");
        open.push(client);
    }
    let view = ingress.endpoint_views().remove(0);
    assert_eq!(view.verdicts[0].binding, "session");
    let counts = ["session_bound", "session_resumed", "certificate_bound"].map(|f| view.attestation[f].as_u64());
    assert_eq!(counts, [Some(1), Some(1), Some(0)]);
    assert_eq!(view.attestation["require_session_binding"], true);
    for plane in [&ingress, &egress] {
        let shown = plane.connections().connections;
        assert_eq!(shown.iter().map(|c| c.binding.as_str()).collect::<Vec<_>>(), ["session", "session"]);
    }
    ingress.metrics().attestation("model", Side::Ingress, &view.attestation);
    for (event, count) in [("session-bound", 1), ("session-resumed", 1), ("certificate-bound", 0)] {
        let line = format!("tng_attestation_events_total{{endpoint=\"model\",side=\"ingress\",event=\"{event}\"}}");
        assert_eq!(metric(&ingress, &line), count, "{event}");
    }
}

/// In TLS 1.3 a client is done before the server has looked at its certificate: the refusal comes as an alert in the
/// middle of the connection.
#[tokio::test]
async fn a_peer_that_demands_evidence_of_a_side_that_has_none_is_named_for_it() {
    let demands = Ra { verify: Some(verify()), ..Ra::default() };
    let (egress, tunnel) = plane(Side::Egress, echo().await, demands);
    let (ingress, entry) = plane(Side::Ingress, tunnel, Ra::default());
    expect_refusal(entry).await;
    eventually("both records", || ended(&ingress, "tls-alert") == 1 && ended(&egress, "peer-no-certificate") == 1)
        .await;
    let refusal = ingress.endpoint_views()[0].last_refusal.clone().expect("refusal");
    assert!(
        refusal.detail.contains("CertificateRequired") && refusal.detail.contains("no attest table"),
        "{refusal:?}"
    );
    assert_eq!(ended(&ingress, "tunnel-corrupt"), 0);
}

const FAMILIES: [IpAddr; 2] = [LOCALHOST, IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn attests() -> Ra {
    Ra { attest: Some(attest()), ..Ra::default() }
}

fn verifies() -> Ra {
    Ra { verify: Some(verify()), ..Ra::default() }
}

fn mutual() -> Ra {
    Ra { attest: Some(attest()), verify: Some(verify()), ..Ra::default() }
}

/// An address where nothing listens.
async fn closed_at(ip: IpAddr) -> SocketAddr {
    TcpListener::bind((ip, 0)).await.expect("bind").local_addr().expect("address")
}

/// A service that answers no SYN: its queue is full, and nobody accepts.
struct Silent {
    _listener: socket2::Socket,
    _queued: Vec<socket2::Socket>,
    at: SocketAddr,
}

impl Silent {
    fn at(ip: IpAddr) -> Self {
        let socket = || socket2::Socket::new(socket2::Domain::for_address((ip, 0).into()), socket2::Type::STREAM, None);
        let listener = socket().expect("socket");
        listener.bind(&SocketAddr::new(ip, 0).into()).expect("bind");
        listener.listen(0).expect("listen");
        let at = listener.local_addr().expect("address").as_socket().expect("an address");
        let queued: Vec<_> = (0..4).map(|_| socket().expect("socket")).collect();
        for one in &queued {
            one.set_nonblocking(true).expect("nonblocking");
            let _ = one.connect(&at.into());
        }
        Self { _listener: listener, _queued: queued, at }
    }
}

/// The ingress knows of one refusal, and shows what the peer said of it.
async fn told(ingress: &DataPlane, slug: &str) {
    eventually(slug, || ended(ingress, "session-refused") == 1).await;
    let view = ingress.endpoint_views().remove(0);
    let last = view.last_refusal.expect("a refusal");
    assert!(last.reason == "session-refused" && last.detail.ends_with(&format!(": {slug}")), "{last:?}");
    assert!(last.detail.starts_with("the peer "), "{last:?}");
    assert_eq!((view.refused["session-refused"], view.refusals.len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_appraised_peer_is_told_that_the_service_cannot_be_reached() {
    for ip in FAMILIES {
        for (ingress_is, egress_is) in [(attests(), verifies()), (mutual(), mutual())] {
            let (egress, tunnel) = plane(Side::Egress, closed_at(ip).await, egress_is.clone());
            let (ingress, entry) = plane(Side::Ingress, tunnel, ingress_is.clone());
            expect_refusal(entry).await;
            told(&ingress, "target-refused").await;
            eventually("its record", || ended(&egress, "target-refused") == 1).await;

            let silent = Silent::at(ip);
            let slow = Limits { connect_timeout: Duration::from_millis(500), ..limits() };
            let (egress, tunnel) = plane_within(Side::Egress, silent.at, egress_is, slow);
            let (ingress, entry) = plane(Side::Ingress, tunnel, ingress_is);
            expect_refusal(entry).await;
            told(&ingress, "target-timeout").await;
            eventually("its record", || ended(&egress, "target-timeout") == 1).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_appraised_peer_is_told_that_there_is_no_room_for_it() {
    for ip in FAMILIES {
        let service = TcpListener::bind((ip, 0)).await.expect("bind");
        let narrow = Limits { max_connections: 1, handshake_timeout: Duration::from_secs(3), ..limits() };
        let at = service.local_addr().expect("address");
        let (egress, tunnel) = plane_within(Side::Egress, at, mutual(), narrow);
        let (ingress, entry) = plane(Side::Ingress, tunnel, mutual());
        let first = TcpStream::connect(entry).await.expect("connect");
        let (kept, _) = service.accept().await.expect("accept");
        expect_refusal(entry).await;
        told(&ingress, "too-many-connections").await;
        eventually("its record", || ended(&egress, "too-many-connections") == 1).await;
        // The control: with the place free, the next one is served.
        drop((first, kept));
        eventually("the place is free", || egress.open_connections() == 0).await;
        let _next = TcpStream::connect(entry).await.expect("connect");
        service.accept().await.expect("accept");
    }
}

/// In a resumed TLS session there is no message, so a server that could not reach the service resumes none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_tickets_is_told_why_from_the_second_connection_on() {
    let service = TcpListener::bind((LOCALHOST, 0)).await.expect("bind");
    let at = service.local_addr().expect("address");
    let (egress, tunnel) = plane(Side::Egress, at, mutual());
    let (ingress, entry) = plane(Side::Ingress, tunnel, mutual());
    let resumed = || egress.endpoint_views()[0].attestation["session_resumed"].as_u64();
    // Bytes come through when the exchange is over, and the tickets count from then on.
    let serve = async |service: &TcpListener| {
        let mut client = TcpStream::connect(entry).await.expect("connect");
        let (mut served, _) = service.accept().await.expect("accept");
        served.write_all(b"x").await.expect("write");
        client.read_exact(&mut [0]).await.expect("read");
    };
    for _ in 0..2 {
        serve(&service).await;
    }
    eventually("both have ended", || egress.open_connections() + ingress.open_connections() == 0).await;
    assert_eq!(resumed(), Some(1));
    drop(service);
    let refused = async |count| eventually("its record", || ended(&egress, "target-refused") == count).await;
    expect_refusal(entry).await;
    refused(1).await;
    assert_eq!((resumed(), ended(&ingress, "session-refused")), (Some(2), 0), "nobody could be told");
    expect_refusal(entry).await;
    told(&ingress, "target-refused").await;
    refused(2).await;
    assert_eq!(resumed(), Some(2));
    // It is back: one connection shows that, the next one has tickets again, and the third shows one.
    let service = TcpListener::bind(at).await.expect("bind");
    for _ in 0..3 {
        serve(&service).await;
    }
    assert_eq!(resumed(), Some(3));
}

/// The server's last message goes before the client's: what comes later would be taken for the service's bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_nobody_appraises_hears_nothing_of_the_service() {
    let (egress, tunnel) = plane(Side::Egress, closed_port().await, attests());
    let (ingress, entry) = plane(Side::Ingress, tunnel, verifies());
    expect_refusal(entry).await;
    eventually("the end", || ended(&ingress, "peer-reset") + ended(&ingress, "tunnel-truncated") == 1).await;
    assert_eq!((ended(&egress, "target-refused"), ended(&ingress, "session-refused")), (1, 0));

    // Nor one whose evidence is refused, whatever is wrong behind.
    let narrow = Limits { max_connections: 1, ..limits() };
    let (_egress, tunnel) = plane_within(Side::Egress, closed_port().await, verifies(), narrow);
    let keys = Keys::new().await;
    let mut client = keys.connect(TcpStream::connect(tunnel).await.expect("connect"), TNG1).await.expect("handshake");
    client.say(Message::Pass).await;
    client.asked().await;
    let old = message(&client.evidence(&[0; 32]).await);
    client.say(old).await;
    assert_eq!(client.refusal().await.as_deref(), Some("session-nonce"));
}

/// The peer is let in when its patience ends, as the service may still answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_slower_than_the_handshake_is_waited_for() {
    let silent = Silent::at(LOCALHOST);
    let slow =
        Limits { handshake_timeout: Duration::from_secs(2), connect_timeout: Duration::from_secs(4), ..limits() };
    let (egress, tunnel) = plane_within(Side::Egress, silent.at, mutual(), slow);
    let (ingress, entry) = plane(Side::Ingress, tunnel, mutual());
    let started = std::time::Instant::now();
    expect_refusal(entry).await;
    assert!(started.elapsed() >= Duration::from_secs(4), "{:?}", started.elapsed());
    eventually("the end", || ended(&egress, "target-timeout") == 1).await;
    assert_eq!((ended(&ingress, "session-refused"), ended(&ingress, "handshake-timeout")), (0, 0));
}

/// A client of the egress in the middle of the exchange: it was asked, and has not answered.
async fn asked(tunnel: SocketAddr) -> Raw {
    let tcp = TcpStream::connect(tunnel).await.expect("connect");
    let mut client = Keys::new().await.connect(tcp, TNG1).await.expect("handshake");
    client.say(Message::Pass).await;
    client.asked().await;
    client
}

/// A client that has all of the server's messages, and does not say what it makes of them.
async fn answered(tunnel: SocketAddr) -> Raw {
    let tcp = TcpStream::connect(tunnel).await.expect("connect");
    let mut client = Keys::new().await.connect(tcp, TNG1).await.expect("handshake");
    client.say(Message::Ask { nonce: [7; 32], resume: None }).await;
    assert!(matches!(client.hear().await, Message::Evidence(_)));
    assert_eq!(client.hear().await, Message::Pass);
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_and_a_deadline_are_told_as_long_as_a_message_is_awaited() {
    for ip in FAMILIES {
        let quick = Limits { handshake_timeout: Duration::from_secs(2), ..limits() };
        let at = closed_at(ip).await;
        let (egress, tunnel) = plane_within(Side::Egress, at, verifies(), quick.clone());
        assert_eq!(asked(tunnel).await.refusal().await.as_deref(), Some("handshake-timeout"));
        eventually("its record", || ended(&egress, "handshake-timeout") == 1).await;
        // A client that would take the message for the service's bytes gets a reset alone.
        let (egress, tunnel) = plane_within(Side::Egress, at, attests(), quick);
        let mut client = answered(tunnel).await;
        client.stream.read_exact(&mut [0]).await.expect_err("a byte");
        eventually("its record", || ended(&egress, "handshake-timeout") == 1).await;

        let (egress, tunnel) = plane(Side::Egress, at, verifies());
        let mut client = asked(tunnel).await;
        egress.drain(Duration::from_secs(5)).await;
        assert_eq!(client.refusal().await.as_deref(), Some("draining"));
        assert_eq!(ended(&egress, "draining"), 1);
        let (egress, tunnel) = plane(Side::Egress, at, attests());
        let mut client = answered(tunnel).await;
        egress.drain(Duration::from_secs(5)).await;
        client.stream.read_exact(&mut [0]).await.expect_err("a byte");
        assert_eq!(ended(&egress, "draining"), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ingress_whose_deadline_passes_tells_the_server_that_it_has_asked() {
    let quick = Limits { handshake_timeout: Duration::from_secs(1), ..limits() };
    for (ra, heard) in [(verifies(), Some("handshake-timeout")), (attests(), None)] {
        let (listener, at) = listen().await;
        let (ingress, entry) = plane_within(Side::Ingress, at, ra, quick.clone());
        let _client = TcpStream::connect(entry).await.expect("connect");
        let (tcp, _) = listener.accept().await.expect("accept");
        let mut server = Keys::new().await.accept(tcp, TNG1).await.expect("handshake");
        // Behind PASS a message of the client's might go to a service.
        assert_eq!(server.refusal().await.as_deref(), heard);
        eventually("its record", || ended(&ingress, "handshake-timeout") == 1).await;
    }
}
