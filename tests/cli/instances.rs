//! Instances that are there already, are not there, or are not whole.

use std::net::TcpListener;
use std::time::Duration;

use super::lab::{Lab, TO_SERVER, ingress, ingress_mapping};
use super::netns::{Parts, Tng, World, run, traces, wait_for};
use super::tools::{ctl, daemon, expect, write};

#[test]
fn a_taken_listener_port_is_named_with_the_way_to_see_who_has_it() {
    let world = World::new();
    let host = &world.client;
    let _taken = host.inside(|| TcpListener::bind("127.0.0.1:7000").expect("bind"));
    let mapping = write(host, "map", &ingress_mapping("127.0.0.1:7000", "203.0.113.2:8080"));
    let hint = "ss -tanp 'sport = 7000'";
    expect(&daemon(host, &["run", &mapping], &[]), 1, &["127.0.0.1:7000", hint, "[listen-port-taken]"]);
    assert_eq!(traces(host), "");
    let fixed = ingress(TO_SERVER).replace("[ingress.netfilter]\n", "[ingress.netfilter]\nlisten_port = 7000\n");
    let file = write(host, "in", &fixed);
    expect(&daemon(host, &["run", &file], &[]), 1, &[hint, "[listen-port-taken]"]);
    assert_eq!(traces(host), "", "rules of a start without a listener");
}

#[test]
fn a_second_run_and_an_overlap_are_refused_and_the_first_goes_on() {
    let world = World::new();
    let host = &world.client;
    let first = Tng::start(host, "in", &ingress(TO_SERVER));
    let file = write(host, "in", &ingress(TO_SERVER));
    expect(&daemon(host, &["run", &file], &[]), 1, &["running already", "tngctl status in", "[already-running]"]);
    let other = write(host, "other", &ingress(TO_SERVER));
    for args in [&["run"][..], &["net", "up"], &["guard"]] {
        expect(&daemon(host, &[args, &[&other]].concat(), &[]), 78, &["in.toml", "other.toml"]);
    }
    assert!(first.is_ready());
    let tables = host.sh("nft list tables");
    assert!(tables.contains("tng_in") && tables.contains("tngguard_in") && !tables.contains("other"), "{tables}");
    assert!(first.stop().success());
    assert_eq!(traces(host), "");
}

#[test]
fn net_down_works_twice_and_without_a_good_file() {
    let world = World::new();
    let host = &world.client;
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    assert!(!traces(host).is_empty());
    let file = write(host, "in", "this is = not [toml");
    for _ in 0..2 {
        daemon(host, &["net", "down", &file], &[]).expect_ok();
        assert_eq!(traces(host), "");
    }
    std::fs::remove_file(&file).expect("remove");
    daemon(host, &["net", "down", "in"], &[]).expect_ok();
}

#[test]
fn status_tells_absent_whole_and_broken_apart() {
    let lab = Lab::new();
    let host = &lab.world.client;
    expect(&ctl(host, &["status"]), 3, &["no instance is running"]);
    expect(&ctl(host, &["status", "in"]), 3, &["instance in is not running"]);
    expect(&ctl(host, &["reload", &write(host, "in", &ingress(TO_SERVER))]), 3, &["not running", "[not-running]"]);
    assert_eq!(traces(host), "", "of a reload without an instance");
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    let mut guard = parts.guard();
    parts.net_up();
    let serve = parts.serve();
    wait_for("a whole instance is healthy", Duration::from_secs(10), || ctl(host, &["status", "in"]).ok());
    guard.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(guard.wait(Duration::from_secs(10)).success(), "{}", guard.output());
    expect(&ctl(host, &["status", "in"]), 1, &["the guard is not running; start it"]);
    host.sh("nft delete table inet tng_in");
    expect(&ctl(host, &["status", "in"]), 1, &["rules are missing: table inet tng_in does not exist"]);
    parts.net_up();
    host.sh("ip -4 rule del pref 565");
    expect(&ctl(host, &["status", "in"]), 1, &["missing: "]);
    assert!(serve.stop().success());
    parts.net_down();
    assert_eq!(traces(host), "");
}

#[test]
fn rules_prints_what_is_applied_and_nft_takes_it() {
    let world = World::new();
    let host = &world.client;
    let file = write(host, "in", &ingress(TO_SERVER));
    let preview = ctl(host, &["rules", &file]).expect_ok();
    assert_eq!(traces(host), "", "a preview records nothing");
    let text = host.config_dir().with_file_name("preview.nft");
    std::fs::write(&text, &preview).expect("write");
    run(host.command("nft", &["-c", "-f", &text.to_string_lossy()])).expect_ok();
    let tng = Tng::start(host, "in", &ingress(TO_SERVER));
    assert_eq!(ctl(host, &["rules", &file]).expect_ok(), preview, "before the start and after it");
    let applied = host.sh("nft -s list ruleset");
    // The same text loaded on another host lists the same; there no process owns the guard's table.
    let elsewhere = preview.lines().filter(|l| l.trim() != "flags owner;").collect::<Vec<_>>().join("\n");
    world.server.nft(&elsewhere);
    let listed = world.server.sh("nft -s list ruleset");
    // nft names the owner's program behind the brace, and lists tables in the order of loading.
    let plain = |text: &str| {
        let lines = text.lines().filter(|l| !matches!(l.trim(), "" | "flags owner"));
        let text: String = lines.map(|l| format!("\n{}", l.split(" # progname").next().unwrap_or(l))).collect();
        let mut tables: Vec<String> = text.split("\ntable ").map(|t| t.trim().to_owned()).collect();
        tables.sort();
        tables
    };
    assert_eq!(plain(&listed), plain(&applied));
    assert!(tng.stop().success());
}
