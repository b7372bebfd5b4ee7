//! The egress as an HTTP/2 CONNECT server, driven by an HTTP/2 client as TNG's multiplex is; and the ingress as such a
//! client.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::*;
use h2::Reason;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tng::daemon::DataPlane;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

async fn client(pair: &Pair) -> SendRequest<Bytes> {
    let tls = pair.tls.clone();
    let tcp = TcpStream::connect(pair.tunnel).await.expect("connect");
    let (send, connection) = h2::client::handshake(tls.dial(tcp).await.expect("tls")).await.expect("http/2");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    send.ready().await.expect("ready")
}

fn pair(service: std::net::SocketAddr) -> Pair {
    let mut pair = Pair::to(service);
    // The client of these tests offers h2; the egress trusts the same certificate.
    let tls = PlainTls::new(&["h2"]);
    let (out, listener) = mapping("out", tng::config::Side::Egress, service, limits());
    pair.tunnel = listener.local;
    pair.egress = start(&tls, vec![out], vec![listener]);
    pair.tls = tls;
    pair
}

fn connect() -> Request<()> {
    Request::builder().method(Method::CONNECT).uri("tng.internal:443").body(()).expect("request")
}

async fn read_all(body: &mut h2::RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(part) = timeout(Duration::from_secs(10), body.data()).await.expect("in time") {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        all.extend_from_slice(&part);
    }
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_connect_stream_is_a_connection_with_its_own_record() {
    let pair = pair(echo().await);
    let mut send = client(&pair).await;
    for text in ["first", "second"] {
        let (response, mut stream) = send.send_request(connect(), false).expect("request");
        let response = response.await.expect("response");
        assert_eq!(response.status(), StatusCode::OK);
        stream.send_data(Bytes::from(text), false).expect("data");
        stream.send_data(Bytes::new(), true).expect("end");
        assert_eq!(read_all(&mut response.into_body()).await.expect("body"), text.as_bytes());
    }
    eventually("two records", || ended(&pair.egress, "closed") == 2).await;
    drop(send);
    eventually("the carrier's record", || ended(&pair.egress, "closed") == 3).await;
    assert_eq!(pair.egress.open_connections(), 0);
    assert_eq!(pair.egress.endpoint_views()[0].counters.bytes_up, 11);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_larger_than_every_window_arrives_whole() {
    let pair = pair(echo().await);
    let mut send = client(&pair).await;
    let (response, mut stream) = send.send_request(connect(), false).expect("request");
    let mut body = response.await.expect("response").into_body();
    let sent: Vec<u8> = (0..6_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let copy = sent.clone();
    let sending = async move {
        for chunk in copy.chunks(100_000) {
            let mut rest = Bytes::copy_from_slice(chunk);
            while !rest.is_empty() {
                stream.reserve_capacity(rest.len());
                let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.expect("open").expect("room");
                stream.send_data(rest.split_to(room.min(rest.len())), false).expect("data");
            }
        }
        stream.send_data(Bytes::new(), true).expect("end");
    };
    let (_, back) = tokio::join!(sending, read_all(&mut body));
    assert!(back.expect("body") == sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_close_is_end_stream_in_both_directions() {
    let (service, addr) = listen().await;
    let pair = pair(addr);
    let mut send = client(&pair).await;
    let (response, mut stream) = send.send_request(connect(), false).expect("request");
    let mut body = response.await.expect("response").into_body();
    stream.send_data(Bytes::from_static(b"question"), true).expect("data and end");
    let (mut served, _) = service.accept().await.expect("accept");
    let mut question = Vec::new();
    served.read_to_end(&mut question).await.expect("END_STREAM arrives as an end");
    assert_eq!(question, b"question");
    served.write_all(b"answer").await.expect("still open");
    drop(served);
    assert_eq!(read_all(&mut body).await.expect("body"), b"answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_pass_through_as_resets() {
    let (service, addr) = listen().await;
    let pair = pair(addr);
    let mut send = client(&pair).await;

    let (response, mut stream) = send.send_request(connect(), false).expect("request");
    let mut body = response.await.expect("response").into_body();
    let (served, _) = service.accept().await.expect("accept");
    socket2::SockRef::from(&served).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(served);
    let error = read_all(&mut body).await.expect_err("a clean end");
    assert_eq!(error.reason(), Some(Reason::CONNECT_ERROR));
    eventually("record", || ended(&pair.egress, "target-reset") == 1).await;
    let _ = stream.send_data(Bytes::new(), true);

    let (response, mut stream) = send.send_request(connect(), false).expect("request");
    response.await.expect("response");
    let (mut served, _) = service.accept().await.expect("accept");
    stream.send_reset(Reason::CANCEL);
    let seen = timeout(Duration::from_secs(5), served.read_to_end(&mut Vec::new())).await.expect("no end at all");
    assert_eq!(seen.expect_err("a clean end").kind(), std::io::ErrorKind::ConnectionReset);
    eventually("record", || ended(&pair.egress, "peer-reset") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_methods_are_refused_and_the_next_connect_is_served() {
    let pair = pair(echo().await);
    let mut send = client(&pair).await;
    let get = Request::builder().uri("https://tng.internal/").body(()).expect("request");
    let (response, _) = send.send_request(get, true).expect("request");
    let response = response.await.expect("response");
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let text = read_all(&mut response.into_body()).await.expect("body");
    assert_eq!(text, b"Protocol Error: the method should be CONNECT");
    assert_eq!(ended(&pair.egress, "not-connect"), 1);
    let (response, _stream) = send.send_request(connect(), false).expect("request");
    assert_eq!(response.await.expect("response").status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_service_resets_its_stream_only() {
    let pair = pair(closed_port().await);
    let mut send = client(&pair).await;
    for round in 1..=2 {
        let (response, _stream) = send.send_request(connect(), false).expect("request");
        let error = response.await.expect_err("no response");
        assert_eq!(error.reason(), Some(Reason::CONNECT_ERROR));
        eventually("record", || ended(&pair.egress, "target-refused") == round).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_refuses_new_streams_and_lets_open_ones_finish() {
    let pair = pair(echo().await);
    let mut send = client(&pair).await;
    let (response, mut stream) = send.send_request(connect(), false).expect("request");
    let mut body = response.await.expect("response").into_body();
    let plane = pair.egress.clone();
    let draining = tokio::spawn(async move { plane.drain(Duration::from_secs(20)).await });
    // GOAWAY arrives: no further stream can be opened.
    eventually("draining", || pair.egress.is_draining()).await;
    timeout(Duration::from_secs(5), async {
        while let Ok(ready) = send.clone().ready().await {
            send = ready;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("streams are still taken");
    stream.send_data(Bytes::from_static(b"last"), true).expect("an open stream goes on");
    assert_eq!(read_all(&mut body).await.expect("body"), b"last");
    let outcome = timeout(Duration::from_secs(10), draining).await.expect("in time").expect("drain");
    assert_eq!(outcome.aborted, 0);
}

/// TNG's pool opens several connections at once and drops all but one before their first stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_ends_before_its_first_stream_is_no_refusal() {
    let pair = pair(echo().await);
    let established = || metric(&pair.egress, "tng_handshake_duration_seconds_count{endpoint=\"out\",side=\"egress\"}");
    let dial = async || {
        let before = established();
        let tunnel = pair.tls.dial(TcpStream::connect(pair.tunnel).await.expect("connect")).await.expect("tls");
        // The server's half of the handshake may be under way still, and a reset would end that.
        eventually("established", || established() > before).await;
        tunnel
    };
    drop(dial().await);
    let mut greeted = dial().await;
    greeted.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("preface");
    drop(greeted);
    let mut reset = dial().await;
    reset.write_all(b"PRI").await.expect("a part of the preface");
    socket2::SockRef::from(reset.get_ref().0).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(reset);
    eventually("their records", || pair.egress.open_connections() == 0).await;
    assert_eq!(ended(&pair.egress, "closed"), 3, "{:?}", pair.egress.endpoint_views()[0].refusals);
    assert_eq!(pair.egress.endpoint_views()[0].counters.connections_refused, 0);
    // One that speaks something else is refused.
    dial().await.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("write");
    eventually("the refusal", || ended(&pair.egress, "http2-error") == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_streams_than_a_hundred_are_served_up_to_the_bound() {
    let tls = PlainTls::new(&["h2"]);
    let bound = 301;
    let limits = tng::config::Limits { max_connections: bound, ..limits() };
    let (out, listener) = mapping("out", tng::config::Side::Egress, echo().await, limits);
    let tunnel = listener.local;
    let egress = start(&tls, vec![out], vec![listener]);
    let tcp = TcpStream::connect(tunnel).await.expect("connect");
    let (send, connection) = h2::client::handshake(tls.dial(tcp).await.expect("tls")).await.expect("http/2");
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let mut open = Vec::new();
    // The connection itself has a place.
    for _ in 0..bound - 1 {
        let mut ready = send.clone().ready().await.expect("ready");
        open.push(ready.send_request(connect(), false).expect("request"));
    }
    let mut held = Vec::new();
    for (response, stream) in open {
        let response = timeout(Duration::from_secs(20), response).await.expect("in time").expect("a stream");
        assert_eq!(response.status(), StatusCode::OK);
        held.push((response, stream));
    }
    let mut ready = send.clone().ready().await.expect("ready");
    let (beyond, _stream) = ready.send_request(connect(), false).expect("request");
    let error = timeout(Duration::from_secs(10), beyond).await.expect("in time").expect_err("beyond the bound");
    assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
    eventually("its record", || ended(&egress, "too-many-connections") == 1).await;
    drop(held);
}

/// GOAWAY asks; a client that answers nothing must not keep its connection, and the place it takes, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_client_that_ignores_goaway_is_cut_off() {
    let tls = PlainTls::new(&["h2"]);
    let brief = Duration::from_millis(300);
    let limits = tng::config::Limits { idle_timeout: brief, handshake_timeout: brief, ..limits() };
    let (out, listener) = mapping("out", tng::config::Side::Egress, echo().await, limits);
    let addr = listener.local;
    let egress = start(&tls, vec![out], vec![listener]);
    let mut tunnel = tls.dial(TcpStream::connect(addr).await.expect("connect")).await.expect("tls");
    // RFC 9113, section 3.4: the preface and an empty SETTINGS frame; then nothing, no acknowledgement either.
    tunnel.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("preface");
    let mut frames = Vec::new();
    let _ = timeout(Duration::from_secs(10), tunnel.read_to_end(&mut frames)).await.expect("it is never cut off");
    eventually("the place is free", || egress.open_connections() == 0).await;
}

/// An ingress whose peer at `tunnel` takes nothing but h2.
fn ingress(
    tls: &std::sync::Arc<PlainTls>,
    tunnel: std::net::SocketAddr,
) -> (std::sync::Arc<DataPlane>, std::net::SocketAddr) {
    let (inn, listener) = mapping("in", tng::config::Side::Ingress, tunnel, limits());
    let entry = listener.local;
    (start(tls, vec![inn], vec![listener]), entry)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ingress_reaches_a_service_through_a_multiplexing_egress() {
    let tls = PlainTls::new(&["h2"]);
    let (out, listener) = mapping("out", tng::config::Side::Egress, echo().await, limits());
    let (plane, entry) = ingress(&tls, listener.local);
    let egress = start(&tls, vec![out], vec![listener]);
    // More than every window and buffer on the way.
    let sent: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
    for _ in 0..2 {
        let (mut reader, mut writer) = TcpStream::connect(entry).await.expect("connect").into_split();
        let wanted = sent.clone();
        let write = tokio::spawn(async move {
            writer.write_all(&wanted).await.expect("write");
            writer.shutdown().await.expect("half-close");
        });
        let mut got = Vec::new();
        timeout(Duration::from_secs(20), reader.read_to_end(&mut got)).await.expect("in time").expect("read");
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        write.await.expect("writer");
    }
    eventually("their records", || ended(&plane, "closed") == 2).await;
    eventually("streams and carriers", || ended(&egress, "closed") == 4).await;
    assert_eq!((plane.open_connections(), egress.open_connections()), (0, 0));
}

/// A server that answers while the client still uploads, and closes: what it did not read makes its end a reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_arrives_before_the_reset_of_its_stream() {
    const UPLOAD: usize = 1 << 20;
    // One that fits into every buffer on the way, and one that fits into none.
    for (length, rounds) in [(9, 40), (900_000, 10)] {
        let answer: Vec<u8> = [
            format!("HTTP/1.1 413 Payload Too Large\r\nContent-Length: {length}\r\n\r\n").into_bytes(),
            (0..length).map(|n: u32| (n % 251) as u8).collect(),
        ]
        .concat();
        let (service, addr) = listen().await;
        let said = answer.clone();
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = service.accept().await {
                let said = said.clone();
                tokio::spawn(async move {
                    let mut some = vec![0; 64 * 1024];
                    let _ = tcp.read_exact(&mut some).await;
                    let _ = tcp.write_all(&said).await;
                    // Whatever a direct client would get, it has: the close is a reset, of what was read by then.
                    while tng::relay::Leg::unacknowledged(&tcp) > 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                });
            }
        });
        let tls = PlainTls::new(&["h2"]);
        let (out, listener) = mapping("out", tng::config::Side::Egress, addr, limits());
        let (_ingress, entry) = ingress(&tls, listener.local);
        let egress = start(&tls, vec![out], vec![listener]);
        for round in 0..rounds {
            let (mut reader, mut writer) = TcpStream::connect(entry).await.expect("connect").into_split();
            let upload = tokio::spawn(async move {
                let _ = writer.write_all(&vec![7; UPLOAD]).await;
                writer
            });
            let (mut got, mut part) = (Vec::new(), [0; 16 * 1024]);
            loop {
                match timeout(Duration::from_secs(20), reader.read(&mut part)).await.expect("in time") {
                    Ok(0) | Err(_) => break,
                    Ok(count) => got.extend_from_slice(&part[..count]),
                }
            }
            assert!(got == answer, "round {round}: {} of {} bytes", got.len(), answer.len());
            drop(upload.await.expect("upload"));
        }
        let ends = |reason| ended(&egress, reason);
        eventually("the records", || ends("target-reset") + ends("closed") >= rounds).await;
        assert!(ends("target-reset") > 0, "the server's close was a reset");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_refuses_behind_a_multiplexing_egress_is_a_reset() {
    let tls = PlainTls::new(&["h2"]);
    let (out, listener) = mapping("out", tng::config::Side::Egress, closed_port().await, limits());
    let (plane, entry) = ingress(&tls, listener.local);
    let _egress = start(&tls, vec![out], vec![listener]);
    expect_refusal(entry).await;
    eventually("its record", || ended(&plane, "http2-error") == 1).await;
}

/// As TNG 2.8's egress: what it is asked, how it answers, and what becomes of a stream that it cuts off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ingress_asks_a_multiplexing_egress_as_tng_does() {
    let tls = PlainTls::new(&["h2"]);
    let (listener, tunnel) = listen().await;
    let (plane, entry) = ingress(&tls, tunnel);
    let acceptor = tls.clone();
    let peer = tokio::spawn(async move {
        for status in [StatusCode::OK, StatusCode::BAD_REQUEST, StatusCode::OK] {
            let (tcp, _) = listener.accept().await.expect("accept");
            let stream = acceptor.take(tcp).await.expect("tls");
            let mut connection = h2::server::handshake(stream).await.expect("http/2");
            let (request, mut respond) = connection.accept().await.expect("a stream").expect("a request");
            let (head, mut body) = request.into_parts();
            assert_eq!((head.method, head.uri.to_string()), (Method::CONNECT, "tng.internal".to_owned()));
            assert!(head.headers.is_empty(), "{:?}", head.headers);
            let answer = http::Response::builder().status(status).body(()).expect("answer");
            let mut send = respond.send_response(answer, status != StatusCode::OK).expect("answered");
            if status != StatusCode::OK {
                let _ = timeout(Duration::from_secs(10), connection.accept()).await;
                continue;
            }
            send.send_data(Bytes::from_static(b"hello"), false).expect("data");
            // Until the client has said something; then the connection just ends, in the middle of the stream.
            let said = async { body.data().await.expect("data").expect("bytes") };
            tokio::select! {
                said = said => assert_eq!(&said[..], b"hi"),
                other = connection.accept() => assert!(other.is_none(), "another stream"),
            }
        }
    });
    for cut_off in [true, false] {
        // The refused stream resets its client, maybe within the connect.
        let Some(mut client) = connect_or_reset(entry).await else {
            assert!(!cut_off, "the first stream is answered");
            continue;
        };
        let mut got = Vec::new();
        if cut_off {
            let mut hello = [0; 5];
            timeout(Duration::from_secs(10), client.read_exact(&mut hello)).await.expect("in time").expect("hello");
            client.write_all(b"hi").await.expect("write");
        }
        let end = timeout(Duration::from_secs(10), client.read_to_end(&mut got)).await.expect("in time");
        assert!(end.is_err(), "a cut-off answer must not look complete");
    }
    eventually("the refused stream's record", || ended(&plane, "stream-refused") == 1).await;
    peer.abort();
}
