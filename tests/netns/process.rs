//! Programs in a host's network namespace: run to their end, or in the background with their
//! output at hand.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::wait::wait_until;

/// More output than this is cut: a program gone wild must not eat the test's memory.
const MAX_OUTPUT: usize = 1 << 20;

/// How long the output of a program that ended may take to arrive.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Whether it exited with 0.
    pub fn ok(&self) -> bool {
        self.status.success()
    }

    /// Its standard output, or a panic with all it said.
    #[track_caller]
    pub fn expect_ok(self) -> String {
        assert!(self.ok(), "`{}` ended with {}\n{}{}", self.command, self.status, self.stdout, self.stderr);
        self.stdout
    }
}

/// Text of a command, for messages.
pub(super) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs `command` to its end and keeps what it wrote.
pub fn run(mut command: Command) -> Output {
    let text = describe(&command);
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot start `{text}`: {e}"));
    Output {
        command: text,
        status: out.status,
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// A program in the background. Dropping it kills it.
pub struct Proc {
    command: String,
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Proc {
    /// Starts `command` with both outputs captured in one text.
    pub fn spawn(mut command: Command) -> Self {
        let text = describe(&command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start `{text}`: {e}"));
        let output = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().map(|r| drain(r, &output));
        let stderr = child.stderr.take().map(|r| drain(r, &output));
        Self { command: text, child, output, readers: stdout.into_iter().chain(stderr).collect() }
    }

    /// Its process id. nsenter executes the program in its own process, so this is the program.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// All it wrote so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        // ESRCH means it is gone already, which the caller sees in the exit status.
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// The exit status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("waitpid")
    }

    /// Waits for its end, or panics with its output.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        wait_until(deadline, || self.exited().is_some());
        match self.exited() {
            Some(status) => {
                // Its last words may still be in the pipe. A grandchild that holds the pipe open is not waited for.
                wait_until(LAST_WORDS, || self.readers.iter().all(JoinHandle::is_finished));
                status
            }
            None => panic!("`{}` still runs after {:?}\n{}", self.command, start.elapsed(), self.output()),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A grandchild may hold the pipe open; its world ends it, and the reader with it.
        self.readers.retain(|r| !r.is_finished());
    }
}

/// Collects what comes from `from` until its end.
fn drain(mut from: impl Read + Send + 'static, into: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buf) {
            let mut text = into.lock().unwrap();
            if text.len() < MAX_OUTPUT {
                text.extend_from_slice(&buf[..n]);
            }
        }
    })
}
