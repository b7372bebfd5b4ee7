//! Why the host made no evidence.

use serde::{Deserialize, Serialize};

/// Why the host made no evidence. It crosses the helper's socket as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostError {
    /// Nobody listens on the helper's socket, or the caller may not connect.
    #[error("evidence helper unreachable at {0}")]
    HelperUnreachable(String),
    /// It gave no answer in time.
    #[error("evidence helper did not answer within the deadline")]
    HelperTimeout,
    /// It answered something else.
    #[error("evidence helper sent garbage: {0}")]
    HelperGarbage(String),
    /// It does not understand the request, or will not serve it.
    #[error("evidence helper refused the request: {0}")]
    HelperRefused(String),
    /// There is no configfs-tsm, or nothing behind it.
    #[error("no TEE report interface at {0}")]
    TsmAbsent(String),
    /// It failed.
    #[error("TEE report interface failed: {0}")]
    TsmFailed(String),
    /// Somebody else wrote to each entry that was made.
    #[error("somebody else writes to our report entries")]
    TsmContended,
    /// A TEE that this version cannot put into evidence.
    #[error("TEE report provider `{0}` is not one of tdx_guest, sev_guest")]
    TsmProvider(String),
    /// Not a report of that TEE, or over other data.
    #[error("the kernel's report is not one: {0}")]
    TsmReport(String),
    /// No TPM answers.
    #[error("TPM unreachable at {0}")]
    TpmUnreachable(String),
    /// It gave no answer in time.
    #[error("TPM did not answer within the deadline")]
    TpmTimeout,
    /// It refused a command.
    #[error("TPM refused: {0}")]
    TpmRefused(String),
    /// Its answer cannot be read.
    #[error("TPM sent garbage: {0}")]
    TpmGarbage(String),
    /// The key cannot vouch for quotes.
    #[error("unfit attestation key: {0}")]
    TpmKey(String),
    /// PCRs changed between reading and quoting, again and again.
    #[error("PCRs are being extended all the time")]
    TpmPcrsChanging,
    /// The work in this process ended without a result.
    #[error("making evidence ended without a result")]
    Internal,
}

impl HostError {
    /// Whether a deadline passed.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::HelperTimeout | Self::TpmTimeout)
    }

    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::HelperUnreachable(_) => "evidence-helper-unreachable",
            Self::HelperTimeout => "evidence-helper-timeout",
            Self::HelperGarbage(_) => "evidence-helper-garbage",
            Self::HelperRefused(_) => "evidence-helper-refused",
            Self::TsmAbsent(_) => "tsm-absent",
            Self::TsmFailed(_) => "tsm-failed",
            Self::TsmContended => "tsm-contended",
            Self::TsmProvider(_) => "tsm-provider",
            Self::TsmReport(_) => "tsm-report",
            Self::TpmUnreachable(_) => "tpm-unreachable",
            Self::TpmTimeout => "tpm-timeout",
            Self::TpmRefused(_) => "tpm-refused",
            Self::TpmGarbage(_) => "tpm-garbage",
            Self::TpmKey(_) => "tpm-key",
            Self::TpmPcrsChanging => "tpm-pcrs-changing",
            Self::Internal => "evidence-internal",
        }
    }
}
