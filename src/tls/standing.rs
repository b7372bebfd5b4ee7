//! How long a peer that was let in may stay: its verdict is renewed while connections of it are open.
//!
//! All connections that show one certificate share one [`Standing`], so a thousand of them cost one timer
//! and one appraisal a period. It ends with the last of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use tokio::task::AbortHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{ChannelError, PeerError};
use crate::attest::{Clock, Verdict};

/// The longest lead before a verdict's end at which renewal begins. Shorter verdicts: a quarter of their life.
const MAX_LEAD: Duration = Duration::from_secs(120);
/// Failed attempts are repeated after this part of the lead.
const TRIES: u32 = 8;
/// A wall clock that is set while the timer sleeps is noticed after this time.
const MAX_NAP: Duration = Duration::from_secs(30);
/// Slug of a verdict that ended while nobody answered.
const EXPIRED_REASON: &str = "verdict-expired";

/// The verdict in force on a peer; renewal replaces it.
pub type CurrentVerdict = Arc<ArcSwap<Verdict>>;

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
}

/// Appraises a certificate again.
#[async_trait]
pub(super) trait Renew: Send + Sync + 'static {
    /// A new verdict on the certificate `der`, never one from a cache. Ends within its own deadline.
    async fn renew(&self, der: &[u8]) -> Result<Arc<Verdict>, ChannelError>;
}

struct Shared {
    current: CurrentVerdict,
    ended: CancellationToken,
    why: OnceLock<Withdrawn>,
}

type Table = Mutex<HashMap<[u8; 32], Weak<Standing>>>;

/// The standing of one peer, shared by its open connections.
pub struct Standing {
    shared: Arc<Shared>,
    task: Option<AbortHandle>,
    key: [u8; 32],
    table: Weak<Table>,
}

impl std::fmt::Debug for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standing").field("verdict", &self.verdict()).field("why", &self.shared.why).finish()
    }
}

impl Standing {
    /// The verdict in force.
    pub fn verdict(&self) -> Arc<Verdict> {
        self.shared.current.load_full()
    }

    /// The same for those that show it after the connection is gone.
    pub fn current(&self) -> CurrentVerdict {
        self.shared.current.clone()
    }

    /// Ends when the peer may stay no longer; [`Standing::why`] then tells why.
    pub fn ended(&self) -> WaitForCancellationFutureOwned {
        // A token of its own: the shared one's lock would be taken for every poll of every connection.
        self.shared.ended.child_token().cancelled_owned()
    }

    /// Why it ended, once it has.
    pub fn why(&self) -> Option<Withdrawn> {
        self.shared.why.get().cloned()
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
        if let Some(table) = self.table.upgrade() {
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            // A newer one may have taken the place.
            if table.get(&self.key).is_some_and(|w| std::ptr::eq(w.as_ptr(), self)) {
                table.remove(&self.key);
            }
        }
    }
}

/// The peers of one endpoint that have open connections; bounded by the endpoint's bound on those.
#[derive(Default)]
pub(super) struct Standings(Arc<Table>);

impl Standings {
    /// The standing of the peer that showed `der` and was let in with `verdict`.
    /// `not_after`: the end of its certificate, which no renewal moves.
    pub fn of(
        &self,
        key: [u8; 32],
        der: &[u8],
        not_after: SystemTime,
        verdict: Arc<Verdict>,
        renew: Arc<dyn Renew>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Standing> {
        // Dropped after the lock: its end takes the lock too.
        let _ended;
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match table.get(&key).and_then(Weak::upgrade) {
            Some(known) if !known.shared.ended.is_cancelled() => {
                if verdict.expires_at > known.verdict().expires_at {
                    known.shared.current.store(verdict);
                }
                drop(table);
                return known;
            }
            other => _ended = other,
        }
        let shared = Arc::new(Shared {
            current: Arc::new(ArcSwap::new(verdict)),
            ended: CancellationToken::new(),
            why: OnceLock::new(),
        });
        let watch = Watch { shared: shared.clone(), der: der.into(), not_after, renew, clock };
        let task = Some(tokio::spawn(watch.run()).abort_handle());
        let standing = Arc::new(Standing { shared, task, key, table: Arc::downgrade(&self.0) });
        table.insert(key, Arc::downgrade(&standing));
        drop(table);
        standing
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// What keeps one verdict young.
struct Watch {
    shared: Arc<Shared>,
    der: Arc<[u8]>,
    not_after: SystemTime,
    renew: Arc<dyn Renew>,
    clock: Arc<dyn Clock>,
}

impl Watch {
    async fn run(self) {
        let mut failure: Option<ChannelError> = None;
        let mut planned = self.plan();
        loop {
            let now = self.clock.now();
            let ends = self.shared.current.load().expires_at;
            let Some(left) = ends.duration_since(now).ok().filter(|left| !left.is_zero()) else {
                return self.end(expired(failure, self.not_after <= now));
            };
            if ends != planned.ends {
                // A new connection of the peer brought a newer verdict.
                planned = self.plan();
                failure = None;
            }
            let wait = planned.at.duration_since(now).unwrap_or_default().min(left);
            if !wait.is_zero() {
                tokio::time::sleep(wait.min(MAX_NAP)).await;
                continue;
            }
            match tokio::time::timeout(left, self.renew.renew(&self.der)).await {
                Ok(Ok(verdict)) if verdict.expires_at > ends => {
                    tracing::debug!(tee = verdict.tee, "the peer was appraised again");
                    self.shared.current.store(verdict);
                    failure = None;
                    continue;
                }
                // Nothing won, as with a service that hands out one token until it ends.
                Ok(Ok(_)) => failure = None,
                Ok(Err(error)) if error.is_about_peer() => {
                    return self.end(Withdrawn { reason: error.reason(), text: error.to_string() });
                }
                Ok(Err(error)) => {
                    tracing::warn!(reason = error.reason(), %error, "the peer could not be appraised again yet");
                    failure = Some(error);
                }
                Err(_) => {}
            }
            planned.at = self.clock.now() + planned.lead / TRIES;
        }
    }

    /// When to renew the verdict in force.
    fn plan(&self) -> Plan {
        let verdict = self.shared.current.load();
        let ends = verdict.expires_at;
        let life = ends.duration_since(verdict.appraised_at).unwrap_or_default();
        let lead = (life / 4).min(MAX_LEAD);
        // A certificate that is over cannot be appraised: its end is the end.
        let at = if ends >= self.not_after { ends } else { ends - lead.mul_f64(1.0 - spread() / 4.0) };
        Plan { ends, at, lead }
    }

    fn end(&self, why: Withdrawn) {
        tracing::warn!(reason = why.reason, detail = why.text, "the peer's open connections are closed");
        let _ = self.shared.why.set(why);
        self.shared.ended.cancel();
    }
}

struct Plan {
    ends: SystemTime,
    at: SystemTime,
    lead: Duration,
}

fn expired(failure: Option<ChannelError>, certificate_over: bool) -> Withdrawn {
    match failure {
        _ if certificate_over => {
            let over = PeerError::Expired;
            Withdrawn { reason: over.reason(), text: over.to_string() }
        }
        None => Withdrawn::expired(),
        Some(error) => {
            let reason = if error.is_silence() { EXPIRED_REASON } else { error.reason() };
            Withdrawn { reason, text: format!("the peer's verdict has ended: {error}") }
        }
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
