use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};

use super::*;
use crate::config::from_hex;
use crate::os::clock::from_unix;

/// 2026-01-01, within every certificate here.
const NOW: u64 = 1_767_225_600;

fn now() -> SystemTime {
    from_unix(NOW).unwrap()
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/quotes/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn milan() -> Vec<u8> {
    from_hex(String::from_utf8(fixture("report_milan.hex")).unwrap().trim()).unwrap()
}

fn endorse_milan(bytes: &[u8]) -> Result<Endorsed, BuiltinError> {
    endorse(&Report::from_bytes(bytes).unwrap(), &[fixture("vcek_milan.der")], &pinned(), now())
}

#[test]
fn the_roots_are_those_of_the_readme() {
    let readme = include_str!("README.md");
    let roots = pinned();
    assert_eq!(roots.len(), 3);
    let amd = roots.iter().flat_map(|r| [&r.ark, &r.ask]);
    for der in amd.chain([&crate::attest::builtin::quote::pinned_root()]) {
        let hex: Vec<String> = digest(&SHA256, der).as_ref().iter().map(|b| format!("{b:02X}")).collect();
        assert!(readme.contains(&hex.join(":")), "{}", hex.join(":"));
    }
    for root in &roots {
        let (ark, ask) = (parse(&root.ark).unwrap(), parse(&root.ask).unwrap());
        assert!(issued(&ark, &ark) && issued(&ark, &ask) && is_ca(&ark) && is_ca(&ask), "{}", root.product);
        assert!(ark.subject().to_string().contains(&format!("ARK-{}", root.product)));
    }
}

#[test]
fn a_real_report_verifies_with_its_chips_certificate() {
    let endorsed = endorse_milan(&milan()).unwrap();
    assert_eq!(endorsed.product, "Milan");
    assert_eq!(endorsed.tcb, Tcb { fmc: None, bootloader: 3, tee: 0, snp: 8, microcode: 115 });
    // The chip's certificate ends first, in April 2030.
    assert_eq!(endorsed.not_after, 1_901_474_623);
}

#[test]
fn every_changed_part_of_a_real_report_is_found() {
    for (at, expected) in [
        (0x50, BuiltinError::ReportSignature),
        (0x90, BuiltinError::ReportSignature),
        (0x0a, BuiltinError::ReportSignature),
        (0x29f, BuiltinError::ReportSignature),
        (0x2a0, BuiltinError::ReportSignature),
        (0x2e8, BuiltinError::ReportSignature),
        (0x180, BuiltinError::Endorsement("firmware version")),
        (0x187, BuiltinError::Endorsement("firmware version")),
        (0x1a0, BuiltinError::Endorsement("chip")),
    ] {
        let mut bytes = milan();
        bytes[at] ^= 1;
        assert_eq!(endorse_milan(&bytes), Err(expected), "{at:#x}");
    }
}

#[test]
fn a_chain_to_another_root_or_of_another_time_is_refused() {
    let report = Report::from_bytes(&milan()).unwrap();
    let vcek = fixture("vcek_milan.der");
    let others: Vec<Root> = pinned().into_iter().filter(|r| r.product != "Milan").collect();
    assert!(matches!(endorse(&report, std::slice::from_ref(&vcek), &others, now()), Err(BuiltinError::ReportChain(_))));
    assert!(matches!(endorse(&report, &[], &pinned(), now()), Err(BuiltinError::ReportChain(_))));
    let (over, early) = (BuiltinError::ReportChainExpired("VCEK"), BuiltinError::ReportChainNotYetValid("VCEK"));
    for (at, refused) in [(1_600_000_000, early), (1_901_474_624, over.clone()), (4_000_000_000, over)] {
        let outcome = endorse(&report, std::slice::from_ref(&vcek), &pinned(), from_unix(at).unwrap());
        assert_eq!(outcome, Err(refused));
    }
    for at in [40, 600, 1300] {
        let mut broken = vcek.clone();
        broken[at] ^= 1;
        let outcome = endorse(&report, &[broken], &pinned(), now());
        assert!(matches!(outcome, Err(BuiltinError::ReportChain(_))), "{at}: {outcome:?}");
    }
    let many = vec![vcek; MAX_CERTIFICATES + 1];
    assert_eq!(endorse(&report, &many, &pinned(), now()), Err(BuiltinError::ReportChain("too many certificates")));
}

#[test]
fn a_chip_of_the_newest_generation_chains_to_its_root() {
    let der = fixture("vcek_turin.der");
    let leaf = parse(&der).unwrap();
    let (product, _) = chain(&leaf, &[], &pinned(), now()).unwrap();
    assert_eq!(product, "Turin");
    assert!(tcb(&leaf, true).unwrap().fmc.is_some());
    let id = extension(&leaf, HWID).unwrap();
    let mut chip = [0; 64];
    chip[..8].copy_from_slice(&id[id.len() - 8..]);
    assert!(same_chip(&leaf, &chip));
    chip[8] = 1;
    assert!(!same_chip(&leaf, &chip), "its identity has 8 bytes");
}

#[test]
fn security_versions_are_read_as_der_has_them() {
    assert_eq!(small(&[2, 1, 115]), Some(115));
    assert_eq!(small(&[2, 2, 0, 0xdb]), Some(0xdb));
    for bad in [&[2, 1, 0x80][..], &[2, 2, 0, 1], &[2, 2, 1, 0], &[2, 0], &[], &[1, 1, 1]] {
        assert_eq!(small(bad), None, "{bad:?}");
    }
}
