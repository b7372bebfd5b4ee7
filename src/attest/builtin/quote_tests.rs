use super::*;

/// Within the collateral of each fixture, as its file says.
const TDX_TIME: u64 = 1_750_328_163 + 5 * 86_400;

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/quotes/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn collateral(name: &str) -> Collateral {
    Collateral::from_json(&fixture(&format!("{name}_collateral.json"))).unwrap()
}

fn check(raw: &[u8], collateral: &Collateral) -> Result<QuoteClaims, BuiltinError> {
    verify(raw, collateral, collateral.from + 86_400, &pinned_root())
}

fn slug(raw: &[u8], collateral: &Collateral) -> &'static str {
    check(raw, collateral).map_or_else(|e| e.reason(), |_| "ok")
}

#[test]
fn real_quotes_verify_at_the_time_of_their_collateral() {
    for (name, tee, status) in [
        ("tdx_quote", "tdx", "UpToDate"),
        ("tdx_quote_td15ex", "tdx", "UpToDate"),
        ("sgx_quote", "sgx", "ConfigurationAndSWHardeningNeeded"),
    ] {
        let (raw, collateral) = (fixture(name), collateral(name));
        let platform = platform(tee, &raw, &pinned_root()).unwrap();
        assert_eq!(platform.fmspc, collateral.fmspc, "{name}");
        let claims = check(&raw, &collateral).unwrap();
        assert_eq!(claims.tcb.status.to_string(), status, "{name}");
        let found = finding(tee, &platform, &claims).unwrap();
        assert!(!found.debug && found.not_after <= collateral.until, "{name}");
        let vocabulary = crate::config::VOCABULARY.iter().find(|(t, _)| *t == tee).unwrap().1;
        assert!(vocabulary.iter().all(|(field, _)| found.seen.contains_key(field)), "{name}: a field without value");
        assert_eq!(found.seen.len(), vocabulary.len());
    }
}

#[test]
fn the_fields_of_a_real_quote_are_where_intel_puts_them() {
    let raw = fixture("tdx_quote");
    let claims = verify(&raw, &collateral("tdx_quote"), TDX_TIME, &pinned_root()).unwrap();
    let found = finding("tdx", &platform("tdx", &raw, &pinned_root()).unwrap(), &claims).unwrap();
    // Header of 48 bytes; offsets of the TD report body by the quoting library's documentation.
    let at = |offset: usize, len: usize| Seen::Bytes(raw[48 + offset..48 + offset + len].to_vec());
    for (field, offset, len) in [
        ("mr_seam", 16, 48),
        ("mr_signer_seam", 64, 48),
        ("td_attributes", 120, 8),
        ("xfam", 128, 8),
        ("mr_td", 136, 48),
        ("mr_config_id", 184, 48),
        ("mr_owner", 232, 48),
        ("mr_owner_config", 280, 48),
        ("rtmr0", 328, 48),
        ("rtmr1", 376, 48),
        ("rtmr2", 424, 48),
        ("rtmr3", 472, 48),
    ] {
        assert_eq!(found.seen[field], at(offset, len), "{field}");
    }
    assert_eq!(found.report_data, raw[48 + 520..48 + 584]);
}

#[test]
fn a_quote_without_its_platforms_certificate_has_a_reason_of_its_own() {
    let raw = fixture("tdx_quote");
    // Signature and key, head of type 6, report and signature of the quoting enclave, its data.
    let data = 636 + 128 + 6 + 384 + 64;
    let at = data + 2 + usize::from(u16::from_le_bytes([raw[data], raw[data + 1]]));
    assert_eq!(raw[at..at + 2], [5, 0]);
    for kind in [1, 2, 3, 7, 0xff] {
        let mut other = raw.clone();
        other[at] = kind;
        let error = platform("tdx", &other, &pinned_root()).unwrap_err();
        assert_eq!(error, BuiltinError::QuoteWithoutCertificate(kind.into()));
        assert_eq!(error.reason(), "quote-no-certificate");
    }
}

#[test]
fn every_changed_part_of_a_real_quote_has_its_reason() {
    let (raw, collateral) = (fixture("tdx_quote"), collateral("tdx_quote"));
    let flipped = |at: usize| {
        let mut raw = raw.clone();
        raw[at] ^= 1;
        slug(&raw, &collateral)
    };
    assert_eq!(slug(&raw, &collateral), "ok");
    for (what, at, expected) in [
        ("version", 0, "quote-malformed"),
        ("key type", 2, "quote-malformed"),
        ("vendor", 12, "quote-malformed"),
        ("user data", 30, "quote-signature"),
        ("debug bit, not signed", 48 + 120, "quote-signature"),
        ("mr_td", 48 + 136, "quote-signature"),
        ("report data", 48 + 520, "quote-signature"),
        ("signature", 636 + 10, "quote-signature"),
        ("attestation key", 636 + 64 + 10, "quote-signature"),
        ("quoting enclave's report", 636 + 128 + 6 + 20, "quote-signature"),
        ("its signature", 636 + 128 + 6 + 384 + 5, "quote-signature"),
    ] {
        assert_eq!(flipped(at), expected, "{what}");
    }
    // The first certificate begins after its armour; a changed one signs nothing any more.
    let pem = raw.windows(11).position(|w| w == b"-----BEGIN ").unwrap();
    let mut broken = raw.clone();
    broken[pem + 400] = if broken[pem + 400] == b'A' { b'B' } else { b'A' };
    assert_eq!(slug(&broken, &collateral), "quote-chain");
    for cut in [0, 10, 48, 600, 640, 1100] {
        assert_eq!(slug(&raw[..cut], &collateral), "quote-malformed", "{cut}");
    }
}

#[test]
fn a_changed_quote_of_an_enclave_has_its_reason() {
    let (raw, collateral) = (fixture("sgx_quote"), collateral("sgx_quote"));
    for at in [48 + 64, 48 + 48, 48 + 320] {
        let mut raw = raw.clone();
        raw[at] ^= 2;
        assert_eq!(slug(&raw, &collateral), "quote-signature", "{at}");
    }
}

#[test]
fn collateral_of_another_time_platform_or_signer_is_refused() {
    let (raw, good) = (fixture("tdx_quote"), collateral("tdx_quote"));
    let at = |now| verify(&raw, &good, now, &pinned_root()).map(|_| ());
    assert_eq!(at(good.from), Ok(()));
    assert_eq!(at(good.until - 1), Ok(()));
    assert_eq!(at(good.from - 1), Err(BuiltinError::CollateralNotYetValid(good.from)));
    assert_eq!(at(good.until), Err(BuiltinError::CollateralExpired(good.until)));

    let change = |edit: fn(&mut dcap_qvl::QuoteCollateralV3)| {
        let mut inner = good.inner.clone();
        edit(&mut inner);
        Collateral::new(inner).map_or("unreadable", |c| slug(&raw, &c))
    };
    // A status that Intel did not give.
    let swap = |c: &mut dcap_qvl::QuoteCollateralV3| c.tcb_info = c.tcb_info.replace("OutOfDate", "UpToDate");
    assert_eq!(change(swap), "collateral-invalid");
    assert_eq!(change(|c| c.tcb_info_signature[5] ^= 1), "collateral-invalid");
    assert_eq!(change(|c| c.qe_identity_signature[5] ^= 1), "collateral-invalid");
    assert_eq!(change(|c| c.root_ca_crl[60] ^= 1), "collateral-invalid");
    assert_eq!(change(|c| c.pck_crl.truncate(20)), "unreadable");
    assert_eq!(change(|c| c.tcb_info.truncate(20)), "unreadable");
    let other = super::super::test_pki::Intel::new(super::super::test_pki::NOW).root_der();
    assert_ne!(verify(&raw, &good, good.from, &other).map(|_| ()), Ok(()));
}

#[test]
fn a_platform_that_intel_calls_old_is_refused() {
    assert_eq!(slug(&fixture("tdx_quote_outdated"), &collateral("tdx_quote_outdated")), "tcb-out-of-date");
    let claims = check(&fixture("sgx_quote"), &collateral("sgx_quote")).unwrap();
    let error = status_error(&claims);
    assert_eq!(error.reason(), "tcb-out-of-date");
    assert!(error.to_string().contains("INTEL-SA-00289"), "{error}");
}

#[test]
fn evidence_names_the_tee_of_its_quote() {
    let json = |raw: &[u8]| format!(r#"{{"quote":"{}"}}"#, BASE64_STANDARD.encode(raw));
    // Of a maker that is not Intel, and without a certificate.
    let intel = super::super::test_pki::Intel::new(super::super::test_pki::NOW);
    let forged = intel.quote(&Default::default());
    assert_eq!(platform("tdx", &forged, &pinned_root()).unwrap_err().reason(), "quote-chain");
    assert!(platform("tdx", &forged, &intel.root_der()).is_ok());
    assert!(!leads_to(&[], &pinned_root()));
    let raw = raw_quote(json(&fixture("sgx_quote")).as_bytes()).unwrap();
    assert_eq!(platform("tdx", &raw, &pinned_root()).unwrap_err().reason(), "quote-malformed");
    assert!(platform("sgx", &raw, &pinned_root()).is_ok());
    for bad in ["", "{}", r#"{"quote":1}"#, r#"{"quote":"!"}"#] {
        assert_eq!(raw_quote(bad.as_bytes()).unwrap_err().reason(), "quote-malformed", "{bad}");
    }
    let long = json(&vec![0; MAX_QUOTE + 16]);
    assert_eq!(raw_quote(long.as_bytes()).unwrap_err().reason(), "quote-malformed");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]

        #[test]
        fn no_header_panics(bytes in proptest::collection::vec(any::<u8>(), 0..160), tdx in any::<bool>()) {
            let mut raw = vec![4, 0, 2, 0, if tdx { 0x81 } else { 0 }, 0, 0, 0];
            if !tdx { raw[0] = 3; }
            raw.extend(&bytes);
            let _ = platform("tdx", &raw, &[]);
            let _ = platform("sgx", &bytes, &[]);
            let _ = raw_quote(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        // Lengths and certificate types are not signed: a change of theirs may be without effect, never with one.
        #[test]
        fn no_changed_quote_panics_or_says_something_else(at in 0usize..5006, value in any::<u8>(), cut in any::<bool>()) {
            let (mut raw, collateral) = (fixture("tdx_quote"), collateral("tdx_quote"));
            let said = format!("{:?}", check(&raw, &collateral).unwrap().report);
            raw[at] = value;
            if cut { raw.truncate(at); }
            if let Ok(claims) = check(&raw, &collateral) {
                prop_assert_eq!(format!("{:?}", claims.report), said);
            }
        }
    }
}
