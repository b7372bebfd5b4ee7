//! The four requests to a PCCS, or to Intel's PCS itself, that make the collateral of a platform family
//! (Intel PCS API version 4, <https://api.portal.trustedservices.intel.com/content/documentation.html>).

use dcap_qvl::QuoteCollateralV3;
use hyper::HeaderMap;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::BuiltinError;
use super::collateral::Collateral;
use super::fetch::Fetcher;
use super::store::Platform;
use crate::config::from_hex;

/// Names of the header that carries the chain of the TCB info's signer; the second in older answers.
const TCB_CHAIN: [&str; 2] = ["TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"];
const QE_CHAIN: [&str; 2] = ["SGX-Enclave-Identity-Issuer-Chain", "Enclave-Identity-Issuer-Chain"];
const CRL_CHAIN: [&str; 2] = ["SGX-PCK-CRL-Issuer-Chain", "PCK-CRL-Issuer-Chain"];

const INTEL_ROOT_CRL: &str = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der";

#[derive(Deserialize)]
struct TcbInfo<'a> {
    // The signature is over these very bytes.
    #[serde(rename = "tcbInfo", borrow)]
    info: &'a RawValue,
    signature: String,
}

#[derive(Deserialize)]
struct Identity<'a> {
    #[serde(rename = "enclaveIdentity", borrow)]
    identity: &'a RawValue,
    signature: String,
}

/// Fetches the collateral for `platform`.
pub async fn fetch(pccs: &Fetcher, platform: &Platform) -> Result<Collateral, BuiltinError> {
    let Platform { tee, fmspc, ca } = platform;
    let crl_path = format!("sgx/certification/v4/pckcrl?ca={}&encoding=der", ca.as_id_str());
    let tcb_path = format!("{tee}/certification/v4/tcb?fmspc={fmspc}");
    let qe_path = format!("{tee}/certification/v4/qe/identity");
    // Intel's own service leaves the root's CRL where the root's certificate says it is.
    let intel = pccs.base().host_str() == Some("api.trustedservices.intel.com");
    let root_path = if intel { INTEL_ROOT_CRL } else { "sgx/certification/v4/rootcacrl" };
    let (crl_head, pck_crl) = pccs.get(&crl_path).await?;
    let (tcb_head, tcb) = pccs.get(&tcb_path).await?;
    let (qe_head, qe) = pccs.get(&qe_path).await?;
    let (_, root_ca_crl) = pccs.get(root_path).await?;
    let chain = |head: &HeaderMap, names: [&str; 2], path: &str| {
        let found = names.iter().find_map(|n| head.get(*n)?.to_str().ok()).and_then(percent_decoded);
        found.ok_or_else(|| pccs.failed(path, format!("no header {}", names[0])))
    };
    let tcb_info: TcbInfo<'_> =
        serde_json::from_slice(&tcb).map_err(|e| pccs.failed(&tcb_path, format!("not a TCB info: {e}")))?;
    let identity: Identity<'_> =
        serde_json::from_slice(&qe).map_err(|e| pccs.failed(&qe_path, format!("not an identity: {e}")))?;
    let signature =
        |text: &str, path: &str| from_hex(text).ok_or_else(|| pccs.failed(path, "a signature that is not hex".into()));
    let collateral = QuoteCollateralV3 {
        pck_crl_issuer_chain: chain(&crl_head, CRL_CHAIN, &crl_path)?,
        root_ca_crl: der(&root_ca_crl),
        pck_crl: der(&pck_crl),
        tcb_info_issuer_chain: chain(&tcb_head, TCB_CHAIN, &tcb_path)?,
        tcb_info: tcb_info.info.get().to_owned(),
        tcb_info_signature: signature(&tcb_info.signature, &tcb_path)?,
        qe_identity_issuer_chain: chain(&qe_head, QE_CHAIN, &qe_path)?,
        qe_identity: identity.identity.get().to_owned(),
        qe_identity_signature: signature(&identity.signature, &qe_path)?,
        // The quote's own chain is used.
        pck_certificate_chain: None,
    };
    Collateral::new(collateral).map_err(BuiltinError::Collateral)
}

/// A PCCS writes CRLs in hexadecimal, Intel's service in DER.
fn der(body: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(body).ok().and_then(|t| from_hex(t.trim().trim_matches('"')));
    text.filter(|t| !t.is_empty()).unwrap_or_else(|| body.to_vec())
}

/// RFC 3986, section 2.1. Intel writes PEM so into its headers.
fn percent_decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        out.extend(from_hex(part.get(..2)?)?);
        out.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_percent_decoded_and_broken_ones_refused() {
        assert_eq!(percent_decoded("-----BEGIN%20X-----%0Aab+c%2B%0a").unwrap(), "-----BEGIN X-----\nab+c+\n");
        assert_eq!(percent_decoded("plain").unwrap(), "plain");
        for bad in ["%", "%2", "%zz", "a%é"] {
            assert_eq!(percent_decoded(bad), None, "{bad}");
        }
    }

    #[test]
    fn crls_are_read_in_both_forms() {
        assert_eq!(der(b"3082"), [0x30, 0x82]);
        assert_eq!(der(b"\"3082\"\n"), [0x30, 0x82]);
        assert_eq!(der(&[0x30, 0x82, 0xff]), [0x30, 0x82, 0xff]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(100_000))]

        #[test]
        fn no_header_panics(text in "[%0-9a-fé ]{0,40}", body in proptest::collection::vec(0u8..255, 0..40)) {
            let _ = (percent_decoded(&text), der(&body));
        }
    }
}
