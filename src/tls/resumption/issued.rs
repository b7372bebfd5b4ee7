//! Tickets that a server gave. They are names alone; what they stand for stays in this process.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustls::server::StoresServerSessions;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{Appraisal, Of, stands};
use crate::os::lock::Lock;
use crate::tls::identity::Fixed;
use crate::tls::session::BoundSession;

/// Tickets in all; the oldest make room.
const CAPACITY: usize = 8192;
/// Bytes in all: a ticket of a client that attests holds its certificate.
const MAX_BYTES: usize = 16 << 20;
/// Tickets of one handshake.
const PER_HANDSHAKE: usize = 4;
/// Bytes of tickets whose exchange is under way, of all connections: their clients were not let in. Beyond them
/// connections bring no tickets.
const MAX_PENDING: usize = 8 << 20;
/// Names that a client may show in one handshake.
const MAX_TAKEN: usize = 4;
/// The longest that a ticket is taken when no verdict of this side bounds it. That of the peer does.
const LIFETIME: Duration = Duration::from_secs(3600);

type Label = [u8; 8];

struct Ticket {
    /// rustls's, with the secret.
    value: Zeroizing<Vec<u8>>,
    label: Label,
    of: Of,
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
    pending: AtomicUsize,
}

impl Table {
    fn remove(&mut self, name: &[u8]) -> Option<Ticket> {
        let ticket = self.by_name.remove(name)?;
        self.bytes -= ticket.value.len();
        Some(ticket)
    }

    fn add(&mut self, name: Vec<u8>, ticket: Ticket) {
        // The oldest are over first, all of them at the same age.
        while let Some(oldest) = self.order.front() {
            match self.by_name.get(oldest) {
                Some(ticket) if ticket.born.elapsed() < LIFETIME => break,
                _ => {}
            }
            if let Some(oldest) = self.order.pop_front() {
                self.remove(&oldest);
            }
        }
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
        *self.table.locked() = Table::default();
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.table.locked().by_name.len()
    }
}

/// Given in this connection, and not yet to be taken.
type Pending = Vec<(Vec<u8>, Zeroizing<Vec<u8>>)>;

/// The session of a ticket, none when this side does not verify; or no such ticket.
type Taken = Option<Option<Arc<BoundSession>>>;

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
    pub fn taken(&self, label: &[u8]) -> Taken {
        let taken = self.taken.locked();
        taken.iter().find(|(of, _)| of == label).map(|(_, session)| session.clone())
    }

    /// Lets the tickets of this connection be taken from now on, as long as what they stand for does.
    pub fn close(&self, of: Of) {
        let pending = self.settle();
        if pending.is_empty() || stands(self.appraisal.as_deref(), &of).is_none() {
            return;
        }
        let shown = self.shown.as_ref().map(Arc::downgrade);
        let mut table = self.issued.table.locked();
        for (name, value) in pending {
            let ticket =
                Ticket { value, label: self.label, of: of.clone(), shown: shown.clone(), born: Instant::now() };
            table.add(name, ticket);
        }
    }

    /// The tickets that wait; no more are given.
    fn settle(&self) -> Pending {
        let pending = self.pending.locked().take().unwrap_or_default();
        self.issued.pending.fetch_sub(pending.iter().map(|(_, value)| value.len()).sum(), Ordering::Relaxed);
        pending
    }

    fn session_of(&self, ticket: &Ticket) -> Taken {
        let same = match (&ticket.shown, &self.shown) {
            (None, None) => true,
            (Some(then), Some(now)) => Weak::ptr_eq(then, &Arc::downgrade(now)),
            _ => false,
        };
        if !same || ticket.born.elapsed() >= LIFETIME {
            return None;
        }
        stands(self.appraisal.as_deref(), &ticket.of)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.settle();
    }
}

impl StoresServerSessions for Desk {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        let value = Zeroizing::new(value);
        let most = if self.taken.locked().is_empty() { PER_HANDSHAKE } else { 1 };
        let mut pending = self.pending.locked();
        let Some(pending) = pending.as_mut().filter(|pending| pending.len() < most) else { return false };
        let before = self.issued.pending.fetch_add(value.len(), Ordering::Relaxed);
        if before + value.len() > MAX_PENDING {
            self.issued.pending.fetch_sub(value.len(), Ordering::Relaxed);
            return false;
        }
        pending.push((key, value));
        true
    }

    fn get(&self, _: &[u8]) -> Option<Vec<u8>> {
        // For stateful sessions of TLS 1.2.
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        let mut taken = self.taken.locked();
        if taken.len() >= MAX_TAKEN {
            return None;
        }
        let mut ticket = self.issued.table.locked().remove(key)?;
        taken.push((ticket.label, self.session_of(&ticket)?));
        // rustls takes it apart and drops it as it is.
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
        // What is not let in counts too, until it is gone.
        let waiting: Vec<_> = (0..9).map(|_| Desk::new(issued.clone(), None, None)).collect();
        let given = |n: usize, desk: &Arc<Desk>| desk.put(name(1000 + n as u32), vec![0; MAX_PENDING / 8]);
        assert_eq!(waiting.iter().enumerate().filter(|(n, desk)| given(*n, desk)).count(), 8);
        drop(waiting);
        assert_eq!(issued.pending.load(Ordering::Relaxed), 0);
        let (greedy, generous) = (Desk::new(issued.clone(), None, None), Desk::new(issued.clone(), None, None));
        assert_eq!((90..100).filter_map(|n| greedy.take(&name(n))).count(), MAX_TAKEN);
        assert_eq!((200..210).filter(|n| greedy.put(name(*n), vec![])).count(), 1, "one for those it took");
        assert_eq!((0..10).filter(|n| generous.put(name(*n), vec![])).count(), PER_HANDSHAKE);
        issued.clear();
        assert_eq!(issued.len(), 0);
    }
}
