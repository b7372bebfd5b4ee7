//! A fixed listener leads to a fixed service, which sees this host's address.

use std::net::SocketAddr;

use crate::config::Mapping;
use crate::relay::{Refusal, Source};

use super::Route;

/// The route of a connection that arrived at `local`.
///
/// # Errors
/// [`Refusal::UnmappedPort`] when a reload took the port out of the mapping meanwhile.
pub fn route(mapping: &Mapping, local: SocketAddr) -> Result<Route<'static>, Refusal> {
    Ok(Route { target: crate::ingress::mapped_target(mapping, local)?, source: Source::Own })
}
