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
use crate::protocol::descriptor_flags;
use crate::ring::{ChainFault, DESCRIPTOR_BYTES, Descriptor, Descriptors, Format};

mod arriving;

pub(crate) use arriving::Arrived;

/// The most slices of one chain: the data of the largest I/O, its header and its status.
pub const CHAIN_SLICES_MAX: usize = SEGMENTS_MAX + 2;
/// The longest indirect table. Longer than any negotiated request (`seg_max` + 2), short enough to bound the work.
pub const INDIRECT_ENTRIES_MAX: u32 = 1024;

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

/// An indirect table.
struct Table {
    address: u64,
    entries: u32,
    /// The next descriptor.
    index: u32,
    /// The first of those that have been fetched, which are [`TOGETHER`] or all that follow; `entries` if none have.
    first: u32,
    fetched: [u8; TOGETHER as usize * DESCRIPTOR_BYTES],
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

    #[inline]
    fn reset(&mut self) {
        (self.len, self.first, self.readable) = (0, 0, 0);
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        self.buffers = Buffers::Gathered;
    }

    /// Takes the last byte that the device may write from the buffers.
    #[inline]
    fn set_status_aside(&mut self, memory: &GuestMemory) -> Result<(), ChainFault> {
        // The last byte of the last writable buffer, wherever the rest of the chain points.
        let (address, length) = self.last_writable;
        if self.writable_bytes == 0 {
            return Err(ChainFault::NoStatus);
        }
        let last = address.checked_add(u64::from(length) - 1);
        let status = last.and_then(|last| memory.translate(last, 1));
        self.status = status.ok_or(ChainFault::NoStatus)?;
        self.writable_bytes -= 1;
        if self.buffers == Buffers::Gathered
            && let Some(last) = self.slices.get_mut(self.len.wrapping_sub(1))
        {
            last.length -= 1;
            if last.length == 0 {
                self.len -= 1;
            }
        }
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
                let table = Table::enter(&descriptor)?;
                enter(self, &descriptor)?;
                self.walk_table(cx, memory, table, D::FORMAT)?;
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
    fn walk_table(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        mut table: Table,
        format: Format,
    ) -> Result<(), ChainFault> {
        for _ in 0..table.entries {
            let (descriptor, more) = table.fetch(cx, memory, format)?;
            if descriptor.has(descriptor_flags::INDIRECT) {
                return Err(ChainFault::Indirect);
            }
            self.add(memory, descriptor)?;
            if !more {
                return Ok(());
            }
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
            first => self.add_pieces(memory, &descriptor, first),
        }
        Ok(())
    }

    /// Adds a buffer that lies in several regions, of which `first` is what the first one has.
    #[cold]
    fn add_pieces(
        &mut self,
        memory: &GuestMemory,
        descriptor: &Descriptor,
        first: Option<BufferSlice>,
    ) {
        let (mut address, mut left, mut piece) = (descriptor.address, descriptor.length, first);
        while left > 0 && self.buffers == Buffers::Gathered {
            let Some(slice) = piece else {
                self.buffers = Buffers::Wild;
                return;
            };
            self.push(slice, descriptor.is_writable());
            left -= slice.length;
            let (next, wrapped) = address.overflowing_add(u64::from(slice.length));
            if wrapped && left > 0 {
                self.buffers = Buffers::Wild;
            }
            address = next;
            piece = memory.translate(address, left);
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

    /// Consumes readable bytes; none where there are fewer than `into` wants.
    #[inline]
    pub fn read(&mut self, cx: &Context<'_>, into: &mut [u8]) -> Option<()> {
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
    /// The next descriptor, and whether another one follows: in the packed format all of a table do, one after the other
    /// (virtio 2.8.7).
    #[inline]
    fn fetch(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        format: Format,
    ) -> Result<(Descriptor, bool), ChainFault> {
        let index = self.index;
        if index >= self.entries {
            return Err(ChainFault::NextOutside);
        }
        // Before the first the difference wraps around to far behind the last.
        if index.wrapping_sub(self.first) >= TOGETHER {
            self.fetch_from(cx, memory, index).ok_or(ChainFault::Indirect)?;
        }
        let at = (index - self.first) as usize * DESCRIPTOR_BYTES;
        let bytes = self.fetched.get(at..).and_then(|from| from.first_chunk());
        let descriptor = Descriptor::from_bytes(format, bytes.ok_or(ChainFault::Indirect)?);
        let more = match format {
            Format::Split => {
                self.index = u32::from(descriptor.link);
                descriptor.has(descriptor_flags::NEXT)
            }
            Format::Packed => {
                self.index = index + 1;
                self.index < self.entries
            }
        };
        Ok((descriptor, more))
    }

    /// Fetches some descriptors from `index` on, which is in the table. A chain that jumps about may have one fetched again, and a
    /// guest may have changed it: it then is another descriptor, checked as the first was, and counted. A table that leaves guest
    /// memory is refused with the first group that does; to look at all of it beforehand costs each request more than it is worth.
    #[inline]
    fn fetch_from(&mut self, cx: &Context<'_>, memory: &GuestMemory, index: u32) -> Option<()> {
        let count = (self.entries - index).min(TOGETHER);
        let room = self.fetched.get_mut(..count as usize * DESCRIPTOR_BYTES)?;
        let skip = u64::from(index) * DESCRIPTOR_BYTES as u64; // of at most 2^32 entries
        read_guest(memory, cx.memory, self.address.checked_add(skip)?, room)?;
        self.first = index;
        Some(())
    }

    /// The indirect table that `descriptor` names.
    fn enter(descriptor: &Descriptor) -> Result<Self, ChainFault> {
        const ENTRY: u32 = 16;
        const { assert!(ENTRY as usize == DESCRIPTOR_BYTES) };
        let entries = descriptor.length / ENTRY;
        let valid = !descriptor.has(descriptor_flags::NEXT)
            && descriptor.length.is_multiple_of(ENTRY)
            && (1..=INDIRECT_ENTRIES_MAX).contains(&entries);
        if !valid {
            return Err(ChainFault::Indirect);
        }
        let fetched = [0; TOGETHER as usize * DESCRIPTOR_BYTES];
        Ok(Self { address: descriptor.address, entries, index: 0, first: entries, fetched })
    }
}
