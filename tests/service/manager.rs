//! The service manager's part: sockets passed in, notes received.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lab::{TO_SERVER, ingress};
use super::netns::{Host, Proc, Tng, tngd, wait_until};

/// Listener port of the ingress under test.
pub const LISTEN: u16 = 7100;
/// Opens the sockets and becomes the daemon.
const EXEC: &str = include_str!("exec.py");
/// From start to the first note, and from a signal to its note.
pub const SOON: Duration = Duration::from_secs(15);

/// An ingress whose listener port is known to the socket unit.
pub fn config() -> String {
    ingress(TO_SERVER).replace("[ingress.netfilter]\n", &format!("[ingress.netfilter]\nlisten_port = {LISTEN}\n"))
}

/// What a service sent to its manager.
#[derive(Clone)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    /// All notes so far, a variable each.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// How often a variable came that begins so.
    pub fn count(&self, start: &str) -> usize {
        self.all().iter().filter(|note| note.starts_with(start)).count()
    }

    /// Waits for a note.
    #[track_caller]
    pub fn wait(&self, start: &str) {
        self.wait_count(start, 1);
    }

    /// Waits until a note came `n` times.
    #[track_caller]
    pub fn wait_count(&self, start: &str, n: usize) {
        let heard = wait_until(SOON, || self.count(start) >= n);
        assert!(heard, "not {n} times {start} among {:#?}", self.all());
    }

    /// Waits for a status that contains `part`.
    #[track_caller]
    pub fn wait_status(&self, part: &str) {
        let told = |note: &String| note.starts_with("STATUS=") && note.contains(part);
        let heard = wait_until(SOON, || self.all().iter().any(told));
        assert!(heard, "no status with {part:?} among {:#?}", self.all());
    }
}

/// `tngd serve` of instance `in` with inherited listeners and a notification socket.
pub fn serve<'a>(host: &'a Host, env: &[(&str, &str)]) -> (Tng<'a>, Notes) {
    let path = host.config_dir().with_file_name("notify.sock");
    let _ = std::fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path).expect("notification socket");
    let notes = Notes(Arc::default());
    let into = notes.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(n) = socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..n]);
            into.0.lock().unwrap().extend(text.lines().map(str::to_owned));
        }
    });
    let file = host.config_dir().join("in.toml");
    let places = format!("127.0.0.1@{LISTEN},::1@{LISTEN}");
    let daemon = tngd();
    let args = ["-I", "-c", EXEC, &places, &daemon.to_string_lossy(), "serve", &file.to_string_lossy()];
    let mut command = host.command("/usr/bin/python3", &args);
    command.env("NOTIFY_SOCKET", &path).envs(env.iter().copied());
    (Tng::adopt(host, "in", Proc::spawn(command)), notes)
}
