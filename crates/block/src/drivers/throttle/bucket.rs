//! The arithmetic of limits: leaky buckets, used as meters. What has been done is poured in, time drains it, and while
//! a bucket is too full one has to wait. Knows no clock, no threads and no requests; no number makes it panic.

#![expect(
    clippy::cast_precision_loss,
    reason = "a limit is met to far less than one part in 2^52"
)]

use std::time::Duration;

use crate::node::Access;

/// How much may be done in a second, of bytes or of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run; 0: no limit.
    pub average: u64,
    /// While a burst lasts; 0: no bursts but for a tenth of a second's work, which may come at once.
    pub burst: u64,
    /// For how many seconds one may go on at `burst`; 0 is taken for 1.
    pub burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            average: 0,
            burst: 0,
            burst_seconds: 1,
        }
    }
}

/// Limits for all requests, for reads and for writes. All of those that are given hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Reads and writes together.
    pub total: Rate,
    /// Reads.
    pub read: Rate,
    /// Writes.
    pub write: Rate,
}

/// All limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes a second.
    pub bytes: Rates,
    /// Operations a second.
    pub operations: Rates,
    /// A request longer than this many bytes counts as that many times more operations; 0: each counts as one.
    pub operation_size: u64,
}

impl ThrottleLimits {
    /// Whether anything limits such a request.
    pub fn limits(&self, access: Access) -> bool {
        [&self.bytes, &self.operations].iter().any(|rates| {
            let own = match access {
                Access::Read => rates.read,
                Access::Write => rates.write,
            };
            rates.total.average > 0 || own.average > 0
        })
    }
}

/// The longest wait that is told at once; then one asks again. Keeps every sum far from overflow.
const LONGEST: Duration = Duration::from_secs(3600);
/// The part of a second's work that may always come at once.
const SLACK: f64 = 0.1;

/// One limit, and how much of it is used up.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    rate: Rate,
    /// What was done and has not drained at the average rate.
    level: f64,
    /// What was done and has not drained at the burst's rate.
    burst_level: f64,
}

impl Bucket {
    fn drain(&mut self, seconds: f64) {
        self.level = (self.level - self.rate.average as f64 * seconds).max(0.0);
        self.burst_level = (self.burst_level - self.rate.burst as f64 * seconds).max(0.0);
    }

    fn pour(&mut self, units: f64) {
        if self.rate.average > 0 {
            self.level += units;
            self.burst_level += units;
        }
    }

    /// Seconds until the next one may pass.
    fn wait(&self) -> f64 {
        let (average, burst) = (self.rate.average as f64, self.rate.burst as f64);
        if self.rate.average == 0 {
            return 0.0;
        }
        if self.rate.burst == 0 {
            return (self.level - average * SLACK).max(0.0) / average;
        }
        let seconds = self.rate.burst_seconds.max(1);
        let over = (self.level - burst * seconds as f64).max(0.0) / average;
        if over > 0.0 || seconds == 1 {
            // A burst of one second may come at once: only longer ones have a rate of their own.
            return over;
        }
        (self.burst_level - burst * SLACK).max(0.0) / burst
    }
}

/// All buckets of a group.
#[derive(Debug, Default)]
pub(super) struct Buckets {
    limits: ThrottleLimits,
    bytes: [Bucket; 3],
    operations: [Bucket; 3],
}

/// The places of the two buckets that a request goes through.
fn places(access: Access) -> [usize; 2] {
    match access {
        Access::Read => [0, 1],
        Access::Write => [0, 2],
    }
}

impl Buckets {
    /// Empty ones.
    pub(super) fn new(limits: ThrottleLimits) -> Self {
        let empty = |rates: Rates| {
            [rates.total, rates.read, rates.write].map(|rate| Bucket {
                rate,
                ..Bucket::default()
            })
        };
        Self {
            limits,
            bytes: empty(limits.bytes),
            operations: empty(limits.operations),
        }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limits
    }

    /// Time has passed.
    pub(super) fn drain(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        let all = self.bytes.iter_mut().chain(&mut self.operations);
        all.for_each(|bucket| bucket.drain(seconds));
    }

    /// How long the next request has to wait, whatever its length: what is too much is paid for afterwards.
    pub(super) fn wait(&self, access: Access) -> Duration {
        let waits = places(access).map(|at| self.bytes[at].wait().max(self.operations[at].wait()));
        let seconds = waits.into_iter().fold(0.0, f64::max);
        // Rounded up, as one that is woken too early only has to wait again.
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST);
        if wait.is_zero() && seconds == 0.0 {
            return Duration::ZERO;
        }
        (wait + Duration::from_nanos(1)).min(LONGEST)
    }

    /// A request of so many bytes passes.
    pub(super) fn pour(&mut self, access: Access, bytes: u64) {
        let operations = match self.limits.operation_size {
            0 => 1.0,
            size => (bytes as f64 / size as f64).max(1.0),
        };
        for at in places(access) {
            self.bytes[at].pour(bytes as f64);
            self.operations[at].pour(operations);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn total(average: u64, burst: u64, burst_seconds: u64) -> Rates {
        let total = Rate {
            average,
            burst,
            burst_seconds,
        };
        Rates {
            total,
            ..Rates::default()
        }
    }

    /// Requests that pass in so many milliseconds, each as soon as it may.
    fn passed(buckets: &mut Buckets, access: Access, bytes: u64, milliseconds: u32) -> u64 {
        let mut count = 0;
        for _ in 0..milliseconds {
            while buckets.wait(access).is_zero() {
                buckets.pour(access, bytes);
                count += 1;
            }
            buckets.drain(MS);
        }
        count
    }

    #[test]
    fn the_average_holds_and_a_tenth_of_a_second_may_come_at_once() {
        let mut buckets = Buckets::new(ThrottleLimits {
            operations: total(100, 0, 1),
            ..ThrottleLimits::default()
        });
        assert_eq!(passed(&mut buckets, Access::Read, 512, 1), 11);
        let more = passed(&mut buckets, Access::Write, 1 << 20, 10_000);
        assert!((995..=1005).contains(&more), "{more}");
    }

    #[test]
    fn bytes_count_by_length_and_are_paid_for_afterwards() {
        let mut buckets = Buckets::new(ThrottleLimits {
            bytes: total(1000, 0, 1),
            ..ThrottleLimits::default()
        });
        assert!(buckets.wait(Access::Write).is_zero());
        buckets.pour(Access::Write, 5100);
        let wait = buckets.wait(Access::Read);
        assert!((wait.as_secs_f64() - 5.0).abs() < 1e-6, "{wait:?}");
        buckets.drain(wait);
        assert!(buckets.wait(Access::Read).is_zero());
    }

    #[test]
    fn reads_and_writes_have_their_own_limits() {
        let rate = |average| Rate {
            average,
            ..Rate::default()
        };
        let limits = ThrottleLimits {
            bytes: Rates {
                read: rate(1000),
                ..Rates::default()
            },
            ..ThrottleLimits::default()
        };
        assert!(limits.limits(Access::Read) && !limits.limits(Access::Write));
        let mut buckets = Buckets::new(limits);
        buckets.pour(Access::Write, 1 << 30);
        buckets.pour(Access::Read, 1 << 10);
        assert!(buckets.wait(Access::Write).is_zero());
        assert!(!buckets.wait(Access::Read).is_zero());
    }

    #[test]
    fn a_burst_has_its_rate_and_its_length_and_then_the_average_holds() {
        // 500 a second, 2000 for 3 seconds.
        let mut buckets = Buckets::new(ThrottleLimits {
            operations: total(500, 2000, 3),
            ..ThrottleLimits::default()
        });
        // The bucket of 6000 fills at 2000 and drains at 500 a second, so it lasts for 4 seconds.
        let burst = passed(&mut buckets, Access::Read, 512, 3000);
        assert!((6000..=6300).contains(&burst), "{burst}");
        let rest = passed(&mut buckets, Access::Read, 512, 2000);
        assert!((2300..=2700).contains(&rest), "{rest}");
        let after = passed(&mut buckets, Access::Read, 512, 4000);
        assert!((1990..=2010).contains(&after), "{after}");
        // Unused time brings it back.
        buckets.drain(Duration::from_secs(20));
        let again = passed(&mut buckets, Access::Read, 512, 2000);
        assert!((4000..=4300).contains(&again), "{again}");
    }

    #[test]
    fn a_burst_of_a_second_may_come_at_once() {
        let mut buckets = Buckets::new(ThrottleLimits {
            operations: total(10, 300, 1),
            ..ThrottleLimits::default()
        });
        assert_eq!(passed(&mut buckets, Access::Read, 512, 1), 301);
    }

    #[test]
    fn long_requests_count_for_several_if_that_is_said() {
        let mut buckets = Buckets::new(ThrottleLimits {
            operations: total(10, 0, 1),
            operation_size: 4096,
            ..ThrottleLimits::default()
        });
        buckets.pour(Access::Write, 4096 * 10 + 2048);
        let wait = buckets.wait(Access::Write).as_secs_f64();
        assert!((wait - 0.95).abs() < 1e-6, "{wait}");
    }

    #[test]
    fn no_number_makes_it_panic_or_wait_for_ever() {
        for average in [0, 1, u64::MAX] {
            for burst in [0, 1, u64::MAX] {
                for seconds in [0, 1, u64::MAX] {
                    let mut buckets = Buckets::new(ThrottleLimits {
                        bytes: total(average, burst, seconds),
                        operations: total(burst, average, seconds),
                        operation_size: seconds,
                    });
                    for _ in 0..3 {
                        buckets.pour(Access::Read, u64::MAX);
                        assert!(buckets.wait(Access::Read) <= LONGEST);
                        buckets.drain(Duration::MAX);
                    }
                }
            }
        }
    }
}
