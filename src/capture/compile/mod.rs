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

/// Counter of refusals that belong to no single endpoint.
pub const REFUSED: &str = "refused";

/// The capture table.
pub fn capture_table(plan: &RulesPlan) -> Table {
    let mut counters = vec![REFUSED.to_owned()];
    let mut sets = Vec::new();
    for c in &plan.captures {
        counters.push(c.captured_counter());
        counters.push(c.refused_counter());
        sets.extend(c.captured().sets());
        sets.extend(c.excluded().sets());
    }
    let mut chains = Vec::new();
    chains.extend(base_chains(plan));
    chains.extend(ingress::chains(plan));
    chains.extend(egress::chains(plan));
    chains.extend(protect::chains(plan));
    Table { name: plan.capture_table(), owned: false, counters, sets, chains }
}

/// The guard table.
pub fn guard_table(plan: &RulesPlan) -> Table {
    let mut counters = vec![REFUSED.to_owned()];
    counters.extend(plan.captures.iter().map(|c| c.refused_counter()));
    let sets = plan.captures.iter().flat_map(|c| [c.captured().sets(), c.excluded().sets()].concat()).collect();
    Table { name: plan.guard_table(), owned: true, counters, sets, chains: protect::chains(plan) }
}

fn base_chains(plan: &RulesPlan) -> Vec<Chain> {
    let ingress = plan.side(Side::Ingress).next().is_some() || !plan.retired.is_empty();
    let egress = plan.side(Side::Egress).next().is_some() || !plan.retired.is_empty();
    let mut output = vec![Rule::new([Match::Tcp(false)], [Statement::Return], "only TCP is captured")];
    let mut prerouting = Vec::new();
    if egress {
        output.push(Rule::new([], [Statement::Jump("egress_output".into())], "answers of captured services"));
    }
    if ingress {
        output.push(Rule::new([], [Statement::Jump("ingress_output".into())], "what local programs send"));
        prerouting.push(Rule::new(
            [Match::IifLo(true)],
            [Statement::Jump("ingress_prerouting".into())],
            "what the output chain sent around by lo",
        ));
    }
    if egress {
        prerouting.push(Rule::new(
            [Match::Tcp(true)],
            [Statement::Jump("egress_prerouting".into())],
            "what clients send to captured services",
        ));
    }
    vec![
        Chain::base("output", HookKind::Route, HookPoint::Output, Priority::Mangle, output),
        Chain::base("prerouting", HookKind::Filter, HookPoint::Prerouting, Priority::Mangle, prerouting),
    ]
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
