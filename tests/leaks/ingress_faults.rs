//! Ingress rows: old flows, rules taken away, other software in the way, parts missing.

use std::time::Duration;

use serde_json::json;

use super::controls::*;
use super::lab::{Lab, PORT, TO_SERVER, ingress};
use super::netns::{App, Connect, Family, Parts, Tng, wait_for};
use super::table::{Expect::*, Fate, Outcome, Row, Seen, row};

const SIDE: &str = "ingress";
const MANGLE_BEFORE: &str = "priority -160";
const MANGLE_AFTER: &str = "priority -140";

/// The rows.
pub const ROWS: &[Row] = &[
    row(SIDE, "flow older than rules", Refused, client_asks, |lab| old_flow(lab, |_| ())),
    row(SIDE, "flow older than rules, ct was active", Refused, client_asks, |lab| old_flow(lab, conntrack_active)),
    row(SIDE, "tcp_loose=0 + old flow (ct invalid)", Refused, client_asks, |lab| {
        old_flow(lab, |lab| lab.world.client.sysctl(&[("net/netfilter/nf_conntrack_tcp_loose", "0")]))
    }),
    row(SIDE, "same, capture first, guard later", Closed, client_asks, capture_before_guard),
    row(SIDE, "guard first, capture later", Closed, client_asks, guard_before_capture),
    row(SIDE, "listener absent", Refused, client_asks, |lab| listener_absent(lab, false)),
    row(SIDE, "listener absent+local wildcard 8080", Refused, client_asks, |lab| listener_absent(lab, true)),
    row(SIDE, "data plane killed", Closed, client_asks, data_plane_killed),
    row(SIDE, "everything killed", Closed, client_asks, everything_killed),
    row(SIDE, "guard killed", Tunnelled, client_asks, guard_killed),
    row(SIDE, "flush ruleset, new flow", Closed, client_asks, |lab| new_after(lab, flush)),
    row(SIDE, "flush ruleset, captured flow goes on", Closed, client_asks, |lab| live_after(lab, flush)),
    row(SIDE, "capture table deleted, new flow", Closed, client_asks, |lab| {
        new_after(lab, |lab| drop(lab.world.client.sh("nft delete table inet tng_in")))
    }),
    row(SIDE, "ip rule deleted, new flow", Closed, client_asks, |lab| new_after(lab, rule)),
    row(SIDE, "ip rule deleted, live flow", Dropped, client_asks, |lab| live_after(lab, rule)),
    row(SIDE, "ip rule deleted, TFO SYN data", Closed, client_asks_fast, tfo_without_rule),
    row(SIDE, "table 565 local route deleted", Closed, client_asks, |lab| new_after(lab, local_route)),
    row(SIDE, "foreign ip rule pref 100 lookup main", Closed, client_asks, |lab| {
        new_after(lab, |lab| {
            lab.world.client.sh("ip -4 rule add pref 100 lookup main; ip -6 rule add pref 100 lookup main");
        })
    }),
    row(SIDE, "other sw: set whole mark 0x4000 after us", Safe, client_asks, |lab| {
        with_chain(lab, "type filter hook output", MANGLE_AFTER, "tcp dport 8080 meta mark set 0x4000")
    }),
    row(SIDE, "other sw: or 0x4000 after us (kube-style nat OUTPUT)", Safe, client_asks, |lab| {
        with_chain(lab, "type nat hook output", "priority -100", "tcp dport 8080 meta mark set meta mark | 0x4000")
    }),
    row(SIDE, "other sw: CONNMARK restore (type route) after us", Closed, client_asks, |lab| {
        with_chain(lab, "type route hook output", MANGLE_AFTER, "tcp dport 8080 meta mark set ct mark & 0x00ff0000")
    }),
    row(SIDE, "other sw: mark cleared on lo prerouting", Tunnelled, client_asks, |lab| {
        with_chain(lab, "type filter hook prerouting", MANGLE_BEFORE, "iif lo meta mark set 0")
    }),
    row(SIDE, "notrack", Tunnelled, client_asks, |lab| {
        with_chain(lab, "type filter hook output", "priority raw", "tcp dport 8080 notrack")
    }),
    row(SIDE, "ct zone 5 on output", Safe, client_asks, |lab| {
        with_chain(lab, "type filter hook output", "priority raw", "tcp dport 8080 ct zone set 5")
    }),
    row(SIDE, "conntrack -F, captured flow goes on", Tunnelled, client_asks, |lab| {
        live_after(lab, |lab| {
            let out = lab.world.client.run("conntrack", &["-F"]);
            assert!(out.ok(), "{}", out.stderr);
        })
    }),
    row(SIDE, "peer pre-seeds ct, app SYN = reply dir", Refused, client_asks, seeded),
    row(SIDE, "clean stop (open), captured flow goes on", Refused, client_asks, clean_stop),
    row(SIDE, "route layer alone: bound device", Open, client_asks, |lab| {
        route_layer(lab, |lab, app| {
            let how = Connect { device: Some("c0".into()), ..Connect::default() };
            lab.each(|family| lab.exchange_from(app, &lab.addr(family).to_string(), &how))
        })
    })
    .but(Safe, Open),
    row(SIDE, "route layer alone: link-local scope", Open, client_asks_link_local, route_layer_link_local)
        .but(Absent, Open),
    row(SIDE, "route layer alone: local route deleted", Closed, client_asks, |lab| {
        route_layer(lab, |lab, app| {
            local_route(lab);
            lab.each(|family| lab.exchange_from(app, &lab.addr(family).to_string(), &Connect::default()))
        })
    }),
];

/// A plain flow of before; then the rules come and it goes on.
fn old_flow(lab: &Lab, before: fn(&Lab)) -> Outcome {
    before(lab);
    let flows = lab.each(|family| lab.flow(family));
    let _tng = lab.start();
    lab.each(|family| lab.say(flows[family as usize])).into()
}

/// A firewall that tracks connections, as on any host with docker.
fn conntrack_active(lab: &Lab) {
    lab.world.client.chain("type filter hook output priority 0", &["ct state new,established counter"]);
    lab.world.client.chain("type filter hook input priority 0", &["ct state new,established counter"]);
}

fn capture_before_guard(lab: &Lab) -> Outcome {
    conntrack_active(lab);
    let flows = lab.each(|family| lab.flow(family));
    let parts = Parts::new(&lab.world.client, "in", &ingress(TO_SERVER));
    parts.net_up();
    let without_guard = lab.each(|family| lab.say(flows[family as usize]));
    let closed = without_guard.iter().all(|s| s.plaintext.is_none() && s.fate != Fate::Delivered);
    assert!(closed, "the capture table alone ends the flow: {without_guard:?}");
    let _guard = parts.guard();
    lab.each(|family| lab.say(flows[family as usize])).into()
}

fn guard_before_capture(lab: &Lab) -> Outcome {
    let flows = lab.each(|family| lab.flow(family));
    let parts = Parts::new(&lab.world.client, "in", &ingress(TO_SERVER));
    let _guard = parts.guard();
    let with_guard = lab.each(|family| lab.say(flows[family as usize]));
    let closed = with_guard.iter().all(|s| s.plaintext.is_none() && s.fate != Fate::Delivered);
    assert!(closed, "the guard alone ends the flow: {with_guard:?}");
    parts.net_up();
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// Rules and guard without a data plane; `decoy`: a local service that must not get the data.
fn listener_absent(lab: &Lab, decoy: bool) -> Outcome {
    let parts = Parts::new(&lab.world.client, "in", &ingress(TO_SERVER));
    if decoy {
        for any in ["0.0.0.0", "::"] {
            lab.client.listen(any.parse().expect("address"), PORT, json!({}));
        }
    }
    let _guard = parts.guard();
    parts.net_up();
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

fn data_plane_killed(lab: &Lab) -> Outcome {
    let (ingress, _egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    ingress.freeze_guard();
    ingress.kill_data_plane();
    let live = lab.each(|family| lab.say(flows[family as usize]));
    assert!(live.iter().all(|s| s.plaintext.is_none() && s.fate != Fate::Delivered), "live flows end: {live:?}");
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// kill -9 of every process at once: what remains in the kernel refuses, and the next start works.
fn everything_killed(lab: &Lab) -> Outcome {
    let (mut first, _egress) = lab.start();
    first.kill();
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    drop(first);
    let _again = Tng::start(&lab.world.client, "in", &ingress(TO_SERVER));
    let back = lab.each(|family| lab.exchange(family, &Connect::default()));
    let works = back.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none());
    assert!(works, "the next start takes over what was left: {back:?}");
    seen.into()
}

fn guard_killed(lab: &Lab) -> Outcome {
    let _egress = lab.start_egress();
    let parts = Parts::new(&lab.world.client, "in", &ingress(TO_SERVER));
    let guard = parts.guard();
    parts.net_up();
    let _serve = parts.serve();
    super::netns::kill_family(&guard);
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// A fault, with the watchers stopped so that what is judged is the rules alone; then a new flow.
fn new_after(lab: &Lab, fault: fn(&Lab)) -> Outcome {
    let (ingress, _egress) = lab.start();
    ingress.freeze_guard();
    fault(lab);
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// The same with a flow that was tunnelled before.
fn live_after(lab: &Lab, fault: fn(&Lab)) -> Outcome {
    let (ingress, _egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    ingress.freeze_guard();
    fault(lab);
    lab.each(|family| lab.say(flows[family as usize])).into()
}

fn flush(lab: &Lab) {
    let out = lab.world.client.run("nft", &["flush", "ruleset"]);
    assert!(out.ok(), "a stranger's flush succeeds, it just does not reach the guard: {}", out.stderr);
}

fn rule(lab: &Lab) {
    lab.delete_rule(&lab.world.client);
}

fn local_route(lab: &Lab) {
    lab.world.client.sh("ip -4 route del local default table 565; ip -6 route del local default table 565");
}

fn tfo_without_rule(lab: &Lab) -> Outcome {
    let (ingress, _egress) = lab.start();
    ingress.freeze_guard();
    rule(lab);
    lab.each(|family| fast_open(lab, &lab.client, family)).into()
}

/// Other software's rule, loaded after ours.
fn with_chain(lab: &Lab, hook: &str, priority: &str, rule: &str) -> Outcome {
    let _tng = lab.start();
    lab.world.client.chain(&format!("{hook} {priority}"), &[rule]);
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// A stranger's SYN from the captured address opens a conntrack entry the other way round, so the
/// application's own SYN counts as a reply.
fn seeded(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    // The client's own RST would close the entry again.
    lab.world.client.chain("type filter hook output priority raw", &["tcp sport 5555 tcp flags & rst == rst drop"]);
    lab.each(|family| {
        let forged = json!({"do": "raw", "src": lab.addr(family), "dst": lab.world.client.addr(family),
                            "sport": PORT, "dport": 5555, "flags": 2, "ack": 0});
        lab.router.ask(forged).expect("raw segment");
        let option = if family == Family::V4 { "ipv4" } else { "ipv6" };
        wait_for("the seed is tracked", Duration::from_secs(2), || {
            lab.world.client.run("conntrack", &["-L", "-f", option]).stdout.contains("dport=5555")
        });
        lab.exchange(family, &Connect { from_port: 5555, ..Connect::default() })
    })
    .into()
}

/// The operator opens the path. A flow that was captured must not go on over it.
fn clean_stop(lab: &Lab) -> Outcome {
    let (ingress, _egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    assert!(ingress.stop().success(), "a clean stop exits with 0");
    lab.each(|family| lab.say(flows[family as usize])).into()
}

/// Only the ip rule and its routes are left between the application and the wire.
fn route_layer(lab: &Lab, traffic: fn(&Lab, &App) -> [Seen; 2]) -> Outcome {
    let _egress = lab.start_egress();
    let parts = Parts::new(&lab.world.client, "in", &ingress(TO_SERVER));
    parts.net_up();
    without_postrouting(lab);
    traffic(lab, &lab.client).into()
}

/// The same for a destination whose scope names the device: the scope binds the socket to it.
fn route_layer_link_local(lab: &Lab) -> Outcome {
    let parts = Parts::new(&lab.world.client, "in", &ingress("{ port = 8080 }"));
    parts.net_up();
    without_postrouting(lab);
    Outcome([None, Some(client_asks_link_local(lab, Family::V6))])
}

/// Empties the chain that drops marked packets on a wire.
fn without_postrouting(lab: &Lab) {
    lab.world.client.sh("nft flush chain inet tng_in protect_postrouting");
}
