//! What `tngd check` and `tngctl check` print.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::conflicts::{SocketPorts, Words, conflicts_between, with_paths};
use super::diagnostics::{Diagnostic, Report, Severity};
use super::load::{Loaded, instance_path, list_instances, load};
use super::values::show_duration;
use super::{AttestProvider, Config, Endpoint, Match, Mode, Netfilter, OnStop, Side, VerifyProvider};

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

/// `check [--json] [NAME|FILE...]`: each file by itself, then all against each other. Without
/// names: every file of the configuration directory. `program` begins each line of a finding.
pub fn check_command(program: &str, names: &[String], json: bool) -> Output {
    let files: Result<Vec<PathBuf>, Report> =
        if names.is_empty() { list_instances() } else { names.iter().map(|n| instance_path(n)).collect() };
    let results = match files {
        Ok(files) => files.into_iter().map(|file| (file.clone(), load(&file))).collect(),
        Err(report) => vec![(PathBuf::new(), Err(report))],
    };
    render_all(program, &results, json)
}

/// What `check` prints about one file that was loaded.
pub fn render_check(program: &str, file: &Path, result: Result<Loaded, Report>, json: bool) -> Output {
    render_all(program, &[(file.to_owned(), result)], json)
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

fn render_all(program: &str, results: &[(PathBuf, Result<Loaded, Report>)], json: bool) -> Output {
    let mut diagnostics = Vec::new();
    for (_, result) in results {
        match result {
            Ok(loaded) => diagnostics.extend(loaded.warnings.iter().cloned()),
            Err(report) => diagnostics.extend(report.diagnostics.iter().cloned()),
        }
    }
    let good: Vec<&Config> = results.iter().filter_map(|(_, r)| r.as_ref().ok()).map(|l| &l.config).collect();
    for (i, a) in good.iter().enumerate() {
        diagnostics.extend(good[i + 1..].iter().flat_map(|b| conflicts_between(a, b)));
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
            AttestProvider::Asr { addr } => format!("agent behind {addr}"),
            AttestProvider::Sample => "sample (proves nothing)".to_owned(),
        };
        let devices = if attest.additional_evidence { " and devices" } else { "" };
        let shown = match &attest.passport {
            Some(p) => format!("token of {}, policy {}", p.service.addr, p.policy_ids.join(" ")),
            None => "evidence".to_owned(),
        };
        let age = show_duration(attest.refresh_interval);
        line("    attest", &format!("{from}{devices}, shows {shown}, at most {age} old"));
    }
    if let Some(verify) = &e.ra.verify {
        let by = match &verify.provider {
            VerifyProvider::As(a) => {
                let anchors = match a.trusted_certs.len() {
                    0 => "anchors from the service".to_owned(),
                    n => format!("anchors from {n} file(s)"),
                };
                format!("service at {}, policy {}, {anchors}", a.addr, verify.policy_ids.join(" "))
            }
            VerifyProvider::Anchors(files) => {
                format!("no service, policy {}, anchors from {} file(s)", verify.policy_ids.join(" "), files.len())
            }
            VerifyProvider::Sample => "sample".to_owned(),
        };
        let by = format!("{by}, model {}", verify.model);
        let sample = if verify.allow_sample { ", sample TEE accepted" } else { "" };
        line("    verify", &format!("{by}, verdicts live {}{sample}", show_duration(verify.verdict_ttl)));
    }
    let l = &e.limits;
    let (handshake, connect) = (show_duration(l.handshake_timeout), show_duration(l.connect_timeout));
    let idle = if l.idle_timeout.is_zero() { "never".to_owned() } else { show_duration(l.idle_timeout) };
    let connections = l.max_connections;
    line("    limits", &format!("{connections} connections, handshake {handshake}, connect {connect}, idle {idle}"));
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
