//! What two instances of this host cannot both have.

use std::collections::BTreeSet;

use super::finding::{Check, Finding};
use super::instance::Instance;
use crate::config::{Config, conflicts_between};

/// Each instance that is looked at against all that have a file. Nothing where there is only one.
pub(super) fn check(looked_at: &[Instance], all: &[Config]) -> Vec<Finding> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for mine in looked_at.iter().filter_map(|i| i.config.as_ref().ok()) {
        for other in all.iter().filter(|other| other.instance != mine.instance) {
            let mut pair = [mine.instance.as_str(), other.instance.as_str()];
            pair.sort_unstable();
            if !seen.insert(pair) {
                continue;
            }
            for conflict in conflicts_between(other, mine) {
                let what = format!("{}: {}: {}", conflict.file.display(), conflict.path, conflict.message);
                let hint = conflict.hint.unwrap_or_default();
                found.push(
                    Finding::error(Check::InstanceConflicts, what)
                        .why(format!("the one that starts second is refused. Hint: {hint}"))
                        .fix(format!("tngctl check  # after {} was corrected", conflict.file.display()))
                        .of(mine.instance.as_str()),
                );
            }
        }
    }
    if found.is_empty() && !seen.is_empty() {
        let what = "instances do not get into each other's way";
        found.push(Finding::ok(Check::InstanceConflicts, what));
    }
    found
}
