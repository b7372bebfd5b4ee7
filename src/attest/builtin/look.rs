//! What evidence says of itself, for people: nobody checks a signature here, and nothing is let in by it.

use std::collections::BTreeMap;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::Value;

use super::{bounded, is_bound, quote, snp, tpm};
use crate::attest::binding::sha384;
use crate::attest::{Evidence, VerifyError};
use crate::config::Seen;

/// What evidence says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// Fields that reference values speak of, by their names there.
    pub seen: BTreeMap<&'static str, Seen>,
    /// More to show; bounded and printable.
    pub claims: BTreeMap<String, String>,
    /// What the TEE put into it for us; `None` where this version cannot read it.
    pub report_data: Option<Vec<u8>>,
    /// Whether the host can read the TEE.
    pub debug: Option<bool>,
    /// Whether the report data is the digest of the runtime data, as this TEE's verifiers compare it.
    pub bound: Option<bool>,
}

/// Looks at the evidence of a TEE that is appraised in process, and of the sample TEE; of others there is nothing to see.
///
/// # Errors
/// It is not what its TEE makes.
pub fn look(evidence: &Evidence) -> Result<Look, VerifyError> {
    let bytes = &evidence.evidence[..];
    let digest = sha384(evidence.runtime_data.as_bytes());
    let mut look = match evidence.tee.as_str() {
        tee @ ("tdx" | "sgx") => quote::look(tee, bytes)?,
        "snp" => snp::look(bytes)?,
        "tpm" => of_tpm(bytes, &digest)?,
        "sample" => of_sample(bytes)?,
        _ => Look::default(),
    };
    if look.bound.is_none() {
        look.bound = look.report_data.as_ref().map(|data| is_bound(data, &digest));
    }
    look.claims = bounded(std::mem::take(&mut look.claims).into_iter());
    Ok(look)
}

fn of_tpm(evidence: &[u8], digest: &[u8; 48]) -> Result<Look, VerifyError> {
    let quote = tpm::look(evidence)?;
    let pcrs = quote
        .pcrs
        .iter()
        .filter_map(|(pcr, value)| Some((*tpm::PCR_NAMES.get(usize::from(*pcr))?, Seen::Bytes(value.to_vec()))));
    let mut seen: BTreeMap<_, _> = pcrs.collect();
    seen.insert("ak", Seen::Bytes(quote.ak.to_vec()));
    let claims = quote.claims().filter(|(name, _)| !seen.contains_key(name.as_str())).collect();
    let bound = Some(tpm::is_over(&quote.quoted.extra_data, digest));
    Ok(Look { seen, claims, report_data: Some(quote.quoted.extra_data), debug: None, bound })
}

fn of_sample(evidence: &[u8]) -> Result<Look, VerifyError> {
    let json: Value = serde_json::from_slice(evidence).map_err(|_| VerifyError::Malformed("not sample evidence"))?;
    let report_data = json["report_data"].as_str().and_then(|text| BASE64_STANDARD.decode(text).ok());
    let report_data = report_data.ok_or(VerifyError::Malformed("report_data is not base64"))?;
    let claims = json["svn"].as_str().map(|svn| ("svn".to_owned(), svn.to_owned()));
    Ok(Look { claims: claims.into_iter().collect(), report_data: Some(report_data), ..Look::default() })
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::attest::RuntimeData;
    use crate::attest::changes::{CASES, change};
    use crate::config::VOCABULARY;

    fn evidence(tee: &str, bytes: &[u8]) -> Evidence {
        let runtime_data = RuntimeData::for_key(b"key").canonical().to_owned();
        Evidence { tee: tee.into(), evidence: bytes.to_vec(), additional: None, runtime_data }
    }

    static QUOTES: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| ["tdx", "sgx"].map(recorded));

    fn recorded(tee: &str) -> Vec<u8> {
        std::fs::read(format!("{}/tests/fixtures/quotes/{tee}_quote", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    fn quote_of(tee: &str) -> Evidence {
        let quote = BASE64_STANDARD.encode(recorded(tee));
        evidence(tee, format!(r#"{{"quote":"{quote}"}}"#).as_bytes())
    }

    #[test]
    fn recorded_evidence_shows_every_field_that_a_reference_can_name() {
        let snp = include_bytes!("../../../tests/fixtures/quotes/snp_milan_evidence.json");
        for (tee, evidence) in [("tdx", quote_of("tdx")), ("sgx", quote_of("sgx")), ("snp", evidence("snp", snp))] {
            let look = look(&evidence).unwrap();
            let (_, fields) = VOCABULARY.iter().find(|(name, _)| *name == tee).unwrap();
            let missing: Vec<_> = fields.iter().filter(|(f, _)| !look.seen.contains_key(f)).collect();
            assert!(missing.iter().all(|(f, _)| *f == "tcb_fmc"), "{tee}: {missing:?}");
            assert_eq!((look.bound, look.report_data.unwrap().len()), (Some(false), 64), "it is about another key");
        }
        let tpm =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/coco/grpc-tpm-affirming.evidence.json"));
        let look = look(&evidence("tpm", &tpm.unwrap())).unwrap();
        assert_eq!((look.seen.len(), look.claims.contains_key("resets")), (25, true));
    }

    #[test]
    fn a_quote_of_another_tee_and_unknown_tees_are_told_apart() {
        let mut swapped = quote_of("tdx");
        swapped.tee = "sgx".into();
        assert_eq!(look(&swapped).unwrap_err().reason(), "quote-malformed");
        assert_eq!(look(&evidence("csv", b"{}")), Ok(Look::default()));
        assert_eq!(look(&evidence("sample", b"{}")).unwrap_err().reason(), "evidence-malformed");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]

        #[test]
        fn no_bytes_of_a_peer_panic(tee in 0..5usize, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let tee = ["tdx", "sgx", "snp", "tpm", "sample"][tee];
            let _ = look(&evidence(tee, &bytes));
            let quote = format!(r#"{{"quote":"{}"}}"#, BASE64_STANDARD.encode(&bytes));
            let _ = look(&evidence(tee, quote.as_bytes()));
        }

        #[test]
        fn no_changed_quote_panics(sgx: bool, change in change()) {
            let (tee, real) = if sgx { ("sgx", &QUOTES[1]) } else { ("tdx", &QUOTES[0]) };
            let changed = format!(r#"{{"quote":"{}"}}"#, BASE64_STANDARD.encode(change.of(real)));
            let _ = look(&evidence(tee, changed.as_bytes()));
        }
    }
}
