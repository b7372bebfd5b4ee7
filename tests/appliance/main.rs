//! tng as its users meet it: Debian 12 and Debian 13, booted, the package installed by apt, driven by systemctl.
//!
//! `make e2e` builds the package repository and runs this; it needs root, systemd-nspawn and mmdebstrap, and fails
//! with the remedy where one is missing. Two runs go side by side, each with two hosts of its own: in one Debian 12
//! is the client and Debian 13 the service's host, in the other the reverse.
//!
//! ```text
//!    client (curl, ingress) ---- bridge, sniffer, outsider ---- server (egress, nginx)
//!    192.0.2.1 2001:db8::1       192.0.2.254 2001:db8::fe       192.0.2.2 2001:db8::2
//! ```
//!
//! `TNG_E2E_REPOSITORY` names the repository (default: target/repository), `TNG_E2E_ONLY=scenario,...` and
//! `TNG_E2E_RUN=1|2` narrow it for who debugs.

#[path = "../netns/mod.rs"]
mod netns;

mod agent;
mod boot;
mod container;
mod evidence;
mod failures;
mod hardening;
mod install;
mod pair;
mod readme;
mod reload;
mod report;
mod stop;
mod traffic;
mod tunnel;
mod upgrade;
mod wire;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use pair::Pair;

/// Debian's name of a release, and what the test calls it.
const SUITES: [(&str, &str); 2] = [("bookworm", "debian12"), ("trixie", "debian13")];

fn main() -> ExitCode {
    let start = Instant::now();
    let (roots, repository) = match prepare() {
        Ok(prepared) => prepared,
        Err(why) => {
            eprintln!("appliance: {why}");
            return ExitCode::FAILURE;
        }
    };
    println!("root file systems ready after {:.0} s", start.elapsed().as_secs_f32());
    container::sweep();
    report::keep_panics();
    let wanted = std::env::var("TNG_E2E_RUN").ok();
    let runs: Vec<&str> = ["1", "2"].into_iter().filter(|run| wanted.as_deref().is_none_or(|w| w == *run)).collect();
    let totals: Vec<(u32, Vec<String>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = runs
            .iter()
            .map(|run| {
                let (client, server) = if *run == "1" { (0, 1) } else { (1, 0) };
                let (roots, repository) = (&roots, &repository);
                scope.spawn(move || {
                    let client = (SUITES[client].1, roots[client].as_path());
                    let server = (SUITES[server].1, roots[server].as_path());
                    let pair = Pair::new(run, client, server, repository);
                    scenarios(&pair);
                    pair.report.totals()
                })
            })
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|totals| totals.unwrap_or_else(|_| (0, vec!["the run itself broke off".into()]))).collect()
    });
    let shown: u32 = totals.iter().map(|(shown, _)| shown).sum();
    let failed: Vec<&String> = totals.iter().flat_map(|(_, failed)| failed).collect();
    for what in &failed {
        println!("failed: {what}");
    }
    println!("{shown} points shown, {} failed, {:.0} s", failed.len(), start.elapsed().as_secs_f32());
    // As cargo's own harness ends, for packaging/count-tests.
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {word}. {shown} passed; {} failed; 0 ignored", failed.len());
    if failed.is_empty() && shown > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

type Scenario = fn(&Pair);

/// Everything in the order in which a system lives: bare, installed, run, broken, rebooted, upgraded, purged.
fn scenarios(pair: &Pair) {
    let booted = pair.point("both systems boot", || {
        pair.boot();
        format!("systemd {} and {}", tunnel::systemd_version(&pair.client), tunnel::systemd_version(&pair.server))
    });
    if !booted {
        return;
    }
    let before = [install::inventory(&pair.client), install::inventory(&pair.server)];
    install::plaintext_is_visible_without_tng(pair);
    install::apt_install(pair);
    readme::follow(pair);
    tunnel::first_steps(pair);
    let all: [(&str, Scenario); 9] = [
        ("journal", tunnel::journal_has_fields),
        ("hardening", hardening::confined),
        ("failures", failures::fail_closed),
        ("reload", reload::reloads),
        ("stop", stop::stops),
        ("agent", agent::reachable),
        ("evidence", evidence::helper),
        ("boot", boot::boots),
        ("upgrade", upgrade::upgrades),
    ];
    for (name, scenario) in all {
        if pair.report.wants(name) {
            scenario(pair);
        }
    }
    if pair.report.wants("purge") {
        install::nothing_is_left(pair, &before);
    }
}

/// Root file systems and repository, or what is missing and how to get it.
fn prepare() -> Result<([PathBuf; 2], PathBuf), String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Err("boots containers: run it as root (sudo make e2e)".into());
    }
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let needed = [
        ("systemd-nspawn", "systemd-container"),
        ("mmdebstrap", "mmdebstrap"),
        ("nsenter", "util-linux"),
        ("ip", "iproute2"),
    ];
    let found = |tool: &str| std::env::split_paths(&dirs).any(|dir| dir.join(tool).exists());
    let missing: Vec<&str> = needed.iter().filter(|(tool, _)| !found(tool)).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        return Err(format!("programs are missing: packaging/install-packages {}", missing.join(" ")));
    }
    if !agent::program().exists() {
        return Err(format!("no {}: cargo build --locked --example fake_aa", agent::program().display()));
    }
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let repository =
        std::env::var_os("TNG_E2E_REPOSITORY").map_or_else(|| tree.join("target/repository"), PathBuf::from);
    let repository = repository
        .canonicalize()
        .map_err(|e| format!("no package repository at {}: {e}: make e2e builds it", repository.display()))?;
    let root = |suite: &str| {
        let out = Command::new(tree.join("packaging/appliance-rootfs")).arg(suite).output();
        let out = out.map_err(|e| format!("packaging/appliance-rootfs: {e}"))?;
        if out.status.success() {
            return Ok(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
        }
        Err(format!("packaging/appliance-rootfs {suite} failed:\n{}", String::from_utf8_lossy(&out.stderr)))
    };
    Ok(([root(SUITES[0].0)?, root(SUITES[1].0)?], repository))
}
