//! What a certificate carries about its host: evidence (background check) or a token about it (passport).

use super::evidence::{TAG_EVIDENCE, TAG_TOKEN, tagged, untagged};
use super::{Evidence, EvidenceError};

/// Longest token taken from a peer, bytes. A certificate that TLS carries holds less.
const MAX_TOKEN: usize = 256 * 1024;

/// Contents of the certificate extension 2.23.133.5.4.9, as TNG 2.8 writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Evidence: the verifier has it appraised. CBOR tag 0xC0C000.
    Evidence(Evidence),
    /// The token of an attestation service, a JWT: the verifier checks who signed it. CBOR tag 0xC0C001.
    Token(String),
}

impl Credential {
    /// Value of the certificate extension.
    pub fn to_extension(&self) -> Vec<u8> {
        match self {
            Self::Evidence(evidence) => evidence.to_extension(),
            Self::Token(token) => tagged(TAG_TOKEN, token.as_bytes().to_vec()),
        }
    }

    /// Reads the certificate extension's value.
    ///
    /// # Errors
    /// Neither of the two.
    pub fn from_extension(bytes: &[u8]) -> Result<Self, EvidenceError> {
        match untagged(bytes)? {
            (TAG_EVIDENCE, inner) => Evidence::from_inner(&inner).map(Self::Evidence),
            (TAG_TOKEN, inner) if inner.len() > MAX_TOKEN => Err(EvidenceError::Malformed("token too long")),
            (TAG_TOKEN, inner) => {
                String::from_utf8(inner).map(Self::Token).map_err(|_| EvidenceError::Malformed("token is not text"))
            }
            (other, _) => Err(EvidenceError::UnknownTag(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_token_stands_in_the_extension_as_tng_writes_it() {
        // Tag 0xC0C001, an array of the token's bytes and of none: `da00c0c001 82 45 "a.b.c" 40`.
        let wire = [0xda, 0, 0xc0, 0xc0, 1, 0x82, 0x45, b'a', b'.', b'b', b'.', b'c', 0x40];
        let token = Credential::Token("a.b.c".into());
        assert_eq!(token.to_extension(), wire);
        assert_eq!(Credential::from_extension(&wire), Ok(token));
        assert_eq!(Evidence::from_extension(&wire), Err(EvidenceError::Passport));
        let jwt = include_str!("../../tests/fixtures/coco/as-sample-policy-affirm-all.jwt").trim();
        let wire = Credential::Token(jwt.into()).to_extension();
        // RFC 8949: a byte string of 256 to 65535 bytes has a head of three.
        let length = (jwt.len() as u16).to_be_bytes();
        assert_eq!(wire[..9], [0xda, 0, 0xc0, 0xc0, 1, 0x82, 0x59, length[0], length[1]]);
        assert_eq!((&wire[9..9 + jwt.len()], &wire[9 + jwt.len()..]), (jwt.as_bytes(), &[0x40][..]));
    }

    #[test]
    fn what_is_no_text_or_too_long_is_refused() {
        let read = |inner: Vec<u8>| Credential::from_extension(&tagged(TAG_TOKEN, inner));
        assert_eq!(read(vec![0xff]), Err(EvidenceError::Malformed("token is not text")));
        assert_eq!(read(vec![b'a'; MAX_TOKEN + 1]), Err(EvidenceError::Malformed("token too long")));
        assert!(read(vec![b'a'; MAX_TOKEN]).is_ok());
        assert_eq!(Credential::from_extension(&tagged(60000, vec![])), Err(EvidenceError::UnknownTag(60000)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(crate::attest::changes::CASES))]

        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Credential::from_extension(&bytes);
            let mut token = vec![0xda, 0, 0xc0, 0xc0, 1, 0x82, 0x58, bytes.len() as u8];
            token.extend(&bytes);
            token.push(0x40);
            let _ = Credential::from_extension(&token);
        }
    }
}
