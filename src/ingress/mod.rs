//! Ingress: plain traffic into the tunnel. One file a mode; a mode says where a connection goes.

mod mapping;
mod multiplex;
mod netfilter;

use std::pin::pin;

use tokio::time::sleep;

use crate::config::Mode;
use crate::daemon::{Accepted, EndpointRuntime};
use crate::relay::{Leg, Outcome, PeerAddr, Refusal, Source, Target, TlsLeg, canonical, keep_urgent_bytes};
use crate::tls::{Alpn, Binding, Channel, ChannelError};

/// Where a connection of `mode` goes.
fn target(mode: &Mode, accepted: &Accepted) -> Result<Target, Refusal> {
    match mode {
        Mode::Mapping(mapping) => mapping::target(mapping, accepted.local),
        Mode::Netfilter(_) => netfilter::target(accepted.local, accepted.listener),
    }
}

/// Whose address the peer sees: a captured application's own choice.
fn source(mode: &Mode, accepted: &Accepted) -> Source<'static> {
    match mode {
        Mode::Mapping(_) => Source::Own,
        Mode::Netfilter(_) => Source::Chosen(accepted.client),
    }
}

pub use mapping::target as mapped_target;
pub use netfilter::original_dst;

/// Serves one accepted connection to its end.
pub async fn serve(endpoint: &EndpointRuntime, mut accepted: Accepted) {
    keep_urgent_bytes(&accepted.tcp);
    // Boxed, so that the handshake's state is given back before the connection idles for hours.
    let established = Box::pin(establish(endpoint, &accepted)).await;
    let outcome = match established {
        Ok(Tunnel::Whole(mut tunnel)) => {
            Outcome::Relayed(endpoint.relay(&accepted.record, &mut accepted.tcp, &mut tunnel).await)
        }
        // Boxed, so that no other connection carries its room.
        Ok(Tunnel::Stream(mut tunnel)) => {
            let relayed = Box::pin(endpoint.relay(&accepted.record, &mut accepted.tcp, &mut tunnel));
            Outcome::Relayed(relayed.await)
        }
        Err(refusal) => {
            // After a clean end the application would take the empty answer for the service's.
            accepted.tcp.abort();
            Outcome::Refused(refusal)
        }
    };
    drop(accepted.tcp);
    accepted.record.finish(outcome);
}

async fn establish(endpoint: &EndpointRuntime, accepted: &Accepted) -> Result<Tunnel, Refusal> {
    let limit = endpoint.endpoint.limits.handshake_timeout;
    let ended = |error| match error {
        ChannelError::HandshakeTimeout => Refusal::HandshakeTimeout(limit),
        error => error.into(),
    };
    let mut ending = pin!(async {
        tokio::select! {
            biased;
            _ = endpoint.abort.cancelled() => draining(),
            _ = sleep(limit) => ChannelError::HandshakeTimeout,
        }
    });
    let target = target(&endpoint.endpoint.mode, accepted)?;
    accepted.record.set_target(&target);
    let tcp = tokio::select! {
        biased;
        error = ending.as_mut() => return Err(ended(error)),
        tcp = endpoint.dialer.connect(&target, source(&endpoint.endpoint.mode, accepted)) => tcp?,
    };
    if let Ok(peer) = tcp.peer_addr() {
        accepted.record.set_peer_addr(PeerAddr(canonical(peer)));
    }
    let channel = endpoint.tunnel.connect_until(tcp, target.name(), ending.as_mut()).await;
    let Channel { stream, alpn, standing, .. } = channel.map_err(ended)?;
    accepted.record.set_binding(Binding::of(alpn, &endpoint.endpoint.ra));
    accepted.record.established(standing.as_ref());
    match alpn {
        Alpn::RatsTls | Alpn::Tng1 => Ok(Tunnel::Whole(Box::new(TlsLeg::new(stream)))),
        Alpn::H2 => tokio::select! {
            biased;
            error = ending => Err(ended(error)),
            opened = multiplex::open(stream) => opened.map(Box::new).map(Tunnel::Stream),
        },
    }
}

/// What the peer is told of a stop.
fn draining() -> ChannelError {
    let refusal = Refusal::Draining;
    ChannelError::Unserved { reason: refusal.reason(), text: refusal.to_string() }
}

/// On the heap: moving a TLS stream through futures by value would keep several copies' room.
enum Tunnel {
    /// One TCP connection's bytes are all it carries.
    Whole(Box<TlsLeg>),
    /// The peer speaks HTTP/2 in it.
    Stream(Box<multiplex::Multiplexed>),
}
