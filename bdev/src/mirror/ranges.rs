//! Who is where on the disk, and who waits for whom.
//!
//! Guest writes exclude each other where they overlap in bytes; a guest write and a copy exclude each other where they
//! touch one chunk; so do a comparison of the legs and either. Whoever comes later waits for all that were there before and conflict, granted or waiting themselves:
//! waiting is only ever for an older operation, so there is no cycle and nobody starves. Copies never overlap each other.
//!
//! The usual case, no conflict, is found without a look at the others: guest writes are counted in buckets of
//! 2^`UNIT_SHIFT` bytes, and of copies there are few. A request over too many units is counted as wide; while there is one, and
//! where a bucket is taken, the live ones are looked at one by one.

use std::collections::VecDeque;
use std::ops::Range;

use resilver_sys::usize_from;

use super::bugs::{Bug, planted};
use crate::bitmap::Grid;

/// Bytes of a bucket's unit, as a power of two.
const UNIT_SHIFT: u32 = 12;
/// Buckets for each operation there is room for: few requests share one by chance.
const BUCKETS_EACH: usize = 8;
/// A request over more units than these is wide.
const UNITS_MAX: u64 = 64;

/// Names an operation: an index into a fixed table.
pub(super) type Holder = u16;

/// What somebody who comes must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Entered {
    /// Go on.
    Granted,
    /// Wait for older guest writes only.
    Waits,
    /// Wait for a copy, and maybe for others.
    WaitsForCopy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Class {
    Guest,
    Copy,
    /// A comparison of both legs.
    Check,
}

/// One operation's place.
#[derive(Debug, Clone, Copy)]
struct Entry {
    class: Class,
    /// First byte and end.
    start: u64,
    end: u64,
    /// When it came.
    age: u64,
    /// Older ones that it waits for.
    blockers: u32,
    /// Its place among the live.
    at: u16,
}

/// The operations on a disk.
#[derive(Debug, Clone)]
pub(super) struct Ranges {
    grid: Grid,
    entries: Box<[Option<Entry>]>,
    /// Holders that are here, in no order.
    live: Vec<Holder>,
    buckets: Box<[u16]>,
    wide: u32,
    copies: u32,
    waiting: u32,
    next_age: u64,
    granted: VecDeque<Holder>,
}

impl Ranges {
    /// Places for `holders` operations.
    pub(super) fn new(grid: Grid, holders: usize) -> Self {
        Self {
            grid,
            entries: vec![None; holders].into_boxed_slice(),
            live: Vec::with_capacity(holders),
            buckets: vec![0; holders.next_power_of_two() * BUCKETS_EACH].into_boxed_slice(),
            wide: 0,
            copies: 0,
            waiting: 0,
            next_age: 0,
            granted: VecDeque::with_capacity(holders),
        }
    }

    /// A guest write comes. It may be granted later, by [`Ranges::next_granted`].
    pub(super) fn enter_guest(&mut self, holder: Holder, bytes: &Range<u64>) -> Entered {
        let conflict_possible = self.copies > 0 || self.wide > 0 || self.bucket_taken(bytes);
        self.count(bytes, 1);
        self.enter(holder, Class::Guest, bytes, conflict_possible)
    }

    /// A copy comes, of whole chunks.
    pub(super) fn enter_copy(&mut self, holder: Holder, bytes: &Range<u64>) -> Entered {
        self.copies += 1;
        self.enter(holder, Class::Copy, bytes, true)
    }

    /// A comparison comes, of whole chunks: as a copy, but guest writes that wait for it have not met a copy.
    pub(super) fn enter_check(&mut self, holder: Holder, bytes: &Range<u64>) -> Entered {
        self.copies += 1;
        self.enter(holder, Class::Check, bytes, true)
    }

    /// How far from its start a copy of these chunks would meet nobody: its own start if somebody is there.
    pub(super) fn free_until(&self, bytes: &Range<u64>) -> u64 {
        if planted(Bug::CopierIgnoresGuestWrites) {
            return bytes.end;
        }
        let mut end = bytes.end;
        for holder in &self.live {
            let Some(entry) = &self.entries[usize::from(*holder)] else { continue };
            let taken = self.chunks_of(entry);
            if taken.start < end && bytes.start < taken.end {
                end = taken.start.max(bytes.start);
            }
        }
        end
    }

    /// An operation ends, or goes without having been granted.
    pub(super) fn leave(&mut self, holder: Holder) {
        let Some(left) = self.entries[usize::from(holder)].take() else { return };
        self.live.swap_remove(usize::from(left.at));
        if let Some(moved) = self.live.get(usize::from(left.at))
            && let Some(entry) = &mut self.entries[usize::from(*moved)]
        {
            entry.at = left.at;
        }
        match left.class {
            Class::Guest => self.count(&(left.start..left.end), -1),
            Class::Copy | Class::Check => self.copies -= 1,
        }
        if left.blockers > 0 {
            self.waiting -= 1;
            self.granted.retain(|granted| *granted != holder);
        }
        if self.waiting > 0 {
            self.unblock(&left);
        }
    }

    /// Whether somebody who waited may go on.
    #[inline]
    pub(super) fn has_granted(&self) -> bool {
        !self.granted.is_empty()
    }

    /// The next that waited and may go on, oldest first.
    pub(super) fn next_granted(&mut self) -> Option<Holder> {
        self.granted.pop_front()
    }

    fn enter(
        &mut self,
        holder: Holder,
        class: Class,
        bytes: &Range<u64>,
        conflict_possible: bool,
    ) -> Entered {
        let age = self.next_age;
        self.next_age += 1;
        #[allow(clippy::cast_possible_truncation)] // holders are counted in u16
        let at = self.live.len() as u16;
        let mut new = Entry { class, start: bytes.start, end: bytes.end, age, blockers: 0, at };
        let mut behind_copy = false;
        if conflict_possible {
            for other in &self.live {
                let Some(entry) = &self.entries[usize::from(*other)] else { continue };
                if self.conflict(&new, entry) {
                    new.blockers += 1;
                    behind_copy |= entry.class == Class::Copy;
                }
            }
        }
        self.waiting += u32::from(new.blockers > 0);
        self.entries[usize::from(holder)] = Some(new);
        self.live.push(holder);
        match (new.blockers, behind_copy) {
            (0, _) => Entered::Granted,
            (_, false) => Entered::Waits,
            (_, true) => Entered::WaitsForCopy,
        }
    }

    /// Tells those who waited for `left`. Several may be granted by one; they go in the order in which they came.
    fn unblock(&mut self, left: &Entry) {
        let first = self.granted.len();
        for index in 0..self.live.len() {
            let holder = self.live[index];
            let Some(mut entry) = self.entries[usize::from(holder)] else { continue };
            if entry.blockers == 0 || entry.age < left.age || !self.conflict(&entry, left) {
                continue;
            }
            entry.blockers -= 1;
            self.entries[usize::from(holder)] = Some(entry);
            if entry.blockers == 0 {
                self.waiting -= 1;
                self.granted.push_back(holder);
            }
        }
        let entries = &self.entries;
        let age = |holder: &Holder| entries[usize::from(*holder)].map_or(0, |entry| entry.age);
        if let Some(new) = self.granted.make_contiguous().get_mut(first..) {
            new.sort_unstable_by_key(age);
        }
    }

    fn conflict(&self, one: &Entry, two: &Entry) -> bool {
        match (one.class, two.class) {
            (Class::Guest, Class::Guest) => {
                one.start < two.end && two.start < one.end && !planted(Bug::OverlapOrderLost)
            }
            (Class::Copy, Class::Copy) | (Class::Check, Class::Check) => false,
            (Class::Guest, Class::Copy | Class::Check)
            | (Class::Copy | Class::Check, Class::Guest)
            | (Class::Copy, Class::Check)
            | (Class::Check, Class::Copy) => {
                let (one_chunks, two_chunks) = (self.chunks_of(one), self.chunks_of(two));
                let older = if one.age < two.age { one.class } else { two.class };
                let ignored = match older {
                    Class::Copy => planted(Bug::GuestIgnoresCopier),
                    Class::Check => false,
                    Class::Guest => planted(Bug::CopierIgnoresGuestWrites),
                };
                one_chunks.start < two_chunks.end && two_chunks.start < one_chunks.end && !ignored
            }
        }
    }

    /// The bytes of the chunks that an operation touches.
    fn chunks_of(&self, entry: &Entry) -> Range<u64> {
        self.grid.bytes(&self.grid.touched(entry.start, entry.end - entry.start))
    }

    /// Neighbouring units fall into neighbouring buckets: requests of one stream never share one by chance.
    fn bucket(&self, unit: u64) -> usize {
        usize_from(unit) & (self.buckets.len() - 1)
    }

    fn bucket_taken(&self, bytes: &Range<u64>) -> bool {
        units(bytes).is_none_or(|mut units| units.any(|unit| self.buckets[self.bucket(unit)] > 0))
    }

    /// Adds `sign` to the buckets of a guest write, or to the count of wide ones.
    fn count(&mut self, bytes: &Range<u64>, sign: i16) {
        match units(bytes) {
            Some(units) => {
                for unit in units {
                    let bucket = self.bucket(unit);
                    let taken = &mut self.buckets[bucket];
                    *taken = taken.wrapping_add_signed(sign);
                }
            }
            None => self.wide = self.wide.wrapping_add_signed(sign.into()),
        }
    }

    /// The state as far as it decides what happens next: holders, oldest first, and what they wait for.
    #[cfg(test)]
    pub(super) fn fingerprint(&self, hasher: &mut impl std::hash::Hasher) {
        use std::hash::Hash;
        let mut order = self.live.clone();
        order.sort_unstable_by_key(|holder| self.entries[usize::from(*holder)].map(|e| e.age));
        for holder in order {
            let entry = self.entries[usize::from(holder)].expect("a live holder has an entry");
            (holder, entry.class, entry.start, entry.end, entry.blockers).hash(hasher);
        }
        self.granted.hash(hasher);
    }
}

/// The units of a range, unless there are too many.
fn units(bytes: &Range<u64>) -> Option<Range<u64>> {
    if bytes.is_empty() {
        return Some(0..0);
    }
    let units = bytes.start >> UNIT_SHIFT..((bytes.end - 1) >> UNIT_SHIFT) + 1;
    (units.end - units.start <= UNITS_MAX).then_some(units)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges() -> Ranges {
        Ranges::new(Grid::new(1 << 30, 65536), 16)
    }

    #[test]
    fn overlapping_writes_go_in_the_order_in_which_they_came() {
        let mut ranges = ranges();
        assert_eq!(ranges.enter_guest(0, &(0..8192)), Entered::Granted);
        assert_eq!(ranges.enter_guest(1, &(4096..12288)), Entered::Waits);
        assert_eq!(ranges.enter_guest(2, &(8192..12288)), Entered::Waits, "behind one that waits");
        assert_eq!(ranges.enter_guest(3, &(16384..20480)), Entered::Granted);
        ranges.leave(0);
        assert_eq!((ranges.next_granted(), ranges.next_granted()), (Some(1), None));
        ranges.leave(1);
        assert_eq!(ranges.next_granted(), Some(2));
    }

    #[test]
    fn a_copy_and_a_write_exclude_each_other_by_the_chunk() {
        let mut ranges = ranges();
        assert_eq!(ranges.enter_copy(9, &(0..65536)), Entered::Granted);
        assert_eq!(ranges.enter_guest(0, &(61440..65536)), Entered::WaitsForCopy);
        assert_eq!(ranges.enter_guest(1, &(65536..69632)), Entered::Granted);
        assert_eq!(ranges.free_until(&(131072..262144)), 262_144);
        assert_eq!(ranges.free_until(&(65536..262144)), 65536);
        ranges.leave(9);
        assert_eq!(ranges.next_granted(), Some(0));
    }

    #[test]
    fn a_copy_that_waits_holds_younger_writes_back() {
        let mut ranges = ranges();
        ranges.enter_guest(0, &(0..4096));
        assert_eq!(ranges.enter_copy(9, &(0..65536)), Entered::Waits);
        assert_eq!(ranges.enter_guest(1, &(8192..12288)), Entered::WaitsForCopy);
        ranges.leave(0);
        assert_eq!((ranges.next_granted(), ranges.next_granted()), (Some(9), None));
        ranges.leave(9);
        assert_eq!(ranges.next_granted(), Some(1));
    }

    #[test]
    fn one_that_goes_without_having_been_granted_leaves_no_trace() {
        let mut ranges = ranges();
        ranges.enter_guest(0, &(0..4096));
        ranges.enter_copy(9, &(0..65536));
        ranges.enter_guest(1, &(8192..12288));
        ranges.leave(9);
        assert_eq!((ranges.next_granted(), ranges.next_granted()), (Some(1), None));
        ranges.leave(0);
        ranges.leave(1);
        assert_eq!((ranges.waiting, ranges.copies, ranges.live.len()), (0, 0, 0));
        assert!(ranges.buckets.iter().all(|bucket| *bucket == 0));
    }

    #[test]
    fn a_wide_request_conflicts_as_any_other() {
        let mut ranges = ranges();
        ranges.enter_guest(0, &(0..1 << 29));
        assert_eq!(ranges.enter_guest(1, &(4096..8192)), Entered::Waits);
        assert_eq!(ranges.enter_guest(2, &(1 << 29..(1 << 29) + 4096)), Entered::Granted);
        ranges.leave(0);
        assert_eq!(ranges.next_granted(), Some(1));
        assert_eq!(ranges.wide, 0);
    }
}
