//! systemctl(1), with a deadline.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::UnitError;

/// A daemon-reload on a busy host with many units takes seconds.
const DEADLINE: Duration = Duration::from_secs(60);
/// What the manager says of a job that would cancel another.
const CONFLICT: &str = "is destructive";
/// How often to look whether it has ended.
const STEP: Duration = Duration::from_millis(5);

/// Runs `systemctl ARGS` and returns its standard output.
pub(super) fn systemctl(args: &[&str]) -> Result<String, UnitError> {
    let failed = |said: String| UnitError::Manager { what: args.join(" "), said };
    let mut child = Command::new("systemctl")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let end = Instant::now() + DEADLINE;
    // What is asked for here is a few lines: both pipes hold it until the end.
    let status = loop {
        match child.try_wait().map_err(|e| failed(e.to_string()))? {
            Some(status) => break status,
            None if Instant::now() >= end => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("no answer within {} s", DEADLINE.as_secs())));
            }
            None => std::thread::sleep(STEP),
        }
    };
    if status.success() {
        return Ok(child.stdout.take().map(said).unwrap_or_default());
    }
    Err(failed(format!("{status}: {}", child.stderr.take().map(said).unwrap_or_default().trim())))
}

fn said(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Has `unit` stopped, without waiting for it; not when somebody wants it, or what needs it, started by now: such a job
/// would be cancelled, and a guard, which nothing requires, would be left out without a word.
pub(super) fn stop_unless_wanted(unit: &str) -> Result<(), UnitError> {
    match systemctl(&["stop", "--no-block", "--job-mode=fail", unit]) {
        Err(UnitError::Manager { said, .. }) if said.contains(CONFLICT) => {
            tracing::info!(unit, "not stopped: it is wanted again");
            Ok(())
        }
        outcome => outcome.map(drop),
    }
}

/// The version of systemd, by what systemctl says of itself.
pub(super) fn version() -> Option<u32> {
    version_in(&systemctl(&["--version"]).ok()?)
}

/// `systemd 252 (252.39-1~deb12u2)`
fn version_in(text: &str) -> Option<u32> {
    let number = text.strip_prefix("systemd ")?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Whether a start that is under way was asked for, and is not systemd's own after a crash (systemd.service(5),
/// Restart=; it counts those).
pub(super) fn was_asked(unit: &str) -> Result<bool, UnitError> {
    Ok(systemctl(&["show", "-P", "NRestarts", unit])?.trim() == "0")
}

/// Whether the system shuts down (`SystemState` of org.freedesktop.systemd1(5)).
pub(super) fn is_shutting_down() -> bool {
    // It exits with 1 for every state but "running", and says which all the same.
    let asked = Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).output();
    asked.is_ok_and(|answer| answer.stdout.starts_with(b"stopping"))
}

/// Where a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// It runs.
    Up,
    /// It does not, and nothing is about to start it.
    Down,
    /// It starts, stops, or waits to be restarted.
    Between,
}

/// Where `unit` stands now.
pub(super) fn condition(unit: &str) -> Result<Condition, UnitError> {
    Ok(condition_in(&systemctl(&["show", "-p", "ActiveState", "-p", "Job", unit])?))
}

/// `ActiveState=inactive` and, where there is one, `Job=12`.
fn condition_in(shown: &str) -> Condition {
    let value = |name| shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
    match (value("ActiveState"), matches!(value("Job"), "" | "0")) {
        ("active" | "reloading", _) => Condition::Up,
        ("inactive" | "failed", true) => Condition::Down,
        _ => Condition::Between,
    }
}

/// The type of the job that a unit has now: `stop`, `restart`, `start`, or none.
pub(super) fn pending_job(unit: &str) -> Result<Option<String>, UnitError> {
    // list-jobs takes patterns and prints "JOB UNIT TYPE STATE".
    let jobs = systemctl(&["list-jobs", "--no-legend", "--plain", "--full", unit])?;
    Ok(job_type(&jobs, unit))
}

/// Whether a unit that ends was told to: by a stop or by the first half of a restart. One that ends because a step of it
/// failed has no job.
pub(super) fn was_stopped(unit: &str) -> Result<bool, UnitError> {
    Ok(matches!(pending_job(unit)?.as_deref(), Some("stop" | "restart")))
}

fn job_type(jobs: &str, unit: &str) -> Option<String> {
    let mut words = jobs.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.find_map(|w| match w[..] {
        [_, name, kind, ..] if name == unit => Some(kind.to_owned()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_debian_and_of_development_builds_are_read() {
        assert_eq!(version_in("systemd 252 (252.39-1~deb12u2)\n+PAM"), Some(252));
        assert_eq!(version_in("systemd 257~rc1 (x)"), Some(257));
        assert_eq!(version_in("something else"), None);
    }

    #[test]
    fn a_service_that_waits_to_be_restarted_is_neither_up_nor_down() {
        for (shown, condition) in [
            ("ActiveState=active\nJob=\n", Condition::Up),
            ("Job=71\nActiveState=reloading\n", Condition::Up),
            ("ActiveState=inactive\nJob=\n", Condition::Down),
            ("ActiveState=failed\n", Condition::Down),
            // A restart between its two halves.
            ("ActiveState=inactive\nJob=71\n", Condition::Between),
            ("ActiveState=activating\nJob=\n", Condition::Between),
            ("ActiveState=deactivating\nJob=71\n", Condition::Between),
            ("", Condition::Between),
        ] {
            assert_eq!(condition_in(shown), condition, "{shown}");
        }
    }

    #[test]
    fn the_job_of_this_very_unit_is_found() {
        let jobs = "12 tng@a.socket  stop    waiting\n13 tng@a.service restart running\n";
        assert_eq!(job_type(jobs, "tng@a.service").as_deref(), Some("restart"));
        assert_eq!(job_type(jobs, "tng@b.service"), None);
        assert_eq!(job_type("No jobs running.\n", "tng@a.service"), None);
    }
}
