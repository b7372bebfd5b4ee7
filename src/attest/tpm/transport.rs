//! How commands reach a TPM: the kernel's resource manager, or the socket of a swtpm.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest command or response, bytes (what the kernel's driver takes).
pub const MAX_MESSAGE: usize = 4096;
/// Bytes of a header: tag, size, code.
pub(super) const HEADER: usize = 10;

/// Where a TPM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TpmAddress {
    /// A character device: `/dev/tpmrm0`.
    Device(PathBuf),
    /// A unix socket that takes bare commands, as `swtpm socket --server type=unixio` does.
    Socket(PathBuf),
}

impl TpmAddress {
    /// `unix:///run/swtpm.sock`, or the absolute path of a device.
    pub fn parse(text: &str) -> Option<Self> {
        let (make, path): (fn(PathBuf) -> Self, &str) = match text.strip_prefix("unix://") {
            // sun_path holds 108 bytes with the closing NUL.
            Some(path) if path.len() < 108 => (Self::Socket, path),
            Some(_) => return None,
            None => (Self::Device, text),
        };
        let legal = path.starts_with('/') && !path.ends_with('/') && !path.contains('\0');
        legal.then(|| make(PathBuf::from(path)))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        let (Self::Device(path) | Self::Socket(path)) = self;
        path
    }
}

impl std::fmt::Display for TpmAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Device(path) => write!(f, "{}", path.display()),
            Self::Socket(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// A way to one TPM.
pub trait Transport {
    /// Sends one command and returns the whole response, at most [`MAX_MESSAGE`] bytes.
    fn exchange(&mut self, command: &[u8]) -> io::Result<Vec<u8>>;
}

/// An open way to a TPM.
#[derive(Debug)]
pub enum Connection {
    /// The kernel bounds each command by the TPM's own time limits.
    Device(File),
    /// Ends at the deadline.
    Socket(UnixStream, Instant),
}

impl Connection {
    /// Opens it; a socket is given `deadline` for everything.
    pub fn open(address: &TpmAddress, deadline: Duration) -> io::Result<Self> {
        Ok(match address {
            TpmAddress::Device(path) => Self::Device(OpenOptions::new().read(true).write(true).open(path)?),
            TpmAddress::Socket(path) => Self::Socket(UnixStream::connect(path)?, Instant::now() + deadline),
        })
    }
}

/// What is left until `end`; an error when nothing is.
pub(crate) fn left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

impl Transport for Connection {
    fn exchange(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Device(file) => {
                // One write is one command, one read its response.
                file.write_all(command)?;
                let mut response = vec![0; MAX_MESSAGE];
                let count = file.read(&mut response)?;
                response.truncate(count);
                Ok(response)
            }
            Self::Socket(stream, end) => {
                stream.set_write_timeout(Some(left(*end)?))?;
                stream.write_all(command)?;
                let mut response = vec![0; HEADER];
                fill(stream, &mut response, *end)?;
                let size = match response[..] {
                    [_, _, a, b, c, d, ..] => u32::from_be_bytes([a, b, c, d]) as usize,
                    _ => 0,
                };
                if !(HEADER..=MAX_MESSAGE).contains(&size) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a response of an impossible size"));
                }
                response.resize(size, 0);
                fill(stream, &mut response[HEADER..], *end)?;
                Ok(response)
            }
        }
    }
}

/// Fills `buffer` until `end`, whatever the other side's pauses.
fn fill(stream: &mut UnixStream, mut buffer: &mut [u8], end: Instant) -> io::Result<()> {
    while !buffer.is_empty() {
        stream.set_read_timeout(Some(left(end)?))?;
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
