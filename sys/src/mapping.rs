//! Mappings: the memory that regions and rings point into.
//!
//! A [`Mapping`] owns one `mmap` (or one huge-page slab) and unmaps it when the last `Arc` goes. It hands out no
//! references, only bounds; all access goes through [`crate::RegionTable`] and [`crate::Area`].
//!
//! Fault model: the other side of a shared mapping may write it at any moment, and may shrink the file behind it. The first
//! is met by copying, never borrowing; the second by [`Mapping::shared`] refusing a file that is too short now, and by the
//! bus-error guard (see [`crate::sigbus`]) for one that is shortened later.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sigbus::Guard;
use crate::{PAGE_SIZE, step_aside, usize_from};

/// How a mapping came to be, and so how it must be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// `mmap` of `map_len` bytes at `map_base`; the usable part may begin later.
    Mmap { map_base: usize, map_len: usize },
    /// A slab of real huge pages from `hugepage-rs`.
    HugePages,
}

/// What kind of pages back an anonymous mapping: an operator wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Reserved huge pages.
    HugePages,
    /// Ordinary pages, with transparent huge pages asked for.
    TransparentHugePages,
    /// A file or memory descriptor shared with another process.
    Shared,
}

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// A region of no bytes, or one whose end does not fit 64 bits.
    #[error("a region of {length} bytes at file offset {offset} is not mappable")]
    Extent {
        /// Offset in the file, bytes.
        offset: u64,
        /// Length asked for, bytes.
        length: u64,
    },
    /// The file ends before the region does; touching the rest would fault.
    #[error("the region ends at byte {end} but the file behind it has only {size}")]
    TooShort {
        /// Where the region would end, bytes.
        end: u64,
        /// The file's size, bytes.
        size: u64,
    },
    /// The kernel refused.
    #[error("mapping {length} bytes failed: {source}")]
    Os {
        /// Length asked for, bytes.
        length: u64,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// A piece of mapped memory, unmapped with its last owner.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    origin: Origin,
    backing: Backing,
    /// Bytes of a page of what is mapped: those of a file on hugetlbfs are large.
    page: usize,
    /// Shared mappings only: stands between us and a file that is shortened.
    guard: Option<Guard>,
}

// SAFETY: a Mapping is an address range and its length; it gives no reference to the bytes. All access is by raw copy or
// atomic access in this crate, valid from any thread while the Mapping lives.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared use is copies of bytes that other processes may write too, so no exclusive access is assumed.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of anonymous memory: real huge pages where the host has some reserved, else ordinary pages with
    /// transparent huge pages asked for. The memory is zeroed.
    ///
    /// # Errors
    /// `len` of zero, or the kernel's refusal (out of memory).
    pub fn anonymous(len: usize) -> Result<Arc<Self>, MappingError> {
        if len == 0 {
            return Err(MappingError::Extent { offset: 0, length: 0 });
        }
        if let Some(mapping) = Self::huge_pages(len) {
            return Ok(Arc::new(mapping));
        }
        let map_len = len.next_multiple_of(PAGE_SIZE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice overlaps nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let base = Self::mapped(address, len as u64)?;
        // SAFETY: advice on a range this function has just mapped; a refusal changes nothing.
        unsafe { libc::madvise(address, map_len, libc::MADV_HUGEPAGE) };
        Ok(Arc::new(Self {
            base,
            len,
            origin: Origin::Mmap { map_base: address as usize, map_len },
            backing: Backing::TransparentHugePages,
            page: PAGE_SIZE,
            guard: None,
        }))
    }

    /// A slab of reserved huge pages, or none where the host has none to give. `hugepage-rs` maps whole pages of the
    /// default huge size and answers null when they have run out, which is the usual case.
    fn huge_pages(len: usize) -> Option<Self> {
        let layout = slab_layout(len)?;
        if !huge_pages_available(layout.size()) {
            return None;
        }
        // SAFETY: the layout has a non-zero size.
        let base = NonNull::new(unsafe { hugepage_rs::alloc(layout) })?;
        Some(Self {
            base,
            len,
            origin: Origin::HugePages,
            backing: Backing::HugePages,
            page: PAGE_SIZE,
            guard: None,
        })
    }

    /// Maps `length` bytes of `fd` from byte `offset`, shared and writable: guest memory. The offset need not be page
    /// aligned; the mapping is widened to what the file's page size (huge pages included) demands.
    ///
    /// # Errors
    /// An empty or overflowing extent, a file that ends before the region does, or the kernel's refusal.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Arc<Self>, MappingError> {
        let end = offset.checked_add(length).filter(|_| length > 0);
        let Some(end) = end.filter(|end| *end < i64::MAX as u64 - (1 << 31)) else {
            return Err(MappingError::Extent { offset, length });
        };
        let stat = rustix::fs::fstat(fd)
            .map_err(|error| MappingError::Os { length, source: error.into() })?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size < end {
            return Err(MappingError::TooShort { end, size });
        }
        // On hugetlbfs both offset and length must be multiples of the huge page, which fstat reports as block size.
        let page = u64::try_from(stat.st_blksize)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= 1 << 30)
            .unwrap_or(0)
            .max(PAGE_SIZE as u64);
        let map_offset = offset - offset % page;
        let map_len = usize_from((end - map_offset).next_multiple_of(page));
        let Ok(raw_offset) = libc::off_t::try_from(map_offset) else {
            return Err(MappingError::Extent { offset, length });
        };
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing; the descriptor is valid for the
        // borrow.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                raw_offset,
            )
        };
        let start = Self::mapped(address, length)?;
        // SAFETY: `offset - map_offset` is less than one page and the mapping covers it and `length` bytes more.
        let base = unsafe { start.add(usize_from(offset - map_offset)) };
        let mut mapping = Self {
            base,
            len: usize_from(length),
            origin: Origin::Mmap { map_base: address as usize, map_len },
            backing: Backing::Shared,
            page: usize_from(page),
            guard: None,
        };
        let guard = Guard::new(address as usize, map_len, mapping.page);
        mapping.guard = Some(guard.map_err(|source| MappingError::Os { length, source })?);
        Ok(Arc::new(mapping))
    }

    fn mapped(address: *mut libc::c_void, length: u64) -> Result<NonNull<u8>, MappingError> {
        if address == libc::MAP_FAILED {
            return Err(MappingError::Os { length, source: io::Error::last_os_error() });
        }
        NonNull::new(address.cast())
            .ok_or(MappingError::Os { length, source: io::Error::other("mapped at address 0") })
    }

    /// Usable bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// What pages back the memory.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Bytes of a page: what comes of a shared mapping's file at a time.
    #[must_use]
    pub fn page_size(&self) -> usize {
        self.page
    }

    /// Whether the file behind a shared mapping was shortened and we touched what is gone: the bytes there are ours now, not
    /// the guest's, and its session has to end.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::poisoned)
    }

    /// Has the kernel clear the pages of the first `length` bytes of memory of ours before they are asked for, some at a time, with
    /// steps aside between. Where no huge pages are reserved they are small ones: a huge one is cleared in one piece, which takes some
    /// tenths of a millisecond, and several milliseconds in a virtual machine whose own host has to find the memory first. A refusal
    /// changes nothing. Not for a reactor.
    pub fn populate(&self, length: usize) {
        /// Cleared in one call, bytes; and for how long before others have the core.
        const STEP: usize = 64 << 10;
        const AT_A_TIME: Duration = Duration::from_micros(100);
        let length = length.min(self.len);
        let advise = |offset: usize, length: usize, advice| {
            // SAFETY: a stretch of this mapping, rounded up to its last page by the kernel. The advice is one of the two below, and
            // neither changes content.
            unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), length, advice) };
        };
        if self.backing == Backing::TransparentHugePages {
            advise(0, length, libc::MADV_NOHUGEPAGE);
        }
        let mut begun = Instant::now();
        for offset in (0..length).step_by(STEP) {
            advise(offset, STEP.min(length - offset), libc::MADV_POPULATE_WRITE);
            if begun.elapsed() >= AT_A_TIME {
                step_aside();
                begun = Instant::now();
            }
        }
    }

    /// Where the whole pages that were mapped begin, and how many bytes they have.
    pub(crate) fn extent(&self) -> (usize, usize) {
        match self.origin {
            Origin::Mmap { map_base, map_len } => (map_base, map_len),
            Origin::HugePages => (self.base.as_ptr() as usize, self.len),
        }
    }

    /// The first usable byte. Stays inside this crate: above it memory is named by region and offset.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First the guard: what is mapped at this address next is none of its business.
        self.guard = None;
        match self.origin {
            Origin::Mmap { map_base, map_len } => {
                // SAFETY: exactly the range mapped by a constructor, still mapped, and nobody holds the Mapping any more:
                // a Ring with I/O in it holds a lease, and a leased mapping is never dropped.
                unsafe { libc::munmap(map_base as *mut libc::c_void, map_len) };
            }
            Origin::HugePages => {
                if let Some(layout) = slab_layout(self.len) {
                    // SAFETY: allocated by `hugepage_rs::alloc` with the same layout, and no longer in use.
                    unsafe { hugepage_rs::dealloc(self.base.as_ptr(), layout) };
                }
            }
        }
    }
}

/// The layout of a huge-page slab of `len` bytes.
fn slab_layout(len: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(len.next_multiple_of(PAGE_SIZE), PAGE_SIZE).ok()
}

/// Whether the host has reserved huge pages free for `bytes`. Asked first because `hugepage-rs` panics where
/// `/proc/meminfo` has no huge-page lines at all; and before that whether there are any, for that page is long in the making.
fn huge_pages_available(bytes: usize) -> bool {
    let any = std::fs::read_to_string("/proc/sys/vm/nr_hugepages");
    if any.is_ok_and(|any| any.trim() == "0") {
        return false;
    }
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return false };
    let field = |name: &str| -> Option<usize> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    match (field("HugePages_Free:"), field("Hugepagesize:")) {
        (Some(free), Some(kib)) if kib > 0 => free >= bytes.div_ceil(kib * 1024),
        _ => false,
    }
}
