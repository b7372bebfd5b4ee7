//! The boot: someone sends from the earliest moment that systemd allows, on the client and on the wire.

use std::time::Duration;

use super::failures::with_stranger;
use super::netns::{wait_for, wait_until};
use super::pair::{INGRESS, PORT, Pair, SERVER, marker};
use super::reload::{assert_broken, wait_state};
use super::traffic::Load;

/// Sends to the captured destination from before the network is there.
const EARLY: &str = include_str!("early.py");
/// As early as a unit can be: no default dependencies, wanted by the first target that has any.
const EARLY_UNIT: &str = "[Unit]
Description=Sends before anything else
DefaultDependencies=no
Before=sysinit.target network-pre.target
[Service]
ExecStart=/usr/bin/python3 -I /usr/local/bin/early-sender
StandardOutput=null
[Install]
WantedBy=sysinit.target
";

/// Protected boot, unprotected boot (the control), boot with a broken file; then the server's.
pub fn boots(pair: &Pair) {
    if !pair.settle() {
        return;
    }
    let word = marker("early");
    pair.client.write("/usr/local/bin/early-sender", EARLY);
    pair.client.write("/etc/early-marker", &word);
    pair.client.write("/etc/systemd/system/early-sender.service", EARLY_UNIT);
    pair.point("systemctl enable tng@ingress, tng@egress", || {
        // nftables.service flushes the ruleset when it starts and when it stops, at a shutdown as well.
        pair.client.sh("systemctl enable early-sender.service nftables.service tng@ingress 2>&1");
        pair.server.sh("systemctl enable tng@egress 2>&1");
        String::new()
    });

    pair.point("boot of the client: someone sends from before the network is there, and nothing leaves in plaintext", || {
        reboot_client(pair);
        pair.wait_served();
        let sent = early(pair, true);
        pair.assert_unseen(&word);
        assert!(sent.before_network > 0, "the sender was not early: {sent:?}");
        assert!(sent.served > 0, "the tunnel serves the sender after the boot: {sent:?}");
        let order = pair.client.sh("systemctl show -P ActiveEnterTimestampMonotonic tng-guard@ingress network-pre.target tng@ingress.socket tng@ingress.service").replace('\n', " ");
        let times: Vec<u64> = order.split_whitespace().filter_map(|t| t.parse().ok()).collect();
        assert!(times.len() >= 2 && times[0] <= times[1], "the guard is up before network-pre.target: {order}");
        format!("{sent:?}")
    });

    pair.point("shutdown of the client: someone sends until the end, and nothing leaves in plaintext", || {
        // For the next boot; it runs on.
        pair.client.sh("systemctl disable tng@ingress 2>&1");
        pair.client.power_off();
        pair.assert_unseen(&word);
        String::new()
    });
    pair.point(
        "the same boot with tng disabled: the early sender's plaintext is on the wire (positive control)",
        || {
            reboot_client(pair);
            let seen = wait_until(Duration::from_secs(20), || pair.wire.saw(&word));
            assert!(seen, "the sniffer saw nothing: {:?}", early(pair, false));
            String::new()
        },
    );

    pair.point(
        "boot with a broken file: the boot goes on, the unit says which line, the last good captures refuse",
        || {
            pair.client.sh("systemctl enable tng@ingress 2>&1; systemctl start tng@ingress");
            pair.wait_served();
            pair.client
                .write("/etc/tng/ingress.toml", &INGRESS.replacen("[ingress.netfilter]", "[ingress.netfilter", 1));
            pair.wire.forget();
            reboot_client(pair);
            wait_state(&pair.client, "tng@ingress.service", "active");
            let line = 1 + INGRESS.lines().position(|l| l.starts_with("[ingress.netfilter]")).expect("table");
            let text = assert_broken(pair, &format!("ingress.toml:{line}:"));
            pair.assert_unseen(&word);
            let sent = early(pair, false);
            assert_eq!(sent.served, 0, "{sent:?}");
            text
        },
    );
    pair.point("mended and reloaded after that boot, it serves", || {
        pair.client.write("/etc/tng/ingress.toml", INGRESS);
        pair.client.sh("systemctl reload tng@ingress");
        pair.wait_served();
        String::new()
    });
    pair.point("a broken file that never was good: the start fails, and systemctl status says which line", || {
        let host = &pair.client;
        host.write("/etc/tng/never.toml", "[[ingress]]\nname = \"never\"\nlisten = 1\n");
        let out = host.try_sh("systemctl start tng@never");
        assert!(!out.ok(), "it started");
        let status = host.try_sh("systemctl status --no-pager tng@never.socket tng@never.service tng-guard@never.service; journalctl -q --no-pager -u 'tng@never.*' -u tng-guard@never -n 30").stdout;
        assert!(status.contains("never.toml:3:"), "nobody names the line:\n{status}");
        host.sh("systemctl stop tng@never tng@never.socket tng-guard@never; systemctl reset-failed 'tng*never*' || true; rm /etc/tng/never.toml; systemctl daemon-reload");
        assert!(!host.sh("nft list tables").contains("never"));
        String::new()
    });
    pair.client.sh("systemctl disable early-sender.service nftables.service 2>&1; nft delete table inet filter; systemctl stop early-sender.service; rm -f /usr/local/bin/early-sender /etc/early-marker /etc/systemd/system/early-sender.service; systemctl daemon-reload");
    server(pair);
}

/// The same for the service's side: the stranger on the wire knocks all through the boot.
fn server(pair: &Pair) {
    if !pair.settle() {
        return;
    }
    pair.point(
        "boot of the server: a stranger's plaintext gets no answer at any time; the tunnel serves after it",
        || {
            let word = marker("server-boot");
            let client = pair.traffic(&word, &Load::STEADY);
            with_stranger(&pair.wire, || {
                pair.server.power_off();
                pair.server.boot(&pair.wire);
                pair.server.wait_booted();
                wait_state(&pair.server, "nginx.service", "active");
                client.wait_served(20);
            });
            let sums = client.finish(false);
            pair.assert_unseen(&word);
            format!("client: {sums}")
        },
    );
    pair.point("the same boot with tng disabled: the stranger is answered (positive control)", || {
        pair.server.sh("systemctl disable tng@egress 2>&1");
        pair.server.power_off();
        pair.server.boot(&pair.wire);
        pair.server.wait_booted();
        wait_for("an answer to the stranger", Duration::from_secs(20), || {
            let answer = pair.wire.knock(SERVER[0].parse().expect("address"), PORT, "stranger");
            answer.is_ok_and(|text| text.contains("from="))
        });
        pair.server.sh("systemctl start tng@egress");
        pair.wait_served();
        String::new()
    });
}

/// Orderly power off, boot of the same files; what the wire saw before the boot is forgotten.
#[track_caller]
fn reboot_client(pair: &Pair) {
    pair.client.power_off();
    pair.wire.forget();
    pair.client.boot(&pair.wire);
    pair.client.wait_booted();
}

/// What the early sender wrote down.
// `refused` is for messages.
#[allow(dead_code)]
#[derive(Debug, Default, serde::Deserialize)]
struct Early {
    tries: u64,
    before_network: u64,
    refused: u64,
    served: u64,
}

/// Waits until the sender wrote down something, or was served.
#[track_caller]
fn early(pair: &Pair, until_served: bool) -> Early {
    let mut sent = Early::default();
    wait_until(Duration::from_secs(20), || {
        let text = pair.client.try_sh("cat /run/early-sender.json").stdout;
        sent = serde_json::from_str(&text).unwrap_or_default();
        // A network that is there, and some time with it.
        sent.tries > sent.before_network + 20 && (!until_served || sent.served > 0)
    });
    sent
}
