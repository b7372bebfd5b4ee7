//! Appraisal by a CoCo Attestation Service over REST.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, DATE, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::anchors::Anchors;
use super::connector::Connector;
use super::{Clock, Evidence, RuntimeData, TokenIssuer, Verdict, Verifier, VerifyError, devices, token};
use crate::config::{AsRest, Mark, Verify};
use crate::relay::{Dialer, MarkPolicy, probe_mark};

/// Largest answer taken. Tokens with a TDX event log are about 50 KiB.
const MAX_ANSWER: usize = 1 << 20;
/// How long anchors fetched from the service itself are used.
const ANCHORS_TTL: Duration = Duration::from_secs(600);
/// The service's signer may have changed: anchors are fetched again for an untrusted one, but no more often.
const ANCHORS_MIN_AGE: Duration = Duration::from_secs(10);
/// Longest error text kept, characters.
const MAX_TEXT: usize = 200;

/// A verifier that asks an Attestation Service.
pub struct AsVerifier {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
    base: String,
    /// Values are wiped on drop and appear in no output.
    headers: Vec<(HeaderName, Zeroizing<Vec<u8>>)>,
    policy_ids: Vec<String>,
    allow_sample: bool,
    timeout: Duration,
    pinned: Option<Arc<Anchors>>,
    fetched: Mutex<Option<(Instant, Arc<Anchors>)>>,
    clock: Arc<dyn Clock>,
    calls: AtomicU64,
}

/// What the attestation service showed of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AsSeen {
    /// Whom its tokens must be signed by, in words.
    pub anchors: String,
    /// Its clock, by the Date header of its answer (RFC 9110, 6.6.1).
    pub date: Option<SystemTime>,
}

struct Answer {
    status: StatusCode,
    date: Option<SystemTime>,
    grpc: bool,
    body: Bytes,
}

fn shorten(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect();
    clean.trim().to_owned()
}

impl AsVerifier {
    /// A verifier over the service of `rest`. Fails on what no waiting heals: an unreadable anchor file, an
    /// illegal header, an https service and no system roots. Its sockets carry `mark`, so that a capture on this
    /// host never takes them; a process that may not mark goes without, since no capture depends on it.
    pub fn new(verify: &Verify, rest: &AsRest, mark: Mark, clock: Arc<dyn Clock>) -> Result<Self, String> {
        let headers = rest
            .headers
            .iter()
            .map(|(name, value)| {
                // The value is not named in the error: it may be secret.
                let illegal = || format!("as_headers: \"{name}\" is not a legal header");
                HeaderValue::from_str(value).map_err(|_| illegal())?;
                let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| illegal())?;
                Ok((parsed, Zeroizing::new(value.as_bytes().to_vec())))
            })
            .collect::<Result<_, String>>()?;
        let pinned = if rest.trusted_certs.is_empty() {
            None
        } else {
            Some(Arc::new(Anchors::from_files(&rest.trusted_certs)?))
        };
        Ok(Self {
            client: client(rest.addr.scheme() == "https", dialer(mark, rest.timeout)?)?,
            base: rest.addr.as_str().trim_end_matches('/').to_owned(),
            headers,
            policy_ids: verify.policy_ids.clone(),
            allow_sample: verify.allow_sample,
            timeout: rest.timeout,
            pinned,
            fetched: Mutex::new(None),
            clock,
            calls: AtomicU64::new(0),
        })
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, VerifyError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in &self.headers {
            let mut value = HeaderValue::from_bytes(value).map_err(|_| VerifyError::Internal)?;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::from(body)).map_err(|_| VerifyError::Internal)?;
        let response = self.client.request(request).await.map_err(|e| failure(&e))?;
        let status = response.status();
        let content_type = response.headers().get(CONTENT_TYPE).map(|v| v.as_bytes().starts_with(b"application/grpc"));
        let date = response.headers().get(DATE).and_then(|v| httpdate::parse_http_date(v.to_str().ok()?).ok());
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| {
            if e.is::<LengthLimitError>() {
                VerifyError::AsGarbage("an answer beyond 1 MiB".into())
            } else {
                VerifyError::AsUnreachable("the answer broke off".into())
            }
        })?;
        Ok(Answer { status, date, grpc: content_type == Some(true), body: body.to_bytes() })
    }

    async fn token(&self, evidence: &Evidence) -> Result<String, VerifyError> {
        let request = |piece: devices::Piece| {
            json!({
                "tee": piece.tee,
                "evidence": BASE64_URL_SAFE_NO_PAD.encode(&piece.evidence),
                "runtime_data": { "structured": piece.runtime_data },
                "runtime_data_hash_algorithm": "sha384",
            })
        };
        let all: Vec<_> = devices::pieces(evidence)?.into_iter().map(request).collect();
        let body = json!({ "verification_requests": all, "policy_ids": self.policy_ids });
        let mut answer = self.send(Method::POST, "/attestation", Some(&body)).await?;
        let old = !answer.status.is_success() && String::from_utf8_lossy(&answer.body).contains("missing field `tee`");
        if old {
            // A service before 1.6 takes one flat request: of devices its token then says nothing.
            let mut flat = all.into_iter().next().ok_or(VerifyError::Internal)?;
            flat["policy_ids"] = json!(self.policy_ids);
            answer = self.send(Method::POST, "/attestation", Some(&flat)).await?;
        }
        read_token(answer)
    }

    async fn anchors(&self, refresh: bool) -> Result<Arc<Anchors>, VerifyError> {
        if let Some(pinned) = &self.pinned {
            return Ok(pinned.clone());
        }
        let kept = self.fetched.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let longest = if refresh { ANCHORS_MIN_AGE } else { ANCHORS_TTL };
        if let Some((at, anchors)) = kept
            && at.elapsed() < longest
        {
            return Ok(anchors);
        }
        let anchors = Arc::new(self.fetch_anchors().await?);
        *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), anchors.clone()));
        Ok(anchors)
    }

    async fn fetch_anchors(&self) -> Result<Anchors, VerifyError> {
        let jwks = self.send(Method::GET, "/.well-known/jwks.json", None).await?;
        if jwks.status.is_success()
            && let Some(found) = Anchors::from_jwks(&jwks.body, format!("JWKS of {}", self.base))
        {
            return Ok(found);
        }
        let pem = self.send(Method::GET, "/certificate", None).await?;
        if pem.status.is_success()
            && let Some(found) = Anchors::from_pem(&pem.body, format!("certificate of {}", self.base))
        {
            return Ok(found);
        }
        Err(VerifyError::TokenUntrustedSigner("the service names no signer and trusted_certs is empty".into()))
    }

    /// Asks the service for what it says about its signer, whatever the configured anchors are.
    ///
    /// # Errors
    /// It cannot be reached, is not who its address says, or is no attestation service: it names no signer although
    /// no anchors are configured.
    pub async fn reach(&self) -> Result<AsSeen, VerifyError> {
        let work = async {
            let date = self.send(Method::GET, "/.well-known/jwks.json", None).await?.date;
            let anchors = self.anchors(false).await?.origin().to_owned();
            Ok(AsSeen { anchors, date })
        };
        tokio::time::timeout(self.timeout, work).await.unwrap_or(Err(VerifyError::AsTimeout))
    }

    async fn ask(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let text = self.token(evidence).await?;
        self.judge(&text, expected).await
    }

    async fn judge(&self, text: &str, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let wanted = token::Expected {
            runtime_data: expected.object(),
            policy_ids: &self.policy_ids,
            allow_sample: self.allow_sample,
        };
        let anchors = self.anchors(false).await?;
        match token::verify(text, &anchors, &wanted, self.clock.now()) {
            Err(VerifyError::TokenUntrustedSigner(_)) if self.pinned.is_none() => {
                let anchors = self.anchors(true).await?;
                token::verify(text, &anchors, &wanted, self.clock.now())
            }
            other => other,
        }
    }
}

pub(super) fn dialer(mark: Mark, timeout: Duration) -> Result<Dialer, String> {
    let mark = match probe_mark(mark) {
        Ok(()) => MarkPolicy::Required(mark),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => MarkPolicy::Unmarked,
        Err(e) => return Err(format!("cannot mark a socket: {e}")),
    };
    // A dead address leaves time for the next one.
    Ok(Dialer { mark, connect_timeout: timeout / 3 })
}

fn client(https: bool, dialer: Dialer) -> Result<Client<HttpsConnector<Connector>, Full<Bytes>>, String> {
    let mut roots = rustls::RootCertStore::empty();
    // Loading the system's roots costs 35 ms; a plain-http service needs none.
    if https {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err("as_addr is https and the system has no root certificates".into());
        }
    }
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(Connector(dialer));
    Ok(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(4).build(connector))
}

fn failure(e: &hyper_util::client::legacy::Error) -> VerifyError {
    let mut text = e.to_string();
    let (mut garbage, mut tls) = (false, false);
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        tls |= is_tls(inner);
        garbage |= inner.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse);
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    match (garbage, tls) {
        (true, _) => VerifyError::AsGarbage("not HTTP".into()),
        (_, true) => VerifyError::AsTls(shorten(&text)),
        _ => VerifyError::AsUnreachable(shorten(&text)),
    }
}

/// An [`std::io::Error`] hides what it wraps from `source`.
fn is_tls(e: &(dyn std::error::Error + 'static)) -> bool {
    let wrapped = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    e.is::<rustls::Error>() || wrapped.is_some_and(|inner| is_tls(inner))
}

fn read_token(answer: Answer) -> Result<String, VerifyError> {
    let text = String::from_utf8_lossy(&answer.body);
    if !answer.status.is_success() {
        // The service has no code for "refused": only this text tells it from a service that is broken.
        return Err(if text.contains("Verifier evaluate failed") {
            VerifyError::AsRejected(shorten(&text))
        } else {
            VerifyError::AsError { status: answer.status.as_u16(), text: shorten(&text) }
        });
    }
    if answer.grpc {
        return Err(VerifyError::AsGarbage("as_addr is a gRPC service, as_type = \"rest\" needs the REST one".into()));
    }
    let text = text.trim();
    if !token::looks_like_jwt(text) {
        return Err(VerifyError::AsGarbage("the answer is not a token".into()));
    }
    Ok(text.to_owned())
}

#[async_trait]
impl TokenIssuer for AsVerifier {
    async fn issue(&self, evidence: &Evidence) -> Result<String, VerifyError> {
        tokio::time::timeout(self.timeout, self.token(evidence)).await.unwrap_or(Err(VerifyError::AsTimeout))
    }
}

#[async_trait]
impl Verifier for AsVerifier {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        tokio::time::timeout(self.timeout, self.ask(evidence, expected)).await.unwrap_or(Err(VerifyError::AsTimeout))
    }
    async fn check_token(&self, token: &str, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        tokio::time::timeout(self.timeout, self.judge(token, expected)).await.unwrap_or(Err(VerifyError::AsTimeout))
    }
    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
    fn provider(&self) -> &'static str {
        "as"
    }
    fn trust_anchor(&self) -> String {
        if let Some(pinned) = &self.pinned {
            return pinned.origin().to_owned();
        }
        let fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.as_ref().map_or_else(|| format!("not yet fetched from {}", self.base), |(_, a)| a.origin().to_owned())
    }
}
