//! One guest request in flight: a slot that is filled once, handed to the disk in as many parts as the disk's limits make of
//! it, and completed when all parts have ended.
//!
//! This is the one place that splits. A part carries whole blocks, at most `max_transfer` bytes and `max_segments` slices;
//! limits are looked at anew for every part, because a switch-over may change them between two.
//!
//! The life of a slot: free → filled → parts submitted, perhaps waiting for room in between → (a flush, where the write must
//! be durable before it completes) → finished → free. [`Rest`] is what has yet to be submitted; an error empties it, and the
//! slot ends when nothing is outstanding any more.

use resilver_bdev::{BdevIo, IoKind, Limits, Port, SEGMENTS_MAX, Tag};
use resilver_reactor::{Context, Nanos};
use resilver_sys::BufferSlice;

use crate::blk::{Ask, CacheMode, RANGES_MAX, Range, RequestError};
use crate::chain::Chain;
use crate::protocol::SERIAL_BYTES;
use crate::ring::Taken;

/// No slot.
pub(crate) const NO_SLOT: u16 = u16::MAX;

/// What of a request has not been submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rest {
    /// All of it has.
    Nothing,
    /// These bytes, whose buffers begin `skip` bytes into slice `slice`.
    Transfer { offset: u64, left: u64, slice: usize, skip: u32 },
    /// These ranges, but for the first `done` bytes of range `range`.
    Ranges { range: usize, done: u64 },
    /// A flush, alone or behind a write.
    Flush,
}

/// What must follow when all parts have succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// Completion.
    Complete,
    /// A flush first: the guest has not negotiated a way to ask for one.
    Flush,
}

/// A slot for one request.
#[derive(Debug)]
pub(crate) struct Request {
    /// The next slot of the list this one is in: the free list, or one of those that wait.
    pub(crate) next: u16,
    /// How it is given back.
    pub(crate) taken: Taken,
    /// What the guest asked for; what is counted.
    pub(crate) kind: IoKind,
    /// Parts submitted and not ended.
    pub(crate) outstanding: u32,
    pub(crate) rest: Rest,
    pub(crate) result: Result<(), RequestError>,
    afterwards: Afterwards,
    /// When it was taken from the ring.
    pub(crate) started: Nanos,
    /// Bytes of data, for the counters.
    pub(crate) length: u64,
    /// What the device has written if all goes well, the status byte not counted.
    pub(crate) written: u32,
    /// Where the status byte goes.
    pub(crate) status: BufferSlice,
    /// Under which memory map the slices were translated.
    pub(crate) epoch: u32,
    /// How many of `ranges` there are.
    range_count: usize,
    /// How many of `slices` the device writes.
    pub(crate) device_writes: usize,
    slices: Kept,
    ranges: Box<[Range; RANGES_MAX]>,
}

/// Slices that have room beside the rest of their request.
const FEW: usize = 4;
/// Four lines: 128 of them, a deep queue's, are the 32 KiB of a first cache.
const _: () = assert!(size_of::<Request>() <= 256);

/// The slices of a request. Not [`Slices`](resilver_sys::Slices), which have room for the most in themselves: a slot was 2.5 KiB long
/// with it, those of a deep queue were more than a processor's first cache holds and translates, and nearly all requests have few.
#[derive(Debug)]
struct Kept {
    few: [BufferSlice; FEW],
    many: Box<[BufferSlice; SEGMENTS_MAX]>,
    count: usize,
}

impl Kept {
    fn new() -> Self {
        let many = Box::new([BufferSlice::EMPTY; SEGMENTS_MAX]);
        Self { few: [BufferSlice::EMPTY; FEW], many, count: 0 }
    }

    /// Keeps these in the place of others; none where they are too many.
    #[inline]
    fn keep(&mut self, slices: &[BufferSlice]) -> Option<()> {
        match slices {
            [one] => self.few[0] = *one,
            few if few.len() <= FEW => self.few.get_mut(..few.len())?.copy_from_slice(few),
            many => self.many.get_mut(..many.len())?.copy_from_slice(many),
        }
        self.count = slices.len();
        Some(())
    }

    #[inline]
    fn kept(&self) -> &[BufferSlice] {
        let all: &[BufferSlice] = if self.count <= FEW { &self.few } else { &*self.many };
        all.get(..self.count).unwrap_or_default()
    }
}

impl Request {
    /// A free slot.
    pub(crate) fn free(next: u16) -> Self {
        Self {
            next,
            taken: Taken::default(),
            kind: IoKind::Flush,
            outstanding: 0,
            rest: Rest::Nothing,
            result: Ok(()),
            afterwards: Afterwards::Complete,
            started: Nanos::ZERO,
            length: 0,
            written: 0,
            status: BufferSlice::EMPTY,
            epoch: 0,
            range_count: 0,
            device_writes: 0,
            slices: Kept::new(),
            ranges: Box::new([Range::default(); RANGES_MAX]),
        }
    }

    /// Where the parser puts ranges.
    pub(crate) fn ranges_mut(&mut self) -> &mut [Range; RANGES_MAX] {
        &mut self.ranges
    }

    /// Takes on what a chain asks. Its ranges are in place already.
    #[inline(always)]
    pub(crate) fn fill(&mut self, ask: Ask, chain: &Chain, cache: CacheMode) {
        let durable =
            if cache == CacheMode::WriteThrough { Afterwards::Flush } else { Afterwards::Complete };
        (self.written, self.length, self.afterwards) = (0, 0, Afterwards::Complete);
        match ask {
            Ask::Transfer { kind, offset, length } => {
                let slices = if kind == IoKind::Read {
                    // Bounded by the slices of 32 bits each that were gathered; saturates where a guest claims more.
                    self.written = u32::try_from(length).unwrap_or(u32::MAX - 1);
                    chain.writable()
                } else {
                    self.afterwards = durable;
                    chain.readable()
                };
                (self.kind, self.length) = (kind, length);
                self.rest = Rest::Transfer { offset, left: length, slice: 0, skip: 0 };
                self.keep_slices(slices);
                if kind == IoKind::Read && self.result.is_ok() {
                    self.device_writes = slices.len();
                }
                if length == 0 {
                    self.rest = Rest::Nothing;
                }
            }
            Ask::Flush => (self.kind, self.rest) = (IoKind::Flush, Rest::Flush),
            Ask::Ranges { kind, count } => {
                if kind == IoKind::WriteZeroes {
                    self.afterwards = durable;
                }
                (self.kind, self.range_count) = (kind, count);
                let ranges = self.ranges.get(..count).unwrap_or_default();
                self.length =
                    ranges.iter().fold(0, |sum: u64, range| sum.saturating_add(range.length));
                self.rest = Rest::Ranges { range: 0, done: 0 };
                self.skip_empty_ranges();
            }
            Ask::Identify => {
                self.rest = Rest::Nothing;
                // No slice is empty, so no more than these are written to.
                let slices = chain.writable();
                let slices = slices.get(..SERIAL_BYTES).unwrap_or(slices);
                self.device_writes = slices.len();
                self.keep_slices(slices);
            }
        }
    }

    fn keep_slices(&mut self, slices: &[BufferSlice]) {
        if self.slices.keep(slices).is_none() {
            self.fail(RequestError::TooManySegments);
        }
    }

    /// The buffers that the device writes, or has written, the status byte not among them.
    pub(crate) fn written_slices(&self) -> &[BufferSlice] {
        self.slices.kept().get(..self.device_writes).unwrap_or_default()
    }

    /// The first error counts; nothing more is submitted.
    pub(crate) fn fail(&mut self, error: RequestError) {
        if self.result.is_ok() {
            self.result = Err(error);
        }
        self.rest = Rest::Nothing;
    }

    /// The kind of the next part: which of the disk's slots it needs.
    #[inline]
    pub(crate) fn next_kind(&self) -> IoKind {
        if self.rest == Rest::Flush { IoKind::Flush } else { self.kind }
    }

    /// Whether the request has ended: nothing left to submit, nothing outstanding, no flush owed.
    #[inline]
    pub(crate) fn has_ended(&mut self) -> bool {
        if self.outstanding > 0 || self.rest != Rest::Nothing {
            return false;
        }
        if self.afterwards == Afterwards::Flush && self.result.is_ok() && self.length > 0 {
            self.afterwards = Afterwards::Complete;
            self.rest = Rest::Flush;
            return false;
        }
        true
    }

    /// Submits the next part. Requires a free slot of [`Request::next_kind`].
    #[inline(always)]
    pub(crate) fn submit_part(
        &mut self,
        cx: &Context<'_>,
        port: &mut Port<'_>,
        tag: Tag,
        scratch: &mut [BufferSlice; SEGMENTS_MAX],
    ) {
        let limits = port.limits();
        let nothing =
            BdevIo { tag, kind: self.next_kind(), may_unmap: false, offset: 0, length: 0 };
        match self.rest {
            Rest::Nothing => {}
            Rest::Flush => {
                self.rest = Rest::Nothing;
                self.outstanding += 1;
                port.submit(cx, nothing, &[]);
            }
            Rest::Transfer { offset, left, slice: 0, skip: 0 }
                if left <= u64::from(limits.max_transfer)
                    && self.slices.count <= limits.max_segments as usize =>
            {
                let io = BdevIo { offset, length: left, ..nothing };
                self.rest = Rest::Nothing;
                let slices = self.slices.kept();
                submit(cx, port, io, slices, &mut self.outstanding, &mut self.result);
            }
            Rest::Transfer { offset, .. } => match self.cut(limits, scratch) {
                Some((length, slices)) => {
                    let io = BdevIo { offset, length, ..nothing };
                    let slices = scratch.get(..slices).unwrap_or_default();
                    submit(cx, port, io, slices, &mut self.outstanding, &mut self.result);
                }
                None => self.fail(RequestError::TooManySegments),
            },
            Rest::Ranges { range, done } => self.submit_range(cx, port, nothing, range, done),
        }
        if self.result.is_err() {
            self.rest = Rest::Nothing;
        }
    }

    /// Cuts the next part off a transfer: as many whole blocks as the limits allow, its slices in `scratch`. Answers its
    /// length and its slices; none where not even one block can be had.
    fn cut(
        &mut self,
        limits: &Limits,
        scratch: &mut [BufferSlice; SEGMENTS_MAX],
    ) -> Option<(u64, usize)> {
        let Rest::Transfer { offset, left, slice, skip } = self.rest else { return None };
        let mut length = self.part_length(limits, left, slice, skip);
        length -= length % u64::from(limits.block_size);
        if length == 0 {
            return None;
        }
        let (mut slice, mut skip, mut wanted, mut count) = (slice, skip, length, 0);
        while wanted > 0 {
            let from = self.slices.kept().get(slice)?;
            let rest = from.length - skip;
            let take = u32::try_from(wanted).map_or(rest, |wanted| wanted.min(rest));
            *scratch.get_mut(count)? = from.part(skip, take)?;
            count += 1;
            wanted -= u64::from(take);
            if take == rest {
                (slice, skip) = (slice + 1, 0);
            } else {
                skip += take;
            }
        }
        let left = left - length;
        self.rest = match left {
            0 => Rest::Nothing,
            left => Rest::Transfer { offset: offset.checked_add(length)?, left, slice, skip },
        };
        Some((length, count))
    }

    /// How many bytes the next part could carry.
    fn part_length(&self, limits: &Limits, left: u64, slice: usize, skip: u32) -> u64 {
        let segments = (limits.max_segments as usize).min(SEGMENTS_MAX);
        let slices = self.slices.kept().iter().skip(slice).take(segments);
        let bytes: u64 = slices.map(|slice| u64::from(slice.length)).sum();
        bytes.saturating_sub(u64::from(skip)).min(left).min(u64::from(limits.max_transfer))
    }

    fn submit_range(
        &mut self,
        cx: &Context<'_>,
        port: &mut Port<'_>,
        io: BdevIo,
        range: usize,
        done: u64,
    ) {
        let limits = *port.limits();
        let block = u64::from(limits.block_size);
        let most = (limits.max_unmap - limits.max_unmap % block).max(block);
        let Some(Range { offset, length, may_unmap }) = self.ranges.get(range).copied() else {
            return self.fail(RequestError::OutOfRange);
        };
        let part = length.saturating_sub(done).min(most);
        let io = BdevIo { may_unmap, offset: offset + done, length: part, ..io };
        self.rest = if done + part < length {
            Rest::Ranges { range, done: done + part }
        } else {
            Rest::Ranges { range: range + 1, done: 0 }
        };
        self.skip_empty_ranges();
        submit(cx, port, io, &[], &mut self.outstanding, &mut self.result);
    }

    /// Moves past ranges of no length; the last one ends the request.
    fn skip_empty_ranges(&mut self) {
        let Rest::Ranges { range, done: 0 } = self.rest else { return };
        let ranges = self.ranges.get(range..self.range_count).unwrap_or_default();
        self.rest = match ranges.iter().position(|range| range.length > 0) {
            Some(empty) => Rest::Ranges { range: range + empty, done: 0 },
            None => Rest::Nothing,
        };
    }
}

/// Submits a part if the disk still has that range: a resize may have come between.
#[inline]
fn submit(
    cx: &Context<'_>,
    port: &mut Port<'_>,
    io: BdevIo,
    slices: &[BufferSlice],
    outstanding: &mut u32,
    result: &mut Result<(), RequestError>,
) {
    if port.limits().admits(&io) {
        *outstanding += 1;
        port.submit(cx, io, slices);
    } else if result.is_ok() {
        *result = Err(RequestError::OutOfRange);
    }
}
