//! tng under systemd: what the generator writes, what the units' own steps do, and the configuration that is in force.
//!
//! The units themselves are in `systemd/`. A start goes through this folder in this order: [`generator`] (at boot and at
//! each daemon-reload) turns the files of `/etc/tng` into drop-ins; [`prepare`] is the socket unit's first step and sees
//! to it that systemd knows the listeners of the file as it is now; [`crate::instance::in_force`] is what came of it; [`hooks`] are the
//! steps of a stop.

mod drop_in;
pub mod generator;
pub mod hooks;
mod manager;
mod net;
pub mod prepare;

pub use net::{net_down, net_down_warning, net_up, service_starting, still_up};
pub use prepare::prepare;

use crate::capture::allocation::AllocationError;
use crate::capture::apply::ApplyError;
use crate::capture::guard::GuardError;
use crate::config;
use crate::daemon::listeners::ListenerError;
use crate::daemon::reload::ReloadError;
use crate::instance::in_force::FileError;

/// Why a step of a unit failed.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// The configuration has errors, and there is no last good one.
    #[error("{0}")]
    Config(#[from] config::Report),
    /// Ids and ports, or another instance that is in the way.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The guard refused the rules.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Listeners.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The data plane did not take what it was missing.
    #[error(transparent)]
    Reload(#[from] ReloadError),
    /// A file that root keeps.
    #[error(transparent)]
    File(#[from] FileError),
    /// systemctl failed.
    #[error("systemctl {what}: {said}")]
    Manager {
        /// Its arguments.
        what: String,
        /// What it said.
        said: String,
    },
    /// The generator did not write what the file asks for.
    #[error(
        "{0} does not say what the configuration asks for, although systemd was reloaded; \
         is tng-generator installed? systemd-analyze cat-config systemd/system-generators, journalctl -b -t tng-generator"
    )]
    Stale(String),
}

impl From<AllocationError> for UnitError {
    fn from(e: AllocationError) -> Self {
        UnitError::Apply(e.into())
    }
}

impl UnitError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            UnitError::Config(_) => "config-invalid",
            UnitError::Apply(e) => e.reason(),
            UnitError::Guard(e) => e.reason(),
            UnitError::Listener(e) => e.reason(),
            UnitError::Reload(e) => e.reason(),
            UnitError::File(e) => e.reason(),
            UnitError::Manager { .. } => "systemctl-failed",
            UnitError::Stale(_) => "drop-in-stale",
        }
    }
    /// Exit status: 78 (EX_CONFIG) for a configuration, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            UnitError::Config(_) | UnitError::Apply(ApplyError::Conflict(_)) => 78,
            _ => 1,
        }
    }
}
