//! The data side of a `uring` bdev: requests in slots, one kernel operation of each at a time.
//!
//! A request goes through steps: wait for bounce memory where its buffers need it, then one operation, which is pushed again
//! for the rest of a short transfer or after an interruption, or followed by the next thing to try of its
//! [plan](super::ranges). [`judge`] decides, from the step and the kernel's answer alone.
//!
//! Fault model: the file may be shortened or its device may fail under us: a transfer that moves nothing is `EIO`, as is a
//! direct one that ends off its alignment. A full file system answers `ENOSPC`, which goes up as it is. Buffers whose
//! region is gone while their request waits for bounce memory, or when a bounced read is copied back, are `EFAULT`. An
//! operation that never ends keeps its slot, its leases and its chunks for ever; the others go on.

use std::collections::VecDeque;
use std::sync::Arc;

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BadSlice, BufferSlice, Direction, Mapping, RegionTable, Slices, WaitSet};

use super::engine::Queues;
use super::file::{Alignment, FileKind};
use super::ranges::{Lacking, RangeStep, plan, says_unsupported};
use crate::SEGMENTS_MAX;
use crate::bounce::{Bounce, CHUNK, CHUNKS_MAX, Chunks};
use crate::channel::{CompletionBatch, IoChannel, Limits, YOUNG};
use crate::io::{BdevIo, IoError, IoKind, Tag};
use crate::ledger::Ledger;
use crate::slots::Slots;

/// Largest read or write, bytes: what the chunks of one request hold.
pub(super) const MAX_TRANSFER: u32 = 1 << 20;
/// Largest unmap or write-zeroes, bytes: bounds how long one keeps its slot where zeroes have to be written.
pub(super) const MAX_RANGE: u64 = 1 << 30;

const _: () = assert!(SEGMENTS_MAX == resilver_sys::SEGMENTS);
const _: () = assert!(CHUNKS_MAX <= SEGMENTS_MAX);
const _: () = assert!(MAX_TRANSFER as usize == CHUNK as usize * CHUNKS_MAX);

/// What a request is doing.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Nothing: the slot is free, or not started.
    Idle,
    /// Waiting for bounce memory.
    Waiting,
    /// A read or write, where its buffers are.
    Direct,
    /// A read or write through the bounce pool.
    Bounced,
    /// A flush.
    Sync,
    /// A range without data: the first step of the rest of its plan.
    Range(&'static [RangeStep]),
}

/// One I/O of the parent.
struct Request {
    io: BdevIo,
    step: Step,
    /// Bytes transferred.
    done: u64,
    chunks: Chunks,
}

impl Request {
    fn new() -> Self {
        let io =
            BdevIo { tag: Tag(0), kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 };
        Self { io, step: Step::Idle, done: 0, chunks: Chunks::NONE }
    }

    fn direction(&self) -> Direction {
        if self.io.kind == IoKind::Read { Direction::Read } else { Direction::Write }
    }
}

/// What follows an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The request has ended.
    Ended(Result<(), IoError>),
    /// Push the step again, for what is left.
    Again,
    /// Go on with the next step of the plan.
    Onward,
}

/// Decides what follows. `done` counts this operation's bytes already; `granule` is what transfers are multiples of.
fn judge(step: Step, result: i32, done: u64, length: u64, granule: u32) -> Verdict {
    const EINTR: i32 = 4;
    const EAGAIN: i32 = 11;
    if result < 0 {
        let errno = result.saturating_neg();
        return match (errno, step) {
            (EINTR | EAGAIN, _) => Verdict::Again,
            (errno, Step::Range([RangeStep::Try(_), ..])) if says_unsupported(errno) => {
                Verdict::Onward
            }
            (errno, _) => Verdict::Ended(Err(IoError::from_errno(errno))),
        };
    }
    match step {
        Step::Direct | Step::Bounced | Step::Range([RangeStep::Fill, ..]) => {
            if result == 0 {
                Verdict::Ended(Err(IoError::IO)) // behind the end of a file that was shortened
            } else if done >= length {
                Verdict::Ended(Ok(()))
            } else if done.is_multiple_of(u64::from(granule)) {
                Verdict::Again
            } else {
                Verdict::Ended(Err(IoError::IO)) // the same, across its new end
            }
        }
        Step::Sync | Step::Range(_) => Verdict::Ended(Ok(())),
        Step::Idle | Step::Waiting => Verdict::Ended(Err(IoError::IO)), // never in the kernel
    }
}

/// The data side.
pub(super) struct UringChannel {
    limits: Limits,
    ledger: Ledger,
    queues: Queues,
    requests: Slots<Request>,
    /// What each request carries, by its slot.
    payloads: Box<[Slices]>,
    /// Requests that wait for bounce memory, oldest first.
    waiting: VecDeque<u32>,
    bounce: Bounce,
    alignment: Alignment,
    file: FileKind,
    lacking: Lacking,
    /// When the last I/O came in.
    youngest: Nanos,
    /// Completions of one poll, and buffers of one operation: room made once.
    reaped: Vec<(u32, i32)>,
    gathered: Box<[BufferSlice; SEGMENTS_MAX]>,
}

/// What the control side knows.
pub(super) struct Parts {
    pub(super) limits: Limits,
    pub(super) queues: Queues,
    pub(super) bounce: Bounce,
    pub(super) alignment: Alignment,
    pub(super) file: FileKind,
}

impl UringChannel {
    pub(super) fn new(depth: u32, parts: Parts) -> Self {
        let slots = Ledger::slots(depth);
        Self {
            lacking: Lacking::new(parts.limits.unmap),
            limits: parts.limits,
            ledger: Ledger::new(depth),
            queues: parts.queues,
            requests: Slots::new(slots, Request::new),
            payloads: Slices::array(slots),
            waiting: VecDeque::with_capacity(slots),
            bounce: parts.bounce,
            alignment: parts.alignment,
            file: parts.file,
            youngest: Nanos::ZERO,
            reaped: Vec::with_capacity(slots),
            gathered: Box::new([BufferSlice::EMPTY; SEGMENTS_MAX]),
        }
    }

    /// Begins a request whose slot is filled.
    fn start(&mut self, memory: &RegionTable, slot: u32) {
        let request = &self.requests[slot];
        let step = match request.io.kind {
            IoKind::Read | IoKind::Write
                if self.fits_direct(memory, self.payloads[slot as usize].as_slice()) =>
            {
                Step::Direct
            }
            IoKind::Read | IoKind::Write => {
                self.requests[slot].step = Step::Waiting;
                self.waiting.push_back(slot);
                return self.serve_waiting(memory);
            }
            IoKind::Flush => Step::Sync,
            IoKind::Unmap | IoKind::WriteZeroes => {
                Step::Range(self.lacking.feasible(plan(self.file, &request.io)))
            }
        };
        self.requests[slot].step = step;
        self.push(memory, slot);
    }

    /// Whether the kernel can use the buffers where they are. A bad slice can: pushing it finds out.
    fn fits_direct(&self, memory: &RegionTable, payload: &[BufferSlice]) -> bool {
        let Alignment { memory: align, offset } = self.alignment;
        offset == 1
            || payload.iter().all(|slice| {
                slice.length.is_multiple_of(offset)
                    && memory.misalignment(*slice, align).unwrap_or(0) == 0
            })
    }

    /// Gives bounce memory to those that wait, in their order.
    fn serve_waiting(&mut self, memory: &RegionTable) {
        while let Some(slot) = self.waiting.front().copied() {
            let length = u32::try_from(self.requests[slot].io.length).unwrap_or(u32::MAX);
            let Some(chunks) = self.bounce.take(length) else { break };
            self.waiting.pop_front();
            let request = &mut self.requests[slot];
            request.chunks = chunks;
            request.step = Step::Bounced;
            let copied = match request.io.kind {
                IoKind::Write => self.bounce.pair(
                    &chunks,
                    self.payloads[slot as usize].as_slice(),
                    |guest, pool| memory.copy(pool, guest),
                ),
                _ => Ok(()),
            };
            match copied {
                Ok(()) => self.push(memory, slot),
                Err(_) => self.end(memory, slot, Err(IoError::FAULT)),
            }
        }
    }

    /// Pushes the request's step, from where it is.
    fn push(&mut self, memory: &RegionTable, slot: u32) {
        match self.try_push(memory, slot) {
            Ok(()) => {}
            Err(_) => self.end(memory, slot, Err(IoError::FAULT)),
        }
    }

    fn try_push(&mut self, memory: &RegionTable, slot: u32) -> Result<(), BadSlice> {
        let request = &self.requests[slot];
        let gathered = self.gathered.as_mut_slice();
        let at = request.io.offset.saturating_add(request.done);
        let left = request.io.length.saturating_sub(request.done);
        match request.step {
            Step::Direct if request.done == 0 => {
                let (direction, payload) =
                    (request.direction(), self.payloads[slot as usize].as_slice());
                return self.queues.push_transfer(memory, slot, direction, at, payload);
            }
            Step::Direct => {
                let count = skip(self.payloads[slot as usize].as_slice(), request.done, gathered);
                let (direction, rest) = (request.direction(), &gathered[..count]);
                return self.queues.push_transfer(memory, slot, direction, at, rest);
            }
            Step::Bounced => {
                // Both fit: a transfer is at most MAX_TRANSFER long.
                let from = u32::try_from(request.done).unwrap_or(u32::MAX);
                let to = u32::try_from(request.io.length).unwrap_or(u32::MAX);
                let count = self.bounce.gather(&request.chunks, from, to, gathered);
                let (direction, pool) = (request.direction(), &gathered[..count]);
                return self.queues.push_transfer(memory, slot, direction, at, pool);
            }
            Step::Range([RangeStep::Fill, ..]) => {
                let count = self.bounce.zeroes(left, &mut gathered[..CHUNKS_MAX]);
                let zeroes = &gathered[..count];
                return self.queues.push_transfer(memory, slot, Direction::Write, at, zeroes);
            }
            Step::Range([RangeStep::Try(operation), ..]) => {
                self.queues.push_range(slot, *operation, at, left);
            }
            Step::Sync => self.queues.push_sync(slot),
            Step::Range([RangeStep::Nothing, ..] | []) | Step::Idle | Step::Waiting => {
                self.end(memory, slot, Ok(()));
            }
        }
        Ok(())
    }

    /// An operation has ended.
    fn advance(&mut self, memory: &RegionTable, slot: u32, result: i32) {
        let granule = self.alignment.offset;
        let request = &mut self.requests[slot];
        let transfers = matches!(
            request.step,
            Step::Direct | Step::Bounced | Step::Range([RangeStep::Fill, ..])
        );
        if transfers {
            request.done += u64::try_from(result).unwrap_or(0);
        }
        match judge(request.step, result, request.done, request.io.length, granule) {
            Verdict::Ended(result) => self.end(memory, slot, result),
            Verdict::Again => self.push(memory, slot),
            Verdict::Onward => {
                if let Step::Range([RangeStep::Try(operation), rest @ ..]) = request.step {
                    self.lacking.note(*operation);
                    request.step = Step::Range(self.lacking.feasible(rest));
                }
                self.push(memory, slot);
            }
        }
    }

    /// The request has ended: what it held goes back, and its completion waits to be handed over.
    fn end(&mut self, memory: &RegionTable, slot: u32, mut result: Result<(), IoError>) {
        let request = &mut self.requests[slot];
        if matches!(request.step, Step::Bounced) {
            if request.io.kind == IoKind::Read && result.is_ok() {
                let copied = self.bounce.pair(
                    &request.chunks,
                    self.payloads[slot as usize].as_slice(),
                    |guest, pool| memory.copy(guest, pool),
                );
                result = copied.map_err(|_| IoError::FAULT);
            }
            self.bounce.give_back(request.chunks);
        }
        request.step = Step::Idle;
        let (kind, tag) = (request.io.kind, request.io.tag);
        self.requests.release(slot);
        self.ledger.finish(kind, tag, result);
    }
}

/// The payload without its first `done` bytes; how many slices are left.
fn skip(payload: &[BufferSlice], mut done: u64, into: &mut [BufferSlice]) -> usize {
    let mut count = 0;
    for slice in payload {
        let cut = u32::try_from(done).unwrap_or(u32::MAX).min(slice.length);
        done -= u64::from(cut);
        if let Some(part) = slice.part(cut, slice.length - cut).filter(|part| part.length > 0) {
            into[count] = part;
            count += 1;
        }
    }
    count
}

impl IoChannel for UringChannel {
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
        let nothing = io.length == 0 && io.kind != IoKind::Flush;
        let slot = if nothing { None } else { self.requests.claim() };
        // There are as many slots as the ledger admits, so only an I/O of no bytes has none; it is done.
        let Some(slot) = slot else { return self.ledger.finish(io.kind, io.tag, Ok(())) };
        let request = &mut self.requests[slot];
        request.io = io;
        request.done = 0;
        self.payloads[slot as usize].set(payload);
        self.youngest = cx.now;
        self.start(cx.memory, slot);
    }

    fn commit(&mut self, _cx: &Context<'_>) {
        self.queues.commit();
    }

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        if self.queues.has_completions() {
            let mut reaped = std::mem::take(&mut self.reaped);
            self.queues.reap(cx.memory, |slot, result| reaped.push((slot, result)));
            for (slot, result) in reaped.drain(..) {
                self.advance(cx.memory, slot, result);
            }
            self.reaped = reaped;
            self.serve_waiting(cx.memory);
        }
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn works_inline(&self) -> bool {
        self.queues.work_inline()
    }

    fn is_passive(&self) -> bool {
        true
    }

    /// A refusal (this user may not have so much pinned) costs time, and nothing else.
    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        let _ = self.queues.register(pool, length);
    }

    fn forget_pool(&mut self) {
        self.queues.forget_pool();
    }

    fn attach(&mut self, cx: &Context<'_>) {
        self.bounce.attach(cx.memory);
        self.queues.keep_workers_off_this_core();
    }

    fn detach(&mut self, cx: &Context<'_>) {
        self.bounce.detach(cx.memory);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if self.ledger.in_flight() == 0 {
            return Armed::Until(None);
        }
        let ready = self.ledger.has_finished()
            || self.queues.want_polling()
            || cx.now - self.youngest < YOUNG;
        if ready {
            return Armed::Ready;
        }
        // Readable from the moment a completion is there, also one that came in since we looked.
        set.add(&self.queues);
        Armed::Until(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use resilver_sys::uring::RangeOp;

    const TRY: Step = Step::Range(&[RangeStep::Try(RangeOp::PunchHole), RangeStep::Fill]);
    const FILL: Step = Step::Range(&[RangeStep::Fill]);

    #[test]
    fn a_short_transfer_goes_on_and_an_empty_one_is_an_error() {
        for step in [Step::Direct, Step::Bounced, FILL] {
            assert_eq!(judge(step, 4096, 4096, 8192, 512), Verdict::Again);
            assert_eq!(judge(step, 4096, 8192, 8192, 512), Verdict::Ended(Ok(())));
            assert_eq!(judge(step, 0, 4096, 8192, 512), Verdict::Ended(Err(IoError::IO)));
            assert_eq!(judge(step, 100, 100, 8192, 512), Verdict::Ended(Err(IoError::IO)));
            assert_eq!(judge(step, 100, 100, 8192, 1), Verdict::Again);
        }
    }

    #[test]
    fn an_interruption_is_repeated_and_an_error_is_the_answer() {
        for step in [Step::Direct, Step::Bounced, Step::Sync, TRY, FILL] {
            assert_eq!(judge(step, -4, 0, 8192, 512), Verdict::Again);
            assert_eq!(judge(step, -11, 0, 8192, 512), Verdict::Again);
            assert_eq!(judge(step, -28, 0, 8192, 512), Verdict::Ended(Err(IoError::NO_SPACE)));
        }
    }

    #[test]
    fn only_a_step_with_an_alternative_goes_on_where_something_is_not_supported() {
        assert_eq!(judge(TRY, -95, 0, 8192, 512), Verdict::Onward);
        for step in [Step::Direct, Step::Bounced, Step::Sync, FILL] {
            assert_eq!(judge(step, -95, 0, 8192, 512), Verdict::Ended(Err(IoError::NOT_SUPPORTED)));
        }
    }

    #[test]
    fn the_rest_of_a_payload_begins_inside_a_slice() {
        let slice = |offset, length| BufferSlice { length, offset, ..BufferSlice::EMPTY };
        let mut into = [BufferSlice::EMPTY; 4];
        let count = skip(&[slice(0, 512), slice(4096, 1024), slice(9000, 1)], 1024, &mut into);
        assert_eq!(into[..count], [slice(4608, 512), slice(9000, 1)]);
    }
}
