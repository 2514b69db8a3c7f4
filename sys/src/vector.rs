//! `Vector`: the buffers of one operation, as the kernel reads them, and the leases that keep their memory mapped.
//!
//! Each queue to the kernel keeps one in every slot. The rule of this crate is here: what is leased stays mapped until the
//! queue has reaped the operation's completion and says so with [`Vector::release`].

use crate::region::{BadSlice, BufferSlice, RegionId, RegionTable};
use crate::zeroed::Zeroed;

/// The most buffer slices of one operation.
pub const SEGMENTS: usize = 128;

/// Which way bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
}

/// Leased buffers. One of zeroes is empty: not in use.
pub(crate) struct Vector {
    /// The table that the leases are in.
    table: u64,
    leased: usize,
    regions: [RegionId; SEGMENTS],
    iovecs: [libc::iovec; SEGMENTS],
}

// SAFETY: integers and null pointers.
unsafe impl Zeroed for Vector {}

impl Vector {
    /// Leases every region of the payload and fills the vector; all or nothing. Panics if the payload has more than
    /// [`SEGMENTS`] slices.
    #[inline]
    pub(crate) fn lease(
        &mut self,
        memory: &RegionTable,
        payload: &[BufferSlice],
    ) -> Result<(), BadSlice> {
        assert!(payload.len() <= SEGMENTS, "an operation has more than {SEGMENTS} slices");
        self.table = memory.id();
        self.leased = 0;
        for slice in payload {
            let address = match memory.lease(*slice) {
                Ok(address) => address,
                Err(error) => {
                    self.release(memory);
                    return Err(error);
                }
            };
            self.regions[self.leased] = slice.region;
            self.iovecs[self.leased] =
                libc::iovec { iov_base: address.cast(), iov_len: slice.length as usize };
            self.leased += 1;
        }
        Ok(())
    }

    /// What was leased, for the kernel.
    #[inline]
    pub(crate) fn as_slice(&self) -> &[libc::iovec] {
        &self.iovecs[..self.leased]
    }

    /// The kernel is done with the buffers: gives the leases back. Leases of another table than `memory` stay for good; that
    /// costs a mapping, where a release in the wrong table could cost the safety of another.
    #[inline]
    pub(crate) fn release(&mut self, memory: &RegionTable) {
        if self.table == memory.id() {
            for region in &self.regions[..self.leased] {
                memory.release(*region);
            }
        }
        self.leased = 0;
    }
}
