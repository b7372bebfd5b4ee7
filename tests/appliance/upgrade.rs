//! `apt upgrade` under load.

use super::install::use_repository;
use super::pair::{Pair, marker};
use super::reload::listener;
use super::traffic::Load;

/// Both hosts, one after the other, while a client opens connections.
pub fn upgrades(pair: &Pair) {
    for (host, name) in [(&pair.client, "ingress"), (&pair.server, "egress")] {
        if !pair.settle() {
            continue;
        }
        pair.point(&format!("{name}: apt upgrade while a client opens 1,000 connections: none is lost, the listeners are the same sockets"), || {
            let status: serde_json::Value =
                serde_json::from_str(&host.sh(&format!("tngctl status --json {name}"))).expect("JSON");
            let listeners = status[0]["listeners"].as_array().expect("listeners");
            let local = listeners[0]["local"].as_str().expect("local address");
            let port: u16 = local.rsplit(':').next().and_then(|p| p.parse().ok()).expect("port");
            let before = (listener(host, port), host.main_pid(&format!("tng@{name}.service")));
            let old = host.sh("dpkg-query -W -f '${Version}' tng");
            use_repository(host, "next");
            let word = marker("upgrade");
            let client = pair.traffic(&word, &Load { count: 0, ..Load::THOUSAND });
            client.wait_served(100);
            host.sh("DEBIAN_FRONTEND=noninteractive apt-get upgrade -q -y");
            client.wait_served(900);
            let sums = client.finish(false);
            let new = host.sh("dpkg-query -W -f '${Version}' tng");
            assert_ne!(new, old, "apt did not upgrade");
            assert_eq!(sums.served(), sums.total(), "{sums}");
            assert!(sums.total() >= 1000, "{sums}");
            pair.assert_unseen(&word);
            let after = (listener(host, port), host.main_pid(&format!("tng@{name}.service")));
            assert_eq!(after.0, before.0, "the listeners");
            assert_ne!(after.1, before.1, "the data plane is the new one");
            format!("{old} to {new}, {sums}")
        });
    }
}
