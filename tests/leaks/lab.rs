//! The lab of one row: a world, its applications, and the ways traffic is sent and judged.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::netns::{App, Connect, Family, Fault, Host, Tng, World, fresh_hex, wait_for};
use super::table::{Fate, Seen};

/// Port of the service that everything is about.
pub const PORT: u16 = 8080;
/// Mark of an ingress's own sockets.
pub const INGRESS_MARK: u32 = 566;
/// After this long without an answer, traffic counts as dropped.
pub const QUIET: Duration = Duration::from_millis(900);

/// Connections that are open at a stop are given little time, as many rows keep some open.
const DRAIN: &str = "drain_timeout = \"1s\"\n";

/// Captures of the ingress that most rows use.
pub const TO_SERVER: &str = r#"{ to = "203.0.113.0/24", port = 8080 }, { to = "2001:db8:2::/64", port = 8080 }"#;

/// A world with applications.
pub struct Lab {
    /// The hosts.
    pub world: World,
    /// Applications on `client`, as root.
    pub client: App,
    /// The off-host outsider, on the router.
    pub router: App,
    /// Services on `server`.
    pub server: App,
    /// The service's listeners on `server`, IPv4 and IPv6.
    pub service: [u64; 2],
    backend: OnceLock<App>,
    sidecar: OnceLock<App>,
}

/// A connection that stays open.
#[derive(Clone, Copy)]
pub struct Flow<'a> {
    /// Who opened it.
    pub app: &'a App,
    /// Its handle there.
    pub conn: u64,
    /// The marker of its first exchange.
    first: u64,
}

impl Flow<'_> {
    /// The marker of its first exchange.
    pub fn hex(&self) -> String {
        format!("{:016x}", self.first)
    }
}

impl Lab {
    /// A fresh world with the service running and no tng.
    pub fn new() -> Self {
        let world = World::new();
        let (client, router, server) = thread::scope(|s| {
            let client = s.spawn(|| world.client.app());
            let router = s.spawn(|| world.router.app());
            (client.join().expect("client"), router.join().expect("router"), world.server.app())
        });
        let service = ["0.0.0.0", "::"].map(|any| server.listen(any.parse().expect("address"), PORT, json!({})));
        Self { world, client, router, server, service, backend: OnceLock::new(), sidecar: OnceLock::new() }
    }

    /// The container behind the server, with the same service.
    pub fn backend(&self) -> &App {
        self.backend.get_or_init(|| {
            let app = self.world.backend.app();
            for family in Family::BOTH {
                app.listen(self.world.backend.addr(family), PORT, json!({}));
            }
            app
        })
    }

    /// The container behind the client.
    pub fn sidecar(&self) -> &App {
        self.sidecar.get_or_init(|| self.world.sidecar.app())
    }

    /// Address of the service.
    pub fn addr(&self, family: Family) -> IpAddr {
        self.world.server.addr(family)
    }

    /// Does something for both families at once.
    pub fn each<T: Send>(&self, f: impl Fn(Family) -> T + Sync) -> [T; 2] {
        thread::scope(|s| {
            let v6 = s.spawn(|| f(Family::V6));
            [f(Family::V4), v6.join().unwrap_or_else(|p| std::panic::resume_unwind(p))]
        })
    }

    /// Starts the usual ingress on the client and the usual egress on the server.
    pub fn start(&self) -> (Tng<'_>, Tng<'_>) {
        self.start_with(&ingress(TO_SERVER), &egress(""))
    }

    /// Starts an ingress on the client and an egress on the server.
    pub fn start_with(&self, ingress: &str, egress: &str) -> (Tng<'_>, Tng<'_>) {
        thread::scope(|s| {
            let i = s.spawn(|| Tng::start(&self.world.client, "in", ingress));
            let e = Tng::start(&self.world.server, "out", egress);
            (i.join().unwrap_or_else(|p| std::panic::resume_unwind(p)), e)
        })
    }

    /// Starts the usual egress on the server.
    pub fn start_egress(&self) -> Tng<'_> {
        Tng::start(&self.world.server, "out", &egress(""))
    }

    /// One request and its answer from the client; plaintext is either of them on the wire.
    pub fn exchange(&self, family: Family, how: &Connect) -> Seen {
        self.exchange_from(&self.client, &self.addr(family).to_string(), how)
    }

    /// One request and its answer from any application to any address.
    pub fn exchange_from(&self, app: &App, addr: &str, how: &Connect) -> Seen {
        let hex = fresh_hex();
        let how = with_port(how);
        let fate = match app.connect(addr, &how) {
            Err(fault) => fate_of(&fault),
            Ok(conn) => ask(app, conn, &hex),
        };
        Seen { fate, plaintext: self.on_wire(&hex) }
    }

    /// One request of an off-host client that uses no tng; plaintext is a request that the service
    /// received, or an answer on the wire. What the client itself sent is its own affair.
    pub fn plain(&self, family: Family) -> Seen {
        self.plain_to(&self.addr(family).to_string(), &Connect::default())
    }

    /// The same to any address.
    pub fn plain_to(&self, addr: &str, how: &Connect) -> Seen {
        self.plain_from(&self.router, addr, how)
    }

    /// The same from any application.
    pub fn plain_from(&self, app: &App, addr: &str, how: &Connect) -> Seen {
        let hex = fresh_hex();
        let fate = match app.connect(addr, &with_port(how)) {
            Err(fault) => fate_of(&fault),
            Ok(conn) => ask(app, conn, &hex),
        };
        Seen { fate, plaintext: self.bypassed(&hex) }
    }

    /// A UDP request and its answer.
    pub fn datagram(&self, app: &App, addr: &str) -> Seen {
        let hex = fresh_hex();
        let command = json!({"do": "udp", "addr": addr, "port": PORT, "data": format!("TNGQ{hex}"),
                             "timeout": QUIET.as_secs_f64()});
        let fate = match app.ask(command) {
            Err(fault) => fate_of(&fault),
            Ok(_) => Fate::Delivered,
        };
        Seen { fate, plaintext: self.on_wire(&hex) }
    }

    /// Opens a connection from the client and exchanges a marker over it, so that it is live.
    pub fn flow(&self, family: Family) -> Flow<'_> {
        self.flow_from(&self.client, &self.addr(family).to_string())
    }

    /// The same from any application.
    pub fn flow_from<'a>(&self, app: &'a App, addr: &str) -> Flow<'a> {
        let conn =
            app.connect(addr, &with_port(&Connect::default())).unwrap_or_else(|e| panic!("flow to {addr}: {e:?}"));
        let hex = fresh_hex();
        let fate = ask(app, conn, &hex);
        assert_eq!(fate, Fate::Delivered, "the first exchange of a flow to {addr} that should work");
        Flow { app, conn, first: u64::from_str_radix(&hex, 16).expect("hex") }
    }

    /// A further exchange over a flow of the client; plaintext as in [`Lab::exchange`].
    pub fn say(&self, flow: Flow<'_>) -> Seen {
        let hex = fresh_hex();
        let fate = ask(flow.app, flow.conn, &hex);
        Seen { fate, plaintext: self.on_wire(&hex) }
    }

    /// A further exchange over a plain flow of an outsider; plaintext as in [`Lab::plain`].
    pub fn say_plain(&self, flow: Flow<'_>) -> Seen {
        let hex = fresh_hex();
        let fate = ask(flow.app, flow.conn, &hex);
        Seen { fate, plaintext: self.bypassed(&hex) }
    }

    /// The service sends over a flow of its own accord.
    pub fn push(&self, flow: Flow<'_>) -> Seen {
        self.push_from(&self.server, flow)
    }

    /// The same from any service.
    pub fn push_from(&self, service: &App, flow: Flow<'_>) -> Seen {
        let text = format!("TNGP{}", fresh_hex());
        // Whether the kernel takes the bytes does not matter: they may leave later, or never.
        let _ = service.push(&flow.hex(), &text);
        let fate = match flow.app.recv(flow.conn, &text, QUIET) {
            Ok(_) => Fate::Delivered,
            Err(fault) => fate_of(&fault),
        };
        let plaintext = self.world.saw(&text).then(|| "pushed onto the wire".to_owned());
        Seen { fate, plaintext }
    }

    /// Plaintext of a marker on the wire, in either direction.
    pub fn on_wire(&self, hex: &str) -> Option<String> {
        let place = |kind: &str, what: &str| self.world.saw(&format!("{kind}{hex}")).then(|| what.to_owned());
        place("TNGQ", "request on the wire").or_else(|| place("TNGA", "answer on the wire"))
    }

    /// Whether a service got a plain client's request, or answered it on the wire.
    fn bypassed(&self, hex: &str) -> Option<String> {
        let services = [Some(&self.server), self.backend.get()];
        if services.into_iter().flatten().any(|app| app.received(hex).is_some()) {
            return Some("request reached the service".to_owned());
        }
        self.world.saw(&format!("TNGA{hex}")).then(|| "answer on the wire".to_owned())
    }

    /// Link-local address of an interface of a host.
    pub fn link_local(&self, host: &Host, device: &str) -> String {
        let text = host.sh(&format!("ip -6 -o addr show dev {device} scope link"));
        let addr = text.split_whitespace().find(|w| w.starts_with("fe80")).expect("link-local address");
        addr.split('/').next().expect("address").to_owned()
    }

    /// Takes ip rule 565 of both families away from a host.
    pub fn delete_rule(&self, host: &Host) {
        host.sh("ip -4 rule del pref 565; ip -6 rule del pref 565");
    }

    /// Waits until the kernel tracks no connection of the service on a host any more.
    pub fn wait_untracked(&self, host: &Host, deadline: Duration) {
        wait_for("conntrack forgets", deadline, || {
            let listed = ["ipv4", "ipv6"].map(|f| host.run("conntrack", &["-L", "-f", f, "-p", "tcp"]).stdout);
            !listed.concat().contains(&format!("dport={PORT}"))
        });
    }
}

/// What a socket call's failure means to the application.
pub fn fate_of(fault: &Fault) -> Fate {
    match fault.0.as_str() {
        "timeout" | "ETIMEDOUT" => Fate::Dropped,
        "EOF" | "ECONNREFUSED" | "ECONNRESET" | "EPIPE" | "EPERM" | "EACCES" | "ENETUNREACH" | "EHOSTUNREACH"
        | "ECONNABORTED" => Fate::Refused,
        other => panic!("an application met {other}, which says neither refused nor dropped"),
    }
}

/// Sends a request and waits for its answer.
pub fn ask(app: &App, conn: u64, hex: &str) -> Fate {
    if let Err(fault) = app.send(conn, &format!("TNGQ{hex}\n")) {
        return fate_of(&fault);
    }
    match app.recv(conn, &format!("TNGA{hex}"), QUIET) {
        Ok(_) => Fate::Delivered,
        Err(fault) => fate_of(&fault),
    }
}

fn with_port(how: &Connect) -> Connect {
    let port = if how.port == 0 { PORT } else { how.port };
    Connect { port, ..how.clone() }
}

/// An ingress that captures the given entries and verifies sample evidence.
pub fn ingress(capture: &str) -> String {
    format!(
        "{DRAIN}[[ingress]]\nname = \"in\"\n[ingress.netfilter]\ncapture = [{capture}]\n\
         [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n"
    )
}

/// An ingress that listens on loopback and goes to the service's IPv4 or IPv6 address.
pub fn ingress_mapping(listen: &str, target: &str) -> String {
    format!(
        "{DRAIN}[[ingress]]\nname = \"map\"\n[ingress.mapping]\nlisten = \"{listen}\"\ntarget = \"{target}\"\n\
         [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n"
    )
}

/// An egress in front of the service with sample evidence; `more` adds keys of its netfilter table.
pub fn egress(more: &str) -> String {
    format!(
        "{DRAIN}[[egress]]\nname = \"out\"\n[egress.netfilter]\ncapture = [{{ port = {PORT} }}]\n{more}\n\
         [egress.attest]\nprovider = \"sample\"\n"
    )
}
