//! The throttle at work: a mirror over devices that take their time, and a guest that measures.
//!
//! A device serves one request after the other, each in a time that its length gives: whoever comes while it works waits.
//! Time is counted, so every run is the same.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::*;
use crate::channel::Limits;
use crate::io::Completion;

const DISK: u64 = 64 << 20;

/// When each device is free again, by leg.
type Busy = Arc<Mutex<[Nanos; 2]>>;

/// A queue of one leg's device, full of zeroes.
struct Served {
    limits: Limits,
    leg: Side,
    busy: Busy,
    /// What was asked for, in the order in which it ends.
    queue: VecDeque<(Nanos, Tag)>,
}

impl IoChannel for Served {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn free(&self, _kind: IoKind) -> u32 {
        1024
    }

    fn submit(&mut self, cx: &Context<'_>, io: BdevIo, _payload: &[BufferSlice]) {
        // 20 us and 2 ns a byte: 500 MB/s.
        let takes = Nanos::from_micros(20) + Nanos(io.length * 2);
        let mut busy = self.busy.lock().unwrap();
        let free = &mut busy[self.leg as usize];
        *free = (*free).max(cx.now) + takes;
        self.queue.push_back((*free, io.tag));
    }

    fn commit(&mut self, _cx: &Context<'_>) {}

    fn poll(&mut self, cx: &Context<'_>, done: &mut CompletionBatch) {
        while done.room() > 0
            && let Some((_, tag)) = self.queue.pop_front_if(|(ends, _)| *ends <= cx.now)
        {
            done.push(Completion { tag, result: Ok(()) });
        }
    }

    fn in_flight(&self) -> u32 {
        u32::try_from(self.queue.len()).unwrap()
    }
}

/// A mirror between two such devices, and a guest that reads 4 KiB every so often, one at a time.
struct Trial {
    memory: RegionTable,
    buffer: RegionId,
    mirror: Mirror,
    now: Nanos,
    asked: Option<Nanos>,
    /// How often the guest asks, if it has its answer.
    every: Nanos,
    latencies: Vec<Nanos>,
}

impl Trial {
    fn new(latency_ceiling: Option<Nanos>) -> Self {
        let busy = Busy::default();
        let geometry = Malloc::new("geometry", BLOCK, DISK / u64::from(BLOCK)).unwrap();
        let limits = *geometry.open_channel(1).unwrap().limits();
        let open = |leg| {
            let (busy, queue) = (Arc::clone(&busy), VecDeque::new());
            Box::new(Served { limits, leg, busy, queue })
        };
        let channels = MirrorChannels {
            source: open(Side::Source),
            copy_source: open(Side::Source),
            target: open(Side::Target),
            offload: None,
        };
        let config = MirrorConfig { latency_ceiling, ..blocking() };
        let mirror = Mirror::new(config, channels).unwrap();
        let memory = RegionTable::with_capacity(16);
        let buffer = memory.insert(Mapping::anonymous(4096).unwrap()).unwrap();
        let (now, asked, latencies) = (Nanos::ZERO, None, Vec::new());
        let every = Nanos::from_millis(1);
        let mut trial = Self { memory, buffer, mirror, now, asked, every, latencies };
        let cx = Context { now: trial.now, memory: &trial.memory };
        trial.mirror.attach(&cx);
        trial.mirror.scanned(&cx, ScanReport::Done);
        trial
    }

    fn ask(&mut self) {
        let cx = Context { now: self.now, memory: &self.memory };
        let offset = self.now.0 * 7919 / 10_000 * 4096 % DISK;
        let io = BdevIo { tag: Tag(0), kind: IoKind::Read, may_unmap: false, offset, length: 4096 };
        let slice = BufferSlice { region: self.buffer, length: 4096, offset: 0 };
        self.mirror.submit(&cx, io, &[slice]);
        self.asked = Some(self.now);
    }

    /// Lets time pass, with the guest at work or not.
    fn run(&mut self, span: Nanos, guest: bool) {
        let end = self.now + span;
        let mut next = self.now;
        while self.now < end {
            if guest && self.asked.is_none() && self.now >= next {
                self.ask();
                next = self.now + self.every;
            }
            self.turn();
        }
    }

    fn turn(&mut self) {
        let cx = Context { now: self.now, memory: &self.memory };
        let mut done = CompletionBatch::with_capacity(4);
        self.mirror.commit(&cx);
        self.mirror.poll(&cx, &mut done);
        self.mirror.turn(&cx);
        if !done.as_slice().is_empty()
            && let Some(asked) = self.asked.take()
        {
            self.latencies.push(self.now - asked);
        }
        self.now = self.now + Nanos::from_micros(10);
    }

    /// The guest's 99th percentile since this was last asked.
    fn p99(&mut self) -> Nanos {
        let mut latencies = std::mem::take(&mut self.latencies);
        latencies.sort_unstable();
        latencies[latencies.len() * 99 / 100]
    }

    fn verb(&mut self, verb: JobVerb) -> Result<(), VerbError> {
        let cx = Context { now: self.now, memory: &self.memory };
        self.mirror.verb(&cx, verb)
    }

    fn moved(&self) -> u64 {
        DISK - self.mirror.info(self.now).dirty_bytes
    }
}

#[test]
fn a_guest_keeps_its_latency_under_the_ceiling_and_the_copier_has_the_idle_time() {
    let mut without = Trial::new(None);
    without.run(Nanos::from_millis(100), true);
    let p99 = without.p99();
    assert!(p99 > Nanos::from_micros(250), "the copy is felt: {p99}");

    let ceiling = Nanos::from_micros(200);
    let mut trial = Trial::new(Some(ceiling));
    trial.run(Nanos::from_secs(1), true);
    let _settling = trial.p99();
    let before = trial.moved();
    trial.run(Nanos::from_secs(2), true);
    let (p99, beside) = (trial.p99(), trial.moved() - before);
    assert!(p99 <= ceiling, "{p99}");
    assert!(beside > 4 << 20, "{beside} bytes in two seconds are hardly more than the floor");

    // The same job, with the guest gone: at the device's own speed, after a moment.
    let left = DISK - trial.moved();
    trial.run(Nanos::from_millis(500), false);
    let begun = trial.now;
    while trial.mirror.info(trial.now).status != JobStatus::Ready {
        trial.turn();
    }
    let took = trial.now - begun;
    assert!(left > 8 << 20 && took < Nanos(left * 3), "{left} bytes took {took}");
}

#[test]
fn a_guest_that_asks_seldom_is_not_forgotten_between_two_requests() {
    let mut trial = Trial::new(Some(Nanos::from_millis(1)));
    for _ in 0..30 {
        trial.ask();
        trial.run(Nanos::from_millis(10), false);
    }
    assert!(trial.latencies.len() == 30 && trial.p99() < Nanos::from_millis(1));
    assert!(trial.mirror.info(trial.now).status == JobStatus::Running, "it is held back");
}

#[test]
fn a_ceiling_is_changed_while_the_job_runs() {
    let mut trial = Trial::new(None);
    assert_eq!(trial.mirror.info(trial.now).throttle, None);
    trial.verb(JobVerb::SetCeiling(Some(Nanos::from_micros(30)))).unwrap();
    trial.run(Nanos::from_secs(1), true);
    let held = trial.mirror.info(trial.now).throttle.unwrap();
    assert!(held < 8 << 20, "{held}");
    trial.verb(JobVerb::SetCeiling(None)).unwrap();
    assert_eq!(trial.mirror.info(trial.now).throttle, None);
    trial.run(Nanos::from_secs(1), true);
    assert_eq!(trial.mirror.info(trial.now).status, JobStatus::Ready);
}

#[test]
fn a_guest_keeps_most_of_what_it_gets_done_beside_a_copier_of_the_same_device() {
    const SPAN: Nanos = Nanos::from_millis(100);
    let mut trial = Trial::new(None);
    trial.every = Nanos::ZERO;
    let answered = |trial: &mut Trial| {
        trial.run(SPAN, true);
        std::mem::take(&mut trial.latencies).len()
    };
    let beside = answered(&mut trial);
    let info = trial.mirror.info(trial.now);
    assert_eq!(info.status, JobStatus::Running, "the disk is too small: {info:?}");
    let done = info.copied_bytes + info.zero_bytes + info.skipped_bytes;
    while trial.mirror.info(trial.now).status == JobStatus::Running {
        trial.run(Nanos::from_millis(10), false);
    }
    let alone = answered(&mut trial);
    assert!(beside * 100 >= alone * 70, "{beside} of {alone} requests");
    // The device reads 500 MB a second, and what is read is written one after the other.
    assert!(done >= 5 << 20, "{done} bytes in a tenth of a second");
}
