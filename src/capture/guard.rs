//! The guard: holds the table that refuses what capture misses, and puts back what a stranger took away.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::allocation::Locked;
use super::apply::{self, ApplyError};
use super::nft::NftError;
use super::owner::TableOwner;
use super::plan::RulesPlan;
use super::render::{self, Present};
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

/// The guard of one instance.
pub struct Guard {
    paths: Paths,
    plan: RulesPlan,
    owner: TableOwner,
    watch: Watch,
    requests: UnixListener,
    /// The last look found another command at work.
    busy: bool,
}

impl Guard {
    /// Loads the guard table and starts to listen for requests and changes.
    pub fn start(paths: &Paths, plan: RulesPlan) -> Result<Self, GuardError> {
        apply::point("guard.start")?;
        let socket = paths.guard_socket(&plan.instance);
        let _ = std::fs::remove_file(&socket);
        let requests = UnixListener::bind(&socket)?;
        Self::start_on(requests, paths, plan).inspect_err(|_| {
            let _ = std::fs::remove_file(&socket);
        })
    }

    fn start_on(requests: UnixListener, paths: &Paths, plan: RulesPlan) -> Result<Self, GuardError> {
        std::fs::set_permissions(paths.guard_socket(&plan.instance), std::fs::Permissions::from_mode(0o600))?;
        requests.set_nonblocking(true)?;
        let owner = owner_with(paths, &plan, &Present::default())?;
        apply::point("guard.loaded")?;
        Ok(Self { paths: paths.clone(), plan, owner, watch: Watch::new()?, requests, busy: false })
    }

    /// The copy of the socket that keeps the table, for systemd's FDSTORE.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.owner.socket()
    }

    /// Serves until `stop` becomes readable.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> Result<(), GuardError> {
        loop {
            let [nftables, routes] = self.watch.fds();
            let mut fds = [nftables, routes, self.requests.as_fd(), stop].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let patrol = if self.busy { BUSY } else { PATROL };
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

    /// Changes the guard table in place.
    fn load(&mut self, plan: RulesPlan) -> Result<(), GuardError> {
        let present = observe::present(&plan.guard_table())?;
        if self.owner.is_alive() {
            apply::check_cgroups(&plan)?;
            self.owner.load(&render::transaction(&compile::guard_table(&plan), &present))?;
        } else {
            // The copy of the dead nft's socket still owns the old table, and nobody else could write the new one.
            self.owner.release();
            self.owner = owner_with(&self.paths, &plan, &Present::default())?;
        }
        self.plan = plan;
        Ok(())
    }

    /// Puts back the guard table, the capture table, the rule and the routes as far as they are not as applied.
    fn repair(&mut self) {
        if !self.owner.is_alive() {
            tracing::warn!(reason = "guard-lost-nft", "the guard's nft ended; loading the guard table anew");
            if let Err(e) = self.load(self.plan.clone()) {
                tracing::error!(reason = e.reason(), error = %e, "the guard table could not be loaded");
            }
        }
        if let Err(e) = self.repair_capture() {
            tracing::error!(reason = e.reason(), error = %e, "rules could not be put back");
        }
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
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.paths.guard_socket(&self.plan.instance));
    }
}

fn owner_with(paths: &Paths, plan: &RulesPlan, present: &Present) -> Result<TableOwner, GuardError> {
    apply::check_cgroups(plan)?;
    let mut owner = TableOwner::start(&plan.guard_table(), &paths.guard_rules(&plan.instance))?;
    owner.load(&render::transaction(&compile::guard_table(plan), present))?;
    Ok(owner)
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
