use std::collections::BTreeMap;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde_json::{Value, json};

use super::*;
use crate::attest::binding::sha384;
use crate::config::Wanted;

const RECORDED: &str = include_str!("../../../tests/fixtures/coco/grpc-tpm-affirming.evidence.json");
/// The runtime data that the recorded evidence is over.
const RUNTIME_DATA: &str = r#"{"nonce":"bm9uY2U","tng":{"spki-sha256":"7aa74a8a70e691606300dc14244244be5f85bb9db0d8aafa62295a5d6b86d844","v":1}}"#;

/// Which key and PCRs are accepted.
#[derive(Clone)]
struct Pinned {
    ak: [u8; 32],
    pcrs: BTreeMap<u8, Vec<[u8; 32]>>,
}

impl Pinned {
    fn block(&self) -> Reference {
        let exact = |value: &[u8; 32]| Wanted::Bytes { value: value.to_vec(), mask: vec![0xff; 32] };
        let pcrs = self.pcrs.iter().map(|(pcr, any)| (PCR_NAMES[usize::from(*pcr)], any.iter().map(exact).collect()));
        Reference { tee: "tpm", values: pcrs.chain([("ak", vec![exact(&self.ak)])]).collect() }
    }
}

fn pinned(evidence: &str) -> Pinned {
    let json: Value = serde_json::from_str(evidence).unwrap();
    let spki = BASE64_STANDARD.decode(json["ak_public"].as_str().unwrap()).unwrap();
    Pinned { ak: sha256([&spki[..]]), pcrs: BTreeMap::new() }
}

fn judged(evidence: &str, data: &[u8; 48], reference: &Pinned) -> &'static str {
    appraise(evidence.as_bytes(), data, &[&reference.block()]).map_or_else(|e| e.reason(), |_| "ok")
}

#[test]
fn evidence_of_cocos_agent_is_appraised() {
    let data = sha384(RUNTIME_DATA.as_bytes());
    let mut reference = pinned(RECORDED);
    let appraisal = appraise(RECORDED.as_bytes(), &data, &[&reference.block()]).unwrap();
    assert_eq!((appraisal.pcrs.len(), appraisal.pcrs[17].1), (24, [0xff; 32]));
    assert_eq!(judged(RECORDED, &sha384(b"{}"), &reference), "evidence-report-data");
    reference.pcrs.insert(17, vec![[0; 32]]);
    assert_eq!(judged(RECORDED, &data, &reference), "tpm-pcr-value");
    reference.ak[0] ^= 1;
    assert_eq!(judged(RECORDED, &data, &reference), "tpm-ak-untrusted");
}

/// Signs `message` as a key that is no TPM's, and whose owner shows these PCRs.
fn forged(message: &[u8], pcrs: &[&str]) -> String {
    let random = SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).unwrap();
    let signed = key.sign(&random, message).unwrap();
    let mut signature = vec![0, 0x18, 0, 0x0b, 0, 32];
    signature.extend(&signed.as_ref()[..32]);
    signature.extend([0, 32]);
    signature.extend(&signed.as_ref()[32..]);
    let mut spki = vec![0x30, 0x59, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
    spki.extend([6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7, 3, 0x42, 0]);
    spki.extend(key.public_key().as_ref());
    json!({
        "ak_public": BASE64_STANDARD.encode(spki),
        "tpm_quote": {
            "message": BASE64_STANDARD.encode(message),
            "pcrs": pcrs,
            "signature": BASE64_STANDARD.encode(signature),
        },
    })
    .to_string()
}

/// TPMS_ATTEST over `extra` with one PCR of value zero.
fn attest(magic: u32, kind: u16, extra: &[u8]) -> Vec<u8> {
    let mut out = magic.to_be_bytes().to_vec();
    out.extend(kind.to_be_bytes());
    out.extend([0, 0, 0, extra.len() as u8]);
    out.extend(extra);
    out.extend([0; 8 + 4 + 4 + 1 + 8]);
    out.extend([0, 0, 0, 1, 0, 0x0b, 3, 1, 0, 0, 0, 32]);
    out.extend(sha256([&[0; 32][..]]));
    out
}

#[test]
fn a_pinned_key_that_signs_something_else_than_a_quote_is_refused() {
    let (data, zero) = ([5; 48], "0".repeat(64));
    let judge = |message: Vec<u8>, pcrs: &[&str]| {
        let evidence = forged(&message, pcrs);
        judged(&evidence, &data, &pinned(&evidence))
    };
    let (magic, quote) = (0xff54_4347, 0x8018);
    let pcr = &[&*zero][..];
    assert_eq!(judge(attest(magic, quote, &data[..32]), pcr), "ok");
    assert_eq!(judge(attest(magic + 1, quote, &data[..32]), pcr), "tpm-not-quote");
    assert_eq!(judge(attest(magic, 0x8017, &data[..32]), pcr), "tpm-not-quote");
    assert_eq!(judge(attest(magic, quote, &[6; 32]), pcr), "evidence-report-data");
    // A beginning, or more, of the right data is other data.
    for extra in [&data[..31], &data[..0], &[5; 49]] {
        assert_eq!(judge(attest(magic, quote, extra), pcr), "evidence-report-data");
    }
    assert_eq!(judge(attest(magic, quote, &data), pcr), "ok");
    assert_eq!(judge(attest(magic, quote, &[&data[..], &[0; 16]].concat()), pcr), "ok");
    assert_eq!(judge(attest(magic, quote, &data[..32]), &[]), "tpm-pcr-digest");
    assert_eq!(judge(attest(magic, quote, &data[..32]), &[&zero, &zero]), "tpm-pcr-digest");
    assert_eq!(judge(attest(magic, quote, &data[..32]), &[&zero[1..]]), "tpm-evidence-malformed");
    assert_eq!(judge(attest(magic, quote, &data[..32]), &[&"\u{e9}".repeat(32)]), "tpm-evidence-malformed");
    assert_eq!(judge(Vec::new(), pcr), "tpm-evidence-malformed");
}

#[test]
fn the_first_of_several_references_that_fits_decides() {
    let data = [5; 48];
    let evidence = forged(&attest(0xff54_4347, 0x8018, &data[..32]), &[&"0".repeat(64)]);
    let fits = Pinned { pcrs: BTreeMap::from([(0, vec![[0; 32]])]), ..pinned(&evidence) };
    let other = Pinned { pcrs: BTreeMap::from([(0, vec![[1; 32]])]), ..pinned(&evidence) };
    let stranger = Pinned { ak: [0; 32], ..fits.clone() };
    let judge = |references: &[&Pinned]| {
        let blocks: Vec<_> = references.iter().map(|r| r.block()).collect();
        appraise(evidence.as_bytes(), &data, &blocks.iter().collect::<Vec<_>>()).map_or_else(|e| e.reason(), |_| "ok")
    };
    assert_eq!(judge(&[&stranger, &other, &fits]), "ok");
    // A good value of another machine's reference does not help.
    assert_eq!(judge(&[&stranger, &other]), "tpm-pcr-value");
    assert_eq!(judge(&[&stranger]), "tpm-ak-untrusted");
}

#[test]
fn garbage_is_malformed() {
    let reference = pinned(RECORDED);
    for bad in [
        "",
        "[]",
        "{\"ak_public\":1}",
        "{\"ak_public\":\"%\",\"tpm_quote\":{\"message\":\"\",\"pcrs\":[],\"signature\":\"\"}}",
    ] {
        assert_eq!(judged(bad, &[0; 48], &reference), "tpm-evidence-malformed", "{bad}");
    }
    assert_eq!(judged(&" ".repeat(MAX_EVIDENCE + 1), &[0; 48], &reference), "tpm-evidence-malformed");
}
