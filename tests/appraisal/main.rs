//! Appraisal by an attestation service: both protocols, dialects, several addresses, and whom its tokens may be from.

#[path = "../common/tls.rs"]
mod common;
#[path = "../fakes/mod.rs"]
mod fakes;

mod anchors;
mod failover;
mod protocols;
mod tokens;

use std::sync::Arc;
use std::time::Duration;

use fakes::as_rest::{FakeAs, Mode, Serves};
use tng::attest::{AsVerifier, Attester, Evidence, RuntimeData, SampleAttester, Verdict, Verifier, VerifyError};
use tng::config::*;
use tng::os::clock::{Clock, SystemClock};

const AFFIRMING: Mode = Mode::Status("affirming");

/// Waits until a service that was dropped has let go of its port.
async fn free(addr: std::net::SocketAddr) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while std::net::TcpListener::bind(addr).is_err() {
        assert!(std::time::Instant::now() < end, "the port is not free");
        tokio::task::yield_now().await;
    }
}

async fn start(mode: Mode, serves: Serves) -> FakeAs {
    FakeAs::start_as("127.0.0.1:0", mode, serves, None).await
}

/// The service at these addresses, its tokens signed by the authority of the samples.
fn at(addrs: &[&FakeAs]) -> AsService {
    AsService {
        addrs: addrs.iter().map(|service| service.url()).collect(),
        trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
        timeout: Duration::from_secs(3),
        ..AsService::at(addrs[0].url())
    }
}

fn verifier_with(service: &AsService, clock: Arc<dyn Clock>) -> AsVerifier {
    let verify = Verify { provider: VerifyProvider::As(service.clone()), ..common::verify_sample(true) };
    AsVerifier::new(&verify, service, DEFAULT_INGRESS_MARK, clock).unwrap()
}

fn verifier(service: &AsService) -> AsVerifier {
    verifier_with(service, Arc::new(SystemClock))
}

/// Honest evidence and what it is bound to.
async fn evidence() -> (Evidence, RuntimeData) {
    let bound = RuntimeData::for_key(b"a key");
    (SampleAttester.evidence(&bound).await.unwrap(), bound)
}

/// What the service makes of honest evidence.
async fn ask(verifier: &AsVerifier) -> Result<Verdict, VerifyError> {
    let (evidence, bound) = evidence().await;
    verifier.appraise(&evidence, &bound).await
}

async fn appraise(service: &AsService) -> Result<Verdict, VerifyError> {
    ask(&verifier(service)).await
}

async fn reason(service: &AsService) -> &'static str {
    appraise(service).await.map_or_else(|e| e.reason(), |_| "ok")
}
