//! The control API over TCP, and an address for it that cannot be had: that keeps no endpoint from serving.

mod common;
#[path = "common/daemon.rs"]
mod daemon;

use std::net::{SocketAddr, TcpListener, TcpStream};

use daemon::{Daemon, ask, echoes, free_port};

/// Both ends of a tunnel to `target` in one instance; the way in and the file.
fn tunnel(target: SocketAddr, control: &str) -> (SocketAddr, String) {
    let (entry, between) = (free_port(), free_port());
    let toml = format!(
        "[control]\nlisten = \"{control}\"\n\
         [[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"{entry}\"\ntarget = \"{between}\"\n\
         [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n\
         [[egress]]\nname = \"out\"\n[egress.mapping]\nlisten = \"{between}\"\ntarget = \"{target}\"\n\
         [egress.attest]\nprovider = \"sample\"\n"
    );
    (entry, toml)
}

fn through(entry: SocketAddr) -> bool {
    tokio::task::block_in_place(|| echoes(entry))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_answers_over_tcp_where_it_is_told_to() {
    let dir = tempfile::tempdir().expect("directory");
    let control = free_port();
    let (entry, toml) = tunnel(common::echo().await, &control.to_string());
    let daemon = Daemon::start(dir.path(), "both", &toml);
    let mut stream = TcpStream::connect(control).expect("connect");
    let answer = tokio::task::block_in_place(|| ask(&mut stream, "/livez")).expect("answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(through(entry), "{}", daemon.log());
    assert!(daemon.get("/readyz").is_some_and(|a| a.contains("\"ready\"")), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_tcp_address_the_endpoints_are_served_and_the_instance_says_what_is_missing() {
    let holder = TcpListener::bind("127.0.0.1:0").expect("bind");
    let taken = holder.local_addr().expect("address").to_string();
    for (control, hint) in [(taken.as_str(), "ss -tanp"), ("192.0.2.77:9100", "no interface has this address")] {
        let dir = tempfile::tempdir().expect("directory");
        let (entry, toml) = tunnel(common::echo().await, control);
        let daemon = Daemon::start(dir.path(), "both", &toml);
        assert!(through(entry), "{control}: {}", daemon.log());
        let status: serde_json::Value = serde_json::from_str(&daemon.ctl(&["status", "--json"])).expect("JSON");
        assert_eq!(status[0]["state"], "degraded", "{control}");
        let problem = status[0]["problems"][0].as_str().unwrap_or_default();
        assert!(problem.contains(control) && problem.contains(hint), "{problem}");
        let shown = daemon.tngctl(&["status"]);
        let text = String::from_utf8_lossy(&shown.stdout);
        assert!(text.contains(&format!("DEGRADED: the control API is not served on {control}")), "{text}");
        assert_eq!(shown.status.code(), Some(1), "{text}");
        assert!(daemon.log().contains("\"control-listen-failed\""), "{}", daemon.log());
    }
}
