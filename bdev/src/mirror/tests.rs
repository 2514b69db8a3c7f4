//! Scenarios of a mirror over disks in memory, told top to bottom.

use resilver_reactor::{Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, RegionId, RegionTable};

use super::*;
use crate::CompletionBatch;
use crate::device::Bdev;
use crate::io::{BdevIo, Completion, Tag};
use crate::job::{BlockJob, JobEvent, JobStatus, JobVerb, JobWants, ScanReport, Side, VerbError};
use crate::malloc::Malloc;

const BLOCK: u32 = 512;
const SIZE: u64 = (1 << 20) + 512;

/// A mirror by itself, a guest's memory, and the two disks for a look at their bytes.
struct Bench {
    memory: RegionTable,
    buffer: RegionId,
    now: Nanos,
    mirror: Option<Box<Mirror>>,
    disks: [Malloc; 2],
    done: Vec<Completion>,
    events: Vec<JobEvent>,
}

impl Bench {
    fn new(config: MirrorConfig) -> Self {
        let blocks = SIZE / u64::from(BLOCK);
        let disks = ["source", "target"].map(|name| Malloc::new(name, BLOCK, blocks).unwrap());
        let open = |disk: usize, depth| disks[disk].open_channel(depth).unwrap();
        let channels = MirrorChannels {
            source: open(0, DISK_DEPTH),
            copy_source: open(0, COPY_DEPTH),
            target: open(1, DISK_DEPTH + COPY_DEPTH),
        };
        let mirror = Box::new(Mirror::new(config, channels).unwrap());
        let memory = RegionTable::with_capacity(16);
        let buffer = memory.insert(Mapping::anonymous(1 << 20).unwrap()).unwrap();
        let (done, events) = (Vec::new(), Vec::new());
        Self { memory, buffer, now: Nanos::ZERO, mirror: Some(mirror), disks, done, events }
    }

    /// Inserted above its source, with everything allocated there scanned.
    fn started(config: MirrorConfig) -> Self {
        let mut bench = Self::new(config);
        bench.with(|mirror, cx| {
            mirror.attach(cx);
            mirror.scanned(cx, ScanReport::Done);
        });
        bench
    }

    fn with<T>(&mut self, call: impl FnOnce(&mut Mirror, &Context<'_>) -> T) -> T {
        let cx = Context { now: self.now, memory: &self.memory };
        call(self.mirror.as_mut().expect("a mirror that lives"), &cx)
    }

    fn turn(&mut self) {
        self.now = self.now + Nanos::from_micros(10);
        let cx = Context { now: self.now, memory: &self.memory };
        let mirror = self.mirror.as_mut().expect("a mirror that lives");
        let mut done = CompletionBatch::with_capacity(64);
        mirror.commit(&cx);
        mirror.poll(&cx, &mut done);
        self.done.extend_from_slice(done.as_slice());
        self.events.extend(std::iter::from_fn(|| mirror.take_event()));
    }

    fn turns_until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        for _ in 0..10_000 {
            if reached(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached: {what}");
    }

    fn status(&mut self) -> JobStatus {
        self.with(|mirror, cx| mirror.info(cx.now).status)
    }

    fn reach(&mut self, status: JobStatus) {
        self.turns_until(status.name(), |bench| bench.status() == status);
    }

    fn verb(&mut self, verb: JobVerb) -> Result<(), VerbError> {
        self.with(|mirror, cx| mirror.verb(cx, verb))
    }

    fn submit(&mut self, tag: u32, kind: IoKind, offset: u64, length: u32) {
        let io = BdevIo { tag: Tag(tag), kind, may_unmap: true, offset, length: length.into() };
        let slice = BufferSlice { region: self.buffer, length, offset: 0 };
        self.with(|mirror, cx| {
            assert!(mirror.free(kind) > 0);
            mirror.submit(
                cx,
                io,
                if kind.has_payload() { std::slice::from_ref(&slice) } else { &[] },
            );
        });
    }

    fn write(&mut self, tag: u32, offset: u64, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap();
        let slice = BufferSlice { region: self.buffer, length, offset: 0 };
        self.memory.write(slice, bytes).unwrap();
        self.submit(tag, IoKind::Write, offset, length);
    }

    fn drain(&mut self) {
        self.turns_until("drained", |bench| bench.with(|mirror, _| mirror.in_flight()) == 0);
    }

    fn contents(&self, side: Side) -> Vec<u8> {
        let mut channel = self.disks[side as usize].open_channel(4).unwrap();
        let memory = RegionTable::with_capacity(4);
        let cx = Context { now: Nanos::ZERO, memory: &memory };
        let region =
            memory.insert(Mapping::anonymous(usize::try_from(SIZE).unwrap()).unwrap()).unwrap();
        channel.attach(&cx);
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        for (index, piece) in content.chunks_mut(1 << 20).enumerate() {
            let (offset, length) = ((index as u64) << 20, u32::try_from(piece.len()).unwrap());
            let slice = BufferSlice { region, length, offset: 0 };
            let io = BdevIo {
                tag: Tag(0),
                kind: IoKind::Read,
                may_unmap: false,
                offset,
                length: length.into(),
            };
            channel.submit(&cx, io, &[slice]);
            channel.poll(&cx, &mut CompletionBatch::with_capacity(1));
            memory.read(slice, piece).unwrap();
        }
        content
    }

    /// Puts content on the source before the mirror is inserted.
    fn fill_source(&self, offset: u64, bytes: &[u8]) {
        let mut channel = self.disks[0].open_channel(4).unwrap();
        let memory = RegionTable::with_capacity(4);
        let cx = Context { now: Nanos::ZERO, memory: &memory };
        let region = memory.insert(Mapping::anonymous(bytes.len()).unwrap()).unwrap();
        channel.attach(&cx);
        let length = u32::try_from(bytes.len()).unwrap();
        let slice = BufferSlice { region, length, offset: 0 };
        memory.write(slice, bytes).unwrap();
        let io = BdevIo {
            tag: Tag(0),
            kind: IoKind::Write,
            may_unmap: false,
            offset,
            length: length.into(),
        };
        channel.submit(&cx, io, &[slice]);
    }
}

fn blocking() -> MirrorConfig {
    MirrorConfig {
        copy_mode: CopyMode::WriteBlocking,
        granularity: 4096,
        ..MirrorConfig::default()
    }
}

#[test]
fn an_idle_disk_is_copied_and_ready_once() {
    let mut bench = Bench::new(MirrorConfig { granularity: 4096, ..MirrorConfig::default() });
    bench.fill_source(8192, &[7; 5000 / 512 * 512]);
    bench.fill_source(SIZE - 512, &[9; 512]);
    bench.with(|mirror, cx| mirror.attach(cx));
    for _ in 0..10 {
        bench.turn();
    }
    assert_eq!(
        bench.contents(Side::Target),
        vec![0; usize::try_from(SIZE).unwrap()],
        "nothing before the scan"
    );
    bench.with(|mirror, cx| mirror.scanned(cx, ScanReport::Done));
    bench.reach(JobStatus::Ready);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
    let info = bench.with(|mirror, cx| mirror.info(cx.now));
    assert_eq!((info.copied_bytes, info.zero_bytes), (8192 + 512, SIZE - 8192 - 512));
    assert_eq!((info.dirty_bytes, info.in_flight_bytes, info.total_bytes), (0, 0, SIZE));
    assert_eq!(
        bench.events,
        [JobEvent::Status(JobStatus::Running), JobEvent::Status(JobStatus::Ready)]
    );
}

#[test]
fn a_mirrored_write_is_on_both_legs_when_it_is_acknowledged() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.write(1, 512, &[5; 1024]);
    bench.drain();
    assert_eq!(bench.done, [Completion { tag: Tag(1), result: Ok(()) }]);
    assert_eq!(bench.contents(Side::Target)[512..1536], [5; 1024]);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
    assert!(bench.with(|mirror, cx| mirror.info(cx.now)).actively_synced);
}

#[test]
fn a_background_write_makes_a_ready_mirror_dirty_and_is_copied() {
    let mut bench = Bench::started(MirrorConfig { granularity: 4096, ..MirrorConfig::default() });
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Pause).unwrap();
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    let info = bench.with(|mirror, cx| mirror.info(cx.now));
    assert_eq!((info.status, info.dirty_bytes), (JobStatus::Standby, 4096));
    assert_eq!(bench.contents(Side::Target)[..512], [0; 512]);
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("clean", |bench| {
        bench.with(|mirror, cx| mirror.info(cx.now)).dirty_bytes == 0
    });
    bench.turn();
    bench.turn();
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn complete_ends_on_the_target_after_the_record() {
    let mut bench = Bench::started(MirrorConfig::default());
    bench.fill_source(0, &[3; 512]);
    assert_eq!(
        bench.verb(JobVerb::Complete).unwrap_err().to_string(),
        "Job '' in state 'running' cannot accept command verb 'complete'"
    );
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Complete).unwrap();
    bench.reach(JobStatus::Pending);
    bench.turns_until("asked", |bench| bench.events.last() == Some(&JobEvent::CommitRequest));
    bench.write(1, 1024, &[4; 512]);
    bench.drain();
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Nothing, "the record comes first");
    bench.with(|mirror, cx| mirror.committed(cx, true));
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Dissolve);
    let cx = Context { now: bench.now, memory: &bench.memory };
    let end = bench.mirror.take().unwrap().dissolve(&cx);
    assert_eq!((end.side, end.info.status), (Side::Target, JobStatus::Concluded));
    assert_eq!((end.info.failure, end.regions.len(), end.released.len()), (None, 2, 2));
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn holes_are_skipped_where_the_guest_has_not_written() {
    let config =
        MirrorConfig { target_is_zero: true, granularity: 4096, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.with(|mirror, cx| mirror.attach(cx));
    bench.write(1, 8192, &[6; 512]);
    bench.with(|mirror, cx| {
        mirror.scanned(cx, ScanReport::Hole { offset: 0, length: SIZE });
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.reach(JobStatus::Ready);
    let info = bench.with(|mirror, cx| mirror.info(cx.now));
    assert_eq!((info.copied_bytes, info.zero_bytes), (4096, 0));
    assert_eq!(info.skipped_bytes, SIZE - 4096);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn what_cannot_work_is_refused_with_qemus_words() {
    let refused = |config: MirrorConfig| {
        let disk = Malloc::new("disk", BLOCK, 64).unwrap();
        let open = |depth| disk.open_channel(depth).unwrap();
        let (source, copy_source) = (open(DISK_DEPTH), open(COPY_DEPTH));
        let channels =
            MirrorChannels { source, copy_source, target: open(DISK_DEPTH + COPY_DEPTH) };
        Mirror::new(config, channels).err().expect("a refusal").to_string()
    };
    let granularity = |granularity| MirrorConfig { granularity, ..MirrorConfig::default() };
    assert!(refused(granularity(256)).contains("expects a value in range [512B, 64MB]"));
    assert!(refused(granularity(1000)).contains("expects a power of 2"));
    let small = Malloc::new("small", BLOCK, 63).unwrap();
    let large = Malloc::new("large", BLOCK, 64).unwrap();
    let channels = MirrorChannels {
        source: large.open_channel(DISK_DEPTH).unwrap(),
        copy_source: large.open_channel(COPY_DEPTH).unwrap(),
        target: small.open_channel(DISK_DEPTH + COPY_DEPTH).unwrap(),
    };
    let error = Mirror::new(MirrorConfig::default(), channels).err().unwrap().to_string();
    assert!(error.contains("32256 bytes") && error.contains("32768 bytes"), "{error}");
}
