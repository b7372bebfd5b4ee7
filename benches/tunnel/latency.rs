//! Latency at a fixed rate, open loop: a request's clock starts when it was due, so a tunnel that stalls is charged for
//! every request that had to wait, not only for the first.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::load;
use crate::sink::Kind;
use crate::stats::quantile;

/// Connections the requests go round.
const CONNECTIONS: usize = 8;
/// Bytes of a request and of its answer.
const MESSAGE: usize = 256;

/// Quantiles in milliseconds.
pub struct Latency {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// `rate` requests a second for `lasting`.
pub fn latency(addr: SocketAddr, rate: u32, lasting: Duration) -> Outcome<Latency> {
    let period = Duration::from_secs(1) / rate;
    let requests = (lasting.as_nanos() / period.as_nanos()) as usize;
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = load::open(addr, Kind::Echo, 0)?;
        // The handshake and the first buffers are not what is measured here.
        load::echo(&mut stream, MESSAGE)?;
        streams.push(stream);
    }
    let begin = Instant::now() + Duration::from_millis(20);
    let due = move |request: usize| begin + period * request as u32;

    let mut samples = std::thread::scope(|scope| -> Outcome<Vec<f64>> {
        let readers: Vec<_> = streams
            .iter()
            .enumerate()
            .map(|(n, mut stream)| {
                scope.spawn(move || -> io::Result<Vec<f64>> {
                    let mut answer = [0; MESSAGE];
                    let mut samples = Vec::new();
                    for request in (n..requests).step_by(CONNECTIONS) {
                        stream.read_exact(&mut answer)?;
                        samples.push(due(request).elapsed().as_secs_f64() * 1e3);
                        if answer[..8] != (request as u64).to_be_bytes() {
                            return Err(io::Error::other("the answer belongs to another request"));
                        }
                    }
                    Ok(samples)
                })
            })
            .collect();
        let mut message = [0x5a; MESSAGE];
        for request in 0..requests {
            std::thread::sleep(due(request).saturating_duration_since(Instant::now()));
            message[..8].copy_from_slice(&(request as u64).to_be_bytes());
            (&streams[request % CONNECTIONS]).write_all(&message)?;
        }
        let mut all = Vec::with_capacity(requests);
        for reader in readers {
            all.extend(reader.join().map_err(|_| "a client panicked")??);
        }
        Ok(all)
    })?;
    samples.sort_by(f64::total_cmp);
    Ok(Latency { p50: quantile(&samples, 0.50), p99: quantile(&samples, 0.99) })
}
