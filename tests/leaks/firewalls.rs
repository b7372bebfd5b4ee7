//! Rows beside the firewalls that people run: what is broken by them stays closed, and the line that the manual gives
//! mends it (tngd(8), BESIDE A FIREWALL).

use super::controls::*;
use super::egress::{NO_SPOOF, asked};
use super::lab::{Lab, PORT, TO_SERVER, egress, ingress, ingress_mapping};
use super::netns::{Connect, Family, Host, Tng};
use super::table::{Expect::*, Outcome, Row, row};

const IN: &str = "ingress";
const OUT: &str = "egress";

/// A mark that no rule of Cilium's shape takes: 0x135.
const FREE_MARK: &str = "so_mark = 309";
/// firewalld's IPv6_rpfilter=strict and =loose, asked here of both families.
const STRICT: &str = "fib saddr . mark . iif oif missing drop";
const LOOSE: &str = "fib saddr . mark oif missing drop";
/// firewalld's place, and one before everything of ours.
const FIREWALLD: &str = "type filter hook prerouting priority filter + 10";
const RAW: &str = "type filter hook prerouting priority raw";

/// A DNAT between tng's two places in prerouting, to a port where nobody listens.
const DSTNAT: &str = "type nat hook prerouting priority dstnat";
const TO_NOBODY: &str = "iif lo tcp dport 8080 redirect to :9999";

/// The rows.
pub const ROWS: &[Row] = &[
    row(IN, "firewalld: strict rpfilter", Tunnelled, client_asks, |lab| rpfilter(lab, FIREWALLD, STRICT, true)),
    row(IN, "firewalld: loose rpfilter", Tunnelled, client_asks, |lab| rpfilter(lab, FIREWALLD, LOOSE, true)),
    row(IN, "strict rpfilter in raw", Tunnelled, client_asks, |lab| rpfilter(lab, RAW, STRICT, true)),
    row(IN, "rp_filter=1, src_valid_mark=1", Tunnelled, client_asks, strict_routes),
    row(OUT, "firewalld: strict rpfilter, plain", Closed, outsider_asks, |lab| rpfilter(lab, FIREWALLD, STRICT, false)),
    row(OUT, "firewalld: strict rpfilter, client of this host", Tunnelled, outsider_asks, rpfilter_single_host),
    row(IN, "REDIRECT of what comes by lo, prerouting", Tunnelled, client_asks, |lab| {
        lab.world.client.chain(DSTNAT, &[TO_NOBODY]);
        let _tng = lab.start();
        asked(lab, true)
    }),
    row(OUT, "REDIRECT of what comes by lo, client of this host", Tunnelled, outsider_asks, |lab| {
        lab.world.server.chain(DSTNAT, &[TO_NOBODY]);
        single_host(lab)
    }),
    row(IN, "mark cleared on lo, prerouting filter", Tunnelled, client_asks, |lab| {
        lab.world.client.chain("type filter hook prerouting priority filter", &["iif lo meta mark set 0"]);
        let _tng = lab.start();
        asked(lab, true)
    }),
    row(OUT, "service bound to a device", Closed, client_asks, |lab| bound_service(lab, "")),
    row(OUT, "service bound to a device, spoof=False", Tunnelled, client_asks, |lab| bound_service(lab, NO_SPOOF)),
    row(IN, "Cilium: fwmark 0x200/0xf00, default mark", Closed, client_asks, |lab| cilium(lab, true, "", true)),
    row(IN, "Cilium: fwmark 0x200/0xf00, a free mark", Tunnelled, client_asks, |lab| {
        cilium(lab, true, FREE_MARK, true)
    }),
    row(OUT, "Cilium: fwmark 0x200/0xf00, default mark", Closed, client_asks, |lab| cilium(lab, false, "", true)),
    row(OUT, "Cilium: fwmark 0x200/0xf00, a free mark", Tunnelled, client_asks, |lab| {
        cilium(lab, false, FREE_MARK, true)
    }),
    row(OUT, "Cilium: fwmark 0x200/0xf00, plain", Closed, outsider_asks, |lab| cilium(lab, false, "", false)),
    row(IN, "connmark restored whole", Closed, client_asks, |lab| connmark(lab, true, WHOLE, true)),
    row(IN, "connmark restored, upper half alone", Tunnelled, client_asks, |lab| connmark(lab, true, UPPER, true)),
    row(IN, "connmark restored but for ours", Tunnelled, client_asks, |lab| connmark(lab, true, BUT_OURS, true)),
    row(OUT, "connmark restored but for ours", Tunnelled, client_asks, |lab| connmark(lab, false, BUT_OURS, true)),
    row(OUT, "connmark restored whole", Safe, client_asks, |lab| connmark(lab, false, WHOLE, true)),
    row(OUT, "connmark restored, upper half alone", Tunnelled, client_asks, |lab| connmark(lab, false, UPPER, true)),
    row(OUT, "connmark restored whole, plain", Closed, outsider_asks, |lab| connmark(lab, false, WHOLE, false)),
    row(IN, "wg-quick, default route", Closed, client_asks, |lab| wg_quick(lab, true, false, "", true)),
    row(IN, "wg-quick, default route, mended", Tunnelled, client_asks, |lab| wg_quick(lab, true, true, "", true)),
    row(OUT, "wg-quick, default route", Closed, client_asks, |lab| wg_quick(lab, false, false, "", true)),
    row(OUT, "wg-quick, default route, mended", Tunnelled, client_asks, |lab| wg_quick(lab, false, true, "", true)),
    row(OUT, "wg-quick, default route, spoof=False", Tunnelled, client_asks, |lab| {
        wg_quick(lab, false, false, NO_SPOOF, true)
    }),
    row(OUT, "wg-quick, default route, plain", Closed, outsider_asks, |lab| wg_quick(lab, false, true, "", false)),
    row(IN, "output policy drop, oif lo accept", Closed, client_asks, |lab| policy_drop(lab, true, "", true)),
    row(IN, "output policy drop, mended", Tunnelled, client_asks, |lab| policy_drop(lab, true, CAPTURED, true)),
    row(OUT, "output policy drop, oif lo accept", Closed, client_asks, |lab| policy_drop(lab, false, "", true)),
    row(OUT, "output policy drop, mended", Tunnelled, client_asks, |lab| policy_drop(lab, false, CAPTURED, true)),
    row(OUT, "output policy drop, mended, plain", Closed, outsider_asks, |lab| {
        policy_drop(lab, false, CAPTURED, false)
    }),
];

/// The host whose rules a row is about.
fn host(lab: &Lab, client: bool) -> &Host {
    if client { &lab.world.client } else { &lab.world.server }
}

/// A reverse path filter on both hosts.
fn rpfilter(lab: &Lab, hook: &str, rule: &str, tunnel: bool) -> Outcome {
    for host in [&lab.world.client, &lab.world.server] {
        host.chain(hook, &[rule]);
    }
    let before = lab.each(|family| lab.plain(family));
    assert!(before.iter().all(|s| s.plaintext.is_some()), "the filter lets plain traffic pass before tng: {before:?}");
    let _tng = lab.start();
    asked(lab, tunnel)
}

/// The kernel's own filter.
fn strict_routes(lab: &Lab) -> Outcome {
    for host in [&lab.world.client, &lab.world.server] {
        host.sysctl(&[("net/ipv4/conf/all/rp_filter", "1"), ("net/ipv4/conf/all/src_valid_mark", "1")]);
    }
    let _tng = lab.start();
    asked(lab, true)
}

fn rpfilter_single_host(lab: &Lab) -> Outcome {
    lab.world.server.chain(FIREWALLD, &[STRICT]);
    single_host(lab)
}

/// A service that listens on one device alone: its answers cannot be led to lo.
fn bound_service(lab: &Lab, more: &str) -> Outcome {
    for (listener, any) in lab.service.into_iter().zip(["0.0.0.0", "::"]) {
        lab.server.close(listener);
        lab.server.listen(any.parse().expect("address"), PORT, serde_json::json!({"device": "s0"}));
    }
    let before = lab.each(|family| lab.plain(family));
    assert!(before.iter().all(|s| s.plaintext.is_some()), "it serves plain clients before tng: {before:?}");
    let _tng = lab.start_with(&ingress(TO_SERVER), &egress(more));
    asked(lab, true)
}

/// The whole path on one host: the tunnel arrives by lo.
fn single_host(lab: &Lab) -> Outcome {
    let server = &lab.world.server;
    let _egress = Tng::start(server, "out", &egress("capture_local_traffic = true"));
    let _mappings = lab.each(|family| {
        let (listen, name) = if family == Family::V4 { ("127.0.0.1:10001", "four") } else { ("[::1]:10001", "six") };
        let target = std::net::SocketAddr::new(lab.addr(family), PORT).to_string();
        Tng::start(server, name, &ingress_mapping(listen, &target))
    });
    lab.each(|family| {
        let addr = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        lab.exchange_from(&lab.server, addr, &Connect { port: 10001, ..Connect::default() })
    })
    .into()
}

/// A policy rule that takes both marks of tng's own sockets, on the client's host or the server's.
fn cilium(lab: &Lab, client: bool, more: &str, tunnel: bool) -> Outcome {
    for family in ["-4", "-6"] {
        host(lab, client).sh(&format!(
            "ip {family} rule add pref 9 fwmark 0x200/0xf00 lookup 2004
             ip {family} route add local default dev lo table 2004"
        ));
    }
    let own = |text: String, ours: bool| {
        if ours && !more.is_empty() {
            text.replace("[ingress.netfilter]\n", &format!("[ingress.netfilter]\n{more}\n"))
        } else {
            text
        }
    };
    let egress_more = if client { "" } else { more };
    let _tng = lab.start_with(&own(ingress(TO_SERVER), client), &egress(egress_more));
    asked(lab, tunnel)
}

const BUT_OURS: &str = "meta mark & 0xffff 0 ct mark & 0xff00 != 0x0600 ct mark & 0xffff != { 565, 566, 0x0578, 0x057a } \
                        meta mark set ct mark";
const WHOLE: &str = "meta mark set ct mark";
const UPPER: &str = "ct mark & 0x00ff0000 == 0x00110000 meta mark set meta mark & 0xff00ffff | 0x00110000";

/// A host with several uplinks: each connection's mark is put back on its packets.
fn connmark(lab: &Lab, client: bool, rule: &str, tunnel: bool) -> Outcome {
    let host = host(lab, client);
    host.chain("type filter hook prerouting priority mangle - 5", &[rule]);
    host.chain("type route hook output priority mangle - 5", &[rule]);
    let before = lab.each(|family| lab.plain(family));
    assert!(before.iter().all(|s| s.plaintext.is_some()), "plain traffic passes before tng: {before:?}");
    let _tng = lab.start();
    asked(lab, tunnel)
}

/// What `wg-quick up` adds for a tunnel with a default route; the wire stands for the tunnel.
fn wg_quick(lab: &Lab, client: bool, mended: bool, more: &str, tunnel: bool) -> Outcome {
    let host = host(lab, client);
    let device = if client { "c0" } else { "s0" };
    let (v4, v6) = (host.addr(Family::V4), host.addr(Family::V6));
    let rules = [
        format!("iifname != \"{device}\" ip daddr {v4} fib saddr type != local drop"),
        format!("iifname != \"{device}\" ip6 daddr {v6} fib saddr type != local drop"),
    ];
    let mut lines: Vec<&str> = rules.iter().map(String::as_str).collect();
    if mended {
        lines.insert(0, FROM_LO);
    }
    host.chain(RAW, &lines);
    let before = lab.each(|family| lab.plain(family));
    assert!(before.iter().all(|s| s.plaintext.is_some()), "plain traffic passes before tng: {before:?}");
    let _tng = lab.start_with(&ingress(TO_SERVER), &egress(more));
    asked(lab, tunnel)
}

const FROM_LO: &str = "iif lo accept";
const CAPTURED: &str = "meta mark & 0xff00 == 0x0600 accept";

/// A firewall that names what may leave.
fn policy_drop(lab: &Lab, client: bool, line: &str, tunnel: bool) -> Outcome {
    let own = "meta mark & 0xffff { 565, 566 } accept";
    // The last but one lets the beacons of the sniffer pass.
    // 58 is ICMPv6 (RFC 4443); its name is known only where /etc/protocols is.
    let lines = ["oif lo accept", "meta l4proto 58 accept", own, "udp dport 9 accept", line];
    host(lab, client).chain("type filter hook output priority filter; policy drop", &lines);
    let _tng = lab.start();
    asked(lab, tunnel)
}

#[test]
fn the_manual_gives_the_lines_that_mend_these_rows() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/tngd.8")).expect("page");
    let page = page.replace("\\-", "-");
    let chapter =
        page.split(".SH \"BESIDE A FIREWALL\"").nth(1).and_then(|rest| rest.split(".SH ").next()).expect("chapter");
    for line in [FREE_MARK, UPPER, BUT_OURS, FROM_LO, CAPTURED] {
        assert!(chapter.contains(line), "not in BESIDE A FIREWALL: {line}");
    }
}
