//! What an endpoint captures, as sets and conditions.
//!
//! Entries with the same qualifiers share sets, so that a thousand prefixes cost one lookup. The elements of a set
//! are made disjoint here: nft 1.0.6 refuses a transaction whose concatenated intervals overlap.

use ipnet::IpNet;

use super::ir::*;
use crate::config::{CgroupPath, Match as Entry, PortRange};

/// Every port.
const ALL_PORTS: PortRange = PortRange { first: 0, last: 65535 };

/// The entries of one `capture` or `exclude` list, grouped by qualifiers.
#[derive(Debug, Clone, PartialEq)]
pub struct Selector {
    prefix: String,
    groups: Vec<Group>,
}

#[derive(Debug, Clone, PartialEq)]
struct Group {
    qualifiers: Qualifiers,
    v4: Vec<(IpNet, PortRange)>,
    v6: Vec<(IpNet, PortRange)>,
    /// Ports of the entries without `to`.
    any: Vec<PortRange>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Qualifiers {
    uid: Option<u32>,
    gid: Option<u32>,
    cgroup: Option<CgroupPath>,
    iif: Option<String>,
}

impl Qualifiers {
    fn of(entry: &Entry) -> Self {
        Self { uid: entry.uid, gid: entry.gid, cgroup: entry.cgroup.clone(), iif: entry.iif.clone() }
    }
    /// Whether it asks for the owner of the sending socket, which forwarded packets do not have.
    fn wants_socket(&self) -> bool {
        self.uid.is_some() || self.gid.is_some() || self.cgroup.is_some()
    }
    fn matches(&self, end: End) -> Vec<Match> {
        let mut out = Vec::new();
        out.extend(self.uid.map(Match::SkUid));
        out.extend(self.gid.map(Match::SkGid));
        out.extend(self.cgroup.clone().map(Match::Cgroup));
        if let Some(name) = self.iif.clone() {
            out.push(match end {
                End::Destination => Match::IifName(name),
                End::Source => Match::OifName(name),
            });
        }
        out
    }
}

impl Selector {
    /// Groups `entries`; `prefix` begins the names of its sets.
    pub fn new(prefix: String, entries: &[Entry]) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for entry in entries {
            let qualifiers = Qualifiers::of(entry);
            let at = groups.iter().position(|g| g.qualifiers == qualifiers).unwrap_or_else(|| {
                groups.push(Group { qualifiers, v4: Vec::new(), v6: Vec::new(), any: Vec::new() });
                groups.len() - 1
            });
            let ports = entry.port.unwrap_or(ALL_PORTS);
            match entry.to {
                None => groups[at].any.push(ports),
                Some(net @ IpNet::V4(_)) => groups[at].v4.push((net.trunc(), ports)),
                Some(net @ IpNet::V6(_)) => groups[at].v6.push((net.trunc(), ports)),
            }
        }
        for group in &mut groups {
            group.v4 = disjoint(std::mem::take(&mut group.v4));
            group.v6 = disjoint(std::mem::take(&mut group.v6));
            group.any = merge(std::mem::take(&mut group.any));
        }
        Self { prefix, groups }
    }

    /// The sets its conditions look into.
    pub fn sets(&self) -> Vec<Set> {
        let mut out = Vec::new();
        for (n, group) in self.groups.iter().enumerate() {
            for (kind, elements) in group.kinds() {
                if !elements.is_empty() {
                    out.push(Set { name: self.set_name(n, kind), kind, elements });
                }
            }
        }
        out
    }

    /// One list of conditions for each rule that is needed to select the traffic.
    ///
    /// `scope` is added for entries without `to` (and for all of them on an egress, see the callers).
    pub fn conditions(&self, end: End, transport: Transport, scope: Scope) -> Vec<Vec<Match>> {
        self.rows(end, transport, scope, |_| true)
    }

    /// The same without the entries that only a local socket can match: for forwarded packets.
    pub fn conditions_without_socket(&self, end: End, transport: Transport, scope: Scope) -> Vec<Vec<Match>> {
        self.rows(end, transport, scope, |q| !q.wants_socket())
    }

    /// Ports of every entry, for the one match that has no address (`ct original proto-dst`).
    pub fn ports(&self) -> Vec<PortRange> {
        let of = |list: &[(IpNet, PortRange)]| list.iter().map(|(_, p)| *p).collect::<Vec<_>>();
        merge(self.groups.iter().flat_map(|g| [of(&g.v4), of(&g.v6), g.any.clone()].concat()).collect())
    }

    fn rows(
        &self,
        end: End,
        transport: Transport,
        scope: Scope,
        keep: impl Fn(&Qualifiers) -> bool,
    ) -> Vec<Vec<Match>> {
        let mut out = Vec::new();
        for (n, group) in self.groups.iter().enumerate().filter(|(_, g)| keep(&g.qualifiers)) {
            for (kind, elements) in group.kinds() {
                if elements.is_empty() {
                    continue;
                }
                let mut row = vec![Match::InSet(kind, end, transport, self.set_name(n, kind))];
                row.extend(scope.matches(kind, end));
                row.extend(group.qualifiers.matches(end));
                out.push(row);
            }
        }
        out
    }

    fn set_name(&self, group: usize, kind: SetKind) -> String {
        let kind = match kind {
            SetKind::AddrPort4 => "to4",
            SetKind::AddrPort6 => "to6",
            SetKind::Port => "port",
        };
        format!("{}_{group}_{kind}", self.prefix)
    }
}

impl Group {
    fn kinds(&self) -> [(SetKind, Vec<Element>); 3] {
        let pairs = |list: &[(IpNet, PortRange)]| list.iter().map(|(n, p)| Element::AddrPort(*n, *p)).collect();
        [
            (SetKind::AddrPort4, pairs(&self.v4)),
            (SetKind::AddrPort6, pairs(&self.v6)),
            (SetKind::Port, self.any.iter().map(|p| Element::Port(*p)).collect()),
        ]
    }
}

/// Which addresses an entry without `to` means, and what is asked of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Nothing is added: the hook already says it.
    Hook,
    /// Entries without `to` mean other hosts' addresses (ingress).
    Remote,
    /// Every entry means addresses of this host (egress).
    Local,
}

impl Scope {
    fn matches(self, kind: SetKind, end: End) -> Option<Match> {
        match (self, kind) {
            (Scope::Remote, SetKind::Port) => Some(Match::FibRemote),
            (Scope::Local, _) => Some(Match::FibLocal(end)),
            _ => None,
        }
    }
}

/// Sorted, merged, no two ranges touching.
fn merge(mut ports: Vec<PortRange>) -> Vec<PortRange> {
    ports.sort_by_key(|p| p.first);
    let mut out: Vec<PortRange> = Vec::new();
    for p in ports {
        match out.last_mut() {
            Some(last) if u32::from(p.first) <= u32::from(last.last) + 1 => last.last = last.last.max(p.last),
            _ => out.push(p),
        }
    }
    out
}

/// What is left of `ports` outside `taken` (sorted and merged).
fn subtract(ports: PortRange, taken: &[PortRange]) -> Vec<PortRange> {
    let mut out = Vec::new();
    let mut first = u32::from(ports.first);
    for t in taken.iter().filter(|t| t.overlaps(ports)) {
        if u32::from(t.first) > first {
            out.push(PortRange { first: first as u16, last: t.first - 1 });
        }
        first = first.max(u32::from(t.last) + 1);
    }
    if first <= u32::from(ports.last) {
        out.push(PortRange { first: first as u16, last: ports.last });
    }
    out
}

/// Rectangles of prefix and ports that cover the same and do not overlap. Prefixes nest or are disjoint, so it is
/// enough to take from each prefix the ports that a wider one already has.
fn disjoint(mut list: Vec<(IpNet, PortRange)>) -> Vec<(IpNet, PortRange)> {
    list.sort_by_key(|(net, ports)| (net.prefix_len(), net.addr(), ports.first));
    let mut out: Vec<(IpNet, PortRange)> = Vec::new();
    let mut i = 0;
    while i < list.len() {
        let net = list[i].0;
        let run = list[i..].iter().take_while(|(n, _)| *n == net).count();
        let wider = merge(out.iter().filter(|(n, _)| n.contains(&net)).map(|(_, p)| *p).collect());
        let own = merge(list[i..i + run].iter().map(|(_, p)| *p).collect());
        out.extend(own.into_iter().flat_map(|p| subtract(p, &wider)).map(|p| (net, p)));
        i += run;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(s: &str) -> IpNet {
        s.parse().unwrap()
    }
    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn nested_prefixes_keep_only_the_ports_that_the_wider_lacks() {
        let got = disjoint(vec![
            (net("10.1.0.0/16"), range(80, 100)),
            (net("10.0.0.0/8"), range(90, 95)),
            (net("192.0.2.0/24"), range(80, 80)),
        ]);
        assert_eq!(
            got,
            vec![
                (net("10.0.0.0/8"), range(90, 95)),
                (net("10.1.0.0/16"), range(80, 89)),
                (net("10.1.0.0/16"), range(96, 100)),
                (net("192.0.2.0/24"), range(80, 80)),
            ]
        );
    }

    proptest::proptest! {
        #[test]
        fn disjoint_rectangles_cover_exactly_what_was_asked(
            entries in proptest::collection::vec((0u32..16, 28u8..=32, 0u16..12, 0u16..12), 1..8)
        ) {
            let list: Vec<_> = entries
                .iter()
                .map(|&(a, len, x, y)| {
                    let net = ipnet::Ipv4Net::new(std::net::Ipv4Addr::from(0xc000_0200 + a), len).unwrap().trunc();
                    (IpNet::V4(net), range(x.min(y), x.max(y)))
                })
                .collect();
            let out = disjoint(list.clone());
            for host in 0..16u32 {
                let addr = std::net::IpAddr::V4(std::net::Ipv4Addr::from(0xc000_0200 + host));
                for port in 0..12u16 {
                    let wanted = list.iter().any(|(n, p)| n.contains(&addr) && p.contains(port));
                    let got = out.iter().filter(|(n, p)| n.contains(&addr) && p.contains(port)).count();
                    proptest::prop_assert_eq!(got, usize::from(wanted));
                }
            }
        }
    }
}
