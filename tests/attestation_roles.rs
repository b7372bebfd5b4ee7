//! The role table: who shows a certificate, who is appraised, who is refused. Over loopback TCP.

#[path = "common/tls.rs"]
mod tls;

use std::time::Duration;

use tls::{attest_sample, endpoint, meet, meet_ra, ra, rats_tls, verify_sample};
use tng::tls::{Alpn, Peer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn every_role_row_meets_as_the_table_says() {
    for old in [false, true] {
        every_row(old).await;
    }
}

/// `old`: in RATS-TLS, for want of `tng/1` on one side.
async fn every_row(old: bool) {
    for client_attests in [false, true] {
        for client_verifies in [false, true] {
            for server_attests in [false, true] {
                for server_verifies in [false, true] {
                    let client = ra(client_attests.then(attest_sample), client_verifies.then(|| verify_sample(true)));
                    let server = ra(server_attests.then(attest_sample), server_verifies.then(|| verify_sample(true)));
                    let row = format!(
                        "client {client_attests} {client_verifies}, server {server_attests} {server_verifies}, old {old}"
                    );
                    let bare = |ra: &tng::config::Ra| ra.attest.is_none() && ra.verify.is_none();
                    let bound = !old && !bare(&client) && !bare(&server);
                    let client = if old { rats_tls(client) } else { endpoint(client) };
                    let (c, s) = meet(&client, &endpoint(server)).await;
                    match (server_verifies && !client_attests, &s) {
                        (true, Err(e)) => assert_eq!(e.reason(), "peer-no-certificate", "{row}"),
                        (true, Ok(_)) => panic!("{row}: let in"),
                        (false, Ok(s)) => {
                            assert_eq!(matches!(s.peer, Peer::Verified(_)), server_verifies, "{row}");
                            assert_eq!(s.alpn, if bound { Alpn::Tng1 } else { Alpn::RatsTls }, "{row}");
                        }
                        // In RATS-TLS the client's refusal can reach the server before it is done.
                        (false, Err(e)) => assert!(client_verifies && !server_attests, "{row}: {e}"),
                    }
                    // A client without evidence learns of it in the exchange, where RATS-TLS has it write to nobody.
                    if bound && server_verifies && !client_attests {
                        assert_eq!(c.err().unwrap().reason(), "tls-alert", "{row}");
                        continue;
                    }
                    match (client_verifies && !server_attests, &c) {
                        (true, Err(e)) => assert_eq!(e.reason(), "peer-no-evidence", "{row}"),
                        (true, Ok(_)) => panic!("{row}: let in"),
                        (false, Ok(c)) => assert_eq!(matches!(c.peer, Peer::Verified(_)), client_verifies, "{row}"),
                        (false, Err(e)) => panic!("{row}: {e}"),
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn bytes_pass_and_the_session_is_tls13_without_tickets() {
    let both = || ra(Some(attest_sample()), Some(verify_sample(true)));
    let (c, s) = meet_ra(both(), both()).await;
    let (mut c, mut s) = (c.unwrap(), s.unwrap());
    let (_, session) = c.stream.get_ref();
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
    assert_eq!(session.negotiated_key_exchange_group().unwrap().name(), rustls::NamedGroup::X25519MLKEM768);
    c.stream.write_all(b"ping").await.unwrap();
    c.stream.flush().await.unwrap();
    let mut got = [0; 4];
    s.stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"ping");
    s.stream.write_all(b"pong").await.unwrap();
    s.stream.shutdown().await.unwrap();
    let mut all = Vec::new();
    c.stream.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"pong");
}

#[tokio::test]
async fn the_sample_tee_is_refused_unless_allowed_and_the_refusal_is_a_reset() {
    let client = rats_tls(ra(None, Some(verify_sample(false))));
    let server = endpoint(ra(Some(attest_sample()), None));
    let (c, s) = meet(&client, &server).await;
    assert_eq!(c.err().unwrap().reason(), "sample-tee-refused");
    let mut byte = [0];
    let end = s.unwrap().stream.read(&mut byte).await.unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    let status = client.status();
    assert_eq!(status.refused["sample-tee-refused"], 1);
    assert_eq!(status.last_refusal.unwrap().reason, "sample-tee-refused");
}

#[tokio::test]
async fn verdicts_are_cached_per_certificate_and_new_evidence_is_appraised_anew() {
    let client = rats_tls(ra(None, Some(verify_sample(true))));
    let server = endpoint(ra(Some(attest_sample()), None));
    for _ in 0..5 {
        let (c, s) = meet(&client, &server).await;
        c.unwrap();
        s.unwrap();
    }
    assert_eq!(client.status().cache_hits, 4);

    let each_time = endpoint(ra(Some(tls::attest(Duration::ZERO)), None));
    for _ in 0..3 {
        meet(&client, &each_time).await.0.unwrap();
    }
    assert_eq!(client.status().cache_hits, 4, "a certificate for each handshake");
    assert_eq!(client.status().handshakes_ok, 8);
}
