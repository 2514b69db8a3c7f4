//! The life of a mirror: its states, what an operator's verb does to them, and what becomes of a failure.
//!
//! ```text
//! Created → Running ⇄ Paused        Ready → Waiting(complete) → Pending: AwaitFinalize → Settling → Recording → (target)
//!              ↓                      ⇅        ↓ ↑
//!            Ready ⇄ Standby        Standby  Ready ← Pending: Undoing        (whatever undoes the switch-over)
//!                                   Ready → Waiting(finish) → Pending: AwaitFinalize → Freezing → Leaving(finished)
//! any of them → Leaving(aborted) → (dissolved: source); with a record, by way of Undoing
//! ```
//! The reported [`JobStatus`] follows from the stage; every step between two reported states is one that
//! [`JobStatus::successors`] allows.
//!
//! READY means: nothing dirty and nothing in flight at some moment, and a flush of the target begun after it that went
//! well. As in QEMU, a guest that writes on in background mode does not take that back, not even during the flush: else a
//! guest that never rests would never see READY. In write-blocking mode nothing may be dirty after the flush either.
//!
//! **The record comes after a flush in sync.** From the record on the target is what a restart serves, so all that a guest
//! has flushed must be durable there. Guests' flushes go to both legs as soon as a switch-over waits; what the copier
//! writes afterwards none of them covers. So each copy spoils the job's flush, and the record is asked for, and later the
//! disk is held, only where a flush of the target that was begun in sync has gone well since the last copy.
//!
//! **A finished copy is a point in time.** Finish converges, then stops mirroring at one moment: what was sent before goes
//! to both legs, what comes after to the source alone. Writes in flight together have no order among themselves, so that
//! moment is a cut of the guest's history; then the target is flushed. The guest is held for none of it.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::copier::CopyState;
use super::core::{Core, Leg, OpState, Ticket};
use super::durable::Line;
use super::scope::ObserverPolicy;
use super::tables::{
    Dirties, Failed, JobDoes, Mirroring, Outcome, Progress, on_failure, on_hang, usual,
};
use crate::io::{IoError, IoKind};
use crate::job::{
    Commit, ErrorAction, IoStatus, JobEvent, JobFailure, JobInfo, JobStatus, JobVerb, JobWants,
    OnError, ScanReport, Side,
};

/// How long control is left in peace after it could not retract a record.
const RETRACT_AGAIN: Nanos = Nanos::from_secs(1);

/// What a switch leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Goal {
    /// The target takes over.
    Complete,
    /// The target stays behind as a copy of a point in time.
    Finish,
}

impl Goal {
    fn verb(self) -> JobVerb {
        match self {
            Self::Complete => JobVerb::Complete,
            Self::Finish => JobVerb::Finish,
        }
    }
}

/// Who paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum PausedBy {
    Operator,
    Error,
}

/// Where a pending switch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The operator must finalize.
    AwaitFinalize,
    /// The operator has; what was copied again meanwhile is made durable before there is a record.
    Settling,
    /// Control writes the record, or has; then the disk is held.
    Recording,
    /// Mirroring has stopped at a point in time; what was in flight ends, then the target is flushed.
    Freezing,
    /// The record is being taken back, or the answer is awaited whether it was written.
    Undoing(Then),
}

impl Step {
    /// Whether the copier goes on.
    pub(super) fn copies(self) -> bool {
        !matches!(self, Self::Freezing)
    }
}

/// What follows when the record is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Then {
    Ready,
    Abort,
}

/// How the mirror ends on its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ending {
    Aborted,
    Finished,
}

/// Where the job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Created,
    Running,
    Paused(PausedBy),
    Ready,
    Standby(PausedBy),
    Waiting(Goal),
    Pending(Goal, Step),
    Leaving(Ending),
}

impl Stage {
    fn status(self) -> JobStatus {
        match self {
            Self::Created => JobStatus::Created,
            Self::Running => JobStatus::Running,
            Self::Paused(_) => JobStatus::Paused,
            Self::Ready => JobStatus::Ready,
            Self::Standby(_) => JobStatus::Standby,
            Self::Waiting(_) => JobStatus::Waiting,
            Self::Pending(_, Step::Undoing(Then::Abort)) | Self::Leaving(Ending::Aborted) => {
                JobStatus::Aborting
            }
            Self::Pending(..) | Self::Leaving(Ending::Finished) => JobStatus::Pending,
        }
    }
}

/// The record of the switch-over, which control writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Record {
    /// There is none.
    None,
    /// Control was asked to write it; it may exist already.
    Requested,
    /// It exists.
    Written,
    /// Control was asked to take it back; it may exist still.
    Retracting,
    /// It could not be taken back; control is asked again then.
    RetractAt(Nanos),
}

impl Record {
    /// Whether a crash now might find it.
    pub(super) fn may_exist(self) -> bool {
        self != Self::None
    }
}

/// The flush before READY and before a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum JobFlush {
    Idle,
    Asked(Ticket),
    Good,
}

/// A switch that the operator asked for while the job stood by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Wish {
    None,
    Once(Goal),
}

/// A verb that was refused; the channel adds the job's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    State(JobStatus),
    AlreadyPaused,
    NotPaused,
    AlreadyVerifying,
    NotVerifying,
    /// The target has new writes only.
    NoCopyToSwitchTo,
    NoCopyToVerify,
    /// An observer gets writes as they are made.
    ObserverInBackground,
}

impl Core {
    /// Events that wait for control. Older news of states and errors make room; requests to control are never so many.
    pub(super) const EVENTS: usize = 64;

    pub(super) fn status(&self) -> JobStatus {
        self.stage.status()
    }

    /// The switch that is under way, or is to begin with the resume; none while it waits to be finalized.
    fn asked(&self) -> Option<Goal> {
        match (self.stage, self.wish) {
            (Stage::Pending(_, Step::AwaitFinalize), _) => None,
            (Stage::Waiting(goal) | Stage::Pending(goal, _), _)
            | (Stage::Standby(_), Wish::Once(goal)) => Some(goal),
            (_, _) => None,
        }
    }

    /// How guest writes are mirrored now.
    pub(super) fn mirroring(&self) -> Mirroring {
        match self.stage {
            Stage::Running | Stage::Ready if self.sends_along() => Mirroring::Trailing,
            Stage::Created | Stage::Running | Stage::Paused(_) => usual(self.config.copy_mode),
            Stage::Ready | Stage::Standby(_) => usual(self.config.copy_mode),
            Stage::Pending(_, Step::Freezing) => Mirroring::Behind,
            // Waiting too, or a guest that discards all the time would keep the switch-over from ever being due.
            Stage::Waiting(_) | Stage::Pending(..) => Mirroring::Switching,
            Stage::Leaving(_) => Mirroring::Detached,
        }
    }

    /// Whether a guest's flush goes to the target.
    pub(super) fn flushes_target(&self) -> bool {
        let both = matches!(self.mirroring(), Mirroring::Both | Mirroring::Switching);
        both && self.config.observer == ObserverPolicy::Block
    }

    fn progress(&self) -> Progress {
        match self.stage {
            Stage::Leaving(_) => Progress::Leaving,
            _ if self.record.may_exist() => Progress::Recorded,
            Stage::Waiting(_) | Stage::Pending(..) => Progress::Switching,
            _ => Progress::Mirroring,
        }
    }

    /// Whether a switch-over whose record may exist is being taken back.
    pub(super) fn undoing(&self) -> bool {
        matches!(self.stage, Stage::Pending(_, Step::Undoing(_)))
    }

    /// Whether nothing is dirty, in flight in the copier, or given up and not ended.
    pub(super) fn in_sync(&self) -> bool {
        self.maps.dirty.count() == 0
            && self.lost_ops + self.lost_copies == 0
            && self.lines[Side::Target as usize].line != Line::Lost
            && self.copies.iter().all(|copy| copy.state == CopyState::Free)
    }

    /// Whether the legs are equal but for what the guest waits for; where writes trail by right, but for those.
    fn converged(&self) -> bool {
        let awaited = self.unawaited.count() == 0 || planted(Bug::TrailingNotAwaited);
        self.in_sync() && (awaited || self.lets_trail())
    }

    /// Whether the target has every write that was acknowledged.
    pub(super) fn lacks_nothing(&self) -> bool {
        self.in_sync() && self.unawaited.count() == 0
    }

    /// The job has been put above its disk.
    pub(super) fn inserted(&mut self) {
        if self.stage == Stage::Created {
            self.enter(Stage::Running);
        }
    }

    pub(super) fn tell(&mut self, event: JobEvent) {
        if self.events.len() >= Self::EVENTS {
            let oldest = self.events.iter().position(JobEvent::is_news);
            debug_assert!(oldest.is_some(), "control was asked {} things", self.events.len());
            self.events.remove(oldest.unwrap_or(0));
        }
        self.events.push_back(event);
    }

    fn enter(&mut self, stage: Stage) {
        let (old, new) = (self.stage.status(), stage.status());
        self.stage = stage;
        // On the way to the record the flush of the state before counts, unless something was copied since.
        if !matches!(stage, Stage::Pending(Goal::Complete, step) if step.copies()) {
            self.job_flush = JobFlush::Idle;
        }
        if old == new {
            return;
        }
        // A paused job is resumed before it does anything else, as in QEMU.
        let via = match old {
            JobStatus::Paused if new != JobStatus::Running => Some(JobStatus::Running),
            JobStatus::Standby if new != JobStatus::Ready => Some(JobStatus::Ready),
            _ => None,
        };
        if let Some(via) = via {
            self.tell(JobEvent::Status(via));
        }
        debug_assert!(via.unwrap_or(old).successors().contains(&new), "{old} to {new}");
        self.tell(JobEvent::Status(new));
    }

    /// Carries out a verb.
    pub(super) fn verb(&mut self, verb: JobVerb, now: Nanos) -> Result<(), Refused> {
        let status = self.status();
        if !verb.legal_in(status) {
            return Err(Refused::State(status));
        }
        self.refuse_out_of_scope(verb)?;
        match verb {
            JobVerb::Cancel => self.cancel(JobFailure::Cancelled, now),
            JobVerb::Pause => self.pause()?,
            JobVerb::Resume => self.resume()?,
            JobVerb::SetSpeed(speed) => self.limiter.set_speed(speed, now),
            JobVerb::Change(mode) => self.config.copy_mode = mode,
            JobVerb::SetCeiling(ceiling) => self.set_ceiling(ceiling, now),
            JobVerb::Complete => self.switch(Goal::Complete),
            JobVerb::Finish => self.switch(Goal::Finish),
            JobVerb::Finalize => match self.stage {
                Stage::Pending(goal, Step::AwaitFinalize) => self.finalize(goal),
                _ => return Err(Refused::State(status)),
            },
            JobVerb::Dismiss => {}
            JobVerb::Verify(_) if self.verifies() => return Err(Refused::AlreadyVerifying),
            JobVerb::Verify(request) => self.start_verify(&request, now),
            JobVerb::StopVerify if !self.verifies() => return Err(Refused::NotVerifying),
            JobVerb::StopVerify => self.stop_verify(now),
        }
        self.pump(now);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Refused> {
        match self.stage {
            Stage::Paused(_) | Stage::Standby(_) => return Err(Refused::AlreadyPaused),
            Stage::Ready => self.enter(Stage::Standby(PausedBy::Operator)),
            _ => self.enter(Stage::Paused(PausedBy::Operator)),
        }
        self.forget_waiting_copies();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Refused> {
        match self.stage {
            Stage::Paused(_) => self.enter(Stage::Running),
            Stage::Standby(_) => self.enter(Stage::Ready),
            _ => return Err(Refused::NotPaused),
        }
        self.io_status = IoStatus::Ok;
        self.failure = None;
        self.bad = super::errors::BadSpots::default();
        if let (Stage::Ready, Wish::Once(goal)) = (self.stage, self.wish) {
            self.switch(goal);
        }
        Ok(())
    }

    fn switch(&mut self, goal: Goal) {
        if let Stage::Standby(_) = self.stage {
            self.wish = Wish::Once(goal);
            return;
        }
        self.wish = Wish::None;
        self.failure = None;
        self.enter(Stage::Waiting(goal));
    }

    fn finalize(&mut self, goal: Goal) {
        match goal {
            Goal::Complete => self.enter(Stage::Pending(goal, Step::Settling)),
            Goal::Finish => self.enter(Stage::Pending(goal, Step::Freezing)),
        }
    }

    /// Ends the job on its source for this reason.
    fn cancel(&mut self, reason: JobFailure, now: Nanos) {
        self.failure = Some(reason);
        self.undo(None, Then::Abort, now);
    }

    /// Takes a switch-over back, for its legs differ though they were made equal again.
    pub(super) fn undo_unequal(&mut self, reason: JobFailure, now: Nanos) {
        self.undo(Some(reason), Then::Ready, now);
    }

    /// Takes a switch-over back: at once if there is no record, else when the record is gone.
    fn undo(&mut self, reason: Option<JobFailure>, then: Then, now: Nanos) {
        if let (Some(reason), Then::Ready) = (reason, then) {
            if let Stage::Pending(_, Step::Undoing(_)) = self.stage {
                return;
            }
            self.failure = Some(reason);
        }
        if !self.record.may_exist() {
            return self.undone(then, now);
        }
        let goal = Goal::Complete;
        self.enter(Stage::Pending(goal, Step::Undoing(then)));
        if self.record == Record::Written {
            self.ask_to_retract();
        }
    }

    fn ask_to_retract(&mut self) {
        self.record = Record::Retracting;
        self.tell(JobEvent::RetractRequest);
    }

    /// No record stands in the way any more.
    fn undone(&mut self, then: Then, now: Nanos) {
        self.record = Record::None;
        match then {
            Then::Abort => self.leave(Ending::Aborted, now),
            Then::Ready => {
                self.enter(Stage::Ready);
                self.reopen_demand(now);
                if let Some(reason) = self.failure {
                    self.tell(JobEvent::SwitchUndone(reason));
                }
                self.unpark(now);
            }
        }
    }

    /// A write is parked for want of the target though no failure is being undone: undo the switch-over for its sake.
    pub(super) fn undo_for_parked(&mut self, now: Nanos) {
        if let Stage::Pending(_, Step::Recording) = self.stage {
            let reason = JobFailure::Io {
                side: Side::Target,
                operation: IoKind::Write,
                offset: 0,
                error: IoError::TIMED_OUT,
            };
            self.undo(Some(reason), Then::Ready, now);
        }
    }

    /// Answers what was parked.
    fn unpark(&mut self, now: Nanos) {
        for slot in 0..self.config.ops {
            if self.op(slot).state == OpState::Parked {
                self.answer(slot, Ok(()), now);
            }
        }
    }

    /// Control has written the record, or could not. One that may be there is taken back as one that is.
    pub(super) fn committed(&mut self, record: Commit, now: Nanos) {
        if self.record != Record::Requested {
            debug_assert!(false, "a record that nobody asked for");
            return;
        }
        match (self.stage, record) {
            (Stage::Pending(_, Step::Undoing(then)), Commit::Absent) => self.undone(then, now),
            (Stage::Pending(_, Step::Undoing(_)), Commit::Written | Commit::Unknown) => {
                self.ask_to_retract();
            }
            (_, Commit::Written) => self.record = Record::Written,
            (_, Commit::Absent | Commit::Unknown) => {
                let known = record == Commit::Absent;
                self.record = if known { Record::None } else { Record::Written };
                self.undo(Some(JobFailure::CommitRecord), Then::Ready, now);
            }
        }
        self.pump(now);
    }

    /// Control has taken the record back, or could not.
    pub(super) fn retracted(&mut self, done: bool, now: Nanos) {
        if self.record != Record::Retracting {
            debug_assert!(false, "a retraction that nobody asked for");
            return;
        }
        match (self.stage, done) {
            (Stage::Pending(_, Step::Undoing(then)), true) => self.undone(then, now),
            (_, true) => self.record = Record::None,
            (_, false) => self.record = Record::RetractAt(now + RETRACT_AGAIN),
        }
        self.pump(now);
    }

    /// The disk did not drain for the switch-over.
    pub(super) fn hold_failed(&mut self, in_flight: u32, now: Nanos) {
        if let Stage::Pending(_, Step::Recording) = self.stage {
            self.undo(Some(JobFailure::HoldTimedOut { in_flight }), Then::Ready, now);
            self.pump(now);
        }
    }

    /// The guest has reset its device.
    pub(super) fn guest_reset(&mut self, now: Nanos) {
        if self.config.cancel_on_guest_reset && JobVerb::Cancel.legal_in(self.status()) {
            self.cancel(JobFailure::GuestReset, now);
            self.pump(now);
        }
    }

    /// The reactor has no place for the mirror's memory: it cannot work.
    pub(super) fn no_memory(&mut self, now: Nanos) {
        const OUT_OF_MEMORY: i32 = 12;
        let reason = JobFailure::Io {
            side: Side::Target,
            operation: IoKind::Write,
            offset: 0,
            error: IoError::from_errno(OUT_OF_MEMORY),
        };
        if JobVerb::Cancel.legal_in(self.status()) {
            self.cancel(reason, now);
        }
    }

    /// Gives the target up: nothing is sent there any more, and nobody waits for what is in flight.
    fn leave(&mut self, ending: Ending, now: Nanos) {
        self.enter(Stage::Leaving(ending));
        self.drop_copies();
        self.leave_verify(now);
        let (_, outcome) = on_hang(JobVerb::Cancel, Side::Target);
        debug_assert_eq!(outcome, Outcome::DetachesTarget);
        if planted(Bug::CancelKeepsTarget) {
            return;
        }
        for slot in 0..self.config.ops {
            let op = *self.op(slot);
            if op.leg(Side::Target) != Leg::Flying {
                continue;
            }
            if op.kind == IoKind::Flush {
                self.op(slot).legs[Side::Target as usize] = Leg::Failed;
                self.both_flying -= 1;
            } else {
                self.lose_target_leg(slot);
                self.dirty(&self.grid.touched(op.offset, op.length));
            }
            self.settle(slot, now);
        }
        self.unpark(now);
    }

    /// Something failed: the bits first, then the job. What the guest hears follows when its request is settled.
    pub(super) fn failed(
        &mut self,
        failed: Failed,
        operation: IoKind,
        bytes: &Range<u64>,
        error: IoError,
        now: Nanos,
    ) {
        if self.drop_for_observer(failed, operation, bytes, error, now) {
            return;
        }
        let row = on_failure(failed, self.progress());
        self.rows.failure.visit(row.row);
        let side = failed.side();
        match row.dirties {
            Dirties::Range => {
                let forgotten = side == Side::Target && planted(Bug::TargetErrorForgotten);
                if !forgotten && failed != Failed::CopyRead && failed != Failed::CopyWrite {
                    let touched = self.grid.touched(bytes.start, bytes.end - bytes.start);
                    self.dirty(&touched);
                }
            }
            Dirties::Undurable => self.lose_undurable(side),
        }
        let reason = JobFailure::Io { side, operation, offset: bytes.start, error };
        match row.job {
            JobDoes::Nothing => {}
            JobDoes::UndoSwitch => {
                self.log_error(side, operation, ErrorAction::Ignore, error, now);
                self.undo(Some(reason), Then::Ready, now);
            }
            JobDoes::Policy => self.apply_policy(side, operation, reason, error, now),
        }
    }

    fn apply_policy(
        &mut self,
        side: Side,
        operation: IoKind,
        reason: JobFailure,
        error: IoError,
        now: Nanos,
    ) {
        let action = match self.config.on_error[side as usize] {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if error.is_no_space() => ErrorAction::Stop,
            OnError::Enospc => ErrorAction::Report,
        };
        self.log_error(side, operation, action, error, now);
        match action {
            ErrorAction::Ignore => {}
            ErrorAction::Report => {
                self.failure = Some(reason);
                self.leave(Ending::Aborted, now);
            }
            ErrorAction::Stop => self.stop(reason, error),
        }
    }

    fn stop(&mut self, reason: JobFailure, error: IoError) {
        if self.io_status == IoStatus::Ok {
            self.io_status = if error.is_no_space() { IoStatus::Nospace } else { IoStatus::Failed };
            self.failure = Some(reason);
        }
        match self.stage {
            Stage::Running => self.enter(Stage::Paused(PausedBy::Error)),
            Stage::Ready => self.enter(Stage::Standby(PausedBy::Error)),
            _ => {}
        }
        self.forget_waiting_copies();
    }

    pub(super) fn log_error(
        &mut self,
        side: Side,
        operation: IoKind,
        action: ErrorAction,
        error: IoError,
        now: Nanos,
    ) {
        for event in self.errors.record((side, operation, action, error), now).into_iter().flatten()
        {
            self.tell(event);
        }
    }

    /// Moves on whatever time, or the end of something, allows: once a turn. `guest_busy` says that the guest waits for
    /// something, reads included.
    pub(super) fn turn(&mut self, guest_busy: bool, now: Nanos) {
        self.check_timeouts(now);
        self.advance(now);
        if self.throttle.tick(now) {
            self.follow_throttle(now);
        }
        self.pace = self.next_pace(guest_busy, now);
        self.start_copies(now);
        self.start_checks(guest_busy, now);
        self.flush_now_and_then(now);
        // What is skipped without I/O can have been the last.
        self.advance(now);
        self.rates.tick(now);
        if let Some(event) = self.errors.tick(now) {
            self.tell(event);
        }
        self.pump(now);
    }

    /// Takes the steps that the stage allows now, if any.
    fn advance(&mut self, now: Nanos) {
        loop {
            let before = self.stage;
            self.step(now);
            if self.stage == before {
                return;
            }
        }
    }

    fn step(&mut self, now: Nanos) {
        let stage = self.stage;
        match stage {
            Stage::Running if self.scope_is_known() && self.flushed_in_sync(now) => {
                self.enter(Stage::Ready);
            }
            Stage::Waiting(goal) if self.flushed_in_sync(now) && self.verified(goal, now) => {
                self.enter(Stage::Pending(goal, Step::AwaitFinalize));
                if self.config.auto_finalize {
                    self.finalize(goal);
                }
            }
            Stage::Pending(goal, Step::Settling) if self.flushed_in_sync(now) => {
                self.enter(Stage::Pending(goal, Step::Recording));
                self.record = Record::Requested;
                self.tell(JobEvent::CommitRequest);
            }
            Stage::Pending(_, Step::Recording) => {
                // Only asks again where a copy has spoilt the flush: `survivor` waits for it.
                self.flushed_in_sync(now);
            }
            Stage::Pending(_, Step::Freezing) if self.both_flying == 0 && self.flushed(now) => {
                self.leave(Ending::Finished, now);
            }
            Stage::Pending(_, Step::Undoing(_)) => self.retract_again(now),
            _ => {}
        }
    }

    fn retract_again(&mut self, now: Nanos) {
        if let Record::RetractAt(at) = self.record
            && now >= at
        {
            self.ask_to_retract();
        }
    }

    /// Whether a flush that was begun in sync has gone well; begins one.
    fn flushed_in_sync(&mut self, now: Nanos) -> bool {
        match self.job_flush {
            JobFlush::Asked(_) => false,
            JobFlush::Idle => self.converged() && self.flushed(now),
            JobFlush::Good => {
                let in_background =
                    matches!(self.mirroring(), Mirroring::Behind | Mirroring::Trailing);
                let good = in_background || self.converged();
                if !good {
                    self.job_flush = JobFlush::Idle;
                }
                good
            }
        }
    }

    /// Whether a flush of the target has gone well; asks for one.
    fn flushed(&mut self, now: Nanos) -> bool {
        if self.job_flush == JobFlush::Idle {
            if planted(Bug::ReadyWithoutFlush) {
                return true;
            }
            if let Some(ticket) = self.ask_flush(Side::Target, now) {
                self.job_flush = JobFlush::Asked(ticket);
            }
        }
        self.job_flush == JobFlush::Good
    }

    /// Gives up target I/O that is too old.
    fn check_timeouts(&mut self, now: Nanos) {
        let Some(limit) = self.config.target_timeout else { return };
        if now < self.next_timeout_check || matches!(self.stage, Stage::Leaving(_)) {
            return;
        }
        self.next_timeout_check = now + Nanos((limit.0 / 16).max(1));
        let late = |since: Nanos| since + limit <= now;
        if let Line::Flying { since, .. } = self.lines[Side::Target as usize].line
            && late(since)
        {
            self.lose_flush(now);
        }
        for slot in 0..self.config.ops {
            let op = *self.op(slot);
            let flies = op.leg(Side::Target) == Leg::Flying && op.kind != IoKind::Flush;
            if flies && late(op.since) {
                self.lose_target_leg(slot);
                self.failed(
                    Failed::GuestWrite(Side::Target),
                    op.kind,
                    &op.bytes(),
                    IoError::TIMED_OUT,
                    now,
                );
                self.settle(slot, now);
            }
        }
        for copy in 0..self.config.copies {
            let slot = &self.copies[usize::from(copy)];
            if slot.state == CopyState::Writing && late(slot.since) {
                self.lose_copy_write(copy, now);
            }
        }
        self.lose_late_checks(late, now);
    }

    /// When [`Core::turn`] must be called again though nothing has happened.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        let target_busy = self.both_flying > 0
            || matches!(self.lines[Side::Target as usize].line, Line::Flying { .. })
            || self.copies.iter().any(|copy| copy.state == CopyState::Writing)
            || self.verify.reads_target();
        let watched =
            self.config.target_timeout.is_some() && !matches!(self.stage, Stage::Leaving(_));
        let timeout = (watched && target_busy).then_some(self.next_timeout_check);
        let retract = match self.record {
            Record::RetractAt(at) => Some(at),
            _ => None,
        };
        let copier = self.copier_deadline();
        let others = [self.errors.deadline(), self.verify_deadline(), self.flush_due];
        [timeout, retract, copier].into_iter().chain(others).flatten().min()
    }

    /// A part of the source's allocation map.
    pub(super) fn scanned(&mut self, report: ScanReport) {
        match report {
            ScanReport::Hole { offset, length } => self.hole_reported(offset, length),
            ScanReport::Allocated { offset, length } => self.allocated_reported(offset, length),
            ScanReport::Upto(bytes) => self.scanned_upto = self.scanned_upto.max(bytes),
            ScanReport::Done => self.scanned_upto = u64::MAX,
        }
    }

    /// What the job needs of its disk.
    pub(super) fn wants(&self) -> JobWants {
        match self.survivor() {
            Some(_) => JobWants::Dissolve,
            None => JobWants::Nothing,
        }
    }

    /// The leg that the disk would go on with if it were held now; none while the job must go on.
    pub(super) fn survivor(&self) -> Option<Side> {
        let target_idle = self.lines[Side::Target as usize].line == Line::Idle;
        match self.stage {
            Stage::Leaving(_) => Some(Side::Source),
            Stage::Pending(Goal::Complete, Step::Recording)
                if self.record == Record::Written
                    && self.converged()
                    && self.job_flush == JobFlush::Good =>
            {
                // A guest's flush in flight ends with the drain; the job's own has ended.
                (target_idle || self.guest_live > 0).then_some(Side::Target)
            }
            _ => None,
        }
    }

    /// What there is to say.
    pub(super) fn info(&self, now: Nanos) -> JobInfo {
        // A reactor that slept has not sampled the rates meanwhile.
        let mut rates = self.rates;
        rates.tick(now);
        let dirty_bytes = self.maps.dirty.bytes();
        let in_flight_bytes = self.in_flight_bytes();
        let left = dirty_bytes + in_flight_bytes;
        let both = matches!(self.mirroring(), Mirroring::Both | Mirroring::Switching);
        let was_ready = !matches!(
            self.stage,
            Stage::Created | Stage::Running | Stage::Paused(_) | Stage::Leaving(_)
        );
        let by_operator = matches!(
            self.stage,
            Stage::Paused(PausedBy::Operator) | Stage::Standby(PausedBy::Operator)
        );
        JobInfo {
            status: self.status(),
            paused_by_operator: by_operator,
            copy_mode: self.config.copy_mode,
            speed: self.limiter.speed(),
            total_bytes: self.total_bytes(left),
            copied_bytes: self.counters.copied,
            zero_bytes: self.counters.zero,
            skipped_bytes: self.counters.skipped,
            offloaded_bytes: self.counters.offloaded,
            mirrored_bytes: self.counters.mirrored,
            dropped_writes: self.counters.dropped_writes,
            dropped_bytes: self.counters.dropped,
            dirty_bytes,
            in_flight_bytes,
            copy_bytes_per_second: rates.copy_rate(),
            guest_write_bytes_per_second: rates.write_rate(),
            eta: rates
                .eta(self.maps.dirty.bytes_without(&self.maps.hole) + in_flight_bytes, now)
                .filter(|_| left == 0 || self.stage_copies()),
            guest_p99: self.throttle.p99(),
            throttle: self.throttle.allowance(),
            auto_converged: self.auto_converged,
            converging: left == 0 || (self.stage_copies() && rates.converging()),
            actively_synced: both && was_ready && self.in_sync() && self.unawaited.count() == 0,
            target_undurable_bytes: self.lines[Side::Target as usize].undurable_bytes(),
            io_status: self.io_status,
            failure: self.failure,
            writes: self.counters.writes,
            errors: self.errors.total(),
            verify: self.verify.info(),
            asked: self.asked().map(Goal::verb),
        }
    }
}
