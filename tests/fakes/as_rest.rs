//! An attestation service on a port: over REST as `restful-as`, over gRPC as `grpc-as`.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

pub use super::appraiser::Mode;
use super::appraiser::{Asked, Device, KID, Refusal, Signer, appraise};
use super::as_grpc;

/// What the port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serves {
    /// HTTP/1.1; a client that begins with HTTP/2 waits in vain, as recorded.
    Rest,
    /// gRPC; and over HTTP/1.1 the key set, and to all else an empty answer with a gRPC status, as recorded.
    Grpc,
    /// gRPC; who begins otherwise is hung up on.
    GrpcAlone,
}

pub(super) struct Shared {
    pub mode: Mutex<Mode>,
    pub signer: Signer,
    pub appraisals: AtomicU64,
    pub requests: AtomicU64,
    pub headers: Mutex<String>,
    pub body: Mutex<Vec<u8>>,
}

impl Shared {
    pub fn mode(&self) -> Mode {
        *self.mode.lock().unwrap()
    }
}

/// A running service; gone when dropped.
pub struct FakeAs {
    pub addr: SocketAddr,
    tls: bool,
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Drop for FakeAs {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeAs {
    pub async fn start(listen: &str, mode: Mode) -> Self {
        Self::start_as(listen, mode, Serves::Rest, None).await
    }
    /// One whose tokens nobody trusts who was not told of its key.
    pub async fn start_with_its_own_key(listen: &str, mode: Mode) -> Self {
        Self::start_signing(listen, mode, Serves::Rest, None, Signer::load().stranger()).await
    }
    /// The same in another protocol.
    pub async fn start_with_its_own_key_as(listen: &str, mode: Mode, serves: Serves) -> Self {
        Self::start_signing(listen, mode, serves, None, Signer::load().stranger()).await
    }
    pub async fn start_as(listen: &str, mode: Mode, serves: Serves, tls: Option<TlsAcceptor>) -> Self {
        Self::start_signing(listen, mode, serves, tls, Signer::load()).await
    }
    async fn start_signing(listen: &str, mode: Mode, serves: Serves, tls: Option<TlsAcceptor>, signer: Signer) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            mode: Mutex::new(mode),
            signer,
            appraisals: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            headers: Mutex::default(),
            body: Mutex::default(),
        });
        let (s, is_tls) = (shared.clone(), tls.is_some());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (s, tls) = (s.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, s, serves).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, s, serves).await;
                            }
                        }
                    }
                });
            }
        });
        Self { addr, tls: is_tls, shared, task: task.abort_handle() }
    }
    pub fn url(&self) -> url::Url {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}/", self.addr).parse().unwrap()
    }
    /// The key that it signs with.
    pub fn jwk(&self) -> Value {
        self.shared.signer.jwk(false)
    }
    /// SHA-256 of it.
    pub fn pin(&self) -> [u8; 32] {
        self.shared.signer.pin()
    }
    pub fn set(&self, mode: Mode) {
        *self.shared.mode.lock().unwrap() = mode;
    }
    /// Requests for an appraisal so far.
    pub fn appraisals(&self) -> u64 {
        self.shared.appraisals.load(Ordering::SeqCst)
    }
    /// Requests of any kind so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }
    /// The newest request for an appraisal.
    pub fn last_request(&self) -> Value {
        serde_json::from_slice(&self.shared.body.lock().unwrap()).unwrap_or_default()
    }
    /// Tokens made so far.
    pub fn issued(&self) -> Vec<String> {
        self.shared.signer.issued()
    }
    /// Head of the newest request.
    pub fn last_head(&self) -> String {
        self.shared.headers.lock().unwrap().clone()
    }
}

/// First bytes of HTTP/2 (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0";

async fn serve<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(mut stream: T, shared: Arc<Shared>, serves: Serves) {
    let mut buffer = Vec::new();
    while buffer.len() < PREFACE.len() {
        if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
            return;
        }
    }
    match (serves, buffer.starts_with(PREFACE)) {
        (Serves::Rest, true) => {
            // What it reads is no request that it would ever answer.
            while stream.read_buf(&mut buffer).await.unwrap_or(0) > 0 {
                buffer.clear();
            }
        }
        (Serves::Rest, false) => http1(stream, buffer, shared, false).await,
        (Serves::Grpc, false) => http1(stream, buffer, shared, true).await,
        (Serves::GrpcAlone, false) => {
            // SETTINGS, as a server of HTTP/2 begins.
            let _ = stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
        }
        (Serves::Grpc | Serves::GrpcAlone, true) => as_grpc::serve(stream, buffer, shared).await,
    }
}

async fn http1<T: AsyncRead + AsyncWrite + Unpin>(mut stream: T, mut buffer: Vec<u8>, shared: Arc<Shared>, grpc: bool) {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
            return;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
    let length = head.lines().find_map(|l| {
        l.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse::<usize>().unwrap())
    });
    while buffer.len() < head_end + length.unwrap_or(0) {
        if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
            return;
        }
    }
    *shared.headers.lock().unwrap() = head.clone();
    if head.starts_with("POST ") {
        *shared.body.lock().unwrap() = buffer[head_end..].to_vec();
    }
    shared.requests.fetch_add(1, Ordering::SeqCst);
    let mode = shared.mode();
    let keys =
        !matches!(mode, Mode::CertificateOnly | Mode::OthersCertificate | Mode::NoAnchors | Mode::Openanolis { .. });
    let mut kind = "";
    let (status, text) = if mode == Mode::Absent && !grpc {
        ("404 Not Found", String::new())
    } else if head.starts_with("GET /.well-known/jwks.json ") && keys {
        ("200 OK", json!({ "keys": [shared.signer.jwk(false)] }).to_string())
    } else if head.starts_with("GET /named.json ") {
        let mut jwk = shared.signer.jwk(false);
        jwk["kid"] = KID.into();
        ("200 OK", json!({ "keys": [{ "kty": "RSA", "n": "AQ", "e": "AQAB" }, jwk] }).to_string())
    } else if grpc {
        kind = "content-type: application/grpc\r\ngrpc-status: 12\r\n";
        ("200 OK", String::new())
    } else if head.starts_with("GET /certificate ") && matches!(mode, Mode::CertificateOnly | Mode::Openanolis { .. }) {
        ("200 OK", super::text("as-signer-chain.pem"))
    } else if head.starts_with("GET /certificate ") && mode == Mode::OthersCertificate {
        ("200 OK", rcgen::generate_simple_self_signed(vec!["other".to_owned()]).unwrap().cert.pem())
    } else if head.starts_with("POST /attestation ") {
        shared.appraisals.fetch_add(1, Ordering::SeqCst);
        match mode {
            Mode::Silent => std::future::pending().await,
            Mode::Slow => tokio::time::sleep(std::time::Duration::from_millis(300)).await,
            Mode::Drops => return,
            Mode::NotHttp => {
                let _ = stream.write_all(b"\x15\x03\x01\x00\x02\x02\x46 this is no HTTP\r\n\r\n").await;
                return;
            }
            Mode::Stalls => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\neyJ0").await;
                std::future::pending().await
            }
            Mode::Redirect => {
                let head = "HTTP/1.1 307 Temporary Redirect\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n";
                let _ = stream.write_all(head.as_bytes()).await;
                return;
            }
            _ => {}
        }
        attestation(mode, &shared.signer, &buffer[head_end..])
    } else {
        ("404 Not Found", String::new())
    };
    let clock = SystemTime::now();
    let off = std::time::Duration::from_secs(mode.clock().unsigned_abs());
    let date = httpdate::fmt_http_date(if mode.clock() < 0 { clock - off } else { clock + off });
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n{kind}date: {date}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    let _ = stream.write_all(answer.as_bytes()).await;
}

/// Body of a recorded answer, without the head.
fn recorded_body(name: &str) -> String {
    super::text(name).split_once("\n\n").unwrap().1.to_owned()
}

const ERROR: &str = "500 Internal Server Error";
const BAD_REQUEST: &str = "400 Bad Request";

fn device_of(request: &Value) -> Device {
    let text = |key: &str| request[key].as_str().unwrap_or_default().to_owned();
    Device {
        tee: text("tee"),
        evidence: text("evidence"),
        structured: request["runtime_data"]["structured"].clone(),
        hash: text("runtime_data_hash_algorithm"),
    }
}

fn attestation(mode: Mode, signer: &Signer, body: &[u8]) -> (&'static str, String) {
    match mode {
        Mode::BadRequest => {
            return (BAD_REQUEST, "Json deserialize error: missing field `policy_ids` at line 1 column 96".into());
        }
        Mode::Unavailable => return ("503 Service Unavailable", "try again".into()),
        Mode::Garbage => return ("200 OK", "\u{0}\u{1}not a token".into()),
        Mode::Html => return ("200 OK", "<html><body>Welcome to nginx!</body></html>".into()),
        _ => {}
    }
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return (BAD_REQUEST, "Json deserialize error: expected ident at line 1 column 2".into());
    };
    let flat = matches!(mode, Mode::OldApi | Mode::Openanolis { flat: true });
    let one = match (flat, request.get("verification_requests")) {
        (true, Some(_)) => {
            return (BAD_REQUEST, "Json deserialize error: missing field `tee` at line 1 column 9".into());
        }
        (true, None) => &request,
        (false, Some(list)) => &list[0],
        (false, None) => {
            let text = "Json deserialize error: missing field `verification_requests` at line 1 column 93";
            return (BAD_REQUEST, text.into());
        }
    };
    if request.get("policy_ids").is_none() {
        // Recorded of both lines.
        if mode == (Mode::Openanolis { flat: false }) {
            let problem = json!({ "type": "https://github.com/confidential-containers/attestation-service/errors/BadRequest",
                "title": "Invalid JSON request", "status": 400, "code": "AS.REQUEST.INVALID_JSON",
                "detail": "The request body is not valid JSON for this endpoint.", "retryable": false, "field": "body" });
            return (BAD_REQUEST, problem.to_string());
        }
        return (BAD_REQUEST, "Json deserialize error: missing field `policy_ids` at line 1 column 29".into());
    }
    let devices = request["verification_requests"].as_array().and_then(|list| list.get(1..)).unwrap_or_default();
    let text = |key: &str| one[key].as_str().unwrap_or_default().to_owned();
    let asked = Asked {
        tee: text("tee"),
        evidence: text("evidence"),
        structured: one["runtime_data"]["structured"].clone(),
        hash: text("runtime_data_hash_algorithm"),
        policy_ids: serde_json::from_value(request["policy_ids"].clone()).unwrap(),
        devices: devices.iter().map(device_of).collect(),
    };
    let openanolis = matches!(mode, Mode::Openanolis { .. });
    let refusal = match appraise(mode, signer, &asked, openanolis) {
        Ok(token) => return ("200 OK", token),
        Err(refusal) => refusal,
    };
    if mode == (Mode::Openanolis { flat: false }) {
        let (head, status, code) = match refusal {
            Refusal::Evidence => ("422 Unprocessable Entity", 422, "AS.EVIDENCE.BINDING_MISMATCH"),
            Refusal::Rejected => ("422 Unprocessable Entity", 422, "AS.EVIDENCE.VERIFICATION_FAILED"),
            Refusal::Policy => (ERROR, 500, "AS.INTERNAL.ERROR"),
            Refusal::Request(_) => (BAD_REQUEST, 400, "AS.REQUEST.UNSUPPORTED_TEE"),
        };
        let problem = json!({ "type": "about:blank", "title": "x", "status": status, "code": code,
            "detail": "Words that may change.", "retryable": false, "request_id": "b08e8f11" });
        return (head, problem.to_string());
    }
    let error = match refusal {
        Refusal::Evidence => recorded_body("as-sample-ERR-tampered-runtime.response.txt"),
        Refusal::Rejected => super::text("as-snp-ERR-wrong-rd.response.txt").split_once('\n').unwrap().1.to_owned(),
        Refusal::Policy => recorded_body("as-sample-ERR-unknown-policy.response.txt"),
        Refusal::Request(what) => format!("An internal error occured: \n0: tee `{what} not supported`"),
    };
    (ERROR, error)
}
