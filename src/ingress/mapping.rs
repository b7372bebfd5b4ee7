//! A fixed listener leads to a fixed target; a range of ports leads to as many, in the same order.

use std::net::SocketAddr;

use crate::config::Mapping;
use crate::relay::{Refusal, Target};

/// The target of a connection that arrived at `local`.
///
/// # Errors
/// [`Refusal::UnmappedPort`] when a reload took the port out of the mapping meanwhile.
pub fn target(mapping: &Mapping, local: SocketAddr) -> Result<Target, Refusal> {
    if !mapping.listen_ports.contains(local.port()) {
        return Err(Refusal::UnmappedPort(local.port()));
    }
    let index = local.port() - mapping.listen_ports.first;
    match mapping.target_ports.first.checked_add(index) {
        Some(port) if port <= mapping.target_ports.last => Ok(Target { host: mapping.target_host.clone(), port }),
        _ => Err(Refusal::UnmappedPort(local.port())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DEFAULT_INGRESS_MARK, PortRange, TargetHost};

    fn mapping(listen: (u16, u16), target: (u16, u16)) -> Mapping {
        Mapping {
            listen_addr: "127.0.0.1".parse().expect("address"),
            listen_ports: PortRange { first: listen.0, last: listen.1 },
            target_host: TargetHost::Name("service.example".into()),
            target_ports: PortRange { first: target.0, last: target.1 },
            so_mark: DEFAULT_INGRESS_MARK,
        }
    }

    fn port_for(mapping: &Mapping, port: u16) -> Result<u16, &'static str> {
        let local = SocketAddr::new(mapping.listen_addr, port);
        target(mapping, local).map(|t| t.port).map_err(|r| r.reason())
    }

    #[test]
    fn ranges_map_index_to_index() {
        let m = mapping((10010, 10020), (20010, 20020));
        assert_eq!(port_for(&m, 10010), Ok(20010));
        assert_eq!(port_for(&m, 10017), Ok(20017));
        assert_eq!(port_for(&m, 10020), Ok(20020));
    }

    #[test]
    fn a_port_outside_the_mapping_is_refused() {
        let m = mapping((10010, 10020), (20010, 20020));
        assert_eq!(port_for(&m, 10021), Err("unmapped-port"));
        assert_eq!(port_for(&m, 10009), Err("unmapped-port"));
        // A target range that is too short, or ends at 65535, never wraps around.
        assert_eq!(port_for(&mapping((1, 10), (65530, 65535)), 9), Err("unmapped-port"));
    }
}
