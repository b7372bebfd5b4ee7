//! What keeps one peer's verdict young: it is appraised again before its verdict ends, at once when the rules change,
//! and in its grace once it has failed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::known::{Condition, Counts, Fate, Shared};
use super::standing::{InForce, Shown, Withdrawn, spread};
use super::{ChannelError, PeerError};
use crate::os::clock::Clock;

/// The longest lead before a verdict's end at which renewal begins. Shorter verdicts: a quarter of their life.
const MAX_LEAD: Duration = Duration::from_secs(120);
/// Failed attempts are repeated after this part of the lead, or of the grace.
const TRIES: u32 = 8;
/// No more often than this, however short lead or grace are, ...
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// ... and in a long grace no less often than this: the service may be back.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A wall clock that is set while the timer sleeps is noticed after this time.
const MAX_NAP: Duration = Duration::from_secs(30);

/// Watches over one peer while it has open connections.
pub(super) struct Watch {
    pub shared: Arc<Shared>,
    pub shown: Shown,
    pub not_after: SystemTime,
    pub rules: watch::Receiver<InForce>,
    pub counts: Arc<Counts>,
    pub clock: Arc<dyn Clock>,
}

/// When the next attempt is due, in the situation it was thought for.
struct Plan {
    situation: (u64, Condition),
    at: SystemTime,
    /// Between attempts that bring nothing.
    pause: Duration,
}

impl Watch {
    /// Runs until the peer's connections have to end.
    pub async fn run(mut self) {
        let mut failure: Option<ChannelError> = None;
        let mut plan: Option<Plan> = None;
        // The newest rules that the peer was judged by, whatever came of it.
        let mut asked = 0;
        loop {
            let rules = self.rules.borrow_and_update().clone();
            self.shared.regrace(rules.judge.grace());
            let (now, condition) = (self.clock.now(), self.shared.condition());
            let situation = (rules.term, condition);
            let confirmed = condition.term == rules.term;
            if condition.exempt && confirmed {
                self.change(None).await;
                continue;
            }
            let planned = match &mut plan {
                Some(plan) if plan.situation == situation => plan,
                _ => {
                    failure = None;
                    plan.insert(self.plan(situation, asked == rules.term, &rules, now))
                }
            };
            let lapsed = condition.exempt && condition.ends <= now;
            let left = match condition.failed {
                Some((_, by)) => by.saturating_duration_since(Instant::now()),
                // Ended while the rules wanted none: it is asked for now.
                None if lapsed => MAX_LEAD,
                None => condition.ends.duration_since(now).unwrap_or_default(),
            };
            if left.is_zero() {
                let over = match condition.failed {
                    Some(_) => self.shared.end(),
                    None => self.expire(failure.take(), now, &rules),
                };
                if over {
                    return self.tell_end();
                }
                continue;
            }
            let wait = planned.at.duration_since(now).unwrap_or_default();
            if !wait.is_zero() {
                self.change(Some(wait.min(left).min(MAX_NAP))).await;
                continue;
            }
            let attempt = timeout(left, rules.judge.judge(&self.shown));
            let outcome = tokio::select! {
                outcome = attempt => outcome,
                // Whatever comes of it would be of yesterday's rules.
                () = changed(&mut self.rules) => continue,
            };
            planned.at = self.clock.now() + planned.pause;
            asked = rules.term;
            let withdrawn = match outcome {
                Ok(Ok(Some(verdict))) => {
                    failure = None;
                    let tee = verdict.tee.clone();
                    if self.shared.renew(verdict, rules.term, self.clock.now(), &self.counts) {
                        tracing::debug!(tee, "the peer was appraised again");
                    }
                    None
                }
                Ok(Ok(None)) => {
                    self.shared.exempt(rules.term, &self.counts);
                    None
                }
                Ok(Err(error)) if error.is_about_peer() || (!confirmed && error.is_judgement()) => {
                    Some(Withdrawn::refused(&error))
                }
                Ok(Err(error)) if lapsed => Some(Withdrawn::unrenewed(&error)),
                Err(_) if lapsed => Some(Withdrawn::expired()),
                Ok(Err(error)) => {
                    if condition.failed.is_none() {
                        tracing::warn!(reason = error.reason(), %error, "the peer could not be appraised again yet");
                    }
                    failure = Some(error);
                    None
                }
                Err(_) => None,
            };
            if withdrawn.is_some_and(|why| self.fail(why, &rules)) {
                return self.tell_end();
            }
        }
    }

    /// Waits until something changes, or for `nap`.
    async fn change(&mut self, nap: Option<Duration>) {
        let nap = async {
            match nap {
                Some(nap) => sleep(nap).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = nap => {}
            () = self.shared.nudge.notified() => {}
            () = changed(&mut self.rules) => {}
        }
    }

    fn plan(&self, situation: (u64, Condition), asked: bool, rules: &InForce, now: SystemTime) -> Plan {
        let (term, condition) = situation;
        let verdict = self.shared.verdict();
        let ends = condition.ends;
        let life = ends.duration_since(verdict.appraised_at).unwrap_or_default();
        let lead = (life / 4).min(MAX_LEAD);
        let pause = match condition.failed {
            Some((since, by)) => (by.saturating_duration_since(since) / TRIES).min(MAX_PAUSE),
            None => lead / TRIES,
        };
        let pause = pause.max(MIN_PAUSE);
        let at = if condition.term != term && !asked {
            // All peers of the endpoint are asked about now.
            let left = ends.duration_since(now).unwrap_or_default();
            now + rules.spread.min(left / 2).mul_f64(spread())
        } else if let Some((_, by)) = condition.failed.filter(|_| self.not_after <= now) {
            // A certificate that is over cannot be appraised.
            now + by.saturating_duration_since(Instant::now())
        } else if condition.term != term || condition.failed.is_some() {
            now + pause
        } else if ends >= self.not_after {
            // Its end is the end.
            ends
        } else {
            ends - lead.mul_f64(1.0 - spread() / 4.0)
        };
        Plan { situation, at, pause }
    }

    fn expired(&self, failure: Option<ChannelError>, now: SystemTime) -> Withdrawn {
        match failure {
            _ if self.not_after <= now => Withdrawn::refused(&PeerError::Expired.into()),
            None => Withdrawn::expired(),
            Some(error) => Withdrawn::unrenewed(&error),
        }
    }

    /// The verdict has ended. True when the connections end now.
    fn expire(&self, failure: Option<ChannelError>, now: SystemTime, rules: &InForce) -> bool {
        let why = self.expired(failure, now);
        let fate = self.shared.expire(now, why.clone(), rules.judge.grace(), &self.counts);
        fate.is_some_and(|fate| is_over(fate, &why))
    }

    /// True when the connections end now.
    fn fail(&self, why: Withdrawn, rules: &InForce) -> bool {
        is_over(self.shared.fail(why.clone(), rules.judge.grace(), &self.counts), &why)
    }

    fn tell_end(&self) {
        if let Some(why) = self.shared.why() {
            tracing::warn!(reason = why.reason, detail = why.text, "the peer's open connections are closed");
        }
    }
}

/// Says once what becomes of a peer that failed.
fn is_over(fate: Fate, why: &Withdrawn) -> bool {
    let Withdrawn { reason, text: detail } = why;
    match fate {
        Fate::Over => return true,
        Fate::Grace(grace) => tracing::warn!(
            reason,
            detail,
            grace_ms = grace.as_millis() as u64,
            "the peer's open connections will be closed unless it is affirmed again"
        ),
        Fate::AsBefore => tracing::debug!(reason, detail, "the peer failed again"),
    }
    false
}

/// Other rules are in force.
async fn changed(rules: &mut watch::Receiver<InForce>) {
    if rules.changed().await.is_err() {
        // Nobody is left who could change them.
        std::future::pending::<()>().await;
    }
}
