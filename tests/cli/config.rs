//! Wrong files and missing rights.

use std::process::Command;

use super::lab::{TO_SERVER, ingress, ingress_mapping};
use super::netns::{World, run, tngctl, tngd, traces};
use super::tools::{ctl, daemon, expect, write};

/// An unprivileged user that every system has.
const NOBODY: &str = "65534";

#[test]
fn a_wrong_file_is_status_78_with_its_place_whatever_command_reads_it() {
    let world = World::new();
    let host = &world.client;
    let file = write(host, "bad", "# comment\n[[ingress]]\nname = \"in\"\nnonsense = 1\n");
    let place = format!("{file}:4:1");
    for args in [&["check"][..], &["run"], &["serve"], &["net", "up"], &["guard"]] {
        let out = daemon(host, &[args, &[&file]].concat(), &[]);
        expect(&out, 78, &[&place, "nonsense"]);
    }
    for args in [&["check"][..], &["rules"], &["reload"]] {
        expect(&ctl(host, &[args, &[&file]].concat()), 78, &[&place, "nonsense"]);
    }
    let torn = write(host, "torn", "[[ingress]\n");
    expect(&daemon(host, &["check", &torn], &[]), 78, &[&format!("{torn}:1:")]);
    let absent = host.config_dir().join("absent.toml");
    expect(&daemon(host, &["run", &absent.to_string_lossy()], &[]), 78, &["absent.toml"]);
    assert_eq!(traces(host), "");
}

#[test]
fn every_error_of_a_file_comes_at_once_and_as_json_too() {
    let world = World::new();
    let host = &world.client;
    let bad =
        ingress(TO_SERVER).replacen("port = 8080", "port = 0", 1).replace("allow_sample = true", "allow_sampel = true");
    let file = write(host, "bad", &bad);
    let out = ctl(host, &["check", "--json", &file]);
    assert_eq!(out.status.code(), Some(78), "{}{}", out.stdout, out.stderr);
    let json: serde_json::Value = serde_json::from_str(&out.stdout).expect("JSON on standard output alone");
    let text = json.to_string();
    assert!(text.contains("allow_sampel") && text.contains("port"), "both errors: {text}");
    let good = write(host, "good", &ingress(TO_SERVER));
    let out = ctl(host, &["check", "--json", &good]);
    assert_eq!(out.status.code(), Some(0), "{}", out.stderr);
    serde_json::from_str::<serde_json::Value>(&out.stdout).expect("JSON");
}

#[test]
fn without_privileges_rules_are_status_77_and_a_low_port_says_what_it_needs() {
    let world = World::new();
    let host = &world.client;
    // A copy: the tree that cargo built in may be closed to other users.
    let dir = tempfile::tempdir().expect("directory");
    let own = Command::new("chmod").args(["755"]).arg(dir.path()).status().expect("chmod");
    assert!(own.success());
    let copy = |from: std::path::PathBuf| {
        let to = dir.path().join(from.file_name().expect("name"));
        std::fs::copy(from, &to).expect("copy of the program");
        to.to_string_lossy().into_owned()
    };
    let (daemon, tool) = (copy(tngd()), copy(tngctl()));
    let as_nobody = |program: &str, args: &[&str]| {
        let user = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        let mut words = vec![user[0].as_str(), user[1].as_str(), "--clear-groups", program];
        words.extend(args);
        run(host.command("setpriv", &words))
    };
    let file = write(host, "in", &ingress(TO_SERVER));
    for args in [&["run"][..], &["net", "up"], &["net", "down"], &["guard"]] {
        expect(&as_nobody(&daemon, &[args, &[&file]].concat()), 77, &["root", "[not-permitted]"]);
    }
    expect(&as_nobody(&tool, &["reload", &file]), 77, &["root"]);
    expect(&as_nobody(&tool, &["check", &file]), 0, &[]);
    assert_eq!(traces(host), "");
    let mapping = write(host, "map", &ingress_mapping("127.0.0.1:70", "203.0.113.2:8080"));
    // Nobody may write where root's instances live; with a place of its own only the low port is in the way.
    let place = dir.path().join("run");
    std::fs::create_dir(&place).expect("directory");
    let owned = Command::new("chown").arg(NOBODY).arg(&place).status().expect("chown");
    assert!(owned.success());
    host.sysctl(&[("net/ipv4/ip_unprivileged_port_start", "1024")]);
    let user = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
    let mut command = host.command("setpriv", &[&user[0], &user[1], "--clear-groups", &daemon, "run", &mapping]);
    command.env("TNG_RUNTIME_DIR", &place);
    expect(&run(command), 1, &["127.0.0.1:70", "ports below 1024 need root or a socket unit"]);
}

#[test]
fn a_file_is_checked_against_the_other_instances_that_are_there() {
    let world = World::new();
    let host = &world.client;
    let first = write(host, "first", &ingress(TO_SERVER));
    let second = write(host, "second", &ingress(TO_SERVER));
    for args in [&["check", "second"][..], &["check", &second], &["check"]] {
        for out in [ctl(host, args), daemon(host, args, &[])] {
            expect(&out, 78, &["first.toml", "second.toml"]);
        }
    }
    // A draft elsewhere stands for the instance of its name, and meets only the others.
    let drafts = host.dir().join("drafts");
    std::fs::create_dir_all(&drafts).expect("directory");
    let draft = drafts.join("second.toml");
    std::fs::write(&draft, ingress(TO_SERVER)).expect("write");
    expect(&ctl(host, &["check", &draft.to_string_lossy()]), 78, &[&first, &draft.to_string_lossy()]);
    write(host, "second", "this is = not [toml");
    expect(&ctl(host, &["check", &first]), 0, &["instance first"]);
    std::fs::write(&draft, ingress(&TO_SERVER.replace("203.0.113", "192.0.2").replace("2001:db8:2", "2001:db8:7")))
        .expect("write");
    expect(&ctl(host, &["check", &draft.to_string_lossy()]), 0, &["instance second"]);
}

#[test]
fn files_of_other_programs_and_look_alikes_are_named() {
    let world = World::new();
    let host = &world.client;
    let dir = host.config_dir();
    let check = |name: &str, text: &str| {
        let file = dir.join(name);
        std::fs::write(&file, text).expect("write");
        ctl(host, &["check", &file.to_string_lossy()])
    };
    for (name, text, whose) in [
        ("tng.json", "{\n  \"add_ingress\": [ { \"mapping\": { \"in\": { \"port\": 1 } } } ]\n}\n", "of TNG (JSON)"),
        ("st.conf", "[web]\naccept = 127.0.0.1:8080\nconnect = 192.0.2.1:443\n", "of stunnel"),
        ("numbers.toml", "[web]\naccept = 8080\nconnect = 443\n", "of stunnel"),
        ("gh.yaml", "listen: localhost:8443\ntarget: localhost:8080\n", "of ghostunnel"),
    ] {
        expect(&check(name, text), 78, &[whose, "docs/interop.md"]);
    }
    let good = ingress(TO_SERVER);
    expect(
        &check("quotes.toml", &good.replacen("\"in\"", "\u{201c}in\u{201d}", 1)),
        78,
        &["typographic quotation mark", ":3:8"],
    );
    expect(&check("space.toml", &good.replacen("name = ", "name\u{a0}= ", 1)), 78, &["no-break space", ":3:5"]);
    expect(&check("good.toml", &good), 0, &[]);
}

/// What was accepted as a capture and let everything pass.
#[test]
fn a_capture_that_can_never_match_does_not_start() {
    let world = World::new();
    let host = &world.client;
    for never in ["0.0.0.0", "::"] {
        let file = write(host, "never", &ingress(&format!("{{ to = \"{never}\", port = 8080 }}")));
        for args in [&["check"][..], &["run"], &["net", "up"]] {
            expect(&daemon(host, &[args, &[&file]].concat(), &[]), 78, &[never, "leave `to` out"]);
        }
    }
    assert_eq!(traces(host), "");
}

#[test]
fn a_mark_that_a_rule_of_this_host_takes_is_warned_of_with_a_free_one() {
    let world = World::new();
    let host = &world.client;
    let file = write(host, "good", &ingress(TO_SERVER));
    let check = |program: &str| match program {
        "tngctl" => ctl(host, &["check", &file]),
        _ => daemon(host, &["check", &file], &[]),
    };
    for program in ["tngctl", "tngd"] {
        let out = check(program);
        assert!(out.status.success() && !out.stderr.contains("rule"), "{}", out.stderr);
    }
    host.sh("ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004");
    let out = check("tngctl");
    assert!(!out.stderr.contains("rule"), "a table without routes takes nothing: {}", out.stderr);
    host.sh("ip route add local default dev lo table 2004; ip rule add pref 10 fwmark 0x600/0xff00 lookup main");
    for program in ["tngctl", "tngd"] {
        let out = check(program);
        expect(
            &out,
            0,
            &[
                "ingress[0].netfilter.so_mark: mark 566 (0x236) is taken by a rule of this host, ip -4 rule pref 9 fwmark",
                "so_mark = 309",
                "ip -4 rule pref 10 fwmark 0x600/0xff00 lookup main of this host takes captured packets before rule 565",
            ],
        );
    }
}

#[test]
fn a_capture_of_this_hosts_own_address_is_warned_of_and_a_peers_is_not() {
    let world = World::new();
    let host = &world.client;
    for family in super::netns::Family::BOTH {
        let (own, peer) = (host.addr(family), world.server.addr(family));
        let check = |addr: &dyn std::fmt::Display| {
            let file = write(host, "own", &ingress(&format!("{{ to = \"{addr}\", port = 8080 }}")));
            ctl(host, &["check", &file])
        };
        expect(
            &check(&own),
            0,
            &["capture[0].to: ", &format!("{own} is an address of this host (c0)"), "not captured"],
        );
        let out = check(&peer);
        assert!(out.status.success() && !out.stderr.contains("of this host"), "{}", out.stderr);
    }
}
