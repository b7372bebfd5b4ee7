//! `[*.netfilter]` and its entries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::check_effect;
use super::diagnostics::{Sink, quote};
use super::raw::{RawMatch, RawNetfilter};
use super::reader::{At, Scalar};
use super::values::{self, Who};
use super::{CgroupPath, Mark, Match, Netfilter, PortRange, Side};

const DEFAULT_SOURCE_PORTS: PortRange = PortRange { first: 1024, last: 32767 };

pub(super) fn netfilter(raw: &At<RawNetfilter>, side: Side, mark: Mark, sink: &mut Sink<'_>) -> Option<Netfilter> {
    let RawNetfilter { capture, exclude, capture_local_traffic, preserve_source, preserve_source_ports, .. } =
        &raw.value;
    if side == Side::Ingress {
        let egress_only = [
            ("capture_local_traffic", capture_local_traffic.as_ref().map(|a| &a.at)),
            ("preserve_source", preserve_source.as_ref().map(|a| &a.at)),
            ("preserve_source_ports", preserve_source_ports.as_ref().map(|a| &a.at)),
        ];
        for (key, at) in egress_only.into_iter().filter_map(|(key, at)| Some((key, at?))) {
            let message = format!("`{key}` is for an egress: an ingress always captures what this host sends");
            sink.error(at, "wrong-side", message, format!("remove `{key}`, or put it under [egress.netfilter]"));
        }
    }
    let captures = match capture {
        None if sink.is_written(&raw.at, "capture") => None,
        None => {
            let hint = "add for example capture = [{ port = 8443 }]";
            sink.error(&raw.at, "missing", "`capture` is missing: nothing would be captured", hint);
            None
        }
        Some(list) if list.value.is_empty() && !sink.has_errors_below(&list.at.path) => {
            sink.error(&list.at, "empty", "`capture` is empty: nothing would be captured", "add { port = 8443 }");
            None
        }
        Some(list) => entries(&list.value, "capture", side, sink),
    };
    let excludes = exclude.as_ref().map_or(Some(Vec::new()), |list| entries(&list.value, "exclude", side, sink));
    let sound = match (capture, &captures, &excludes) {
        (Some(raw), Some(captures), Some(excludes)) => {
            check_effect::entries(&raw.value, captures, excludes, side, sink)
        }
        _ => true,
    };

    let spoof = preserve_source.as_ref().is_none_or(|a| a.value);
    let source_ports = preserve_source_ports.as_ref().map_or(Some(DEFAULT_SOURCE_PORTS), |raw| {
        let ports = values::ports(raw, sink)?;
        if ports.first < 1024 {
            let message = format!("source ports {ports} begin below 1024, which only root may bind");
            sink.error(&raw.at, "out-of-range", message, "write \"1024-32767\"");
            return None;
        }
        if !spoof && side == Side::Egress {
            let message = format!("source ports {ports} have no effect while preserve_source = false");
            sink.warn(&raw.at, "no-effect", message, "remove `preserve_source_ports`");
        }
        Some(ports)
    });
    let listen_port = raw.value.listen_port.as_ref().map_or(Some(None), |raw| listen_port(raw, sink).map(Some));
    let so_mark = values::mark(raw.value.so_mark.as_ref(), mark, sink);
    Some(Netfilter {
        capture: captures.filter(|_| sound)?,
        exclude: excludes?,
        capture_local_traffic: capture_local_traffic.as_ref().is_some_and(|a| a.value),
        preserve_source: spoof && side == Side::Egress,
        preserve_source_ports: source_ports?,
        so_mark: so_mark?,
        listen_port: listen_port?,
    })
}

fn listen_port(raw: &At<Scalar>, sink: &mut Sink<'_>) -> Option<u16> {
    let ports = values::ports(raw, sink)?;
    if ports.first == ports.last && ports.first >= 1024 {
        return Some(ports.first);
    }
    let message = format!("listen_port {} is not one port of 1024-65535", raw.value);
    sink.error(&raw.at, "bad-port", message, "leave it out to have one chosen from 40000 up");
    None
}

fn entries(raw: &[At<RawMatch>], list: &str, side: Side, sink: &mut Sink<'_>) -> Option<Vec<Match>> {
    let mut checked: Vec<Match> = Vec::new();
    for entry in raw {
        let Some(parsed) = entry_of(entry, list, side, sink) else { continue };
        if checked.contains(&parsed) {
            sink.warn(&entry.at, "duplicate", format!("the same {list} entry twice"), "remove one of them");
        }
        checked.push(parsed);
    }
    (checked.len() == raw.len()).then_some(checked)
}

fn entry_of(raw: &At<RawMatch>, list: &str, side: Side, sink: &mut Sink<'_>) -> Option<Match> {
    let at = &raw.at;
    let RawMatch { to, port, uid, gid, cgroup, iif } = &raw.value;
    let none = to.is_none() && port.is_none() && uid.is_none() && gid.is_none() && cgroup.is_none() && iif.is_none();
    if none && sink.has_errors_below(&format!("{}.", at.path)) {
        return None;
    }
    if none {
        // A slip of the pen must not take ssh away from its operator.
        let hint = "name a `port` or `to`: { port = 8443 }";
        sink.error(at, "empty", format!("an empty {list} entry would match every TCP connection"), hint);
        return None;
    }
    let mut ok = true;
    match side {
        Side::Egress => {
            let owners = [("uid", uid.as_ref().map(|a| &a.at)), ("gid", gid.as_ref().map(|a| &a.at))];
            let owners = owners.into_iter().chain([("cgroup", cgroup.as_ref().map(|a| &a.at))]);
            for (key, at) in owners.filter_map(|(key, at)| Some((key, at?))) {
                let message = format!("`{key}` is for an ingress: a remote client's socket has no owner on this host");
                sink.error(at, "wrong-side", message, format!("remove `{key}`; an egress matches `to`, `port`, `iif`"));
                ok = false;
            }
        }
        Side::Ingress => {
            if let Some(iif) = iif {
                let message = format!("`iif` = {} on an ingress is not in this version", quote(&iif.value));
                sink.error(&iif.at, "not-in-this-version", message, "an ingress takes what this host itself sends");
                ok = false;
            }
        }
    }
    let optional = |set: bool, value: Option<()>| !set || value.is_some();
    let net = to.as_ref().and_then(|raw| network(raw, side, sink));
    let ports = port.as_ref().and_then(|raw| values::ports(raw, sink));
    let user = uid.as_ref().filter(|_| side == Side::Ingress).and_then(|raw| values::id(raw, Who::User, sink));
    let group = gid.as_ref().filter(|_| side == Side::Ingress).and_then(|raw| values::id(raw, Who::Group, sink));
    let slice = cgroup.as_ref().filter(|_| side == Side::Ingress).and_then(|raw| cgroup_path(raw, sink));
    let interface = iif.as_ref().filter(|_| side == Side::Egress).and_then(|raw| interface(raw, sink));
    ok &= optional(to.is_some(), net.map(drop)) && optional(port.is_some(), ports.map(drop));
    ok &= optional(uid.is_some(), user.map(drop)) && optional(gid.is_some(), group.map(drop));
    ok &= optional(cgroup.is_some(), slice.as_ref().map(drop)) && optional(iif.is_some(), interface.as_ref().map(drop));
    if ok && list == "capture" && port.is_none() && uid.is_none() && gid.is_none() && cgroup.is_none() {
        let what = if side == Side::Egress { "every port of this host, also ssh's" } else { "every port there" };
        sink.warn(at, "every-port", format!("without `port` this captures {what}"), "add `port` if that is not meant");
    }
    ok.then_some(Match { to: net, port: ports, uid: user, gid: group, cgroup: slice, iif: interface })
}

fn network(raw: &At<String>, side: Side, sink: &mut Sink<'_>) -> Option<IpNet> {
    let text = &raw.value;
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let Some(net) = parsed else {
        let hint = if text.contains(':') && text.contains('[') {
            "no brackets here, and the port in its own key: { to = \"2001:db8::1\", port = 8443 }"
        } else if text.contains('.') && text.contains(':') {
            "the port has its own key: { to = \"198.51.100.7\", port = 8443 }"
        } else {
            "an address or a prefix as \"198.51.100.0/24\"; names are not resolved in rules"
        };
        sink.error(&raw.at, "bad-address", format!("{} is neither an address nor a prefix", quote(text)), hint);
        return None;
    };
    if net.trunc() != net {
        let hint = format!("write \"{}\" for the network, or \"{}\" for the one address", net.trunc(), net.addr());
        let message = format!("{} has bits set behind its prefix length", quote(text));
        sink.error(&raw.at, "host-bits", message, hint);
        return None;
    }
    let refuse = |sink: &mut Sink<'_>, why: &str, hint: &str| {
        sink.error(&raw.at, "bad-address", format!("{} {why}", quote(text)), hint);
        None
    };
    let unspecified: [IpNet; 2] = [ThisNetwork::V4, ThisNetwork::V6].map(ThisNetwork::net);
    if unspecified.iter().any(|never| never.contains(&net)) {
        let any = if side == Side::Ingress { "every address that is not local" } else { "every address of this host" };
        let hint = format!("leave `to` out for {any}");
        sink.error(&raw.at, "never-matches", format!("{} is no address that packets go to", quote(text)), hint);
        return None;
    }
    // Only what lies wholly in these is refused on both sides.
    if let Some((why, hint)) = values::unusable(net.addr())
        && (net.prefix_len() >= if net.addr().is_ipv4() { 4 } else { 8 })
    {
        return refuse(sink, why, hint);
    }
    if side == Side::Ingress {
        let touches = |other: &str| {
            let other: IpNet = other.parse().expect("constant prefix");
            net.contains(&other) || other.contains(&net)
        };
        if touches("127.0.0.0/8") || touches("::1/128") {
            let hint = "leave `to` out for every address that is not local, or use [ingress.mapping]";
            return refuse(sink, "holds loopback addresses, whose traffic never leaves this host", hint);
        }
        if touches("fe80::/10") {
            let hint = "write narrower prefixes, or leave `to` out";
            return refuse(sink, "holds IPv6 link-local addresses, which the reroute cannot capture", hint);
        }
    }
    Some(net)
}

/// "This host on this network" (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5.2): a source, and never a destination.
#[derive(Clone, Copy)]
enum ThisNetwork {
    V4,
    V6,
}

impl ThisNetwork {
    fn net(self) -> IpNet {
        match self {
            Self::V4 => IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8)),
            Self::V6 => IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128)),
        }
    }
}

/// An interface name as the kernel allows it (dev_valid_name), less what nft would have to quote.
fn interface(raw: &At<String>, sink: &mut Sink<'_>) -> Option<String> {
    let name = &raw.value;
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'@');
    if (1..=15).contains(&name.len()) && name.bytes().all(legal) && name != "." && name != ".." {
        return Some(name.clone());
    }
    let hint = "1 to 15 characters, as `ip link` shows them: \"eth0\"";
    sink.error(&raw.at, "bad-interface", format!("{} is not an interface name", quote(name)), hint);
    None
}

fn cgroup_path(raw: &At<String>, sink: &mut Sink<'_>) -> Option<CgroupPath> {
    let path = &raw.value;
    let fail = |sink: &mut Sink<'_>, why: String, hint: String| {
        sink.error(&raw.at, "bad-cgroup", format!("cgroup {} {why}", quote(path)), hint);
        None
    };
    let trimmed = path.trim_start_matches("/sys/fs/cgroup").trim_matches('/');
    if path.starts_with('/') || path.ends_with('/') {
        return fail(sink, "is not relative to the cgroup root".into(), format!("write {}", quote(trimmed)));
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || b":_.@\\-".contains(&b);
    let mut parent = "";
    for part in path.split('/') {
        if part.is_empty() || part == "." || part == ".." || part.len() > 255 || !part.bytes().all(legal) {
            return fail(sink, format!("has the part {}", quote(part)), "write for example \"app.slice\"".into());
        }
        // systemd nests a-b.slice in a.slice; the short path would never match anything.
        if let Some((outer, _)) = part.strip_suffix(".slice").and_then(|s| s.rsplit_once('-'))
            && parent != format!("{outer}.slice")
        {
            let hint = format!("systemd puts it below {outer}.slice: see `systemctl show -p ControlGroup {part}`");
            return fail(sink, format!("has {part} in the wrong place"), hint);
        }
        parent = part;
    }
    if !path.ends_with(".slice") || parent == ".slice" {
        let hint = "a rule needs a cgroup that outlives restarts: put the unit into a slice (Slice=app.slice)";
        return fail(sink, "is not a slice".into(), hint.into());
    }
    Some(CgroupPath(path.clone()))
}
