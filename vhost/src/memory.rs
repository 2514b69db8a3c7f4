//! Guest memory: from the addresses that a guest and its front end use to bytes of mapped regions.
//!
//! Descriptors carry guest addresses and are translated on the reactor, once per buffer, to [`BufferSlice`]s; ring addresses
//! are the front end's own and are resolved once, on the control side, to [`Area`]s. The map is sorted and remembers the
//! region of the last hit: most guests have one or two regions that matter.
//!
//! Control builds a map and moves it to the reactor, which enters the mappings in its [`RegionTable`]; regions that an
//! earlier map had too keep their id, so requests in flight are not disturbed by a change that does not concern them.
//!
//! Invariants: regions do not overlap, neither by guest nor by user address; a region's end does not wrap.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use resilver_sys::area::AreaError;
use resilver_sys::{
    Area, BufferSlice, Mapping, MappingError, RegionId, RegionTable, TableFull, usize_from,
};

use crate::message::RegionDescription;
use crate::postcopy::pages::{RegionPages, Wanted};
use crate::protocol::MEMORY_SLOTS_MAX;

/// Why memory was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It could not be mapped.
    #[error("guest memory at {guest_address:#x}: {source}")]
    Mapping {
        /// Where the guest sees it.
        guest_address: u64,
        /// Why.
        source: MappingError,
    },
    /// Its pages were to come later, and those of its file cannot.
    #[error(
        "guest memory at {guest_address:#x} cannot arrive later ({source}); post-copy needs a memfd, or a file on tmpfs or \
         hugetlbfs"
    )]
    NotArriving {
        /// Where the guest sees it.
        guest_address: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The region is empty or ends beyond the address space.
    #[error("a memory region of {size} bytes at {address:#x} is empty or wraps")]
    Extent {
        /// Where it begins.
        address: u64,
        /// Its length.
        size: u64,
    },
    /// Two regions overlap.
    #[error("the memory region at {address:#x} overlaps another one")]
    Overlap {
        /// Where the second begins.
        address: u64,
    },
    /// There are as many regions as there may be.
    #[error("there are {MEMORY_SLOTS_MAX} memory regions already")]
    TooMany,
    /// No such region.
    #[error("there is no memory region of {size} bytes at {address:#x}")]
    NotFound {
        /// Where it should begin.
        address: u64,
        /// Its length.
        size: u64,
    },
    /// A ring is not in guest memory.
    #[error("the ring's {part} at {address:#x} is not in guest memory")]
    RingOutside {
        /// Which part.
        part: &'static str,
        /// Where it was said to be.
        address: u64,
    },
    /// A ring is not aligned as virtio wants it.
    #[error("the ring's {part} at {address:#x} is misaligned: {source}")]
    RingMisaligned {
        /// Which part.
        part: &'static str,
        /// Where it is.
        address: u64,
        /// What would be right.
        source: AreaError,
    },
}

/// One region.
#[derive(Debug, Clone)]
pub struct GuestRegion {
    guest_address: u64,
    user_address: u64,
    size: u64,
    mapping: Arc<Mapping>,
    /// Its name in the reactor's table; [`RegionId::NONE`] on the control side.
    id: RegionId,
    /// Which of its pages have come, while the guest's memory is on its way.
    pages: Option<Arc<RegionPages>>,
}

impl GuestRegion {
    /// Maps what a front end describes.
    ///
    /// # Errors
    /// The extent wraps, or the kernel or the file refuse.
    pub fn map(description: &RegionDescription, fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        let RegionDescription { guest_address, size, user_address, file_offset } = *description;
        for address in [guest_address, user_address] {
            if size == 0 || address.checked_add(size).is_none() {
                return Err(MemoryError::Extent { address, size });
            }
        }
        let mapping = Mapping::shared(fd, file_offset, size)
            .map_err(|source| MemoryError::Mapping { guest_address, source })?;
        Ok(Self { guest_address, user_address, size, mapping, id: RegionId::NONE, pages: None })
    }

    /// The same, whose pages come later.
    #[must_use]
    pub fn arriving(self, pages: Arc<RegionPages>) -> Self {
        Self { pages: Some(pages), ..self }
    }

    /// What is mapped.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The pages of these bytes that are missing; none if all are there.
    fn wanted(&self, offset: u64, length: u64) -> Option<Wanted> {
        Wanted::of(self.pages.as_ref()?, &self.mapping, offset, length)
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Ends do not wrap: checked when each was mapped.
        let apart = |one: u64, two: u64| one + self.size <= two || two + other.size <= one;
        !apart(self.guest_address, other.guest_address)
            || !apart(self.user_address, other.user_address)
    }
}

/// The memory of one guest.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    /// Sorted by guest address.
    regions: Vec<GuestRegion>,
    last: Cell<usize>,
    /// Pages of a region may be missing.
    arriving: bool,
}

impl GuestMemory {
    /// A map of these regions.
    ///
    /// # Errors
    /// Too many, or two overlap.
    pub fn new(regions: Vec<GuestRegion>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for region in regions {
            memory.add(region)?;
        }
        Ok(memory)
    }

    /// Adds one region.
    ///
    /// # Errors
    /// Too many, or it overlaps another.
    pub fn add(&mut self, region: GuestRegion) -> Result<(), MemoryError> {
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(MemoryError::TooMany);
        }
        if self.regions.iter().any(|known| known.overlaps(&region)) {
            return Err(MemoryError::Overlap { address: region.guest_address });
        }
        let at = self.regions.partition_point(|known| known.guest_address < region.guest_address);
        self.arriving |= region.pages.is_some();
        self.regions.insert(at, region);
        Ok(())
    }

    /// Removes the region that `description` names. Its file offset is not looked at (vhost-user, "VHOST_USER_REM_MEM_REG").
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&mut self, description: &RegionDescription) -> Result<(), MemoryError> {
        let same = |known: &GuestRegion| {
            known.guest_address == description.guest_address
                && known.user_address == description.user_address
                && known.size == description.size
        };
        let at = self.regions.iter().position(same).ok_or(MemoryError::NotFound {
            address: description.guest_address,
            size: description.size,
        })?;
        self.regions.remove(at);
        self.last.set(0);
        Ok(())
    }

    /// Regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether pages were found missing under a region: its file was shortened after it was mapped.
    #[must_use]
    pub fn has_shrunk(&self) -> bool {
        let shrunk = |pages: &Arc<RegionPages>| pages.has_shrunk();
        let lost =
            |it: &GuestRegion| it.mapping.poisoned() || it.pages.as_ref().is_some_and(shrunk);
        self.regions.iter().any(lost)
    }

    /// Whether pages may be missing: the guest's memory is on its way ([`crate::postcopy`]).
    #[inline]
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        self.arriving
    }

    /// All of it has come.
    pub fn arrived(&mut self) {
        self.arriving = false;
        for region in &mut self.regions {
            region.pages = None;
        }
    }

    /// Whether it has the region whose pages these are.
    pub(crate) fn has_pages(&self, pages: &Arc<RegionPages>) -> bool {
        self.regions.iter().filter_map(|it| it.pages.as_ref()).any(|it| Arc::ptr_eq(it, pages))
    }

    /// The missing pages of a slice that [`GuestMemory::translate`] gave; none if all are there.
    #[must_use]
    pub fn wanted(&self, slice: &BufferSlice) -> Option<Wanted> {
        let region = self.regions.iter().find(|region| region.id == slice.region)?;
        region.wanted(slice.offset, u64::from(slice.length))
    }

    /// The missing pages of `length` bytes at the front end's address `address`, of those that lie in the region that has the
    /// first; none if all are there.
    #[must_use]
    pub fn wanted_at(&self, address: u64, length: usize) -> Option<Wanted> {
        let offset_in = |region: &GuestRegion| {
            let offset = address.checked_sub(region.user_address)?;
            (offset < region.size).then_some(offset)
        };
        let (region, offset) =
            self.regions.iter().find_map(|it| offset_in(it).map(|offset| (it, offset)))?;
        region.wanted(offset, (length as u64).min(region.size - offset))
    }

    /// Where guest memory ends: behind its highest guest address.
    #[must_use]
    pub fn end(&self) -> u64 {
        // Ends do not wrap: checked when each region was mapped.
        self.regions.last().map_or(0, |region| region.guest_address + region.size)
    }

    /// The guest address of a slice that [`GuestMemory::translate`] gave; none if it was another map's.
    #[must_use]
    pub fn guest_address(&self, slice: &BufferSlice) -> Option<u64> {
        let is_it = |region: &&GuestRegion| region.id == slice.region;
        let likely = self.regions.get(self.last.get()).filter(is_it);
        let region = likely.or_else(|| self.regions.iter().find(is_it))?;
        region.guest_address.checked_add(slice.offset)
    }

    /// The first bytes at guest address `address`: as many of `length` as its region has. None outside guest memory.
    #[inline]
    #[must_use]
    pub fn translate(&self, address: u64, length: u32) -> Option<BufferSlice> {
        if let Some(slice) = self.regions.get(self.last.get())?.translate(address, length) {
            return Some(slice);
        }
        self.search(address, length)
    }

    fn search(&self, address: u64, length: u32) -> Option<BufferSlice> {
        let at = self.regions.partition_point(|region| region.guest_address <= address);
        let at = at.checked_sub(1)?;
        let slice = self.regions.get(at)?.translate(address, length)?;
        self.last.set(at);
        Some(slice)
    }

    /// The slices that `length` bytes at guest address `address` make, up to the first byte that is not guest memory.
    pub fn slices(&self, address: u64, length: u32) -> impl Iterator<Item = BufferSlice> + '_ {
        let (mut next, mut left) = (Some(address), length);
        std::iter::from_fn(move || {
            let address = next.filter(|_| left > 0)?;
            let slice = self.translate(address, left)?;
            left -= slice.length;
            next = address.checked_add(u64::from(slice.length));
            Some(slice)
        })
    }

    /// The `length` bytes at the front end's address `address`, as a ring's part. They must lie in one region.
    ///
    /// # Errors
    /// They do not, or the address is not aligned.
    pub fn area(
        &self,
        part: &'static str,
        address: u64,
        length: usize,
        alignment: usize,
    ) -> Result<Area, MemoryError> {
        let outside = MemoryError::RingOutside { part, address };
        let holds = |region: &&GuestRegion| {
            address
                .checked_sub(region.user_address)
                .and_then(|offset| region.size.checked_sub(offset))
                .is_some_and(|rest| rest >= length as u64)
        };
        let Some(region) = self.regions.iter().find(holds) else { return Err(outside) };
        // What must be aligned is the address that we access, so it is our mapping's that is looked at.
        Area::new(&region.mapping, address - region.user_address, length, alignment)
            .map_err(|source| MemoryError::RingMisaligned { part, address, source })
    }

    /// What the guest calls the front end's address `address`; none outside guest memory.
    #[must_use]
    pub fn guest_address_of(&self, address: u64) -> Option<u64> {
        let inside = |region: &GuestRegion| {
            let offset = address.checked_sub(region.user_address)?;
            (offset < region.size).then(|| region.guest_address + offset)
        };
        self.regions.iter().find_map(inside)
    }

    /// Enters the regions in the reactor's table; those that `old` has too keep the id they have there.
    ///
    /// # Errors
    /// The table is full; nothing was entered then.
    pub fn enter(&mut self, table: &RegionTable, old: &Self) -> Result<(), TableFull> {
        for at in 0..self.regions.len() {
            let Some(region) = self.regions.get_mut(at) else { break };
            region.id = match old.id_of(region) {
                Some(id) => id,
                None => match table.insert(Arc::clone(&region.mapping)) {
                    Ok(id) => id,
                    Err(full) => {
                        self.regions.truncate(at);
                        self.leave(table, old);
                        return Err(full);
                    }
                },
            };
        }
        Ok(())
    }

    /// Closes the regions that `kept` does not have.
    pub fn leave(&self, table: &RegionTable, kept: &Self) {
        for region in &self.regions {
            if kept.id_of(region).is_none() {
                table.remove(region.id);
            }
        }
    }

    /// The id under which the very mapping of `region` is known here.
    fn id_of(&self, region: &GuestRegion) -> Option<RegionId> {
        let at = self
            .regions
            .binary_search_by_key(&region.guest_address, |known| known.guest_address)
            .ok()?;
        let known = self.regions.get(at)?;
        Arc::ptr_eq(&known.mapping, &region.mapping).then_some(known.id)
    }
}

impl GuestRegion {
    #[inline]
    fn translate(&self, address: u64, length: u32) -> Option<BufferSlice> {
        let offset = address.wrapping_sub(self.guest_address);
        if offset >= self.size {
            return None;
        }
        #[allow(clippy::cast_possible_truncation)] // at most `length`
        let length = u64::from(length).min(self.size - offset) as u32;
        Some(BufferSlice { region: self.id, length, offset })
    }
}

/// Reads `into.len()` bytes of guest memory at `address`, across regions. None where some of it is not guest memory.
#[inline]
pub fn read_guest(
    memory: &GuestMemory,
    table: &RegionTable,
    address: u64,
    into: &mut [u8],
) -> Option<()> {
    let wanted = u32::try_from(into.len()).ok()?;
    let first = memory.translate(address, wanted)?;
    if first.length == wanted {
        return table.read(first, into).ok();
    }
    read_regions(memory, table, address, into)
}

/// As [`read_guest`], of several regions.
#[cold]
fn read_regions(
    memory: &GuestMemory,
    table: &RegionTable,
    address: u64,
    into: &mut [u8],
) -> Option<()> {
    let mut rest = into;
    let wanted = u32::try_from(rest.len()).ok()?;
    for slice in memory.slices(address, wanted) {
        let (now, later) = rest.split_at_mut_checked(usize_from(u64::from(slice.length)))?;
        table.read(slice, now).ok()?;
        rest = later;
    }
    rest.is_empty().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};

    fn file(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        fd
    }

    fn region(fd: &OwnedFd, guest_address: u64, size: u64, file_offset: u64) -> GuestRegion {
        let user_address = 0x7000_0000_0000 + guest_address;
        let description = RegionDescription { guest_address, size, user_address, file_offset };
        GuestRegion::map(&description, fd.as_fd()).unwrap()
    }

    #[test]
    fn a_buffer_across_two_regions_comes_in_two_pieces() {
        let fd = file(0x3000);
        let table = RegionTable::with_capacity(8);
        let mut memory = GuestMemory::new(vec![
            region(&fd, 0x2000, 0x1000, 0x1000),
            region(&fd, 0x1000, 0x1000, 0),
        ])
        .unwrap();
        memory.enter(&table, &GuestMemory::default()).unwrap();
        let first = memory.translate(0x1ff0, 0x20).unwrap();
        let second = memory.translate(0x2000, 0x10).unwrap();
        assert_eq!((first.length, first.offset, second.offset), (0x10, 0xff0, 0));
        assert_ne!(first.region, second.region);
        assert_eq!(memory.translate(0xfff, 1), None);
        assert_eq!(memory.translate(0x3000, 1), None);
        assert_eq!(memory.translate(u64::MAX, 1), None);
        table.write(first, &[7; 0x10]).unwrap();
        table.write(second, &[8; 0x10]).unwrap();
        let mut back = [0; 0x20];
        read_guest(&memory, &table, 0x1ff0, &mut back).unwrap();
        assert_eq!((back[0], back[15], back[16], back[31]), (7, 7, 8, 8));
        assert_eq!(read_guest(&memory, &table, 0x2ff0, &mut back), None);
    }

    #[test]
    fn overlapping_empty_and_wrapping_regions_are_refused() {
        let fd = file(0x4000);
        let mut memory = GuestMemory::new(vec![region(&fd, 0x1000, 0x1000, 0)]).unwrap();
        for at in [0x800, 0x1000, 0x1fff] {
            let overlap = memory.add(region(&fd, at, 0x1000, 0x1000)).unwrap_err();
            assert!(matches!(overlap, MemoryError::Overlap { .. }), "{at:#x}");
        }
        memory.add(region(&fd, 0x2000, 0x1000, 0x1000)).unwrap();
        for (guest_address, size) in [(0, 0), (u64::MAX - 0xfff, 0x2000)] {
            let description =
                RegionDescription { guest_address, size, user_address: 0, file_offset: 0 };
            assert!(matches!(
                GuestRegion::map(&description, fd.as_fd()),
                Err(MemoryError::Extent { .. })
            ));
        }
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_concern() {
        let fd = file(0x4000);
        let table = RegionTable::with_capacity(2);
        let mut old = GuestMemory::new(vec![
            region(&fd, 0x1000, 0x1000, 0),
            region(&fd, 0x2000, 0x1000, 0x1000),
        ])
        .unwrap();
        old.enter(&table, &GuestMemory::default()).unwrap();
        let gone = RegionDescription {
            guest_address: 0x2000,
            size: 0x1000,
            user_address: 0x7000_0000_2000,
            file_offset: 77,
        };
        let mut new = old.clone();
        new.remove(&gone).unwrap();
        assert!(matches!(new.remove(&gone), Err(MemoryError::NotFound { .. })));
        let (kept, closed) = (old.translate(0x1000, 1).unwrap(), old.translate(0x2000, 1).unwrap());
        new.enter(&table, &old).unwrap();
        old.leave(&table, &new);
        assert_eq!(new.translate(0x1000, 1), Some(kept));
        assert!(table.check(kept).is_ok() && table.check(closed).is_err());
    }

    #[test]
    fn a_map_that_does_not_fit_the_table_leaves_nothing_behind() {
        let fd = file(0x4000);
        let table = RegionTable::with_capacity(1);
        let mut memory = GuestMemory::new(vec![
            region(&fd, 0x1000, 0x1000, 0),
            region(&fd, 0x2000, 0x1000, 0x1000),
        ])
        .unwrap();
        assert_eq!(memory.enter(&table, &GuestMemory::default()), Err(TableFull));
        assert!(table.is_empty());
    }

    #[test]
    fn a_ring_must_lie_in_one_region() {
        let fd = file(0x2000);
        let memory = GuestMemory::new(vec![region(&fd, 0x1000, 0x1000, 0)]).unwrap();
        let base = 0x7000_0000_1000;
        assert_eq!(memory.area("used ring", base, 0x1000, 4).unwrap().len(), 0x1000);
        for (address, length) in [(base - 1, 8), (base + 0xff9, 8), (u64::MAX, 8)] {
            let refused = memory.area("used ring", address, length, 1).unwrap_err();
            assert!(matches!(refused, MemoryError::RingOutside { .. }), "{address:#x}");
        }
        let refused = memory.area("used ring", base + 2, 8, 4).unwrap_err();
        assert!(matches!(refused, MemoryError::RingMisaligned { .. }));
    }
}
