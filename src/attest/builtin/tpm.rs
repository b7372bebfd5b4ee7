//! Appraisal of TPM quotes: a pinned attestation key, and what the PCRs have to be.
//!
//! A quote says what a machine booted. It does not say that its memory is protected, nor that root of that machine
//! is not an attacker: whoever is root there can have the key quote.

use std::fmt;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::prelude::{BASE64_STANDARD, Engine};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::attest::VerifyError;
use crate::attest::tpm::quote::TpmEvidence;
use crate::attest::tpm::structures::{Quoted, TpmFormatError, TpmPublic, TpmSignature};
use crate::attest::tpm::{PcrValue, QUALIFYING_LEN, sha256};
use crate::config::{Reference, Seen};

/// Largest evidence read.
const MAX_EVIDENCE: usize = 64 * 1024;

/// PCRs by their names in a reference value.
pub const PCR_NAMES: [&str; 24] = [
    "pcr0", "pcr1", "pcr2", "pcr3", "pcr4", "pcr5", "pcr6", "pcr7", "pcr8", "pcr9", "pcr10", "pcr11", "pcr12", "pcr13",
    "pcr14", "pcr15", "pcr16", "pcr17", "pcr18", "pcr19", "pcr20", "pcr21", "pcr22", "pcr23",
];

/// Why a quote was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TpmRefusal {
    /// It cannot be read.
    #[error("the TPM's evidence is malformed: {0}")]
    Malformed(String),
    /// Nobody named its key.
    #[error("the TPM's key sha256:{0} is in no reference value")]
    Key(String),
    /// The key may sign anything.
    #[error("the TPM's key is no attestation key: it would sign quotes that no TPM made")]
    KeyUnfit,
    /// The key did not sign it.
    #[error("the quote's signature does not verify")]
    Signature,
    /// No quote of a TPM.
    #[error("what the key signed is {0}")]
    NotQuote(TpmFormatError),
    /// The values shown are not those quoted.
    #[error("the PCR values are not those that were quoted")]
    PcrDigest,
    /// A PCR that has to have a value was not quoted.
    #[error("PCR {0} has a reference value and was not quoted")]
    PcrMissing(u8),
    /// A PCR has another value.
    #[error("PCR {0} has no value that the reference allows")]
    PcrValue(u8),
}

impl TpmRefusal {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "tpm-evidence-malformed",
            Self::Key(_) => "tpm-ak-untrusted",
            Self::KeyUnfit => "tpm-ak-unfit",
            Self::Signature => "tpm-signature",
            Self::NotQuote(_) => "tpm-not-quote",
            Self::PcrDigest => "tpm-pcr-digest",
            Self::PcrMissing(_) => "tpm-pcr-missing",
            Self::PcrValue(_) => "tpm-pcr-value",
        }
    }
}

/// An accepted quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmAppraisal {
    /// SHA-256 of the key's SubjectPublicKeyInfo.
    pub ak: [u8; 32],
    /// What was quoted.
    pub quoted: Quoted,
    /// Values of the quoted PCRs, ascending.
    pub pcrs: Vec<(u8, PcrValue)>,
}

impl TpmAppraisal {
    /// What it says, by name; PCRs as a reference value has them.
    pub fn claims(&self) -> impl Iterator<Item = (String, String)> {
        let quoted = &self.quoted;
        let facts = [
            ("ak".to_owned(), format!("sha256:{}", hex(&self.ak))),
            ("resets".to_owned(), quoted.resets.to_string()),
            ("restarts".to_owned(), quoted.restarts.to_string()),
            ("clock_ms".to_owned(), quoted.clock.to_string()),
            ("clock_safe".to_owned(), quoted.safe.to_string()),
            ("firmware".to_owned(), format!("{:#018x}", quoted.firmware)),
        ];
        let pcrs = self.pcrs.iter().map(|(pcr, value)| (format!("pcr{pcr}"), hex(value)));
        facts.into_iter().chain(pcrs)
    }
}

impl fmt::Display for TpmAppraisal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Quoted { clock, resets, restarts, safe, .. } = &self.quoted;
        let safe = if *safe { "" } else { ", clock may have gone back" };
        write!(
            f,
            "TPM key sha256:{} (reset {resets}, restart {restarts}, clock {} s{safe})",
            hex(&self.ak),
            clock / 1000
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn malformed(what: impl fmt::Display) -> TpmRefusal {
    TpmRefusal::Malformed(what.to_string())
}

fn base64(what: &'static str, text: &str) -> Result<Vec<u8>, TpmRefusal> {
    BASE64_STANDARD.decode(text).map_err(|_| malformed(format_args!("{what} is not base64")))
}

fn pcr_value(text: &str) -> Option<PcrValue> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in out.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(out)
}

/// Appraises a quote over `report_data` (48 bytes): by a key in `references`, with PCRs that one of them allows.
///
/// # Errors
/// [`VerifyError::ReportData`] for a quote over other data, else a [`TpmRefusal`].
pub fn appraise(
    evidence: &[u8],
    report_data: &[u8; 48],
    references: &[&Reference],
) -> Result<TpmAppraisal, VerifyError> {
    if evidence.len() > MAX_EVIDENCE {
        return Err(malformed("longer than 64 KiB").into());
    }
    let parsed: TpmEvidence = serde_json::from_slice(evidence).map_err(|_| malformed("not TPM evidence"))?;
    let spki = base64("ak_public", &parsed.ak_public)?;
    let ak = sha256([&spki[..]]);
    let seen = Seen::Bytes(ak.to_vec());
    let names_key = |r: &&&Reference| r.values.get("ak").is_some_and(|any| any.iter().any(|w| w.accepts(&seen)));
    let mut candidates = references.iter().filter(names_key).peekable();
    if candidates.peek().is_none() {
        return Err(TpmRefusal::Key(hex(&ak)).into());
    }
    if let Some(area) = &parsed.ak_area {
        check_area(&base64("ak_area", area)?, &spki)?;
    }
    let message = base64("message", &parsed.tpm_quote.message)?;
    let signature = base64("signature", &parsed.tpm_quote.signature)?;
    check_signature(&spki, &message, &TpmSignature::parse(&signature).map_err(malformed)?)?;
    let quoted = Quoted::parse(&message).map_err(|e| match e {
        TpmFormatError::Magic(_) | TpmFormatError::NotQuote(_) => TpmRefusal::NotQuote(e),
        other => malformed(other),
    })?;
    if !is_over(&quoted.extra_data, report_data) {
        return Err(VerifyError::ReportData);
    }
    let pcrs = quoted_values(&parsed, &quoted)?;
    let mut refusal = TpmRefusal::PcrDigest;
    for reference in candidates {
        match check_pcrs(reference, &pcrs) {
            Ok(()) => return Ok(TpmAppraisal { ak, quoted, pcrs }),
            Err(e) => refusal = e,
        }
    }
    Err(refusal.into())
}

/// What a quote says, without any check of who signed it.
///
/// # Errors
/// It cannot be read, or its PCR values are not those that its own digest is of.
pub fn look(evidence: &[u8]) -> Result<TpmAppraisal, TpmRefusal> {
    if evidence.len() > MAX_EVIDENCE {
        return Err(malformed("longer than 64 KiB"));
    }
    let parsed: TpmEvidence = serde_json::from_slice(evidence).map_err(|_| malformed("not TPM evidence"))?;
    let ak = sha256([&base64("ak_public", &parsed.ak_public)?[..]]);
    let quoted = Quoted::parse(&base64("message", &parsed.tpm_quote.message)?).map_err(malformed)?;
    let pcrs = quoted_values(&parsed, &quoted)?;
    Ok(TpmAppraisal { ak, quoted, pcrs })
}

/// Values of the PCRs that were quoted, once they are those that the quote is of.
fn quoted_values(parsed: &TpmEvidence, quoted: &Quoted) -> Result<Vec<(u8, PcrValue)>, TpmRefusal> {
    let values: Option<Vec<PcrValue>> = parsed.tpm_quote.pcrs.iter().map(|text| pcr_value(text)).collect();
    let values = values.ok_or_else(|| malformed("a PCR is not 64 hexadecimal digits"))?;
    if values.len() != quoted.selection.count() || quoted.pcr_digest != sha256(values.iter().map(|v| &v[..])) {
        return Err(TpmRefusal::PcrDigest);
    }
    Ok(quoted.selection.iter().zip(values).collect())
}

/// CoCo's agent has filled report data up to 64 bytes with zeros, and cut it to 32, in different versions.
pub(super) fn is_over(extra: &[u8], report_data: &[u8; 48]) -> bool {
    let mut padded = [0; 64];
    padded[..48].copy_from_slice(report_data);
    extra == &padded[..QUALIFYING_LEN] || extra == &padded[..48] || extra == padded
}

/// The pinned key is trusted to be an attestation key; an area that is shown must not say otherwise.
fn check_area(area: &[u8], spki: &[u8]) -> Result<(), TpmRefusal> {
    let public = TpmPublic::parse(area).map_err(malformed)?;
    if public.spki != spki {
        return Err(malformed("ak_area is of another key than ak_public"));
    }
    if public.is_attestation_key() { Ok(()) } else { Err(TpmRefusal::KeyUnfit) }
}

fn check_signature(spki: &[u8], message: &[u8], signature: &TpmSignature) -> Result<(), TpmRefusal> {
    let Ok(([], key)) = SubjectPublicKeyInfo::from_der(spki) else {
        return Err(malformed("ak_public is no SubjectPublicKeyInfo"));
    };
    let bits = key.subject_public_key.data.as_ref();
    let verified = match signature {
        // The library checks type and size of the key.
        TpmSignature::RsaSsa(sig) => UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, bits).verify(message, sig),
        TpmSignature::EcdsaP256(sig) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, bits).verify(message, sig),
    };
    verified.map_err(|_| TpmRefusal::Signature)
}

fn check_pcrs(reference: &Reference, pcrs: &[(u8, PcrValue)]) -> Result<(), TpmRefusal> {
    for (pcr, name) in (0..).zip(PCR_NAMES) {
        let Some(allowed) = reference.values.get(name) else { continue };
        let (_, value) = pcrs.iter().find(|(n, _)| *n == pcr).ok_or(TpmRefusal::PcrMissing(pcr))?;
        let value = Seen::Bytes(value.to_vec());
        if !allowed.iter().any(|wanted| wanted.accepts(&value)) {
            return Err(TpmRefusal::PcrValue(pcr));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tpm_tests.rs"]
mod tests;
