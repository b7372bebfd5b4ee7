//! What an egress does for a peer before it serves it: a place among the connections, then the connection to the service.
//!
//! In `tng/1` a server that verifies speaks last, and so can say why it does not serve an appraised peer instead of
//! ACCEPT. Other peers have no message to wait for; for them the same happens after the handshake.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use crate::attest::Verdict;
use crate::daemon::{Begun, EndpointRuntime, Permit};
use crate::relay::{ClientAddr, Refusal};
use crate::tls::{ChannelError, Door};

use super::Route;
use crate::os::lock::Lock;

/// What is left of a handshake's deadline for the answer to arrive, and at most this part of it.
const ANSWER: Duration = Duration::from_secs(2);
const ANSWER_PART: u32 = 8;

type Connecting<'a> = Pin<Box<dyn Future<Output = Result<TcpStream, Refusal>> + Send + 'a>>;

enum Service<'a> {
    NotTried,
    UnderWay(Connecting<'a>),
    Connected(TcpStream),
}

/// The way of one connection to its service.
pub(super) struct Entrance<'a> {
    endpoint: &'a EndpointRuntime,
    client: ClientAddr,
    route: &'a Route<'a>,
    /// Until when the peer may wait for its answer.
    answer_by: Instant,
    kept: Mutex<Kept<'a>>,
}

struct Kept<'a> {
    arrival: Option<Permit>,
    handshake: Option<Begun<'a>>,
    place: Option<Permit>,
    service: Service<'a>,
}

impl<'a> Entrance<'a> {
    /// For a connection that has arrived and whose handshake ends at `deadline`.
    pub(super) fn new(
        endpoint: &'a EndpointRuntime,
        client: ClientAddr,
        route: &'a Route<'a>,
        arrival: Permit,
        deadline: Instant,
    ) -> Self {
        let answer = ANSWER.min(endpoint.endpoint.limits.handshake_timeout / ANSWER_PART);
        let kept = Kept { arrival: Some(arrival), handshake: None, place: None, service: Service::NotTried };
        Self { endpoint, client, route, answer_by: deadline - answer, kept: Mutex::new(kept) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept<'a>> {
        self.kept.locked()
    }

    /// Its handshake runs; it counts among the handshakes until the peer is let in.
    pub(super) fn begun(&self, handshake: Begun<'a>) {
        self.kept().handshake = Some(handshake);
    }

    /// The peer is let in: the bound of handshakes no longer counts it. Returns the place that it has already.
    fn let_in(&self, verdict: Option<&Verdict>) -> Option<Permit> {
        self.endpoint.handshakes.admit(self.client, verdict.map(|verdict| verdict.expires_at));
        let mut kept = self.kept();
        kept.handshake = None;
        kept.place.take()
    }

    /// The place among the connections, of a peer whose handshake is through. Waits as long as a handshake may take.
    ///
    /// # Errors
    /// [`Refusal::TooManyConnections`]
    pub(super) async fn place(&self, verdict: Option<&Verdict>) -> Result<Permit, Refusal> {
        let place = match self.let_in(verdict) {
            Some(place) => place,
            None => {
                let limit = self.endpoint.endpoint.limits.handshake_timeout;
                timeout(limit, self.endpoint.gate.enter()).await.map_err(|_| Refusal::TooManyConnections)?
            }
        };
        // Only what is established counts for `max_connections`, and no longer among the arrivals.
        self.kept().arrival = None;
        Ok(place)
    }

    /// The connection to the service.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn service(&self) -> Result<TcpStream, Refusal> {
        let service = std::mem::replace(&mut self.kept().service, Service::NotTried);
        match service {
            Service::Connected(service) => Ok(service),
            Service::UnderWay(connecting) => connecting.await,
            Service::NotTried => reach(self.endpoint, self.route).await,
        }
    }
}

async fn reach(endpoint: &EndpointRuntime, route: &Route<'_>) -> Result<TcpStream, Refusal> {
    let connected = super::connect(endpoint, route).await;
    endpoint.unserved.note(&route.target, connected.is_err());
    connected
}

#[async_trait]
impl Door for Entrance<'_> {
    async fn open(&self, verdict: &Verdict) -> Result<(), ChannelError> {
        drop(self.let_in(Some(verdict)));
        let place = timeout_at(self.answer_by, self.endpoint.gate.enter()).await;
        let place = place.map_err(|_| unserved(&Refusal::TooManyConnections))?;
        let mut connecting: Connecting<'_> = Box::pin(reach(self.endpoint, self.route));
        let connected = timeout_at(self.answer_by, &mut connecting).await;
        let mut kept = self.kept();
        kept.arrival = None;
        kept.place = Some(place);
        match connected {
            Ok(Ok(service)) => kept.service = Service::Connected(service),
            Ok(Err(refusal)) => return Err(unserved(&refusal)),
            // A service that is slower than the peer's patience is waited for as ever, and the peer is let in meanwhile.
            Err(_) => kept.service = Service::UnderWay(connecting),
        }
        Ok(())
    }

    fn is_shut(&self) -> bool {
        self.endpoint.gate.is_full() || self.endpoint.unserved.includes(&self.route.target)
    }
}

/// A refusal that the peer may be told.
pub(super) fn unserved(refusal: &Refusal) -> ChannelError {
    ChannelError::Unserved { reason: refusal.reason(), text: refusal.to_string() }
}
