//! Fail closed by systemd's own means. In each case someone tries all the time, the sniffer sees no plaintext, and
//! a stranger on the wire gets no answer of the service.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::container::{Container, field, kill_9};
use super::netns::{wait_for, wait_until};
use super::pair::{HEAL, PORT, Pair, SERVER, marker};
use super::traffic::Load;
use super::wire::Wire;

/// How long a crash loop goes on.
const CRASH_LOOP: Duration = Duration::from_secs(5);
/// Within this, a crashed data plane serves again: RestartSec, its start, a busy machine. Far below any timeout of a unit.
const SOON: Duration = Duration::from_secs(8);
/// Within this, the guard puts back what a stranger removed; with room for a busy machine.
const PUT_BACK: Duration = Duration::from_secs(5);

/// All of it, for the ingress on the client and the egress on the server.
pub fn fail_closed(pair: &Pair) {
    for (host, name) in [(&pair.client, "ingress"), (&pair.server, "egress")] {
        let case = Case { pair, host, name };
        if pair.settle() {
            case.killed_data_plane();
        }
        if pair.settle() {
            case.killed_while_starting();
        }
        if pair.settle() {
            case.crash_loop();
        }
        if pair.settle() {
            case.restart_loses_nothing();
        }
        if pair.settle() {
            case.flushed_rules();
        }
        if pair.settle() {
            case.killed_guard();
        }
        if pair.settle() {
            case.out_of_memory();
        }
    }
}

/// One side under fire.
struct Case<'a> {
    pair: &'a Pair,
    host: &'a Container,
    name: &'a str,
}

impl Case<'_> {
    fn unit(&self) -> String {
        format!("tng@{}.service", self.name)
    }

    /// The main process, as the test's host counts.
    #[track_caller]
    fn data_plane(&self) -> i32 {
        let pid = self.host.main_pid(&self.unit()).expect("the service has a main process");
        self.host.outer_pid(pid)
    }

    /// Capture table and listening sockets are there, whatever the data plane does.
    #[track_caller]
    fn assert_held(&self) {
        let tables = self.host.sh("nft list tables");
        assert!(tables.contains(&format!("table inet tng_{}\n", self.name)), "the capture table is gone:\n{tables}");
        assert!(tables.contains(&format!("table inet tngguard_{}\n", self.name)), "the guard is gone:\n{tables}");
        let socket = format!("tng@{}.socket", self.name);
        assert!(self.host.holds(&format!("systemctl is-active -q {socket}")), "{socket} is not active");
    }

    /// Runs `fault` while a client tries and a stranger knocks; no plaintext either way. What became of the client.
    #[track_caller]
    fn under_fire(&self, load: &Load, fault: impl FnOnce()) -> super::traffic::Sums {
        let word = marker(self.name);
        let client = self.pair.traffic(&word, load);
        client.wait_served(20);
        let sums = with_stranger(&self.pair.wire, || {
            fault();
            client.wait_served(20);
            client.finish(load.count > 0)
        });
        self.pair.assert_unseen(&word);
        sums
    }

    fn killed_data_plane(&self) {
        self.pair.point(
            &format!("{}: kill -9 of the data plane: new connections wait and are served after the restart", self.name),
            || {
                let mut waited = Duration::ZERO;
                let sums = self.under_fire(&Load::PATIENT, || {
                    let pid = self.data_plane();
                    let killed = Instant::now();
                    kill_9(pid);
                    self.assert_held();
                    // Connected while there is no data plane: it waits in the service manager's socket.
                    let answers = self.pair.curls(&marker("queued"));
                    waited = killed.elapsed();
                    for answer in answers {
                        answer.unwrap_or_else(|e| panic!("a connection opened after the kill was not served: {e}"));
                    }
                });
                // Those that the killed process had accepted are lost with it: at most one for each worker and one that raced.
                let lost = sums.total() - sums.served();
                assert!(lost <= 2 * Load::PATIENT.workers, "{sums}");
                assert!(!sums.sums.keys().any(|k| k.starts_with("connect-")), "refused while it was down: {sums}");
                format!("served {:.1} s after the kill; in flight: {sums}", waited.as_secs_f32())
            },
        );
    }

    fn killed_while_starting(&self) {
        self.pair.point(
            &format!(
                "{}: kill -9 as soon as it says that it is ready: served soon after, as after any other kill",
                self.name
            ),
            || {
                let mut took = Duration::ZERO;
                self.under_fire(&Load::STEADY, || {
                    for _ in 0..2 {
                        let old = self.host.main_pid(&self.unit());
                        kill_9(self.data_plane());
                        // STATUS is set with READY, before the unit's last step of a start.
                        wait_for("the next process says that it is ready", SOON, || {
                            let shown =
                                self.host.sh(&format!("systemctl show -p MainPID -p StatusText {}", self.unit()));
                            let text =
                                |name: &str| shown.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
                            let new: Option<i32> = text("MainPID=").parse().ok().filter(|pid| *pid > 0);
                            new.is_some() && new != old && text("StatusText=").starts_with("ready")
                        });
                    }
                    kill_9(self.data_plane());
                    let start = Instant::now();
                    self.pair.wait_served();
                    took = start.elapsed();
                });
                assert!(took < SOON, "served only {:.1} s after the last kill", took.as_secs_f32());
                self.assert_held();
                format!("served {:.1} s after the last kill", took.as_secs_f32())
            },
        );
    }

    fn crash_loop(&self) {
        self.pair.point(
            &format!("{}: a crash loop: rules and sockets stay, no start limit, never plaintext", self.name),
            || {
                let mut kills = 0;
                let sums = self.under_fire(&Load::STEADY, || {
                    let (start, mut last) = (Instant::now(), Instant::now());
                    // A loaded machine takes its time; one that does not come back at all is what must not be.
                    while start.elapsed() < CRASH_LOOP || (kills < 3 && last.elapsed() < HEAL) {
                        if let Some(pid) = self.host.main_pid(&self.unit()) {
                            // It may be gone before its outer id is found.
                            if self.host.holds(&format!("kill -9 {pid}")) {
                                kills += 1;
                                last = Instant::now();
                            }
                        }
                        self.assert_held();
                    }
                    wait_for("the service is active again", HEAL, || {
                        self.host.holds(&format!("systemctl is-active -q {}", self.unit()))
                    });
                });
                assert!(kills >= 3, "only {kills} kills: it did not come back within {HEAL:?}");
                self.assert_held();
                format!("{kills} kills; client: {sums}")
            },
        );
    }

    fn restart_loses_nothing(&self) {
        self.pair.point(
            &format!("{}: systemctl restart while a client opens 1,000 connections: none is lost", self.name),
            || {
                let (mut at, mut took) = (0, Duration::ZERO);
                let word = marker(self.name);
                let client = self.pair.traffic(&word, &Load::THOUSAND);
                client.wait_more(150);
                let sums = with_stranger(&self.pair.wire, || {
                    let start = Instant::now();
                    at = client.so_far().total();
                    self.host.sh(&format!("systemctl restart tng@{}", self.name));
                    took = start.elapsed();
                    self.assert_held();
                    client.finish(true)
                });
                self.pair.assert_unseen(&word);
                assert!(at < 900, "the client was done before the restart: {at}");
                assert_eq!((sums.served(), sums.total()), (1000, 1000), "{sums}");
                format!("{sums}, restart of {:.1} s after {at}", took.as_secs_f32())
            },
        );
    }

    fn flushed_rules(&self) {
        for (what, command) in
            [("systemctl restart nftables", "systemctl restart nftables"), ("nft flush ruleset", "nft flush ruleset")]
        {
            self.pair.point(&format!("{}: {what}: rules are back, never plaintext", self.name), || {
                let mut back = Duration::ZERO;
                let sums = self.under_fire(&Load::STEADY, || {
                    self.host.sh(command);
                    let start = Instant::now();
                    wait_for("the capture table is back", PUT_BACK, || {
                        self.host.sh("nft list tables").contains(&format!("table inet tng_{}\n", self.name))
                    });
                    back = start.elapsed();
                });
                self.assert_held();
                let status = self.host.try_sh(&format!("tngctl status {}", self.name));
                assert!(status.ok(), "status is not healthy again: {}", status.stdout);
                format!("back after {:.2} s; client: {sums}", back.as_secs_f32())
            });
        }
    }

    fn killed_guard(&self) {
        self.pair.point(&format!("{}: kill -9 of the guard: its table never vanishes", self.name), || {
            let unit = format!("tng-guard@{}.service", self.name);
            let line = format!("nft -a list table inet tngguard_{} | head -1", self.name);
            // nft also names the owner's program, which is gone for a while.
            let handle = || {
                let text = self.host.sh(&line);
                let handle = text.split_whitespace().skip_while(|word| *word != "handle").nth(1);
                handle.unwrap_or_else(|| panic!("no handle: {text}")).to_owned()
            };
            let before = handle();
            let old = self.host.main_pid(&unit).expect("the guard runs");
            self.under_fire(&Load::STEADY, || {
                kill_9(self.host.outer_pid(old));
                // The kernel never gives a handle twice: the same one is the same table.
                assert_eq!(handle(), before, "right after the kill");
                wait_for("the guard is back", HEAL, || {
                    self.host.main_pid(&unit).is_some_and(|pid| pid != old)
                        && self.host.holds(&format!("systemctl is-active -q {unit}"))
                });
                assert_eq!(handle(), before, "after the guard came back");
            });
            // It still does its work.
            self.host.sh("nft flush ruleset");
            wait_for("the new guard puts the capture table back", PUT_BACK, || {
                self.host.sh("nft list tables").contains(&format!("table inet tng_{}\n", self.name))
            });
            self.assert_held();
            format!("handle {before} all the time")
        });
    }

    fn out_of_memory(&self) {
        self.pair.point(
            &format!(
                "{}: the kernel kills the data plane for memory: restarted and served, never plaintext",
                self.name
            ),
            || {
                let restarts = self.host.property(&self.unit(), "NRestarts");
                let mut killed = 0;
                self.under_fire(&Load::STEADY, || {
                    let pid = self.data_plane();
                    let group = MemoryGroup::new(&format!("{}-{}", self.host.name, pid));
                    group.take(pid);
                    // Work enough that it needs a page.
                    let more = self.pair.traffic(&marker("memory"), &Load { count: 0, workers: 100, timeout: 2.0 });
                    wait_for("the kernel kills it", Duration::from_secs(30), || {
                        field(pid, "State").is_none_or(|s| s.starts_with('Z'))
                    });
                    drop(more);
                    killed = group.kills();
                    wait_for("it is restarted", HEAL, || self.host.main_pid(&self.unit()).is_some());
                    self.assert_held();
                });
                assert!(killed >= 1, "it ended, but the kernel did not kill it for memory");
                let after = self.host.property(&self.unit(), "NRestarts");
                assert_ne!(after, restarts, "systemd restarted it");
                String::new()
            },
        );
    }
}

/// Runs `during` while a stranger on the wire sends plaintext to the service; panics when the service answered one.
#[track_caller]
pub fn with_stranger<T>(wire: &Wire, during: impl FnOnce() -> T) -> T {
    let (answers, end) = (AtomicU64::new(0), AtomicBool::new(false));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                for addr in SERVER {
                    let answer = wire.knock(addr.parse().expect("address"), PORT, "stranger");
                    if answer.is_ok_and(|text| text.contains("from=")) {
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        // The scope joins the stranger also when `during` panics, and it must hear of it.
        let ended = SetOnDrop(&end);
        let result = during();
        drop(ended);
        result
    });
    assert_eq!(answers.into_inner(), 0, "PLAINTEXT: the service answered a stranger");
    result
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A memory cgroup of the test's host in which there is no room.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(name: &str) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (root, limit) = if v1.is_dir() {
            (v1, "memory.limit_in_bytes")
        } else {
            let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let dir = root.join(format!("tngapp-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("a memory cgroup");
        // What a process has already stays charged where it was; this is for what it asks for from now on.
        fs::write(dir.join(limit), "65536").unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        Self(dir)
    }

    fn take(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("move into the memory cgroup");
    }

    /// How many processes the kernel killed in it for memory.
    fn kills(&self) -> u64 {
        let text = ["memory.oom_control", "memory.events"].iter().find_map(|f| fs::read_to_string(self.0.join(f)).ok());
        let text = text.expect("the group's events");
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")).and_then(|n| n.parse().ok()).expect("oom_kill")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        wait_until(Duration::from_secs(5), || fs::remove_dir(&self.0).is_ok());
    }
}
