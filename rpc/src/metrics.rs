//! Metrics for Prometheus: one table, from which come the exposition and the reference page.
//!
//! Nothing is counted here. A scrape takes a picture of what control knows (`Scrape`: numbers of jobs asked at that
//! moment, and the cells that reactors write), and one collector turns the picture into families by the rows of
//! [`METRICS`]. A new metric is a row, and a field of the picture if it has none yet.

use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram as ProtoHistogram, LabelPair, Metric, MetricFamily,
    MetricType,
};
use prometheus::{Encoder as _, Registry, TextEncoder};
use resilver_bdev::device::Link;
use resilver_bdev::job::{ErrorAction, Side};
use resilver_bdev::stats::{BUCKETS, Histogram, bucket_bound};
use resilver_bdev::{IoKind, IoStats, JobInfo, JobStatus};
use resilver_reactor::ReactorStats;
use resilver_vhost::stats::VhostStats;

/// Buckets of ours that make one of Prometheus's: those of an octave.
const BUCKETS_MERGED: usize = 4;

/// What is known at the moment of a scrape.
#[derive(Debug, Default)]
pub(crate) struct Scrape {
    /// Jobs by name.
    pub(crate) jobs: Vec<(String, JobInfo)>,
    /// Bdevs by name.
    pub(crate) bdevs: Vec<(String, Arc<IoStats>)>,
    /// Bdevs over other processes, by name.
    pub(crate) links: Vec<(String, Link)>,
    /// Controllers by name.
    pub(crate) controllers: Vec<(String, Arc<VhostStats>)>,
    /// Reactors by core.
    pub(crate) reactors: Vec<(usize, Arc<ReactorStats>)>,
}

/// What kind of metric it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, but for a restart.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// Prometheus's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One series at the moment of a scrape.
struct Sample<'a> {
    labels: Vec<String>,
    value: SampleValue<'a>,
}

enum SampleValue<'a> {
    Number(f64),
    Latencies(&'a Histogram),
}

/// A row of the table.
pub struct MetricRow {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
    samples: for<'a> fn(&'a Scrape) -> Vec<Sample<'a>>,
}

/// A value as Prometheus has them. Above 2^53 a count loses its last digits.
#[allow(clippy::cast_precision_loss)]
fn number(value: u64) -> f64 {
    value as f64
}

/// One sample for each job.
fn per_job<'a>(scrape: &'a Scrape, read: fn(&JobInfo) -> f64) -> Vec<Sample<'a>> {
    let sample = |(job, info): &(String, JobInfo)| Sample {
        labels: vec![job.clone()],
        value: SampleValue::Number(read(info)),
    };
    scrape.jobs.iter().map(sample).collect()
}

/// One sample for each job that has the number.
fn of_some_jobs<'a>(scrape: &'a Scrape, read: fn(&JobInfo) -> Option<f64>) -> Vec<Sample<'a>> {
    let sample = |(job, info): &(String, JobInfo)| {
        Some(Sample { labels: vec![job.clone()], value: SampleValue::Number(read(info)?) })
    };
    scrape.jobs.iter().filter_map(sample).collect()
}

/// One sample for each bdev.
fn per_bdev<'a>(scrape: &'a Scrape, read: fn(&IoStats) -> u64) -> Vec<Sample<'a>> {
    let sample = |(bdev, stats): &(String, Arc<IoStats>)| Sample {
        labels: vec![bdev.clone()],
        value: SampleValue::Number(number(read(stats))),
    };
    scrape.bdevs.iter().map(sample).collect()
}

/// One sample for each bdev over another process.
fn per_link<'a>(scrape: &'a Scrape, read: fn(&Link) -> u64) -> Vec<Sample<'a>> {
    let sample = |(bdev, link): &(String, Link)| Sample {
        labels: vec![bdev.clone()],
        value: SampleValue::Number(number(read(link))),
    };
    scrape.links.iter().map(sample).collect()
}

/// One sample for each controller.
fn per_controller<'a>(scrape: &'a Scrape, read: fn(&VhostStats) -> u64) -> Vec<Sample<'a>> {
    let sample = |(name, stats): &(String, Arc<VhostStats>)| Sample {
        labels: vec![name.clone()],
        value: SampleValue::Number(number(read(stats))),
    };
    scrape.controllers.iter().map(sample).collect()
}

/// One sample for each reactor.
fn per_reactor<'a>(scrape: &'a Scrape, read: fn(&ReactorStats) -> f64) -> Vec<Sample<'a>> {
    let sample = |(core, stats): &(usize, Arc<ReactorStats>)| Sample {
        labels: vec![core.to_string()],
        value: SampleValue::Number(read(stats)),
    };
    scrape.reactors.iter().map(sample).collect()
}

fn mirror_states(scrape: &Scrape) -> Vec<Sample<'_>> {
    let states = |(job, info): &(String, JobInfo)| {
        let (job, now) = (job.clone(), info.status);
        JobStatus::ALL.map(|state| Sample {
            labels: vec![job.clone(), state.name().to_owned()],
            value: SampleValue::Number(if state == now { 1.0 } else { 0.0 }),
        })
    };
    scrape.jobs.iter().flat_map(states).collect()
}

fn mirror_copied(scrape: &Scrape) -> Vec<Sample<'_>> {
    let kinds = |(job, info): &(String, JobInfo)| {
        [("data", info.copied_bytes), ("zero", info.zero_bytes), ("skipped", info.skipped_bytes)]
            .map(|(kind, bytes)| Sample {
                labels: vec![job.clone(), kind.to_owned()],
                value: SampleValue::Number(number(bytes)),
            })
    };
    scrape.jobs.iter().flat_map(kinds).collect()
}

fn mirror_errors(scrape: &Scrape) -> Vec<Sample<'_>> {
    let mut samples = Vec::new();
    for (job, info) in &scrape.jobs {
        for side in [Side::Source, Side::Target] {
            for action in [ErrorAction::Report, ErrorAction::Ignore, ErrorAction::Stop] {
                let count = info.errors.counts[side as usize][action as usize];
                samples.push(Sample {
                    labels: vec![job.clone(), side.name().to_owned(), action.name().to_owned()],
                    value: SampleValue::Number(number(count)),
                });
            }
        }
    }
    samples
}

fn bdev_latencies(scrape: &Scrape) -> Vec<Sample<'_>> {
    let mut samples = Vec::new();
    for (bdev, stats) in &scrape.bdevs {
        for kind in IoKind::ALL {
            samples.push(Sample {
                labels: vec![bdev.clone(), kind.name().to_owned()],
                value: SampleValue::Latencies(&stats.of(kind).latency),
            });
        }
    }
    samples
}

fn bdev_errors(scrape: &Scrape) -> Vec<Sample<'_>> {
    let mut samples = Vec::new();
    for (bdev, stats) in &scrape.bdevs {
        for kind in IoKind::ALL {
            samples.push(Sample {
                labels: vec![bdev.clone(), kind.name().to_owned()],
                value: SampleValue::Number(number(stats.of(kind).errors.get())),
            });
        }
    }
    samples
}

/// Writes the rows of the table.
macro_rules! metrics {
    ($($name:literal, $kind:ident, [$($label:literal),*], $help:literal, $samples:expr;)*) => {
        &[$(MetricRow { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help, samples: $samples }),*]
    };
}

/// All metrics.
pub static METRICS: &[MetricRow] = metrics! {
    "resilver_mirror_state", Gauge, ["job", "state"], "1 for the state that the job is in, 0 for all others.", mirror_states;
    "resilver_mirror_size_bytes", Gauge, ["job"], "Bytes that the job is about.",
        |s| per_job(s, |info| number(info.total_bytes));
    "resilver_mirror_copied_bytes_total", Counter, ["job", "kind"],
        "Bytes copied as data, made zero without copying, and skipped because both sides were zero already.", mirror_copied;
    "resilver_mirror_dirty_bytes", Gauge, ["job"], "Bytes still to be copied.", |s| per_job(s, |info| number(info.dirty_bytes));
    "resilver_mirror_in_flight_bytes", Gauge, ["job"], "Bytes being copied.",
        |s| per_job(s, |info| number(info.in_flight_bytes));
    "resilver_mirror_target_undurable_bytes", Gauge, ["job"], "Bytes written to the target and not known to be durable there.",
        |s| per_job(s, |info| number(info.target_undurable_bytes));
    "resilver_mirror_copy_bytes_per_second", Gauge, ["job"], "Copy rate, smoothed.",
        |s| per_job(s, |info| number(info.copy_bytes_per_second));
    "resilver_mirror_guest_write_bytes_per_second", Gauge, ["job"], "Rate of guest writes, smoothed.",
        |s| per_job(s, |info| number(info.guest_write_bytes_per_second));
    "resilver_mirror_guest_written_bytes_total", Counter, ["job"], "Bytes of guest writes that went to both legs.",
        |s| per_job(s, |info| number(info.mirrored_bytes));
    "resilver_mirror_dropped_writes_total", Counter, ["job"], "Guest writes that an observer did not get (observer_policy drop).",
        |s| per_job(s, |info| number(info.dropped_writes));
    "resilver_mirror_dropped_bytes_total", Counter, ["job"], "Their bytes.", |s| per_job(s, |info| number(info.dropped_bytes));
    "resilver_mirror_errors_total", Counter, ["job", "side", "action"], "I/O errors, by leg and by what was done about them.",
        mirror_errors;
    "resilver_mirror_verify_checked_bytes_total", Counter, ["job"], "Bytes compared on both legs by verification.",
        |s| per_job(s, |info| number(info.verify.checked_ever));
    "resilver_mirror_verify_mismatches_total", Counter, ["job"], "Chunks that verification found to differ.",
        |s| per_job(s, |info| number(info.verify.mismatches_ever));
    "resilver_mirror_eta_seconds", Gauge, ["job"], "Time until the job is ready, where it can be told.",
        |s| of_some_jobs(s, |info| Some(info.eta?.0.as_secs_f64()));
    "resilver_mirror_guest_p99_seconds", Gauge, ["job"], "99th percentile of the guest's latency in the last window, while it is at work.",
        |s| of_some_jobs(s, |info| Some(info.guest_p99?.as_secs_f64()));
    "resilver_mirror_throttle_bytes_per_second", Gauge, ["job"],
        "What a latency ceiling leaves the copier beside the guest.", |s| of_some_jobs(s, |info| Some(number(info.throttle?)));
    "resilver_mirror_converging", Gauge, ["job"], "1 if the dirty bytes shrink faster than the guest makes them.",
        |s| per_job(s, |info| f64::from(u8::from(info.converging)));
    "resilver_mirror_actively_synced", Gauge, ["job"], "1 if both legs are equal and every write goes to both.",
        |s| per_job(s, |info| f64::from(u8::from(info.actively_synced)));
    "resilver_bdev_read_ops_total", Counter, ["bdev"], "Reads that ended, failed ones included.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Read).ops.get());
    "resilver_bdev_write_ops_total", Counter, ["bdev"], "Writes that ended, failed ones included.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Write).ops.get());
    "resilver_bdev_flush_ops_total", Counter, ["bdev"], "Flushes that ended, failed ones included.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Flush).ops.get());
    "resilver_bdev_unmap_ops_total", Counter, ["bdev"], "Unmaps that ended, failed ones included.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Unmap).ops.get());
    "resilver_bdev_write_zeroes_ops_total", Counter, ["bdev"], "Write-zeroes that ended, failed ones included.",
        |s| per_bdev(s, |stats| stats.of(IoKind::WriteZeroes).ops.get());
    "resilver_bdev_read_bytes_total", Counter, ["bdev"], "Bytes read.", |s| per_bdev(s, |stats| stats.of(IoKind::Read).bytes.get());
    "resilver_bdev_written_bytes_total", Counter, ["bdev"], "Bytes written.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Write).bytes.get());
    "resilver_bdev_unmapped_bytes_total", Counter, ["bdev"], "Bytes unmapped.",
        |s| per_bdev(s, |stats| stats.of(IoKind::Unmap).bytes.get());
    "resilver_bdev_io_errors_total", Counter, ["bdev", "op"], "Requests that failed.", bdev_errors;
    "resilver_bdev_io_latency_seconds", Histogram, ["bdev", "op"], "Time from submission to completion.", bdev_latencies;
    "resilver_bdev_connected", Gauge, ["bdev"], "1 if the other process that is the bdev's medium is there, 0 if not.",
        |s| per_link(s, |link| u64::from(link.connected));
    "resilver_bdev_reconnects_total", Counter, ["bdev"], "Times that it was there again.", |s| per_link(s, |link| link.reconnects);
    "resilver_vhost_requests_total", Counter, ["ctrlr"], "Requests of guests that were answered.",
        |s| per_controller(s, |stats| stats.requests.get());
    "resilver_vhost_kicks_total", Counter, ["ctrlr"], "Notifications of guests that ended a sleep.",
        |s| per_controller(s, |stats| stats.kicks.get());
    "resilver_vhost_interrupts_total", Counter, ["ctrlr"], "Interrupts sent to guests.",
        |s| per_controller(s, |stats| stats.interrupts.get());
    "resilver_vhost_resubmitted_total", Counter, ["ctrlr"], "Requests executed again after a reconnect, because the in-flight region had them.",
        |s| per_controller(s, |stats| stats.resubmitted.get());
    "resilver_vhost_fetched_pages_total", Counter, ["ctrlr"], "Pages of guest memory that were waited for in post-copy migrations.",
        |s| per_controller(s, |stats| stats.fetched_pages.get());
    "resilver_vhost_sessions_total", Counter, ["ctrlr"], "Front ends that have connected.",
        |s| per_controller(s, |stats| stats.sessions.get());
    "resilver_reactor_busy_seconds_total", Counter, ["core"], "Time spent in turns that did something.",
        |s| per_reactor(s, |stats| stats.busy_idle_seconds().0);
    "resilver_reactor_idle_seconds_total", Counter, ["core"], "Time spent in turns that found nothing, and asleep.",
        |s| per_reactor(s, |stats| stats.busy_idle_seconds().1);
    "resilver_reactor_sleeps_total", Counter, ["core"], "Times the reactor went to sleep.",
        |s| per_reactor(s, |stats| number(stats.sleeps.get()));
};

/// The one collector.
struct Picture {
    scrape: Scrape,
    descriptions: Vec<Desc>,
}

impl Collector for Picture {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        METRICS.iter().filter_map(|row| family(row, &self.scrape)).collect()
    }
}

/// A row's family; none if there is nothing to say.
fn family(row: &MetricRow, scrape: &Scrape) -> Option<MetricFamily> {
    let metrics: Vec<Metric> =
        (row.samples)(scrape).into_iter().map(|sample| metric(row, sample)).collect();
    if metrics.is_empty() {
        return None;
    }
    let mut family = MetricFamily::default();
    family.set_name(row.name.to_owned());
    family.set_help(row.help.to_owned());
    family.set_field_type(match row.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge => MetricType::GAUGE,
        Kind::Histogram => MetricType::HISTOGRAM,
    });
    family.set_metric(metrics);
    Some(family)
}

fn metric(row: &MetricRow, sample: Sample<'_>) -> Metric {
    let labels = row.labels.iter().zip(sample.labels).map(|(name, value)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value(value);
        label
    });
    let mut metric = Metric::from_label(labels.collect());
    match (row.kind, sample.value) {
        (Kind::Gauge, SampleValue::Number(value)) => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        (Kind::Counter | Kind::Histogram, SampleValue::Number(value)) => {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        }
        (_, SampleValue::Latencies(latencies)) => metric.set_histogram(histogram(latencies)),
    }
    metric
}

/// Our buckets as Prometheus's: cumulative, one an octave.
fn histogram(latencies: &Histogram) -> ProtoHistogram {
    let counts = latencies.counts();
    let mut cumulative = 0;
    let mut buckets = Vec::with_capacity(BUCKETS / BUCKETS_MERGED + 1);
    for (index, count) in counts.iter().enumerate() {
        cumulative += count;
        // The last has no bound: it is Prometheus's +Inf, which the encoder adds.
        if index % BUCKETS_MERGED == 0 && index + 1 < BUCKETS {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bucket_bound(index).as_secs_f64());
            bucket.set_cumulative_count(cumulative);
            buckets.push(bucket);
        }
    }
    let mut histogram = ProtoHistogram::default();
    histogram.set_bucket(buckets);
    histogram.set_sample_count(cumulative);
    histogram.set_sample_sum(latencies.sum().as_secs_f64());
    histogram
}

/// The exposition of a picture, text format 0.0.4.
pub(crate) fn exposition(scrape: Scrape) -> Result<String, prometheus::Error> {
    let describe = |row: &MetricRow| {
        let labels = row.labels.iter().map(|label| (*label).to_owned()).collect();
        Desc::new(
            row.name.to_owned(),
            row.help.to_owned(),
            labels,
            std::collections::HashMap::new(),
        )
    };
    let descriptions = METRICS.iter().map(describe).collect::<Result<_, _>>()?;
    let registry = Registry::new();
    registry.register(Box::new(Picture { scrape, descriptions }))?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use resilver_reactor::Nanos;

    #[test]
    fn counters_end_in_total_and_nothing_else_does() {
        for row in METRICS {
            assert_eq!(row.name.ends_with("_total"), row.kind == Kind::Counter, "{}", row.name);
            assert!(row.name.starts_with("resilver_") && row.help.ends_with('.'), "{}", row.name);
        }
    }

    #[test]
    fn a_histogram_counts_every_latency_once_and_its_buckets_grow() {
        let latencies = Histogram::default();
        for shift in 0..50 {
            latencies.record(Nanos(1 << shift));
        }
        let histogram = histogram(&latencies);
        assert_eq!(histogram.get_sample_count(), 50);
        let buckets = histogram.get_bucket();
        for pair in buckets.windows(2) {
            assert!(pair[0].upper_bound() < pair[1].upper_bound());
            assert!(pair[0].cumulative_count() <= pair[1].cumulative_count());
        }
        // 1 ns to 64 ns are below the first bound.
        assert_eq!(buckets[0].cumulative_count(), 7);
    }

    #[test]
    fn the_exposition_carries_every_bdevs_counters() {
        let stats = Arc::new(IoStats::default());
        stats.record(IoKind::Write, 4096, Nanos::from_micros(10), true);
        let scrape = Scrape { bdevs: vec![("disk".into(), stats)], ..Scrape::default() };
        let text = exposition(scrape).unwrap();
        assert!(text.contains("resilver_bdev_written_bytes_total{bdev=\"disk\"} 4096"), "{text}");
        assert!(
            text.contains("resilver_bdev_io_latency_seconds_count{bdev=\"disk\",op=\"write\"} 1")
        );
        assert!(text.contains("# TYPE resilver_bdev_io_latency_seconds histogram"));
        assert!(!text.contains("resilver_mirror"));
    }
}
