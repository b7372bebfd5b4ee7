//! What `tngd check` and `tngctl check` print.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::access;
use super::conflicts::{SocketPorts, Words, conflicts_between, with_paths};
use super::diagnostics::{Diagnostic, Report, Severity};
use super::load::{Loaded, config_dir, instance_path, list_instances, load};
use super::values::show_duration;
use super::{
    AsKind, AsService, AttestProvider, Config, Endpoint, Match, Mode, Netfilter, OnStop, Side, TrustedSigners,
    VerifyProvider,
};

/// Exit status when a configuration is refused (`EX_CONFIG` of sysexits.h).
pub const EX_CONFIG: i32 = 78;

/// Text for the two output streams, and the exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// For standard output.
    pub stdout: String,
    /// For standard error.
    pub stderr: String,
    /// 0, or [`EX_CONFIG`].
    pub code: i32,
}

/// `check [--json] [NAME|FILE...]`: each file by itself, then all against each other, and against the other instances of
/// the configuration directory. Without names: every file of that directory. `program` begins each line of a finding;
/// `on_host` says what of this host stands against a good configuration.
pub fn check_command(
    program: &str,
    names: &[String],
    json: bool,
    on_host: impl Fn(&Config) -> Vec<Diagnostic>,
) -> Output {
    let files: Result<Vec<PathBuf>, Report> =
        if names.is_empty() { list_instances() } else { names.iter().map(|n| instance_path(n)).collect() };
    let results = match files {
        Ok(files) => files.into_iter().map(|file| (file.clone(), load(&file))).collect(),
        Err(report) => vec![(PathBuf::new(), Err(report))],
    };
    let others = if names.is_empty() { Vec::new() } else { others(&results) };
    render_all(program, &results, &others, json, on_host)
}

/// The other instances of the configuration directory, as far as they are good. A draft elsewhere stands for the
/// instance of its name.
fn others(results: &[(PathBuf, Result<Loaded, Report>)]) -> Vec<Config> {
    let asked: Vec<_> = results.iter().filter_map(|(file, _)| file.file_stem()).collect();
    let mut files = list_instances().unwrap_or_default();
    files.retain(|file| !file.file_stem().is_some_and(|stem| asked.contains(&stem)));
    files.into_iter().filter_map(|file| load(&file).ok()).map(|loaded| loaded.config).collect()
}

/// What `check` prints about one file that was loaded.
pub fn render_check(program: &str, file: &Path, result: Result<Loaded, Report>, json: bool) -> Output {
    render_all(program, &[(file.to_owned(), result)], &[], json, |_| Vec::new())
}

/// A finding as a program prints it on standard error.
pub fn render_diagnostics(program: &str, diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(|d| format!("{program}: {d}\n")).collect()
}

#[derive(Serialize)]
struct JsonReport<'d> {
    ok: bool,
    files: Vec<&'d Path>,
    diagnostics: &'d [Diagnostic],
}

fn render_all(
    program: &str,
    results: &[(PathBuf, Result<Loaded, Report>)],
    others: &[Config],
    json: bool,
    on_host: impl Fn(&Config) -> Vec<Diagnostic>,
) -> Output {
    let mut diagnostics = Vec::new();
    let user = crate::os::privileges::find_user("tng").ok().map(|(uid, gid)| (uid.as_raw(), gid.as_raw()));
    for (file, result) in results {
        // A draft is not where the daemon will read it.
        if let Some(user) = user.filter(|_| file.parent() == Some(&config_dir())) {
            diagnostics.extend(access::warnings(file, user));
        }
        match result {
            Ok(loaded) => diagnostics.extend(loaded.warnings.iter().cloned()),
            Err(report) => diagnostics.extend(report.diagnostics.iter().cloned()),
        }
    }
    let good: Vec<&Config> = results.iter().filter_map(|(_, r)| r.as_ref().ok()).map(|l| &l.config).collect();
    for (i, a) in good.iter().enumerate() {
        diagnostics.extend(good[i + 1..].iter().flat_map(|b| conflicts_between(a, b)));
        diagnostics.extend(others.iter().flat_map(|other| conflicts_between(other, a)));
        diagnostics.extend(on_host(a));
    }
    let ok = diagnostics.iter().all(|d| d.severity == Severity::Warning);
    let code = if ok { 0 } else { EX_CONFIG };
    if json {
        let files = results.iter().map(|(file, _)| file.as_path()).collect();
        let report = JsonReport { ok, files, diagnostics: &diagnostics };
        let text = serde_json::to_string_pretty(&report).expect("diagnostics are plain data");
        return Output { stdout: text + "\n", stderr: String::new(), code };
    }
    let mut stdout: String = good.iter().map(|config| summary(config)).collect();
    if results.is_empty() {
        stdout.push_str("no configuration file\n");
    }
    Output { stdout, stderr: render_diagnostics(program, &diagnostics), code }
}

/// What an instance will do, in a few lines an endpoint.
pub fn summary(config: &Config) -> String {
    let mut out = String::new();
    let stop = match config.on_stop {
        OnStop::Open => "open (the direct path comes back)",
        OnStop::Closed => "closed (captured traffic stays refused)",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{}: instance {}", config.source.display(), config.instance);
    let _ = writeln!(out, "  on stop   {stop}, after at most {}", show_duration(config.drain_timeout));
    if let Some(control) = config.control_listen {
        let _ = writeln!(out, "  control   {control}");
    }
    for (_, endpoint) in with_paths(config) {
        endpoint_summary(endpoint, &mut out);
    }
    out
}

fn endpoint_summary(e: &Endpoint, out: &mut String) {
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(out, "{key:<12}{value}");
    };
    match &e.mode {
        Mode::Mapping(m) => {
            line(&format!("  {} {}: mapping", e.side, e.name), "");
            line("    listen", &SocketPorts(m.listen_addr, m.listen_ports).to_string());
            line("    target", &format!("{}:{}, mark {}", m.target_host, m.target_ports, m.so_mark.0));
        }
        Mode::Netfilter(n) => {
            line(&format!("  {} {}: netfilter", e.side, e.name), "");
            n.capture.iter().for_each(|m| line("    capture", &captured(m, e.side)));
            n.exclude.iter().for_each(|m| line("    exclude", &captured(m, e.side)));
            let port = n.listen_port.map_or("chosen from 40000 up".to_owned(), |p| p.to_string());
            line("    listen", &format!("port {port}, mark {}", n.so_mark.0));
            if e.side == Side::Egress {
                line("    clients", &clients(n));
            }
        }
    }
    if e.ra.attest.is_none() && e.ra.verify.is_none() {
        line("    no_ra", "nobody is attested");
    }
    if let Some(attest) = &e.ra.attest {
        let from = match &attest.provider {
            AttestProvider::Aa { socket } => format!("agent at {}", socket.display()),
            AttestProvider::Helper { socket, provider } => {
                format!("{} through the helper at {}", provider.name(), socket.display())
            }
            AttestProvider::Direct(source) => format!("{} in this process", source.provider().name()),
            AttestProvider::Asr { addr } => format!("agent behind {addr}"),
            AttestProvider::Sample => "sample (proves nothing)".to_owned(),
        };
        let devices = if attest.additional_evidence { " and devices" } else { "" };
        let shown = match &attest.passport {
            Some(p) => format!("token of {}, policy {}", service(&p.service), p.policy_ids.join(" ")),
            None => "evidence".to_owned(),
        };
        let age = show_duration(attest.refresh_interval);
        line("    attest", &format!("{from}{devices}, shows {shown}, at most {age} old"));
    }
    if let Some(verify) = &e.ra.verify {
        let by = match &verify.provider {
            VerifyProvider::As(a) => {
                let policy = verify.policy_ids.join(" ");
                format!("{}, policy {policy}, {}", service(a), anchors(&a.trusted))
            }
            VerifyProvider::Builtin(b) => {
                let tees: std::collections::BTreeSet<_> = b.references.iter().map(|r| r.tee).collect();
                let tees = tees.into_iter().collect::<Vec<_>>().join(" ");
                format!("in process, {} reference(s) {tees}, TCB {}", b.references.len(), b.minimum_tcb.join(" "))
            }
            VerifyProvider::Anchors(trusted) => {
                format!("no service, policy {}, {}", verify.policy_ids.join(" "), anchors(trusted))
            }
            VerifyProvider::Sample => "sample".to_owned(),
        };
        let rego = verify.rego.as_ref().map(|file| format!(", Rego policy {file:?}")).unwrap_or_default();
        let by = format!("{by}{rego}, model {}", verify.model);
        let sample = if verify.allow_sample { ", sample TEE accepted" } else { "" };
        let grace = match e.ra.grace {
            Duration::ZERO => String::new(),
            grace => format!(", who fails later has {}", show_duration(grace)),
        };
        line("    verify", &format!("{by}, verdicts live {}{grace}{sample}", show_duration(verify.verdict_ttl)));
    }
    if e.ra.require_session_binding {
        line("    binding", "to the session: peers that speak only RATS-TLS are refused");
    }
    let l = &e.limits;
    let (handshake, connect) = (show_duration(l.handshake_timeout), show_duration(l.connect_timeout));
    let idle = if l.idle_timeout.is_zero() { "never".to_owned() } else { show_duration(l.idle_timeout) };
    let connections = l.max_connections;
    let vanished = match l.unacknowledged_timeout {
        Duration::ZERO => "by the kernel".to_owned(),
        limit => show_duration(limit),
    };
    line(
        "    limits",
        &format!(
            "{connections} connections, handshake {handshake}, connect {connect}, idle {idle}, unacknowledged {vanished}"
        ),
    );
}

fn service(a: &AsService) -> String {
    let addrs: Vec<&str> = a.addrs.iter().map(|url| url.as_str()).collect();
    let kind = a.kind.map_or("service", |k| if k == AsKind::Grpc { "gRPC service" } else { "REST service" });
    format!("{kind} at {}", addrs.join(", else "))
}

fn anchors(trusted: &TrustedSigners) -> String {
    let counts =
        [(trusted.certs.len(), "file(s)"), (trusted.keys.len(), "pinned key(s)"), (trusted.jwks.len(), "key set(s)")];
    let named: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    if named.is_empty() { "anchors from the service".to_owned() } else { format!("anchors from {}", named.join(", ")) }
}

fn captured(m: &Match, side: Side) -> String {
    let to = match (m.to, side) {
        (Some(_), _) => "",
        (None, Side::Ingress) => "any non-local address ",
        (None, Side::Egress) => "any local address ",
    };
    format!("{to}{}", Words(m)).trim_end().to_owned()
}

fn clients(n: &Netfilter) -> String {
    let local = if n.capture_local_traffic { "remote and local" } else { "remote" };
    let source = if n.preserve_source {
        format!("their own address shown to the service, ports {}", n.preserve_source_ports)
    } else {
        "this host's address shown to the service".to_owned()
    };
    format!("{local}; {source}")
}
