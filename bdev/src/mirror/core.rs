//! The mirror's core: a state machine that decides everything and does nothing.
//!
//! Events come in as calls, with the time; what is to be done goes out through [`Core::next_action`]. There is no I/O, no
//! clock and, after construction, no allocation; so the same code runs under the channel, in the simulator and in the
//! exhaustive model. This file has the state and the way of a guest's request; beside it are `durable` (flushes), `copier`
//! and `life` (states, verbs, failures).
//!
//! **A guest's write** enters [`Ranges`], where it may wait for older operations; is given its row of the write table; may
//! wait for bounce memory; flies on one leg or both; is settled when every leg has ended or was given up; and is answered.
//! A slot whose target leg was given up outlives the answer: until that I/O is reaped, its chunks are shut.
//!
//! Invariants:
//! * A chunk that is clean, with nothing in flight and nothing shut there, reads the same on both legs.
//! * A chunk is dirty before the guest is answered for a write that the target does not have.
//! * While a record of the switch-over exists or may exist, no write is acknowledged that the target does not have.
//! * Every request is answered exactly once.

use std::collections::VecDeque;
use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::copier::{Copy, Counters, Pace};
use super::durable::FlushLine;
use super::errors::{BadSpots, ErrorLog};
use super::life::{JobFlush, Record, Stage, Wish};
use super::ranges::{Entered, Holder, Ranges};
use super::rate::{Chase, Limiter, Rates, Shrinking};
use super::rows::Rows;
use super::scope::{ObserverPolicy, SyncMode};
use super::share::Share;
use super::tables::{Bits, Failed, Legs, Span, TargetHindrance, WriteRow, on_write};
use super::throttle::Throttle;
use super::trail::Unawaited;
use super::verify::{CHECKS, Verify};
use crate::bitmap::{Bitmap, Grid};
use crate::io::{BdevIo, IoError, IoKind, Tag};
use crate::job::{CopyMode, IoStatus, JobEvent, JobFailure, OnError, Side};

/// Bytes of a unit of bounce memory.
pub(super) const BOUNCE_UNIT: u32 = 64 << 10;
/// Units of one request at most; the channel's largest transfer says so.
pub(super) const BOUNCE_UNITS_MAX: u32 = 16;

/// What the core is made for.
#[derive(Debug, Clone)]
pub(super) struct CoreConfig {
    pub grid: Grid,
    pub copy_mode: CopyMode,
    /// By [`Side`].
    pub on_error: [OnError; 2],
    pub target_timeout: Option<Nanos>,
    /// Zeroes may be deallocated on the target.
    pub unmap: bool,
    pub target_is_zero: bool,
    pub auto_finalize: bool,
    pub cancel_on_guest_reset: bool,
    pub verify_before_complete: bool,
    /// The guest's 99th percentile that the copier is to leave it.
    pub latency_ceiling: Option<Nanos>,
    /// A background copy that does not converge may go over to write-blocking.
    pub auto_converge: bool,
    pub sync: SyncMode,
    /// A bitmap says what is to be brought over.
    pub by_bitmap: bool,
    pub observer: ObserverPolicy,
    /// The target is a difference image without its base.
    pub diff: bool,
    pub speed: u64,
    /// Both legs write zeroes by deallocating.
    pub zeroes_unmap: bool,
    /// Slots for guest requests, answered or not.
    pub ops: u16,
    /// Writes that the target may keep after they were given up, before no more are risked.
    pub quarantine: u32,
    /// Writes that it may keep and nobody waits for, those among them.
    pub unawaited: u32,
    /// Units of bounce memory.
    pub units: u32,
    /// Copies in flight.
    pub copies: u16,
    /// The most bytes of one copy that reads, unless a chunk is larger.
    pub run: u64,
    /// The same inside a hole.
    pub hole_run: u64,
    /// The most bytes that the copier reads at once.
    pub window: u32,
    /// Both legs work inline: what the copier does takes its time from the guest, byte by byte.
    pub inline: bool,
    /// The most bytes of one copy that neither reads nor writes; none where all do.
    pub offload_run: Option<u64>,
    /// Bytes that zero detection looks at as one.
    pub zero_unit: u32,
    /// The most bytes of one zeroing of the target.
    pub max_zeroes: u64,
}

/// A guest's request, by its place in a table.
pub(super) type Slot = u16;

/// What the performer is to do, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// Send the request to the source, from the guest's own buffers.
    Source { op: Slot, sent: IoKind },
    /// Copy the payload into this many units of bounce memory, if it has one, and send the request to both legs from there.
    Both { op: Slot, sent: IoKind, units: u16 },
    /// Answer the guest.
    Answer { tag: Tag, result: Result<(), IoError> },
    /// Both legs are done with the slot's bounce memory.
    Release { op: Slot },
    /// Flush a leg.
    Flush(Side),
    /// Read a window of the source into the copy's buffer.
    CopyRead { copy: u16, offset: u64, length: u32 },
    /// Write to the target, from `skip` bytes into the copy's buffer.
    CopyWrite { copy: u16, offset: u64, length: u32, skip: u32 },
    /// Read a window of a leg into that leg's buffer of the check.
    CheckRead { check: u16, side: Side, offset: u64, length: u32 },
    /// Compare what both legs gave, chunk by chunk.
    Compare { check: u16, offset: u64, length: u32 },
    /// Make a range of the target zero.
    CopyZero { copy: u16, offset: u64, length: u64 },
    /// Have a range brought over by whoever holds both legs.
    CopyOffload { copy: u16, offset: u64, length: u64 },
}

/// One leg of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Leg {
    /// Not sent there.
    Unused,
    /// Sent, not ended.
    Flying,
    /// Ended well.
    Ok,
    /// Failed, or landed after it had been given up.
    Failed,
    /// Given up, not ended.
    Lost,
}

/// Which flush a request or the job waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ticket {
    /// The one in flight.
    Current,
    /// The one after it.
    Next,
}

/// How a request met the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Met {
    Clean,
    Dirty,
    Copying,
}

/// Where a request is. Free → Waiting → Pooling → Flying → Parked → Answered → Free, steps left out as they apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum OpState {
    /// The slot is free.
    Free,
    /// For older operations.
    Waiting,
    /// For bounce memory.
    Pooling,
    /// A leg, or a flush, has not ended.
    Flying,
    /// The record of the switch-over must be taken back before the answer.
    Parked,
    /// Answered; the target leg trails or was given up, and has not ended.
    Answered,
}

/// One request of the guest, reads excepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Op {
    pub state: OpState,
    pub tag: Tag,
    pub kind: IoKind,
    pub offset: u64,
    pub length: u64,
    /// By [`Side`].
    pub legs: [Leg; 2],
    /// Of a flush, by [`Side`].
    pub tickets: [Ticket; 2],
    /// The source's error.
    pub error: Option<IoError>,
    /// What its row says of the bits.
    pub bits: Bits,
    /// A flush failed meanwhile: what a leg has taken may be lost there. Of a flush: the target lacked something when it was sent, or
    /// since.
    pub tainted: bool,
    pub units: u16,
    /// When the target leg was sent.
    pub since: Nanos,
    /// When it came, at the earliest.
    came: Nanos,
    met: Met,
}

impl Op {
    const FREE: Self = Self {
        state: OpState::Free,
        tag: Tag(0),
        kind: IoKind::Flush,
        offset: 0,
        length: 0,
        legs: [Leg::Unused; 2],
        tickets: [Ticket::Current; 2],
        error: None,
        bits: Bits::Keep,
        tainted: false,
        units: 0,
        since: Nanos::ZERO,
        came: Nanos::ZERO,
        met: Met::Clean,
    };

    pub(super) fn leg(&self, side: Side) -> Leg {
        self.legs[side as usize]
    }

    pub(super) fn bytes(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }
}

/// What is known of the chunks.
#[derive(Debug, Clone)]
pub(super) struct Maps {
    /// To be copied.
    pub dirty: Bitmap,
    /// Reads zero on the target.
    pub target_zero: Bitmap,
    /// Reads zero on the source, by a hole report that nothing has contradicted.
    pub hole: Bitmap,
    /// Written by the guest since the mirror was inserted.
    pub guest_wrote: Bitmap,
    /// Whole on a target that is a difference image.
    pub on_target: Option<Bitmap>,
}

/// The state of a mirror.
#[derive(Debug, Clone)]
pub(super) struct Core {
    pub config: CoreConfig,
    pub grid: Grid,
    pub maps: Maps,
    /// By [`Side`].
    pub lines: [FlushLine; 2],
    pub ops: Box<[Op]>,
    free_ops: Vec<Slot>,
    pub copies: Box<[Copy]>,
    pub ranges: Ranges,
    units_free: u32,
    /// Requests that wait for bounce memory, oldest first.
    pooling: VecDeque<Slot>,
    /// Target I/O given up and not ended: of guest requests, and of copies.
    pub lost_ops: u32,
    pub lost_copies: u32,
    /// What nobody waits for on the target, of guest requests.
    pub unawaited: Unawaited,
    /// Guest requests not answered.
    pub guest_live: u32,
    /// Guest requests whose target leg flies.
    pub both_flying: u32,
    pub stage: Stage,
    pub record: Record,
    pub job_flush: JobFlush,
    pub wish: Wish,
    pub failure: Option<JobFailure>,
    pub io_status: IoStatus,
    /// When the copier's last turn wanted another, though nothing ends.
    pub copier_due: Option<Nanos>,
    /// Whether what is dirty gets less.
    pub shrinking: Shrinking,
    /// Whether copying is for nothing.
    pub chase: Chase,
    /// When the guest last had something in flight.
    pub guest_seen: Option<Nanos>,
    /// The guest made chunks dirty faster than copies cleaned them.
    pub falls_behind: bool,
    /// What the guest has asked for since the copier last read, bytes; and how much room the copier takes.
    pub asked: u64,
    pub pace: Pace,
    /// Where the copier looks next, a chunk.
    pub cursor: u64,
    /// The copier may go so far, bytes.
    pub scanned_upto: u64,
    pub limiter: Limiter,
    pub rates: Rates,
    pub bad: BadSpots,
    /// What the copier may do beside the guest, and the limiter that sees to it.
    pub throttle: Throttle,
    pub beside_guest: Limiter,
    /// How much it reads at once beside the guest and when it rests, where a device does the work.
    pub share: Share,
    pub auto_converged: bool,
    pub errors: ErrorLog,
    pub counters: Counters,
    pub verify: Verify,
    pub next_timeout_check: Nanos,
    /// When the target is flushed for no other reason.
    pub flush_due: Option<Nanos>,
    /// Rows of the tables come to so far.
    pub rows: Rows,
    actions: VecDeque<Action>,
    pub events: VecDeque<JobEvent>,
}

impl Core {
    /// A core whose chunks are dirty as far as its scope says so already.
    pub(super) fn new(config: CoreConfig) -> Self {
        let grid = config.grid;
        let (ops, copies) = (usize::from(config.ops), usize::from(config.copies));
        let empty = || Bitmap::empty(grid);
        let all = config.sync == SyncMode::Full && !config.by_bitmap;
        let throttle = Throttle::new(config.latency_ceiling);
        let target_zero = if config.target_is_zero { Bitmap::full(grid) } else { empty() };
        Self {
            grid,
            maps: Maps {
                dirty: if all { Bitmap::full(grid) } else { empty() },
                target_zero,
                hole: empty(),
                guest_wrote: empty(),
                on_target: config.diff.then(empty),
            },
            lines: [FlushLine::new(grid), FlushLine::new(grid)],
            ops: vec![Op::FREE; ops].into_boxed_slice(),
            free_ops: (0..config.ops).rev().collect(),
            copies: vec![Copy::FREE; copies].into_boxed_slice(),
            ranges: Ranges::new(grid, ops + copies + usize::from(CHECKS)),
            units_free: config.units,
            pooling: VecDeque::with_capacity(ops),
            lost_ops: 0,
            lost_copies: 0,
            unawaited: Unawaited::with_room_for(ops),
            guest_live: 0,
            both_flying: 0,
            stage: Stage::Created,
            record: Record::None,
            job_flush: JobFlush::Idle,
            wish: Wish::None,
            failure: None,
            io_status: IoStatus::Ok,
            copier_due: None,
            guest_seen: None,
            falls_behind: false,
            asked: 0,
            pace: Pace::Alone,
            shrinking: Shrinking::NEW,
            chase: Chase::default(),
            cursor: 0,
            // Where nothing is brought over, nobody looks for holes.
            scanned_upto: if config.sync == SyncMode::None { u64::MAX } else { 0 },
            limiter: Limiter::new(config.speed, Nanos::ZERO),
            rates: Rates::default(),
            bad: BadSpots::default(),
            beside_guest: Limiter::even(throttle.allowance().unwrap_or(0), Nanos::ZERO),
            throttle,
            share: Share::NEW,
            auto_converged: false,
            errors: ErrorLog::default(),
            counters: Counters::default(),
            verify: Verify::new(grid, config.window),
            next_timeout_check: Nanos::ZERO,
            flush_due: None,
            rows: Rows::default(),
            actions: VecDeque::with_capacity(4 * (ops + copies)),
            events: VecDeque::with_capacity(Self::EVENTS),
            config,
        }
    }

    /// The next thing to do.
    pub(super) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    /// Slots for new requests.
    pub(super) fn free_slots(&self) -> usize {
        self.free_ops.len()
    }

    /// A guest's request comes, anything but a read, and may have been there since `came`. The performer keeps its payload under the
    /// slot's number.
    pub(super) fn guest(&mut self, io: &BdevIo, came: Nanos, now: Nanos) -> Slot {
        let slot = self.free_ops.pop().expect("free() was asked before");
        self.guest_live += 1;
        self.guest_asks(io);
        self.ops[usize::from(slot)] = Op {
            state: OpState::Waiting,
            tag: io.tag,
            kind: io.kind,
            offset: io.offset,
            length: io.length,
            came,
            ..Op::FREE
        };
        if io.kind == IoKind::Flush {
            self.guest_flush(slot, now);
        } else {
            let touched = self.grid.touched(io.offset, io.length);
            self.maps.guest_wrote.set_range(&touched);
            if !planted(Bug::StaleHoleBelieved) {
                self.maps.hole.clear_range(&touched);
            }
            let bytes = io.offset..io.offset + io.length;
            if self.config.observer != ObserverPolicy::Block {
                self.drop_copies_in(&bytes);
            }
            match self.ranges.enter_guest(slot, &bytes) {
                Entered::Granted => self.launch(slot, now),
                Entered::Waits => {}
                Entered::WaitsForCopy => self.op(slot).met = Met::Copying,
            }
        }
        self.pump(now);
        slot
    }

    /// The guest's payload could not be copied: its memory is gone. Nothing was sent.
    pub(super) fn payload_gone(&mut self, slot: Slot, now: Nanos) {
        let op = self.op(slot);
        op.legs = [Leg::Failed, Leg::Unused];
        op.error = Some(IoError::FAULT);
        self.both_flying -= 1;
        self.settle(slot, now);
        self.pump(now);
    }

    /// One leg of a request has ended.
    pub(super) fn leg_done(
        &mut self,
        slot: Slot,
        side: Side,
        result: Result<(), IoError>,
        now: Nanos,
    ) {
        let op = &mut self.ops[usize::from(slot)];
        let (leg, bytes) = (op.leg(side), op.bytes());
        op.legs[side as usize] = if result.is_ok() { Leg::Ok } else { Leg::Failed };
        match leg {
            Leg::Flying => self.leg_ended(slot, side, &bytes, result, now),
            Leg::Lost => {
                // A late landing: the range has been dirty all the while, and shut.
                self.ops[usize::from(slot)].legs[side as usize] = Leg::Failed;
                self.lost_ops -= 1;
                self.unawaited.ended(slot, self.ops[usize::from(slot)].units);
                self.free_if_done(slot);
            }
            Leg::Unused | Leg::Ok | Leg::Failed => {
                debug_assert!(false, "leg {side:?} of request {slot} ends twice");
            }
        }
        self.pump(now);
    }

    fn leg_ended(
        &mut self,
        slot: Slot,
        side: Side,
        bytes: &Range<u64>,
        result: Result<(), IoError>,
        now: Nanos,
    ) {
        if side == Side::Target {
            self.both_flying -= 1;
            self.trailed(slot);
        }
        let touched = self.grid.touched(bytes.start, bytes.end - bytes.start);
        match result {
            Ok(()) => {
                self.lines[side as usize].wrote(&touched);
                if side == Side::Target {
                    self.counters.mirrored += bytes.end - bytes.start;
                    self.now_on_target(bytes);
                }
            }
            Err(error) => {
                let op = self.op(slot);
                let (kind, guests_fault) = (op.kind, error == IoError::FAULT && op.units == 0);
                if side == Side::Source {
                    op.error = Some(error);
                } else {
                    self.maps.target_zero.clear_range(&touched);
                }
                if guests_fault {
                    // The guest's memory is gone: its error, not the disk's.
                    self.dirty(&touched);
                } else {
                    self.failed(Failed::GuestWrite(side), kind, bytes, error, now);
                }
            }
        }
        self.settle(slot, now);
        // One that trailed has been answered before.
        self.free_if_done(slot);
    }

    /// Lets those go on that an event has freed: the next in a range, the next for bounce memory.
    #[inline]
    pub(super) fn pump(&mut self, now: Nanos) {
        if self.ranges.has_granted() || !self.pooling.is_empty() {
            self.pump_all(now);
        }
    }

    fn pump_all(&mut self, now: Nanos) {
        loop {
            while let Some(holder) = self.ranges.next_granted() {
                match (self.check_of(holder), self.copy_of(holder)) {
                    (Some(check), _) => self.check_granted(check, now),
                    (None, Some(copy)) => self.copy_granted(copy, now),
                    (None, None) => self.launch(holder, now),
                }
            }
            let Some(slot) = self.pooling.front().copied() else { return };
            let row = self.row_of(slot, self.span(slot));
            let units = self.units_for(slot, row.legs);
            if units > self.units_free {
                return;
            }
            self.pooling.pop_front();
            self.send(slot, row, units, now);
        }
    }

    /// The holder that a copy has in [`Ranges`]: behind those of the requests.
    pub(super) fn holder_of(&self, copy: u16) -> Holder {
        self.config.ops + copy
    }

    fn copy_of(&self, holder: Holder) -> Option<u16> {
        holder.checked_sub(self.config.ops)
    }

    pub(super) fn op(&mut self, slot: Slot) -> &mut Op {
        &mut self.ops[usize::from(slot)]
    }

    /// The request has its range: send it, or queue it for bounce memory.
    #[inline(always)]
    fn launch(&mut self, slot: Slot, now: Nanos) {
        let span = self.span(slot);
        let op = &mut self.ops[usize::from(slot)];
        if op.met != Met::Copying && (span.dirty_whole || span.dirty_part) {
            op.met = Met::Dirty;
        }
        let row = self.row_of(slot, span);
        let units = self.units_for(slot, row.legs);
        if units > 0 && (units > self.units_free || !self.pooling.is_empty()) {
            self.op(slot).state = OpState::Pooling;
            self.pooling.push_back(slot);
        } else {
            self.send(slot, row, units, now);
        }
    }

    /// The row of the write table of a request with these chunks, as of now.
    #[inline(always)]
    fn row_of(&self, slot: Slot, span: Span) -> WriteRow {
        let op = &self.ops[usize::from(slot)];
        // A target that keeps too many writes, or too much of the bounce memory, gets no more to keep.
        let full = self.lost_ops >= self.config.quarantine
            || self.unawaited.count() >= self.config.unawaited
            || self.unawaited.units() > self.config.units / 2;
        // It may share a chunk with what has yet to land there, but no bytes: only chunks that it covers whole become clean.
        let hindrance = if full || self.shuts(&op.bytes()) {
            match self.config.observer {
                ObserverPolicy::Block | ObserverPolicy::Track => TargetHindrance::Shut,
                ObserverPolicy::Drop => TargetHindrance::Forgotten,
            }
        } else if self.needs_fill(op) {
            TargetHindrance::Unfilled
        } else {
            TargetHindrance::None
        };
        on_write(op.kind, self.mirroring(), span, hindrance, self.config.zeroes_unmap)
    }

    /// What the chunks of a request are, as of now.
    #[inline(always)]
    fn span(&self, slot: Slot) -> Span {
        // In sync, as a rule.
        if self.maps.dirty.count() == 0 {
            return Span { clean: true, dirty_whole: false, dirty_part: false };
        }
        let op = &self.ops[usize::from(slot)];
        let touched = self.grid.touched(op.offset, op.length);
        let dirty = self.maps.dirty.count_range(&touched);
        let dirty_whole = self.maps.dirty.count_range(&self.grid.covered(op.offset, op.length));
        Span {
            clean: dirty < touched.end - touched.start,
            dirty_whole: dirty_whole > 0,
            dirty_part: dirty > dirty_whole,
        }
    }

    #[inline(always)]
    fn units_for(&self, slot: Slot, legs: Legs) -> u32 {
        let op = &self.ops[usize::from(slot)];
        if legs != Legs::Both || op.kind != IoKind::Write {
            return 0;
        }
        let units = op.length.div_ceil(u64::from(BOUNCE_UNIT));
        // A request that is too large all the same fails to be copied, and so fails.
        u32::try_from(units).unwrap_or(u32::MAX).min(BOUNCE_UNITS_MAX)
    }

    #[inline(always)]
    fn send(&mut self, slot: Slot, row: WriteRow, units: u32, now: Nanos) {
        self.rows.write.visit(row.row);
        let op = &mut self.ops[usize::from(slot)];
        op.state = OpState::Flying;
        op.bits = row.bits;
        op.since = now;
        #[allow(clippy::cast_possible_truncation)] // at most the pool's, which is small
        let units = units as u16;
        let (kind, touched) = (op.kind, self.grid.touched(op.offset, op.length));
        if row.bits == Bits::Dirty && !planted(Bug::WriteNotDirtied) {
            self.dirty(&touched);
        }
        if row.bits == Bits::Forget {
            let dropped = self.op(slot).length;
            self.count_dropped(dropped);
        }
        match row.legs {
            Legs::Neither => self.settle(slot, now),
            Legs::Source => {
                self.op(slot).legs = [Leg::Flying, Leg::Unused];
                self.act(Action::Source { op: slot, sent: row.sent });
            }
            Legs::Both => {
                self.op(slot).legs = [Leg::Flying, Leg::Flying];
                self.op(slot).units = units;
                self.units_free -= u32::from(units);
                self.both_flying += 1;
                if kind == IoKind::Write {
                    self.maps.target_zero.clear_range(&touched);
                }
                self.act(Action::Both { op: slot, sent: row.sent, units });
            }
        }
    }

    /// Marks chunks dirty.
    pub(super) fn dirty(&mut self, chunks: &Range<u64>) {
        let before = self.maps.dirty.count();
        self.maps.dirty.set_range(chunks);
        self.lines[Side::Target as usize].whole = false;
        let new = self.maps.dirty.count() - before;
        self.rates.dirtied(new * self.grid.granularity());
    }

    /// Answers a request whose legs have all ended or been given up.
    #[inline]
    pub(super) fn settle(&mut self, slot: Slot, now: Nanos) {
        let op = &self.ops[usize::from(slot)];
        if op.state == OpState::Flying && op.leg(Side::Source) != Leg::Flying {
            self.settle_source(slot, now);
        }
    }

    /// The source leg has ended.
    fn settle_source(&mut self, slot: Slot, now: Nanos) {
        let op = self.ops[usize::from(slot)];
        if op.leg(Side::Target) == Leg::Flying {
            self.let_trail(slot, now);
            return;
        }
        if let Some(error) = op.error {
            return self.answer(slot, Err(error), now);
        }
        let dropped = op.legs == [Leg::Unused; 2];
        // While a switch-over is undone the target may lack what was acknowledged before, so its flushes promise nothing, but for
        // those that were sent when it lacked nothing. Else a guest would wait for as long as a record cannot be taken back.
        let promised = op.kind != IoKind::Flush || !self.undoing();
        let on_target = match op.leg(Side::Target) {
            Leg::Ok if op.kind == IoKind::Flush => promised || !op.tainted,
            Leg::Ok => !op.tainted,
            // A flush that was not for the target came before the job's own, without which there is no record, and that covers it.
            Leg::Unused => dropped || op.kind == IoKind::Flush && promised,
            Leg::Flying | Leg::Failed | Leg::Lost => false,
        };
        if !on_target && self.record.may_exist() && !planted(Bug::AcknowledgedBeforeRetract) {
            self.op(slot).state = OpState::Parked;
            // Where a failure has brought this about, the undoing has begun already; this is for writes that came since.
            return self.undo_for_parked(now);
        }
        if op.bits == Bits::Clean && on_target {
            let clean = if planted(Bug::PartialWriteCleans) {
                self.grid.touched(op.offset, op.length)
            } else {
                self.grid.covered(op.offset, op.length)
            };
            self.maps.dirty.clear_range(&clean);
        }
        self.answer(slot, Ok(()), now);
    }

    /// Answers the guest.
    pub(super) fn answer(&mut self, slot: Slot, result: Result<(), IoError>, now: Nanos) {
        let op = self.ops[usize::from(slot)];
        self.guest_answered(now - op.came);
        self.act(Action::Answer { tag: op.tag, result });
        self.guest_live -= 1;
        if op.kind != IoKind::Flush {
            self.ranges.leave(slot);
        }
        if op.kind == IoKind::Write && result.is_ok() {
            self.rates.written(op.length);
            let writes = &mut self.counters.writes;
            *match op.met {
                Met::Clean => &mut writes.clean,
                Met::Dirty => &mut writes.dirty,
                Met::Copying => &mut writes.copying,
            } += 1;
        }
        self.op(slot).state = OpState::Answered;
        self.free_if_done(slot);
    }

    /// Frees the slot of a request that was answered and whose legs have ended.
    #[inline]
    fn free_if_done(&mut self, slot: Slot) {
        let op = &self.ops[usize::from(slot)];
        let flies = |leg: &Leg| matches!(leg, Leg::Flying | Leg::Lost);
        if op.state == OpState::Answered && !op.legs.iter().any(flies) {
            self.free(slot);
        }
    }

    fn free(&mut self, slot: Slot) {
        let op = &mut self.ops[usize::from(slot)];
        let units = op.units;
        *op = Op::FREE;
        self.free_ops.push(slot);
        if units > 0 {
            self.units_free += u32::from(units);
            self.act(Action::Release { op: slot });
        }
    }
}
