//! The steps of a stop. systemd has no relation that stops the socket when the service is stopped and leaves it alone
//! when the service is restarted (`PartOf=` restarts both, and with it go rules and queued connections), so the service
//! looks at what was asked of it.

use std::path::Path;

use super::{UnitError, in_force, manager};
use crate::config::{self, InstanceName, OnStop};

/// `ExecStopPost=` of the service: with `systemctl stop` the sockets go too, and by them the rules. After a crash, a
/// restart or an upgrade they stay.
pub fn service_stopped(instance: &InstanceName) -> Result<(), UnitError> {
    if manager::pending_job(&format!("tng@{instance}.service"))?.as_deref() != Some("stop") {
        return Ok(());
    }
    // The socket's own stop waits for the service's: to wait for it here would never end.
    manager::systemctl(&["stop", "--no-block", &format!("tng@{instance}.socket")]).map(drop)
}

/// `ExecStopPost=` of the socket, when the rules are gone: the guard goes as well, unless it is to stay. A restart of the
/// socket keeps it. Without its file an instance is not wanted back after the next boot either.
pub fn socket_stopped(file: &Path) -> Result<(), UnitError> {
    let instance = config::instance_of(file)?;
    let stays = in_force::last_good_of(file).is_some_and(|c| c.on_stop == OnStop::Closed);
    if !file.exists() {
        in_force::forget_last_good(&instance);
    }
    if stays || manager::pending_job(&format!("tng@{instance}.socket"))?.as_deref() != Some("stop") {
        return Ok(());
    }
    manager::systemctl(&["stop", "--no-block", &format!("tng-guard@{instance}.service")]).map(drop)
}
