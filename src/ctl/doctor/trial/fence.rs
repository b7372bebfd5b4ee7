//! The doctor's own table while it tries: it marks the trial's packets for tracing, names the places that they pass, and
//! drops what of them would leave by a wire. Its owner is an nft that ends with the doctor, and the table goes with it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::trace::Trace;
use crate::capture::nft;
use crate::capture::nft_process::NftProcess;

/// The table's name begins so; the doctor's process id follows.
pub(super) const TABLE: &str = "tngdoctor_";
/// The port that says whether the monitor shows what is traced; nobody is asked there (discard, RFC 863).
const PROBE_PORT: u16 = 9;
/// How long the monitor may take to show it: nft reads the whole ruleset first.
const READY: Duration = Duration::from_secs(2);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Chain, hook and priority: the first and the last place of each hook that a packet of this host passes.
const CHAINS: [(&str, &str, i32); 8] = [
    ("out_first", "output", -500),
    ("out_last", "output", 500),
    ("post_first", "postrouting", -500),
    ("post_last", "postrouting", 500),
    ("pre_first", "prerouting", -500),
    ("pre_last", "prerouting", 500),
    ("in_first", "input", -500),
    ("in_last", "input", 500),
];

/// The table.
pub(super) struct Fence {
    /// Dropping it removes the table.
    _owner: NftProcess,
}

impl Fence {
    /// Loads it. `sources`: where the SYNs come from. `device`: the TUN device, by which answers may leave.
    pub fn put_up(sources: &[SocketAddr], probe: u16, device: Option<&str>) -> Result<Self, String> {
        let table = format!("{TABLE}{}", std::process::id());
        let mut owner = NftProcess::start_without_file().map_err(|e| e.to_string())?;
        owner.run(&commands(&table, sources, probe, device), &table).map_err(|e| e.to_string())?;
        Ok(Self { _owner: owner })
    }
}

fn commands(table: &str, sources: &[SocketAddr], probe: u16, device: Option<&str>) -> String {
    let mut text = format!("add table inet {table} {{ flags owner; }}\n");
    for (chain, hook, priority) in CHAINS {
        text += &format!("add chain inet {table} {chain} {{ type filter hook {hook} priority {priority}; }}\n");
    }
    let mut rule = |chain: &str, rule: &str| text += &format!("add rule inet {table} {chain} {rule}\n");
    let mut packets = Vec::new();
    for (family, is_ours) in [("ip", SocketAddr::is_ipv4 as fn(&SocketAddr) -> bool), ("ip6", SocketAddr::is_ipv6)] {
        let ours: Vec<String> =
            sources.iter().filter(|a| is_ours(a)).map(|a| format!("{} . {}", a.ip(), a.port())).collect();
        if !ours.is_empty() {
            let set = ours.join(", ");
            packets.push(format!("{family} saddr . tcp sport {{ {set} }}"));
            packets.push(format!("{family} daddr . tcp dport {{ {set} }}"));
        }
    }
    for packet in &packets {
        rule("out_first", &format!("{packet} meta nftrace set 1"));
        rule("pre_first", &format!("{packet} meta nftrace set 1"));
        let device = device.map(|name| format!("oifname != \"{name}\" ")).unwrap_or_default();
        rule("post_last", &format!("oif != \"lo\" {device}{packet} drop"));
    }
    let probe = format!("ip daddr 127.0.0.1 udp sport {probe} udp dport {PROBE_PORT} meta nftrace set 1 drop");
    rule("out_first", &probe);
    text
}

/// `nft monitor trace`.
pub(super) struct Monitor {
    child: Child,
    lines: Receiver<String>,
    probe: UdpSocket,
}

impl Monitor {
    /// A socket for [`Fence::put_up`] and [`Monitor::start`].
    pub fn probe() -> std::io::Result<UdpSocket> {
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
    }

    /// Starts it and waits until it shows what is traced; `None` when it does not.
    pub fn start(probe: UdpSocket) -> Option<Self> {
        let spawn = |command: &mut Command| {
            command.args(["monitor", "trace"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()
        };
        // A monitor that nothing wakes would outlive a doctor that was killed.
        let bound = spawn(Command::new("setpriv").args(["--pdeathsig", "KILL"]).arg(nft::program()));
        let mut child = bound.or_else(|_| spawn(&mut Command::new(nft::program()))).ok()?;
        let (sender, lines) = channel();
        let out = child.stdout.take();
        std::thread::spawn(move || {
            let Some(out) = out else { return };
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let monitor = Self { child, lines, probe };
        monitor.shows(&mut Trace::default()).then_some(monitor)
    }

    /// Takes what was shown so far.
    pub fn drain(&self, trace: &mut Trace) {
        self.lines.try_iter().for_each(|line| trace.take(&line));
    }

    /// Waits until a packet of now is shown: all that came before it has been shown by then.
    pub fn shows(&self, trace: &mut Trace) -> bool {
        let Ok(own) = self.probe.local_addr() else { return false };
        let shown = format!("udp sport {} ", own.port());
        self.lines.try_iter().for_each(|line| trace.take(&line));
        let end = Instant::now() + READY;
        while Instant::now() < end {
            // The table drops it, which send tells as EPERM.
            let _ = self.probe.send_to(b"x", (Ipv4Addr::LOCALHOST, PROBE_PORT));
            while let Ok(line) = self.lines.recv_timeout(LOOK) {
                trace.take(&line);
                if line.contains(&shown) && line.contains(" packet: ") {
                    return true;
                }
            }
        }
        false
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
