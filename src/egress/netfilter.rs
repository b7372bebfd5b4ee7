//! nftables handed the connection over: the service is where the client wanted to go.

use std::net::SocketAddr;

use crate::config::Netfilter;
use crate::ingress::original_dst;
use crate::relay::{ClientAddr, LivePorts, Refusal, Source, Target};

use super::Route;

/// The route of a captured connection.
///
/// # Errors
/// [`Refusal::DirectToListener`] when nothing captured it.
pub fn route<'a>(
    netfilter: &Netfilter,
    client: ClientAddr,
    local: SocketAddr,
    listener: SocketAddr,
    live: &'a LivePorts,
) -> Result<Route<'a>, Refusal> {
    let target = Target::addr(original_dst(local, listener)?.0);
    let source = if netfilter.preserve_source {
        Source::Client { client, ports: netfilter.preserve_source_ports, live }
    } else {
        Source::Own
    };
    Ok(Route { target, source })
}
