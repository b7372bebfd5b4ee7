//! SEV-SNP evidence in JSON: the members of the attestation report (SEV-SNP ABI, revision 1.58, table 23) under the
//! names that the crate `sev` 8 gives them, which CoCo's service reads, and the certificates of the host's table.

use serde_json::{Value, json};

use crate::attest::builtin::guids;

/// Length of an attestation report.
const REPORT: usize = 0x4a0;
/// Largest certificate taken of the host's table, and how many: the host is not trusted.
const MAX_CERTIFICATE: usize = 8 * 1024;
const MAX_CERTIFICATES: usize = 8;
/// CPU family (CPUID) of Turin, whose TCB versions have another layout.
const TURIN_FAMILY: u8 = 0x1a;
/// Names of the certificates by GUID (GHCB specification, table 7).
const CERTIFICATES: [(u128, &str); 5] = [
    (0xc0b406a4_a803_4952_9743_3fb6014cd0ae, "ARK"),
    (0x4ab7b379_bbac_4fe4_a02f_05aef327c782, "ASK"),
    (0x63da758d_e664_4564_adc5_f4b93be8accd, "VCEK"),
    (0xa8074bc2_a25a_483e_aae6_39c045a0b8a1, "VLEK"),
    (0x92f81bc3_5811_4d3d_97ff_d19f88dc67ea, "CRL"),
];

/// Fixed-size fields of a report; the length was checked.
struct Fields<'a>(&'a [u8; REPORT]);

impl Fields<'_> {
    fn bytes(&self, at: usize, count: usize) -> &[u8] {
        &self.0[at..at + count]
    }
    fn u32(&self, at: usize) -> u32 {
        self.bytes(at, 4).iter().rev().fold(0, |n, b| n << 8 | u32::from(*b))
    }
    fn u64(&self, at: usize) -> u64 {
        self.bytes(at, 8).iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    }
    fn tcb(&self, at: usize, turin: bool) -> Value {
        let b = self.bytes(at, 8);
        if turin {
            json!({ "fmc": b[0], "bootloader": b[1], "tee": b[2], "snp": b[3], "microcode": b[7] })
        } else {
            json!({ "fmc": null, "bootloader": b[0], "tee": b[1], "snp": b[6], "microcode": b[7] })
        }
    }
    fn version(&self, at: usize) -> Value {
        let b = self.bytes(at, 3);
        json!({ "build": b[0], "minor": b[1], "major": b[2] })
    }
    /// Whether TCB versions have Turin's layout. Reports of version 2 do not tell the CPU; there a Turin shows by its
    /// chip id of 8 bytes.
    fn is_turin(&self) -> bool {
        match self.u32(0) {
            2 => {
                let chip = self.bytes(0x1a0, 64);
                chip[..8] != [0; 8] && chip[8..] == [0; 56]
            }
            _ => self.0[0x188] == TURIN_FAMILY,
        }
    }
}

/// The evidence, or what is wrong with the report.
pub(super) fn evidence(report: &[u8], table: &[u8], report_data: &[u8; 64]) -> Result<String, &'static str> {
    let fields = Fields(report.first_chunk().ok_or("a SEV-SNP report that is too short")?);
    if fields.bytes(0x50, 64) != report_data {
        return Err("a SEV-SNP report over other data");
    }
    let version = fields.u32(0);
    if version < 2 {
        return Err("a SEV-SNP report of version 0 or 1");
    }
    let turin = fields.is_turin();
    let since = |least: u32, value: Value| if version >= least { value } else { Value::Null };
    let report = json!({
        "version": version,
        "guest_svn": fields.u32(0x04),
        "policy": fields.u64(0x08),
        "family_id": fields.bytes(0x10, 16),
        "image_id": fields.bytes(0x20, 16),
        "vmpl": fields.u32(0x30),
        "sig_algo": fields.u32(0x34),
        "current_tcb": fields.tcb(0x38, turin),
        "plat_info": fields.u64(0x40),
        "key_info": fields.u32(0x48),
        "report_data": fields.bytes(0x50, 64),
        "measurement": fields.bytes(0x90, 48),
        "host_data": fields.bytes(0xc0, 32),
        "id_key_digest": fields.bytes(0xe0, 48),
        "author_key_digest": fields.bytes(0x110, 48),
        "report_id": fields.bytes(0x140, 32),
        "report_id_ma": fields.bytes(0x160, 32),
        "reported_tcb": fields.tcb(0x180, turin),
        "cpuid_fam_id": since(3, fields.0[0x188].into()),
        "cpuid_mod_id": since(3, fields.0[0x189].into()),
        "cpuid_step": since(3, fields.0[0x18a].into()),
        "chip_id": fields.bytes(0x1a0, 64),
        "committed_tcb": fields.tcb(0x1e0, turin),
        "current": fields.version(0x1e8),
        "committed": fields.version(0x1ec),
        "launch_tcb": fields.tcb(0x1f0, turin),
        "launch_mit_vector": since(5, fields.u64(0x1f8).into()),
        "current_mit_vector": since(5, fields.u64(0x200).into()),
        "signature": { "r": fields.bytes(0x2a0, 72), "s": fields.bytes(0x2e8, 72) },
    });
    Ok(json!({ "attestation_report": report, "cert_chain": certificates(table)? }).to_string())
}

/// The host's certificates; `null` when it gave none.
fn certificates(table: &[u8]) -> Result<Value, &'static str> {
    let mut found = Vec::new();
    for entry in table.chunks(24) {
        let Some((guid, place)) = entry.split_first_chunk::<16>() else { return Err("a cut certificate table") };
        if *guid == [0; 16] {
            break;
        }
        let guids = guids(*guid);
        let number = |at: usize| place.get(at..at + 4).map(|b| b.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)));
        let (Some(offset), Some(length)) = (number(0), number(4)) else { return Err("a cut certificate table") };
        let Some((_, name)) = CERTIFICATES.iter().find(|(known, _)| guids.contains(known)) else { continue };
        let data = offset.checked_add(length).and_then(|end| table.get(offset..end));
        let data = data.ok_or("a certificate beyond the host's table")?;
        if data.len() > MAX_CERTIFICATE || found.len() == MAX_CERTIFICATES {
            return Err("too much in the host's certificate table");
        }
        found.push(json!({ "cert_type": name, "data": data }));
    }
    Ok(if found.is_empty() { Value::Null } else { found.into() })
}

#[cfg(test)]
#[path = "snp_tests.rs"]
mod tests;
