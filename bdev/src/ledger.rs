//! The ledger of a leaf channel: which I/Os are open, and which have ended but were not handed over yet.
//!
//! Every leaf owes its parent the same bookkeeping: separate budgets for what reads and what writes, so that stuck writes
//! never take the slots that reads need; a completion that never happens inside `submit`; and exactly one completion for
//! each I/O, kept while the parent's batch has no room. It stands here once.
//!
//! Invariant: an I/O holds its budget from [`Ledger::admit`] until [`Ledger::hand_over`] gives its completion away, so the
//! queue of finished ones can never outgrow the room reserved for it, and nothing is allocated after construction.

use std::collections::VecDeque;

use crate::channel::CompletionBatch;
use crate::io::{Completion, IoError, IoKind, Tag};

/// What is open on a channel, and what has ended.
#[derive(Debug)]
pub struct Ledger {
    depth: u32,
    /// I/Os admitted and not handed over, by [`budget`].
    open: [u32; 2],
    finished: VecDeque<(IoKind, Completion)>,
}

/// Reads have one budget, everything else the other: a flush waits for writes anyway.
fn budget(kind: IoKind) -> usize {
    match kind {
        IoKind::Read => 0,
        IoKind::Write | IoKind::Flush | IoKind::Unmap | IoKind::WriteZeroes => 1,
    }
}

impl Ledger {
    /// A ledger for `depth` reads and `depth` others at once.
    #[must_use]
    pub fn new(depth: u32) -> Self {
        Self { depth, open: [0; 2], finished: VecDeque::with_capacity(Self::slots(depth)) }
    }

    /// The most I/Os that can be open at once on a channel of this depth.
    #[must_use]
    pub fn slots(depth: u32) -> usize {
        depth as usize * 2
    }

    /// As [`crate::IoChannel::free`].
    #[inline]
    #[must_use]
    pub fn free(&self, kind: IoKind) -> u32 {
        self.depth - self.open[budget(kind)]
    }

    /// As [`crate::IoChannel::in_flight`].
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.open[0] + self.open[1]
    }

    /// Takes the budget of one I/O. Panics where there is none: the parent has to ask first.
    #[inline]
    pub fn admit(&mut self, kind: IoKind) {
        assert!(self.free(kind) > 0, "a {} was submitted without a free slot", kind.name());
        self.open[budget(kind)] += 1;
    }

    /// Records the end of an admitted I/O; [`Ledger::hand_over`] passes it on.
    #[inline]
    pub fn finish(&mut self, kind: IoKind, tag: Tag, result: Result<(), IoError>) {
        debug_assert!(self.finished.len() < self.in_flight() as usize, "an I/O ended twice");
        self.finished.push_back((kind, Completion { tag, result }));
    }

    /// Whether completions wait to be handed over.
    #[inline]
    #[must_use]
    pub fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Hands completions over, oldest first, as many as fit.
    #[inline]
    pub fn hand_over(&mut self, done: &mut CompletionBatch) {
        while done.room() > 0 {
            let Some((kind, completion)) = self.finished.pop_front() else { break };
            self.open[budget(kind)] -= 1;
            done.push(completion);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuck_writes_leave_the_slots_of_reads_alone() {
        let mut ledger = Ledger::new(2);
        ledger.admit(IoKind::Write);
        ledger.admit(IoKind::Flush);
        assert_eq!(ledger.free(IoKind::WriteZeroes), 0);
        assert_eq!(ledger.free(IoKind::Read), 2);
    }

    #[test]
    fn a_completion_waits_for_room_and_holds_its_slot_until_then() {
        let mut ledger = Ledger::new(2);
        let mut done = CompletionBatch::with_capacity(1);
        for tag in 0..2 {
            ledger.admit(IoKind::Read);
            ledger.finish(IoKind::Read, Tag(tag), Ok(()));
        }
        ledger.hand_over(&mut done);
        assert_eq!(done.as_slice().len(), 1);
        assert_eq!((ledger.free(IoKind::Read), ledger.in_flight()), (1, 1));
        done.clear();
        ledger.hand_over(&mut done);
        assert_eq!(done.get(0), Some(Completion { tag: Tag(1), result: Ok(()) }));
        assert_eq!(ledger.in_flight(), 0);
    }

    #[test]
    #[should_panic(expected = "without a free slot")]
    fn submitting_without_a_free_slot_is_a_bug_of_the_parent() {
        let mut ledger = Ledger::new(1);
        ledger.admit(IoKind::Write);
        ledger.admit(IoKind::Unmap);
    }
}
