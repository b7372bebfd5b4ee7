//! What only root can see: whether rules, routes and guard are there, and the kernel's own counts.

use std::collections::BTreeMap;

use crate::capture::plan::{capture_table_name, guard_table_name};
use crate::capture::{counted, guard, nft, observe, routes};
use crate::config::InstanceName;
use crate::daemon::{KernelView, StatusReport};
use crate::instance::Paths;
use crate::os::privileges::may_administer_network;

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
    Some(KernelView { problems, counters: counted::look(&name) })
}

/// What an instance that does not run has left in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeftBehind {
    name: String,
    rules: bool,
    guard: bool,
}

impl std::fmt::Display for LeftBehind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, rules, guard } = self;
        if *rules {
            let both = if *guard { " and its guard is" } else { "" };
            return write!(
                f,
                "the rules of {name} are up and refuse captured traffic{both}; start it, or remove them: tngd net down \
                 {name}"
            )
            .and_then(|()| if *guard { write!(f, "; systemctl stop tng-guard@{name}") } else { Ok(()) });
        }
        write!(
            f,
            "instance {name} is guarded only: its data plane and its rules are stopped, and the guard refuses what it \
             would capture; start it: systemctl start tng@{name}; or let traffic through unprotected: systemctl stop \
             tng-guard@{name}"
        )
    }
}

/// What the instance of this name has left, if the caller may look.
pub(super) fn left_behind(instance: &str) -> Option<LeftBehind> {
    InstanceName::new(instance).ok()?;
    if !may_administer_network() {
        return None;
    }
    left_in(&nft::inet_tables().ok()?).into_iter().find(|left| left.name == instance)
}

/// What instances other than those in `running` have left, in words, if the caller may look.
pub(super) fn left_behind_by_others(running: &[&str]) -> Vec<String> {
    if !may_administer_network() {
        return Vec::new();
    }
    let left = left_in(&nft::inet_tables().unwrap_or_default());
    left.into_iter().filter(|l| !running.contains(&l.name.as_str())).map(|l| l.to_string()).collect()
}

/// The instances to which these tables belong.
fn left_in(tables: &[String]) -> Vec<LeftBehind> {
    let mut found: BTreeMap<String, LeftBehind> = BTreeMap::new();
    for table in tables {
        let (guard, rest) = match (table.strip_prefix("tngguard_"), table.strip_prefix("tng_")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => continue,
        };
        let left = LeftBehind { name: rest.to_owned(), rules: false, guard: false };
        let left = found.entry(rest.to_owned()).or_insert(left);
        left.guard |= guard;
        left.rules |= !guard;
    }
    found.into_values().collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_apart_with_the_way_out() {
        let tables = ["filter", "tng_web", "tngguard_web", "tngguard_data-base", "tng_old"].map(str::to_owned);
        let said: Vec<String> = left_in(&tables).iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].starts_with("instance data-base is guarded only"), "{said:?}");
        assert!(said[0].contains("systemctl start tng@data-base") && said[0].contains("stop tng-guard@data-base"));
        assert!(said[1].starts_with("the rules of old are up and refuse captured traffic;"), "{said:?}");
        assert!(!said[1].contains("guard"), "{said:?}");
        assert!(said[2].contains("rules of web") && said[2].contains("systemctl stop tng-guard@web"), "{said:?}");
        let name = InstanceName::new("data-base").unwrap();
        assert_eq!(guard_table_name(&name), "tngguard_data-base", "the name is read back from the table's");
    }
}
