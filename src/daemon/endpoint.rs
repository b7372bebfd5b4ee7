//! What the connections of one endpoint share, and one accepted connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Endpoint, Side};
use crate::relay::{
    ClientAddr, Dialer, End, Flow, Leg, LivePort, LivePorts, Meter, Record, RelayOptions, TunnelSide, relay,
};
use crate::tls::Binding;
use crate::{egress, ingress};

use super::connections::Connections;
use super::gate::{Gate, Permit};
use super::handshakes::Handshakes;
use super::stats::EndpointStats;

/// One endpoint as its configuration says now. A reload makes a new one for new connections;
/// established ones keep theirs.
pub struct EndpointRuntime {
    /// The configuration.
    pub endpoint: Endpoint,
    /// Its end of the tunnel.
    pub tunnel: Arc<dyn TunnelSide>,
    /// How it connects.
    pub dialer: Dialer,
    /// Its counters.
    pub stats: Arc<EndpointStats>,
    /// The live connections of the process.
    pub connections: Arc<Connections>,
    /// Ports that its clients use.
    pub live_ports: Arc<LivePorts>,
    /// Its bound on connections.
    pub gate: Arc<Gate>,
    /// An egress's bounds on what is not established yet.
    pub handshakes: Arc<Handshakes>,
    /// Services that an egress could not reach lately.
    pub unserved: egress::Unserved,
    /// Where its tasks are counted.
    pub tracker: TaskTracker,
    /// Set when nothing new may begin.
    pub stopping: CancellationToken,
    /// Set when everything must end.
    pub abort: CancellationToken,
}

/// A RATS-TLS peer that refuses this side has no message to say so. TNG closes the connection, within this time of the
/// handshake and without a byte; appraisal by its service is the longest part of it.
const DISMISSAL: Duration = Duration::from_secs(10);

/// A connection that was just accepted.
pub struct Accepted {
    /// The socket.
    pub tcp: TcpStream,
    /// Who connected.
    pub client: ClientAddr,
    /// The socket's own address; with TPROXY, where the client wanted to go.
    pub local: SocketAddr,
    /// The address of the listener that it came through.
    pub listener: SocketAddr,
    /// Its record.
    pub record: Record,
    /// The client's port, while the connection lives.
    pub live: LivePort,
    /// Its place: of an ingress among the connections, of an egress among those that arrive.
    pub permit: Permit,
}

impl EndpointRuntime {
    /// Serves one connection to its end.
    pub async fn serve(self: Arc<Self>, accepted: Accepted) {
        match self.endpoint.side {
            Side::Ingress => ingress::serve(&self, accepted).await,
            Side::Egress => egress::serve(&self, accepted).await,
        }
    }

    /// What a connection needs before it is accepted.
    pub(super) fn entrance(&self) -> &Arc<Gate> {
        match self.endpoint.side {
            Side::Ingress => &self.gate,
            Side::Egress => &self.handshakes.arrivals,
        }
    }

    /// Relays between the plain side and the tunnel, counting for `record`.
    pub(crate) async fn relay<P: Leg, T: Leg>(&self, record: &Record, plain: &mut P, tunnel: &mut T) -> End {
        record.relaying();
        let idle = self.endpoint.limits.idle_timeout;
        let connection = record.connection();
        let unacknowledged = self.endpoint.limits.unacknowledged_timeout;
        let options = RelayOptions {
            idle: (!idle.is_zero()).then_some(idle),
            unacknowledged: (!unacknowledged.is_zero()).then_some(unacknowledged),
            standing: connection.standing.get().map(|s| &**s),
        };
        let metrics = &self.stats.metrics;
        let meter = Meter {
            into_tunnel: Flow { connection: &connection.into_tunnel, endpoint: metrics.into_tunnel() },
            out_of_tunnel: Flow { connection: &connection.out_of_tunnel, endpoint: metrics.out_of_tunnel() },
        };
        // A token of its own: the shared one's lock would be taken for every poll of every connection.
        let begun = Instant::now();
        let end = relay(plain, tunnel, options, meter, &self.abort.child_token()).await;
        let at_once = begun.elapsed() < DISMISSAL && connection.out_of_tunnel.load(Ordering::Relaxed) == 0;
        match end {
            End::Truncated if at_once && connection.binding.get() != Some(&Binding::Session) => End::Dismissed,
            end => end,
        }
    }
}
