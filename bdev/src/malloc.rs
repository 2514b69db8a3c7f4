//! `malloc`: a disk in memory, of huge pages where the host has some reserved.
//!
//! One mapping is the medium; every channel enters it in its reactor's region table and copies between it and the buffers.
//! Memory is taken as it is first written, so a disk larger than the host's memory can be made and cannot be filled.
//!
//! Fault model: an I/O whose buffer is not in its region fails with `EFAULT`; no other fails. Nothing survives the process.
//! Writes that overlap in flight from two reactors may interleave, as on any disk.

use std::sync::Arc;

use resilver_reactor::Context;
use resilver_sys::mapping::Backing;
use resilver_sys::{BufferSlice, Mapping, RegionId, RegionTable, usize_from};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::device::{Bdev, BdevError, Detail, Geometry};
use crate::io::{BdevIo, IoError, IoKind};
use crate::ledger::Ledger;
use crate::stats::IoStats;

/// Largest read or write, bytes; copying it takes a reactor some 60 µs, about as long as one turn should.
const MAX_TRANSFER: u32 = 1 << 20;
/// Largest range zeroed at once, bytes, for the same reason.
const MAX_ZEROES: u64 = 1 << 20;

/// The control side.
#[derive(Debug)]
pub struct Malloc {
    name: String,
    geometry: Geometry,
    medium: Arc<Mapping>,
    stats: Arc<IoStats>,
}

impl Malloc {
    /// A zeroed disk of `num_blocks` blocks of `block_size` bytes.
    ///
    /// # Errors
    /// A size that [`Geometry::new`] refuses, or that the host cannot map.
    pub fn new(name: &str, block_size: u32, num_blocks: u64) -> Result<Self, BdevError> {
        let geometry = Geometry::new(block_size, num_blocks)?;
        let medium = Mapping::anonymous(usize_from(geometry.size())).map_err(|error| {
            BdevError::Resources { name: name.to_owned(), reason: error.to_string() }
        })?;
        Ok(Self { name: name.to_owned(), geometry, medium, stats: Arc::default() })
    }
}

impl Bdev for Malloc {
    fn name(&self) -> &str {
        &self.name
    }

    fn module(&self) -> &'static str {
        "malloc"
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_channel(&self, depth: u32) -> Result<Box<dyn IoChannel>, BdevError> {
        let limits = Limits {
            block_size: self.geometry.block_size,
            num_blocks: self.geometry.num_blocks,
            max_transfer: MAX_TRANSFER,
            max_segments: crate::SEGMENTS_MAX_U32,
            max_unmap: MAX_ZEROES,
            unmap: true,
            zeroes_unmap: false,
            optimal_io: self.geometry.block_size,
            read_only: false,
        };
        Ok(Box::new(MallocChannel {
            limits,
            ledger: Ledger::new(depth),
            medium: Arc::clone(&self.medium),
            region: RegionId::NONE,
        }))
    }

    fn details(&self) -> Vec<(&'static str, Detail)> {
        let huge = self.medium.backing() == Backing::HugePages;
        vec![("huge_pages", Detail::Flag(huge))]
    }

    fn stats(&self) -> &Arc<IoStats> {
        &self.stats
    }
}

/// The data side.
#[derive(Debug)]
struct MallocChannel {
    limits: Limits,
    ledger: Ledger,
    medium: Arc<Mapping>,
    /// The medium in this reactor's table, while attached.
    region: RegionId,
}

impl MallocChannel {
    /// Carries out one I/O, now: a copy needs no waiting for.
    fn perform(
        &self,
        memory: &RegionTable,
        io: &BdevIo,
        payload: &[BufferSlice],
    ) -> Result<(), IoError> {
        self.limits.check(io, payload)?;
        match io.kind {
            IoKind::Read | IoKind::Write => self.copy(memory, io, payload),
            IoKind::Flush => Ok(()),
            IoKind::Unmap | IoKind::WriteZeroes => {
                let length = u32::try_from(io.length).map_err(|_| IoError::INVALID)?;
                let range = BufferSlice { region: self.region, length, offset: io.offset };
                memory.fill_zero(range).map_err(|_| IoError::FAULT)
            }
        }
    }

    fn copy(
        &self,
        memory: &RegionTable,
        io: &BdevIo,
        payload: &[BufferSlice],
    ) -> Result<(), IoError> {
        let mut offset = io.offset;
        for slice in payload {
            let medium = BufferSlice { region: self.region, length: slice.length, offset };
            let (to, from) =
                if io.kind == IoKind::Read { (*slice, medium) } else { (medium, *slice) };
            memory.copy(to, from).map_err(|_| IoError::FAULT)?;
            offset = offset.saturating_add(u64::from(slice.length));
        }
        Ok(())
    }
}

impl IoChannel for MallocChannel {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, kind: IoKind) -> u32 {
        self.ledger.free(kind)
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.ledger.admit(io.kind);
        let result = self.perform(cx.memory, &io, payload);
        self.ledger.finish(io.kind, io.tag, result);
    }

    fn commit(&mut self, _cx: &Context<'_>) {}

    fn poll(&mut self, _cx: &Context<'_>, done: &mut CompletionBatch) {
        self.ledger.hand_over(done);
    }

    fn in_flight(&self) -> u32 {
        self.ledger.in_flight()
    }

    fn works_inline(&self) -> bool {
        true
    }

    fn is_passive(&self) -> bool {
        true
    }

    fn attach(&mut self, cx: &Context<'_>) {
        // A full table leaves the region unnamed, and every I/O then fails with EFAULT instead of taking the reactor down.
        self.region = cx.memory.insert(Arc::clone(&self.medium)).unwrap_or(RegionId::NONE);
    }

    fn detach(&mut self, cx: &Context<'_>) {
        cx.memory.remove(self.region);
        self.region = RegionId::NONE;
    }
}
