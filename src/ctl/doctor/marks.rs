//! The marks of tng's own sockets, and of what it captures, beside the host's policy rules.

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::{Instance, USER};
use crate::capture::marks::ROUTE_TABLE;
use crate::capture::policy_rules::{PolicyRules, Taken};

const NOT_CHECKED: &str = "not checked: ip -j rule show gave no answer";

/// Of all instances.
pub(super) fn check(host: &dyn Host, instances: &[Instance]) -> Vec<Finding> {
    let rules = PolicyRules::read(|argv| host.run(argv, None).text().map(str::to_owned));
    let mut found = vec![captured(rules.as_ref())];
    found.extend(own(host, rules.as_ref(), instances));
    found
}

/// A rule that is asked before ours and takes captured packets leads them elsewhere; the capture table then drops them.
fn captured(rules: Option<&PolicyRules>) -> Finding {
    let check = Check::PolicyRules;
    let Some(rules) = rules else { return Finding::note(check, NOT_CHECKED) };
    let before: Vec<_> = rules.iter().filter_map(|rule| Some((rule, rule.takes_captured()?))).collect();
    let Some(worst) = before.iter().map(|(_, taken)| *taken).max() else {
        return Finding::ok(check, "no foreign policy rule takes captured packets");
    };
    let join = |texts: Vec<String>, by: &str| texts.join(by);
    let what = format!("asked before ours: {}", join(before.iter().map(|(rule, _)| rule.to_string()).collect(), "; "));
    let removals = before
        .iter()
        .map(|(rule, _)| format!("{}  # then let its owner use a preference above {ROUTE_TABLE}", rule.removal()));
    let severity = if worst == Taken::All { Finding::error } else { Finding::warning };
    severity(check, what)
        .why(format!(
            "captured packets carry a mark of 0x600/0xff00 and must meet rule {ROUTE_TABLE} first; elsewhere they are dropped"
        ))
        .fix(join(removals.collect(), "\n"))
}

/// Judges every `so_mark` of the instances.
fn own(host: &dyn Host, rules: Option<&PolicyRules>, instances: &[Instance]) -> Option<Finding> {
    let check = Check::OwnMarks;
    let configs = instances.iter().filter_map(|i| Some((i, i.config.as_ref().ok()?)));
    let marks: Vec<(u32, String)> = configs
        .flat_map(|(instance, config)| {
            let of = move |name: &str| format!("{}/{name}", instance.name);
            config.endpoints.iter().map(move |e| (e.mode.so_mark().0, of(e.name.as_str())))
        })
        .collect();
    if marks.is_empty() {
        return None;
    }
    let Some(rules) = rules else { return Some(Finding::note(check, NOT_CHECKED)) };
    let uid = host.user(USER).map(|(uid, _)| uid);
    let (mut taken, mut worst) = (Vec::new(), Taken::Some);
    for (mark, of) in &marks {
        for (rule, how) in rules.iter().filter_map(|rule| Some((rule, rule.takes_socket(*mark, uid)?))) {
            taken.push(format!("so_mark {mark} ({mark:#x}) of {of} by {rule}"));
            worst = worst.max(how);
        }
    }
    if taken.is_empty() {
        return Some(Finding::ok(check, "no policy rule of other software takes the sockets of the tunnel"));
    }
    let fix = match rules.free_mark() {
        Some(free) => {
            format!("so_mark = {free}  # in the endpoint's mapping or netfilter table; then: tngctl reload NAME")
        }
        None => "ip rule show  # every mark is taken by some rule".to_owned(),
    };
    let severity = if worst == Taken::All { Finding::error } else { Finding::warning };
    Some(
        severity(check, format!("taken: {}", taken.join("; ")))
            .why("the tunnel's own packets are routed as that rule says: they are lost, or leave by another uplink")
            .fix(fix),
    )
}
