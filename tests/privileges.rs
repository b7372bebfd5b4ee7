//! What works without CAP_NET_RAW and what must not.

mod common;

use std::process::Command;

use common::*;
use tng::config::*;
use tng::daemon::{BoundListener, DataPlane, DataPlaneError};
use tng::relay::TunnelSide;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Runs the body of `test` in a child without any privilege; true in that child.
fn unprivileged(test: &str) -> bool {
    if std::env::var("TNG_TEST_CHILD").as_deref() == Ok(test) {
        let nobody = 65534;
        nix::unistd::setgroups(&[]).expect("needs root");
        nix::unistd::setresgid(nobody.into(), nobody.into(), nobody.into()).expect("needs root");
        nix::unistd::setresuid(nobody.into(), nobody.into(), nobody.into()).expect("needs root");
        return true;
    }
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", test, "--test-threads=1"])
        .env("TNG_TEST_CHILD", test)
        .output()
        .expect("child");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn captured() -> (Endpoint, BoundListener) {
    let (mut endpoint, listener) = mapping("in", Side::Ingress, "192.0.2.1:1".parse().expect("address"), limits());
    endpoint.mode = Mode::Netfilter(Netfilter {
        capture: vec![Match::default()],
        exclude: Vec::new(),
        capture_local_traffic: false,
        preserve_source: false,
        preserve_source_ports: PortRange { first: 1024, last: 32767 },
        so_mark: DEFAULT_INGRESS_MARK,
        listen_port: Some(listener.local.port()),
    });
    (endpoint, listener)
}

fn try_start(endpoint: Endpoint, listener: BoundListener) -> Result<std::sync::Arc<DataPlane>, DataPlaneError> {
    let tls = PlainTls::new(&["rats-tls"]);
    let factory = Box::new(move |_: &Endpoint| Ok(tls.clone() as std::sync::Arc<dyn TunnelSide>));
    DataPlane::start_with(&config(vec![endpoint]), vec![listener], factory)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

#[test]
fn mappings_work_without_any_privilege() {
    if unprivileged("mappings_work_without_any_privilege") {
        runtime().block_on(async {
            let pair = Pair::to(echo().await);
            let mut client = pair.client().await;
            let mut byte = [0];
            client.write_all(b"x").await.expect("write");
            client.read_exact(&mut byte).await.expect("echo");
        });
    }
}

#[test]
fn captures_without_marks_are_refused_at_start() {
    if unprivileged("captures_without_marks_are_refused_at_start") {
        runtime().block_on(async {
            let (endpoint, listener) = captured();
            let Err(error) = try_start(endpoint, listener) else { panic!("started, and would capture itself") };
            assert_eq!(error.reason(), "mark-denied");
        });
    }
}

#[test]
fn a_connection_to_the_transparent_listener_itself_is_reset() {
    runtime().block_on(async {
        let (endpoint, listener) = captured();
        let local = listener.local;
        let plane = try_start(endpoint, listener).expect("needs CAP_NET_RAW");
        if let Ok(mut client) = TcpStream::connect(local).await {
            let error = client.read(&mut [0]).await.expect_err("a clean end");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        eventually("record", || ended(&plane, "direct-to-listener") == 1).await;
    });
}
