//! A guard of an instance that captures nothing yet.

use nix::sys::signal::Signal;

use super::lab::{Lab, TO_SERVER, ingress, ingress_mapping};
use super::manager::Manager;
use super::netns::{Connect, Host, Parts, Tng, traces};
use super::table::Fate;

fn mapping() -> String {
    ingress_mapping("127.0.0.1:7000", "203.0.113.2:8080")
}

fn guard_table(host: &Host) -> String {
    host.run("nft", &["list", "table", "inet", "tngguard_in"]).stdout
}

#[test]
fn without_captures_it_is_ready_and_holds_nothing() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &mapping());
    manager.start();
    manager.wait("note STATUS=nothing to guard yet", 1);
    assert_eq!(guard_table(host), "");
    assert_eq!(manager.store(), Vec::<String>::new());
    manager.end(Signal::SIGTERM);
    assert_eq!(traces(host), "");
}

#[test]
fn its_end_leaves_the_sockets_of_a_running_instance_alone() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &mapping());
    manager.start();
    let parts = Parts::new(host, "in", &mapping());
    let serve = parts.serve();
    manager.end(Signal::SIGTERM);
    assert!(serve.is_ready(), "the control socket is gone: {}", serve.output());
    assert!(serve.stop().success());
    parts.net_down();
    assert_eq!(traces(host), "");
}

#[test]
fn captures_that_went_while_it_was_dead_are_guarded_no_more() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    assert_ne!(guard_table(host), "");
    // Stopped and not killed: the endpoint's id is free, as no rules are up.
    manager.end(Signal::SIGTERM);
    assert_ne!(guard_table(host), "", "a restart keeps it");
    manager.write_config(&mapping());
    manager.start();
    manager.wait("note FDSTOREREMOVE=1", 1);
    super::netns::wait_for("the table goes", super::manager::SOON, || guard_table(host).is_empty());
    assert_eq!(manager.store(), Vec::<String>::new());
}

#[test]
fn a_run_of_mappings_alone_has_a_guard_for_the_captures_that_a_reload_brings() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let tng = Tng::start(host, "in", &mapping());
    assert_eq!(guard_table(host), "");
    tng.write_config(&ingress(TO_SERVER));
    let out = tng.ctl(&["reload", "in"]);
    assert!(out.ok() && !format!("{}{}", out.stdout, out.stderr).contains("no guard"), "{out:?}");
    assert!(guard_table(host).contains("203.0.113.0/24"), "{}", guard_table(host));
    tng.write_config(&mapping());
    tng.ctl(&["reload", "in"]).expect_ok();
    assert!(!guard_table(host).contains("203.0.113.0/24"), "{}", guard_table(host));
    assert!(tng.stop().success());
    assert_eq!(traces(host), "");
}

#[test]
fn a_run_of_mappings_alone_works_without_the_right_to_change_rules() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let drop = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    let tng = Tng::start_through(&drop, host, "in", &mapping());
    assert_eq!(tng.keepers(), Vec::<i32>::new());
    let conn = lab.client.connect("127.0.0.1", &Connect { port: 7000, ..Connect::default() }).expect("connect");
    assert_eq!(super::lab::ask(&lab.client, conn, &super::netns::fresh_hex()), Fate::Delivered, "{}", tng.output());
    assert!(tng.stop().success());
    assert_eq!(traces(host), "");
}
