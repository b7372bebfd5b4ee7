//! One way with its two ends: measures slices of it.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::net::{TcpListener, TcpStream};

use crate::Outcome;
use crate::ends::{Ends, Met};
use crate::plain;
use crate::service::Service;
use crate::settings::AT_ONCE;
use crate::ways::{Tally, Way};

/// Batches after which a way is given up that has not come about: the first one cannot be resumed.
const WARM_UP_BATCHES: usize = 8;

/// What a slice took, by the handshake.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Handshakes a second.
    pub per_second: f64,
    /// User and system time of both ends together, microseconds.
    pub cpu_us: f64,
}

/// A way, and the ends that go it.
pub struct Lane {
    /// Which.
    pub way: Way,
    ends: Ends,
    /// One for each way: ports in TIME_WAIT are finite.
    listener: TcpListener,
}

impl Lane {
    /// Makes the ends.
    pub async fn new(way: Way, service: &Service) -> Outcome<Self> {
        let ends = if way.attests() { Ends::attested(way, service)? } else { plain::ends(way)? };
        Ok(Self { way, ends, listener: TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await? })
    }

    /// Makes connections until they come about as they are to.
    ///
    /// # Errors
    /// They do not; or it took more than one appraisal by each side to get there.
    pub async fn warm_up(&self, service: &mut Service) -> Outcome<()> {
        let before = service.appraisals()?;
        let mut last = self.slice(AT_ONCE, service).await?.1;
        for _ in 1..WARM_UP_BATCHES {
            if self.way.complaint(&last).is_none() {
                break;
            }
            last = self.slice(AT_ONCE, service).await?.1;
        }
        let appraisals = service.appraisals()? - before;
        if self.way.attests() && !self.way.is_cold() && appraisals != 2 {
            return Err(format!("{appraisals} appraisals instead of one by each side").into());
        }
        self.way.complaint(&last).map_or(Ok(()), |complaint| Err(complaint.into()))
    }

    /// So many handshakes, [`AT_ONCE`] at a time.
    pub async fn slice(&self, handshakes: usize, service: &mut Service) -> Outcome<(Sample, Tally)> {
        let sockets = self.sockets(handshakes).await?;
        let counted = self.ends.counters();
        let appraised = service.appraisals()?;

        let (used, begun) = (cpu()?, Instant::now());
        let meetings = stream::iter(sockets).map(|(client, server)| self.ends.meet(client, server));
        let met: Vec<Met> = meetings.buffer_unordered(AT_ONCE).try_collect().await?;
        let (took, used) = (begun.elapsed(), cpu()?.saturating_sub(used));

        let ends = self.ends.counters().into_iter().zip(counted).map(|(now, then)| now.since(then)).collect();
        let tally = Tally {
            handshakes: met.len() as u64,
            resumed: met.iter().filter(|met| met.resumed).count() as u64,
            appraisals: service.appraisals()? - appraised,
            ends,
            primitives: met.into_iter().map(|met| met.primitives).collect::<BTreeSet<_>>(),
        };
        let handshakes = handshakes as f64;
        let sample =
            Sample { per_second: handshakes / took.as_secs_f64(), cpu_us: used.as_secs_f64() * 1e6 / handshakes };
        Ok((sample, tally))
    }

    /// Both ends of TCP connections, made beforehand: what TCP costs is no difference between the ways.
    async fn sockets(&self, count: usize) -> Outcome<Vec<(TcpStream, TcpStream)>> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            let near = TcpStream::connect(self.listener.local_addr()?).await?;
            let far = self.listener.accept().await?.0;
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            all.push((near, far));
        }
        Ok(all)
    }
}

/// User and system time of this process.
fn cpu() -> Outcome<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |t: nix::sys::time::TimeVal| t.tv_sec() * 1_000_000 + t.tv_usec();
    Ok(Duration::from_micros(u64::try_from(micros(usage.user_time()) + micros(usage.system_time()))?))
}
