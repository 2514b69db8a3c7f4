//! What a benchmark found: cells, the targets measured in each, and how they are told.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::machine::Disturbance;
use super::{Job, Run};

/// The percentiles that are told, and their names.
pub(crate) const PERCENTILES: [(f64, &str); 5] =
    [(50.0, "p50"), (90.0, "p90"), (99.0, "p99"), (99.9, "p99.9"), (99.99, "p99.99")];

/// Median, least and most of something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of some values, at least one.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }

    fn to_json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// How much of a chance an [`interval`] has of having the median in it, at least.
const CONFIDENCE: f64 = 0.95;

/// Where the median of what such values are drawn from lies: between two of them, by order alone (a value falls on either side of
/// the median like a coin), so nothing is assumed of how they are distributed. None for fewer than six, whose ends are not
/// far enough apart.
pub(crate) fn interval(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    // The chance that of so many values the median has only so few on its one side; `cut` of them are left out on each.
    let count = values.len();
    let mut chance = 0.5_f64.powi(i32::try_from(count).ok()?);
    let (mut tail, mut cut) = (0.0, 0);
    while tail + chance <= (1.0 - CONFIDENCE) / 2.0 {
        tail += chance;
        cut += 1;
        chance *= ratio_of(count + 1 - cut, cut);
    }
    let low = *values.get(cut.checked_sub(1)?)?;
    Some((low, *values.get(count - cut)?))
}

#[allow(clippy::cast_precision_loss)]
fn ratio_of(one: usize, other: usize) -> f64 {
    one as f64 / other as f64
}

/// One back end in one cell.
pub(crate) struct Target {
    pub(crate) name: String,
    runs: Vec<Run>,
}

impl Target {
    pub(crate) fn new(name: String) -> Self {
        Self { name, runs: Vec::new() }
    }

    pub(crate) fn add(&mut self, run: Run) {
        self.runs.push(run);
    }

    /// Latencies of all runs, nanoseconds; none without a run.
    pub(crate) fn latency(&self) -> Option<Histogram<u64>> {
        let (first, rest) = self.runs.split_first()?;
        let mut all = first.latency.clone();
        for run in rest {
            // The bounds are those of the first: nothing can be outside.
            let _ = all.add(&run.latency);
        }
        Some(all)
    }

    fn iops(&self) -> Option<Spread> {
        Spread::of(self.runs.iter().map(Run::iops))
    }

    #[allow(clippy::cast_precision_loss)]
    fn bytes_per_second(&self) -> Option<f64> {
        let rates = self.runs.iter().map(|run| run.bytes as f64 / run.time.as_secs_f64());
        Spread::of(rates).map(|it| it.median)
    }

    /// What all its runs had to share.
    fn disturbance(&self) -> Disturbance {
        self.runs.iter().map(|run| run.disturbance).fold(Disturbance::default(), Disturbance::plus)
    }

    /// Against another, run by run of the same round.
    fn ratios(&self, base: &Self) -> impl Iterator<Item = f64> {
        self.runs.iter().zip(&base.runs).map(|(ours, theirs)| ours.iops() / theirs.iops())
    }

    /// Whether it was a file whose page cache was bypassed, or could not be.
    fn direct(&self) -> Option<bool> {
        self.runs.first()?.direct
    }

    fn to_json(&self, base: &Self) -> Value {
        let latency = self.latency();
        let at = |percentile: f64| {
            latency.as_ref().map_or(Value::Null, |it| it.value_at_percentile(percentile).into())
        };
        let mut percentiles: serde_json::Map<String, Value> =
            PERCENTILES.iter().map(|(value, name)| ((*name).to_owned(), at(*value))).collect();
        percentiles
            .insert("max".to_owned(), latency.as_ref().map_or(Value::Null, |it| it.max().into()));
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(|run| {
                json!({
                    "iops": run.iops(), "requests": run.requests, "seconds": run.time.as_secs_f64(),
                    "p50_ns": run.latency.value_at_percentile(50.0), "p99_ns": run.latency.value_at_percentile(99.0),
                    "machine": run.disturbance.to_json(),
                })
            })
            .collect();
        let mut ratio = Spread::of(self.ratios(base)).map_or(Value::Null, Spread::to_json);
        ratio["interval_95"] = json!(interval(self.ratios(base)));
        json!({
            "name": self.name,
            "iops": self.iops().map(Spread::to_json),
            "bytes_per_second": self.bytes_per_second(),
            "latency_ns": percentiles,
            "iops_to_first": ratio,
            "direct": self.direct(),
            "runs": runs,
        })
    }

    /// What a row of a table shows, by [`HEADS`].
    fn row(&self, base: &Self) -> Vec<String> {
        let latency = self.latency();
        let iops = self.iops();
        let spread = iops.map(|it| (it.max - it.min) / it.median * 100.0);
        let compared = !std::ptr::eq(self, base);
        let ratio = Spread::of(self.ratios(base)).filter(|_| compared);
        let interval = interval(self.ratios(base)).filter(|_| compared);
        let buffered = if self.direct() == Some(false) { " (buffered)" } else { "" };
        let mut row = vec![
            format!("{}{buffered}", self.name),
            iops.map_or_else(String::new, |it| thousands(it.median)),
            spread.map_or_else(String::new, |it| format!("{it:.0}%")),
            self.bytes_per_second()
                .map_or_else(String::new, |it| format!("{:.0}", it / 1_048_576.0)),
        ];
        for (percentile, _) in PERCENTILES {
            row.push(
                latency
                    .as_ref()
                    .map_or_else(String::new, |it| micros(it.value_at_percentile(percentile))),
            );
        }
        row.push(latency.as_ref().map_or_else(String::new, |it| micros(it.max())));
        row.push(format!("{:.1}%", self.disturbance().taken() * 100.0));
        row.push(ratio.map_or_else(
            || "1".to_owned(),
            |it| format!("{:.2} ({:.2}-{:.2})", it.median, it.min, it.max),
        ));
        row.push(interval.map_or_else(String::new, |(low, high)| format!("{low:.2}-{high:.2}")));
        row
    }
}

/// Heads of a table of targets.
const HEADS: [&str; 13] = [
    "disk",
    "IOPS",
    "spread",
    "MiB/s",
    "p50 us",
    "p90 us",
    "p99 us",
    "p99.9 us",
    "p99.99 us",
    "max us",
    "taken",
    "to the first",
    "its interval",
];

/// One combination, on every back end.
pub(crate) struct Cell {
    pub(crate) job: Job,
    pub(crate) targets: Vec<Target>,
}

impl Cell {
    pub(crate) fn new(job: Job, targets: Vec<Target>) -> Self {
        Self { job, targets }
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let Some(base) = self.targets.first() else { return Vec::new() };
        self.targets.iter().map(|target| target.row(base)).collect()
    }

    /// As a terminal shows it.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut rows = vec![HEADS.map(str::to_owned).to_vec()];
        rows.extend(self.rows());
        let widths: Vec<usize> = (0..HEADS.len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let mut lines = vec![heading(&self.job)];
        for row in &rows {
            let mut line = String::from(" ");
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                // Names to the left, numbers to the right.
                let _ = if column == 0 {
                    write!(line, " {cell:width$}")
                } else {
                    write!(line, "  {cell:>width$}")
                };
            }
            lines.push(line);
        }
        lines
    }
}

/// A whole benchmark.
pub(crate) struct Report {
    pub(crate) cells: Vec<Cell>,
    /// A cache line to the other core and back, before each round, nanoseconds.
    round_trip: Option<Spread>,
}

impl Report {
    pub(crate) fn new(cells: Vec<Cell>, round_trips: Vec<f64>) -> Self {
        Self { cells, round_trip: Spread::of(round_trips) }
    }

    fn disturbance(&self) -> Disturbance {
        let targets = self.cells.iter().flat_map(|cell| &cell.targets);
        targets.map(Target::disturbance).fold(Disturbance::default(), Disturbance::plus)
    }

    pub(crate) fn to_json(&self) -> Value {
        let cells: Vec<Value> = self
            .cells
            .iter()
            .map(|cell| {
                let job = &cell.job;
                let base = cell.targets.first();
                let targets: Vec<Value> =
                    cell.targets.iter().filter_map(|target| Some(target.to_json(base?))).collect();
                json!({
                    "rw": job.pattern.name(), "read_percent": job.read_percent, "bs": job.block,
                    "iodepth": job.depth, "queues": job.queues, "interrupts": job.interrupts,
                    "targets": targets,
                })
            })
            .collect();
        json!({
            "kernel": kernel(), "cpu": cpu(), "cpus": cpus(),
            "round_trip_ns": self.round_trip.map(Spread::to_json),
            "machine": self.disturbance().to_json(), "cells": cells,
        })
    }

    /// What it was measured on, and how busy that was.
    pub(crate) fn machine(&self) -> Vec<String> {
        let mut lines = vec![
            format!("Linux {}; CPUs: {} of {}.", kernel(), cpus(), cpu()),
            self.disturbance().verdict(),
        ];
        if let Some(it) = self.round_trip {
            lines.push(format!(
                "A cache line to the other core and back took {:.0} ns ({:.0} to {:.0}).",
                it.median, it.min, it.max
            ));
        }
        lines
    }

    /// One table of all cells: a row for each server in each.
    pub(crate) fn to_markdown(&self) -> String {
        let mut text = self.machine().join("\n");
        let _ = writeln!(text, "\n\n| cell | {} |", HEADS.join(" | "));
        let _ = writeln!(text, "| --- | --- |{}", " ---: |".repeat(HEADS.len() - 1));
        for cell in &self.cells {
            for (index, row) in cell.rows().iter().enumerate() {
                // The name of a cell stands once.
                let name = if index == 0 { heading(&cell.job) } else { String::new() };
                let _ = writeln!(text, "| {name} | {} |", row.join(" | "));
            }
        }
        text
    }
}

/// What a cell is called.
pub(crate) fn heading(job: &Job) -> String {
    let mix = match job.read_percent {
        0 | 100 => String::new(),
        percent => format!(" {percent}% reads"),
    };
    let waits = if job.interrupts { ", sleeping for interrupts" } else { "" };
    let queues =
        if job.queues == 1 { "1 queue".to_owned() } else { format!("{} queues", job.queues) };
    format!(
        "{}{mix}, {} bytes, depth {}, {queues}{waits}",
        job.pattern.name(),
        job.block,
        job.depth
    )
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// What the processor calls itself.
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// CPUs that the machine has, whatever core this thread is pinned to.
fn cpus() -> usize {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines().filter(|line| line.starts_with("processor")).count().max(1)
}

/// Nanoseconds as microseconds, with as many digits as mean something.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn micros(nanoseconds: u64) -> String {
    let micros = nanoseconds as f64 / 1000.0;
    if micros < 10.0 {
        format!("{micros:.2}")
    } else if micros < 100.0 {
        format!("{micros:.1}")
    } else {
        format!("{micros:.0}")
    }
}

/// A large number so that it can be read.
fn thousands(value: f64) -> String {
    if value >= 1e6 {
        format!("{:.2} M", value / 1e6)
    } else if value >= 1e4 {
        format!("{:.1} k", value / 1e3)
    } else {
        format!("{value:.0}")
    }
}
