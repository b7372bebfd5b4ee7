//! What the service manager is told, and when.

use nix::sys::signal::Signal;

use super::lab::Lab;
use super::manager::{LISTEN, Manager, config, serve};
use super::netns::{Connect, Family, Parts, traces, wait_for};
use super::table::{Fate, Seen};

fn tunnelled(seen: &[Seen]) -> bool {
    seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none())
}

#[test]
fn ready_is_told_when_connections_are_served_and_stopping_when_they_drain() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    parts.net_up();
    let (stalled, notes) = serve(host, &[("TNG_FAILPOINT", "serve.ready=stall")]);
    wait_for("the control socket answers", super::manager::SOON, || {
        stalled.get("/livez").is_some_and(|a| a.starts_with("HTTP/1.1 200"))
    });
    assert!(!stalled.is_ready());
    assert_eq!(notes.all(), Vec::<String>::new(), "told before it was ready");
    drop(stalled);

    let (tng, notes) = serve(host, &[]);
    notes.wait("READY=1");
    notes.wait_status("ready: ingress in");
    assert!(tng.is_ready());
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(tunnelled(&seen), "by inherited listeners: {seen:?}\n{}", tng.output());
    assert_eq!(notes.count("STOPPING"), 0);
    assert!(tng.stop().success());
    notes.wait("STOPPING=1");
    notes.wait_status("draining");
    parts.net_down();
    assert_eq!(traces(host), "");
}

#[test]
fn the_watchdog_is_fed_only_while_every_worker_answers() {
    const EVERY: (&str, &str) = ("WATCHDOG_USEC", "400000");
    let lab = Lab::new();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    let _guard = parts.guard();
    parts.net_up();
    let (tng, notes) = serve(host, &[EVERY]);
    notes.wait_count("WATCHDOG=1", 3);
    let out = tng.ctl(&["status", "in"]);
    assert_eq!(out.status.code(), Some(0), "{}{}", out.stdout, out.stderr);
    assert!(tng.stop().success());

    let (stalled, notes) = serve(host, &[EVERY, ("TNG_FAILPOINT", "worker.in.accept=stall")]);
    notes.wait_status("worker of endpoint in does not answer");
    assert_eq!(notes.count("WATCHDOG=1"), 0, "{:?}", notes.all());
    let out = stalled.ctl(&["status", "in"]);
    assert_eq!(out.status.code(), Some(1), "{}", out.stdout);
    assert!(out.stdout.contains("degraded"), "{}", out.stdout);
    assert!(out.stdout.contains("worker of endpoint in does not answer"), "{}", out.stdout);
}

#[test]
fn with_a_wrong_file_inherited_sockets_refuse_until_a_reload_heals_it() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    let _guard = parts.guard();
    parts.net_up();
    let file = host.config_dir().join("in.toml");
    std::fs::write(&file, format!("\nnonsense = 1\n{}", config())).expect("write");
    let (tng, notes) = serve(host, &[]);
    let place = format!("{}:2:1", file.display());
    notes.wait_status(&place);
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(seen.iter().all(|s| s.fate == Fate::Refused && s.plaintext.is_none()), "{seen:?}\n{}", tng.output());
    let out = tng.ctl(&["status", "in"]);
    assert_eq!(out.status.code(), Some(1), "{}", out.stdout);
    assert!(out.stdout.contains(&place), "{}", out.stdout);
    // Not healed by what is still wrong.
    let out = tng.ctl(&["reload", "in"]);
    assert_eq!(out.status.code(), Some(78), "{}", out.stderr);
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(seen.iter().all(|s| s.fate == Fate::Refused), "{seen:?}");

    tng.write_config(&config());
    tng.ctl(&["reload", "in"]).expect_ok();
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(tunnelled(&seen), "after the reload: {seen:?}\n{}", tng.output());
    let out = tng.ctl(&["status", "in"]);
    assert_eq!(out.status.code(), Some(0), "{}{}", out.stdout, out.stderr);
    tng.signal(Signal::SIGTERM);
    notes.wait("STOPPING=1");
}

#[test]
fn the_status_counts_connections_and_names_the_last_refusal() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    parts.net_up();
    let (tng, notes) = serve(host, &[("WATCHDOG_USEC", "400000")]);
    notes.wait_status("ready: ingress in");
    notes.wait_count("WATCHDOG=1", 3);
    assert_eq!(notes.count("STATUS="), 1, "told again though nothing changed: {:?}", notes.all());
    lab.server.close(lab.service[0]);
    let refused = lab.exchange(Family::V4, &Connect::default());
    assert!(refused.fate == Fate::Refused && refused.plaintext.is_none(), "{refused:?}");
    notes.wait_status("; 0 open, 0 tunnelled, 1 refused (last: ");
    let egress = lab.start_egress();
    let flow = lab.flow(Family::V6);
    notes.wait_status("; 1 open, 1 tunnelled, 1 refused (last: ");
    lab.client.close(flow.conn);
    lab.server.close(lab.service[1]);
    notes.wait_status("; 0 open, 1 tunnelled, 1 refused (last: ");
    assert_eq!(notes.count("EXTEND_TIMEOUT_USEC="), 0, "{:?}", notes.all());
    drop(egress);

    // Longer than TimeoutStopSec may be: asked for before it is over.
    let (stalled, notes) = {
        assert!(tng.stop().success());
        notes.wait("EXTEND_TIMEOUT_USEC=20000000");
        serve(host, &[("TNG_FAILPOINT", "serve.drain=stall")])
    };
    notes.wait("READY=1");
    stalled.signal(Signal::SIGTERM);
    notes.wait_count("EXTEND_TIMEOUT_USEC=", 2);
    drop(stalled);
    parts.net_down();
}

#[test]
fn an_abstract_notification_socket_is_told_too() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &config());
    parts.net_up();
    let (v4, v6) = (format!("127.0.0.1:{LISTEN}"), format!("[::1]:{LISTEN}"));
    let manager = Manager::new(host, "in", &[&v4, &v6], 0).hearing_on("tng-serve-test");
    let (tng, notes) = manager.serve(&[], &[("WATCHDOG_USEC", "400000")]);
    notes.wait("READY=1");
    notes.wait_status("ready: ingress in");
    notes.wait("WATCHDOG=1");
    assert!(tng.stop().success());
    notes.wait("STOPPING=1");
}
