//! Peers that do not play by the rules, each refused with its reason; the next good one is let in.

#[path = "common/tls.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{attest_sample, endpoint, endpoint_within, meet, pair, ra, verify_sample};
use rcgen::{CertificateParams, CustomExtension, KeyPair, PublicKeyData};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tng::attest::{Attester, EVIDENCE_OID, RuntimeData, SampleAttester};
use tng::tls::EndpointTls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

/// Shows a certificate as it is: rustls itself refuses to serve one of 10 MB.
#[derive(Debug)]
struct One(Arc<CertifiedKey>);

impl ResolvesServerCert for One {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

fn verifier() -> Arc<EndpointTls> {
    endpoint(ra(None, Some(verify_sample(true))))
}

fn new_key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

async fn evidence_for(key: &KeyPair) -> Vec<u8> {
    SampleAttester.evidence(&RuntimeData::for_key(&key.subject_public_key_info())).await.unwrap().to_extension()
}

fn now_valid() -> CertificateParams {
    let now = std::time::SystemTime::now();
    let mut params = CertificateParams::default();
    params.not_before = now.into();
    params.not_after = (now + Duration::from_secs(3600)).into();
    params
}

/// What a verifying client makes of a server that shows a certificate with this extension.
async fn shown(params: CertificateParams, key: KeyPair, extension: Option<Vec<u8>>, alpn: &[u8]) -> &'static str {
    shown_to(&verifier(), params, key, extension, alpn).await
}

/// The same of another client.
async fn shown_to(
    client: &EndpointTls,
    mut params: CertificateParams,
    key: KeyPair,
    extension: Option<Vec<u8>>,
    alpn: &[u8],
) -> &'static str {
    params.custom_extensions.extend(extension.map(|e| CustomExtension::from_oid_content(EVIDENCE_OID, e)));
    let der = params.self_signed(&key).unwrap().der().clone();
    let signer = any_ecdsa_type(&PrivatePkcs8KeyDer::from(key.serialize_der()).into()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(One(Arc::new(CertifiedKey::new(vec![der], signer)))));
    config.alpn_protocols = if alpn.is_empty() { vec![] } else { vec![alpn.to_vec()] };
    let (c, s) = pair().await;
    let server = tokio::spawn(async move {
        if let Ok(mut stream) = TlsAcceptor::from(Arc::new(config)).accept(s).await {
            let _ = stream.read(&mut [0]).await;
        }
    });
    let outcome = client.connect(c, None).await;
    let reason = outcome.as_ref().map_or_else(|e| e.reason(), |_| "ok");
    drop(outcome);
    server.await.unwrap();
    reason
}

#[tokio::test]
async fn certificates_are_refused_each_with_its_reason() {
    let key = new_key();
    let good = evidence_for(&key).await;
    assert_eq!(shown(now_valid(), key, Some(good), b"rats-tls").await, "ok");

    assert_eq!(shown(now_valid(), new_key(), None, b"rats-tls").await, "peer-no-evidence");
    let others = evidence_for(&new_key()).await;
    assert_eq!(shown(now_valid(), new_key(), Some(others), b"rats-tls").await, "peer-evidence-other-key");
    assert_eq!(shown(now_valid(), new_key(), Some(vec![0xff]), b"rats-tls").await, "peer-evidence-malformed");
    let token = vec![0xda, 0, 0xc0, 0xc0, 1, 0x82, 0x40, 0x40];
    assert_eq!(shown(now_valid(), new_key(), Some(token), b"rats-tls").await, "peer-evidence-passport");
    let foreign = vec![0xd9, 0xea, 0x60, 0x82, 0x40, 0x40];
    assert_eq!(shown(now_valid(), new_key(), Some(foreign), b"rats-tls").await, "peer-evidence-unknown-tag");

    let now = std::time::SystemTime::now();
    let at = |from: std::time::SystemTime, to: std::time::SystemTime| {
        let mut params = CertificateParams::default();
        params.not_before = from.into();
        params.not_after = to.into();
        params
    };
    let hour = Duration::from_secs(3600);
    for (params, reason) in [
        (at(now - hour, now - Duration::from_secs(1)), "peer-certificate-expired"),
        (at(now + hour, now + 2 * hour), "peer-certificate-not-yet-valid"),
        (at(now + hour / 20, now + 2 * hour), "ok"),
    ] {
        let key = new_key();
        let evidence = evidence_for(&key).await;
        assert_eq!(shown(params, key, Some(evidence), b"rats-tls").await, reason);
    }
}

/// The certificate of TNG 2.8: serial 42, its names, six hours, and an endorsement extension without content.
#[tokio::test]
async fn a_certificate_in_tngs_form_is_appraised() {
    let named = |name: &str| {
        let mut params = now_valid();
        params.serial_number = Some(42u64.into());
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "Inclavare Containers");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params
    };
    let form = || {
        let mut params = named("TNG");
        params.not_after = (std::time::SystemTime::now() + Duration::from_secs(6 * 3600)).into();
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 23, 133, 5, 4, 2], vec![])];
        params
    };
    let key = new_key();
    let good = evidence_for(&key).await;
    assert_eq!(shown(form(), key, Some(good), b"rats-tls").await, "ok");
    // An operator's own claims stand beside the key's.
    let key = new_key();
    let bound = RuntimeData::for_key(&key.subject_public_key_info());
    let mut more = bound.object().clone();
    more.insert("a-claim".into(), "of the operator".into());
    let text = serde_json::Value::Object(more).to_string();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA384, text.as_bytes());
    let report = base64::prelude::Engine::encode(&base64::prelude::BASE64_STANDARD, digest);
    let evidence = tng::attest::Evidence {
        tee: "sample".into(),
        evidence: format!(r#"{{"report_data":"{report}","svn":"1"}}"#).into_bytes(),
        additional: None,
        runtime_data: text,
    };
    assert_eq!(shown(form(), key, Some(evidence.to_extension()), b"rats-tls").await, "ok");
    assert_eq!(shown(form(), new_key(), None, b"rats-tls").await, "peer-no-evidence");
}

/// A side of TNG 2.8 that does not attest shows the certificate of a CA that everybody has.
#[tokio::test]
async fn a_peer_without_evidence_is_taken_by_who_asks_for_none() {
    let form = || {
        let mut params = now_valid();
        params.not_before = rcgen::date_time_ymd(2024, 6, 12);
        params.not_after = rcgen::date_time_ymd(3023, 10, 14);
        params.distinguished_name.push(rcgen::DnType::CommonName, "TNG Dummy Cert");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
    };
    for asks_for_none in [ra(Some(attest_sample()), None), ra(None, None)] {
        let client = endpoint(asks_for_none);
        assert_eq!(shown_to(&client, form(), new_key(), None, b"rats-tls").await, "ok");
    }
    assert_eq!(shown(form(), new_key(), None, b"rats-tls").await, "peer-no-evidence");
}

#[tokio::test]
async fn another_application_protocol_or_none_is_refused() {
    for (alpn, expected) in [(&b"http/1.1"[..], "tls-alpn"), (b"", "tls-alpn"), (b"h2", "ok"), (b"rats-tls", "ok")] {
        let key = new_key();
        let evidence = evidence_for(&key).await;
        assert_eq!(shown(now_valid(), key, Some(evidence), alpn).await, expected);
    }
}

#[tokio::test]
async fn ten_megabytes_of_certificate_are_refused_early() {
    let big = vec![0; 10 << 20];
    assert_eq!(shown(now_valid(), new_key(), Some(big), b"rats-tls").await, "tls-certificate-too-large");
}

#[tokio::test]
async fn plain_tcp_a_closing_and_a_silent_peer_are_refused_on_both_sides() {
    let both = || ra(Some(attest_sample()), Some(verify_sample(true)));
    let endpoint = endpoint_within(both(), Duration::from_millis(300));
    for as_client in [true, false] {
        let meet_with = async |bytes: Option<&[u8]>, close: bool| {
            let (ours, mut theirs) = pair().await;
            if let Some(bytes) = bytes {
                theirs.write_all(bytes).await.unwrap();
            }
            if close {
                theirs.shutdown().await.unwrap();
            }
            let outcome = if as_client { endpoint.connect(ours, None).await } else { endpoint.accept(ours).await };
            drop(theirs);
            outcome.err().unwrap().reason()
        };
        assert_eq!(meet_with(Some(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), false).await, "tls-not-tls");
        assert_eq!(meet_with(Some(b"SSH-2.0-OpenSSH_9.2\r\n"), false).await, "tls-not-tls");
        assert_eq!(meet_with(None, true).await, "tls-closed");
        assert_eq!(meet_with(None, false).await, "handshake-timeout");
    }
    let (c, s) = meet(&endpoint, &endpoint).await;
    c.unwrap();
    s.unwrap();
    let refused = endpoint.status().refused;
    assert_eq!((refused["tls-not-tls"], refused["tls-closed"], refused["handshake-timeout"]), (4, 2, 2));
}
