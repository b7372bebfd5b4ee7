//! Agent and service: the good path, and each bad day with its reason.

#[path = "common/tls.rs"]
mod common;
mod fakes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{attest_sample, endpoint, endpoint_within, meet, ra, verify_sample};
use fakes::aa::{FakeAa, Mode as Aa};
use fakes::as_rest::{FakeAs, Mode as As};
use prost::Message;
use tng::config::*;
use tng::tls::{EndpointTls, Peer};

const AFFIRMING: As = As::Status("affirming");

fn attest_aa(socket: &std::path::Path) -> Attest {
    Attest { provider: AttestProvider::Aa { socket: socket.into() }, ..attest_sample() }
}

fn verify_as(service: &FakeAs, trusted: bool) -> Verify {
    Verify {
        provider: VerifyProvider::As(AsService {
            headers: vec![("x-api-key".into(), "secret-value".into())],
            trusted: TrustedSigners::certs(if trusted { vec![fakes::fixture("as-ca.pem")] } else { vec![] }),
            timeout: Duration::from_secs(2),
            ..AsService::at(service.url())
        }),
        ..verify_sample(true)
    }
}

async fn reason_of(verify: Verify) -> &'static str {
    let client = endpoint(ra(None, Some(verify)));
    let server = endpoint(ra(Some(attest_sample()), None));
    let (c, _) = meet(&client, &server).await;
    c.map_or_else(|e| e.reason(), |_| "ok")
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn the_agents_answers_are_the_recorded_bytes() {
    let mut seen = 0;
    for (name, sent, answer) in fakes::aa::recorded() {
        if name.starts_with("GetEvidence") || name == "GetTeeType" || name == "NoSuchMethod" {
            let request = fakes::aa::Request::decode(&sent[10..]).unwrap();
            assert_eq!(fakes::aa::reply(Aa::Good, &request), answer, "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, 6);
}

#[tokio::test]
async fn both_sides_attest_through_an_agent_and_verify_through_a_service() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Good);
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for trusted in [true, false] {
        let make = || endpoint(ra(Some(attest_aa(&agent.socket)), Some(verify_as(&service, trusted))));
        let (client, server) = (make(), make());
        let (c, s) = meet(&client, &server).await;
        for channel in [c.unwrap(), s.unwrap()] {
            let Peer::Verified(v) = channel.peer else { panic!("not verified") };
            assert_eq!((v.tee.as_str(), v.verifier.as_str(), v.sample), ("sample", "as", true));
            let anchor = if trusted { "tng test AS CA" } else { "JWKS of http" };
            assert!(v.trust_anchor.contains(anchor), "{}", v.trust_anchor);
        }
        assert!(service.last_head().contains("secret-value"));
        let status = serde_json::to_string(&client.status()).unwrap();
        assert!(!status.contains("secret-value") && status.contains(r#""state":"ok""#), "{status}");
        assert_eq!(client.status().aa_calls, 4, "evidence and TEE type, for the certificate and for the session");
    }
}

#[tokio::test]
async fn each_failing_service_has_its_reason() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for (mode, reason) in [
        (AFFIRMING, "ok"),
        (As::OldApi, "ok"),
        (As::Slow, "ok"),
        (As::Status("warning"), "token-status-warning"),
        (As::Status("none"), "token-status-none"),
        (As::Status("contraindicated"), "token-status-contraindicated"),
        (As::Rejected, "as-rejected"),
        (As::BadRequest, "as-error"),
        (As::NoPolicy, "as-policy"),
        (As::Garbage, "as-no-token"),
        (As::Html, "as-no-token"),
        (As::NotHttp, "as-garbage"),
        (As::Silent, "as-timeout"),
        (As::Expired, "token-expired"),
        (As::WrongRuntimeData, "token-runtime-data"),
        (As::WrongPolicy, "token-policy"),
        (As::Stranger, "token-untrusted-signer"),
        (AFFIRMING, "ok"),
    ] {
        service.set(mode);
        for trusted in [true, false] {
            assert_eq!(reason_of(verify_as(&service, trusted)).await, reason, "{mode:?}, pinned: {trusted}");
        }
    }
    let verify = verify_as(&service, true);
    assert_eq!(reason_of(Verify { allow_sample: false, ..verify.clone() }).await, "sample-tee-refused");
    drop(service);
    until("the service's port closes", async || reason_of(verify.clone()).await == "as-unreachable").await;
}

#[tokio::test]
async fn each_failing_agent_has_its_reason_and_the_next_good_answer_heals() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aa.sock");
    let client = endpoint(ra(None, Some(verify_sample(true))));
    let serve = || endpoint_within(ra(Some(attest_aa(&socket)), None), Duration::from_millis(1500));
    let refused = async |server: &EndpointTls| meet(&client, server).await.1.err().map_or("ok", |e| e.reason());

    assert_eq!(refused(&serve()).await, "aa-unreachable");
    let agent = FakeAa::start(&socket, Aa::Good);
    for (mode, reason) in [
        (Aa::Error, "aa-error"),
        (Aa::OldAgent, "aa-no-tee-type"),
        (Aa::Garbage, "aa-garbage"),
        (Aa::BadMessage, "aa-garbage"),
        (Aa::Huge, "aa-garbage"),
        (Aa::Silent, "aa-timeout"),
        (Aa::Hangup, "aa-unreachable"),
    ] {
        agent.set(mode);
        let server = serve();
        assert_eq!(refused(&server).await, reason, "{mode:?}");
        assert_eq!(server.status().attest.unwrap().state, "failing");
        agent.set(Aa::Good);
        until("the endpoint heals", async || refused(&server).await == "ok").await;
        assert_eq!(server.status().attest.unwrap().state, "ok");
    }
}

#[tokio::test]
async fn a_hundred_connections_cause_one_appraisal() {
    for old in [false, true] {
        a_hundred_connections(old).await;
    }
}

async fn a_hundred_connections(old: bool) {
    let service = FakeAs::start("127.0.0.1:0", As::Slow).await;
    let client = endpoint_within(ra(None, Some(verify_as(&service, true))), Duration::from_secs(20));
    let config = common::config(ra(Some(attest_sample()), None), Duration::from_secs(20));
    let server = if old {
        EndpointTls::rats_tls_only(&config, Arc::new(tng::os::clock::SystemClock)).unwrap()
    } else {
        EndpointTls::new(&config).unwrap()
    };
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let (c, s): (Arc<EndpointTls>, Arc<EndpointTls>) = (client.clone(), server.clone());
            tokio::spawn(async move { meet(&c, &s).await.0.map(|_| ()) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(service.appraisals(), 1);
    assert_eq!(client.status().as_calls, 1);
}

#[tokio::test]
async fn a_refresh_under_way_blocks_no_handshake() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Good);
    let attest = Attest { refresh_interval: Duration::from_secs(3), ..attest_aa(&agent.socket) };
    let server = endpoint(ra(Some(attest), None));
    let client = endpoint(ra(None, Some(verify_sample(true))));
    meet(&client, &server).await.0.unwrap();
    let before = agent.requests();
    agent.set(Aa::Silent);
    until("the refresh begins", async || agent.requests() > before).await;
    let begun = Instant::now();
    meet(&client, &server).await.0.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    // And evidence that is too old is not shown: refused with the agent's reason.
    until("old evidence is refused", async || {
        meet(&client, &server).await.1.is_err_and(|e| e.reason() == "aa-timeout")
    })
    .await;
}
