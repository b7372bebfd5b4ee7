//! The certificates between a SEV-SNP report and AMD: ARK (root), ASK, VCEK (AMD 57230, section 3); or ARK, ASVK, VLEK
//! where the report is signed by a key that AMD gave to a provider for all its chips.

use std::time::SystemTime;

use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED, RSA_PSS_2048_8192_SHA384, UnparsedPublicKey};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo, X509Certificate};
use x509_parser::signature_algorithm::RsaSsaPssParams;

use super::BuiltinError;
use super::snp_report::{Report, Tcb};
use crate::attest::x509;
use crate::os::clock;

/// Certificates of a peer that are looked at.
pub const MAX_CERTIFICATES: usize = 8;
/// OID of RSASSA-PSS (RFC 8017).
const PSS: &str = "1.2.840.113549.1.1.10";
/// OID of SHA-384 (RFC 4055).
const SHA384: &str = "2.16.840.1.101.3.4.2.2";
/// OIDs of AMD's extensions of a VCEK (AMD 57230, table 8).
const TCB_BOOTLOADER: &str = "1.3.6.1.4.1.3704.1.3.1";
const TCB_TEE: &str = "1.3.6.1.4.1.3704.1.3.2";
const TCB_SNP: &str = "1.3.6.1.4.1.3704.1.3.3";
const TCB_MICROCODE: &str = "1.3.6.1.4.1.3704.1.3.8";
const TCB_FMC: &str = "1.3.6.1.4.1.3704.1.3.9";
const HWID: &str = "1.3.6.1.4.1.3704.1.4";
/// The provider, in a VLEK's alone, which has no HWID.
const CSP_ID: &str = "1.3.6.1.4.1.3704.1.5";
/// What a report calls the key that signed it, [`Report::signing_key`].
pub const VCEK: u32 = 0;
pub const VLEK: u32 = 1;

/// A root of AMD's with the intermediate that it issued.
#[derive(Debug, Clone)]
pub struct Root {
    /// Generation by the name that the key distribution service uses.
    pub product: &'static str,
    /// The root, DER.
    pub ark: Vec<u8>,
    /// The intermediate, DER; peers may show another that the root issued.
    pub ask: Vec<u8>,
}

fn pem(text: &[u8]) -> Vec<u8> {
    CertificateDer::from_pem_slice(text).map(|der| der.to_vec()).unwrap_or_default()
}

/// The roots compiled in; README.md beside them says where they are from.
pub fn pinned() -> Vec<Root> {
    macro_rules! root {
        ($product:literal, $name:literal) => {
            Root {
                product: $product,
                ark: pem(include_bytes!(concat!("amd/ark-", $name, ".pem"))),
                ask: pem(include_bytes!(concat!("amd/ask-", $name, ".pem"))),
            }
        };
    }
    vec![root!("Milan", "milan"), root!("Genoa", "genoa"), root!("Turin", "turin")]
}

/// What a trusted chain says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endorsed {
    /// Generation of the chip, from the root.
    pub product: &'static str,
    /// Firmware that the report comes from.
    pub tcb: Tcb,
    /// Whose chips, where the key is a provider's; as AMD writes it.
    pub provider: Option<String>,
    /// When the first certificate of the chain ends, seconds since the epoch.
    pub not_after: u64,
}

/// Whether `cert` is signed by `key`, also with the RSASSA-PSS of AMD's certificates.
fn signed_by(cert: &X509Certificate<'_>, key: &SubjectPublicKeyInfo<'_>) -> bool {
    if cert.signature_algorithm.algorithm.to_id_string() != PSS {
        return x509::signed_by(cert, key);
    }
    if cert.signature_algorithm != cert.tbs_certificate.signature {
        return false;
    }
    let params = cert.signature_algorithm.parameters.as_ref().and_then(|p| RsaSsaPssParams::try_from(p).ok());
    let sha384 = |oid: &str| oid == SHA384;
    // aws-lc takes a salt of the digest's length and the same digest in MGF1; so says the certificate too.
    let fits = params.is_some_and(|p| {
        let mask = p.mask_gen_algorithm().ok();
        sha384(&p.hash_algorithm_oid().to_id_string())
            && mask.is_some_and(|m| sha384(&m.hash.to_id_string()))
            && p.salt_length() == 48
    });
    fits && UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, key.subject_public_key.data.as_ref())
        .verify(cert.tbs_certificate.as_ref(), cert.signature_value.data.as_ref())
        .is_ok()
}

fn issued(issuer: &X509Certificate<'_>, cert: &X509Certificate<'_>) -> bool {
    issuer.subject() == cert.issuer() && signed_by(cert, issuer.public_key())
}

fn is_ca(cert: &X509Certificate<'_>) -> bool {
    cert.basic_constraints().ok().flatten().is_some_and(|b| b.value.ca)
        && cert.key_usage().ok().flatten().is_none_or(|k| k.value.key_cert_sign())
}

fn parse(der: &[u8]) -> Option<X509Certificate<'_>> {
    X509Certificate::from_der(der).ok().filter(|(rest, _)| rest.is_empty()).map(|(_, cert)| cert)
}

/// Value of one of AMD's extensions.
fn extension<'a>(cert: &X509Certificate<'a>, oid: &str) -> Option<&'a [u8]> {
    let mut found = cert.extensions().iter().filter(|e| e.oid.to_id_string() == oid);
    // Two could be read differently.
    found.next().filter(|_| found.next().is_none()).map(|e| e.value)
}

/// A DER INTEGER of 0 to 255.
fn small(value: &[u8]) -> Option<u8> {
    match value {
        [2, 1, n] if *n < 0x80 => Some(*n),
        [2, 2, 0, n] if *n >= 0x80 => Some(*n),
        _ => None,
    }
}

fn tcb(cert: &X509Certificate<'_>, turin: bool) -> Option<Tcb> {
    let svn = |oid| extension(cert, oid).and_then(small);
    Some(Tcb {
        fmc: if turin { Some(svn(TCB_FMC)?) } else { None },
        bootloader: svn(TCB_BOOTLOADER)?,
        tee: svn(TCB_TEE)?,
        snp: svn(TCB_SNP)?,
        microcode: svn(TCB_MICROCODE)?,
    })
}

/// Whether the certificate is about the chip of the report. Chips from Turin on have 8 bytes of identity, zero-padded
/// in the report. A report whose host masks the chip has none to compare; its signature tells.
fn same_chip(cert: &X509Certificate<'_>, chip_id: &[u8; 64]) -> bool {
    if chip_id == &[0; 64] {
        return true;
    }
    let Some(value) = extension(cert, HWID) else { return false };
    // Bare on older certificates, an OCTET STRING in the extension's on newer ones.
    let id = match value {
        [4, len, rest @ ..] if usize::from(*len) == rest.len() && [8, 64].contains(&rest.len()) => rest,
        bare => bare,
    };
    [8, 64].contains(&id.len()) && chip_id.starts_with(id) && chip_id[id.len()..].iter().all(|b| *b == 0)
}

/// The provider that a VLEK is of: a string in the extension.
fn provider<'a>(cert: &X509Certificate<'a>) -> Option<&'a str> {
    match extension(cert, CSP_ID)? {
        // UTF8String, PrintableString, IA5String.
        [0x0c | 0x13 | 0x16, len, text @ ..] if usize::from(*len) == text.len() => std::str::from_utf8(text).ok(),
        _ => None,
    }
}

/// Whether `der` is an authority's certificate.
pub fn is_authority(der: &[u8]) -> bool {
    parse(der).is_some_and(|cert| is_ca(&cert))
}

/// Whether a certificate that is no authority's is among `shown`.
pub fn names_chip(shown: &[Vec<u8>]) -> bool {
    shown.iter().any(|der| parse(der).is_none_or(|cert| !is_ca(&cert)))
}

/// Verifies `report` with one of `shown` (DER), whose chain must end in one of `roots` and be valid at `now`.
///
/// # Errors
/// No certificate of the chip among them, a chain to elsewhere, one that is over, a certificate of another chip or
/// firmware, a wrong signature.
pub fn endorse(report: &Report, shown: &[Vec<u8>], roots: &[Root], now: SystemTime) -> Result<Endorsed, BuiltinError> {
    if shown.len() > MAX_CERTIFICATES {
        return Err(BuiltinError::ReportChain("too many certificates"));
    }
    let certs: Vec<_> = shown
        .iter()
        .map(|der| parse(der))
        .collect::<Option<_>>()
        .ok_or(BuiltinError::ReportChain("a certificate is malformed"))?;
    let mut worst = BuiltinError::ReportChain("no certificate of a chip");
    for leaf in certs.iter().filter(|c| !is_ca(c)) {
        match chain(leaf, &certs, roots, now).and_then(|(product, not_after)| {
            let turin = product == "Turin";
            let tcb = tcb(leaf, turin).ok_or(BuiltinError::ReportChain("the certificate names no TCB"))?;
            check(report, leaf, tcb, turin)?;
            Ok(Endorsed { product, tcb, provider: provider(leaf).map(str::to_owned), not_after })
        }) {
            Ok(endorsed) => return Ok(endorsed),
            Err(e) => worst = e,
        }
    }
    Err(worst)
}

fn check(report: &Report, leaf: &X509Certificate<'_>, tcb: Tcb, turin: bool) -> Result<(), BuiltinError> {
    match report.signing_key() {
        VLEK if provider(leaf).is_none() || extension(leaf, HWID).is_some() => {
            return Err(BuiltinError::Endorsement("kind of key"));
        }
        VLEK => {}
        _ if extension(leaf, CSP_ID).is_some() => return Err(BuiltinError::Endorsement("kind of key")),
        _ if !same_chip(leaf, &report.chip_id()) => return Err(BuiltinError::Endorsement("chip")),
        _ => {}
    }
    // The key is derived from the firmware's versions: an older firmware cannot sign as this one.
    if report.reported_tcb(turin) != tcb {
        return Err(BuiltinError::Endorsement("firmware version"));
    }
    let signature = report.signature().ok_or(BuiltinError::ReportSignature)?;
    UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, leaf.public_key().subject_public_key.data.as_ref())
        .verify(report.signed(), &signature)
        .map_err(|_| BuiltinError::ReportSignature)
}

/// The root that `leaf` leads to and the end of the chain.
fn chain(
    leaf: &X509Certificate<'_>,
    shown: &[X509Certificate<'_>],
    roots: &[Root],
    now: SystemTime,
) -> Result<(&'static str, u64), BuiltinError> {
    let mut why = BuiltinError::ReportChain("it does not end in a root of AMD's");
    let (key, issuer) = if extension(leaf, CSP_ID).is_some() { ("VLEK", "ASVK") } else { ("VCEK", "ASK") };
    for root in roots {
        let (Some(ark), Some(ask)) = (parse(&root.ark), parse(&root.ask)) else { continue };
        let between = std::iter::once(&ask).chain(shown);
        for ask in between.filter(|a| is_ca(a) && issued(a, leaf) && issued(&ark, a)) {
            match validity(&[(leaf, key), (ask, issuer), (&ark, "ARK")], clock::unix(now)) {
                Ok(end) => return Ok((root.product, end)),
                Err(refused) => why = refused,
            }
        }
    }
    Err(why)
}

/// When the first of `certs` ends, or which is not valid now.
fn validity(certs: &[(&X509Certificate<'_>, &'static str)], now: u64) -> Result<u64, BuiltinError> {
    let mut end = u64::MAX;
    for (cert, what) in certs {
        let until = u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0);
        let from = u64::try_from(cert.validity().not_before.timestamp()).unwrap_or(0);
        if now < from {
            return Err(BuiltinError::ReportChainNotYetValid(what));
        }
        if now > until {
            return Err(BuiltinError::ReportChainExpired(what));
        }
        end = end.min(until);
    }
    Ok(end)
}

#[cfg(test)]
#[path = "amd_tests.rs"]
mod tests;
