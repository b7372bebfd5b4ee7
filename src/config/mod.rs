//! Configuration in three stages, each its own type: the file as written (`raw`), what it means
//! once every field was checked ([`Config`]), and what will be done (rules, listeners, workers).
//!
//! [`load`] reads a file; on a mistake the [`Report`] holds every [`Diagnostic`] at once.

mod access;
mod builtin;
mod check;
mod check_anchors;
mod check_attest;
mod check_builtin;
mod check_effect;
mod check_host;
mod check_netfilter;
mod check_passport;
mod check_ra;
mod check_service;
mod conflicts;
mod diagnostics;
mod files;
mod foreign;
mod load;
mod overlap;
mod raw;
mod reader;
mod rego;
mod report;
mod service;
mod validated;
mod values;

#[cfg(test)]
mod tests;

pub use access::{guard_can_read, readable};
pub(crate) use builtin::from_hex;
pub use builtin::{Builtin, Kind, Reference, Seen, TCB_STATUSES, VOCABULARY, Wanted};
pub use conflicts::{conflicts_between, with_paths};
pub use diagnostics::{Diagnostic, Report, Severity};
pub use load::{
    CONFIG_DIR, CONFIG_DIR_ENV, Loaded, MAX_FILE, config_dir, instance_of, instance_path, list_instances, load, parse,
    unit_path,
};
pub use rego::RegoFile;
pub use report::{EX_CONFIG, Output, check_command, render_check, render_diagnostics, summary};
pub use service::{AsKind, AsService, JwksSource, KeyPin, TrustedSigners};
pub use validated::*;
