//! `tngd net prepare NAME`: the first step of the socket unit. systemd learned the listeners from the generator, which
//! ran at boot or at the last daemon-reload; a file that was written since must count as well.

use std::path::{Path, PathBuf};

use super::{UnitError, drop_in, manager};
use crate::capture::allocation::InstanceSlots;
use crate::capture::apply;
use crate::config::{self, Config, InstanceName};
use crate::daemon::listeners;
use crate::instance::in_force::{self, FileError};
use crate::instance::{InForce, Paths};

/// Where systemd has the generators write (systemd.generator(7)).
const GENERATED: &str = "/run/systemd/generator";

/// Records ids, ports and what is in force, and has systemd read the listeners again when it knows others.
///
/// A file that has errors, or that is in another instance's way, leaves the last good configuration in force, and the
/// data plane refuses with the reason. Fails when there is none.
pub fn prepare(paths: &Paths, path: &Path, owner_uid: u32) -> Result<(), UnitError> {
    let instance = config::instance_of(path)?;
    paths.make_private_dir().map_err(|source| FileError { path: paths.root().to_owned(), source })?;
    let taken = in_force::load(path).map_err(UnitError::from).and_then(|wanted| take(paths, wanted, owner_uid));
    let (config, slots) = match taken {
        Ok(taken) => taken,
        // A file that is gone is no slip of the pen: the guard goes on refusing, and the start says what is missing.
        Err(error) if !path.exists() => return Err(error),
        Err(error) => {
            let Some(good) = in_force::last_good_of(path) else { return Err(error) };
            let taken = take(paths, good, owner_uid)?;
            in_force::refuse(paths, &instance, &error.to_string())?;
            taken
        }
    };
    let refused = paths.refused(&instance).exists();
    settle(&config, &slots, refused).inspect_err(|_| paths.forget_in_force(&instance))
}

fn take(paths: &Paths, wanted: InForce, owner_uid: u32) -> Result<(Config, InstanceSlots), UnitError> {
    let slots = apply::allocate(paths, &wanted.config, owner_uid)?;
    in_force::record(paths, &wanted.config.instance, &wanted.text)?;
    Ok((wanted.config, slots))
}

fn settle(config: &Config, slots: &InstanceSlots, refused: bool) -> Result<(), UnitError> {
    let wanted = drop_in::listen(&listeners::specs(config, Some(slots))?, listeners::has_ipv6());
    let file = listen_drop_in(Path::new(GENERATED), &config.instance);
    let told = problem_drop_in(Path::new(GENERATED), &config.instance);
    // A unit must not go on saying what was wrong with the file once it is mended.
    let is_settled =
        || std::fs::read_to_string(&file).is_ok_and(|there| there == wanted) && (refused || !told.exists());
    if is_settled() {
        return Ok(());
    }
    tracing::info!("the listeners changed since systemd read them; reloading systemd");
    manager::systemctl(&["daemon-reload"])?;
    if is_settled() { Ok(()) } else { Err(UnitError::Stale(file.display().to_string())) }
}

/// Path of the drop-in with an instance's listeners.
pub(super) fn listen_drop_in(dir: &Path, instance: &InstanceName) -> PathBuf {
    dir.join(format!("tng@{instance}.socket.d/50-listen.conf"))
}

/// Path of the drop-in that says what is wrong with an instance's file.
pub(super) fn problem_drop_in(dir: &Path, instance: &InstanceName) -> PathBuf {
    dir.join(format!("tng@{instance}.service.d/50-problem.conf"))
}

/// After a reload that took a mended file: the unit's description must not go on calling it refused.
pub fn forget_problem(instance: &InstanceName) -> Result<(), UnitError> {
    if problem_drop_in(Path::new(GENERATED), instance).exists() {
        manager::systemctl(&["daemon-reload"])?;
    }
    Ok(())
}
