//! What a `Simple` token says: that of trustee before 0.16, and of the openanolis line where it is configured so. It is
//! made only when every policy allowed the evidence (`evaluation-reports`), and has no status of its own.

use serde_json::{Map, Value};

use super::{Expected, Said, policies, shown};
use crate::attest::{Verdict, VerifyError, claims, is_sample_tee, json_contains};

/// Judges what a token without a profile says.
pub(super) fn appraised(said: &Said<'_>, expected: &Expected<'_>) -> Result<Verdict, VerifyError> {
    let runtime_data = said.claims.get("customized_claims").and_then(|c| c.get("runtime_data"));
    let runtime_data = runtime_data.ok_or(VerifyError::TokenMalformed("neither eat_profile nor customized_claims"))?;
    if !json_contains(runtime_data, expected.runtime_data) {
        return Err(VerifyError::TokenRuntimeData);
    }
    let reports = said.claims.get("evaluation-reports").and_then(Value::as_array);
    let mut found = Vec::new();
    for report in reports.ok_or(VerifyError::TokenMalformed("no evaluation-reports"))? {
        let policy = report.get("policy-id").and_then(Value::as_str);
        let policy = policy.ok_or(VerifyError::TokenMalformed("a report without policy"))?;
        allowed(policy, report)?;
        found.push(policy.to_owned());
    }
    let tee = said.claims.get("tee").and_then(Value::as_str).ok_or(VerifyError::TokenMalformed("no TEE"))?;
    let status = tcb_status(said.claims)?;
    // Claims of all TEEs stand beside each other, each name begins with its TEE's.
    let of = |name: &String| name.split('.').next().is_some_and(is_sample_tee);
    let sample = is_sample_tee(tee) || status.keys().any(of);
    if sample && !expected.allow_sample {
        return Err(VerifyError::SampleTeeRefused(tee.into()));
    }
    policies(&found, expected.policy_ids)?;
    let prefix = format!("{tee}.");
    let own: Map<_, _> =
        status.into_iter().filter_map(|(name, claim)| Some((name.strip_prefix(&prefix)?.to_owned(), claim))).collect();
    Ok(Verdict {
        claims: claims::printable(&Value::Object(own)),
        // What the policies' `allow` amounts to.
        status: "affirming".into(),
        // They are appraised with the TEE, and the token does not say what they are bound to.
        devices: Vec::new(),
        tee: shown(tee),
        policy_ids: found,
        verifier: "as".into(),
        trust_anchor: said.trust_anchor.into(),
        sample,
        appraised_at: said.now,
        expires_at: said.expires_at,
    })
}

/// What each policy said, where the token tells; an error for the first that did not allow.
pub(super) fn status(claims: &Value) -> Result<(), VerifyError> {
    let reports = claims.get("evaluation-reports").and_then(Value::as_array);
    reports
        .into_iter()
        .flatten()
        .try_for_each(|report| allowed(report.get("policy-id").and_then(Value::as_str).unwrap_or_default(), report))
}

/// Older ones tell what the policy said; newer ones are made only when it allowed.
fn allowed(policy: &str, report: &Value) -> Result<(), VerifyError> {
    let Some(result) = report.get("evaluation-result") else { return Ok(()) };
    let parsed = result.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    match parsed.as_ref().unwrap_or(result).get("allow") {
        Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err(VerifyError::TokenStatusContraindicated(format!("policy {}", shown(policy)))),
        _ => Err(VerifyError::TokenMalformed("an evaluation-result without allow")),
    }
}

/// An object, or the text of one.
fn tcb_status(token: &Map<String, Value>) -> Result<Map<String, Value>, VerifyError> {
    let malformed = VerifyError::TokenMalformed("tcb-status");
    match token.get("tcb-status") {
        Some(Value::Object(status)) => Ok(status.clone()),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|_| malformed),
        _ => Err(malformed),
    }
}
