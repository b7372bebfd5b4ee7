//! `tngd net up NAME`: the rules, as a step of the units or by hand.

use std::path::Path;

use super::{UnitError, in_force};
use crate::capture::plan::RulesPlan;
use crate::capture::{apply, guard};
use crate::daemon::Paths;

/// Applies the rules of the file, or with `last_good` those of the configuration that was last up when the file has
/// errors. A guard that runs changes first: what is captured newly is refused for a moment rather than let through.
pub fn net_up(paths: &Paths, path: &Path, last_good: bool, owner_uid: u32) -> Result<(), UnitError> {
    let wanted = if last_good { in_force::load_or_last_good(paths, path) } else { in_force::load(path) }?;
    let config = &wanted.config;
    if guard::is_running(paths, &config.instance) {
        let slots = apply::allocate(paths, config, owner_uid)?;
        guard::request_load(paths, &RulesPlan::new(config, &slots))?;
    }
    apply::up(paths, config, owner_uid)?;
    if in_force::is_up(paths, &config.instance) && wanted.problem.is_none() {
        in_force::record(paths, &config.instance, &wanted.text)?;
        in_force::keep_as_last_good(&config.instance, &wanted.text)?;
    }
    Ok(())
}
