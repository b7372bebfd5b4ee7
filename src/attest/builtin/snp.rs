//! Appraisal of SEV-SNP reports.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Mutex;

use base64::prelude::{BASE64_STANDARD, Engine};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tokio::sync::Semaphore;

use super::amd::{self, Root};
use super::fetch::Fetcher;
use super::snp_report::{Report, Tcb};
use super::{BuiltinError, Finding, Look, cert_table};
use crate::config::Seen;
use crate::os::clock::Clock;
use crate::os::lock::Lock;

/// Certificates of chips kept that the key distribution service gave.
const MAX_KEPT: usize = 256;
/// Requests to the key distribution service at once. Anybody can show a report of a chip that does not exist, and the
/// service refuses who asks too often.
const MAX_ASKING: usize = 4;
/// Bit of the guest policy that lets the host debug.
const POLICY_DEBUG: u64 = 1 << 19;

/// Appraises reports.
pub struct Snp {
    roots: Vec<Root>,
    files: Vec<Vec<u8>>,
    kds: Option<Fetcher>,
    kept: Mutex<HashMap<String, Vec<u8>>>,
    asking: Semaphore,
}

/// A report and the certificates shown with it.
struct Shown {
    report: Report,
    certificates: Vec<Vec<u8>>,
}

impl Snp {
    /// Reads the certificate files.
    pub fn new(roots: Vec<Root>, files: &[PathBuf], kds: Option<Fetcher>) -> Result<Self, String> {
        let mut certificates = Vec::new();
        for file in files {
            let at = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
            let text = std::fs::read(file).map_err(|e| at(&e))?;
            for der in CertificateDer::pem_slice_iter(&text) {
                certificates.push(der.map_err(|e| at(&e))?.to_vec());
            }
        }
        Ok(Self { roots, files: certificates, kds, kept: Mutex::default(), asking: Semaphore::new(MAX_ASKING) })
    }

    /// Requests to the key distribution service.
    pub fn calls(&self) -> u64 {
        self.kds.as_ref().map_or(0, Fetcher::calls)
    }

    /// What the report says, once its signature and chain were verified.
    pub async fn appraise(&self, evidence: &[u8], clock: &dyn Clock) -> Result<Finding, BuiltinError> {
        let Shown { report, certificates } = shown(evidence)?;
        let endorsed = match (report.signing_key(), self.offline(&report, &certificates, clock)) {
            (amd::VCEK, Ok(None)) => self.online(&report, clock).await?,
            (amd::VLEK, Ok(None)) => {
                let why = "AMD's service gives none of a provider's key (VLEK): the peer's host must".to_owned();
                return Err(BuiltinError::NoEndorsement(why));
            }
            // The host gives the provider's certificate, and not always its issuer's.
            (amd::VLEK, Err(BuiltinError::ReportChain(_))) if self.kds.is_some() => {
                self.issued(&report, &certificates, clock).await?
            }
            (amd::VCEK | amd::VLEK, Ok(Some(endorsed))) => endorsed,
            (amd::VCEK | amd::VLEK, Err(e)) => return Err(e),
            _ => return Err(BuiltinError::ReportChain("the report is signed neither by a VCEK nor by a VLEK")),
        };
        Ok(finding(&report, &endorsed))
    }

    /// With the evidence's certificates and the files'. `None`: there is none of a chip.
    fn offline(
        &self,
        report: &Report,
        shown: &[Vec<u8>],
        clock: &dyn Clock,
    ) -> Result<Option<amd::Endorsed>, BuiltinError> {
        // Authorities of the files serve whatever certificate it is.
        let room = amd::MAX_CERTIFICATES.saturating_sub(shown.len() + 1);
        let authorities = self.files.iter().filter(|file| amd::is_authority(file)).take(room);
        let known: Vec<Vec<u8>> = shown.iter().chain(authorities).cloned().collect();
        if amd::names_chip(shown) {
            return amd::endorse(report, &known, &self.roots, clock.now()).map(Some);
        }
        for certificate in self.files.iter().filter(|file| !amd::is_authority(file)) {
            let mut candidates = known.clone();
            candidates.push(certificate.clone());
            match amd::endorse(report, &candidates, &self.roots, clock.now()) {
                // A file of another chip's is no fault of this one.
                Err(BuiltinError::Endorsement(_) | BuiltinError::ReportChain(_)) => {}
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    /// With the issuers of providers' keys (ASVK) that AMD's service gives.
    async fn issued(
        &self,
        report: &Report,
        shown: &[Vec<u8>],
        clock: &dyn Clock,
    ) -> Result<amd::Endorsed, BuiltinError> {
        let mut last = BuiltinError::ReportChain("it does not end in a root of AMD's");
        let Some(kds) = &self.kds else { return Err(last) };
        for product in products(report) {
            let path = format!("vlek/v1/{product}/cert_chain");
            let chain = match self.certificate(kds, &path).await {
                Ok(chain) => chain,
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            // The root with it is left: ours are compiled in.
            let issuers = CertificateDer::pem_slice_iter(&chain).filter_map(Result::ok).take(2).map(|der| der.to_vec());
            let candidates: Vec<Vec<u8>> = shown.iter().cloned().chain(issuers).collect();
            match amd::endorse(report, &candidates, &self.roots, clock.now()) {
                Ok(endorsed) => {
                    self.keep(path, chain);
                    return Ok(endorsed);
                }
                Err(e @ BuiltinError::ReportChain(_)) => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }

    /// Keeps what AMD's service gave and what then verified: its limit of requests is why.
    fn keep(&self, path: String, given: Vec<u8>) {
        let mut kept = self.kept.locked();
        if kept.len() >= MAX_KEPT && !kept.contains_key(&path) {
            kept.clear();
        }
        kept.insert(path, given);
    }

    fn kept(&self, path: &str) -> Option<Vec<u8>> {
        self.kept.locked().get(path).cloned()
    }

    /// The certificate at `path` of the service, from memory if it was there before.
    async fn certificate(&self, kds: &Fetcher, path: &str) -> Result<Vec<u8>, BuiltinError> {
        if let Some(kept) = self.kept(path) {
            return Ok(kept);
        }
        let place = self.asking.acquire().await;
        let _place = place.map_err(|_| BuiltinError::NoEndorsement("this side ends".into()))?;
        // Who waited finds what another brought.
        match self.kept(path) {
            Some(kept) => Ok(kept),
            None => Ok(kds.get(path).await?.1.to_vec()),
        }
    }

    /// With the certificate that AMD's service gives for the chip.
    async fn online(&self, report: &Report, clock: &dyn Clock) -> Result<amd::Endorsed, BuiltinError> {
        let Some(kds) = &self.kds else {
            return Err(BuiltinError::NoEndorsement("kds_addr is not set".into()));
        };
        if report.chip_id() == [0; 64] {
            return Err(BuiltinError::NoEndorsement("the host masks the chip's identity".into()));
        }
        let mut last = BuiltinError::NoEndorsement("the chip's generation is unknown".into());
        for product in products(report) {
            let path = kds_path(report, product);
            let certificate = match self.certificate(kds, &path).await {
                Ok(certificate) => certificate,
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            let endorsed = amd::endorse(report, std::slice::from_ref(&certificate), &self.roots, clock.now())?;
            self.keep(path, certificate);
            return Ok(endorsed);
        }
        Err(last)
    }
}

/// Generations to ask for, the likely one first (CPUID families: AMD 56860, table 23).
fn products(report: &Report) -> Vec<&'static str> {
    match report.cpu() {
        Some((0x19, 0x00..=0x0f)) => vec!["Milan"],
        Some((0x19, 0x10..=0x1f | 0xa0..=0xaf)) => vec!["Genoa"],
        Some((0x1a, _)) => vec!["Turin"],
        Some(_) => vec![],
        None => vec!["Milan", "Genoa"],
    }
}

/// Place of a VCEK in the key distribution service (AMD 57230, section 4.1).
fn kds_path(report: &Report, product: &str) -> String {
    let turin = product == "Turin";
    let Tcb { fmc, bootloader, tee, snp, microcode } = report.reported_tcb(turin);
    let id = report.chip_id();
    let id = Seen::Bytes(id[..if turin { 8 } else { 64 }].to_vec());
    let fmc = fmc.map(|n| format!("fmcSPL={n:02}&")).unwrap_or_default();
    format!("vcek/v1/{product}/{id}?{fmc}blSPL={bootloader:02}&teeSPL={tee:02}&snpSPL={snp:02}&ucodeSPL={microcode:02}")
}

/// Reads evidence: JSON with the report as bytes (base64) or as the crate `sev` writes it, and the certificates as
/// that crate's list or as the host's table (base64).
fn shown(evidence: &[u8]) -> Result<Shown, BuiltinError> {
    let json: Value = serde_json::from_slice(evidence).map_err(|_| BuiltinError::Report("the evidence is not JSON"))?;
    let bytes = |v: &Value| v.as_str().and_then(|s| BASE64_STANDARD.decode(s).ok());
    let report = match &json["attestation_report"] {
        Value::String(_) => {
            let raw = bytes(&json["attestation_report"]).ok_or(BuiltinError::Report("not base64"))?;
            Report::from_bytes(&raw)?
        }
        object => Report::from_json(object)?,
    };
    let certificates = match (&json["cert_chain"], &json["auxblob"]) {
        (Value::Array(entries), Value::Null) => listed(entries)?,
        (Value::Null, Value::String(_)) => {
            let blob = bytes(&json["auxblob"]).ok_or(BuiltinError::Report("not base64"))?;
            cert_table::certificates(&blob)?
        }
        (Value::Null, Value::Null) => Vec::new(),
        _ => return Err(BuiltinError::Report("certificates of neither form")),
    };
    Ok(Shown { report, certificates })
}

fn listed(entries: &[Value]) -> Result<Vec<Vec<u8>>, BuiltinError> {
    let malformed = BuiltinError::Report("not a list of certificates");
    if entries.len() > amd::MAX_CERTIFICATES {
        return Err(BuiltinError::Report("too many certificates"));
    }
    let mut found = Vec::new();
    for entry in entries {
        // Roots come from us alone; other kinds are not of a chip.
        if !matches!(entry["cert_type"].as_str(), Some("VCEK" | "VLEK" | "ASK")) {
            continue;
        }
        let byte = |v: &Value| v.as_u64().and_then(|n| u8::try_from(n).ok());
        let der = entry["data"].as_array().and_then(|a| a.iter().map(byte).collect::<Option<Vec<u8>>>());
        found.push(der.ok_or(malformed.clone())?);
    }
    Ok(found)
}

/// What a report says, whoever signed it.
fn fields(report: &Report, tcb: Tcb) -> BTreeMap<&'static str, Seen> {
    let bytes = |b: &[u8]| Seen::Bytes(b.to_vec());
    let number = |n: u8| Seen::Number(n.into());
    let mut seen = BTreeMap::from([
        ("measurement", bytes(&report.measurement())),
        ("host_data", bytes(&report.host_data())),
        ("id_key_digest", bytes(&report.id_key_digest())),
        ("author_key_digest", bytes(&report.author_key_digest())),
        ("family_id", bytes(&report.family_id())),
        ("image_id", bytes(&report.image_id())),
        ("chip_id", bytes(&report.chip_id())),
        // Written as the number is, the highest byte first.
        ("policy", bytes(&report.policy().to_be_bytes())),
        ("platform_info", bytes(&report.platform_info().to_be_bytes())),
        ("vmpl", Seen::Number(report.vmpl().into())),
        ("guest_svn", Seen::Number(report.guest_svn().into())),
        ("tcb_bootloader", number(tcb.bootloader)),
        ("tcb_tee", number(tcb.tee)),
        ("tcb_snp", number(tcb.snp)),
        ("tcb_microcode", number(tcb.microcode)),
    ]);
    if let Some(fmc) = tcb.fmc {
        seen.insert("tcb_fmc", number(fmc));
    }
    seen
}

/// What a report says, without any check of who signed it.
pub fn look(evidence: &[u8]) -> Result<Look, BuiltinError> {
    let Shown { report, certificates } = shown(evidence)?;
    // The layout of the TCB depends on the generation, which a chain would prove.
    let products = products(&report);
    let turin = products == ["Turin"];
    let claims = BTreeMap::from([
        ("report_version".to_owned(), report.version().to_string()),
        ("certificates".to_owned(), certificates.len().to_string()),
        ("product".to_owned(), if products.is_empty() { "unknown".into() } else { products.join(" or ") }),
    ]);
    Ok(Look {
        seen: fields(&report, report.reported_tcb(turin)),
        claims,
        report_data: Some(report.report_data().to_vec()),
        debug: Some(report.policy() & POLICY_DEBUG != 0),
        bound: None,
    })
}

fn finding(report: &Report, endorsed: &amd::Endorsed) -> Finding {
    let mut claims = BTreeMap::from([("product".to_owned(), endorsed.product.to_owned())]);
    if let Some(provider) = &endorsed.provider {
        claims.insert("provider".into(), provider.clone());
    }
    Finding {
        tee: "snp",
        seen: fields(report, endorsed.tcb),
        claims,
        report_data: report.report_data().to_vec(),
        debug: report.policy() & POLICY_DEBUG != 0,
        trust_anchor: format!("AMD ARK-{} (compiled in)", endorsed.product),
        not_after: endorsed.not_after,
    }
}

#[cfg(test)]
#[path = "snp_tests.rs"]
mod tests;
