//! A mirror's whole life under load, as one timeline: before, copying, in sync, switching over, after.
//!
//! The load is the benchmark's own client on a thread of its own; this thread is the operator, over JSON-RPC. Time is cut
//! into slices of [`SLICE`]; each keeps how many requests ended and the longest latency, each phase its distribution.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use hdrhistogram::Histogram;
use resilver_rpc::Client as Rpc;
use resilver_vhost::front_end::ConnectionConfig;
use serde_json::{Value, json};

use super::client::Client;
use super::machine::{Disturbance, Server};
use super::report::{PERCENTILES, micros};
use super::socket::Socket;
use super::{Job, report};
use crate::interrupt::Interrupt;
use crate::load::Phase;
use crate::output;

/// The width of a slice.
pub(crate) const SLICE: Duration = Duration::from_millis(10);
/// Slices that are made room for beforehand: a timeline of half an hour.
const SLICES: usize = 180_000;
/// How long one look at the job's events lasts. Whoever asks again and again instead takes a core from those that are measured.
const LOOK_MS: u64 = 250;
/// How often it is looked whether the load goes on.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One slice.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Slice {
    pub(crate) requests: u32,
    /// Nanoseconds.
    pub(crate) longest: u64,
}

/// What the two threads share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    phase: AtomicU8,
    stop: AtomicBool,
}

impl Shared {
    pub(crate) fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What the client keeps.
pub(crate) struct Recorder {
    shared: Arc<Shared>,
    begun: Instant,
    pub(crate) slices: Vec<Slice>,
    /// By [`Phase::ALL`].
    pub(crate) phases: Vec<Histogram<u64>>,
}

impl Recorder {
    pub(crate) fn new(shared: &Arc<Shared>, empty: &Histogram<u64>) -> Self {
        Self {
            shared: Arc::clone(shared),
            begun: Instant::now(),
            slices: vec![Slice::default(); SLICES],
            phases: vec![empty.clone(); Phase::ALL.len()],
        }
    }

    /// A request has ended.
    pub(crate) fn record(&mut self, latency: u64, now: Instant) {
        let at = (now - self.begun).as_nanos() / SLICE.as_nanos();
        if let Some(slice) = usize::try_from(at).ok().and_then(|at| self.slices.get_mut(at)) {
            slice.requests += 1;
            slice.longest = slice.longest.max(latency);
        }
        let phase = usize::from(self.shared.phase.load(Ordering::Relaxed));
        if let Some(phase) = self.phases.get_mut(phase) {
            phase.saturating_record(latency);
        }
    }
}

/// A timeline.
pub(crate) struct Life {
    pub(crate) job: Job,
    pub(crate) slices: Vec<Slice>,
    pub(super) phases: Vec<Histogram<u64>>,
    /// When each phase ended, from the beginning.
    pub(crate) ends: Vec<Duration>,
    /// The job's last words.
    pub(super) job_info: Value,
    pub(super) disturbance: Disturbance,
}

/// Which disk is mirrored, and where to.
pub(crate) struct Plan<'a> {
    pub(crate) source: &'a str,
    pub(crate) target: &'a Path,
    /// The target is a block device, which is not made.
    pub(crate) on_device: bool,
    pub(crate) copy_mode: &'a str,
    /// What the guest's 99th percentile is to keep under.
    pub(crate) ceiling: Option<Duration>,
    pub(crate) interlude: Duration,
}

/// Runs it: the load on a thread, the operator here.
pub(crate) fn run(
    socket: &Path,
    job: &Job,
    plan: &Plan<'_>,
    mut rpc: Rpc,
    interrupt: &Interrupt,
) -> anyhow::Result<Life> {
    let shared = Arc::new(Shared::default());
    let server = Server::of(socket, ConnectionConfig::default().deadline)?;
    let client = Client::new(Socket::connect(socket, job, 1)?, job, 1, interrupt)?;
    let its_shared = Arc::clone(&shared);
    let begun = Instant::now();
    let load = std::thread::Builder::new()
        .name("load".to_owned())
        .spawn(move || client.run_life(&its_shared, server))?;
    let told = tell(&mut rpc, plan, &shared, begun, &|| load.is_finished());
    shared.stop.store(true, Ordering::Relaxed);
    let recorder = load.join().map_err(|_| anyhow!("the load's thread panicked"))?;
    // A load that failed explains a story that broke off.
    let (recorder, disturbance) = recorder.context("the load failed")?;
    let (ends, job_info) = told?;
    let last = ends.last().map_or(0, |end| end.as_nanos() / SLICE.as_nanos());
    let mut slices = recorder.slices;
    slices.truncate(usize::try_from(last)?);
    Ok(Life { job: *job, slices, phases: recorder.phases, ends, job_info, disturbance })
}

/// What the operator does, and when each phase ended.
fn tell(
    rpc: &mut Rpc,
    plan: &Plan<'_>,
    shared: &Shared,
    begun: Instant,
    broken: &dyn Fn() -> bool,
) -> anyhow::Result<(Vec<Duration>, Value)> {
    let mut ends = Vec::new();
    let mut enter = |phase: Phase| {
        shared.phase.store(phase as u8, Ordering::Relaxed);
        ends.push(begun.elapsed());
    };
    let interlude = || -> anyhow::Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < plan.interlude {
            ensure!(!broken(), "the load broke off");
            std::thread::sleep(LOOK_EVERY.min(plan.interlude));
        }
        Ok(())
    };
    interlude()?;
    enter(Phase::Copying);
    let mode = if plan.on_device { "existing" } else { "create" };
    let mut params = json!({
        "source": plan.source, "target_path": plan.target, "target_mode": mode, "copy_mode": plan.copy_mode,
        "auto_dismiss": false,
    });
    if let Some(ceiling) = plan.ceiling {
        params["latency_ceiling_us"] = u64::try_from(ceiling.as_micros())?.into();
    }
    let started = rpc.call("bdev_mirror_start", params)?;
    let id = started.result["job_id"].as_str().context("a job without a name")?.to_owned();
    let moved = (|| {
        await_status(rpc, &id, "ready", broken)?;
        enter(Phase::InSync);
        interlude()?;
        enter(Phase::Switching);
        rpc.call("job_complete", json!({ "job_id": id }))?;
        await_status(rpc, &id, "concluded", broken)
    })();
    let ended = match moved {
        Ok(ended) => ended,
        Err(error) => {
            // Nobody is left who waits for it; one that has failed by itself is over already.
            let _ = rpc.call("job_cancel", json!({ "job_id": id }));
            return Err(error);
        }
    };
    enter(Phase::After);
    ensure!(ended["error"].is_null(), "the mirror failed: {}", ended["error"]);
    rpc.call("job_dismiss", json!({ "job_id": id }))?;
    interlude()?;
    ends.push(begun.elapsed());
    Ok((ends, ended))
}

/// Waits until the job has the status. One that ends otherwise says why.
fn await_status(
    rpc: &mut Rpc,
    id: &str,
    status: &str,
    broken: &dyn Fn() -> bool,
) -> anyhow::Result<Value> {
    let mut seen = rpc.call("job_get_events", json!({ "after": u64::MAX }))?.result;
    loop {
        let jobs = rpc.call("job_get_list", json!({ "job_id": id }))?.result;
        let job = jobs.get(0).cloned().context("the job is gone")?;
        let now = job["status"].as_str().unwrap_or_default();
        if now == status {
            return Ok(job);
        }
        ensure!(now != "concluded", "the mirror failed: {}", job["error"]);
        ensure!(!broken(), "the load broke off while the mirror was {now}");
        // What has changed since the look before is among these events, or the next.
        let after = json!({ "after": seen["sequence"], "timeout_ms": LOOK_MS, "job_id": id });
        seen = rpc.call("job_get_events", after)?.result;
    }
}

impl Life {
    /// How long a phase lasted.
    fn length(&self, phase: usize) -> Duration {
        let end = self.ends.get(phase).copied().unwrap_or_default();
        let begin = phase.checked_sub(1).and_then(|before| self.ends.get(before)).copied();
        end.saturating_sub(begin.unwrap_or_default())
    }

    #[allow(clippy::cast_precision_loss)] // rates for people
    fn iops(&self, phase: usize) -> f64 {
        let seconds = self.length(phase).as_secs_f64();
        if seconds > 0.0 { self.phases[phase].len() as f64 / seconds } else { 0.0 }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            report::heading(&self.job),
            format!(
                "  {:<10} {:>9} {:>10} {:>8} {:>9} {:>9} {:>9} {:>9}",
                "phase", "seconds", "IOPS", "kept", "p50 us", "p99 us", "p99.9 us", "max us"
            ),
        ];
        let before = self.iops(0);
        for (index, phase) in Phase::ALL.iter().enumerate() {
            let latency = &self.phases[index];
            let at = |percentile| micros(latency.value_at_percentile(percentile));
            lines.push(format!(
                "  {:<10} {:>9.3} {:>10.0} {:>8.2} {:>9} {:>9} {:>9} {:>9}",
                phase.name(),
                self.length(index).as_secs_f64(),
                self.iops(index),
                if before > 0.0 { self.iops(index) / before } else { 0.0 },
                at(50.0),
                at(99.0),
                at(99.9),
                micros(latency.max()),
            ));
        }
        lines.push(self.disturbance.verdict());
        lines
    }

    pub(crate) fn to_json(&self) -> Value {
        let phases: Vec<Value> = Phase::ALL
            .iter()
            .enumerate()
            .map(|(index, phase)| {
                let latency = &self.phases[index];
                let mut percentiles: serde_json::Map<String, Value> = PERCENTILES
                    .iter()
                    .map(|(at, name)| ((*name).to_owned(), latency.value_at_percentile(*at).into()))
                    .collect();
                percentiles.insert("max".to_owned(), latency.max().into());
                json!({
                    "phase": phase.name(), "seconds": self.length(index).as_secs_f64(),
                    "requests": latency.len(), "iops": self.iops(index), "latency_ns": percentiles,
                })
            })
            .collect();
        let slices: Vec<Value> =
            self.slices.iter().map(|it| json!([it.requests, it.longest])).collect();
        json!({
            "rw": self.job.pattern.name(), "bs": self.job.block, "iodepth": self.job.depth,
            "phases": phases, "job": self.job_info, "machine": self.disturbance.to_json(),
            "slice_seconds": SLICE.as_secs_f64(), "slices_requests_and_longest_ns": slices,
        })
    }

    pub(crate) fn to_markdown(&self) -> String {
        format!("```\n{}\n```\n", self.lines().join("\n"))
    }

    /// Says it, or prints it as JSON.
    pub(crate) fn show(&self, json: bool) {
        if json {
            output::json(&self.to_json());
        } else {
            self.lines().iter().for_each(|line| output::say(line));
        }
    }
}
