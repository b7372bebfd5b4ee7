//! Locks that go on after a thread has panicked while it held one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A mutex whose value stays usable after a panic.
///
/// The panic itself is reported where it happened. The next thread goes on with the value as it was left.
pub trait Lock<T: ?Sized> {
    /// Waits for the lock, poisoned or not.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T: ?Sized> Lock<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_under_the_lock_leaves_the_value_usable() {
        let value = Mutex::new(1);
        let panicked = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                *value.locked() = 2;
                let _held = value.locked();
                panic!("for this test");
            });
            thread.join().is_err()
        });
        assert!(panicked && value.is_poisoned());
        assert_eq!(*value.locked(), 2);
    }
}
