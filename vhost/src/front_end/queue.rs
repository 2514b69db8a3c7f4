//! The driver side of one split virtqueue that carries virtio-blk requests (virtio 1.2 §2.7 and §5.2.6).
//!
//! A request occupies one slot, named by the head of its descriptor chain. With indirect descriptors every chain is one
//! entry of the table; without them it takes as many entries as it has parts. The links between entries are kept on our
//! side too, so that freeing a chain never reads memory that the device could have written.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{Ordering, fence};

use super::memory::{Carved, DataBuffer, SharedMemory};
use super::ring::RingHandle;
use super::{FrontEndError, connection::Negotiated};
use crate::message::RingAddresses;
use crate::protocol::{SECTOR, blk_status, blk_type, descriptor_flags};

/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
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

/// Ring flag: the other side wants no notification (§2.7.6, §2.7.8).
const NO_NOTIFICATION: u16 = 1;

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
    descriptors: u16,
}

/// Our side of one descriptor.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The entry after it in its chain.
    next: u16,
    /// Set for the head of a chain in flight.
    request: Option<InFlight>,
}

/// How the two sides say when they want to be notified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Notify {
    /// By a flag.
    Flag,
    /// By the index they wait for (VIRTIO_RING_F_EVENT_IDX).
    EventIndex,
}

/// One split ring, driven by polling.
#[derive(Debug)]
pub struct DriverQueue {
    handle: RingHandle,
    size: u16,
    segments: usize,
    notify: Notify,
    descriptors: Carved,
    available: Carved,
    used: Carved,
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
    /// The available index: with what is not published yet, and as the device knows it.
    next_available: u16,
    published: u16,
    /// The used index: as far as taken, and as last seen.
    next_used: u16,
    seen_used: u16,
}

/// Bytes of shared memory that a queue takes, alignment included.
pub(super) fn bytes_needed(size: u16, segments: u16, negotiated: &Negotiated) -> usize {
    let entries = usize::from(size);
    let rings = entries * DESCRIPTOR + (6 + 2 * entries) + (6 + 8 * entries);
    let tables = if negotiated.indirect { table_stride(segments) * entries } else { 0 };
    rings + entries * HEADER_STRIDE + tables + 5 * HEADER_STRIDE
}

/// Bytes of an indirect table for requests of so many buffers.
fn table_stride(segments: u16) -> usize {
    (usize::from(segments) + ENVELOPE) * DESCRIPTOR
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
            Some(memory.carve(table_stride(segments) * entries, DESCRIPTOR)?)
        } else {
            None
        };
        let descriptors = memory.carve(entries * DESCRIPTOR, HEADER_STRIDE)?;
        let available = memory.carve(6 + 2 * entries, HEADER_STRIDE)?;
        let used = memory.carve(6 + 8 * entries, HEADER_STRIDE)?;
        let addresses = RingAddresses {
            flags: 0,
            descriptors: descriptors.user_address(),
            used: used.user_address(),
            available: available.user_address(),
            log: 0,
        };
        let mut queue = Self {
            handle: RingHandle::new(index, size, addresses, used.area.clone())?,
            size,
            segments: usize::from(segments),
            notify: if negotiated.event_index { Notify::EventIndex } else { Notify::Flag },
            descriptors,
            available,
            used,
            headers: memory.carve(entries * HEADER_STRIDE, HEADER_STRIDE)?,
            tables,
            data_address: memory.data_address(),
            data_bytes: memory.data_bytes() as u64,
            entries: vec![Entry::default(); entries].into_boxed_slice(),
            free: (0..size).rev().collect(),
            order: Vec::with_capacity(entries),
            in_flight: 0,
            sequence: 0,
            next_available: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
        };
        queue.disarm();
        Ok(queue)
    }

    /// Lets requests name all of the memory, and not the caller's part alone.
    pub(super) fn reach(&mut self, memory: &SharedMemory) {
        self.data_bytes = memory.mapping().len() as u64;
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
        match self.tables.clone() {
            Some(tables) => self.chain_indirect(head, &tables, &encoded, data),
            None => self.chain_direct(head, &encoded, data),
        }
        self.sequence += 1;
        #[allow(clippy::cast_possible_truncation)] // at most the free list's length, a u16
        let descriptors = needed as u16;
        let request = InFlight { tag, sequence: self.sequence, descriptors };
        self.entries[usize::from(head)].request = Some(request);
        self.in_flight += 1;
        self.offer(head);
        Ok(())
    }

    /// Shows the device what was submitted, and kicks it if it asked for that.
    pub fn publish(&mut self) {
        let old = self.published;
        if old == self.next_available {
            return;
        }
        self.published = self.next_available;
        self.available.area.store_u16(2, self.published, Ordering::Release);
        // The store of the index must be seen before the wish for notifications is read, or both sides could sleep.
        fence(Ordering::SeqCst);
        let wanted = match self.notify {
            Notify::Flag => self.used.area.load_u16(0, Ordering::Relaxed) & NO_NOTIFICATION == 0,
            Notify::EventIndex => {
                let event =
                    self.used.area.load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
                self.published.wrapping_sub(event).wrapping_sub(1)
                    < self.published.wrapping_sub(old)
            }
        };
        if wanted {
            self.handle.kick();
        }
    }

    /// Whether requests were submitted that the device has not been shown.
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        self.published != self.next_available
    }

    /// Takes the next request that has ended, if there is one.
    ///
    /// # Errors
    /// The device lies about its ring.
    pub fn pop(&mut self) -> Result<Option<Finished>, RingError> {
        if self.next_used == self.seen_used {
            self.seen_used = self.used.area.load_u16(2, Ordering::Acquire);
            let claimed = self.seen_used.wrapping_sub(self.next_used);
            if claimed == 0 {
                return Ok(None);
            }
            if claimed > self.in_flight {
                return Err(RingError::UsedIndex(claimed));
            }
        }
        let at = 4 + 8 * usize::from(self.next_used % self.size);
        let id = self.used.area.load_u32(at, Ordering::Relaxed);
        let written = self.used.area.load_u32(at + 4, Ordering::Relaxed);
        let head = u16::try_from(id).ok().filter(|head| *head < self.size);
        let Some((head, request)) =
            head.and_then(|head| Some((head, self.entries[usize::from(head)].request.take()?)))
        else {
            return Err(RingError::NotInFlight(id));
        };
        self.next_used = self.next_used.wrapping_add(1);
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
        match self.notify {
            Notify::Flag => self.available.area.store_u16(0, 0, Ordering::Relaxed),
            Notify::EventIndex => self.set_used_event(self.next_used),
        }
        fence(Ordering::SeqCst);
        self.used.area.load_u16(2, Ordering::Acquire) == self.next_used
    }

    /// Tells the device that we poll.
    pub fn disarm(&mut self) {
        match self.notify {
            Notify::Flag => self.available.area.store_u16(0, NO_NOTIFICATION, Ordering::Relaxed),
            // An index just passed: it comes round again after 65536 completions, which costs one idle interrupt.
            Notify::EventIndex => self.set_used_event(self.next_used.wrapping_sub(1)),
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
        for at in 0..self.used.area.len() / 2 {
            self.used.area.store_u16(2 * at, 0, Ordering::Relaxed);
        }
        (self.next_available, self.next_used, self.seen_used) = (0, 0, 0);
        for at in 0..self.order.len() {
            let head = self.order[at];
            let status = usize::from(head) * HEADER_STRIDE + STATUS_AT;
            self.headers.area.store_u8(status, NO_STATUS, Ordering::Relaxed);
            self.offer(head);
        }
        self.published = self.next_available;
        self.available.area.store_u16(2, self.published, Ordering::Release);
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

    fn set_used_event(&self, index: u16) {
        self.available.area.store_u16(4 + 2 * usize::from(self.size), index, Ordering::Relaxed);
    }

    /// Puts a head in the available ring, unpublished.
    fn offer(&mut self, head: u16) {
        let at = 4 + 2 * usize::from(self.next_available % self.size);
        self.available.area.store_u16(at, head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
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
            let at = usize::from(entry) * DESCRIPTOR;
            write_descriptor(&self.descriptors, at, address, length, flags, next);
            self.entries[usize::from(entry)].next = next;
            entry = next;
        }
    }

    fn chain_indirect(
        &mut self,
        head: u16,
        tables: &Carved,
        encoded: &Encoded,
        data: &[DataBuffer],
    ) {
        self.free.pop();
        let stride = (self.segments + ENVELOPE) * DESCRIPTOR;
        let table = usize::from(head) * stride;
        let mut parts = self.parts(head, encoded, data).zip(1u16..).peekable();
        let mut at = table;
        while let Some(((address, length, flags), next)) = parts.next() {
            let flags = flags | if parts.peek().is_some() { descriptor_flags::NEXT } else { 0 };
            write_descriptor(tables, at, address, length, flags, next);
            at += DESCRIPTOR;
        }
        #[allow(clippy::cast_possible_truncation)] // at most (65535 + 2) * 16
        let length = (at - table) as u32;
        let address = tables.guest_address() + table as u64;
        write_descriptor(
            &self.descriptors,
            usize::from(head) * DESCRIPTOR,
            address,
            length,
            descriptor_flags::INDIRECT,
            0,
        );
    }
}

fn write_descriptor(to: &Carved, at: usize, address: u64, length: u32, flags: u16, next: u16) {
    to.area.store_u64(at, address, Ordering::Relaxed);
    to.area.store_u32(at + 8, length, Ordering::Relaxed);
    to.area.store_u16(at + 12, flags, Ordering::Relaxed);
    to.area.store_u16(at + 14, next, Ordering::Relaxed);
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
        /// Completes a head as a device does.
        fn complete(&mut self, used: u16, id: u32, status: Option<u8>) {
            let at = 4 + 8 * usize::from(used % SIZE);
            self.used.area.store_u32(at, id, Ordering::Relaxed);
            self.used.area.store_u32(at + 4, 513, Ordering::Relaxed);
            if let Some(status) = status {
                let at = id as usize * HEADER_STRIDE + STATUS_AT;
                self.headers.area.store_u8(at, status, Ordering::Relaxed);
            }
            self.used.area.store_u16(2, used.wrapping_add(1), Ordering::Release);
        }

        fn offered(&self, index: u16) -> u32 {
            let at = 4 + 2 * usize::from(index % SIZE);
            u32::from(self.available.area.load_u16(at, Ordering::Relaxed))
        }

        fn was_kicked(&self) -> bool {
            let mut count = [0; 8];
            rustix::io::read(self.handle.kick_fd(), &mut count).is_ok()
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
        for (tag, (flag, kicked)) in (0..).zip([(0, true), (NO_NOTIFICATION, false)]) {
            by_flag.used.area.store_u16(0, flag, Ordering::Relaxed);
            by_flag.submit(READ, &[BUFFER], tag).unwrap();
            by_flag.publish();
            assert_eq!(by_flag.was_kicked(), kicked);
        }
        by_flag.publish();
        assert!(!by_flag.was_kicked());

        let mut by_index = queue(features::RING_EVENT_IDX);
        // The device waits for the index after the first.
        by_index.used.area.store_u16(4 + 8 * usize::from(SIZE), 1, Ordering::Relaxed);
        for (tag, kicked) in [false, true].into_iter().enumerate() {
            by_index.submit(READ, &[BUFFER], tag as u64).unwrap();
            by_index.publish();
            assert_eq!(by_index.was_kicked(), kicked);
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
        assert_eq!(queue.published, 4);
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
