//! What a daemon has counted, as it is said over the control socket, and the arithmetic that `top`, `info` and the metrics share:
//! sums over queues, differences between two looks, percentiles. Classes of latencies say themselves what they hold, so that
//! another version's are understood.

#![expect(clippy::cast_precision_loss, reason = "shares are for people")]

use std::collections::BTreeMap;

use diskfuse_block::CacheUse;
use diskfuse_fuse::{Latencies, QueueStats, RequestKind};
use serde::{Deserialize, Serialize};

/// What one queue has done, and how its thread has waited. Times are nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueCounters {
    /// Requests in flight.
    pub in_flight: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests answered with an error of the disk.
    pub errors: u64,
    /// Requests answered, by kind: `read`, `write`, `flush`, `allocate`, `other`.
    pub requests: BTreeMap<String, Times>,
    /// The thread looked for news without sleeping.
    pub spun_ns: u64,
    /// The thread slept.
    pub slept_ns: u64,
    /// The part of that during which the other CPU was kept awake.
    pub kept_awake_ns: u64,
    /// Spins that ended with news.
    pub spin_hits: u64,
    /// Spins that ended with a sleep.
    pub spin_misses: u64,
}

/// Requests of one kind and how long they took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// All of them together.
    pub sum_ns: u64,
    /// Pairs, in rising order: requests that took less than so many nanoseconds, not counted in a pair before.
    pub below_ns: Vec<(u64, u64)>,
}

/// The metadata caches of an export's image and of all that it stands on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheCounters {
    /// Lookups that found what they needed in memory.
    pub hits: u64,
    /// Lookups that had to wait until it was read.
    pub misses: u64,
}

impl From<QueueStats> for QueueCounters {
    fn from(stats: QueueStats) -> Self {
        let nanoseconds =
            |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let kinds = RequestKind::ALL.map(|kind| kind.name().to_owned());
        let times = stats.requests.map(Times::from);
        Self {
            in_flight: stats.in_flight,
            read_bytes: stats.read_bytes,
            written_bytes: stats.written_bytes,
            errors: stats.errors,
            requests: kinds.into_iter().zip(times).collect(),
            spun_ns: nanoseconds(stats.waits.spun),
            slept_ns: nanoseconds(stats.waits.slept),
            kept_awake_ns: nanoseconds(stats.waits.kept_awake),
            spin_hits: stats.waits.hits,
            spin_misses: stats.waits.misses,
        }
    }
}

impl From<Latencies> for Times {
    fn from(latencies: Latencies) -> Self {
        let classes = latencies.classes.into_iter();
        Self {
            sum_ns: latencies.sum,
            below_ns: classes.map(|class| (class.below, class.count)).collect(),
        }
    }
}

impl CacheCounters {
    /// With another cache.
    pub fn add(&mut self, other: CacheUse) {
        self.hits = self.hits.saturating_add(other.hits);
        self.misses = self.misses.saturating_add(other.misses);
    }

    /// What was counted since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            hits: self.hits.saturating_sub(before.hits),
            misses: self.misses.saturating_sub(before.misses),
        }
    }

    /// The share of lookups that found what they needed, 0 to 1; `None` if there was none.
    pub fn rate(self) -> Option<f64> {
        share(self.hits, self.hits.saturating_add(self.misses))
    }
}

impl Times {
    /// How many requests.
    pub fn count(&self) -> u64 {
        let counts = self.below_ns.iter().map(|&(_, count)| count);
        counts.fold(0, u64::saturating_add)
    }

    /// Nanoseconds that `share` (0 to 1) of the requests took at most; `None` if there was no request.
    pub fn percentile(&self, share: f64) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0u64;
        self.below_ns.iter().find_map(|&(below, count)| {
            seen = seen.saturating_add(count);
            (seen >= rank).then_some(below)
        })
    }

    fn add(&mut self, other: &Self) {
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.below_ns = combine(&self.below_ns, &other.below_ns, u64::saturating_add);
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            sum_ns: self.sum_ns.saturating_sub(before.sum_ns),
            below_ns: combine(&self.below_ns, &before.below_ns, u64::saturating_sub),
        }
    }
}

impl QueueCounters {
    /// Of several queues together.
    pub fn sum<'q>(queues: impl IntoIterator<Item = &'q Self>) -> Self {
        let mut sum = Self::default();
        for queue in queues {
            sum.each(queue, u64::saturating_add);
            for (kind, times) in &queue.requests {
                sum.requests.entry(kind.clone()).or_default().add(times);
            }
        }
        sum
    }

    /// What was counted since `before`; what is in flight is as it is now.
    pub fn since(&self, before: &Self) -> Self {
        let mut since = self.clone();
        since.each(before, u64::saturating_sub);
        since.in_flight = self.in_flight;
        let nothing = Times::default();
        for (kind, times) in &mut since.requests {
            *times = times.since(before.requests.get(kind).unwrap_or(&nothing));
        }
        since
    }

    /// Requests of these kinds together.
    pub fn of_kinds(&self, kinds: &[RequestKind]) -> Times {
        let mut sum = Times::default();
        for times in kinds
            .iter()
            .filter_map(|kind| self.requests.get(kind.name()))
        {
            sum.add(times);
        }
        sum
    }

    /// The share of spins that ended with news, 0 to 1; `None` if there was none.
    pub fn spin_rate(&self) -> Option<f64> {
        share(
            self.spin_hits,
            self.spin_hits.saturating_add(self.spin_misses),
        )
    }

    fn each(&mut self, other: &Self, act: fn(u64, u64) -> u64) {
        let pairs = [
            (&mut self.in_flight, other.in_flight),
            (&mut self.read_bytes, other.read_bytes),
            (&mut self.written_bytes, other.written_bytes),
            (&mut self.errors, other.errors),
            (&mut self.spun_ns, other.spun_ns),
            (&mut self.slept_ns, other.slept_ns),
            (&mut self.kept_awake_ns, other.kept_awake_ns),
            (&mut self.spin_hits, other.spin_hits),
            (&mut self.spin_misses, other.spin_misses),
        ];
        for (mine, others) in pairs {
            *mine = act(*mine, others);
        }
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Two lists of classes, each class of the second applied to that of the first.
fn combine(one: &[(u64, u64)], other: &[(u64, u64)], act: fn(u64, u64) -> u64) -> Vec<(u64, u64)> {
    let mut all: BTreeMap<u64, u64> = one.iter().copied().collect();
    for &(below, count) in other {
        let mine = all.entry(below).or_default();
        *mine = act(*mine, count);
    }
    all.into_iter().filter(|&(_, count)| count > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(below_ns: &[(u64, u64)]) -> Times {
        Times {
            sum_ns: 7,
            below_ns: below_ns.to_vec(),
        }
    }

    #[test]
    fn percentiles_are_the_end_of_the_class_that_they_fall_into() {
        let times = times(&[(10, 50), (20, 49), (30, 1)]);
        assert_eq!(times.percentile(0.5), Some(10));
        assert_eq!(times.percentile(0.99), Some(20));
        assert_eq!(times.percentile(0.999), Some(30));
        assert_eq!(Times::default().percentile(0.5), None);
    }

    #[test]
    fn differences_and_sums_go_by_kind_and_class() {
        let queue = |reads: &[(u64, u64)], bytes| QueueCounters {
            requests: BTreeMap::from([("read".to_owned(), times(reads))]),
            read_bytes: bytes,
            in_flight: 3,
            ..QueueCounters::default()
        };
        let (before, after) = (queue(&[(10, 1)], 100), queue(&[(10, 4), (20, 2)], 900));
        let since = after.since(&before);
        assert_eq!(since.requests["read"].below_ns, [(10, 3), (20, 2)]);
        assert_eq!((since.read_bytes, since.in_flight), (800, 3));
        let sum = QueueCounters::sum([&before, &after]);
        assert_eq!(sum.requests["read"].below_ns, [(10, 5), (20, 2)]);
        assert_eq!((sum.read_bytes, sum.in_flight), (1000, 6));
        assert_eq!(sum.of_kinds(&[RequestKind::Read]).count(), 7);
        assert_eq!(sum.of_kinds(&[RequestKind::Write]).count(), 0);
        // A queue that began anew counts less than before.
        assert_eq!(before.since(&after).read_bytes, 0);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let other = r#"{"in_flight": 2, "news": [], "requests": {"teleport": {"sum_ns": 1}}}"#;
        let read: QueueCounters = serde_json::from_str(other).unwrap();
        assert_eq!(read.in_flight, 2);
        assert_eq!(read.of_kinds(&RequestKind::ALL).count(), 0);
    }
}
