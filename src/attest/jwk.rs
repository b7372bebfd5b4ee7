//! Keys as JSON Web Keys (RFC 7517), as far as signers of tokens use them: EC on P-256 with ES256, which makes EARs, and
//! RSA with RS384, which makes the `Simple` tokens of older services and of the openanolis line.

use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD, Engine};
use serde::Deserialize;

/// Longest chain looked at.
pub(super) const MAX_CHAIN: usize = 8;
/// DER of a SubjectPublicKeyInfo up to its P-256 point (RFC 5480).
const EC_HEAD: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// DER of the AlgorithmIdentifier of RSA (RFC 8017, appendix C).
const RSA_ALGORITHM: [u8; 15] =
    [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
/// Bytes of an RSA modulus: 2048 to 8192 bits.
const RSA_MODULUS: std::ops::RangeInclusive<usize> = 256..=1024;

/// How a key signs (RFC 7518, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
}

impl Algorithm {
    /// Its name in headers and keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::Rs384 => "RS384",
        }
    }
}

/// A public key that may sign tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    algorithm: Algorithm,
    /// DER SubjectPublicKeyInfo.
    spki: Vec<u8>,
    /// Where the key itself begins in it: the point, or the RSAPublicKey.
    bits: usize,
}

impl Key {
    fn p256(x: &[u8], y: &[u8]) -> Option<Self> {
        let mut spki = EC_HEAD.to_vec();
        spki.push(4);
        for part in [x, y] {
            // Older services strip leading zeros of the coordinates.
            spki.extend(std::iter::repeat_n(0, 32usize.checked_sub(part.len())?));
            spki.extend_from_slice(part);
        }
        Some(Self { algorithm: Algorithm::Es256, spki, bits: EC_HEAD.len() })
    }

    fn rsa(n: &[u8], e: &[u8]) -> Option<Self> {
        let (n, e) = (significant(n), significant(e));
        if !RSA_MODULUS.contains(&n.len()) || !(1..=8).contains(&e.len()) {
            return None;
        }
        let key = der(0x30, &[unsigned(n), unsigned(e)].concat());
        // A bit string with no unused bits.
        let bits = der(0x03, &[&[0], &key[..]].concat());
        let spki = der(0x30, &[&RSA_ALGORITHM[..], &bits].concat());
        Some(Self { algorithm: Algorithm::Rs384, bits: spki.len() - key.len(), spki })
    }

    /// How it signs.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// DER SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7).
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// What a certificate has in its `subjectPublicKey`.
    pub fn bits(&self) -> &[u8] {
        &self.spki[self.bits..]
    }

    /// Whether it made `signature` over `message`.
    pub fn signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::Es256 => &signature::ECDSA_P256_SHA256_FIXED,
            Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
        };
        UnparsedPublicKey::new(algorithm, self.bits()).verify(message, signature).is_ok()
    }
}

fn significant(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|b| **b == 0).count();
    &number[zeros..]
}

/// DER INTEGER of a positive number.
fn unsigned(number: &[u8]) -> Vec<u8> {
    let sign: &[u8] = if number.first().is_some_and(|b| b & 0x80 != 0) { &[0] } else { &[] };
    der(0x02, &[sign, number].concat())
}

fn der(tag: u8, contents: &[u8]) -> Vec<u8> {
    let length = contents.len();
    let mut out = match length {
        0..0x80 => vec![tag, length as u8],
        0x80..0x100 => vec![tag, 0x81, length as u8],
        // No key here is longer than 64 KiB.
        _ => vec![tag, 0x82, (length >> 8) as u8, length as u8],
    };
    out.extend_from_slice(contents);
    out
}

/// A key as JSON Web Key (RFC 7517), with the certificates of its signer.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Jwk {
    kty: String,
    #[serde(default)]
    crv: String,
    #[serde(default)]
    x: String,
    #[serde(default)]
    y: String,
    #[serde(default)]
    n: String,
    #[serde(default)]
    e: String,
    #[serde(default)]
    pub(super) kid: Option<String>,
    #[serde(default)]
    alg: Option<String>,
    #[serde(default, rename = "use")]
    purpose: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

impl Jwk {
    /// The key itself; `None`: of a kind that signs no tokens here.
    pub fn key(&self) -> Option<Key> {
        let number = |text: &String| BASE64_URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok();
        match (self.kty.as_str(), self.crv.as_str()) {
            ("EC", "P-256") => Key::p256(&number(&self.x)?, &number(&self.y)?),
            ("RSA", _) => Key::rsa(&number(&self.n)?, &number(&self.e)?),
            _ => None,
        }
    }

    /// Whether it may sign with `algorithm` (RFC 7517, sections 4.2 and 4.4).
    pub fn is_for(&self, algorithm: Algorithm) -> bool {
        self.alg.as_deref().is_none_or(|alg| alg == algorithm.name())
            && self.purpose.as_deref().is_none_or(|purpose| purpose == "sig")
    }

    /// The chain in DER, leaf first. RFC 7517 section 4.7 says standard base64; one family of services writes
    /// base64url. Padding is taken or left.
    pub fn chain(&self) -> Option<Vec<Vec<u8>>> {
        if self.x5c.len() > MAX_CHAIN {
            return None;
        }
        let decode = |text: &String| {
            let bare = text.trim_end_matches('=');
            BASE64_STANDARD_NO_PAD.decode(bare).or_else(|_| BASE64_URL_SAFE_NO_PAD.decode(bare)).ok()
        };
        self.x5c.iter().map(decode).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE};
    use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};

    fn ec(x: &[u8], y: &[u8]) -> Jwk {
        let text = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
        Jwk { kty: "EC".into(), crv: "P-256".into(), x: text(x), y: text(y), ..Jwk::default() }
    }

    #[test]
    fn coordinates_without_their_leading_zeros_are_padded() {
        let key = ec(&[7; 31], &[9; 32]).key().unwrap();
        let point = key.bits();
        assert_eq!((point.len(), point[0], point[1], point[2], point[33]), (65, 4, 0, 7, 9));
        assert_eq!(SubjectPublicKeyInfo::from_der(key.spki()).unwrap().1.subject_public_key.data, point);
        assert_eq!(ec(&[7; 31], &[9; 33]).key(), None);
    }

    #[test]
    fn an_rsa_key_is_that_of_its_certificate() {
        let pem = include_bytes!("../../tests/fixtures/coco/longlived-v1leaf-rsaroot.ca.pem");
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let x509_parser::public_key::PublicKey::RSA(rsa) = certificate.public_key().parsed().unwrap() else { panic!() };
        let text = |part: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(part);
        let jwk = Jwk { kty: "RSA".into(), n: text(rsa.modulus), e: text(rsa.exponent), ..Jwk::default() };
        let key = jwk.key().unwrap();
        assert_eq!(key.spki(), certificate.public_key().raw);
        assert_eq!(key.bits(), &certificate.public_key().subject_public_key.data[..]);
        // openssl's BIGNUMs have no leading zero, others write it.
        let padded = Jwk { n: text(&[&[0], significant(rsa.modulus)].concat()), ..jwk.clone() };
        assert_eq!(padded.key(), Some(key));
        assert_eq!(Jwk { n: text(&[0xff; 128]), ..jwk.clone() }.key(), None, "1024 bits");
        assert_eq!(Jwk { n: text(&[0xff; 1025]), ..jwk.clone() }.key(), None, "more than 8192 bits");
        assert_eq!(Jwk { e: String::new(), ..jwk }.key(), None);
    }

    #[test]
    fn a_key_signs_what_it_says_it_is_for() {
        let plain = ec(&[7; 32], &[9; 32]);
        assert!(plain.is_for(Algorithm::Es256));
        let with = |alg: Option<&str>, purpose: Option<&str>| Jwk {
            alg: alg.map(Into::into),
            purpose: purpose.map(Into::into),
            ..plain.clone()
        };
        assert!(with(Some("ES256"), Some("sig")).is_for(Algorithm::Es256));
        assert!(!with(Some("ES384"), None).is_for(Algorithm::Es256));
        assert!(!with(None, Some("enc")).is_for(Algorithm::Es256));
    }

    #[test]
    fn certificates_are_read_in_both_alphabets_with_and_without_padding() {
        // Its base64 holds characters that differ between the alphabets, and padding.
        let der = [0xfb, 0xff, 0xfe, 0x01];
        let forms = [
            BASE64_STANDARD.encode(der),
            BASE64_URL_SAFE.encode(der),
            BASE64_STANDARD_NO_PAD.encode(der),
            BASE64_URL_SAFE_NO_PAD.encode(der),
        ];
        assert_eq!(forms[0], "+//+AQ==");
        let with = |x5c: &[String]| Jwk { x5c: x5c.to_vec(), ..Jwk::default() }.chain();
        assert_eq!(with(&forms), Some(vec![der.to_vec(); 4]));
        assert_eq!(with(&["+/-_".to_owned()]), None, "alphabets mixed");
        assert_eq!(with(&vec![forms[0].clone(); MAX_CHAIN + 1]), None);
    }
}
