//! Killed, or failed, between the first step and READY.

use super::lab::PORT;
use super::netns::{Tng, kernel_state, traces};
use super::scene::{closed, direct, exchange, has_table, lab, recovers, spawn, start_egress, wait_guard_gone};

/// The steps of a start in their order, and whether the capture table is in the kernel by then.
const STEPS: &[(&str, bool)] = &[
    ("guard.start", false),
    ("guard.loaded", false),
    ("net-up.rule", false),
    ("net-up.route", false),
    ("net-up.nft", false),
    ("net-up.record", true),
    ("net-up.done", true),
    ("serve.ready", true),
];

/// Before the table is there, a start has changed nothing for any application; from then on there is only refusal.
#[test]
fn a_first_start_killed_at_any_step_leaves_what_refuses_or_nothing() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    for (point, table) in STEPS {
        let mut killed = spawn(&lab, point, "kill");
        let status = killed.wait();
        assert!(!status.success(), "{point}: {status}\n{}", killed.output());
        wait_guard_gone(host);
        assert_eq!(has_table(host), *table, "{point}: the capture table");
        if *table {
            let seen = exchange(&lab, PORT);
            assert!(closed(&seen), "{point}: {seen:?}");
        } else {
            // The egress refuses plaintext, so here it is enough that no half a capture is left.
            assert!(!kernel_state(host).contains("tproxy"), "{point}: {}", kernel_state(host));
        }
        recovers(&lab, point);
    }
}

#[test]
fn a_restart_over_rules_that_a_kill_left_refuses_at_every_step() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    let mut first = Tng::start(host, "in", &super::scene::narrow());
    first.kill();
    for (point, _) in STEPS {
        assert!(has_table(host), "{point}: the table that the last kill left");
        let mut killed = spawn(&lab, point, "kill");
        assert!(!killed.wait().success(), "{point}");
        wait_guard_gone(host);
        let seen = exchange(&lab, PORT);
        assert!(closed(&seen), "{point}: {seen:?}");
    }
    recovers(&lab, "all of them");
}

#[test]
fn a_start_that_fails_at_any_step_leaves_the_host_as_it_was() {
    let lab = lab();
    let host = &lab.world.client;
    let before = kernel_state(host);
    for (point, _) in STEPS.iter().filter(|(point, _)| *point != "serve.ready") {
        let mut failed = spawn(&lab, point, "error");
        let status = failed.wait();
        assert_eq!(status.code(), Some(1), "{point}: {}", failed.output());
        assert!(failed.output().contains(&format!("failpoint {point} [failpoint]")), "{}", failed.output());
        assert_eq!(kernel_state(host), before, "{point}");
        assert_eq!(traces(host), "", "{point}");
    }
    let seen = exchange(&lab, PORT);
    assert!(direct(&seen), "without tng the path is open: {seen:?}");
}

#[test]
fn a_restart_that_fails_at_any_step_keeps_refusing() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let host = &lab.world.client;
    let mut first = Tng::start(host, "in", &super::scene::narrow());
    first.kill();
    for (point, _) in STEPS.iter().filter(|(point, _)| *point != "serve.ready") {
        let mut failed = spawn(&lab, point, "error");
        assert_eq!(failed.wait().code(), Some(1), "{point}: {}", failed.output());
        assert!(has_table(host), "{point}: a failed restart opened the path");
    }
    let seen = exchange(&lab, PORT);
    assert!(closed(&seen), "{seen:?}");
    recovers(&lab, "failed restarts");
}
