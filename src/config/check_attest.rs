//! `[*.attest]`: where this side's evidence comes from.

use std::time::Duration;

use super::check_host;
use super::check_passport::passport;
use super::check_ra::{choice, model, socket};
use super::check_service::is_loopback;
use super::diagnostics::{Sink, quote};
use super::raw::RawAttest;
use super::reader::At;
use super::values::duration;
use super::{Attest, AttestProvider, Model};
use crate::attest::host::HostProvider;

/// Certificates that carry evidence live six hours; older evidence would outlive its certificate.
const MAX_REFRESH: Duration = Duration::from_secs(6 * 3600);
const DEFAULT_REFRESH: Duration = Duration::from_secs(600);

pub(super) fn attest_of(raw: &At<RawAttest>, sink: &mut Sink<'_>) -> Option<Attest> {
    let a = &raw.value;
    let model = model(a.model.as_ref(), sink);
    let refresh = duration(a.refresh_interval.as_ref(), DEFAULT_REFRESH, Duration::ZERO, MAX_REFRESH, sink);
    let default = match (&a.aa_addr, &a.asr_addr) {
        (Some(_), _) => "aa",
        (None, Some(_)) => "asr",
        (None, None) => "",
    };
    let word = choice(a.provider.as_ref(), default, &["aa", "asr", "tsm", "tpm", "sample"], &[], sink)?;
    foreign_keys(word, a, sink);
    check_host::misplaced(raw, word, sink);
    let provider = match word {
        "sample" => {
            let message = "provider = \"sample\": this evidence proves nothing";
            let hint = "for trials only; on a TEE name the attestation agent in `aa_addr`";
            sink.warn(&raw.at, "sample", message, hint);
            Some(AttestProvider::Sample)
        }
        "tsm" => check_host::provider(raw, HostProvider::Tsm, sink),
        "tpm" => check_host::provider(raw, HostProvider::Tpm, sink),
        "asr" => api_server(raw, sink).map(|addr| AttestProvider::Asr { addr }),
        _ => match &a.aa_addr {
            Some(addr) => socket(addr, sink).map(|socket| AttestProvider::Aa { socket }),
            None if sink.is_written(&raw.at, "aa_addr") || sink.is_written(&raw.at, "asr_addr") => None,
            None => {
                let hint = "add aa_addr = \"unix:///run/confidential-containers/attestation-agent/\
                            attestation-agent.sock\", or provider = \"sample\" for a trial";
                sink.error(&raw.at, "missing", "`aa_addr` is missing: where does the evidence come from?", hint);
                None
            }
        },
    };
    let passport = passport(raw, model == Some(Model::Passport), sink);
    model?;
    let additional_evidence = a.additional_evidence.as_ref().is_some_and(|a| a.value);
    Some(Attest { provider: provider?, refresh_interval: refresh?, additional_evidence, passport: passport? })
}

/// Keys that belong to another provider than `word`.
fn foreign_keys(word: &str, a: &RawAttest, sink: &mut Sink<'_>) {
    let agent = ["aa", "asr", ""].contains(&word);
    let keys = [
        ("aa_addr", a.aa_addr.as_ref().map(|k| &k.at), word == "aa" || word.is_empty()),
        ("asr_addr", a.asr_addr.as_ref().map(|k| &k.at), word == "asr"),
        ("asr_insecure", a.asr_insecure.as_ref().filter(|k| k.value).map(|k| &k.at), word == "asr"),
        ("additional_evidence", a.additional_evidence.as_ref().filter(|k| k.value).map(|k| &k.at), agent),
    ];
    for (key, at, fits) in keys {
        if let Some(at) = at.filter(|_| !fits) {
            let message = format!("`{key}` with provider = {}", quote(word));
            sink.error(at, "contradiction", message, "remove one of the two");
        }
    }
}

/// The CoCo API server of this host: `http://127.0.0.1:8006`.
fn api_server(raw: &At<RawAttest>, sink: &mut Sink<'_>) -> Option<url::Url> {
    let a = &raw.value;
    let Some(addr) = &a.asr_addr else {
        if !sink.is_written(&raw.at, "asr_addr") {
            let hint = "add asr_addr = \"http://127.0.0.1:8006\"";
            sink.error(&raw.at, "missing", "`asr_addr` is missing: where does the evidence come from?", hint);
        }
        return None;
    };
    let plain = |url: &url::Url| {
        let bare = url.query().is_none() && url.fragment().is_none() && url.path() == "/";
        bare && url.scheme() == "http" && url.has_host() && url.username().is_empty() && url.password().is_none()
    };
    let Some(url) = url::Url::parse(&addr.value).ok().filter(plain) else {
        // Not the value: it may hold a password.
        let message = "`asr_addr` is not an http URL of a host and port alone";
        sink.error(&addr.at, "bad-url", message, "write for example \"http://127.0.0.1:8006\"");
        return None;
    };
    let insecure = a.asr_insecure.as_ref().filter(|a| a.value);
    match (is_loopback(&url), insecure) {
        (false, None) => {
            let message = format!(
                "{} is off this host: its evidence is not this host's, or anyone on the path can change it",
                quote(&addr.value)
            );
            let hint = "name the server of this host, or set asr_insecure = true and live with it";
            sink.error(&addr.at, "asr-insecure", message, hint);
            return None;
        }
        (false, Some(flag)) => {
            let message = format!("asr_insecure = true: {} is asked in plain http", quote(&addr.value));
            sink.warn(&flag.at, "asr-insecure", message, "name the server of this host");
        }
        (true, Some(flag)) => {
            let message = format!("asr_insecure has no effect on {}", quote(&addr.value));
            sink.warn(&flag.at, "no-effect", message, "remove `asr_insecure`");
        }
        (true, None) => {}
    }
    Some(url)
}
