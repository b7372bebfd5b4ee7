//! TNG's multiplex: an HTTP/2 connection in the tunnel, one CONNECT stream (RFC 9113, section 8.5)
//! for each TCP connection.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::OptionFuture;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsStream;

use crate::daemon::EndpointRuntime;
use crate::relay::{Carrier, CarrierView, ClientAddr, End, Leg, Outcome, PeerAddr, Record, Refusal, StreamLeg};
use crate::tls::{Alpn, Binding, Standing};

/// A CONNECT request has no header worth more.
const MAX_HEADER_LIST: u32 = 16 * 1024;
/// Bytes a stream may send ahead of the service: the bound on what one of them can hold here.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same for all streams of a connection.
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes held for a peer that does not read.
const MAX_SEND_BUFFER: usize = 256 * 1024;
/// What TNG's egress answers to anything but CONNECT.
const NOT_CONNECT: &str = "Protocol Error: the method should be CONNECT";

/// The streams of one tunnel connection.
pub(super) struct Streams<'a> {
    pub endpoint: &'a Arc<EndpointRuntime>,
    pub client: ClientAddr,
    pub standing: Option<&'a Arc<Standing>>,
    pub local: SocketAddr,
    pub listener: SocketAddr,
}

impl Streams<'_> {
    /// Serves until the connection ends; tells how it ended.
    pub(super) async fn serve(&self, tunnel: TlsStream<TcpStream>) -> Result<Outcome, Refusal> {
        let limits = &self.endpoint.endpoint.limits;
        let carrier = Carrier::of(tunnel.get_ref().0).map_err(Refusal::Socket)?;
        let handshake = h2::server::Builder::new()
            // TNG has one connection for all its clients. More windows are no more memory: the connection's bounds them.
            .max_concurrent_streams(u32::try_from(limits.max_connections).unwrap_or(u32::MAX))
            .max_header_list_size(MAX_HEADER_LIST)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(MAX_SEND_BUFFER)
            .handshake::<_, Bytes>(tunnel);
        let mut connection = match timeout(limits.handshake_timeout, handshake).await {
            Ok(Ok(connection)) => connection,
            // TNG's pool opens several connections at once and drops all but one before their first stream.
            Ok(Err(error)) if is_gone(&error) => return Ok(Outcome::Multiplexed(0)),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err(Refusal::HandshakeTimeout(limits.handshake_timeout)),
        };
        let idle = if limits.idle_timeout.is_zero() { Duration::MAX } else { limits.idle_timeout };
        let mut count = 0;
        let open = Arc::new(());
        let mut withdrawn = pin!(self.standing.map(|s| s.ended()));
        // Until when an emptied connection may stay once it was told to leave: its client need not obey.
        let mut leave_by: Option<Instant> = None;
        loop {
            let empty = Arc::strong_count(&open) == 1;
            if leave_by.is_some_and(|by| empty && by <= Instant::now()) {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                let _ = timeout(Duration::from_millis(200), closed(&mut connection)).await;
                return Ok(Outcome::Multiplexed(count));
            }
            let leaving = leave_by.is_some();
            let patience = if leaving { limits.handshake_timeout } else { idle };
            tokio::select! {
                biased;
                _ = self.endpoint.abort.cancelled() => {
                    connection.abrupt_shutdown(Reason::CANCEL);
                    // Lets the GOAWAY out; the sockets are reset anyway when this takes too long.
                    let _ = timeout(Duration::from_millis(200), closed(&mut connection)).await;
                    return Ok(Outcome::Multiplexed(count));
                }
                _ = self.endpoint.stopping.cancelled(), if !leaving => {
                    leave_by = Some(Instant::now() + limits.handshake_timeout);
                    connection.graceful_shutdown();
                }
                // Each stream's relay ends with the same standing.
                Some(()) = OptionFuture::from(withdrawn.as_mut().as_pin_mut()) => {
                    connection.abrupt_shutdown(Reason::CANCEL);
                    let _ = timeout(Duration::from_millis(200), closed(&mut connection)).await;
                    return Ok(Outcome::Relayed(End::withdrawn(self.standing.map(|s| &**s))));
                }
                accepted = timeout(patience, connection.accept()) => match accepted {
                    Err(_) if leaving || Arc::strong_count(&open) > 1 => {}
                    Err(_) => {
                        leave_by = Some(Instant::now() + limits.handshake_timeout);
                        connection.graceful_shutdown();
                    }
                    Ok(None) => return Ok(Outcome::Multiplexed(count)),
                    Ok(Some(Err(error))) if is_gone(&error) => return Ok(Outcome::Multiplexed(count)),
                    Ok(Some(Err(error))) => return Err(error.into()),
                    Ok(Some(Ok((request, respond)))) => {
                        count += 1;
                        self.spawn(request, respond, open.clone(), leaving, carrier.seen());
                    }
                },
            }
        }
    }

    /// `leaving`: the verdict ended or the daemon stops. GOAWAY closes the door only once the client has answered
    /// it, and one that never does must not open streams for ever.
    fn spawn(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        open: Arc<()>,
        leaving: bool,
        carrier: CarrierView,
    ) {
        let endpoint = self.endpoint.clone();
        let record = Record::begin(&endpoint.connections, &endpoint.stats, self.client);
        record.set_peer_addr(PeerAddr(self.client.0));
        record.set_binding(Binding::of(Alpn::H2, &endpoint.endpoint.ra));
        record.set_standing(self.standing);
        if leaving {
            respond.send_reset(Reason::REFUSED_STREAM);
            return record.finish(Outcome::Refused(Refusal::Draining));
        }
        let Some(permit) = endpoint.gate.try_enter() else {
            respond.send_reset(Reason::REFUSED_STREAM);
            return record.finish(Outcome::Refused(Refusal::TooManyConnections));
        };
        let addrs = (self.client, self.local, self.listener);
        self.endpoint.tracker.spawn(async move {
            let outcome = stream(&endpoint, addrs, &record, request, respond, carrier).await;
            record.finish(outcome);
            drop((permit, open));
        });
    }
}

/// Whether the client just went away, as it may at any time between two streams and before the first one.
fn is_gone(error: &h2::Error) -> bool {
    error.get_io().is_some_and(|io| io.kind() != std::io::ErrorKind::InvalidData)
}

async fn closed(connection: &mut Connection<TlsStream<TcpStream>, Bytes>) {
    let _ = std::future::poll_fn(|cx| connection.poll_closed(cx)).await;
}

async fn stream(
    endpoint: &EndpointRuntime,
    (client, local, listener): (ClientAddr, SocketAddr, SocketAddr),
    record: &Record,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    carrier: CarrierView,
) -> Outcome {
    if request.method() != Method::CONNECT {
        let method = request.method().as_str().chars().take(32).collect();
        let refusal = Outcome::Refused(Refusal::NotConnect(method));
        if let Ok(mut body) = respond.send_response(plain(StatusCode::BAD_REQUEST), false) {
            let _ = body.send_data(Bytes::from_static(NOT_CONNECT.as_bytes()), true);
        }
        return refusal;
    }
    let connected = match super::route(&endpoint.endpoint.mode, client, local, listener, &endpoint.live_ports) {
        Ok(route) => {
            record.set_target(&route.target);
            super::connect(endpoint, &route).await
        }
        Err(refusal) => Err(refusal),
    };
    let mut service = match connected {
        Ok(service) => service,
        Err(refusal) => {
            respond.send_reset(Reason::CONNECT_ERROR);
            return Outcome::Refused(refusal);
        }
    };
    match respond.send_response(plain(StatusCode::OK), false) {
        Ok(send) => {
            // RFC 9113, section 8.5: a failing TCP connection is a stream error of type CONNECT_ERROR.
            let mut leg = StreamLeg::new(request.into_body(), send, Reason::CONNECT_ERROR, carrier);
            super::relayed(endpoint, record, &mut service, &mut leg).await
        }
        Err(error) => {
            service.abort();
            Outcome::Refused(error.into())
        }
    }
}

fn plain(status: StatusCode) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response
}
