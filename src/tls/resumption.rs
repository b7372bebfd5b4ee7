//! TLS 1.3 resumption of bound sessions (RFC 8446, section 2.2): a ticket stands for a `tng/1` session and for the
//! verdict made from its evidence, with that verdict's age.
//!
//! rustls gives and takes tickets when the handshake ends, and so before the exchange: here they wait with their own
//! connection, and count from the moment the exchange has let both sides in. rustls shows no certificate to a verifier
//! in a resumed handshake: whoever takes a ticket asks here first whether the session still stands.

mod held;
mod issued;

use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use rustls::{HandshakeKind, ServerConnection};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::SessionError;
use super::appraisal::Appraisal;
use super::identity::Fixed;
use super::session::BoundSession;
use held::{Held, Place, Settled, Wallet};
use issued::{Desk, Issued};

/// Tickets that a server gives with a full handshake: one to follow it, one for another connection at the same time.
/// One that took a ticket gives one for it.
const TICKETS: usize = 2;

/// Tickets of one endpoint, in both roles.
#[derive(Default)]
pub(super) struct Tickets {
    held: Arc<Held>,
    issued: Arc<Issued>,
}

/// The session a ticket stands for. It does not keep it: what the endpoint forgot is gone with its secret.
type Of = Option<Weak<BoundSession>>;

/// The session, if it may still be referred to. A side that does not verify has none, and nothing to say.
fn stands(appraisal: Option<&Appraisal>, of: &Of) -> Option<Option<Arc<BoundSession>>> {
    match (appraisal, of) {
        (None, None) => Some(None),
        (Some(appraisal), Some(of)) => of.upgrade().filter(|session| appraisal.still_bound(session)).map(Some),
        _ => None,
    }
}

impl Tickets {
    /// For a connection to `addr` as a client.
    pub fn as_client(&self, addr: SocketAddr, name: Option<&str>, appraisal: Option<&Arc<Appraisal>>) -> AsClient {
        let place = Place { addr, name: name.map(str::to_owned) };
        let (ticket, session) = match self.held.take(&place, |of| stands(appraisal.map(|a| &**a), of)) {
            Some((ticket, session)) => (Some(ticket), session),
            None => (None, None),
        };
        AsClient { wallet: Wallet::new(ticket), place, session }
    }

    /// For a connection as a server that shows `shown`.
    pub fn as_server(&self, shown: Option<&Arc<Fixed>>, appraisal: Option<&Arc<Appraisal>>) -> AsServer {
        AsServer(Desk::new(self.issued.clone(), shown, appraisal))
    }

    /// The handshake failed. A server whose ticket is to blame, too large for a ClientHello for one, is met without.
    pub fn failed(&self, own: &AsClient) {
        if own.wallet.was_asked() {
            self.held.forget(&own.place);
        }
    }

    /// Forgets all of them.
    pub fn clear(&self) {
        self.held.clear();
        self.issued.clear();
    }
}

/// Tickets of one connection, as its client.
pub(super) struct AsClient {
    wallet: Arc<Wallet>,
    place: Place,
    /// What the ticket that is shown stands for.
    session: Option<Arc<BoundSession>>,
}

/// Tickets of one connection, as its server.
pub(super) struct AsServer(Arc<Desk>);

/// Tickets of one connection.
pub(super) enum Ticketing {
    /// It shows and gets some.
    Client(AsClient),
    /// It is shown and gives some.
    Server(AsServer),
}

impl AsClient {
    /// What rustls asks.
    pub fn store(&self) -> rustls::client::Resumption {
        rustls::client::Resumption::store(self.wallet.clone())
    }
}

impl AsServer {
    /// What rustls asks, and how many tickets it is to give.
    pub fn store(&self) -> (Arc<dyn rustls::server::StoresServerSessions>, usize) {
        (self.0.clone(), TICKETS)
    }

    /// Makes the tickets of this connection known by its label.
    pub fn label(&self, connection: &mut ServerConnection) {
        connection.set_resumption_data(&self.0.label());
    }
}

/// How the handshake was made.
pub(super) enum Handshake {
    /// With certificates: the exchange follows.
    Full,
    /// With a ticket of this session, none when this side does not verify: there is nothing left to ask.
    Resumed(Option<Arc<BoundSession>>),
}

impl Ticketing {
    /// What the handshake that is over was made with.
    ///
    /// # Errors
    /// A resumed handshake without a ticket that stands for a session.
    pub fn handshake(&self, stream: &TlsStream<TcpStream>) -> Result<Handshake, SessionError> {
        let (_, connection) = stream.get_ref();
        if connection.handshake_kind() != Some(HandshakeKind::Resumed) {
            return Ok(Handshake::Full);
        }
        match (self, stream) {
            (Self::Client(own), TlsStream::Client(_)) if own.wallet.was_asked() => {
                Ok(Handshake::Resumed(own.session.clone()))
            }
            (Self::Server(AsServer(desk)), TlsStream::Server(s)) => {
                let label = s.get_ref().1.received_resumption_data().ok_or(SessionError::Ticket)?;
                desk.taken(label).map(Handshake::Resumed).ok_or(SessionError::Ticket)
            }
            _ => Err(SessionError::Ticket),
        }
    }
}

impl Tickets {
    /// Both sides are let in: the tickets that came with this handshake count from now on, as `session` does.
    pub fn keep(&self, ticketing: Ticketing, session: Option<&Arc<BoundSession>>, appraisal: Option<&Arc<Appraisal>>) {
        let of = session.map(Arc::downgrade);
        match ticketing {
            Ticketing::Client(own) => {
                let (held, appraisal) = (self.held.clone(), appraisal.cloned());
                own.wallet.settle(Settled { held, place: own.place, of, appraisal });
            }
            Ticketing::Server(AsServer(desk)) => desk.close(of),
        }
    }
}
