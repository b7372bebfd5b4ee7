//! The queue between those who log and the thread that writes: a log that nobody reads must stop neither a connection nor
//! a signal. What does not fit is dropped and counted.
//!
//! `tracing-appender` has such a queue for streams, and starts its thread at once. The data plane may start one only when
//! its privileges are given up, as capabilities and Landlock belong to threads, and has things to say before.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use prometheus_client::metrics::counter::Counter;
use tracing::Dispatch;

use super::log_event::CapturedEvent;
use crate::os::lock::Lock;

/// Records that wait at most: with a kilobyte each, 2 MiB.
const WAITING: usize = 2048;
/// How long the end of the process waits for a reader of its last records.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// A record on its way.
pub(super) enum Item {
    /// A line for standard error.
    Line(Vec<u8>),
    /// An event for the journal, whose fields stay fields.
    Event(Box<CapturedEvent>),
}

struct Queue {
    sender: SyncSender<Item>,
    receiver: Mutex<Option<Receiver<Item>>>,
    /// Taken into the queue and not written yet.
    pending: AtomicUsize,
    started: AtomicBool,
}

static QUEUE: LazyLock<Queue> = LazyLock::new(|| {
    let (sender, receiver) = sync_channel(WAITING);
    Queue {
        sender,
        receiver: Mutex::new(Some(receiver)),
        pending: AtomicUsize::new(0),
        started: AtomicBool::new(false),
    }
});

static LOST: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Records that were dropped because nobody read the log.
pub fn lost() -> Counter {
    LOST.clone()
}

/// Puts a record into the queue, or counts it as lost. Never waits.
pub(super) fn push(item: Item) {
    QUEUE.pending.fetch_add(1, Ordering::AcqRel);
    match QUEUE.sender.try_send(item) {
        Ok(()) => {}
        Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
            QUEUE.pending.fetch_sub(1, Ordering::AcqRel);
            LOST.inc();
        }
    }
}

/// Starts the thread that writes. `direct` writes without the queue: the journal's events, and the line about lost records.
pub(super) fn start(direct: &Dispatch) {
    if QUEUE.started.swap(true, Ordering::AcqRel) {
        return;
    }
    let Some(receiver) = QUEUE.receiver.locked().take() else { return };
    let direct = direct.clone();
    // Signals are for the threads that wait for them.
    let before = SigSet::thread_get_mask();
    let _ = SigSet::all().thread_block();
    let started = std::thread::Builder::new().name("log".into()).spawn(move || write_all(&receiver, &direct));
    if let Ok(mask) = before {
        let _ = mask.thread_set_mask();
    }
    // Without a thread records are lost and counted, which is better than not to serve.
    drop(started);
}

/// Waits until the records of before are written, for a second at most.
pub(super) fn flush() {
    let end = Instant::now() + LAST_RECORDS;
    while QUEUE.pending.load(Ordering::Acquire) > 0 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn write_all(receiver: &Receiver<Item>, direct: &Dispatch) {
    let mut told = 0;
    for item in receiver {
        match item {
            Item::Line(line) => {
                if RawStderr.write_all(&line).is_err() {
                    LOST.inc();
                }
            }
            Item::Event(event) => event.replay(direct),
        }
        QUEUE.pending.fetch_sub(1, Ordering::AcqRel);
        let lost = LOST.get();
        if lost > told {
            let more = lost - told;
            told = lost;
            tracing::dispatcher::with_default(direct, || {
                tracing::warn!(
                    reason = "log-records-lost",
                    records = more,
                    "{more} log records lost: the log was not read"
                );
            });
        }
    }
}

/// Standard error without the lock of the standard library, which a blocked write would keep from everybody.
#[derive(Clone, Copy)]
pub(super) struct RawStderr;

impl Write for RawStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(io::stderr().as_fd(), bytes) {
                Err(Errno::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What tracing's formatter writes to: one write is one record.
#[derive(Clone, Copy)]
pub(super) struct Queued;

impl Write for Queued {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        push(Item::Line(bytes.to_vec()));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
