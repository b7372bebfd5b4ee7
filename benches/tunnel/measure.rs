//! One round: fresh processes for every peer, every metric once, every step in another order.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::peers::Peer;
use crate::settings::Settings;
use crate::stats::{Shuffler, median};
use crate::tunnel::{Lab, Tunnel};
use crate::{Outcome, latency, load, sharing};

/// What is measured, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// MiB/s over one stream.
    Bulk1,
    /// MiB/s over eight streams, half of them down.
    Bulk8,
    /// CPU seconds of both ends per GiB, one stream.
    CpuGib1,
    /// The same with eight streams.
    CpuGib8,
    /// New connections a second.
    Connections,
    /// CPU milliseconds of both ends per new connection.
    CpuConnection,
    /// Median latency, ms.
    P50,
    /// 99th percentile of latency, ms.
    P99,
    /// 99th percentile of latency beside four bulk streams, ms.
    P99Beside,
    /// What the slowest of eight bulk streams got by what the fastest got.
    Fairness,
    /// Resident KiB of both ends per connection that carried a few bytes only and fell idle.
    IdleUnused,
    /// The same after the connections were used: buffers that came with bytes must have been given back.
    Idle,
}

/// The values of one peer in one round. The direct path has no processes, so it lacks those about them.
pub type Sample = BTreeMap<Metric, f64>;

/// Bytes each way on a connection before it falls idle for [`Metric::Idle`].
const BEFORE_IDLE: usize = 16 * 1024;
/// The same for [`Metric::IdleUnused`].
const HARDLY_USED: usize = 64;

/// Measures every one of `peers` once.
pub fn round(lab: &Lab, peers: &[Peer], settings: &Settings, order: &mut Shuffler) -> Outcome<BTreeMap<Peer, Sample>> {
    let mut samples = latencies(lab, peers, settings, order)?;
    if settings.only_sharing {
        return Ok(samples);
    }
    for peer in order.shuffled(peers) {
        let sample = samples.entry(peer).or_default();
        if peer != Peer::Direct {
            // Processes of its own: memory that earlier load left in the allocator would be reused here and hide the need.
            let tunnel = lab.start_tunnel(peer)?;
            idle(&tunnel, settings, sample).map_err(|e| format!("{peer}: {e}\n  {}", tunnel.last_words()))?;
        }
        let tunnel = lab.start_tunnel(peer)?;
        load_metrics(&tunnel, peer, settings, sample).map_err(|e| format!("{peer}: {e}\n  {}", tunnel.last_words()))?;
    }
    Ok(samples)
}

/// Latency and sharing in short slices, the peers taking turns, and of each peer the median slice. A stall of the machine
/// (the bare loopback shows them too) falls into one slice of one peer; a tunnel that stalls by itself does so in all.
fn latencies(lab: &Lab, peers: &[Peer], settings: &Settings, order: &mut Shuffler) -> Outcome<BTreeMap<Peer, Sample>> {
    let mut tunnels = BTreeMap::new();
    for peer in order.shuffled(peers) {
        tunnels.insert(peer, lab.start_tunnel(peer).map_err(|e| format!("{peer}: {e}"))?);
    }
    let mut slices: BTreeMap<Peer, BTreeMap<Metric, Vec<f64>>> = BTreeMap::new();
    let mut add = |peer, metric, value| slices.entry(peer).or_default().entry(metric).or_default().push(value);
    let wrong = |peer: Peer, e| format!("{peer}: {e}\n  {}", tunnels[&peer].last_words());
    for _ in 0..if settings.only_sharing { 0 } else { settings.latency_slices } {
        for peer in order.shuffled(peers) {
            let slice = latency::latency(tunnels[&peer].addr, settings.rate, settings.latency_slice)
                .map_err(|e| wrong(peer, e))?;
            add(peer, Metric::P50, slice.p50);
            add(peer, Metric::P99, slice.p99);
        }
    }
    for _ in 0..settings.sharing_slices {
        for peer in order.shuffled(peers) {
            let addr = tunnels[&peer].addr;
            let beside = sharing::beside_bulk(addr, settings.beside_rate, settings.beside_slice);
            add(peer, Metric::P99Beside, beside.map_err(|e| wrong(peer, e))?.p99);
            let fairness = sharing::fairness(addr, settings.fairness_slice).map_err(|e| wrong(peer, e))?;
            add(peer, Metric::Fairness, fairness);
        }
    }
    let typical = |all: BTreeMap<Metric, Vec<f64>>| {
        all.into_iter().filter_map(|(metric, values)| Some((metric, median(&values)?))).collect()
    };
    Ok(slices.into_iter().map(|(peer, all)| (peer, typical(all))).collect())
}

fn load_metrics(tunnel: &Tunnel, peer: Peer, settings: &Settings, sample: &mut Sample) -> Outcome<()> {
    let tunnelled = peer != Peer::Direct;
    let before = tunnel.weight()?;
    let (count, took) =
        load::connections(tunnel.addr, settings.connect_clients, settings.connect_for, settings.connect_max)?;
    sample.insert(Metric::Connections, count as f64 / took.as_secs_f64());
    if tunnelled {
        let cpu = settled_cpu(tunnel)? - before.cpu_seconds;
        sample.insert(Metric::CpuConnection, cpu * 1e3 / count as f64);
    }

    let bytes = settings.bulk_bytes as f64;
    for (streams, speed, price) in [(1, Metric::Bulk1, Metric::CpuGib1), (8, Metric::Bulk8, Metric::CpuGib8)] {
        let before = tunnel.weight()?;
        let took = load::bulk(tunnel.addr, streams, settings.bulk_bytes)?;
        sample.insert(speed, bytes / f64::from(1 << 20) / took.as_secs_f64());
        if tunnelled {
            let cpu = settled_cpu(tunnel)? - before.cpu_seconds;
            sample.insert(price, cpu / (bytes / f64::from(1 << 30)));
        }
    }
    Ok(())
}

/// CPU time once the last connections are torn down: work that comes after the client's last byte counts too.
fn settled_cpu(tunnel: &Tunnel) -> Outcome<f64> {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut last = tunnel.weight()?.cpu_seconds;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = tunnel.weight()?.cpu_seconds;
        if now <= last || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// Resident KiB per idle connection, both ends together, before and after the connections were used.
fn idle(tunnel: &Tunnel, settings: &Settings, sample: &mut Sample) -> Outcome<()> {
    // What a process sets up once, at its first connections, is no connection's.
    drop(load::hold(tunnel.addr, 16, BEFORE_IDLE)?);
    let before = settled_memory(tunnel)?;
    let per_connection = |now: f64| (now - before) / settings.idle_connections as f64;

    let mut held = load::hold(tunnel.addr, settings.idle_connections, HARDLY_USED)?;
    sample.insert(Metric::IdleUnused, per_connection(settled_memory(tunnel)?));
    // A connection that was dropped while idle costs nothing; here it fails instead of counting as cheap.
    for stream in &mut held {
        load::echo(stream, BEFORE_IDLE).map_err(|e| format!("an idle connection is dead: {e}"))?;
    }
    sample.insert(Metric::Idle, per_connection(settled_memory(tunnel)?));
    Ok(())
}

/// Resident memory once it has not shrunk for a second, at most five seconds from now.
fn settled_memory(tunnel: &Tunnel) -> Outcome<f64> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut least = f64::INFINITY;
    let mut since = Instant::now();
    loop {
        let now = tunnel.weight()?.resident_kib;
        if now < least {
            (least, since) = (now, Instant::now());
        }
        if since.elapsed() > Duration::from_secs(1) || Instant::now() > deadline {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
