//! Whether every peer does the same work, found out from the outside; a peer's configuration is not asked.

use rustls::{HandshakeKind, ProtocolVersion};

use crate::peers::{End, Peer};
use crate::probe::{Client, ClientSeen, Server};
use crate::tunnel::{Lab, Tunnel};
use crate::wire::{Hello, Tap};
use crate::{Outcome, load};

/// Connections through the tap. The second and third would be resumed by whoever resumes.
const PASSES: usize = 3;
/// Bytes each way of one of them.
const PASS_BYTES: usize = 64 * 1024;

/// What one peer does.
pub struct Seen {
    /// What the ServerHello on the wire between both ends says, or how many things were said.
    pub hello: Result<Hello, String>,
    /// The client end shows a certificate, and signs with its key.
    pub client_certificate: bool,
    /// The server end asks for it, and lets nobody in without one or with a stranger's.
    pub client_verified: bool,
    /// The client end sends nothing to a server with a stranger's certificate.
    pub server_verified: bool,
    /// Any handshake was resumed: on the wire, by the server end, by the client end.
    pub resumed: bool,
    /// The payload's marker was readable between the two ends.
    pub plaintext: bool,
    /// Bytes arrived wrong, or half-close did not arrive as such.
    pub relay: Result<(), String>,
}

/// Looks at one peer.
pub fn check(lab: &Lab, peer: Peer) -> Outcome<Seen> {
    let server = lab.start_end(peer, End::Server, lab.sink.addr().port())?;

    let (asked, refuses, server_resumes) = try_server(lab, peer, server.addr())?;
    let shown = try_client(lab, peer, &lab.certs.server)?;
    let to_stranger = try_client(lab, peer, &lab.certs.stranger)?;

    let tap = Tap::start(server.addr())?;
    let client = lab.start_end(peer, End::Client, tap.port())?;
    let tunnel = Tunnel::of(client, server)?;
    for _ in 0..PASSES {
        load::echo_once(tunnel.addr, PASS_BYTES).map_err(|e| format!("{e}\n  {}", tunnel.last_words()))?;
    }
    let legs = tap.take(PASSES, PASS_BYTES)?;
    let hellos: Vec<Option<Hello>> = legs.iter().map(|leg| leg.hello()).collect();
    // The first connection has nothing to resume.
    let alike = |hello: &Hello| Hello { resumed: false, ..*hello };
    let hello = match hellos[..] {
        [Some(first), ..] if hellos.iter().all(|hello| hello.as_ref().map(alike) == Some(alike(&first))) => Ok(first),
        _ => Err(format!("{hellos:?}")),
    };
    let relay = load::upload(tunnel.addr, 3 << 20).and_then(|()| load::download(tunnel.addr, 3 << 20));

    Ok(Seen {
        hello,
        client_certificate: shown.iter().any(|seen| seen.finished)
            && shown.iter().filter(|seen| seen.finished).all(|seen| seen.certificate),
        client_verified: asked && refuses,
        server_verified: !to_stranger.iter().any(|seen| seen.payload),
        resumed: server_resumes
            || shown.iter().any(|seen| seen.kind == Some(HandshakeKind::Resumed))
            || hellos.iter().flatten().any(|hello| hello.resumed),
        plaintext: legs.iter().any(|leg| leg.shows_marker()),
        relay: relay.map_err(|e| e.to_string()),
    })
}

/// Whether the server end asks for a certificate, refuses none and a stranger's, and resumes sessions.
fn try_server(lab: &Lab, peer: Peer, addr: std::net::SocketAddr) -> Outcome<(bool, bool, bool)> {
    let mut asked = true;
    let mut resumes = false;
    let mut refuses = true;
    let before = lab.sink.opened();
    for identity in [None, Some(&lab.certs.stranger)] {
        let client = Client::new(peer, identity)?;
        for _ in 0..2 {
            let seen = client.probe(addr)?;
            asked &= seen.asked;
            refuses &= !seen.echoed;
            resumes |= seen.kind == Some(HandshakeKind::Resumed);
        }
    }
    refuses &= lab.sink.opened() == before;
    if peer.trusts_our_authority() {
        // The refusals above mean something only if the right certificate is let in.
        let client = Client::new(peer, Some(&lab.certs.client))?;
        for _ in 0..3 {
            let seen = client.probe(addr)?;
            if !seen.echoed || seen.version != Some(ProtocolVersion::TLSv1_3) {
                return Err(format!("the server end does not let the right client in: {seen:?}").into());
            }
            asked &= seen.asked;
            resumes |= seen.kind == Some(HandshakeKind::Resumed);
        }
    }
    Ok((asked, refuses, resumes))
}

/// What a server with that identity sees of the client end.
fn try_client(lab: &Lab, peer: Peer, identity: &crate::certs::Identity) -> Outcome<Vec<ClientSeen>> {
    let server = Server::start(peer, identity)?;
    let client = lab.start_end(peer, End::Client, server.port())?;
    let seen = server.probe(client.addr(), PASSES).map_err(|e| format!("{e}\n  {}", client.last_words()))?;
    if peer.trusts_our_authority() && identity.cert == lab.certs.server.cert && !seen.iter().any(|seen| seen.payload) {
        return Err(format!("the client end sends nothing to the right server: {seen:?}").into());
    }
    Ok(seen)
}

/// What keeps peers from being compared, a sentence each.
pub fn complaints(all: &[(Peer, Seen)]) -> Vec<(Peer, String)> {
    let mut found = Vec::new();
    for (peer, seen) in all {
        let mut say = |wrong: bool, what: &str| {
            if wrong {
                found.push((*peer, what.to_owned()));
            }
        };
        match &seen.hello {
            Err(hellos) => say(true, &format!("its handshakes are not TLS, or differ: {hellos}")),
            Ok(hello) => {
                say(hello.version != 0x0304, "it does not speak TLS 1.3");
                say(hello.suite != 0x1301, "it does not use TLS_AES_128_GCM_SHA256");
            }
        }
        say(!seen.client_certificate, "its client end shows no certificate");
        say(!seen.client_verified, "its server end lets in whom it should not");
        say(!seen.resumed, "it resumes no sessions");
        say(!seen.server_verified, "its client end sends payload to a stranger");
        say(seen.plaintext, "payload can be read between its two ends");
        if let Err(error) = &seen.relay {
            say(true, &format!("its relay is wrong: {error}"));
        }
    }
    found
}
