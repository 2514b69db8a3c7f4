//! Chains that are looked at together before their turn: each is served in its turn, and as what it is.

use super::*;

/// Where each request has its header and status, its table and its data.
const HEADERS: u64 = 0x2_0000;
const TABLES: u64 = 0x3_0000;
/// Bytes of data.
const LENGTH: u32 = 512;

/// How a request is laid out.
#[derive(Clone, Copy)]
enum Shape {
    /// In the ring's table.
    Direct,
    /// In an indirect table of so many entries, one behind the other.
    InOrder(u16),
    /// The same, from the first to the last and backwards to the second.
    Backwards(u16),
}

impl Bench {
    /// A write of sector `number`, with `number` in each byte, whose head is three times `number`.
    fn writes(&mut self, number: u16, shape: Shape) {
        let (header, at) = (HEADERS + 64 * u64::from(number), u64::from(number));
        let (status, data) = (header + 32, DATA + u64::from(LENGTH) * at);
        self.put(header, &blk_type::OUT.to_le_bytes());
        self.put(header + 8, &at.to_le_bytes());
        self.put(status, &[POISON]);
        self.put(data, &[number as u8; LENGTH as usize]);
        let (head, entries) = match shape {
            Shape::Direct => (3 * number, 3),
            Shape::InOrder(entries) | Shape::Backwards(entries) => (3 * number, entries),
        };
        let pieces = u32::from(entries) - 2;
        let part = |part: u32| match part {
            0 => (header, 16, 0),
            last if last > pieces => (status, 1, WRITE),
            piece => {
                let begin = LENGTH * (piece - 1) / pieces;
                (data + u64::from(begin), LENGTH * piece / pieces - begin, 0)
            }
        };
        let table = TABLES + 256 * at;
        let place = |part: u16| match shape {
            Shape::Direct => head + part,
            Shape::Backwards(entries) if part > 0 => entries - part,
            Shape::InOrder(_) | Shape::Backwards(_) => part,
        };
        for number in 0..entries {
            let (address, length, flags) = part(u32::from(number));
            let more = number + 1 < entries;
            let (flags, next) = if more { (flags | NEXT, place(number + 1)) } else { (flags, 0) };
            let into = if let Shape::Direct = shape { TABLE } else { table };
            let at = into + 16 * u64::from(place(number));
            self.descriptor_at(at, address + BASE, length, flags, next);
        }
        if !matches!(shape, Shape::Direct) {
            self.descriptor(head, table, 16 * u32::from(entries), INDIRECT, 0);
        }
        self.offer(head);
    }

    /// The sectors that were written, in order.
    fn written(&self) -> Vec<u64> {
        self.medium.lock().unwrap().log.iter().map(|io| io.offset / 512).collect()
    }
}

#[test]
fn chains_of_every_shape_are_served_in_their_order() {
    const COUNT: u16 = 40;
    let mut bench = Bench::new();
    let shapes = [
        Shape::InOrder(3),
        Shape::Direct,
        Shape::Backwards(12),
        Shape::InOrder(8),
        Shape::Backwards(3),
        Shape::InOrder(9),
    ];
    for (number, shape) in (0..COUNT).zip(shapes.into_iter().cycle()) {
        bench.writes(number, shape);
    }
    while bench.used_index() < COUNT {
        let before = bench.used_index();
        bench.turn();
        assert!(bench.used_index() > before && bench.fault().is_none());
    }
    assert_eq!(bench.written(), (0..u64::from(COUNT)).collect::<Vec<_>>());
    for number in 0..COUNT {
        assert_eq!(bench.used(number), (u32::from(3 * number), 1));
        assert_eq!(bench.get(HEADERS + 64 * u64::from(number) + 32, 1), [blk_status::OK]);
        let sector = 512 * usize::from(number);
        let written = bench.medium.lock().unwrap().bytes[sector..sector + 512].to_vec();
        assert_eq!(written, [number as u8; 512]);
    }
}

#[test]
fn what_was_looked_at_is_what_is_served() {
    let mut bench = Bench::new();
    for number in 0..3 {
        bench.writes(number, Shape::InOrder(3));
    }
    // Once the first request is with the disk, the guest lets the second one's entry, descriptor and table name the third request.
    let guest = bench.guest.clone();
    bench.medium.lock().unwrap().ambush = Some(Box::new(move || {
        guest.store_u16(AVAILABLE as usize + 4 + 2, 6u16.to_le(), Ordering::Relaxed);
        guest.store_u64(TABLE as usize + 16 * 3, (BASE + TABLES + 512).to_le(), Ordering::Relaxed);
        let header = BASE + HEADERS + 128;
        guest.store_u64(TABLES as usize + 256, header.to_le(), Ordering::Relaxed);
    }));
    bench.turn();
    assert_eq!(bench.written(), [0, 1, 2]);
    assert_eq!([0, 1, 2].map(|at| bench.used(at).0), [0, 3, 6]);
}

#[test]
fn a_ring_breaks_at_the_chain_that_is_bad_and_not_before() {
    const BAD: u16 = 100;
    let bad_head = |bench: &mut Bench| bench.offer(500);
    let bad_table = |bench: &mut Bench| {
        bench.descriptor(BAD, TABLES, 24, INDIRECT, 0);
        bench.offer(BAD);
    };
    let wild_table = |bench: &mut Bench| {
        bench.descriptor(BAD, MEMORY, 48, INDIRECT, 0);
        bench.offer(BAD);
    };
    let bad_chain = RingFault::BadChain { head: BAD, what: ChainFault::Indirect };
    let offers: [fn(&mut Bench); 3] = [bad_head, bad_table, wild_table];
    let faults = [RingFault::BadHead { head: 500, size: SIZE }, bad_chain, bad_chain];
    for (offer_bad, expected) in offers.into_iter().zip(faults) {
        let mut bench = Bench::new();
        for number in 0..3 {
            bench.writes(number, Shape::InOrder(3));
        }
        offer_bad(&mut bench);
        for number in 3..10 {
            bench.writes(number, Shape::InOrder(3));
        }
        for _ in 0..3 {
            bench.turn();
        }
        assert_eq!(bench.written(), [0, 1, 2]);
        assert_eq!(bench.fault.try_recv(), Ok(SessionFault::Ring(0, expected)));
    }
}

#[test]
fn a_ring_that_breaks_leaves_nothing_to_the_next_one() {
    const SECOND: u64 = 0x4000;
    let mut bench = Bench::new();
    let memory = bench.memory();
    let addresses = RingAddresses {
        flags: 0,
        descriptors: BASE + SECOND,
        available: BASE + SECOND + 0x1000,
        used: BASE + SECOND + 0x2000,
        log: 0,
    };
    let areas = RingAreas::resolve(&memory, Format::Split, SIZE, &addresses).unwrap();
    let ring = Ring::new(Format::Split, areas, SIZE, 0, EventMode::Flags).unwrap();
    let live = Box::new(LiveQueue::new(ring, Box::default(), Indirect::Allowed, None, None));
    let enabled = Enabled::Yes;
    let start = |reply| Command::Start { queue: 1, live, enabled, reply };
    assert!(bench.ask(start).unwrap().is_ok());
    // The first ring breaks at the second of ten chains, all of which are looked at.
    bench.writes(0, Shape::InOrder(3));
    bench.offer(500);
    for number in 1..9 {
        bench.writes(number, Shape::InOrder(3));
    }
    // The second has one request, by the head that the first one's next chain has, too.
    let (header, status, table) = (HEADERS + 64 * 20, HEADERS + 64 * 20 + 32, TABLES + 256 * 20);
    bench.put(header, &blk_type::OUT.to_le_bytes());
    bench.put(header + 8, &20u64.to_le_bytes());
    let parts = [(header, 16, NEXT, 1), (DATA, LENGTH, NEXT, 2), (status, 1, WRITE, 0)].into_iter();
    for (at, (address, length, flags, next)) in (0..).zip(parts) {
        bench.descriptor_at(table + 16 * at, address + BASE, length, flags, next);
    }
    bench.descriptor_at(SECOND + 16 * 3, table + BASE, 48, INDIRECT, 0);
    bench.put(SECOND + 0x1000 + 4, &3u16.to_le_bytes());
    bench.put(SECOND + 0x1000 + 2, &1u16.to_le_bytes());
    bench.turn();
    assert!(matches!(bench.fault.try_recv(), Ok(SessionFault::Ring(0, _))));
    assert_eq!(bench.written(), [0, 20]);
    assert_eq!(bench.get(SECOND + 0x2000 + 2, 2), 1u16.to_le_bytes());
}
