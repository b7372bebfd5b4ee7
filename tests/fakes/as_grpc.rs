//! The gRPC face of the attestation service: package `attestation`, service `AttestationService`, by hand on HTTP/2.

use std::collections::HashMap;
use std::io::Cursor;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::appraiser::{Asked, Device, Mode, Refusal, appraise};
use super::as_rest::Shared;

const ABORTED: u16 = 10;
const UNIMPLEMENTED: u16 = 12;
const INTERNAL: u16 = 13;
const UNAVAILABLE: u16 = 14;

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum RuntimeData {
    #[prost(string, tag = "4")]
    Raw(String),
    #[prost(string, tag = "5")]
    Structured(String),
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum InitData {
    #[prost(string, tag = "6")]
    Digest(String),
    #[prost(string, tag = "7")]
    Toml(String),
}

#[derive(Clone, PartialEq, Message)]
pub struct IndividualAttestationRequest {
    #[prost(string, tag = "1")]
    pub tee: String,
    #[prost(string, tag = "3")]
    pub evidence: String,
    #[prost(oneof = "RuntimeData", tags = "4, 5")]
    pub runtime_data: Option<RuntimeData>,
    #[prost(oneof = "InitData", tags = "6, 7")]
    pub init_data: Option<InitData>,
    #[prost(string, tag = "8")]
    pub runtime_data_hash_algorithm: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct AttestationRequest {
    #[prost(message, repeated, tag = "1")]
    pub verification_requests: Vec<IndividualAttestationRequest>,
    #[prost(string, repeated, tag = "2")]
    pub policy_ids: Vec<String>,
}

/// Before 1.6.
#[derive(Clone, PartialEq, Message)]
pub struct FlatRequest {
    #[prost(string, tag = "1")]
    pub tee: String,
    #[prost(string, tag = "2")]
    pub evidence: String,
    #[prost(string, optional, tag = "3")]
    pub raw_runtime_data: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub structured_runtime_data: Option<String>,
    #[prost(string, optional, tag = "5")]
    pub raw_init_data: Option<String>,
    #[prost(string, optional, tag = "6")]
    pub structured_init_data: Option<String>,
    #[prost(string, tag = "7")]
    pub runtime_data_hash_algorithm: String,
    #[prost(string, tag = "8")]
    pub init_data_hash_algorithm: String,
    #[prost(string, repeated, tag = "9")]
    pub policy_ids: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct AttestationResponse {
    #[prost(string, tag = "1")]
    pub attestation_token: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ChallengeRequest {
    #[prost(map = "string, string", tag = "1")]
    pub inner: HashMap<String, String>,
}

/// A stream of which some bytes were read already.
struct Begun<T>(Cursor<Vec<u8>>, T);

impl<T: AsyncRead + Unpin> AsyncRead for Begun<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let Self(begin, rest) = self.get_mut();
        if (begin.position() as usize) < begin.get_ref().len() {
            return Pin::new(begin).poll_read(cx, buf);
        }
        Pin::new(rest).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Begun<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.1).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.1).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.1).poll_shutdown(cx)
    }
}

pub(super) async fn serve<T>(mut stream: T, begin: Vec<u8>, shared: Arc<Shared>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if shared.mode() == Mode::NotHttp {
        use tokio::io::AsyncWriteExt;
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
        let _ = stream.read(&mut [0; 1024]).await;
        return;
    }
    let Ok(mut connection) = h2::server::handshake(Begun(Cursor::new(begin), stream)).await else { return };
    let mut calls = tokio::task::JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        calls.spawn(call(request, respond, shared.clone()));
    }
}

fn trailers(code: u16, text: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.to_string().parse().unwrap());
    if !text.is_empty() {
        // Percent-encoded, as the protocol wants it for all but visible ASCII.
        let byte = |b: u8| match b {
            b' '..=b'$' | b'&'..=b'~' => (b as char).to_string(),
            _ => format!("%{b:02X}"),
        };
        trailers.insert("grpc-message", text.bytes().map(byte).collect::<String>().parse().unwrap());
    }
    trailers
}

async fn call(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>, shared: Arc<Shared>) {
    let (head, mut body) = request.into_parts();
    let mut shown = format!("{} {} HTTP/2\r\n", head.method, head.uri.path());
    for (name, value) in &head.headers {
        shown.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap_or("?")));
    }
    *shared.headers.lock().unwrap() = shown;
    shared.requests.fetch_add(1, Ordering::SeqCst);
    let mut data = Vec::new();
    while let Some(Ok(chunk)) = body.data().await {
        data.extend_from_slice(&chunk);
        let _ = body.flow_control().release_capacity(chunk.len());
    }
    let is_grpc = head.headers.get("content-type").is_some_and(|v| v == "application/grpc");
    assert!(is_grpc && head.headers.get("te").is_some_and(|v| v == "trailers"), "{:?}", head.headers);
    assert_eq!((data[0], data.len() - 5), (0, u32::from_be_bytes(data[1..5].try_into().unwrap()) as usize));
    let mode = shared.mode();
    let outcome = match head.uri.path() {
        "/attestation.AttestationService/AttestationEvaluate" => {
            shared.appraisals.fetch_add(1, Ordering::SeqCst);
            match mode {
                Mode::Silent => std::future::pending().await,
                Mode::Slow => tokio::time::sleep(std::time::Duration::from_millis(300)).await,
                Mode::Drops => return respond.send_reset(h2::Reason::CANCEL),
                Mode::Html => {
                    let page = Response::builder().header("content-type", "text/html").body(()).unwrap();
                    let mut stream = respond.send_response(page, false).unwrap();
                    let _ = stream.send_data("<html></html>".into(), true);
                    return;
                }
                _ => {}
            }
            evaluate(mode, &shared, &data[5..])
        }
        "/attestation.AttestationService/GetAttestationChallenge" => match ChallengeRequest::decode(&data[5..]) {
            Ok(asked) if asked.inner.contains_key("tee") => Ok(Vec::new()),
            Ok(_) => Err((ABORTED, "Error parse inner_tee tee".to_owned())),
            Err(e) => Err((INTERNAL, format!("failed to decode Protobuf message: {e}"))),
        },
        _ => Err((UNIMPLEMENTED, String::new())),
    };
    let clock = std::time::SystemTime::now();
    let off = std::time::Duration::from_secs(mode.clock().unsigned_abs());
    let date = httpdate::fmt_http_date(if mode.clock() < 0 { clock - off } else { clock + off });
    let answer = Response::builder().header("content-type", "application/grpc").header("date", date);
    match outcome {
        // An error without a message has its status in the head, as tonic writes it.
        Err((code, text)) => {
            let mut answer = answer.body(()).unwrap();
            answer.headers_mut().extend(trailers(code, &text));
            let _ = respond.send_response(answer, true);
        }
        Ok(message) => {
            let Ok(mut stream) = respond.send_response(answer.body(()).unwrap(), false) else { return };
            let mut framed = vec![0];
            framed.extend((message.len() as u32).to_be_bytes());
            framed.extend(message);
            if mode == Mode::Stalls {
                framed.truncate(20);
                let _ = stream.send_data(framed.into(), false);
                return std::future::pending().await;
            }
            let _ = stream.send_data(framed.into(), false);
            let _ = stream.send_trailers(trailers(0, ""));
        }
    }
}

fn evaluate(mode: Mode, shared: &Shared, data: &[u8]) -> Result<Vec<u8>, (u16, String)> {
    match mode {
        Mode::Unavailable => return Err((UNAVAILABLE, "try again".into())),
        Mode::Absent => return Err((UNIMPLEMENTED, String::new())),
        Mode::BadRequest => return Err((ABORTED, "No verification requests provided.".into())),
        Mode::Garbage => return Ok(AttestationResponse { attestation_token: "not a token".into() }.encode_to_vec()),
        _ => {}
    }
    let bad = |name: &str, e: prost::DecodeError| (INTERNAL, format!("failed to decode Protobuf message: {name}: {e}"));
    let asked = if matches!(mode, Mode::OldApi | Mode::Openanolis { flat: true }) {
        let asked = FlatRequest::decode(data).map_err(|e| bad("AttestationRequest", e))?;
        Asked {
            tee: asked.tee,
            evidence: asked.evidence,
            structured: serde_json::from_str(&asked.structured_runtime_data.unwrap_or_default()).unwrap_or_default(),
            hash: asked.runtime_data_hash_algorithm,
            policy_ids: asked.policy_ids,
            devices: Vec::new(),
        }
    } else {
        let asked = AttestationRequest::decode(data).map_err(|e| bad("AttestationRequest", e))?;
        let mut all = asked.verification_requests.into_iter().map(|one| {
            let structured = match one.runtime_data {
                Some(RuntimeData::Structured(text)) => serde_json::from_str(&text).unwrap_or_default(),
                _ => serde_json::Value::Null,
            };
            Device { tee: one.tee, evidence: one.evidence, structured, hash: one.runtime_data_hash_algorithm }
        });
        let Some(Device { tee, evidence, structured, hash }) = all.next() else {
            return Err((ABORTED, "No verification requests provided.".into()));
        };
        Asked { tee, evidence, structured, hash, policy_ids: asked.policy_ids, devices: all.collect() }
    };
    // Both lines spell Azure's TEEs without separators here.
    let recorded = |name: &str| super::text(name).split_once('\n').unwrap().1.to_owned();
    let outcome = appraise(mode, &shared.signer, &asked, true);
    if let (Mode::Openanolis { flat: false }, Err(refusal)) = (mode, &outcome) {
        // The words of that line, as they were seen.
        let text = match refusal {
            Refusal::Evidence => {
                "Evidence's identity verification error. REPORT_DATA is different from that in evidence"
            }
            Refusal::Rejected => "Evidence's identity verification error. missing field `measure_register`",
            Refusal::Policy => "Failed to read attestation service policy file: No such file or directory (os error 2)",
            Refusal::Request(_) => "",
        };
        if !text.is_empty() {
            return Err((ABORTED, text.to_owned()));
        }
    }
    match outcome {
        Ok(attestation_token) => Ok(AttestationResponse { attestation_token }.encode_to_vec()),
        Err(Refusal::Evidence) => Err((ABORTED, recorded("grpc-sample-ERR-tampered.error.txt"))),
        Err(Refusal::Rejected) => Err((
            ABORTED,
            // The recorded words of the SEV-SNP verifier, in the frame of the recorded gRPC errors.
            "Attestation evaluation failed: \n0: Verifier evaluate failed: Attestation Report version is too old. \
             Please update your firmware."
                .into(),
        )),
        Err(Refusal::Policy) => Err((ABORTED, recorded("grpc-sample-ERR-policy.error.txt"))),
        Err(Refusal::Request(tee)) => {
            let text = recorded("grpc-sample-plus-device.error.txt").replace("sampledevice", &tee);
            Err((ABORTED, text.trim().to_owned()))
        }
    }
}
