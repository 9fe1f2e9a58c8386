//! How many queues fetch. More threads cost more wake-ups, and wake-ups of the wrong thread: with one caller each
//! request went to another core, and more queues lost up to a quarter. So one queue fetches until its thread has no idle
//! time left while the machine has; then one more is tried, and kept only if more requests are served than before.
//! Queue 0 decides, in passing, from what the queues count anyway; an idle export decides nothing.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Queue;
use crate::shared::Shared;

/// Requests between two looks at the clock.
const LOOK_EVERY: u32 = 128;
/// How long to count before judging.
const WINDOW: Duration = Duration::from_millis(100);
/// A thread with less idle time than this share of a window is saturated, in 1/100.
const SATURATED: u64 = 10;
/// A machine with more idle time than this share of one CPU has room for another thread, in 1/100.
const ROOM: u64 = 30;
/// What one more queue must bring, in 1/100 of what was served without it.
const WORTH: u64 = 105;
/// The first pause after a trial that did not pay, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Nothing to do but watch for saturation.
    Steady,
    /// Saturated: is there a CPU to spare? Holds the machine's idle time at the beginning.
    Asking { idle: u64 },
    /// One more queue fetches, for the second window now. Holds the rate without it.
    Trying { before: u64, settled: bool },
}

/// Queue 0's view of the load.
pub(super) struct Scale {
    statistics: Option<File>,
    requests: Cell<u32>,
    since: Cell<Option<Instant>>,
    served: Cell<u64>,
    idle: Cell<u64>,
    phase: Cell<Phase>,
    pause: Cell<Duration>,
    not_before: Cell<Option<Instant>>,
}

impl Scale {
    /// For the queue `index`.
    pub(super) fn new(index: usize) -> Self {
        // Now, as a process that serves may open nothing any more.
        let statistics = (index == 0).then(|| File::open("/proc/stat").ok());
        Self {
            statistics: statistics.flatten(),
            requests: Cell::new(0),
            since: Cell::new(None),
            served: Cell::new(0),
            idle: Cell::new(0),
            phase: Cell::new(Phase::Steady),
            pause: Cell::new(PAUSE.0),
            not_before: Cell::new(None),
        }
    }
}

/// What a window has shown.
#[derive(Clone, Copy, Debug)]
struct Observed {
    /// Requests a second.
    rate: u64,
    /// Idle time of the active queues' threads together, in 1/100 of one thread's time.
    idle: u64,
    length: Duration,
}

/// Time that all CPUs of the machine have been idle for since it was started, in milliseconds.
/// Source: proc_stat(5): the first line's fourth and fifth number, in 1/100 s.
fn machine_idle(statistics: Option<&File>) -> Option<u64> {
    /// The first line is ten numbers of 20 digits at most.
    const FIRST_LINE: usize = 256;
    let mut bytes = [0; FIRST_LINE];
    let count = statistics?.read_at(&mut bytes, 0).ok()?;
    let text = String::from_utf8_lossy(bytes.get(..count)?);
    let mut fields = text.lines().next()?.split_ascii_whitespace().skip(4);
    let idle: u64 = fields.next()?.parse().ok()?;
    let waiting: u64 = fields.next()?.parse().ok()?;
    Some((idle + waiting) * 10)
}

impl Queue {
    /// Counts a fetched request; once in a while, judges.
    pub(super) fn count_for_scale(&self) {
        let scale = &self.scale;
        scale.requests.set(scale.requests.get() + 1);
        if scale.requests.get() < LOOK_EVERY {
            return;
        }
        scale.requests.set(0);
        let idle = diskfuse_ring::counters().idle.as_nanos() as u64;
        self.lane().idle.store(idle, Ordering::Relaxed);
        if self.index == 0 && self.shared.most_active > 1 {
            self.judge(Instant::now());
        }
    }

    fn judge(&self, now: Instant) {
        let scale = &self.scale;
        let Some(since) = scale.since.get() else {
            return self.begin_window(now);
        };
        let length = now - since;
        if length < WINDOW {
            return;
        }
        let active = self.shared.active.load(Ordering::Relaxed) as u64;
        let nanos = (length.as_nanos() as u64).max(1);
        let served = self.shared.served() - scale.served.get();
        let seen = Observed {
            rate: served * 1_000_000_000 / nanos,
            idle: self.idle_of_active().saturating_sub(scale.idle.get()) * 100 / nanos,
            length,
        };
        // A window that was mostly silence (or in which a thread joined) tells nothing.
        if length < 10 * WINDOW {
            self.scale.phase.set(self.next_phase(now, active, seen));
        } else {
            // A queue that was on trial has not proved itself.
            if matches!(scale.phase.get(), Phase::Trying { .. }) {
                self.set_active(active - 1);
            }
            scale.phase.set(Phase::Steady);
        }
        self.begin_window(now);
    }

    fn begin_window(&self, now: Instant) {
        self.scale.since.set(Some(now));
        self.scale.served.set(self.shared.served());
        self.scale.idle.set(self.idle_of_active());
    }

    fn idle_of_active(&self) -> u64 {
        let active = self.shared.active.load(Ordering::Relaxed);
        let lanes = self.shared.lanes.iter().take(active);
        lanes.map(|lane| lane.idle.load(Ordering::Relaxed)).sum()
    }

    fn next_phase(&self, now: Instant, active: u64, seen: Observed) -> Phase {
        let scale = &self.scale;
        let saturated = seen.idle <= SATURATED * active;
        match scale.phase.get() {
            Phase::Trying {
                before,
                settled: false,
            } => Phase::Trying {
                before,
                settled: true,
            },
            Phase::Trying {
                before,
                settled: true,
            } => {
                if seen.rate * 100 >= before * WORTH {
                    scale.pause.set(PAUSE.0);
                } else {
                    self.set_active(active - 1);
                    scale.not_before.set(Some(now + scale.pause.get()));
                    scale.pause.set((scale.pause.get() * 2).min(PAUSE.1));
                }
                Phase::Steady
            }
            Phase::Asking { idle } if saturated => {
                let spare = machine_idle(self.scale.statistics.as_ref())
                    .map_or(0, |i| i.saturating_sub(idle));
                if u128::from(spare) * 100 >= u128::from(ROOM) * seen.length.as_millis() {
                    self.set_active(active + 1);
                    return Phase::Trying {
                        before: seen.rate,
                        settled: false,
                    };
                }
                scale.not_before.set(Some(now + PAUSE.0));
                Phase::Steady
            }
            Phase::Asking { .. } => Phase::Steady,
            Phase::Steady => {
                let may_try = scale.not_before.get().is_none_or(|t| now >= t);
                if saturated && may_try && active < self.shared.most_active as u64 {
                    return machine_idle(self.scale.statistics.as_ref())
                        .map_or(Phase::Steady, |idle| Phase::Asking { idle });
                }
                // More than one thread's time is idle: one fewer does the same work.
                if active > 1 && seen.idle > 130 {
                    self.set_active(active - 1);
                }
                Phase::Steady
            }
        }
    }

    fn set_active(&self, active: u64) {
        tracing::debug!(export = %self.shared.options.id, active, "queues that fetch");
        self.shared.set_active(active as usize);
    }
}

impl Shared {
    /// Requests served so far that moved data.
    fn served(&self) -> u64 {
        let stats = self.stats();
        stats.reads + stats.writes
    }
}
