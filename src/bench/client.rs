//! The client of a benchmark: keeps a number of requests in flight and takes the time of each.
//!
//! One thread polls all queues. The clock is read once a turn, when something has ended: what is submitted then begins at that
//! moment. So a latency is what a driver in a guest would see, the client's own work included, and the clock costs little
//! even at millions of requests a second. Nothing is allocated while it runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hdrhistogram::Histogram;
use resilver_sys::WaitSet;

use super::Job;
use super::disk::{Access, Disk};
use super::life::{Recorder, Shared};
use super::machine::{Disturbance, Server, Watch};
use crate::content::Random;
use crate::interrupt::Interrupt;

/// Latencies above this are counted as this, nanoseconds.
const LATENCY_MAX: u64 = 60_000_000_000;
/// Significant digits of a latency.
const DIGITS: u8 = 3;
/// The longest sleep, nanoseconds: a bound on how late the end of a run is seen.
const SLEEP: u64 = 20_000_000;
/// A disk that ends nothing for so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a timeline goes on before it looks whether it is to stop.
const STRETCH: Duration = Duration::from_millis(5);
/// How long a run goes on between reading the kernel's accounts and being measured: what ended while they were read waited for
/// them, and is not the server's.
const SETTLE: Duration = Duration::from_millis(1);
/// Turns without an end before the clock is read all the same.
const TURNS_BETWEEN_LOOKS: u32 = 1024;

/// What one run found.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) time: Duration,
    /// Nanoseconds.
    pub(crate) latency: Histogram<u64>,
    pub(crate) disturbance: Disturbance,
    /// Of a file without a server: whether its page cache was bypassed.
    pub(crate) direct: Option<bool>,
}

impl Run {
    /// Requests a second.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn iops(&self) -> f64 {
        self.requests as f64 / self.time.as_secs_f64()
    }
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Slot {
    queue: usize,
    begun: Instant,
}

/// A client of a disk.
pub(crate) struct Client<D> {
    job: Job,
    disk: D,
    slots: Vec<Slot>,
    random: Random,
    /// Requests that fit on the disk.
    places: u64,
    /// Where a sequential pattern goes on.
    next: u64,
    histogram: Histogram<u64>,
    requests: u64,
    /// Where latencies go besides, on a timeline.
    recorder: Option<Recorder>,
    interrupt: Interrupt,
}

impl<D: Disk> Client<D> {
    /// A client that does this job on a disk that was opened for it.
    pub(crate) fn new(
        disk: D,
        job: &Job,
        seed: u64,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let shape = disk.shape();
        ensure!(
            job.read_percent == 100 || !shape.read_only,
            "the disk can only be read; measure read or randread"
        );
        ensure!(
            job.block.is_multiple_of(shape.block_size),
            "the disk has blocks of {} bytes; --bs must be a multiple",
            shape.block_size
        );
        let places = shape.capacity / u64::from(job.block);
        ensure!(places > 0, "the disk is smaller than one request");
        let now = Instant::now();
        let slots = (0..usize::from(job.depth))
            .map(|slot| Slot { queue: slot % disk.queues(), begun: now })
            .collect();
        Ok(Self {
            job: *job,
            disk,
            slots,
            random: Random::new(seed),
            places,
            next: 0,
            histogram: Histogram::new_with_bounds(1, LATENCY_MAX, DIGITS)?,
            requests: 0,
            recorder: None,
            interrupt: interrupt.clone(),
        })
    }

    /// Warms up, measures, and ends.
    pub(crate) fn run(mut self, server: Server) -> anyhow::Result<Run> {
        let begun = Instant::now();
        for slot in 0..self.slots.len() {
            self.submit(slot, begun)?;
        }
        self.disk.publish();
        self.turns_until(begun + self.job.warmup)?;
        let watch = Watch::begin(server);
        self.turns_until(Instant::now() + SETTLE)?;
        self.histogram.reset();
        self.requests = 0;
        let from = Instant::now();
        let until = self.turns_until(from + self.job.time)?;
        let disturbance = watch.end();
        let (requests, time) = (self.requests, until - from);
        let latency = self.histogram.clone();
        self.drain()?;
        let bytes = requests * u64::from(self.job.block);
        let direct = self.disk.shape().direct;
        Ok(Run { requests, bytes, time, latency, disturbance, direct })
    }

    /// Keeps the depth until it is told to stop, and records all the while.
    pub(crate) fn run_life(
        mut self,
        shared: &Arc<Shared>,
        server: Server,
    ) -> anyhow::Result<(Recorder, Disturbance)> {
        let watch = Watch::begin(server);
        self.recorder = Some(Recorder::new(shared, &self.histogram));
        let begun = Instant::now();
        for slot in 0..self.slots.len() {
            self.submit(slot, begun)?;
        }
        self.disk.publish();
        while !shared.stops() {
            self.turns_until(Instant::now() + STRETCH)?;
        }
        let disturbance = watch.end();
        self.drain()?;
        let recorder = self.recorder.context("a client that has recorded nothing")?;
        Ok((recorder, disturbance))
    }

    /// Keeps the depth until then, and until a request has ended: a run of none would have no latencies to tell. Says when it
    /// stopped.
    fn turns_until(&mut self, end: Instant) -> anyhow::Result<Instant> {
        let (mut idle, mut last) = (0, Instant::now());
        loop {
            let ended = self.turn(true)?;
            idle = if ended { 0 } else { idle + 1 };
            if ended || self.job.interrupts || idle % TURNS_BETWEEN_LOOKS == 0 {
                let now = Instant::now();
                last = if ended { now } else { last };
                if now >= end && self.requests > 0 {
                    return Ok(now);
                }
                self.look(now, last)?;
            }
            if !ended && self.job.interrupts {
                self.sleep();
            }
        }
    }

    /// Ends what is in flight.
    fn drain(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.disk.in_flight() > 0 {
            self.turn(false)?;
            self.look(Instant::now(), begun)?;
        }
        Ok(())
    }

    fn look(&mut self, now: Instant, last: Instant) -> anyhow::Result<()> {
        self.disk.look()?;
        if self.interrupt.is_there() {
            bail!("interrupted");
        }
        ensure!(now - last < PATIENCE, "nothing has ended for {PATIENCE:?}");
        Ok(())
    }

    /// Takes what has ended and, if told to, asks for as much again. False if nothing had ended.
    fn turn(&mut self, refill: bool) -> anyhow::Result<bool> {
        let mut now = None;
        for queue in 0..self.disk.queues() {
            while let Some(slot) = self.disk.pop(queue)? {
                let now = *now.get_or_insert_with(Instant::now);
                let begun = self.slots.get(slot).context("a request that nobody made")?.begun;
                let latency = u64::try_from((now - begun).as_nanos()).unwrap_or(LATENCY_MAX);
                self.histogram.saturating_record(latency);
                self.requests += 1;
                if let Some(recorder) = &mut self.recorder {
                    recorder.record(latency, now);
                }
                if refill {
                    self.submit(slot, now)?;
                }
            }
        }
        if now.is_some() && refill {
            self.disk.publish();
        }
        Ok(now.is_some())
    }

    fn submit(&mut self, slot: usize, now: Instant) -> anyhow::Result<()> {
        let place = if self.job.pattern.is_random() {
            self.random.below(self.places)
        } else {
            let place = self.next;
            self.next = if place + 1 == self.places { 0 } else { place + 1 };
            place
        };
        let offset = place * u64::from(self.job.block);
        let reads = match self.job.read_percent {
            100 => true,
            0 => false,
            percent => self.random.below(100) < percent,
        };
        let slot_of = &mut self.slots[slot];
        slot_of.begun = now;
        self.disk.submit(slot_of.queue, Access { slot, reads, offset })
    }

    /// Waits for an interrupt.
    fn sleep(&mut self) {
        let mut set = WaitSet::with_capacity(self.disk.queues());
        if self.disk.arm(&mut set) {
            set.sleep(Some(SLEEP));
        }
        self.disk.disarm();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::Pattern;
    use super::super::disk::Shape;
    use super::*;

    /// A disk that ends its requests one by one, each after so many looks of the client's that a run without time is long over.
    #[derive(Default)]
    struct Slow {
        asked: VecDeque<usize>,
        looks: u32,
    }

    impl Disk for Slow {
        fn shape(&self) -> Shape {
            Shape { capacity: 1 << 20, block_size: 512, read_only: false, direct: None }
        }
        fn queues(&self) -> usize {
            1
        }
        fn submit(&mut self, _queue: usize, access: Access) -> anyhow::Result<()> {
            self.asked.push_back(access.slot);
            Ok(())
        }
        fn publish(&mut self) {}
        fn pop(&mut self, _queue: usize) -> anyhow::Result<Option<usize>> {
            self.looks += 1;
            Ok(if self.looks.is_multiple_of(100_000) { self.asked.pop_front() } else { None })
        }
        fn in_flight(&self) -> usize {
            self.asked.len()
        }
        fn look(&mut self) -> anyhow::Result<()> {
            Ok(())
        }
        fn arm(&mut self, _set: &mut WaitSet) -> bool {
            false
        }
        fn disarm(&mut self) {}
    }

    #[test]
    fn a_run_goes_on_until_a_request_has_ended() {
        for interrupts in [false, true] {
            let job = Job {
                pattern: Pattern::Randread,
                read_percent: 100,
                block: 4096,
                depth: 2,
                queues: 1,
                interrupts,
                warmup: Duration::ZERO,
                time: Duration::ZERO,
            };
            let client = Client::new(Slow::default(), &job, 1, &Interrupt::default()).unwrap();
            let run = client.run(Server::Nobody).unwrap();
            assert_eq!((run.requests, run.latency.len()), (1, 1));
        }
    }
}
