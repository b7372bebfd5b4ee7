//! The vectors of docs/tng-1.md: fixed inputs to exact bytes, in the document and in the code alike.

use std::collections::BTreeMap;

use rcgen::PublicKeyData;
use tng::attest::RuntimeData;
use tng::tls::session::{
    EVIDENCE_LABEL, ID_LABEL, MAX_EVIDENCE, MAX_REASON, Message, Role, SECRET_LABEL, Secret, SessionId, context,
};

/// `name = value` lines of the document's vector blocks.
fn document() -> BTreeMap<String, String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tng-1.md");
    let text = std::fs::read_to_string(path).expect(path);
    let vectors = text.split("## Test vectors").nth(1).expect("vectors");
    let lines = vectors.split("```").skip(1).step_by(2).flat_map(str::lines);
    let pairs = lines.filter_map(|l| l.split_once(" = ")).map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned()));
    pairs.collect()
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes<const N: usize>(text: &str) -> [u8; N] {
    let all: Vec<u8> = (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
    all.try_into().unwrap()
}

#[test]
fn the_code_makes_the_documents_bytes() {
    let all = document();
    let of = |name: &str| all.get(name).unwrap_or_else(|| panic!("no {name} in the document")).as_str();
    let (nonce, exporter) = (bytes(of("nonce")), bytes(of("exporter")));
    let (secret, id) = (Secret::new(bytes(of("secret"))), SessionId(bytes(of("session id"))));
    let spki: Vec<u8> = (0..91).collect();
    assert_eq!(hex(&spki), of("spki"));

    let about = RuntimeData::for_session(&spki, &nonce, &exporter);
    assert_eq!(about.canonical(), of("runtime data"));
    assert_eq!(hex(about.digest()), of("report data"));
    let tag = secret.confirm(&about);
    assert_eq!(hex(tag), of("confirmation"));
    assert!(secret.confirms(&about, &tag));
    assert_eq!(hex(context(Role::Server, &nonce)), of("context, server attests"));
    assert_eq!(hex(context(Role::Client, &nonce)), of("context, client attests"));

    let evidence = vec![0xda, 0x00, 0xc0, 0xc0, 0x00, 0x82, 0x40, 0x40];
    for (name, message) in [
        ("ASK", Message::Ask { nonce, resume: None }),
        ("ASK, resuming", Message::Ask { nonce, resume: Some(id) }),
        ("PASS", Message::Pass),
        ("EVIDENCE", Message::Evidence(evidence)),
        ("CONFIRM", Message::Confirm(tag)),
        ("ACCEPT", Message::Accept),
        ("REFUSE", Message::Refuse("token-policy".into())),
    ] {
        assert_eq!(hex(message.encode()), of(name), "{name}");
        assert_eq!(Message::decode(&message.encode()), Ok((message, &[][..])));
    }
    assert_eq!(all.len(), 17, "a vector that nobody checks: {:?}", all.keys());
}

#[test]
fn the_document_names_the_codes_labels_and_bounds() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tng-1.md")).expect("document");
    for label in [EVIDENCE_LABEL, ID_LABEL, SECRET_LABEL] {
        assert!(text.contains(std::str::from_utf8(label).unwrap()), "{}", String::from_utf8_lossy(label));
    }
    for bound in [MAX_EVIDENCE, MAX_REASON] {
        assert!(text.contains(&bound.to_string()), "{bound}");
    }
    // Keys of a real certificate have the length that the document's example has.
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    assert_eq!(key.subject_public_key_info().len(), 91);
}
