//! Scenarios of a mirror over disks in memory that fail and stall on demand, told top to bottom.

mod checklist;

use std::sync::Arc;

use resilver_reactor::{Armed, Context, Nanos};
use resilver_sys::{BufferSlice, Mapping, RegionId, RegionTable, WaitSet};

use super::*;
use crate::CompletionBatch;
use crate::device::Bdev;
use crate::error::{Effect, ErrorBdev, FOREVER, Injection};
use crate::io::{BdevIo, Completion, IoError, Tag};
use crate::job::{
    BlockJob, Commit, Dissolved, ErrorAction, IoStatus, JobEvent, JobFailure, JobInfo, JobStatus,
    JobVerb, JobWants, ScanReport, Side, VerbError,
};
use crate::malloc::Malloc;

mod inline;
mod pool;
mod scope;
mod throttle;
mod trail;
mod verify;
mod working;

const BLOCK: u32 = 512;
const SIZE: u64 = (1 << 20) + 512;

/// A mirror by itself, a guest's memory, and the two disks for a look at their bytes.
struct Bench {
    memory: RegionTable,
    buffer: RegionId,
    now: Nanos,
    mirror: Option<Box<Mirror>>,
    /// By [`Side`]: the medium, and what the mirror sees of it.
    disks: [Arc<Malloc>; 2],
    legs: [ErrorBdev; 2],
    done: Vec<Completion>,
    events: Vec<JobEvent>,
}

impl Bench {
    fn new(config: MirrorConfig) -> Self {
        Self::over(config, |_, channel| channel)
    }

    /// The same, with something between the mirror and its legs.
    fn over(
        config: MirrorConfig,
        between: impl Fn(Side, Box<dyn IoChannel>) -> Box<dyn IoChannel>,
    ) -> Self {
        let blocks = SIZE / u64::from(BLOCK);
        let disks =
            ["source", "target"].map(|name| Arc::new(Malloc::new(name, BLOCK, blocks).unwrap()));
        let legs = [0, 1].map(|leg: usize| ErrorBdev::new("leg", Arc::clone(&disks[leg]) as _));
        let open = |leg: usize, depth| legs[leg].open_channel(depth).unwrap();
        let channels = MirrorChannels {
            source: between(Side::Source, open(0, DISK_DEPTH)),
            copy_source: open(0, COPY_DEPTH),
            target: between(Side::Target, open(1, TARGET_DEPTH)),
            offload: None,
        };
        let mirror = Box::new(Mirror::new(config, channels).unwrap());
        let memory = RegionTable::with_capacity(16);
        let buffer = memory.insert(Mapping::anonymous(1 << 20).unwrap()).unwrap();
        let (done, events) = (Vec::new(), Vec::new());
        Self { memory, buffer, now: Nanos::ZERO, mirror: Some(mirror), disks, legs, done, events }
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
        mirror.turn(&cx);
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

    /// The reactor would sleep now.
    fn arm(&mut self) -> Armed {
        self.with(|mirror, cx| mirror.arm(cx, &mut WaitSet::with_capacity(8)))
    }

    fn info(&mut self) -> JobInfo {
        self.with(|mirror, cx| mirror.info(cx.now))
    }

    fn status(&mut self) -> JobStatus {
        self.info().status
    }

    fn inject(&mut self, side: Side, kind: IoKind, effect: Effect, count: u64) {
        let injection = Injection { kind: Some(kind), effect, count, range: None };
        self.legs[side as usize].inject(injection).unwrap();
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.turn();
        }
    }

    /// Ends the job as its disk would: nothing of the guest is in flight and the job wants it.
    fn dissolve(&mut self) -> Dissolved {
        assert_eq!(self.with(|mirror, _| mirror.in_flight()), 0);
        assert_eq!(self.with(|mirror, _| mirror.wants()), JobWants::Dissolve);
        let cx = Context { now: self.now, memory: &self.memory };
        self.mirror.take().unwrap().dissolve(&cx)
    }

    /// Brings the job to where its record is written and the disk would be held.
    fn commit(&mut self) {
        self.reach(JobStatus::Ready);
        self.verb(JobVerb::Complete).unwrap();
        self.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
        self.with(|mirror, cx| mirror.committed(cx, Commit::Written));
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
        self.fill(Side::Source, offset, bytes);
    }

    /// Changes a disk behind the mirror's back.
    fn fill(&self, side: Side, offset: u64, bytes: &[u8]) {
        let mut channel = self.disks[side as usize].open_channel(4).unwrap();
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
    let info = bench.info();
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
    assert!(bench.info().actively_synced);
}

#[test]
fn a_background_write_makes_a_ready_mirror_dirty_and_is_copied() {
    let mut bench = Bench::started(MirrorConfig { granularity: 4096, ..MirrorConfig::default() });
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Pause).unwrap();
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    let info = bench.info();
    assert_eq!((info.status, info.dirty_bytes), (JobStatus::Standby, 4096));
    assert_eq!(bench.contents(Side::Target)[..512], [0; 512]);
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("clean", |bench| bench.info().dirty_bytes == 0);
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
    bench.with(|mirror, cx| mirror.committed(cx, Commit::Written));
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Dissolve);
    let end = bench.dissolve();
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
    let info = bench.info();
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
            MirrorChannels { source, copy_source, target: open(TARGET_DEPTH), offload: None };
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
        target: small.open_channel(TARGET_DEPTH).unwrap(),
        offload: None,
    };
    let error = Mirror::new(MirrorConfig::default(), channels).err().unwrap().to_string();
    assert!(error.contains("32256 bytes") && error.contains("32768 bytes"), "{error}");
}

#[test]
fn a_full_target_stands_the_job_by_and_the_guest_goes_on() {
    let mut bench = Bench::started(MirrorConfig { on_target_error: OnError::Enospc, ..blocking() });
    bench.reach(JobStatus::Ready);
    let full = Effect::Fail(IoError::NO_SPACE);
    bench.inject(Side::Target, IoKind::Write, full, FOREVER);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.write(2, 512, &[6; 8192]);
    bench.drain();
    assert!(bench.done.iter().all(|done| done.result.is_ok()), "{:?}", bench.done);
    let info = bench.info();
    assert_eq!((info.status, info.io_status), (JobStatus::Standby, IoStatus::Nospace));
    assert!(!info.paused_by_operator && !info.actively_synced);
    let expected = JobFailure::Io {
        side: Side::Target,
        operation: IoKind::Write,
        offset: 0,
        error: IoError::NO_SPACE,
    };
    assert_eq!((info.failure, info.dirty_bytes), (Some(expected), 3 * 4096));
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("full again", |bench| bench.status() == JobStatus::Standby);
    bench.legs[1].clear();
    bench.verb(JobVerb::Resume).unwrap();
    bench.turns_until("in sync again", |bench| bench.info().actively_synced);
    let info = bench.info();
    assert_eq!((info.io_status, info.failure), (IoStatus::Ok, None));
    assert_eq!(info.copied_bytes, 3 * 4096, "no second full copy");
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn cancel_frees_a_guest_from_a_hung_target_at_once() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    bench.write(1, 0, &[5; 512]);
    bench.write(2, 0, &[6; 512]);
    bench.turns(100);
    assert_eq!(bench.done, [], "a write to both legs waits for the slower");
    assert!(bench.with(|mirror, _| mirror.free(IoKind::Read)) == DISK_DEPTH);
    bench.verb(JobVerb::Cancel).unwrap();
    bench.drain();
    assert_eq!(bench.done.iter().filter(|done| done.result.is_ok()).count(), 2);
    assert_eq!(bench.status(), JobStatus::Aborting);
    let mut end = bench.dissolve();
    assert_eq!((end.side, end.info.failure), (Side::Source, Some(JobFailure::Cancelled)));
    assert_eq!(end.survivor.in_flight(), 0);
    let left: Vec<u32> = end.released.iter().map(|channel| channel.in_flight()).collect();
    assert_eq!(left, [0, 1], "the hung write goes with its channel");
    bench.legs[1].clear();
    let cx = Context { now: bench.now, memory: &bench.memory };
    let mut done = CompletionBatch::with_capacity(4);
    end.released[1].poll(&cx, &mut done);
    assert_eq!((done.as_slice().len(), end.released[1].in_flight()), (1, 0));
    assert_eq!(bench.contents(Side::Source)[..512], [6; 512]);
}

#[test]
fn a_write_that_timed_out_shuts_its_chunk_until_it_lands() {
    let timeout = Nanos::from_millis(5);
    let config = MirrorConfig {
        on_target_error: OnError::Ignore,
        target_timeout: Some(timeout),
        ..blocking()
    };
    let mut bench = Bench::started(config);
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, 1);
    bench.write(1, 0, &[5; 512]);
    bench.turns_until("answered", |bench| bench.done.len() == 1);
    assert_eq!(bench.done[0].result, Ok(()));
    assert!(bench.now >= timeout);
    assert_eq!(bench.with(|mirror, _| mirror.chunk_state(0)), ChunkState::Shut);
    bench.write(2, 0, &[6; 512]);
    bench.drain();
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(1000);
    assert_eq!(bench.status(), JobStatus::Waiting, "not in sync while something may land");
    assert_eq!(bench.with(|mirror, _| mirror.chunk_state(0)), ChunkState::Shut);
    assert_eq!(bench.with(|mirror, _| mirror.chunk_state(1)), ChunkState::Clean);
    bench.legs[1].clear();
    bench.reach(JobStatus::Pending);
    assert_eq!(bench.contents(Side::Target)[..512], [6; 512]);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn a_target_that_hangs_costs_a_guest_a_bounded_number_of_time_outs() {
    let timeout = Nanos::from_millis(5);
    let config = MirrorConfig {
        granularity: 4096,
        on_target_error: OnError::Ignore,
        target_timeout: Some(timeout),
        ..blocking()
    };
    let mut bench = Bench::started(config);
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, FOREVER);
    let mut timed_out = 0;
    for tag in 0..2 * u32::from(QUARANTINE) {
        let since = bench.now;
        bench.write(tag, u64::from(tag) * 4096, &[5; 512]);
        bench.turns_until("answered", |bench| bench.done.len() == tag as usize + 1);
        timed_out += u16::from(bench.now >= since + timeout);
    }
    assert!(bench.done.iter().all(|done| done.result.is_ok()));
    assert_eq!(timed_out, QUARANTINE);
}

#[test]
fn a_write_that_the_target_misses_after_the_record_waits_for_its_retraction() {
    let mut bench = Bench::started(MirrorConfig { on_target_error: OnError::Ignore, ..blocking() });
    bench.commit();
    bench.inject(Side::Target, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.write(1, 0, &[5; 512]);
    bench.turns(100);
    assert_eq!(bench.done, [], "a crash now would find the record, and not the write");
    assert_eq!(bench.events.last(), Some(&JobEvent::RetractRequest));
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Nothing);
    bench.with(|mirror, cx| mirror.retracted(cx, false));
    bench.turns(10);
    assert_eq!(bench.done, []);
    bench.now = bench.now + Nanos::from_secs(1);
    bench.turn();
    assert_eq!(bench.events.last(), Some(&JobEvent::RetractRequest), "asked again");
    bench.with(|mirror, cx| mirror.retracted(cx, true));
    bench.drain();
    assert_eq!(bench.done.len(), 1);
    assert_eq!(bench.status(), JobStatus::Ready);
    assert!(matches!(bench.events.last(), Some(JobEvent::SwitchUndone(JobFailure::Io { .. }))));
    bench.turns_until("in sync again", |bench| bench.info().actively_synced);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn a_flush_waits_for_no_retraction_where_the_target_lacks_nothing() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
    bench.with(|mirror, cx| mirror.committed(cx, Commit::Unknown));
    bench.with(|mirror, cx| mirror.retracted(cx, false));
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.submit(2, IoKind::Flush, 0, 0);
    bench.drain();
    assert_eq!(bench.done.len(), 2, "the guest goes on while the record cannot be taken back");
    // From here on the target lacks something.
    bench.inject(Side::Target, IoKind::Write, Effect::Fail(IoError::IO), 1);
    bench.write(3, 0, &[6; 512]);
    bench.submit(4, IoKind::Flush, 0, 0);
    bench.turns(100);
    assert_eq!(bench.done.len(), 2);
}

#[test]
fn a_record_that_cannot_be_written_leaves_the_job_ready() {
    let mut bench = Bench::started(MirrorConfig::default());
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns_until("asked", |bench| bench.events.contains(&JobEvent::CommitRequest));
    bench.with(|mirror, cx| mirror.committed(cx, Commit::Absent));
    bench.turn();
    let undone = JobEvent::SwitchUndone(JobFailure::CommitRecord);
    assert_eq!((bench.status(), bench.events.last()), (JobStatus::Ready, Some(&undone)));
    assert_eq!(bench.info().failure, Some(JobFailure::CommitRecord));
    bench.verb(JobVerb::Complete).unwrap();
    assert_eq!(bench.info().failure, None);
    bench.reach(JobStatus::Pending);
}

#[test]
fn cancel_after_the_record_takes_it_back_first() {
    let mut bench = Bench::started(MirrorConfig::default());
    bench.commit();
    bench.verb(JobVerb::Cancel).unwrap();
    bench.turn();
    assert_eq!(bench.events.last(), Some(&JobEvent::RetractRequest));
    assert_eq!(bench.status(), JobStatus::Aborting);
    assert_eq!(bench.with(|mirror, _| mirror.wants()), JobWants::Nothing);
    bench.with(|mirror, cx| mirror.retracted(cx, true));
    assert_eq!(bench.dissolve().side, Side::Source);
}

#[test]
fn a_hold_that_does_not_drain_takes_the_record_back() {
    let mut bench = Bench::started(MirrorConfig::default());
    bench.commit();
    bench.with(|mirror, cx| mirror.hold_failed(cx, 3));
    bench.turn();
    assert_eq!(bench.events.last(), Some(&JobEvent::RetractRequest));
    bench.with(|mirror, cx| mirror.retracted(cx, true));
    let undone = JobFailure::HoldTimedOut { in_flight: 3 };
    assert_eq!((bench.status(), bench.info().failure), (JobStatus::Ready, Some(undone)));
}

#[test]
fn finish_leaves_a_copy_of_a_point_in_time() {
    let mut bench =
        Bench::started(MirrorConfig { auto_finalize: false, ..MirrorConfig::default() });
    bench.reach(JobStatus::Ready);
    bench.verb(JobVerb::Finish).unwrap();
    bench.reach(JobStatus::Pending);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target), "pending mirrors on");
    bench.verb(JobVerb::Finalize).unwrap();
    bench.write(2, 512, &[6; 512]);
    bench.turns_until("done", |bench| bench.with(|mirror, _| mirror.wants()) == JobWants::Dissolve);
    bench.drain();
    let end = bench.dissolve();
    assert_eq!((end.side, end.info.failure), (Side::Source, None));
    assert_eq!(bench.contents(Side::Target)[..1024], [[5; 512], [0; 512]].concat());
    assert_eq!(bench.contents(Side::Source)[..1024], [[5; 512], [6; 512]].concat());
}

#[test]
fn a_reported_error_ends_the_job_and_not_the_guest() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Flush, Effect::Fail(IoError::IO), 1);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.submit(2, IoKind::Flush, 0, 0);
    bench.drain();
    assert!(bench.done.iter().all(|done| done.result.is_ok()));
    let end = bench.dissolve();
    assert_eq!(end.side, Side::Source);
    assert!(end.info.dirty_bytes >= 4096, "what the flush lost is known");
    assert!(matches!(end.info.failure, Some(JobFailure::Io { operation: IoKind::Flush, .. })));
    assert_eq!(end.info.errors.counts[Side::Target as usize][ErrorAction::Report as usize], 1);
}

#[test]
fn a_lasting_error_that_is_ignored_makes_no_storm() {
    let config = MirrorConfig { on_source_error: OnError::Ignore, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.inject(Side::Source, IoKind::Read, Effect::Fail(IoError::IO), FOREVER);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    for _ in 0..10_000 {
        bench.now = bench.now + Nanos::from_millis(1);
        bench.turn();
    }
    let errors = bench.info().errors.counts[Side::Source as usize][ErrorAction::Ignore as usize];
    let events =
        bench.events.iter().filter(|event| matches!(event, JobEvent::Error { .. })).count();
    // Each of the spots that are told apart has its own ever longer rests.
    assert!((5..200).contains(&errors), "{errors} errors in 10 s");
    assert!((2..12).contains(&events), "{events} events in 10 s");
    bench.legs[0].clear();
    bench.now = bench.now + Nanos::from_secs(10);
    bench.reach(JobStatus::Ready);
}

#[test]
fn a_speed_limit_holds_data_back_and_can_be_lifted() {
    let mut bench = Bench::new(MirrorConfig { speed: 65536, ..MirrorConfig::default() });
    for mega in 0..4 {
        bench.fill_source(mega << 18, &[7; 1 << 18]);
    }
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    for _ in 0..1000 {
        bench.now = bench.now + Nanos::from_millis(2);
        bench.turn();
    }
    let copied = bench.info().copied_bytes;
    assert!((65536..4 * 65536).contains(&copied), "{copied} bytes in 2 s at 64 KiB/s");
    assert!(bench.info().eta.is_some());
    bench.verb(JobVerb::SetSpeed(0)).unwrap();
    bench.reach(JobStatus::Ready);
}

#[test]
fn chunks_larger_than_the_buffers_are_copied_window_by_window() {
    let config = MirrorConfig { granularity: 4 << 20, buf_size: 65536, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.fill_source(4096, &[7; 200 * 1024]);
    bench.fill_source(SIZE - 512, &[9; 512]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.reach(JobStatus::Ready);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
    let info = bench.info();
    // Zeroes that share a window with data are copied with it.
    let data = 4 * 65536 + 512;
    assert_eq!((info.copied_bytes, info.zero_bytes), (data, SIZE - data));
}

#[test]
fn a_guest_reset_cancels_where_the_operator_wants_it() {
    let mut bench = Bench::started(MirrorConfig { cancel_on_guest_reset: true, ..blocking() });
    bench.reach(JobStatus::Ready);
    bench.with(|mirror, cx| mirror.guest_reset(cx));
    assert_eq!(bench.dissolve().info.failure, Some(JobFailure::GuestReset));
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.with(|mirror, cx| mirror.guest_reset(cx));
    assert_eq!(bench.status(), JobStatus::Ready);
}

#[test]
fn pausing_twice_and_resuming_what_runs_are_refused_as_qemu_does() {
    let mut bench = Bench::started(MirrorConfig::default());
    let refusal = |result: Result<(), VerbError>| result.unwrap_err().to_string();
    assert_eq!(refusal(bench.verb(JobVerb::Resume)), "Can't resume a job that was not paused");
    bench.verb(JobVerb::Pause).unwrap();
    assert_eq!(refusal(bench.verb(JobVerb::Pause)), "Job is already paused");
    assert!(bench.info().paused_by_operator);
    bench.turns(100);
    let info = bench.info();
    assert_eq!((info.status, info.dirty_bytes + info.in_flight_bytes), (JobStatus::Paused, SIZE));
    bench.verb(JobVerb::Resume).unwrap();
    bench.reach(JobStatus::Ready);
}

#[test]
fn a_discard_never_makes_the_legs_differ() {
    let mut bench = Bench::started(blocking());
    bench.reach(JobStatus::Ready);
    bench.write(1, 0, &[5; 8192]);
    bench.drain();
    bench.submit(2, IoKind::Unmap, 512, 4096);
    bench.submit(3, IoKind::WriteZeroes, 6144, 512);
    bench.drain();
    bench.turns_until("in sync", |bench| bench.info().actively_synced);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
    assert!(bench.done.iter().all(|done| done.result.is_ok()));
}

#[test]
fn a_chunk_that_is_shut_keeps_no_reactor_awake() {
    let config = MirrorConfig {
        on_target_error: OnError::Ignore,
        target_timeout: Some(Nanos::from_millis(5)),
        ..blocking()
    };
    let mut bench = Bench::started(config);
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Write, Effect::Stall, 1);
    bench.write(1, 0, &[5; 512]);
    bench.drain();
    bench.turns(10);
    assert_eq!(bench.info().dirty_bytes, 4096);
    assert_ne!(bench.arm(), Armed::Ready, "there is nothing to do until the write ends");
}

#[test]
fn a_copier_that_has_used_its_allowance_is_woken_however_late_the_sleep_begins() {
    let mut bench = Bench::new(MirrorConfig { speed: 65536, ..MirrorConfig::default() });
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    for _ in 0..100 {
        bench.turn();
        let now = bench.now;
        bench.now = now + Nanos::from_secs(3600);
        assert_ne!(bench.arm(), Armed::Until(None), "nobody would wake the copier");
        bench.now = now;
    }
}

#[test]
fn the_rates_of_a_disk_that_rests_are_none() {
    let mut bench = Bench::new(MirrorConfig { speed: 65536, ..MirrorConfig::default() });
    bench.fill_source(0, &[7; 1 << 20]);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Done);
    });
    for _ in 0..1000 {
        bench.now = bench.now + Nanos::from_millis(2);
        bench.turn();
    }
    let rate = bench.info().copy_bytes_per_second;
    assert!((1..262_144).contains(&rate), "{rate} bytes a second");
    bench.verb(JobVerb::Pause).unwrap();
    bench.turns(10);
    // The reactor sleeps.
    bench.now = bench.now + Nanos::from_secs(60);
    assert_eq!(bench.info().copy_bytes_per_second, 0);
    assert_eq!(bench.info().eta, None);
}

#[test]
fn a_guest_that_discards_cannot_hold_a_switch_over_up() {
    let mut bench = Bench::started(MirrorConfig { unmap: false, ..blocking() });
    bench.reach(JobStatus::Ready);
    bench.inject(Side::Target, IoKind::Flush, Effect::Stall, 1);
    bench.verb(JobVerb::Complete).unwrap();
    bench.turns(10);
    assert_eq!(bench.status(), JobStatus::Waiting);
    bench.submit(1, IoKind::Unmap, 0, 8192);
    bench.drain();
    assert_eq!((bench.done[0].result, bench.info().dirty_bytes), (Ok(()), 0));
    bench.legs[1].clear();
    bench.reach(JobStatus::Pending);
    assert_eq!(bench.contents(Side::Source), bench.contents(Side::Target));
}

#[test]
fn a_hole_that_the_target_must_write_out_is_copied_in_pieces_like_data() {
    let config = MirrorConfig { unmap: false, buf_size: 65536, ..MirrorConfig::default() };
    let mut bench = Bench::new(config);
    bench.inject(Side::Target, IoKind::WriteZeroes, Effect::Stall, 1);
    bench.with(|mirror, cx| {
        mirror.attach(cx);
        mirror.scanned(cx, ScanReport::Hole { offset: 0, length: SIZE });
        mirror.scanned(cx, ScanReport::Done);
    });
    bench.turns(10);
    assert_eq!(bench.info().in_flight_bytes, 65536, "a guest's write waits for no more");
    bench.legs[1].clear();
    bench.reach(JobStatus::Ready);
    assert_eq!(bench.info().zero_bytes, SIZE);
}
