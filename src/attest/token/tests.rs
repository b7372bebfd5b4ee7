//! Recorded tokens, each judged at the time it was made.

use super::*;
use std::path::PathBuf;

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
}

fn anchors(name: &str) -> Anchors {
    Anchors::from_files(&[PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/coco").join(name)]).unwrap()
}

fn claims(token: &str) -> Value {
    part(token.split('.').nth(1).unwrap(), "claims").unwrap()
}

struct Case {
    token: String,
    ca: &'static str,
    policy: &'static str,
    allow_sample: bool,
    runtime_data: Option<Map<String, Value>>,
    after_iat: i64,
}

impl Case {
    fn new(name: &str, policy: &'static str) -> Self {
        Self { token: fixture(name), ca: "as-ca.pem", policy, allow_sample: true, runtime_data: None, after_iat: 1 }
    }
    fn judge(&self) -> Result<Verdict, VerifyError> {
        let c = claims(&self.token);
        let own = c["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"].as_object().cloned();
        let runtime_data = self
            .runtime_data
            .clone()
            .or(own)
            .unwrap_or_else(|| [("pubkey-hash".to_owned(), Value::from("x"))].into_iter().collect());
        let expected = Expected {
            runtime_data: &runtime_data,
            policy_ids: &[self.policy.to_owned()],
            allow_sample: self.allow_sample,
        };
        let now = from_unix(c["iat"].as_u64().unwrap().checked_add_signed(self.after_iat).unwrap()).unwrap();
        verify(&self.token, &anchors(self.ca), &expected, now)
    }
    fn reason(&self) -> &'static str {
        self.judge().map_or_else(|e| e.reason(), |_| "ok")
    }
}

#[test]
fn every_recorded_token_ends_as_it_should() {
    let table = [
        ("aa-gettoken-coco_as.jwt", "default", "token-runtime-data"),
        ("as-sample-default-structured-sha384.jwt", "default", "token-status-contraindicated"),
        ("as-sample-ephemeral-signer.jwt", "default", "token-untrusted-signer"),
        ("as-sample-initdata.jwt", "default", "token-status-contraindicated"),
        ("as-sample-nopolicy.jwt", "default", "token-status-contraindicated"),
        ("as-sample-noruntime.jwt", "default", "token-runtime-data"),
        ("as-sample-plus-device.jwt", "default", "token-status-contraindicated"),
        ("as-sample-policy-affirm-all.jwt", "tng-affirm-all", "ok"),
        ("as-sample-policy-bound.jwt", "tng-bound", "ok"),
        ("as-sample-policy-none.jwt", "tng-none", "token-status-none"),
        ("as-sample-policy-warn.jwt", "tng-warn", "token-status-warning"),
        ("as-sample-raw.jwt", "default", "token-runtime-data"),
        ("as-sample-sha256.jwt", "default", "token-status-contraindicated"),
        ("as-sample-sha512.jwt", "default", "token-status-contraindicated"),
        ("grpc-sample-affirming.jwt", "default", "ok"),
        ("grpc-sample-default.jwt", "default", "token-status-contraindicated"),
        ("grpc-tpm-affirming.jwt", "default", "ok"),
        ("grpc-tpm-default.jwt", "default", "token-status-warning"),
        ("kbs-rcar-affirming.jwt", "default", "ok"),
        ("kbs-rcar-default-policy.jwt", "default", "ok"),
        ("kbs-rcar-tpm.jwt", "default", "ok"),
        ("longlived-sample-default.jwt", "default", "token-status-contraindicated"),
        ("longlived-sample-tng-affirm-all.jwt", "tng-affirm-all", "ok"),
        ("longlived-sample-tng-bound.jwt", "tng-bound", "ok"),
        ("longlived-sample-tng-none.jwt", "tng-none", "token-status-none"),
        ("longlived-sample-tng-warn.jwt", "tng-warn", "token-status-warning"),
    ];
    for (name, policy, end) in table {
        assert_eq!(Case::new(name, policy).reason(), end, "{name}: {:?}", Case::new(name, policy).judge());
    }
}

#[test]
fn a_version_1_leaf_under_an_rsa_root_is_trusted_and_under_another_root_is_not() {
    let mut case = Case::new("longlived-v1leaf-rsaroot-affirming.jwt", "tng-affirm-all");
    assert_eq!(case.reason(), "token-untrusted-signer");
    case.ca = "longlived-v1leaf-rsaroot.ca.pem";
    assert_eq!(case.reason(), "ok", "{:?}", case.judge());
}

#[test]
fn time_policy_runtime_data_and_sample_are_checked() {
    let good = || Case::new("as-sample-policy-affirm-all.jwt", "tng-affirm-all");
    let verdict = good().judge().unwrap();
    assert_eq!((verdict.tee.as_str(), verdict.sample), ("sample", true));
    assert!(verdict.trust_anchor.contains("tng test AS CA"), "{}", verdict.trust_anchor);
    assert_eq!(Case { after_iat: 300, ..good() }.reason(), "token-expired");
    assert_eq!(Case { after_iat: 299, ..good() }.reason(), "ok");
    assert_eq!(Case { after_iat: -61, ..good() }.reason(), "token-from-future");
    assert_eq!(Case { after_iat: -60, ..good() }.reason(), "ok");
    assert_eq!(Case { policy: "default", ..good() }.reason(), "token-policy");
    assert_eq!(Case { allow_sample: false, ..good() }.reason(), "sample-tee-refused");
    let other = [("nonce".to_owned(), Value::from("other"))].into_iter().collect();
    assert_eq!(Case { runtime_data: Some(other), ..good() }.reason(), "token-runtime-data");
    let tpm = Case { allow_sample: false, ..Case::new("grpc-tpm-affirming.jwt", "default") }.judge().unwrap();
    assert_eq!((tpm.tee.as_str(), tpm.sample), ("tpm", false));
}

#[test]
fn tampered_tokens_are_refused() {
    let good = Case::new("as-sample-policy-affirm-all.jwt", "tng-affirm-all");
    let [h, p, s]: [&str; 3] = good.token.split('.').collect::<Vec<_>>().try_into().unwrap();
    let with =
        |token: String| Case { token, ..Case::new("as-sample-policy-affirm-all.jwt", "tng-affirm-all") }.reason();
    let header = |from: &str, to: &str| {
        let text = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(h).unwrap()).unwrap();
        assert!(text.contains(from));
        BASE64_URL_SAFE_NO_PAD.encode(text.replacen(from, to, 1))
    };
    let warn = Case::new("as-sample-policy-warn.jwt", "tng-warn").token;
    assert_eq!(with(format!("{h}.{}.{s}", warn.split('.').nth(1).unwrap())), "token-signature");
    assert_eq!(
        with(format!("{}.{p}.{s}", header(r#""alg":"ES256","jwk""#, r#""alg":"none","jwk""#))),
        "token-alg-none"
    );
    assert_eq!(with(format!("{}.{p}.{s}", header(r#""kty":"EC""#, r#""kty":"RSA""#))), "token-malformed");
    assert_eq!(with(format!("e30.{p}.{s}")), "token-malformed");
    assert_eq!(with(format!("{h}.{p}.{s}.x")), "token-malformed");
}
