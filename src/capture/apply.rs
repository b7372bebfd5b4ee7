//! `net up` and `net down`: the rule, the routes and the capture table of one instance, in that order in and in the
//! reverse order out. Every step can be repeated; what a killed command left is taken up by the next one.

use std::io;
use std::path::Path;

use super::allocation::{AllocationError, Allocations, InstanceSlots, Locked, port_is_free};
use super::nft::{self, NftError};
use super::plan::{RulesPlan, capture_table_name};
use super::render;
use super::routes::{self, Part, RouteError};
use super::{cgroups, compile, observe, sockets};
use crate::config::{self, Config, InstanceName, OnStop, Severity};
use crate::instance::{Paths, in_force};
use crate::os::failpoint;
use crate::os::files::write_atomically;

/// Why rules could not be applied or removed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Ids or ports.
    #[error(transparent)]
    Allocation(#[from] AllocationError),
    /// nftables.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// Policy routing.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// A file under the run-time directory.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What went wrong.
        source: io::Error,
    },
    /// Another instance that is up has the same listener or captures the same traffic.
    #[error("{0}")]
    Conflict(config::Report),
    /// Not root.
    #[error("rules need CAP_NET_ADMIN; run this as root")]
    Privilege,
    /// A cgroup that an entry names is not there.
    #[error(
        "cgroup \"{0}\" does not exist (or cgroup v2 is not mounted at /sys/fs/cgroup); start the slice first: \
         systemctl start {unit}",
        unit = .0.rsplit('/').next().unwrap_or_default()
    )]
    CgroupMissing(String),
    /// A test asked for it.
    #[error("failpoint {0}")]
    Failpoint(&'static str),
}

impl ApplyError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            ApplyError::Allocation(e) => e.reason(),
            ApplyError::Nft(e) => e.reason(),
            ApplyError::Route(e) => e.reason(),
            ApplyError::File { .. } => "state-unusable",
            ApplyError::Conflict(_) => "config-conflict",
            ApplyError::Privilege => "not-permitted",
            ApplyError::CgroupMissing(_) => "cgroup-missing",
            ApplyError::Failpoint(_) => "failpoint",
        }
    }
}

/// Stops here when a test asked for it.
pub(crate) fn point(name: &'static str) -> Result<(), ApplyError> {
    match failpoint::at(name) {
        Some(failpoint::Action::Error) => Err(ApplyError::Failpoint(name)),
        Some(failpoint::Action::Stall) => loop {
            std::thread::park();
        },
        _ => Ok(()),
    }
}

/// Refuses what an instance that is up already has: which of the two got the traffic would be a matter of luck.
pub(crate) fn check_beside(paths: &Paths, allocations: &Allocations, config: &Config) -> Result<(), ApplyError> {
    let mut diagnostics = Vec::new();
    for source in allocations.sources_beside(&config.instance) {
        // What is in force counts, not what its file says by now. Where nobody recorded that (`tngd run`), the file is
        // the next best; one that is gone or broken cannot be compared.
        let in_force = in_force::current(paths, source).map(|current| current.config);
        if let Some(other) = in_force.or_else(|| Some(config::load(source).ok()?.config)) {
            diagnostics.extend(config::conflicts_between(config, &other));
        }
    }
    diagnostics.retain(|d| d.severity == Severity::Error);
    if diagnostics.is_empty() { Ok(()) } else { Err(ApplyError::Conflict(config::Report { diagnostics })) }
}

/// Records ids and ports of `config`, before its rules are applied.
pub fn allocate(paths: &Paths, config: &Config, owner_uid: u32) -> Result<InstanceSlots, ApplyError> {
    record_slots(paths, config, owner_uid, true)
}

/// The same for a guard, which refuses: what another instance captures as well is no reason to let it through.
pub fn allocate_for_guard(paths: &Paths, config: &Config, owner_uid: u32) -> Result<InstanceSlots, ApplyError> {
    record_slots(paths, config, owner_uid, false)
}

fn record_slots(paths: &Paths, config: &Config, owner_uid: u32, alone: bool) -> Result<InstanceSlots, ApplyError> {
    // Before anything is recorded: without nft, what is recorded could not be taken back by what nft says.
    nft::inet_tables()?;
    let lock = Locked::acquire(paths)?;
    let mut allocations = lock.load()?;
    if let Some(slots) =
        allocations.get(&config.instance).filter(|_| !alone && in_force::is_up(paths, &config.instance))
    {
        // They are what the rules that are up were made of.
        return Ok(slots.clone());
    }
    if alone {
        check_beside(paths, &allocations, config)?;
        // With a socket unit that is up the listeners are ours, and so the ports are not free.
        if !in_force::is_up(paths, &config.instance) {
            allocations.give_up_taken_ports(&config.instance, port_is_free);
        }
    }
    let slots = allocations.assign_in_order(config, owner_uid, port_is_free)?;
    lock.store(&allocations)?;
    Ok(slots)
}

/// Whether the capture table of `instance` is in the kernel. It refuses by itself, with no listener behind it.
pub fn is_up(instance: &InstanceName) -> Result<bool, ApplyError> {
    Ok(observe::table_exists(&capture_table_name(instance))?)
}

/// Puts back rules that a start found and replaced before it failed, with the ids and ports that they were made of.
pub fn restore(paths: &Paths, plan: &RulesPlan, slots: &InstanceSlots) -> Result<(), ApplyError> {
    let lock = Locked::acquire(paths)?;
    let mut allocations = lock.load()?;
    allocations.put(&plan.instance, slots.clone());
    lock.store(&allocations)?;
    reapply_plan(paths, plan)
}

/// Forgets the ids of an instance whose rules are not there and whose sockets no socket unit has open.
pub fn release_if_down(paths: &Paths, instance: &InstanceName) -> Result<(), ApplyError> {
    release(paths, instance, || paths.remove_instance(instance))
}

/// The same without touching the sockets in the instance's directory, which may be a service manager's.
pub fn release_ids_if_down(paths: &Paths, instance: &InstanceName) -> Result<(), ApplyError> {
    release(paths, instance, || paths.forget_rules(instance))
}

fn release(paths: &Paths, instance: &InstanceName, also: impl FnOnce()) -> Result<(), ApplyError> {
    let lock = Locked::acquire(paths)?;
    if !in_force::is_up(paths, instance) && !observe::table_exists(&capture_table_name(instance))? {
        let mut allocations = lock.load()?;
        allocations.release(instance);
        lock.store(&allocations)?;
        also();
    }
    Ok(())
}

/// Brings rule, routes and capture table of `config` into the kernel. Returns its ids and ports.
///
/// On failure the path is as it was before: a fresh instance leaves nothing, one that is up keeps its rules. With
/// `on_stop = "closed"` a table that was made stays, and refuses.
pub fn up(paths: &Paths, config: &Config, owner_uid: u32) -> Result<InstanceSlots, ApplyError> {
    up_covering(paths, config, owner_uid, None)
}

/// The same with rules that cover besides what `left` captures, for a start over the rules of an earlier life.
pub(crate) fn up_covering(
    paths: &Paths,
    config: &Config,
    owner_uid: u32,
    left: Option<&RulesPlan>,
) -> Result<InstanceSlots, ApplyError> {
    let lock = Locked::acquire(paths)?;
    let before = lock.load()?;
    check_beside(paths, &before, config)?;
    let mut after = before.clone();
    let slots = after.assign_in_order(config, owner_uid, port_is_free)?;
    let wanted = RulesPlan::new(config, &slots);
    let plan = left.map_or_else(|| wanted.clone(), |left| wanted.covering(left));
    let was_up = observe::table_exists(&plan.capture_table())?;
    let old = recorded_plan(paths, &config.instance).filter(|_| was_up);
    // Recorded first: if this command is killed half way, the next one finds the same ids.
    lock.store(&after)?;
    paths
        .make_instance_dir(&config.instance, owner_uid)
        .map_err(|source| ApplyError::File { path: paths.root().display().to_string(), source })?;
    match apply_plan(paths, &plan) {
        Ok(()) => Ok(slots),
        Err(e) => {
            if !was_up && config.on_stop == OnStop::Closed && is_up(&config.instance).unwrap_or(true) {
                return Err(e);
            }
            let _ = lock.store(&before);
            // A transaction that failed changed nothing. A step after it may have: the rules of before may capture more.
            if let Some(Err(error)) = old.map(|old| reapply_plan(paths, &old)) {
                tracing::error!(reason = error.reason(), %error, "the rules of before could not be put back");
            }
            if !was_up {
                let _ = remove_rules(paths, &config.instance);
                if before.get(&config.instance).is_none() {
                    paths.remove_instance(&config.instance);
                }
            }
            Err(e)
        }
    }
}

/// Applies a plan whose slots are recorded already.
pub(crate) fn apply_plan(paths: &Paths, plan: &RulesPlan) -> Result<(), ApplyError> {
    check_cgroups(plan)?;
    load_plan(paths, plan, plan)
}

/// Applies a plan that was up before anew, as far as its cgroups are there; the whole plan stays the recorded one.
pub(crate) fn reapply_plan(paths: &Paths, plan: &RulesPlan) -> Result<(), ApplyError> {
    load_plan(paths, &cgroups::loadable(plan), plan)
}

fn load_plan(paths: &Paths, loaded: &RulesPlan, plan: &RulesPlan) -> Result<(), ApplyError> {
    let table = plan.capture_table();
    if plan.is_empty() {
        return remove_rules(paths, &plan.instance);
    }
    point("net-up.rule")?;
    routes::ensure(Part::Rule)?;
    point("net-up.route")?;
    routes::ensure(Part::Routes)?;
    point("net-up.nft")?;
    let present = observe::present(&table)?;
    let recorded = recorded_plan(paths, &plan.instance);
    if recorded.as_ref().is_none_or(|recorded| plan.covers(recorded)) {
        // Killed behind the transaction, the rules refuse: the next start must know what, to keep it closed if it fails.
        record_plan(paths, plan)?;
    }
    nft::apply(&render::transaction(&compile::capture_table(loaded), &present))?;
    point("net-up.applied")?;
    record_plan(paths, plan)?;
    point("net-up.record")?;
    record_listing(paths, plan)?;
    point("net-up.done")
}

/// Table, routes and their records go: what [`apply_plan`] brought in. Ids and listeners stay.
pub(crate) fn remove_rules(paths: &Paths, instance: &InstanceName) -> Result<(), ApplyError> {
    // The record first, or the guard would take the removal for a stranger's.
    paths.forget_rules(instance);
    nft::apply(&render::removal(&capture_table_name(instance)))?;
    remove_routes_if_last()
}

/// What nft lists right after is what drift is measured against.
fn record_listing(paths: &Paths, plan: &RulesPlan) -> Result<(), ApplyError> {
    let listing = nft::list_stateless(&plan.capture_table())?;
    write_record(&paths.applied(&plan.instance), listing.as_bytes())
}

/// The plan is what a repair applies again, and what the next start or reload keeps closed till it serves.
fn record_plan(paths: &Paths, plan: &RulesPlan) -> Result<(), ApplyError> {
    write_record(&paths.plan(&plan.instance), &serde_json::to_vec(plan).expect("plain data serialises"))
}

fn write_record(path: &Path, bytes: &[u8]) -> Result<(), ApplyError> {
    write_atomically(path, bytes).map_err(|source| ApplyError::File { path: path.display().to_string(), source })
}

/// The plan that [`up`] applied last, if it is up; or one that covers it and was to be applied.
pub(crate) fn recorded_plan(paths: &Paths, instance: &InstanceName) -> Option<RulesPlan> {
    serde_json::from_slice(&std::fs::read(paths.plan(instance)).ok()?).ok()
}

/// Removes what [`up`] made, whoever made it and however far it got. The guard is not its business.
pub fn down(paths: &Paths, instance: &InstanceName) -> Result<(), ApplyError> {
    let lock = Locked::acquire(paths)?;
    point("net-down.sockets")?;
    if let Some(plan) = recorded_plan(paths, instance) {
        match sockets::end_captured(&plan) {
            Ok(0) => {}
            Ok(ended) => tracing::info!(%instance, ended, "captured connections reset before their rules go"),
            Err(error) => tracing::warn!(
                reason = "sockets-not-ended",
                %instance,
                %error,
                "an application that still holds a captured connection may send on it in plaintext"
            ),
        }
    }
    point("net-down.nft")?;
    nft::apply(&render::removal(&capture_table_name(instance)))?;
    point("net-down.route")?;
    remove_routes_if_last()?;
    point("net-down.record")?;
    let mut allocations = lock.load()?;
    allocations.release(instance);
    lock.store(&allocations)?;
    paths.remove_instance(instance);
    Ok(())
}

/// The kernel's own list says who else needs the routes, not our files.
fn remove_routes_if_last() -> Result<(), ApplyError> {
    if nft::inet_tables()?.iter().any(|t| t.starts_with("tng_")) {
        return Ok(());
    }
    Ok(routes::remove()?)
}

/// nft names a missing cgroup badly ("cgroupv2 path fails"), so it is looked for here.
pub(crate) fn check_cgroups(plan: &RulesPlan) -> Result<(), ApplyError> {
    match cgroups::named(plan).into_iter().find(|path| cgroups::id(path).is_none()) {
        Some(missing) => Err(ApplyError::CgroupMissing(missing.to_owned())),
        None => Ok(()),
    }
}

/// The ruleset that is or would be applied, capture table and guard, as `tngctl rules` prints it.
///
/// Without recorded slots the ids and ports are the ones a start would take now.
pub fn preview(paths: &Paths, config: &Config, owner_uid: u32) -> Result<String, ApplyError> {
    let mut allocations = Allocations::load(paths)?;
    let owner_uid = allocations.get(&config.instance).map_or(owner_uid, |slots| slots.owner_uid);
    let slots = allocations.assign_in_order(config, owner_uid, port_is_free_or_ours(&allocations.clone(), config))?;
    let plan = RulesPlan::new(config, &slots);
    if plan.is_empty() {
        return Ok(String::new());
    }
    Ok(format!("{}{}", render::table(&compile::capture_table(&plan)), render::table(&compile::guard_table(&plan))))
}

fn port_is_free_or_ours(allocations: &Allocations, config: &Config) -> impl Fn(u16) -> bool {
    let ours: Vec<u16> =
        allocations.get(&config.instance).map_or_else(Vec::new, |s| s.endpoints.values().map(|s| s.port).collect());
    move |port| ours.contains(&port) || port_is_free(port)
}
