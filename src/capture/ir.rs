//! Rulesets as values: what nftables knows, as far as tng needs it.
//!
//! Pure functions build these (`compile`), one renderer turns them into nft text (`render`). No rule is
//! ever glued from strings.

use std::net::SocketAddr;

use ipnet::IpNet;

use crate::config::{CgroupPath, Mark, PortRange};

/// One `table inet`.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Whether the netlink socket that creates it owns it (`flags owner`).
    pub owned: bool,
    /// Named counters.
    pub counters: Vec<String>,
    /// Named sets.
    pub sets: Vec<Set>,
    /// Sets of flows, one a family.
    pub flows: Vec<FlowSet>,
    /// Chains, in an order in which a jump's target may come later.
    pub chains: Vec<Chain>,
}

/// A named interval set.
#[derive(Debug, Clone, PartialEq)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// What its elements are.
    pub kind: SetKind,
    /// The elements, disjoint.
    pub elements: Vec<Element>,
}

/// A set of flows that rules themselves fill, and that forgets each after [`FlowSet::MEMORY`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowSet {
    /// Its name.
    pub name: String,
    /// Family of its flows.
    pub family: Family,
}

impl FlowSet {
    /// How long a flow stays, in seconds. Linux sends a SYN again after one second.
    pub const MEMORY: u32 = 4;
    /// Most flows that it holds. What does not fit is not remembered.
    pub const MAX: u32 = 4096;
}

/// Type of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetKind {
    /// IPv4 address and port.
    AddrPort4,
    /// IPv6 address and port.
    AddrPort6,
    /// Port alone.
    Port,
}

/// One element of a [`Set`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Element {
    /// Prefix and ports.
    AddrPort(IpNet, PortRange),
    /// Ports.
    Port(PortRange),
}

/// A chain; without a hook it is only jumped to.
#[derive(Debug, Clone, PartialEq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where the kernel calls it.
    pub hook: Option<Hook>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// Where and when a base chain is called (policy is always accept: others' traffic is not ours to judge).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// Chain type.
    pub kind: HookKind,
    /// Netfilter hook.
    pub point: HookPoint,
    /// Priority, as nft names it.
    pub priority: Priority,
}

/// `type` of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookKind {
    /// `filter`
    Filter,
    /// `route`: a changed mark makes the kernel look up the route again.
    Route,
    /// `nat`
    Nat,
}

/// `hook` of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// Before the routing decision.
    Prerouting,
    /// Local delivery.
    Input,
    /// Forwarded.
    Forward,
    /// Locally generated.
    Output,
    /// On its way to a device.
    Postrouting,
}

/// `priority` of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// `mangle` (-150)
    Mangle,
    /// `dstnat - 10`: before others' DNAT.
    BeforeDstnat,
    /// `filter` (0)
    Filter,
    /// `filter + 10`: after nat in output (-100) and after other filters have seen the packet.
    AfterFilter,
    /// `filter + 20`: after reverse path filters, which firewalld has at `filter + 10`.
    AfterReversePath,
}

/// One rule. All matches must hold; then the statements run in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Conditions.
    pub matches: Vec<Match>,
    /// Effects.
    pub statements: Vec<Statement>,
    /// Why the rule is there, at most 128 bytes (nft's limit).
    pub comment: String,
}

/// Address family of a match or statement that exists once per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which end of the packet a set is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum End {
    /// Destination address and port: towards what is captured.
    Destination,
    /// Source address and port: the answers of what is captured.
    Source,
}

/// How a port is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// `tcp`
    Tcp,
    /// `th`: any transport with ports in the TCP place.
    Any,
}

/// A condition.
#[derive(Debug, Clone, PartialEq)]
pub enum Match {
    /// `meta l4proto tcp` / `!= tcp`
    Tcp(bool),
    /// UDP, UDP-Lite, SCTP or DCCP.
    OtherTransport,
    /// `meta nfproto`
    Family(Family),
    /// `meta mark & mask == value` / `!=`
    Mark(u32, Mark, bool),
    /// `ct mark & mask == value` / `!=`
    CtMark(u32, Mark, bool),
    /// `ct mark & 0xffff` is one of two.
    CtMarkOneOf(Mark, Mark),
    /// `ct direction original` / `reply`
    CtOriginal(bool),
    /// `ct state new`
    CtNew,
    /// The first packet of a connection. A SYN that is sent again belongs to one that is confirmed.
    CtUnconfirmed,
    /// `ct state untracked,invalid`
    CtUnknown,
    /// `ct status dnat`
    CtDnat,
    /// `ct original proto-dst` in ports.
    CtOriginalPort(Vec<PortRange>),
    /// `iif lo` / `iif != lo`
    IifLo(bool),
    /// `oif lo`
    OifLo,
    /// `iifname`
    IifName(String),
    /// `oifname`
    OifName(String),
    /// The flow is in a [`FlowSet`].
    InFlows(FlowSet),
    /// `ip daddr . tcp dport @set` and its relatives.
    InSet(SetKind, End, Transport, String),
    /// The address type of the destination (or source) is local.
    FibLocal(End),
    /// The destination is an address of the interface it came in by (link-local addresses).
    FibLocalToIif,
    /// The destination is an IPv6 link-local address.
    ToLinkLocal,
    /// The destination is an address of another host.
    FibRemote,
    /// A bare SYN: the first packet of an active open / anything else.
    BareSyn(bool),
    /// The reset with which a rule answers a bare SYN on a tuple that is in use. A SYN that nobody listens for has the
    /// same answer, but not on a connection that conntrack has seen established.
    ResetOfSynInUse,
    /// RST set.
    Rst,
    /// `meta skuid`
    SkUid(u32),
    /// `meta skgid`
    SkGid(u32),
    /// `socket cgroupv2 level N "path"`
    Cgroup(CgroupPath),
    /// The socket the packet belongs to is transparent.
    SocketTransparent,
    /// Exactly this destination (tng's own listener).
    Destination(SocketAddr),
}

/// An effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    /// Adds to a named counter.
    Count(String),
    /// Adds the flow to a [`FlowSet`], or starts its time anew.
    Remember(FlowSet),
    /// Writes the low half of the packet mark.
    SetMark(Mark),
    /// Writes the low half of the conntrack mark.
    SetCtMark(Mark),
    /// Clears the low half of the conntrack mark.
    ClearCtMark,
    /// `tproxy ip to` / `tproxy ip6 to`; falls through when nobody listens there.
    Tproxy(SocketAddr),
    /// `dnat to` its own destination: binds the identity, so that no later DNAT can move the flow.
    PinDestination(Family),
    /// `accept`
    Accept,
    /// `return`
    Return,
    /// `drop`
    Drop,
    /// `reject with tcp reset`
    RejectReset,
    /// `reject with icmpx type admin-prohibited`
    RejectProhibited,
    /// `goto`
    Goto(String),
    /// `jump`
    Jump(String),
}

impl Rule {
    /// A rule from its parts.
    pub fn new(
        matches: impl IntoIterator<Item = Match>,
        statements: impl IntoIterator<Item = Statement>,
        comment: &str,
    ) -> Self {
        Self {
            matches: matches.into_iter().collect(),
            statements: statements.into_iter().collect(),
            comment: comment.to_owned(),
        }
    }
}

impl Chain {
    /// A chain the kernel calls.
    pub fn base(name: &str, kind: HookKind, point: HookPoint, priority: Priority, rules: Vec<Rule>) -> Self {
        Self { name: name.to_owned(), hook: Some(Hook { kind, point, priority }), rules }
    }
    /// A chain that is jumped to.
    pub fn plain(name: impl Into<String>, rules: Vec<Rule>) -> Self {
        Self { name: name.into(), hook: None, rules }
    }
}
