//! Small sectors over large blocks, on real devices and slow ones: no update is lost where requests meet in a block, whatever
//! overtakes what, and what hangs below stays with those it concerns. What every bdev promises is in `conformance.rs`.

use std::sync::Arc;

use resilver_bdev::delay::{Delay, DelayConfig};
use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::sectors::Sectors;
use resilver_bdev::uring::{Uring, UringConfig};
use resilver_bdev::{Bdev, Detail, IoKind};
use resilver_sys::RingMode;
use resilver_tests::driver::{Driver, pattern};
use resilver_tests::mounts::{self, LoopDevice};

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
const SIZE: u64 = 1 << 20;

fn large() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("disk", BLOCK as u32, SIZE / BLOCK).unwrap())
}

/// A disk of large blocks that can be made to fail, and the view of it.
fn fragile() -> (Arc<ErrorBdev>, Sectors) {
    let base = Arc::new(ErrorBdev::new("disk", large()));
    let view = Sectors::new(Arc::clone(&base) as Arc<dyn Bdev>, SECTOR as u32).unwrap();
    (base, view)
}

fn inject(base: &ErrorBdev, kind: IoKind, effect: Effect, count: u64, block: u64) {
    let range = Some((block * BLOCK, BLOCK));
    base.inject(Injection { kind: Some(kind), effect, count, range }).unwrap();
}

/// A seeded sequence, the same every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// Writes and zeroes runs of sectors that meet in blocks and never overlap, many at once and in any order, over a disk on
/// which they overtake one another; and compares all of the disk with what was written.
fn neighbours_in_a_block_keep_their_updates(base: Arc<dyn Bdev>, rounds: u64) {
    const SPAN: u64 = 48 * SECTOR;
    let latency =
        DelayConfig { avg_read_us: 3, p99_read_us: 40, avg_write_us: 7, p99_write_us: 90 };
    let slow = Arc::new(Delay::new("slow", base, latency).unwrap());
    let view = Sectors::at_most(slow, SECTOR as u32).unwrap();
    let mut driver = Driver::new(&*view, 64);
    let mut model = vec![0; SPAN as usize];
    let mut random = Random(7);
    for round in 0..rounds {
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < SPAN {
            let longest = [1, 3, 20][random.below(3) as usize];
            let length = ((1 + random.below(longest)) * SECTOR).min(SPAN - at);
            runs.insert(random.below(runs.len() as u64 + 1) as usize, (at, length));
            at += length;
        }
        for (offset, length) in runs {
            let seed = round * SPAN + offset;
            let bytes = offset as usize..(offset + length) as usize;
            if random.below(4) == 0 {
                driver.submit_zeroes(offset, length, random.below(2) == 0);
                model[bytes].fill(0);
            } else {
                let payload = [driver.slice(offset, length as u32)];
                driver.fill(&payload, seed);
                driver.submit(IoKind::Write, offset, length, &payload);
                model[bytes].copy_from_slice(&pattern(seed, length as u32));
            }
            for _ in 0..random.below(3) {
                driver.turn();
            }
        }
        assert!(driver.drain().values().all(Result::is_ok));
        let all = [driver.slice(1 << 20, SPAN as u32)];
        assert_eq!(driver.read(0, &all), Ok(()));
        assert!(driver.bytes(&all) == model, "an update was lost in round {round}");
    }
}

#[test]
fn neighbours_in_a_block_keep_their_updates_whatever_overtakes_what() {
    neighbours_in_a_block_keep_their_updates(large(), 300);
}

#[test]
fn a_device_of_large_sectors_serves_small_ones() {
    if !mounts::available("a_device_of_large_sectors_serves_small_ones") {
        return;
    }
    let device = LoopDevice::new(SIZE, BLOCK as u32);
    let config = |block_size| UringConfig {
        name: "disk".to_owned(),
        path: device.path().to_owned(),
        block_size,
        read_only: false,
        direct: true,
        mode: RingMode::Enter,
        engine: None,
    };
    let view = Uring::open_in_sectors(config(Some(512))).unwrap();
    assert_eq!((view.geometry().block_size, view.geometry().size()), (512, SIZE));
    assert!(view.details().contains(&("physical_block_size", Detail::Number(BLOCK))));
    neighbours_in_a_block_keep_their_updates(view, 20);

    for (asked, gets) in [(None, 4096), (Some(4096), 4096), (Some(8192), 8192)] {
        let bdev = Uring::open_in_sectors(config(asked)).unwrap();
        assert_eq!(bdev.geometry().block_size, gets, "{asked:?}");
    }
    for nonsense in [256, 1000] {
        let error = Uring::open_in_sectors(config(Some(nonsense))).err().unwrap().to_string();
        assert!(error.contains("a power of two from 512"), "{error}");
    }
}

#[test]
fn a_hung_block_holds_up_those_that_meet_it_there_and_no_reads() {
    let (base, view) = fragile();
    let mut driver = Driver::new(&view, 8);
    let sector = [driver.slice(0, 512)];
    inject(&base, IoKind::Write, Effect::Stall, FOREVER, 3);
    // The first hangs in its write, the others wait for it before they have read anything.
    let meeting: Vec<_> =
        (0..7).map(|at| driver.submit(IoKind::Write, 3 * BLOCK + at * 512, 512, &sector)).collect();
    let elsewhere = driver.submit(IoKind::Write, 5 * BLOCK + 512, 512, &sector);
    for _ in 0..50 {
        driver.turn();
    }
    let results = driver.take_results();
    assert_eq!((results.len(), results[&elsewhere]), (1, Ok(())), "{results:?}");
    assert_eq!((driver.free(IoKind::Read), driver.free(IoKind::Write)), (8, 1));
    let read = driver.submit(IoKind::Read, 3 * BLOCK + 512, 512, &sector);
    for _ in 0..50 {
        driver.turn();
    }
    assert_eq!(driver.take_results()[&read], Ok(()));
    base.clear();
    let results = driver.drain();
    assert!(meeting.iter().all(|tag| results[tag] == Ok(())));
}
