//! The data plane: all endpoints of an instance, started, reloaded and drained together.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::capture::counted;
use crate::config::{Config, Endpoint, EndpointName, Mode};
use crate::relay::{Dialer, LivePorts, MarkPolicy, TunnelSide, probe_mark};
use crate::tls::{ChannelError, EndpointTls};

use super::connections::Connections;
use super::dataplane_error::DataPlaneError;
use super::endpoint::EndpointRuntime;
use super::gate::Gate;
use super::lineage::{Heir, Lineage};
use super::listeners::BoundListener;
use super::memory::give_memory_back;
use super::metrics::Metrics;
use super::scraped::Reading;
use super::stats::EndpointStats;
use super::status::{ConnectionsReport, EndpointView, ListenerView, unix_seconds};
use super::worker::{Listening, Worker};
use crate::instance::paths::Paths;
use crate::os::lock::Lock;

/// How long aborted connections may take to write their records.
const ABORT_GRACE: Duration = Duration::from_secs(2);
/// Connections listed at most; a status answer must stay readable and bounded.
const MAX_LISTED: usize = 10_000;

/// Makes an endpoint's end of the tunnel. Tests put their own.
pub type TunnelFactory = dyn Fn(&Endpoint) -> Result<Arc<dyn TunnelSide>, ChannelError> + Send + Sync;

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainOutcome {
    /// Connections that ended by themselves.
    pub finished: usize,
    /// Connections that were reset at the deadline.
    pub aborted: usize,
}

/// All endpoints of an instance. Share it in an [`Arc`].
pub struct DataPlane {
    factory: Box<TunnelFactory>,
    metrics: Metrics,
    connections: Arc<Connections>,
    stats: Mutex<Vec<Arc<EndpointStats>>>,
    workers: Mutex<Vec<Arc<Worker>>>,
    lineage: Lineage,
    /// One take-over at a time.
    reloading: Mutex<()>,
    config: ArcSwap<(Config, SystemTime)>,
    tracker: TaskTracker,
    stopping: CancellationToken,
    abort: CancellationToken,
}

impl DataPlane {
    /// Starts to serve. Call it within the runtime that will run the connections.
    ///
    /// # Errors
    /// See [`DataPlaneError`]; nothing runs then.
    pub fn start(config: &Config, listeners: Vec<BoundListener>) -> Result<Arc<Self>, DataPlaneError> {
        Self::start_with(
            config,
            listeners,
            Box::new(|endpoint| EndpointTls::new(endpoint).map(|tls| tls as Arc<dyn TunnelSide>)),
        )
    }

    /// [`DataPlane::start`] with another end of the tunnel.
    ///
    /// # Errors
    /// As [`DataPlane::start`].
    pub fn start_with(
        config: &Config,
        listeners: Vec<BoundListener>,
        factory: Box<TunnelFactory>,
    ) -> Result<Arc<Self>, DataPlaneError> {
        let plane = Arc::new(Self {
            factory,
            metrics: Metrics::new(),
            connections: Arc::default(),
            stats: Mutex::default(),
            workers: Mutex::default(),
            lineage: Lineage::default(),
            reloading: Mutex::default(),
            config: ArcSwap::from_pointee((config.clone(), SystemTime::now())),
            tracker: TaskTracker::new(),
            stopping: CancellationToken::new(),
            abort: CancellationToken::new(),
        });
        plane.apply(config, listeners, &HashSet::new())?;
        tokio::spawn(give_memory_back(Arc::downgrade(&plane), plane.stopping.clone()));
        Ok(plane)
    }

    /// Takes over a new configuration with the whole set of its listeners. An endpoint that did not
    /// change, nor the files it names, is left alone; a changed one gets new settings for new connections, and the
    /// peers of its open ones are judged by them; a removed one accepts no more. A listener that is already served (same endpoint and address) may be given
    /// again as a duplicate, see [`DataPlane::listeners`]; the one in use is kept.
    ///
    /// # Errors
    /// See [`DataPlaneError`]; the old configuration goes on then.
    pub fn reload(&self, config: &Config, listeners: Vec<BoundListener>) -> Result<(), DataPlaneError> {
        self.apply(config, listeners, &HashSet::new())
    }

    /// [`DataPlane::reload`] that lets go of the listeners at `lent` addresses without ending them, when no endpoint
    /// asks for them any more: they belong to a socket unit, which takes their end for its own failure.
    ///
    /// # Errors
    /// As [`DataPlane::reload`].
    pub fn reload_beside(
        &self,
        config: &Config,
        listeners: Vec<BoundListener>,
        lent: &HashSet<SocketAddr>,
    ) -> Result<(), DataPlaneError> {
        self.apply(config, listeners, lent)
    }

    fn apply(
        &self,
        config: &Config,
        listeners: Vec<BoundListener>,
        lent: &HashSet<SocketAddr>,
    ) -> Result<(), DataPlaneError> {
        let _one = self.reloading.locked();
        let old = self.workers();
        let held = |listener: &BoundListener| {
            let worker = old.iter().find(|w| w.name == listener.endpoint)?;
            worker.listeners().iter().find(|l| l.local == listener.local).cloned()
        };

        // Everything that can fail comes first, so that a failure leaves the old state untouched.
        let mut sets: Vec<Vec<Arc<Listening>>> = config.endpoints.iter().map(|_| Vec::new()).collect();
        for listener in listeners {
            let Some(index) = config.endpoints.iter().position(|e| e.name == listener.endpoint) else {
                return Err(DataPlaneError::StrayListener { endpoint: listener.endpoint, local: listener.local });
            };
            let listening = match held(&listener) {
                Some(held) => held,
                None => Arc::new(listen(listener)?),
            };
            sets[index].push(listening);
        }
        let mut next = Vec::new();
        for (endpoint, listeners) in config.endpoints.iter().zip(sets) {
            if listeners.is_empty() {
                return Err(DataPlaneError::NoListener(endpoint.name.clone()));
            }
            let worker = old.iter().find(|w| w.name == endpoint.name && w.runtime().endpoint.side == endpoint.side);
            let runtime = self.runtime(endpoint, worker.map(|w| w.runtime()))?;
            next.push((worker.cloned(), runtime, listeners));
        }

        let mut served: HashSet<SocketAddr> = next.iter().flat_map(|(.., set)| set.iter().map(|l| l.local)).collect();
        served.extend(lent);
        for worker in &old {
            close(&worker.listeners(), &served);
            if !next.iter().any(|(kept, ..)| kept.as_ref().is_some_and(|k| Arc::ptr_eq(k, worker))) {
                worker.remove();
            }
        }
        let heirs: Vec<_> = next.iter().map(|(_, runtime, listeners)| Heir::of(runtime, listeners)).collect();
        self.lineage.hand_over(&heirs);
        next.iter().for_each(|(_, runtime, _)| runtime.tunnel.reloaded());
        // Handshakes under way may still be made by those that were replaced.
        old.iter().for_each(|worker| worker.runtime().tunnel.reloaded());
        let workers = next
            .into_iter()
            .map(|(worker, runtime, listeners)| match worker {
                Some(worker) => {
                    worker.replace(runtime, listeners);
                    worker
                }
                None => Worker::start(runtime, listeners),
            })
            .collect();
        *self.workers.locked() = workers;
        self.config.store(Arc::new((config.clone(), SystemTime::now())));
        Ok(())
    }

    /// The runtime of `endpoint`: the old one when nothing changed, else a new one that keeps the
    /// counters, and the TLS side with its verdict cache when that did not change.
    fn runtime(
        &self,
        endpoint: &Endpoint,
        old: Option<Arc<EndpointRuntime>>,
    ) -> Result<Arc<EndpointRuntime>, DataPlaneError> {
        if let Some(old) = &old
            && old.endpoint == *endpoint
            && !old.tunnel.is_stale()
        {
            return Ok(old.clone());
        }
        let dialer = Dialer {
            mark: mark_policy(endpoint)?,
            connect_timeout: endpoint.limits.connect_timeout,
            unacknowledged_timeout: endpoint.limits.unacknowledged_timeout,
        };
        let same_tls = |old: &&Arc<EndpointRuntime>| {
            old.endpoint.ra == endpoint.ra && old.endpoint.limits == endpoint.limits && !old.tunnel.is_stale()
        };
        let tunnel = match old.as_ref().filter(same_tls) {
            Some(old) => old.tunnel.clone(),
            None => (self.factory)(endpoint)
                .map_err(|error| DataPlaneError::Tls { endpoint: endpoint.name.clone(), error })?,
        };
        let (stats, gate, handshakes, live_ports) = match &old {
            Some(old) => (old.stats.clone(), old.gate.clone(), old.handshakes.clone(), old.live_ports.clone()),
            None => {
                (self.stats_of(endpoint), Gate::new(endpoint.limits.max_connections), Arc::default(), Arc::default())
            }
        };
        let live_ports: Arc<LivePorts> = live_ports;
        Ok(Arc::new(EndpointRuntime {
            endpoint: endpoint.clone(),
            tunnel,
            dialer,
            stats,
            connections: self.connections.clone(),
            live_ports,
            gate,
            handshakes,
            unserved: Default::default(),
            tracker: self.tracker.clone(),
            stopping: self.stopping.clone(),
            abort: self.abort.clone(),
        }))
    }

    /// Counters are kept by name, also of an endpoint that a reload removed and another brought back.
    fn stats_of(&self, endpoint: &Endpoint) -> Arc<EndpointStats> {
        let mut all = self.stats.locked();
        if let Some(known) = all.iter().find(|s| s.name == endpoint.name && s.side == endpoint.side) {
            return known.clone();
        }
        let stats = EndpointStats::new(endpoint.name.clone(), endpoint.side, &self.metrics);
        all.push(stats.clone());
        stats
    }

    /// A number that moves with every connection and byte.
    pub(super) fn activity(&self) -> u64 {
        let stats = self.stats.locked();
        stats
            .iter()
            .map(|s| s.counters())
            .fold(0, |sum, c| sum.wrapping_add(c.connections_total).wrapping_add(c.bytes_up).wrapping_add(c.bytes_down))
    }

    fn workers(&self) -> Vec<Arc<Worker>> {
        self.workers.locked().clone()
    }

    /// Duplicates of the listeners in use.
    ///
    /// # Errors
    /// When descriptors are exhausted.
    pub fn listeners(&self) -> io::Result<Vec<BoundListener>> {
        use std::os::fd::AsFd;
        let mut all = Vec::new();
        for worker in self.workers() {
            for listening in worker.listeners().iter() {
                let fd = listening.listener.as_fd().try_clone_to_owned()?;
                all.push(BoundListener { endpoint: worker.name.clone(), local: listening.local, listener: fd.into() });
            }
        }
        Ok(all)
    }

    /// An accept-and-relay round trip through every worker.
    ///
    /// # Errors
    /// The first endpoint whose worker did not answer before `deadline` passed.
    pub async fn heartbeat(&self, deadline: Duration) -> Result<(), EndpointName> {
        let until = Instant::now() + deadline;
        let workers = self.workers();
        let beats = join_all(workers.iter().map(|w| w.heartbeat(until))).await;
        match workers.iter().zip(beats).find(|(_, beat)| !beat) {
            Some((worker, _)) => Err(worker.name.clone()),
            None => Ok(()),
        }
    }

    /// Stops accepting, lets established connections end until `deadline` has passed, then resets
    /// the rest. Both sides of those see RST: after a clean end, an idle application's next write
    /// would go out uncaptured.
    pub async fn drain(&self, deadline: Duration) -> DrainOutcome {
        let until = Instant::now() + deadline;
        let before = self.connections.len();
        self.stopping.cancel();
        for worker in self.workers() {
            worker.remove();
        }
        self.tracker.close();
        let all_ended = timeout_at(until, self.tracker.wait()).await.is_ok();
        let aborted = if all_ended { 0 } else { self.connections.len() };
        self.abort.cancel();
        if !all_ended && timeout_at(Instant::now() + ABORT_GRACE, self.tracker.wait()).await.is_err() {
            tracing::error!(open = self.connections.len(), "connections outlive their abort");
        }
        DrainOutcome { finished: before.saturating_sub(aborted), aborted }
    }

    /// Whether [`DataPlane::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Connections open now.
    pub fn open_connections(&self) -> usize {
        self.connections.len()
    }

    /// The configuration in force, and since when.
    pub fn config(&self) -> Arc<(Config, SystemTime)> {
        self.config.load_full()
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The metrics as text, with what the tunnels count themselves.
    ///
    /// # Errors
    /// As [`Metrics::encode`].
    pub fn metrics_text(&self) -> Result<String, std::fmt::Error> {
        let read = |worker: &Arc<Worker>| {
            let runtime = worker.runtime();
            let (endpoint, side) = (worker.name.to_string(), runtime.endpoint.side);
            let (status, verdict_age) = (runtime.tunnel.status(), runtime.stats.verdict_age());
            self.metrics.attestation(&endpoint, side, &status);
            let bound = worker.bound();
            runtime.stats.metrics.bound(&bound);
            Reading { endpoint, side: side.to_string(), status, verdict_age, now: unix_seconds(SystemTime::now()) }
        };
        self.metrics.read(self.workers().iter().map(read).collect());
        let config = self.config();
        let captures = config.0.endpoints.iter().filter(|e| matches!(e.mode, Mode::Netfilter(_)));
        let captured: Vec<_> = captures.map(|e| (e.name.to_string(), e.side.to_string())).collect();
        let counts = if captured.is_empty() { None } else { counted::read(&Paths::current(), &config.0.instance) };
        self.metrics.kernel(captured, counts);
        self.metrics.encode()
    }

    /// What keeps endpoints from serving though they accept, in words: evidence that cannot be had, or that peers refuse.
    pub fn problems(&self) -> Vec<String> {
        let full = self.workers().into_iter().flat_map(|worker| worker.full());
        let unusable = self.workers().into_iter().filter_map(|worker| {
            let status = worker.runtime().tunnel.status();
            let attest = status.get("attest")?;
            // Without a reason nothing has failed: the first evidence is being made, and handshakes wait for it.
            let failing = attest.get("usable")? == false && attest.get("reason").is_some_and(|r| r.is_string());
            let degraded = attest.get("state").is_some_and(|s| s == "degraded");
            let what = match (failing, degraded) {
                (true, _) => "has no evidence to show",
                (false, true) => "is refused by its peers",
                (false, false) => return None,
            };
            let text = |field| attest.get(field).and_then(serde_json::Value::as_str).unwrap_or("unknown");
            Some(format!("endpoint {} {what}: {}: {}", worker.name, text("reason"), text("error")))
        });
        full.chain(unusable).collect()
    }

    /// The live connections.
    pub fn connections(&self) -> ConnectionsReport {
        ConnectionsReport {
            total: self.connections.len(),
            connections: self.connections.views(MAX_LISTED, self.is_draining()),
        }
    }

    /// The listeners for `status`.
    pub fn listener_views(&self) -> Vec<ListenerView> {
        let view = |worker: &Arc<Worker>| {
            let views = worker.listeners();
            let name = worker.name.to_string();
            views
                .iter()
                .map(|l| ListenerView { endpoint: name.clone(), local: l.local.to_string() })
                .collect::<Vec<_>>()
        };
        self.workers().iter().flat_map(view).collect()
    }

    /// The endpoints for `status`.
    pub fn endpoint_views(&self) -> Vec<EndpointView> {
        self.workers()
            .iter()
            .map(|worker| {
                let runtime = worker.runtime();
                let mut view = EndpointView::new(&runtime.endpoint, &runtime.stats, runtime.tunnel.status());
                view.bound = worker.bound();
                view
            })
            .collect()
    }
}

fn listen(bound: BoundListener) -> Result<Listening, DataPlaneError> {
    let BoundListener { endpoint, local, listener } = bound;
    let from_std = |listener: std::net::TcpListener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    match from_std(listener) {
        Ok(listener) => Ok(Listening { local, listener }),
        Err(error) => Err(DataPlaneError::Listener { endpoint, local, error }),
    }
}

/// Shuts down the listeners whose address is not `served` any more: others hold duplicates, and a
/// socket that still listens but is never accepted from lets clients hang instead of refusing them.
/// An address that went to another endpoint may be a duplicate of the same socket, and stays.
fn close(listeners: &[Arc<Listening>], served: &HashSet<SocketAddr>) {
    for listening in listeners.iter().filter(|l| !served.contains(&l.local)) {
        let _ = socket2::SockRef::from(&listening.listener).shutdown(std::net::Shutdown::Both);
    }
}

/// Marks are required where a capture could take our own sockets. A mapping alone also works in a
/// process without any privilege, which cannot mark.
fn mark_policy(endpoint: &Endpoint) -> Result<MarkPolicy, DataPlaneError> {
    let (mark, required) = match &endpoint.mode {
        Mode::Mapping(mapping) => (mapping.so_mark, false),
        Mode::Netfilter(netfilter) => (netfilter.so_mark, true),
    };
    match probe_mark(mark) {
        Ok(()) => Ok(MarkPolicy::Required(mark)),
        Err(error) if !required && error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(endpoint = endpoint.name.as_str(), "sockets are not marked: CAP_NET_RAW is missing");
            Ok(MarkPolicy::Unmarked)
        }
        Err(error) => Err(DataPlaneError::Mark { endpoint: endpoint.name.clone(), error }),
    }
}
