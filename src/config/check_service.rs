//! The Attestation Service of `[*.verify]`: addresses, transport, headers.

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::check_anchors::{pem_files, trusted};
use super::check_ra::choice;
use super::diagnostics::{Place, Sink, quote};
use super::raw::RawVerify;
use super::reader::{At, Free, Hidden};
use super::service::{AsKind, AsService, DEFAULT_AS_TIMEOUT};
use super::values::duration;

/// Addresses of one service; each may cost an appraisal its share of the time.
const MAX_ADDRESSES: usize = 8;
const LONGEST: Duration = Duration::from_secs(300);

/// A key, and where it stands if it is written.
type KeyAt = (&'static str, fn(&RawVerify) -> Option<&Place>);

/// Keys that say something about an attestation service and its tokens.
pub(super) const AS_KEYS: [KeyAt; 10] = [
    ("as_addr", |v| v.as_addr.as_ref().map(|a| &a.at)),
    ("as_type", |v| v.as_type.as_ref().map(|a| &a.at)),
    ("as_ca", |v| v.as_ca.as_ref().map(|a| &a.at)),
    ("policy_ids", |v| v.policy_ids.as_ref().map(|a| &a.at)),
    ("trusted_certs", |v| v.trusted_certs.as_ref().map(|a| &a.at)),
    ("trusted_keys", |v| v.trusted_keys.as_ref().map(|a| &a.at)),
    ("trusted_jwks", |v| v.trusted_jwks.as_ref().map(|a| &a.at)),
    ("as_headers", |v| v.as_headers.as_ref().map(|a| &a.at)),
    ("as_insecure", |v| v.as_insecure.as_ref().map(|a| &a.at)),
    ("as_timeout", |v| v.as_timeout.as_ref().map(|a| &a.at)),
];

pub(super) fn attestation_service(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<AsService> {
    let v = &raw.value;
    let kind = match choice(v.as_type.as_ref(), "", &["rest", "grpc"], &[], sink) {
        Some("rest") => Some(Some(AsKind::Rest)),
        Some("grpc") => Some(Some(AsKind::Grpc)),
        Some(_) => Some(None),
        None => None,
    };
    let timeout = duration(v.as_timeout.as_ref(), DEFAULT_AS_TIMEOUT, Duration::from_millis(1), LONGEST, sink);
    let addrs = addresses(raw, sink);
    if let Some(a) = v.as_insecure.as_ref().filter(|a| a.value)
        && let Some(addrs) = &addrs
    {
        insecure(a, addrs, v, sink);
    }
    let headers = v.as_headers.as_ref().map_or(Some(Vec::new()), |a| headers(&a.value, sink));
    let ca = authorities(v, addrs.as_deref(), sink);
    let trusted = trusted(v, sink);
    Some(AsService { addrs: addrs?, kind: kind?, headers: headers?, ca: ca?, trusted: trusted?, timeout: timeout? })
}

/// A gRPC service whose tokens are checked, and nobody said by whose key.
pub(super) fn warn_of_no_anchors(service: &AsService, v: &RawVerify, sink: &mut Sink<'_>) {
    if let (Some(AsKind::Grpc), Some(at), true) = (service.kind, &v.as_type, service.trusted.is_empty()) {
        let message = "nobody is named who may sign tokens, and not every gRPC service publishes its keys";
        sink.warn(&at.at, "no-anchors", message, "name the signer in trusted_certs, trusted_keys or trusted_jwks");
    }
}

fn addresses(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<Vec<Url>> {
    let Some(list) = &raw.value.as_addr else {
        if !sink.is_written(&raw.at, "as_addr") {
            let hint = "add as_addr = \"http://127.0.0.1:8080/\", or provider = \"sample\" for a trial";
            sink.error(&raw.at, "missing", "`as_addr` is missing: who appraises the peer?", hint);
        }
        return None;
    };
    let entries = &list.value.0;
    if entries.is_empty() || entries.len() > MAX_ADDRESSES {
        let message = format!("`as_addr` names {} addresses", entries.len());
        sink.error(&list.at, "bad-count", message, format!("1 to {MAX_ADDRESSES} addresses of one service"));
        return None;
    }
    let mut urls: Vec<Url> = Vec::new();
    let mut whole = true;
    for entry in entries {
        match url("as_addr", entry, &raw.value, sink).map(base) {
            Some(url) if urls.contains(&url) => {
                let message = format!("address {} twice", quote(&entry.value));
                sink.warn(&entry.at, "duplicate", message, "remove one of them");
            }
            Some(url) => urls.push(url),
            None => whole = false,
        }
    }
    whole.then_some(urls)
}

/// A base without its slash would lose its last part when a request path is joined to it.
fn base(mut url: Url) -> Url {
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    url
}

fn exposed(url: &Url) -> bool {
    url.scheme() == "http" && !is_loopback(url)
}

/// Whether the host of `url` is this one.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(a)) => a.is_loopback(),
        Some(url::Host::Ipv6(a)) => a.is_loopback(),
        Some(url::Host::Domain(d)) => d == "localhost",
        None => false,
    }
}

/// An http or https URL that shows nothing secret, in plain text on this host only.
pub(super) fn url(key: &str, raw: &At<String>, v: &RawVerify, sink: &mut Sink<'_>) -> Option<Url> {
    let example = "write for example \"http://127.0.0.1:8080/\" or \"https://as.example/\"";
    let at = &raw.at;
    let url = match Url::parse(&raw.value) {
        Ok(url) => url,
        Err(e) => {
            // Not the value: what does not parse may still hold a password.
            sink.error(at, "bad-url", format!("`{key}` is not a URL: {e}"), example);
            return None;
        }
    };
    if !url.username().is_empty() || url.password().is_some() {
        let hint = "put credentials into `as_headers`";
        sink.error(at, "bad-url", format!("`{key}` holds a user name or password"), hint);
        return None;
    }
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        sink.error(at, "bad-url", format!("{} is not an http or https URL", quote(&raw.value)), example);
        return None;
    }
    if url.query().is_some() || url.fragment().is_some() {
        // Not the value: a query may hold a token.
        sink.error(at, "bad-url", format!("`{key}` has a query or fragment"), "only scheme, host, port and path");
        return None;
    }
    if exposed(&url) && v.as_insecure.as_ref().is_none_or(|a| !a.value) {
        let message = format!(
            "{} is plain http off this host: anyone on the path could read evidence and forge anchors",
            quote(&raw.value)
        );
        sink.error(at, "as-insecure", message, "use https, or set as_insecure = true and live with it");
        return None;
    }
    Some(url)
}

fn insecure(a: &At<bool>, addrs: &[Url], v: &RawVerify, sink: &mut Sink<'_>) {
    let set = v.trusted_jwks.as_ref().map_or(&[][..], |l| &l.value.0);
    let sets = set.iter().filter_map(|s| Url::parse(&s.value).ok());
    let plain: Vec<String> = addrs.iter().cloned().chain(sets).filter(exposed).map(|url| quote(url.as_str())).collect();
    if plain.is_empty() {
        let shown: Vec<String> = addrs.iter().map(|url| quote(url.as_str())).collect();
        let message = format!("as_insecure has no effect on {}", shown.join(", "));
        sink.warn(&a.at, "no-effect", message, "remove `as_insecure`");
    } else {
        let message = format!("as_insecure = true: {} is asked in plain http", plain.join(", "));
        sink.warn(&a.at, "as-insecure", message, "use https, and `trusted_certs` for the token's signer");
    }
}

fn authorities(v: &RawVerify, addrs: Option<&[Url]>, sink: &mut Sink<'_>) -> Option<Vec<PathBuf>> {
    let Some(list) = &v.as_ca else { return Some(Vec::new()) };
    if list.value.0.is_empty() {
        let hint = "name a PEM file, or remove the key to use the system's authorities";
        sink.error(&list.at, "empty", "`as_ca` is empty: no certificate of the service would be trusted", hint);
        return None;
    }
    if addrs.is_some_and(|a| a.iter().all(|url| url.scheme() != "https")) {
        let message = "as_ca has no effect: no address of the service is https";
        sink.warn(&list.at, "no-effect", message, "the signer of tokens is named by `trusted_certs`");
    }
    pem_files(&list.value.0, sink)
}

fn headers(raw: &Free<Hidden>, sink: &mut Sink<'_>) -> Option<Vec<(String, String)>> {
    let mut checked = Vec::new();
    for (name, value) in raw {
        let known = hyper::header::HeaderName::from_bytes(name.value.as_bytes());
        let managed = ["host", "content-length", "content-type", "transfer-encoding", "connection", "te"];
        // "grpc-" belongs to the protocol (gRPC over HTTP/2, \"Custom-Metadata\").
        if known.is_err() {
            let message = format!("{} is not a header name", quote(&name.value));
            sink.error(&name.at, "bad-header", message, "RFC 9110 tokens: letters, digits and -");
        } else if managed.contains(&name.value.to_ascii_lowercase().as_str())
            || name.value.to_ascii_lowercase().starts_with("grpc-")
        {
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
