//! The engine of a `uring` channel: which of the kernel's two queues takes an operation, and who carries it out.
//!
//! | engine | reads and writes | flushes, ranges | for |
//! | --- | --- | --- | --- |
//! | `io_uring` | io_uring | io_uring | everything |
//! | `inline` | io_uring, within the call | io_uring | files on tmpfs, by direct I/O |
//! | `aio` | Linux AIO, within the call | io_uring | files on tmpfs and ramfs |
//!
//! On tmpfs io_uring hands every request to a kernel worker thread, unless the file is opened so that it dares to carry out a
//! turn's requests itself, within one call ([`RingMode::Inline`]). Before Linux 6.6 tmpfs knows no direct I/O, and that cannot be
//! had; Linux AIO does the same for some more work in the kernel. It has no way to deallocate or zero a range, and no flush that is
//! worth having; those are rare and stay where they are. The two queues have no order between them, and need none: a flush covers
//! what was completed before it was submitted, and what is completed was reaped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use resilver_sys::uring::RangeOp;
use resilver_sys::{Aio, BadSlice, BufferSlice, Direction, Mapping, RegionTable, Ring, RingMode};

use super::file::OpenFile;
use crate::device::BdevError;

/// What carries out reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    IoUring,
    /// io_uring that carries reads and writes out within its call, for files in memory.
    Inline,
    /// Linux AIO, for files whose data is in memory.
    Aio,
}

impl Engine {
    /// As operators know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Inline => "inline",
            Self::Aio => "aio",
        }
    }

    /// How its ring works, where the operator wants `asked`.
    pub(super) fn ring_mode(self, asked: RingMode) -> RingMode {
        match self {
            Self::Inline => RingMode::Inline,
            Self::IoUring | Self::Aio => asked,
        }
    }

    /// The engine of a file: the one asked for, else the better one that is to be had.
    pub(super) fn of(
        file: &OpenFile,
        direct: bool,
        asked: Option<Self>,
        path: &Path,
    ) -> Result<Self, BdevError> {
        let inline = || file.in_memory && direct && Ring::works_inline();
        match asked {
            Some(engine @ (Self::Inline | Self::Aio)) if !file.in_memory => {
                Err(BdevError::Invalid {
                    parameter: "engine",
                    value: engine.name().to_owned(),
                    expected: format!(
                        "'{}' is not on tmpfs or ramfs, and a reactor that waits for a device inside a submission keeps all its \
                     disks waiting: use io_uring",
                        path.display()
                    ),
                })
            }
            Some(Self::Inline) if !inline() => Err(BdevError::Invalid {
                parameter: "engine",
                value: Self::Inline.name().to_owned(),
                expected: "it needs direct I/O and Linux 6.6: use aio".to_owned(),
            }),
            Some(engine) => Ok(engine),
            None if inline() => Ok(Self::Inline),
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
    /// The queues of an engine for `file`, where the operator wants a ring of the mode `asked`.
    pub(super) fn new(
        engine: Engine,
        file: &Arc<OwnedFd>,
        slots: u32,
        asked: RingMode,
    ) -> Result<Self, String> {
        let ring = Ring::new(file, slots, engine.ring_mode(asked)).map_err(|error| {
            format!(
                "io_uring with {slots} slots: {error}; it needs Linux 5.19 and must not be switched off \
                 (sysctl kernel.io_uring_disabled)"
            )
        })?;
        let transfers = match engine {
            Engine::IoUring | Engine::Inline => None,
            Engine::Aio => Some(Aio::new(file, slots).map_err(|error| {
                format!(
                    "Linux AIO: {error}; raise the host's limit (sysctl fs.aio-max-nr), or make the bdev with engine=io_uring"
                )
            })?),
        };
        Ok(Self { ring, transfers })
    }

    /// Whether reads and writes are carried out while they are told to the kernel.
    pub(super) fn work_inline(&self) -> bool {
        self.transfers.is_some() || self.ring.is_inline()
    }

    /// As [`Ring::register`]. What Linux AIO carries gains nothing by it.
    pub(super) fn register(&mut self, pool: &Arc<Mapping>, length: usize) -> io::Result<()> {
        if self.transfers.is_some() { Ok(()) } else { self.ring.register(pool, length) }
    }

    /// As [`Ring::forget_pool`].
    pub(super) fn forget_pool(&mut self) {
        self.ring.forget_pool();
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

    /// As [`Ring::commit`]: at most one system call for each queue.
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

    /// Whether there is something that no descriptor will wake a sleeper for: completions at hand, what a commit
    /// has to do, and all that Linux AIO has.
    pub(super) fn want_polling(&mut self) -> bool {
        self.ring.wants_commit()
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
