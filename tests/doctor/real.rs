//! The real probes: rules that are up, changed and gone, an agent that may and may not be asked, settings of a kernel.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tng::config::{self, AsKind, InstanceName, Verify, VerifyProvider};
use tng::ctl::doctor::{Check, Finding, Host as _, RealHost, Severity};

use super::fakes::aa::{FakeAa, Mode};
use super::fakes::as_rest::{FakeAs, Mode as As, Serves};
use super::lab::{Lab, TO_SERVER, ingress};
use super::netns::{Connect, Host, Parts, Tng, World, kernel_state, run, run_tngctl, tngctl, traces};

/// The doctor's exit status and findings on a host.
#[track_caller]
pub fn doctor(host: &Host) -> (Option<i32>, Vec<Value>) {
    let out = run_tngctl(host, &["doctor", "--json"]);
    let findings = serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}\n{}{}", out.stdout, out.stderr));
    (out.status.code(), findings)
}

/// Ids of the errors.
fn errors(findings: &[Value]) -> Vec<&str> {
    findings.iter().filter(|f| f["severity"] == "error").filter_map(|f| f["id"].as_str()).collect()
}

fn severity<'a>(findings: &'a [Value], id: &str) -> Option<&'a str> {
    findings.iter().filter(|f| f["id"] == id).filter_map(|f| f["severity"].as_str()).next()
}

/// What an unprivileged user would be refused is not this test's matter: the file is the caller's.
pub fn kernel_errors(findings: &[Value]) -> Vec<&str> {
    errors(findings).into_iter().filter(|id| !["user", "config-access"].contains(id)).collect()
}

#[test]
fn rules_guard_and_routes_are_seen_as_they_are() {
    let lab = Lab::new();
    let host = &lab.world.client;
    let parts = Parts::new(host, "in", &ingress(TO_SERVER));
    let (_, found) = doctor(host);
    assert_eq!(kernel_errors(&found), [""; 0], "a stopped instance: {found:#?}");
    for id in ["nft-tproxy", "nft-socket", "nft-fib", "nft-conntrack", "nft-reject", "nft-nat", "nft-owner"] {
        assert_eq!(severity(&found, id), Some("ok"), "{id}: {found:#?}");
    }
    assert_eq!(traces(host), "", "the doctor leaves nothing");

    let mut guard = parts.guard();
    parts.net_up();
    let serve = parts.serve();
    let before = kernel_state(host);
    let (status, found) = doctor(host);
    assert_eq!((status, kernel_errors(&found)), (Some(0), vec![]), "{found:#?}");
    for id in ["rules-present", "routes-present", "guard-running", "guard-table", "policy-rules", "mark-writers"] {
        assert_eq!(severity(&found, id), Some("ok"), "{id}");
    }
    assert_eq!(severity(&found, "sample-evidence"), Some("warning"));
    assert_eq!(kernel_state(host), before, "the doctor changes nothing");

    guard.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(guard.wait(Duration::from_secs(10)).success(), "{}", guard.output());
    let (status, found) = doctor(host);
    assert_eq!((status, kernel_errors(&found)), (Some(1), vec!["guard-running", "guard-table"]));
    host.sh("ip -4 rule del pref 565; nft add chain inet tng_in stranger");
    let (_, found) = doctor(host);
    assert_eq!(kernel_errors(&found), ["rules-present", "routes-present", "guard-running", "guard-table"]);
    host.sh("nft delete table inet tng_in");
    let (_, found) = doctor(host);
    let rules = found.iter().find(|f| f["id"] == "rules-present").expect("rules");
    assert!(rules["what"].as_str().is_some_and(|w| w.contains("is not there")), "{rules}");
    // The command that it names mends it.
    assert_eq!(rules["fix"], "tngd net up in");
    parts.net_up();
    let (_, found) = doctor(host);
    assert_eq!(kernel_errors(&found), ["guard-running", "guard-table"]);
    host.sh("ip rule add pref 100 fwmark 0x200/0x200 lookup main; nft 'table ip other { chain c { type filter hook output priority 0; meta mark set 7; }; }'");
    let (_, found) = doctor(host);
    assert_eq!(severity(&found, "policy-rules"), Some("error"), "it takes all that is captured");
    assert_eq!(severity(&found, "mark-writers"), Some("note"));
    assert_eq!(severity(&found, "own-marks"), Some("error"), "566 is 0x236");
    host.sh("ip rule del pref 100; nft 'table inet m { chain p { type filter hook prerouting priority mangle - 5; meta mark set ct mark; }; }'");
    let (_, found) = doctor(host);
    assert_eq!(severity(&found, "own-marks"), Some("ok"));
    assert_eq!(severity(&found, "mark-writers"), Some("error"));
    assert!(serve.stop().success());
    parts.net_down();
}

#[test]
fn a_file_that_is_not_in_force_and_one_that_is_broken_are_told() {
    let world = World::new();
    let host = &world.client;
    let tng = Tng::start(host, "in", &ingress(TO_SERVER));
    assert_eq!(severity(&doctor(host).1, "config-applied"), Some("ok"));
    let file = std::fs::File::options().write(true).open(host.config_dir().join("in.toml")).expect("file");
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).expect("time");
    assert_eq!(severity(&doctor(host).1, "config-applied"), Some("warning"));
    tng.write_config("nosuchkey = 1\n");
    let (status, found) = doctor(host);
    let valid = found.iter().find(|f| f["id"] == "config-valid").expect("finding");
    assert!(status == Some(1) && valid["what"].as_str().is_some_and(|w| w.contains("in.toml:1:")), "{valid}");
    // Rules of a broken file are looked at all the same.
    assert_eq!(severity(&found, "rules-present"), Some("ok"));
}

/// The evidence for what settings.rs looks at, and for what it leaves alone.
#[test]
fn ipv6_off_on_lo_stops_captures() {
    let world = World::new();
    let client = &world.client;
    client.sysctl(&[("net/ipv6/conf/lo/disable_ipv6", "1")]);
    let parts = Parts::new(client, "in", &ingress(TO_SERVER));
    let file = client.config_dir().join("in.toml");
    let up = super::netns::run_tngd(client, &["net", "up", &file.to_string_lossy()]);
    assert!(!up.ok(), "{}{}", up.stdout, up.stderr);
    assert_eq!(kernel_errors(&doctor(client).1), ["ipv6-on-lo"]);
    client.sysctl(&[("net/ipv6/conf/all/disable_ipv6", "0"), ("net/ipv6/conf/lo/disable_ipv6", "0")]);
    parts.net_up();
    assert_eq!(severity(&doctor(client).1, "ipv6-on-lo"), Some("ok"));
    parts.net_down();
}

#[test]
fn accepted_sockets_with_the_packets_mark_break_the_tunnel_and_reflected_marks_do_not() {
    let lab = Lab::new();
    let (client, server) = (&lab.world.client, &lab.world.server);
    let pair = lab.start();
    let served = || {
        lab.each(|family| lab.exchange(family, &Connect { port: 8080, ..Connect::default() })).map(|seen| {
            assert_eq!(seen.plaintext, None);
            seen.fate == super::table::Fate::Delivered
        })
    };
    assert_eq!(served(), [true, true], "as the kernel comes");
    for host in [client, server] {
        host.sysctl(&[("net/ipv4/fwmark_reflect", "1"), ("net/ipv6/fwmark_reflect", "1")]);
    }
    assert_eq!(served(), [true, true], "fwmark_reflect");
    for host in [client, server] {
        host.sysctl(&[("net/ipv4/tcp_fwmark_accept", "1")]);
        assert_eq!(served(), [false, false], "tcp_fwmark_accept");
        assert_eq!(kernel_errors(&doctor(host).1), ["fwmark-accept"]);
        host.sysctl(&[("net/ipv4/tcp_fwmark_accept", "0")]);
    }
    assert_eq!(served(), [true, true], "as before");
    drop(pair);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_is_asked_as_another_user() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("mode");
    let socket = dir.path().join("agent.sock");
    let ask = |user: &str| {
        let mut command = std::process::Command::new(tngctl());
        command.args(["probe-agent", user]).arg(&socket);
        let out = run(command);
        (out.ok(), out.stdout.trim().to_owned())
    };
    assert!(ask("nobody").1.contains("Unreachable"), "{:?}", ask("nobody"));
    let agent = FakeAa::start(&socket, Mode::Good);
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o755)).expect("mode");
    assert_eq!(ask("root"), (true, r#"{"Ok":"sample"}"#.into()));
    assert_eq!(ask("nobody"), (true, r#"{"Err":"Denied"}"#.into()));
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).expect("mode");
    assert_eq!(ask("nobody"), (true, r#"{"Ok":"sample"}"#.into()));
    for mode in [Mode::OldAgent, Mode::Garbage, Mode::Hangup, Mode::Silent] {
        agent.set(mode);
        let (ok, said) = ask("nobody");
        assert!(ok && said.contains("Answer"), "{mode:?}: {said}");
    }
    assert!(!ask("no-such-user").0);
}

#[test]
fn the_service_is_asked_for_its_signer_and_its_clock() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("address");
    let toml = format!(
        "[[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:2\"\n\
         [ingress.verify]\nas_addr = \"http://{addr}/\"\npolicy_ids = [\"default\"]\n"
    );
    let name = InstanceName::new("in").expect("name");
    let loaded = config::parse(name, "in.toml".as_ref(), &toml).expect("configuration");
    let verify = loaded.config.endpoints[0].ra.verify.clone().expect("verify");
    let VerifyProvider::As(rest) = &verify.provider else { panic!("{verify:?}") };
    let serve = std::thread::spawn(move || {
        let body = super::fakes::text("as-jwks.txt");
        let body = &body[body.find("{\"keys\"").or(body.find('{')).unwrap_or(0)..];
        let (mut stream, _) = listener.accept().expect("accept");
        for _ in 0..3 {
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                request.push(byte[0]);
            }
            let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            stream.read_exact(&mut vec![0; length.unwrap_or(0)]).expect("body");
            // As trustee answers a request without policies.
            let (status, body) = match head.starts_with("post /attestation ") {
                true => ("400 Bad Request", "Json deserialize error: missing field `policy_ids` at line 1 column 29"),
                false => ("200 OK", body),
            };
            let date = "Date: Tue, 15 Nov 1994 08:12:31 GMT";
            let answer = format!("HTTP/1.1 {status}\r\n{date}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let seen = RealHost.service(&verify, rest).expect("answer");
    assert!(seen.anchors.starts_with("JWKS of http://127.0.0.1"), "{seen:?}");
    let date = SystemTime::UNIX_EPOCH + Duration::from_secs(784_887_151);
    assert_eq!(seen.date, Some(date));
    serve.join().expect("service");
    let gone = RealHost.service(&verify, rest).expect_err("nobody listens any more");
    assert_eq!(gone.reason(), "as-unreachable");
}

/// What the doctor says of the service when it is asked as `kind`.
async fn as_answer(service: &FakeAs, kind: Option<AsKind>) -> Finding {
    let verify: Verify = verify_by(service, kind);
    let VerifyProvider::As(asked) = verify.provider.clone() else { panic!("{verify:?}") };
    // It makes a runtime of its own.
    let seen = tokio::task::spawn_blocking(move || RealHost.service(&verify, &asked)).await.expect("question");
    let mut host = super::world::FakeHost::new();
    host.service = seen;
    host.worst(Check::AsAnswer)
}

fn verify_by(service: &FakeAs, kind: Option<AsKind>) -> Verify {
    let toml = format!(
        "[[ingress]]\nname = \"in\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:2\"\n\
         [ingress.verify]\nas_addr = \"{}\"\npolicy_ids = [\"default\"]\n{}",
        service.url(),
        kind.map(|kind| format!("as_type = \"{}\"\n", kind.as_str())).unwrap_or_default()
    );
    let loaded = config::parse(InstanceName::new("in").expect("name"), "in.toml".as_ref(), &toml).expect("file");
    loaded.config.endpoints[0].ra.verify.clone().expect("verify")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_of_another_type_than_the_configured_one_is_an_error() {
    let mode = As::Status("affirming");
    for (serves, right, wrong) in
        [(Serves::Rest, AsKind::Rest, AsKind::Grpc), (Serves::Grpc, AsKind::Grpc, AsKind::Rest)]
    {
        let service = FakeAs::start_as("[::1]:0", mode, serves, None).await;
        for kind in [None, Some(right)] {
            let found = as_answer(&service, kind).await;
            let over = format!("answers over {}", right.as_str());
            assert!(found.severity == Severity::Ok && found.what.contains(&over), "{found:?}");
        }
        let found = as_answer(&service, Some(wrong)).await;
        assert!(found.severity == Severity::Error && found.what.contains("and was asked as"), "{found:?}");
        assert!(found.fix.contains("as_type"), "{found:?}");
        service.set(As::Absent);
        let found = as_answer(&service, Some(right)).await;
        assert!(found.severity == Severity::Error && found.what.contains("no attestation service there"), "{found:?}");
    }
}
