//! Writes that nobody waits for on the target.
//!
//! A write that *trails* goes to both legs, and the guest is answered when the source has it. Until it has landed on the target it
//! keeps its slot and its bounce memory and shuts its bytes, for what is sent there now could overtake it. What meets it there, or
//! comes when too much trails, goes without the target.
//!
//! Two kinds of mirror let writes trail: those for an observer whose policy is not to be waited for (`scope`), and a **background
//! copy that does not get on by copying**. There a write of a block makes a whole chunk dirty, so a guest that writes here and there
//! makes more to copy than any copier brings over; sent along, the write costs a write. Who asked for a background copy asked for a
//! guest that does not wait for the target, and it does not. As long as the copy gets on, writes are only recorded, as in
//! QEMU, and the target is left to the copier; where the reactor does the work there is nothing that a copier would gain by that, and
//! they trail from the start. A job with a speed keeps to it, and sends nothing along.
//!
//! A target leg that was given up is the same to those who come later, and is kept in the same list; its chunks are dirty besides.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::core::{Core, Leg, Op, OpState, Slot};
use super::rate::Shrinking;
use super::scope::ObserverPolicy;
use super::tables::Mirroring;
use crate::io::IoKind;
use crate::job::{CopyMode, Side};

/// Requests whose target leg has not ended and that nobody waits for: it trails, or was given up.
#[derive(Debug, Clone)]
pub(super) struct Unawaited {
    /// In no order.
    slots: Vec<Slot>,
    /// Bounce memory that they hold.
    units: u32,
}

impl Unawaited {
    pub(super) fn with_room_for(ops: usize) -> Self {
        Self { slots: Vec::with_capacity(ops), units: 0 }
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Units of bounce memory that they hold.
    pub(super) fn units(&self) -> u32 {
        self.units
    }

    fn add(&mut self, slot: Slot, units: u16) {
        debug_assert!(!self.slots.contains(&slot), "request {slot} is there already");
        self.slots.push(slot);
        self.units += u32::from(units);
    }

    /// The target leg of one of them has ended.
    pub(super) fn ended(&mut self, slot: Slot, units: u16) {
        let at = self.slots.iter().position(|other| *other == slot);
        debug_assert!(at.is_some(), "somebody waits for request {slot}");
        if let Some(at) = at {
            self.slots.swap_remove(at);
            self.units -= u32::from(units);
        }
    }
}

impl Core {
    /// Whether a background copy sends the guest's writes along.
    pub(super) fn sends_along(&self) -> bool {
        self.config.copy_mode == CopyMode::Background
            && self.limiter.speed() == 0
            && (self.config.inline || self.falls_behind)
    }

    /// What is dirty does not get less. Whether that is a reason to send writes along from now on, and to see how far that leads.
    pub(super) fn begins_to_trail(&mut self, now: Nanos) -> bool {
        let before = self.mirroring();
        self.falls_behind = true;
        let begins = before == Mirroring::Behind && self.mirroring() == Mirroring::Trailing;
        if begins {
            self.shrinking = Shrinking::from(self.left_bytes(), self.done_bytes(), now);
        }
        begins
    }

    /// Whether writes that are sent now may trail.
    pub(super) fn lets_trail(&self) -> bool {
        self.config.observer != ObserverPolicy::Block || self.mirroring() == Mirroring::Trailing
    }

    /// Answers a request whose source leg has ended and whose target leg has not, if nobody waits for that.
    pub(super) fn let_trail(&mut self, slot: Slot, now: Nanos) {
        if !self.lets_trail() {
            return;
        }
        let op = *self.op(slot);
        if op.kind != IoKind::Flush {
            self.unawaited.add(slot, op.units);
            self.answer(slot, op.error.map_or(Ok(()), Err), now);
        }
    }

    /// A target leg has ended; if it trailed, it does not any more.
    pub(super) fn trailed(&mut self, slot: Slot) {
        let op = *self.op(slot);
        if op.state == OpState::Answered {
            self.unawaited.ended(slot, op.units);
        }
    }

    /// Gives up the target leg of a request: it counts as failed, and its chunks are shut until it ends.
    pub(super) fn lose_target_leg(&mut self, slot: Slot) {
        let op = self.op(slot);
        debug_assert_eq!(op.leg(Side::Target), Leg::Flying);
        op.legs[Side::Target as usize] = Leg::Lost;
        let (trails, units) = (op.state == OpState::Answered, op.units);
        if !trails {
            self.unawaited.add(slot, units);
        }
        self.lost_ops += 1;
        self.both_flying -= 1;
        // Zeroing may fail in the end, and what a failed one leaves behind is no zeroes.
        let (offset, length) = (self.op(slot).offset, self.op(slot).length);
        self.maps.target_zero.clear_range(&self.grid.touched(offset, length));
    }

    /// Whether an I/O that nobody waits for may still land in these bytes.
    pub(super) fn shuts(&self, bytes: &Range<u64>) -> bool {
        if self.unawaited.count() + self.lost_copies == 0 || planted(Bug::LateLandingForgotten) {
            return false;
        }
        let meets = |other: Range<u64>| other.start < bytes.end && bytes.start < other.end;
        let shut = |op: &Op| {
            let trails = op.leg(Side::Target) == Leg::Flying;
            meets(op.bytes()) && !(trails && planted(Bug::TrailingForgotten))
        };
        self.unawaited.slots.iter().any(|slot| shut(&self.ops[usize::from(*slot)]))
            || self.copies.iter().any(|copy| copy.is_shut() && meets(copy.start..copy.end))
    }
}
