//! Egress: traffic out of the tunnel to the service. One file a mode; a mode says where the service
//! is and whose address it sees. The service hears of a connection only after the client's appraisal.

mod mapping;
mod multiplex;
mod netfilter;

use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::config::Mode;
use crate::daemon::{Accepted, EndpointRuntime, Permit};
use crate::relay::{
    ClientAddr, Leg, LivePorts, Outcome, PeerAddr, Record, Refusal, Source, Target, TlsLeg, keep_urgent_bytes,
};
use crate::tls::{Alpn, Binding, Channel};

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
    let admitted = Box::pin(accept(endpoint, client, tcp)).await;
    // Only what is established counts for `max_connections`.
    drop(permit);
    let outcome = match admitted {
        Err(refusal) => Outcome::Refused(refusal),
        Ok((Channel { stream, alpn, standing, .. }, _place)) => {
            record.set_binding(Binding::of(alpn, &endpoint.endpoint.ra));
            record.established(standing.as_ref());
            match alpn {
                Alpn::H2 => {
                    let streams = multiplex::Streams { endpoint, client, standing: standing.as_ref(), local, listener };
                    match Box::pin(streams.serve(stream)).await {
                        Ok(outcome) => outcome,
                        Err(refusal) => Outcome::Refused(refusal),
                    }
                }
                Alpn::RatsTls | Alpn::Tng1 => {
                    let mut tunnel = Box::new(TlsLeg::new(stream));
                    match connect(endpoint, &route).await {
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

/// Handshake and appraisal within the deadline, as a server, and then a place among the connections. A stop ends it
/// soon: nothing is lost that was not established.
async fn accept(endpoint: &EndpointRuntime, client: ClientAddr, tcp: TcpStream) -> Result<(Channel, Permit), Refusal> {
    let limits = &endpoint.endpoint.limits;
    let limit = limits.handshake_timeout;
    let patience = limits.first_byte_timeout.min(limit);
    let handshake = async |tcp: TcpStream| Ok(endpoint.tunnel.accept(tcp).await?);
    let established = async {
        let channel = timeout(limit, endpoint.handshakes.run(tcp, client, patience, handshake)).await;
        let channel = channel.unwrap_or(Err(Refusal::HandshakeTimeout(limit)))?;
        let verdict = channel.standing.as_ref().and_then(|standing| standing.verdict());
        endpoint.handshakes.admit(client, verdict.map(|verdict| verdict.expires_at));
        let place = timeout(limit, endpoint.gate.enter()).await;
        Ok((channel, place.map_err(|_| Refusal::TooManyConnections)?))
    };
    tokio::select! {
        biased;
        _ = stopped(endpoint) => Err(Refusal::Draining),
        _ = endpoint.abort.cancelled() => Err(Refusal::Draining),
        result = established => result,
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
