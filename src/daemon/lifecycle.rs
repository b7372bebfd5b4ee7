//! `tngd serve`: the data plane's life, from configuration to the last connection, and the only place that talks to
//! the service manager (sd_notify(3)).
//!
//! Privileges over time: the configuration is read and listeners are bound with what the caller had; then everything
//! but CAP_NET_RAW is given up ([`give_up`](super::give_up)), and so is all of the file system that serving does not
//! need ([`confine`](super::confine)); only then the runtime and its threads exist.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::api_sockets::{self, ApiSockets, SocketError};
use super::confine::{Confinement, confine};
use super::fdstore::FdStore;
use super::inherited::Inherited;
use super::listeners::{self, ListenerError};
use super::refusing::{Refusing, Why};
use super::status_line::status_line;
use super::takeover;
use super::{
    BoundListener, ConfinementView, ControlState, DataPlane, DataPlaneError, Paths, PrivilegeError, State, find_user,
    give_up, raise_descriptor_limit, serve_control,
};
use crate::capture::allocation::{AllocationError, Allocations};
use crate::config::{self, Config, InstanceName};
use crate::{failpoint, sys};

/// How often every worker must answer when no watchdog asks.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How much longer the service manager is asked to wait while connections drain, and how often.
const EXTEND_BY: Duration = Duration::from_secs(20);
const EXTEND_EVERY: Duration = Duration::from_secs(5);
/// What a drain takes beyond its own deadline, to abort connections and write their records.
const DRAIN_GRACE: Duration = Duration::from_secs(5);

/// How `serve` was asked to run.
#[derive(Debug, Clone, Default)]
pub struct ServeOptions {
    /// Instance name or file.
    pub instance: String,
    /// User to become.
    pub user: Option<String>,
    /// Process id of `tngd run`, without which this process must not go on.
    pub supervisor: Option<u32>,
}

/// Why `serve` ended, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration has errors and there is no socket to refuse on.
    #[error("{0}")]
    Config(#[from] config::Report),
    /// Listeners.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// Ids and ports.
    #[error(transparent)]
    Allocation(#[from] AllocationError),
    /// Privileges.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The data plane.
    #[error(transparent)]
    DataPlane(#[from] DataPlaneError),
    /// Control sockets, runtime.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl ServeError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            ServeError::Config(_) => "config-invalid",
            ServeError::Listener(e) => e.reason(),
            ServeError::Allocation(e) => e.reason(),
            ServeError::Privilege(e) => e.reason(),
            ServeError::DataPlane(e) => e.reason(),
            ServeError::Io { .. } => "daemon-io",
        }
    }
    /// Exit status: 78 (EX_CONFIG) for a configuration, 77 (EX_NOPERM) for privileges, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            ServeError::Config(_) => 78,
            ServeError::Privilege(_) => 77,
            _ => 1,
        }
    }
}

impl From<SocketError> for ServeError {
    fn from((what, source): SocketError) -> Self {
        ServeError::Io { what, source }
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    let what = what.into();
    |source| ServeError::Io { what, source }
}

/// Serves until SIGTERM or SIGINT, then drains.
pub fn serve(options: &ServeOptions) -> Result<(), ServeError> {
    // `tngd run` blocks the signals that it reads from a signalfd, and a child inherits that.
    let _ = nix::sys::signal::SigSet::all().thread_unblock();
    let path = config::instance_path(&options.instance)?;
    let mut inherited = Inherited::take()?;
    // What `tngd run` starts has no unit of its own to store anything for.
    let managed = std::env::var_os("NOTIFY_SOCKET").is_some() && options.supervisor.is_none();
    let mut fdstore = FdStore::new(&inherited, managed);
    let user = options.user.as_deref().map(find_user).transpose()?;
    let paths = Paths::current();
    let (config, problem) = match config::load(&path) {
        Ok(loaded) => (loaded.config, None),
        // With sockets from the service manager we must stay: leaving would close them or loop, and refusing is safe.
        Err(report) if !inherited.is_empty() => {
            tracing::error!(reason = "config-invalid", error = %report, "refusing all connections");
            (refuse_all(&path)?, Some(report.to_string()))
        }
        Err(report) => return Err(report.into()),
    };
    let slots = Allocations::load(&paths)?.get(&config.instance).cloned();
    let passed: Vec<_> = inherited.tcp.drain(..).map(|p| (p.addr, p.listener)).collect();
    let (bound, refusing) = match problem {
        None => {
            let assembled = listeners::assemble(&listeners::specs(&config, slots.as_ref())?, passed)?;
            fdstore.hold(&assembled.bound);
            (assembled.bound, (lent(assembled.unused, &fdstore), Why::Unused))
        }
        Some(_) => (Vec::new(), (passed, Why::NoConfig)),
    };
    let uid = user.map_or_else(nix::unistd::geteuid, |(uid, _)| uid).as_raw();
    let prepared = api_sockets::prepare(&paths, &config, uid, &mut inherited)?;
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(reason = "descriptor-limit", %error, "the limit of descriptors stays low");
    }
    give_up(user)?;
    if let Some(supervisor) = options.supervisor {
        follow(supervisor).map_err(io_error("follow tngd run"))?;
    }
    let sockets = api_sockets::bind(&paths, &config, prepared)?;
    let confinement = confine(&paths, &config);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(io_error("start the runtime"))?;
    runtime.block_on(live(Start { config, path, bound, refusing, sockets, problem, fdstore, confinement }))
}

/// Of the sockets that no endpoint asks for, those of the socket unit: they are not ours to end. The others end.
fn lent(unused: Vec<(SocketAddr, TcpListener)>, fdstore: &FdStore) -> Vec<(SocketAddr, TcpListener)> {
    let (lent, ended): (Vec<_>, Vec<_>) = unused.into_iter().partition(|(addr, _)| fdstore.units().contains(addr));
    for (addr, listener) in &ended {
        tracing::info!(%addr, "a stored listener that no endpoint asks for has ended");
        listeners::shut(listener);
    }
    for (addr, _) in &lent {
        tracing::warn!(
            reason = "listener-unused", %addr, "a socket was passed that no endpoint asks for; it refuses connections"
        );
    }
    lent
}

/// The configuration of an instance whose file has errors: nothing is served.
fn refuse_all(path: &Path) -> Result<Config, config::Report> {
    Ok(Config {
        instance: config::instance_of(path)?,
        source: path.to_owned(),
        on_stop: config::OnStop::Closed,
        drain_timeout: Duration::ZERO,
        control_listen: None,
        endpoints: Vec::new(),
    })
}

/// Dies with `tngd run`, also when that is killed: alone it would serve without guard.
fn follow(supervisor: u32) -> io::Result<()> {
    sys::set_parent_death_signal(libc::SIGKILL)?;
    if std::os::unix::process::parent_id() != supervisor {
        return Err(io::Error::other("tngd run is gone"));
    }
    Ok(())
}

/// What the life cycle holds.
pub(super) struct Life {
    pub(super) control: Arc<ControlState>,
    pub(super) plane: Arc<DataPlane>,
    pub(super) instance: InstanceName,
    pub(super) path: PathBuf,
    pub(super) refusing: Mutex<Refusing>,
    pub(super) fdstore: Mutex<FdStore>,
    pub(super) confinement: Confinement,
    /// The line that the service manager has.
    status: Mutex<String>,
}

/// What [`live`] begins with.
struct Start {
    config: Config,
    path: PathBuf,
    bound: Vec<BoundListener>,
    refusing: (Vec<(SocketAddr, TcpListener)>, Why),
    sockets: ApiSockets,
    problem: Option<String>,
    fdstore: FdStore,
    confinement: Confinement,
}

async fn live(start: Start) -> Result<(), ServeError> {
    let Start { config, path, bound, refusing, sockets, problem, fdstore, confinement } = start;
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(io_error("SIGHUP"))?;
    let control = ControlState::new(config.instance.as_str(), &path.display().to_string());
    let plane = DataPlane::start(&config, bound)?;
    control.set_plane(plane.clone());
    control.set_problems(problem.into_iter().collect());
    control.set_confinement(ConfinementView { landlock: confinement.landlock() });
    let stop = CancellationToken::new();
    tokio::spawn(serve_control(control.clone(), sockets.control, sockets.control_tcp, stop.clone()));
    let handoff = tokio::net::UnixListener::from_std(sockets.handoff).map_err(io_error("handoff socket"))?;
    let (asked, mut requests) = mpsc::channel(1);
    tokio::spawn(takeover::receive_requests(handoff, asked));
    let life = Life {
        control,
        plane,
        instance: config.instance.clone(),
        path,
        refusing: Mutex::new(Refusing::start(refusing.0, refusing.1)),
        fdstore: Mutex::new(fdstore),
        confinement,
        status: Mutex::default(),
    };
    stall_point("serve.ready").await;
    life.enter(State::Ready);
    let watchdog = sd_notify::watchdog_enabled();
    let mut beat = tokio::time::interval(watchdog.map_or(HEARTBEAT, |w| w / 2));
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => life.reload_by_signal(),
            _ = beat.tick() => life.heartbeat(beat.period() / 2, watchdog.is_some()).await,
            Some(asked) = requests.recv() => life.take_over(asked),
        }
    }
    life.enter(State::Draining);
    let deadline = life.plane.config().0.drain_timeout;
    let drain = async {
        stall_point("serve.drain").await;
        life.plane.drain(deadline).await
    };
    let outcome = extending(deadline + DRAIN_GRACE, drain, watchdog.is_some()).await;
    tracing::info!(finished = outcome.finished, aborted = outcome.aborted, "drained");
    stall_point("serve.drained").await;
    life.control.set_state(State::Stopped);
    stop.cancel();
    Ok(())
}

/// Keeps the service manager from killing a drain: its own deadline knows nothing of `drain_timeout`. The process asks
/// again and again rather than once for all, so that it is killed soon when it hangs.
async fn extending<T>(longest: Duration, work: impl Future<Output = T>, watchdog: bool) -> T {
    let end = tokio::time::Instant::now() + longest;
    let mut tick = tokio::time::interval(EXTEND_EVERY);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = tick.tick(), if tokio::time::Instant::now() < end => {
                notify(&[NotifyState::ExtendTimeoutUsec(EXTEND_BY.as_micros() as u32)]);
                if watchdog {
                    notify(&[NotifyState::Watchdog]);
                }
            }
        }
    }
}

/// Stands still here when a test asked for it.
async fn stall_point(name: &str) {
    if failpoint::at(name) == Some(failpoint::Action::Stall) {
        std::future::pending::<()>().await;
    }
}

impl Life {
    /// The one place where the state changes and the service manager is told.
    pub(super) fn enter(&self, state: State) {
        self.control.set_state(state);
        let status = self.status_line();
        tracing::info!(state = state.word(), "{status}");
        let mut notes = vec![NotifyState::Status(&status)];
        match state {
            State::Ready => notes.push(NotifyState::Ready),
            State::Reloading => {
                notes.push(NotifyState::Reloading);
                notes.extend(NotifyState::monotonic_usec_now());
            }
            State::Draining => notes.push(NotifyState::Stopping),
            State::Starting | State::Stopped | State::Degraded => {}
        }
        notify(&notes);
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    fn status_line(&self) -> String {
        status_line(&self.control.report())
    }

    /// A round trip through every worker; the watchdog is fed only when all of them answered.
    async fn heartbeat(&self, deadline: Duration, watchdog: bool) {
        let stalled = self.plane.heartbeat(deadline).await.err();
        let problem = stalled.as_ref().map(|name| format!("worker of endpoint {name} does not answer"));
        if let Some(problem) = &problem {
            tracing::error!(reason = "worker-stalled", "{problem}");
        } else if watchdog {
            notify(&[NotifyState::Watchdog]);
        }
        self.control.set_worker_problem(problem);
        // Evidence or a worker may have failed or come back since.
        let line = self.status_line();
        let mut told = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if *told != line {
            notify(&[NotifyState::Status(&line)]);
            *told = line;
        }
    }
}

/// Failing to reach the service manager must not stop the service.
fn notify(notes: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(notes) {
        tracing::debug!(%error, "sd_notify");
    }
}
