//! `[*.attest]` and the passport model: accepted and refused next to each other.

use super::*;

fn attest(lines: &str) -> String {
    format!("[[egress]]\n[egress.netfilter]\ncapture = [{{ port = 1 }}]\n[egress.attest]\n{lines}\n")
}

fn verify(lines: &str) -> String {
    format!("[[ingress]]\n[ingress.netfilter]\ncapture = [{{ port = 1 }}]\n[ingress.verify]\n{lines}\n")
}

fn attest_of(text: &str) -> Attest {
    good(text).config.endpoints.remove(0).ra.attest.expect("attest")
}

fn verify_of(text: &str) -> Verify {
    good(text).config.endpoints.remove(0).ra.verify.expect("verify")
}

const AA: &str = "aa_addr = \"unix:///run/aa.sock\"";
const ASR: &str = "asr_addr = \"http://127.0.0.1:8006\"";
const AS: &str = "as_addr = \"http://127.0.0.1:8080/\"";

#[test]
fn the_api_server_is_this_hosts_unless_the_operator_says_otherwise() {
    for addr in ["http://127.0.0.1:8006", "http://127.0.0.1:8006/", "http://[::1]:8006", "http://localhost:8006"] {
        for provider in ["", "provider = \"asr\"\n"] {
            let found = attest_of(&attest(&format!("{provider}asr_addr = \"{addr}\"")));
            assert!(matches!(found.provider, AttestProvider::Asr { .. }), "{addr}");
        }
    }
    let at = "egress[0].attest.asr_addr";
    only_error(&attest("asr_addr = \"http://192.0.2.5:8006\""), at, "asr-insecure");
    let off_host = "asr_addr = \"http://192.0.2.5:8006\"\nasr_insecure = true";
    assert!(warned(&good(&attest(off_host)), "asr-insecure"));
    assert!(warned(&good(&attest(&format!("{ASR}\nasr_insecure = true"))), "no-effect"));
    for bad in ["", "127.0.0.1:8006", "https://127.0.0.1/", "http://127.0.0.1/aa", "http://127.0.0.1/?x", "unix:///a"] {
        only_error(&attest(&format!("asr_addr = \"{bad}\"")), at, "bad-url");
    }
    let secret = only_error(&attest("asr_addr = \"http://me:hunter2@127.0.0.1/\""), at, "bad-url");
    assert!(!secret.to_string().contains("hunter2"), "{secret}");
    only_error(&attest("provider = \"asr\""), "egress[0].attest", "missing");
}

#[test]
fn keys_of_two_providers_contradict_each_other() {
    let path = |key: &str| format!("egress[0].attest.{key}");
    only_error(&attest(&format!("{AA}\n{ASR}")), &path("asr_addr"), "contradiction");
    only_error(&attest(&format!("provider = \"asr\"\n{AA}\n{ASR}")), &path("aa_addr"), "contradiction");
    only_error(&attest(&format!("{AA}\nasr_insecure = true")), &path("asr_insecure"), "contradiction");
    for key in [AA, ASR, "additional_evidence = true"] {
        let name = key.split(' ').next().unwrap_or_default();
        only_error(&attest(&format!("provider = \"sample\"\n{key}")), &path(name), "contradiction");
    }
}

#[test]
fn device_evidence_is_off_unless_asked_for() {
    assert!(!attest_of(&attest(AA)).additional_evidence);
    assert!(attest_of(&attest(&format!("{AA}\nadditional_evidence = true"))).additional_evidence);
    assert!(attest_of(&attest(&format!("{ASR}\nadditional_evidence = true"))).additional_evidence);
    only_error(
        &attest(&format!("{AA}\nadditional_evidence = \"yes\"")),
        "egress[0].attest.additional_evidence",
        "wrong-type",
    );
}

#[test]
fn an_attester_with_a_passport_names_who_makes_it() {
    assert_eq!(attest_of(&attest(AA)).passport, None);
    let text = format!("{AA}\nmodel = \"passport\"\n{AS}\npolicy_ids = [\"p\"]\nas_timeout = \"3s\"");
    let passport = attest_of(&attest(&text)).passport.expect("passport");
    assert_eq!(
        (passport.service.addrs[0].as_str(), &passport.policy_ids[..]),
        ("http://127.0.0.1:8080/", &["p".into()][..])
    );
    assert_eq!(passport.service.timeout, std::time::Duration::from_secs(3));
    let default = attest_of(&attest(&format!("provider = \"sample\"\nmodel = \"passport\"\n{AS}"))).passport;
    assert_eq!(default.expect("passport").policy_ids, ["default"]);

    only_error(&attest(&format!("{AA}\nmodel = \"passport\"")), "egress[0].attest", "missing");
    only_error(&attest(&format!("{AA}\nmodel = \"pasport\"")), "egress[0].attest.model", "unknown-value");
    let off_host = format!("{AA}\nmodel = \"passport\"\nas_addr = \"http://192.0.2.5/\"");
    only_error(&attest(&off_host), "egress[0].attest.as_addr", "as-insecure");
    let ca = "as_ca = \"/etc/tng/ca.pem\"";
    for key in
        [AS, ca, "policy_ids = [\"p\"]", "as_timeout = \"3s\"", "as_type = \"rest\"", "as_headers = { a = \"b\" }"]
    {
        let name = key.split(' ').next().unwrap_or_default();
        only_error(&attest(&format!("{AA}\n{key}")), &format!("egress[0].attest.{name}"), "contradiction");
    }
}

#[test]
fn a_verifier_of_passports_needs_a_service_or_anchors() {
    assert_eq!(verify_of(&verify(AS)).model, Model::BackgroundCheck);
    let with = verify_of(&verify(&format!("{AS}\nmodel = \"passport\"")));
    assert!(matches!((&with.provider, with.model), (VerifyProvider::As(_), Model::Passport)));
    let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/coco/as-ca.pem");
    let anchors = format!("model = \"passport\"\ntrusted_certs = [\"{ca}\"]");
    let alone = verify_of(&verify(&anchors));
    assert!(
        matches!((&alone.provider, alone.model), (VerifyProvider::Anchors(trusted), Model::Passport) if trusted.certs.len() == 1)
    );

    let pin = format!("model = \"passport\"\ntrusted_keys = [\"sha256:{}\"]", "ab".repeat(32));
    let pinned = verify_of(&verify(&pin)).provider;
    assert!(matches!(pinned, VerifyProvider::Anchors(trusted) if trusted.keys.len() == 1));

    only_error(&verify("model = \"passport\""), "ingress[0].verify", "missing");
    let url = "model = \"passport\"\ntrusted_jwks = \"https://keys.example/jwks\"";
    only_error(&verify(url), "ingress[0].verify.trusted_jwks", "contradiction");
    only_error(&verify(&format!("{anchors}\nas_ca = \"{ca}\"")), "ingress[0].verify.as_ca", "contradiction");
    only_error(&verify(&format!("trusted_certs = [\"{ca}\"]")), "ingress[0].verify", "missing");
    only_error(&verify(&format!("{anchors}\nas_timeout = \"3s\"")), "ingress[0].verify.as_timeout", "contradiction");
    only_error(
        &verify("model = \"passport\"\nprovider = \"sample\"\nallow_sample = true"),
        "ingress[0].verify.model",
        "contradiction",
    );
    let builtin = "model = \"passport\"\nprovider = \"builtin\"";
    only_error(&verify(builtin), "ingress[0].verify.model", "contradiction");
}

#[test]
fn the_grace_is_none_unless_written_and_has_the_bounds_of_a_verdict() {
    let grace = |lines: &str| good(&verify(&format!("{AS}\n{lines}"))).config.endpoints.remove(0).ra.grace;
    assert!(grace("").is_zero());
    for (text, seconds) in [("0s", 0), ("45s", 45), ("10m", 600), ("24h", 86_400)] {
        assert_eq!(grace(&format!("grace = \"{text}\"")).as_secs(), seconds, "{text}");
    }
    let at = "ingress[0].verify.grace";
    let error = only_error(&verify(&format!("{AS}\ngrace = \"25h\"")), at, "out-of-range");
    assert_eq!(error.hint.as_deref(), Some("from 0s to 24h"));
    only_error(&verify(&format!("{AS}\ngrace = \"10\"")), at, "bad-duration");
}

#[test]
fn every_file_that_an_endpoint_names_is_known() {
    let fixture = |name: &str| format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    let (ca, quotes) = (fixture("coco/as-ca.pem"), fixture("quotes/tdx_quote_collateral.json"));
    let files = |text: &str| good(text).config.endpoints.remove(0).files();
    let of = |names: &[&String]| names.iter().map(std::path::PathBuf::from).collect::<Vec<_>>();
    let service = format!("as_addr = \"https://as.example/\"\nas_ca = \"{ca}\"\ntrusted_certs = [\"{ca}\"]");
    assert_eq!(files(&verify(&service)), of(&[&ca, &ca]));
    let builtin = format!("provider = \"builtin\"\ncollateral = [\"{quotes}\"]\namd_certs = [\"{ca}\"]");
    assert_eq!(files(&verify(&builtin)), of(&[&quotes, &ca]));
    assert_eq!(files(&verify(&format!("model = \"passport\"\ntrusted_certs = [\"{ca}\"]"))), of(&[&ca]));
    let passport = format!(
        "{AA}\nmodel = \"passport\"\nas_addr = \"https://as.example/\"\nas_ca = \"{ca}\"\npolicy_ids = [\"a\"]"
    );
    assert_eq!(files(&attest(&passport)), of(&[&ca]));
    assert_eq!(files(&verify("provider = \"sample\"\nallow_sample = true")), of(&[]));
}
