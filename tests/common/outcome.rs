//! What becomes of a connection: it carries bytes, or it ends in a reset.
//!
//! A refusal may reset a connection before connect(2) has returned to the client, above all on a busy machine. Every
//! test that expects a refusal therefore connects through this module.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a test waits for an answer or an end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connects. `None` when the connection was reset already; every other failure is a panic.
pub async fn connect_or_reset(at: SocketAddr) -> Option<TcpStream> {
    match TcpStream::connect(at).await {
        Ok(stream) => Some(stream),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
            None
        }
    }
}

/// Waits for the reset that an application sees.
pub async fn expect_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let seen = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("no end at all");
    assert_eq!(seen.expect_err("a clean end").kind(), ErrorKind::ConnectionReset);
}

/// Connects, and expects a reset.
pub async fn expect_refusal(at: SocketAddr) {
    if let Some(mut stream) = connect_or_reset(at).await {
        expect_reset(&mut stream).await;
    }
}

/// Whether a byte sent to the echo service behind `stream` comes back. It comes back or the connection ends.
pub async fn alive(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let round = async { stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut byte).await.is_ok() };
    timeout(PATIENCE, round).await.expect("an answer or an end")
}

/// Whether a new connection to `at` reaches the echo service behind it.
pub async fn served(at: SocketAddr) -> bool {
    match connect_or_reset(at).await {
        Some(mut stream) => alive(&mut stream).await,
        None => false,
    }
}
