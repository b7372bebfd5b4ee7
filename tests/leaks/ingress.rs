//! Ingress rows: what leaves a host that captures, when nothing was broken on purpose.

use serde_json::json;

use super::controls::*;
use super::lab::{INGRESS_MARK, Lab, PORT, TO_SERVER, egress, fate_of, ingress};
use super::netns::{Connect, Family, Tng, fresh_hex};
use super::table::{Expect::*, Fate, Outcome, Row, Seen, row};

const SIDE: &str = "ingress";

/// The rows.
pub const ROWS: &[Row] = &[
    row(SIDE, "tunnel ok", Tunnelled, client_asks, |lab| asked(lab, Connect::default())),
    row(SIDE, "SO_BINDTODEVICE c0 (as uid 65534)", Refused, client_asks, bound_device),
    row(SIDE, "SO_DONTROUTE", Safe, client_asks, |lab| asked(lab, Connect { dontroute: true, ..Connect::default() })),
    row(SIDE, "captured by uid: that user", Tunnelled, client_asks, |lab| captured_by_uid(lab, 65534, |_| ())),
    row(SIDE, "captured by uid: that user, ruleset flushed", Refused, client_asks, |lab| {
        captured_by_uid(lab, 65534, |lab| drop(lab.world.client.sh("nft flush ruleset")))
    }),
    row(SIDE, "captured by uid: another user", Open, client_asks, |lab| captured_by_uid(lab, 1, |_| ())),
    row(SIDE, "excluded from the capture", Open, client_asks, excluded),
    row(SIDE, "v6 link-local %scope (set has fe80::/10)", Closed, client_asks_link_local, link_local)
        .but(Absent, Closed),
    row(SIDE, "v4-mapped v6 socket", Tunnelled, client_asks, v4_mapped).but(Tunnelled, Absent),
    row(SIDE, "uid 0 CAP_NET_RAW SO_MARK 565", Refused, client_asks, foreign_own_mark),
    row(SIDE, "app sets CAP mark itself", Safe, client_asks, |lab| marked(lab, 0x0601)),
    row(SIDE, "kube mark 0x4000 on app socket", Tunnelled, client_asks, |lab| marked(lab, 0x4000)),
    row(SIDE, "tailscale mark 0x80000 on app socket", Tunnelled, client_asks, |lab| marked(lab, 0x80000)),
    row(SIDE, "the other own mark (egress's) on app socket", Tunnelled, client_asks, |lab| marked(lab, 565)),
    row(SIDE, "own address, in set", Safe, client_asks, own_address),
    row(SIDE, "VIP (not in set) DNATed into set", Refused, client_asks, vip),
    row(SIDE, "forwarded from container", Refused, sidecar_asks, |lab| from_sidecar(lab, Connect::default())),
    row(SIDE, "forwarded, container NET_RAW SO_MARK 565", Refused, sidecar_asks, |lab| {
        from_sidecar(lab, Connect { mark: Some(INGRESS_MARK), ..Connect::default() })
    }),
    row(SIDE, "container via DNAT to captured dst", Refused, sidecar_asks, sidecar_dnat),
    row(SIDE, "UDP same addr:port", Refused, client_sends_udp, udp),
    row(SIDE, "SCTP same addr:port", Refused, client_asks_sctp, sctp).needing("CONFIG_IP_SCTP"),
    row(SIDE, "TFO, listener up", Tunnelled, client_asks_fast, tfo),
    row(SIDE, "MPTCP client, listener TCP", Tunnelled, client_asks_mptcp, mptcp).needing("CONFIG_MPTCP"),
    row(SIDE, "old MPTCP flow, set = primary addr only", Open, client_asks_mptcp, old_mptcp_flow)
        .but(Open, Absent)
        .needing("CONFIG_MPTCP"),
    row(SIDE, "raw IP_HDRINCL TCP segment (NET_RAW)", Safe, client_sends_raw, |lab| raw_segment(lab, json!({}))),
    row(SIDE, "raw fragments, IP_NODEFRAG (NET_RAW)", Open, client_sends_raw, |lab| {
        raw_segment(lab, json!({"frag": 64, "nodefrag": true}))
    })
    .but(Open, Safe),
    row(SIDE, "AF_PACKET (NET_RAW)", Open, client_sends_raw, af_packet),
    row(SIDE, "direct connect to the listener", Refused, client_asks, direct_to_listener),
    row(SIDE, "tcp_syncookies=2", Tunnelled, client_asks, syncookies),
    row(SIDE, "two instances, :8080", Tunnelled, client_asks, |lab| two_instances(lab, PORT)),
    row(SIDE, "two instances, :9090", Tunnelled, client_asks, |lab| two_instances(lab, 9090)),
    row(SIDE, "two instances, overlapping", Tunnelled, client_asks, overlapping_instances),
    row(SIDE, "120 kB then close at once (orphans)", Tunnelled, client_asks, orphans),
];

/// With the usual pair running, the client asks.
fn asked(lab: &Lab, how: Connect) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| lab.exchange(family, &how)).into()
}

fn marked(lab: &Lab, mark: u32) -> Outcome {
    asked(lab, Connect { mark: Some(mark), ..Connect::default() })
}

fn bound_device(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    let nobody = lab.world.client.app_as(65534);
    // The first SYN is dropped, and the one that is sent again after a second is refused: longer than QUIET.
    let how = json!({"do": "connect", "port": PORT, "device": "c0", "timeout": 10});
    lab.each(|family| {
        let hex = fresh_hex();
        let mut how = how.clone();
        how["addr"] = lab.addr(family).to_string().into();
        let fate = match nobody.ask(how) {
            Err(fault) => fate_of(&fault),
            Ok(answer) => super::lab::ask(&nobody, answer["h"].as_u64().expect("handle"), &hex),
        };
        Seen { fate, plaintext: lab.on_wire(&hex) }
    })
    .into()
}

/// One user's traffic is captured; the guard must know the qualifier too, or it refuses others'.
fn captured_by_uid(lab: &Lab, uid: u32, fault: fn(&Lab)) -> Outcome {
    let (tng, egress) = lab.start_with(&ingress(&TO_SERVER.replace(" }", ", uid = 65534 }")), &self::egress(""));
    let app = lab.world.client.app_as(uid);
    if uid != 65534 {
        // Its plaintext would be turned away by the egress: this row is about the client's host.
        egress.stop();
    }
    tng.freeze_guard();
    fault(lab);
    lab.each(|family| lab.exchange_from(&app, &lab.addr(family).to_string(), &Connect::default())).into()
}

/// What the operator excludes goes the direct way, as without tng.
fn excluded(lab: &Lab) -> Outcome {
    let text = ingress(TO_SERVER);
    let exclude = format!("exclude = [{TO_SERVER}]\n[ingress.verify]");
    let wide = text.replace("203.0.113.0/24", "203.0.0.0/16").replace("2001:db8:2::/64", "2001:db8::/32");
    let _tng = Tng::start(&lab.world.client, "in", &wide.replace("[ingress.verify]", &exclude));
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

fn link_local(lab: &Lab) -> Outcome {
    let _tng = lab.start_with(&ingress("{ port = 8080 }"), &egress(""));
    let addr = lab.link_local(&lab.world.router, "r0");
    let how = Connect { scope: Some("c0".into()), ..Connect::default() };
    Outcome([None, Some(lab.exchange_from(&lab.client, &addr, &how))])
}

fn v4_mapped(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    let addr = format!("::ffff:{}", lab.addr(Family::V4));
    Outcome([Some(lab.exchange_from(&lab.client, &addr, &Connect::default())), None])
}

/// The data plane runs as another user, so root with its mark is not the data plane.
fn foreign_own_mark(lab: &Lab) -> Outcome {
    let ingress = Tng::spawn(&lab.world.client, "in", &ingress(TO_SERVER), &["--user", "daemon"]);
    super::netns::wait_for("ready", std::time::Duration::from_secs(15), || ingress.is_ready());
    let _egress = lab.start_egress();
    let own = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(own.iter().all(|s| s.fate == Fate::Delivered), "the tunnel itself works: {own:?}");
    let how = Connect { mark: Some(INGRESS_MARK), ..Connect::default() };
    lab.each(|family| lab.exchange(family, &how)).into()
}

fn own_address(lab: &Lab) -> Outcome {
    let capture =
        format!(r#"{TO_SERVER}, {{ to = "198.51.100.0/24", port = 8080 }}, {{ to = "2001:db8:1::/64", port = 8080 }}"#);
    let _tng = lab.start_with(&ingress(&capture), &egress(""));
    lab.each(|family| {
        let own = lab.world.client.addr(family);
        lab.client.listen(own, PORT, json!({}));
        lab.exchange_from(&lab.client, &own.to_string(), &Connect::default())
    })
    .into()
}

fn vip(lab: &Lab) -> Outcome {
    lab.world.client.chain(
        "type nat hook output priority -100",
        &["ip daddr 192.0.2.200 dnat ip to 203.0.113.2", "ip6 daddr 2001:db8:9::1 dnat ip6 to 2001:db8:2::2"],
    );
    let ask = |family| {
        let vip = if family == Family::V4 { "192.0.2.200" } else { "2001:db8:9::1" };
        lab.exchange_from(&lab.client, vip, &Connect::default())
    };
    let before = lab.each(ask);
    assert!(before.iter().all(|s| s.plaintext.is_some()), "the VIP works in plaintext before tng: {before:?}");
    let _tng = lab.start();
    lab.each(ask).into()
}

fn from_sidecar(lab: &Lab, how: Connect) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| lab.exchange_from(lab.sidecar(), &lab.addr(family).to_string(), &how)).into()
}

fn sidecar_dnat(lab: &Lab) -> Outcome {
    lab.world.client.chain(
        "type nat hook prerouting priority -100",
        &[
            "iif cb0 meta nfproto ipv4 tcp dport 8088 dnat ip to 203.0.113.2:8080",
            "iif cb0 meta nfproto ipv6 tcp dport 8088 dnat ip6 to [2001:db8:2::2]:8080",
        ],
    );
    let ask = |family| {
        let how = Connect { port: 8088, ..Connect::default() };
        lab.exchange_from(lab.sidecar(), &lab.world.client.addr(family).to_string(), &how)
    };
    let before = lab.each(ask);
    assert!(before.iter().all(|s| s.plaintext.is_some()), "the DNAT works in plaintext before tng: {before:?}");
    let _tng = lab.start();
    lab.each(ask).into()
}

fn udp(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| lab.datagram(&lab.client, &lab.addr(family).to_string())).into()
}

fn sctp(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| client_asks_sctp(lab, family)).into()
}

fn tfo(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| fast_open(lab, &lab.client, family)).into()
}

fn mptcp(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| client_asks_mptcp(lab, family)).into()
}

/// An MPTCP connection with a second subflow to an address that no capture names.
fn old_mptcp_flow(lab: &Lab) -> Outcome {
    lab.world.server.sh("ip addr add 203.0.113.3/24 dev s0; ip mptcp limits set add_addr_accepted 2 subflows 2
         ip mptcp endpoint add 203.0.113.3 dev s0 signal");
    lab.world.client.sh("ip mptcp limits set add_addr_accepted 2 subflows 2");
    lab.server.listen("0.0.0.0".parse().expect("address"), 8081, json!({"mptcp": true}));
    let how = Connect { port: 8081, mptcp: true, ..Connect::default() };
    let conn = lab.client.connect("203.0.113.2", &how).expect("MPTCP connection");
    assert_eq!(super::lab::ask(&lab.client, conn, &fresh_hex()), Fate::Delivered);
    super::netns::wait_for("the second subflow", std::time::Duration::from_secs(3), || {
        lab.world.client.sh("ss -tn state established").contains("203.0.113.3")
    });
    let capture = r#"{ to = "203.0.113.2/32", port = 8081 }"#;
    let _tng = Tng::start(&lab.world.client, "in", &ingress(capture));
    let hex = fresh_hex();
    // Whether or not the stack survives the refused subflow: what counts is what leaves.
    let fate = super::lab::ask(&lab.client, conn, &hex);
    Outcome([Some(Seen { fate, plaintext: lab.on_wire(&hex) }), None])
}

fn raw_segment(lab: &Lab, more: serde_json::Value) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| raw(lab, family, more.clone())).into()
}

fn af_packet(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    let link = lab.world.router.sh("ip -o link show r0");
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).expect("MAC address");
    let how = json!({"packet": true, "device": "c0", "mac": mac});
    lab.each(|family| raw(lab, family, how.clone())).into()
}

/// The listener's port as the loaded rules name it.
fn direct_to_listener(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    let rules = lab.world.client.sh("nft list table inet tng_in");
    let port = rules
        .split_whitespace()
        .find_map(|word| word.strip_prefix("127.0.0.1:")?.parse().ok())
        .unwrap_or_else(|| panic!("no tproxy to 127.0.0.1 in\n{rules}"));
    lab.each(|family| {
        let addr = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        lab.exchange_from(&lab.client, addr, &Connect { port, ..Connect::default() })
    })
    .into()
}

fn syncookies(lab: &Lab) -> Outcome {
    for host in [&lab.world.client, &lab.world.server] {
        host.sysctl(&[("net/ipv4/tcp_syncookies", "2")]);
    }
    asked(lab, Connect::default())
}

/// Two ingress instances and one egress for two ports; then the other instance's data plane is
/// killed, and `port`'s traffic must not care.
fn two_instances(lab: &Lab, port: u16) -> Outcome {
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), 9090, json!({}));
    }
    let other_port = if port == PORT { 9090 } else { PORT };
    let capture = |port| ingress(&TO_SERVER.replace("8080", &format!("{port}")));
    let ports = egress("").replace("{ port = 8080 }", "{ port = 8080 }, { port = 9090 }");
    let _mine = lab.start_with(&capture(port), &ports);
    let other = Tng::start(&lab.world.client, "second", &capture(other_port));
    let ask = |port| lab.each(|family| lab.exchange(family, &Connect { port, ..Connect::default() }));
    let both = [ask(port), ask(other_port)].concat();
    assert!(both.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none()), "both are tunnelled: {both:?}");
    other.kill_data_plane();
    let dead = ask(other_port);
    let closed = dead.iter().all(|s| s.fate != Fate::Delivered && s.plaintext.is_none());
    assert!(closed, "the first instance must not take over the second's traffic: {dead:?}");
    ask(port).into()
}

/// A second instance with the same capture: it may refuse to start, the first must go on.
fn overlapping_instances(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    let mut second = Tng::spawn(&lab.world.client, "second", &ingress(TO_SERVER), &[]);
    super::netns::wait_for("the second instance is refused", std::time::Duration::from_secs(10), || {
        second.exited().is_some()
    });
    assert!(!second.exited().expect("ended").success(), "an overlap is an error:\n{}", second.output());
    lab.each(|family| lab.exchange(family, &Connect::default())).into()
}

/// The last bytes of an application that closed long before they left: sockets without an owner.
fn orphans(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| {
        let hex = fresh_hex();
        let how = Connect { port: PORT, ..Connect::default() };
        let conn = lab.client.connect(&lab.addr(family).to_string(), &how).expect("connect");
        let text = format!("{}TNGQ{hex}\n", ".".repeat(120_000));
        let sent = lab.client.ask(json!({"do": "send", "h": conn, "data": text, "close": true}));
        let arrived = || lab.server.received(&hex).is_some();
        let fate = match sent {
            Err(fault) => fate_of(&fault),
            Ok(_) if super::netns::wait_until(super::lab::QUIET * 3, arrived) => Fate::Delivered,
            Ok(_) => Fate::Dropped,
        };
        Seen { fate, plaintext: lab.on_wire(&hex) }
    })
    .into()
}
