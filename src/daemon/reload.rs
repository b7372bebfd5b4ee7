//! `tngctl reload`, and SIGHUP to `tngd run`: one configuration replaces another, in all places or in none.
//!
//! The order keeps the path closed: the data plane says whether it could, new listeners are bound, guard and rules cover
//! what either configuration captures, the data plane changes, and only then is let go what is captured no more. Each
//! failure undoes what came before it, and a kill anywhere leaves nothing open that was captured.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::handoff::{self, Answer, Request};
use super::listeners::{self, ListenerError};
use crate::capture::allocation::{AllocationError, Allocations, InstanceSlots, Locked, port_is_free};
use crate::capture::apply::{self, ApplyError};
use crate::capture::cgroups;
use crate::capture::guard::{self, GuardError};
use crate::capture::plan::RulesPlan;
use crate::config::{self, Config, InstanceName};
use crate::instance::{Paths, in_force};
use crate::os::privileges::find_user;
use crate::units::prepare;

/// Why the old configuration goes on.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The new file has errors.
    #[error("{0}")]
    Config(#[from] config::Report),
    /// The file was readable a moment ago, and is not now.
    #[error("{path}: {1}", path = .0.display())]
    File(PathBuf, io::Error),
    /// The data plane's user is not there.
    #[error("{0}")]
    User(String),
    /// There is nothing to reload.
    #[error("instance {0} is not running; start it: tngd run {0}, or systemctl start tng@{0}")]
    NotRunning(String),
    /// The data plane cannot be reached.
    #[error("the data plane cannot be reached: {0}")]
    Handoff(io::Error),
    /// The data plane refused.
    #[error("the data plane refused the new configuration: {0}")]
    Refused(String),
    /// Listeners.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// Ids and ports.
    #[error(transparent)]
    Allocation(#[from] AllocationError),
    /// Rules.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Guard.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The data plane has the new configuration, and the rules still cover what the old one captured.
    #[error(
        "the new configuration is in force, but what it captures no more is still refused; try again: tngctl reload \
         {instance}: {failure}"
    )]
    StillCovered {
        /// Which instance.
        instance: InstanceName,
        /// What failed.
        failure: Box<ReloadError>,
    },
}

impl ReloadError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            ReloadError::Config(_) | ReloadError::File(..) => "config-invalid",
            ReloadError::User(_) => "no-such-user",
            ReloadError::NotRunning(_) => "not-running",
            ReloadError::Handoff(_) => "daemon-unreachable",
            ReloadError::Refused(_) => "reload-refused",
            ReloadError::Listener(e) => e.reason(),
            ReloadError::Allocation(e) => e.reason(),
            ReloadError::Apply(e) => e.reason(),
            ReloadError::Guard(e) => e.reason(),
            ReloadError::StillCovered { failure, .. } => failure.reason(),
        }
    }
    /// Exit status: 78 (EX_CONFIG), 3 when not running, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            ReloadError::Config(_) | ReloadError::File(..) | ReloadError::Apply(ApplyError::Conflict(_)) => 78,
            ReloadError::NotRunning(_) => 3,
            _ => 1,
        }
    }
}

/// What a reload did.
#[derive(Debug, Default)]
pub struct Reloaded {
    /// What the operator should know: warnings of the file, a guard that does not run.
    pub warnings: Vec<String>,
}

/// Replaces the configuration of a running instance by what `path` says now.
pub fn reload(paths: &Paths, path: &Path) -> Result<Reloaded, ReloadError> {
    config::load(path).inspect_err(|_| tell(paths, path))?;
    let text = std::fs::read_to_string(path).map_err(|e| ReloadError::File(path.to_owned(), e))?;
    // Of the very text that the data plane will get: the file may be written again in the meantime.
    let loaded = config::parse(config::instance_of(path)?, path, &text)?;
    let config = loaded.config;
    let mut done = Reloaded { warnings: loaded.warnings.iter().map(ToString::to_string).collect() };
    let lock = Locked::acquire(paths)?;
    let before = lock.load()?;
    apply::check_beside(paths, &before, &config)?;
    let old = before.get(&config.instance).cloned();
    let mut after = before.clone();
    // Without slots the instance captured nothing until now. Its socket belongs to the data plane's user, or to root
    // when the socket unit made it.
    let owner_uid = match &old {
        Some(slots) => slots.owner_uid,
        None if in_force::is_up(paths, &config.instance) => {
            find_user(in_force::USER).map(|(uid, _)| uid.as_raw()).map_err(|e| ReloadError::User(e.to_string()))?
        }
        None => std::fs::metadata(paths.handoff_socket(&config.instance))
            .map_err(|_| ReloadError::NotRunning(config.instance.to_string()))?
            .uid(),
    };
    let slots = after.assign(&config, owner_uid, port_is_free)?;
    let mut request = Request { apply: false, source: path.to_owned(), text, slots: Some(slots.clone()) };
    let answer = call(paths, &config, &request, &[])?;
    let fresh = bind_missing(&config, &slots, &answer.missing)?;
    let old_plan = apply::recorded_plan(paths, &config.instance);
    let plan = RulesPlan::new(&config, &slots);
    // While the data plane may still refuse, hang or be killed, nothing that it captures now may be open. A cgroup of the
    // old configuration that is gone has nobody in it, and is no reason to keep that configuration.
    let between = old_plan.as_ref().map_or_else(|| plan.clone(), |old| plan.covering(&cgroups::loadable(old)));
    let undo = Undo { paths, instance: &config.instance, lock: &lock, before: &before, plan: old_plan.as_ref() };
    lock.store(&after)?;
    request.apply = true;
    if !between.is_empty() {
        undo.on_error(widen(paths, &between, &mut done))?;
    }
    undo.on_error(call(paths, &config, &request, &fresh).map(drop))?;
    keep(paths, &config.instance, &request.text, &mut done);
    // Without captures also what a killed command may have left unrecorded.
    if between != plan || plan.is_empty() {
        let instance = || config.instance.clone();
        narrow(paths, &plan).map_err(|e| ReloadError::StillCovered { instance: instance(), failure: Box::new(e) })?;
    }
    Ok(done)
}

/// The data plane shows in its status that a file was refused. Failing to tell it changes nothing.
fn tell(paths: &Paths, path: &Path) {
    let (Ok(instance), Ok(text)) = (config::instance_of(path), std::fs::read_to_string(path)) else { return };
    let request = Request { apply: false, source: path.to_owned(), text, slots: None };
    let _ = handoff::call(&paths.handoff_socket(&instance), &request, &[]);
}

/// Listeners that the file asks for, and that the data plane does not have: it may not open them.
pub fn missing(paths: &Paths, path: &Path) -> Result<Vec<SocketAddr>, ReloadError> {
    let text = std::fs::read_to_string(path).map_err(|e| ReloadError::File(path.to_owned(), e))?;
    let config = config::parse(config::instance_of(path)?, path, &text)?.config;
    let slots = Allocations::load(paths)?.get(&config.instance).cloned();
    let request = Request { apply: false, source: path.to_owned(), text, slots };
    let mut missing = call(paths, &config, &request, &[])?.missing;
    // A host without IPv6 never has those of a capture.
    missing.retain(|addr| addr.is_ipv4() || listeners::has_ipv6());
    Ok(missing)
}

/// The next start of the socket unit, and a boot with a broken file, go by what is in force now.
fn keep(paths: &Paths, instance: &InstanceName, text: &str, done: &mut Reloaded) {
    if !in_force::is_up(paths, instance) {
        return; // `tngd run`
    }
    let forget = || prepare::forget_problem(instance).map_err(|e| e.to_string());
    let kept = in_force::record(paths, instance, text).map_err(|e| e.to_string()).and_then(|()| forget());
    in_force::keep_as_last_good(instance, text);
    if let Err(e) = kept {
        done.warnings.push(format!("the configuration is in force, but could not be kept: {e}"));
    }
}

/// Guard first: what is captured newly is refused for a moment rather than let through.
fn widen(paths: &Paths, between: &RulesPlan, done: &mut Reloaded) -> Result<(), ReloadError> {
    apply::point("reload.guard")?;
    if !guard::request_load(paths, between)? {
        done.warnings.push("no guard is running for this instance".to_owned());
    }
    apply::point("reload.rules")?;
    apply::apply_plan(paths, between)?;
    Ok(())
}

/// Lets go what is captured no more. The guard is last, as it is what still refuses till here.
pub(super) fn narrow(paths: &Paths, plan: &RulesPlan) -> Result<(), ReloadError> {
    apply::point("reload.narrow")?;
    apply::reapply_plan(paths, plan)?;
    apply::point("reload.narrowed")?;
    guard::request_load(paths, plan)?;
    Ok(())
}

/// The state before, to go back to.
struct Undo<'a> {
    paths: &'a Paths,
    instance: &'a InstanceName,
    lock: &'a Locked,
    before: &'a crate::capture::allocation::Allocations,
    /// `None`: no rules were up.
    plan: Option<&'a RulesPlan>,
}

impl Undo<'_> {
    fn on_error<T>(&self, result: Result<T, ReloadError>) -> Result<T, ReloadError> {
        if let Err(e) = &result {
            tracing::error!(reason = e.reason(), error = %e, "reload failed, going back");
            if let Err(e) = self.lock.store(self.before) {
                tracing::error!(reason = e.reason(), error = %e, "going back: ids");
            }
            if let Some(plan) = self.plan {
                if let Err(e) = guard::request_load(self.paths, plan) {
                    tracing::error!(reason = e.reason(), error = %e, "going back: guard");
                }
                // As far as its cgroups are there: one that is gone meanwhile must not leave the rules that failed.
                if let Err(e) = apply::reapply_plan(self.paths, plan) {
                    tracing::error!(reason = e.reason(), error = %e, "going back: rules");
                }
            } else {
                if let Err(e) = apply::remove_rules(self.paths, self.instance) {
                    tracing::error!(reason = e.reason(), error = %e, "going back: rules");
                }
                // There was nothing to guard, and an idle guard may have loaded the new table.
                if let Err(e) = guard::request_load(self.paths, &RulesPlan::nothing(self.instance.clone())) {
                    tracing::error!(reason = e.reason(), error = %e, "going back: guard");
                }
            }
        }
        result
    }
}

fn call(paths: &Paths, config: &Config, request: &Request, fresh: &[TcpListener]) -> Result<Answer, ReloadError> {
    let socket = paths.handoff_socket(&config.instance);
    let answer = handoff::call(&socket, request, fresh).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ReloadError::NotRunning(config.instance.to_string())
        }
        _ => ReloadError::Handoff(e),
    })?;
    match answer.error {
        Some(error) => Err(ReloadError::Refused(error)),
        None => Ok(answer),
    }
}

fn bind_missing(
    config: &Config,
    slots: &InstanceSlots,
    missing: &[SocketAddr],
) -> Result<Vec<TcpListener>, ReloadError> {
    let specs = listeners::specs(config, Some(slots))?;
    let mut out = Vec::new();
    for spec in specs.iter().filter(|s| missing.contains(&s.addr)) {
        out.extend(listeners::bind(spec)?.map(|l| l.listener));
    }
    Ok(out)
}
