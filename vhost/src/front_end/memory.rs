//! The memory that a front end shares with its back end: one sealed memory descriptor.
//!
//! The caller's data comes first; rings and headers are carved from what follows. Guest-physical and user addresses are
//! chosen freely and differ from each other and from where the memory is mapped: only offsets mean anything to us.
//!
//! It is of huge pages where the host has some reserved. A back end whose drivers do DMA from it wants it so: SPDK looks at the
//! memory in steps of 2 MiB from a multiple of 2 MiB on, and dies where there is none (`vhost_session_mem_register`); only huge
//! pages are mapped there in every process. A file on a hugetlbfs that the operator names was rejected: it would be one more
//! thing to set up, for the same pages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use resilver_sys::{Area, Mapping, PAGE_SIZE, usize_from};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::connection::FrontEndError;
use crate::message::RegionDescription;

/// Guest-physical address of the first byte.
const GUEST_BASE: u64 = 1 << 30;
/// User address of the first byte, as ring addresses name it.
const USER_BASE: u64 = 1 << 46;
/// Bytes of the huge pages that are asked for: of another size a host may have few and large ones.
const HUGE_PAGE: u64 = 2 << 20;

/// What the parts of a ring are aligned to: a cache line, more than virtio asks.
pub(super) const RING_ALIGNMENT: usize = 64;

/// A piece of the caller's part of the shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataBuffer {
    /// Where it begins, bytes.
    pub offset: u64,
    /// How long it is, bytes.
    pub length: u32,
}

/// One memory descriptor, mapped here and sent to the back end.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    mapping: Arc<Mapping>,
    data_bytes: u64,
    next: u64,
    huge_pages: bool,
}

/// A piece carved for a ring: where it is for us and for the device.
#[derive(Debug, Clone)]
pub(super) struct Carved {
    /// Our view of it.
    pub(super) area: Area,
    /// Where it is in the memory, bytes.
    offset: u64,
}

impl Carved {
    /// The address that descriptors use.
    pub(super) fn guest_address(&self) -> u64 {
        GUEST_BASE + self.offset
    }

    /// The address that SET_VRING_ADDR uses.
    pub(super) fn user_address(&self) -> u64 {
        USER_BASE + self.offset
    }
}

impl SharedMemory {
    /// Memory with `data_bytes` for the caller and at least `ring_bytes` for rings. Without rings and never shared it is for whoever
    /// wants the same kind of memory as a front end has.
    ///
    /// # Errors
    /// The kernel has no more memory or descriptors.
    pub fn new(data_bytes: usize, ring_bytes: usize) -> Result<Self, FrontEndError> {
        let data_bytes = data_bytes.next_multiple_of(PAGE_SIZE) as u64;
        let length = data_bytes + ring_bytes.next_multiple_of(PAGE_SIZE) as u64;
        let huge = descriptor(length.next_multiple_of(HUGE_PAGE), true);
        let huge_pages = huge.is_ok();
        let (fd, length) = huge
            .or_else(|_| descriptor(length, false))
            .map_err(|error| FrontEndError::Os { what: "share memory", source: error.into() })?;
        let mapping = Mapping::shared(fd.as_fd(), 0, length)?;
        Ok(Self { fd, mapping, data_bytes, next: data_bytes, huge_pages })
    }

    /// Takes `length` bytes for a ring, at a multiple of `alignment`.
    pub(super) fn carve(
        &mut self,
        length: usize,
        alignment: usize,
    ) -> Result<Carved, FrontEndError> {
        let offset = self.next.next_multiple_of(alignment as u64);
        let area = Area::new(&self.mapping, offset, length, alignment)?;
        self.next = offset + length as u64;
        Ok(Carved { area, offset })
    }

    /// The mapping, for a region table through which the caller fills and reads its data.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// How much of it is the caller's: the first so many bytes.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        usize_from(self.data_bytes)
    }

    /// Whether it is of huge pages.
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// The guest-physical address of the caller's first byte.
    pub(super) fn data_address(&self) -> u64 {
        GUEST_BASE
    }

    /// The one region of the memory table.
    pub(super) fn region(&self) -> RegionDescription {
        RegionDescription {
            guest_address: GUEST_BASE,
            size: self.mapping.len() as u64,
            user_address: USER_BASE,
            file_offset: 0,
        }
    }

    /// The descriptor to send along.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A sealed descriptor with its length in bytes, which is a multiple of the page; an error where huge pages are wanted and
/// fewer are free.
fn descriptor(length: u64, huge: bool) -> rustix::io::Result<(OwnedFd, u64)> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = rustix::fs::memfd_create(c"resilver-front-end", flags)?;
    rustix::fs::ftruncate(&fd, length)?;
    if huge {
        // All of them now: a page that is not there when it is touched is a bus error.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, length)?;
    }
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok((fd, length))
}
