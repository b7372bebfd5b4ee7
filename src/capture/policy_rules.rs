//! Policy rules of other software (ip-rule(8)) beside the marks that tng sets. A rule that takes such a mark by chance
//! leads the tunnel's connections, or what is captured, elsewhere.

use std::time::Duration;

use serde_json::Value;

use super::marks::{CAPTURED_BASE, CAPTURED_MASK, ROUTE_TABLE};
use crate::os::process;

/// Preference of the rule that looks up the main table; what comes later is no matter.
const MAIN: u64 = 32766;
/// The longest that `ip` is waited for.
const DEADLINE: Duration = Duration::from_secs(5);
/// What a rule may ask for without being narrow: marks and users are judged.
const JUDGED: [&str; 9] = ["priority", "src", "iif", "fwmark", "fwmask", "uid_start", "uid_end", "table", "protocol"];

/// A rule that is asked before the main table and leads somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// `-4` or `-6`.
    family: &'static str,
    priority: u64,
    /// Mark and mask that it asks for.
    mark: Option<(u32, u32)>,
    /// First and last uid that it asks for.
    users: Option<(u64, u64)>,
    /// It asks for more than that, or may let a packet pass on.
    is_narrow: bool,
    shown: String,
}

/// How surely a rule takes packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Taken {
    /// Those that also fit what else it asks for.
    Some,
    /// All of them.
    All,
}

impl PolicyRule {
    /// Of `ip -j rule show`. `None`: ours, asked after the main table, or never asked about what this host sends.
    fn read(family: &'static str, rule: &Value) -> Option<Self> {
        let priority = rule["priority"].as_u64()?;
        let table = rule["table"].as_str().unwrap_or_default();
        // What this host sends comes in by lo; `oif` is for sockets that are bound to a device, as none of ours is.
        let is_elsewhere = rule["iif"].as_str().is_some_and(|iif| iif != "lo") || rule.get("oif").is_some();
        let is_ours = table.parse() == Ok(ROUTE_TABLE);
        // 0 is the local table. `not` takes what somebody did not mark: VPNs mean everything by it.
        if priority == 0 || priority >= MAIN || is_ours || is_elsewhere || rule.get("not").is_some() {
            return None;
        }
        let mark = hex(&rule["fwmark"]).map(|mark| (mark, hex(&rule["fwmask"]).unwrap_or(u32::MAX)));
        let users = rule["uid_start"].as_u64().zip(rule["uid_end"].as_u64());
        let unjudged = rule.as_object()?.keys().any(|key| !JUDGED.contains(&key.as_str()) && key != "action");
        let source = rule["src"].as_str().unwrap_or("all");
        let mut shown = format!("ip {family} rule pref {priority}");
        if source != "all" {
            shown += &format!(" from {source}");
        }
        if let Some((mark, mask)) = mark {
            shown += &format!(" fwmark {mark:#x}");
            if mask != u32::MAX {
                shown += &format!("/{mask:#x}");
            }
        }
        if let Some((first, last)) = users {
            shown += &format!(" uidrange {first}-{last}");
        }
        shown += &match rule["action"].as_str() {
            Some(action) => format!(" {action}"),
            None => format!(" lookup {table}"),
        };
        Some(Self { family, priority, mark, users, is_narrow: unjudged || source != "all", shown })
    }

    fn certainty(&self, is_narrow: bool) -> Taken {
        if self.is_narrow || is_narrow { Taken::Some } else { Taken::All }
    }

    /// Whether it takes a socket of tng's with this mark. `uid`: the data plane's, where it is known.
    pub fn takes_socket(&self, mark: u32, uid: Option<u32>) -> Option<Taken> {
        let (wanted, mask) = self.mark?;
        let is_user = |(first, last): (u64, u64)| uid.is_none_or(|uid| (first..=last).contains(&u64::from(uid)));
        let takes = (mark ^ wanted) & mask == 0 && self.users.is_none_or(is_user);
        takes.then(|| self.certainty(self.users.is_some() && uid.is_none()))
    }

    /// Whether it takes captured packets, which tng's own rule must have.
    pub fn takes_captured(&self) -> Option<Taken> {
        if self.priority > u64::from(ROUTE_TABLE) {
            return None;
        }
        // The upper half and the endpoint's id may be anything.
        let reaches = |(mark, mask): (u32, u32)| (mark ^ CAPTURED_BASE) & mask & CAPTURED_MASK == 0;
        let (reached, all) = match self.mark {
            None => (true, true),
            Some(asked) => (reaches(asked), asked.1 & !CAPTURED_MASK == 0),
        };
        reached.then(|| self.certainty(!all || self.users.is_some()))
    }

    /// The command that removes it.
    pub fn removal(&self) -> String {
        format!("ip {} rule del pref {}", self.family, self.priority)
    }
}

impl std::fmt::Display for PolicyRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct PolicyRules(Vec<PolicyRule>);

impl PolicyRules {
    /// Asks `ip`, whose standard output `run` gives when it ends well. `None`: there is no answer.
    pub fn read(run: impl Fn(&[&str]) -> Option<String>) -> Option<Self> {
        let mut all = Vec::new();
        for family in ["-4", "-6"] {
            let listed = run(&["ip", family, "-j", "rule", "show"]);
            let listed = listed.and_then(|text| serde_json::from_str::<Vec<Value>>(&text).ok());
            let rules = match (listed, family) {
                (Some(rules), _) => rules,
                (None, "-4") => return None,
                // A kernel without IPv6 has no such rules to list.
                (None, _) => continue,
            };
            // A table without routes takes nothing: the next rule is asked.
            let leads = |rule: &Value| {
                let Some(table) = rule["table"].as_str() else { return true };
                run(&["ip", family, "-j", "route", "show", "table", table])
                    .and_then(|text| serde_json::from_str::<Vec<Value>>(&text).ok())
                    .is_some_and(|routes| !routes.is_empty())
            };
            let read = |rule: &Value| PolicyRule::read(family, rule).filter(|_| leads(rule));
            all.extend(rules.iter().filter_map(read));
        }
        Some(Self(all))
    }

    /// This host's.
    pub fn of_this_host() -> Option<Self> {
        Self::read(|argv| process::run(argv, None, DEADLINE).text().map(str::to_owned))
    }

    /// In the order in which they are asked.
    pub fn iter(&self) -> impl Iterator<Item = &PolicyRule> {
        self.0.iter()
    }

    /// A mark that no rule takes, outside those that the capture rules use.
    pub fn free_mark(&self) -> Option<u32> {
        let ours = |mark: u32| (0x0578..=0x057a).contains(&mark) || (0x0600..=0x06ff).contains(&mark);
        let is_taken = |mark: u32| self.0.iter().any(|rule| rule.takes_socket(mark, None).is_some());
        (0x0135..=0xffff).find(|mark| !ours(*mark) && !is_taken(*mark))
    }
}

fn hex(value: &Value) -> Option<u32> {
    u32::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rule(more: Value) -> Option<PolicyRule> {
        let mut rule = json!({ "priority": 9, "src": "all", "table": "2004" });
        for (key, value) in more.as_object().expect("an object") {
            rule[key] = value.clone();
        }
        PolicyRule::read("-4", &rule)
    }

    fn socket(more: Value) -> Option<Taken> {
        rule(more).and_then(|rule| rule.takes_socket(566, Some(994)))
    }

    fn captured(more: Value) -> Option<Taken> {
        rule(more).and_then(|rule| rule.takes_captured())
    }

    #[test]
    fn a_rule_takes_a_socket_by_its_mask_its_place_and_its_users() {
        let cilium = json!({ "fwmark": "0x200", "fwmask": "0xf00" });
        assert_eq!(socket(cilium.clone()), Some(Taken::All));
        assert_eq!(rule(cilium).expect("a rule").takes_socket(0x135, None), None);
        assert_eq!(socket(json!({ "fwmark": "0x236" })), Some(Taken::All));
        assert_eq!(socket(json!({})), None, "what asks for no mark is meant for everything");
        assert_eq!(socket(json!({ "fwmark": "0x236", "priority": 40_000 })), None, "behind main");
        assert_eq!(socket(json!({ "fwmark": "0x236", "table": "565" })), None, "ours");
        assert_eq!(socket(json!({ "fwmark": "0x236", "iif": "eth0" })), None, "forwarded packets");
        assert_eq!(socket(json!({ "fwmark": "0x236", "iif": "lo" })), Some(Taken::All));
        assert_eq!(socket(json!({ "fwmark": "0x236", "dst": "10.0.0.0", "dstlen": 8 })), Some(Taken::Some));
        assert_eq!(socket(json!({ "fwmark": "0x236", "uid_start": 1000, "uid_end": 1999 })), None, "not tng's user");
        assert_eq!(socket(json!({ "fwmark": "0x236", "uid_start": 0, "uid_end": 999 })), Some(Taken::All));
    }

    #[test]
    fn only_rules_before_ours_take_what_is_captured() {
        assert_eq!(captured(json!({ "fwmark": "0x600", "fwmask": "0x600" })), Some(Taken::All));
        assert_eq!(captured(json!({ "fwmark": "0x600", "fwmask": "0xf00", "priority": 564 })), Some(Taken::All));
        assert_eq!(captured(json!({})), Some(Taken::All));
        assert_eq!(
            captured(json!({ "fwmark": "0x0", "fwmask": "0x80" })),
            Some(Taken::Some),
            "ids differ in these bits"
        );
        assert_eq!(captured(json!({ "fwmark": "0x601" })), Some(Taken::Some));
        assert_eq!(captured(json!({ "uid_start": 5, "uid_end": 9 })), Some(Taken::Some));
        assert_eq!(captured(json!({ "suppress_prefixlen": 0 })), Some(Taken::Some));
        assert_eq!(captured(json!({ "fwmark": "0x4000", "fwmask": "0x4000" })), None);
        assert_eq!(captured(json!({ "priority": 566 })), None);
        assert_eq!(captured(json!({ "priority": 0, "table": "local" })), None);
    }

    #[test]
    fn a_table_without_routes_takes_nothing_and_a_missing_ip_is_no_answer() {
        let run = |routes: &'static str| {
            move |argv: &[&str]| {
                let rules = r#"[{"priority":9,"src":"all","fwmark":"0x200","fwmask":"0xf00","table":"2004"}]"#;
                Some(if argv[3] == "rule" { rules } else { routes }.to_owned())
            }
        };
        let full = PolicyRules::read(run(r#"[{"dst":"default"}]"#)).expect("an answer");
        let shown: Vec<String> = full.iter().map(ToString::to_string).collect();
        assert_eq!(shown[0], "ip -4 rule pref 9 fwmark 0x200/0xf00 lookup 2004");
        assert_eq!(PolicyRules::read(run("[]")).expect("an answer").iter().count(), 0);
        assert!(PolicyRules::read(|_| None).is_none());
    }

    #[test]
    fn the_mark_that_is_proposed_is_taken_by_no_rule() {
        let of = |mark: &str, mask: &str| rule(json!({ "fwmark": mark, "fwmask": mask })).expect("a rule");
        assert_eq!(PolicyRules(vec![of("0x100", "0xf00"), of("0x200", "0xf00")]).free_mark(), Some(0x300));
        assert_eq!(PolicyRules(vec![of("0x0", "0x0")]).free_mark(), None);
    }
}
