//! ttrpc over a unix socket, as much as one unary call at a time needs.
//!
//! Frame: u32 payload length, u32 stream id, u8 type (1 request, 2 response), u8 flags, big endian; then a
//! protobuf message (containerd/ttrpc PROTOCOL.md).

use std::path::{Path, PathBuf};

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::AttestError;

/// Largest payload the protocol allows.
const MAX_PAYLOAD: usize = 4 << 20;
const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// gRPC code of a method the server does not have.
pub const UNIMPLEMENTED: i32 = 12;
/// gRPC code some servers answer instead (declared, not implemented).
pub const NOT_FOUND: i32 = 5;
/// Longest error text kept, characters.
const MAX_TEXT: usize = 200;

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    timeout_nano: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

struct Connection {
    stream: UnixStream,
    next_id: u32,
}

/// A client that connects when it is called and again after any failure.
pub struct Client {
    socket: PathBuf,
    connection: Mutex<Option<Connection>>,
}

enum CallError {
    /// The connection broke before an answer came: a new one may work.
    Broken(std::io::Error),
    /// An answer that cannot be understood.
    Garbage(&'static str),
}

fn frame(id: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(payload);
    out
}

fn request(id: u32, service: &str, method: &str, payload: Vec<u8>) -> Vec<u8> {
    let message = Request { service: service.into(), method: method.into(), payload, timeout_nano: 0 };
    frame(id, REQUEST, &message.encode_to_vec())
}

impl Connection {
    async fn call(&mut self, service: &str, method: &str, payload: Vec<u8>) -> Result<Response, CallError> {
        let id = self.next_id;
        // Clients use odd ids; a wrap would take four billion calls, a new connection starts over.
        self.next_id = id.wrapping_add(2);
        let bytes = request(id, service, method, payload);
        self.stream.write_all(&bytes).await.map_err(CallError::Broken)?;
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).await.map_err(CallError::Broken)?;
        let [l0, l1, l2, l3, i0, i1, i2, i3, kind, _flags] = header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(CallError::Garbage("an answer beyond 4 MiB"));
        }
        // One call at a time: every other id is out of order.
        if u32::from_be_bytes([i0, i1, i2, i3]) != id || kind != RESPONSE {
            return Err(CallError::Garbage("not the answer to the request"));
        }
        // Grown as bytes come: the length is the other side's word.
        let mut body = Vec::new();
        let got = (&mut self.stream).take(length as u64).read_to_end(&mut body).await.map_err(CallError::Broken)?;
        if got < length {
            return Err(CallError::Garbage("an answer cut short"));
        }
        Response::decode(&body[..]).map_err(|_| CallError::Garbage("an answer that is not protobuf"))
    }
}

impl Client {
    /// A client of the server at `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), connection: Mutex::new(None) }
    }

    fn unreachable(&self, e: &std::io::Error) -> AttestError {
        AttestError::AaUnreachable(format!("{}: {e}", self.socket.display()))
    }

    /// One unary call. The caller sets the deadline; a call that is cancelled closes its connection.
    pub async fn call(&self, service: &str, method: &str, payload: &impl Message) -> Result<Vec<u8>, AttestError> {
        let mut slot = self.connection.lock().await;
        let payload = payload.encode_to_vec();
        // Taken out while the call runs, so that a cancelled call leaves no half-read connection behind.
        if let Some(mut kept) = slot.take() {
            match kept.call(service, method, payload.clone()).await {
                Ok(response) => {
                    *slot = Some(kept);
                    return outcome(response);
                }
                Err(CallError::Garbage(what)) => return Err(AttestError::AaGarbage(what)),
                // The agent may have been restarted since: once more, over a new connection.
                Err(CallError::Broken(_)) => {}
            }
        }
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let mut fresh = Connection { stream, next_id: 1 };
        match fresh.call(service, method, payload).await {
            Ok(response) => {
                *slot = Some(fresh);
                outcome(response)
            }
            Err(CallError::Garbage(what)) => Err(AttestError::AaGarbage(what)),
            Err(CallError::Broken(e)) => Err(self.unreachable(&e)),
        }
    }
}

fn outcome(response: Response) -> Result<Vec<u8>, AttestError> {
    match response.status {
        Some(Status { code, message }) if code != 0 => {
            let message = message.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
            Err(AttestError::AaError { code, message })
        }
        _ => Ok(response.payload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "attestation_agent.AttestationAgentService";

    /// (name, request, answer) of each recorded exchange.
    fn recorded() -> Vec<(String, Vec<u8>, Vec<u8>)> {
        let text = include_str!("../../tests/fixtures/coco/aa-ttrpc-wire.txt");
        let hex = |s: &str| (0..s.len() / 2).map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap()).collect();
        text.split("### ")
            .skip(1)
            .map(|part| {
                let line = |mark: &str| hex(part.lines().find_map(|l| l.strip_prefix(mark)).unwrap());
                (part.lines().next().unwrap().to_owned(), line(">> "), line("<< "))
            })
            .collect()
    }

    #[test]
    fn requests_are_the_recorded_bytes() {
        let all = recorded();
        assert!(all.len() > 10);
        for (name, sent, _) in all {
            let message = Request::decode(&sent[HEADER..]).unwrap();
            assert_eq!(message.service, SERVICE, "{name}");
            assert_eq!(request(1, &message.service, &message.method, message.payload), sent, "{name}");
        }
    }

    #[test]
    fn recorded_answers_are_read() {
        for (name, _, answer) in recorded() {
            let result = outcome(Response::decode(&answer[HEADER..]).unwrap());
            let refused = ["GetToken", "BindInitData", "NoSuchMethod"].iter().any(|m| name.starts_with(m));
            assert_eq!(result.is_err(), refused, "{name}: {result:?}");
        }
    }
}
