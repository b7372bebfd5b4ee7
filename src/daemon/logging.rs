//! Where log lines go: the journal when systemd connected us to it, else standard error. Neither is waited for: a thread
//! of its own writes (`log_queue`).

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::{Dispatch, Subscriber};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, registry};

use super::log_event::Forward;
use super::log_queue::{self, Queued, RawStderr};

/// Writes without the queue; for the thread alone.
static DIRECT: OnceLock<Dispatch> = OnceLock::new();

/// Starts logging for the process, and the thread that writes. What [`prepare`] says holds.
pub fn init() {
    prepare();
    start();
}

/// Sets logging up; what is logged waits for [`start`]. `TNG_LOG` sets the level in the syntax of tracing's `EnvFilter`
/// (`debug`, `tng=trace,tng::access=off`); without it, or when it is wrong, `info`.
///
/// Below `info` only tng itself is heard: what libraries say there is what went over the wire, certificates with
/// evidence and tokens in them, and headers (rustls at `trace`, h2 at `debug`).
///
/// Structured fields go to the journal when `$JOURNAL_STREAM` names standard error (systemd.exec(5)),
/// human lines to a terminal, JSON lines anywhere else. A second call changes nothing.
pub fn prepare() {
    let wanted = std::env::var("TNG_LOG").unwrap_or_default();
    let (filter, wrong) = match EnvFilter::try_new(if wanted.is_empty() { "info" } else { &wanted }) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let (output, direct): (Box<dyn Layer<Registry> + Send + Sync>, Dispatch) = match journal() {
        // The events that this thread replays have passed the filter already.
        Some(journal) => (Forward.boxed(), registry().with(LevelFilter::WARN).with(journal).into()),
        None if std::io::stderr().is_terminal() => {
            (human(|| Queued), registry().with(LevelFilter::WARN).with(human(|| RawStderr)).into())
        }
        None => (json(|| Queued), registry().with(LevelFilter::WARN).with(json(|| RawStderr)).into()),
    };
    let filter = filter.and(filter_fn(|about| *about.level() <= LevelFilter::INFO || is_ours(about.target())));
    let started = registry().with(output.with_filter(filter)).try_init();
    if started.is_ok() {
        let _ = DIRECT.set(direct);
        std::panic::set_hook(Box::new(panicked));
    }
    if let (Ok(()), Some(error)) = (started, wrong) {
        tracing::warn!(%error, "TNG_LOG is not understood, logging at info");
    }
}

/// Lines for people.
fn human<S, W>(writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt::layer().with_target(false).with_writer(writer).boxed()
}

/// One object a line.
fn json<S, W>(writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(writer).boxed()
}

/// Starts the thread that writes. Not before privileges are given up: capabilities and Landlock belong to threads.
pub fn start() {
    if let Some(direct) = DIRECT.get() {
        log_queue::start(direct);
    }
}

/// At the end of the process: what was logged is written, if somebody reads it within a second.
pub fn flush() {
    start();
    log_queue::flush();
}

/// A defect. The standard library would write it to standard error, and wait there for a reader.
fn panicked(panic: &std::panic::PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("no text");
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(reason = "panicked", place, "a defect, keep the log and report it: {text}");
    // The process ends with its first thread.
    if std::thread::current().name() == Some("main") {
        flush();
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
