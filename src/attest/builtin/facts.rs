//! What verified evidence says, in the form in which a policy is asked about it.

use serde_json::{Map, Value};

use super::tpm::TpmAppraisal;
use super::{Finding, bounded};
use crate::attest::rego::Facts;
use crate::config::Seen;

/// Of a quote or report.
pub fn of(finding: &Finding) -> Facts {
    let seen = finding.seen.iter().map(|(name, seen)| {
        let value = match seen {
            Seen::Bytes(_) => Value::String(seen.to_string()),
            Seen::Number(n) => (*n).into(),
        };
        ((*name).to_owned(), value)
    });
    let said = bounded(finding.claims.clone().into_iter()).into_iter().map(|(name, text)| {
        let value = match name.as_str() {
            "advisories" => text.split(' ').collect(),
            _ => Value::String(text),
        };
        (name, value)
    });
    Facts {
        tee: finding.tee.to_owned(),
        sample: false,
        debug: finding.debug,
        trust_anchor: finding.trust_anchor.clone(),
        claims: seen.chain(said).collect(),
    }
}

/// Of a TPM's quote.
pub fn of_tpm(appraisal: &TpmAppraisal) -> Facts {
    let mut claims: Map<String, Value> = appraisal.claims().map(|(name, text)| (name, text.into())).collect();
    let quoted = &appraisal.quoted;
    claims.insert("resets".into(), quoted.resets.into());
    claims.insert("restarts".into(), quoted.restarts.into());
    claims.insert("clock_ms".into(), quoted.clock.into());
    claims.insert("clock_safe".into(), quoted.safe.into());
    Facts { tee: "tpm".into(), sample: false, debug: false, trust_anchor: appraisal.to_string(), claims }
}
