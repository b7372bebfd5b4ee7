//! What was shown, in a form for people and machines: the certificate, the evidence, the token.
//!
//! All of it is the peer's, and nothing here says whether it is true. Bytes are bounded by what TLS and `tng/1` carry.

use std::collections::BTreeMap;
use std::time::SystemTime;

use aws_lc_rs::digest;
use chrono::{DateTime, SecondsFormat};
use serde::Serialize;
use serde_json::{Map, Value};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use crate::attest::{
    Credential, Evidence, Look, bound_devices, look, printable_claims, token_glance, token_unverified,
};
use crate::config::Seen;

/// Parts of a token that are shown.
const MAX_PARTS: usize = 32;

/// The peer's certificate.
#[derive(Debug, Clone, Serialize)]
pub struct CertificateView {
    /// Distinguished names, RFC 4514.
    pub subject: String,
    /// Of the issuer.
    pub issuer: String,
    /// Kind and size of its key.
    pub key: String,
    /// SHA-256 of the DER SubjectPublicKeyInfo, hexadecimal.
    pub spki_sha256: String,
    /// SHA-256 of the certificate.
    pub sha256: String,
    /// RFC 3339.
    pub not_before: String,
    /// RFC 3339.
    pub not_after: String,
    /// Certificates that were shown in all.
    pub shown: usize,
}

/// Evidence, or the place of it.
#[derive(Debug, Clone, Serialize)]
pub struct EvidenceView {
    /// `session`, `certificate`, or `host` for this host's own.
    pub from: &'static str,
    /// `evidence` or `token`.
    pub kind: &'static str,
    /// kbs-types name; of a token that of its CPU, as far as it can be read.
    pub tee: Option<String>,
    /// Whether the TEE proves nothing.
    pub sample: bool,
    /// Devices whose evidence came along.
    pub devices: Vec<DeviceView>,
    /// Length of the TEE's evidence or of the token.
    pub bytes: usize,
    /// What it is bound to.
    pub runtime_data: Value,
    /// Hexadecimal; `None` where this version cannot read the evidence.
    pub report_data: Option<String>,
    /// Measurements and versions, by the names of reference values.
    pub fields: BTreeMap<String, Value>,
    /// More that it says.
    pub claims: BTreeMap<String, String>,
    /// Whether the host can read the TEE.
    pub debug: Option<bool>,
    /// Why it could not be read.
    pub problem: Option<ProblemView>,
}

/// What is wrong with evidence by looking alone.
#[derive(Debug, Clone, Serialize)]
pub struct ProblemView {
    /// The slug with which an appraisal would refuse it.
    pub slug: &'static str,
    /// In words.
    pub text: String,
}

/// A device's evidence.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceView {
    /// kbs-types name.
    pub tee: String,
    /// Whether the TEE's evidence vouches for it.
    pub bound: bool,
}

/// A token, believed or not.
#[derive(Debug, Clone, Serialize)]
pub struct TokenView {
    /// `peer`, or `service` for one that the attestation service gave.
    pub from: &'static str,
    /// Its algorithm.
    pub algorithm: Option<String>,
    /// Who says to have made it.
    pub issuer: Option<String>,
    /// RFC 3339.
    pub issued_at: Option<String>,
    /// RFC 3339.
    pub expires_at: Option<String>,
    /// CPU and devices.
    pub parts: Vec<PartView>,
    /// All claims as they stand.
    pub raw: Value,
}

/// One submodule of a token.
#[derive(Debug, Clone, Serialize)]
pub struct PartView {
    /// `cpu0`, `gpu0`, ...
    pub name: String,
    /// kbs-types name.
    pub tee: Option<String>,
    /// AR4SI word.
    pub status: Option<String>,
    /// Policy it was appraised under.
    pub policy: Option<String>,
    /// What the appraisal found; at most 32, printable.
    pub claims: BTreeMap<String, String>,
}

/// Hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    Seen::Bytes(bytes.to_vec()).to_string()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// RFC 3339 in UTC.
pub(super) fn date(seconds: i64) -> Option<String> {
    DateTime::from_timestamp(seconds, 0).map(|t| t.to_rfc3339_opts(SecondsFormat::Secs, true))
}

/// The same of a point in time.
pub(super) fn time(at: SystemTime) -> Option<String> {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    i64::try_from(seconds).ok().and_then(date)
}

impl CertificateView {
    /// Of the first of `chain`, if it is X.509.
    pub(super) fn of(chain: &[Vec<u8>]) -> Option<Self> {
        let der = chain.first()?;
        let (_, cert) = X509Certificate::from_der(der).ok()?;
        let validity = cert.validity();
        Some(Self {
            subject: cert.subject().to_string(),
            issuer: cert.issuer().to_string(),
            key: key(&cert),
            spki_sha256: sha256(cert.public_key().raw),
            sha256: sha256(der),
            not_before: date(validity.not_before.timestamp()).unwrap_or_default(),
            not_after: date(validity.not_after.timestamp()).unwrap_or_default(),
            shown: chain.len(),
        })
    }
}

fn key(cert: &X509Certificate<'_>) -> String {
    let spki = cert.public_key();
    let curve = spki.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|o| o.to_id_string());
    match (spki.parsed(), curve.as_deref()) {
        (Ok(PublicKey::EC(_)), Some("1.2.840.10045.3.1.7")) => "EC P-256".into(),
        (Ok(PublicKey::EC(_)), Some("1.3.132.0.34")) => "EC P-384".into(),
        (Ok(PublicKey::EC(point)), _) => format!("EC, {} bits", point.key_size()),
        (Ok(PublicKey::RSA(key)), _) => format!("RSA, {} bits", key.key_size()),
        _ => format!("OID {}", spki.algorithm.algorithm.to_id_string()),
    }
}

impl EvidenceView {
    /// Of what a peer showed.
    pub(super) fn of(credential: &Credential, from: &'static str) -> (Self, Option<Look>) {
        match credential {
            Credential::Evidence(evidence) => Self::of_evidence(evidence, from),
            Credential::Token(token) => {
                let cpu =
                    token_unverified(token).ok().and_then(|(_, claims)| PartView::all(&claims).into_iter().next());
                let runtime_data = token_glance(token).ok().and_then(|g| g.runtime_data).unwrap_or_default();
                let tee = cpu.and_then(|part| part.tee);
                (Self { runtime_data, ..Self::empty(from, "token", tee, token.len()) }, None)
            }
        }
    }

    fn empty(from: &'static str, kind: &'static str, tee: Option<String>, bytes: usize) -> Self {
        Self {
            from,
            kind,
            sample: tee.as_deref().is_some_and(crate::attest::is_sample_tee),
            tee,
            devices: Vec::new(),
            bytes,
            runtime_data: Value::Null,
            report_data: None,
            fields: BTreeMap::new(),
            claims: BTreeMap::new(),
            debug: None,
            problem: None,
        }
    }

    /// Of evidence, and what it says of itself.
    pub(super) fn of_evidence(evidence: &Evidence, from: &'static str) -> (Self, Option<Look>) {
        let seen = look(evidence);
        let runtime_data = evidence.runtime_object().map_or(Value::Null, Value::Object);
        let plain = Self {
            runtime_data,
            devices: devices(evidence),
            ..Self::empty(from, "evidence", Some(evidence.tee.clone()), evidence.evidence.len())
        };
        match seen {
            Ok(look) => {
                let view = Self {
                    report_data: look.report_data.as_deref().map(hex),
                    fields: look.seen.iter().map(|(name, seen)| ((*name).to_owned(), value(seen))).collect(),
                    claims: look.claims.clone(),
                    debug: look.debug,
                    ..plain
                };
                (view, Some(look))
            }
            Err(e) => (Self { problem: Some(ProblemView { slug: e.reason(), text: e.to_string() }), ..plain }, None),
        }
    }
}

fn value(seen: &Seen) -> Value {
    match seen {
        Seen::Bytes(_) => seen.to_string().into(),
        Seen::Number(n) => (*n).into(),
    }
}

/// Devices that are shown, whether they are bound or not.
fn devices(evidence: &Evidence) -> Vec<DeviceView> {
    let bound = bound_devices(evidence).ok().flatten().is_some();
    let shown = evidence.additional.as_deref().and_then(|text| serde_json::from_slice::<Map<String, Value>>(text).ok());
    let names = shown.into_iter().flatten().map(|(tee, _)| tee).take(MAX_PARTS);
    names.map(|tee| DeviceView { tee: tee.chars().take(64).collect(), bound }).collect()
}

impl TokenView {
    /// Of any text: a token that cannot be read has nothing but itself.
    pub(super) fn of(token: &str, from: &'static str) -> Self {
        let (header, raw) = token_unverified(token).unwrap_or_default();
        let text = |value: &Value, key: &str| value[key].as_str().map(str::to_owned);
        let seconds = |key: &str| raw[key].as_i64().and_then(date);
        Self {
            from,
            algorithm: text(&header, "alg"),
            issuer: text(&raw, "iss"),
            issued_at: seconds("iat"),
            expires_at: seconds("exp"),
            parts: PartView::all(&raw),
            raw,
        }
    }
}

impl PartView {
    /// Submodules of an EAR; a token without any is one of the `Simple` form.
    fn all(claims: &Value) -> Vec<Self> {
        match claims["submods"].as_object() {
            Some(submods) => submods.iter().take(MAX_PARTS).map(|(name, part)| Self::of(name, part)).collect(),
            None if claims["tee"].is_string() => vec![Self::simple(claims)],
            None => Vec::new(),
        }
    }

    /// With the names of draft-fv-rats-ear, or of draft-ietf-rats-ear-04.
    fn of(name: &str, part: &Value) -> Self {
        let old = part["ear.veraison.annotated-evidence"].as_object();
        let known = ["report_data", "runtime_data_claims", "init_data", "init_data_claims"];
        let old = old.and_then(|all| all.iter().find(|(key, _)| !known.contains(&key.as_str())));
        let new = &part["ear_attester_claims"];
        let (tee, claims) = match old {
            Some((tee, claims)) => (Some(tee.clone()), claims),
            None => (new["tee"].as_str().map(str::to_owned), &new["claims"]),
        };
        let first = |keys: [&str; 2]| keys.iter().map(|key| &part[*key]).find(|v| !v.is_null()).and_then(text_of);
        Self {
            name: name.to_owned(),
            status: first(["ear.status", "ear_status"]),
            policy: first(["ear.appraisal-policy-id", "ear_appraisal_policy_ids"]),
            claims: printable_claims(claims),
            tee,
        }
    }

    fn simple(claims: &Value) -> Self {
        let reports = claims["evaluation-reports"].as_array().into_iter().flatten().take(MAX_PARTS);
        let policies: Vec<_> = reports.filter_map(|r| r["policy-id"].as_str()).collect();
        // Some write it as text.
        let found = match &claims["tcb-status"] {
            Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
            other => other.clone(),
        };
        Self {
            name: "tee".into(),
            tee: text_of(&claims["tee"]),
            status: None,
            policy: (!policies.is_empty()).then(|| policies.join(", ")),
            claims: printable_claims(&found),
        }
    }
}

/// A word, a number, or a list of words.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Array(all) => Some(all.iter().take(MAX_PARTS).filter_map(text_of).collect::<Vec<_>>().join(", ")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_token_shows_its_parts() {
        let token = include_str!("../../../tests/fixtures/coco/as-sample-plus-device.jwt").trim();
        let view = TokenView::of(token, "peer");
        assert_eq!(view.algorithm.as_deref(), Some("ES256"));
        let cpu = &view.parts[0];
        assert_eq!((cpu.name.as_str(), cpu.tee.as_deref()), ("cpu0", Some("sample")));
        assert!(view.parts.len() == 2 && view.expires_at.is_some(), "{view:?}");
        assert!(TokenView::of("no token", "peer").parts.is_empty());
    }

    #[test]
    fn tokens_of_later_drafts_and_simple_ones_show_their_parts_too() {
        let part = PartView::of(
            "cpu0",
            &serde_json::json!({
                "ear_status": 2,
                "ear_appraisal_policy_ids": ["a", "b"],
                "ear_attester_claims": { "tee": "tdx", "claims": { "debug": false } },
            }),
        );
        assert_eq!(
            (part.status.as_deref(), part.policy.as_deref(), part.tee.as_deref()),
            (Some("2"), Some("a, b"), Some("tdx"))
        );
        assert_eq!(part.claims["debug"], "false");
        let simple =
            serde_json::json!({ "tee": "snp", "evaluation-reports": [{ "policy-id": "p" }], "tcb-status": {} });
        let parts = PartView::all(&simple);
        assert_eq!((parts.len(), parts[0].tee.as_deref(), parts[0].policy.as_deref()), (1, Some("snp"), Some("p")));
        assert!(PartView::all(&serde_json::json!({ "submods": { "x": 1 } }))[0].tee.is_none());
    }
}
