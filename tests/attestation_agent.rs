//! Where evidence comes from: an agent that restarts, the API server in front of one, evidence of devices.

#[path = "common/tls.rs"]
mod common;
mod fakes;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{attest_sample, endpoint, endpoint_within, meet, ra, verify_sample};
use fakes::aa::{FakeAa, Mode as Aa};
use fakes::as_rest::{FakeAs, Mode as As};
use fakes::asr::{FakeAsr, Mode as Asr};
use prost::Message;
use tng::attest::{AaAttester, AsrAttester, Attester, RuntimeData};
use tng::config::*;
use tng::tls::{EndpointTls, Peer};

const AFFIRMING: As = As::Status("affirming");
const DEADLINE: Duration = Duration::from_secs(3);

fn attest_aa(socket: &Path) -> Attest {
    Attest { provider: AttestProvider::Aa { socket: socket.into() }, ..attest_sample() }
}

fn attest_asr(server: &FakeAsr) -> Attest {
    Attest { provider: AttestProvider::Asr { addr: server.url() }, ..attest_sample() }
}

fn verify_as(service: &FakeAs) -> Verify {
    Verify {
        provider: VerifyProvider::As(AsService {
            trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
            timeout: Duration::from_secs(2),
            ..AsService::at(service.url())
        }),
        ..verify_sample(true)
    }
}

fn asr(server: &FakeAsr, additional: bool, deadline: Duration) -> AsrAttester {
    AsrAttester::new(&server.url(), additional, DEFAULT_INGRESS_MARK, deadline).unwrap()
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a client that verifies with `verify` makes of a server that attests with `attest`.
async fn outcome(verify: Verify, attest: Attest) -> Result<Arc<tng::attest::Verdict>, &'static str> {
    let (client, server) = (endpoint(ra(None, Some(verify))), endpoint(ra(Some(attest), None)));
    match meet(&client, &server).await {
        (Ok(channel), _) => match channel.peer {
            Peer::Verified(verdict) => Ok(verdict),
            Peer::Unverified => panic!("not verified"),
        },
        (Err(c), Err(s)) if c.reason() == "tls-closed" => Err(s.reason()),
        (Err(c), _) => Err(c.reason()),
    }
}

#[tokio::test]
async fn an_agent_that_restarts_is_asked_again_over_a_new_connection() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aa.sock");
    let attester = AaAttester::new(&socket, DEADLINE);
    let rd = RuntimeData::for_key(b"key");
    assert_eq!(attester.evidence(&rd).await.unwrap_err().reason(), "aa-unreachable");
    for _ in 0..3 {
        let agent = FakeAa::start(&socket, Aa::Good);
        for _ in 0..2 {
            assert_eq!(attester.evidence(&rd).await.unwrap().tee, "sample");
        }
        drop(agent);
        assert_eq!(attester.evidence(&rd).await.unwrap_err().reason(), "aa-unreachable");
    }
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_call_costs_no_evidence() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aa.sock");
    let old = FakeAa::start(&socket, Aa::Silent);
    let attester = Arc::new(AaAttester::new(&socket, DEADLINE));
    let asking = tokio::spawn({
        let attester = attester.clone();
        async move { attester.evidence(&RuntimeData::for_key(b"key")).await }
    });
    until("the call is under way", async || old.requests() > 0).await;
    drop(old);
    let _new = FakeAa::start(&socket, Aa::Good);
    assert_eq!(asking.await.unwrap().unwrap().tee, "sample");
}

#[tokio::test]
async fn evidence_is_renewed_at_half_its_age_and_a_failure_shows_without_refusing_anybody() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Good);
    let interval = Duration::from_secs(4);
    let server = endpoint(ra(Some(Attest { refresh_interval: interval, ..attest_aa(&agent.socket) }), None));
    let client = endpoint(ra(None, Some(verify_sample(true))));
    meet(&client, &server).await.0.unwrap();
    let (begun, before) = (Instant::now(), agent.requests());
    agent.set(Aa::Error);
    until("evidence is asked for again", async || agent.requests() > before).await;
    assert!(begun.elapsed() < interval * 6 / 10, "{:?}", begun.elapsed());
    until("the failure shows", async || server.status().attest.unwrap().failures > 1).await;
    let status = server.status().attest.unwrap();
    assert_eq!((status.state, status.usable, status.reason), ("failing", true, Some("aa-error")));
    assert!(status.evidence_age.unwrap() < 4 && status.evidence_left.is_some(), "{status:?}");
    meet(&client, &server).await.0.unwrap();

    agent.set(Aa::Good);
    until("it heals", async || server.status().attest.unwrap().state == "ok").await;
    let status = server.status().attest.unwrap();
    assert_eq!((status.reason, status.last_failure.unwrap().reason), (None, "aa-error"));
}

#[tokio::test]
async fn a_tpm_behind_an_agent_is_asked_for_one_quote_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Tpm);
    // The fake is as fragile as the real one.
    let mut all = tokio::task::JoinSet::new();
    for n in 0..4 {
        let socket = agent.socket.clone();
        all.spawn(async move { fakes::aa::quote(&socket, n).await });
    }
    assert!(all.join_all().await.contains(&false));

    // Two endpoints of one host, each with many handshakes at once.
    let endpoints = [0, 1].map(|_| Arc::new(AaAttester::new(&agent.socket, Duration::from_secs(30))));
    let mut all = tokio::task::JoinSet::new();
    for n in 0..20u8 {
        let attester = endpoints[usize::from(n) % 2].clone();
        all.spawn(async move { attester.evidence(&RuntimeData::for_key(&[n])).await.map(|e| e.tee) });
    }
    for outcome in all.join_all().await {
        assert_eq!(outcome, Ok("tpm".to_owned()));
    }
}

#[tokio::test]
async fn a_side_whose_certificate_is_too_large_for_peers_knows_it() {
    let dir = tempfile::tempdir().unwrap();
    let shown = async |bytes: usize| {
        let name = dir.path().join(format!("{bytes}.sock"));
        let agent = FakeAa::start(&name, Aa::Padded(bytes));
        let server = endpoint(ra(Some(attest_aa(&agent.socket)), None));
        // What is made of it by who asks for nothing: the length of a TLS message alone counts.
        let (met, _) = meet(&endpoint(ra(None, None)), &server).await;
        let status = server.status().attest.unwrap();
        (met.map_or_else(|e| e.reason(), |_| "ok"), status)
    };
    let (mut fits, mut too_large) = (60_000, 70_000);
    while too_large - fits > 1 {
        let middle = (fits + too_large) / 2;
        let (outcome, status) = shown(middle).await;
        match outcome {
            // What else stands in the same flight is of no fixed length: near the limit it may be luck.
            "ok" if status.state == "degraded" => assert!(too_large - middle < 1000, "{middle}"),
            "ok" => assert_eq!((status.state, status.reason), ("ok", None), "{middle}"),
            refused => {
                assert_eq!(refused, "tls-certificate-too-large", "{middle}");
                assert_eq!((status.state, status.reason), ("degraded", Some(refused)), "{middle}");
                assert!(status.error.unwrap().contains("peers take 65279 at most"), "{middle}");
            }
        }
        *if outcome == "ok" { &mut fits } else { &mut too_large } = middle;
    }
}

#[tokio::test]
async fn evidence_through_the_api_server_is_bound_as_the_agents_own() {
    let server = FakeAsr::start(Asr::Good).await;
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let verdict = outcome(verify_as(&service), attest_asr(&server)).await.unwrap();
    assert_eq!((verdict.tee.as_str(), verdict.status.as_str()), ("sample", "affirming"));
    let rd = RuntimeData::for_key(b"key");
    asr(&server, false, DEADLINE).evidence(&rd).await.unwrap();
    let asked = server.requests();
    use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
    let data = BASE64_URL_SAFE_NO_PAD.encode(rd.digest());
    let wanted = format!("GET /aa/evidence?runtime_data={data}&encoding=base64 HTTP/1.1");
    assert_eq!(asked[asked.len() - 2..], ["GET /info HTTP/1.1".to_owned(), wanted]);
}

#[tokio::test]
async fn each_failing_api_server_has_its_reason_and_the_next_good_answer_heals() {
    let server = FakeAsr::start(Asr::Good).await;
    let attester = asr(&server, false, Duration::from_millis(500));
    let rd = RuntimeData::for_key(b"key");
    for (mode, reason) in [
        (Asr::TextOnly, "asr-too-old"),
        (Asr::NoInfo, "asr-too-old"),
        (Asr::NoAgent, "asr-too-old"),
        (Asr::Resource, "asr-feature"),
        (Asr::Error, "aa-error"),
        (Asr::Forbidden, "aa-error"),
        (Asr::Html, "aa-garbage"),
        (Asr::NotHttp, "aa-garbage"),
        (Asr::Huge, "aa-garbage"),
        (Asr::Silent, "aa-timeout"),
        (Asr::Stalls, "aa-timeout"),
        (Asr::Hangup, "aa-unreachable"),
    ] {
        server.set(mode);
        let error = attester.evidence(&rd).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{mode:?}: {error}");
        server.set(Asr::Good);
        assert_eq!(attester.evidence(&rd).await.unwrap().tee, "sample", "after {mode:?}");
    }
    server.set(Asr::Forbidden);
    assert!(attester.evidence(&rd).await.unwrap_err().to_string().contains("403: Forbidden"));
    server.set(Asr::Resource);
    let text = attester.evidence(&rd).await.unwrap_err().to_string();
    assert!(text.contains("--features attestation") && !text.contains("old"), "{text}");
    server.set(Asr::NoInfo);
    assert!(attester.evidence(&rd).await.unwrap_err().to_string().contains("check asr_addr"), "a KBS, say");
    drop(server);
    until("the port closes", async || attester.evidence(&rd).await.is_err_and(|e| e.reason() == "aa-unreachable"))
        .await;
}

#[test]
fn the_agents_device_answers_are_the_recorded_bytes() {
    for (name, sent, answer) in fakes::aa::recorded_in("aa-sample-device.txt") {
        if name.starts_with("GetAdditionalEvidence") {
            let request = fakes::aa::Request::decode(&sent[10..]).unwrap();
            assert_eq!(fakes::aa::reply(Aa::Device, &request), answer, "{name}");
        }
    }
}

#[tokio::test]
async fn devices_are_appraised_with_the_tee_and_both_are_bound_to_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Device);
    let server = FakeAsr::start(Asr::Device).await;
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for attest in [attest_aa(&agent.socket), attest_asr(&server)] {
        let with = || Attest { additional_evidence: true, ..attest.clone() };
        let verdict = outcome(verify_as(&service), with()).await.unwrap();
        assert_eq!((verdict.tee.as_str(), &verdict.devices[..]), ("sample", &["sampledevice".to_owned()][..]));
        let asked = service.last_request();
        let (tee, device) = (&asked["verification_requests"][0], &asked["verification_requests"][1]);
        assert_eq!((tee["tee"].as_str(), device["tee"].as_str()), (Some("sample"), Some("sampledevice")));
        let (of_tee, of_device) = (&tee["runtime_data"]["structured"], &device["runtime_data"]["structured"]);
        let members = |of: &serde_json::Value| of.as_object().unwrap().len();
        assert!(of_device["pubkey-hash"].is_string() && members(of_device) + 1 == members(of_tee), "{of_device}");
        assert_eq!(of_tee["pubkey-hash"], of_device["pubkey-hash"]);
        // The digest of what the certificate shows of the device.
        assert_eq!(of_tee["additional-evidence-sha384"].as_str().map(str::len), Some(64), "{of_tee}");

        service.set(As::DeviceWarning);
        assert_eq!(outcome(verify_as(&service), with()).await.unwrap_err(), "token-status-warning");
        service.set(AFFIRMING);
        // Off by default: the device is not even asked about.
        let verdict = outcome(verify_as(&service), attest.clone()).await.unwrap();
        assert!(verdict.devices.is_empty());
        assert_eq!(service.last_request()["verification_requests"].as_array().unwrap().len(), 1);
    }
}

/// The request for TEE and device has the shape of the recorded one.
#[tokio::test]
async fn the_request_with_a_device_has_the_recorded_members() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Device);
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let attest = Attest { additional_evidence: true, ..attest_aa(&agent.socket) };
    outcome(verify_as(&service), attest).await.unwrap();
    let recorded: serde_json::Value = serde_json::from_str(&fakes::text("as-sample-plus-device.request.json")).unwrap();
    let members = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let made = service.last_request();
    assert_eq!(members(&made), members(&recorded));
    for n in 0..2 {
        let of = |v: &serde_json::Value| members(&v["verification_requests"][n]);
        assert_eq!(of(&made), of(&recorded));
    }
}

#[tokio::test]
async fn device_evidence_that_is_wanted_and_missing_or_unbound_lets_nobody_in() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Good);
    let server = FakeAsr::start(Asr::Good).await;
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for attest in [attest_aa(&agent.socket), attest_asr(&server)] {
        let with = Attest { additional_evidence: true, ..attest };
        assert_eq!(outcome(verify_as(&service), with).await.unwrap_err(), "aa-no-devices");
    }
    agent.set(Aa::UnboundDevice);
    let with = Attest { additional_evidence: true, ..attest_aa(&agent.socket) };
    assert_eq!(outcome(verify_as(&service), with).await.unwrap_err(), "as-binding");
}

#[tokio::test]
async fn a_thousand_connections_of_one_peer_cause_one_appraisal_and_a_reload_the_next() {
    let service = FakeAs::start("127.0.0.1:0", As::Slow).await;
    let client = endpoint_within(ra(None, Some(verify_as(&service))), Duration::from_secs(60));
    let server = endpoint_within(ra(Some(attest_sample()), None), Duration::from_secs(60));
    let tasks: Vec<_> = (0..1000)
        .map(|_| {
            let (c, s): (Arc<EndpointTls>, Arc<EndpointTls>) = (client.clone(), server.clone());
            tokio::spawn(async move { meet(&c, &s).await.0.map(|_| ()) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!((service.appraisals(), client.status().handshakes_ok), (1, 1000));
    meet(&client, &server).await.0.unwrap();
    assert_eq!(service.appraisals(), 1);
    client.reloaded();
    meet(&client, &server).await.0.unwrap();
    assert_eq!(service.appraisals(), 2);
}
