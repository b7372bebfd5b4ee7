//! Evidence of a TPM, in the JSON that CoCo's agent makes and its service reads (tee `tpm`):
//! `{"ak_public": SPKI, "tpm_quote": {"message": TPMS_ATTEST, "pcrs": [hex], "signature": TPMT_SIGNATURE}}`, bytes in
//! standard base64. CoCo's service wants all 24 PCRs and an RSASSA signature. The members `ak_area` (TPMT_PUBLIC) and,
//! with fewer than 24 PCRs, a shorter list in ascending order are tng's own.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::{Deserialize, Serialize};

use super::commands::{Command, CommandError, Hierarchy, Key, RawQuote, Tpm};
use super::structures::{KeyAlgorithm, PcrSelection, Quoted, TpmPublic};
use super::transport::{TpmAddress, Transport};
use super::{PcrValue, QUALIFYING_LEN, sha256};
use crate::attest::host::HostError;

/// PCRs are read and quoted in two commands; an extension between them needs another try.
const TRIES: usize = 4;

/// Which key vouches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttestationKey {
    /// A primary key, made for each quote; the TPM makes the same one each time.
    Primary(Hierarchy, KeyAlgorithm),
    /// One that was made before (0x81000000 to 0x81ffffff), without a password.
    Persistent(u32),
}

impl AttestationKey {
    /// `0x81010002`: a persistent handle.
    pub fn persistent(text: &str) -> Option<Self> {
        let handle = u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
        (handle >> 24 == 0x81).then_some(Self::Persistent(handle))
    }
}

/// How quotes are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmSettings {
    /// The TPM.
    pub address: TpmAddress,
    /// The key.
    pub key: AttestationKey,
    /// What is quoted.
    pub pcrs: PcrSelection,
}

impl Default for TpmSettings {
    fn default() -> Self {
        Self {
            address: TpmAddress::Device("/dev/tpmrm0".into()),
            key: AttestationKey::Primary(Hierarchy::Endorsement, KeyAlgorithm::EccP256),
            pcrs: PcrSelection::ALL,
        }
    }
}

/// The evidence as JSON has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct TpmEvidence {
    /// DER SubjectPublicKeyInfo of the attestation key, base64.
    pub ak_public: String,
    /// TPMT_PUBLIC of the same, base64: its attributes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ak_area: Option<String>,
    /// The quote.
    pub tpm_quote: QuoteJson,
}

/// The quote as JSON has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct QuoteJson {
    /// TPMS_ATTEST, base64.
    pub message: String,
    /// Values of the selected PCRs in ascending order, hexadecimal.
    pub pcrs: Vec<String>,
    /// TPMT_SIGNATURE, base64.
    pub signature: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn failed(address: &TpmAddress) -> impl Fn(CommandError) -> HostError {
    let address = address.to_string();
    move |e| match e {
        CommandError::Io(e) if matches!(e.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock) => {
            HostError::TpmTimeout
        }
        CommandError::Io(e) => HostError::TpmUnreachable(format!("{address}: {e}")),
        CommandError::Refused { command: Command::ReadPublic, code } => {
            HostError::TpmKey(format!("there is no key behind the configured handle (error {code:#05x})"))
        }
        refused @ CommandError::Refused { .. } => HostError::TpmRefused(refused.to_string()),
        garbage @ CommandError::Unreadable(..) => HostError::TpmGarbage(garbage.to_string()),
    }
}

/// Makes evidence over the first [`QUALIFYING_LEN`] bytes of `report_data`.
///
/// # Errors
/// The TPM cannot be reached or refuses, or the key is not one that vouches for quotes.
pub fn evidence<T: Transport>(
    tpm: &mut Tpm<T>,
    settings: &TpmSettings,
    report_data: &[u8; 64],
) -> Result<String, HostError> {
    let failed = failed(&settings.address);
    let key = match settings.key {
        AttestationKey::Primary(hierarchy, algorithm) => tpm.create_primary(hierarchy, algorithm),
        AttestationKey::Persistent(handle) => tpm.read_public(handle),
    }
    .map_err(&failed)?;
    let made = with_key(tpm, settings, &key, &report_data[..QUALIFYING_LEN], &failed);
    if matches!(settings.key, AttestationKey::Primary(..)) {
        // A swtpm without a resource manager has room for three keys.
        let flushed = tpm.flush(key.handle).map_err(&failed);
        let made = made?;
        return flushed.map(|()| made);
    }
    made
}

fn with_key<T: Transport>(
    tpm: &mut Tpm<T>,
    settings: &TpmSettings,
    key: &Key,
    extra: &[u8],
    failed: &impl Fn(CommandError) -> HostError,
) -> Result<String, HostError> {
    let public = TpmPublic::parse(&key.public).map_err(|e| HostError::TpmKey(e.to_string()))?;
    if !public.is_attestation_key() {
        return Err(HostError::TpmKey("it is no restricted signing key that the TPM made and keeps".into()));
    }
    for _ in 0..TRIES {
        let values = tpm.read_pcrs(settings.pcrs).map_err(failed)?;
        let quote = tpm.quote(key.handle, extra, settings.pcrs).map_err(failed)?;
        let quoted = Quoted::parse(&quote.message).map_err(|e| HostError::TpmGarbage(e.to_string()))?;
        if quoted.extra_data != extra {
            return Err(HostError::TpmGarbage("the quote is over other data".into()));
        }
        if quoted.pcr_digest == sha256(values.iter().map(|(_, value)| &value[..])) {
            return Ok(json(&public, key, &quote, &values));
        }
    }
    Err(HostError::TpmPcrsChanging)
}

fn json(public: &TpmPublic, key: &Key, quote: &RawQuote, values: &[(u8, PcrValue)]) -> String {
    let evidence = TpmEvidence {
        ak_public: BASE64_STANDARD.encode(&public.spki),
        ak_area: Some(BASE64_STANDARD.encode(&key.public)),
        tpm_quote: QuoteJson {
            message: BASE64_STANDARD.encode(&quote.message),
            pcrs: values.iter().map(|(_, value)| hex(value)).collect(),
            signature: BASE64_STANDARD.encode(&quote.signature),
        },
    };
    // Strings and lists of them: nothing that JSON cannot hold.
    serde_json::to_string(&evidence).unwrap_or_default()
}
