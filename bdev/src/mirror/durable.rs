//! Flushes: what is durable on which leg.
//!
//! Each leg has a line of flushes with at most one in flight. Who asks while one flies shares the next: a flush makes
//! durable only what had completed before it was sent. Two bitmaps a leg remember the chunks written since the last good
//! flush: those that the flush in flight covers, and those after it. A failed flush dirties both, and whatever is in
//! flight on that leg: the kernel reports a lost page once, to whoever flushes next, and calls it clean from then on.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::core::{Action, Core, Leg, OpState, Slot, Ticket};
use super::life::{JobFlush, Stage};
use super::tables::Failed;
use crate::bitmap::{Bitmap, Grid};
use crate::io::{IoError, IoKind};
use crate::job::Side;

/// How long what was written to the target stays without a flush, and how much of it.
const FLUSH_EVERY: Nanos = Nanos::from_secs(1);
const FLUSH_BYTES: u64 = 64 << 20;

/// The flush of a leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Line {
    /// None.
    Idle,
    /// One is in flight, since then; another is asked for, or not.
    Flying { since: Nanos, next: bool },
    /// One was given up and has not ended; none can be sent before.
    Lost,
}

/// The line of flushes of one leg.
#[derive(Debug, Clone)]
pub(super) struct FlushLine {
    pub line: Line,
    /// Written, and covered by no flush yet.
    pub undurable: Bitmap,
    /// Written before the flush in flight was sent.
    pub flushing: Bitmap,
    /// Of the target: whether it had every acknowledged write when the flush in flight was sent, and nothing was made dirty since.
    pub whole: bool,
}

impl FlushLine {
    pub(super) fn new(grid: Grid) -> Self {
        Self {
            line: Line::Idle,
            undurable: Bitmap::empty(grid),
            flushing: Bitmap::empty(grid),
            whole: false,
        }
    }

    /// Chunks were written on this leg.
    pub(super) fn wrote(&mut self, chunks: &Range<u64>) {
        self.undurable.set_range(chunks);
    }

    /// Bytes that no flush has made durable.
    pub(super) fn undurable_bytes(&self) -> u64 {
        self.undurable.union_bytes(&self.flushing)
    }
}

impl Core {
    /// A guest's flush comes: to the source, and to the target if writes go there.
    pub(super) fn guest_flush(&mut self, slot: Slot, now: Nanos) {
        self.op(slot).state = OpState::Flying;
        self.op(slot).since = now;
        let target = if self.flushes_target() { self.ask_flush(Side::Target, now) } else { None };
        let source = self.ask_flush(Side::Source, now);
        for (side, ticket) in [(Side::Source, source), (Side::Target, target)] {
            let Some(ticket) = ticket else { continue };
            let op = self.op(slot);
            op.legs[side as usize] = Leg::Flying;
            op.tickets[side as usize] = ticket;
            self.both_flying += u32::from(side == Side::Target);
        }
    }

    /// Asks for a flush of everything completed on that leg so far; none while a lost one blocks the line.
    pub(super) fn ask_flush(&mut self, side: Side, now: Nanos) -> Option<Ticket> {
        match &mut self.lines[side as usize].line {
            Line::Lost => None,
            Line::Flying { next, .. } => {
                *next = true;
                Some(Ticket::Next)
            }
            Line::Idle => {
                self.start_flush(side, now);
                Some(Ticket::Current)
            }
        }
    }

    fn start_flush(&mut self, side: Side, now: Nanos) {
        let whole = self.lacks_nothing();
        let line = &mut self.lines[side as usize];
        debug_assert_eq!(line.flushing.count(), 0);
        std::mem::swap(&mut line.undurable, &mut line.flushing);
        line.line = Line::Flying { since: now, next: false };
        line.whole = whole;
        self.act(Action::Flush(side));
    }

    /// Flushes the target now and then while something is written there, so that a flush that fails, as that of a full share does,
    /// takes back that much and not the whole copy.
    pub(super) fn flush_now_and_then(&mut self, now: Nanos) {
        let line = &self.lines[Side::Target as usize];
        let at_work = matches!(self.stage, Stage::Running | Stage::Ready);
        if !at_work || line.line != Line::Idle || line.undurable.count() == 0 {
            self.flush_due = None;
            return;
        }
        let much = line.undurable.bytes() >= FLUSH_BYTES;
        if much || now >= *self.flush_due.get_or_insert(now + FLUSH_EVERY) {
            self.flush_due = None;
            // Nobody waits for it.
            self.ask_flush(Side::Target, now);
        }
    }

    /// The flush of a leg has ended.
    pub(super) fn flush_done(&mut self, side: Side, result: Result<(), IoError>, now: Nanos) {
        match std::mem::replace(&mut self.lines[side as usize].line, Line::Idle) {
            Line::Idle => debug_assert!(false, "a flush ends that was not sent"),
            // What it was to make durable is dirty since it was given up. If it fails, what was written since may be lost as well.
            Line::Lost => {
                if let Err(error) = result
                    && !planted(Bug::LateFlushErrorForgotten)
                {
                    self.failed(Failed::JobFlush, IoKind::Flush, &(0..0), error, now);
                }
            }
            Line::Flying { next, .. } => {
                if result.is_ok() {
                    self.lines[side as usize].flushing.reset();
                }
                self.flush_ended(side, result, now);
                if next {
                    self.start_flush(side, now);
                    self.promote_tickets(side);
                }
            }
        }
        self.pump(now);
    }

    /// Gives up the target's flush in flight.
    pub(super) fn lose_flush(&mut self, now: Nanos) {
        self.lines[Side::Target as usize].line = Line::Lost;
        self.promote_tickets(Side::Target);
        self.flush_ended(Side::Target, Err(IoError::TIMED_OUT), now);
    }

    /// Tells everybody who waits for the current flush.
    fn flush_ended(&mut self, side: Side, result: Result<(), IoError>, now: Nanos) {
        let waits = |core: &Self, slot: usize| {
            let op = &core.ops[slot];
            op.kind == IoKind::Flush
                && op.leg(side) == Leg::Flying
                && op.tickets[side as usize] == Ticket::Current
        };
        let by_guest = (0..self.ops.len()).any(|slot| waits(self, slot));
        if side == Side::Target && self.job_flush == JobFlush::Asked(Ticket::Current) {
            self.job_flush = if result.is_ok() { JobFlush::Good } else { JobFlush::Idle };
        }
        if let Err(error) = result {
            let failed = if by_guest { Failed::GuestFlush(side) } else { Failed::JobFlush };
            self.failed(failed, IoKind::Flush, &(0..0), error, now);
        }
        for slot in 0..self.config.ops {
            if !waits(self, usize::from(slot)) {
                continue;
            }
            let whole = self.lines[side as usize].whole;
            let op = self.op(slot);
            op.tainted |= side == Side::Target && !whole;
            op.legs[side as usize] = if result.is_ok() { Leg::Ok } else { Leg::Failed };
            match side {
                Side::Source => op.error = result.err(),
                Side::Target => self.both_flying -= 1,
            }
            self.settle(slot, now);
        }
    }

    /// The next flush has become the current one.
    fn promote_tickets(&mut self, side: Side) {
        for op in &mut self.ops {
            op.tickets[side as usize] = Ticket::Current;
        }
        if side == Side::Target && self.job_flush == JobFlush::Asked(Ticket::Next) {
            self.job_flush = JobFlush::Asked(Ticket::Current);
        }
    }

    /// A flush of a leg failed: what was written there since the last good one may be gone.
    pub(super) fn lose_undurable(&mut self, side: Side) {
        if planted(Bug::FailedFlushForgotten) {
            self.lines[side as usize].flushing.reset();
            return;
        }
        let Self { lines, maps, .. } = self;
        let line = &mut lines[side as usize];
        for written in [&mut line.undurable, &mut line.flushing] {
            maps.dirty.merge(written);
            if side == Side::Target {
                maps.target_zero.subtract(written);
            }
            written.reset();
        }
        for slot in 0..self.ops.len() {
            let op = &mut self.ops[slot];
            // One that trails has been answered, and what it has written may be lost all the same.
            let at_work =
                matches!(op.state, OpState::Flying | OpState::Answered) && op.kind != IoKind::Flush;
            if at_work && matches!(op.leg(side), Leg::Flying | Leg::Ok) {
                op.tainted = true;
                let touched = self.grid.touched(op.offset, op.length);
                self.dirty(&touched);
            }
        }
        for copy in 0..self.copies.len() {
            if self.copies[copy].is_at_work() {
                let (start, end) = (self.copies[copy].start, self.copies[copy].end);
                let chunks = self.grid.touched(start, end - start);
                self.dirty(&chunks);
                self.maps.target_zero.clear_range(&chunks);
            }
        }
    }
}
