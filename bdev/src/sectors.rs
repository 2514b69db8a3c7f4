//! Sectors: a bdev seen in smaller blocks than it has, as a drive of 4096-byte blocks is seen as one of 512 ("512e").
//!
//! Whole blocks go straight through. A read of parts is a read of whole blocks whose edges land in a pad. A write of parts reads
//! the blocks at its edges first and then writes whole blocks, from the guest's own buffers in the middle and from what was
//! read at the edges: nothing is copied. Edges of zeroes are written the same way; edges of a discard are left out, which a
//! discard allows.
//!
//! **Order.** From its first read to the end of its write a partial write excludes every other write of its blocks, or one of two
//! neighbours would be lost. What meets it waits, for older ones only, so there is no cycle; whole writes among themselves
//! need no order.
//!
//! **Capacity.** The base is opened for as many more I/Os as `EDGES` partial writes need, so what is submitted never lacks a slot
//! there; more partial writes than that wait in line. Nothing is allocated after construction.
//!
//! Fault model: the base's. A write fails, and nothing of it was written, if the memory of its payload goes while it waits
//! or an edge cannot be read. As with any drive of this kind a power loss in the middle of a partial write may cost the rest of
//! its blocks.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use resilver_reactor::{Armed, Context};
use resilver_sys::{BufferSlice, Mapping, RegionId, Slices, WaitSet, usize_from};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Detail, Extent, Geometry};
use crate::identity::FileIdentity;
use crate::io::{BdevIo, IoError, IoKind, Tag};
use crate::ledger::Ledger;
use crate::slots::Slots;
use crate::stats::IoStats;

/// Partial writes at work at the same time.
const EDGES: u32 = 32;
/// Completions taken from the base in one turn.
const BATCH: usize = 256;
/// Segments that the edges of a transfer take.
const EDGE_SEGMENTS: u32 = 2;

/// The bits of a tag that say which part of an I/O it is.
const PART_SHIFT: u32 = 2;
const WHOLE: u32 = 0;
const HEAD: u32 = 1;
const TAIL: u32 = 2;

/// The control side: the same bdev, in smaller blocks.
pub struct Sectors {
    base: Arc<dyn Bdev>,
    block_size: u32,
}

impl Sectors {
    /// `base` in blocks of `block_size` bytes, a divisor of its own.
    ///
    /// # Errors
    /// It is none.
    pub fn new(base: Arc<dyn Bdev>, block_size: u32) -> Result<Self, BdevError> {
        let own = base.geometry().block_size;
        Geometry::new(block_size, 1)?;
        if !own.is_multiple_of(block_size) {
            return Err(BdevError::Invalid {
                parameter: "block_size",
                value: block_size.to_string(),
                expected: format!("a divisor of the block size of '{}', {own}", base.name()),
            });
        }
        Ok(Self { base, block_size })
    }

    /// A bdev whose blocks are not larger than `block_size`: `base` itself if its own are not, else a view of it.
    ///
    /// # Errors
    /// As [`Sectors::new`].
    pub fn at_most(base: Arc<dyn Bdev>, block_size: u32) -> Result<Arc<dyn Bdev>, BdevError> {
        if base.geometry().block_size <= block_size {
            return Ok(base);
        }
        Ok(Arc::new(Self::new(base, block_size)?))
    }
}

impl Bdev for Sectors {
    fn name(&self) -> &str {
        self.base.name()
    }

    fn module(&self) -> &'static str {
        self.base.module()
    }

    fn geometry(&self) -> Geometry {
        let own = self.base.geometry();
        let per_block = u64::from(own.block_size / self.block_size);
        Geometry { block_size: self.block_size, num_blocks: own.num_blocks * per_block }
    }

    fn base(&self) -> Option<&Arc<dyn Bdev>> {
        self.base.base()
    }

    fn read_only(&self) -> bool {
        self.base.read_only()
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let base = self.base.open_channel(depth + 2 * EDGES)?;
        Ok(Box::new(SectorChannel::new(base, self.block_size, depth, self.name())?))
    }

    fn extent(&self, offset: u64) -> io::Result<Extent> {
        self.base.extent(offset)
    }

    fn resize(&self, size: u64) -> Result<(), BdevError> {
        self.base.resize(size)
    }

    fn children(&self) -> Vec<Arc<dyn Bdev>> {
        self.base.children()
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.base.identity()
    }

    fn regular_file(&self) -> Option<&Arc<OwnedFd>> {
        self.base.regular_file()
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        let mut details = self.base.details();
        let physical = self.base.geometry().block_size;
        details.push(("physical_block_size", Detail::Number(physical.into())));
        details
    }

    fn stats(&self) -> &Arc<IoStats> {
        self.base.stats()
    }
}

/// Where an I/O is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In line behind older ones, or for buffers.
    Waiting,
    /// Reads its edges.
    Reading,
    /// At work on its blocks.
    Working,
}

/// One I/O.
#[derive(Debug, Clone, Copy)]
struct Op {
    state: State,
    io: BdevIo,
    /// Which came first.
    sequence: u64,
    /// I/Os of the base that have not ended.
    left: u8,
    error: Option<IoError>,
    /// Buffers of its edges.
    unit: Option<u16>,
    /// Where its payload is kept.
    held: Option<u32>,
}

impl Op {
    const FREE: Self = Self {
        state: State::Waiting,
        io: BdevIo { tag: Tag(0), kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 },
        sequence: 0,
        left: 0,
        error: None,
        unit: None,
        held: None,
    };
}

/// A payload between what comes before it and behind it in its blocks.
fn around(before: BufferSlice, payload: &[BufferSlice], behind: BufferSlice) -> Slices {
    std::iter::once(before).chain(payload.iter().copied()).chain([behind]).collect()
}

/// The data side.
struct SectorChannel {
    base: Box<dyn IoChannel>,
    limits: Limits,
    /// Bytes of a block of the base.
    block: u64,
    ledger: Ledger,
    ops: Slots<Op>,
    /// Payloads that cannot be sent yet.
    held: Slots<Slices>,
    /// Changes that have not ended.
    changing: Vec<u32>,
    /// How many of them are partial.
    partial: u32,
    waiting: VecDeque<u32>,
    free_units: Vec<u16>,
    buffers: Arc<Mapping>,
    region: RegionId,
    sequence: u64,
    done: CompletionBatch,
    uncommitted: bool,
}

impl SectorChannel {
    fn new(
        base: Box<dyn IoChannel>,
        block_size: u32,
        depth: u32,
        name: &str,
    ) -> Result<Self, BdevError> {
        let own = *base.limits();
        let lacks = |reason: String| BdevError::Resources { name: name.to_owned(), reason };
        let edges = 2 * own.block_size;
        if own.max_segments <= EDGE_SEGMENTS || own.max_transfer <= edges {
            let reason = "its transfers are too small to be seen in smaller blocks".to_owned();
            return Err(lacks(reason));
        }
        let limits = Limits {
            block_size,
            num_blocks: own.size() / u64::from(block_size),
            max_transfer: own.max_transfer - edges,
            max_segments: own.max_segments - EDGE_SEGMENTS,
            optimal_io: own.optimal_io.max(own.block_size),
            ..own
        };
        // Two blocks for each unit, two to read into that nobody looks at, and one that is always zero.
        let bytes = (2 * u64::from(EDGES) + 3) * u64::from(own.block_size);
        let buffers = Mapping::anonymous(usize_from(bytes)).map_err(|e| lacks(e.to_string()))?;
        #[allow(clippy::cast_possible_truncation)] // a small constant
        Ok(Self {
            base,
            limits,
            block: own.block_size.into(),
            ledger: Ledger::new(depth),
            ops: Slots::new(Ledger::slots(depth), || Op::FREE),
            held: Slots::new(depth as usize, || Slices::NONE),
            changing: Vec::with_capacity(depth as usize),
            partial: 0,
            waiting: VecDeque::with_capacity(depth as usize),
            free_units: (0..EDGES as u16).rev().collect(),
            buffers,
            region: RegionId::NONE,
            sequence: 0,
            done: CompletionBatch::with_capacity(BATCH),
            uncommitted: false,
        })
    }

    /// A part of the buffers: of their `index`th block, from `skip` on.
    fn buffer(&self, index: u64, skip: u64, length: u64) -> BufferSlice {
        #[allow(clippy::cast_possible_truncation)] // within a block
        let length = length as u32;
        BufferSlice { region: self.region, length, offset: index * self.block + skip }
    }

    /// The block that a unit's edge is read into: 0 for the head's, 1 for the tail's.
    fn edge(&self, unit: u16, tail: bool, skip: u64, length: u64) -> BufferSlice {
        self.buffer(2 * u64::from(unit) + u64::from(tail), skip, length)
    }

    fn pad(&self, length: u64) -> BufferSlice {
        self.buffer(2 * u64::from(EDGES), 0, length)
    }

    fn zeroes(&self, length: u64) -> BufferSlice {
        self.buffer(2 * u64::from(EDGES) + 2, 0, length)
    }

    /// The whole blocks that an I/O touches: first byte and end.
    fn outer(&self, io: &BdevIo) -> (u64, u64) {
        let end = io.offset + io.length;
        (io.offset - io.offset % self.block, end.next_multiple_of(self.block))
    }

    /// The whole blocks that lie in an I/O: first byte and end, which is not beyond the first if there are none.
    fn inner(&self, io: &BdevIo) -> (u64, u64) {
        let end = io.offset + io.length;
        (io.offset.next_multiple_of(self.block), end - end % self.block)
    }

    /// Whether it changes a block in part.
    fn is_partial(&self, io: &BdevIo) -> bool {
        let changes = matches!(io.kind, IoKind::Write | IoKind::WriteZeroes);
        changes && self.outer(io) != (io.offset, io.offset + io.length)
    }

    /// Whether an older change must end before this one may begin.
    fn must_wait(&self, slot: u32) -> bool {
        let op = &self.ops[slot];
        let partial = self.is_partial(&op.io);
        if self.partial == 0 {
            return false;
        }
        let (start, end) = self.outer(&op.io);
        self.changing.iter().any(|other| {
            let other = &self.ops[*other];
            let (other_start, other_end) = self.outer(&other.io);
            other.sequence < op.sequence
                && (partial || self.is_partial(&other.io))
                && start < other_end
                && other_start < end
        })
    }

    /// Gives up an I/O that waited, if the memory of its payload went meanwhile: its owner's doing.
    fn payload_gone(&mut self, cx: &Context<'_>, slot: u32, payload: &[BufferSlice]) -> bool {
        let gone = payload.iter().any(|slice| cx.memory.check(*slice).is_err());
        if gone {
            self.ops[slot].error = Some(IoError::FAULT);
            self.end(slot);
        }
        gone
    }

    /// Sends a part of an I/O to the base.
    fn send(
        &mut self,
        cx: &Context<'_>,
        slot: u32,
        part: u32,
        io: BdevIo,
        payload: &[BufferSlice],
    ) {
        self.ops[slot].left += 1;
        let tag = Tag(slot << PART_SHIFT | part);
        self.base.submit(cx, BdevIo { tag, ..io }, payload);
        self.uncommitted = true;
    }

    /// Begins an I/O that waits for nobody; false if there are no buffers for its edges.
    fn begin(&mut self, cx: &Context<'_>, slot: u32, payload: &[BufferSlice]) -> bool {
        let io = self.ops[slot].io;
        if !self.is_partial(&io) {
            self.work(cx, slot, payload);
            return true;
        }
        let Some(unit) = self.free_units.pop() else { return false };
        self.ops[slot].unit = Some(unit);
        self.ops[slot].state = State::Reading;
        self.keep(slot, payload);
        let (start, end) = self.outer(&io);
        let last = end - self.block;
        let tail_partial = !(io.offset + io.length).is_multiple_of(self.block);
        let head_partial = io.offset != start || (tail_partial && last == start);
        let read = |offset| BdevIo {
            kind: IoKind::Read,
            may_unmap: false,
            offset,
            length: self.block,
            ..io
        };
        let (head, tail) = (read(start), read(last));
        if head_partial {
            let into = self.edge(unit, false, 0, self.block);
            self.send(cx, slot, HEAD, head, &[into]);
        }
        if tail_partial && last != start {
            let into = self.edge(unit, true, 0, self.block);
            self.send(cx, slot, TAIL, tail, &[into]);
        }
        true
    }

    /// Keeps a payload until it can be sent.
    fn keep(&mut self, slot: u32, payload: &[BufferSlice]) {
        if payload.is_empty() || self.ops[slot].held.is_some() {
            return;
        }
        // One for each change that may be open.
        let Some(held) = self.held.claim() else { return };
        self.held[held].set(payload);
        self.ops[slot].held = Some(held);
    }

    /// The payload that was kept, if there is one.
    fn kept(&self, slot: u32) -> Slices {
        self.ops[slot].held.map_or(Slices::NONE, |held| self.held[held])
    }

    /// The edges are there, or there are none: the blocks themselves.
    fn work(&mut self, cx: &Context<'_>, slot: u32, payload: &[BufferSlice]) {
        self.ops[slot].state = State::Working;
        let Op { io, unit, .. } = self.ops[slot];
        let (start, end) = self.outer(&io);
        let (before, behind) = (io.offset - start, end - io.offset - io.length);
        match (io.kind, unit) {
            (IoKind::Flush, _) => self.send(cx, slot, WHOLE, io, payload),
            (IoKind::Read, _) => {
                let slices = around(self.pad(before), payload, self.pad(behind));
                let whole = BdevIo { offset: start, length: end - start, ..io };
                self.send(cx, slot, WHOLE, whole, slices.as_slice());
            }
            (IoKind::Unmap, _) => {
                let (start, end) = self.inner(&io);
                if start < end {
                    let whole = BdevIo { offset: start, length: end - start, ..io };
                    self.send(cx, slot, WHOLE, whole, payload);
                } else {
                    self.end(slot);
                }
            }
            (IoKind::Write, Some(unit)) => {
                let one = end - start == self.block;
                let head = self.edge(unit, false, 0, before);
                let tail = self.edge(unit, !one, self.block - behind, behind);
                let slices = around(head, payload, tail);
                let whole = BdevIo { offset: start, length: end - start, ..io };
                self.send(cx, slot, WHOLE, whole, slices.as_slice());
            }
            (IoKind::WriteZeroes, Some(unit)) => self.zero(cx, slot, unit),
            (IoKind::Write | IoKind::WriteZeroes, None) => {
                self.send(cx, slot, WHOLE, io, payload);
            }
        }
    }

    /// Zeroes whole blocks as such, and the edges by writing them.
    fn zero(&mut self, cx: &Context<'_>, slot: u32, unit: u16) {
        let io = self.ops[slot].io;
        let (start, end) = self.outer(&io);
        let (inner_start, inner_end) = self.inner(&io);
        let (before, behind) = (io.offset - start, end - io.offset - io.length);
        let block = self.block;
        let edge =
            |offset| BdevIo { kind: IoKind::Write, may_unmap: false, offset, length: block, ..io };
        if end - start == block {
            let head = self.edge(unit, false, 0, before);
            let tail = self.edge(unit, false, block - behind, behind);
            let slices = around(head, &[self.zeroes(io.length)], tail);
            return self.send(cx, slot, HEAD, edge(start), slices.as_slice());
        }
        if before > 0 {
            let kept = [self.edge(unit, false, 0, before), self.zeroes(block - before)];
            self.send(cx, slot, HEAD, edge(start), &kept);
        }
        if behind > 0 {
            let kept = [self.zeroes(block - behind), self.edge(unit, true, block - behind, behind)];
            self.send(cx, slot, TAIL, edge(end - block), &kept);
        }
        if inner_start < inner_end {
            let whole = BdevIo { offset: inner_start, length: inner_end - inner_start, ..io };
            self.send(cx, slot, WHOLE, whole, &[]);
        }
    }

    /// A part of an I/O has ended.
    fn part_ended(&mut self, cx: &Context<'_>, slot: u32, result: Result<(), IoError>) {
        let op = &mut self.ops[slot];
        op.left -= 1;
        op.error = op.error.or(result.err());
        if op.left > 0 {
            return;
        }
        if op.state == State::Reading && op.error.is_none() {
            let payload = self.kept(slot);
            if !self.payload_gone(cx, slot, payload.as_slice()) {
                self.work(cx, slot, payload.as_slice());
            }
            return;
        }
        self.end(slot);
    }

    /// An I/O is over.
    fn end(&mut self, slot: u32) {
        let Op { io, error, unit, held, .. } = self.ops[slot];
        self.partial -= u32::from(self.is_partial(&io));
        if let Some(at) = self.changing.iter().position(|other| *other == slot) {
            self.changing.swap_remove(at);
        }
        self.free_units.extend(unit);
        if let Some(held) = held {
            self.held.release(held);
        }
        self.ops[slot] = Op::FREE;
        self.ops.release(slot);
        self.ledger.finish(io.kind, io.tag, error.map_or(Ok(()), Err));
    }

    /// Begins what has waited, oldest first, as far as it may.
    fn begin_waiting(&mut self, cx: &Context<'_>) {
        for _ in 0..self.waiting.len() {
            let Some(slot) = self.waiting.pop_front() else { return };
            let payload = self.kept(slot);
            if self.payload_gone(cx, slot, payload.as_slice()) {
                continue;
            }
            if self.must_wait(slot) || !self.begin(cx, slot, payload.as_slice()) {
                self.waiting.push_back(slot);
            }
        }
    }
}

impl IoChannel for SectorChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind)
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        if let Err(error) = self.limits.check(&io, payload) {
            return self.ledger.finish(io.kind, io.tag, Err(error));
        }
        let Some(slot) = self.ops.claim() else {
            return self.ledger.finish(io.kind, io.tag, Err(IoError::INVALID));
        };
        self.sequence += 1;
        self.ops[slot] = Op { io, sequence: self.sequence, ..Op::FREE };
        if io.kind.mutates() {
            self.changing.push(slot);
            self.partial += u32::from(self.is_partial(&io));
        }
        let waits = io.kind.mutates() && self.must_wait(slot);
        if waits || !self.begin(cx, slot, payload) {
            self.keep(slot, payload);
            self.waiting.push_back(slot);
        }
    }

    fn commit(&mut self, cx: &Context<'_>) {
        self.base.commit(cx);
        self.uncommitted = false;
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.done.clear();
        self.base.poll(cx, &mut self.done);
        let mut at = 0;
        while let Some(completion) = self.done.get(at) {
            at += 1;
            self.part_ended(cx, completion.tag.0 >> PART_SHIFT, completion.result);
        }
        if at > 0 && !self.waiting.is_empty() {
            self.begin_waiting(cx);
        }
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn works_inline(&self) -> bool {
        self.base.works_inline()
    }

    fn is_passive(&self) -> bool {
        self.base.is_passive()
    }

    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        self.base.expect_pool(pool, length);
    }

    fn forget_pool(&mut self) {
        self.base.forget_pool();
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.base.attach(cx);
        // Without a place in the table every partial I/O fails with an error of its buffers, which says so.
        self.region = cx.memory.insert(Arc::clone(&self.buffers)).unwrap_or(RegionId::NONE);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        cx.memory.remove(self.region);
        self.region = RegionId::NONE;
        self.base.detach(cx);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if self.uncommitted || self.ledger.has_finished() {
            return Armed::Ready;
        }
        self.base.arm(cx, set)
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        self.base.disarm(cx);
    }
}

#[cfg(test)]
mod tests;
