//! Listening sockets: taken from systemd or a parent process, or bound here.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::capture::allocation::InstanceSlots;
use crate::capture::plan::listener_addrs;
use crate::config::{Config, EndpointName, Mark, Mode, Side};

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
    /// A passed socket cannot be given what its endpoint needs.
    #[error(
        "endpoint {endpoint}: mark or transparency of the inherited listener {addr} cannot be set: {source}; \
         give the process CAP_NET_RAW"
    )]
    Options {
        /// The endpoint.
        endpoint: EndpointName,
        /// The address.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
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
            ListenerError::Options { .. } => "listener-options",
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

/// Whether the kernel has IPv6, as systemd itself asks: with `ipv6.disable=1` the file is not there.
pub fn has_ipv6() -> bool {
    std::path::Path::new("/proc/net/if_inet6").exists()
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
        Some(libc::EADDRINUSE) => {
            // -a: a client of this host may have it as its own port, which -l would not show.
            format!("the port is taken; see who has it: ss -tanp 'sport = {}'", spec.addr.port())
        }
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

/// The socket with its address, if it is a listening TCP socket.
pub fn listening(fd: OwnedFd) -> Option<(SocketAddr, TcpListener)> {
    let socket = Socket::from(fd);
    let addr = socket.local_addr().ok()?.as_socket()?;
    if !socket.is_listener().unwrap_or(false) || socket.set_nonblocking(true).is_err() {
        return None;
    }
    Some((addr, socket.into()))
}

/// Copies of sockets, descriptors of the same listeners.
///
/// # Errors
/// When descriptors are exhausted.
pub fn copies(sockets: &[(SocketAddr, TcpListener)]) -> io::Result<Vec<(SocketAddr, TcpListener)>> {
    sockets.iter().map(|(addr, socket)| Ok((*addr, socket.try_clone()?))).collect()
}

/// Ends listening on every copy of the socket, wherever it is: clients are refused rather than queued for nobody.
/// Never on a socket of a socket unit: systemd takes that for a failure of the unit, and stops it with its rules.
pub fn shut(listener: &TcpListener) {
    let _ = SockRef::from(listener).shutdown(Shutdown::Both);
}

/// What a listener's connections inherit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SocketOptions {
    mark: u32,
    transparent: bool,
}

impl SocketOptions {
    /// What the configuration asks for.
    fn wanted(spec: &ListenerSpec) -> Self {
        Self { mark: spec.mark.map_or(0, |m| m.0), transparent: spec.transparent }
    }

    /// What the socket has.
    pub(super) fn of(addr: SocketAddr, listener: &TcpListener) -> io::Result<Self> {
        let socket = SockRef::from(listener);
        let transparent = if addr.is_ipv4() { socket.ip_transparent_v4()? } else { socket.ip_transparent_v6()? };
        Ok(Self { mark: socket.mark()?, transparent })
    }

    /// Changes what differs, so that a process without CAP_NET_RAW can use sockets that are right already.
    pub(super) fn set(self, addr: SocketAddr, listener: &TcpListener) -> io::Result<()> {
        let has = Self::of(addr, listener)?;
        let socket = SockRef::from(listener);
        if has.mark != self.mark {
            socket.set_mark(self.mark)?;
        }
        match addr {
            _ if has.transparent == self.transparent => Ok(()),
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(self.transparent),
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(self.transparent),
        }
    }
}

/// What [`assemble`] made of the sockets it got.
#[derive(Debug, Default)]
pub struct Assembled {
    /// A listener for each spec.
    pub bound: Vec<BoundListener>,
    /// What no spec asks for.
    pub unused: Vec<(SocketAddr, TcpListener)>,
}

/// One listener for each spec: from `passed` where the address is there, bound here where it is not. A socket unit sets
/// its options for all its sockets alike, so a passed one gets those of its spec, before anything is accepted from it.
///
/// # Errors
/// When one cannot be bound, or not be given its options.
pub fn assemble(
    specs: &[ListenerSpec],
    mut passed: Vec<(SocketAddr, TcpListener)>,
) -> Result<Assembled, ListenerError> {
    let mut bound = Vec::new();
    for spec in specs {
        if let Some(at) = passed.iter().position(|(addr, _)| *addr == spec.addr) {
            let (local, listener) = passed.swap_remove(at);
            SocketOptions::wanted(spec).set(local, &listener).map_err(|source| ListenerError::Options {
                endpoint: spec.endpoint.clone(),
                addr: local,
                source,
            })?;
            bound.push(BoundListener { endpoint: spec.endpoint.clone(), local, listener });
        } else {
            bound.extend(bind(spec)?);
        }
    }
    Ok(Assembled { bound, unused: passed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passed_listener_gets_the_options_of_its_endpoint() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let copy = listener.try_clone().unwrap();
        let as_the_unit_made_it = SocketOptions { mark: 565, transparent: true };
        as_the_unit_made_it.set(addr, &copy).expect("needs CAP_NET_RAW");
        let spec =
            |transparent, mark| ListenerSpec { endpoint: EndpointName::new("a").unwrap(), addr, transparent, mark };
        let plain = assemble(&[spec(false, None)], vec![(addr, listener)]).unwrap();
        assert_eq!(SocketOptions::of(addr, &copy).unwrap(), SocketOptions { mark: 0, transparent: false });
        let passed = plain.bound.into_iter().map(|b| (b.local, b.listener)).collect();
        assemble(&[spec(true, Some(Mark(565)))], passed).unwrap();
        assert_eq!(SocketOptions::of(addr, &copy).unwrap(), as_the_unit_made_it);
    }
}
