//! The passport model: tokens in certificates, and peers that speak the other model.

#[path = "common/tls.rs"]
mod common;
mod fakes;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{attest_sample, endpoint, meet, pair, ra, verify_sample};
use fakes::as_rest::{FakeAs, Mode as As};
use rcgen::{CertificateParams, CustomExtension, KeyPair, PublicKeyData};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::sign::CertifiedKey;
use tng::attest::{Attester, Credential, EVIDENCE_OID, RuntimeData, SampleAttester};
use tng::config::*;
use tng::tls::{ChannelError, Peer};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsAcceptor;

const AFFIRMING: As = As::Status("affirming");

fn rest(service: &FakeAs, trusted: bool) -> AsService {
    AsService {
        trusted: TrustedSigners::certs(if trusted { vec![fakes::fixture("as-ca.pem")] } else { vec![] }),
        timeout: Duration::from_millis(500),
        ..AsService::at(service.url())
    }
}

fn attest(service: &FakeAs) -> Attest {
    let passport = Passport { service: rest(service, false), policy_ids: vec!["default".into()] };
    Attest { passport: Some(passport), ..attest_sample() }
}

fn verify(provider: VerifyProvider) -> Verify {
    Verify { provider, model: Model::Passport, ..verify_sample(true) }
}

fn anchors() -> Verify {
    verify(VerifyProvider::Anchors(TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")])))
}

/// What each side makes of the other: the client verifies, the server attests.
async fn met(
    verify: Verify,
    attest: Attest,
) -> (Result<Arc<tng::attest::Verdict>, ChannelError>, Option<&'static str>) {
    let (client, server) = (endpoint(ra(None, Some(verify))), endpoint(ra(Some(attest), None)));
    let (c, s) = meet(&client, &server).await;
    let verdict = c.map(|channel| match channel.peer {
        Peer::Verified(verdict) => verdict,
        Peer::Unverified => panic!("not verified"),
    });
    (verdict, s.err().map(|e| e.reason()))
}

async fn reason(verify: Verify, attest: Attest) -> &'static str {
    met(verify, attest).await.0.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn a_token_lets_its_peer_in_whoever_vouches_for_the_signer() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for (by, anchor) in [
        (VerifyProvider::As(rest(&service, true)), "tng test AS CA"),
        (VerifyProvider::As(rest(&service, false)), "JWKS of http"),
        (VerifyProvider::Anchors(TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")])), "tng test AS CA"),
    ] {
        let before = service.appraisals();
        let verdict = met(verify(by), attest(&service)).await.0.unwrap();
        assert_eq!(service.appraisals(), before + 2, "the attester's own, for certificate and session");
        assert_eq!((verdict.tee.as_str(), verdict.status.as_str(), verdict.sample), ("sample", "affirming", true));
        assert!(verdict.trust_anchor.contains(anchor), "{}", verdict.trust_anchor);
        assert_eq!(verdict.claims["debug"], "false");
        assert!(verdict.expires_at <= SystemTime::now() + Duration::from_secs(300));
    }
}

#[tokio::test]
async fn both_sides_may_show_passports_and_status_says_so() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let both = || ra(Some(attest(&service)), Some(anchors()));
    let (client, server) = (endpoint(both()), endpoint(both()));
    let (c, s) = meet(&client, &server).await;
    c.unwrap();
    s.unwrap();
    let status = serde_json::to_value(client.status()).unwrap();
    assert_eq!((&status["attest"]["model"], &status["verify"]["model"]), (&"passport".into(), &"passport".into()));
    assert_eq!(status["peers"][0]["claims"]["debug"], "false");
    assert!(!status.to_string().contains("eyJ"), "a token in the status");
}

#[tokio::test]
async fn peers_of_different_models_are_told_which_side_wants_what() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let error = met(anchors(), attest_sample()).await.0.unwrap_err();
    assert_eq!(error.reason(), "peer-evidence-background-check");
    let text = error.to_string();
    assert!(text.contains("its attest.model is background_check") && text.contains("is passport"), "{text}");

    let error = met(verify_sample(true), attest(&service)).await.0.unwrap_err();
    assert_eq!(error.reason(), "peer-evidence-passport");
    let text = error.to_string();
    assert!(text.contains("its attest.model is passport") && text.contains("is background_check"), "{text}");
}

#[tokio::test]
async fn a_token_is_judged_as_one_of_the_service_itself() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for (mode, wanted) in [
        (As::Status("warning"), "token-status-warning"),
        (As::Status("none"), "token-status-none"),
        (As::Status("contraindicated"), "token-status-contraindicated"),
        (As::WrongPolicy, "token-policy"),
        (As::Stranger, "token-untrusted-signer"),
        (AFFIRMING, "ok"),
    ] {
        service.set(mode);
        assert_eq!(reason(anchors(), attest(&service)).await, wanted, "{mode:?}");
    }
    assert_eq!(reason(Verify { allow_sample: false, ..anchors() }, attest(&service)).await, "sample-tee-refused");
    let policy = Verify { policy_ids: vec!["other".into()], ..anchors() };
    assert_eq!(reason(policy, attest(&service)).await, "token-policy");
}

#[tokio::test]
async fn a_side_whose_own_token_does_not_affirm_it_knows_that_peers_refuse_it() {
    let service = FakeAs::start("127.0.0.1:0", As::Status("contraindicated")).await;
    let interval = Duration::from_secs(2);
    let shows = Attest { refresh_interval: interval, ..attest(&service) };
    let (client, server) = (endpoint(ra(None, Some(anchors()))), endpoint(ra(Some(shows), None)));
    assert_eq!(meet(&client, &server).await.0.err().unwrap().reason(), "token-status-contraindicated");
    let status = server.status().attest.unwrap();
    assert_eq!((status.state, status.usable), ("degraded", true), "{status:?}");
    assert_eq!((status.reason, status.failures), (Some("token-status-contraindicated"), 0));
    assert!(status.error.unwrap().contains("the token about this side: appraisal of cpu0"));
    // The service thinks better of it.
    service.set(AFFIRMING);
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    while server.status().attest.unwrap().state != "ok" {
        assert!(tokio::time::Instant::now() < end, "{:?}", server.status().attest);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    meet(&client, &server).await.0.unwrap();
    assert_eq!(server.status().attest.unwrap().reason, None);
}

#[tokio::test]
async fn an_attester_without_a_token_says_why_and_shows_nothing() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for (mode, wanted) in [
        (As::Rejected, "as-rejected"),
        (As::NoPolicy, "as-policy"),
        (As::Html, "as-no-token"),
        (As::Silent, "as-timeout"),
        (As::Stalls, "as-stalled"),
        (As::Expired, "token-expired"),
        (As::WrongRuntimeData, "token-runtime-data"),
    ] {
        service.set(mode);
        let (c, s) = met(anchors(), attest(&service)).await;
        assert_eq!((c.unwrap_err().reason(), s), ("tls-closed", Some(wanted)), "{mode:?}");
    }
}

#[tokio::test]
async fn the_tokens_end_bounds_certificate_and_verdict_and_a_new_one_comes_before_it() {
    let service = FakeAs::start("127.0.0.1:0", As::Short(4)).await;
    let (client, server) = (endpoint(ra(None, Some(anchors()))), endpoint(ra(Some(attest(&service)), None)));
    let begun = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let channel = meet(&client, &server).await.0.unwrap();
    let shown = server.status().attest.unwrap();
    assert!((begun + 3..=begun + 5).contains(&shown.certificate_expires.unwrap()), "{shown:?}");
    let Peer::Verified(verdict) = &channel.peer else { panic!("not verified") };
    assert!(verdict.expires_at <= UNIX_EPOCH + Duration::from_secs(shown.certificate_expires.unwrap()));
    // Renewed at half its life: at no time is there none to show.
    let end = tokio::time::Instant::now() + Duration::from_secs(10);
    while service.appraisals() < 3 {
        assert!(tokio::time::Instant::now() < end, "no new token");
        meet(&client, &server).await.0.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The first verdict is over by then or soon, and with it the connection.
    let standing = channel.standing.unwrap();
    tokio::time::timeout(Duration::from_secs(10), standing.ended()).await.unwrap();
    assert!(["verdict-expired", "peer-certificate-expired"].contains(&standing.why().unwrap().reason));
}

/// What a verifier of passports makes of a server that shows `credential` with `key`.
async fn shown(verify: Verify, key: KeyPair, credential: &Credential) -> &'static str {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.not_before = now.into();
    params.not_after = (now + Duration::from_secs(3600)).into();
    params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, credential.to_extension())];
    let der = params.self_signed(&key).unwrap().der().clone();
    let signer = any_ecdsa_type(&PrivatePkcs8KeyDer::from(key.serialize_der()).into()).unwrap();
    let certified = CertifiedKey::new(vec![der], signer);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![b"rats-tls".to_vec()];
    let (c, s) = pair().await;
    let server = tokio::spawn(async move {
        if let Ok(mut stream) = TlsAcceptor::from(Arc::new(config)).accept(s).await {
            let _ = stream.read(&mut [0]).await;
        }
    });
    let outcome = endpoint(ra(None, Some(verify))).connect(c, None).await;
    let reason = outcome.as_ref().map_or_else(|e| e.reason(), |_| "ok");
    drop(outcome);
    server.await.unwrap();
    reason
}

fn new_key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

/// A token of the service about `key`.
async fn token_about(service: &FakeAs, key: &KeyPair) -> String {
    let evidence = SampleAttester.evidence(&RuntimeData::for_key(&key.subject_public_key_info())).await.unwrap();
    use tng::attest::TokenIssuer;
    let provider = VerifyProvider::As(rest(service, true));
    let issuer = tng::attest::AsVerifier::new(
        &verify(provider),
        &rest(service, true),
        DEFAULT_INGRESS_MARK,
        Arc::new(tng::os::clock::SystemClock),
    );
    issuer.unwrap().issue(&evidence).await.unwrap()
}

#[tokio::test]
async fn a_token_shown_with_another_key_is_refused() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let key = new_key();
    let token = Credential::Token(token_about(&service, &key).await);
    assert_eq!(shown(anchors(), key, &token).await, "ok");
    // Stolen from an honest peer's certificate, which everybody sees.
    assert_eq!(shown(anchors(), new_key(), &token).await, "token-runtime-data");
}

#[tokio::test]
async fn what_is_no_good_token_is_refused_each_with_its_reason() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let key = new_key();
    let good = token_about(&service, &key).await;
    let signature_gone = good.rsplit_once('.').unwrap().0.to_owned();
    let unbound = fakes::text("aa-gettoken-coco_as.jwt").trim().to_owned();
    let long = "a".repeat(30_000);
    for (token, wanted) in [
        ("", "token-malformed"),
        ("not a token", "token-malformed"),
        (&long, "token-malformed"),
        (&signature_gone, "token-malformed"),
        (&format!("{signature_gone}."), "token-signature"),
        // {"alg":"none"} and {"alg":"HS256"}
        (&good.replacen(good.split('.').next().unwrap(), "eyJhbGciOiJub25lIn0", 1), "token-alg-none"),
        (&good.replacen(good.split('.').next().unwrap(), "eyJhbGciOiJIUzI1NiJ9", 1), "token-alg-mac"),
    ] {
        let credential = Credential::Token(token.to_owned());
        assert_eq!(shown(anchors(), new_key(), &credential).await, wanted, "{token:.40}");
    }
    // The agent's own token is bound to nothing; by now it is over besides.
    let reason = shown(anchors(), new_key(), &Credential::Token(unbound)).await;
    assert!(["token-expired", "token-runtime-data"].contains(&reason), "{reason}");
}
