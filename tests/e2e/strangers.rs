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
