//! Frames and messages of ttrpc (containerd/ttrpc PROTOCOL.md).
//!
//! Frame: u32 payload length, u32 stream id, u8 type (1 request, 2 response), u8 flags, big endian; then a
//! protobuf message.

use std::time::Duration;

use prost::Message;

use crate::attest::AttestError;

/// Largest payload the protocol allows.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Bytes of a frame's header.
pub const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// Longest error text kept, characters.
const MAX_TEXT: usize = 200;

/// A call.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Fully qualified service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Bare name of the method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// Its message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// When the server gives up, nanoseconds; 0: never.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// How a call ended.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    /// gRPC code; 0: good.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// Text of the error.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The answer to a call.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// Absent or code 0: good.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// Its message.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the message.
    pub length: usize,
    /// Stream it belongs to.
    pub id: u32,
}

/// Reads the header of an answer.
///
/// # Errors
/// Not an answer, or longer than the protocol allows.
pub fn answer_header(bytes: [u8; HEADER]) -> Result<Header, &'static str> {
    let [l0, l1, l2, l3, i0, i1, i2, i3, kind, _flags] = bytes;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_PAYLOAD {
        return Err("an answer beyond 4 MiB");
    }
    if kind != RESPONSE {
        return Err("not the answer to a request");
    }
    Ok(Header { length, id: u32::from_be_bytes([i0, i1, i2, i3]) })
}

fn frame(id: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(payload);
    out
}

/// The frame of a unary call. The server gives up after `timeout`; zero: never.
pub fn request(id: u32, service: &str, method: &str, payload: Vec<u8>, timeout: Duration) -> Vec<u8> {
    let timeout_nano = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
    let message = Request { service: service.into(), method: method.into(), payload, timeout_nano };
    frame(id, REQUEST, &message.encode_to_vec())
}

/// The payload of an answer, or the error it carries.
pub fn outcome(response: Response) -> Result<Vec<u8>, AttestError> {
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
    use crate::attest::changes::{CASES, change};
    use proptest::prelude::*;

    const SERVICE: &str = "attestation_agent.AttestationAgentService";

    /// (name, request, answer) of each recorded exchange.
    fn recorded() -> Vec<(String, Vec<u8>, Vec<u8>)> {
        let text = include_str!("../../../tests/fixtures/coco/aa-ttrpc-wire.txt");
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
            assert_eq!(request(1, &message.service, &message.method, message.payload, Duration::ZERO), sent, "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]

        #[test]
        fn no_changed_frame_panics_or_reads_as_longer_than_allowed(which in 0usize..64, change in change()) {
            static ANSWERS: std::sync::LazyLock<Vec<Vec<u8>>> =
                std::sync::LazyLock::new(|| recorded().into_iter().map(|(_, _, answer)| answer).collect());
            let bad = change.of(&ANSWERS[which % ANSWERS.len()]);
            let Some((head, body)) = bad.split_first_chunk::<HEADER>() else { return Ok(()) };
            if let Ok(header) = answer_header(*head) {
                prop_assert!(header.length <= MAX_PAYLOAD && head[8] == RESPONSE);
            }
            if let Ok(response) = Response::decode(body)
                && let Err(AttestError::AaError { message, .. }) = outcome(response)
            {
                prop_assert!(message.chars().count() <= MAX_TEXT && !message.contains(char::is_control));
            }
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
