//! How a loop has spent the time in which it had nothing to do, for whoever looks from outside. Its own thread writes, with
//! plain loads and stores; any thread may read. It decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a loop has waited since it was made. Times are those of waits that are over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Time spent looking for news without sleeping.
    pub spun: Duration,
    /// Time asleep in the kernel.
    pub slept: Duration,
    /// The part of `slept` during which the other CPU was kept awake for this loop.
    pub kept_awake: Duration,
    /// Spins that ended with news.
    pub hits: u64,
    /// Spins that ended with a sleep.
    pub misses: u64,
}

/// What a wait was like before it became a sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spun {
    pub(crate) time: Duration,
    /// It ended with news, so there is no sleep.
    pub(crate) news: bool,
    /// It was a spin at all.
    pub(crate) tried: bool,
    pub(crate) kept_awake: bool,
}

/// Where a loop notes its waits, on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
pub(crate) struct WaitCounters([AtomicU64; 5]);

impl WaitCounters {
    /// Notes a wait of `waited` that began with `spun`. Only the loop's thread may call it.
    pub(crate) fn note(&self, spun: Spun, waited: Duration) {
        let slept = nanoseconds(waited.saturating_sub(spun.time));
        let kept_awake = if spun.kept_awake { slept } else { 0 };
        let [spins, sleeps, awake, hits, misses] = &self.0;
        add(spins, nanoseconds(spun.time));
        add(sleeps, slept);
        add(awake, kept_awake);
        add(hits, u64::from(spun.tried && spun.news));
        add(misses, u64::from(spun.tried && !spun.news));
    }

    pub(crate) fn read(&self) -> Waits {
        let [spun, slept, kept_awake, hits, misses] = self
            .0
            .each_ref()
            .map(|counter| counter.load(Ordering::Relaxed));
        Waits {
            spun: Duration::from_nanos(spun),
            slept: Duration::from_nanos(slept),
            kept_awake: Duration::from_nanos(kept_awake),
            hits,
            misses,
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn add(counter: &AtomicU64, by: u64) {
    if by > 0 {
        let sum = counter.load(Ordering::Relaxed).wrapping_add(by);
        counter.store(sum, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_a_spin_a_sleep_or_both() {
        let micros = Duration::from_micros;
        let counters = WaitCounters::default();
        let spin = Spun {
            time: micros(10),
            news: true,
            tried: true,
            kept_awake: false,
        };
        counters.note(spin, micros(10));
        counters.note(
            Spun {
                news: false,
                ..spin
            },
            micros(50),
        );
        let awake = Spun {
            kept_awake: true,
            ..Spun::default()
        };
        counters.note(awake, micros(7));
        let expected = Waits {
            spun: micros(20),
            slept: micros(47),
            kept_awake: micros(7),
            hits: 1,
            misses: 1,
        };
        assert_eq!(counters.read(), expected);
    }
}
