//! Endpoints for tests, and two of them meeting over loopback TCP.
#![allow(dead_code)]

use std::sync::Arc;
use std::time::Duration;

use tng::config::*;
use tng::tls::{Channel, ChannelError, EndpointTls};
use tokio::net::{TcpListener, TcpStream};

/// Sample evidence, renewed every ten minutes.
pub fn attest_sample() -> Attest {
    attest(Duration::from_secs(600))
}

/// Sample evidence with this refresh interval.
pub fn attest(refresh_interval: Duration) -> Attest {
    Attest { provider: AttestProvider::Sample, refresh_interval, additional_evidence: false, passport: None }
}

/// The embedded verifier.
pub fn verify_sample(allow_sample: bool) -> Verify {
    Verify {
        provider: VerifyProvider::Sample,
        policy_ids: vec!["default".into()],
        allow_sample,
        verdict_ttl: Duration::from_secs(300),
        model: Model::BackgroundCheck,
        rego: None,
    }
}

/// Roles of one side.
pub fn ra(attest: Option<Attest>, verify: Option<Verify>) -> Ra {
    Ra { attest, verify, ..Ra::default() }
}

/// Attests and verifies.
pub fn mutual() -> Ra {
    ra(Some(attest_sample()), Some(verify_sample(true)))
}

/// Verifies alone, as most clients do.
pub fn client_side() -> Ra {
    ra(None, Some(verify_sample(true)))
}

/// Attests alone, as most servers do.
pub fn server_side() -> Ra {
    ra(Some(attest_sample()), None)
}

/// An endpoint with these roles and a handshake deadline of five seconds.
pub fn endpoint(ra: Ra) -> Arc<EndpointTls> {
    endpoint_within(ra, Duration::from_secs(5))
}

/// An endpoint with these roles and this handshake deadline.
pub fn endpoint_within(ra: Ra, handshake_timeout: Duration) -> Arc<EndpointTls> {
    EndpointTls::new(&config(ra, handshake_timeout)).unwrap()
}

/// An endpoint with these roles that speaks RATS-TLS alone.
pub fn rats_tls(ra: Ra) -> Arc<EndpointTls> {
    EndpointTls::rats_tls_only(&config(ra, Duration::from_secs(5)), Arc::new(tng::os::clock::SystemClock)).unwrap()
}

/// These roles, with peers that cannot bind their evidence to the session refused.
pub fn requiring(ra: Ra) -> Ra {
    Ra { require_session_binding: true, ..ra }
}

/// The configuration of such an endpoint.
pub fn config(ra: Ra, handshake_timeout: Duration) -> Endpoint {
    let any = "127.0.0.1".parse().unwrap();
    Endpoint {
        name: EndpointName::new("test").unwrap(),
        side: Side::Ingress,
        mode: Mode::Mapping(Mapping {
            listen_addr: any,
            listen_ports: PortRange::single(1),
            target_host: TargetHost::Addr(any),
            target_ports: PortRange::single(1),
            so_mark: DEFAULT_INGRESS_MARK,
        }),
        ra,
        limits: Limits { handshake_timeout, ..Limits::default() },
    }
}

/// Both ends of a loopback TCP connection: who connected, who accepted.
pub async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (c, s) = tokio::join!(connect, listener.accept());
    let (c, s) = (c.unwrap(), s.unwrap().0);
    // As the data plane's sockets are.
    c.set_nodelay(true).unwrap();
    s.set_nodelay(true).unwrap();
    (c, s)
}

/// What each side made of the other.
pub type Outcome = (Result<Channel, ChannelError>, Result<Channel, ChannelError>);

/// Lets a client and a server meet.
pub async fn meet(client: &EndpointTls, server: &EndpointTls) -> Outcome {
    let (c, s) = pair().await;
    tokio::join!(client.connect(c, Some("example.test")), server.accept(s))
}

/// The same for fresh endpoints.
pub async fn meet_ra(client: Ra, server: Ra) -> Outcome {
    meet(&endpoint(client), &endpoint(server)).await
}
