//! `make bench`: tng beside stunnel, haproxy and nginx (Debian's) and the bare loopback, in one run.
//!
//! 1. [`settings`]: how much, how long, which peers.
//! 2. [`certs`] and [`peers`]: one certificate authority, and how each peer is told to do the same work.
//! 3. [`process`] and [`tunnel`]: both ends of a tunnel as processes of ours, their CPU time and memory.
//! 4. [`sink`], [`load`], [`latency`] and [`sharing`]: the service behind the tunnel and the clients before it.
//! 5. [`wire`], [`probe`] and [`checks`]: what was really negotiated. A peer that does other work is not compared.
//! 6. [`measure`]: one round. [`stats`] and [`report`]: medians, ratios of pairs, budgets, JSON.
//!
//! Exit status 1: a peer negotiated something else, payload was seen in plaintext, or a budget was missed.

mod certs;
mod checks;
mod latency;
mod load;
mod measure;
mod peers;
mod probe;
mod process;
mod report;
mod settings;
mod sharing;
mod sink;
mod stats;
mod tunnel;
mod wire;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use peers::Peer;
use settings::Settings;
use tunnel::Lab;

/// What a step gives, or a sentence that says what went wrong.
type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let settings = match Settings::from_environment() {
        Ok(settings) => settings,
        Err(wrong) => {
            eprintln!("bench: {wrong}");
            return ExitCode::from(2);
        }
    };
    // Two workers: the service behind the tunnel must not be the narrow place on a small machine.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.spawn(stop_all_when_told(settings.deadline));
    let done = run(&settings, &runtime);
    process::stop_all();
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The whole run. `false`: it ran, and the result is not good enough.
fn run(settings: &Settings, runtime: &tokio::runtime::Runtime) -> Outcome<bool> {
    peers::require_installed(&settings.peers)?;
    // Each held connection takes two of ours, and two of each end's.
    process::raise_descriptor_limit(2 * settings.idle_connections as u64 + 512)?;
    let begun = Instant::now();
    let lab = Lab::new(runtime)?;

    println!("bench: what each peer negotiates");
    wire::positive_control(&lab)?;
    let mut seen = Vec::new();
    for &peer in settings.peers.iter().filter(|p| **p != Peer::Direct) {
        seen.push((peer, checks::check(&lab, peer).map_err(|e| format!("{peer}: {e}"))?));
    }
    report::print_checks(&seen);
    let complaints = checks::complaints(&seen);
    let refused: Vec<Peer> = complaints.iter().map(|(peer, _)| *peer).collect();
    let compared: Vec<Peer> = settings.peers.iter().copied().filter(|p| !refused.contains(p)).collect();

    let mut rounds = Vec::new();
    let mut order = stats::Shuffler::new();
    for round in 1..=settings.rounds {
        println!("bench: round {round} of {}", settings.rounds);
        rounds.push(measure::round(&lab, &compared, settings, &mut order)?);
    }

    let result = report::Report::new(settings, &seen, &complaints, &rounds, begun.elapsed());
    result.print();
    let path = result.write_json()?;
    println!("bench: {:.0} s in all, written to {}", begun.elapsed().as_secs_f64(), path.display());
    Ok(result.good())
}

/// Ends our processes when the run is interrupted or takes longer than it may: an unwinding `Drop` runs in neither case.
async fn stop_all_when_told(deadline: Duration) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return;
    };
    let code = tokio::select! {
        _ = int.recv() => 130,
        _ = term.recv() => 143,
        () = tokio::time::sleep(deadline) => {
            eprintln!("bench: not done within {} s", deadline.as_secs());
            1
        }
    };
    process::stop_all();
    tunnel::remove_files();
    std::process::exit(code);
}
