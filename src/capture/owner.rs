//! A table that a stranger cannot touch: `flags owner`, held by a long-running `nft -i`.
//!
//! The kernel ties an owned table to the netlink socket that made it. Others' `flush ruleset` passes it by and their
//! `delete table` gets EPERM; it vanishes when the last descriptor of that socket closes. So the commands go to one
//! `nft -i` by its standard input, each `include` one transaction, and a copy of its socket keeps the table when
//! nft itself is killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::nft::{self, NftError};
use crate::sys;

const DEADLINE: Duration = Duration::from_secs(20);

/// An `nft -i` and the table it owns.
pub struct TableOwner {
    table: String,
    /// Where the transactions are put for `include`.
    file: PathBuf,
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<Line>,
    /// Copy of nft's netlink socket.
    socket: Option<OwnedFd>,
}

enum Line {
    Out(String),
    Err(String),
    End,
}

impl TableOwner {
    /// Starts nft; the table comes with the first [`TableOwner::load`].
    pub fn start(table: &str, file: &Path) -> Result<Self, NftError> {
        let program = nft::program();
        let mut child = Command::new(&program)
            .arg("-i")
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
        Ok(Self { table: table.to_owned(), file: file.to_owned(), child, stdin, lines, socket: None })
    }

    /// Runs `transaction` and reads the table back.
    pub fn load(&mut self, transaction: &str) -> Result<(), NftError> {
        super::allocation::write_atomically(&self.file, transaction.as_bytes())?;
        let list = format!("list table inet {}", self.table);
        // Broken pipe: nft died; reading its last words below says so.
        let _ = writeln!(self.stdin, "include \"{}\"\n{list}", self.file.display());
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
        if !complaints.is_empty() {
            return Err(NftError::Refused(complaints.join("\n")));
        }
        if self.socket.is_none() {
            self.socket = sys::netlink_socket_of(self.child.id());
        }
        Ok(())
    }

    /// The copy of nft's socket, for systemd's FDSTORE.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Lets go of the table: without nft and without the copy it vanishes.
    pub fn release(&mut self) {
        self.socket = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether nft still runs. Without it the table stays, by the copy, but cannot be changed.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for TableOwner {
    fn drop(&mut self) {
        self.release();
        let _ = std::fs::remove_file(&self.file);
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
