//! Block jobs: long work over a disk, with QEMU's states, verbs and wording.
//!
//! A job that is inserted above a disk is an [`IoChannel`] like any other, which is how it sees the guest's I/O. The
//! generic verbs of every job come in through [`BlockJob::verb`]; what it has to say goes out through
//! [`BlockJob::take_event`]; what it needs of the disk (a hold) it states in [`BlockJob::wants`]. A job never waits: it is
//! polled as a channel.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use resilver_reactor::{Context, Nanos};
use resilver_sys::RegionId;

use crate::channel::IoChannel;
use crate::io::IoError;
use crate::verify::{VerifyInfo, VerifyRequest, VerifyState};

/// The states of a job (QEMU `JobStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobStatus {
    /// Not a job yet.
    Undefined,
    /// Made, not started.
    Created,
    /// At work.
    Running,
    /// Told to pause while running.
    Paused,
    /// In sync: the operator may complete it.
    Ready,
    /// Told to pause while ready.
    Standby,
    /// Done with its work, waiting for the jobs it is grouped with.
    Waiting,
    /// Waiting to be finalized.
    Pending,
    /// Giving up.
    Aborting,
    /// Over; the result can be read until it is dismissed.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    /// All states.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Where this state may go: QEMU's `JobSTT`, plus the two ways back to Ready that a switch-over needs (a record that
    /// could not be written, a hold that was undone: design.md §4 leaves the job READY with the reason).
    #[must_use]
    pub fn successors(self) -> &'static [Self] {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        match self {
            Self::Undefined => &[Created],
            Self::Created => &[Running, Aborting, Null],
            Self::Running => &[Paused, Ready, Waiting, Aborting],
            Self::Paused => &[Running],
            Self::Ready => &[Standby, Waiting, Aborting],
            Self::Standby => &[Ready],
            Self::Waiting => &[Pending, Aborting, Ready],
            Self::Pending => &[Aborting, Concluded, Ready],
            Self::Aborting => &[Aborting, Concluded],
            Self::Concluded => &[Null],
            Self::Null => &[],
        }
    }

    /// Whether the job can still do something to its disks.
    #[must_use]
    pub fn is_live(self) -> bool {
        !matches!(self, Self::Undefined | Self::Concluded | Self::Null)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How guest writes reach the target while a mirror copies (QEMU `MirrorCopyMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CopyMode {
    /// Guest writes go to the source and are copied later.
    Background,
    /// Guest writes go to both and are acknowledged when both have them.
    WriteBlocking,
}

impl CopyMode {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

/// What is done about an error of one side (QEMU `BlockdevOnError`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnError {
    /// The job fails.
    Report,
    /// The range stays dirty and is tried again, ever more slowly.
    Ignore,
    /// The job pauses.
    Stop,
    /// The job pauses if room ran out, else it fails.
    Enospc,
}

impl OnError {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
            Self::Enospc => "enospc",
        }
    }
}

/// What an operator may tell a job to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobVerb {
    /// Give up at once; the target's content is not promised.
    Cancel,
    /// Rest until resumed; what is in flight ends first.
    Pause,
    /// Go on after a pause, the operator's or an error's.
    Resume,
    /// Change the copy rate: bytes a second, 0 for no limit.
    SetSpeed(u64),
    /// Switch over to the target.
    Complete,
    /// Let the pending graph change happen.
    Finalize,
    /// Forget the concluded job.
    Dismiss,
    /// Change the copy mode.
    Change(CopyMode),
    /// Change the latency that the copier is to leave the guest; none for as it is without a ceiling.
    SetCeiling(Option<Nanos>),
    /// Converge and leave the target as a point-in-time copy (QEMU's soft cancel).
    Finish,
    /// Compare both legs while they are in use.
    Verify(VerifyRequest),
    /// Give the comparison up.
    StopVerify,
}

impl JobVerb {
    /// QEMU's word for it, as its refusals use it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed(_) => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change(_) | Self::SetCeiling(_) => "change",
            Self::Finish => "finish",
            Self::Verify(_) => "verify",
            Self::StopVerify => "stop-verify",
        }
    }

    /// Whether the verb is legal in this state (QEMU's `JobVerbTable`). Finish is QEMU's cancel of a job that is ready.
    #[must_use]
    pub fn legal_in(self, status: JobStatus) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match self {
            Self::Cancel => {
                matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Self::Pause
            | Self::Resume
            | Self::SetSpeed(_)
            | Self::Change(_)
            | Self::SetCeiling(_) => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Self::Complete | Self::Finish => matches!(status, Ready | Standby),
            Self::Verify(_) => matches!(status, Running | Paused | Ready | Standby),
            Self::StopVerify => {
                matches!(status, Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }
}

/// Why a verb was refused. The wording is QEMU's where QEMU has the case.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerbError {
    /// Not in this state.
    #[error("Job '{job}' in state '{status}' cannot accept command verb '{verb}'")]
    State {
        /// The job.
        job: String,
        /// Its state.
        status: JobStatus,
        /// The verb.
        verb: &'static str,
    },
    /// It is paused by the operator already.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// Nothing to resume.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// It compares its legs already.
    #[error("Job '{job}' is verifying already; wait for that pass to end, or cancel it")]
    AlreadyVerifying {
        /// The job.
        job: String,
    },
    /// It does not compare its legs.
    #[error("Job '{job}' is not verifying")]
    NotVerifying {
        /// The job.
        job: String,
    },
    /// The disk has no such job any more.
    #[error("Job '{job}' not found")]
    NotFound {
        /// The job.
        job: String,
    },
    /// This kind of job has no such verb.
    #[error("Job '{job}' cannot {verb}: {reason}")]
    NotSupported {
        /// The job.
        job: String,
        /// The verb.
        verb: &'static str,
        /// Why not, and what to do instead.
        reason: String,
    },
}

/// Which leg of a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The disk that the guest uses.
    Source,
    /// The disk that the job fills.
    Target,
}

impl Side {
    /// The label that metrics and events use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// What was done about an error (QEMU `BlockErrorAction`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// It will be tried again.
    Ignore,
    /// The job pauses.
    Stop,
}

impl ErrorAction {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// Whether the job's I/O goes well (QEMU `BlockDeviceIoStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IoStatus {
    /// No error since the job started or was resumed.
    #[default]
    Ok,
    /// An error stopped the job.
    Failed,
    /// A lack of room stopped the job.
    Nospace,
}

impl IoStatus {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Nospace => "nospace",
        }
    }
}

/// Why a job failed, or stands still: small, so that the reactor can report it without allocating.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobFailure {
    /// An I/O error that the policy does not forgive.
    Io {
        /// Which leg.
        side: Side,
        /// What the I/O did.
        operation: crate::io::IoKind,
        /// Where on the disk, bytes.
        offset: u64,
        /// The error.
        error: IoError,
    },
    /// The operator cancelled it.
    Cancelled,
    /// The disk could not be drained in time for the switch-over.
    HoldTimedOut {
        /// I/O that would not end.
        in_flight: u32,
    },
    /// The record of the switch-over could not be written; control knows why.
    CommitRecord,
    /// A guest reset, with `on_guest_reset` = cancel.
    GuestReset,
    /// The target differed from the source before a switch-over, was copied again, and differed again.
    Differs {
        /// First byte of the chunk.
        offset: u64,
    },
}

impl fmt::Display for JobFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { side, operation, offset, error } => {
                write!(f, "{} {} at byte {offset}: {error}", side.name(), operation.name())
            }
            Self::Cancelled => f.write_str("Operation canceled"),
            Self::HoldTimedOut { in_flight } => write!(
                f,
                "the switch-over was undone: {in_flight} requests did not end within the hold's deadline"
            ),
            Self::CommitRecord => {
                f.write_str("the switch-over was undone: its record could not be written")
            }
            Self::GuestReset => f.write_str("the guest reset the device"),
            Self::Differs { offset } => write!(
                f,
                "the switch-over was undone: the target differs from the source at byte {offset} though it was copied again"
            ),
        }
    }
}

/// What a job tells control. Coalesced by the job: a persistent error is one event with a count, not a storm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobEvent {
    /// The state changed.
    Status(JobStatus),
    /// An I/O error, and what is done about it.
    Error {
        /// Which leg.
        side: Side,
        /// What the I/O did.
        operation: crate::io::IoKind,
        /// What follows.
        action: ErrorAction,
        /// The error.
        error: IoError,
        /// Errors like it since the last event.
        count: u64,
    },
    /// Both legs are equal and durable: write the record that the target has taken over, then answer with
    /// [`crate::DiskCommand::Committed`]. The guest runs on meanwhile, mirrored.
    CommitRequest,
    /// The switch-over was undone after its record was written: take the record back, then answer with
    /// [`crate::DiskCommand::Retracted`]. Writes that only the source has are not acknowledged before that.
    RetractRequest,
    /// The switch-over was given up and the job is ready again, for this reason.
    SwitchUndone(JobFailure),
    /// Background copying did not converge: guest writes go to both legs from now on, as `auto_converge` allows.
    AutoConverged,
    /// Verification found clean chunks that differ; they are dirty now. One event a second at most.
    VerifyMismatch {
        /// First byte of the first of them.
        offset: u64,
        /// How many since the last event.
        chunks: u64,
    },
    /// A verification pass is over; [`JobInfo::verify`] has its numbers.
    VerifyEnded {
        /// Which.
        pass: u64,
        /// How it ended.
        state: VerifyState,
    },
}

impl JobEvent {
    /// Whether it asks for nothing: it may make room for newer events.
    #[must_use]
    pub fn is_news(&self) -> bool {
        match self {
            Self::Status(_)
            | Self::Error { .. }
            | Self::AutoConverged
            | Self::VerifyMismatch { .. }
            | Self::VerifyEnded { .. } => true,
            Self::CommitRequest | Self::RetractRequest | Self::SwitchUndone(_) => false,
        }
    }
}

/// How guest writes met the copy: what the tests of a switch-over under load count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteCounts {
    /// Acknowledged writes that touched chunks not yet copied.
    pub dirty: u64,
    /// That waited for a chunk being copied.
    pub copying: u64,
    /// That touched only chunks already copied.
    pub clean: u64,
}

/// Errors counted by leg and by what was done about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ErrorCounts {
    /// Indexed by [`Side`] then [`ErrorAction`].
    pub counts: [[u64; 3]; 2],
}

/// How sure an estimate is, by the age and the spread of the rates that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EtaConfidence {
    /// The rates are new, or jump about.
    Low,
    /// They are some seconds old, and within a half of each other.
    Medium,
    /// They have been steady for ten seconds.
    High,
}

impl EtaConfidence {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What a job can say about itself at any moment. Bytes throughout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JobInfo {
    /// Its state.
    pub status: JobStatus,
    /// Paused by the operator's verb (as opposed to by an error).
    pub paused_by_operator: bool,
    /// The copy mode.
    pub copy_mode: CopyMode,
    /// Rate limit, bytes a second; 0 for none.
    pub speed: u64,
    /// The disk's size, or what of it the mode has to copy.
    pub total_bytes: u64,
    /// Copied as data since the start.
    pub copied_bytes: u64,
    /// Made zero on the target without copying data.
    pub zero_bytes: u64,
    /// Needed nothing: zero on both sides already.
    pub skipped_bytes: u64,
    /// Of what was copied as data, bytes that the file system or its server copied by itself.
    pub offloaded_bytes: u64,
    /// Bytes of guest writes that the target has taken directly.
    pub mirrored_bytes: u64,
    /// Guest writes that an observer did not get and that are not remembered for it.
    pub dropped_writes: u64,
    /// Their bytes.
    pub dropped_bytes: u64,
    /// Still to be copied.
    pub dirty_bytes: u64,
    /// Being copied.
    pub in_flight_bytes: u64,
    /// Copy rate, smoothed.
    pub copy_bytes_per_second: u64,
    /// Rate of guest writes, smoothed.
    pub guest_write_bytes_per_second: u64,
    /// Time to ready, where it can be estimated, and how sure that is.
    pub eta: Option<(Nanos, EtaConfidence)>,
    /// The 99th percentile of the guest's latency in the last window, while it is at work: from the reactor's last look before a
    /// request came to its answer, so rather too long than too short.
    pub guest_p99: Option<Nanos>,
    /// What the ceiling on that leaves the copier beside the guest, bytes a second; none without a ceiling.
    pub throttle: Option<u64>,
    /// It has gone over to write-blocking by itself.
    pub auto_converged: bool,
    /// Whether the dirty bytes shrink faster than the guest makes them.
    pub converging: bool,
    /// Both legs are equal, and every write goes to both.
    pub actively_synced: bool,
    /// Written to the target and not known to be durable there.
    pub target_undurable_bytes: u64,
    /// Whether its I/O goes well.
    pub io_status: IoStatus,
    /// The first reason it failed, stopped or could not switch.
    pub failure: Option<JobFailure>,
    /// Guest writes by what they met.
    pub writes: WriteCounts,
    /// Errors so far.
    pub errors: ErrorCounts,
    /// The last comparison of both legs.
    pub verify: VerifyInfo,
    /// Complete or finish, accepted and not done: it is under way, or begins when the job is resumed.
    pub asked: Option<JobVerb>,
}

/// What a job needs of its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobWants {
    /// Nothing.
    Nothing,
    /// A hold, then [`BlockJob::dissolve`].
    Dissolve,
}

/// What became of the record of a switch-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// It is durable.
    Written,
    /// There is none, whatever crashes.
    Absent,
    /// Writing it failed when it may have been there already, and nothing could be put in its place.
    Unknown,
}

/// A scan of a job's source for holes, known by its job and its disk. It runs on a thread of its own and may report late: a hole that it
/// found for one job may have been written to when the next one is there, so a disk believes the scan of its job alone.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    stopped: Arc<AtomicBool>,
}

impl Scan {
    /// Its job is over.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether its job is over, so that it may end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Whether this is that scan.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.stopped, &other.stopped)
    }
}

/// A part of a hole scan, sent down by control: the source's allocation as it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanReport {
    /// The range reads zero, as of a moment after the job was inserted.
    Hole {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range is allocated in the top image: what sync mode `top` brings over.
    Allocated {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Everything below this byte has been reported: the copier may go so far.
    Upto(u64),
    /// The scan is over, or was given up: the copier may go everywhere.
    Done,
}

/// What is left when a job has ended.
pub struct Dissolved {
    /// The channel that the disk goes on with. Nothing is in flight on it.
    pub survivor: Box<dyn IoChannel>,
    /// Channels no longer needed. They may still have I/O in flight, whose completions nobody wants; the disk polls them
    /// until it ends.
    pub released: Vec<Box<dyn IoChannel>>,
    /// Buffer pools to close. In-flight I/O keeps them mapped.
    pub regions: Vec<RegionId>,
    /// Which leg the survivor is.
    pub side: Side,
    /// The last word about the job. Its status is Concluded.
    pub info: JobInfo,
}

/// Long work over a disk.
pub trait BlockJob: IoChannel {
    /// Does what the operator says, or says why not. Never waits: what takes time is shown by the state.
    ///
    /// # Errors
    /// The verb is not legal now.
    fn verb(&mut self, cx: &Context<'_>, verb: JobVerb) -> Result<(), VerbError>;

    /// The job's own work: once a turn, when the guest has its answers of that turn. What the reactor does here in person, the guest
    /// meets only if it asks for something meanwhile.
    fn turn(&mut self, cx: &Context<'_>);

    /// What there is to say about the job.
    fn info(&self, now: Nanos) -> JobInfo;

    /// The next event for control.
    fn take_event(&mut self) -> Option<JobEvent>;

    /// What the job needs of its disk now.
    fn wants(&self) -> JobWants;

    /// A part of the source's allocation map.
    fn scanned(&mut self, cx: &Context<'_>, report: ScanReport);

    /// Control has written the record that [`JobEvent::CommitRequest`] asked for, or could not.
    fn committed(&mut self, cx: &Context<'_>, record: Commit);

    /// Control has taken back the record that [`JobEvent::RetractRequest`] named. `done` is false if that failed, in which
    /// case the job asks again: what it parked stays unacknowledged.
    fn retracted(&mut self, cx: &Context<'_>, done: bool);

    /// The hold for [`JobWants::Dissolve`] was undone: the disk did not drain in time.
    fn hold_failed(&mut self, cx: &Context<'_>, in_flight: u32);

    /// A consumer reset its device, or went away.
    fn guest_reset(&mut self, cx: &Context<'_>);

    /// Ends the job. Called under a hold, with nothing of the guest in flight.
    fn dissolve(self: Box<Self>, cx: &Context<'_>) -> Dissolved;

    /// Gives the job up before it was started, or with its disk: the channel of the source, and all others.
    fn abandon(self: Box<Self>, cx: &Context<'_>) -> Dissolved;

    /// A job seen as a channel.
    fn as_channel(&mut self) -> &mut dyn IoChannel;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_live_state_reaches_null() {
        for start in JobStatus::ALL {
            let mut reached = vec![start];
            let mut at = 0;
            while at < reached.len() {
                for next in reached[at].successors() {
                    if !reached.contains(next) {
                        reached.push(*next);
                    }
                }
                at += 1;
            }
            assert!(reached.contains(&JobStatus::Null), "{start} is a dead end");
        }
    }

    #[test]
    fn a_finished_job_takes_no_verb_but_dismiss() {
        let verbs = [
            JobVerb::Cancel,
            JobVerb::Pause,
            JobVerb::Resume,
            JobVerb::SetSpeed(0),
            JobVerb::Complete,
            JobVerb::Finalize,
            JobVerb::Change(CopyMode::Background),
            JobVerb::SetCeiling(None),
            JobVerb::Finish,
        ];
        for verb in verbs {
            assert!(!verb.legal_in(JobStatus::Concluded), "{}", verb.name());
            assert!(!verb.legal_in(JobStatus::Aborting), "{}", verb.name());
        }
        assert!(JobVerb::Dismiss.legal_in(JobStatus::Concluded));
    }
}
