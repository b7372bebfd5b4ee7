//! Sockets of a socket unit and of the descriptor store (FDSTORE of sd_notify(3)), over reloads and restarts.

use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::lab::{Lab, ask, fate_of, ingress_mapping};
use super::manager::{LISTEN, Manager, SOON, config};
use super::netns::{Connect, Fault, Parts, Tng, fresh_hex, traces, wait_for, wait_until};
use super::table::Fate;

const UNIT: &str = "127.0.0.1:7000";

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

/// Refused at once, or accepted to be reset; not left in a queue.
fn refused(lab: &Lab, port: u16) -> bool {
    match open(lab, port) {
        Err(fault) => fate_of(&fault) == Fate::Refused,
        Ok(conn) => ask(&lab.client, conn, &fresh_hex()) == Fate::Refused,
    }
}

fn status(tng: &Tng<'_>) -> Value {
    serde_json::from_str(&tng.ctl(&["status", "map", "--json"]).stdout).expect("JSON")
}

#[test]
fn unix_sockets_of_the_unit_are_used_and_their_files_stay() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let manager = Manager::new(host, "map", &[UNIT], 0).with_api();
    let _parts = Parts::new(host, "map", &mapping(7000));
    let dir = host.runtime_dir().join("map");
    let inodes = || ["control.sock", "handoff.sock"].map(|f| dir.join(f).metadata().expect("socket file").ino());
    let before = inodes();
    // As the user it runs as, which may write nothing in the directory of root.
    let (tng, notes) = manager.serve(&["--user", "65534"], &[]);
    notes.wait("READY=1");
    assert!(tng.is_ready() && served(&lab, 7000), "{}", tng.output());
    assert_eq!(dir.metadata().expect("directory").uid(), 0);
    tng.write_config(&with(&mapping(7000), "two", 443));
    tng.ctl(&["reload", "map"]).expect_ok();
    assert!(served(&lab, 443), "handed over by the unit's socket: {}", tng.output());
    assert!(tng.stop().success());
    assert_eq!(inodes(), before, "the unit's files were replaced");

    // With errors in the file, also when nothing but these two was passed.
    for file in ["control.sock", "handoff.sock"] {
        std::fs::remove_file(dir.join(file)).expect("remove");
    }
    let alone = Manager::new(host, "map", &[], 0).with_api();
    std::fs::write(host.config_dir().join("map.toml"), format!("\nnonsense = 1\n{}", mapping(7000))).expect("write");
    let (tng, notes) = alone.serve(&["--user", "65534"], &[]);
    notes.wait("READY=1");
    notes.wait_status("map.toml:2:1");
    assert!(!tng.is_ready());
    assert_eq!(status(&tng)[0]["state"], "degraded");
    tng.write_config(&mapping(7003));
    tng.ctl(&["reload", "map"]).expect_ok();
    assert!(tng.is_ready() && served(&lab, 7003), "{}", tng.output());
    assert!(tng.stop().success());
}

#[test]
fn options_that_a_unit_sets_for_all_its_sockets_become_those_of_each_endpoint() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let (v4, v6) = (format!("127.0.0.1:{LISTEN}"), format!("[::1]:{LISTEN}"));
    // A mark that no rule here knows; an ingress's listeners have none.
    let manager = Manager::new(host, "in", &[&v4, &v6, UNIT], 0x235);
    let parts = Parts::new(host, "in", &with(&config(), "map", 7000));
    parts.net_up();
    let (tng, notes) = manager.serve(&[], &[]);
    notes.wait("READY=1");
    let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(seen.iter().all(|s| s.fate == Fate::Delivered), "{seen:?}\n{}", tng.output());
    assert!(served(&lab, 7000), "{}", tng.output());
    let options = |addr: &str| manager.options(addr);
    assert_eq!(options(&v4), (0, true));
    assert_eq!(options(&v6), (0, true));
    assert_eq!(options(UNIT), (0, false));
    assert!(tng.stop().success());
    parts.net_down();
    assert_eq!(traces(host), "");
}

#[test]
fn a_listener_that_a_reload_brought_survives_a_restart_and_a_kill() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    host.sysctl(&[("net/ipv4/ip_unprivileged_port_start", "1024")]);
    let manager = Manager::new(host, "map", &[UNIT], 0).with_api();
    let _parts = Parts::new(host, "map", &mapping(7000));
    const USER: [&str; 2] = ["--user", "65534"];
    let (mut tng, notes) = manager.serve(&USER, &[]);
    notes.wait("READY=1");
    assert_eq!(manager.stored(), Vec::<String>::new(), "the unit holds its own");
    tng.write_config(&with(&mapping(7000), "two", 443));
    tng.ctl(&["reload", "map"]).expect_ok();
    assert!(wait_until(SOON, || manager.stored() == ["listen-127.0.0.1,443"]), "{:?}", manager.stored());
    tng.kill();

    // Opened while nobody serves: it waits in the stored socket's queue. The new process may not bind this port.
    let waiting = open(&lab, 443).expect("queued");
    let (tng, notes) = manager.serve(&USER, &[]);
    notes.wait("READY=1");
    assert_eq!(ask(&lab.client, waiting, &fresh_hex()), Fate::Delivered, "{}", tng.output());
    assert!(served(&lab, 7000) && served(&lab, 443));
    assert_eq!(notes.count("FDSTORE=1"), 0, "stored twice: {:?}", notes.all());
    assert_eq!(manager.stored(), ["listen-127.0.0.1,443"]);
    assert!(tng.stop().success());

    // The file changed while it was down: what nobody asks for ends, here and with the manager.
    std::fs::write(host.config_dir().join("map.toml"), mapping(7000)).expect("write");
    let (tng, notes) = manager.serve(&USER, &[]);
    notes.wait("READY=1");
    assert!(wait_until(SOON, || manager.stored().is_empty()), "{:?}", manager.stored());
    assert_eq!(open(&lab, 443), Err(Fault("ECONNREFUSED".into())));
    assert!(served(&lab, 7000));
    assert!(tng.stop().success());
}

#[test]
fn a_removed_listener_refuses_though_the_manager_holds_a_copy_and_can_come_back() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let manager = Manager::new(host, "map", &[UNIT, "127.0.0.1:7001"], 0).with_api();
    let both = with(&mapping(7000), "two", 7001);
    let _parts = Parts::new(host, "map", &both);
    let (tng, notes) = manager.serve(&[], &[]);
    notes.wait("READY=1");
    let three = with(&both, "three", 7002);
    let reload = |toml: &str| {
        tng.write_config(toml);
        tng.ctl(&["reload", "map"]).expect_ok();
    };
    reload(&three);
    assert!(wait_until(SOON, || manager.stored().len() == 1), "{:?}", manager.stored());
    // A manager that is slow to let go of what it was told to remove.
    let copy = manager.copy("listen-127.0.0.1,7002");
    assert!(served(&lab, 7001) && served(&lab, 7002), "{}", tng.output());

    reload(&mapping(7000));
    assert_eq!(open(&lab, 7002), Err(Fault("ECONNREFUSED".into())), "the stored one");
    assert!(refused(&lab, 7001), "the unit's one");
    assert!(manager.is_listening("127.0.0.1:7001"), "systemd takes the end of a unit's socket for a failure");
    assert!(served(&lab, 7000));

    reload(&three);
    for port in [7000, 7001, 7002] {
        assert!(served(&lab, port), "{port}: {}", tng.output());
    }
    wait_for("the new one is stored", SOON, || manager.stored() == ["listen-127.0.0.1,7002"]);
    assert!(tng.stop().success());

    // The dead copy comes back with the live one, and a dead one alone is bound anew.
    manager.store("listen-127.0.0.1,7002", copy.try_clone().expect("copy"));
    let (tng, notes) = manager.serve(&[], &[]);
    notes.wait("READY=1");
    assert!(served(&lab, 7002), "{}", tng.output());
    assert!(tng.stop().success());
    manager.forget("listen-127.0.0.1,7002");
    manager.store("listen-127.0.0.1,7002", copy);
    let (tng, notes) = manager.serve(&[], &[]);
    notes.wait("READY=1");
    assert!(served(&lab, 7002), "{}", tng.output());
    tng.signal(Signal::SIGTERM);
    notes.wait("STOPPING=1");
    notes.wait("EXTEND_TIMEOUT_USEC=");
}

#[test]
fn what_cannot_be_served_refuses_on_the_units_sockets_until_it_can() {
    let lab = Lab::new();
    let _egress = lab.start_egress();
    let host = &lab.world.client;
    let manager = Manager::new(host, "map", &[UNIT], 0).with_api();
    let _parts = Parts::new(host, "map", &with(&mapping(7000), "two", 7004));
    let taken = host.inside(|| std::net::TcpListener::bind("127.0.0.1:7004").expect("bind"));
    let (tng, notes) = manager.serve(&[], &[("WATCHDOG_USEC", "1000000")]);
    notes.wait("READY=1");
    notes.wait_status("degraded: endpoint two: cannot listen on 127.0.0.1:7004");
    assert!(!tng.is_ready() && refused(&lab, 7000), "{}", tng.output());
    drop(taken);
    notes.wait_status("ready: ingress map, ingress two");
    assert!(tng.is_ready() && served(&lab, 7000) && served(&lab, 7004), "{}", tng.output());
    assert!(wait_until(SOON, || manager.stored() == ["listen-127.0.0.1,7004"]), "{:?}", manager.stored());
    assert!(tng.stop().success());
}
