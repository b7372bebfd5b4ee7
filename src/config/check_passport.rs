//! The passport model of both tables.

use super::Passport;
use super::check_anchors::trusted;
use super::check_ra::policies;
use super::check_service::attestation_service;
use super::diagnostics::Sink;
use super::raw::{RawAttest, RawVerify};
use super::reader::At;
use super::service::{JwksSource, TrustedSigners};

/// The service that turns this side's evidence into a token. `None`: an error was reported.
pub(super) fn passport(raw: &At<RawAttest>, wanted: bool, sink: &mut Sink<'_>) -> Option<Option<Passport>> {
    let a = &raw.value;
    if !wanted {
        let keys = [
            ("as_addr", a.as_addr.as_ref().map(|k| &k.at)),
            ("as_type", a.as_type.as_ref().map(|k| &k.at)),
            ("as_ca", a.as_ca.as_ref().map(|k| &k.at)),
            ("policy_ids", a.policy_ids.as_ref().map(|k| &k.at)),
            ("as_headers", a.as_headers.as_ref().map(|k| &k.at)),
            ("as_insecure", a.as_insecure.as_ref().map(|k| &k.at)),
            ("as_timeout", a.as_timeout.as_ref().map(|k| &k.at)),
        ];
        let mut clean = true;
        for (key, at) in keys.into_iter().filter_map(|(key, at)| Some((key, at?))) {
            let message = format!("`{key}` without model = \"passport\": this side asks no attestation service");
            sink.error(at, "contradiction", message, format!("add model = \"passport\", or remove `{key}`"));
            clean = false;
        }
        return clean.then_some(None);
    }
    if a.as_addr.is_none() && !sink.is_written(&raw.at, "as_addr") {
        let message = "`as_addr` is missing: who turns the evidence into a token?";
        sink.error(&raw.at, "missing", message, "add as_addr = \"http://127.0.0.1:8080/\" to this table");
        return None;
    }
    // The same keys mean the same in both tables.
    let same = RawVerify {
        as_addr: a.as_addr.clone(),
        as_type: a.as_type.clone(),
        as_ca: a.as_ca.clone(),
        as_headers: a.as_headers.clone(),
        as_insecure: a.as_insecure.clone(),
        as_timeout: a.as_timeout.clone(),
        ..RawVerify::default()
    };
    let service = attestation_service(&At { value: same, at: raw.at.clone() }, sink);
    let ids = a.policy_ids.as_ref().map_or(Some(vec!["default".to_owned()]), |ids| policies(ids, sink));
    Some(Some(Passport { service: service?, policy_ids: ids? }))
}

/// Who may sign tokens, without a service: files and pins, since a key set of a URL is a service's.
pub(super) fn anchors_alone(v: &RawVerify, sink: &mut Sink<'_>) -> Option<TrustedSigners> {
    let keys = [
        ("as_type", v.as_type.as_ref().map(|k| &k.at)),
        ("as_ca", v.as_ca.as_ref().map(|k| &k.at)),
        ("as_headers", v.as_headers.as_ref().map(|k| &k.at)),
        ("as_insecure", v.as_insecure.as_ref().map(|k| &k.at)),
        ("as_timeout", v.as_timeout.as_ref().map(|k| &k.at)),
    ];
    for (key, at) in keys.into_iter().filter_map(|(key, at)| Some((key, at?))) {
        let message = format!("`{key}` without `as_addr`: no attestation service is asked");
        sink.error(at, "contradiction", message, format!("add `as_addr`, or remove `{key}`"));
    }
    let trusted = trusted(v, sink)?;
    if let Some(list) = v.trusted_jwks.as_ref().filter(|_| trusted.jwks.iter().any(|j| matches!(j, JwksSource::Url(_))))
    {
        let message = "`trusted_jwks` names a URL without `as_addr`: no service is asked";
        sink.error(&list.at, "contradiction", message, "add `as_addr`, or name a file");
        return None;
    }
    Some(trusted)
}
