//! One cut through a history of writes: was a disk at some single instant exactly what it holds now?
//!
//! The load numbers its events: every submission and every completion of a write gets the next number. A disk that was left
//! by a switch-over must hold, for one event number C and for all blocks alike, every write that completed before C and no
//! write that was submitted after C. A write in flight at C may be in or out; but then it is so for whole blocks.
//!
//! A block never has two writes in flight, so its history is a line: generation g was submitted at s(g) and g+1 completed
//! at c(g+1), and a block found in generation g says s(g) <= C < c(g+1). The disk is consistent if and only if the intervals
//! of all blocks have a number in common.

use std::collections::HashMap;

/// A write of one block, by the numbers of its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoggedWrite {
    /// The block.
    pub(crate) block: u64,
    /// What the write made of it.
    pub(crate) generation: u32,
    /// When it was submitted.
    pub(crate) submitted: u64,
    /// When its completion was seen.
    pub(crate) completed: u64,
}

/// Why a disk is at no instant's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CutError {
    /// The block is in a generation that was never written, or long gone.
    #[error(
        "block {block} holds generation {found}, which it did not have at any moment of the switch-over"
    )]
    Impossible {
        /// The block.
        block: u64,
        /// What it holds.
        found: u32,
    },
    /// Two blocks contradict each other.
    #[error(
        "blocks {older} and {newer} are from different moments: {newer} has a write submitted after one on {older} that is \
         missing had completed"
    )]
    Torn {
        /// A block that lacks a write.
        older: u64,
        /// A block that has a later one.
        newer: u64,
    },
}

/// The instants that are still possible.
#[derive(Debug)]
pub(crate) struct Cut {
    /// By block, ascending: (generation, submitted, completed).
    writes: HashMap<u64, Vec<(u32, u64, u64)>>,
    /// C is at least this, because of that block.
    earliest: (u64, u64),
    /// C is less than this, because of that block.
    latest: (u64, u64),
}

impl Cut {
    /// `log` has all writes that completed after `from` and were submitted before `to`, and the cut is between the two.
    pub(crate) fn new(log: &[LoggedWrite], from: u64, to: u64) -> Self {
        let mut writes: HashMap<u64, Vec<(u32, u64, u64)>> = HashMap::new();
        for write in log {
            let entry = (write.generation, write.submitted, write.completed);
            writes.entry(write.block).or_default().push(entry);
        }
        for history in writes.values_mut() {
            history.sort_unstable();
        }
        Self { writes, earliest: (from, u64::MAX), latest: (to, u64::MAX) }
    }

    /// Takes note that `block` was found in `found`; `before` is the generation whose completion was the last to be seen
    /// before `from`.
    pub(crate) fn observe(&mut self, block: u64, found: u32, before: u32) -> Result<(), CutError> {
        let history = self.writes.get(&block).map_or(&[][..], Vec::as_slice);
        let written = history.iter().find(|(generation, _, _)| *generation == found);
        if written.is_none() && found != before {
            return Err(CutError::Impossible { block, found });
        }
        if let Some((_, submitted, _)) = written
            && *submitted > self.earliest.0
        {
            self.earliest = (*submitted, block);
        }
        let next = history.iter().find(|(generation, _, _)| *generation == found + 1);
        if let Some((_, _, completed)) = next
            && *completed < self.latest.0
        {
            self.latest = (*completed, block);
        }
        if self.earliest.0 < self.latest.0 {
            Ok(())
        } else {
            Err(CutError::Torn { older: self.latest.1, newer: self.earliest.1 })
        }
    }

    /// How many event numbers are left for the cut: 1 is exact.
    pub(crate) fn width(&self) -> u64 {
        self.latest.0.saturating_sub(self.earliest.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(block: u64, generation: u32, submitted: u64, completed: u64) -> LoggedWrite {
        LoggedWrite { block, generation, submitted, completed }
    }

    #[test]
    fn a_disk_of_one_instant_is_accepted_and_the_instant_narrowed() {
        let log =
            [write(1, 5, 10, 13), write(2, 1, 11, 12), write(1, 6, 14, 16), write(2, 2, 15, 17)];
        let mut cut = Cut::new(&log, 10, 20);
        cut.observe(1, 5, 4).unwrap();
        cut.observe(2, 1, 0).unwrap();
        cut.observe(3, 9, 9).unwrap();
        assert_eq!(cut.width(), 16 - 11);
    }

    #[test]
    fn a_write_in_flight_at_the_instant_may_be_in_or_out() {
        let log = [write(1, 1, 10, 20), write(2, 1, 11, 12)];
        for found in [0, 1] {
            let mut cut = Cut::new(&log, 10, 21);
            cut.observe(1, found, 0).unwrap();
            cut.observe(2, 1, 0).unwrap();
        }
    }

    #[test]
    fn a_missing_write_before_a_present_one_is_torn() {
        let log = [write(1, 1, 10, 11), write(2, 1, 12, 13)];
        let mut cut = Cut::new(&log, 10, 20);
        cut.observe(1, 0, 0).unwrap();
        assert_eq!(cut.observe(2, 1, 0), Err(CutError::Torn { older: 1, newer: 2 }));
    }

    #[test]
    fn a_generation_of_another_time_is_impossible() {
        let log = [write(1, 5, 10, 11)];
        let mut cut = Cut::new(&log, 10, 20);
        assert_eq!(cut.observe(1, 3, 4), Err(CutError::Impossible { block: 1, found: 3 }));
        assert_eq!(cut.observe(2, 8, 9), Err(CutError::Impossible { block: 2, found: 8 }));
        cut.observe(1, 4, 4).unwrap();
    }
}
