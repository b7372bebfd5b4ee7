//! Keys as JSON Web Keys (RFC 7517), as far as token signers use them: EC on P-256.

use base64::prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD, Engine};
use serde::Deserialize;

/// Longest chain looked at.
pub(super) const MAX_CHAIN: usize = 8;

/// An EC P-256 key as JSON Web Key (RFC 7517), with the certificates of its signer.
#[derive(Debug, Clone, Deserialize)]
pub struct Jwk {
    pub(super) kty: String,
    pub(super) crv: String,
    pub(super) x: String,
    pub(super) y: String,
    #[serde(default)]
    pub(super) kid: Option<String>,
    #[serde(default)]
    pub(super) alg: Option<String>,
    #[serde(default)]
    pub(super) x5c: Vec<String>,
}

impl Jwk {
    /// The uncompressed point: 4, x, y. Older services strip leading zeros of the coordinates, so they are
    /// padded on the left. `None`: not a P-256 key.
    pub fn point(&self) -> Option<[u8; 65]> {
        if self.kty != "EC" || self.crv != "P-256" {
            return None;
        }
        let mut point = [0; 65];
        point[0] = 4;
        for (text, end) in [(&self.x, 33), (&self.y, 65)] {
            let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok().filter(|b| b.len() <= 32)?;
            point[end - bytes.len()..end].copy_from_slice(&bytes);
        }
        Some(point)
    }

    /// Whether the key may be used with ES256 (RFC 7517 section 4.4).
    pub fn is_for_es256(&self) -> bool {
        self.alg.as_ref().is_none_or(|alg| alg == "ES256")
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

    #[test]
    fn coordinates_without_their_leading_zeros_are_padded() {
        let jwk = Jwk {
            kty: "EC".into(),
            crv: "P-256".into(),
            x: BASE64_URL_SAFE_NO_PAD.encode([7; 31]),
            y: BASE64_URL_SAFE_NO_PAD.encode([9; 32]),
            kid: None,
            alg: None,
            x5c: vec![],
        };
        let point = jwk.point().unwrap();
        assert_eq!((point[0], point[1], point[2], point[33]), (4, 0, 7, 9));
        assert_eq!(Jwk { y: BASE64_URL_SAFE_NO_PAD.encode([9; 33]), ..jwk }.point(), None);
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
        let with = |x5c: &[String]| {
            let (kty, crv, x, y) = ("EC".to_owned(), "P-256".to_owned(), String::new(), String::new());
            Jwk { kty, crv, x, y, kid: None, alg: None, x5c: x5c.to_vec() }.chain()
        };
        assert_eq!(with(&forms), Some(vec![der.to_vec(); 4]));
        assert_eq!(with(&["+/-_".to_owned()]), None, "alphabets mixed");
        assert_eq!(with(&vec![forms[0].clone(); MAX_CHAIN + 1]), None);
    }
}
