//! Signature check of X.509 certificates, old ones included.
//!
//! rustls-webpki takes version 3 alone; token signers made with plain `openssl x509 -req` are version 1
//! (RFC 5280 section 4.1.2.1), so signatures are checked here.

use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use x509_parser::prelude::{SubjectPublicKeyInfo, X509Certificate};

/// DER bytes of the algorithm's OID below 1.2.840.10045.4.3 (ECDSA) and 1.2.840.113549.1.1 (RSA PKCS #1).
fn algorithm(cert: &X509Certificate<'_>, key: &SubjectPublicKeyInfo<'_>) -> Option<&'static dyn VerificationAlgorithm> {
    let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|o| o.to_id_string());
    let key_kind = key.algorithm.algorithm.to_id_string();
    let signed_with = cert.signature_algorithm.algorithm.to_id_string();
    let ec = key_kind == "1.2.840.10045.2.1";
    let rsa = key_kind == "1.2.840.113549.1.1.1";
    Some(match (signed_with.as_str(), curve.as_deref()) {
        ("1.2.840.10045.4.3.2", Some("1.2.840.10045.3.1.7")) if ec => &signature::ECDSA_P256_SHA256_ASN1,
        ("1.2.840.10045.4.3.3", Some("1.2.840.10045.3.1.7")) if ec => &signature::ECDSA_P256_SHA384_ASN1,
        ("1.2.840.10045.4.3.2", Some("1.3.132.0.34")) if ec => &signature::ECDSA_P384_SHA256_ASN1,
        ("1.2.840.10045.4.3.3", Some("1.3.132.0.34")) if ec => &signature::ECDSA_P384_SHA384_ASN1,
        ("1.2.840.113549.1.1.11", _) if rsa => &signature::RSA_PKCS1_2048_8192_SHA256,
        ("1.2.840.113549.1.1.12", _) if rsa => &signature::RSA_PKCS1_2048_8192_SHA384,
        ("1.2.840.113549.1.1.13", _) if rsa => &signature::RSA_PKCS1_2048_8192_SHA512,
        _ => return None,
    })
}

/// Whether `cert`'s signature is by `key`. An algorithm that is not known (SHA-1, RSA below 2048 bits) is a no.
pub fn signed_by(cert: &X509Certificate<'_>, key: &SubjectPublicKeyInfo<'_>) -> bool {
    // RFC 5280 section 4.1.1.2: the algorithm stands inside and outside of the signed part, equal.
    if cert.signature_algorithm != cert.tbs_certificate.signature {
        return false;
    }
    let Some(algorithm) = algorithm(cert, key) else { return false };
    UnparsedPublicKey::new(algorithm, key.subject_public_key.data.as_ref())
        .verify(cert.tbs_certificate.as_ref(), cert.signature_value.data.as_ref())
        .is_ok()
}
