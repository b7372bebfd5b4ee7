//! `tngd serve` with its log in a file, and `tngctl` that asks it: mappings on loopback, no rules, no root needed.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// The longest that anything is waited for.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Reads OpenMetrics text with the parser of the format's reference client and prints its samples.
const PARSE: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
for family in parse(sys.stdin.read()):
    for s in family.samples:
        labels = ' '.join(f'{k}={v}' for k, v in sorted(s.labels.items()))
        print(f'{s.name} {labels} = {s.value}')
";

/// A running instance; killed when dropped.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    name: &'static str,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Writes `toml` as instance `name` below `dir` and serves it, until it says that it is ready.
    #[track_caller]
    pub fn start(dir: &Path, name: &'static str, toml: &str) -> Self {
        let file = dir.join(format!("{name}.toml"));
        std::fs::write(&file, toml).expect("write");
        let log = std::fs::File::create(dir.join(format!("{name}.log"))).expect("log");
        let child = Command::new(env!("CARGO_BIN_EXE_tngd"))
            .arg("serve")
            .arg(&file)
            .env("TNG_LOG", "trace")
            .env("TNG_RUNTIME_DIR", dir)
            .env_remove("JOURNAL_STREAM")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("tngd");
        let daemon = Self { child, dir: dir.to_owned(), name };
        let ready = || daemon.get("/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"));
        wait_for("it is ready", ready, || daemon.log());
        daemon
    }

    /// All that it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join(format!("{}.log", self.name))).expect("log")
    }

    /// The answer of its control socket, head and body.
    pub fn get(&self, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.dir.join(self.name).join("control.sock")).ok()?;
        ask(&mut stream, path)
    }

    /// `tngctl` with these words.
    pub fn tngctl(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tngctl"));
        command.args(args).env("TNG_RUNTIME_DIR", &self.dir).output().expect("tngctl")
    }

    /// What that prints.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.tngctl(args);
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }

    /// Its metrics, one sample a line: `NAME LABEL=VALUE... = VALUE`, labels sorted.
    pub fn samples(&self) -> String {
        let answer = self.get("/metrics").expect("metrics");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        assert!(head.contains("application/openmetrics-text"), "{head}");
        let mut parser = Command::new("/usr/bin/python3")
            .args(["-I", "-c", PARSE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        parser.stdin.take().expect("stdin").write_all(body.as_bytes()).expect("write");
        let out = parser.wait_with_output().expect("parser");
        assert!(out.status.success(), "not OpenMetrics, or python3-prometheus-client is not installed:\n{body}");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// All that it says to whomever.
    pub fn everything(&self) -> String {
        let mut all = self.log();
        for path in ["/status", "/connections", "/metrics", "/readyz"] {
            all.push_str(&self.get(path).unwrap_or_default());
        }
        for args in [&["status"][..], &["status", "--json"], &["connections"], &["connections", "--json"]] {
            all.push_str(&self.ctl(args));
        }
        all
    }
}

/// A GET over an open connection.
pub fn ask(stream: &mut (impl Read + Write), path: &str) -> Option<String> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Waits until `condition` holds; what `said` tells when it never does.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool, said: impl Fn() -> String) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}\n{}", said());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// An address on loopback that nobody listened on a moment ago, each call another one. Below the ports that the kernel
/// gives to clients, which could take it before the daemon does.
pub fn free_port() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = std::process::id() as u16 % 500 * 20;
    for _ in 0..20 {
        let addr = SocketAddr::from(([127, 0, 0, 1], 20_000 + own + NEXT.fetch_add(1, Ordering::Relaxed) % 20));
        if TcpListener::bind(addr).is_ok() {
            return addr;
        }
    }
    panic!("no free port of this process's own");
}

/// Whether a word sent to the echo service behind `entry` comes back.
pub fn echoes(entry: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(entry) else { return false };
    let mut answer = [0; 4];
    let _ = stream.set_read_timeout(Some(DEADLINE));
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok()
}
