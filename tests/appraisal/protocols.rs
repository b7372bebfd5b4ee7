//! REST and gRPC end in the same reasons; which one a port speaks is found out once.

use std::time::Instant;

use rustls::pki_types::PrivateKeyDer;
use tng::tls::Peer;
use tokio_rustls::TlsAcceptor;

use super::*;

fn typed(kind: AsKind, service: &FakeAs) -> AsService {
    AsService { kind: Some(kind), ..at(&[service]) }
}

#[tokio::test]
async fn each_failing_service_has_its_reason_over_grpc() {
    let service = start(AFFIRMING, Serves::Grpc).await;
    for (mode, expected) in [
        (AFFIRMING, "ok"),
        (Mode::Slow, "ok"),
        (Mode::OldApi, "ok"),
        (Mode::Status("warning"), "token-status-warning"),
        (Mode::Status("none"), "token-status-none"),
        (Mode::Status("contraindicated"), "token-status-contraindicated"),
        (Mode::Rejected, "as-rejected"),
        (Mode::NoPolicy, "as-policy"),
        (Mode::Unavailable, "as-unreachable"),
        (Mode::Garbage, "as-no-token"),
        (Mode::Html, "as-garbage"),
        (Mode::Silent, "as-timeout"),
        (Mode::Stalls, "as-stalled"),
        (Mode::Expired, "token-expired"),
        (Mode::WrongRuntimeData, "token-runtime-data"),
        (Mode::WrongPolicy, "token-policy"),
        (Mode::Stranger, "token-untrusted-signer"),
        (Mode::Padded(700 << 10), "ok"),
        (Mode::Padded(900 << 10), "as-too-large"),
        (Mode::NotHttp, "as-garbage"),
        (AFFIRMING, "ok"),
    ] {
        service.set(mode);
        assert_eq!(reason(&typed(AsKind::Grpc, &service)).await, expected, "{mode:?}");
    }
    service.set(Mode::NoPolicy);
    let error = appraise(&typed(AsKind::Grpc, &service)).await.unwrap_err().to_string();
    assert!(error.contains("gRPC status 10") && error.contains("`zzz_cpu.rego` not found"), "{error}");
}

#[tokio::test]
async fn a_channel_is_verified_by_a_grpc_service() {
    let service = start(AFFIRMING, Serves::Grpc).await;
    let asked = AsService { headers: vec![("X-Api-Key".into(), "metadata".into())], ..typed(AsKind::Grpc, &service) };
    let verify = Verify { provider: VerifyProvider::As(asked), ..common::verify_sample(true) };
    let client = common::endpoint(common::ra(None, Some(verify)));
    let server = common::endpoint(common::ra(Some(common::attest_sample()), None));
    let Peer::Verified(verdict) = common::meet(&client, &server).await.0.unwrap().peer else { panic!("not verified") };
    assert_eq!((verdict.tee.as_str(), verdict.verifier.as_str()), ("sample", "as"));
    let head = service.last_head();
    assert!(head.starts_with("POST /attestation.AttestationService/AttestationEvaluate HTTP/2"), "{head}");
    assert!(head.contains("x-api-key: metadata") && head.contains("grpc-timeout: "), "{head}");
    let status = client.status().verify.unwrap();
    assert_eq!((status.services[0].kind, status.services[0].answered), (Some("grpc"), 1));
}

#[tokio::test]
async fn what_a_port_speaks_is_found_out_once_and_remembered() {
    for (serves, kind, first) in [(Serves::Rest, "rest", 1), (Serves::Grpc, "grpc", 2), (Serves::GrpcAlone, "grpc", 1)]
    {
        let service = start(AFFIRMING, serves).await;
        let verifier = verifier(&at(&[&service]));
        assert_eq!(verifier.services()[0].kind, None);
        ask(&verifier).await.unwrap();
        assert_eq!(verifier.services()[0].kind, Some(kind), "{serves:?}");
        assert_eq!(service.requests(), first, "{serves:?}");
        ask(&verifier).await.unwrap();
        assert_eq!(service.requests(), first + 1, "{serves:?}");
        // Also a refusal shows what it is.
        service.set(Mode::Rejected);
        let fresh = super::verifier(&at(&[&service]));
        assert_eq!(ask(&fresh).await.unwrap_err().reason(), "as-rejected", "{serves:?}");
        assert_eq!(fresh.services()[0].kind, Some(kind), "{serves:?}");
    }
}

#[tokio::test]
async fn a_port_that_speaks_neither_is_described_by_what_it_said_first() {
    let service = start(Mode::NotHttp, Serves::Rest).await;
    let verifier = verifier(&at(&[&service]));
    let error = ask(&verifier).await.unwrap_err();
    assert_eq!((error.reason(), verifier.services()[0].kind), ("as-garbage", None), "{error}");
    service.set(AFFIRMING);
    ask(&verifier).await.unwrap();
}

#[tokio::test]
async fn a_call_that_the_service_drops_is_its_error_and_not_the_networks() {
    for serves in [Serves::Rest, Serves::Grpc, Serves::GrpcAlone] {
        let service = start(AFFIRMING, serves).await;
        let kind = if serves == Serves::Rest { AsKind::Rest } else { AsKind::Grpc };
        for asked in [at(&[&service]), typed(kind, &service)] {
            // Also where nothing was asked before: the port speaks, and the call was made.
            service.set(Mode::Drops);
            let verifier = verifier(&asked);
            let error = ask(&verifier).await.unwrap_err();
            assert_eq!(error.reason(), "as-error", "{serves:?} {:?}: {error}", asked.kind);
            assert!(error.to_string().contains("dropped the call") && error.to_string().contains("log"), "{error}");
            assert_eq!(
                verifier.services()[0].state,
                "ok",
                "{serves:?}: one peer's evidence is no fault of the address"
            );
            service.set(AFFIRMING);
            ask(&verifier).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_became_of_a_call_over_grpc_is_not_hidden_by_what_rest_said_before() {
    for serves in [Serves::Grpc, Serves::GrpcAlone] {
        for (mode, expected) in [
            (Mode::Silent, "as-timeout"),
            (Mode::Stalls, "as-stalled"),
            (Mode::Garbage, "as-no-token"),
            (Mode::Padded(900 << 10), "as-too-large"),
            (Mode::NoPolicy, "as-policy"),
            (AFFIRMING, "ok"),
        ] {
            let service = start(mode, serves).await;
            let asked = AsService { timeout: Duration::from_secs(2), ..at(&[&service]) };
            assert_eq!(reason(&asked).await, expected, "{serves:?} {mode:?}");
        }
    }
}

#[tokio::test]
async fn an_address_of_something_else_is_said_to_be_that() {
    for serves in [Serves::Rest, Serves::Grpc, Serves::GrpcAlone] {
        let service = start(Mode::Absent, serves).await;
        let kind = if serves == Serves::Rest { AsKind::Rest } else { AsKind::Grpc };
        for asked in [at(&[&service]), typed(kind, &service)] {
            let error = appraise(&asked).await.unwrap_err();
            assert_eq!(error.reason(), "as-garbage", "{serves:?} {:?}: {error}", asked.kind);
            if serves != Serves::GrpcAlone || asked.kind.is_some() {
                let text = error.to_string();
                assert!(text.contains("no attestation service there") && text.contains("check as_addr"), "{text}");
            }
        }
        // Another address may be right.
        let other = start(AFFIRMING, serves).await;
        assert_eq!(reason(&at(&[&service, &other])).await, "ok");
    }
}

#[tokio::test]
async fn a_service_that_another_one_replaces_is_found_out_again() {
    let mut serves = [Serves::Rest, Serves::GrpcAlone, Serves::Rest, Serves::Grpc].into_iter();
    let mut service = start(AFFIRMING, serves.next().unwrap()).await;
    let (addr, verifier) = (service.addr, verifier(&at(&[&service])));
    ask(&verifier).await.unwrap();
    for next in serves {
        drop(service);
        free(addr).await;
        service = FakeAs::start_as(&addr.to_string(), AFFIRMING, next, None).await;
        // From gRPC back to REST costs the time in which REST gives HTTP/2 no answer.
        let first = ask(&verifier).await;
        assert!(first.is_ok() || next == Serves::Rest, "{next:?}: {first:?}");
        assert_eq!(ask(&verifier).await.map(|_| ()), Ok(()), "{next:?}");
    }
}

#[tokio::test]
async fn a_configured_type_is_believed() {
    let rest = start(AFFIRMING, Serves::Rest).await;
    assert_eq!(reason(&typed(AsKind::Grpc, &rest)).await, "as-timeout", "HTTP/2 gets no answer, as recorded");
    assert_eq!(rest.requests(), 0);
    let grpc = start(AFFIRMING, Serves::Grpc).await;
    let error = appraise(&typed(AsKind::Rest, &grpc)).await.unwrap_err();
    assert!(error.reason() == "as-garbage" && error.to_string().contains("is a gRPC service"), "{error}");
    assert_eq!(grpc.requests(), 1);
}

#[tokio::test]
async fn the_openanolis_dialect_is_understood_in_each_protocol() {
    for serves in [Serves::Rest, Serves::GrpcAlone] {
        for flat in [true, false] {
            let service = start(Mode::Openanolis { flat }, serves).await;
            let (evidence, bound) = evidence().await;
            for tee in ["sample", "azsnpvtpm", "az-snp-vtpm"] {
                let verifier = verifier(&at(&[&service]));
                let evidence = Evidence { tee: tee.into(), ..evidence.clone() };
                for _ in 0..2 {
                    verifier
                        .appraise(&evidence, &bound)
                        .await
                        .unwrap_or_else(|e| panic!("{serves:?} {flat} {tee}: {e}"));
                }
                // What was corrected for the first appraisal is known for the second.
                let before = service.requests();
                verifier.appraise(&evidence, &bound).await.unwrap();
                assert_eq!(service.requests(), before + 1, "{serves:?} {flat} {tee}");
            }
            let wrong = Evidence { tee: "tdx".into(), ..evidence.clone() };
            let error = super::verifier(&at(&[&service])).appraise(&wrong, &bound).await.unwrap_err();
            assert_eq!(error.reason(), "as-tee", "{error}");
            let other = Evidence { evidence: br#"{"svn":"1","report_data":""}"#.to_vec(), ..evidence };
            let error = super::verifier(&at(&[&service])).appraise(&other, &bound).await.unwrap_err();
            assert_eq!(error.reason(), "as-binding", "{error}");
        }
    }
    // Upstream spells Azure's TEEs with separators over REST.
    let upstream = start(AFFIRMING, Serves::Rest).await;
    let (evidence, bound) = evidence().await;
    let evidence = Evidence { tee: "azsnpvtpm".into(), ..evidence };
    verifier(&at(&[&upstream])).appraise(&evidence, &bound).await.unwrap();
    assert_eq!(upstream.requests(), 1);
}

#[tokio::test]
async fn the_openanolis_lines_words_over_grpc_are_understood() {
    let line = Mode::Openanolis { flat: false };
    let service = start(line, Serves::GrpcAlone).await;
    let verifier = verifier(&typed(AsKind::Grpc, &service));
    let (evidence, bound) = evidence().await;
    verifier.appraise(&evidence, &bound).await.unwrap();
    let other = Evidence { evidence: br#"{"svn":"1","report_data":""}"#.to_vec(), ..evidence };
    let error = verifier.appraise(&other, &bound).await.unwrap_err();
    assert_eq!(error.reason(), "as-binding", "{error}");
}

#[tokio::test]
async fn devices_are_appraised_with_their_tee_where_the_protocol_has_them() {
    for (serves, tee, expected) in [
        (Serves::Rest, "sampledevice", "ok"),
        (Serves::Rest, "nvidia", "as-tee"),
        (Serves::GrpcAlone, "nvidia", "ok"),
        (Serves::GrpcAlone, "sampledevice", "as-tee"),
    ] {
        let service = start(AFFIRMING, serves).await;
        let bound = RuntimeData::for_key(b"a key");
        let device = String::from_utf8(SampleAttester.evidence(&bound).await.unwrap().evidence).unwrap();
        let text = format!(r#"{{"{tee}":{device}}}"#).into_bytes();
        let evidence = SampleAttester.evidence(&bound.with_devices(&text)).await.unwrap();
        let outcome = verifier(&at(&[&service]))
            .appraise(&Evidence { additional: Some(text.clone()), ..evidence.clone() }, &bound)
            .await;
        assert_eq!(outcome.as_ref().map_or_else(|e| e.reason(), |_| "ok"), expected, "{serves:?} {tee}: {outcome:?}");
        let Ok(verdict) = outcome else { continue };
        assert_eq!(verdict.devices, [tee]);
        // Evidence over anything else than the key is the device of somebody else.
        let other = RuntimeData::for_key(b"another");
        let device = String::from_utf8(SampleAttester.evidence(&other).await.unwrap().evidence).unwrap();
        let text = format!(r#"{{"{tee}":{device}}}"#).into_bytes();
        let evidence = SampleAttester.evidence(&bound.with_devices(&text)).await.unwrap();
        let evidence = Evidence { additional: Some(text), ..evidence };
        let refused = verifier(&at(&[&service])).appraise(&evidence, &bound).await.unwrap_err();
        assert_eq!(refused.reason(), "as-binding", "{serves:?} {tee}");
    }
}

/// A server's TLS for 127.0.0.1, and the PEM file that vouches for it.
fn tls(dir: &std::path::Path, alpn: &[&str]) -> (TlsAcceptor, std::path::PathBuf) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let file = dir.join(format!("{}.pem", alpn.len()));
    std::fs::write(&file, made.cert.pem()).unwrap();
    (TlsAcceptor::from(Arc::new(config)), file)
}

#[tokio::test]
async fn the_services_own_certificate_is_checked_against_as_ca() {
    let dir = tempfile::tempdir().unwrap();
    for (serves, alpn) in [
        (Serves::Rest, &[][..]),
        (Serves::Rest, &["h2", "http/1.1"]),
        (Serves::Grpc, &["h2"]),
        (Serves::GrpcAlone, &["h2"]),
    ] {
        let (acceptor, ca) = tls(dir.path(), alpn);
        let service = FakeAs::start_as("127.0.0.1:0", AFFIRMING, serves, Some(acceptor)).await;
        let own = AsService { ca: vec![ca], ..at(&[&service]) };
        assert_eq!(reason(&own).await, "ok", "{serves:?} {alpn:?}");
        // The authority of the tokens' signer is not the service's.
        let kinds = if serves == Serves::Rest { [None, Some(AsKind::Rest)] } else { [None, Some(AsKind::Grpc)] };
        for kind in kinds {
            let other = AsService { ca: vec![fakes::fixture("as-ca.pem")], kind, ..at(&[&service]) };
            assert_eq!(reason(&other).await, "as-tls", "{serves:?} {alpn:?} {kind:?}");
            assert_eq!(reason(&AsService { kind, ..at(&[&service]) }).await, "as-tls", "{serves:?} {alpn:?} {kind:?}");
        }
    }
}

#[tokio::test]
async fn a_grpc_connection_is_kept_and_replaced_when_the_service_restarts() {
    let service = start(AFFIRMING, Serves::GrpcAlone).await;
    let (addr, verifier) = (service.addr, verifier(&typed(AsKind::Grpc, &service)));
    ask(&verifier).await.unwrap();
    drop(service);
    free(addr).await;
    assert_eq!(ask(&verifier).await.unwrap_err().reason(), "as-unreachable");
    let _again = FakeAs::start_as(&addr.to_string(), AFFIRMING, Serves::GrpcAlone, None).await;
    ask(&verifier).await.unwrap();
}

#[tokio::test]
async fn many_appraisals_share_one_grpc_connection() {
    let service = start(Mode::Slow, Serves::GrpcAlone).await;
    let verifier = Arc::new(verifier(&typed(AsKind::Grpc, &service)));
    let begun = Instant::now();
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let verifier = verifier.clone();
            tokio::spawn(async move { ask(&verifier).await.map(|_| ()) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(service.appraisals(), 20);
    assert!(begun.elapsed() < Duration::from_secs(3), "one after the other: {:?}", begun.elapsed());
}
