//! The passport model: the attester has its evidence turned into a token, the verifier needs no service.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::anchors::Anchors;
use super::{
    AttestError, Attester, Credential, Evidence, LatencyStatus, RuntimeData, Verdict, Verifier, VerifyError,
    json_contains, token,
};
use crate::config::TrustedSigners;
use crate::os::clock::Clock;

/// Somebody who turns evidence into a token.
#[async_trait]
pub trait TokenIssuer: Send + Sync {
    /// A token about `evidence`. Bounded by the issuer's own deadline.
    async fn issue(&self, evidence: &Evidence) -> Result<String, VerifyError>;
    /// How long it took.
    fn latency(&self) -> Option<LatencyStatus> {
        None
    }
}

/// Shows the token of an attestation service instead of its evidence.
///
/// The agent's own GetToken cannot serve: its `coco_as` token is made over empty report data, bound to no key.
pub struct PassportAttester {
    inner: Arc<dyn Attester>,
    issuer: Arc<dyn TokenIssuer>,
    clock: Arc<dyn Clock>,
    deadline: Duration,
}

impl PassportAttester {
    /// Evidence from `inner`, tokens from `issuer`, which has `deadline` for one.
    pub fn new(
        inner: Arc<dyn Attester>,
        issuer: Arc<dyn TokenIssuer>,
        clock: Arc<dyn Clock>,
        deadline: Duration,
    ) -> Self {
        Self { inner, issuer, clock, deadline }
    }
}

#[async_trait]
impl Attester for PassportAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        self.inner.evidence(runtime_data).await
    }

    async fn credential(&self, runtime_data: &RuntimeData) -> Result<Credential, AttestError> {
        let evidence = self.inner.evidence(runtime_data).await?;
        let issued = tokio::time::timeout(self.deadline, self.issuer.issue(&evidence)).await;
        let text = issued.unwrap_or(Err(VerifyError::AsTimeout)).map_err(AttestError::Passport)?;
        // The peer will check it; here it is better explained.
        let glance = token::glance(&text).map_err(AttestError::Passport)?;
        if glance.expires_at <= self.clock.now() {
            return Err(AttestError::Passport(VerifyError::TokenExpired));
        }
        if glance.runtime_data.is_some_and(|found| !json_contains(&found, runtime_data.object())) {
            return Err(AttestError::Passport(VerifyError::TokenRuntimeData));
        }
        Ok(Credential::Token(text))
    }

    fn calls(&self) -> u64 {
        self.inner.calls()
    }
    fn provider(&self) -> &'static str {
        self.inner.provider()
    }
    fn latency(&self) -> Option<LatencyStatus> {
        self.inner.latency()
    }
    fn token_latency(&self) -> Option<LatencyStatus> {
        self.issuer.latency()
    }
}

/// Checks tokens against anchors of its own and asks nobody.
pub struct TokenVerifier {
    anchors: Anchors,
    policy_ids: Vec<String>,
    allow_sample: bool,
    clock: Arc<dyn Clock>,
}

impl TokenVerifier {
    /// A verifier that believes whom `trusted` names in files and pins.
    ///
    /// # Errors
    /// A file cannot be read or names nobody; or nobody is named but by URLs.
    pub fn new(
        trusted: &TrustedSigners,
        policy_ids: Vec<String>,
        allow_sample: bool,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, String> {
        let anchors = Anchors::named(trusted)?.ok_or("no signer of tokens is named")?;
        Ok(Self { anchors, policy_ids, allow_sample, clock })
    }
}

#[async_trait]
impl Verifier for TokenVerifier {
    async fn appraise(&self, _evidence: &Evidence, _expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        // The configuration has it check tokens alone.
        Err(VerifyError::Internal)
    }
    async fn check_token(&self, text: &str, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let wanted = token::Expected {
            runtime_data: expected.object(),
            policy_ids: &self.policy_ids,
            allow_sample: self.allow_sample,
        };
        token::verify(text, &self.anchors, &wanted, self.clock.now())
    }
    fn calls(&self) -> u64 {
        0
    }
    fn provider(&self) -> &'static str {
        "as"
    }
    fn trust_anchor(&self) -> String {
        self.anchors.origin().to_owned()
    }
}
