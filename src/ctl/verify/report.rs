//! The outcome as one object: what `--json` prints, and what the text is made from.

use std::collections::BTreeMap;

use serde::Serialize;

use super::checks::Check;
use super::view::{CertificateView, EvidenceView, TokenView, time};
use crate::attest::Verdict;
use crate::config::{AsService, Verify, VerifyProvider};
use crate::tls::probe::Negotiated;

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Appraised, and every check passed.
    Verified,
    /// A check says that the peer is not to be trusted.
    Refused,
    /// Nobody could judge: not reached, no TLS, a service away, evidence wanted that this side has not.
    NotJudged,
    /// Nobody was asked to judge; what can be checked without is well.
    NotAppraised,
}

impl Outcome {
    /// Exit status of the command.
    pub fn status(self) -> u8 {
        match self {
            Self::Verified => 0,
            Self::Refused => 1,
            Self::NotJudged => 4,
            Self::NotAppraised => 5,
        }
    }
}

/// Everything that is known at the end. Every member is always there, as null where there is nothing.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// As it was given; `None` for this host.
    pub target: Option<String>,
    /// Address that was connected to.
    pub address: Option<String>,
    /// What was negotiated.
    pub tls: Option<TlsView>,
    /// The peer's.
    pub certificate: Option<CertificateView>,
    /// Evidence or token that was shown.
    pub evidence: Option<EvidenceView>,
    /// The token that was shown, or that the service gave.
    pub token: Option<TokenView>,
    /// Who appraises.
    pub appraiser: Option<AppraiserView>,
    /// Each check in its order.
    pub checks: Vec<Check>,
    /// The end of it.
    pub verdict: VerdictView,
    /// What else the operator should know.
    pub notes: Vec<String>,
    /// Files that were written.
    pub saved: Vec<String>,
    /// A block of reference values, TOML.
    pub reference: Option<String>,
}

/// What was negotiated.
#[derive(Debug, Clone, Serialize)]
pub struct TlsView {
    /// `TLSv1.3`.
    pub version: String,
    /// IANA name.
    pub cipher_suite: String,
    /// IANA name.
    pub key_exchange: String,
    /// Protocol that was chosen.
    pub protocol: Option<String>,
    /// `session`, `certificate` or `none`.
    pub binding: &'static str,
    /// Whether the peer asked for a certificate of this side.
    pub wants_evidence: bool,
}

impl TlsView {
    pub(super) fn of(negotiated: &Negotiated, wants_evidence: bool, binding: &'static str) -> Self {
        Self {
            version: negotiated.version.clone(),
            cipher_suite: negotiated.cipher_suite.clone(),
            key_exchange: negotiated.group.clone(),
            protocol: negotiated.alpn.as_ref().map(|p| String::from_utf8_lossy(p).into_owned()),
            binding,
            wants_evidence,
        }
    }
}

/// Who appraises, and by what.
#[derive(Debug, Clone, Serialize)]
pub struct AppraiserView {
    /// `as`, `builtin` or `sample`.
    pub provider: &'static str,
    /// Where its settings come from.
    pub settings: String,
    /// Addresses of the service.
    pub services: Vec<String>,
    /// Policies that the token must be made under.
    pub policy_ids: Vec<String>,
    /// Whether the sample TEE is accepted.
    pub allow_sample: bool,
    /// Reference values at hand.
    pub references: usize,
}

impl AppraiserView {
    pub(super) fn of(verify: &Verify, settings: &str) -> Self {
        let urls = |service: &AsService| service.addrs.iter().map(ToString::to_string).collect();
        let (provider, services, references) = match &verify.provider {
            VerifyProvider::As(service) => ("as", urls(service), 0),
            VerifyProvider::Anchors(_) => ("as", Vec::new(), 0),
            VerifyProvider::Builtin(builtin) => ("builtin", Vec::new(), builtin.references.len()),
            VerifyProvider::Sample => ("sample", Vec::new(), 0),
        };
        Self {
            provider,
            settings: settings.to_owned(),
            services,
            policy_ids: verify.policy_ids.clone(),
            allow_sample: verify.allow_sample,
            references,
        }
    }
}

/// The end of it.
#[derive(Debug, Clone, Serialize)]
pub struct VerdictView {
    /// How it ended.
    pub outcome: Outcome,
    /// Check that failed first.
    pub failed: Option<&'static str>,
    /// Reason of the refusal (tng-reasons(7)).
    pub reason: Option<String>,
    /// What happened, in words.
    pub detail: Option<String>,
    /// What it means, and the next step.
    pub explanation: Option<String>,
    /// What the appraisal found, if it came so far.
    pub appraisal: Option<AppraisalView>,
}

/// What an appraisal found.
#[derive(Debug, Clone, Serialize)]
pub struct AppraisalView {
    /// kbs-types name.
    pub tee: String,
    /// AR4SI word.
    pub status: String,
    /// Whether the TEE proves nothing.
    pub sample: bool,
    /// Devices bound to the same key.
    pub devices: Vec<String>,
    /// Policies it was made under.
    pub policy_ids: Vec<String>,
    /// What the trust rests on.
    pub trust_anchor: String,
    /// RFC 3339: how long it would hold.
    pub expires_at: Option<String>,
    /// What it found.
    pub claims: BTreeMap<String, String>,
}

impl From<&Verdict> for AppraisalView {
    fn from(verdict: &Verdict) -> Self {
        Self {
            tee: verdict.tee.clone(),
            status: verdict.status.clone(),
            sample: verdict.sample,
            devices: verdict.devices.clone(),
            policy_ids: verdict.policy_ids.clone(),
            trust_anchor: verdict.trust_anchor.clone(),
            expires_at: time(verdict.expires_at),
            claims: verdict.claims.clone(),
        }
    }
}

/// Exit status when a block was asked for and there is nothing to make it from.
pub(super) const NO_REFERENCE: u8 = 4;
