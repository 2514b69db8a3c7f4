//! virtio-queue as the oracle of our split rings: two implementations that share no line look at the same bytes.
//!
//! Of every chain that both follow to its end they must see the same buffers, in the same order, with the same writability; of
//! every ring the same heads, the same used entries and the same decisions about notifying. Where they differ ours must be
//! the stricter, by a rule that is named here, and the difference must really be there:
//!
//! * a device-readable buffer behind a writable one (virtio 2.7.4.2);
//! * a chain without a byte for the status (virtio-blk's, not the ring's);
//! * an indirect table with a successor, longer than any request, not wholly in memory, or not negotiated (virtio 2.7.5.3);
//! * NO_INTERRUPT, which virtio-queue does not look at.
//!
//! The one thing that virtio-queue refuses alone, a chain of more than 4 GiB, is a request of wild buffers here.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use resilver_reactor::{Context, Nanos};
use resilver_sys::{BufferSlice, RegionTable};
use resilver_tests::guest_memory::{MemoryFile, descriptor};
use resilver_vhost::chain::{Buffers, Chain, INDIRECT_ENTRIES_MAX, Indirect, Table};
use resilver_vhost::memory::GuestMemory;
use resilver_vhost::message::RingAddresses;
use resilver_vhost::protocol::descriptor_flags::{INDIRECT, NEXT, WRITE};
use resilver_vhost::ring::{
    ChainFault, Descriptors, EventMode, Format, Notify, RingAreas, RingFault,
};
use resilver_vhost::split::SplitRing;
use virtio_queue::{Queue, QueueT};
use vm_memory::mmap::GuestMemoryMmap;
use vm_memory::{FileOffset, GuestAddress};

/// Entries of the ring.
const SIZE: u16 = 16;
/// Guest memory: two regions that adjoin for the guest and lie the other way round in the file, then nothing.
const BASE: u64 = 0x10_0000;
const HALF: u64 = 0x1_0000;
const END: u64 = BASE + 2 * HALF;
/// The ring's parts, all in the first region.
const TABLE: u64 = BASE;
const AVAILABLE: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
/// An indirect table, and buffers.
const INDIRECT_TABLE: u64 = BASE + 0x3000;
const DATA: u64 = BASE + 0x8000;
/// Where `used_event` and `avail_event` are (virtio 2.7.6, 2.7.8).
const USED_EVENT: u64 = AVAILABLE + 4 + 2 * SIZE as u64;
const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

/// One memory, as ours and as virtio-queue's.
struct Memory {
    file: MemoryFile,
    table: RegionTable,
    ours: GuestMemory,
    theirs: GuestMemoryMmap<()>,
}

impl Memory {
    fn new() -> Self {
        let file = MemoryFile::new(2 * HALF);
        let regions = vec![file.region(BASE, HALF, HALF), file.region(BASE + HALF, HALF, 0)];
        let table = RegionTable::with_capacity(2);
        let mut ours = GuestMemory::new(regions).unwrap();
        ours.enter(&table, &GuestMemory::default()).unwrap();
        let half = usize::try_from(HALF).unwrap();
        let theirs = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(BASE), half, Some(FileOffset::new(file.file(), HALF))),
            (GuestAddress(BASE + HALF), half, Some(FileOffset::new(file.file(), 0))),
        ]);
        Self { file, table, ours, theirs: theirs.unwrap() }
    }

    /// Where the byte at a guest address is in the file.
    fn offset(address: u64) -> u64 {
        (address - BASE + HALF) % (2 * HALF)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.file.put(Self::offset(address), bytes);
    }

    fn put_word(&self, address: u64, value: u16) {
        self.file.put_word(Self::offset(address), value);
    }

    fn used_ring(&self) -> Vec<u8> {
        self.file.get(Self::offset(USED), 6 + 8 * usize::from(SIZE))
    }

    /// Makes `head` the `index`th available entry.
    fn offer(&self, index: u16, head: u16) {
        self.put_word(AVAILABLE + 4 + 2 * u64::from(index % SIZE), head);
    }

    fn split_ring(&self, events: EventMode) -> SplitRing {
        let addresses = RingAddresses {
            flags: 0,
            descriptors: TABLE,
            used: USED,
            available: AVAILABLE,
            log: 0,
        };
        let areas = RingAreas::resolve(&self.ours, Format::Split, SIZE, &addresses).unwrap();
        SplitRing::new(areas, SIZE, 0, events)
    }

    fn their_queue(&self, events: EventMode) -> Queue {
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(low(TABLE), None);
        queue.set_avail_ring_address(low(AVAILABLE), None);
        queue.set_used_ring_address(low(USED), None);
        queue.set_event_idx(events == EventMode::Index);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.theirs));
        queue
    }
}

/// A descriptor as a driver writes it: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// A chain as a driver would lay it out, and what it then does wrong.
#[derive(Debug, Clone)]
struct Case {
    parts: Vec<(u64, u32)>,
    /// Parts from here on are device-writable.
    writable_from: usize,
    /// Parts from here on are in an indirect table.
    indirect_from: Option<usize>,
    /// The chain goes through that table backwards, once it has left its first entry.
    backwards: bool,
    /// Entries of the table beyond its chain.
    slack: u32,
    /// Which descriptor of the ring's table comes first, and how far it is from one to the next (odd, so none comes twice).
    first: u16,
    stride: u16,
    indirect: Indirect,
    wrong: Vec<Wrong>,
}

/// Something a driver must not do. Entries of the ring's table, then of the indirect one.
#[derive(Debug, Clone)]
enum Wrong {
    Next(u16, u16),
    Flags(u16, u16),
    Address(u16, u64),
    Length(u16, u32),
}

fn case() -> impl Strategy<Value = Case> {
    let address = prop_oneof![
        4 => DATA..BASE + HALF,
        3 => BASE + HALF - 600..BASE + HALF,
        3 => BASE + HALF..END - 600,
        1 => select(vec![END - 1, END, END + 1, BASE - 1, u64::MAX, 0]),
    ];
    let length = prop_oneof![
        6 => select(vec![0u32, 1, 15, 16, 17, 512, 513]),
        1 => select(vec![65535, 65536, u32::MAX]),
    ];
    let entry = 0..2 * SIZE;
    let flags = vec![0, NEXT, WRITE, NEXT | WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 7];
    let wrong = prop_oneof![
        (entry.clone(), prop_oneof![0..SIZE + 2, Just(u16::MAX)])
            .prop_map(|(at, next)| Wrong::Next(at, next)),
        (entry.clone(), select(flags)).prop_map(|(at, flags)| Wrong::Flags(at, flags)),
        (entry.clone(), select(vec![INDIRECT_TABLE, INDIRECT_TABLE + 4, END - 16, END, u64::MAX]))
            .prop_map(|(at, address)| Wrong::Address(at, address)),
        (entry, select(vec![0u32, 1, 16, 24, 48, 16 * 1024, 16 * 1025, 16 << 16]))
            .prop_map(|(at, length)| Wrong::Length(at, length)),
    ];
    let parts = proptest::collection::vec((address, length), 1..12);
    let layout = (0..SIZE, 0..SIZE / 2, 0u32..4, 0usize..12, proptest::bool::ANY);
    let wrong = prop_oneof![3 => Just(Vec::new()), 4 => proptest::collection::vec(wrong, 1..3)];
    let indirect =
        prop_oneof![Just(None), (0usize..12).prop_map(Some), (0usize..12).prop_map(Some)];
    let allowed = prop_oneof![9 => Just(Indirect::Allowed), 1 => Just(Indirect::Refused)];
    (parts, layout, indirect, allowed, wrong).prop_map(|(parts, layout, from, indirect, wrong)| {
        let (first, stride, slack, writable_from, backwards) = layout;
        let indirect_from = from.filter(|from| *from < parts.len());
        let stride = 2 * stride + 1;
        let writable_from = writable_from % parts.len();
        Case {
            parts,
            writable_from,
            indirect_from,
            backwards,
            slack,
            first,
            stride,
            indirect,
            wrong,
        }
    })
}

impl Case {
    /// Writes the chain; answers the ring's table as it was written, and the chain's head.
    fn lay_out(&self, memory: &Memory) -> (Vec<Raw>, u16) {
        let mut tables = vec![(0, 0, 0, 0); 2 * usize::from(SIZE)];
        let place = |at: usize| (self.first + self.stride * u16::try_from(at).unwrap()) % SIZE;
        let direct = self.indirect_from.unwrap_or(self.parts.len());
        let inside = |at: usize| {
            let end = if self.backwards { self.parts.len() } else { direct };
            if at == direct { 0 } else { end.abs_diff(at) }
        };
        for (at, (address, length)) in self.parts.iter().enumerate() {
            let last = if at + 1 == self.parts.len() { 0 } else { NEXT };
            let write = if at >= self.writable_from { WRITE } else { 0 };
            let (entry, next) = if at < direct {
                (usize::from(place(at)), place(at + 1))
            } else {
                (usize::from(SIZE) + inside(at), u16::try_from(inside(at + 1)).unwrap())
            };
            tables[entry] = (*address, *length, last | write, next);
        }
        if direct < self.parts.len() {
            let entries = u32::try_from(self.parts.len() - direct).unwrap() + self.slack;
            tables[usize::from(place(direct))] = (INDIRECT_TABLE, 16 * entries, INDIRECT, 0);
        }
        for wrong in &self.wrong {
            match *wrong {
                Wrong::Next(at, next) => tables[usize::from(at)].3 = next,
                Wrong::Flags(at, flags) => tables[usize::from(at)].2 = flags,
                Wrong::Address(at, address) => tables[usize::from(at)].0 = address,
                Wrong::Length(at, length) => tables[usize::from(at)].1 = length,
            }
        }
        for (at, raw) in (0..).zip(&tables) {
            let (table, at) = if at < u64::from(SIZE) {
                (TABLE, at)
            } else {
                (INDIRECT_TABLE, at - u64::from(SIZE))
            };
            let (address, length, flags, next) = *raw;
            memory.put(table + 16 * at, &descriptor(address, length, flags, next));
        }
        tables.truncate(usize::from(SIZE));
        (tables, place(0))
    }
}

/// The bytes of a chain: runs of guest addresses, what adjoins joined.
#[derive(Debug, Default, PartialEq, Eq)]
struct Streams {
    readable: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
}

fn append(runs: &mut Vec<(u64, u64)>, address: u64, length: u64) {
    match runs.last_mut() {
        _ if length == 0 => {}
        Some((begin, run)) if begin.checked_add(*run) == Some(address) => *run += length,
        Some(_) | None => runs.push((address, length)),
    }
}

/// What our side makes of the chain at `head`: the same, whether its beginning was fetched ahead of its turn or not.
fn our_walk(
    memory: &Memory,
    head: u16,
    indirect: Indirect,
) -> Result<(Buffers, Streams), ChainFault> {
    let cx = Context { now: Nanos(0), memory: &memory.table };
    let ring = memory.split_ring(EventMode::Flags);
    let mut chain = Chain::default();
    let walked = chain.gather(&cx, &memory.ours, ring.chain(head), indirect);
    let found = walked.map(|_| (chain.buffers(), our_streams(memory, &chain)));
    let (first, mut table) = (ring.chain(head).fetch(), Table::EMPTY);
    if indirect == Indirect::Allowed
        && first.is_some_and(|first| table.enter(&first).is_ok())
        && table.begin(&cx, &memory.ours).is_some()
    {
        let mut ahead = Chain::default();
        let walked = ahead.gather_table(&cx, &memory.ours, &mut table);
        let of_table = walked.map(|()| (ahead.buffers(), our_streams(memory, &ahead)));
        assert_eq!(of_table, found, "fetched ahead");
    }
    found
}

fn our_streams(memory: &Memory, chain: &Chain) -> Streams {
    let first = memory.ours.translate(BASE, 1).unwrap().region;
    let address =
        |slice: &BufferSlice| slice.offset + if slice.region == first { BASE } else { BASE + HALF };
    let mut streams = Streams::default();
    for slice in chain.readable() {
        append(&mut streams.readable, address(slice), u64::from(slice.length));
    }
    for slice in chain.writable().iter().chain([&chain.status()]) {
        append(&mut streams.writable, address(slice), u64::from(slice.length));
    }
    streams
}

/// What virtio-queue makes of it.
#[derive(Debug, Default)]
struct TheirWalk {
    streams: Streams,
    /// It came to a descriptor without a successor. Where it did not, iteration just ends.
    complete: bool,
    readable_behind_writable: bool,
    /// A buffer is not all in guest memory.
    outside: bool,
    last_writable: Option<(u64, u32)>,
}

fn their_walk(memory: &Memory, head: u16) -> TheirWalk {
    memory.offer(0, head);
    memory.put_word(AVAILABLE + 2, 1);
    let mut queue = memory.their_queue(EventMode::Flags);
    let mut walk = TheirWalk::default();
    for descriptor in queue.pop_descriptor_chain(&memory.theirs).unwrap() {
        let (address, length) = (descriptor.addr().0, descriptor.len());
        walk.complete = !descriptor.has_next();
        if length == 0 {
            continue;
        }
        walk.outside |= !is_inside(address, length);
        if descriptor.is_write_only() {
            append(&mut walk.streams.writable, address, u64::from(length));
            walk.last_writable = Some((address, length));
        } else {
            append(&mut walk.streams.readable, address, u64::from(length));
            walk.readable_behind_writable |= walk.last_writable.is_some();
        }
    }
    walk
}

/// Whether a buffer is all in guest memory.
fn is_inside(address: u64, length: u32) -> bool {
    (BASE..END).contains(&address) && u64::from(length) <= END - address
}

/// Whether the chain that virtio-queue followed to its end breaks the rule that ours was refused by.
fn is_broken(fault: ChainFault, case: &Case, ring_table: &[Raw], walk: &TheirWalk) -> bool {
    match fault {
        ChainFault::Order => walk.readable_behind_writable,
        ChainFault::NoStatus => walk.last_writable.is_none_or(|(address, length)| {
            let last = address.checked_add(u64::from(length) - 1);
            !last.is_some_and(|last| is_inside(last, 1))
        }),
        ChainFault::Indirect => ring_table.iter().any(|(address, length, flags, _)| {
            flags & INDIRECT != 0
                && (case.indirect == Indirect::Refused
                    || flags & NEXT != 0
                    || length / 16 > INDIRECT_ENTRIES_MAX
                    || !is_inside(*address, *length))
        }),
        // These end an iteration of virtio-queue too.
        ChainFault::Loop | ChainFault::NextOutside => false,
    }
}

/// How often each outcome came, so that a generator that has become one-sided is noticed.
#[derive(Debug, Default)]
struct Tally {
    alike: Cell<u32>,
    both_refuse: Cell<u32>,
    stricter: [Cell<u32>; 3],
    request_refused: Cell<u32>,
}

fn count(cell: &Cell<u32>) {
    cell.set(cell.get() + 1);
}

fn runner(cases: u32) -> TestRunner {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, rng)
}

#[test]
fn chains_are_walked_as_virtio_queue_walks_them_or_refused_by_a_rule() {
    let (memory, tally) = (Memory::new(), Tally::default());
    let outcome = runner(20_000).run(&case(), |case| {
        let (ring_table, head) = case.lay_out(&memory);
        let walk = their_walk(&memory, head);
        match our_walk(&memory, head, case.indirect) {
            Ok((Buffers::Gathered, streams)) => {
                prop_assert!(walk.complete, "virtio-queue ends early: {walk:?}, ours {streams:?}");
                prop_assert_eq!(&streams, &walk.streams);
                count(&tally.alike);
            }
            Ok((buffers, _)) => {
                let wild = buffers == Buffers::Wild && (walk.outside || !walk.complete);
                prop_assert!(wild, "{buffers:?}: {walk:?}");
                count(&tally.request_refused);
            }
            Err(fault) if walk.complete => {
                let broken = is_broken(fault, &case, &ring_table, &walk);
                prop_assert!(broken, "refused without a reason: {fault}, {walk:?}");
                count(match fault {
                    ChainFault::Order => &tally.stricter[0],
                    ChainFault::NoStatus => &tally.stricter[1],
                    _ => &tally.stricter[2],
                });
            }
            Err(_) => count(&tally.both_refuse),
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    assert!(tally.alike.get() > 5000, "{tally:?}");
    for rare in tally.stricter.iter().chain([&tally.both_refuse, &tally.request_refused]) {
        assert!(rare.get() > 50, "{tally:?}");
    }
}

/// What a driver and a device do with a ring, step by step.
#[derive(Debug, Clone)]
enum Step {
    /// Heads made available.
    Offer(Vec<u16>),
    /// The available index moves by this, whatever is there.
    Jump(u16),
    /// The device takes what there is.
    Take,
    /// The device uses entries (head, bytes written) and decides about an interrupt.
    Use(Vec<(u16, u32)>),
    /// The driver names the used entry it wants to hear of: so far from the used index.
    WantUsed(i16),
    /// The device asks for a kick.
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    let heads = proptest::collection::vec(0..SIZE, 0..5);
    let used = proptest::collection::vec((0..SIZE, any::<u32>()), 0..2 * usize::from(SIZE));
    prop_oneof![
        6 => heads.prop_map(Step::Offer),
        6 => Just(Step::Take),
        6 => used.prop_map(Step::Use),
        6 => (-20i16..20).prop_map(Step::WantUsed),
        3 => Just(Step::Arm),
        1 => prop_oneof![0..2 * SIZE, Just(SIZE), Just(SIZE + 1), any::<u16>()].prop_map(Step::Jump),
    ]
}

/// The two devices, each on a memory of its own that the same driver writes.
struct Pair {
    one: Memory,
    two: Memory,
    ours: SplitRing,
    theirs: Queue,
    available: u16,
    used: u16,
    broken: bool,
}

impl Pair {
    fn new(events: EventMode) -> Self {
        let (one, two) = (Memory::new(), Memory::new());
        let (ours, theirs) = (one.split_ring(events), two.their_queue(events));
        Self { one, two, ours, theirs, available: 0, used: 0, broken: false }
    }

    fn both(&self, address: u64, value: u16) {
        self.one.put_word(address, value);
        self.two.put_word(address, value);
    }

    /// Takes all that is available; the heads must be the same, and so must a refusal.
    fn take(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..=SIZE {
            let valid =
                self.theirs.avail_idx(&self.two.theirs, std::sync::atomic::Ordering::Acquire);
            let ahead = valid.unwrap().0.wrapping_sub(self.theirs.next_avail());
            let theirs = self.theirs.pop_descriptor_chain(&self.two.theirs);
            match self.ours.pop() {
                Ok(ours) => prop_assert_eq!(ours, theirs.map(|chain| chain.head_index())),
                Err(RingFault::IndexJump { .. }) => {
                    prop_assert!(theirs.is_none() && ahead > SIZE, "virtio-queue goes on");
                    self.broken = true;
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            if self.broken || ahead == 0 {
                return Ok(());
            }
        }
        Err(TestCaseError::fail("more heads than the ring has entries"))
    }

    fn take_step(&mut self, step: &Step, events: EventMode) -> Result<(), TestCaseError> {
        match step {
            Step::Offer(heads) => {
                for head in heads {
                    self.one.offer(self.available, *head);
                    self.two.offer(self.available, *head);
                    self.available = self.available.wrapping_add(1);
                }
                self.both(AVAILABLE + 2, self.available);
            }
            Step::Jump(by) => {
                self.available = self.available.wrapping_add(*by);
                self.both(AVAILABLE + 2, self.available);
            }
            Step::Take => self.take()?,
            Step::Use(entries) => {
                for (head, written) in entries {
                    self.ours.push_used(*head, *written);
                    self.theirs.add_used(&self.two.theirs, *head, *written).unwrap();
                    self.used = self.used.wrapping_add(1);
                }
                let ours = self.ours.publish(None) == Notify::Yes;
                let theirs = self.theirs.needs_notification(&self.two.theirs).unwrap();
                // By flags it says yes even where nothing was used.
                let theirs = theirs && !(events == EventMode::Flags && entries.is_empty());
                prop_assert_eq!(ours, theirs);
            }
            Step::WantUsed(distance) => {
                self.both(USED_EVENT, self.used.wrapping_add_signed(*distance));
            }
            Step::Arm => {
                let quiet = self.ours.arm(None);
                let more = self.theirs.enable_notification(&self.two.theirs).unwrap();
                prop_assert_eq!(quiet, !more);
                // Both wrote the same wish: to `avail_event`, or to the flags.
                let at =
                    Memory::offset(if events == EventMode::Index { AVAIL_EVENT } else { USED });
                prop_assert_eq!(self.one.file.word(at), self.two.file.word(at));
                self.ours.disarm(None);
            }
        }
        // What the driver sees of used entries; flags and `avail_event` are only alike while armed.
        let entries = 2..4 + 8 * usize::from(SIZE);
        let (ours, theirs) = (self.one.used_ring(), self.two.used_ring());
        prop_assert_eq!(&ours[entries.clone()], &theirs[entries]);
        prop_assert_eq!(self.ours.next_available(), self.theirs.next_avail());
        Ok(())
    }
}

#[test]
fn heads_used_entries_and_notifications_are_those_of_virtio_queue() {
    let (finished, broken) = (Cell::new(0), Cell::new(0));
    for events in [EventMode::Flags, EventMode::Index] {
        let steps = proptest::collection::vec(step(), 1..60);
        let outcome = runner(1_000).run(&steps, |steps| {
            let mut pair = Pair::new(events);
            for step in &steps {
                pair.take_step(step, events)?;
                if pair.broken {
                    count(&broken);
                    return Ok(());
                }
            }
            count(&finished);
            Ok(())
        });
        if let Err(failure) = outcome {
            panic!("{failure}");
        }
    }
    assert!(finished.get() > 500 && broken.get() > 100, "{finished:?} {broken:?}");
}

/// The indexes wrap after 65536 entries, and `used_event` with them.
#[test]
fn notifications_agree_across_the_wrap_of_the_indexes() {
    let mut pair = Pair::new(EventMode::Index);
    let (mut used, mut round) = (0, 0);
    while used < 2 * 65536 {
        let entries = vec![(0, round); 1 + (round % 15) as usize];
        used += entries.len();
        pair.take_step(&Step::Use(entries), EventMode::Index).unwrap();
        let distance = i16::try_from(round % 41).unwrap() - 20;
        pair.take_step(&Step::WantUsed(distance), EventMode::Index).unwrap();
        round += 1;
    }
}

/// The difference that has no chain: a driver that wants no interrupts is heard by us alone.
#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut pair = Pair::new(EventMode::Flags);
    pair.both(AVAILABLE, 1);
    pair.ours.push_used(0, 1);
    pair.theirs.add_used(&pair.two.theirs, 0, 1).unwrap();
    assert_eq!(pair.ours.publish(None), Notify::No);
    assert!(pair.theirs.needs_notification(&pair.two.theirs).unwrap());
}
