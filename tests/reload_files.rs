//! `tngctl reload` of a running daemon whose files have changed under unchanged names.

mod fakes;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use fakes::as_rest::{FakeAs, Mode as As};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longer than any step takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("port").port()
}

/// `tngd run` of an ingress that verifies and an egress that attests, in front of an echo.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
    entry: SocketAddr,
}

impl Daemon {
    fn start(service: &FakeAs, echo: SocketAddr) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::create_dir(dir.path().join("etc")).expect("mkdir");
        let (entry, tunnel) = (free_port(), free_port());
        let ca = dir.path().join("etc/as-ca.pem");
        std::fs::copy(fakes::fixture("as-ca.pem"), &ca).expect("copy");
        let toml = format!(
            "drain_timeout = \"1s\"\n[[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"127.0.0.1:{entry}\"\n\
             target = \"127.0.0.1:{tunnel}\"\n[ingress.verify]\nas_addr = \"{}\"\nallow_sample = true\ngrace = \"1h\"\n\
             trusted_certs = [{ca:?}]\n\
             [[egress]]\nname = \"out\"\n[egress.mapping]\nlisten = \"127.0.0.1:{tunnel}\"\ntarget = \"{echo}\"\n\
             [egress.attest]\nprovider = \"sample\"\n",
            service.url()
        );
        std::fs::write(dir.path().join("etc/pair.toml"), toml).expect("write");
        let child = command(&dir, env!("CARGO_BIN_EXE_tngd"), "run").spawn().expect("tngd");
        Self { child, dir, entry: SocketAddr::from(([127, 0, 0, 1], entry)) }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("etc/as-ca.pem")
    }

    fn ctl(&self, verb: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tngctl"));
        command.arg(verb).env("TNG_RUNTIME_DIR", self.dir.path().join("run"));
        match verb {
            "reload" => command.arg(self.dir.path().join("etc/pair.toml")),
            _ => command.arg("pair"),
        };
        command.output().expect("tngctl")
    }

    fn said(&self, verb: &str) -> String {
        String::from_utf8_lossy(&self.ctl(verb).stdout).into_owned()
    }

    /// A connection that carries bytes, as soon as one does.
    async fn open(&self) -> TcpStream {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Ok(mut stream) = TcpStream::connect(self.entry).await
                && alive(&mut stream).await
            {
                return stream;
            }
            assert!(Instant::now() < end, "nothing gets through");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until(&self, what: &str, verb: &str, holds: impl Fn(&str) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = self.said(verb);
            if holds(&said) {
                return;
            }
            assert!(Instant::now() < end, "never {what}: {said}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn command(dir: &tempfile::TempDir, program: &str, verb: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(verb).arg(dir.path().join("etc/pair.toml")).env("TNG_RUNTIME_DIR", dir.path().join("run"));
    command
}

async fn alive(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    let round = async { stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut byte).await.is_ok() };
    timeout(PATIENCE, round).await.unwrap_or(false)
}

async fn echo() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let addr = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    addr
}

fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).expect("file");
    std::fs::rename(new, file).expect("rename");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_authority_counts_from_the_reload_on_and_a_broken_one_never() {
    let service = FakeAs::start("127.0.0.1:0", As::Status("affirming")).await;
    let daemon = Daemon::start(&service, echo().await);
    let mut stream = daemon.open().await;

    replace(&daemon.ca(), "no certificate");
    let out = daemon.ctl("reload");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(78), "{said}");
    for part in ["pair.toml:11:18", "as-ca.pem", "holds no certificate"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(alive(&mut stream).await);
    daemon.until("a refused reload in the status", "status", |s| s.contains("last reload was refused")).await;
    assert!(!daemon.said("connections").contains("closing"));

    let other = rcgen::generate_simple_self_signed(vec!["other".to_owned()]).expect("certificate");
    replace(&daemon.ca(), &other.cert.pem());
    assert!(daemon.ctl("reload").status.success());
    daemon.until("closing", "connections", |s| s.contains("closing in ") && s.contains("token-untrusted-signer")).await;
    let status = daemon.said("status");
    assert!(status.contains("; connections closing in ") && status.contains(": token-untrusted-signer"), "{status}");
    assert!(alive(&mut stream).await, "cut in its grace");

    replace(&daemon.ca(), &fakes::text("as-ca.pem"));
    assert!(daemon.ctl("reload").status.success());
    daemon.until("not closing", "connections", |s| !s.contains("closing in ")).await;
    assert!(alive(&mut stream).await);
}
