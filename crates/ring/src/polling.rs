//! What a loop does before it sleeps: nothing, spin for a while, or keep the other CPU awake. Which of them serves most
//! requests depends on how many callers there are, on who gets which CPU and on what a wake-up costs; it can be measured
//! more surely than guessed. So each loop tries them in turn, for a few milliseconds, goes on with the best, and looks
//! again now and then. The cheaper one wins unless the dearer one is clearly better, so a load that gains nothing by
//! polling is not polled for, and an idle loop never polls.
//!
//! Measured on two virtual CPUs, 4 KiB reads of a null disk, in kIOPS:
//!
//! | | sleep | spin | stay awake |
//! |---|---|---|---|
//! | one synchronous caller | 20 | 25 to 45 | 75 to 90 |
//! | four synchronous callers | 100 | 120 | 95 |
//! | depth 64 | 180 | 320 | 180 |

use std::time::{Duration, Instant};

/// The settings of an iothread's polling, as QEMU's `--object iothread` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Polling {
    /// The longest spin (`poll-max-ns`); zero switches polling off.
    pub max: Duration,
    /// Factor to grow by (`poll-grow`); 0 stands for 2.
    pub grow: u32,
    /// Divisor to shrink by (`poll-shrink`); 0 means back to nothing.
    pub shrink: u32,
}

impl Polling {
    /// What QEMU's iothreads do unless told otherwise: up to 32768 ns.
    pub const DEFAULT: Self = Self {
        max: Duration::from_nanos(32768),
        grow: 0,
        shrink: 0,
    };

    /// No polling: the loop sleeps at once.
    pub const OFF: Self = Self {
        max: Duration::ZERO,
        grow: 0,
        shrink: 0,
    };
}

/// The first spin after none.
const FIRST: Duration = Duration::from_micros(4);
/// How long one way is tried or kept before it is judged.
const WINDOW: Duration = Duration::from_millis(10);
/// Operations that a window needs to mean anything; it is as long as that takes.
const ENOUGH: u64 = 64;
/// A window longer than this had hardly any load: nothing is polled for it.
const SLOW: Duration = Duration::from_millis(60);
/// Windows between two trials of the other ways: few at first, as a first choice may be a mistake, then twice as many
/// each time.
const KEEP: (u32, u32) = (200, 1600);
/// Windows before the first trial: a load that has just begun is not yet where it will be.
const BEGINNING: u32 = 10;
/// Windows until the scheduler has brought a caller and its server together, or apart (measured: well under 200 ms).
const MEETING: u32 = 8;
/// What a dearer way must bring, in 1/100 of the cheaper one's rate.
const WORTH: u64 = 104;
/// A rate this far from the one that was expected, in 1/100, means another load: all ways are tried again.
const CHANGED: (u64, u64) = (60, 160);
/// As many windows in a row must say so.
const SURE: u32 = 5;

/// What a loop does before it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Sleep,
    Spin,
    /// See `awake.rs`.
    StayAwake,
}

/// The ways in the order in which they are tried. To stay awake comes last, and after a moment of sleep: it brings a
/// caller and its server together on one CPU, which the other ways would profit from for a while if they came next, and
/// a server that has been spinning sits on another one.
const WAYS: [Way; 3] = [Way::Sleep, Way::Spin, Way::StayAwake];

/// What to do before the next sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Nothing.
    Sleep,
    /// Look for news for this long.
    Spin(Duration),
    /// Keep the other CPU awake meanwhile.
    StayAwake,
}

/// The present state of one loop's polling.
#[derive(Debug)]
pub(crate) struct Spin {
    pub(crate) settings: Polling,
    /// How long to spin.
    now: Duration,
    /// Ways that this machine has.
    ways: &'static [Way],
    way: usize,
    /// The way that is entered after a window of sleep.
    next: Option<usize>,
    /// Operations a second, by way.
    rates: [u64; WAYS.len()],
    /// Ways that are still to be tried, the next one first; then the best is kept.
    trial: Option<usize>,
    /// Windows that are not judged yet, as who runs where has to settle.
    settling: u32,
    kept: u32,
    /// Windows to keep the present way for.
    keep: u32,
    /// Windows in a row whose rate was not the expected one.
    off: u32,
    window: Option<(Instant, u64)>,
}

impl Spin {
    /// `others_awake` says whether this machine is one for [`Way::StayAwake`].
    pub(crate) fn new(settings: Polling, others_awake: bool) -> Self {
        let ways = match (settings.max.is_zero(), others_awake) {
            (true, _) => &WAYS[..1],
            (false, false) => &WAYS[..2],
            (false, true) => &WAYS[..],
        };
        Self {
            settings,
            now: Duration::ZERO,
            ways,
            way: 0,
            next: None,
            rates: [0; WAYS.len()],
            trial: None,
            settling: 0,
            kept: KEEP.0 - BEGINNING,
            keep: KEEP.0,
            off: 0,
            window: None,
        }
    }

    /// What to do before the next sleep.
    pub(crate) fn advice(&self) -> Advice {
        match self.ways[self.way] {
            Way::Spin if !self.now.is_zero() => Advice::Spin(self.now),
            Way::Sleep | Way::Spin => Advice::Sleep,
            Way::StayAwake => Advice::StayAwake,
        }
    }

    /// Learns from a wait that began at `began` and lasted `waited`; `operations` were started by the loop so far.
    pub(crate) fn learn(&mut self, began: Instant, waited: Duration, operations: u64) {
        if self.ways.len() == 1 {
            return;
        }
        self.adapt(waited);
        let now = began + waited;
        let Some((since, before)) = self.window else {
            self.window = Some((now, operations));
            return;
        };
        let length = now - since;
        let count = operations - before;
        if length < WINDOW || (count < ENOUGH && length < SLOW) {
            return;
        }
        self.window = Some((now, operations));
        if length > SLOW {
            (self.way, self.next, self.trial) = (0, None, None);
            (self.kept, self.keep) = (KEEP.0 - BEGINNING, KEEP.0);
            return;
        }
        let nanos = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX).max(1);
        self.judge(count.saturating_mul(1_000_000_000) / nanos);
    }

    /// Adapts the time to spin as QEMU does: it grows while events come within the limit.
    fn adapt(&mut self, waited: Duration) {
        if waited <= self.now {
            return;
        }
        if waited > self.settings.max {
            self.now = match self.settings.shrink {
                0 => Duration::ZERO,
                by => self.now / by,
            };
        } else {
            let by = if self.settings.grow == 0 {
                2
            } else {
                self.settings.grow
            };
            self.now = (self.now * by).max(FIRST).min(self.settings.max);
        }
    }

    /// Takes the rate of the window that has just ended.
    fn judge(&mut self, rate: u64) {
        if let Some(next) = self.next.take() {
            self.way = next;
            self.settling = MEETING;
            return;
        }
        if self.settling > 0 {
            self.settling -= 1;
            return;
        }
        let expected = std::mem::replace(&mut self.rates[self.way], rate);
        if let Some(next) = self.trial {
            if next < self.ways.len() {
                self.enter(next);
                self.trial = Some(next + 1);
            } else {
                self.trial = None;
                (self.kept, self.off) = (0, 0);
                self.enter(self.best());
            }
            return;
        }
        let (low, high) = CHANGED;
        let off = expected > 0 && (rate * 100 < expected * low || rate * 100 > expected * high);
        self.off = if off { self.off + 1 } else { 0 };
        // A sliding average: single windows are noisy, and those that are off say nothing of the others.
        self.rates[self.way] = match (expected, off) {
            (0, _) => rate,
            (_, true) => expected,
            (_, false) => (expected * 3 + rate) / 4,
        };
        self.kept += 1;
        let changed = self.off >= SURE;
        if self.kept >= self.keep || changed {
            self.keep = if changed {
                KEEP.0
            } else {
                (self.keep * 2).min(KEEP.1)
            };
            self.enter(0);
            self.trial = Some(1);
        }
    }

    fn enter(&mut self, way: usize) {
        if way == self.way {
            return;
        }
        match (self.ways[self.way], self.ways[way]) {
            (Way::Spin, Way::StayAwake) => (self.way, self.next) = (0, Some(way)),
            (before, after) => {
                let together = before == Way::StayAwake || after == Way::StayAwake;
                (self.way, self.settling) = (way, if together { MEETING } else { 1 });
            }
        }
        if self.ways[self.way] == Way::Spin {
            self.now = self.settings.max;
        }
    }

    fn best(&self) -> usize {
        let mut best = 0;
        for way in 1..self.ways.len() {
            if self.rates[way] * 100 > self.rates[best] * WORTH {
                best = way;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a loop run for `windows`, with the rate that each way would have, and counts the windows of each.
    fn run(spin: &mut Spin, clock: &mut (Instant, u64), windows: u32, rates: [u64; 3]) -> [u32; 3] {
        let mut used = [0; 3];
        for _ in 0..windows {
            used[spin.way] += 1;
            let waits = 50;
            for _ in 0..waits {
                clock.1 += rates[spin.way] * 10 / 1000 / waits;
                spin.learn(clock.0, Duration::from_micros(20), clock.1);
                clock.0 += WINDOW / u32::try_from(waits).unwrap() + Duration::from_micros(1);
            }
        }
        used
    }

    fn start(others_awake: bool) -> (Spin, (Instant, u64)) {
        (
            Spin::new(Polling::DEFAULT, others_awake),
            (Instant::now(), 0),
        )
    }

    #[test]
    fn the_best_way_is_found_and_kept() {
        for best in 0..3 {
            let (mut spin, mut clock) = start(true);
            let mut rates = [50_000; 3];
            rates[best] = 90_000;
            run(&mut spin, &mut clock, 1000, rates);
            let used = run(&mut spin, &mut clock, 1000, rates);
            assert!(used[best] > 940, "{best}: {used:?}");
        }
    }

    #[test]
    fn the_cheapest_of_equals_is_taken() {
        let (mut spin, mut clock) = start(true);
        run(&mut spin, &mut clock, 1000, [50_000, 51_000, 51_500]);
        let used = run(&mut spin, &mut clock, 1000, [50_000, 51_000, 51_500]);
        assert!(used[0] > 950, "{used:?}");
    }

    #[test]
    fn another_load_is_noticed_soon() {
        let (mut spin, mut clock) = start(true);
        run(&mut spin, &mut clock, 300, [20_000, 40_000, 90_000]);
        run(&mut spin, &mut clock, 60, [180_000, 320_000, 180_000]);
        assert_eq!(spin.ways[spin.way], Way::Spin);
    }

    #[test]
    fn an_idle_loop_and_one_without_polling_do_not_poll() {
        let (mut spin, mut clock) = start(true);
        run(&mut spin, &mut clock, 300, [20_000, 90_000, 20_000]);
        for _ in 0..3 {
            spin.learn(clock.0, Duration::from_millis(200), clock.1 + 1);
            clock.0 += Duration::from_millis(200);
        }
        assert_eq!(spin.advice(), Advice::Sleep);
        let mut off = Spin::new(Polling::OFF, true);
        run(&mut off, &mut clock, 300, [20_000, 90_000, 20_000]);
        assert_eq!(off.advice(), Advice::Sleep);
    }

    #[test]
    fn without_a_second_cpu_to_wake_it_is_never_kept_awake() {
        let (mut spin, mut clock) = start(false);
        for _ in 0..500 {
            run(&mut spin, &mut clock, 1, [20_000, 30_000, 0]);
            assert_ne!(spin.advice(), Advice::StayAwake);
        }
    }
}
