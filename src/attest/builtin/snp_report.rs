//! The SEV-SNP attestation report (AMD 56860, table 23) and its JSON form in an attestation agent's evidence.

use serde::Deserialize;

use super::BuiltinError;

/// Length of a report, bytes.
pub const LEN: usize = 0x4a0;
/// How much of it is signed.
pub const SIGNED: usize = 0x2a0;
/// Bytes of r and of s in the signature, little-endian, of which a P-384 value fills 48.
const SCALAR: usize = 72;
/// ECDSA P-384 with SHA-384, the only signature algorithm there is.
const ECDSA_P384_SHA384: u32 = 1;

/// A report whose form was checked, nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(Box<[u8; LEN]>);

/// Security versions of the firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcb {
    /// Only from Turin on.
    pub fmc: Option<u8>,
    /// PSP boot loader.
    pub bootloader: u8,
    /// PSP operating system.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Microcode.
    pub microcode: u8,
}

impl Tcb {
    /// Reads a TCB_VERSION; its layout depends on the generation of the chip.
    pub fn from_bytes(b: [u8; 8], turin: bool) -> Self {
        if turin {
            Self { fmc: Some(b[0]), bootloader: b[1], tee: b[2], snp: b[3], microcode: b[7] }
        } else {
            Self { fmc: None, bootloader: b[0], tee: b[1], snp: b[6], microcode: b[7] }
        }
    }

    fn to_bytes(self) -> [u8; 8] {
        match self.fmc {
            Some(fmc) => [fmc, self.bootloader, self.tee, self.snp, 0, 0, 0, self.microcode],
            None => [self.bootloader, self.tee, 0, 0, 0, 0, self.snp, self.microcode],
        }
    }
}

impl Report {
    /// Takes the bytes that the firmware made.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BuiltinError> {
        let bytes: [u8; LEN] = bytes.try_into().map_err(|_| BuiltinError::Report("not 1184 bytes"))?;
        let report = Self(Box::new(bytes));
        if !(2..=5).contains(&report.u32(0)) {
            return Err(BuiltinError::Report("a version that is not 2 to 5"));
        }
        if report.u32(0x34) != ECDSA_P384_SHA384 {
            return Err(BuiltinError::Report("a signature algorithm other than ECDSA P-384"));
        }
        Ok(report)
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        // Offsets are constants below; one beyond the end would be seen by every test.
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// Layout of the report.
    pub fn version(&self) -> u32 {
        self.u32(0)
    }
    /// Security version of the guest, from its ID block.
    pub fn guest_svn(&self) -> u32 {
        self.u32(4)
    }
    /// Guest policy; bit 19 allows debugging.
    pub fn policy(&self) -> u64 {
        u64::from_le_bytes(self.array(0x08))
    }
    /// Of the ID block.
    pub fn family_id(&self) -> [u8; 16] {
        self.array(0x10)
    }
    /// Of the ID block.
    pub fn image_id(&self) -> [u8; 16] {
        self.array(0x20)
    }
    /// Privilege level of who asked for the report, 0 the highest.
    pub fn vmpl(&self) -> u32 {
        self.u32(0x30)
    }
    /// Features of the platform.
    pub fn platform_info(&self) -> u64 {
        u64::from_le_bytes(self.array(0x40))
    }
    /// What signed the report: 0 a VCEK, 1 a VLEK, 7 nothing.
    pub fn signing_key(&self) -> u32 {
        self.u32(0x48) >> 2 & 7
    }
    /// What the guest gave.
    pub fn report_data(&self) -> [u8; 64] {
        self.array(0x50)
    }
    /// Of the initial memory.
    pub fn measurement(&self) -> [u8; 48] {
        self.array(0x90)
    }
    /// What the host gave.
    pub fn host_data(&self) -> [u8; 32] {
        self.array(0xc0)
    }
    /// Of the ID block's key.
    pub fn id_key_digest(&self) -> [u8; 48] {
        self.array(0xe0)
    }
    /// Of the key that certified the former.
    pub fn author_key_digest(&self) -> [u8; 48] {
        self.array(0x110)
    }
    /// TCB that the signing key was derived for.
    pub fn reported_tcb(&self, turin: bool) -> Tcb {
        Tcb::from_bytes(self.array(0x180), turin)
    }
    /// CPU family and model, from version 3 on.
    pub fn cpu(&self) -> Option<(u8, u8)> {
        (self.version() >= 3).then(|| (self.0[0x188], self.0[0x189]))
    }
    /// The chip, zero when the host masks it.
    pub fn chip_id(&self) -> [u8; 64] {
        self.array(0x1a0)
    }
    /// What is signed.
    pub fn signed(&self) -> &[u8] {
        &self.0[..SIGNED]
    }

    /// r and s, 48 bytes each, big-endian; `None` when they are longer than a P-384 scalar.
    pub fn signature(&self) -> Option<[u8; 96]> {
        let mut out = [0; 96];
        for (at, half) in [(SIGNED, 0), (SIGNED + SCALAR, 48)] {
            let scalar: [u8; SCALAR] = self.array(at);
            if scalar[48..].iter().any(|b| *b != 0) {
                return None;
            }
            for (to, from) in out[half..half + 48].iter_mut().zip(scalar[..48].iter().rev()) {
                *to = *from;
            }
        }
        Some(out)
    }

    /// Puts the bytes together again from the JSON that the crate `sev` (6 to 8) makes of a report and that
    /// attestation agents send. A field that is missing or longer than its place is an error; a reserved one is
    /// zero, else the signature would not verify.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, BuiltinError> {
        let json = Json::deserialize(value).map_err(|_| BuiltinError::Report("not the JSON of a report"))?;
        let mut out = [0; LEN];
        let mut put = |at: usize, bytes: &[u8], len: usize| {
            if bytes.len() != len {
                return Err(BuiltinError::Report("a field of another length"));
            }
            out[at..at + len].copy_from_slice(bytes);
            Ok(())
        };
        put(0x00, &json.version.to_le_bytes(), 4)?;
        put(0x04, &json.guest_svn.to_le_bytes(), 4)?;
        put(0x08, &json.policy.to_le_bytes(), 8)?;
        put(0x10, &json.family_id, 16)?;
        put(0x20, &json.image_id, 16)?;
        put(0x30, &json.vmpl.to_le_bytes(), 4)?;
        put(0x34, &json.sig_algo.to_le_bytes(), 4)?;
        put(0x38, &json.current_tcb.to_bytes(), 8)?;
        put(0x40, &json.plat_info.to_le_bytes(), 8)?;
        put(0x48, &json.key_info.to_le_bytes(), 4)?;
        put(0x50, &json.report_data, 64)?;
        put(0x90, &json.measurement, 48)?;
        put(0xc0, &json.host_data, 32)?;
        put(0xe0, &json.id_key_digest, 48)?;
        put(0x110, &json.author_key_digest, 48)?;
        put(0x140, &json.report_id, 32)?;
        put(0x160, &json.report_id_ma, 32)?;
        put(0x180, &json.reported_tcb.to_bytes(), 8)?;
        if json.version >= 3 {
            let cpu = [json.cpuid_fam_id, json.cpuid_mod_id, json.cpuid_step].map(Option::unwrap_or_default);
            put(0x188, &cpu, 3)?;
        }
        put(0x1a0, &json.chip_id, 64)?;
        put(0x1e0, &json.committed_tcb.to_bytes(), 8)?;
        put(0x1e8, &json.current.to_bytes(), 3)?;
        put(0x1ec, &json.committed.to_bytes(), 3)?;
        put(0x1f0, &json.launch_tcb.to_bytes(), 8)?;
        if json.version >= 5 {
            put(0x1f8, &json.launch_mit_vector.unwrap_or_default().to_le_bytes(), 8)?;
            put(0x200, &json.current_mit_vector.unwrap_or_default().to_le_bytes(), 8)?;
        }
        put(SIGNED, &json.signature.r, SCALAR)?;
        put(SIGNED + SCALAR, &json.signature.s, SCALAR)?;
        Self::from_bytes(&out)
    }
}

#[derive(Deserialize)]
struct Json {
    version: u32,
    guest_svn: u32,
    policy: u64,
    family_id: Vec<u8>,
    image_id: Vec<u8>,
    vmpl: u32,
    sig_algo: u32,
    current_tcb: JsonTcb,
    plat_info: u64,
    key_info: u32,
    report_data: Vec<u8>,
    measurement: Vec<u8>,
    host_data: Vec<u8>,
    id_key_digest: Vec<u8>,
    author_key_digest: Vec<u8>,
    report_id: Vec<u8>,
    report_id_ma: Vec<u8>,
    reported_tcb: JsonTcb,
    cpuid_fam_id: Option<u8>,
    cpuid_mod_id: Option<u8>,
    cpuid_step: Option<u8>,
    chip_id: Vec<u8>,
    committed_tcb: JsonTcb,
    current: JsonVersion,
    committed: JsonVersion,
    launch_tcb: JsonTcb,
    launch_mit_vector: Option<u64>,
    current_mit_vector: Option<u64>,
    signature: JsonSignature,
}

#[derive(Deserialize)]
struct JsonTcb {
    fmc: Option<u8>,
    bootloader: u8,
    tee: u8,
    snp: u8,
    microcode: u8,
}

impl JsonTcb {
    fn to_bytes(&self) -> [u8; 8] {
        let Self { fmc, bootloader, tee, snp, microcode } = *self;
        Tcb { fmc, bootloader, tee, snp, microcode }.to_bytes()
    }
}

#[derive(Deserialize)]
struct JsonVersion {
    major: u8,
    minor: u8,
    build: u8,
}

impl JsonVersion {
    fn to_bytes(&self) -> [u8; 3] {
        [self.build, self.minor, self.major]
    }
}

#[derive(Deserialize)]
struct JsonSignature {
    r: Vec<u8>,
    s: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::from_hex;

    fn milan() -> Vec<u8> {
        from_hex(include_str!("../../../tests/fixtures/quotes/report_milan.hex").trim()).unwrap()
    }

    #[test]
    fn the_fields_of_a_real_report_are_where_they_should_be() {
        let report = Report::from_bytes(&milan()).unwrap();
        assert_eq!((report.version(), report.vmpl(), report.policy()), (2, 0, 0x30000));
        assert_eq!(report.signing_key(), 0);
        assert_eq!(report.reported_tcb(false), Tcb { fmc: None, bootloader: 3, tee: 0, snp: 8, microcode: 115 });
        assert_eq!(report.chip_id()[..4], [212, 149, 84, 236]);
        assert_eq!(report.measurement()[..4], [122, 30, 92, 38]);
        assert_eq!(report.report_data()[..2], [0xd4, 0x47]);
    }

    #[test]
    fn json_of_an_agent_gives_the_bytes_of_the_firmware() {
        let recorded = include_str!("../../../tests/fixtures/quotes/snp_milan_evidence.json");
        let json: serde_json::Value = serde_json::from_str(recorded).unwrap();
        let report = Report::from_json(&json["attestation_report"]).unwrap();
        assert_eq!(report, Report::from_bytes(&milan()).unwrap());
        let mut short = json["attestation_report"].clone();
        short["measurement"].as_array_mut().unwrap().pop();
        assert_eq!(Report::from_json(&short), Err(BuiltinError::Report("a field of another length")));
    }

    #[test]
    fn another_version_algorithm_or_length_is_refused() {
        let mut bytes = milan();
        bytes[0] = 1;
        assert!(Report::from_bytes(&bytes).is_err());
        bytes[0] = 6;
        assert!(Report::from_bytes(&bytes).is_err());
        bytes[0] = 3;
        assert!(Report::from_bytes(&bytes).is_ok());
        bytes[0x34] = 0;
        assert!(Report::from_bytes(&bytes).is_err());
        assert!(Report::from_bytes(&milan()[1..]).is_err());
    }

    #[test]
    fn a_scalar_beyond_the_curve_is_no_signature() {
        let mut bytes = milan();
        assert!(Report::from_bytes(&bytes).unwrap().signature().is_some());
        bytes[SIGNED + 48] = 1;
        assert_eq!(Report::from_bytes(&bytes).unwrap().signature(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]

        #[test]
        fn no_report_panics(flips in proptest::collection::vec((0..LEN, any::<u8>()), 0..8), cut in 0..LEN + 8) {
            let mut bytes = vec![0; LEN];
            bytes[0] = 2;
            bytes[0x34] = 1;
            flips.into_iter().for_each(|(at, value)| bytes[at] = value);
            bytes.resize(if cut < 64 { cut } else { LEN }, 0);
            if let Ok(report) = Report::from_bytes(&bytes) {
                let _ = (report.signature(), report.cpu(), report.chip_id(), report.reported_tcb(true));
            }
        }
    }
}
