//! `[*.attest]` with `provider = "tsm"` or `"tpm"`: the host's own evidence.

use std::path::PathBuf;

use super::diagnostics::{Place, Sink, quote};
use super::raw::RawAttest;
use super::reader::At;
use super::{AttestProvider, check_ra};
use crate::attest::host::tsm::TsmSettings;
use crate::attest::host::{HostProvider, HostSource, helper};
use crate::attest::tpm::commands::Hierarchy;
use crate::attest::tpm::quote::{AttestationKey, TpmSettings};
use crate::attest::tpm::structures::{KeyAlgorithm, PcrSelection};
use crate::attest::tpm::transport::TpmAddress;

/// Value of `evidence_addr` for evidence made in the data plane's own process.
const DIRECT: &str = "direct";
/// Keys of settings that, with the helper, are the helper's own.
const HELPER_HINT: &str =
    "the helper has its own settings: see TNG_EVIDENCE_OPTIONS in tngd(8); or evidence_addr = \"direct\"";

fn settings(raw: &RawAttest, which: HostProvider) -> Vec<(&'static str, &Place)> {
    let tsm = [("tsm_root", raw.tsm_root.as_ref().map(|a| &a.at))];
    let tpm = [
        ("tpm_device", raw.tpm_device.as_ref().map(|a| &a.at)),
        ("tpm_ak", raw.tpm_ak.as_ref().map(|a| &a.at)),
        ("tpm_hierarchy", raw.tpm_hierarchy.as_ref().map(|a| &a.at)),
        ("tpm_pcrs", raw.tpm_pcrs.as_ref().map(|a| &a.at)),
    ];
    let all: &[_] = match which {
        HostProvider::Tsm => &tsm,
        HostProvider::Tpm => &tpm,
    };
    all.iter().filter_map(|(key, at)| Some((*key, (*at)?))).collect()
}

/// Keys of one provider beside another.
pub(super) fn misplaced(raw: &At<RawAttest>, provider: &str, sink: &mut Sink<'_>) {
    let provider = if provider.is_empty() { "aa" } else { provider };
    for which in [HostProvider::Tsm, HostProvider::Tpm] {
        if provider == which.name() {
            continue;
        }
        for (key, at) in settings(&raw.value, which) {
            let message = format!("`{key}` with provider = {}", quote(provider));
            sink.error(at, "contradiction", message, format!("remove it, or use provider = \"{}\"", which.name()));
        }
    }
    let host = [HostProvider::Tsm.name(), HostProvider::Tpm.name()].contains(&provider);
    if let Some(addr) = raw.value.evidence_addr.as_ref().filter(|_| !host) {
        let message = format!("`evidence_addr` with provider = {}", quote(provider));
        sink.error(&addr.at, "contradiction", message, "remove one of the two");
    }
}

/// The provider, or nothing when something of it was refused.
pub(super) fn provider(raw: &At<RawAttest>, which: HostProvider, sink: &mut Sink<'_>) -> Option<AttestProvider> {
    let r = &raw.value;
    if let Some(addr) = r.evidence_addr.as_ref().filter(|a| a.value != DIRECT) {
        helper_only(r, which, sink);
        return check_ra::socket(addr, sink).map(|socket| AttestProvider::Helper { socket, provider: which });
    }
    if r.evidence_addr.is_none() {
        helper_only(r, which, sink);
        if sink.is_written(&raw.at, "evidence_addr") {
            return None;
        }
        return Some(AttestProvider::Helper { socket: helper::SOCKET.into(), provider: which });
    }
    let source = match which {
        HostProvider::Tsm => HostSource::Tsm(tsm(r, sink)?),
        HostProvider::Tpm => HostSource::Tpm(tpm(r, sink)?),
    };
    Some(AttestProvider::Direct(source))
}

fn helper_only(raw: &RawAttest, which: HostProvider, sink: &mut Sink<'_>) {
    for (key, at) in settings(raw, which) {
        sink.error(at, "contradiction", format!("`{key}` is not for the data plane to choose"), HELPER_HINT);
    }
}

fn tsm(raw: &RawAttest, sink: &mut Sink<'_>) -> Option<TsmSettings> {
    let Some(At { value, at }) = &raw.tsm_root else { return Some(TsmSettings::default()) };
    if !value.starts_with('/') || value.contains('\0') {
        let hint = "write the whole path: \"/sys/kernel/config/tsm/report\"";
        sink.error(at, "bad-address", format!("{} is not an absolute path", quote(value)), hint);
        return None;
    }
    Some(TsmSettings { root: PathBuf::from(value) })
}

fn tpm(raw: &RawAttest, sink: &mut Sink<'_>) -> Option<TpmSettings> {
    let default = TpmSettings::default();
    let address = match &raw.tpm_device {
        None => Some(default.address),
        Some(At { value, at }) => TpmAddress::parse(value).or_else(|| {
            let hint = "the path of a device, \"/dev/tpmrm0\", or the socket of a swtpm, \"unix:///run/swtpm.sock\"";
            sink.error(at, "bad-address", format!("{} is not where a TPM can be", quote(value)), hint);
            None
        }),
    };
    let key = key(raw, sink);
    let pcrs = match &raw.tpm_pcrs {
        None => Some(default.pcrs),
        Some(list) => {
            let numbers: Option<Vec<u8>> = list.value.iter().map(|n| u8::try_from(n.value).ok()).collect();
            numbers.and_then(PcrSelection::of).or_else(|| {
                sink.error(
                    &list.at,
                    "out-of-range",
                    "`tpm_pcrs` is no list of PCRs",
                    "at least one, each from 0 to 23",
                );
                None
            })
        }
    };
    Some(TpmSettings { address: address?, key: key?, pcrs: pcrs? })
}

fn key(raw: &RawAttest, sink: &mut Sink<'_>) -> Option<AttestationKey> {
    let hierarchy = check_ra::choice(raw.tpm_hierarchy.as_ref(), "endorsement", &["endorsement", "owner"], &[], sink);
    let ak = raw.tpm_ak.as_ref().map_or("ecc", |a| a.value.as_str());
    let algorithm = match ak {
        "ecc" => KeyAlgorithm::EccP256,
        "rsa" => KeyAlgorithm::Rsa2048,
        handle => {
            let parsed = AttestationKey::persistent(handle);
            if let (None, Some(At { at, .. })) = (parsed, &raw.tpm_ak) {
                let hint = "\"ecc\", \"rsa\", or a persistent handle as \"0x81010002\"";
                sink.error(at, "unknown-value", format!("{} is no attestation key", quote(handle)), hint);
            }
            if let (Some(_), Some(At { at, .. })) = (parsed, &raw.tpm_hierarchy) {
                let message = "`tpm_hierarchy` with a persistent key, which was made already";
                sink.error(at, "contradiction", message, "remove `tpm_hierarchy`");
            }
            return parsed;
        }
    };
    let hierarchy = if hierarchy? == "owner" { Hierarchy::Owner } else { Hierarchy::Endorsement };
    Some(AttestationKey::Primary(hierarchy, algorithm))
}
