//! A log that nobody reads stops nothing: neither connections nor status nor a stop.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::netns::{Family, Host, World, tngctl, tngd, wait_for};
use super::programs::*;

/// Opens connections, eight at a time, and has a byte of each come back.
const CONNECTS: &str = r#"
import socket, sys, threading
addr, count = sys.argv[1], int(sys.argv[2])
served = []
def some():
    for _ in range(count // 8):
        sock = socket.create_connection((addr, 8080), timeout=20)
        sock.sendall(b"x"); served.append(sock.recv(1)); sock.close()
threads = [threading.Thread(target=some) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(served.count(b"x"))
"#;

const ECHO: &str = r#"
import socket, sys, threading
def serve(conn):
    while data := conn.recv(64):
        conn.sendall(data)
    conn.close()
def listen(addr):
    sock = socket.create_server((addr, 8080), backlog=512, family=socket.AF_INET6 if ":" in addr else socket.AF_INET)
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(sock.accept()[0],), daemon=True).start()
listen(sys.argv[1])
"#;

/// More records than the pipe and the queue hold together.
const MANY: &str = "2800";

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn write(host: &Host) -> String {
    let file = host.config_dir().join("in.toml");
    std::fs::write(&file, ingress(TO_SERVER, VERIFY)).expect("write");
    file.to_string_lossy().into_owned()
}

fn status(host: &Host) -> serde_json::Value {
    let out = super::netns::run(host.command(tngctl(), &["status", "--json", "in"]));
    serde_json::from_str(&out.stdout).unwrap_or_default()
}

/// Requests are served, the status answers and counts what was lost, and a stop is obeyed.
fn goes_on(world: &World, tng: &mut Running) {
    let host = &world.client;
    wait_for("ready", Duration::from_secs(20), || status(host)[0]["state"] == "ready");
    let addr = world.server.addr(Family::V4).to_string();
    let served = host.run("/usr/bin/python3", &["-I", "-c", CONNECTS, &addr, MANY]).expect_ok();
    assert_eq!(served.trim(), MANY);
    let lost = status(host)[0]["log_records_lost"].as_u64();
    assert!(lost.is_some_and(|lost| lost > 0), "{lost:?}: the log was read, and nothing is shown here");
    let text = super::netns::run(host.command(tngctl(), &["status", "in"])).expect_ok();
    assert!(text.contains("log records lost"), "{text}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(tng.0.id()).expect("pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("kill");
    let end = Instant::now() + Duration::from_secs(20);
    while tng.0.try_wait().expect("wait").is_none() {
        assert!(Instant::now() < end, "SIGTERM is not obeyed");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(tng.0.wait().expect("wait").success());
}

#[test]
fn a_full_pipe_on_standard_error_stops_nothing() {
    let world = World::new();
    let addr = world.server.addr(Family::V4).to_string();
    let _service = python(&world.server, ECHO, &[&addr]);
    let _out = super::netns::Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let file = write(&world.client);
    let mut command = world.client.command(tngd(), &["run", &file]);
    let mut child = Running(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("tngd"));
    let unread = child.0.stderr.take().expect("piped");
    goes_on(&world, &mut child);
    drop(unread);

    // A reader that comes late hears how much it missed.
    let mut child = Running(command.spawn().expect("tngd"));
    let late = child.0.stderr.take().expect("piped");
    wait_for("ready", Duration::from_secs(20), || status(&world.client)[0]["state"] == "ready");
    world.client.run("/usr/bin/python3", &["-I", "-c", CONNECTS, &addr, MANY]).expect_ok();
    let told = BufReader::new(late).lines().map_while(Result::ok).find(|line| line.contains("log-records-lost"));
    assert!(told.expect("a line about it").contains("log records lost: the log was not read"));
}

/// A journal whose socket is bound and never read, in a mount namespace of its own; then the program.
const UNREAD_JOURNAL: &str = r#"
import os, socket, sys
os.makedirs("/run/systemd/journal")
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("/run/systemd/journal/socket")
os.set_inheritable(journal.fileno(), True)
log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.dup2(log, 2)
stat = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
os.execv(sys.argv[2], sys.argv[2:])
"#;

#[test]
fn a_journal_that_is_not_read_stops_nothing() {
    let world = World::new();
    let addr = world.server.addr(Family::V4).to_string();
    let _service = python(&world.server, ECHO, &[&addr]);
    let _out = super::netns::Tng::start(&world.server, "out", &egress(8080, "", ATTEST));
    let file = write(&world.client);
    let log = world.client.dir().join("stderr").to_string_lossy().into_owned();
    let script = format!("mount -t tmpfs tmpfs /run && exec python3 -I -c '{UNREAD_JOURNAL}' \"$@\"");
    let tngd = tngd().to_string_lossy().into_owned();
    let words = ["--mount", "sh", "-c", &script, "sh", &log, &tngd, "run", &file];
    let mut command: Command = world.client.command("unshare", &words);
    command.process_group(0);
    let mut child = Running(command.stdin(Stdio::null()).spawn().expect("unshare"));
    goes_on(&world, &mut child);
}

/// A message of many lines waits once for a reader, and not once a line.
#[test]
fn a_command_whose_errors_nobody_reads_ends_soon_with_its_status() {
    let world = World::new();
    let host = &world.client;
    let file = host.config_dir().join("bad.toml");
    std::fs::write(&file, (0..40).map(|n| format!("wrong{n} = 1\n")).collect::<String>()).expect("write");
    // The pipe is full before the command writes to it.
    let script = "python3 -c 'import os; os.set_blocking(2, False)\ntry:\n  while True: os.write(2, b\"x\" * 4096)\nexcept BlockingIOError: os.set_blocking(2, True)'; exec \"$@\"";
    let (tngd, file) = (tngd().to_string_lossy().into_owned(), file.to_string_lossy().into_owned());
    let words = ["-c", script, "sh", &tngd, "run", &file];
    let mut command = host.command("sh", &words);
    let begun = Instant::now();
    let mut child = Running(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("sh"));
    let _unread = child.0.stderr.take().expect("piped");
    assert_eq!(child.0.wait().expect("wait").code(), Some(78));
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}
