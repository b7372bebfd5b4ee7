//! Notices of the kernel that somebody changed a ruleset, a policy rule or a route.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// Multicast groups of linux/netfilter/nfnetlink.h and linux/rtnetlink.h.
const NFNLGRP_NFTABLES: u32 = 7;
const ROUTE_GROUPS: [u32; 4] = [7, 8, 11, 19];

/// Two netlink sockets that become readable when something changes. What changed is not read from them: the state
/// is looked at as a whole, so a notice that was lost in a full buffer costs nothing.
pub struct Watch {
    nftables: Socket,
    routes: Socket,
}

impl Watch {
    /// Subscribes. Needs CAP_NET_ADMIN.
    pub fn new() -> io::Result<Self> {
        let open = |protocol, groups: &[u32]| -> io::Result<Socket> {
            let mut socket = Socket::new(protocol)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            for group in groups {
                socket.add_membership(*group)?;
            }
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        Ok(Self {
            nftables: open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
            routes: open(NETLINK_ROUTE, &ROUTE_GROUPS)?,
        })
    }

    /// The sockets, for poll(2).
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.nftables.as_fd(), self.routes.as_fd()]
    }

    /// Throws away what has come.
    pub fn drain(&self) {
        let mut buffer = [0u8; 16 * 1024];
        for socket in [&self.nftables, &self.routes] {
            // ENOBUFS says that notices were lost: there is more to read, and the state is looked at anyway.
            while match nix::sys::socket::recv(socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::empty()) {
                Ok(n) => n > 0,
                Err(e) => e == nix::errno::Errno::ENOBUFS,
            } {}
        }
    }
}
