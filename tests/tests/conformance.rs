//! The conformance suite: what every bdev module promises, checked on every module.
//!
//! A module joins by a row in [`subjects`]; nothing else. `null` keeps no data, so of it only the bookkeeping is asked. What
//! files alone can do wrong (full, shortened, locked, misaligned) is in `uring_files.rs`.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use resilver_bdev::delay::{Delay, DelayConfig};
use resilver_bdev::error::ErrorBdev;
use resilver_bdev::malloc::Malloc;
use resilver_bdev::null::Null;
use resilver_bdev::passthru::Passthru;
use resilver_bdev::sectors::Sectors;
use resilver_bdev::uring::{Engine, Uring, UringConfig};
use resilver_bdev::{Bdev, Geometry, IoError, IoKind, SEGMENTS_MAX};
use resilver_reactor::Armed;
use resilver_sys::{BufferSlice, Mapping, Ring, RingMode, SubmissionThread, WaitSet};
use resilver_tests::driver::{Driver, pattern};
use resilver_tests::e2e::StorageDaemon;
use resilver_tests::served::Served;
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const MIB: u64 = 1 << 20;
/// Bytes of every subject.
const SIZE: u64 = 4 * MIB;
const BLOCK: u32 = 512;

/// Whether what is written can be read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Medium {
    Keeps,
    Forgets,
}

/// One module to be checked.
struct Subject {
    name: &'static str,
    bdev: Arc<dyn Bdev>,
    medium: Medium,
    /// What must be there for as long as it is used: a directory, a process.
    _holds: Vec<Box<dyn Any>>,
}

impl Subject {
    fn new(name: &'static str, bdev: Arc<dyn Bdev>) -> Self {
        Self { name, bdev, medium: Medium::Keeps, _holds: Vec::new() }
    }

    /// A `uring` bdev on a new file in a directory under `parent`.
    fn file(name: &'static str, parent: &str, direct: bool, mode: RingMode) -> Self {
        Self::file_by(name, parent, direct, mode, Engine::IoUring)
    }

    /// One on tmpfs.
    fn in_memory(name: &'static str, direct: bool, engine: Engine) -> Self {
        Self::file_by(name, "/dev/shm", direct, RingMode::Enter, engine)
    }

    fn file_by(
        name: &'static str,
        parent: &str,
        direct: bool,
        mode: RingMode,
        engine: Engine,
    ) -> Self {
        let directory = tempfile::tempdir_in(parent).unwrap();
        let path = directory.path().join("disk");
        resilver_bdev::uring::create(&path, SIZE).unwrap();
        let config = UringConfig {
            name: name.to_owned(),
            path,
            block_size: (!direct).then_some(BLOCK),
            read_only: false,
            direct,
            mode,
            engine: Some(engine),
        };
        let bdev = Arc::new(Uring::open(config).unwrap());
        Self { name, bdev, medium: Medium::Keeps, _holds: vec![Box::new(directory)] }
    }

    /// A `virtio` bdev on our own back end.
    fn ours() -> Self {
        let served = Served::new(&*malloc());
        let bdev = connect("virtio, ours", &served.socket());
        Self { _holds: vec![Box::new(served)], ..Self::new("virtio, ours", bdev) }
    }

    /// One on QEMU's storage daemon; none, said aloud, where that is not installed.
    fn theirs() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let (file, socket) = (directory.path().join("disk"), directory.path().join("socket"));
        resilver_bdev::uring::create(&file, SIZE).unwrap();
        let daemon = StorageDaemon::serve("conformance", &file, &socket, ",num-queues=4")?;
        let bdev = connect("virtio, theirs", &socket);
        let holds: Vec<Box<dyn Any>> = vec![Box::new(daemon), Box::new(directory)];
        Some(Self { _holds: holds, ..Self::new("virtio, theirs", bdev) })
    }
}

fn connect(name: &str, socket: &Path) -> Arc<dyn Bdev> {
    let config = VirtioConfig {
        name: name.to_owned(),
        socket: socket.to_owned(),
        num_queues: None,
        reconnect_timeout: None,
    };
    Arc::new(Virtio::connect(config).unwrap())
}

fn malloc() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("base", BLOCK, SIZE / u64::from(BLOCK)).unwrap())
}

fn large_blocks() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("large", 4096, SIZE / 4096).unwrap())
}

/// Every module, and `uring` in each way it can be set up.
fn subjects() -> Vec<Subject> {
    let scratch = std::env::temp_dir();
    let scratch = scratch.to_str().unwrap();
    let null = Arc::new(Null::new("null", BLOCK, SIZE / u64::from(BLOCK)).unwrap());
    let latency =
        DelayConfig { avg_read_us: 20, p99_read_us: 90, avg_write_us: 30, p99_write_us: 99 };
    let delay = Arc::new(Delay::new("delay", malloc(), latency).unwrap());
    // One for all tests: each would spin on its core.
    static THREAD: OnceLock<SubmissionThread> = OnceLock::new();
    let thread = THREAD.get_or_init(|| SubmissionThread::start(0).unwrap()).clone();
    let mut subjects = vec![
        Subject { medium: Medium::Forgets, ..Subject::new("null", null) },
        Subject::new("malloc", malloc()),
        Subject::new("passthru", Arc::new(Passthru::new("passthru", malloc()))),
        Subject::new("delay", delay),
        Subject::new("large blocks", Arc::new(Sectors::new(large_blocks(), BLOCK).unwrap())),
        Subject::new("error", Arc::new(ErrorBdev::new("error", malloc()))),
        Subject::file("uring, direct", scratch, true, RingMode::Enter),
        Subject::file("uring, buffered", scratch, false, RingMode::Enter),
        Subject::in_memory("uring, on tmpfs", true, Engine::IoUring),
        Subject::in_memory("uring, on tmpfs by aio", true, Engine::Aio),
        Subject::in_memory("uring, on tmpfs by aio, buffered", false, Engine::Aio),
        Subject::file("uring, sqpoll", scratch, true, RingMode::SubmissionThread(thread)),
        Subject::ours(),
    ];
    if Ring::works_inline() {
        subjects.push(Subject::in_memory("uring, on tmpfs inline", true, Engine::Inline));
    }
    subjects.extend(Subject::theirs());
    subjects
}

/// Those that keep what they are given.
fn media() -> impl Iterator<Item = Subject> {
    subjects().into_iter().filter(|subject| subject.medium == Medium::Keeps)
}

/// A seeded sequence, the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*: any sequence will do that is not regular.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

#[test]
fn the_geometry_is_what_was_asked_for() {
    for subject in subjects() {
        let Geometry { block_size, num_blocks } = subject.bdev.geometry();
        assert_eq!(u64::from(block_size) * num_blocks, SIZE, "{}", subject.name);
        let driver = Driver::new(&*subject.bdev, 4);
        let limits = driver.limits();
        assert_eq!((limits.block_size, limits.num_blocks), (block_size, num_blocks));
        assert!(limits.max_transfer >= block_size && limits.max_segments as usize <= SEGMENTS_MAX);
        assert!(limits.max_transfer.is_multiple_of(block_size), "{}", subject.name);
        assert!(limits.max_unmap >= u64::from(block_size));
        assert!(limits.optimal_io.is_power_of_two());
    }
}

#[test]
fn the_first_and_the_last_block_are_read_back_as_written() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let block = driver.limits().block_size;
        for offset in [0, SIZE - u64::from(block)] {
            let payload = [driver.slice(0, block)];
            driver.fill(&payload, offset + 1);
            assert_eq!(driver.write(offset, &payload), Ok(()), "{}", subject.name);
            driver.clear(&payload);
            assert_eq!(driver.read(offset, &payload), Ok(()), "{}", subject.name);
            assert_eq!(driver.bytes(&payload), pattern(offset + 1, block), "{}", subject.name);
        }
    }
}

#[test]
fn payloads_in_a_pool_that_was_spoken_of_arrive_as_all_others() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        driver.expect_pool(65536);
        for round in 0..2 {
            // Inside, across the end, in several slices, outside.
            let inside = vec![driver.slice(8192, 16384)];
            let across = vec![driver.slice(65536 - 8192, 16384)];
            let several = vec![driver.slice(0, 4096), driver.slice(12288, 12288)];
            let outside = vec![driver.slice(1 << 20, 16384)];
            for (offset, payload) in (0..).step_by(65536).zip([inside, across, several, outside]) {
                driver.fill(&payload, offset + round);
                assert_eq!(driver.write(offset, &payload), Ok(()), "{}", subject.name);
                driver.clear(&payload);
                assert_eq!(driver.read(offset, &payload), Ok(()), "{}", subject.name);
                assert_eq!(driver.bytes(&payload), pattern(offset + round, 16384));
            }
            driver.forget_pool();
        }
    }
}

#[test]
fn what_was_never_written_reads_zero() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let payload = [driver.slice(0, 65536)];
        driver.fill(&payload, 5);
        assert_eq!(driver.read(MIB, &payload), Ok(()));
        assert!(driver.bytes(&payload).iter().all(|byte| *byte == 0), "{}", subject.name);
    }
}

#[test]
fn many_requests_in_flight_end_once_each() {
    const DEPTH: u32 = 64;
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, DEPTH);
        let mut expected = HashSet::new();
        while driver.free(IoKind::Write) > 0 {
            let index = driver.in_flight();
            let payload = [driver.slice(u64::from(index) * 4096, 4096)];
            driver.fill(&payload, u64::from(index));
            expected.insert(driver.submit(IoKind::Write, u64::from(index) * 4096, 4096, &payload));
        }
        assert_eq!((expected.len(), driver.in_flight()), (DEPTH as usize, DEPTH));
        assert_eq!(driver.free(IoKind::Read), DEPTH, "{}: writes took reads' slots", subject.name);
        while driver.free(IoKind::Read) > 0 {
            let at = u64::from(driver.in_flight()) * 4096;
            let payload = [driver.slice(MIB + at, 4096)];
            expected.insert(driver.submit(IoKind::Read, 2 * MIB, 4096, &payload));
        }
        let results = driver.drain();
        assert_eq!(results.len(), 2 * DEPTH as usize, "{}", subject.name);
        assert_eq!(results.keys().copied().collect::<HashSet<_>>(), expected);
        assert!(results.values().all(Result::is_ok), "{}", subject.name);
        assert_eq!((driver.in_flight(), driver.free(IoKind::Write)), (0, DEPTH));
    }
}

#[test]
fn nothing_completes_inside_submit_and_a_small_batch_takes_what_fits() {
    for subject in subjects() {
        let mut driver = Driver::with_batch(&*subject.bdev, 8, 3);
        for index in 0..8 {
            let payload = [driver.slice(index * 4096, 4096)];
            driver.submit(IoKind::Write, index * 4096, 4096, &payload);
        }
        assert_eq!(driver.in_flight(), 8, "{}", subject.name);
        let mut ended = 0;
        while driver.in_flight() > 0 {
            let before = driver.in_flight();
            let handed = driver.turn();
            assert!(handed <= 3 && driver.in_flight() + handed == before, "{}", subject.name);
            ended += handed;
        }
        assert_eq!(ended, 8);
    }
}

#[test]
fn a_payload_of_many_odd_buffers_is_written_and_read_whole() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        // As many slices as it takes, 128 as a rule, of odd lengths at odd addresses that make 64 KiB together.
        let segments = driver.limits().max_segments as usize;
        assert!((SEGMENTS_MAX - 2..=SEGMENTS_MAX).contains(&segments), "{}", subject.name);
        let (mut payload, mut total, mut at) = (Vec::new(), 0, 1);
        for index in 0..segments as u32 {
            let last = index as usize == segments - 1;
            let length = if last { 65536 - total } else { 301 + index * 3 };
            payload.push(driver.slice(at, length));
            total += length;
            at += u64::from(length) + 1 + u64::from(index % 5);
        }
        assert_eq!((payload.len(), total), (segments, 65536));
        driver.fill(&payload, 77);
        assert_eq!(driver.write(65536, &payload), Ok(()), "{}", subject.name);
        driver.clear(&payload);
        assert_eq!(driver.read(65536, &payload), Ok(()), "{}", subject.name);
        assert_eq!(driver.bytes(&payload), pattern(77, 65536), "{}", subject.name);
        let straight = [driver.slice(0, 65536)];
        assert_eq!(driver.read(65536, &straight), Ok(()));
        assert_eq!(driver.bytes(&straight), pattern(77, 65536), "{}", subject.name);
    }
}

#[test]
fn the_largest_transfer_works_from_aligned_and_from_unaligned_memory() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 32);
        let length = driver.limits().max_transfer;
        for at in [0, 17] {
            let payload = [driver.slice(at, length)];
            driver.fill(&payload, 3 + at);
            assert_eq!(driver.write(MIB, &payload), Ok(()), "{}", subject.name);
            driver.clear(&payload);
            assert_eq!(driver.read(MIB, &payload), Ok(()), "{}", subject.name);
            assert!(driver.bytes(&payload) == pattern(3 + at, length), "{}", subject.name);
        }
    }
}

#[test]
fn more_unaligned_requests_than_any_pool_holds_all_end_well() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 64);
        let length = driver.limits().max_transfer.min(1 << 20);
        let payload = [driver.slice(1, length)];
        driver.fill(&payload, 9);
        assert_eq!(driver.write(0, &payload), Ok(()));
        let before = driver.bytes(&payload);
        for _ in 0..64 {
            driver.submit(IoKind::Read, 0, u64::from(length), &payload);
        }
        let results = driver.drain();
        assert_eq!(results.len(), 64);
        assert!(results.values().all(Result::is_ok), "{}", subject.name);
        assert!(driver.bytes(&payload) == before, "{}", subject.name);
    }
}

#[test]
fn random_requests_read_back_what_a_model_says() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 16);
        let block = u64::from(driver.limits().block_size);
        let blocks = SIZE / block;
        let mut model = vec![0u8; SIZE as usize];
        let mut random = Random(0x5eed_0001);
        for round in 0..60 {
            // Each round writes in parts of the disk that do not overlap, all at once, then reads some of it.
            let part = blocks / 16;
            for lane in 0..16 {
                let length = (1 + random.below(16)) * block;
                let offset = (lane * part + random.below(part - 16)) * block;
                let at = lane * 131_072 + random.below(4096);
                let payload = [driver.slice(at, length as u32)];
                let range = offset as usize..(offset + length) as usize;
                match random.below(8) {
                    0 => {
                        let may_unmap = random.below(2) == 0;
                        driver.submit_zeroes(offset, length, may_unmap);
                        model[range].fill(0);
                    }
                    1 => drop(driver.submit(IoKind::Flush, 0, 0, &[])),
                    _ => {
                        let seed = round * 16 + lane;
                        driver.fill(&payload, seed);
                        driver.submit(IoKind::Write, offset, length, &payload);
                        model[range].copy_from_slice(&pattern(seed, length as u32));
                    }
                }
            }
            assert!(driver.drain().values().all(Result::is_ok), "{}", subject.name);
            let length = (1 + random.below(64)) * block;
            let offset = random.below(blocks - 64) * block;
            let payload = [driver.slice(random.below(999), length as u32)];
            assert_eq!(driver.read(offset, &payload), Ok(()));
            let expected = &model[offset as usize..(offset + length) as usize];
            assert!(driver.bytes(&payload) == expected, "{}: round {round}", subject.name);
        }
    }
}

#[test]
fn a_flush_succeeds_alone_and_after_writes() {
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()), "{}", subject.name);
        let payload = [driver.slice(0, 4096)];
        assert_eq!(driver.write(0, &payload), Ok(()));
        assert_eq!(driver.run(IoKind::Flush, 0, 0, &[]), Ok(()), "{}", subject.name);
    }
}

#[test]
fn zeroes_read_zero_and_leave_their_neighbours_alone() {
    for subject in media() {
        for may_unmap in [false, true] {
            let mut driver = Driver::new(&*subject.bdev, 4);
            let block = driver.limits().block_size;
            let payload = [driver.slice(0, 262_144)];
            driver.fill(&payload, 11);
            assert_eq!(driver.write(0, &payload), Ok(()));
            let (offset, length) = (u64::from(block) * 3, u64::from(block) * 17);
            driver.submit_zeroes(offset, length, may_unmap);
            assert!(driver.drain().values().all(Result::is_ok), "{}", subject.name);
            driver.clear(&payload);
            assert_eq!(driver.read(0, &payload), Ok(()));
            let mut expected = pattern(11, 262_144);
            expected[offset as usize..(offset + length) as usize].fill(0);
            assert!(driver.bytes(&payload) == expected, "{}, {may_unmap}", subject.name);
        }
    }
}

#[test]
fn an_unmap_succeeds_and_leaves_its_neighbours_alone() {
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let payload = [driver.slice(0, 131_072)];
        driver.fill(&payload, 12);
        assert_eq!(driver.write(0, &payload), Ok(()));
        assert_eq!(driver.run(IoKind::Unmap, 65536, 4096, &[]), Ok(()), "{}", subject.name);
        if subject.medium == Medium::Keeps {
            driver.clear(&payload);
            assert_eq!(driver.read(0, &payload), Ok(()));
            let (bytes, expected) = (driver.bytes(&payload), pattern(12, 131_072));
            assert!(bytes[..65536] == expected[..65536], "{}", subject.name);
            assert!(bytes[69_632..] == expected[69_632..], "{}", subject.name);
        }
    }
}

#[test]
fn a_second_channel_sees_what_the_first_wrote() {
    for subject in media() {
        let mut one = Driver::new(&*subject.bdev, 4);
        let mut two = Driver::new(&*subject.bdev, 4);
        let payload = [one.slice(0, 8192)];
        one.fill(&payload, 21);
        assert_eq!(one.write(8192, &payload), Ok(()));
        let payload = [two.slice(0, 8192)];
        assert_eq!(two.read(8192, &payload), Ok(()));
        assert_eq!(two.bytes(&payload), pattern(21, 8192), "{}", subject.name);
    }
}

#[test]
fn what_does_not_fit_the_device_is_refused_and_changes_nothing() {
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let good = [driver.slice(0, 4096)];
        driver.fill(&good, 31);
        assert_eq!(driver.write(SIZE - 4096, &good), Ok(()));
        let payload = [driver.slice(65536, 8192)];
        for (offset, length) in [(SIZE - 4096, 8192), (SIZE, 8192), (u64::MAX - 4095, 8192)] {
            let refused = driver.run(IoKind::Write, offset, length, &payload);
            assert_eq!(refused, Err(IoError::INVALID), "{}", subject.name);
        }
        let short = [driver.slice(65536, 512)];
        let refused = driver.run(IoKind::Write, SIZE - 4096, 4096, &short);
        assert_eq!(refused, Err(IoError::INVALID), "{}: payload and length differ", subject.name);
        if subject.medium == Medium::Keeps {
            let back = [driver.slice(65536, 4096)];
            assert_eq!(driver.read(SIZE - 4096, &back), Ok(()));
            assert_eq!(driver.bytes(&back), pattern(31, 4096), "{}", subject.name);
        }
    }
}

#[test]
fn a_buffer_that_is_no_memory_fails_its_own_request_only() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let outside = BufferSlice { offset: u64::MAX - 4095, ..driver.slice(0, 4096) };
        let stale = BufferSlice { offset: 0, length: 4096, ..BufferSlice::EMPTY };
        for bad in [outside, stale] {
            for kind in [IoKind::Read, IoKind::Write] {
                let refused = driver.run(kind, 0, 4096, &[bad]);
                assert_eq!(refused, Err(IoError::FAULT), "{}", subject.name);
            }
        }
        let payload = [driver.slice(0, 4096)];
        assert_eq!(driver.read(0, &payload), Ok(()), "{}", subject.name);
        assert_eq!(driver.leases(), 0, "{}", subject.name);
    }
}

#[test]
fn no_lease_is_left_when_nothing_is_in_flight() {
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, 16);
        let mut results = HashMap::new();
        for index in 0..48u64 {
            if driver.free(IoKind::Read) == 0 {
                results.extend(driver.drain());
            }
            let payload = [driver.slice(index * 8192 + index, 8192)];
            driver.submit(IoKind::Read, index * 8192, 8192, &payload);
        }
        results.extend(driver.drain());
        assert_eq!((results.len(), driver.leases()), (48, 0), "{}", subject.name);
    }
}

#[test]
#[should_panic(expected = "without a free slot")]
fn submitting_without_a_free_slot_is_a_bug_that_shows() {
    let bdev = malloc();
    let mut driver = Driver::new(&*bdev, 1);
    for _ in 0..2 {
        driver.submit(IoKind::Flush, 0, 0, &[]);
    }
}

#[test]
fn memory_that_a_guest_takes_away_costs_only_its_own_request() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 65536).unwrap();
        let guest = Mapping::shared(fd.as_fd(), 0, 65536).unwrap();
        let region = driver.channel().1.memory.insert(Arc::clone(&guest)).unwrap();
        let good = [driver.slice(0, 4096)];
        driver.fill(&good, 41);
        assert_eq!(driver.write(0, &good), Ok(()));
        ftruncate(&fd, 0).unwrap();
        for kind in [IoKind::Write, IoKind::Read] {
            let gone = [BufferSlice { region, length: 4096, offset: 8192 }];
            let result = driver.run(kind, 65536, 4096, &gone);
            // The kernel says so; our own copy goes on with zeroes, and the mapping says so.
            let noticed = result == Err(IoError::FAULT) || (result.is_ok() && guest.poisoned());
            assert!(noticed, "{}: {result:?}", subject.name);
        }
        assert_eq!(driver.read(0, &good), Ok(()), "{}", subject.name);
        assert_eq!(driver.bytes(&good), pattern(41, 4096), "{}", subject.name);
    }
}

#[test]
fn an_idle_channel_lets_its_reactor_sleep_and_a_fresh_request_does_not() {
    for subject in subjects() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        let mut set = WaitSet::with_capacity(4);
        let mut arm = |driver: &mut Driver| {
            let (channel, cx) = driver.channel();
            let armed = channel.arm(&cx, &mut set);
            channel.disarm(&cx);
            armed
        };
        assert_eq!(arm(&mut driver), Armed::Until(None), "{}", subject.name);
        let payload = [driver.slice(0, 4096)];
        driver.submit(IoKind::Write, 0, 4096, &payload);
        assert_eq!(arm(&mut driver), Armed::Ready, "{}", subject.name);
        assert!(driver.drain().values().all(Result::is_ok), "{}", subject.name);
        assert_eq!(arm(&mut driver), Armed::Until(None), "{}", subject.name);
    }
}

#[test]
fn a_channel_that_moves_out_leaves_no_region_and_works_where_it_moves_in() {
    for subject in media() {
        let mut driver = Driver::new(&*subject.bdev, 4);
        // Unaligned, so that a bounce pool is in use where there is one.
        let payload = [driver.slice(3, 4096)];
        driver.fill(&payload, 51);
        assert_eq!(driver.write(0, &payload), Ok(()), "{}", subject.name);
        let (channel, cx) = driver.channel();
        channel.detach(&cx);
        assert_eq!(cx.memory.len(), 1, "{}: the payloads' region only", subject.name);
        channel.attach(&cx);
        driver.clear(&payload);
        assert_eq!(driver.read(0, &payload), Ok(()), "{}", subject.name);
        assert_eq!(driver.bytes(&payload), pattern(51, 4096), "{}", subject.name);
    }
}
