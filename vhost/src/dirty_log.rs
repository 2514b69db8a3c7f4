//! The dirty log: which pages of guest memory the device has written, for a live migration of the guest (vhost-user,
//! "Migration").
//!
//! The front end shares a bitmap with a bit for every 4 KiB of guest memory, bit 0 of byte 0 for address 0. While it copies the
//! guest's memory elsewhere it takes the bits away and sends those pages again; a page that we write and do not mark is
//! lost on the other side. Everything that a device writes is marked: the buffers of reads, what GET_ID answers, status
//! bytes, and the used ring with its event word.
//!
//! Invariants:
//! * A mark follows the write that it is about, and is ordered behind it. Were it the other way round, the front end could
//!   take the bit, copy the page as it was, and never look again.
//! * What a request wrote is marked before its used element is published, so a guest that is stopped when nothing is in
//!   flight has everything marked.
//! * A mark is always a read-modify-write. To look first whether the bit is set would save a bus transaction and lose
//!   marks: the load may run ahead of the write that it is about.
//! * Nothing is written outside the bitmap, whatever address is marked.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use resilver_sys::area::AreaError;
use resilver_sys::{Area, BufferSlice, EventFd, Mapping, MappingError, usize_from};

use crate::memory::GuestMemory;
use crate::queue::Shared;
use crate::request::Request;

/// Bytes of guest memory for each bit (vhost-user, "Migration": `VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 4096;
/// Bytes of guest memory for each byte of the log.
const BYTE_SPAN: u64 = LOG_PAGE * 8;

/// Why a log was refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It could not be mapped.
    #[error("the dirty log cannot be mapped: {0}")]
    Mapping(#[from] MappingError),
    /// Its mapping is smaller than it was said to be.
    #[error("the dirty log cannot be used: {0}")]
    Area(#[from] AreaError),
    /// Guest memory ends behind the last page that it has a bit for.
    #[error(
        "the dirty log has {size} bytes, but guest memory that ends at {end:#x} needs {needed}"
    )]
    TooSmall {
        /// Bytes of the log.
        size: u64,
        /// Where guest memory ends.
        end: u64,
        /// Bytes that would do.
        needed: u64,
    },
}

/// The bitmap that a front end shares. A clone is the same bitmap.
#[derive(Debug, Clone)]
pub struct DirtyLog {
    bits: Area,
    mapping: Arc<Mapping>,
    /// Signalled when something was marked (SET_LOG_FD).
    event: Option<Arc<EventFd>>,
    /// Something was marked that `event` does not know of.
    marked: Cell<bool>,
}

impl DirtyLog {
    /// Maps the `size` bytes at `offset` of `fd`.
    ///
    /// # Errors
    /// The kernel or the file refuse.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, size: u64) -> Result<Self, LogError> {
        let mapping = Mapping::shared(fd, offset, size)?;
        let bits = Area::new(&mapping, 0, mapping.len(), 1)?;
        Ok(Self { bits, mapping, event: None, marked: Cell::new(false) })
    }

    /// The same log, with another descriptor to be signalled.
    #[must_use]
    pub fn with_event(self, event: Option<Arc<EventFd>>) -> Self {
        Self { event, ..self }
    }

    /// Whether all of `memory` has its bits.
    ///
    /// # Errors
    /// It has not.
    pub fn covers(&self, memory: &GuestMemory) -> Result<(), LogError> {
        let (size, end) = (self.bits.len() as u64, memory.end());
        let needed = end.div_ceil(BYTE_SPAN);
        if needed > size { Err(LogError::TooSmall { size, end, needed }) } else { Ok(()) }
    }

    /// Whether the file behind it was shortened under us.
    #[must_use]
    pub fn has_shrunk(&self) -> bool {
        self.mapping.poisoned()
    }

    /// Whether telling the front end has made us wait.
    pub(crate) fn is_stuck(&self) -> bool {
        self.event.as_ref().is_some_and(|event| event.is_stuck())
    }

    /// Marks the pages of the `length` bytes at guest address `address`, which have been written.
    #[inline]
    pub fn mark(&self, address: u64, length: u64) {
        let Some(rest) = length.checked_sub(1) else { return };
        let (first, last) = (address / LOG_PAGE, address.saturating_add(rest) / LOG_PAGE);
        let bytes = self.bits.len() as u64;
        for byte in first / 8..(last / 8 + 1).min(bytes) {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            self.bits.fetch_or_u8(usize_from(byte), (0xff << from) & (0xff >> (7 - to)));
        }
        self.marked.set(true);
    }

    /// Tells the front end that something was marked, if it wants to hear of it. Once a turn.
    #[inline]
    pub(crate) fn tell(&self) {
        if let Some(event) = &self.event
            && self.marked.replace(false)
        {
            event.signal();
        }
    }
}

impl Shared {
    /// Logs all that the device has written for a request, its status byte included. One that failed in part is logged as if
    /// it had been served whole: nobody knows which of its buffers were written.
    #[inline]
    pub(crate) fn log_request(&self, request: &Request) {
        let Some(log) = &self.log else { return };
        for slice in request.written_slices() {
            self.log_slice(log, slice);
        }
        self.log_slice(log, &request.status);
    }

    fn log_slice(&self, log: &DirtyLog, slice: &BufferSlice) {
        // A request may have been translated under the map before; a slice of neither is of memory that has gone.
        let old = || self.retiring.as_ref()?.memory.guest_address(slice);
        if let Some(address) = self.memory.guest_address(slice).or_else(old) {
            log.mark(address, u64::from(slice.length));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::atomic::Ordering;

    fn file(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        fd
    }

    fn bytes(log: &DirtyLog) -> Vec<u8> {
        (0..log.bits.len()).map(|at| log.bits.load_u8(at, Ordering::Relaxed)).collect()
    }

    #[test]
    fn exactly_the_pages_of_a_range_are_marked_and_none_outside_the_log() {
        let fd = file(8192);
        for address in (0..40 * LOG_PAGE).step_by(1365).chain([u64::MAX - 4096, u64::MAX]) {
            for length in [0, 1, 2, 4095, 4096, 4097, 9 * LOG_PAGE, 40 * LOG_PAGE, u64::MAX] {
                rustix::fs::ftruncate(&fd, 0).unwrap();
                rustix::fs::ftruncate(&fd, 8192).unwrap();
                // Neither page aligned nor at the beginning of its file.
                let log = DirtyLog::map(fd.as_fd(), 100, 4).unwrap();
                log.mark(address, length);
                for page in 0..32 {
                    let (begin, end) = (page * LOG_PAGE, (page + 1) * LOG_PAGE);
                    let touched =
                        length > 0 && address < end && address.saturating_add(length) > begin;
                    let bit = bytes(&log)[usize_from(page / 8)] >> (page % 8) & 1;
                    assert_eq!(bit == 1, touched, "page {page} of {length} bytes at {address:#x}");
                }
                let whole = Mapping::shared(fd.as_fd(), 0, 8192).unwrap();
                let whole = Area::new(&whole, 0, 8192, 1).unwrap();
                let mut outside = (0..8192).filter(|at| !(100..104).contains(at));
                assert!(outside.all(|at| whole.load_u8(at, Ordering::Relaxed) == 0));
            }
        }
    }

    #[test]
    fn a_log_that_is_shortened_is_survived_and_noticed() {
        let fd = file(4096);
        let log = DirtyLog::map(fd.as_fd(), 0, 4096).unwrap();
        assert!(DirtyLog::map(fd.as_fd(), 1, 4096).is_err(), "longer than its file");
        rustix::fs::ftruncate(&fd, 0).unwrap();
        log.mark(0, 1 << 27);
        assert!(log.has_shrunk());
    }

    #[test]
    fn who_wants_to_hear_of_marks_is_told_once() {
        let fd = file(4096);
        let event = Arc::new(EventFd::new().unwrap());
        let log = DirtyLog::map(fd.as_fd(), 0, 4096).unwrap().with_event(Some(Arc::clone(&event)));
        log.tell();
        assert!(!event.drain());
        log.mark(0, 1);
        log.tell();
        log.tell();
        assert!(event.drain() && !event.drain());
    }
}
