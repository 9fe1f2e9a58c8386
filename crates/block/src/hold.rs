//! Knowing when nothing in flight can touch what was just made unreachable. Whoever moves bytes at a place that a node
//! resolved keeps a [`Hold`]; whoever took a place away from a disk waits for a [`Grace`] before the place is used for
//! something else. A hold costs two uncontended atomic additions and never waits; it must be taken *before* the place is
//! looked up.
//!
//! The scheme is that of the kernel's sleepable RCU: holds count themselves under one of two parities. A grace period
//! waits for the idle parity (stragglers that read the parity before the last change), changes it, and waits for the
//! other. A hold that is taken after the place was taken away cannot see the place any more, so it need not be waited
//! for. All of that rests on one total order: counts, parity, and the word that makes the place reachable must be read
//! and written with `SeqCst`.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;

/// Threads that share no cache line with each other when they hold; more threads than that share.
pub const LANES: usize = 16;

static NEXT_LANE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LANE: Cell<usize> = Cell::new(NEXT_LANE.fetch_add(1, Ordering::Relaxed) % LANES);
}

/// A small number for the calling thread, below [`LANES`]: for data that few threads should share.
pub fn lane() -> usize {
    LANE.get()
}

/// Everyone who may be moving bytes of one disk. May be used from any thread.
#[derive(Default)]
pub struct Holds {
    parity: AtomicUsize,
    lanes: [CachePadded<[AtomicUsize; 2]>; LANES],
}

/// Keeps a resolved place from being used for anything else. Drop it when the transfer is over.
#[must_use = "without it the place may be reused while bytes are moved"]
#[derive(Debug, Default)]
pub struct Hold<'a>(Option<&'a AtomicUsize>);

impl Hold<'_> {
    /// For places that never change their meaning.
    pub const fn none() -> Self {
        Hold(None)
    }

    /// Whether there is nothing to keep.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// A grace period that has begun: see [`Holds::begin`].
#[derive(Debug)]
pub struct Grace {
    changed: bool,
}

impl Holds {
    /// Holds whatever is looked up from now on.
    pub fn enter(&self) -> Hold<'_> {
        let lane = &self.lanes[lane()];
        let count = &lane[self.parity.load(Ordering::SeqCst) & 1];
        count.fetch_add(1, Ordering::SeqCst);
        Hold(Some(count))
    }

    /// Begins to wait for all holds that exist now. One grace period at a time; begin it after the places were made
    /// unreachable.
    pub fn begin(&self) -> Grace {
        Grace { changed: false }
    }

    /// Whether all holds that existed when `grace` began are gone; never blocks. Ask again later if not.
    pub fn is_over(&self, grace: &mut Grace) -> bool {
        let parity = self.parity.load(Ordering::SeqCst);
        if !self.is_idle(parity ^ 1) {
            return false;
        }
        if grace.changed {
            return true;
        }
        self.parity.store(parity ^ 1, Ordering::SeqCst);
        grace.changed = true;
        self.is_idle(parity)
    }

    fn is_idle(&self, parity: usize) -> bool {
        let counts = self.lanes.iter().map(|lane| &lane[parity & 1]);
        counts
            .into_iter()
            .all(|count| count.load(Ordering::SeqCst) == 0)
    }
}

impl std::fmt::Debug for Holds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let held = |parity| !self.is_idle(parity);
        f.debug_struct("Holds")
            .field("held", &(held(0) || held(1)))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_waits_for_older_holds_only() {
        let holds = Holds::default();
        let old = holds.enter();
        let mut grace = holds.begin();
        assert!(!holds.is_over(&mut grace));
        let new = holds.enter();
        assert!(!holds.is_over(&mut grace));
        drop(old);
        assert!(holds.is_over(&mut grace), "the newer one does not matter");
        let mut next = holds.begin();
        assert!(!holds.is_over(&mut next));
        drop(new);
        assert!(holds.is_over(&mut next));
    }

    #[test]
    fn without_holds_it_is_over_at_once() {
        let holds = Holds::default();
        for _ in 0..3 {
            let mut grace = holds.begin();
            assert!(holds.is_over(&mut grace));
        }
    }

    /// A place is taken away and, after a grace period, overwritten, while readers look it up and read it.
    #[test]
    fn a_place_is_not_reused_under_a_reader() {
        const ROUNDS: usize = 20_000;
        let holds = Holds::default();
        // The place that is reachable, and what each place holds: its own number plus the round's.
        let reachable = AtomicUsize::new(0);
        let places = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while done.load(Ordering::SeqCst) == 0 {
                        let hold = holds.enter();
                        let place = &places[reachable.load(Ordering::SeqCst)];
                        let first = place.load(Ordering::SeqCst);
                        std::hint::spin_loop();
                        assert_eq!(place.load(Ordering::SeqCst), first);
                        drop(hold);
                    }
                });
            }
            for round in 1..ROUNDS {
                let old = reachable.load(Ordering::SeqCst);
                reachable.store(old ^ 1, Ordering::SeqCst);
                let mut grace = holds.begin();
                while !holds.is_over(&mut grace) {
                    std::thread::yield_now();
                }
                places[old].store(round, Ordering::SeqCst);
            }
            done.store(1, Ordering::SeqCst);
        });
    }
}
