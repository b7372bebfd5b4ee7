//! The manual lists the ids, and nothing else.

use std::collections::BTreeSet;

use tng::ctl::doctor::Check;

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
