//! The table outlives its guard, and a change leaves no gap.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lab::{Lab, TO_SERVER, ingress};
use super::manager::{Manager, SOON};
use super::netns::{Connect, Host, Parts, traces, wait_for};
use super::table::Fate;

const TABLE: &str = "inet tngguard_in";

/// Captures the service on a second port as well.
pub fn wide() -> String {
    ingress(&format!("{TO_SERVER}, {}", TO_SERVER.replace("8080", "9090")))
}

/// The table's number, which a table that was removed in between would not have again.
fn handle(host: &Host) -> String {
    let text = host.sh(&format!("nft -a list table {TABLE}"));
    let after = text.lines().next().and_then(|line| line.split("# handle ").nth(1)).expect("handle");
    after.split(' ').next().expect("number").to_owned()
}

fn tables(host: &Host) -> String {
    host.run("nft", &["list", "tables"]).stdout
}

fn has_table(host: &Host) -> bool {
    tables(host).lines().any(|line| line == format!("table {TABLE}"))
}

fn no_stranger_removes_it(host: &Host) {
    assert!(!host.run("nft", &[&format!("delete table {TABLE}")]).ok(), "deleted by a stranger");
    host.sh("nft flush ruleset");
    assert!(host.sh(&format!("nft list table {TABLE}")).contains("protect_output"), "flushed by a stranger");
}

/// Looks all the while `f` runs, at the ruleset and with connections; returns how often.
fn never_without_guard(lab: &Lab, f: impl FnOnce()) -> usize {
    let host = &lab.world.client;
    let (over, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let now = tables(host);
                assert!(now.contains("tngguard_in"), "no guard and no stand-in: {now}");
                looks.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for seen in lab.each(|family| lab.exchange(family, &Connect::default())) {
                    assert!(seen.fate != Fate::Delivered && seen.plaintext.is_none(), "passed: {seen:?}");
                }
            }
        });
        struct Over<'a>(&'a AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _over = Over(&over);
        f();
    });
    looks.into_inner()
}

#[test]
fn a_killed_guard_leaves_its_table_and_the_next_one_takes_it_over_untouched() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    let first = handle(host);
    let looks = never_without_guard(&lab, || {
        // With its nft at first; the guards after it have none, as there was nothing to change.
        manager.end(Signal::SIGKILL);
        wait_for("nft ends with its input", SOON, || manager.nfts().is_empty());
        no_stranger_removes_it(host);
        for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGABRT] {
            manager.start();
            assert_eq!(handle(host), first, "{:#?}", manager.said());
            assert_eq!(manager.nfts(), Vec::<i32>::new(), "started though nothing changed");
            no_stranger_removes_it(host);
            manager.end(signal);
        }
        assert_eq!(handle(host), first);
        manager.wait_one_pair();
    });
    assert!(looks > 5, "{looks} looks");
    manager.drop_store();
    wait_for("without the manager's copy the table goes", SOON, || !has_table(host));
}

#[test]
fn a_guard_and_its_nft_killed_together_leave_the_table_too() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    let first = handle(host);
    for nft in manager.nfts() {
        kill(Pid::from_raw(nft), Signal::SIGKILL).expect("kill");
    }
    manager.end(Signal::SIGKILL);
    no_stranger_removes_it(host);
    manager.start();
    // The death of nft may have been seen before the guard died; then there is a new table by now.
    assert!(handle(host) >= first);
    no_stranger_removes_it(host);
}

#[test]
fn a_reload_after_a_crash_changes_the_table_without_a_gap() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    parts.net_up();
    let serve = parts.serve();
    manager.wait_one_pair();
    let first = handle(host);
    manager.end(Signal::SIGKILL);
    manager.start();
    assert_eq!(handle(host), first);
    let looks = never_without_guard(&lab, || {
        for toml in [wide(), ingress(TO_SERVER), wide()] {
            manager.write_config(&toml);
            let out = serve.ctl(&["reload", "in"]).expect_ok();
            assert!(!out.contains("no guard"), "{out}");
        }
    });
    assert!(looks > 5, "{looks} looks");
    let second = handle(host);
    assert_ne!(second, first, "only its own socket can change a table");
    let listing = host.sh(&format!("nft list table {TABLE}"));
    assert!(listing.contains("9090"), "{listing}");
    assert!(!tables(host).contains("_next"), "{}", tables(host));
    manager.wait_one_pair();
    manager.end(Signal::SIGKILL);
    no_stranger_removes_it(host);
    manager.start();
    assert_eq!(handle(host), second, "what the reload loaded is taken over");
    assert!(serve.stop().success());
    parts.net_down();
    manager.end(Signal::SIGTERM);
    manager.drop_store();
    wait_for("the table goes", SOON, || !has_table(host));
    assert_eq!(traces(host), "");
}

#[test]
fn a_file_that_changed_while_the_guard_was_dead_is_loaded_without_a_gap() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    let mut before = handle(host);
    never_without_guard(&lab, || {
        for toml in [wide(), ingress(TO_SERVER), wide()] {
            manager.end(Signal::SIGKILL);
            manager.write_config(&toml);
            manager.start();
            let now = handle(host);
            assert_ne!(now, before, "{:#?}", manager.said());
            before = now;
            manager.wait_one_pair();
        }
    });
    assert!(host.sh(&format!("nft list table {TABLE}")).contains("9090"));
    assert!(!tables(host).contains("_next"), "{}", tables(host));
}

#[test]
fn killed_between_the_old_table_and_the_new_one_the_stand_in_refuses() {
    if !cfg!(feature = "failpoints") {
        panic!("run with --features failpoints (make test does)");
    }
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    manager.end(Signal::SIGKILL);
    manager.write_config(&wide());
    never_without_guard(&lab, || {
        for point in ["guard.stand-in", "guard.let-go"] {
            for _ in 0..2 {
                let before = manager.count("exit ");
                manager.launch(&format!("TNG_FAILPOINT={point}=kill"));
                manager.wait("exit ", before + 1);
                assert!(tables(host).contains("tngguard_in_next"), "{point}: {}", tables(host));
                assert!(!host.run("nft", &[&format!("delete table {TABLE}_next")]).ok(), "{point}");
            }
        }
        manager.start();
        manager.wait_one_pair();
    });
    assert!(host.sh(&format!("nft list table {TABLE}")).contains("9090"));
    assert!(!tables(host).contains("_next"), "{}", tables(host));
    no_stranger_removes_it(host);
}

#[test]
fn a_killed_nft_is_replaced_without_a_gap() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mut manager = Manager::new(host, "in", &ingress(TO_SERVER));
    manager.start();
    manager.wait_one_pair();
    let (first, nft) = (handle(host), manager.nfts());
    assert_eq!(nft.len(), 1, "{nft:?}");
    never_without_guard(&lab, || {
        kill(Pid::from_raw(nft[0]), Signal::SIGKILL).expect("kill");
        manager.wait_said("guard-lost-nft");
        // Both in one transaction: the stand-in goes with the arrival of the new table.
        wait_for("a new table", SOON, || manager.store().first().is_some_and(|name| name == "guard-next"));
        wait_for("the stand-in goes", SOON, || has_table(host) && !tables(host).contains("_next"));
    });
    assert_ne!(handle(host), first);
    manager.wait_one_pair();
    no_stranger_removes_it(host);
}
