//! Forms that the recordings do not have, in the words of the projects that write them: the names of
//! draft-ietf-rats-ear-04 (trustee, attestation-service/docs/example.token.json and src/ear_token/claims.rs), the EAR of
//! trustee before 0.12 (one submodule `cpu`), and `Simple` tokens (openanolis trustee, src/token/simple.rs).

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeySize, PublicKeyComponents};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, RSA_PKCS1_SHA384, RsaKeyPair};
use serde_json::json;

use super::*;

const NOW: u64 = 1_800_000_000;

enum Signer {
    Ec(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl Signer {
    fn ec() -> Self {
        Self::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }
    fn rsa() -> Self {
        Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }
    fn alg(&self) -> &'static str {
        if matches!(self, Self::Ec(_)) { "ES256" } else { "RS384" }
    }
    fn jwk(&self) -> Value {
        let text = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
        match self {
            Self::Ec(key) => {
                let point = key.public_key().as_ref();
                let (x, y) = (text(&point[1..33]), text(&point[33..]));
                json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "x": x, "y": y })
            }
            Self::Rsa(key) => {
                let PublicKeyComponents { n, e } = PublicKeyComponents::<Vec<u8>>::from(key.public_key());
                json!({ "kty": "RSA", "alg": "RS384", "n": text(&n), "e": text(&e) })
            }
        }
    }
    fn sign(&self, header: &Value, claims: &Value) -> String {
        let text = |v: &Value| BASE64_URL_SAFE_NO_PAD.encode(v.to_string());
        let message = format!("{}.{}", text(header), text(claims));
        let signature = match self {
            Self::Ec(key) => key.sign(&SystemRandom::new(), message.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Rsa(key) => {
                let mut out = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA384, &SystemRandom::new(), message.as_bytes(), &mut out).unwrap();
                out
            }
        };
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }
    /// As the services write it.
    fn token(&self, claims: &Value) -> String {
        self.sign(&json!({ "typ": "JWT", "alg": self.alg(), "jwk": self.jwk() }), claims)
    }
}

fn set(keys: &[Value]) -> Anchors {
    Anchors::from_jwks(json!({ "keys": keys }).to_string().as_bytes(), "set".into()).unwrap()
}

fn judge_by(token: &str, anchors: &Anchors, allow_sample: bool) -> Result<Verdict, VerifyError> {
    let runtime_data = json!({ "pubkey-hash": "x" }).as_object().unwrap().clone();
    let expected = Expected { runtime_data: &runtime_data, policy_ids: &["default".to_owned()], allow_sample };
    verify(token, anchors, &expected, UNIX_EPOCH + Duration::from_secs(NOW))
}

/// What becomes of these claims, signed by a trusted key.
fn judge(signer: &Signer, claims: &Value) -> Result<Verdict, VerifyError> {
    judge_by(&signer.token(claims), &set(&[signer.jwk()]), false)
}

fn slug(signer: &Signer, claims: &Value) -> &'static str {
    judge(signer, claims).map_or_else(|e| e.reason(), |_| "ok")
}

fn ear(submods: Value) -> Value {
    json!({
        "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
        "iat": NOW,
        "exp": NOW + 300,
        "submods": submods,
    })
}

/// One appraisal with the names of draft 04, as trustee's example has it.
fn draft_04(tee: &str) -> Value {
    json!({
        "ear_status": "affirming",
        "ear_trustworthiness_vector": { "executables": 3, "hardware": 2 },
        "ear_appraisal_policy_ids": ["default"],
        "ear_attester_claims": { "report_data": "74657374", "tee": tee, "claims": { "tcb_status": "UpToDate" } },
        "ear_verifier_claims": { "runtime_data": { "pubkey-hash": "x" } },
    })
}

fn dotted(tee: &str) -> Value {
    json!({
        "ear.status": "affirming",
        "ear.trustworthiness-vector": { "executables": 3 },
        "ear.appraisal-policy-id": "default",
        "ear.veraison.annotated-evidence": {
            "report_data": "74657374", "runtime_data_claims": { "pubkey-hash": "x" }, tee: { "svn": 1 },
        },
    })
}

/// `value` with `member` of its first level changed, or removed.
fn with(value: &Value, member: &str, to: Value) -> Value {
    let mut changed = value.clone();
    if to.is_null() {
        changed.as_object_mut().unwrap().remove(member);
    } else {
        changed[member] = to;
    }
    changed
}

#[test]
fn the_names_of_draft_04_are_read() {
    let signer = Signer::ec();
    let verdict = judge(&signer, &ear(json!({ "cpu0": draft_04("tdx"), "gpu0": draft_04("nvidia") }))).unwrap();
    assert_eq!((verdict.tee.as_str(), verdict.policy_ids.as_slice()), ("tdx", &["default".to_owned()][..]));
    assert_eq!((verdict.devices, verdict.claims["tcb_status"].as_str()), (vec!["nvidia".to_owned()], "UpToDate"));
    let good = draft_04("snp");
    let cpu = |member: &str, to: Value| slug(&signer, &ear(json!({ "cpu0": with(&good, member, to) })));
    for (status, expected) in [
        (json!("none"), "token-status-none"),
        (json!("warning"), "token-status-warning"),
        (json!("contraindicated"), "token-status-contraindicated"),
        (json!("splendid"), "token-malformed"),
        (Value::Null, "token-malformed"),
    ] {
        assert_eq!(cpu("ear_status", status), expected);
    }
    assert_eq!(cpu("ear_verifier_claims", json!({})), "token-runtime-data", "only the report data was given");
    assert_eq!(cpu("ear_verifier_claims", json!({ "runtime_data": { "pubkey-hash": "y" } })), "token-runtime-data");
    assert_eq!(cpu("ear_appraisal_policy_ids", json!(["lenient"])), "token-policy");
    assert_eq!(cpu("ear_appraisal_policy_ids", json!(["default", "lenient"])), "token-policy-mixed");
    assert_eq!(cpu("ear_appraisal_policy_ids", json!([])), "token-malformed");
    assert_eq!(cpu("ear_appraisal_policy_ids", json!([1])), "token-malformed");
    assert_eq!(cpu("ear_attester_claims", json!({ "claims": {} })), "token-malformed");
    assert_eq!(cpu("ear.status", json!("affirming")), "token-malformed", "both drafts at once");
    let device = |gpu: Value| slug(&signer, &ear(json!({ "cpu0": good, "gpu0": gpu })));
    assert_eq!(device(with(&draft_04("nvidia"), "ear_status", json!("warning"))), "token-status-warning");
    let unbound = with(&draft_04("nvidia"), "ear_verifier_claims", Value::Null);
    let verdict = judge(&signer, &ear(json!({ "cpu0": good, "gpu0": unbound }))).unwrap();
    assert_eq!(verdict.devices, Vec::<String>::new(), "anybody could have shown it");
    assert_eq!(device(draft_04("sampledevice")), "sample-tee-refused");
    assert_eq!(slug(&signer, &ear(json!({ "cpu0": draft_04("sample") }))), "sample-tee-refused");
}

#[test]
fn a_status_may_be_the_number_of_its_tier() {
    let signer = Signer::ec();
    for (form, member) in [(dotted("tdx"), "ear.status"), (draft_04("tdx"), "ear_status")] {
        for (status, expected) in [
            (2, "ok"),
            (0, "token-status-none"),
            (32, "token-status-warning"),
            (96, "token-status-contraindicated"),
            (3, "token-malformed"),
            (-2, "token-malformed"),
        ] {
            let claims = ear(json!({ "cpu0": with(&form, member, json!(status)) }));
            assert_eq!(slug(&signer, &claims), expected, "{member} {status}");
        }
    }
}

#[test]
fn the_one_submodule_of_older_services_is_called_cpu() {
    let signer = Signer::ec();
    assert_eq!(judge(&signer, &ear(json!({ "cpu": dotted("tdx") }))).unwrap().tee, "tdx");
    assert_eq!(slug(&signer, &ear(json!({ "gpu0": dotted("tdx") }))), "token-malformed");
    // Beside a `cpu0` it is one more.
    let other = with(&dotted("sev"), "ear.status", json!("warning"));
    assert_eq!(slug(&signer, &ear(json!({ "cpu0": dotted("tdx"), "cpu": other }))), "token-status-warning");
    let glanced = glance(&signer.token(&ear(json!({ "cpu": dotted("tdx") })))).unwrap();
    assert_eq!(glanced.runtime_data, Some(json!({ "pubkey-hash": "x" })));
}

#[test]
fn a_token_of_another_profile_s_name_is_judged_by_what_it_holds() {
    let signer = Signer::ec();
    let named = |profile: Value, submod: &Value| with(&ear(json!({ "cpu0": submod })), "eat_profile", profile);
    // As of a service whose `profile_name` was set.
    let mine = json!("tag:example.org,2026:mine");
    let verdict = judge(&signer, &named(mine.clone(), &dotted("tdx"))).unwrap();
    assert_eq!(verdict.claims["eat_profile"], "tag:example.org,2026:mine");
    assert!(!judge(&signer, &ear(json!({ "cpu0": dotted("tdx") }))).unwrap().claims.contains_key("eat_profile"));
    let warned = with(&dotted("tdx"), "ear.status", json!("warning"));
    assert_eq!(slug(&signer, &named(mine.clone(), &warned)), "token-status-warning");
    let other = with(&draft_04("tdx"), "ear_verifier_claims", Value::Null);
    assert_eq!(slug(&signer, &named(mine, &other)), "token-runtime-data");
    assert_eq!(slug(&signer, &named(json!(2), &dotted("tdx"))), "token-malformed");
}

#[test]
fn the_side_that_shows_a_token_sees_that_it_will_be_refused() {
    let signer = Signer::ec();
    let seen = |claims: &Value| glance(&signer.token(claims)).unwrap().status.map(|e| e.reason());
    for (form, member) in [(dotted("tdx"), "ear.status"), (draft_04("tdx"), "ear_status")] {
        let of = |status: &str| seen(&ear(json!({ "cpu0": with(&form, member, json!(status)) })));
        assert_eq!(of("affirming"), None);
        assert_eq!(of("contraindicated"), Some("token-status-contraindicated"));
        let device = with(&form, member, json!("warning"));
        assert_eq!(seen(&ear(json!({ "cpu0": form, "gpu0": device }))), Some("token-status-warning"));
    }
    assert_eq!(seen(&simple()), None);
    let denied = json!([{ "policy-id": "default", "evaluation-result": r#"{"allow":false}"# }]);
    assert_eq!(seen(&with(&simple(), "evaluation-reports", denied)), Some("token-status-contraindicated"));
}

fn simple() -> Value {
    json!({
        "iss": "CoCo-Attestation-Service",
        "iat": NOW,
        "nbf": NOW,
        "exp": NOW + 300,
        "jti": "0123456789",
        "tee": "tdx",
        "evaluation-reports": [{ "policy-id": "default", "policy-hash": "00" }],
        "tcb-status": r#"{"tdx.quote.header.version":"0400","report_data":"74","init_data":""}"#,
        "customized_claims": { "init_data": null, "runtime_data": { "pubkey-hash": "x" } },
    })
}

#[test]
fn simple_tokens_are_read() {
    let signer = Signer::rsa();
    let verdict = judge(&signer, &simple()).unwrap();
    assert_eq!((verdict.tee.as_str(), verdict.status.as_str()), ("tdx", "affirming"));
    assert_eq!(verdict.claims["quote.header.version"], "0400");
    let changed = |member: &str, to: Value| slug(&signer, &with(&simple(), member, to));
    assert_eq!(changed("exp", json!(NOW)), "token-expired");
    assert_eq!(changed("exp", Value::Null), "token-malformed");
    assert_eq!(changed("nbf", json!(NOW + 3600)), "token-not-yet-valid");
    assert_eq!(changed("tee", Value::Null), "token-malformed");
    assert_eq!(changed("tee", json!("sample")), "sample-tee-refused");
    assert_eq!(changed("tcb-status", json!("{}{}")), "token-malformed");
    // A device beside the TEE.
    assert_eq!(changed("tcb-status", json!({ "sampledevice.svn": "2" })), "sample-tee-refused");
    assert_eq!(changed("customized_claims", json!({})), "token-malformed");
    assert_eq!(changed("customized_claims", json!({ "runtime_data": null })), "token-runtime-data");
    let other = json!({ "runtime_data": { "pubkey-hash": "y" } });
    assert_eq!(changed("customized_claims", other), "token-runtime-data");
    let report = |more: Value| {
        let mut report = json!({ "policy-id": "default" });
        report.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        changed("evaluation-reports", json!([report]))
    };
    // As of 2023, when denied evidence got a token, too.
    assert_eq!(report(json!({ "evaluation-result": r#"{"allow":true}"# })), "ok");
    assert_eq!(report(json!({ "evaluation-result": r#"{"allow":false}"# })), "token-status-contraindicated");
    assert_eq!(report(json!({ "evaluation-result": "{}" })), "token-malformed");
    assert_eq!(report(json!({ "policy-id": "lenient" })), "token-policy");
    assert_eq!(changed("evaluation-reports", json!([])), "token-policy");
    assert_eq!(changed("evaluation-reports", json!([{}])), "token-malformed");
    let two = json!([{ "policy-id": "default" }, { "policy-id": "lenient" }]);
    assert_eq!(changed("evaluation-reports", two), "token-policy-mixed");
}

#[test]
fn a_clock_that_is_an_hour_off_ends_in_the_direction_s_reason() {
    let signer = Signer::ec();
    let made = |at: u64| {
        let mut claims = ear(json!({ "cpu0": dotted("tdx") }));
        (claims["iat"], claims["exp"]) = (at.into(), (at + 300).into());
        slug(&signer, &claims)
    };
    assert_eq!(made(NOW - 3600), "token-expired");
    assert_eq!(made(NOW + 3600), "token-from-future");
    assert_eq!((made(NOW - 299), made(NOW + 60)), ("ok", "ok"));
}

#[test]
fn a_key_signs_with_its_own_algorithm_alone() {
    let (ec, rsa) = (Signer::ec(), Signer::rsa());
    let anchors = set(&[ec.jwk(), rsa.jwk()]);
    let judge = |token: String| judge_by(&token, &anchors, false).map_or_else(|e| e.reason(), |_| "ok");
    let header = |alg: &str, jwk: Value| json!({ "alg": alg, "jwk": jwk });
    assert_eq!(judge(rsa.sign(&header("RS384", rsa.jwk()), &simple())), "ok");
    assert_eq!(judge(rsa.sign(&header("ES256", rsa.jwk()), &simple())), "token-alg");
    assert_eq!(judge(ec.sign(&header("RS384", ec.jwk()), &simple())), "token-alg");
    assert_eq!(judge(rsa.sign(&header("RS256", rsa.jwk()), &simple())), "token-alg");
    assert_eq!(judge(rsa.sign(&header("HS384", rsa.jwk()), &simple())), "token-alg-mac");
    let pss = with(&rsa.jwk(), "alg", json!("PS384"));
    assert_eq!(judge(rsa.sign(&header("RS384", pss), &simple())), "token-alg");
    assert_eq!(judge(Signer::rsa().sign(&header("RS384", rsa.jwk()), &simple())), "token-signature");
    assert_eq!(judge(Signer::rsa().token(&simple())), "token-untrusted-signer");
}

#[test]
fn a_token_without_a_key_is_one_of_the_set_s() {
    let (one, two, rsa) = (Signer::ec(), Signer::ec(), Signer::rsa());
    let anchors = set(&[one.jwk(), with(&two.jwk(), "kid", json!("two")), rsa.jwk()]);
    let judge = |token: String| judge_by(&token, &anchors, false).map_or_else(|e| e.reason(), |_| "ok");
    for signer in [&one, &two, &rsa] {
        assert_eq!(judge(signer.sign(&json!({ "alg": signer.alg() }), &simple())), "ok");
    }
    assert_eq!(judge(Signer::ec().sign(&json!({ "alg": "ES256" }), &simple())), "token-untrusted-signer");
    // Who is named is asked alone.
    assert_eq!(judge(two.sign(&json!({ "alg": "ES256", "kid": "two" }), &simple())), "ok");
    assert_eq!(judge(one.sign(&json!({ "alg": "ES256", "kid": "two" }), &simple())), "token-signature");
    assert_eq!(judge(one.sign(&json!({ "alg": "ES256", "kid": "three" }), &simple())), "token-untrusted-signer");
    // A set of other keys is none.
    let token = rsa.sign(&json!({ "alg": "RS384" }), &simple());
    assert_eq!(judge_by(&token, &set(&[one.jwk()]), false).unwrap_err().reason(), "token-malformed");
}
