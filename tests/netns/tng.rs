//! The product in a host: started, asked, stopped, killed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::process::{Output, Proc};
use super::wait::wait_until;
use super::world::Host;

/// From start to ready, tables, evidence and all.
const START: Duration = Duration::from_secs(15);
/// From SIGTERM to the end of the process.
const STOP: Duration = Duration::from_secs(20);
/// Bit of CAP_NET_ADMIN in /proc/PID/status.
const CAP_NET_ADMIN: u64 = 1 << 12;

/// The daemon under test: the one cargo built, or the one `TNG_TEST_TNGD` names.
pub fn tngd() -> PathBuf {
    std::env::var_os("TNG_TEST_TNGD").map_or_else(|| env!("CARGO_BIN_EXE_tngd").into(), PathBuf::from)
}

/// The operator's tool under test: the one cargo built, or the one `TNG_TEST_TNGCTL` names.
pub fn tngctl() -> PathBuf {
    std::env::var_os("TNG_TEST_TNGCTL").map_or_else(|| env!("CARGO_BIN_EXE_tngctl").into(), PathBuf::from)
}

/// A running instance (`tngd run`). Dropping it kills it; its rules go with the world.
pub struct Tng<'a> {
    host: &'a Host,
    name: String,
    proc: Proc,
}

impl<'a> Tng<'a> {
    /// Writes `toml` as instance `name` of `host` and runs it; returns when it is ready.
    #[track_caller]
    pub fn start(host: &'a Host, name: &str, toml: &str) -> Self {
        Self::start_through(&[], host, name, toml)
    }

    /// The same through another program, `unshare` for one, that ends as tngd in its own process.
    #[track_caller]
    pub fn start_through(wrapper: &[&str], host: &'a Host, name: &str, toml: &str) -> Self {
        let mut tng = Self::spawn_through(wrapper, host, name, toml, &[]);
        let mut ready = false;
        wait_until(START, || {
            ready = tng.is_ready();
            ready || tng.proc.exited().is_some()
        });
        if !ready {
            panic!("instance {name} is not ready:\n{}\nconfiguration:\n{toml}", tng.proc.output());
        }
        tng
    }

    /// The same without waiting; `args` come before the file.
    pub fn spawn(host: &'a Host, name: &str, toml: &str, args: &[&str]) -> Self {
        Self::spawn_with(host, name, toml, args, &[])
    }

    /// The same with variables in its environment.
    pub fn spawn_with(host: &'a Host, name: &str, toml: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::launch(&[], host, name, toml, args, env)
    }

    /// The same through another program, such as unshare.
    pub fn spawn_through(wrapper: &[&str], host: &'a Host, name: &str, toml: &str, args: &[&str]) -> Self {
        Self::launch(wrapper, host, name, toml, args, &[])
    }

    fn launch(wrapper: &[&str], host: &'a Host, name: &str, toml: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let file = host.config_dir().join(format!("{name}.toml"));
        std::fs::write(&file, toml).expect("write the configuration");
        let file = file.to_string_lossy().into_owned();
        let tngd = tngd().to_string_lossy().into_owned();
        let mut words = wrapper.to_vec();
        words.extend([tngd.as_str(), "run"]);
        words.extend(args);
        words.push(&file);
        let mut command = host.command(words[0], &words[1..]);
        command.envs(env.iter().copied());
        let proc = Proc::spawn(command);
        Self { host, name: name.to_owned(), proc }
    }

    /// Runs the operator's tool on this host.
    pub fn ctl(&self, args: &[&str]) -> Output {
        super::process::run(self.host.command(tngctl(), args))
    }

    /// An instance that the test started in a way of its own.
    pub fn adopt(host: &'a Host, name: &str, proc: Proc) -> Self {
        Self { host, name: name.to_owned(), proc }
    }

    /// Waits until it is ready.
    #[track_caller]
    pub fn wait_ready(&self) {
        if !wait_until(START, || self.is_ready()) {
            panic!("instance {} is not ready:\n{}", self.name, self.output());
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        self.proc.wait(STOP)
    }

    /// Whether the control socket says that it is ready.
    pub fn is_ready(&self) -> bool {
        self.get("/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// What the control socket answers to a GET.
    pub fn get(&self, path: &str) -> Option<String> {
        let socket = self.host.runtime_dir().join(&self.name).join("control.sock");
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: tng\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// All that the daemon wrote.
    pub fn output(&self) -> String {
        self.proc.output()
    }

    /// Its exit status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.proc.exited()
    }

    /// Replaces the configuration file; a reload is the caller's.
    pub fn write_config(&self, toml: &str) {
        std::fs::write(self.host.config_dir().join(format!("{}.toml", self.name)), toml).expect("write");
    }

    /// Sends a signal to the daemon's first process.
    pub fn signal(&self, signal: Signal) {
        self.proc.signal(signal);
    }

    /// Stops it as an operator does, and waits for its end.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.proc.signal(Signal::SIGTERM);
        self.proc.wait(STOP)
    }

    /// Kills every process of it, so nothing can tidy up.
    pub fn kill(&mut self) {
        for pid in self.pids() {
            send(pid, Signal::SIGKILL);
        }
        wait_until(STOP, || self.pids().is_empty());
    }

    /// Kills the data plane alone.
    pub fn kill_data_plane(&self) {
        for pid in self.pids().into_iter().filter(|pid| !may_change_rules(*pid)) {
            send(pid, Signal::SIGKILL);
        }
    }

    /// Stops the clock of whatever could put rules back, so a test sees what the rules alone do.
    pub fn freeze_guard(&self) {
        for pid in self.pids().into_iter().filter(|pid| may_change_rules(*pid)) {
            send(pid, Signal::SIGSTOP);
        }
    }

    /// Lets it go on.
    pub fn thaw_guard(&self) {
        for pid in self.keepers() {
            send(pid, Signal::SIGCONT);
        }
    }

    /// Stops the clock of the data plane: it accepts and answers nothing.
    pub fn freeze_data_plane(&self) {
        for pid in self.data_plane() {
            send(pid, Signal::SIGSTOP);
        }
    }

    /// Its processes that hold CAP_NET_ADMIN: the keepers of rules and guard.
    pub fn keepers(&self) -> Vec<i32> {
        self.pids().into_iter().filter(|pid| may_change_rules(*pid)).collect()
    }

    /// Its processes that may not change rules: the data plane.
    pub fn data_plane(&self) -> Vec<i32> {
        self.pids().into_iter().filter(|pid| !may_change_rules(*pid)).collect()
    }

    /// Its first process and all that descend from it.
    fn pids(&self) -> Vec<i32> {
        family(self.proc.pid())
    }
}

/// An instance whose commands a test runs one by one, as systemd's units do.
pub struct Parts<'a> {
    host: &'a Host,
    name: String,
    file: String,
}

impl<'a> Parts<'a> {
    /// Writes the configuration; nothing runs yet.
    pub fn new(host: &'a Host, name: &str, toml: &str) -> Self {
        let file = host.config_dir().join(format!("{name}.toml"));
        std::fs::write(&file, toml).expect("write the configuration");
        Self { host, name: name.to_owned(), file: file.to_string_lossy().into_owned() }
    }

    /// `tngd net up`, to its end.
    #[track_caller]
    pub fn net_up(&self) {
        super::process::run(self.host.command(tngd(), &["net", "up", &self.file])).expect_ok();
    }

    /// `tngd net down`, to its end.
    #[track_caller]
    pub fn net_down(&self) {
        super::process::run(self.host.command(tngd(), &["net", "down", &self.file])).expect_ok();
    }

    /// `tngd guard`, once its table is there.
    #[track_caller]
    pub fn guard(&self) -> Proc {
        let guard = Proc::spawn(self.host.command(tngd(), &["guard", &self.file]));
        let table = format!("table inet tngguard_{}", self.name);
        if !wait_until(START, || self.host.run("nft", &["list", "tables"]).stdout.contains(&table)) {
            panic!("no {table}:\n{}", guard.output());
        }
        guard
    }

    /// `tngd serve`, once it is ready.
    #[track_caller]
    pub fn serve(&self) -> Tng<'a> {
        let proc = Proc::spawn(self.host.command(tngd(), &["serve", &self.file]));
        let tng = Tng { host: self.host, name: self.name.clone(), proc };
        if !wait_until(START, || tng.is_ready()) {
            panic!("serve is not ready:\n{}", tng.output());
        }
        tng
    }
}

/// Runs a command of the daemon on a host to its end.
pub fn run_tngd(host: &Host, args: &[&str]) -> Output {
    super::process::run(host.command(tngd(), args))
}

/// Runs the operator's tool on a host to its end.
pub fn run_tngctl(host: &Host, args: &[&str]) -> Output {
    super::process::run(host.command(tngctl(), args))
}

/// Kills a process and all that descend from it.
pub fn kill_family(proc: &Proc) {
    for pid in family(proc.pid()) {
        send(pid, Signal::SIGKILL);
    }
    wait_until(STOP, || family(proc.pid()).is_empty());
}

/// A process and all that descend from it, without the dead.
fn family(root: i32) -> Vec<i32> {
    let mut family = vec![root];
    let mut at = 0;
    while at < family.len() {
        family.extend(children(family[at]));
        at += 1;
    }
    family.retain(|pid| is_alive(*pid));
    family
}

fn send(pid: i32, signal: Signal) {
    // ESRCH: it ended by itself in the meantime.
    let _ = kill(Pid::from_raw(pid), signal);
}

/// Children of a process. (`/proc/PID/task/*/children` needs a kernel option; PPid does not.)
fn children(pid: i32) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|child| status_field(*child, "PPid").as_deref() == Some(&pid.to_string())).collect()
}

/// A field of /proc/PID/status.
fn status_field(pid: i32, field: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Neither gone nor a zombie.
fn is_alive(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

/// Whether the process holds CAP_NET_ADMIN.
fn may_change_rules(pid: i32) -> bool {
    let effective = status_field(pid, "CapEff").and_then(|hex| u64::from_str_radix(&hex, 16).ok());
    effective.is_some_and(|bits| bits & CAP_NET_ADMIN != 0)
}
