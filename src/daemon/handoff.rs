//! How root hands a new configuration and new listeners to the running data plane: one request on a unix socket,
//! descriptors beside it (SCM_RIGHTS), one answer. The data plane itself may read neither `/etc/tng` nor bind port 443.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use super::listeners;
use crate::capture::allocation::InstanceSlots;
use crate::os::sys;

/// The kernel passes at most 253 descriptors in one message (SCM_MAX_FD).
pub const MAX_LISTENERS: usize = 253;
/// A configuration file is at most 1 MiB; JSON escapes make it a little longer.
const MAX_REQUEST: u32 = 4 << 20;
const MAX_ANSWER: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(30);
/// Saying whether it could costs the data plane nothing. A dead one whose socket systemd holds does not refuse the
/// connection; it just never answers.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// What root asks of the data plane.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Only say whether it would work, or do it.
    pub apply: bool,
    /// The file the text came from.
    pub source: PathBuf,
    /// The new configuration.
    pub text: String,
    /// Ids and ports of its captured endpoints.
    pub slots: Option<InstanceSlots>,
}

/// What the data plane answers.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Why not, if not.
    pub error: Option<String>,
    /// Listeners that root must bind and send along with the request to apply.
    pub missing: Vec<SocketAddr>,
}

/// Sends a request and its listeners, and waits for the answer.
pub fn call(socket: &Path, request: &Request, listeners: &[TcpListener]) -> io::Result<Answer> {
    if listeners.len() > MAX_LISTENERS {
        return Err(io::Error::other(format!("more than {MAX_LISTENERS} new listeners at once; restart instead")));
    }
    let mut stream = UnixStream::connect(socket)?;
    let deadline = if request.apply { DEADLINE } else { ASK_DEADLINE };
    stream.set_read_timeout(Some(deadline))?;
    stream.set_write_timeout(Some(deadline))?;
    let payload = serde_json::to_vec(request)?;
    let length = u32::try_from(payload.len()).ok().filter(|l| *l <= MAX_REQUEST);
    let length = length.ok_or_else(|| io::Error::other("the configuration is too long"))?.to_be_bytes();
    let fds: Vec<RawFd> = listeners.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<UnixAddr>(stream.as_raw_fd(), &[IoSlice::new(&length)], control, MsgFlags::empty(), None)?;
    if sent != length.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    stream.write_all(&payload)?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Takes one request from `stream`. Blocks, with a deadline.
pub fn receive(stream: &mut UnixStream) -> io::Result<(Request, Vec<(SocketAddr, TcpListener)>)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut length = [0u8; 4];
    let mut space = nix::cmsg_space!([RawFd; MAX_LISTENERS]);
    let mut passed = Vec::new();
    let got = {
        let mut io = [IoSliceMut::new(&mut length)];
        let message = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut io, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // Adopted at once, so that none is leaked whatever comes next.
                passed.extend(fds.into_iter().map(sys::adopt));
            }
        }
        message.bytes
    };
    if got == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    stream.read_exact(&mut length[got..])?;
    let length = u32::from_be_bytes(length);
    if length > MAX_REQUEST {
        return Err(io::Error::other("the request is too long"));
    }
    let mut payload = vec![0u8; length as usize];
    stream.read_exact(&mut payload)?;
    let request = serde_json::from_slice(&payload)?;
    Ok((request, passed.into_iter().filter_map(listeners::listening).collect()))
}

/// Sends the answer and closes.
pub fn answer(mut stream: UnixStream, answer: &Answer) -> io::Result<()> {
    stream.write_all(&serde_json::to_vec(answer)?)
}

/// Whether root, or the data plane's own user, is at the other end.
pub fn is_trusted(stream: &UnixStream) -> bool {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    getsockopt(stream, PeerCredentials).is_ok_and(|c| c.uid() == 0 || c.uid() == nix::unistd::geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_request_arrives_with_its_listeners() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = UnixListener::bind(&path).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || {
            let request = Request { apply: true, source: "/x.toml".into(), text: "x".repeat(100_000), slots: None };
            call(&path, &request, &[listener]).unwrap()
        });
        let (mut stream, _) = server.accept().unwrap();
        assert!(is_trusted(&stream));
        let (request, listeners) = receive(&mut stream).unwrap();
        assert_eq!(request.text.len(), 100_000);
        assert_eq!(listeners.len(), 1);
        assert_eq!(listeners[0].0, addr);
        answer(stream, &Answer { error: Some("no".into()), missing: vec![addr] }).unwrap();
        let got = client.join().unwrap();
        assert_eq!((got.error.as_deref(), got.missing), (Some("no"), vec![addr]));
    }

    #[test]
    fn a_request_that_claims_to_be_huge_is_refused() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(&u32::MAX.to_be_bytes()).unwrap();
        assert!(receive(&mut b).is_err());
    }
}
