//! A load that verifies itself: random reads and writes on a disk through the front end, every read compared with what was
//! written last.
//!
//! One thread owns the connection, polls, and keeps for every block the generation that the disk owes it. A block is never
//! read while a write of it is in flight, nor written twice at once, so that what a read must return is always known. The
//! phase that control names says under which heading a latency is counted.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use hdrhistogram::Histogram;
use resilver_sys::{BufferSlice, RegionId, RegionTable, TableFull, WaitSet};
use resilver_vhost::front_end::{
    Connection, DataBuffer, DriverQueue, Finished, Request, RequestError, RingError, SubmitError,
};

use crate::content::{BLOCK, Content, Random};
use crate::cut::LoggedWrite;

/// Blocks of the longest request.
const LONGEST: u64 = 16;
/// Blocks of a stripe: the load uses every other one, so that a disk's holes are not all written.
const STRIPE: u64 = 4096;
/// One request in so many is a flush.
const FLUSH_EVERY: u64 = 512;
/// Of a hundred requests, so many read.
const READ_PERCENT: u64 = 50;
/// How long the load polls without finding anything before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// The longest sleep: a bound on how late a wish to stop is heard.
const SLEEP_NS: u64 = 20_000_000;
/// How often control looks whether the load has heard of a phase.
const HEARING: Duration = Duration::from_micros(200);
/// A request that takes longer than this is lost.
const LOST_AFTER: Duration = Duration::from_secs(30);
/// Latencies above this are counted as this, nanoseconds.
const LATENCY_MAX: u64 = 60_000_000_000;
/// Significant digits of a latency.
const DIGITS: u8 = 3;
/// How often a place is drawn before the slot is left empty for a turn.
const DRAWS: usize = 8;

/// Bytes of shared memory that a load of this depth needs.
pub(crate) fn data_bytes(depth: u16) -> usize {
    usize::from(depth) * BLOCK * resilver_sys::usize_from(LONGEST)
}

/// What is going on while a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// No mirror.
    Before,
    /// The mirror copies.
    Copying,
    /// Both legs are equal.
    InSync,
    /// From the request to complete until the job is over.
    Switching,
    /// On the target.
    After,
}

impl Phase {
    pub(crate) const ALL: [Self; 5] =
        [Self::Before, Self::Copying, Self::InSync, Self::Switching, Self::After];

    /// What a table calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Copying => "copying",
            Self::InSync => "in sync",
            Self::Switching => "switching",
            Self::After => "after",
        }
    }

    fn from_u8(value: u8) -> Self {
        Self::ALL.into_iter().find(|phase| *phase as u8 == value).unwrap_or(Self::After)
    }
}

/// Why a load ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// A read returned other bytes than were written.
    #[error("block {block} reads generation {found} where generation {expected} was acknowledged")]
    Mismatch {
        /// The block.
        block: u64,
        /// What the disk owes.
        expected: u32,
        /// What the block that was read claims to be.
        found: u32,
    },
    /// A request failed.
    #[error("a {what} at block {block} failed: {error}")]
    Request {
        /// What it was.
        what: Kind,
        /// Its first block.
        block: u64,
        /// The device's answer.
        error: RequestError,
    },
    /// A request did not end.
    #[error("a {what} at block {block} did not end within {LOST_AFTER:?}")]
    Lost {
        /// What it was.
        what: Kind,
        /// Its first block.
        block: u64,
    },
    /// The back end went away.
    #[error("the back end closed the connection")]
    Closed,
    /// The ring is broken.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A request could not be submitted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The shared memory could not be reached.
    #[error(transparent)]
    Memory(#[from] resilver_sys::BadSlice),
    /// It could not be entered in a table.
    #[error(transparent)]
    Table(#[from] TableFull),
    /// What a block must contain could not be read from the source image.
    #[error("the source image cannot be read: {0}")]
    Content(#[from] io::Error),
    /// Latencies cannot be counted.
    #[error(transparent)]
    Histogram(#[from] hdrhistogram::CreationError),
    /// The thread panicked.
    #[error("the load's thread panicked")]
    Panicked,
}

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        })
    }
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Op {
    kind: Kind,
    block: u64,
    blocks: u64,
    at: Instant,
    /// The number of its submission among all events.
    event: u64,
}

/// What a block may be used for just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Busy {
    Free,
    Read(u16),
    Written,
}

/// Latencies of one phase, nanoseconds.
#[derive(Debug, Clone)]
pub(crate) struct PhaseReport {
    pub(crate) reads: Histogram<u64>,
    pub(crate) writes: Histogram<u64>,
    /// The longest time during which nothing ended.
    pub(crate) longest_gap: Duration,
}

/// What a load has to tell in the end.
#[derive(Debug)]
pub(crate) struct LoadReport {
    /// By [`Phase::ALL`].
    pub(crate) phases: Vec<PhaseReport>,
    /// What every block holds now.
    pub(crate) generations: Vec<u32>,
    /// What every block held when the switch-over began.
    pub(crate) at_switch: Vec<u32>,
    /// Writes around the switch-over.
    pub(crate) log: Vec<LoggedWrite>,
    /// The numbers of the events between which the switch-over happened.
    pub(crate) switch: (u64, u64),
}

/// What control and the load's thread share.
#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    /// The phase that the load has heard of.
    heard: AtomicU8,
    stop: AtomicBool,
    done: AtomicU64,
    ended: AtomicBool,
}

/// A running load.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<LoadReport, LoadError>>,
}

impl Load {
    /// Starts a load of `depth` requests at once.
    pub(crate) fn start(
        connection: Connection,
        queue: DriverQueue,
        content: Arc<Content>,
        seed: u64,
        depth: u16,
    ) -> Result<Self, LoadError> {
        let shared = Arc::new(Shared::default());
        let its_shared = Arc::clone(&shared);
        let worker = move || {
            let result =
                Worker::new(connection, queue, content, seed, depth, Arc::clone(&its_shared))
                    .and_then(Worker::run);
            its_shared.ended.store(true, Ordering::Release);
            result
        };
        let thread = thread::Builder::new().name("load".to_owned()).spawn(worker)?;
        Ok(Self { shared, thread })
    }

    /// Names what is going on from now on; returns when the load counts by it, or has ended.
    pub(crate) fn enter(&self, phase: Phase) {
        self.shared.phase.store(phase as u8, Ordering::Release);
        while self.shared.heard.load(Ordering::Acquire) != phase as u8 && !self.has_ended() {
            thread::sleep(HEARING);
        }
    }

    /// Requests that have ended.
    pub(crate) fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Relaxed)
    }

    /// Whether it has failed: then [`Load::finish`] says why.
    pub(crate) fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Lets the requests in flight end, and stops.
    pub(crate) fn finish(self) -> Result<LoadReport, LoadError> {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| LoadError::Panicked)?
    }
}

/// The load's thread.
struct Worker {
    connection: Connection,
    queue: DriverQueue,
    table: RegionTable,
    region: RegionId,
    content: Arc<Content>,
    random: Random,
    shared: Arc<Shared>,
    slots: Vec<Option<Op>>,
    busy: Vec<Busy>,
    phase: Phase,
    events: u64,
    submitted: u64,
    last_end: Instant,
    bytes: Vec<u8>,
    expected: Vec<u8>,
    report: LoadReport,
}

impl Worker {
    fn new(
        connection: Connection,
        queue: DriverQueue,
        content: Arc<Content>,
        seed: u64,
        depth: u16,
        shared: Arc<Shared>,
    ) -> Result<Self, LoadError> {
        let table = RegionTable::with_capacity(1);
        let region = table.insert(Arc::clone(connection.memory().mapping()))?;
        let blocks = resilver_sys::usize_from(content.blocks());
        let latencies = Histogram::new_with_bounds(1, LATENCY_MAX, DIGITS)?;
        let phase = PhaseReport {
            reads: latencies.clone(),
            writes: latencies,
            longest_gap: Duration::ZERO,
        };
        Ok(Self {
            connection,
            queue,
            table,
            region,
            content,
            random: Random::new(seed),
            shared,
            slots: vec![None; usize::from(depth)],
            busy: vec![Busy::Free; blocks],
            phase: Phase::Before,
            events: 0,
            submitted: 0,
            last_end: Instant::now(),
            bytes: vec![0; BLOCK * resilver_sys::usize_from(LONGEST)],
            expected: vec![0; BLOCK],
            report: LoadReport {
                phases: vec![phase; Phase::ALL.len()],
                generations: vec![0; blocks],
                at_switch: Vec::new(),
                log: Vec::new(),
                switch: (0, u64::MAX),
            },
        })
    }

    fn run(mut self) -> Result<LoadReport, LoadError> {
        let mut set = WaitSet::with_capacity(1);
        let mut idle_since: Option<Instant> = None;
        loop {
            self.follow_phase();
            let stopping = self.shared.stop.load(Ordering::Acquire);
            if stopping && self.queue.in_flight() == 0 {
                return Ok(self.report);
            }
            if !stopping {
                self.fill()?;
            }
            if self.reap()? {
                idle_since = None;
                continue;
            }
            let now = Instant::now();
            if now - *idle_since.get_or_insert(now) < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.look_for_lost(now)?;
            if self.queue.arm() {
                set.clear();
                set.add(self.queue.call_fd());
                set.sleep(Some(SLEEP_NS));
            }
            self.queue.disarm();
        }
    }

    /// Hears from control what is going on; the switch-over begins and ends between two events.
    fn follow_phase(&mut self) {
        let phase = Phase::from_u8(self.shared.phase.load(Ordering::Acquire));
        if phase == self.phase {
            return;
        }
        if phase == Phase::Switching {
            self.report.at_switch.clone_from(&self.report.generations);
            self.report.log.clear();
            self.report.switch = (self.events, u64::MAX);
        } else if self.phase == Phase::Switching {
            self.report.switch.1 = self.events + 1;
        }
        self.phase = phase;
        self.shared.heard.store(phase as u8, Ordering::Release);
    }

    /// Submits until the depth is reached.
    fn fill(&mut self) -> Result<(), LoadError> {
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() {
                self.submit(slot)?;
            }
        }
        self.queue.publish();
        Ok(())
    }

    fn submit(&mut self, slot: usize) -> Result<(), LoadError> {
        let Some((kind, block, blocks)) = self.draw() else { return Ok(()) };
        let offset = block * BLOCK as u64;
        let (request, length) = match kind {
            Kind::Read => (Request::Read { offset }, blocks),
            Kind::Write => (Request::Write { offset }, blocks),
            Kind::Flush => (Request::Flush, 0),
        };
        let slice = self.slice(slot, length);
        if kind == Kind::Write {
            for index in 0..blocks {
                let number = resilver_sys::usize_from(block + index);
                let part = &mut self.bytes[resilver_sys::usize_from(index) * BLOCK..][..BLOCK];
                self.content.fill(block + index, self.report.generations[number] + 1, part)?;
                self.busy[number] = Busy::Written;
            }
            self.table.write(slice, &self.bytes[..slice.length as usize])?;
        } else {
            for number in block..block + blocks {
                let busy = &mut self.busy[resilver_sys::usize_from(number)];
                *busy = Busy::Read(if let Busy::Read(others) = *busy { others + 1 } else { 1 });
            }
        }
        let buffer = DataBuffer { offset: slice.offset, length: slice.length };
        let buffers = if kind == Kind::Flush { &[][..] } else { &[buffer][..] };
        self.queue.submit(request, buffers, slot as u64)?;
        self.events += 1;
        self.submitted += 1;
        self.slots[slot] = Some(Op { kind, block, blocks, at: Instant::now(), event: self.events });
        Ok(())
    }

    /// What to ask next: a place that nothing in flight contradicts; none if luck has it that there is none.
    fn draw(&mut self) -> Option<(Kind, u64, u64)> {
        if self.submitted % FLUSH_EVERY == FLUSH_EVERY - 1 {
            return Some((Kind::Flush, 0, 0));
        }
        let kind = if self.random.below(100) < READ_PERCENT { Kind::Read } else { Kind::Write };
        // Most requests are one block, some longer, as guests do it.
        let longest = LONGEST.min(self.content.blocks());
        let blocks = if self.random.below(4) == 0 { 1 + self.random.below(longest) } else { 1 };
        for _ in 0..DRAWS {
            let drawn = self.random.below(self.content.blocks() - blocks + 1);
            let unused_stripe = drawn / STRIPE % 2 == 1;
            let block = if unused_stripe { drawn - STRIPE } else { drawn };
            let range = resilver_sys::usize_from(block)..resilver_sys::usize_from(block + blocks);
            let fits = |busy: &Busy| match busy {
                Busy::Free => true,
                Busy::Read(_) => kind == Kind::Read,
                Busy::Written => false,
            };
            if self.busy[range].iter().all(fits) {
                return Some((kind, block, blocks));
            }
        }
        None
    }

    /// Takes what has ended. False if nothing had.
    fn reap(&mut self) -> Result<bool, LoadError> {
        let mut any = false;
        while let Some(finished) = self.queue.pop()? {
            self.end(finished)?;
            any = true;
        }
        Ok(any)
    }

    fn end(&mut self, finished: Finished) -> Result<(), LoadError> {
        let slot = resilver_sys::usize_from(finished.tag);
        let Some(op) = self.slots.get_mut(slot).and_then(Option::take) else { return Ok(()) };
        let now = Instant::now();
        if let Err(error) = finished.result {
            return Err(LoadError::Request { what: op.kind, block: op.block, error });
        }
        self.count(&op, now);
        self.events += 1;
        match op.kind {
            Kind::Read => self.verify(slot, &op)?,
            Kind::Write => self.acknowledge(&op),
            Kind::Flush => {}
        }
        Ok(())
    }

    fn count(&mut self, op: &Op, now: Instant) {
        let phase = &mut self.report.phases[self.phase as usize];
        let latency = u64::try_from((now - op.at).as_nanos()).unwrap_or(LATENCY_MAX);
        match op.kind {
            Kind::Read => phase.reads.saturating_record(latency),
            Kind::Write => phase.writes.saturating_record(latency),
            Kind::Flush => {}
        }
        phase.longest_gap = phase.longest_gap.max(now - self.last_end);
        self.last_end = now;
        self.shared.done.fetch_add(1, Ordering::Relaxed);
    }

    fn acknowledge(&mut self, op: &Op) {
        let (from, to) = self.report.switch;
        let logged = self.events > from && op.event < to && !self.report.at_switch.is_empty();
        for block in op.block..op.block + op.blocks {
            let number = resilver_sys::usize_from(block);
            self.report.generations[number] += 1;
            self.busy[number] = Busy::Free;
            if logged {
                self.report.log.push(LoggedWrite {
                    block,
                    generation: self.report.generations[number],
                    submitted: op.event,
                    completed: self.events,
                });
            }
        }
    }

    fn verify(&mut self, slot: usize, op: &Op) -> Result<(), LoadError> {
        let slice = self.slice(slot, op.blocks);
        let bytes = &mut self.bytes[..slice.length as usize];
        self.table.read(slice, bytes)?;
        for (block, found) in (op.block..).zip(bytes.chunks_exact(BLOCK)) {
            let number = resilver_sys::usize_from(block);
            let expected = self.report.generations[number];
            self.content.fill(block, expected, &mut self.expected)?;
            if found != self.expected {
                let found = self.content.generation_of(block, found);
                return Err(LoadError::Mismatch { block, expected, found });
            }
            self.busy[number] = match self.busy[number] {
                Busy::Read(readers) if readers > 1 => Busy::Read(readers - 1),
                _ => Busy::Free,
            };
        }
        Ok(())
    }

    /// Fails if the back end has gone, or a request does not end.
    fn look_for_lost(&self, now: Instant) -> Result<(), LoadError> {
        if self.connection.is_closed() {
            return Err(LoadError::Closed);
        }
        let lost = self.slots.iter().flatten().find(|op| now - op.at > LOST_AFTER);
        lost.map_or(Ok(()), |op| Err(LoadError::Lost { what: op.kind, block: op.block }))
    }

    /// The buffer of a slot.
    fn slice(&self, slot: usize, blocks: u64) -> BufferSlice {
        #[allow(clippy::cast_possible_truncation)] // at most LONGEST blocks
        let length = (blocks * BLOCK as u64) as u32;
        let offset = slot as u64 * LONGEST * BLOCK as u64;
        BufferSlice { region: self.region, length, offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use resilver_tests::e2e::StorageDaemon;
    use resilver_vhost::front_end::ConnectionConfig;
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    const DEPTH: u16 = 16;
    const BLOCKS: u64 = 1024;

    /// A disk served by QEMU's storage daemon, which knows nothing of us.
    struct Served {
        daemon: Option<StorageDaemon>,
        directory: tempfile::TempDir,
        content: Arc<Content>,
    }

    impl Served {
        fn new() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let content = Arc::new(Content::generate(3, BLOCKS));
            let path = directory.path();
            content.create(&path.join("disk")).unwrap();
            let (disk, socket) = (path.join("disk"), path.join("sock"));
            let daemon = StorageDaemon::serve("load", &disk, &socket, "")?;
            Some(Self { daemon: Some(daemon), directory, content })
        }

        fn load(&self) -> Load {
            let config =
                ConnectionConfig { data_bytes: data_bytes(DEPTH), ..ConnectionConfig::default() };
            let (connection, mut queues) =
                Connection::connect(&self.directory.path().join("sock"), config).unwrap();
            let queue = queues.remove(0);
            Load::start(connection, queue, Arc::clone(&self.content), 9, DEPTH).unwrap()
        }

        fn disk(&self) -> File {
            File::options().read(true).write(true).open(self.directory.path().join("disk")).unwrap()
        }
    }

    fn run_until(load: &Load, done: u64) {
        for _ in 0..30_000 {
            if load.done() >= done || load.has_ended() {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("the load did {} requests in 30 s", load.done());
    }

    #[test]
    fn what_the_load_says_of_the_disk_is_what_is_on_it() {
        let Some(served) = Served::new() else { return };
        let load = served.load();
        run_until(&load, 2000);
        load.enter(Phase::Switching);
        run_until(&load, 4000);
        load.enter(Phase::After);
        let report = load.finish().unwrap();
        let written = report.phases.iter().map(|phase| phase.writes.len()).sum::<u64>();
        assert!(written > 1000);
        assert!(report.phases[Phase::Before as usize].reads.len() > 500);

        // No block has changed but by the writes that the report knows.
        let (mut found, mut expected) = (vec![0; BLOCK], vec![0; BLOCK]);
        for block in 0..BLOCKS {
            let number = resilver_sys::usize_from(block);
            served.disk().read_exact_at(&mut found, block * BLOCK as u64).unwrap();
            served.content.fill(block, report.generations[number], &mut expected).unwrap();
            assert!(found == expected, "block {block}");
        }
        assert!(report.log.iter().all(|write| write.submitted < write.completed));
        assert!(report.log.iter().all(|write| write.completed > report.switch.0));
    }

    #[test]
    fn a_disk_that_changes_by_itself_is_found_out() {
        let Some(served) = Served::new() else { return };
        let load = served.load();
        run_until(&load, 1000);
        let disk = served.disk();
        // One byte of every block, again and again: some of them are read before they are written over.
        for _ in 0..1000 {
            if load.has_ended() {
                break;
            }
            for block in 0..BLOCKS {
                disk.write_all_at(b"x", block * BLOCK as u64 + 100).unwrap();
            }
        }
        let error = load.finish().unwrap_err();
        assert!(matches!(error, LoadError::Mismatch { .. }), "{error}");
    }

    #[test]
    fn a_back_end_that_dies_ends_the_load_with_a_reason() {
        let Some(mut served) = Served::new() else { return };
        let load = served.load();
        run_until(&load, 1000);
        drop(served.daemon.take());
        for _ in 0..10_000 {
            if load.has_ended() {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let error = load.finish().unwrap_err();
        assert!(matches!(error, LoadError::Closed), "{error}");
    }
}
