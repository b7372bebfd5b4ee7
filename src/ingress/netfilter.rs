//! nftables handed the connection over: its original destination is the accepted socket's own address.

use std::net::SocketAddr;

use crate::relay::{OriginalDst, Refusal, Target, canonical};

/// The original destination of a captured connection.
///
/// # Errors
/// [`Refusal::DirectToListener`] when nothing captured it: connecting on would be a loop.
pub fn original_dst(local: SocketAddr, listener: SocketAddr) -> Result<OriginalDst, Refusal> {
    let (local, listener) = (canonical(local), canonical(listener));
    // A wildcard listener's own address is any address with its port.
    let own = local.port() == listener.port() && (local.ip() == listener.ip() || listener.ip().is_unspecified());
    if own { Err(Refusal::DirectToListener(local)) } else { Ok(OriginalDst(local)) }
}

/// The target of a captured connection.
///
/// # Errors
/// As [`original_dst`].
pub fn target(local: SocketAddr, listener: SocketAddr) -> Result<Target, Refusal> {
    original_dst(local, listener).map(|OriginalDst(addr)| Target::addr(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_goes_on_and_direct_is_refused() {
        let check = |local: &str, listener: &str| {
            target(local.parse().expect("address"), listener.parse().expect("address"))
                .map(|t| t.to_string())
                .map_err(|r| r.reason())
        };
        assert_eq!(check("198.51.100.7:8443", "127.0.0.1:40000"), Ok("198.51.100.7:8443".into()));
        assert_eq!(check("[2001:db8::7]:8443", "[::1]:40000"), Ok("[2001:db8::7]:8443".into()));
        assert_eq!(check("127.0.0.1:40000", "127.0.0.1:40000"), Err("direct-to-listener"));
        assert_eq!(check("192.0.2.1:40000", "0.0.0.0:40000"), Err("direct-to-listener"));
        assert_eq!(check("[::ffff:127.0.0.1]:40000", "127.0.0.1:40000"), Err("direct-to-listener"));
    }
}
