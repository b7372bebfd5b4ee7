//! Bound sessions that later connections may refer to: what a verifier keeps of its peers, and an attester of itself.
//!
//! Neither side's memory makes a session last: a verifier keeps it for as long as the verdict made from its evidence
//! would have lasted, whatever was renewed since, and an attester for as long as its certificate's key.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

use super::{Secret, SessionId};
use crate::attest::Verdict;
use crate::os::lock::Lock;
use crate::tls::ChannelError;
use crate::tls::peer::PeerCertificate;

/// A session whose peer was appraised on evidence about this very session.
#[derive(Debug)]
pub struct BoundSession {
    /// SHA-256 of the peer's SubjectPublicKeyInfo.
    pub key: [u8; 32],
    /// Its name.
    pub id: SessionId,
    /// Its secret.
    pub secret: Secret,
    /// The evidence, and what it is bound to.
    pub shown: PeerCertificate,
    /// The verdict made from the evidence. A renewed one does not replace it here.
    pub verdict: Arc<Verdict>,
    /// The same end on a clock that nobody sets.
    pub until: Instant,
}

impl BoundSession {
    /// Whether the verdict has not ended.
    pub fn lasts(&self, now: SystemTime) -> bool {
        now < self.verdict.expires_at && Instant::now() < self.until
    }
}

type Landed = Option<Result<(), ChannelError>>;

enum Slot {
    Ready(Arc<BoundSession>),
    Flight(watch::Receiver<Landed>),
}

/// Exchanges under way push out sessions for this part of all places: their peers are not appraised yet.
const FLIGHTS: usize = 4;

#[derive(Default)]
struct Table {
    by_key: HashMap<[u8; 32], Slot>,
    /// Counts how often all was forgotten: what an exchange from before finds is not kept.
    generation: u64,
}

type Slots = Arc<Mutex<Table>>;

/// The newest bound session of each peer key.
pub struct Sessions {
    slots: Slots,
    capacity: usize,
}

/// How a connection gets its peer appraised.
pub enum Turn {
    /// The peer need only confirm this session.
    Resume(Arc<BoundSession>),
    /// The peer is to make evidence, and others may wait for what comes of it.
    Lead(Lead),
    /// The same, for itself alone.
    Alone,
}

/// Obliges to land: dropped without it, the next who waits takes over.
pub struct Lead {
    slots: Slots,
    key: [u8; 32],
    generation: u64,
    tell: watch::Sender<Landed>,
    outcome: Option<Result<Arc<BoundSession>, ChannelError>>,
}

impl Lead {
    /// The session was bound: all who wait may refer to it. Or the evidence was refused: so are they.
    pub fn land(mut self, outcome: Result<Arc<BoundSession>, ChannelError>) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let outcome = self.outcome.take();
        {
            let mut slots = self.slots.locked();
            match &outcome {
                Some(Ok(session)) if slots.generation == self.generation => {
                    slots.by_key.insert(self.key, Slot::Ready(session.clone()))
                }
                _ => slots.by_key.remove(&self.key),
            };
        }
        self.tell.send_replace(outcome.map(|o| o.map(|_| ())));
    }
}

impl Sessions {
    /// Room for at most `capacity` peers.
    pub fn new(capacity: usize) -> Self {
        Self { slots: Slots::default(), capacity }
    }

    /// How a new connection of the peer with this key is to be appraised. Waits for an exchange with the same peer
    /// that is under way on another connection; the caller's deadline bounds it.
    ///
    /// # Errors
    /// What that exchange ended in, when it says that the peer's evidence is refused.
    pub async fn enter(&self, key: [u8; 32], now: impl Fn() -> SystemTime) -> Result<Turn, ChannelError> {
        loop {
            let mut flight = {
                let mut slots = self.slots.locked();
                match slots.by_key.get(&key) {
                    Some(Slot::Ready(session)) if session.lasts(now()) => {
                        return Ok(Turn::Resume(session.clone()));
                    }
                    Some(Slot::Flight(landing)) => landing.clone(),
                    _ => {
                        if !make_room(&mut slots.by_key, self.capacity, &key, now()) {
                            return Ok(Turn::Alone);
                        }
                        let (tell, landing) = watch::channel(None);
                        slots.by_key.insert(key, Slot::Flight(landing));
                        let (slots, generation) = (self.slots.clone(), slots.generation);
                        return Ok(Turn::Lead(Lead { slots, key, generation, tell, outcome: None }));
                    }
                }
            };
            // An error means that the leader is gone without a word: somebody else's turn.
            if flight.changed().await.is_ok()
                && let Some(Err(refused)) = flight.borrow().clone()
            {
                return Err(refused);
            }
        }
    }

    /// Keeps a session that was bound outside of a turn, unless an exchange is under way.
    pub fn put(&self, session: Arc<BoundSession>) {
        let mut slots = self.slots.locked();
        if matches!(slots.by_key.get(&session.key), Some(Slot::Ready(_))) {
            slots.by_key.insert(session.key, Slot::Ready(session));
        }
    }

    /// Whether this is the session of its peer that new connections may refer to.
    pub fn holds(&self, session: &BoundSession) -> bool {
        let slots = self.slots.locked();
        matches!(slots.by_key.get(&session.key), Some(Slot::Ready(known)) if known.id == session.id)
    }

    /// Forgets all sessions; exchanges under way end as they will, and what they find is not kept.
    pub fn clear(&self) {
        let mut slots = self.slots.locked();
        slots.generation += 1;
        slots.by_key.retain(|_, slot| !matches!(slot, Slot::Ready(_)));
    }

    /// Forgets a session: its peer was refused since.
    pub fn forget(&self, session: &BoundSession) {
        let mut slots = self.slots.locked();
        if matches!(slots.by_key.get(&session.key), Some(Slot::Ready(known)) if known.id == session.id) {
            slots.by_key.remove(&session.key);
        }
    }
}

/// Exchanges under way are never thrown away: false when there are too many of them.
fn make_room(slots: &mut HashMap<[u8; 32], Slot>, capacity: usize, key: &[u8; 32], now: SystemTime) -> bool {
    if slots.len() < capacity || slots.contains_key(key) {
        return true;
    }
    slots.retain(|_, slot| !matches!(slot, Slot::Ready(s) if !s.lasts(now)));
    if slots.values().filter(|slot| matches!(slot, Slot::Flight(_))).count() >= capacity.div_ceil(FLIGHTS) {
        return false;
    }
    while slots.len() >= capacity {
        let first = slots
            .iter()
            .filter_map(|(k, s)| if let Slot::Ready(s) = s { Some((s.verdict.expires_at, *k)) } else { None })
            .min_by_key(|(at, _)| *at);
        let Some((_, key)) = first else { return false };
        slots.remove(&key);
    }
    true
}

/// Sessions that this side has made evidence about. A forgotten one costs new evidence, nothing more.
pub struct Proven {
    known: Mutex<HashMap<SessionId, (Instant, Secret)>>,
    capacity: usize,
    lifetime: Duration,
}

impl Proven {
    /// Room for at most `capacity` sessions, each for `lifetime`.
    pub fn new(capacity: usize, lifetime: Duration) -> Self {
        Self { known: Mutex::default(), capacity, lifetime }
    }

    /// Remembers a session; the oldest makes room.
    pub fn keep(&self, id: SessionId, secret: Secret) {
        let mut known = self.known.locked();
        if known.len() >= self.capacity {
            // Many at once, so that a full memory is not searched through for each connection.
            let mut ages: Vec<Instant> = known.values().map(|(born, _)| *born).collect();
            let middle = ages.len() / 8;
            let (_, limit, _) = ages.select_nth_unstable(middle);
            let limit = *limit;
            known.retain(|_, (born, _)| *born > limit);
        }
        known.insert(id, (Instant::now(), secret));
    }

    /// The secret of a session.
    pub fn secret(&self, id: &SessionId) -> Option<Secret> {
        let known = self.known.locked();
        known.get(id).filter(|(born, _)| born.elapsed() < self.lifetime).map(|(_, secret)| secret.clone())
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
