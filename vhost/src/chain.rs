//! Descriptor chains as two byte streams: what the device may read, then what it may write.
//!
//! A device must not rely on how a driver cuts its buffers into descriptors (virtio 2.7.4.1, "Message Framing"), so a
//! chain is gathered once into slices and consumed by bytes: a header may span descriptors, and header and data may share
//! one. Buffers that adjoin in memory become one slice.
//!
//! **Trust.** What is used of a descriptor is the copy that was checked. A chain that cannot be followed to its end is a
//! [`ChainFault`] and breaks the ring, because nobody knows where its status byte would be. A chain that ends as it should but
//! names memory that is not the guest's, or is cut into too many pieces, is a bad request: it keeps its status byte and the ring
//! goes on.

use resilver_bdev::SEGMENTS_MAX;
use resilver_reactor::Context;
use resilver_sys::BufferSlice;

use crate::memory::{GuestMemory, read_guest};
use crate::protocol::{BLK_HEADER_BYTES, BLK_RANGE_BYTES, descriptor_flags};
use crate::ring::{ChainFault, DESCRIPTOR_BYTES, Descriptor, Descriptors, Format};
use crate::split::SplitChain;

mod arriving;

pub(crate) use arriving::Arrived;

/// The most slices of one chain: the data of the largest I/O, its header and its status.
pub const CHAIN_SLICES_MAX: usize = SEGMENTS_MAX + 2;
/// The longest indirect table. Longer than any negotiated request (`seg_max` + 2), short enough to bound the work.
pub const INDIRECT_ENTRIES_MAX: u32 = 1024;

/// Bytes of a request's header, of a range and of a descriptor: what [`Chain::read`] reads at a time.
pub(crate) const WORD: u32 = 16;
const _: () = assert!(
    WORD as usize == BLK_HEADER_BYTES
        && WORD as usize == BLK_RANGE_BYTES
        && WORD as usize == DESCRIPTOR_BYTES
);

/// Whether indirect tables were negotiated (VIRTIO_F_RING_INDIRECT_DESC).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indirect {
    /// A table in a chain is a fault.
    Refused,
    /// A chain may end in a table.
    Allowed,
}

/// Whether all of a chain's buffers could be gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffers {
    /// They could.
    Gathered,
    /// One is not in guest memory.
    Wild,
    /// There are more than [`CHAIN_SLICES_MAX`].
    TooMany,
}

/// One chain, gathered. Reused for every request, so that nothing is allocated.
#[derive(Debug)]
pub struct Chain {
    slices: Box<[BufferSlice; CHAIN_SLICES_MAX]>,
    /// Slices in use.
    len: usize,
    /// The first slice that has not been consumed; readable ones come first.
    first: usize,
    /// How many slices are readable.
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    /// Address and length of the last buffer that the device may write, if there are writable bytes.
    last_writable: (u64, u32),
    buffers: Buffers,
    status: BufferSlice,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            slices: Box::new([BufferSlice::EMPTY; CHAIN_SLICES_MAX]),
            len: 0,
            first: 0,
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            last_writable: (0, 0),
            buffers: Buffers::Gathered,
            status: BufferSlice::EMPTY,
        }
    }
}

/// What a chain takes of its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extent {
    /// Descriptors.
    pub entries: u16,
    /// The link of the last one: in a packed ring, the buffer's id.
    pub last_link: u16,
}

/// How chains are gathered. The two ways are types, so that each has a path of its own through a queue, and whoever waits for nobody
/// has no branch for it.
pub(crate) trait Gather {
    /// Whether chains may be looked at before their turn.
    const AHEAD: bool;

    /// As [`Chain::gather`]; none where pages are missing.
    ///
    /// # Errors
    /// As [`Chain::gather`].
    fn gather<D: Descriptors>(
        chain: &mut Chain,
        cx: &Context<'_>,
        memory: &GuestMemory,
        descriptors: D,
        indirect: Indirect,
    ) -> Result<Option<Extent>, ChainFault>;
}

/// All of the guest's memory is there.
pub(crate) enum AllThere {}

impl Gather for AllThere {
    const AHEAD: bool = true;

    #[inline(always)]
    fn gather<D: Descriptors>(
        chain: &mut Chain,
        cx: &Context<'_>,
        memory: &GuestMemory,
        descriptors: D,
        indirect: Indirect,
    ) -> Result<Option<Extent>, ChainFault> {
        chain.gather(cx, memory, descriptors, indirect).map(Some)
    }
}

/// Descriptors of a table that are fetched together: those of most requests.
const TOGETHER: u32 = 8;

/// An indirect table, and its descriptors that were fetched last.
#[derive(Debug)]
pub struct Table {
    address: u64,
    entries: u32,
    /// The first of those that have been fetched, which are [`TOGETHER`] or all that follow; `entries` if none have.
    first: u32,
    fetched: [[u8; DESCRIPTOR_BYTES]; TOGETHER as usize],
}

impl Chain {
    /// Gathers a chain; answers what it takes of its ring. Its last writable byte is set aside for the status.
    ///
    /// # Errors
    /// The chain cannot be followed, or has no room for a status.
    #[inline(always)]
    pub fn gather<D: Descriptors>(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        descriptors: D,
        indirect: Indirect,
    ) -> Result<Extent, ChainFault> {
        self.reset();
        let extent =
            self.walk(cx, memory, descriptors, indirect, |_, _| Ok::<_, ChainFault>(()))?;
        self.set_status_aside(memory)?;
        Ok(extent)
    }

    /// Gathers a chain of a split ring that is a table, of which the beginning has been fetched.
    ///
    /// # Errors
    /// As [`Chain::gather`].
    #[inline(always)]
    pub fn gather_table(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        table: &mut Table,
    ) -> Result<(), ChainFault> {
        self.reset();
        self.walk_table::<SplitChain<'_>>(cx, memory, table)?;
        self.set_status_aside(memory)
    }

    #[inline]
    fn reset(&mut self) {
        (self.len, self.first, self.readable) = (0, 0, 0);
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        self.buffers = Buffers::Gathered;
    }

    /// Takes the last byte that the device may write from the buffers.
    #[inline]
    fn set_status_aside(&mut self, memory: &GuestMemory) -> Result<(), ChainFault> {
        if self.writable_bytes == 0 {
            return Err(ChainFault::NoStatus);
        }
        self.writable_bytes -= 1;
        match self.slices.get_mut(self.len.wrapping_sub(1)) {
            // Buffers that the device writes come last, and no slice is empty.
            Some(last) if self.buffers == Buffers::Gathered => {
                last.length -= 1;
                let offset = last.offset + u64::from(last.length);
                self.status = BufferSlice { offset, length: 1, ..*last };
                if last.length == 0 {
                    self.len -= 1;
                }
                Ok(())
            }
            _ => self.find_status(memory),
        }
    }

    /// Finds the last byte of the last writable buffer, wherever the rest of the chain points.
    #[cold]
    fn find_status(&mut self, memory: &GuestMemory) -> Result<(), ChainFault> {
        let (address, length) = self.last_writable;
        let last = address.checked_add(u64::from(length) - 1);
        let status = last.and_then(|last| memory.translate(last, 1));
        self.status = status.ok_or(ChainFault::NoStatus)?;
        Ok(())
    }

    /// Follows the descriptors. `enter` says whether a table may be read.
    #[inline(always)]
    fn walk<D: Descriptors, E: From<ChainFault>>(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        mut descriptors: D,
        indirect: Indirect,
        enter: impl FnOnce(&mut Self, &Descriptor) -> Result<(), E>,
    ) -> Result<Extent, E> {
        let mut extent = Extent::default();
        for _ in 0..descriptors.most() {
            let descriptor = descriptors.fetch().ok_or(ChainFault::NextOutside)?;
            extent.entries += 1;
            extent.last_link = descriptor.link;
            if descriptor.has(descriptor_flags::INDIRECT) {
                if indirect == Indirect::Refused {
                    return Err(ChainFault::Indirect.into());
                }
                let mut table = Table::EMPTY;
                table.enter(&descriptor)?;
                enter(self, &descriptor)?;
                self.walk_table::<D>(cx, memory, &mut table)?;
                return Ok(extent);
            }
            self.add(memory, descriptor)?;
            if !descriptor.has(descriptor_flags::NEXT) {
                return Ok(extent);
            }
        }
        Err(ChainFault::Loop.into())
    }

    /// Follows the descriptors of a table.
    #[inline]
    fn walk_table<D: Descriptors>(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        table: &mut Table,
    ) -> Result<(), ChainFault> {
        let mut index = 0;
        for _ in 0..table.entries {
            let descriptor = table.fetch(cx, memory, D::FORMAT, index)?;
            if descriptor.has(descriptor_flags::INDIRECT) {
                return Err(ChainFault::Indirect);
            }
            self.add(memory, descriptor)?;
            // In the packed format all of a table belong to the chain, one after the other (virtio 2.8.7).
            let (next, more) = match D::FORMAT {
                Format::Split => {
                    (u32::from(descriptor.link), descriptor.has(descriptor_flags::NEXT))
                }
                Format::Packed => (index + 1, index + 1 < table.entries),
            };
            if !more {
                return Ok(());
            }
            index = next;
        }
        Err(ChainFault::Loop)
    }

    /// Adds one buffer, as the slices that its regions make of it.
    #[inline(always)]
    fn add(&mut self, memory: &GuestMemory, descriptor: Descriptor) -> Result<(), ChainFault> {
        let (writable, length) = (descriptor.is_writable(), descriptor.length);
        if length == 0 {
            return Ok(());
        }
        if writable {
            self.writable_bytes += u64::from(length);
            self.last_writable = (descriptor.address, length);
        } else if self.writable_bytes > 0 {
            return Err(ChainFault::Order);
        } else {
            self.readable_bytes += u64::from(length);
        }
        match memory.translate(descriptor.address, length) {
            Some(slice) if slice.length == length && self.buffers == Buffers::Gathered => {
                self.push(slice, writable);
            }
            Some(_) | None => self.add_pieces(memory, descriptor.address, length, writable),
        }
        Ok(())
    }

    /// Adds a buffer that lies in several regions.
    #[cold]
    fn add_pieces(&mut self, memory: &GuestMemory, address: u64, length: u32, writable: bool) {
        let (mut next, mut left) = (Some(address), length);
        while left > 0 && self.buffers == Buffers::Gathered {
            let piece = next.and_then(|address| Some((address, memory.translate(address, left)?)));
            let Some((address, slice)) = piece else {
                self.buffers = Buffers::Wild;
                return;
            };
            self.push(slice, writable);
            left -= slice.length;
            next = address.checked_add(u64::from(slice.length));
        }
    }

    #[inline]
    fn push(&mut self, slice: BufferSlice, writable: bool) {
        let first_of_its_kind = if writable { self.readable } else { 0 };
        if self.len > first_of_its_kind
            && let Some(previous) = self.slices.get_mut(self.len - 1)
            && previous.region == slice.region
            && previous.offset + u64::from(previous.length) == slice.offset
            && let Some(length) = previous.length.checked_add(slice.length)
        {
            previous.length = length;
        } else if let Some(free) = self.slices.get_mut(self.len) {
            *free = slice;
            self.len += 1;
        } else {
            self.buffers = Buffers::TooMany;
        }
        if !writable {
            self.readable = self.len;
        }
    }

    /// Whether the buffers could be gathered. Where they could not, only [`Chain::status`] is of use.
    #[must_use]
    pub fn buffers(&self) -> Buffers {
        self.buffers
    }

    /// Where the status byte goes.
    #[must_use]
    pub fn status(&self) -> BufferSlice {
        self.status
    }

    /// Readable bytes not yet consumed.
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Writable bytes, the status not counted.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// The readable slices not yet consumed.
    #[must_use]
    pub fn readable(&self) -> &[BufferSlice] {
        self.slices.get(self.first..self.readable).unwrap_or_default()
    }

    /// The writable slices, the status byte not among them.
    #[must_use]
    pub fn writable(&self) -> &[BufferSlice] {
        self.slices.get(self.readable..self.len).unwrap_or_default()
    }

    /// Consumes sixteen readable bytes, a little-endian number; none where there are fewer.
    #[inline(always)]
    pub fn read(&mut self, cx: &Context<'_>) -> Option<u128> {
        match self.slices.get(self.first) {
            // In a slice of their own: so drivers cut a header.
            Some(slice) if self.first < self.readable && slice.length == WORD => {
                let word = cx.memory.read_u128(*slice).ok()?;
                self.first += 1;
                self.readable_bytes -= u64::from(WORD);
                Some(word)
            }
            Some(_) | None => {
                let mut bytes = [0; WORD as usize];
                self.read_pieces(cx, &mut bytes)?;
                Some(u128::from_le_bytes(bytes))
            }
        }
    }

    /// Consumes readable bytes of several slices, or of a part of one.
    #[cold]
    fn read_pieces(&mut self, cx: &Context<'_>, into: &mut [u8]) -> Option<()> {
        let mut rest = into;
        while !rest.is_empty() {
            if self.first >= self.readable {
                return None;
            }
            let slice = self.slices.get_mut(self.first)?;
            let wanted = u32::try_from(rest.len()).unwrap_or(u32::MAX);
            let length = slice.length.min(wanted);
            let (now, later) = rest.split_at_mut_checked(length as usize)?;
            cx.memory.read(BufferSlice { length, ..*slice }, now).ok()?;
            slice.offset += u64::from(length);
            slice.length -= length;
            if slice.length == 0 {
                self.first += 1;
            }
            self.readable_bytes -= u64::from(length);
            rest = later;
        }
        Some(())
    }

    /// Writes to the beginning of the writable bytes, as many as fit; answers how many. None where the memory is gone.
    #[inline]
    pub fn write(&self, cx: &Context<'_>, from: &[u8]) -> Option<u32> {
        let (mut rest, mut written) = (from, 0);
        for slice in self.writable() {
            let wanted = u32::try_from(rest.len()).unwrap_or(u32::MAX);
            let length = slice.length.min(wanted);
            let (now, later) = rest.split_at_checked(length as usize)?;
            cx.memory.write(BufferSlice { length, ..*slice }, now).ok()?;
            (rest, written) = (later, written + length);
        }
        Some(written)
    }
}

impl Table {
    /// No table.
    pub const EMPTY: Self = Self {
        address: 0,
        entries: 0,
        first: 0,
        fetched: [[0; DESCRIPTOR_BYTES]; TOGETHER as usize],
    };

    /// Goes to the table that `descriptor` names, of which nothing is fetched yet.
    ///
    /// # Errors
    /// It names none that could be followed.
    #[inline(always)]
    pub fn enter(&mut self, descriptor: &Descriptor) -> Result<(), ChainFault> {
        let entries = descriptor.length / WORD;
        let valid = descriptor.has(descriptor_flags::INDIRECT)
            && !descriptor.has(descriptor_flags::NEXT)
            && descriptor.length.is_multiple_of(WORD)
            && (1..=INDIRECT_ENTRIES_MAX).contains(&entries);
        if !valid {
            return Err(ChainFault::Indirect);
        }
        (self.address, self.entries, self.first) = (descriptor.address, entries, entries);
        Ok(())
    }

    /// Fetches the beginning of a table that was entered; the first buffer's address. None where it is not guest memory.
    #[inline(always)]
    pub fn begin(&mut self, cx: &Context<'_>, memory: &GuestMemory) -> Option<u64> {
        self.fetch_from(cx, memory, 0)?;
        let [first, ..] = &self.fetched;
        Some(Descriptor::from_bytes(Format::Split, first).address)
    }

    /// A descriptor.
    #[inline]
    fn fetch(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        format: Format,
        index: u32,
    ) -> Result<Descriptor, ChainFault> {
        if index >= self.entries {
            return Err(ChainFault::NextOutside);
        }
        // Before the first the difference wraps around to far behind the last.
        if index.wrapping_sub(self.first) >= TOGETHER {
            self.fetch_more(cx, memory, index).ok_or(ChainFault::Indirect)?;
        }
        let bytes = self.fetched.get((index - self.first) as usize);
        Ok(Descriptor::from_bytes(format, bytes.ok_or(ChainFault::Indirect)?))
    }

    /// As [`Table::fetch_from`], for a table whose beginning was not fetched or does not suffice.
    #[inline(never)]
    fn fetch_more(&mut self, cx: &Context<'_>, memory: &GuestMemory, index: u32) -> Option<()> {
        self.fetch_from(cx, memory, index)
    }

    /// Fetches some descriptors from `index` on, which is in the table. A chain that jumps about may have one fetched again, and a
    /// guest may have changed it: it then is another descriptor, checked as the first was, and counted. A table that leaves guest
    /// memory is refused with the first group that does; to look at all of it beforehand costs each request more than it is worth.
    #[inline(always)]
    fn fetch_from(&mut self, cx: &Context<'_>, memory: &GuestMemory, index: u32) -> Option<()> {
        let count = (self.entries - index).min(TOGETHER);
        let room = self.fetched.get_mut(..count as usize)?.as_flattened_mut();
        let skip = u64::from(index) * DESCRIPTOR_BYTES as u64; // of at most 2^32 entries
        read_guest(memory, cx.memory, self.address.checked_add(skip)?, room)?;
        self.first = index;
        Some(())
    }
}
