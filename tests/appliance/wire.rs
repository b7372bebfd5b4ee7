//! The wire between the two hosts: a bridge in a namespace of its own, where everything that passes is recorded.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use super::netns::{Host, Sniffer, fresh_hex, wait_until};

/// The bridge that containers are plugged into.
pub const BRIDGE: &str = "wire0";
/// What the outsider on the wire has for addresses.
const OUTSIDER: (&str, &str) = ("192.0.2.254", "2001:db8::fe");
/// How long one plaintext attempt of the outsider may take.
const KNOCK: Duration = Duration::from_secs(1);

/// The wire. Dropping it removes the namespace.
pub struct Wire {
    host: Host,
    sniffer: Sniffer,
    beacon: UdpSocket,
}

impl Wire {
    /// A new wire; `name` tells it from the others of this process.
    pub fn new(name: &str) -> Self {
        let host = Host::alone(name, OUTSIDER.0, OUTSIDER.1);
        host.sh(&format!(
            "ip link set lo up
            ip link add {BRIDGE} type bridge mcast_snooping 0
            ip link set {BRIDGE} up
            ip addr add {}/24 dev {BRIDGE}
            ip addr add {}/64 dev {BRIDGE} nodad",
            OUTSIDER.0, OUTSIDER.1
        ));
        let sniffer = Sniffer::start(&host);
        let beacon = host.inside(|| {
            let socket = UdpSocket::bind((OUTSIDER.0, 0)).expect("beacon socket");
            socket.set_broadcast(true).expect("SO_BROADCAST");
            socket.connect(("192.0.2.255", 9)).expect("beacon target");
            socket
        });
        Self { host, sniffer, beacon }
    }

    /// File of its namespace.
    pub fn netns(&self) -> String {
        format!("/run/netns/{}", self.host.netns())
    }

    /// Whether `text` was on the wire in plaintext, since the last [`Wire::forget`].
    #[track_caller]
    pub fn saw(&self, text: &str) -> bool {
        // Only a sniffer that just saw what was sent on purpose may say that it saw nothing else.
        let seen = wait_until(Duration::from_secs(10), || {
            let beacon = format!("BEACON{}", fresh_hex());
            let _ = self.beacon.send(beacon.as_bytes());
            wait_until(Duration::from_millis(500), || self.sniffer.saw_datagram(beacon.as_bytes()))
        });
        assert!(seen, "the sniffer does not see its own beacon");
        self.sniffer.saw(text.as_bytes())
    }

    /// Forgets what passed until now.
    pub fn forget(&self) {
        self.sniffer.forget();
    }

    /// Sends a plaintext request to `to` as a stranger on the wire; what came back.
    pub fn knock(&self, to: IpAddr, port: u16, marker: &str) -> Result<String, std::io::Error> {
        self.host.inside(|| {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, port), KNOCK)?;
            stream.set_read_timeout(Some(KNOCK))?;
            stream.write_all(
                format!("GET /{marker} HTTP/1.1\r\nHost: service\r\nConnection: close\r\n\r\n").as_bytes(),
            )?;
            let mut answer = Vec::new();
            match stream.take(1 << 16).read_to_end(&mut answer) {
                Ok(_) => Ok(String::from_utf8_lossy(&answer).into_owned()),
                // What came before the reset or the silence counts.
                Err(_) if !answer.is_empty() => Ok(String::from_utf8_lossy(&answer).into_owned()),
                Err(error) => Err(error),
            }
        })
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.sniffer.stop();
        self.host.remove();
    }
}
