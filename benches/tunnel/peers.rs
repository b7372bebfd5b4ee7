//! The peers, and how each is told to do the same work: TLS 1.3 with `TLS_AES_128_GCM_SHA256`, P-256 certificates,
//! both sides verified, no resumption, two threads or workers an end. Whether they obey is for `checks` to find out.

use std::fmt::{self, Write as _};
use std::path::Path;
use std::process::Command;

use crate::Outcome;
use crate::certs::{Certs, SERVER_NAME};

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// No tunnel: what the machine and the load generator can do.
    Direct,
    /// Debian's stunnel4.
    Stunnel,
    /// Debian's haproxy.
    Haproxy,
    /// Debian's nginx with the stream module.
    Nginx,
    /// tng.
    Tng,
}

/// One end of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Takes plain connections and speaks TLS to the other end.
    Client,
    /// Takes TLS and speaks plainly to the service.
    Server,
}

/// Where one end listens and where it connects, both on 127.0.0.1.
#[derive(Clone, Copy)]
pub struct Ports {
    /// Port to listen on.
    pub listen: u16,
    /// Port to connect to.
    pub target: u16,
}

const NGINX_STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

impl Peer {
    /// Everyone, in the order of the table.
    pub const ALL: [Peer; 5] = [Peer::Direct, Peer::Stunnel, Peer::Haproxy, Peer::Nginx, Peer::Tng];
    /// The three tng is compared with.
    pub const OTHERS: [Peer; 3] = [Peer::Stunnel, Peer::Haproxy, Peer::Nginx];

    /// The peer of that name.
    pub fn named(name: &str) -> Outcome<Self> {
        let found = Self::ALL.into_iter().find(|peer| peer.to_string() == name);
        found.ok_or_else(|| format!("\"{name}\" is no peer: direct, stunnel, haproxy, nginx, tng").into())
    }

    /// Application protocols the peer's ends insist on; a probe that offers none would not get a handshake.
    pub fn alpn(self) -> Vec<Vec<u8>> {
        if self == Peer::Tng { vec![b"rats-tls".to_vec()] } else { Vec::new() }
    }

    /// Whether a certificate of our authority is enough to be let in. tng wants evidence in it, which only tng makes.
    pub fn trusts_our_authority(self) -> bool {
        self != Peer::Tng
    }

    /// Program and arguments of one end, its configuration written to `dir`. Not for [`Peer::Direct`].
    pub fn command(self, end: End, ports: Ports, dir: &Path, certs: &Certs) -> Outcome<Command> {
        let (name, text) = match self {
            Peer::Direct => return Err("the direct path has no ends".into()),
            Peer::Stunnel => ("stunnel.conf", stunnel(end, ports, certs)),
            Peer::Haproxy => ("haproxy.cfg", haproxy(end, ports, certs)),
            Peer::Nginx => ("nginx.conf", nginx(end, ports, dir, certs)),
            Peer::Tng if end == End::Client => ("bench-ingress.toml", tng("ingress", ports)),
            Peer::Tng => ("bench-egress.toml", tng("egress", ports)),
        };
        let file = dir.join(name);
        std::fs::write(&file, text)?;
        let mut command = match self {
            Peer::Stunnel => Command::new("/usr/bin/stunnel4"),
            Peer::Haproxy => Command::new("/usr/sbin/haproxy"),
            Peer::Nginx => Command::new("/usr/sbin/nginx"),
            _ => Command::new(env!("CARGO_BIN_EXE_tngd")),
        };
        match self {
            Peer::Stunnel => command.arg(&file),
            // -db: stay in the foreground, one process.
            Peer::Haproxy => command.arg("-db").arg("-f").arg(&file),
            Peer::Nginx => command.arg("-p").arg(dir).arg("-e").arg("stderr").arg("-c").arg(&file),
            _ => command.arg("serve").arg(&file).env("TNG_RUNTIME_DIR", dir),
        };
        Ok(command)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Peer::Direct => "direct",
            Peer::Stunnel => "stunnel",
            Peer::Haproxy => "haproxy",
            Peer::Nginx => "nginx",
            Peer::Tng => "tng",
        })
    }
}

/// Fails with the remedy when a peer's program is not there: a peer left out silently would flatter the others.
pub fn require_installed(peers: &[Peer]) -> Outcome<()> {
    let needs = [
        (Peer::Stunnel, "/usr/bin/stunnel4", "stunnel4"),
        (Peer::Haproxy, "/usr/sbin/haproxy", "haproxy"),
        (Peer::Nginx, "/usr/sbin/nginx", "nginx"),
        (Peer::Nginx, NGINX_STREAM_MODULE, "libnginx-mod-stream"),
    ];
    let missing: Vec<&str> = needs
        .iter()
        .filter(|(peer, path, _)| peers.contains(peer) && !Path::new(path).exists())
        .map(|(_, _, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!("not installed: {0}; as root: apt-get install --no-install-recommends {0}", missing.join(" ")).into())
}

fn stunnel(end: End, ports: Ports, certs: &Certs) -> String {
    let (identity, client) = match end {
        End::Client => (&certs.client, "yes"),
        End::Server => (&certs.server, "no"),
    };
    let mut text = format!(
        "foreground = yes\npid =\ndebug = warning\n[bench]\nclient = {client}\naccept = 127.0.0.1:{}\n\
         connect = 127.0.0.1:{}\ncert = {}\nkey = {}\nCAfile = {}\nverifyChain = yes\nrequireCert = yes\n\
         sslVersion = TLSv1.3\nciphersuites = TLS_AES_128_GCM_SHA256\ncurves = X25519\nsessionResume = yes\n\
         socket = a:TCP_NODELAY=1\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n",
        ports.listen,
        ports.target,
        identity.cert.display(),
        identity.key.display(),
        certs.ca.display(),
    );
    if end == End::Client {
        let _ = writeln!(text, "checkHost = {SERVER_NAME}");
    }
    text
}

fn haproxy(end: End, ports: Ports, certs: &Certs) -> String {
    let mut text = String::from(
        "global\n  nbthread 2\n  maxconn 4000\n  tune.ssl.cachesize 0\ndefaults\n  mode tcp\n  timeout connect 10s\n  \
         timeout client 10m\n  timeout server 10m\n  option tcp-smart-accept\n  retries 0\nlisten bench\n",
    );
    let ca = certs.ca.display();
    let Ports { listen, target } = ports;
    let _ = match end {
        End::Client => write!(
            text,
            "  bind 127.0.0.1:{listen}\n  server far 127.0.0.1:{target} ssl crt {} ca-file {ca} verify required \
             verifyhost {SERVER_NAME} ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256\n",
            certs.client.both.display(),
        ),
        End::Server => write!(
            text,
            "  bind 127.0.0.1:{listen} ssl crt {} ca-file {ca} verify required ssl-min-ver TLSv1.3 \
             ciphersuites TLS_AES_128_GCM_SHA256 curves X25519\n  server service 127.0.0.1:{target}\n",
            certs.server.both.display(),
        ),
    };
    text
}

fn nginx(end: End, ports: Ports, dir: &Path, certs: &Certs) -> String {
    let mut text = format!(
        "load_module {NGINX_STREAM_MODULE};\ndaemon off;\nworker_processes 2;\nworker_rlimit_nofile 9000;\n\
         pid {}/nginx.pid;\nerror_log stderr error;\nevents {{ worker_connections 4096; }}\nstream {{\n\
         proxy_half_close on;\nproxy_timeout 10m;\nserver {{\n",
        dir.display()
    );
    let ca = certs.ca.display();
    let Ports { listen, target } = ports;
    let _ = match end {
        End::Client => write!(
            text,
            "listen 127.0.0.1:{listen};\nproxy_pass 127.0.0.1:{target};\nproxy_ssl on;\nproxy_ssl_protocols TLSv1.3;\n\
             proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\nproxy_ssl_session_reuse on;\n\
             proxy_ssl_certificate {};\nproxy_ssl_certificate_key {};\nproxy_ssl_trusted_certificate {ca};\n\
             proxy_ssl_verify on;\nproxy_ssl_name {SERVER_NAME};\n",
            certs.client.cert.display(),
            certs.client.key.display(),
        ),
        End::Server => write!(
            text,
            "listen 127.0.0.1:{listen} ssl;\nproxy_pass 127.0.0.1:{target};\nssl_protocols TLSv1.3;\n\
             ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\nssl_ecdh_curve X25519;\nssl_session_tickets on;\n\
             ssl_session_cache shared:bench:10m;\nssl_certificate {};\nssl_certificate_key {};\nssl_client_certificate {ca};\n\
             ssl_verify_client on;\n",
            certs.server.cert.display(),
            certs.server.key.display(),
        ),
    };
    text.push_str("}\n}\n");
    text
}

fn tng(side: &str, ports: Ports) -> String {
    // Both sides attest and both verify: the only way tng's TLS is mutual.
    format!(
        "[[{side}]]\nname = \"bench\"\n[{side}.mapping]\nlisten = \"127.0.0.1:{}\"\ntarget = \"127.0.0.1:{}\"\n\
         [{side}.attest]\nprovider = \"sample\"\n[{side}.verify]\nprovider = \"sample\"\nallow_sample = true\n",
        ports.listen, ports.target
    )
}
