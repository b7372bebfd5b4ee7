//! The kernel's own counts of an instance. Only CAP_NET_ADMIN may read them, so the guard writes them down for the data
//! plane's metrics.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::observe;
use super::plan::{capture_table_name, guard_table_name};
use crate::config::InstanceName;
use crate::instance::Paths;

/// What is older was left by a guard that was killed, and is shown no more.
const MAX_AGE: Duration = Duration::from_secs(30);

/// Packets by counter: those of the capture table by their names, those of the guard table as `guard_NAME`.
pub type Counts = BTreeMap<String, u64>;

#[derive(Serialize, Deserialize)]
struct Record {
    /// Seconds since 1970.
    at: u64,
    counters: Counts,
}

/// Asks the kernel. What cannot be read is absent.
pub fn look(instance: &InstanceName) -> Counts {
    let mut counters = observe::counters(&capture_table_name(instance)).unwrap_or_default();
    let guarded = observe::counters(&guard_table_name(instance)).unwrap_or_default();
    counters.extend(guarded.into_iter().map(|(name, packets)| (format!("guard_{name}"), packets)));
    counters
}

/// Writes down what the kernel counts now.
pub(super) fn write(paths: &Paths, instance: &InstanceName) -> io::Result<()> {
    let file = paths.counted(instance);
    let record = Record { at: seconds(SystemTime::now()), counters: look(instance) };
    // The data plane must not meet half a file.
    let next = file.with_extension("next");
    std::fs::write(&next, serde_json::to_vec(&record)?)?;
    // The data plane is another user, and the caller's umask may be 077.
    std::fs::set_permissions(&next, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(next, file)
}

/// What the guard wrote down last; `None` without a guard.
pub fn read(paths: &Paths, instance: &InstanceName) -> Option<Counts> {
    let record: Record = serde_json::from_slice(&std::fs::read(paths.counted(instance)).ok()?).ok()?;
    let age = seconds(SystemTime::now()).saturating_sub(record.at);
    (age <= MAX_AGE.as_secs()).then_some(record.counters)
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
