//! How long a peer that was let in may stay: its verdict is renewed while connections of it are open, and made anew when
//! a reload changes what it rests on.
//!
//! All connections that show one certificate share one [`Standing`], so a thousand of them cost one timer
//! and one appraisal a period. It ends with the last of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::ChannelError;
use super::known::{Counts, Shared};
use super::reappraise::Watch;
use super::rules::Settings;
use super::session::BoundSession;
use crate::attest::Verdict;
use crate::os::clock::Clock;
use crate::os::lock::Lock;

/// Slug of a verdict that ended while nobody answered.
const EXPIRED_REASON: &str = "verdict-expired";
/// After a reload the peers are appraised again one after the other: so long for each, ...
const SPREAD_EACH: Duration = Duration::from_millis(10);
/// ... and no longer in all.
const MAX_SPREAD: Duration = Duration::from_secs(10);

/// Why a peer that was let in may stay no longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Withdrawn {
    /// Stable slug: `verdict-expired` when nobody answered, else that of the answer.
    pub reason: &'static str,
    /// In words.
    pub text: String,
}

impl Withdrawn {
    /// The verdict ended and nobody said more.
    pub fn expired() -> Self {
        Self { reason: EXPIRED_REASON, text: "the peer's verdict has ended".into() }
    }

    /// The verdict ended while every attempt to renew it failed; `error` is the last one's.
    pub(super) fn unrenewed(error: &ChannelError) -> Self {
        let reason = if error.is_silence() { EXPIRED_REASON } else { error.reason() };
        Self { reason, text: format!("the peer's verdict has ended: {error}") }
    }

    /// The peer was refused.
    pub(super) fn refused(error: &ChannelError) -> Self {
        Self { reason: error.reason(), text: error.to_string() }
    }
}

/// A peer that failed and whose connections go on for the grace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closing {
    /// What for.
    pub why: Withdrawn,
    /// How much longer, unless the peer is affirmed again.
    pub left: Duration,
}

/// What a peer showed when it was let in; it is appraised again on this.
#[derive(Debug, Clone)]
pub(super) enum Shown {
    /// Nobody was verified then.
    Nothing {
        /// Whether the connection is one of `tng/1` nevertheless.
        session: bool,
    },
    /// A certificate, DER (RATS-TLS).
    Certificate(Arc<[u8]>),
    /// Evidence about a session (`tng/1`).
    Session(Arc<BoundSession>),
}

impl Shown {
    /// Whether the peer speaks `tng/1`.
    pub fn is_session(&self) -> bool {
        matches!(self, Self::Session(_) | Self::Nothing { session: true })
    }
}

/// Says what a peer is worth under the rules in force.
#[async_trait]
pub(super) trait Judge: Send + Sync + 'static {
    /// A new verdict, never one from a cache; `None` when the rules ask for none. Waits for its turn without a limit of
    /// its own, and ends within its own deadline then.
    async fn judge(&self, shown: &Shown) -> Result<Option<Arc<Verdict>>, ChannelError>;
    /// How long the connections of a peer that failed may go on.
    fn grace(&self) -> Duration;
}

/// The rules by which peers are judged now.
#[derive(Clone)]
pub(super) struct InForce {
    /// Counts up whenever verdicts made before may be wrong.
    pub term: u64,
    pub judge: Arc<dyn Judge>,
    /// Appraisals that a change of rules causes are spread over this time.
    pub spread: Duration,
    settings: Arc<Settings>,
}

/// The verdict in force on a peer; renewal replaces it.
#[derive(Debug, Clone)]
pub struct CurrentVerdict(Arc<Shared>);

impl CurrentVerdict {
    /// The verdict.
    pub fn load(&self) -> Arc<Verdict> {
        self.0.verdict()
    }

    /// Whether open connections of the peer are about to be closed.
    pub fn closing(&self) -> Option<Closing> {
        self.0.closing()
    }
}

/// The standing of one peer, shared by its open connections.
pub struct Standing {
    shared: Arc<Shared>,
    verified: bool,
    task: AbortHandle,
    key: [u8; 32],
    home: Arc<Home>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standing").field("verdict", &self.verdict()).field("why", &self.why()).finish()
    }
}

impl Standing {
    /// The verdict in force; `None` when nobody was verified.
    pub fn verdict(&self) -> Option<Arc<Verdict>> {
        self.verified.then(|| self.shared.verdict())
    }

    /// The same for those that show it after the connection is gone.
    pub fn current(&self) -> Option<CurrentVerdict> {
        self.verified.then(|| CurrentVerdict(self.shared.clone()))
    }

    /// When the verdict ends unless it is renewed; `None` when there is none or none is asked for any more.
    pub fn expires_at(&self) -> Option<SystemTime> {
        let condition = self.shared.condition();
        (self.verified && !condition.exempt).then_some(condition.ends)
    }

    /// Whether the connections are about to be closed.
    pub fn closing(&self) -> Option<Closing> {
        self.shared.closing()
    }

    /// Ends when the peer may stay no longer; [`Standing::why`] then tells why.
    pub fn ended(&self) -> WaitForCancellationFutureOwned {
        self.shared.ended()
    }

    /// Why it ended, once it has.
    pub fn why(&self) -> Option<Withdrawn> {
        self.shared.why()
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.task.abort();
        // Whoever still shows the verdict has no connection to tell about.
        self.shared.leave();
        let mut table = self.home.table();
        // A newer one may have taken the place.
        if table.get(&self.key).is_some_and(|w| std::ptr::eq(w.as_ptr(), self)) {
            table.remove(&self.key);
        }
    }
}

struct Home {
    table: Mutex<HashMap<[u8; 32], Weak<Standing>>>,
    in_force: watch::Sender<InForce>,
    counts: Arc<Counts>,
}

impl Home {
    fn table(&self) -> MutexGuard<'_, HashMap<[u8; 32], Weak<Standing>>> {
        self.table.locked()
    }
}

/// The peers of one endpoint that have open connections, and the rules they are judged by; bounded by the endpoint's
/// bound on connections. A reload hands them on to what takes the endpoint's place.
#[derive(Clone)]
pub struct Standings(Arc<Home>);

/// [`Standings`] as long as somebody needs them.
#[derive(Clone)]
pub struct WeakStandings(Weak<Home>);

impl WeakStandings {
    /// The peers, unless the endpoint and its last connection are gone.
    pub fn upgrade(&self) -> Option<Standings> {
        self.0.upgrade().map(Standings)
    }
}

/// A peer that is let in.
pub(super) struct Entry {
    /// Tells peers apart.
    pub key: [u8; 32],
    /// What it showed.
    pub shown: Shown,
    /// The end of its certificate, which no renewal moves.
    pub not_after: SystemTime,
    /// What it was let in with; `None` when nobody is verified.
    pub verdict: Option<Arc<Verdict>>,
    /// Under which rules.
    pub term: u64,
}

impl Standings {
    /// Nobody yet, under the first rules.
    pub(super) fn new(judge: Arc<dyn Judge>, settings: Arc<Settings>) -> Self {
        let in_force = InForce { term: 1, judge, spread: Duration::ZERO, settings };
        Self(Arc::new(Home { table: Mutex::default(), in_force: watch::Sender::new(in_force), counts: Arc::default() }))
    }

    /// Judges everybody by other rules from now on, and tells their term. When what they demand has changed, all peers
    /// with open connections are appraised again.
    pub(super) fn enforce(&self, judge: Arc<dyn Judge>, settings: Arc<Settings>) -> u64 {
        let peers = u32::try_from(self.len()).unwrap_or(u32::MAX);
        let spread = SPREAD_EACH.saturating_mul(peers).min(MAX_SPREAD);
        let mut term = 0;
        self.0.in_force.send_modify(|now| {
            term = now.term + u64::from(!now.settings.demand_the_same(&settings));
            *now = InForce { term, judge, spread, settings };
        });
        term
    }

    /// The term of the rules in force.
    pub(super) fn term(&self) -> u64 {
        self.0.in_force.borrow().term
    }

    /// The standing of a peer that is let in. To be called inside a tokio runtime.
    pub(super) fn admit(&self, entry: Entry, clock: Arc<dyn Clock>) -> Arc<Standing> {
        // Dropped after the lock: its end takes the lock too.
        let _ended;
        let mut table = self.0.table();
        match table.get(&entry.key).and_then(Weak::upgrade) {
            Some(known) if known.shared.join(entry.verdict.clone(), entry.term, &self.0.counts) => {
                drop(table);
                return known;
            }
            other => _ended = other,
        }
        let verified = entry.verdict.is_some();
        let shared = Shared::new(entry.verdict, entry.term);
        let watch = Watch {
            shared: shared.clone(),
            shown: entry.shown,
            not_after: entry.not_after,
            rules: self.0.in_force.subscribe(),
            counts: self.0.counts.clone(),
            clock,
        };
        let task = tokio::spawn(watch.run()).abort_handle();
        let standing = Arc::new(Standing { shared, verified, task, key: entry.key, home: self.0.clone() });
        table.insert(entry.key, Arc::downgrade(&standing));
        drop(table);
        standing
    }

    /// Whether both are the same peers.
    pub fn are(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// For those that come back to them after a reload.
    pub fn downgrade(&self) -> WeakStandings {
        WeakStandings(Arc::downgrade(&self.0))
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.0.counts
    }

    /// Peers whose connections are about to be closed.
    pub(super) fn closing(&self) -> u64 {
        let known: Vec<_> = self.0.table().values().filter_map(Weak::upgrade).collect();
        known.iter().filter(|s| s.closing().is_some()).count() as u64
    }

    /// Peers with open connections.
    pub(super) fn len(&self) -> usize {
        self.0.table().len()
    }
}

/// Between 0 and 1, different for every call: peers that were let in together are not renewed together.
pub(super) fn spread() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (random >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
#[path = "standing_tests.rs"]
mod tests;
