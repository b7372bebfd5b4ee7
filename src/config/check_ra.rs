//! `no_ra`, `[*.attest]` and `[*.verify]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::check_attest::attest_of;
use super::diagnostics::{Sink, quote, suggest};
use super::raw::{RawEndpoint, RawVerify};
use super::reader::{At, Free, Hidden};
use super::values::duration;
use super::{AsRest, Model, Ra, Side, Verify, VerifyProvider};

const DEFAULT_VERDICT_TTL: Duration = Duration::from_secs(300);
const DEFAULT_AS_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_PEM: u64 = 1 << 20;
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
    Some(Ra { attest: attest?, verify: verify? })
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
    let anchors_only = passport && v.as_addr.is_none() && v.trusted_certs.is_some();
    let default = if v.as_addr.is_some() || anchors_only { "as" } else { "" };
    let provider = choice(v.provider.as_ref(), default, &["as", "sample"], &["builtin"], sink)?;
    let (provider, policy_ids) = if provider == "sample" {
        let as_only = [
            ("as_addr", v.as_addr.as_ref().map(|a| &a.at)),
            ("as_type", v.as_type.as_ref().map(|a| &a.at)),
            ("policy_ids", v.policy_ids.as_ref().map(|a| &a.at)),
            ("trusted_certs", v.trusted_certs.as_ref().map(|a| &a.at)),
            ("as_headers", v.as_headers.as_ref().map(|a| &a.at)),
            ("as_insecure", v.as_insecure.as_ref().map(|a| &a.at)),
            ("as_timeout", v.as_timeout.as_ref().map(|a| &a.at)),
        ];
        for (key, at) in as_only.into_iter().filter_map(|(key, at)| Some((key, at?))) {
            let message = format!("`{key}` with provider = \"sample\", which asks no attestation service");
            sink.error(at, "contradiction", message, format!("remove `{key}`, or use provider = \"as\""));
        }
        if !allow_sample {
            let message = "provider = \"sample\" without allow_sample = true: every peer will be refused";
            sink.warn(&raw.at, "sample", message, "add allow_sample = true for a trial, or use provider = \"as\"");
        }
        if let Some(at) = v.model.as_ref().map(|m| &m.at).filter(|_| passport) {
            let message = "model = \"passport\" with provider = \"sample\", which checks no tokens";
            sink.error(at, "contradiction", message, "remove `model`, or use provider = \"as\"");
        }
        (Some(VerifyProvider::Sample), Some(Vec::new()))
    } else if anchors_only && !sink.is_written(&raw.at, "as_addr") {
        super::check_passport::no_service(v, sink);
        let policies = v.policy_ids.as_ref().map_or(Some(vec!["default".to_owned()]), |a| policies(a, sink));
        let certs = v.trusted_certs.as_ref().and_then(|a| trusted_certs(a, sink));
        (certs.map(VerifyProvider::Anchors), policies)
    } else {
        let policies = v.policy_ids.as_ref().map_or(Some(vec!["default".to_owned()]), |a| policies(a, sink));
        (attestation_service(raw, sink).map(VerifyProvider::As), policies)
    };
    Some(Verify { provider: provider?, policy_ids: policy_ids?, allow_sample, verdict_ttl: ttl?, model: model? })
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

pub(super) fn attestation_service(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<AsRest> {
    let v = &raw.value;
    let kind = choice(v.as_type.as_ref(), "rest", &["rest"], &["grpc"], sink);
    let timeout =
        duration(v.as_timeout.as_ref(), DEFAULT_AS_TIMEOUT, Duration::from_millis(1), Duration::from_secs(300), sink);
    let addr = match &v.as_addr {
        Some(addr) => as_url(addr, v, sink),
        None if sink.is_written(&raw.at, "as_addr") => None,
        None => {
            let hint = "add as_addr = \"http://127.0.0.1:8080/\", or provider = \"sample\" for a trial";
            sink.error(&raw.at, "missing", "`as_addr` is missing: who appraises the peer?", hint);
            None
        }
    };
    let headers = v.as_headers.as_ref().map_or(Some(Vec::new()), |a| headers(&a.value, sink));
    let certs = v.trusted_certs.as_ref().map_or(Some(Vec::new()), |a| trusted_certs(a, sink));
    kind?;
    Some(AsRest { addr: addr?, headers: headers?, trusted_certs: certs?, timeout: timeout? })
}

fn as_url(raw: &At<String>, v: &RawVerify, sink: &mut Sink<'_>) -> Option<url::Url> {
    let example = "write for example \"http://127.0.0.1:8080/\" or \"https://as.example/\"";
    let at = &raw.at;
    let mut url = match url::Url::parse(&raw.value) {
        Ok(url) => url,
        Err(e) => {
            // Not the value: what does not parse may still hold a password.
            sink.error(at, "bad-url", format!("`as_addr` is not a URL: {e}"), example);
            return None;
        }
    };
    if !url.username().is_empty() || url.password().is_some() {
        let hint = "put credentials into `as_headers`";
        sink.error(at, "bad-url", "`as_addr` holds a user name or password", hint);
        return None;
    }
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        sink.error(at, "bad-url", format!("{} is not an http or https URL", quote(&raw.value)), example);
        return None;
    }
    if url.query().is_some() || url.fragment().is_some() {
        // Not the value: a query may hold a token.
        sink.error(at, "bad-url", "`as_addr` has a query or fragment", "only scheme, host, port and path");
        return None;
    }
    let exposed = url.scheme() == "http" && !is_loopback(&url);
    let insecure = v.as_insecure.as_ref().filter(|a| a.value);
    match insecure {
        None if exposed => {
            let message = format!(
                "{} is plain http off this host: anyone on the path could read evidence and forge anchors",
                quote(&raw.value)
            );
            sink.error(at, "as-insecure", message, "use https, or set as_insecure = true and live with it");
            return None;
        }
        Some(a) if exposed => {
            let message = format!("as_insecure = true: {} is asked in plain http", quote(&raw.value));
            sink.warn(&a.at, "as-insecure", message, "use https, and `trusted_certs` for the token's signer");
        }
        Some(a) => {
            let message = format!("as_insecure has no effect on {}", quote(&raw.value));
            sink.warn(&a.at, "no-effect", message, "remove `as_insecure`");
        }
        None => {}
    }
    // A base without its slash would lose its last part when a request path is joined to it.
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Some(url)
}

/// Whether the host of `url` is this one.
pub(super) fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(a)) => a.is_loopback(),
        Some(url::Host::Ipv6(a)) => a.is_loopback(),
        Some(url::Host::Domain(d)) => d == "localhost",
        None => false,
    }
}

fn headers(raw: &Free<Hidden>, sink: &mut Sink<'_>) -> Option<Vec<(String, String)>> {
    let mut checked = Vec::new();
    for (name, value) in raw {
        let known = hyper::header::HeaderName::from_bytes(name.value.as_bytes());
        let managed = ["host", "content-length", "content-type", "transfer-encoding", "connection"];
        if known.is_err() {
            let message = format!("{} is not a header name", quote(&name.value));
            sink.error(&name.at, "bad-header", message, "RFC 9110 tokens: letters, digits and -");
        } else if managed.contains(&name.value.to_ascii_lowercase().as_str()) {
            let message = format!("header {} is set by the client itself", quote(&name.value));
            sink.error(&name.at, "bad-header", message, "remove it");
        } else if hyper::header::HeaderValue::from_str(&value.value.0).is_err() {
            let message = format!("the value of header {} holds control characters", quote(&name.value));
            sink.error(&value.at, "bad-header", message, "one line of visible characters");
        } else {
            checked.push((name.value.clone(), value.value.0.clone()));
        }
    }
    (checked.len() == raw.len()).then_some(checked)
}

fn trusted_certs(raw: &At<Vec<At<String>>>, sink: &mut Sink<'_>) -> Option<Vec<PathBuf>> {
    if raw.value.is_empty() {
        let message = "`trusted_certs` is empty: no token would be trusted";
        sink.error(&raw.at, "empty", message, "name a PEM file, or remove the key to ask the service for its anchors");
        return None;
    }
    let mut paths = Vec::new();
    for At { value, at } in &raw.value {
        match pem_file(Path::new(value)) {
            Ok(()) => paths.push(PathBuf::from(value)),
            Err((why, hint)) => sink.error(at, "bad-certificate", format!("{} {why}", quote(value)), hint),
        }
    }
    (paths.len() == raw.value.len()).then_some(paths)
}

/// Whether a file holds PEM certificates and nothing that cannot be read.
fn pem_file(path: &Path) -> Result<(), (String, &'static str)> {
    if !path.is_absolute() {
        return Err(("is not an absolute path".into(), "write the whole path: \"/etc/tng/as-ca.pem\""));
    }
    let readable = "the file must exist and the user `tng` must be able to read it";
    let meta = std::fs::metadata(path).map_err(|e| (format!("cannot be read: {e}"), readable))?;
    if !meta.is_file() || meta.len() > MAX_PEM {
        return Err(("is not a regular file of at most 1 MiB".into(), "name one PEM file"));
    }
    let bytes = std::fs::read(path).map_err(|e| (format!("cannot be read: {e}"), readable))?;
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
