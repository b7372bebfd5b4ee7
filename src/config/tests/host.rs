//! `provider = "tsm"`, `"tpm"` and `"builtin"`.

use super::*;
use crate::attest::host::tsm::TsmSettings;
use crate::attest::host::{HostProvider, HostSource};
use crate::attest::tpm::commands::Hierarchy;
use crate::attest::tpm::quote::{AttestationKey, TpmSettings};
use crate::attest::tpm::structures::{KeyAlgorithm, PcrSelection};
use crate::attest::tpm::transport::TpmAddress;

fn attest(lines: &str) -> String {
    format!("[[egress]]\n[egress.netfilter]\ncapture = [{{ port = 1 }}]\n[egress.attest]\n{lines}\n")
}

fn provider(lines: &str) -> AttestProvider {
    good(&attest(lines)).config.endpoints[0].ra.attest.clone().unwrap().provider
}

#[test]
fn the_helper_is_the_default_and_has_its_own_settings() {
    for (name, which) in [("tsm", HostProvider::Tsm), ("tpm", HostProvider::Tpm)] {
        let helper = |socket: &str| AttestProvider::Helper { socket: socket.into(), provider: which };
        let line = format!("provider = \"{name}\"\n");
        assert_eq!(provider(&line), helper("/run/tng/evidence.sock"));
        assert_eq!(provider(&format!("{line}evidence_addr = \"unix:///run/x.sock\"")), helper("/run/x.sock"));
        let at = "egress[0].attest.evidence_addr";
        only_error(&attest(&format!("{line}evidence_addr = \"/run/x.sock\"")), at, "bad-address");
        only_error(&attest(&format!("{line}evidence_addr = 1")), at, "wrong-type");
        only_error(&attest(&format!("{line}aa_addr = \"unix:///x\"")), "egress[0].attest.aa_addr", "contradiction");
    }
    let tpm = "provider = \"tpm\"\ntpm_ak = \"rsa\"";
    let hint = only_error(&attest(tpm), "egress[0].attest.tpm_ak", "contradiction").hint.unwrap();
    assert!(hint.contains("TNG_EVIDENCE_OPTIONS"), "{hint}");
    let tsm = "provider = \"tsm\"\ntsm_root = \"/x\"";
    only_error(&attest(tsm), "egress[0].attest.tsm_root", "contradiction");
}

#[test]
fn direct_use_takes_settings() {
    let direct = |lines: &str| provider(&format!("provider = \"tpm\"\nevidence_addr = \"direct\"\n{lines}"));
    assert_eq!(direct(""), AttestProvider::Direct(HostSource::Tpm(TpmSettings::default())));
    assert_eq!(
        direct("tpm_device = \"unix:///run/swtpm\"\ntpm_ak = \"rsa\"\ntpm_hierarchy = \"owner\"\ntpm_pcrs = [0, 23]"),
        AttestProvider::Direct(HostSource::Tpm(TpmSettings {
            address: TpmAddress::Socket("/run/swtpm".into()),
            key: AttestationKey::Primary(Hierarchy::Owner, KeyAlgorithm::Rsa2048),
            pcrs: PcrSelection::of([0, 23]).unwrap(),
        }))
    );
    let root = provider("provider = \"tsm\"\nevidence_addr = \"direct\"\ntsm_root = \"/x\"");
    assert_eq!(root, AttestProvider::Direct(HostSource::Tsm(TsmSettings { root: "/x".into() })));
    for (line, key, reason) in [
        ("tpm_device = \"tpmrm0\"", "tpm_device", "bad-address"),
        ("tpm_ak = \"0x8100000\"", "tpm_ak", "unknown-value"),
        ("tpm_ak = \"ed25519\"", "tpm_ak", "unknown-value"),
        ("tpm_ak = \"0x81010002\"\ntpm_hierarchy = \"owner\"", "tpm_hierarchy", "contradiction"),
        ("tpm_hierarchy = \"platform\"", "tpm_hierarchy", "unknown-value"),
        ("tpm_pcrs = []", "tpm_pcrs", "out-of-range"),
        ("tpm_pcrs = [24]", "tpm_pcrs", "out-of-range"),
        ("tsm_root = \"/x\"", "tsm_root", "contradiction"),
    ] {
        let text = attest(&format!("provider = \"tpm\"\nevidence_addr = \"direct\"\n{line}"));
        only_error(&text, &format!("egress[0].attest.{key}"), reason);
    }
    let relative = attest("provider = \"tsm\"\nevidence_addr = \"direct\"\ntsm_root = \"x\"");
    only_error(&relative, "egress[0].attest.tsm_root", "bad-address");
    let agent = attest("aa_addr = \"unix:///run/aa.sock\"\nevidence_addr = \"direct\"");
    only_error(&agent, "egress[0].attest.evidence_addr", "contradiction");
    only_error(&attest("provider = \"sample\"\ntpm_ak = \"rsa\""), "egress[0].attest.tpm_ak", "contradiction");
}

fn verify(lines: &str) -> String {
    format!("[[ingress]]\n[ingress.netfilter]\ncapture = [{{ port = 1 }}]\n[ingress.verify]\n{lines}\n")
}

fn reference(lines: &str) -> String {
    verify(&format!("provider = \"builtin\"\n[[ingress.verify.reference]]\n{lines}"))
}

#[test]
fn reference_values_pin_a_key_and_pcrs() {
    let (ak, a, b) = ("ab".repeat(32), "01".repeat(32), "02".repeat(32));
    let text =
        reference(&format!("tee = \"tpm\"\nak = \"sha256:{ak}\"\npcrs = {{ 0 = \"{a}\", 7 = [\"{a}\", \"{b}\"] }}"));
    let verify_of = |text: &str| good(text).config.endpoints[0].ra.verify.clone().unwrap();
    let VerifyProvider::Builtin { references } = verify_of(&text).provider else { panic!() };
    let Reference::Tpm(tpm) = &references[0];
    assert_eq!((tpm.ak, &tpm.pcrs[&7]), ([0xab; 32], &vec![[1; 32], [2; 32]]));
    verify_of(&reference(&format!("tee = \"tpm\"\nak = \"sha256:{ak}\"")));

    let at = "ingress[0].verify.reference[0]";
    let good_key = format!("tee = \"tpm\"\nak = \"sha256:{ak}\"\n");
    for (lines, path, reason) in [
        (format!("ak = \"sha256:{ak}\""), String::new(), "missing"),
        ("tee = \"tpm\"".to_owned(), String::new(), "missing"),
        (format!("tee = \"tpn\"\nak = \"sha256:{ak}\""), ".tee".into(), "unknown-value"),
        (format!("tee = \"tdx\"\nak = \"sha256:{ak}\""), ".tee".into(), "not-in-this-version"),
        (format!("tee = \"tpm\"\nak = \"{ak}\""), ".ak".into(), "bad-digest"),
        (format!("tee = \"tpm\"\nak = \"sha256:{}\"", &ak[1..]), ".ak".into(), "bad-digest"),
        (format!("{good_key}pcrs = {{ 24 = \"{a}\" }}"), ".pcrs.24".into(), "out-of-range"),
        (format!("{good_key}pcrs = {{ 07 = \"{a}\" }}"), ".pcrs.07".into(), "out-of-range"),
        (format!("{good_key}pcrs = {{ 7 = \"x\" }}"), ".pcrs.7".into(), "bad-digest"),
        (format!("{good_key}pcrs = {{ 7 = [\"{a}\", \"\u{e9}\"] }}"), ".pcrs.7[1]".into(), "bad-digest"),
        (format!("{good_key}pcrs = {{ 7 = [] }}"), ".pcrs.7".into(), "empty"),
        (format!("{good_key}pcrs = {{ 7 = 1 }}"), ".pcrs.7".into(), "wrong-type"),
        (format!("{good_key}measurement = \"x\""), ".measurement".into(), "unknown-key"),
    ] {
        only_error(&reference(&lines), &format!("{at}{path}"), reason);
    }
}

#[test]
fn builtin_needs_references_and_nothing_of_a_service() {
    only_error(&verify("provider = \"builtin\""), "ingress[0].verify", "missing");
    only_error(&verify("provider = \"builtin\"\nreference = []"), "ingress[0].verify", "missing");
    let key = format!("[[ingress.verify.reference]]\ntee = \"tpm\"\nak = \"sha256:{}\"", "ab".repeat(32));
    let with_service = verify(&format!("provider = \"builtin\"\npolicy_ids = [\"x\"]\n{key}"));
    only_error(&with_service, "ingress[0].verify.policy_ids", "contradiction");
    let of_service = verify(&format!("as_addr = \"https://a.example/\"\n{key}"));
    only_error(&of_service, "ingress[0].verify.reference", "contradiction");
}
