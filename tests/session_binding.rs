//! Two endpoints that speak `tng/1`, and endpoints that meet peers which do not.

#[path = "common/tls.rs"]
mod common;
mod fakes;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use fakes::aa::{FakeAa, Mode as Aa};
use fakes::as_rest::{FakeAs, Mode as As};
use tng::config::{AsService, Attest, AttestProvider, TrustedSigners, Verify, VerifyProvider};
use tng::tls::{Alpn, EndpointTls, Peer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn peers_that_both_have_it_speak_tng1_and_bytes_pass() {
    for (client, server) in [
        (mutual(), mutual()),
        (client_side(), server_side()),
        (server_side(), client_side()),
        (mutual(), server_side()),
    ] {
        let row = format!("{client:?} {server:?}");
        let verifies = (client.verify.is_some(), server.verify.is_some());
        let (client, server) = (endpoint(client), endpoint(server));
        let (c, s) = meet(&client, &server).await;
        let (mut c, mut s) = (c.expect(&row), s.expect(&row));
        assert_eq!((c.alpn, s.alpn), (Alpn::Tng1, Alpn::Tng1));
        let verified = |peer: &Peer| matches!(peer, Peer::Verified(_));
        assert_eq!((verified(&c.peer), verified(&s.peer)), verifies, "{row}");
        c.stream.write_all(b"ping").await.unwrap();
        c.stream.flush().await.unwrap();
        s.stream.write_all(b"pong").await.unwrap();
        s.stream.shutdown().await.unwrap();
        let (mut question, mut answer) = ([0; 4], Vec::new());
        s.stream.read_exact(&mut question).await.unwrap();
        c.stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!((&question, &answer[..]), (b"ping", &b"pong"[..]));
        assert_eq!((client.status().session_bound, server.status().session_bound), (1, 1));
    }
}

#[tokio::test]
async fn later_connections_confirm_the_session_and_carry_its_age() {
    let (client, server) = (endpoint(mutual()), endpoint(mutual()));
    let first = meet(&client, &server).await;
    let verdict = |peer: &Peer| match peer {
        Peer::Verified(v) => v.clone(),
        Peer::Unverified => panic!("not verified"),
    };
    let made = verdict(&first.0.as_ref().unwrap().peer);
    for _ in 0..5 {
        let (c, s) = meet(&client, &server).await;
        assert_eq!(verdict(&c.unwrap().peer), made, "the same verdict, not a younger one");
        s.unwrap();
    }
    for side in [&client, &server] {
        let status = side.status();
        assert_eq!((status.session_bound, status.session_confirmed, status.certificate_bound), (1, 5, 0));
        assert_eq!(status.cache_hits, 5);
    }
}

#[tokio::test]
async fn a_side_that_only_attests_counts_what_it_showed() {
    let (client, server) = (endpoint(client_side()), endpoint(server_side()));
    for _ in 0..3 {
        let (c, s) = meet(&client, &server).await;
        let _ = (c.unwrap(), s.unwrap());
    }
    let [client, server] = [client.status(), server.status()];
    assert_eq!((server.session_bound, server.session_confirmed, server.cache_hits), (1, 2, 0));
    assert_eq!((client.session_bound, client.session_confirmed, client.cache_hits), (1, 2, 2));
}

#[tokio::test]
async fn a_session_is_not_resumed_beyond_verdict_ttl_and_never_with_zero() {
    let with = |ttl| ra(None, Some(Verify { verdict_ttl: ttl, ..verify_sample(true) }));
    let server = endpoint(server_side());
    let each_time = endpoint(with(Duration::ZERO));
    for _ in 0..3 {
        meet(&each_time, &server).await.0.unwrap();
    }
    assert_eq!((each_time.status().session_bound, each_time.status().session_confirmed), (3, 0));

    let brief = endpoint(with(Duration::from_secs(1)));
    let first = meet(&brief, &server).await;
    let Peer::Verified(verdict) = &first.0.as_ref().unwrap().peer else { panic!("not verified") };
    // An open connection has its verdict renewed meanwhile; that does not make the session younger.
    while std::time::SystemTime::now() <= verdict.expires_at {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let again = meet(&brief, &server).await;
    again.0.unwrap();
    assert_eq!(brief.status().session_bound, 2);
}

#[tokio::test]
async fn a_hundred_at_once_from_both_sides_cost_one_exchange_each_and_do_not_wait_for_each_other() {
    let (client, server) = (endpoint(mutual()), endpoint(mutual()));
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let (c, s): (Arc<EndpointTls>, Arc<EndpointTls>) = (client.clone(), server.clone());
            tokio::spawn(async move {
                let (c, s) = meet(&c, &s).await;
                (c.map(drop), s.map(drop))
            })
        })
        .collect();
    for task in tasks {
        let (c, s) = task.await.unwrap();
        c.unwrap();
        s.unwrap();
    }
    for side in [&client, &server] {
        assert_eq!((side.status().session_bound, side.status().session_confirmed), (1, 99));
    }
}

#[tokio::test]
async fn an_endpoint_that_forgot_makes_new_evidence() {
    let client = endpoint(client_side());
    meet(&client, &endpoint(server_side())).await.0.unwrap();
    // Another process, another key.
    meet(&client, &endpoint(server_side())).await.0.unwrap();
    assert_eq!((client.status().session_bound, client.status().session_confirmed), (2, 0));
}

#[tokio::test]
async fn peers_without_tng1_are_met_in_rats_tls() {
    for new_client in [true, false] {
        let (new, old) = (endpoint(mutual()), rats_tls(mutual()));
        let (client, server) = if new_client { (&new, &old) } else { (&old, &new) };
        for _ in 0..2 {
            let (c, s) = meet(client, server).await;
            assert_eq!((c.unwrap().alpn, s.unwrap().alpn), (Alpn::RatsTls, Alpn::RatsTls));
        }
        assert_eq!((new.status().certificate_bound, new.status().session_bound), (2, 0));
        assert_eq!(new.status().cache_hits, 1);
    }
}

#[tokio::test]
async fn a_downgrade_is_refused_by_the_side_that_requires_the_binding() {
    for client_requires in [true, false] {
        let (strict, old) = (endpoint(requiring(mutual())), rats_tls(mutual()));
        let (client, server) = if client_requires { (&strict, &old) } else { (&old, &strict) };
        let (c, s) = meet(client, server).await;
        let (c, s) = (c.err().unwrap(), s.err().unwrap());
        let (wants, lacks) = if client_requires { (c, s) } else { (s, c) };
        assert_eq!((wants.reason(), lacks.reason()), ("session-binding-required", "tls-alpn"));
        let text = wants.to_string();
        assert!(text.contains("this side has require_session_binding") && text.contains("tng/1"), "{text}");
        assert!(lacks.to_string().contains("require_session_binding"), "{lacks}");
        assert_eq!(strict.status().refused["session-binding-required"], 1);

        // The next peer that can is let in.
        let able = endpoint(mutual());
        let (client, server) = if client_requires { (&strict, &able) } else { (&able, &strict) };
        let (c, s) = meet(client, server).await;
        assert_eq!((c.unwrap().alpn, s.unwrap().alpn), (Alpn::Tng1, Alpn::Tng1));
    }
}

#[tokio::test]
async fn the_refused_side_learns_why() {
    let refusing = || ra(Some(attest_sample()), Some(verify_sample(false)));
    for client_refuses in [true, false] {
        let (strict, other) = (endpoint(refusing()), endpoint(mutual()));
        let (client, server) = if client_refuses { (&strict, &other) } else { (&other, &strict) };
        let (c, s) = meet(client, server).await;
        let (refuses, refused) = if client_refuses { (c, s) } else { (s, c) };
        assert_eq!(refuses.err().unwrap().reason(), "sample-tee-refused");
        let refused = refused.err().unwrap();
        assert_eq!(refused.reason(), "session-refused");
        assert!(refused.to_string().ends_with("sample-tee-refused"), "{refused}");
    }
    // And a side that has no evidence says so itself.
    let (c, s) = meet_ra(mutual(), client_side()).await;
    assert_eq!((c.err().unwrap().reason(), s.err().unwrap().reason()), ("peer-no-evidence", "session-unattested"));
}

#[tokio::test]
async fn while_the_agent_is_away_bound_sessions_go_on_and_new_ones_are_refused_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAa::start(&dir.path().join("aa.sock"), Aa::Good);
    let provider = AttestProvider::Aa { socket: agent.socket.clone() };
    let attest = Attest { provider, ..attest_sample() };
    let (known, stranger, server) =
        (endpoint(client_side()), endpoint(client_side()), endpoint(ra(Some(attest), None)));
    meet(&known, &server).await.0.unwrap();
    assert_eq!(server.status().aa_calls, 4, "TEE type and evidence, for the certificate and the session");
    agent.set(Aa::Error);
    meet(&known, &server).await.0.unwrap();
    let (c, s) = meet(&stranger, &server).await;
    assert_eq!(s.err().unwrap().reason(), "aa-error");
    let told = c.err().unwrap();
    assert!(told.reason() == "session-refused" && told.to_string().ends_with("aa-error"), "{told}");
    agent.set(Aa::Good);
    meet(&stranger, &server).await.0.unwrap();
}

#[tokio::test]
async fn a_session_whose_peer_is_refused_later_is_not_resumed() {
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let rest = AsService {
        trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
        timeout: Duration::from_secs(2),
        ..AsService::at(service.url())
    };
    let verify =
        Verify { provider: VerifyProvider::As(rest), verdict_ttl: Duration::from_secs(3), ..verify_sample(true) };
    let (client, server) = (endpoint(ra(None, Some(verify))), endpoint(server_side()));
    let (c, _s) = meet(&client, &server).await;
    let c = c.unwrap();
    assert_eq!(service.appraisals(), 1);
    service.set(As::Status("contraindicated"));
    let standing = c.standing.as_ref().unwrap();
    standing.ended().await;
    assert_eq!(standing.why().unwrap().reason, "token-status-contraindicated");
    let Peer::Verified(first) = &c.peer else { panic!("not verified") };
    let (again, _) = meet(&client, &server).await;
    assert_eq!(again.err().unwrap().reason(), "token-status-contraindicated");
    assert!(std::time::SystemTime::now() < first.expires_at, "the session had not ended by itself");
}
