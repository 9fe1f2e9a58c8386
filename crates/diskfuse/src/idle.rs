//! When an export has been idle for long enough to be taken away. It must never decide that nobody uses the file: the
//! kernel says so, when the unmount is tried.

use std::time::{Duration, Instant};

/// Watches one export.
#[derive(Debug)]
pub struct Idle {
    limit: Duration,
    requests: u64,
    since: Instant,
}

impl Idle {
    /// It is idle after `limit` without a request; the time begins `now`.
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            requests: 0,
            since: now,
        }
    }

    /// How often [`Idle::is_over`] is to be asked.
    pub fn tick(&self) -> Duration {
        (self.limit / 4).clamp(Duration::from_millis(50), Duration::from_secs(10))
    }

    /// Whether the limit has passed, given how many requests there have been; then the time begins anew.
    pub fn is_over(&mut self, requests: u64, now: Instant) -> bool {
        if self.requests != requests {
            self.requests = requests;
            self.since = now;
        }
        let over = now.duration_since(self.since) >= self.limit;
        if over {
            self.since = now;
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_vain_attempts_begin_the_time_anew() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut idle = Idle::new(Duration::from_secs(10), start);
        assert!(!idle.is_over(0, at(9)));
        assert!(!idle.is_over(1, at(11)), "a request came");
        assert!(!idle.is_over(1, at(20)));
        assert!(idle.is_over(1, at(21)));
        assert!(!idle.is_over(1, at(22)), "it was in use");
        assert!(idle.is_over(1, at(31)));
    }
}
