//! `tngctl status` beyond the whole instance: what is left of one, what machines read, what an operator is warned of.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use super::lab::{TO_SERVER, ingress};
use super::netns::{Parts, World, tngctl, wait_for};
use super::tools::{ctl, daemon, expect, write};

#[test]
fn what_is_left_of_an_instance_is_named_with_the_way_out() {
    let world = World::new();
    let host = &world.client;
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    let mut guard = parts.guard();
    for args in [&["status"][..], &["status", "in"]] {
        expect(&ctl(host, args), 3, &["instance in is guarded only", "systemctl start tng@in", "stop tng-guard@in"]);
    }
    parts.net_up();
    expect(&ctl(host, &["status"]), 3, &["the rules of in are up and refuse captured traffic", "tngd net down in"]);
    // Beside one that runs it is no fault of that one.
    let other = Parts::new(
        host,
        "other",
        &ingress(&TO_SERVER.replace("203.0.113", "192.0.2").replace("2001:db8:2", "2001:db8:7")),
    );
    other.net_up();
    let _guard = other.guard();
    let serve = other.serve();
    wait_for("the other is healthy", Duration::from_secs(10), || ctl(host, &["status", "other"]).ok());
    expect(&ctl(host, &["status"]), 0, &["other ready", "the rules of in are up"]);
    assert!(serve.stop().success());
    other.net_down();
    parts.net_down();
    guard.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(guard.wait(Duration::from_secs(10)).success(), "{}", guard.output());
    expect(&ctl(host, &["status", "in"]), 3, &["instance in is not running"]);
    assert!(!ctl(host, &["status", "in"]).stderr.contains("guarded"), "nothing is left");
}

#[test]
fn taking_the_rules_from_an_instance_that_runs_is_warned_of() {
    let world = World::new();
    let host = &world.client;
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    let file = write(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    let quiet = daemon(host, &["net", "down", &file], &[]);
    expect(&quiet, 0, &[]);
    assert_eq!(quiet.stderr, "", "nothing runs");
    parts.net_up();
    let serve = parts.serve();
    let unguarded = daemon(host, &["net", "down", &file], &[]);
    expect(&unguarded, 0, &["warning: instance in is running", "plaintext", "tngd net up in"]);
    parts.net_up();
    let _guard = parts.guard();
    expect(&daemon(host, &["net", "down", &file], &[]), 0, &["its guard refuses that traffic"]);
    parts.net_up();
    // As the socket unit asks for it when it stops.
    let unit = daemon(host, &["net", "down", "--unless-shutdown", &file], &[]);
    assert!(!unit.stderr.contains("warning: instance"), "{}", unit.stderr);
    // Here no manager can say that a stop was asked for.
    assert!(!unit.ok() && host.sh("nft list tables").contains("tng_in"), "{}", unit.stderr);
    assert!(serve.stop().success());
}

#[test]
fn a_watched_status_is_one_object_a_line_for_machines() {
    let world = World::new();
    let host = &world.client;
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    let serve = parts.serve();
    let mut watch = host.command(tngctl(), &["status", "--json", "--watch"]);
    let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null()).spawn().expect("tngctl");
    let lines = BufReader::new(watch.stdout.take().expect("stdout")).lines();
    let lines: Vec<String> = lines.take(2).map(|line| line.expect("line")).collect();
    let _ = watch.kill();
    let _ = watch.wait();
    for line in &lines {
        assert!(!line.contains('\x1b'), "{line:?}");
        let object: serde_json::Value = serde_json::from_str(line).expect("one object");
        assert_eq!(object["instances"][0]["instance"], "in", "{line}");
        assert!(object["time"].as_u64() > Some(1_700_000_000) && object["errors"].is_array(), "{line}");
    }
    let mut watch = host.command(tngctl(), &["status", "--watch"]);
    let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null()).spawn().expect("tngctl");
    let mut first = String::new();
    BufReader::new(watch.stdout.take().expect("stdout")).read_line(&mut first).expect("line");
    let _ = watch.kill();
    let _ = watch.wait();
    assert!(first.starts_with("in "), "no codes of a terminal in a pipe: {first:?}");
    assert!(serve.stop().success());
    parts.net_down();
}
