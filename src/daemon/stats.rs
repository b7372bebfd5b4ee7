//! What one endpoint has done since the daemon started. It outlives reloads: it is kept by name.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::config::{EndpointName, Side};
use crate::relay::PeerAddr;
use crate::tls::{Binding, CurrentVerdict};

use super::metrics::{EndpointMetrics, Metrics};
use super::refusals::Refusals;
use super::status::{Counters, VerdictView};
use crate::os::lock::Lock;

/// Peers whose last verdict is kept; beyond it the one seen longest ago is forgotten.
const MAX_PEERS: usize = 64;

/// Counters of one endpoint.
pub struct EndpointStats {
    /// Its name.
    pub name: EndpointName,
    /// Its side.
    pub side: Side,
    /// Its metrics, with the labels resolved.
    pub metrics: EndpointMetrics,
    total: AtomicU64,
    open: AtomicU64,
    refused: AtomicU64,
    /// Who was refused and why.
    pub refusals: Refusals,
    verdicts: Mutex<HashMap<IpAddr, (SystemTime, CurrentVerdict, Binding)>>,
}

impl EndpointStats {
    /// All zero.
    pub fn new(name: EndpointName, side: Side, metrics: &Metrics) -> Arc<Self> {
        let metrics = metrics.endpoint(name.as_str(), side);
        Arc::new(Self {
            name,
            side,
            metrics,
            total: AtomicU64::new(0),
            open: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            refusals: Refusals::default(),
            verdicts: Mutex::default(),
        })
    }

    /// A connection was accepted.
    pub fn opened(&self) {
        self.total.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.active.inc();
    }

    /// A connection ended; `refusal` names the other side and the detail if it never carried bytes.
    pub fn closed(&self, reason: &'static str, refusal: Option<(SocketAddr, &str)>) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.metrics.active.dec();
        self.metrics.ended(reason);
        if let Some((peer, detail)) = refusal {
            self.refused.fetch_add(1, Ordering::Relaxed);
            self.metrics.refused(reason);
            self.refusals.note(peer, reason, detail);
        }
    }

    /// From accept to the end of the appraisal.
    pub fn handshake_took(&self, time: Duration) {
        self.metrics.handshake.observe(time.as_secs_f64());
    }

    /// The peer's appraisal ended well.
    pub fn note_verdict(&self, peer: PeerAddr, verdict: CurrentVerdict, binding: Binding) {
        let mut verdicts = self.verdicts.locked();
        if verdicts.len() >= MAX_PEERS
            && !verdicts.contains_key(&peer.0.ip())
            && let Some(oldest) = verdicts.iter().min_by_key(|(_, (seen, ..))| *seen).map(|(ip, _)| *ip)
        {
            verdicts.remove(&oldest);
        }
        verdicts.insert(peer.0.ip(), (SystemTime::now(), verdict, binding));
    }

    /// The counters for `status`.
    pub fn counters(&self) -> Counters {
        let (bytes_up, bytes_down) = self.metrics.bytes();
        Counters {
            connections_total: self.total.load(Ordering::Relaxed),
            connections_open: self.open.load(Ordering::Relaxed),
            connections_refused: self.refused.load(Ordering::Relaxed),
            bytes_up,
            bytes_down,
        }
    }

    /// Age of the oldest verdict that is in force, seconds.
    pub fn verdict_age(&self) -> Option<u64> {
        let verdicts = self.verdicts.locked();
        let now = SystemTime::now();
        let made = verdicts.values().map(|(_, verdict, _)| verdict.load());
        let oldest = made.filter(|v| v.expires_at > now).map(|v| v.appraised_at).min()?;
        Some(now.duration_since(oldest).unwrap_or_default().as_secs())
    }

    /// The last verdict of each peer, newest first.
    pub fn verdicts(&self) -> Vec<VerdictView> {
        let verdicts = self.verdicts.locked();
        let mut seen: Vec<_> = verdicts.iter().collect();
        seen.sort_by_key(|(_, (seen, ..))| std::cmp::Reverse(*seen));
        let view = |(ip, (seen, verdict, binding)): (&IpAddr, &(SystemTime, CurrentVerdict, Binding))| {
            VerdictView::new(*ip, *seen, verdict, *binding)
        };
        seen.into_iter().map(view).collect()
    }
}
