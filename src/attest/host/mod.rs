//! Evidence that this host makes itself, with no agent: reports of the kernel's configfs-tsm ([`tsm`]) and quotes of a
//! TPM ([`super::tpm`]). Both belong to root, so the data plane asks a helper for them ([`helper`]), which takes report
//! data and nothing else.

mod attester;
mod error;
pub mod helper;
mod snp;
pub mod tsm;

use std::io;
use std::time::Duration;

use super::tpm::commands::Tpm;
use super::tpm::quote::{TpmSettings, evidence};
use super::tpm::transport::Connection;

pub use attester::{DirectAttester, HelperAttester};
pub use error::HostError;
use tsm::{ConfigFs, TsmSettings};

/// Longest evidence made, bytes. A certificate of 64 KiB could not carry more either.
pub const MAX_EVIDENCE: usize = 128 * 1024;

/// What the host itself can attest with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostProvider {
    /// configfs-tsm: TDX, SEV-SNP.
    Tsm,
    /// A TPM.
    Tpm,
}

impl HostProvider {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tsm => "tsm",
            Self::Tpm => "tpm",
        }
    }

    /// Whether evidence of `tee` can be what it made.
    pub fn makes(self, tee: &str) -> bool {
        match self {
            Self::Tsm => matches!(tee, "tdx" | "snp"),
            Self::Tpm => tee == "tpm",
        }
    }
}

/// How the host's evidence is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostSource {
    /// configfs-tsm.
    Tsm(TsmSettings),
    /// A TPM.
    Tpm(TpmSettings),
}

impl HostSource {
    /// Which of the two.
    pub fn provider(&self) -> HostProvider {
        match self {
            Self::Tsm(_) => HostProvider::Tsm,
            Self::Tpm(_) => HostProvider::Tpm,
        }
    }

    /// Makes evidence over `report_data`. Blocks: a TDX quote can take seconds. `deadline` ends what can be ended.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn make(&self, report_data: &[u8; 64], deadline: Duration) -> Result<HostEvidence, HostError> {
        match self {
            Self::Tsm(settings) => tsm::evidence(&ConfigFs::new(&settings.root), report_data),
            Self::Tpm(settings) => tpm_evidence(settings, Connection::open(&settings.address, deadline), report_data),
        }
    }
}

/// Evidence of the TPM behind `connection`, which may have been opened with rights that are gone by now.
///
/// # Errors
/// It could not be opened, or the TPM makes no quote.
pub fn tpm_evidence(
    settings: &TpmSettings,
    connection: io::Result<Connection>,
    report_data: &[u8; 64],
) -> Result<HostEvidence, HostError> {
    let connection = connection.map_err(|e| HostError::TpmUnreachable(format!("{}: {e}", settings.address)))?;
    Ok(HostEvidence { tee: "tpm".into(), evidence: evidence(&mut Tpm(connection), settings, report_data)? })
}

/// Evidence and its TEE.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostEvidence {
    /// kbs-types name.
    pub tee: String,
    /// JSON text as CoCo's agent makes it for this TEE.
    pub evidence: String,
}
