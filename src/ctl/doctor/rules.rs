//! Rules, routes and guard of the instances that capture.

use super::finding::{Check, Finding};
use super::host::{Host, Rules};
use super::instance::Instance;

const CHECKS: [Check; 4] = [Check::RulesPresent, Check::RoutesPresent, Check::GuardRunning, Check::GuardTable];

/// Of each instance that captures. `socket_active`: systemd holds its listeners.
pub(super) fn check(host: &dyn Host, instance: &Instance, socket_active: bool) -> Vec<Finding> {
    let Some(name) = instance.legal_name().filter(|_| instance.captures()) else { return Vec::new() };
    if !host.is_root() {
        return CHECKS.into_iter().map(|c| Finding::needs_root(c).of(&instance.name)).collect();
    }
    let is_up = socket_active || instance.running.is_some();
    let found = match host.rules(&name) {
        Ok(rules) => judge(&instance.name, &rules, is_up),
        Err(e) => vec![
            Finding::error(Check::RulesPresent, format!("{e} [{}]", e.reason()))
                .why("what cannot be read cannot be vouched for")
                .fix("nft list tables"),
        ],
    };
    found.into_iter().map(|f| f.of(&instance.name)).collect()
}

fn judge(name: &str, rules: &Rules, is_up: bool) -> Vec<Finding> {
    let table = format!("table inet tng_{name}");
    if !is_up {
        return match (rules.capture_table, rules.guard_running) {
            (false, false) => Vec::new(),
            (false, true) => vec![
                Finding::note(Check::GuardRunning, "the instance is stopped and its guard refuses")
                    .why("captured traffic is refused until the instance starts or the guard stops")
                    .fix(format!(
                        "systemctl start tng@{name}  # or, for the direct path: systemctl stop tng-guard@{name}"
                    )),
            ],
            (true, _) => vec![
                Finding::error(Check::RulesPresent, format!("{table} is there and the instance does not run"))
                    .why("captured traffic is refused")
                    .fix(format!("systemctl start tng@{name}  # or, for the direct path: tngd net down {name}")),
            ],
        };
    }
    let restore = format!("tngd net up {name}");
    let mut found = Vec::new();
    let rules_finding = match (&rules.drift, rules.capture_table) {
        (_, false) => Finding::error(Check::RulesPresent, format!("{table} is not there"))
            .why("nothing is captured: the guard refuses such traffic, and without a guard it leaves in plaintext")
            .fix(&restore),
        (Some(drift), true) => Finding::error(Check::RulesPresent, format!("{drift} by somebody else"))
            .why("what the changed rules capture or let through is not what the configuration says")
            .fix(&restore),
        (None, true) => Finding::ok(Check::RulesPresent, format!("{table} is as it was applied")),
    };
    found.push(rules_finding);
    found.push(if rules.missing_routes.is_empty() {
        Finding::ok(Check::RoutesPresent, "policy rule and routes are there")
    } else {
        Finding::error(Check::RoutesPresent, format!("missing: {}", rules.missing_routes.join(", ")))
            .why("captured packets do not reach the listeners and are refused or dropped")
            .fix(&restore)
    });
    let guard = format!("systemctl restart tng-guard@{name}");
    found.push(if rules.guard_running {
        Finding::ok(Check::GuardRunning, "the guard runs")
    } else {
        Finding::error(Check::GuardRunning, "the guard does not run")
            .why("one more failure, a flushed ruleset for one, would open the path: nobody refuses or puts rules back")
            .fix(&guard)
    });
    found.push(match rules.guard_table {
        Some(true) => Finding::ok(Check::GuardTable, format!("table inet tngguard_{name} is there and owned")),
        Some(false) => Finding::error(Check::GuardTable, format!("table inet tngguard_{name} has no owner"))
            .why("whoever flushes the ruleset removes it")
            .fix(format!("nft delete table inet tngguard_{name}; {guard}")),
        None => Finding::error(Check::GuardTable, format!("table inet tngguard_{name} is not there"))
            .why("nothing refuses what misses the capture rules")
            .fix(&guard),
    });
    found
}
