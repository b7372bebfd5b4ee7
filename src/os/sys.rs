//! The only module with `unsafe` code: system calls that no dependency wraps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A descriptor of process `pid`, which becomes readable when the process ends (pidfd_open(2)).
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags and returns a new descriptor or -1.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A copy of the nfnetlink socket of process `pid` (pidfd_open(2), pidfd_getfd(2)); `None` when it has none or may
/// not be looked into.
pub fn netlink_socket_of(pid: u32) -> Option<OwnedFd> {
    let pidfd = pidfd_open(pid).ok()?;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok()) else { continue };
        if !std::fs::read_link(entry.path()).is_ok_and(|l| l.to_string_lossy().starts_with("socket:")) {
            continue;
        }
        // SAFETY: pidfd_getfd takes a pidfd we own, a number and flags, and returns a new descriptor or -1.
        let copy = owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) });
        if let Ok(copy) = copy
            && option(&copy, libc::SO_DOMAIN) == Ok(libc::AF_NETLINK)
            && option(&copy, libc::SO_PROTOCOL) == Ok(libc::NETLINK_NETFILTER)
        {
            return Some(copy);
        }
    }
    None
}

/// The process gets `signal` when its parent dies (prctl(2) PR_SET_PDEATHSIG). Not kept over a change of user.
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    done(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) })
}

/// No later exec can gain privileges (prctl(2) PR_SET_NO_NEW_PRIVS).
pub fn set_no_new_privs() -> io::Result<()> {
    // SAFETY: PR_SET_NO_NEW_PRIVS takes 1 and three zeros.
    done(unsafe {
        libc::prctl(
            libc::PR_SET_NO_NEW_PRIVS,
            1 as libc::c_ulong,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
        )
    })
}

/// Sets and locks securebits (capabilities(7)): uid 0 stops meaning anything.
pub fn set_securebits(bits: i32) -> io::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes a bit mask.
    done(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits as libc::c_ulong) })
}

/// Secrets must not end in a core file, and other processes of the user must not look in (PR_SET_DUMPABLE).
pub fn set_undumpable() -> io::Result<()> {
    // SAFETY: PR_SET_DUMPABLE takes 0 or 1.
    done(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0 as libc::c_ulong) })
}

/// Takes over a descriptor that the caller knows to be open and its own (sd_listen_fds(3), SCM_RIGHTS).
pub fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers get the number from the service manager or from a control message, and use it once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Makes `control`, an open `/dev/net/tun`, a TUN device that goes when it is closed (Linux,
/// Documentation/networking/tuntap.rst). A `%d` in `name` becomes a number. Returns the name.
pub fn tun(control: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    // SAFETY: ifreq holds integers, arrays and pointers that nobody follows here; all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives for the call.
    done(unsafe { libc::ioctl(control.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Bytes in the send queue of a TCP socket: not sent, or not acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which has the number of TIOCOUTQ, writes one c_int, which lives for the call.
    done(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// What a TCP connection waits for (TCP_INFO, tcp(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnderWay {
    /// Whether segments or probes of a closed window were sent that have no answer. Data that wait for the other host's
    /// window are not under way.
    pub unanswered: bool,
    /// How long ago the other host acknowledged anything.
    pub last_answer: Duration,
}

/// What `socket` waits for.
pub fn under_way(socket: BorrowedFd<'_>) -> io::Result<UnderWay> {
    let info = tcp_info(socket)?;
    Ok(UnderWay {
        unanswered: info.tcpi_unacked > 0 || info.tcpi_probes > 0,
        last_answer: Duration::from_millis(info.tcpi_last_ack_recv.into()),
    })
}

fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: tcp_info holds integers alone, for which all zeros are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the pointers are to the structure and its length, both live for the call; the kernel writes at most that much.
    done(unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut len)
    })?;
    Ok(info)
}

/// Connections in the queue of a listening socket: in that state `tcpi_unacked` of TCP_INFO counts them.
pub fn listen_queue(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(tcp_info(socket)?.tcpi_unacked.into())
}

fn owned(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a non-negative result of these calls is a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(ret as RawFd) })
}

fn done(ret: libc::c_int) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn option(fd: &OwnedFd, name: libc::c_int) -> Result<libc::c_int, ()> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointers are to a c_int and its length, both live for the call.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
    if ret == 0 { Ok(value) } else { Err(()) }
}

/// Gives the allocator's free pages back to the kernel, also those between used ones.
pub fn release_free_memory() {
    // SAFETY: malloc_trim(3) has no precondition; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
