//! Packed rings: a driver that writes its descriptors byte by byte (virtio 2.8), beside what the split ring's tests show of
//! requests.

use super::*;

/// Both positions at the beginning, in the first lap: what SET_VRING_BASE says of a fresh ring.
pub(super) const BASE_WORD: u32 = 0x8000_8000;
const AVAIL: u16 = descriptor_flags::AVAIL;
const USED_FLAG: u16 = descriptor_flags::USED;
/// The driver's event area and the device's.
const DRIVER: u64 = AVAILABLE;
const DEVICE: u64 = USED;

/// A part of a request: address from the beginning of guest memory, length, flags.
type Part = (u64, u32, u16);

/// The driver's side.
struct Driver {
    bench: Bench,
    next: u16,
    wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Descriptors of each buffer id.
    entries: Vec<u16>,
}

impl Driver {
    fn new(events: EventMode) -> Self {
        Self::with(Bench::of(Format::Packed, LIMITS, events))
    }

    fn with(bench: Bench) -> Self {
        let entries = vec![0; usize::from(SIZE)];
        Self { bench, next: 0, wrap: true, used: 0, used_wrap: true, entries }
    }

    fn write(&self, index: u16, part: Part, id: u16, flags: u16) {
        let at = 16 * u64::from(index);
        let address = part.0.wrapping_add(BASE);
        self.bench.descriptor_at(at, address, part.1, id, flags);
    }

    /// Makes a chain available under `id`: the flags of its first descriptor last.
    fn offer(&mut self, id: u16, parts: &[Part]) {
        let (first, first_wrap) = (self.next, self.wrap);
        let owner = |wrap: bool| if wrap { AVAIL } else { USED_FLAG };
        for (place, part) in parts.iter().enumerate() {
            let more = if place + 1 < parts.len() { NEXT } else { 0 };
            // The first is made available when all is there.
            let whose = if place == 0 { owner(!self.wrap) } else { owner(self.wrap) };
            self.write(self.next, *part, id, part.2 | more | whose);
            self.next += 1;
            if self.next == SIZE {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
        let more = if parts.len() > 1 { NEXT } else { 0 };
        let flags = parts[0].2 | more | owner(first_wrap);
        let at = 16 * usize::from(first) + 14;
        self.bench.guest.store_u16(at, flags.to_le(), Ordering::Release);
        self.entries[usize::from(id)] = parts.len() as u16;
    }

    /// The three parts of a request.
    fn request(&mut self, id: u16, kind: u32, sector: u64, data: u64, length: u32) {
        self.bench.header(kind, sector);
        let direction = if kind == blk_type::IN { WRITE } else { 0 };
        self.offer(id, &[(HEADER, 16, 0), (data, length, direction), (STATUS, 1, WRITE)]);
    }

    fn flags(&self, index: u16) -> u16 {
        u16::from_le(self.bench.guest.load_u16(16 * usize::from(index) + 14, Ordering::Acquire))
    }

    /// The next chain that came back: its id and what was written.
    fn pop(&mut self) -> Option<(u16, u32)> {
        let flags = self.flags(self.used);
        let (avail, used) = (flags & AVAIL != 0, flags & USED_FLAG != 0);
        if avail != self.used_wrap || used != self.used_wrap {
            return None;
        }
        let at = 16 * usize::from(self.used);
        let id = u16::from_le(self.bench.guest.load_u16(at + 12, Ordering::Relaxed));
        let written = u32::from_le(self.bench.guest.load_u32(at + 8, Ordering::Relaxed));
        self.used += self.entries[usize::from(id)];
        if self.used >= SIZE {
            (self.used, self.used_wrap) = (self.used - SIZE, !self.used_wrap);
        }
        Some((id, written))
    }

    fn ids(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.pop()).map(|(id, _)| id).collect()
    }

    fn event(&self, at: u64, offset: u16, flags: u16) {
        self.bench.put(at, &offset.to_le_bytes());
        self.bench.put(at + 2, &flags.to_le_bytes());
    }

    fn fault(&self) -> Option<RingFault> {
        match self.bench.fault.try_recv() {
            Ok(SessionFault::Ring(_, fault)) => Some(fault),
            _ => None,
        }
    }
}

#[test]
fn a_guest_that_asks_for_nothing_is_watched_and_not_polled() {
    let mut driver = Driver::new(EventMode::Flags);
    // Three laps.
    for round in 0..SIZE {
        driver.bench.turn();
        driver.bench.turn();
        assert!(driver.bench.watch.is_still(), "{round}");
        driver.request(1, blk_type::OUT, 3, DATA, 512);
        assert!(!driver.bench.watch.is_still(), "{round}");
        driver.bench.turn();
        assert_eq!(driver.pop(), Some((1, 1)), "{round}");
    }
}

#[test]
fn what_is_written_is_read_back_over_many_laps() {
    let mut driver = Driver::new(EventMode::Flags);
    for round in 0..200u16 {
        let bytes = [round as u8; 512];
        driver.bench.put(DATA, &bytes);
        driver.request(round % 7, blk_type::OUT, 3, DATA, 512);
        driver.bench.turn();
        assert_eq!(driver.pop(), Some((round % 7, 1)), "{round}");
        driver.bench.put(DATA, &[0; 512]);
        driver.request(9, blk_type::IN, 3, DATA, 512);
        driver.bench.turn();
        assert_eq!((driver.pop(), driver.bench.status()), (Some((9, 513)), blk_status::OK));
        assert_eq!(driver.bench.get(DATA, 512), bytes);
    }
    assert_eq!(driver.pop(), None);
}

#[test]
fn a_batch_of_chains_of_many_lengths_comes_back_whole_and_in_any_order() {
    let mut driver = Driver::new(EventMode::Flags);
    for round in 0..40 {
        driver.bench.medium.lock().unwrap().answers = false;
        for id in 0..10u16 {
            driver.bench.header(blk_type::IN, 0);
            let mut parts = vec![(HEADER, 16, 0)];
            parts.extend(
                (0..1 + (id + round) % 5).map(|at| (DATA + 512 * u64::from(at), 512, WRITE)),
            );
            parts.push((STATUS, 1, WRITE));
            driver.offer(id, &parts);
        }
        driver.bench.turn();
        driver.bench.turn();
        assert_eq!(driver.pop(), None);
        driver.bench.medium.lock().unwrap().answers = true;
        driver.bench.turn();
        driver.bench.turn();
        let mut ids = driver.ids();
        ids.sort_unstable();
        assert_eq!(ids, (0..10).collect::<Vec<_>>(), "round {round}");
    }
}

#[test]
fn an_indirect_table_is_all_of_its_descriptors_whatever_their_flags_say() {
    let mut driver = Driver::new(EventMode::Flags);
    let table = 0x2_0000;
    driver.bench.medium.lock().unwrap().bytes.fill(7);
    driver.bench.header(blk_type::IN, 0);
    let parts: [Part; 3] = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    for (index, part) in (0..).zip(parts) {
        // No NEXT; ids and the flags of availability are reserved in a table (virtio 2.8.7).
        let flags = part.2 | if index == 1 { AVAIL } else { 0 };
        driver.bench.descriptor_at(table + 16 * index, part.0 + BASE, part.1, 77, flags);
    }
    driver.offer(5, &[(table, 48, INDIRECT)]);
    driver.bench.turn();
    assert_eq!((driver.pop(), driver.bench.status()), (Some((5, 513)), blk_status::OK));
    assert_eq!(driver.bench.get(DATA, 512), [7; 512]);
    for (length, flags) in [(40, INDIRECT), (0, INDIRECT), (48, INDIRECT | NEXT)] {
        let mut driver = Driver::new(EventMode::Flags);
        driver.offer(5, &[(table, length, flags)]);
        driver.bench.turn();
        let what = ChainFault::Indirect;
        assert_eq!(driver.fault(), Some(RingFault::BadChain { head: 0, what }), "{length} {flags}");
    }
}

#[test]
fn hostile_descriptors_break_the_ring_and_nothing_else() {
    // A chain without an end.
    let mut driver = Driver::new(EventMode::Flags);
    for index in 0..SIZE {
        driver.write(index, (DATA, 1, WRITE), 1, WRITE | NEXT | AVAIL);
    }
    driver.bench.turn();
    let what = ChainFault::Loop;
    assert_eq!(driver.fault(), Some(RingFault::BadChain { head: 0, what }));
    // All is available, again and again, and nothing comes back: descriptors in use are made available.
    let mut driver = Driver::new(EventMode::Flags);
    driver.bench.medium.lock().unwrap().answers = false;
    for id in 0..40 {
        driver.request(id, blk_type::IN, 0, DATA, 512);
    }
    for _ in 0..3 {
        driver.bench.turn();
    }
    // Two that are left, and one over the beginning of the ring.
    driver.request(41, blk_type::IN, 0, DATA, 512);
    driver.request(42, blk_type::IN, 0, DATA, 512);
    driver.request(43, blk_type::IN, 0, DATA, 512);
    driver.bench.turn();
    let overrun = RingFault::Overrun { at: 126, entries: 3, size: SIZE };
    assert_eq!(driver.fault(), Some(overrun));
    // A buffer outside of guest memory is that request's fault alone.
    let mut driver = Driver::new(EventMode::Flags);
    driver.request(1, blk_type::IN, 0, MEMORY + 4096, 512);
    driver.bench.turn();
    assert_eq!((driver.pop(), driver.bench.status()), (Some((1, 1)), blk_status::IOERR));
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let mut driver = Driver::new(EventMode::Flags);
    for (flags, interrupted) in [(0, true), (1, false), (3, true)] {
        driver.event(DRIVER, 0, flags);
        driver.request(0, blk_type::IN, 0, DATA, 512);
        driver.bench.turn();
        assert!(driver.pop().is_some());
        assert_eq!(driver.bench.call.drain(), interrupted, "{flags}");
    }
    // At a descriptor, over laps: exactly when the chain that begins there, or ends behind it, comes back.
    let mut driver = Driver::new(EventMode::Index);
    let mut at = 0u16;
    let mut wrap = true;
    for round in 0..300u16 {
        let ahead = round % 5;
        let (mut event, mut event_wrap) = (at + ahead, wrap);
        if event >= SIZE {
            (event, event_wrap) = (event - SIZE, !wrap);
        }
        driver.event(DRIVER, event | u16::from(event_wrap) << 15, 2);
        driver.request(0, blk_type::IN, 0, DATA, 512);
        driver.bench.turn();
        assert!(driver.pop().is_some());
        assert_eq!(driver.bench.call.drain(), ahead < 3, "round {round}, {ahead} ahead");
        at += 3;
        if at >= SIZE {
            (at, wrap) = (at - SIZE, !wrap);
        }
    }
}

#[test]
fn kicks_are_asked_for_in_the_devices_event_area() {
    for (events, wanted) in [(EventMode::Flags, (0, 0)), (EventMode::Index, (3 | 0x8000, 2))] {
        let mut driver = Driver::new(events);
        driver.request(0, blk_type::IN, 0, DATA, 512);
        driver.bench.turn();
        let memory = driver.bench.memory();
        let mut ring = driver.bench.ring(&memory);
        let Ring::Packed(packed) = &mut ring else { panic!("a packed ring") };
        packed.resume_at(crate::packed::Position { index: 0, wrap: true }, 3);
        let area = |driver: &Driver| {
            let word = |at| u16::from_le(driver.bench.guest.load_u16(at, Ordering::Relaxed));
            (word(DEVICE as usize), word(DEVICE as usize + 2))
        };
        assert!(ring.arm(None));
        assert_eq!(area(&driver), wanted);
        driver.request(1, blk_type::IN, 0, DATA, 512);
        assert!(!ring.arm(None), "there is a request already");
        ring.disarm(None);
        assert_eq!(area(&driver).1, 1);
    }
}

#[test]
fn a_ring_that_stops_says_where_it_stands_both_ways_and_goes_on_there() {
    let mut driver = Driver::new(EventMode::Flags);
    for round in 0..50 {
        driver.request(round, blk_type::IN, 0, DATA, 512);
        driver.bench.turn();
        assert_eq!(driver.ids(), [round]);
    }
    let stopped = driver.bench.tell(|reply| Command::Stop { queue: 0, reply });
    driver.bench.turn();
    let live = stopped.try_recv().unwrap().unwrap();
    // 150 descriptors: 22 into the second lap.
    assert_eq!(live.base(), 22 | 22 << 16);
    let memory = driver.bench.memory();
    let areas = driver.bench.areas(&memory);
    let ring =
        Ring::new(Format::Packed, areas.clone(), SIZE, live.base(), EventMode::Flags).unwrap();
    let (again, enabled) = (Box::default(), Enabled::Yes);
    let live = Box::new(LiveQueue::new(ring, again, Indirect::Allowed, None, None));
    let start = |reply| Command::Start { queue: 0, live, enabled, reply };
    assert!(driver.bench.ask(start).unwrap().is_ok());
    driver.request(7, blk_type::IN, 0, DATA, 512);
    driver.bench.turn();
    assert_eq!(driver.ids(), [7]);
    for base in [128, 128 << 16, 0x7fff] {
        let refused = Ring::new(Format::Packed, areas.clone(), SIZE, base, EventMode::Flags);
        assert!(refused.is_err(), "{base:#x}");
    }
}

mod inflight {
    use super::*;

    fn memory() -> InflightMemory {
        let (description, file) = InflightMemory::make(Format::Packed, 2, SIZE).unwrap();
        InflightMemory::map(&description, &file).unwrap()
    }

    fn tracked(memory: &InflightMemory) -> Driver {
        let mut driver = Driver::new(EventMode::Flags);
        driver.bench.disconnect();
        driver.bench.connect(Some(memory));
        driver
    }

    #[test]
    fn what_was_in_flight_is_executed_again_from_the_copies_of_its_descriptors() {
        let memory = memory();
        let mut driver = tracked(&memory);
        // Far enough that the second session begins in another lap.
        for round in 0..50 {
            driver.request(round, blk_type::IN, 0, DATA, 512);
            driver.bench.turn();
            assert_eq!(driver.ids(), [round]);
        }
        driver.bench.medium.lock().unwrap().answers = false;
        for id in [5, 2, 9] {
            driver.request(id, blk_type::IN, 0, DATA, 512);
        }
        driver.bench.turn();
        driver.bench.disconnect();
        assert_eq!(driver.pop(), None);
        // As if something that came back before them had overwritten their first descriptors, but for whose they are.
        for at in 22..31 {
            let flags = driver.flags(at) & (AVAIL | USED_FLAG);
            driver.write(at, (u64::MAX, 0, 0), 0xffff, flags);
        }
        driver.request(30, blk_type::IN, 0, DATA, 512);
        driver.bench.connect(Some(&memory));
        driver.bench.turn();
        assert_eq!(driver.bench.stats.resubmitted.get(), 3);
        assert_eq!(driver.ids(), [5, 2, 9, 30]);
        driver.bench.disconnect();
        driver.bench.connect(Some(&memory));
        driver.bench.turn();
        assert_eq!((driver.pop(), driver.bench.stats.resubmitted.get()), (None, 3));
        driver.request(1, blk_type::IN, 0, DATA, 512);
        driver.bench.turn();
        assert_eq!(driver.ids(), [1]);
    }
}
