//! The service behind the tunnel. It checks every byte it gets, and that half-close arrives as half-close.
//!
//! A connection opens with [`MARKER`], a [`Kind`] and a length, 32 bytes in all. What follows is cut from a fixed
//! pseudo-random [`pattern`], so a byte that is lost, doubled or moved is seen.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::Outcome;

/// First bytes of each connection in both directions; never to be seen between the two ends of a tunnel.
pub const MARKER: &[u8; 16] = b"tng-bench-marker";

/// Length of what a connection opens with.
pub const OPENING: usize = 32;
/// Length of the answer to [`Kind::Absorb`].
pub const RECEIPT: usize = 32;
/// Bytes read or written at once.
pub const CHUNK: usize = 256 * 1024;

/// What the client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What comes goes back at once, until the client closes. The length means nothing.
    Echo = 1,
    /// The client sends that many bytes and half-closes; only then comes the receipt: marker, count, 1 if they were right.
    Absorb = 2,
    /// The service sends that many bytes and half-closes; the client closes.
    Emit = 3,
}

/// The opening of a connection.
pub fn opening(kind: Kind, length: u64) -> [u8; OPENING] {
    let mut bytes = [0; OPENING];
    bytes[..16].copy_from_slice(MARKER);
    bytes[16..24].copy_from_slice(&(kind as u64).to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// 1 MiB of pseudo-random bytes; a stream repeats it. One chunk more follows so that any chunk is one slice.
fn pattern() -> &'static [u8] {
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    PATTERN.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = Vec::with_capacity(PERIOD + CHUNK);
        while bytes.len() < PERIOD {
            // xorshift64 (Marsaglia, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.extend_from_within(..CHUNK);
        bytes
    })
}

const PERIOD: usize = 1 << 20;

/// The bytes at `offset` of a stream, `length` of them, at most [`CHUNK`].
pub fn expected(offset: u64, length: usize) -> &'static [u8] {
    let start = (offset % PERIOD as u64) as usize;
    &pattern()[start..start + length]
}

/// The running service.
pub struct Sink {
    addr: SocketAddr,
    opened: Arc<AtomicU64>,
}

impl Sink {
    /// Listens on a free port of 127.0.0.1.
    pub fn start(runtime: &tokio::runtime::Runtime) -> Outcome<Self> {
        let _inside = runtime.enter();
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let listener = socket.listen(4096)?;
        let sink = Self { addr: listener.local_addr()?, opened: Arc::default() };
        runtime.spawn(serve(listener, sink.opened.clone()));
        Ok(sink)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many connections brought a right opening so far.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::SeqCst)
    }
}

async fn serve(listener: TcpListener, opened: Arc<AtomicU64>) {
    loop {
        // An accept that fails (no descriptors) shows as a client that gets no answer and names itself.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            continue;
        };
        let opened = opened.clone();
        // An error here is the client's to notice: it gets no or a wrong answer.
        tokio::spawn(async move { answer(stream, &opened).await });
    }
}

async fn answer(mut stream: TcpStream, opened: &AtomicU64) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = [0; OPENING];
    stream.read_exact(&mut head).await?;
    let length = u64::from_be_bytes(head[24..].try_into().unwrap_or_default());
    let kind = [Kind::Echo, Kind::Absorb, Kind::Emit].into_iter().find(|kind| head == opening(*kind, length));
    let Some(kind) = kind else { return Ok(()) };
    opened.fetch_add(1, Ordering::SeqCst);
    match kind {
        Kind::Echo => echo(stream).await,
        Kind::Absorb => absorb(stream, length).await,
        Kind::Emit => emit(stream, length).await,
    }
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            return stream.shutdown().await;
        }
        stream.write_all(&buffer[..n]).await?;
    }
}

async fn absorb(mut stream: TcpStream, length: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut count = 0;
    let mut right = true;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        right &= buffer[..n] == *expected(count, n);
        count += n as u64;
    }
    let mut receipt = [0; RECEIPT];
    receipt[..16].copy_from_slice(MARKER);
    receipt[16..24].copy_from_slice(&count.to_be_bytes());
    receipt[24..].copy_from_slice(&u64::from(right && count == length).to_be_bytes());
    stream.write_all(&receipt).await?;
    stream.shutdown().await
}

async fn emit(mut stream: TcpStream, length: u64) -> std::io::Result<()> {
    let mut sent = 0;
    while sent < length {
        let n = stream.write(expected(sent, (length - sent).min(CHUNK as u64) as usize)).await?;
        sent += n as u64;
    }
    stream.shutdown().await?;
    // Until the client has closed: closing first would turn bytes under way into a reset.
    while stream.read(&mut [0; 64]).await? != 0 {}
    Ok(())
}
