//! What a TPM hands out: the attested structure of a quote, its signature, the key's public area.

use super::wire::{Reader, put_sized};
use super::{ALG_SHA256, PCRS};

/// TPM_GENERATED_VALUE: a restricted key signs nothing that begins with it but what its TPM made itself.
const GENERATED: u32 = 0xff54_4347;
/// TPM_ST_ATTEST_QUOTE.
const ATTEST_QUOTE: u16 = 0x8018;
const ALG_RSA: u16 = 0x0001;
const ALG_NULL: u16 = 0x0010;
const ALG_RSASSA: u16 = 0x0014;
const ALG_ECDSA: u16 = 0x0018;
const ALG_ECC: u16 = 0x0023;
const ECC_NIST_P256: u16 = 0x0003;
/// Bytes of a bitmap that selects 24 PCRs.
const SELECT_BYTES: u8 = PCRS / 8;
/// Most banks that a quote may list.
const MAX_BANKS: u32 = 16;
/// RFC 5480: SubjectPublicKeyInfo of a P-256 key up to the point.
const P256_SPKI: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// RFC 3279: AlgorithmIdentifier of rsaEncryption.
const RSA_ALGORITHM: [u8; 15] =
    [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

/// Attributes of an object (TPMA_OBJECT).
pub mod attribute {
    /// It cannot be moved to another TPM.
    pub const FIXED_TPM: u32 = 1 << 1;
    /// It cannot be moved to another parent.
    pub const FIXED_PARENT: u32 = 1 << 4;
    /// The TPM made its secret part.
    pub const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    /// A password (here: the empty one) permits its use.
    pub const USER_WITH_AUTH: u32 = 1 << 6;
    /// Failures do not count against the TPM's lockout.
    pub const NO_DA: u32 = 1 << 10;
    /// It signs only what the TPM made or hashed itself.
    pub const RESTRICTED: u32 = 1 << 16;
    /// It decrypts.
    pub const DECRYPT: u32 = 1 << 17;
    /// It signs.
    pub const SIGN: u32 = 1 << 18;
}

/// Why a structure is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TpmFormatError {
    /// It ends too early.
    #[error("cut short")]
    Truncated,
    /// Bytes follow it.
    #[error("bytes after its end")]
    Trailing,
    /// It was not made by a TPM: anybody's bytes, signed.
    #[error("not made by a TPM (magic {0:#010x})")]
    Magic(u32),
    /// A TPM attests something other than PCRs.
    #[error("not a quote (type {0:#06x})")]
    NotQuote(u16),
    /// A member has a value that is not allowed for.
    #[error("{0}")]
    Value(&'static str),
}

/// PCRs of the SHA-256 bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PcrSelection(u32);

impl PcrSelection {
    /// All 24.
    pub const ALL: Self = Self(0x00ff_ffff);

    /// These PCRs; `None` when there is none, or one beyond the bank.
    pub fn of(pcrs: impl IntoIterator<Item = u8>) -> Option<Self> {
        let mut bits = 0;
        for pcr in pcrs {
            bits |= if pcr < PCRS { 1 << pcr } else { return None };
        }
        (bits != 0).then_some(Self(bits))
    }

    /// In ascending order, as a quote digests them.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..PCRS).filter(move |pcr| self.0 & (1 << pcr) != 0)
    }

    /// How many.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Without those of `other`; `None` when nothing is left.
    pub fn without(self, other: Self) -> Option<Self> {
        let left = self.0 & !other.0;
        (left != 0).then_some(Self(left))
    }

    /// TPML_PCR_SELECTION.
    pub(super) fn put(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&1u32.to_be_bytes());
        out.extend_from_slice(&ALG_SHA256.to_be_bytes());
        out.push(SELECT_BYTES);
        out.extend_from_slice(&self.0.to_le_bytes()[..usize::from(SELECT_BYTES)]);
    }

    /// Reads a TPML_PCR_SELECTION. Banks of which nothing is selected may be listed beside the one; `None` when
    /// nothing is selected at all.
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Option<Self>, TpmFormatError> {
        let banks = reader.u32()?;
        if banks > MAX_BANKS {
            return Err(TpmFormatError::Value("too many PCR banks"));
        }
        let mut found = None;
        for _ in 0..banks {
            let hash = reader.u16()?;
            let size = reader.u8()?;
            let bitmap = reader.take(usize::from(size))?;
            if bitmap.iter().all(|byte| *byte == 0) {
                continue;
            }
            if hash != ALG_SHA256 {
                return Err(TpmFormatError::Value("a PCR bank other than SHA-256"));
            }
            if bitmap.iter().skip(usize::from(SELECT_BYTES)).any(|byte| *byte != 0) {
                return Err(TpmFormatError::Value("a PCR beyond 23"));
            }
            let bits = bitmap.iter().take(usize::from(SELECT_BYTES)).rev().fold(0, |bits, b| bits << 8 | u32::from(*b));
            if found.replace(Self(bits)).is_some() {
                // Two readers could hash them in different order.
                return Err(TpmFormatError::Value("the SHA-256 bank twice"));
            }
        }
        Ok(found)
    }
}

/// A quote (TPMS_ATTEST with TPMS_QUOTE_INFO).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quoted {
    /// What the caller wanted to be in it.
    pub extra_data: Vec<u8>,
    /// Milliseconds that the TPM has been powered, over all boots.
    pub clock: u64,
    /// Boots since the TPM was cleared.
    pub resets: u32,
    /// Resumes since the last boot.
    pub restarts: u32,
    /// Whether `clock` is known not to have gone back.
    pub safe: bool,
    /// The TPM's own firmware.
    pub firmware: u64,
    /// Which PCRs.
    pub selection: PcrSelection,
    /// SHA-256 of their values, in ascending order.
    pub pcr_digest: Vec<u8>,
}

impl Quoted {
    /// Reads a TPMS_ATTEST.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmFormatError> {
        let mut reader = Reader(bytes);
        let magic = reader.u32()?;
        if magic != GENERATED {
            return Err(TpmFormatError::Magic(magic));
        }
        let kind = reader.u16()?;
        if kind != ATTEST_QUOTE {
            return Err(TpmFormatError::NotQuote(kind));
        }
        let _qualified_signer = reader.sized()?;
        let extra_data = reader.sized()?.to_vec();
        let (clock, resets, restarts) = (reader.u64()?, reader.u32()?, reader.u32()?);
        let safe = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(TpmFormatError::Value("a truth value that is neither 0 nor 1")),
        };
        let firmware = reader.u64()?;
        let selection = PcrSelection::read(&mut reader)?.ok_or(TpmFormatError::Value("no PCR is selected"))?;
        let pcr_digest = reader.sized()?.to_vec();
        reader.end()?;
        Ok(Self { extra_data, clock, resets, restarts, safe, firmware, selection, pcr_digest })
    }
}

/// A signature over SHA-256 (TPMT_SIGNATURE).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TpmSignature {
    /// PKCS #1 v1.5.
    RsaSsa(Vec<u8>),
    /// P-256, r and s of 32 bytes each.
    EcdsaP256([u8; 64]),
}

impl TpmSignature {
    /// Reads a TPMT_SIGNATURE and nothing after it.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmFormatError> {
        let mut reader = Reader(bytes);
        let algorithm = reader.u16()?;
        if !matches!(algorithm, ALG_RSASSA | ALG_ECDSA) {
            return Err(TpmFormatError::Value("a signature that is neither RSASSA nor ECDSA"));
        }
        if reader.u16()? != ALG_SHA256 {
            return Err(TpmFormatError::Value("a signature over a hash other than SHA-256"));
        }
        let signature = if algorithm == ALG_RSASSA {
            Self::RsaSsa(reader.sized()?.to_vec())
        } else {
            let (mut both, r, s) = ([0; 64], reader.sized()?, reader.sized()?);
            let (left, right) = both.split_at_mut(32);
            pad(left, r)?;
            pad(right, s)?;
            Self::EcdsaP256(both)
        };
        reader.end()?;
        Ok(signature)
    }
}

/// An integer into a field of fixed length.
fn pad(field: &mut [u8], number: &[u8]) -> Result<(), TpmFormatError> {
    let start = field.len().checked_sub(number.len()).ok_or(TpmFormatError::Value("a number beyond the curve"))?;
    field[start..].copy_from_slice(number);
    Ok(())
}

/// The public area of a signing key (TPMT_PUBLIC).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmPublic {
    /// TPMA_OBJECT.
    pub attributes: u32,
    /// The key as DER SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
}

impl TpmPublic {
    /// Reads a TPMT_PUBLIC of an RSA or P-256 key.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmFormatError> {
        let mut reader = Reader(bytes);
        let kind = reader.u16()?;
        let _name_algorithm = reader.u16()?;
        let attributes = reader.u32()?;
        let _policy = reader.sized()?;
        if reader.u16()? != ALG_NULL {
            return Err(TpmFormatError::Value("the key has a symmetric algorithm: it is a storage key"));
        }
        match reader.u16()? {
            ALG_NULL => {}
            ALG_RSASSA | ALG_ECDSA if reader.u16()? == ALG_SHA256 => {}
            _ => return Err(TpmFormatError::Value("the key signs with another scheme than RSASSA or ECDSA, SHA-256")),
        }
        let spki = match kind {
            ALG_RSA => {
                let _bits = reader.u16()?;
                let exponent = match reader.u32()? {
                    0 => 65537,
                    other => other,
                };
                rsa_spki(reader.sized()?, exponent)
            }
            ALG_ECC => {
                if reader.u16()? != ECC_NIST_P256 {
                    return Err(TpmFormatError::Value("a curve other than P-256"));
                }
                if reader.u16()? != ALG_NULL {
                    return Err(TpmFormatError::Value("a key derivation scheme in a signing key"));
                }
                let (mut point, x, y) = ([4; 65], reader.sized()?, reader.sized()?);
                point[1..].fill(0);
                pad(&mut point[1..33], x)?;
                pad(&mut point[33..], y)?;
                [&P256_SPKI[..], &point].concat()
            }
            _ => return Err(TpmFormatError::Value("a key that is neither RSA nor ECC")),
        };
        reader.end()?;
        Ok(Self { attributes, spki })
    }

    /// Whether it can vouch for a quote: it signs what its TPM made and nothing else, and exists nowhere else.
    pub fn is_attestation_key(&self) -> bool {
        let needed = attribute::RESTRICTED | attribute::SIGN | attribute::FIXED_TPM | attribute::SENSITIVE_DATA_ORIGIN;
        self.attributes & needed == needed && self.attributes & attribute::DECRYPT == 0
    }
}

/// Algorithm of an attestation key made here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// ECDSA on P-256.
    EccP256,
    /// RSASSA with 2048 bits; what CoCo's service can verify.
    Rsa2048,
}

/// The template (TPMT_PUBLIC) of an attestation key. A TPM makes the same primary key of the same template always.
pub(super) fn template(algorithm: KeyAlgorithm) -> Vec<u8> {
    use attribute::*;
    let attributes = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | RESTRICTED | SIGN;
    let (kind, scheme) = match algorithm {
        KeyAlgorithm::EccP256 => (ALG_ECC, ALG_ECDSA),
        KeyAlgorithm::Rsa2048 => (ALG_RSA, ALG_RSASSA),
    };
    let mut out = [kind.to_be_bytes(), ALG_SHA256.to_be_bytes()].concat();
    out.extend_from_slice(&attributes.to_be_bytes());
    put_sized(&mut out, &[]);
    for word in [ALG_NULL, scheme, ALG_SHA256] {
        out.extend_from_slice(&word.to_be_bytes());
    }
    match algorithm {
        KeyAlgorithm::EccP256 => {
            for word in [ECC_NIST_P256, ALG_NULL] {
                out.extend_from_slice(&word.to_be_bytes());
            }
            put_sized(&mut out, &[]);
        }
        KeyAlgorithm::Rsa2048 => {
            out.extend_from_slice(&2048u16.to_be_bytes());
            out.extend_from_slice(&0u32.to_be_bytes());
        }
    }
    put_sized(&mut out, &[]);
    out
}

/// TPMT_SIG_SCHEME: the key's own.
pub(super) fn own_scheme() -> [u8; 2] {
    ALG_NULL.to_be_bytes()
}

/// DER: a tag, a length, the content.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().take_while(|b| **b == 0).count()..];
    let mut out = vec![tag];
    match significant {
        [] => out.push(0),
        [short] if *short < 0x80 => out.push(*short),
        long => {
            out.push(0x80 | long.len() as u8);
            out.extend_from_slice(long);
        }
    }
    out.extend_from_slice(content);
    out
}

/// DER: a positive INTEGER.
fn der_integer(number: &[u8]) -> Vec<u8> {
    let significant = &number[number.iter().take_while(|b| **b == 0).count()..];
    let sign: &[u8] = if significant.first().is_none_or(|first| *first >= 0x80) { &[0] } else { &[] };
    der(0x02, &[sign, significant].concat())
}

fn rsa_spki(modulus: &[u8], exponent: u32) -> Vec<u8> {
    let key = der(0x30, &[der_integer(modulus), der_integer(&exponent.to_be_bytes())].concat());
    der(0x30, &[&RSA_ALGORITHM[..], &der(0x03, &[&[0], &key[..]].concat())].concat())
}

#[cfg(test)]
#[path = "structures_tests.rs"]
mod tests;
