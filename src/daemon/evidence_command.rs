//! `tngd evidence`: root's helper, which makes evidence for the data plane. One process serves one connection, so that
//! nothing of a request is left when the next one comes.

use std::fmt::Write as _;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};

use super::confine::confine_to;
use crate::attest::host::tsm::{self, ConfigFs, TsmSettings};
use crate::attest::host::{HostError, HostProvider, HostSource, helper, tpm_evidence};
use crate::attest::tpm::commands::Hierarchy;
use crate::attest::tpm::quote::{AttestationKey, TpmEvidence, TpmSettings};
use crate::attest::tpm::sha256;
use crate::attest::tpm::structures::{KeyAlgorithm, PcrSelection, Quoted};
use crate::attest::tpm::transport::{Connection, TpmAddress};
use crate::os::privileges::{PrivilegeError, give_up};

/// Time for the TPM: less than what the unit and the data plane allow for.
const TPM_TIME: Duration = Duration::from_secs(20);
/// PCRs that the firmware and its settings alone extend; those after them change with each kernel.
const FIRMWARE_PCRS: u8 = 8;

/// Why the helper ended.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceCommandError {
    /// An option has no legal value.
    #[error("{0}")]
    Option(String),
    /// It was not started as a service with a connection.
    #[error(
        "the standard input is no connection ({0}): systemd starts this command; by hand use --show tpm or --show tsm"
    )]
    NoConnection(io::Error),
    /// Rights that are not needed any more could not be given up.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The request did not come, or the answer could not be sent.
    #[error("the connection failed: {0}")]
    Connection(io::Error),
    /// No evidence.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl EvidenceCommandError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Option(_) => "evidence-option",
            Self::NoConnection(_) => "evidence-no-connection",
            Self::Privileges(e) => e.reason(),
            Self::Connection(_) => "evidence-connection",
            Self::Host(e) => e.reason(),
        }
    }

    /// For the shell: 64 for a wrong option.
    pub fn exit_status(&self) -> u8 {
        if matches!(self, Self::Option(_)) { 64 } else { 1 }
    }
}

/// How evidence is made.
#[derive(Debug)]
pub struct EvidenceOptions {
    tsm: TsmSettings,
    tpm: TpmSettings,
}

impl EvidenceOptions {
    /// The command line's options.
    ///
    /// # Errors
    /// One of them has no legal value.
    pub fn new(
        tsm_root: PathBuf,
        address: TpmAddress,
        ak: &str,
        hierarchy: &str,
        pcrs: Vec<u8>,
    ) -> Result<Self, EvidenceCommandError> {
        let wrong = |text: String| EvidenceCommandError::Option(text);
        let hierarchy = match hierarchy {
            "endorsement" => Hierarchy::Endorsement,
            "owner" => Hierarchy::Owner,
            other => return Err(wrong(format!("--tpm-hierarchy {other:?}: use endorsement or owner"))),
        };
        let key = match ak {
            "ecc" => AttestationKey::Primary(hierarchy, KeyAlgorithm::EccP256),
            "rsa" => AttestationKey::Primary(hierarchy, KeyAlgorithm::Rsa2048),
            handle => AttestationKey::persistent(handle)
                .ok_or_else(|| wrong(format!("--tpm-ak {handle:?}: use ecc, rsa, or a handle as 0x81010002")))?,
        };
        let pcrs = match pcrs {
            all if all.is_empty() => PcrSelection::ALL,
            some => PcrSelection::of(some).ok_or_else(|| wrong("--tpm-pcrs: use numbers from 0 to 23".into()))?,
        };
        Ok(Self { tsm: TsmSettings { root: tsm_root }, tpm: TpmSettings { address, key, pcrs } })
    }
}

/// Reads `--show`.
pub fn provider(text: &str) -> Result<HostProvider, String> {
    match text {
        "tsm" => Ok(HostProvider::Tsm),
        "tpm" => Ok(HostProvider::Tpm),
        _ => Err("use tsm or tpm".into()),
    }
}

/// Reads `--tpm-device`.
pub fn tpm_address(text: &str) -> Result<TpmAddress, String> {
    TpmAddress::parse(text).ok_or_else(|| "an absolute path, or unix:// and one".into())
}

/// Serves the connection that is the standard input.
///
/// # Errors
/// See [`EvidenceCommandError`]. A request that gets an answer is none, whatever the answer.
pub fn serve(options: &EvidenceOptions) -> Result<(), EvidenceCommandError> {
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(EvidenceCommandError::NoConnection)?;
    let mut stream = UnixStream::from(input);
    stream.peer_addr().map_err(EvidenceCommandError::NoConnection)?;
    // The device may belong to a group of its own (tss), to which uid 0 comes by CAP_DAC_OVERRIDE alone. It is opened
    // before the first byte of the request is read; then that is given up too.
    let open = || Connection::open(&options.tpm.address, TPM_TIME);
    // A swtpm serves one connection at a time, and a request may never come: its socket is opened afterwards.
    let device = matches!(options.tpm.address, TpmAddress::Device(_)).then(open);
    give_up(None)?;
    confine_to(&options.tsm.root);
    helper::serve(&mut stream, |provider, report_data| match provider {
        HostProvider::Tsm => tsm::evidence(&ConfigFs::new(&options.tsm.root), report_data),
        HostProvider::Tpm => tpm_evidence(&options.tpm, device.unwrap_or_else(open), report_data),
    })
    .map_err(EvidenceCommandError::Connection)
}

/// Evidence over 64 zero bytes, in words: of a TPM as the reference value that peers need, else as JSON.
///
/// # Errors
/// There is none.
pub fn show(options: &EvidenceOptions, provider: HostProvider) -> Result<String, EvidenceCommandError> {
    let source = match provider {
        HostProvider::Tsm => HostSource::Tsm(options.tsm.clone()),
        HostProvider::Tpm => HostSource::Tpm(options.tpm.clone()),
    };
    let made = source.make(&[0; 64], TPM_TIME)?;
    match provider {
        HostProvider::Tsm => Ok(format!("# tee = \"{}\"\n{}\n", made.tee, made.evidence)),
        HostProvider::Tpm => {
            Ok(reference(&made.evidence).ok_or(HostError::TpmGarbage("its evidence cannot be read".into()))?)
        }
    }
}

/// A `[[*.verify.reference]]` block.
fn reference(evidence: &str) -> Option<String> {
    let evidence: TpmEvidence = serde_json::from_str(evidence).ok()?;
    let ak = sha256([&BASE64_STANDARD.decode(&evidence.ak_public).ok()?[..]]);
    let quoted = Quoted::parse(&BASE64_STANDARD.decode(&evidence.tpm_quote.message).ok()?).ok()?;
    let mut out = format!(
        "# reset {}, restart {}, clock {} s{}\n[[ingress.verify.reference]]\ntee = \"tpm\"\nak = \"sha256:",
        quoted.resets,
        quoted.restarts,
        quoted.clock / 1000,
        if quoted.safe { "" } else { " (may have gone back)" },
    );
    ak.iter().try_for_each(|b| write!(out, "{b:02x}")).ok()?;
    out.push_str("\"\n");
    for (pcr, value) in quoted.selection.iter().zip(&evidence.tpm_quote.pcrs) {
        let later = if pcr < FIRMWARE_PCRS { "" } else { "# " };
        writeln!(out, "{later}pcr{pcr} = \"{value}\"").ok()?;
    }
    Some(out)
}
