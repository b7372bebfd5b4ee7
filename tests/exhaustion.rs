//! Many connections, few descriptors: everything returns to where it was.
//!
//! Counting descriptors and memory needs a process of its own, so each test runs its body in a child
//! of this test binary.

mod common;

use std::process::Command;
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Whether this process is the child that runs the body of `test`.
fn in_child(test: &str) -> bool {
    if std::env::var("TNG_TEST_CHILD").as_deref() == Ok(test) {
        return true;
    }
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("TNG_TEST_CHILD", test)
        .output()
        .expect("child");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("fd").count()
}

/// Resident memory in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|v| v.parse().ok()).expect("number")
}

async fn open(pair: &Pair, count: usize) -> Vec<TcpStream> {
    let mut all = Vec::new();
    for _ in 0..count {
        let mut stream = pair.client().await;
        stream.write_all(b"x").await.expect("write");
        all.push(stream);
    }
    let mut byte = [0];
    for stream in &mut all {
        timeout(Duration::from_secs(30), stream.read_exact(&mut byte)).await.expect("in time").expect("echo");
    }
    all
}

#[test]
fn two_thousand_connections_leave_nothing_behind() {
    if !in_child("two_thousand_connections_leave_nothing_behind") {
        return;
    }
    runtime().block_on(async {
        let pair = Pair::to(echo().await);
        // The first round pays for what stays: code pages, thread pools, allocator arenas.
        drop(open(&pair, 2000).await);
        eventually("round one ended", || pair.ingress.open_connections() + pair.egress.open_connections() == 0).await;
        let before_fds = descriptors();
        let mut grown = Vec::new();
        // More at once on a busy machine make the allocator keep more, once; a leak grows in every round.
        while grown.last().is_none_or(|grown| *grown >= 16 * 1024) {
            assert!(grown.len() < 4, "more KiB after each round: {grown:?}");
            let before_rss = resident();
            let all = open(&pair, 2000).await;
            assert!(descriptors() > before_fds + 10_000, "the connections do not exist");
            for (index, stream) in all.into_iter().enumerate() {
                if index % 2 == 0 {
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
                }
            }
            eventually("round ended", || pair.ingress.open_connections() + pair.egress.open_connections() == 0).await;
            eventually("descriptors", || descriptors() <= before_fds + 4).await;
            grown.push(resident().saturating_sub(before_rss));
        }
        let all = 2000 * (1 + grown.len() as u64);
        assert_eq!(pair.ingress.endpoint_views()[0].counters.connections_total, all);
        let counters = pair.egress.endpoint_views()[0].counters;
        assert_eq!((counters.connections_total, counters.connections_refused), (all, 0));
        open(&pair, 1).await;
    });
}

#[test]
fn exhausted_descriptors_delay_connections_and_lose_none() {
    if !in_child("exhausted_descriptors_delay_connections_and_lose_none") {
        return;
    }
    runtime().block_on(async {
        let pair = Pair::to(echo().await);
        let mut settled = open(&pair, 1).await.remove(0);
        let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("limit");
        // From here on, only this many more descriptors than now exist.
        let few = descriptors() as u64 + 40;
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, few, hard).expect("limit");
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        // One descriptor for the client's socket, none for the accepted one.
        hoard.pop();
        let mut late = pair.client().await;
        eventually("accept fails", || metric_any(&pair, "descriptors-exhausted") > 0).await;
        pair.ingress.heartbeat(Duration::from_secs(5)).await.expect("backing off is not stalling");
        drop(hoard);
        let mut byte = [0];
        late.write_all(b"x").await.expect("write");
        timeout(Duration::from_secs(10), late.read_exact(&mut byte)).await.expect("in time").expect("echo");
        settled.write_all(b"x").await.expect("write");
        timeout(Duration::from_secs(10), settled.read_exact(&mut byte)).await.expect("in time").expect("echo");
    });
}

fn metric_any(pair: &Pair, error: &str) -> u64 {
    let text = pair.ingress.metrics().encode().expect("metrics");
    text.lines()
        .filter(|l| l.starts_with("tng_accept_errors_total{") && l.contains(error))
        .filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

/// What the issue allows an idle tunnelled connection, both ends together. Here the application and
/// the service are in the same process and come on top.
const IDLE_BUDGET_KIB: usize = 40;

#[test]
fn an_idle_connection_fits_its_budget() {
    if !in_child("an_idle_connection_fits_its_budget") {
        return;
    }
    runtime().block_on(async {
        let pair = Pair::to(echo().await);
        drop(open(&pair, 50).await);
        eventually("warm-up ended", || pair.ingress.open_connections() + pair.egress.open_connections() == 0).await;
        let before = resident();
        let mut all = open(&pair, 500).await;
        // Each has moved more than every buffer on the way holds.
        let (chunk, mut back) = (vec![7; 128 * 1024], vec![0; 128 * 1024]);
        for stream in &mut all {
            let (mut reader, mut writer) = stream.split();
            let (sent, read) = tokio::join!(writer.write_all(&chunk), reader.read_exact(&mut back));
            sent.expect("write");
            read.expect("echo");
        }
        let each = || resident().saturating_sub(before) / all.len();
        // What the bulk left between used pages is given back within seconds.
        eventually("an idle connection within its budget", || each() <= IDLE_BUDGET_KIB).await;
    });
}
