//! The ingress: locally generated connections are marked in output, sent around by lo, and handed to the listener
//! in prerouting.

use super::super::ir::*;
use super::super::marks::*;
use super::super::plan::{CapturePlan, RulesPlan, listener_addrs};
use super::super::selector::Scope;
use super::{REFUSED, each, excluded, refuse_new};
use crate::config::{Mark, Side};

pub(super) fn chains(plan: &RulesPlan) -> Vec<Chain> {
    let endpoints: Vec<&CapturePlan> = plan.side(Side::Ingress).collect();
    if endpoints.is_empty() && plan.retired.is_empty() {
        return Vec::new();
    }
    let mut chains = vec![output(plan, &endpoints), inbound(&endpoints), prerouting(plan, &endpoints)];
    for c in &endpoints {
        chains.push(select(c));
        chains.push(seeded(c));
        chains.push(capture(c));
        chains.push(divert(&c.ident, c.id));
        chains.push(deliver(&c.ident, c.port, &c.refused_counter()));
    }
    for (id, port) in &plan.retired {
        let ident = retired_ident(*id);
        chains.push(divert(&ident, *id));
        chains.push(deliver(&ident, *port, REFUSED));
    }
    chains.push(input(plan, &endpoints));
    chains.push(postrouting(&endpoints));
    chains.push(ours());
    chains
}

/// Chain names of an endpoint that a reload removed: its connections go on until they end. No endpoint's name begins
/// with an underscore, so none has these.
fn retired_ident(id: EndpointId) -> String {
    format!("_{}", id.0)
}

fn owners(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Vec<(EndpointId, String)> {
    let live = endpoints.iter().map(|c| (c.id, c.ident.clone()));
    live.chain(plan.retired.iter().map(|(id, _)| (*id, retired_ident(*id)))).collect()
}

fn output(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Chain {
    let mut rules = Vec::new();
    for mark in plan.all_ingress_marks() {
        rules.push(Rule::new(
            [
                Match::Mark(MARK_MASK, mark, true),
                Match::CtOriginal(true),
                Match::CtMark(CAPTURED_MASK, Mark(CAPTURED_BASE), true),
            ],
            [Statement::ClearCtMark],
            "our upstream reuses the tuple of a finished captured flow",
        ));
        rules.push(Rule::new(
            [Match::Mark(MARK_MASK, mark, true)],
            [Statement::Return],
            "our upstream sockets; the protecting chain asks whose they are",
        ));
    }
    rules.push(Rule::new([Match::CtOriginal(false)], [Statement::Goto("ingress_inbound".into())], "answers"));
    for (id, ident) in owners(plan, endpoints) {
        rules.push(Rule::new(
            [Match::CtMark(MARK_MASK, id.mark(), true)],
            [Statement::Goto(format!("divert_{ident}"))],
            "a flow that is ours already, also when its destination has left the sets",
        ));
    }
    rules.push(Rule::new(
        [Match::CtMark(CAPTURED_MASK, Mark(CAPTURED_BASE), true)],
        [Statement::Return],
        "a flow of another instance",
    ));
    for c in endpoints {
        rules.push(Rule::new([], [Statement::Jump(format!("select_{}", c.ident))], "is it this endpoint's?"));
    }
    Chain::plain("ingress_output", rules)
}

/// A peer can seed conntrack so that an application's own SYN looks like an answer: a bare SYN is never one.
fn inbound(endpoints: &[&CapturePlan]) -> Chain {
    let mut rules =
        vec![Rule::new([Match::BareSyn(false)], [Statement::Return], "answers of connections that came in")];
    for c in endpoints {
        rules.push(Rule::new([], [Statement::Jump(format!("seeded_{}", c.ident))], "is it this endpoint's?"));
    }
    Chain::plain("ingress_inbound", rules)
}

fn seeded(c: &CapturePlan) -> Chain {
    let mut rules = excluded(c, End::Destination, Transport::Tcp, Scope::Remote);
    rules.extend(each(
        c.captured().conditions(End::Destination, Transport::Tcp, Scope::Remote),
        &[],
        &[],
        &[Statement::Count(c.refused_counter()), Statement::RejectReset],
        "active open on a tuple that the peer seeded",
    ));
    Chain::plain(format!("seeded_{}", c.ident), rules)
}

fn select(c: &CapturePlan) -> Chain {
    let mut rules = excluded(c, End::Destination, Transport::Tcp, Scope::Remote);
    // Every packet to a captured destination, not only new connections: what is older than the rules, untracked or
    // invalid meets the listener and gets its reset.
    rules.extend(each(
        c.captured().conditions(End::Destination, Transport::Tcp, Scope::Remote),
        &[],
        &[],
        &[Statement::Goto(format!("capture_{}", c.ident))],
        "captured, whatever the connection state",
    ));
    Chain::plain(format!("select_{}", c.ident), rules)
}

fn capture(c: &CapturePlan) -> Chain {
    let mut rules: Vec<Rule> = refuse_new(c).into_iter().collect();
    rules.extend([
        Rule::new([], [Statement::SetCtMark(c.id.mark())], "the flow stays ours; untracked packets skip this only"),
        Rule::new([], [Statement::Goto(format!("divert_{}", c.ident))], "by way of lo"),
    ]);
    Chain::plain(format!("capture_{}", c.ident), rules)
}

fn divert(ident: &str, id: EndpointId) -> Chain {
    Chain::plain(
        format!("divert_{ident}"),
        vec![Rule::new(
            [],
            [Statement::SetMark(id.mark()), Statement::Accept],
            "the policy rule routes this mark to lo",
        )],
    )
}

fn prerouting(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Chain {
    let mut rules = Vec::new();
    for (id, ident) in owners(plan, endpoints) {
        let deliver = [Statement::Goto(format!("deliver_{ident}"))];
        rules.push(Rule::new([Match::Mark(MARK_MASK, id.mark(), true)], deliver.clone(), "captured by this endpoint"));
        rules.push(Rule::new(
            [Match::CtOriginal(true), Match::CtMark(MARK_MASK, id.mark(), true)],
            deliver,
            "captured, and other software changed the packet mark on the way",
        ));
    }
    Chain::plain("ingress_prerouting", rules)
}

fn deliver(ident: &str, port: u16, counter: &str) -> Chain {
    let mut rules = tproxy_rules(port, &[Statement::Accept]);
    // Without a listener tproxy does nothing and the packet would go on: this line makes that a refusal.
    rules.push(Rule::new(
        [Match::Tcp(true)],
        [Statement::Count(counter.into()), Statement::RejectReset],
        "listener absent: refused",
    ));
    rules.push(Rule::new([], [Statement::Count(counter.into()), Statement::Drop], "marked, yet not TCP"));
    Chain::plain(format!("deliver_{ident}"), rules)
}

/// One tproxy rule a family.
pub(super) fn tproxy_rules(port: u16, then: &[Statement]) -> Vec<Rule> {
    listener_addrs(port)
        .into_iter()
        .map(|addr| {
            let family = if addr.is_ipv4() { Family::V4 } else { Family::V6 };
            let statements = std::iter::once(Statement::Tproxy(addr)).chain(then.iter().cloned());
            Rule::new([Match::Family(family), Match::Tcp(true)], statements, "to the transparent listener")
        })
        .collect()
}

fn input(plan: &RulesPlan, endpoints: &[&CapturePlan]) -> Chain {
    let mut rules: Vec<Rule> = endpoints.iter().flat_map(|c| listener_rules(c)).collect();
    for (id, _) in owners(plan, endpoints) {
        let captured = [Match::IifLo(true), Match::CtOriginal(true), Match::CtMark(MARK_MASK, id.mark(), true)];
        rules.push(Rule::new(captured, [Statement::Goto("ingress_ours".into())], "captured: only our listener"));
    }
    Chain::base("ingress_input", HookKind::Filter, HookPoint::Input, Priority::Filter, rules)
}

/// Counts here and not where it captures: what a bound device keeps from lo is no connection, and a SYN that is sent
/// again belongs to a connection that was confirmed when the first one left postrouting.
fn postrouting(endpoints: &[&CapturePlan]) -> Chain {
    let count = |c: &&CapturePlan| {
        Rule::new(
            [
                Match::OifLo,
                Match::Mark(MARK_MASK, c.id.mark(), true),
                Match::BareSyn(true),
                Match::CtNew,
                Match::CtUnconfirmed,
            ],
            [Statement::Count(c.captured_counter())],
            "connections captured, not SYNs that are sent again",
        )
    };
    // One that is there twice, between two configurations, has one id, and each connection counts once.
    let is_first = |(at, c): &(usize, &&CapturePlan)| !endpoints[..*at].iter().any(|earlier| earlier.id == c.id);
    let rules = endpoints.iter().enumerate().filter(is_first).map(|(_, c)| count(c)).collect();
    Chain::base("ingress_postrouting", HookKind::Filter, HookPoint::Postrouting, Priority::Mangle, rules)
}

/// A transparent listener is reached by capture only: a direct connection would loop.
pub(super) fn listener_rules(c: &CapturePlan) -> Vec<Rule> {
    c.listeners()
        .into_iter()
        .map(|addr| {
            Rule::new(
                [Match::Destination(addr)],
                [Statement::Count(c.refused_counter()), Statement::RejectReset],
                "the listener is reached by capture only",
            )
        })
        .collect()
}

/// Chain `ingress_ours`: no local wildcard listener on the same port may have a captured flow.
fn ours() -> Chain {
    Chain::plain(
        "ingress_ours",
        vec![
            Rule::new([Match::SocketTransparent], [Statement::Return], "our listener or one of its connections"),
            Rule::new(
                [Match::Tcp(true)],
                [Statement::Count(REFUSED.into()), Statement::RejectReset],
                "captured, yet not handed to our listener",
            ),
        ],
    )
}
