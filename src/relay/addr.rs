//! Address newtypes: a source cannot be passed where a destination belongs.

use std::fmt;
use std::net::SocketAddr;

/// Who connected to us: the application on an ingress, the tunnel's other end on an egress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

/// Where the application wanted to go: with TPROXY, the accepted socket's local address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginalDst(pub SocketAddr);

/// The other end of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerAddr(pub SocketAddr);

macro_rules! display_as_inner {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_as_inner!(ClientAddr, OriginalDst, PeerAddr);

/// `::ffff:192.0.2.1` as `192.0.2.1`, so that one host has one address whatever the listener's family.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4_and_others_stay() {
        let text = |s: &str| canonical(s.parse().expect("address")).to_string();
        assert_eq!(text("[::ffff:192.0.2.1]:80"), "192.0.2.1:80");
        assert_eq!(text("[2001:db8::1]:80"), "[2001:db8::1]:80");
        assert_eq!(text("192.0.2.1:80"), "192.0.2.1:80");
    }
}
