//! Messages to the service manager (sd_notify(3)).
//!
//! `$NOTIFY_SOCKET` names a socket by its path or, with a leading `@`, an abstract one (unix(7)), as service managers in
//! containers use. The `sd-notify` crate takes every name for a path, so abstract ones are served here.

use std::ffi::OsString;
use std::io;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sd_notify::NotifyState;

/// Tells the service manager, if there is one.
///
/// # Errors
/// When its socket cannot be reached.
pub fn notify(notes: &[NotifyState<'_>]) -> io::Result<()> {
    notify_with_fds(notes, &[])
}

/// The same with descriptors, for `FDSTORE=1` and `BARRIER=1`.
///
/// # Errors
/// When its socket cannot be reached.
pub fn notify_with_fds(notes: &[NotifyState<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let Some(address) = abstract_address(std::env::var_os("NOTIFY_SOCKET"))? else {
        return if fds.is_empty() { sd_notify::notify(notes) } else { sd_notify::notify_with_fds(notes, fds) };
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    let text: String = notes.iter().map(|note| format!("{note}\n")).collect();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let passed = [ControlMessage::ScmRights(&raw)];
    let passed = if raw.is_empty() { &[][..] } else { &passed[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text.as_bytes())], passed, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn abstract_address(socket: Option<OsString>) -> io::Result<Option<SocketAddr>> {
    let name = socket.as_ref().and_then(|socket| socket.as_bytes().strip_prefix(b"@"));
    name.map(SocketAddr::from_abstract_name).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leading_at_sign_makes_the_name_abstract() {
        let address = |name: &str| abstract_address(Some(name.into())).expect("a name");
        assert_eq!(address("@tng/x").expect("abstract").as_abstract_name(), Some(&b"tng/x"[..]));
        assert!(address("/run/systemd/notify").is_none());
        assert!(abstract_address(None).expect("none").is_none());
        assert!(abstract_address(Some(format!("@{}", "x".repeat(200)).into())).is_err(), "longer than sun_path");
    }
}
