//! Appraisal in this process, against reference values in the configuration and with no service.

pub mod tpm;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::binding::sha384;
use super::{Clock, Evidence, RuntimeData, Verdict, Verifier, VerifyError};
use crate::config::Reference;

/// How long a verdict could hold; the caller shortens it to certificate and `verdict_ttl`.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Appraises evidence by reference values.
pub struct BuiltinVerifier {
    references: Vec<Reference>,
    clock: Arc<dyn Clock>,
}

impl BuiltinVerifier {
    /// A verifier; a peer has to match one of `references`.
    pub fn new(references: Vec<Reference>, clock: Arc<dyn Clock>) -> Self {
        Self { references, clock }
    }
}

#[async_trait]
impl Verifier for BuiltinVerifier {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        let found = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
        if !super::json_contains(&found.into(), expected.object()) {
            return Err(VerifyError::ReportData);
        }
        let report_data = sha384(evidence.runtime_data.as_bytes());
        let trust_anchor = match evidence.tee.as_str() {
            "tpm" => {
                let references: Vec<_> = self.references.iter().map(|Reference::Tpm(r)| r).collect();
                tpm::appraise(&evidence.evidence, &report_data, &references)?.to_string()
            }
            _ => return Err(VerifyError::BuiltinUnsupported(evidence.tee.clone())),
        };
        let now = self.clock.now();
        Ok(Verdict {
            tee: evidence.tee.clone(),
            policy_ids: Vec::new(),
            verifier: "builtin".into(),
            trust_anchor,
            sample: false,
            appraised_at: now,
            expires_at: now + LIFETIME,
        })
    }
    fn calls(&self) -> u64 {
        0
    }
    fn provider(&self) -> &'static str {
        "builtin"
    }
    fn trust_anchor(&self) -> String {
        format!("{} reference value(s)", self.references.len())
    }
}
