//! `[*.verify]` with provider = "builtin".

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

use super::builtin::{Builtin, Kind, Reference, TCB_STATUSES, VOCABULARY, Wanted, from_hex};
use super::diagnostics::{Place, Sink, quote, suggest};
use super::raw::RawVerify;
use super::reader::{At, Free, FromToml, Scalar};
use super::values::duration;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_TIMEOUT: Duration = Duration::from_secs(300);
const MAX_FILE: u64 = 1 << 20;

/// Fields that say which software runs, or whose.
const MEASUREMENTS: &[&str] =
    &["mr_td", "mr_enclave", "mr_signer", "measurement", "id_key_digest", "author_key_digest"];

/// One value or a list of them.
#[derive(Debug, Clone)]
pub(super) struct OneOrMore(Vec<At<Scalar>>);

impl FromToml for OneOrMore {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        if value.is_array() {
            return Vec::from_toml(value, at, sink).map(Self);
        }
        Scalar::from_toml(value, at, sink).map(|value| Self(vec![At { value, at: at.clone() }]))
    }
}

/// The keys that go with this provider alone, and where they are written.
pub(super) fn keys(v: &RawVerify) -> Vec<(&'static str, &Place)> {
    let all = [
        ("collateral", v.collateral.as_ref().map(|a| &a.at)),
        ("pccs_addr", v.pccs_addr.as_ref().map(|a| &a.at)),
        ("minimum_tcb", v.minimum_tcb.as_ref().map(|a| &a.at)),
        ("amd_certs", v.amd_certs.as_ref().map(|a| &a.at)),
        ("kds_addr", v.kds_addr.as_ref().map(|a| &a.at)),
        ("allow_debug", v.allow_debug.as_ref().map(|a| &a.at)),
        ("fetch_timeout", v.fetch_timeout.as_ref().map(|a| &a.at)),
        ("reference", v.reference.as_ref().map(|a| &a.at)),
    ];
    all.into_iter().filter_map(|(key, at)| Some((key, at?))).collect()
}

pub(super) fn builtin(raw: &At<RawVerify>, sink: &mut Sink<'_>) -> Option<Builtin> {
    let v = &raw.value;
    let timeout = duration(v.fetch_timeout.as_ref(), DEFAULT_TIMEOUT, Duration::from_millis(1), MAX_TIMEOUT, sink);
    let allow_debug = v.allow_debug.as_ref().is_some_and(|a| a.value);
    if let Some(allow) = v.allow_debug.as_ref().filter(|a| a.value) {
        let message = "allow_debug = true: a TEE whose host can read its memory is accepted";
        sink.warn(&allow.at, "debug-allowed", message, "for trials only; remove it");
    }
    let written: Vec<_> = v.reference.iter().flat_map(|a| &a.value).filter_map(|r| reference(r, sink)).collect();
    if v.reference.is_none() && v.rego.is_none() {
        let message = "provider = \"builtin\" without [[*.verify.reference]]: every peer will be refused";
        sink.warn(&raw.at, "no-reference", message, "the refusal names what it saw; copy from it what you trust");
    }
    let collateral = v.collateral.as_ref().map_or_else(Vec::new, |a| files(a, collateral_file, sink));
    let amd_certs = v.amd_certs.as_ref().map_or_else(Vec::new, |a| files(a, super::check_anchors::pem_file, sink));
    let pccs_addr = v.pccs_addr.as_ref().and_then(|a| base_url("pccs_addr", a, sink));
    let kds_addr = v.kds_addr.as_ref().and_then(|a| base_url("kds_addr", a, sink));
    let quotes = written.iter().find(|r| ["tdx", "sgx"].contains(&r.tee));
    if let (Some(quotes), None, None) = (quotes, &v.collateral, &v.pccs_addr) {
        let message = format!("reference values for {} and neither `collateral` nor `pccs_addr`", quotes.tee);
        let hint = "add pccs_addr = \"https://api.trustedservices.intel.com/\" or your PCCS, or collateral files";
        sink.error(&raw.at, "missing", message, hint);
    }
    let minimum_tcb = v.minimum_tcb.as_ref().map_or_else(|| vec!["UpToDate".to_owned()], |a| statuses(a, sink));
    let timeout = timeout?;
    (!sink.has_errors_below(&raw.at.path)).then_some(Builtin {
        references: written,
        collateral,
        pccs_addr,
        minimum_tcb,
        amd_certs,
        kds_addr,
        allow_debug,
        timeout,
    })
}

fn statuses(raw: &At<Vec<At<String>>>, sink: &mut Sink<'_>) -> Vec<String> {
    if raw.value.is_empty() {
        let message = "`minimum_tcb` is empty: no quote could satisfy it";
        sink.error(&raw.at, "empty", message, "write for example [\"UpToDate\"]");
    }
    for At { value, at } in &raw.value {
        if value == "Revoked" {
            sink.error(at, "unknown-value", "a revoked TCB is never accepted", "remove it");
        } else if !TCB_STATUSES.contains(&value.as_str()) {
            sink.error(at, "unknown-value", format!("unknown value {}", quote(value)), suggest(value, TCB_STATUSES));
        } else if value.starts_with("OutOfDate") {
            let message = format!("minimum_tcb accepts {value}: platforms with known holes");
            sink.warn(at, "tcb-lax", message, "remove it when the platforms are updated");
        }
    }
    raw.value.iter().map(|a| a.value.clone()).collect()
}

/// One block. Errors are reported for each of its fields.
fn reference(raw: &At<Free<OneOrMore>>, sink: &mut Sink<'_>) -> Option<Reference> {
    let tees: Vec<&str> = VOCABULARY.iter().map(|(tee, _)| *tee).collect();
    let Some((_, tee)) = raw.value.iter().find(|(key, _)| key.value == "tee") else {
        let hint = format!("write tee = \"{}\"", tees.join("\" or \""));
        sink.error(&raw.at, "missing", "`tee` is missing: whose evidence is it about?", hint);
        return None;
    };
    let [At { value: Scalar::Text(name), .. }] = tee.value.0.as_slice() else {
        sink.error(&tee.at, "wrong-type", "`tee` is one name", format!("one of {}", tees.join(", ")));
        return None;
    };
    let Some((tee, fields)) = VOCABULARY.iter().find(|(known, _)| known == name) else {
        sink.error(&tee.at, "unknown-value", format!("unknown value {}", quote(name)), suggest(name, &tees));
        return None;
    };
    let names: Vec<&str> = fields.iter().map(|(field, _)| *field).collect();
    let mut values = BTreeMap::new();
    let mut written = 0;
    for (key, value) in raw.value.iter().filter(|(key, _)| key.value != "tee") {
        written += 1;
        let Some((field, kind)) = fields.iter().find(|(field, _)| *field == key.value) else {
            let message = format!("unknown key {} in a reference of {tee}", quote(&key.value));
            sink.error(&key.at, "unknown-key", message, suggest(&key.value, &names));
            continue;
        };
        if value.value.0.is_empty() {
            sink.error(&value.at, "empty", format!("`{field}` is empty: nothing matches it"), "remove it");
        }
        values.insert(*field, value.value.0.iter().filter_map(|one| wanted(one, field, *kind, sink)).collect());
    }
    if sink.has_errors_below(&raw.at.path) {
        return None;
    }
    if written == 0 {
        let message = format!("a reference without a value accepts every {tee} machine there is");
        sink.error(&raw.at, "empty", message, format!("add a measurement, as {} = \"...\"", names[0]));
        return None;
    }
    if !values.keys().any(|field| MEASUREMENTS.contains(field) || field.starts_with("pcr")) {
        let message = format!("this reference names no measurement: it accepts any software in a {tee} machine");
        sink.warn(
            &raw.at,
            "no-measurement",
            message,
            format!("add for example {} = \"...\"", if *tee == "tpm" { names[1] } else { names[0] }),
        );
    }
    if *tee == "tpm" && !values.contains_key("ak") {
        let message = "`ak` is missing: anybody's TPM would do, and a program that plays one";
        sink.error(&raw.at, "missing", message, "`tngd evidence --show tpm` on the peer prints it");
        return None;
    }
    if *tee == "snp" {
        // Who runs below VMPL 0 is not the guest's owner, unless the operator says so.
        values.entry("vmpl").or_insert_with(|| vec![Wanted::Exactly(0)]);
    }
    Some(Reference { tee, values })
}

fn wanted(raw: &At<Scalar>, field: &str, kind: Kind, sink: &mut Sink<'_>) -> Option<Wanted> {
    let bad = |sink: &mut Sink<'_>, message: String, hint: String| {
        sink.error(&raw.at, "bad-reference", message, hint);
        None
    };
    match (kind, &raw.value) {
        (Kind::Bytes(len), Scalar::Text(text)) => {
            // A key's digest is written with its algorithm, as `ak = "sha256:..."`.
            let text = text.strip_prefix("sha256:").filter(|_| field == "ak").unwrap_or(text);
            let (value, mask) = text.split_once('/').map_or((text, None), |(v, m)| (v, Some(m)));
            let read = |part: &str| from_hex(part).filter(|b| b.len() == len);
            let mask = mask.map_or_else(|| Some(vec![0xff; len]), read);
            match (read(value), mask) {
                (Some(value), Some(mask)) if value.iter().zip(&mask).any(|(v, m)| v & !m != 0) => {
                    let message = format!("`{field}` has bits outside of its mask: they would never be compared");
                    bad(sink, message, "clear them in the value, or set them in the mask".into())
                }
                (Some(_), Some(mask)) if mask.iter().all(|m| *m == 0) => {
                    let message = format!("the mask of `{field}` is zero: nothing would be compared");
                    bad(sink, message, "set the bits that count".into())
                }
                (Some(value), Some(mask)) => Some(Wanted::Bytes { value, mask }),
                _ => {
                    let message = format!("`{field}` = {} is not {len} bytes in hexadecimal", quote(text));
                    bad(sink, message, format!("{} digits, or {} digits, / and a mask as long", 2 * len, 2 * len))
                }
            }
        }
        (Kind::Bytes(len), Scalar::Int(_)) => {
            let message = format!("`{field}` is a number, not {len} bytes in hexadecimal");
            bad(sink, message, format!("{} hexadecimal digits in quotes", 2 * len))
        }
        (Kind::Exactly(max) | Kind::AtLeast(max), Scalar::Int(n)) => match u64::try_from(*n).ok().filter(|n| *n <= max)
        {
            Some(n) if matches!(kind, Kind::Exactly(_)) => Some(Wanted::Exactly(n)),
            Some(n) => Some(Wanted::AtLeast(n)),
            None => bad(sink, format!("`{field}` = {n} is out of range"), format!("0 to {max}")),
        },
        (Kind::Exactly(_) | Kind::AtLeast(_), Scalar::Text(text)) => {
            let message = format!("`{field}` = {} is text, not a number", quote(text));
            bad(sink, message, "write the number without quotes".into())
        }
    }
}

fn files(
    raw: &At<Vec<At<String>>>,
    check: fn(&Path) -> Result<(), (String, &'static str)>,
    sink: &mut Sink<'_>,
) -> Vec<PathBuf> {
    if raw.value.is_empty() {
        sink.error(&raw.at, "empty", "the list of files is empty", "name a file, or remove the key");
    }
    for At { value, at } in &raw.value {
        if let Err((why, hint)) = check(Path::new(value)) {
            sink.error(at, "bad-certificate", format!("{} {why}", quote(value)), hint);
        }
    }
    raw.value.iter().map(|a| PathBuf::from(&a.value)).collect()
}

/// Whether a file holds collateral.
fn collateral_file(path: &Path) -> Result<(), (String, &'static str)> {
    if !path.is_absolute() {
        return Err(("is not an absolute path".into(), "write the whole path: \"/etc/tng/collateral.json\""));
    }
    let readable = "the file must exist and the user `tng` must be able to read it";
    let meta = std::fs::metadata(path).map_err(|e| (format!("cannot be read: {e}"), readable))?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(("is not a regular file of at most 1 MiB".into(), "name one JSON file"));
    }
    let text = std::fs::read(path).map_err(|e| (format!("cannot be read: {e}"), readable))?;
    let form = "JSON with pck_crl, root_ca_crl, tcb_info, qe_identity, their issuer chains and signatures";
    match crate::attest::collateral_problem(&text) {
        Some(problem) => Err((format!("is no collateral: {problem}"), form)),
        None => Ok(()),
    }
}

/// The base URL of a service whose answers are signed, so that plain http is no danger.
fn base_url(key: &str, raw: &At<String>, sink: &mut Sink<'_>) -> Option<url::Url> {
    let example = "write for example \"https://pccs.example/\"";
    let parsed = url::Url::parse(&raw.value).ok().filter(|u| {
        matches!(u.scheme(), "http" | "https")
            && u.has_host()
            && u.username().is_empty()
            && u.password().is_none()
            && u.query().is_none()
            && u.fragment().is_none()
    });
    let Some(mut url) = parsed else {
        // Not the value: what does not parse may still hold a password.
        let message = format!("`{key}` is not an http or https URL of scheme, host, port and path");
        sink.error(&raw.at, "bad-url", message, example);
        return None;
    };
    // A base without its slash would lose its last part when a request path is joined to it.
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Some(url)
}
