//! What the rules of one instance are compiled from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::marks::EndpointId;
use super::selector::Selector;
use crate::config::{DEFAULT_EGRESS_MARK, DEFAULT_INGRESS_MARK, InstanceName, Mark, Netfilter, Side};

/// All captured endpoints of one instance, with ids and ports.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RulesPlan {
    /// Names the tables.
    pub instance: InstanceName,
    /// User the data plane runs as; its own mark counts only together with this owner.
    pub owner_uid: u32,
    /// Captured endpoints, ingresses first.
    pub captures: Vec<CapturePlan>,
    /// Ids and listener ports of ingress endpoints that are gone but may have open connections.
    pub retired: Vec<(EndpointId, u16)>,
    /// Marks of the sockets that this instance's ingresses (of any mode) open to their peers.
    pub ingress_marks: Vec<Mark>,
}

/// One captured endpoint.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CapturePlan {
    /// Endpoint name, with `-` as `_`: part of chain, set and counter names. Between two configurations (transition.rs)
    /// an endpoint may be there twice, the second time under another one.
    pub ident: String,
    /// Side.
    pub side: Side,
    /// Its id on this host.
    pub id: EndpointId,
    /// Port of its transparent listeners.
    pub port: u16,
    /// The `[*.netfilter]` table.
    pub netfilter: Netfilter,
    /// Its new connections are refused: between two configurations that give them to different endpoints, each with demands
    /// of its own on the peer, neither of the two listeners is right.
    #[serde(default)]
    pub refuse_new: bool,
}

impl RulesPlan {
    /// Nothing is captured.
    pub fn nothing(instance: InstanceName) -> Self {
        Self { instance, owner_uid: 0, captures: Vec::new(), retired: Vec::new(), ingress_marks: Vec::new() }
    }
    /// Name of the capture table.
    pub fn capture_table(&self) -> String {
        capture_table_name(&self.instance)
    }
    /// Name of the guard table.
    pub fn guard_table(&self) -> String {
        guard_table_name(&self.instance)
    }
    /// Endpoints of one side.
    pub fn side(&self, side: Side) -> impl Iterator<Item = &CapturePlan> {
        self.captures.iter().filter(move |c| c.side == side)
    }
    /// Marks that ingress sockets carry: the default always, so that two instances never capture each other's tunnels.
    pub fn all_ingress_marks(&self) -> Vec<Mark> {
        let mut marks = vec![DEFAULT_INGRESS_MARK];
        for mark in &self.ingress_marks {
            if !marks.contains(mark) {
                marks.push(*mark);
            }
        }
        marks
    }
    /// Distinct marks of the egress endpoints' sockets, the default always.
    pub fn egress_marks(&self) -> Vec<Mark> {
        let mut marks: Vec<Mark> = vec![DEFAULT_EGRESS_MARK];
        for c in self.side(Side::Egress) {
            if !marks.contains(&c.netfilter.so_mark) {
                marks.push(c.netfilter.so_mark);
            }
        }
        marks
    }
}

impl CapturePlan {
    /// What it captures.
    pub fn captured(&self) -> Selector {
        Selector::new(format!("c_{}", self.ident), &self.netfilter.capture)
    }
    /// What it leaves alone.
    pub fn excluded(&self) -> Selector {
        Selector::new(format!("x_{}", self.ident), &self.netfilter.exclude)
    }
    /// Counter of captured connections.
    pub fn captured_counter(&self) -> String {
        format!("captured_{}", self.endpoint_ident())
    }
    /// Counter of refused packets.
    pub fn refused_counter(&self) -> String {
        format!("refused_{}", self.endpoint_ident())
    }
    /// The two addresses it listens on.
    pub fn listeners(&self) -> [SocketAddr; 2] {
        listener_addrs(self.port)
    }
}

/// Transparent listeners bind to loopback only: a wildcard listener could be reached directly and would loop.
pub fn listener_addrs(port: u16) -> [SocketAddr; 2] {
    [SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port), SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port)]
}

/// `tng_NAME`.
pub fn capture_table_name(instance: &InstanceName) -> String {
    format!("tng_{instance}")
}

/// `tngguard_NAME`.
pub fn guard_table_name(instance: &InstanceName) -> String {
    format!("tngguard_{instance}")
}
