//! Killed, or failed, in the middle of a reload.

use super::lab::{Flow, Lab, PORT, TO_SERVER, ingress};
use super::netns::{Output, Tng, kernel_state, run, tngctl};
use super::scene::*;
use super::table::Fate;

/// `tngctl reload` with a failpoint in that process.
fn reload(lab: &Lab, failpoint: Option<(&str, &str)>) -> Output {
    let mut command = lab.world.client.command(tngctl(), &["reload", "in"]);
    command.envs(failpoint.map(|(point, action)| fail(point, action)));
    run(command)
}

/// A connection of before goes on in its tunnel.
fn goes_on(lab: &Lab, flow: Flow<'_>) -> bool {
    let seen = lab.say(flow);
    seen.fate == Fate::Delivered && seen.plaintext.is_none()
}

#[test]
fn a_reload_that_is_killed_leaves_the_old_configuration_and_the_next_one_works() {
    let lab = lab();
    let _egress = start_egress(&lab);
    for point in ["reload.guard", "reload.rules", "net-up.nft", "net-up.record"] {
        let tng = Tng::start(&lab.world.client, "in", &narrow());
        let flow = lab.flow(super::netns::Family::V4);
        tng.write_config(&wide());
        assert!(!reload(&lab, Some((point, "kill"))).ok(), "{point}");
        let seen = exchange(&lab, PORT);
        assert!(tunnelled(&seen), "{point}: {seen:?}\n{}", tng.output());
        reload(&lab, None).expect_ok();
        for port in [PORT, OTHER_PORT] {
            let seen = exchange(&lab, port);
            assert!(tunnelled(&seen), "the reload after {point}, port {port}: {seen:?}\n{}", tng.output());
        }
        assert!(goes_on(&lab, flow), "{point}");
        lab.client.close(flow.conn);
        stops_clean(&lab, tng, point);
    }
}

#[test]
fn a_data_plane_killed_by_a_reload_leaves_refusal() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let mut tng = spawn(&lab, "reload.daemon", "kill");
    tng.wait_ready();
    tng.write_config(&wide());
    let out = reload(&lab, None);
    assert_eq!(out.status.code(), Some(1), "{}", out.stderr);
    assert!(out.stderr.contains("[daemon-unreachable]"), "{}", out.stderr);
    assert_eq!(tng.wait().code(), Some(1), "{}", tng.output());
    assert!(tng.output().contains("[daemon-killed]"), "{}", tng.output());
    wait_guard_gone(&lab.world.client);
    let seen = exchange(&lab, PORT);
    assert!(closed(&seen), "{seen:?}");
    recovers(&lab, "reload.daemon");
}

#[test]
fn a_reload_that_fails_at_any_step_changes_nothing() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let tng = Tng::start(&lab.world.client, "in", &narrow());
    let flow = lab.flow(super::netns::Family::V4);
    let before = kernel_state(&lab.world.client);
    tng.write_config(&wide());
    for point in
        ["reload.guard", "reload.rules", "net-up.rule", "net-up.route", "net-up.nft", "net-up.record", "net-up.done"]
    {
        let out = reload(&lab, Some((point, "error")));
        assert_eq!(out.status.code(), Some(1), "{point}: {}", out.stderr);
        assert!(out.stderr.contains(&format!("failpoint {point} [failpoint]")), "{}", out.stderr);
        assert_eq!(kernel_state(&lab.world.client), before, "{point}");
    }
    let seen = exchange(&lab, PORT);
    assert!(tunnelled(&seen), "{seen:?}");
    assert!(goes_on(&lab, flow));
    stops_clean(&lab, tng, "failed reloads");
}

#[test]
fn a_data_plane_that_refuses_a_reload_goes_on_as_before() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let tng = spawn(&lab, "reload.daemon", "error");
    tng.wait_ready();
    let flow = lab.flow(super::netns::Family::V4);
    let before = kernel_state(&lab.world.client);
    tng.write_config(&wide());
    let out = reload(&lab, None);
    assert_eq!(out.status.code(), Some(1), "{}", out.stderr);
    assert!(out.stderr.contains("failpoint reload.daemon [reload-refused]"), "{}", out.stderr);
    assert_eq!(kernel_state(&lab.world.client), before);
    let status = tng.ctl(&["status", "in"]);
    assert!(status.stdout.contains("last reload was refused"), "{}", status.stdout);
    let seen = exchange(&lab, PORT);
    assert!(tunnelled(&seen) && goes_on(&lab, flow), "{seen:?}");
    stops_clean(&lab, tng, "a refused reload");
}

/// From a mapping to a capture and back: rules that were not there go again, whether by failure or by reload.
#[test]
fn captures_that_a_reload_brings_go_with_a_failure_or_the_next_reload() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let mapping = super::lab::ingress_mapping("127.0.0.1:7000", "203.0.113.2:8080");
    let tng = Tng::start(&lab.world.client, "in", &mapping);
    let bare = kernel_state(&lab.world.client);
    tng.write_config(&narrow());
    let out = reload(&lab, Some(("net-up.record", "error")));
    assert!(out.stderr.contains("[failpoint]"), "{}", out.stderr);
    assert_eq!(kernel_state(&lab.world.client), bare, "rules of a reload that failed");
    reload(&lab, None).expect_ok();
    let seen = exchange(&lab, PORT);
    assert!(tunnelled(&seen), "captured by the reload: {seen:?}");
    stops_clean(&lab, tng, "captures that only a reload brought");

    let tng = Tng::start(&lab.world.client, "in", &narrow());
    tng.write_config(&mapping);
    reload(&lab, None).expect_ok();
    let state = kernel_state(&lab.world.client);
    // Chains for connections that are still open may stay; what was captured is named in neither table.
    assert!(!state.contains("203.0.113.0/24"), "still captured or refused: {state}");
    tng.write_config(&narrow());
    reload(&lab, None).expect_ok();
    let seen = exchange(&lab, PORT);
    assert!(tunnelled(&seen), "captured again: {seen:?}");
    stops_clean(&lab, tng, "there and back");
}

/// The ingress for the service's second port, by an endpoint of its own.
fn other() -> String {
    ingress(&TO_SERVER.replace("8080", "9090")).replace("name = \"in\"", "name = \"other\"")
}

/// Both. What the whole instance has stands once, before the first endpoint.
fn both() -> String {
    let other = other();
    let (_, endpoint) = other.split_once("[[ingress]]").expect("an endpoint");
    format!("{}[[ingress]]{endpoint}", narrow())
}

/// A service outside of the egress's reach, so that plaintext would be served.
fn bare_service(lab: &Lab) {
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), OTHER_PORT, serde_json::json!({}));
    }
}

/// Steps of a reload that drops a capture, and whether the data plane has the new configuration by then.
const STEPS: &[(&str, bool)] = &[
    ("reload.guard", false),
    ("reload.rules", false),
    ("net-up.nft", false),
    ("net-up.record", false),
    ("net-up.done", false),
    ("reload.narrow", true),
    ("reload.narrowed", true),
];

/// Without the second service's egress, so that what is not captured is served in plaintext.
#[test]
fn a_reload_that_drops_a_capture_and_is_killed_at_any_step_leaves_it_closed() {
    let lab = lab();
    bare_service(&lab);
    for with_endpoint in [false, true] {
        let old = if with_endpoint { both() } else { wide() };
        for (point, switched) in STEPS {
            let tng = Tng::start(&lab.world.client, "in", &old);
            tng.write_config(&narrow());
            assert!(!reload(&lab, Some((point, "kill"))).ok(), "{point}");
            let seen = exchange(&lab, OTHER_PORT);
            assert!(closed(&seen), "{point}, endpoint {with_endpoint}: {seen:?}\n{}", tng.output());
            if *switched && with_endpoint {
                assert!(seen.iter().all(|s| s.fate == Fate::Refused), "{point}: told at once: {seen:?}");
            }
            reload(&lab, None).expect_ok();
            let seen = exchange(&lab, OTHER_PORT);
            assert!(
                direct(&seen),
                "{point}: what is captured no more after the next reload: {seen:?}\n{}",
                tng.output()
            );
            stops_clean(&lab, tng, point);
        }
    }
}

#[test]
fn a_reload_that_drops_a_capture_and_fails_leaves_it_served_or_refused_and_says_which() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let tng = Tng::start(&lab.world.client, "in", &both());
    let before = kernel_state(&lab.world.client);
    tng.write_config(&narrow());
    for (point, _) in STEPS.iter().filter(|(_, switched)| !switched) {
        let out = reload(&lab, Some((point, "error")));
        assert_eq!(out.status.code(), Some(1), "{point}: {}", out.stderr);
        assert_eq!(kernel_state(&lab.world.client), before, "{point}");
        let seen = exchange(&lab, OTHER_PORT);
        assert!(tunnelled(&seen), "{point}: {seen:?}");
    }
    let out = reload(&lab, Some(("reload.narrow", "error")));
    assert_eq!(out.status.code(), Some(1), "{}", out.stderr);
    assert!(out.stderr.contains("the new configuration is in force"), "{}", out.stderr);
    assert!(out.stderr.contains("try again: tngctl reload in"), "{}", out.stderr);
    let seen = exchange(&lab, OTHER_PORT);
    assert!(closed(&seen), "{seen:?}");
    reload(&lab, None).expect_ok();
    let state = kernel_state(&lab.world.client);
    assert!(!state.contains("_new") && !state.contains("c_other_"), "{state}");
    stops_clean(&lab, tng, "reloads that failed");
}

/// One endpoint's capture goes to another: nobody may meet the wire in between, and the old connection goes on.
#[test]
fn a_reload_that_swaps_captures_never_lets_a_connection_out() {
    let lab = lab();
    let _egress = start_egress(&lab);
    let tng = Tng::start(&lab.world.client, "in", &both());
    let flow = lab.flow(super::netns::Family::V4);
    let swapped = both().replace("8080", "1").replace("9090", "8080").replace("port = 1 ", "port = 9090 ");
    assert_ne!(swapped, both());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let asked = s.spawn(|| {
            let mut all = Vec::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                all.extend([exchange(&lab, PORT), exchange(&lab, OTHER_PORT)].concat());
            }
            all
        });
        for toml in [&swapped, &both(), &swapped, &both()] {
            tng.write_config(toml);
            reload(&lab, None).expect_ok();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let seen = asked.join().expect("the asking thread");
        assert!(seen.iter().all(|s| s.plaintext.is_none()), "{seen:?}");
    });
    for port in [PORT, OTHER_PORT] {
        let seen = exchange(&lab, port);
        assert!(tunnelled(&seen), "{port}: {seen:?}\n{}", tng.output());
    }
    // Which of the two endpoints is right for which port is open until a reload has come to its end.
    for (toml, point) in [(&swapped, "net-up.done"), (&both(), "reload.narrow")] {
        tng.write_config(toml);
        assert!(!reload(&lab, Some((point, "kill"))).ok(), "{point}");
        for port in [PORT, OTHER_PORT] {
            let seen = exchange(&lab, port);
            let refused = seen.iter().all(|s| s.fate == Fate::Refused && s.plaintext.is_none());
            assert!(refused, "{point}, {port}: {seen:?}");
        }
        assert!(goes_on(&lab, flow), "{point}: what is open goes on");
        reload(&lab, None).expect_ok();
        for port in [PORT, OTHER_PORT] {
            let seen = exchange(&lab, port);
            assert!(tunnelled(&seen), "after {point}, {port}: {seen:?}\n{}", tng.output());
        }
    }
    stops_clean(&lab, tng, "swaps");
}
