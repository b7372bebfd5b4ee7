//! The sniffer: every byte that TCP, UDP or ICMP carried over the router, by flow.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::world::Host;
use std::os::fd::AsRawFd;

/// Larger than any frame, also with segmentation offload.
const FRAME: usize = 256 * 1024;
/// Receive buffer of the packet socket: a burst must not be lost while the reader sleeps.
const QUEUE: usize = 64 << 20;
/// Where the sniffer refuses to go on rather than to forget.
const MAX_BYTES: usize = 256 << 20;

/// Payload bytes of each flow in the order they passed. The interface and the hop's MAC addresses are part
/// of the key, so a packet seen on its way in and on its way out does not double a flow's bytes.
#[derive(Default)]
struct Log {
    flows: HashMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
}

/// Records everything on the wires of one host.
pub struct Sniffer {
    log: Arc<Mutex<Log>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Starts recording in the namespace of `host`, all interfaces but lo.
    pub fn start(host: &Host) -> Self {
        let all_protocols = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket =
            host.inside(|| Socket::new(Domain::PACKET, Type::RAW, Some(all_protocols)).expect("AF_PACKET needs root"));
        setsockopt(&socket, sockopt::RcvBufForce, &QUEUE).expect("SO_RCVBUFFORCE needs root");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("read timeout");
        let log = Arc::new(Mutex::new(Log::default()));
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (log, stopping) = (Arc::clone(&log), Arc::clone(&stopping));
            move || {
                let mut frame = vec![0; FRAME];
                while !stopping.load(Ordering::Relaxed) {
                    let Ok((len, from)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) else { continue };
                    if let Some((mut key, payload)) = dissect(&frame[..len]) {
                        key.splice(0..0, from.map_or(0, |from| from.ifindex()).to_be_bytes());
                        log.lock().unwrap().add(key, payload);
                    }
                }
            }
        });
        Self { log, stopping, thread: Some(thread) }
    }

    /// Whether `text` passed, within a packet or across consecutive packets of a flow.
    pub fn saw(&self, text: &[u8]) -> bool {
        let log = self.log.lock().unwrap();
        assert!(log.bytes < MAX_BYTES, "the sniffer recorded {} bytes and gave up: sniff less", log.bytes);
        log.flows.values().any(|bytes| contains(bytes, text))
    }

    /// The same among UDP flows alone: quick, however much TCP carried meanwhile.
    pub fn saw_datagram(&self, text: &[u8]) -> bool {
        let log = self.log.lock().unwrap();
        // A key of UDP ends with its protocol and four bytes of ports.
        let udp = |key: &[u8]| key.len() >= 5 && key[key.len() - 5] == 17;
        log.flows.iter().any(|(key, bytes)| udp(key) && contains(bytes, text))
    }

    /// Forgets what it recorded: for tests that move more than it holds, between two questions.
    pub fn forget(&self) {
        *self.log.lock().unwrap() = Log::default();
    }

    /// Ends the recording.
    pub fn stop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Log {
    fn add(&mut self, key: Vec<u8>, payload: &[u8]) {
        if !payload.is_empty() && self.bytes < MAX_BYTES {
            self.bytes += payload.len();
            self.flows.entry(key).or_default().extend_from_slice(payload);
        }
    }
}

/// Whether `needle` is in `hay`.
fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|w| w == needle)
}

/// Flow key and payload of an Ethernet frame; `None` for what is neither IPv4 nor IPv6.
///
/// A fragment, and a header that this function does not know, counts whole as payload: a sniffer
/// may see too much, never too little.
fn dissect(frame: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let ethertype = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(14..)?;
    let (addresses, protocol, rest, fragment) = match ethertype {
        0x0800 => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            // A frame may be padded to 60 bytes behind the packet.
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            let packet = if total >= header && total <= packet.len() { &packet[..total] } else { packet };
            let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff != 0;
            (packet.get(12..20)?, *packet.get(9)?, packet.get(header..)?, fragment)
        }
        0x86dd => (packet.get(8..40)?, *packet.get(6)?, packet.get(40..)?, *packet.get(6)? == 44),
        _ => return None,
    };
    let (ports, payload) = match protocol {
        _ if fragment => (None, rest),
        6 => {
            let header = usize::from(rest.get(12)? >> 4) * 4;
            (rest.get(..4), rest.get(header..)?)
        }
        17 => (rest.get(..4), rest.get(8..)?),
        _ => (None, rest),
    };
    let mut key = frame[..12].to_vec();
    key.extend_from_slice(addresses);
    key.push(protocol);
    key.extend_from_slice(ports.unwrap_or_default());
    Some((key, payload))
}
