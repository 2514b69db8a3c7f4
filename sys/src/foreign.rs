//! Buffers for drivers of another make.
//!
//! An independent driver, which the tests use as a stranger, knows nothing of regions: it wants slices and hands their
//! addresses to the device. Nothing in the product uses this; it is here because unsafe code stands in this crate alone.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::{Mapping, MappingError};

/// Maps the first `length` bytes of a memory descriptor for good and gives them away as a slice.
///
/// Meant for one process and one device that keeps to the rules: it writes a buffer only while a request that names it is
/// in flight, and meanwhile nobody looks at that part of the slice. For anything that a guest shares, use a
/// [`crate::RegionTable`].
///
/// # Errors
/// As [`Mapping::shared`].
pub fn leak_shared(fd: BorrowedFd<'_>, length: u64) -> Result<&'static mut [u8], MappingError> {
    let mapping = Mapping::shared(fd, 0, length)?;
    let (base, len) = (mapping.base().as_ptr(), mapping.len());
    #[allow(clippy::mem_forget)] // never unmapped, as the slice's lifetime says
    std::mem::forget(Arc::clone(&mapping));
    // SAFETY: mapped, readable, writable and initialised by the kernel; never unmapped, because one owner was forgotten; and
    // this mapping was made here, so no other slice of it exists in this process.
    Ok(unsafe { std::slice::from_raw_parts_mut(base, len) })
}
