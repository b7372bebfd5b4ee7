//! The TCP connection under a multiplexed tunnel, as its streams look at it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use tokio::net::TcpStream;

use crate::os::sys;
use crate::os::sys::UnderWay;

/// Held by who serves the connection. Streams see it while it is held: none of them keeps the socket open.
#[derive(Debug)]
pub struct Carrier(Arc<OwnedFd>);

impl Carrier {
    /// The connection of `tcp`.
    ///
    /// # Errors
    /// When descriptors are exhausted.
    pub fn of(tcp: &TcpStream) -> io::Result<Self> {
        Ok(Self(Arc::new(tcp.as_fd().try_clone_to_owned()?)))
    }

    /// For one stream of it.
    pub fn seen(&self) -> CarrierView {
        CarrierView(Arc::downgrade(&self.0))
    }
}

/// What a stream sees of its connection.
#[derive(Debug)]
pub struct CarrierView(Weak<OwnedFd>);

impl CarrierView {
    /// What the connection waits for; `None` when it is over.
    pub(super) fn under_way(&self) -> Option<UnderWay> {
        sys::under_way(self.0.upgrade()?.as_fd()).ok()
    }

    /// Whether the other host has yet to acknowledge something, of whichever stream.
    pub(super) fn is_waiting(&self) -> bool {
        self.0.upgrade().is_some_and(|socket| sys::unacknowledged(socket.as_fd()).unwrap_or(0) > 0)
    }
}
