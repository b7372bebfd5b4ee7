//! `tngd guard`: the guard as a process of its own, which a service manager keeps alive.
//!
//! A crash, a restart and an upgrade of it lose nothing: the manager holds a copy of the socket that owns the table
//! (FDSTORE), and the next process takes the table over. A stop ends the table, as the manager then drops its copy.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

use crate::capture::apply::{self, ApplyError};
use crate::capture::fdstore::FdStore;
use crate::capture::guard::{self, Guard, GuardError, Standing};
use crate::capture::plan::RulesPlan;
use crate::config::{self, Config, OnStop, Report};
use crate::instance::{Paths, in_force};
use crate::os::privileges::{PrivilegeError, find_user, may_administer_network};

/// What the command line says.
#[derive(Debug, Clone)]
pub struct GuardOptions {
    /// Instance name or file.
    pub instance: String,
    /// User the data plane runs as; absent: `tng`, or root where there is no such user.
    pub owner: Option<String>,
    /// With errors in the file, guard what was captured last.
    pub last_good: bool,
}

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub enum GuardCommandError {
    /// The configuration has errors.
    #[error("{0}")]
    Config(#[from] Report),
    /// No such user.
    #[error(transparent)]
    User(#[from] PrivilegeError),
    /// Ids, ports, cgroups, privileges.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Another guard of the instance answers.
    #[error("the guard of {0} is running already (systemctl status tng-guard@{0}, or tngd run)")]
    AlreadyRunning(String),
    /// The table.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Signals.
    #[error("signals: {0}")]
    Signals(io::Error),
}

impl GuardCommandError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            GuardCommandError::Config(_) => "config-invalid",
            GuardCommandError::User(e) => e.reason(),
            GuardCommandError::Apply(e) => e.reason(),
            GuardCommandError::AlreadyRunning(_) => "already-running",
            GuardCommandError::Guard(e) => e.reason(),
            GuardCommandError::Signals(_) => "daemon-io",
        }
    }
    /// Exit status: 78 (EX_CONFIG), 77 (EX_NOPERM), 67 (EX_NOUSER), else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            GuardCommandError::Config(_) | GuardCommandError::Apply(ApplyError::Conflict(_)) => 78,
            GuardCommandError::Apply(ApplyError::Privilege) => 77,
            GuardCommandError::User(_) => 67,
            _ => 1,
        }
    }
}

/// Guards an instance until SIGTERM or SIGINT.
pub fn guard(options: &GuardOptions) -> Result<(), GuardCommandError> {
    guard_with(options, || {
        if !options.last_good {
            return Ok((config::load(&config::instance_path(&options.instance)?)?.config, None));
        }
        let path = config::unit_path(&options.instance)?;
        let paths = Paths::current();
        let wanted = in_force::load_or_last_good(&paths, &path)?;
        // A file that was edited while the instance is up counts from a reload or restart on, here as well.
        let config = in_force::current(&paths, &path).map_or(wanted.config, |current| current.config);
        Ok((config, wanted.problem.map(|report| report.to_string())))
    })
}

/// The same with the configuration that `load` gives, and what is wrong with the file if it is another.
fn guard_with(
    options: &GuardOptions,
    load: impl FnOnce() -> Result<(Config, Option<String>), Report>,
) -> Result<(), GuardCommandError> {
    // First thing, and whatever comes: a descriptor that nobody takes is open for the life of the process.
    let inherited = FdStore::Systemd.inherited();
    if !may_administer_network() {
        return Err(ApplyError::Privilege.into());
    }
    let (config, problem) = load()?;
    let owner_uid = owner_uid(options.owner.as_deref())?;
    let stop = stop_signals().map_err(|e| GuardCommandError::Signals(e.into()))?;
    let paths = Paths::current();
    // Two of them would take the table and its records away from each other.
    if inherited.is_empty() && guard::is_running(&paths, &config.instance) {
        return Err(GuardCommandError::AlreadyRunning(config.instance.to_string()));
    }
    // By hand an overlap is a mistake to be told; at a boot it must not cost an instance its guard.
    let allocate = if options.last_good { apply::allocate_for_guard } else { apply::allocate };
    let slots = allocate(&paths, &config, owner_uid)?;
    let plan = RulesPlan::new(&config, &slots);
    let mut guard = Guard::start(&paths, plan, FdStore::Systemd, inherited).inspect_err(|_| {
        let _ = apply::release_ids_if_down(&paths, &config.instance);
    })?;
    let mut said = status(guard.standing(), problem.as_deref());
    let _ = crate::notify::notify(&[NotifyState::Ready, NotifyState::Status(&said)]);
    tracing::info!(instance = %config.instance, "{said}");
    let watchdog = sd_notify::watchdog_enabled();
    // Twice within the time, as sd_watchdog_enabled(3) wants it.
    let pulse = watchdog.map_or(Duration::MAX, |every| every / 2);
    let ran = guard.run(stop.as_fd(), pulse, |standing| {
        if watchdog.is_some() {
            let _ = crate::notify::notify(&[NotifyState::Watchdog]);
        }
        let now = status(standing, problem.as_deref());
        if now != said {
            let _ = crate::notify::notify(&[NotifyState::Status(&now)]);
            said = now;
        }
    });
    let _ = crate::notify::notify(&[NotifyState::Stopping]);
    ran?;
    if config.on_stop == OnStop::Closed {
        tracing::info!(instance = %config.instance, "guard stopped: captured traffic is no longer refused by it");
    }
    drop(guard);
    let _ = apply::release_ids_if_down(&paths, &config.instance);
    Ok(())
}

/// The data plane's user: as asked, else `tng` where the package made it, else root.
fn owner_uid(owner: Option<&str>) -> Result<u32, PrivilegeError> {
    match owner {
        Some(name) => find_user(name).map(|(uid, _)| uid.as_raw()),
        None => Ok(find_user("tng").map_or(0, |(uid, _)| uid.as_raw())),
    }
}

fn stop_signals() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
}

/// The line that `systemctl status` shows.
fn status(standing: &Standing, problem: Option<&str>) -> String {
    let mut out = match standing.endpoints.as_slice() {
        [] => "nothing to guard yet".to_owned(),
        endpoints => format!("guarding {}", endpoints.join(", ")),
    };
    if let Some(last) = standing.last_restored {
        let times = if standing.restored == 1 { "time" } else { "times" };
        out += &format!("; restored rules {} {times}, last {}", standing.restored, utc(last));
    }
    for cgroup in &standing.gone {
        out += &format!("; cgroup {cgroup} is gone, nobody is captured by it until it is back");
    }
    for problem in standing.problem.as_deref().into_iter().chain(problem) {
        out += &format!("; {}", problem.replace('\n', " "));
    }
    out
}

/// A point in time that stays true, as an age in a line that is written once does not.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let timestamp = i64::try_from(seconds).ok().and_then(|s| x509_parser::time::ASN1Time::from_timestamp(s).ok());
    timestamp.map_or_else(String::new, |t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_names_what_is_guarded_what_was_restored_and_what_is_wrong() {
        let mut standing = Standing::default();
        assert_eq!(status(&standing, None), "nothing to guard yet");
        standing.endpoints = vec!["model-api".into(), "db".into()];
        assert_eq!(status(&standing, None), "guarding model-api, db");
        standing.restored = 1;
        standing.last_restored = Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let text = status(&standing, Some("/etc/tng/a.toml:7:12: wrong\nhint"));
        assert!(text.starts_with("guarding model-api, db; restored rules 1 time, last Nov 14 22:13:20 2023"), "{text}");
        assert!(text.ends_with("; /etc/tng/a.toml:7:12: wrong hint"), "{text}");
        standing.gone = vec!["a.slice".into()];
        assert!(status(&standing, None).contains("; cgroup a.slice is gone, nobody is captured by it"));
        standing.restored = 2;
        assert!(status(&standing, None).contains("restored rules 2 times"));
    }
}
