//! Evidence of this side, appraisal of the peer's, and the verdict both end in.

mod aa;
mod anchors;
mod binding;
pub mod builtin;
mod cache;
mod clock;
mod error;
mod evidence;
pub mod host;
mod jwk;
mod sample;
mod service;
mod token;
pub mod tpm;
mod ttrpc;
pub mod x509;

use std::collections::BTreeMap;
use std::time::SystemTime;

use async_trait::async_trait;

pub use aa::AaAttester;
pub(crate) use binding::{EXPORTER, NONCE, PUBKEY_HASH};
pub use binding::{RuntimeData, json_contains};
pub(crate) use builtin::collateral_problem;
pub use builtin::{BuiltinError, BuiltinVerifier};
pub use cache::{CacheKey, VerdictCache};
pub use clock::{Clock, SystemClock};
pub use error::{AsStatus, AttestError, VerifyError};
pub use evidence::{EVIDENCE_OID, Evidence, EvidenceError};
pub use sample::{SampleAttester, SampleVerifier, is_sample_tee};
pub use service::{AsSeen, AsVerifier, ServiceStatus};
pub(crate) use token::LEEWAY as TOKEN_LEEWAY;

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
    /// What the evidence says of the peer: measurements, versions. Bounded, printable.
    pub claims: BTreeMap<String, String>,
    /// When it was made.
    pub appraised_at: SystemTime,
    /// When it ends: the earliest of token, certificate and `verdict_ttl`.
    pub expires_at: SystemTime,
}

/// A source of evidence about this host.
#[async_trait]
pub trait Attester: Send + Sync {
    /// Evidence whose report data is the digest of `runtime_data`. Bounded by the attester's own deadline.
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError>;
    /// How often the source outside this process was called.
    fn calls(&self) -> u64;
    /// Name of the provider, as in the configuration.
    fn provider(&self) -> &'static str;
}

/// Somebody who can say what evidence is worth.
#[async_trait]
pub trait Verifier: Send + Sync {
    /// Appraises `evidence`, which must be bound to `expected`. Bounded by the verifier's own deadline.
    /// The verdict's end is the verifier's own; the caller shortens it to certificate and `verdict_ttl`.
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError>;
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
}
