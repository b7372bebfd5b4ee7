//! `verify.provider = "builtin"`: what the appraisal in process is measured against.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Appraisal in process, without any service.
#[derive(Debug, Clone, PartialEq)]
pub struct Builtin {
    /// Reference values; evidence must match one block of its TEE in every field that the block names.
    pub references: Vec<Reference>,
    /// Files with collateral for quotes, JSON.
    pub collateral: Vec<PathBuf>,
    /// Base URL of a PCCS or of Intel's PCS, asked for collateral that no file holds.
    pub pccs_addr: Option<url::Url>,
    /// TCB statuses of a quote that are accepted, by Intel's names.
    pub minimum_tcb: Vec<String>,
    /// Files with certificates between a report and AMD's root, PEM.
    pub amd_certs: Vec<PathBuf>,
    /// Base URL of AMD's key distribution service, asked for certificates that neither evidence nor file holds.
    pub kds_addr: Option<url::Url>,
    /// Whether a TEE that its host can debug is accepted.
    pub allow_debug: bool,
    /// How long one request for collateral or a certificate may take.
    pub timeout: Duration,
}

/// One `[[*.verify.reference]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// TEE by its kbs-types name.
    pub tee: &'static str,
    /// Fields and what each may be: any of the list.
    pub values: BTreeMap<&'static str, Vec<Wanted>>,
}

/// What a field of evidence is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These bytes, in the bits that the mask has.
    Bytes {
        /// Expected.
        value: Vec<u8>,
        /// Of the same length.
        mask: Vec<u8>,
    },
    /// This number.
    Exactly(u64),
    /// This number or a higher one.
    AtLeast(u64),
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// So many bytes.
    Bytes(usize),
    /// A number up to this one; equality counts.
    Exactly(u64),
    /// A security version up to this one; a higher one is as good.
    AtLeast(u64),
}

/// TCB statuses of Intel's collateral that an operator may accept, best first. `Revoked` never is.
pub const TCB_STATUSES: &[&str] = &[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
];

/// A field by its name.
type Field = (&'static str, Kind);

/// The TEEs that are appraised in process and the fields of their evidence.
///
/// Sources: Intel TDX DCAP quoting library API, TD report bodies; Intel SGX ECDSA quote library API, report body;
/// AMD SEV-SNP firmware ABI (56860), table 23; of a TPM the digest of its key, and the SHA-256 bank.
pub const VOCABULARY: &[(&str, &[Field])] = &[
    (
        "tdx",
        &[
            ("mr_td", Kind::Bytes(48)),
            ("rtmr0", Kind::Bytes(48)),
            ("rtmr1", Kind::Bytes(48)),
            ("rtmr2", Kind::Bytes(48)),
            ("rtmr3", Kind::Bytes(48)),
            ("mr_seam", Kind::Bytes(48)),
            ("mr_signer_seam", Kind::Bytes(48)),
            ("mr_config_id", Kind::Bytes(48)),
            ("mr_owner", Kind::Bytes(48)),
            ("mr_owner_config", Kind::Bytes(48)),
            ("td_attributes", Kind::Bytes(8)),
            ("xfam", Kind::Bytes(8)),
        ],
    ),
    (
        "sgx",
        &[
            ("mr_enclave", Kind::Bytes(32)),
            ("mr_signer", Kind::Bytes(32)),
            ("attributes", Kind::Bytes(16)),
            ("isv_prod_id", Kind::Exactly(0xffff)),
            ("isv_svn", Kind::AtLeast(0xffff)),
        ],
    ),
    (
        "snp",
        &[
            ("measurement", Kind::Bytes(48)),
            ("host_data", Kind::Bytes(32)),
            ("id_key_digest", Kind::Bytes(48)),
            ("author_key_digest", Kind::Bytes(48)),
            ("family_id", Kind::Bytes(16)),
            ("image_id", Kind::Bytes(16)),
            ("chip_id", Kind::Bytes(64)),
            ("policy", Kind::Bytes(8)),
            ("platform_info", Kind::Bytes(8)),
            ("vmpl", Kind::Exactly(3)),
            ("guest_svn", Kind::AtLeast(0xffff_ffff)),
            ("tcb_fmc", Kind::AtLeast(0xff)),
            ("tcb_bootloader", Kind::AtLeast(0xff)),
            ("tcb_tee", Kind::AtLeast(0xff)),
            ("tcb_snp", Kind::AtLeast(0xff)),
            ("tcb_microcode", Kind::AtLeast(0xff)),
        ],
    ),
    (
        "tpm",
        &[
            ("ak", Kind::Bytes(32)),
            ("pcr0", Kind::Bytes(32)),
            ("pcr1", Kind::Bytes(32)),
            ("pcr2", Kind::Bytes(32)),
            ("pcr3", Kind::Bytes(32)),
            ("pcr4", Kind::Bytes(32)),
            ("pcr5", Kind::Bytes(32)),
            ("pcr6", Kind::Bytes(32)),
            ("pcr7", Kind::Bytes(32)),
            ("pcr8", Kind::Bytes(32)),
            ("pcr9", Kind::Bytes(32)),
            ("pcr10", Kind::Bytes(32)),
            ("pcr11", Kind::Bytes(32)),
            ("pcr12", Kind::Bytes(32)),
            ("pcr13", Kind::Bytes(32)),
            ("pcr14", Kind::Bytes(32)),
            ("pcr15", Kind::Bytes(32)),
            ("pcr16", Kind::Bytes(32)),
            ("pcr17", Kind::Bytes(32)),
            ("pcr18", Kind::Bytes(32)),
            ("pcr19", Kind::Bytes(32)),
            ("pcr20", Kind::Bytes(32)),
            ("pcr21", Kind::Bytes(32)),
            ("pcr22", Kind::Bytes(32)),
            ("pcr23", Kind::Bytes(32)),
        ],
    ),
];

/// Value of a field in evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Bytes, in the order in which they are written.
    Bytes(Vec<u8>),
    /// A number.
    Number(u64),
}

impl Wanted {
    /// Whether `seen` is it. Bytes of another length and values of another kind never are.
    pub fn accepts(&self, seen: &Seen) -> bool {
        match (self, seen) {
            (Self::Bytes { value, mask }, Seen::Bytes(seen)) => {
                value.len() == seen.len()
                    && mask.len() == seen.len()
                    && value.iter().zip(seen).zip(mask).all(|((v, s), m)| v & m == s & m)
            }
            (Self::Exactly(n), Seen::Number(seen)) => seen == n,
            (Self::AtLeast(n), Seen::Number(seen)) => seen >= n,
            _ => false,
        }
    }
}

impl Reference {
    /// Names of the fields in which `seen` differs. A field that the evidence lacks differs.
    pub fn differences(&self, seen: &BTreeMap<&'static str, Seen>) -> Vec<&'static str> {
        let differs = |(name, any): &(&&'static str, &Vec<Wanted>)| {
            !seen.get(**name).is_some_and(|seen| any.iter().any(|wanted| wanted.accepts(seen)))
        };
        self.values.iter().filter(differs).map(|(name, _)| *name).collect()
    }
}

impl fmt::Display for Seen {
    /// As the value is written in a reference block, without quotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => bytes.iter().try_for_each(|b| write!(f, "{b:02x}")),
            Self::Number(n) => write!(f, "{n}"),
        }
    }
}

/// Bytes of a text of hexadecimal digits, which may be of either case.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let nibble = |c: &u8| char::from(*c).to_digit(16);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[a, b]| Some((nibble(a)? << 4 | nibble(b)?) as u8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_match_in_the_bits_of_the_mask() {
        let wanted = Wanted::Bytes { value: vec![0x10, 0xff], mask: vec![0xf0, 0x00] };
        assert!(wanted.accepts(&Seen::Bytes(vec![0x1f, 0x00])));
        assert!(!wanted.accepts(&Seen::Bytes(vec![0x2f, 0x00])));
        assert!(!wanted.accepts(&Seen::Bytes(vec![0x10])));
        assert!(!wanted.accepts(&Seen::Number(0x10)));
        assert!(Wanted::AtLeast(3).accepts(&Seen::Number(4)) && !Wanted::AtLeast(3).accepts(&Seen::Number(2)));
        assert!(Wanted::Exactly(3).accepts(&Seen::Number(3)) && !Wanted::Exactly(3).accepts(&Seen::Number(4)));
    }

    #[test]
    fn a_block_names_what_differs_and_what_is_missing() {
        let values = BTreeMap::from([
            ("isv_svn", vec![Wanted::AtLeast(2)]),
            ("isv_prod_id", vec![Wanted::Exactly(1), Wanted::Exactly(2)]),
        ]);
        let block = Reference { tee: "sgx", values };
        let mut seen = BTreeMap::from([("isv_svn", Seen::Number(9)), ("isv_prod_id", Seen::Number(2))]);
        assert!(block.differences(&seen).is_empty());
        seen.insert("isv_prod_id", Seen::Number(3));
        assert_eq!(block.differences(&seen), ["isv_prod_id"]);
        seen.remove("isv_svn");
        assert_eq!(block.differences(&seen), ["isv_prod_id", "isv_svn"]);
    }

    #[test]
    fn hex_is_read_as_it_is_shown() {
        assert_eq!(from_hex("00fFa0"), Some(vec![0, 0xff, 0xa0]));
        assert_eq!(Seen::Bytes(vec![0, 0xff, 0xa0]).to_string(), "00ffa0");
        for bad in ["0", "0g", "+1", "é"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
