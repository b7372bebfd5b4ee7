//! `no_ra`, `[*.attest]` and `[*.verify]`.

use std::path::PathBuf;
use std::time::Duration;

use super::check_attest::attest_of;
use super::check_passport::anchors_alone;
use super::check_service::{AS_KEYS, attestation_service, warn_of_no_anchors};
use super::diagnostics::{Sink, quote, suggest};
use super::raw::{RawEndpoint, RawVerify};
use super::reader::At;
use super::values::duration;
use super::{Model, Ra, RegoFile, Side, Verify, VerifyProvider};

const DEFAULT_VERDICT_TTL: Duration = Duration::from_secs(300);
/// As long as a verdict may be reused at most.
const MAX_GRACE: Duration = Duration::from_secs(24 * 3600);
const CONTROL_BYTES_HINT: &str = "1 to 256 printable characters";

pub(super) fn ra(endpoint: &At<RawEndpoint>, side: Side, sink: &mut Sink<'_>) -> Option<Ra> {
    let raw = &endpoint.value;
    let off = raw.no_ra.as_ref().filter(|a| a.value);
    let attested = raw.attest.is_some() || raw.verify.is_some();
    match off {
        Some(no_ra) if attested => {
            let message = "no_ra = true contradicts the `attest` or `verify` beside it";
            sink.error(&no_ra.at, "contradiction", message, "remove `no_ra`, or the attest and verify tables");
        }
        Some(no_ra) => {
            let message = "no_ra = true: nobody knows who is at the other end of this tunnel";
            sink.warn(&no_ra.at, "no-ra", message, "for debugging only; use [*.attest] and [*.verify]");
        }
        None if sink.is_written(&endpoint.at, "attest") || sink.is_written(&endpoint.at, "verify") => {}
        None if !attested => {
            let hint = format!("add [{side}.attest], [{side}.verify] or both; no_ra = true turns attestation off");
            sink.error(&endpoint.at, "no-attestation", "neither `attest` nor `verify`", hint);
            return None;
        }
        None => {}
    }
    if let (Side::Ingress, Some(attest), None) = (side, &raw.attest, &raw.verify) {
        let message = "this ingress shows evidence and asks for none: any host on the path can pose as the peer";
        sink.warn(&attest.at, "peer-unverified", message, "add [ingress.verify]");
    }
    let attest = raw.attest.as_ref().map_or(Some(None), |raw| attest_of(raw, sink).map(Some));
    let verify = raw.verify.as_ref().map_or(Some(None), |raw| verify_of(raw, sink).map(Some));
    let require_session_binding = session_binding(raw, sink);
    let grace = raw.verify.as_ref().and_then(|v| v.value.grace.as_ref());
    let grace = duration(grace, Duration::ZERO, Duration::ZERO, MAX_GRACE, sink);
    Some(Ra { attest: attest?, verify: verify?, require_session_binding, grace: grace? })
}

/// `require_session_binding`, written at the endpoint or in its `verify` table: one setting of the endpoint, since both
/// directions share a connection and its protocol.
fn session_binding(raw: &RawEndpoint, sink: &mut Sink<'_>) -> bool {
    let inner = raw.verify.as_ref().and_then(|v| v.value.require_session_binding.as_ref());
    let outer = raw.require_session_binding.as_ref();
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner.value != outer.value
    {
        let message = "`require_session_binding` says one thing at the endpoint and another in `verify`";
        sink.error(&inner.at, "contradiction", message, "keep the one at the endpoint");
    }
    let wanted = outer.into_iter().chain(inner).find(|a| a.value);
    if let (Some(wanted), Some(_)) = (wanted, raw.no_ra.as_ref().filter(|a| a.value)) {
        let message = "require_session_binding = true with no_ra = true: there is no evidence to bind";
        sink.error(&wanted.at, "contradiction", message, "remove one of the two");
    }
    wanted.is_some()
}

pub(super) fn model(raw: Option<&At<String>>, sink: &mut Sink<'_>) -> Option<Model> {
    let word = choice(raw, "background_check", &["background_check", "passport"], &[], sink)?;
    Some(if word == "passport" { Model::Passport } else { Model::BackgroundCheck })
}

/// A word out of a fixed list; those of later versions are refused in their own words.
pub(super) fn choice<'r>(
    raw: Option<&'r At<String>>,
    default: &'r str,
    now: &[&str],
    later: &[&str],
    sink: &mut Sink<'_>,
) -> Option<&'r str> {
    let Some(At { value, at }) = raw else { return Some(default) };
    if now.contains(&value.as_str()) {
        return Some(value);
    }
    if later.contains(&value.as_str()) {
        let message = format!("{} is not in this version", quote(value));
        sink.error(at, "not-in-this-version", message, format!("use {}", now.join(" or ")));
    } else {
        sink.error(at, "unknown-value", format!("unknown value {}", quote(value)), suggest(value, now));
    }
    None
}

/// `unix:///absolute/path`, as the attestation agent itself writes it.
pub(super) fn socket(raw: &At<String>, sink: &mut Sink<'_>) -> Option<PathBuf> {
    // sun_path holds 108 bytes with the closing NUL.
    let path = raw.value.strip_prefix("unix://").filter(|p| p.starts_with('/') && p.len() < 108);
    let path = path.filter(|p| !p.contains('\0') && !p.ends_with('/'));
    if path.is_none() {
        let message = format!("{} is not the address of a unix socket", quote(&raw.value));
        sink.error(
            &raw.at,
            "bad-address",
            message,
            "unix:// and an absolute path of at most 107 bytes: \"unix:///run/aa.sock\"",
        );
    }
    path.map(PathBuf::from)
}

fn verify_of(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<Verify> {
    let v = &raw.value;
    let model = model(v.model.as_ref(), sink);
    let ttl = Duration::from_secs(24 * 3600);
    let ttl = duration(v.verdict_ttl.as_ref(), DEFAULT_VERDICT_TTL, Duration::ZERO, ttl, sink);
    let allow_sample = v.allow_sample.as_ref().is_some_and(|a| a.value);
    if let Some(allow) = v.allow_sample.as_ref().filter(|a| a.value) {
        let message = "allow_sample = true: a peer that proves nothing is accepted";
        sink.warn(&allow.at, "sample", message, "for trials only; remove it where peers run on a TEE");
    }
    let passport = model == Some(Model::Passport);
    // A token needs no service, only somebody who vouches for its signer.
    let named = v.trusted_certs.is_some() || v.trusted_keys.is_some() || v.trusted_jwks.is_some();
    let anchors_only = passport && v.as_addr.is_none() && named;
    let default = if v.as_addr.is_some() || anchors_only { "as" } else { "" };
    let provider = choice(v.provider.as_ref(), default, &["as", "builtin", "sample"], &[], sink)?;
    if provider != "builtin" {
        for (key, at) in super::check_builtin::keys(v) {
            let message = format!("`{key}` goes with provider = \"builtin\" only");
            sink.error(at, "contradiction", message, format!("remove `{key}`, or use provider = \"builtin\""));
        }
    }
    let rego = super::rego::policy(v, provider, sink);
    let (provider, policy_ids) = if provider != "as" && !provider.is_empty() {
        for (key, at) in AS_KEYS.iter().filter_map(|(key, of)| Some((key, of(v)?))) {
            let message = format!("`{key}` with provider = \"{provider}\", which asks no attestation service");
            sink.error(at, "contradiction", message, format!("remove `{key}`, or use provider = \"as\""));
        }
        if provider == "sample" && !allow_sample {
            let message = "provider = \"sample\" without allow_sample = true: every peer will be refused";
            sink.warn(&raw.at, "sample", message, "add allow_sample = true for a trial, or use provider = \"as\"");
        }
        if let Some(at) = v.model.as_ref().map(|m| &m.at).filter(|_| passport) {
            let message = format!("model = \"passport\" with provider = \"{provider}\", which checks no tokens");
            sink.error(at, "contradiction", message, "remove `model`, or use provider = \"as\"");
        }
        let ids = rego.iter().flatten().map(RegoFile::id).collect();
        match provider {
            "builtin" => (super::check_builtin::builtin(raw, sink).map(VerifyProvider::Builtin), Some(ids)),
            _ => (Some(VerifyProvider::Sample), Some(ids)),
        }
    } else if anchors_only && !sink.is_written(&raw.at, "as_addr") {
        let policies = v.policy_ids.as_ref().map_or(Some(vec!["default".to_owned()]), |a| policies(a, sink));
        (anchors_alone(v, sink).map(VerifyProvider::Anchors), policies)
    } else {
        let policies = v.policy_ids.as_ref().map_or(Some(vec!["default".to_owned()]), |a| policies(a, sink));
        let service = attestation_service(raw, sink);
        if let Some(service) = &service {
            warn_of_no_anchors(service, v, sink);
        }
        (service.map(VerifyProvider::As), policies)
    };
    let (verdict_ttl, model, rego) = (ttl?, model?, rego?);
    Some(Verify { provider: provider?, policy_ids: policy_ids?, allow_sample, verdict_ttl, model, rego })
}

pub(super) fn policies(raw: &At<Vec<At<String>>>, sink: &mut Sink<'_>) -> Option<Vec<String>> {
    if raw.value.is_empty() {
        let message = "`policy_ids` is empty: no appraisal could satisfy it";
        sink.error(&raw.at, "empty", message, "name a policy of the attestation service: [\"default\"]");
        return None;
    }
    let mut ids: Vec<String> = Vec::new();
    for At { value, at } in &raw.value {
        if value.is_empty() || value.len() > 256 || value.chars().any(char::is_control) {
            sink.error(at, "bad-policy", format!("{} is not a policy id", quote(value)), CONTROL_BYTES_HINT);
        } else if ids.contains(value) {
            sink.warn(at, "duplicate", format!("policy {} twice", quote(value)), "remove one of them");
        } else {
            ids.push(value.clone());
        }
    }
    Some(ids)
}
