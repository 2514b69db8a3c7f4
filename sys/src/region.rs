//! Regions: how an I/O names memory.
//!
//! A reactor owns one [`RegionTable`]. Mappings are entered in it (guest memory, bounce and copy pools) and named from then
//! on by a [`RegionId`], which carries a generation so that a stale one is refused. The table is not `Sync`: it is lent by
//! reference to whatever the reactor polls, so resolving a slice costs no lock and no atomic operation, and nothing can be
//! unmapped while a copy runs.
//!
//! Invariants:
//! * A slot that holds a lease keeps its mapping, also after [`RegionTable::remove`]; the last lease lets it go.
//! * A table dropped with leases outstanding leaks those mappings instead of unmapping them: the kernel may still write.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;
use crate::prefetch::{Access, LINE, prefetch};
use crate::usize_from;

/// Bits of a [`RegionId`] that index the table; the rest are the generation.
const INDEX_BITS: u32 = 12;
/// The most regions that one table can hold.
pub const REGIONS_MAX: usize = 1 << INDEX_BITS;

/// A region of one [`RegionTable`]. Meaningless in any other table.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionId(u32);

impl RegionId {
    /// An id that no table gives out, for slots that are not filled yet.
    pub const NONE: Self = Self(u32::MAX);

    fn new(index: usize, generation: u32) -> Self {
        #[allow(clippy::cast_possible_truncation)] // index < REGIONS_MAX
        Self((generation << INDEX_BITS) | index as u32)
    }

    fn index(self) -> usize {
        self.0 as usize & (REGIONS_MAX - 1)
    }

    fn generation(self) -> u32 {
        self.0 >> INDEX_BITS
    }
}

impl fmt::Debug for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}#{}", self.index(), self.generation())
    }
}

/// Bytes of a region: an allegation until a [`RegionTable`] has checked it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferSlice {
    /// Which region.
    pub region: RegionId,
    /// How many bytes.
    pub length: u32,
    /// Where in the region, bytes.
    pub offset: u64,
}

impl BufferSlice {
    /// A slice of nothing, for arrays that are not filled yet.
    pub const EMPTY: Self = Self { region: RegionId::NONE, length: 0, offset: 0 };

    /// The part of this slice that begins `skip` bytes in and has `length` bytes; none where that leaves the slice.
    #[must_use]
    pub fn part(self, skip: u32, length: u32) -> Option<Self> {
        (skip.checked_add(length)? <= self.length).then(|| Self {
            region: self.region,
            length,
            offset: self.offset.wrapping_add(u64::from(skip)),
        })
    }
}

/// A slice that names no memory: its region is gone, or it leaves the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSlice {
    /// The region was removed, or never was.
    #[error("the memory region is gone")]
    Stale,
    /// The slice leaves its region.
    #[error("the buffer leaves its memory region")]
    OutOfBounds,
    /// Two slices of one operation differ in length.
    #[error("the buffers differ in length")]
    LengthMismatch,
}

/// The table has no free slot: [`REGIONS_MAX`] or the smaller capacity asked for is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the reactor's memory region table is full")]
pub struct TableFull;

/// One slot. `mapping` is present while the region is open or leased.
#[derive(Default)]
struct Slot {
    mapping: RefCell<Option<Arc<Mapping>>>,
    /// Address and length of `mapping`, so that resolving touches one cache line; zero length when closed.
    base: Cell<usize>,
    len: Cell<usize>,
    generation: Cell<u32>,
    leases: Cell<u32>,
}

/// The regions of one reactor.
pub struct RegionTable {
    slots: Box<[Slot]>,
    id: u64,
}

/// Tells tables apart, so that a lease is only ever given back where it was taken.
static NEXT_TABLE: AtomicU64 = AtomicU64::new(1);

impl fmt::Debug for RegionTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionTable").field("regions", &self.len()).finish_non_exhaustive()
    }
}

impl RegionTable {
    /// A table of `capacity` slots, at most [`REGIONS_MAX`].
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, REGIONS_MAX);
        Self {
            slots: (0..capacity).map(|_| Slot::default()).collect(),
            id: NEXT_TABLE.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Enters a mapping and names it.
    ///
    /// # Errors
    /// No free slot.
    pub fn insert(&self, mapping: Arc<Mapping>) -> Result<RegionId, TableFull> {
        let free = |slot: &Slot| slot.mapping.borrow().is_none();
        let index = self.slots.iter().position(free).ok_or(TableFull)?;
        let slot = &self.slots[index];
        // The generation is never all ones, so that no live id equals NONE.
        let generation = (slot.generation.get() + 1) % ((1 << (32 - INDEX_BITS)) - 1);
        slot.generation.set(generation);
        slot.base.set(mapping.base().as_ptr() as usize);
        slot.len.set(mapping.len());
        slot.mapping.replace(Some(mapping));
        Ok(RegionId::new(index, generation))
    }

    /// Closes a region: its id is refused from now on. The mapping is let go at once, or with the last lease on it.
    /// Removing twice is harmless.
    pub fn remove(&self, region: RegionId) {
        let Some(slot) = self.slot(region) else { return };
        slot.len.set(0);
        slot.base.set(0);
        if slot.leases.get() == 0 {
            slot.mapping.replace(None);
        }
    }

    /// Regions that are open or still leased.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.iter().filter(|slot| slot.mapping.borrow().is_some()).count()
    }

    /// Whether no region is open or leased.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// I/O that holds this region, whether it is still open or not.
    #[must_use]
    pub fn leases(&self, region: RegionId) -> u32 {
        self.slot(region).map_or(0, |slot| slot.leases.get())
    }

    /// Whether the slice lies in an open region.
    ///
    /// # Errors
    /// Says what is wrong with the slice.
    pub fn check(&self, slice: BufferSlice) -> Result<(), BadSlice> {
        self.resolve(slice).map(drop)
    }

    /// The address of `slice` modulo `alignment` (a power of two): what direct I/O wants to be zero.
    ///
    /// # Errors
    /// A bad slice.
    pub fn misalignment(&self, slice: BufferSlice, alignment: u32) -> Result<u32, BadSlice> {
        let address = self.resolve(slice)? as usize;
        #[allow(clippy::cast_possible_truncation)] // less than `alignment`
        Ok((address & (alignment as usize - 1)) as u32)
    }

    /// Has the slice's first cache lines fetched, two at most: a hint, for what will be read or written soon. A bad slice is
    /// nobody's.
    #[inline]
    pub fn prefetch(&self, slice: BufferSlice) {
        let Ok(first) = self.resolve(slice) else { return };
        prefetch(first, Access::Write);
        let last = (slice.length as usize).clamp(1, LINE) - 1;
        if (first as usize % LINE) + last >= LINE {
            prefetch(first.wrapping_add(last), Access::Write);
        }
    }

    /// Copies the slice's bytes out. Bytes another process writes meanwhile may arrive torn, never worse.
    ///
    /// # Errors
    /// A bad slice, or `into` of another length.
    #[inline]
    pub fn read(&self, from: BufferSlice, into: &mut [u8]) -> Result<(), BadSlice> {
        let source = self.resolve(from)?;
        if into.len() != from.length as usize {
            return Err(BadSlice::LengthMismatch);
        }
        // SAFETY: `resolve` gives `from.length` mapped bytes that stay mapped while `self` is borrowed; `into` is ours alone
        // and of the same length.
        unsafe { raw_copy(into.as_mut_ptr(), source, into.len()) };
        Ok(())
    }

    /// Reads a slice of sixteen bytes as a little-endian number, with the caveat of [`RegionTable::read`].
    ///
    /// # Errors
    /// A bad slice, or one of another length.
    #[inline]
    pub fn read_u128(&self, from: BufferSlice) -> Result<u128, BadSlice> {
        let source = self.resolve(from)?;
        if from.length as usize != size_of::<Sixteen>() {
            return Err(BadSlice::LengthMismatch);
        }
        // SAFETY: `resolve` gives sixteen mapped bytes that stay mapped while `self` is borrowed; the access is volatile and may
        // be anywhere.
        let Sixteen(low, high) = unsafe { source.cast::<Sixteen>().read_volatile() };
        Ok(u128::from(u64::from_le(low)) | u128::from(u64::from_le(high)) << 64)
    }

    /// Copies bytes into the slice.
    ///
    /// # Errors
    /// A bad slice, or `from` of another length.
    #[inline]
    pub fn write(&self, to: BufferSlice, from: &[u8]) -> Result<(), BadSlice> {
        let target = self.resolve(to)?;
        if from.len() != to.length as usize {
            return Err(BadSlice::LengthMismatch);
        }
        // SAFETY: as in `read`, with the roles exchanged.
        unsafe { raw_copy(target, from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Copies between two slices, which may overlap.
    ///
    /// # Errors
    /// A bad slice, or different lengths.
    #[inline]
    pub fn copy(&self, to: BufferSlice, from: BufferSlice) -> Result<(), BadSlice> {
        let (target, source) = (self.resolve(to)?, self.resolve(from)?);
        if to.length != from.length {
            return Err(BadSlice::LengthMismatch);
        }
        // SAFETY: both ranges are mapped for the borrow; raw_copy allows overlap.
        unsafe { raw_copy(target, source, from.length as usize) };
        Ok(())
    }

    /// Fills the slice with zeroes.
    ///
    /// # Errors
    /// A bad slice.
    #[inline]
    pub fn fill_zero(&self, slice: BufferSlice) -> Result<(), BadSlice> {
        let target = self.resolve(slice)?;
        // SAFETY: `resolve` gives `slice.length` mapped bytes; memset forms no reference.
        unsafe { libc::memset(target.cast(), 0, slice.length as usize) };
        Ok(())
    }

    /// Whether every byte of the slice is zero. Meant for pools that nobody else writes.
    ///
    /// # Errors
    /// A bad slice.
    pub fn is_zero(&self, slice: BufferSlice) -> Result<bool, BadSlice> {
        let start = self.resolve(slice)?;
        // SAFETY: `resolve` gives `slice.length` mapped bytes that stay mapped while `self` is borrowed.
        Ok(unsafe { raw_is_zero(start, slice.length as usize) })
    }

    /// Whether two slices of one length hold the same bytes. Meant for pools that nobody else writes.
    ///
    /// # Errors
    /// A bad slice, or two lengths.
    pub fn equal(&self, one: BufferSlice, other: BufferSlice) -> Result<bool, BadSlice> {
        if one.length != other.length {
            return Err(BadSlice::LengthMismatch);
        }
        let (first, second) = (self.resolve(one)?, self.resolve(other)?);
        // SAFETY: `resolve` gives `length` mapped bytes each, which stay mapped while `self` is borrowed.
        let order = unsafe { libc::memcmp(first.cast(), second.cast(), one.length as usize) };
        Ok(order == 0)
    }

    /// Address of the slice, and a lease on its region that [`RegionTable::release`] gives back.
    pub(crate) fn lease(&self, slice: BufferSlice) -> Result<*mut u8, BadSlice> {
        let address = self.resolve(slice)?;
        let slot = &self.slots[slice.region.index()];
        slot.leases.set(slot.leases.get() + 1);
        Ok(address)
    }

    /// Gives back one lease; the mapping of a removed region goes with the last.
    pub(crate) fn release(&self, region: RegionId) {
        let Some(slot) = self.slot(region) else { return };
        let leases = slot.leases.get().saturating_sub(1);
        slot.leases.set(leases);
        if leases == 0 && slot.base.get() == 0 {
            slot.mapping.replace(None);
        }
    }

    /// What no other table of this process is called.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The slot of an id of this generation that still has a mapping.
    fn slot(&self, region: RegionId) -> Option<&Slot> {
        let slot = self.slots.get(region.index())?;
        (slot.generation.get() == region.generation() && slot.mapping.borrow().is_some())
            .then_some(slot)
    }

    /// The address of a slice of an open region.
    #[inline]
    fn resolve(&self, slice: BufferSlice) -> Result<*mut u8, BadSlice> {
        let slot = self.slots.get(slice.region.index()).ok_or(BadSlice::Stale)?;
        let base = slot.base.get();
        if slot.generation.get() != slice.region.generation() || base == 0 {
            return Err(BadSlice::Stale);
        }
        let end = slice.offset.checked_add(u64::from(slice.length)).ok_or(BadSlice::OutOfBounds)?;
        if end > slot.len.get() as u64 {
            return Err(BadSlice::OutOfBounds);
        }
        Ok((base + usize_from(slice.offset)) as *mut u8)
    }
}

impl Drop for RegionTable {
    fn drop(&mut self) {
        for slot in &self.slots {
            if slot.leases.get() > 0 {
                // The kernel may still read or write these pages; leaking them is the only sound thing left.
                mem::forget(slot.mapping.take());
            }
        }
    }
}

/// Copies `length` bytes that another process may be writing. The headers and status bytes of requests go as one access each.
///
/// # Safety
/// Both ranges must be mapped and `to` writable. They may overlap.
#[inline]
unsafe fn raw_copy(to: *mut u8, from: *const u8, length: usize) {
    // SAFETY: the caller's promise. Volatile accesses and the C library's memmove let the compiler draw no conclusion from
    // the bytes, which is what shared memory needs; memmove allows overlap, and so does an access that reads all of it first.
    unsafe {
        match length {
            1 => to.write_volatile(from.read_volatile()),
            16 => to.cast::<Sixteen>().write_volatile(from.cast::<Sixteen>().read_volatile()),
            _ => {
                libc::memmove(to.cast(), from.cast(), length);
            }
        }
    }
}

/// Sixteen bytes anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Sixteen(u64, u64);

/// Whether `length` bytes are all zero: words are gathered 8 at a time, so that the loop vectorises.
///
/// # Safety
/// The range must be mapped.
unsafe fn raw_is_zero(start: *const u8, length: usize) -> bool {
    const WORDS: usize = 32;
    const BLOCK: usize = WORDS * 8;
    let mut position = 0;
    while position + BLOCK <= length {
        let mut gathered = 0u64;
        for word in 0..WORDS {
            // SAFETY: `position + word * 8 + 8` is within the range the caller promises; reads may be unaligned.
            gathered |= unsafe { start.add(position + word * 8).cast::<u64>().read_unaligned() };
        }
        if gathered != 0 {
            return false;
        }
        position += BLOCK;
    }
    while position < length {
        // SAFETY: `position` is within the range the caller promises.
        if unsafe { start.add(position).read() } != 0 {
            return false;
        }
        position += 1;
    }
    true
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use crate::mapping::Backing;

    /// A table with one region of `len` bytes.
    pub(crate) fn memory(len: usize) -> (RegionTable, RegionId, Arc<Mapping>) {
        let table = RegionTable::with_capacity(4);
        let mapping = Mapping::anonymous(len).unwrap();
        let region = table.insert(Arc::clone(&mapping)).unwrap();
        (table, region, mapping)
    }

    fn table_with(len: usize) -> (RegionTable, RegionId) {
        let (table, region, _) = memory(len);
        (table, region)
    }

    fn slice(region: RegionId, offset: u64, length: u32) -> BufferSlice {
        BufferSlice { region, length, offset }
    }

    #[test]
    fn bytes_written_are_read_back() {
        let (table, id) = table_with(8192);
        table.write(slice(id, 4090, 5), b"hello").unwrap();
        let mut back = [0; 5];
        table.read(slice(id, 4090, 5), &mut back).unwrap();
        assert_eq!(&back, b"hello");
        assert!(!table.is_zero(slice(id, 0, 8192)).unwrap());
        table.fill_zero(slice(id, 4090, 5)).unwrap();
        assert!(table.is_zero(slice(id, 1, 8191)).unwrap());
    }

    #[test]
    fn populating_leaves_the_content_as_it_is() {
        let (table, id, mapping) = memory(3 << 20);
        table.write(slice(id, (2 << 20) - 2, 5), b"hello").unwrap();
        for length in [0, 1, 4097, (2 << 20) + 5, 9 << 20] {
            mapping.populate(length);
        }
        let mut back = [0; 5];
        table.read(slice(id, (2 << 20) - 2, 5), &mut back).unwrap();
        assert_eq!(&back, b"hello");
        assert!(table.is_zero(slice(id, 0, (2 << 20) - 2)).unwrap());
    }

    #[test]
    fn what_is_populated_is_there_and_little_else() {
        let (_table, _id, mapping) = memory(6 << 20);
        let resident = || {
            let (base, length) = mapping.extent();
            let mut pages = vec![0_u8; length / PAGE_SIZE];
            // SAFETY: a mapping of ours, and a byte for each of its pages.
            let asked = unsafe { libc::mincore(base as *mut _, length, pages.as_mut_ptr()) };
            assert_eq!(asked, 0);
            pages.iter().map(|page| usize::from(page & 1)).sum::<usize>()
        };
        // Pages that the host has reserved are huge, and there whole.
        let are_there = |pages| match mapping.backing() {
            Backing::HugePages => resident() >= pages,
            _ => resident() == pages,
        };
        assert!(are_there(0));
        mapping.populate(100_001);
        assert!(are_there(25), "{} pages", resident());
        mapping.populate(3 << 20);
        assert!(are_there(3 << 8), "{} pages", resident());
    }

    #[test]
    fn a_slice_that_leaves_its_region_is_refused() {
        let (table, id) = table_with(4096);
        assert_eq!(table.check(slice(id, 4095, 2)), Err(BadSlice::OutOfBounds));
        assert_eq!(table.check(slice(id, u64::MAX, 2)), Err(BadSlice::OutOfBounds));
        assert_eq!(table.check(slice(id, 4096, 0)), Ok(()));
        assert_eq!(table.check(BufferSlice::EMPTY), Err(BadSlice::Stale));
    }

    #[test]
    fn sixteen_bytes_anywhere_are_a_little_endian_number() {
        let (table, id) = table_with(4096);
        let bytes: Vec<u8> = (1..=16).collect();
        for offset in [0, 3, 4096 - 16] {
            table.write(slice(id, offset, 16), &bytes).unwrap();
            let expected = u128::from_le_bytes(bytes.clone().try_into().unwrap());
            assert_eq!(table.read_u128(slice(id, offset, 16)), Ok(expected));
        }
        assert_eq!(table.read_u128(slice(id, 0, 15)), Err(BadSlice::LengthMismatch));
        assert_eq!(table.read_u128(slice(id, 0, 17)), Err(BadSlice::LengthMismatch));
        assert_eq!(table.read_u128(slice(id, 4096 - 15, 16)), Err(BadSlice::OutOfBounds));
        table.remove(id);
        assert_eq!(table.read_u128(slice(id, 0, 16)), Err(BadSlice::Stale));
    }

    #[test]
    fn a_prefetch_of_anything_changes_nothing() {
        let (table, id) = table_with(4096);
        table.write(slice(id, 4088, 8), b"as it is").unwrap();
        for bad in [slice(id, 4000, 4096), slice(id, u64::MAX, 1), BufferSlice::EMPTY] {
            table.prefetch(bad);
        }
        table.prefetch(slice(id, 4088, 8));
        table.prefetch(slice(id, 60, 4000));
        let mut back = [0; 8];
        table.read(slice(id, 4088, 8), &mut back).unwrap();
        assert_eq!(&back, b"as it is");
    }

    #[test]
    fn a_removed_region_is_stale_and_its_slot_is_reused_under_another_name() {
        let (table, id) = table_with(4096);
        table.remove(id);
        assert_eq!(table.check(slice(id, 0, 1)), Err(BadSlice::Stale));
        let again = table.insert(Mapping::anonymous(4096).unwrap()).unwrap();
        assert_ne!(id, again);
        assert_eq!(table.check(slice(id, 0, 1)), Err(BadSlice::Stale));
        assert_eq!(table.check(slice(again, 0, 1)), Ok(()));
    }

    #[test]
    fn a_leased_region_outlives_its_removal() {
        let table = RegionTable::with_capacity(1);
        let mapping = Mapping::anonymous(4096).unwrap();
        let id = table.insert(Arc::clone(&mapping)).unwrap();
        table.lease(slice(id, 0, 8)).unwrap();
        table.remove(id);
        assert_eq!(Arc::strong_count(&mapping), 2);
        assert_eq!(table.insert(Mapping::anonymous(4096).unwrap()), Err(TableFull));
        table.release(id);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }

    #[test]
    fn a_table_dropped_under_a_lease_leaks_the_mapping() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let table = RegionTable::with_capacity(1);
        let id = table.insert(Arc::clone(&mapping)).unwrap();
        table.lease(slice(id, 0, 8)).unwrap();
        drop(table);
        assert_eq!(Arc::strong_count(&mapping), 2);
    }
}
