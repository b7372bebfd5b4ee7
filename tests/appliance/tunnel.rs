//! First steps as README.Debian has them, and what they give: the tunnel, its status, its log.

use serde_json::Value;

use super::netns::wait_for;
use super::pair::{CLIENT, EGRESS, INGRESS, PORT, Pair, SERVER, marker};
use std::time::Duration;

/// Copy the example, start the instance.
pub fn first_steps(pair: &Pair) {
    pair.point("write egress.toml and ingress.toml, systemctl start, curl: served at once, IPv4 and IPv6", || {
        for (host, name, text) in [(&pair.server, "egress", EGRESS), (&pair.client, "ingress", INGRESS)] {
            host.sh(&format!("cp /usr/share/doc/tng/examples/sample-{name}.toml /etc/tng/{name}.toml"));
            assert_eq!(host.read(&format!("/etc/tng/{name}.toml")), text, "the packaged example is the tree's");
            host.sh(&format!("tngctl check {name}"));
            host.sh(&format!("systemctl start tng@{name}"));
        }
        for answer in pair.curls(&marker("first")) {
            answer.unwrap_or_else(|e| panic!("{e}"));
        }
        String::new()
    });
    pair.point("nothing of request or answer is on the wire, IPv4 and IPv6", || {
        let word = marker("tunnelled");
        for answer in pair.curls(&word) {
            answer.unwrap_or_else(|e| panic!("{e}"));
        }
        pair.assert_unseen(&word);
        String::new()
    });
    pair.point("the service sees and logs the client's own addresses", || {
        let word = marker("who");
        for (answer, own) in pair.curls(&word).into_iter().zip(CLIENT) {
            let answer = answer.unwrap_or_else(|e| panic!("{e}"));
            assert!(answer.contains(&format!("from={own} ")), "{answer}");
            let line = format!("{own} /{word}");
            wait_for("nginx's log line", Duration::from_secs(5), || {
                pair.server.read("/var/log/nginx/who.log").lines().any(|l| l == line)
            });
        }
        String::new()
    });
    pair.point("a stranger's plaintext never reaches the service, IPv4 and IPv6", || {
        for addr in SERVER {
            let word = marker("stranger");
            let answer = pair.wire.knock(addr.parse().expect("address"), PORT, &word);
            assert!(!answer.as_ref().is_ok_and(|a| a.contains("from=")), "{addr}: the service answered {answer:?}");
            assert!(!pair.server.read("/var/log/nginx/who.log").contains(&word), "{addr}: the service saw it");
        }
        String::new()
    });
    for (host, name) in [(&pair.client, "ingress"), (&pair.server, "egress")] {
        pair.point(&format!("{name}: tngctl status is healthy (exit 0), and says that the evidence is sample"), || {
            let out = host.try_sh(&format!("tngctl status {name}"));
            assert!(out.ok(), "exit {:?}\n{}{}", out.status.code(), out.stdout, out.stderr);
            assert!(out.stdout.contains(&format!("{name} ready")), "{}", out.stdout);
            assert!(out.stdout.contains("SAMPLE EVIDENCE"), "{}", out.stdout);
            String::new()
        });
        pair.point(&format!("{name}: systemctl status has a Status: line that says what it does"), || {
            let text = host.sh(&format!("systemctl status --no-pager -n 0 tng@{name}"));
            let line = text.lines().find(|line| line.trim_start().starts_with("Status:"));
            line.unwrap_or_else(|| panic!("no Status: line\n{text}")).trim().to_owned()
        });
        pair.point(&format!("{name}: the unit's Type is what this systemd can"), || {
            let version = systemd_version(host);
            let kind = host.property(&format!("tng@{name}.service"), "Type");
            assert_eq!(kind, if version >= 253 { "notify-reload" } else { "notify" }, "systemd {version}");
            format!("{kind}, systemd {version}")
        });
    }
}

/// Structured fields of the journal.
pub fn journal_has_fields(pair: &Pair) {
    pair.point(
        "journalctl -u tng@ingress -o json: endpoint, source, destination, peer and reason of a connection",
        || {
            pair.wait_served();
            let entry = find(&pair.client, "ingress", |e| e["TNG_REASON"] == "closed");
            assert_eq!(entry["TNG_ENDPOINT"], "trial", "{entry:#}");
            assert_eq!(entry["TNG_SIDE"], "ingress", "{entry:#}");
            assert!(
                text(&entry, "TNG_SRC").starts_with("192.0.2.1:")
                    || text(&entry, "TNG_SRC").starts_with("[2001:db8::1]:"),
                "{entry:#}"
            );
            assert!(text(&entry, "TNG_DST").contains(":8080"), "{entry:#}");
            // tracing's INFO is a notice in the journal.
            assert_eq!(entry["PRIORITY"], "5", "{entry:#}");
            format!("{} {}", text(&entry, "TNG_SRC"), text(&entry, "TNG_PEER"))
        },
    );
    pair.point(
        "journalctl -u tng@egress -o json: a refused connection has its peer and a reason, as a warning",
        || {
            let _ = pair.wire.knock(SERVER[0].parse().expect("address"), PORT, &marker("refused"));
            let entry = find(&pair.server, "egress", |e| text(e, "TNG_SRC").starts_with("192.0.2.254:"));
            assert_eq!(entry["TNG_ENDPOINT"], "trial", "{entry:#}");
            assert_eq!(entry["PRIORITY"], "4", "{entry:#}");
            let reason = text(&entry, "TNG_REASON").to_owned();
            assert!(!reason.is_empty() && reason != "closed", "{entry:#}");
            reason
        },
    );
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry[field].as_str().unwrap_or_default()
}

/// The newest entry of an instance's journal that is wanted.
#[track_caller]
fn find(host: &super::container::Container, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut found = None;
    wait_for("a journal entry with the fields", Duration::from_secs(10), || {
        let lines = host.sh(&format!("journalctl -q --no-pager -o json -u tng@{name} -n 400"));
        found = lines.lines().rev().filter_map(|l| serde_json::from_str::<Value>(l).ok()).find(|e| wanted(e));
        found.is_some()
    });
    found.expect("just found")
}

/// The major version of the system's systemd.
pub fn systemd_version(host: &super::container::Container) -> u32 {
    let text = host.sh("systemctl --version");
    text.split_whitespace().nth(1).and_then(|v| v.parse().ok()).expect("systemctl --version")
}
