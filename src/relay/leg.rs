//! One side of a relayed connection.

use std::os::fd::AsFd;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpStream;

use crate::os::sys::UnderWay;

/// A byte stream that can be ended so that the other end sees an error and not a clean end.
pub trait Leg: AsyncRead + AsyncWrite + Unpin {
    /// From here on, dropping it resets the connection. A cut-off answer must never look complete.
    fn abort(&mut self);

    /// Bytes written to the socket that the other host has not acknowledged yet; of a stream in a connection, those that
    /// are not on their way. A reset throws them away. 0 where nobody can tell.
    fn unacknowledged(&self) -> usize {
        0
    }

    /// Whether the other host has yet to acknowledge something, so that it may vanish with data under way.
    fn is_waiting(&self) -> bool {
        self.unacknowledged() > 0
    }

    /// What waits for the other host's acknowledgement; `None` where no kernel can tell.
    fn under_way(&self) -> Option<UnderWay> {
        None
    }
}

impl Leg for TcpStream {
    fn abort(&mut self) {
        // SO_LINGER 0 makes close(2) send RST. It fails only on a socket that is gone already.
        let _ = socket2::SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }

    fn unacknowledged(&self) -> usize {
        // Fails only on a socket that is gone already.
        crate::os::sys::unacknowledged(self.as_fd()).unwrap_or(0)
    }

    fn under_way(&self) -> Option<UnderWay> {
        crate::os::sys::under_way(self.as_fd()).ok()
    }
}

impl<T: Leg + ?Sized> Leg for Box<T> {
    fn abort(&mut self) {
        (**self).abort();
    }

    fn unacknowledged(&self) -> usize {
        (**self).unacknowledged()
    }

    fn is_waiting(&self) -> bool {
        (**self).is_waiting()
    }

    fn under_way(&self) -> Option<UnderWay> {
        (**self).under_way()
    }
}

/// Only the heartbeat is relayed over in-process pipes; a dropped pipe cannot be mistaken there.
impl Leg for DuplexStream {
    fn abort(&mut self) {}
}
