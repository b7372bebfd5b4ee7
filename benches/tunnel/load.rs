//! The clients before the tunnel: bulk streams, new connections, idle connections.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::sink::{CHUNK, Kind, MARKER, RECEIPT, expected, opening};

/// No single read or write may take longer.
const STUCK: Duration = Duration::from_secs(20);

/// Connects and says what it wants.
pub fn open(addr: SocketAddr, kind: Kind, length: u64) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&addr, STUCK)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    stream.set_write_timeout(Some(STUCK))?;
    stream.write_all(&opening(kind, length))?;
    Ok(stream)
}

/// Sends one message of `length` bytes on an [`Kind::Echo`] connection and compares what comes back.
pub fn echo(stream: &mut TcpStream, length: usize) -> io::Result<()> {
    stream.write_all(expected(0, length))?;
    let mut back = vec![0; length];
    stream.read_exact(&mut back)?;
    if back == expected(0, length) { Ok(()) } else { Err(io::Error::other("the echo is not what was sent")) }
}

/// A new connection, one message there and back, closed.
pub fn echo_once(addr: SocketAddr, length: usize) -> io::Result<()> {
    let mut stream = open(addr, Kind::Echo, 0)?;
    echo(&mut stream, length)
}

/// `length` bytes to the service, half-close, and the receipt that only a half-close lets through.
pub fn upload(addr: SocketAddr, length: u64) -> io::Result<()> {
    let mut stream = open(addr, Kind::Absorb, length)?;
    let mut sent = 0;
    while sent < length {
        sent += stream.write(expected(sent, (length - sent).min(CHUNK as u64) as usize))? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut receipt = [0; RECEIPT];
    stream.read_exact(&mut receipt).map_err(|e| io::Error::other(format!("no receipt after the half-close: {e}")))?;
    if receipt[..16] != *MARKER || receipt[24..] != 1_u64.to_be_bytes() {
        let count = u64::from_be_bytes(receipt[16..24].try_into().unwrap_or_default());
        return Err(io::Error::other(format!("{count} bytes arrived of {length}, or wrong ones")));
    }
    expect_end(&mut stream)
}

/// `length` bytes from the service, which then half-closes.
pub fn download(addr: SocketAddr, length: u64) -> io::Result<()> {
    let mut stream = open(addr, Kind::Emit, length)?;
    let mut buffer = vec![0; CHUNK];
    let mut count = 0;
    while count < length {
        let n = stream.read(&mut buffer)?;
        if n == 0 || buffer[..n] != *expected(count, n) {
            return Err(io::Error::other(format!("wrong or missing bytes after {count} of {length}")));
        }
        count += n as u64;
    }
    expect_end(&mut stream)
}

fn expect_end(stream: &mut TcpStream) -> io::Result<()> {
    match stream.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::other("bytes after the end")),
    }
}

/// `total` bytes over `streams` connections at once: one stream goes up; of several, every second comes down.
/// Returns the time from the first connect to the last checked byte.
pub fn bulk(addr: SocketAddr, streams: u64, total: u64) -> Outcome<Duration> {
    let begun = Instant::now();
    let one = |n: u64| {
        move || if n.is_multiple_of(2) { upload(addr, total / streams) } else { download(addr, total / streams) }
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..streams).map(|n| scope.spawn(one(n))).collect();
        running.into_iter().try_for_each(joined)
    })?;
    Ok(begun.elapsed())
}

/// New connections by `clients` at once, each opened, used for 64 bytes there and back, and closed.
/// Returns how many and in what time.
pub fn connections(addr: SocketAddr, clients: usize, lasting: Duration, max: u64) -> Outcome<(u64, Duration)> {
    let begun = Instant::now();
    let tickets = AtomicU64::new(0);
    let client = || {
        while begun.elapsed() < lasting && tickets.fetch_add(1, Ordering::Relaxed) < max {
            echo_once(addr, 64)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        running.into_iter().try_for_each(joined)
    })?;
    // Each client drew one ticket too many only when the tickets ran out.
    Ok((tickets.load(Ordering::Relaxed).min(max), begun.elapsed()))
}

/// `count` connections, each used for `length` bytes there and back, and then held.
pub fn hold(addr: SocketAddr, count: usize, length: usize) -> Outcome<Vec<TcpStream>> {
    const OPENERS: usize = 4;
    let opener = |share: usize| {
        move || -> io::Result<Vec<TcpStream>> {
            (0..share)
                .map(|_| {
                    let mut stream = open(addr, Kind::Echo, 0)?;
                    echo(&mut stream, length)?;
                    Ok(stream)
                })
                .collect()
        }
    };
    std::thread::scope(|scope| {
        let shares = (0..OPENERS).map(|n| (count + n) / OPENERS);
        let running: Vec<_> = shares.map(|share| scope.spawn(opener(share))).collect();
        let mut held = Vec::with_capacity(count);
        for thread in running {
            held.extend(joined(thread)?);
        }
        Ok(held)
    })
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, io::Result<T>>) -> Outcome<T> {
    thread.join().map_err(|_| "a client panicked")?.map_err(Into::into)
}
