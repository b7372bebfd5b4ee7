//! What a running instance does about its rules: puts them back, changes them in place, takes them
//! away, and holds no more rights than it needs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::lab::{Lab, PORT, TO_SERVER, ask, egress, ingress};
use super::netns::{Connect, Family, Host, Tng, fresh_hex, wait_for, wait_until};
use super::table::{Fate, Seen};

/// What a stranger removed is back within this time.
const REPAIR: Duration = Duration::from_millis(1500);

fn tunnelled(seen: &[Seen; 2]) -> bool {
    seen.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_none())
}

/// The parts of an instance in the kernel, one a line, that are missing on a host.
fn missing(host: &Host, name: &str) -> Vec<String> {
    let mut missing = Vec::new();
    let tables = host.run("nft", &["list", "tables"]).stdout;
    for table in [format!("inet tng_{name}"), format!("inet tngguard_{name}")] {
        if !tables.lines().any(|line| line == format!("table {table}")) {
            missing.push(format!("table {table}"));
        }
    }
    for family in Family::BOTH {
        let rules = host.run("ip", &[family.ip_option(), "rule", "show", "pref", "565"]).stdout;
        if !rules.contains("0x600/0xff00") {
            missing.push(format!("{family:?} rule 565"));
        }
        let routes = host.run("ip", &[family.ip_option(), "route", "show", "table", "565"]).stdout;
        if !routes.contains("local default") {
            missing.push(format!("{family:?} local route of table 565"));
        }
    }
    missing
}

/// All that tng may have left on a host: tables, rules and routes with its names and numbers.
fn residue(host: &Host) -> String {
    let tables = host.run("nft", &["list", "tables"]).stdout;
    let mut found: String = tables.lines().filter(|line| line.contains("tng")).map(|l| format!("{l}\n")).collect();
    for family in Family::BOTH {
        found += &host.run("ip", &[family.ip_option(), "rule", "show", "pref", "565"]).stdout;
        // "FIB table does not exist" is an error of ip, and the best answer.
        found += &host.run("ip", &[family.ip_option(), "route", "show", "table", "565"]).stdout;
    }
    found
}

/// Named counters of an instance's table and their packets.
fn counters(host: &Host, name: &str) -> BTreeMap<String, u64> {
    let text = host.sh(&format!("nft -j list counters table inet tng_{name}"));
    let json: serde_json::Value = serde_json::from_str(&text).expect("nft's JSON");
    let objects = json["nftables"].as_array().expect("objects").iter();
    objects
        .filter_map(|object| {
            let counter = object.get("counter")?;
            Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
        })
        .collect()
}

#[test]
fn what_a_stranger_removes_is_back_within_a_second() {
    let lab = Lab::new();
    let (ingress, egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    let faults = [
        "nft flush ruleset",
        "nft delete table inet tng_in 2>/dev/null || nft delete table inet tng_out",
        "ip -4 rule del pref 565; ip -6 rule del pref 565",
        "ip -4 route flush table 565; ip -6 route flush table 565",
    ];
    for fault in faults {
        for (host, name, tng) in [(&lab.world.client, "in", &ingress), (&lab.world.server, "out", &egress)] {
            assert_eq!(missing(host, name), Vec::<String>::new(), "before `{fault}`");
            // Its clock stands while we look: it may be quicker than the look.
            tng.freeze_guard();
            host.sh(fault);
            assert!(!missing(host, name).is_empty(), "`{fault}` took something away");
            let start = Instant::now();
            tng.thaw_guard();
            wait_until(REPAIR, || missing(host, name).is_empty());
            assert_eq!(missing(host, name), Vec::<String>::new(), "{:?} after `{fault}`", start.elapsed());
        }
        let seen = lab.each(|family| lab.exchange(family, &Connect::default()));
        assert!(tunnelled(&seen), "a new flow after `{fault}`: {seen:?}");
    }
    for flow in flows {
        let seen = lab.say(flow);
        assert_eq!(seen.plaintext, None, "the flow of before");
    }
}

#[test]
fn a_stranger_cannot_touch_the_guard() {
    let lab = Lab::new();
    let (_ingress, _egress) = lab.start();
    let guard = "inet tngguard_in";
    let before = lab.world.client.sh(&format!("nft -s list table {guard}"));
    for fault in ["flush table", "delete table"] {
        let out = lab.world.client.run("nft", &[&format!("{fault} {guard}")]);
        assert!(!out.ok(), "`nft {fault} {guard}` must fail");
    }
    lab.world.client.sh("nft flush ruleset");
    assert_eq!(lab.world.client.sh(&format!("nft -s list table {guard}")), before);
}

#[test]
fn established_flows_and_counters_survive_a_reload() {
    let lab = Lab::new();
    let (ingress_tng, egress_tng) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    let before = counters(&lab.world.client, "in");
    assert!(before.values().any(|packets| *packets > 0), "captured flows are counted: {before:?}");
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), 9090, json!({}));
    }
    let more =
        format!(r#"{TO_SERVER}, {{ to = "203.0.113.0/24", port = 9090 }}, {{ to = "2001:db8:2::/64", port = 9090 }}"#);
    egress_tng.write_config(&egress("").replace("{ port = 8080 }", "{ port = 8080 }, { port = 9090 }"));
    egress_tng.ctl(&["reload", "out"]).expect_ok();
    ingress_tng.write_config(&ingress(&more));
    ingress_tng.ctl(&["reload", "in"]).expect_ok();
    let after = counters(&lab.world.client, "in");
    for (name, packets) in &before {
        assert!(after.get(name).is_some_and(|now| now >= packets), "counter {name}: {before:?}, then {after:?}");
    }
    for flow in flows {
        let seen = lab.say(flow);
        assert!(seen.fate == Fate::Delivered && seen.plaintext.is_none(), "the flow of before: {seen:?}");
    }
    let new = lab.each(|family| lab.exchange(family, &Connect { port: 9090, ..Connect::default() }));
    assert!(tunnelled(&new), "what the reload added is captured: {new:?}");
}

#[test]
fn a_wrong_configuration_changes_nothing_on_reload() {
    let lab = Lab::new();
    let (ingress_tng, _egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    let rules = lab.world.client.sh("nft -s list table inet tng_in");
    ingress_tng.write_config(&ingress(r#"{ to = "203.0.113.0/24", port = 70000 }"#));
    let out = ingress_tng.ctl(&["reload", "in"]);
    assert!(!out.ok(), "a wrong configuration is an error");
    assert!(out.stderr.contains("70000"), "it says what is wrong: {}", out.stderr);
    assert_eq!(lab.world.client.sh("nft -s list table inet tng_in"), rules);
    for flow in flows {
        let seen = lab.say(flow);
        assert!(seen.fate == Fate::Delivered && seen.plaintext.is_none(), "the flow of before: {seen:?}");
    }
}

#[test]
fn reloading_under_load_lets_no_packet_out() {
    let lab = Lab::new();
    let (ingress_tng, _egress) = lab.start();
    let narrow = ingress(TO_SERVER);
    let wide = ingress(&format!(r#"{TO_SERVER}, {{ to = "192.0.2.0/24", port = 8080 }}"#));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for family in Family::BOTH {
            let (lab, done) = (&lab, &done);
            scope.spawn(move || {
                let addr = lab.addr(family).to_string();
                while !done.load(Ordering::Relaxed) {
                    let how = Connect { port: PORT, ..Connect::default() };
                    // Its own fate may be a refusal, but never plaintext; that is asked at the end.
                    if let Ok(conn) = lab.client.connect(&addr, &how) {
                        let _ = ask(&lab.client, conn, &fresh_hex());
                        lab.client.close(conn);
                    }
                }
            });
        }
        for round in 0..20 {
            ingress_tng.write_config(if round % 2 == 0 { &wide } else { &narrow });
            let out = ingress_tng.ctl(&["reload", "in"]);
            if !out.ok() {
                done.store(true, Ordering::Relaxed);
                panic!("reload {round}: {}", out.stderr);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(!lab.world.saw("TNGQ"), "a request of some connection left in plaintext");
}

#[test]
fn a_clean_stop_leaves_nothing_and_the_direct_path() {
    let lab = Lab::new();
    let before = [residue(&lab.world.client), residue(&lab.world.server)];
    assert_eq!(before, ["", ""]);
    let (ingress_tng, egress_tng) = lab.start();
    assert!(tunnelled(&lab.each(|family| lab.exchange(family, &Connect::default()))));
    assert!(ingress_tng.stop().success() && egress_tng.stop().success(), "a clean stop exits with 0");
    for host in [&lab.world.client, &lab.world.server] {
        // Rules for flows that were open at the stop may go a little later, with the last of them.
        wait_until(Duration::from_secs(5), || residue(host).is_empty());
        assert_eq!(residue(host), "", "{} is clean", host.netns());
    }
    let open = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(open.iter().all(|s| s.fate == Fate::Delivered && s.plaintext.is_some()), "on_stop = open: {open:?}");
}

#[test]
fn a_stop_does_what_the_last_reload_says_of_it() {
    let lab = Lab::new();
    let (ingress_tng, _egress) = lab.start();
    assert!(lab.each(|family| lab.exchange(family, &Connect::default())).iter().all(|s| s.fate == Fate::Delivered));
    ingress_tng.write_config(&format!("on_stop = \"closed\"\n{}", ingress(TO_SERVER)));
    let reloaded = ingress_tng.ctl(&["reload", "in"]);
    assert!(reloaded.ok(), "{}", reloaded.stderr);
    assert!(ingress_tng.stop().success());
    let after = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(after.iter().all(|s| s.fate == Fate::Refused && s.plaintext.is_none()), "on_stop = closed: {after:?}");
}

#[test]
fn one_instance_that_stops_leaves_the_others_rules() {
    let lab = Lab::new();
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), 9090, json!({}));
    }
    let ports = egress("").replace("{ port = 8080 }", "{ port = 8080 }, { port = 9090 }");
    let (first, _egress) = lab.start_with(&ingress(TO_SERVER), &ports);
    let _second = Tng::start(&lab.world.client, "second", &ingress(&TO_SERVER.replace("8080", "9090")));
    assert!(first.stop().success());
    assert_eq!(missing(&lab.world.client, "second"), Vec::<String>::new());
    let seen = lab.each(|family| lab.exchange(family, &Connect { port: 9090, ..Connect::default() }));
    assert!(tunnelled(&seen), "the second instance goes on: {seen:?}");
}

#[test]
fn two_endpoints_of_an_instance_have_listeners_of_their_own() {
    let lab = Lab::new();
    for any in ["0.0.0.0", "::"] {
        lab.server.listen(any.parse().expect("address"), 9090, json!({}));
    }
    // The second endpoint speaks to an egress that shows no evidence, and verifies: if its flows
    // met the first endpoint's listener or policy, one of the two would be served wrongly.
    let endpoint = |name: &str, port: u16, rest: &str| {
        let capture = TO_SERVER.replace("8080", &port.to_string());
        format!("[[ingress]]\nname = \"{name}\"\n{rest}[ingress.netfilter]\ncapture = [{capture}]\n")
    };
    let verify = "[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
    let two = format!("{}{verify}{}", endpoint("a", 8080, ""), endpoint("b", 9090, "no_ra = true\n"));
    let server = "[[egress]]\nname = \"a\"\n[egress.netfilter]\ncapture = [{ port = 8080 }]\n\
                  [egress.attest]\nprovider = \"sample\"\n\
                  [[egress]]\nname = \"b\"\nno_ra = true\n[egress.netfilter]\ncapture = [{ port = 9090 }]\n";
    let (_ingress, _egress) = lab.start_with(&two, server);
    for port in [8080, 9090] {
        let seen = lab.each(|family| lab.exchange(family, &Connect { port, ..Connect::default() }));
        assert!(tunnelled(&seen), "port {port}: {seen:?}");
    }
    // Swapped, the verifying endpoint meets the peer without evidence and must refuse it.
    let crossed = server.replace("8080", "x").replace("9090", "8080").replace("port = x", "port = 9090");
    drop(_egress);
    let _egress = Tng::start(&lab.world.server, "out", &crossed);
    let refused = lab.each(|family| lab.exchange(family, &Connect::default()));
    assert!(refused.iter().all(|s| s.fate != Fate::Delivered && s.plaintext.is_none()), "no evidence: {refused:?}");
}

#[test]
fn a_link_local_destination_is_refused_by_check() {
    let lab = Lab::new();
    let file = lab.world.client.config_dir().join("in.toml");
    std::fs::write(&file, ingress(r#"{ to = "fe80::/10", port = 8080 }"#)).expect("write");
    let file = file.to_string_lossy().into_owned();
    let out = super::netns::run_tngd(&lab.world.client, &["check", &file]);
    assert!(!out.ok(), "fe80::/10 cannot be captured");
    assert!(out.stderr.contains("fe80") || out.stdout.contains("fe80"), "{}{}", out.stdout, out.stderr);
    std::fs::write(&file, ingress(TO_SERVER)).expect("write");
    super::netns::run_tngd(&lab.world.client, &["check", &file]).expect_ok();
}

#[test]
fn the_data_plane_holds_cap_net_raw_and_nothing_else() {
    let lab = Lab::new();
    let (ingress_tng, _egress) = lab.start();
    let data_plane = ingress_tng.data_plane();
    assert!(!data_plane.is_empty(), "some process serves without the right to change rules");
    for pid in data_plane {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name}")).trim().to_owned()
        };
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let bits = u64::from_str_radix(&field(set), 16).expect("hex");
            assert_eq!(bits & !(1 << 13), 0, "{set} of process {pid} is {bits:x}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        // Every thread alike: capabilities are per thread.
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten() {
            let Ok(text) = std::fs::read_to_string(task.path().join("status")) else { continue };
            let line = text.lines().find(|line| line.starts_with("CapEff:")).expect("CapEff").to_owned();
            assert_eq!(line.trim_start_matches("CapEff:").trim(), field("CapEff"));
        }
    }
}

#[test]
fn an_unprivileged_application_can_borrow_neither_mark_nor_address() {
    let lab = Lab::new();
    let nobody = lab.world.client.app_as(65534);
    let answer = nobody.ask(json!({"do": "caps", "mark": 566})).expect("answer");
    assert_eq!((answer["mark"].as_str(), answer["transparent"].as_str()), (Some("EPERM"), Some("EPERM")));
    let answer = lab.client.ask(json!({"do": "caps", "mark": 566})).expect("answer");
    assert_eq!((answer["mark"].as_str(), answer["transparent"].as_str()), (Some("ok"), Some("ok")), "root can");
}

#[test]
fn an_idle_captured_connection_that_writes_after_a_clean_stop_is_reset() {
    let lab = Lab::new();
    let (ingress_tng, _egress) = lab.start();
    let flows = lab.each(|family| lab.flow(family));
    assert!(ingress_tng.stop().success());
    // Idle until every trace of the stop is over; only then it writes.
    wait_for("the instance is gone", Duration::from_secs(5), || {
        !lab.world.client.run("nft", &["list", "tables"]).stdout.contains("table inet tng_in")
    });
    for flow in flows {
        let seen = lab.say(flow);
        assert!(seen.fate == Fate::Refused && seen.plaintext.is_none(), "{seen:?}");
    }
}
