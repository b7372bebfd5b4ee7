//! Why the data plane does not run as the configuration asks.

use std::io;
use std::net::SocketAddr;

use crate::config::EndpointName;
use crate::tls::ChannelError;

/// Why the data plane did not start or take over a configuration.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    /// An endpoint's TLS could not be set up.
    #[error("endpoint {endpoint}: {error}")]
    Tls {
        /// The endpoint.
        endpoint: EndpointName,
        /// What failed.
        error: ChannelError,
    },
    /// The process may not mark its sockets, and captured traffic would loop.
    #[error("endpoint {endpoint}: cannot mark sockets: {error}; give the process CAP_NET_RAW")]
    Mark {
        /// The endpoint.
        endpoint: EndpointName,
        /// What setsockopt(2) said.
        error: io::Error,
    },
    /// A listener could not be used.
    #[error("listener {local} of endpoint {endpoint}: {error}")]
    Listener {
        /// The endpoint.
        endpoint: EndpointName,
        /// Its address.
        local: SocketAddr,
        /// What failed.
        error: io::Error,
    },
    /// A listener for an endpoint that the configuration does not have.
    #[error("listener {local} belongs to endpoint {endpoint}, which the configuration does not have")]
    StrayListener {
        /// The endpoint.
        endpoint: EndpointName,
        /// Its address.
        local: SocketAddr,
    },
    /// An endpoint without any listener would never be reached.
    #[error("endpoint {0} has no listener")]
    NoListener(EndpointName),
}

impl DataPlaneError {
    /// Stable slug for records, metrics, status and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            DataPlaneError::Tls { error, .. } => error.reason(),
            DataPlaneError::Mark { .. } => "mark-denied",
            DataPlaneError::Listener { .. } => "listener-failed",
            DataPlaneError::StrayListener { .. } => "stray-listener",
            DataPlaneError::NoListener(_) => "no-listener",
        }
    }
}
