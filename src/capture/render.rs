//! Rulesets as nft text: the only place that knows nft's syntax (nft(8), floor 1.0.6).

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::ir::*;
use super::marks::{KEEP_MASK, MARK_MASK};
use crate::config::PortRange;

/// The table as nft prints and reads it.
pub fn table(table: &Table) -> String {
    let mut out = format!("table inet {} {{\n", table.name);
    if table.owned {
        out.push_str("\tflags owner;\n");
    }
    for counter in &table.counters {
        let _ = writeln!(out, "\tcounter {counter} {{ }}");
    }
    for set in &table.sets {
        render_set(&mut out, set);
    }
    for set in &table.flows {
        let (flow, max, memory) = (render_flow(set.family), FlowSet::MAX, FlowSet::MEMORY);
        let _ = writeln!(
            out,
            "\tset {} {{\n\t\ttypeof {flow}; size {max}; flags dynamic,timeout; timeout {memory}s;\n\t}}",
            set.name
        );
    }
    for chain in &table.chains {
        let _ = writeln!(out, "\tchain {} {{", chain.name);
        if let Some(hook) = chain.hook {
            let _ = writeln!(out, "\t\t{}", render_hook(hook));
        }
        for rule in &chain.rules {
            let _ = writeln!(out, "\t\t{}", render_rule(rule));
        }
        out.push_str("\t}\n");
    }
    out.push_str("}\n");
    out
}

/// Names of what a table holds in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Present {
    /// Chains.
    pub chains: BTreeSet<String>,
    /// Sets.
    pub sets: BTreeSet<String>,
}

/// One transaction that brings a table in the kernel to `table`, creating it if need be.
///
/// Chains are flushed and filled again, never deleted while in use: deleting and creating a whole table under load
/// let packets out between the two (15 in 3,000 reloads), flush and re-add none. Named counters keep their values.
pub fn transaction(wanted: &Table, present: &Present) -> String {
    let name = &wanted.name;
    let mut out = String::new();
    for chain in &present.chains {
        let _ = writeln!(out, "flush chain inet {name} {chain}");
    }
    for set in &present.sets {
        let _ = writeln!(out, "flush set inet {name} {set}");
    }
    out.push_str(&table(wanted));
    let chains: BTreeSet<&str> = wanted.chains.iter().map(|c| c.name.as_str()).collect();
    let flows = wanted.flows.iter().map(|s| s.name.as_str());
    let sets: BTreeSet<&str> = wanted.sets.iter().map(|s| s.name.as_str()).chain(flows).collect();
    for chain in present.chains.iter().filter(|c| !chains.contains(c.as_str())) {
        let _ = writeln!(out, "delete chain inet {name} {chain}");
    }
    for set in present.sets.iter().filter(|s| !sets.contains(s.as_str())) {
        let _ = writeln!(out, "delete set inet {name} {set}");
    }
    out
}

/// One transaction that removes a table, whether it is there or not (nft 1.0.6 has no `destroy`).
pub fn removal(name: &str) -> String {
    format!("table inet {name}\ndelete table inet {name}\n")
}

fn render_set(out: &mut String, set: &Set) {
    let typeof_ = match set.kind {
        SetKind::AddrPort4 => "ip daddr . tcp dport",
        SetKind::AddrPort6 => "ip6 daddr . tcp dport",
        SetKind::Port => "tcp dport",
    };
    let _ = writeln!(out, "\tset {} {{\n\t\ttypeof {typeof_}; flags interval;", set.name);
    if !set.elements.is_empty() {
        let elements: Vec<String> = set.elements.iter().map(render_element).collect();
        let _ = writeln!(out, "\t\telements = {{ {} }}", elements.join(", "));
    }
    out.push_str("\t}\n");
}

fn render_element(element: &Element) -> String {
    match element {
        Element::Port(ports) => ports.to_string(),
        Element::AddrPort(net, ports) => format!("{} . {ports}", render_net(*net)),
    }
}

/// A prefix of length 0 is written as a range: nft has no other text for "all" inside a concatenation.
fn render_net(net: IpNet) -> String {
    match (net.prefix_len(), net) {
        (0, IpNet::V4(_)) => "0.0.0.0-255.255.255.255".to_owned(),
        (0, IpNet::V6(_)) => "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".to_owned(),
        (len, net) if len == net.max_prefix_len() => net.addr().to_string(),
        (_, net) => net.trunc().to_string(),
    }
}

fn render_hook(hook: Hook) -> String {
    let kind = match hook.kind {
        HookKind::Filter => "filter",
        HookKind::Route => "route",
        HookKind::Nat => "nat",
    };
    let point = match hook.point {
        HookPoint::Prerouting => "prerouting",
        HookPoint::Input => "input",
        HookPoint::Forward => "forward",
        HookPoint::Output => "output",
        HookPoint::Postrouting => "postrouting",
    };
    let priority = match hook.priority {
        Priority::Mangle => "mangle",
        Priority::BeforeDstnat => "dstnat - 10",
        Priority::Filter => "filter",
        Priority::AfterFilter => "filter + 10",
        Priority::AfterReversePath => "filter + 20",
    };
    format!("type {kind} hook {point} priority {priority}; policy accept;")
}

fn render_rule(rule: &Rule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(render_match).collect();
    words.extend(rule.statements.iter().map(render_statement));
    assert!(rule.comment.len() <= 128, "nft refuses comments over 128 bytes: {}", rule.comment);
    words.push(format!("comment \"{}\"", rule.comment));
    words.join(" ")
}

const SYN_OF: &str = "tcp flags & (fin | syn | rst | ack)";

fn render_match(m: &Match) -> String {
    let eq = |yes: bool| if yes { "==" } else { "!=" };
    match m {
        Match::Tcp(true) => "meta l4proto tcp".into(),
        Match::Tcp(false) => "meta l4proto != tcp".into(),
        Match::OtherTransport => "meta l4proto { udp, udplite, sctp, dccp }".into(),
        Match::Family(Family::V4) => "meta nfproto ipv4".into(),
        Match::Family(Family::V6) => "meta nfproto ipv6".into(),
        Match::Mark(mask, mark, yes) => format!("meta mark & {mask:#06x} {} {:#06x}", eq(*yes), mark.0),
        Match::CtMark(mask, mark, yes) => format!("ct mark & {mask:#06x} {} {:#06x}", eq(*yes), mark.0),
        Match::CtMarkOneOf(a, b) => format!("ct mark & {MARK_MASK:#06x} {{ {:#06x}, {:#06x} }}", a.0, b.0),
        Match::CtOriginal(true) => "ct direction original".into(),
        Match::CtOriginal(false) => "ct direction reply".into(),
        Match::CtNew => "ct state new".into(),
        Match::CtUnconfirmed => "ct status & confirmed == 0".into(),
        Match::CtUnknown => "ct state untracked,invalid".into(),
        Match::CtDnat => "ct status dnat".into(),
        Match::CtOriginalPort(ports) => format!("ct original proto-dst {}", render_ports(ports)),
        Match::IifLo(true) => "iif lo".into(),
        Match::IifLo(false) => "iif != lo".into(),
        Match::OifLo => "oif lo".into(),
        Match::IifName(name) => format!("iifname \"{name}\""),
        Match::OifName(name) => format!("oifname \"{name}\""),
        Match::InFlows(set) => format!("{} @{}", render_flow(set.family), set.name),
        Match::InSet(kind, end, transport, set) => render_lookup(*kind, *end, *transport, set),
        Match::FibLocal(End::Destination) => "fib daddr type local".into(),
        Match::FibLocal(End::Source) => "fib saddr type local".into(),
        Match::ResetOfSynInUse => {
            "tcp flags & (fin | syn | rst | ack) == (rst | ack) tcp sequence 0 ct status assured".into()
        }
        Match::ToLinkLocal => "ip6 daddr fe80::/10".into(),
        Match::FibLocalToIif => "fib daddr . iif type local".into(),
        Match::FibRemote => "fib daddr type != { local, broadcast, anycast, multicast }".into(),
        Match::BareSyn(yes) => format!("{SYN_OF} {} syn", eq(*yes)),
        Match::Rst => "tcp flags & rst == rst".into(),
        Match::SkUid(uid) => format!("meta skuid {uid}"),
        Match::SkGid(gid) => format!("meta skgid {gid}"),
        Match::Cgroup(path) => format!("socket cgroupv2 level {} \"{}\"", path.level(), path.0),
        Match::SocketTransparent => "socket transparent 1".into(),
        Match::Destination(addr) => {
            let ip = if addr.is_ipv4() { "ip" } else { "ip6" };
            format!("{ip} daddr {} tcp dport {}", addr.ip(), addr.port())
        }
    }
}

fn render_lookup(kind: SetKind, end: End, transport: Transport, set: &str) -> String {
    let (addr, port) = match end {
        End::Destination => ("daddr", "dport"),
        End::Source => ("saddr", "sport"),
    };
    let proto = match transport {
        Transport::Tcp => "tcp",
        Transport::Any => "th",
    };
    match kind {
        SetKind::AddrPort4 => format!("ip {addr} . {proto} {port} @{set}"),
        SetKind::AddrPort6 => format!("ip6 {addr} . {proto} {port} @{set}"),
        SetKind::Port => format!("{proto} {port} @{set}"),
    }
}

/// What tells TCP flows apart; the addresses say the family.
fn render_flow(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip saddr . tcp sport . ip daddr . tcp dport",
        Family::V6 => "ip6 saddr . tcp sport . ip6 daddr . tcp dport",
    }
}

fn render_ports(ports: &[PortRange]) -> String {
    let list: Vec<String> = ports.iter().map(ToString::to_string).collect();
    format!("{{ {} }}", list.join(", "))
}

fn render_statement(s: &Statement) -> String {
    match s {
        Statement::Count(name) => format!("counter name {name}"),
        Statement::Remember(set) => format!("update @{} {{ {} }}", set.name, render_flow(set.family)),
        Statement::SetMark(mark) => format!("meta mark set meta mark & {KEEP_MASK:#010x} | {:#06x}", mark.0),
        Statement::SetCtMark(mark) => format!("ct mark set ct mark & {KEEP_MASK:#010x} | {:#06x}", mark.0),
        Statement::ClearCtMark => format!("ct mark set ct mark & {KEEP_MASK:#010x}"),
        Statement::Tproxy(addr) => render_tproxy(*addr),
        Statement::PinDestination(Family::V4) => "dnat ip to ip daddr".into(),
        Statement::PinDestination(Family::V6) => "dnat ip6 to ip6 daddr".into(),
        Statement::Accept => "accept".into(),
        Statement::Return => "return".into(),
        Statement::Drop => "drop".into(),
        Statement::RejectReset => "reject with tcp reset".into(),
        Statement::RejectProhibited => "reject with icmpx type admin-prohibited".into(),
        Statement::Goto(chain) => format!("goto {chain}"),
        Statement::Jump(chain) => format!("jump {chain}"),
    }
}

fn render_tproxy(addr: SocketAddr) -> String {
    match addr.ip() {
        IpAddr::V4(ip) => format!("tproxy ip to {ip}:{}", addr.port()),
        IpAddr::V6(ip) => format!("tproxy ip6 to [{ip}]:{}", addr.port()),
    }
}
