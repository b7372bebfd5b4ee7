//! Running another program to its end: a deadline for all of it, a bound on what is kept of its output.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most that is kept of a command's output, bytes.
const MAX_OUTPUT: u64 = 4 << 20;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ran {
    /// There is no such program, or it could not be started.
    NotRun(String),
    /// It did not end in time.
    Timeout,
    /// It ended.
    Done {
        /// With status 0.
        ok: bool,
        /// Its standard output.
        stdout: String,
        /// Its standard error.
        stderr: String,
    },
}

impl Ran {
    /// The standard output of a command that succeeded.
    pub fn text(&self) -> Option<&str> {
        match self {
            Ran::Done { ok: true, stdout, .. } => Some(stdout),
            _ => None,
        }
    }
}

/// Runs a program; what it starts may outlive it, its pipes are not waited for beyond the deadline.
pub fn run(argv: &[&str], input: Option<&str>, deadline: Duration) -> Ran {
    let Some((program, args)) = argv.split_first() else { return Ran::NotRun("no program".into()) };
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let started = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(e) => return Ran::NotRun(format!("{program}: {e}")),
    };
    let end = Instant::now() + deadline;
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        // Texts are far below a pipe's size; a broken pipe means that the program says why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let Some(ok) = ended(&mut child, end) else { return Ran::Timeout };
    match (joined(stdout, end), joined(stderr, end)) {
        (Some(stdout), Some(stderr)) => Ran::Done { ok, stdout, stderr },
        _ => Ran::Timeout,
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// How often a child is looked at.
const STEP: Duration = Duration::from_millis(2);

fn ended(child: &mut Child, end: Instant) -> Option<bool> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.success()),
            Ok(None) if Instant::now() < end => std::thread::sleep(STEP),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn joined(reader: JoinHandle<String>, end: Instant) -> Option<String> {
    while !reader.is_finished() {
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(STEP);
    }
    reader.join().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_hangs_or_is_not_there_is_told_from_one_that_fails() {
        let soon = Duration::from_millis(200);
        assert_eq!(run(&["sleep", "60"], None, soon), Ran::Timeout);
        assert!(matches!(run(&["/nonexistent/x"], None, soon), Ran::NotRun(_)));
        let done = run(&["sh", "-c", "cat; echo no >&2; exit 3"], Some("in"), Duration::from_secs(5));
        assert_eq!(done, Ran::Done { ok: false, stdout: "in".into(), stderr: "no\n".into() });
        assert_eq!(done.text(), None);
    }
}
