//! Connections of an egress that were accepted and are not established yet. Strangers make them, so they have bounds of
//! their own: `max_connections` is for peers.
//!
//! Three stages, each ended at once by a stop. First a connection has said nothing: it costs a socket, and has a short
//! deadline. Then it waits for a place among the handshakes, of which each source has a few and all together some. Then
//! its handshake runs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::gate::Gate;
use crate::relay::{ClientAddr, Refusal};

/// Connections of all stages at once. More wait in the listen queue.
const ARRIVALS: usize = 8192;
/// Handshakes at once, each of which holds about 40 KiB and may ask a service.
const HANDSHAKES: usize = 256;
/// The same for sources of which a peer was admitted. Strangers with many addresses take all of the others.
const HANDSHAKES_OF_PEERS: usize = 256;
/// Handshakes at once from one source: an IPv4 address, or a network of IPv6 with 64 bits, which one host may have.
const OF_ONE_SOURCE: usize = 32;
/// Sources of which it is remembered that a peer was admitted.
const ADMITTED: usize = 4096;
/// For how long that counts where no verdict says.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The bounds of one endpoint.
#[derive(Debug)]
pub struct Handshakes {
    /// Taken before accept.
    pub(super) arrivals: Arc<Gate>,
    places: Arc<Semaphore>,
    places_of_peers: Arc<Semaphore>,
    sources: Mutex<HashMap<IpAddr, Source>>,
    admitted: Mutex<HashMap<IpAddr, Instant>>,
}

#[derive(Debug)]
struct Source {
    places: Arc<Semaphore>,
    connections: usize,
}

/// A place among the handshakes, until it is dropped.
pub struct Place {
    _all: OwnedSemaphorePermit,
    _source: Option<OwnedSemaphorePermit>,
}

/// A handshake that runs, until it is dropped.
pub struct Begun<'a> {
    _place: Place,
    _stay: Stay<'a>,
}

/// A connection's stay in the table of its source.
struct Stay<'a> {
    handshakes: &'a Handshakes,
    source: IpAddr,
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        let mut sources = self.handshakes.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sources.get_mut(&self.source) {
            known.connections -= 1;
            if known.connections == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

impl Default for Handshakes {
    fn default() -> Self {
        Self {
            arrivals: Gate::new(ARRIVALS),
            places: Arc::new(Semaphore::new(HANDSHAKES)),
            places_of_peers: Arc::new(Semaphore::new(HANDSHAKES_OF_PEERS)),
            sources: Mutex::default(),
            admitted: Mutex::default(),
        }
    }
}

impl Handshakes {
    /// Returns when the client has said something and a place is free: the handshake may begin.
    ///
    /// # Errors
    /// [`Refusal::Silent`] after `patience` without a byte. The caller bounds the whole.
    pub async fn begin(&self, tcp: &TcpStream, client: ClientAddr, patience: Duration) -> Result<Begun<'_>, Refusal> {
        // A byte, an end, or an error: the handshake meets each of them. A peek, as a new socket may count as readable.
        if timeout(patience, tcp.peek(&mut [0])).await.is_err() {
            return Err(Refusal::Silent(patience));
        }
        let source = source_of(client.0.ip());
        let stay = self.stay(source);
        let place = self.place(source).await?;
        Ok(Begun { _place: place, _stay: stay })
    }

    fn stay(&self, source: IpAddr) -> Stay<'_> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Source { places: Arc::new(Semaphore::new(OF_ONE_SOURCE)), connections: 0 };
        sources.entry(source).or_insert_with(fresh).connections += 1;
        Stay { handshakes: self, source }
    }

    /// A place, first of the source and then of all: those of one source wait for each other and for nobody else.
    async fn place(&self, source: IpAddr) -> Result<Place, Refusal> {
        let (own, all) = match self.is_admitted(source) {
            true => (None, &self.places_of_peers),
            false => {
                let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
                (sources.get(&source).map(|known| known.places.clone()), &self.places)
            }
        };
        let source = match own {
            // Closed only with the process.
            Some(places) => Some(places.acquire_owned().await.map_err(|_| Refusal::Draining)?),
            None => None,
        };
        let all = all.clone().acquire_owned().await.map_err(|_| Refusal::Draining)?;
        Ok(Place { _all: all, _source: source })
    }

    /// A peer at this address was admitted: until `until`, or for ten minutes, its source has no bound of its own.
    pub fn admit(&self, client: ClientAddr, until: Option<SystemTime>) {
        let lives = until.map_or(REMEMBERED, |until| until.duration_since(SystemTime::now()).unwrap_or_default());
        let end = Instant::now() + lives.min(Duration::from_secs(24 * 3600));
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        let source = source_of(client.0.ip());
        if admitted.len() >= ADMITTED && !admitted.contains_key(&source) {
            admitted.retain(|_, end| *end > Instant::now());
            if admitted.len() >= ADMITTED {
                return;
            }
        }
        admitted.insert(source, end);
    }

    fn is_admitted(&self, source: IpAddr) -> bool {
        let admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        admitted.get(&source).is_some_and(|end| *end > Instant::now())
    }
}

/// What counts as one source.
fn source_of(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(_) => addr,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(addr: &str) -> ClientAddr {
        ClientAddr(addr.parse().expect("address"))
    }

    #[tokio::test]
    async fn one_source_waits_for_itself_and_others_go_on() {
        let handshakes = Handshakes::default();
        let (one, other) = (source_of("192.0.2.1".parse().unwrap()), source_of("192.0.2.2".parse().unwrap()));
        let (_a, _b) = (handshakes.stay(one), handshakes.stay(other));
        let mut places = Vec::new();
        for _ in 0..OF_ONE_SOURCE {
            places.push(handshakes.place(one).await.expect("a place"));
        }
        assert!(timeout(Duration::from_millis(50), handshakes.place(one)).await.is_err(), "beyond the source's bound");
        handshakes.place(other).await.expect("another source");
        // A peer of that source was admitted.
        handshakes.admit(client("192.0.2.1:1"), Some(SystemTime::now() + Duration::from_secs(60)));
        handshakes.place(one).await.expect("no bound of its own");
        // Its verdict has ended.
        handshakes.admit(client("192.0.2.1:1"), Some(SystemTime::now()));
        assert!(timeout(Duration::from_millis(50), handshakes.place(one)).await.is_err());
        places.pop();
        handshakes.place(one).await.expect("one was given back");
    }

    #[tokio::test]
    async fn strangers_with_many_addresses_leave_the_places_of_peers() {
        let handshakes = Handshakes::default();
        let mut places = Vec::new();
        for host in 0..HANDSHAKES / OF_ONE_SOURCE {
            let source = source_of(format!("192.0.2.{host}").parse().unwrap());
            let _stay = handshakes.stay(source);
            for _ in 0..OF_ONE_SOURCE {
                places.push(handshakes.place(source).await.expect("a place"));
            }
        }
        let peer = source_of("198.51.100.1".parse().unwrap());
        let _stay = handshakes.stay(peer);
        assert!(timeout(Duration::from_millis(50), handshakes.place(peer)).await.is_err(), "a stranger as well");
        handshakes.admit(client("198.51.100.1:1"), None);
        timeout(Duration::from_secs(5), handshakes.place(peer)).await.expect("not behind strangers").expect("a place");
    }

    #[test]
    fn a_source_is_forgotten_with_its_last_connection() {
        let handshakes = Handshakes::default();
        let source = source_of("2001:db8:0:1:2:3:4:5".parse().unwrap());
        assert_eq!(source.to_string(), "2001:db8:0:1::");
        let (first, second) = (handshakes.stay(source), handshakes.stay(source));
        drop(first);
        assert_eq!(handshakes.sources.lock().unwrap().len(), 1);
        drop(second);
        assert!(handshakes.sources.lock().unwrap().is_empty());
    }
}
