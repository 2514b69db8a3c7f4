//! The data side stepped by hand: a guest that writes its descriptors byte by byte, a disk that answers when it is told to.

// A test may cast what it made itself.
#![allow(clippy::cast_possible_truncation)]

use std::sync::mpsc::{Receiver as Inbox, TryRecvError, channel};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use resilver_bdev::{
    BdevIo, CompletionBatch, ConsumerId, Disk, DiskCommand, DiskHandle, IoChannel, IoError, Limits,
};
use resilver_reactor::{Nanos, Poller};
use resilver_sys::{Area, Mapping, RegionTable};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::*;
use crate::chain::Indirect;
use crate::inflight::{Holds, InflightMemory};
use crate::memory::GuestRegion;
use crate::message::{RegionDescription, RingAddresses};
use crate::protocol::{blk_status, blk_type, descriptor_flags};
use crate::ring::{ChainFault, EventMode, Format, Ring};

mod ahead;
mod incidents;
mod inflight;
mod logging;
mod packed;

const NEXT: u16 = descriptor_flags::NEXT;
const WRITE: u16 = descriptor_flags::WRITE;
const INDIRECT: u16 = descriptor_flags::INDIRECT;
/// Guest memory: where it begins for guest and front end alike, and how much there is.
const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 1 << 20;
/// Entries of the ring, and where its parts are.
const SIZE: u16 = 128;
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where headers, status bytes and data are.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x1_0000;
const POISON: u8 = 0xee;

const LIMITS: Limits =
    Limits { num_blocks: 512, max_unmap: 1 << 20, ..crate::blk::tests::DEVICE.limits };

/// What a test sees of its disk.
struct Medium {
    limits: Limits,
    bytes: Vec<u8>,
    /// Everything that was submitted, in order.
    log: Vec<BdevIo>,
    /// Whether I/O ends by itself.
    answers: bool,
    /// No room for I/O of this kind.
    full: Option<IoKind>,
    fails: Option<IoError>,
    /// What the guest does behind our back at the next submission.
    ambush: Option<Box<dyn FnOnce() + Send>>,
}

struct Channel {
    limits: Limits,
    medium: Arc<Mutex<Medium>>,
    pending: Vec<(BdevIo, Vec<BufferSlice>)>,
}

impl IoChannel for Channel {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn free(&self, kind: IoKind) -> u32 {
        if self.medium.lock().unwrap().full == Some(kind) { 0 } else { 8 }
    }
    fn submit(&mut self, _cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        assert!(payload.len() <= self.limits.max_segments as usize);
        assert!(!io.kind.has_payload() || io.length <= u64::from(self.limits.max_transfer));
        let sum: u64 = payload.iter().map(|slice| u64::from(slice.length)).sum();
        assert!(!io.kind.has_payload() || sum == io.length);
        let mut medium = self.medium.lock().unwrap();
        medium.log.push(io);
        if let Some(ambush) = medium.ambush.take() {
            ambush();
        }
        self.pending.push((io, payload.to_vec()));
    }
    fn commit(&mut self, _cx: &Context<'_>) {}
    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        let mut medium = self.medium.lock().unwrap();
        if !medium.answers {
            return;
        }
        for (io, payload) in self.pending.drain(..) {
            let result = medium.fails.map_or(Ok(()), Err);
            if result.is_ok() {
                carry_out(cx, &mut medium.bytes, &io, &payload);
            }
            done.push(Completion { tag: io.tag, result });
        }
    }
    fn in_flight(&self) -> u32 {
        self.pending.len() as u32
    }
    fn is_passive(&self) -> bool {
        true
    }
}

fn carry_out(cx: &Context<'_>, bytes: &mut [u8], io: &BdevIo, payload: &[BufferSlice]) {
    let mut at = io.offset as usize;
    for slice in payload {
        let part = &mut bytes[at..at + slice.length as usize];
        match io.kind {
            IoKind::Read => cx.memory.write(*slice, part).unwrap(),
            _ => cx.memory.read(*slice, part).unwrap(),
        }
        at += slice.length as usize;
    }
    if matches!(io.kind, IoKind::Unmap | IoKind::WriteZeroes) {
        bytes[at..at + io.length as usize].fill(0);
    }
}

/// A guest, its disk, and the reactor's turns.
struct Bench {
    table: RegionTable,
    file: OwnedFd,
    guest: Area,
    disk: Disk,
    handle: DiskHandle,
    commands: Sender<Command>,
    medium: Arc<Mutex<Medium>>,
    call: EventFd,
    format: Format,
    events: EventMode,
    fault: Inbox<SessionFault>,
    stats: Arc<VhostStats>,
    doorbell: Arc<Doorbell>,
    sessions: u64,
    offered: u16,
    now: u64,
    /// What the disk watches since it was last found idle.
    watch: Watch,
}

fn answer<T: Send + 'static>() -> (Reply<T>, Inbox<T>) {
    let (sender, inbox) = channel();
    (Box::new(move |value| drop(sender.send(value))), inbox)
}

type Faults = (Reply<SessionFault>, Inbox<SessionFault>);

fn channel_of_faults() -> Faults {
    answer()
}

impl Bench {
    fn new() -> Self {
        Self::with(LIMITS, EventMode::Flags)
    }

    fn with(limits: Limits, events: EventMode) -> Self {
        Self::of(Format::Split, limits, events)
    }

    fn of(format: Format, limits: Limits, events: EventMode) -> Self {
        let size = limits.size() as usize;
        let medium = Medium {
            limits,
            bytes: vec![0; size],
            log: Vec::new(),
            answers: true,
            full: None,
            fails: None,
            ambush: None,
        };
        let medium = Arc::new(Mutex::new(medium));
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let channel = Channel {
            limits: medium.lock().unwrap().limits,
            medium: Arc::clone(&medium),
            pending: Vec::new(),
        };
        let (disk, handle) =
            Disk::new(Box::new(channel), Arc::default(), Arc::clone(&doorbell), || ());
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY).unwrap();
        let mapping = Mapping::shared(file.as_fd(), 0, MEMORY).unwrap();
        let guest = Area::new(&mapping, 0, MEMORY as usize, 4096).unwrap();
        let call = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let mut bench = Self {
            table: RegionTable::with_capacity(8),
            file,
            guest,
            disk,
            handle,
            commands: mailbox(1, Arc::clone(&doorbell)).0,
            doorbell,
            medium,
            call: EventFd::from_fd(call),
            format,
            events,
            fault: channel_of_faults().1,
            stats: Arc::default(),
            sessions: 0,
            offered: 0,
            now: 0,
            watch: Watch::default(),
        };
        bench.connect(None);
        bench
    }

    /// A session with ring 0 running, after one that is gone.
    fn connect(&mut self, inflight: Option<&InflightMemory>) {
        let (on_fault, fault) = channel_of_faults();
        let config = SessionConfig {
            num_queues: 2,
            read_only: false,
            serial: Serial::new("serial"),
            stats: Arc::clone(&self.stats),
            on_fault,
        };
        let (session, commands) = BlkSession::new(config, Arc::clone(&self.doorbell));
        (self.commands, self.fault) = (commands, fault);
        self.sessions += 1;
        let (reply, added) = answer();
        let add = DiskCommand::AddConsumer(ConsumerId(self.sessions), Box::new(session), reply);
        assert!(self.handle.send(add).is_ok());
        self.turn();
        assert!(added.try_recv().unwrap().is_ok());
        self.ask(|reply| Command::SetCache(CacheMode::WriteBack, reply)).unwrap();
        let memory = self.memory();
        let mut ring = self.ring(&memory);
        let holds = Holds::AnEarlierSession;
        let again = inflight.map(|inflight| inflight.take_over(0, &mut ring, holds).unwrap());
        let rings = Vec::new();
        let set = self.ask(|reply| Command::SetMemory { memory, rings, reply });
        assert!(set.unwrap().is_ok());
        let call = Arc::new(EventFd::from_fd(self.call.as_fd().try_clone_to_owned().unwrap()));
        let live = Box::new(LiveQueue::new(
            ring,
            again.unwrap_or_default(),
            Indirect::Allowed,
            None,
            Some(call),
        ));
        let enabled = Enabled::Yes;
        let started = self.ask(|reply| Command::Start { queue: 0, live, enabled, reply }).unwrap();
        assert!(started.is_ok());
        self.call.drain();
    }

    /// The front end goes; what the disk still has ends unseen.
    fn disconnect(&mut self) {
        self.ask(Command::Abandon).unwrap();
        let (reply, removed) = answer();
        let remove = DiskCommand::RemoveConsumer(ConsumerId(self.sessions), reply);
        assert!(self.handle.send(remove).is_ok());
        self.medium.lock().unwrap().answers = true;
        self.turn();
        assert!(removed.try_recv().unwrap().is_some());
    }

    /// A fresh mapping of the guest's memory.
    fn memory(&self) -> Box<GuestMemory> {
        let region = RegionDescription {
            guest_address: BASE,
            size: MEMORY,
            user_address: BASE,
            file_offset: 0,
        };
        let region = GuestRegion::map(&region, self.file.as_fd()).unwrap();
        Box::new(GuestMemory::new(vec![region]).unwrap())
    }

    fn areas(&self, memory: &GuestMemory) -> RingAreas {
        let addresses = RingAddresses {
            flags: 0,
            descriptors: BASE + TABLE,
            used: BASE + USED,
            available: BASE + AVAILABLE,
            log: 0,
        };
        RingAreas::resolve(memory, self.format, SIZE, &addresses).unwrap()
    }

    /// The ring at its beginning.
    fn ring(&self, memory: &GuestMemory) -> Ring {
        let base = match self.format {
            Format::Split => 0,
            Format::Packed => packed::BASE_WORD,
        };
        Ring::new(self.format, self.areas(memory), SIZE, base, self.events).unwrap()
    }

    fn turn(&mut self) {
        self.now += 1000;
        let cx = Context { now: Nanos(self.now), memory: &self.table };
        let was_rung = self.doorbell.was_rung();
        let needs_no_poll = self.watch.is_still() && !was_rung;
        let work = self.watch.poll(&mut self.disk, &cx);
        assert!(work == Work::Idle || !needs_no_poll, "work came that no watch has shown");
    }

    /// Gives a command and takes a turn; the answer, if it came.
    fn ask<T: Send + 'static>(&mut self, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
        let answer = self.tell(command);
        self.turn();
        answer.try_recv().ok()
    }

    fn tell<T: Send + 'static>(&mut self, command: impl FnOnce(Reply<T>) -> Command) -> Inbox<T> {
        let (reply, inbox) = answer();
        assert!(self.commands.send(command(reply)).is_ok());
        inbox
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        for (at, byte) in (at as usize..).zip(bytes) {
            self.guest.store_u8(at, *byte, Ordering::Relaxed);
        }
    }

    fn get(&self, at: u64, length: usize) -> Vec<u8> {
        (0..length).map(|i| self.guest.load_u8(at as usize + i, Ordering::Relaxed)).collect()
    }

    fn descriptor_at(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &length.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Writes descriptor `index` of the ring's table; `address` counts from the beginning of guest memory.
    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let address = address.wrapping_add(BASE);
        self.descriptor_at(TABLE + 16 * u64::from(index), address, length, flags, next);
    }

    fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 4, &[0; 4]);
        self.put(HEADER + 8, &sector.to_le_bytes());
        self.put(STATUS, &[POISON]);
    }

    /// Makes a head available.
    fn offer(&mut self, head: u16) {
        let slot = AVAILABLE as usize + 4 + 2 * usize::from(self.offered % SIZE);
        self.guest.store_u16(slot, head.to_le(), Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
        let index = AVAILABLE as usize + 2;
        self.guest.store_u16(index, self.offered.to_le(), Ordering::Release);
    }

    /// A request of three descriptors: header, one data buffer, status.
    fn request(&mut self, first: u16, kind: u32, sector: u64, data: u64, length: u32) {
        self.header(kind, sector);
        let direction = if kind == blk_type::IN { WRITE } else { 0 };
        self.descriptor(first, HEADER, 16, NEXT, first + 1);
        self.descriptor(first + 1, data, length, NEXT | direction, first + 2);
        self.descriptor(first + 2, STATUS, 1, WRITE, 0);
        self.offer(first);
    }

    fn used_index(&self) -> u16 {
        u16::from_le(self.guest.load_u16(USED as usize + 2, Ordering::Acquire))
    }

    fn used(&self, index: u16) -> (u32, u32) {
        let at = USED as usize + 4 + 8 * usize::from(index % SIZE);
        let word = |at| u32::from_le(self.guest.load_u32(at, Ordering::Relaxed));
        (word(at), word(at + 4))
    }

    fn status(&self) -> u8 {
        self.get(STATUS, 1)[0]
    }

    fn log(&self) -> Vec<IoKind> {
        self.medium.lock().unwrap().log.iter().map(|io| io.kind).collect()
    }

    fn fault(&self) -> Option<ChainFault> {
        match self.fault.try_recv() {
            Ok(SessionFault::Ring(0, RingFault::BadChain { what, .. })) => Some(what),
            _ => None,
        }
    }
}

#[test]
fn a_write_and_a_read_go_through_and_their_used_lengths_count_the_status() {
    let mut bench = Bench::new();
    bench.put(DATA, &[7; 1024]);
    bench.request(0, blk_type::OUT, 4, DATA, 1024);
    bench.turn();
    assert_eq!((bench.used_index(), bench.used(0), bench.status()), (1, (0, 1), 0));
    bench.request(3, blk_type::IN, 5, DATA + 4096, 512);
    bench.turn();
    assert_eq!((bench.used_index(), bench.used(1), bench.status()), (2, (3, 513), 0));
    assert_eq!(bench.get(DATA + 4096, 512), [7; 512]);
    assert_eq!(bench.stats.requests.get(), 2);
}

#[test]
fn a_guest_that_asks_for_nothing_is_watched_and_not_polled() {
    let mut bench = Bench::new();
    bench.turn();
    bench.turn();
    assert!(bench.watch.is_still());
    bench.request(0, blk_type::OUT, 4, DATA, 512);
    assert!(!bench.watch.is_still());
    bench.turn();
    bench.turn();
    assert_eq!((bench.used_index(), bench.watch.is_still()), (1, true));
}

/// Cuts bytes `at..at + length` into a chain's descriptors after the given lengths.
fn cut(cuts: &[usize], at: u64, length: u32, flags: u16) -> Vec<(u64, u32, u16)> {
    let mut bounds: Vec<u32> = cuts.iter().map(|cut| (*cut as u32) % (length + 1)).collect();
    bounds.extend([0, length]);
    bounds.sort_unstable();
    bounds.windows(2).map(|pair| (at + u64::from(pair[0]), pair[1] - pair[0], flags)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However a driver cuts header, data and status into descriptors, direct or in a table, the request is the same.
    #[test]
    fn framing_does_not_matter(
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
        indirect in any::<bool>(),
        kind in prop_oneof![Just(blk_type::IN), Just(blk_type::OUT)],
    ) {
        let mut bench = Bench::new();
        let pattern: Vec<u8> = (0..1024u32).map(|at| (at % 251) as u8).collect();
        // Header and data stand one behind the other, as do data and status.
        let (out, status) = (DATA, DATA + 0x2000 + 1024);
        bench.put(out, &kind.to_le_bytes());
        bench.put(out + 8, &9u64.to_le_bytes());
        bench.put(status, &[POISON]);
        let mut parts;
        if kind == blk_type::OUT {
            bench.put(out + 16, &pattern);
            parts = cut(&cuts, out, 16 + 1024, 0);
            parts.push((status, 1, WRITE));
        } else {
            bench.medium.lock().unwrap().bytes[9 * 512..9 * 512 + 1024].copy_from_slice(&pattern);
            parts = cut(&cuts[..cuts.len() / 2], out, 16, 0);
            parts.extend(cut(&cuts, status - 1024, 1025, WRITE));
        }
        let table = if indirect { 0x7000 } else { TABLE };
        for (index, (address, length, flags)) in (0u16..).zip(&parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags = if last { *flags } else { flags | NEXT };
            let at = table + 16 * u64::from(index);
            bench.descriptor_at(at, BASE + address, *length, flags, index + 1);
        }
        let head = if indirect { 40 } else { 0 };
        if indirect {
            bench.descriptor(40, table, 16 * parts.len() as u32, INDIRECT, 0);
        }
        bench.offer(head);
        bench.turn();
        prop_assert_eq!(bench.get(status, 1)[0], blk_status::OK);
        if kind == blk_type::OUT {
            prop_assert_eq!(&bench.medium.lock().unwrap().bytes[9 * 512..9 * 512 + 1024], &pattern);
        } else {
            prop_assert_eq!(bench.used(0), (u32::from(head), 1025));
            prop_assert_eq!(bench.get(status - 1024, 1024), pattern);
        }
    }

    /// Whatever a guest writes to its rings and tables, a turn ends, nothing panics, and memory that is not the guest's is not
    /// touched (the region table would refuse, and the disk asserts what it is given).
    #[test]
    fn scribbled_rings_break_nothing_but_themselves(
        descriptors in proptest::collection::vec(descriptor(), 8),
        tables in proptest::collection::vec(descriptor(), 8),
        heads in proptest::collection::vec(0u16..10, 1..100),
        jump in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        kinds in proptest::collection::vec(0u32..16, 20),
        noise in proptest::collection::vec((0x2000u64..0x3100, any::<[u8; 8]>()), 0..4),
    ) {
        let mut bench = Bench::new();
        for (index, (address, length, flags, next)) in (0u64..).zip(descriptors) {
            bench.descriptor_at(TABLE + 16 * index, address, length, flags, next);
        }
        for (index, (address, length, flags, next)) in (0u64..).zip(tables) {
            bench.descriptor_at(0x7000 + 16 * index, address, length, flags, next);
        }
        for (round, kind) in (0u64..).zip(kinds) {
            bench.header(kind, round % 3);
            for head in &heads {
                bench.offer(*head);
            }
            if round == 10 {
                bench.offered = bench.offered.wrapping_add(jump);
                for (at, bytes) in &noise {
                    bench.put(*at, bytes);
                }
            }
            bench.turn();
        }
        let cx = Context { now: Nanos(1), memory: &bench.table };
        let _ = bench.disk.arm(&cx, &mut WaitSet::with_capacity(4));
        bench.disk.disarm(&cx);
    }
}

/// A descriptor whose fields are likely to mean something.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let places = [HEADER, STATUS, DATA, 0x7000, TABLE, USED, MEMORY - 16, MEMORY];
    let address = prop_oneof![
        8 => proptest::sample::select(places.map(|at| BASE + at).to_vec()),
        1 => any::<u64>(),
    ];
    let lengths = vec![0u32, 1, 15, 16, 17, 48, 128, 512, 513, 4096, u32::MAX];
    (address, proptest::sample::select(lengths), 0u16..8, 0u16..10)
}

#[test]
fn a_chain_that_cannot_be_followed_breaks_the_ring() {
    type Chain = fn(&Bench);
    let rows: [(&str, Chain, ChainFault); 12] = [
        ("points to itself", |b| b.descriptor(0, HEADER, 16, NEXT, 0), ChainFault::Loop),
        (
            "a circle of two",
            |b| {
                b.descriptor(0, HEADER, 16, NEXT, 1);
                b.descriptor(1, HEADER, 16, NEXT, 0);
            },
            ChainFault::Loop,
        ),
        ("leaves the table", |b| b.descriptor(0, HEADER, 16, NEXT, SIZE), ChainFault::NextOutside),
        (
            "readable behind writable",
            |b| {
                b.descriptor(0, STATUS, 1, NEXT | WRITE, 1);
                b.descriptor(1, HEADER, 16, 0, 0);
            },
            ChainFault::Order,
        ),
        ("nothing writable", |b| b.descriptor(0, HEADER, 16, 0, 0), ChainFault::NoStatus),
        ("an empty status", |b| b.descriptor(0, STATUS, 0, WRITE, 0), ChainFault::NoStatus),
        ("a wild status", |b| b.descriptor(0, MEMORY, 1, WRITE, 0), ChainFault::NoStatus),
        (
            "a status that wraps",
            |b| b.descriptor_at(TABLE, u64::MAX, 16, WRITE, 0),
            ChainFault::NoStatus,
        ),
        (
            "a table inside a table",
            |b| {
                b.descriptor_at(0x7000, BASE + 0x7100, 16, INDIRECT, 0);
                b.descriptor(0, 0x7000, 16, INDIRECT, 0);
            },
            ChainFault::Indirect,
        ),
        (
            "a table and a successor",
            |b| b.descriptor(0, 0x7000, 16, INDIRECT | NEXT, 1),
            ChainFault::Indirect,
        ),
        (
            "a table of no size, or an odd one",
            |b| b.descriptor(0, 0x7000, 17, INDIRECT, 0),
            ChainFault::Indirect,
        ),
        (
            "a table that ends outside memory",
            |b| b.descriptor(0, MEMORY - 8, 16, INDIRECT, 0),
            ChainFault::Indirect,
        ),
    ];
    for (what, build, fault) in rows {
        let mut bench = Bench::new();
        build(&bench);
        bench.offer(0);
        bench.turn();
        assert_eq!(bench.fault(), Some(fault), "{what}");
        // The ring is left alone from then on.
        bench.request(0, blk_type::FLUSH, 0, DATA, 0);
        bench.turn();
        assert_eq!((bench.used_index(), bench.log()), (0, vec![]), "{what}");
    }
}

#[test]
fn an_index_that_runs_ahead_and_a_head_outside_the_table_break_the_ring() {
    for ahead in [SIZE + 1, 0x8000, u16::MAX] {
        let mut bench = Bench::new();
        bench.offered = ahead - 1;
        bench.offer(0);
        bench.turn();
        let fault = RingFault::IndexJump { index: ahead, next: 0, size: SIZE };
        assert_eq!(bench.fault.try_recv(), Ok(SessionFault::Ring(0, fault)));
    }
    let mut bench = Bench::new();
    bench.offer(SIZE);
    bench.turn();
    let fault = RingFault::BadHead { head: SIZE, size: SIZE };
    assert_eq!(bench.fault.try_recv(), Ok(SessionFault::Ring(0, fault)));
}

#[test]
fn a_bad_request_fails_alone_and_the_ring_goes_on() {
    type Build = fn(&mut Bench);
    let rows: [(&str, Build, u8); 9] = [
        ("a wild buffer", |b| b.request(0, blk_type::OUT, 0, MEMORY, 512), blk_status::IOERR),
        (
            "a buffer that ends outside",
            |b| b.request(0, blk_type::IN, 0, MEMORY - 256, 512),
            blk_status::IOERR,
        ),
        (
            "a buffer that wraps",
            |b| b.request(0, blk_type::IN, 0, 0u64.wrapping_sub(BASE + 256), 512),
            blk_status::IOERR,
        ),
        ("half a sector", |b| b.request(0, blk_type::OUT, 0, DATA, 256), blk_status::IOERR),
        ("beyond the end", |b| b.request(0, blk_type::IN, 512, DATA, 512), blk_status::IOERR),
        (
            "a sector that wraps",
            |b| b.request(0, blk_type::OUT, u64::MAX, DATA, 512),
            blk_status::IOERR,
        ),
        ("an unknown type", |b| b.request(0, 77, 0, DATA, 512), blk_status::UNSUPP),
        (
            "an odd number of range bytes",
            |b| b.request(0, blk_type::DISCARD, 0, DATA, 15),
            blk_status::IOERR,
        ),
        (
            "an unknown range flag",
            |b| {
                b.put(DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
                b.request(0, blk_type::DISCARD, 0, DATA, 16);
            },
            blk_status::UNSUPP,
        ),
    ];
    for (what, build, status) in rows {
        let mut bench = Bench::new();
        build(&mut bench);
        bench.turn();
        assert_eq!((bench.status(), bench.used(0)), (status, (0, 1)), "{what}");
        assert_eq!(bench.log(), [], "{what}");
        bench.request(8, blk_type::IN, 0, DATA, 512);
        bench.turn();
        assert_eq!((bench.status(), bench.used_index()), (blk_status::OK, 2), "{what}");
    }
}

#[test]
fn a_request_of_too_many_pieces_fails_alone() {
    let mut bench = Bench::new();
    bench.header(blk_type::OUT, 0);
    let pieces = 200u16;
    bench.descriptor_at(0x7000, BASE + HEADER, 16, NEXT, 1);
    for piece in 0..pieces {
        let address = BASE + DATA + 1024 * u64::from(piece);
        bench.descriptor_at(0x7010 + 16 * u64::from(piece), address, 512, NEXT, piece + 2);
    }
    let last = 0x7010 + 16 * u64::from(pieces);
    bench.descriptor_at(last, BASE + STATUS, 1, WRITE, 0);
    bench.descriptor(0, 0x7000, 16 * u32::from(pieces + 2), INDIRECT, 0);
    bench.offer(0);
    bench.turn();
    assert_eq!((bench.status(), bench.used_index()), (blk_status::IOERR, 1));
}

#[test]
fn a_request_larger_than_the_disk_takes_is_split_into_whole_blocks() {
    let limits = Limits { max_transfer: 4096 + 512, max_segments: 2, ..LIMITS };
    let mut bench = Bench::with(limits, EventMode::Flags);
    let pattern: Vec<u8> = (0..16384u32).map(|at| (at % 253) as u8).collect();
    bench.header(blk_type::OUT, 1);
    bench.descriptor(0, HEADER, 16, NEXT, 1);
    let mut at = 0;
    for (index, length) in (1u16..).zip([700u32, 3000, 4492, 8192]) {
        let address = DATA + 0x3000 * u64::from(index);
        bench.put(address, &pattern[at..at + length as usize]);
        bench.descriptor(index, address, length, NEXT, index + 1);
        at += length as usize;
    }
    bench.descriptor(5, STATUS, 1, WRITE, 0);
    bench.offer(0);
    bench.turn();
    assert_eq!((bench.status(), bench.used_index()), (blk_status::OK, 1));
    {
        let medium = bench.medium.lock().unwrap();
        assert_eq!(medium.bytes[512..512 + 16384], pattern);
        assert!(medium.log.len() >= 4, "{:?}", medium.log);
    }
    bench.medium.lock().unwrap().fails = Some(IoError::IO);
    bench.header(blk_type::OUT, 1);
    bench.offer(0);
    bench.turn();
    assert_eq!((bench.status(), bench.used_index()), (blk_status::IOERR, 2), "one status for all");
}

#[test]
fn several_ranges_become_as_many_ios() {
    let mut bench = Bench::with(Limits { max_unmap: 1024, ..LIMITS }, EventMode::Flags);
    bench.medium.lock().unwrap().bytes.fill(1);
    let ranges = [(0u64, 1u32, 1u32), (4, 0, 0), (8, 5, 0)];
    for (at, (sector, sectors, flags)) in (0..).zip(ranges) {
        bench.put(DATA + 16 * at, &sector.to_le_bytes());
        bench.put(DATA + 16 * at + 8, &sectors.to_le_bytes());
        bench.put(DATA + 16 * at + 12, &flags.to_le_bytes());
    }
    bench.request(0, blk_type::WRITE_ZEROES, 0, DATA, 48);
    bench.turn();
    assert_eq!((bench.status(), bench.used_index()), (blk_status::OK, 1));
    let medium = bench.medium.lock().unwrap();
    let pieces: Vec<_> =
        medium.log.iter().map(|io| (io.offset / 512, io.length / 512, io.may_unmap)).collect();
    assert_eq!(pieces, [(0, 1, true), (8, 2, false), (10, 2, false), (12, 1, false)]);
}

#[test]
fn a_write_is_durable_before_it_completes_where_the_guest_cannot_flush() {
    let mut bench = Bench::new();
    bench.request(0, blk_type::OUT, 0, DATA, 512);
    bench.turn();
    assert_eq!(bench.log(), [IoKind::Write]);
    bench.ask(|reply| Command::SetCache(CacheMode::WriteThrough, reply)).unwrap();
    bench.request(0, blk_type::OUT, 0, DATA, 512);
    bench.turn();
    assert_eq!(bench.used_index(), 1, "the flush is still to come");
    bench.turn();
    assert_eq!(bench.used_index(), 2);
    assert_eq!(bench.log(), [IoKind::Write, IoKind::Write, IoKind::Flush]);
    bench.request(0, blk_type::IN, 0, DATA, 512);
    bench.turn();
    assert_eq!(bench.log().last(), Some(&IoKind::Read), "reads owe no flush");
}

#[test]
fn stuck_writes_do_not_keep_reads_back() {
    let mut bench = Bench::new();
    bench.medium.lock().unwrap().full = Some(IoKind::Write);
    for first in [0, 3, 6] {
        bench.request(first, blk_type::OUT, 0, DATA, 512);
    }
    bench.request(9, blk_type::IN, 0, DATA, 512);
    // The header is shared: by the time they are read all four are reads, so write the kinds apart.
    for first in [0u16, 3, 6] {
        let at = HEADER + 0x100 + u64::from(first) * 16;
        bench.put(at, &blk_type::OUT.to_le_bytes());
        bench.put(at + 8, &0u64.to_le_bytes());
        bench.descriptor(first, at, 16, NEXT, first + 1);
    }
    bench.turn();
    assert_eq!((bench.used_index(), bench.used(0)), (1, (9, 513)));
    bench.medium.lock().unwrap().full = None;
    bench.turn();
    assert_eq!(bench.used_index(), 4);
    assert_eq!([bench.used(1).0, bench.used(2).0, bench.used(3).0], [0, 3, 6]);
}

#[test]
fn a_disabled_ring_keeps_its_requests() {
    let mut bench = Bench::new();
    let set = |enabled| move |reply| Command::Enable { queue: 0, enabled, reply };
    bench.ask(set(Enabled::No)).unwrap();
    bench.request(0, blk_type::IN, 0, DATA, 512);
    bench.turn();
    assert_eq!((bench.used_index(), bench.status()), (0, POISON));
    bench.ask(set(Enabled::Yes)).unwrap();
    assert_eq!(bench.used_index(), 1);
}

#[test]
fn a_ring_stops_when_its_last_request_has_ended_and_takes_no_more() {
    let mut bench = Bench::new();
    bench.medium.lock().unwrap().answers = false;
    bench.request(0, blk_type::IN, 0, DATA, 512);
    bench.turn();
    let stopped = bench.tell(|reply| Command::Stop { queue: 0, reply });
    bench.request(3, blk_type::IN, 0, DATA, 512);
    bench.turn();
    assert!(matches!(stopped.try_recv(), Err(TryRecvError::Empty)));
    bench.medium.lock().unwrap().answers = true;
    bench.turn();
    let live = stopped.try_recv().unwrap().unwrap();
    assert_eq!((live.base(), bench.used_index()), (1, 1));
    bench.turn();
    assert_eq!(bench.used_index(), 1, "the second request stays for who comes next");
}

#[test]
fn memory_changes_under_requests_in_flight() {
    let mut bench = Bench::new();
    bench.medium.lock().unwrap().answers = false;
    bench.medium.lock().unwrap().bytes.fill(5);
    bench.request(0, blk_type::IN, 0, DATA, 512);
    bench.turn();
    let memory = bench.memory();
    let areas = bench.areas(&memory);
    let changed = bench.tell(|reply| Command::SetMemory { memory, rings: vec![(0, areas)], reply });
    bench.turn();
    assert!(matches!(changed.try_recv(), Err(TryRecvError::Empty)), "the old one is in use");
    assert_eq!(bench.table.len(), 2);
    // A request under the new map, beside the one under the old.
    bench.request(3, blk_type::IN, 0, DATA + 4096, 512);
    bench.turn();
    bench.medium.lock().unwrap().answers = true;
    bench.turn();
    assert!(changed.try_recv().unwrap().is_ok());
    assert_eq!((bench.table.len(), bench.used_index()), (1, 2));
    assert_eq!(bench.get(DATA, 512), [5; 512]);
    assert_eq!(bench.get(DATA + 4096, 512), [5; 512]);
}

#[test]
fn an_abandoned_guest_is_not_touched_any_more() {
    let mut bench = Bench::new();
    bench.medium.lock().unwrap().answers = false;
    bench.request(0, blk_type::OUT, 0, DATA, 512);
    bench.turn();
    assert_eq!(bench.ask(Command::Abandon), Some(1));
    let (reply, removed) = answer();
    let remove = DiskCommand::RemoveConsumer(ConsumerId(bench.sessions), reply);
    assert!(bench.handle.send(remove).is_ok());
    bench.request(3, blk_type::IN, 0, DATA, 512);
    bench.turn();
    assert!(removed.try_recv().is_err(), "the write is still on the disk");
    assert_eq!(bench.table.len(), 1, "and its memory mapped");
    bench.medium.lock().unwrap().answers = true;
    bench.turn();
    assert!(removed.try_recv().unwrap().is_some());
    assert_eq!((bench.used_index(), bench.status(), bench.table.len()), (0, POISON, 0));
}

#[test]
fn interrupts_come_once_a_batch_and_only_where_they_are_wanted() {
    let mut bench = Bench::new();
    for first in [0, 3, 6] {
        bench.request(first, blk_type::IN, 0, DATA, 512);
    }
    bench.turn();
    assert_eq!((bench.used_index(), bench.stats.interrupts.get()), (3, 1));
    assert!(bench.call.drain());
    let no_interrupt = 1u16;
    bench.guest.store_u16(AVAILABLE as usize, no_interrupt.to_le(), Ordering::Relaxed);
    bench.request(0, blk_type::IN, 0, DATA, 512);
    bench.turn();
    assert!(!bench.call.drain());
    // With event indexes: at the entry after the one that was named.
    let mut bench = Bench::with(LIMITS, EventMode::Index);
    let used_event = AVAILABLE as usize + 4 + 2 * usize::from(SIZE);
    bench.guest.store_u16(used_event, 1u16.to_le(), Ordering::Relaxed);
    for (first, interrupted) in [(0, false), (3, true), (6, false)] {
        bench.request(first, blk_type::IN, 0, DATA, 512);
        bench.turn();
        assert_eq!(bench.call.drain(), interrupted, "{first}");
    }
}

#[test]
fn a_turn_takes_a_bounded_number_of_heads() {
    let mut bench = Bench::new();
    for _ in 0..SIZE {
        bench.request(0, 77, 0, DATA, 512);
    }
    // 32 of many; half of the 32 that are left then; of few, all.
    for used in [32, 64, 96, 112, 120, 124, 128] {
        bench.turn();
        assert_eq!(bench.used_index(), used);
    }
}
