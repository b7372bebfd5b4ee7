//! What only root can see: whether rules, routes and guard are there, and the kernel's own counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::capture::plan::{capture_table_name, guard_table_name};
use crate::capture::{guard, nft, observe, routes};
use crate::config::InstanceName;
use crate::daemon::{Paths, StatusReport, may_administer_network};

/// The kernel's side of an instance that captures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KernelView {
    /// What is missing or changed, in words; empty when all is as applied.
    pub problems: Vec<String>,
    /// Packets by counter: `captured_NAME` (connections), `refused_NAME`, `refused`; guard's as `guard_...`.
    pub counters: BTreeMap<String, u64>,
}

/// Looks at the kernel, if the caller may and the instance captures.
pub fn look(report: &StatusReport) -> Option<KernelView> {
    if !may_administer_network() || !report.endpoints.iter().any(|e| e.mode == "netfilter") {
        return None;
    }
    let name = InstanceName::new(&report.instance).ok()?;
    let paths = Paths::current();
    let mut problems = Vec::new();
    if let Err(e) = examine(&paths, &name, &mut problems) {
        problems.push(format!("{e} [{}]", e.reason()));
    }
    match routes::missing() {
        Ok(missing) => problems.extend(missing.into_iter().map(|m| format!("missing: {m}"))),
        Err(e) => problems.push(e.to_string()),
    }
    let mut counters = observe::counters(&capture_table_name(&name)).unwrap_or_default();
    let guarded = observe::counters(&guard_table_name(&name)).unwrap_or_default();
    counters.extend(guarded.into_iter().map(|(name, packets)| (format!("guard_{name}"), packets)));
    Some(KernelView { problems, counters })
}

/// What an instance that does not run has left in the kernel, in words, if the caller may look.
pub fn left_behind(instance: &str) -> Option<String> {
    if !may_administer_network() {
        return None;
    }
    let name = InstanceName::new(instance).ok()?;
    observe::table_exists(&capture_table_name(&name)).ok()?.then(|| {
        format!(
            "the rules of {name} are up and refuse captured traffic; start it, or remove them: tngd net down {name}"
        )
    })
}

fn examine(paths: &Paths, name: &InstanceName, problems: &mut Vec<String>) -> Result<(), nft::NftError> {
    let table = capture_table_name(name);
    if !observe::table_exists(&table)? {
        problems.push(format!("rules are missing: table inet {table} does not exist; run: tngd net up {name}"));
    } else if let Some(drift) = observe::drift(paths, name, &table)? {
        problems.push(format!("{drift} by someone else; put it back: tngd net up {name}"));
    }
    let guard_table = guard_table_name(name);
    if !guard::is_running(paths, name) {
        problems.push(format!(
            "the guard is not running; start it: tngd guard {name}, or systemctl start tng-guard@{name}"
        ));
    } else if !observe::table_exists(&guard_table)? {
        problems.push(format!("the guard's table inet {guard_table} does not exist"));
    }
    Ok(())
}
