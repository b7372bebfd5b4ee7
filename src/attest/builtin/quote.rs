//! Appraisal of Intel's quotes: TDX (versions 4 and 5) and SGX (version 3).
//!
//! The quote library verifies; what it is given, with which cryptography and what its errors mean is here.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::prelude::{BASE64_STANDARD, Engine};
use dcap_qvl::config::{Config, CryptoProvider};
use dcap_qvl::quote::{Quote, Report};
use dcap_qvl::tcb_info::TcbStatus;
use dcap_qvl::verify::QuoteVerifier;
use dcap_qvl::{Policy, QuoteClaims, intel};
use rustls::SignatureScheme;
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::collateral::Collateral;
use super::store::{CollateralStatus, Platform, Store};
use super::{BuiltinError, Finding, Look};
use crate::attest::binding::sha384;
use crate::attest::x509;
use crate::config::Seen;
use crate::os::clock;
use crate::os::clock::Clock;

/// Intel's SGX Root CA, which TDX has too; README.md beside it says where it is from.
const ROOT: &[u8] = include_bytes!("intel/sgx-root-ca.pem");
/// Largest quote taken, bytes; a TLS certificate cannot carry more.
const MAX_QUOTE: usize = 64 << 10;
/// Certificates in a quote: platform, its CA, the root.
const MAX_CHAIN: usize = 4;
/// Types of certification data that hold certificates (Intel's quote format, QE certification data): the platform's alone,
/// or with its chain. Others hold what it could be asked for with.
const CERTIFICATES: [u16; 2] = [4, 5];
/// Bits of the TD attributes that put a TD under the host's eyes (TDX module ABI, TUD group).
const TUD: u8 = 0xff;
/// Bit of the SGX attributes that lets the host debug.
const SGX_DEBUG: u8 = 0x02;

/// The quote library with the cryptography that all of tng uses.
struct AwsLc;

impl CryptoProvider for AwsLc {
    fn sig_algo() -> &'static dyn SignatureVerificationAlgorithm {
        let known = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.mapping;
        let p256 = known.iter().find(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256);
        // P-256 with SHA-256 is the scheme's first algorithm; the others serve TLS 1.2.
        p256.and_then(|(_, algorithms)| algorithms.first().copied()).expect("the provider verifies P-256")
    }
    fn sha256(data: &[u8]) -> [u8; 32] {
        let mut out = [0; 32];
        out.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, data).as_ref());
        out
    }
    fn sha384(data: &[u8]) -> [u8; 48] {
        sha384(data)
    }
}

impl Config for AwsLc {
    type X509 = dcap_qvl::x509::X509CertBackend;
    type SigEncoder = dcap_qvl::signature::DerSigEncoder;
    type Crypto = Self;
}

/// Accepts what verified: TCB status and attributes are judged here, with reasons of their own.
struct Judged;

impl Policy for Judged {
    fn validate(&self, _: &QuoteClaims) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Root that quotes must lead to, DER.
pub fn pinned_root() -> Vec<u8> {
    CertificateDer::from_pem_slice(ROOT).map(|der| der.to_vec()).unwrap_or_default()
}

/// Appraises quotes.
pub struct Quotes {
    root: Vec<u8>,
    store: Store,
    minimum_tcb: Vec<String>,
}

impl Quotes {
    /// Quotes must lead to `root` (DER) and have a TCB status of `minimum_tcb`.
    pub fn new(root: Vec<u8>, store: Store, minimum_tcb: Vec<String>) -> Self {
        Self { root, store, minimum_tcb }
    }

    /// Requests to the PCCS.
    pub fn calls(&self) -> u64 {
        self.store.calls()
    }

    /// Dates of the collateral that is at hand.
    pub fn collateral(&self) -> Option<CollateralStatus> {
        self.store.status()
    }

    /// What the quote says, once it was verified.
    pub async fn appraise(
        &self,
        tee: &'static str,
        evidence: &[u8],
        clock: &Arc<dyn Clock>,
    ) -> Result<Finding, BuiltinError> {
        let raw = raw_quote(evidence)?;
        let platform = platform(tee, &raw, &self.root)?;
        let collateral = self.store.get(&platform, clock).await?;
        let claims = verify(&raw, &collateral, clock::unix(clock.now()), &self.root)?;
        if !self.minimum_tcb.contains(&claims.tcb.status.to_string()) {
            return Err(status_error(&claims));
        }
        finding(tee, &platform, &claims)
    }
}

/// The quote in evidence: `{"quote": "<base64>"}`, as attestation agents send it for both TEEs.
fn raw_quote(evidence: &[u8]) -> Result<Vec<u8>, BuiltinError> {
    #[derive(serde::Deserialize)]
    struct Json {
        quote: String,
    }
    let malformed = |what: &str| BuiltinError::Quote(what.to_owned());
    let json: Json = serde_json::from_slice(evidence).map_err(|_| malformed("no JSON with a quote"))?;
    if json.quote.len() > MAX_QUOTE * 4 / 3 + 4 {
        return Err(malformed("longer than 64 KiB"));
    }
    BASE64_STANDARD.decode(json.quote).map_err(|_| malformed("not base64"))
}

/// What platform the quote says it is from. The library verifies all of it later; here the platform's certificate is
/// traced to `root`, so that nobody makes this side ask its PCCS for platforms that do not exist.
fn platform(tee: &'static str, raw: &[u8], root: &[u8]) -> Result<Platform, BuiltinError> {
    let quote = Quote::parse(raw).map_err(|e| BuiltinError::Quote(shorten(&e)))?;
    let kind = if quote.header.is_sgx() { "sgx" } else { "tdx" };
    if kind != tee {
        return Err(BuiltinError::Quote(format!("a quote of {kind} in evidence of {tee}")));
    }
    if !CERTIFICATES.contains(&quote.inner_cert_type()) {
        return Err(BuiltinError::QuoteWithoutCertificate(quote.inner_cert_type()));
    }
    let chain = |e: anyhow::Error| BuiltinError::QuoteChain(shorten(&e));
    if !leads_to(&intel::extract_cert_chain(&quote).map_err(chain)?, root) {
        return Err(BuiltinError::QuoteChain("it does not end in Intel's root".into()));
    }
    let fmspc = intel::quote_fmspc_with::<AwsLc>(&quote).map_err(chain)?;
    let ca = intel::quote_ca_with::<AwsLc>(&quote).map_err(chain)?;
    let fmspc = Seen::Bytes(fmspc.to_vec()).to_string().to_ascii_uppercase();
    Ok(Platform { tee, fmspc, ca })
}

/// Whether each certificate, leaf first, is signed by the next, and the last by `root`.
fn leads_to(chain: &[Vec<u8>], root: &[u8]) -> bool {
    let issuers = chain.iter().skip(1).map(Vec::as_slice).chain([root]);
    let signed = |(cert, issuer): (&Vec<u8>, &[u8])| {
        let (Ok((_, cert)), Ok((_, issuer))) = (X509Certificate::from_der(cert), X509Certificate::from_der(issuer))
        else {
            return false;
        };
        x509::signed_by(&cert, issuer.public_key())
    };
    (1..=MAX_CHAIN).contains(&chain.len()) && chain.iter().zip(issuers).all(signed)
}

/// Signatures, chains, revocation, TCB.
fn verify(raw: &[u8], collateral: &Collateral, now: u64, root: &[u8]) -> Result<QuoteClaims, BuiltinError> {
    collateral.valid_at(now)?;
    QuoteVerifier::<AwsLc>::new_with_config(root.to_vec())
        // Debugging is judged with a reason of its own, after the signature.
        .allow_debug(true)
        .verify_with_policy(raw, &collateral.inner, now, &Judged)
        .map_err(|e| classify(&e))
}

/// The library's errors are texts. What none of these is in ends as `quote-refused`.
fn classify(error: &anyhow::Error) -> BuiltinError {
    let text = format!("{error:#}");
    let has = |needles: &[&str]| needles.iter().any(|n| text.contains(n));
    let short = shorten(error);
    if has(&["for tcb_info", "for qe_identity", "root CA CRL", "PCK CRL", "TcbInfo", "QeIdentity", "QE Identity id"]) {
        BuiltinError::Collateral(short)
    } else if has(&["for qe_report", "ISV enclave report signature", "QE report hash", "report_data", "QE auth data"]) {
        BuiltinError::QuoteSignature(short)
    } else if has(&["certificate chain", "CertRevoked", "PCK certificate", "Intel extension", "Too many intermediate"])
    {
        BuiltinError::QuoteChain(short)
    } else if has(&["Failed to decode quote", "Unsupported DCAP", "QE vendor", "quote must have version"]) {
        BuiltinError::Quote(short)
    } else if has(&["invalid: Revoked"]) {
        BuiltinError::TcbRevoked
    } else if has(&["No matching TCB level", "below minimum"]) {
        BuiltinError::Tcb("older than all that Intel lists".into())
    } else if has(&["TD migration", "SERVTD_EXT", "SEPT_VE_DISABLE", "Reserved bits", "MR service TD"]) {
        BuiltinError::Attributes(short)
    } else {
        BuiltinError::Refused(short)
    }
}

fn shorten(error: &anyhow::Error) -> String {
    format!("{error:#}").chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

fn status_error(claims: &QuoteClaims) -> BuiltinError {
    if claims.tcb.status == TcbStatus::Revoked {
        return BuiltinError::TcbRevoked;
    }
    let advisories = claims.tcb.advisory_ids.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
    let why = if advisories.is_empty() { String::new() } else { format!(" ({advisories})") };
    BuiltinError::Tcb(format!("{}{why}", claims.tcb.status))
}

/// What a report says, whoever signed it.
struct Fields {
    seen: BTreeMap<&'static str, Seen>,
    report_data: Vec<u8>,
    debug: bool,
}

fn fields(report: &Report) -> Result<Fields, BuiltinError> {
    let bytes = |b: &[u8]| Seen::Bytes(b.to_vec());
    let (seen, report_data, debug) = match (report.as_td10(), report) {
        (Some(td), _) => {
            let seen = BTreeMap::from([
                ("mr_td", bytes(&td.mr_td)),
                ("rtmr0", bytes(&td.rt_mr0)),
                ("rtmr1", bytes(&td.rt_mr1)),
                ("rtmr2", bytes(&td.rt_mr2)),
                ("rtmr3", bytes(&td.rt_mr3)),
                ("mr_seam", bytes(&td.mr_seam)),
                ("mr_signer_seam", bytes(&td.mr_signer_seam)),
                ("mr_config_id", bytes(&td.mr_config_id)),
                ("mr_owner", bytes(&td.mr_owner)),
                ("mr_owner_config", bytes(&td.mr_owner_config)),
                ("td_attributes", bytes(&td.td_attributes)),
                ("xfam", bytes(&td.xfam)),
            ]);
            (seen, td.report_data, td.td_attributes[0] & TUD != 0)
        }
        (None, Report::SgxEnclave(enclave)) => {
            let seen = BTreeMap::from([
                ("mr_enclave", bytes(&enclave.mr_enclave)),
                ("mr_signer", bytes(&enclave.mr_signer)),
                ("attributes", bytes(&enclave.attributes)),
                ("isv_prod_id", Seen::Number(enclave.isv_prod_id.into())),
                ("isv_svn", Seen::Number(enclave.isv_svn.into())),
            ]);
            (seen, enclave.report_data, enclave.attributes[0] & SGX_DEBUG != 0)
        }
        _ => return Err(BuiltinError::Quote("a report of an unknown kind".into())),
    };
    Ok(Fields { seen, report_data: report_data.to_vec(), debug })
}

/// What a quote says, without any check of who signed it.
pub fn look(tee: &str, evidence: &[u8]) -> Result<Look, BuiltinError> {
    let quote = Quote::parse(&raw_quote(evidence)?).map_err(|e| BuiltinError::Quote(shorten(&e)))?;
    let kind = if quote.header.is_sgx() { "sgx" } else { "tdx" };
    if kind != tee {
        return Err(BuiltinError::Quote(format!("a quote of {kind} in evidence of {tee}")));
    }
    let Fields { seen, report_data, debug } = fields(&quote.report)?;
    let mut claims = BTreeMap::from([
        ("quote_version".to_owned(), quote.header.version.to_string()),
        ("qe_svn".to_owned(), quote.header.qe_svn.to_string()),
        ("pce_svn".to_owned(), quote.header.pce_svn.to_string()),
    ]);
    let svn = match (quote.report.as_td10(), quote.report.as_sgx()) {
        (Some(td), _) => Some(("tee_tcb_svn", td.tee_tcb_svn)),
        (None, Some(enclave)) => Some(("cpu_svn", enclave.cpu_svn)),
        (None, None) => None,
    };
    claims.extend(svn.map(|(name, svn)| (name.to_owned(), Seen::Bytes(svn.to_vec()).to_string())));
    if let Ok(fmspc) = intel::quote_fmspc_with::<AwsLc>(&quote) {
        claims.insert("fmspc".into(), Seen::Bytes(fmspc.to_vec()).to_string());
    }
    Ok(Look { seen, claims, report_data: Some(report_data), debug: Some(debug), bound: None })
}

fn finding(tee: &'static str, platform: &Platform, claims: &QuoteClaims) -> Result<Finding, BuiltinError> {
    let Fields { seen, report_data, debug } = fields(&claims.report)?;
    let mut said = BTreeMap::from([
        ("tcb_status".to_owned(), claims.tcb.status.to_string()),
        ("fmspc".to_owned(), platform.fmspc.clone()),
        ("tcb_date".to_owned(), claims.platform.tcb_level.tcb_date.clone()),
    ]);
    if !claims.tcb.advisory_ids.is_empty() {
        said.insert("advisories".into(), claims.tcb.advisory_ids.join(" "));
    }
    Ok(Finding {
        tee,
        seen,
        claims: said,
        report_data,
        debug,
        trust_anchor: "Intel SGX Root CA (compiled in)".into(),
        not_after: claims.earliest_expiration_date,
    })
}

#[cfg(test)]
#[path = "quote_tests.rs"]
mod tests;
