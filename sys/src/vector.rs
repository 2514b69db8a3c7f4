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

/// Whether the kernel may be using a vector, or the slot that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum State {
    Idle = 0,
    Busy,
}

/// Leased buffers. One of zeroes is idle and empty.
pub(crate) struct Vector {
    state: State,
    /// The table that the leases are in.
    table: u64,
    leased: usize,
    regions: [RegionId; SEGMENTS],
    iovecs: [libc::iovec; SEGMENTS],
}

// SAFETY: idle, integers and null pointers.
unsafe impl Zeroed for Vector {}

impl Vector {
    /// Panics if the kernel may be using it: a slot's owner knows better than to push to a slot that it has not reaped.
    #[inline]
    pub(crate) fn assert_idle(&self) {
        assert!(self.state == State::Idle, "a slot was used while the kernel has it");
    }

    /// The kernel has it from here on, whether anything is leased (a transfer) or not.
    #[inline]
    pub(crate) fn occupy(&mut self) {
        self.state = State::Busy;
    }

    /// Leases every region of the payload and fills the vector; all or nothing. Panics if the payload has more than
    /// [`SEGMENTS`] slices, or the vector is not idle.
    #[inline]
    pub(crate) fn lease(
        &mut self,
        memory: &RegionTable,
        payload: &[BufferSlice],
    ) -> Result<(), BadSlice> {
        self.assert_idle();
        assert!(payload.len() <= SEGMENTS, "an operation has more than {SEGMENTS} slices");
        self.table = memory.id();
        self.leased = 0;
        for slice in payload {
            let address = match memory.lease(*slice) {
                Ok(address) => address,
                Err(error) => {
                    self.give_back(memory);
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

    /// The kernel is done with it, if it had it, and the leases are given back. False: it was idle.
    #[inline]
    pub(crate) fn release(&mut self, memory: &RegionTable) -> bool {
        let was = std::mem::replace(&mut self.state, State::Idle);
        self.give_back(memory);
        was == State::Busy
    }

    /// Leases of another table than `memory` stay for good; that costs a mapping, where a release in the wrong table could
    /// cost the safety of another.
    #[inline]
    fn give_back(&mut self, memory: &RegionTable) {
        if self.table == memory.id() {
            for region in &self.regions[..self.leased] {
                memory.release(*region);
            }
        }
        self.leased = 0;
    }
}
