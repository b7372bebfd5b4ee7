use base64::prelude::{BASE64_STANDARD, Engine};
use proptest::prelude::*;
use rcgen::PublicKeyData;

use super::*;

/// Evidence of CoCo's own agent over a TPM, as it was recorded.
fn recorded(member: &str) -> Vec<u8> {
    let text = include_str!("../../../tests/fixtures/coco/grpc-tpm-affirming.evidence.json");
    let json: serde_json::Value = serde_json::from_str(text).unwrap();
    BASE64_STANDARD.decode(json["tpm_quote"][member].as_str().unwrap()).unwrap()
}

#[test]
fn a_recorded_quote_is_read() {
    let quoted = Quoted::parse(&recorded("message")).unwrap();
    assert_eq!(quoted.selection, PcrSelection::ALL);
    assert_eq!((quoted.extra_data.len(), quoted.pcr_digest.len(), quoted.resets), (32, 32, 1));
    let TpmSignature::RsaSsa(signature) = TpmSignature::parse(&recorded("signature")).unwrap() else { panic!() };
    assert_eq!(signature.len(), 256);
}

#[test]
fn what_is_no_quote_says_so() {
    let good = recorded("message");
    let with = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        Quoted::parse(&bad)
    };
    assert_eq!(with(0, 0), Err(TpmFormatError::Magic(0x0054_4347)));
    // TPM_ST_ATTEST_CERTIFY.
    assert_eq!(with(5, 0x17), Err(TpmFormatError::NotQuote(0x8017)));
    for length in 0..good.len() {
        assert!(Quoted::parse(&good[..length]).is_err(), "{length}");
    }
    assert_eq!(Quoted::parse(&[&good[..], &[0]].concat()), Err(TpmFormatError::Trailing));
}

#[test]
fn selections_are_written_and_read_alike() {
    let chosen = PcrSelection::of([0, 7, 8, 23]).unwrap();
    let mut bytes = Vec::new();
    chosen.put(&mut bytes);
    assert_eq!(bytes, [0, 0, 0, 1, 0, 0x0b, 3, 0x81, 0x01, 0x80]);
    assert_eq!(PcrSelection::read(&mut Reader(&bytes)), Ok(Some(chosen)));
    assert_eq!(chosen.iter().collect::<Vec<_>>(), [0, 7, 8, 23]);
    assert_eq!((PcrSelection::of([24]), PcrSelection::of([])), (None, None));
    // An empty SHA-1 bank beside it says nothing; a selected one would be hashed before or after ours.
    let read = |bytes: &[u8]| PcrSelection::read(&mut Reader(bytes));
    assert_eq!(read(&[0, 0, 0, 2, 0, 4, 3, 0, 0, 0, 0, 0x0b, 3, 1, 0, 0]), Ok(PcrSelection::of([0])));
    assert!(read(&[0, 0, 0, 2, 0, 4, 3, 1, 0, 0, 0, 0x0b, 3, 1, 0, 0]).is_err());
    assert!(read(&[0, 0, 0, 2, 0, 0x0b, 3, 1, 0, 0, 0, 0x0b, 3, 1, 0, 0]).is_err());
    assert!(read(&[0, 0, 0, 1, 0, 0x0b, 4, 0, 0, 0, 1]).is_err());
    assert!(read(&[0xff, 0xff, 0xff, 0xff]).is_err());
}

#[test]
fn keys_become_subject_public_key_infos() {
    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
    use aws_lc_rs::signature::KeyPair;
    let key = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let public = key.public_key();
    let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = public.as_der().unwrap();
    let modulus = public.modulus().big_endian_without_leading_zero().to_vec();
    assert_eq!(rsa_spki(&modulus, 65537), der.as_ref());

    let mut area = template(KeyAlgorithm::Rsa2048);
    area.truncate(area.len() - 2);
    put_sized(&mut area, &modulus);
    let parsed = TpmPublic::parse(&area).unwrap();
    assert!(parsed.spki == der.as_ref() && parsed.is_attestation_key());
    // A key that also decrypts, or that signs anything, vouches for nothing.
    for (byte, bit) in [(5, 1u8), (5, 2), (5, 4), (7, 2)] {
        let mut unfit = area.clone();
        unfit[byte] ^= bit;
        assert!(!TpmPublic::parse(&unfit).unwrap().is_attestation_key(), "{byte}/{bit}");
    }

    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let point = key.public_key_raw();
    let mut area = template(KeyAlgorithm::EccP256);
    area.truncate(area.len() - 4);
    put_sized(&mut area, &point[1..33]);
    put_sized(&mut area, &point[33..]);
    let parsed = TpmPublic::parse(&area).unwrap();
    assert_eq!(parsed.spki, key.subject_public_key_info());
    assert!(TpmPublic::parse(&area[..area.len() - 1]).is_err());
}

#[test]
fn short_numbers_of_a_signature_are_padded_and_long_ones_refused() {
    let mut bytes = vec![0, 0x18, 0, 0x0b];
    put_sized(&mut bytes, &[1]);
    put_sized(&mut bytes, &[2; 32]);
    let TpmSignature::EcdsaP256(both) = TpmSignature::parse(&bytes).unwrap() else { panic!() };
    assert_eq!((both[30], both[31], both[32]), (0, 1, 2));
    let mut long = vec![0, 0x18, 0, 0x0b];
    put_sized(&mut long, &[0; 33]);
    put_sized(&mut long, &[2; 32]);
    assert!(TpmSignature::parse(&long).is_err());
    // RSAPSS, and RSASSA over SHA-1.
    assert!(TpmSignature::parse(&[0, 0x16, 0, 0x0b, 0, 0]).is_err());
    assert!(TpmSignature::parse(&[0, 0x14, 0, 4, 0, 0]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100_000))]

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = (Quoted::parse(&bytes), TpmSignature::parse(&bytes), TpmPublic::parse(&bytes));
        let _ = PcrSelection::read(&mut Reader(&bytes));
    }

    #[test]
    fn no_change_of_a_quote_panics_or_reads_as_longer_than_it_is(at in 0usize..200, byte: u8, cut in 0usize..200) {
        let good: &[u8] = &RECORDED;
        let mut bad = good.to_vec();
        let index = at % good.len();
        bad[index] = byte;
        bad.truncate(good.len() - cut.saturating_sub(100).min(good.len()));
        if let Ok(quoted) = Quoted::parse(&bad) {
            prop_assert!(quoted.extra_data.len() + quoted.pcr_digest.len() < bad.len());
            prop_assert!((1..=24).contains(&quoted.selection.count()));
        }
    }
}

static RECORDED: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| recorded("message"));
