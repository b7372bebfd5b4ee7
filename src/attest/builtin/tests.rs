//! The verifier as a whole, over chips of the tests' own making: accepted, and refused for each reason.

use std::time::Duration;

use super::test_pki::{Amd, Guest, Intel, NOW, Td, at};
use super::*;
use crate::config::{DEFAULT_INGRESS_MARK, Wanted};

struct World {
    intel: Intel,
    amd: Amd,
    dir: tempfile::TempDir,
}

fn reference(tee: &'static str, field: &'static str, value: &[u8]) -> Reference {
    let wanted = Wanted::Bytes { value: value.to_vec(), mask: vec![0xff; value.len()] };
    Reference { tee, values: BTreeMap::from([(field, vec![wanted])]) }
}

impl World {
    fn new() -> Self {
        Self { intel: Intel::new(NOW), amd: Amd::new(), dir: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> Builtin {
        let mut snp = reference("snp", "measurement", &Guest::default().measurement);
        snp.values.insert("vmpl", vec![Wanted::Exactly(0)]);
        Builtin {
            references: vec![reference("tdx", "mr_td", &Td::default().mr_td), snp],
            collateral: vec![self.collateral("UpToDate")],
            pccs_addr: None,
            minimum_tcb: vec!["UpToDate".into()],
            amd_certs: vec![],
            kds_addr: None,
            allow_debug: false,
            timeout: Duration::from_secs(5),
        }
    }

    /// A collateral file that gives the platform this status.
    fn collateral(&self, status: &str) -> std::path::PathBuf {
        let path = self.dir.path().join(format!("{status}.json"));
        let collateral = self.intel.collateral(status, 1, 1);
        std::fs::write(&path, serde_json::to_vec(&collateral).unwrap()).unwrap();
        path
    }

    fn verifier_at(&self, config: &Builtin, now: u64) -> BuiltinVerifier {
        let roots = Roots { intel: self.intel.root_der(), amd: vec![self.amd.root()] };
        BuiltinVerifier::with_roots(config, DEFAULT_INGRESS_MARK, at(now), roots).unwrap()
    }

    fn tdx(&self, td: &Td) -> Evidence {
        evidence("tdx", |report_data| self.intel.evidence(&Td { report_data, ..td.clone() }))
    }

    fn snp(&self, guest: &Guest, with_certificate: bool) -> Evidence {
        evidence("snp", |report_data| self.amd.evidence(&Guest { report_data, ..guest.clone() }, with_certificate))
    }
}

fn runtime_data() -> RuntimeData {
    RuntimeData::for_key(b"the peer's key")
}

fn evidence(tee: &str, make: impl FnOnce([u8; 64]) -> Vec<u8>) -> Evidence {
    let mut report_data = [0; 64];
    report_data[..48].copy_from_slice(&runtime_data().digest());
    Evidence {
        tee: tee.into(),
        evidence: make(report_data),
        additional: None,
        runtime_data: runtime_data().canonical().into(),
    }
}

async fn slug(verifier: &BuiltinVerifier, evidence: &Evidence) -> &'static str {
    verifier.appraise(evidence, &runtime_data()).await.map_or_else(|e| e.reason(), |_| "ok")
}

#[tokio::test]
async fn a_peer_of_the_reference_values_gets_a_verdict_that_says_what_it_is() {
    let world = World::new();
    let verifier = world.verifier_at(&world.config(), NOW);
    let verdict = verifier.appraise(&world.tdx(&Td::default()), &runtime_data()).await.unwrap();
    assert_eq!((verdict.tee.as_str(), verdict.verifier.as_str(), verdict.sample), ("tdx", "builtin", false));
    assert_eq!(verdict.claims["mr_td"], "a1".repeat(48));
    assert_eq!(verdict.claims["tcb_status"], "UpToDate");
    assert_eq!(verdict.claims["fmspc"], test_pki::FMSPC);
    // It ends with the collateral.
    assert_eq!(clock::unix(verdict.expires_at), NOW + 86_400);
    assert!(verdict.trust_anchor.contains("Intel"));

    let verdict = verifier.appraise(&world.snp(&Guest::default(), true), &runtime_data()).await.unwrap();
    assert_eq!(verdict.claims["measurement"], "c3".repeat(48));
    assert_eq!((verdict.claims["chip_id"].as_str(), verdict.claims["tcb_snp"].as_str()), (&*"5a".repeat(64), "20"));
    assert_eq!(verdict.trust_anchor, "AMD ARK-Test (compiled in)");
    assert_eq!(verifier.calls(), 0);
}

#[tokio::test]
async fn the_roots_of_others_are_refused() {
    let world = World::new();
    let pinned = BuiltinVerifier::new(&world.config(), DEFAULT_INGRESS_MARK, at(NOW)).unwrap();
    assert_eq!(slug(&pinned, &world.snp(&Guest::default(), true)).await, "snp-chain");
    assert_eq!(slug(&pinned, &world.tdx(&Td::default())).await, "quote-chain");
}

#[tokio::test]
async fn evidence_of_another_key_is_refused() {
    let world = World::new();
    let verifier = world.verifier_at(&world.config(), NOW);
    for good in [world.tdx(&Td::default()), world.snp(&Guest::default(), true)] {
        assert_eq!(slug(&verifier, &good).await, "ok");
        let other = RuntimeData::for_key(b"another key");
        // Shown by another key, with its own text or with the true one.
        assert_eq!(verifier.appraise(&good, &other).await, Err(VerifyError::ReportData));
        let text = Evidence { runtime_data: other.canonical().into(), ..good.clone() };
        assert_eq!(verifier.appraise(&text, &other).await, Err(VerifyError::ReportData));
    }
    let mut tail = [0; 64];
    tail[..48].copy_from_slice(&runtime_data().digest());
    tail[63] = 1;
    let padded = evidence("tdx", |_| world.intel.evidence(&Td { report_data: tail, ..Td::default() }));
    assert_eq!(slug(&verifier, &padded).await, "evidence-report-data");
}

#[tokio::test]
async fn devices_other_than_the_tee_names_are_refused_and_its_own_count_for_nothing() {
    let (world, shown) = (World::new(), r#"{"sampledevice":{}}"#);
    let verifier = world.verifier_at(&world.config(), NOW);
    let about = runtime_data().with_devices(shown.as_bytes());
    let mut evidence = world.tdx(&Td::default());
    let mut report_data = [0; 64];
    report_data[..48].copy_from_slice(&about.digest());
    evidence.evidence = world.intel.evidence(&Td { report_data, ..Td::default() });
    evidence.runtime_data = about.canonical().into();
    for (additional, expected) in
        [(None, "evidence-devices"), (Some(r#"{"nvidia":{}}"#), "evidence-devices"), (Some(shown), "ok")]
    {
        evidence.additional = additional.map(|text| text.as_bytes().to_vec());
        assert_eq!(slug(&verifier, &evidence).await, expected);
    }
    let verdict = verifier.appraise(&evidence, &runtime_data()).await.unwrap();
    assert!(verdict.devices.is_empty());
}

#[tokio::test]
async fn a_tee_that_its_host_can_read_is_refused_unless_allowed() {
    let world = World::new();
    let strict = world.verifier_at(&world.config(), NOW);
    let lax = world.verifier_at(&Builtin { allow_debug: true, ..world.config() }, NOW);
    let td = world.tdx(&Td { attributes: 1 << 28 | 1, ..Td::default() });
    let profiled = world.tdx(&Td { attributes: 1 << 28 | 0x10, ..Td::default() });
    let guest = world.snp(&Guest { policy: 0x30000 | 1 << 19, ..Guest::default() }, true);
    for evidence in [td, profiled, guest] {
        assert_eq!(slug(&strict, &evidence).await, "tee-debug");
        assert_eq!(slug(&lax, &evidence).await, "ok");
    }
    // Attributes that nothing permits.
    for attributes in [0, 1 << 28 | 1 << 29, 1 << 28 | 1 << 40] {
        let td = world.tdx(&Td { attributes, ..Td::default() });
        assert_eq!(slug(&lax, &td).await, "tee-attributes", "{attributes:#x}");
    }
}

#[tokio::test]
async fn the_status_of_the_platform_is_the_operators_choice_but_revoked_is_never() {
    let world = World::new();
    let td = world.tdx(&Td::default());
    for (status, accepted, expected) in [
        ("UpToDate", "UpToDate", "ok"),
        ("SWHardeningNeeded", "UpToDate", "tcb-out-of-date"),
        ("SWHardeningNeeded", "SWHardeningNeeded", "ok"),
        ("OutOfDate", "UpToDate", "tcb-out-of-date"),
        ("OutOfDate", "OutOfDate", "ok"),
        ("Revoked", "Revoked", "tcb-revoked"),
    ] {
        let collateral = vec![world.collateral(status)];
        let config = Builtin { collateral, minimum_tcb: vec![accepted.into()], ..world.config() };
        assert_eq!(slug(&world.verifier_at(&config, NOW), &td).await, expected, "{status}, {accepted}");
    }
}

#[tokio::test]
async fn collateral_counts_only_while_it_holds_and_for_its_platforms() {
    let world = World::new();
    let td = world.tdx(&Td::default());
    for (now, expected) in [
        (NOW - 86_400, "ok"),
        (NOW - 86_401, "collateral-not-yet-valid"),
        (NOW + 86_399, "ok"),
        (NOW + 86_400, "collateral-expired"),
    ] {
        assert_eq!(slug(&world.verifier_at(&world.config(), now), &td).await, expected);
    }
    let none = Builtin { collateral: vec![], ..world.config() };
    assert_eq!(slug(&world.verifier_at(&none, NOW), &td).await, "collateral-missing");

    let path = world.dir.path().join("revoked.json");
    std::fs::write(&path, serde_json::to_vec(&world.intel.collateral_without_platform()).unwrap()).unwrap();
    let revoked = Builtin { collateral: vec![path], ..world.config() };
    assert_eq!(slug(&world.verifier_at(&revoked, NOW), &td).await, "quote-chain");
}

#[tokio::test]
async fn other_measurements_are_refused_and_named_so_that_they_can_be_copied() {
    let world = World::new();
    let verifier = world.verifier_at(&world.config(), NOW);
    let td = world.tdx(&Td { mr_td: [0xee; 48], ..Td::default() });
    let error = verifier.appraise(&td, &runtime_data()).await.unwrap_err();
    assert_eq!(error.reason(), "reference-mismatch");
    assert!(error.to_string().contains(&format!("mr_td = \"{}\"", "ee".repeat(48))), "{error}");

    let guest = world.snp(&Guest { vmpl: 2, ..Guest::default() }, true);
    let error = verifier.appraise(&guest, &runtime_data()).await.unwrap_err();
    assert!(error.to_string().contains("differs in vmpl; seen: vmpl = 2"), "{error}");

    let none = world.verifier_at(&Builtin { references: vec![], ..world.config() }, NOW);
    for (good, field) in [(world.tdx(&Td::default()), "mr_td"), (world.snp(&Guest::default(), true), "measurement")] {
        let error = none.appraise(&good, &runtime_data()).await.unwrap_err();
        assert_eq!(error.reason(), "reference-missing");
        assert!(error.to_string().contains(&format!("{field} = \"")), "{error}");
    }
    assert_eq!(none.trust_anchor(), "none: no reference values");
}

#[tokio::test]
async fn any_block_of_the_tee_lets_in_but_only_as_a_whole() {
    let world = World::new();
    let mut both = reference("tdx", "mr_td", &Td::default().mr_td);
    both.values.extend(reference("tdx", "rtmr0", &[0xb1; 48]).values);
    let wrong = Builtin { references: vec![both.clone()], ..world.config() };
    let td = world.tdx(&Td::default());
    assert_eq!(slug(&world.verifier_at(&wrong, NOW), &td).await, "reference-mismatch");
    let one = Builtin { references: vec![both, reference("tdx", "rtmr0", &[0xb0; 48])], ..world.config() };
    assert_eq!(slug(&world.verifier_at(&one, NOW), &td).await, "ok");
}

#[tokio::test]
async fn firmware_below_the_reference_is_out_of_date() {
    let world = World::new();
    let guest = world.snp(&Guest::default(), true);
    for (least, expected) in [(20, "ok"), (21, "tcb-out-of-date")] {
        let mut config = world.config();
        config.references[1].values.insert("tcb_snp", vec![Wanted::AtLeast(least)]);
        let outcome = world.verifier_at(&config, NOW).appraise(&guest, &runtime_data()).await;
        assert_eq!(outcome.as_ref().map_or_else(|e| e.reason(), |_| "ok"), expected);
        if let Err(error) = outcome {
            assert!(error.to_string().contains("tcb_snp = 20"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_tee_that_is_not_appraised_here_is_told_so() {
    let world = World::new();
    let verifier = world.verifier_at(&world.config(), NOW);
    for (tee, expected) in [("sample", "tee-unsupported"), ("cca", "tee-unsupported"), ("sgx", "quote-malformed")] {
        let evidence = Evidence { tee: tee.into(), ..world.tdx(&Td::default()) };
        assert_eq!(slug(&verifier, &evidence).await, expected);
    }
    for tee in ["tdx", "sgx", "snp"] {
        let evidence = Evidence { tee: tee.into(), evidence: b"{".to_vec(), ..world.tdx(&Td::default()) };
        assert!(slug(&verifier, &evidence).await.ends_with("-malformed"));
    }
}

#[test]
fn claims_are_bounded_and_printable() {
    let many = (0..100).map(|n| (format!("k{n:03}"), "\u{1b}[31mx\n".repeat(100)));
    let claims = bounded(many);
    assert_eq!(claims.len(), MAX_CLAIMS);
    assert!(claims.values().all(|v| v.len() <= MAX_CLAIM && v.bytes().all(|b| (32..127).contains(&b))));
}

#[test]
fn report_data_is_the_digest_and_zeros() {
    assert!(is_bound(&[1, 2, 0, 0], &[1, 2]) && is_bound(&[1, 2], &[1, 2]));
    assert!(!is_bound(&[1, 2, 0, 1], &[1, 2]) && !is_bound(&[1], &[1, 2]) && !is_bound(&[2, 1, 0], &[1, 2]));
}
