//! What the trials mean.

use super::cures::{Place, cure};
use super::fence::TABLE;
use super::{Event, Fate, Step, Tried, Way, name_of};
use crate::capture::ir::Family;
use crate::config::Side;
use crate::ctl::doctor::finding::{Check, Finding};
use crate::ctl::doctor::host::Host;
use crate::ctl::doctor::instance::USER;
use crate::ctl::doctor::listing::{Listing, Rule};

const CHECK: Check = Check::TrialSyn;
/// Chains named in one finding at most.
const MAX_NAMED: usize = 3;
const SEE_MARKS: &str = "tngctl doctor -v  # see own-marks, mark-writers, policy-rules and routes-present";

/// One finding for each trial that went wrong, and one for each endpoint with those that went well. `own`: the
/// instance's capture table, without its family.
pub(super) fn judge(host: &dyn Host, listing: Option<&Listing>, own: &str, tried: &[Tried]) -> Vec<Finding> {
    let own = format!("inet {own}");
    let nothing = Listing::default();
    let listing = listing.unwrap_or(&nothing);
    let mut found: Vec<Finding> = Vec::new();
    let mut well: Vec<(&str, Vec<&str>)> = Vec::new();
    for one in tried {
        match problem(host, &own, listing, one) {
            Some(finding) => found.push(finding),
            None => {
                let (endpoint, family) = (one.trial.endpoint.as_str(), name_of(one.trial.family));
                match well.iter_mut().find(|(name, _)| *name == endpoint) {
                    Some((_, families)) => families.push(family),
                    None => well.push((endpoint, vec![family])),
                }
            }
        }
    }
    let ok = |(endpoint, families): (&str, Vec<&str>)| {
        Finding::ok(CHECK, format!("endpoint {endpoint}: a trial SYN reaches the listener ({})", families.join(", ")))
    };
    found.extend(well.into_iter().map(ok));
    found
}

/// `None`: all is well.
fn problem(host: &dyn Host, own: &str, listing: &Listing, one: &Tried) -> Option<Finding> {
    let to = one.to.map(|to| format!(" to {to}")).unwrap_or_default();
    let head = format!("endpoint {}, {}: a trial SYN{to}", one.trial.endpoint, name_of(one.trial.family));
    match &one.fate {
        Fate::NotSent(why) => Some(Finding::note(CHECK, format!("{head} was not sent: {why}"))),
        Fate::Answered if !is_taken_by(own, one) => Some(
            Finding::error(CHECK, format!("{head} was answered by another program than tng"))
                .why("what is captured does not reach tng's listener: it is not protected as configured")
                .fix(format!("nft list table {own}; nft list ruleset | grep -n -e dnat -e redirect -e tproxy")),
        ),
        Fate::Answered => None,
        Fate::Refused | Fate::Silent => Some(lost(host, own, listing, one, &head)),
    }
}

/// Whether the trace shows tproxy of the instance's own table; without a trace the answer has to do.
fn is_taken_by(own: &str, one: &Tried) -> bool {
    let is_tproxy =
        |s: &Step| s.table == own && matches!(&s.event, Event::Rule { text, .. } if text.contains("tproxy"));
    one.steps.as_ref().is_none_or(|steps| steps.is_empty() || steps.iter().any(is_tproxy))
}

fn effect(one: &Tried) -> &'static str {
    match one.trial.side {
        Side::Ingress => "captured connections do not reach tng: applications wait in vain or are refused",
        Side::Egress => "clients do not reach tng: they wait in vain or are refused",
    }
}

fn lost(host: &dyn Host, own: &str, listing: &Listing, one: &Tried, head: &str) -> Finding {
    let how = if one.fate == Fate::Refused { "was refused" } else { "was lost" };
    let Some(steps) = one.steps.as_ref().filter(|steps| !steps.is_empty()) else {
        return Finding::error(CHECK, format!("{head} {how}"))
            .why(format!("{}; where is not known: nft monitor trace shows nothing", effect(one)))
            .fix("nft list ruleset; ip rule show; ip -6 rule show");
    };
    let end = steps.iter().enumerate().find_map(|(at, step)| Some((at, step, step.ends()?)));
    match end {
        Some((_, step, _)) if step.table.starts_with(&format!("inet {TABLE}")) => {
            let whose = if step.way == Way::Answer { " (the listener's answer)" } else { "" };
            Finding::error(CHECK, format!("{head} would have left by {}{whose}", step.device))
                .why(format!("{}; the doctor's own table kept it on this host", effect(one)))
                .fix(SEE_MARKS)
        }
        Some((_, step, text)) if step.table == own => of_own(one, step, &text, head, how),
        Some((at, step, text)) => of_other(host, listing, one, &steps[..=at], step, &text, head),
        None => between(host, one, steps, head, how),
    }
}

/// tng's own chains ended it.
fn of_own(one: &Tried, step: &Step, text: &str, head: &str, how: &str) -> Finding {
    let no_listener =
        step.way == Way::Syn && (step.chain.starts_with("deliver_") || step.chain.starts_with("capture_"));
    let whose = if step.way == Way::Answer { " (the listener's answer)" } else { "" };
    let finding = Finding::error(CHECK, format!("{head} {how}{whose} by tng's own chain {}: {text}", step.chain));
    if no_listener {
        return finding.why(format!("its listener is not there; {}", effect(one))).fix("tngctl status");
    }
    finding
        .why(format!("other software changed its mark, or a rule or route of tng's is missing; {}", effect(one)))
        .fix(SEE_MARKS)
}

/// A chain of other software ended it, with the last of these steps.
fn of_other(
    host: &dyn Host,
    listing: &Listing,
    one: &Tried,
    steps: &[Step],
    step: &Step,
    text: &str,
    head: &str,
) -> Finding {
    let passed = passed(listing, steps, step);
    let base = passed.iter().find_map(|chain| listing.base(&step.table, chain));
    let hook = base.map_or("unknown hook", |b| b.hook.as_str());
    let priority = base.map_or(0, |b| b.priority);
    let fix = cure(&Place {
        table: &step.table,
        chain: &step.chain,
        hook,
        priority,
        way: step.way,
        side: one.trial.side,
        family: one.trial.family,
        port: one.trial.port,
    });
    let whose = if step.way == Way::Answer { ": the listener's answer" } else { "" };
    let what = format!(
        "{head} was lost in table {} chain {} ({hook}, priority {priority}){whose}: {text}",
        step.table, step.chain
    );
    let count = |asks: &dyn Fn(&Rule) -> bool| {
        passed.iter().flat_map(|chain| listing.rules_of(&step.table, chain)).filter(|rule| asks(rule)).count()
    };
    let uid = one.trial.owner.0;
    match one.trial.side {
        Side::Egress => match count(&asks_whence) {
            0 => Finding::error(CHECK, what).why(effect(one)),
            n => Finding::note(CHECK, what).why(format!(
                "not judged: {n} rules of the chains {} ask for an interface or a source address, and the trial comes by a \
                 device and from an address of the doctor's own; a client may pass",
                named(&passed)
            )),
        },
        Side::Ingress => {
            let own = host.user(USER).map(|(uid, _)| u64::from(uid));
            match count(&|rule| asks_who(rule, own, uid)) {
                0 => Finding::error(CHECK, what).why(effect(one)),
                n => Finding::warning(CHECK, what).why(format!(
                    "{}; judged for uid {uid}: {n} rules of the chains {} ask for other users or a cgroup",
                    effect(one),
                    named(&passed)
                )),
            }
        }
    }
    .fix(fix)
}

fn named(chains: &[String]) -> String {
    let mut names: Vec<&str> = chains.iter().take(MAX_NAMED).map(String::as_str).collect();
    if chains.len() > MAX_NAMED {
        names.push("...");
    }
    names.join(", ")
}

/// The chains of the table that the packet went through in this hook, the base chain first.
fn passed(listing: &Listing, until: &[Step], end: &Step) -> Vec<String> {
    let mut chains: Vec<String> = Vec::new();
    for step in until.iter().filter(|s| s.table == end.table && s.way == end.way) {
        if step.event == Event::Entered && listing.base(&step.table, &step.chain).is_some() {
            chains.clear();
        }
        if !chains.contains(&step.chain) {
            chains.push(step.chain.clone());
        }
    }
    chains
}

/// Asks where a packet comes from.
fn asks_whence(rule: &Rule) -> bool {
    let meta = |key: &str| rule.mentions(&serde_json::json!({ "meta": { "key": key } }));
    let source =
        |protocol: &str| rule.mentions(&serde_json::json!({ "payload": { "protocol": protocol, "field": "saddr" } }));
    let by_fib = rule.expr.iter().any(|e| e["match"]["left"]["fib"].is_object());
    // lo is not the clients' interface.
    let is_lo = ["iif", "iifname"].into_iter().any(|key| rule.meta(key).is_some_and(|device| device == "lo"));
    !is_lo
        && (["iif", "iifname", "iifgroup", "iiftype"].into_iter().any(meta) || source("ip") || source("ip6") || by_fib)
}

/// Asks for a user that is neither tng's own nor the trial's.
fn asks_who(rule: &Rule, own: Option<u64>, trial: u32) -> bool {
    let other = |key: &str| {
        rule.meta(key).is_some_and(|who| {
            let is_known = who.as_u64().is_some_and(|id| Some(id) == own || id == u64::from(trial));
            !is_known && who != USER && !(trial == 0 && who == "root")
        })
    };
    other("skuid") || other("skgid") || rule.expr.iter().any(|e| e["match"]["left"]["socket"]["key"] == "cgroupv2")
}

/// No chain ended it: the place after the last one that it passed.
fn between(host: &dyn Host, one: &Tried, steps: &[Step], head: &str, how: &str) -> Finding {
    let answered = steps.iter().any(|s| s.way == Way::Answer);
    let way = if answered { Way::Answer } else { Way::Syn };
    let own = format!("inet {TABLE}");
    let last = steps.iter().rfind(|s| s.table.starts_with(&own) && s.way == way);
    let (chain, device) = last.map_or(("", ""), |s| (s.chain.as_str(), s.device.as_str()));
    let rules = "ip rule show; ip -6 rule show";
    let (at, why, fix) = match chain.split('_').next().unwrap_or_default() {
        "out" => ("after output: no route, or one that prohibits it", "", rules.to_owned()),
        "post" if answered && one.trial.side == Side::Egress && device == "lo" => (
            "after postrouting, on lo: a policy rule leads it away from where the SYN came from",
            "a rule takes the mark of tng's sockets, see own-marks; ",
            SEE_MARKS.to_owned(),
        ),
        "post" => ("after postrouting, on its way by lo", "is lo up? ", "ip -s link show lo".to_owned()),
        "pre" => ("between prerouting and input: by the kernel's routing", "", reverse_path(host, one)),
        "in" if answered && one.trial.side == Side::Egress => (
            "came back by lo instead of leaving",
            "a rule takes the mark of tng's sockets, see own-marks; ",
            SEE_MARKS.to_owned(),
        ),
        "in" if answered => ("at its socket", "", "tngctl status".to_owned()),
        "in" => (
            "at the listener, which did not answer: its queue is full, or it is closed",
            "",
            "tngctl status".to_owned(),
        ),
        _ => ("before the first chain", "", rules.to_owned()),
    };
    let is_legacy = |file: &&str| host.read(file).is_some_and(|names| !names.is_empty());
    let legacy = if ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"].iter().any(is_legacy) {
        "; tables of iptables-legacy, which nft does not show, may have dropped it"
    } else {
        ""
    };
    let whose = if answered { "the listener's answer " } else { "" };
    Finding::error(CHECK, format!("{head} {how}: {whose}{at}")).why(format!("{why}{}{legacy}", effect(one))).fix(fix)
}

/// The kernel's own reverse path filter, where it is strict, or what else routing may say.
fn reverse_path(host: &dyn Host, one: &Tried) -> String {
    let strict: Vec<&str> = ["all", "lo", "default"]
        .into_iter()
        .filter(|name| host.sysctl(&format!("net/ipv4/conf/{name}/rp_filter")) == Some(1))
        .collect();
    if one.trial.family == Family::V4 && !strict.is_empty() {
        let set = strict.iter().map(|name| format!("net.ipv4.conf.{name}.rp_filter=2")).collect::<Vec<_>>().join(" ");
        return format!("sysctl -w {set}");
    }
    "ip rule show; ip -6 rule show; ip route show table 565; ip -6 route show table 565".to_owned()
}
