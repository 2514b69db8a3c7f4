//! How a window that was read is cut into pieces: data, zeroes, and what needs nothing.
//!
//! Zeroes are looked for unit by unit, 4 KiB as a rule. Where the target is known to read zero, every zero unit is skipped:
//! that costs nothing and keeps a sparse disk as sparse as it was. Elsewhere zeroes are worth an operation of their own only
//! where all of a chunk is zero; a few zero blocks among data go with the data, for one large write is cheaper than many
//! small ones.

use std::ops::Range;

use resilver_sys::usize_from;

use crate::bitmap::{Bitmap, Grid};

/// The most units of one window.
pub(super) const UNITS: usize = 256;
/// The same, as sizes are counted.
pub(super) const UNITS_U32: u32 = 256;
const _: () = assert!(UNITS_U32 as usize == UNITS);

/// One bit a unit, lowest first.
pub(super) type UnitMap = [u64; UNITS / 64];

/// What is done with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Written as it was read.
    Data,
    /// Made zero on the target.
    Zero,
    /// Left alone: the target reads zero there.
    Skip,
    /// Brought over by whoever holds both legs, unread.
    Offloaded,
}

/// A window and what is to be done with its units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub start: u64,
    pub end: u64,
    unit: u64,
    zero: UnitMap,
    skip: UnitMap,
}

impl Plan {
    /// No window.
    pub(super) const EMPTY: Self =
        Self { start: 0, end: 0, unit: 1, zero: [0; UNITS / 64], skip: [0; UNITS / 64] };

    /// A window of which nothing is known: all data.
    pub(super) fn new(window: &Range<u64>, unit: u32) -> Self {
        Self { start: window.start, end: window.end, unit: unit.into(), ..Self::EMPTY }
    }

    /// Decides, from the units that were found to be zero and the chunks that read zero on the target.
    pub(super) fn decide(&mut self, grid: Grid, zeroes: &UnitMap, target_zero: &Bitmap) {
        let mut at = self.start;
        while at < self.end {
            // Chunk by chunk; where a unit has several chunks, unit by unit.
            let chunk = grid.bytes(&grid.touched(at, 1));
            let end = if grid.granularity() < self.unit { at + self.unit } else { chunk.end };
            let end = end.min(self.end);
            let chunks = grid.touched(at, end - at);
            let known = target_zero.count_range(&chunks) == chunks.end - chunks.start;
            let units = self.index(at)..(end - self.start).div_ceil(self.unit);
            let all = units.clone().all(|unit| bit(zeroes, unit));
            for unit in units.filter(|unit| (known || all) && bit(zeroes, *unit)) {
                let map = if known { &mut self.skip } else { &mut self.zero };
                map[usize_from(unit / 64)] |= 1 << (unit % 64);
            }
            at = end;
        }
    }

    /// The piece that begins at `from`: as long as its units are alike, zeroes at most `max_zeroes` bytes.
    pub(super) fn piece(&self, from: u64, max_zeroes: u64) -> (Range<u64>, Kind) {
        let kind = self.kind(from);
        let mut end = from;
        while end < self.end && self.kind(end) == kind {
            end = self.start + (self.index(end) + 1) * self.unit;
        }
        let most = if kind == Kind::Zero { max_zeroes } else { u64::MAX };
        (from..end.min(self.end).min(from.saturating_add(most)), kind)
    }

    fn index(&self, at: u64) -> u64 {
        (at - self.start) / self.unit
    }

    fn kind(&self, at: u64) -> Kind {
        let unit = self.index(at);
        match (bit(&self.skip, unit), bit(&self.zero, unit)) {
            (true, _) => Kind::Skip,
            (false, true) => Kind::Zero,
            (false, false) => Kind::Data,
        }
    }
}

fn bit(map: &UnitMap, unit: u64) -> bool {
    map.get(usize_from(unit / 64)).is_some_and(|word| word & (1 << (unit % 64)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    /// The pieces of a window at 0 whose zero units are given, in KiB.
    fn pieces(
        granularity: u64,
        window: u64,
        zero: &[u64],
        target_zero: &[u64],
        max_zeroes: u64,
    ) -> Vec<(u64, Kind)> {
        let grid = Grid::new(1 << 20, u32::try_from(granularity).unwrap());
        let mut zeroes = UnitMap::default();
        for unit in zero {
            zeroes[0] |= 1 << unit;
        }
        let mut known = Bitmap::empty(grid);
        for chunk in target_zero {
            known.set_range(&(*chunk..chunk + 1));
        }
        let mut plan = Plan::new(&(0..window), 4096);
        plan.decide(grid, &zeroes, &known);
        let (mut at, mut pieces) = (0, Vec::new());
        while at < window {
            let (bytes, kind) = plan.piece(at, max_zeroes);
            assert_eq!(bytes.start, at);
            pieces.push(((bytes.end - bytes.start) / KIB, kind));
            at = bytes.end;
        }
        pieces
    }

    #[test]
    fn a_chunk_that_is_all_zero_is_made_zero_and_a_part_of_one_is_copied() {
        let zero = [1, 4, 5, 6, 7, 8];
        let cut = pieces(16 * KIB, 48 * KIB, &zero, &[], u64::MAX);
        assert_eq!(cut, [(16, Kind::Data), (16, Kind::Zero), (16, Kind::Data)]);
    }

    #[test]
    fn where_the_target_reads_zero_every_zero_unit_is_skipped() {
        let cut = pieces(16 * KIB, 32 * KIB, &[1, 2, 5], &[0], u64::MAX);
        assert_eq!(cut, [(4, Kind::Data), (8, Kind::Skip), (20, Kind::Data)]);
    }

    #[test]
    fn a_short_last_unit_and_small_chunks_are_cut_by_the_unit() {
        let cut = pieces(512, 9 * KIB, &[0, 2], &[0, 1, 2, 3, 4, 5, 6, 7], u64::MAX);
        assert_eq!(cut, [(4, Kind::Skip), (4, Kind::Data), (1, Kind::Zero)]);
    }

    #[test]
    fn zeroes_are_cut_to_what_the_target_takes_at_once() {
        let cut = pieces(16 * KIB, 32 * KIB, &[0, 1, 2, 3], &[], 6 * KIB);
        assert_eq!(cut, [(6, Kind::Zero), (6, Kind::Zero), (4, Kind::Zero), (16, Kind::Data)]);
    }
}
