//! What the service manager is told, and how a guard ends.

use nix::sys::signal::Signal;

use super::lab::{Lab, TO_SERVER, ingress};
use super::manager::{Manager, SOON};
use super::netns::{Parts, traces, wait_for, wait_until};

#[test]
fn the_status_says_what_is_guarded_and_how_often_rules_were_restored() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait("note STATUS=guarding in", 1);
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    for times in ["1 time,", "2 times,"] {
        host.sh("nft flush ruleset");
        manager.wait_said(&format!("note STATUS=guarding in; restored rules {times} last "));
    }
    parts.net_down();
    manager.end(Signal::SIGTERM);
    manager.wait("note STOPPING=1", 1);
    manager.drop_store();
    wait_for("the table goes with the manager's copy", SOON, || traces(host).is_empty());
}

#[test]
fn an_abstract_notification_socket_is_told_too_and_keeps_the_table() {
    let lab = Lab::new();
    let mut manager = Manager::at("@tng-guard-test", &lab.world.client, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait("note STATUS=guarding in", 1);
    manager.wait("note FDSTORE=1", 1);
    manager.end(Signal::SIGTERM);
    manager.wait("note STOPPING=1", 1);
}

#[test]
fn the_watchdog_is_fed_until_the_guard_hangs() {
    const EVERY: &str = "WATCHDOG_USEC=400000";
    if !cfg!(feature = "failpoints") {
        panic!("run with --features failpoints (make test does)");
    }
    let lab = Lab::new();
    let mut manager = Manager::new(&lab.world.client, "in", &ingress(TO_SERVER));
    manager.launch(EVERY);
    manager.wait("note WATCHDOG=1", 4);
    manager.end(Signal::SIGTERM);
    let before = manager.count("note WATCHDOG=1");
    manager.launch(&format!("{EVERY} TNG_FAILPOINT=guard.look=stall"));
    manager.wait("note READY=1", 2);
    let fed = wait_until(SOON / 5, || manager.count("note WATCHDOG=1") > before + 1);
    assert!(!fed, "a hung guard says that it is well: {:#?}", manager.said());
}

#[test]
fn a_start_that_fails_says_why_and_with_which_status() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let cases = [
        ("nonsense = 1\n".to_owned() + &ingress(TO_SERVER), "exit 78", "in.toml:1:1"),
        (
            ingress(&TO_SERVER.replace(" }", ", cgroup = \"tng.slice/tng-absent.slice\" }")),
            "exit 1",
            "systemctl start tng-absent.slice",
        ),
    ];
    for (toml, exit, said) in cases {
        let mut manager = Manager::new(host, "in", &toml);
        manager.launch("");
        manager.wait(exit, 1);
        manager.wait_said(said);
        assert_eq!(manager.count("note READY=1"), 0);
        assert_eq!(traces(host), "", "{said}");
    }
}
