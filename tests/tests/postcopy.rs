//! Guests that arrive by post-copy migration, with the kernel's own userfaultfd: requests in rings whose memory comes page by page,
//! pages that never come, monitors that die, messages in the wrong order.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use resilver_bdev::malloc::Malloc;
use resilver_bdev::{BdevIo, Completion, IoKind, Tag};
use resilver_reactor::ReactorConfig;
use resilver_sys::{OnFault, Userfault};
use resilver_tests::arriving_guest::{Arrival, ArrivingGuest, Monitor, PAGE, Pace, collect};
use resilver_tests::e2e::server::Server;
use resilver_tests::huge_pages::HugePages;
use resilver_tests::raw_guest::{DATA, MEMORY, RawGuest, memory_file};
use resilver_tests::served::{Served, wait_until};
use resilver_tests::sim::ring::SLOTS;
use resilver_tests::sim::rng::Rng;
use resilver_vhost::message::{FdPresence, Message, RegionDescription, Reply, RingAddresses};
use resilver_vhost::protocol::{blk_type, request};
use resilver_vhost::ring::Format;
use serde_json::json;

/// Bytes of a block, and blocks of the disk: one for each slot of each ring, twice.
const BLOCK: u64 = 4 * PAGE;
const BLOCKS: u64 = 4 * SLOTS as u64;

/// Whether this kernel has userfaultfd, said aloud where not.
fn possible(test: &str) -> bool {
    match Userfault::open(OnFault::Wait) {
        Ok(_) => true,
        Err(error) => {
            let remedy = "run it on Linux 5.11 or later, where nothing forbids the system call";
            resilver_tests::skip(test, &format!("no userfaultfd: {error}"), remedy);
            false
        }
    }
}

/// What a block holds.
fn content(block: u64, generation: u64) -> Vec<u8> {
    let mut rng = Rng::new(block << 32 | generation);
    (0..BLOCK / 8).flat_map(|_| rng.draw().to_le_bytes()).collect()
}

/// A guest whose every ring is full of requests, one for each slot, and what it knows of its disk.
struct Load {
    guest: ArrivingGuest,
    queues: usize,
    /// How often each block was written.
    generations: Vec<u64>,
    /// What each slot asks: the block, and whether it writes.
    asked: Vec<(u64, bool)>,
    rng: Rng,
}

impl Load {
    fn new(format: Format, queues: u16, seed: u64) -> Self {
        let slots = usize::from(queues) * SLOTS;
        Self {
            guest: ArrivingGuest::new(format, queues, seed),
            queues: usize::from(queues),
            generations: vec![0; BLOCKS as usize],
            asked: vec![(0, false); slots],
            rng: Rng::new(seed ^ 0x5eed),
        }
    }

    /// Fills the rings. No block is asked for twice.
    fn offer(&mut self) {
        for queue in 0..self.queues {
            for slot in 0..SLOTS {
                let number = queue * SLOTS + slot;
                let block = number as u64 * 2 + self.rng.below(2);
                let known = self.generations[block as usize];
                let writes = known == 0 || self.rng.chance(500);
                self.asked[number] = (block, writes);
                let at = ArrivingGuest::buffer(queue, slot);
                if writes {
                    self.generations[block as usize] += 1;
                    self.guest.put(at, &content(block, known + 1));
                } else {
                    self.guest.put(at, &vec![0xee; BLOCK as usize]);
                }
                let kind = if writes { IoKind::Write } else { IoKind::Read };
                let offset = block * BLOCK;
                let io = BdevIo { tag: Tag(0), kind, may_unmap: false, offset, length: BLOCK };
                self.guest.offer(queue, slot, &io);
            }
        }
    }

    /// Waits until all have ended, and compares what was read.
    fn collect(&mut self, arrival: &Arrival, queues: std::ops::Range<usize>) {
        let (asked, generations) = (&self.asked, &self.generations);
        let judge = |guest: &ArrivingGuest, queue: usize, completion: Completion| {
            completion.result.unwrap();
            let slot = completion.tag.0 as usize;
            let (block, writes) = asked[queue * SLOTS + slot];
            if !writes {
                let found = guest.bytes(ArrivingGuest::buffer(queue, slot), BLOCK as usize);
                let generation = generations[block as usize];
                assert!(found == content(block, generation), "block {block} of {generation}");
            }
        };
        collect(&mut self.guest, arrival, queues, SLOTS, judge);
    }
}

fn served() -> Served {
    Served::new(&Malloc::new("malloc0", 512, BLOCKS * BLOCK / 512).unwrap())
}

fn moves(format: Format, queues: u16) {
    let served = served();
    let mut load = Load::new(format, queues, 7);
    for round in 0..4 {
        load.offer();
        let pace = Pace { most_us: 800, withheld: BTreeSet::new() };
        let arrival = load.guest.arrive(&served.socket(), pace);
        if round % 2 == 0 {
            load.collect(&arrival, 0..usize::from(queues));
            assert!(arrival.faults() > 100, "pages were waited for: {}", arrival.faults());
            arrival.finish();
        } else {
            // The last page has come while requests wait.
            wait_until("the first faults", || arrival.faults() > 20);
            arrival.finish();
            load.collect(&arrival, 0..usize::from(queues));
        }
        load.guest.leave(arrival);
        wait_until("nobody is connected", || served.ask(|it| it.info().sessions.is_empty()));
    }
    let fetched = served.stats().fetched_pages.get();
    assert!(fetched > 250, "{fetched} pages were fetched");
}

#[test]
fn a_guest_with_full_rings_arrives_page_by_page_and_moves_on_split() {
    if possible("a_guest_with_full_rings_arrives_page_by_page_and_moves_on_split") {
        moves(Format::Split, 1);
        moves(Format::Split, 2);
    }
}

#[test]
fn a_guest_with_full_rings_arrives_page_by_page_and_moves_on_packed() {
    if possible("a_guest_with_full_rings_arrives_page_by_page_and_moves_on_packed") {
        moves(Format::Packed, 1);
        moves(Format::Packed, 2);
    }
}

#[test]
fn memory_of_huge_pages_arrives_in_huge_pages() {
    const TEST: &str = "memory_of_huge_pages_arrives_in_huge_pages";
    if !possible(TEST) {
        return;
    }
    // One for each arrival, and those that are given back a moment later.
    let Some(_pages) = HugePages::reserve(TEST, 8) else { return };
    for format in [Format::Split, Format::Packed] {
        let served = served();
        // One ring, one page: a page that is written here is not there all at once, as it would be from a monitor.
        let mut load = Load::new(format, 1, 23);
        load.guest = load.guest.in_huge_pages();
        for arrivals in 1..=2 {
            load.offer();
            let arrival = load.guest.arrive(&served.socket(), Pace::default());
            load.collect(&arrival, 0..1);
            arrival.finish();
            assert_eq!(served.stats().fetched_pages.get(), arrivals);
            load.guest.leave(arrival);
            wait_until("nobody is connected", || served.ask(|it| it.info().sessions.is_empty()));
        }
    }
}

/// The pages of a slot's buffer.
fn pages_of(queue: usize, slot: usize) -> BTreeSet<u64> {
    let first = ArrivingGuest::buffer(queue, slot) / PAGE;
    (first..first + BLOCK / PAGE).collect()
}

/// A target with two disks on one reactor; guests arrive at the first.
fn two_disks() -> Server {
    let mut server = Server::start();
    for name in ["one", "two"] {
        let disk = json!({ "name": name, "num_blocks": BLOCKS * BLOCK / 512, "block_size": 512 });
        server.call("bdev_malloc_create", disk);
        let postcopy = name == "one";
        let controller = json!({ "ctrlr": name, "dev_name": name, "postcopy": postcopy });
        server.call("vhost_create_blk_controller", controller);
    }
    server
}

/// Threads of a process that fetch pages.
fn fetchers(server: &Server) -> usize {
    let tasks = format!("/proc/{}/task", server.process().as_raw_nonzero());
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    let names = std::fs::read_dir(tasks).unwrap().filter_map(|task| name(task.unwrap()).ok());
    names.filter(|name| name.starts_with("fetch-")).count()
}

/// A guest of the second disk, which is served all the while.
fn neighbour(server: &Server) -> RawGuest {
    let guest = RawGuest::connect(&server.controller("two"), memory_file(MEMORY));
    guest.negotiate(0);
    guest.start(0, false);
    guest
}

#[test]
fn a_page_that_does_not_come_keeps_one_ring_and_nobody_else() {
    if !possible("a_page_that_does_not_come_keeps_one_ring_and_nobody_else") {
        return;
    }
    let mut server = two_disks();
    let mut load = Load::new(Format::Split, 2, 11);
    load.offer();
    let stuck = Pace { most_us: 0, withheld: pages_of(0, 3) };
    let arrival = load.guest.arrive(&server.controller("one"), stuck.clone());
    // The ring beside it, the other disk on the same reactor, and the operator go on.
    load.collect(&arrival, 1..2);
    let mut other = neighbour(&server);
    let (begin, mut served) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(1) {
        assert_eq!(other.run(blk_type::OUT, served % 64, DATA, 512), 0);
        served += 1;
    }
    assert!(served > 100, "only {served} requests of the other disk in a second");
    let known = server.call("vhost_get_controllers", json!({ "name": "one" }));
    assert_eq!(known[0]["sessions"][0]["queues"], json!([0, 1]));
    assert!(stuck.withheld.iter().all(|page| !arrival.has(*page)));
    assert_eq!(fetchers(&server), 2);
    // The page comes in the end.
    arrival.set_pace(Pace::default());
    load.collect(&arrival, 0..1);
    arrival.finish();
    wait_until("nobody waits any more", || fetchers(&server) == 0);
    load.guest.leave(arrival);
    let log = server.log();
    assert!(log.contains("all of the guest's memory has come"), "{log}");
    drop(server.stop());
}

#[test]
fn a_ring_stops_while_its_next_request_waits_for_a_page() {
    if !possible("a_ring_stops_while_its_next_request_waits_for_a_page") {
        return;
    }
    let served = served();
    let mut load = Load::new(Format::Packed, 1, 13);
    load.offer();
    let stuck = Pace { most_us: 0, withheld: pages_of(0, 20) };
    let arrival = load.guest.arrive(&served.socket(), stuck.clone());
    wait_until("twenty requests have ended", || served.stats().requests.get() == 20);
    load.guest.leave(arrival);
    // The guest moves on with the others in its ring.
    let arrival = load.guest.arrive(&served.socket(), Pace::default());
    load.collect(&arrival, 0..1);
    assert_eq!(served.stats().requests.get(), SLOTS as u64);
    arrival.finish();
    load.guest.leave(arrival);
}

#[test]
fn a_monitor_that_dies_with_pages_owed_leaves_a_disk_that_is_free_and_holes_that_are_holes() {
    if !possible(
        "a_monitor_that_dies_with_pages_owed_leaves_a_disk_that_is_free_and_holes_that_are_holes",
    ) {
        return;
    }
    let mut server = two_disks();
    for seed in 0..5 {
        let mut load = Load::new(Format::Split, 2, seed);
        load.offer();
        // Of the first ring a buffer, of the second the ring itself: it never starts.
        let mut withheld = pages_of(0, 0);
        withheld.insert(ArrivingGuest::ring(1) / PAGE + seed % 3);
        let stuck = Pace { most_us: 0, withheld };
        let mut arrival = load.guest.arrive(&server.controller("one"), stuck.clone());
        wait_until("they wait", || fetchers(&server) == 2 && arrival.faults() > 3);
        std::thread::sleep(Duration::from_millis(20));
        arrival.kill();
        // The next one is served at once.
        let begin = Instant::now();
        let mut guest = RawGuest::connect(&server.controller("one"), memory_file(MEMORY));
        guest.negotiate(0);
        guest.start(0, false);
        assert_eq!(guest.run(blk_type::FLUSH, 0, DATA, 0), 0);
        assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
        wait_until("nobody waits any more", || fetchers(&server) == 0);
        assert!(stuck.withheld.iter().all(|page| !arrival.has(*page)), "a hole was filled");
        drop(guest);
    }
    // And so it is when the target ends, or its controller.
    let mut load = Load::new(Format::Split, 1, 99);
    load.offer();
    let stuck = Pace { most_us: 0, withheld: pages_of(0, 0) };
    let arrival = load.guest.arrive(&server.controller("one"), stuck.clone());
    wait_until("it waits", || arrival.faults() > 3);
    server.call("vhost_delete_controller", json!({ "ctrlr": "one" }));
    wait_until("nobody waits any more", || fetchers(&server) == 0);
    assert!(stuck.withheld.iter().all(|page| !arrival.has(*page)), "a hole was filled");
    drop(server.stop());
}

#[test]
fn a_monitor_that_connects_again_in_the_middle_is_refused_the_memory_that_lacks_pages() {
    if !possible(
        "a_monitor_that_connects_again_in_the_middle_is_refused_the_memory_that_lacks_pages",
    ) {
        return;
    }
    let served = served();
    let mut load = Load::new(Format::Split, 1, 17);
    load.offer();
    let stuck = Pace { most_us: 0, withheld: pages_of(0, 9) };
    let mut arrival = load.guest.arrive(&served.socket(), stuck.clone());
    wait_until("nine requests have ended", || served.stats().requests.get() == 9);
    arrival.kill();
    let file = arrival.memory();
    let again = monitor(&served.socket(), false);
    let region = RegionDescription { size: 16 * PAGE, ..REGION };
    for message in [Message::SetMemTable(vec![region]), Message::AddMemReg(region)] {
        assert_eq!(again.ask(&message, &[file.as_fd()]), Some(Reply::U64(1)), "{message:?}");
    }
    drop(again);
    assert!(stuck.withheld.iter().all(|page| !arrival.has(*page)), "a hole was filled");
    // Another guest's memory is taken, and that of one that has arrived.
    let arrival = load.guest.arrive(&served.socket(), Pace::default());
    load.collect(&arrival, 0..1);
    arrival.finish();
    let file = arrival.memory();
    load.guest.leave(arrival);
    let again = monitor(&served.socket(), false);
    again.tell(&Message::SetMemTable(vec![region]), &[file.as_fd()]);
}

/// A monitor that has shared nothing, and has been told of what comes if `advised`.
fn monitor(socket: &Path, advised: bool) -> Monitor {
    let monitor = Monitor::connect(socket);
    monitor.negotiate(Format::Split);
    if advised {
        drop(monitor.advise());
    }
    monitor
}

const REGION: RegionDescription =
    RegionDescription { guest_address: 0, size: MEMORY, user_address: 1 << 40, file_offset: 0 };

#[test]
fn messages_in_the_wrong_order_are_refused_and_the_session_goes_on() {
    if !possible("messages_in_the_wrong_order_are_refused_and_the_session_goes_on") {
        return;
    }
    let served = served();
    let (listen, end) = (Message::PostcopyListen, Message::PostcopyEnd);
    let ack = Message::MemoryAck { of: request::NONE, result: 0 };
    let (no, file) = (Some(Reply::U64(1)), memory_file(MEMORY));
    let table = Message::SetMemTable(vec![REGION]);

    let it = monitor(&served.socket(), false);
    for message in [&listen, &end, &ack] {
        assert_eq!(it.ask(message, &[]), no, "{message:?}");
    }
    drop(it.advise());
    it.say(&Message::PostcopyAdvise, 0, &[]);
    let (reply, fd) = it.answer();
    assert_eq!((reply, fd.is_some()), (Some(Reply::Empty), false), "twice");
    assert_eq!(it.ask(&end, &[]), no);
    // Memory that was shared before nobody can be told of any more.
    it.tell(&table, &[file.as_fd()]);
    assert_eq!(it.ask(&listen, &[]), no);
    it.tell(&Message::SetMemTable(vec![]), &[]);
    it.tell(&listen, &[]);
    assert_eq!(it.ask(&listen, &[]), no);
    // Not with memory that has all its pages by nature, and none of it stays.
    let disk = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    disk.set_len(MEMORY).unwrap();
    assert_eq!(it.ask(&table, &[disk.as_fd()]), no);
    assert_eq!(it.ask(&end, &[]), Some(Reply::U64(0)), "nothing is staged");
    it.tell(&table, &[file.as_fd()]);
}

#[test]
fn memory_is_not_used_before_the_monitor_serves_its_faults() {
    if !possible("memory_is_not_used_before_the_monitor_serves_its_faults") {
        return;
    }
    let served = served();
    let it = monitor(&served.socket(), true);
    it.tell(&Message::PostcopyListen, &[]);
    let file = memory_file(MEMORY);
    // Slot by slot, as QEMU does, and one acknowledgement for all.
    for slot in 0..2 {
        let half = MEMORY / 2;
        let region = RegionDescription {
            guest_address: slot * half,
            size: half,
            user_address: (1 << 40) + slot * half,
            file_offset: slot * half,
        };
        it.say(&Message::AddMemReg(region), 0, &[file.as_fd()]);
        let (reply, _) = it.answer();
        let Some(Reply::MemSlot(told)) = reply else { panic!("{reply:?}") };
        assert_ne!(told.user_address, region.user_address);
        assert_eq!(RegionDescription { user_address: region.user_address, ..told }, region);
    }
    let addresses = RingAddresses {
        flags: 0,
        descriptors: 1 << 40,
        available: (1 << 40) + 0x1000,
        used: (1 << 40) + 0x2000,
        log: 0,
    };
    let kick = Message::SetVringKick { index: 0, fd: FdPresence::Absent };
    it.tell(&Message::SetVringNum { index: 0, num: 256 }, &[]);
    it.tell(&Message::SetVringAddr { index: 0, addresses }, &[]);
    assert_eq!(it.ask(&kick, &[]), Some(Reply::U64(1)), "there is no memory yet");
    it.say(&Message::MemoryAck { of: request::ADD_MEM_REG, result: 0 }, 0, &[]);
    // Everything has come, so no fault is to be served.
    rustix::io::pwrite(&file, &vec![0; MEMORY as usize], 0).unwrap();
    it.tell(&kick, &[]);
    let known = served.ask(|controller| controller.info());
    assert_eq!((known.sessions[0].memory_regions, &known.sessions[0].queues[..]), (2, &[0][..]));
    it.tell(&Message::PostcopyEnd, &[]);
    it.tell(&Message::SetVringEnable { index: 0, enable: 1 }, &[]);
}

#[test]
fn it_is_offered_where_the_operator_says_so_and_nowhere_else() {
    if !possible("it_is_offered_where_the_operator_says_so_and_nowhere_else") {
        return;
    }
    let served =
        Served::with(&Malloc::new("malloc0", 512, 64).unwrap(), ReactorConfig::default(), |it| {
            it.postcopy = false;
        });
    let it = monitor(&served.socket(), false);
    it.say(&Message::PostcopyAdvise, 0, &[]);
    let (reply, fd) = it.answer();
    assert_eq!((reply, fd.is_some()), (Some(Reply::Empty), false));
    assert_eq!(it.ask(&Message::GetQueueNum, &[]), Some(Reply::U64(4)), "the session goes on");
}
