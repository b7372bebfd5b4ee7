//! The operator edits a file: reload, restart, and what a broken file does to both.

use std::io::{BufRead, BufReader, Write};
use std::process::Child;
use std::time::Duration;

use serde_json::Value;

use super::container::Container;
use super::netns::{wait_for, wait_until};
use super::pair::{INGRESS, PORT, Pair, curl, marker};
use super::traffic::{Client, Load};

/// One connection that stays open: a request for each line of standard input.
const HOLDER: &str = include_str!("holder.py");

/// The sample's ingress with mappings to the service besides.
fn with_mappings(mappings: &[(&str, u16)]) -> String {
    let mut text = INGRESS.to_owned();
    for (name, port) in mappings {
        text.push_str(&format!(
            "\n[[ingress]]\nname = \"{name}\"\n[ingress.mapping]\nlisten = \"127.0.0.1:{port}\"\ntarget = \"192.0.2.2:{PORT}\"\n[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n"
        ));
    }
    text
}

/// The sample with a port that is none, and where that is.
fn broken() -> (String, String) {
    let text = INGRESS.replacen("port = 8080", "port = 70000", 1);
    let line = 1 + text.lines().position(|line| line.contains("70000")).expect("the sample captures port 8080");
    (text, format!("ingress.toml:{line}:"))
}

/// Reload, restart, and broken files.
pub fn reloads(pair: &Pair) {
    let host = &pair.client;
    let serves = |port: u16, word: &str| curl(host, &format!("127.0.0.1:{port}"), word);
    let (broken, place) = broken();
    if !pair.settle() {
        return;
    }
    pair.point(
        "reload: an added mapping is served, a removed one refused, low port included; connection and counters stay",
        || {
            host.write("/etc/tng/ingress.toml", &with_mappings(&[("one", 10001)]));
            host.sh("systemctl reload tng@ingress");
            let served = serves(10001, &marker("one"));
            served.unwrap_or_else(|e| panic!("the first added mapping: {e}"));

            let mut holder = Holder::open(host, "192.0.2.2");
            holder.ask("before the reload");
            let before = Counters::read(host);
            let pid = host.main_pid("tng@ingress.service");
            let text = with_mappings(&[("two", 10002), ("low", 81)]);
            host.write("/etc/tng/ingress.toml", &text);
            host.sh("systemctl reload tng@ingress");
            for port in [10002, 81] {
                let word = marker("added");
                serves(port, &word).unwrap_or_else(|e| panic!("added port {port}: {e}"));
                pair.assert_unseen(&word);
            }
            let error = serves(10001, &marker("removed")).expect_err("the removed mapping still serves");
            assert!(error.contains("refused") || error.contains("connect to"), "the removed mapping: {error}");
            holder.ask("after the reload");
            let after = Counters::read(host);
            assert!(
                before.connections > 0 && after.connections >= before.connections,
                "connections: {before:?} then {after:?}"
            );
            assert!(
                before.captured > 0 && after.captured >= before.captured,
                "the kernel's counters: {before:?} then {after:?}"
            );
            assert_eq!(host.main_pid("tng@ingress.service"), pid, "a reload is no restart");
            format!("{} connections counted before, {} after", before.connections, after.connections)
        },
    );
    pair.point("restart after it: added listeners are the same sockets, and no connection to one is lost", || {
        let before = [listener(host, 10002), listener(host, 81)];
        let word = marker("mapping");
        let targets = [("127.0.0.1".to_owned(), 10002), ("127.0.0.1".to_owned(), 81)];
        let client = Client::start(host, &targets, &word, &Load::THOUSAND);
        client.wait_more(100);
        host.sh("systemctl restart tng@ingress");
        assert_eq!([listener(host, 10002), listener(host, 81)], before, "the listeners' inodes");
        let sums = client.finish(true);
        assert_eq!(sums.served(), 1000, "{sums}");
        pair.assert_unseen(&word);
        format!("{sums}, inodes {before:?}")
    });
    pair.point("reload of a broken file: fails, names the line, and nothing changes", || {
        let rules = host.sh("nft -s list ruleset");
        host.write("/etc/tng/ingress.toml", &broken);
        let out = host.try_sh("systemctl reload tng@ingress");
        assert!(!out.ok(), "systemctl reload accepted it");
        let status = host.try_sh("systemctl status --no-pager -n 20 tng@ingress").stdout;
        assert!(status.contains(&place), "systemctl status does not name the line:\n{status}");
        assert_eq!(host.sh("nft -s list ruleset"), rules, "the rules changed");
        pair.wait_served();
        serves(10002, &marker("after")).unwrap_or_else(|e| panic!("mapping: {e}"));
        let direct = host.try_sh("tngctl reload ingress");
        assert!(
            !direct.ok() && format!("{}{}", direct.stdout, direct.stderr).contains(&place),
            "tngctl reload: {direct:?}"
        );
        status.lines().find(|l| l.contains(&place)).unwrap_or_default().trim().to_owned()
    });
    pair.point("restart with a broken file: active, degraded, refusing, the line in STATUS, no restart loop", || {
        host.sh("systemctl restart tng@ingress");
        assert_broken(pair, &place)
    });
    pair.point("a mended file and a reload heal it", || {
        host.write("/etc/tng/ingress.toml", INGRESS);
        host.sh("systemctl reload tng@ingress");
        pair.wait_served();
        let status = host.property("tng@ingress.service", "StatusText");
        assert!(!status.contains(&place), "{status}");
        assert!(host.holds("tngctl status ingress"), "status is not healthy");
        for port in [10002, 81] {
            serves(port, &marker("gone")).expect_err("a removed mapping serves");
        }
        status
    });
}

/// The ingress has a broken file: the unit is up, refuses, and says why. What STATUS says.
#[track_caller]
pub fn assert_broken(pair: &Pair, place: &str) -> String {
    let host = &pair.client;
    let unit = "tng@ingress.service";
    assert!(host.holds(&format!("systemctl is-active -q {unit}")), "the unit is not active");
    let restarts = host.property(unit, "NRestarts");
    let pid = host.main_pid(unit);
    let word = marker("broken");
    for answer in pair.curls(&word) {
        answer.expect_err("captured traffic was served with a broken configuration");
    }
    pair.assert_unseen(&word);
    let text = host.property(unit, "StatusText");
    assert!(text.contains(place), "STATUS does not name the place: {text}");
    let status = host.try_sh(&format!("systemctl status --no-pager -n 0 {unit}")).stdout;
    assert!(status.contains(place), "systemctl status does not name the place:\n{status}");
    assert_eq!(host.try_sh("tngctl status ingress").status.code(), Some(1), "tngctl status: degraded");
    // Two RestartSec: a loop would have come around.
    let looped = wait_until(Duration::from_secs(3), || host.main_pid(unit) != pid);
    assert!(!looped && host.property(unit, "NRestarts") == restarts, "it restarts by itself");
    text
}

/// The inode of the socket that listens on a local port: the same inode is the same socket.
#[track_caller]
pub fn listener(host: &Container, port: u16) -> String {
    let text = host.sh(&format!("ss -Hltne 'sport = :{port}'"));
    let inodes: Vec<&str> = text.split_whitespace().filter(|word| word.starts_with("ino:")).collect();
    assert!(!inodes.is_empty(), "nothing listens on port {port}: {}", host.sh("ss -ltn"));
    inodes.join(" ")
}

/// What is counted, by the data plane and by the kernel.
#[derive(Debug)]
struct Counters {
    connections: u64,
    captured: u64,
}

impl Counters {
    #[track_caller]
    fn read(host: &Container) -> Self {
        let status: Value = serde_json::from_str(&host.sh("tngctl status --json ingress")).expect("JSON");
        let endpoints = status[0]["endpoints"].as_array().expect("endpoints");
        let trial = endpoints.iter().find(|e| e["name"] == "trial").expect("endpoint trial");
        let connections = trial["counters"]["connections_total"].as_u64().expect("connections_total");
        let all = host.sh("nft list counters table inet tng_ingress");
        let words: Vec<&str> = all.split_whitespace().collect();
        let at = words.iter().position(|w| *w == "captured_trial").expect("the kernel's counter captured_trial");
        let packets = words[at..].iter().position(|w| *w == "packets").expect("packets") + at + 1;
        Self { connections, captured: words[packets].parse().expect("a number") }
    }
}

/// A connection that stays open.
pub struct Holder {
    child: Child,
    answers: std::sync::mpsc::Receiver<String>,
}

impl Holder {
    /// Opens one from `host` to the service.
    pub fn open(host: &Container, addr: &str) -> Self {
        let mut child = host.spawn_piped(240, &["/usr/bin/python3", "-I", "-u", "-c", HOLDER, addr, &PORT.to_string()]);
        let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let (to, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).all(|line| to.send(line).is_ok()));
        Self { child, answers }
    }

    /// Sends a request over it; `when` is for the message if it fails.
    #[track_caller]
    pub fn ask(&mut self, when: &str) {
        let stdin = self.child.stdin.as_mut().expect("stdin");
        stdin.write_all(b"\n").unwrap_or_else(|e| panic!("the open connection {when}: {e}"));
        match self.answers.recv_timeout(Duration::from_secs(15)) {
            Ok(line) if line == "200" => {}
            other => panic!("the open connection {when}: {other:?}"),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        wait_until(Duration::from_secs(5), || self.child.try_wait().is_ok_and(|ended| ended.is_some()));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a unit is in a state.
#[track_caller]
pub fn wait_state(host: &Container, unit: &str, state: &str) {
    wait_for(&format!("{unit} is {state}"), Duration::from_secs(40), || {
        host.try_sh(&format!("systemctl is-active {unit}")).stdout.trim() == state
    });
}
