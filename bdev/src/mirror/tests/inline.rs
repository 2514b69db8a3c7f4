//! A mirror between disks in memory, where the reactor does the work: what the copier moves is in proportion to what the guest asks
//! for, unless the job does not get on by that.

use super::*;

const REQUEST: u64 = 4096;
/// Turns of `copied_beside`.
const TURNS: u64 = 100;

/// A mirror of a disk without zeroes, which would not be copied, and a guest that asks for so many blocks in each turn.
struct InMemory {
    memory: RegionTable,
    buffer: RegionId,
    /// Bytes.
    disk: u64,
    mirror: Mirror,
    now: Nanos,
    /// Requests that the guest has made.
    asked: u64,
}

impl InMemory {
    fn new(disk: u64, config: MirrorConfig) -> Self {
        const FILL: usize = 1 << 20;
        let memory = RegionTable::with_capacity(16);
        let buffer = memory.insert(Mapping::anonymous(FILL).unwrap()).unwrap();
        let malloc = |name| Malloc::new(name, BLOCK, disk / u64::from(BLOCK)).unwrap();
        let (source, target) = (malloc("source"), malloc("target"));
        let now = Nanos::ZERO;
        let cx = Context { now, memory: &memory };

        let filled = first_of(buffer, FILL as u64);
        memory.write(filled, &vec![7; FILL]).unwrap();
        let mut filling = source.open_channel(1).unwrap();
        filling.attach(&cx);
        let mut done = CompletionBatch::with_capacity(1);
        for offset in (0..disk).step_by(FILL) {
            filling.submit(&cx, io(IoKind::Write, offset, FILL as u64), &[filled]);
            filling.poll(&cx, &mut done);
            done.clear();
        }

        let channels = MirrorChannels {
            source: source.open_channel(DISK_DEPTH).unwrap(),
            copy_source: source.open_channel(COPY_DEPTH).unwrap(),
            target: target.open_channel(TARGET_DEPTH).unwrap(),
            offload: None,
        };
        let mut mirror = Mirror::new(config, channels).unwrap();
        mirror.attach(&cx);
        mirror.scanned(&cx, ScanReport::Done);
        Self { memory, buffer, disk, mirror, now, asked: 0 }
    }

    /// A turn of the reactor, `time` after the last one, in which the guest asks for `depth` blocks: each `stride` blocks
    /// behind the one before.
    fn turn(&mut self, time: Nanos, kind: IoKind, depth: u64, stride: u64) {
        self.now = self.now + time;
        let cx = Context { now: self.now, memory: &self.memory };
        let block = first_of(self.buffer, REQUEST);
        for _ in 0..depth {
            let offset = self.asked * stride * REQUEST % self.disk;
            self.mirror.submit(&cx, io(kind, offset, REQUEST), &[block]);
            self.asked += 1;
        }
        self.mirror.commit(&cx);
        self.mirror.poll(&cx, &mut CompletionBatch::with_capacity(64));
        self.mirror.turn(&cx);
    }
}

fn first_of(region: RegionId, length: u64) -> BufferSlice {
    BufferSlice { region, offset: 0, length: u32::try_from(length).unwrap() }
}

fn io(kind: IoKind, offset: u64, length: u64) -> BdevIo {
    BdevIo { tag: Tag(0), kind, may_unmap: false, offset, length }
}

/// Bytes that are copied beside a guest that reads so often in each turn.
fn copied_beside(depth: u64) -> u64 {
    let mut bench = InMemory::new(64 << 20, blocking());
    for _ in 0..TURNS {
        bench.turn(Nanos::from_micros(10), IoKind::Read, depth, 1);
    }
    let info = bench.mirror.info(bench.now);
    assert_eq!(info.status, JobStatus::Running, "all was copied; the disk is too small");
    info.copied_bytes
}

#[test]
fn beside_a_guest_the_copier_moves_about_as_much_as_it_and_alone_what_it_can() {
    for depth in [1, 4, 32] {
        let (copied, asked) = (copied_beside(depth), TURNS * depth * REQUEST);
        assert!(
            copied >= asked / 3 && copied <= asked * 3 / 2,
            "{copied} bytes beside {asked} at depth {depth}"
        );
    }
    assert!(copied_beside(0) > TURNS / 2 * (128 << 10), "{} bytes alone", copied_beside(0));
}

/// A guest that writes a block in each turn, here and there, until it has come about: each makes the 64 KiB around it dirty.
fn beside_writes(config: MirrorConfig, what: &str, come_about: impl Fn(&JobInfo) -> bool) {
    let mut bench = InMemory::new(16 << 20, config);
    for _ in 0..20_000 {
        // An odd number of blocks comes round to every chunk.
        bench.turn(Nanos::from_micros(100), IoKind::Write, 1, 1021);
        if come_about(&bench.mirror.info(bench.now)) {
            return;
        }
    }
    panic!("not {what} within two seconds: {:?}", bench.mirror.info(bench.now));
}

#[test]
fn a_guest_that_writes_in_every_turn_does_not_keep_a_background_copy_from_being_ready() {
    let config = MirrorConfig { copy_mode: CopyMode::Background, ..MirrorConfig::default() };
    beside_writes(config, "ready", |info| {
        assert!(info.copied_bytes < 64 << 20, "it runs after the guest: {info:?}");
        info.status == JobStatus::Ready
    });
}

/// With a speed nothing is sent along, and what is dirty gets less by copying only.
#[test]
fn a_copier_that_does_not_get_on_beside_writes_takes_what_it_can() {
    let config =
        MirrorConfig { copy_mode: CopyMode::Background, speed: 1 << 40, ..MirrorConfig::default() };
    beside_writes(config, "clean", |info| info.dirty_bytes == 0);
}

/// A guest that reads eight blocks in each turn of 20 us and what a copy in it takes, 0.6 ns a byte: what its requests have to wait at most,
/// of 100, and how much is copied meanwhile, bytes a second.
fn under(ceiling: Option<Nanos>) -> (Nanos, u64) {
    const BASE: Nanos = Nanos::from_micros(20);
    let config = MirrorConfig { latency_ceiling: ceiling, ..blocking() };
    let mut bench = InMemory::new(64 << 20, config);
    let (mut turns, mut copied, mut time) = (Vec::new(), 0, BASE);
    let (mut begun, mut before) = (Nanos::ZERO, 0);
    while bench.now < Nanos::from_secs(3) {
        bench.turn(time, IoKind::Read, 8, 1);
        let info = bench.mirror.info(bench.now);
        if info.status != JobStatus::Running {
            break;
        }
        time = BASE + Nanos((info.copied_bytes - copied) * 6 / 10);
        copied = info.copied_bytes;
        // The allowance is found in the first second.
        if bench.now < Nanos::from_secs(1) && ceiling.is_some() {
            (begun, before) = (bench.now, copied);
        } else {
            turns.push(time);
        }
    }
    turns.sort_unstable();
    let rate = (copied - before) * 1_000_000_000 / (bench.now - begun).0;
    (turns[turns.len() * 99 / 100], rate)
}

#[test]
fn under_a_ceiling_a_copy_in_memory_is_short_and_what_waits_for_it_is_counted() {
    let (wait, rate) = under(None);
    assert!(wait > Nanos::from_micros(30) && rate > 300 << 20, "{wait} and {rate} without");
    let (wait, rate) = under(Some(Nanos::from_micros(36)));
    assert!(wait <= Nanos::from_micros(36), "{wait}");
    assert!(rate > 50 << 20, "{rate} bytes a second leave much unused");
    // No copy fits under that: only one turn in a hundred may have any.
    let (wait, rate) = under(Some(Nanos::from_micros(24)));
    assert!(wait <= Nanos::from_micros(24), "{wait}");
    assert!(rate >= 1 << 20, "{rate} bytes a second are less than the floor");
}
