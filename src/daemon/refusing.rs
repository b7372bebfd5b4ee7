//! Sockets on which everything is refused: those of a data plane that cannot serve what its file says, and those of a socket
//! unit that no endpoint asks for. They are kept for the configuration that will ask for them.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::listeners::copies;

/// Why everything is refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum Why {
    /// Nothing can be served, for this reason: the configuration has errors, for one.
    NotServing(&'static str),
    /// No endpoint of it listens there.
    Unused,
}

impl Why {
    /// The reason that the log has.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Why::NotServing(reason) => reason,
            Why::Unused => "listener-unused",
        }
    }
}

/// Inherited sockets on which everything is refused, until a configuration that works takes them over.
pub(super) struct Refusing {
    sockets: Vec<(SocketAddr, TcpListener)>,
    over: CancellationToken,
}

impl Refusing {
    /// Starts to refuse on `sockets`, which are non-blocking. Call it within the runtime.
    pub(super) fn start(sockets: Vec<(SocketAddr, TcpListener)>, why: Why) -> Self {
        let over = CancellationToken::new();
        for (addr, socket) in &sockets {
            match socket.try_clone().and_then(tokio::net::TcpListener::from_std) {
                Ok(listener) => drop(tokio::spawn(refuse(listener, over.clone(), why))),
                Err(error) => tracing::error!(reason = "refuse-failed", %addr, %error, "clients will hang"),
            }
        }
        Self { sockets, over }
    }

    /// Copies of the sockets, to be served instead.
    pub(super) fn duplicates(&self) -> io::Result<Vec<(SocketAddr, TcpListener)>> {
        copies(&self.sockets)
    }

    /// Other sockets take the place of all these, which are served now, or closed.
    pub(super) fn replace(&mut self, sockets: Vec<(SocketAddr, TcpListener)>, why: Why) {
        self.over.cancel();
        *self = Self::start(sockets, why);
    }
}

/// Accepts and resets: nothing may pass, and a queue that nobody empties explains nothing.
async fn refuse(listener: tokio::net::TcpListener, over: CancellationToken, why: Why) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = over.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                tracing::warn!(target: "tng::access", reason = why.reason(), src = %peer, "refused {peer}: {}", why.reason());
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
