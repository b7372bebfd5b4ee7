//! TLS tickets of bound sessions: what they spare, how long they count, and whom they do not let in.

#[path = "common/tls.rs"]
mod common;
mod fakes;
#[path = "common/raw.rs"]
mod raw;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::*;
use fakes::as_rest::{FakeAs, Mode as As};
use raw::{Keys, Raw, message};
use rustls::HandshakeKind;
use rustls::client::Resumption;
use tng::attest::Verdict;
use tng::config::{AsService, Ra, TrustedSigners, Verify, VerifyProvider};
use tng::os::clock::SystemClock;
use tng::tls::session::Message;
use tng::tls::{Channel, ChannelError, EndpointTls, Peer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const TNG1: &[&str] = &["tng/1"];

/// A server's address, where clients come again and again.
struct Place(TcpListener);

impl Place {
    async fn new() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    async fn pair(&self) -> (TcpStream, TcpStream) {
        let (c, s) = tokio::join!(TcpStream::connect(self.0.local_addr().unwrap()), self.0.accept());
        (c.unwrap(), s.unwrap().0)
    }

    async fn meet(&self, client: &EndpointTls, server: &EndpointTls) -> Outcome {
        let (c, s) = self.pair().await;
        tokio::join!(client.connect(c, Some("example.test")), server.accept(s))
    }
}

/// New sessions, confirmed ones, resumed ones.
fn counts(endpoint: &EndpointTls) -> [u64; 3] {
    let status = endpoint.status();
    [status.session_bound, status.session_confirmed, status.session_resumed]
}

fn verdict(peer: &Peer) -> Arc<Verdict> {
    match peer {
        Peer::Verified(verdict) => verdict.clone(),
        Peer::Unverified => panic!("not verified"),
    }
}

#[tokio::test]
async fn later_connections_resume_with_the_sessions_verdict_and_its_age() {
    for (client, server) in [
        (mutual(), mutual()),
        (client_side(), server_side()),
        (server_side(), client_side()),
        (mutual(), server_side()),
        (server_side(), mutual()),
    ] {
        let row = format!("{client:?} {server:?}");
        let verifies = [client.verify.is_some(), server.verify.is_some()];
        let (place, client, server) = (Place::new().await, endpoint(client), endpoint(server));
        let (c, s) = place.meet(&client, &server).await;
        let (first_c, first_s) = (c.expect(&row), s.expect(&row));
        for _ in 0..5 {
            let (c, s) = place.meet(&client, &server).await;
            let (mut c, mut s) = (c.expect(&row), s.expect(&row));
            for (now, first, verifies) in [(&c, &first_c, verifies[0]), (&s, &first_s, verifies[1])] {
                assert_eq!(matches!(now.peer, Peer::Verified(_)), verifies, "{row}");
                if verifies {
                    assert_eq!(verdict(&now.peer), verdict(&first.peer), "the same verdict, not a younger one: {row}");
                }
            }
            c.stream.write_all(b"ping").await.unwrap();
            c.stream.flush().await.unwrap();
            s.stream.write_all(b"pong").await.unwrap();
            s.stream.shutdown().await.unwrap();
            let (mut question, mut answer) = ([0; 4], Vec::new());
            s.stream.read_exact(&mut question).await.unwrap();
            c.stream.read_to_end(&mut answer).await.unwrap();
            assert_eq!((&question, &answer[..]), (b"ping", &b"pong"[..]));
        }
        for side in [&client, &server] {
            assert_eq!(counts(side), [1, 0, 5], "{row}");
            let hits = if side.status().verify.is_some() { 5 } else { 0 };
            assert_eq!(side.status().cache_hits, hits, "{row}");
        }
    }
}

#[tokio::test]
async fn many_at_once_share_the_tickets_there_are_and_the_others_confirm() {
    let (place, client, server) = (Arc::new(Place::new().await), endpoint(mutual()), endpoint(mutual()));
    let (c, s) = place.meet(&client, &server).await;
    let _first = (c.unwrap(), s.unwrap());
    let mut accepting = Vec::new();
    let mut connecting = Vec::new();
    for _ in 0..50 {
        let (c, s) = place.pair().await;
        let (client, server) = (client.clone(), server.clone());
        connecting.push(tokio::spawn(async move { client.connect(c, Some("example.test")).await.map(drop) }));
        accepting.push(tokio::spawn(async move { server.accept(s).await.map(drop) }));
    }
    for task in connecting.into_iter().chain(accepting) {
        task.await.unwrap().unwrap();
    }
    for side in [&client, &server] {
        let [bound, confirmed, resumed] = counts(side);
        assert_eq!((bound, confirmed + resumed), (1, 50));
        assert!(resumed >= 2, "{resumed} of the tickets that the first connection brought were used");
    }
}

/// Waits until the clock is past `ends`.
async fn pass(ends: SystemTime) {
    while SystemTime::now() <= ends {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn brief(verdict_ttl: Duration) -> Ra {
    ra(None, Some(Verify { verdict_ttl, ..verify_sample(true) }))
}

#[tokio::test]
async fn a_server_takes_a_ticket_no_longer_than_the_verdict_it_stands_for() {
    let (place, server, keys) = (Place::new().await, endpoint(brief(Duration::from_secs(2))), Keys::new().await);
    let config = keeping(&keys);
    let (kind, first) = visit(&place, &server, &keys, &config, true).await;
    assert_eq!(kind, HandshakeKind::Full);
    // The open connection has its verdict renewed meanwhile: that does not make the session younger.
    let first = first.unwrap();
    let ends = verdict(&first.peer).expires_at;
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Resumed, "the control");
    pass(ends).await;
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Full, "with a ticket left");
    assert_eq!(counts(&server), [2, 0, 1]);

    let each_time = endpoint(brief(Duration::ZERO));
    for _ in 0..3 {
        assert_eq!(visit(&place, &each_time, &keys, &config, true).await.0, HandshakeKind::Full);
    }
}

#[tokio::test]
async fn a_client_shows_a_ticket_no_longer_than_the_verdict_it_stands_for() {
    let (place, client, keys) = (Place::new().await, endpoint(brief(Duration::from_secs(2))), Keys::new().await);
    let config = Arc::new(keys.server(TNG1));
    let (kind, first) = host(&place, &client, &keys, &config, true).await;
    assert_eq!(kind, HandshakeKind::Full);
    let first = first.unwrap();
    let ends = verdict(&first.peer).expires_at;
    assert_eq!(host(&place, &client, &keys, &config, true).await.0, HandshakeKind::Resumed, "the control");
    pass(ends).await;
    assert_eq!(host(&place, &client, &keys, &config, true).await.0, HandshakeKind::Full, "with a ticket left");
    assert_eq!(counts(&client), [2, 0, 1]);

    let each_time = endpoint(brief(Duration::ZERO));
    for _ in 0..3 {
        assert_eq!(host(&place, &each_time, &keys, &config, true).await.0, HandshakeKind::Full);
    }
}

#[tokio::test]
async fn a_client_shows_no_ticket_of_a_server_that_it_refused() {
    let (place, client, keys) = (Place::new().await, endpoint(client_side()), Keys::new().await);
    let config = Arc::new(keys.server(TNG1));
    for _ in 0..2 {
        let (kind, outcome) = host(&place, &client, &keys, &config, false).await;
        assert_eq!((kind, outcome.err().unwrap().reason()), (HandshakeKind::Full, "session-refused"));
    }
    assert_eq!(host(&place, &client, &keys, &config, true).await.0, HandshakeKind::Full);
    assert_eq!(host(&place, &client, &keys, &config, true).await.0, HandshakeKind::Resumed, "the control");
}

#[tokio::test]
async fn the_tickets_of_a_peer_that_is_refused_later_end() {
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let rest = AsService {
        trusted: TrustedSigners::certs(vec![fakes::fixture("as-ca.pem")]),
        timeout: Duration::from_secs(2),
        ..AsService::at(service.url())
    };
    let verify =
        Verify { provider: VerifyProvider::As(rest), verdict_ttl: Duration::from_secs(4), ..verify_sample(true) };
    let (place, server, keys) = (Place::new().await, endpoint(ra(None, Some(verify))), Keys::new().await);
    let config = keeping(&keys);
    let first = visit(&place, &server, &keys, &config, true).await.1.unwrap();
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Resumed, "the control");
    service.set(As::Status("contraindicated"));
    first.standing.as_ref().unwrap().ended().await;
    let Peer::Verified(verdict) = &first.peer else { panic!("not verified") };
    let (kind, outcome) = visit(&place, &server, &keys, &config, true).await;
    assert!(SystemTime::now() < verdict.expires_at, "the session had not ended by itself");
    assert_eq!((kind, outcome.err().unwrap().reason()), (HandshakeKind::Full, "token-status-contraindicated"));
}

#[tokio::test]
async fn where_nobody_asked_there_is_nothing_to_resume() {
    let (place, server, keys) = (Place::new().await, endpoint(server_side()), Keys::new().await);
    let config = keeping(&keys);
    for _ in 0..3 {
        let (c, s) = place.pair().await;
        let asking_nothing = async {
            let mut raw = keys.connect_as(config.clone(), c).await.unwrap();
            raw.say(Message::Pass).await;
            assert_eq!(raw.hear().await, Message::Pass);
            raw.stream.get_ref().1.handshake_kind().unwrap()
        };
        let (kind, outcome) = tokio::join!(asking_nothing, server.accept(s));
        outcome.unwrap();
        assert_eq!(kind, HandshakeKind::Full);
    }
}

#[tokio::test]
async fn a_reload_of_either_side_ends_tickets() {
    for client_reloads in [true, false] {
        let (place, client, server) = (Place::new().await, endpoint(mutual()), endpoint(mutual()));
        for _ in 0..2 {
            let (c, s) = place.meet(&client, &server).await;
            let _ = (c.unwrap(), s.unwrap());
        }
        let (reloads, other) = if client_reloads { (&client, &server) } else { (&server, &client) };
        assert_eq!(counts(reloads), [1, 0, 1]);
        reloads.reloaded();
        let (c, s) = place.meet(&client, &server).await;
        let _ = (c.unwrap(), s.unwrap());
        assert_eq!(counts(reloads), [2, 0, 1], "it forgot the peer");
        assert_eq!(counts(other), [1, 1, 1], "which it had confirmed to it: no ticket");
        let (c, s) = place.meet(&client, &server).await;
        let _ = (c.unwrap(), s.unwrap());
        assert_eq!(counts(reloads), [2, 0, 2], "new tickets");
    }
}

#[tokio::test]
async fn without_tickets_each_connection_makes_a_full_handshake() {
    let make =
        |ra| EndpointTls::without_resumption(&config(ra, Duration::from_secs(5)), Arc::new(SystemClock)).unwrap();
    for client_has_none in [true, false] {
        let (without, with) = (make(mutual()), endpoint(mutual()));
        let (place, (client, server)) =
            (Place::new().await, if client_has_none { (&without, &with) } else { (&with, &without) });
        for _ in 0..3 {
            let (c, s) = place.meet(client, server).await;
            let _ = (c.unwrap(), s.unwrap());
        }
        for side in [client, server] {
            assert_eq!(counts(side), [1, 2, 0]);
        }
    }
}

#[tokio::test]
async fn a_server_with_new_evidence_or_another_server_at_the_address_does_not_resume() {
    let (place, client) = (Place::new().await, endpoint(client_side()));
    for n in 1..=3 {
        // Another process with a key of its own, as after a restart.
        let server = endpoint(server_side());
        for _ in 0..2 {
            let (c, s) = place.meet(&client, &server).await;
            let _ = (c.unwrap(), s.unwrap());
        }
        assert_eq!(counts(&client), [n, 0, n]);
    }
    // A certificate for each handshake: each is another identity, which the secret of the session outlives.
    let server = endpoint(ra(Some(attest(Duration::ZERO)), None));
    for _ in 0..3 {
        let (c, s) = place.meet(&client, &server).await;
        let _ = (c.unwrap(), s.unwrap());
    }
    assert_eq!(server.status().session_resumed, 0);
}

#[tokio::test]
async fn a_name_or_an_address_that_the_ticket_is_not_of_is_not_shown_it() {
    let (place, client, server) = (Place::new().await, endpoint(client_side()), endpoint(server_side()));
    for name in [Some("one.test"), Some("two.test"), None] {
        let (c, s) = place.pair().await;
        let (c, s) = tokio::join!(client.connect(c, name), server.accept(s));
        let _ = (c.unwrap(), s.unwrap());
    }
    assert_eq!(counts(&client), [1, 2, 0]);
    Place::new().await.meet(&client, &server).await.0.unwrap();
    assert_eq!(counts(&client), [1, 3, 0]);
}

/// A client's configuration that keeps tickets.
fn keeping(keys: &Keys) -> Arc<rustls::ClientConfig> {
    let mut config = keys.client(TNG1);
    config.resumption = Resumption::in_memory_sessions(8);
    Arc::new(config)
}

/// A client of rustls alone; it answers the server's question truly, or refuses.
async fn visit(
    place: &Place,
    server: &EndpointTls,
    keys: &Keys,
    config: &Arc<rustls::ClientConfig>,
    truly: bool,
) -> (HandshakeKind, Result<Channel, ChannelError>) {
    let (c, s) = place.pair().await;
    let visiting = async {
        let mut raw = keys.connect_as(config.clone(), c).await.unwrap();
        let kind = raw.stream.get_ref().1.handshake_kind().unwrap();
        if kind != HandshakeKind::Resumed {
            raw.say(Message::Pass).await;
            let (nonce, _) = raw.asked().await;
            let answer = if truly { message(&raw.evidence(&nonce).await) } else { Message::Refuse("no".into()) };
            raw.say(answer).await;
            let _ = Message::read(&mut raw.stream).await;
        }
        kind
    };
    tokio::join!(visiting, server.accept(s))
}

/// A server of rustls alone, likewise.
async fn host(
    place: &Place,
    client: &EndpointTls,
    keys: &Keys,
    config: &Arc<rustls::ServerConfig>,
    truly: bool,
) -> (HandshakeKind, Result<Channel, ChannelError>) {
    let (c, s) = place.pair().await;
    let hosting = async {
        let mut raw = keys.accept_as(config.clone(), s).await.unwrap();
        let kind = raw.stream.get_ref().1.handshake_kind().unwrap();
        if kind != HandshakeKind::Resumed {
            let (nonce, _) = raw.asked().await;
            let answer = if truly { message(&raw.evidence(&nonce).await) } else { Message::Refuse("no".into()) };
            raw.say(answer).await;
            raw.say(Message::Pass).await;
            let _ = Message::read(&mut raw.stream).await;
        }
        kind
    };
    let (kind, outcome) = tokio::join!(hosting, client.connect(c, None));
    (kind, outcome)
}

#[tokio::test]
async fn tickets_of_a_client_that_was_not_let_in_are_worth_nothing() {
    let (place, server, keys) = (Place::new().await, endpoint(client_side()), Keys::new().await);
    let config = keeping(&keys);
    let stranger = async || {
        let (kind, outcome) = visit(&place, &server, &keys, &config, false).await;
        assert_eq!((kind, outcome.err().unwrap().reason()), (HandshakeKind::Full, "session-refused"));
    };
    // It has its tickets before the exchange, and then shows no evidence.
    stranger().await;
    stranger().await;
    // Nor while the exchange is still under way.
    let (c, s) = place.pair().await;
    let pending = {
        let server = server.clone();
        tokio::spawn(async move { server.accept(s).await.map(drop) })
    };
    let mut held = keys.connect_as(config.clone(), c).await.unwrap();
    held.say(Message::Pass).await;
    held.asked().await;
    stranger().await;
    drop(held);
    pending.await.unwrap().unwrap_err();
    // The control: the same client, let in.
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Full);
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Resumed);
    assert_eq!(counts(&server), [1, 0, 1]);
    // One that the server has forgotten comes as a stranger.
    server.reloaded();
    assert_eq!(visit(&place, &server, &keys, &config, true).await.0, HandshakeKind::Full);
}

#[tokio::test]
async fn a_resumed_handshake_is_no_way_to_rats_tls() {
    let (place, client, keys) = (Place::new().await, endpoint(client_side()), Keys::new().await);
    let ours = keys.server(&["tng/1"]);
    let store = ours.session_storage.clone();
    let ours = Arc::new(ours);
    let (c, s) = place.pair().await;
    let serving = async {
        let mut raw = keys.accept_as(ours.clone(), s).await.unwrap();
        let (nonce, _) = raw.asked().await;
        raw.say(message(&raw.evidence(&nonce).await)).await;
        raw.say(Message::Pass).await;
        assert_eq!(raw.hear().await, Message::Accept);
        raw
    };
    let (outcome, _raw): (_, Raw) = tokio::join!(client.connect(c, None), serving);
    outcome.unwrap();
    // The same server takes the ticket, and says that the connection is of the other protocol.
    let mut other = keys.server(&["rats-tls"]);
    other.session_storage = store;
    let other = Arc::new(other);
    let (c, s) = place.pair().await;
    let (outcome, _) = tokio::join!(client.connect(c, None), keys.accept_as(other, s));
    assert_eq!(outcome.err().unwrap().reason(), "session-ticket");
    assert_eq!(client.status().refused["session-ticket"], 1);
}

#[tokio::test]
async fn who_does_not_speak_tng1_gets_no_ticket() {
    let (place, server, keys) = (Place::new().await, endpoint(mutual()), Keys::new().await);
    for (alpn, tickets) in [(&["rats-tls"][..], 0), (&["tng/1", "rats-tls"][..], 2)] {
        let counted = Arc::new(Counted::default());
        let mut config = keys.client(alpn);
        config.resumption = Resumption::store(counted.clone());
        let (c, s) = place.pair().await;
        let accepting = {
            let server = server.clone();
            tokio::spawn(async move { server.accept(s).await })
        };
        let mut raw = keys.connect_as(Arc::new(config), c).await.unwrap();
        // A byte of the server's comes after all tickets: of its question in tng/1, which waits for this, ...
        if tickets > 0 {
            raw.say(Message::Pass).await;
            raw.stream.read_exact(&mut [0]).await.unwrap();
            drop(raw);
            accepting.await.unwrap().err().unwrap();
        } else {
            // ... of the application in rats-tls.
            let mut channel = accepting.await.unwrap().unwrap();
            channel.stream.write_all(b"x").await.unwrap();
            channel.stream.flush().await.unwrap();
            raw.stream.read_exact(&mut [0]).await.unwrap();
        }
        assert_eq!(counted.0.load(std::sync::atomic::Ordering::SeqCst), tickets, "{alpn:?}");
    }
}

/// Counts tickets.
#[derive(Debug, Default)]
struct Counted(std::sync::atomic::AtomicUsize);

impl rustls::client::ClientSessionStore for Counted {
    fn set_kx_hint(&self, _: rustls::pki_types::ServerName<'static>, _: rustls::NamedGroup) {}
    fn kx_hint(&self, _: &rustls::pki_types::ServerName<'_>) -> Option<rustls::NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _: rustls::pki_types::ServerName<'static>, _: rustls::client::Tls12ClientSessionValue) {
    }
    fn tls12_session(&self, _: &rustls::pki_types::ServerName<'_>) -> Option<rustls::client::Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _: &rustls::pki_types::ServerName<'static>) {}
    fn insert_tls13_ticket(
        &self,
        _: rustls::pki_types::ServerName<'static>,
        _: rustls::client::Tls13ClientSessionValue,
    ) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
    fn take_tls13_ticket(
        &self,
        _: &rustls::pki_types::ServerName<'static>,
    ) -> Option<rustls::client::Tls13ClientSessionValue> {
        None
    }
}
