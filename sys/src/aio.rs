//! `Aio`: Linux AIO for one file whose data is in memory, with the memory rules kept.
//!
//! For files that [`Ring`](crate::Ring) cannot serve within its call: before Linux 6.6, on ramfs, or through the page cache. There
//! io_uring hands every request to a kernel worker thread, for the file system cannot say "this would wait". `io_submit` carries
//! requests out before it returns, a whole batch of them, on the thread that calls; where the data is in memory that is a copy. It
//! waits for what a ring would wait for there. Completions are read from the ring that the kernel keeps in our memory (fs/aio.c,
//! `struct aio_ring`; linux/aio_abi.h for the rest), which costs no call.
//!
//! On a device or a network share the same call would wait for it, and the thread's other disks with it: that it is used for
//! memory only is its owner's to see to. Nothing here relies on it: an operation that ends later is reaped later.
//!
//! The owner numbers its requests by slot, as with [`Ring`](crate::Ring), and the rule is the same: buffers are leased, and
//! the kernel's description of an operation is left alone, until its completion is reaped. Dropped with operations
//! outstanding, everything is leaked.
//!
//! **Refusals.** `io_submit` stops at an operation that it does not take, says how many came before, and says why only where
//! that is the first. So the next commit, which begins with it, finds out, and the operation ends with that error. One that
//! failed while it was carried out (a full file system) has a completion like all.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::inline::{OPERATIONS, share_of_a_turn};
use crate::region::{BadSlice, BufferSlice, RegionTable};
use crate::vector::{Direction, Vector};
use crate::zeroed::{Zeroed, zeroed};

/// Operations of one commit, at most. The host's `fs.aio-max-nr`, 65536 unless somebody changed it, counts this much for each queue.
const BATCH: usize = OPERATIONS;

/// `AIO_RING_MAGIC` of fs/aio.c: what this layout of the ring is called.
const RING_MAGIC: u32 = 0xa10a_10a1;

/// `IOCB_CMD_*` of linux/aio_abi.h.
const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const PREADV: u16 = 7;
const PWRITEV: u16 = 8;

/// `struct iocb` of linux/aio_abi.h: an operation as the kernel reads it.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    /// `aio_key` and `aio_rw_flags`, in the order of the machine's bytes; both zero.
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

/// `struct io_event` of linux/aio_abi.h: how an operation ended.
#[repr(C)]
#[derive(Clone, Copy)]
struct Event {
    data: u64,
    iocb: u64,
    /// Bytes, or a negative `errno`.
    result: i64,
    result2: i64,
}

/// `struct aio_ring` of fs/aio.c, without the events that follow it.
#[repr(C)]
struct Header {
    id: u32,
    /// How many events there is room for.
    count: u32,
    /// The next event to be reaped, which we move on.
    head: u32,
    /// The next event to be written, which the kernel moves on.
    tail: u32,
    magic: u32,
    compatible: u32,
    /// Features without which the layout cannot be understood.
    incompatible: u32,
    /// Where the events begin, bytes.
    length: u32,
}

/// A kernel's AIO context: its handle is the address of its ring.
struct Context {
    ring: NonNull<Header>,
    count: u32,
}

impl Context {
    /// Room for the completions of [`BATCH`] operations.
    fn new() -> io::Result<Self> {
        let mut handle: libc::c_ulong = 0;
        // SAFETY: `handle` is zero, as the call wants it, and outlives the call.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, BATCH, &raw mut handle) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(ptr::with_exposed_provenance_mut::<Header>(
            usize::try_from(handle).unwrap_or(0),
        ));
        let Some(ring) = ring else { return Err(io::Error::from_raw_os_error(libc::EFAULT)) };
        // SAFETY: the kernel has mapped its ring there, page-aligned and for as long as the context lives, and fills in these
        // fields before it returns and never again.
        let (count, known) = unsafe {
            let header = ring.as_ptr();
            let known = (*header).magic == RING_MAGIC
                && (*header).incompatible == 0
                && (*header).length as usize == size_of::<Header>();
            ((*header).count, known)
        };
        let context = Self { ring, count };
        if known && count > 0 {
            Ok(context)
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOSYS))
        }
    }

    fn handle(&self) -> libc::c_ulong {
        self.ring.as_ptr().expose_provenance() as libc::c_ulong
    }

    fn head(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of the mapped ring, which lives as long as `self`; the kernel too uses it by atomic accesses.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.ring.as_ptr()).head) }
    }

    fn tail(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.ring.as_ptr()).tail) }
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.head().load(Ordering::Relaxed) == self.tail().load(Ordering::Acquire)
    }

    /// Takes the oldest event.
    #[inline]
    fn next(&self) -> Option<Event> {
        if self.is_empty() {
            return None;
        }
        let at = self.head().load(Ordering::Relaxed) % self.count;
        // SAFETY: `count` events follow the header, and the acquire load of the tail says that the kernel has written the
        // one at the head; it does not write there again before the head has moved on.
        let event = unsafe { self.ring.add(1).cast::<Event>().add(at as usize).read() };
        self.head().store((at + 1) % self.count, Ordering::Release);
        Some(event)
    }
}

impl Drop for Context {
    /// Has the context destroyed by a thread of its own: the call waits for the kernel's grace periods, tens of milliseconds in which
    /// whoever closes a disk has other things to do.
    fn drop(&mut self) {
        let handle = self.handle();
        // SAFETY: the handle is the kernel's and is used no more: nothing else of the context is left. What may be
        // outstanding the call waits for.
        let destroy = move || unsafe { libc::syscall(libc::SYS_io_destroy, handle) };
        let thread = std::thread::Builder::new().name("aio-destroy".to_owned());
        if thread.spawn(destroy).is_err() {
            destroy();
        }
    }
}

struct Slot {
    iocb: Iocb,
    /// Bytes of the operation: an [`Iocb`] of several buffers does not say.
    bytes: u64,
    buffers: Vector,
}

// SAFETY: an idle slot, integers and an empty vector.
unsafe impl Zeroed for Slot {}

/// Linux AIO for one file.
pub struct Aio {
    context: ManuallyDrop<Context>,
    slots: ManuallyDrop<Box<[Slot]>>,
    /// The file outlives every operation on it.
    file: ManuallyDrop<Arc<OwnedFd>>,
    /// Slots that the kernel has not been told of, oldest first.
    pushed: VecDeque<u32>,
    /// What one commit submits; room made once.
    batch: Box<[*mut Iocb; BATCH]>,
    /// Slots that the kernel has refused, with the error: as good as completions.
    refused: VecDeque<(u32, i32)>,
    in_flight: u32,
}

// SAFETY: the raw pointers in it are the kernel's ring and vectors that it owns; a context belongs to the process, not to a
// thread, and all methods that change anything take `&mut self`.
unsafe impl Send for Aio {}

impl fmt::Debug for Aio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aio")
            .field("slots", &self.slots.len())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Aio {
    /// A queue of `slots` slots for reads and writes of `file`.
    ///
    /// # Errors
    /// `ENOSYS`: the kernel has no AIO for us. `EAGAIN`: the host's contexts have used up `fs.aio-max-nr`.
    pub fn new(file: &Arc<OwnedFd>, slots: u32) -> io::Result<Self> {
        Ok(Self {
            context: ManuallyDrop::new(Context::new()?),
            slots: ManuallyDrop::new(zeroed(slots as usize)),
            file: ManuallyDrop::new(Arc::clone(file)),
            pushed: VecDeque::with_capacity(slots as usize),
            batch: Box::new([ptr::null_mut(); BATCH]),
            refused: VecDeque::with_capacity(slots as usize),
            in_flight: 0,
        })
    }

    /// Whether a queue can be had now.
    ///
    /// # Errors
    /// As [`Aio::new`].
    pub fn probe() -> io::Result<()> {
        Context::new().map(drop)
    }

    /// Operations pushed and not reaped.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether completions can be reaped now.
    #[inline]
    #[must_use]
    pub fn has_completions(&self) -> bool {
        self.in_flight > 0 && (!self.context.is_empty() || !self.refused.is_empty())
    }

    /// Pushes a read or write, as [`Ring::push_transfer`](crate::Ring::push_transfer).
    ///
    /// # Errors
    /// A slice names no memory; nothing was pushed.
    #[inline]
    pub fn push_transfer(
        &mut self,
        memory: &RegionTable,
        slot: u32,
        direction: Direction,
        offset: u64,
        payload: &[BufferSlice],
    ) -> Result<(), BadSlice> {
        let file = self.file.as_raw_fd().cast_unsigned();
        let state = &mut self.slots[slot as usize];
        state.buffers.lease(memory, payload)?;
        let (opcode, buffer, length) = match (direction, state.buffers.as_slice()) {
            (Direction::Read, [one]) => (PREAD, one.iov_base.expose_provenance(), one.iov_len),
            (Direction::Write, [one]) => (PWRITE, one.iov_base.expose_provenance(), one.iov_len),
            (Direction::Read, many) => (PREADV, many.as_ptr().expose_provenance(), many.len()),
            (Direction::Write, many) => (PWRITEV, many.as_ptr().expose_provenance(), many.len()),
        };
        state.iocb = Iocb {
            data: u64::from(slot),
            opcode,
            file,
            buffer: buffer as u64,
            length: length as u64,
            offset: offset.cast_signed(), // a negative one is refused
            ..Iocb::default()
        };
        state.bytes = payload.iter().map(|slice| u64::from(slice.length)).sum();
        state.buffers.occupy();
        self.pushed.push_back(slot);
        self.in_flight += 1;
        Ok(())
    }

    /// Has the kernel carry out what was pushed, as much of it as a turn should take: at most one system call, none if
    /// nothing was pushed. The rest is for the next commit.
    #[inline]
    pub fn commit(&mut self) {
        if self.pushed.is_empty() {
            return;
        }
        let lengths = self.pushed.iter().map(|slot| self.slots[*slot as usize].bytes);
        let count = share_of_a_turn(lengths);
        for (slot, entry) in self.pushed.iter().zip(&mut self.batch[..count]) {
            *entry = &raw mut self.slots[*slot as usize].iocb;
        }
        // SAFETY: the first `count` entries of the batch are operations in slots, to be written (the kernel marks them) as well
        // as read; what they point to stays valid until their completions: buffers by their leases, vectors in their slots,
        // which are not touched while busy; all leaked rather than freed if this is dropped before. The file is held.
        let result = unsafe {
            libc::syscall(libc::SYS_io_submit, self.context.handle(), count, self.batch.as_ptr())
        };
        if let Ok(taken) = usize::try_from(result) {
            self.pushed.drain(..taken.min(self.pushed.len()));
            return;
        }
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        // Short of memory, or of room for completions before the last are reaped: there will be some.
        if errno != libc::EAGAIN
            && let Some(slot) = self.pushed.pop_front()
        {
            self.refused.push_back((slot, -errno));
        }
    }

    /// Hands every completion to `each`, as its slot and the kernel's result (negative `errno`, or bytes); the slot is idle
    /// by then. `memory` is the table that the operations were pushed with.
    #[inline]
    pub fn reap(&mut self, memory: &RegionTable, mut each: impl FnMut(u32, i32)) {
        if self.in_flight == 0 {
            return;
        }
        while let Some(event) = self.context.next() {
            let Ok(slot) = u32::try_from(event.data) else { continue };
            if self.release(memory, slot) {
                each(slot, i32::try_from(event.result).unwrap_or(-libc::EIO));
            }
        }
        while let Some((slot, result)) = self.refused.pop_front() {
            if self.release(memory, slot) {
                each(slot, result);
            }
        }
    }

    /// The kernel is done with a slot, if it had it.
    fn release(&mut self, memory: &RegionTable, slot: u32) -> bool {
        let Some(slot) = self.slots.get_mut(slot as usize) else { return false };
        let had = slot.buffers.release(memory);
        self.in_flight -= u32::from(had);
        had
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            return; // leaked, see the head of this file
        }
        // SAFETY: each is dropped here once and never used again; nothing is in flight, so the kernel uses none of them.
        unsafe {
            ManuallyDrop::drop(&mut self.context);
            ManuallyDrop::drop(&mut self.slots);
            ManuallyDrop::drop(&mut self.file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::tests::memory;
    use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};

    const LEN: u64 = 4 << 20;

    /// A file in memory: its pages are tmpfs's.
    fn scratch() -> Arc<OwnedFd> {
        let file = memfd_create("scratch", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LEN).unwrap();
        Arc::new(file)
    }

    /// Commits once; what has ended by then.
    fn turn(aio: &mut Aio, table: &RegionTable) -> Vec<(u32, i32)> {
        let mut results = Vec::new();
        aio.commit();
        aio.reap(table, |slot, result| results.push((slot, result)));
        results
    }

    #[test]
    fn a_batch_has_been_carried_out_when_its_commit_returns() {
        let (table, region, _mapping) = memory(4 << 20);
        let slice = |offset, length| BufferSlice { region, length, offset };
        table.write(slice(0, 5), b"hello").unwrap();
        let mut aio = Aio::new(&scratch(), 4).unwrap();
        assert_eq!(turn(&mut aio, &table), []);

        aio.push_transfer(&table, 0, Direction::Write, 4096, &[slice(0, 3)]).unwrap();
        aio.push_transfer(&table, 1, Direction::Write, 8192, &[slice(1, 2), slice(3, 2)]).unwrap();
        assert!(!aio.has_completions());
        aio.commit();
        assert!(aio.has_completions());
        assert_eq!(turn(&mut aio, &table), [(0, 3), (1, 4)]);

        aio.push_transfer(&table, 3, Direction::Read, 4096, &[slice(100, 3)]).unwrap();
        aio.push_transfer(&table, 1, Direction::Read, 8192, &[slice(201, 1), slice(300, 3)])
            .unwrap();
        assert_eq!(table.leases(region), 3);
        assert_eq!(turn(&mut aio, &table), [(3, 3), (1, 4)]);
        let mut bytes = [0; 3];
        table.read(slice(100, 3), &mut bytes).unwrap();
        assert_eq!(&bytes, b"hel");
        table.read(slice(300, 3), &mut bytes).unwrap();
        assert_eq!(&bytes, b"llo");
        assert_eq!((table.leases(region), aio.in_flight()), (0, 0));
    }

    #[test]
    fn the_ring_comes_round_many_times() {
        let (table, region, _mapping) = memory(4 << 20);
        let mut aio = Aio::new(&scratch(), 100).unwrap();
        for round in 0..200u64 {
            for slot in 0..100u32 {
                let cell = u64::from(slot) * 8;
                let at = BufferSlice { region, length: 8, offset: cell };
                table.write(at, &(round + cell).to_ne_bytes()).unwrap();
                aio.push_transfer(&table, slot, Direction::Write, cell, &[at]).unwrap();
            }
            assert_eq!(turn(&mut aio, &table).len(), 100, "round {round}");
        }
        let all = BufferSlice { region, length: 800, offset: 0 };
        aio.push_transfer(&table, 0, Direction::Read, 0, &[all]).unwrap();
        assert_eq!(turn(&mut aio, &table), [(0, 800)]);
        let mut last = [0; 8];
        table.read(BufferSlice { region, length: 8, offset: 792 }, &mut last).unwrap();
        assert_eq!(u64::from_ne_bytes(last), 199 + 792);
    }

    #[test]
    fn a_turn_takes_no_more_operations_and_bytes_than_are_good_for_it() {
        let (table, region, _mapping) = memory(4 << 20);
        let mut aio = Aio::new(&scratch(), 300).unwrap();
        let push = |aio: &mut Aio, slot, length| {
            let at = BufferSlice { region, length, offset: 0 };
            aio.push_transfer(&table, slot, Direction::Write, 0, &[at]).unwrap();
        };
        for slot in 0..300 {
            push(&mut aio, slot, 512);
        }
        let turns: Vec<usize> = (0..4).map(|_| turn(&mut aio, &table).len()).collect();
        assert_eq!(turns, [128, 128, 44, 0]);
        for slot in 0..3 {
            push(&mut aio, slot, 3 << 19);
        }
        for slot in 3..7 {
            push(&mut aio, slot, 1 << 19);
        }
        let turns: Vec<usize> = (0..6).map(|_| turn(&mut aio, &table).len()).collect();
        assert_eq!(turns, [1, 1, 1, 2, 2, 0]);
    }

    #[test]
    fn an_operation_that_the_kernel_refuses_ends_with_its_error_and_holds_nobody_up() {
        let (table, region, _mapping) = memory(4 << 20);
        let at = BufferSlice { region, length: 8, offset: 0 };
        let mut aio = Aio::new(&scratch(), 3).unwrap();
        aio.push_transfer(&table, 0, Direction::Write, 0, &[at]).unwrap();
        aio.push_transfer(&table, 1, Direction::Read, u64::MAX, &[at]).unwrap();
        aio.push_transfer(&table, 2, Direction::Read, 0, &[at]).unwrap();
        let turns: Vec<_> = (0..3).map(|_| turn(&mut aio, &table)).collect();
        assert_eq!(turns, [vec![(0, 8)], vec![(1, -libc::EINVAL)], vec![(2, 8)]]);
        assert_eq!((table.leases(region), aio.in_flight()), (0, 0));
    }

    #[test]
    fn one_that_fails_while_it_is_carried_out_fails_alone() {
        let (table, region, _mapping) = memory(4 << 20);
        let file = scratch();
        let mut aio = Aio::new(&file, 3).unwrap();
        let at = BufferSlice { region, length: 8, offset: 0 };
        ftruncate(&file, 4).unwrap();
        for (slot, offset) in [(0, 0), (1, 4096)] {
            aio.push_transfer(&table, slot, Direction::Read, offset, &[at]).unwrap();
        }
        assert_eq!(turn(&mut aio, &table), [(0, 4), (1, 0)], "short, and behind the end");
    }

    #[test]
    fn a_bad_slice_leaves_no_lease_and_an_idle_slot() {
        let (table, region, _mapping) = memory(4 << 20);
        let mut aio = Aio::new(&scratch(), 1).unwrap();
        let good = BufferSlice { region, length: 8, offset: 0 };
        let bad = BufferSlice { region, length: 8, offset: 4 << 20 };
        let refused = aio.push_transfer(&table, 0, Direction::Read, 0, &[good, bad]);
        assert_eq!(refused, Err(BadSlice::OutOfBounds));
        assert_eq!((table.leases(region), aio.in_flight()), (0, 0));
        aio.push_transfer(&table, 0, Direction::Read, 0, &[good]).unwrap();
        assert_eq!(turn(&mut aio, &table), [(0, 8)]);
    }

    #[test]
    #[should_panic(expected = "while the kernel has it")]
    fn a_busy_slot_cannot_be_used_again() {
        let (table, region, _mapping) = memory(4 << 20);
        let mut aio = Aio::new(&scratch(), 1).unwrap();
        let at = BufferSlice { region, length: 8, offset: 0 };
        for _ in 0..2 {
            aio.push_transfer(&table, 0, Direction::Read, 0, &[at]).unwrap();
        }
    }

    #[test]
    fn what_was_not_reaped_keeps_its_memory_and_its_file() {
        let (file, (table, region, mapping)) = (scratch(), memory(4 << 20));
        let mut aio = Aio::new(&file, 1).unwrap();
        let at = BufferSlice { region, length: 8, offset: 0 };
        aio.push_transfer(&table, 0, Direction::Read, 0, &[at]).unwrap();
        aio.commit();
        drop(aio);
        drop(table);
        assert_eq!((Arc::strong_count(&mapping), Arc::strong_count(&file)), (2, 2));
    }

    #[test]
    fn the_file_is_let_go_with_the_queue() {
        let (file, (table, region, _mapping)) = (scratch(), memory(4 << 20));
        let mut aio = Aio::new(&file, 1).unwrap();
        let at = BufferSlice { region, length: 8, offset: 0 };
        aio.push_transfer(&table, 0, Direction::Write, 0, &[at]).unwrap();
        assert_eq!(turn(&mut aio, &table), [(0, 8)]);
        drop(aio);
        assert_eq!(Arc::strong_count(&file), 1);
    }

    #[test]
    fn a_completion_that_comes_later_is_reaped_later() {
        // Direct I/O on a disk is not done when it is submitted. Where there is no disk, it is: as in the other tests.
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(LEN).unwrap();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(path.path(), flags | OFlags::DIRECT, Mode::empty())
            .or_else(|_| rustix::fs::open(path.path(), flags, Mode::empty()))
            .unwrap();
        let (table, region, _mapping) = memory(4 << 20);
        let mut aio = Aio::new(&Arc::new(file), 8).unwrap();
        for slot in 0..8 {
            let offset = u64::from(slot) * 65536;
            let at = BufferSlice { region, length: 65536, offset };
            aio.push_transfer(&table, slot, Direction::Write, offset, &[at]).unwrap();
        }
        let mut results = Vec::new();
        while aio.in_flight() > 0 {
            results.extend(turn(&mut aio, &table));
        }
        results.sort_unstable();
        assert_eq!(results, (0..8).map(|slot| (slot, 65536)).collect::<Vec<_>>());
        assert_eq!(table.leases(region), 0);
    }
}
