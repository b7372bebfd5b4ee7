//! Two booted hosts and the wire between them: `client` is where the ingress runs, `server` where egress and service do.

use std::path::Path;
use std::time::Duration;

use super::container::Container;
use super::netns::{fresh_hex, wait_until};
use super::report::Report;
use super::traffic::{Client, Load};
use super::wire::Wire;

/// Where the service listens, on every address of the server.
pub const PORT: u16 = 8080;
/// The client's addresses.
pub const CLIENT: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
/// The server's addresses.
pub const SERVER: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
/// The configurations of the manual's first steps, as they are in the package.
pub const INGRESS: &str = include_str!("../../etc/tng/sample-ingress.toml");
/// The service's side of it.
pub const EGRESS: &str = include_str!("../../etc/tng/sample-egress.toml");
/// From a repaired fault to the first answer: RestartSec, evidence, handshake; and two cores shared by four hosts.
pub const HEAL: Duration = Duration::from_secs(30);

/// The service: it says who asked for what, and writes it down.
const NGINX: &str = "log_format who '$remote_addr $request_uri';
server {
    listen 8080 backlog=4096;
    listen [::]:8080 backlog=4096 ipv6only=on;
    access_log /var/log/nginx/who.log who;
    keepalive_requests 100000;
    location / { default_type text/plain; return 200 'from=$remote_addr uri=$request_uri\\n'; }
}
";

/// The two hosts.
pub struct Pair {
    /// Where the lines of this run go.
    pub report: Report,
    /// The wire.
    pub wire: Wire,
    /// Ingress and applications.
    pub client: Container,
    /// Egress and service.
    pub server: Container,
}

impl Pair {
    /// Two hosts over these root file systems, named for them; nothing is booted yet.
    pub fn new(run: &str, client: (&str, &Path), server: (&str, &Path), repository: &Path) -> Self {
        let pair = Self {
            report: Report::new(&format!("{}->{}", client.0, server.0)),
            wire: Wire::new(run),
            client: Container::new(run, client.0, client.1, repository),
            server: Container::new(run, server.0, server.1, repository),
        };
        for (host, addrs) in [(&pair.client, CLIENT), (&pair.server, SERVER)] {
            host.prepare("/etc/systemd/network/50-host0.network", &network(addrs));
            host.prepare("/etc/hostname", &format!("{}\n", host.name));
            host.prepare("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n");
        }
        pair.server.prepare("/etc/nginx/conf.d/service.conf", NGINX);
        pair
    }

    /// Boots both at once.
    pub fn boot(&self) {
        self.client.boot(&self.wire);
        self.server.boot(&self.wire);
        self.client.wait_booted();
        self.server.wait_booted();
    }

    /// One point of this run.
    pub fn point(&self, what: &str, show: impl FnOnce() -> String) -> bool {
        self.report.point(what, || evidence(&self.client) + &evidence(&self.server), show)
    }

    /// Both addresses of the service.
    pub fn targets(&self) -> Vec<(String, u16)> {
        SERVER.iter().map(|addr| ((*addr).to_owned(), PORT)).collect()
    }

    /// A client on the client's host.
    pub fn traffic(&self, marker: &str, load: &Load) -> Client {
        Client::start(&self.client, &self.targets(), marker, load)
    }

    /// curl on the client to both addresses of the service; what each answered or said.
    pub fn curls(&self, marker: &str) -> [Result<String, String>; 2] {
        SERVER.map(|addr| curl(&self.client, &authority(addr, PORT), marker))
    }

    /// Waits until both addresses of the service answer through what is there. Fails with the last error.
    #[track_caller]
    pub fn wait_served(&self) {
        let mut last = String::new();
        let served = wait_until(HEAL, || match self.curls(&marker("wait")) {
            [Ok(_), Ok(_)] => true,
            [a, b] => {
                last = format!("IPv4: {a:?}\nIPv6: {b:?}");
                false
            }
        });
        assert!(served, "the service does not answer within {HEAL:?}\n{last}");
    }

    /// Asserts that nothing with `marker` was on the wire.
    #[track_caller]
    pub fn assert_unseen(&self, marker: &str) {
        assert!(!self.wire.saw(marker), "PLAINTEXT: {marker} was on the wire");
    }

    /// The state from which scenarios start: the two sample configurations, running, serving.
    pub fn settle(&self) -> bool {
        self.wire.forget();
        for (host, name, text) in [(&self.client, "ingress", INGRESS), (&self.server, "egress", EGRESS)] {
            let file = format!("/etc/tng/{name}.toml");
            let changed = host.try_sh(&format!("cat {file}")).stdout != text;
            if changed {
                host.write(&file, text);
            }
            let active = host.holds(&format!("systemctl is-active -q tng@{name}.service tng@{name}.socket"));
            if changed || !active {
                host.try_sh(&format!("systemctl reset-failed 'tng*'; systemctl restart tng@{name}"));
            }
        }
        let served = wait_until(Duration::from_secs(5), || self.curls(&marker("settle")).iter().all(Result::is_ok));
        if served {
            return true;
        }
        // One fault must not spoil all that comes after it.
        for (host, name) in [(&self.client, "ingress"), (&self.server, "egress")] {
            host.try_sh(&format!(
                "systemctl stop tng@{name} tng-guard@{name}; systemctl reset-failed 'tng*'; systemctl start tng@{name}"
            ));
        }
        self.point("the tunnel serves before the next scenario", || {
            self.wait_served();
            "only after a stop and a start".into()
        })
    }
}

/// A word that is nowhere else.
pub fn marker(what: &str) -> String {
    format!("TNGE2E-{what}-{}", fresh_hex())
}

/// Address and port as a URL has them.
pub fn authority(addr: &str, port: u16) -> String {
    if addr.contains(':') { format!("[{addr}]:{port}") } else { format!("{addr}:{port}") }
}

/// curl on `host`: the answer, when it is the service's to this very request.
pub fn curl(host: &Container, authority: &str, marker: &str) -> Result<String, String> {
    let out = host.try_sh(&format!("curl -sS --noproxy '*' --max-time 5 http://{authority}/{marker}"));
    if out.ok() && out.stdout.contains(&format!("uri=/{marker}")) {
        Ok(out.stdout)
    } else {
        Err(format!("{}{}", out.stdout, out.stderr))
    }
}

/// What an operator would look at.
pub fn evidence(host: &Container) -> String {
    if !host.is_on() {
        return format!("--- {} is off\n", host.name);
    }
    let out = host.try_sh(
        "set +e
        systemctl --no-pager --full -n 0 status 'tng*' 2>&1 | head -60
        echo '--- journalctl'; journalctl --no-pager -q -o short-monotonic -b -u 'tng*' 2>&1 | grep -vE ' B up, |: refused$' | tail -40
        echo '--- tngctl status'; tngctl status 2>&1 | head -30
        echo '--- nft list tables, ip rule'; nft list tables; ip rule; ip -6 rule
        echo '--- ss -ltn'; ss -ltn
        echo '--- systemctl list-jobs, --failed'; systemctl --no-pager list-jobs; systemctl --no-pager --failed",
    );
    format!("=== {}\n{}{}", host.name, out.stdout, out.stderr)
}

/// networkd's own configuration of the interface that nspawn makes.
fn network(addrs: [&str; 2]) -> String {
    format!(
        "[Match]\nName=host0\n[Network]\nDHCP=no\nIPv6AcceptRA=no\nIPv6DuplicateAddressDetection=0\nAddress={}/24\nAddress={}/64\n",
        addrs[0], addrs[1]
    )
}
