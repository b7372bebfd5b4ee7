//! The programs of the tests, each with a configuration of its own, and tng's configurations.

use std::path::PathBuf;
use std::time::Duration;

use super::netns::{Family, Host, Output, Proc, wait_for, wait_until};

/// From start to the first answer.
const START: Duration = Duration::from_secs(10);
/// Captures of everything that goes to the server's port 8080.
pub const TO_SERVER: &str = r#"{ to = "203.0.113.0/24", port = 8080 }, { to = "2001:db8:2::/64", port = 8080 }"#;
/// The verifier of an ingress in a trial.
pub const VERIFY: &str = "[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n";
/// The attester of an egress in a trial.
pub const ATTEST: &str = "[egress.attest]\nprovider = \"sample\"\n";

/// An ingress that captures `capture` and verifies as `verify` says.
pub fn ingress(capture: &str, verify: &str) -> String {
    format!("[[ingress]]\nname = \"web\"\n[ingress.netfilter]\ncapture = [{capture}]\n{verify}")
}

/// An egress that captures `port` and attests as `attest` says; `more` adds keys of its netfilter table.
pub fn egress(port: u16, more: &str, attest: &str) -> String {
    format!("[[egress]]\nname = \"web\"\n[egress.netfilter]\ncapture = [{{ port = {port} }}]\n{more}\n{attest}")
}

/// An address and port as a URL or a configuration has them.
pub fn socket_addr(host: &Host, family: Family, port: u16) -> String {
    std::net::SocketAddr::new(host.addr(family), port).to_string()
}

/// A web server that tells every client its address, the port it came to and what it asked for.
pub struct Nginx {
    _proc: Proc,
    dir: PathBuf,
}

impl Nginx {
    /// Starts it on `host` with `listen` lines of its own, and waits until the first of them answers.
    #[track_caller]
    pub fn start(host: &Host, listen: &[String]) -> Self {
        let dir = host.dir().join("nginx");
        std::fs::create_dir_all(dir.join("www")).expect("directory");
        let text = format!(
            "daemon off; master_process off; pid {0}/pid; error_log {0}/error.log;
            events {{ worker_connections 512; }}
            http {{
                log_format who '$remote_addr $request_uri'; access_log {0}/access.log who;
                client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f;
                uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
                server {{
                    {1}
                    location / {{ return 200 'from=$remote_addr port=$server_port uri=$request_uri\\n'; }}
                    location /files/ {{ alias {0}/www/; }}
                }}
            }}",
            dir.display(),
            listen.iter().map(|l| format!("listen {l};")).collect::<Vec<_>>().join(" "),
        );
        let file = dir.join("nginx.conf");
        std::fs::write(&file, text).expect("write nginx.conf");
        let (file, log) = (file.to_string_lossy().into_owned(), dir.join("error.log").to_string_lossy().into_owned());
        let proc = host.spawn("nginx", &["-c", &file, "-e", &log]);
        wait_for("nginx answers (install nginx-light and curl)", START, || curl(host, &listen[0], "/ready").ok());
        Self { _proc: proc, dir }
    }

    /// The usual one: port 8080 of the server's IPv4 and IPv6 addresses.
    #[track_caller]
    pub fn usual(host: &Host) -> Self {
        Self::start(host, &Family::BOTH.map(|family| socket_addr(host, family, 8080)))
    }

    /// Where the files of `/files/` are.
    pub fn files(&self) -> PathBuf {
        self.dir.join("www")
    }

    /// Waits for a request for `path` from `addr` in the access log, which nginx writes after its answer.
    #[track_caller]
    pub fn expect_logged(&self, addr: &str, path: &str) {
        let line = format!("{addr} {path}");
        let mut log = String::new();
        let found = wait_until(START, || {
            log = std::fs::read_to_string(self.dir.join("access.log")).expect("access log");
            log.lines().any(|l| l == line)
        });
        assert!(found, "no {line:?} in the access log:\n{log}");
    }
}

/// curl, without any proxy of the environment.
pub fn curl(host: &Host, addr: &str, path: &str) -> Output {
    curl_through(&[], host, addr, path)
}

/// The same through another program, as `setpriv` with its options.
pub fn curl_through(wrapper: &[&str], host: &Host, addr: &str, path: &str) -> Output {
    let url = format!("http://{addr}{path}");
    let mut words = wrapper.to_vec();
    words.extend(["curl", "-sS", "--noproxy", "*", "--max-time", "5", &url]);
    host.run(words[0], &words[1..])
}

/// A server on `host` that prints nothing and runs a python program; `ready` says when it listens.
pub fn python(host: &Host, program: &str, args: &[&str]) -> Proc {
    let mut words = vec!["-I", "-c", program];
    words.extend(args);
    let proc = host.spawn("/usr/bin/python3", &words);
    wait_for("python listens", START, || proc.output().contains("ready\n"));
    proc
}

/// SHA-256 of a file as sha256sum says.
pub fn sha256(host: &Host, file: &std::path::Path) -> String {
    let out = host.run("sha256sum", &[&file.to_string_lossy()]).expect_ok();
    out.split_whitespace().next().expect("digest").to_owned()
}

/// A file of `megabytes` that nothing compresses.
pub fn noise(host: &Host, file: &std::path::Path, megabytes: u32) -> String {
    host.sh(&format!("head -c {megabytes}M /dev/urandom >{}", file.display()));
    sha256(host, file)
}
