//! The attestation service at its worst: what it may send, how it is trusted, and what it is told.

#[path = "common/tls.rs"]
mod common;
mod fakes;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{attest_sample, endpoint, meet, ra, verify_sample};
use fakes::as_rest::{FakeAs, Mode as As};
use tng::config::*;
use tng::tls::{ChannelError, Peer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const AFFIRMING: As = As::Status("affirming");
const SECRET: &str = "secret-value-of-a-header";

fn verify_at(addr: url::Url, trusted: bool) -> Verify {
    Verify {
        provider: VerifyProvider::As(AsService {
            headers: vec![("x-api-key".into(), SECRET.into())],
            trusted: TrustedSigners::certs(if trusted { vec![fakes::fixture("as-ca.pem")] } else { vec![] }),
            timeout: Duration::from_secs(1),
            ..AsService::at(addr)
        }),
        ..verify_sample(true)
    }
}

/// What a verifying client makes of an honest server: the trust anchor, or why there is no channel.
async fn appraised(verify: Verify) -> Result<String, ChannelError> {
    let client = endpoint(ra(None, Some(verify)));
    let server = endpoint(ra(Some(attest_sample()), None));
    let (channel, _) = meet(&client, &server).await;
    match channel?.peer {
        Peer::Verified(verdict) => Ok(verdict.trust_anchor.clone()),
        Peer::Unverified => panic!("not verified"),
    }
}

async fn reason(verify: Verify) -> &'static str {
    appraised(verify).await.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn without_a_key_set_the_services_certificate_is_the_anchor() {
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    let verify = || verify_at(service.url(), false);
    assert!(appraised(verify()).await.unwrap().starts_with("JWKS of "));
    service.set(As::CertificateOnly);
    assert!(appraised(verify()).await.unwrap().starts_with("certificate of "));
    service.set(As::OthersCertificate);
    assert_eq!(reason(verify()).await, "token-untrusted-signer");
    service.set(As::NoAnchors);
    assert_eq!(reason(verify()).await, "token-untrusted-signer");
    // Neither matters to who has anchors of his own.
    assert_eq!(reason(verify_at(service.url(), true)).await, "ok");
}

#[tokio::test]
async fn tokens_are_read_up_to_the_bound_and_not_beyond() {
    let service = FakeAs::start("127.0.0.1:0", As::Padded(700 << 10)).await;
    assert_eq!(reason(verify_at(service.url(), true)).await, "ok", "933 KiB as base64");
    service.set(As::Padded(900 << 10));
    let error = appraised(verify_at(service.url(), true)).await.unwrap_err();
    assert_eq!(error.reason(), "as-too-large");
    assert!(error.to_string().contains("1 MiB"), "{error}");
}

#[tokio::test]
async fn an_answer_that_stalls_after_its_head_is_told_from_one_that_never_comes() {
    let service = FakeAs::start("127.0.0.1:0", As::Stalls).await;
    assert_eq!(reason(verify_at(service.url(), true)).await, "as-stalled");
    service.set(As::Silent);
    assert_eq!(reason(verify_at(service.url(), true)).await, "as-timeout");
    service.set(AFFIRMING);
    assert_eq!(reason(verify_at(service.url(), true)).await, "ok");
}

#[tokio::test]
async fn a_redirect_is_an_error_and_nobody_follows_it() {
    let service = FakeAs::start("127.0.0.1:0", As::Redirect).await;
    let error = appraised(verify_at(service.url(), true)).await.unwrap_err();
    assert_eq!(error.reason(), "as-error");
    assert!(error.to_string().contains("307"), "{error}");
    assert!(service.last_head().starts_with("POST /attestation "), "{}", service.last_head());
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// One thread, so that everything the appraisal logs goes to this test's subscriber.
#[tokio::test(flavor = "current_thread")]
async fn headers_reach_the_service_and_nothing_else() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let _installed = tracing::subscriber::set_default(subscriber);
    tracing::trace!("the log is on");
    let service = FakeAs::start("127.0.0.1:0", AFFIRMING).await;
    for mode in [AFFIRMING, As::NoPolicy, As::NotHttp, As::Stalls] {
        service.set(mode);
        let verify = verify_at(service.url(), true);
        let shown = format!("{verify:?}");
        let client = endpoint(ra(None, Some(verify)));
        let server = endpoint(ra(Some(attest_sample()), None));
        let outcome = meet(&client, &server).await.0;
        let error = outcome.err().map(|e| format!("{e} {e:?}")).unwrap_or_default();
        assert!(service.last_head().contains(&format!("x-api-key: {SECRET}")));
        let status = serde_json::to_string(&client.status()).unwrap();
        for text in [shown, error, status] {
            assert!(!text.contains(SECRET), "{text}");
        }
    }
    let log = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(log.contains("the log is on"));
    assert!(!log.contains(SECRET), "{log}");
}

/// A server that speaks TLS with a certificate of nobody's.
async fn stranger() -> url::Url {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = acceptor.accept(tcp).await;
        }
    });
    format!("https://localhost:{port}/").parse().unwrap()
}

#[tokio::test]
async fn a_service_whose_certificate_nobody_vouches_for_is_told_apart_from_one_that_is_down() {
    let error = appraised(verify_at(stranger().await, true)).await.unwrap_err();
    assert_eq!(error.reason(), "as-tls", "{error}");
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");

    let banner = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let not_tls = banner.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = banner.accept().await {
            let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    assert_eq!(reason(verify_at(format!("https://{not_tls}/").parse().unwrap(), true)).await, "as-tls");

    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_eq!(reason(verify_at(format!("https://{closed}/").parse().unwrap(), true)).await, "as-unreachable");
}
