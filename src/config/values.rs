//! Single values: durations, ports, marks, names of users, addresses.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::diagnostics::{Place, Sink, quote};
use super::reader::{At, Scalar};
use super::{Mark, PortRange, TargetHost};

/// Marks that the rules themselves use, see the capture module.
const RESERVED_MARKS: [(u32, u32); 2] = [(0x0578, 0x057a), (0x0600, 0x06ff)];

/// A duration with its unit, within bounds (both inclusive).
pub(super) fn duration(
    raw: Option<&At<String>>,
    default: Duration,
    min: Duration,
    max: Duration,
    sink: &mut Sink<'_>,
) -> Option<Duration> {
    let Some(At { value, at }) = raw else { return Some(default) };
    let split = value.find(|c: char| !c.is_ascii_digit()).unwrap_or(value.len());
    let (digits, unit) = value.split_at(split);
    let millis = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let parsed = digits.parse::<u64>().ok().zip(millis).and_then(|(n, unit)| n.checked_mul(unit));
    let Some(parsed) = parsed.map(Duration::from_millis) else {
        let hint = if unit.is_empty() && !digits.is_empty() {
            format!("add the unit: \"{digits}s\" (ms, s, m or h)")
        } else {
            "a whole number and a unit: ms, s, m or h, as in \"30s\"".to_owned()
        };
        sink.error(at, "bad-duration", format!("{} is not a duration", quote(value)), hint);
        return None;
    };
    if parsed < min || parsed > max {
        let hint = format!("from {} to {}", show_duration(min), show_duration(max));
        sink.error(at, "out-of-range", format!("{} is out of range", quote(value)), hint);
        return None;
    }
    Some(parsed)
}

/// The shortest spelling of a duration that the file would accept.
pub(super) fn show_duration(d: Duration) -> String {
    match d.as_millis() {
        0 => "0s".to_owned(),
        ms if ms % 3_600_000 == 0 => format!("{}h", ms / 3_600_000),
        ms if ms % 60_000 == 0 => format!("{}m", ms / 60_000),
        ms if ms % 1000 == 0 => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}

/// Why some text is not a range of ports: message and hint.
pub(super) struct PortError(pub String, pub String);

/// `8443` or `8000-8100`.
pub(super) fn port_text(text: &str) -> Result<PortRange, PortError> {
    let one = |s: &str| {
        let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| s.parse::<u16>().ok().filter(|p| *p != 0)).flatten()
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (one(first), one(last)) {
        (Some(first), Some(last)) if first <= last => Ok(PortRange { first, last }),
        (Some(a), Some(b)) => {
            Err(PortError(format!("port range {} is backwards", quote(text)), format!("write \"{b}-{a}\"")))
        }
        _ if text.contains(',') => {
            Err(PortError(format!("port {} is a list", quote(text)), "write one entry for each port or range".into()))
        }
        _ => Err(PortError(
            format!("port {} is not 1-65535", quote(text)),
            "a port as 8443, or a range as \"8000-8100\"".into(),
        )),
    }
}

/// A port or a range, written as integer or string.
pub(super) fn ports(raw: &At<Scalar>, sink: &mut Sink<'_>) -> Option<PortRange> {
    let parsed = match &raw.value {
        Scalar::Int(n) => u16::try_from(*n).ok().filter(|p| *p != 0).map(PortRange::single).ok_or_else(|| {
            PortError(format!("port {n} is not 1-65535"), "a port as 8443, or a range as \"8000-8100\"".into())
        }),
        Scalar::Text(text) => port_text(text),
    };
    parsed.map_err(|PortError(message, hint)| sink.error(&raw.at, "bad-port", message, hint)).ok()
}

/// A socket mark; `default` when absent.
pub(super) fn mark(raw: Option<&At<i64>>, default: Mark, sink: &mut Sink<'_>) -> Option<Mark> {
    let Some(At { value, at }) = raw else { return Some(default) };
    let Some(mark) = u32::try_from(*value).ok().filter(|m| (1..=0xffff).contains(m)) else {
        let hint = "the upper 16 bits of a mark belong to other software";
        sink.error(at, "bad-mark", format!("mark {value} is not 1-65535"), hint);
        return None;
    };
    if RESERVED_MARKS.iter().any(|(first, last)| (*first..=*last).contains(&mark)) {
        let message = format!("mark {mark} ({mark:#06x}) is one that the capture rules use themselves");
        sink.error(at, "bad-mark", message, "use one outside 0x0578-0x057a and 0x0600-0x06ff, as the default");
        return None;
    }
    Some(Mark(mark))
}

/// Which database a name is looked up in.
#[derive(Clone, Copy)]
pub(super) enum Who {
    User,
    Group,
}

/// A numeric id, or a name that the host's user database knows now.
pub(super) fn id(raw: &At<Scalar>, who: Who, sink: &mut Sink<'_>) -> Option<u32> {
    let (what, tool) = match who {
        Who::User => ("user", "getent passwd"),
        Who::Group => ("group", "getent group"),
    };
    // The all-ones id is the kernel's "none": no socket ever has it.
    let number = |n: i64| u32::try_from(n).ok().filter(|n| *n != u32::MAX);
    let name = match &raw.value {
        Scalar::Int(n) => {
            if let Some(n) = number(*n) {
                return Some(n);
            }
            let hint = format!("0 to {}", u32::MAX - 1);
            sink.error(&raw.at, "bad-id", format!("{n} is not a {what} id"), hint);
            return None;
        }
        Scalar::Text(name) => name,
    };
    if !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit()) {
        let hint = format!("write the id without quotes: {}", &name[..name.len().min(10)]);
        sink.error(&raw.at, "bad-id", format!("{} is a number in quotes", quote(name)), hint);
        return None;
    }
    let found = match who {
        // A NUL byte ends a C string early, and another user's name would be looked up.
        _ if name.is_empty() || name.len() > 255 || name.contains('\0') => Ok(None),
        Who::User => nix::unistd::User::from_name(name).map(|u| u.map(|u| u.uid.as_raw())),
        Who::Group => nix::unistd::Group::from_name(name).map(|g| g.map(|g| g.gid.as_raw())),
    };
    match found {
        Ok(Some(id)) => Some(id),
        Ok(None) => {
            let hint = format!("see `{tool}`, or create the {what} first");
            sink.error(&raw.at, "unknown-id", format!("no {what} {} on this host", quote(name)), hint);
            None
        }
        Err(errno) => {
            let message = format!("cannot look up {what} {}: {errno}", quote(name));
            sink.error(&raw.at, "unknown-id", message, "write the numeric id");
            None
        }
    }
}

/// What no endpoint can listen on or connect to.
pub(super) fn unusable(addr: IpAddr) -> Option<(&'static str, &'static str)> {
    match addr {
        a if a.is_multicast() => Some(("is a multicast address", "TCP has no multicast; write a unicast address")),
        IpAddr::V4(a) if a.is_broadcast() => Some(("is the broadcast address", "write a unicast address")),
        IpAddr::V6(a) if a.is_unicast_link_local() => Some((
            "is an IPv6 link-local address, which needs an interface beside it and cannot be captured",
            "use a global or unique local address of the host",
        )),
        IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => {
            Some(("is an IPv4 address in IPv6 form, which never is on a wire", "write the IPv4 address"))
        }
        _ => None,
    }
}

fn is_link_local(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V6(a) if a.is_unicast_link_local())
}

/// The hint for an IPv6 address that lacks its brackets.
fn brackets_hint(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':')?;
    (host.contains(':') && !host.starts_with('[') && host.parse::<Ipv6Addr>().is_ok())
        .then(|| format!("IPv6 addresses stand in brackets: \"[{host}]:{port}\""))
}

/// Splits `host:ports`; the host of `[v6]:ports` loses its brackets.
fn host_ports<'s>(
    text: &'s str,
    at: &Place,
    what: &str,
    example: &str,
    sink: &mut Sink<'_>,
) -> Option<(&'s str, bool, PortRange)> {
    let (host, rest, bracketed) = match text.strip_prefix('[').and_then(|t| t.split_once(']')) {
        Some((host, rest)) => (host, rest.strip_prefix(':'), true),
        None => match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port), false),
            None => (text, None, false),
        },
    };
    let Some(ports) = rest.filter(|_| !host.is_empty() && (bracketed || !host.contains(':'))) else {
        let hint = brackets_hint(text).unwrap_or_else(|| {
            if host.is_empty() && what == "listen" {
                format!("write the address too: \"0.0.0.0{text}\" or \"[::]{text}\" for all")
            } else {
                format!("write for example \"{example}\"")
            }
        });
        sink.error(at, "bad-address", format!("{} is not ADDRESS:PORT", quote(text)), hint);
        return None;
    };
    match port_text(ports) {
        Ok(ports) => Some((host, bracketed, ports)),
        Err(PortError(message, hint)) => {
            sink.error(at, "bad-port", message, hint);
            None
        }
    }
}

/// `127.0.0.1:10001`, `[::1]:10010-10020`.
pub(super) fn listen(raw: &At<String>, sink: &mut Sink<'_>) -> Option<(IpAddr, PortRange)> {
    let (host, bracketed, ports) = host_ports(&raw.value, &raw.at, "listen", "127.0.0.1:10001", sink)?;
    let parsed = host.parse::<IpAddr>().ok().filter(|a| a.is_ipv6() == bracketed);
    let Some(addr) = parsed else {
        let message = format!("{} is not an address of this host", quote(host));
        sink.error(&raw.at, "bad-address", message, "names are not resolved here: write 127.0.0.1, 0.0.0.0 or [::1]");
        return None;
    };
    if let Some((why, hint)) = unusable(addr) {
        sink.error(&raw.at, "bad-address", format!("{addr} {why}"), hint);
        return None;
    }
    Some((addr, ports))
}

/// `192.0.2.10:20001`, `[2001:db8::1]:20001`, `db.example:10010-10020`.
pub(super) fn target(raw: &At<String>, sink: &mut Sink<'_>) -> Option<(TargetHost, PortRange)> {
    let (host, bracketed, ports) = host_ports(&raw.value, &raw.at, "target", "192.0.2.10:20001", sink)?;
    let fail = |sink: &mut Sink<'_>, message: String, hint: &str| {
        sink.error(&raw.at, "bad-address", message, hint);
        None
    };
    if let Ok(addr) = host.parse::<IpAddr>()
        && addr.is_ipv6() == bracketed
    {
        if addr.is_unspecified() {
            return fail(sink, format!("{addr} is no address to connect to"), "for this host write 127.0.0.1 or [::1]");
        }
        return match unusable(addr) {
            Some((_, _)) if is_link_local(addr) => {
                let hint = format!("write the interface beside it: \"[{addr}%eth0]\"");
                fail(sink, format!("{addr} is an IPv6 link-local address and names no interface"), &hint)
            }
            Some((why, hint)) => fail(sink, format!("{addr} {why}"), hint),
            None => Some((TargetHost::Addr(addr), ports)),
        };
    }
    if let Some((addr, zone)) = host.split_once('%').filter(|_| bracketed) {
        let Some(addr) = addr.parse::<Ipv6Addr>().ok().filter(|a| is_link_local(IpAddr::V6(*a))) else {
            let message = format!("{} is not an IPv6 link-local address with its interface", quote(host));
            return fail(sink, message, "only fe80:: addresses have one, as \"[fe80::1%eth0]:20001\"");
        };
        // IFNAMSIZ with its end is 16; netdevice(7).
        if zone.is_empty()
            || zone.len() > 15
            || zone.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control())
        {
            return fail(sink, format!("{} is no interface", quote(zone)), "ip link lists those of this host");
        }
        return Some((TargetHost::LinkLocal(addr, zone.to_owned()), ports));
    }
    if bracketed || !is_hostname(host) {
        let message = format!("{} is neither an address nor a host name", quote(host));
        return fail(sink, message, "write for example \"192.0.2.10:20001\" or \"db.example:20001\"");
    }
    Some((TargetHost::Name(host.to_ascii_lowercase()), ports))
}

/// RFC 1123 names, and `_` as in service names. An all-digit last label would be a mistyped address.
fn is_hostname(s: &str) -> bool {
    let s = s.strip_suffix('.').unwrap_or(s);
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    s.len() <= 253
        && s.split('.').all(label)
        && !s.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()))
}
