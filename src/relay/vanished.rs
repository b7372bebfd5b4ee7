//! A host that vanished with data under way: nothing of what was sent is acknowledged any more.
//!
//! TCP_USER_TIMEOUT (RFC 5482) would do, but Linux also ends a connection by it whose reader takes a rest: such a host
//! answers window probes and takes no data, and a paused download must outlive any pause. So the relay looks itself, and
//! only while something is under way: an idle connection has no timer here, and is the keepalive's.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use super::leg::Leg;

/// Looks in one limit.
const LOOKS: u32 = 4;

/// Which side vanished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The application or the service.
    Plain,
    /// The tunnel's other end.
    Tunnel,
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Gone::Plain => "the host on the plain side",
            Gone::Tunnel => "the peer's host",
        })
    }
}

/// The watch over a connection with data under way.
pub(super) struct Watch {
    limit: Duration,
    timer: Pin<Box<Sleep>>,
    plain: Unanswered,
    tunnel: Unanswered,
}

/// Since when one side has had something that is not answered.
#[derive(Default)]
struct Unanswered(Option<Instant>);

impl Unanswered {
    /// For how long the host has not answered. Zero when nothing is under way to it.
    fn silence<L: Leg>(&mut self, leg: &L) -> Duration {
        match leg.under_way() {
            Some(under_way) if under_way.unanswered => {
                let since = self.0.get_or_insert_with(Instant::now).elapsed();
                since.min(under_way.last_answer)
            }
            _ => {
                self.0 = None;
                Duration::ZERO
            }
        }
    }
}

impl Watch {
    pub(super) fn new(limit: Duration) -> Box<Self> {
        let timer = Box::pin(sleep(limit / LOOKS));
        Box::new(Self { limit, timer, plain: Unanswered::default(), tunnel: Unanswered::default() })
    }

    /// Looks when it is time. `Ready(Some)`: that side is gone. `Ready(None)`: nothing is under way, the watch can end.
    pub(super) fn poll<P: Leg, T: Leg>(&mut self, cx: &mut Context<'_>, plain: &P, tunnel: &T) -> Poll<Option<Gone>> {
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.tunnel.silence(tunnel) >= self.limit {
                return Poll::Ready(Some(Gone::Tunnel));
            }
            if self.plain.silence(plain) >= self.limit {
                return Poll::Ready(Some(Gone::Plain));
            }
            // What waits for a window is not under way, and still to be watched: its host may vanish meanwhile.
            if !plain.is_waiting() && !tunnel.is_waiting() {
                return Poll::Ready(None);
            }
            self.timer.as_mut().reset(Instant::now() + self.limit / LOOKS);
        }
        Poll::Pending
    }
}
