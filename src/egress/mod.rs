//! Egress: traffic out of the tunnel to the service. One file a mode; a mode says where the service
//! is and whose address it sees. The service hears of a connection only after the client's appraisal.

mod door;
mod mapping;
mod multiplex;
mod netfilter;
mod unserved;

use std::pin::pin;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::Mode;
use crate::daemon::{Accepted, EndpointRuntime, Permit};
use crate::relay::{
    ClientAddr, Leg, LivePorts, Outcome, PeerAddr, Record, Refusal, Source, Target, TlsLeg, keep_urgent_bytes,
};
use crate::tls::{Alpn, Binding, Channel, ChannelError};

use door::{Entrance, unserved};
pub use unserved::Unserved;

/// How long a stop waits for handshakes: a few round trips and an appraisal.
const HANDSHAKES_AT_STOP: std::time::Duration = std::time::Duration::from_secs(2);

/// Where a connection goes and whose address the service sees.
struct Route<'a> {
    target: Target,
    source: Source<'a>,
}

fn route<'a>(
    mode: &Mode,
    client: ClientAddr,
    local: std::net::SocketAddr,
    listener: std::net::SocketAddr,
    live: &'a LivePorts,
) -> Result<Route<'a>, Refusal> {
    match mode {
        Mode::Mapping(mapping) => mapping::route(mapping, local),
        Mode::Netfilter(netfilter) => netfilter::route(netfilter, client, local, listener, live),
    }
}

/// Serves one accepted connection to its end.
pub async fn serve(endpoint: &std::sync::Arc<EndpointRuntime>, accepted: Accepted) {
    let Accepted { tcp, client, local, listener, record, live, permit } = accepted;
    record.set_peer_addr(PeerAddr(client.0));
    let route = match route(&endpoint.endpoint.mode, client, local, listener, &endpoint.live_ports) {
        Ok(route) => route,
        Err(refusal) => {
            let mut tcp = tcp;
            tcp.abort();
            drop(tcp);
            return record.finish(Outcome::Refused(refusal));
        }
    };
    record.set_target(&route.target);
    let deadline = Instant::now() + endpoint.endpoint.limits.handshake_timeout;
    let entrance = Entrance::new(endpoint, client, &route, permit, deadline);
    let admitted = Box::pin(accept(endpoint, client, tcp, &entrance, deadline)).await;
    let outcome = match admitted {
        Err(refusal) => {
            drop(entrance);
            Outcome::Refused(refusal)
        }
        Ok((Channel { stream, alpn, standing, .. }, _place)) => {
            record.set_binding(Binding::of(alpn, &endpoint.endpoint.ra));
            record.established(standing.as_ref());
            match alpn {
                Alpn::H2 => {
                    drop(entrance);
                    let streams = multiplex::Streams { endpoint, client, standing: standing.as_ref(), local, listener };
                    match Box::pin(streams.serve(stream)).await {
                        Ok(outcome) => outcome,
                        Err(refusal) => Outcome::Refused(refusal),
                    }
                }
                Alpn::RatsTls | Alpn::Tng1 => {
                    let mut tunnel = Box::new(TlsLeg::new(stream));
                    let service = entrance.service().await;
                    drop(entrance);
                    match service {
                        Ok(mut service) => relayed(endpoint, &record, &mut service, &mut tunnel).await,
                        Err(refusal) => {
                            tunnel.abort();
                            Outcome::Refused(refusal)
                        }
                    }
                }
            }
        }
    };
    drop(live);
    record.finish(outcome);
}

/// Handshake and appraisal until `deadline`, as a server, and a place among the connections. A stop ends it soon: nothing is
/// lost that was not established.
async fn accept<'a>(
    endpoint: &'a EndpointRuntime,
    client: ClientAddr,
    tcp: TcpStream,
    entrance: &Entrance<'a>,
    deadline: Instant,
) -> Result<(Channel, Permit), Refusal> {
    let limits = &endpoint.endpoint.limits;
    let patience = limits.first_byte_timeout.min(limits.handshake_timeout);
    let mut ending = pin!(async {
        tokio::select! {
            biased;
            _ = stopped(endpoint) => unserved(&Refusal::Draining),
            _ = endpoint.abort.cancelled() => unserved(&Refusal::Draining),
            _ = sleep_until(deadline) => ChannelError::HandshakeTimeout,
        }
    });
    let begun = tokio::select! {
        biased;
        error = ending.as_mut() => return Err(refused(endpoint, error)),
        begun = endpoint.handshakes.begin(&tcp, client, patience) => begun?,
    };
    entrance.begun(begun);
    let channel = endpoint.tunnel.accept_until(tcp, entrance, ending).await.map_err(|e| refused(endpoint, e))?;
    let verdict = channel.standing.as_ref().and_then(|standing| standing.verdict());
    tokio::select! {
        biased;
        _ = stopped(endpoint) => Err(Refusal::Draining),
        _ = endpoint.abort.cancelled() => Err(Refusal::Draining),
        place = entrance.place(verdict.as_deref()) => Ok((channel, place?)),
    }
}

/// A handshake's failure, with the deadline that was set.
fn refused(endpoint: &EndpointRuntime, error: ChannelError) -> Refusal {
    match error {
        ChannelError::HandshakeTimeout => Refusal::HandshakeTimeout(endpoint.endpoint.limits.handshake_timeout),
        error => error.into(),
    }
}

/// A stop that has left the handshakes under way a moment. Who connected just before it, as during a restart, is served;
/// who says nothing delays it by no more than that.
async fn stopped(endpoint: &EndpointRuntime) {
    endpoint.stopping.cancelled().await;
    sleep(HANDSHAKES_AT_STOP).await;
}

/// The connection to the service.
async fn connect(endpoint: &EndpointRuntime, route: &Route<'_>) -> Result<TcpStream, Refusal> {
    let connecting = Box::pin(endpoint.dialer.connect(&route.target, route.source));
    tokio::select! {
        biased;
        _ = endpoint.abort.cancelled() => Err(Refusal::Draining),
        result = connecting => result.inspect(keep_urgent_bytes),
    }
}

async fn relayed<T: Leg>(
    endpoint: &EndpointRuntime,
    record: &Record,
    service: &mut TcpStream,
    tunnel: &mut T,
) -> Outcome {
    Outcome::Relayed(endpoint.relay(record, service, tunnel).await)
}
