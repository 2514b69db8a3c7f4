//! Channels: reactor-local queue pairs to a bdev.

use std::sync::Arc;

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, WaitSet};

use crate::io::{BdevIo, Completion, IoError, IoKind};

/// A request younger than this is worth polling for: waking a thread takes about as long as a fast disk.
pub const YOUNG: Nanos = Nanos::from_millis(1);

/// What a channel accepts. Fixed while the channel lives; a resize replaces the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a block, a power of two: offsets and lengths are multiples of it.
    pub block_size: u32,
    /// Blocks of the device.
    pub num_blocks: u64,
    /// Largest read or write, bytes.
    pub max_transfer: u32,
    /// Most buffer slices of one read or write.
    pub max_segments: u32,
    /// Largest unmap or write-zeroes, bytes.
    pub max_unmap: u64,
    /// Whether [`IoKind::Unmap`] is worth sending. Sent all the same it succeeds and does nothing.
    pub unmap: bool,
    /// Whether a [`IoKind::WriteZeroes`] that may unmap deallocates.
    pub zeroes_unmap: bool,
    /// The best size and alignment for a copy or a guest, bytes: a hint.
    pub optimal_io: u32,
    /// Writes are refused.
    pub read_only: bool,
}

impl Limits {
    /// Bytes of the device.
    #[must_use]
    #[inline]
    pub fn size(&self) -> u64 {
        self.num_blocks.saturating_mul(u64::from(self.block_size))
    }

    /// The same in blocks of `block_size`, a multiple of these: what a guest that knows larger blocks may ask.
    #[must_use]
    pub fn in_blocks_of(self, block_size: u32) -> Self {
        let block_size = block_size.max(self.block_size);
        Self { block_size, num_blocks: self.size() / u64::from(block_size), ..self }
    }

    /// Whether a range is made of whole blocks. No division: that would take longer than the rest of a request's checks.
    #[inline]
    #[must_use]
    pub fn aligns(&self, offset: u64, length: u64) -> bool {
        debug_assert!(self.block_size.is_power_of_two());
        (offset | length) & (u64::from(self.block_size) - 1) == 0
    }

    /// Whether `io` fits the device: aligned, within its size, writable if it writes. What a guest sends is checked with
    /// this once, at the top.
    #[inline]
    #[must_use]
    pub fn admits(&self, io: &BdevIo) -> bool {
        io.kind == IoKind::Flush
            || (self.aligns(io.offset, io.length)
                && io.offset.checked_add(io.length).is_some_and(|end| end <= self.size()))
    }

    /// What a leaf refuses although its parent should not have sent it: the last check before a medium.
    ///
    /// # Errors
    /// [`IoError::READ_ONLY`], or [`IoError::INVALID`] for what does not fit the device or these limits.
    pub fn check(&self, io: &BdevIo, payload: &[BufferSlice]) -> Result<(), IoError> {
        if self.read_only && io.kind.mutates() {
            return Err(IoError::READ_ONLY);
        }
        let fits = match io.kind {
            IoKind::Read | IoKind::Write => {
                let total: u64 = payload.iter().map(|slice| u64::from(slice.length)).sum();
                total == io.length
                    && io.length <= u64::from(self.max_transfer)
                    && payload.len() <= self.max_segments as usize
            }
            IoKind::Unmap | IoKind::WriteZeroes => io.length <= self.max_unmap,
            IoKind::Flush => true,
        };
        if fits && self.admits(io) { Ok(()) } else { Err(IoError::INVALID) }
    }
}

/// Completions on their way up: a fixed array that is filled by a child's poll and emptied by the parent's.
#[derive(Debug)]
pub struct CompletionBatch {
    items: Box<[Completion]>,
    len: usize,
}

impl CompletionBatch {
    /// A batch for `capacity` completions.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let empty = Completion { tag: crate::io::Tag(u32::MAX), result: Ok(()) };
        Self { items: vec![empty; capacity.max(1)].into_boxed_slice(), len: 0 }
    }

    /// Room left. A child keeps what does not fit for the next poll.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        self.items.len() - self.len
    }

    /// Adds one. Panics without room: a child must ask first.
    #[inline]
    pub fn push(&mut self, completion: Completion) {
        assert!(self.len < self.items.len(), "a completion batch overflows");
        self.items[self.len] = completion;
        self.len += 1;
    }

    /// The completions.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[Completion] {
        &self.items[..self.len]
    }

    /// The `index`th completion, for a parent that changes itself while it walks the batch.
    #[inline]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Completion> {
        self.as_slice().get(index).copied()
    }

    /// Empties the batch.
    #[inline]
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

/// A reactor-local queue pair to one bdev.
///
/// The parent asks [`IoChannel::free`], submits, commits once a turn and polls. What is submitted completes exactly once, in
/// any order, by `poll`; never inside `submit`. Overlapping I/O in flight has no order among itself.
pub trait IoChannel: Send {
    /// What the channel accepts.
    fn limits(&self) -> &Limits;

    /// How many more I/Os of this kind may be submitted now. Kinds may have slots of their own, so that stuck writes do not
    /// take what reads need.
    fn free(&self, kind: IoKind) -> u32;

    /// Takes one I/O. Requires `free(io.kind) > 0` and an I/O within [`Limits`]; may split it inside. `payload` is copied,
    /// the bytes it names are leased or copied before their region can go.
    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]);

    /// Publishes what was submitted: once a turn, at most one system call.
    fn commit(&mut self, cx: &Context<'_>);

    /// Moves things on and hands over what has completed, as much as fits.
    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch);

    /// I/O submitted and not yet handed over as completed.
    fn in_flight(&self) -> u32;

    /// Whether [`Self::commit`] carries reads and writes out, a turn's share of them, on the reactor itself. More of them at once
    /// gain nothing then, and each keeps everybody else of the reactor waiting. A hint.
    fn works_inline(&self) -> bool {
        false
    }

    /// Whether there is nothing for it to do while nothing is in flight, so that its disk need not be polled then. What has to follow
    /// another process says no.
    fn is_passive(&self) -> bool {
        false
    }

    /// Says that payloads will often lie in the first `length` bytes of `pool`, whose content is the parent's alone: a channel to
    /// the kernel has it pinned there once, instead of for each I/O. At most once, and not on a reactor, which pinning would keep
    /// waiting. A hint.
    fn expect_pool(&mut self, pool: &Arc<Mapping>, length: usize) {
        let _ = (pool, length);
    }

    /// The pool that the parent has spoken of goes: no more payloads will lie there.
    fn forget_pool(&mut self) {}

    /// Called on the reactor's thread when the channel has moved in: register memory.
    fn attach(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    /// Called on the reactor's thread before the channel moves out.
    fn detach(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    /// The reactor is about to sleep: as [`resilver_reactor::Poller::arm`]. A channel whose completions cost no
    /// notification answers [`Armed::Ready`] while I/O is in flight.
    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        let _ = (cx, set);
        if self.in_flight() > 0 { Armed::Ready } else { Armed::Until(None) }
    }

    /// The sleep is over.
    fn disarm(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }
}
