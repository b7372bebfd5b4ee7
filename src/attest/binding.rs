//! How evidence is bound to a TLS key (RATS-TLS as TNG 2.8 speaks it).
//!
//! SHA-256 of the SubjectPublicKeyInfo, wrapped in the CBOR array `[1, hash]`, in base64, is the one member
//! `pubkey-hash` of a JSON object; the SHA-384 of that object in canonical form (RFC 8785) is the report data.
//! `tng/1` adds a nonce and an exporter value of the connection to the object.

use std::collections::BTreeMap;

use aws_lc_rs::digest;
use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Map, Value};

/// Name of the member that carries the key's hash.
pub(crate) const PUBKEY_HASH: &str = "pubkey-hash";
/// Names of the members that `tng/1` adds (docs/tng-1.md).
pub(crate) const NONCE: &str = "nonce";
pub(crate) const EXPORTER: &str = "tls-exporter";

/// The JSON object that evidence is bound to, in canonical form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeData {
    canonical: String,
    object: Map<String, Value>,
}

impl RuntimeData {
    /// Binding to the key whose DER SubjectPublicKeyInfo is `spki`.
    pub fn for_key(spki: &[u8]) -> Self {
        // CBOR: array of 2, unsigned 1 (IANA id of SHA-256), byte string of 32 bytes.
        let mut claim = vec![0x82, 0x01, 0x58, 0x20];
        claim.extend_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        Self::of([(PUBKEY_HASH, BASE64_STANDARD.encode(claim))])
    }

    /// Binding to that key, to a verifier's `nonce` and to the TLS connection that has this `exporter` value
    /// (RFC 8446, section 7.5): what the evidence of a `tng/1` session is about.
    pub fn for_session(spki: &[u8], nonce: &[u8; 32], exporter: &[u8; 32]) -> Self {
        let mut all = Self::for_key(spki).object;
        all.insert(NONCE.into(), BASE64_STANDARD.encode(nonce).into());
        all.insert(EXPORTER.into(), BASE64_STANDARD.encode(exporter).into());
        Self::of(all)
    }

    /// Names and values are plain ASCII here, for which serde_json's compact form with its members in order is the
    /// canonical one.
    fn of<K: Into<String>, V: Into<Value>>(members: impl IntoIterator<Item = (K, V)>) -> Self {
        let sorted: BTreeMap<String, Value> = members.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        let object: Map<String, Value> = sorted.into_iter().collect();
        let canonical = Value::Object(object.clone()).to_string();
        Self { canonical, object }
    }

    /// The same, naming the evidence of devices `text` ([`Devices`](super::Devices)).
    #[must_use]
    pub fn with_devices(&self, text: &[u8]) -> Self {
        let mut object = self.object.clone();
        super::devices::name_in(&mut object, text);
        // serde_json sorts members; names and values are plain ASCII.
        let canonical = Value::Object(object.clone()).to_string();
        Self { canonical, object }
    }

    /// The canonical JSON text.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// The same as an object.
    pub fn object(&self) -> &Map<String, Value> {
        &self.object
    }

    /// SHA-384 of the canonical text: the report data, 48 bytes.
    pub fn digest(&self) -> [u8; 48] {
        sha384(self.canonical.as_bytes())
    }
}

/// SHA-384 of `bytes`.
pub fn sha384(bytes: &[u8]) -> [u8; 48] {
    let mut out = [0; 48];
    out.copy_from_slice(digest::digest(&digest::SHA384, bytes).as_ref());
    out
}

/// Whether `found` is an object that holds every member of `expected` with an equal value. More members are
/// allowed: TNG lets an operator add claims of its own.
pub fn json_contains(found: &Value, expected: &Map<String, Value>) -> bool {
    let Some(found) = found.as_object() else { return false };
    !expected.is_empty() && expected.iter().all(|(k, v)| found.get(k) == Some(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The vector of TNG's embedded debug key: only the hash of its key is known here, so the claim is built from it.
    #[test]
    fn binding_is_byte_exact_with_tng() {
        let canonical = r#"{"pubkey-hash":"ggFYIICSZNWuxYw5T1Jiq0vjnxfdb921RBEDDcwN4niyqhqo"}"#;
        let hash = "809264d5aec58c394f5262ab4be39f17dd6fddb54411030dcc0de278b2aa1aa8";
        let mut claim = vec![0x82, 0x01, 0x58, 0x20];
        claim.extend((0..32).map(|i| u8::from_str_radix(&hash[2 * i..2 * i + 2], 16).unwrap()));
        assert_eq!(canonical, format!(r#"{{"pubkey-hash":"{}"}}"#, BASE64_STANDARD.encode(claim)));
        let hex: String = sha384(canonical.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "d10115c349fc3847416a491313f5bb8333786b6da3282adfa9813459459e9aa534b33a6f49346ca5711f823b311021ff"
        );
    }

    #[test]
    fn runtime_data_has_the_shape_of_the_vector() {
        let rd = RuntimeData::for_key(b"some key");
        assert!(rd.canonical().starts_with(r#"{"pubkey-hash":"ggFYI"#), "{}", rd.canonical());
        assert_eq!(rd.digest(), sha384(rd.canonical().as_bytes()));
        assert_ne!(rd.digest(), RuntimeData::for_key(b"another key").digest());
    }

    #[test]
    fn the_runtime_data_of_a_session_holds_that_of_the_key() {
        let (key, session) = (RuntimeData::for_key(b"k"), RuntimeData::for_session(b"k", &[1; 32], &[2; 32]));
        assert!(json_contains(&session.object().clone().into(), key.object()));
        assert!(!json_contains(&key.object().clone().into(), session.object()), "evidence of a certificate is none");
        let names: Vec<_> = session.object().keys().map(String::as_str).collect();
        assert_eq!(names, [NONCE, PUBKEY_HASH, EXPORTER], "in the order of RFC 8785");
        for other in
            [RuntimeData::for_session(b"k", &[3; 32], &[2; 32]), RuntimeData::for_session(b"k", &[1; 32], &[3; 32])]
        {
            assert_ne!(other.digest(), session.digest());
        }
    }

    #[test]
    fn containment_allows_more_members_and_refuses_missing_or_different_ones() {
        let rd = RuntimeData::for_key(b"k");
        let mut more = rd.object().clone();
        more.insert("extra".into(), 1.into());
        assert!(json_contains(&Value::Object(more.clone()), rd.object()));
        more.insert(PUBKEY_HASH.into(), "x".into());
        assert!(!json_contains(&Value::Object(more), rd.object()));
        assert!(!json_contains(&Value::Null, rd.object()));
        assert!(!json_contains(&serde_json::json!({}), &Map::new()));
    }
}
