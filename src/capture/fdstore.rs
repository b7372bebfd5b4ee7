//! What lets a guard outlive its own process: the descriptors that systemd keeps for it (sd_notify(3), FDSTORE).
//!
//! Two descriptors go under one name: the netlink socket that owns the table, and a memory file that says what was
//! loaded by it. There are two names, so that a new pair is with systemd before the old one is taken back.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{NetlinkAddr, getsockname};
use sd_notify::NotifyState;

use crate::os::sys;

const NAMES: [&str; 2] = ["guard", "guard-next"];
/// A record is two listings of one table; more than this is none of ours.
const MAX_RECORD: u64 = 16 << 20;

/// Whether the service manager keeps descriptors for this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdStore {
    /// The table goes with the process (`tngd run`).
    None,
    /// `FileDescriptorStoreMax=` of the unit is 4 or more.
    Systemd,
}

/// What was loaded by a socket.
#[derive(Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Record {
    /// The table as we wrote it.
    pub(super) wanted: String,
    /// The table as nft listed it right after.
    pub(super) listing: String,
}

/// A netlink socket that owns a table, and what is recorded of it.
pub struct Kept {
    socket: OwnedFd,
    port: u32,
    name: &'static str,
    record: Option<File>,
}

impl Kept {
    /// Of a socket that no manager knows yet. `beside`: the pair it follows.
    pub(super) fn new(socket: OwnedFd, beside: Option<&Kept>) -> io::Result<Self> {
        let port = port_of(&socket)?;
        let name = if beside.is_some_and(|old| old.name == NAMES[0]) { NAMES[1] } else { NAMES[0] };
        let record = File::from(memfd_create("tng-guard", MFdFlags::MFD_CLOEXEC)?);
        Ok(Self { socket, port, name, record: Some(record) })
    }

    /// Port id of the socket, by which the kernel knows a table's owner.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// What is recorded; nothing when a crash left half of it.
    pub(super) fn read(&self) -> Option<Record> {
        let mut file = self.record.as_ref()?;
        let mut text = Vec::new();
        file.rewind().ok()?;
        file.take(MAX_RECORD).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Records. Read back only to spare a reload, so a failure costs nothing else.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        let Some(mut file) = self.record.as_ref() else { return Ok(()) };
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&serde_json::to_vec(record).expect("plain text serialises"))
    }
}

fn port_of(socket: &OwnedFd) -> io::Result<u32> {
    Ok(getsockname::<NetlinkAddr>(socket.as_raw_fd())?.pid())
}

impl FdStore {
    /// Gives copies to the manager.
    pub(super) fn keep(self, kept: &Kept) {
        if self == FdStore::None {
            return;
        }
        // Without FDPOLL=0 a netlink socket with a pending error would be thrown out, and the table with it.
        let notes = [NotifyState::FdStore, NotifyState::FdName(kept.name), NotifyState::Custom("FDPOLL=0")];
        let mut fds: Vec<BorrowedFd<'_>> = vec![kept.socket.as_fd()];
        fds.extend(kept.record.as_ref().map(AsFd::as_fd));
        if let Err(error) = crate::notify::notify_with_fds(&notes, &fds) {
            tracing::warn!(reason = "guard-not-kept", %error, "a crash of the guard would take its table along");
        }
    }

    /// Closes the manager's copies and ours.
    pub(super) fn forget(self, kept: Kept) {
        if self == FdStore::Systemd {
            let _ = crate::notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(kept.name)]);
        }
    }

    /// What a guard before this one left. Call it once, first thing in the process.
    pub fn inherited(self) -> Vec<Kept> {
        let Ok(fds) = sd_notify::listen_fds_with_names() else { return Vec::new() };
        let mut sockets = Vec::new();
        let mut records: Vec<(String, File)> = Vec::new();
        for (fd, name) in fds {
            let fd = sys::adopt(fd);
            match (port_of(&fd), NAMES.iter().find(|n| **n == name)) {
                (Ok(port), Some(name)) => sockets.push(Kept { socket: fd, port, name, record: None }),
                (Err(_), Some(_)) => records.push((name, fd.into())),
                (_, None) => tracing::warn!(reason = "guard-not-kept", name, "a descriptor that is not the guard's"),
            }
        }
        for socket in &mut sockets {
            let at = records.iter().position(|(name, _)| *name == socket.name);
            socket.record = at.map(|at| records.swap_remove(at).1);
        }
        sockets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netlink() -> OwnedFd {
        use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, bind, socket};
        let protocol = SockProtocol::NetlinkNetFilter;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        fd
    }

    #[test]
    fn a_new_pair_never_has_the_name_of_the_one_it_follows() {
        let first = Kept::new(netlink(), None).unwrap();
        let second = Kept::new(netlink(), Some(&first)).unwrap();
        let third = Kept::new(netlink(), Some(&second)).unwrap();
        assert_eq!([first.name, second.name, third.name], ["guard", "guard-next", "guard"]);
        assert_ne!(first.port(), second.port());
    }

    #[test]
    fn a_record_is_read_as_it_was_written_last_and_half_of_one_is_none() {
        let kept = Kept::new(netlink(), None).unwrap();
        assert_eq!(kept.read(), None);
        for wanted in ["a long one", "short"] {
            let record = Record { wanted: wanted.into(), listing: "x".into() };
            kept.write(&record).unwrap();
            assert_eq!(kept.read(), Some(record));
        }
        kept.record.as_ref().unwrap().set_len(5).unwrap();
        assert_eq!(kept.read(), None);
    }
}
