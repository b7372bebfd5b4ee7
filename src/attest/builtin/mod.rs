//! Appraisal in process, without any service: quotes and reports against reference values of the configuration.
//!
//! Each TEE has its module, which verifies evidence and says what is in it ([`Finding`]); what that is worth is judged
//! here, the same for all. Cryptography comes first: a reason other than a wrong signature is about signed facts.

mod amd;
mod cert_table;
mod collateral;
mod error;
mod facts;
mod fetch;
mod look;
mod pccs;
mod quote;
mod snp;
mod snp_report;
mod store;
pub mod tpm;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;

use super::binding::sha384;
use super::rego::{Facts, Policy};
use super::{Evidence, RuntimeData, Verdict, Verifier, VerifyError};
use crate::config::{Builtin, Mark, Reference, Seen};
use crate::os::clock;
use crate::os::clock::Clock;

pub(in crate::attest) use cert_table::guids;
pub use collateral::{dates as collateral_dates, problem as collateral_problem};
pub use error::BuiltinError;
pub use look::{Look, look};
pub use store::CollateralStatus;

/// Claims of a verdict, at most, and characters of one.
const MAX_CLAIMS: usize = 64;
const MAX_CLAIM: usize = 256;

/// A quote has no end of its own: the caller shortens the verdict to certificate and `verdict_ttl`.
const TPM_LIFETIME: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// What verified evidence says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    /// kbs-types name.
    tee: &'static str,
    /// Fields that reference values speak of.
    seen: BTreeMap<&'static str, Seen>,
    /// More to show.
    claims: BTreeMap<String, String>,
    /// What the evidence is bound to; a digest and zeros.
    report_data: Vec<u8>,
    /// Whether the host can read the TEE.
    debug: bool,
    /// What the trust rests on, in words.
    trust_anchor: String,
    /// When certificates or collateral end, seconds since the epoch.
    not_after: u64,
}

/// Whom evidence must lead to.
struct Roots {
    intel: Vec<u8>,
    amd: Vec<amd::Root>,
}

impl Roots {
    fn pinned() -> Self {
        #[cfg(test)]
        if let Some(injected) = end_to_end_tests::INJECTED.take() {
            return injected;
        }
        Self { intel: quote::pinned_root(), amd: amd::pinned() }
    }
}

/// The verifier of `provider = "builtin"`.
pub struct BuiltinVerifier {
    references: Vec<Reference>,
    allow_debug: bool,
    quotes: quote::Quotes,
    snp: snp::Snp,
    policy: Option<Policy>,
    policy_ids: Vec<String>,
    clock: Arc<dyn Clock>,
}

impl BuiltinVerifier {
    /// A verifier over `config`; its sockets carry `mark`. Fails on what no waiting heals: unreadable files, https
    /// without system roots.
    pub fn new(config: &Builtin, mark: Mark, clock: Arc<dyn Clock>) -> Result<Self, String> {
        Self::with_roots(config, mark, clock, Roots::pinned())
    }

    fn with_roots(config: &Builtin, mark: Mark, clock: Arc<dyn Clock>, roots: Roots) -> Result<Self, String> {
        let fetcher = |base: &Option<url::Url>, service| {
            base.as_ref().map(|b| fetch::Fetcher::new(b, service, mark, config.timeout)).transpose()
        };
        let store = store::Store::new(&config.collateral, fetcher(&config.pccs_addr, "PCCS")?)?;
        Ok(Self {
            references: config.references.clone(),
            allow_debug: config.allow_debug,
            quotes: quote::Quotes::new(roots.intel, store, config.minimum_tcb.clone()),
            snp: snp::Snp::new(roots.amd, &config.amd_certs, fetcher(&config.kds_addr, "KDS")?)?,
            policy: None,
            policy_ids: Vec::new(),
            clock,
        })
    }

    /// The same, with a policy that has to let the peer in too; verdicts name it by `ids`. Without any reference value it
    /// judges alone, but for TPMs, whose keys only references pin.
    pub fn with_policy(self, policy: Option<Policy>, ids: Vec<String>) -> Self {
        Self { policy, policy_ids: ids, ..self }
    }

    /// Asks the policy, if there is one.
    async fn allowed(&self, facts: Facts, evidence: &Evidence, expected: &RuntimeData) -> Result<(), VerifyError> {
        match &self.policy {
            Some(policy) => Ok(policy.judge(facts.document(evidence, expected)).await?),
            None => Ok(()),
        }
    }

    async fn finding(&self, evidence: &Evidence) -> Result<Finding, BuiltinError> {
        match evidence.tee.as_str() {
            "tdx" => self.quotes.appraise("tdx", &evidence.evidence, &self.clock).await,
            "sgx" => self.quotes.appraise("sgx", &evidence.evidence, &self.clock).await,
            "snp" => self.snp.appraise(&evidence.evidence, &*self.clock).await,
            other => Err(BuiltinError::Tee(other.to_owned())),
        }
    }

    /// A TPM's quote: its key is pinned by the reference value itself, so that comes first.
    async fn tpm(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let references: Vec<_> = self.references.iter().filter(|r| r.tee == "tpm").collect();
        let digest = sha384(evidence.runtime_data.as_bytes());
        let appraisal = tpm::appraise(&evidence.evidence, &digest, &references)?;
        self.allowed(facts::of_tpm(&appraisal), evidence, expected).await?;
        let now = self.clock.now();
        Ok(Verdict {
            tee: "tpm".into(),
            policy_ids: self.policy_ids.clone(),
            verifier: "builtin".into(),
            status: "affirming".into(),
            devices: Vec::new(),
            trust_anchor: appraisal.to_string(),
            sample: false,
            claims: bounded(appraisal.claims()),
            appraised_at: now,
            expires_at: now + TPM_LIFETIME,
        })
    }

    /// Whether the operator wants what was found.
    fn judge(&self, finding: &Finding) -> Result<(), BuiltinError> {
        if finding.debug && !self.allow_debug {
            return Err(BuiltinError::Debug);
        }
        if self.references.is_empty() && self.policy.is_some() {
            return Ok(());
        }
        let shown = |names: &mut dyn Iterator<Item = &'static str>| {
            let one = |name| finding.seen.get(name).map(|seen| written(name, seen));
            names.filter_map(one).collect::<Vec<_>>().join(", ")
        };
        let mut nearest: Option<Vec<&'static str>> = None;
        for block in self.references.iter().filter(|r| r.tee == finding.tee) {
            let differs = block.differences(&finding.seen);
            if differs.is_empty() {
                return Ok(());
            }
            if nearest.as_ref().is_none_or(|n| differs.len() < n.len()) {
                nearest = Some(differs);
            }
        }
        let tee = finding.tee;
        match nearest {
            None => Err(BuiltinError::NoReference { tee, seen: shown(&mut finding.seen.keys().copied()) }),
            Some(fields) if fields.iter().all(|f| f.starts_with("tcb_")) => {
                Err(BuiltinError::Tcb(shown(&mut fields.into_iter())))
            }
            Some(fields) => {
                let seen = shown(&mut fields.iter().copied());
                Err(BuiltinError::Mismatch { tee, fields: fields.join(", "), seen })
            }
        }
    }
}

/// A field as a reference block writes it.
fn written(name: &str, seen: &Seen) -> String {
    match seen {
        Seen::Bytes(_) => format!("{name} = \"{seen}\""),
        Seen::Number(_) => format!("{name} = {seen}"),
    }
}

/// Whether report data is `digest`, zero-padded to the TEE's length.
fn is_bound(report_data: &[u8], digest: &[u8]) -> bool {
    report_data.strip_prefix(digest).is_some_and(|rest| rest.iter().all(|b| *b == 0))
}

/// Bounded and printable, whatever the evidence held.
fn bounded(claims: impl Iterator<Item = (String, String)>) -> BTreeMap<String, String> {
    let clean = |s: String| s.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(MAX_CLAIM).collect();
    claims.take(MAX_CLAIMS).map(|(k, v)| (clean(k), clean(v))).collect()
}

#[async_trait]
impl Verifier for BuiltinVerifier {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let bound = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
        if !super::json_contains(&bound.into(), expected.object()) {
            return Err(VerifyError::ReportData);
        }
        // Devices are not appraised here; other ones than the TEE vouches for are no peer's of ours.
        super::devices::bound(evidence)?;
        if evidence.tee == "tpm" {
            return self.tpm(evidence, expected).await;
        }
        let finding = self.finding(evidence).await?;
        let digest = sha384(evidence.runtime_data.as_bytes());
        if !is_bound(&finding.report_data, &digest) {
            return Err(VerifyError::ReportData);
        }
        self.judge(&finding)?;
        self.allowed(facts::of(&finding), evidence, expected).await?;
        let seen = finding.seen.iter().map(|(name, seen)| ((*name).to_owned(), seen.to_string()));
        Ok(Verdict {
            tee: finding.tee.to_owned(),
            policy_ids: self.policy_ids.clone(),
            verifier: "builtin".into(),
            status: "affirming".into(),
            devices: Vec::new(),
            trust_anchor: finding.trust_anchor,
            sample: false,
            claims: bounded(seen.chain(finding.claims)),
            appraised_at: self.clock.now(),
            expires_at: clock::from_unix(finding.not_after).ok_or(VerifyError::Internal)?,
        })
    }
    fn calls(&self) -> u64 {
        self.quotes.calls() + self.snp.calls()
    }
    fn collateral(&self) -> Option<CollateralStatus> {
        self.quotes.collateral()
    }
    fn provider(&self) -> &'static str {
        "builtin"
    }
    fn trust_anchor(&self) -> String {
        let root = |r: &Reference| match r.tee {
            "tdx" | "sgx" => Some("Intel SGX Root CA (compiled in)"),
            "snp" => Some("AMD ARK-Milan, -Genoa, -Turin (compiled in)"),
            "tpm" => Some("pinned keys of TPMs"),
            _ => None,
        };
        let roots: BTreeSet<_> = self.references.iter().filter_map(root).collect();
        if roots.is_empty() && self.policy.is_some() {
            return "Intel SGX Root CA; AMD ARK-Milan, -Genoa, -Turin (compiled in); judged by verify.rego alone"
                .into();
        }
        if roots.is_empty() {
            return "none: no reference values".into();
        }
        roots.into_iter().collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod end_to_end_tests;
#[cfg(test)]
mod test_pki;
#[cfg(test)]
mod tests;
