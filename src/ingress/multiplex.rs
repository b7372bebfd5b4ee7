//! The client of TNG's multiplex, for an egress of TNG 2.8 with `rats_tls.multiplex = true`: it takes nothing but `h2`.
//!
//! TNG puts all connections to one egress into one HTTP/2 connection. Here each has one of its own, with one CONNECT
//! stream (RFC 9113, section 8.5), which such an egress serves alike.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::Reason;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsStream;

use crate::os::sys::UnderWay;
use crate::relay::{Carrier, Leg, Refusal, StreamLeg};

/// What TNG's ingress asks for. Its egress looks at the method alone: where the stream goes, its own mapping says.
const AUTHORITY: &str = "tng.internal";
/// Bytes the egress may send ahead of the application.
const WINDOW: u32 = 256 * 1024;
/// Bytes held for an egress that does not read.
const MAX_SEND_BUFFER: usize = 256 * 1024;
/// An answer to CONNECT has no header worth more.
const MAX_HEADER_LIST: u32 = 16 * 1024;
/// How long the last frames may take once the connection is over for this side.
const LINGER: Duration = Duration::from_secs(5);

/// The one stream of a connection.
pub(super) struct Multiplexed {
    stream: StreamLeg,
    /// Tells the connection's task that nobody is left.
    _left: oneshot::Sender<()>,
}

/// Opens the stream. The caller bounds the time.
pub(super) async fn open(tunnel: TlsStream<TcpStream>) -> Result<Multiplexed, Refusal> {
    let carrier = Carrier::of(tunnel.get_ref().0).map_err(Refusal::Socket)?;
    let seen = carrier.seen();
    let (send, connection) = h2::client::Builder::new()
        .enable_push(false)
        .max_header_list_size(MAX_HEADER_LIST)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buffer_size(MAX_SEND_BUFFER)
        .handshake(tunnel)
        .await?;
    let (left, nobody) = oneshot::channel::<()>();
    tokio::spawn(async move {
        tokio::select! {
            _ = connection => {}
            // An egress that does not take the last frames must not keep the connection for ever.
            () = async { let _ = nobody.await; tokio::time::sleep(LINGER).await } => {}
        }
        drop(carrier);
    });
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = http::Uri::from_static(AUTHORITY);
    let (response, body) = send.ready().await?.send_request(request, false)?;
    let response = response.await?;
    if response.status() != StatusCode::OK {
        return Err(Refusal::StreamRefused(response.status().as_u16()));
    }
    let stream = StreamLeg::new(response.into_body(), body, Reason::CANCEL, seen);
    Ok(Multiplexed { stream, _left: left })
}

impl Leg for Multiplexed {
    fn abort(&mut self) {
        self.stream.abort();
    }

    fn unacknowledged(&self) -> usize {
        self.stream.unacknowledged()
    }

    fn is_waiting(&self) -> bool {
        self.stream.is_waiting()
    }

    fn under_way(&self) -> Option<UnderWay> {
        self.stream.under_way()
    }
}

impl AsyncRead for Multiplexed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Multiplexed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
