//! Egress rows: old flows, rules taken away, parts missing, conntrack that forgets.

use std::time::Duration;

use serde_json::json;

use super::controls::*;
use super::egress_beside::docker_nat;
use super::lab::{Flow, Lab, PORT, QUIET, TO_SERVER, egress, ingress};
use super::netns::{Connect, Family, Parts, Tng, fresh_hex, kill_family};
use super::table::{Expect::*, Fate, Outcome, Row, Seen, row};

const SIDE: &str = "egress";

/// The rows.
pub const ROWS: &[Row] = &[
    row(SIDE, "old plain flow, service pushes", Closed, service_pushes, |lab| old_plain_flow(lab, Step::Push)),
    row(SIDE, "old plain flow, client sends", Refused, outsider_asks, |lab| old_plain_flow(lab, Step::Send)),
    row(SIDE, "old plain flow, service pushes again", Closed, service_pushes, |lab| {
        old_plain_flow(lab, Step::PushAgain)
    }),
    row(SIDE, "listener absent, plain client", Refused, outsider_asks, |lab| {
        listener_absent(lab, |lab, f| lab.plain(f))
    }),
    row(SIDE, "listener absent, TFO", Refused, client_asks_fast, |lab| listener_absent(lab, plain_fast_open)),
    row(SIDE, "fragmented SYN (8 byte fragments), no listener", Closed, outsider_asks, fragmented_syn),
    row(SIDE, "data plane killed, plain client", Closed, outsider_asks, data_plane_killed),
    row(SIDE, "everything killed, plain client", Closed, outsider_asks, everything_killed),
    row(SIDE, "flush ruleset, new plain client", Refused, outsider_asks, |lab| plain_after(lab, flush)),
    row(SIDE, "flush ruleset, live spoofed flow, svc pushes", Safe, service_pushes, |lab| push_after(lab, flush)),
    row(SIDE, "flush ruleset, live tunnelled flow", Safe, client_asks, |lab| say_after(lab, flush)),
    row(SIDE, "v6 link-local, capture flushed", Closed, outsider_asks_link_local, link_local_flushed)
        .but(Absent, Closed),
    row(SIDE, "docker -p DNAT, capture table absent", Closed, outsider_asks, docker_without_capture),
    row(SIDE, "docker -p DNAT, flow older than the rules, container pushes", Closed, outsider_asks, docker_old_flow),
    row(SIDE, "guard killed, tunnel", Tunnelled, client_asks, |lab| guard_killed(lab, true)),
    row(SIDE, "guard killed, plain client", Closed, outsider_asks, |lab| guard_killed(lab, false)),
    row(SIDE, "ip rule deleted, live spoofed flow", Safe, service_pushes, |lab| push_after(lab, rule)),
    row(SIDE, "ip rule deleted, new tunnel", Safe, client_asks, |lab| {
        let (_ingress, egress) = lab.start();
        egress.freeze_guard();
        rule(lab);
        lab.each(|family| lab.exchange(family, &Connect::default())).into()
    }),
    row(SIDE, "conntrack -F (= ct timeout), service pushes", Tunnelled, service_pushes, |lab| push_after(lab, forget)),
    row(SIDE, "half-closed, ct FIN timeout over, svc sends", Tunnelled, service_pushes, half_closed),
    row(SIDE, "clean stop (open), service goes on sending", Closed, service_pushes, clean_stop),
];

/// What happens on a plain flow of before the rules.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Push,
    Send,
    PushAgain,
}

fn old_plain_flow(lab: &Lab, step: Step) -> Outcome {
    let flows = lab.each(|family| lab.flow_from(&lab.router, &lab.addr(family).to_string()));
    let _tng = lab.start_egress();
    lab.each(|family| {
        let flow = flows[family as usize];
        if step == Step::Push {
            return lab.push(flow);
        }
        let sent = lab.say_plain(flow);
        if step == Step::Send {
            return sent;
        }
        assert!(sent.plaintext.is_none(), "what the client sent: {sent:?}");
        lab.push(flow)
    })
    .into()
}

fn listener_absent(lab: &Lab, traffic: fn(&Lab, Family) -> Seen) -> Outcome {
    let parts = Parts::new(&lab.world.server, "out", &egress(""));
    let _guard = parts.guard();
    parts.net_up();
    lab.each(|family| traffic(lab, family)).into()
}

/// A plain client's request within its SYN.
fn plain_fast_open(lab: &Lab, family: Family) -> Seen {
    let hex = fresh_hex();
    let tfo = Some(format!("TNGQ{hex}\n"));
    let how = Connect { port: PORT, tfo, ..Connect::default() };
    let fate = match lab.router.connect(&lab.addr(family).to_string(), &how) {
        Err(fault) => super::lab::fate_of(&fault),
        Ok(conn) => match lab.router.recv(conn, &format!("TNGA{hex}"), QUIET) {
            Ok(_) => Fate::Delivered,
            Err(fault) => super::lab::fate_of(&fault),
        },
    };
    let plaintext = lab.server.received(&hex).map(|_| "request reached the service".to_owned());
    Seen { fate, plaintext }
}

/// A SYN in fragments, on IPv4 too small to hold the flags. (On IPv6 the kernel drops a first
/// fragment without the whole TCP header, RFC 7112, so there the second one holds only data.) The service must not answer it: a rule
/// on the server counts its SYN-ACKs.
fn fragmented_syn(lab: &Lab) -> Outcome {
    let server = &lab.world.server;
    server.nft(
        "table inet watch {\ncounter synack { }\nchain c {\ntype filter hook output priority 300;
         tcp sport 8080 tcp flags & (syn | ack) == (syn | ack) counter name synack\n}\n}\n",
    );
    let answers = || {
        let text = server.sh("nft list counter inet watch synack");
        let mut words = text.split_whitespace().skip_while(|w| *w != "packets");
        words.nth(1).and_then(|n| n.parse::<u64>().ok()).expect("counter")
    };
    let send = |family: Family, sport: u16| {
        let forged = json!({"do": "raw", "src": lab.world.router.addr(family), "dst": lab.addr(family),
                            "sport": sport, "dport": PORT, "flags": 2, "ack": 0, "nodefrag": true,
                            "frag": if family == Family::V4 { 8 } else { 24 }, "data": ".".repeat(28)});
        lab.router.ask(forged).expect("raw segment");
    };
    for (n, family) in (1..).zip(Family::BOTH) {
        send(family, 6000);
        super::netns::wait_for("the service answers before tng", Duration::from_secs(2), || answers() >= n);
    }
    let parts = Parts::new(server, "out", &egress(""));
    let _guard = parts.guard();
    parts.net_up();
    Outcome(Family::BOTH.map(|family| {
        let before = answers();
        send(family, 6001);
        let answered = super::netns::wait_until(QUIET, || answers() > before);
        let plaintext = answered.then(|| "the service answered the SYN".to_owned());
        Some(Seen { fate: Fate::Dropped, plaintext })
    }))
}

fn data_plane_killed(lab: &Lab) -> Outcome {
    let egress = lab.start_egress();
    egress.freeze_guard();
    egress.kill_data_plane();
    lab.each(|family| lab.plain(family)).into()
}

fn everything_killed(lab: &Lab) -> Outcome {
    let mut egress = lab.start_egress();
    egress.kill();
    lab.each(|family| lab.plain(family)).into()
}

fn flush(lab: &Lab) {
    lab.world.server.sh("nft flush ruleset");
}

fn rule(lab: &Lab) {
    lab.delete_rule(&lab.world.server);
}

fn forget(lab: &Lab) {
    let out = lab.world.server.run("conntrack", &["-F"]);
    assert!(out.ok(), "{}", out.stderr);
}

/// A fault while the watchers are stopped, then a plain client.
fn plain_after(lab: &Lab, fault: fn(&Lab)) -> Outcome {
    let egress = lab.start_egress();
    egress.freeze_guard();
    fault(lab);
    lab.each(|family| lab.plain(family)).into()
}

/// A tunnelled flow with the client's address towards the service, a fault, then the service pushes.
fn push_after(lab: &Lab, fault: fn(&Lab)) -> Outcome {
    let (_ingress, egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    egress.freeze_guard();
    fault(lab);
    lab.each(|family| lab.push(flows[family as usize])).into()
}

/// The same, then the client asks.
fn say_after(lab: &Lab, fault: fn(&Lab)) -> Outcome {
    let (_ingress, egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    egress.freeze_guard();
    fault(lab);
    lab.each(|family| lab.say(flows[family as usize])).into()
}

fn link_local_flushed(lab: &Lab) -> Outcome {
    let egress = lab.start_egress();
    egress.freeze_guard();
    flush(lab);
    Outcome([None, Some(outsider_asks_link_local(lab, Family::V6))])
}

fn docker_without_capture(lab: &Lab) -> Outcome {
    docker_nat(lab);
    let before = lab.each(|family| lab.plain(family));
    assert!(before.iter().all(|s| s.plaintext.is_some()), "docker's NAT works before tng: {before:?}");
    let egress = Tng::start(&lab.world.server, "out", &egress("preserve_source = false"));
    egress.freeze_guard();
    lab.world.server.sh("nft delete table inet tng_out");
    lab.each(|family| lab.plain(family)).into()
}

/// A connection to the container from before the rules; the container sends of its own accord.
fn docker_old_flow(lab: &Lab) -> Outcome {
    docker_nat(lab);
    let flows = lab.each(|family| lab.flow_from(&lab.router, &lab.addr(family).to_string()));
    let _tng = Tng::start(&lab.world.server, "out", &egress("preserve_source = false"));
    lab.each(|family| lab.push_from(lab.backend(), flows[family as usize])).into()
}

fn guard_killed(lab: &Lab, tunnel: bool) -> Outcome {
    let _ingress = Tng::start(&lab.world.client, "in", &ingress(TO_SERVER));
    let parts = Parts::new(&lab.world.server, "out", &egress(""));
    let guard = parts.guard();
    parts.net_up();
    let _serve = parts.serve();
    kill_family(&guard);
    lab.each(|family| if tunnel { lab.exchange(family, &Connect::default()) } else { lab.plain(family) }).into()
}

/// The client has closed its direction long ago, conntrack has forgotten the flow, and only then
/// the service answers.
fn half_closed(lab: &Lab) -> Outcome {
    let timeouts = ["fin_wait", "close_wait", "last_ack", "time_wait", "close"]
        .map(|state| format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"));
    let (_ingress, _egress) = lab.start();
    let short: Vec<(&str, &str)> = timeouts.iter().map(|name| (name.as_str(), "1")).collect();
    lab.world.server.sysctl(&short);
    let flows = lab.each(|family| lab.flow(family));
    for Flow { app, conn, .. } in flows {
        app.ask(json!({"do": "shutdown", "h": conn})).expect("shutdown");
    }
    lab.wait_untracked(&lab.world.server, Duration::from_secs(10));
    lab.each(|family| lab.push(flows[family as usize])).into()
}

/// The egress is gone by the operator's will; its tunnelled clients must not meet the service.
fn clean_stop(lab: &Lab) -> Outcome {
    let (_ingress, egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    assert!(egress.stop().success(), "a clean stop exits with 0");
    lab.each(|family| lab.push(flows[family as usize])).into()
}
