//! What one endpoint demands of its peers, and what it found about them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;

use super::certificate::fingerprint;
use super::peer::{self, PeerCertificate};
use super::session::{BoundSession, Sessions};
use super::status::VerifyStatus;
use super::{ChannelError, providers};
use crate::attest::{Appraised, CacheKey, Credential, Verdict, VerdictCache, Verifier, VerifyError};
use crate::config::{Endpoint, Model, Verify};
use crate::os::clock::Clock;

/// Verdicts kept by one endpoint.
const CACHE_CAPACITY: usize = 1024;
/// Peers of open connections that are appraised again at once.
const MAX_RENEWALS: usize = 16;

/// What this side demands of the peer.
pub(super) struct Appraisal {
    pub(super) verifier: Arc<dyn Verifier>,
    /// Verdicts on certificates, as RATS-TLS shows them.
    pub(super) cache: VerdictCache,
    /// Sessions bound by `tng/1`.
    pub(super) sessions: Sessions,
    policy: [u8; 32],
    policy_ids: Vec<String>,
    pub(super) model: Model,
    allow_sample: bool,
    pub(super) verdict_ttl: Duration,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) deadline: Duration,
    pub(super) renewals: Semaphore,
}

/// A new verdict on `shown`. Zero `ttl` is for verdicts that are not reused: only token and certificate end them.
pub(super) async fn appraise(
    verifier: Arc<dyn Verifier>,
    shown: PeerCertificate,
    now: SystemTime,
    ttl: Duration,
) -> Result<Verdict, VerifyError> {
    let mut verdict = match &shown.credential {
        Credential::Evidence(evidence) => verifier.appraise(evidence, &shown.expected).await?,
        Credential::Token(token) => verifier.check_token(token, &shown.expected).await?,
    };
    let by_ttl = if ttl.is_zero() { None } else { now.checked_add(ttl) };
    verdict.expires_at = verdict.expires_at.min(by_ttl.unwrap_or(shown.not_after)).min(shown.not_after);
    Ok(verdict)
}

impl Appraisal {
    /// What `verify` of this endpoint asks for.
    pub(super) fn new(endpoint: &Endpoint, verify: &Verify, clock: Arc<dyn Clock>) -> Result<Self, ChannelError> {
        let verifier = providers::verifier(endpoint, verify, clock.clone())?;
        let policy =
            serde_json::json!([verifier.provider(), verify.policy_ids, verify.allow_sample, verify.model.to_string()]);
        Ok(Self {
            verifier,
            cache: VerdictCache::new(CACHE_CAPACITY, clock.clone()),
            sessions: Sessions::new(CACHE_CAPACITY),
            policy: fingerprint(policy.to_string().as_bytes()),
            policy_ids: verify.policy_ids.clone(),
            model: verify.model,
            allow_sample: verify.allow_sample,
            verdict_ttl: verify.verdict_ttl,
            clock,
            deadline: endpoint.limits.handshake_timeout,
            renewals: Semaphore::new(MAX_RENEWALS),
        })
    }

    /// Whether later connections may refer to this session.
    pub(super) fn still_bound(&self, session: &BoundSession) -> bool {
        session.lasts(self.clock.now()) && self.sessions.holds(session)
    }

    /// Under which a verdict on the certificate `der` is kept.
    pub(super) fn key(&self, der: &[u8]) -> CacheKey {
        CacheKey { certificate: fingerprint(der), policy: self.policy }
    }

    /// The verdict on the certificate `der`, whose key this is, or why there is none. One that is known costs no look
    /// into the certificate.
    pub(super) async fn of(&self, key: CacheKey, der: &[u8]) -> Result<Appraised, ChannelError> {
        let reused = !self.verdict_ttl.is_zero();
        if reused && let Some(known) = self.cache.known(&key).await {
            return Ok(known?);
        }
        let now = self.clock.now();
        let shown = peer::inspect(der, self.model, now)?;
        let not_after = shown.not_after;
        let appraise = appraise(self.verifier.clone(), shown, now, self.verdict_ttl);
        if reused {
            return Ok(self.cache.get(key, not_after, || appraise).await?);
        }
        Ok(Appraised { verdict: Arc::new(appraise.await?), not_after })
    }

    /// How often a verdict on a certificate was reused.
    pub(super) fn hits(&self) -> u64 {
        self.cache.hits()
    }

    /// Forgets what was found about peers.
    pub(super) fn forget_all(&self) {
        self.cache.clear();
        self.sessions.clear();
    }

    /// For `tngctl status`.
    pub(super) fn status(&self) -> VerifyStatus {
        VerifyStatus {
            provider: self.verifier.provider(),
            model: self.model.to_string(),
            policy_ids: self.policy_ids.clone(),
            trust_anchor: self.verifier.trust_anchor(),
            allow_sample: self.allow_sample,
            services: self.verifier.services(),
            collateral: self.verifier.collateral(),
        }
    }
}

#[cfg(test)]
#[path = "appraisal_tests.rs"]
mod tests;
