//! Rules of other software that are known to stop what is captured, by what they say. The trial finds where a packet is
//! lost; these are found also while the instance does not run, and where no trial comes: between egress and service.

use std::net::IpAddr;

use serde_json::json;

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Instance;
use super::listing::{Listing, NO_LISTING, Rule, has_number};
use crate::config::{Endpoint, Mode, Netfilter, Side};

/// What comes by lo was sent by this host itself.
const FROM_LO: &str = "iif lo accept";

/// Of the instances that capture.
pub(super) fn check(host: &dyn Host, listing: Option<&Listing>, instances: &[Instance]) -> Vec<Finding> {
    let check = Check::FilterRules;
    let captured: Vec<(&str, &Endpoint, &Netfilter)> = instances
        .iter()
        .filter_map(|i| Some((i.name.as_str(), i.config.as_ref().ok()?)))
        .flat_map(|(name, config)| config.endpoints.iter().map(move |e| (name, e)))
        .filter_map(|(name, endpoint)| match &endpoint.mode {
            Mode::Netfilter(netfilter) => Some((name, endpoint, netfilter)),
            Mode::Mapping(_) => None,
        })
        .collect();
    if captured.is_empty() {
        return Vec::new();
    }
    if !host.is_root() {
        return vec![Finding::needs_root(check)];
    }
    let Some(listing) = listing else { return vec![Finding::note(check, NO_LISTING)] };
    let locals = host.local_addresses();
    let mut found = Vec::new();
    // A foreign source address comes by lo: towards an ingress's application, and from an egress to its service.
    if captured.iter().any(|(_, endpoint, netfilter)| endpoint.side == Side::Ingress || netfilter.preserve_source) {
        found.extend(foreign_sources(listing, &locals));
    }
    let preserving = captured.iter().filter(|(_, e, n)| e.side == Side::Egress && n.preserve_source);
    for (instance, endpoint, netfilter) in preserving {
        found.extend(moved_service(listing, &locals, endpoint, netfilter).map(|f| f.of(instance)));
    }
    if found.is_empty() {
        found.push(Finding::ok(check, "no rule that is known to stop what is captured"));
    }
    found
}

/// What wg-quick(8) adds for a tunnel with a default route: packets to the tunnel's address that did not come by the
/// tunnel, from an address that is not this host's.
fn foreign_sources(listing: &Listing, locals: &[IpAddr]) -> Vec<Finding> {
    let is_kind = |rule: &Rule| {
        rule.does("drop")
            && rule.mentions(&json!({ "result": "type", "flags": ["saddr"] }))
            && rule.meta("iifname").is_some_and(|device| *device != "lo")
            && ["ip", "ip6"].into_iter().filter_map(|f| rule.payload(f, "daddr")).all(|a| is_local(a, locals))
    };
    let mut found: Vec<Finding> = Vec::new();
    for rule in listing.rules.iter().filter(|rule| is_kind(rule)) {
        let lo_passes = |other: &Rule| {
            let is_lo = ["iif", "iifname"].into_iter().any(|k| other.meta(k) == Some(&json!("lo")));
            other.does("accept") && other.expr.len() == 2 && is_lo
        };
        if listing.rules_of(&rule.table, &rule.chain).any(lo_passes) {
            continue;
        }
        let device = rule.meta("iifname").and_then(|v| v.as_str()).unwrap_or_default();
        let what = format!(
            "chain {} {} drops what has a foreign source address and does not come by {device} (wg-quick's rule)",
            rule.table, rule.chain
        );
        if found.iter().any(|f| f.what == what) {
            continue;
        }
        found.push(
            Finding::error(Check::FilterRules, what)
                .why(
                    "answers to captured connections, and an egress's connections with preserve_source, come by lo with \
                     the other host's address: they are dropped, and both ends wait in vain",
                )
                .fix(format!("nft insert rule {} {} {FROM_LO}  # in wg-quick's file: as PostUp", rule.table, rule.chain)),
        );
    }
    found
}

fn is_local(right: &serde_json::Value, locals: &[IpAddr]) -> bool {
    right.as_str().and_then(|text| text.parse().ok()).is_none_or(|addr: IpAddr| locals.contains(&addr))
}

/// Destination NAT of what this host itself sends to a captured port (docker -p): the service answers the client's
/// address directly, past the egress.
fn moved_service(listing: &Listing, locals: &[IpAddr], endpoint: &Endpoint, netfilter: &Netfilter) -> Option<Finding> {
    let ports: Vec<u16> =
        netfilter.capture.iter().filter_map(|e| e.port).flat_map(|range| [range.first, range.last]).collect();
    let captured = |p: &u16| netfilter.capture.iter().any(|e| e.port.is_none_or(|range| range.contains(*p)));
    for base in listing.bases.iter().filter(|b| b.hook == "output" && b.kind == "nat") {
        let reached = listing.reached_from(base);
        for rule in listing.rules.iter().filter(|r| r.table == base.table && reached.contains(&r.chain)) {
            let moves = rule.does("dnat") || rule.expr.iter().any(|e| e["xt"]["name"] == "DNAT");
            let port = rule.payload("tcp", "dport").and_then(|right| {
                let single = right.as_u64().and_then(|p| u16::try_from(p).ok()).filter(captured);
                single.or_else(|| ports.iter().copied().find(|port| has_number(right, u64::from(*port))))
            });
            let is_ours =
                ["ip", "ip6"].into_iter().filter_map(|f| rule.payload(f, "daddr")).all(|a| is_local(a, locals));
            let (true, true, Some(port)) = (moves, is_ours, port) else { continue };
            let what = format!(
                "endpoint {} captures port {port}, which chain {} {} sends to another address (docker -p)",
                endpoint.name, rule.table, rule.chain
            );
            return Some(
                Finding::error(Check::FilterRules, what)
                    .why(
                        "a container cannot answer the client's address through the egress, as preserve_source asks: \
                         each connection times out after 10 s",
                    )
                    .fix(format!(
                        "preserve_source = false  # in [egress.netfilter] of endpoint {}; then: tngctl reload NAME",
                        endpoint.name
                    )),
            );
        }
    }
    None
}
