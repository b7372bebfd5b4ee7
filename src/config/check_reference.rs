//! `[[*.verify.reference]]`: what `provider = "builtin"` accepts.

use std::collections::BTreeMap;

use super::check_ra::choice;
use super::diagnostics::{Sink, quote};
use super::raw::{RawReference, RawVerify};
use super::reader::{At, Free, OneOrMore};
use super::{Reference, TpmReference};
use crate::attest::tpm::PCRS;

const EXAMPLE: &str = "add [[*.verify.reference]] with tee = \"tpm\" and ak = \"sha256:...\"; \
                       `tngd evidence --show tpm` on the peer prints one";

/// All reference values; at least one.
pub(super) fn references(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<Vec<Reference>> {
    let Some(list) = raw.value.reference.as_ref().filter(|list| !list.value.is_empty()) else {
        if !sink.is_written(&raw.at, "reference") || raw.value.reference.is_some() {
            sink.error(&raw.at, "missing", "no reference values: every peer would be refused", EXAMPLE);
        }
        return None;
    };
    let checked: Vec<_> = list.value.iter().filter_map(|entry| reference(entry, sink)).collect();
    (checked.len() == list.value.len()).then_some(checked)
}

fn reference(raw: &At<RawReference>, sink: &mut Sink<'_>) -> Option<Reference> {
    if raw.value.tee.is_none() && !sink.is_written(&raw.at, "tee") {
        sink.error(&raw.at, "missing", "`tee` is missing: what is this a reference of?", "add tee = \"tpm\"");
        return None;
    }
    match choice(raw.value.tee.as_ref(), "", &["tpm"], &["tdx", "snp", "sgx"], sink)? {
        "tpm" => tpm(raw, sink).map(Reference::Tpm),
        _ => None,
    }
}

fn tpm(raw: &At<RawReference>, sink: &mut Sink<'_>) -> Option<TpmReference> {
    let ak = match &raw.value.ak {
        Some(At { value, at }) => value.strip_prefix("sha256:").and_then(sha256).or_else(|| {
            let hint = "\"sha256:\" and the 64 hexadecimal digits of the key's SubjectPublicKeyInfo";
            sink.error(at, "bad-digest", format!("{} is not the digest of a key", quote(value)), hint);
            None
        }),
        None => {
            if !sink.is_written(&raw.at, "ak") {
                let message = "`ak` is missing: anybody's TPM would do, and a program that plays one";
                sink.error(&raw.at, "missing", message, "`tngd evidence --show tpm` on the peer prints it");
            }
            None
        }
    };
    let pcrs = raw.value.pcrs.as_ref().map_or(Some(BTreeMap::new()), |p| pcrs(&p.value, sink));
    Some(TpmReference { ak: ak?, pcrs: pcrs? })
}

fn pcrs(raw: &Free<OneOrMore>, sink: &mut Sink<'_>) -> Option<BTreeMap<u8, Vec<[u8; 32]>>> {
    let mut checked = BTreeMap::new();
    let mut good = true;
    for (key, values) in raw {
        let pcr = key.value.parse::<u8>().ok().filter(|n| *n < PCRS && key.value == n.to_string());
        if pcr.is_none() {
            sink.error(&key.at, "out-of-range", format!("{} is no PCR", quote(&key.value)), "0 to 23");
        }
        if values.value.0.is_empty() {
            let message = "no value is allowed for this PCR: every peer would be refused";
            sink.error(&values.at, "empty", message, "name a value, or remove the PCR");
            good = false;
        }
        let mut allowed = Vec::new();
        for At { value, at } in &values.value.0 {
            match sha256(value) {
                Some(digest) => allowed.push(digest),
                None => {
                    let message = format!("{} is not a value of a PCR", quote(value));
                    sink.error(at, "bad-digest", message, "64 hexadecimal digits, as tpm2_pcrread sha256 prints them");
                    good = false;
                }
            }
        }
        match pcr {
            Some(pcr) => drop(checked.insert(pcr, allowed)),
            None => good = false,
        }
    }
    good.then_some(checked)
}

/// 64 hexadecimal digits, in either case.
fn sha256(text: &str) -> Option<[u8; 32]> {
    let text = text.strip_prefix("0x").unwrap_or(text);
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0; 32];
    for (byte, at) in out.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(out)
}
