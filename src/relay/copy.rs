//! Bytes both ways between the plain side and the tunnel, in one task and without locks.
//!
//! Both streams are polled by the same future, so neither needs a split lock. A read goes into the
//! thread's scratch buffer and from there straight to the other side; only what that side does not
//! take at once is kept by the connection, and given back as soon as it drains. An idle connection
//! therefore holds no buffer here.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::buffer::{Kept, with_scratch};
use super::leg::Leg;
use super::meter::{Flow, Meter};
use super::vanished::{Gone, Watch};
use crate::tls::{Standing, Withdrawn};

/// Scratch buffers moved in one direction before other tasks get the thread: 256 KiB. Beside four bulk streams a
/// connection with a small request waits for that much of each; 1 MiB made it a second (docs/performance.md).
const ROUNDS: usize = 4;

/// How long what came from a side that failed may take to reach the other side, before both are reset.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often the kernel is asked whether the other side has acknowledged it. No event tells.
const SETTLING: Duration = Duration::from_millis(2);

/// With less room than one TLS record a further read would only take part of one.
const ENOUGH: usize = 16 * 1024;

/// How a relay ends other than by both sides closing.
#[derive(Debug, Clone, Copy)]
pub struct RelayOptions<'a> {
    /// Without a byte in either direction for so long, the connection ends. `None`: never.
    pub idle: Option<Duration>,
    /// Data that the other host has not acknowledged for so long end the connection. `None`: by the kernel's measure.
    pub unacknowledged: Option<Duration>,
    /// The peer's standing; the connection ends with it. `None`: this side does not verify.
    pub standing: Option<&'a Standing>,
}

/// Why a relay ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// Both sides finished cleanly.
    #[error("both sides closed")]
    Closed,
    /// No byte passed for the idle time.
    #[error("no byte in either direction for {0:?}")]
    Idle(Duration),
    /// The peer may stay no longer: its verdict ended, or it was refused when appraised again.
    #[error("{0}")]
    Withdrawn(Withdrawn),
    /// It was still open at the drain deadline.
    #[error("still open at the drain deadline")]
    Drained,
    /// A host acknowledged nothing of what was under way to it, or the way to it is gone.
    #[error("{0} has vanished: {1}")]
    Vanished(Gone, String),
    /// The plain side failed.
    #[error("plain side: {0}")]
    Plain(io::Error),
    /// The tunnel's connection failed.
    #[error("tunnel: {0}")]
    Tunnel(io::Error),
    /// The tunnel's connection ended without `close_notify` (RFC 8446, section 6.1): cut off, not complete.
    #[error("tunnel ended without close_notify")]
    Truncated,
    /// What came through the tunnel is not valid TLS.
    #[error("tunnel: {0}")]
    Corrupt(io::Error),
    /// The peer ended the tunnel with a fatal alert (RFC 8446, section 6.2). In TLS 1.3 a client is done before the
    /// server has looked at its certificate, so this is also how a server refuses one.
    #[error("{}", crate::tls::alert_text(*.0))]
    Alert(AlertDescription),
    /// A RATS-TLS peer closed the tunnel at once, without `close_notify` and without a byte: TNG does so with a peer that
    /// it refuses.
    #[error("the peer closed the tunnel at once and without a byte: it has refused this side; its log says why")]
    Dismissed,
}

impl End {
    /// The end of a connection whose peer's `standing` has ended.
    pub(crate) fn withdrawn(standing: Option<&Standing>) -> Self {
        Self::Withdrawn(standing.and_then(Standing::why).unwrap_or_else(Withdrawn::expired))
    }
}

/// Copies until both directions have ended or something else ends the connection.
///
/// A clean end of one direction is passed on (FIN becomes `close_notify` and FIN, and back) while the
/// other goes on. Everything else makes both sides end in a reset, so that no cut is seen as an end.
///
/// When one side fails, what it had sent is delivered to the other before the reset: a server that answers 413 and closes
/// while the client still uploads resets its connection, and the answer lies in the socket before the reset.
pub async fn relay<P: Leg, T: Leg>(
    plain: &mut P,
    tunnel: &mut T,
    options: RelayOptions<'_>,
    meter: Meter<'_>,
    abort: &CancellationToken,
) -> End {
    let end = run(plain, tunnel, options, meter, abort).await;
    match end {
        End::Closed => return end,
        End::Plain(_) => settle(tunnel, abort).await,
        End::Tunnel(_) | End::Truncated | End::Corrupt(_) | End::Alert(_) | End::Dismissed => {
            settle(plain, abort).await
        }
        End::Vanished(Gone::Plain, _) => settle(tunnel, abort).await,
        End::Vanished(Gone::Tunnel, _) => settle(plain, abort).await,
        End::Idle(_) | End::Withdrawn(_) | End::Drained => {}
    }
    plain.abort();
    tunnel.abort();
    end
}

/// Waits until the host behind `leg` has all that was written. A reset throws away what it has not acknowledged.
async fn settle<L: Leg>(leg: &L, abort: &CancellationToken) {
    if leg.unacknowledged() == 0 {
        return;
    }
    // Boxed: an idle connection must not carry the room of its end.
    let settled = Box::pin(async {
        while leg.unacknowledged() > 0 {
            sleep(SETTLING).await;
        }
    });
    tokio::select! {
        _ = timeout(LAST_WORDS, settled) => {}
        _ = abort.cancelled() => {}
    }
}

async fn run<P: Leg, T: Leg>(
    plain: &mut P,
    tunnel: &mut T,
    options: RelayOptions<'_>,
    meter: Meter<'_>,
    abort: &CancellationToken,
) -> End {
    let mut inward = Direction::default();
    let mut outward = Direction::default();
    let mut last_byte = Instant::now();
    let mut aborted = pin!(abort.cancelled());
    let mut timer = pin!(options.idle.map(|idle| sleep_until(last_byte + idle)));
    let mut verdict = pin!(options.standing.map(Standing::ended));
    let mut failing: Option<Box<Failing>> = None;
    let mut watch: Option<Box<Watch>> = None;

    poll_fn(|cx| {
        if aborted.as_mut().poll(cx).is_ready() {
            return Poll::Ready(End::Drained);
        }
        if verdict.as_mut().as_pin_mut().is_some_and(|verdict| verdict.poll(cx).is_ready()) {
            return Poll::Ready(End::withdrawn(options.standing));
        }
        if let Some(failing) = &mut failing {
            let delivered = with_scratch(|scratch| match failing.delivers {
                Way::Inward => inward.poll_last(cx, plain, tunnel, scratch, meter.into_tunnel),
                Way::Outward => outward.poll_last(cx, tunnel, plain, scratch, meter.out_of_tunnel),
            });
            if delivered.is_ready() || failing.deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(std::mem::replace(&mut failing.end, End::Closed));
            }
            return Poll::Pending;
        }
        let (up, down) = with_scratch(|scratch| {
            let up = inward.poll(cx, plain, tunnel, scratch, meter.into_tunnel);
            let down = outward.poll(cx, tunnel, plain, scratch, meter.out_of_tunnel);
            (up, down)
        });
        if let (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) = (&up, &down) {
            return Poll::Ready(End::Closed);
        }
        if let Some(failed) = Failing::of(up, down) {
            // A side whose read failed has nothing more to read.
            match failed.delivers {
                Way::Inward => inward.ended |= failed.is_dry,
                Way::Outward => outward.ended |= failed.is_dry,
            }
            failing = Some(Box::new(failed));
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if std::mem::take(&mut inward.moved) | std::mem::take(&mut outward.moved) {
            last_byte = Instant::now();
            if let (Some(limit), None) = (options.unacknowledged, &watch) {
                watch = Some(Watch::new(limit));
            }
        }
        match watch.as_mut().map(|watch| watch.poll(cx, plain, tunnel)) {
            Some(Poll::Ready(Some(gone))) => {
                let silence = options.unacknowledged.unwrap_or_default();
                return Poll::Ready(End::Vanished(gone, format!("nothing was acknowledged for {silence:?}")));
            }
            Some(Poll::Ready(None)) => watch = None,
            Some(Poll::Pending) | None => {}
        }
        if let (Some(mut timer), Some(idle)) = (timer.as_mut().as_pin_mut(), options.idle) {
            // The timer is not moved for every byte: when it fires, it looks how long ago the last
            // one was and sleeps for the rest.
            while timer.as_mut().poll(cx).is_ready() {
                let due = last_byte + idle;
                if due <= Instant::now() {
                    return Poll::Ready(End::Idle(idle));
                }
                timer.as_mut().reset(due);
            }
        }
        Poll::Pending
    })
    .await
}

/// Which way bytes go.
#[derive(Clone, Copy)]
enum Way {
    Inward,
    Outward,
}

/// A relay one of whose sides has failed.
struct Failing {
    end: End,
    /// The direction in which the failed side had sent.
    delivers: Way,
    /// Whether all that it had sent was read.
    is_dry: bool,
    deadline: Pin<Box<Sleep>>,
}

impl Failing {
    /// What failed, if anything did. A failed read says more than a failed write to the same side.
    fn of(up: Poll<Result<(), Failure>>, down: Poll<Result<(), Failure>>) -> Option<Self> {
        let (end, delivers, is_dry) = match (up, down) {
            (Poll::Ready(Err(Failure::Read(e))), _) => (plain_failure(e), Way::Inward, true),
            (_, Poll::Ready(Err(Failure::Read(e)))) => (tunnel_failure(e), Way::Outward, true),
            (Poll::Ready(Err(Failure::Write(e))), _) => (tunnel_failure(e), Way::Outward, false),
            (_, Poll::Ready(Err(Failure::Write(e)))) => (plain_failure(e), Way::Inward, false),
            (Poll::Ready(Ok(())) | Poll::Pending, Poll::Ready(Ok(())) | Poll::Pending) => return None,
        };
        Some(Self { end, delivers, is_dry, deadline: Box::pin(sleep(LAST_WORDS)) })
    }
}

/// Whether the kernel gave the connection up: its keepalive had no answer, or a router said that there is no way (ICMP).
fn has_vanished(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::TimedOut | K::HostUnreachable | K::NetworkUnreachable)
}

fn plain_failure(error: io::Error) -> End {
    if has_vanished(&error) { End::Vanished(Gone::Plain, error.to_string()) } else { End::Plain(error) }
}

fn tunnel_failure(error: io::Error) -> End {
    if let Some(rustls::Error::AlertReceived(alert)) = error.get_ref().and_then(|e| e.downcast_ref()) {
        return End::Alert(*alert);
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => End::Truncated,
        io::ErrorKind::InvalidData => End::Corrupt(error),
        _ if has_vanished(&error) => End::Vanished(Gone::Tunnel, error.to_string()),
        _ => End::Tunnel(error),
    }
}

enum Failure {
    Read(io::Error),
    Write(io::Error),
}

/// One direction of a relay.
#[derive(Default)]
struct Direction {
    kept: Kept,
    /// The reader ended; once `kept` is written, the writer is shut down.
    ended: bool,
    closed: bool,
    unflushed: bool,
    /// Bytes passed since the caller last looked.
    moved: bool,
}

impl Direction {
    /// Ready when the reader's clean end was passed on.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        scratch: &mut [u8],
        flow: Flow<'_>,
    ) -> Poll<Result<(), Failure>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS {
            ready!(self.poll_kept(cx, to, flow))?;
            if self.ended {
                return self.poll_close(cx, to);
            }
            let mut filled = ReadBuf::new(scratch);
            let stop = fill(cx, from, &mut filled);
            self.poll_deliver(cx, to, filled.filled(), flow)?;
            match stop {
                Stop::Full => {}
                Stop::End => self.ended = true,
                Stop::Failed(error) => return Poll::Ready(Err(Failure::Read(error))),
                Stop::Dry => {
                    if self.unflushed {
                        match Pin::new(&mut *to).poll_flush(cx) {
                            Poll::Ready(Ok(())) => self.unflushed = false,
                            Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Write(error))),
                            Poll::Pending => {}
                        }
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what an earlier write left. Ready when nothing is left.
    fn poll_kept<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        flow: Flow<'_>,
    ) -> Poll<Result<(), Failure>> {
        while !self.kept.is_empty() {
            let count = written(ready!(Pin::new(&mut *to).poll_write(cx, self.kept.rest())))?;
            self.kept.advance(count);
            self.note(count, flow);
        }
        Poll::Ready(Ok(()))
    }

    /// Delivers what the reader still has, after one side has failed. Ready when there is no more, or when it cannot be
    /// delivered. The end of the reader is not passed on: it is no clean one.
    fn poll_last<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        scratch: &mut [u8],
        flow: Flow<'_>,
    ) -> Poll<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS {
            if ready!(self.poll_kept(cx, to, flow)).is_err() {
                return Poll::Ready(());
            }
            let mut filled = ReadBuf::new(scratch);
            let stop = if self.ended { Stop::End } else { fill(cx, from, &mut filled) };
            if self.poll_deliver(cx, to, filled.filled(), flow).is_err() {
                return Poll::Ready(());
            }
            match stop {
                Stop::Full => {}
                Stop::Dry => {
                    let _ = Pin::new(&mut *to).poll_flush(cx);
                    return Poll::Pending;
                }
                Stop::End | Stop::Failed(_) => {
                    self.ended = true;
                    if self.kept.is_empty() {
                        return Pin::new(&mut *to).poll_flush(cx).map(drop);
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes `bytes` and keeps what the writer does not take now.
    fn poll_deliver<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        mut bytes: &[u8],
        flow: Flow<'_>,
    ) -> Result<(), Failure> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes) {
                Poll::Ready(result) => {
                    let count = written(result)?;
                    self.note(count, flow);
                    bytes = &bytes[count..];
                }
                Poll::Pending => {
                    self.kept.keep(bytes);
                    break;
                }
            }
        }
        Ok(())
    }

    fn poll_close<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<Result<(), Failure>> {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        match Pin::new(to).poll_shutdown(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                self.closed = true;
                self.moved = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Failure::Write(error))),
        }
    }

    fn note(&mut self, count: usize, flow: Flow<'_>) {
        flow.add(count);
        self.moved = true;
        self.unflushed = true;
    }
}

fn written(result: io::Result<usize>) -> Result<usize, Failure> {
    match result {
        Ok(0) => Err(Failure::Write(io::ErrorKind::WriteZero.into())),
        Ok(count) => Ok(count),
        Err(error) => Err(Failure::Write(error)),
    }
}

enum Stop {
    Full,
    Dry,
    End,
    Failed(io::Error),
}

/// Reads until there is no more to read or hardly any room: one write of four TLS records costs a
/// quarter of the system calls.
fn fill<R: AsyncRead + Unpin>(cx: &mut Context<'_>, from: &mut R, buffer: &mut ReadBuf<'_>) -> Stop {
    loop {
        let before = buffer.filled().len();
        match Pin::new(&mut *from).poll_read(cx, buffer) {
            Poll::Pending => return Stop::Dry,
            Poll::Ready(Err(error)) => return Stop::Failed(error),
            Poll::Ready(Ok(())) if buffer.filled().len() == before => return Stop::End,
            Poll::Ready(Ok(())) if buffer.remaining() < ENOUGH => return Stop::Full,
            Poll::Ready(Ok(())) => {}
        }
    }
}
