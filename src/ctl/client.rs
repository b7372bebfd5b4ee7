//! One GET over a control socket: HTTP/1.1 (RFC 9112) with `Connection: close`, bounded in size and time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// An instance that does not answer by then is stuck.
const DEADLINE: Duration = Duration::from_secs(5);
/// After so long without an answer, the service manager is asked whether anybody is there to give one.
const PATIENCE: Duration = Duration::from_millis(400);
/// The largest answer, that of `/connections`, is about 3 MiB at its bound.
const MAX_ANSWER: u64 = 16 * 1024 * 1024;

/// Why an instance could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// Nothing listens there.
    #[error("{path}: not running", path = .0.display())]
    NotRunning(PathBuf),
    /// The caller may not open the socket.
    #[error("{path}: permission denied; ask as root or as the user that the instance runs as", path = .0.display())]
    Denied(PathBuf),
    /// The socket takes the question, and nobody answers.
    #[error("{path}: not answering: {why}", path = .path.display())]
    NotAnswering {
        /// The socket.
        path: PathBuf,
        /// What is known of the data plane, and what to look at.
        why: String,
    },
    /// The conversation failed.
    #[error("{path}: {error}", path = .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What failed.
        error: io::Error,
    },
    /// The answer is not what the API promises.
    #[error("{path}: {what}", path = .path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl CtlError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            CtlError::NotRunning(_) => "not-running",
            CtlError::Denied(_) => "permission-denied",
            CtlError::NotAnswering { .. } => "not-answering",
            CtlError::Io { .. } => "control-io",
            CtlError::Answer { .. } => "control-answer",
        }
    }
}

/// The body of `GET resource` from the control socket at `path`.
///
/// # Errors
/// See [`CtlError`]; an HTTP status other than 200 is one.
pub fn get(path: &Path, resource: &str) -> Result<Vec<u8>, CtlError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CtlError::NotRunning(path.to_owned()),
        io::ErrorKind::PermissionDenied => CtlError::Denied(path.to_owned()),
        io::ErrorKind::TimedOut => CtlError::NotAnswering { path: path.to_owned(), why: error.to_string() },
        _ => CtlError::Io { path: path.to_owned(), error },
    };
    let answer = exchange(path, resource).map_err(failed)?;
    body(&answer).map_err(|what| CtlError::Answer { path: path.to_owned(), what })
}

fn exchange(path: &Path, resource: &str) -> io::Result<Vec<u8>> {
    let end = Instant::now() + DEADLINE;
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(format!("GET {resource} HTTP/1.1\r\nHost: tng\r\nConnection: close\r\n\r\n").as_bytes())?;
    let (mut answer, mut limited) = (Vec::new(), stream.take(MAX_ANSWER));
    loop {
        match limited.read_to_end(&mut answer) {
            Ok(_) => return Ok(answer),
            Err(e) if !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Err(e),
            Err(_) => {}
        }
        // What came so far stays in `answer`.
        let why = if answer.is_empty() { super::unanswered::why(path) } else { None };
        if let Some(why) = why {
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        if Instant::now() >= end {
            let why =
                format!("no answer within {} s: the data plane is stuck, or stopped by a signal", DEADLINE.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
    }
}

fn body(answer: &[u8]) -> Result<Vec<u8>, String> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or("the answer has no end of headers")?;
    let head = std::str::from_utf8(&answer[..end]).map_err(|_| "the answer's headers are not text")?;
    let body = &answer[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|l| l.strip_prefix("HTTP/1.1 ")).ok_or("the answer is not HTTP/1.1")?;
    if !status.starts_with("200 ") && status != "200" {
        return Err(format!("answered {status}"));
    }
    let length = lines
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or("the answer has no length")?;
    if body.len() != length {
        return Err(format!("the answer has {} bytes of {length}", body.len()));
    }
    Ok(body.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_answer_is_taken() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(body(answer).as_deref(), Ok(&b"abc"[..]));
    }

    #[test]
    fn cut_failed_and_foreign_answers_are_errors() {
        assert!(body(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc").is_err());
        assert!(body(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nabc").is_err());
        assert!(body(b"HTTP/1.1 200 OK\r\n\r\nabc").is_err());
        assert!(body(b"SSH-2.0-x\r\n").is_err());
        assert!(body(b"").is_err());
    }
}
