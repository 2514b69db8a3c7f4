//! `delay`: a bdev that makes the one below it slower, for tests of everything that must bear a slow disk.
//!
//! As SPDK's delay bdev: a read or write that the base has completed is held back for the average latency of its kind, and
//! one in a hundred for the 99th percentile. Which one is counted, not drawn, so a run can be repeated. Flushes, unmaps and
//! write-zeroes pass undelayed.
//!
//! Invariant: one latency, one queue. All that waits in a queue waits equally long, so its head is always due first.

use std::collections::VecDeque;
use std::sync::Arc;

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, WaitSet};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Detail, Geometry};
use crate::io::{BdevIo, IoError, IoKind, Tag};
use crate::ledger::Ledger;
use crate::slots::Slots;
use crate::stats::IoStats;

/// One I/O in so many gets the 99th percentile.
const P99_EVERY: u64 = 100;
/// Completions taken from the base in one poll.
const BATCH: usize = 64;

/// Latencies to be added, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DelayConfig {
    /// Of most reads.
    pub avg_read_us: u64,
    /// Of one read in a hundred; at least the average.
    pub p99_read_us: u64,
    /// Of most writes.
    pub avg_write_us: u64,
    /// Of one write in a hundred; at least the average.
    pub p99_write_us: u64,
}

/// The control side.
pub struct Delay {
    name: String,
    base: Arc<dyn Bdev>,
    config: DelayConfig,
    stats: Arc<IoStats>,
}

impl Delay {
    /// A bdev that delays `base`.
    ///
    /// # Errors
    /// A 99th percentile below its average.
    pub fn new(name: &str, base: Arc<dyn Bdev>, config: DelayConfig) -> Result<Self, BdevError> {
        let pairs = [
            ("p99_read_latency", config.p99_read_us, config.avg_read_us),
            ("p99_write_latency", config.p99_write_us, config.avg_write_us),
        ];
        for (parameter, p99, average) in pairs {
            if p99 < average {
                return Err(BdevError::Invalid {
                    parameter,
                    value: p99.to_string(),
                    expected: format!(
                        "at least the average of {average} microseconds was expected"
                    ),
                });
            }
        }
        Ok(Self { name: name.to_owned(), base, config, stats: Arc::default() })
    }
}

impl Bdev for Delay {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "delay"
    }

    fn geometry(&self) -> Geometry {
        self.base.geometry()
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let base = self.base.open_channel(depth)?;
        Ok(Box::new(DelayChannel::new(base, depth, self.config)))
    }

    fn base(&self) -> Option<&Arc<dyn Bdev>> {
        Some(&self.base)
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        vec![
            ("base_bdev_name", Detail::Text(self.base.name().to_owned())),
            ("avg_read_latency", Detail::Number(self.config.avg_read_us)),
            ("p99_read_latency", Detail::Number(self.config.p99_read_us)),
            ("avg_write_latency", Detail::Number(self.config.avg_write_us)),
            ("p99_write_latency", Detail::Number(self.config.p99_write_us)),
        ]
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

/// How long an I/O is held back: the queue it goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    AverageRead,
    P99Read,
    AverageWrite,
    P99Write,
}

/// Classes, and so queues.
const CLASSES: usize = 4;

/// What must be known of an I/O that the base has.
#[derive(Debug, Clone, Copy)]
struct Below {
    tag: Tag,
    kind: IoKind,
    class: Option<Class>,
}

/// An I/O that the base has completed.
#[derive(Debug, Clone, Copy)]
struct Held {
    due: Nanos,
    tag: Tag,
    kind: IoKind,
    result: Result<(), IoError>,
}

/// The data side.
struct DelayChannel {
    base: Box<dyn IoChannel>,
    ledger: Ledger,
    below: Slots<Below>,
    latencies: [Nanos; CLASSES],
    queues: [VecDeque<Held>; CLASSES],
    reads: u64,
    writes: u64,
    batch: CompletionBatch,
}

impl DelayChannel {
    fn new(base: Box<dyn IoChannel>, depth: u32, config: DelayConfig) -> Self {
        let slots = Ledger::slots(depth);
        let unused = Below { tag: Tag(0), kind: IoKind::Flush, class: None };
        let latencies =
            [config.avg_read_us, config.p99_read_us, config.avg_write_us, config.p99_write_us];
        Self {
            base,
            ledger: Ledger::new(depth),
            below: Slots::new(slots, || unused),
            latencies: latencies.map(Nanos::from_micros),
            queues: std::array::from_fn(|_| VecDeque::with_capacity(slots)),
            reads: 0,
            writes: 0,
            batch: CompletionBatch::with_capacity(BATCH),
        }
    }

    /// The class of the next I/O of this kind.
    fn classify(&mut self, kind: IoKind) -> Option<Class> {
        let (count, average, p99) = match kind {
            IoKind::Read => (&mut self.reads, Class::AverageRead, Class::P99Read),
            IoKind::Write => (&mut self.writes, Class::AverageWrite, Class::P99Write),
            IoKind::Flush | IoKind::Unmap | IoKind::WriteZeroes => return None,
        };
        *count += 1;
        Some(if count.is_multiple_of(P99_EVERY) { p99 } else { average })
    }
}

impl IoChannel for DelayChannel {
    fn limits(&self) -> &Limits {
        self.base.limits()
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind).min(self.base.free(kind))
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        let class = self.classify(io.kind);
        // The ledger admits no more than there are slots.
        let Some(slot) = self.below.claim() else {
            return self.ledger.finish(io.kind, io.tag, Err(IoError::IO));
        };
        self.below[slot] = Below { tag: io.tag, kind: io.kind, class };
        self.base.submit(cx, BdevIo { tag: Tag(slot), ..io }, payload);
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.base.commit(cx);
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.batch.clear();
        self.base.poll(cx, &mut self.batch);
        for completion in self.batch.as_slice() {
            let Below { tag, kind, class } = self.below[completion.tag.0];
            self.below.release(completion.tag.0);
            let result = completion.result;
            match class {
                None => self.ledger.finish(kind, tag, result),
                Some(class) => {
                    let due = cx.now + self.latencies[class as usize];
                    self.queues[class as usize].push_back(Held { due, tag, kind, result });
                }
            }
        }
        for queue in &mut self.queues {
            while let Some(held) = queue.front().copied().filter(|held| held.due <= cx.now) {
                queue.pop_front();
                self.ledger.finish(held.kind, held.tag, held.result);
            }
        }
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        self.base.expect_pool(pool, length);
    }

    fn forget_pool(&mut self) {
        self.base.forget_pool();
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.base.attach(cx);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.base.detach(cx);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if self.ledger.has_finished() {
            return Armed::Ready;
        }
        let next = self.queues.iter().filter_map(|queue| queue.front()).map(|held| held.due).min();
        self.base.arm(cx, set).and(Armed::Until(next))
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.base.disarm(cx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::null::Null;
    use resilver_sys::RegionTable;

    fn channel(config: DelayConfig) -> Box<dyn IoChannel> {
        let base = Arc::new(Null::new("base", 512, 2048).unwrap());
        Delay::new("slow", base, config).unwrap().open_channel(4).unwrap()
    }

    #[test]
    fn a_write_is_held_back_for_its_latency_and_a_flush_is_not() {
        let config = DelayConfig { avg_write_us: 10, p99_write_us: 10, ..DelayConfig::default() };
        let mut channel = channel(config);
        let memory = RegionTable::with_capacity(1);
        let at = |now| Context { now: Nanos(now), memory: &memory };
        let mut done = CompletionBatch::with_capacity(4);
        for (tag, kind) in [(1, IoKind::Write), (2, IoKind::Flush)] {
            let io = BdevIo { tag: Tag(tag), kind, may_unmap: false, offset: 0, length: 0 };
            channel.submit(&at(0), io, &[]);
        }
        channel.poll(&at(100), &mut done);
        assert_eq!(done.as_slice().iter().map(|c| c.tag).collect::<Vec<_>>(), [Tag(2)]);
        let mut set = WaitSet::default();
        assert_eq!(channel.arm(&at(100), &mut set), Armed::Until(Some(Nanos(10_100))));
        done.clear();
        channel.poll(&at(10_099), &mut done);
        assert_eq!((done.as_slice().len(), channel.in_flight()), (0, 1));
        channel.poll(&at(10_100), &mut done);
        assert_eq!(done.get(0).unwrap().tag, Tag(1));
    }

    #[test]
    fn one_read_in_a_hundred_takes_the_percentile() {
        let config = DelayConfig { avg_read_us: 1, p99_read_us: 500, ..DelayConfig::default() };
        let mut channel = channel(config);
        let memory = RegionTable::with_capacity(1);
        let mut slow = 0;
        for round in 0..300u64 {
            let start = Nanos::from_millis(round);
            let mut done = CompletionBatch::with_capacity(4);
            let io =
                BdevIo { tag: Tag(0), kind: IoKind::Read, may_unmap: false, offset: 0, length: 0 };
            channel.submit(&Context { now: start, memory: &memory }, io, &[]);
            channel.poll(&Context { now: start, memory: &memory }, &mut done);
            let soon = start + Nanos::from_micros(1);
            channel.poll(&Context { now: soon, memory: &memory }, &mut done);
            if done.as_slice().is_empty() {
                slow += 1;
                let late = start + Nanos::from_micros(500);
                channel.poll(&Context { now: late, memory: &memory }, &mut done);
            }
            assert_eq!(done.as_slice().len(), 1);
        }
        assert_eq!(slow, 3);
    }

    #[test]
    fn a_percentile_below_its_average_is_refused() {
        let base = Arc::new(Null::new("base", 512, 2048).unwrap());
        let config = DelayConfig { avg_read_us: 2, p99_read_us: 1, ..DelayConfig::default() };
        let error = Delay::new("slow", base, config).err().unwrap().to_string();
        assert!(error.contains("p99_read_latency is 1: at least the average of 2"), "{error}");
    }
}
