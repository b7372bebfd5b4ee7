//! The guard: holds the table that refuses what capture misses, and puts back what a stranger took away.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::allocation::Locked;
use super::apply::{self, ApplyError};
use super::fdstore::{FdStore, Kept};
use super::nft::NftError;
use super::owner::{Fault, Origin, TableOwner};
use super::plan::RulesPlan;
use super::routes::{self, Part};
use super::watch::Watch;
use super::{compile, observe};
use crate::config::InstanceName;
use crate::daemon::Paths;

/// Changes usually come in bursts; one look after the burst is enough, and still well within a second.
const SETTLE: Duration = Duration::from_millis(50);
/// A look without a notice, in case one was lost for good.
const PATROL: Duration = Duration::from_secs(5);
/// How soon to look again when another command was at work.
const BUSY: Duration = Duration::from_millis(100);
/// The longest one request on the guard's socket may take to come.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// Why there is no guard, or not the asked one.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// nft.
    #[error("guard: {0}")]
    Nft(#[from] NftError),
    /// Rules.
    #[error("guard: {0}")]
    Apply(#[from] ApplyError),
    /// Sockets.
    #[error("guard: {0}")]
    Io(#[from] io::Error),
    /// The guard process said no.
    #[error("the guard refused the new rules: {0}")]
    Refused(String),
}

impl GuardError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            GuardError::Nft(e) => e.reason(),
            GuardError::Apply(e) => e.reason(),
            GuardError::Io(_) => "guard-unusable",
            GuardError::Refused(_) => "guard-refused",
        }
    }
}

/// What the guard would say of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Captured endpoints; none: there is nothing to guard yet.
    pub endpoints: Vec<String>,
    /// How often a stranger's change was undone.
    pub restored: u32,
    /// When the last time.
    pub last_restored: Option<SystemTime>,
    /// What is not as it should be, and could not be put right.
    pub problem: Option<String>,
}

/// The guard of one instance. Without captures it is idle, until a reload brings some.
pub struct Guard {
    paths: Paths,
    plan: RulesPlan,
    store: FdStore,
    /// `None` while there is nothing to guard.
    owner: Option<TableOwner>,
    watch: Watch,
    requests: UnixListener,
    /// The last look found another command at work.
    busy: bool,
    standing: Standing,
}

impl Guard {
    /// Holds the guard table, and starts to listen for requests and changes. `inherited`: what a guard before this
    /// one left with the service manager; a table that is among it and is as it would be loaded now stays untouched.
    pub fn start(paths: &Paths, plan: RulesPlan, store: FdStore, inherited: Vec<Kept>) -> Result<Self, GuardError> {
        apply::point("guard.start")?;
        paths.make_private_dir()?;
        let socket = paths.guard_socket(&plan.instance);
        // Of a guard that was killed.
        for left in [&socket, &paths.guard_rules(&plan.instance)] {
            let _ = std::fs::remove_file(left);
        }
        let requests = UnixListener::bind(&socket)?;
        Self::start_on(requests, paths, plan, store, inherited).inspect_err(|_| {
            let _ = std::fs::remove_file(&socket);
        })
    }

    fn start_on(
        requests: UnixListener,
        paths: &Paths,
        plan: RulesPlan,
        store: FdStore,
        inherited: Vec<Kept>,
    ) -> Result<Self, GuardError> {
        std::fs::set_permissions(paths.guard_socket(&plan.instance), std::fs::Permissions::from_mode(0o600))?;
        requests.set_nonblocking(true)?;
        let owner = owner_with(paths, &plan, store, inherited)?;
        apply::point("guard.loaded")?;
        let standing = Standing { endpoints: endpoints(&plan), ..Standing::default() };
        Ok(Self { paths: paths.clone(), plan, store, owner, watch: Watch::new()?, requests, busy: false, standing })
    }

    /// What it would say of itself.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Serves until `stop` becomes readable. Calls `tell` after each look, and at least every `pulse`.
    pub fn run(
        &mut self,
        stop: BorrowedFd<'_>,
        pulse: Duration,
        mut tell: impl FnMut(&Standing),
    ) -> Result<(), GuardError> {
        loop {
            tell(&self.standing);
            let [nftables, routes] = self.watch.fds();
            let mut fds = [nftables, routes, self.requests.as_fd(), stop].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let patrol = if self.busy { BUSY } else { PATROL }.min(pulse);
            match poll(&mut fds, PollTimeout::try_from(patrol).unwrap_or(PollTimeout::NONE)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(GuardError::Io(e.into())),
            }
            let ready = fds.map(|fd| fd.any().unwrap_or(false));
            if ready[3] {
                return Ok(());
            }
            if ready[2]
                && let Ok((stream, _)) = self.requests.accept()
            {
                self.answer(stream);
            }
            if ready[0] || ready[1] {
                settle(stop);
            }
            self.watch.drain();
            apply::point("guard.look")?;
            self.repair();
        }
    }

    /// One request: a plan as one line of JSON; one line of answer, `ok` or the error.
    fn answer(&mut self, stream: UnixStream) {
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(REQUEST_DEADLINE));
        let _ = stream.set_write_timeout(Some(REQUEST_DEADLINE));
        let mut line = String::new();
        let result = match BufReader::new(&stream).read_line(&mut line) {
            Ok(_) => serde_json::from_str::<RulesPlan>(&line)
                .map_err(|e| GuardError::Refused(e.to_string()))
                .and_then(|plan| self.load(plan)),
            Err(e) => Err(e.into()),
        };
        let answer = match result {
            Ok(()) => "ok".to_owned(),
            Err(e) => e.to_string().replace('\n', " "),
        };
        let _ = writeln!(&stream, "{answer}");
    }

    /// Brings the guard table to what `plan` says: new, changed, or gone when nothing is captured.
    fn load(&mut self, plan: RulesPlan) -> Result<(), GuardError> {
        if plan.is_empty() {
            if let Some(owner) = self.owner.take() {
                owner.remove()?;
            }
        } else if let Some(owner) = self.owner.as_mut() {
            apply::check_cgroups(&plan)?;
            owner.load(&compile::guard_table(&plan))?;
        } else {
            self.owner = owner_with(&self.paths, &plan, self.store, Vec::new())?;
        }
        self.standing.endpoints = endpoints(&plan);
        self.plan = plan;
        Ok(())
    }

    /// Puts back the guard table, the capture table, the rule and the routes as far as they are not as applied.
    fn repair(&mut self) {
        let guard = self.repair_guard();
        if let Err(e) = &guard {
            tracing::error!(reason = e.reason(), error = %e, "the guard table could not be loaded");
        }
        let capture = self.repair_capture();
        if let Err(e) = &capture {
            tracing::error!(reason = e.reason(), error = %e, "rules could not be put back");
        }
        self.standing.problem = guard.err().map(|e| e.to_string()).or(capture.err().map(|e| e.to_string()));
    }

    fn repair_guard(&mut self) -> Result<(), GuardError> {
        let Some(owner) = self.owner.as_mut() else { return Ok(()) };
        match owner.fault()? {
            None => return Ok(()),
            Some(Fault::NftEnded) => {
                tracing::warn!(reason = "guard-lost-nft", "the guard's nft ended; loading the guard table anew");
            }
            Some(Fault::TableLost) => {
                tracing::warn!(reason = "guard-lost-table", "the guard table is gone; loading it anew");
            }
        }
        self.load(self.plan.clone())
    }

    fn repair_capture(&mut self) -> Result<(), ApplyError> {
        // A `net up`, `net down` or reload that is under way is not a stranger. Never waits for the lock: a reload
        // holds it while it waits for our answer.
        let lock = Locked::try_acquire(&self.paths)?;
        self.busy = lock.is_none();
        if self.busy {
            return Ok(());
        }
        let Some(plan) = apply::recorded_plan(&self.paths, &self.plan.instance) else {
            return Ok(()); // not up
        };
        let drift = observe::drift(&self.paths, &plan.instance, &plan.capture_table())?;
        let missing = routes::missing()?;
        if drift.is_none() && missing.is_empty() {
            return Ok(());
        }
        for what in drift.into_iter().chain(missing) {
            tracing::warn!(reason = "rules-removed", instance = %plan.instance, what, "a stranger changed our rules");
        }
        let began = Instant::now();
        routes::ensure(Part::Rule)?;
        routes::ensure(Part::Routes)?;
        apply::apply_plan(&self.paths, &plan)?;
        tracing::warn!(
            reason = "rules-restored",
            instance = %plan.instance,
            ms = began.elapsed().as_millis() as u64,
            "capture table, rule and routes are back"
        );
        self.standing.restored = self.standing.restored.saturating_add(1);
        self.standing.last_restored = Some(SystemTime::now());
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.paths.guard_socket(&self.plan.instance));
    }
}

fn owner_with(
    paths: &Paths,
    plan: &RulesPlan,
    store: FdStore,
    inherited: Vec<Kept>,
) -> Result<Option<TableOwner>, GuardError> {
    if plan.is_empty() {
        inherited.into_iter().for_each(|kept| store.forget(kept));
        return Ok(None);
    }
    apply::check_cgroups(plan)?;
    let file = paths.guard_rules(&plan.instance);
    let (owner, origin) = TableOwner::hold(&compile::guard_table(plan), &file, store, inherited)?;
    if origin == Origin::Adopted {
        tracing::info!(instance = %plan.instance, "the guard table of before is as it should be, and stays");
    }
    Ok(Some(owner))
}

fn endpoints(plan: &RulesPlan) -> Vec<String> {
    plan.captures.iter().map(|c| c.ident.replace('_', "-")).collect()
}

/// Waits for the end of a burst, or for `stop`.
fn settle(stop: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(stop, PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::try_from(SETTLE).unwrap_or(PollTimeout::ZERO));
}

/// Asks the running guard of an instance to change to `plan`. `Ok(false)`: no guard is running.
pub fn request_load(paths: &Paths, plan: &RulesPlan) -> Result<bool, GuardError> {
    let stream = match UnixStream::connect(paths.guard_socket(&plan.instance)) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let line = serde_json::to_string(plan).expect("plain data serialises");
    writeln!(&stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer)?;
    match answer.trim() {
        "ok" => Ok(true),
        other => Err(GuardError::Refused(other.to_owned())),
    }
}

/// Whether a guard process answers for the instance.
pub fn is_running(paths: &Paths, instance: &InstanceName) -> bool {
    UnixStream::connect(paths.guard_socket(instance)).is_ok()
}
