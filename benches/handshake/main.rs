//! `make bench`, second part: what an attested handshake costs beside one of plain mutual TLS.
//!
//! Both ends live in this process, on one thread, and meet over loopback sockets that were connected beforehand; the
//! attestation service is a process of its own. So a slice's CPU time is that of the two ends, and of nothing else.
//!
//! 1. [`settings`]: how much, how long.
//! 2. [`ways`]: what is compared, and what each must have done to count.
//! 3. [`plain`] and [`ends`]: ordinary rustls beside two endpoints of tng, from the same primitives.
//! 4. [`service`]: the attestation service.
//! 5. [`lane`]: one way with its ends; measures a slice and counts what happened in it.
//! 6. [`machine`], [`stats`] and [`report`]: where it ran, medians, ratios of pairs, budgets, JSON.
//!
//! Exit status 1: a connection came about in another way than it was to, or a budget was missed.

#[path = "../../tests/common/tls.rs"]
mod common;
mod ends;
#[path = "../../tests/fakes/mod.rs"]
mod fakes;
mod lane;
mod machine;
mod plain;
mod report;
mod service;
mod settings;
#[path = "../tunnel/stats.rs"]
mod stats;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Instant;

use lane::{Lane, Sample};
use service::Service;
use settings::Settings;
use ways::Way;

/// What a step gives, or a sentence that says what went wrong.
type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    if std::env::args().nth(1).as_deref() == Some(service::ARGUMENT) {
        return runtime.block_on(service::serve());
    }
    let settings = match Settings::from_environment() {
        Ok(settings) => settings,
        Err(wrong) => {
            eprintln!("bench: {wrong}");
            return ExitCode::from(2);
        }
    };
    let done = runtime.block_on(async {
        let late = format!("not done within {} s", settings.deadline.as_secs());
        tokio::time::timeout(settings.deadline, run(&settings)).await.unwrap_or(Err(late.into()))
    });
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
async fn run(settings: &Settings) -> Outcome<bool> {
    let begun = Instant::now();
    let mut service = Service::start()?;
    let mut lanes = Vec::new();
    for &way in &settings.ways {
        let lane = Lane::new(way, &service).await.map_err(|e| format!("{way}: {e}"))?;
        lane.warm_up(&mut service).await.map_err(|e| format!("{way}: {e}"))?;
        lanes.push(lane);
    }

    let mut rounds: Vec<BTreeMap<Way, Sample>> = Vec::new();
    let mut primitives = BTreeSet::new();
    let mut order = stats::Shuffler::new();
    let indices: Vec<usize> = (0..lanes.len()).collect();
    for _ in 0..settings.rounds {
        let mut round = BTreeMap::new();
        for index in order.shuffled(&indices) {
            let lane = &lanes[index];
            let (sample, tally) =
                lane.slice(settings.handshakes, &mut service).await.map_err(|e| format!("{}: {e}", lane.way))?;
            if let Some(complaint) = lane.way.complaint(&tally) {
                return Err(format!("{}: {complaint}", lane.way).into());
            }
            primitives.extend(tally.primitives);
            round.insert(lane.way, sample);
        }
        rounds.push(round);
    }
    if primitives.len() != 1 {
        return Err(format!("not the same primitives everywhere: {primitives:?}").into());
    }

    let report = report::Report::new(settings, primitives.into_iter().collect(), &rounds, begun.elapsed());
    report.print();
    println!("written to {}", report.write_json()?.display());
    Ok(report.good())
}
