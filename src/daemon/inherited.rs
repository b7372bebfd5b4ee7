//! What the service manager passed at start (sd_listen_fds(3)): the socket unit's listeners, the instance's unix
//! sockets, and listeners that an earlier process of this service stored ([`FdStore`](super::fdstore::FdStore)).
//!
//! A socket unit gives all its sockets one name, so they are told apart by what they are bound to.

use std::ffi::OsStr;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::stat::fstat;
use socket2::{SockRef, Socket};

use super::fdstore;
use super::listeners::{ListenerError, listening, shut};
use crate::os::sys;

/// A listening TCP socket and where it came from.
#[derive(Debug)]
pub struct Passed {
    /// Its own address.
    pub addr: SocketAddr,
    /// The socket, non-blocking.
    pub listener: TcpListener,
    /// Its name in the descriptor store, if it comes from there; otherwise the socket unit owns it, and holds a copy
    /// for good.
    pub stored: Option<String>,
}

/// All that was passed and can be used.
#[derive(Debug, Default)]
pub struct Inherited {
    /// One listener an address.
    pub tcp: Vec<Passed>,
    /// `control.sock`.
    pub control: Option<UnixListener>,
    /// `handoff.sock`.
    pub handoff: Option<UnixListener>,
    /// Names of the descriptor store whose socket is of no use.
    pub stale: Vec<String>,
}

impl Inherited {
    /// Adopts what `LISTEN_FDS` names. What is neither a listening TCP socket nor one of the instance's unix sockets
    /// is closed; so is a socket that was shut down by a process before.
    ///
    /// # Errors
    /// When the variables are set for this process and make no sense.
    pub fn take() -> Result<Self, ListenerError> {
        let fds = sd_notify::listen_fds().map_err(ListenerError::Inherited)?;
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let mut all = Self::default();
        for fd in fds {
            all.add(sys::adopt(fd), names.next().unwrap_or_default());
        }
        Ok(all)
    }

    /// Whether nothing was passed: no service manager keeps sockets for this process.
    pub fn is_empty(&self) -> bool {
        self.tcp.is_empty() && self.control.is_none() && self.handoff.is_none()
    }

    fn add(&mut self, fd: OwnedFd, name: String) {
        let stored = fdstore::is_name(&name);
        if !stored && let Some(listener) = unix(&fd, "control.sock").filter(|_| self.control.is_none()) {
            self.control = Some(listener);
        } else if !stored && let Some(listener) = unix(&fd, "handoff.sock").filter(|_| self.handoff.is_none()) {
            self.handoff = Some(listener);
        } else {
            let stored = stored.then_some(name);
            match listening(fd) {
                Some((addr, listener)) => self.add_tcp(Passed { addr, listener, stored }),
                None => self.stale.extend(stored),
            }
        }
    }

    fn add_tcp(&mut self, passed: Passed) {
        let Some(known) = self.tcp.iter().find(|p| p.addr == passed.addr) else {
            self.tcp.push(passed);
            return;
        };
        // Copies of one socket share their fate; another stored one would only collect a queue that nobody serves.
        if passed.stored.is_some() && !same_socket(&known.listener, &passed.listener) {
            shut(&passed.listener);
        }
        self.stale.extend(passed.stored);
    }
}

fn unix(fd: &OwnedFd, file: &str) -> Option<UnixListener> {
    let socket = SockRef::from(fd);
    let name = socket.local_addr().ok()?.as_pathname()?.file_name().map(OsStr::to_owned);
    if name.as_deref() != Some(OsStr::new(file)) || !socket.is_listener().unwrap_or(false) {
        return None;
    }
    let copy = Socket::from(fd.try_clone().ok()?);
    copy.set_nonblocking(true).ok()?;
    Some(copy.into())
}

fn same_socket(a: impl AsFd, b: impl AsFd) -> bool {
    let id = |fd: &dyn AsFd| fstat(fd.as_fd()).map(|s| (s.st_dev, s.st_ino)).ok();
    id(&a).is_some() && id(&a) == id(&b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn tcp() -> (SocketAddr, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (listener.local_addr().unwrap(), listener)
    }

    fn fd(listener: &TcpListener) -> OwnedFd {
        listener.try_clone().unwrap().into()
    }

    #[test]
    fn sockets_are_told_apart_by_what_they_are_bound_to() {
        let dir = tempfile::tempdir().unwrap();
        let mut all = Inherited::default();
        for file in ["handoff.sock", "other.sock", "control.sock"] {
            all.add(UnixListener::bind(dir.path().join(file)).unwrap().into(), "tng".into());
        }
        let (addr, listener) = tcp();
        all.add(fd(&listener), "tng".into());
        let path =
            |s: &Option<UnixListener>| s.as_ref().unwrap().local_addr().unwrap().as_pathname().unwrap().to_owned();
        assert_eq!(path(&all.control), dir.path().join("control.sock"));
        assert_eq!(path(&all.handoff), dir.path().join("handoff.sock"));
        assert_eq!(all.tcp.iter().map(|p| (p.addr, p.stored.is_some())).collect::<Vec<_>>(), [(addr, false)]);
        assert!(all.stale.is_empty() && !all.is_empty());
    }

    #[test]
    fn one_listener_an_address_and_dead_ones_are_forgotten() {
        let mut all = Inherited::default();
        let (addr, listener) = tcp();
        all.add(fd(&listener), "tng".into());
        all.add(fd(&listener), fdstore::name_of(addr));
        assert_eq!(all.tcp.len(), 1);
        assert!(all.tcp[0].stored.is_none(), "the socket unit's own copy is the one to use");
        assert!(SockRef::from(&listener).is_listener().unwrap(), "closing the copy ended the socket");
        let (dead, shut_down) = tcp();
        shut(&shut_down);
        all.add(fd(&shut_down), fdstore::name_of(dead));
        let (kept, stored) = tcp();
        all.add(fd(&stored), fdstore::name_of(kept));
        assert_eq!(all.stale, [fdstore::name_of(addr), fdstore::name_of(dead)]);
        assert_eq!(
            all.tcp.iter().map(|p| (p.addr, p.stored.is_some())).collect::<Vec<_>>(),
            [(addr, false), (kept, true)]
        );
    }
}
