//! Strangers who say nothing, and an endpoint that is full.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::netns::{Family, Tng, World, wait_for, wait_until};
use super::programs::*;

/// Connects as often as asked and says nothing, until it is killed.
const SILENT: &str = r#"
import socket, sys, time
held = [socket.create_connection((sys.argv[1], 8080), timeout=20) for _ in range(int(sys.argv[2]))]
print("ready", flush=True)
time.sleep(300)
"#;

/// Sends the first byte of a TLS record and no second one.
const SLOW: &str = r#"
import socket, sys, time
held = [socket.create_connection((sys.argv[1], 8080), timeout=20) for _ in range(int(sys.argv[2]))]
for sock in held:
    sock.sendall(b"\x16")
print("ready", flush=True)
time.sleep(300)
"#;

fn limits(side: &str, more: &str) -> String {
    format!("[{side}.limits]\nmax_connections = 5\n{more}")
}

fn status(tng: &Tng<'_>, name: &str) -> Value {
    let out = tng.ctl(&["status", "--json", name]);
    serde_json::from_str(&out.stdout).unwrap_or_default()
}

#[test]
fn strangers_neither_take_the_places_of_peers_nor_delay_a_stop() {
    for family in Family::BOTH {
        let world = World::new();
        let addr = world.server.addr(family).to_string();
        let at = socket_addr(&world.server, family, 8080);
        let _nginx = Nginx::start(&world.server, std::slice::from_ref(&at));
        let bounds = limits("egress", "first_byte_timeout = \"1m\"\n");
        let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + &bounds)));
        let _in = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
        let _silent = python(&world.router, SILENT, &[&addr, "40"]);
        let _slow = python(&world.router, SLOW, &[&addr, "40"]);
        wait_for("they arrive", Duration::from_secs(10), || {
            status(&out, "out")[0]["endpoints"][0]["bound"]["arriving"].as_u64() >= Some(80)
        });
        for _ in 0..8 {
            let begun = Instant::now();
            curl(&world.client, &at, "/").expect_ok();
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        }
        let begun = Instant::now();
        assert!(out.stop().success());
        assert!(begun.elapsed() < Duration::from_secs(10), "a stop waited for strangers: {:?}", begun.elapsed());
    }
}

#[test]
fn a_client_that_says_nothing_is_refused_soon_and_with_its_reason() {
    let world = World::new();
    let bounds = limits("egress", "first_byte_timeout = \"500ms\"\n");
    let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + &bounds)));
    let _silent = python(&world.router, SILENT, &[&world.server.addr(Family::V4).to_string(), "3"]);
    let refused = || status(&out, "out")[0]["endpoints"][0]["refused"].clone();
    let told = wait_until(Duration::from_secs(10), || refused()["silent-client"].as_u64() == Some(3));
    assert!(told, "{}\n{}", refused(), out.output());
}

/// Holds connections that carry bytes.
const HOLDS: &str = r#"
import socket, sys, time
held = []
for _ in range(int(sys.argv[2])):
    sock = socket.create_connection((sys.argv[1], 8080), timeout=20)
    sock.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"); assert sock.recv(4096)
    held.append(sock)
print("ready", flush=True)
time.sleep(300)
"#;

#[test]
fn a_full_endpoint_says_so_and_serves_who_waits_when_a_place_is_free() {
    let world = World::new();
    let at = socket_addr(&world.server, Family::V4, 8080);
    let _nginx = Nginx::start(&world.server, std::slice::from_ref(&at));
    let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + &limits("egress", ""))));
    let _in = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    let addr = world.server.addr(Family::V4).to_string();
    let held = python(&world.client, HOLDS, &[&addr, "5"]);
    let waiting = world.client.spawn("curl", &["-sS", "--max-time", "25", &format!("http://{at}/waited")]);
    wait_for("one waits", Duration::from_secs(10), || {
        let bound = &status(&out, "out")[0]["endpoints"][0]["bound"];
        bound["taken"] == 5 && bound["limit"] == 5 && bound["waiting"] == 1 && bound["reached_times"] == 1
    });
    let text = out.ctl(&["status", "out"]).stdout;
    assert!(text.contains("5 open of 5, bound reached for ") && text.contains("1 waiting"), "{text}");
    wait_for("one warning", Duration::from_secs(5), || out.output().contains("connections-full"));
    assert_eq!(out.output().matches("connections-full").count(), 1);
    let metrics = out.get("/metrics").expect("metrics");
    assert!(metrics.contains("tng_connections_waiting{endpoint=\"web\",side=\"egress\"} 1"), "{metrics}");
    assert!(metrics.contains("tng_bound_reached_total{endpoint=\"web\",side=\"egress\"} 1"), "{metrics}");
    drop(held);
    wait_for("the one that waited is served", Duration::from_secs(20), || waiting.output().contains("uri=/waited"));
    let text = out.ctl(&["status", "out"]).stdout;
    assert!(text.contains("bound reached ") && text.contains(" ago, 0 waiting"), "{text}");
}

/// Opens many connections from each of these sources, sends each one beginning, and holds those that stay.
const FLOOD: &str = r#"
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
addr, count, beginning = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
held = []
for source in sys.argv[4:] or [""]:
    for _ in range(count):
        try:
            sock = socket.create_connection((addr, 8080), timeout=20, source_address=(source, 0) if source else None)
            sock.sendall(beginning)
            held.append(sock)
        except ConnectionError:
            pass
print("ready", flush=True)
time.sleep(300)
"#;
/// The first byte of a TLS record.
const ONE_BYTE: &str = "16";
/// A whole record with the beginning of a ClientHello.
const BEGINNING: &str = "160301000401000fff";

/// A served request of a peer that was admitted before, while strangers hold what they can.
fn served_soon(world: &World, at: &str) {
    for _ in 0..4 {
        let begun = Instant::now();
        curl(&world.client, at, "/").expect_ok();
        // The strangers hold on for longer than half a minute.
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    }
}

#[test]
fn one_source_with_thousands_of_connections_takes_half_of_the_room_and_delays_nobody() {
    let world = World::new();
    let at = socket_addr(&world.server, Family::V4, 8080);
    let _nginx = Nginx::start(&world.server, std::slice::from_ref(&at));
    let patience = "[egress.limits]\nfirst_byte_timeout = \"3m\"\nhandshake_timeout = \"3m\"\n";
    let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + patience)));
    let _in = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    curl(&world.client, &at, "/").expect_ok();
    let addr = world.server.addr(Family::V4).to_string();
    let _flood = python(&world.router, FLOOD, &[&addr, "9000", ONE_BYTE]);
    let endpoint = || status(&out, "out")[0]["endpoints"][0].clone();
    wait_for("what exceeds half of the room is closed", Duration::from_secs(60), || {
        endpoint()["refused"]["source-full"].as_u64() >= Some(700)
    });
    let bound = endpoint()["bound"].clone();
    assert!(bound["busiest"]["connections"].as_u64() <= Some(8192), "{bound}");
    assert!(bound["busiest"]["source"].as_str() == Some(&world.router.addr(Family::V4).to_string()), "{bound}");
    served_soon(&world, &at);
}

#[test]
fn strangers_who_fill_the_handshakes_are_seen_and_leave_the_places_of_peers() {
    let world = World::new();
    let at = socket_addr(&world.server, Family::V4, 8080);
    let _nginx = Nginx::start(&world.server, std::slice::from_ref(&at));
    let patience = "[egress.limits]\nhandshake_timeout = \"3m\"\n";
    let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + patience)));
    let _in = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    curl(&world.client, &at, "/").expect_ok();
    let sources: Vec<String> = (50..59).map(|n| format!("203.0.113.{n}")).collect();
    sources.iter().for_each(|source| drop(world.router.sh(&format!("ip addr add {source}/32 dev lo"))));
    let addr = world.server.addr(Family::V4).to_string();
    let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
    let flood = python(&world.router, FLOOD, &[&[&*addr, "33", BEGINNING][..], &sources].concat());
    let room = || status(&out, "out")[0]["endpoints"][0]["bound"]["rooms"][1].clone();
    wait_for("the strangers' room is full and some wait", Duration::from_secs(30), || {
        room()["taken"] == 256 && room()["waiting"].as_u64() >= Some(1)
    });
    let text = out.ctl(&["status", "out"]).stdout;
    assert!(
        text.contains("handshakes of strangers 256 of 256, full for ") && text.contains("most from 203.0.113."),
        "{text}"
    );
    wait_for("one warning", Duration::from_secs(5), || out.output().contains("handshakes-full"));
    assert_eq!(out.output().matches("handshakes-full").count(), 1);
    let metrics = out.get("/metrics").expect("metrics");
    let value = |name: &str| {
        let line =
            metrics.lines().find(|line| line.starts_with(&format!("{name}{{endpoint=\"web\",side=\"egress\"}}")));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
    };
    assert!(value("tng_handshakes_waiting") >= Some(1) && value("tng_handshakes_full_total") == Some(1), "{metrics}");
    assert!(value("tng_connections_arriving") >= Some(288), "{metrics}");
    served_soon(&world, &at);
    drop(flood);
    wait_for("the room is free again", Duration::from_secs(20), || room().get("reached_since").is_none());
    assert!(out.ctl(&["status", "out"]).stdout.contains(" ago, 0 waiting"));
}

/// As many echoes at once as asked, all open until the last one was answered.
const MANY: &str = r#"
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
async def serve(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
async def one(address, n, held):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"%06d" % n)
    assert await reader.readexactly(6) == b"%06d" % n
    held.append(writer)
async def main():
    if sys.argv[1] == "serve":
        server = await asyncio.start_server(serve, sys.argv[2], 8080, backlog=8192)
        print("ready", flush=True)
        await server.serve_forever()
    held = []
    await one((sys.argv[2], 8080), 0, held)
    answers = await asyncio.gather(*(one((sys.argv[2], 8080), n, held) for n in range(int(sys.argv[3]))), return_exceptions=True)
    print("ready", sum(a is None for a in answers), set(repr(a) for a in answers if a is not None), flush=True)
asyncio.run(main())
"#;

#[test]
fn one_ingress_opens_five_thousand_connections_at_once() {
    let world = World::new();
    let addr = world.server.addr(Family::V4).to_string();
    let _service = python(&world.server, MANY, &["serve", &addr]);
    let limits = |side: &str| {
        format!(
            "[{side}.limits]\nmax_connections = 6000\nhandshake_timeout = \"5m\"\nconnect_timeout = \"5m\"\nfirst_byte_timeout = \"5m\"\n"
        )
    };
    let out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + &limits("egress"))));
    let into = Tng::start(&world.client, "in", &ingress(TO_SERVER, &(VERIFY.to_owned() + &limits("ingress"))));
    let begun = Instant::now();
    let clients = world.client.spawn("python3", &["-c", MANY, "ask", &addr, "5000"]);
    wait_for("all are answered", Duration::from_secs(240), || clients.output().contains("ready"));
    eprintln!("5000 connections took {:?}", begun.elapsed());
    assert!(clients.output().contains("ready 5000"), "{}\n{}", clients.output(), out.output());
    for (tng, name) in [(&out, "out"), (&into, "in")] {
        let refused = status(tng, name)[0]["endpoints"][0]["refused"].clone();
        assert!(refused.as_object().is_none_or(serde_json::Map::is_empty), "{name}: {refused}");
    }
}
