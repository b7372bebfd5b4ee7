//! What of the host that `check` runs on stands against a configuration. Warnings, as the file may be meant for another
//! host, and rules and addresses come and go.

use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;

use super::marks::ROUTE_TABLE;
use super::policy_rules::PolicyRules;
use crate::config::{Config, Diagnostic, Mode, Severity, Side, with_paths};

/// Of a good configuration.
pub fn warnings(config: &Config) -> Vec<Diagnostic> {
    let uid = crate::os::privileges::find_user("tng").ok().map(|(uid, _)| uid.as_raw());
    let mut found = PolicyRules::of_this_host().map_or_else(Vec::new, |rules| marks(config, &rules, uid));
    found.extend(own_addresses(config, &addresses()));
    found
}

fn warning(config: &Config, reason: &'static str, path: String, message: String, hint: String) -> Diagnostic {
    Diagnostic {
        severity: Severity::Warning,
        reason,
        file: config.source.clone(),
        line: None,
        column: None,
        path,
        message,
        hint: Some(hint),
    }
}

/// Marks that a policy rule of other software takes. `uid`: the data plane's.
fn marks(config: &Config, rules: &PolicyRules, uid: Option<u32>) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (path, endpoint) in with_paths(config) {
        let mark = endpoint.mode.so_mark().0;
        for rule in rules.iter().filter(|rule| rule.takes_socket(mark, uid).is_some()) {
            let message = format!(
                "mark {mark} ({mark:#x}) is taken by a rule of this host, {rule}: the tunnel's packets would be led away"
            );
            let hint = match rules.free_mark() {
                Some(free) => format!("no rule takes {free}: so_mark = {free}"),
                None => "every mark is taken by some rule: see ip rule show".to_owned(),
            };
            let path = format!("{path}.{}.so_mark", endpoint.mode.name());
            found.push(warning(config, "mark-taken", path, message, hint));
        }
    }
    if config.endpoints.iter().any(|e| matches!(e.mode, Mode::Netfilter(_))) {
        for rule in rules.iter().filter(|rule| rule.takes_captured().is_some()) {
            let message =
                format!("{rule} of this host takes captured packets before rule {ROUTE_TABLE}: they would be dropped");
            let hint = format!("let its owner use a preference above {ROUTE_TABLE}");
            found.push(warning(config, "mark-taken", String::new(), message, hint));
        }
    }
    found
}

/// Captures of an ingress whose only destination is this host: what a host sends to itself does not leave it, and an
/// ingress leaves it alone.
fn own_addresses(config: &Config, own: &[(String, IpAddr)]) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for (path, endpoint) in with_paths(config) {
        let (Side::Ingress, Mode::Netfilter(netfilter)) = (endpoint.side, &endpoint.mode) else { continue };
        for (at, to) in netfilter.capture.iter().enumerate().filter_map(|(at, entry)| Some((at, entry.to?))) {
            let is_one = to.prefix_len() == to.max_prefix_len();
            let Some((device, addr)) = own.iter().find(|(_, own)| is_one && *own == to.addr()) else { continue };
            let message = format!(
                "{addr} is an address of this host ({device}): what a host sends to itself is not captured, so this never matches here"
            );
            let hint = "name the peer's address, or capture on the host that sends".to_owned();
            found.push(warning(config, "own-address", format!("{path}.netfilter.capture[{at}].to"), message, hint));
        }
    }
    found
}

/// Of this host's interfaces, by name.
fn addresses() -> Vec<(String, IpAddr)> {
    let all = getifaddrs().into_iter().flatten();
    let address = |a: nix::ifaddrs::InterfaceAddress| {
        let address = a.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        Some((a.interface_name, v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))?))
    };
    all.filter_map(address).collect()
}
