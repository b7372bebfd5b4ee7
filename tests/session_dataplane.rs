//! `tng/1` seen from the service behind an egress, and in status, connections and metrics.

mod common;
#[path = "common/raw.rs"]
mod raw;

use std::net::SocketAddr;
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
    let (mut endpoint, listener) = mapping("model", side, target, limits());
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
