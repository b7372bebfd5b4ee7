//! The control API over its socket, and `tngctl`'s answers from it.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use common::*;
use tng::ctl::{Exit, Scope, Style};
use tng::daemon::{ControlState, State, serve_control};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

fn ask(socket: &Path, request: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).expect("connect");
    stream.write_all(request.as_bytes()).expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("status");
    (status, answer)
}

fn get(socket: &Path, path: &str) -> (u16, String) {
    ask(socket, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
}

struct Daemon {
    root: tempfile::TempDir,
    socket: std::path::PathBuf,
    state: Arc<ControlState>,
    stop: CancellationToken,
}

impl Daemon {
    fn start(name: &str) -> Self {
        let root = tempfile::tempdir().expect("directory");
        std::fs::create_dir(root.path().join(name)).expect("directory");
        let socket = root.path().join(name).join("control.sock");
        let listener = UnixListener::bind(&socket).expect("bind");
        let state = ControlState::new(name, "/etc/tng/test.toml");
        let stop = CancellationToken::new();
        tokio::spawn(serve_control(state.clone(), listener, None, stop.clone()));
        Self { root, socket, state, stop }
    }

    fn scope(&self, name: Option<&str>) -> Scope {
        Scope { name: name.map(str::to_owned), all: false, root: self.root.path().to_owned() }
    }
}

const PLAIN: Style = Style { colour: false };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_follows_the_life_cycle() {
    let daemon = Daemon::start("demo");
    assert_eq!(get(&daemon.socket, "/livez").0, 200);
    assert_eq!(get(&daemon.socket, "/readyz").0, 503);
    assert_eq!(get(&daemon.socket, "/metrics").0, 503);
    let pair = Pair::to(echo().await);
    daemon.state.set_plane(pair.ingress.clone());
    assert_eq!(get(&daemon.socket, "/readyz").0, 503);
    daemon.state.set_state(State::Ready);
    assert_eq!(get(&daemon.socket, "/readyz").0, 200);
    daemon.state.set_state(State::Draining);
    assert_eq!(get(&daemon.socket, "/readyz").0, 503);
    assert_eq!(get(&daemon.socket, "/nothing").0, 404);
    assert_eq!(ask(&daemon.socket, "POST /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").0, 405);
    let huge = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(40_000));
    let mut stream = UnixStream::connect(&daemon.socket).expect("connect");
    let _ = stream.write_all(huge.as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(!answer.starts_with("HTTP/1.1 200"), "an endless head was taken: {answer}");
    daemon.stop.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_connections_and_metrics_tell_what_happened() {
    let daemon = Daemon::start("demo");
    let pair = Pair::to(echo().await);
    daemon.state.set_plane(pair.ingress.clone());
    daemon.state.set_state(State::Ready);
    let mut client = pair.client().await;
    let mut byte = [0];
    client.write_all(b"x").await.expect("write");
    client.read_exact(&mut byte).await.expect("echo");

    let status = tng::ctl::status(&daemon.scope(None), false, PLAIN);
    assert_eq!(status.exit, Exit::Healthy, "{:?}", status.errors);
    for part in ["demo ready", "ingress in", "1 open, 1 in all, 0 refused", "NO ATTESTATION", &pair.tunnel.to_string()]
    {
        assert!(status.text.contains(part), "no {part:?} in {}", status.text);
    }
    let connections = tng::ctl::connections(&daemon.scope(Some("demo")), false);
    let source = client.local_addr().expect("address").to_string();
    for part in [source.as_str(), "relay", "1 B", &pair.tunnel.to_string()] {
        assert!(connections.text.contains(part), "no {part:?} in {}", connections.text);
    }
    let json = tng::ctl::status(&daemon.scope(Some("demo")), true, PLAIN).text;
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value[0]["endpoints"][0]["counters"]["bytes_up"], 1);

    drop(client);
    eventually("the end", || pair.ingress.open_connections() == 0).await;
    let (status, metrics) = get(&daemon.socket, "/metrics");
    assert_eq!(status, 200);
    assert!(metrics.contains("application/openmetrics-text"));
    for line in [
        "tng_connections_total{endpoint=\"in\",side=\"ingress\",reason=\"closed\"} 1",
        "tng_relayed_bytes_total{endpoint=\"in\",side=\"ingress\",direction=\"up\"} 1",
        "tng_connections_active{endpoint=\"in\",side=\"ingress\"} 0",
        "tng_handshake_duration_seconds_count{endpoint=\"in\",side=\"ingress\"} 1",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "no {line:?} in {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_status_tells_degraded_and_absent_apart() {
    let daemon = Daemon::start("demo");
    let pair = Pair::to(echo().await);
    daemon.state.set_plane(pair.ingress.clone());
    daemon.state.set_state(State::Ready);
    daemon.state.set_problems(vec!["the guard is stopped".to_owned()]);
    let status = tng::ctl::status(&daemon.scope(Some("demo")), false, Style { colour: true });
    assert_eq!(status.exit, Exit::Degraded);
    assert!(status.text.contains("\x1b[1;31mDEGRADED: the guard is stopped\x1b[0m"), "{}", status.text);
    assert_eq!(tng::ctl::status(&daemon.scope(Some("other")), false, PLAIN).exit, Exit::NotRunning);
    let dead = daemon.root.path().join("dead");
    std::fs::create_dir(&dead).expect("directory");
    drop(UnixListener::bind(dead.join("control.sock")).expect("bind"));
    // A program that another test starts has a copy of the socket until it is that program (fork, exec).
    let ask = || tng::ctl::status(&daemon.scope(Some("dead")), false, PLAIN);
    eventually("nobody has the socket", || ask().exit == Exit::NotRunning).await;
    let gone = ask();
    assert_eq!(gone.exit, Exit::NotRunning);
    assert!(gone.errors[0].contains("not running"), "{:?}", gone.errors);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_without_evidence_is_degraded_and_says_why() {
    let daemon = Daemon::start("demo");
    let pair = Pair::to(echo().await);
    daemon.state.set_plane(pair.ingress.clone());
    daemon.state.set_state(State::Ready);
    let says = |attest: serde_json::Value| {
        *pair.tls.status.lock().expect("status") = serde_json::json!({ "attest": attest, "as_calls": 7 });
    };
    says(serde_json::json!({ "usable": true, "state": "ok" }));
    assert_eq!(tng::ctl::status(&daemon.scope(None), false, PLAIN).exit, Exit::Healthy);
    // The first evidence is being made: handshakes wait for it, nothing has failed.
    says(serde_json::json!({ "usable": false, "state": "ok", "reason": null, "error": null }));
    assert_eq!(tng::ctl::status(&daemon.scope(None), false, PLAIN).exit, Exit::Healthy);
    says(serde_json::json!({ "usable": false, "state": "failing", "reason": "aa-unreachable", "error": "no socket" }));
    let status = tng::ctl::status(&daemon.scope(None), false, PLAIN);
    assert_eq!(status.exit, Exit::Degraded);
    assert!(status.text.contains("endpoint in has no evidence to show: aa-unreachable: no socket"), "{}", status.text);
    // Served, and refused by all: this side alone can mend it.
    let (reason, error) =
        ("token-status-contraindicated", "the token about this side: appraisal of cpu0: contraindicated");
    says(
        serde_json::json!({ "usable": true, "state": "degraded", "reason": reason, "error": error, "evidence_age": 2 }),
    );
    let status = tng::ctl::status(&daemon.scope(None), false, PLAIN);
    assert_eq!(status.exit, Exit::Degraded);
    assert!(
        status.text.contains(&format!("endpoint in is refused by its peers: {reason}: {error}")),
        "{}",
        status.text
    );
    assert!(status.text.contains("peers refuse it: token-status-contraindicated"), "{}", status.text);
    let metrics = get(&daemon.socket, "/metrics").1;
    let line = "tng_attestation_events_total{endpoint=\"in\",side=\"ingress\",event=\"as-request\"} 7";
    assert!(metrics.contains(line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_names_the_attestation_services_and_which_one_answers() {
    let daemon = Daemon::start("demo");
    let pair = Pair::to(echo().await);
    daemon.state.set_plane(pair.ingress.clone());
    daemon.state.set_state(State::Ready);
    let down = serde_json::json!({ "addr": "http://192.0.2.1/", "kind": null, "state": "failing", "answered": 0,
        "last_answer": null, "reason": "as-unreachable" });
    let well = serde_json::json!({ "addr": "http://192.0.2.2/", "kind": "grpc", "state": "ok", "answered": 3,
        "last_answer": 1, "reason": null });
    let verify = serde_json::json!({ "services": [down, well] });
    *pair.tls.status.lock().expect("status") = serde_json::json!({ "verify": verify, "as_failovers": 2 });
    let text = tng::ctl::status(&daemon.scope(None), false, PLAIN).text;
    assert!(text.contains("http://192.0.2.1/: failing: as-unreachable, never answered"), "{text}");
    assert!(text.contains("http://192.0.2.2/ (grpc): answered 3 times, last "), "{text}");
    let metrics = get(&daemon.socket, "/metrics").1;
    let line = "tng_attestation_events_total{endpoint=\"in\",side=\"ingress\",event=\"as-failover\"} 2";
    assert!(metrics.contains(line), "{metrics}");
}

/// A configuration with errors leaves no endpoint, and every connection is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_refuses_everything_is_not_ready() {
    let daemon = Daemon::start("demo");
    daemon.state.set_plane(start(&PlainTls::new(&["rats-tls"]), vec![], vec![]));
    daemon.state.set_state(State::Ready);
    daemon.state.set_problems(vec!["the configuration has errors".to_owned()]);
    assert_eq!(get(&daemon.socket, "/readyz").0, 503);
    assert_eq!(get(&daemon.socket, "/livez").0, 200);
}
