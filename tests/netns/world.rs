//! A world: five hosts in namespaces of their own, gone when it is dropped.

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use super::process::{self, Output, Proc};
use super::sniffer::Sniffer;
use super::wait::wait_for;
use super::{App, wait_until};

/// Every namespace of ours begins so; `PREFIX<pid>-<n>-<host>`.
const PREFIX: &str = "tngt-";
/// The discard port: beacons go there, no capture of a test names it.
const BEACON_PORT: u16 = 9;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order of the tables that tests print.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];
    /// `ip`'s option for the family.
    pub fn ip_option(self) -> &'static str {
        match self {
            Family::V4 => "-4",
            Family::V6 => "-6",
        }
    }
}

/// One host: a namespace, its addresses, and directories for tng's files.
pub struct Host {
    ns: String,
    dir: PathBuf,
    v4: IpAddr,
    v6: IpAddr,
}

impl Host {
    /// A host outside any world: a namespace with these addresses to its name and nothing in it yet, until
    /// [`Host::remove`]. Panics with the remedy when this machine cannot hold one.
    pub fn alone(name: &str, v4: &str, v6: &str) -> Self {
        check_once();
        let id = format!("{PREFIX}{}-{name}", std::process::id());
        let host = Self {
            dir: std::env::temp_dir().join(&id),
            ns: id,
            v4: v4.parse().expect("address"),
            v6: v6.parse().expect("address"),
        };
        process::run(command("ip", &["netns", "add", &host.ns])).expect_ok();
        host
    }

    /// Ends every process in its namespace, and the namespace.
    pub fn remove(&self) {
        remove(&[&self.ns]);
    }

    /// Name of its namespace.
    pub fn netns(&self) -> &str {
        &self.ns
    }

    /// Its address towards the router (a container's: towards its host).
    pub fn addr(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// A directory of its own, gone with the world.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its own `TNG_RUNTIME_DIR`.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Its own `TNG_CONFIG_DIR`.
    pub fn config_dir(&self) -> PathBuf {
        self.dir.join("etc")
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<Path>, args: &[&str]) -> Command {
        // `ip netns exec` would remount /sys and hide the cgroups; nsenter changes the network only.
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.ns)).arg("--").arg(program.as_ref()).args(args);
        command.env("TNG_RUNTIME_DIR", self.runtime_dir()).env("TNG_CONFIG_DIR", self.config_dir());
        command
    }

    /// Runs a program on this host to its end.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        process::run(self.command(program, args))
    }

    /// Runs a shell line on this host and returns what it printed; any failure is a panic.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        self.run("sh", &["-euc", line]).expect_ok()
    }

    /// Loads nft text; any failure is a panic.
    #[track_caller]
    pub fn nft(&self, text: &str) {
        feed(self.command("nft", &["-f", "-"]), text);
    }

    /// Adds a chain of other software: `hook` as in `type filter hook output priority 0`. Each
    /// chain lives in a table of its own, named for the order of loading.
    #[track_caller]
    pub fn chain(&self, hook: &str, rules: &[&str]) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        self.nft(&format!("table inet other{n} {{\nchain c {{\n{hook};\n{}\n}}\n}}\n", rules.join("\n")));
    }

    /// Sets sysctls, by their paths below /proc/sys.
    #[track_caller]
    pub fn sysctl(&self, values: &[(&str, &str)]) {
        let lines: Vec<String> = values.iter().map(|(name, value)| format!("echo {value} >/proc/sys/{name}")).collect();
        self.sh(&lines.join("\n"));
    }

    /// Starts a program on this host in the background.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Proc {
        Proc::spawn(self.command(program, args))
    }

    /// Starts the application program on this host, as root.
    pub fn app(&self) -> App {
        App::start(self, None)
    }

    /// Starts the application program as an unprivileged user.
    pub fn app_as(&self, uid: u32) -> App {
        App::start(self, Some(uid))
    }

    /// Runs `f` on a thread inside this host's namespace; sockets it makes stay there.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.ns);
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                let ns = File::open(&path).expect("namespace file");
                setns(ns, CloneFlags::CLONE_NEWNET).expect("setns needs root");
                f()
            });
            entered.join().expect("thread in namespace")
        })
    }

    /// Processes in this host's namespace.
    pub fn pids(&self) -> Vec<i32> {
        let out = process::run(command("ip", &["netns", "pids", &self.ns]));
        out.stdout.split_whitespace().filter_map(|p| p.parse().ok()).collect()
    }
}

/// A command outside the hosts.
fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

/// Runs a command with `text` on its standard input; any failure is a panic.
#[track_caller]
fn feed(mut command: Command, text: &str) {
    let what = process::describe(&command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start `{what}`: {e}"));
    child.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("write to stdin");
    let out = child.wait_with_output().expect("wait");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "`{what}` ended with {}\n{said}\ninput was:\n{text}", out.status);
}

/// Five hosts, the wire between them and the sniffer on it.
pub struct World {
    /// Where applications and ingresses live.
    pub client: Host,
    /// The wire: it forwards, and everything off a host passes it. Also the on-link outsider.
    pub router: Host,
    /// Where services and egresses live.
    pub server: Host,
    /// A container behind `client`.
    pub sidecar: Host,
    /// A container behind `server`.
    pub backend: Host,
    sniffer: Sniffer,
    beacons: Mutex<Vec<UdpSocket>>,
    dir: PathBuf,
}

impl World {
    /// Builds a fresh world. Panics with the remedy when this machine cannot hold one.
    pub fn new() -> Self {
        check_once();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("{PREFIX}{id}"));
        let host = |name: &str, v4: &str, v6: &str| Host {
            ns: format!("{PREFIX}{id}-{name}"),
            dir: dir.join(name),
            v4: v4.parse().expect("address"),
            v6: v6.parse().expect("address"),
        };
        let client = host("client", "198.51.100.2", "2001:db8:1::2");
        let router = host("router", "203.0.113.1", "2001:db8:2::1");
        let server = host("server", "203.0.113.2", "2001:db8:2::2");
        let sidecar = host("sidecar", "192.0.2.2", "2001:db8:3::2");
        let backend = host("backend", "192.0.2.18", "2001:db8:4::2");
        for h in [&client, &router, &server, &sidecar, &backend] {
            std::fs::create_dir_all(h.runtime_dir()).expect("runtime directory");
            std::fs::create_dir_all(h.config_dir()).expect("config directory");
        }
        let mut lines = String::new();
        for h in [&client, &router, &server, &sidecar, &backend] {
            lines.push_str(&format!("netns add {}\n", h.ns));
        }
        for (a, a_dev, b, b_dev) in [
            (&client, "c0", &router, "r0"),
            (&server, "s0", &router, "r1"),
            (&sidecar, "k0", &client, "cb0"),
            (&backend, "b0", &server, "sb0"),
        ] {
            lines.push_str(&format!("link add {a_dev} netns {} type veth peer name {b_dev} netns {}\n", a.ns, b.ns));
        }
        feed(command("ip", &["-batch", "-"]), &lines);
        // Duplicate address detection would hold every IPv6 address back for a second.
        let quiet = "echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad; echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
            for d in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$d; done";
        let forward = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding";
        let set_up = |h: &Host, forwards: bool, batch: &str| {
            let first = if forwards { forward } else { "" };
            h.sh(&format!("{quiet}\n{first}\nip -batch - <<'X'\nlink set lo up\n{batch}\nX\n"));
        };
        set_up(
            &client,
            true,
            "link set c0 up\nlink set cb0 up
addr add 198.51.100.2/24 dev c0\naddr add 2001:db8:1::2/64 dev c0 nodad
addr add 192.0.2.1/28 dev cb0\naddr add 2001:db8:3::1/64 dev cb0 nodad
route add default via 198.51.100.1\nroute add ::/0 via 2001:db8:1::1",
        );
        set_up(
            &router,
            true,
            "link set r0 up\nlink set r1 up
addr add 198.51.100.1/24 dev r0\naddr add 2001:db8:1::1/64 dev r0 nodad
addr add 203.0.113.1/24 dev r1\naddr add 2001:db8:2::1/64 dev r1 nodad
route add 192.0.2.0/28 via 198.51.100.2\nroute add 2001:db8:3::/64 via 2001:db8:1::2
route add 192.0.2.16/28 via 203.0.113.2\nroute add 2001:db8:4::/64 via 2001:db8:2::2",
        );
        set_up(
            &server,
            true,
            "link set s0 up\nlink set sb0 up
addr add 203.0.113.2/24 dev s0\naddr add 2001:db8:2::2/64 dev s0 nodad
addr add 192.0.2.17/28 dev sb0\naddr add 2001:db8:4::1/64 dev sb0 nodad
route add default via 203.0.113.1\nroute add ::/0 via 2001:db8:2::1",
        );
        set_up(
            &sidecar,
            false,
            "link set k0 up\naddr add 192.0.2.2/28 dev k0\naddr add 2001:db8:3::2/64 dev k0 nodad
route add default via 192.0.2.1\nroute add ::/0 via 2001:db8:3::1",
        );
        set_up(
            &backend,
            false,
            "link set b0 up\naddr add 192.0.2.18/28 dev b0\naddr add 2001:db8:4::2/64 dev b0 nodad
route add default via 192.0.2.17\nroute add ::/0 via 2001:db8:4::1",
        );
        let sniffer = Sniffer::start(&router);
        let beacons = Mutex::new(vec![beacon(&client, &server), beacon(&server, &client)]);
        let world = Self { client, router, server, sidecar, backend, sniffer, beacons, dir };
        wait_for("beacons cross the router in both directions", Duration::from_secs(5), || world.beacons_pass(200));
        world
    }

    /// Whether `text` was on the wire in plaintext until now, in one segment or across several.
    #[track_caller]
    pub fn saw(&self, text: &str) -> bool {
        // Only a sniffer that just saw what we sent on purpose may say that it saw nothing else.
        wait_for("the sniffer sees the beacons", Duration::from_secs(5), || self.beacons_pass(500));
        self.sniffer.saw(text.as_bytes())
    }

    /// Ends the recording, for a test that moves more than the sniffer holds. [`World::saw`] then panics.
    pub fn stop_sniffing(&mut self) {
        self.sniffer.stop();
    }

    /// Sends a beacon each way and waits up to `ms` for the sniffer to see both.
    fn beacons_pass(&self, ms: u64) -> bool {
        let sent: Vec<String> = self
            .beacons
            .lock()
            .unwrap()
            .iter()
            .map(|socket| {
                let text = format!("BEACON{}", fresh_hex());
                // The port unreachable that answered the last beacon fails one send; a link that is
                // still coming up fails both, and the next round tries again.
                let _ = socket.send(text.as_bytes()).or_else(|_| socket.send(text.as_bytes()));
                text
            })
            .collect();
        wait_until(Duration::from_millis(ms), || sent.iter().all(|text| self.sniffer.saw_datagram(text.as_bytes())))
    }

    /// All hosts.
    pub fn hosts(&self) -> [&Host; 5] {
        [&self.client, &self.router, &self.server, &self.sidecar, &self.backend]
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.sniffer.stop();
        let hosts = self.hosts();
        let names: Vec<&str> = hosts.iter().map(|h| h.netns()).collect();
        remove(&names);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A UDP socket of `from`, connected to the discard port of `to`.
fn beacon(from: &Host, to: &Host) -> UdpSocket {
    let (source, target) = (from.addr(Family::V4), to.addr(Family::V4));
    from.inside(|| {
        let socket = UdpSocket::bind((source, 0)).expect("beacon socket");
        socket.connect((target, BEACON_PORT)).expect("beacon target");
        socket
    })
}

/// Ends every process in the namespaces and removes them.
fn remove(names: &[&str]) {
    for name in names {
        let out = process::run(command("ip", &["netns", "pids", name]));
        for pid in out.stdout.split_whitespace().filter_map(|p| p.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    for name in names {
        let _ = process::run(command("ip", &["netns", "del", name]));
    }
}

/// Before the first host of this process.
fn check_once() {
    static CHECKED: Once = Once::new();
    CHECKED.call_once(|| {
        require_tools();
        sweep();
    });
}

/// Removes what test processes left that were killed before they could clean up.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            remove(&[&name]);
        }
    }
}

/// Fails with the remedy when something that every network test needs is missing.
fn require_tools() {
    assert!(
        Uid::effective().is_root(),
        "the network tests make network namespaces and load nftables rules: run them as root (sudo make test)"
    );
    let needed = [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("nsenter", "util-linux"),
        ("conntrack", "conntrack"),
        ("setpriv", "util-linux"),
        ("/usr/bin/python3", "python3"),
    ];
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| {
        Path::new(tool).is_absolute() && Path::new(tool).exists()
            || std::env::split_paths(&dirs).any(|dir| dir.join(tool).exists())
    };
    let missing: Vec<&str> = needed.iter().filter(|(tool, _)| !found(tool)).map(|(_, package)| *package).collect();
    assert!(missing.is_empty(), "missing programs: run apt install {}", missing.join(" "));
}

/// Sixteen hex digits that no other call returns, in this process or another.
pub fn fresh_hex() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:08x}{:08x}", std::process::id(), n)
}
