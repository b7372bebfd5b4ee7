//! SIGHUP to a bare `serve`: it takes what needs no root, and refuses the rest with a reason.

use nix::sys::signal::Signal;

use super::lab::{Lab, TO_SERVER, ingress_mapping};
use super::manager::{SOON, config, serve};
use super::netns::{Connect, Family, Parts, kernel_state, wait_for};
use super::table::Fate;

#[test]
fn a_changed_limit_is_taken_over_and_changed_captures_are_refused() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    parts.net_up();
    let (tng, notes) = serve(host, &[]);
    notes.wait("READY=1");
    let flow = lab.flow(Family::V4);
    tng.write_config(&format!("{}[ingress.limits]\nmax_connections = 1\n", config()));
    tng.signal(Signal::SIGHUP);
    notes.wait_count("READY=1", 2);
    let all = notes.all();
    let at = |start: &str| all.iter().rposition(|n| n.starts_with(start));
    assert!(at("RELOADING=1").is_some() && at("MONOTONIC_USEC=").is_some(), "{all:?}");
    assert!(at("RELOADING=1") < at("READY=1"), "{all:?}");
    let beyond = lab.exchange(Family::V4, &Connect::default());
    assert!(beyond.fate == Fate::Dropped && beyond.plaintext.is_none(), "beyond the new limit: {beyond:?}");
    lab.client.close(flow.conn);

    let before = kernel_state(host);
    tng.write_config(&config().replace(TO_SERVER, &TO_SERVER.replace("8080", "9090")));
    tng.signal(Signal::SIGHUP);
    notes.wait_count("READY=1", 3);
    let status = tng.ctl(&["status", "in"]).stdout;
    let reason = "captures changed, which only root can apply; as root: tngctl reload in";
    assert!(status.contains(reason), "{status}");
    assert_eq!(kernel_state(host), before);
    // The one beyond the limit took the place when it was free; without the limit there are others.
    tng.write_config(&config());
    tng.signal(Signal::SIGHUP);
    notes.wait_count("READY=1", 4);
    let seen = lab.exchange(Family::V4, &Connect::default());
    assert!(seen.fate == Fate::Delivered && seen.plaintext.is_none(), "{seen:?}");
    let status = tng.ctl(&["status", "in"]).stdout;
    assert!(!status.contains("last reload was refused"), "a reload that worked: {status}");
    assert!(tng.stop().success());
}

#[test]
fn changed_listeners_are_refused_and_the_old_ones_go_on() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let mapping = |port: u16| ingress_mapping(&format!("127.0.0.1:{port}"), "203.0.113.2:8080");
    let tng = Parts::new(host, "map", &mapping(7000)).serve();
    for (changed, reason) in [
        (mapping(7001), "listeners changed, which only root can hand over; as root: tngctl reload map"),
        (format!("{}[control]\nlisten = \"127.0.0.1:7009\"\n", mapping(7000)), "control.listen changed"),
        (mapping(7000).replace("allow_sample", "allow_sampel"), "allow_sampel"),
    ] {
        tng.write_config(&changed);
        tng.signal(Signal::SIGHUP);
        wait_for(reason, SOON, || tng.ctl(&["status", "map"]).stdout.contains(reason));
        assert!(tng.is_ready());
        let status = tng.ctl(&["status", "map"]);
        assert!(status.ok() && status.stdout.contains("127.0.0.1:7000"), "{}", status.stdout);
    }
    let conn = lab.client.connect("127.0.0.1", &Connect { port: 7000, ..Connect::default() });
    assert!(conn.is_ok(), "{conn:?}");
    assert!(tng.stop().success());
}
