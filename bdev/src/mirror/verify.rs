//! Verification: compares what should be equal, beside the guest.
//!
//! A pass walks over the clean chunks, all of them or a sample, and takes each as a copy does: no guest write and no copy
//! is in a chunk while it is read from both legs, so that a difference is one. A chunk that differs becomes dirty and is
//! copied again. What is dirty is known to differ and left out.
//!
//! The walk never waits for one chunk as long as there are others: those where somebody is, or where an I/O that was given
//! up may still land, are put off and visited at the end, where the pass gets in line for them.
//!
//! The pass that a switch-over demands runs after convergence, while every write goes to both legs. It puts off what it
//! found to differ, too, and compares it again once it was copied. What differs a second time undoes the switch-over.
//!
//! Fault model: either read may fail or hang. What could not be compared is dirty, the leg's error policy says what the
//! job does. A read that was given up keeps its buffer until it ends, and a switch-over waits for it: the channel that
//! survives must be empty.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::core::{Action, Core};
use super::life::{Goal, JobFlush, Stage};
use super::ranges::{Entered, Holder};
use super::rate::Limiter;
use super::tables::Failed;
use crate::bitmap::{Bitmap, Grid};
use crate::io::{IoError, IoKind};
use crate::job::{JobEvent, JobFailure, Side};
use crate::verify::{VerifyInfo, VerifyRequest, VerifyState};

/// Runs compared at the same time.
pub(super) const CHECKS: u16 = 2;
/// The same while the guest has requests in flight.
const CHECKS_BESIDE_GUEST: usize = 1;
/// The most bytes read from each leg at once: they are compared in one go, while the guest waits.
const WINDOW_MAX: u32 = 256 << 10;
/// Places looked at in one turn: bounded work.
const LOOKS: usize = 32;
/// Mismatches are reported once in so long.
const SPACING: Nanos = Nanos::from_secs(1);

/// One leg's read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Reading {
    Idle,
    Flying,
    Good,
}

/// Where a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum CheckState {
    /// The slot is free.
    Free,
    /// In line behind guest writes, or a copy.
    Waiting,
    /// Reads a window from both legs.
    Reading,
    /// Given up; a read has not ended.
    Lost,
}

/// One run of chunks that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Check {
    state: CheckState,
    /// Whole chunks, bytes.
    start: u64,
    end: u64,
    /// The window that is being read.
    at: u64,
    upto: u64,
    /// By [`Side`].
    reads: [Reading; 2],
    since: Nanos,
}

impl Check {
    const FREE: Self = Self {
        state: CheckState::Free,
        start: 0,
        end: 0,
        at: 0,
        upto: 0,
        reads: [Reading::Idle; 2],
        since: Nanos::ZERO,
    };

    fn flies(&self, side: Side) -> bool {
        self.reads[side as usize] == Reading::Flying
    }
}

/// Whose pass it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PassOf {
    /// The operator asked for it.
    Operator,
    /// A switch-over demands it.
    Switch,
}

/// Where the walk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Walk {
    /// At this chunk.
    Sweep(u64),
    /// Among those put off, at this chunk.
    PutOff(u64),
}

/// A pass under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Pass {
    of: PassOf,
    walk: Walk,
    sample: Sample,
}

/// Whether the switch-over under way has been verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Demand {
    /// Not yet, or there is none.
    Open,
    /// A pass for it has ended, and the legs are equal.
    Met,
}

/// Mismatches that have not been reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Unreported {
    offset: u64,
    chunks: u64,
    quiet_until: Nanos,
}

/// The state of verification.
#[derive(Debug, Clone)]
pub(super) struct Verify {
    checks: [Check; CHECKS as usize],
    pass: Option<Pass>,
    demand: Demand,
    /// Chunks to come back to.
    put_off: Bitmap,
    /// Chunks that this pass found to differ.
    differed: Bitmap,
    /// A chunk that differs though it was copied again.
    hopeless: Option<u64>,
    limiter: Limiter,
    unreported: Unreported,
    window: u32,
    /// When the last turn wanted another, though nothing ends.
    due: Option<Nanos>,
    info: VerifyInfo,
}

impl Verify {
    pub(super) fn new(grid: Grid, window: u32) -> Self {
        Self {
            checks: [Check::FREE; CHECKS as usize],
            pass: None,
            demand: Demand::Open,
            put_off: Bitmap::empty(grid),
            differed: Bitmap::empty(grid),
            hopeless: None,
            limiter: Limiter::new(0, Nanos::ZERO),
            unreported: Unreported::default(),
            window: window.min(WINDOW_MAX),
            due: None,
            info: VerifyInfo::default(),
        }
    }

    pub(super) fn info(&self) -> VerifyInfo {
        self.info
    }

    /// Whether nothing is read, in line, or given up and not ended.
    pub(super) fn is_idle(&self) -> bool {
        self.checks.iter().all(|check| check.state == CheckState::Free)
    }

    fn slot(&mut self, check: u16) -> &mut Check {
        &mut self.checks[usize::from(check)]
    }

    /// Whether a time-out may be due.
    pub(super) fn reads_target(&self) -> bool {
        self.checks
            .iter()
            .any(|check| check.state == CheckState::Reading && check.flies(Side::Target))
    }
}

/// Which chunks a pass compares: one of each stratum, drawn by the seed. A hundred percent is every chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Sample {
    percent: u64,
    seed: u64,
    chunks: u64,
}

impl Sample {
    fn new(request: &VerifyRequest, chunks: u64) -> Self {
        let percent = u64::from(request.sample_percent.clamp(1, 100));
        Self { percent, seed: request.seed, chunks }
    }

    fn strata(&self) -> u64 {
        (self.chunks * self.percent).div_ceil(100)
    }

    /// The chunk drawn from a stratum.
    fn drawn(&self, stratum: u64) -> u64 {
        let start = stratum * 100 / self.percent;
        let end = ((stratum + 1) * 100 / self.percent).min(self.chunks);
        start + mix(self.seed ^ mix(stratum)) % (end - start).max(1)
    }

    /// The first chunk of the sample from this one on.
    fn next(&self, from: u64) -> Option<u64> {
        let first = from * self.percent / 100;
        (first..self.strata()).map(|stratum| self.drawn(stratum)).find(|chunk| *chunk >= from)
    }

    /// The bytes of all of it.
    fn bytes(&self, grid: Grid) -> u64 {
        let Some(last) = self.strata().checked_sub(1) else { return 0 };
        let last = self.drawn(last);
        let bytes = grid.bytes(&(last..last + 1));
        (self.strata() - 1) * grid.granularity() + (bytes.end - bytes.start)
    }
}

/// Spreads a number over all others (the finalizer of `splitmix64`, Steele and others, 2014).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the walk finds.
enum Look {
    /// A run that may be taken, bytes.
    Free(Range<u64>),
    /// One where somebody is: get in line.
    Busy(u64),
    /// This place is dealt with, or must wait.
    Passed,
    /// The walk is at its end for this turn.
    Nothing,
}

impl Core {
    /// Whether a pass that the operator asked for is under way.
    pub(super) fn verifies(&self) -> bool {
        matches!(self.verify.pass, Some(Pass { of: PassOf::Operator, .. }))
    }

    /// Begins a pass for the operator.
    pub(super) fn start_verify(&mut self, request: &VerifyRequest, now: Nanos) {
        self.begin_pass(PassOf::Operator, request, now);
    }

    /// Gives up the operator's pass.
    pub(super) fn stop_verify(&mut self, now: Nanos) {
        if self.verifies() {
            self.end_pass(VerifyState::Cancelled, now);
        }
    }

    /// A switch-over begins, or is over: what it demands is open again.
    pub(super) fn reopen_demand(&mut self, now: Nanos) {
        self.verify.demand = Demand::Open;
        if matches!(self.verify.pass, Some(Pass { of: PassOf::Switch, .. })) {
            self.end_pass(VerifyState::Cancelled, now);
        }
    }

    /// Whether the switch-over may go on, as far as verification goes; begins the pass that it demands.
    pub(super) fn verified(&mut self, goal: Goal, now: Nanos) -> bool {
        let demanded = goal == Goal::Complete && self.config.verify_before_complete;
        if !demanded || self.verify.demand == Demand::Met {
            return self.verify.is_idle();
        }
        if !matches!(self.verify.pass, Some(Pass { of: PassOf::Switch, .. })) {
            self.begin_pass(PassOf::Switch, &VerifyRequest::default(), now);
        }
        false
    }

    fn begin_pass(&mut self, of: PassOf, request: &VerifyRequest, now: Nanos) {
        if self.verify.pass.is_some() {
            self.end_pass(VerifyState::Cancelled, now);
        }
        let sample = Sample::new(request, self.grid.chunks());
        let grid = self.grid;
        let verify = &mut self.verify;
        verify.put_off.reset();
        verify.differed.reset();
        verify.hopeless = None;
        verify.limiter = Limiter::new(request.speed, now);
        verify.pass = Some(Pass { of, walk: Walk::Sweep(0), sample });
        verify.info = VerifyInfo {
            pass: verify.info.pass + 1,
            state: VerifyState::Running,
            speed: request.speed,
            total_bytes: sample.bytes(grid),
            checked_ever: verify.info.checked_ever,
            mismatches_ever: verify.info.mismatches_ever,
            ..VerifyInfo::default()
        };
    }

    fn end_pass(&mut self, state: VerifyState, now: Nanos) {
        self.drop_checks();
        self.report_mismatches(now, Nanos::MAX);
        if let Some(Pass { of: PassOf::Switch, .. }) = self.verify.pass.take()
            && state == VerifyState::Completed
        {
            self.verify.demand = Demand::Met;
            // What was compared may be a write that only the target's cache has: it is flushed before the switch goes on.
            if self.job_flush == JobFlush::Good {
                self.job_flush = JobFlush::Idle;
            }
        }
        self.verify.info.state = state;
        self.tell(JobEvent::VerifyEnded { pass: self.verify.info.pass, state });
    }

    /// The mirror leaves: nothing is compared any more, and nobody waits for what is in flight.
    pub(super) fn leave_verify(&mut self, now: Nanos) {
        if self.verify.pass.is_some() {
            self.end_pass(VerifyState::Cancelled, now);
        }
    }

    /// Gives up every check: those in line go, those at work end unheard.
    fn drop_checks(&mut self) {
        for check in 0..CHECKS {
            match self.verify.slot(check).state {
                CheckState::Free | CheckState::Lost => {}
                CheckState::Waiting | CheckState::Reading => self.leave_check(check),
            }
        }
    }

    /// The pass under way, if it may begin something, its rests and limits aside.
    fn pass_running(&self) -> Option<Pass> {
        let pass = self.verify.pass?;
        let runs = match (pass.of, self.stage) {
            (PassOf::Operator, Stage::Running | Stage::Ready)
            | (PassOf::Switch, Stage::Waiting(Goal::Complete)) => true,
            (PassOf::Operator | PassOf::Switch, _) => false,
        };
        // What the scan has not named yet is clean, and need not be equal.
        (runs && self.scope_is_known()).then_some(pass)
    }

    /// When verification must be looked after again though nothing has happened.
    pub(super) fn verify_deadline(&self) -> Option<Nanos> {
        let due = self.verify.due.filter(|_| self.pass_running().is_some());
        let Unreported { chunks, quiet_until, .. } = self.verify.unreported;
        [due, (chunks > 0).then_some(quiet_until)].into_iter().flatten().min()
    }

    /// Begins checks, as many as may be in flight; ends the pass when there is nothing left.
    pub(super) fn start_checks(&mut self, guest_busy: bool, now: Nanos) {
        self.verify.due = None;
        self.report_mismatches(now, now);
        if self.pass_running().is_none() {
            return;
        }
        if now < self.bad.until() {
            self.verify.due = Some(self.bad.until());
            return;
        }
        let most = if guest_busy { CHECKS_BESIDE_GUEST } else { usize::from(CHECKS) };
        for _ in 0..LOOKS {
            let taken = |check: &&Check| check.state != CheckState::Free;
            if self.verify.checks.iter().filter(taken).count() >= most {
                return;
            }
            let wait = self.verify.limiter.wait(now);
            if wait > Nanos::ZERO {
                self.verify.due = Some(now + wait);
                return;
            }
            let Some(pass) = self.pass_running() else { return };
            match self.look_for_check(pass) {
                Look::Free(run) => self.take_check(&run, now),
                Look::Busy(chunk) => {
                    let run = self.grid.bytes(&(chunk..chunk + 1));
                    return self.take_check(&run, now);
                }
                Look::Passed => {}
                Look::Nothing => return self.maybe_end_pass(now),
            }
        }
        self.verify.due = Some(now);
    }

    fn maybe_end_pass(&mut self, now: Nanos) {
        let at_work =
            |check: &Check| matches!(check.state, CheckState::Waiting | CheckState::Reading);
        if self.verify.put_off.count() == 0 && !self.verify.checks.iter().any(at_work) {
            self.end_pass(VerifyState::Completed, now);
        }
    }

    /// Looks at the next place of the walk.
    fn look_for_check(&mut self, pass: Pass) -> Look {
        match pass.walk {
            Walk::Sweep(from) => match pass.sample.next(from) {
                Some(chunk) => self.look_at_sweep(pass, chunk),
                None => {
                    self.walk_to(Walk::PutOff(0));
                    Look::Passed
                }
            },
            Walk::PutOff(from) => match self.verify.put_off.next_set(from) {
                Some(chunk) => self.look_at_put_off(pass, chunk),
                None => {
                    // Once round a turn: what must wait is looked at again when something has happened.
                    self.walk_to(Walk::PutOff(0));
                    Look::Nothing
                }
            },
        }
    }

    fn look_at_sweep(&mut self, pass: Pass, chunk: u64) -> Look {
        let one = self.grid.bytes(&(chunk..chunk + 1));
        self.walk_to(Walk::Sweep(chunk + 1));
        let shut = self.shuts(&one);
        if self.maps.dirty.get(chunk) && !shut {
            self.leave_out(pass, chunk);
            return Look::Passed;
        }
        if shut || self.ranges.free_until(&one) <= one.start {
            self.verify.put_off.set_range(&(chunk..chunk + 1));
            return Look::Passed;
        }
        let largest = u64::from(self.verify.window).min(self.verify.limiter.largest());
        let most = chunk + (largest / self.grid.granularity()).max(1);
        let mut end = chunk + 1;
        while end < most && pass.sample.next(end) == Some(end) && !self.maps.dirty.get(end) {
            end += 1;
        }
        let run = self.grid.bytes(&(chunk..end));
        let mut run = run.start..self.ranges.free_until(&run);
        if run.end <= run.start || self.shuts(&run) {
            run = one;
        }
        let chunks = self.grid.touched(run.start, run.end - run.start);
        self.walk_to(Walk::Sweep(chunks.end));
        Look::Free(run)
    }

    fn look_at_put_off(&mut self, pass: Pass, chunk: u64) -> Look {
        let one = self.grid.bytes(&(chunk..chunk + 1));
        self.walk_to(Walk::PutOff(chunk + 1));
        if self.shuts(&one) {
            return Look::Passed;
        }
        if self.maps.dirty.get(chunk) {
            if pass.of == PassOf::Operator {
                self.verify.put_off.clear_range(&(chunk..chunk + 1));
                self.leave_out(pass, chunk);
            }
            return Look::Passed;
        }
        self.verify.put_off.clear_range(&(chunk..chunk + 1));
        if self.ranges.free_until(&one) <= one.start { Look::Busy(chunk) } else { Look::Free(one) }
    }

    /// A dirty chunk: nothing to compare. A switch-over waits until it has been copied.
    fn leave_out(&mut self, pass: Pass, chunk: u64) {
        match pass.of {
            PassOf::Switch => self.verify.put_off.set_range(&(chunk..chunk + 1)),
            PassOf::Operator => {
                let bytes = self.grid.bytes(&(chunk..chunk + 1));
                self.verify.info.skipped_bytes += bytes.end - bytes.start;
            }
        }
    }

    fn walk_to(&mut self, walk: Walk) {
        if let Some(pass) = &mut self.verify.pass {
            pass.walk = walk;
        }
    }

    /// The holder that a check has in the ranges: behind those of the copies.
    fn check_holder(&self, check: u16) -> Holder {
        self.config.ops + self.config.copies + check
    }

    /// The check that a holder is, if it is one.
    pub(super) fn check_of(&self, holder: Holder) -> Option<u16> {
        holder.checked_sub(self.config.ops + self.config.copies)
    }

    /// Takes a run, or gets in line for it.
    fn take_check(&mut self, run: &Range<u64>, now: Nanos) {
        let free = (0..CHECKS).find(|check| self.verify.slot(*check).state == CheckState::Free);
        let Some(check) = free else { return };
        let entered = if planted(Bug::VerifyTakesNoRange) {
            Entered::Granted
        } else {
            self.ranges.enter_check(self.check_holder(check), run)
        };
        *self.verify.slot(check) = Check {
            state: CheckState::Waiting,
            start: run.start,
            end: run.end,
            at: run.start,
            upto: run.start,
            ..Check::FREE
        };
        if entered == Entered::Granted {
            self.read_both(check, now);
        }
    }

    /// A check that was in line has its chunk.
    pub(super) fn check_granted(&mut self, check: u16, now: Nanos) {
        let Check { start, end, .. } = *self.verify.slot(check);
        let chunks = self.grid.touched(start, end - start);
        let dirty = self.maps.dirty.count_range(&chunks) > 0;
        if self.pass_running().is_none() || dirty || self.shuts(&(start..end)) {
            self.verify.put_off.set_range(&chunks);
            return self.leave_check(check);
        }
        self.read_both(check, now);
    }

    /// Reads the next window from both legs.
    fn read_both(&mut self, check: u16, now: Nanos) {
        let window = u64::from(self.verify.window);
        let slot = self.verify.slot(check);
        slot.state = CheckState::Reading;
        slot.since = now;
        slot.at = slot.upto;
        slot.upto = slot.end.min(slot.at + window);
        slot.reads = [Reading::Flying; 2];
        let (offset, bytes) = (slot.at, slot.upto - slot.at);
        self.verify.limiter.charge(bytes);
        #[allow(clippy::cast_possible_truncation)] // at most a window
        let length = bytes as u32;
        for side in [Side::Source, Side::Target] {
            self.act(Action::CheckRead { check, side, offset, length });
        }
    }

    /// A leg's window has been read, or could not be.
    pub(super) fn check_read_done(
        &mut self,
        check: u16,
        side: Side,
        result: Result<(), IoError>,
        now: Nanos,
    ) {
        let slot = self.verify.slot(check);
        debug_assert!(slot.flies(side), "check {check} reads nothing of the {}", side.name());
        slot.reads[side as usize] = Reading::Good;
        let (state, done) = (slot.state, slot.reads == [Reading::Good; 2]);
        let (offset, upto) = (slot.at, slot.upto);
        match (state, result) {
            (CheckState::Lost, _) => self.free_check(check),
            (_, Err(error)) => self.check_failed(check, side, error, now),
            (_, Ok(())) if done => {
                #[allow(clippy::cast_possible_truncation)] // at most a window
                let length = (upto - offset) as u32;
                self.act(Action::Compare { check, offset, length });
            }
            (_, Ok(())) => {}
        }
        self.pump(now);
    }

    /// The performer has found that the legs differ in this chunk of a check's window.
    pub(super) fn chunk_differs(&mut self, chunk: u64) {
        let one = chunk..chunk + 1;
        let Some(pass) = self.verify.pass else { return };
        // Dirty meanwhile, for a failed flush: known already.
        if self.maps.dirty.get(chunk) {
            return;
        }
        self.dirty(&one);
        self.maps.target_zero.clear_range(&one);
        let bytes = self.grid.bytes(&one);
        let verify = &mut self.verify;
        if verify.unreported.chunks == 0 {
            verify.unreported.offset = bytes.start;
        }
        verify.unreported.chunks += 1;
        verify.info.mismatches_ever += 1;
        let again = verify.differed.get(chunk);
        if !again {
            verify.info.mismatched_bytes += bytes.end - bytes.start;
            verify.differed.set_range(&one);
        }
        match (pass.of, again) {
            (PassOf::Switch, true) => verify.hopeless = Some(bytes.start),
            (PassOf::Switch, false) => verify.put_off.set_range(&one),
            (PassOf::Operator, _) => {}
        }
    }

    /// All of a check's window has been compared.
    pub(super) fn compared(&mut self, check: u16, now: Nanos) {
        let Check { state, at, upto, end, .. } = *self.verify.slot(check);
        if state != CheckState::Reading {
            return;
        }
        self.verify.slot(check).reads = [Reading::Idle; 2];
        self.verify.info.checked_bytes += upto - at;
        self.verify.info.checked_ever += upto - at;
        self.report_mismatches(now, now);
        if let Some(offset) = self.verify.hopeless.take() {
            self.leave_check(check);
            self.undo_unequal(JobFailure::Differs { offset }, now);
        } else if upto == end {
            self.leave_check(check);
        } else {
            self.read_both(check, now);
        }
        self.pump(now);
    }

    /// A read failed: what could not be compared is dirty, what was not tried is put off.
    fn check_failed(&mut self, check: u16, side: Side, error: IoError, now: Nanos) {
        let Check { at, upto, end, .. } = *self.verify.slot(check);
        self.verify.info.skipped_bytes += upto - at;
        if upto < end {
            self.verify.put_off.set_range(&self.grid.covered(upto, end - upto));
        }
        self.bad.failed_anywhere(now);
        self.failed(Failed::CheckRead(side), IoKind::Read, &(at..upto), error, now);
        // The job may have ended for it, and given the check up.
        if self.verify.slot(check).state == CheckState::Reading {
            self.leave_check(check);
        }
    }

    /// Lets a check's range go; its slot stays as long as a read has not ended.
    fn leave_check(&mut self, check: u16) {
        self.verify.slot(check).state = CheckState::Lost;
        self.ranges.leave(self.check_holder(check));
        self.free_check(check);
    }

    fn free_check(&mut self, check: u16) {
        let slot = self.verify.slot(check);
        if !slot.flies(Side::Source) && !slot.flies(Side::Target) {
            *slot = Check::FREE;
        }
    }

    /// Gives up reads of the target that are too old.
    pub(super) fn lose_late_checks(&mut self, late: impl Fn(Nanos) -> bool, now: Nanos) {
        for check in 0..CHECKS {
            let slot = self.verify.slot(check);
            let reads = slot.state == CheckState::Reading && slot.flies(Side::Target);
            if reads && late(slot.since) {
                self.check_failed(check, Side::Target, IoError::TIMED_OUT, now);
            }
        }
    }

    /// Reports what was found to differ, if `upto` is past the pause since the last report.
    fn report_mismatches(&mut self, now: Nanos, upto: Nanos) {
        let Unreported { offset, chunks, quiet_until } = self.verify.unreported;
        if chunks == 0 || upto < quiet_until {
            return;
        }
        self.verify.unreported = Unreported { quiet_until: now + SPACING, ..Unreported::default() };
        self.tell(JobEvent::VerifyMismatch { offset, chunks });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(percent: u8, seed: u64, chunks: u64) -> Vec<u64> {
        let request = VerifyRequest { sample_percent: percent, speed: 0, seed };
        let sample = Sample::new(&request, chunks);
        let mut list = Vec::new();
        let mut from = 0;
        while let Some(chunk) = sample.next(from) {
            list.push(chunk);
            from = chunk + 1;
        }
        list
    }

    #[test]
    fn a_sample_has_its_size_and_is_spread_over_the_disk() {
        for (percent, chunks) in [(1, 1000), (7, 999), (10, 5), (60, 101), (99, 12_345)] {
            let list = sample(percent, 42, chunks);
            let expected = (chunks * u64::from(percent)).div_ceil(100);
            assert_eq!(list.len() as u64, expected, "{percent}% of {chunks}");
            assert!(list.iter().all(|chunk| *chunk < chunks));
            // No gap is longer than two strata.
            let longest = 2 * 100u64.div_ceil(u64::from(percent)) + 1;
            assert!(list.windows(2).all(|pair| pair[1] - pair[0] <= longest));
        }
    }

    #[test]
    fn a_full_pass_has_every_chunk_and_another_seed_is_another_sample() {
        assert_eq!(sample(100, 3, 77), (0..77).collect::<Vec<_>>());
        assert_ne!(sample(5, 1, 10_000), sample(5, 2, 10_000));
        assert_eq!(sample(5, 1, 10_000), sample(5, 1, 10_000));
    }

    #[test]
    fn the_bytes_of_a_sample_count_a_short_last_chunk_as_it_is() {
        let grid = Grid::new(10 * 4096 + 512, 4096);
        let full = Sample::new(&VerifyRequest::default(), grid.chunks());
        assert_eq!(full.bytes(grid), 10 * 4096 + 512);
    }
}
