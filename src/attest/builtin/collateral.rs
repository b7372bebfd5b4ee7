//! Collateral: what Intel signs about a platform's TCB, the quoting enclave and revoked keys, and how long it holds.

use dcap_qvl::{QeIdentity, QuoteCollateralV3, TcbInfo};
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::BuiltinError;

/// Collateral of one platform family, with what can be said of it before it is verified.
#[derive(Debug, Clone)]
pub struct Collateral {
    /// As the quote library takes it.
    pub inner: QuoteCollateralV3,
    /// `TDX` or `SGX`, as its TCB info says.
    pub id: String,
    /// Platform family, hexadecimal in capitals.
    pub fmspc: String,
    /// Latest issue of its parts, seconds since the epoch.
    pub from: u64,
    /// Earliest end of its parts.
    pub until: u64,
}

impl Collateral {
    /// Reads the JSON form of the quote library's `QuoteCollateralV3`: issuer chains and signed texts as strings, CRLs
    /// and signatures in hexadecimal.
    pub fn from_json(text: &[u8]) -> Result<Self, String> {
        Self::new(serde_json::from_slice(text).map_err(|e| e.to_string())?)
    }

    /// Reads the dates of each part.
    pub fn new(inner: QuoteCollateralV3) -> Result<Self, String> {
        let info: TcbInfo = serde_json::from_str(&inner.tcb_info).map_err(|e| format!("tcb_info: {e}"))?;
        let qe: QeIdentity = serde_json::from_str(&inner.qe_identity).map_err(|e| format!("qe_identity: {e}"))?;
        let mut from = seconds(&info.issue_date)?.max(seconds(&qe.issue_date)?);
        let mut until = seconds(&info.next_update)?.min(seconds(&qe.next_update)?);
        for (name, der) in [("root_ca_crl", &inner.root_ca_crl), ("pck_crl", &inner.pck_crl)] {
            let (_, crl) = CertificateRevocationList::from_der(der).map_err(|_| format!("{name}: not a CRL"))?;
            let next = crl.next_update().ok_or_else(|| format!("{name}: no end"))?;
            from = from.max(u64::try_from(crl.last_update().timestamp()).unwrap_or(0));
            until = until.min(u64::try_from(next.timestamp()).unwrap_or(0));
        }
        Ok(Self { id: info.id, fmspc: info.fmspc.to_ascii_uppercase(), from, until, inner })
    }

    /// Whether all of it is valid at `now`, seconds since the epoch.
    pub fn valid_at(&self, now: u64) -> Result<(), BuiltinError> {
        if now < self.from {
            Err(BuiltinError::CollateralNotYetValid(self.from))
        } else if now >= self.until {
            Err(BuiltinError::CollateralExpired(self.until))
        } else {
            Ok(())
        }
    }
}

/// Seconds since the epoch of a date as Intel writes it (RFC 3339).
fn seconds(date: &str) -> Result<u64, String> {
    let parsed = chrono::DateTime::parse_from_rfc3339(date).map_err(|e| format!("date: {e}"))?;
    u64::try_from(parsed.timestamp()).map_err(|_| "a date before 1970".to_owned())
}

/// What a collateral file is about and how long it holds; unverified, for an operator.
pub struct Dates {
    /// `tdx` or `sgx`.
    pub tee: String,
    /// Platform family.
    pub fmspc: String,
    /// Latest issue of its parts, seconds since the epoch.
    pub issued: u64,
    /// Earliest end of its parts.
    pub ends: u64,
}

/// Reads the dates of a collateral file's text.
pub fn dates(text: &[u8]) -> Result<Dates, String> {
    let Collateral { id, fmspc, from, until, .. } = Collateral::from_json(text)?;
    Ok(Dates { tee: id.to_ascii_lowercase(), fmspc, issued: from, ends: until })
}

/// What is wrong with the text of a collateral file, if anything is.
pub fn problem(text: &[u8]) -> Option<String> {
    Collateral::from_json(text).err().map(|e| e.chars().take(200).collect())
}
