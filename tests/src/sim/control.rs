//! The operator and the control plane: starts mirrors, tells them anything at any moment, scans for holes, keeps the record.
//!
//! The record says which disk is authoritative. It is written when a mirror asks for that, after a while, and may fail; while
//! it is being written either answer may be on the medium, so a power loss then must be survivable on both disks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use resilver_bdev::bitmap::Grid;
use resilver_bdev::job::{Commit, CopyMode, OnError, Scan, ScanReport, Side};
use resilver_bdev::mirror::{
    BitmapMode, COPY_DEPTH, Mirror, MirrorChannels, MirrorConfig, TARGET_DEPTH,
};
use resilver_bdev::{
    Bdev, BdevError, DISK_DEPTH, DiskCommand, DiskEvent, IoChannel, JobEvent, JobInfo, JobStatus,
    JobVerb, StartJob, VerbError,
};
use resilver_reactor::Nanos;

use super::bitmap;
use super::disk::{DiskOptions, FailedFlush, SimDisk};
use super::lock;
use super::probe::Probe;
use super::rng::Rng;
use super::scope::{self, Scope};
use super::sector::SECTOR;
use super::verify;
use super::world::World;

/// How long a cancelled job may take, where its source answers.
const CANCEL_WITHIN: Nanos = Nanos::from_secs(2);

/// How a mirror is set up, and what the operator does with it.
#[derive(Debug, Clone)]
pub struct MirrorPlan {
    /// The target.
    pub target: DiskOptions,
    /// What the mirror is told at its start.
    pub config: MirrorConfig,
    /// Somebody holds both disks who copies without reading and writing.
    pub offloads: bool,
}

impl MirrorPlan {
    /// What a seed makes of it.
    #[must_use]
    pub fn new(rng: &mut Rng, target: DiskOptions, block_size: u32) -> Self {
        const POLICIES: [OnError; 4] =
            [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc];
        let granularity = rng.pick(&[512, 1 << 10, 4 << 10, 16 << 10, 64 << 10]).max(block_size);
        let mut config = MirrorConfig {
            job_id: "m".to_owned(),
            copy_mode: rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]),
            granularity,
            buf_size: rng.pick(&[0, 0, u64::from(granularity), 256 << 10]),
            speed: rng.pick(&[0, 0, 0, 1 << 20, 100 << 20]),
            on_source_error: rng.pick(&POLICIES),
            on_target_error: rng.pick(&POLICIES),
            target_timeout: rng.pick(&[
                None,
                Some(Nanos::from_millis(2)),
                Some(Nanos::from_millis(50)),
            ]),
            unmap: rng.chance(700),
            target_is_zero: rng.chance(300),
            auto_finalize: rng.chance(700),
            cancel_on_guest_reset: rng.chance(200),
            verify_before_complete: rng.chance(300),
            latency_ceiling: rng.pick(&[None, None, Some(Nanos(1)), Some(Nanos::from_micros(300))]),
            auto_converge: rng.chance(500),
            ..MirrorConfig::default()
        };
        scope::draw(rng, &mut config, target.limits.block_size);
        Self { target, config, offloads: rng.chance(300) }
    }
}

/// What the operator is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// Does anything at any moment.
    Whimsical,
    /// Does nothing by itself.
    Quiet,
    /// Brings the job to this end: complete, finish or cancel.
    Wants(JobVerb),
}

/// What the disk answered.
pub(super) enum Heard {
    Held(Box<MirrorPlan>, bool),
    HeldForBitmap(bool),
    Started(Box<dyn IoChannel>),
    NotStarted(String),
    Verb(JobVerb, Result<(), VerbError>),
}

/// Which disk the record says is authoritative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// The source.
    Source,
    /// The target.
    Target,
    /// One of them: it is being written.
    Either,
}

/// A record on its way to the state directory.
#[derive(Debug, Clone, Copy)]
struct Writing {
    /// What it will say.
    says: Record,
    due: Nanos,
}

/// Where a job is, as control knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Starting,
    Running,
}

/// A mirror and what control knows about it.
pub struct Job {
    /// The mirror.
    pub probe: Probe,
    /// What it fills.
    pub target: SimDisk,
    granularity: u64,
    stage: Stage,
    /// The last state it has announced.
    pub announced: JobStatus,
    record: Record,
    writing: Option<Writing>,
    scan: HoleScan,
    /// What it brings over.
    pub(super) scope: Scope,
    /// How it works by a bitmap, if it does.
    pub(super) bitmap_mode: Option<BitmapMode>,
    /// When it was told to cancel.
    cancelled: Option<Nanos>,
    /// When it was told to finish, as the oracle counts: the copy is of a moment since.
    finishing: Option<u64>,
    before: Option<JobInfo>,
    /// Sectors of the target that were spoilt without a word.
    pub(super) spoilt: u64,
    /// A switch-over of this job compares the legs before.
    pub(super) verifies: bool,
}

/// The hole scan of a source, which runs behind what happens to it, and may tell what it saw when its job is over.
struct HoleScan {
    /// As the disk knows it.
    id: Scan,
    /// The next sector to look at; none when done.
    at: Option<usize>,
    /// What was seen and not yet told.
    seen: VecDeque<ScanReport>,
}

/// What a run has reached: a swarm that never gets anywhere proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// Mirrors started.
    pub started: u64,
    /// Mirrors that became ready.
    pub ready: u64,
    /// Mirrors that ended on their target.
    pub switched: u64,
    /// Mirrors that ended as a point-in-time copy.
    pub copies: u64,
    /// Mirrors that ended for a reason.
    pub failed: u64,
    /// Switch-overs that were undone.
    pub undone: u64,
    /// Records taken back.
    pub retracted: u64,
    /// Channels that outlived their job.
    pub lingered: u64,
}

/// The control plane of one disk.
pub struct Control {
    rng: Rng,
    job: Option<Job>,
    heard: Arc<Mutex<VecDeque<Heard>>>,
    /// Disks that a job is done with and that may have I/O in flight.
    pub retired: Vec<SimDisk>,
    /// What the scans of jobs that have ended have not told.
    unsaid: VecDeque<(Scan, ScanReport)>,
    /// The disk that the last switch-over left: what failed there may be heard of by a guest only afterwards.
    pub left: Option<SimDisk>,
    /// The disk is being held for a mirror.
    holding: bool,
    releasing: usize,
    disks: u32,
    /// What has been reached.
    pub reached: Reached,
    /// What the operator is like.
    pub operator: Operator,
    /// So many writes of the record fail.
    pub records_to_fail: u32,
    /// The longest that writing the record takes.
    pub record_takes: Nanos,
}

impl Control {
    /// A control plane with nothing to do.
    #[must_use]
    pub fn new(rng: Rng) -> Self {
        Self {
            rng,
            job: None,
            heard: Arc::default(),
            retired: Vec::new(),
            unsaid: VecDeque::new(),
            left: None,
            holding: false,
            releasing: 0,
            disks: 0,
            reached: Reached::default(),
            operator: Operator::Whimsical,
            records_to_fail: 0,
            record_takes: Nanos::from_millis(5),
        }
    }

    /// The job above the disk, or about to be.
    #[must_use]
    pub fn job(&self) -> Option<&Job> {
        self.job.as_ref()
    }

    /// The same, to change what is known of it.
    pub(super) fn job_mut(&mut self) -> Option<&mut Job> {
        self.job.as_mut()
    }

    /// Where answers go.
    pub(super) fn heard(&self) -> Arc<Mutex<VecDeque<Heard>>> {
        Arc::clone(&self.heard)
    }

    /// Channels that a job released and that are not empty yet.
    #[must_use]
    pub fn releasing(&self) -> usize {
        self.releasing
    }

    /// The disks besides the source.
    pub fn disks(&self) -> impl Iterator<Item = &SimDisk> {
        self.job.iter().map(|job| &job.target).chain(&self.retired)
    }
}

impl Job {
    /// Bytes of a chunk.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Whether it is above its disk.
    pub(super) fn is_inserted(&self) -> bool {
        self.stage == Stage::Running
    }

    /// Whether the scan has told all.
    pub(super) fn scanned(&self) -> bool {
        self.scan.at.is_none() && self.scan.seen.is_empty()
    }

    /// The disks that may be authoritative after a power loss: source, target.
    #[must_use]
    pub fn authoritative(&self) -> (bool, bool) {
        (self.record != Record::Target, self.record != Record::Source)
    }
}

impl World {
    /// Puts a mirror above the disk.
    ///
    /// # Errors
    /// The mirror refused its configuration.
    pub fn start_mirror(&mut self, plan: &MirrorPlan) -> Result<(), BdevError> {
        self.control.disks += 1;
        let control = &mut self.control;
        let name = format!("target{}", control.disks);
        let target = SimDisk::new(&name, plan.target, control.rng.fork(), &self.trace);
        target.set_failed_flush(FailedFlush::Loses);
        if plan.config.target_is_zero {
            (0..target.sectors()).for_each(|sector| target.preset(sector, None));
        }
        let scope = self.preset_scope(&plan.config, &target);
        let channels = MirrorChannels {
            source: self.in_guests_blocks(&self.source)?.open_channel(DISK_DEPTH)?,
            copy_source: self.in_guests_blocks(&self.source)?.open_channel(COPY_DEPTH)?,
            target: self.in_guests_blocks(&target)?.open_channel(TARGET_DEPTH)?,
            offload: plan.offloads.then(|| target.offload(&self.source, COPY_DEPTH)),
        };
        self.trace.line(format_args!("mirror to {name}: {plan:?}"));
        let mirror = Mirror::new(plan.config.clone(), channels)?;
        let probe = Probe::new(mirror, &self.source, &target, &self.trace);
        let scan = Scan::default();
        self.control.job = Some(Job {
            scope,
            bitmap_mode: plan.config.bitmap.as_ref().map(|working| working.mode),
            probe: probe.clone(),
            target: target.clone(),
            granularity: u64::from(plan.config.granularity),
            stage: Stage::Starting,
            announced: JobStatus::Created,
            record: Record::Source,
            writing: None,
            scan: HoleScan { id: scan.clone(), at: Some(0), seen: VecDeque::new() },
            cancelled: None,
            finishing: None,
            before: None,
            spoilt: 0,
            verifies: plan.config.verify_before_complete,
        });
        let heard = Arc::clone(&self.control.heard);
        let start = StartJob {
            job: Box::new(probe),
            target_stats: Arc::clone(target.stats()),
            target_bitmaps: Vec::new(),
            scan,
            deadline: resilver_bdev::disk::HOLD_DEADLINE,
            reply: Box::new(move |result| {
                lock(&heard).push_back(match result {
                    Ok(old) => Heard::Started(old),
                    Err((error, _job)) => Heard::NotStarted(error.to_string()),
                });
            }),
        };
        self.send(DiskCommand::StartJob(start));
        Ok(())
    }

    /// Tells the job something.
    pub fn tell(&mut self, verb: JobVerb) {
        let Some(status) = self.job_status() else { return };
        self.trace.line(format_args!("operator: {verb:?} in {status}"));
        if let (JobVerb::Finish, Some(job)) = (verb, &mut self.control.job) {
            // The first one told is the oldest that the copy can be of, whichever takes effect.
            job.finishing.get_or_insert_with(|| lock(&self.oracle).begin_read());
            self.scope_finishes();
        }
        let heard = Arc::clone(&self.control.heard);
        let reply = move |result| lock(&heard).push_back(Heard::Verb(verb, result));
        self.send(DiskCommand::Verb(verb, Box::new(reply)));
    }

    /// The state of the job now.
    #[must_use]
    pub fn job_status(&self) -> Option<JobStatus> {
        let job = self.control.job.as_ref()?;
        if job.stage == Stage::Starting {
            return None;
        }
        job.probe.look(self.now).map(|info| info.status)
    }

    /// What control does in a turn.
    pub(super) fn control(&mut self) {
        self.keep_record();
        match self.control.operator {
            Operator::Whimsical => {
                self.let_target_rot();
                self.scan_now_and_then(100);
                self.act_on_a_whim();
            }
            Operator::Wants(goal) => {
                self.scan_now_and_then(1000);
                if self.control.rng.chance(100) {
                    self.act_wisely(goal);
                }
            }
            Operator::Quiet => {}
        }
    }

    /// Reads the answers to commands.
    pub(super) fn read_answers(&mut self) {
        loop {
            let Some(heard) = lock(&self.control.heard).pop_front() else { return };
            match heard {
                Heard::Held(plan, held) => {
                    self.control.holding = false;
                    self.held_for_bitmap(*plan, held);
                }
                Heard::HeldForBitmap(held) => self.held_for_change(held),
                Heard::Started(old) => {
                    if old.in_flight() > 0 {
                        self.trace.finding("the replaced channel has I/O in flight");
                    }
                    self.control.reached.started += 1;
                    if let Some(job) = &mut self.control.job {
                        job.stage = Stage::Running;
                    }
                    self.scope_begins();
                    self.bitmap_begins();
                }
                Heard::NotStarted(why) => {
                    self.trace.line(format_args!("not started: {why}"));
                    if let Some(job) = self.control.job.take() {
                        self.control.retired.push(job.target);
                    }
                }
                Heard::Verb(verb, result) => {
                    self.trace.line(format_args!("{}: {result:?}", verb.name()));
                    if let (JobVerb::Cancel, Ok(()), Some(job)) =
                        (verb, result, &mut self.control.job)
                    {
                        job.cancelled = job.cancelled.or(Some(self.now));
                    }
                }
            }
        }
    }

    /// Hears what the disk says.
    pub(super) fn hear(&mut self, event: DiskEvent) {
        self.trace.line(format_args!("{event:?}"));
        match event {
            DiskEvent::Job(event) => self.hear_job(event),
            DiskEvent::JobEnded { side, info, releasing } => self.end_job(side, &info, releasing),
            DiskEvent::Released(channel) => {
                self.control.reached.lingered += 1;
                match self.control.releasing.checked_sub(1) {
                    Some(left) => self.control.releasing = left,
                    None => self.trace.finding("more channels released than announced"),
                }
                if channel.in_flight() > 0 {
                    self.trace.finding("a released channel has I/O in flight");
                }
            }
        }
    }

    fn hear_job(&mut self, event: JobEvent) {
        let now = self.now;
        let Some(job) = &mut self.control.job else {
            self.trace.finding("an event of no job");
            return;
        };
        let takes = Nanos(self.control.rng.below(self.control.record_takes.0));
        match event {
            JobEvent::Status(status) => {
                if !job.announced.successors().contains(&status) {
                    let before = job.announced;
                    self.trace.finding(format_args!("from {before} to {status} in one step"));
                }
                job.announced = status;
                if status == JobStatus::Ready {
                    self.control.reached.ready += 1;
                }
            }
            JobEvent::CommitRequest | JobEvent::RetractRequest => {
                let says = match event {
                    JobEvent::CommitRequest => Record::Target,
                    _ => Record::Source,
                };
                if job.record == says || job.writing.is_some() {
                    self.trace.finding("the record is asked for twice");
                }
                job.record = Record::Either;
                job.writing = Some(Writing { says, due: now + takes });
            }
            JobEvent::SwitchUndone(_) => self.control.reached.undone += 1,
            JobEvent::Error { .. }
            | JobEvent::AutoConverged
            | JobEvent::VerifyMismatch { .. }
            | JobEvent::VerifyEnded { .. } => {}
        }
    }

    /// A job has ended: the disk goes on with one of the legs.
    fn end_job(&mut self, side: Side, info: &JobInfo, releasing: usize) {
        let Some(job) = self.control.job.take() else {
            self.trace.finding("the end of no job");
            return;
        };
        self.control.releasing += releasing;
        let HoleScan { id, seen, .. } = &job.scan;
        self.control.unsaid.extend(seen.iter().map(|report| (id.clone(), *report)));
        let expected = match side {
            Side::Source => Record::Source,
            Side::Target => Record::Target,
        };
        if job.record != expected {
            let record = job.record;
            self.trace.finding(format_args!("ended on {side:?} with the record {record:?}"));
        }
        if info.status != JobStatus::Concluded {
            self.trace.finding(format_args!("ended {}", info.status));
        }
        match (info.failure, side, job.finishing) {
            // To finish a copy compares nothing: one that has rotted is wrong, and nobody promised otherwise.
            (None, Side::Source, Some(_)) if job.spoilt > 0 => {}
            (None, Side::Source, Some(since)) => self.judge_copy(&job, since),
            (None, Side::Source, None) => self.trace.finding("finished, and nobody asked"),
            _ => {}
        }
        self.scope_ends(&job.scope);
        self.bitmap_ends(&job, side, info);
        if let Some(since) = job.finishing {
            let _ = lock(&self.oracle).end_read(since, 0, None);
        }
        let reached = &mut self.control.reached;
        match (side, info.failure) {
            (Side::Target, _) => reached.switched += 1,
            (Side::Source, None) => reached.copies += 1,
            (Side::Source, Some(_)) => reached.failed += 1,
        }
        let loser = match side {
            Side::Source => job.target,
            Side::Target => {
                job.target.set_failed_flush(FailedFlush::Keeps);
                job.target.find_base();
                let old = std::mem::replace(&mut self.source, job.target);
                self.control.left = Some(old.clone());
                old
            }
        };
        self.control.retired.push(loser);
    }

    /// A finished copy is what the guests could have read at a moment since it was asked for, and survives a power loss.
    fn judge_copy(&self, job: &Job, since: u64) {
        let oracle = lock(&self.oracle);
        for sector in (0..self.sectors).filter(|sector| job.scope.copy_has(*sector)) {
            for left in job.target.after_power_loss(sector) {
                if let Err(wrong) = oracle.check_since(sector, &left, since) {
                    self.trace.finding(format_args!("the finished copy is wrong: {wrong}"));
                }
            }
        }
    }

    /// Records are written after a while.
    fn keep_record(&mut self) {
        let Some(job) = &mut self.control.job else { return };
        let due = job.writing.filter(|writing| writing.due <= self.now);
        let Some(Writing { says, .. }) = due else { return };
        let fails = match self.control.operator {
            Operator::Whimsical => self.control.rng.chance(300),
            Operator::Wants(_) | Operator::Quiet => self.control.records_to_fail > 0,
        };
        self.control.records_to_fail = self.control.records_to_fail.saturating_sub(1);
        let written = !fails;
        job.writing = None;
        let unknown = fails && says == Record::Target && self.control.rng.chance(300);
        job.record = match (says, written) {
            (says, true) => says,
            (Record::Target, false) if unknown => Record::Either,
            (Record::Target, false) => Record::Source,
            (_, false) => Record::Target,
        };
        self.trace.line(format_args!("record: {:?}", job.record));
        let answer = if says == Record::Target {
            DiskCommand::Committed(match (written, unknown) {
                (true, _) => Commit::Written,
                (false, false) => Commit::Absent,
                (false, true) => Commit::Unknown,
            })
        } else {
            self.control.reached.retracted += u64::from(written);
            DiskCommand::Retracted(written)
        };
        self.send(answer);
    }

    /// The scan looks at the source now and tells what it saw later.
    fn scan_now_and_then(&mut self, per_mille: u32) {
        if self.control.rng.chance(per_mille) {
            let most = self.control.rng.between(1, 64) as usize;
            self.look_for_holes(most);
            if self.control.rng.chance(10) {
                self.give_up_scan();
            }
        }
        if self.control.rng.chance(per_mille / 2) {
            self.report_scan();
        }
        if !self.control.unsaid.is_empty() && self.control.rng.chance(20) {
            self.report_late();
        }
    }

    /// The scan sees the next extent of the source, as it is now, in pieces of so many sectors at most.
    pub fn look_for_holes(&mut self, most: usize) {
        let Some(job) = self.control.job.as_mut().filter(|job| job.stage == Stage::Running) else {
            return;
        };
        let Some(at) = job.scan.at else { return };
        let sectors = self.source.sectors();
        let hole = self.source.is_hole(at);
        let end = (at..sectors).find(|sector| self.source.is_hole(*sector) != hole);
        let end = end.unwrap_or(sectors).min(at + most);
        if hole {
            let (offset, length) = ((at * SECTOR) as u64, ((end - at) * SECTOR) as u64);
            job.scan.seen.push_back(ScanReport::Hole { offset, length });
        }
        job.scan.seen.extend(job.scope.allocated(at, end));
        job.scan.seen.push_back(ScanReport::Upto((end * SECTOR) as u64));
        job.scan.at = Some(end).filter(|end| *end < sectors);
        if job.scan.at.is_none() {
            job.scan.seen.push_back(ScanReport::Done);
        }
    }

    /// The scan ends where it is.
    pub fn give_up_scan(&mut self) {
        let Some(job) = self.control.job.as_mut().filter(|job| job.stage == Stage::Running) else {
            return;
        };
        if let Some(at) = job.scan.at.take() {
            // What it leaves out it must say all the same.
            job.scan.seen.extend(job.scope.allocated(at, self.source.sectors()));
            job.scan.seen.push_back(ScanReport::Done);
        }
    }

    /// The scan tells the oldest of what it saw; whether there was anything to tell.
    pub fn report_scan(&mut self) -> bool {
        let told = self.control.job.as_mut();
        let told = told.and_then(|job| Some((job.scan.id.clone(), job.scan.seen.pop_front()?)));
        self.send_report("scan", told)
    }

    /// The same of a scan whose job is over.
    pub fn report_late(&mut self) -> bool {
        let told = self.control.unsaid.pop_front();
        self.send_report("the scan of an ended job", told)
    }

    fn send_report(&mut self, who: &str, told: Option<(Scan, ScanReport)>) -> bool {
        let Some((scan, report)) = told else { return false };
        self.trace.line(format_args!("{who}: {report:?}"));
        self.send(DiskCommand::Scanned(scan, report));
        true
    }

    /// An operator does anything.
    fn act_on_a_whim(&mut self) {
        let busy = !self.control.retired.iter().all(|disk| disk.in_flight() == 0);
        let Some(job) = &self.control.job else {
            if self.control.rng.chance(20) && !busy && !self.control.holding {
                let plan = self.invent_mirror();
                if bitmap::may_work_by_one(&plan) && self.control.rng.chance(300) {
                    self.control.holding = true;
                    return self.plan_by_bitmap(plan);
                }
                if let Err(refused) = self.start_mirror(&plan) {
                    self.trace.line(format_args!("refused: {refused}"));
                }
                self.spoil_target();
            }
            return;
        };
        let announced = job.announced;
        if let Some(verb) = verify::whim(&mut self.control.rng) {
            return self.tell(verb);
        }
        let rng = &mut self.control.rng;
        let mode = rng.pick(&[CopyMode::Background, CopyMode::WriteBlocking]);
        let wise = match announced {
            JobStatus::Ready => rng.pick(&[JobVerb::Complete, JobVerb::Complete, JobVerb::Finish]),
            JobStatus::Pending => JobVerb::Finalize,
            JobStatus::Paused | JobStatus::Standby => JobVerb::Resume,
            _ => JobVerb::SetSpeed(0),
        };
        let anything = [
            JobVerb::Pause,
            JobVerb::Resume,
            JobVerb::SetSpeed(rng.pick(&[0, 4096, 1 << 20])),
            JobVerb::Change(mode),
            JobVerb::SetCeiling(rng.pick(&[None, Some(Nanos(1)), Some(Nanos::from_micros(300))])),
            JobVerb::Complete,
            JobVerb::Finish,
            JobVerb::Finalize,
            JobVerb::Dismiss,
        ];
        let verb = match rng.below(1000) {
            0..=9 => wise,
            10..=16 => rng.pick(&anything),
            17 => JobVerb::Cancel,
            _ => return,
        };
        self.tell(verb);
    }

    /// The operator does what brings the job to its end.
    fn act_wisely(&mut self, goal: JobVerb) {
        let Some(job) = &self.control.job else { return };
        let limited = job.probe.look(self.now).is_some_and(|info| info.speed > 0);
        let Some(status) = self.job_status() else { return };
        match status {
            JobStatus::Aborting | JobStatus::Concluded => {}
            _ if goal == JobVerb::Cancel => self.tell(goal),
            JobStatus::Paused | JobStatus::Standby => self.tell(JobVerb::Resume),
            JobStatus::Ready => {
                let goal = job.scope.fits(goal);
                self.tell(goal);
            }
            JobStatus::Pending => self.tell(JobVerb::Finalize),
            JobStatus::Running if limited => self.tell(JobVerb::SetSpeed(0)),
            _ => {}
        }
    }

    /// A job that was cancelled ends soon, whatever its target does.
    pub(super) fn judge_cancel(&mut self) {
        let Some(job) = &mut self.control.job else { return };
        if self.source.stalled() > 0 || job.record != Record::Source {
            // A hung source holds the guests' own I/O, which nobody can give up for them; a record that cannot be taken back
            // holds the job.
            job.cancelled = job.cancelled.map(|_| self.now);
        }
        let late = |since: Nanos| self.now - since > CANCEL_WITHIN;
        if job.cancelled.is_some_and(late) {
            self.trace.finding("a cancelled job does not end");
        }
    }

    /// The numbers of a job agree with each other and with its chunks.
    pub(super) fn judge_numbers(&mut self) {
        let Some(job) = self.control.job.as_mut().filter(|job| job.stage == Stage::Running) else {
            return;
        };
        let Some(info) = job.probe.look(self.now) else { return };
        let size = self.source.sectors() as u64 * SECTOR as u64;
        let wrong = |what: &str| self.trace.finding(format_args!("{what}: {info:?}"));
        if job.scope.is_whole() && info.total_bytes != size {
            wrong("the total is not the disk's size");
        }
        if info.dirty_bytes > size || info.in_flight_bytes > size {
            wrong("more dirty or in flight than there is");
        }
        let grid = Grid::new(size, u32::try_from(job.granularity).unwrap_or(u32::MAX));
        let dirty = |chunk: u64| job.probe.is_dirty(chunk).then(|| grid.bytes(&(chunk..chunk + 1)));
        let sum: u64 = (0..grid.chunks()).filter_map(dirty).map(|it| it.end - it.start).sum();
        if info.dirty_bytes != sum {
            wrong("the dirty bytes are not those of the dirty chunks");
        }
        if info.actively_synced && info.dirty_bytes > 0 {
            wrong("synced, and not");
        }
        if let Some(before) = &job.before {
            let done = |info: &JobInfo| info.copied_bytes + info.zero_bytes + info.skipped_bytes;
            if done(&info) < done(before) {
                wrong("progress went back");
            }
        }
        job.before = Some(info);
    }
}
