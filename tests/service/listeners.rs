//! Listeners that come and go by a reload of `tngd run`, whose data plane may bind none of them itself.

use std::net::TcpListener;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::lab::{Lab, ask, ingress_mapping};
use super::manager::SOON;
use super::netns::{Connect, Fault, Tng, fresh_hex, traces, wait_for};
use super::table::Fate;

fn mapping(port: u16) -> String {
    ingress_mapping(&format!("127.0.0.1:{port}"), "203.0.113.2:8080")
}

/// A second endpoint beside the first.
fn with(config: &str, name: &str, port: u16) -> String {
    let second = mapping(port).replace("name = \"map\"", &format!("name = \"{name}\""));
    let second = &second[second.find("[[ingress]]").expect("endpoint")..];
    format!("{config}{second}")
}

fn open(lab: &Lab, port: u16) -> Result<u64, Fault> {
    lab.client.connect("127.0.0.1", &Connect { port, ..Connect::default() })
}

fn served(lab: &Lab, port: u16) -> bool {
    open(lab, port).is_ok_and(|conn| ask(&lab.client, conn, &fresh_hex()) == Fate::Delivered)
}

/// All connections that an endpoint has counted.
fn total(tng: &Tng<'_>, endpoint: &str) -> u64 {
    let text = tng.ctl(&["status", "map", "--json"]).stdout;
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let endpoints = json[0]["endpoints"].as_array().expect("endpoints");
    let found = endpoints.iter().find(|e| e["name"] == endpoint).expect("endpoint");
    found["counters"]["connections_total"].as_u64().expect("count")
}

#[test]
fn a_reload_adds_a_low_port_and_removes_another_while_connections_go_on() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    host.sysctl(&[("net/ipv4/ip_unprivileged_port_start", "1024")]);
    let tng = Tng::spawn(host, "map", &mapping(7000), &["--user", "65534"]);
    tng.wait_ready();
    let old = open(&lab, 7000).expect("connect");
    assert_eq!(ask(&lab.client, old, &fresh_hex()), Fate::Delivered, "{}", tng.output());
    assert_eq!(total(&tng, "map"), 1);

    tng.write_config(&with(&mapping(443), "two", 7001));
    tng.signal(Signal::SIGHUP);
    wait_for("the reload is done", SOON, || tng.output().contains("reloaded"));
    assert!(served(&lab, 443) && served(&lab, 7001), "{}", tng.output());
    assert_eq!(open(&lab, 7000), Err(Fault("ECONNREFUSED".into())), "the removed listener");
    assert_eq!(ask(&lab.client, old, &fresh_hex()), Fate::Delivered, "the connection of before");
    assert_eq!((total(&tng, "map"), total(&tng, "two")), (2, 1), "counters go on");

    tng.write_config(&with(&mapping(443), "three", 7003));
    tng.ctl(&["reload", "map"]).expect_ok();
    assert!(served(&lab, 443) && served(&lab, 7003), "{}", tng.output());
    assert_eq!(open(&lab, 7001), Err(Fault("ECONNREFUSED".into())), "the removed endpoint");
    assert_eq!(total(&tng, "map"), 3);
    assert!(tng.stop().success());
    assert_eq!(traces(host), "");
}

#[test]
fn a_reload_whose_new_port_is_taken_changes_nothing() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let tng = Tng::start(host, "map", &mapping(7000));
    let _taken = host.inside(|| TcpListener::bind("127.0.0.1:7002").expect("bind"));
    tng.write_config(&with(&mapping(7001), "two", 7002));
    let out = tng.ctl(&["reload", "map"]);
    assert_eq!(out.status.code(), Some(1), "{}", out.stderr);
    for part in ["127.0.0.1:7002", "ss -tanp 'sport = 7002'", "[listen-port-taken]"] {
        assert!(out.stderr.contains(part), "no {part:?} in {}", out.stderr);
    }
    tng.signal(Signal::SIGHUP);
    wait_for("the refusal", SOON, || tng.output().contains("reload failed, the old configuration goes on"));
    assert!(served(&lab, 7000), "the old listener");
    assert_eq!(open(&lab, 7001), Err(Fault("ECONNREFUSED".into())), "half of the new configuration");
    assert!(tng.stop().success());
    assert_eq!(traces(host), "");
}
