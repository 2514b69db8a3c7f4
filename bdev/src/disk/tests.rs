//! Scenarios of one disk, stepped by hand over a channel whose completions the test decides.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use resilver_sys::RegionTable;

use super::*;
use crate::job::{Commit, JobStatus, Scan};

/// What the test and its channel share.
#[derive(Default)]
struct Script {
    /// Submitted and not yet let go.
    held: Mutex<VecDeque<BdevIo>>,
    /// Let go, to be polled.
    ready: Mutex<VecDeque<Tag>>,
    attached: AtomicUsize,
    detached: AtomicUsize,
}

impl Script {
    fn let_go(&self, count: usize) {
        let mut held = self.held.lock().unwrap();
        let count = count.min(held.len());
        self.ready.lock().unwrap().extend(held.drain(..count).map(|io| io.tag));
    }
}

struct Scripted {
    script: Arc<Script>,
    limits: Limits,
    in_flight: u32,
}

fn channel(num_blocks: u64) -> (Box<Scripted>, Arc<Script>) {
    let script = Arc::new(Script::default());
    let limits = Limits {
        block_size: 512,
        num_blocks,
        max_transfer: 1 << 20,
        max_segments: 8,
        max_unmap: 1 << 20,
        unmap: true,
        zeroes_unmap: true,
        optimal_io: 4096,
        read_only: false,
    };
    (Box::new(Scripted { script: Arc::clone(&script), limits, in_flight: 0 }), script)
}

impl IoChannel for Scripted {
    fn limits(&self) -> &Limits {
        &self.limits
    }
    fn free(&self, _kind: IoKind) -> u32 {
        4 - self.in_flight
    }
    fn submit(&mut self, _cx: &Context<'_>, io: BdevIo, _payload: &[BufferSlice]) {
        self.in_flight += 1;
        self.script.held.lock().unwrap().push_back(io);
    }
    fn commit(&mut self, _cx: &Context<'_>) {}
    fn poll(&mut self, _cx: &Context<'_>, done: &mut CompletionBatch) {
        let mut ready = self.script.ready.lock().unwrap();
        while done.room() > 0
            && let Some(tag) = ready.pop_front()
        {
            self.in_flight -= 1;
            done.push(Completion { tag, result: Ok(()) });
        }
    }
    fn in_flight(&self) -> u32 {
        self.in_flight
    }
    fn attach(&mut self, _cx: &Context<'_>) {
        self.script.attached.fetch_add(1, Ordering::SeqCst);
    }
    fn detach(&mut self, _cx: &Context<'_>) {
        self.script.detached.fetch_add(1, Ordering::SeqCst);
    }
}

/// A consumer that submits as many reads as it was told to.
#[derive(Default)]
struct Want {
    to_submit: AtomicUsize,
    completed: AtomicUsize,
    published: AtomicUsize,
    blocks: AtomicUsize,
}

struct Reader {
    want: Arc<Want>,
    in_flight: u32,
}

impl Consumer for Reader {
    fn poll(&mut self, cx: &Context<'_>, port: &mut Port<'_>) -> Work {
        let blocks = usize::try_from(port.limits().num_blocks).unwrap();
        self.want.blocks.store(blocks, Ordering::SeqCst);
        let mut count = 0;
        while port.free(IoKind::Read) > 0 && self.want.to_submit.load(Ordering::SeqCst) > 0 {
            self.want.to_submit.fetch_sub(1, Ordering::SeqCst);
            let io = BdevIo {
                tag: Tag(7),
                kind: IoKind::Read,
                may_unmap: false,
                offset: 0,
                length: 512,
            };
            port.submit(cx, io, &[BufferSlice::EMPTY]);
            self.in_flight += 1;
            count += 1;
        }
        Work::from_count(count)
    }
    fn complete(&mut self, _cx: &Context<'_>, completion: Completion, stats: &IoStats) {
        assert_eq!(completion.tag, Tag(7));
        self.in_flight -= 1;
        self.want.completed.fetch_add(1, Ordering::SeqCst);
        stats.record(IoKind::Read, 512, Nanos(1), true);
    }
    fn publish(&mut self, _cx: &Context<'_>) {
        self.want.published.fetch_add(1, Ordering::SeqCst);
    }
    fn in_flight(&self) -> u32 {
        self.in_flight
    }
    fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
        Armed::Until(None)
    }
    fn disarm(&mut self, _cx: &Context<'_>) {}
}

/// A job that passes everything to the source and dissolves when told to complete or cancel.
struct PlainJob {
    source: Box<dyn IoChannel>,
    target: Option<Box<dyn IoChannel>>,
    wants: JobWants,
    side: Side,
    failed_holds: Arc<AtomicUsize>,
}

fn info() -> JobInfo {
    JobInfo {
        status: JobStatus::Concluded,
        paused_by_operator: false,
        copy_mode: crate::job::CopyMode::WriteBlocking,
        speed: 0,
        total_bytes: 0,
        copied_bytes: 0,
        zero_bytes: 0,
        skipped_bytes: 0,
        offloaded_bytes: 0,
        mirrored_bytes: 0,
        dropped_writes: 0,
        dropped_bytes: 0,
        dirty_bytes: 0,
        in_flight_bytes: 0,
        copy_bytes_per_second: 0,
        guest_write_bytes_per_second: 0,
        eta: None,
        guest_p99: None,
        throttle: None,
        auto_converged: false,
        converging: true,
        actively_synced: true,
        target_undurable_bytes: 0,
        io_status: crate::job::IoStatus::Ok,
        failure: None,
        writes: crate::job::WriteCounts::default(),
        errors: crate::job::ErrorCounts::default(),
        verify: crate::VerifyInfo::default(),
        asked: None,
    }
}

impl IoChannel for PlainJob {
    fn limits(&self) -> &Limits {
        self.source.limits()
    }
    fn free(&self, kind: IoKind) -> u32 {
        self.source.free(kind)
    }
    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, payload: &[BufferSlice]) {
        self.source.submit(cx, io, payload);
    }
    fn commit(&mut self, cx: &Context<'_>) {
        self.source.commit(cx);
    }
    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        self.source.poll(cx, done);
    }
    fn in_flight(&self) -> u32 {
        self.source.in_flight()
    }
}

impl BlockJob for PlainJob {
    fn verb(&mut self, _cx: &Context<'_>, verb: JobVerb) -> Result<(), VerbError> {
        self.side = if verb == JobVerb::Complete { Side::Target } else { Side::Source };
        self.wants = JobWants::Dissolve;
        Ok(())
    }
    fn turn(&mut self, _cx: &Context<'_>) {}
    fn info(&self, _now: Nanos) -> JobInfo {
        info()
    }
    fn take_event(&mut self) -> Option<JobEvent> {
        None
    }
    fn wants(&self) -> JobWants {
        self.wants
    }
    fn scanned(&mut self, _cx: &Context<'_>, _report: ScanReport) {}
    fn committed(&mut self, _cx: &Context<'_>, _record: Commit) {}
    fn retracted(&mut self, _cx: &Context<'_>, _done: bool) {}
    fn hold_failed(&mut self, _cx: &Context<'_>, _in_flight: u32) {
        self.failed_holds.fetch_add(1, Ordering::SeqCst);
    }
    fn guest_reset(&mut self, _cx: &Context<'_>) {}
    fn dissolve(mut self: Box<Self>, _cx: &Context<'_>) -> crate::job::Dissolved {
        let target = self.target.take().unwrap();
        let (survivor, released) = match self.side {
            Side::Source => (self.source, vec![target]),
            Side::Target => (target, vec![self.source]),
        };
        let (regions, side, info) = (Vec::new(), self.side, info());
        crate::job::Dissolved { survivor, released, regions, side, info }
    }
    fn abandon(self: Box<Self>, cx: &Context<'_>) -> crate::job::Dissolved {
        self.dissolve(cx)
    }
    fn as_channel(&mut self) -> &mut dyn IoChannel {
        self
    }
}

struct World {
    memory: RegionTable,
    now: Nanos,
    disk: Disk,
    handle: DiskHandle,
    root: Arc<Script>,
    want: Arc<Want>,
    stats: Arc<IoStats>,
}

impl World {
    /// A disk of 100 blocks with one reader on it.
    fn new() -> Self {
        let (root, script) = channel(100);
        let stats = Arc::new(IoStats::default());
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let (disk, handle) = Disk::new(root, Arc::clone(&stats), doorbell, || {});
        let want = Arc::new(Want::default());
        let memory = RegionTable::with_capacity(4);
        let mut world = Self { memory, now: Nanos(1), disk, handle, root: script, want, stats };
        let cx = Context { now: world.now, memory: &world.memory };
        world.disk.started(&cx);
        let reader = Box::new(Reader { want: Arc::clone(&world.want), in_flight: 0 });
        let reply = Box::new(|added: Result<(), _>| assert!(added.is_ok()));
        world.handle.send(DiskCommand::AddConsumer(ConsumerId(1), reader, reply)).ok().unwrap();
        world.turn();
        world
    }

    fn turn(&mut self) -> Work {
        self.now = self.now + Nanos::from_millis(1);
        self.disk.poll(&Context { now: self.now, memory: &self.memory })
    }

    fn turns(&mut self, count: usize) {
        for _ in 0..count {
            self.turn();
        }
    }

    /// Sends a command built around a reply and gives the place where the answer will be.
    fn ask<T: Send + 'static>(
        &mut self,
        command: impl FnOnce(Reply<T>) -> DiskCommand,
    ) -> Arc<Mutex<Option<T>>> {
        let answer = Arc::new(Mutex::new(None));
        let place = Arc::clone(&answer);
        let reply = Box::new(move |value| *place.lock().unwrap() = Some(value));
        self.handle.send(command(reply)).ok().unwrap();
        self.turn();
        answer
    }

    /// Puts a [`PlainJob`] above the disk; gives the scripts of its legs and its count of failed holds.
    fn start_job(&mut self) -> (Arc<Script>, Arc<Script>, Arc<AtomicUsize>, Arc<IoStats>) {
        let (source, source_script) = channel(100);
        let (target, target_script) = channel(250);
        let failed_holds = Arc::new(AtomicUsize::new(0));
        let job = Box::new(PlainJob {
            source,
            target: Some(target),
            wants: JobWants::Nothing,
            side: Side::Source,
            failed_holds: Arc::clone(&failed_holds),
        });
        let target_stats = Arc::new(IoStats::default());
        let stats = Arc::clone(&target_stats);
        let answer = self.ask(|reply| {
            let deadline = HOLD_DEADLINE;
            DiskCommand::StartJob(StartJob {
                job,
                target_stats: stats,
                target_bitmaps: Vec::new(),
                scan: Scan::default(),
                deadline,
                reply,
            })
        });
        self.turn();
        assert!(matches!(*answer.lock().unwrap(), Some(Ok(_))));
        (source_script, target_script, failed_holds, target_stats)
    }

    fn events(&self) -> Vec<String> {
        std::iter::from_fn(|| self.handle.next_event()).map(|event| format!("{event:?}")).collect()
    }
}

#[test]
fn requests_are_submitted_completed_and_counted() {
    let mut world = World::new();
    world.want.to_submit.store(6, Ordering::SeqCst);
    world.turn();
    assert_eq!(world.root.held.lock().unwrap().len(), 4, "as many as the channel has slots");
    world.root.let_go(3);
    world.turns(2);
    assert_eq!(world.want.completed.load(Ordering::SeqCst), 3);
    world.root.let_go(9);
    world.turns(2);
    assert_eq!(world.want.completed.load(Ordering::SeqCst), 6);
    assert_eq!(world.stats.of(IoKind::Read).ops.get(), 6);
}

#[test]
fn a_consumer_leaves_only_when_its_last_request_has_ended() {
    let mut world = World::new();
    world.want.to_submit.store(2, Ordering::SeqCst);
    world.turn();
    let answer = world.ask(|reply| DiskCommand::RemoveConsumer(ConsumerId(1), reply));
    world.turns(3000);
    assert!(answer.lock().unwrap().is_none(), "a hung request keeps it");
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.root.let_go(2);
    world.turns(2);
    assert!(matches!(*answer.lock().unwrap(), Some(Some(_))));
    assert_eq!(world.want.to_submit.load(Ordering::SeqCst), 1, "it fetched nothing more");
    let again = world.ask(|reply| DiskCommand::RemoveConsumer(ConsumerId(1), reply));
    assert!(matches!(*again.lock().unwrap(), Some(None)));
}

#[test]
fn a_root_is_replaced_only_when_drained_and_the_guest_sees_the_new_size() {
    let mut world = World::new();
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    let (root, script) = channel(200);
    let answer = world.ask(|reply| {
        DiskCommand::ReplaceRoot(ReplaceRoot { root, deadline: HOLD_DEADLINE, reply })
    });
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turns(5);
    assert!(answer.lock().unwrap().is_none());
    assert_eq!(world.root.held.lock().unwrap().len(), 1, "the gate holds new requests");
    world.root.let_go(1);
    world.turns(2);
    assert!(matches!(*answer.lock().unwrap(), Some(Ok(_))));
    world.turn();
    assert_eq!(world.want.blocks.load(Ordering::SeqCst), 200);
    assert_eq!(
        script.held.lock().unwrap().len(),
        1,
        "what waited at the gate goes to the new root"
    );
    assert_eq!(world.root.detached.load(Ordering::SeqCst), 1);
    assert_eq!(script.attached.load(Ordering::SeqCst), 1);
}

#[test]
fn a_hold_that_does_not_drain_is_undone_with_a_reason() {
    let mut world = World::new();
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    let (root, _) = channel(200);
    let deadline = Nanos::from_millis(20);
    let answer = world.ask(|reply| DiskCommand::ReplaceRoot(ReplaceRoot { root, deadline, reply }));
    let (other, _) = channel(300);
    let refused =
        world.ask(|reply| DiskCommand::ReplaceRoot(ReplaceRoot { root: other, deadline, reply }));
    assert!(matches!(*refused.lock().unwrap(), Some(Err((HoldError::Busy, _)))));
    world.turns(25);
    let undone = answer.lock().unwrap().take().unwrap().err().unwrap().0;
    assert_eq!(undone, HoldError::TimedOut { in_flight: 1, deadline });
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    assert_eq!(world.root.held.lock().unwrap().len(), 2, "the guest goes on with the old root");
}

#[test]
fn a_job_is_inserted_and_its_target_takes_over_with_the_guests_geometry() {
    let mut world = World::new();
    let (source, target, _, target_stats) = world.start_job();
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    assert_eq!(source.held.lock().unwrap().len(), 1);
    let second = world.ask(|reply| {
        let (root, _) = channel(1);
        DiskCommand::ReplaceRoot(ReplaceRoot { root, deadline: HOLD_DEADLINE, reply })
    });
    assert!(matches!(*second.lock().unwrap(), Some(Err((HoldError::JobRunning, _)))));
    let verb = world.ask(|reply| DiskCommand::Verb(JobVerb::Complete, reply));
    assert_eq!(*verb.lock().unwrap(), Some(Ok(())));
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turns(3);
    assert_eq!(target.held.lock().unwrap().len(), 0, "held at the gate");
    source.let_go(1);
    world.turns(4);
    assert_eq!(target.held.lock().unwrap().len(), 1, "the target serves the guest");
    assert_eq!(world.want.blocks.load(Ordering::SeqCst), 100, "a larger target changes nothing");
    target.let_go(1);
    world.turns(2);
    assert_eq!(target_stats.of(IoKind::Read).ops.get(), 1);
    let events = world.events();
    assert!(events[0].contains("JobEnded") && events[0].contains("Target"), "{events:?}");
    assert_eq!(events[1], "Released");
}

#[test]
fn a_job_that_cannot_be_dissolved_in_time_is_told_and_tried_again() {
    let mut world = World::new();
    let (source, _target, failed_holds, _) = world.start_job();
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    world.ask(|reply| DiskCommand::Verb(JobVerb::Complete, reply));
    world.turns(1010);
    assert_eq!(failed_holds.load(Ordering::SeqCst), 1);
    world.want.to_submit.store(1, Ordering::SeqCst);
    world.turn();
    assert_eq!(source.held.lock().unwrap().len(), 2, "the guest runs on between two holds");
    source.let_go(2);
    world.turn();
    let cx = Context { now: world.now, memory: &world.memory };
    let armed = world.disk.arm(&cx, &mut WaitSet::with_capacity(8));
    assert!(matches!(armed, Armed::Until(Some(_))), "the next hold is due: {armed:?}");
    world.turns(300);
    assert!(world.events().iter().any(|event| event.contains("JobEnded")));
}

#[test]
fn a_disk_whose_job_has_ended_is_not_held_for_a_control_that_knows_of_none_of_it() {
    let mut world = World::new();
    world.start_job();
    let deadline = HOLD_DEADLINE;
    let hold = |under_job| move |reply| DiskCommand::Hold { under_job, deadline, reply };
    let held = world.ask(hold(true));
    assert_eq!(*held.lock().unwrap(), Some(Ok(())), "the job stays where it is meanwhile");
    world.ask(|reply| DiskCommand::Verb(JobVerb::Complete, reply));
    world.turns(3);
    assert!(world.events().is_empty());
    world.handle.send(DiskCommand::Release(None)).ok().unwrap();
    world.turns(3);
    let refused = world.ask(hold(true));
    assert_eq!(*refused.lock().unwrap(), Some(Err(HoldError::Busy)));
    let held = world.ask(hold(false));
    assert_eq!(*held.lock().unwrap(), Some(Ok(())));
}

#[test]
fn a_released_channel_stays_until_its_last_request_has_ended() {
    let mut world = World::new();
    let (_source, target, _, _) = world.start_job();
    // The job left a request of its own in flight on the target.
    let Root::Job(_) = &world.disk.root else { panic!("the job is not there") };
    world.ask(|reply| DiskCommand::Verb(JobVerb::Cancel, reply));
    world.turns(3);
    assert_eq!(world.events().len(), 2, "an empty channel is released at once");
    assert_eq!(target.detached.load(Ordering::SeqCst), 1);
    let (mut hung, script) = channel(1);
    let io = BdevIo { tag: Tag(0), kind: IoKind::Flush, may_unmap: false, offset: 0, length: 0 };
    hung.submit(&Context { now: world.now, memory: &world.memory }, io, &[]);
    world.disk.releasing.push(hung);
    world.turns(100);
    assert!(world.events().is_empty());
    script.let_go(1);
    world.turns(2);
    assert_eq!(world.events(), ["Released"]);
}

#[test]
fn a_verb_without_a_job_is_refused() {
    let mut world = World::new();
    let answer = world.ask(|reply| DiskCommand::Verb(JobVerb::Pause, reply));
    assert!(matches!(*answer.lock().unwrap(), Some(Err(VerbError::NotFound { .. }))));
    let none = world.ask(DiskCommand::Query);
    assert!(matches!(*none.lock().unwrap(), Some(None)));
}
