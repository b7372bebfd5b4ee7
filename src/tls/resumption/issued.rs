//! Tickets that a server gave. They are names alone; what they stand for stays in this process.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustls::server::StoresServerSessions;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{Appraisal, stands};
use crate::tls::identity::Fixed;
use crate::tls::session::BoundSession;

/// Tickets in all; the oldest make room.
const CAPACITY: usize = 8192;
/// Bytes in all: a ticket of a client that attests holds its certificate.
const MAX_BYTES: usize = 16 << 20;
/// Tickets of one handshake.
const PER_HANDSHAKE: usize = 4;
/// Names that a client may show in one handshake.
const MAX_TAKEN: usize = 4;
/// The longest that a ticket is taken when no verdict of this side bounds it. That of the peer does.
const LIFETIME: Duration = Duration::from_secs(3600);

type Label = [u8; 8];

struct Ticket {
    /// rustls's, with the secret.
    value: Zeroizing<Vec<u8>>,
    label: Label,
    session: Option<Arc<BoundSession>>,
    /// The certificate this side showed: another one is another session.
    shown: Option<Weak<Fixed>>,
    born: Instant,
}

#[derive(Default)]
struct Table {
    by_name: HashMap<Vec<u8>, Ticket>,
    /// Oldest first; names that were used meanwhile are in it too.
    order: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// All tickets of an endpoint.
#[derive(Default)]
pub struct Issued {
    table: Mutex<Table>,
    connections: AtomicU64,
}

impl Table {
    fn remove(&mut self, name: &[u8]) -> Option<Ticket> {
        let ticket = self.by_name.remove(name)?;
        self.bytes -= ticket.value.len();
        Some(ticket)
    }

    fn add(&mut self, name: Vec<u8>, ticket: Ticket) {
        self.bytes += ticket.value.len();
        self.order.push_back(name.clone());
        self.by_name.insert(name, ticket);
        while self.by_name.len() > CAPACITY || self.bytes > MAX_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.remove(&oldest);
        }
        if self.order.len() > 2 * CAPACITY {
            let known = &self.by_name;
            self.order.retain(|name| known.contains_key(name));
        }
    }
}

impl Issued {
    pub fn clear(&self) {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = Table::default();
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).by_name.len()
    }
}

/// Given in this connection, and not yet to be taken.
type Pending = Vec<(Vec<u8>, Zeroizing<Vec<u8>>)>;

/// What rustls sees of it in one connection.
pub struct Desk {
    issued: Arc<Issued>,
    label: Label,
    shown: Option<Arc<Fixed>>,
    appraisal: Option<Arc<Appraisal>>,
    /// Absent once the exchange is over.
    pending: Mutex<Option<Pending>>,
    taken: Mutex<Vec<(Label, Option<Arc<BoundSession>>)>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Desk")
    }
}

impl Desk {
    pub fn new(issued: Arc<Issued>, shown: Option<&Arc<Fixed>>, appraisal: Option<&Arc<Appraisal>>) -> Arc<Self> {
        let label = issued.connections.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let (shown, appraisal) = (shown.cloned(), appraisal.cloned());
        let pending = Mutex::new(Some(Vec::new()));
        Arc::new(Self { issued, label, shown, appraisal, pending, taken: Mutex::default() })
    }

    /// Names this connection in the tickets that it gives.
    pub fn label(&self) -> Label {
        self.label
    }

    /// What the ticket that the client showed stands for, if it is of the connection with this label.
    pub fn taken(&self, label: &[u8]) -> Option<Option<Arc<BoundSession>>> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.iter().find(|(of, _)| of == label).map(|(_, session)| session.clone())
    }

    /// Lets the tickets of this connection be taken from now on, as long as `session` stands.
    pub fn close(&self, session: Option<Arc<BoundSession>>) {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        if pending.is_empty() || !stands(self.appraisal.as_deref(), session.as_deref()) {
            return;
        }
        let shown = self.shown.as_ref().map(Arc::downgrade);
        let mut table = self.issued.table.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, value) in pending {
            let ticket = Ticket {
                value,
                label: self.label,
                session: session.clone(),
                shown: shown.clone(),
                born: Instant::now(),
            };
            table.add(name, ticket);
        }
    }

    fn may_be_taken(&self, ticket: &Ticket) -> bool {
        let same = match (&ticket.shown, &self.shown) {
            (None, None) => true,
            (Some(then), Some(now)) => Weak::ptr_eq(then, &Arc::downgrade(now)),
            _ => false,
        };
        same && ticket.born.elapsed() < LIFETIME && stands(self.appraisal.as_deref(), ticket.session.as_deref())
    }
}

impl StoresServerSessions for Desk {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let value = Zeroizing::new(value);
        match &mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(pending) if pending.len() < PER_HANDSHAKE => pending.push((key, value)),
            _ => return false,
        }
        true
    }

    fn get(&self, _: &[u8]) -> Option<Vec<u8>> {
        // For stateful sessions of TLS 1.2.
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.len() >= MAX_TAKEN {
            return None;
        }
        let mut ticket = self.issued.table.lock().unwrap_or_else(PoisonError::into_inner).remove(key)?;
        if !self.may_be_taken(&ticket) {
            return None;
        }
        taken.push((ticket.label, ticket.session.take()));
        Some(std::mem::take(&mut *ticket.value))
    }

    fn can_cache(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: u32) -> Vec<u8> {
        n.to_be_bytes().into()
    }

    /// Gives a ticket of `len` bytes in a connection of its own, whose exchange ended well.
    fn give(issued: &Arc<Issued>, n: u32, len: usize) {
        let desk = Desk::new(issued.clone(), None, None);
        assert!(desk.put(name(n), vec![0; len]));
        desk.close(None);
    }

    #[test]
    fn a_ticket_is_taken_once_and_not_before_its_exchange_is_over() {
        let issued = Arc::<Issued>::default();
        let giving = Desk::new(issued.clone(), None, None);
        let taking = Desk::new(issued.clone(), None, None);
        giving.put(name(1), vec![7]);
        assert_eq!(taking.take(&name(1)), None);
        giving.close(None);
        assert!(!giving.put(name(2), vec![7]), "nothing is given later");
        assert_eq!(taking.take(&name(1)), Some(vec![7]));
        assert_eq!(taking.take(&name(1)), None);
        assert!(taking.taken(&giving.label()).is_some());
        assert!(taking.taken(&taking.label()).is_none());
    }

    #[test]
    fn what_is_kept_and_what_a_client_may_try_is_bounded() {
        let issued = Arc::<Issued>::default();
        for n in 0..(3 * CAPACITY as u32) {
            give(&issued, n, 10);
        }
        assert_eq!(issued.len(), CAPACITY);
        for n in 0..100 {
            give(&issued, n, MAX_BYTES / 10);
        }
        assert_eq!(issued.len(), 10);
        let table = issued.table.lock().unwrap();
        assert!(table.bytes <= MAX_BYTES && table.order.len() <= 2 * CAPACITY + 1, "{}", table.order.len());
        drop(table);
        let (greedy, generous) = (Desk::new(issued.clone(), None, None), Desk::new(issued.clone(), None, None));
        assert_eq!((90..100).filter_map(|n| greedy.take(&name(n))).count(), MAX_TAKEN);
        assert_eq!((0..10).filter(|n| generous.put(name(*n), vec![])).count(), PER_HANDSHAKE);
        issued.clear();
        assert_eq!(issued.len(), 0);
    }
}
