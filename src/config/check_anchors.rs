//! Whom to believe: files of certificates, pinned keys, key sets.

use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

use super::check_service::url;
use super::diagnostics::{Sink, quote};
use super::raw::RawVerify;
use super::reader::At;
use super::service::{JwksSource, KeyPin, TrustedSigners};

const MAX_FILE: u64 = 1 << 20;
const READABLE: &str = "the file must exist and the user `tng` must be able to read it";

/// `trusted_certs`, `trusted_keys`, `trusted_jwks`.
pub(super) fn trusted(v: &RawVerify, sink: &mut Sink<'_>) -> Option<TrustedSigners> {
    let certs = v.trusted_certs.as_ref().map_or(Some(Vec::new()), |list| {
        not_empty("trusted_certs", "name a PEM file", list, &list.value, sink)
            .and_then(|()| pem_files(&list.value, sink))
    });
    let keys = v.trusted_keys.as_ref().map_or(Some(Vec::new()), |list| {
        not_empty("trusted_keys", "name a key", list, &list.value, sink)
            .and_then(|()| all(&list.value, |one| pin(one, sink)))
    });
    let jwks = v.trusted_jwks.as_ref().map_or(Some(Vec::new()), |list| {
        not_empty("trusted_jwks", "name a file or URL", list, &list.value.0, sink)
            .and_then(|()| all(&list.value.0, |one| key_set(one, v, sink)))
    });
    Some(TrustedSigners { certs: certs?, keys: keys?, jwks: jwks? })
}

fn not_empty<T>(key: &str, hint: &str, list: &At<T>, entries: &[At<String>], sink: &mut Sink<'_>) -> Option<()> {
    if entries.is_empty() {
        let hint = format!("{hint}, or remove the key to ask the service for its anchors");
        sink.error(&list.at, "empty", format!("`{key}` is empty: no token would be trusted"), hint);
        return None;
    }
    Some(())
}

/// Every entry, or nothing when one of them is wrong; each is looked at.
fn all<T>(entries: &[At<String>], mut check: impl FnMut(&At<String>) -> Option<T>) -> Option<Vec<T>> {
    let good: Vec<T> = entries.iter().filter_map(&mut check).collect();
    (good.len() == entries.len()).then_some(good)
}

/// PEM files with certificates.
pub(super) fn pem_files(entries: &[At<String>], sink: &mut Sink<'_>) -> Option<Vec<PathBuf>> {
    all(entries, |At { value, at }| match pem_file(Path::new(value)) {
        Ok(()) => Some(PathBuf::from(value)),
        Err((why, hint)) => {
            sink.error(at, "bad-certificate", format!("{} {why}", quote(value)), hint);
            None
        }
    })
}

fn contents(path: &Path) -> Result<Vec<u8>, (String, &'static str)> {
    if !path.is_absolute() {
        return Err(("is not an absolute path".into(), "write the whole path: \"/etc/tng/as-ca.pem\""));
    }
    let meta = std::fs::metadata(path).map_err(|e| (format!("cannot be read: {e}"), READABLE))?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(("is not a regular file of at most 1 MiB".into(), "name one file, not a directory"));
    }
    std::fs::read(path).map_err(|e| (format!("cannot be read: {e}"), READABLE))
}

/// Whether a file holds PEM certificates and nothing that cannot be read.
pub(super) fn pem_file(path: &Path) -> Result<(), (String, &'static str)> {
    let bytes = contents(path)?;
    let form = "it must hold -----BEGIN CERTIFICATE----- blocks; see `openssl x509 -in FILE -text`";
    let mut count = 0;
    for cert in CertificateDer::pem_slice_iter(&bytes) {
        let cert = cert.map_err(|e| (format!("is not PEM: {e}"), form))?;
        x509_parser::parse_x509_certificate(&cert)
            .map_err(|_| (format!("holds a certificate (number {}) that is not X.509", count + 1), form))?;
        count += 1;
    }
    if count == 0 { Err(("holds no certificate".into(), form)) } else { Ok(()) }
}

/// `sha256:` and the hash in hexadecimal or base64.
fn pin(raw: &At<String>, sink: &mut Sink<'_>) -> Option<KeyPin> {
    let pin = raw.value.strip_prefix("sha256:").and_then(|hash| {
        let bytes = if hash.len() == 64 { hex(hash) } else { BASE64_STANDARD.decode(hash).ok() };
        bytes.and_then(|b| <[u8; 32]>::try_from(b).ok())
    });
    if pin.is_none() {
        let message = format!("{} is not the SHA-256 of a public key", quote(&raw.value));
        let hint = "\"sha256:\" and 64 hexadecimal digits (or base64), from: \
                    openssl x509 -in signer.pem -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum";
        sink.error(&raw.at, "bad-key", message, hint);
    }
    pin.map(KeyPin)
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let nibble = |b: u8| (b as char).to_digit(16);
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|p| Some((nibble(*p.first()?)? * 16 + nibble(*p.get(1)?)?) as u8)).collect()
}

fn key_set(raw: &At<String>, v: &RawVerify, sink: &mut Sink<'_>) -> Option<JwksSource> {
    if raw.value.starts_with('/') {
        let path = Path::new(&raw.value);
        let judged = contents(path).and_then(|bytes| {
            let form = "it must be a JSON Web Key Set: {\"keys\": [{\"kty\": \"EC\", \"crv\": \"P-256\", ...}]}";
            let set: Value = serde_json::from_slice(&bytes).map_err(|e| (format!("is not JSON: {e}"), form))?;
            let usable = |key: &Value| {
                key["kty"] == "RSA" && key["n"].is_string() || key["kty"] == "EC" && key["crv"] == "P-256"
            };
            let found = set["keys"].as_array().is_some_and(|keys| keys.iter().any(usable));
            if found { Ok(()) } else { Err(("holds no P-256 and no RSA key".into(), form)) }
        });
        if let Err((why, hint)) = judged {
            sink.error(&raw.at, "bad-key-set", format!("{} {why}", quote(&raw.value)), hint);
            return None;
        }
        return Some(JwksSource::File(path.to_owned()));
    }
    url("trusted_jwks", raw, v, sink).map(JwksSource::Url)
}
