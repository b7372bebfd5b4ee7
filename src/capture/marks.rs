//! The packet and connection marks, and why these bits.
//!
//! A mark is 32 bits shared by everything on the host. Kubernetes uses 0x4000 and 0x8000, Tailscale 0xff0000,
//! so no half is free of everybody; tng compares and writes the low 16 bits only ([`MARK_MASK`]) and always keeps
//! the upper 16. Inside them:
//!
//! | value | where | meaning |
//! |---|---|---|
//! | 565 (`so_mark`) | socket | an egress's socket: to the service, and the accepted ones towards clients |
//! | 566 (`so_mark`) | socket | an ingress's socket to its peer |
//! | 0x0578 | conntrack | egress to service with the client's source address |
//! | 0x0579 | packet | handed to a transparent listener of an egress |
//! | 0x057a | conntrack | a client of this host whose source port happens to be a captured port |
//! | 0x0600 | packet | service's answer on its way back to the egress, by way of lo |
//! | 0x0600 + id | packet, conntrack | captured by the ingress endpoint with that id |
//!
//! The policy routing rule looks at `0x0600/0xff00`: whatever is captured must leave by lo.

pub use crate::config::MARK_MASK;
use crate::config::Mark;

/// Upper bits that belong to others and survive every write.
pub const KEEP_MASK: u32 = 0xffff_0000;
/// Marks `0x06xx` are "captured": the policy routing rule sends them to lo.
pub const CAPTURED_BASE: u32 = 0x0600;
/// The bits that say "captured", without the endpoint's id.
pub const CAPTURED_MASK: u32 = 0xff00;
/// Conntrack mark of an egress's connection to the service with a preserved source.
pub const SPOOFED: Mark = Mark(0x0578);
/// Packet mark of what an egress's tproxy statement handed over.
pub const TPROXIED: Mark = Mark(0x0579);
/// Conntrack mark of a local client that uses a captured port as its source port.
pub const LOCAL_CLIENT: Mark = Mark(0x057a);
/// Packet mark of a service's answer on its way back to the egress.
pub const RETURN_PATH: Mark = Mark(CAPTURED_BASE);
/// Number of the routing table and preference of the rule.
pub const ROUTE_TABLE: u32 = 565;

/// Id of a captured endpoint, unique on the host: 1 to 255.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct EndpointId(pub u8);

impl EndpointId {
    /// The mark of packets and flows that this endpoint captured.
    pub fn mark(self) -> Mark {
        Mark(CAPTURED_BASE + u32::from(self.0))
    }
}
