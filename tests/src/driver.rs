//! A driver of one bdev channel: what a disk does on a reactor, turn by turn, in the hands of a test.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use resilver_bdev::{Bdev, BdevIo, CompletionBatch, IoChannel, IoError, IoKind, Limits, Tag};
use resilver_reactor::{Clock, Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, RegionId, RegionTable};

/// Bytes of the memory that payloads are slices of.
const MEMORY: usize = 4 << 20;
/// How long anything may take before a test is given up as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// How requests ended, by tag.
pub type Results = HashMap<Tag, Result<(), IoError>>;

/// A channel, memory for its payloads, and the turns of a reactor.
pub struct Driver {
    memory: RegionTable,
    region: RegionId,
    mapping: Arc<Mapping>,
    channel: Box<dyn IoChannel>,
    batch: CompletionBatch,
    clock: Clock,
    results: Results,
    next_tag: u32,
}

impl Driver {
    /// Opens a channel of `depth` and attaches it.
    ///
    /// # Panics
    /// If the channel cannot be had; as everything here, because it is a test's.
    #[must_use]
    pub fn new(bdev: &dyn Bdev, depth: u32) -> Self {
        Self::with_memory(bdev, depth, MEMORY)
    }

    /// The same, with so many bytes of memory for payloads: many drivers one after the other are cheaper with less.
    ///
    /// # Panics
    /// As [`Driver::new`].
    #[must_use]
    pub fn with_memory(bdev: &dyn Bdev, depth: u32, memory: usize) -> Self {
        Self::build(bdev, depth, 256, memory)
    }

    /// The same, with room for `batch` completions a turn.
    ///
    /// # Panics
    /// As [`Driver::new`].
    #[must_use]
    pub fn with_batch(bdev: &dyn Bdev, depth: u32, batch: usize) -> Self {
        Self::build(bdev, depth, batch, MEMORY)
    }

    fn build(bdev: &dyn Bdev, depth: u32, batch: usize, bytes: usize) -> Self {
        let memory = RegionTable::with_capacity(16);
        let mapping = Mapping::anonymous(bytes).expect("memory for payloads");
        let region = memory.insert(Arc::clone(&mapping)).expect("an empty table has room");
        let channel = bdev.open_channel(depth).expect("the channel opens");
        let mut driver = Self {
            memory,
            region,
            mapping,
            channel,
            batch: CompletionBatch::with_capacity(batch),
            clock: Clock::monotonic(),
            results: Results::new(),
            next_tag: 0,
        };
        let now = driver.now();
        driver.channel.attach(&Context { now, memory: &driver.memory });
        driver
    }

    /// Tells the channel that payloads are often in the first `length` bytes of this memory.
    pub fn expect_pool(&mut self, length: usize) {
        self.channel.expect_pool(&self.mapping, length);
    }

    /// Tells it that they no longer are.
    pub fn forget_pool(&mut self) {
        self.channel.forget_pool();
    }

    /// What the channel accepts.
    #[must_use]
    pub fn limits(&self) -> Limits {
        *self.channel.limits()
    }

    /// As [`IoChannel::free`].
    #[must_use]
    pub fn free(&self, kind: IoKind) -> u32 {
        self.channel.free(kind)
    }

    /// As [`IoChannel::in_flight`].
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.channel.in_flight()
    }

    /// Leases on the payloads' memory.
    #[must_use]
    pub fn leases(&self) -> u32 {
        self.memory.leases(self.region)
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Nanos {
        self.clock.now()
    }

    /// The `length` bytes at `offset` of the payloads' memory.
    #[must_use]
    pub fn slice(&self, offset: u64, length: u32) -> BufferSlice {
        BufferSlice { region: self.region, length, offset }
    }

    /// Fills a payload with [`pattern`].
    ///
    /// # Panics
    /// If a slice is bad.
    pub fn fill(&self, payload: &[BufferSlice], seed: u64) {
        let bytes = pattern(seed, payload.iter().map(|slice| slice.length).sum());
        let mut rest = bytes.as_slice();
        for slice in payload {
            let (part, after) = rest.split_at(slice.length as usize);
            self.memory.write(*slice, part).expect("a good slice");
            rest = after;
        }
    }

    /// Fills a payload with bytes that no pattern has for long.
    ///
    /// # Panics
    /// If a slice is bad.
    pub fn clear(&self, payload: &[BufferSlice]) {
        for slice in payload {
            let bytes = vec![0xa5; slice.length as usize];
            self.memory.write(*slice, &bytes).expect("a good slice");
        }
    }

    /// The bytes of a payload.
    ///
    /// # Panics
    /// If a slice is bad.
    #[must_use]
    pub fn bytes(&self, payload: &[BufferSlice]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for slice in payload {
            let start = bytes.len();
            bytes.resize(start + slice.length as usize, 0);
            self.memory.read(*slice, &mut bytes[start..]).expect("a good slice");
        }
        bytes
    }

    /// Submits one I/O, without a turn.
    pub fn submit(
        &mut self,
        kind: IoKind,
        offset: u64,
        length: u64,
        payload: &[BufferSlice],
    ) -> Tag {
        self.submit_io(kind, false, offset, length, payload)
    }

    /// Submits a write-zeroes.
    pub fn submit_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> Tag {
        self.submit_io(IoKind::WriteZeroes, may_unmap, offset, length, &[])
    }

    fn submit_io(
        &mut self,
        kind: IoKind,
        may_unmap: bool,
        offset: u64,
        length: u64,
        payload: &[BufferSlice],
    ) -> Tag {
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        let now = self.now();
        let cx = Context { now, memory: &self.memory };
        self.channel.submit(&cx, BdevIo { tag, kind, may_unmap, offset, length }, payload);
        tag
    }

    /// One turn: commit, poll. How many I/Os ended.
    ///
    /// # Panics
    /// If a tag comes twice.
    pub fn turn(&mut self) -> u32 {
        let now = self.now();
        let cx = Context { now, memory: &self.memory };
        self.channel.commit(&cx);
        self.batch.clear();
        self.channel.poll(&cx, &mut self.batch);
        for completion in self.batch.as_slice() {
            let before = self.results.insert(completion.tag, completion.result);
            assert_eq!(before, None, "{:?} ended twice", completion.tag);
        }
        u32::try_from(self.batch.as_slice().len()).unwrap_or(u32::MAX)
    }

    /// Turns until nothing is in flight; everything that ended since the last drain.
    ///
    /// # Panics
    /// If it takes for ever.
    pub fn drain(&mut self) -> Results {
        let start = Instant::now();
        while self.in_flight() > 0 {
            if self.turn() == 0 {
                std::thread::yield_now();
            }
            assert!(start.elapsed() < PATIENCE, "{} I/Os never end", self.in_flight());
        }
        std::mem::take(&mut self.results)
    }

    /// Everything that ended since the last drain, without a turn.
    pub fn take_results(&mut self) -> Results {
        std::mem::take(&mut self.results)
    }

    /// One I/O from submission to completion; nothing else may be in flight.
    ///
    /// # Errors
    /// The I/O's.
    ///
    /// # Panics
    /// If it never ends.
    pub fn run(
        &mut self,
        kind: IoKind,
        offset: u64,
        length: u64,
        payload: &[BufferSlice],
    ) -> Result<(), IoError> {
        let tag = self.submit(kind, offset, length, payload);
        self.drain().remove(&tag).expect("the I/O ended")
    }

    /// Reads into the payload.
    ///
    /// # Errors
    /// The I/O's.
    pub fn read(&mut self, offset: u64, payload: &[BufferSlice]) -> Result<(), IoError> {
        self.run(IoKind::Read, offset, total(payload), payload)
    }

    /// Writes the payload.
    ///
    /// # Errors
    /// The I/O's.
    pub fn write(&mut self, offset: u64, payload: &[BufferSlice]) -> Result<(), IoError> {
        self.run(IoKind::Write, offset, total(payload), payload)
    }

    /// The channel and what it is lent, for what the methods above do not cover.
    pub fn channel(&mut self) -> (&mut dyn IoChannel, Context<'_>) {
        let now = self.now();
        (self.channel.as_mut(), Context { now, memory: &self.memory })
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let now = self.now();
        self.channel.detach(&Context { now, memory: &self.memory });
    }
}

fn total(payload: &[BufferSlice]) -> u64 {
    payload.iter().map(|slice| u64::from(slice.length)).sum()
}

/// Bytes that differ with every seed and position, so that a block in the wrong place shows.
#[must_use]
pub fn pattern(seed: u64, length: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length as usize + 8);
    let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < length as usize {
        word = word.wrapping_mul(0xd129_42b6_8a4c_2f4d).wrapping_add(0x1405_7b7e_f767_814f);
        bytes.extend_from_slice(&(word ^ word >> 29).to_le_bytes());
    }
    bytes.truncate(length as usize);
    bytes
}
