//! Which captures and listeners meet: plain set arithmetic on validated values.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{CgroupPath, Match, Netfilter, PortRange, TargetHost};

/// What both values allow, `None` when nothing; an absent value allows everything.
fn both<T: Clone>(a: &Option<T>, b: &Option<T>, meet: impl Fn(&T, &T) -> Option<T>) -> Option<Option<T>> {
    match (a, b) {
        (Some(a), Some(b)) => meet(a, b).map(Some),
        (a, b) => Some(a.clone().or_else(|| b.clone())),
    }
}

fn same<T: Clone + PartialEq>(a: &T, b: &T) -> Option<T> {
    (a == b).then(|| a.clone())
}

fn nets(a: &IpNet, b: &IpNet) -> Option<IpNet> {
    if a.contains(b) {
        Some(*b)
    } else if b.contains(a) {
        Some(*a)
    } else {
        None
    }
}

fn port_ranges(a: &PortRange, b: &PortRange) -> Option<PortRange> {
    a.overlaps(*b).then(|| PortRange { first: a.first.max(b.first), last: a.last.min(b.last) })
}

/// A cgroup rule matches everything below its slice too.
fn below(inner: &CgroupPath, outer: &CgroupPath) -> bool {
    inner.0.strip_prefix(&outer.0).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn slices(a: &CgroupPath, b: &CgroupPath) -> Option<CgroupPath> {
    if below(a, b) {
        Some(a.clone())
    } else if below(b, a) {
        Some(b.clone())
    } else {
        None
    }
}

/// The traffic that both entries match, if there can be any.
pub(super) fn intersection(a: &Match, b: &Match) -> Option<Match> {
    Some(Match {
        to: both(&a.to, &b.to, nets)?,
        port: both(&a.port, &b.port, port_ranges)?,
        uid: both(&a.uid, &b.uid, same)?,
        gid: both(&a.gid, &b.gid, same)?,
        cgroup: both(&a.cgroup, &b.cgroup, slices)?,
        iif: both(&a.iif, &b.iif, same)?,
    })
}

/// Whether everything that `inner` matches is matched by `outer` as well.
pub(super) fn covers(outer: &Match, inner: &Match) -> bool {
    intersection(outer, inner).is_some_and(|meet| meet == *inner)
}

/// Whether `outers` together match everything that `inner` matches. Users, groups, cgroups and interfaces are not put
/// together of parts: of those an outer entry must ask for nothing that `inner` does not ask for as well.
pub(super) fn cover_together(outers: &[Match], inner: &Match) -> bool {
    let anywhere = |entry: &Match| Match { to: None, port: None, ..entry.clone() };
    let fitting: Vec<&Match> = outers.iter().filter(|outer| covers(&anywhere(outer), &anywhere(inner))).collect();
    let ports = |entry: &Match| {
        let range = entry.port.unwrap_or(PortRange { first: 1, last: u16::MAX });
        (u32::from(range.first), u32::from(range.last))
    };
    let (first, last) = ports(inner);
    // Between two of these every outer entry matches all ports or none.
    let mut starts: Vec<u32> = fitting.iter().flat_map(|o| [ports(o).0, ports(o).1 + 1]).chain([first]).collect();
    starts.retain(|port| (first..=last).contains(port));
    starts.sort_unstable();
    starts.dedup();
    [true, false].into_iter().filter_map(|v4| addresses(inner, v4)).all(|wanted| {
        starts.iter().all(|port| {
            let at_port = fitting.iter().filter(|o| (ports(o).0..=ports(o).1).contains(port));
            let mut ranges: Vec<(u128, u128)> = at_port.filter_map(|o| addresses(o, wanted.0)).map(|r| r.1).collect();
            ranges.sort_unstable();
            is_covered(wanted.1, &ranges)
        })
    })
}

/// First and last address of one family that an entry matches, and the family again.
fn addresses(entry: &Match, v4: bool) -> Option<(bool, (u128, u128))> {
    let number = |addr: IpAddr| match addr {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    };
    match entry.to {
        Some(net) if net.addr().is_ipv4() != v4 => None,
        Some(net) => Some((v4, (number(net.network()), number(net.broadcast())))),
        None => Some((v4, (0, if v4 { u128::from(u32::MAX) } else { u128::MAX }))),
    }
}

/// Whether sorted ranges leave nothing of `wanted` out.
fn is_covered(wanted: (u128, u128), ranges: &[(u128, u128)]) -> bool {
    let mut next = wanted.0;
    for (first, last) in ranges {
        if *first > next {
            return false;
        }
        if *last >= wanted.1 {
            return true;
        }
        next = next.max(last + 1);
    }
    false
}

/// Whether a mapping's connection to `host` and `ports` can be captured by `entry`, given what
/// `to` absent stands for. A name may resolve to anything and is judged by its port only when
/// it is `localhost`.
pub(super) fn reaches(host: &TargetHost, ports: PortRange, entry: &Match, default_to: impl Fn(IpAddr) -> bool) -> bool {
    let addrs: Vec<IpAddr> = match host {
        TargetHost::Addr(addr) => vec![*addr],
        TargetHost::LinkLocal(addr, _) => vec![IpAddr::V6(*addr)],
        TargetHost::Name(_) => loopbacks(host),
    };
    let to = |addr: &IpAddr| entry.to.map_or_else(|| default_to(*addr), |net| net.contains(addr));
    entry.port.is_none_or(|p| p.overlaps(ports)) && addrs.iter().any(to)
}

/// The loopback addresses that `localhost` stands for; nothing for another name.
pub(super) fn loopbacks(host: &TargetHost) -> Vec<IpAddr> {
    match host {
        TargetHost::Addr(addr) => vec![*addr],
        TargetHost::LinkLocal(addr, _) => vec![IpAddr::V6(*addr)],
        TargetHost::Name(n) if n.trim_end_matches('.') == "localhost" => {
            vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])]
        }
        TargetHost::Name(_) => Vec::new(),
    }
}

/// Whether an exclude entry takes `traffic` away from a capture.
pub(super) fn excluded(netfilter: &Netfilter, traffic: &Match) -> bool {
    netfilter.exclude.iter().any(|ex| covers(ex, traffic))
}

/// Whether two listeners cannot both be bound. `[::]` is dual-stack, as systemd and Linux bind it.
pub(super) fn listeners_meet(a: (IpAddr, PortRange), b: (IpAddr, PortRange)) -> bool {
    let dual = |x: IpAddr| x.is_ipv6() && x.is_unspecified();
    let wild = |x: IpAddr, y: IpAddr| dual(x) || (x.is_unspecified() && x.is_ipv4() == y.is_ipv4());
    a.1.overlaps(b.1) && (a.0 == b.0 || wild(a.0, b.0) || wild(b.0, a.0))
}

/// Whether a connection to `host` arrives at a listener on `listen` of this host.
pub(super) fn arrives(host: &TargetHost, listen: IpAddr) -> bool {
    let wild = |a: &IpAddr| listen.is_unspecified() && a.is_loopback() && (listen.is_ipv6() || a.is_ipv4());
    loopbacks(host).iter().any(|a| *a == listen || wild(a))
}
