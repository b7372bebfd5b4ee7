//! The manual lists the ids, and nothing else.

use std::collections::BTreeSet;

use tng::ctl::doctor::{Check, PROXY_SOCKET};

#[test]
fn every_id_is_explained_in_tngctl_1() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/tngctl.1")).expect("page");
    let page = page.replace("\\-", "-");
    let section = page.split(".SH FINDINGS").nth(1).expect("FINDINGS").split(".SH ").next().unwrap_or_default();
    let lines: Vec<&str> = section.lines().collect();
    let terms = lines.windows(2).filter(|w| w[0] == ".TP").filter_map(|w| w[1].strip_prefix(".B "));
    let listed: BTreeSet<String> = terms.map(str::to_owned).collect();
    let known: BTreeSet<String> = Check::ALL.iter().map(|c| c.id().to_owned()).collect();
    assert_eq!(known.len(), Check::ALL.len(), "an id is used twice");
    assert_eq!(listed, known);
}

#[test]
fn the_proxy_listens_where_the_doctor_and_the_manual_say() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/");
    let holds = |file: &str, text: &str| std::fs::read_to_string(format!("{root}{file}")).expect(file).contains(text);
    assert!(holds("systemd/tng-aa-proxy.socket", &format!("\nListenStream={PROXY_SOCKET}\n")));
    assert!(holds("man/tngd.8", &format!("unix://{PROXY_SOCKET}")) && holds("man/tng.toml.5", PROXY_SOCKET));
    // Without root, and with the one capability that a connection to root's socket takes.
    assert!(holds("systemd/tng-aa-proxy.service", "\nDynamicUser=yes\n"));
    assert!(holds("systemd/tng-aa-proxy.service", "\nCapabilityBoundingSet=CAP_DAC_OVERRIDE\n"));
}
