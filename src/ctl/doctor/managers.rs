//! Other software that makes rules, routes or marks.

use std::collections::BTreeSet;

use serde_json::Value;

use super::finding::{Check, Finding};
use super::host::Host;
use super::listing::{Listing, NO_LISTING, Rule};
use super::networkd;
use crate::capture::marks::MARK_MASK;

/// All of it.
pub(super) fn check(host: &dyn Host, listing: Option<&Listing>) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(networkd::check(host));
    found.push(mark_writers(host, listing));
    if host.is_active("docker.service") {
        found.push(
            Finding::note(Check::Docker, "docker runs: its published ports are DNATed to containers")
                .why("a container's service behind an egress cannot be given the client's address")
                .fix("grep -n preserve_source /etc/tng/*.toml  # set it to false on egresses whose service is a container"),
        );
    }
    if host.is_active("firewalld.service") {
        found.push(
            Finding::note(Check::Firewalld, "firewalld runs: captured ports pass its zones as if tng were not there")
                .why("a port that a zone closes stays closed for tunnels as well")
                .fix("firewall-cmd --list-all"),
        );
    }
    if host.read("/proc/net/ip_tables_names").is_some_and(|names| !names.is_empty())
        || host.read("/proc/net/ip6_tables_names").is_some_and(|names| !names.is_empty())
    {
        found.push(
            Finding::note(Check::LegacyTables, "tables of iptables-legacy are loaded")
                .why("nft does not list them; when a packet is lost, look there as well")
                .fix("iptables-legacy-save; ip6tables-legacy-save"),
        );
    }
    if host.read("/etc/nftables.conf").is_some_and(|text| flushes(&text)) && host.is_active("nftables.service") {
        found.push(
            Finding::note(Check::FlushRuleset, "/etc/nftables.conf begins with `flush ruleset`").why(
                "a restart of nftables removes the capture tables; the guard refuses and puts them back in a second",
            ),
        );
    }
    found
}

fn flushes(text: &str) -> bool {
    text.lines().any(|line| line.split('#').next().unwrap_or_default().trim().trim_end_matches(';') == "flush ruleset")
}

/// Who writes marks whole instead of masked overwrites ours.
fn mark_writers(host: &dyn Host, listing: Option<&Listing>) -> Finding {
    let check = Check::MarkWriters;
    if !host.is_root() {
        return Finding::needs_root(check);
    }
    let Some(listing) = listing else { return Finding::note(check, NO_LISTING) };
    let chains = |is_meant: fn(&Rule) -> bool| -> Vec<String> {
        let chains = listing.rules.iter().filter(|rule| is_meant(rule)).map(|r| format!("{} {}", r.table, r.chain));
        chains.collect::<BTreeSet<_>>().into_iter().collect()
    };
    let restorers = chains(restores);
    if !restorers.is_empty() {
        return Finding::error(
            check,
            format!("chains that put the connection's mark over the packet's: {}", restorers.join(", ")),
        )
        .why("the mark of captured packets and of the tunnel's sockets is lost: nothing connects through tng")
        .fix(format!("nft -a list ruleset | grep -n 'mark set ct mark'  # write instead: {BUT_OURS}"));
    }
    let writers = chains(writes);
    if writers.is_empty() && !listing.unread.is_empty() {
        return Finding::note(check, format!("not checked: nft cannot list table {}", listing.unread.join(", table ")));
    }
    if writers.is_empty() {
        return Finding::ok(check, "no foreign chain writes the mark's low half");
    }
    Finding::note(check, format!("chains that write the mark's low 16 bits: {}", writers.join(", ")))
        .why("tng keeps its state there; when other software overwrites it, captured connections are reset")
        .fix("nft -a list ruleset | grep -n 'mark set'  # mask them: meta mark set meta mark & 0x0000ffff | VALUE")
}

/// What restores other software's marks and leaves tng's alone (tngd(8), BESIDE A FIREWALL).
const BUT_OURS: &str = "meta mark & 0xffff 0 ct mark & 0xff00 != 0x0600 ct mark & 0xffff != { 565, 566, 0x0578, 0x057a } \
                        meta mark set ct mark";

/// `meta mark set ct mark` that no condition on tng's marks precedes.
fn restores(rule: &Rule) -> bool {
    let is_restore =
        |expr: &Value| expr["mangle"]["key"]["meta"]["key"] == "mark" && expr["mangle"]["value"]["ct"]["key"] == "mark";
    // A rule that looks at the packet's mark first is one whose author thought of other marks.
    rule.expr.iter().any(is_restore) && !rule.expr.iter().any(|expr| mentions_mark(&expr["match"]["left"]))
}

fn mentions_mark(value: &Value) -> bool {
    value["meta"]["key"] == "mark" || value["&"].as_array().is_some_and(|both| both.iter().any(mentions_mark))
}

fn writes(rule: &Rule) -> bool {
    rule.expr.iter().any(|expr| {
        let mangle = &expr["mangle"];
        let is_mark = ["meta", "ct"].iter().any(|kind| mangle["key"][kind]["key"] == "mark");
        let target = expr["xt"]["name"].as_str();
        is_mark && kept(&mangle["value"]) & MARK_MASK != MARK_MASK || matches!(target, Some("MARK" | "CONNMARK"))
    })
}

/// The bits of the old mark that a written value keeps.
fn kept(value: &Value) -> u32 {
    let operands = |op: &str| value[op].as_array().filter(|a| a.len() == 2).map(|a| (&a[0], a[1].as_u64()));
    if value["meta"]["key"] == "mark" || value["ct"]["key"] == "mark" {
        return u32::MAX;
    }
    let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    match (operands("&"), operands("|").or_else(|| operands("^"))) {
        (Some((inner, Some(mask))), _) => kept(inner) & number(mask),
        (_, Some((inner, Some(set)))) => kept(inner) & !number(set),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn masked_writes_of_the_upper_half_are_harmless() {
        let mark = json!({ "meta": { "key": "mark" } });
        let masked = json!({ "|": [{ "&": [mark, 0xffff_u32] }, 0x80000] });
        assert_eq!(kept(&masked) & MARK_MASK, MARK_MASK);
        let low = json!({ "|": [mark, 0x4000] });
        assert_ne!(kept(&low) & MARK_MASK, MARK_MASK);
        assert_eq!(kept(&json!(7)), 0);
    }

    #[test]
    fn a_connmark_that_is_restored_whole_is_found_and_one_that_leaves_ours_alone_is_not() {
        let restore =
            json!({ "mangle": { "key": { "meta": { "key": "mark" } }, "value": { "ct": { "key": "mark" } } } });
        let rule = |expr: Vec<Value>| restores(&Rule { table: "inet m".into(), chain: "p".into(), expr });
        assert!(rule(vec![restore.clone()]));
        let ours_first =
            json!({ "match": { "op": "==", "right": 0, "left": { "&": [{ "meta": { "key": "mark" } }, 0xffff] } } });
        assert!(!rule(vec![ours_first, restore]));
    }

    #[test]
    fn a_comment_flushes_nothing() {
        assert!(flushes("#!/usr/sbin/nft -f\nflush ruleset\n") && flushes(" flush ruleset; # x"));
        assert!(!flushes("# flush ruleset\ntable inet filter {}\n"));
    }
}
