//! From two looks at the counters to what `top` shows: rates, percentiles and shares of the time between them. It only computes.

#![expect(clippy::cast_precision_loss, reason = "rates are for people")]

use std::cmp::Ordering;
use std::time::Duration;

use diskfuse_fuse::RequestKind;

use super::Look;
use crate::control::counters::QueueCounters;
use crate::control::protocol::ExportStatus;

/// An export, and each of its queues.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// Its mountpoint.
    pub name: String,
    /// Its daemon.
    pub pid: u32,
    pub whole: Figures,
    pub queues: Vec<Figures>,
}

/// What went through an export or a queue, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Figures {
    pub reads: f64,
    pub writes: f64,
    pub read_bytes: f64,
    pub written_bytes: f64,
    pub errors: f64,
    pub in_flight: u64,
    /// `None` if the daemon is older than these counters.
    pub detail: Option<Detail>,
}

/// What only daemons say that count it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Detail {
    /// Nanoseconds that half, 99 % and 99.9 % of the reads and writes took at most; `None` if there were none.
    pub latency: [Option<u64>; 3],
    /// The share of metadata lookups that needed no reading; `None` if there were none, and for queues.
    pub cache: Option<f64>,
    /// The share of the time that threads spent polling: of one thread, so two may have 2.
    pub polling: f64,
    /// The share of spins that ended with news; `None` if there was none.
    pub spins: Option<f64>,
}

impl Figures {
    pub(super) fn requests(&self) -> f64 {
        self.reads + self.writes
    }

    fn bytes(&self) -> f64 {
        self.read_bytes + self.written_bytes
    }

    fn p99(&self) -> u64 {
        self.detail
            .and_then(|detail| detail.latency[1])
            .unwrap_or(0)
    }
}

/// What exports are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    /// Mountpoints, from A to Z.
    Name,
    /// Requests, the most first.
    #[default]
    Requests,
    /// Bytes, the most first.
    Bytes,
    /// The 99th percentile, the longest first.
    Latency,
    /// Requests in flight, the most first.
    Depth,
}

pub(super) fn sort(rows: &mut [Row], order: Order) {
    let most = |one: f64, other: f64| other.partial_cmp(&one).unwrap_or(Ordering::Equal);
    rows.sort_by(|a, b| {
        let (x, y) = (&a.whole, &b.whole);
        let by = match order {
            Order::Name => Ordering::Equal,
            Order::Requests => most(x.requests(), y.requests()),
            Order::Bytes => most(x.bytes(), y.bytes()),
            Order::Latency => y.p99().cmp(&x.p99()),
            Order::Depth => y.in_flight.cmp(&x.in_flight),
        };
        by.then_with(|| a.name.cmp(&b.name)).then(a.pid.cmp(&b.pid))
    });
}

/// The exports that were there at both looks.
pub(super) fn rows(before: &Look, now: &Look) -> Vec<Row> {
    let same = |a: &ExportStatus, b: &ExportStatus| {
        a.pid == b.pid && a.id == b.id && a.mountpoint == b.mountpoint
    };
    let all = now.exports.iter().filter_map(|(said, export)| {
        let mut past = before.exports.iter();
        let (then, past) = past.find(|(_, past)| same(past, export))?;
        let time = said.saturating_duration_since(*then);
        Some(row(past, export, time.max(Duration::from_millis(1))))
    });
    all.collect()
}

fn row(before: &ExportStatus, now: &ExportStatus, time: Duration) -> Row {
    let pairs = now.per_queue.iter().zip(&before.per_queue);
    let since: Vec<QueueCounters> = pairs.map(|(now, before)| now.since(before)).collect();
    let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / time.as_secs_f64();
    let detail = (!since.is_empty()).then(|| {
        let cache = now.metadata_cache.zip(before.metadata_cache);
        Detail {
            cache: cache.and_then(|(now, before)| now.since(before).rate()),
            ..detail(&QueueCounters::sum(&since), time)
        }
    });
    Row {
        name: now.mountpoint.0.display().to_string(),
        pid: now.pid,
        whole: Figures {
            reads: rate(now.reads, before.reads),
            writes: rate(now.writes, before.writes),
            read_bytes: rate(now.read_bytes, before.read_bytes),
            written_bytes: rate(now.written_bytes, before.written_bytes),
            errors: rate(now.errors, before.errors),
            in_flight: now.in_flight,
            detail,
        },
        queues: since.iter().map(|queue| of_queue(queue, time)).collect(),
    }
}

fn of_queue(since: &QueueCounters, time: Duration) -> Figures {
    let rate = |count: u64| count as f64 / time.as_secs_f64();
    Figures {
        reads: rate(since.of_kinds(&[RequestKind::Read]).count()),
        writes: rate(since.of_kinds(&[RequestKind::Write]).count()),
        read_bytes: rate(since.read_bytes),
        written_bytes: rate(since.written_bytes),
        errors: rate(since.errors),
        in_flight: since.in_flight,
        detail: Some(detail(since, time)),
    }
}

fn detail(since: &QueueCounters, time: Duration) -> Detail {
    let times = since.of_kinds(&[RequestKind::Read, RequestKind::Write]);
    let polled = since.spun_ns.saturating_add(since.kept_awake_ns);
    Detail {
        latency: [0.5, 0.99, 0.999].map(|share| times.percentile(share)),
        cache: None,
        polling: Duration::from_nanos(polled).as_secs_f64() / time.as_secs_f64(),
        spins: since.spin_rate(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::time::Instant;

    use super::*;
    use crate::control::counters::{CacheCounters, Times};

    pub(crate) fn export(name: &str, reads: u64) -> ExportStatus {
        let times = Times {
            sum_ns: reads * 1000,
            below_ns: vec![(2_000, reads)],
        };
        let queue = QueueCounters {
            in_flight: 2,
            read_bytes: reads * 4096,
            requests: BTreeMap::from([("read".to_owned(), times)]),
            spun_ns: reads * 1_000_000,
            spin_hits: reads,
            spin_misses: reads,
            ..QueueCounters::default()
        };
        ExportStatus {
            image: None,
            mountpoint: Path::new(name).into(),
            pid: 7,
            id: "mount".into(),
            node: "disk".into(),
            format: "qcow2".into(),
            writable: true,
            stopping: false,
            queues: 1,
            transport: "device".into(),
            passthrough: false,
            in_flight: 2,
            reads,
            writes: 0,
            read_bytes: reads * 4096,
            written_bytes: 0,
            flushes: 0,
            errors: 0,
            per_queue: vec![queue],
            metadata_cache: Some(CacheCounters {
                hits: reads * 3,
                misses: reads,
            }),
        }
    }

    pub(crate) fn between(before: Vec<ExportStatus>, now: Vec<ExportStatus>) -> Vec<Row> {
        let began = Instant::now();
        let look = |said, exports: Vec<ExportStatus>| Look {
            exports: exports.into_iter().map(|export| (said, export)).collect(),
            silent: Vec::new(),
        };
        rows(
            &look(began, before),
            &look(began + Duration::from_secs(2), now),
        )
    }

    #[test]
    fn figures_are_of_a_second_and_of_the_time_between() {
        let rows = between(
            vec![export("/m", 100)],
            vec![export("/m", 300), export("/new", 5)],
        );
        assert_eq!(rows.len(), 1);
        let whole = rows[0].whole;
        assert!((whole.reads - 100.0).abs() < 1e-9 && (whole.read_bytes - 409_600.0).abs() < 1e-9);
        let detail = whole.detail.unwrap();
        assert_eq!(detail.latency, [Some(2_000); 3]);
        assert_eq!((detail.cache, detail.spins), (Some(0.75), Some(0.5)));
        assert!((detail.polling - 0.1).abs() < 1e-9);
        assert_eq!(rows[0].queues.len(), 1);
    }

    #[test]
    fn an_older_daemon_has_no_detail() {
        let old = |reads| ExportStatus {
            per_queue: Vec::new(),
            ..export("/m", reads)
        };
        let rows = between(vec![old(0)], vec![old(10)]);
        assert_eq!(rows[0].whole.detail, None);
        assert!((rows[0].whole.reads - 5.0).abs() < 1e-9);
    }

    #[test]
    fn the_busiest_comes_first_and_equals_go_by_name() {
        let before = vec![export("/b", 0), export("/a", 0), export("/c", 0)];
        let mut rows = between(
            before,
            vec![export("/b", 1), export("/a", 1), export("/c", 9)],
        );
        let names = |rows: &[Row]| rows.iter().map(|row| row.name.clone()).collect::<Vec<_>>();
        sort(&mut rows, Order::Requests);
        assert_eq!(names(&rows), ["/c", "/a", "/b"]);
        sort(&mut rows, Order::Name);
        assert_eq!(names(&rows), ["/a", "/b", "/c"]);
    }
}
