//! Tickets that a client was given.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use tokio::time::Instant;

use super::{Of, stands};
use crate::os::lock::Lock;
use crate::tls::appraisal::Appraisal;

/// Tickets in all. rustls keeps the server's certificates with each, 64 KiB at most and rarely a quarter of that, and
/// what the server wrote into it.
const CAPACITY: usize = 1024;
/// Tickets of one place: as many new connections to it at once are resumed.
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

struct Shelf<V> {
    /// Oldest first, each with what it stands for.
    tickets: VecDeque<(V, Of)>,
    used: Instant,
}

struct Table<V> {
    shelves: HashMap<Place, Shelf<V>>,
    count: usize,
}

/// All tickets of an endpoint.
pub struct Held<V = Tls13ClientSessionValue>(Mutex<Table<V>>);

impl<V> Default for Held<V> {
    fn default() -> Self {
        Self(Mutex::new(Table { shelves: HashMap::new(), count: 0 }))
    }
}

impl<V> Held<V> {
    fn table(&self) -> MutexGuard<'_, Table<V>> {
        self.0.locked()
    }

    /// The newest ticket for `place` that still stands, with what `stands` says. It is used once (RFC 8446,
    /// appendix C.4).
    pub fn take<S>(&self, place: &Place, stands: impl Fn(&Of) -> Option<S>) -> Option<(V, S)> {
        let mut table = self.table();
        let Table { shelves, count } = &mut *table;
        let shelf = shelves.get_mut(place)?;
        shelf.used = Instant::now();
        while let Some((value, of)) = shelf.tickets.pop_back() {
            *count -= 1;
            if let Some(session) = stands(&of) {
                return Some((value, session));
            }
        }
        shelves.remove(place);
        None
    }

    /// Keeps tickets; the oldest of the place make room, then the place that was idle longest.
    pub fn keep<S>(&self, place: &Place, of: &Of, values: Vec<V>, stands: impl Fn(&Of) -> Option<S>) {
        let mut table = self.table();
        let Table { shelves, count } = &mut *table;
        if *count + values.len() > CAPACITY {
            shelves.values_mut().for_each(|shelf| shelf.tickets.retain(|(_, of)| stands(of).is_some()));
            *count = shelves.values().map(|shelf| shelf.tickets.len()).sum();
            // Many at once, so that a full table is not searched through for each connection.
            let mut idle: Vec<_> = shelves.iter().map(|(place, shelf)| (shelf.used, place.clone())).collect();
            idle.sort_unstable_by_key(|(used, _)| *used);
            for (_, place) in idle {
                if *count <= CAPACITY * 7 / 8 {
                    break;
                }
                *count -= shelves.remove(&place).map_or(0, |shelf| shelf.tickets.len());
            }
        }
        let empty = || Shelf { tickets: VecDeque::new(), used: Instant::now() };
        let shelf = shelves.entry(place.clone()).or_insert_with(empty);
        shelf.used = Instant::now();
        for value in values {
            if shelf.tickets.len() >= PER_PLACE {
                shelf.tickets.pop_front();
                *count -= 1;
            }
            shelf.tickets.push_back((value, of.clone()));
            *count += 1;
        }
    }

    /// Drops the tickets of one place.
    pub fn forget(&self, place: &Place) {
        let mut table = self.table();
        table.count -= table.shelves.remove(place).map_or(0, |shelf| shelf.tickets.len());
    }

    pub fn clear(&self) {
        *self.table() = Table { shelves: HashMap::new(), count: 0 };
    }
}

/// Where the tickets of a connection go once the exchange has let both sides in.
pub struct Settled {
    pub held: Arc<Held>,
    pub place: Place,
    pub of: Of,
    pub appraisal: Option<Arc<Appraisal>>,
}

impl Settled {
    fn keep(&self, values: Vec<Tls13ClientSessionValue>) {
        let stands = |of: &Of| stands(self.appraisal.as_deref(), of);
        if !values.is_empty() && stands(&self.of).is_some() {
            self.held.keep(&self.place, &self.of, values, stands);
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
        let mut coming = self.coming.locked();
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
        match &mut *self.coming.locked() {
            Coming::Early(values) => values.push(value),
            Coming::Late(there) => there.keep(vec![value]),
        }
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let ticket = self.show.locked().take();
        if ticket.is_some() {
            self.asked.store(true, Ordering::Release);
        }
        ticket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(port: u16, name: Option<&str>) -> Place {
        Place { addr: SocketAddr::from(([192, 0, 2, 1], port)), name: name.map(str::to_owned) }
    }

    fn any(_: &Of) -> Option<()> {
        Some(())
    }

    #[test]
    fn a_ticket_is_taken_once_newest_first_and_at_its_own_place() {
        let held = Held::default();
        held.keep(&place(1, Some("a.test")), &None, vec![1, 2], any);
        for other in [place(2, Some("a.test")), place(1, Some("b.test")), place(1, None)] {
            assert_eq!(held.take(&other, any), None);
        }
        let here = place(1, Some("a.test"));
        assert_eq!(held.take(&here, any), Some((2, ())));
        assert_eq!(held.take(&here, any), Some((1, ())));
        assert_eq!(held.take(&here, any), None);
        held.keep(&here, &None, vec![3, 4], any);
        assert_eq!(held.take(&here, |_| None::<()>), None, "it does not stand any more");
        assert_eq!(held.table().count, 0);
        assert!(held.table().shelves.is_empty());
        held.keep(&here, &None, vec![5], any);
        held.forget(&here);
        assert_eq!(held.take(&here, any), None);
    }

    #[test]
    fn places_and_tickets_are_bounded_and_the_idle_make_room() {
        let held = Held::default();
        held.keep(&place(0, None), &None, (0..100).collect(), any);
        assert_eq!(held.table().count, PER_PLACE);
        assert_eq!(held.take(&place(0, None), any), Some((99, ())), "the oldest made room");
        for port in 1..3000 {
            held.keep(&place(port, None), &None, vec![0, 1], any);
            assert!(held.table().count <= CAPACITY);
        }
        assert_eq!(held.take(&place(1, None), any), None);
        assert!(held.take(&place(2999, None), any).is_some());
        let table = held.table();
        assert_eq!(table.count, table.shelves.values().map(|s| s.tickets.len()).sum::<usize>());
        drop(table);
        held.clear();
        assert_eq!(held.take(&place(2999, None), any), None);
    }
}
