//! What the peer's certificate must be before its evidence goes to the verifier.

use std::time::{Duration, SystemTime};

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::attest::{Credential, EvidenceError, RuntimeData, json_contains, x509};
use crate::config::Model;

/// How far the peer's clock may be ahead of ours when it makes a certificate.
const SKEW: Duration = Duration::from_secs(300);
/// OID 2.23.133.5.4.9 as text.
const EVIDENCE_OID: &str = "2.23.133.5.4.9";

/// Why a peer's certificate cannot be appraised.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// It showed none.
    #[error("the peer shows no certificate")]
    NoCertificate,
    /// Not X.509.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// No evidence extension.
    #[error("the peer shows no evidence: it is no tng, or does not attest")]
    NoEvidence,
    /// The evidence extension cannot be read.
    #[error("{0}")]
    Evidence(#[from] EvidenceError),
    /// Issued by another name.
    #[error("the peer's certificate is not self-issued")]
    Issuer,
    /// The self-signature is wrong.
    #[error("the peer's certificate is not signed by its own key")]
    SelfSignature,
    /// From the future.
    #[error("the peer's certificate is not yet valid")]
    NotYetValid,
    /// Over.
    #[error("the peer's certificate has expired")]
    Expired,
    /// The evidence is bound to another key.
    #[error("the peer's evidence is about another key")]
    OtherKey,
    /// It was let in when nobody was verified, and somebody is now.
    #[error("the peer was let in when this endpoint verified nobody")]
    NotAppraised,
}

impl PeerError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "peer-no-certificate",
            Self::Malformed => "peer-certificate-malformed",
            Self::NoEvidence => "peer-no-evidence",
            Self::Evidence(e) => e.reason(),
            Self::Issuer => "peer-certificate-issuer",
            Self::SelfSignature => "peer-certificate-signature",
            Self::NotYetValid => "peer-certificate-not-yet-valid",
            Self::Expired => "peer-certificate-expired",
            Self::OtherKey => "peer-evidence-other-key",
            Self::NotAppraised => "peer-not-appraised",
        }
    }
}

/// A certificate that may be appraised; in `tng/1` its key, with evidence about a session.
#[derive(Debug, Clone)]
pub struct PeerCertificate {
    /// Evidence or token.
    pub credential: Credential,
    /// What it must be bound to.
    pub expected: RuntimeData,
    /// notAfter.
    pub not_after: SystemTime,
}

/// The end of a certificate that is valid at `now`.
fn timely(cert: &X509Certificate<'_>, now: SystemTime) -> Result<SystemTime, PeerError> {
    let not_before: SystemTime = cert.validity().not_before.to_datetime().into();
    let not_after: SystemTime = cert.validity().not_after.to_datetime().into();
    // The end has no allowance: a verdict must not outlive the certificate.
    if not_after <= now {
        return Err(PeerError::Expired);
    }
    if now + SKEW < not_before {
        return Err(PeerError::NotYetValid);
    }
    Ok(not_after)
}

/// SubjectPublicKeyInfo and end of a certificate. All that `tng/1` takes from it: evidence about the session says
/// whose key it is, and the handshake that the peer holds it.
pub fn key_of(der: &[u8], now: SystemTime) -> Result<(Vec<u8>, SystemTime), PeerError> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    Ok((cert.public_key().raw.to_vec(), timely(&cert, now)?))
}

/// Whether the peer shows what `model` asks for.
pub fn fits(credential: &Credential, model: Model) -> Result<(), PeerError> {
    match (credential, model) {
        (Credential::Evidence(_), Model::BackgroundCheck) | (Credential::Token(_), Model::Passport) => Ok(()),
        (Credential::Token(_), Model::BackgroundCheck) => Err(EvidenceError::Passport.into()),
        (Credential::Evidence(_), Model::Passport) => Err(EvidenceError::BackgroundCheck.into()),
    }
}

/// Takes the certificate apart and checks all that needs no verifier.
pub fn inspect(der: &[u8], model: Model, now: SystemTime) -> Result<PeerCertificate, PeerError> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    let mut extensions = cert.extensions().iter().filter(|e| e.oid.to_id_string() == EVIDENCE_OID);
    let extension = extensions.next().ok_or(PeerError::NoEvidence)?;
    if extensions.next().is_some() {
        return Err(PeerError::Malformed);
    }
    if cert.subject().as_raw() != cert.issuer().as_raw() {
        return Err(PeerError::Issuer);
    }
    if !x509::signed_by(&cert, cert.public_key()) {
        return Err(PeerError::SelfSignature);
    }
    let not_after = timely(&cert, now)?;
    let credential = Credential::from_extension(extension.value)?;
    let expected = RuntimeData::for_key(cert.public_key().raw);
    fits(&credential, model)?;
    // Whom a token is bound to counts after its signature.
    if let Credential::Evidence(evidence) = &credential {
        let bound = evidence.runtime_object().ok_or(EvidenceError::Malformed("runtime data is not an object"))?;
        if !json_contains(&bound.into(), expected.object()) {
            return Err(PeerError::OtherKey);
        }
    }
    Ok(PeerCertificate { credential, expected, not_after })
}

#[cfg(test)]
mod tests {
    use super::super::certificate::attested;
    use super::*;
    use crate::attest::SampleAttester;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    /// A certificate with evidence, and when it was made.
    static GOOD: LazyLock<(Vec<u8>, SystemTime)> = LazyLock::new(|| {
        let now = SystemTime::now();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let made = runtime.block_on(attested(&SampleAttester, now)).unwrap();
        (made.certified.cert[0].to_vec(), now)
    });

    fn changed(at: u16, byte: u8, cut: Option<u16>) -> Vec<u8> {
        let mut der = GOOD.0.clone();
        let place = usize::from(at) % der.len();
        der[place] = byte;
        der.truncate(cut.map_or(der.len(), |cut| usize::from(cut) % der.len()));
        der
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]

        #[test]
        fn no_changed_certificate_panics(at: u16, byte: u8, cut in proptest::option::weighted(0.1, any::<u16>())) {
            let der = changed(at, byte, cut);
            prop_assert!(key_of(&der, GOOD.1).is_ok() || der != GOOD.0);
        }
    }

    proptest! {
        // With the signature of each.
        #![proptest_config(ProptestConfig::with_cases(5_000))]

        #[test]
        fn a_changed_certificate_says_nothing_new(at: u16, byte: u8) {
            let said = |der: &[u8]| inspect(der, Model::BackgroundCheck, GOOD.1).map(|p| (p.credential, p.not_after));
            let good = said(&GOOD.0);
            prop_assert!(good.is_ok());
            let changed = said(&changed(at, byte, None));
            // What stands around the signed part may be changed.
            prop_assert!(changed.is_err() || changed == good);
        }
    }
}
