//! A start over the rules of an earlier life covers what those captured as well, until the data plane serves: a start
//! that fails, or is killed before, leaves nothing open that refused.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::reload::{self, ReloadError};
use crate::capture::allocation::Locked;
use crate::capture::apply;
use crate::capture::plan::RulesPlan;
use crate::instance::Paths;

/// How often to ask whether the data plane serves. The thread that asks ends with `tngd run`.
const LOOK: Duration = Duration::from_millis(50);
/// The longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How an answer begins whose status is 200.
const OK: &[u8] = b"HTTP/1.1 200";

/// The rules that are there, and those that are wanted.
pub(crate) struct Covering {
    pub(crate) between: RulesPlan,
    pub(crate) plan: RulesPlan,
}

impl Covering {
    /// Lets go what only the earlier life captured, as soon as the data plane is ready. Returns at once.
    pub(super) fn narrow_when_ready(self, paths: &Paths) -> io::Result<()> {
        let paths = paths.clone();
        let wait = move || {
            while !is_ready(&paths.control_socket(&self.plan.instance)) {
                thread::sleep(LOOK);
            }
            self.narrow(&paths);
        };
        thread::Builder::new().name("narrowing".into()).spawn(wait).map(drop)
    }

    /// The same now, if the data plane is ready; whether it was.
    pub(crate) fn narrow_if_ready(&self, paths: &Paths) -> bool {
        let ready = is_ready(&paths.control_socket(&self.plan.instance));
        if ready {
            self.narrow(paths);
        }
        ready
    }

    fn narrow(&self, paths: &Paths) {
        let instance = &self.plan.instance;
        let narrowed = Locked::acquire(paths).map_err(ReloadError::from).and_then(|_lock| {
            // A reload, or the end of the run, may have changed them since.
            match apply::recorded_plan(paths, instance).is_some_and(|there| there == self.between) {
                true => reload::narrow(paths, &self.plan),
                false => Ok(()),
            }
        });
        if let Err(e) = narrowed {
            tracing::error!(
                reason = e.reason(),
                error = %e,
                "what an earlier life captured and this one does not is still refused: tngctl reload {instance}"
            );
        }
    }
}

/// Whether `/readyz` of the control socket says so.
fn is_ready(socket: &Path) -> bool {
    let ask = || -> io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: tng\r\nConnection: close\r\n\r\n")?;
        let mut begin = [0; OK.len()];
        stream.read_exact(&mut begin)?;
        Ok(begin == OK)
    };
    ask().unwrap_or(false)
}
