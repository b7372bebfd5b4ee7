//! Key and self-signed certificate of this side, with or without evidence.
//!
//! The shape is TNG 2.8's: P-256, `CN=TNG,O=Inclavare Containers`, the evidence in extension 2.23.133.5.4.9.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use zeroize::Zeroize;

use crate::attest::{AttestError, Attester, Credential, EVIDENCE_OID, RuntimeData, VerifyError, token_glance};

/// How long a certificate with evidence is valid, as TNG's.
pub const VALIDITY: Duration = Duration::from_secs(6 * 3600);
/// How long the certificate of a side without evidence is valid: as long as a process can run. Nobody trusts it.
const DEBUG_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The longest certificate that peers take for sure: rustls, TNG 2.8's too, holds 65535 bytes of an unfinished handshake
/// message, with its header, what frames its last record and what stands in the same record.
const PEERS_LIMIT: usize = 0xffff - 256;

/// Why peers refuse this side, as far as it can know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// The certificate is too long for a TLS message.
    #[error("this side's certificate with its evidence has {0} bytes, and peers take {PEERS_LIMIT} at most")]
    TooLarge(usize),
    /// The token that a service made about this side does not affirm it.
    #[error("the token about this side: {0}")]
    Token(VerifyError),
}

impl Doubt {
    /// Slug with which peers refuse.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "tls-certificate-too-large",
            Self::Token(e) => e.reason(),
        }
    }
}

/// A certificate with its key, and when it ends.
pub struct Made {
    /// What rustls shows.
    pub certified: Arc<CertifiedKey>,
    /// DER SubjectPublicKeyInfo of its key.
    pub spki: Vec<u8>,
    /// notAfter.
    pub not_after: SystemTime,
    /// When the token in it was made, by its own word.
    pub token_issued: Option<SystemTime>,
    /// Why peers refuse it.
    pub doubt: Option<Doubt>,
}

fn failed(e: impl std::fmt::Display) -> AttestError {
    AttestError::Certificate(e.to_string())
}

/// A new key and a certificate with evidence about it.
pub async fn attested(attester: &dyn Attester, now: SystemTime) -> Result<Made, AttestError> {
    let key = new_key()?;
    let credential = attester.credential(&RuntimeData::for_key(&key.subject_public_key_info())).await?;
    let (validity, token_issued, status) = match &credential {
        Credential::Evidence(_) => (VALIDITY, None, None),
        // A certificate must not promise more than the token in it.
        Credential::Token(token) => {
            let token = token_glance(token).map_err(AttestError::Passport)?;
            let left = token.expires_at.duration_since(now);
            let left = left.map_err(|_| AttestError::Passport(VerifyError::TokenExpired))?;
            (left.min(VALIDITY), token.issued_at, token.status)
        }
    };
    let extension = CustomExtension::from_oid_content(EVIDENCE_OID, credential.to_extension());
    let made = build(key, Some(extension), now, validity)?;
    let doubt = made.doubt.clone().or(status.map(Doubt::Token));
    Ok(Made { token_issued, doubt, ..made })
}

/// A new key and a certificate without evidence, for a side that must show one and does not attest.
pub fn unattested(now: SystemTime) -> Result<Made, AttestError> {
    build(new_key()?, None, now, DEBUG_VALIDITY)
}

fn new_key() -> Result<KeyPair, AttestError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)
}

fn build(
    key: KeyPair,
    evidence: Option<CustomExtension>,
    now: SystemTime,
    validity: Duration,
) -> Result<Made, AttestError> {
    let not_after = now + validity;
    let mut params = CertificateParams::default();
    params.not_before = now.into();
    params.not_after = not_after.into();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "TNG");
    name.push(DnType::OrganizationName, "Inclavare Containers");
    params.distinguished_name = name;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.custom_extensions = evidence.into_iter().collect();
    let spki = key.subject_public_key_info();
    let certificate = params.self_signed(&key).map_err(failed)?;
    let der = certificate.der().clone();
    let doubt = (der.len() > PEERS_LIMIT).then(|| Doubt::TooLarge(der.len()));
    Ok(Made { certified: Arc::new(certified(der, key)?), spki, not_after, token_issued: None, doubt })
}

fn certified(der: CertificateDer<'static>, key: KeyPair) -> Result<CertifiedKey, AttestError> {
    let mut private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&private);
    private.zeroize();
    Ok(CertifiedKey::new(vec![der], signer.map_err(failed)?))
}

/// SHA-256 of a certificate.
pub fn fingerprint(der: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, der).as_ref());
    out
}
