//! Sending the SYNs and waiting for what comes back.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use socket2::{Domain, Protocol, Socket, Type};

use super::fence::{Fence, Monitor};
use super::packet::{ACK, RST, SYN, Segment};
use super::trace::Trace;
use super::{Fate, Trial, Tried};
use crate::capture::ir::Family;
use crate::config::Side;
use crate::ctl::doctor::host::{Host, Ran};
use crate::os::sys;

/// How long an answer is waited for. It comes from this host, in microseconds.
const ANSWER: Duration = Duration::from_secs(2);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// Bytes of a packet that are read.
const PACKET: usize = 2048;
/// Packets that are read of one socket at a time.
const BATCH: usize = 64;
/// The name of the TUN device; the kernel puts a number in.
const DEVICE: &str = "tngdoctor%d";
/// First source port of what comes in by the TUN device.
const FIRST_PORT: u16 = 52_000;
/// Where the SYNs that come in say that they are from: documentation prefixes (RFC 5737, RFC 3849). The first one in
/// whose prefix this host has no address is taken.
const STRANGERS4: [Ipv4Addr; 3] =
    [Ipv4Addr::new(192, 0, 2, 254), Ipv4Addr::new(198, 51, 100, 254), Ipv4Addr::new(203, 0, 113, 254)];
const STRANGER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0xffff, 0, 0, 0, 0xfe);

/// A trial that is ready to be sent.
struct Ready {
    index: usize,
    from: SocketAddr,
    to: SocketAddr,
    /// An ingress's raw socket, and a socket that keeps the port from others.
    raw: Option<(Socket, Socket)>,
}

impl Ready {
    fn segment(&self, flags: u8, sequence: u32) -> Segment {
        Segment { from: self.from, to: self.to, sequence, acknowledged: 0, flags }
    }
}

/// Makes the trials, all at once. Takes a few seconds at most.
///
/// # Errors
/// Nothing was sent, and why.
pub(in crate::ctl::doctor) fn run(host: &dyn Host, trials: &[Trial]) -> Result<Vec<Tried>, String> {
    let mut fates: Vec<Option<Fate>> = vec![None; trials.len()];
    let mut ready = Vec::new();
    let mut tun = None;
    for (index, trial) in trials.iter().enumerate() {
        let prepared = match trial.side {
            Side::Ingress => outgoing(index, trial),
            Side::Egress => incoming(host, &mut tun, index, trial),
        };
        match prepared {
            Ok(one) => ready.push(one),
            Err(why) => fates[index] = Some(Fate::NotSent(why)),
        }
    }
    let mut trace = Trace::new(ready.iter().map(|r| r.from.port()).collect());
    let mut is_traced = false;
    if !ready.is_empty() {
        let probe = Monitor::probe().map_err(|e| format!("a socket on 127.0.0.1: {e}"))?;
        let probe_port = probe.local_addr().map_err(|e| e.to_string())?.port();
        let sources: Vec<SocketAddr> = ready.iter().map(|r| r.from).collect();
        // Nothing is sent without it: it keeps the trial on this host.
        let _fence = Fence::put_up(&sources, probe_port, tun.as_ref().map(|t: &Tun| t.name.as_str()))?;
        let monitor = Monitor::start(probe);
        for one in &ready {
            if let Err(why) = send(one, tun.as_mut()) {
                fates[one.index] = Some(Fate::NotSent(why));
            }
        }
        wait(&ready, tun.as_mut(), &mut fates, monitor.as_ref(), &mut trace);
        is_traced = monitor.as_ref().is_some_and(|m| m.shows(&mut trace));
    }
    let ready_of = |index: usize| ready.iter().find(|r| r.index == index);
    let tried = trials.iter().zip(fates).enumerate().map(|(index, (trial, fate))| Tried {
        trial: trial.clone(),
        to: ready_of(index).map(|r| r.to),
        fate: fate.unwrap_or(Fate::Silent),
        steps: ready_of(index).filter(|_| is_traced).map(|r| trace.of(r.from.port())),
    });
    Ok(tried.collect())
}

/// A raw socket towards the first address with a route.
fn outgoing(index: usize, trial: &Trial) -> Result<Ready, String> {
    let domain = if trial.family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
    let raw = |to: IpAddr| -> io::Result<(Socket, IpAddr)> {
        let socket = as_owner(trial.owner, || Socket::new(domain, Type::RAW, Some(Protocol::TCP)))?;
        socket.set_nonblocking(true)?;
        // Connected: it hears that address alone, and the kernel has chosen the source.
        socket.connect(&SocketAddr::new(to, 0).into())?;
        let own = socket.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
        Ok((socket, own.ip()))
    };
    let mut last = "no address".to_owned();
    for to in &trial.to {
        match raw(*to).and_then(|(socket, own)| Ok((socket, reserve(domain, own)?))) {
            Ok((socket, (holder, from))) => {
                let to = SocketAddr::new(*to, trial.port);
                return Ok(Ready { index, from, to, raw: Some((socket, holder)) });
            }
            Err(e) => last = format!("{to}: {e}"),
        }
    }
    Err(last)
}

/// A port that no program gets while the trial lasts.
fn reserve(domain: Domain, own: IpAddr) -> io::Result<(Socket, SocketAddr)> {
    let holder = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    holder.bind(&SocketAddr::new(own, 0).into())?;
    let from = holder.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
    Ok((holder, from))
}

/// Sockets made in `make` belong to this user and group, as rules and routes see it. (A change of the file system's user
/// leaves CAP_NET_RAW alone: capabilities(7).)
fn as_owner<T>((uid, gid): (u32, u32), make: impl FnOnce() -> T) -> T {
    let before_gid = setfsgid(Gid::from_raw(gid));
    let before_uid = setfsuid(Uid::from_raw(uid));
    let made = make();
    setfsuid(before_uid);
    setfsgid(before_gid);
    made
}

/// The doctor's own device. It goes when it is dropped, also with a doctor that is killed.
struct Tun {
    file: File,
    name: String,
    /// Strangers' addresses that are routed to it.
    routed: Vec<IpAddr>,
}

impl Tun {
    fn open(host: &dyn Host) -> Result<Self, String> {
        let path = host.path("/dev/net/tun");
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = file.map_err(|e| format!("{}: {e}", path.display()))?;
        let name = sys::tun(file.as_fd(), DEVICE).map_err(|e| format!("a TUN device: {e}"))?;
        let tun = Self { file, name, routed: Vec::new() };
        // Without an address of its own it sends nothing of its own.
        ip(host, &["link", "set", "dev", &tun.name, "addrgenmode", "none"])?;
        ip(host, &["link", "set", "dev", &tun.name, "up"])?;
        Ok(tun)
    }

    /// What a reverse path filter asks for, and the way back.
    fn route(&mut self, host: &dyn Host, stranger: IpAddr) -> Result<(), String> {
        if !self.routed.contains(&stranger) {
            let (option, length) = if stranger.is_ipv4() { ("-4", 32) } else { ("-6", 128) };
            ip(host, &[option, "route", "add", &format!("{stranger}/{length}"), "dev", &self.name])?;
            self.routed.push(stranger);
        }
        Ok(())
    }
}

fn ip(host: &dyn Host, args: &[&str]) -> Result<(), String> {
    match host.run(&[&["ip"], args].concat(), None) {
        Ran::Done { ok: true, .. } => Ok(()),
        Ran::Done { stderr, .. } => Err(format!("ip {}: {}", args.join(" "), stderr.trim())),
        Ran::NotRun(why) => Err(why),
        Ran::Timeout => Err(format!("ip {}: no end", args.join(" "))),
    }
}

fn incoming(host: &dyn Host, tun: &mut Option<Tun>, index: usize, trial: &Trial) -> Result<Ready, String> {
    let to = *trial.to.first().ok_or("no address")?;
    let port = u16::try_from(index).ok().and_then(|i| FIRST_PORT.checked_add(i)).ok_or("too many endpoints")?;
    let stranger = stranger(trial.family, &host.local_addresses());
    let device = match tun {
        Some(device) => device,
        None => tun.insert(Tun::open(host)?),
    };
    device.route(host, stranger)?;
    Ok(Ready { index, from: SocketAddr::new(stranger, port), to: SocketAddr::new(to, trial.port), raw: None })
}

fn stranger(family: Family, locals: &[IpAddr]) -> IpAddr {
    if family == Family::V6 {
        return STRANGER6.into();
    }
    let is_near = |stranger: &Ipv4Addr| {
        locals.iter().any(|own| matches!(own, IpAddr::V4(own) if own.octets()[..3] == stranger.octets()[..3]))
    };
    STRANGERS4.into_iter().find(|s| !is_near(s)).unwrap_or(STRANGERS4[0]).into()
}

fn send(one: &Ready, tun: Option<&mut Tun>) -> Result<(), String> {
    let syn = one.segment(SYN, 1);
    let sent = match (&one.raw, tun) {
        (Some((raw, _)), _) => raw.send(&syn.tcp()).map(drop),
        (None, Some(tun)) => tun.file.write_all(&syn.packet()),
        (None, None) => return Err("no device".to_owned()),
    };
    match sent {
        // EPERM: a chain at output dropped it.
        Err(e) if e.raw_os_error() != Some(libc::EPERM) => Err(e.to_string()),
        _ => Ok(()),
    }
}

/// Until each is answered, known to be lost, or the time is over.
fn wait(
    ready: &[Ready],
    mut tun: Option<&mut Tun>,
    fates: &mut [Option<Fate>],
    monitor: Option<&Monitor>,
    trace: &mut Trace,
) {
    let end = Instant::now() + ANSWER;
    loop {
        if let Some(monitor) = monitor {
            monitor.drain(trace);
        }
        for one in ready.iter().filter(|r| r.raw.is_some()) {
            hear(one, &mut fates[one.index]);
        }
        if let Some(tun) = tun.as_deref_mut() {
            hear_device(tun, ready, fates);
        }
        let is_over = |one: &Ready| fates[one.index].is_some() || trace.is_lost(one.from.port());
        if Instant::now() >= end || ready.iter().all(is_over) {
            // A reset follows what was rejected.
            for one in ready.iter().filter(|r| r.raw.is_some()) {
                hear(one, &mut fates[one.index]);
            }
            return;
        }
        std::thread::sleep(LOOK);
    }
}

/// What the raw socket of an ingress's trial has got. Over IPv4 with the IP header, over IPv6 without.
fn hear(one: &Ready, fate: &mut Option<Fate>) {
    let Some((raw, _)) = &one.raw else { return };
    let mut bytes = [0; PACKET];
    for _ in 0..BATCH {
        let mut reader: &Socket = raw;
        let Ok(len) = reader.read(&mut bytes) else { return };
        let got = &bytes[..len];
        let segment = match one.from {
            SocketAddr::V4(_) => Segment::of_packet(got),
            SocketAddr::V6(_) => Segment::of_tcp(one.to.ip(), one.from.ip(), got),
        };
        if let Some(segment) = segment.filter(|s| s.from == one.to && s.to == one.from) {
            note(segment, fate);
        }
    }
}

fn hear_device(tun: &mut Tun, ready: &[Ready], fates: &mut [Option<Fate>]) {
    let mut bytes = [0; PACKET];
    for _ in 0..BATCH {
        let Ok(len) = tun.file.read(&mut bytes) else { return };
        let Some(segment) = Segment::of_packet(&bytes[..len]) else { continue };
        let of = ready.iter().find(|r| r.raw.is_none() && segment.from == r.to && segment.to == r.from);
        let Some(one) = of else { continue };
        note(segment, &mut fates[one.index]);
        if segment.flags & RST == 0 {
            // The kernel ends an ingress's handshake by itself: nobody has that socket.
            let _ = tun.file.write_all(&one.segment(RST, segment.acknowledged).packet());
        }
    }
}

fn note(segment: Segment, fate: &mut Option<Fate>) {
    if segment.flags & RST != 0 {
        fate.get_or_insert(Fate::Refused);
    } else if segment.flags & (SYN | ACK) == SYN | ACK {
        fate.get_or_insert(Fate::Answered);
    }
}
