//! What is counted, as metrics in Prometheus's text format 0.0.4, which the crate `prometheus` writes. It only renders; a name that
//! is here is a promise to whoever has a dashboard.

#![expect(
    clippy::cast_precision_loss,
    reason = "the format knows floating point only"
)]

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{Encoder, TextEncoder};

use crate::control::counters::{QueueCounters, Times};
use crate::control::protocol::ExportStatus;

/// Upper limits of the classes of latencies, as powers of two of nanoseconds: 1 µs to 17 s.
const LIMITS: std::ops::RangeInclusive<u32> = 10..=34;

/// The page of all exports.
pub(super) fn page(exports: &[ExportStatus]) -> Result<String, String> {
    // The encoder refuses a family without a metric: with no exports, or no cache, there is none.
    let families: Vec<MetricFamily> = families(exports)
        .into_iter()
        .filter(|family| !family.get_metric().is_empty())
        .collect();
    let mut page = Vec::new();
    let encoded = TextEncoder::new().encode(&families, &mut page);
    encoded.map_err(|error| error.to_string())?;
    String::from_utf8(page).map_err(|error| error.to_string())
}

fn families(exports: &[ExportStatus]) -> Vec<MetricFamily> {
    let mut all = vec![
        build(),
        exports_info(exports),
        requests(exports),
        durations(exports),
    ];
    all.extend(OF_QUEUES.iter().map(|figure| figure.family(exports)));
    all.extend(cache(exports));
    all
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn label(name: &str, value: impl Into<String>) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.into());
    pair
}

/// What every metric of an export has.
fn labels(export: &ExportStatus) -> Vec<LabelPair> {
    vec![
        label("export", &*export.id),
        label("mountpoint", export.mountpoint.0.to_string_lossy()),
    ]
}

fn labels_and(export: &ExportStatus, name: &str, value: impl Into<String>) -> Vec<LabelPair> {
    let mut all = labels(export);
    all.push(label(name, value));
    all
}

fn counter(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

fn build() -> MetricFamily {
    let labels = vec![label("version", env!("CARGO_PKG_VERSION"))];
    let help = "The version of diskfuse that says this.";
    family(
        "diskfuse_build_info",
        help,
        MetricType::GAUGE,
        vec![gauge(labels, 1.0)],
    )
}

fn exports_info(exports: &[ExportStatus]) -> MetricFamily {
    let metrics = exports.iter().map(|export| {
        let mut all = labels(export);
        let image = export.image.as_ref();
        let image = image.map_or_else(String::new, |image| image.0.to_string_lossy().into_owned());
        all.push(label("image", image));
        all.push(label("format", &*export.format));
        all.push(label("transport", &*export.transport));
        all.push(label("writable", export.writable.to_string()));
        gauge(all, 1.0)
    });
    let help = "What is shown, and how.";
    family(
        "diskfuse_export_info",
        help,
        MetricType::GAUGE,
        metrics.collect(),
    )
}

fn requests(exports: &[ExportStatus]) -> MetricFamily {
    let mut metrics = Vec::new();
    for export in exports {
        for (index, queue) in export.per_queue.iter().enumerate() {
            for (kind, times) in &queue.requests {
                let mut all = labels_and(export, "queue", index.to_string());
                all.push(label("operation", &**kind));
                metrics.push(counter(all, times.count() as f64));
            }
        }
    }
    let help = "Requests answered, whatever the answer.";
    family(
        "diskfuse_requests_total",
        help,
        MetricType::COUNTER,
        metrics,
    )
}

fn durations(exports: &[ExportStatus]) -> MetricFamily {
    let mut metrics = Vec::new();
    for export in exports {
        let sum = QueueCounters::sum(&export.per_queue);
        for (kind, times) in &sum.requests {
            let mut metric = Metric::from_label(labels_and(export, "operation", &**kind));
            metric.set_histogram(histogram(times));
            metrics.push(metric);
        }
    }
    let help = "Time from fetching a request from the kernel to handing over the answer.";
    family(
        "diskfuse_request_duration_seconds",
        help,
        MetricType::HISTOGRAM,
        metrics,
    )
}

fn histogram(times: &Times) -> Histogram {
    let below = |limit: u64| -> u64 {
        let classes = times.below_ns.iter().take_while(|&&(end, _)| end <= limit);
        classes.map(|&(_, count)| count).sum()
    };
    let buckets = LIMITS.map(|power| {
        let limit = 1u64 << power;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(seconds(limit));
        bucket.set_cumulative_count(below(limit));
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(times.count());
    histogram.set_sample_sum(seconds(times.sum_ns));
    histogram
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// A figure that each queue has.
struct OfQueues {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    of: fn(&QueueCounters) -> f64,
}

const fn total(name: &'static str, help: &'static str, of: fn(&QueueCounters) -> f64) -> OfQueues {
    let kind = MetricType::COUNTER;
    OfQueues {
        name,
        help,
        kind,
        of,
    }
}

const OF_QUEUES: &[OfQueues] = &[
    OfQueues {
        name: "diskfuse_requests_in_flight",
        help: "Requests fetched and not yet answered.",
        kind: MetricType::GAUGE,
        of: |queue| queue.in_flight as f64,
    },
    total("diskfuse_read_bytes_total", "Bytes read.", |queue| {
        queue.read_bytes as f64
    }),
    total("diskfuse_written_bytes_total", "Bytes written.", |queue| {
        queue.written_bytes as f64
    }),
    total(
        "diskfuse_request_errors_total",
        "Requests answered with an error of the disk.",
        |queue| queue.errors as f64,
    ),
    total(
        "diskfuse_poll_seconds_total",
        "Time that the queue's thread looked for news without sleeping.",
        |queue| seconds(queue.spun_ns),
    ),
    total(
        "diskfuse_sleep_seconds_total",
        "Time that the queue's thread slept.",
        |queue| seconds(queue.slept_ns),
    ),
    total(
        "diskfuse_kept_awake_seconds_total",
        "The part of the sleep during which another CPU was kept awake.",
        |queue| seconds(queue.kept_awake_ns),
    ),
    total(
        "diskfuse_poll_hits_total",
        "Times that polling ended with news.",
        |queue| queue.spin_hits as f64,
    ),
    total(
        "diskfuse_poll_misses_total",
        "Times that polling ended with a sleep.",
        |queue| queue.spin_misses as f64,
    ),
];

impl OfQueues {
    fn family(&self, exports: &[ExportStatus]) -> MetricFamily {
        let mut metrics = Vec::new();
        for export in exports {
            for (index, queue) in export.per_queue.iter().enumerate() {
                let labels = labels_and(export, "queue", index.to_string());
                let value = (self.of)(queue);
                metrics.push(match self.kind {
                    MetricType::GAUGE => gauge(labels, value),
                    _ => counter(labels, value),
                });
            }
        }
        family(self.name, self.help, self.kind, metrics)
    }
}

fn cache(exports: &[ExportStatus]) -> [MetricFamily; 2] {
    let of = |value: fn(crate::control::counters::CacheCounters) -> u64| -> Vec<Metric> {
        let caches = exports
            .iter()
            .filter_map(|export| Some((export, export.metadata_cache?)));
        caches
            .map(|(export, cache)| counter(labels(export), value(cache) as f64))
            .collect()
    };
    let total = |name, help, metrics| family(name, help, MetricType::COUNTER, metrics);
    [
        total(
            "diskfuse_metadata_cache_hits_total",
            "Lookups that found an image's metadata in memory.",
            of(|cache| cache.hits),
        ),
        total(
            "diskfuse_metadata_cache_misses_total",
            "Lookups that waited for an image's metadata to be read.",
            of(|cache| cache.misses),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_become_cumulative_buckets() {
        let times = Times {
            sum_ns: 3_000_000_000,
            below_ns: vec![(1024, 5), (1152, 1), (2048, 2), (u64::MAX, 1)],
        };
        let histogram = histogram(&times);
        let counts: Vec<u64> = histogram
            .get_bucket()
            .iter()
            .map(Bucket::cumulative_count)
            .collect();
        assert_eq!((counts[0], counts[1], counts[24]), (5, 8, 8));
        assert_eq!(histogram.get_sample_count(), 9);
        assert!((histogram.get_sample_sum() - 3.0).abs() < 1e-9);
    }

    #[test]
    fn without_exports_there_is_still_a_page() {
        let page = page(&[]).unwrap();
        assert!(
            page.contains("# TYPE diskfuse_build_info gauge\n"),
            "{page}"
        );
    }
}
