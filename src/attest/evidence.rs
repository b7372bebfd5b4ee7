//! Evidence and its CBOR form in the certificate (TCG DICE tagged evidence, as TNG 2.8 writes it).

use ciborium::Value;
use serde_json::Map;

use super::tee_names;

/// OID 2.23.133.5.4.9, TCG DICE tagged evidence.
pub const EVIDENCE_OID: &[u64] = &[2, 23, 133, 5, 4, 9];

/// CBOR tag of CoCo evidence (background check).
pub(super) const TAG_EVIDENCE: u64 = 0xC0_C000;
/// CBOR tag of a CoCo AS token (passport).
pub(super) const TAG_TOKEN: u64 = 0xC0_C001;
/// IANA named-information id of SHA-384, the only hash TNG uses for runtime data.
const SHA384_ID: u8 = 7;
/// Longest runtime data taken from a peer, bytes.
const MAX_RUNTIME_DATA: usize = 16 * 1024;

/// What an attester says about a host, with what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// kbs-types name of the TEE.
    pub tee: String,
    /// The TEE's evidence, bytes as the attester returned them (normally JSON text).
    pub evidence: Vec<u8>,
    /// Evidence of devices, JSON ([`Devices`](super::Devices)).
    pub additional: Option<Vec<u8>>,
    /// The JSON text whose SHA-384 is the report data.
    pub runtime_data: String,
}

/// Why an evidence extension could not be read.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum EvidenceError {
    /// Not the CBOR it should be.
    #[error("evidence extension malformed: {0}")]
    Malformed(&'static str),
    /// A tag this version does not know.
    #[error("evidence tag {0:#x} is unknown")]
    UnknownTag(u64),
    /// A token instead of evidence.
    #[error(
        "the peer shows a token (its attest.model is passport), this side wants evidence (its verify.model is \
         background_check): set both to the same"
    )]
    Passport,
    /// Evidence instead of a token.
    #[error(
        "the peer shows evidence (its attest.model is background_check), this side wants a token (its verify.model \
         is passport): set both to the same"
    )]
    BackgroundCheck,
    /// Runtime data hashed with something other than SHA-384.
    #[error("runtime data hash algorithm is not SHA-384")]
    HashAlgorithm,
}

impl EvidenceError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "peer-evidence-malformed",
            Self::UnknownTag(_) => "peer-evidence-unknown-tag",
            Self::Passport => "peer-evidence-passport",
            Self::BackgroundCheck => "peer-evidence-background-check",
            Self::HashAlgorithm => "peer-evidence-hash",
        }
    }
}

fn map_bytes(fields: Vec<(&str, Value)>) -> Vec<u8> {
    let map = Value::Map(fields.into_iter().map(|(k, v)| (Value::Text(k.into()), v)).collect());
    to_vec(&map)
}

fn to_vec(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).expect("a Vec takes every write");
    out
}

/// One CBOR item and nothing after it.
fn one_item(bytes: &[u8]) -> Result<Value, EvidenceError> {
    let mut rest = bytes;
    let value = ciborium::from_reader(&mut rest).map_err(|_| EvidenceError::Malformed("not CBOR"))?;
    if rest.is_empty() { Ok(value) } else { Err(EvidenceError::Malformed("bytes after the CBOR item")) }
}

/// The tag around an array of two byte strings. The second, the claims buffer, is deprecated and always empty.
pub(super) fn tagged(tag: u64, inner: Vec<u8>) -> Vec<u8> {
    let pair = Value::Array(vec![Value::Bytes(inner), Value::Bytes(Vec::new())]);
    to_vec(&Value::Tag(tag, Box::new(pair)))
}

/// Tag and first byte string of the same.
pub(super) fn untagged(bytes: &[u8]) -> Result<(u64, Vec<u8>), EvidenceError> {
    let Value::Tag(tag, item) = one_item(bytes)? else { return Err(EvidenceError::Malformed("no tag")) };
    if tag != TAG_EVIDENCE && tag != TAG_TOKEN {
        return Err(EvidenceError::UnknownTag(tag));
    }
    let Ok([Value::Bytes(inner), Value::Bytes(_)]) = <[Value; 2]>::try_from(item.into_array().unwrap_or_default())
    else {
        return Err(EvidenceError::Malformed("not an array of two byte strings"));
    };
    Ok((tag, inner))
}

impl Evidence {
    /// Value of the certificate extension.
    pub fn to_extension(&self) -> Vec<u8> {
        let inner = map_bytes(vec![
            ("tee_type", Value::Text(tee_names::of_certificate(&self.tee).to_owned())),
            ("aa_evidence", Value::Bytes(self.evidence.clone())),
            ("aa_additional_evidence", self.additional.clone().map_or(Value::Null, Value::Bytes)),
            ("aa_runtime_data", Value::Text(self.runtime_data.clone())),
            ("aa_runtime_data_hash_algo", Value::from(SHA384_ID)),
        ]);
        tagged(TAG_EVIDENCE, inner)
    }

    /// Reads the certificate extension's value.
    pub fn from_extension(bytes: &[u8]) -> Result<Self, EvidenceError> {
        match untagged(bytes)? {
            (TAG_EVIDENCE, inner) => Self::from_inner(&inner),
            (TAG_TOKEN, _) => Err(EvidenceError::Passport),
            (other, _) => Err(EvidenceError::UnknownTag(other)),
        }
    }

    pub(super) fn from_inner(bytes: &[u8]) -> Result<Self, EvidenceError> {
        let fields = one_item(bytes)?.into_map().map_err(|_| EvidenceError::Malformed("not a map"))?;
        Self::from_fields(fields)
    }

    fn from_fields(fields: Vec<(Value, Value)>) -> Result<Self, EvidenceError> {
        let (mut tee, mut evidence, mut additional, mut runtime_data, mut algo) = (None, None, None, None, None);
        let set = |slot: &mut Option<Value>, v| match slot.replace(v) {
            None => Ok(()),
            // Two readers could take different ones.
            Some(_) => Err(EvidenceError::Malformed("a field occurs twice")),
        };
        for (key, value) in fields {
            match key.as_text() {
                Some("tee_type") => set(&mut tee, value)?,
                Some("aa_evidence") => set(&mut evidence, value)?,
                Some("aa_additional_evidence") => set(&mut additional, value)?,
                Some("aa_runtime_data") => set(&mut runtime_data, value)?,
                Some("aa_runtime_data_hash_algo") => set(&mut algo, value)?,
                Some(_) => {}
                None => return Err(EvidenceError::Malformed("a key is not text")),
            }
        }
        if algo != Some(Value::from(SHA384_ID)) {
            return Err(EvidenceError::HashAlgorithm);
        }
        let tee = tee.and_then(|v| v.into_text().ok()).ok_or(EvidenceError::Malformed("tee_type"))?;
        if tee.is_empty() || tee.len() > 32 || !tee.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(EvidenceError::Malformed("tee_type"));
        }
        let runtime_data =
            runtime_data.and_then(|v| v.into_text().ok()).ok_or(EvidenceError::Malformed("aa_runtime_data"))?;
        if runtime_data.len() > MAX_RUNTIME_DATA {
            return Err(EvidenceError::Malformed("aa_runtime_data too long"));
        }
        let evidence = evidence.and_then(|v| v.into_bytes().ok()).ok_or(EvidenceError::Malformed("aa_evidence"))?;
        let additional = match additional {
            None | Some(Value::Null) => None,
            Some(Value::Bytes(b)) => Some(b),
            Some(_) => return Err(EvidenceError::Malformed("aa_additional_evidence")),
        };
        Ok(Self { tee, evidence, additional, runtime_data })
    }

    /// The runtime data as an object, or `None` when it is not one.
    pub fn runtime_object(&self) -> Option<Map<String, serde_json::Value>> {
        serde_json::from_str(&self.runtime_data).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::changes::{CASES, change};
    use proptest::prelude::*;

    fn example() -> Evidence {
        Evidence {
            tee: "tdx".into(),
            evidence: vec![1, 2, 3],
            additional: None,
            runtime_data: r#"{"pubkey-hash":"x"}"#.into(),
        }
    }

    #[test]
    fn the_extension_is_the_tag_around_two_byte_strings() {
        let bytes = example().to_extension();
        assert_eq!(bytes[..6], [0xda, 0x00, 0xc0, 0xc0, 0x00, 0x82]);
        assert_eq!(bytes.last(), Some(&0x40), "empty claims buffer");
        assert_eq!(Evidence::from_extension(&bytes), Ok(example()));
        let more = Evidence { additional: Some(vec![9]), ..example() };
        assert_eq!(Evidence::from_extension(&more.to_extension()), Ok(more));
    }

    /// The CBOR map with the text of `tee_type` as TNG 2.8 spells it: what stands before and after it is the same.
    #[test]
    fn a_tee_with_two_spellings_is_written_as_tng_reads_it_and_read_in_both() {
        let azure = |tee: &str| Evidence { tee: tee.into(), ..example() };
        let wire = azure("az-snp-vtpm").to_extension();
        // A text of 8 bytes, one of 9.
        let head = [&[0x68][..], b"tee_type", &[0x69], b"azsnpvtpm"].concat();
        assert!(wire.windows(head.len()).any(|w| w == head), "{wire:02x?}");
        assert_eq!(Evidence::from_extension(&wire), Ok(azure("azsnpvtpm")));
        let long = [&[0x68][..], b"tee_type", &[0x6b], b"az-snp-vtpm"].concat();
        let at = wire.windows(head.len()).position(|w| w == head).unwrap();
        let mut other = [&wire[..at], &long, &wire[at + head.len()..]].concat();
        // Two bytes more in the byte string around the map.
        assert_eq!(other[6], 0x58);
        other[7] += 2;
        assert_eq!(Evidence::from_extension(&other), Ok(azure("az-snp-vtpm")));
    }

    #[test]
    fn other_tags_are_refused_each_with_its_reason() {
        // TNG's own unit-test vector: tag 60000, evidence 01020304, claims 05060708.
        let foreign = [0xd9, 0xea, 0x60, 0x82, 0x44, 1, 2, 3, 4, 0x44, 5, 6, 7, 8];
        assert_eq!(Evidence::from_extension(&foreign), Err(EvidenceError::UnknownTag(60000)));
        assert_eq!(Evidence::from_extension(&[0xda, 0, 0xc0, 0xc0, 1, 0x82, 0x40, 0x40]), Err(EvidenceError::Passport));
        let mut bytes = example().to_extension();
        bytes.push(0);
        assert!(matches!(Evidence::from_extension(&bytes), Err(EvidenceError::Malformed(_))));
        for n in [0x80, 0x81, 0x83] {
            let mut bytes = vec![0xda, 0, 0xc0, 0xc0, 0, n];
            bytes.extend(std::iter::repeat_n(0x40, usize::from(n & 0xf)));
            assert!(matches!(Evidence::from_extension(&bytes), Err(EvidenceError::Malformed(_))));
        }
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        let field = |k: &str| (Value::Text(k.into()), Value::Text("sample".into()));
        assert_eq!(
            Evidence::from_fields(vec![field("tee_type"), field("tee_type")]),
            Err(EvidenceError::Malformed("a field occurs twice"))
        );
        assert_eq!(Evidence::from_fields(vec![field("tee_type")]), Err(EvidenceError::HashAlgorithm));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]

        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Evidence::from_extension(&bytes);
            let mut tagged = vec![0xda, 0, 0xc0, 0xc0, 0, 0x82, 0x58, bytes.len() as u8];
            tagged.extend(&bytes);
            tagged.push(0x40);
            let _ = Evidence::from_extension(&tagged);
        }

        #[test]
        fn what_is_read_from_a_changed_extension_is_written_and_read_the_same(change in change()) {
            let good = Evidence { additional: Some(vec![9; 3]), ..example() }.to_extension();
            if let Ok(read) = Evidence::from_extension(&change.of(&good)) {
                prop_assert_eq!(Evidence::from_extension(&read.to_extension()), Ok(read));
            }
        }
    }
}
