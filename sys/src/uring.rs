//! `Ring`: io_uring for one file, with the memory rules kept.
//!
//! The owner numbers its requests by slot; a ring of `slots` slots takes one operation in each. An operation names its
//! buffers as slices of a region table; the ring checks them, leases their regions and keeps the vector that the kernel
//! reads in the slot, until the completion is reaped. So nothing the kernel may still touch can be unmapped or reused by
//! safe code. A ring dropped with operations outstanding leaks them whole: mappings through their leases, the vectors, the
//! ring and the file, with its lock. It is the only sound thing left, and rare: a disk is closed when it has drained.
//!
//! **Flags.** Without a submission thread the ring is set up with `COOP_TASKRUN` and `TASKRUN_FLAG`: what has ended waits until the
//! thread that submitted it enters the kernel, and the ring says so in a word that a turn reads. A commit enters for that, too, where
//! it has nothing to submit; where neither is the case it makes no system call. Otherwise the kernel would interrupt the thread for
//! each completion that comes in at another core, which costs both cores more than the call (decision 0019). Whose thread sleeps, or
//! is interrupted anyway, gets its completions by that. A ring without a thread that submits to it any more gets what that thread had
//! submitted at its next call or tick, so a ring changes hands when nothing is in flight. `DEFER_TASKRUN` needs `SINGLE_ISSUER`, which
//! would bind the ring to the thread that enabled it, and disks move. `SUBMIT_ALL` keeps one bad entry from holding up the rest of its
//! batch.
//!
//! **Files in memory.** tmpfs cannot say "this would wait", so io_uring would hand its reads and writes to worker threads. Where the
//! file is open for direct I/O and marked `O_NONBLOCK`, io_uring takes it by its word and carries them out before the call
//! returns, on the thread that calls: [`RingMode::Inline`]. For tmpfs that is a copy. It waits only for a page that was swapped
//! out, and for the file's lock, which who deallocates a large range there has for as long as that takes; for other file systems it
//! might be a wait for a device, and which file is which is for the owner to know. A commit takes a turn's share only, and what
//! falls short in it (the file system is full) is the kernel's to try again by a worker: it is reaped later.
//!
//! **A pool** of memory that payloads often are in may be registered: its pages are pinned once, and neither looked up nor held for
//! each operation. The kernel keeps them, not the addresses, so what it has in flight there stays sound whoever unmaps it.
//!
//! **Sizes.** The submission queue has two entries per slot. One would do but for the submission thread, which publishes
//! its head after a whole batch: slots completed in it may be filled again before. The completion queue is twice that, so it
//! cannot overflow.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};
use rustix::fs::{MemfdFlags, Mode, OFlags};

use crate::PAGE_SIZE;
use crate::inline::share_of_a_turn;
use crate::mapping::Mapping;
use crate::region::{BadSlice, BufferSlice, RegionTable};
use crate::vector::{Direction, Vector};
use crate::zeroed::zeroed;

/// The most slots of one ring: the kernel takes 32768 entries at most.
pub const SLOTS_MAX: u32 = 8192;
/// How long an idle submission thread spins before it sleeps, milliseconds. It has a core to itself.
const SUBMISSION_THREAD_IDLE_MS: u32 = 1000;
/// What the one file of a ring is registered as.
const FILE: Fixed = Fixed(0);
/// What its pool is registered as.
const POOL: u16 = 0;
/// The `user_data` of entries that belong to no slot.
const NO_SLOT: u64 = u64::MAX;
/// `IORING_ENTER_GETEVENTS` of linux/io_uring.h: post what has ended.
const ENTER_GETEVENTS: u32 = 1;
/// `_IO(0x12, 0)` of linux/blkdev.h: discard on a block device, Linux 6.12.
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;

/// How operations reach the kernel.
#[derive(Debug, Clone)]
pub enum RingMode {
    /// One system call for all that was pushed since the last, and for what has ended.
    Enter,
    /// The same, for a file in memory that is open for direct I/O: a call carries out as many reads and writes as a turn should
    /// before it returns.
    Inline,
    /// A kernel thread looks for them: no system call while it is awake.
    SubmissionThread(SubmissionThread),
}

/// The kernel thread that submits for any number of rings; ends with the last of them.
#[derive(Clone)]
pub struct SubmissionThread {
    ring: Arc<IoUring>,
    core: u32,
}

impl fmt::Debug for SubmissionThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SubmissionThread(core {})", self.core)
    }
}

impl SubmissionThread {
    /// Starts the thread on `core`, which it should have to itself: shared with a spinning thread it is worse than none.
    ///
    /// # Errors
    /// The core does not exist or is not ours, or the kernel has no io_uring for us.
    pub fn start(core: u32) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_sqpoll(SUBMISSION_THREAD_IDLE_MS)
            .setup_sqpoll_cpu(core)
            .build(1)?;
        Ok(Self { ring: Arc::new(ring), core })
    }

    /// The core it runs on.
    #[must_use]
    pub fn core(&self) -> u32 {
        self.core
    }
}

/// An operation on a range of the file that carries no data. All of them read zero afterwards where they succeed, but for
/// [`RangeOp::Discard`], which promises nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeOp {
    /// Deallocates (fallocate's `PUNCH_HOLE`). On a block device: write zeroes by deallocating, or fail.
    PunchHole,
    /// Zeroes, keeping the allocation (fallocate's `ZERO_RANGE`).
    ZeroRange,
    /// Tells a block device that the range is no longer needed.
    Discard,
}

/// What the kernel has not been told of.
enum Untold {
    /// Whether there is anything.
    Anything(bool),
    /// In [`RingMode::Inline`] the bytes of each operation, oldest first.
    Each(VecDeque<u64>),
}

/// io_uring for one file.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    slots: ManuallyDrop<Box<[Vector]>>,
    /// The file outlives every operation on it.
    file: ManuallyDrop<Arc<OwnedFd>>,
    mode: RingMode,
    in_flight: u32,
    untold: Untold,
    /// What is registered: this many bytes from the beginning of a mapping, which keeps its addresses from becoming another's.
    pool: Option<(Arc<Mapping>, usize)>,
}

// SAFETY: the raw pointers in a Ring are the vectors it owns and the ring's own mappings; nothing in it is tied to a thread
// (no SINGLE_ISSUER), and all methods that change it take `&mut self`.
unsafe impl Send for Ring {}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("mode", &self.mode)
            .field("slots", &self.slots.len())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring of `slots` slots (at most [`SLOTS_MAX`]) for operations on `file`.
    ///
    /// # Errors
    /// The kernel has no io_uring for us (too old, or switched off by sysctl), or is short of memory.
    pub fn new(file: &Arc<OwnedFd>, slots: u32, mode: RingMode) -> io::Result<Self> {
        if slots == 0 || slots > SLOTS_MAX {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if let RingMode::Inline = mode {
            // Before it is registered, which is when io_uring looks at it.
            let flags = rustix::fs::fcntl_getfl(file)?;
            rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)?;
        }
        let untold = match mode {
            RingMode::Inline => Untold::Each(VecDeque::with_capacity(2 * slots as usize)),
            RingMode::Enter | RingMode::SubmissionThread(_) => Untold::Anything(false),
        };
        let mut builder = IoUring::builder();
        builder.setup_submit_all();
        match &mode {
            RingMode::SubmissionThread(thread) => builder
                .setup_sqpoll(SUBMISSION_THREAD_IDLE_MS)
                .setup_attach_wq(thread.ring.as_raw_fd()),
            RingMode::Enter | RingMode::Inline => builder.setup_coop_taskrun().setup_taskrun_flag(),
        };
        let ring = builder.build(slots * 2)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::UringCmd16::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            slots: ManuallyDrop::new(zeroed(slots as usize)),
            file: ManuallyDrop::new(Arc::clone(file)),
            mode,
            in_flight: 0,
            untold,
            pool: None,
        })
    }

    /// Whether this kernel carries out reads and writes of a file in memory as [`RingMode::Inline`] wants it: tried on a file
    /// of ours.
    #[must_use]
    pub fn works_inline() -> bool {
        try_inline().unwrap_or(false)
    }

    /// Registers the first `length` bytes of memory whose content is its owner's alone, from where payloads will often come. One
    /// pool for each ring. What of it [`Mapping::populate`] has not brought the kernel clears in one piece: not for a reactor.
    ///
    /// # Errors
    /// There is one, or this user may not have so much pinned (`RLIMIT_MEMLOCK`); the ring does without.
    pub fn register(&mut self, pool: &Arc<Mapping>, length: usize) -> io::Result<()> {
        let length = length.min(pool.len());
        let all = libc::iovec { iov_base: pool.base().as_ptr().cast(), iov_len: length };
        // SAFETY: `length` mapped bytes, whose pages the kernel pins before it returns; it uses their addresses only to find an
        // operation's place among them. As long as the ring names such places, it holds the mapping.
        unsafe { self.ring.submitter().register_buffers(&[all]) }?;
        self.pool = Some((Arc::clone(pool), length));
        Ok(())
    }

    /// Lets go of a registered pool. Its pages stay pinned until the ring is closed: to have the kernel give them back can take a
    /// wait for all that it has in flight.
    pub fn forget_pool(&mut self) {
        self.pool = None;
    }

    /// Whether a commit carries reads and writes out.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        matches!(self.mode, RingMode::Inline)
    }

    /// Operations pushed and not reaped.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether something was pushed that the kernel has not been told of.
    #[must_use]
    pub fn has_unsubmitted(&self) -> bool {
        match &self.untold {
            Untold::Anything(any) => *any,
            Untold::Each(lengths) => !lengths.is_empty(),
        }
    }

    /// Whether a commit has something to do: what was pushed, or what has ended and waits for this thread to enter the kernel.
    #[inline]
    #[must_use]
    pub fn wants_commit(&mut self) -> bool {
        self.has_unsubmitted() || self.has_waiting()
    }

    /// Whether something has ended that the kernel posts when the thread that submitted it enters.
    #[inline]
    fn has_waiting(&mut self) -> bool {
        self.in_flight > 0 && self.ring.submission().taskrun()
    }

    /// Whether completions can be reaped now.
    #[inline]
    #[must_use]
    pub fn has_completions(&mut self) -> bool {
        self.in_flight > 0 && !self.ring.completion().is_empty()
    }

    /// Pushes a read or write at byte `offset` of the file into or from `payload`. Panics if the slot is busy or the payload
    /// has more than [`SEGMENTS`](crate::SEGMENTS) slices: both are the owner's to know.
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
        let buffers = &mut self.slots[slot as usize];
        buffers.lease(memory, payload)?;
        let entry = match (direction, buffers.as_slice()) {
            (Direction::Read, [one]) if is_within(&self.pool, one) => {
                opcode::ReadFixed::new(FILE, one.iov_base.cast(), payload[0].length, POOL)
                    .offset(offset)
                    .build()
            }
            (Direction::Write, [one]) if is_within(&self.pool, one) => {
                opcode::WriteFixed::new(FILE, one.iov_base.cast(), payload[0].length, POOL)
                    .offset(offset)
                    .build()
            }
            (Direction::Read, [one]) => {
                opcode::Read::new(FILE, one.iov_base.cast(), payload[0].length)
                    .offset(offset)
                    .build()
            }
            (Direction::Write, [one]) => {
                opcode::Write::new(FILE, one.iov_base.cast(), payload[0].length)
                    .offset(offset)
                    .build()
            }
            (Direction::Read, many) => {
                opcode::Readv::new(FILE, many.as_ptr(), count(many)).offset(offset).build()
            }
            (Direction::Write, many) => {
                opcode::Writev::new(FILE, many.as_ptr(), count(many)).offset(offset).build()
            }
        };
        self.push(slot, entry, payload);
        Ok(())
    }

    /// Pushes an fdatasync: everything whose completion was reaped is durable when it succeeds. Panics if the slot is busy.
    #[inline]
    pub fn push_sync(&mut self, slot: u32) {
        self.slots[slot as usize].assert_idle();
        self.push(slot, opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(), &[]);
    }

    /// Pushes a [`RangeOp`] on `length` bytes at `offset`. Panics if the slot is busy.
    #[inline]
    pub fn push_range(&mut self, slot: u32, operation: RangeOp, offset: u64, length: u64) {
        self.slots[slot as usize].assert_idle();
        let allocate =
            |mode| opcode::Fallocate::new(FILE, length).offset(offset).mode(mode).build();
        let entry = match operation {
            RangeOp::PunchHole => allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            RangeOp::ZeroRange => allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            RangeOp::Discard => {
                // Start in `addr`, length in `addr3`, which is where the command's own bytes begin.
                let mut command = [0; 16];
                command[..8].copy_from_slice(&length.to_ne_bytes());
                opcode::UringCmd16::new(FILE, BLOCK_URING_CMD_DISCARD)
                    .cmd(command)
                    .addr(Some(offset))
                    .build()
            }
        };
        self.push(slot, entry, &[]);
    }

    /// Tells the kernel what was pushed, and has it post what has ended: at most one system call, none if there is neither. What
    /// the kernel cannot take now it is told of again by the next commit.
    #[inline]
    pub fn commit(&mut self) {
        if !self.has_unsubmitted() {
            if self.has_waiting() {
                // SAFETY: nothing is submitted and no argument passed. Failing is no harm: the next commit tries again.
                let _ = unsafe {
                    self.ring.submitter().enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None)
                };
            }
            return;
        }
        match &mut self.untold {
            Untold::Anything(any) => {
                let told = self.ring.submit().is_ok();
                // A submission thread takes what is left by itself.
                let left =
                    matches!(self.mode, RingMode::Enter) && !self.ring.submission().is_empty();
                *any = !told || left;
            }
            Untold::Each(lengths) => {
                let share = share_of_a_turn(lengths.iter().copied());
                #[allow(clippy::cast_possible_truncation)] // at most what a turn takes
                let count = share as u32;
                // SAFETY: so many entries have been pushed, and what they point to stays valid: see `push_raw`. No argument is
                // passed.
                let told =
                    unsafe { self.ring.submitter().enter::<libc::sigset_t>(count, 0, 0, None) };
                lengths.drain(..told.unwrap_or(0).min(share));
            }
        }
    }

    /// Hands every completion to `each`, as its slot and the kernel's result (negative `errno`, or bytes); the slot is idle
    /// by then. `memory` is the table that the operations were pushed with.
    #[inline]
    pub fn reap(&mut self, memory: &RegionTable, mut each: impl FnMut(u32, i32)) {
        if self.in_flight == 0 {
            return;
        }
        for completion in self.ring.completion() {
            let Ok(index) = u32::try_from(completion.user_data()) else { continue };
            let Some(slot) = self.slots.get_mut(index as usize) else { continue };
            if slot.release(memory) {
                self.in_flight -= 1;
                each(index, completion.result());
            }
        }
    }

    /// Keeps the kernel's worker threads off the calling thread's core, if the thread is pinned to one. Workers belong to
    /// the submitting thread and inherit its core: every flush would wait for the very thread that polls for it. So
    /// this is said on the reactor's thread, before its first request. A refusal (a cpuset smaller than the machine) is not an
    /// error: the workers then run where the scheduler puts them.
    pub fn keep_workers_off_this_core(&mut self) {
        let Some(others) = other_cores() else { return };
        // The kernel makes a thread's worker pool at its first submission, and has nothing to restrict before.
        self.push_raw(opcode::Nop::new().build().user_data(NO_SLOT), &[]);
        self.commit();
        let _ = self.ring.submitter().register_iowq_aff(&others);
    }

    fn push(&mut self, slot: u32, entry: Entry, payload: &[BufferSlice]) {
        self.push_raw(entry.user_data(u64::from(slot)), payload);
        self.slots[slot as usize].occupy();
        self.in_flight += 1;
    }

    fn push_raw(&mut self, entry: Entry, payload: &[BufferSlice]) {
        // SAFETY: what the entry points to stays valid until its completion: buffers by their leases and the vector in its
        // slot, which is not touched while it is busy; both are leaked rather than freed if the ring is dropped before. The
        // file is registered and held.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has two entries per slot and cannot be full");
        match &mut self.untold {
            Untold::Anything(any) => *any = true,
            Untold::Each(lengths) => {
                lengths.push_back(payload.iter().map(|slice| u64::from(slice.length)).sum());
            }
        }
    }
}

impl AsFd for Ring {
    /// The ring's descriptor: readable while completions can be reaped.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring is, which the borrow outlives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            return; // leaked, see the head of this file
        }
        // A closed ring is taken apart later, by a kernel worker, and its file would keep its lock until then: whoever opens
        // it next would find it locked by nobody. Unregistering lets go of it now, or with a submission thread very soon.
        let _ = self.ring.submitter().unregister_files();
        // SAFETY: each is dropped here once and never used again; nothing is in flight, so the kernel uses none of them. The
        // ring goes before the file it has registered.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.slots);
            ManuallyDrop::drop(&mut self.file);
        }
    }
}

/// Whether a buffer lies in the registered pool.
#[inline]
fn is_within(pool: &Option<(Arc<Mapping>, usize)>, buffer: &libc::iovec) -> bool {
    let Some((mapping, length)) = pool else { return false };
    // Below the pool's beginning the difference wraps around to far behind its end.
    let at = (buffer.iov_base as usize).wrapping_sub(mapping.base().as_ptr() as usize);
    at < *length && buffer.iov_len <= *length - at
}

/// A file in memory, open for direct I/O. One can only be made without; this opens it once more.
fn file_in_memory(bytes: u64) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(c"inline", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, bytes)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Writes and reads a page of a file in memory; whether both had ended when the call returned.
fn try_inline() -> io::Result<bool> {
    let file = Arc::new(file_in_memory(PAGE_SIZE as u64)?);
    let mut ring = Ring::new(&file, 1, RingMode::Inline)?;
    let table = RegionTable::with_capacity(1);
    let memory = Mapping::anonymous(PAGE_SIZE).map_err(io::Error::other)?;
    let region = table.insert(memory).map_err(io::Error::other)?;
    #[allow(clippy::cast_possible_truncation)] // a page
    let all = BufferSlice { region, length: PAGE_SIZE as u32, offset: 0 };
    for direction in [Direction::Write, Direction::Read] {
        ring.push_transfer(&table, 0, direction, 0, &[all]).map_err(io::Error::other)?;
        ring.commit();
        let (at_once, mut whole) = (ring.has_completions(), true);
        while ring.in_flight() > 0 {
            // A kernel that is short of memory may not have taken it.
            ring.commit();
            ring.reap(&table, |_, result| whole &= result == all.length.cast_signed());
            std::thread::yield_now();
        }
        if !at_once || !whole {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The length of a vector, as the kernel counts it.
fn count(iovecs: &[libc::iovec]) -> u32 {
    #[allow(clippy::cast_possible_truncation)] // at most SEGMENTS
    let count = iovecs.len() as u32;
    count
}

/// All cores but the one that the calling thread is pinned to; none if it is not pinned, or there is no other.
fn other_cores() -> Option<libc::cpu_set_t> {
    // SAFETY: a cpu_set_t is an array of integers, for which zero is a value; the call fills in as much as its size says.
    let (mine, result) = unsafe {
        let mut mine: libc::cpu_set_t = std::mem::zeroed();
        let result = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut mine);
        (mine, result)
    };
    // SAFETY: reads of an initialised set, at indexes below its size.
    if result != 0 || unsafe { libc::CPU_COUNT(&mine) } != 1 {
        return None;
    }
    let cores = std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    let last = cores.trim().rsplit(['-', ',']).next()?.parse::<usize>().ok()?;
    // SAFETY: as above; `last` is clamped below the set's size before it is used as an index.
    unsafe {
        let mut others: libc::cpu_set_t = std::mem::zeroed();
        for core in 0..=last.min(libc::CPU_SETSIZE as usize - 1) {
            if !libc::CPU_ISSET(core, &mine) {
                libc::CPU_SET(core, &mut others);
            }
        }
        (libc::CPU_COUNT(&others) > 0).then_some(others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::tests::memory;
    use rustix::event::{EventfdFlags, eventfd};

    fn scratch(len: u64) -> Arc<OwnedFd> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        Arc::new(file.into())
    }

    /// Commits and waits for everything in flight; slots with their results, sorted.
    fn finish(ring: &mut Ring, table: &RegionTable) -> Vec<(u32, i32)> {
        let mut results = Vec::new();
        ring.commit();
        while ring.in_flight() > 0 {
            ring.reap(table, |slot, result| results.push((slot, result)));
            std::thread::yield_now();
        }
        results.sort_unstable();
        results
    }

    fn write_then_read_back(mode: RingMode) {
        write_then_read_back_in(scratch(65536), mode);
    }

    fn write_then_read_back_in(file: Arc<OwnedFd>, mode: RingMode) {
        let (table, region, _mapping) = memory(1 << 20);
        let slice = |offset, length| BufferSlice { region, length, offset };
        table.write(slice(0, 5), b"hello").unwrap();
        let mut ring = Ring::new(&file, 4, mode).unwrap();

        ring.push_transfer(&table, 0, Direction::Write, 4096, &[slice(0, 3)]).unwrap();
        ring.push_transfer(&table, 1, Direction::Write, 8192, &[slice(1, 2), slice(3, 2)]).unwrap();
        assert_eq!(finish(&mut ring, &table), [(0, 3), (1, 4)]);
        ring.push_sync(3);
        assert_eq!(finish(&mut ring, &table), [(3, 0)]);

        ring.push_transfer(&table, 0, Direction::Read, 4096, &[slice(100, 3)]).unwrap();
        ring.push_transfer(&table, 1, Direction::Read, 8192, &[slice(201, 1), slice(300, 3)])
            .unwrap();
        assert_eq!(finish(&mut ring, &table), [(0, 3), (1, 4)]);
        let mut bytes = [0; 3];
        table.read(slice(100, 3), &mut bytes).unwrap();
        assert_eq!(&bytes, b"hel");
        table.read(slice(300, 3), &mut bytes).unwrap();
        assert_eq!(&bytes, b"llo");

        ring.push_range(2, RangeOp::PunchHole, 4096, 4096);
        assert_eq!(finish(&mut ring, &table), [(2, 0)]);
        ring.push_transfer(&table, 2, Direction::Read, 4096, &[slice(0, 4096)]).unwrap();
        assert_eq!(finish(&mut ring, &table), [(2, 4096)]);
        assert!(table.is_zero(slice(0, 4096)).unwrap());
        assert_eq!(table.leases(region), 0);
    }

    #[test]
    fn what_is_written_is_read_back_by_enter() {
        write_then_read_back(RingMode::Enter);
    }

    #[test]
    fn what_is_written_is_read_back_through_a_shared_submission_thread() {
        let thread = SubmissionThread::start(0).unwrap();
        write_then_read_back(RingMode::SubmissionThread(thread.clone()));
        write_then_read_back(RingMode::SubmissionThread(thread));
    }

    /// A file in memory for a ring that works inline. None where this kernel does not do so: then that is said.
    fn inline_file(bytes: u64) -> Option<Arc<OwnedFd>> {
        if !Ring::works_inline() {
            eprintln!(
                "SKIPPED: io_uring carries out nothing on tmpfs itself; run it on Linux 6.6 or later"
            );
            return None;
        }
        Some(Arc::new(file_in_memory(bytes).unwrap()))
    }

    #[test]
    fn what_is_written_inline_is_read_back() {
        if let Some(file) = inline_file(65536) {
            write_then_read_back_in(file, RingMode::Inline);
        }
    }

    #[test]
    fn a_commit_to_a_file_in_memory_carries_out_a_share_of_a_turn_before_it_returns() {
        let Some(file) = inline_file(4 << 20) else { return };
        let (table, region, _mapping) = memory(4 << 20);
        let mut ring = Ring::new(&file, 4, RingMode::Inline).unwrap();
        let large = |offset| BufferSlice { region, length: 600 << 10, offset };
        for slot in 0..3 {
            let offset = u64::from(slot) << 20;
            ring.push_transfer(&table, slot, Direction::Write, offset, &[large(offset)]).unwrap();
        }
        let mut turns = Vec::new();
        while ring.in_flight() > 0 {
            let mut ended = Vec::new();
            ring.commit();
            ring.reap(&table, |slot, result| ended.push((slot, result)));
            turns.push(ended);
        }
        let whole = 600 << 10;
        assert_eq!(turns, [vec![(0, whole), (1, whole)], vec![(2, whole)]]);
        assert!(!ring.has_unsubmitted());
    }

    #[test]
    fn only_a_buffer_that_lies_in_the_registered_part_of_a_pool_is_a_fixed_one() {
        let mapping = Mapping::anonymous(1 << 16).unwrap();
        let base = mapping.base().as_ptr() as usize;
        let pool = Some((mapping, 8192));
        let buffer =
            |at: usize, iov_len| libc::iovec { iov_base: at as *mut libc::c_void, iov_len };
        for (at, length, within) in [
            (base, 8192, true),
            (base + 4096, 4096, true),
            (base + 8191, 1, true),
            (base + 4096, 4097, false),
            (base + 8192, 1, false),
            (base - 1, 2, false),
            (base, usize::MAX, false),
        ] {
            assert_eq!(is_within(&pool, &buffer(at, length)), within, "{at:#x} {length}");
        }
        assert!(!is_within(&None, &buffer(base, 1)));
    }

    /// Payloads inside a registered pool, across its end and outside arrive alike, and when it was let go of as before.
    fn by_a_pool(file: Arc<OwnedFd>, mode: RingMode) {
        let (table, region, mapping) = memory(1 << 20);
        let mut ring = Ring::new(&file, 4, mode).unwrap();
        ring.register(&mapping, 65536).unwrap();
        assert!(ring.register(&mapping, 65536).is_err(), "one pool for each ring");
        let slice = |offset| BufferSlice { region, length: 4096, offset };
        for round in 0..2u8 {
            let places = [0, 65536 - 4096, 65536 - 512, 1 << 19];
            for (slot, place) in (0..).zip(places) {
                table.write(slice(place), &[slot * 16 + round; 4096]).unwrap();
                let (at, payload) = (u64::from(slot) << 13, &[slice(place)]);
                ring.push_transfer(&table, slot.into(), Direction::Write, at, payload).unwrap();
                assert_eq!(finish(&mut ring, &table), [(slot.into(), 4096)]);
                table.fill_zero(slice(place)).unwrap();
                ring.push_transfer(&table, slot.into(), Direction::Read, at, payload).unwrap();
                assert_eq!(finish(&mut ring, &table), [(slot.into(), 4096)]);
                let mut bytes = [0; 4096];
                table.read(slice(place), &mut bytes).unwrap();
                assert_eq!(bytes, [slot * 16 + round; 4096]);
            }
            let held = Arc::strong_count(&mapping);
            ring.forget_pool();
            assert_eq!(Arc::strong_count(&mapping), held - usize::from(round == 0));
        }
    }

    #[test]
    fn payloads_in_a_registered_pool_arrive_as_all_others() {
        by_a_pool(scratch(65536), RingMode::Enter);
        if let Some(file) = inline_file(65536) {
            by_a_pool(file, RingMode::Inline);
        }
    }

    #[test]
    fn a_submission_thread_on_a_core_that_does_not_exist_is_refused() {
        assert!(SubmissionThread::start(4095).is_err());
    }

    #[test]
    fn a_bad_slice_leaves_no_lease_and_an_idle_slot() {
        let (table, region, _mapping) = memory(1 << 20);
        let mut ring = Ring::new(&scratch(4096), 1, RingMode::Enter).unwrap();
        let good = BufferSlice { region, length: 8, offset: 0 };
        let bad = BufferSlice { region, length: 8, offset: 1 << 20 };
        let refused = ring.push_transfer(&table, 0, Direction::Read, 0, &[good, bad]);
        assert_eq!(refused, Err(BadSlice::OutOfBounds));
        assert_eq!((table.leases(region), ring.in_flight()), (0, 0));
        ring.push_transfer(&table, 0, Direction::Read, 0, &[good]).unwrap();
        assert_eq!(table.leases(region), 1);
        assert_eq!(finish(&mut ring, &table), [(0, 8)]);
    }

    #[test]
    #[should_panic(expected = "while the kernel has it")]
    fn a_busy_slot_cannot_be_used_again() {
        let mut ring = Ring::new(&scratch(4096), 1, RingMode::Enter).unwrap();
        ring.push_sync(0);
        ring.push_sync(0);
    }

    #[test]
    fn a_ring_dropped_with_a_read_outstanding_leaks_what_the_kernel_writes_later() {
        // A read of an event counter ends when somebody adds to it.
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(event.try_clone().unwrap());
        let (table, region, mapping) = memory(1 << 20);
        let mut ring = Ring::new(&file, 1, RingMode::Enter).unwrap();
        let into = BufferSlice { region, length: 8, offset: 0 };
        ring.push_transfer(&table, 0, Direction::Read, 0, &[into]).unwrap();
        ring.commit();
        drop(ring);
        drop(table);
        assert_eq!(Arc::strong_count(&mapping), 2, "the mapping is kept");
        assert_eq!(Arc::strong_count(&file), 2, "the file is kept");

        rustix::io::write(&event, &7u64.to_ne_bytes()).unwrap();
        let table = RegionTable::with_capacity(1);
        let region = table.insert(mapping).unwrap();
        let mut bytes = [0; 8];
        while bytes != 7u64.to_ne_bytes() {
            std::thread::yield_now();
            table.read(BufferSlice { region, length: 8, offset: 0 }, &mut bytes).unwrap();
        }
    }

    #[test]
    fn a_dropped_ring_lets_go_of_its_file_and_lock_at_once() {
        use crate::file::{Lock, try_lock};
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let (table, region, _mapping) = memory(1 << 20);
        for _ in 0..20 {
            let file = Arc::new(OwnedFd::from(scratch.reopen().unwrap()));
            try_lock(file.as_fd(), Lock::Exclusive).unwrap();
            let mut ring = Ring::new(&file, 4, RingMode::Enter).unwrap();
            let into = BufferSlice { region, length: 8, offset: 0 };
            ring.push_transfer(&table, 0, Direction::Read, 0, &[into]).unwrap();
            finish(&mut ring, &table);
        }
    }

    #[test]
    fn the_descriptor_of_a_ring_wakes_a_sleeper() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (table, region, _mapping) = memory(1 << 20);
        let file = Arc::new(event.try_clone().unwrap());
        let mut ring = Ring::new(&file, 1, RingMode::Enter).unwrap();
        let into = BufferSlice { region, length: 8, offset: 0 };
        ring.push_transfer(&table, 0, Direction::Read, 0, &[into]).unwrap();
        ring.commit();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
        });
        let mut set = crate::WaitSet::with_capacity(1);
        while !ring.has_completions() {
            set.clear();
            set.add(&ring);
            set.sleep(None);
        }
        waker.join().unwrap();
        assert_eq!(finish(&mut ring, &table), [(0, 8)]);
    }

    /// What ends at another core while this thread makes no system call is there after a commit that has nothing to submit.
    #[test]
    fn a_commit_takes_what_waits_for_the_thread() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = Arc::new(event.try_clone().unwrap());
        let (table, region, _mapping) = memory(1 << 20);
        let mut ring = Ring::new(&file, 1, RingMode::Enter).unwrap();
        let into = BufferSlice { region, length: 8, offset: 0 };
        let mut waited = 0;
        for _ in 0..50 {
            ring.push_transfer(&table, 0, Direction::Read, 0, &[into]).unwrap();
            ring.commit();
            assert!(!ring.wants_commit());
            let writer = std::thread::spawn({
                let event = event.try_clone().unwrap();
                move || rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap()
            });
            while !ring.wants_commit() && !ring.has_completions() {
                std::hint::spin_loop();
            }
            // Else this thread was interrupted, by a tick or for want of a second core.
            waited += u32::from(ring.wants_commit());
            ring.commit();
            assert!(ring.has_completions() && !ring.wants_commit());
            ring.reap(&table, |slot, result| assert_eq!((slot, result), (0, 8)));
            writer.join().unwrap();
        }
        if waited == 0 {
            eprintln!("SKIPPED: nothing waited for the thread; run it on two cores or more");
        }
    }

    /// The cores that the kernel's workers of this thread may run on.
    fn cores_of_workers() -> Vec<String> {
        // SAFETY: a plain system call.
        let name = format!("iou-wrk-{}", unsafe { libc::gettid() });
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let mut cores = Vec::new();
        for task in tasks.map(|task| task.unwrap().path()) {
            let text = std::fs::read_to_string(task.join("status")).unwrap_or_default();
            let field = |name| text.lines().find_map(|line| line.strip_prefix(name));
            if field("Name:").is_some_and(|found| found.trim() == name) {
                cores.push(field("Cpus_allowed_list:").unwrap().trim().to_owned());
            }
        }
        cores
    }

    #[test]
    fn the_workers_of_a_pinned_thread_stay_off_its_core() {
        let pin = |core: usize| {
            // SAFETY: a set of integers, one bit of which is set; the thread's own affinity is changed.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(core, &mut set);
                libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
            }
        };
        if std::thread::available_parallelism().unwrap().get() < 2 {
            return; // there is nowhere else to go
        }
        std::thread::spawn(move || {
            let (table, _, _mapping) = memory(1 << 20);
            let mut ring = Ring::new(&scratch(4096), 1, RingMode::Enter).unwrap();
            assert_eq!(pin(0), 0);
            ring.keep_workers_off_this_core();
            // A flush is always a worker's.
            ring.push_sync(0);
            assert_eq!(finish(&mut ring, &table), [(0, 0)]);
            let cores = cores_of_workers();
            assert!(!cores.is_empty());
            assert!(cores.iter().all(|cores| !cores.starts_with('0')), "{cores:?}");
        })
        .join()
        .unwrap();
    }
}
