//! Peers of every kind: what is shown of them, and which check fails.

use std::time::Duration;

use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, KeyPair, PublicKeyData};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tng::attest::{Attester, EVIDENCE_OID, RuntimeData, SampleAttester};
use tng::tls::session::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use crate::common::{attest_sample, ra};
use crate::raw::{Keys, message};
use crate::{Ran, endpoint, listen, rats_tls, server, serves, tngctl, verify};

fn states(ran: &Ran, ids: &[&str]) -> Vec<String> {
    ids.iter().map(|id| ran.check(id).0).collect()
}

#[tokio::test]
async fn a_look_without_an_appraiser_shows_everything_and_trusts_nobody() {
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let ran = tngctl(&["verify", &addr.to_string()]).await;
    assert_eq!(ran.code, 5, "{} {}", ran.out, ran.err);
    let protocol = "protocol           tng/1: evidence bound to this connection";
    for part in [
        &addr.to_string(),
        "TLSv1.3, TLS13_",
        "X25519MLKEM768",
        protocol,
        "asks for evidence  no",
        "O=Inclavare Containers",
        "EC P-256, SPKI sha256:",
        "svn",
        "pubkey-hash",
        "passed    made for this side's nonce",
        "not done  somebody vouches for the evidence: nobody appraises",
        "NOT APPRAISED: the peer says that it is sample",
        "--as-addr",
        "proves nothing",
    ] {
        assert!(ran.out.contains(part), "{part}: {}", ran.out);
    }
    let json = verify(addr, &[]).await.json();
    let mut keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        [
            "address",
            "appraiser",
            "certificate",
            "checks",
            "evidence",
            "notes",
            "reference",
            "saved",
            "target",
            "tls",
            "token",
            "verdict"
        ]
    );
    assert_eq!(json["verdict"]["outcome"], "not_appraised");
    assert_eq!(json["evidence"]["from"], "session");
}

#[tokio::test]
async fn names_and_ipv6_addresses_are_found() {
    let listener = tokio::net::TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = endpoint(ra(Some(attest_sample()), None));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = tls.accept(tcp).await;
        }
    });
    let ran = tngctl(&["verify", "--json", "--allow-sample", &format!("[::1]:{port}")]).await;
    assert_eq!((ran.code, &ran.json()["address"]), (0, &format!("[::1]:{port}").into()), "{}", ran.err);
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let ran = tngctl(&["verify", "--json", "--allow-sample", &format!("localhost:{}", addr.port())]).await;
    assert_eq!(ran.code, 0, "{}", ran.out);
    let ran = tngctl(&["verify", "--json", "no-such-name.invalid:1"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("connection".into(), "target-unresolved".into())));
}

#[tokio::test]
async fn both_protocols_are_spoken_and_say_what_evidence_is_bound_to() {
    let addr = serves(endpoint(ra(Some(attest_sample()), None))).await;
    let binding = ["key-binding", "freshness", "session-binding", "report-data"];
    let ran = verify(addr, &["--allow-sample"]).await;
    assert_eq!(ran.code, 0, "{}", ran.out);
    assert_eq!((&ran.json()["tls"]["protocol"], &ran.json()["tls"]["binding"]), (&"tng/1".into(), &"session".into()));
    assert_eq!(states(&ran, &binding), ["passed"; 4]);
    let ran = verify(addr, &["--allow-sample", "--protocol", "rats-tls"]).await;
    assert_eq!(ran.code, 0, "{}", ran.out);
    assert_eq!(ran.json()["tls"]["binding"], "certificate");
    assert_eq!(states(&ran, &binding), ["passed", "not_done", "not_done", "passed"]);
    assert_eq!(ran.json()["verdict"]["appraisal"]["sample"], true);

    let old = serves(rats_tls(ra(Some(attest_sample()), None))).await;
    assert_eq!(verify(old, &["--allow-sample"]).await.json()["tls"]["protocol"], "rats-tls");
    let ran = verify(old, &["--allow-sample", "--protocol", "tng/1"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("protocol".into(), "tls-alpn".into())));
}

/// A server that shows these things in RATS-TLS.
async fn shows(alpn: &'static [u8], make: impl AsyncFnOnce(&KeyPair, &mut CertificateParams)) -> std::net::SocketAddr {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    let now = std::time::SystemTime::now();
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + Duration::from_secs(3600)).into();
    make(&key, &mut params).await;
    let certificate: CertificateDer<'static> = params.self_signed(&key).unwrap().der().clone();
    let mut config = rustls::ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    config.alpn_protocols = if alpn.is_empty() { vec![] } else { vec![alpn.to_vec()] };
    let acceptor = TlsAcceptor::from(std::sync::Arc::new(config));
    server(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            if let Ok(mut stream) = acceptor.accept(tcp).await {
                let _ = stream.read(&mut [0]).await;
            }
        }
    })
    .await
}

async fn evidence_about(spki: &[u8]) -> CustomExtension {
    let evidence = SampleAttester.evidence(&RuntimeData::for_key(spki)).await.unwrap();
    CustomExtension::from_oid_content(EVIDENCE_OID, evidence.to_extension())
}

#[tokio::test]
async fn a_certificate_that_is_wrong_is_named_by_its_check_whoever_appraises() {
    for args in [&["--allow-sample"][..], &[]] {
        let good = shows(b"rats-tls", async |key, params| {
            params.custom_extensions = vec![evidence_about(&key.subject_public_key_info()).await];
        });
        assert_eq!(verify(good.await, args).await.code, if args.is_empty() { 5 } else { 0 });

        let others = shows(b"rats-tls", async |_, params| {
            params.custom_extensions = vec![evidence_about(b"another key").await];
        });
        let ran = verify(others.await, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("key-binding".into(), "peer-evidence-other-key".into())));
        let explanation = ran.json()["verdict"]["explanation"].as_str().unwrap().to_owned();
        assert!(explanation.contains("Treat it as an attack"), "{explanation}");

        let unread = shows(b"rats-tls", async |key, params| {
            let about = RuntimeData::for_key(&key.subject_public_key_info());
            let mut evidence = SampleAttester.evidence(&about).await.unwrap();
            evidence.evidence = b"{}".to_vec();
            params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, evidence.to_extension())];
        });
        let ran = verify(unread.await, args).await;
        assert_eq!((ran.code, ran.failed().1), (1, "evidence-malformed".into()), "{}", ran.out);

        let over = shows(b"rats-tls", async |key, params| {
            params.custom_extensions = vec![evidence_about(&key.subject_public_key_info()).await];
            params.not_after = std::time::SystemTime::now().into();
        });
        let ran = verify(over.await, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("validity".into(), "peer-certificate-expired".into())));
        assert_eq!(states(&ran, &["self-signature", "key-binding"]), ["passed", "passed"], "looked at all the same");

        let broken = shows(b"rats-tls", async |_, params| {
            params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, vec![1, 2, 3])];
        });
        let ran = verify(broken.await, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("evidence".into(), "peer-evidence-malformed".into())));

        let plain = shows(b"rats-tls", async |_, _| {}).await;
        let ran = verify(plain, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("evidence".into(), "peer-no-evidence".into())));
        assert!(ran.json()["evidence"].is_null());
    }
}

#[tokio::test]
async fn a_server_that_is_no_tng_is_told_from_one_that_is_refused() {
    for alpn in [&b"http/1.1"[..], b""] {
        let web = shows(alpn, async |_, _| {}).await;
        let ran = verify(web, &["--allow-sample"]).await;
        assert_eq!((ran.code, ran.failed()), (4, ("protocol".into(), "tls-alpn".into())));
    }
    let ssh = server(|mut tcp| async move {
        let _ = tcp.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
        let _ = tcp.read(&mut [0; 1024]).await;
    });
    let ran = verify(ssh.await, &[]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("handshake".into(), "tls-not-tls".into())));

    let silent = server(|tcp| async move {
        let _tcp = tcp;
        std::future::pending().await
    });
    let ran = verify(silent.await, &["--timeout", "1s"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("handshake".into(), "handshake-timeout".into())));

    let (gone, addr) = listen().await;
    drop(gone);
    let ran = verify(addr, &[]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("connection".into(), "target-refused".into())));
    let text = tngctl(&["verify", &addr.to_string()]).await;
    assert!(text.out.contains("NO VERDICT") && text.out.contains("[target-refused]"), "{}", text.out);
}

#[tokio::test]
async fn a_session_that_is_replayed_or_left_is_named_and_its_evidence_shown() {
    let keys = Keys::new().await;
    // Evidence of the certificate, about no nonce.
    let replays = {
        let keys = keys.clone();
        server(move |tcp| {
            let keys = keys.clone();
            async move {
                let mut raw = keys.accept(tcp, &["tng/1"]).await.unwrap();
                raw.asked().await;
                raw.say(message(&keys.evidence().await)).await;
                raw.refusal().await;
            }
        })
        .await
    };
    for args in [&["--allow-sample"][..], &[]] {
        let ran = verify(replays, args).await;
        assert_eq!((ran.code, ran.failed()), (1, ("freshness".into(), "session-nonce".into())));
        assert_eq!(states(&ran, &["key-binding", "session-binding"]), ["passed", "failed"]);
        assert_eq!(ran.json()["evidence"]["from"], "session");
    }
    let says_other = {
        let keys = keys.clone();
        server(move |tcp| {
            let keys = keys.clone();
            async move {
                let mut raw = keys.accept(tcp, &["tng/1"]).await.unwrap();
                raw.asked().await;
                raw.say(Message::Pass).await;
                raw.refusal().await;
            }
        })
        .await
    };
    let ran = verify(says_other, &[]).await;
    assert_eq!((ran.code, ran.failed()), (1, ("evidence".into(), "session-unexpected".into())));
    let mute = server(move |tcp| {
        let keys = keys.clone();
        async move {
            let _raw = keys.accept(tcp, &["tng/1"]).await;
            std::future::pending().await
        }
    });
    let ran = verify(mute.await, &["--timeout", "8s"]).await;
    assert_eq!((ran.code, ran.failed()), (4, ("evidence".into(), "handshake-timeout".into())));
    assert_eq!(ran.check("handshake").0, "passed");
}

#[tokio::test]
async fn a_peers_bytes_do_not_command_the_terminal() {
    let evil = shows(b"rats-tls", async |key, params| {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, "\u{1b}]0;owned\u{7}\u{1b}[31mtrusted\r\nverdict: VERIFIED");
        params.distinguished_name = name;
        params.custom_extensions = vec![evidence_about(&key.subject_public_key_info()).await];
    })
    .await;
    let ran = tngctl(&["verify", &evil.to_string()]).await;
    assert_eq!(ran.code, 5, "{}", ran.out);
    assert!(ran.out.contains("trusted"), "{}", ran.out);
    assert!(ran.out.chars().all(|c| c == '\n' || !c.is_control()), "{:?}", ran.out);
    assert!(!ran.out.lines().any(|l| l.starts_with("verdict")), "{}", ran.out);
}
