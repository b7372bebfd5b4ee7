//! Where log lines go: the journal when systemd connected us to it, else standard error.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Starts logging for the process. `TNG_LOG` sets the level in the syntax of tracing's `EnvFilter`
/// (`debug`, `tng=trace,tng::access=off`); without it, or when it is wrong, `info`.
///
/// Below `info` only tng itself is heard: what libraries say there is what went over the wire, certificates with
/// evidence and tokens in them, and headers (rustls at `trace`, h2 at `debug`).
///
/// Structured fields go to the journal when `$JOURNAL_STREAM` names standard error (systemd.exec(5)),
/// human lines to a terminal, JSON lines anywhere else. A second call changes nothing.
pub fn init() {
    let wanted = std::env::var("TNG_LOG").unwrap_or_default();
    let (filter, wrong) = match EnvFilter::try_new(if wanted.is_empty() { "info" } else { &wanted }) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let output = match journal() {
        Some(journal) => journal.boxed(),
        None if std::io::stderr().is_terminal() => {
            tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).boxed()
        }
        None => tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
    };
    let filter = filter.and(filter_fn(|about| *about.level() <= LevelFilter::INFO || is_ours(about.target())));
    let started = tracing_subscriber::registry().with(output.with_filter(filter)).try_init();
    if let (Ok(()), Some(error)) = (started, wrong) {
        tracing::warn!(%error, "TNG_LOG is not understood, logging at info");
    }
}

/// Whether an event is of this package: its library or one of its programs.
fn is_ours(target: &str) -> bool {
    matches!(target.split("::").next(), Some("tng" | "tngd" | "tngctl"))
}

/// The journal, when standard error already goes there and its socket answers.
fn journal() -> Option<tracing_journald::Layer> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let (device, inode) = stream.split_once(':')?;
    let stat = nix::sys::stat::fstat(std::io::stderr().as_fd()).ok()?;
    if device.parse() != Ok(stat.st_dev) || inode.parse() != Ok(stat.st_ino) {
        return None;
    }
    Some(tracing_journald::layer().ok()?.with_field_prefix(Some("TNG".to_owned())))
}
