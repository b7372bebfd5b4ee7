//! Clean stops: what goes, what stays when the file says so, and all instances at once.

use std::time::Duration;

use super::container::Container;
use super::netns::wait_until;
use super::pair::{INGRESS, Pair, marker};
use super::reload::wait_state;

/// Everything of tng in the kernel and below /run, as text; empty after a clean stop of all instances.
#[track_caller]
fn traces(host: &Container) -> String {
    host.sh("nft list tables | grep tng || true
        for f in -4 -6; do ip $f rule show pref 565; ip $f route show table 565 2>/dev/null || true; done
        ss -Hltn | grep -E ':4[0-9]{4}\\b' || true
        ls /run/tng/*/control.sock /run/tng/*/handoff.sock 2>/dev/null || true")
}

/// `systemctl stop`, `on_stop`, `tng.target`.
pub fn stops(pair: &Pair) {
    let host = &pair.client;
    if !pair.settle() {
        return;
    }
    pair.point(
        "systemctl stop tng@ingress: rules, guard, routes and sockets are gone, the direct path is back",
        || {
            host.sh("systemctl stop tng@ingress");
            for unit in ["tng@ingress.service", "tng@ingress.socket", "tng-guard@ingress.service"] {
                wait_state(host, unit, "inactive");
            }
            assert_eq!(traces(host), "", "left behind");
            // The egress refuses what is not tunnelled, so the wire alone can show that the path is direct.
            let word = marker("direct");
            let _ = pair.curls(&word);
            assert!(pair.wire.saw(&word), "on_stop = \"open\" gives the direct path back");
            String::new()
        },
    );
    pair.point("systemctl start after it serves again", || {
        host.sh("systemctl start tng@ingress");
        pair.wait_served();
        String::new()
    });
    pair.point("systemctl stop while systemd waits to restart the service: all of it is gone as well", || {
        host.write("/run/systemd/system/tng@ingress.service.d/90-wait.conf", "[Service]\nRestartSec=30\n");
        host.sh("systemctl daemon-reload; systemctl kill -s KILL tng@ingress");
        wait_sub_state(host, "tng@ingress.service", "auto-restart");
        host.sh("systemctl stop tng@ingress");
        for unit in ["tng@ingress.service", "tng@ingress.socket", "tng-guard@ingress.service"] {
            wait_state(host, unit, "inactive");
        }
        assert_eq!(traces(host), "", "left behind");
        // A restart in the same moment is one, and keeps listeners and rules.
        host.sh("systemctl start tng@ingress; systemctl kill -s KILL tng@ingress");
        wait_sub_state(host, "tng@ingress.service", "auto-restart");
        let before = host.sh("systemctl show -P ActiveEnterTimestampMonotonic tng@ingress.socket");
        host.sh("systemctl restart tng@ingress");
        wait_state(host, "tng@ingress.service", "active");
        wait_state(host, "tng-stopped@ingress.service", "inactive");
        let after = host.sh("systemctl show -P ActiveEnterTimestampMonotonic tng@ingress.socket");
        assert_eq!(before, after, "the socket was stopped");
        host.sh("rm /run/systemd/system/tng@ingress.service.d/90-wait.conf; systemctl daemon-reload");
        pair.wait_served();
        String::new()
    });
    pair.point("systemctl stop and start at once: the guard runs in the end", || {
        // The start finds service, socket and guard at different points of their stop.
        for moment in 0..8 {
            host.sh(&format!("systemctl stop tng@ingress; sleep 0.{moment}; systemctl start tng@ingress"));
            wait_state(host, "tng@ingress.service", "active");
            wait_state(host, "tng-guard@ingress.service", "active");
            assert!(host.holds("nft list tables | grep -q tngguard_ingress"), "no guard table");
        }
        pair.wait_served();
        String::new()
    });
    pair.point("on_stop = \"closed\": refused after the stop, until tng-guard@ingress is stopped", || {
        host.write("/etc/tng/ingress.toml", &format!("on_stop = \"closed\"\n{INGRESS}"));
        host.sh("systemctl reload tng@ingress");
        host.sh("systemctl stop tng@ingress");
        wait_state(host, "tng@ingress.socket", "inactive");
        wait_state(host, "tng@ingress.service", "inactive");
        assert!(host.holds("systemctl is-active -q tng-guard@ingress"), "the guard stays");
        let word = marker("closed");
        for answer in pair.curls(&word) {
            answer.expect_err("served after a closing stop");
        }
        pair.assert_unseen(&word);
        host.sh("systemctl stop tng-guard@ingress");
        assert_eq!(traces(host), "", "left behind");
        let word = marker("opened");
        let _ = pair.curls(&word);
        assert!(pair.wire.saw(&word), "the direct path is back");
        String::new()
    });
    pair.point("systemctl stop and start tng.target: all enabled instances, and nothing else", || {
        host.write("/etc/tng/ingress.toml", INGRESS);
        host.write("/etc/tng/second.toml", &second());
        host.sh("systemctl enable tng@ingress tng@second 2>&1; systemctl daemon-reload; systemctl start tng.target");
        for name in ["ingress", "second"] {
            wait_state(host, &format!("tng@{name}.service"), "active");
        }
        pair.wait_served();
        host.sh("systemctl stop tng.target");
        for name in ["ingress", "second"] {
            wait_state(host, &format!("tng@{name}.service"), "inactive");
            wait_state(host, &format!("tng@{name}.socket"), "inactive");
            wait_state(host, &format!("tng-guard@{name}.service"), "inactive");
        }
        assert_eq!(traces(host), "", "left behind");
        host.sh("systemctl start tng.target");
        pair.wait_served();
        for name in ["ingress", "second"] {
            wait_state(host, &format!("tng@{name}.service"), "active");
        }
        host.sh(
            "systemctl disable --now tng@second tng@ingress 2>&1; rm /etc/tng/second.toml; systemctl daemon-reload",
        );
        wait_state(host, "tng@second.service", "inactive");
        host.sh("systemctl start tng@ingress");
        pair.wait_served();
        wait_state(host, "tng-guard@ingress.service", "active");
        String::new()
    });
}

/// An instance that has nothing to do with the first.
fn second() -> String {
    "[[ingress]]\nname = \"second\"\n[ingress.mapping]\nlisten = \"127.0.0.1:10009\"\ntarget = \"192.0.2.2:8080\"\n[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n".into()
}

/// Waits for what `systemctl` shows of a unit in brackets.
#[track_caller]
fn wait_sub_state(host: &Container, unit: &str, state: &str) {
    let mut seen = String::new();
    let reached = wait_until(Duration::from_secs(20), || {
        seen = host.sh(&format!("systemctl show -P SubState {unit}"));
        seen.trim() == state
    });
    assert!(reached, "{unit} is {}, not {state}", seen.trim());
}
