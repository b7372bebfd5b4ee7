//! Which SYNs to send: addresses and ports from the captures themselves.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{Trial, name_of};
use crate::capture::ir::Family;
use crate::config::{Config, Endpoint, Match, Mode, Netfilter, PortRange, Side};

/// Addresses tried for a route at most.
const MAX_CANDIDATES: usize = 16;
/// Addresses taken from the start of each network.
const FROM_EACH: usize = 4;
/// The port of a capture of all ports.
const ANY_PORT: u16 = 443;
/// Documentation prefixes (RFC 5737, RFC 3849): nobody's, in case a capture names no address.
const NOBODYS: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// One trial for each captured endpoint and family, and which could not be chosen and why.
pub(super) fn choose(config: &Config, locals: &[IpAddr]) -> (Vec<Trial>, Vec<String>) {
    let (mut trials, mut left_out) = (Vec::new(), Vec::new());
    for endpoint in &config.endpoints {
        let Mode::Netfilter(netfilter) = &endpoint.mode else { continue };
        for family in [Family::V4, Family::V6] {
            match one(endpoint, netfilter, family, locals) {
                Ok(Some(trial)) => trials.push(trial),
                Ok(None) => {}
                Err(why) => left_out.push(format!("endpoint {}, {}: {why}", endpoint.name, name_of(family))),
            }
        }
    }
    (trials, left_out)
}

/// `Ok(None)`: the endpoint captures nothing of this family.
fn one(
    endpoint: &Endpoint,
    netfilter: &Netfilter,
    family: Family,
    locals: &[IpAddr],
) -> Result<Option<Trial>, &'static str> {
    let mut entries: Vec<&Match> =
        netfilter.capture.iter().filter(|e| e.to.is_none_or(|net| is_of(net.addr(), family))).collect();
    if entries.is_empty() {
        return Ok(None);
    }
    // Those that ask for nobody in particular come first: root's socket stands for every program's.
    entries.sort_by_key(|e| e.uid.is_some() || e.gid.is_some());
    let mut why = "no address of the capture is left that is not excluded";
    for entry in entries {
        if entry.cgroup.is_some() {
            why = "the capture asks for a cgroup, which the doctor is not in";
            continue;
        }
        if entry.iif.is_some() {
            why = "the capture asks for an interface, and a trial comes by a device of the doctor's own";
            continue;
        }
        let owner = (entry.uid.unwrap_or(0), entry.gid.unwrap_or(0));
        let all = match endpoint.side {
            Side::Ingress => remote(entry.to, family, locals),
            Side::Egress => local(entry.to, family, locals),
        };
        if all.is_empty() && endpoint.side == Side::Egress {
            why = "this host has no address of the capture";
        }
        for port in ports(entry.port) {
            let is_free = |addr: &IpAddr| !netfilter.exclude.iter().any(|e| excludes(e, *addr, port, owner));
            let to: Vec<IpAddr> = all.iter().copied().filter(is_free).take(MAX_CANDIDATES).collect();
            if !to.is_empty() {
                let endpoint_name = endpoint.name.as_str().to_owned();
                return Ok(Some(Trial { endpoint: endpoint_name, side: endpoint.side, family, to, port, owner }));
            }
        }
    }
    Err(why)
}

fn is_of(addr: IpAddr, family: Family) -> bool {
    addr.is_ipv4() == (family == Family::V4)
}

fn ports(range: Option<PortRange>) -> Vec<u16> {
    match range {
        None => vec![ANY_PORT, 1],
        Some(range) if range.contains(ANY_PORT) => vec![ANY_PORT, range.first, range.last],
        Some(range) => vec![range.first, range.last],
    }
}

/// What cannot be judged counts as excluded: a SYN must never go where the operator said that it must not.
fn excludes(entry: &Match, addr: IpAddr, port: u16, owner: (u32, u32)) -> bool {
    entry.to.is_none_or(|net| net.contains(&addr))
        && entry.port.is_none_or(|range| range.contains(port))
        && entry.uid.is_none_or(|uid| uid == owner.0)
        && entry.gid.is_none_or(|gid| gid == owner.1)
}

fn is_unicast(addr: IpAddr) -> bool {
    let link_local = match addr {
        IpAddr::V4(a) => a.is_broadcast() || a.octets()[0] == 0 || a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    !(link_local || addr.is_loopback() || addr.is_multicast() || addr.is_unspecified())
}

/// Addresses of this host.
fn local(to: Option<IpNet>, family: Family, locals: &[IpAddr]) -> Vec<IpAddr> {
    let is_meant = |a: &IpAddr| is_of(*a, family) && is_unicast(*a) && to.is_none_or(|net| net.contains(a));
    locals.iter().copied().filter(is_meant).collect()
}

/// Addresses of others.
fn remote(to: Option<IpNet>, family: Family, locals: &[IpAddr]) -> Vec<IpAddr> {
    // The first address of an IPv6 network is its routers' (RFC 4291 section 2.6.1).
    let first = to.into_iter().flat_map(|net| net.hosts().skip(usize::from(is_anycast(net))).take(FROM_EACH));
    let neighbours = locals.iter().filter(|a| is_unicast(**a)).map(|a| neighbour(*a));
    let mut all: Vec<IpAddr> = Vec::new();
    // An address without a route cannot be tried: of a wide network another one may have one.
    for addr in first.chain(NOBODYS).chain(neighbours) {
        let is_meant = is_of(addr, family) && to.is_none_or(|net| net.contains(&addr));
        if is_meant && is_unicast(addr) && !locals.contains(&addr) && !all.contains(&addr) {
            all.push(addr);
        }
    }
    all
}

fn is_anycast(net: IpNet) -> bool {
    net.addr().is_ipv6() && net.prefix_len() < 127
}

/// The address beside this one.
fn neighbour(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(a) => Ipv4Addr::from(u32::from(a) ^ 1).into(),
        IpAddr::V6(a) => Ipv6Addr::from(u128::from(a) ^ 1).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, InstanceName};

    const OWN: [&str; 4] = ["127.0.0.1", "192.0.2.11", "fe80::1", "2001:db8:1::2"];

    fn chosen(toml: &str) -> (Vec<Trial>, Vec<String>) {
        let name = InstanceName::new("x").expect("name");
        let loaded = config::parse(name, "x.toml".as_ref(), toml).unwrap_or_else(|e| panic!("{e:?}"));
        choose(&loaded.config, &OWN.map(|a| a.parse().expect("address")))
    }

    fn ingress(capture: &str) -> (Vec<Trial>, Vec<String>) {
        chosen(&format!("[[ingress]]\nno_ra = true\n[ingress.netfilter]\n{capture}\n"))
    }

    fn to(trials: &[Trial]) -> Vec<String> {
        trials.iter().map(|t| format!("{} {}", t.to[0], t.port)).collect()
    }

    #[test]
    fn an_ingress_is_tried_with_a_strangers_address_of_each_family() {
        let (trials, left_out) = ingress(
            "capture = [{ to = \"203.0.113.0/24\", port = 8080 }, { to = \"2001:db8:2::/64\", port = \"1-99\" }]",
        );
        assert_eq!(to(&trials), ["203.0.113.1 8080", "2001:db8:2::1 1"]);
        assert_eq!(left_out, [""; 0]);
        let (trials, _) = ingress("capture = [{ to = \"192.0.2.11/32\", port = 1 }]");
        assert!(trials.is_empty(), "this host's own address is not captured");
        let (trials, _) = ingress("capture = [{ port = 8080 }]");
        assert_eq!(to(&trials), ["192.0.2.1 8080", "2001:db8::1 8080"]);
    }

    #[test]
    fn what_is_excluded_is_never_sent_to() {
        let (trials, _) = ingress(
            "capture = [{ to = \"203.0.113.0/24\", port = \"80-81\" }]\nexclude = [{ to = \"203.0.113.1/32\" }, { port = 80 }]",
        );
        assert_eq!(to(&trials), ["203.0.113.2 81"]);
    }

    #[test]
    fn a_trial_belongs_to_the_user_that_is_captured_and_what_cannot_be_tried_is_told() {
        let (trials, _) = ingress("capture = [{ to = \"203.0.113.9/32\", port = 80, uid = 33 }]");
        assert_eq!((to(&trials)[0].as_str(), trials[0].owner), ("203.0.113.9 80", (33, 0)));
        let (trials, left_out) =
            ingress("capture = [{ to = \"203.0.113.9/32\", port = 80, cgroup = \"system.slice\" }]");
        assert!(trials.is_empty() && left_out[0].contains("cgroup"), "{left_out:?}");
    }

    #[test]
    fn an_egress_is_tried_at_the_hosts_own_addresses() {
        let egress =
            |capture: &str| chosen(&format!("[[egress]]\nno_ra = true\n[egress.netfilter]\ncapture = [{capture}]\n"));
        assert_eq!(to(&egress("{ port = 8080 }").0), ["192.0.2.11 8080", "2001:db8:1::2 8080"]);
        let (trials, left_out) = egress("{ to = \"198.51.100.9/32\", port = 8080 }");
        assert!(trials.is_empty() && left_out[0].contains("no address"), "{left_out:?}");
    }
}
