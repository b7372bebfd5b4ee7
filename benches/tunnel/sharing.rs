//! How connections of one tunnel share it: small requests beside bulk streams, and bulk streams beside each other.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::latency::{Latency, latency};
use crate::load;
use crate::sink::{CHUNK, Kind, expected};

/// Bulk streams beside the small requests, half of them up.
pub const BESIDE: usize = 4;
/// Bulk streams that are compared with each other, all of them down.
pub const COMPARED: usize = 8;
/// Bytes that each stream has moved before anything is measured: windows have grown and buffers have come by then.
const WARM: u64 = 4 << 20;
/// A stream that has not become warm by then is stuck.
const STUCK: Duration = Duration::from_secs(20);
/// More than any stream moves in one slice.
const ENDLESS: u64 = 1 << 50;
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// Latency of `rate` requests a second beside [`BESIDE`] streams that never pause.
pub fn beside_bulk(addr: SocketAddr, rate: u32, lasting: Duration) -> Outcome<Latency> {
    with_bulk(addr, BESIDE, |n| n.is_multiple_of(2), |_| latency(addr, rate, lasting))
}

/// What the slowest of [`COMPARED`] streams moved in this time, by what the fastest moved.
pub fn fairness(addr: SocketAddr, lasting: Duration) -> Outcome<f64> {
    with_bulk(
        addr,
        COMPARED,
        |_| false,
        |moved| {
            let now = || moved.iter().map(|m| m.load(Ordering::Relaxed)).collect::<Vec<u64>>();
            let before = now();
            std::thread::sleep(lasting);
            let shares: Vec<u64> = now().into_iter().zip(before).map(|(now, before)| now - before).collect();
            match (shares.iter().min(), shares.iter().max()) {
                (Some(slowest), Some(fastest)) if *fastest > 0 => Ok(*slowest as f64 / *fastest as f64),
                _ => Err("no stream moved".into()),
            }
        },
    )
}

/// Runs `measure` while the streams move, once all of them are warm. It is given what each has moved.
fn with_bulk<T>(
    addr: SocketAddr,
    streams: usize,
    goes_up: impl Fn(usize) -> bool,
    measure: impl FnOnce(&[AtomicU64]) -> Outcome<T>,
) -> Outcome<T> {
    let moved: Vec<AtomicU64> = (0..streams).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running: Vec<_> = moved
            .iter()
            .enumerate()
            .map(|(n, moved)| {
                let (stop, up) = (&stop, goes_up(n));
                scope.spawn(move || if up { send(addr, moved, stop) } else { receive(addr, moved, stop) })
            })
            .collect();
        let begun = Instant::now();
        let is_warm = || moved.iter().all(|m| m.load(Ordering::Relaxed) >= WARM);
        while !is_warm() && begun.elapsed() < STUCK && !running.iter().any(|thread| thread.is_finished()) {
            std::thread::sleep(LOOK);
        }
        let measured = if is_warm() { measure(&moved) } else { Err("a bulk stream does not move".into()) };
        stop.store(true, Ordering::Relaxed);
        for thread in running {
            thread.join().map_err(|_| "a client panicked")??;
        }
        measured
    })
}

fn send(addr: SocketAddr, moved: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
    let mut stream = load::open(addr, Kind::Absorb, ENDLESS)?;
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        sent += stream.write(expected(sent, CHUNK))? as u64;
        moved.store(sent, Ordering::Relaxed);
    }
    Ok(())
}

fn receive(addr: SocketAddr, moved: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
    let mut stream = load::open(addr, Kind::Emit, ENDLESS)?;
    let mut buffer = vec![0; CHUNK];
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let n = stream.read(&mut buffer)?;
        if n == 0 || buffer[..n] != *expected(count, n) {
            return Err(io::Error::other(format!("wrong or missing bytes after {count}")));
        }
        count += n as u64;
        moved.store(count, Ordering::Relaxed);
    }
    Ok(())
}
