//! A long-running `nft -i`: commands by its standard input, each `include` one transaction.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::nft::{self, NftError};
use crate::os::files::write_atomically;
use crate::os::sys;

const DEADLINE: Duration = Duration::from_secs(20);

/// The process. It ends when its standard input does: with a guard that is killed, too. Dropping it kills it.
pub(crate) struct NftProcess {
    /// Where the transactions are put for `include`.
    file: Option<PathBuf>,
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<Line>,
}

enum Line {
    Out(String),
    Err(String),
    End,
}

impl NftProcess {
    /// Starts nft; what it loads passes through `file`.
    pub(super) fn start(file: &Path) -> Result<Self, NftError> {
        let mut nft = Self::start_without_file()?;
        nft.file = Some(file.to_owned());
        Ok(nft)
    }

    /// Starts nft for [`NftProcess::run`] alone.
    pub(crate) fn start_without_file() -> Result<Self, NftError> {
        let program = nft::program();
        let mut child = Command::new(&program)
            .arg("-i")
            // An interactive nft leaves a history file in the home directory.
            .env("HOME", "/nonexistent")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| nft::spawn_error(program, e))?;
        let (sender, lines) = channel();
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let to = sender.clone();
        thread::spawn(move || forward(out, move |line| to.send(line.map_or(Line::End, Line::Out)).is_ok()));
        thread::spawn(move || forward(err, move |line| line.is_none_or(|l| sender.send(Line::Err(l)).is_ok())));
        let Some(stdin) = child.stdin.take() else {
            return Err(NftError::Refused("nft has no standard input".into()));
        };
        Ok(Self { file: None, child, stdin, lines })
    }

    /// Runs `transaction` and reads the table back.
    pub(super) fn load(&mut self, transaction: &str, table: &str) -> Result<(), NftError> {
        let Some(file) = &self.file else { return Err(NftError::Refused("nft has no file to include".into())) };
        write_atomically(file, transaction.as_bytes())?;
        let include = format!("include \"{}\"\n", file.display());
        self.run(&include, table)
    }

    /// Runs `commands`, whole lines, each a transaction of its own, and reads the table back.
    pub(crate) fn run(&mut self, commands: &str, table: &str) -> Result<(), NftError> {
        let list = format!("list table inet {table}");
        // Broken pipe: nft died; reading its last words below says so.
        let _ = writeln!(self.stdin, "{commands}{list}");
        let end = Instant::now() + DEADLINE;
        let mut complaints = Vec::new();
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Line::Out(line)) if line == "}" => break,
                Ok(Line::Out(_)) => {}
                // The listing itself failed: the table is not there.
                Ok(Line::Err(line)) if line.trim() == list => break,
                Ok(Line::Err(line)) => complaints.push(line),
                Ok(Line::End) | Err(RecvTimeoutError::Disconnected) => {
                    complaints.push("nft -i ended".to_owned());
                    break;
                }
                Err(RecvTimeoutError::Timeout) => return Err(NftError::Timeout),
            }
        }
        // nft answers in order, so what it had to say of the include has come by now.
        complaints.extend(self.lines.try_iter().filter_map(|l| if let Line::Err(l) = l { Some(l) } else { None }));
        if complaints.is_empty() { Ok(()) } else { Err(NftError::Refused(complaints.join("\n"))) }
    }

    /// A copy of its netlink socket, once something was loaded; `None` when the kernel does not let us
    /// (`kernel.yama.ptrace_scope` of 2 or 3).
    pub(super) fn socket(&self) -> Option<OwnedFd> {
        sys::netlink_socket_of(self.child.id())
    }

    /// Whether it still runs.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for NftProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Sends each line, then `None` at the end, until the receiver is gone.
fn forward(pipe: Option<impl Read>, mut send: impl FnMut(Option<String>) -> bool) {
    let Some(pipe) = pipe else { return };
    for line in BufReader::new(pipe).lines().map_while(Result::ok) {
        if !send(Some(line)) {
            return;
        }
    }
    send(None);
}
