//! The checks of an appraisal in the order in which they are made, and which of them failed.
//!
//! The reason with which an endpoint would refuse decides: each reason belongs to one check. What can be seen without
//! an appraiser (certificate, binding) is looked at besides, so that it is shown also where an endpoint would have
//! ended before.

use serde::Serialize;

use crate::config::VerifyProvider;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It holds.
    Passed,
    /// It does not.
    Failed,
    /// Nobody came so far, or nobody is there to make it.
    NotDone,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Stable name.
    pub id: &'static str,
    /// What is checked, in words.
    pub title: &'static str,
    /// How it ended.
    pub state: State,
    /// Why it failed, by its slug (tng-reasons(7)).
    pub reason: Option<String>,
    /// More, in words.
    pub detail: Option<String>,
}

/// Id, words, reasons.
type Row = (&'static str, &'static str, &'static [&'static str]);

/// Before anybody is asked.
const BEFORE: &[Row] = &[
    (
        "connection",
        "TCP connection",
        &[
            "target-unresolved",
            "target-refused",
            "target-timeout",
            "target-unreachable",
            "socket-failed",
            "mark-denied",
        ],
    ),
    ("own-evidence", "this side's own evidence, which the peer may ask for", OWN_EVIDENCE),
    (
        "handshake",
        "TLS 1.3 handshake, signed with the certificate's key",
        &[
            "handshake-timeout",
            "tls-not-tls",
            "tls-closed",
            "tls-alert",
            "tls-certificate-too-large",
            "tls-error",
            "tls-io",
            "tls-setup",
        ],
    ),
    ("protocol", "application protocol", &["tls-alpn", "session-binding-required"]),
    ("certificate", "certificate is readable", &["peer-no-certificate", "peer-certificate-malformed"]),
    ("evidence", "evidence is there and readable", EVIDENCE),
    ("chain", "certificate is issued by itself", &["peer-certificate-issuer"]),
    ("self-signature", "certificate is signed by its own key", &["peer-certificate-signature"]),
    ("validity", "certificate is valid now", &["peer-certificate-not-yet-valid", "peer-certificate-expired"]),
    (
        "model",
        "evidence or token, as this side asks for",
        &["peer-evidence-passport", "peer-evidence-background-check"],
    ),
    ("key-binding", "bound to the key of this connection", &["peer-evidence-other-key", "session-other-key"]),
    ("freshness", "made for this side's nonce", &["session-nonce"]),
    ("session-binding", "bound to this very connection", &["session-exporter", "session-confirmation"]),
];

const EVIDENCE: &[&str] = &[
    "peer-no-evidence",
    "peer-evidence-malformed",
    "peer-evidence-unknown-tag",
    "peer-evidence-hash",
    "session-version",
    "session-unknown-message",
    "session-too-large",
    "session-malformed",
    "session-unexpected",
    "session-truncated",
    "session-ticket",
    "session-ended",
];

/// Reasons why this side has none.
const OWN_EVIDENCE: &[&str] = &[
    "aa-unreachable",
    "aa-timeout",
    "aa-error",
    "aa-no-tee-type",
    "aa-no-devices",
    "asr-too-old",
    "asr-feature",
    "aa-garbage",
    "evidence-helper-unreachable",
    "evidence-helper-timeout",
    "evidence-helper-garbage",
    "evidence-helper-refused",
    "evidence-internal",
    "tsm-absent",
    "tsm-failed",
    "tsm-contended",
    "tsm-provider",
    "tsm-report",
    "tpm-unreachable",
    "tpm-timeout",
    "tpm-refused",
    "tpm-garbage",
    "tpm-key",
    "tpm-pcrs-changing",
    "certificate-failed",
    "evidence-pending",
    "session-own-evidence",
];

const REPORT_DATA: Row = ("report-data", "TEE vouches for that binding (report data)", &["evidence-report-data"]);
const SAMPLE: Row = ("real-tee", "TEE proves something, or need not", &["sample-tee-refused"]);
const SOMEBODY: Row = ("appraisal", "somebody vouches for the evidence", &[]);
const DEBUG: Row = ("debug", "TEE is not in debug mode", &["tee-debug"]);
/// Where the configuration has one.
const POLICY: Row =
    ("policy", "this side's own policy allows it", &["policy-denied", "policy-error", "policy-timeout"]);
const COLLATERAL: &[&str] = &[
    "collateral-missing",
    "collateral-unreachable",
    "collateral-expired",
    "collateral-not-yet-valid",
    "collateral-invalid",
];

/// A token, wherever it comes from.
const TOKEN: &[Row] = &[
    (
        "token-signature",
        "token is signed",
        &[
            "token-malformed",
            "token-alg",
            "token-alg-none",
            "token-alg-mac",
            "token-critical",
            "token-key-confusion",
            "token-signature",
        ],
    ),
    ("token-signer", "its signer is trusted", &["token-untrusted-signer", "key-set"]),
    ("token-time", "token is of now", &["token-expired", "token-not-yet-valid", "token-from-future", "as-clock"]),
    ("token-binding", "token is about the key that was shown", &["token-runtime-data"]),
    (
        "token-status",
        "its status is affirming",
        &["token-status-none", "token-status-warning", "token-status-contraindicated"],
    ),
    SAMPLE,
    ("token-policy", "it was made under the wanted policies", &["token-policy", "token-policy-mixed"]),
];

/// Reasons why a service gave no usable answer.
const NO_ANSWER: &[&str] = &[
    "as-unreachable",
    "as-tls",
    "as-timeout",
    "as-stalled",
    "as-error",
    "as-garbage",
    "as-no-token",
    "as-too-large",
    "as-policy",
    "verify-busy",
    "verify-internal",
];

const ANCHORS: Row = ("anchors", "who may sign tokens is known", NO_ANSWER);

const SERVICE: &[Row] = &[
    DEVICES,
    ("service", "attestation service answers", NO_ANSWER),
    (
        "evidence-accepted",
        "it accepts the evidence (signature, collateral, report data)",
        &["as-rejected", "as-binding", "as-tee", "evidence-malformed"],
    ),
];

const DEVICES: Row = ("devices", "TEE vouches for the devices shown", &["evidence-devices"]);

const QUOTE: &[Row] = &[
    DEVICES,
    ("quote", "quote is one of this TEE", &["quote-malformed", "tee-unsupported"]),
    ("quote-chain", "its certificates lead to Intel's root", &["quote-chain", "quote-no-certificate"]),
    ("collateral", "collateral is there and valid", COLLATERAL),
    ("quote-signature", "quote's signatures", &["quote-signature", "quote-refused"]),
    ("attributes", "attributes of the TEE", &["tee-attributes"]),
    ("tcb", "TCB of the platform", &["tcb-revoked", "tcb-out-of-date"]),
    REPORT_DATA,
    DEBUG,
    REFERENCE,
    POLICY,
];

const REFERENCE: Row =
    ("reference", "measurements are those of a reference value", &["reference-missing", "reference-mismatch"]);

const SNP: &[Row] = &[
    DEVICES,
    ("report", "report is one of SEV-SNP", &["snp-report-malformed"]),
    ("endorsement", "the chip's certificate is there", &["snp-endorsement-missing", "collateral-unreachable"]),
    ("report-chain", "its chain leads to AMD's root", &["snp-chain", "snp-chain-expired", "snp-chain-not-yet-valid"]),
    ("endorsed", "it is about this chip and firmware", &["snp-endorsement-mismatch"]),
    ("report-signature", "report's signature", &["snp-report-signature"]),
    REPORT_DATA,
    DEBUG,
    (
        "reference",
        "measurements and TCB are those of a reference value",
        &["reference-missing", "reference-mismatch", "tcb-out-of-date"],
    ),
    POLICY,
];

const TPM: &[Row] = &[
    DEVICES,
    ("quote", "evidence is one of a TPM", &["tpm-evidence-malformed"]),
    ("attestation-key", "its key is pinned by a reference value", &["tpm-ak-untrusted", "tpm-ak-unfit"]),
    ("quote-signature", "quote's signature", &["tpm-signature", "tpm-not-quote"]),
    REPORT_DATA,
    ("pcr-digest", "PCR values are those quoted", &["tpm-pcr-digest"]),
    ("reference", "PCRs are those of the reference value", &["tpm-pcr-missing", "tpm-pcr-value"]),
    POLICY,
];

const SAMPLE_ONLY: &[Row] = &[
    ("tee", "TEE is the sample one", &["sample-tee-unsupported"]),
    SAMPLE,
    ("sample", "evidence is readable", &["evidence-malformed"]),
    REPORT_DATA,
    DEVICES,
    POLICY,
];

const AFTER: &[Row] = &[("accepted", "the peer accepts this side", &["session-refused", "session-unattested"])];

/// Who appraises what: decides which checks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Nobody, and a TEE that this version knows no more of.
    Nobody,
    /// An attestation service, evidence.
    Service,
    /// Somebody with anchors, a token.
    Token,
    /// In process: TDX, SGX, and TEEs that are refused there.
    Quote,
    /// In process.
    Snp,
    /// In process.
    Tpm,
    /// The sample verifier.
    Sample,
}

impl Path {
    /// With this provider, for evidence of `tee` or a token. Without one: what an appraisal would look at.
    pub(super) fn of(provider: Option<&VerifyProvider>, token: bool, tee: Option<&str>) -> Self {
        use VerifyProvider as P;
        match (provider, token, tee) {
            (_, true, _) | (Some(P::Anchors(_)), ..) => Self::Token,
            (Some(P::As(_)), ..) => Self::Service,
            (Some(P::Sample), ..) => Self::Sample,
            (_, _, Some("snp")) => Self::Snp,
            (_, _, Some("tpm")) => Self::Tpm,
            (Some(P::Builtin(_)), ..) | (None, _, Some("tdx" | "sgx")) => Self::Quote,
            (None, ..) => Self::Nobody,
        }
    }

    fn rows(self) -> Vec<Row> {
        match self {
            Self::Nobody => vec![REPORT_DATA, SOMEBODY],
            Self::Token => [&[ANCHORS], TOKEN].concat(),
            Self::Service => [&[REPORT_DATA], SERVICE, TOKEN].concat(),
            Self::Quote => QUOTE.to_vec(),
            Self::Snp => SNP.to_vec(),
            Self::Tpm => TPM.to_vec(),
            Self::Sample => SAMPLE_ONLY.to_vec(),
        }
    }
}

/// All checks of one look at a peer, or at this host.
#[derive(Debug)]
pub(super) struct Checks {
    list: Vec<Check>,
    /// Reasons of each, in the same order.
    reasons: Vec<&'static [&'static str]>,
    /// Place of the first check that somebody else makes.
    appraisal: usize,
    /// Checks that nobody makes of what this peer shows.
    left_out: Vec<&'static str>,
}

impl Checks {
    /// Of a peer. `own`: whether this side attests. `asked`: whether the peer wants evidence of it.
    pub(super) fn of_peer(path: Path, own: bool, asked: bool) -> Self {
        let before: Vec<Row> = BEFORE.iter().copied().filter(|(id, ..)| own || *id != "own-evidence").collect();
        let after = if own || asked { AFTER } else { &[] };
        Self::new(before, path.rows(), after)
    }

    /// Of this host's own evidence.
    pub(super) fn of_host(path: Path) -> Self {
        Self::new(Vec::new(), path.rows(), &[])
    }

    fn new(before: Vec<Row>, appraisal: Vec<Row>, after: &[Row]) -> Self {
        let first = before.len();
        let rows: Vec<Row> = before.into_iter().chain(appraisal).chain(after.iter().copied()).collect();
        let plain = |(id, title, _): &Row| Check { id, title, state: State::NotDone, reason: None, detail: None };
        Self {
            list: rows.iter().map(plain).collect(),
            reasons: rows.iter().map(|(.., reasons)| *reasons).collect(),
            appraisal: first,
            left_out: Vec::new(),
        }
    }

    /// Without the policy that nobody configured.
    pub(super) fn without_policy(self) -> Self {
        self.without(POLICY.0)
    }

    /// Without the reference values that nobody configured, beside a policy.
    pub(super) fn without_reference(self) -> Self {
        self.without("reference")
    }

    fn without(mut self, id: &str) -> Self {
        if let Some(at) = self.list.iter().position(|c| c.id == id) {
            self.list.remove(at);
            self.reasons.remove(at);
        }
        self
    }

    /// Says why a check is not made, by the appraisal neither.
    pub(super) fn left_out(&mut self, id: &'static str, why: &str) {
        self.not_done(id, why);
        self.left_out.push(id);
    }

    fn get(&mut self, id: &str) -> Option<&mut Check> {
        self.list.iter_mut().find(|c| c.id == id)
    }

    pub(super) fn passed(&mut self, id: &str, detail: Option<String>) {
        self.set(id, State::Passed, None, detail);
    }

    pub(super) fn failed(&mut self, id: &str, reason: &str, detail: Option<String>) {
        self.set(id, State::Failed, Some(reason.to_owned()), detail);
    }

    /// Says why a check is not made, unless it was.
    pub(super) fn not_done(&mut self, id: &str, why: &str) {
        if let Some(check) = self.get(id).filter(|c| c.state == State::NotDone) {
            check.detail = Some(why.to_owned());
        }
    }

    /// There is nobody to make the checks that are still open.
    pub(super) fn nobody_appraises(&mut self) {
        let left_out = &self.left_out;
        let made = |check: &&mut Check| check.id != AFTER[0].0 && !left_out.contains(&check.id);
        for check in self.list[self.appraisal..].iter_mut().filter(made) {
            if check.state == State::NotDone && check.detail.is_none() {
                check.detail = Some("nobody appraises".into());
            }
        }
    }

    fn set(&mut self, id: &str, state: State, reason: Option<String>, detail: Option<String>) {
        if let Some(check) = self.get(id) {
            *check = Check { state, reason, detail, ..check.clone() };
        }
    }

    /// The appraisal ended well: nothing of it is left open, and its word goes before what was seen by looking alone.
    pub(super) fn appraised(&mut self) {
        let left_out = &self.left_out;
        let made = |check: &&mut Check| check.id != AFTER[0].0 && !left_out.contains(&check.id);
        for check in self.list[self.appraisal..].iter_mut().filter(made) {
            match check.state {
                State::Passed => {}
                State::NotDone => check.state = State::Passed,
                State::Failed => {
                    let detail = "the appraisal accepts it; by this version's reading it is another".to_owned();
                    *check = Check { state: State::NotDone, reason: None, detail: Some(detail), ..check.clone() };
                }
            }
        }
    }

    /// An endpoint refuses with `reason`. Checks of the appraisal before it were passed.
    pub(super) fn refused(&mut self, reason: &str, text: String) {
        let place = self.reasons.iter().position(|of| of.contains(&reason)).unwrap_or(self.appraisal);
        self.refused_at(place, reason, text);
    }

    /// The same where the check is known better than its reason tells: a deadline may end any of them.
    pub(super) fn refused_in(&mut self, id: &str, reason: &str, text: String) {
        let place = self.list.iter().position(|c| c.id == id).unwrap_or(self.appraisal);
        self.refused_at(place, reason, text);
    }

    fn refused_at(&mut self, place: usize, reason: &str, text: String) {
        let Some(check) = self.list.get_mut(place) else { return };
        *check = Check { state: State::Failed, reason: Some(reason.to_owned()), detail: Some(text), ..check.clone() };
        if place < self.appraisal || check.id == AFTER[0].0 {
            return;
        }
        for check in &mut self.list[self.appraisal..place] {
            if check.state == State::NotDone {
                check.state = State::Passed;
            }
        }
    }

    /// The first that failed.
    pub(super) fn first_failed(&self) -> Option<&Check> {
        self.list.iter().find(|c| c.state == State::Failed)
    }

    pub(super) fn into_list(self) -> Vec<Check> {
        self.list
    }
}

#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;
