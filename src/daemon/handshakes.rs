//! Connections of an egress that were accepted and are not established yet. Strangers make them, so they have bounds of
//! their own: `max_connections` is for peers.
//!
//! Three stages, each ended at once by a stop. First a connection has not sent its whole ClientHello: it costs a socket,
//! and has a short deadline. Then it waits for a place among the handshakes, of which each source has a few and all
//! together some. Then its handshake runs.
//!
//! A source of strangers never has more connections here than there is room left: alone it can take half of the room, two
//! take a third each, and who comes next still finds some (the dynamic threshold of Choudhury and Hahne, 1998).

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::gate::{Gate, Permit};
use crate::os::lock::Lock;
use crate::relay::{ClientAddr, Refusal};

/// Connections of all stages at once. More wait in the listen queue.
const ARRIVALS: usize = 16_384;
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
/// Bytes before a TLS record's content (RFC 8446, section 5.1).
const RECORD_HEADER: usize = 5;
/// The most that a record holds (RFC 8446, section 5.2).
const MAX_RECORD: usize = (1 << 14) + 256;
/// Content type of a handshake record.
const HANDSHAKE: u8 = 22;

/// The bounds of one endpoint.
#[derive(Debug)]
pub struct Handshakes {
    /// Taken before accept.
    pub(super) arrivals: Arc<Gate>,
    /// Handshakes of sources of which nobody was admitted.
    pub(super) strangers: Arc<Gate>,
    /// Handshakes of the others.
    pub(super) peers: Arc<Gate>,
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
    _all: Permit,
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
        let mut sources = self.handshakes.sources.locked();
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
            strangers: Gate::new(HANDSHAKES),
            peers: Gate::new(HANDSHAKES_OF_PEERS),
            sources: Mutex::default(),
            admitted: Mutex::default(),
        }
    }
}

impl Handshakes {
    /// Returns when the client's hello is there and a place is free: the handshake may begin.
    ///
    /// # Errors
    /// [`Refusal::SourceFull`] at once, [`Refusal::Silent`] after `patience` without a whole hello. The caller bounds the
    /// rest.
    pub async fn begin(&self, tcp: &TcpStream, client: ClientAddr, patience: Duration) -> Result<Begun<'_>, Refusal> {
        let source = source_of(client.0.ip());
        let stay = self.stay(source)?;
        if timeout(patience, hello(tcp)).await.is_err() {
            return Err(Refusal::Silent(patience));
        }
        let place = self.place(source).await?;
        Ok(Begun { _place: place, _stay: stay })
    }

    fn stay(&self, source: IpAddr) -> Result<Stay<'_>, Refusal> {
        let is_admitted = self.is_admitted(source);
        let mut sources = self.sources.locked();
        let fresh = || Source { places: Arc::new(Semaphore::new(OF_ONE_SOURCE)), connections: 0 };
        let known = sources.entry(source).or_insert_with(fresh);
        let room = ARRIVALS.saturating_sub(self.arrivals.open());
        if !is_admitted && known.connections > 0 && known.connections >= room {
            return Err(Refusal::SourceFull { of: source, connections: known.connections, room });
        }
        known.connections += 1;
        Ok(Stay { handshakes: self, source })
    }

    /// The source with the most connections here, and how many.
    pub(super) fn busiest(&self) -> Option<(IpAddr, usize)> {
        let sources = self.sources.locked();
        sources.iter().map(|(source, known)| (*source, known.connections)).max_by_key(|(_, connections)| *connections)
    }

    /// A place, first of the source and then of all: those of one source wait for each other and for nobody else.
    async fn place(&self, source: IpAddr) -> Result<Place, Refusal> {
        let (own, all) = match self.is_admitted(source) {
            true => (None, &self.peers),
            false => {
                let sources = self.sources.locked();
                (sources.get(&source).map(|known| known.places.clone()), &self.strangers)
            }
        };
        let source = match own {
            // Closed only with the process.
            Some(places) => Some(places.acquire_owned().await.map_err(|_| Refusal::Draining)?),
            None => None,
        };
        Ok(Place { _all: all.enter().await, _source: source })
    }

    /// A peer at this address was admitted: until `until`, or for ten minutes, its source has no bound of its own.
    pub fn admit(&self, client: ClientAddr, until: Option<SystemTime>) {
        let lives = until.map_or(REMEMBERED, |until| until.duration_since(SystemTime::now()).unwrap_or_default());
        let end = Instant::now() + lives.min(Duration::from_secs(24 * 3600));
        let mut admitted = self.admitted.locked();
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
        let admitted = self.admitted.locked();
        admitted.get(&source).is_some_and(|end| *end > Instant::now())
    }
}

/// Returns when the client's first record is whole. What is no handshake record, an end and an error are the handshake's to
/// meet. Nothing is taken out of the socket.
async fn hello(tcp: &TcpStream) {
    while let Ok(ready) = tcp.ready(Interest::READABLE).await {
        // Nothing comes after an end, and the socket would be ready for ever.
        if ready.is_read_closed() {
            return;
        }
        let peeked = tcp.try_io(Interest::READABLE, || {
            let mut bytes = [0; RECORD_HEADER + MAX_RECORD];
            let count = recv(tcp.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
            if is_whole(&bytes[..count]) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match peeked {
            // More will come, or the patience ends.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// Whether a handshake record is there to its end. What is none, or longer than one may be, is whole as it is.
fn is_whole(bytes: &[u8]) -> bool {
    let [kind, _, _, high, low, content @ ..] = bytes else { return bytes.first() != Some(&HANDSHAKE) };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    *kind != HANDSHAKE || length > MAX_RECORD || content.len() >= length
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
        let (_a, _b) = (handshakes.stay(one).expect("room"), handshakes.stay(other).expect("room"));
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
            let _stay = handshakes.stay(source).expect("room");
            for _ in 0..OF_ONE_SOURCE {
                places.push(handshakes.place(source).await.expect("a place"));
            }
        }
        let peer = source_of("198.51.100.1".parse().unwrap());
        let _stay = handshakes.stay(peer).expect("room");
        assert!(timeout(Duration::from_millis(50), handshakes.place(peer)).await.is_err(), "a stranger as well");
        handshakes.admit(client("198.51.100.1:1"), None);
        timeout(Duration::from_secs(5), handshakes.place(peer)).await.expect("not behind strangers").expect("a place");
    }

    #[test]
    fn a_source_is_forgotten_with_its_last_connection() {
        let handshakes = Handshakes::default();
        let source = source_of("2001:db8:0:1:2:3:4:5".parse().unwrap());
        assert_eq!(source.to_string(), "2001:db8:0:1::");
        let stay = || handshakes.stay(source).expect("room");
        let (first, second) = (stay(), stay());
        drop(first);
        assert_eq!(handshakes.sources.lock().unwrap().len(), 1);
        drop(second);
        assert!(handshakes.sources.lock().unwrap().is_empty());
    }
    #[test]
    fn a_source_of_strangers_takes_no_more_than_there_is_room_left() {
        let handshakes = Handshakes::default();
        let one = source_of("192.0.2.1".parse().unwrap());
        let enter = || handshakes.arrivals.try_enter().expect("a place before accept");
        let (mut permits, mut stays) = (Vec::new(), Vec::new());
        loop {
            permits.push(enter());
            match handshakes.stay(one) {
                Ok(stay) => stays.push(stay),
                Err(refusal) => {
                    assert_eq!(refusal.reason(), "source-full");
                    permits.pop();
                    break;
                }
            }
        }
        assert_eq!(stays.len(), ARRIVALS / 2, "half of the room alone");
        assert_eq!(handshakes.busiest(), Some((one, ARRIVALS / 2)));
        let _other = (enter(), handshakes.stay(source_of("192.0.2.2".parse().unwrap())).expect("another source"));
        // A peer of the first was admitted: it has no bound of its own.
        handshakes.admit(client("192.0.2.1:1"), None);
        let _peer = (enter(), handshakes.stay(one).expect("no bound of its own"));
    }

    #[test]
    fn a_hello_is_whole_with_its_last_byte_and_what_is_no_hello_at_once() {
        let hello = |content: usize| [&[22, 3, 1, 1, 0][..], &vec![0; content]].concat();
        assert!(!is_whole(&[22]) && !is_whole(&hello(0)) && !is_whole(&hello(255)));
        assert!(is_whole(&hello(256)) && is_whole(&hello(300)));
        assert!(is_whole(b"G") && is_whole(b"GET / HTTP/1.1"), "not TLS");
        assert!(is_whole(&[22, 3, 1, 0xff, 0xff]), "longer than a record may be");
        assert!(is_whole(&[]), "an end");
    }
}
