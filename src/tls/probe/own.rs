//! This host's own evidence, as a peer would be shown it.

use std::sync::Arc;

use rcgen::{KeyPair, PublicKeyData};

use super::showing::Showing;
use crate::attest::{AttestError, Evidence, RuntimeData, Verdict, Verifier, VerifyError};
use crate::config::{Attest, Endpoint, Verify};
use crate::os::clock::Clock;
use crate::tls::endpoint::setup;
use crate::tls::{ChannelError, providers};

/// This host's own evidence, and what somebody made of it.
#[derive(Debug, Clone)]
pub struct OwnEvidence {
    /// About a key made for this.
    pub evidence: Evidence,
    /// What it has to be about.
    pub expected: RuntimeData,
    /// Token that an attestation service gave for it.
    pub token: Option<String>,
    /// The verdict, when somebody was asked for one.
    pub outcome: Option<Result<Verdict, VerifyError>>,
}

/// Gets evidence as `endpoint` does, about a key made for this, and has it appraised by `verify` if there is one.
///
/// # Errors
/// The endpoint has no attester, it cannot be set up, or gives no evidence.
pub async fn attest(
    endpoint: &Endpoint,
    verify: Option<&Verify>,
    clock: Arc<dyn Clock>,
) -> Result<OwnEvidence, ChannelError> {
    let attest = endpoint.ra.attest.as_ref().ok_or_else(|| setup("the endpoint has no attest table"))?;
    // The evidence itself is to be seen, and not the token that a passport has in its place.
    let plain = Attest { passport: None, ..attest.clone() };
    let attester = providers::attester(endpoint, &plain, clock.clone())?;
    let verifier = verify.map(|v| Showing::new(endpoint, v, clock)).transpose()?;
    let key =
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|e| AttestError::Certificate(e.to_string()))?;
    let expected = RuntimeData::for_key(&key.subject_public_key_info());
    let evidence = attester.evidence(&expected).await?;
    let outcome = match &verifier {
        Some(verifier) => Some(verifier.appraise(&evidence, &expected).await),
        None => None,
    };
    Ok(OwnEvidence { evidence, expected, token: verifier.and_then(|v| v.token()), outcome })
}
