use super::*;

const DATA: [u8; 64] = [7; 64];

/// A report in which each byte tells its place.
fn report(version: u8, family: u8) -> Vec<u8> {
    let mut report: Vec<u8> = (0..REPORT).map(|i| (i % 251) as u8).collect();
    report[..4].copy_from_slice(&[version, 0, 0, 0]);
    report[0x50..0x90].copy_from_slice(&DATA);
    report[0x188] = family;
    report
}

fn json_of(report: &[u8], table: &[u8]) -> Value {
    serde_json::from_str(&evidence(report, table, &DATA).unwrap()).unwrap()
}

fn byte(at: usize) -> u8 {
    (at % 251) as u8
}

#[test]
fn members_come_from_their_places() {
    let json = json_of(&report(5, 0x19), &[]);
    let r = &json["attestation_report"];
    assert_eq!((&r["version"], &r["cpuid_fam_id"]), (&json!(5), &json!(0x19)));
    for (name, at, length) in [
        ("family_id", 0x10, 16),
        ("measurement", 0x90, 48),
        ("host_data", 0xc0, 32),
        ("id_key_digest", 0xe0, 48),
        ("author_key_digest", 0x110, 48),
        ("report_id", 0x140, 32),
        ("report_id_ma", 0x160, 32),
        ("chip_id", 0x1a0, 64),
    ] {
        let found = r[name].as_array().unwrap();
        assert_eq!(
            (found.len(), &found[0], &found[length - 1]),
            (length, &json!(byte(at)), &json!(byte(at + length - 1)))
        );
    }
    assert_eq!(r["signature"]["s"][0], byte(0x2e8));
    assert_eq!(r["policy"], u64::from_le_bytes(std::array::from_fn(|i| byte(8 + i))));
    let tcb = |at: usize| json!({"fmc": null, "bootloader": byte(at), "tee": byte(at + 1), "snp": byte(at + 6), "microcode": byte(at + 7)});
    for (name, at) in [("current_tcb", 0x38), ("reported_tcb", 0x180), ("committed_tcb", 0x1e0), ("launch_tcb", 0x1f0)]
    {
        assert_eq!(r[name], tcb(at), "{name}");
    }
    assert_eq!(r["current"], json!({"build": byte(0x1e8), "minor": byte(0x1e9), "major": byte(0x1ea)}));
    assert!(r["launch_mit_vector"].is_u64() && json["cert_chain"].is_null());
}

#[test]
fn versions_and_cpus_differ() {
    let old = json_of(&report(2, 0), &[]);
    assert!(old["attestation_report"]["cpuid_fam_id"].is_null());
    let turin = json_of(&report(3, TURIN_FAMILY), &[]);
    let r = &turin["attestation_report"];
    assert_eq!((&r["current_tcb"]["fmc"], &r["current_tcb"]["snp"]), (&json!(byte(0x38)), &json!(byte(0x3b))));
    assert!(r["launch_mit_vector"].is_null());
    assert!(evidence(&report(1, 0), &[], &DATA).is_err());
    assert!(evidence(&report(3, 0)[..REPORT - 1], &[], &DATA).is_err());
    assert!(evidence(&report(3, 0), &[], &[8; 64]).is_err());
}

/// The host's table: a header of 24 bytes for each certificate, an empty one, the certificates.
fn table(entries: &[(u128, u32, u32)], data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (guid, offset, length) in entries {
        out.extend(guid.to_be_bytes());
        out.extend(offset.to_le_bytes());
        out.extend(length.to_le_bytes());
    }
    out.extend([0; 24]);
    out.extend(data);
    out
}

#[test]
fn certificates_are_named_and_a_lying_table_is_refused() {
    let vcek = CERTIFICATES[2].0;
    let good = table(&[(vcek, 72, 3), (1, 72, 3)], &[9, 8, 7]);
    assert_eq!(json_of(&report(3, 0), &good)["cert_chain"], json!([{"cert_type": "VCEK", "data": [9, 8, 7]}]));
    // Some hosts write a GUID in the mixed order; the verifier in process reads both, too.
    let mixed = table(&[(0x8d75da63_64e6_6445_adc5_f4b93be8accd, 72, 3), (1, 72, 3)], &[9, 8, 7]);
    assert_eq!(json_of(&report(3, 0), &mixed), json_of(&report(3, 0), &good));
    for (offset, length) in [(72, 4), (u32::MAX, 3), (72, u32::MAX)] {
        let bad = table(&[(vcek, offset, length), (1, 72, 3)], &[9, 8, 7]);
        assert!(evidence(&report(3, 0), &bad, &DATA).is_err(), "{offset} {length}");
    }
    assert!(evidence(&report(3, 0), &good[..20], &DATA).is_err());
    let many = table(&[(vcek, 0, 1); MAX_CERTIFICATES + 1], &[]);
    assert!(evidence(&report(3, 0), &many, &DATA).is_err());
    let large = table(&[(vcek, 0, MAX_CERTIFICATE as u32 + 1)], &[0; 2 * MAX_CERTIFICATE]);
    assert!(evidence(&report(3, 0), &large, &DATA).is_err());
}
