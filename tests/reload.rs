//! Taking over a new configuration while connections go on.

mod common;

use std::io::ErrorKind;
use std::time::Duration;

use common::*;
use tng::config::{Mode, Side, TargetHost};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn say(stream: &mut TcpStream, word: &[u8]) -> Vec<u8> {
    stream.write_all(word).await.expect("write");
    let mut back = vec![0; word.len()];
    tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut back)).await.expect("in time").expect("read");
    back
}

/// A service that answers everything with `letter`.
async fn letter(letter: u8) -> std::net::SocketAddr {
    let (listener, addr) = listen().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut byte = [0];
                while stream.read_exact(&mut byte).await.is_ok() {
                    let _ = stream.write_all(&[letter]).await;
                }
            });
        }
    });
    addr
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_settings_are_for_new_connections_and_counters_go_on() {
    let (a, b) = (letter(b'a').await, letter(b'b').await);
    let tls = PlainTls::new(&["rats-tls"]);
    let (out, out_listener) = mapping("out", Side::Egress, a, limits());
    let (inn, in_listener) = mapping("in", Side::Ingress, out_listener.local, limits());
    let entry = in_listener.local;
    let plane = start(&tls, vec![inn.clone(), out.clone()], vec![in_listener, out_listener]);
    let mut old = TcpStream::connect(entry).await.expect("connect");
    assert_eq!(say(&mut old, b"x").await, b"a");

    let mut changed = out.clone();
    if let Mode::Mapping(mapping) = &mut changed.mode {
        mapping.target_host = TargetHost::Addr(b.ip());
        mapping.target_ports = tng::config::PortRange::single(b.port());
    }
    let listeners = plane.listeners().expect("duplicates");
    plane.reload(&config(vec![inn, changed]), listeners).expect("reload");
    assert_eq!(say(&mut old, b"x").await, b"a", "an established connection went elsewhere");
    let mut new = TcpStream::connect(entry).await.expect("connect");
    assert_eq!(say(&mut new, b"x").await, b"b", "a new connection went to the old service");
    for view in plane.endpoint_views() {
        assert_eq!((view.counters.connections_total, view.counters.connections_open), (2, 2), "{}", view.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_endpoint_refuses_and_its_connections_go_on() {
    let service = letter(b'a').await;
    let tls = PlainTls::new(&["rats-tls"]);
    let (out, out_listener) = mapping("out", Side::Egress, service, limits());
    let (one, one_listener) = mapping("one", Side::Ingress, out_listener.local, limits());
    let (two, two_listener) = mapping("two", Side::Ingress, out_listener.local, limits());
    let (first, second) = (one_listener.local, two_listener.local);
    let plane = start(&tls, vec![one, out.clone()], vec![one_listener, out_listener]);
    let mut old = TcpStream::connect(first).await.expect("connect");
    assert_eq!(say(&mut old, b"x").await, b"a");

    let mut listeners = plane.listeners().expect("duplicates");
    // Somebody, systemd for one, may hold a duplicate of the removed listener.
    let held = listeners.iter().position(|l| l.local == first).map(|i| listeners.remove(i)).expect("listener");
    listeners.push(two_listener);
    plane.reload(&config(vec![two, out]), listeners).expect("reload");
    assert_eq!(TcpStream::connect(first).await.expect_err("still listening").kind(), ErrorKind::ConnectionRefused);
    drop(held);
    assert_eq!(say(&mut old, b"x").await, b"a", "an established connection ended");
    let mut new = TcpStream::connect(second).await.expect("connect");
    assert_eq!(say(&mut new, b"x").await, b"a");
    plane.heartbeat(Duration::from_secs(5)).await.expect("every remaining worker answers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_configuration_leaves_the_old_one_running() {
    let service = letter(b'a').await;
    let tls = PlainTls::new(&["rats-tls"]);
    let (out, out_listener) = mapping("out", Side::Egress, service, limits());
    let (inn, in_listener) = mapping("in", Side::Ingress, out_listener.local, limits());
    let entry = in_listener.local;
    let plane = start(&tls, vec![inn.clone(), out.clone()], vec![in_listener, out_listener]);

    let only_one = plane.listeners().expect("duplicates").into_iter().take(1).collect();
    let error = plane.reload(&config(vec![inn.clone(), out.clone()]), only_one).expect_err("no listener");
    assert_eq!(error.reason(), "no-listener");
    let all = plane.listeners().expect("duplicates");
    let error = plane.reload(&config(vec![inn]), all).expect_err("a listener too many");
    assert_eq!(error.reason(), "stray-listener");

    let mut client = TcpStream::connect(entry).await.expect("connect");
    assert_eq!(say(&mut client, b"x").await, b"a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lower_bound_on_connections_holds_after_reload() {
    let service = letter(b'a').await;
    let tls = PlainTls::new(&["rats-tls"]);
    let (out, out_listener) = mapping("out", Side::Egress, service, limits());
    let (inn, in_listener) = mapping("in", Side::Ingress, out_listener.local, limits());
    let entry = in_listener.local;
    let plane = start(&tls, vec![inn.clone(), out.clone()], vec![in_listener, out_listener]);
    let mut first = TcpStream::connect(entry).await.expect("connect");
    assert_eq!(say(&mut first, b"x").await, b"a");
    let mut narrow = inn;
    narrow.limits.max_connections = 1;
    plane.reload(&config(vec![narrow, out]), plane.listeners().expect("duplicates")).expect("reload");
    let mut second = TcpStream::connect(entry).await.expect("connect");
    second.write_all(b"x").await.expect("write");
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), second.read_exact(&mut byte)).await;
    assert!(early.is_err(), "served beyond the new bound");
    drop(first);
    tokio::time::timeout(Duration::from_secs(5), second.read_exact(&mut byte)).await.expect("in time").expect("read");
    assert_eq!(&byte, b"a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renamed_endpoint_keeps_its_socket_and_loses_no_connection() {
    let service = letter(b'a').await;
    let tls = PlainTls::new(&["rats-tls"]);
    let (out, out_listener) = mapping("out", Side::Egress, service, limits());
    let (inn, in_listener) = mapping("in", Side::Ingress, out_listener.local, limits());
    let entry = in_listener.local;
    let plane = start(&tls, vec![inn.clone(), out.clone()], vec![in_listener, out_listener]);
    let mut renamed = inn;
    renamed.name = tng::config::EndpointName::new("renamed").expect("name");
    let mut listeners = plane.listeners().expect("duplicates");
    for listener in listeners.iter_mut().filter(|l| l.local == entry) {
        listener.endpoint = renamed.name.clone();
    }
    plane.reload(&config(vec![renamed, out]), listeners).expect("reload");
    let mut client = TcpStream::connect(entry).await.expect("connect");
    assert_eq!(say(&mut client, b"x").await, b"a");
    assert_eq!(plane.endpoint_views()[0].counters.connections_total, 1);
}
