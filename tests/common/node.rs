//! Endpoints that verify each other over an attestation service, each in a data plane of its own, to be reloaded.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tng::config::*;
use tng::daemon::{BoundListener, ConnectionView, DataPlane, DataPlaneError};
use tng::os::clock::SystemClock;
use tng::relay::TunnelSide;
use tng::tls::EndpointTls;
use tokio::net::TcpStream;

use crate::common::{alive, config, echo, limits, mapping};
use crate::fakes::as_rest::FakeAs;
use crate::fakes::fixture;

/// Longer than any test: only a reload makes anybody look again.
const TTL: Duration = Duration::from_secs(3600);

/// What the peers speak.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Speaks {
    RatsTls,
    Tng1,
}

pub const BOTH: [Speaks; 2] = [Speaks::RatsTls, Speaks::Tng1];

pub fn service_at(service: &FakeAs) -> AsService {
    AsService {
        trusted: TrustedSigners::certs(vec![fixture("as-ca.pem")]),
        timeout: Duration::from_secs(2),
        ..AsService::at(service.url())
    }
}

pub fn attest() -> Attest {
    Attest {
        provider: AttestProvider::Sample,
        refresh_interval: Duration::from_secs(600),
        additional_evidence: false,
        passport: None,
    }
}

pub fn attests() -> Ra {
    Ra { attest: Some(attest()), ..Ra::default() }
}

/// Shows a token of `service`.
pub fn with_passport(service: &FakeAs) -> Ra {
    let passport = Some(Passport { service: service_at(service), policy_ids: vec!["default".into()] });
    Ra { attest: Some(Attest { passport, ..attest() }), ..Ra::default() }
}

pub fn verify(provider: VerifyProvider, policy: &str) -> Verify {
    let policy_ids = vec![policy.into()];
    Verify { provider, policy_ids, allow_sample: true, verdict_ttl: TTL, model: Model::BackgroundCheck, rego: None }
}

/// Demands that `service` affirms the peer under `policy`.
pub fn demands(service: &FakeAs, policy: &str) -> Ra {
    Ra { verify: Some(verify(VerifyProvider::As(service_at(service)), policy)), ..Ra::default() }
}

/// Demands a token by one of `trusted`.
pub fn demands_token(trusted: TrustedSigners) -> Ra {
    let verify = Verify { model: Model::Passport, ..verify(VerifyProvider::Anchors(trusted), "default") };
    Ra { verify: Some(verify), ..Ra::default() }
}

/// One endpoint in a data plane of its own.
pub struct Node {
    pub plane: Arc<DataPlane>,
    pub endpoint: Endpoint,
    pub at: SocketAddr,
}

impl Node {
    pub fn start(side: Side, target: SocketAddr, ra: Ra, speaks: Speaks) -> Self {
        let name = if side == Side::Ingress { "in" } else { "out" };
        let (mut endpoint, listener) = mapping(name, side, target, limits());
        endpoint.ra = ra;
        let at = listener.local;
        let plane = DataPlane::start_with(
            &config(vec![endpoint.clone()]),
            vec![listener],
            Box::new(move |endpoint| {
                let tls = match speaks {
                    Speaks::Tng1 => EndpointTls::new(endpoint),
                    Speaks::RatsTls => EndpointTls::rats_tls_only(endpoint, Arc::new(SystemClock)),
                };
                tls.map(|tls| tls as Arc<dyn TunnelSide>)
            }),
        );
        Self { plane: plane.expect("data plane"), endpoint, at }
    }

    pub fn listeners(&self) -> Vec<BoundListener> {
        self.plane.listeners().expect("duplicates")
    }

    pub fn try_reload(&self, ra: Ra) -> Result<(), DataPlaneError> {
        self.plane.reload(&config(vec![Endpoint { ra, ..self.endpoint.clone() }]), self.listeners())
    }

    pub fn reload(&self, ra: Ra) {
        self.try_reload(ra).expect("reload");
    }

    pub fn connections(&self) -> Vec<ConnectionView> {
        self.plane.connections().connections
    }

    pub fn event(&self, event: &str) -> u64 {
        let text = self.plane.metrics_text().expect("metrics");
        let (name, side) = (&self.endpoint.name, self.endpoint.side);
        let line = format!("tng_attestation_events_total{{endpoint=\"{name}\",side=\"{side}\",event=\"{event}\"}} ");
        let value = text.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_else(|| panic!("{line} in {text}"));
        value.parse().expect("a number")
    }
}

/// An ingress and an egress, one of which verifies the other.
pub struct Tunnel {
    pub ingress: Node,
    pub egress: Node,
    pub verifier: Side,
}

impl Tunnel {
    pub async fn new(verifier: Side, ra: Ra, peer: Ra, speaks: Speaks) -> Self {
        let (inner, outer) = if verifier == Side::Ingress { (ra, peer) } else { (peer, ra) };
        let egress = Node::start(Side::Egress, echo().await, outer, speaks);
        let ingress = Node::start(Side::Ingress, egress.at, inner, speaks);
        Self { ingress, egress, verifier }
    }

    /// The side that verifies.
    pub fn verifier(&self) -> &Node {
        if self.verifier == Side::Ingress { &self.ingress } else { &self.egress }
    }

    pub async fn open(&self) -> TcpStream {
        open(self.ingress.at).await
    }
}

pub async fn open(at: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(at).await.expect("connect");
    assert!(alive(&mut stream).await, "a new connection was cut");
    stream
}
