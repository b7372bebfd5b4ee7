//! The marks of tng's own sockets beside the host's policy rules. A rule of other software that matches such a mark by
//! chance leads the tunnel's packets elsewhere, and nothing connects.

use serde_json::Value;

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Instance;
use crate::capture::marks::ROUTE_TABLE;
use crate::config::{Mark, Mode};

/// Preference of the rule that looks up the main table (ip-rule(8)); what comes later is no matter.
const MAIN: u64 = 32766;

/// A policy rule that asks for a mark.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MarkRule {
    text: String,
    mark: u32,
    mask: u32,
}

impl MarkRule {
    /// Of `ip -j rule show`; `None` for one that is ours, asks for no mark, or is asked after the main table.
    fn read(family: &str, rule: &Value) -> Option<Self> {
        let priority = rule["priority"].as_u64()?;
        if priority >= MAIN
            || rule["table"].as_str().and_then(|table| table.parse().ok()) == Some(ROUTE_TABLE)
            || rule.get("not").is_some()
        {
            return None;
        }
        // What this host sends comes in by lo (ip-rule(8)); a rule for another interface is about forwarded packets.
        if rule["iif"].as_str().is_some_and(|iif| iif != "lo") {
            return None;
        }
        let mark = hex(&rule["fwmark"])?;
        let mask = hex(&rule["fwmask"]).unwrap_or(u32::MAX);
        let table = rule["table"].as_str().unwrap_or_default();
        Some(Self {
            text: format!("ip {family} rule pref {priority} fwmark {mark:#x}/{mask:#x} lookup {table}"),
            mark,
            mask,
        })
    }

    fn takes(&self, mark: u32) -> bool {
        (mark ^ self.mark) & self.mask == 0
    }
}

fn hex(value: &Value) -> Option<u32> {
    u32::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok()
}

/// Judges every `so_mark` of the instances.
pub(super) fn check(host: &dyn Host, instances: &[Instance]) -> Option<Finding> {
    let check = Check::OwnMarks;
    let mut marks: Vec<(u32, String)> = Vec::new();
    for (instance, config) in instances.iter().filter_map(|i| Some((i, i.config.as_ref().ok()?))) {
        for endpoint in &config.endpoints {
            let Mark(mark) = match &endpoint.mode {
                Mode::Mapping(mapping) => mapping.so_mark,
                Mode::Netfilter(netfilter) => netfilter.so_mark,
            };
            marks.push((mark, format!("{}/{}", instance.name, endpoint.name.as_str())));
        }
    }
    if marks.is_empty() {
        return None;
    }
    let mut rules = Vec::new();
    for family in ["-4", "-6"] {
        let ran = host.run(&["ip", family, "-j", "rule", "show"], None);
        match (ran.text().and_then(|text| serde_json::from_str::<Vec<Value>>(text).ok()), family) {
            (Some(listed), _) => rules.extend(listed.iter().filter_map(|rule| MarkRule::read(family, rule))),
            (None, "-4") => return Some(Finding::note(check, "not checked: ip -j rule show gave no answer")),
            // A kernel without IPv6 has no such rules to list.
            (None, _) => {}
        }
    }
    let taken: Vec<String> = marks
        .iter()
        .flat_map(|(mark, of)| {
            let by = rules.iter().filter(|rule| rule.takes(*mark));
            by.map(move |rule| format!("so_mark {mark} ({mark:#x}) of {of} by {}", rule.text))
        })
        .collect();
    if taken.is_empty() {
        return Some(Finding::ok(check, "no policy rule of other software takes the sockets of the tunnel"));
    }
    let fix = match free(&rules) {
        Some(free) => {
            format!("so_mark = {free}  # in the endpoint's mapping or netfilter table; then: tngctl reload NAME")
        }
        None => "ip rule show  # every mark is taken by some rule".to_owned(),
    };
    Some(
        Finding::error(check, format!("taken: {}", taken.join("; ")))
            .why("the tunnel's own packets are routed as that rule says: they are lost, or leave by another uplink")
            .fix(fix),
    )
}

/// A mark that no rule takes, outside those that the capture rules use.
fn free(rules: &[MarkRule]) -> Option<u32> {
    let ours = |mark: u32| (0x0578..=0x057a).contains(&mark) || (0x0600..=0x06ff).contains(&mark);
    (0x0135..=0xffff).find(|mark| !ours(*mark) && !rules.iter().any(|rule| rule.takes(*mark)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(pref: u64, mark: &str, mask: &str, table: &str) -> Option<MarkRule> {
        MarkRule::read("-4", &json!({ "priority": pref, "fwmark": mark, "fwmask": mask, "table": table }))
    }

    #[test]
    fn a_rule_counts_by_its_mask_and_its_place() {
        let cilium = rule(9, "0x200", "0xf00", "2004").expect("a rule");
        assert!(cilium.takes(565) && cilium.takes(566) && !cilium.takes(0x135));
        assert_eq!(rule(565, "0x600", "0xff00", "565"), None, "ours");
        assert_eq!(rule(40_000, "0x200", "0xf00", "2004"), None, "behind main");
        assert_eq!(MarkRule::read("-4", &json!({ "priority": 9, "table": "main" })), None, "for all marks");
        let by = |iif: &str| json!({ "priority": 9, "iif": iif, "fwmark": "0x236", "table": "9" });
        assert_eq!(MarkRule::read("-4", &by("eth0")), None, "forwarded packets");
        assert!(MarkRule::read("-4", &by("lo")).expect("what this host sends").takes(566));
    }

    #[test]
    fn the_mark_that_is_proposed_is_taken_by_no_rule() {
        let rules = [rule(9, "0x100", "0xf00", "1").expect("a rule"), rule(10, "0x200", "0xf00", "2").expect("a rule")];
        assert_eq!(free(&rules), Some(0x300));
        assert_eq!(free(&[rule(9, "0x0", "0x0", "1").expect("a rule")]), None);
    }
}
