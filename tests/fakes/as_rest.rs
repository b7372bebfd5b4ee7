//! An attestation service over REST: appraises sample evidence and signs a fresh token.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// How the service behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Appraises; the status is this.
    Status(&'static str),
    /// Refuses all evidence, with the recorded text.
    Rejected,
    /// The recorded 400.
    BadRequest,
    /// The recorded 500 of an unknown policy.
    NoPolicy,
    /// 200 and no token.
    Garbage,
    /// Bytes that are no HTTP.
    NotHttp,
    /// 200 and a page.
    Html,
    /// Reads and never answers.
    Silent,
    /// A token that is over.
    Expired,
    /// Affirms for so many seconds.
    Short(u64),
    /// Affirms the TEE and warns of the devices.
    DeviceWarning,
    /// A token about other runtime data.
    WrongRuntimeData,
    /// A token under another policy.
    WrongPolicy,
    /// A token signed with a key nobody vouches for.
    Stranger,
    /// Knows only the flat request of old services.
    OldApi,
    /// Appraises after a pause of 300 ms.
    Slow,
    /// Affirms, with so many bytes more in the token.
    Padded(usize),
    /// Sends the head of an answer and never its body.
    Stalls,
    /// Sends the client elsewhere.
    Redirect,
    /// Affirms; has no key set, but the certificates of its signer.
    CertificateOnly,
    /// The same with somebody else's certificate.
    OthersCertificate,
    /// Affirms; tells nobody who signs.
    NoAnchors,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "affirming" => Self::Status("affirming"),
            "warning" => Self::Status("warning"),
            "none" => Self::Status("none"),
            "contraindicated" => Self::Status("contraindicated"),
            "rejected" => Self::Rejected,
            "bad-request" => Self::BadRequest,
            "no-policy" => Self::NoPolicy,
            "garbage" => Self::Garbage,
            "not-http" => Self::NotHttp,
            "html" => Self::Html,
            "silent" => Self::Silent,
            "expired" => Self::Expired,
            "wrong-runtime-data" => Self::WrongRuntimeData,
            "wrong-policy" => Self::WrongPolicy,
            "stranger" => Self::Stranger,
            "old-api" => Self::OldApi,
            "slow" => Self::Slow,
            other => return Err(format!("unknown mode {other}")),
        })
    }
}

struct Signer {
    key: EcdsaKeyPair,
    chain: Vec<String>,
}

impl Signer {
    fn load() -> Self {
        let key = PrivatePkcs8KeyDer::from_pem_slice(super::text("as-signer.key.TEST-ONLY.pem").as_bytes()).unwrap();
        let pem = super::text("as-signer-chain.pem");
        let mut chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).map(|c| c.unwrap()).collect();
        chain.extend(CertificateDer::pem_slice_iter(super::text("as-ca.pem").as_bytes()).map(|c| c.unwrap()));
        Self {
            key: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_pkcs8_der()).unwrap(),
            chain: chain.iter().take(2).map(|c| BASE64_STANDARD.encode(c)).collect(),
        }
    }
    fn stranger(&self) -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        Self { key, chain: self.chain.clone() }
    }
    fn jwk(&self) -> Value {
        let point = self.key.public_key().as_ref();
        let part = |range| BASE64_URL_SAFE_NO_PAD.encode(&point[range]);
        json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "x": part(1..33), "y": part(33..65), "x5c": self.chain })
    }
    fn token(&self, claims: &Value) -> String {
        let header = json!({ "typ": "JWT", "alg": "ES256", "jwk": self.jwk() });
        let encode = |v: &Value| BASE64_URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", encode(&header), encode(claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
}

struct Shared {
    mode: Mutex<Mode>,
    signer: Signer,
    appraisals: AtomicU64,
    headers: Mutex<String>,
    body: Mutex<Vec<u8>>,
}

/// A running service; gone when dropped.
pub struct FakeAs {
    pub addr: SocketAddr,
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
        let listener = TcpListener::bind(listen).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            mode: Mutex::new(mode),
            signer: Signer::load(),
            appraisals: AtomicU64::new(0),
            headers: Mutex::default(),
            body: Mutex::default(),
        });
        let s = shared.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, s.clone()));
            }
        });
        Self { addr, shared, task: task.abort_handle() }
    }
    pub fn url(&self) -> url::Url {
        format!("http://{}/", self.addr).parse().unwrap()
    }
    pub fn set(&self, mode: Mode) {
        *self.shared.mode.lock().unwrap() = mode;
    }
    /// Requests for an appraisal so far.
    pub fn appraisals(&self) -> u64 {
        self.shared.appraisals.load(Ordering::SeqCst)
    }
    /// The newest request for an appraisal.
    pub fn last_request(&self) -> Value {
        serde_json::from_slice(&self.shared.body.lock().unwrap()).unwrap_or_default()
    }
    /// Head of the newest request.
    pub fn last_head(&self) -> String {
        self.shared.headers.lock().unwrap().clone()
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
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
    let mode = *shared.mode.lock().unwrap();
    let keys = !matches!(mode, Mode::CertificateOnly | Mode::OthersCertificate | Mode::NoAnchors);
    let (status, text) = if head.starts_with("GET /certificate ") && mode == Mode::CertificateOnly {
        ("200 OK", super::text("as-signer-chain.pem"))
    } else if head.starts_with("GET /certificate ") && mode == Mode::OthersCertificate {
        ("200 OK", rcgen::generate_simple_self_signed(vec!["other".to_owned()]).unwrap().cert.pem())
    } else if head.starts_with("GET /.well-known/jwks.json ") && keys {
        ("200 OK", json!({ "keys": [shared.signer.jwk()] }).to_string())
    } else if head.starts_with("POST /attestation ") {
        shared.appraisals.fetch_add(1, Ordering::SeqCst);
        match mode {
            Mode::Silent => std::future::pending().await,
            Mode::Slow => tokio::time::sleep(std::time::Duration::from_millis(300)).await,
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
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len());
    let _ = stream.write_all(answer.as_bytes()).await;
}

/// Body of a recorded answer, without the head.
fn recorded_body(name: &str) -> String {
    super::text(name).split_once("\n\n").unwrap().1.to_owned()
}

/// The evidence of a request for `tee`, if its report data is the digest of the runtime data that comes with it.
fn sampled(request: &Value, tee: &str) -> Option<Value> {
    let evidence = BASE64_URL_SAFE_NO_PAD.decode(request["evidence"].as_str()?).ok()?;
    let evidence: Value = serde_json::from_slice(&evidence).ok()?;
    let claims = request["runtime_data"]["structured"].to_string();
    let report = BASE64_STANDARD.encode(digest::digest(&digest::SHA384, claims.as_bytes()));
    let good = request["tee"] == tee && request["runtime_data_hash_algorithm"] == "sha384";
    (good && evidence["report_data"] == *report).then_some(evidence)
}

fn attestation(mode: Mode, signer: &Signer, body: &[u8]) -> (&'static str, String) {
    const ERROR: &str = "500 Internal Server Error";
    match mode {
        Mode::Rejected => return (ERROR, recorded_body("as-sample-ERR-tampered-runtime.response.txt")),
        Mode::NoPolicy => return (ERROR, recorded_body("as-sample-ERR-unknown-policy.response.txt")),
        Mode::BadRequest => {
            return (
                "400 Bad Request",
                "Json deserialize error: missing field `policy_ids` at line 1 column 96".into(),
            );
        }
        Mode::Garbage => return ("200 OK", "\u{0}\u{1}not a token".into()),
        Mode::Html => return ("200 OK", "<html><body>Welcome to nginx!</body></html>".into()),
        _ => {}
    }
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return ("400 Bad Request", "Json deserialize error: expected ident at line 1 column 2".into());
    };
    let one = match (mode, request.get("verification_requests")) {
        (Mode::OldApi, Some(_)) => {
            return ("400 Bad Request", "Json deserialize error: missing field `tee` at line 1 column 9".into());
        }
        (Mode::OldApi, None) => &request,
        (_, Some(list)) => {
            for device in list.as_array().into_iter().flatten().skip(1) {
                if sampled(device, "sampledevice").is_none() {
                    return (ERROR, recorded_body("as-sample-ERR-tampered-runtime.response.txt"));
                }
            }
            &list[0]
        }
        (_, None) => {
            return (
                "400 Bad Request",
                "Json deserialize error: missing field `verification_requests` at line 1 column 93".into(),
            );
        }
    };
    let evidence = match sampled(one, "sample") {
        Some(evidence) => evidence,
        None => return (ERROR, recorded_body("as-sample-ERR-tampered-runtime.response.txt")),
    };
    let claims = &one["runtime_data"]["structured"];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let iat = if mode == Mode::Expired { now - 600 } else { now };
    let claims = if mode == Mode::WrongRuntimeData { json!({ "pubkey-hash": "other" }) } else { claims.clone() };
    let policy = request["policy_ids"][0].as_str().unwrap_or("default").to_owned();
    let policy = if mode == Mode::WrongPolicy { "another".to_owned() } else { policy };
    let status = if let Mode::Status(s) = mode { s } else { "affirming" };
    let padding = if let Mode::Padded(bytes) = mode { "x".repeat(bytes) } else { String::new() };
    let submod = |status: &str, tee: &str, claims: &Value, evidence: &Value| {
        json!({
            "ear.status": status,
            "ear.trustworthiness-vector": { "executables": 2 },
            "ear.appraisal-policy-id": policy,
            "ear.veraison.annotated-evidence": {
                "report_data": evidence["report_data"],
                "runtime_data_claims": claims,
                tee: { "svn": evidence["svn"], "debug": false },
            },
        })
    };
    let mut submods = serde_json::Map::new();
    submods.insert("cpu0".into(), submod(status, "sample", &claims, &evidence));
    let devices = request["verification_requests"].as_array().into_iter().flatten().skip(1);
    for (n, device) in devices.enumerate() {
        let status = if mode == Mode::DeviceWarning { "warning" } else { status };
        let claims = &device["runtime_data"]["structured"];
        let evidence = sampled(device, "sampledevice").unwrap_or_default();
        submods.insert(format!("gpu{n}"), submod(status, "sampledevice", claims, &evidence));
    }
    let life = if let Mode::Short(seconds) = mode { seconds } else { 300 };
    let token = json!({
        "padding": padding,
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iat": iat,
        "exp": iat + life,
        "iss": "CoCo-Attestation-Service",
        "ear.verifier-id": { "developer": "https://confidentialcontainers.org", "build": "attestation-service 0.1.0" },
        "submods": submods,
    });
    let token = if mode == Mode::Stranger { signer.stranger().token(&token) } else { signer.token(&token) };
    ("200 OK", token)
}
