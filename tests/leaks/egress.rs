//! Egress rows: what reaches or leaves a service behind an egress, when nothing was broken on
//! purpose: clients with and without a tunnel, and odd ones.

use serde_json::json;

use super::controls::*;
use super::lab::{Lab, PORT, QUIET, TO_SERVER, ask, egress, fate_of, ingress, ingress_mapping};
use super::netns::{Connect, Family, Tng, fresh_hex};
use super::table::{Expect::*, Fate, Outcome, Row, Seen, row};

const SIDE: &str = "egress";
/// The egress speaks to the service from its own address.
pub const NO_SPOOF: &str = "preserve_source = false";

/// The rows.
pub const ROWS: &[Row] = &[
    row(SIDE, "tunnel ok spoof=True", Tunnelled, client_asks, |lab| source_address(lab, true)),
    row(SIDE, "tunnel ok spoof=False", Tunnelled, client_asks, |lab| source_address(lab, false)),
    row(SIDE, "plain client -> proxy spoof=True", Refused, outsider_asks, |lab| plain(lab, "")),
    row(SIDE, "plain client -> proxy spoof=False", Refused, outsider_asks, |lab| plain(lab, NO_SPOOF)),
    row(SIDE, "plain local client (capture_local off)", Open, outsider_asks, |lab| local_client(lab, "")),
    row(SIDE, "plain local client (capture_local on)", Refused, outsider_asks, |lab| {
        local_client(lab, "capture_local_traffic = true")
    }),
    row(SIDE, "local client with a captured source port", Open, outsider_asks, local_client_with_our_port),
    row(SIDE, "UDP to a captured port", Refused, outsider_asks, udp),
    row(SIDE, "v6 link-local, plain on-link client", Closed, outsider_asks_link_local, link_local_plain)
        .but(Absent, Closed),
    row(SIDE, "v6 link-local, tunnelled client", Safe, outsider_asks_link_local, link_local_tunnel).but(Absent, Safe),
    row(SIDE, "segments injected on the plaintext tuple", Tunnelled, client_asks, injected),
    row(SIDE, "client port == spoofed upstream port", Tunnelled, client_asks, same_port),
    row(SIDE, "source ports of tunnel and upstream collide", Tunnelled, client_asks, forced_collision),
    row(SIDE, "route_localnet=1: wire -> 127.0.0.1:8080 plain", Closed, outsider_asks, route_localnet)
        .but(Closed, Absent),
    row(SIDE, "tcp_syncookies=2", Tunnelled, client_asks, |lab| syncookies(lab, true)),
    row(SIDE, "tcp_syncookies=2 plain", Refused, outsider_asks, |lab| syncookies(lab, false)),
    row(SIDE, "accept queue full, syncookies=0", Closed, outsider_asks, |lab| accept_queue(lab, "0")),
    row(SIDE, "accept queue full, syncookies=1", Closed, outsider_asks, |lab| accept_queue(lab, "1")),
    row(SIDE, "accept queue full, syncookies=2", Closed, outsider_asks, |lab| accept_queue(lab, "2")),
    row(SIDE, "MPTCP client, listener TCP", Refused, outsider_asks, |lab| {
        let _tng = lab.start_egress();
        let how = Connect { mptcp: true, ..Connect::default() };
        lab.each(|family| lab.plain_to(&lab.addr(family).to_string(), &how)).into()
    })
    .needing("CONFIG_MPTCP"),
    row(SIDE, "routed (not DNATed) container :8080", Open, backend_is_asked, |lab| {
        let _tng = lab.start_egress();
        lab.each(|family| backend_is_asked(lab, family)).into()
    }),
    row(SIDE, "AnyIP (local route) address, plain", Closed, outsider_asks, any_ip),
    row(SIDE, "ingress+egress, ingress last: outbound", Tunnelled, client_asks, |lab| both_on_a_host(lab, false, true)),
    row(SIDE, "ingress+egress, ingress last: inbound", Tunnelled, client_asks, |lab| both_on_a_host(lab, false, false)),
    row(SIDE, "ingress+egress, ingress first: outbound", Tunnelled, client_asks, |lab| both_on_a_host(lab, true, true)),
    row(SIDE, "ingress+egress, ingress first: inbound", Tunnelled, client_asks, |lab| both_on_a_host(lab, true, false)),
    row(SIDE, "ingress mapping -> egress, one host", Tunnelled, outsider_asks, single_host),
];

/// The client asks through the tunnel, or the outsider asks without one.
pub fn asked(lab: &Lab, tunnel: bool) -> Outcome {
    lab.each(|family| if tunnel { lab.exchange(family, &Connect::default()) } else { lab.plain(family) }).into()
}

/// A tunnelled request, and whose address the service saw.
fn source_address(lab: &Lab, preserve: bool) -> Outcome {
    let _tng = lab.start_with(&ingress(TO_SERVER), &egress(&format!("preserve_source = {preserve}")));
    lab.each(|family| {
        let conn = lab.client.connect(&lab.addr(family).to_string(), &Connect { port: PORT, ..Connect::default() });
        let hex = fresh_hex();
        let fate = conn.map_or_else(|fault| fate_of(&fault), |conn| ask(&lab.client, conn, &hex));
        let client = lab.world.client.addr(family);
        let seen_as = lab.server.received(&hex).map(|(peer, _)| peer);
        assert_eq!(seen_as == Some(client), preserve, "the service saw {seen_as:?}, the client is {client}");
        Seen { fate, plaintext: lab.on_wire(&hex) }
    })
    .into()
}

fn plain(lab: &Lab, more: &str) -> Outcome {
    let _tng = Tng::start(&lab.world.server, "out", &egress(more));
    asked(lab, false)
}

/// A client on the service's own host.
fn local_client(lab: &Lab, more: &str) -> Outcome {
    let _tng = Tng::start(&lab.world.server, "out", &egress(more));
    lab.each(|family| lab.plain_from(&lab.server, &lab.addr(family).to_string(), &Connect::default())).into()
}

/// A connection of the host to elsewhere, whose source port happens to be the captured one: it is
/// no captured traffic and must work as without tng.
fn local_client_with_our_port(lab: &Lab) -> Outcome {
    let _tng = lab.start_egress();
    // A listener would keep the port to itself.
    for listener in lab.service {
        lab.server.close(listener);
    }
    lab.each(|family| {
        let addr = lab.world.client.addr(family);
        lab.client.listen(addr, 9000, json!({}));
        let how = Connect { port: 9000, from_port: PORT, from_addr: Some(lab.addr(family)), ..Connect::default() };
        lab.exchange_from(&lab.server, &addr.to_string(), &how)
    })
    .into()
}

fn udp(lab: &Lab) -> Outcome {
    for family in Family::BOTH {
        lab.server.listen_udp(lab.addr(family), PORT);
    }
    let before = lab.each(|family| lab.datagram(&lab.router, &lab.addr(family).to_string()));
    assert!(before.iter().all(|s| s.fate == Fate::Delivered), "UDP reaches the service before tng: {before:?}");
    let _tng = lab.start_egress();
    lab.each(|family| {
        let hex = fresh_hex();
        let command = json!({"do": "udp", "addr": lab.addr(family), "port": PORT, "data": format!("TNGQ{hex}"),
                             "timeout": QUIET.as_secs_f64()});
        let fate = lab.router.ask(command).map_or_else(|fault| fate_of(&fault), |_| Fate::Delivered);
        let plaintext = lab.server.received(&hex).map(|_| "request reached the service".to_owned());
        Seen { fate, plaintext }
    })
    .into()
}

fn link_local_plain(lab: &Lab) -> Outcome {
    let _tng = lab.start_egress();
    Outcome([None, Some(outsider_asks_link_local(lab, Family::V6))])
}

/// A tunnel that arrives from a link-local address: a relay on the router carries its bytes.
fn link_local_tunnel(lab: &Lab) -> Outcome {
    let _egress = lab.start_egress();
    let server = lab.link_local(&lab.world.server, "s0");
    let relay =
        json!({"do": "relay", "addr": "2001:db8:1::1", "port": 7000, "to": server, "to_port": PORT, "scope": "r1"});
    lab.router.ask(relay).expect("relay");
    let mapping = ingress_mapping("127.0.0.1:10001", "[2001:db8:1::1]:7000");
    let _ingress = Tng::start(&lab.world.client, "map", &mapping);
    let how = Connect { port: 10001, ..Connect::default() };
    Outcome([None, Some(lab.exchange_from(&lab.client, "127.0.0.1", &how))])
}

/// A stranger who knows the four numbers of the plaintext connection sends data and a reset.
fn injected(lab: &Lab) -> Outcome {
    let _tng = lab.start();
    lab.each(|family| {
        let flow = lab.flow(family);
        let (peer, port) = lab.server.received(&flow.hex()).expect("the first request");
        let evil = fresh_hex();
        for (flags, data) in [(0x18, format!("TNGQ{evil}")), (0x04, String::new()), (0x02, String::new())] {
            let forged = json!({"do": "raw", "src": peer, "dst": lab.addr(family), "sport": port, "dport": PORT,
                                "flags": flags, "data": data});
            lab.router.ask(forged).expect("raw segment");
        }
        let seen = lab.say(flow);
        assert_eq!(lab.server.received(&evil), None, "an injected request reached the service");
        seen
    })
    .into()
}

/// A plain client of the same address uses the very port that the egress borrowed of it.
fn same_port(lab: &Lab) -> Outcome {
    let _egress = lab.start_egress();
    lab.each(|family| {
        let (listen, name) = if family == Family::V4 { ("127.0.0.1:10001", "four") } else { ("[::1]:10001", "six") };
        let target = std::net::SocketAddr::new(lab.addr(family), PORT).to_string();
        let _ingress = Tng::start(&lab.world.client, name, &ingress_mapping(listen, &target));
        let conn = {
            let addr = if family == Family::V4 { "127.0.0.1" } else { "::1" };
            lab.client.connect(addr, &Connect { port: 10001, ..Connect::default() }).expect("mapping")
        };
        let hex = fresh_hex();
        assert_eq!(ask(&lab.client, conn, &hex), Fate::Delivered, "the mapping works");
        let (_, port) = lab.server.received(&hex).expect("request");
        let how = Connect { from_port: port, ..Connect::default() };
        let plain = lab.plain_from(&lab.client, &lab.addr(family).to_string(), &how);
        // Told at once, so that it can take another port, and not left to its time-out.
        assert!(plain.plaintext.is_none() && plain.fate == Fate::Refused, "the plain client: {plain:?}");
        let hex = fresh_hex();
        let fate = ask(&lab.client, conn, &hex);
        Seen { fate, plaintext: lab.on_wire(&hex) }
    })
    .into()
}

/// Tunnel and upstream draw their ports from the same handful. Every connection that the egress
/// serves stays alive while further ones come and go.
fn forced_collision(lab: &Lab) -> Outcome {
    lab.world.client.sysctl(&[("net/ipv4/ip_local_port_range", "'20000 20015'")]);
    let _tng = lab.start_with(&ingress(TO_SERVER), &egress("preserve_source_ports = \"20000-20015\""));
    lab.each(|family| {
        let flow = lab.flow(family);
        for _ in 0..6 {
            // Its own fate is open: a new tunnel may meet a port that is taken, and is then refused.
            let other = lab.exchange(family, &Connect { from_port: 0, ..Connect::default() });
            assert_eq!(other.plaintext, None, "a further connection");
        }
        lab.say(flow)
    })
    .into()
}

/// Packets for 127.0.0.1 that come in by the wire.
fn route_localnet(lab: &Lab) -> Outcome {
    let localnet = [("net/ipv4/conf/all/route_localnet", "1"), ("net/ipv4/conf/all/rp_filter", "0")];
    lab.world.server.sysctl(&localnet);
    lab.world.router.sysctl(&localnet);
    lab.world.router.sysctl(&[("net/ipv4/conf/all/accept_local", "1")]);
    lab.world
        .router
        .sh("ip route del local 127.0.0.0/8 dev lo table local; ip route del local 127.0.0.1 dev lo table local
         ip route add 127.0.0.1/32 via 203.0.113.2 src 203.0.113.1");
    let before = lab.plain_to("127.0.0.1", &Connect::default());
    assert!(before.plaintext.is_some(), "the wire reaches the server's loopback before tng: {before:?}");
    let _tng = lab.start_egress();
    Outcome([Some(lab.plain_to("127.0.0.1", &Connect::default())), None])
}

fn syncookies(lab: &Lab, tunnel: bool) -> Outcome {
    for host in [&lab.world.client, &lab.world.server] {
        host.sysctl(&[("net/ipv4/tcp_syncookies", "2")]);
    }
    let _tng = lab.start();
    asked(lab, tunnel)
}

/// The egress accepts nothing and its queue is full.
fn accept_queue(lab: &Lab, syncookies: &str) -> Outcome {
    lab.world.server.sysctl(&[("net/ipv4/tcp_syncookies", syncookies), ("net/core/somaxconn", "4")]);
    let egress = lab.start_egress();
    egress.freeze_data_plane();
    lab.each(|family| {
        let addr = lab.addr(family).to_string();
        let how = Connect { port: PORT, ..Connect::default() };
        // One connection more than the queue holds is turned away or waits; then it is full.
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| lab.router.connect(&addr, &how));
            }
        });
        lab.plain(family)
    })
    .into()
}

/// An address that is local only by a route.
fn any_ip(lab: &Lab) -> Outcome {
    lab.world.server.sh("ip route add local 192.0.2.64/28 dev lo; ip route add local 2001:db8:6::/64 dev lo");
    lab.world.router.sh("ip route add 192.0.2.64/28 via 203.0.113.2; ip route add 2001:db8:6::/64 via 2001:db8:2::2");
    let ask = |family| {
        let addr = if family == Family::V4 { "192.0.2.65" } else { "2001:db8:6::1" };
        lab.plain_to(addr, &Connect::default())
    };
    let before = lab.each(ask);
    assert!(before.iter().all(|s| s.plaintext.is_some()), "the addresses work before tng: {before:?}");
    let _tng = lab.start_egress();
    lab.each(ask).into()
}

/// Each host has both ends, so it is client and server at once.
fn both_on_a_host(lab: &Lab, ingress_first: bool, outbound: bool) -> Outcome {
    let to_client = TO_SERVER.replace("203.0.113.0", "198.51.100.0").replace("2001:db8:2:", "2001:db8:1:");
    for any in ["0.0.0.0", "::"] {
        lab.client.listen(any.parse().expect("address"), PORT, json!({}));
    }
    let (client, server) = (&lab.world.client, &lab.world.server);
    let ingresses = || (Tng::start(client, "in", &ingress(TO_SERVER)), Tng::start(server, "in", &ingress(&to_client)));
    let egresses = || (Tng::start(client, "out", &egress("")), Tng::start(server, "out", &egress("")));
    let _tng = if ingress_first {
        let first = ingresses();
        (first, egresses())
    } else {
        let last = egresses();
        (ingresses(), last)
    };
    lab.each(|family| match outbound {
        false => lab.exchange(family, &Connect::default()),
        true => lab.exchange_from(&lab.server, &client.addr(family).to_string(), &Connect::default()),
    })
    .into()
}

/// The whole path on one host: a mapping ingress goes to the host's own captured service. The
/// egress's counter must move, otherwise the ingress walked past it.
fn single_host(lab: &Lab) -> Outcome {
    let server = &lab.world.server;
    let _egress = Tng::start(server, "out", &egress("capture_local_traffic = true"));
    let mappings = lab.each(|family| {
        let (listen, name) = if family == Family::V4 { ("127.0.0.1:10001", "four") } else { ("[::1]:10001", "six") };
        let target = std::net::SocketAddr::new(lab.addr(family), PORT).to_string();
        Tng::start(server, name, &ingress_mapping(listen, &target))
    });
    let seen = lab.each(|family| {
        let addr = if family == Family::V4 { "127.0.0.1" } else { "::1" };
        lab.exchange_from(&lab.server, addr, &Connect { port: 10001, ..Connect::default() })
    });
    let plain = lab.each(|family| lab.plain_from(&lab.server, &lab.addr(family).to_string(), &Connect::default()));
    assert!(plain.iter().all(|s| s.fate == Fate::Refused), "a local client without tunnel: {plain:?}");
    // The egress's mark is not the ingress's: an ingress that set it would pass as the proxy.
    let how = Connect { mark: Some(super::lab::INGRESS_MARK), ..Connect::default() };
    let marked = lab.each(|family| lab.plain_from(&lab.server, &lab.addr(family).to_string(), &how));
    assert!(marked.iter().all(|s| s.fate != Fate::Delivered), "the ingress's mark opens no egress: {marked:?}");
    drop(mappings);
    seen.into()
}
