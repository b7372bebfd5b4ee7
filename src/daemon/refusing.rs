//! What a data plane without a valid configuration does with the sockets it was given: it refuses on them, and keeps
//! them for the configuration that will be valid.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Inherited sockets on which everything is refused, until a good configuration takes them over.
pub(super) struct Refusing {
    sockets: Vec<(SocketAddr, TcpListener)>,
    over: CancellationToken,
}

impl Refusing {
    /// Starts to refuse on `sockets`, which are non-blocking. Call it within the runtime.
    pub(super) fn start(sockets: Vec<(SocketAddr, TcpListener)>) -> Self {
        let over = CancellationToken::new();
        for (addr, socket) in &sockets {
            match socket.try_clone().and_then(tokio::net::TcpListener::from_std) {
                Ok(listener) => drop(tokio::spawn(refuse(listener, over.clone()))),
                Err(error) => tracing::error!(reason = "refuse-failed", %addr, %error, "clients will hang"),
            }
        }
        Self { sockets, over }
    }

    /// Copies of the sockets, to be served instead.
    pub(super) fn duplicates(&self) -> io::Result<Vec<(SocketAddr, TcpListener)>> {
        self.sockets.iter().map(|(addr, socket)| Ok((*addr, socket.try_clone()?))).collect()
    }

    /// Whether nothing is refused here.
    pub(super) fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// The sockets are served, or asked for by nobody and closed.
    pub(super) fn end(&mut self) {
        self.over.cancel();
        self.sockets.clear();
    }
}

/// Accepts and resets: without a valid configuration nothing may pass, and a queue that nobody empties explains nothing.
async fn refuse(listener: tokio::net::TcpListener, over: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = over.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                tracing::warn!(target: "tng::access", reason = "config-invalid", src = %peer, "refused");
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
