//! A `[[*.verify.reference]]` block made from what was seen.
//!
//! What says which software runs is set; what changes with each boot, each machine or each update of the firmware
//! stands beside it as a comment, for who wants it.

use crate::attest::Look;
use crate::config::Seen;

use super::report::Outcome;

/// What is set, of each TEE; all else is a comment. What is zero when nobody uses it is set only if it is not.
const SET: &[(&str, &[&str])] = &[
    ("tdx", &["mr_td", "rtmr0", "rtmr1", "rtmr2", "mr_config_id", "mr_owner", "mr_owner_config", "td_attributes"]),
    ("sgx", &["mr_enclave", "isv_prod_id", "isv_svn"]),
    (
        "snp",
        &[
            "measurement",
            "host_data",
            "policy",
            "vmpl",
            "guest_svn",
            "tcb_fmc",
            "tcb_bootloader",
            "tcb_tee",
            "tcb_snp",
            "tcb_microcode",
        ],
    ),
    ("tpm", &["ak", "pcr0", "pcr1", "pcr2", "pcr3", "pcr4", "pcr5", "pcr6", "pcr7"]),
];

/// Why a field is not set, or what it does.
const NOTES: &[(&str, &str)] = &[
    ("rtmr3", "what the guest extends while it runs"),
    ("mr_seam", "the TDX module; changes with its updates"),
    ("xfam", "CPU features of the TD"),
    ("mr_signer", "instead of mr_enclave: every enclave of this signer"),
    ("attributes", "bit 1 of the first byte is debugging, which is refused anyway"),
    ("isv_svn", "at least"),
    ("guest_svn", "at least"),
    ("tcb_bootloader", "tcb_*: at least"),
    ("chip_id", "this one machine alone"),
    ("id_key_digest", "instead of measurement: every guest that this key signed"),
    ("platform_info", "features of the host"),
    ("ak", "this one machine's key"),
    ("pcr0", "firmware"),
    ("pcr4", "boot loader; changes with its updates"),
    ("pcr7", "secure boot"),
    ("pcr8", "from here on: kernel, command line, distribution's own"),
];

/// What a host says of itself to who is on it.
pub(super) const OWN: &str = "# Shown by this host of itself: worth what you know of what runs here.";

/// How far what a peer showed can be trusted, in a comment.
pub(crate) fn trust(outcome: Outcome, reason: Option<&str>) -> &'static str {
    let signed = ["reference-missing", "reference-mismatch", "tpm-pcr-value", "tpm-pcr-missing"];
    match (outcome, reason) {
        (Outcome::Verified, _) => "# Its evidence was appraised and accepted.",
        (_, Some(reason)) if signed.contains(&reason) => {
            "# Its signatures were checked; whether it runs what it should, only you can know.\n\
             # Compare the values with what you built before you use them."
        }
        _ => {
            "# WARNING: nobody vouches for it: trust on first use. Whoever answered may have made all of this up.\n\
             # Compare the values with what you built before you use them."
        }
    }
}

/// The block; `None` for evidence of a TEE that is not appraised in process. `whose`: whom it is about, in words;
/// `trust`: how far it can be trusted, as a comment.
pub(crate) fn block(tee: &str, look: &Look, whose: &str, trust: &str) -> Option<String> {
    let (_, set) = SET.iter().find(|(name, _)| *name == tee)?;
    let whose: String = whose.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    let mut out = format!("# What {whose} showed, TEE {tee}.\n{trust}\n");
    out.push_str(
        "# On the side that verifies, with provider = \"builtin\"; in an egress write [[egress.verify.reference]].\n",
    );
    out.push_str(&format!("[[ingress.verify.reference]]\ntee = \"{tee}\"\n"));
    let mut line = |name: &str, seen: &Seen, live: bool| {
        let value = match seen {
            Seen::Number(n) => n.to_string(),
            Seen::Bytes(_) if name == "ak" => format!("\"sha256:{seen}\""),
            Seen::Bytes(_) => format!("\"{seen}\""),
        };
        let note = NOTES.iter().find(|(field, _)| *field == name).map(|(_, note)| format!(" # {note}"));
        out.push_str(&format!("{}{name} = {value}{}\n", if live { "" } else { "# " }, note.unwrap_or_default()));
    };
    let is_zero = |seen: &Seen| matches!(seen, Seen::Bytes(b) if b.iter().all(|b| *b == 0));
    for name in set.iter() {
        if let Some(seen) = look.seen.get(name) {
            let optional = ["mr_config_id", "mr_owner", "mr_owner_config", "host_data"].contains(name);
            line(name, seen, !(optional && is_zero(seen)));
        }
    }
    let mut others: Vec<_> = look.seen.iter().filter(|(name, _)| !set.contains(name)).collect();
    others.sort_by_key(|(name, _)| (name.len(), **name));
    for (name, seen) in others {
        line(name, seen, false);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use base64::prelude::{BASE64_STANDARD, Engine};

    use super::*;
    use crate::attest::{Evidence, RuntimeData, look};
    use crate::config::{InstanceName, Reference, VerifyProvider, parse};

    fn recorded(tee: &str) -> Look {
        let fixture = |name: &str| {
            std::fs::read(format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))).expect("fixture")
        };
        let bytes = match tee {
            "snp" => fixture("quotes/snp_milan_evidence.json"),
            "tpm" => fixture("coco/grpc-tpm-affirming.evidence.json"),
            quote => {
                let quote = BASE64_STANDARD.encode(fixture(&format!("quotes/{quote}_quote")));
                format!(r#"{{"quote":"{quote}"}}"#).into_bytes()
            }
        };
        let runtime_data = RuntimeData::for_key(b"key").canonical().to_owned();
        look(&Evidence { tee: tee.into(), evidence: bytes, additional: None, runtime_data }).expect(tee)
    }

    /// The block, pasted into a configuration.
    fn pasted(block: &str) -> Reference {
        let text = format!(
            "[[ingress]]\nname = \"x\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:1\"\n\
             [ingress.verify]\nprovider = \"builtin\"\npccs_addr = \"https://pccs.example/\"\n{block}"
        );
        let loaded = parse(InstanceName::new("x").unwrap(), Path::new("x.toml"), &text).expect(block);
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        let verify = loaded.config.endpoints[0].ra.verify.clone().unwrap();
        let VerifyProvider::Builtin(builtin) = verify.provider else { panic!("not builtin") };
        builtin.references[0].clone()
    }

    #[test]
    fn a_pasted_block_accepts_what_was_seen_and_nothing_else() {
        for (tee, measurement) in [("tdx", "rtmr1"), ("sgx", "mr_enclave"), ("snp", "measurement"), ("tpm", "pcr4")] {
            let look = recorded(tee);
            let block = block(tee, &look, "192.0.2.1:443\u{1b}[31m", trust(Outcome::NotAppraised, None)).unwrap();
            assert!(block.contains("trust on first use") && !block.contains('\u{1b}'), "{block}");
            let reference = pasted(&block);
            assert_eq!(reference.differences(&look.seen), Vec::<&str>::new(), "{block}");
            let mut other = look.seen.clone();
            let Some(Seen::Bytes(bytes)) = other.get_mut(measurement) else { panic!("{tee}") };
            bytes[0] ^= 1;
            assert_eq!(reference.differences(&other), [measurement], "{block}");
            // With every comment taken away too.
            let all = block.replace("\n# ", "\n");
            let fields: Vec<_> = all.lines().filter(|l| l.contains(" = ") && !l.starts_with("On the")).collect();
            let whole = format!("[[ingress.verify.reference]]\n{}\n", fields.join("\n"));
            assert!(pasted(&whole).values.len() >= look.seen.len(), "{whole}");
        }
    }

    #[test]
    fn who_vouches_is_said_and_a_foreign_tee_has_no_block() {
        let look = recorded("sgx");
        let text = |outcome, reason| block("sgx", &look, "x", trust(outcome, reason)).unwrap();
        assert!(text(Outcome::Verified, None).contains("accepted"));
        assert!(text(Outcome::Refused, Some("reference-missing")).contains("signatures were checked"));
        assert!(text(Outcome::Refused, Some("quote-signature")).contains("WARNING"));
        assert_eq!(block("sample", &look, "x", OWN), None);
    }
}
