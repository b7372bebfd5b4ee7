//! The trial: one captured SYN for each endpoint and family through the host's real chains, to the real listener, and
//! the place where it was lost.
//!
//! Of an ingress the SYN leaves a raw socket of the doctor's own, as an application's would. Of an egress it comes in by
//! a TUN device of the doctor's own. The handshake is never finished, so the data plane accepts nothing and dials nobody;
//! a table of the doctor's own drops whatever of it would leave by a wire, and shows its way (`nft monitor trace`).

mod choose;
mod cures;
mod fence;
mod judge;
mod packet;
mod send;
mod trace;

use std::net::{IpAddr, SocketAddr};

use super::finding::{Check, Finding};
use super::host::Host;
use super::instance::Instance;
use super::listing::Listing;
use crate::capture::ir::Family;
use crate::capture::plan::capture_table_name;
use crate::config::{self, Config, InstanceName, Side};

pub(super) use send::run;
pub use trace::{Event, Step, Way};

/// A SYN to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The endpoint that captures it.
    pub endpoint: String,
    /// Its side: where the SYN comes from.
    pub side: Side,
    /// Which family.
    pub family: Family,
    /// Where to: the first of these that this host has a route to.
    pub to: Vec<IpAddr>,
    /// The port there.
    pub port: u16,
    /// Owner and group of the sending socket.
    pub owner: (u32, u32),
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// A listener answered.
    Answered,
    /// It was answered with a reset.
    Refused,
    /// No answer came.
    Silent,
    /// It could not be sent, and why.
    NotSent(String),
}

/// A trial that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// Which.
    pub trial: Trial,
    /// Where it went.
    pub to: Option<SocketAddr>,
    /// What became of it.
    pub fate: Fate,
    /// Its way through the chains, in order; `None` when the kernel or nft cannot show it.
    pub steps: Option<Vec<Step>>,
}

/// Of an instance that runs and captures. `table_is_there`: its capture rules are loaded.
pub(super) fn check(
    host: &dyn Host,
    listing: Option<&Listing>,
    instance: &Instance,
    table_is_there: bool,
) -> Vec<Finding> {
    let Some(name) = instance.legal_name().filter(|_| instance.captures()) else { return Vec::new() };
    let check = Check::TrialSyn;
    if !host.is_root() {
        return vec![Finding::needs_root(check).of(&instance.name)];
    }
    let not_tried = |why: &str| vec![Finding::note(check, format!("not tried: {why}")).of(&instance.name)];
    if instance.running.is_none() {
        return not_tried("the instance does not run");
    }
    if !table_is_there {
        return not_tried("its capture table is not there");
    }
    let Some(config) = in_force(host, instance, &name) else { return not_tried("its configuration cannot be read") };
    let (trials, left_out) = choose::choose(&config, &host.local_addresses());
    let unjudged = left_out.into_iter().map(|what| Finding::note(check, format!("not tried: {what}")));
    let mut found: Vec<Finding> = unjudged.collect();
    if !trials.is_empty() {
        match host.trial(&trials) {
            Ok(tried) => found.extend(judge::judge(host, listing, &capture_table_name(&name), &tried)),
            Err(why) => found.push(Finding::note(check, format!("not tried: {why}"))),
        }
    }
    found.into_iter().map(|f| f.of(&instance.name)).collect()
}

/// Root's copy of what is in force, or the file where there is none.
fn in_force(host: &dyn Host, instance: &Instance, name: &InstanceName) -> Option<Config> {
    let copy = host.runtime_dir().join(".net").join(format!("{name}.toml"));
    let loaded = config::load(&copy).ok().map(|loaded| loaded.config);
    loaded.or_else(|| instance.config.as_ref().ok().cloned())
}

/// As findings name a family.
fn name_of(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}
