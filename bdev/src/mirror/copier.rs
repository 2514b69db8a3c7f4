//! The copier: brings over what is dirty, beside the guest.
//!
//! A copy takes a run of dirty chunks, clears their bits, and only then reads: what the guest dirties later stays dirty.
//! It goes through its run window by window, each read whole and written piece by piece: data as data, zeroes as zeroes,
//! and nothing where the target reads zero already. A run inside a hole is not read at all. If anything fails, all of the
//! run is dirty again.
//!
//! Where somebody holds both legs who can copy without reading and writing (`offload`), and no guest is at work, runs are left to
//! him: a file system keeps everybody from both files meanwhile. If he cannot, which is no fault of either leg, the run is dirty
//! again, and copied as others are from then on.
//!
//! Beside a guest the copier takes little room. Where the device does the work that is a matter of how much is in flight, and for how
//! much of the time (`share`). Where the reactor does it itself (both legs work inline), whatever the copier moves the guest waits for:
//! there it moves, at a time, in proportion to what the guest has asked for meanwhile, so that both get their share of the core
//! whatever a request costs; as long as the job gets on by that.
//!
//! A copy holds its chunks against guest writes for as long as it lasts. The copier looks for chunks where no guest write
//! is; only if it finds none does a copy get in line behind one, so that a chunk written without pause is copied too.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::core::{Action, Core};
use super::errors::Manner;
use super::life::{JobFlush, Stage};
use super::pieces::{Kind, Plan, UnitMap};
use super::ranges::Entered;
use super::tables::{Failed, Mirroring};
use super::throttle::WINDOW_MAX;
use crate::io::{BdevIo, IoError, IoKind};
use crate::job::{CopyMode, JobEvent, WriteCounts};

/// How much room the copier takes on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pace {
    /// All: nobody else is there.
    Alone,
    /// As little as brings the job to its end: a guest is at work, and meets copies on the device and in its chunks.
    Gentle,
    /// A guest is at work and makes chunks dirty faster than a gentle copier cleans them.
    Firm,
    /// What the throttle allows beside a guest whose latency has a ceiling, evenly spaced.
    Held,
}

impl Pace {
    /// Copies in flight.
    fn copies(self, inline: bool) -> usize {
        match self {
            Self::Firm => 4,
            _ if inline => 1,
            Self::Alone => usize::MAX,
            Self::Gentle => 1,
            // As many as a slow target needs to take what is allowed.
            Self::Held => 8,
        }
    }
}

/// Where the reactor does the work: bytes that the copier reads at once where no guest is at work, few enough to be still in the
/// core's cache when they are written.
const INLINE_ALONE: u64 = 256 << 10;

/// There, and beside a guest whose latency has a ceiling: what it asks for meanwhile waits until they are copied, some 10 µs. How
/// often it may meet that is the throttle's to find.
const INLINE_HELD: u64 = 16 << 10;

/// Where a device does it: bytes of one copy beside a guest whose latency has a ceiling.
const HELD_RUN: u64 = 128 << 10;

/// A guest that had nothing in flight for so long is not at work. Shorter, and the copier would fill the device in the moment
/// between two requests of a guest that makes one at a time.
const GUEST_RESTS: Nanos = Nanos::from_millis(2);
/// Copies in flight where whoever holds both legs makes them, one after the other: one is always ready for him.
const OFFLOADS: usize = 2;
/// Places looked at in one turn: bounded work.
const LOOKS: usize = 32;

/// What was done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counters {
    /// Bytes copied as data.
    pub copied: u64,
    /// Of them, bytes that were neither read nor written.
    pub offloaded: u64,
    /// Bytes made zero.
    pub zero: u64,
    /// Bytes that were zero on both legs.
    pub skipped: u64,
    /// Bytes of guest writes that the target has taken.
    pub mirrored: u64,
    /// Guest writes, and their bytes, that an observer did not get.
    pub dropped_writes: u64,
    pub dropped: u64,
    /// Guest writes by what they met.
    pub writes: WriteCounts,
}

/// Where a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CopyState {
    /// The slot is free.
    Free,
    /// In line behind guest writes.
    Waiting,
    /// Reads a window.
    Reading,
    /// Writes a piece of it.
    Writing,
    /// Given up; its read has not ended.
    LostRead,
    /// Given up; its write has not ended and may still land.
    LostWrite,
}

/// How a run is brought over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum How {
    /// It is read, and what is not zero is written.
    Read,
    /// The source is known to read zero there.
    Hole,
    /// By whoever holds both legs.
    Offload,
}

/// One run of chunks on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub state: CopyState,
    /// First byte and end; whole chunks.
    pub start: u64,
    pub end: u64,
    how: How,
    /// The window that is being worked on.
    plan: Plan,
    /// The piece of it that is being written.
    piece: u64,
    piece_end: u64,
    kind: Kind,
    /// When the piece was sent.
    pub since: Nanos,
}

impl Copy {
    pub(super) const FREE: Self = Self {
        state: CopyState::Free,
        start: 0,
        end: 0,
        how: How::Read,
        plan: Plan::EMPTY,
        piece: 0,
        piece_end: 0,
        kind: Kind::Data,
        since: Nanos::ZERO,
    };

    /// Whether an I/O that was given up may still land there.
    pub(super) fn is_shut(&self) -> bool {
        self.state == CopyState::LostWrite
    }

    /// Whether it has cleared bits and not ended.
    pub(super) fn is_at_work(&self) -> bool {
        matches!(self.state, CopyState::Reading | CopyState::Writing)
    }

    /// The window being read or written: its first byte and its length.
    pub(super) fn window(&self) -> (u64, u32) {
        let length = self.plan.end - self.plan.start;
        (self.plan.start, u32::try_from(length).unwrap_or(u32::MAX))
    }

    /// Bytes still to do.
    pub(super) fn left(&self) -> u64 {
        if self.is_at_work() { self.end - self.piece } else { 0 }
    }
}

impl Core {
    /// Whether the job is in a stage in which it copies.
    pub(super) fn stage_copies(&self) -> bool {
        match self.stage {
            Stage::Running | Stage::Ready | Stage::Waiting(_) => true,
            Stage::Pending(_, step) => step.copies(),
            Stage::Created | Stage::Paused(_) | Stage::Standby(_) | Stage::Leaving(_) => false,
        }
    }

    /// Whether the copier may begin something, its rests and limits aside.
    fn copier_runs(&self) -> bool {
        // While the job's own flush is in flight nothing is begun, or a guest that writes all the time would keep the
        // job from ever being ready.
        let flushes = matches!(self.job_flush, JobFlush::Asked(_));
        self.stage_copies() && !flushes && self.maps.dirty.count() > 0
    }

    /// When the copier may begin what it could not in its last turn, unless the end of an I/O tells it.
    pub(super) fn copier_deadline(&self) -> Option<Nanos> {
        self.copier_due.filter(|_| self.copier_runs())
    }

    /// How much room the copier may take from now on.
    pub(super) fn next_pace(&mut self, guest_busy: bool, now: Nanos) -> Pace {
        if guest_busy {
            self.guest_seen = Some(now);
        }
        // A ceiling is also for a guest that asks for little and seldom.
        let held = self.throttle.ceiling().is_some();
        let rests = if held { WINDOW_MAX } else { GUEST_RESTS };
        if self.guest_seen.is_none_or(|seen| now >= seen + rests) {
            return Pace::Alone;
        }
        let shrinks = match self.mirroring() {
            // What goes to both legs makes nothing dirty, so any pace gets there.
            Mirroring::Both | Mirroring::Switching => true,
            Mirroring::Behind | Mirroring::Trailing | Mirroring::Detached => {
                self.shrinks(now) || self.begins_to_trail(now)
            }
        };
        match (held, shrinks) {
            (true, _) => Pace::Held,
            (false, true) => Pace::Gentle,
            (false, false) => Pace::Firm,
        }
    }

    /// Changes the ceiling of the guest's latency.
    pub(super) fn set_ceiling(&mut self, ceiling: Option<Nanos>, now: Nanos) {
        self.throttle.set_ceiling(ceiling);
        self.follow_throttle(now);
    }

    /// The limiter beside the guest goes by what the throttle allows now.
    pub(super) fn follow_throttle(&mut self, now: Nanos) {
        self.beside_guest.set_speed(self.throttle.allowance().unwrap_or(0), now);
    }

    /// Whether what is left gets less beside a guest whose writes make chunks dirty.
    fn shrinks(&mut self, now: Nanos) -> bool {
        if self.maps.dirty.count() == 0 || !self.stage_copies() {
            self.chase.over();
        } else if self.config.auto_converge && !self.auto_converged {
            self.maybe_converge(now);
        }
        if self.shrinking.is_due(now) {
            // Once it is ready it is to stay near; before, it is to get there.
            let ready = self.stage == Stage::Ready;
            let few = if ready { self.config.window.into() } else { 0 };
            self.shrinking.seen(self.left_bytes(), self.done_bytes(), few, now);
        }
        self.shrinking.yes()
    }

    /// Bytes that are to be copied, those of copies under way among them.
    pub(super) fn left_bytes(&self) -> u64 {
        self.maps.dirty.bytes() + self.in_flight_bytes()
    }

    /// Bytes that the copier has dealt with since the job began.
    pub(super) fn done_bytes(&self) -> u64 {
        let Counters { copied, zero, skipped, .. } = self.counters;
        copied + zero + skipped
    }

    /// Bytes that copies under way have yet to do.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.copies.iter().map(Copy::left).sum()
    }

    /// A background copy that has been for nothing for some seconds goes over to write-blocking, once, where that is allowed.
    fn maybe_converge(&mut self, now: Nanos) {
        let switches = !matches!(self.stage, Stage::Running | Stage::Ready);
        if self.chase.is_vain(self.left_bytes(), self.done_bytes(), now) && !switches {
            self.auto_converged = true;
            self.config.copy_mode = CopyMode::WriteBlocking;
            self.tell(JobEvent::AutoConverged);
        }
    }

    /// Begins copies, as many as may be in flight.
    pub(super) fn start_copies(&mut self, now: Nanos) {
        self.copier_due = None;
        if self.pace != Pace::Held {
            self.beside_guest.forgive(now);
        }
        if !self.copier_runs() {
            return self.share.off();
        }
        if now < self.bad.until() {
            self.copier_due = Some(self.bad.until());
            return self.share.off();
        }
        // What was given up and has not ended holds nobody up.
        let live = |copy: &&Copy| copy.state == CopyState::Waiting || copy.is_at_work();
        if self.pace == Pace::Gentle && !self.config.inline {
            let is_idle = || !self.copies.iter().any(|copy| live(&copy));
            if let Some(until) = self.share.rests_until(is_idle, now) {
                self.copier_due = Some(until);
                return;
            }
        } else {
            self.share.off();
        }
        let most = self.pace.copies(self.config.inline);
        let offloads = self.config.offload_run.is_some() && self.pace == Pace::Alone;
        let most = if offloads { most.min(OFFLOADS) } else { most };
        let taken = |copy: &&Copy| copy.state != CopyState::Free;
        let (mut busy, mut looks) = (None, 0);
        let mut sweep = Sweep { from: self.cursor, wrapped: false };
        loop {
            let Some(free) = self.copies.iter().position(|copy| copy.state == CopyState::Free)
            else {
                return;
            };
            if self.copies.iter().filter(live).count() >= most {
                return;
            }
            let wait = self.limiter.wait(now).max(self.beside_guest.wait(now));
            if wait > Nanos::ZERO {
                self.copier_due = Some(now + wait);
                return self.share.off();
            }
            if looks == LOOKS {
                self.copier_due = Some(now);
                break;
            }
            looks += 1;
            #[allow(clippy::cast_possible_truncation)] // fewer copies than fit u16
            let free = free as u16;
            match self.look(&mut sweep, now) {
                Look::Nothing => break,
                Look::Rests(until) => {
                    let due = self.copier_due.map_or(until, |due| due.min(until));
                    self.copier_due = Some(due);
                }
                Look::Free { run, how } => self.begin(free, run, how, now),
                Look::Shut => {}
                Look::Busy(chunk) => busy = busy.or(Some(chunk)),
            }
        }
        // Nothing that is free was found: get in line.
        if let Some(chunk) = busy.filter(|_| self.copies.iter().all(|copy| !taken(&copy))) {
            self.reserve(0, chunk);
        }
    }

    /// Looks at the next dirty run, once round the disk.
    fn look(&mut self, sweep: &mut Sweep, now: Nanos) -> Look {
        let limit = self.scanned_upto / self.grid.granularity();
        let limit = if self.scanned_upto >= self.grid.size() { self.grid.chunks() } else { limit };
        let dirty = &self.maps.dirty;
        let next = |from| dirty.next_set(from).filter(|chunk| *chunk < limit);
        let Some(first) = next(self.cursor).or_else(|| next(0)) else { return Look::Nothing };
        if sweep.is_over(self.cursor, first) {
            return Look::Nothing;
        }
        let alone = self.pace == Pace::Alone;
        let hole = self.maps.hole.get(first);
        let (how, largest) = match self.config.offload_run {
            _ if hole && alone => (How::Hole, self.config.hole_run),
            _ if hole => (How::Hole, self.config.run),
            Some(run) if alone && self.may_offload(first) => (How::Offload, run),
            _ => (How::Read, self.config.run.min(self.run())),
        };
        let largest = if how == How::Hole { largest } else { largest.min(self.limiter.largest()) };
        let most = (largest / self.grid.granularity()).max(1);
        let mut end = dirty.next_clear(first, (first + most).min(limit));
        end = if how == How::Hole {
            self.maps.hole.next_clear(first, end)
        } else {
            self.maps.hole.next_set(first).map_or(end, |hole| hole.min(end))
        };
        if how == How::Offload && !self.may_offload(end - 1) {
            end -= 1;
        }
        match self.bad.manner(first, end, now) {
            Manner::Free(upto) => end = upto,
            Manner::Alone => end = first + 1,
            Manner::Rests(until) => {
                self.cursor = first + 1;
                return Look::Rests(until);
            }
        }
        let bytes = self.grid.bytes(&(first..end));
        let free_until = self.ranges.free_until(&bytes);
        if free_until <= bytes.start {
            self.cursor = first + 1;
            return Look::Busy(first);
        }
        let run = bytes.start..free_until;
        self.cursor = self.grid.touched(run.start, run.end - run.start).end;
        if self.shuts(&run) { Look::Shut } else { Look::Free { run, how } }
    }

    /// Gets in line for a chunk where guest writes are.
    fn reserve(&mut self, copy: u16, chunk: u64) {
        let bytes = self.grid.bytes(&(chunk..chunk + 1));
        if self.shuts(&bytes) {
            return;
        }
        let entered = self.ranges.enter_copy(self.holder_of(copy), &bytes);
        debug_assert_ne!(entered, Entered::Granted, "the chunk was busy");
        self.copies[usize::from(copy)] =
            Copy { state: CopyState::Waiting, start: bytes.start, end: bytes.end, ..Copy::FREE };
    }

    /// A copy that was in line has its chunk.
    pub(super) fn copy_granted(&mut self, copy: u16, now: Nanos) {
        let Copy { start, end, .. } = self.copies[usize::from(copy)];
        let chunks = self.grid.touched(start, end - start);
        let still_dirty = self.maps.dirty.count_range(&chunks) > 0;
        if !self.copier_runs() || !still_dirty || self.shuts(&(start..end)) {
            return self.forget_copy(copy);
        }
        let how = if self.maps.hole.get(chunks.start) { How::Hole } else { How::Read };
        self.work(copy, how, now);
    }

    /// Whether a chunk may be left to whoever holds both legs: one that is cut short by the end of the disk may not be made of his
    /// blocks.
    fn may_offload(&self, chunk: u64) -> bool {
        let bytes = self.grid.bytes(&(chunk..chunk + 1));
        bytes.end - bytes.start == self.grid.granularity()
    }

    fn begin(&mut self, copy: u16, run: Range<u64>, how: How, now: Nanos) {
        self.ranges.enter_copy(self.holder_of(copy), &run);
        let slot = &mut self.copies[usize::from(copy)];
        *slot = Copy { start: run.start, end: run.end, ..Copy::FREE };
        self.work(copy, how, now);
    }

    /// The copy has its range: clear the bits, then read.
    fn work(&mut self, copy: u16, how: How, now: Nanos) {
        let slot = &mut self.copies[usize::from(copy)];
        let (start, end) = (slot.start, slot.end);
        slot.how = how;
        slot.plan = Plan::new(&(start..start), 1);
        (slot.piece, slot.piece_end) = (start, start);
        slot.state = CopyState::Reading;
        self.job_flush = JobFlush::Idle;
        self.maps.dirty.clear_range(&self.grid.touched(start, end - start));
        self.next_piece(copy, now);
    }

    /// A window has been read; `zeroes` says what of it is zero.
    pub(super) fn read_done(&mut self, copy: u16, result: Result<UnitMap, IoError>, now: Nanos) {
        let slot = &mut self.copies[usize::from(copy)];
        match (slot.state, result) {
            (CopyState::Reading, Ok(zeroes)) => {
                slot.plan.decide(self.grid, &zeroes, &self.maps.target_zero);
                self.next_piece(copy, now);
            }
            (CopyState::Reading, Err(error)) => {
                self.copy_failed(copy, Failed::CopyRead, error, now)
            }
            (CopyState::LostRead, _) => *slot = Copy::FREE,
            (
                CopyState::Free | CopyState::Waiting | CopyState::Writing | CopyState::LostWrite,
                _,
            ) => {
                debug_assert!(false, "copy {copy} reads in state {:?}", slot.state);
            }
        }
        self.pump(now);
    }

    /// A piece has been written.
    pub(super) fn write_done(&mut self, copy: u16, result: Result<(), IoError>, now: Nanos) {
        let slot = &mut self.copies[usize::from(copy)];
        match (slot.state, result) {
            (CopyState::Writing, Ok(())) => {
                let (bytes, kind, how) = (slot.piece..slot.piece_end, slot.kind, slot.how);
                if how != How::Hole {
                    self.rates.worked(bytes.end - bytes.start);
                }
                self.piece_landed(&bytes, kind);
                self.next_piece(copy, now);
            }
            (CopyState::Writing, Err(_)) if slot.kind == Kind::Offloaded => {
                self.offload_failed(copy);
            }
            (CopyState::Writing, Err(error)) => {
                self.copy_failed(copy, Failed::CopyWrite, error, now);
            }
            (CopyState::LostWrite, _) => {
                *slot = Copy::FREE;
                self.lost_copies -= 1;
            }
            (
                CopyState::Free | CopyState::Waiting | CopyState::Reading | CopyState::LostRead,
                _,
            ) => {
                debug_assert!(false, "copy {copy} writes in state {:?}", slot.state);
            }
        }
        self.pump(now);
    }

    fn piece_landed(&mut self, bytes: &Range<u64>, kind: Kind) {
        let length = bytes.end - bytes.start;
        let touched = self.grid.touched(bytes.start, length);
        self.lines[crate::job::Side::Target as usize].wrote(&touched);
        self.rates.copied(length);
        if kind == Kind::Zero {
            self.counters.zero += length;
            let covered = self.grid.covered(bytes.start, length);
            // Dirty again means that a flush failed meanwhile: the zeroes may be lost.
            if self.maps.dirty.count_range(&covered) == 0 {
                self.maps.target_zero.set_range(&covered);
            }
        } else {
            self.counters.copied += length;
            self.counters.offloaded += if kind == Kind::Offloaded { length } else { 0 };
        }
    }

    /// Goes on behind the piece that has been dealt with: the next piece, the next window, or the end.
    fn next_piece(&mut self, copy: u16, now: Nanos) {
        loop {
            let Copy { end, how, plan, piece_end: at, .. } = self.copies[usize::from(copy)];
            if at == end {
                return self.copy_succeeded(copy);
            }
            let (bytes, kind) = match how {
                How::Read if at == plan.end => return self.read_window(copy, now),
                How::Read => plan.piece(at, self.config.max_zeroes),
                How::Hole => self.hole_piece(at, end),
                How::Offload => {
                    self.charge(end - at);
                    (at..end, Kind::Offloaded)
                }
            };
            let length = bytes.end - bytes.start;
            debug_assert!(length > 0 && bytes.end <= end);
            if how == How::Read && kind != Kind::Data {
                self.limiter.refund(length);
            }
            if kind != Kind::Skip {
                return self.write_piece(copy, &bytes, kind, now);
            }
            self.counters.skipped += length;
            self.rates.copied(length);
            if how != How::Hole {
                self.rates.worked(length);
            }
            let slot = &mut self.copies[usize::from(copy)];
            (slot.piece, slot.piece_end) = (bytes.end, bytes.end);
        }
    }

    /// The next piece of a run that is known to be a hole.
    fn hole_piece(&self, at: u64, end: u64) -> (Range<u64>, Kind) {
        let chunks = self.grid.touched(at, end - at);
        let known = &self.maps.target_zero;
        if known.get(chunks.start) {
            let skipped = chunks.start..known.next_clear(chunks.start, chunks.end);
            return (at..self.grid.bytes(&skipped).end, Kind::Skip);
        }
        let next = known.next_set(chunks.start).map_or(chunks.end, |chunk| chunk.min(chunks.end));
        let end = self.grid.bytes(&(chunks.start..next)).end;
        (at..end.min(at.saturating_add(self.config.max_zeroes)), Kind::Zero)
    }

    fn write_piece(&mut self, copy: u16, bytes: &Range<u64>, kind: Kind, now: Nanos) {
        let slot = &mut self.copies[usize::from(copy)];
        slot.state = CopyState::Writing;
        slot.since = now;
        (slot.piece, slot.piece_end, slot.kind) = (bytes.start, bytes.end, kind);
        let (offset, length) = (bytes.start, bytes.end - bytes.start);
        if kind == Kind::Zero {
            return self.act(Action::CopyZero { copy, offset, length });
        }
        if kind == Kind::Offloaded {
            self.maps.target_zero.clear_range(&self.grid.touched(offset, length));
            return self.act(Action::CopyOffload { copy, offset, length });
        }
        #[allow(clippy::cast_possible_truncation)] // a window is less than 4 GiB
        let (skip, short) = ((offset - slot.plan.start) as u32, length as u32);
        self.maps.target_zero.clear_range(&self.grid.touched(offset, length));
        self.act(Action::CopyWrite { copy, offset, length: short, skip });
    }

    /// The guest has asked for something.
    pub(super) fn guest_asks(&mut self, io: &BdevIo) {
        if io.kind.has_payload() {
            self.asked = self.asked.saturating_add(io.length);
        }
    }

    /// The guest has its answer, after so long.
    #[inline]
    pub(super) fn guest_answered(&mut self, latency: Nanos) {
        self.throttle.answered(latency);
        self.share.answered();
    }

    /// Bytes that leave a guest something like two thirds of the core: in a window, a read and a write, it has asked twice; and a copied
    /// byte costs about as much as one that the guest writes.
    fn gentle_window(&self) -> u64 {
        self.asked / 4 * 3
    }

    /// Bytes that are to be read at once where the reactor does the work.
    fn inline_window(&self) -> u64 {
        match self.pace {
            Pace::Alone => INLINE_ALONE,
            Pace::Gentle => self.gentle_window(),
            // Held back, it may not have read for long, and the guest has asked for much since.
            Pace::Held => self.gentle_window().min(INLINE_HELD),
            // A write of a block makes a whole chunk dirty: no share of what the guest asks for is enough for sure.
            Pace::Firm => self.config.window.into(),
        }
    }

    /// Bytes of one copy of data.
    fn run(&self) -> u64 {
        match (self.pace, self.config.inline) {
            (Pace::Alone | Pace::Firm, _) => u64::MAX,
            // A window, or the guest would meet it for long.
            (Pace::Gentle | Pace::Held, true) => self.inline_window(),
            (Pace::Gentle, false) => self.share.window(),
            (Pace::Held, false) => HELD_RUN,
        }
    }

    /// The window that is read now, in bytes: whole units of zero detection. What the guest has asked for is used up by it.
    fn take_window(&mut self) -> u64 {
        let (most, unit) = (u64::from(self.config.window), u64::from(self.config.zero_unit));
        if !self.config.inline {
            return most.min(self.run());
        }
        let window = self.inline_window();
        self.asked = 0;
        window.next_multiple_of(unit).clamp(unit, most)
    }

    fn read_window(&mut self, copy: u16, now: Nanos) {
        let (window, unit) = (self.take_window(), self.config.zero_unit);
        let slot = &mut self.copies[usize::from(copy)];
        slot.state = CopyState::Reading;
        slot.since = now;
        let offset = slot.piece_end;
        slot.piece = offset;
        slot.plan = Plan::new(&(offset..slot.end.min(offset + window)), unit);
        let length = slot.plan.end - offset;
        self.charge(length);
        #[allow(clippy::cast_possible_truncation)] // at most a window
        self.act(Action::CopyRead { copy, offset, length: length as u32 });
    }

    /// Data is about to be copied.
    fn charge(&mut self, length: u64) {
        self.limiter.charge(length);
        self.beside_guest.charge(length);
        self.throttle.moves(length);
    }

    /// Whoever holds both legs cannot bring a run over: it is copied as others are, and what is wrong with a leg is met there.
    fn offload_failed(&mut self, copy: u16) {
        let Copy { piece, end, .. } = self.copies[usize::from(copy)];
        self.config.offload_run = None;
        self.copies[usize::from(copy)] = Copy::FREE;
        self.redirty_copy(piece, end);
        self.ranges.leave(self.holder_of(copy));
    }

    fn copy_succeeded(&mut self, copy: u16) {
        let Copy { start, end, .. } = self.copies[usize::from(copy)];
        self.now_on_target(&(start..end));
        self.bad.copied(&self.grid.touched(start, end - start));
        self.ranges.leave(self.holder_of(copy));
        self.copies[usize::from(copy)] = Copy::FREE;
    }

    fn copy_failed(&mut self, copy: u16, failed: Failed, error: IoError, now: Nanos) {
        let Copy { end, piece, .. } = self.copies[usize::from(copy)];
        let bad = self.part_at_work(copy);
        let kind = if failed == Failed::CopyRead { IoKind::Read } else { IoKind::Write };
        // What a failed zeroing left behind is not known.
        self.maps.target_zero.clear_range(&self.grid.touched(piece, end - piece));
        self.copies[usize::from(copy)] = Copy::FREE;
        self.redirty_copy(piece, end);
        self.rest_there(&bad, now);
        self.failed(failed, kind, &(piece..end), error, now);
        self.ranges.leave(self.holder_of(copy));
    }

    /// The chunks of the I/O that a copy has in flight.
    fn part_at_work(&self, copy: u16) -> Range<u64> {
        let slot = &self.copies[usize::from(copy)];
        let bytes = match slot.state {
            CopyState::Reading => slot.plan.start..slot.plan.end,
            _ => slot.piece..slot.piece_end,
        };
        self.grid.touched(bytes.start, bytes.end - bytes.start)
    }

    /// The copier rests where a copy failed.
    fn rest_there(&mut self, chunks: &Range<u64>, now: Nanos) {
        let dirty = &self.maps.dirty;
        self.bad.failed(chunks, |spot| dirty.count_range(spot) > 0, now);
    }

    /// What a copy did not bring over is dirty: the piece that failed and all behind it. The pieces before it have landed.
    fn redirty_copy(&mut self, piece: u64, end: u64) {
        if !planted(Bug::FailedCopyForgotten) {
            self.dirty(&self.grid.touched(piece, end - piece));
        }
    }

    /// A copy's write timed out: the range is dirty, and shut until it ends.
    pub(super) fn lose_copy_write(&mut self, copy: u16, now: Nanos) {
        let Copy { end, piece, .. } = self.copies[usize::from(copy)];
        let bad = self.part_at_work(copy);
        self.copies[usize::from(copy)].state = CopyState::LostWrite;
        self.lost_copies += 1;
        self.maps.target_zero.clear_range(&self.grid.touched(piece, end - piece));
        self.redirty_copy(piece, end);
        self.rest_there(&bad, now);
        self.failed(Failed::CopyWrite, IoKind::Write, &(piece..end), IoError::TIMED_OUT, now);
        self.ranges.leave(self.holder_of(copy));
    }

    /// Gives up every copy.
    pub(super) fn drop_copies(&mut self) {
        for copy in 0..self.config.copies {
            self.drop_copy(copy);
        }
    }

    /// Gives up the copies that are in a guest's way, where nobody waits for the target.
    pub(super) fn drop_copies_in(&mut self, bytes: &Range<u64>) {
        let touched = self.grid.touched(bytes.start, bytes.end - bytes.start);
        let touched = self.grid.bytes(&touched);
        for copy in 0..self.config.copies {
            let Copy { start, end, .. } = self.copies[usize::from(copy)];
            if start < touched.end && touched.start < end {
                self.drop_copy(copy);
            }
        }
    }

    /// Gives up a copy: one in line goes, one at work ends unheard.
    fn drop_copy(&mut self, copy: u16) {
        let Copy { state, start, end, .. } = self.copies[usize::from(copy)];
        let lost = match state {
            CopyState::Reading => CopyState::LostRead,
            CopyState::Writing => {
                self.lost_copies += 1;
                CopyState::LostWrite
            }
            CopyState::Waiting => return self.forget_copy(copy),
            CopyState::Free | CopyState::LostRead | CopyState::LostWrite => return,
        };
        self.copies[usize::from(copy)].state = lost;
        self.dirty(&self.grid.touched(start, end - start));
        self.ranges.leave(self.holder_of(copy));
    }

    /// Forgets copies that are in line: the job pauses.
    pub(super) fn forget_waiting_copies(&mut self) {
        for copy in 0..self.config.copies {
            if self.copies[usize::from(copy)].state == CopyState::Waiting {
                self.forget_copy(copy);
            }
        }
    }

    fn forget_copy(&mut self, copy: u16) {
        self.ranges.leave(self.holder_of(copy));
        self.copies[usize::from(copy)] = Copy::FREE;
    }

    /// A hole report: the chunks wholly in it read zero, unless the guest has written there since the mirror was inserted.
    pub(super) fn hole_reported(&mut self, offset: u64, length: u64) {
        let chunks = self.grid.covered(offset, length.min(self.grid.size().saturating_sub(offset)));
        let end = chunks.end.min(self.grid.chunks());
        let mut at = chunks.start;
        while at < end {
            let wrote = self.maps.guest_wrote.next_set(at).map_or(end, |chunk| chunk.min(end));
            if planted(Bug::StaleHoleBelieved) {
                self.maps.hole.set_range(&(at..end));
                return;
            }
            self.maps.hole.set_range(&(at..wrote));
            at = self.maps.guest_wrote.next_clear(wrote, end);
        }
    }
}

/// A turn's walk over the dirty chunks: once round, so that what cannot be copied now is looked at once.
struct Sweep {
    /// The chunk where it began.
    from: u64,
    /// It has passed the end of the disk.
    wrapped: bool,
}

impl Sweep {
    /// Goes from the cursor on to the next dirty chunk. Whether that is where it has been.
    fn is_over(&mut self, cursor: u64, next: u64) -> bool {
        let wraps = next < cursor;
        let over = self.wrapped && (wraps || next >= self.from);
        self.wrapped |= wraps;
        over
    }
}

/// What the copier finds at its cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Look {
    /// No dirty chunk that it may copy.
    Nothing,
    /// A run of them, in bytes, where nobody is.
    Free { run: Range<u64>, how: How },
    /// An I/O that was given up may still land there.
    Shut,
    /// A guest write is there.
    Busy(u64),
    /// It failed there, and is not tried again before this.
    Rests(Nanos),
}
