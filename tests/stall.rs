//! The watchdog's heartbeat sees a worker that stopped. Needs the cargo feature `failpoints`.
#![cfg(feature = "failpoints")]

mod common;

use std::process::Command;
use std::time::Duration;

use common::*;
use tng::config::Side;

#[test]
fn a_stalled_worker_is_named_and_the_others_go_on() {
    const TEST: &str = "a_stalled_worker_is_named_and_the_others_go_on";
    // The environment belongs to the whole process, so the stalled one is a child.
    if std::env::var_os("TNG_FAILPOINT").is_none() {
        let status = Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", TEST])
            .env("TNG_FAILPOINT", "worker.two.accept=stall")
            .status()
            .expect("child");
        assert!(status.success());
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let service = echo().await;
        let tls = PlainTls::new(&["rats-tls"]);
        let (one, one_listener) = mapping("one", Side::Ingress, service, limits());
        let (two, two_listener) = mapping("two", Side::Ingress, service, limits());
        let healthy = start(&tls, vec![one.clone()], vec![one_listener]);
        healthy.heartbeat(Duration::from_secs(5)).await.expect("a worker that runs");
        let plane = start(&tls, vec![two], vec![two_listener]);
        let stalled = plane.heartbeat(Duration::from_millis(300)).await.expect_err("a worker that stands still");
        assert_eq!(stalled.as_str(), "two");
    });
}
