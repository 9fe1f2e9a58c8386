//! How often lookups find their slice in memory. Counted where few threads share a cache line, so that lookups do not slow
//! each other down; it never decides anything.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use diskfuse_block::{CacheUse, LANES, lane};

/// Counters of one image. Any thread may use them.
#[derive(Default)]
pub(super) struct Lookups([CachePadded<Lane>; LANES]);

#[derive(Default)]
struct Lane {
    found: AtomicU64,
    missed: AtomicU64,
}

impl Lookups {
    /// A lookup found its slice.
    pub(super) fn found(&self) {
        self.0[lane()].found.fetch_add(1, Ordering::Relaxed);
    }

    /// Somebody has to wait for a slice; he finds it by another lookup afterwards.
    pub(super) fn missed(&self) {
        self.0[lane()].missed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> CacheUse {
        let sum = |of: fn(&Lane) -> &AtomicU64| -> u64 {
            let lanes = self.0.iter();
            lanes.map(|lane| of(lane).load(Ordering::Relaxed)).sum()
        };
        let misses = sum(|lane| &lane.missed);
        CacheUse {
            hits: sum(|lane| &lane.found).saturating_sub(misses),
            misses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_for_is_no_hit() {
        let lookups = Lookups::default();
        lookups.missed();
        (0..3).for_each(|_| lookups.found());
        let expected = CacheUse { hits: 2, misses: 1 };
        assert_eq!(lookups.read(), expected);
    }
}
