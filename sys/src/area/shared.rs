//! Areas of memory that is really shared: words of a mapping, read and written by atomic operations of the machine.

pub use std::sync::atomic::fence;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::AreaError;
use crate::mapping::Mapping;
use crate::prefetch::{Access, prefetch};
use crate::usize_from;

/// A checked, aligned piece of shared memory.
#[derive(Debug, Clone)]
pub struct Area {
    base: *mut u8,
    len: usize,
    /// Keeps the bytes mapped.
    _mapping: Arc<Mapping>,
}

// SAFETY: an Area is a bounds-checked address kept alive by its Arc; all access is atomic, so any thread may make it.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

macro_rules! accessors {
    ($load:ident, $store:ident, $atomic:ty, $int:ty, $what:literal) => {
        #[doc = concat!("Loads the ", $what, " at byte `offset`. Panics outside the area: offsets are ours, never a guest's.")]
        #[inline]
        #[must_use]
        pub fn $load(&self, offset: usize, ordering: Ordering) -> $int {
            self.assert_fits::<$int>(offset);
            // SAFETY: inside the area and aligned (asserted); the mapping lives as long as self; atomics are the access that
            // memory shared with another process allows.
            unsafe { <$atomic>::from_ptr(self.base.add(offset).cast()) }.load(ordering)
        }

        #[doc = concat!("Stores the ", $what, " at byte `offset`. Panics outside the area: offsets are ours, never a guest's.")]
        #[inline]
        pub fn $store(&self, offset: usize, value: $int, ordering: Ordering) {
            self.assert_fits::<$int>(offset);
            // SAFETY: as in the load.
            unsafe { <$atomic>::from_ptr(self.base.add(offset).cast()) }.store(value, ordering);
        }
    };
}

impl Area {
    /// The `len` bytes at `offset` of `mapping`, whose address must be a multiple of `alignment` (a power of two).
    ///
    /// # Errors
    /// Out of the mapping's bounds, or misaligned.
    pub fn new(
        mapping: &Arc<Mapping>,
        offset: u64,
        len: usize,
        alignment: usize,
    ) -> Result<Self, AreaError> {
        let end = offset.checked_add(len as u64).ok_or(AreaError::OutOfBounds)?;
        if end > mapping.len() as u64 {
            return Err(AreaError::OutOfBounds);
        }
        // SAFETY: `offset` is at most the mapping's length (checked above).
        let base = unsafe { mapping.base().as_ptr().add(usize_from(offset)) };
        if (base as usize) & (alignment - 1) != 0 {
            return Err(AreaError::Misaligned(alignment));
        }
        Ok(Self { base, len, _mapping: Arc::clone(mapping) })
    }

    /// Bytes of the area.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    accessors!(load_u8, store_u8, AtomicU8, u8, "byte");
    accessors!(load_u16, store_u16, AtomicU16, u16, "native-endian 16-bit word");
    accessors!(load_u32, store_u32, AtomicU32, u32, "native-endian 32-bit word");
    accessors!(load_u64, store_u64, AtomicU64, u64, "native-endian 64-bit word");

    /// Sets bits of the byte at `offset`, atomically and behind everything written before: the dirty log of a live migration.
    #[inline]
    pub fn fetch_or_u8(&self, offset: usize, bits: u8) {
        self.assert_fits::<u8>(offset);
        // SAFETY: as in the loads.
        unsafe { AtomicU8::from_ptr(self.base.add(offset)) }.fetch_or(bits, Ordering::Release);
    }

    /// Has the cache line of byte `offset` fetched, if it is inside: a hint, for what will be read soon.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        if offset < self.len {
            // SAFETY: inside the area.
            prefetch(unsafe { self.base.add(offset) }, Access::Read);
        }
    }

    #[inline]
    fn assert_fits<T>(&self, offset: usize) {
        let fits = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len);
        assert!(fits, "offset {offset} is outside an area of {} bytes", self.len);
        assert!(
            (self.base as usize).wrapping_add(offset).is_multiple_of(align_of::<T>()),
            "offset {offset} is misaligned"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_shared_between_areas_of_one_mapping() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let one = Area::new(&mapping, 64, 64, 16).unwrap();
        let two = Area::new(&mapping, 0, 4096, 4096).unwrap();
        one.store_u32(4, 0xdead_beef, Ordering::Release);
        assert_eq!(two.load_u32(68, Ordering::Acquire), 0xdead_beef);
        one.fetch_or_u8(0, 0x81);
        assert_eq!(two.load_u8(64, Ordering::Relaxed), 0x81);
    }

    #[test]
    fn an_area_outside_its_mapping_or_misaligned_is_refused() {
        let mapping = Mapping::anonymous(4096).unwrap();
        assert_eq!(Area::new(&mapping, 4000, 97, 1).unwrap_err(), AreaError::OutOfBounds);
        assert_eq!(Area::new(&mapping, u64::MAX, 2, 1).unwrap_err(), AreaError::OutOfBounds);
        assert_eq!(Area::new(&mapping, 2, 2, 4).unwrap_err(), AreaError::Misaligned(4));
    }

    #[test]
    #[should_panic(expected = "outside an area")]
    fn access_beyond_the_area_panics() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let _ = Area::new(&mapping, 0, 4, 4).unwrap().load_u32(4, Ordering::Relaxed);
    }
}
