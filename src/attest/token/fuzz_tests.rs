//! Tokens that were changed: header, keys and claims. No change panics, and none makes more of a token than it was.

use std::time::UNIX_EPOCH;

use proptest::prelude::*;
use serde_json::json;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;
use crate::attest::changes::{CASES, change, changed};

const RECORDED: &str = include_str!("../../../tests/fixtures/coco/as-sample-policy-affirm-all.jwt");

fn json_part(at: usize) -> Value {
    part(RECORDED.split('.').nth(at).unwrap(), "recorded").unwrap()
}

fn encoded(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

/// The recorded header, with the beginnings of its certificates: most of the time would go into base64.
fn header() -> Value {
    let mut header = json_part(0);
    for text in header["jwk"]["x5c"].as_array_mut().unwrap() {
        *text = text.as_str().unwrap()[..64].into();
    }
    header
}

/// One token in each form.
fn forms() -> [Value; 3] {
    let draft_04 = json!({
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iat": 1, "exp": 4_000_000_000u64,
        "submods": { "cpu0": {
            "ear_status": "affirming",
            "ear_appraisal_policy_ids": ["tng-affirm-all"],
            "ear_attester_claims": { "tee": "sample", "claims": { "a": { "b": [1] } } },
            "ear_verifier_claims": { "runtime_data": { "pubkey-hash": "x" } },
        } },
    });
    let simple = json!({
        "exp": 4_000_000_000u64, "tee": "tdx",
        "evaluation-reports": [{ "policy-id": "tng-affirm-all", "evaluation-result": "{\"allow\":true}" }],
        "tcb-status": "{\"tdx.a\":1}",
        "customized_claims": { "runtime_data": { "pubkey-hash": "x" } },
    });
    let mut recorded = json_part(1);
    recorded["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"] =
        json!({ "pubkey-hash": "x", "more": 1 });
    [recorded, draft_04, simple]
}

fn judged(claims: &Map<String, Value>, policy: &str) -> Result<Verdict, VerifyError> {
    let runtime_data = json!({ "pubkey-hash": "x" }).as_object().unwrap().clone();
    let expected = Expected { runtime_data: &runtime_data, policy_ids: &[policy.to_owned()], allow_sample: true };
    let said = Said { claims, trust_anchor: "set", now: UNIX_EPOCH, expires_at: UNIX_EPOCH };
    if claims.contains_key("eat_profile") {
        ear::appraised(&said, &expected)
    } else {
        simple::appraised(&said, &expected)
    }
}

#[test]
fn each_form_is_good_before_it_is_changed() {
    for form in forms() {
        judged(form.as_object().unwrap(), "tng-affirm-all").unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn no_changed_claim_panics_or_says_more(form in 0usize..3, at: u16, which: u8, again in any::<Option<(u16, u8)>>()) {
        static FORMS: std::sync::LazyLock<[Value; 3]> = std::sync::LazyLock::new(forms);
        let mut bad = changed(&FORMS[form], at, which);
        if let Some((at, which)) = again {
            bad = changed(&bad, at, which);
        }
        let Value::Object(claims) = bad else { return Ok(()) };
        if let Ok(verdict) = judged(&claims, "tng-affirm-all") {
            prop_assert_eq!(&verdict.policy_ids, &["tng-affirm-all".to_owned()]);
            prop_assert_eq!(verdict.status, "affirming");
            let runtime_data = RUNTIME_DATA.iter().find_map(|place| Value::Object(claims.clone()).pointer(place).cloned());
            prop_assert_eq!(runtime_data.unwrap()["pubkey-hash"].clone(), json!("x"));
        }
        let _ = timely(&claims, UNIX_EPOCH);
    }

    // The signature is of another length than any: whatever the header says, it is none.
    #[test]
    fn no_changed_header_panics_or_is_believed(at: u16, which: u8, bytes in change(), raw: bool) {
        static HEADER: std::sync::LazyLock<Value> = std::sync::LazyLock::new(header);
        let header = if raw {
            BASE64_URL_SAFE_NO_PAD.encode(bytes.of(HEADER.to_string().as_bytes()))
        } else {
            encoded(&changed(&HEADER, at, which))
        };
        prop_assert!(signed(&header, "e30", "AAAA", &Anchors::default(), UNIX_EPOCH).is_err());
    }

    #[test]
    fn no_text_is_a_token(bytes in change()) {
        let runtime_data = Map::new();
        let expected = Expected { runtime_data: &runtime_data, policy_ids: &[], allow_sample: true };
        let bytes = bytes.of(b"eyJhbGciOiJFUzI1NiJ9.eyJleHAiOjQwMDB9.AAAA");
        let text = String::from_utf8_lossy(&bytes);
        prop_assert!(verify(&text, &Anchors::default(), &expected, UNIX_EPOCH).is_err());
        let _ = (glance(&text).map(|_| ()), looks_like_jwt(&text));
    }

    #[test]
    fn no_changed_key_panics_in_a_set_or_as_one_of_a_chain(at: u16, which: u8, bytes in change()) {
        static JWK: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| header()["jwk"].clone());
        static SET: std::sync::LazyLock<String> =
            std::sync::LazyLock::new(|| json!({ "keys": [{ "kty": "RSA", "n": "AQ", "e": "AQ" }, *JWK] }).to_string());
        if let Some(set) = Anchors::from_jwks(&bytes.of(SET.as_bytes()), "set".into()) {
            prop_assert_eq!(set.keys().count(), 1);
        }
        if let Ok(jwk) = serde_json::from_value::<Jwk>(changed(&JWK, at, which))
            && let Some(key) = jwk.key()
        {
            prop_assert!(Anchors::default().trust(&jwk, &key, UNIX_EPOCH).is_err());
        }
    }
}

proptest! {
    // Each walks a chain, with its signatures.
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn a_changed_certificate_is_trusted_for_nothing_new(bytes in change()) {
        let mut jwk = json_part(0)["jwk"].clone();
        let good: Jwk = serde_json::from_value(jwk.clone()).unwrap();
        let chain = good.chain().unwrap();
        let bad = bytes.of(&chain[0]);
        jwk["x5c"][0] = BASE64_URL_SAFE_NO_PAD.encode(&bad).into();
        let jwk: Jwk = serde_json::from_value(jwk).unwrap();
        static CA: std::sync::LazyLock<Anchors> = std::sync::LazyLock::new(|| {
            let pem = include_bytes!("../../../tests/fixtures/coco/as-ca.pem");
            Anchors::from_pem(pem, "ca".into()).unwrap()
        });
        let now = from_unix(json_part(1)["iat"].as_u64().unwrap()).unwrap();
        prop_assert!(CA.trust(&good, &good.key().unwrap(), now).is_ok());
        // What stands around the signed part may be changed.
        let signed = |der: &[u8]| X509Certificate::from_der(der).map(|(_, c)| c.tbs_certificate.as_ref().to_vec()).ok();
        let same = signed(&bad) == signed(&chain[0]);
        prop_assert!(CA.trust(&jwk, &jwk.key().unwrap(), now).is_err() || same);
    }
}
