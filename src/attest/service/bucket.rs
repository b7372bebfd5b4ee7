//! How often something may be done: a few times at once, and then once in a while.

use std::time::Duration;

use tokio::time::Instant;

/// Times in a row: a service that is restarted twice within moments is no reason to refuse anybody.
const SIZE: u32 = 3;
/// After which time one of them is given back.
const REFILL: Duration = Duration::from_secs(10);

/// A bucket, full at first.
#[derive(Debug, Default)]
pub struct Bucket {
    taken: u32,
    /// When one was last given back; of no meaning while none is taken.
    since: Option<Instant>,
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        let back = now.duration_since(since).as_secs() / REFILL.as_secs();
        let back = u32::try_from(back).unwrap_or(u32::MAX).min(self.taken);
        self.taken -= back;
        self.since = (self.taken > 0).then(|| since + REFILL * back);
    }

    /// How long until there is one; `None`: there is one.
    pub fn pause(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        let since = self.since.filter(|_| self.taken >= SIZE)?;
        Some((since + REFILL).duration_since(now))
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Instant) {
        self.refill(now);
        self.taken = (self.taken + 1).min(SIZE);
        self.since.get_or_insert(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_there_at_once_and_one_more_after_each_pause() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut bucket = Bucket::default();
        for _ in 0..SIZE {
            assert_eq!(bucket.pause(at(0)), None);
            bucket.take(at(0));
        }
        assert_eq!(bucket.pause(at(0)), Some(Duration::from_secs(10)));
        assert_eq!(bucket.pause(at(7)), Some(Duration::from_secs(3)));
        assert_eq!(bucket.pause(at(10)), None);
        bucket.take(at(12));
        assert_eq!(bucket.pause(at(12)), Some(Duration::from_secs(8)), "the pause does not begin anew");
        // Never more than it holds.
        for _ in 0..SIZE {
            assert_eq!(bucket.pause(at(1000)), None);
            bucket.take(at(1000));
        }
        assert_eq!(bucket.pause(at(1000)), Some(Duration::from_secs(10)));
    }
}
