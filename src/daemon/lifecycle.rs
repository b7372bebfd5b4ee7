//! `tngd serve`: the data plane's life, from configuration to the last connection, and the only place that talks to
//! the service manager (sd_notify(3)).
//!
//! Privileges over time: the configuration is read and listeners are bound with what the caller had; then everything
//! but CAP_NET_RAW is given up ([`give_up`]), and so is all of the file system that serving does not need
//! ([`confine`](super::confine)); only then the runtime and its threads exist.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
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
use super::refusing::Refusing;
use super::start::{self, Problem, Refused, Sockets, prepare, refuse_all};
use super::status_line::status_line;
use super::takeover;
use super::{
    BoundListener, ConfinementView, ControlState, DataPlane, DataPlaneError, State, serve_control, start_logging,
};
use crate::capture::allocation::AllocationError;
use crate::config::{self, Config, InstanceName};
use crate::instance::Paths;
use crate::instance::in_force::NotServed;
use crate::os::lock::Lock;
use crate::os::privileges::{PrivilegeError, find_user, give_up, raise_descriptor_limit};
use crate::os::{failpoint, sys};

/// How often every worker must answer when no watchdog asks.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How much longer the service manager is asked to wait while connections drain (20 s), and how often.
const EXTEND: NotifyState<'static> = NotifyState::ExtendTimeoutUsec(20_000_000);
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
    /// The file was not taken by the start that asked for it.
    #[error("{0}")]
    Refused(String),
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
            ServeError::Config(_) | ServeError::Refused(_) => "config-invalid",
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
            ServeError::Config(_) | ServeError::Refused(_) => 78,
            ServeError::Privilege(_) => 77,
            _ => 1,
        }
    }
}

impl From<NotServed> for ServeError {
    fn from(why: NotServed) -> Self {
        match why {
            NotServed::Config(report) => ServeError::Config(report),
            NotServed::Refused(text) => ServeError::Refused(text),
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
    let must_stay = !inherited.is_empty();
    let passed: Vec<_> = inherited.tcp.drain(..).map(|p| (p.addr, p.listener)).collect();
    let spare = listeners::copies(&passed).map_err(start::inherited)?;
    let spare = must_stay.then_some(spare);
    let (config, bound, refusing, problem) = match prepare(&path, &paths, passed) {
        Ok((config, assembled)) => {
            fdstore.hold(&assembled.bound);
            (config, assembled.bound, Refused::unused(assembled.unused, &fdstore), None)
        }
        Err(error) => {
            let (refused, problem) = Refused::everything(spare.as_deref(), error)?;
            (refuse_all(&path)?, Vec::new(), refused, Some(problem))
        }
    };
    let uid = user.map_or_else(nix::unistd::geteuid, |(uid, _)| uid).as_raw();
    let prepared = api_sockets::prepare(&paths, &config, uid, &mut inherited)?;
    let api_problem = prepared.problem.clone();
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(reason = "descriptor-limit", %error, "the limit of descriptors stays low");
    }
    give_up(user)?;
    if let Some(supervisor) = options.supervisor {
        follow(supervisor).map_err(io_error("follow tngd run"))?;
    }
    let _ = failpoint::at("serve.bound");
    let sockets = api_sockets::bind(&paths, &config, prepared)?;
    let confinement = confine(&paths, &config);
    start_logging();
    let runtime = runtime().map_err(io_error("start the runtime"))?;
    runtime.block_on(live(Start {
        config,
        path,
        bound,
        refusing,
        spare,
        sockets,
        problem,
        api_problem,
        fdstore,
        confinement,
    }))
}

/// The runtime of the data plane. A relay that has more bytes wakes itself, so a worker is never idle beside bulk streams,
/// and would look at the network only after 61 such turns: it looks after each.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().event_interval(1).enable_all().build()
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
    /// Nothing is served for a reason that may pass by itself.
    pub(super) may_pass: AtomicBool,
    /// The line that the service manager has.
    status: Mutex<String>,
}

/// What [`live`] begins with.
struct Start {
    config: Config,
    path: PathBuf,
    bound: Vec<BoundListener>,
    refusing: Refused,
    /// Copies of the passed sockets; `None` when no service manager passed any.
    spare: Option<Sockets>,
    sockets: ApiSockets,
    problem: Option<Problem>,
    api_problem: Option<String>,
    fdstore: FdStore,
    confinement: Confinement,
}

async fn live(start: Start) -> Result<(), ServeError> {
    let Start { config, path, bound, mut refusing, spare, sockets, mut problem, api_problem, fdstore, confinement } =
        start;
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(io_error("SIGHUP"))?;
    let control = ControlState::new(config.instance.as_str(), &path.display().to_string());
    let plane = match DataPlane::start(&config, bound) {
        Ok(plane) => plane,
        Err(error) => {
            let (refused, why) = Refused::everything(spare.as_deref(), error.into())?;
            (refusing, problem) = (refused, Some(why));
            DataPlane::start(&refuse_all(&path)?, Vec::new())?
        }
    };
    drop(spare);
    control.set_plane(plane.clone());
    let may_pass = AtomicBool::new(problem.as_ref().is_some_and(|p| p.may_pass));
    control.set_problems(problem.into_iter().map(|p| p.text).collect());
    control.set_api_problem(api_problem);
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
        refusing: Mutex::new(Refusing::start(refusing.sockets, refusing.why)),
        fdstore: Mutex::new(fdstore),
        confinement,
        may_pass,
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
    let now = tokio::time::Instant::now();
    let end = now + longest;
    let mut tick = tokio::time::interval_at(now + EXTEND_EVERY, EXTEND_EVERY);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            _ = tick.tick(), if tokio::time::Instant::now() < end => {
                notify(&[EXTEND]);
                if watchdog {
                    notify(&[NotifyState::Watchdog]);
                }
            }
            done = &mut work => return done,
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
            State::Draining => notes.extend([NotifyState::Stopping, EXTEND]),
            State::Starting | State::Stopped | State::Degraded => {}
        }
        notify(&notes);
        *self.status.locked() = status;
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
        self.serve_if_possible_now();
        // Evidence or a worker may have failed or come back since.
        let line = self.status_line();
        let mut told = self.status.locked();
        if *told != line {
            notify(&[NotifyState::Status(&line)]);
            *told = line;
        }
    }
}

/// Failing to reach the service manager must not stop the service.
fn notify(notes: &[NotifyState]) {
    if let Err(error) = crate::notify::notify(notes) {
        tracing::debug!(%error, "sd_notify");
    }
}
