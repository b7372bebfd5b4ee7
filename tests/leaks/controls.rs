//! Positive controls: with tng off, each kind of traffic is seen in plaintext.

use serde_json::json;

use super::lab::{Lab, PORT};
use super::netns::{Connect, Family, fresh_hex};
use super::table::{Fate, Seen};

/// The client asks the service.
pub fn client_asks(lab: &Lab, family: Family) -> Seen {
    lab.exchange(family, &Connect::default())
}

/// The outsider asks the service.
pub fn outsider_asks(lab: &Lab, family: Family) -> Seen {
    lab.plain(family)
}

/// The service pushes to the client.
pub fn service_pushes(lab: &Lab, family: Family) -> Seen {
    let flow = lab.flow(family);
    let seen = lab.push(flow);
    flow.app.close(flow.conn);
    seen
}

/// A container behind the client asks the service.
pub fn sidecar_asks(lab: &Lab, family: Family) -> Seen {
    lab.exchange_from(lab.sidecar(), &lab.addr(family).to_string(), &Connect::default())
}

/// A container behind the server is asked by the outsider.
pub fn backend_is_asked(lab: &Lab, family: Family) -> Seen {
    let addr = lab.world.backend.addr(family).to_string();
    lab.backend();
    lab.plain_to(&addr, &Connect::default())
}

/// The client sends a datagram to the service's port.
pub fn client_sends_udp(lab: &Lab, family: Family) -> Seen {
    let addr = lab.addr(family);
    lab.server.listen_udp(addr, PORT);
    lab.datagram(&lab.client, &addr.to_string())
}

/// The client asks with data in its SYN.
pub fn client_asks_fast(lab: &Lab, family: Family) -> Seen {
    fast_open(lab, &lab.client, family)
}

/// A request within a SYN. Cookies are off on every host, as they would need an earlier connection.
pub fn fast_open(lab: &Lab, app: &super::netns::App, family: Family) -> Seen {
    for host in lab.world.hosts() {
        host.sysctl(&[("net/ipv4/tcp_fastopen", "1543")]);
    }
    let hex = fresh_hex();
    let how = Connect { port: PORT, tfo: Some(format!("TNGQ{hex}\n")), ..Connect::default() };
    let fate = match app.connect(&lab.addr(family).to_string(), &how) {
        Err(fault) => super::lab::fate_of(&fault),
        Ok(conn) => match app.recv(conn, &format!("TNGA{hex}"), super::lab::QUIET) {
            Ok(_) => Fate::Delivered,
            Err(fault) => super::lab::fate_of(&fault),
        },
    };
    Seen { fate, plaintext: lab.on_wire(&hex) }
}

/// The client asks over MPTCP.
pub fn client_asks_mptcp(lab: &Lab, family: Family) -> Seen {
    lab.exchange(family, &Connect { mptcp: true, ..Connect::default() })
}

/// The client asks over SCTP, which a ruleset for TCP alone would let pass.
pub fn client_asks_sctp(lab: &Lab, family: Family) -> Seen {
    // For the control and again for the row: the second time it listens already.
    let listen = json!({"do": "listen", "addr": lab.addr(family), "port": PORT, "sctp": true});
    let _ = lab.server.ask(listen);
    lab.exchange(family, &Connect { sctp: true, ..Connect::default() })
}

/// The client asks a service on the router's link-local address.
pub fn client_asks_link_local(lab: &Lab, family: Family) -> Seen {
    assert_eq!(family, Family::V6, "IPv4 link-local addresses need no scope");
    // For the control and again for the row: the second time it listens already.
    let _ = lab.router.ask(json!({"do": "listen", "addr": "::", "port": PORT}));
    let addr = lab.link_local(&lab.world.router, "r0");
    lab.exchange_from(&lab.client, &addr, &Connect { scope: Some("c0".into()), ..Connect::default() })
}

/// The outsider asks the service on the server's link-local address.
pub fn outsider_asks_link_local(lab: &Lab, family: Family) -> Seen {
    assert_eq!(family, Family::V6, "IPv4 link-local addresses need no scope");
    let addr = lab.link_local(&lab.world.server, "s0");
    lab.plain_to(&addr, &Connect { scope: Some("r1".into()), ..Connect::default() })
}

/// The client sends a lone TCP segment past its own TCP.
pub fn client_sends_raw(lab: &Lab, family: Family) -> Seen {
    raw(lab, family, json!({}))
}

/// A lone TCP segment with a marker, far enough behind the header that a fragment without one
/// may carry it; it counts as delivered when it was sent.
pub fn raw(lab: &Lab, family: Family, more: serde_json::Value) -> Seen {
    let hex = fresh_hex();
    let mut command = json!({"do": "raw", "src": lab.world.client.addr(family), "dst": lab.addr(family),
                             "sport": 4444, "dport": PORT, "data": format!("{}TNGQ{hex}", ".".repeat(64))});
    command.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    let fate = match lab.client.ask(command) {
        Ok(_) => Fate::Delivered,
        Err(fault) => super::lab::fate_of(&fault),
    };
    Seen { fate, plaintext: lab.on_wire(&hex) }
}
