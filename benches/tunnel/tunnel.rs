//! A tunnel: both ends of one peer between a port of ours and a target port.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::certs::Certs;
use crate::load;
use crate::peers::{End, Peer, Ports};
use crate::process::{Process, Weight};
use crate::sink::Sink;
use crate::{Outcome, process};

/// How long a fresh end may take until a connection passes through it.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// Where this run's files are, for [`remove_files`].
static DIR: OnceLock<PathBuf> = OnceLock::new();

/// Removes the files of an interrupted run, private keys among them. For the ways out that run no `Drop`.
pub fn remove_files() {
    if let Some(dir) = DIR.get() {
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// What all measurements share: the service, the certificates, a place for files.
pub struct Lab {
    /// The service behind every tunnel.
    pub sink: Sink,
    /// This run's certificates.
    pub certs: Certs,
    dir: tempfile::TempDir,
    started: AtomicU32,
}

impl Lab {
    /// Starts the service and makes the certificates.
    pub fn new(runtime: &tokio::runtime::Runtime) -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("tng-bench-").tempdir()?;
        DIR.get_or_init(|| dir.path().to_owned());
        let certs = Certs::generate(dir.path())?;
        Ok(Self { sink: Sink::start(runtime)?, certs, dir, started: AtomicU32::new(0) })
    }

    /// Starts one end that connects to `target` and waits until its listener accepts.
    /// A port that was free when asked for may be taken by the time the end binds it, so there are three attempts.
    pub fn start_end(&self, peer: Peer, end: End, target: u16) -> Outcome<RunningEnd> {
        let mut last = String::new();
        for _ in 0..3 {
            let ports = Ports { listen: free_port()?, target };
            let dir = self.fresh_dir(peer)?;
            let command = peer.command(end, ports, &dir, &self.certs)?;
            let mut running = RunningEnd { process: Process::start(command, &dir)?, port: ports.listen };
            match running.wait_until_it_accepts() {
                Ok(()) => return Ok(running),
                Err(error) => last = error.to_string(),
            }
        }
        Err(last.into())
    }

    /// Starts both ends of `peer` before the service and waits until a message was echoed through them.
    pub fn start_tunnel(&self, peer: Peer) -> Outcome<Tunnel> {
        if peer == Peer::Direct {
            return Ok(Tunnel { addr: self.sink.addr(), ends: Vec::new() });
        }
        let server = self.start_end(peer, End::Server, self.sink.addr().port())?;
        let client = self.start_end(peer, End::Client, server.port)?;
        let tunnel = Tunnel { addr: client.addr(), ends: vec![client, server] };
        tunnel.wait_until_it_echoes()?;
        Ok(tunnel)
    }

    fn fresh_dir(&self, peer: Peer) -> Outcome<PathBuf> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let dir = self.dir.path().join(format!("{number}-{peer}"));
        std::fs::create_dir(&dir)?;
        Ok(dir)
    }
}

/// One end that accepts connections.
pub struct RunningEnd {
    process: Process,
    /// Where it listens on 127.0.0.1.
    pub port: u16,
}

impl RunningEnd {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// What it printed last, for messages.
    pub fn last_words(&self) -> String {
        self.process.last_words()
    }

    fn wait_until_it_accepts(&mut self) -> Outcome<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while std::net::TcpStream::connect(self.addr()).is_err() {
            if self.process.has_ended() {
                return Err(format!("ended at its start:\n  {}", self.last_words()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("does not listen after {READY_WITHIN:?}:\n  {}", self.last_words()).into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Both ends, or none for the direct path.
pub struct Tunnel {
    /// Where clients connect.
    pub addr: SocketAddr,
    ends: Vec<RunningEnd>,
}

impl Tunnel {
    /// A tunnel of ends that were started one by one.
    pub fn of(client: RunningEnd, server: RunningEnd) -> Outcome<Self> {
        let tunnel = Self { addr: client.addr(), ends: vec![client, server] };
        tunnel.wait_until_it_echoes()?;
        Ok(tunnel)
    }

    /// CPU time and memory of both ends.
    pub fn weight(&self) -> Outcome<Weight> {
        let mut sum = Weight::default();
        for end in &self.ends {
            let process::Weight { cpu_seconds, resident_kib } = end.process.weight()?;
            sum.cpu_seconds += cpu_seconds;
            sum.resident_kib += resident_kib;
        }
        Ok(sum)
    }

    /// What both ends printed last.
    pub fn last_words(&self) -> String {
        self.ends.iter().map(RunningEnd::last_words).collect::<Vec<_>>().join("\n  -- other end:\n  ")
    }

    fn wait_until_it_echoes(&self) -> Outcome<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            match load::echo_once(self.addr, 64) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("nothing passes: {error}\n  {}", self.last_words()).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// A port of 127.0.0.1 that nobody listens on now.
fn free_port() -> Outcome<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
