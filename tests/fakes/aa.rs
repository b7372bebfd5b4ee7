//! An attestation agent without a TEE, over ttrpc on a unix socket.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use base64::prelude::{BASE64_STANDARD, Engine};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;

/// The recording of evidence whose report data is a SHA-384 digest, as of a certificate's claims.
const OTHER_KEYS_EVIDENCE: &str = "GetEvidence 1=hex:59e1748777448c69de6b800d7a33bbfb9ff1b463e44354c3553bcdb9c666fa90125a3c79f90397bdf5f6a13de828684f";

/// The recording of an agent without devices.
const NO_DEVICE: &str = "GetAdditionalEvidence 1=hex:59e1748777448c69de6b800d7a33bbfb9ff1b463e44354c3553bcdb9c666fa90125a3c79f90397bdf5f6a13de828684f";

/// How the agent behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Sample evidence.
    Good,
    /// The same with a sample device.
    Device,
    /// The same whose evidence is made over nothing, as TNG 2.8 asks for it.
    UnboundDevice,
    /// Sample evidence with so many bytes more, to be as large as that of a real TEE.
    Padded(usize),
    /// Sample evidence for report data that was recorded elsewhere: evidence of another key.
    OtherKey,
    /// Of a TPM, whose quote another one that begins meanwhile makes fail.
    Tpm,
    /// The recorded answer to a call that failed inside the agent.
    Error,
    /// GetTeeType answered as an unknown method was.
    OldAgent,
    /// Bytes that are no frame.
    Garbage,
    /// A frame whose message is no protobuf.
    BadMessage,
    /// A header that announces 4 GiB.
    Huge,
    /// Reads and never answers.
    Silent,
    /// Closes after the request.
    Hangup,
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "good" => Self::Good,
            "device" => Self::Device,
            "other-key" => Self::OtherKey,
            "error" => Self::Error,
            "old-agent" => Self::OldAgent,
            "garbage" => Self::Garbage,
            "bad-message" => Self::BadMessage,
            "huge" => Self::Huge,
            "silent" => Self::Silent,
            "hangup" => Self::Hangup,
            other => return Err(format!("unknown mode {other}")),
        })
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct Request {
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(string, tag = "2")]
    pub method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Field1 {
    #[prost(bytes = "vec", tag = "1")]
    value: Vec<u8>,
}

/// (name, request frame, answer frame) of each recorded exchange.
pub fn recorded() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    recorded_in("aa-ttrpc-wire.txt")
}

/// The same of one file.
pub fn recorded_in(file: &str) -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let hex = |s: &str| (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect();
    let text = super::text(file);
    let parts = text.split("### ").skip(1);
    parts
        .map(|part| {
            let line = |mark: &str| hex(part.lines().find_map(|l| l.strip_prefix(mark)).unwrap());
            (part.lines().next().unwrap().to_owned(), line(">> "), line("<< "))
        })
        .collect()
}

fn recorded_answer(name: &str) -> Vec<u8> {
    recorded().into_iter().find(|(n, _, _)| n == name).unwrap_or_else(|| panic!("no recording of {name}")).2
}

fn answer(body: &[u8]) -> Vec<u8> {
    let mut out = (body.len() as u32).to_be_bytes().to_vec();
    out.extend([0, 0, 0, 1, 2, 0]);
    out.extend(body);
    out
}

/// A good answer with these bytes. An empty status stands first in every one.
fn good(bytes: Vec<u8>) -> Vec<u8> {
    let payload = Field1 { value: bytes }.encode_to_vec();
    let mut body = vec![0x0a, 0x00, 0x12];
    prost::encoding::encode_varint(payload.len() as u64, &mut body);
    body.extend(payload);
    answer(&body)
}

/// The agent's answer to a request, stream id 1.
pub fn reply(mode: Mode, request: &Request) -> Vec<u8> {
    match (mode, request.method.as_str()) {
        (Mode::Error, _) => recorded_answer("GetToken"),
        (Mode::OldAgent, "GetTeeType") => recorded_answer("NoSuchMethod"),
        (Mode::Tpm, "GetTeeType") => good(b"tpm".to_vec()),
        (_, "GetTeeType") => recorded_answer("GetTeeType"),
        (Mode::OtherKey, "GetEvidence") => recorded_answer(OTHER_KEYS_EVIDENCE),
        (_, "GetEvidence") => {
            let data = BASE64_STANDARD.encode(Field1::decode(&request.payload[..]).unwrap().value);
            let padding = match mode {
                Mode::Padded(bytes) => format!(r#","padding":"{}""#, "x".repeat(bytes)),
                _ => String::new(),
            };
            good(format!(r#"{{"report_data":"{data}","svn":"1"{padding}}}"#).into_bytes())
        }
        (Mode::Device | Mode::UnboundDevice, "GetAdditionalEvidence") => {
            let data = Field1::decode(&request.payload[..]).unwrap().value;
            let data = if mode == Mode::Device { data } else { Vec::new() };
            let evidence = format!(r#"{{"report_data":"{}","svn":"2"}}"#, BASE64_STANDARD.encode(data));
            good(format!(r#"{{"sampledevice":{evidence}}}"#).into_bytes())
        }
        (Mode::Good | Mode::Padded(_), "GetAdditionalEvidence") => recorded_answer(NO_DEVICE),
        _ => recorded_answer("NoSuchMethod"),
    }
}

/// A running agent; gone when dropped.
pub struct FakeAa {
    pub socket: PathBuf,
    mode: Arc<Mutex<Mode>>,
    requests: Arc<AtomicU64>,
    made: Arc<Mutex<Vec<Vec<u8>>>>,
    task: AbortHandle,
}

impl Drop for FakeAa {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl FakeAa {
    pub fn start(socket: &Path, mode: Mode) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let mode = Arc::new(Mutex::new(mode));
        let requests = Arc::new(AtomicU64::new(0));
        let made = Arc::new(Mutex::new(Vec::new()));
        let evidence = made.clone();
        let (m, r) = (mode.clone(), requests.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, m.clone(), r.clone(), evidence.clone()));
            }
        });
        Self { socket: socket.to_owned(), mode, requests, made, task: task.abort_handle() }
    }
    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
    /// Report data that evidence was asked for so far.
    pub fn asked_over(&self) -> Vec<Vec<u8>> {
        self.made.lock().unwrap().clone()
    }
    /// Requests read so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

type Made = Arc<Mutex<Vec<Vec<u8>>>>;

/// Whether nobody asked for another quote while one was made.
async fn alone(made: &Made) -> bool {
    let before = made.lock().unwrap().len();
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    made.lock().unwrap().len() == before
}

async fn serve(mut stream: UnixStream, mode: Arc<Mutex<Mode>>, requests: Arc<AtomicU64>, made: Made) {
    loop {
        let mut header = [0; 10];
        if stream.read_exact(&mut header).await.is_err() {
            return;
        }
        let mut body = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        requests.fetch_add(1, Ordering::SeqCst);
        let mode = *mode.lock().unwrap();
        let mut bytes = match mode {
            Mode::Silent => std::future::pending().await,
            Mode::Hangup => return,
            Mode::Garbage => b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            Mode::BadMessage => answer(&[0xff; 12]),
            Mode::Huge => vec![0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0],
            _ => {
                let request = Request::decode(&body[..]).unwrap();
                if request.method == "GetEvidence" {
                    made.lock().unwrap().push(Field1::decode(&request.payload[..]).unwrap().value);
                }
                match mode == Mode::Tpm && request.method == "GetEvidence" && !alone(&made).await {
                    true => reply(Mode::Error, &request),
                    false => reply(mode, &request),
                }
            }
        };
        if mode != Mode::Garbage {
            bytes[4..8].copy_from_slice(&header[4..8]);
        }
        if stream.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Asks an agent for evidence with no regard to others; whether there was some.
pub async fn quote(socket: &Path, data: u8) -> bool {
    let payload = Field1 { value: vec![data; 48] }.encode_to_vec();
    let service = "attestation_agent.AttestationAgentService".to_owned();
    let body = Request { service, method: "GetEvidence".into(), payload }.encode_to_vec();
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend([0, 0, 0, 1, 1, 0]);
    frame.extend(body);
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(&frame).await.unwrap();
    let mut header = [0; 10];
    stream.read_exact(&mut header).await.unwrap();
    let mut answer = vec![0; u32::from_be_bytes(header[..4].try_into().unwrap()) as usize];
    stream.read_exact(&mut answer).await.unwrap();
    // An empty status stands first in every good one.
    answer.starts_with(&[0x0a, 0x00])
}
