//! The configuration that is in force, and the last good one.
//!
//! An operator may leave a file half edited, and the host may boot with it. What was captured before must not go in
//! plaintext then, so root keeps two copies of the text that was last applied: `/run/tng/.net/NAME.toml` while the
//! instance's sockets are open, and `/var/lib/tng/NAME.toml` over a reboot.

use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::UnitError;
use crate::config::{self, Config, InstanceName};
use crate::daemon::Paths;

/// Where the last good configurations are.
pub const STATE_DIR: &str = "/var/lib/tng";
/// Names another directory instead, for tests.
pub const STATE_DIR_ENV: &str = "TNG_STATE_DIR";

/// A configuration to act on, with the very text that made it.
#[derive(Debug)]
pub struct InForce {
    /// What is to be done.
    pub config: Config,
    /// The text it was read from.
    pub text: String,
    /// What is wrong with the file, when this is the last good one instead.
    pub problem: Option<config::Report>,
}

/// The file of an instance as it is now.
pub fn load(path: &Path) -> Result<InForce, config::Report> {
    config::load(path)?;
    // Checked again as text: what is recorded must be what was checked, and the file may change in between.
    let text = std::fs::read_to_string(path).map_err(|e| {
        let message = format!("cannot be read: {e}");
        config::Report::file_error(path, "file-unreadable", message, "check the path")
    })?;
    let config = config::parse(config::instance_of(path)?, path, &text)?.config;
    Ok(InForce { config, text, problem: None })
}

/// The file of an instance, or the last good text of it when the file has errors or is gone.
pub fn load_or_last_good(paths: &Paths, path: &Path) -> Result<InForce, config::Report> {
    let report = match load(path) {
        Ok(good) => return Ok(good),
        Err(report) => report,
    };
    let instance = config::instance_of(path)?;
    let kept = [paths.in_force(&instance), last_good(&instance)];
    for text in kept.iter().filter_map(|kept| std::fs::read_to_string(kept).ok()) {
        // A newer tng may refuse what an older one took.
        if let Ok(loaded) = config::parse(instance.clone(), path, &text) {
            return Ok(InForce { config: loaded.config, text, problem: Some(report) });
        }
    }
    Err(report)
}

/// Whether an instance's sockets are open by its socket unit.
pub fn is_up(paths: &Paths, instance: &InstanceName) -> bool {
    paths.in_force(instance).exists()
}

/// The instances that are up.
pub fn instances(paths: &Paths) -> Vec<InstanceName> {
    let entries = std::fs::read_dir(paths.private_dir()).into_iter().flatten().flatten().map(|e| e.path());
    let texts = entries.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    let mut names: Vec<_> = texts.filter_map(|path| config::instance_of(&path).ok()).collect();
    names.sort();
    names
}

/// The configuration whose listeners the socket unit has open, if it is up.
pub fn current(paths: &Paths, path: &Path) -> Option<Config> {
    let instance = config::instance_of(path).ok()?;
    let text = std::fs::read_to_string(paths.in_force(&instance)).ok()?;
    Some(config::parse(instance, path, &text).ok()?.config)
}

/// The configuration that was last applied.
pub fn last_good_of(path: &Path) -> Option<Config> {
    let instance = config::instance_of(path).ok()?;
    let text = std::fs::read_to_string(last_good(&instance)).ok()?;
    Some(config::parse(instance, path, &text).ok()?.config)
}

/// Records what is in force now, until [`Paths::remove_instance`].
pub fn record(paths: &Paths, instance: &InstanceName, text: &str) -> Result<(), UnitError> {
    write_private(&paths.in_force(instance), text)
}

/// Keeps `text` as what to fall back on. Only what was applied may come here.
pub fn keep_as_last_good(instance: &InstanceName, text: &str) -> Result<(), UnitError> {
    let dir = state_dir();
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|source| UnitError::File { path: dir.display().to_string(), source })?;
    write_private(&last_good(instance), text)
}

/// An operator who removed the file does not want it back after the next boot.
pub fn forget_last_good(instance: &InstanceName) {
    let _ = std::fs::remove_file(last_good(instance));
}

fn state_dir() -> PathBuf {
    std::env::var_os(STATE_DIR_ENV).filter(|dir| !dir.is_empty()).map_or_else(|| STATE_DIR.into(), PathBuf::from)
}

fn last_good(instance: &InstanceName) -> PathBuf {
    state_dir().join(format!("{instance}.toml"))
}

/// Beside and renamed, for root alone: a configuration may hold credentials of an attestation service.
fn write_private(path: &Path, text: &str) -> Result<(), UnitError> {
    let write = || -> io::Result<()> {
        use std::io::Write;
        let beside = path.with_extension("toml.new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(beside, path)
    };
    write().map_err(|source| UnitError::File { path: path.display().to_string(), source })
}
