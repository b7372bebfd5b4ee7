//! Services that could not be reached lately.

use std::sync::Mutex;

use crate::os::lock::Lock;
use crate::relay::Target;

/// Services remembered. A scan by an admitted peer must not fill the memory.
const REMEMBERED: usize = 64;

/// Targets to which the last connection failed.
#[derive(Debug, Default)]
pub struct Unserved(Mutex<Vec<Target>>);

impl Unserved {
    /// A connection to `target` was tried.
    pub fn note(&self, target: &Target, failed: bool) {
        let mut known = self.0.locked();
        let at = known.iter().position(|one| one == target);
        match (failed, at) {
            (false, Some(at)) => drop(known.swap_remove(at)),
            (true, None) => {
                if known.len() >= REMEMBERED {
                    known.remove(0);
                }
                known.push(target.clone());
            }
            (false, None) | (true, Some(_)) => {}
        }
    }

    /// Whether the last connection to `target` failed, as far as is remembered.
    pub fn includes(&self, target: &Target) -> bool {
        self.0.locked().contains(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(n: usize) -> Target {
        Target::addr(std::net::SocketAddr::from(([192, 0, 2, (n % 250) as u8], 1000 + n as u16)))
    }

    #[test]
    fn a_target_is_remembered_until_it_is_reached_and_only_some_are() {
        let unserved = Unserved::default();
        unserved.note(&target(1), false);
        assert!(!unserved.includes(&target(1)));
        unserved.note(&target(1), true);
        unserved.note(&target(2), true);
        assert!(unserved.includes(&target(1)) && unserved.includes(&target(2)));
        unserved.note(&target(1), false);
        assert!(!unserved.includes(&target(1)) && unserved.includes(&target(2)));
        for n in 0..10 * REMEMBERED {
            unserved.note(&target(n), true);
        }
        assert_eq!(unserved.0.lock().unwrap().len(), REMEMBERED);
        assert!(unserved.includes(&target(10 * REMEMBERED - 1)), "the newest are kept");
    }
}
