//! CoCo's HTTP API server in front of an agent without a TEE, as api-server-rest behaves.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// How the server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As of today.
    Good,
    /// The same with a sample device.
    Device,
    /// Before `encoding`: the text of the query is the runtime data.
    TextOnly,
    /// Before `/info`.
    NoInfo,
    /// Started without an agent.
    NoAgent,
    /// Started as it is by default, to serve resources.
    Resource,
    /// The agent failed.
    Error,
    /// To a client off the host.
    Forbidden,
    /// 200 and a page.
    Html,
    /// Bytes that are no HTTP.
    NotHttp,
    /// Reads and never answers.
    Silent,
    /// Sends the head of an answer and never its body.
    Stalls,
    /// Announces and sends 5 MiB.
    Huge,
    /// Closes after the request.
    Hangup,
}

/// A running server; gone when dropped.
pub struct FakeAsr {
    pub addr: SocketAddr,
    mode: Arc<Mutex<Mode>>,
    requests: Arc<Mutex<Vec<String>>>,
    task: AbortHandle,
}

impl Drop for FakeAsr {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeAsr {
    pub async fn start(mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (mode, requests) = (Arc::new(Mutex::new(mode)), Arc::<Mutex<Vec<String>>>::default());
        let (m, r) = (mode.clone(), requests.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, m.clone(), r.clone()));
            }
        });
        Self { addr, mode, requests, task: task.abort_handle() }
    }
    pub fn url(&self) -> url::Url {
        format!("http://{}/", self.addr).parse().unwrap()
    }
    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
    /// Request lines so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(mut stream: TcpStream, mode: Arc<Mutex<Mode>>, requests: Arc<Mutex<Vec<String>>>) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
        requests.lock().unwrap().push(line.clone());
        let mode = *mode.lock().unwrap();
        match mode {
            Mode::Silent => std::future::pending().await,
            Mode::Hangup => return,
            Mode::NotHttp => {
                let _ = stream.write_all(b"\x00\x00\x00\x0c no HTTP\r\n\r\n").await;
                return;
            }
            Mode::Stalls => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{").await;
                std::future::pending().await
            }
            _ => {}
        }
        let (status, body) = answer(mode, &line);
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        if stream.write_all(&[head.as_bytes(), &body].concat()).await.is_err() {
            return;
        }
    }
}

/// `decode_runtime_data` of the server: base64url without padding, or the text itself.
fn runtime_data(mode: Mode, query: &str) -> Option<Vec<u8>> {
    let of = |key: &str| query.split('&').find_map(|p| p.strip_prefix(key)?.strip_prefix('='));
    let text = of("runtime_data")?;
    match of("encoding").filter(|_| mode != Mode::TextOnly) {
        None => Some(text.as_bytes().to_vec()),
        Some("base64") => BASE64_URL_SAFE_NO_PAD.decode(text).ok(),
        Some(_) => None,
    }
}

fn answer(mode: Mode, line: &str) -> (&'static str, Vec<u8>) {
    let (method, rest) = line.split_once(' ').unwrap_or_default();
    let target = rest.split(' ').next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match mode {
        Mode::Forbidden => return ("403 Forbidden", b"Forbidden".to_vec()),
        Mode::Html => return ("200 OK", b"<html><body>Welcome to nginx!</body></html>".to_vec()),
        Mode::Huge => return ("200 OK", vec![b' '; 5 << 20]),
        _ if method != "GET" => return ("405 Method Not Allowed", b"Method Not Allowed".to_vec()),
        _ => {}
    }
    let sample = |svn: &str| {
        let data = runtime_data(mode, query)?;
        Some(format!(r#"{{"report_data":"{}","svn":"{svn}"}}"#, BASE64_STANDARD.encode(data)).into_bytes())
    };
    let bad = ("400 Bad Request", b"BAD REQUEST".to_vec());
    match (path, mode) {
        ("/info", Mode::NoInfo) => ("404 Not Found", b"URL NOT FOUND".to_vec()),
        ("/info", Mode::NoAgent) => ("200 OK", json!({ "version": "v0.21.0", "feature": "all" }).to_string().into()),
        ("/info", Mode::Resource) => {
            ("200 OK", json!({ "version": "v0.21.0", "feature": "resource" }).to_string().into())
        }
        ("/aa/evidence" | "/aa/additional-evidence", Mode::Resource) => {
            ("404 Not Found", b"Attestation Feature Not Enabled".to_vec())
        }
        ("/info", _) => {
            let mut info = json!({ "version": "v0.21.0", "tee": "sample", "feature": "attestation" });
            if mode == Mode::Device {
                info["additional_tees"] = json!(["sampledevice"]);
            }
            ("200 OK", info.to_string().into())
        }
        (_, Mode::Error) => {
            let text = "rpc status: Status { code: INTERNAL, message: \"[ERROR:attestation-agent] AA-KBC get evidence failed\" }";
            ("500 Internal Server Error", text.into())
        }
        ("/aa/evidence", _) => sample("1").map_or(bad, |e| ("200 OK", e)),
        ("/aa/additional-evidence", Mode::Device) => {
            let wrap = |e: Vec<u8>| [b"{\"sampledevice\":", &e[..], b"}"].concat();
            sample("2").map_or(bad, |e| ("200 OK", wrap(e)))
        }
        ("/aa/additional-evidence", _) => ("200 OK", Vec::new()),
        _ => ("404 Not Found", b"URL NOT FOUND".to_vec()),
    }
}
