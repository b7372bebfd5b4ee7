//! `verify.provider = "builtin"`.

use super::*;

const MR_TD: &str = "a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1";

fn file(keys: &str, blocks: &str) -> String {
    format!(
        "[[ingress]]\nname = \"a\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:2\"\n\
         [ingress.verify]\nprovider = \"builtin\"\n{keys}\n{blocks}"
    )
}

fn block(lines: &str) -> String {
    format!("[[ingress.verify.reference]]\n{lines}\n")
}

fn load(text: &str) -> Result<Loaded, Report> {
    parse(InstanceName::new("a").unwrap(), Path::new("a.toml"), text)
}

fn good(keys: &str, blocks: &str) -> Builtin {
    let loaded = load(&file(keys, blocks)).unwrap_or_else(|r| panic!("{r:?}"));
    let verify = loaded.config.endpoints[0].ra.verify.clone().unwrap();
    let VerifyProvider::Builtin(builtin) = verify.provider else { panic!("{verify:?}") };
    builtin
}

fn errors(keys: &str, blocks: &str) -> Vec<(String, String)> {
    let report = load(&file(keys, blocks)).expect_err("refused");
    report.errors().map(|d| (d.reason.to_owned(), d.to_string())).collect()
}

const PCCS: &str = "pccs_addr = \"http://127.0.0.1:8081/\"";

#[test]
fn blocks_are_read_with_lists_masks_and_versions() {
    let tdx = format!("tee = \"tdx\"\nmr_td = [\"{MR_TD}\", \"{}\"]\n", "B2".repeat(48));
    let attributes = "td_attributes = \"0000001000000000/ffffffff00000000\"";
    let sgx = format!("tee = \"sgx\"\nmr_signer = \"{}\"\nisv_svn = 3\nisv_prod_id = [1, 2]", "0f".repeat(32));
    let snp = "tee = \"snp\"\npolicy = \"0000000000030000\"\ntcb_snp = 20";
    let b = good(PCCS, &[block(&(tdx + attributes)), block(&sgx), block(snp)].concat());
    assert_eq!(b.minimum_tcb, ["UpToDate"]);
    assert!(!b.allow_debug);
    let [tdx, sgx, snp] = b.references.as_slice() else { panic!("{:?}", b.references) };
    assert_eq!(tdx.values["mr_td"].len(), 2);
    let Wanted::Bytes { value, mask } = &tdx.values["td_attributes"][0] else { panic!("no bytes") };
    assert_eq!((value[3], mask[3], mask[4]), (0x10, 0xff, 0));
    assert_eq!(sgx.values["isv_svn"], [Wanted::AtLeast(3)]);
    assert_eq!(sgx.values["isv_prod_id"], [Wanted::Exactly(1), Wanted::Exactly(2)]);
    // A report from below VMPL 0 is not the guest's own.
    assert_eq!(snp.values["vmpl"], [Wanted::Exactly(0)]);
    let below = good("", &block("tee = \"snp\"\nguest_svn = 0\nvmpl = [0, 2]"));
    assert_eq!(below.references[0].values["vmpl"].len(), 2);
}

#[test]
fn each_mistake_in_a_block_has_its_place() {
    for (lines, reason, position, words) in [
        ("mr_td = \"00\"", "missing", "a.toml:9:1", "`tee` is missing"),
        ("tee = \"tdy\"\nmr_td = \"00\"", "unknown-value", "a.toml:10:7", "tdx"),
        ("tee = \"tdx\"", "empty", "a.toml:9:1", "accepts every tdx"),
        ("tee = \"tdx\"\nmr_tb = \"00\"", "unknown-key", "a.toml:11:1", "did you mean `mr_td`"),
        ("tee = \"sgx\"\nmr_td = \"00\"", "unknown-key", "a.toml:11:1", "reference of sgx"),
        ("tee = \"tdx\"\nmr_td = \"00\"", "bad-reference", "a.toml:11:9", "48 bytes"),
        ("tee = \"tdx\"\nmr_td = 5", "bad-reference", "a.toml:11:9", "hexadecimal"),
        ("tee = \"tdx\"\nmr_td = []", "empty", "a.toml:11:9", "nothing matches"),
        ("tee = \"tdx\"\nmr_td = true", "wrong-type", "a.toml:11:9", "boolean"),
        ("tee = \"sgx\"\nisv_svn = \"3\"", "bad-reference", "a.toml:11:11", "without quotes"),
        ("tee = \"sgx\"\nisv_svn = 70000", "bad-reference", "a.toml:11:11", "0 to 65535"),
        ("tee = \"snp\"\nvmpl = [0, 4]", "bad-reference", "a.toml:11:12", "0 to 3"),
        (
            "tee = \"tdx\"\nxfam = \"ff00000000000000/0f00000000000000\"",
            "bad-reference",
            "a.toml:11:8",
            "outside of its mask",
        ),
        ("tee = \"tdx\"\nxfam = \"0000000000000000/0000000000000000\"", "bad-reference", "a.toml:11:8", "is zero"),
        ("tee = \"tdx\"\nxfam = \"ff00000000000000/0f\"", "bad-reference", "a.toml:11:8", "8 bytes"),
    ] {
        let found = errors(PCCS, &block(lines));
        let [(code, text)] = found.as_slice() else { panic!("{lines}: {found:?}") };
        assert_eq!(code, reason, "{lines}: {text}");
        assert!(text.starts_with(position) && text.contains(words), "{lines}: {text}");
    }
}

#[test]
fn each_mistake_beside_the_blocks_has_its_reason() {
    let tdx = block(&format!("tee = \"tdx\"\nmr_td = \"{MR_TD}\""));
    let snp = block("tee = \"snp\"\nguest_svn = 1");
    for (keys, blocks, reason) in [
        ("", &tdx, "missing"),
        ("pccs_addr = \"ftp://a/\"", &tdx, "bad-url"),
        ("pccs_addr = \"https://u:p@a/\"", &tdx, "bad-url"),
        ("kds_addr = \"nonsense\"", &snp, "bad-url"),
        ("minimum_tcb = []", &snp, "empty"),
        ("minimum_tcb = [\"Fine\"]", &snp, "unknown-value"),
        ("minimum_tcb = [\"Revoked\"]", &snp, "unknown-value"),
        ("collateral = []", &snp, "empty"),
        ("collateral = [\"c.json\"]", &snp, "bad-certificate"),
        ("collateral = [\"/nonexistent/c.json\"]", &snp, "bad-certificate"),
        ("amd_certs = [\"/nonexistent/c.pem\"]", &snp, "bad-certificate"),
        ("fetch_timeout = \"10m\"", &snp, "out-of-range"),
        ("as_addr = \"http://127.0.0.1/\"", &snp, "contradiction"),
        ("policy_ids = [\"default\"]", &snp, "contradiction"),
    ] {
        let found = errors(keys, blocks);
        assert_eq!(found.iter().map(|(r, _)| r.as_str()).collect::<Vec<_>>(), [reason], "{keys}: {found:?}");
    }
    let secret = errors("pccs_addr = \"https://user:hunter2@pccs/\"", &tdx);
    assert!(!secret[0].1.contains("hunter2"), "{secret:?}");
}

#[test]
fn real_collateral_is_taken_and_another_file_is_not() {
    let at = |name: &str| format!("{}/tests/fixtures/quotes/{name}", env!("CARGO_MANIFEST_DIR"));
    let tdx = block(&format!("tee = \"tdx\"\nmr_td = \"{MR_TD}\""));
    let b = good(&format!("collateral = [\"{}\"]", at("tdx_quote_collateral.json")), &tdx);
    assert_eq!(b.collateral.len(), 1);
    let found = errors(&format!("collateral = [\"{}\"]", at("README.md")), &tdx);
    assert!(found[0].1.contains("is no collateral"), "{found:?}");
}

#[test]
fn what_weakens_the_appraisal_is_warned_of() {
    let snp = block(&format!("tee = \"snp\"\nmeasurement = \"{MR_TD}\""));
    let warned = |keys: &str, blocks: &str| {
        let loaded = load(&file(keys, blocks)).unwrap_or_else(|r| panic!("{r:?}"));
        loaded.warnings.iter().map(|d| d.reason).collect::<Vec<_>>()
    };
    assert_eq!(warned("", &snp), Vec::<&str>::new());
    assert_eq!(warned("allow_debug = true", &snp), ["debug-allowed"]);
    assert_eq!(warned("minimum_tcb = [\"UpToDate\", \"OutOfDate\"]", &snp), ["tcb-lax"]);
    assert_eq!(warned("", ""), ["no-reference"]);
    assert_eq!(warned("", &block("tee = \"snp\"\ntcb_snp = 20")), ["no-measurement"]);
}

#[test]
fn the_keys_go_with_this_provider_alone() {
    let text = file(PCCS, "").replace("provider = \"builtin\"", "as_addr = \"http://127.0.0.1:8080/\"");
    let report = load(&text).expect_err("refused");
    let found: Vec<_> = report.errors().map(|d| (d.reason, d.path.clone())).collect();
    assert_eq!(found, [("contradiction", "ingress[0].verify.pccs_addr".to_owned())]);
}
