//! Whose place an endpoint takes in a reload: its predecessor's open connections are judged by its rules from then on.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use super::endpoint::EndpointRuntime;
use super::worker::Listening;
use crate::config::{Endpoint, EndpointName, Side};
use crate::os::lock::Lock;
use crate::relay::TunnelSide;
use crate::tls::WeakStandings;

/// An endpoint that a reload brings or leaves.
pub(super) struct Heir {
    name: EndpointName,
    side: Side,
    /// Where it listens.
    at: Vec<SocketAddr>,
    tunnel: Arc<dyn TunnelSide>,
}

impl Heir {
    /// The endpoint of `runtime`, with these listeners.
    pub(super) fn of(runtime: &EndpointRuntime, listeners: &[Arc<Listening>]) -> Self {
        let Endpoint { name, side, .. } = &runtime.endpoint;
        let at = listeners.iter().map(|l| l.local).collect();
        Self { name: name.clone(), side: *side, at, tunnel: runtime.tunnel.clone() }
    }
}

/// An endpoint that is there, or was, with the peers of its open connections.
struct Known {
    name: EndpointName,
    side: Side,
    at: Vec<SocketAddr>,
    peers: WeakStandings,
}

impl Known {
    fn is(&self, heir: &Heir) -> bool {
        self.name == heir.name && self.side == heir.side
    }

    /// Renamed, as far as anybody can tell: it takes connections of the same kind in the same place.
    fn is_where(&self, heir: &Heir) -> bool {
        self.side == heir.side && self.at.iter().any(|addr| heir.at.contains(addr))
    }
}

/// All endpoints whose connections may still be open, also removed ones: another reload may bring them back.
#[derive(Default)]
pub(super) struct Lineage(Mutex<Vec<Known>>);

impl Lineage {
    /// `heirs` are all endpoints there are now. Who has no heir keeps the rules it had.
    pub(super) fn hand_over(&self, heirs: &[Heir]) {
        let mut known = self.0.locked();
        known.retain(|k| k.peers.upgrade().is_some());
        let mut now = Vec::new();
        for heir in heirs {
            let of_its_name = known.iter().position(|k| k.is(heir));
            let renamed = || known.iter().position(|k| k.is_where(heir) && !heirs.iter().any(|h| k.is(h)));
            let former = of_its_name.or_else(renamed).and_then(|at| known.swap_remove(at).peers.upgrade());
            if let (Some(former), Some(own)) = (former, heir.tunnel.peers())
                && !former.are(&own)
            {
                heir.tunnel.take_over(&former);
            }
            if let Some(peers) = heir.tunnel.peers() {
                let Heir { name, side, at, .. } = heir;
                now.push(Known { name: name.clone(), side: *side, at: at.clone(), peers: peers.downgrade() });
            }
        }
        known.append(&mut now);
    }
}
