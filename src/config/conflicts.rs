//! What contradicts between endpoints: listeners, captures, and targets that lead back here.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::diagnostics::{Diagnostic, Severity, Sink};
use super::overlap::{arrives, excluded, intersection, listeners_meet, reaches};
use super::{Config, Endpoint, Mapping, Match, Mode, PortRange, Side};

/// One contradiction: the place that is at fault, the place it collides with, and why.
struct Conflict {
    severity: Severity,
    reason: &'static str,
    path: String,
    other: Option<String>,
    message: String,
    hint: String,
}

impl Conflict {
    fn error(reason: &'static str, path: String, other: String, message: String, hint: &str) -> Self {
        Self { severity: Severity::Error, reason, path, other: Some(other), message, hint: hint.to_owned() }
    }
}

/// Findings between the endpoints of one file, into its sink. `endpoints` carry their paths.
pub(super) fn within(endpoints: &[(String, Endpoint)], control: Option<SocketAddr>, sink: &mut Sink<'_>) {
    let mut found = Vec::new();
    let mut listeners: Vec<_> = endpoints.iter().flat_map(|(path, e)| listeners_of(path, e)).collect();
    listeners.extend(control.map(|a| ("control.listen".to_owned(), a.ip(), PortRange::single(a.port()))));
    for (i, a) in listeners.iter().enumerate() {
        found.extend(listeners[i + 1..].iter().filter(|b| a.0 != b.0).filter_map(|b| same_listener(a, b)));
    }
    let listeners_clash = !found.is_empty();
    marks(endpoints, &mut found);
    for (i, (path, endpoint)) in endpoints.iter().enumerate() {
        useless_excludes(path, endpoint, &mut found);
        for (other_path, other) in &endpoints[i + 1..] {
            found.extend(captures_meet(path, endpoint, other_path, other, false));
        }
        for (j, (other_path, other)) in endpoints.iter().enumerate() {
            if i != j {
                found.extend(target_captured(path, endpoint, other_path, other));
                found.extend(listener_captured(path, endpoint, other_path, other));
            }
        }
    }
    // With two listeners on one port there is no telling where a connection would go.
    if !listeners_clash {
        loops(endpoints, &mut found);
    }
    for c in found {
        let at = sink.place_of(&c.path);
        let message = match c.other {
            Some(other) => {
                let (line, _) = sink.position(sink.place_of(&other).offset);
                format!("{} {other} (line {line})", c.message)
            }
            None => c.message,
        };
        match c.severity {
            Severity::Error => sink.error(&at, c.reason, message, c.hint),
            Severity::Warning => sink.warn(&at, c.reason, message, c.hint),
        }
    }
}

/// What two instances of one host cannot both have: a listener, a capture. Each finding is placed
/// in `b`'s file and names the place in `a`'s. All are errors: which instance would win depends on
/// the order in which they start.
pub fn conflicts_between(a: &Config, b: &Config) -> Vec<Diagnostic> {
    let (ours, theirs) = (with_paths(a), with_paths(b));
    let listeners = |endpoints: &[(String, &Endpoint)], config: &Config| {
        let mut all: Vec<_> = endpoints.iter().flat_map(|(path, e)| listeners_of(path, e)).collect();
        let control = config.control_listen;
        all.extend(control.map(|a| ("control.listen".to_owned(), a.ip(), PortRange::single(a.port()))));
        all
    };
    let mut found = Vec::new();
    for second in listeners(&theirs, b) {
        found.extend(listeners(&ours, a).iter().filter_map(|first| same_listener(first, &second)));
    }
    for (second_path, second) in &theirs {
        for (first_path, first) in &ours {
            found.extend(captures_meet(first_path, first, second_path, second, true));
        }
    }
    let place = |c: Conflict| Diagnostic {
        severity: c.severity,
        reason: c.reason,
        file: b.source.clone(),
        line: None,
        column: None,
        path: c.path,
        message: format!("{} {} of {}", c.message, c.other.unwrap_or_default(), a.source.display()),
        hint: Some(c.hint),
    };
    found.into_iter().map(place).collect()
}

/// The endpoints with the paths that their file gives them.
pub fn with_paths(config: &Config) -> Vec<(String, &Endpoint)> {
    let (mut ingresses, mut egresses) = (0, 0);
    let path = |e: &Endpoint| {
        let count = match e.side {
            Side::Ingress => &mut ingresses,
            Side::Egress => &mut egresses,
        };
        *count += 1;
        format!("{}[{}]", e.side, *count - 1)
    };
    config.endpoints.iter().map(path).zip(&config.endpoints).collect()
}

type Listener = (String, IpAddr, PortRange);

fn listeners_of(path: &str, endpoint: &Endpoint) -> Vec<Listener> {
    match &endpoint.mode {
        Mode::Mapping(m) => vec![(format!("{path}.mapping.listen"), m.listen_addr, m.listen_ports)],
        // The transparent listener is on the loopback address of each family.
        Mode::Netfilter(n) => n.listen_port.map_or_else(Vec::new, |port| {
            let at = format!("{path}.netfilter.listen_port");
            let port = PortRange::single(port);
            vec![(at.clone(), Ipv4Addr::LOCALHOST.into(), port), (at, Ipv6Addr::LOCALHOST.into(), port)]
        }),
    }
}

fn same_listener(a: &Listener, b: &Listener) -> Option<Conflict> {
    // The two families of one netfilter listener meet another's twice; the first is enough.
    let repeated =
        a.1 == IpAddr::V6(Ipv6Addr::LOCALHOST) && b.1 == a.1 && a.0.ends_with("port") && b.0.ends_with("port");
    if repeated || !listeners_meet((a.1, a.2), (b.1, b.2)) {
        return None;
    }
    let message = format!("{} cannot be bound, its port is in use by", SocketPorts(b.1, b.2));
    let hint = "give each listener an address or port of its own";
    Some(Conflict::error("listener-conflict", b.0.clone(), a.0.clone(), message, hint))
}

/// `ADDRESS:PORTS` as the file writes it.
pub(super) struct SocketPorts(pub IpAddr, pub PortRange);

impl std::fmt::Display for SocketPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            IpAddr::V4(a) => write!(f, "{a}:{}", self.1),
            IpAddr::V6(a) => write!(f, "[{a}]:{}", self.1),
        }
    }
}

fn mark_of(path: &str, endpoint: &Endpoint) -> (String, super::Mark) {
    match &endpoint.mode {
        Mode::Mapping(m) => (format!("{path}.mapping.so_mark"), m.so_mark),
        Mode::Netfilter(n) => (format!("{path}.netfilter.so_mark"), n.so_mark),
    }
}

fn marks(endpoints: &[(String, Endpoint)], found: &mut Vec<Conflict>) {
    let of = |side: Side| endpoints.iter().filter(move |(_, e)| e.side == side).map(|(path, e)| mark_of(path, e));
    for (path, mark) in of(Side::Egress) {
        if let Some((other, _)) = of(Side::Ingress).find(|(_, m)| *m == mark) {
            let message = format!("mark {} lets sockets of an ingress walk past an egress: it is also that of", mark.0);
            let hint = "leave both so_mark out, or give each side its own";
            found.push(Conflict::error("mark-conflict", path, other, message, hint));
        }
    }
    // A socket unit has one mark for all its sockets, and the listener's must be there before the data plane is.
    let captured = |(_, e): &&(String, Endpoint)| e.side == Side::Egress && matches!(e.mode, Mode::Netfilter(_));
    let mut captures = endpoints.iter().filter(captured).map(|(path, e)| mark_of(path, e));
    let Some((first, mark)) = captures.next() else { return };
    for (path, other) in captures.filter(|(_, m)| *m != mark) {
        let message = format!("mark {} differs from {} of", other.0, mark.0);
        let hint = "captures of an egress share one so_mark in an instance; give this one an instance of its own";
        found.push(Conflict::error("mark-conflict", path, first.clone(), message, hint));
    }
}

/// An exclude that takes nothing away is rarely meant.
fn useless_excludes(path: &str, endpoint: &Endpoint, found: &mut Vec<Conflict>) {
    let Mode::Netfilter(n) = &endpoint.mode else { return };
    for (i, exclude) in n.exclude.iter().enumerate() {
        if n.capture.iter().any(|c| intersection(exclude, c).is_some()) {
            continue;
        }
        found.push(Conflict {
            severity: Severity::Warning,
            reason: "no-effect",
            path: format!("{path}.netfilter.exclude[{i}]"),
            other: None,
            message: "this excludes nothing that is captured".to_owned(),
            hint: "compare it with the entries of `capture`".to_owned(),
        });
    }
}

fn captures_meet(
    path: &str,
    endpoint: &Endpoint,
    other_path: &str,
    other: &Endpoint,
    two_instances: bool,
) -> Option<Conflict> {
    let (Mode::Netfilter(a), Mode::Netfilter(b)) = (&endpoint.mode, &other.mode) else { return None };
    if endpoint.side != other.side {
        return None;
    }
    let pairs = a.capture.iter().enumerate().flat_map(|(i, m)| b.capture.iter().enumerate().map(move |n| (i, m, n)));
    let (i, j, meet) = pairs
        .filter_map(|(i, x, (j, y))| Some((i, j, intersection(x, y)?)))
        .find(|(_, _, meet)| !excluded(a, meet) && !excluded(b, meet))?;
    let same_policy = endpoint.ra == other.ra && a.so_mark == b.so_mark;
    let severity = if same_policy && !two_instances { Severity::Warning } else { Severity::Error };
    let message = match (severity, two_instances) {
        (Severity::Warning, _) => format!("{} is captured twice, first by", Words(&meet)),
        (_, true) => format!("{} would go to whichever instance starts last; it is also captured by", Words(&meet)),
        (_, false) => format!("{} would meet either of two policies; it is also captured by", Words(&meet)),
    };
    Some(Conflict {
        severity,
        reason: "capture-overlap",
        path: format!("{other_path}.netfilter.capture[{j}]"),
        other: Some(format!("{path}.netfilter.capture[{i}]")),
        message,
        hint: "narrow one of the two, or add the overlap to its `exclude`".to_owned(),
    })
}

/// A match in words: `198.51.100.0/24 port 8443 uid 1000`.
pub(super) struct Words<'m>(pub &'m Match);

impl std::fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let m = self.0;
        let parts = [
            m.to.map(|to| if to.prefix_len() == to.max_prefix_len() { to.addr().to_string() } else { to.to_string() }),
            m.port.map(|p| format!("port {p}")),
            m.uid.map(|u| format!("uid {u}")),
            m.gid.map(|g| format!("gid {g}")),
            m.cgroup.as_ref().map(|c| format!("cgroup {}", c.0)),
            m.iif.as_ref().map(|i| format!("iif {i}")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

/// A mapping's target that a netfilter endpoint of the same side takes.
fn target_captured(path: &str, endpoint: &Endpoint, other_path: &str, other: &Endpoint) -> Option<Conflict> {
    let (Mode::Mapping(m), Mode::Netfilter(n)) = (&endpoint.mode, &other.mode) else { return None };
    if endpoint.side != other.side {
        return None;
    }
    // `to` absent: any local address on an egress (only loopback is known to be one here), any other on an ingress.
    let default_to = |addr: IpAddr| (endpoint.side == Side::Egress) == addr.is_loopback();
    let owners_fit = |c: &Match| {
        // The daemon has its own user and lives below system.slice.
        c.uid.is_none() && c.gid.is_none() && c.cgroup.as_ref().is_none_or(|g| g.0 == "system.slice")
    };
    let hit = |c: &Match| owners_fit(c) && reaches(&m.target_host, m.target_ports, c, default_to);
    let excluded = n
        .exclude
        .iter()
        .any(|c| hit(c) && c.port.is_none_or(|p| p.first <= m.target_ports.first && m.target_ports.last <= p.last));
    let entry = n.capture.iter().position(hit).filter(|_| !excluded)?;
    let target = format!("{}:{}", m.target_host, m.target_ports);
    let (message, hint) = match endpoint.side {
        // The mark that both share exempts the mapping: it reaches its peer as it should.
        Side::Ingress if m.so_mark == n.so_mark => return None,
        Side::Ingress => (
            format!("the tunnel to {target} would be put into a second tunnel: its mark {} does not pass", m.so_mark.0),
            "leave both so_mark out",
        ),
        Side::Egress if endpoint.ra != other.ra => (
            format!("connections to {target} would walk past the attestation policy of"),
            "two doors to one service: drop the mapping, or exclude its target from the capture",
        ),
        Side::Egress => (
            format!("{target} would be a second door to the service, unseen by the counters and limits of"),
            "drop the mapping, or exclude its target from the capture",
        ),
    };
    let other = format!("{other_path}.netfilter.capture[{entry}]");
    Some(Conflict::error("target-captured", format!("{path}.mapping.target"), other, message, hint))
}

/// An egress mapping's listener whose clients an egress capture takes away.
fn listener_captured(path: &str, endpoint: &Endpoint, other_path: &str, other: &Endpoint) -> Option<Conflict> {
    let (Mode::Mapping(m), Mode::Netfilter(n)) = (&endpoint.mode, &other.mode) else { return None };
    if endpoint.side != Side::Egress || other.side != Side::Egress {
        return None;
    }
    if m.listen_addr.is_loopback() && !n.capture_local_traffic {
        return None;
    }
    let to = |c: &Match| c.to.is_none_or(|net| m.listen_addr.is_unspecified() || net.contains(&m.listen_addr));
    let hit = |c: &Match| to(c) && c.port.is_none_or(|p| p.overlaps(m.listen_ports));
    let entry = n.capture.iter().position(|c| hit(c) && !excluded(n, c))?;
    let all =
        |c: &Match| hit(c) && c.port.is_none_or(|p| p.first <= m.listen_ports.first && m.listen_ports.last <= p.last);
    if n.exclude.iter().any(|c| all(c) && c.iif.is_none()) {
        return None;
    }
    let listen = SocketPorts(m.listen_addr, m.listen_ports);
    let message = format!("{listen} would never see a client, its connections are taken by");
    let other = format!("{other_path}.netfilter.capture[{entry}]");
    let hint = "use another port, or exclude this one from the capture";
    Some(Conflict::error("listener-captured", format!("{path}.mapping.listen"), other, message, hint))
}

/// Mappings whose targets lead back to where they began.
fn loops(endpoints: &[(String, Endpoint)], found: &mut Vec<Conflict>) {
    let mappings: Vec<(&str, &Mapping)> = endpoints
        .iter()
        .filter_map(|(path, e)| match &e.mode {
            Mode::Mapping(m) => Some((path.as_str(), m)),
            Mode::Netfilter(_) => None,
        })
        .collect();
    for start in 0..mappings.len() {
        let mut trail = vec![start];
        if follow(&mappings, start, mappings[start].1.listen_ports, &mut trail, &mut HashSet::new()) {
            // A loop is reported once, at its first member.
            if trail.iter().any(|i| *i < start) {
                continue;
            }
            let (path, m) = mappings[start];
            let target = format!("{}:{}", m.target_host, m.target_ports);
            let around: Vec<&str> = trail[1..].iter().map(|i| mappings[*i].0).collect();
            let message = if around.is_empty() {
                format!(
                    "{target} is this endpoint's own listener: it would connect to itself until descriptors run out, see"
                )
            } else {
                format!("{target} leads back here through {}, without end; see", around.join(", "))
            };
            let (path, other) = (format!("{path}.mapping.target"), format!("{path}.mapping.listen"));
            found.push(Conflict::error(
                "loop",
                path,
                other,
                message,
                "write the address and port of the real peer or service",
            ));
        }
    }
}

/// Whether connections that enter `at` on `ports` come back to the start of `trail`.
/// `seen` holds what was followed in vain: without it, names with two addresses double the work at each step.
fn follow(
    mappings: &[(&str, &Mapping)],
    at: usize,
    ports: PortRange,
    trail: &mut Vec<usize>,
    seen: &mut HashSet<(usize, PortRange)>,
) -> bool {
    let m = mappings[at].1;
    let shift = |p: u16| m.target_ports.first + (p - m.listen_ports.first);
    let out = PortRange { first: shift(ports.first), last: shift(ports.last) };
    for (next, (_, n)) in mappings.iter().enumerate() {
        if !arrives(&m.target_host, n.listen_addr) || !out.overlaps(n.listen_ports) {
            continue;
        }
        if next == trail[0] {
            return true;
        }
        if trail.contains(&next) {
            continue;
        }
        let first = out.first.max(n.listen_ports.first);
        let last = out.last.min(n.listen_ports.last);
        if !seen.insert((next, PortRange { first, last })) {
            continue;
        }
        trail.push(next);
        if follow(mappings, next, PortRange { first, last }, trail, seen) {
            return true;
        }
        trail.pop();
    }
    false
}
