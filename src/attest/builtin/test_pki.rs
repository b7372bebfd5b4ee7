//! A maker of chips for tests: chains, collateral, quotes and reports of its own, in the makers' formats.

use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair as _,
};
use base64::prelude::{BASE64_STANDARD, Engine};
use dcap_qvl::QuoteCollateralV3;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SerialNumber, SignatureAlgorithm,
    date_time_ymd,
};
use serde_json::json;

use super::amd::Root;
use super::snp_report::{LEN, SIGNED};
use crate::os::clock::{Clock, from_unix};

/// 2026-01-01T00:00:00Z, within everything made here.
pub const NOW: u64 = 1_767_225_600;

/// A clock that stands.
pub struct Standing(pub u64);

impl Clock for Standing {
    fn now(&self) -> SystemTime {
        from_unix(self.0).unwrap()
    }
}

/// The same, shared.
pub fn at(secs: u64) -> Arc<dyn Clock> {
    Arc::new(Standing(secs))
}

/// Somebody with a key and a certificate.
struct Party {
    issuer: Issuer<'static, KeyPair>,
    cert: Certificate,
    signer: EcdsaKeyPair,
}

fn party(
    name: &str,
    algorithm: &'static SignatureAlgorithm,
    ca: bool,
    extensions: Vec<CustomExtension>,
    by: Option<&Party>,
) -> Party {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2040, 1, 1);
    params.use_authority_key_identifier_extension = true;
    params.custom_extensions = extensions;
    if ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    }
    let cert = match by {
        Some(by) => params.signed_by(&key, &by.issuer).unwrap(),
        None => params.self_signed(&key).unwrap(),
    };
    let signing: &'static EcdsaSigningAlgorithm = if algorithm == &PKCS_ECDSA_P384_SHA384 {
        &ECDSA_P384_SHA384_FIXED_SIGNING
    } else {
        &ECDSA_P256_SHA256_FIXED_SIGNING
    };
    let signer = EcdsaKeyPair::from_pkcs8(signing, &key.serialize_der()).unwrap();
    Party { issuer: Issuer::new(params, key), cert, signer }
}

impl Party {
    /// r and s.
    fn sign(&self, data: &[u8]) -> Vec<u8> {
        self.signer.sign(&SystemRandom::new(), data).unwrap().as_ref().to_vec()
    }
    fn crl(&self, revoked: &[u64]) -> Vec<u8> {
        let revoked = revoked.iter().map(|serial| rcgen::RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2025, 12, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 12, 20),
            next_update: date_time_ymd(2026, 1, 20),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

/// DER: tag, length below 65536, content.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(content.len()).unwrap();
    let mut out = vec![tag];
    match len {
        0..=127 => out.push(len as u8),
        _ => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend_from_slice(content);
    out
}

/// SEQUENCE { OID below Intel's SGX extension, value }.
fn sgx(path: &[u8], value: Vec<u8>) -> Vec<u8> {
    let mut oid = vec![0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 0x01, 0x0d, 0x01];
    oid.extend_from_slice(path);
    tlv(0x30, &[tlv(6, &oid), value].concat())
}

/// The family of the chips made here.
pub const FMSPC: &str = "00906ED50000";
const CPU_SVN: u8 = 5;

fn pck_extension() -> CustomExtension {
    let mut tcb: Vec<u8> = (1..=16).flat_map(|n| sgx(&[2, n], tlv(2, &[CPU_SVN]))).collect();
    tcb.extend(sgx(&[2, 17], tlv(2, &[11])));
    tcb.extend(sgx(&[2, 18], tlv(4, &[CPU_SVN; 16])));
    let content = [
        sgx(&[1], tlv(4, &[7; 16])),
        sgx(&[2], tlv(0x30, &tcb)),
        sgx(&[3], tlv(4, &[0, 0])),
        sgx(&[4], tlv(4, &crate::config::from_hex(FMSPC).unwrap())),
        sgx(&[5], tlv(10, &[0])),
    ];
    let oid = &[1, 2, 840, 113741, 1, 13, 1];
    CustomExtension::from_oid_content(oid, tlv(0x30, &content.concat()))
}

/// A maker of chips with TDX.
pub struct Intel {
    root: Party,
    pck_ca: Party,
    tcb_signer: Party,
    pck: Party,
    attestation: Party,
    now: u64,
}

/// What a quote of this maker's says.
#[derive(Clone)]
pub struct Td {
    /// Bound to.
    pub report_data: [u8; 64],
    /// Little-endian; bit 28 is SEPT_VE_DISABLE, without which nothing accepts a TD.
    pub attributes: u64,
    /// Measurement of the initial memory.
    pub mr_td: [u8; 48],
}

impl Default for Td {
    fn default() -> Self {
        Self { report_data: [0; 64], attributes: 1 << 28, mr_td: [0xa1; 48] }
    }
}

impl Intel {
    /// New keys; everything is valid at `now`.
    pub fn new(now: u64) -> Self {
        let p256 = &PKCS_ECDSA_P256_SHA256;
        let root = party("Test SGX Root CA", p256, true, vec![], None);
        let pck_ca = party("Intel SGX PCK Processor CA", p256, true, vec![], Some(&root));
        let tcb_signer = party("Test SGX TCB Signing", p256, false, vec![], Some(&root));
        let pck = party("Test SGX PCK Certificate", p256, false, vec![pck_extension()], Some(&pck_ca));
        let attestation = party("attestation key", p256, false, vec![], None);
        Self { root, pck_ca, tcb_signer, pck, attestation, now }
    }

    /// The root, DER.
    pub fn root_der(&self) -> Vec<u8> {
        self.root.cert.der().to_vec()
    }

    /// Collateral that gives the platform `status`; its parts hold for the given days before and after now.
    pub fn collateral(&self, status: &str, before: u64, after: u64) -> QuoteCollateralV3 {
        let date = |secs: u64| chrono::DateTime::from_timestamp(secs as i64, 0).unwrap().to_rfc3339();
        let (issue, next) = (date(self.now - before * 86_400), date(self.now + after * 86_400));
        let components: Vec<_> = (0..16).map(|_| json!({"svn": CPU_SVN})).collect();
        let none: Vec<_> = (0..16).map(|_| json!({"svn": 0})).collect();
        let tcb_info = json!({
            "id": "TDX", "version": 3, "issueDate": issue, "nextUpdate": next, "fmspc": FMSPC, "pceId": "0000",
            "tcbType": 0, "tcbEvaluationDataNumber": 17,
            "tdxModule": { "mrsigner": "00".repeat(48), "attributes": "00".repeat(8), "attributesMask": "ff".repeat(8) },
            "tcbLevels": [{
                "tcb": { "sgxtcbcomponents": components, "pcesvn": 11, "tdxtcbcomponents": none },
                "tcbDate": "2025-06-01T00:00:00Z", "tcbStatus": status, "advisoryIDs": ["INTEL-SA-00000"],
            }],
        });
        let identity = json!({
            "id": "TD_QE", "version": 2, "issueDate": issue, "nextUpdate": next, "tcbEvaluationDataNumber": 17,
            "miscselect": "00000000", "miscselectMask": "FFFFFFFF", "attributes": "00".repeat(16),
            "attributesMask": "FF".repeat(16), "mrsigner": "00".repeat(32), "isvprodid": 2,
            "tcbLevels": [{ "tcb": { "isvsvn": 4 }, "tcbDate": "2025-06-01T00:00:00Z", "tcbStatus": "UpToDate" }],
        });
        let (tcb_info, identity) = (tcb_info.to_string(), identity.to_string());
        let chain = |party: &Party| format!("{}{}", party.cert.pem(), self.root.cert.pem());
        QuoteCollateralV3 {
            pck_crl_issuer_chain: chain(&self.pck_ca),
            root_ca_crl: self.root.crl(&[]),
            pck_crl: self.pck_ca.crl(&[]),
            tcb_info_issuer_chain: chain(&self.tcb_signer),
            tcb_info_signature: self.tcb_signer.sign(tcb_info.as_bytes()),
            tcb_info,
            qe_identity_issuer_chain: chain(&self.tcb_signer),
            qe_identity_signature: self.tcb_signer.sign(identity.as_bytes()),
            qe_identity: identity,
            pck_certificate_chain: None,
        }
    }

    /// The same with the platform's own certificate revoked.
    pub fn collateral_without_platform(&self) -> QuoteCollateralV3 {
        let (_, pck) = x509_parser::parse_x509_certificate(self.pck.cert.der()).unwrap();
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 12, 20),
            next_update: date_time_ymd(2026, 1, 20),
            crl_number: SerialNumber::from(2),
            issuing_distribution_point: None,
            revoked_certs: vec![rcgen::RevokedCertParams {
                serial_number: SerialNumber::from_slice(pck.raw_serial()),
                revocation_time: date_time_ymd(2025, 12, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        let pck_crl = params.signed_by(&self.pck_ca.issuer).unwrap().der().to_vec();
        QuoteCollateralV3 { pck_crl, ..self.collateral("UpToDate", 1, 1) }
    }

    /// A quote, version 4.
    pub fn quote(&self, td: &Td) -> Vec<u8> {
        let mut signed = Vec::new();
        signed.extend(4u16.to_le_bytes());
        signed.extend(2u16.to_le_bytes());
        signed.extend(0x81u32.to_le_bytes());
        signed.extend([0; 4]);
        signed.extend(dcap_qvl::INTEL_QE_VENDOR_ID);
        signed.extend([0; 20]);
        let mut body = [0; 584];
        body[120..128].copy_from_slice(&td.attributes.to_le_bytes());
        body[136..184].copy_from_slice(&td.mr_td);
        body[328..376].fill(0xb0);
        body[520..].copy_from_slice(&td.report_data);
        signed.extend(body);

        let key = &self.attestation.signer.public_key().as_ref()[1..];
        let auth_data = [9; 32];
        let mut qe_report = [0; 384];
        qe_report[256..258].copy_from_slice(&2u16.to_le_bytes());
        qe_report[258..260].copy_from_slice(&4u16.to_le_bytes());
        qe_report[320..352].copy_from_slice(digest(&SHA256, &[key, &auth_data].concat()).as_ref());
        let chain = [&self.pck, &self.pck_ca, &self.root].map(|p| p.cert.pem()).concat();
        let mut certification = qe_report.to_vec();
        certification.extend(self.pck.sign(&qe_report));
        certification.extend(32u16.to_le_bytes());
        certification.extend(auth_data);
        certification.extend(5u16.to_le_bytes());
        certification.extend(u32::try_from(chain.len()).unwrap().to_le_bytes());
        certification.extend(chain.as_bytes());
        let mut auth = self.attestation.sign(&signed);
        auth.extend(key);
        auth.extend(6u16.to_le_bytes());
        auth.extend(u32::try_from(certification.len()).unwrap().to_le_bytes());
        auth.extend(certification);
        signed.extend(u32::try_from(auth.len()).unwrap().to_le_bytes());
        signed.extend(auth);
        signed
    }

    /// The same as an agent's evidence.
    pub fn evidence(&self, td: &Td) -> Vec<u8> {
        json!({ "quote": BASE64_STANDARD.encode(self.quote(td)), "cc_eventlog": null }).to_string().into_bytes()
    }
}

/// A maker of chips with SEV-SNP.
pub struct Amd {
    ark: Party,
    ask: Party,
    vcek: Party,
    asvk: Party,
    vlek: Party,
}

/// What a report of this maker's says.
#[derive(Clone)]
pub struct Guest {
    /// Bound to.
    pub report_data: [u8; 64],
    /// Bit 19 allows debugging.
    pub policy: u64,
    /// Privilege level.
    pub vmpl: u32,
    /// Of the initial memory.
    pub measurement: [u8; 48],
}

impl Default for Guest {
    fn default() -> Self {
        Self { report_data: [0; 64], policy: 0x30000, vmpl: 0, measurement: [0xc3; 48] }
    }
}

/// Identity of the chip made here.
pub const CHIP: [u8; 64] = [0x5a; 64];

impl Amd {
    /// New keys. ECDSA all along: what RSASSA-PSS adds is tested with AMD's own certificates.
    pub fn new() -> Self {
        let p384 = &PKCS_ECDSA_P384_SHA384;
        let svn =
            |n: u64, value: u8| CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 3704, 1, 3, n], tlv(2, &[value]));
        let hwid = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 3704, 1, 4], CHIP.to_vec());
        let ark = party("ARK-Test", p384, true, vec![], None);
        let ask = party("SEV-Test", p384, true, vec![], Some(&ark));
        let vcek = party("SEV-VCEK", p384, false, vec![svn(1, 4), svn(2, 1), svn(3, 20), svn(8, 72), hwid], Some(&ask));
        let csp =
            CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 3704, 1, 5], tlv(0x16, b"CN=cc.provider.example"));
        let asvk = party("SEV-VLEK-Test", p384, true, vec![], Some(&ark));
        let vlek = party("SEV-VLEK", p384, false, vec![svn(1, 4), svn(2, 1), svn(3, 20), svn(8, 72), csp], Some(&asvk));
        Self { ark, ask, vcek, asvk, vlek }
    }

    /// Its root, with the intermediate.
    pub fn root(&self) -> Root {
        Root { product: "Test", ark: self.ark.cert.der().to_vec(), ask: self.ask.cert.der().to_vec() }
    }

    /// The chip's certificate, PEM.
    pub fn vcek_pem(&self) -> String {
        self.vcek.cert.pem()
    }

    /// The same, DER.
    pub fn vcek_der(&self) -> Vec<u8> {
        self.vcek.cert.der().to_vec()
    }

    /// The certificate of the provider's key and that of its issuer, DER.
    pub fn vlek_chain(&self) -> [Vec<u8>; 2] {
        [&self.vlek, &self.asvk].map(|p| p.cert.der().to_vec())
    }

    /// The latter, PEM.
    pub fn asvk_pem(&self) -> String {
        self.asvk.cert.pem()
    }

    /// The root, PEM.
    pub fn ark_pem(&self) -> String {
        self.ark.cert.pem()
    }

    /// Evidence whose report is signed by the provider's key, with these certificates. Such hosts mask the chip.
    pub fn provided(&self, guest: &Guest, certificates: &[Vec<u8>]) -> Vec<u8> {
        let report = BASE64_STANDARD.encode(self.signed(guest, &self.vlek, 1, &[0; 64]));
        let chain: Vec<_> = certificates.iter().map(|der| json!({ "cert_type": "VLEK", "data": der })).collect();
        json!({ "attestation_report": report, "cert_chain": chain }).to_string().into_bytes()
    }

    /// A report, version 3.
    pub fn report(&self, guest: &Guest) -> Vec<u8> {
        self.signed(guest, &self.vcek, 0, &CHIP)
    }

    fn signed(&self, guest: &Guest, by: &Party, kind: u32, chip: &[u8; 64]) -> Vec<u8> {
        let mut out = vec![0; LEN];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &3u32.to_le_bytes());
        put(0x08, &guest.policy.to_le_bytes());
        put(0x30, &guest.vmpl.to_le_bytes());
        put(0x34, &1u32.to_le_bytes());
        put(0x48, &(kind << 2).to_le_bytes());
        put(0x50, &guest.report_data);
        put(0x90, &guest.measurement);
        put(0x180, &[4, 1, 0, 0, 0, 0, 20, 72]);
        put(0x188, &[0x19, 0x01, 1]);
        put(0x1a0, chip);
        let signature = by.sign(&out[..SIGNED]);
        for (half, at) in signature.chunks(48).zip([SIGNED, SIGNED + 72]) {
            let little: Vec<u8> = half.iter().rev().copied().collect();
            out[at..at + 48].copy_from_slice(&little);
        }
        out
    }

    /// Evidence of the kernel's report interface, with or without the host's certificate.
    pub fn evidence(&self, guest: &Guest, with_certificate: bool) -> Vec<u8> {
        let report = BASE64_STANDARD.encode(self.report(guest));
        let data = self.vcek.cert.der().to_vec();
        let chain = if with_certificate { json!([{ "cert_type": "VCEK", "data": data }]) } else { json!(null) };
        json!({ "attestation_report": report, "cert_chain": chain }).to_string().into_bytes()
    }
}
