//! The tunnel's TLS stream, read in large pieces.
//!
//! A stream of tokio-rustls asks the socket for 4 KiB at a time (rustls's own read size), which is
//! five system calls for one full record. This one reads up to 64 KiB of records into a buffer of
//! the thread and lets rustls decrypt from there; nothing of it stays with the connection unless the
//! reader takes less than what came.

use std::io::{self, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tokio_rustls::rustls::Connection;

use super::buffer::with_wire;
use super::leg::Leg;
use crate::os::sys::UnderWay;

/// An established TLS connection over TCP.
pub struct TlsLeg {
    tcp: TcpStream,
    tls: Connection,
    /// Records that came but were not decrypted, because the reader had no more room. At most one
    /// read of the socket; no memory when empty.
    unfed: Vec<u8>,
    /// A failure of the socket that came behind bytes which go to the reader first.
    failure: Option<io::Error>,
    close_sent: bool,
    /// rustls was given records since the socket last had none.
    fed: bool,
}

impl TlsLeg {
    /// Takes over a stream whose handshake is done. What it has read already is kept: rustls holds it.
    pub fn new(stream: TlsStream<TcpStream>) -> Self {
        let (tcp, tls) = match stream {
            TlsStream::Client(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, Connection::Client(tls))
            }
            TlsStream::Server(stream) => {
                let (tcp, tls) = stream.into_inner();
                (tcp, Connection::Server(tls))
            }
        };
        Self { tcp, tls, unfed: Vec::new(), failure: None, close_sent: false, fed: true }
    }

    /// Moves what is decrypted into `buf`. True: the peer has closed cleanly, no more will come.
    fn take_plaintext(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        while buf.remaining() > 0 {
            match self.tls.reader().read(buf.initialize_unfilled()) {
                Ok(0) => return Ok(true),
                Ok(count) => buf.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Decrypts `records` into `buf`; returns how many bytes of them were used.
    fn feed(&mut self, cx: &mut Context<'_>, records: &[u8], buf: &mut ReadBuf<'_>) -> io::Result<usize> {
        let mut rest = records;
        self.fed = true;
        while !rest.is_empty() && buf.remaining() > 0 {
            if self.tls.read_tls(&mut rest)? == 0 {
                // After close_notify rustls takes nothing more, and nothing after it counts.
                return Ok(records.len());
            }
            if let Err(error) = self.tls.process_new_packets() {
                // The alert that says why is worth one try.
                let _ = self.poll_send(cx);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            if self.take_plaintext(buf)? {
                return Ok(records.len());
            }
        }
        Ok(records.len() - rest.len())
    }

    /// One step towards more plaintext in `buf`, from the socket.
    fn poll_wire(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        with_wire(|wire| {
            let room = buf.remaining().min(wire.len());
            let mut raw = ReadBuf::new(&mut wire[..room]);
            if Pin::new(&mut self.tcp).poll_read(cx, &mut raw)?.is_pending() {
                if std::mem::take(&mut self.fed) {
                    // rustls shrinks its record buffer, grown to 16 KiB, when asked to read into an
                    // empty one; without this an idle connection would keep it.
                    let _ = self.tls.read_tls(&mut Dry);
                }
                return Poll::Pending;
            }
            let records = raw.filled();
            if records.is_empty() {
                // Tells rustls that the socket ended: without close_notify before it, its reader fails.
                self.tls.read_tls(&mut io::empty())?;
                return Poll::Ready(Ok(()));
            }
            let used = self.feed(cx, records, buf)?;
            if used < records.len() {
                self.unfed = records[used..].to_vec();
            }
            Poll::Ready(Ok(()))
        })
    }

    /// Sends what is encrypted.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            let mut socket = Socket { tcp: &mut self.tcp, cx };
            match self.tls.write_tls(&mut socket) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            if self.take_plaintext(buf)? || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = self.failure.take() {
                return Poll::Ready(Err(error));
            }
            if !self.unfed.is_empty() {
                let records = std::mem::take(&mut self.unfed);
                let used = self.feed(cx, &records, buf)?;
                if used < records.len() {
                    self.unfed = records[used..].to_vec();
                }
                continue;
            }
            match self.poll_wire(cx, buf) {
                Poll::Ready(Ok(())) => {}
                Poll::Pending if buf.filled().len() > before => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncRead for TlsLeg {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match self.poll_fill(cx, buf) {
            Poll::Ready(Err(error)) if buf.filled().len() > before => {
                self.failure = Some(error);
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }
}

impl AsyncWrite for TlsLeg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            // rustls takes nothing while 64 KiB wait for the socket: the bound on what is held here.
            let count = self.tls.writer().write(buf)?;
            match (count, self.poll_send(cx)) {
                (_, Poll::Ready(Err(error))) => return Poll::Ready(Err(error)),
                (0, Poll::Pending) => return Poll::Pending,
                (0, Poll::Ready(Ok(()))) => {}
                (count, _) => return Poll::Ready(Ok(count)),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.close_sent {
            self.close_sent = true;
            self.tls.send_close_notify();
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl Leg for TlsLeg {
    fn abort(&mut self) {
        self.tcp.abort();
    }

    fn unacknowledged(&self) -> usize {
        self.tcp.unacknowledged()
    }

    fn under_way(&self) -> Option<UnderWay> {
        self.tcp.under_way()
    }
}

/// A source that has nothing now.
struct Dry;

impl Read for Dry {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// The socket as rustls writes to it.
struct Socket<'a, 'b> {
    tcp: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl Socket<'_, '_> {
    fn blocking(poll: Poll<io::Result<usize>>) -> io::Result<usize> {
        match poll {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Socket<'_, '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Self::blocking(Pin::new(&mut *self.tcp).poll_write(self.cx, buf))
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        Self::blocking(Pin::new(&mut *self.tcp).poll_write_vectored(self.cx, bufs))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
