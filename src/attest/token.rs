//! The token of an attestation service, a JWT (RFC 7519): an EAR as CoCo's trustee signs it, or the `Simple` token of
//! older services and of the openanolis line. Here is who signed it and when; [`ear`] and [`simple`] are what it says.

mod ear;
mod simple;

use std::time::{Duration, SystemTime};

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::anchors::Anchors;
use super::jwk::{Jwk, Key};
use super::{Verdict, VerifyError};
use crate::os::clock::from_unix;

/// How far the service's clock may be ahead. There is no allowance at the end: a verdict must not outlive its token.
pub(crate) const LEEWAY: Duration = Duration::from_secs(60);
/// Texts that name the runtime data of the TEE, one for each form of a token.
const RUNTIME_DATA: [&str; 4] = [
    "/submods/cpu0/ear.veraison.annotated-evidence/runtime_data_claims",
    "/submods/cpu0/ear_verifier_claims/runtime_data",
    "/submods/cpu/ear.veraison.annotated-evidence/runtime_data_claims",
    "/customized_claims/runtime_data",
];

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

/// What a token says, once its signature and its times are good.
struct Said<'a> {
    claims: &'a Map<String, Value>,
    /// In words, whom the trust rests on.
    trust_anchor: &'a str,
    now: SystemTime,
    expires_at: SystemTime,
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
    /// Runtime data of the TEE, where a token has it.
    pub runtime_data: Option<Value>,
    /// The first of its statuses for which every peer refuses it.
    pub status: Option<VerifyError>,
}

/// Looks into `token` without checking anything of it.
///
/// # Errors
/// Not a JWT with an end.
pub fn glance(token: &str) -> Result<Glance, VerifyError> {
    let claims: Value = part(token.split('.').nth(1).unwrap_or_default(), "claims")?;
    let expires_at = claims.get("exp").and_then(Value::as_u64).and_then(from_unix);
    let expires_at = expires_at.ok_or(VerifyError::TokenMalformed("no end"))?;
    let runtime_data = RUNTIME_DATA.iter().find_map(|place| claims.pointer(place)).cloned();
    let issued_at = claims.get("iat").and_then(Value::as_u64).and_then(from_unix);
    let status = ear::status(&claims).and_then(|()| simple::status(&claims)).err();
    Ok(Glance { expires_at, issued_at, runtime_data, status })
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
    let claims: Map<String, Value> = part(payload, "claims")?;
    let expires_at = timely(&claims, now)?;
    let said = Said { claims: &claims, trust_anchor: anchors.origin(), now, expires_at };
    // TNG 2.8 tells them apart alike.
    if claims.contains_key("eat_profile") {
        ear::appraised(&said, expected)
    } else {
        simple::appraised(&said, expected)
    }
}

fn signed(header: &str, payload: &str, signature: &str, anchors: &Anchors, now: SystemTime) -> Result<(), VerifyError> {
    let parsed: Header = part(header, "header")?;
    match parsed.alg.as_str() {
        "ES256" | "RS384" => {}
        none if none.eq_ignore_ascii_case("none") => return Err(VerifyError::TokenAlgNone),
        mac @ ("HS256" | "HS384" | "HS512") => return Err(VerifyError::TokenAlgMac(mac.into())),
        _ => return Err(VerifyError::TokenAlg),
    }
    // RFC 7515 section 4.1.11: what is not understood must be refused, and none is.
    if parsed.crit.is_some() {
        return Err(VerifyError::TokenCritical);
    }
    let fits = |key: &Key| key.algorithm().name() == parsed.alg;
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(signature).map_err(|_| VerifyError::TokenMalformed("signature"))?;
    let message = format!("{header}.{payload}");
    let check = |key: &Key| match (fits(key), key.signed(message.as_bytes(), &bytes)) {
        (false, _) => Err(VerifyError::TokenAlg),
        (true, false) => Err(VerifyError::TokenSignature),
        (true, true) => Ok(()),
    };
    let named = parsed.kid.as_deref().and_then(|kid| anchors.key(kid));
    let confused = || VerifyError::TokenKeyConfusion(shown(parsed.kid.as_deref().unwrap_or_default()));
    match (parsed.jwk.map(own_key).transpose()?, named, &parsed.kid) {
        (Some((_, own)), Some(known), _) if own != *known => Err(confused()),
        (Some((jwk, _)), _, Some(_)) if jwk.kid.is_some() && jwk.kid != parsed.kid => Err(confused()),
        (Some((jwk, own)), ..) => {
            check(&own)?;
            // A key that the token brings along proves nothing until an anchor vouches for it.
            anchors.trust(&jwk, &own, now).map_err(VerifyError::TokenUntrustedSigner)
        }
        (None, Some(known), _) => check(known),
        (None, None, Some(kid)) => {
            Err(VerifyError::TokenUntrustedSigner(format!("key `{}` is in no trusted set", shown(kid))))
        }
        // It neither brings nor names a key: one of the set's, then (RFC 7515, section 6).
        (None, None, None) => {
            let mut keys = anchors.keys().filter(|key| fits(key)).peekable();
            if keys.peek().is_none() {
                return Err(VerifyError::TokenMalformed("no key in the header"));
            }
            let made = keys.any(|key| check(key).is_ok());
            made.then_some(()).ok_or_else(|| VerifyError::TokenUntrustedSigner("no key of the set made it".into()))
        }
    }
}

/// The key that a token brings along.
fn own_key(value: Value) -> Result<(Jwk, Key), VerifyError> {
    let jwk: Jwk = serde_json::from_value(value).map_err(|_| VerifyError::TokenMalformed("no JWK in the header"))?;
    let key = jwk.key().ok_or(VerifyError::TokenMalformed("no P-256 and no RSA key in the header"))?;
    if !jwk.is_for(key.algorithm()) {
        return Err(VerifyError::TokenAlg);
    }
    Ok((jwk, key))
}

/// As much of a stranger's text as a message may hold.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// The end of a token that is of now.
fn timely(claims: &Map<String, Value>, now: SystemTime) -> Result<SystemTime, VerifyError> {
    let time = |name: &str| -> Result<Option<SystemTime>, VerifyError> {
        let Some(value) = claims.get(name) else { return Ok(None) };
        let at = value.as_u64().and_then(from_unix).ok_or(VerifyError::TokenMalformed("a time out of range"))?;
        Ok(Some(at))
    };
    let expires_at = time("exp")?.ok_or(VerifyError::TokenMalformed("no end"))?;
    if expires_at <= now {
        return Err(VerifyError::TokenExpired);
    }
    if time("iat")?.is_some_and(|at| at > now + LEEWAY) {
        return Err(VerifyError::TokenFromFuture);
    }
    if time("nbf")?.is_some_and(|at| at > now + LEEWAY) {
        return Err(VerifyError::TokenNotYetValid);
    }
    Ok(expires_at)
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
mod forms_tests;
#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
