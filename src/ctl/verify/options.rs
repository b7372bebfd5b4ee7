//! The command lines.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::tls::Alpn;

/// What is printed and kept.
#[derive(Debug, Clone, Default, Args)]
pub struct OutputOptions {
    /// Print machine-readable JSON
    #[arg(long)]
    pub json: bool,
    /// Print only a block of reference values made from what was seen, to be pasted into a configuration
    #[arg(long, conflicts_with = "json")]
    pub reference: bool,
    /// Write certificate, evidence, token and report into this directory
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// Overwrite files that are there already
    #[arg(long, requires = "save")]
    pub force: bool,
}

/// `tngctl verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyOptions {
    /// Name or address and port of the peer; IPv6 addresses in brackets
    #[arg(value_name = "HOST:PORT")]
    pub target: String,
    /// Act as an endpoint of this instance (/etc/tng/NAME.toml) or file
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["as_addr", "trusted_certs", "allow_sample", "builtin", "policy_id"])]
    pub config: Option<String>,
    /// Which endpoint, if several verify
    #[arg(long, requires = "config")]
    pub endpoint: Option<String>,
    /// Offer this protocol alone
    #[arg(long, value_enum)]
    pub protocol: Option<Protocol>,
    /// Deadline of handshake and appraisal, as 5s; 30s when absent
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// Who appraises.
    #[command(flatten)]
    pub appraisal: AppraisalOptions,
    /// In process.
    #[command(flatten)]
    pub builtin: BuiltinOptions,
    /// What is printed.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// A protocol to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// Evidence bound to the session
    #[value(name = "tng/1")]
    Tng1,
    /// Evidence bound to the certificate
    #[value(name = "rats-tls")]
    RatsTls,
}

impl From<Protocol> for Alpn {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tng1 => Self::Tng1,
            Protocol::RatsTls => Self::RatsTls,
        }
    }
}

/// `tngctl attest`.
#[derive(Debug, Clone, Args)]
pub struct AttestOptions {
    /// Act as an endpoint of this instance (/etc/tng/NAME.toml) or file
    #[arg(long, value_name = "NAME|FILE")]
    pub config: Option<String>,
    /// Which endpoint, if several attest
    #[arg(long, requires = "config")]
    pub endpoint: Option<String>,
    /// Deadline, as 5s; evidence and token have two thirds of it each. 30s when absent
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<String>,
    /// Where the evidence comes from.
    #[command(flatten)]
    pub evidence: EvidenceOptions,
    /// Who appraises it.
    #[command(flatten)]
    pub appraisal: AppraisalOptions,
    /// What is printed.
    #[command(flatten)]
    pub output: OutputOptions,
}

/// Who appraises.
#[derive(Debug, Clone, Default, Args)]
pub struct AppraisalOptions {
    /// Attestation service that appraises; several are asked in turn
    #[arg(long, value_name = "URL", help_heading = "Appraisal")]
    pub as_addr: Vec<String>,
    /// What it speaks: rest or grpc; found out when absent
    #[arg(long, value_name = "TYPE", requires = "as_addr", help_heading = "Appraisal")]
    pub as_type: Option<String>,
    /// Authorities of its own TLS certificate, PEM
    #[arg(long, value_name = "FILE", requires = "as_addr", help_heading = "Appraisal")]
    pub as_ca: Vec<PathBuf>,
    /// Ask it in plain http although it is on another host
    #[arg(long, requires = "as_addr", help_heading = "Appraisal")]
    pub as_insecure: bool,
    /// Policy that the token must be made under
    #[arg(long, value_name = "ID", help_heading = "Appraisal")]
    pub policy_id: Vec<String>,
    /// Who may sign tokens, PEM; without --as-addr the peer has to show a token (passport)
    #[arg(long, value_name = "FILE", help_heading = "Appraisal")]
    pub trusted_certs: Vec<PathBuf>,
    /// Accept the sample TEE, which proves nothing; alone: check sample evidence in process
    #[arg(long, help_heading = "Appraisal")]
    pub allow_sample: bool,
}

/// Appraisal without a service.
#[derive(Debug, Clone, Default, Args)]
pub struct BuiltinOptions {
    /// Appraise in process, against --reference-file
    #[arg(long, conflicts_with = "as_addr", help_heading = "Appraisal in process")]
    pub builtin: bool,
    /// TOML with [[ingress.verify.reference]] blocks
    #[arg(long, value_name = "FILE", requires = "builtin", help_heading = "Appraisal in process")]
    pub reference_file: Option<PathBuf>,
    /// Collateral of TDX and SGX platforms, JSON
    #[arg(long, value_name = "FILE", requires = "builtin", help_heading = "Appraisal in process")]
    pub collateral: Vec<PathBuf>,
    /// Service that has the collateral
    #[arg(long, value_name = "URL", requires = "builtin", help_heading = "Appraisal in process")]
    pub pccs_addr: Option<String>,
    /// TCB status that is accepted
    #[arg(long, value_name = "STATUS", requires = "builtin", help_heading = "Appraisal in process")]
    pub minimum_tcb: Vec<String>,
    /// Certificates of AMD chips, PEM
    #[arg(long, value_name = "FILE", requires = "builtin", help_heading = "Appraisal in process")]
    pub amd_certs: Vec<PathBuf>,
    /// Service that has them
    #[arg(long, value_name = "URL", requires = "builtin", help_heading = "Appraisal in process")]
    pub kds_addr: Option<String>,
}

/// Where this host's evidence comes from.
#[derive(Debug, Clone, Default, Args)]
pub struct EvidenceOptions {
    /// Attestation agent, as unix:///run/aa.sock
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["config", "asr_addr"], help_heading = "Evidence")]
    pub aa_addr: Option<String>,
    /// CoCo's API server in front of one, as http://127.0.0.1:8006
    #[arg(long, value_name = "URL", conflicts_with = "config", help_heading = "Evidence")]
    pub asr_addr: Option<String>,
    /// aa, asr, tsm, tpm or sample
    #[arg(long, value_name = "PROVIDER", conflicts_with = "config", help_heading = "Evidence")]
    pub provider: Option<String>,
    /// Helper that makes evidence of tsm and tpm; direct: in this process, which needs root
    #[arg(long, value_name = "ADDR", conflicts_with = "config", help_heading = "Evidence")]
    pub evidence_addr: Option<String>,
    /// TPM that is used with --evidence-addr direct
    #[arg(long, value_name = "DEVICE", conflicts_with = "config", help_heading = "Evidence")]
    pub tpm_device: Option<String>,
    /// Evidence of devices, too
    #[arg(long, conflicts_with = "config", help_heading = "Evidence")]
    pub additional_evidence: bool,
}
