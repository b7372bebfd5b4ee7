//! redis through a mapping and through capture: short commands, a large value, and a client that waits.

use std::time::Duration;

use serde_json::Value;

use super::netns::{Family, Host, Proc, Tng, World, fresh_hex, wait_for};
use super::programs::{ATTEST, VERIFY, egress, ingress, noise, sha256};

const PATIENCE: Duration = Duration::from_secs(10);
/// Deadlines of a connection that is being made must not end one that is established and idle.
const SHORT_DEADLINES: &str = "[ingress.limits]\nhandshake_timeout = \"1s\"\nconnect_timeout = \"1s\"\n";

fn start(host: &Host) -> Proc {
    let dir = host.dir().join("redis");
    std::fs::create_dir_all(&dir).expect("directory");
    let proc = host.spawn(
        "redis-server",
        &[
            "--bind",
            "127.0.0.1",
            "203.0.113.2",
            "2001:db8:2::2",
            "--port",
            "6379",
            "--save",
            "",
            "--appendonly",
            "no",
            "--protected-mode",
            "no",
            "--dir",
            &dir.to_string_lossy(),
        ],
    );
    wait_for("redis answers (install redis-server)", PATIENCE, || {
        cli(host, "127.0.0.1", "6379", &["PING"]).contains("PONG")
    });
    proc
}

fn cli(host: &Host, addr: &str, port: &str, words: &[&str]) -> String {
    let mut args = vec!["-h", addr, "-p", port];
    args.extend(words);
    host.run("redis-cli", &args).stdout
}

/// Everything an application does, over `addr`, from the client's host.
fn works(world: &World, tng: &Tng<'_>, addr: &str, port: &str) {
    let client = &world.client;
    let ask = |words: &[&str]| cli(client, addr, port, words);
    assert_eq!(ask(&["PING"]), "PONG\n");
    let secret = format!("value-{}", fresh_hex());
    assert_eq!(ask(&["SET", "key", &secret]), "OK\n");
    assert_eq!(ask(&["GET", "key"]), format!("{secret}\n"));
    assert!(!world.saw(&secret), "the value is not on the wire");

    let (file, back) = (client.dir().join("value"), client.dir().join("back"));
    let digest = noise(client, &file, 5);
    let redis = format!("redis-cli -h {addr} -p {port}");
    assert_eq!(client.sh(&format!("{redis} -x SET big <{}", file.display())), "OK\n");
    client.sh(&format!("{redis} GET big | head -c 5242880 >{}", back.display()));
    assert_eq!(sha256(client, &back), digest);
    assert_eq!(ask(&["STRLEN", "big"]), "5242880\n");

    // A client that waits: nothing passes for longer than any deadline of a handshake.
    let waiting = client.spawn("redis-cli", &["-h", addr, "-p", port, "BLPOP", "queue", "0"]);
    let idle = || -> Option<u64> {
        let all: Value = serde_json::from_str(&tng.ctl(&["connections", "--json"]).stdout).ok()?;
        let list = all["in"]["connections"].as_array()?;
        list.iter().find(|c| c["state"] == "relay").and_then(|c| c["age_ms"].as_u64())
    };
    wait_for("the waiting client outlives the deadlines", PATIENCE, || idle().is_some_and(|age| age > 1500));
    assert_eq!(cli(&world.server, "127.0.0.1", "6379", &["RPUSH", "queue", &secret]), "1\n");
    wait_for("the waiting client gets the value", PATIENCE, || waiting.output() == format!("queue\n{secret}\n"));
    assert!(!world.saw(&secret), "the value is not on the wire");
}

#[test]
fn redis_through_capture() {
    let world = World::new();
    let _redis = start(&world.server);
    let _out = Tng::start(&world.server, "out", &egress(6379, "", ATTEST));
    let capture = r#"{ to = "203.0.113.0/24", port = 6379 }, { to = "2001:db8:2::/64", port = 6379 }"#;
    let tng = Tng::start(&world.client, "in", &ingress(capture, &format!("{VERIFY}{SHORT_DEADLINES}")));
    for family in Family::BOTH {
        works(&world, &tng, &world.server.addr(family).to_string(), "6379");
        let peer = world.client.addr(family).to_string();
        let seen = world.client.run("redis-cli", &["-h", &world.server.addr(family).to_string(), "CLIENT", "INFO"]);
        assert!(seen.expect_ok().contains(&peer), "redis sees the client's own address");
        let outsider = cli(&world.router, &world.server.addr(family).to_string(), "6379", &["PING"]);
        assert!(!outsider.contains("PONG"), "a client without the tunnel got {outsider}");
    }
}

#[test]
fn redis_through_a_mapping() {
    let world = World::new();
    let _redis = start(&world.server);
    let side = |side: &str, name: &str, listen: &str, target: &str, rest: &str| {
        format!("[[{side}]]\nname = \"{name}\"\n[{side}.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n{rest}")
    };
    let verify = format!("{VERIFY}{SHORT_DEADLINES}");
    let out = side("egress", "v4", "203.0.113.2:20001", "127.0.0.1:6379", ATTEST)
        + &side("egress", "v6", "[2001:db8:2::2]:20001", "127.0.0.1:6379", ATTEST);
    let into = side("ingress", "v4", "127.0.0.1:10001", "203.0.113.2:20001", &verify)
        + &side("ingress", "v6", "[::1]:10001", "[2001:db8:2::2]:20001", &verify);
    let _out = Tng::start(&world.server, "out", &out);
    let tng = Tng::start(&world.client, "in", &into);
    for (addr, service) in [("127.0.0.1", "203.0.113.2"), ("::1", "2001:db8:2::2")] {
        works(&world, &tng, addr, "10001");
        let outsider = cli(&world.router, service, "20001", &["PING"]);
        assert!(!outsider.contains("PONG"), "the tunnel's port answers plaintext with {outsider}");
    }
}
