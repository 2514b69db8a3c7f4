//! `null`: a bdev without a medium. Writes vanish and reads leave the buffers as they are, as SPDK's null bdev does.
//!
//! Why: it measures everything above the medium, and it is the module to copy for a new leaf. A leaf is two types: the
//! control side ([`Null`], a [`Bdev`]), which knows name and size and opens channels, and the data side (`NullChannel`, an
//! [`IoChannel`]), which a reactor polls. All bookkeeping of the data side is in [`Ledger`].
//!
//! Fault model: no I/O fails, except one that does not fit the device. Nothing is zeroed on a read: what a guest sees is
//! what its own buffer held, so nothing of anybody else's leaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use resilver_reactor::Context;
use resilver_sys::BufferSlice;

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Geometry};
use crate::io::{BdevIo, IoKind};
use crate::ledger::Ledger;
use crate::stats::IoStats;

/// Largest read or write, bytes: as the modules with a medium, so that `null` measures the same requests.
const MAX_TRANSFER: u32 = 1 << 20;

/// The control side.
#[derive(Debug)]
pub struct Null {
    name: String,
    block_size: u32,
    num_blocks: AtomicU64,
    stats: Arc<IoStats>,
}

impl Null {
    /// A bdev of `num_blocks` blocks of `block_size` bytes.
    ///
    /// # Errors
    /// A size that [`Geometry::new`] refuses.
    pub fn new(name: &str, block_size: u32, num_blocks: u64) -> Result<Self, BdevError> {
        let geometry = Geometry::new(block_size, num_blocks)?;
        Ok(Self {
            name: name.to_owned(),
            block_size: geometry.block_size,
            num_blocks: AtomicU64::new(geometry.num_blocks),
            stats: Arc::default(),
        })
    }
}

impl Bdev for Null {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "null"
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            block_size: self.block_size,
            num_blocks: self.num_blocks.load(Ordering::Relaxed),
        }
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let geometry = self.geometry();
        let limits = Limits {
            block_size: geometry.block_size,
            num_blocks: geometry.num_blocks,
            max_transfer: MAX_TRANSFER,
            max_segments: crate::SEGMENTS_MAX_U32,
            max_unmap: geometry.size(),
            unmap: true,
            zeroes_unmap: true,
            optimal_io: geometry.block_size,
            read_only: false,
        };
        Ok(Box::new(NullChannel { limits, ledger: Ledger::new(depth) }))
    }

    fn resize(&self, size: u64) -> Result<(), BdevError> {
        let geometry = Geometry::of_size(self.block_size, size)?;
        self.num_blocks.store(geometry.num_blocks, Ordering::Relaxed);
        Ok(())
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

/// The data side.
#[derive(Debug)]
struct NullChannel {
    limits: Limits,
    ledger: Ledger,
}

impl IoChannel for NullChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind)
    }

    fn submit(&mut self, _cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        // Done already, but a submit never completes inline: the parent hears of it from its next poll.
        self.ledger.finish(io.kind, io.tag, self.limits.check(&io, payload));
    }

    fn commit(&mut self, _cx: &Context<'_>) {}

    fn poll(&mut self, _cx: &Context<'_>, done: &mut CompletionBatch) {
        self.ledger.hand_over(done);
    }

    fn works_inline(&self) -> bool {
        true
    }

    fn is_passive(&self) -> bool {
        true
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }
}
