//! Whether the data plane's user can talk to the attestation agent: tried in a child process that becomes that user.

use std::ffi::CString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::unistd::{Gid, Group, User, getgroups, initgroups, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use super::host::{DEADLINE, Host, Ran};
use crate::attest::AaAttester;

/// The hidden command of `tngctl`.
pub const PROBE: &str = "probe-agent";

/// Why the agent was not reached or did not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AgentError {
    /// The user may not connect.
    #[error("permission denied")]
    Denied,
    /// Nobody listens.
    #[error("{0}")]
    Unreachable(String),
    /// It was reached, and gave no good answer.
    #[error("{0}")]
    Answer(String),
    /// It could not be tried.
    #[error("{0}")]
    NotTried(String),
}

/// Starts this program again as `user`; as the caller itself when that is not root.
pub(super) fn ask_as(host: &dyn Host, socket: &Path, user: &str, more: &[&str]) -> Result<String, AgentError> {
    if !host.is_root() {
        return ask(socket);
    }
    let program = std::env::current_exe().map_err(|e| AgentError::NotTried(e.to_string()))?;
    let (program, socket) = (program.to_string_lossy(), socket.to_string_lossy());
    let mut argv = vec![&*program, PROBE, user, &*socket];
    argv.extend(more);
    match host.run(&argv, None) {
        Ran::Done { ok: true, stdout, .. } => serde_json::from_str::<Result<String, AgentError>>(&stdout)
            .unwrap_or_else(|e| Err(AgentError::NotTried(e.to_string()))),
        Ran::Done { stderr, .. } => Err(AgentError::NotTried(stderr.trim().to_owned())),
        Ran::NotRun(why) => Err(AgentError::NotTried(why)),
        Ran::Timeout => Err(AgentError::Answer(format!("no answer within {} s", DEADLINE.as_secs()))),
    }
}

/// The child: becomes `user`, asks, and prints the outcome as JSON.
///
/// # Errors
/// The user does not exist, or the process may not become it.
pub fn probe(socket: &Path, user: &str, more: &[String]) -> Result<String, io::Error> {
    become_user(user, more)?;
    Ok(serde_json::to_string(&ask(socket)).unwrap_or_default())
}

fn become_user(name: &str, more: &[String]) -> io::Result<()> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no user {name}"));
    let user = User::from_name(name)?.ok_or_else(missing)?;
    initgroups(&CString::new(name)?, user.gid)?;
    let mut groups: Vec<Gid> = getgroups()?;
    for name in more {
        groups.extend(Group::from_name(name)?.map(|g| g.gid));
    }
    setgroups(&groups)?;
    setresgid(user.gid, user.gid, user.gid)?;
    // The last step: from uid 0 to another takes all capabilities away.
    Ok(setresuid(user.uid, user.uid, user.uid)?)
}

fn ask(socket: &Path) -> Result<String, AgentError> {
    UnixStream::connect(socket).map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => AgentError::Denied,
        _ => AgentError::Unreachable(e.to_string()),
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // Before the parent's deadline, so that it hears why.
    let attester = AaAttester::new(socket, DEADLINE - DEADLINE / 4);
    runtime
        .map_err(|e| AgentError::NotTried(e.to_string()))?
        .block_on(attester.tee_type())
        .map_err(|e| AgentError::Answer(e.to_string()))
}
