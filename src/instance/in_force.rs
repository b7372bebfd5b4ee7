//! The configuration that is in force, and the last good one.
//!
//! An operator may leave a file half edited, and the host may boot with it. What was captured before must not go in
//! plaintext then, so root keeps two copies of the text that was last applied: `/run/tng/.net/NAME.toml` while the
//! instance's sockets are open, and `/var/lib/tng/NAME.toml` over a reboot.
//!
//! An edit counts when it is asked for: by a start, a restart or a reload. What nobody asked for, a crash or an upgrade,
//! goes on with what is in force.

use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Paths;
use crate::config::{self, Config, InstanceName};
use crate::os::files::write_atomically;
use crate::os::privileges::find_user;

/// The data plane's user.
pub const USER: &str = "tng";

/// Where the last good configurations are.
pub const STATE_DIR: &str = "/var/lib/tng";
/// Names another directory instead, for tests.
pub const STATE_DIR_ENV: &str = "TNG_STATE_DIR";

/// A file that root keeps could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}", path = .path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What went wrong.
    pub source: io::Error,
}

impl FileError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        "state-unusable"
    }
}

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

/// What is in force, if a socket unit has the instance's listeners open.
pub fn current(paths: &Paths, path: &Path) -> Option<InForce> {
    let instance = config::instance_of(path).ok()?;
    let text = std::fs::read_to_string(paths.in_force(&instance)).ok()?;
    let config = config::parse(instance, path, &text).ok()?.config;
    Some(InForce { config, text, problem: None })
}

/// What was last applied.
pub fn last_good_of(path: &Path) -> Option<InForce> {
    let instance = config::instance_of(path).ok()?;
    let text = std::fs::read_to_string(last_good(&instance)).ok()?;
    let config = config::parse(instance, path, &text).ok()?.config;
    Some(InForce { config, text, problem: None })
}

/// What the data plane is to serve: under its units what is in force, else the file.
pub fn to_serve(paths: &Paths, path: &Path) -> Result<Config, NotServed> {
    let instance = config::instance_of(path)?;
    let Ok(text) = std::fs::read_to_string(paths.in_force(&instance)) else { return Ok(config::load(path)?.config) };
    // Root has looked at the file when this start was asked for.
    if let Ok(why) = std::fs::read_to_string(paths.refused(&instance)) {
        return Err(NotServed::Refused(why));
    }
    if std::fs::read_to_string(path).is_ok_and(|file| file != text) {
        tracing::warn!(
            reason = "file-not-in-force",
            "{} was edited and is not in force; to take it: systemctl reload tng@{instance}",
            path.display()
        );
    }
    Ok(config::parse(instance, path, &text)?.config)
}

/// Why a data plane serves nothing.
#[derive(Debug, thiserror::Error)]
pub enum NotServed {
    /// The file has errors.
    #[error("{0}")]
    Config(#[from] config::Report),
    /// The file was not taken when the start was asked for.
    #[error("{0}")]
    Refused(String),
}

/// Records what is in force now, until [`Paths::remove_instance`]. The data plane's group may read it, as it may read
/// the file itself.
pub fn record(paths: &Paths, instance: &InstanceName, text: &str) -> Result<(), FileError> {
    let group = find_user(USER).ok().map(|(_, gid)| gid.as_raw());
    write_private(&paths.in_force(instance), text, group)?;
    let _ = std::fs::remove_file(paths.refused(instance));
    Ok(())
}

/// Records that the file as it is now cannot be taken, and why.
pub fn refuse(paths: &Paths, instance: &InstanceName, why: &str) -> Result<(), FileError> {
    tracing::error!(
        reason = "config-invalid",
        error = why,
        "{instance}: rules stay as they are, and nothing is served until the file is mended and reloaded"
    );
    let path = paths.refused(instance);
    let written = write_atomically(&path, why.as_bytes());
    written.map_err(|source| FileError { path: path.to_owned(), source })
}

/// Keeps `text` as what to fall back on. Only what was applied may come here. Failing is no reason to serve nothing.
pub fn keep_as_last_good(instance: &InstanceName, text: &str) {
    let path = last_good(instance);
    if std::fs::read_to_string(&path).is_ok_and(|kept| kept == text) {
        return;
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir());
    let made = made.map_err(|source| FileError { path: state_dir(), source });
    if let Err(error) = made.and_then(|()| write_private(&path, text, None)) {
        tracing::error!(reason = error.reason(), %error, "a boot with a broken file would find an older configuration");
    }
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

/// Beside and renamed, for root and one group at most: a configuration may hold credentials of an attestation service.
fn write_private(path: &Path, text: &str, group: Option<u32>) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        use std::io::Write;
        let beside = path.with_extension("toml.new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        if group.is_some() {
            std::os::unix::fs::fchown(&file, None, group)?;
            file.set_permissions(std::fs::Permissions::from_mode(0o640))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(beside, path)
    };
    write().map_err(|source| FileError { path: path.to_owned(), source })
}
