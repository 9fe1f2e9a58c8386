//! How long requests take, by kind: log-linear histograms of a fixed size. A queue's thread writes its own, with plain loads
//! and stores; whoever looks on reads them while that goes on. Noting a request never allocates and never locks.
//!
//! A value is put into one of eight classes between two powers of two, so a class is at most 1/8 wide, from 1 µs to 17 s.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::request::Operation;
use crate::shared::bump;

/// log2 of the classes between two powers of two.
const SPLIT: u32 = 3;
/// log2 of the first value, in nanoseconds, that does not fall into the first class.
const FIRST: u32 = 10;
/// log2 of the first value, in nanoseconds, that falls into the last class.
const LAST: u32 = 34;
const CLASSES: usize = ((LAST - FIRST) << SPLIT) as usize + 2;

/// Kinds of requests that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH and FSYNC.
    Flush,
    /// FALLOCATE: zeroing, discarding, growing.
    Allocate,
    /// Opening, attributes, names and whatever else there is.
    Other,
}

impl RequestKind {
    /// All of them, in the order of [`QueueStats::requests`](crate::QueueStats::requests).
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Allocate,
        Self::Other,
    ];

    pub(crate) fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Read { .. } => Self::Read,
            Operation::Write { .. } => Self::Write,
            Operation::Flush | Operation::Fsync => Self::Flush,
            Operation::Fallocate { .. } => Self::Allocate,
            _ => Self::Other,
        }
    }

    /// One word, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Allocate => "allocate",
            Self::Other => "other",
        }
    }
}

/// Requests that took less than `below` and did not fall into a class before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyClass {
    /// Nanoseconds; `u64::MAX` for the last class, which has no limit.
    pub below: u64,
    /// How many.
    pub count: u64,
}

/// Requests of one kind that were answered, whatever the answer, and how long they took from being fetched to the answer
/// being handed over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Nanoseconds, of all of them together.
    pub sum: u64,
    /// The classes that are not empty, the shortest first.
    pub classes: Vec<LatencyClass>,
}

struct Histogram {
    sum: AtomicU64,
    counts: [AtomicU64; CLASSES],
}

/// One queue's histograms.
pub(crate) struct Histograms([Histogram; RequestKind::ALL.len()]);

impl Default for Histograms {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Histogram {
            sum: AtomicU64::new(0),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
        }))
    }
}

impl Histograms {
    /// Notes a request that took `time`. Only the queue's thread may call it.
    pub(crate) fn note(&self, kind: RequestKind, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let histogram = &self.0[kind as usize];
        bump(&histogram.sum, nanoseconds);
        bump(&histogram.counts[class_of(nanoseconds)], 1);
    }

    pub(crate) fn read(&self) -> [Latencies; RequestKind::ALL.len()] {
        self.0.each_ref().map(Histogram::read)
    }
}

impl Histogram {
    fn read(&self) -> Latencies {
        let counts = self.counts.iter().enumerate();
        let classes = counts.filter_map(|(class, count)| {
            let count = count.load(Ordering::Relaxed);
            (count > 0).then(|| LatencyClass {
                below: end_of(class),
                count,
            })
        });
        Latencies {
            sum: self.sum.load(Ordering::Relaxed),
            classes: classes.collect(),
        }
    }
}

fn class_of(nanoseconds: u64) -> usize {
    if nanoseconds >> FIRST == 0 {
        return 0;
    }
    let octave = nanoseconds.ilog2();
    if octave >= LAST {
        return CLASSES - 1;
    }
    let part = (nanoseconds >> (octave - SPLIT)) & ((1 << SPLIT) - 1);
    1 + (((octave - FIRST) << SPLIT) as usize) + part as usize
}

/// The first value past a class.
fn end_of(class: usize) -> u64 {
    if class == CLASSES - 1 {
        return u64::MAX;
    }
    let (octave, part) = (class as u32 >> SPLIT, class as u64 & ((1 << SPLIT) - 1));
    let base = 1u64 << (FIRST + octave);
    base + (base >> SPLIT) * part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_class_and_classes_are_narrow() {
        let mut values: Vec<u64> = (0..64).map(|shift| 1 << shift).collect();
        values.extend((0..63).map(|shift| (1 << shift) + (1 << shift) / 3));
        values.extend([0, 1023, 1024, 1151, 1152, (1 << LAST) - 1, u64::MAX]);
        for value in values {
            let class = class_of(value);
            assert!(value < end_of(class) || class == CLASSES - 1, "{value}");
            let start = class.checked_sub(1).map_or(0, end_of);
            assert!(value >= start, "{value}");
            if class > 0 && class < CLASSES - 1 {
                assert!((end_of(class) - start) * 8 <= start, "{value}");
            }
        }
        assert!((1..CLASSES).all(|class| end_of(class - 1) < end_of(class)));
    }

    #[test]
    fn what_is_noted_is_read() {
        let histograms = Histograms::default();
        histograms.note(RequestKind::Write, Duration::from_micros(3));
        histograms.note(RequestKind::Write, Duration::from_micros(3));
        histograms.note(RequestKind::Write, Duration::from_secs(60));
        let read = histograms.read();
        let writes = &read[RequestKind::Write as usize];
        assert_eq!(writes.sum, 60_000_006_000);
        let counts: Vec<u64> = writes.classes.iter().map(|class| class.count).collect();
        assert_eq!(counts, [2, 1]);
        assert_eq!(writes.classes[1].below, u64::MAX);
        assert_eq!(read[RequestKind::Read as usize], Latencies::default());
    }
}
