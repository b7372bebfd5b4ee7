//! `tngd run`: the whole life cycle in one command, for containers and by hand. Rules up, guard held, the data plane
//! in a child without privileges; on SIGTERM the child drains, then rules and guard go.
//!
//! When it is killed, the capture table stays and refuses; the next `run` or `net down` of the name takes it over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Gid, Pid, Uid};

use super::narrowing::Covering;
use super::reload::{self, ReloadError};
use crate::capture::allocation::{AllocationError, Allocations, InstanceSlots};
use crate::capture::apply::{self, ApplyError};
use crate::capture::cgroups;
use crate::capture::fdstore::FdStore;
use crate::capture::guard::{Guard, GuardError};
use crate::capture::plan::RulesPlan;
use crate::config::{self, Config, InstanceName, Mode, OnStop};
use crate::instance::Paths;
use crate::os::privileges::{PrivilegeError, find_user, may_administer_network};

/// How long the child may take beyond its own drain deadline.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Why `run` failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration has errors.
    #[error("{0}")]
    Config(#[from] config::Report),
    /// The instance runs already.
    #[error("instance {0} is running already (tngctl status {0})")]
    AlreadyRunning(InstanceName),
    /// Privileges.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// Rules.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Guard.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The data plane ended by itself; it has said why.
    #[error("the data plane ended: {0}")]
    ChildFailed(ExitStatus),
    /// The data plane was killed; rules stay and refuse.
    #[error(
        "the data plane was killed ({status}); captured traffic is refused until the next start, or: tngd net down {instance}"
    )]
    ChildKilled {
        /// How.
        status: ExitStatus,
        /// Which instance.
        instance: InstanceName,
    },
    /// The start or the data plane failed, and rules refuse: those of before, or its own with `on_stop = "closed"`.
    #[error(
        "{failure}{}captured traffic is refused until the next start, or: tngd net down {instance}",
        behind(failure)
    )]
    StillRefusing {
        /// What failed.
        failure: Box<RunError>,
        /// Which instance.
        instance: InstanceName,
    },
    /// Anything else with the operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<AllocationError> for RunError {
    fn from(e: AllocationError) -> Self {
        RunError::Apply(e.into())
    }
}

impl RunError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            RunError::Config(_) => "config-invalid",
            RunError::AlreadyRunning(_) => "already-running",
            RunError::Privilege(e) => e.reason(),
            RunError::Apply(e) => e.reason(),
            RunError::Guard(e) => e.reason(),
            RunError::ChildFailed(_) => "daemon-failed",
            RunError::ChildKilled { .. } => "daemon-killed",
            RunError::StillRefusing { failure, .. } => failure.reason(),
            RunError::Io { .. } => "daemon-io",
        }
    }
    /// Exit status: the child's own, 78 (EX_CONFIG), 77 (EX_NOPERM), else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            RunError::Config(_) | RunError::Apply(ApplyError::Conflict(_)) => 78,
            RunError::Privilege(_) | RunError::Apply(ApplyError::Privilege) => 77,
            RunError::ChildFailed(status) => status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1),
            RunError::StillRefusing { failure, .. } => failure.exit_status(),
            _ => 1,
        }
    }
}

/// Between a failure and what else is to be said: findings of a file end in a line of their own.
fn behind(failure: &RunError) -> &'static str {
    if matches!(failure, RunError::Config(_) | RunError::Apply(ApplyError::Conflict(_))) { "\n" } else { "; " }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> RunError {
    let what = what.into();
    |source| RunError::Io { what, source }
}

/// Runs an instance until SIGTERM or SIGINT.
pub fn run(name_or_path: &str, user: Option<&str>) -> Result<(), RunError> {
    let path = config::instance_path(name_or_path)?;
    let instance = config::instance_of(&path)?;
    // Nothing was touched yet, but an earlier life may have left rules, and who starts it does not know.
    let (config, user_ids) = wanted(&path, user).map_err(|e| refusing(&instance, e))?;
    let captures = config.endpoints.iter().any(|e| matches!(e.mode, Mode::Netfilter(_)));
    if captures && !may_administer_network() {
        return Err(ApplyError::Privilege.into());
    }
    // Before any thread: all of them must have these signals blocked, or one would die of a SIGTERM.
    let mut signals = SigSet::empty();
    for s in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(s);
    }
    signals.thread_block().map_err(|e| io_error("block signals")(e.into()))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(|e| io_error("signalfd")(e.into()))?;
    let paths = Paths::current();
    let _only = OnlyOne::new(&paths, &config.instance)?;
    let owner_uid = user_ids.map_or_else(Uid::effective, |(uid, _)| uid).as_raw();
    let found = Found::look(&paths, &config.instance, captures)?;
    let mut covering = None;
    let guard = match captures {
        true => {
            let up = net_up(&paths, &config, owner_uid, &found).map_err(|e| found.refusing(&config.instance, e))?;
            covering = up.1;
            Some(up.0)
        }
        false => idle_guard(&paths, &config),
    };
    let end = covering
        .map_or(Ok(()), |covering| covering.narrow_when_ready(&paths).map_err(io_error("start a thread")))
        .and_then(|()| spawn(&path, user))
        .and_then(|child| supervise(child, &signals, &paths, &path, &config));
    let end = leave(&paths, &config, &found, captures, end);
    guard.into_iter().for_each(HeldGuard::stop);
    end
}

/// What is to run.
fn wanted(path: &Path, user: Option<&str>) -> Result<(Config, Option<(Uid, Gid)>), RunError> {
    Ok((config::load(path)?.config, user.map(find_user).transpose()?))
}

/// `failure` of a start that touched nothing, with what refuses.
fn refusing(instance: &InstanceName, failure: RunError) -> RunError {
    match may_administer_network() && apply::is_up(instance).unwrap_or(false) {
        true => RunError::StillRefusing { failure: Box::new(failure), instance: instance.clone() },
        false => failure,
    }
}

/// Decides about the rules at the end. The path is never more open after a run that failed than it was before: only a
/// stop that was asked for, or a start that failed before it served, takes away rules, and the latter only its own.
fn leave(
    paths: &Paths,
    config: &Config,
    found: &Found,
    captures: bool,
    end: Result<(), RunError>,
) -> Result<(), RunError> {
    let instance = &config.instance;
    let closed = stop_policy(paths, config).0 == OnStop::Closed;
    // A reload may have brought captures that were not there at the start.
    let rules = captures || apply::recorded_plan(paths, instance).is_some();
    if !rules {
        paths.remove_instance(instance);
        return end;
    }
    match end {
        Ok(()) if closed => {
            tracing::info!("on_stop = \"closed\": captured traffic is refused until the next start or net down");
            Ok(())
        }
        Ok(()) => {
            remove_rules(paths, instance);
            Ok(())
        }
        // The capture table refuses without listeners; the guard's table goes with this process.
        Err(killed @ RunError::ChildKilled { .. }) => {
            if !found.has_served(paths, instance) {
                found.restore(paths, instance);
            }
            Err(killed)
        }
        Err(failure) => {
            let served = found.has_served(paths, instance);
            if found.refuses && !served {
                found.restore(paths, instance);
            } else if !found.refuses && !closed && !served {
                remove_rules(paths, instance);
                return Err(failure);
            }
            Err(RunError::StillRefusing { failure: Box::new(failure), instance: instance.clone() })
        }
    }
}

/// Inode of a socket and when that was made: the number alone is used again.
type SocketFile = (u64, i64, i64);

/// What an earlier life of the instance left: after a kill, or after a stop with `on_stop = "closed"`.
struct Found {
    /// Whether its capture table is in the kernel, and refuses.
    refuses: bool,
    /// The plan that the table was made of, and its ids and ports.
    left: Option<(RulesPlan, InstanceSlots)>,
    /// The control socket that a killed life left.
    socket: Option<SocketFile>,
}

impl Found {
    fn look(paths: &Paths, instance: &InstanceName, captures: bool) -> Result<Self, RunError> {
        // Without captures and without the right to look there is nothing that this run could take away.
        let refuses = (captures || may_administer_network()) && apply::is_up(instance)?;
        let slots = Allocations::load(paths)?.get(instance).cloned();
        let left = apply::recorded_plan(paths, instance).filter(|_| refuses).zip(slots);
        Ok(Self { refuses, left, socket: Self::control_socket(paths, instance) })
    }

    fn control_socket(paths: &Paths, instance: &InstanceName) -> Option<SocketFile> {
        let file = std::fs::metadata(paths.control_socket(instance)).ok()?;
        Some((file.ino(), file.ctime(), file.ctime_nsec()))
    }

    /// Whether the data plane of this run got as far as to serve: it makes its control socket when it has all its listeners.
    fn has_served(&self, paths: &Paths, instance: &InstanceName) -> bool {
        let socket = Self::control_socket(paths, instance);
        socket.is_some() && socket != self.socket
    }

    /// `failure`, with what still refuses.
    fn refusing(&self, instance: &InstanceName, failure: RunError) -> RunError {
        match apply::is_up(instance) {
            Ok(false) if !self.refuses => failure,
            _ => RunError::StillRefusing { failure: Box::new(failure), instance: instance.clone() },
        }
    }

    /// The rules of before, in the place of those of the run that failed: it may have captured less.
    fn restore(&self, paths: &Paths, instance: &InstanceName) {
        let Some((plan, slots)) = &self.left else { return };
        if let Err(e) = apply::restore(paths, plan, slots) {
            tracing::error!(
                reason = e.reason(),
                error = %e,
                "the rules of before could not be put back, those of the failed start refuse: tngd net down {instance}"
            );
        }
    }
}

/// A second `run` of the name would pull the rules away from under the first.
struct OnlyOne {
    path: PathBuf,
    _lock: Flock<File>,
}

impl OnlyOne {
    fn new(paths: &Paths, instance: &InstanceName) -> Result<Self, RunError> {
        let path = paths.run_lock(instance);
        let named = || path.display().to_string();
        paths.make_private_dir().map_err(io_error(named()))?;
        loop {
            let file =
                File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error(named()))?;
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
                .map_err(|_| RunError::AlreadyRunning(instance.clone()))?;
            // One that ended between the two calls took the file along, and a lock on that one keeps nobody out.
            let ours = lock.metadata().map_err(io_error(named()))?;
            if std::fs::metadata(&path).is_ok_and(|there| there.ino() == ours.ino()) {
                return Ok(Self { path, _lock: lock });
            }
        }
    }
}

impl Drop for OnlyOne {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The thread that holds the guard.
struct HeldGuard {
    thread: thread::JoinHandle<Result<(), GuardError>>,
    /// Closing it ends the guard.
    stop: OwnedFd,
}

impl HeldGuard {
    fn start(paths: &Paths, plan: RulesPlan) -> Result<Self, RunError> {
        let mut guard = Guard::start(paths, plan, FdStore::None, Vec::new())?;
        let (stopped, stop) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| io_error("pipe")(e.into()))?;
        // poll(2) reports the closing of the other end as POLLHUP.
        let thread = thread::Builder::new()
            .name("guard".into())
            .spawn(move || guard.run(stopped.as_fd(), Duration::MAX, |_| {}))
            .map_err(io_error("start the guard"))?;
        Ok(Self { thread, stop })
    }

    fn stop(self) {
        // In this order: the thread ends by it.
        drop(self.stop);
        match self.thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::error!(reason = e.reason(), error = %e, "guard"),
            Err(_) => tracing::error!(reason = "guard-panicked", "guard"),
        }
    }
}

/// Guard first, so that nothing passes between the two. What an earlier life captured is captured or refused as well.
fn net_up(
    paths: &Paths,
    config: &Config,
    owner_uid: u32,
    found: &Found,
) -> Result<(HeldGuard, Option<Covering>), RunError> {
    let slots = apply::allocate(paths, config, owner_uid)?;
    let plan = RulesPlan::new(config, &slots);
    let left = found.left.as_ref().map(|(left, _)| cgroups::loadable(left));
    let between = left.as_ref().map_or_else(|| plan.clone(), |left| plan.covering(left));
    let guard = HeldGuard::start(paths, between.clone()).inspect_err(|_| {
        let _ = apply::release_if_down(paths, &config.instance);
    })?;
    match apply::up_covering(paths, config, owner_uid, left.as_ref()) {
        Ok(_) => Ok((guard, (between != plan).then_some(Covering { between, plan }))),
        Err(e) => {
            guard.stop();
            let _ = apply::release_if_down(paths, &config.instance);
            Err(e.into())
        }
    }
}

/// For the captures that a reload may bring. Without the right to hold it there is no right to apply those either.
fn idle_guard(paths: &Paths, config: &Config) -> Option<HeldGuard> {
    if !may_administer_network() {
        return None;
    }
    let held = HeldGuard::start(paths, RulesPlan::nothing(config.instance.clone()));
    held.inspect_err(|e| tracing::warn!(reason = e.reason(), error = %e, "captures of a reload will have no guard"))
        .ok()
}

fn remove_rules(paths: &Paths, instance: &InstanceName) {
    if let Err(e) = apply::down(paths, instance) {
        tracing::error!(reason = e.reason(), error = %e, "rules could not be removed: tngd net down {instance}");
    }
}

fn spawn(path: &Path, user: Option<&str>) -> Result<Child, RunError> {
    let exe = std::env::current_exe().map_err(io_error("find tngd"))?;
    let mut command = Command::new(exe);
    command.arg("serve").arg(path).arg("--supervisor").arg(std::process::id().to_string()).stdin(Stdio::null());
    if let Some(user) = user {
        command.arg("--user").arg(user);
    }
    command.spawn().map_err(io_error("start the data plane"))
}

/// Signals in, until the child is gone.
fn supervise(
    mut child: Child,
    signals: &SignalFd,
    paths: &Paths,
    path: &Path,
    config: &Config,
) -> Result<(), RunError> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let mut stopping: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait().map_err(io_error("wait for the data plane"))? {
            return judge(status, stopping.is_some(), &config.instance);
        }
        if stopping.is_some_and(|end| Instant::now() >= end) {
            tracing::error!(reason = "drain-overrun", "the data plane did not end in time, killing it");
            let _ = child.kill();
            stopping = Some(Instant::now() + STOP_GRACE);
        }
        match next_signal(signals, stopping)? {
            Some(Signal::SIGTERM | Signal::SIGINT) => {
                let _ = kill(pid, Signal::SIGTERM);
                stopping.get_or_insert(Instant::now() + stop_policy(paths, config).1 + STOP_GRACE);
            }
            Some(Signal::SIGHUP) if stopping.is_none() => reload_now(paths, path),
            _ => {}
        }
    }
}

/// What a stop leaves and how long it may take: a reload, by whomever, has recorded what is in force.
fn stop_policy(paths: &Paths, started_with: &Config) -> (OnStop, Duration) {
    match Allocations::load(paths).ok().and_then(|a| a.get(&started_with.instance).cloned()) {
        Some(slots) => (slots.on_stop, slots.drain_timeout),
        None => (started_with.on_stop, started_with.drain_timeout),
    }
}

fn reload_now(paths: &Paths, path: &Path) {
    match reload::reload(paths, path) {
        Ok(done) => {
            for warning in done.warnings {
                tracing::warn!("{warning}");
            }
            tracing::info!("reloaded");
        }
        Err(e @ ReloadError::StillCovered { .. }) => tracing::error!(reason = e.reason(), error = %e, "reload"),
        Err(e) => tracing::error!(reason = e.reason(), error = %e, "reload failed, the old configuration goes on"),
    }
}

fn judge(status: ExitStatus, asked: bool, instance: &InstanceName) -> Result<(), RunError> {
    const PANICKED: i32 = 101;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) if code != PANICKED => Err(RunError::ChildFailed(status)),
        // Killed at our own word after the drain deadline: connections are gone, and so may the rules be.
        _ if asked => Ok(()),
        _ => Err(RunError::ChildKilled { status, instance: instance.clone() }),
    }
}

/// The next signal, or `None` after a while when the process is stopping.
fn next_signal(signals: &SignalFd, stopping: Option<Instant>) -> Result<Option<Signal>, RunError> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let wait = stopping.map(|end| end.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    let timeout = wait.map_or(PollTimeout::NONE, |w| PollTimeout::try_from(w).unwrap_or(PollTimeout::MAX));
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, timeout) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
        Ok(_) => {}
        Err(e) => return Err(io_error("wait for signals")(e.into())),
    }
    let info = signals.read_signal().map_err(|e| io_error("read signals")(e.into()))?;
    Ok(info.and_then(|i| Signal::try_from(i.ssi_signo.cast_signed()).ok()))
}
