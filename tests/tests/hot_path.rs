//! The promise of the hot path: a warm reactor under load uses no allocator and makes no system call but those its table
//! allows (none for disks in memory; `io_uring_enter` for a file; for reads and writes by Linux AIO `io_submit`; `futex` for a guest that
//! arrives by post-copy, once for each request that lacks a page).
//!
//! Each case runs in a process of its own, because the proof is its death: a seccomp filter on the reactor's thread kills
//! the process at the first call that is not allowed (SIGSYS), the sealed allocator aborts it at the first use (SIGABRT).
//! Two cases break the promise on purpose, so that a proof that proves nothing would be seen.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use resilver_bdev::bitmap::Grid;
use resilver_bdev::delay::{Delay, DelayConfig};
use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::job::{CopyMode, OnError, Scan, ScanReport};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::mirror::{COPY_DEPTH, Mirror, MirrorChannels, MirrorConfig, TARGET_DEPTH};
use resilver_bdev::null::Null;
use resilver_bdev::passthru::Passthru;
use resilver_bdev::sectors::Sectors;
use resilver_bdev::uring::{self, Engine, Uring, UringConfig};
use resilver_bdev::{
    Bdev, BdevIo, Completion, Consumer, ConsumerId, DISK_DEPTH, DirtyBitmap, Disk, DiskCommand,
    DiskHandle, IoError, IoKind, IoStats, JobStatus, Port, Reply, StartJob, Tag,
};
use resilver_reactor::{Armed, Context, Idle, Poller, Reactor, ReactorConfig, Work};
use resilver_sys::alloc_guard::{self, AllocGuard};
use resilver_sys::{
    BufferSlice, Mapping, OnFault, RegionId, Ring, RingMode, SubmissionThread, Userfault, WaitSet,
};
use resilver_tests::arriving_guest::{ArrivingGuest, BUFFER, Pace};
use resilver_tests::served::{Served, wait_until};
use resilver_tests::sim::ring::SLOTS;
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig};
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, Request};
use resilver_vhost::ring::Format;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

#[global_allocator]
static GUARD: AllocGuard = AllocGuard;

/// Requests before the seal, and after.
const WARM_UP: u64 = 5_000;
const SEALED: u64 = 20_000;
/// Requests in flight.
const DEPTH: u32 = 32;
/// Bytes of a request, and of the disk.
const LENGTH: u32 = 4096;
const DISK: u64 = 16 << 20;
/// What the delay bdev adds: enough to keep its queues in use.
const LATENCIES: DelayConfig =
    DelayConfig { avg_read_us: 5, p99_read_us: 50, avg_write_us: 5, p99_write_us: 50 };
/// `io_uring_enter` on x86-64 and aarch64 alike.
const IO_URING_ENTER: i64 = 426;
/// By which a fetcher is woken.
const FUTEX: i64 = if cfg!(target_arch = "x86_64") { 202 } else { 98 };
const IO_SUBMIT: i64 = if cfg!(target_arch = "x86_64") { 209 } else { 2 };

/// What the load does after it was sealed, beside its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sin {
    None,
    SystemCall,
    Allocation,
}

/// What the load asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mix {
    /// Of everything something.
    Everything,
    ReadsAndWrites,
}

/// A consumer that keeps [`DEPTH`] requests in flight, seals its thread when warm, and counts.
struct Load {
    region: RegionId,
    buffers: Arc<Mapping>,
    filter: BpfProgram,
    sin: Sin,
    mix: Mix,
    free: Vec<u32>,
    next: u64,
    completed: u64,
    failed: u64,
    sealed: bool,
    report: Arc<Report>,
}

#[derive(Default)]
struct Report {
    completed: AtomicU64,
    failed: AtomicU64,
}

impl Load {
    fn seal(&mut self) {
        // To abort takes system calls: under the filter an allocation would look like one.
        if self.sin != Sin::Allocation {
            seccompiler::apply_filter(&self.filter).unwrap();
        }
        std::mem::forget(alloc_guard::seal_or_abort());
        self.sealed = true;
    }

    fn next_io(&mut self, slot: u32) -> BdevIo {
        let block = self.next.wrapping_mul(2_654_435_761) % (DISK / u64::from(LENGTH));
        let kind = match (self.next % 16, self.mix) {
            (0, Mix::Everything) => IoKind::Flush,
            (1, Mix::Everything) => IoKind::Unmap,
            (2, Mix::Everything) => IoKind::WriteZeroes,
            (0..=8, _) => IoKind::Read,
            _ => IoKind::Write,
        };
        self.next += 1;
        let (offset, length) = match kind {
            IoKind::Flush => (0, 0),
            _ => (block * u64::from(LENGTH), u64::from(LENGTH)),
        };
        BdevIo { tag: Tag(slot), kind, may_unmap: true, offset, length }
    }
}

impl Consumer for Load {
    fn attach(&mut self, cx: &Context<'_>) {
        self.region = cx.memory.insert(Arc::clone(&self.buffers)).unwrap();
    }

    fn poll(&mut self, cx: &Context<'_>, port: &mut Port<'_>) -> Work {
        if !self.sealed && self.completed >= WARM_UP {
            self.seal();
        }
        if self.sealed && self.sin == Sin::SystemCall {
            std::thread::yield_now();
        }
        if self.sealed && self.sin == Sin::Allocation {
            drop(std::hint::black_box(Box::new(self.next)));
        }
        while let Some(slot) = self.free.pop() {
            let io = self.next_io(slot);
            if port.free(io.kind) == 0 {
                self.free.push(slot);
                break;
            }
            let offset = u64::from(slot * LENGTH);
            let buffer = BufferSlice { region: self.region, length: LENGTH, offset };
            let payload = if io.kind.has_payload() { &[buffer][..] } else { &[] };
            port.submit(cx, io, payload);
        }
        Work::Busy
    }

    fn complete(&mut self, cx: &Context<'_>, completion: Completion, stats: &IoStats) {
        self.free.push(completion.tag.0);
        self.completed += 1;
        self.failed += u64::from(completion.result.is_err());
        stats.record(IoKind::Read, u64::from(LENGTH), cx.now, completion.result.is_ok());
    }

    fn publish(&mut self, _cx: &Context<'_>) {
        self.report.failed.store(self.failed, Ordering::Relaxed);
        self.report.completed.store(self.completed, Ordering::Release);
    }

    fn in_flight(&self) -> u32 {
        DEPTH - u32::try_from(self.free.len()).unwrap()
    }

    fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
        Armed::Ready
    }

    fn disarm(&mut self, _cx: &Context<'_>) {}
}

/// Seals the reactor's thread when it is told to, beside whatever else is polled there.
struct Sealer {
    filter: BpfProgram,
    order: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Poller for Sealer {
    fn poll(&mut self, _cx: &Context<'_>) -> Work {
        if self.order.swap(false, Ordering::AcqRel) {
            seccompiler::apply_filter(&self.filter).unwrap();
            std::mem::forget(alloc_guard::seal_or_abort());
            self.done.store(true, Ordering::Release);
        }
        Work::Idle
    }

    fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
        Armed::Ready
    }

    fn disarm(&mut self, _cx: &Context<'_>) {}
}

/// A served guest's ring: its format, and whether requests in flight are tracked.
#[derive(Debug, Clone, Copy)]
struct ServedRing {
    format: Format,
    tracked: bool,
}

const SPLIT: ServedRing = ServedRing { format: Format::Split, tracked: false };
const PACKED: ServedRing = ServedRing { format: Format::Packed, tracked: false };

impl ServedRing {
    fn tracked(self) -> Self {
        Self { tracked: true, ..self }
    }
}

/// Serves a disk over vhost-user to a guest that polls, and seals its reactor under the guest's load.
fn hammer_served(bdev: &dyn Bdev, allowed: &[i64], ring: ServedRing) {
    let spin = ReactorConfig { idle: Idle::Spin, ..ReactorConfig::default() };
    let served = Served::with(bdev, spin, |_| ());
    let (order, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let sealer =
        Sealer { filter: filter(allowed), order: Arc::clone(&order), done: Arc::clone(&done) };
    served.reactor().add(Box::new(sealer)).unwrap();
    // With event indexes a polling guest is interrupted once in 65536 requests: the index comes round.
    let format = match ring.format {
        Format::Split => ConnectionConfig::WITHOUT_PACKED,
        Format::Packed => u64::MAX,
    };
    let config = ConnectionConfig {
        accept: ConnectionConfig::WITHOUT_EVENT_INDEX & format,
        inflight: ring.tracked,
        data_bytes: (DEPTH * LENGTH) as usize,
        ..ConnectionConfig::default()
    };
    let (connection, mut queues) = Connection::connect(&served.socket(), config).unwrap();
    assert_eq!(connection.records_inflight(), ring.tracked);
    let queue = &mut queues[0];
    queue.disarm();
    let mut free: Vec<u32> = (0..DEPTH).collect();
    let (mut next, mut ended, mut sealed) = (0u64, 0u64, 0u64);
    let deadline = Instant::now() + Duration::from_secs(120);
    while sealed < SEALED {
        while let Some(slot) = free.pop() {
            let (request, data) = next_request(next, slot);
            queue.submit(request, &data, u64::from(slot)).unwrap();
            next += 1;
        }
        queue.publish();
        while let Some(finished) = queue.pop().unwrap() {
            assert_eq!(finished.result, Ok(()));
            free.push(u32::try_from(finished.tag).unwrap());
            ended += 1;
            sealed += u64::from(done.load(Ordering::Acquire));
            if ended == WARM_UP {
                order.store(true, Ordering::Release);
            }
        }
        assert!(Instant::now() < deadline, "the load did not get on");
    }
    std::process::exit(0);
}

/// Serves a guest that arrives by post-copy, with a full ring, and seals the reactor while most of its pages are missing.
fn hammer_arriving(format: Format) {
    let bdev = Malloc::new("disk", 512, memory_blocks()).unwrap();
    let spin = ReactorConfig { idle: Idle::Spin, ..ReactorConfig::default() };
    let served = Served::with(&bdev, spin, |_| ());
    let (order, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let sealer =
        Sealer { filter: filter(&[FUTEX]), order: Arc::clone(&order), done: Arc::clone(&done) };
    served.reactor().add(Box::new(sealer)).unwrap();
    let mut guest = ArrivingGuest::new(format, 1, 3);
    for slot in 0..SLOTS {
        let kind = if slot % 2 == 0 { IoKind::Read } else { IoKind::Write };
        let (offset, length) = (slot as u64 * BUFFER, BUFFER);
        guest.put(ArrivingGuest::buffer(0, slot), &[7; BUFFER as usize]);
        guest.offer(0, slot, &BdevIo { tag: Tag(0), kind, may_unmap: false, offset, length });
    }
    let arrival = guest.arrive(&served.socket(), Pace { most_us: 2000, ..Pace::default() });
    let ended = || served.stats().requests.get();
    wait_until("the first requests", || ended() >= 3);
    order.store(true, Ordering::Release);
    wait_until("the seal", || done.load(Ordering::Acquire));
    let left = SLOTS as u64 - ended();
    assert!(left > 10, "only {left} requests are left");
    wait_until("the others", || ended() == SLOTS as u64);
    assert!(arrival.faults() > 5 * left);
    std::process::exit(0);
}

/// The guest's `number`th request, with the data buffer of `slot`.
fn next_request(number: u64, slot: u32) -> (Request, Vec<DataBuffer>) {
    let block = number.wrapping_mul(2_654_435_761) % (DISK / u64::from(LENGTH));
    let (offset, length) = (block * u64::from(LENGTH), u64::from(LENGTH));
    let data = vec![DataBuffer { offset: u64::from(slot * LENGTH), length: LENGTH }];
    match number % 16 {
        0 => (Request::Flush, Vec::new()),
        1 => (Request::Discard { offset, length }, Vec::new()),
        2 => (Request::WriteZeroes { offset, length, may_unmap: true }, Vec::new()),
        3 => (Request::GetId, vec![DataBuffer { length: 20, ..data[0] }]),
        4..=8 => (Request::Read { offset }, data),
        _ => (Request::Write { offset }, data),
    }
}

/// A filter that kills the process at any system call but these.
fn filter(allowed: &[i64]) -> BpfProgram {
    let rules: BTreeMap<i64, Vec<_>> = allowed.iter().map(|call| (*call, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch).unwrap();
    filter.try_into().unwrap()
}

/// Runs the load over a disk until enough requests have ended under the seal.
fn hammer(bdev: &dyn Bdev, allowed: &[i64], sin: Sin) {
    hammer_by(bdev, None, allowed, sin, Mix::Everything);
}

/// Sends a command and waits for its answer, which must come before the seal.
fn ask<T: Send + 'static>(handle: &DiskHandle, command: impl FnOnce(Reply<T>) -> DiskCommand) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    let reply = Box::new(move |value| sender.send(value).unwrap());
    handle.send(command(reply)).ok().unwrap();
    receiver.recv_timeout(Duration::from_secs(60)).unwrap()
}

/// In which part of a mirror's life the load runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// The copier is at work, slowly enough to be so until the end.
    Copying(CopyMode),
    /// Both legs are equal and get every write.
    InSync,
    /// In sync once; now every write to the target fails and is forgiven.
    Failing,
}

/// Mirrors the disk to `target` and waits for the part of its life that is wanted.
fn mirror(handle: &DiskHandle, bdev: &dyn Bdev, target: &ErrorBdev, life: Life) {
    let (copy_mode, speed) = match life {
        Life::Copying(mode) => (mode, 256 << 10),
        Life::InSync | Life::Failing => (CopyMode::WriteBlocking, 0),
    };
    let config = MirrorConfig {
        job_id: "job".to_owned(),
        copy_mode,
        granularity: 64 << 10,
        buf_size: 0,
        speed,
        on_source_error: OnError::Report,
        on_target_error: OnError::Ignore,
        target_timeout: None,
        unmap: true,
        target_is_zero: false,
        auto_finalize: true,
        ..MirrorConfig::default()
    };
    let channels = MirrorChannels {
        source: bdev.open_channel(DISK_DEPTH).unwrap(),
        copy_source: bdev.open_channel(COPY_DEPTH).unwrap(),
        target: target.open_channel(TARGET_DEPTH).unwrap(),
        offload: None,
    };
    let mut job = Box::new(Mirror::new(config, channels).unwrap());
    job.prepare();
    let target_stats = Arc::clone(target.stats());
    let scan = Scan::default();
    let started = ask(handle, |reply| {
        let deadline = HOLD_DEADLINE;
        DiskCommand::StartJob(StartJob {
            job,
            target_stats,
            target_bitmaps: Vec::new(),
            scan: scan.clone(),
            deadline,
            reply,
        })
    });
    assert!(started.is_ok());
    handle.send(DiskCommand::Scanned(scan, ScanReport::Done)).ok().unwrap();
    if let Life::Copying(_) = life {
        return;
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while ask(handle, DiskCommand::Query).unwrap().status != JobStatus::Ready {
        assert!(Instant::now() < deadline, "the mirror did not become ready");
    }
    if life == Life::Failing {
        let fail = Injection {
            kind: Some(IoKind::Write),
            effect: Effect::Fail(IoError::IO),
            count: FOREVER,
            range: None,
        };
        target.inject(fail).unwrap();
    }
}

/// As [`hammer`], over a disk that is being mirrored.
fn hammer_mirrored(bdev: &dyn Bdev, target: (&ErrorBdev, Life), allowed: &[i64]) {
    hammer_by(bdev, Some(target), allowed, Sin::None, Mix::Everything);
}

fn hammer_by(
    bdev: &dyn Bdev,
    target: Option<(&ErrorBdev, Life)>,
    allowed: &[i64],
    sin: Sin,
    mix: Mix,
) {
    let config = ReactorConfig { idle: Idle::Spin, ..ReactorConfig::default() };
    let reactor = Reactor::start(config, 0).unwrap();
    let root = bdev.open_channel(DISK_DEPTH).unwrap();
    let doorbell = reactor.handle().doorbell();
    let (disk, handle) = Disk::new(root, Arc::clone(bdev.stats()), doorbell, || {});
    // Every disk of these tests has bitmaps that record: to mark them is part of the path.
    let grid = Grid::new(bdev.geometry().size(), 4096);
    let bitmap = || Arc::new(DirtyBitmap::new(grid, true));
    let disk = disk.with_bitmaps(vec![bitmap(), bitmap()]);
    let report = Arc::new(Report::default());
    let load = Load {
        region: RegionId::NONE,
        buffers: Mapping::anonymous((DEPTH * LENGTH) as usize).unwrap(),
        filter: filter(allowed),
        sin,
        mix,
        free: (0..DEPTH).collect(),
        next: 0,
        completed: 0,
        failed: 0,
        sealed: false,
        report: Arc::clone(&report),
    };
    reactor.handle().add(Box::new(disk)).unwrap();
    if let Some((target, life)) = target {
        mirror(&handle, bdev, target, life);
    }
    let reply = Box::new(|added: Result<(), _>| assert!(added.is_ok()));
    handle.send(DiskCommand::AddConsumer(ConsumerId(1), Box::new(load), reply)).ok().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while report.completed.load(Ordering::Acquire) < WARM_UP + SEALED {
        assert!(Instant::now() < deadline, "the load did not get on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(report.failed.load(Ordering::Relaxed), 0, "requests failed");
    // The reactor's thread is sealed for good; nothing more can be asked of it.
    std::process::exit(0);
}

fn memory_blocks() -> u64 {
    DISK / 512
}

fn file(direct: bool, mode: RingMode) -> Uring {
    file_by(&std::env::temp_dir(), direct, mode, None)
}

/// A file on tmpfs, by this engine or the one that is chosen for it.
fn file_in_memory(engine: Option<Engine>) -> Uring {
    file_by(Path::new("/dev/shm"), true, RingMode::Enter, engine)
}

fn file_by(folder: &Path, direct: bool, mode: RingMode, engine: Option<Engine>) -> Uring {
    let path = folder.join(format!("hot-path-{}.raw", std::process::id()));
    uring::create(&path, DISK).unwrap();
    let config = UringConfig {
        name: "disk".to_owned(),
        path: path.clone(),
        block_size: None,
        read_only: false,
        direct,
        mode,
        engine,
    };
    let disk = Uring::open(config).unwrap();
    std::fs::remove_file(path).unwrap();
    disk
}

/// The cases, by the name that the parent gives its child.
fn child(case: &str) {
    let null = || Null::new("disk", 512, memory_blocks()).unwrap();
    let malloc = || Malloc::new("disk", 512, memory_blocks()).unwrap();
    match case {
        "null" => hammer(&null(), &[], Sin::None),
        "malloc" => hammer(&malloc(), &[], Sin::None),
        "passthru" => hammer(&Passthru::new("layer", Arc::new(null())), &[], Sin::None),
        // Every request is a part of a block.
        "sectors" => {
            let large = Malloc::new("disk", 2 * LENGTH, DISK / u64::from(2 * LENGTH)).unwrap();
            hammer(&Sectors::new(Arc::new(large), 512).unwrap(), &[], Sin::None)
        }
        "delay" => {
            hammer(&Delay::new("layer", Arc::new(null()), LATENCIES).unwrap(), &[], Sin::None)
        }
        "error" => hammer(&ErrorBdev::new("layer", Arc::new(null())), &[], Sin::None),
        // The export is polled on a reactor of its own, and so wants no kick.
        "virtio" => {
            let disk = malloc();
            let spin = ReactorConfig { idle: Idle::Spin, ..ReactorConfig::default() };
            let served = Served::with(&disk, spin, |_| ());
            let config = VirtioConfig {
                name: "remote".to_owned(),
                socket: served.socket(),
                num_queues: None,
                reconnect_timeout: None,
            };
            hammer(&Virtio::connect(config).unwrap(), &[], Sin::None);
        }
        "uring direct" => hammer(&file(true, RingMode::Enter), &[IO_URING_ENTER], Sin::None),
        "uring buffered" => hammer(&file(false, RingMode::Enter), &[IO_URING_ENTER], Sin::None),
        "uring sqpoll" => {
            let thread = SubmissionThread::start(0).unwrap();
            let disk = file(true, RingMode::SubmissionThread(thread));
            hammer(&disk, &[IO_URING_ENTER], Sin::None);
        }
        "tmpfs" => hammer(&file_in_memory(None), &[IO_URING_ENTER], Sin::None),
        "tmpfs, aio" => {
            let disk = file_in_memory(Some(Engine::Aio));
            hammer(&disk, &[IO_SUBMIT, IO_URING_ENTER], Sin::None);
        }
        "tmpfs, aio, reads and writes" => {
            let disk = file_in_memory(Some(Engine::Aio));
            hammer_by(&disk, None, &[IO_SUBMIT], Sin::None, Mix::ReadsAndWrites);
        }
        "null, served" => hammer_served(&null(), &[], SPLIT),
        "malloc, split" => hammer_served(&malloc(), &[], SPLIT),
        "malloc, packed" => hammer_served(&malloc(), &[], PACKED),
        "malloc, split, tracked" => hammer_served(&malloc(), &[], SPLIT.tracked()),
        "malloc, packed, tracked" => hammer_served(&malloc(), &[], PACKED.tracked()),
        "uring, served" => hammer_served(&file(true, RingMode::Enter), &[IO_URING_ENTER], SPLIT),
        "arriving, split" => hammer_arriving(Format::Split),
        "arriving, packed" => hammer_arriving(Format::Packed),
        "mirror copying, background" => over_malloc(Life::Copying(CopyMode::Background)),
        "mirror copying, write-blocking" => over_malloc(Life::Copying(CopyMode::WriteBlocking)),
        "mirror in sync" => over_malloc(Life::InSync),
        "mirror with a failing target" => over_malloc(Life::Failing),
        "mirror of files in sync" => {
            let source = file(true, RingMode::Enter);
            let target = ErrorBdev::new("target", Arc::new(file(true, RingMode::Enter)));
            hammer_mirrored(&source, (&target, Life::InSync), &[IO_URING_ENTER]);
        }
        "mirror on tmpfs in sync" => {
            let source = file_in_memory(None);
            let target = ErrorBdev::new("target", Arc::new(file_in_memory(None)));
            hammer_mirrored(&source, (&target, Life::InSync), &[IO_URING_ENTER]);
        }
        "a system call" => hammer(&null(), &[], Sin::SystemCall),
        "an allocation" => hammer(&null(), &[], Sin::Allocation),
        other => panic!("there is no case '{other}'"),
    }
}

fn over_malloc(life: Life) {
    let source = Malloc::new("disk", 512, memory_blocks()).unwrap();
    let medium = Malloc::new("medium", 512, memory_blocks()).unwrap();
    let target = ErrorBdev::new("target", Arc::new(medium));
    hammer_mirrored(&source, (&target, life), &[]);
}

const CHILD: &str = "RESILVER_HOT_PATH_CASE";

/// Runs a case in a process of its own; the signal that ended it, if one did.
fn run(case: &str) -> Option<i32> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_case_of_a_child_process", "--test-threads=1", "--nocapture"])
        .env(CHILD, case)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || output.status.signal().is_some(), "{case}: {said}");
    output.status.signal()
}

/// Not a test of its own: what the others run in their child processes.
#[test]
fn the_case_of_a_child_process() {
    if let Ok(case) = std::env::var(CHILD) {
        child(&case);
    }
}

#[test]
fn disks_in_memory_make_no_system_call_and_allocate_nothing() {
    for case in ["null", "malloc", "passthru", "delay", "error", "sectors", "virtio"] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_file_costs_only_the_enter_and_allocates_nothing() {
    // A submission thread that was kept from its core for a second takes itself for idle and has to be woken; it shares the
    // core here, so its wake-up cannot be forbidden.
    for case in ["uring direct", "uring buffered", "uring sqpoll"] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_file_on_tmpfs_costs_only_the_enter() {
    let name = "a_file_on_tmpfs_costs_only_the_enter";
    if !Ring::works_inline() {
        let remedy = "run it on Linux 6.6 or later";
        return resilver_tests::skip(name, "io_uring carries out nothing on tmpfs itself", remedy);
    }
    for case in ["tmpfs", "mirror on tmpfs in sync"] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_file_by_aio_costs_one_call_for_reads_and_writes_and_another_for_the_rest() {
    for case in ["tmpfs, aio", "tmpfs, aio, reads and writes"] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn serving_a_guest_that_polls_costs_nothing_beyond_its_disk() {
    for case in [
        "null, served",
        "malloc, split",
        "malloc, packed",
        "malloc, split, tracked",
        "malloc, packed, tracked",
        "uring, served",
    ] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_guest_whose_memory_is_missing_costs_a_wake_of_its_fetcher_and_nothing_else() {
    if let Err(error) = Userfault::open(OnFault::Wait) {
        return resilver_tests::skip(
            "a_guest_whose_memory_is_missing_costs_a_wake_of_its_fetcher_and_nothing_else",
            &format!("no userfaultfd: {error}"),
            "run it on Linux 5.11 or later, where nothing forbids the system call",
        );
    }
    for case in ["arriving, split", "arriving, packed"] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_mirrored_disk_keeps_the_promise_whatever_its_mirror_does() {
    for case in [
        "mirror copying, background",
        "mirror copying, write-blocking",
        "mirror in sync",
        "mirror with a failing target",
        "mirror of files in sync",
    ] {
        assert_eq!(run(case), None, "{case}: ended by a signal");
    }
}

#[test]
fn a_broken_promise_is_seen() {
    assert_eq!(run("a system call"), Some(31), "SIGSYS");
    assert_eq!(run("an allocation"), Some(6), "SIGABRT");
}
