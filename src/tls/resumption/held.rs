//! Tickets that a client was given.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use tokio::time::Instant;

use super::stands;
use crate::tls::appraisal::Appraisal;
use crate::tls::session::BoundSession;

/// Tickets in all. One holds the server's certificate, 64 KiB at most and rarely a quarter of it.
const CAPACITY: usize = 1024;
/// Tickets of one server: as many new connections of it at once are resumed.
const PER_PLACE: usize = 32;
/// Tickets of one connection; a server that gives more loses them.
const PER_CONNECTION: usize = 4;

/// Where a ticket may be shown again. A server behind the same address that has not given it makes a full handshake.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    pub addr: SocketAddr,
    /// The name in SNI, which a server compares too (RFC 6066, section 3).
    pub name: Option<String>,
}

/// A ticket and what it stands for.
pub struct Ticket {
    pub value: Tls13ClientSessionValue,
    pub session: Option<Arc<BoundSession>>,
}

struct Shelf {
    tickets: VecDeque<Ticket>,
    used: Instant,
}

/// All tickets of an endpoint.
#[derive(Default)]
pub struct Held(Mutex<HashMap<Place, Shelf>>);

impl Held {
    /// The newest ticket for `place` that still stands. It is used once (RFC 8446, appendix C.4).
    pub fn take(&self, place: &Place, stands: impl Fn(Option<&BoundSession>) -> bool) -> Option<Ticket> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let shelf = places.get_mut(place)?;
        shelf.used = Instant::now();
        let mut found = None;
        while let Some(ticket) = shelf.tickets.pop_back() {
            if stands(ticket.session.as_deref()) {
                found = Some(ticket);
                break;
            }
        }
        if shelf.tickets.is_empty() {
            places.remove(place);
        }
        found
    }

    /// Keeps tickets of `session`; the oldest make room.
    pub fn keep(
        &self,
        place: Place,
        session: Option<Arc<BoundSession>>,
        values: Vec<Tls13ClientSessionValue>,
        stands: impl Fn(Option<&BoundSession>) -> bool,
    ) {
        if values.is_empty() {
            return;
        }
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |places: &HashMap<Place, Shelf>| places.values().map(|s| s.tickets.len()).sum::<usize>();
        if places.len() >= CAPACITY / PER_PLACE && count(&places) + values.len() > CAPACITY {
            places.retain(|_, shelf| {
                shelf.tickets.retain(|t| stands(t.session.as_deref()));
                !shelf.tickets.is_empty()
            });
            while count(&places) + values.len() > CAPACITY {
                let Some(idle) = places.iter().min_by_key(|(_, s)| s.used).map(|(p, _)| p.clone()) else { break };
                places.remove(&idle);
            }
        }
        let shelf = places.entry(place).or_insert_with(|| Shelf { tickets: VecDeque::new(), used: Instant::now() });
        shelf.used = Instant::now();
        for value in values {
            if shelf.tickets.len() >= PER_PLACE {
                shelf.tickets.pop_front();
            }
            shelf.tickets.push_back(Ticket { value, session: session.clone() });
        }
    }

    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Where the tickets of a connection go once the exchange has let both sides in.
pub struct Settled {
    pub held: Arc<Held>,
    pub place: Place,
    pub session: Option<Arc<BoundSession>>,
    pub appraisal: Option<Arc<Appraisal>>,
}

impl Settled {
    fn keep(&self, values: Vec<Tls13ClientSessionValue>) {
        let stands = |session: Option<&BoundSession>| stands(self.appraisal.as_deref(), session);
        if stands(self.session.as_deref()) {
            self.held.keep(self.place.clone(), self.session.clone(), values, stands);
        }
    }
}

enum Coming {
    /// The exchange is not over.
    Early(Vec<Tls13ClientSessionValue>),
    /// It is: a server's tickets reach a client with the first bytes that it reads, in a resumed handshake later.
    Late(Settled),
}

/// What rustls sees of it in one connection: one ticket to show, and room for those that come.
pub struct Wallet {
    show: Mutex<Option<Tls13ClientSessionValue>>,
    asked: AtomicBool,
    got: AtomicUsize,
    coming: Mutex<Coming>,
}

impl std::fmt::Debug for Wallet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wallet")
    }
}

impl Wallet {
    pub fn new(show: Option<Tls13ClientSessionValue>) -> Arc<Self> {
        Arc::new(Self {
            show: Mutex::new(show),
            asked: AtomicBool::new(false),
            got: AtomicUsize::new(0),
            coming: Mutex::new(Coming::Early(Vec::new())),
        })
    }

    /// Whether rustls was given the ticket.
    pub fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// The tickets that came, and those that come, go there.
    pub fn settle(&self, there: Settled) {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        if let Coming::Early(values) = &mut *coming {
            there.keep(std::mem::take(values));
        }
        *coming = Coming::Late(there);
    }
}

impl ClientSessionStore for Wallet {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        if self.got.fetch_add(1, Ordering::Relaxed) >= PER_CONNECTION {
            return;
        }
        match &mut *self.coming.lock().unwrap_or_else(PoisonError::into_inner) {
            Coming::Early(values) => values.push(value),
            Coming::Late(there) => there.keep(vec![value]),
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let ticket = self.show.lock().unwrap_or_else(PoisonError::into_inner).take();
        if ticket.is_some() {
            self.asked.store(true, Ordering::Release);
        }
        ticket
    }
}
