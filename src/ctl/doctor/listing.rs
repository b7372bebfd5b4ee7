//! The rules of other software as `nft -j list table` gives them (libnftables-json(5)).

use std::collections::BTreeSet;

use serde_json::Value;

use super::host::Host;
use crate::capture::nft;

/// What a finding says when nft does not answer.
pub(super) const NO_LISTING: &str = "not checked: nft list tables gave no answer";

/// A rule.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    /// Family and table.
    pub table: String,
    pub chain: String,
    /// Its expressions.
    pub expr: Vec<Value>,
}

/// Where a base chain hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    pub table: String,
    pub chain: String,
    /// `filter`, `nat` or `route`.
    pub kind: String,
    pub hook: String,
    pub priority: i64,
}

/// Chains and rules, in their order.
#[derive(Debug, Clone, Default)]
pub(super) struct Listing {
    pub bases: Vec<Base>,
    pub rules: Vec<Rule>,
    /// Tables that nft could not list.
    pub unread: Vec<String>,
}

/// Whether a table is tng's own, or the doctor's.
fn is_ours(name: &str) -> bool {
    ["tng_", "tngguard_", "tngdoctor_"].iter().any(|prefix| name.starts_with(prefix))
}

impl Listing {
    /// Asks nft, table by table: nft 1.0.6 crashes where it should print the flag `owner` in JSON, which tng's own
    /// guard has. `None` when it does not answer.
    pub fn of(host: &dyn Host) -> Option<Self> {
        let program = nft::program();
        let program = program.to_string_lossy();
        let tables = host.run(&[&program, "list", "tables"], None);
        let mut all = Self::default();
        for line in tables.text()?.lines() {
            let [_, family, name] = line.split_whitespace().collect::<Vec<_>>()[..] else { continue };
            if is_ours(name) {
                continue;
            }
            let ran = host.run(&[&program, "-j", "list", "table", family, name], None);
            match ran.text().and_then(|text| serde_json::from_str(text).ok()) {
                Some(listing) => all.read(&listing),
                None => all.unread.push(format!("{family} {name}")),
            }
        }
        Some(all)
    }

    fn read(&mut self, listing: &Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for object in listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let (chain, rule) = (&object["chain"], &object["rule"]);
            if let (Some(hook), Some(priority)) = (chain["hook"].as_str(), chain["prio"].as_i64()) {
                let table = format!("{} {}", text(&chain["family"]), text(&chain["table"]));
                let (chain, kind) = (text(&chain["name"]), text(&chain["type"]));
                self.bases.push(Base { table, chain, kind, hook: hook.to_owned(), priority });
            } else if let Some(expr) = rule["expr"].as_array() {
                let table = format!("{} {}", text(&rule["family"]), text(&rule["table"]));
                self.rules.push(Rule { table, chain: text(&rule["chain"]), expr: expr.clone() });
            }
        }
    }

    /// The base chain of this name.
    pub fn base(&self, table: &str, chain: &str) -> Option<&Base> {
        self.bases.iter().find(|b| b.table == table && b.chain == chain)
    }

    /// The rules of a chain.
    pub fn rules_of<'a>(&'a self, table: &'a str, chain: &'a str) -> impl Iterator<Item = &'a Rule> {
        self.rules.iter().filter(move |r| r.table == table && r.chain == chain)
    }

    /// A chain and those that it jumps to.
    pub fn reached_from(&self, base: &Base) -> BTreeSet<String> {
        let mut reached = BTreeSet::from([base.chain.clone()]);
        let mut next = vec![base.chain.clone()];
        while let Some(chain) = next.pop() {
            for rule in self.rules_of(&base.table, &chain) {
                for to in rule.expr.iter().filter_map(target) {
                    if reached.insert(to.to_owned()) {
                        next.push(to.to_owned());
                    }
                }
            }
        }
        reached
    }
}

fn target(expr: &Value) -> Option<&str> {
    expr["jump"]["target"].as_str().or_else(|| expr["goto"]["target"].as_str())
}

impl Rule {
    /// What it compares a key of `meta` with.
    pub fn meta(&self, key: &str) -> Option<&Value> {
        self.matched(|left| left["meta"]["key"] == key)
    }

    /// What it compares a field of a header with.
    pub fn payload(&self, protocol: &str, field: &str) -> Option<&Value> {
        self.matched(|left| left["payload"]["protocol"] == protocol && left["payload"]["field"] == field)
    }

    fn matched(&self, is_left: impl Fn(&Value) -> bool) -> Option<&Value> {
        self.expr.iter().map(|e| &e["match"]).find(|m| is_left(&m["left"])).map(|m| &m["right"])
    }

    /// Whether it mentions `what` anywhere: in a concatenation, a fib lookup, a set of verdicts.
    pub fn mentions(&self, what: &Value) -> bool {
        self.expr.iter().any(|expr| holds(expr, what))
    }

    /// Whether it has this statement.
    pub fn does(&self, statement: &str) -> bool {
        self.expr.iter().any(|expr| expr.get(statement).is_some())
    }
}

fn holds(value: &Value, what: &Value) -> bool {
    value == what
        || match value {
            Value::Array(all) => all.iter().any(|v| holds(v, what)),
            Value::Object(all) => all.values().any(|v| holds(v, what)),
            _ => false,
        }
}

/// Whether a right side, a number, a range or a set of them, holds this number.
pub(super) fn has_number(right: &Value, number: u64) -> bool {
    if let Some(all) = right["set"].as_array() {
        return all.iter().any(|one| has_number(one, number));
    }
    match right["range"].as_array().map(Vec::as_slice) {
        Some([first, last]) => first.as_u64() <= Some(number) && last.as_u64() >= Some(number),
        _ => right.as_u64() == Some(number),
    }
}
