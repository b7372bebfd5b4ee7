//! `tngd net up NAME` and `net down NAME`: the rules, as steps of the units or by hand.

use std::path::Path;

use super::{UnitError, manager, prepare};
use crate::capture::allocation::Allocations;
use crate::capture::plan::RulesPlan;
use crate::capture::{apply, cgroups, guard};
use crate::config::{self, Config};
use crate::daemon::narrowing::Covering;
use crate::instance::{Paths, in_force};

/// Applies the rules of what is in force, where a socket unit has the instance's listeners open; else those of the file,
/// or with `last_good`, when the file has errors, those of the configuration that was last up.
pub fn net_up(paths: &Paths, path: &Path, last_good: bool, owner_uid: u32) -> Result<(), UnitError> {
    let wanted = match in_force::current(paths, path) {
        Some(wanted) => wanted,
        None if last_good => in_force::load_or_last_good(paths, path)?,
        None => in_force::load(path)?,
    };
    apply_rules(paths, &wanted.config, owner_uid, Left::LetGo)?;
    if in_force::is_up(paths, &wanted.config.instance) {
        in_force::keep_as_last_good(&wanted.config.instance, &wanted.text);
    }
    Ok(())
}

/// `ExecStartPre=` of the service. A start that was asked for takes the file as it is now; a crash and an upgrade go on
/// with what is in force. What cannot be taken changes nothing, and the data plane refuses with the reason. What the rules
/// of before captured besides stays covered till [`let_go`]: the start may fail yet.
pub fn service_starting(paths: &Paths, path: &Path, owner_uid: u32) -> Result<(), UnitError> {
    let instance = config::instance_of(path)?;
    let Some(current) = in_force::current(paths, path) else { return net_up(paths, path, true, owner_uid) };
    if !manager::was_asked(&format!("tng@{instance}.service"))? || paths.upgrade().exists() {
        return apply_rules(paths, &current.config, owner_uid, Left::Covered);
    }
    let taken = in_force::load(path).map_err(UnitError::from).and_then(|wanted| {
        apply_rules(paths, &wanted.config, owner_uid, Left::Covered)?;
        Ok(wanted)
    });
    match taken {
        Ok(wanted) => {
            in_force::record(paths, &instance, &wanted.text)?;
            in_force::keep_as_last_good(&instance, &wanted.text);
            prepare::forget_problem(&instance)
        }
        Err(error) => {
            in_force::refuse(paths, &instance, &error.to_string())?;
            apply_rules(paths, &current.config, owner_uid, Left::Covered)
        }
    }
}

/// `ExecStartPost=` of the service: lets go what only the rules of before captured, when the data plane serves.
pub(super) fn let_go(paths: &Paths, path: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(path)?;
    let Some(current) = in_force::current(paths, path) else { return Ok(()) };
    let Some(slots) = Allocations::load(paths)?.get(&instance).cloned() else { return Ok(()) };
    let plan = RulesPlan::new(&current.config, &slots);
    if let Some(between) = apply::recorded_plan(paths, &instance).filter(|between| *between != plan)
        && !(Covering { between, plan }).narrow_if_ready(paths)
    {
        tracing::warn!(
            reason = "not-running",
            %instance,
            "what was captured before and is no more is still refused: tngctl reload {instance}"
        );
    }
    Ok(())
}

/// What becomes of that which the rules of before captured and the new ones do not.
#[derive(Clone, Copy, PartialEq)]
enum Left {
    /// Captured or refused, until the data plane serves.
    Covered,
    /// Open at once.
    LetGo,
}

/// A guard that runs changes first: what is captured newly is refused for a moment rather than let through.
fn apply_rules(paths: &Paths, config: &Config, owner_uid: u32, left: Left) -> Result<(), UnitError> {
    let guarded = guard::is_running(paths, &config.instance);
    let old = apply::recorded_plan(paths, &config.instance);
    let covered = old.as_ref().filter(|_| left == Left::Covered).map(cgroups::loadable);
    if guarded {
        let slots = apply::allocate(paths, config, owner_uid)?;
        let plan = RulesPlan::new(config, &slots);
        guard::request_load(paths, &covered.as_ref().map_or_else(|| plan.clone(), |old| plan.covering(old)))?;
    }
    let applied = apply::up_covering(paths, config, owner_uid, covered.as_ref());
    // The guard of rules that did not come about may refuse less than that of the rules that are still there.
    if let (true, Err(_), Some(old)) = (guarded, &applied, old)
        && let Err(error) = guard::request_load(paths, &old)
    {
        tracing::error!(reason = error.reason(), %error, "the guard could not be given the rules of before");
    }
    applied?;
    Ok(())
}

/// What an operator should know when rules could not be applied: those that are there still refuse or capture.
pub fn still_up(path: &Path) -> Option<String> {
    let instance = config::instance_of(path).ok()?;
    apply::is_up(&instance).unwrap_or(false).then(|| {
        format!(
            "the rules of instance {instance} that are there stay: captured traffic goes through the tunnel or is refused; \
             to open the path: tngd net down {instance}"
        )
    })
}

/// Removes the rules of an instance, by its name alone: what is up must come down also when the file is broken or gone.
///
/// With `if_asked`, as a step of the socket unit, they stay while the system shuts down: programs may outlive their
/// units until the very end, and the kernel takes the rules along. They stay as well when the unit ends because a step
/// of it failed: nobody asked for the path to be open.
pub fn net_down(paths: &Paths, path: &Path, if_asked: bool) -> Result<(), UnitError> {
    let instance = config::instance_of(path)?;
    if if_asked && manager::is_shutting_down() {
        tracing::info!(%instance, "the system shuts down: captured traffic is refused until it is off");
        return Ok(());
    }
    if if_asked && !manager::was_stopped(&format!("tng@{instance}.socket"))? {
        tracing::error!(
            reason = "socket-unit-failed",
            %instance,
            "the socket unit failed: captured traffic is refused until it starts again, or: tngd net down {instance}"
        );
        return Ok(());
    }
    Ok(apply::down(paths, &instance)?)
}

/// What an operator should know who takes the rules of an instance that runs away from it.
pub fn net_down_warning(paths: &Paths, path: &Path) -> Option<String> {
    let instance = config::instance_of(path).ok()?;
    // Asked of the kernel: a connection to a socket that the service manager holds would start the data plane.
    let listening = listens(&std::fs::read_to_string("/proc/net/unix").ok()?, &paths.control_socket(&instance));
    let then = if guard::is_running(paths, &instance) {
        "its guard refuses that traffic until it ends"
    } else {
        "nothing guards it: that traffic goes out and comes in in plaintext"
    };
    listening.then(|| {
        format!(
            "warning: instance {instance} is running and captures nothing any more; {then}. Put the rules back: tngd net \
             up {instance}"
        )
    })
}

/// Whether somebody listens on the unix socket at `path`, by proc_pid_net(5): the fourth column has the flag
/// `__SO_ACCEPTCON`, the eighth the path.
fn listens(table: &str, path: &Path) -> bool {
    let path = path.to_string_lossy();
    table.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(3) == Some(&"00010000") && words.get(7) == Some(&&*path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_listens_counts() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     00000000: 00000002 00000000 00010000 0001 01 123 /run/tng/web/control.sock\n\
                     00000000: 00000003 00000000 00000000 0001 03 124 /run/tng/db/control.sock\n\
                     00000000: 00000003 00000000 00000000 0001 03 125\n";
        assert!(listens(table, Path::new("/run/tng/web/control.sock")));
        assert!(!listens(table, Path::new("/run/tng/db/control.sock")), "a connection");
        assert!(!listens(table, Path::new("/run/tng/we/control.sock")));
    }
}
