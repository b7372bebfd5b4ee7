//! `tngd net up NAME` and `net down NAME`: the rules, as steps of the units or by hand.

use std::path::Path;

use super::{UnitError, in_force, manager};
use crate::capture::plan::RulesPlan;
use crate::capture::{apply, guard};
use crate::config;
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

/// Removes the rules of an instance, by its name alone: what is up must come down also when the file is broken or gone.
///
/// With `unless_shutdown` they stay while the system shuts down. Programs may outlive their units until the very end,
/// and the kernel takes the rules along.
pub fn net_down(paths: &Paths, path: &Path, unless_shutdown: bool) -> Result<(), UnitError> {
    let instance = config::instance_of(path)?;
    if unless_shutdown && manager::is_shutting_down() {
        tracing::info!(%instance, "the system shuts down: captured traffic is refused until it is off");
        return Ok(());
    }
    Ok(apply::down(paths, &instance)?)
}
