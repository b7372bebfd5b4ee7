//! Evidence of devices beside that of the TEE (`aa_additional_evidence`).
//!
//! One JSON object, TEE name to evidence: `{"nvidia":{...}}`. It is bound nearly as KBS clients bind it: each device's
//! report data is the digest of the runtime data, and the TEE's that of the same runtime data with one member more,
//! `additional-evidence-sha384`, the base64 of the digest of the object's text. (KBS has the text itself there; a
//! certificate of 64 KiB would have to hold it twice.) What is not bound so is not appraised and appears in no verdict:
//! TNG 2.8 makes device evidence over empty report data, which anybody can replay.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Map, Value};

use super::agent::is_tee_name;
use super::binding::sha384;
use super::{Evidence, VerifyError};

/// Member of the runtime data that names the devices' evidence.
const MEMBER: &str = "additional-evidence-sha384";
/// Devices taken from one host.
const MAX_DEVICES: usize = 16;

fn digest(text: &[u8]) -> String {
    BASE64_STANDARD.encode(sha384(text))
}

/// Runtime data that names the evidence of devices `text`.
pub(super) fn name_in(runtime_data: &mut Map<String, Value>, text: &[u8]) {
    runtime_data.insert(MEMBER.into(), Value::String(digest(text)));
}

/// Evidence of at least one device.
#[derive(Debug, Clone, PartialEq)]
pub struct Devices(Map<String, Value>);

impl Devices {
    /// Reads what an agent returned.
    ///
    /// # Errors
    /// Not a JSON object of 1 to 16 TEEs.
    pub fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let text = std::str::from_utf8(bytes).map_err(|_| "device evidence is not UTF-8")?;
        let by_tee: Map<String, Value> =
            serde_json::from_str(text).map_err(|_| "device evidence is not a JSON object")?;
        if by_tee.is_empty() || by_tee.len() > MAX_DEVICES {
            return Err("device evidence of no device, or of too many");
        }
        if !by_tee.keys().all(|tee| is_tee_name(tee)) {
            return Err("device evidence of no TEE's name");
        }
        Ok(Self(by_tee))
    }

    /// TEE and evidence, JSON text, of each.
    pub fn each(&self) -> impl Iterator<Item = (&str, String)> {
        self.0.iter().map(|(tee, evidence)| (tee.as_str(), evidence.to_string()))
    }
}

/// The devices whose evidence is bound to the runtime data of `evidence`; none when it is not bound.
///
/// # Errors
/// The runtime data names device evidence, and other or none is shown.
pub fn bound(evidence: &Evidence) -> Result<Option<Devices>, VerifyError> {
    let runtime_data = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
    let Some(named) = runtime_data.get(MEMBER) else { return Ok(None) };
    let shown = evidence.additional.as_deref().ok_or(VerifyError::Devices("none is shown"))?;
    if named.as_str() != Some(&digest(shown)) {
        return Err(VerifyError::Devices("other is shown"));
    }
    Devices::parse(shown).map(Some).map_err(VerifyError::Malformed)
}

/// One piece of evidence as an attestation service takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// kbs-types name of the TEE or device.
    pub tee: String,
    /// Its evidence, bytes.
    pub evidence: Vec<u8>,
    /// The object whose canonical form's SHA-384 is its report data.
    pub runtime_data: Map<String, Value>,
}

/// The TEE's evidence, then that of the devices bound to it.
///
/// # Errors
/// As [`bound`].
pub fn pieces(evidence: &Evidence) -> Result<Vec<Piece>, VerifyError> {
    let devices = bound(evidence)?;
    let runtime_data = evidence.runtime_object().ok_or(VerifyError::Malformed("runtime data is not an object"))?;
    let own = without(runtime_data.clone());
    let tee = Piece { tee: evidence.tee.clone(), evidence: evidence.evidence.clone(), runtime_data };
    let mut all = vec![tee];
    for (tee, text) in devices.iter().flat_map(Devices::each) {
        all.push(Piece { tee: tee.into(), evidence: text.into_bytes(), runtime_data: own.clone() });
    }
    Ok(all)
}

/// The runtime data that devices are bound to: that of the TEE without the devices.
fn without(mut runtime_data: Map<String, Value>) -> Map<String, Value> {
    runtime_data.remove(MEMBER);
    runtime_data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::RuntimeData;
    use crate::attest::changes::{CASES, change, changed};
    use proptest::prelude::*;

    const ONE: &str = r#"{"sampledevice":{"report_data":"AQI=","svn":"2"}}"#;

    fn shown(runtime_data: &RuntimeData, additional: Option<&str>) -> Evidence {
        Evidence {
            tee: "sample".into(),
            evidence: b"{}".to_vec(),
            additional: additional.map(|a| a.as_bytes().to_vec()),
            runtime_data: runtime_data.canonical().into(),
        }
    }

    #[test]
    fn device_evidence_counts_only_when_the_runtime_data_names_it() {
        let plain = RuntimeData::for_key(b"key");
        let with = plain.with_devices(ONE.as_bytes());
        let devices = bound(&shown(&with, Some(ONE))).unwrap().unwrap();
        assert_eq!(
            devices.each().collect::<Vec<_>>(),
            [("sampledevice", r#"{"report_data":"AQI=","svn":"2"}"#.to_owned())]
        );
        assert_eq!(bound(&shown(&plain, Some(ONE))), Ok(None));
        assert_eq!(bound(&shown(&with, None)).unwrap_err().reason(), "evidence-devices");
        assert_eq!(bound(&shown(&with, Some(r#"{"nvidia":{}}"#))).unwrap_err().reason(), "evidence-devices");
    }

    #[test]
    fn the_runtime_data_with_devices_is_canonical_and_gives_back_that_without() {
        let plain = RuntimeData::for_key(b"key");
        let with = plain.with_devices(ONE.as_bytes());
        assert!(with.canonical().starts_with(r#"{"additional-evidence-sha384":""#), "{}", with.canonical());
        assert_eq!(with.object()[MEMBER].as_str().map(str::len), Some(64));
        assert_ne!(with.digest(), plain.digest());
        assert_eq!(&without(with.object().clone()), plain.object());
    }

    #[test]
    fn what_is_no_object_of_devices_is_refused() {
        let many: Vec<_> = (0..17).map(|n| format!(r#""tee{n}":{{}}"#)).collect();
        for bad in ["", "[]", "{}", "null", r#"{"":{}}"#, r#"{"a b":{}}"#, &format!("{{{}}}", many.join(","))] {
            assert!(Devices::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(Devices::parse(&[0xff, 0xfe]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(CASES))]

        #[test]
        fn no_changed_devices_panic(change in change(), at: u16, which: u8) {
            let bytes = change.of(ONE.as_bytes());
            let other = changed(&serde_json::from_str(ONE).unwrap(), at, which).to_string();
            for bytes in [&bytes[..], other.as_bytes()] {
                if let Ok(devices) = Devices::parse(bytes) {
                    prop_assert!((1..=MAX_DEVICES).contains(&devices.each().count()));
                    prop_assert!(devices.each().all(|(tee, _)| is_tee_name(tee)));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_of_a_peer_panic(text in "\\PC{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Devices::parse(&bytes);
            let _ = Devices::parse(text.as_bytes());
            let naming = RuntimeData::for_key(b"key").with_devices(text.as_bytes());
            let found = bound(&shown(&naming, Some(&text)));
            prop_assert_eq!(found.is_ok(), Devices::parse(text.as_bytes()).is_ok());
            let other = Evidence { additional: Some(bytes.clone()), ..shown(&naming, None) };
            prop_assert!(bytes == text.as_bytes() || bound(&other).is_err());
        }
    }
}
