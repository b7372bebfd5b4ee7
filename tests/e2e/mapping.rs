//! Mappings: targets by name, and ranges of ports.

use std::time::Duration;

use serde_json::Value;

use super::netns::{Tng, World, fresh_hex, wait_for};
use super::programs::*;

fn mapping(side: &str, listen: &str, target: &str, rest: &str) -> String {
    format!("[[{side}]]\nname = \"map\"\n[{side}.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n{rest}")
}

#[test]
fn a_target_may_be_a_name_and_an_unknown_one_is_a_refusal_with_a_reason() {
    let world = World::new();
    let _nginx = Nginx::start(&world.server, &["127.0.0.1:30001".into()]);
    let _out = Tng::start(&world.server, "out", &mapping("egress", "203.0.113.2:20001", "127.0.0.1:30001", ATTEST));
    // A hosts file that only this tngd sees: a private mount namespace, and in its own process.
    let hosts = world.client.dir().join("hosts");
    std::fs::write(&hosts, "203.0.113.2 service.example\n").expect("write");
    let file = hosts.to_string_lossy();
    let wrapper = ["unshare", "-m", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\"", &file];
    let text = mapping("ingress", "127.0.0.1:10001", "service.example:20001", VERIFY);
    let tng = Tng::start_through(&wrapper, &world.client, "in", &text);
    let path = format!("/by-name-{}", fresh_hex());
    assert_eq!(
        curl(&world.client, "127.0.0.1:10001", &path).expect_ok(),
        format!("from=127.0.0.1 port=30001 uri={path}\n")
    );
    assert!(!world.saw(&path));
    let open = tng.ctl(&["status"]).expect_ok();
    assert!(open.contains("service.example:20001"), "{open}");
    assert!(tng.stop().success());

    let tng = Tng::start(&world.client, "in", &text);
    let lost = curl(&world.client, "127.0.0.1:10001", &path);
    assert!(!lost.ok(), "a name that nobody knows led to {}", lost.stdout);
    wait_for("the reason in the status", Duration::from_secs(5), || {
        let status: Value = serde_json::from_str(&tng.ctl(&["status", "--json"]).stdout).expect("JSON");
        status[0]["endpoints"][0]["last_refusal"]["reason"] == "target-unresolved"
    });
    let status = tng.ctl(&["status"]).stdout;
    assert!(status.contains("refused      target-unresolved") && status.contains("service.example"), "{status}");
}

#[test]
fn ranges_map_port_by_port() {
    let world = World::new();
    let ports = 30010..=30012;
    let listen: Vec<String> = ports.clone().map(|port| format!("127.0.0.1:{port}")).collect();
    let _nginx = Nginx::start(&world.server, &listen);
    let out = mapping("egress", "203.0.113.2:20010-20012", "127.0.0.1:30010-30012", ATTEST);
    let into = mapping("ingress", "127.0.0.1:10010-10012", "203.0.113.2:20010-20012", VERIFY);
    let _out = Tng::start(&world.server, "out", &out);
    let _in = Tng::start(&world.client, "in", &into);
    for (at, port) in ports.enumerate() {
        let path = format!("/range-{}", fresh_hex());
        let text = curl(&world.client, &format!("127.0.0.1:{}", 10010 + at), &path).expect_ok();
        assert_eq!(text, format!("from=127.0.0.1 port={port} uri={path}\n"));
        assert!(!world.saw(&path));
    }
    for beside in [10009, 10013] {
        assert!(!curl(&world.client, &format!("127.0.0.1:{beside}"), "/").ok(), "port {beside} is not of the range");
    }
}
