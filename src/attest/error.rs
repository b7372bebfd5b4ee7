//! Why there is no evidence, and why evidence was refused.

use super::builtin::tpm::TpmRefusal;
use super::host::HostError;
use super::rego::PolicyError;

/// Why this side could not get evidence about itself.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AttestError {
    /// The agent's socket could not be reached, or it hung up.
    #[error("attestation agent unreachable at {0}")]
    AaUnreachable(String),
    /// The agent did not answer within the deadline.
    #[error("attestation agent did not answer within the deadline")]
    AaTimeout,
    /// Its TPM serves one request at a time, and others were before this one.
    #[error("the attestation agent is asked for one quote of a TPM at a time, and the turn did not come in time")]
    AaTurn,
    /// The agent answered with an error.
    #[error("attestation agent answered error {code}: {message}")]
    AaError {
        /// gRPC status code.
        code: i32,
        /// Its text, shortened.
        message: String,
    },
    /// The agent is too old to tell its TEE.
    #[error("attestation agent does not implement GetTeeType: it is too old, update it")]
    AaNoTeeType,
    /// The agent's answer is not what the protocol allows.
    #[error("attestation agent sent garbage: {0}")]
    AaGarbage(&'static str),
    /// The host's own evidence could not be made.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The API server in front of the agent was started without the feature that is needed.
    #[error("the CoCo API server serves resources and no evidence: start it with --features attestation")]
    AsrFeature,
    /// The API server in front of the agent does not have what is needed.
    #[error("the CoCo API server is too old: {0}")]
    AsrTooOld(&'static str),
    /// Device evidence is asked for, and the agent has none.
    #[error("attest.additional_evidence = true, and the attestation agent has no evidence of a device")]
    AaNoDevices,
    /// No token could be had for the evidence.
    #[error("no token for this side's evidence: {0}")]
    Passport(VerifyError),
    /// Key or certificate could not be made.
    #[error("certificate could not be made: {0}")]
    Certificate(String),
    /// No evidence came in time for this handshake, and no failure is known yet.
    #[error("no evidence yet")]
    Pending,
}

impl AttestError {
    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::AaUnreachable(_) => "aa-unreachable",
            Self::AaTimeout | Self::AaTurn => "aa-timeout",
            Self::AaError { .. } => "aa-error",
            Self::AaNoTeeType => "aa-no-tee-type",
            Self::AaGarbage(_) => "aa-garbage",
            Self::Host(e) => e.reason(),
            Self::AsrFeature => "asr-feature",
            Self::AsrTooOld(_) => "asr-too-old",
            Self::AaNoDevices => "aa-no-devices",
            Self::Passport(e) => e.reason(),
            Self::Certificate(_) => "certificate-failed",
            Self::Pending => "evidence-pending",
        }
    }
}

/// Status that a service answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsStatus {
    /// Of HTTP (RFC 9110 section 15).
    Http(u16),
    /// Of gRPC (its statuscodes.md).
    Grpc(u16),
}

impl std::fmt::Display for AsStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http(status) => write!(f, "{status}"),
            Self::Grpc(code) => write!(f, "gRPC status {code}"),
        }
    }
}

/// Why the peer's evidence got no verdict that lets it in.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum VerifyError {
    /// The TEE proves nothing and `allow_sample` is not set.
    #[error("the TEE is `{0}`, which proves nothing, and allow_sample is not set")]
    SampleTeeRefused(String),
    /// The sample verifier knows only the sample TEE.
    #[error("the sample verifier cannot appraise TEE `{0}`")]
    TeeUnsupported(String),
    /// The operator's policy does not let the peer in.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A TPM's quote was refused.
    #[error(transparent)]
    Tpm(#[from] TpmRefusal),
    /// The evidence's report data is not the digest of the runtime data.
    #[error("the evidence is bound to other runtime data")]
    ReportData,
    /// The evidence cannot be read.
    #[error("the evidence is malformed: {0}")]
    Malformed(&'static str),
    /// The devices' evidence is not what the TEE's evidence vouches for.
    #[error("the evidence names evidence of devices, and {0}")]
    Devices(&'static str),
    /// The attestation service could not be reached.
    #[error("attestation service unreachable: {0}")]
    AsUnreachable(String),
    /// The attestation service is not who its address says, or speaks no TLS.
    #[error("attestation service: TLS failed: {0}")]
    AsTls(String),
    /// The attestation service did not answer within the deadline.
    #[error("attestation service did not answer within the deadline")]
    AsTimeout,
    /// The attestation service refused the evidence.
    #[error("attestation service refused the evidence: {0}")]
    AsRejected(String),
    /// The attestation service found the evidence bound to other runtime data.
    #[error("attestation service found the evidence bound to something else: {0}")]
    AsBinding(String),
    /// The attestation service has no policy of a configured name.
    #[error("attestation service lacks a policy of policy_ids, it answered {status}: {text}")]
    AsPolicy {
        /// Its status.
        status: AsStatus,
        /// First line or so of the text.
        text: String,
    },
    /// The attestation service does not appraise this TEE.
    #[error("attestation service does not appraise this TEE, it answered {status}: {text}")]
    AsTee {
        /// Its status.
        status: AsStatus,
        /// First line or so of the text.
        text: String,
    },
    /// The attestation service answered with an error.
    #[error("attestation service answered {status}: {text}")]
    AsError {
        /// Its status.
        status: AsStatus,
        /// First line or so of the text.
        text: String,
    },
    /// Something answers at the attestation service's address, and it is none.
    #[error("no attestation service there, it answered {0}: check as_addr")]
    AsAbsent(AsStatus),
    /// The attestation service took the request and broke the call off.
    #[error("attestation service dropped the call: {0}; see its log, did it panic?")]
    AsDropped(String),
    /// The attestation service began an answer and did not end it within the deadline.
    #[error("attestation service began an answer and did not end it within the deadline")]
    AsStalled,
    /// The attestation service does not speak its protocol.
    #[error("attestation service sent garbage: {0}")]
    AsGarbage(String),
    /// The attestation service's answer is well-formed and no token.
    #[error("attestation service answered with {0} where a token belongs")]
    AsNoToken(&'static str),
    /// The attestation service's answer is too long.
    #[error("attestation service sent an answer beyond 1 MiB")]
    AsTooLarge,
    /// A new token is not of now, because the service's clock is not.
    #[error("attestation service: {0}")]
    AsClock(String),
    /// A configured key set cannot be had.
    #[error("trusted_jwks: {0}")]
    KeySet(String),
    /// The token is over.
    #[error("token expired")]
    TokenExpired,
    /// The token is to be used later (`nbf`).
    #[error("token not yet valid")]
    TokenNotYetValid,
    /// The token was made in the future (`iat`).
    #[error("token made in the future")]
    TokenFromFuture,
    /// The token's signature does not verify.
    #[error("token signature wrong")]
    TokenSignature,
    /// The token's signer does not chain to a trust anchor.
    #[error("token signer not trusted: {0}")]
    TokenUntrustedSigner(String),
    /// The token is about other runtime data.
    #[error("token is about another key than the one that was shown")]
    TokenRuntimeData,
    /// The token was made under another policy.
    #[error("token made under policy {found:?}, not {wanted:?}")]
    TokenPolicy {
        /// Policies configured.
        wanted: Vec<String>,
        /// Policies in the token.
        found: Vec<String>,
    },
    /// The token's parts were appraised under several policies, and not those that are wanted.
    #[error("token mixes policies {found:?}, wanted {wanted:?}")]
    TokenPolicyMixed {
        /// Policies configured.
        wanted: Vec<String>,
        /// Policies in the token.
        found: Vec<String>,
    },
    /// A submodule's status is `none`.
    #[error("appraisal of {0}: none")]
    TokenStatusNone(String),
    /// A submodule's status is `warning`.
    #[error("appraisal of {0}: warning")]
    TokenStatusWarning(String),
    /// A submodule's status is `contraindicated`.
    #[error("appraisal of {0}: contraindicated")]
    TokenStatusContraindicated(String),
    /// The token is not an EAR as CoCo makes it.
    #[error("token malformed: {0}")]
    TokenMalformed(&'static str),
    /// The token is signed in a way that its key does not.
    #[error("token algorithm is not that of its key: ES256 for P-256, RS384 for RSA")]
    TokenAlg,
    /// The appraisal in process refused it, or could not be made.
    #[error("{0}")]
    Builtin(#[from] super::BuiltinError),
    /// The token is not signed at all (`alg` is `none`).
    #[error("token is not signed: its algorithm is none")]
    TokenAlgNone,
    /// The token has a MAC, whose key would be the signer's public one.
    #[error("token is not signed: its algorithm is {0}, a MAC")]
    TokenAlgMac(String),
    /// The token's header says that it must not be read without an extension.
    #[error("token has critical header parameters, and none is known")]
    TokenCritical,
    /// The token names one key and brings another.
    #[error("token names key `{0}` and brings another one")]
    TokenKeyConfusion(String),
    /// Too many appraisals are under way.
    #[error("too many appraisals at once")]
    Busy,
    /// The appraisal ended without a result.
    #[error("appraisal ended without a result")]
    Internal,
}

impl VerifyError {
    /// Whether it is a finding about the peer; all else may be different when asked again.
    pub fn is_about_peer(&self) -> bool {
        if let Self::Builtin(e) = self {
            return e.is_about_peer();
        }
        matches!(
            self,
            Self::SampleTeeRefused(_)
                | Self::TeeUnsupported(_)
                | Self::Tpm(_)
                | Self::Policy(PolicyError::Denied(_))
                | Self::ReportData
                | Self::Malformed(_)
                | Self::Devices(_)
                | Self::AsRejected(_)
                | Self::AsBinding(_)
                | Self::TokenRuntimeData
                | Self::TokenStatusNone(_)
                | Self::TokenStatusWarning(_)
                | Self::TokenStatusContraindicated(_)
        )
    }

    /// Whether a token was there and is not what this side's configuration wants. Who makes tokens may mend that, or the
    /// configuration.
    pub fn is_about_token(&self) -> bool {
        matches!(
            self,
            Self::TokenSignature
                | Self::TokenUntrustedSigner(_)
                | Self::TokenPolicy { .. }
                | Self::TokenPolicyMixed { .. }
                | Self::TokenMalformed(_)
                | Self::TokenAlg
                | Self::TokenAlgNone
                | Self::TokenAlgMac(_)
                | Self::TokenCritical
                | Self::TokenKeyConfusion(_)
        )
    }

    /// Stable slug.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::SampleTeeRefused(_) => "sample-tee-refused",
            Self::TeeUnsupported(_) => "sample-tee-unsupported",
            Self::Policy(e) => e.reason(),
            Self::Tpm(e) => e.reason(),
            Self::ReportData => "evidence-report-data",
            Self::Malformed(_) => "evidence-malformed",
            Self::Devices(_) => "evidence-devices",
            Self::AsUnreachable(_) => "as-unreachable",
            Self::AsTls(_) => "as-tls",
            Self::AsTimeout => "as-timeout",
            Self::AsRejected(_) => "as-rejected",
            Self::AsBinding(_) => "as-binding",
            Self::AsPolicy { .. } => "as-policy",
            Self::AsTee { .. } => "as-tee",
            Self::AsError { .. } | Self::AsDropped(_) => "as-error",
            Self::AsStalled => "as-stalled",
            Self::AsGarbage(_) | Self::AsAbsent(_) => "as-garbage",
            Self::AsNoToken(_) => "as-no-token",
            Self::AsTooLarge => "as-too-large",
            Self::AsClock(_) => "as-clock",
            Self::KeySet(_) => "key-set",
            Self::TokenExpired => "token-expired",
            Self::TokenNotYetValid => "token-not-yet-valid",
            Self::TokenFromFuture => "token-from-future",
            Self::TokenSignature => "token-signature",
            Self::TokenUntrustedSigner(_) => "token-untrusted-signer",
            Self::TokenRuntimeData => "token-runtime-data",
            Self::TokenPolicy { .. } => "token-policy",
            Self::TokenPolicyMixed { .. } => "token-policy-mixed",
            Self::TokenStatusNone(_) => "token-status-none",
            Self::TokenStatusWarning(_) => "token-status-warning",
            Self::TokenStatusContraindicated(_) => "token-status-contraindicated",
            Self::TokenMalformed(_) => "token-malformed",
            Self::TokenAlg => "token-alg",
            Self::Builtin(e) => e.reason(),
            Self::TokenAlgNone => "token-alg-none",
            Self::TokenAlgMac(_) => "token-alg-mac",
            Self::TokenCritical => "token-critical",
            Self::TokenKeyConfusion(_) => "token-key-confusion",
            Self::Busy => "verify-busy",
            Self::Internal => "verify-internal",
        }
    }
}
