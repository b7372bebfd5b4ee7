//! The embedded provider: evidence that proves nothing, so that the whole path runs on any machine.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::prelude::{BASE64_STANDARD, Engine};

use super::binding::sha384;
use super::rego::{Facts, Policy};
use super::{AttestError, Attester, Evidence, RuntimeData, Verdict, Verifier, VerifyError};
use crate::os::clock::Clock;

/// Whether `tee` names a TEE that proves nothing.
pub fn is_sample_tee(tee: &str) -> bool {
    tee == "sample" || tee == "sampledevice"
}

/// Makes the evidence that an attestation agent without a TEE makes.
#[derive(Debug, Default)]
pub struct SampleAttester;

#[async_trait]
impl Attester for SampleAttester {
    async fn evidence(&self, runtime_data: &RuntimeData) -> Result<Evidence, AttestError> {
        let report = BASE64_STANDARD.encode(runtime_data.digest());
        Ok(Evidence {
            tee: "sample".into(),
            evidence: format!(r#"{{"report_data":"{report}","svn":"1"}}"#).into_bytes(),
            additional: None,
            runtime_data: runtime_data.canonical().into(),
        })
    }
    fn calls(&self) -> u64 {
        0
    }
    fn provider(&self) -> &'static str {
        "sample"
    }
}

#[derive(serde::Deserialize)]
struct SampleEvidence {
    report_data: String,
    svn: String,
}

/// Checks what can be checked of sample evidence: that it is bound to the peer's key.
pub struct SampleVerifier {
    allow_sample: bool,
    policy_ids: Vec<String>,
    policy: Option<Policy>,
    clock: Arc<dyn Clock>,
}

impl SampleVerifier {
    /// How long its verdict could hold; the caller shortens it to certificate and `verdict_ttl`.
    const LIFETIME: Duration = Duration::from_secs(24 * 3600);

    /// A verifier; without `allow_sample` it refuses everything.
    pub fn new(allow_sample: bool, policy_ids: Vec<String>, clock: Arc<dyn Clock>) -> Self {
        Self { allow_sample, policy_ids, policy: None, clock }
    }

    /// The same, with a policy that has to let the peer in too.
    pub fn with_policy(self, policy: Option<Policy>) -> Self {
        Self { policy, ..self }
    }
}

#[async_trait]
impl Verifier for SampleVerifier {
    async fn appraise(&self, evidence: &Evidence, expected: &RuntimeData) -> Result<Verdict, VerifyError> {
        if evidence.tee != "sample" {
            return Err(VerifyError::TeeUnsupported(evidence.tee.clone()));
        }
        if !self.allow_sample {
            return Err(VerifyError::SampleTeeRefused(evidence.tee.clone()));
        }
        let found = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
        if !super::json_contains(&found.into(), expected.object()) {
            return Err(VerifyError::ReportData);
        }
        let parsed: SampleEvidence =
            serde_json::from_slice(&evidence.evidence).map_err(|_| VerifyError::Malformed("not sample evidence"))?;
        let report = BASE64_STANDARD
            .decode(parsed.report_data)
            .map_err(|_| VerifyError::Malformed("report_data is not base64"))?;
        if report != sha384(evidence.runtime_data.as_bytes()) {
            return Err(VerifyError::ReportData);
        }
        // Devices are not appraised here, but what the TEE's evidence says of them must be true.
        super::devices::bound(evidence)?;
        if let Some(policy) = &self.policy {
            let facts = Facts {
                tee: evidence.tee.clone(),
                sample: true,
                debug: false,
                trust_anchor: "none".into(),
                claims: [("svn".to_owned(), parsed.svn.into())].into_iter().collect(),
            };
            policy.judge(facts.document(evidence, expected)).await?;
        }
        let now = self.clock.now();
        Ok(Verdict {
            tee: evidence.tee.clone(),
            policy_ids: self.policy_ids.clone(),
            verifier: "sample".into(),
            trust_anchor: "none".into(),
            sample: true,
            status: "affirming".into(),
            appraised_at: now,
            expires_at: now + Self::LIFETIME,
            ..Verdict::default()
        })
    }
    fn calls(&self) -> u64 {
        0
    }
    fn provider(&self) -> &'static str {
        "sample"
    }
    fn trust_anchor(&self) -> String {
        "none".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::clock::SystemClock;

    fn verifier(allow: bool) -> SampleVerifier {
        SampleVerifier::new(allow, vec![], Arc::new(SystemClock))
    }

    #[tokio::test]
    async fn sample_evidence_is_refused_unless_allowed() {
        let rd = RuntimeData::for_key(b"key");
        let ev = SampleAttester.evidence(&rd).await.unwrap();
        assert!(verifier(true).appraise(&ev, &rd).await.unwrap().sample);
        assert_eq!(verifier(false).appraise(&ev, &rd).await.unwrap_err().reason(), "sample-tee-refused");
    }

    #[tokio::test]
    async fn evidence_of_another_key_or_tee_is_refused() {
        let (mine, other) = (RuntimeData::for_key(b"key"), RuntimeData::for_key(b"other"));
        let mut ev = SampleAttester.evidence(&other).await.unwrap();
        assert_eq!(verifier(true).appraise(&ev, &mine).await, Err(VerifyError::ReportData));
        // The text claims my key, the report data still is the other's.
        ev.runtime_data = mine.canonical().into();
        assert_eq!(verifier(true).appraise(&ev, &mine).await, Err(VerifyError::ReportData));
        let naming = RuntimeData::for_key(b"key").with_devices(br#"{"sampledevice":{}}"#);
        let stripped = SampleAttester.evidence(&naming).await.unwrap();
        assert_eq!(verifier(true).appraise(&stripped, &mine).await.unwrap_err().reason(), "evidence-devices");
        ev.tee = "tdx".into();
        assert_eq!(verifier(true).appraise(&ev, &mine).await.unwrap_err().reason(), "sample-tee-unsupported");
    }
}
