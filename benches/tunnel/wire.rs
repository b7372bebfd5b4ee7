//! A tap between the two ends of a tunnel: what is really on the wire, read from the bytes.
//!
//! TLS 1.3 (RFC 8446) keeps ClientHello and ServerHello readable: version, suite, group and resumption are in them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::sink::MARKER;
use crate::tunnel::Lab;
use crate::{Outcome, load};

/// Bytes kept of one direction of one connection.
const KEEP: usize = 4 << 20;

/// A forwarder on 127.0.0.1 that keeps what passes.
pub struct Tap {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    legs: Receiver<Leg>,
}

/// One connection, both directions.
#[derive(Default)]
pub struct Leg {
    to_server: Vec<u8>,
    to_client: Vec<u8>,
}

impl Tap {
    /// Forwards to `target`.
    pub fn start(target: SocketAddr) -> Outcome<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (done, legs) = channel();
        let told = stop.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if told.load(Ordering::SeqCst) {
                    break;
                }
                if let (Ok(client), Ok(server)) = (client, TcpStream::connect(target)) {
                    let done = done.clone();
                    std::thread::spawn(move || forward(&client, &server, &done));
                }
            }
        });
        Ok(Self { addr, stop, legs })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Finished connections that carried at least `bytes` to the server; waits until there are `count` of them.
    /// Shorter ones only asked whether somebody listens, and may have been given up in the middle of a handshake.
    pub fn take(&self, count: usize, bytes: usize) -> Outcome<Vec<Leg>> {
        let mut legs = Vec::new();
        while legs.len() < count {
            let leg = self.legs.recv_timeout(Duration::from_secs(10)).map_err(|_| "a tapped connection did not end")?;
            if leg.to_server.len() >= bytes {
                legs.push(leg);
            }
        }
        Ok(legs)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that waits in accept.
        let _ = TcpStream::connect(self.addr);
    }
}

fn forward(client: &TcpStream, server: &TcpStream, done: &Sender<Leg>) {
    let leg = std::thread::scope(|scope| {
        let up = scope.spawn(|| copy(client, server));
        let to_client = copy(server, client);
        Leg { to_server: up.join().unwrap_or_default(), to_client }
    });
    // Nobody waits for it any more when the tap is gone.
    let _ = done.send(leg);
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) -> Vec<u8> {
    let _ = to.set_nodelay(true);
    let mut kept = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n.min(KEEP - kept.len())]);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    kept
}

impl Leg {
    /// Whether the payload's marker can be read in either direction.
    pub fn shows_marker(&self) -> bool {
        let shows = |bytes: &[u8]| bytes.windows(MARKER.len()).any(|window| window == MARKER);
        shows(&self.to_server) || shows(&self.to_client)
    }

    /// What the server chose; `None` when this is not TLS.
    pub fn hello(&self) -> Option<Hello> {
        handshake_messages(&self.to_client).iter().filter_map(|message| Hello::parse(message)).next_back()
    }
}

/// What a ServerHello says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// 0x0304 is TLS 1.3.
    pub version: u16,
    /// Cipher suite.
    pub suite: u16,
    /// Named group of the key exchange, 0 when none is named.
    pub group: u16,
    /// Whether a session was resumed.
    pub resumed: bool,
}

impl Hello {
    /// A ServerHello (RFC 8446 section 4.1.3) that is not a HelloRetryRequest.
    fn parse(message: &[u8]) -> Option<Self> {
        // SHA-256 of "HelloRetryRequest" in place of the random says that it is one.
        const RETRY: [u8; 8] = [0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11];
        let mut rest = Cursor(message.strip_prefix(&[2])?);
        rest.take(3)?;
        let mut hello = Self { version: rest.u16()?, suite: 0, group: 0, resumed: false };
        if rest.take(32)?.starts_with(&RETRY) {
            return None;
        }
        let session = rest.take(1)?[0];
        rest.take(session.into())?;
        hello.suite = rest.u16()?;
        rest.take(1)?;
        let length = rest.u16()?;
        let mut extensions = Cursor(rest.take(length.into())?);
        while let Some(kind) = extensions.u16() {
            let length = extensions.u16()?;
            let mut body = Cursor(extensions.take(length.into())?);
            match kind {
                41 => hello.resumed = true,
                43 => hello.version = body.u16()?,
                51 => hello.group = body.u16()?,
                _ => {}
            }
        }
        Some(hello)
    }

    /// `TLS 1.3`, or the number.
    pub fn version_name(&self) -> String {
        if self.version == 0x0304 { "TLS 1.3".to_owned() } else { format!("{:#06x}", self.version) }
    }

    /// IANA's name of the suites of TLS 1.3, or the number.
    pub fn suite_name(&self) -> String {
        match self.suite {
            0x1301 => "TLS_AES_128_GCM_SHA256".to_owned(),
            0x1302 => "TLS_AES_256_GCM_SHA384".to_owned(),
            0x1303 => "TLS_CHACHA20_POLY1305_SHA256".to_owned(),
            other => format!("{other:#06x}"),
        }
    }

    /// IANA's name of the group, or the number.
    pub fn group_name(&self) -> String {
        match self.group {
            0x0017 => "secp256r1".to_owned(),
            0x0018 => "secp384r1".to_owned(),
            0x001d => "X25519".to_owned(),
            0x11ec => "X25519MLKEM768".to_owned(),
            other => format!("{other:#06x}"),
        }
    }
}

/// The readable handshake messages at the start of a stream of records (RFC 8446 section 5.1).
fn handshake_messages(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Cursor(stream);
    let mut bytes = Vec::new();
    while let Some(head) = records.take(3) {
        let Some(body) = records.u16().and_then(|length| records.take(length.into())) else { break };
        match head[0] {
            22 => bytes.extend_from_slice(body),
            // A change_cipher_spec may stand between a HelloRetryRequest and the ServerHello.
            20 => {}
            _ => break,
        }
    }
    let mut rest = &bytes[..];
    let mut messages = Vec::new();
    while let [_, a, b, c, ..] = *rest {
        let length = 4 + u32::from_be_bytes([0, a, b, c]) as usize;
        let Some((message, after)) = rest.split_at_checked(length) else { break };
        messages.push(message.to_vec());
        rest = after;
    }
    messages
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        let bytes = self.take(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

/// A tap that sees nothing proves nothing: without a tunnel it must find the marker, and no TLS.
pub fn positive_control(lab: &Lab) -> Outcome<()> {
    let tap = Tap::start(lab.sink.addr())?;
    load::upload(tap.addr, 1000)?;
    let leg = tap.take(1, 1000)?.pop().unwrap_or_default();
    let both = [&leg.to_server, &leg.to_client].iter().all(|bytes| bytes.starts_with(MARKER));
    if both && leg.shows_marker() && leg.hello().is_none() {
        return Ok(());
    }
    Err("the tap does not see plaintext where there is some".into())
}
