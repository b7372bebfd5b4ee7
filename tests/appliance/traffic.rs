//! A client program inside a container that opens connection after connection, and counts what becomes of each.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::container::Container;
use super::netns::{wait_for, wait_until};

/// Handed over by `-c`: nothing of the tree is in the container.
const PROGRAM: &str = include_str!("traffic.py");
/// Longer than any scenario keeps a client.
const LIFE: u64 = 240;

/// What became of the connections, by outcome: `served`, `connect-ECONNREFUSED`, `timeout` and so on.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Sums {
    /// How many of each outcome.
    pub sums: BTreeMap<String, u64>,
    /// Where each outcome was seen first.
    #[serde(default)]
    pub first: BTreeMap<String, String>,
}

impl Sums {
    /// Connections that got their answer.
    pub fn served(&self) -> u64 {
        self.sums.get("served").copied().unwrap_or(0)
    }

    /// All connections.
    pub fn total(&self) -> u64 {
        self.sums.values().sum()
    }
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lost of {}", self.total() - self.served(), self.total())?;
        for (outcome, n) in self.sums.iter().filter(|(outcome, _)| *outcome != "served") {
            write!(f, ", {n} {outcome} (first {})", self.first.get(outcome).map_or("?", String::as_str))?;
        }
        Ok(())
    }
}

/// How a client goes about it.
pub struct Load {
    /// Connections in all; 0: until [`Client::finish`].
    pub count: u64,
    /// How many at once.
    pub workers: u64,
    /// How long one waits for anything, in seconds.
    pub timeout: f64,
}

impl Load {
    /// 1,000 connections by patient clients.
    pub const THOUSAND: Load = Load { count: 1000, workers: 16, timeout: 30.0 };
    /// Someone who tries all the time and gives up soon.
    pub const STEADY: Load = Load { count: 0, workers: 4, timeout: 2.0 };
    /// Someone who tries all the time and waits.
    pub const PATIENT: Load = Load { count: 0, workers: 4, timeout: 30.0 };
}

/// A running client.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    so_far: Arc<Mutex<Sums>>,
    reader: Option<JoinHandle<()>>,
}

impl Client {
    /// Starts it on `host`; every path it asks for begins with `marker`.
    pub fn start(host: &Container, targets: &[(String, u16)], marker: &str, load: &Load) -> Self {
        let options = json!({"targets": targets, "marker": marker, "count": load.count, "workers": load.workers,
            "timeout": load.timeout});
        let mut child = host.spawn_piped(LIFE, &["/usr/bin/python3", "-I", "-c", PROGRAM, &options.to_string()]);
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let so_far = Arc::new(Mutex::new(Sums::default()));
        let reader = std::thread::spawn({
            let so_far = Arc::clone(&so_far);
            move || {
                for line in stdout.lines().map_while(Result::ok) {
                    if let Ok(sums) = serde_json::from_str(&line) {
                        *so_far.lock().unwrap() = sums;
                    }
                }
            }
        });
        Self { child, stdin, so_far, reader: Some(reader) }
    }

    /// What it reported until now.
    pub fn so_far(&self) -> Sums {
        self.so_far.lock().unwrap().clone()
    }

    /// Waits until it made this many more connections.
    #[track_caller]
    pub fn wait_more(&self, n: u64) {
        let before = self.so_far().total();
        wait_for("the client goes on", Duration::from_secs(60), || self.so_far().total() >= before + n);
    }

    /// Waits until this many more were served.
    #[track_caller]
    pub fn wait_served(&self, n: u64) {
        let before = self.so_far().served();
        if !wait_until(Duration::from_secs(45), || self.so_far().served() >= before + n) {
            panic!("the client is not served any more: {}", self.so_far());
        }
    }

    /// Tells it to end, or waits for its own end where it has a count; all that became of its connections.
    #[track_caller]
    pub fn finish(mut self, counted: bool) -> Sums {
        if !counted {
            drop(self.stdin.take());
        }
        wait_for("the client ends", Duration::from_secs(120), || {
            self.child.try_wait().is_ok_and(|ended| ended.is_some())
        });
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.so_far()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The end of its input is the end of the program, wherever it is.
        drop(self.stdin.take());
        wait_until(Duration::from_secs(35), || self.child.try_wait().is_ok_and(|ended| ended.is_some()));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
