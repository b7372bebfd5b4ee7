//! Medians, quantiles, and an order that does not repeat.

use std::hash::{BuildHasher, RandomState};

/// The `q` quantile of sorted samples, by nearest rank. NaN without samples.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// The median; of an even number the mean of the two in the middle. `None` without samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some((sorted[half - 1] + sorted[half]) / 2.0),
    }
}

/// Gives each round another order: with a fixed rotation one program once measured 0.83 of itself.
pub struct Shuffler(RandomState, u64);

impl Shuffler {
    /// Seeded by the system.
    pub fn new() -> Self {
        Self(RandomState::new(), 0)
    }

    /// The same items in a random order.
    pub fn shuffled<T: Copy>(&mut self, items: &[T]) -> Vec<T> {
        let mut keyed: Vec<(u64, T)> = items
            .iter()
            .map(|item| {
                self.1 += 1;
                (self.0.hash_one(self.1), *item)
            })
            .collect();
        keyed.sort_by_key(|(key, _)| *key);
        keyed.into_iter().map(|(_, item)| item).collect()
    }
}
