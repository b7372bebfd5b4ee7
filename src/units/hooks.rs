//! The steps after a start and of a stop. systemd has no relation that stops the socket when the service is stopped and
//! leaves it alone when the service is restarted (`PartOf=` restarts both, and with it go rules and queued connections),
//! so the service looks at what was asked of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;

use super::manager::Condition;
use super::net::let_go;
use super::{UnitError, manager};
use crate::capture::allocation::Allocations;
use crate::config::{self, OnStop};
use crate::daemon::{fdstore, listeners, reload};
use crate::instance::{InForce, Paths, in_force};
use crate::os::lock::Lock;
use crate::os::sys;

/// How long the manager may take to read a notice.
const BARRIER_MS: u16 = 5000;
/// How often to look at a service that is restarted.
const SETTLING: Duration = Duration::from_millis(250);
/// How often in a row it must be up: one that starts only to crash again is not settled.
const SETTLED: u32 = 4;

/// `ExecStartPost=` of the service: what only the rules of before captured is let go. A restart may also have taken a file
/// with a listener that the socket unit does not have open and the data plane may not open, such as a port below 1024.
pub fn service_started(paths: &Paths, file: &Path) -> Result<(), UnitError> {
    // What is not in force was not asked for, or was refused: there is nothing to open for it.
    let text = std::fs::read_to_string(file).unwrap_or_default();
    if paths.refused(&config::instance_of(file)?).exists()
        || in_force::current(paths, file).is_none_or(|current| current.text != text)
    {
        return let_go(paths, file);
    }
    let asking = Arc::new(Mutex::new(true));
    end_with_main_process(asking.clone());
    let missing = reload::missing(paths, file)?;
    *asking.locked() = false;
    if missing.is_empty() {
        return let_go(paths, file);
    }
    tracing::info!(?missing, "listeners that the data plane may not open are opened for it");
    reload::reload(paths, file)?;
    Ok(())
}

/// When the data plane dies, systemd restarts it only after this step, and this step would wait for an answer: the
/// dead one's socket is systemd's, and takes the question. So it ends as well, unless it has begun to change anything.
fn end_with_main_process(asking: Arc<Mutex<bool>>) {
    let pid = std::env::var("MAINPID").ok().and_then(|pid| pid.parse().ok());
    let Some(process) = pid.and_then(|pid| sys::pidfd_open(pid).ok()) else { return };
    std::thread::spawn(move || {
        let ended = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        let asking = asking.locked();
        if ended.is_ok() && *asking {
            std::process::exit(1);
        }
    });
}

/// `ExecStopPost=` of the service: with `systemctl stop` the sockets go too, and by them the rules. After a crash, a
/// restart or an upgrade they stay.
pub fn service_stopped(paths: &Paths, file: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(file)?;
    let socket = format!("tng@{instance}.socket");
    if manager::pending_job(&socket)?.is_some() {
        return release_stored(paths, file);
    }
    if manager::pending_job(&format!("tng@{instance}.service"))?.as_deref() != Some("stop") {
        return Ok(());
    }
    // The socket's own stop waits for the service's: to wait for it here would never end.
    manager::stop_unless_wanted(&socket)
}

/// `tng-stopped@.service`, which systemd starts when the service ended without a failure. A stop in the moment in which
/// the service waits to be restarted runs none of its steps, so the socket is stopped here.
///
/// It stays until the service is settled: a second start of a unit that still starts is none, so a stop that comes
/// while a restart is under way has only this one to see it.
pub fn service_ended(file: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(file)?;
    let (service, socket) = (format!("tng@{instance}.service"), format!("tng@{instance}.socket"));
    let mut up = 0;
    loop {
        match manager::condition(&service)? {
            Condition::Down => break,
            // Its own steps see to whatever comes next.
            Condition::Up if up == SETTLED => return Ok(()),
            Condition::Up => up += 1,
            Condition::Between => up = 0,
        }
        std::thread::sleep(SETTLING);
    }
    if manager::condition(&socket)? == Condition::Down || manager::is_shutting_down() {
        return Ok(());
    }
    manager::stop_unless_wanted(&socket)
}

/// The socket unit is about to close its sockets, perhaps to open them again, and then all that the file names. What the
/// manager still has of a reload (FDSTORE) would be in its way.
fn release_stored(paths: &Paths, file: &Path) -> Result<(), UnitError> {
    let Some(InForce { config, .. }) = in_force::current(paths, file) else { return Ok(()) };
    let slots = Allocations::load(paths)?.get(&config.instance).cloned();
    for spec in listeners::specs(&config, slots.as_ref())? {
        notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&fdstore::name_of(spec.addr))], &[]);
    }
    // Until the manager has read them: what a process said that is gone counts for nothing (sd_notify_barrier(3)).
    if let Ok((ours, theirs)) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC) {
        notify(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()]);
        drop(theirs);
        let _ = poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], BARRIER_MS);
    }
    Ok(())
}

fn notify(notes: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) {
    if let Err(error) = crate::notify::notify_with_fds(notes, fds) {
        tracing::warn!(reason = "fdstore-failed", %error, "a stored listener may be in the way of the socket unit");
    }
}

/// `ExecStopPost=` of the socket, when the rules are gone: the guard goes as well, unless it is to stay, or the system
/// shuts down. A restart of the socket keeps it.
pub fn socket_stopped(file: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(file)?;
    let stays = in_force::last_good_of(file).is_some_and(|good| good.config.on_stop == OnStop::Closed);
    let (socket, guard) = (format!("tng@{instance}.socket"), format!("tng-guard@{instance}.service"));
    let asked = || Ok::<_, UnitError>(manager::pending_job(&socket)?.as_deref() == Some("stop"));
    if stays || !asked()? || manager::is_shutting_down() {
        return Ok(());
    }
    manager::stop_unless_wanted(&guard)?;
    // A start that came before the guard began to stop found it running, and left it out.
    if asked()? { Ok(()) } else { manager::systemctl(&["start", "--no-block", &guard]).map(drop) }
}

/// `ExecStopPost=` of the guard: an instance that was stopped without its file is not wanted back after the next boot.
pub fn guard_stopped(paths: &Paths, file: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(file)?;
    if file.exists() || in_force::is_up(paths, &instance) {
        return Ok(());
    }
    let asked = manager::pending_job(&format!("tng-guard@{instance}.service"))?.as_deref() == Some("stop");
    if asked && !manager::is_shutting_down() {
        in_force::forget_last_good(&instance);
    }
    Ok(())
}
