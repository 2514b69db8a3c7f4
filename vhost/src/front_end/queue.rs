//! The driver side of one virtqueue that carries virtio-blk requests (virtio 1.2 §2.7, §2.8 and §5.2.6). The ring itself is
//! [`super::split`]'s or [`super::packed`]'s.
//!
//! A request occupies one slot, named by the head of its descriptor chain. With indirect descriptors every chain is one
//! entry of the table; without them it takes as many entries as it has parts. The links between entries are kept on our
//! side too, so that freeing a chain never reads memory that the device could have written.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use super::memory::{Carved, DataBuffer, SharedMemory};
use super::packed::PackedSide;
use super::ring::RingHandle;
use super::split::SplitSide;
use super::{FrontEndError, connection::Negotiated};
use crate::protocol::{SECTOR, blk_status, blk_type, descriptor_flags};
use crate::ring::{DESCRIPTOR_BYTES, Descriptor, EventMode, Format};

/// Bytes kept for the header, the range and the status of one request.
const HEADER_STRIDE: usize = 64;
/// Where in them the range of a discard or write-zeroes request lies.
const RANGE_AT: usize = 16;
/// Where in them the status lies.
const STATUS_AT: usize = 32;
/// The poison: no status that the specification knows.
const NO_STATUS: u8 = 0xff;
/// Parts of a request that are not data: header and status.
const ENVELOPE: usize = 2;

/// What is asked of the disk. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Disk to memory.
    Read {
        /// First byte on the disk.
        offset: u64,
    },
    /// Memory to disk.
    Write {
        /// First byte on the disk.
        offset: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// The disk's serial: 20 bytes into one buffer.
    GetId,
    /// The range is no longer needed.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range reads zero afterwards.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// It may be deallocated for that.
        may_unmap: bool,
    },
}

/// A request as the device reads it.
struct Encoded {
    kind: u32,
    sector: u64,
    /// Sectors and flags of a discard or write-zeroes.
    range: Option<(u32, u32)>,
    data_flags: u16,
}

/// Why a request was not submitted. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// All slots, or all descriptors, are in use: poll first.
    #[error("the queue is full")]
    Full,
    /// More buffers than the queue was set up for.
    #[error("a request of {0} buffers is more than the queue was set up for")]
    Segments(usize),
    /// Offset or length is not a multiple of 512, or the length does not fit the request.
    #[error("the range is not made of whole sectors, or too long for one request")]
    Range,
    /// A buffer leaves the caller's part of the shared memory.
    #[error("the buffer leaves the shared memory")]
    OutOfBounds,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// VIRTIO_BLK_S_IOERR.
    #[error("the device reports an I/O error")]
    Io,
    /// VIRTIO_BLK_S_UNSUPP.
    #[error("the device does not support the request")]
    Unsupported,
    /// The device completed the request and wrote no status.
    #[error("the device wrote no status")]
    NoStatus,
    /// A status that the specification does not know.
    #[error("the device wrote the unknown status {0}")]
    UnknownStatus(u8),
}

/// The device broke the rules of the ring. The queue is of no use until a reconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// It completed a chain that was not in flight.
    #[error("the device completed descriptor {0}, which is not in flight")]
    NotInFlight(u32),
    /// It claims more completions than there are requests.
    #[error("the device's used index claims {0} completions")]
    UsedIndex(u16),
}

/// A request that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// The caller's name for it.
    pub tag: u64,
    /// How it went.
    pub result: Result<(), RequestError>,
    /// Bytes that the device says it wrote to memory, status included.
    pub written: u32,
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    tag: u64,
    /// Counts submissions: the order in which a new back end gets them.
    sequence: u64,
    /// Entries of the ring that it takes.
    descriptors: u16,
    /// Bytes of its indirect table, where it has one.
    table: u32,
}

/// Our side of one descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The entry after it in its chain.
    next: u16,
    /// Set for the head of a chain in flight.
    request: Option<InFlight>,
}

/// The ring of a queue.
#[derive(Debug)]
enum Side {
    Split(SplitSide),
    Packed(PackedSide),
}

/// One ring, driven by polling.
#[derive(Debug)]
pub struct DriverQueue {
    handle: RingHandle,
    ring: Side,
    size: u16,
    segments: usize,
    headers: Carved,
    /// Indirect tables, one to a slot, where they were negotiated.
    tables: Option<Carved>,
    data_address: u64,
    data_bytes: u64,
    entries: Box<[Entry]>,
    /// Free entries, a stack that never outgrows its capacity.
    free: Vec<u16>,
    /// Heads in the order of a restart: room made once.
    order: Vec<u16>,
    in_flight: u16,
    sequence: u64,
}

/// Bytes of shared memory that a queue takes, alignment included.
pub(super) fn bytes_needed(size: u16, segments: u16, negotiated: &Negotiated) -> usize {
    let entries = usize::from(size);
    let ring = match negotiated.format {
        Format::Split => SplitSide::bytes_needed(size),
        Format::Packed => PackedSide::bytes_needed(size),
    };
    let tables = if negotiated.indirect { table_bytes(usize::from(segments)) * entries } else { 0 };
    ring + entries * HEADER_STRIDE + tables + 2 * HEADER_STRIDE
}

/// Bytes of an indirect table for requests of so many buffers.
fn table_bytes(segments: usize) -> usize {
    (segments + ENVELOPE) * DESCRIPTOR_BYTES
}

impl DriverQueue {
    /// Ring number `index` of `size` entries in `memory`.
    pub(super) fn new(
        index: u16,
        size: u16,
        segments: u16,
        negotiated: &Negotiated,
        memory: &mut SharedMemory,
    ) -> Result<Self, FrontEndError> {
        let entries = usize::from(size);
        let tables = if negotiated.indirect {
            Some(memory.carve(table_bytes(usize::from(segments)) * entries, DESCRIPTOR_BYTES)?)
        } else {
            None
        };
        let events = if negotiated.event_index { EventMode::Index } else { EventMode::Flags };
        let (ring, addresses, base) = match negotiated.format {
            Format::Split => {
                let side = SplitSide::new(size, events, memory)?;
                let (addresses, base) = (side.addresses(), side.base());
                (Side::Split(side), addresses, base)
            }
            Format::Packed => {
                let side = PackedSide::new(size, events, memory)?;
                let (addresses, base) = (side.addresses(), side.base());
                (Side::Packed(side), addresses, base)
            }
        };
        let mut queue = Self {
            handle: RingHandle::new(index, size, addresses, base)?,
            ring,
            size,
            segments: usize::from(segments),
            headers: memory.carve(entries * HEADER_STRIDE, HEADER_STRIDE)?,
            tables,
            data_address: memory.data_address(),
            data_bytes: memory.data_bytes() as u64,
            entries: vec![Entry::default(); entries].into_boxed_slice(),
            free: (0..size).rev().collect(),
            order: Vec::with_capacity(entries),
            in_flight: 0,
            sequence: 0,
        };
        queue.disarm();
        Ok(queue)
    }

    /// What the control side needs of the ring, wherever the queue goes.
    #[must_use]
    pub fn handle(&self) -> &RingHandle {
        &self.handle
    }

    /// The ring's number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.handle.index()
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Requests submitted and not yet taken by [`DriverQueue::pop`].
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Whether a request with so many buffers can be submitted now.
    #[inline]
    #[must_use]
    pub fn has_room(&self, buffers: usize) -> bool {
        self.free.len() >= self.entries_for(buffers)
    }

    fn entries_for(&self, parts: usize) -> usize {
        if self.tables.is_some() { 1 } else { parts + ENVELOPE }
    }

    /// Prepares a request; [`DriverQueue::publish`] shows it to the device. `tag` comes back with its end.
    ///
    /// # Errors
    /// Nothing has happened; see [`SubmitError`].
    pub fn submit(
        &mut self,
        request: Request,
        data: &[DataBuffer],
        tag: u64,
    ) -> Result<(), SubmitError> {
        let encoded = request.encode().ok_or(SubmitError::Range)?;
        let parts = data.len() + usize::from(encoded.range.is_some());
        if parts > self.segments {
            return Err(SubmitError::Segments(data.len()));
        }
        let inside = |buffer: &DataBuffer| {
            let end = buffer.offset.checked_add(u64::from(buffer.length));
            end.is_some_and(|end| end <= self.data_bytes)
        };
        if !data.iter().all(inside) {
            return Err(SubmitError::OutOfBounds);
        }
        let needed = self.entries_for(parts);
        let Some(head) = self.free.last().copied().filter(|_| self.free.len() >= needed) else {
            return Err(SubmitError::Full);
        };
        self.write_header(head, &encoded);
        let table = match &self.tables {
            Some(tables) => {
                let table = self.write_table(head, tables, &encoded, data);
                self.free.pop();
                table
            }
            None => {
                self.chain_direct(head, &encoded, data);
                0
            }
        };
        self.sequence += 1;
        #[allow(clippy::cast_possible_truncation)] // at most the free list's length, a u16
        let descriptors = needed as u16;
        let request = InFlight { tag, sequence: self.sequence, descriptors, table };
        self.entries[usize::from(head)].request = Some(request);
        self.in_flight += 1;
        self.offer(head, table);
        Ok(())
    }

    /// Shows the device what was submitted, and kicks it if it asked for that.
    pub fn publish(&mut self) {
        let wanted = match &mut self.ring {
            Side::Split(ring) => ring.publish(),
            Side::Packed(ring) => ring.publish(),
        };
        if wanted {
            self.handle.kick();
        }
    }

    /// Whether requests were submitted that the device has not been shown.
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        match &self.ring {
            Side::Split(ring) => ring.has_unpublished(),
            Side::Packed(ring) => ring.has_unpublished(),
        }
    }

    /// Takes the next request that has ended, if there is one.
    ///
    /// # Errors
    /// The device lies about its ring.
    pub fn pop(&mut self) -> Result<Option<Finished>, RingError> {
        let used = match &mut self.ring {
            Side::Split(ring) => ring.pop(self.in_flight)?,
            Side::Packed(ring) => ring.pop(),
        };
        let Some((id, written)) = used else { return Ok(None) };
        let head = u16::try_from(id).ok().filter(|head| *head < self.size);
        let Some((head, request)) =
            head.and_then(|head| Some((head, self.entries[usize::from(head)].request.take()?)))
        else {
            return Err(RingError::NotInFlight(id));
        };
        self.in_flight -= 1;
        self.release(head, request.descriptors);
        let status = usize::from(head) * HEADER_STRIDE + STATUS_AT;
        let result = match self.headers.area.load_u8(status, Ordering::Relaxed) {
            blk_status::OK => Ok(()),
            blk_status::IOERR => Err(RequestError::Io),
            blk_status::UNSUPP => Err(RequestError::Unsupported),
            NO_STATUS => Err(RequestError::NoStatus),
            other => Err(RequestError::UnknownStatus(other)),
        };
        Ok(Some(Finished { tag: request.tag, result, written }))
    }

    /// Asks the device for interrupts, before a sleep on [`DriverQueue::call_fd`]. False if something has ended already:
    /// then do not sleep.
    pub fn arm(&mut self) -> bool {
        self.handle.drain_call();
        match &mut self.ring {
            Side::Split(ring) => ring.arm(),
            Side::Packed(ring) => ring.arm(),
        }
    }

    /// Tells the device that we poll.
    pub fn disarm(&mut self) {
        match &mut self.ring {
            Side::Split(ring) => ring.disarm(),
            Side::Packed(ring) => ring.disarm(),
        }
    }

    /// What becomes readable when the device interrupts.
    #[must_use]
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.handle.call_fd()
    }

    /// Makes the ring new for another back end and offers it again what is in flight, oldest first. The caller vouches that
    /// the old back end no longer touches the ring. Chains are as they were: no device may write them.
    pub fn restart(&mut self) {
        let entries = &self.entries;
        let sequence = |head: &u16| entries[usize::from(*head)].request.map(|it| it.sequence);
        self.order.clear();
        self.order.extend((0..self.size).filter(|head| sequence(head).is_some()));
        self.order.sort_unstable_by_key(sequence);
        match &mut self.ring {
            Side::Split(ring) => ring.reset(),
            Side::Packed(ring) => ring.reset(),
        }
        for at in 0..self.order.len() {
            let head = self.order[at];
            let status = usize::from(head) * HEADER_STRIDE + STATUS_AT;
            self.headers.area.store_u8(status, NO_STATUS, Ordering::Relaxed);
            let table = self.entries[usize::from(head)].request.map_or(0, |it| it.table);
            self.offer(head, table);
        }
        // Nobody serves it: whoever begins to is kicked then.
        let _wants_kick = match &mut self.ring {
            Side::Split(ring) => ring.publish(),
            Side::Packed(ring) => ring.publish(),
        };
        self.disarm();
    }

    /// Makes the ring new and empty: what was in flight is forgotten. The caller vouches as for [`DriverQueue::restart`].
    pub fn forget(&mut self) {
        for head in 0..self.size {
            if let Some(request) = self.entries[usize::from(head)].request.take() {
                self.in_flight -= 1;
                self.release(head, request.descriptors);
            }
        }
        self.restart();
    }

    /// Puts a request into the ring, unpublished: its chain, or its table of so many bytes.
    fn offer(&mut self, head: u16, table: u32) {
        match &mut self.ring {
            Side::Split(ring) => ring.offer(head),
            Side::Packed(ring) => {
                let tables = self.tables.as_ref().map_or(0, Carved::guest_address);
                let address = tables + (usize::from(head) * table_bytes(self.segments)) as u64;
                ring.offer(head, address, table);
            }
        }
    }

    /// Gives the entries of a chain back.
    fn release(&mut self, head: u16, descriptors: u16) {
        let mut entry = head;
        for _ in 0..descriptors {
            self.free.push(entry);
            entry = self.entries[usize::from(entry)].next;
        }
    }

    fn write_header(&self, head: u16, encoded: &Encoded) {
        let (area, at) = (&self.headers.area, usize::from(head) * HEADER_STRIDE);
        area.store_u32(at, encoded.kind, Ordering::Relaxed);
        area.store_u32(at + 4, 0, Ordering::Relaxed);
        area.store_u64(at + 8, encoded.sector, Ordering::Relaxed);
        if let Some((sectors, flags)) = encoded.range {
            area.store_u64(at + RANGE_AT, encoded.sector, Ordering::Relaxed);
            area.store_u32(at + RANGE_AT + 8, sectors, Ordering::Relaxed);
            area.store_u32(at + RANGE_AT + 12, flags, Ordering::Relaxed);
        }
        area.store_u8(at + STATUS_AT, NO_STATUS, Ordering::Relaxed);
    }

    /// The parts of a request in order: (address, length, flags without [`descriptor_flags::NEXT`]).
    fn parts<'a>(
        &self,
        head: u16,
        encoded: &Encoded,
        data: &'a [DataBuffer],
    ) -> impl Iterator<Item = (u64, u32, u16)> + use<'a> {
        let header = self.headers.guest_address() + u64::from(head) * HEADER_STRIDE as u64;
        let range = encoded.range.map(|_| (header + RANGE_AT as u64, 16, 0));
        let (base, flags) = (self.data_address, encoded.data_flags);
        let data = data.iter().map(move |buffer| (base + buffer.offset, buffer.length, flags));
        let status = (header + STATUS_AT as u64, 1, descriptor_flags::WRITE);
        let first = std::iter::once((header, 16, 0));
        first.chain(range).chain(data).chain(std::iter::once(status))
    }

    fn chain_direct(&mut self, head: u16, encoded: &Encoded, data: &[DataBuffer]) {
        let mut parts = self.parts(head, encoded, data).peekable();
        let mut entry = self.free.pop().unwrap_or(head);
        while let Some((address, length, flags)) = parts.next() {
            let after = if parts.peek().is_some() { self.free.pop() } else { None };
            let next = after.unwrap_or(0);
            let flags = flags | if after.is_some() { descriptor_flags::NEXT } else { 0 };
            if let Side::Split(ring) = &self.ring {
                let at = usize::from(entry) * DESCRIPTOR_BYTES;
                let descriptor = Descriptor { address, length, flags, link: next };
                write(descriptor, Format::Split, &ring.descriptors, at);
            }
            self.entries[usize::from(entry)].next = next;
            entry = next;
        }
    }

    /// Writes the table of a request; how many bytes it has.
    fn write_table(
        &self,
        head: u16,
        tables: &Carved,
        encoded: &Encoded,
        data: &[DataBuffer],
    ) -> u32 {
        let table = usize::from(head) * table_bytes(self.segments);
        let format = match &self.ring {
            Side::Split(_) => Format::Split,
            Side::Packed(_) => Format::Packed,
        };
        let mut parts = self.parts(head, encoded, data).zip(1u16..).peekable();
        let mut at = table;
        while let Some(((address, length, flags), number)) = parts.next() {
            // In a packed ring's table one follows the other (2.8.7).
            let (flags, link) = match (format, parts.peek()) {
                (Format::Split, Some(_)) => (flags | descriptor_flags::NEXT, number),
                (Format::Split, None) | (Format::Packed, _) => (flags, 0),
            };
            write(Descriptor { address, length, flags, link }, format, tables, at);
            at += DESCRIPTOR_BYTES;
        }
        #[allow(clippy::cast_possible_truncation)] // at most (65535 + 2) * 16
        let length = (at - table) as u32;
        if let Side::Split(ring) = &self.ring {
            let address = tables.guest_address() + table as u64;
            let whole = Descriptor { address, length, flags: descriptor_flags::INDIRECT, link: 0 };
            let at = usize::from(head) * DESCRIPTOR_BYTES;
            write(whole, Format::Split, &ring.descriptors, at);
        }
        length
    }
}

/// Writes a descriptor.
fn write(descriptor: Descriptor, format: Format, to: &Carved, at: usize) {
    let (first, second) = descriptor.to_words(format);
    to.area.store_u64(at, first.to_le(), Ordering::Relaxed);
    to.area.store_u64(at + 8, second.to_le(), Ordering::Relaxed);
}

impl Request {
    /// None for a range that is not made of sectors.
    fn encode(self) -> Option<Encoded> {
        let sector = |offset: u64| offset.is_multiple_of(SECTOR).then_some(offset / SECTOR);
        let plain = |kind, sector, data_flags| Encoded { kind, sector, range: None, data_flags };
        let ranged = |kind, offset, length: u64, flags| {
            let sectors = u32::try_from(sector(length)?).ok()?;
            Some(Encoded {
                kind,
                sector: sector(offset)?,
                range: Some((sectors, flags)),
                data_flags: 0,
            })
        };
        match self {
            Self::Read { offset } => {
                Some(plain(blk_type::IN, sector(offset)?, descriptor_flags::WRITE))
            }
            Self::Write { offset } => Some(plain(blk_type::OUT, sector(offset)?, 0)),
            Self::Flush => Some(plain(blk_type::FLUSH, 0, 0)),
            Self::GetId => Some(plain(blk_type::GET_ID, 0, descriptor_flags::WRITE)),
            Self::Discard { offset, length } => ranged(blk_type::DISCARD, offset, length, 0),
            Self::WriteZeroes { offset, length, may_unmap } => {
                ranged(blk_type::WRITE_ZEROES, offset, length, u32::from(may_unmap))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::features;
    use proptest::prelude::*;

    const SIZE: u16 = 8;
    const READ: Request = Request::Read { offset: 4096 };
    const BUFFER: DataBuffer = DataBuffer { offset: 0, length: 512 };

    fn queue(features: u64) -> DriverQueue {
        let negotiated = Negotiated::new(features, 0);
        let bytes = bytes_needed(SIZE, 2, &negotiated);
        let mut memory = SharedMemory::new(4096, bytes).unwrap();
        DriverQueue::new(0, SIZE, 2, &negotiated, &mut memory).unwrap()
    }

    impl DriverQueue {
        pub(in crate::front_end) fn packed(&self) -> &PackedSide {
            match &self.ring {
                Side::Packed(ring) => ring,
                Side::Split(_) => panic!("a split ring"),
            }
        }

        fn split(&self) -> &SplitSide {
            match &self.ring {
                Side::Split(ring) => ring,
                Side::Packed(_) => panic!("a packed ring"),
            }
        }

        /// Completes a head as a device does.
        fn complete(&mut self, used: u16, id: u32, status: Option<u8>) {
            let at = 4 + 8 * usize::from(used % SIZE);
            self.split().used.area.store_u32(at, id, Ordering::Relaxed);
            self.split().used.area.store_u32(at + 4, 513, Ordering::Relaxed);
            if let Some(status) = status {
                let at = id as usize * HEADER_STRIDE + STATUS_AT;
                self.headers.area.store_u8(at, status, Ordering::Relaxed);
            }
            self.split().used.area.store_u16(2, used.wrapping_add(1), Ordering::Release);
        }

        fn offered(&self, index: u16) -> u32 {
            let at = 4 + 2 * usize::from(index % SIZE);
            u32::from(self.split().available.area.load_u16(at, Ordering::Relaxed))
        }
    }

    #[test]
    fn a_status_that_is_missing_or_unknown_is_an_error_of_the_request() {
        let answers = [
            (Some(0), Ok(())),
            (Some(1), Err(RequestError::Io)),
            (Some(2), Err(RequestError::Unsupported)),
            (Some(77), Err(RequestError::UnknownStatus(77))),
            (None, Err(RequestError::NoStatus)),
        ];
        let mut queue = queue(0);
        for (used, (status, expected)) in (0..).zip(answers) {
            queue.submit(READ, &[BUFFER], 100 + u64::from(used)).unwrap();
            queue.publish();
            queue.complete(used, queue.offered(used), status);
            let finished = queue.pop().unwrap().unwrap();
            assert_eq!((finished.tag, finished.result), (100 + u64::from(used), expected));
            assert_eq!(queue.pop(), Ok(None));
        }
    }

    #[test]
    fn a_device_that_lies_about_its_ring_is_an_error_of_the_queue() {
        let mut never_submitted = queue(0);
        never_submitted.complete(0, 3, Some(0));
        assert_eq!(never_submitted.pop(), Err(RingError::UsedIndex(1)));

        for id in [7, u32::from(SIZE), u32::MAX] {
            let mut other_head = queue(0);
            other_head.submit(READ, &[BUFFER], 0).unwrap();
            other_head.publish();
            assert_eq!(other_head.offered(0), 0);
            other_head.complete(0, id, None);
            assert_eq!(other_head.pop(), Err(RingError::NotInFlight(id)));
        }

        let mut twice = queue(0);
        for tag in 0..2 {
            twice.submit(READ, &[BUFFER], tag).unwrap();
        }
        twice.publish();
        let head = twice.offered(0);
        twice.complete(0, head, Some(0));
        twice.complete(1, head, Some(0));
        assert!(twice.pop().unwrap().is_some());
        assert_eq!(twice.pop(), Err(RingError::NotInFlight(head)));
    }

    #[test]
    fn a_device_is_kicked_when_it_asks_for_that_and_only_then() {
        let mut by_flag = queue(0);
        for (tag, (flag, kicked)) in (0..).zip([(0, true), (1, false)]) {
            by_flag.split().used.area.store_u16(0, flag, Ordering::Relaxed);
            by_flag.submit(READ, &[BUFFER], tag).unwrap();
            by_flag.publish();
            assert_eq!(by_flag.handle().was_kicked(), kicked);
        }
        by_flag.publish();
        assert!(!by_flag.handle().was_kicked());

        let mut by_index = queue(features::RING_EVENT_IDX);
        // The device waits for the index after the first.
        by_index.split().used.area.store_u16(4 + 8 * usize::from(SIZE), 1, Ordering::Relaxed);
        for (tag, kicked) in [false, true].into_iter().enumerate() {
            by_index.submit(READ, &[BUFFER], tag as u64).unwrap();
            by_index.publish();
            assert_eq!(by_index.handle().was_kicked(), kicked);
        }
    }

    #[test]
    fn a_restart_offers_what_is_in_flight_again_oldest_first() {
        let mut queue = queue(features::RING_INDIRECT_DESC);
        for tag in 0..4 {
            queue.submit(READ, &[BUFFER], tag).unwrap();
        }
        queue.publish();
        let heads: Vec<u32> = (0..4).map(|index| queue.offered(index)).collect();
        queue.complete(0, heads[1], Some(0));
        assert_eq!(queue.pop().unwrap().unwrap().tag, 1);
        queue.submit(READ, &[BUFFER], 4).unwrap();
        queue.publish();
        // The freed head was taken again, and is now the youngest.
        assert_eq!(queue.offered(4), heads[1]);

        queue.restart();
        assert_eq!(queue.split().published, 4);
        let offered: Vec<u32> = (0..4).map(|index| queue.offered(index)).collect();
        assert_eq!(offered, [heads[0], heads[2], heads[3], heads[1]]);
        for (used, head) in (0..).zip(&offered) {
            queue.complete(used, *head, Some(0));
        }
        let tags: Vec<u64> = (0..4).map(|_| queue.pop().unwrap().unwrap().tag).collect();
        assert_eq!(tags, [0, 2, 3, 4]);
        assert_eq!((queue.in_flight(), queue.free.len()), (0, usize::from(SIZE)));
    }

    #[test]
    fn a_ring_that_forgets_is_as_new() {
        for features in [0, features::RING_INDIRECT_DESC] {
            let mut queue = queue(features);
            for tag in 0..2 {
                queue.submit(READ, &[BUFFER], tag).unwrap();
            }
            queue.publish();
            queue.complete(0, queue.offered(1), Some(0));
            queue.forget();
            assert_eq!((queue.in_flight(), queue.free.len()), (0, usize::from(SIZE)));
            assert_eq!(queue.pop(), Ok(None));
            queue.submit(READ, &[BUFFER], 7).unwrap();
            queue.publish();
            queue.complete(0, queue.offered(0), Some(0));
            assert_eq!(queue.pop().unwrap().unwrap().tag, 7);
        }
    }

    proptest! {
        /// Whatever is submitted and however it completes, no entry of the table is lost and every request ends once.
        #[test]
        fn entries_are_neither_lost_nor_given_twice(
            indirect: bool,
            steps in prop::collection::vec((0usize..3, 0usize..8), 1..200),
        ) {
            let mut queue = queue(if indirect { features::RING_INDIRECT_DESC } else { 0 });
            let (mut waiting, mut tag, mut used, mut taken) = (Vec::new(), 0, 0u16, 0u16);
            for (buffers, which) in steps {
                match queue.submit(READ, &vec![BUFFER; buffers], tag) {
                    Ok(()) => {
                        prop_assert!(buffers <= 2);
                        waiting.push((queue.offered(taken), tag));
                        taken = taken.wrapping_add(1);
                        tag += 1;
                    }
                    Err(SubmitError::Full) => prop_assert!(!queue.has_room(buffers)),
                    Err(error) => prop_assert!(false, "{error}"),
                }
                queue.publish();
                if which < waiting.len() {
                    let (head, expected) = waiting.remove(which);
                    queue.complete(used, head, Some(0));
                    used = used.wrapping_add(1);
                    prop_assert_eq!(queue.pop().unwrap().unwrap().tag, expected);
                }
                prop_assert_eq!(usize::from(queue.in_flight()), waiting.len());
            }
            while let Some((head, _)) = waiting.pop() {
                queue.complete(used, head, Some(0));
                used = used.wrapping_add(1);
                prop_assert!(queue.pop().unwrap().is_some());
            }
            let mut free = queue.free.clone();
            free.sort_unstable();
            prop_assert_eq!(free, (0..SIZE).collect::<Vec<_>>());
        }
    }
}
