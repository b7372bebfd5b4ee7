//! The protecting chains: what must not leave or arrive, whatever happened to capture.
//!
//! They repeat every qualifier of the captures, otherwise they would refuse others' traffic.

use super::super::ir::*;
use super::super::marks::*;
use super::super::plan::{CapturePlan, RulesPlan};
use super::super::selector::Scope;
use super::{NOT_TCP, ON_WIRE, each, excluded, shared, stuck, to_service};
use crate::config::{Mark, Side};

pub(super) fn chains(plan: &RulesPlan) -> Vec<Chain> {
    let ingress: Vec<&CapturePlan> = plan.side(Side::Ingress).collect();
    let egress: Vec<&CapturePlan> = plan.side(Side::Egress).collect();
    let mut chains = Vec::new();
    if !plan.captures.is_empty() {
        chains.push(Chain::plain("protect_other", vec![other_transport()]));
    }
    chains.push(output(plan, &ingress, &egress));
    chains.push(forward(&ingress, &egress));
    chains.push(postrouting(&egress));
    chains.push(wire());
    for c in &ingress {
        chains.push(check(plan, c));
        chains.push(forwarded(c));
    }
    if !egress.is_empty() {
        let rules = each_asked("to", &egress);
        chains.push(Chain::base("protect_input", HookKind::Filter, HookPoint::Input, Priority::AfterFilter, rules));
        for c in &egress {
            chains.push(to(c));
            chains.push(protected(plan, c));
            chains.push(dnatted(plan, c));
            chains.push(from(plan, c));
        }
    }
    chains
}

fn other_transport() -> Rule {
    Rule::new(
        [Match::OtherTransport],
        shared(NOT_TCP).into_iter().chain([Statement::RejectProhibited]),
        "QUIC and friends on a captured port: not attested, so refused",
    )
}

fn output(plan: &RulesPlan, ingress: &[&CapturePlan], egress: &[&CapturePlan]) -> Chain {
    let again = |set| {
        Rule::new(
            [Match::BareSyn(true), Match::InFlows(set)],
            shared(ON_WIRE).into_iter().chain([Statement::RejectReset]),
            "its first SYN was kept off a wire: a socket bound to a device, or rule or route are missing",
        )
    };
    let mut rules: Vec<Rule> = stuck().map(again).into();
    for c in egress {
        let mut not_ours: Vec<Match> = vec![Match::BareSyn(true), Match::CtNew];
        not_ours.extend(plan.egress_marks().into_iter().map(|m| Match::Mark(MARK_MASK, m, false)));
        rules.extend(each(
            c.captured().conditions(End::Source, Transport::Tcp, Scope::Hook),
            &[],
            &not_ours,
            &[Statement::SetCtMark(LOCAL_CLIENT)],
            "a client of this host that uses a captured port as its own",
        ));
    }
    for c in ingress {
        rules.push(Rule::new([], [Statement::Jump(format!("check_{}", c.ident))], "is it captured?"));
    }
    Chain::base("protect_output", HookKind::Filter, HookPoint::Output, Priority::AfterFilter, rules)
}

/// Chain `check_NAME`: selects, then judges.
fn check(plan: &RulesPlan, c: &CapturePlan) -> Chain {
    let mut rules = excluded(c, End::Destination, Transport::Any, Scope::Remote);
    let rows = c.captured().conditions(End::Destination, Transport::Any, Scope::Remote);
    for row in rows {
        let judge = |extra: Vec<Match>, statements: Vec<Statement>, comment: &str| {
            Rule::new(row.iter().cloned().chain(extra), statements, comment)
        };
        rules.push(judge(vec![Match::Tcp(false)], vec![Statement::Goto("protect_other".into())], "not TCP"));
        rules.push(judge(
            vec![Match::Mark(CAPTURED_MASK, Mark(CAPTURED_BASE), true)],
            vec![Statement::Return],
            "captured, on its way to lo; postrouting sees to it",
        ));
        for mark in plan.all_ingress_marks() {
            // The mark alone is no identity (any CAP_NET_RAW process can set it), so the owner is asked for as well,
            // and kept in the connection: a socket that outlives close() has no owner any more.
            rules.push(judge(
                vec![
                    Match::Mark(MARK_MASK, mark, true),
                    Match::SkUid(plan.owner_uid),
                    Match::CtMark(MARK_MASK, Mark(0), true),
                ],
                vec![Statement::SetCtMark(mark)],
                "our upstream: remember whose it is",
            ));
            rules.push(judge(
                vec![Match::Mark(MARK_MASK, mark, true), Match::SkUid(plan.owner_uid)],
                vec![Statement::Return],
                "our upstream",
            ));
            rules.push(judge(
                vec![Match::Mark(MARK_MASK, mark, true), Match::CtMarkOneOf(mark, SPOOFED)],
                vec![Statement::Return],
                "our upstream after close(): it has no owner",
            ));
        }
        rules.push(judge(
            vec![Match::CtOriginal(false), Match::BareSyn(false)],
            vec![Statement::Return],
            "answers of a connection that came in",
        ));
        rules.push(judge(
            vec![],
            vec![Statement::Count(c.refused_counter()), Statement::RejectReset],
            "captured traffic that did not go through the tunnel",
        ));
    }
    Chain::plain(format!("check_{}", c.ident), rules)
}

/// Each endpoint has a chain of its own, `PREFIX_NAME`: what one endpoint excludes is still asked of the next.
fn each_asked(prefix: &str, endpoints: &[&CapturePlan]) -> Vec<Rule> {
    let jump =
        |c: &&CapturePlan| Rule::new([], [Statement::Jump(format!("{prefix}_{}", c.ident))], "is it this endpoint's?");
    endpoints.iter().map(jump).collect()
}

fn forward(ingress: &[&CapturePlan], egress: &[&CapturePlan]) -> Chain {
    let rules = [each_asked("forwarded", ingress), each_asked("dnatted", egress)].concat();
    Chain::base("protect_forward", HookKind::Filter, HookPoint::Forward, Priority::AfterFilter, rules)
}

fn forwarded(c: &CapturePlan) -> Chain {
    let rows = || c.captured().conditions_without_socket(End::Destination, Transport::Any, Scope::Remote);
    let mut rules = each(
        c.excluded().conditions_without_socket(End::Destination, Transport::Any, Scope::Remote),
        &[],
        &[],
        &[Statement::Return],
        "excluded",
    );
    rules.extend(each(rows(), &[], &[Match::Tcp(false)], &[Statement::Goto("protect_other".into())], "not TCP"));
    rules.extend(each(
        rows(),
        &[],
        &[Match::CtOriginal(false), Match::BareSyn(false)],
        &[Statement::Return],
        "answers of a connection that came in",
    ));
    rules.extend(each(
        rows(),
        &[],
        &[],
        &[Statement::Count(c.refused_counter()), Statement::RejectReset],
        "containers and routed hosts are not captured, so refused",
    ));
    Chain::plain(format!("forwarded_{}", c.ident), rules)
}

fn dnatted(plan: &RulesPlan, c: &CapturePlan) -> Chain {
    let mut matches = vec![Match::Tcp(true), Match::CtDnat, Match::CtOriginalPort(c.captured().ports())];
    matches.extend(plan.egress_marks().into_iter().map(|m| Match::Mark(MARK_MASK, m, false)));
    let rule = Rule::new(
        matches,
        [Statement::Count(c.refused_counter()), Statement::RejectReset],
        "DNAT moved it past the listener, e.g. docker -p",
    );
    Chain::plain(format!("dnatted_{}", c.ident), vec![rule])
}

fn to(c: &CapturePlan) -> Chain {
    let mut rules = excluded(c, End::Destination, Transport::Any, Scope::Hook);
    rules.extend(each(
        c.captured().conditions(End::Destination, Transport::Any, Scope::Hook),
        &[],
        &[],
        &[Statement::Goto(format!("check_{}", c.ident))],
        "to a captured service",
    ));
    Chain::plain(format!("to_{}", c.ident), rules)
}

fn protected(plan: &RulesPlan, c: &CapturePlan) -> Chain {
    let mut rules = to_service(plan);
    rules.push(Rule::new(
        [Match::IifLo(true), Match::CtMark(MARK_MASK, SPOOFED, true)],
        [Statement::Return],
        "last packets of a closed socket of ours: unmarked",
    ));
    if !c.netfilter.capture_local_traffic {
        rules.push(Rule::new([Match::IifLo(true)], [Statement::Return], "capture_local_traffic is off"));
    }
    rules.push(Rule::new([Match::Tcp(false)], [Statement::Goto("protect_other".into())], "not TCP"));
    // Not by mark: other software may change it after tproxy. Asking for the socket's mark as well would refuse
    // every handshake, because request sockets have none.
    rules.push(Rule::new([Match::SocketTransparent], [Statement::Return], "handed to a listener, or accepted by one"));
    rules.push(Rule::new(
        [Match::CtOriginal(false), Match::CtMark(MARK_MASK, LOCAL_CLIENT, true)],
        [Statement::Return],
        "answer to a client of this host",
    ));
    rules.push(Rule::new(
        [],
        [Statement::Count(c.refused_counter()), Statement::RejectReset],
        "plaintext to a captured service",
    ));
    Chain::plain(format!("check_{}", c.ident), rules)
}

fn postrouting(egress: &[&CapturePlan]) -> Chain {
    let wire = [Statement::Goto("protect_wire".into())];
    let mut rules = vec![
        Rule::new([Match::OifLo], [Statement::Return], "stays on this host"),
        Rule::new([Match::Tcp(true), Match::Rst], [Statement::Return], "carries no data; also our own resets"),
        Rule::new(
            [Match::Mark(CAPTURED_MASK, Mark(CAPTURED_BASE), true)],
            wire.clone(),
            "marked, yet on a wire: rule, route, bound device or scope",
        ),
        Rule::new([Match::CtMark(CAPTURED_MASK, Mark(CAPTURED_BASE), true)], wire.clone(), "captured flow on a wire"),
        Rule::new([Match::CtMark(MARK_MASK, SPOOFED, true)], wire, "tuple between us and the service on a wire"),
    ];
    rules.extend(each_asked("from", egress));
    Chain::base("protect_postrouting", HookKind::Filter, HookPoint::Postrouting, Priority::Mangle, rules)
}

/// Nothing can be rejected in postrouting, and where a packet goes after its mark was set is seen nowhere else: a SYN is
/// dropped here, and the one that is sent again a second later is refused in output.
fn wire() -> Chain {
    let remember = |set| Rule::new([Match::BareSyn(true)], [Statement::Remember(set)], "output refuses the next one");
    let mut rules: Vec<Rule> = stuck().map(remember).into();
    rules.push(Rule::new([], shared(ON_WIRE).into_iter().chain([Statement::Drop]), "not in plaintext"));
    Chain::plain("protect_wire", rules)
}

fn from(plan: &RulesPlan, c: &CapturePlan) -> Chain {
    let marks: Vec<Match> = plan.egress_marks().into_iter().map(|m| Match::Mark(MARK_MASK, m, false)).collect();
    let rows = || c.captured().conditions(End::Source, Transport::Tcp, Scope::Local);
    let refuse = [Statement::Count(c.refused_counter()), Statement::Drop];
    let with = |extra: Match| marks.iter().cloned().chain([extra]).collect::<Vec<_>>();
    let mut rules = excluded(c, End::Source, Transport::Tcp, Scope::Local);
    rules.extend(each(
        rows(),
        &[],
        &with(Match::CtMark(MARK_MASK, LOCAL_CLIENT, false)),
        &refuse,
        "only our sockets answer from a captured port",
    ));
    rules.extend(each(rows(), &[], &with(Match::CtUnknown), &refuse, "no connection mark to look at"));
    Chain::plain(format!("from_{}", c.ident), rules)
}
