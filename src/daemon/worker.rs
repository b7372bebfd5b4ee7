//! One endpoint's accept loop over all its listeners.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config::{EndpointName, Side};
use crate::os::failpoint;
use crate::os::failpoint::Action;
use crate::relay::{ClientAddr, Flow, Leg, Meter, Outcome, Record, Refusal, RelayOptions, canonical, relay};

use super::bounds;
use super::endpoint::{Accepted, EndpointRuntime};
use super::gate::Permit;
use super::status::{BoundView, unix_seconds};
use crate::os::sys;

const BACKOFF_FIRST: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// How often to look whether a bound is reached.
const LOOK: Duration = Duration::from_secs(1);

/// Each heartbeat carries its number, so that no late answer is taken for a later one's.
static BEATS: AtomicU64 = AtomicU64::new(1);

/// A listener in use.
pub(super) struct Listening {
    pub local: SocketAddr,
    pub listener: TcpListener,
}

/// An endpoint that accepts. Dropping the data plane's `stopping` token ends its loop.
pub(super) struct Worker {
    pub name: EndpointName,
    runtime: ArcSwap<EndpointRuntime>,
    listeners: ArcSwap<Vec<Arc<Listening>>>,
    changed: Notify,
    probes: mpsc::Sender<DuplexStream>,
    /// Whether the loop holds a free place for the next connection. It counts as taken at the gate and is not.
    holds: AtomicBool,
    /// Ends this worker alone, when a reload removes its endpoint.
    removed: CancellationToken,
}

impl Worker {
    /// Starts the loop.
    pub(super) fn start(runtime: Arc<EndpointRuntime>, listeners: Vec<Arc<Listening>>) -> Arc<Self> {
        let (probes, inbox) = mpsc::channel(4);
        let worker = Arc::new(Self {
            name: runtime.endpoint.name.clone(),
            removed: runtime.stopping.child_token(),
            runtime: ArcSwap::new(runtime.clone()),
            listeners: ArcSwap::from_pointee(listeners),
            changed: Notify::new(),
            probes,
            holds: AtomicBool::new(false),
        });
        runtime.tracker.spawn(worker.clone().run(inbox));
        worker
    }

    pub(super) fn runtime(&self) -> Arc<EndpointRuntime> {
        self.runtime.load_full()
    }

    /// The bounds on its connections, and who is beyond them.
    pub(super) fn bound(&self) -> BoundView {
        let runtime = self.runtime();
        // An ingress accepts nothing beyond its bound: the kernel has it.
        let (queued, held) = match runtime.endpoint.side {
            Side::Ingress => {
                let queue = |l: &Arc<Listening>| sys::listen_queue(l.listener.as_fd()).unwrap_or(0);
                let is_reached = runtime.gate.reached().since.is_some();
                let queued = if is_reached { self.listeners().iter().map(queue).sum() } else { 0 };
                (queued, usize::from(self.holds.load(Ordering::Relaxed)))
            }
            Side::Egress => (runtime.gate.waiting() as u64, 0),
        };
        bounds::view(&runtime, queued, held)
    }

    /// Bounds that are reached for long, in words.
    pub(super) fn full(&self) -> Vec<String> {
        bounds::full(self.name.as_str(), &self.bound(), unix_seconds(SystemTime::now()))
    }

    pub(super) fn listeners(&self) -> Arc<Vec<Arc<Listening>>> {
        self.listeners.load_full()
    }

    /// New settings for connections accepted from now on.
    pub(super) fn replace(&self, runtime: Arc<EndpointRuntime>, listeners: Vec<Arc<Listening>>) {
        runtime.gate.set_limit(runtime.endpoint.limits.max_connections);
        self.runtime.store(runtime);
        self.listeners.store(Arc::new(listeners));
        self.changed.notify_one();
    }

    /// No more connections; the listeners are let go. Established ones go on.
    pub(super) fn remove(&self) {
        self.removed.cancel();
        self.listeners.store(Arc::default());
    }

    /// A probe goes in where connections do and comes back through the same relay.
    pub(super) async fn heartbeat(&self, deadline: Instant) -> bool {
        let beat = async {
            let (mut near, far) = duplex(64);
            self.probes.send(far).await.ok()?;
            let sent = BEATS.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            near.write_all(&sent).await.ok()?;
            near.shutdown().await.ok()?;
            let mut answer = Vec::new();
            near.take(64).read_to_end(&mut answer).await.ok()?;
            (answer == sent).then_some(())
        };
        matches!(timeout_at(deadline, beat).await, Ok(Some(())))
    }

    async fn run(self: Arc<Self>, mut probes: mpsc::Receiver<DuplexStream>) {
        let failpoint = format!("worker.{}.accept", self.name);
        let mut permit: Option<Permit> = None;
        let mut backoff = Backoff::default();
        let mut turn = 0usize;
        let mut told = bounds::Told::default();
        let mut look = tokio::time::interval(LOOK);
        loop {
            if failpoint::at(&failpoint) == Some(Action::Stall) {
                self.removed.cancelled().await;
            }
            self.holds.store(permit.is_some(), Ordering::Relaxed);
            let listeners = self.listeners.load_full();
            let gate = self.runtime.load().entrance().clone();
            tokio::select! {
                biased;
                _ = self.removed.cancelled() => break,
                // A place taken under the old bound is given back, so that a lower one holds at once.
                _ = self.changed.notified() => permit = None,
                Some(probe) = probes.recv() => self.answer(probe),
                _ = look.tick() => told.warn(self.name.as_str(), &self.bound()),
                _ = sleep_until(backoff.until), if backoff.waiting => backoff.waiting = false,
                entered = gate.enter(), if permit.is_none() => {
                    gate.left();
                    permit = Some(entered);
                }
                result = accept(&listeners, &mut turn), if permit.is_some() && !backoff.waiting => match result {
                    Ok((tcp, client, listener)) => {
                        backoff.reset(&self.name);
                        if let Some(permit) = permit.take() {
                            self.begin(tcp, client, listener, permit);
                        }
                    }
                    Err(error) => {
                        let kind = accept_error(&error);
                        self.runtime.load().stats.metrics.accept_error(kind);
                        if kind != "client-gone" {
                            backoff.more(&self.name, &error);
                        }
                    }
                },
            }
        }
    }

    fn begin(&self, mut tcp: TcpStream, client: SocketAddr, listener: SocketAddr, permit: Permit) {
        let runtime = self.runtime.load_full();
        let client = ClientAddr(canonical(client));
        let record = Record::begin(&runtime.connections, &runtime.stats, client);
        let local = match tcp.local_addr() {
            Ok(local) => canonical(local),
            Err(error) => {
                tcp.abort();
                return record.finish(Outcome::Refused(Refusal::ClientGone(error)));
            }
        };
        crate::relay::tune(&tcp, runtime.endpoint.limits.unacknowledged_timeout);
        let live = runtime.live_ports.enter(client.0);
        let tracker = runtime.tracker.clone();
        let accepted = Accepted { tcp, client, local, listener, record, live, permit };
        tracker.spawn(async move { runtime.serve(accepted).await });
    }

    /// Relays a probe to an echo, as if it were a connection.
    fn answer(&self, mut probe: DuplexStream) {
        let runtime = self.runtime.load_full();
        let tracker = runtime.tracker.clone();
        tracker.spawn(async move {
            let (mut near, echo) = duplex(64);
            let (mut reader, mut writer) = tokio::io::split(echo);
            let (bytes, total) = (AtomicU64::new(0), Counter::default());
            let flow = Flow { connection: &bytes, endpoint: &total };
            let meter = Meter { into_tunnel: flow, out_of_tunnel: flow };
            let options = RelayOptions { idle: Some(Duration::from_secs(5)), unacknowledged: None, standing: None };
            let echoing = async {
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            };
            tokio::join!(relay(&mut probe, &mut near, options, meter, &runtime.abort), echoing);
        });
    }
}

/// The next connection of any listener; `turn` lets a busy one not starve the others.
async fn accept(listeners: &[Arc<Listening>], turn: &mut usize) -> io::Result<(TcpStream, SocketAddr, SocketAddr)> {
    std::future::poll_fn(|cx| {
        for step in 0..listeners.len() {
            let index = (*turn + step) % listeners.len();
            let listening = &listeners[index];
            if let Poll::Ready(result) = listening.listener.poll_accept(cx) {
                *turn = index + 1;
                return Poll::Ready(result.map(|(tcp, client)| (tcp, client, listening.local)));
            }
        }
        Poll::Pending
    })
    .await
}

fn accept_error(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => "descriptors-exhausted",
        Some(libc::ENOBUFS | libc::ENOMEM) => "memory-exhausted",
        // accept(2): errors of the connection that was waiting, not of the listener.
        Some(
            libc::ECONNABORTED
            | libc::EINTR
            | libc::EPROTO
            | libc::ENETDOWN
            | libc::EHOSTDOWN
            | libc::ENONET
            | libc::EHOSTUNREACH
            | libc::ENETUNREACH
            | libc::EPERM,
        ) => "client-gone",
        _ => "listener-failed",
    }
}

/// How long not to accept after a failure that the next call would only repeat.
struct Backoff {
    next: Duration,
    until: Instant,
    waiting: bool,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: BACKOFF_FIRST, until: Instant::now(), waiting: false }
    }
}

impl Backoff {
    fn more(&mut self, endpoint: &EndpointName, error: &io::Error) {
        // Once a run of failures: a flood must not fill the journal.
        if self.next == BACKOFF_FIRST {
            tracing::error!(endpoint = endpoint.as_str(), reason = accept_error(error), %error, "cannot accept");
        }
        self.until = Instant::now() + self.next;
        self.next = (self.next * 2).min(BACKOFF_MAX);
        self.waiting = true;
    }

    fn reset(&mut self, endpoint: &EndpointName) {
        if self.next != BACKOFF_FIRST {
            tracing::info!(endpoint = endpoint.as_str(), "accepting again");
            self.next = BACKOFF_FIRST;
        }
    }
}
