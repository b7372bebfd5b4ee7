//! Whom a token signer must chain to.

use std::path::Path;
use std::time::SystemTime;

use aws_lc_rs::digest;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate, X509Name, X509Version};

use super::jwk::{Jwk, Key, MAX_CHAIN};
use super::x509::signed_by;
use crate::config::{JwksSource, TrustedSigners};

/// Keys taken from one set.
const MAX_KEYS: usize = 64;
/// Longest name of a certificate in a message, characters.
const MAX_NAME: usize = 100;
/// Trust anchors: certificates, keys of a key set, and hashes of keys.
#[derive(Debug, Clone, Default)]
pub struct Anchors {
    certificates: Vec<Vec<u8>>,
    keys: Vec<Known>,
    pins: Vec<[u8; 32]>,
    origin: String,
}

/// A key of a set.
#[derive(Debug, Clone)]
struct Known {
    kid: Option<String>,
    key: Key,
}

impl Anchors {
    /// What a configuration names in files and pins; `None` when it names only URLs.
    pub fn named(trusted: &TrustedSigners) -> Result<Option<Self>, String> {
        let mut all = Self::default();
        if !trusted.certs.is_empty() {
            all.add(Self::from_files(&trusted.certs)?);
        }
        if !trusted.keys.is_empty() {
            let shown: Vec<_> = trusted.keys.iter().map(|k| format!("{:02x}{:02x}...", k.0[0], k.0[1])).collect();
            let origin = format!("pinned key {}", shown.join(", "));
            all.add(Self { pins: trusted.keys.iter().map(|k| k.0).collect(), origin, ..Self::default() });
        }
        for source in &trusted.jwks {
            let JwksSource::File(file) = source else { continue };
            let at = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
            let text = std::fs::read(file).map_err(|e| at(&e))?;
            let found = Self::from_jwks(&text, format!("key set {}", file.display()));
            all.add(found.ok_or_else(|| at(&"holds no P-256 and no RSA key"))?);
        }
        Ok((!all.origin.is_empty()).then_some(all))
    }

    /// Trusts those of `more`, too.
    pub fn add(&mut self, more: Self) {
        self.certificates.extend(more.certificates);
        self.keys.extend(more.keys);
        self.pins.extend(more.pins);
        if !self.origin.is_empty() {
            self.origin.push_str("; ");
        }
        self.origin.push_str(&more.origin);
    }

    /// All certificates of each PEM file.
    pub fn from_files<P: AsRef<Path>>(files: &[P]) -> Result<Self, String> {
        let mut anchors = Self::default();
        for file in files.iter().map(AsRef::as_ref) {
            let at = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
            let text = std::fs::read(file).map_err(|e| at(&e))?;
            let found = anchors.add_pem(&text).map_err(|e| at(&e))?;
            if found == 0 {
                return Err(at(&"holds no certificate"));
            }
        }
        let named: Vec<_> = anchors.certificates.iter().map(|c| subject(c)).collect();
        let files: Vec<_> = files.iter().map(|f| f.as_ref().display().to_string()).collect();
        anchors.origin = format!("{} ({})", named.join("; "), files.join(", "));
        Ok(anchors)
    }

    /// The keys of a JSON Web Key Set.
    pub fn from_jwks(text: &[u8], origin: String) -> Option<Self> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<serde_json::Value>,
        }
        let set: Set = serde_json::from_slice(text).ok()?;
        // Keys of other kinds may stand beside ours.
        let keys: Vec<_> = set
            .keys
            .into_iter()
            .filter_map(|k| {
                let jwk = serde_json::from_value::<Jwk>(k).ok()?;
                let key = jwk.key().filter(|key| jwk.is_for(key.algorithm()))?;
                Some(Known { key, kid: jwk.kid })
            })
            .take(MAX_KEYS)
            .collect();
        if keys.is_empty() { None } else { Some(Self { keys, origin, ..Self::default() }) }
    }

    /// A PEM chain as `{as}/certificate` serves it.
    pub fn from_pem(text: &[u8], origin: String) -> Option<Self> {
        let mut anchors = Self { origin, ..Self::default() };
        (anchors.add_pem(text).ok()? > 0).then_some(anchors)
    }

    fn add_pem(&mut self, text: &[u8]) -> Result<usize, &'static str> {
        let before = self.certificates.len();
        for der in CertificateDer::pem_slice_iter(text) {
            let der = der.map_err(|_| "malformed PEM")?;
            X509Certificate::from_der(&der).map_err(|_| "malformed certificate")?;
            self.certificates.push(der.to_vec());
        }
        Ok(self.certificates.len() - before)
    }

    /// In words, for verdicts and status.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The key of the set that goes by this name. A name that two keys share names none.
    pub fn key(&self, kid: &str) -> Option<&Key> {
        let mut named = self.keys.iter().filter(|k| k.kid.as_deref() == Some(kid));
        let first = named.next()?;
        named.all(|k| k.key == first.key).then_some(&first.key)
    }

    /// The keys of the set, at most 64.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter().map(|k| &k.key).take(MAX_KEYS)
    }

    /// Whether `key`, which `jwk` brings, is trusted at `now`: a pinned key, one of the set, or that of a chain that
    /// ends in an anchor.
    pub fn trust(&self, jwk: &Jwk, key: &Key, now: SystemTime) -> Result<(), String> {
        if self.keys.iter().any(|k| k.key == *key) || self.is_pinned(key) {
            return Ok(());
        }
        let chain = jwk.chain().ok_or("x5c cannot be read")?;
        let leaf_der = chain.first().ok_or("no x5c and not a known key")?;
        let (_, leaf) = X509Certificate::from_der(leaf_der).map_err(|_| "malformed certificate in x5c")?;
        if leaf.public_key().subject_public_key.data.as_ref() != key.bits() {
            return Err("the leaf of x5c is another key's".into());
        }
        if self.certificates.contains(leaf_der) {
            let valid = leaf.validity().is_valid_at(at(now));
            return if valid { Ok(()) } else { Err("signer certificate expired".into()) };
        }
        self.walk(leaf, &chain[1..], now)
    }

    fn is_pinned(&self, key: &Key) -> bool {
        let hash = digest::digest(&digest::SHA256, key.spki());
        self.pins.iter().any(|pin| pin == hash.as_ref())
    }

    fn walk<'a>(&'a self, leaf: X509Certificate<'a>, rest: &'a [Vec<u8>], now: SystemTime) -> Result<(), String> {
        let anchors = parse_all(&self.certificates)?;
        let intermediates = parse_all(rest)?;
        usable_as(&leaf, Role::Signer, now)?;
        let mut current = leaf;
        for below in 0..MAX_CHAIN {
            let role = Role::Issuer { below };
            // Who issued himself is the last: his chain would go around with him for ever.
            let is_last = issued(&current, &current);
            let (mut next, mut unfit) = (None, None);
            for (issuer, is_anchor) in anchors.iter().map(|a| (a, true)).chain(intermediates.iter().map(|i| (i, false)))
            {
                if !issued(issuer, &current) {
                    continue;
                }
                match usable_as(issuer, role, now) {
                    Ok(()) if is_anchor => return Ok(()),
                    Ok(()) if !is_last => next = next.or(Some(issuer)),
                    Ok(()) => {}
                    Err(why) => unfit = unfit.or(Some(format!("{}: {why}", name(issuer.subject())))),
                }
            }
            current = match (next, unfit) {
                (Some(issuer), _) => issuer.clone(),
                (None, Some(unfit)) => return Err(unfit),
                (None, None) => return Err(ends_in(&current)),
            };
        }
        Err("chain too long".into())
    }
}

/// Where a chain ends that no anchor vouches for.
fn ends_in(cert: &X509Certificate<'_>) -> String {
    let (subject, issuer) = (name(cert.subject()), name(cert.issuer()));
    if cert.subject().as_raw() == cert.issuer().as_raw() {
        format!("chain ends in {subject}, which is no anchor")
    } else {
        format!("chain ends in {subject}, issued by {issuer}, which is no anchor")
    }
}

/// A name that a stranger wrote, fit to be shown.
fn name(name: &X509Name<'_>) -> String {
    let text = name.to_string();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_NAME).collect()
}

fn at(now: SystemTime) -> x509_parser::time::ASN1Time {
    let secs = crate::os::clock::unix(now).min(i64::MAX as u64) as i64;
    x509_parser::time::ASN1Time::from_timestamp(secs).unwrap_or_else(|_| x509_parser::time::ASN1Time::now())
}

fn subject(der: &[u8]) -> String {
    X509Certificate::from_der(der).map_or_else(|_| "?".into(), |(_, c)| c.subject().to_string())
}

fn parse_all(ders: &[Vec<u8>]) -> Result<Vec<X509Certificate<'_>>, &'static str> {
    ders.iter()
        .map(|d| X509Certificate::from_der(d).map(|(_, c)| c).map_err(|_| "malformed certificate in x5c"))
        .collect()
}

fn issued(issuer: &X509Certificate<'_>, cert: &X509Certificate<'_>) -> bool {
    issuer.subject().as_raw() == cert.issuer().as_raw() && signed_by(cert, issuer.public_key())
}

#[derive(Clone, Copy)]
enum Role {
    Signer,
    /// With so many certificates between it and the leaf.
    Issuer {
        below: usize,
    },
}

/// RFC 5280 section 6.1.4 as far as it concerns a token signer; what it does not know and is critical is refused.
/// Version 1 has no extensions: accepted for a leaf (openssl makes such) and an anchor, for nothing between.
fn usable_as(cert: &X509Certificate<'_>, role: Role, now: SystemTime) -> Result<(), &'static str> {
    if !cert.validity().is_valid_at(at(now)) {
        return Err("a certificate of the signer's chain is not valid now");
    }
    let mut authority = cert.version() == X509Version::V1 && cert.subject().as_raw() == cert.issuer().as_raw();
    for extension in cert.extensions() {
        match (extension.parsed_extension(), role) {
            (ParsedExtension::BasicConstraints(b), Role::Issuer { below }) => {
                authority = b.ca && b.path_len_constraint.is_none_or(|max| below <= max as usize);
            }
            (ParsedExtension::BasicConstraints(b), Role::Signer) if b.ca => {
                return Err("the signer's certificate is a CA's");
            }
            (ParsedExtension::KeyUsage(u), Role::Issuer { .. }) if !u.key_cert_sign() => {
                return Err("an issuer may not issue");
            }
            (ParsedExtension::KeyUsage(u), Role::Signer) if !u.digital_signature() => {
                return Err("the signer may not sign");
            }
            (
                ParsedExtension::BasicConstraints(_)
                | ParsedExtension::KeyUsage(_)
                | ParsedExtension::ExtendedKeyUsage(_)
                | ParsedExtension::SubjectAlternativeName(_),
                _,
            ) => {}
            _ if extension.critical => return Err("unknown critical extension"),
            _ => {}
        }
    }
    match role {
        Role::Issuer { .. } if !authority => Err("an issuer is no CA"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD, Engine};
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    fn params(name: &str, ca: bool) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = if ca { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
        params
    }

    /// What is made of a leaf under a middle one under a root. `with_root`: x5c holds the root, too.
    fn judge(middle_is_ca: bool, leaf_is_ca: bool, trusted: bool, with_root: bool) -> Result<(), String> {
        let keys: Vec<_> = (0..3).map(|_| KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()).collect();
        let root = params("root", true).self_signed(&keys[0]).unwrap();
        let root_params = params("root", true);
        let middle_params = params("middle", middle_is_ca);
        let middle = middle_params.signed_by(&keys[1], &Issuer::from_params(&root_params, &keys[0])).unwrap();
        let leaf =
            params("leaf", leaf_is_ca).signed_by(&keys[2], &Issuer::from_params(&middle_params, &keys[1])).unwrap();
        let mut jwk = jwk_of(&keys[2], None);
        // One in each alphabet.
        let mut chain = vec![BASE64_URL_SAFE_NO_PAD.encode(leaf.der()), BASE64_STANDARD.encode(middle.der())];
        chain.extend(with_root.then(|| BASE64_STANDARD.encode(root.der())));
        jwk["x5c"] = serde_json::json!(chain);
        // Somebody else's of the same name is no anchor for it.
        let other = params("root", true).self_signed(&KeyPair::generate().unwrap()).unwrap();
        let certificates = vec![if trusted { root.der().to_vec() } else { other.der().to_vec() }];
        Anchors { certificates, ..Anchors::default() }.judged(jwk)
    }

    impl Anchors {
        fn judged(&self, jwk: serde_json::Value) -> Result<(), String> {
            let jwk: Jwk = serde_json::from_value(jwk).unwrap();
            self.trust(&jwk, &jwk.key().unwrap(), SystemTime::now())
        }
    }

    #[test]
    fn only_authorities_issue_and_only_others_sign() {
        for with_root in [false, true] {
            assert_eq!(judge(true, false, true, with_root), Ok(()));
            let error = judge(false, false, true, with_root).unwrap_err();
            assert!(error.contains("CN=middle") && error.contains("an issuer is no CA"), "{error}");
            assert_eq!(judge(true, true, true, with_root).unwrap_err(), "the signer's certificate is a CA's");
        }
    }

    #[test]
    fn the_certificate_is_named_at_which_a_strange_chain_ends() {
        let without = judge(true, false, false, false).unwrap_err();
        assert!(without.starts_with("chain ends in ") && without.ends_with(", which is no anchor"), "{without}");
        assert!(without.contains("CN=middle") && without.contains("issued by ") && without.contains("CN=root"));
        // As trustee's documentation makes x5c: with the root.
        let with = judge(true, false, false, true).unwrap_err();
        assert!(with.contains("CN=root, which is no anchor") && !with.contains("issued by"), "{with}");
        let alone = params("a\u{1b}[31m", false).self_signed(&KeyPair::generate().unwrap()).unwrap();
        let (_, alone) = X509Certificate::from_der(alone.der()).unwrap();
        assert!(!ends_in(&alone).contains('\u{1b}'));
    }

    fn jwk_of(key: &KeyPair, kid: Option<&str>) -> serde_json::Value {
        let point = key.public_key_raw();
        let part = |range: std::ops::Range<usize>| BASE64_URL_SAFE_NO_PAD.encode(&point[range]);
        serde_json::json!({ "kty": "EC", "crv": "P-256", "x": part(1..33), "y": part(33..65), "kid": kid })
    }

    #[test]
    fn a_pin_is_the_hash_of_the_whole_public_key() {
        let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let hash = digest::digest(&digest::SHA256, &rcgen::PublicKeyData::subject_public_key_info(&key));
        let pin = crate::config::KeyPin(hash.as_ref().try_into().unwrap());
        let trusted = TrustedSigners { keys: vec![pin], ..TrustedSigners::default() };
        let anchors = Anchors::named(&trusted).unwrap().unwrap();
        let judge = |k| anchors.judged(jwk_of(k, None));
        assert_eq!(judge(&key), Ok(()));
        assert_eq!(judge(&other), Err("no x5c and not a known key".into()));
        assert!(anchors.origin().starts_with("pinned key "), "{}", anchors.origin());
    }

    #[test]
    fn a_name_names_one_key_or_none() {
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let set = |keys: &[serde_json::Value]| {
            Anchors::from_jwks(serde_json::json!({ "keys": keys }).to_string().as_bytes(), "set".into())
        };
        let anchors = set(&[jwk_of(&one, Some("a")), jwk_of(&two, Some("b"))]).unwrap();
        assert_eq!(anchors.key("a").unwrap().bits(), one.public_key_raw());
        assert_eq!(anchors.key("c"), None);
        let shared = set(&[jwk_of(&one, Some("a")), jwk_of(&two, Some("a"))]).unwrap();
        assert_eq!(shared.key("a"), None);
        assert_eq!(shared.keys().count(), 2);
        let mut rsa = jwk_of(&one, Some("a"));
        rsa["alg"] = "RS256".into();
        assert!(set(&[rsa]).is_none());
    }
}
