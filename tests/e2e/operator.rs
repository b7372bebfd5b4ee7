//! What the operator sees: status, connections, exit statuses and metrics, on both sides.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use super::netns::{Connect, Family, Host, Tng, World, run_tngctl, wait_for};
use super::programs::*;

/// Reads OpenMetrics text with the parser of the format's reference client and prints its samples.
const PARSE: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
for family in parse(sys.stdin.read()):
    for s in family.samples:
        print(s.name, s.labels.get('side', ''), s.labels.get('direction', ''), s.value)
";

/// Exit status of `tngctl` with these words.
fn exit(host: &Host, words: &[&str]) -> i32 {
    run_tngctl(host, words).status.code().expect("an exit status")
}

fn json(host: &Host, words: &[&str]) -> Value {
    serde_json::from_str(&run_tngctl(host, words).stdout).expect("JSON")
}

fn parsed_metrics(tng: &Tng<'_>) -> String {
    let answer = tng.get("/metrics").expect("metrics");
    let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    let mut parser = std::process::Command::new("/usr/bin/python3")
        .args(["-I", "-c", PARSE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    parser.stdin.take().expect("stdin").write_all(body.as_bytes()).expect("write");
    let out = parser.wait_with_output().expect("parser");
    assert!(out.status.success(), "not OpenMetrics, or python3-prometheus-client is not installed:\n{body}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn status_connections_and_metrics_tell_the_same_story_on_both_sides() {
    let world = World::new();
    let (client, server) = (world.client.app(), world.server.app());
    let service = server.listen(world.server.addr(Family::V4), 8080, serde_json::json!({}));
    for host in [&world.client, &world.server] {
        assert_eq!(exit(host, &["status"]), 3, "nothing runs");
        assert_eq!(exit(host, &["connections"]), 3);
    }
    let out = Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let into = Tng::start(&world.client, "in", &ingress(TO_SERVER, VERIFY));
    let addr = world.server.addr(Family::V4).to_string();
    let conn = client.connect(&addr, &Connect { port: 8080, ..Connect::default() }).expect("connect");
    client.send(conn, "TNGQ0123456789abcdef\n").expect("send");
    client.recv(conn, "TNGA0123456789abcdef", Duration::from_secs(5)).expect("answer");

    for (host, name, side) in [(&world.client, "in", "ingress"), (&world.server, "out", "egress")] {
        assert_eq!(exit(host, &["status"]), 0);
        assert_eq!(exit(host, &["status", name]), 0);
        assert_eq!(exit(host, &["status", "other"]), 3);
        let text = run_tngctl(host, &["status"]).expect_ok();
        for part in
            [&format!("{name} ready"), "1 open, 1 in all, 0 refused", "1 connections captured", "SAMPLE EVIDENCE"]
        {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        let status = json(host, &["status", "--json"]);
        let endpoint = &status[0]["endpoints"][0];
        assert_eq!((&endpoint["side"], &endpoint["mode"]), (&side.into(), &"netfilter".into()));
        assert_eq!(endpoint["counters"]["bytes_up"], 21);

        let all = json(host, &["connections", "--json"]);
        let shown = &all[name]["connections"][0];
        assert_eq!((&shown["state"], &shown["side"]), (&"relay".into(), &side.into()), "{all}");
        assert!(shown["src"].as_str().is_some_and(|src| src.starts_with("198.51.100.2:")), "{all}");
        assert_eq!(shown["dst"], "203.0.113.2:8080", "{all}");
        assert_eq!(shown["bytes_up"], 21);
        let text = run_tngctl(host, &["connections"]).expect_ok();
        assert!(text.contains("203.0.113.2:8080") && text.contains("relay"), "{text}");
    }
    assert_eq!(json(&world.client, &["connections", "--json"])["in"]["connections"][0]["tee"], "sample");
    for (tng, side) in [(&into, "ingress"), (&out, "egress")] {
        let metrics = parsed_metrics(tng);
        assert!(metrics.contains(&format!("tng_connections_active {side}  1\n")), "{metrics}");
        assert!(metrics.contains(&format!("tng_relayed_bytes_total {side} up 21\n")), "{metrics}");
        assert!(metrics.contains(&format!("tng_handshake_duration_seconds_count {side}  1\n")), "{metrics}");
    }

    // A client's end alone is a half-close: the service ends too.
    client.close(conn);
    server.close(service);
    for tng in [&into, &out] {
        wait_for("the connection ends", Duration::from_secs(5), || {
            tng.ctl(&["status"]).expect_ok().contains("0 open, 1 in all")
        });
    }

    // The keeper that would put it back stands still, so the operator sees what is missing.
    into.freeze_guard();
    world.client.sh("nft delete table inet tng_in");
    assert_eq!(exit(&world.client, &["status"]), 1, "rules are missing");
    let text = run_tngctl(&world.client, &["status"]).stdout;
    assert!(text.contains("DEGRADED") && text.contains("tng_in"), "{text}");
    assert_eq!(exit(&world.server, &["status"]), 0, "the other host is healthy");
    assert!(out.stop().success());
    assert_eq!(exit(&world.server, &["status"]), 3, "stopped");
}
