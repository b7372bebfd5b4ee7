//! Both ends of the data plane on loopback, with plain TLS in the place of the attested channel.

mod common;

use std::io::ErrorKind;
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const MANY: usize = 8 * 1024 * 1024;

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_whole_in_both_directions() {
    let pair = Pair::to(echo().await);
    let (mut reader, mut writer) = pair.client().await.into_split();
    let sent = noise(MANY);
    let copy = sent.clone();
    let sending = tokio::spawn(async move {
        writer.write_all(&copy).await.expect("write");
        writer.shutdown().await.expect("shutdown");
    });
    let mut back = Vec::new();
    timeout(Duration::from_secs(60), reader.read_to_end(&mut back)).await.expect("in time").expect("read");
    sending.await.expect("sender");
    assert!(back == sent, "{} of {} bytes, or other ones", back.len(), sent.len());
    eventually("both records", || ended(&pair.ingress, "closed") == 1 && ended(&pair.egress, "closed") == 1).await;
    for plane in [&pair.ingress, &pair.egress] {
        let counters = plane.endpoint_views()[0].counters;
        assert_eq!((counters.bytes_up, counters.bytes_down), (MANY as u64, MANY as u64));
        assert_eq!(counters.connections_open, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_direction_closes_by_itself() {
    let (service, addr) = listen().await;
    let pair = Pair::to(addr);
    let mut client = pair.client().await;
    client.write_all(b"question").await.expect("write");
    client.shutdown().await.expect("half-close");
    let (mut served, _) = service.accept().await.expect("accept");
    let mut question = Vec::new();
    served.read_to_end(&mut question).await.expect("the client's end arrives as an end");
    assert_eq!(question, b"question");
    served.write_all(b"answer").await.expect("the other direction is still open");
    drop(served);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.expect("read");
    assert_eq!(answer, b"answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_service_resets_the_application() {
    let pair = Pair::to(closed_port().await);
    expect_refusal(pair.entry).await;
    eventually("both records", || {
        ended(&pair.egress, "target-refused") == 1 && ended(&pair.ingress, "peer-reset") == 1
    })
    .await;
    let refusal = pair.egress.endpoint_views()[0].last_refusal.clone().expect("refusal");
    assert_eq!(refusal.reason, "target-refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_peer_resets_the_application() {
    let tls = PlainTls::new(&["rats-tls"]);
    let (endpoint, listener) = mapping("in", tng::config::Side::Ingress, closed_port().await, limits());
    let entry = listener.local;
    let plane = start(&tls, vec![endpoint], vec![listener]);
    expect_refusal(entry).await;
    eventually("record", || ended(&plane, "target-refused") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_reset_is_a_reset_for_the_application() {
    let (service, addr) = listen().await;
    let pair = Pair::to(addr);
    let mut client = pair.client().await;
    client.write_all(b"question").await.expect("write");
    let (mut served, _) = service.accept().await.expect("accept");
    served.write_all(b"half an ans").await.expect("write");
    let mut part = [0; 11];
    client.read_exact(&mut part).await.expect("read");
    socket2::SockRef::from(&served).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(served);
    expect_reset(&mut client).await;
    eventually("both records", || ended(&pair.egress, "target-reset") == 1 && ended(&pair.ingress, "peer-reset") == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_reset_reaches_the_service_as_a_reset() {
    let (service, addr) = listen().await;
    let pair = Pair::to(addr);
    let mut client = pair.client().await;
    client.write_all(b"question").await.expect("write");
    let (mut served, _) = service.accept().await.expect("accept");
    let mut part = [0; 8];
    served.read_exact(&mut part).await.expect("read");
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(client);
    expect_reset(&mut served).await;
    eventually("record", || ended(&pair.ingress, "client-reset") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_cut_without_close_notify_is_no_clean_end() {
    let (service, addr) = listen().await;
    let pair = Pair::to(addr);
    let tcp = TcpStream::connect(pair.tunnel).await.expect("connect");
    let mut tunnel = pair.tls.dial(tcp).await.expect("handshake");
    tunnel.write_all(b"question").await.expect("write");
    tunnel.flush().await.expect("flush");
    let (mut served, _) = service.accept().await.expect("accept");
    let mut part = [0; 8];
    served.read_exact(&mut part).await.expect("read");
    // FIN without close_notify, as an attacker on the path can make it.
    tunnel.get_mut().0.shutdown().await.expect("shutdown");
    expect_reset(&mut served).await;
    eventually("record", || ended(&pair.egress, "tunnel-truncated") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_tcp_on_the_tunnel_port_never_reaches_the_service() {
    let (service, addr) = listen().await;
    let pair = Pair::to(addr);
    let mut stranger = TcpStream::connect(pair.tunnel).await.expect("connect");
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").await.expect("write");
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(5), stranger.read_to_end(&mut answer)).await.expect("an end");
    eventually("record", || pair.egress.endpoint_views()[0].counters.connections_refused == 1).await;
    assert!(timeout(Duration::from_millis(100), service.accept()).await.is_err(), "the service was connected to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_client_of_the_tunnel_is_cut_off_at_the_deadline() {
    let mut short = limits();
    short.first_byte_timeout = Duration::from_millis(200);
    let pair = Pair::with(closed_port().await, limits(), short);
    let mut silent = TcpStream::connect(pair.tunnel).await.expect("connect");
    let mut nothing = Vec::new();
    let _ = timeout(Duration::from_secs(5), silent.read_to_end(&mut nothing)).await.expect("an end");
    eventually("record", || ended(&pair.egress, "silent-client") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_ends_and_a_busy_one_goes_on() {
    let mut short = limits();
    short.idle_timeout = Duration::from_millis(400);
    let pair = Pair::with(echo().await, short, limits());
    let mut idle = pair.client().await;
    let mut busy = pair.client().await;
    let mut byte = [0];
    for _ in 0..12 {
        busy.write_all(b"x").await.expect("write");
        busy.read_exact(&mut byte).await.expect("echo");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    expect_reset(&mut idle).await;
    assert_eq!(ended(&pair.ingress, "idle-timeout"), 1);
    busy.write_all(b"x").await.expect("write");
    busy.read_exact(&mut byte).await.expect("echo");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_bound_wait_and_are_then_served() {
    let mut one = limits();
    one.max_connections = 1;
    let pair = Pair::with(echo().await, one, limits());
    let mut byte = [0];
    let mut first = pair.client().await;
    first.write_all(b"1").await.expect("write");
    first.read_exact(&mut byte).await.expect("echo");
    let mut second = pair.client().await;
    second.write_all(b"2").await.expect("write");
    assert!(
        timeout(Duration::from_millis(200), second.read_exact(&mut byte)).await.is_err(),
        "served beyond the bound"
    );
    assert_eq!(pair.ingress.open_connections(), 1);
    // The heartbeat has a place of its own.
    pair.ingress.heartbeat(Duration::from_secs(5)).await.expect("a full worker is not a stalled one");
    drop(first);
    timeout(Duration::from_secs(5), second.read_exact(&mut byte)).await.expect("in time").expect("echo");
    assert_eq!(&byte, b"2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bound_that_was_met_once_and_is_free_again_is_not_reached() {
    let three = tng::config::Limits { max_connections: 3, ..limits() };
    let pair = Pair::with(echo().await, three, limits());
    let mut byte = [0];
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut client = pair.client().await;
        client.write_all(b"x").await.expect("write");
        client.read_exact(&mut byte).await.expect("echo");
        open.push(client);
    }
    let bound = || pair.ingress.endpoint_views()[0].bound.clone();
    eventually("it is met", || bound().reached_since.is_some() && bound().taken == 3).await;
    open.pop();
    eventually("it is free again", || bound().reached_since.is_none() && bound().taken == 2).await;
    assert_eq!((bound().reached_times, bound().waiting), (1, 0));
    assert!(pair.ingress.problems().is_empty());
    let mut third = pair.client().await;
    third.write_all(b"y").await.expect("write");
    timeout(Duration::from_secs(5), third.read_exact(&mut byte)).await.expect("in time").expect("echo");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_the_quick_finish_and_resets_the_rest() {
    let pair = Pair::to(echo().await);
    let mut byte = [0];
    let mut quick = pair.client().await;
    let mut stays = pair.client().await;
    for stream in [&mut quick, &mut stays] {
        stream.write_all(b"x").await.expect("write");
        stream.read_exact(&mut byte).await.expect("echo");
    }
    let plane = pair.ingress.clone();
    let draining = tokio::spawn(async move { plane.drain(Duration::from_millis(500)).await });
    eventually("draining", || pair.ingress.is_draining()).await;
    quick.write_all(b"y").await.expect("write");
    quick.read_exact(&mut byte).await.expect("an established connection goes on");
    quick.shutdown().await.expect("shutdown");
    assert_eq!(quick.read(&mut byte).await.expect("clean end"), 0);
    expect_reset(&mut stays).await;
    let outcome = draining.await.expect("drain");
    assert_eq!((outcome.finished, outcome.aborted), (1, 1));
    assert_eq!((ended(&pair.ingress, "closed"), ended(&pair.ingress, "drained")), (1, 1));
    assert_eq!(TcpStream::connect(pair.entry).await.expect_err("still listening").kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_come_back_from_every_worker() {
    let pair = Pair::to(closed_port().await);
    for _ in 0..10 {
        pair.ingress.heartbeat(Duration::from_secs(5)).await.expect("ingress");
        pair.egress.heartbeat(Duration::from_secs(5)).await.expect("egress");
    }
    assert_eq!(pair.ingress.endpoint_views()[0].counters.connections_total, 0, "a heartbeat is no connection");
}

/// As TNG does with a peer that it refuses: RATS-TLS has no word for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_closes_at_once_and_without_a_byte_has_refused_this_side() {
    let tls = PlainTls::new(&["rats-tls"]);
    let (listener, addr) = listen().await;
    let (inn, in_listener) = mapping("in", tng::config::Side::Ingress, addr, limits());
    let entry = in_listener.local;
    let plane = start(&tls, vec![inn], vec![in_listener]);
    for (answers, reason) in [(false, "peer-refused"), (true, "tunnel-truncated")] {
        let mut client = TcpStream::connect(entry).await.expect("connect");
        let (tcp, _) = listener.accept().await.expect("accept");
        let mut tunnel = tls.take(tcp).await.expect("tls");
        if answers {
            tunnel.write_all(b"half an ans").await.expect("write");
            tunnel.flush().await.expect("flush");
            client.read_exact(&mut [0; 11]).await.expect("what came before");
        }
        // No close_notify.
        drop(tunnel.into_inner());
        expect_reset(&mut client).await;
        eventually(reason, || ended(&plane, reason) == 1).await;
    }
}
