//! Whether the other end of a connection speaks HTTP/2, by the first bytes it sends.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Where a frame has its type, and SETTINGS, which every end sends first (RFC 9113, sections 4.1 and 3.4).
const TYPE_AT: usize = 3;
const SETTINGS: u8 = 4;

/// A stream that notes it when it is greeted with SETTINGS.
pub struct Greeting<T> {
    io: T,
    read: usize,
    greeted: Arc<AtomicBool>,
}

impl<T> Greeting<T> {
    /// Notes it in `greeted`.
    pub fn new(io: T, greeted: Arc<AtomicBool>) -> Self {
        Self { io, read: 0, greeted }
    }

    fn look(&mut self, new: &[u8]) {
        if let Some(at) = TYPE_AT.checked_sub(self.read)
            && let Some(kind) = new.get(at)
        {
            self.greeted.store(*kind == SETTINGS, Ordering::Relaxed);
        }
        self.read = self.read.saturating_add(new.len());
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Greeting<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.look(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Greeting<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn only_settings_are_a_greeting_however_they_arrive() {
        for (bytes, expected) in [
            (&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], true),
            (&[0, 0, 18, 4], true),
            (b"HTTP/1.1 400 Bad Request", false),
            (&[0, 0, 0], false),
            (&[], false),
        ] {
            for piece in [1, 2, 100] {
                let greeted = Arc::new(AtomicBool::new(false));
                let mut stream = Greeting::new(bytes, greeted.clone());
                let mut buffer = vec![0; piece];
                while stream.read(&mut buffer).await.unwrap() > 0 {}
                assert_eq!(greeted.load(Ordering::Relaxed), expected, "{bytes:?} {piece}");
            }
        }
    }
}
