//! What the demo shows: a progress bar, and in the end what an operator would want to know.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

use super::{Checked, Story};
use crate::load::{LoadReport, Phase};

/// The progress of the mirror, on standard error where that is a terminal.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn new() -> Self {
        let style = ProgressStyle::with_template(
            "  {bar:40} {percent:>3} %  {bytes} of {total_bytes}  {binary_bytes_per_sec}",
        );
        let bar = ProgressBar::new(0);
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Shows how far a job is.
    pub(super) fn show(&self, job: &Value) {
        let total = bytes(job, "total_bytes");
        self.0.set_length(total);
        self.0.set_position(total.saturating_sub(bytes(job, "dirty_bytes")));
    }

    pub(super) fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn bytes(job: &Value, field: &str) -> u64 {
    job[field].as_u64().unwrap_or(0)
}

/// Latencies of one kind of request, microseconds.
#[derive(Debug, Serialize)]
struct Latency {
    requests: u64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

impl Latency {
    #[allow(clippy::cast_precision_loss)] // display values
    fn new(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self {
            requests: histogram.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: histogram.max() as f64 / 1000.0,
        }
    }
}

/// What the guest felt in one phase.
#[derive(Debug, Serialize)]
struct PhaseSummary {
    phase: &'static str,
    seconds: f64,
    requests_per_second: f64,
    reads: Latency,
    writes: Latency,
    longest_gap_us: f64,
}

/// All that the demo found out.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    phases: Vec<PhaseSummary>,
    /// From the call to the job's end, as control saw it.
    switch_over_seconds: f64,
    /// The slowest request that ended while that went on.
    longest_stall_us: f64,
    copy_seconds: f64,
    copied_bytes: u64,
    zero_bytes: u64,
    skipped_bytes: u64,
    copy_bytes_per_second: f64,
    writes_dirty: u64,
    writes_copying: u64,
    writes_clean: u64,
    size: u64,
    source_allocated: u64,
    target_allocated: u64,
    blocks_checked: u64,
    blocks_written: u64,
    blocks_written_since_switch: u64,
    /// Event numbers at which the source's content is the state of the disk.
    possible_instants: u64,
}

impl Summary {
    #[allow(clippy::cast_precision_loss)] // display values
    pub(super) fn new(
        report: &LoadReport,
        story: &Story,
        checked: &Checked,
        source: &Path,
        target: &Path,
    ) -> io::Result<Self> {
        let phases: Vec<_> = Phase::ALL
            .iter()
            .zip(&report.phases)
            .map(|(phase, seen)| {
                let (reads, writes) = (Latency::new(&seen.reads), Latency::new(&seen.writes));
                let seconds = story.lengths[*phase as usize].as_secs_f64();
                PhaseSummary {
                    phase: phase.name(),
                    seconds,
                    requests_per_second: (reads.requests + writes.requests) as f64 / seconds,
                    reads,
                    writes,
                    longest_gap_us: seen.longest_gap.as_nanos() as f64 / 1000.0,
                }
            })
            .collect();
        let switching = &phases[Phase::Switching as usize];
        let copy_seconds = story.lengths[Phase::Copying as usize].as_secs_f64();
        let copied_bytes = bytes(&story.ready, "copied_bytes");
        let target_metadata = std::fs::metadata(target)?;
        Ok(Self {
            switch_over_seconds: switching.seconds,
            longest_stall_us: switching.reads.max_us.max(switching.writes.max_us),
            copy_seconds,
            copied_bytes,
            zero_bytes: bytes(&story.ready, "zero_bytes"),
            skipped_bytes: bytes(&story.ready, "skipped_bytes"),
            copy_bytes_per_second: copied_bytes as f64 / copy_seconds,
            writes_dirty: bytes(&story.concluded, "writes_dirty"),
            writes_copying: bytes(&story.concluded, "writes_copying"),
            writes_clean: bytes(&story.concluded, "writes_clean"),
            size: target_metadata.len(),
            source_allocated: std::fs::metadata(source)?.blocks() * 512,
            target_allocated: target_metadata.blocks() * 512,
            blocks_checked: checked.blocks,
            blocks_written: checked.written,
            blocks_written_since_switch: checked.written_since,
            possible_instants: checked.cut_width,
            phases,
        })
    }
}

/// Microseconds as a person reads them.
struct Micros(f64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            us if us < 1000.0 => format!("{us:.0} µs"),
            us if us < 1_000_000.0 => format!("{:.1} ms", us / 1000.0),
            us => format!("{:.2} s", us / 1_000_000.0),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nguest latency   reads p50       p99       max   writes p50       p99       max   requests/s"
        )?;
        for PhaseSummary { phase, reads, writes, requests_per_second, .. } in &self.phases {
            write!(f, "  {phase:<11}")?;
            for (latency, first) in [(reads, 11), (writes, 13)] {
                write!(f, "{:>first$}", Micros(latency.p50_us))?;
                write!(f, "{:>10}{:>10}", Micros(latency.p99_us), Micros(latency.max_us))?;
            }
            writeln!(f, "{requests_per_second:>13.0}")?;
        }
        let switching = &self.phases[Phase::Switching as usize];
        writeln!(
            f,
            "\nswitch-over   {:.1?} from the call to its end; the slowest request took {}, the longest pause was {}",
            Duration::from_secs_f64(self.switch_over_seconds),
            Micros(self.longest_stall_us),
            Micros(switching.longest_gap_us),
        )?;
        writeln!(
            f,
            "copy          {} as data, {} as zeroes, {} skipped in {:.2?}: {}/s",
            ByteSize(self.copied_bytes),
            ByteSize(self.zero_bytes),
            ByteSize(self.skipped_bytes),
            Duration::from_secs_f64(self.copy_seconds),
            rate(self.copy_bytes_per_second),
        )?;
        writeln!(
            f,
            "guest writes  {} to chunks not yet copied, {} that met a copy, {} mirrored",
            self.writes_dirty, self.writes_copying, self.writes_clean
        )?;
        writeln!(
            f,
            "allocated     source {}, target {}, of {}",
            ByteSize(self.source_allocated),
            ByteSize(self.target_allocated),
            ByteSize(self.size)
        )?;
        write!(
            f,
            "checked       {} blocks, {} of them written: the target is the disk as the guest left it, the source as it was at \
             the switch-over ({} blocks were written since)",
            self.blocks_checked, self.blocks_written, self.blocks_written_since_switch
        )
    }
}

/// Bytes a second, whole.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a display value, not negative
fn rate(bytes_per_second: f64) -> ByteSize {
    ByteSize(bytes_per_second as u64)
}
