//! From the plan to the two tables. Pure functions; the golden files under `tests/goldens` show the results.
//!
//! The protecting chains ([`protect`]) are in both tables: the capture table refuses by itself what it does not
//! deliver, also after a crash that took the guard along; the guard refuses when a stranger flushed the capture table.

mod egress;
mod ingress;
mod protect;

use super::ir::*;
use super::marks::MARK_MASK;
use super::plan::{CapturePlan, RulesPlan};
use super::selector::Scope;
use crate::config::Side;

/// Counter of all refusals that belong to no single endpoint. The three below are its parts, and what is left are
/// connections of an endpoint that is gone, or that another socket would have taken.
pub const REFUSED: &str = "refused";
/// Packets of other transports than TCP.
pub const NOT_TCP: &str = "not_tcp";
/// Packets that were kept off a wire.
pub const ON_WIRE: &str = "on_wire";
/// Packets from off the host on the tuple between an egress and its service.
pub const INJECTED: &str = "injected";
/// Counter of an egress: new connections of a client from a port that the egress borrowed of it.
pub const PORT_IN_USE: &str = "port_in_use";

/// The capture table.
pub fn capture_table(plan: &RulesPlan) -> Table {
    let mut counters = [REFUSED, NOT_TCP, ON_WIRE, INJECTED, PORT_IN_USE].map(str::to_owned).to_vec();
    let mut sets = Vec::new();
    for c in &plan.captures {
        for counter in [c.captured_counter(), c.refused_counter()] {
            if !counters.contains(&counter) {
                counters.push(counter);
            }
        }
        sets.extend(c.captured().sets());
        sets.extend(c.excluded().sets());
    }
    let mut chains = Vec::new();
    chains.extend(base_chains(plan));
    chains.extend(ingress::chains(plan));
    chains.extend(egress::chains(plan));
    chains.extend(protect::chains(plan));
    Table { name: plan.capture_table(), owned: false, counters, sets, flows: stuck().to_vec(), chains }
}

/// The guard table.
pub fn guard_table(plan: &RulesPlan) -> Table {
    let mut counters = [REFUSED, NOT_TCP, ON_WIRE].map(str::to_owned).to_vec();
    for counter in plan.captures.iter().map(CapturePlan::refused_counter) {
        if !counters.contains(&counter) {
            counters.push(counter);
        }
    }
    let sets = plan.captures.iter().flat_map(|c| [c.captured().sets(), c.excluded().sets()].concat()).collect();
    let flows = stuck().to_vec();
    Table { name: plan.guard_table(), owned: true, counters, sets, flows, chains: protect::chains(plan) }
}

/// Counts a refusal that belongs to no single endpoint.
fn shared(part: &str) -> [Statement; 2] {
    [Statement::Count(REFUSED.into()), Statement::Count(part.into())]
}

/// Flows whose SYN was kept off a wire: the next one is refused.
fn stuck() -> [FlowSet; 2] {
    let set = |name: &str, family| FlowSet { name: name.to_owned(), family };
    [set("stuck4", Family::V4), set("stuck6", Family::V6)]
}

/// What came around by lo meets tproxy at `filter + 20`. A packet that tproxy has given a socket, and that came by lo,
/// fails the kernel's reverse path check (`fib saddr . mark . iif oif missing`, kernel 6.18 in both families), and
/// firewalld has that check at `filter + 10`. What came by a wire meets it at `mangle`, before others' DNAT; there
/// the check holds. Packets of lo are not subject to DNAT in prerouting: NAT was done with them in output.
fn base_chains(plan: &RulesPlan) -> Vec<Chain> {
    let ingress = plan.side(Side::Ingress).next().is_some() || !plan.retired.is_empty();
    let egress = plan.side(Side::Egress).next().is_some() || !plan.retired.is_empty();
    let mut output = vec![Rule::new([Match::Tcp(false)], [Statement::Return], "only TCP is captured")];
    let mut prerouting = Vec::new();
    let mut prerouting_lo = Vec::new();
    if egress {
        output.push(Rule::new([], [Statement::Jump("egress_output".into())], "answers of captured services"));
    }
    if ingress {
        output.push(Rule::new([], [Statement::Jump("ingress_output".into())], "what local programs send"));
        prerouting_lo.push(Rule::new(
            [Match::IifLo(true)],
            [Statement::Jump("ingress_prerouting".into())],
            "what the output chain sent around by lo",
        ));
    }
    if egress {
        prerouting.push(Rule::new(
            [Match::IifLo(false), Match::Tcp(true)],
            [Statement::Jump("egress_prerouting".into())],
            "what clients send to captured services",
        ));
        prerouting_lo.push(Rule::new(
            [Match::IifLo(true), Match::Tcp(true)],
            [Statement::Jump("egress_prerouting".into())],
            "what clients of this host send to captured services",
        ));
    }
    let (filter, point) = (HookKind::Filter, HookPoint::Prerouting);
    let mut chains = vec![Chain::base("output", HookKind::Route, HookPoint::Output, Priority::Mangle, output)];
    if egress {
        chains.push(Chain::base("prerouting", filter, point, Priority::Mangle, prerouting));
    }
    chains.push(Chain::base("prerouting_lo", filter, point, Priority::AfterReversePath, prerouting_lo));
    chains
}

/// Refuses new connections of an endpoint that is between two configurations; what is open goes on.
fn refuse_new(c: &CapturePlan) -> Option<Rule> {
    c.refuse_new.then(|| {
        Rule::new(
            [Match::BareSyn(true)],
            [Statement::Count(c.refused_counter()), Statement::RejectReset],
            "goes to another endpoint, which does not serve it yet",
        )
    })
}

/// Leaves the chain on what `c` excludes. Only for a chain of that endpoint: in a shared one it would also skip the
/// endpoints behind it.
fn excluded(c: &CapturePlan, end: End, transport: Transport, scope: Scope) -> Vec<Rule> {
    each(c.excluded().conditions(end, transport, scope), &[], &[], &[Statement::Return], "excluded")
}

/// Leaves the chain on what an egress of this host sends to its service.
fn to_service(plan: &RulesPlan) -> Vec<Rule> {
    let rule = |mark| {
        Rule::new(
            [Match::IifLo(true), Match::Mark(MARK_MASK, mark, true)],
            [Statement::Return],
            "our socket to the service",
        )
    };
    plan.egress_marks().into_iter().map(rule).collect()
}

/// One rule a row of conditions, all with the same effect.
fn each(
    rows: Vec<Vec<Match>>,
    before: &[Match],
    after: &[Match],
    statements: &[Statement],
    comment: &str,
) -> Vec<Rule> {
    rows.into_iter()
        .map(|row| {
            let matches = before.iter().cloned().chain(row).chain(after.iter().cloned());
            Rule::new(matches, statements.iter().cloned(), comment)
        })
        .collect()
}
