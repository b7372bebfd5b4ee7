//! Ends the sockets of captured connections before their rules go (sock_diag(7), SOCK_DESTROY).
//!
//! When the data plane was killed, the kernel closed its ends with FIN, and an application may still hold its own end
//! open: once the rules are gone, its next write would leave in plaintext. While rules are up, every connection to a
//! captured destination is a captured one, so the capture entries say which sockets to end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use nix::sys::socket::{MsgFlags, recv, send};

use super::cgroups;
use super::marks::MARK_MASK;
use super::plan::{CapturePlan, RulesPlan};
use crate::config::{Match as Entry, Side};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
/// Every TCP state but LISTEN, TIME_WAIT and CLOSE: those that can still send.
const STATES: u32 = 0xfff & !(1 << 10) & !(1 << 6) & !(1 << 7);
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_CGROUP_ID: u16 = 21;
const HEADER: usize = 16;
/// inet_diag_msg of linux/inet_diag.h: 4 bytes, the socket id, five words.
const MESSAGE: usize = 72;
const ID: std::ops::Range<usize> = 4..52;

/// One TCP socket as the kernel describes it.
#[derive(Debug, Clone)]
struct Tcp {
    family: u8,
    /// The kernel's id, sent back to name the socket.
    id: [u8; 48],
    local: SocketAddr,
    remote: SocketAddr,
    uid: u32,
    mark: u32,
    cgroup: Option<u64>,
}

/// Resets every socket whose connection the plan captures. Returns how many.
///
/// # Errors
/// The first failure; the other sockets are ended all the same.
/// When the kernel has no SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY; Debian has it) or the caller no CAP_NET_ADMIN.
pub fn end_captured(plan: &RulesPlan) -> io::Result<usize> {
    let mut ended = 0;
    let mut failure = None;
    for family in [libc::AF_INET, libc::AF_INET6] {
        for tcp in list(family as u8)? {
            if plan.captures.iter().any(|c| is_captured(plan, c, &tcp)) {
                match destroy(&tcp) {
                    Ok(()) => ended += 1,
                    Err(e) => failure = failure.or(Some(e)),
                }
            }
        }
    }
    failure.map_or(Ok(ended), Err)
}

fn is_captured(plan: &RulesPlan, c: &CapturePlan, tcp: &Tcp) -> bool {
    let ours = plan.all_ingress_marks().into_iter().chain(plan.egress_marks());
    if ours.into_iter().any(|m| tcp.mark & MARK_MASK == m.0) {
        return false;
    }
    let end = match c.side {
        Side::Ingress => tcp.remote,
        // The service's own socket; a local client's connection stays on this host and may go on.
        Side::Egress if is_local(tcp.remote.ip()) => return false,
        Side::Egress => tcp.local,
    };
    let hits = |entries: &[Entry]| entries.iter().any(|e| entry_hits(e, end, tcp, c.side));
    hits(&c.netfilter.capture) && !hits(&c.netfilter.exclude)
}

fn entry_hits(e: &Entry, end: SocketAddr, tcp: &Tcp, side: Side) -> bool {
    let addr = match e.to {
        Some(net) => net.contains(&end.ip()),
        None => side == Side::Egress || !is_local(end.ip()),
    };
    // The kernel does not tell a socket's group here. Such a connection is left to the rules of the next start.
    addr && e.port.is_none_or(|p| p.contains(end.port()))
        && e.uid.is_none_or(|uid| uid == tcp.uid)
        && e.gid.is_none()
        && e.cgroup.as_ref().is_none_or(|path| tcp.cgroup.is_some() && tcp.cgroup == cgroups::id(&path.0))
}

/// An address that can be bound is this host's.
fn is_local(addr: IpAddr) -> bool {
    addr.is_loopback() || UdpSocket::bind((addr, 0)).is_ok()
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddr::new(0, 0))?;
    Ok(socket)
}

/// nlmsghdr and inet_diag_req_v2.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; 48]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + 56);
    out.extend(((HEADER + 56) as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    out.extend(STATES.to_ne_bytes());
    out.extend(id);
    out
}

fn list(family: u8) -> io::Result<Vec<Tcp>> {
    let socket = open()?;
    send(socket.as_raw_fd(), &request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, &[0; 48]), MsgFlags::empty())?;
    let mut out = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let got = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..got];
        while let Some((kind, body, next)) = split(rest) {
            match kind {
                NLMSG_DONE => return Ok(out),
                NLMSG_ERROR => return Err(error_of(body)),
                _ => out.extend(parse(body)),
            }
            rest = next;
        }
        if got == 0 {
            return Ok(out);
        }
    }
}

fn destroy(tcp: &Tcp) -> io::Result<()> {
    let socket = open()?;
    send(socket.as_raw_fd(), &request(SOCK_DESTROY, NLM_F_ACK, tcp.family, &tcp.id), MsgFlags::empty())?;
    let mut buffer = [0u8; 4096];
    let got = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    match split(&buffer[..got]) {
        Some((NLMSG_ERROR, body, _)) => match error_of(body) {
            e if e.raw_os_error() == Some(0) => Ok(()),
            // It ended by itself in the meantime.
            e if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            e => Err(e),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The first message of a buffer: kind, body, and what follows (netlink(7): aligned to 4).
fn split(buffer: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(buffer.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(buffer.get(4..6)?.try_into().ok()?);
    let body = buffer.get(HEADER..length)?;
    Some((kind, body, buffer.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn error_of(body: &[u8]) -> io::Error {
    let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(-libc::EINVAL, i32::from_ne_bytes);
    io::Error::from_raw_os_error(-code)
}

fn parse(body: &[u8]) -> Option<Tcp> {
    let message = body.get(..MESSAGE)?;
    let id: [u8; 48] = message[ID].try_into().ok()?;
    let port = |at: usize| u16::from_be_bytes([id[at], id[at + 1]]);
    let addr = |at: usize| -> IpAddr {
        let bytes: [u8; 16] = id[at..at + 16].try_into().unwrap_or_default();
        match i32::from(message[0]) {
            libc::AF_INET => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
            // An IPv6 socket with an IPv4 peer (v4-mapped) is captured by IPv4 rules.
            _ => Ipv6Addr::from(bytes).to_canonical(),
        }
    };
    let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap_or_default());
    let mut tcp = Tcp {
        family: message[0],
        id,
        local: SocketAddr::new(addr(4), port(0)),
        remote: SocketAddr::new(addr(20), port(2)),
        uid: word(64),
        mark: 0,
        cgroup: None,
    };
    let mut attributes = &body[MESSAGE..];
    while let [a, b, c, d, ..] = *attributes {
        let length = u16::from_ne_bytes([a, b]) as usize;
        let Some(value) = attributes.get(4..length) else { break };
        match u16::from_ne_bytes([c, d]) {
            INET_DIAG_MARK => tcp.mark = value.try_into().map_or(0, u32::from_ne_bytes),
            INET_DIAG_CGROUP_ID => tcp.cgroup = value.try_into().ok().map(u64::from_ne_bytes),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(tcp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_kernel_lists_a_connection_and_destroys_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_server, _) = listener.accept().unwrap();
        let wanted = client.local_addr().unwrap();
        let all = list(libc::AF_INET as u8).unwrap();
        let tcp = all.iter().find(|t| t.local == wanted).expect("the kernel lists our socket");
        assert_eq!(tcp.remote, listener.local_addr().unwrap());
        assert_eq!(tcp.uid, nix::unistd::geteuid().as_raw());
        destroy(tcp).expect("needs root, and a kernel with CONFIG_INET_DIAG_DESTROY");
        let e = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn truncated_messages_are_passed_over() {
        for n in 0..MESSAGE {
            assert!(parse(&vec![0; n]).is_none());
            let _ = split(&vec![0xff; n]);
        }
    }
}
