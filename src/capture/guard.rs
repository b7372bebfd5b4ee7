//! The guard: holds the table that refuses what capture misses, and puts back what a stranger took away.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::allocation::Locked;
use super::apply::{self, ApplyError};
use super::cgroups::{self, Cgroups};
use super::fdstore::{FdStore, Kept};
use super::nft::NftError;
use super::owner::{Fault, Origin, TableOwner};
use super::plan::RulesPlan;
use super::routes::{self, Part};
use super::watch::Watch;
use super::{compile, counted, observe};
use crate::config::InstanceName;
use crate::instance::Paths;

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
    /// Cgroups of the plan that are gone; nobody is captured by them until they are back.
    pub gone: Vec<String>,
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
    cgroups: Cgroups,
    /// The capture table may match cgroups of before.
    capture_stale: bool,
    requests: UnixListener,
    /// The last look found another command at work.
    busy: bool,
    /// When the kernel's counts were last written down.
    counted: Option<Instant>,
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
        for left in [&socket, &paths.guard_rules(&plan.instance), &paths.counted(&plan.instance)] {
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
        let mut cgroups = Cgroups::default();
        let ids = cgroups.ids(&plan);
        let owner = owner_with(paths, &plan, store, inherited)?;
        cgroups.loaded(ids);
        apply::point("guard.loaded")?;
        Ok(Self {
            paths: paths.clone(),
            store,
            owner,
            watch: Watch::new()?,
            cgroups,
            // A cgroup may have changed while no guard was there to see it.
            capture_stale: !cgroups::named(&plan).is_empty(),
            requests,
            busy: false,
            counted: None,
            standing: Standing { endpoints: endpoints(&plan), ..Standing::default() },
            plan,
        })
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
        let mut due = Instant::now() + self.patrol(pulse);
        loop {
            tell(&self.standing);
            self.count();
            let [nftables, routes] = self.watch.fds();
            let mut fds: Vec<PollFd> = [nftables, routes, self.requests.as_fd(), stop]
                .into_iter()
                .chain(self.cgroups.fd())
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let left = due.saturating_duration_since(Instant::now());
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::NONE)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(GuardError::Io(e.into())),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[3] {
                return Ok(());
            }
            if ready[2]
                && let Ok((stream, _)) = self.requests.accept()
            {
                self.answer(stream);
            }
            if ready[0] || ready[1] {
                settle(stop, self.cgroups.fd());
            }
            let only_cgroups = ready.iter().position(|is| *is) == Some(4) && Instant::now() < due;
            self.cgroups.drain();
            // Cgroups come and go beside the plan's; the tables are looked at only when one of these changed.
            if only_cgroups && self.recreated_cgroups().is_empty() {
                continue;
            }
            self.watch.drain();
            apply::point("guard.look")?;
            self.repair();
            due = Instant::now() + self.patrol(pulse);
        }
    }

    /// For the data plane's metrics. A burst of changes needs no count each.
    fn count(&mut self) {
        if self.counted.is_some_and(|at| at.elapsed() < PATROL / 2) {
            return;
        }
        self.counted = Some(Instant::now());
        if let Err(error) = counted::write(&self.paths, &self.plan.instance) {
            tracing::debug!(instance = %self.plan.instance, %error, "the kernel's counts could not be written down");
        }
    }

    fn patrol(&self, pulse: Duration) -> Duration {
        if self.busy { BUSY } else { PATROL }.min(pulse)
    }

    /// Cgroups that are there and that the rules do not match yet. Says once of each that is gone.
    fn recreated_cgroups(&mut self) -> Vec<String> {
        let look = self.cgroups.look(&self.plan);
        for cgroup in look.gone {
            let instance = &self.plan.instance;
            tracing::warn!(reason = "cgroup-gone", %instance, cgroup, "nobody is captured by it until it is back");
        }
        self.standing.gone = self.cgroups.gone();
        look.recreated
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
        let ids = self.cgroups.ids(&plan);
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
        self.cgroups.loaded(ids);
        self.standing.gone = self.cgroups.gone();
        Ok(())
    }

    /// Loads the table anew, as far as the cgroups of the plan are there: the others' traffic must not wait for them.
    fn load_again(&mut self) -> Result<(), GuardError> {
        let ids = self.cgroups.ids(&self.plan);
        let Some(owner) = self.owner.as_mut() else { return Ok(()) };
        owner.load(&compile::guard_table(&cgroups::loadable(&self.plan)))?;
        self.cgroups.loaded(ids);
        self.standing.gone = self.cgroups.gone();
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
        let began = Instant::now();
        let recreated = self.recreated_cgroups();
        self.capture_stale |= !recreated.is_empty();
        let Some(owner) = self.owner.as_mut() else { return Ok(()) };
        match owner.fault()? {
            None if recreated.is_empty() => return Ok(()),
            None => {}
            Some(Fault::NftEnded) => {
                tracing::warn!(reason = "guard-lost-nft", "the guard's nft ended; loading the guard table anew");
            }
            Some(Fault::TableLost) => {
                tracing::warn!(reason = "guard-lost-table", "the guard table is gone; loading it anew");
            }
        }
        self.load_again()?;
        for cgroup in recreated {
            let (instance, ms) = (&self.plan.instance, began.elapsed().as_millis() as u64);
            tracing::warn!(reason = "cgroup-recreated", %instance, cgroup, ms, "the guard table matches the new one");
        }
        Ok(())
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
            self.capture_stale = false; // not up: the next `net up` meets the cgroups of then
            return Ok(());
        };
        if self.capture_stale {
            apply::reapply_plan(&self.paths, &plan)?;
            self.capture_stale = false;
        }
        let drift = observe::drift(&self.paths, &plan.instance, &plan.capture_table())?;
        let missing = routes::missing()?;
        if drift.is_none() && missing.is_empty() {
            return Ok(());
        }
        if !self.recreated_cgroups().is_empty() {
            return Ok(()); // since the last look; its notice waits, and the guard table comes first
        }
        for what in drift.into_iter().chain(missing) {
            tracing::warn!(reason = "rules-removed", instance = %plan.instance, what, "a stranger changed our rules");
        }
        let began = Instant::now();
        routes::ensure(Part::Rule)?;
        routes::ensure(Part::Routes)?;
        apply::reapply_plan(&self.paths, &plan)?;
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
        for file in [self.paths.guard_socket(&self.plan.instance), self.paths.counted(&self.plan.instance)] {
            let _ = std::fs::remove_file(file);
        }
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
    let mut names: Vec<String> = plan.captures.iter().map(|c| c.endpoint_ident().replace('_', "-")).collect();
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Waits for the end of a burst, or for what must not wait.
fn settle(stop: BorrowedFd<'_>, cgroups: Option<BorrowedFd<'_>>) {
    let mut fds: Vec<PollFd> = [stop].into_iter().chain(cgroups).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
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
