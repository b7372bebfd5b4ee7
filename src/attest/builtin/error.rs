//! Why the appraisal in process refused evidence, or could not be made.

/// Why there is no verdict.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BuiltinError {
    /// The TEE is none of those appraised in process.
    #[error("evidence of TEE `{0}` cannot be appraised in process; use provider = \"as\"")]
    Tee(String),
    /// No quote of the named TEE.
    #[error("the quote is malformed: {0}")]
    Quote(String),
    /// The quote says which platform it is from, and shows no certificate of it.
    #[error(
        "the quote has no certificate of its platform with it (certification data of type {0}): the peer's quote \
         provider must have one, from a PCCS"
    )]
    QuoteWithoutCertificate(u16),
    /// No SEV-SNP report.
    #[error("the SEV-SNP report is malformed: {0}")]
    Report(&'static str),
    /// A signature in the quote is wrong.
    #[error("the quote's signature is wrong: {0}")]
    QuoteSignature(String),
    /// The report is not signed by its certificate's key.
    #[error("the SEV-SNP report's signature is wrong")]
    ReportSignature,
    /// The quote's certificates do not lead to Intel's root, or one is revoked.
    #[error("the quote's certificate chain is not trusted: {0}")]
    QuoteChain(String),
    /// The report's certificates do not lead to an AMD root.
    #[error("the SEV-SNP certificate chain is not trusted: {0}")]
    ReportChain(&'static str),
    /// A certificate of the report's chain is over.
    #[error("a certificate of the SEV-SNP chain has expired: {0}")]
    ReportChainExpired(&'static str),
    /// A certificate of the report's chain is from the future.
    #[error("a certificate of the SEV-SNP chain is not valid yet: {0}; is this host's clock right?")]
    ReportChainNotYetValid(&'static str),
    /// The certificate is of another chip or firmware than the report.
    #[error("the SEV-SNP certificate is about another {0} than the report")]
    Endorsement(&'static str),
    /// No certificate for the report.
    #[error("no certificate for this SEV-SNP report: none in the evidence or in amd_certs, and {0}")]
    NoEndorsement(String),
    /// No collateral for this platform.
    #[error("no collateral for {tee} platforms of FMSPC {fmspc} in `collateral`, and no pccs_addr")]
    NoCollateral {
        /// TEE.
        tee: &'static str,
        /// Family, model, stepping and platform of the CPU, hexadecimal.
        fmspc: String,
    },
    /// Collateral is over.
    #[error("the collateral has expired at {0} (seconds since the epoch)")]
    CollateralExpired(u64),
    /// Collateral is from the future.
    #[error("the collateral is not valid before {0} (seconds since the epoch); is this host's clock right?")]
    CollateralNotYetValid(u64),
    /// Collateral is not what Intel signed.
    #[error("the collateral is not usable: {0}")]
    Collateral(String),
    /// The PCCS or the key distribution service cannot be reached, or answers with an error.
    #[error("{service} at {url}: {problem}")]
    Fetch {
        /// `PCCS` or `KDS`.
        service: &'static str,
        /// What was asked.
        url: String,
        /// What came of it.
        problem: String,
    },
    /// The platform's TCB is revoked.
    #[error("the platform's TCB is revoked")]
    TcbRevoked,
    /// The platform's TCB has a status that is not accepted, or a version below the reference.
    #[error("the platform's TCB is {0}, which verify.minimum_tcb or the reference does not accept")]
    Tcb(String),
    /// The host can read the TEE's memory.
    #[error("the TEE runs in debug mode; verify.allow_debug is not set")]
    Debug,
    /// The TEE has attributes that make its evidence worthless.
    #[error("the TEE's attributes are not acceptable: {0}")]
    Attributes(String),
    /// No reference value for this TEE.
    #[error("no [[*.verify.reference]] for tee = \"{tee}\"; seen: {seen}")]
    NoReference {
        /// TEE.
        tee: &'static str,
        /// The fields of the evidence, as a block writes them.
        seen: String,
    },
    /// No block matches wholly.
    #[error("no [[*.verify.reference]] for tee = \"{tee}\" matches; the nearest differs in {fields}; seen: {seen}")]
    Mismatch {
        /// TEE.
        tee: &'static str,
        /// Fields that differ from the nearest block.
        fields: String,
        /// Their values in the evidence, as a block writes them.
        seen: String,
    },
    /// Refused for a reason of the quote library's own.
    #[error("the quote was refused: {0}")]
    Refused(String),
}

impl BuiltinError {
    /// Whether it is a finding about the peer; the others are about this side's files and services.
    pub fn is_about_peer(&self) -> bool {
        !matches!(
            self,
            Self::NoCollateral { .. }
                | Self::CollateralExpired(_)
                | Self::CollateralNotYetValid(_)
                | Self::Collateral(_)
                | Self::Fetch { .. }
        )
    }

    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Tee(_) => "tee-unsupported",
            Self::Quote(_) => "quote-malformed",
            Self::QuoteWithoutCertificate(_) => "quote-no-certificate",
            Self::Report(_) => "snp-report-malformed",
            Self::QuoteSignature(_) => "quote-signature",
            Self::ReportSignature => "snp-report-signature",
            Self::QuoteChain(_) => "quote-chain",
            Self::ReportChain(_) => "snp-chain",
            Self::ReportChainExpired(_) => "snp-chain-expired",
            Self::ReportChainNotYetValid(_) => "snp-chain-not-yet-valid",
            Self::Endorsement(_) => "snp-endorsement-mismatch",
            Self::NoEndorsement(_) => "snp-endorsement-missing",
            Self::NoCollateral { .. } => "collateral-missing",
            Self::CollateralExpired(_) => "collateral-expired",
            Self::CollateralNotYetValid(_) => "collateral-not-yet-valid",
            Self::Collateral(_) => "collateral-invalid",
            Self::Fetch { .. } => "collateral-unreachable",
            Self::TcbRevoked => "tcb-revoked",
            Self::Tcb(_) => "tcb-out-of-date",
            Self::Debug => "tee-debug",
            Self::Attributes(_) => "tee-attributes",
            Self::NoReference { .. } => "reference-missing",
            Self::Mismatch { .. } => "reference-mismatch",
            Self::Refused(_) => "quote-refused",
        }
    }
}
