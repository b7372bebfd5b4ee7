//! Standard output and standard error of a command. A reader that has gone (`| head -1`), a full disk (`> /dev/full`) or one
//! that does not read is no failure of the command: what cannot be written is dropped, and the exit status is the command's.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a command may wait for somebody to read its messages.
const PATIENCE_MS: u16 = 1000;
/// Nobody has: the next message does not wait.
static UNREAD: AtomicBool = AtomicBool::new(false);

/// Writes `text` to standard output and waits for its reader, as a pager may take its time. `false`: nobody reads it.
pub fn print(text: &str) -> bool {
    write_all(io::stdout().as_fd(), text.as_bytes(), PollTimeout::NONE)
}

/// Writes `line` and the end of the line to standard error. Does not wait for long: the process may be told to end.
pub fn complain(line: &str) {
    let text = format!("{line}\n");
    let patience = if UNREAD.load(Ordering::Relaxed) { 0 } else { PATIENCE_MS };
    if !write_all(io::stderr().as_fd(), text.as_bytes(), PollTimeout::from(patience)) {
        UNREAD.store(true, Ordering::Relaxed);
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8], patience: PollTimeout) -> bool {
    while !bytes.is_empty() {
        match poll(&mut [PollFd::new(to, PollFlags::POLLOUT)], patience) {
            Ok(0) => return false,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
        // A pipe that is writable takes PIPE_BUF bytes without waiting (pipe(7)).
        match nix::unistd::write(to, &bytes[..bytes.len().min(libc::PIPE_BUF)]) {
            Ok(0) => return false,
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => return false,
        }
    }
    true
}

/// What clap has to say instead of a command: help and version on standard output with 0, a mistake on standard error
/// with 2. Returns the exit status.
pub fn print_usage(usage: &clap::Error) -> u8 {
    let text = usage.render();
    let is_terminal = if usage.use_stderr() { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
    // The same rule as for every other output of ours (ctl::Style), <https://no-color.org>.
    let colours_refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let text = if is_terminal && !colours_refused { text.ansi().to_string() } else { text.to_string() };
    if usage.use_stderr() {
        complain(text.trim_end());
    } else {
        print(&text);
    }
    u8::try_from(usage.exit_code()).unwrap_or(1)
}
