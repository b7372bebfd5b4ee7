//! Connecting to the peer (ingress) or to the service (egress).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::addr::ClientAddr;
use super::live_ports::LivePorts;
use super::race;
use super::refusal::Refusal;
use crate::config::{Mark, PortRange, TargetHost};

/// Addresses of one name that are tried. More are answers nobody waits for.
const MAX_ADDRESSES: usize = 8;
/// Names looked up at once by the whole process. The resolver of the C library blocks a thread for each, and a name
/// server that is silent must not take all of them, nor let a queue grow behind them.
static LOOKUPS: Semaphore = Semaphore::const_new(64);
/// Source ports tried before the connection is refused.
const MAX_PORT_TRIES: usize = 64;
/// The same of a client whose range is nearly used up.
const FEW_PORT_TRIES: usize = 8;
/// Probes of an idle connection without an answer, after which the kernel ends it.
const PROBES: u32 = 4;
/// After how much silence the first one leaves, where no setting says.
const PROBED_AFTER: Duration = Duration::from_secs(60);

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name or address.
    pub host: TargetHost,
    /// Port.
    pub port: u16,
}

impl Target {
    /// The target that is one address.
    pub fn addr(addr: SocketAddr) -> Self {
        let host = match addr {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => TargetHost::LinkLocal(*v6.ip(), v6.scope_id().to_string()),
            _ => TargetHost::Addr(addr.ip()),
        };
        Self { host, port: addr.port() }
    }

    /// The name, for a peer that is found by one.
    pub fn name(&self) -> Option<&str> {
        match &self.host {
            TargetHost::Name(name) => Some(name),
            TargetHost::Addr(_) | TargetHost::LinkLocal(..) => None,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Whether sockets are marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkPolicy {
    /// Every socket carries the mark, or there is no connection: unmarked it would be captured again.
    Required(Mark),
    /// The process may not mark and no capture depends on it.
    Unmarked,
}

impl std::fmt::Display for MarkPolicy {
    /// For the end of an error: a policy rule that takes the mark leads the packets elsewhere.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Required(mark) => write!(f, " (socket mark {}, see tngctl doctor: own-marks)", mark.0),
            Self::Unmarked => Ok(()),
        }
    }
}

/// Whose address the service sees.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// This host's.
    Own,
    /// The application's own choice among this host's addresses (`curl --interface ADDRESS`), while it is one of them.
    Chosen(ClientAddr),
    /// The client's, with a port of the range that no live outer connection of the client uses.
    Client {
        /// Whose address.
        client: ClientAddr,
        /// Which ports.
        ports: PortRange,
        /// The client's ports that are in use on the outer side.
        live: &'a LivePorts,
    },
}

/// Connects with an endpoint's mark and deadline.
#[derive(Debug, Clone, Copy)]
pub struct Dialer {
    /// Mark of the sockets.
    pub mark: MarkPolicy,
    /// Deadline of each address.
    pub connect_timeout: Duration,
    /// What [`tune`] takes.
    pub unacknowledged_timeout: Duration,
}

impl Dialer {
    /// Connects to the first address of `target` that answers; the next one is tried as well when one is slow
    /// (RFC 8305).
    ///
    /// # Errors
    /// The last address's failure, when none answers.
    pub async fn connect(&self, target: &Target, source: Source<'_>) -> Result<TcpStream, Refusal> {
        let addrs = self.resolve(target).await?;
        if let [only] = addrs[..] {
            return self.connect_addr(only, source).await;
        }
        // Boxed: one address is the rule, and needs no room for several attempts.
        match Box::pin(race::first(&addrs, |addr| self.connect_addr(addr, source))).await {
            Ok((stream, answered)) => {
                if let TargetHost::Name(name) = &target.host {
                    race::remember(name, &addrs, answered);
                }
                Ok(stream)
            }
            Err(failure) => Err(failure.unwrap_or_else(|| Refusal::Unresolved {
                name: target.to_string(),
                error: io::Error::new(io::ErrorKind::NotFound, "no address"),
            })),
        }
    }

    async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, Refusal> {
        let unresolved = |error| Refusal::Unresolved { name: target.host.to_string(), error };
        let name = match &target.host {
            TargetHost::Addr(ip) => return Ok(vec![SocketAddr::new(*ip, target.port)]),
            TargetHost::LinkLocal(ip, zone) => {
                let scope = interface(zone).map_err(unresolved)?;
                return Ok(vec![SocketAddrV6::new(*ip, target.port, 0, scope).into()]);
            }
            TargetHost::Name(name) => name,
        };
        match timeout(self.connect_timeout, lookup(name.clone(), target.port)).await {
            Ok(Ok(found)) => Ok(alternate_families(found, race::remembered(name))),
            Ok(Err(error)) => Err(unresolved(error)),
            Err(_) => Err(unresolved(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn connect_addr(&self, addr: SocketAddr, source: Source<'_>) -> Result<TcpStream, Refusal> {
        match source {
            Source::Client { client, ports, live } if may_spoof(client.0.ip(), addr.ip()) => {
                self.connect_from(addr, client.0.ip(), ports, live).await
            }
            _ => {
                let socket = self.socket(addr)?;
                if let Source::Chosen(client) = source {
                    choose(&socket, client, addr);
                }
                self.finish(socket, addr).await.map_err(|error| self.refusal(addr, error))
            }
        }
    }

    async fn connect_from(
        &self,
        addr: SocketAddr,
        client: IpAddr,
        ports: PortRange,
        live: &LivePorts,
    ) -> Result<TcpStream, Refusal> {
        let start = random_below(ports.len());
        let is_small = ports.len() <= MAX_PORT_TRIES;
        // Nearly used up is used up: many tries each, for few that succeed, would only make everybody slow.
        let tries = match (is_small, live.is_nearly_used_up(client)) {
            (true, _) => ports.len(),
            (false, true) => FEW_PORT_TRIES,
            (false, false) => MAX_PORT_TRIES,
        };
        for step in 0..tries {
            // A small range is gone through; of a large one each pick is random, which tells how full it is.
            let at = if is_small { (start + step) % ports.len() } else { random_below(ports.len()) };
            let from = SocketAddr::new(client, ports.first + at as u16);
            let taken = || live.tried(client, true);
            if live.contains(from) {
                taken();
                continue;
            }
            let socket = self.socket(addr)?;
            match addr {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
                SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
            }
            .map_err(Refusal::PreserveSource)?;
            match socket.bind(&from.into()) {
                Ok(()) => {}
                Err(error) if port_taken(&error) => {
                    taken();
                    continue;
                }
                Err(error) => return Err(Refusal::PreserveSource(error)),
            }
            match self.finish(socket, addr).await {
                Ok(stream) => {
                    live.tried(client, false);
                    return Ok(stream);
                }
                // The pair of addresses is still in use, in TIME_WAIT for one.
                Err(error) if port_taken(&error) => taken(),
                Err(error) => return Err(self.refusal(addr, error)),
            }
        }
        Err(Refusal::SourcePorts(client, tries))
    }

    /// A non-blocking socket that carries the mark.
    fn socket(&self, addr: SocketAddr) -> Result<Socket, Refusal> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))
            .map_err(Refusal::Socket)?;
        if let MarkPolicy::Required(mark) = self.mark {
            socket.set_mark(mark.0).map_err(Refusal::Mark)?;
        }
        Ok(socket)
    }

    async fn finish(&self, socket: Socket, addr: SocketAddr) -> io::Result<TcpStream> {
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(addr);
        let stream = timeout(self.connect_timeout, connecting)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connect deadline"))??;
        tune(&stream, self.unacknowledged_timeout);
        Ok(stream)
    }

    fn refusal(&self, addr: SocketAddr, error: io::Error) -> Refusal {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Refusal::TargetRefused(addr),
            io::ErrorKind::TimedOut => Refusal::TargetTimeout { addr, after: self.connect_timeout, mark: self.mark },
            _ => Refusal::TargetUnreachable { addr, error, mark: self.mark },
        }
    }
}

/// The addresses of a name. The place among the lookups is kept until the resolver returns, also when nobody waits
/// any more.
async fn lookup(name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let place = LOOKUPS.acquire().await.map_err(io::Error::other)?;
    let work = move || {
        let _place = place;
        (name.as_str(), port).to_socket_addrs().map(|found| found.take(4 * MAX_ADDRESSES).collect())
    };
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// An urgent byte (RFC 6093) stays in the stream of a plain socket, where it would otherwise be taken out and lost. The
/// mark that it is urgent is not carried through the tunnel.
pub(crate) fn keep_urgent_bytes(plain: &TcpStream) {
    // Fails only on a connection that is broken already, which the next read reports.
    let _ = SockRef::from(plain).set_out_of_band_inline(true);
}

/// Small writes leave at once, and a host that vanished while the connection was idle is noticed: probes begin after
/// `unacknowledged` of silence, and the kernel ends the connection after as much again without an answer. What is
/// under way is watched by the relay, as TCP_USER_TIMEOUT would also end a connection whose reader takes a rest.
pub(crate) fn tune(stream: &TcpStream, unacknowledged: Duration) {
    let time = if unacknowledged.is_zero() { PROBED_AFTER } else { unacknowledged };
    // The kernel counts in whole seconds.
    let interval = (time / PROBES).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(time.max(Duration::from_secs(1))).with_interval(interval);
    // Both fail only on a connection that is broken already, which the next read reports.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive.with_retries(PROBES));
}

/// The index of an interface that is named, or given by its index (RFC 4007, section 11.2).
fn interface(zone: &str) -> io::Result<u32> {
    if let Ok(index) = zone.parse::<u32>() {
        return Ok(index);
    }
    nix::net::if_::if_nametoindex(zone)
        .map_err(|_| io::Error::new(io::ErrorKind::NotFound, format!("this host has no interface {zone}: ip link")))
}

/// The source address that the kernel chooses for `addr` and a socket without a mark. Connecting a UDP socket looks the
/// route up and sends nothing (udp(7)).
fn kernels_choice(addr: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let probe = std::net::UdpSocket::bind((any, 0)).ok()?;
    probe.connect(addr).ok()?;
    Some(probe.local_addr().ok()?.ip())
}

/// Binds to the application's source address, where it is this host's and fits the destination. A port is chosen only
/// with the destination (IP_BIND_ADDRESS_NO_PORT, ip(7)), so that they do not run out. Without success the kernel chooses.
fn choose(socket: &Socket, client: ClientAddr, addr: SocketAddr) {
    let source = client.0.ip();
    let fits = source.is_ipv4() == addr.is_ipv4()
        && !source.is_unspecified()
        && source.is_loopback() == addr.ip().is_loopback()
        && !matches!(source, IpAddr::V6(v6) if v6.is_unicast_link_local());
    // What the kernel chose for the application it chooses for the tunnel too, by the tunnel's own route: a host may send
    // marked packets by another uplink.
    if !fits || kernels_choice(addr).is_some_and(|kernels| kernels == source) {
        return;
    }
    let _ = setsockopt(socket, sockopt::IpBindAddressNoPort, &true);
    if let Err(error) = socket.bind(&SocketAddr::new(source, 0).into()) {
        tracing::debug!(%source, %error, "not the application's source address");
    }
}

/// Whether this process may mark sockets.
///
/// # Errors
/// EPERM without CAP_NET_RAW (kernel 5.17 and later) or CAP_NET_ADMIN.
pub fn probe_mark(mark: Mark) -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?.set_mark(mark.0)
}

/// Families in turn (RFC 8305, section 4), beginning with the one that answered lately, else with the resolver's choice.
fn alternate_families(found: Vec<SocketAddr>, answered: Option<bool>) -> Vec<SocketAddr> {
    let first_is_v6 = answered.unwrap_or_else(|| found.first().is_some_and(SocketAddr::is_ipv6));
    let (first, second): (Vec<_>, Vec<_>) = found.into_iter().partition(|a| a.is_ipv6() == first_is_v6);
    let mut second = second.into_iter();
    let mut ordered = Vec::new();
    for addr in first {
        ordered.push(addr);
        ordered.extend(second.next());
    }
    ordered.extend(second);
    ordered.truncate(MAX_ADDRESSES);
    ordered
}

/// A link-local address means nothing without its interface, and both ends must be of one family.
fn may_spoof(client: IpAddr, service: IpAddr) -> bool {
    match client {
        IpAddr::V4(v4) => service.is_ipv4() && !v4.is_link_local() && v4 != Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(v6) => service.is_ipv6() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

fn port_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// A number below `bound`, different for every call; it spreads ports and protects nothing.
fn random_below(bound: usize) -> usize {
    use std::hash::{BuildHasher, Hasher};
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (random % bound.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::net::TcpListener;

    use super::*;
    use crate::config::DEFAULT_EGRESS_MARK;

    // Every address of 127.0.0.0/8 is local, so "the client's address" needs no second host here.
    const CLIENT: &str = "127.0.0.5:50000";

    fn dialer() -> Dialer {
        // Marks and IP_TRANSPARENT need CAP_NET_RAW: these tests fail without it.
        Dialer {
            mark: MarkPolicy::Required(DEFAULT_EGRESS_MARK),
            connect_timeout: Duration::from_secs(2),
            unacknowledged_timeout: Duration::ZERO,
        }
    }

    async fn service() -> (TcpListener, Target) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let addr = listener.local_addr().expect("address");
        (listener, Target::addr(addr))
    }

    fn client() -> ClientAddr {
        ClientAddr(CLIENT.parse().expect("address"))
    }

    fn at(port: u16) -> SocketAddr {
        SocketAddr::new(client().0.ip(), port)
    }

    #[tokio::test]
    async fn the_service_sees_the_clients_address_with_a_port_of_the_range() {
        let (listener, target) = service().await;
        let ports = PortRange { first: 21000, last: 21100 };
        let source = Source::Client { client: client(), ports, live: &LivePorts::default() };
        let stream = dialer().connect(&target, source).await.expect("connect");
        let (_, seen) = listener.accept().await.expect("accept");
        assert_eq!(seen.ip(), client().0.ip());
        assert!(ports.contains(seen.port()), "{seen}");
        assert_eq!(SockRef::from(&stream).mark().expect("mark"), DEFAULT_EGRESS_MARK.0);
    }

    #[tokio::test]
    async fn a_live_outer_port_of_the_client_is_never_taken() {
        let (listener, target) = service().await;
        let live = Arc::new(LivePorts::default());
        let ports = PortRange { first: 21200, last: 21201 };
        let _outer = live.enter(at(21200));
        let source = Source::Client { client: client(), ports, live: &live };
        let first = dialer().connect(&target, source).await.expect("connect");
        assert_eq!(listener.accept().await.expect("accept").1, at(21201));
        // Now one is live outside and the other in use towards the service.
        let refusal = dialer().connect(&target, source).await.expect_err("a port of the range was free");
        assert_eq!(refusal.reason(), "source-ports-exhausted");
        drop(first);
    }

    #[tokio::test]
    async fn a_port_that_others_use_is_skipped() {
        let (listener, target) = service().await;
        let _taken = std::net::TcpListener::bind(at(21300)).expect("bind");
        let ports = PortRange { first: 21300, last: 21301 };
        let source = Source::Client { client: client(), ports, live: &LivePorts::default() };
        let _stream = dialer().connect(&target, source).await.expect("connect");
        assert_eq!(listener.accept().await.expect("accept").1, at(21301));
    }

    #[tokio::test]
    async fn a_client_that_has_nearly_used_its_range_up_is_refused_early_and_others_are_not() {
        let (_listener, target) = service().await;
        let live = Arc::new(LivePorts::default());
        let ports = PortRange { first: 22000, last: 22199 };
        // All of the range is live outside, so that no port can be had.
        let held: Vec<_> = (ports.first..=ports.last).map(|port| live.enter(at(port))).collect();
        let dialer = dialer();
        let refused = async || {
            let source = Source::Client { client: client(), ports, live: &live };
            dialer.connect(&target, source).await.expect_err("no port is free")
        };
        let Refusal::SourcePorts(_, first) = refused().await else { panic!("another reason") };
        let Refusal::SourcePorts(_, second) = refused().await else { panic!("another reason") };
        assert_eq!((first, second), (MAX_PORT_TRIES, FEW_PORT_TRIES));
        let other = ClientAddr("127.0.0.6:50000".parse().expect("address"));
        let source = Source::Client { client: other, ports, live: &live };
        drop(dialer.connect(&target, source).await.expect("another client's ports are free"));
        // With free ports the client is served again, and its range is no longer called used up.
        drop(held);
        for _ in 0..64 {
            let source = Source::Client { client: client(), ports, live: &live };
            drop(dialer.connect(&target, source).await.expect("connect"));
        }
        assert!(!live.is_nearly_used_up(client().0.ip()));
    }

    #[test]
    fn only_addresses_that_mean_something_here_are_kept() {
        let may = |a: &str, b: &str| may_spoof(a.parse().expect("address"), b.parse().expect("address"));
        assert!(may("192.0.2.1", "192.0.2.9"));
        assert!(may("2001:db8::1", "2001:db8::9"));
        assert!(!may("fe80::1", "2001:db8::9"));
        assert!(!may("169.254.1.1", "192.0.2.9"));
        assert!(!may("192.0.2.1", "2001:db8::9"));
    }

    #[tokio::test]
    async fn failures_are_told_apart() {
        let (listener, target) = service().await;
        drop(listener);
        assert_eq!(dialer().connect(&target, Source::Own).await.expect_err("closed").reason(), "target-refused");
        let nowhere = Target { host: TargetHost::Name("name.invalid".into()), port: 1 };
        assert_eq!(dialer().connect(&nowhere, Source::Own).await.expect_err("name").reason(), "target-unresolved");
        // The kernel refuses this one without sending anything.
        let broadcast = Target::addr("255.255.255.255:1".parse().expect("address"));
        assert_eq!(dialer().connect(&broadcast, Source::Own).await.expect_err("route").reason(), "target-unreachable");
        // A full listen queue drops further SYNs, as a dead host does.
        let full = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        full.bind(&"127.0.0.1:0".parse::<SocketAddr>().expect("address").into()).expect("bind");
        full.listen(0).expect("listen");
        let addr = full.local_addr().expect("address").as_socket().expect("address");
        let _first = std::net::TcpStream::connect(addr).expect("connect");
        let quick = Dialer { connect_timeout: Duration::from_millis(100), ..dialer() };
        let mut refusals = Vec::new();
        let mut taken = Vec::new();
        for _ in 0..4 {
            match quick.connect(&Target::addr(addr), Source::Own).await {
                Ok(stream) => taken.push(stream),
                Err(refusal) => refusals.push(refusal.reason()),
            }
        }
        assert!(refusals.contains(&"target-timeout"), "{refusals:?}");
    }

    #[tokio::test]
    async fn lookups_are_bounded_and_one_that_finds_no_place_ends_at_its_deadline() {
        let quick = Dialer { connect_timeout: Duration::from_millis(100), ..dialer() };
        let named = Target { host: TargetHost::Name("localhost".into()), port: 1 };
        let all = LOOKUPS.acquire_many(64).await.expect("places");
        let refusal = quick.connect(&named, Source::Own).await.expect_err("a lookup without a place");
        assert_eq!(refusal.reason(), "target-unresolved");
        drop(all);
        assert_ne!(dialer().connect(&named, Source::Own).await.expect_err("closed port").reason(), "target-unresolved");
    }

    #[test]
    fn families_take_turns() {
        let addrs = |all: &[&str]| all.iter().map(|a| a.parse().expect("address")).collect::<Vec<SocketAddr>>();
        let found = addrs(&["[2001:db8::1]:1", "[2001:db8::2]:1", "192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"]);
        let expected = addrs(&["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1", "192.0.2.2:1", "192.0.2.3:1"]);
        assert_eq!(alternate_families(found, None), expected);
    }
}
