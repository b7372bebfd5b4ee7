//! Several addresses of one name at once (RFC 8305, "Happy Eyeballs"): a family that leads nowhere costs a quarter of a
//! second, and not a deadline for each connection.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt;

use crate::os::lock::Lock;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep;

/// How long an attempt is alone before the next address is tried as well (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);
/// Names of which it is known which family answered.
const REMEMBERED: usize = 256;
/// A family that was dead is tried first again after this time.
const MEMORY: Duration = Duration::from_secs(600);

/// Connects to the first of `addrs` that answers, in their order. The others are given up.
///
/// # Errors
/// The failure of the last one; `None` when there was no address.
pub(super) async fn first<T, E, F>(
    addrs: &[SocketAddr],
    connect: impl Fn(SocketAddr) -> F,
) -> Result<(T, SocketAddr), Option<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = addrs.iter().copied();
    let mut running = FuturesUnordered::new();
    let mut failure = None;
    loop {
        if let Some(addr) = waiting.next() {
            let attempt = connect(addr);
            running.push(async move { attempt.await.map(|made| (made, addr)) });
        } else if running.is_empty() {
            return Err(failure);
        }
        tokio::select! {
            Some(ended) = running.next() => match ended {
                Ok(made) => return Ok(made),
                // The next one begins at once.
                Err(error) => failure = Some(error),
            },
            () = sleep(HEAD_START), if waiting.len() > 0 => {}
        }
    }
}

/// Which family answered, by name.
static FAMILIES: LazyLock<Mutex<HashMap<String, (bool, Instant)>>> = LazyLock::new(Mutex::default);

/// Notes which family of `name` answered, where there were two.
pub(super) fn remember(name: &str, addrs: &[SocketAddr], answered: SocketAddr) {
    if addrs.iter().all(|addr| addr.is_ipv6() == answered.is_ipv6()) {
        return;
    }
    let mut families = FAMILIES.locked();
    families.retain(|_, (_, since)| since.elapsed() < MEMORY);
    if families.len() < REMEMBERED || families.contains_key(name) {
        // The age of an entry is that of the first answer, so that the other family gets its chance again.
        let entry = families.entry(name.to_owned()).or_insert((answered.is_ipv6(), Instant::now()));
        if entry.0 != answered.is_ipv6() {
            *entry = (answered.is_ipv6(), Instant::now());
        }
    }
}

/// Whether IPv6 is to be tried first for `name`, if it is known.
pub(super) fn remembered(name: &str) -> Option<bool> {
    let families = FAMILIES.locked();
    families.get(name).filter(|(_, since)| since.elapsed() < MEMORY).map(|(is_v6, _)| *is_v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: &str = "[2001:db8::1]:80";
    const LIVE: &str = "192.0.2.1:80";

    fn addrs(all: &[&str]) -> Vec<SocketAddr> {
        all.iter().map(|a| a.parse().expect("address")).collect()
    }

    async fn connect(addr: SocketAddr) -> Result<(), &'static str> {
        match addr.port() {
            80 if addr.is_ipv6() => std::future::pending().await,
            1 => Err("refused"),
            _ => Ok(()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_costs_its_head_start_and_a_refusing_one_nothing() {
        let begun = tokio::time::Instant::now();
        let (_, answered) = first(&addrs(&[DEAD, LIVE]), connect).await.expect("one answers");
        assert_eq!((answered.to_string().as_str(), begun.elapsed()), (LIVE, HEAD_START));
        let begun = tokio::time::Instant::now();
        first(&addrs(&["192.0.2.9:1", LIVE]), connect).await.expect("one answers");
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_failure_is_told_and_no_address_is_no_answer() {
        assert_eq!(first(&addrs(&["192.0.2.9:1", "192.0.2.8:1"]), connect).await, Err(Some("refused")));
        assert_eq!(first(&[], connect).await, Err(None));
    }

    #[test]
    fn the_family_that_answered_is_remembered_where_there_are_two() {
        let both = addrs(&[DEAD, LIVE]);
        remember("one.example", &both[1..], both[1]);
        assert_eq!(remembered("one.example"), None);
        remember("two.example", &both, both[1]);
        assert_eq!(remembered("two.example"), Some(false));
        remember("two.example", &both, both[0]);
        assert_eq!(remembered("two.example"), Some(true));
    }
}
