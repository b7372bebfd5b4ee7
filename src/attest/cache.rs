//! Verdicts are reused for one certificate under one policy, and made once for all who wait.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::{Clock, Verdict, VerifyError};

/// SHA-256 of the certificate and of the policy it was appraised under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// Of the certificate's DER.
    pub certificate: [u8; 32],
    /// Of everything the appraisal depends on.
    pub policy: [u8; 32],
}

type Outcome = Result<Arc<Verdict>, VerifyError>;

enum Slot {
    Ready(Arc<Verdict>),
    Flight(watch::Receiver<Option<Outcome>>),
}

/// Bounded cache; refusals live no longer than the flight that found them.
pub struct VerdictCache {
    slots: Arc<Mutex<HashMap<CacheKey, Slot>>>,
    capacity: usize,
    clock: Arc<dyn Clock>,
    hits: AtomicU64,
}

/// Takes the flight out of the table when its task ends, also by panic: nobody may wait for it forever.
struct Landing {
    slots: Arc<Mutex<HashMap<CacheKey, Slot>>>,
    key: CacheKey,
    outcome: Option<Outcome>,
    tell: watch::Sender<Option<Outcome>>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or(Err(VerifyError::Internal));
        {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            // Not ours any more when the cache was cleared meanwhile.
            if matches!(slots.get(&self.key), Some(Slot::Flight(rx)) if rx.same_channel(&self.tell.subscribe())) {
                match &outcome {
                    Ok(verdict) => slots.insert(self.key, Slot::Ready(verdict.clone())),
                    Err(_) => slots.remove(&self.key),
                };
            }
        }
        self.tell.send_replace(Some(outcome));
    }
}

impl VerdictCache {
    /// A cache of at most `capacity` verdicts and appraisals under way.
    pub fn new(capacity: usize, clock: Arc<dyn Clock>) -> Self {
        Self { slots: Arc::default(), capacity, clock, hits: AtomicU64::new(0) }
    }

    /// How often a verdict was reused.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Keeps a verdict that was made without the cache, unless an appraisal is under way.
    pub fn put(&self, key: CacheKey, verdict: Arc<Verdict>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = matches!(slots.get(&key), Some(Slot::Flight(_)));
        if !under_way && (slots.contains_key(&key) || make_room(&mut slots, self.capacity, self.clock.now()).is_ok()) {
            slots.insert(key, Slot::Ready(verdict));
        }
    }

    /// Forgets all verdicts. Appraisals under way answer those who wait, and are not kept.
    pub fn clear(&self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.clear();
    }

    /// Forgets the verdict for `key`: the peer was refused since.
    pub fn forget(&self, key: &CacheKey) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(slots.get(key), Some(Slot::Ready(_))) {
            slots.remove(key);
        }
    }

    /// The verdict for `key`: from the cache, from an appraisal already under way, or from `appraise`, which
    /// runs in a task of its own so that one caller's end does not end it for the others.
    pub async fn get<F>(&self, key: CacheKey, appraise: impl FnOnce() -> F) -> Outcome
    where
        F: Future<Output = Result<Verdict, VerifyError>> + Send + 'static,
    {
        let mut flight = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.now();
            match slots.get(&key) {
                Some(Slot::Ready(v)) if v.expires_at > now => {
                    self.hits.fetch_add(1, Ordering::Relaxed);
                    return Ok(v.clone());
                }
                Some(Slot::Flight(rx)) => rx.clone(),
                _ => {
                    make_room(&mut slots, self.capacity, now)?;
                    let (tx, rx) = watch::channel(None);
                    slots.insert(key, Slot::Flight(rx.clone()));
                    let mut landing = Landing { slots: self.slots.clone(), key, outcome: None, tell: tx };
                    let work = appraise();
                    tokio::spawn(async move {
                        landing.outcome = Some(work.await.map(Arc::new));
                        drop(landing);
                    });
                    rx
                }
            }
        };
        let outcome = flight.wait_for(Option::is_some).await.map_err(|_| VerifyError::Internal)?;
        outcome.clone().unwrap_or(Err(VerifyError::Internal))
    }
}

fn make_room(
    slots: &mut HashMap<CacheKey, Slot>,
    capacity: usize,
    now: std::time::SystemTime,
) -> Result<(), VerifyError> {
    if slots.len() < capacity {
        return Ok(());
    }
    slots.retain(|_, s| !matches!(s, Slot::Ready(v) if v.expires_at <= now));
    while slots.len() >= capacity {
        // The verdict that would have ended first; appraisals under way are never thrown away.
        let first = slots
            .iter()
            .filter_map(|(k, s)| if let Slot::Ready(v) = s { Some((v.expires_at, *k)) } else { None })
            .min_by_key(|(at, _)| *at);
        let Some((_, key)) = first else { return Err(VerifyError::Busy) };
        slots.remove(&key);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::SystemClock;
    use std::time::{Duration, SystemTime};

    fn key(n: u8) -> CacheKey {
        CacheKey { certificate: [n; 32], policy: [0; 32] }
    }
    fn verdict(ttl: i64) -> Verdict {
        let now = SystemTime::now();
        let ends = if ttl < 0 { now - Duration::from_secs(1) } else { now + Duration::from_secs(ttl as u64) };
        Verdict {
            tee: "sample".into(),
            policy_ids: vec![],
            verifier: "sample".into(),
            trust_anchor: "none".into(),
            sample: true,
            claims: Default::default(),
            appraised_at: now,
            expires_at: ends,
            ..Verdict::default()
        }
    }

    #[tokio::test]
    async fn a_thousand_at_once_cause_one_appraisal() {
        let cache = Arc::new(VerdictCache::new(8, Arc::new(SystemClock)));
        let calls = Arc::new(AtomicU64::new(0));
        let (open, gate) = watch::channel(false);
        let tasks: Vec<_> = (0..1000)
            .map(|_| {
                let (cache, calls, mut gate) = (cache.clone(), calls.clone(), gate.clone());
                tokio::spawn(async move {
                    cache
                        .get(key(1), || async move {
                            calls.fetch_add(1, Ordering::SeqCst);
                            gate.wait_for(|g| *g).await.unwrap();
                            Ok(verdict(60))
                        })
                        .await
                })
            })
            .collect();
        open.send(true).unwrap();
        for t in tasks {
            t.await.unwrap().unwrap();
        }
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn refusals_and_expired_verdicts_are_not_reused() {
        let cache = VerdictCache::new(8, Arc::new(SystemClock));
        assert_eq!(cache.get(key(1), || async { Err(VerifyError::AsTimeout) }).await, Err(VerifyError::AsTimeout));
        assert!(cache.get(key(1), || async { Ok(verdict(-1)) }).await.is_ok());
        assert!(cache.get(key(1), || async { Ok(verdict(60)) }).await.is_ok());
        assert!(cache.get(key(1), || async { Err(VerifyError::AsTimeout) }).await.is_ok(), "reused");
        assert_eq!(cache.hits(), 1);
    }

    #[tokio::test]
    async fn a_panicking_appraisal_refuses_and_the_next_one_works() {
        let cache = VerdictCache::new(8, Arc::new(SystemClock));
        let boom = || async { if true { panic!("appraisal") } else { Ok(verdict(1)) } };
        assert_eq!(cache.get(key(1), boom).await, Err(VerifyError::Internal));
        assert!(cache.get(key(1), || async { Ok(verdict(60)) }).await.is_ok());
    }

    #[tokio::test]
    async fn a_renewed_verdict_is_reused_and_a_forgotten_one_is_not() {
        let cache = VerdictCache::new(2, Arc::new(SystemClock));
        cache.put(key(1), Arc::new(verdict(60)));
        assert!(cache.get(key(1), || async { Err(VerifyError::AsTimeout) }).await.is_ok());
        cache.forget(&key(1));
        assert_eq!(cache.get(key(1), || async { Err(VerifyError::AsTimeout) }).await, Err(VerifyError::AsTimeout));
        for n in 0..9 {
            cache.put(key(n), Arc::new(verdict(60)));
        }
        assert_eq!(cache.slots.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_cleared_cache_keeps_nothing_not_even_what_is_under_way() {
        let cache = Arc::new(VerdictCache::new(8, Arc::new(SystemClock)));
        cache.put(key(2), Arc::new(verdict(60)));
        let (open, gate) = watch::channel(false);
        let wait = |mut gate: watch::Receiver<bool>| async move {
            gate.wait_for(|g| *g).await.unwrap();
            Ok(verdict(60))
        };
        let (asked, started) = tokio::sync::oneshot::channel();
        let first = {
            let (cache, gate) = (cache.clone(), gate.clone());
            tokio::spawn(async move {
                let work = || {
                    asked.send(()).unwrap();
                    wait(gate)
                };
                cache.get(key(1), work).await
            })
        };
        started.await.unwrap();
        cache.clear();
        open.send(true).unwrap();
        assert!(first.await.unwrap().is_ok(), "who waited is answered");
        for n in [1, 2] {
            assert_eq!(cache.get(key(n), || async { Err(VerifyError::AsTimeout) }).await, Err(VerifyError::AsTimeout));
        }
    }

    #[tokio::test]
    async fn the_cache_is_bounded() {
        let cache = VerdictCache::new(4, Arc::new(SystemClock));
        for n in 0..50 {
            cache.get(key(n), || async { Ok(verdict(60)) }).await.unwrap();
        }
        assert!(cache.slots.lock().unwrap().len() <= 4);
    }
}
