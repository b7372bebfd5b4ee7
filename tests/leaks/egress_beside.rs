//! Egress rows beside other software: its NAT, its marks, its say in connection tracking.

use super::controls::*;
use super::egress::{NO_SPOOF, asked};
use super::lab::{Lab, TO_SERVER, egress, ingress};
use super::netns::Connect;
use super::table::{Expect::*, Outcome, Row, row};

const SIDE: &str = "egress";
const MANGLE_BEFORE: &str = "priority -160";
const MANGLE_AFTER: &str = "priority -140";

/// The rows.
pub const ROWS: &[Row] = &[
    row(SIDE, "docker -p DNAT (docker first) spoof=True plain", Closed, outsider_asks, |lab| {
        docker(lab, true, "", false)
    }),
    row(SIDE, "docker -p DNAT (docker first) spoof=True tunnel", Safe, client_asks, |lab| docker(lab, true, "", true)),
    row(SIDE, "docker -p DNAT (docker last) spoof=True plain", Closed, outsider_asks, |lab| {
        docker(lab, false, "", false)
    }),
    row(SIDE, "docker -p DNAT (docker last) spoof=True tunnel", Safe, client_asks, |lab| docker(lab, false, "", true)),
    row(SIDE, "docker -p DNAT (docker first) spoof=False plain", Closed, outsider_asks, |lab| {
        docker(lab, true, NO_SPOOF, false)
    }),
    row(SIDE, "docker -p DNAT (docker first) spoof=False tunnel", Tunnelled, client_asks, |lab| {
        docker(lab, true, NO_SPOOF, true)
    }),
    row(SIDE, "docker -p DNAT (docker last) spoof=False plain", Closed, outsider_asks, |lab| {
        docker(lab, false, NO_SPOOF, false)
    }),
    row(SIDE, "docker -p DNAT (docker last) spoof=False tunnel", Tunnelled, client_asks, |lab| {
        docker(lab, false, NO_SPOOF, true)
    }),
    row(SIDE, "REDIRECT 80 -> captured 8080, plain", Refused, outsider_asks, redirect),
    row(SIDE, "other sw: mark cleared after tproxy, tunnel", Tunnelled, client_asks, |lab| mark_cleared(lab, true)),
    row(SIDE, "other sw: mark cleared after tproxy, plain", Closed, outsider_asks, |lab| mark_cleared(lab, false)),
    row(SIDE, "other sw: or 0x4000 after tproxy, tunnel", Tunnelled, client_asks, |lab| kube_mark(lab, true)),
    row(SIDE, "other sw: or 0x4000 after tproxy, plain", Closed, outsider_asks, |lab| kube_mark(lab, false)),
    row(SIDE, "other sw: CONNMARK save/restore, tunnel", Tunnelled, client_asks, |lab| connmark(lab, true)),
    row(SIDE, "other sw: CONNMARK save/restore, plain", Closed, outsider_asks, |lab| connmark(lab, false)),
    row(SIDE, "notrack both ways, spoofed tunnel", Tunnelled, client_asks, |lab| notrack(lab, true)),
    row(SIDE, "notrack both ways, plain client", Closed, outsider_asks, |lab| notrack(lab, false)),
];

/// The NAT of `docker run -p 8080:8080`.
pub fn docker_nat(lab: &Lab) {
    lab.backend();
    let dnat = [
        "fib daddr type local meta nfproto ipv4 tcp dport 8080 dnat ip to 192.0.2.18",
        "fib daddr type local meta nfproto ipv6 tcp dport 8080 dnat ip6 to 2001:db8:4::2",
    ];
    lab.world.server.chain("type nat hook prerouting priority -100", &dnat);
    lab.world.server.chain("type nat hook output priority -100", &dnat);
}

fn docker(lab: &Lab, docker_first: bool, more: &str, tunnel: bool) -> Outcome {
    // The service is the container's: nothing on the host itself may answer in its place.
    for listener in lab.service {
        lab.server.close(listener);
    }
    if docker_first {
        docker_nat(lab);
        let before = lab.each(|family| lab.plain(family));
        assert!(before.iter().all(|s| s.plaintext.is_some()), "docker's NAT works before tng: {before:?}");
    }
    let _tng = lab.start_with(&ingress(TO_SERVER), &egress(more));
    if !docker_first {
        docker_nat(lab);
    }
    asked(lab, tunnel)
}

fn redirect(lab: &Lab) -> Outcome {
    lab.world.server.chain("type nat hook prerouting priority -100", &["tcp dport 80 redirect to :8080"]);
    let how = Connect { port: 80, ..Connect::default() };
    let ask = |family| lab.plain_to(&lab.addr(family).to_string(), &how);
    let before = lab.each(ask);
    assert!(before.iter().all(|s| s.plaintext.is_some()), "the redirection works before tng: {before:?}");
    let _tng = lab.start_egress();
    lab.each(ask).into()
}

fn mark_cleared(lab: &Lab, tunnel: bool) -> Outcome {
    let _tng = lab.start();
    let hook = format!("type filter hook prerouting {MANGLE_AFTER}");
    lab.world.server.chain(&hook, &["iif s0 tcp dport 8080 meta mark set 0"]);
    asked(lab, tunnel)
}

fn kube_mark(lab: &Lab, tunnel: bool) -> Outcome {
    let _tng = lab.start();
    let hook = format!("type filter hook prerouting {MANGLE_AFTER}");
    lab.world.server.chain(&hook, &["iif s0 tcp dport 8080 meta mark set meta mark | 0x4000"]);
    asked(lab, tunnel)
}

/// Software that keeps bits of its own in the connection's mark, and leaves others' alone.
fn connmark(lab: &Lab, tunnel: bool) -> Outcome {
    let _tng = lab.start();
    let server = &lab.world.server;
    server.chain(
        &format!("type filter hook prerouting {MANGLE_AFTER}"),
        &["ct mark & 0x00ff0000 == 0x00110000 meta mark set meta mark & 0xff00ffff | 0x00110000"],
    );
    server
        .chain(&format!("type filter hook output {MANGLE_BEFORE}"), &["ct mark set ct mark & 0xff00ffff | 0x00110000"]);
    server
        .chain(&format!("type filter hook input {MANGLE_BEFORE}"), &["ct mark set ct mark & 0xff00ffff | 0x00110000"]);
    asked(lab, tunnel)
}

fn notrack(lab: &Lab, tunnel: bool) -> Outcome {
    let _tng = lab.start();
    let rules = ["tcp dport 8080 notrack", "tcp sport 8080 notrack"];
    lab.world.server.chain("type filter hook prerouting priority raw", &rules);
    lab.world.server.chain("type filter hook output priority raw", &rules);
    asked(lab, tunnel)
}
