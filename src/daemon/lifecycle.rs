//! `tngd serve`: the data plane's life, from configuration to the last connection, and the only place that talks to
//! the service manager (sd_notify(3)).
//!
//! Privileges over time: the configuration is read and listeners are bound with what the caller had; then everything
//! but CAP_NET_RAW is given up ([`give_up`](super::give_up)); only then the runtime and its threads exist.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::handoff::{self, Answer, Request};
use super::listeners::{self, ListenerError};
use super::{
    BoundListener, ControlState, DataPlane, DataPlaneError, Paths, PrivilegeError, State, find_user, give_up,
    raise_descriptor_limit, serve_control,
};
use crate::capture::allocation::{AllocationError, Allocations, InstanceSlots};
use crate::config::{self, Config, InstanceName};
use crate::{failpoint, sys};

/// How often every worker must answer when no watchdog asks.
const HEARTBEAT: Duration = Duration::from_secs(5);

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

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    let what = what.into();
    |source| ServeError::Io { what, source }
}

/// Serves until SIGTERM or SIGINT, then drains.
pub fn serve(options: &ServeOptions) -> Result<(), ServeError> {
    // `tngd run` blocks the signals that it reads from a signalfd, and a child inherits that.
    let _ = nix::sys::signal::SigSet::all().thread_unblock();
    let path = config::instance_path(&options.instance)?;
    let inherited = listeners::inherited()?;
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
    let (bound, refusing) = match problem {
        None => (listeners::assemble(&listeners::specs(&config, slots.as_ref())?, inherited)?, Vec::new()),
        Some(_) => (Vec::new(), inherited),
    };
    let sockets = Sockets::bind(&paths, &config, user.map(|(uid, _)| uid.as_raw()))?;
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(reason = "descriptor-limit", %error, "the limit of descriptors stays low");
    }
    give_up(user)?;
    if let Some(supervisor) = options.supervisor {
        follow(supervisor).map_err(io_error("follow tngd run"))?;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(io_error("start the runtime"))?;
    runtime.block_on(live(config, path, bound, refusing, sockets, problem))
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

/// The unix sockets of an instance, and the TCP one if configured.
struct Sockets {
    control: UnixListener,
    control_tcp: Option<TcpListener>,
    handoff: UnixListener,
}

impl Sockets {
    fn bind(paths: &Paths, config: &Config, uid: Option<u32>) -> Result<Self, ServeError> {
        let dir = paths.instance_dir(&config.instance);
        let uid = uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw());
        paths.make_instance_dir(&config.instance, uid).map_err(io_error(dir.display().to_string()))?;
        let control = bind_unix(&paths.control_socket(&config.instance), 0o660, uid)?;
        let handoff = bind_unix(&paths.handoff_socket(&config.instance), 0o600, uid)?;
        let control_tcp = config
            .control_listen
            .map(|addr| TcpListener::bind(addr).map_err(io_error(format!("control API on {addr}"))))
            .transpose()?;
        Ok(Self { control, control_tcp, handoff })
    }
}

/// A socket file that another process listens on is not taken away from it.
fn bind_unix(path: &Path, mode: u32, uid: u32) -> Result<UnixListener, ServeError> {
    let named = || path.display().to_string();
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let taken = io::Error::new(io::ErrorKind::AddrInUse, "this instance is running already");
        return Err(ServeError::Io { what: named(), source: taken });
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(io_error(named()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io_error(named()))?;
    std::os::unix::fs::lchown(path, Some(uid), None).map_err(io_error(named()))?;
    listener.set_nonblocking(true).map_err(io_error(named()))?;
    Ok(listener)
}

/// What the life cycle holds.
struct Life {
    control: Arc<ControlState>,
    plane: Arc<DataPlane>,
    instance: InstanceName,
    path: PathBuf,
    refusing: Mutex<Refusing>,
}

/// Inherited sockets on which everything is refused, until a good configuration takes them over.
struct Refusing {
    sockets: Vec<(SocketAddr, TcpListener)>,
    over: CancellationToken,
}

impl Refusing {
    fn start(sockets: Vec<(SocketAddr, TcpListener)>) -> Self {
        let over = CancellationToken::new();
        for (addr, socket) in &sockets {
            match socket.try_clone().and_then(tokio::net::TcpListener::from_std) {
                Ok(listener) => drop(tokio::spawn(refuse(listener, over.clone()))),
                Err(error) => tracing::error!(reason = "refuse-failed", %addr, %error, "clients will hang"),
            }
        }
        Self { sockets, over }
    }

    fn duplicates(&self) -> io::Result<Vec<(SocketAddr, TcpListener)>> {
        self.sockets.iter().map(|(addr, socket)| Ok((*addr, socket.try_clone()?))).collect()
    }

    /// The sockets are served, or asked for by nobody and closed.
    fn end(&mut self) {
        self.over.cancel();
        self.sockets.clear();
    }
}

async fn live(
    config: Config,
    path: PathBuf,
    bound: Vec<BoundListener>,
    refusing: Vec<(SocketAddr, TcpListener)>,
    sockets: Sockets,
    problem: Option<String>,
) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("SIGINT"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(io_error("SIGHUP"))?;
    let control = ControlState::new(config.instance.as_str(), &path.display().to_string());
    let plane = DataPlane::start(&config, bound)?;
    control.set_plane(plane.clone());
    control.set_problems(problem.into_iter().collect());
    let stop = CancellationToken::new();
    tokio::spawn(serve_control(control.clone(), sockets.control, sockets.control_tcp, stop.clone()));
    let handoff = tokio::net::UnixListener::from_std(sockets.handoff).map_err(io_error("handoff socket"))?;
    let refusing = Mutex::new(Refusing::start(refusing));
    let life = Life { control, plane, instance: config.instance.clone(), path, refusing };
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
            _ = beat.tick() => life.heartbeat(beat.period(), watchdog.is_some()).await,
            Ok((stream, _)) = handoff.accept() => life.take_over(stream).await,
        }
    }
    life.enter(State::Draining);
    stall_point("serve.drain").await;
    let deadline = life.plane.config().0.drain_timeout;
    let outcome = life.plane.drain(deadline).await;
    tracing::info!(finished = outcome.finished, aborted = outcome.aborted, "drained");
    stall_point("serve.drained").await;
    life.control.set_state(State::Stopped);
    stop.cancel();
    Ok(())
}

/// Stands still here when a test asked for it.
async fn stall_point(name: &str) {
    if failpoint::at(name) == Some(failpoint::Action::Stall) {
        std::future::pending::<()>().await;
    }
}

/// Accepts and resets: without a valid configuration nothing may pass, and a queue that nobody empties explains nothing.
async fn refuse(listener: tokio::net::TcpListener, over: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = over.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                tracing::warn!(target: "tng::access", reason = "config-invalid", src = %peer, "refused");
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

impl Life {
    /// The one place where the state changes and the service manager is told.
    fn enter(&self, state: State) {
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
    }

    fn status_line(&self) -> String {
        let config = self.plane.config();
        let names: Vec<String> = config.0.endpoints.iter().map(|e| format!("{} {}", e.side, e.name)).collect();
        let report = self.control.report();
        let problem = report.problems.first().and_then(|p| p.lines().next()).map(str::to_owned);
        // An instance that refuses everything has no endpoint to name.
        let parts: Vec<String> = Some(names.join(", ")).filter(|n| !n.is_empty()).into_iter().chain(problem).collect();
        format!("{}: {}", self.control.state().word(), parts.join("; "))
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
        let before = self.control.worker_problem();
        if before != problem {
            self.control.set_worker_problem(problem);
            let line = self.status_line();
            notify(&[NotifyState::Status(&line)]);
        }
    }

    /// SIGHUP to a bare `serve`: it may not change rules or open privileged ports, so it takes only what needs neither.
    fn reload_by_signal(&self) {
        self.enter(State::Reloading);
        let result = config::load(&self.path).map_err(|report| report.to_string()).and_then(|loaded| {
            let old = self.plane.config();
            if let Some(change) = needs_root(&old.0, &loaded.config) {
                return Err(format!("{change}; as root: tngctl reload {}", self.instance));
            }
            self.apply(&loaded.config, Vec::new(), None)
        });
        self.finish_reload(result);
    }

    /// One request of [`handoff`].
    async fn take_over(&self, stream: tokio::net::UnixStream) {
        let Ok(mut stream) = stream.into_std() else { return };
        if !handoff::is_trusted(&stream) {
            tracing::warn!(reason = "handoff-refused", "a reload was asked for by neither root nor our own user");
            return;
        }
        let received = tokio::task::spawn_blocking(move || handoff::receive(&mut stream).map(|r| (r, stream))).await;
        let Ok(Ok(((request, passed), stream))) = received else { return };
        let answer = self.answer(&request, passed);
        let _ = handoff::answer(stream, &answer);
    }

    fn answer(&self, request: &Request, passed: Vec<(SocketAddr, TcpListener)>) -> Answer {
        let parsed = config::parse(self.instance.clone(), &request.source, &request.text);
        let config = match parsed {
            Ok(loaded) => loaded.config,
            Err(report) => {
                let error = report.to_string();
                self.control.set_reload_error(Some(error.clone()));
                return Answer { error: Some(error), missing: Vec::new() };
            }
        };
        if !request.apply {
            return match self.missing(&config, request.slots.as_ref()) {
                Ok(missing) => Answer { error: None, missing },
                Err(e) => Answer { error: Some(e), missing: Vec::new() },
            };
        }
        self.enter(State::Reloading);
        let result = self.apply(&config, passed, request.slots.as_ref());
        self.finish_reload(result.clone());
        Answer { error: result.err(), missing: Vec::new() }
    }

    /// Listeners that a configuration needs and nobody here has.
    fn missing(&self, config: &Config, slots: Option<&InstanceSlots>) -> Result<Vec<SocketAddr>, String> {
        self.keeps_control(config)?;
        let have = self.listeners()?;
        let specs = listeners::specs(config, slots).map_err(|e| e.to_string())?;
        Ok(specs.into_iter().map(|s| s.addr).filter(|a| !have.iter().any(|(local, _)| local == a)).collect())
    }

    /// Duplicates of all listeners that are here: served ones, and those on which everything is refused.
    fn listeners(&self) -> Result<Vec<(SocketAddr, TcpListener)>, String> {
        let served = self.plane.listeners().map_err(|e| e.to_string())?.into_iter().map(|l| (l.local, l.listener));
        let refusing = self.refusing.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(served.chain(refusing.duplicates().map_err(|e| e.to_string())?).collect())
    }

    fn apply(
        &self,
        config: &Config,
        passed: Vec<(SocketAddr, TcpListener)>,
        slots: Option<&InstanceSlots>,
    ) -> Result<(), String> {
        let own = Allocations::load(&Paths::current()).ok().and_then(|a| a.get(&config.instance).cloned());
        let specs = listeners::specs(config, slots.or(own.as_ref())).map_err(|e| e.to_string())?;
        self.keeps_control(config)?;
        let mut have = self.listeners()?;
        have.retain(|(addr, _)| specs.iter().any(|s| s.addr == *addr));
        have.extend(passed);
        if matches!(failpoint::at("reload.daemon"), Some(failpoint::Action::Error)) {
            return Err("failpoint reload.daemon".to_owned());
        }
        let bound = listeners::assemble(&specs, have).map_err(|e| e.to_string())?;
        self.plane.reload(config, bound).map_err(|e| e.to_string())?;
        self.refusing.lock().unwrap_or_else(PoisonError::into_inner).end();
        Ok(())
    }

    /// The control API's TCP socket is bound once. An instance that refuses everything never had one to lose.
    fn keeps_control(&self, config: &Config) -> Result<(), String> {
        let refusing = !self.refusing.lock().unwrap_or_else(PoisonError::into_inner).sockets.is_empty();
        if refusing || config.control_listen == self.plane.config().0.control_listen {
            return Ok(());
        }
        Err("control.listen changed, which only a restart takes over".to_owned())
    }

    fn finish_reload(&self, result: Result<(), String>) {
        match &result {
            Ok(()) => tracing::info!("configuration taken over"),
            Err(error) => tracing::error!(reason = "reload-failed", %error, "the old configuration goes on"),
        }
        if result.is_ok() {
            self.control.set_problems(Vec::new());
        }
        self.control.set_reload_error(result.err());
        self.enter(State::Ready);
    }
}

/// What of a change only root can do, in words.
fn needs_root(old: &Config, new: &Config) -> Option<String> {
    use crate::config::Mode;
    let listeners = |c: &Config| -> Vec<(IpAndPorts, String)> {
        let mapping = |e: &config::Endpoint| match &e.mode {
            Mode::Mapping(m) => Some(((m.listen_addr, m.listen_ports), e.name.to_string())),
            Mode::Netfilter(_) => None,
        };
        c.endpoints.iter().filter_map(mapping).collect()
    };
    let captures = |c: &Config| -> Vec<_> {
        let netfilter = |e: &config::Endpoint| match &e.mode {
            Mode::Netfilter(n) => Some((e.name.clone(), e.side, n.clone())),
            Mode::Mapping(_) => None,
        };
        c.endpoints.iter().filter_map(netfilter).collect()
    };
    if captures(old) != captures(new) {
        return Some("captures changed, which only root can apply".to_owned());
    }
    if listeners(old) != listeners(new) {
        return Some("listeners changed, which only root can hand over".to_owned());
    }
    None
}

type IpAndPorts = (std::net::IpAddr, config::PortRange);

/// Failing to reach the service manager must not stop the service.
fn notify(notes: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(notes) {
        tracing::debug!(%error, "sd_notify");
    }
}
