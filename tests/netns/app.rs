//! An application on a host: one python3 process that opens the sockets a test asks for.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::world::Host;

/// The program itself. It is handed over by `-c`, as an unprivileged user may not read this tree.
const PROGRAM: &str = include_str!("app.py");
/// Longer than any timeout a command carries: only a bug gets here.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// After this long without an answer, a packet counts as dropped.
pub const QUIET: Duration = Duration::from_millis(900);

/// A socket call that failed: `ECONNREFUSED`, `timeout`, `EOF` and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

/// How a client connects; the default is the plainest way.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Connect {
    /// Destination port.
    pub port: u16,
    /// SO_MARK.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mark: Option<u32>,
    /// SO_BINDTODEVICE.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Scope of a link-local destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// Source port; 0 lets the kernel choose.
    pub from_port: u16,
    /// Source address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_addr: Option<IpAddr>,
    /// SO_DONTROUTE.
    pub dontroute: bool,
    /// Multipath TCP.
    pub mptcp: bool,
    /// SCTP in place of TCP.
    pub sctp: bool,
    /// Data sent with the SYN (TCP fast open).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tfo: Option<String>,
}

type Waiting = Arc<Mutex<HashMap<u64, Sender<Value>>>>;

/// A running application program.
pub struct App {
    child: Child,
    stdin: Mutex<ChildStdin>,
    waiting: Waiting,
    next: AtomicU64,
}

impl App {
    /// Starts the program on `host`, as `uid` without any capability or as root.
    pub(super) fn start(host: &Host, uid: Option<u32>) -> Self {
        let python = ["/usr/bin/python3", "-I", "-c", PROGRAM];
        let mut command = match uid {
            None => host.command(python[0], &python[1..]),
            Some(uid) => {
                let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
                let mut args = vec![uid.as_str(), gid.as_str(), "--clear-groups"];
                args.extend(python);
                host.command("setpriv", &args)
            }
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start the application program: {e}"));
        let stdin = Mutex::new(child.stdin.take().expect("stdin"));
        let stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let waiting = Waiting::default();
        let ready = expect(&waiting, 0);
        std::thread::spawn({
            let waiting = Arc::clone(&waiting);
            move || {
                for line in stdout.lines().map_while(Result::ok) {
                    let answer: Value = serde_json::from_str(&line).expect("answer of the application program");
                    let id = answer["id"].as_u64().expect("id");
                    if let Some(to) = waiting.lock().unwrap().remove(&id) {
                        let _ = to.send(answer);
                    }
                }
            }
        });
        ready.recv_timeout(ANSWER_DEADLINE).expect("the application program does not start");
        Self { child, stdin, waiting, next: AtomicU64::new(1) }
    }

    /// One command and its answer.
    #[track_caller]
    pub fn ask(&self, mut command: Value) -> Result<Value, Fault> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        command["id"] = id.into();
        let answer = expect(&self.waiting, id);
        let line = format!("{command}\n");
        self.stdin.lock().unwrap().write_all(line.as_bytes()).expect("application program is gone");
        let answer = answer.recv_timeout(ANSWER_DEADLINE).unwrap_or_else(|_| panic!("no answer to {command}"));
        if let Some(bug) = answer["bug"].as_str() {
            panic!("{command}: {bug}");
        }
        match answer["err"].as_str() {
            Some(err) => Err(Fault(err.to_owned())),
            None => Ok(answer),
        }
    }

    /// Starts a server on `addr`; `more` adds options (see app.py). Returns its handle.
    #[track_caller]
    pub fn listen(&self, addr: IpAddr, port: u16, more: Value) -> u64 {
        let command = merged(json!({"do": "listen", "addr": addr, "port": port}), more);
        handle(&self.ask(command).unwrap_or_else(|e| panic!("cannot listen on {addr} port {port}: {e:?}")))
    }

    /// Starts a UDP server on `addr`.
    #[track_caller]
    pub fn listen_udp(&self, addr: IpAddr, port: u16) -> u64 {
        let answer = self.ask(json!({"do": "listen_udp", "addr": addr, "port": port}));
        handle(&answer.unwrap_or_else(|e| panic!("cannot listen on {addr} UDP port {port}: {e:?}")))
    }

    /// Connects to `addr`, an address or a scoped or mapped one as text. Returns its handle.
    #[track_caller]
    pub fn connect(&self, addr: &str, how: &Connect) -> Result<u64, Fault> {
        let how = serde_json::to_value(how).expect("options");
        let command = merged(json!({"do": "connect", "addr": addr, "timeout": QUIET.as_secs_f64()}), how);
        self.ask(command).map(|answer| handle(&answer))
    }

    /// Sends text over a connection.
    #[track_caller]
    pub fn send(&self, conn: u64, data: &str) -> Result<(), Fault> {
        self.ask(json!({"do": "send", "h": conn, "data": data})).map(drop)
    }

    /// Waits until a connection has received `token`.
    #[track_caller]
    pub fn recv(&self, conn: u64, token: &str, timeout: Duration) -> Result<String, Fault> {
        let command = json!({"do": "recv", "h": conn, "token": token, "timeout": timeout.as_secs_f64()});
        self.ask(command).map(|answer| answer["data"].as_str().unwrap_or_default().to_owned())
    }

    /// Sends text, unasked, over the accepted connection that once carried the request `hex`.
    /// Returns whether the kernel took it.
    #[track_caller]
    pub fn push(&self, hex: &str, data: &str) -> bool {
        let answer = self.ask(json!({"do": "push", "hex": hex, "data": data})).expect("push");
        assert_eq!(answer["conns"], 1, "one connection carried {hex}");
        answer["sent"] == 1
    }

    /// The peer's address and port of the request `hex`, if a server here received it.
    #[track_caller]
    pub fn received(&self, hex: &str) -> Option<(IpAddr, u16)> {
        let answer = self.ask(json!({"do": "received"})).expect("received");
        let all = answer["all"].as_array().expect("all").clone();
        let request = all.iter().find(|r| r["hex"] == hex)?;
        let peer = request["peer"].as_str().expect("peer").trim_start_matches("::ffff:");
        Some((peer.parse().expect("peer address"), request["port"].as_u64().expect("port") as u16))
    }

    /// Closes a connection or a listener with its connections.
    #[track_caller]
    pub fn close(&self, handle: u64) {
        let _ = self.ask(json!({"do": "close", "h": handle}));
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn expect(waiting: &Waiting, id: u64) -> Receiver<Value> {
    let (to, from) = channel();
    waiting.lock().unwrap().insert(id, to);
    from
}

fn handle(answer: &Value) -> u64 {
    answer["h"].as_u64().expect("handle")
}

fn merged(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}
