//! What works without CAP_NET_RAW and what must not; what the data plane may reach of the file system.

mod common;

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::*;
use tng::config::*;
use tng::daemon::confine::confine;
use tng::daemon::handoff::{Answer, Request, call};
use tng::daemon::{BoundListener, DataPlane, DataPlaneError};
use tng::instance::Paths;
use tng::relay::TunnelSide;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Runs the body of `test` in a child without any privilege; true in that child.
fn unprivileged(test: &str) -> bool {
    let child = in_child(test);
    if child {
        let nobody = 65534;
        nix::unistd::setgroups(&[]).expect("needs root");
        nix::unistd::setresgid(nobody.into(), nobody.into(), nobody.into()).expect("needs root");
        nix::unistd::setresuid(nobody.into(), nobody.into(), nobody.into()).expect("needs root");
    }
    child
}

/// Runs the body of `test` in a child of its own; true in that child.
fn in_child(test: &str) -> bool {
    if std::env::var("TNG_TEST_CHILD").as_deref() == Ok(test) {
        return true;
    }
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--exact", test, "--test-threads=1"])
        .env("TNG_TEST_CHILD", test)
        .output()
        .expect("child");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn captured() -> (Endpoint, BoundListener) {
    let (mut endpoint, listener) = mapping("in", Side::Ingress, "192.0.2.1:1".parse().expect("address"), limits());
    endpoint.mode = Mode::Netfilter(Netfilter {
        capture: vec![Match::default()],
        exclude: Vec::new(),
        capture_local_traffic: false,
        preserve_source: false,
        preserve_source_ports: PortRange { first: 1024, last: 32767 },
        so_mark: DEFAULT_INGRESS_MARK,
        listen_port: Some(listener.local.port()),
    });
    (endpoint, listener)
}

fn try_start(endpoint: Endpoint, listener: BoundListener) -> Result<std::sync::Arc<DataPlane>, DataPlaneError> {
    let tls = PlainTls::new(&["rats-tls"]);
    let factory = Box::new(move |_: &Endpoint| Ok(tls.clone() as std::sync::Arc<dyn TunnelSide>));
    DataPlane::start_with(&config(vec![endpoint]), vec![listener], factory)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

#[test]
fn mappings_work_without_any_privilege() {
    if unprivileged("mappings_work_without_any_privilege") {
        runtime().block_on(async {
            let pair = Pair::to(echo().await);
            let mut client = pair.client().await;
            let mut byte = [0];
            client.write_all(b"x").await.expect("write");
            client.read_exact(&mut byte).await.expect("echo");
        });
    }
}

#[test]
fn captures_without_marks_are_refused_at_start() {
    if unprivileged("captures_without_marks_are_refused_at_start") {
        runtime().block_on(async {
            let (endpoint, listener) = captured();
            let Err(error) = try_start(endpoint, listener) else { panic!("started, and would capture itself") };
            assert_eq!(error.reason(), "mark-denied");
        });
    }
}

#[test]
fn a_connection_to_the_transparent_listener_itself_is_reset() {
    runtime().block_on(async {
        let (endpoint, listener) = captured();
        let local = listener.local;
        let plane = try_start(endpoint, listener).expect("needs CAP_NET_RAW");
        if let Ok(mut client) = TcpStream::connect(local).await {
            let error = client.read(&mut [0]).await.expect_err("a clean end");
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        eventually("record", || ended(&plane, "direct-to-listener") == 1).await;
    });
}

#[test]
fn confined_a_process_of_root_reads_what_serving_needs_and_writes_nothing() {
    if !in_child("confined_a_process_of_root_reads_what_serving_needs_and_writes_nothing") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let file = |name: &str| dir.path().join(name);
    std::fs::create_dir(file("etc")).expect("mkdir");
    std::fs::write(file("etc/in.toml"), "x").expect("write");
    let agent = UnixListener::bind(file("agent.sock")).expect("bind");
    let mut config = config(Vec::new());
    config.source = file("etc/in.toml");
    let denied = |what: &str, result: std::io::Result<()>| {
        let error = result.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}");
    };
    let read = |path: &Path| std::fs::read(path).map(drop);
    let write = |path: &Path| std::fs::write(path, "y");
    let parent = nix::unistd::Pid::from_raw(std::os::unix::process::parent_id().cast_signed());
    let signal = || nix::sys::signal::kill(parent, None);
    // What is refused below works before.
    read(Path::new("/etc/shadow")).expect("needs root");
    write(&file("before")).expect("write");
    signal().expect("signal");

    let confinement = confine(&Paths::current(), &config);
    assert!(confinement.landlock().starts_with("abi "), "no Landlock in this kernel: {}", confinement.landlock());
    read(&file("etc/in.toml")).expect("the configuration's directory");
    for path in ["/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/proc/self/status", "/dev/urandom"] {
        if path != "/dev/urandom" && Path::new(path).exists() {
            read(Path::new(path)).expect(path);
        }
    }
    std::fs::File::open("/dev/urandom").expect("/dev/urandom");
    UnixStream::connect(file("agent.sock")).expect("unix sockets by path");
    agent.accept().expect("accept");
    drop(std::net::ToSocketAddrs::to_socket_addrs("localhost:1").expect("names resolve"));
    for path in ["/etc/shadow", "/etc/passwd", "/etc/ssh/sshd_config", "/root/.profile", "/proc/1/cmdline"] {
        if Path::new(path).exists() {
            denied(path, read(Path::new(path)));
        }
    }
    denied("read beside the configuration", read(&file("before")));
    denied("write", write(&file("etc/in.toml")));
    denied("create", write(&file("etc/new")));
    denied("remove", std::fs::remove_file(file("before")));
    denied("mkdir", std::fs::create_dir(file("new")));
    denied("execute", Command::new("/bin/true").status().map(drop));
    if confinement.landlock() == "abi 6" {
        assert_eq!(signal(), Err(nix::errno::Errno::EPERM), "a signal to a stranger");
    }
}

/// A running `tngd run` in directories of its own.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(toml: &str) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::create_dir(dir.path().join("etc")).expect("mkdir");
        std::fs::write(dir.path().join("etc/map.toml"), toml).expect("write");
        let child = Self::spawn(&dir);
        let daemon = Self { child, dir };
        daemon.wait_ready();
        daemon
    }

    fn spawn(dir: &tempfile::TempDir) -> Child {
        Self::program(dir, env!("CARGO_BIN_EXE_tngd"), "run").spawn().expect("tngd")
    }

    fn program(dir: &tempfile::TempDir, program: &str, verb: &str) -> Command {
        let mut command = Command::new(program);
        command.arg(verb).arg(dir.path().join("etc/map.toml")).env("TNG_RUNTIME_DIR", dir.path().join("run"));
        command
    }

    fn socket(&self, file: &str) -> PathBuf {
        self.dir.path().join("run/map").join(file)
    }

    fn wait_ready(&self) {
        let end = Instant::now() + Duration::from_secs(15);
        while !self.get("/readyz").is_some_and(|a| a.starts_with("HTTP/1.1 200")) {
            assert!(Instant::now() < end, "not ready");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn get(&self, path: &str) -> Option<String> {
        use std::io::{Read, Write};
        let mut stream = UnixStream::connect(self.socket("control.sock")).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: tng\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// The data plane's own word on a configuration, past all that a command of root checks before.
    fn ask(&self, toml: &str) -> Answer {
        let source = self.dir.path().join("etc/map.toml");
        let request = Request { apply: true, source, text: toml.to_owned(), slots: None };
        call(&self.socket("handoff.sock"), &request, &[]).expect("an answer")
    }

    fn reload(&self, toml: &str) -> (bool, String) {
        std::fs::write(self.dir.path().join("etc/map.toml"), toml).expect("write");
        let out = Self::program(&self.dir, env!("CARGO_BIN_EXE_tngctl"), "reload").output().expect("tngctl");
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    }

    fn end(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn the_running_data_plane_of_root_cannot_read_shadow_and_a_reload_says_why() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("port").port();
    let with = |verify: &str| {
        format!(
            "drain_timeout = \"1s\"\n[[ingress]]\nname = \"map\"\n[ingress.mapping]\nlisten = \"127.0.0.1:{port}\"\n\
             target = \"192.0.2.1:1\"\n[ingress.verify]\n{verify}\n"
        )
    };
    let anchors = |file: &Path| {
        with(&format!("as_addr = \"https://as.example/\"\npolicy_ids = [\"default\"]\ntrusted_certs = [{file:?}]"))
    };
    let sample = with("provider = \"sample\"\nallow_sample = true");
    let mut daemon = Daemon::start(&sample);
    let status = daemon.get("/status").expect("status");
    assert!(status.contains("\"confinement\":{\"landlock\":\"abi "), "{status}");

    let error = daemon.ask(&anchors(Path::new("/etc/shadow"))).error.expect("refused");
    for part in ["/etc/shadow", "Permission denied", "Landlock", "systemctl restart tng@map"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let elsewhere = tempfile::tempdir().expect("directory");
    let ca = elsewhere.path().join("ca.pem");
    let key = rcgen::KeyPair::generate().expect("key");
    let pem = rcgen::CertificateParams::default().self_signed(&key).expect("certificate").pem();
    std::fs::write(&ca, &pem).expect("write");
    let (ok, said) = daemon.reload(&anchors(&ca));
    assert!(!ok && said.contains("Landlock") && said.contains("restart"), "{said}");
    let status = daemon.get("/status").expect("status");
    assert!(status.contains("\"verify\":\"sample\""), "it changed something: {status}");

    // Beside its own file it may be new, and elsewhere it may be after a restart.
    let beside = daemon.dir.path().join("etc/ca.pem");
    std::fs::write(&beside, &pem).expect("write");
    let (ok, said) = daemon.reload(&anchors(&beside));
    assert!(ok, "{said}");
    daemon.end();
    std::fs::write(daemon.dir.path().join("etc/map.toml"), anchors(&ca)).expect("write");
    daemon.child = Daemon::spawn(&daemon.dir);
    daemon.wait_ready();
}
