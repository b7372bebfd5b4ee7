//! The token of an attestation service: an EAR (draft-fv-rats-ear) in a JWT, as CoCo's trustee signs it.

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::anchors::Anchors;
use super::clock::from_unix;
use super::jwk::Jwk;
use super::{Verdict, VerifyError, claims, is_sample_tee, json_contains};

/// How far the service's clock may be ahead. There is no allowance at the end: a verdict must not outlive its token.
pub(crate) const LEEWAY: Duration = Duration::from_secs(60);
const PROFILE: &str = "tag:github.com,2024:confidential-containers/Trustee";
/// Members of the annotated evidence that do not name a TEE.
const NOT_A_TEE: [&str; 4] = ["report_data", "runtime_data_claims", "init_data", "init_data_claims"];

/// What a token must say.
pub struct Expected<'a> {
    /// Members its runtime data must hold.
    pub runtime_data: &'a Map<String, Value>,
    /// Policies it must be made under; none: `default`, which is what the service takes then.
    pub policy_ids: &'a [String],
    /// Whether a TEE that proves nothing is let in.
    pub allow_sample: bool,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    crit: Option<Value>,
    #[serde(default)]
    jwk: Option<Value>,
    #[serde(default)]
    kid: Option<String>,
}

#[derive(Deserialize)]
struct Claims {
    eat_profile: String,
    iat: u64,
    exp: u64,
    #[serde(default)]
    nbf: Option<u64>,
    submods: Map<String, Value>,
}

fn part<T: serde::de::DeserializeOwned>(text: &str, what: &'static str) -> Result<T, VerifyError> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| VerifyError::TokenMalformed(what))?;
    serde_json::from_slice(&bytes).map_err(|_| VerifyError::TokenMalformed(what))
}

/// What a token says of itself, believed by nobody: for the side that shows it.
pub struct Glance {
    /// Its end.
    pub expires_at: SystemTime,
    /// When it was made, if it says so.
    pub issued_at: Option<SystemTime>,
    /// Runtime data of the TEE, where an EAR has it.
    pub runtime_data: Option<Value>,
}

/// Looks into `token` without checking anything of it.
///
/// # Errors
/// Not a JWT with an end.
pub fn glance(token: &str) -> Result<Glance, VerifyError> {
    let claims: Value = part(token.split('.').nth(1).unwrap_or_default(), "claims")?;
    let expires_at = claims.get("exp").and_then(Value::as_u64).and_then(from_unix);
    let expires_at = expires_at.ok_or(VerifyError::TokenMalformed("no end"))?;
    let runtime_data = claims.pointer("/submods/cpu0/ear.veraison.annotated-evidence/runtime_data_claims").cloned();
    let issued_at = claims.get("iat").and_then(Value::as_u64).and_then(from_unix);
    Ok(Glance { expires_at, issued_at, runtime_data })
}

/// Header and claims of `token`, believed by nobody: for people.
///
/// # Errors
/// Not a JWT.
pub fn unverified(token: &str) -> Result<(Value, Value), VerifyError> {
    let mut parts = token.split('.');
    let header = part(parts.next().unwrap_or_default(), "header")?;
    Ok((header, part(parts.next().unwrap_or_default(), "claims")?))
}

/// Whether `text` has the form of a JWT at all.
pub fn looks_like_jwt(text: &str) -> bool {
    let url_safe = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    text.split('.').count() == 3 && text.split('.').all(url_safe)
}

/// Verifies `token` at `now`. The verdict ends when the token does.
pub fn verify(
    token: &str,
    anchors: &Anchors,
    expected: &Expected<'_>,
    now: SystemTime,
) -> Result<Verdict, VerifyError> {
    let mut parts = token.split('.');
    let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(VerifyError::TokenMalformed("not three parts"));
    };
    signed(header, payload, signature, anchors, now)?;
    let claims: Claims = part(payload, "claims")?;
    let expires_at = timely(&claims, now)?;
    appraised(&claims.submods, expected, anchors.origin(), now, expires_at)
}

fn signed(header: &str, payload: &str, signature: &str, anchors: &Anchors, now: SystemTime) -> Result<(), VerifyError> {
    let parsed: Header = part(header, "header")?;
    match parsed.alg.as_str() {
        "ES256" => {}
        none if none.eq_ignore_ascii_case("none") => return Err(VerifyError::TokenAlgNone),
        mac @ ("HS256" | "HS384" | "HS512") => return Err(VerifyError::TokenAlgMac(mac.into())),
        _ => return Err(VerifyError::TokenAlg),
    }
    // RFC 7515 section 4.1.11: what is not understood must be refused, and none is.
    if parsed.crit.is_some() {
        return Err(VerifyError::TokenCritical);
    }
    let named = parsed.kid.as_deref().and_then(|kid| anchors.key(kid));
    let brought = parsed.jwk.map(own_key).transpose()?;
    let point = match (&brought, named) {
        (Some((_, point)), Some(known)) if *point != known => {
            return Err(VerifyError::TokenKeyConfusion(shown(parsed.kid.as_deref().unwrap_or_default())));
        }
        (Some((jwk, _)), _) if jwk.kid.is_some() && parsed.kid.is_some() && jwk.kid != parsed.kid => {
            return Err(VerifyError::TokenKeyConfusion(shown(parsed.kid.as_deref().unwrap_or_default())));
        }
        (Some((_, point)), _) => *point,
        (None, Some(known)) => known,
        (None, None) => match parsed.kid {
            Some(kid) => {
                let text = format!("key `{}` is in no trusted set", shown(&kid));
                return Err(VerifyError::TokenUntrustedSigner(text));
            }
            None => return Err(VerifyError::TokenMalformed("no key in the header")),
        },
    };
    let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).map_err(|_| VerifyError::TokenMalformed("signature"))?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
        .verify(format!("{header}.{payload}").as_bytes(), &signature)
        .map_err(|_| VerifyError::TokenSignature)?;
    // A key that the token brings along proves nothing until an anchor vouches for it.
    match brought {
        Some((jwk, _)) => anchors.trust(&jwk, now).map_err(|e| VerifyError::TokenUntrustedSigner(e.into())),
        None => Ok(()),
    }
}

/// The key that a token brings along, and its point.
fn own_key(value: Value) -> Result<(Jwk, [u8; 65]), VerifyError> {
    let jwk: Jwk = serde_json::from_value(value).map_err(|_| VerifyError::TokenMalformed("no EC key in the header"))?;
    let point = jwk.point().ok_or(VerifyError::TokenMalformed("no P-256 key in the header"))?;
    if !jwk.is_for_es256() {
        return Err(VerifyError::TokenAlg);
    }
    Ok((jwk, point))
}

/// As much of a stranger's text as a message may hold.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn timely(claims: &Claims, now: SystemTime) -> Result<SystemTime, VerifyError> {
    if claims.eat_profile != PROFILE {
        return Err(VerifyError::TokenMalformed("eat_profile"));
    }
    let time = |secs| from_unix(secs).ok_or(VerifyError::TokenMalformed("a time out of range"));
    let expires_at = time(claims.exp)?;
    if expires_at <= now {
        return Err(VerifyError::TokenExpired);
    }
    if time(claims.iat)? > now + LEEWAY {
        return Err(VerifyError::TokenFromFuture);
    }
    if time(claims.nbf.unwrap_or(0))? > now + LEEWAY {
        return Err(VerifyError::TokenNotYetValid);
    }
    Ok(expires_at)
}

fn appraised(
    submods: &Map<String, Value>,
    expected: &Expected<'_>,
    trust_anchor: &str,
    now: SystemTime,
    expires_at: SystemTime,
) -> Result<Verdict, VerifyError> {
    let evidence_of = |submod: &Value| -> Result<Map<String, Value>, VerifyError> {
        let found = submod.get("ear.veraison.annotated-evidence").and_then(Value::as_object).cloned();
        found.ok_or(VerifyError::TokenMalformed("a submodule without evidence"))
    };
    let cpu = evidence_of(submods.get("cpu0").ok_or(VerifyError::TokenMalformed("no submodule cpu0"))?)?;
    if !json_contains(cpu.get("runtime_data_claims").unwrap_or(&Value::Null), expected.runtime_data) {
        return Err(VerifyError::TokenRuntimeData);
    }
    let mut found_policies = Vec::new();
    let mut tees = Vec::new();
    // Those that anybody could have shown are not listed.
    let mut devices = Vec::new();
    for (name, submod) in submods {
        affirming(name, submod)?;
        let policy = submod.get("ear.appraisal-policy-id").and_then(Value::as_str);
        let policy = policy.ok_or(VerifyError::TokenMalformed("a submodule without policy"))?.to_owned();
        if !found_policies.contains(&policy) {
            found_policies.push(policy);
        }
        let evidence = evidence_of(submod)?;
        let mut is_bound = false;
        // Evidence of a device that is bound to something must be bound to this peer.
        if let Some(bound) = evidence.get("runtime_data_claims").filter(|b| !b.is_null()) {
            if !json_contains(bound, expected.runtime_data) {
                return Err(VerifyError::TokenRuntimeData);
            }
            is_bound = true;
        }
        let named: Vec<_> = evidence.keys().filter(|k| !NOT_A_TEE.contains(&k.as_str())).cloned().collect();
        let [tee] = &named[..] else { return Err(VerifyError::TokenMalformed("not one TEE a submodule")) };
        if is_sample_tee(tee) && !expected.allow_sample {
            return Err(VerifyError::SampleTeeRefused(tee.clone()));
        }
        if name != "cpu0" && is_bound {
            devices.push(tee.clone());
        }
        tees.push((name == "cpu0", tee.clone()));
    }
    policies(&found_policies, expected.policy_ids)?;
    let sample = tees.iter().any(|(_, t)| is_sample_tee(t));
    let tee = tees.into_iter().find(|(cpu, _)| *cpu).map(|(_, t)| t);
    let tee = tee.ok_or(VerifyError::TokenMalformed("no submodule cpu0"))?;
    Ok(Verdict {
        claims: claims::of_submod(submods.get("cpu0"), cpu.get(&tee)),
        status: "affirming".into(),
        devices,
        tee,
        policy_ids: found_policies,
        verifier: "as".into(),
        trust_anchor: trust_anchor.into(),
        sample,
        appraised_at: now,
        expires_at,
    })
}

fn affirming(name: &str, submod: &Value) -> Result<(), VerifyError> {
    match submod.get("ear.status").and_then(Value::as_str) {
        Some("affirming") => Ok(()),
        Some("none") => Err(VerifyError::TokenStatusNone(name.into())),
        Some("warning") => Err(VerifyError::TokenStatusWarning(name.into())),
        Some("contraindicated") => Err(VerifyError::TokenStatusContraindicated(name.into())),
        _ => Err(VerifyError::TokenMalformed("a submodule without a known status")),
    }
}

/// Every policy that is wanted was used, and none besides.
fn policies(found: &[String], wanted: &[String]) -> Result<(), VerifyError> {
    let default = ["default".to_owned()];
    let wanted = if wanted.is_empty() { &default[..] } else { wanted };
    if wanted.iter().all(|w| found.contains(w)) && found.iter().all(|f| wanted.contains(f)) {
        return Ok(());
    }
    let (wanted, found) = (wanted.to_vec(), found.to_vec());
    Err(match found.len() {
        0 | 1 => VerifyError::TokenPolicy { wanted, found },
        _ => VerifyError::TokenPolicyMixed { wanted, found },
    })
}

#[cfg(test)]
mod tests;
