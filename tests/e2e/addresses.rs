//! Whose address is seen, which of several is tried, and link-local ones.

use std::time::{Duration, Instant};

use super::netns::{Family, Host, Output, Tng, World, fresh_hex, run, run_tngctl, tngctl, wait_for};
use super::programs::*;

fn curl_from(host: &Host, source: &str, at: &str, path: &str) -> Output {
    host.run("curl", &["-sS", "--max-time", "20", "--interface", source, &format!("http://{at}{path}")])
}

#[test]
fn the_service_sees_the_source_address_that_the_application_chose() {
    let world = World::new();
    world.client.sh("ip addr add 198.51.100.77/24 dev c0; ip addr add 2001:db8:1::77/64 dev c0 nodad preferred_lft 0");
    let listen = Family::BOTH.map(|family| socket_addr(&world.server, family, 8080));
    let _nginx = Nginx::start(&world.server, &listen);
    let _out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    for (family, chosen) in [(Family::V4, "198.51.100.77"), (Family::V6, "2001:db8:1::77")] {
        let at = socket_addr(&world.server, family, 8080);
        let path = format!("/chosen-{}", fresh_hex());
        let seen = curl_from(&world.client, chosen, &at, &path).expect_ok();
        assert!(seen.contains(&format!("from={chosen} ")), "{seen}\n{}", client.output());
        assert!(!world.saw(&path), "it went through the tunnel");
        // Without a choice, the kernel's.
        let seen = curl(&world.client, &at, &path).expect_ok();
        assert!(seen.contains(&format!("from={} ", world.client.addr(family))), "{seen}");
    }
}

#[test]
fn a_family_that_leads_nowhere_costs_a_moment_and_not_a_deadline() {
    let world = World::new();
    world.router.sh("ip -6 route add blackhole 2001:db8:dead::/64");
    let _nginx = Nginx::start(&world.server, &["127.0.0.1:30001".into()]);
    let mapping = |side: &str, listen: &str, target: &str, rest: &str| {
        format!("[[{side}]]\nname = \"map\"\n[{side}.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n{rest}")
    };
    let _out = Tng::start(&world.server, "out", &mapping("egress", "203.0.113.2:20001", "127.0.0.1:30001", ATTEST));
    let hosts = world.client.dir().join("hosts");
    std::fs::write(&hosts, "2001:db8:dead::1 two.example\n203.0.113.2 two.example\n").expect("write");
    let file = hosts.to_string_lossy();
    let wrapper = ["unshare", "-m", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\"", &file];
    let text = mapping("ingress", "127.0.0.1:10001", "two.example:20001", VERIFY);
    let tng = Tng::start_through(&wrapper, &world.client, "in", &text);
    for _ in 0..3 {
        let begun = Instant::now();
        curl(&world.client, "127.0.0.1:10001", "/").expect_ok();
        // The deadline of an address is 10 s.
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}\n{}", begun.elapsed(), tng.output());
    }
}

#[test]
fn a_link_local_service_is_reached_through_its_interface() {
    let world = World::new();
    let text = world.server.sh("ip -6 -o addr show dev s0 scope link");
    let addr = text.split_whitespace().find(|w| w.starts_with("fe80")).expect("link-local address");
    let addr = addr.split('/').next().expect("address");
    let _nginx = Nginx::start(&world.server, &["127.0.0.1:8080".into(), "[::]:8080".into()]);
    let out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let mapping = |zone: &str| {
        format!(
            "[[ingress]]\nname = \"map\"\n[ingress.mapping]\nlisten = \"127.0.0.1:10001\"\n\
             target = \"[{addr}{zone}]:8080\"\n{VERIFY}"
        )
    };
    let tng = Tng::start(&world.router, "in", &mapping("%r1"));
    let path = format!("/link-local-{}", fresh_hex());
    let seen = curl(&world.router, "127.0.0.1:10001", &path);
    assert!(seen.stdout.contains(&path), "{seen:?}\n{}\n{}", tng.output(), out.output());
    let status = out.ctl(&["status", "out"]).stdout;
    assert!(status.contains("1 in all, 0 refused"), "it came through the tunnel: {status}");
    let target = format!("[{addr}%r1]:8080");
    run_tngctl(&world.router, &["verify", "--allow-sample", &target]).expect_ok();
    assert!(tng.stop().success());

    let tng = Tng::start(&world.router, "in", &mapping("%nowhere0"));
    assert!(!curl(&world.router, "127.0.0.1:10001", "/").ok());
    wait_for("the reason", Duration::from_secs(5), || tng.output().contains("no interface nowhere0"));
    assert!(tng.stop().success());

    let file = world.router.config_dir().join("none.toml");
    std::fs::write(&file, mapping("")).expect("write");
    let out = run(world.router.command(tngctl(), &["check", &file.to_string_lossy()]));
    assert_eq!(out.status.code(), Some(78));
    assert!(out.stderr.contains(&format!("[{addr}%eth0]")), "{}", out.stderr);
}

/// Exchanges bytes until that fails, and prints how long the last one waited.
const SENDS_INTO_THE_VOID: &str = r#"
import socket, sys, time
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)
sock.sendall(b"x"); assert sock.recv(1) == b"x"
print("ready", flush=True)
while True:
    begun = time.monotonic()
    try:
        sock.sendall(b"y"); sock.recv(1)
    except OSError as error:
        print(f"{error.errno} after {time.monotonic() - begun:.1f}", flush=True)
        break
    time.sleep(0.05)
"#;

const ECHO: &str = r#"
import socket, sys, threading
def serve(conn):
    while data := conn.recv(64):
        conn.sendall(data)
def listen(addr):
    sock = socket.create_server((addr, 8080), family=socket.AF_INET6 if ":" in addr else socket.AF_INET)
    while True:
        threading.Thread(target=serve, args=(sock.accept()[0],), daemon=True).start()
for addr in sys.argv[1:]:
    threading.Thread(target=listen, args=(addr,)).start()
print("ready", flush=True)
"#;

fn impatient(side: &str) -> String {
    format!("[{side}.limits]\nunacknowledged_timeout = \"2s\"\n")
}

#[test]
fn a_host_that_vanishes_with_data_under_way_is_noticed_on_both_legs() {
    for family in Family::BOTH {
        let world = World::new();
        // The peer's host, seen from the ingress.
        let addr = world.server.addr(family).to_string();
        let _service = python(&world.server, ECHO, &[&addr]);
        let _out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
        let tng = Tng::start(&world.client, "in", &ingress(TO_SERVER, &(VERIFY.to_owned() + &impatient("ingress"))));
        let client = python(&world.client, SENDS_INTO_THE_VOID, &[&addr, "8080"]);
        world.server.sh("ip link set s0 down");
        wait_for("the application's error", Duration::from_secs(20), || client.output().contains(" after "));
        wait_for("the reason", Duration::from_secs(5), || tng.output().contains("peer-vanished"));

        // The service's host, seen from the egress.
        let world = World::new();
        let backend = world.backend.addr(family).to_string();
        let _service = python(&world.backend, ECHO, &[&backend]);
        let listen = socket_addr(&world.server, family, 20001);
        let out = format!(
            "[[egress]]\nname = \"map\"\n[egress.mapping]\nlisten = \"{listen}\"\ntarget = \"{}\"\n{ATTEST}{}",
            socket_addr(&world.backend, family, 8080),
            impatient("egress")
        );
        let out = Tng::start(&world.server, "out", &out);
        let map = format!(
            "[[ingress]]\nname = \"map\"\n[ingress.mapping]\nlisten = \"127.0.0.1:10001\"\ntarget = \"{listen}\"\n{VERIFY}"
        );
        let _in = Tng::start(&world.client, "in", &map);
        let client = python(&world.client, SENDS_INTO_THE_VOID, &["127.0.0.1", "10001"]);
        world.backend.sh("ip link set b0 down");
        wait_for("the application's error", Duration::from_secs(20), || client.output().contains(" after "));
        wait_for("the reason", Duration::from_secs(5), || out.output().contains("target-vanished"));
    }
}

/// TNG's ingress with its multiplex, as far as one stream needs: an HTTP/2 connection (RFC 9113) with a CONNECT stream,
/// into which bytes go until nobody takes them.
const MULTIPLEXES: &str = r#"
import socket, ssl, sys, time
def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False; context.verify_mode = ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
sock = context.wrap_socket(socket.create_connection((sys.argv[1], 20001), timeout=60))
assert sock.selected_alpn_protocol() == "h2"
# HPACK (RFC 7541): literals without indexing, of the static names :method (2) and :authority (1).
head = b"\x02\x07CONNECT" + b"\x01\x01x"
sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, head))
sock.sendall(frame(0, 0, 1, b"x"))
seen = b""
while frame(0, 0, 1, b"x") not in seen: seen += sock.recv(4096)
print("ready", flush=True)
while True:
    sock.sendall(frame(0, 0, 1, b"y")); sock.recv(4096); time.sleep(0.05)
"#;

#[test]
fn a_peer_that_vanishes_under_a_multiplexed_stream_is_noticed() {
    for family in Family::BOTH {
        let world = World::new();
        let addr = world.server.addr(family).to_string();
        let _service = python(&world.server, ECHO, &[&addr]);
        let out = format!(
            "[[egress]]\nname = \"map\"\n[egress.mapping]\nlisten = \"{}\"\ntarget = \"{}\"\n{ATTEST}{}",
            socket_addr(&world.server, family, 20001),
            socket_addr(&world.server, family, 8080),
            impatient("egress")
        );
        let out = Tng::start(&world.server, "out", &out);
        let _client = python(&world.client, MULTIPLEXES, &[&addr]);
        world.client.sh("ip link set c0 down");
        wait_for("the reason", Duration::from_secs(30), || out.output().contains("peer-vanished"));
    }
}

/// Sends one byte after another, and says with which error that ended.
const SENDS_AND_TELLS: &str = r#"
import socket, sys, time
sock = socket.create_connection((sys.argv[1], 8080), timeout=60)
sock.sendall(b"x"); assert sock.recv(1) == b"x"
print("ready", flush=True)
try:
    while True:
        sock.sendall(b"y"); sock.recv(1); time.sleep(0.05)
except OSError as error:
    print("ended", error.errno, flush=True)
"#;

#[test]
fn a_router_that_says_unreachable_ends_a_connection_as_the_kernel_gives_it_up() {
    let world = World::new();
    let addr = world.server.addr(Family::V4).to_string();
    let _service = python(&world.server, ECHO, &[&addr]);
    let _out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    // The kernel's own measure alone: our watch is off, and the kernel gives up after few retries.
    let patient = "[ingress.limits]\nunacknowledged_timeout = \"0s\"\n";
    let inn = Tng::start(&world.client, "in", &ingress(TO_SERVER, &(VERIFY.to_owned() + patient)));
    world.client.sysctl(&[("net/ipv4/tcp_retries2", "3")]);
    let client = python(&world.client, SENDS_AND_TELLS, &[&addr]);
    world.router.sh(&format!("ip route add unreachable {addr}/32"));
    wait_for("the application's end", Duration::from_secs(60), || client.output().contains("ended"));
    wait_for("its reason", Duration::from_secs(5), || inn.output().contains("peer-vanished"));
    // EHOSTUNREACH (113), which the router said by ICMP, and not only that time ran out.
    assert!(inn.output().contains("os error 113"), "{}", inn.output());
}

/// Takes nothing for three times the limit, and then all.
const RESTS: &str = r#"
import socket, sys, time
sock = socket.create_connection((sys.argv[1], 8080), timeout=60)
sock.sendall(b"20000000\n")
time.sleep(6)
got = 0
while part := sock.recv(1 << 16):
    got += len(part)
print(got)
"#;

const SENDS_MUCH: &str = r#"
import socket, sys
sock = socket.create_server((sys.argv[1], 8080))
print("ready", flush=True)
conn = sock.accept()[0]
conn.sendall(b"x" * int(conn.recv(64))); conn.close()
"#;

#[test]
fn a_reader_that_takes_a_rest_has_not_vanished() {
    let world = World::new();
    let addr = world.server.addr(Family::V4).to_string();
    let _service = python(&world.server, SENDS_MUCH, &[&addr]);
    let _out = Tng::start(&world.server, "out", &egress(8080, "", &(ATTEST.to_owned() + &impatient("egress"))));
    let client = Tng::start(&world.client, "in", &ingress(TO_SERVER, &(VERIFY.to_owned() + &impatient("ingress"))));
    let got = world.client.run("/usr/bin/python3", &["-I", "-c", RESTS, &addr]).expect_ok();
    assert_eq!(got.trim(), "20000000", "{}", client.output());
}

#[test]
fn a_host_that_the_network_calls_unreachable_ends_the_attempt_at_once_and_with_that_reason() {
    let world = World::new();
    for (family, gone) in [(Family::V4, "203.0.113.99"), (Family::V6, "2001:db8:2::99")] {
        world.router.sh(&format!("ip {} route add unreachable {gone}", family.ip_option()));
        let target = match family {
            Family::V4 => format!("{gone}:20001"),
            Family::V6 => format!("[{gone}]:20001"),
        };
        let name = if family == Family::V4 { "four" } else { "six" };
        let text = format!(
            "[[ingress]]\nname = \"map\"\n[ingress.mapping]\nlisten = \"127.0.0.1:10001\"\ntarget = \"{target}\"\n{VERIFY}\
             [ingress.limits]\nconnect_timeout = \"60s\"\n"
        );
        let tng = Tng::start(&world.client, name, &text);
        let begun = Instant::now();
        assert!(!curl(&world.client, "127.0.0.1:10001", "/").ok(), "nobody is there");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}\n{}", begun.elapsed(), tng.output());
        wait_for("the reason", Duration::from_secs(5), || tng.output().contains("target-unreachable"));
        assert!(!tng.output().contains("target-timeout"), "{}", tng.output());
    }
}
