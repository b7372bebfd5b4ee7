//! The egress: what clients send to a captured service is handed to the listener in prerouting; what the service
//! answers to a preserved source comes back by lo instead of leaving the host.

use super::super::ir::*;
use super::super::marks::*;
use super::super::plan::{CapturePlan, RulesPlan};
use super::super::selector::Scope;
use super::ingress::{listener_rules, tproxy_rules};
use super::{INJECTED, PORT_IN_USE, each, excluded, refuse_new, shared, to_service};
use crate::config::Side;

pub(super) fn chains(plan: &RulesPlan) -> Vec<Chain> {
    let endpoints: Vec<&CapturePlan> = plan.side(Side::Egress).collect();
    if endpoints.is_empty() && plan.retired.is_empty() {
        return Vec::new();
    }
    let mut chains = vec![prerouting(plan, &endpoints), nat_pin(), output(plan, &endpoints), come_back()];
    for c in &endpoints {
        chains.push(select(c));
        chains.push(capture(c));
        chains.push(answer(c));
        chains.push(service(c));
    }
    let listeners = endpoints.iter().flat_map(|c| listener_rules(c)).collect();
    chains.push(Chain::base("egress_input", HookKind::Filter, HookPoint::Input, Priority::Filter, listeners));
    chains
}

fn prerouting(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Chain {
    let mut rules = to_service(plan);
    rules.push(Rule::new(
        [Match::IifLo(true), Match::CtMark(MARK_MASK, SPOOFED, true)],
        [Statement::Return],
        "service to our socket",
    ));
    rules.push(Rule::new(
        [Match::CtOriginal(false), Match::CtMark(MARK_MASK, LOCAL_CLIENT, true)],
        [Statement::Return],
        "answer to a client of this host that uses a captured port as its own",
    ));
    rules.push(Rule::new(
        [Match::BareSyn(true), Match::CtMark(MARK_MASK, SPOOFED, true)],
        shared(PORT_IN_USE).into_iter().chain([Statement::RejectReset]),
        "a new connection of a client from the port that we borrowed of it: told at once, to take another",
    ));
    rules.push(Rule::new(
        [Match::CtMark(MARK_MASK, SPOOFED, true)],
        shared(INJECTED).into_iter().chain([Statement::Drop]),
        "from off the host, on the tuple between us and the service: an injection",
    ));
    for c in endpoints {
        rules.push(Rule::new([], [Statement::Jump(format!("select_{}", c.ident))], "is it this endpoint's?"));
    }
    Chain::plain("egress_prerouting", rules)
}

fn select(c: &CapturePlan) -> Chain {
    let mut rules = Vec::new();
    if !c.netfilter.capture_local_traffic {
        rules.push(Rule::new([Match::IifLo(true)], [Statement::Return], "capture_local_traffic is off"));
    }
    rules.extend(excluded(c, End::Destination, Transport::Tcp, Scope::Local));
    let goto = [Statement::Goto(format!("capture_{}", c.ident))];
    rules.extend(each(
        c.captured().conditions(End::Destination, Transport::Tcp, Scope::Hook),
        &[],
        &[Match::FibLocalToIif],
        &goto,
        "a local address, link-local ones too",
    ));
    rules.extend(each(
        c.captured().conditions(End::Destination, Transport::Tcp, Scope::Local),
        &[],
        &[],
        &goto,
        "a local address",
    ));
    Chain::plain(format!("select_{}", c.ident), rules)
}

fn capture(c: &CapturePlan) -> Chain {
    let mut rules: Vec<Rule> = refuse_new(c).into_iter().collect();
    rules.push(Rule::new(
        [Match::CtNew, Match::BareSyn(true), Match::CtUnconfirmed],
        [Statement::Count(c.captured_counter())],
        "connections captured, not SYNs that are sent again",
    ));
    rules.extend(tproxy_rules(c.port, &[Statement::SetMark(TPROXIED), Statement::Accept]));
    rules.push(Rule::new(
        [Match::Tcp(true)],
        [Statement::Count(c.refused_counter()), Statement::RejectReset],
        "listener absent, or a flow older than the rules: refused",
    ));
    Chain::plain(format!("capture_{}", c.ident), rules)
}

/// Destination NAT of others (docker -p) after tproxy would carry the flow past the listener.
fn nat_pin() -> Chain {
    let pin = |family| {
        Rule::new(
            [Match::Mark(MARK_MASK, TPROXIED, true), Match::Family(family)],
            [Statement::PinDestination(family)],
            "a later DNAT must not carry the flow past the listener",
        )
    };
    Chain::base(
        "egress_pin",
        HookKind::Nat,
        HookPoint::Prerouting,
        Priority::BeforeDstnat,
        vec![pin(Family::V4), pin(Family::V6)],
    )
}

fn output(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Chain {
    let mut rules = Vec::new();
    for c in endpoints.iter().filter(|c| c.netfilter.preserve_source) {
        // A packet in output has not come in anywhere, so which interface the client used cannot be asked here.
        let mut rows = c.captured().conditions(End::Destination, Transport::Tcp, Scope::Local);
        rows.iter_mut().for_each(|row| row.retain(|m| !matches!(m, Match::IifName(_))));
        rules.extend(each(
            rows,
            &[Match::Mark(MARK_MASK, c.netfilter.so_mark, true)],
            &[Match::CtOriginal(true)],
            &[Statement::SetCtMark(SPOOFED)],
            "our socket to the service, with the client's address",
        ));
    }
    for mark in plan.egress_marks() {
        rules.push(Rule::new([Match::Mark(MARK_MASK, mark, true)], [Statement::Return], "our sockets"));
    }
    if endpoints.iter().any(|c| c.netfilter.preserve_source) {
        rules.push(Rule::new(
            [Match::ResetOfSynInUse, Match::CtMark(MARK_MASK, SPOOFED, true)],
            [Statement::Return],
            "our answer to a client that chose the port we borrowed: to that client, not to our socket",
        ));
        rules.push(Rule::new(
            [Match::ToLinkLocal, Match::FibLocal(End::Destination), Match::CtMark(MARK_MASK, SPOOFED, true)],
            [Statement::Return],
            "of a link-local client the service sees this host's address: stays here",
        ));
    }
    rules.push(Rule::new(
        [Match::CtMark(MARK_MASK, SPOOFED, true)],
        [Statement::Goto("egress_return".into())],
        "service to a preserved source",
    ));
    for c in endpoints {
        rules.push(Rule::new([], [Statement::Jump(format!("answer_{}", c.ident))], "is it this endpoint's?"));
    }
    Chain::plain("egress_output", rules)
}

fn answer(c: &CapturePlan) -> Chain {
    let mut rules = excluded(c, End::Source, Transport::Tcp, Scope::Hook);
    rules.extend(each(
        c.captured().conditions(End::Source, Transport::Tcp, Scope::Hook),
        &[],
        &[],
        &[Statement::Goto(format!("service_{}", c.ident))],
        "from a captured port, and not our socket",
    ));
    Chain::plain(format!("answer_{}", c.ident), rules)
}

/// Decides without connection state, which may be gone (conntrack flushed, FIN timeout) while the socket lives on.
fn service(c: &CapturePlan) -> Chain {
    let mut rules = vec![
        Rule::new([Match::FibLocal(End::Destination)], [Statement::Return], "stays on this host"),
        Rule::new(
            [Match::BareSyn(true), Match::CtNew],
            [Statement::SetCtMark(LOCAL_CLIENT)],
            "a client of this host that uses a captured port as its own",
        ),
        Rule::new([Match::CtMark(MARK_MASK, LOCAL_CLIENT, true)], [Statement::Return], "that client goes on"),
        Rule::new([Match::Rst], [Statement::Return], "carries no data; also the resets of these rules"),
    ];
    if c.netfilter.preserve_source {
        rules.push(Rule::new([], [Statement::SetCtMark(SPOOFED)], "what the service sends off the host is ours"));
        rules.push(Rule::new([], [Statement::Goto("egress_return".into())], "it may only meet our own socket"));
    } else {
        rules.push(Rule::new(
            [],
            [Statement::Count(c.refused_counter()), Statement::RejectReset],
            "only our sockets answer from a captured port",
        ));
    }
    Chain::plain(format!("service_{}", c.ident), rules)
}

fn come_back() -> Chain {
    Chain::plain(
        "egress_return",
        vec![Rule::new(
            [],
            [Statement::SetMark(RETURN_PATH), Statement::Accept],
            "the policy rule routes this mark to lo",
        )],
    )
}
