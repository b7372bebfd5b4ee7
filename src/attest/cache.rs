//! Verdicts are reused for one certificate under one policy, and made once for all who wait.
//!
//! The key holds the certificate's hash, so what was checked of its bytes needs no second look: it counts as long as the
//! verdict does, which ends with the certificate at the latest.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

use super::{Verdict, VerifyError};
use crate::os::clock::Clock;
use crate::os::lock::Lock;

/// SHA-256 of the certificate and of the policy it was appraised under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// Of the certificate's DER.
    pub certificate: [u8; 32],
    /// Of everything the appraisal depends on.
    pub policy: [u8; 32],
}

/// A verdict on a certificate.
#[derive(Debug, Clone, PartialEq)]
pub struct Appraised {
    /// The verdict.
    pub verdict: Arc<Verdict>,
    /// The end of the certificate, which no verdict outlives.
    pub not_after: SystemTime,
}

type Outcome = Result<Appraised, VerifyError>;

enum Slot {
    Ready(Appraised, SystemTime),
    Flight(watch::Receiver<Option<Outcome>>),
}

impl Slot {
    /// The verdict, unless it is over. A clock that was set back behind the moment at which it was kept says nothing
    /// about how old it is, nor that the certificate is valid already.
    fn ready(&self, now: SystemTime) -> Option<&Appraised> {
        match self {
            Self::Ready(found, kept) if *kept <= now && now < found.verdict.expires_at.min(found.not_after) => {
                Some(found)
            }
            _ => None,
        }
    }
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
    clock: Arc<dyn Clock>,
    outcome: Option<Outcome>,
    tell: watch::Sender<Option<Outcome>>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or(Err(VerifyError::Internal));
        {
            let mut slots = self.slots.locked();
            // Not ours any more when the cache was cleared meanwhile.
            if matches!(slots.get(&self.key), Some(Slot::Flight(rx)) if rx.same_channel(&self.tell.subscribe())) {
                match &outcome {
                    Ok(found) => slots.insert(self.key, Slot::Ready(found.clone(), self.clock.now())),
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
    pub fn put(&self, key: CacheKey, found: Appraised) {
        let mut slots = self.slots.locked();
        let now = self.clock.now();
        let under_way = matches!(slots.get(&key), Some(Slot::Flight(_)));
        if !under_way && (slots.contains_key(&key) || make_room(&mut slots, self.capacity, now).is_ok()) {
            slots.insert(key, Slot::Ready(found, now));
        }
    }

    /// Forgets all verdicts. Appraisals under way answer those who wait, and are not kept.
    pub fn clear(&self) {
        let mut slots = self.slots.locked();
        slots.clear();
    }

    /// Forgets the verdict for `key`: the peer was refused since.
    pub fn forget(&self, key: &CacheKey) {
        let mut slots = self.slots.locked();
        if matches!(slots.get(key), Some(Slot::Ready(..))) {
            slots.remove(key);
        }
    }

    /// What is known of `key` without its certificate being looked into: a verdict, or what an appraisal that is under
    /// way ends in. `None`: nothing, so it has to be.
    pub async fn known(&self, key: &CacheKey) -> Option<Outcome> {
        let flight = {
            let slots = self.slots.locked();
            match slots.get(key)? {
                Slot::Flight(flight) => flight.clone(),
                ready => return ready.ready(self.clock.now()).map(|found| Ok(self.reused(found))),
            }
        };
        Some(landed(flight).await)
    }

    /// The verdict for `key`: what is known of it, or what `appraise` ends in, which runs in a task of its own so that
    /// one caller's end does not end it for the others. `not_after`: the end of the certificate.
    pub async fn get<F>(&self, key: CacheKey, not_after: SystemTime, appraise: impl FnOnce() -> F) -> Outcome
    where
        F: Future<Output = Result<Verdict, VerifyError>> + Send + 'static,
    {
        let flight = {
            let mut slots = self.slots.locked();
            let now = self.clock.now();
            let known = slots.get(&key);
            if let Some(found) = known.and_then(|slot| slot.ready(now)) {
                return Ok(self.reused(found));
            }
            match known {
                Some(Slot::Flight(flight)) => flight.clone(),
                _ => {
                    make_room(&mut slots, self.capacity, now)?;
                    let (tell, flight) = watch::channel(None);
                    slots.insert(key, Slot::Flight(flight.clone()));
                    let (slots, clock) = (self.slots.clone(), self.clock.clone());
                    let mut landing = Landing { slots, key, clock, outcome: None, tell };
                    let work = appraise();
                    tokio::spawn(async move {
                        let made = work.await;
                        landing.outcome = Some(made.map(|v| Appraised { verdict: Arc::new(v), not_after }));
                        drop(landing);
                    });
                    flight
                }
            }
        };
        landed(flight).await
    }

    fn reused(&self, found: &Appraised) -> Appraised {
        self.hits.fetch_add(1, Ordering::Relaxed);
        found.clone()
    }
}

/// Waits for what an appraisal ends in.
async fn landed(mut flight: watch::Receiver<Option<Outcome>>) -> Outcome {
    let outcome = flight.wait_for(Option::is_some).await.map_err(|_| VerifyError::Internal)?;
    outcome.clone().unwrap_or(Err(VerifyError::Internal))
}

fn make_room(slots: &mut HashMap<CacheKey, Slot>, capacity: usize, now: SystemTime) -> Result<(), VerifyError> {
    if slots.len() < capacity {
        return Ok(());
    }
    slots.retain(|_, s| !matches!(s, Slot::Ready(found, _) if found.verdict.expires_at <= now));
    while slots.len() >= capacity {
        // The verdict that would have ended first; appraisals under way are never thrown away.
        let first = slots
            .iter()
            .filter_map(
                |(k, s)| if let Slot::Ready(found, _) = s { Some((found.verdict.expires_at, *k)) } else { None },
            )
            .min_by_key(|(at, _)| *at);
        let Some((_, key)) = first else { return Err(VerifyError::Busy) };
        slots.remove(&key);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::clock::SystemClock;
    use std::time::Duration;

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

    fn later() -> SystemTime {
        SystemTime::now() + Duration::from_secs(3600)
    }
    fn found(ttl: i64) -> Appraised {
        Appraised { verdict: Arc::new(verdict(ttl)), not_after: later() }
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
                        .get(key(1), later(), || async move {
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
        assert_eq!(
            cache.get(key(1), later(), || async { Err(VerifyError::AsTimeout) }).await,
            Err(VerifyError::AsTimeout)
        );
        assert!(cache.get(key(1), later(), || async { Ok(verdict(-1)) }).await.is_ok());
        assert!(cache.get(key(1), later(), || async { Ok(verdict(60)) }).await.is_ok());
        assert!(cache.get(key(1), later(), || async { Err(VerifyError::AsTimeout) }).await.is_ok(), "reused");
        assert_eq!(cache.hits(), 1);
    }

    #[tokio::test]
    async fn a_panicking_appraisal_refuses_and_the_next_one_works() {
        let cache = VerdictCache::new(8, Arc::new(SystemClock));
        let boom = || async { if true { panic!("appraisal") } else { Ok(verdict(1)) } };
        assert_eq!(cache.get(key(1), later(), boom).await, Err(VerifyError::Internal));
        assert!(cache.get(key(1), later(), || async { Ok(verdict(60)) }).await.is_ok());
    }

    #[tokio::test]
    async fn a_renewed_verdict_is_reused_and_a_forgotten_one_is_not() {
        let cache = VerdictCache::new(2, Arc::new(SystemClock));
        cache.put(key(1), found(60));
        assert!(cache.get(key(1), later(), || async { Err(VerifyError::AsTimeout) }).await.is_ok());
        cache.forget(&key(1));
        assert_eq!(
            cache.get(key(1), later(), || async { Err(VerifyError::AsTimeout) }).await,
            Err(VerifyError::AsTimeout)
        );
        for n in 0..9 {
            cache.put(key(n), found(60));
        }
        assert_eq!(cache.slots.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn what_is_known_is_a_verdict_or_what_an_appraisal_under_way_ends_in() {
        let cache = Arc::new(VerdictCache::new(8, Arc::new(SystemClock)));
        assert_eq!(cache.known(&key(1)).await, None);
        cache.put(key(1), found(-1));
        assert_eq!(cache.known(&key(1)).await, None, "a verdict that is over");
        for (n, answer) in [(2, Ok(verdict(60))), (3, Err(VerifyError::AsTimeout))] {
            let (open, mut gate) = watch::channel(false);
            let (asked, reached) = tokio::sync::oneshot::channel();
            let (first, ends) = (cache.clone(), answer.clone());
            let first = tokio::spawn(async move {
                let work = || async move {
                    asked.send(()).unwrap();
                    gate.wait_for(|g| *g).await.unwrap();
                    ends
                };
                first.get(key(n), later(), work).await
            });
            reached.await.unwrap();
            let mine = key(n);
            let mut second = std::pin::pin!(cache.known(&mine));
            assert!(futures_util::poll!(second.as_mut()).is_pending());
            open.send(true).unwrap();
            let second = second.await.expect("known");
            assert_eq!(second, first.await.unwrap());
            assert_eq!(second.map(|found| Verdict::clone(&found.verdict)), answer);
        }
        assert!(cache.known(&key(2)).await.is_some_and(|found| found.is_ok()));
        assert_eq!(cache.known(&key(3)).await, None, "a refusal is not kept");
    }

    #[tokio::test]
    async fn a_cleared_cache_keeps_nothing_not_even_what_is_under_way() {
        let cache = Arc::new(VerdictCache::new(8, Arc::new(SystemClock)));
        cache.put(key(2), found(60));
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
                cache.get(key(1), later(), work).await
            })
        };
        started.await.unwrap();
        cache.clear();
        open.send(true).unwrap();
        assert!(first.await.unwrap().is_ok(), "who waited is answered");
        for n in [1, 2] {
            assert_eq!(
                cache.get(key(n), later(), || async { Err(VerifyError::AsTimeout) }).await,
                Err(VerifyError::AsTimeout)
            );
        }
    }

    #[tokio::test]
    async fn the_cache_is_bounded() {
        let cache = VerdictCache::new(4, Arc::new(SystemClock));
        for n in 0..50 {
            cache.get(key(n), later(), || async { Ok(verdict(60)) }).await.unwrap();
        }
        assert!(cache.slots.lock().unwrap().len() <= 4);
    }
}
