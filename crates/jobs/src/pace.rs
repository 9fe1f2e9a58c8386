//! The speed limit: so many bytes a second, spread evenly. It counts; waiting is up to the job.

use std::time::{Duration, Instant};

/// The least bytes of a piece, however slow.
const LEAST: u64 = 64 << 10;
/// Pieces a second that a slow job is cut into.
const PIECES: u64 = 8;

#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second; 0 for no limit.
    speed: u64,
    /// When the next piece may begin.
    next: Instant,
}

impl Pace {
    pub(crate) fn new(speed: u64) -> Self {
        Self {
            speed,
            next: Instant::now(),
        }
    }

    pub(crate) fn speed(&self) -> u64 {
        self.speed
    }

    /// What was owed at another speed is forgotten.
    pub(crate) fn set_speed(&mut self, speed: u64) {
        *self = Self::new(speed);
    }

    /// How long pieces should be, `most` bytes at most.
    pub(crate) fn piece(&self, most: u64) -> u64 {
        match self.speed {
            0 => most,
            speed => (speed / PIECES / LEAST * LEAST).clamp(LEAST, most.max(LEAST)),
        }
    }

    /// `None` if `bytes` may be moved now, which counts them; else how long to wait before asking again.
    pub(crate) fn ask(&mut self, now: Instant, bytes: u64) -> Option<Duration> {
        if self.speed == 0 {
            return None;
        }
        if self.next > now {
            return Some(self.next - now);
        }
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.speed);
        // A day is as good as for ever, and cannot overflow.
        let most = Duration::from_secs(86_400);
        let time = u64::try_from(nanoseconds).map_or(most, Duration::from_nanos);
        self.next = self.next.max(now) + time.min(most);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_spread_over_time() {
        let mut pace = Pace::new(1 << 20);
        assert_eq!(pace.piece(512 << 10), 128 << 10);
        let mut now = Instant::now();
        let start = now;
        let mut moved = 0;
        while now - start < Duration::from_secs(10) {
            match pace.ask(now, 128 << 10) {
                None => moved += 128 << 10,
                Some(wait) => now += wait,
            }
        }
        assert!((10 << 20..11 << 20).contains(&moved), "{moved}");
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let mut pace = Pace::new(0);
        let now = Instant::now();
        assert!((0..1000).all(|_| pace.ask(now, 1 << 30).is_none()));
        assert_eq!(pace.piece(1 << 19), 1 << 19);
    }

    #[test]
    fn a_crawl_still_moves() {
        let mut pace = Pace::new(1);
        assert_eq!(pace.piece(1 << 20), 64 << 10);
        assert!(pace.ask(Instant::now(), 1 << 20).is_none());
        assert!(pace.ask(Instant::now(), 1 << 20).is_some());
    }
}
