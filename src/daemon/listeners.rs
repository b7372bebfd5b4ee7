//! Listening sockets: taken from systemd or a parent process, or bound here.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::capture::allocation::InstanceSlots;
use crate::capture::plan::listener_addrs;
use crate::config::{Config, EndpointName, Mark, Mode, Side};
use crate::sys;

/// The kernel caps this at net.core.somaxconn (4096 by default).
const BACKLOG: i32 = 4096;

/// A listening socket and the endpoint it belongs to.
#[derive(Debug)]
pub struct BoundListener {
    /// The endpoint whose connections arrive here.
    pub endpoint: EndpointName,
    /// Its own address. An accepted connection whose local address is this one was not captured.
    pub local: SocketAddr,
    /// The socket, non-blocking.
    pub listener: TcpListener,
}

/// A listening socket that the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerSpec {
    /// The endpoint.
    pub endpoint: EndpointName,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Whether tproxy hands it connections to any address.
    pub transparent: bool,
    /// Mark of the listener, which accepted sockets inherit: an egress's answers must be told from the service's.
    pub mark: Option<Mark>,
}

/// Why a listener is not there.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The address cannot be bound.
    #[error("endpoint {endpoint}: cannot listen on {addr}: {hint}")]
    Bind {
        /// The endpoint.
        endpoint: EndpointName,
        /// The address.
        addr: SocketAddr,
        /// What the kernel said, and what to do.
        hint: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A captured endpoint has no port yet.
    #[error("endpoint {0} has no listener port yet: its rules are not up; run: tngd net up {1}")]
    NotUp(EndpointName, String),
    /// The sockets that were passed in cannot be used.
    #[error("inherited sockets: {0}")]
    Inherited(io::Error),
}

impl ListenerError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            ListenerError::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse => "listen-port-taken",
            ListenerError::Bind { .. } => "listen-failed",
            ListenerError::NotUp(..) => "rules-not-up",
            ListenerError::Inherited(_) => "inherited-sockets-unusable",
        }
    }
}

/// The listeners that `config` asks for.
pub fn specs(config: &Config, slots: Option<&InstanceSlots>) -> Result<Vec<ListenerSpec>, ListenerError> {
    let mut out = Vec::new();
    for e in &config.endpoints {
        match &e.mode {
            Mode::Mapping(m) => out.extend((m.listen_ports.first..=m.listen_ports.last).map(|port| ListenerSpec {
                endpoint: e.name.clone(),
                addr: SocketAddr::new(m.listen_addr, port),
                transparent: false,
                mark: None,
            })),
            Mode::Netfilter(n) => {
                let slot = slots
                    .and_then(|s| s.endpoints.get(e.name.as_str()))
                    .ok_or_else(|| ListenerError::NotUp(e.name.clone(), config.instance.to_string()))?;
                out.extend(listener_addrs(slot.port).map(|addr| ListenerSpec {
                    endpoint: e.name.clone(),
                    addr,
                    transparent: true,
                    mark: (e.side == Side::Egress).then_some(n.so_mark),
                }));
            }
        }
    }
    Ok(out)
}

/// Binds one. `Ok(None)`: a captured endpoint's IPv6 listener on a host without IPv6.
pub fn bind(spec: &ListenerSpec) -> Result<Option<BoundListener>, ListenerError> {
    match try_bind(spec) {
        Ok(listener) => Ok(Some(BoundListener { endpoint: spec.endpoint.clone(), local: spec.addr, listener })),
        Err(e)
            if spec.transparent
                && spec.addr.is_ipv6()
                && matches!(e.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) =>
        {
            Ok(None)
        }
        Err(source) => Err(ListenerError::Bind {
            endpoint: spec.endpoint.clone(),
            addr: spec.addr,
            hint: hint(spec, &source),
            source,
        }),
    }
}

fn hint(spec: &ListenerSpec, e: &io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EADDRINUSE) => format!("the port is taken; see who has it: ss -ltnp 'sport = {}'", spec.addr.port()),
        Some(libc::EADDRNOTAVAIL) => "this host has no such address".to_owned(),
        Some(libc::EACCES) => "ports below 1024 need root or a socket unit".to_owned(),
        Some(libc::EPERM) => "transparent sockets need CAP_NET_RAW; start it by systemd or by tngd run".to_owned(),
        _ => e.to_string(),
    }
}

fn try_bind(spec: &ListenerSpec) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(spec.addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if spec.addr.is_ipv6() {
        // [::] would otherwise take the IPv4 port too, and the IPv4 listener of the same endpoint fail.
        socket.set_only_v6(true)?;
    }
    if spec.transparent {
        if spec.addr.is_ipv4() { socket.set_ip_transparent_v4(true)? } else { socket.set_ip_transparent_v6(true)? }
    }
    if let Some(mark) = spec.mark {
        socket.set_mark(mark.0)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(spec.addr))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Sockets that the service manager passed (sd_listen_fds(3)), told apart by their local address. What is not a
/// listening TCP socket is closed.
pub fn inherited() -> Result<Vec<(SocketAddr, TcpListener)>, ListenerError> {
    let fds = sd_notify::listen_fds().map_err(ListenerError::Inherited)?;
    let mut out = Vec::new();
    for fd in fds {
        if let Some(listener) = listening(sys::adopt(fd)) {
            out.push(listener);
        }
    }
    Ok(out)
}

/// The socket with its address, if it is a listening TCP socket.
pub fn listening(fd: OwnedFd) -> Option<(SocketAddr, TcpListener)> {
    let socket = Socket::from(fd);
    let addr = socket.local_addr().ok()?.as_socket()?;
    if !socket.is_listener().unwrap_or(false) || socket.set_nonblocking(true).is_err() {
        return None;
    }
    Some((addr, socket.into()))
}

/// One listener for each spec: from `passed` where the address is there, bound here where it is not.
/// What is left of `passed` is closed, and named.
pub fn assemble(
    specs: &[ListenerSpec],
    mut passed: Vec<(SocketAddr, TcpListener)>,
) -> Result<Vec<BoundListener>, ListenerError> {
    let mut out = Vec::new();
    for spec in specs {
        if let Some(at) = passed.iter().position(|(addr, _)| *addr == spec.addr) {
            let (local, listener) = passed.swap_remove(at);
            out.push(BoundListener { endpoint: spec.endpoint.clone(), local, listener });
        } else {
            out.extend(bind(spec)?);
        }
    }
    for (addr, _) in passed {
        tracing::warn!(reason = "listener-unused", %addr, "a socket was passed that no endpoint asks for; closed");
    }
    Ok(out)
}
