//! Whom a token may be signed by: files, pinned keys, key sets, or who the service says.

use fakes::appraiser::Signer;
use tng::attest::{TokenIssuer, Verifier};

use super::*;

fn trusting(service: &FakeAs, trusted: TrustedSigners) -> AsService {
    AsService { trusted, ..at(&[service]) }
}

#[tokio::test]
async fn a_pinned_key_is_trusted_and_no_other() {
    let service = start(AFFIRMING, Serves::Rest).await;
    let pins = |keys: Vec<[u8; 32]>| TrustedSigners {
        keys: keys.into_iter().map(KeyPin).collect(),
        ..TrustedSigners::default()
    };
    let pin = Signer::load().pin();
    let verdict = appraise(&trusting(&service, pins(vec![[1; 32], pin]))).await.unwrap();
    assert!(verdict.trust_anchor.starts_with("pinned key "), "{}", verdict.trust_anchor);
    assert_eq!(reason(&trusting(&service, pins(vec![[1; 32]]))).await, "token-untrusted-signer");
    service.set(Mode::Stranger);
    assert_eq!(reason(&trusting(&service, pins(vec![pin]))).await, "token-untrusted-signer");
}

#[tokio::test]
async fn a_key_set_comes_from_a_file_or_a_url() {
    let dir = tempfile::tempdir().unwrap();
    let service = start(AFFIRMING, Serves::GrpcAlone).await;
    let sets = |jwks| TrustedSigners { jwks, ..TrustedSigners::default() };
    let (good, other) = (dir.path().join("good.json"), dir.path().join("other.json"));
    let mut jwk = Signer::load().jwk(false);
    std::fs::write(&good, serde_json::json!({ "keys": [jwk] }).to_string()).unwrap();
    // A point that is nobody's.
    jwk["x"] = "AAAA".into();
    std::fs::write(&other, serde_json::json!({ "keys": [jwk] }).to_string()).unwrap();
    assert_eq!(reason(&trusting(&service, sets(vec![JwksSource::File(good)]))).await, "ok");
    let other = JwksSource::File(other);
    assert_eq!(reason(&trusting(&service, sets(vec![other.clone()]))).await, "token-untrusted-signer");

    let published = start(AFFIRMING, Serves::Rest).await;
    let url = |path: &str| JwksSource::Url(published.url().join(path).unwrap());
    let asked = trusting(&service, sets(vec![url("named.json")]));
    let asked = AsService { headers: vec![("x-api-key".into(), "for-the-service".into())], ..asked };
    let verdict = appraise(&asked).await.unwrap();
    assert!(verdict.trust_anchor.contains("named.json"), "{}", verdict.trust_anchor);
    assert!(published.last_head().starts_with("GET /named.json "));
    assert!(!published.last_head().contains("for-the-service"), "the service's headers went elsewhere");
    // Sources add up; one that cannot be had is said to be missing, unless it is not needed.
    assert_eq!(reason(&trusting(&service, sets(vec![other.clone(), url("named.json")]))).await, "ok");
    assert_eq!(reason(&trusting(&service, sets(vec![other, url("missing.json")]))).await, "key-set");
    let mixed = TrustedSigners { certs: vec![fakes::fixture("as-ca.pem")], ..sets(vec![url("missing.json")]) };
    assert_eq!(reason(&trusting(&service, mixed)).await, "ok");
}

#[tokio::test]
async fn certificates_in_base64url_are_read() {
    let service = start(Mode::Openanolis { flat: false }, Serves::Rest).await;
    assert_eq!(reason(&at(&[&service])).await, "ok");
    let verdict = appraise(&trusting(&service, TrustedSigners::default())).await.unwrap();
    assert!(verdict.trust_anchor.starts_with("certificate of http"), "{}", verdict.trust_anchor);
}

#[tokio::test]
async fn a_grpc_service_is_asked_for_its_keys_over_http_and_one_without_is_told_what_to_set() {
    let service = start(AFFIRMING, Serves::Grpc).await;
    let verdict = appraise(&trusting(&service, TrustedSigners::default())).await.unwrap();
    assert!(verdict.trust_anchor.starts_with("JWKS of http"), "{}", verdict.trust_anchor);
    let alone = start(AFFIRMING, Serves::GrpcAlone).await;
    let error = appraise(&trusting(&alone, TrustedSigners::default())).await.unwrap_err();
    assert_eq!(error.reason(), "token-untrusted-signer");
    assert!(error.to_string().contains("set trusted_certs"), "{error}");
}

#[tokio::test]
async fn the_doctor_reaches_both_protocols() {
    for serves in [Serves::Rest, Serves::Grpc, Serves::GrpcAlone] {
        let service = start(AFFIRMING, serves).await;
        let seen = verifier(&at(&[&service])).reach().await.unwrap_or_else(|e| panic!("{serves:?}: {e}"));
        assert!(seen.anchors.contains("tng test AS CA"), "{}", seen.anchors);
        assert!(service.issued().is_empty());
    }
}

/// What the doctor finds at a service that is asked as `kind`.
async fn found(service: &FakeAs, kind: Option<AsKind>) -> Result<AsKind, VerifyError> {
    verifier(&AsService { kind, ..at(&[service]) }).reach().await.map(|seen| seen.kind)
}

#[tokio::test]
async fn the_doctor_makes_the_call_that_is_configured() {
    let lines = [AFFIRMING, Mode::OldApi, Mode::Openanolis { flat: false }, Mode::Openanolis { flat: true }];
    for (listen, mode) in ["127.0.0.1:0", "[::1]:0"].into_iter().flat_map(|at| lines.map(|mode| (at, mode))) {
        for (serves, speaks, other) in [
            (Serves::Rest, AsKind::Rest, AsKind::Grpc),
            (Serves::Grpc, AsKind::Grpc, AsKind::Rest),
            (Serves::GrpcAlone, AsKind::Grpc, AsKind::Rest),
        ] {
            let what = format!("{listen} {mode:?} {serves:?}");
            let service = FakeAs::start_as(listen, mode, serves, None).await;
            assert_eq!(found(&service, None).await, Ok(speaks), "{what}");
            assert_eq!(found(&service, Some(speaks)).await, Ok(speaks), "{what}");
            let wrong = found(&service, Some(other)).await.unwrap_err();
            let told =
                format!("it is a {} service, and was asked as", if speaks == AsKind::Rest { "REST" } else { "gRPC" });
            assert!(wrong.reason() == "as-garbage" && wrong.to_string().contains(&told), "{what}: {wrong}");
            assert!(service.issued().is_empty(), "{what}");
        }
    }
}

#[tokio::test]
async fn the_doctor_finds_no_service_where_another_one_is() {
    for serves in [Serves::Rest, Serves::Grpc, Serves::GrpcAlone] {
        let service = start(Mode::Absent, serves).await;
        let kind = if serves == Serves::Rest { AsKind::Rest } else { AsKind::Grpc };
        for asked in [None, Some(kind)] {
            let error = found(&service, asked).await.unwrap_err();
            assert!(error.to_string().starts_with("no attestation service there"), "{serves:?} {asked:?}: {error}");
        }
    }
    for (mode, reason) in [(Mode::Html, "as-no-token"), (Mode::Garbage, "as-no-token"), (Mode::Unavailable, "as-error")]
    {
        let service = start(mode, Serves::Rest).await;
        assert_eq!(found(&service, None).await.unwrap_err().reason(), reason, "{mode:?}");
    }
}

#[tokio::test]
async fn a_token_that_one_side_got_is_checked_by_the_other() {
    let (first, second) = (start(AFFIRMING, Serves::GrpcAlone).await, start(AFFIRMING, Serves::Rest).await);
    let (evidence, bound) = evidence().await;
    let token = verifier(&at(&[&first])).issue(&evidence).await.unwrap();
    let check = async |service: AsService, bound: &RuntimeData| {
        verifier(&service).check_token(&token, bound).await.map_or_else(|e| e.reason(), |_| "ok")
    };
    assert_eq!(check(at(&[&first]), &bound).await, "ok");
    assert_eq!(check(at(&[&first]), &RuntimeData::for_key(b"another")).await, "token-runtime-data");
    // Without anchors of its own it asks the addresses, of which the first publishes nothing.
    let asked = AsService { trusted: TrustedSigners::default(), ..at(&[&first, &second]) };
    assert_eq!(check(asked.clone(), &bound).await, "ok");
    second.set(Mode::NoAnchors);
    assert_eq!(check(asked, &bound).await, "token-untrusted-signer");
    assert_eq!(second.appraisals(), 0);
}

/// Ends a service and starts it anew, with another key, as an ephemeral signer has.
async fn restarted(service: FakeAs, serves: Serves) -> FakeAs {
    let addr = service.addr;
    drop(service);
    free(addr).await;
    FakeAs::start_with_its_own_key_as(&addr.to_string(), AFFIRMING, serves).await
}

#[tokio::test]
async fn a_restarted_service_with_a_new_signer_refuses_nobody() {
    for (listen, serves, by_url) in [
        ("127.0.0.1:0", Serves::Rest, false),
        ("[::1]:0", Serves::Rest, true),
        ("127.0.0.1:0", Serves::Grpc, true),
        ("[::1]:0", Serves::Grpc, false),
    ] {
        let what = format!("{listen} {serves:?} {by_url}");
        let mut service = FakeAs::start_with_its_own_key_as(listen, AFFIRMING, serves).await;
        let url = JwksSource::Url(service.url().join(".well-known/jwks.json").unwrap());
        let sets = TrustedSigners { jwks: vec![url], ..TrustedSigners::default() };
        let trusted = if by_url { sets } else { TrustedSigners::default() };
        let verifier = Arc::new(verifier(&trusting(&service, trusted)));
        ask(&verifier).await.unwrap();
        // Twice within moments of the last fetch, and many peers at once.
        for _ in 0..2 {
            service = restarted(service, serves).await;
            let before = service.requests();
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..20 {
                let verifier = verifier.clone();
                all.spawn(async move { ask(&verifier).await.map_err(|e| e.to_string()) });
            }
            for outcome in all.join_all().await {
                outcome.unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            assert!(service.requests() - before <= 20 + 2, "{what}: keys were fetched by each");
        }
        // A signer that is unknown ever again is told when it may be known.
        let mut refused = None;
        for _ in 0..10 {
            service = restarted(service, serves).await;
            refused = ask(&verifier).await.err();
            if refused.is_some() {
                break;
            }
        }
        let error = refused.expect("a bound on what strangers can cause");
        assert_eq!(error.reason(), "token-untrusted-signer", "{what}: {error}");
        assert!(error.to_string().contains("asked for again in"), "{what}: {error}");
        // One that was seen to be away may have another signer, whatever was fetched before.
        let addr = service.addr;
        drop(service);
        free(addr).await;
        assert_eq!(ask(&verifier).await.unwrap_err().reason(), "as-unreachable", "{what}");
        let _back = FakeAs::start_with_its_own_key_as(&addr.to_string(), AFFIRMING, serves).await;
        ask(&verifier).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

#[tokio::test]
async fn a_strangers_token_does_not_have_keys_fetched_for_ever() {
    let service = start(Mode::Stranger, Serves::Rest).await;
    let verifier = verifier(&trusting(&service, TrustedSigners::default()));
    let begun = std::time::Instant::now();
    for _ in 0..30 {
        assert_eq!(ask(&verifier).await.unwrap_err().reason(), "token-untrusted-signer");
    }
    let fetches = service.requests() - service.appraisals();
    assert!((1..=3 + begun.elapsed().as_secs() / 10).contains(&fetches), "{fetches}");
    // Whom the keys know is let in meanwhile.
    service.set(AFFIRMING);
    ask(&verifier).await.unwrap();
}
