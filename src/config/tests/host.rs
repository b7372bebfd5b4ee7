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
fn reference_values_of_a_tpm_pin_its_key_and_pcrs() {
    let (ak, a, b) = ("ab".repeat(32), "01".repeat(32), "02".repeat(32));
    let text = reference(&format!("tee = \"tpm\"\nak = \"sha256:{ak}\"\npcr0 = \"{a}\"\npcr7 = [\"{a}\", \"{b}\"]"));
    let loaded = good(&text);
    let VerifyProvider::Builtin(builtin) = &loaded.config.endpoints[0].ra.verify.as_ref().unwrap().provider else {
        panic!("{loaded:?}")
    };
    let accepts = |field: &str, byte: u8| {
        builtin.references[0].values[field].iter().any(|w| w.accepts(&Seen::Bytes(vec![byte; 32])))
    };
    assert!(accepts("ak", 0xab) && accepts("pcr7", 2) && accepts("pcr0", 1) && !accepts("pcr0", 2));
    assert!(!warned(&loaded, "no-measurement"));
    assert!(warned(&good(&reference(&format!("tee = \"tpm\"\nak = \"sha256:{ak}\""))), "no-measurement"));

    let at = "ingress[0].verify.reference[0]";
    let key = format!("tee = \"tpm\"\nak = \"sha256:{ak}\"\n");
    for (lines, path, reason) in [
        (format!("tee = \"tpm\"\npcr0 = \"{a}\""), "", "missing"),
        (format!("tee = \"tpm\"\nak = \"sha512:{ak}\""), ".ak[0]", "bad-reference"),
        (format!("tee = \"tpm\"\nak = \"sha256:{}\"", &ak[1..]), ".ak", "bad-reference"),
        (format!("{key}pcr24 = \"{a}\""), ".pcr24", "unknown-key"),
        (format!("{key}pcr7 = \"sha256:{a}\""), ".pcr7", "bad-reference"),
        (format!("{key}pcr7 = [\"{a}\", \"\u{e9}\"]"), ".pcr7[1]", "bad-reference"),
    ] {
        only_error(&reference(&lines), &format!("{at}{}", path.trim_end_matches("[0]")), reason);
    }
}
