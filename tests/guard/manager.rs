//! A service manager for one guard.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::netns::{Host, tngd, wait_until};

const MANAGER: &str = include_str!("manager.py");
/// From a start to READY, and from a signal to the end.
pub const SOON: Duration = Duration::from_secs(15);

/// The manager; dropping it drops the descriptors that it keeps.
pub struct Manager<'a> {
    host: &'a Host,
    file: String,
    child: Child,
    orders: ChildStdin,
    said: Arc<Mutex<Vec<String>>>,
}

impl<'a> Manager<'a> {
    /// For `tngd guard` of an instance with this configuration.
    pub fn new(host: &'a Host, name: &str, toml: &str) -> Self {
        let path = host.config_dir().with_file_name("notify.sock");
        let _ = std::fs::remove_file(&path);
        Self::at(&path.to_string_lossy(), host, name, toml)
    }

    /// The same with a notification socket of this name, which a leading `@` makes abstract.
    pub fn at(notify: &str, host: &'a Host, name: &str, toml: &str) -> Self {
        let file = host.config_dir().join(format!("{name}.toml")).to_string_lossy().into_owned();
        std::fs::write(&file, toml).expect("write the configuration");
        let daemon = tngd().to_string_lossy().into_owned();
        let mut command = host.command("/usr/bin/python3", &["-I", "-c", MANAGER, notify, &daemon, "guard", &file]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("python3");
        let said = Arc::new(Mutex::new(Vec::new()));
        let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (into, also) = (said.clone(), said.clone());
        std::thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).for_each(|l| into.lock().unwrap().push(l));
        });
        std::thread::spawn(move || {
            BufReader::new(err)
                .lines()
                .map_while(Result::ok)
                .for_each(|l| also.lock().unwrap().push(format!("err {l}")));
        });
        let orders = child.stdin.take().expect("piped");
        Self { host, file, child, orders, said }
    }

    /// Replaces the configuration.
    pub fn write_config(&self, toml: &str) {
        std::fs::write(&self.file, toml).expect("write the configuration");
    }

    fn order(&mut self, line: &str) {
        writeln!(self.orders, "{line}").expect("the manager runs");
    }

    /// All that was said.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }

    /// How often something was said that begins so.
    pub fn count(&self, start: &str) -> usize {
        self.said().iter().filter(|line| line.starts_with(start)).count()
    }

    /// Waits until something was said `n` times.
    #[track_caller]
    pub fn wait(&self, start: &str, n: usize) {
        let heard = wait_until(SOON, || self.count(start) >= n);
        assert!(heard, "not {n} times {start}: {:#?}", self.said());
    }

    /// Waits for a line that contains `part`.
    #[track_caller]
    pub fn wait_said(&self, part: &str) {
        let heard = wait_until(SOON, || self.said().iter().any(|line| line.contains(part)));
        assert!(heard, "no {part:?} in {:#?}", self.said());
    }

    /// Starts the guard with the descriptors that are kept, without waiting.
    pub fn launch(&mut self, env: &str) {
        let before = self.count("pid ");
        self.order(&format!("start {env}"));
        self.wait("pid ", before + 1);
    }

    /// The same, up to READY.
    #[track_caller]
    pub fn start(&mut self) {
        let before = self.count("note READY=1");
        self.launch("");
        self.wait("note READY=1", before + 1);
    }

    /// Process id of the guard started last.
    pub fn pid(&self) -> i32 {
        let said = self.said();
        let line = said.iter().rev().find_map(|line| line.strip_prefix("pid "));
        line.and_then(|pid| pid.parse().ok()).expect("started")
    }

    /// Sends the guard a signal and waits for its end.
    #[track_caller]
    pub fn end(&self, signal: Signal) {
        let before = self.count("exit ");
        kill(Pid::from_raw(self.pid()), signal).expect("kill");
        self.wait("exit ", before + 1);
    }

    /// What the manager does when a service has stopped and is not started again.
    pub fn drop_store(&mut self) {
        self.order("drop");
    }

    /// Names of the descriptors that are kept.
    pub fn store(&self) -> Vec<String> {
        let said = self.said();
        let last = said.iter().rev().find_map(|line| line.strip_prefix("store "));
        last.unwrap_or_default().split(' ').filter(|n| !n.is_empty()).map(str::to_owned).collect()
    }

    /// Waits until one pair of descriptors is kept, and no other.
    #[track_caller]
    pub fn wait_one_pair(&self) {
        let pair = wait_until(SOON, || self.store().len() == 2 && self.store()[0] == self.store()[1]);
        assert!(pair, "{:#?}", self.said());
    }

    /// Processes `nft -i` of the guard's host.
    pub fn nfts(&self) -> Vec<i32> {
        let interactive = |pid: &i32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.ends_with(b"nft\0-i\0")
        };
        self.host.pids().into_iter().filter(interactive).collect()
    }
}

impl Drop for Manager<'_> {
    fn drop(&mut self) {
        if self.count("pid ") > self.count("exit ") {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
