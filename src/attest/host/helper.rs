//! The helper: a process of root's that makes evidence over 64 bytes which the data plane gives it, and does nothing else.
//!
//! One connection is one request of [`REQUEST_LEN`] bytes, after which the client shuts down its side: `tngE`, version
//! 1, provider (1 configfs-tsm, 2 TPM), two zero bytes, 64 bytes of report data. The answer is JSON and ends with the
//! connection: `{"evidence": {"tee": ..., "evidence": ...}}` or `{"failure": {...}}`. How evidence is made (device, key,
//! PCRs) is the helper's own configuration: who may ask cannot choose.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{HostError, HostEvidence, HostProvider, MAX_EVIDENCE};
use crate::attest::tpm::transport::left;

/// Where the packaged helper listens (`tng-evidence.socket`).
pub const SOCKET: &str = "/run/tng/evidence.sock";
/// Bytes of a request.
pub const REQUEST_LEN: usize = 72;
/// Longest answer, bytes: evidence as a string in JSON can double.
pub const MAX_ANSWER: usize = 2 * MAX_EVIDENCE + 1024;
const MAGIC: &[u8; 5] = b"tngE\x01";
/// A request comes at once, or not at all; so does the answer's reader.
const IO_TIME: Duration = Duration::from_secs(5);

/// What the helper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The evidence.
    Evidence(HostEvidence),
    /// Why there is none.
    Failure(HostError),
}

/// The bytes of a request.
pub fn request(provider: HostProvider, report_data: &[u8; 64]) -> [u8; REQUEST_LEN] {
    let mut out = [0; REQUEST_LEN];
    let (head, data) = out.split_at_mut(REQUEST_LEN - report_data.len());
    head[..MAGIC.len()].copy_from_slice(MAGIC);
    head[MAGIC.len()] = match provider {
        HostProvider::Tsm => 1,
        HostProvider::Tpm => 2,
    };
    data.copy_from_slice(report_data);
    out
}

/// Reads a request, or says what is wrong with it.
pub fn parse(request: &[u8]) -> Result<(HostProvider, [u8; 64]), &'static str> {
    let request: &[u8; REQUEST_LEN] = request.try_into().map_err(|_| "a request of another length")?;
    let rest = request.strip_prefix(MAGIC).ok_or("a request in another language")?;
    let (provider, data) = match rest {
        [1, 0, 0, data @ ..] => (HostProvider::Tsm, data),
        [2, 0, 0, data @ ..] => (HostProvider::Tpm, data),
        _ => return Err("a request for an unknown provider"),
    };
    data.try_into().map(|data| (provider, data)).map_err(|_| "a request of another length")
}

/// Serves the one request of `stream`.
///
/// # Errors
/// The request does not come or the answer cannot be sent in time. A request that is refused gets an answer.
pub fn serve(
    stream: &mut UnixStream,
    make: impl FnOnce(HostProvider, &[u8; 64]) -> Result<HostEvidence, HostError>,
) -> io::Result<()> {
    let bytes = read_request(stream)?;
    let outcome = match parse(&bytes) {
        Ok((provider, report_data)) => make(provider, &report_data),
        Err(what) => Err(HostError::HelperRefused(what.into())),
    };
    let answer = match outcome {
        Ok(made) if made.evidence.len() > MAX_EVIDENCE => {
            Answer::Failure(HostError::HelperRefused("the evidence is beyond 128 KiB".into()))
        }
        Ok(made) => Answer::Evidence(made),
        Err(failure) => {
            tracing::warn!(reason = failure.reason(), "no evidence made: {failure}");
            Answer::Failure(failure)
        }
    };
    stream.set_write_timeout(Some(IO_TIME))?;
    stream.write_all(&serde_json::to_vec(&answer)?)
}

/// All that the client sends, one byte more than a request at most.
fn read_request(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + IO_TIME;
    let (mut bytes, mut chunk) = (Vec::new(), [0; REQUEST_LEN + 1]);
    while bytes.len() <= REQUEST_LEN {
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(&mut chunk[bytes.len()..]) {
            Ok(0) => break,
            Ok(count) => {
                let from = bytes.len();
                bytes.extend_from_slice(&chunk[from..from + count]);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // What a socket with a time limit says at its end.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "helper_tests.rs"]
mod tests;
