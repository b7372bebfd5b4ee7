//! The tunnel's own TLS stream against tokio-rustls's at the other end.

mod common;

use std::io::ErrorKind;

use common::*;
use tng::relay::{Leg, TlsLeg, TunnelSide};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

type Client = tokio_rustls::client::TlsStream<TcpStream>;

async fn pair() -> (Client, TlsLeg) {
    let tls = PlainTls::new(&["rats-tls"]);
    let (listener, addr) = listen().await;
    let dialing = async { tls.dial(TcpStream::connect(addr).await.expect("connect")).await.expect("client") };
    let accepting = async {
        let (tcp, _) = listener.accept().await.expect("accept");
        tls.accept(tcp).await.map(|channel| channel.stream).expect("server")
    };
    let (client, server) = tokio::join!(dialing, accepting);
    (client, TlsLeg::new(server))
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

#[tokio::test]
async fn bytes_arrive_whole_whatever_the_reader_takes_at_once() {
    for take in [1, 100, 5_000, 16_384, 40_000, 65_536, 200_000] {
        let (mut client, mut leg) = pair().await;
        let sent = bytes(if take == 1 { 50_000 } else { 700_001 });
        let writing = async {
            client.write_all(&sent).await.expect("write");
            client.shutdown().await.expect("close");
        };
        let reading = async {
            let (mut all, mut part) = (Vec::new(), vec![0; take]);
            loop {
                match leg.read(&mut part).await.expect("read") {
                    0 => return all,
                    count => all.extend_from_slice(&part[..count]),
                }
            }
        };
        let (_, all) = tokio::join!(writing, reading);
        assert!(all == sent, "reads of {take}: {} bytes, or other ones", all.len());
        assert_eq!(leg.read(&mut [0; 8]).await.expect("the end stays an end"), 0);
    }
}

#[tokio::test]
async fn writes_arrive_whole_and_end_with_close_notify() {
    let (mut client, mut leg) = pair().await;
    let sent = bytes(1_500_000);
    let writing = async {
        leg.write_all(&sent).await.expect("write");
        leg.shutdown().await.expect("close");
    };
    let mut all = Vec::new();
    // tokio-rustls reports an end without close_notify as an error.
    let (_, result) = tokio::join!(writing, client.read_to_end(&mut all));
    result.expect("a clean end");
    assert!(all == sent);
}

#[tokio::test]
async fn after_its_own_end_it_still_reads() {
    let (mut client, mut leg) = pair().await;
    leg.shutdown().await.expect("close");
    assert_eq!(client.read(&mut [0; 8]).await.expect("end"), 0);
    client.write_all(b"still here").await.expect("write");
    client.shutdown().await.expect("close");
    let mut all = Vec::new();
    leg.read_to_end(&mut all).await.expect("read");
    assert_eq!(all, b"still here");
}

#[tokio::test]
async fn what_came_before_a_cut_is_read_and_then_the_cut() {
    let (mut client, mut leg) = pair().await;
    client.write_all(b"half").await.expect("write");
    client.flush().await.expect("flush");
    client.get_mut().0.shutdown().await.expect("FIN without close_notify");
    let mut all = Vec::new();
    let error = leg.read_to_end(&mut all).await.expect_err("a clean end");
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(all, b"half");
}

#[tokio::test]
async fn bytes_that_are_no_records_are_invalid_data() {
    let (mut client, mut leg) = pair().await;
    client.get_mut().0.write_all(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n").await.expect("write");
    let error = leg.read(&mut [0; 64]).await.expect_err("taken as bytes");
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    // A record that says it is TLS but was not encrypted with the connection's keys.
    let (mut client, mut leg) = pair().await;
    let mut forged = vec![0x17, 0x03, 0x03, 0x00, 0x40];
    forged.extend_from_slice(&[0x41; 0x40]);
    client.get_mut().0.write_all(&forged).await.expect("write");
    let error = leg.read(&mut [0; 64]).await.expect_err("taken as bytes");
    assert_eq!(error.kind(), ErrorKind::InvalidData);
}

#[tokio::test]
async fn an_abort_is_a_reset_for_the_peer() {
    let (mut client, mut leg) = pair().await;
    leg.abort();
    drop(leg);
    let error = client.read(&mut [0; 8]).await.expect_err("a clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}
