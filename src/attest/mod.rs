//! Evidence of this side, appraisal of the peer's, and the verdict both end in.

mod aa;
mod agent;
mod anchors;
mod asr;
mod binding;
pub mod builtin;
mod cache;
#[cfg(test)]
mod changes;
mod claims;
mod credential;
mod devices;
mod error;
mod evidence;
pub mod host;
mod jwk;
mod latency;
mod passport;
pub mod rego;
mod sample;
mod service;
mod tee_names;
mod token;
pub mod tpm;
mod ttrpc;
pub mod x509;

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;

pub use aa::AaAttester;
pub use asr::AsrAttester;
pub(crate) use binding::{EXPORTER, NONCE, PUBKEY_HASH};
pub use binding::{RuntimeData, json_contains};
pub use builtin::{BuiltinError, BuiltinVerifier, CollateralStatus, Look, look};
pub(crate) use builtin::{collateral_dates, collateral_problem};
pub use cache::{Appraised, CacheKey, VerdictCache};
pub(crate) use claims::printable as printable_claims;
pub use credential::Credential;
pub use devices::Devices;
pub(crate) use devices::bound as bound_devices;
pub use error::{AsStatus, AttestError, VerifyError};
pub use evidence::{EVIDENCE_OID, Evidence, EvidenceError};
pub use latency::{BOUNDS as LATENCY_BOUNDS, Latency, LatencyStatus, Measured, TimedAttester};
pub use passport::{PassportAttester, TokenIssuer, TokenVerifier};
pub use sample::{SampleAttester, SampleVerifier, is_sample_tee};
pub use service::{AsSeen, AsVerifier, ServiceStatus};
pub(crate) use token::{LEEWAY as TOKEN_LEEWAY, glance as token_glance, unverified as token_unverified};

/// What an appraisal found. Every way of appraising ends in this one type.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Verdict {
    /// TEE the evidence came from, by its kbs-types name (`tdx`, `snp`, `sample`, ...).
    pub tee: String,
    /// Policies the appraisal was made under.
    pub policy_ids: Vec<String>,
    /// Who appraised: `as`, `builtin` or `sample`.
    pub verifier: String,
    /// What the trust in the appraisal rests on, in words (`CN=... (file)`, `JWKS of ...`, `none`).
    pub trust_anchor: String,
    /// Whether the TEE is one that proves nothing (`sample`, `sampledevice`).
    pub sample: bool,
    /// What the appraisal ended in, by its AR4SI word: `affirming`.
    pub status: String,
    /// Devices that were appraised together with the TEE and are bound to the same key, by kbs-types name.
    pub devices: Vec<String>,
    /// What the appraisal found, for people: claims of the TEE, printable and bounded in size and number, and what the
    /// policy of an attestation service made of them (`ar4si.NAME`).
    pub claims: BTreeMap<String, String>,
    /// When it was made.
    pub appraised_at: SystemTime,
    /// When it ends: the earliest of token, certificate and `verdict_ttl`.
    pub expires_at: SystemTime,
}

impl Default for Verdict {
    /// A verdict on nothing, that is over.
    fn default() -> Self {
        Self {
            tee: String::new(),
            policy_ids: Vec::new(),
            verifier: String::new(),
            trust_anchor: String::new(),
            sample: false,
            status: String::new(),
            devices: Vec::new(),
            claims: BTreeMap::new(),
            appraised_at: UNIX_EPOCH,
            expires_at: UNIX_EPOCH,
        }
    }
}

/// A source of evidence about this host.
#[async_trait]
pub trait Attester: Send + Sync {
    /// Evidence whose report data is the digest of `runtime_data`. Bounded by the attester's own deadline.
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError>;
    /// What the certificate carries: the evidence, unless it is turned into a token first.
    async fn credential(&self, runtime_data: &RuntimeData) -> Result<Credential, AttestError> {
        self.evidence(runtime_data).await.map(Credential::Evidence)
    }
    /// How often the source outside this process was called.
    fn calls(&self) -> u64;
    /// Name of the provider, as in the configuration.
    fn provider(&self) -> &'static str;
    /// How long the source outside this process took for evidence; absent when there is none.
    fn latency(&self) -> Option<LatencyStatus> {
        None
    }
    /// How long an attestation service took for a token about it (passport).
    fn token_latency(&self) -> Option<LatencyStatus> {
        None
    }
}

/// Somebody who can say what evidence is worth.
#[async_trait]
pub trait Verifier: Send + Sync {
    /// Appraises `evidence`, which must be bound to `expected`. Bounded by the verifier's own deadline.
    /// The verdict's end is the verifier's own; the caller shortens it to certificate and `verdict_ttl`.
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError>;
    /// Checks a token that the peer shows (passport), which must be bound to `expected`. Only those that have anchors
    /// for tokens do; the configuration asks no others.
    async fn check_token(&self, _token: &str, _expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        Err(VerifyError::Internal)
    }
    /// How often the service outside this process was called.
    fn calls(&self) -> u64;
    /// Name of the provider, as in the configuration.
    fn provider(&self) -> &'static str;
    /// What the trust rests on, in words.
    fn trust_anchor(&self) -> String;
    /// Addresses of the service outside this process, in the order of the configuration.
    fn services(&self) -> Vec<ServiceStatus> {
        Vec::new()
    }
    /// How often one of them gave way to the next.
    fn failovers(&self) -> u64 {
        0
    }
    /// How long that service took for an appraisal; absent when there is none.
    fn latency(&self) -> Option<LatencyStatus> {
        None
    }
    /// Dates of what the vendor of a TEE signs about it, where the appraisal is made in process.
    fn collateral(&self) -> Option<CollateralStatus> {
        None
    }
}
