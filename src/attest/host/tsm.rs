//! Reports of the TEE through the kernel's configfs-tsm (Linux 6.7 and later, Documentation/ABI/testing/configfs-tsm-report).
//!
//! A directory made below the root is a request: its attributes `inblob` (report data, written), `outblob` (the report),
//! `auxblob`, `provider` and `generation`, which counts writes, appear with it and go with it.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::json;

use super::{HostError, HostEvidence, snp};

/// Where the kernel has it.
pub const ROOT: &str = "/sys/kernel/config/tsm/report";
/// Entries tried when others write to ours.
const TRIES: usize = 4;
/// Largest attribute taken, bytes: what the kernel allows for.
const MAX_BLOB: usize = 32 * 1024;
/// Largest textual attribute, bytes.
const MAX_TEXT: usize = 64;
/// TDX quote: header, then (version 4) the body, or (version 5) its type and size and the body.
const TDX_BODY: usize = 48;
const TDX_BODY_V5: usize = TDX_BODY + 6;
/// Report data within the body of a TDX quote.
const TDX_REPORT_DATA: usize = 520;

/// How reports are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TsmSettings {
    /// Directory in which entries are made.
    pub root: PathBuf,
}

impl Default for TsmSettings {
    fn default() -> Self {
        Self { root: ROOT.into() }
    }
}

/// What is done to the file system: the seam for tests, which put a kernel behind it.
pub trait ReportFs {
    /// Makes an entry.
    fn make(&self, entry: &str) -> io::Result<()>;
    /// Writes a whole attribute at once.
    fn write(&self, entry: &str, attribute: &str, value: &[u8]) -> io::Result<()>;
    /// Reads a whole attribute; beyond `limit` bytes it is an error.
    fn read(&self, entry: &str, attribute: &str, limit: usize) -> io::Result<Vec<u8>>;
    /// Removes an entry with its attributes.
    fn remove(&self, entry: &str) -> io::Result<()>;
    /// For messages.
    fn root(&self) -> String;
}

/// The real one.
#[derive(Debug)]
pub struct ConfigFs {
    root: PathBuf,
}

impl ConfigFs {
    /// Entries are made in `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }
}

impl ReportFs for ConfigFs {
    fn make(&self, entry: &str) -> io::Result<()> {
        std::fs::create_dir(self.root.join(entry))
    }

    fn write(&self, entry: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
        // Neither created nor truncated: it is an attribute. The kernel takes it over when the file is closed, and
        // says nothing when it does not: the generation tells.
        let mut file = OpenOptions::new().write(true).open(self.root.join(entry).join(attribute))?;
        let count = file.write(value)?;
        if count == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn read(&self, entry: &str, attribute: &str, limit: usize) -> io::Result<Vec<u8>> {
        let mut value = Vec::new();
        let file = OpenOptions::new().read(true).open(self.root.join(entry).join(attribute))?;
        file.take(limit as u64 + 1).read_to_end(&mut value)?;
        if value.len() <= limit { Ok(value) } else { Err(io::ErrorKind::FileTooLarge.into()) }
    }

    fn remove(&self, entry: &str) -> io::Result<()> {
        // Attributes cannot be unlinked; they go with the directory.
        std::fs::remove_dir(self.root.join(entry))
    }

    fn root(&self) -> String {
        self.root.display().to_string()
    }
}

/// What one entry gave.
struct Report {
    provider: String,
    outblob: Vec<u8>,
    auxblob: Vec<u8>,
}

/// Evidence over `report_data`, in the JSON that CoCo's agent makes for the TEE.
///
/// # Errors
/// There is no such interface, it fails, or it gives no report over `report_data`.
pub fn evidence(fs: &dyn ReportFs, report_data: &[u8; 64]) -> Result<HostEvidence, HostError> {
    let report = report(fs, report_data)?;
    match report.provider.as_str() {
        "tdx_guest" => {
            check_tdx(&report.outblob, report_data)?;
            // No event log: with one the evidence would not fit into a certificate.
            let evidence = json!({ "cc_eventlog": null, "quote": BASE64_STANDARD.encode(&report.outblob) });
            Ok(HostEvidence { tee: "tdx".into(), evidence: evidence.to_string() })
        }
        "sev_guest" => {
            let evidence = snp::evidence(&report.outblob, &report.auxblob, report_data)
                .map_err(|what| HostError::TsmReport(what.into()))?;
            Ok(HostEvidence { tee: "snp".into(), evidence })
        }
        other => Err(HostError::TsmProvider(other.escape_debug().to_string())),
    }
}

fn check_tdx(quote: &[u8], report_data: &[u8; 64]) -> Result<(), HostError> {
    let version = quote.get(..2).map(|v| u16::from_le_bytes([v[0], v[1]]));
    let body = match version {
        Some(4) => TDX_BODY,
        Some(5) => TDX_BODY_V5,
        _ => return Err(HostError::TsmReport("a TDX quote of another version than 4 and 5".into())),
    };
    let at = body + TDX_REPORT_DATA;
    match quote.get(at..at + report_data.len()) {
        None => Err(HostError::TsmReport("a TDX quote that is too short".into())),
        Some(found) if found != report_data => Err(HostError::TsmReport("a TDX quote over other data".into())),
        Some(_) => Ok(()),
    }
}

fn report(fs: &dyn ReportFs, report_data: &[u8; 64]) -> Result<Report, HostError> {
    for _ in 0..TRIES {
        let entry = entry_name()?;
        match fs.make(&entry) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            // No configfs, no such directory in it; or (ENXIO) the module is there and no TEE.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENXIO) => {
                return Err(HostError::TsmAbsent(format!("{}: {e}", fs.root())));
            }
            Err(e) => return Err(HostError::TsmFailed(format!("an entry in {} cannot be made: {e}", fs.root()))),
        }
        let outcome = ask(fs, &entry, report_data);
        // Also after a failure: entries stay until somebody removes them.
        let removed = fs.remove(&entry);
        if let Some(report) = outcome? {
            removed.map_err(|e| HostError::TsmFailed(format!("an entry cannot be removed: {e}")))?;
            return Ok(report);
        }
    }
    Err(HostError::TsmContended)
}

/// Names that nobody guesses, so that a stale entry of a process with our number is not in the way.
fn entry_name() -> Result<String, HostError> {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| HostError::Internal)?;
    Ok(format!("tng-{:016x}", u64::from_be_bytes(bytes)))
}

/// Asks through one entry; `None` when somebody else wrote to it meanwhile.
fn ask(fs: &dyn ReportFs, entry: &str, report_data: &[u8; 64]) -> Result<Option<Report>, HostError> {
    let failed = |what: &'static str| {
        move |e: io::Error| match e.raw_os_error() {
            Some(libc::ENXIO) => HostError::TsmAbsent(format!("{what}: {e}")),
            _ => HostError::TsmFailed(format!("{what}: {e}")),
        }
    };
    let generation = || {
        let text = fs.read(entry, "generation", MAX_TEXT).map_err(failed("generation"))?;
        let number = std::str::from_utf8(&text).ok().and_then(|t| t.trim().parse::<u64>().ok());
        number.ok_or_else(|| HostError::TsmFailed("generation is not a number".into()))
    };
    let before = generation()?;
    match fs.write(entry, "inblob", report_data) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
        Err(e) => return Err(failed("inblob")(e)),
    }
    let outblob = match fs.read(entry, "outblob", MAX_BLOB) {
        Ok(outblob) => outblob,
        // Another's write came between ours and this read, or ours was not taken over.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EWOULDBLOCK | libc::EINTR)) => return Ok(None),
        Err(e) => return Err(failed("outblob")(e)),
    };
    let auxblob = match fs.read(entry, "auxblob", MAX_BLOB) {
        Ok(auxblob) => auxblob,
        // Not every provider has one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(failed("auxblob")(e)),
    };
    let provider = fs.read(entry, "provider", MAX_TEXT).map_err(failed("provider"))?;
    if generation()? != before + 1 {
        return Ok(None);
    }
    let provider = String::from_utf8_lossy(&provider).trim().to_owned();
    Ok(Some(Report { provider, outblob, auxblob }))
}

#[cfg(test)]
#[path = "tsm_tests.rs"]
mod tests;
