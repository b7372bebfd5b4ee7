//! One CONNECT stream of an HTTP/2 connection (RFC 9113, section 8.5) as bytes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{CarrierView, Leg};
use crate::os::sys::UnderWay;

/// END_STREAM is its half-close, RST_STREAM its reset.
pub struct StreamLeg {
    recv: RecvStream,
    send: SendStream<Bytes>,
    /// Bytes that h2 holds. RST_STREAM throws them away.
    held: Arc<AtomicUsize>,
    /// What the stream is reset with.
    reset: Reason,
    unread: Bytes,
    closed: bool,
    carrier: CarrierView,
}

impl StreamLeg {
    /// The two directions of a stream of `carrier`, reset with `reset` when it is cut off.
    pub fn new(recv: RecvStream, send: SendStream<Bytes>, reset: Reason, carrier: CarrierView) -> Self {
        Self { recv, send, held: Arc::default(), reset, unread: Bytes::new(), closed: false, carrier }
    }
}

/// Bytes that h2 drops as soon as they are in a frame on their way, behind which a reset comes in order.
struct Piece {
    bytes: Vec<u8>,
    held: Arc<AtomicUsize>,
}

impl Piece {
    fn new(bytes: &[u8], held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(bytes.len(), Ordering::Relaxed);
        Self { bytes: bytes.to_vec(), held: held.clone() }
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

impl Leg for StreamLeg {
    fn abort(&mut self) {
        self.send.send_reset(self.reset);
    }

    fn unacknowledged(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    // Not `unacknowledged`: what other streams have under way must not delay this one's reset.
    fn is_waiting(&self) -> bool {
        self.carrier.is_waiting()
    }

    fn under_way(&self) -> Option<UnderWay> {
        self.carrier.under_way()
    }
}

impl AsyncRead for StreamLeg {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.recv.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(bytes)) => self.unread = bytes,
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let count = buf.remaining().min(self.unread.len());
        buf.put_slice(&self.unread[..count]);
        self.unread.advance(count);
        // Only what was taken opens the window again: this is the backpressure.
        self.recv.flow_control().release_capacity(count).map_err(io_error)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for StreamLeg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(buf.len());
        let count = loop {
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(0)) => {}
                Some(Ok(count)) => break count.min(buf.len()),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        };
        let piece = Piece::new(&buf[..count], &self.held);
        self.send.send_data(Bytes::from_owner(piece), false).map_err(io_error)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closed {
            self.closed = true;
            self.send.send_data(Bytes::new(), true).map_err(io_error)?;
        }
        Poll::Ready(Ok(()))
    }
}

fn io_error(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
