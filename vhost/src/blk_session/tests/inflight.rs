//! Sessions that follow one another over the same ring, with what was in flight between them.

use super::*;

/// The memory that a front end keeps.
fn inflight() -> InflightMemory {
    let (description, file) = InflightMemory::make(Format::Split, 2, SIZE).unwrap();
    InflightMemory::map(&description, &file).unwrap()
}

impl Bench {
    /// Reads, each at three descriptors of its own.
    fn reads(&mut self, heads: std::ops::Range<u16>) {
        for head in heads {
            self.request(3 * head, blk_type::IN, u64::from(head), DATA, 512);
        }
    }

    fn stop(&mut self) -> Option<Option<Box<LiveQueue>>> {
        self.ask(|reply| Command::Stop { queue: 0, reply })
    }
}

/// A bench whose first session, over an empty ring, tracks what is in flight.
fn tracked(memory: &InflightMemory) -> Bench {
    let mut bench = Bench::new();
    bench.disconnect();
    bench.connect(Some(memory));
    bench
}

#[test]
fn what_was_in_flight_when_the_front_end_went_is_executed_by_the_next_session_in_order() {
    let memory = inflight();
    let mut bench = tracked(&memory);
    bench.reads(0..2);
    bench.turn();
    assert_eq!(bench.used_index(), 2, "two have been given back");
    bench.medium.lock().unwrap().answers = false;
    for head in [5, 2, 9] {
        bench.request(3 * head, blk_type::IN, u64::from(head), DATA, 512);
    }
    bench.turn();
    assert_eq!(bench.used_index(), 2);
    bench.disconnect();
    assert_eq!(bench.used_index(), 2, "what ends after that ends unseen");

    // One that nobody has seen stays behind those that are owed.
    bench.request(30, blk_type::IN, 10, DATA, 512);
    bench.connect(Some(&memory));
    bench.turn();
    assert_eq!((bench.used_index(), bench.stats.resubmitted.get()), (6, 3));
    let heads: Vec<u32> = (2..6).map(|index| bench.used(index).0).collect();
    assert_eq!(heads, [15, 6, 27, 30]);
    // And nothing is owed to a third.
    bench.disconnect();
    bench.connect(Some(&memory));
    bench.turn();
    assert_eq!((bench.used_index(), bench.stats.resubmitted.get()), (6, 3));
}

#[test]
fn a_ring_that_stops_ends_first_what_an_earlier_session_left_it() {
    let memory = inflight();
    let mut bench = tracked(&memory);
    bench.medium.lock().unwrap().answers = false;
    bench.reads(0..2);
    bench.turn();
    bench.disconnect();
    bench.medium.lock().unwrap().full = Some(IoKind::Read);
    bench.connect(Some(&memory));
    bench.request(30, blk_type::IN, 10, DATA, 512);
    // No room on the disk: nothing has been begun again when the ring is told to stop.
    let stopped = bench.tell(|reply| Command::Stop { queue: 0, reply });
    bench.turn();
    bench.medium.lock().unwrap().full = None;
    bench.turn();
    bench.turn();
    let live = stopped.try_recv().unwrap().unwrap();
    assert_eq!((live.base(), bench.used_index()), (2, 2), "the third was not taken");
}

#[test]
fn a_chain_that_was_broken_since_breaks_the_ring_and_not_its_end() {
    let memory = inflight();
    let mut bench = tracked(&memory);
    bench.medium.lock().unwrap().answers = false;
    bench.reads(0..3);
    bench.turn();
    bench.disconnect();
    bench.descriptor(3, HEADER, 16, NEXT, 999);
    bench.connect(Some(&memory));
    bench.turn();
    assert_eq!(bench.fault(), Some(ChainFault::NextOutside));
    assert_eq!(bench.used_index(), 1, "the one before it was executed");
    assert!(bench.stop().unwrap().is_some());
}

#[test]
fn a_region_that_is_not_for_this_ring_is_refused() {
    let bench = Bench::new();
    let memory = bench.memory();
    let refused = |inflight: &InflightMemory, queue| {
        inflight
            .take_over(queue, &mut bench.ring(&memory), Holds::AnEarlierSession)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&inflight(), 2).contains("no place for queue 2"));
    let (mut short, file) = InflightMemory::make(Format::Split, 2, SIZE / 2).unwrap();
    let small = InflightMemory::map(&short, &file).unwrap();
    assert!(refused(&small, 0).contains("no place for queue 0 of 128 entries"));
    // The bytes are there for fewer entries than are claimed.
    short.queue_size = SIZE;
    let short = InflightMemory::map(&short, &file).unwrap();
    assert!(refused(&short, 1).contains("not in the memory that was shared"));
    let (description, file) = InflightMemory::make(Format::Split, 1, SIZE).unwrap();
    let mapping = Mapping::shared(file.as_fd(), 0, description.mmap_size).unwrap();
    let area = Area::new(&mapping, 0, 64, 8).unwrap();
    for (version, entries, what) in
        [(2, SIZE, "version that is not known"), (1, SIZE / 2, "another number of entries")]
    {
        area.store_u16(8, version, Ordering::Relaxed);
        area.store_u16(10, entries, Ordering::Relaxed);
        let foreign = InflightMemory::map(&description, &file).unwrap();
        assert!(refused(&foreign, 0).contains(what), "{what}");
    }
    for (queues, entries) in [(0, 128), (257, 128), (1, 0), (1, 32769)] {
        assert!(InflightMemory::make(Format::Split, queues, entries).is_err());
    }
}
