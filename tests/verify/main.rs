//! `tngctl verify` and `tngctl attest` as an operator runs them, against peers and services of the tests.
#![allow(dead_code, missing_docs)]

#[path = "../common/tls.rs"]
mod common;
#[path = "../fakes/mod.rs"]
mod fakes;
#[path = "../common/mod.rs"]
mod plane;
#[path = "../common/raw.rs"]
mod raw;
#[path = "../fakes/swtpm.rs"]
mod swtpm;

mod appraisals;
mod egress;
mod host;
mod peers;
mod references;
mod roles;
mod saved;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tng::config::Ra;
use tng::tls::EndpointTls;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

/// What a run of `tngctl` left.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {} {}", self.out, self.err))
    }
    /// State and reason of a check.
    pub fn check(&self, id: &str) -> (String, Option<String>) {
        let json = self.json();
        let all = json["checks"].as_array().unwrap();
        let one = all.iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("no check {id}: {all:#?}"));
        (one["state"].as_str().unwrap().to_owned(), one["reason"].as_str().map(str::to_owned))
    }
    /// Id and reason of the check that failed first, as the verdict names it.
    pub fn failed(&self) -> (String, String) {
        let verdict = &self.json()["verdict"];
        let text = |key: &str| verdict[key].as_str().unwrap_or("none").to_owned();
        (text("failed"), text("reason"))
    }
}

/// Runs `tngctl` with these arguments; it has to end by itself.
pub async fn tngctl(args: &[&str]) -> Ran {
    let run = Command::new(env!("CARGO_BIN_EXE_tngctl"))
        .args(args)
        .env("TNG_CONFIG_DIR", "/nonexistent")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let out = tokio::time::timeout(Duration::from_secs(90), run).await.expect("tngctl hangs").expect("tngctl");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ran { code: out.status.code().expect("no signal"), out: text(out.stdout), err: text(out.stderr) }
}

/// `tngctl verify --json ADDR ARGS`.
pub async fn verify(addr: SocketAddr, args: &[&str]) -> Ran {
    let addr = addr.to_string();
    tngctl(&[&["verify", "--json", &addr][..], args].concat()).await
}

pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// Long enough for a machine that does much else.
pub const PATIENT: Duration = Duration::from_secs(30);

/// An endpoint with these roles.
pub fn endpoint(ra: Ra) -> Arc<EndpointTls> {
    common::endpoint_within(ra, PATIENT)
}

/// The same that speaks RATS-TLS alone.
pub fn rats_tls(ra: Ra) -> Arc<EndpointTls> {
    EndpointTls::rats_tls_only(&common::config(ra, PATIENT), Arc::new(tng::os::clock::SystemClock)).unwrap()
}

/// An egress: accepts, appraises, and reads what comes until the end.
pub async fn serves(endpoint: Arc<EndpointTls>) -> SocketAddr {
    let (listener, addr) = listen().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let endpoint = endpoint.clone();
            tokio::spawn(async move {
                if let Ok(mut channel) = endpoint.accept(tcp).await {
                    let _ = channel.stream.read_to_end(&mut Vec::new()).await;
                }
            });
        }
    });
    addr
}

/// A server that does `then` with each connection.
pub async fn server<F>(then: impl Fn(TcpStream) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, addr) = listen().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(then(tcp));
        }
    });
    addr
}

/// A configuration file with one ingress that has these tables.
pub fn instance(dir: &Path, name: &str, tables: &str) -> String {
    let file = dir.join(format!("{name}.toml"));
    let text = format!(
        "[[ingress]]\nname = \"one\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:2\"\n{tables}"
    );
    std::fs::write(&file, text).unwrap();
    file.to_string_lossy().into_owned()
}
