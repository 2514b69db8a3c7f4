//! The engine of a `uring` channel: which of the kernel's two queues takes an operation.
//!
//! | engine | reads and writes | flushes, ranges | for |
//! | --- | --- | --- | --- |
//! | `io_uring` | io_uring | io_uring | everything |
//! | `aio` | Linux AIO | io_uring | files on tmpfs and ramfs |
//!
//! On tmpfs io_uring hands every request to a kernel worker thread, and Linux AIO carries out a turn's requests within one
//! call. It has no way to deallocate or zero a range, and no flush that is worth having; those are rare and stay where they are. The
//! two queues have no order between them, and need none: a flush covers what was completed before it was submitted, and
//! what is completed was reaped.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use resilver_sys::uring::RangeOp;
use resilver_sys::{Aio, BadSlice, BufferSlice, Direction, RegionTable, Ring};

use super::file::OpenFile;
use crate::device::BdevError;

/// What carries out reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    IoUring,
    /// Linux AIO, for files whose data is in memory.
    Aio,
}

impl Engine {
    /// As operators know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Aio => "aio",
        }
    }

    /// The engine of a file: the one asked for, else the better one that is to be had.
    pub(super) fn of(file: &OpenFile, asked: Option<Self>, path: &Path) -> Result<Self, BdevError> {
        match asked {
            Some(Self::Aio) if !file.in_memory => Err(BdevError::Invalid {
                parameter: "engine",
                value: Self::Aio.name().to_owned(),
                expected: format!(
                    "'{}' is not on tmpfs or ramfs, and a reactor that waits for a device inside a submission keeps all its \
                     disks waiting: use io_uring",
                    path.display()
                ),
            }),
            Some(engine) => Ok(engine),
            None if file.in_memory && Aio::probe().is_ok() => Ok(Self::Aio),
            None => Ok(Self::IoUring),
        }
    }
}

/// The queues of one channel. A slot has one operation, in either of them.
#[derive(Debug)]
pub(super) struct Queues {
    ring: Ring,
    /// Takes reads and writes if it is there.
    transfers: Option<Aio>,
}

impl Queues {
    pub(super) fn new(ring: Ring, transfers: Option<Aio>) -> Self {
        Self { ring, transfers }
    }

    /// Whether reads and writes are carried out while they are told to the kernel.
    pub(super) fn work_inline(&self) -> bool {
        self.transfers.is_some()
    }

    /// As [`Ring::push_transfer`].
    #[inline]
    pub(super) fn push_transfer(
        &mut self,
        memory: &RegionTable,
        slot: u32,
        direction: Direction,
        offset: u64,
        payload: &[BufferSlice],
    ) -> Result<(), BadSlice> {
        match &mut self.transfers {
            Some(aio) => aio.push_transfer(memory, slot, direction, offset, payload),
            None => self.ring.push_transfer(memory, slot, direction, offset, payload),
        }
    }

    /// As [`Ring::push_sync`].
    #[inline]
    pub(super) fn push_sync(&mut self, slot: u32) {
        self.ring.push_sync(slot);
    }

    /// As [`Ring::push_range`].
    #[inline]
    pub(super) fn push_range(&mut self, slot: u32, operation: RangeOp, offset: u64, length: u64) {
        self.ring.push_range(slot, operation, offset, length);
    }

    /// Tells the kernel what was pushed: at most one system call for each queue that something was pushed to.
    #[inline]
    pub(super) fn commit(&mut self) {
        self.ring.commit();
        if let Some(aio) = &mut self.transfers {
            aio.commit();
        }
    }

    /// Whether completions can be reaped now.
    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        self.ring.has_completions() || self.transfers.as_ref().is_some_and(Aio::has_completions)
    }

    /// As [`Ring::reap`], of both.
    #[inline]
    pub(super) fn reap(&mut self, memory: &RegionTable, mut each: impl FnMut(u32, i32)) {
        self.ring.reap(memory, &mut each);
        if let Some(aio) = &mut self.transfers {
            aio.reap(memory, each);
        }
    }

    /// Whether there is something that no descriptor will wake a sleeper for: completions at hand, operations that the
    /// kernel was not told of, and all that Linux AIO has.
    pub(super) fn want_polling(&mut self) -> bool {
        self.ring.has_unsubmitted()
            || self.has_completions()
            || self.transfers.as_ref().is_some_and(|aio| aio.in_flight() > 0)
    }

    /// As [`Ring::keep_workers_off_this_core`].
    pub(super) fn keep_workers_off_this_core(&mut self) {
        self.ring.keep_workers_off_this_core();
    }
}

impl AsFd for Queues {
    /// Readable while completions of what does not [want polling](Queues::want_polling) can be reaped.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
