//! In-flight tracking of a split ring (vhost-user, "Inflight I/O tracking", `QueueRegionSplit`).
//!
//! | offset | field |
//! | --- | --- |
//! | 0 | features, u64: none |
//! | 8 | version, u16 |
//! | 10 | desc_num, u16: entries |
//! | 12 | last_batch_head, u16 |
//! | 14 | used_idx, u16 |
//! | 16 + 16 i | of descriptor i: inflight, u8; 5 bytes nothing; next, u16; counter, u64 |
//!
//! **What holds at every instant**, so that a crash there loses and repeats nothing: a request is marked before it is
//! executed; the requests of a batch are linked from `last_batch_head` before the used index says that they were given
//! back, and unmarked after; `used_idx` follows last. So when `used_idx` is behind the ring's used index, exactly so many
//! entries from `last_batch_head` were given back and may still be marked.
//!
//! Stores are release stores, in the order given: whoever looks after a crash sees a prefix of them.

use std::sync::atomic::Ordering;

use resilver_sys::Area;

use super::{ENTRIES_AT, VERSION, VERSION_AT};

pub(super) const HEADER_BYTES: usize = 16;
pub(super) const ENTRY_BYTES: usize = 16;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
/// In an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The tracker of one split ring.
#[derive(Debug)]
pub(crate) struct SplitInflight {
    area: Area,
    /// The next request's counter.
    counter: u64,
    /// The head of the last batch, which the region has too: what it says there is not ours to believe.
    last_batch: u16,
    /// The heads of the batch that is not published yet: room made once.
    batch: Vec<u16>,
}

impl SplitInflight {
    fn new(area: Area, size: u16, counter: u64, last_batch: u16) -> Self {
        Self { area, counter, last_batch, batch: Vec::with_capacity(usize::from(size)) }
    }

    /// Begins with a region that nobody has used, on a ring whose used index is `used`. That index is written down at
    /// once: a ring that has moved before, on another host say, would otherwise look like a batch cut short.
    pub(super) fn fresh(area: Area, size: u16, entries: u16, used: u16) -> Self {
        area.store_u16(ENTRIES_AT, entries, Ordering::Relaxed);
        area.store_u16(LAST_BATCH_AT, 0, Ordering::Relaxed);
        area.store_u16(USED_AT, used, Ordering::Relaxed);
        area.store_u16(VERSION_AT, VERSION, Ordering::Release);
        Self::new(area, size, 0, 0)
    }

    /// Goes on with a region; answers the heads that are to be executed again, in order.
    pub(super) fn recover(area: Area, size: u16, used: u16) -> (Self, Box<[u16]>) {
        let behind = used.wrapping_sub(area.load_u16(USED_AT, Ordering::Acquire));
        let mut head = area.load_u16(LAST_BATCH_AT, Ordering::Relaxed);
        let last_batch = if head < size { head } else { 0 };
        // No batch is longer than the ring. A ring that was set up anew since has another index and nothing in flight.
        for _ in 0..behind.min(size) {
            if head >= size {
                break;
            }
            let entry = entry(head);
            area.store_u8(entry + INFLIGHT, 0, Ordering::Release);
            head = area.load_u16(entry + NEXT, Ordering::Relaxed);
        }
        area.store_u16(USED_AT, used, Ordering::Release);
        let marked = |head: &u16| area.load_u8(entry(*head) + INFLIGHT, Ordering::Relaxed) == 1;
        let mut again: Box<[u16]> = (0..size).filter(marked).collect();
        let counter = |head: u16| area.load_u64(entry(head) + COUNTER, Ordering::Relaxed);
        again.sort_by_cached_key(|head| counter(*head));
        let next = again.last().map_or(0, |head| counter(*head).wrapping_add(1));
        (Self::new(area, size, next, last_batch), again)
    }

    /// A head was taken from the available ring.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        let entry = entry(head);
        self.area.store_u64(entry + COUNTER, self.counter, Ordering::Relaxed);
        self.area.store_u8(entry + INFLIGHT, 1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A head goes into the batch.
    #[inline]
    pub(crate) fn completed(&mut self, head: u16) {
        self.area.store_u16(entry(head) + NEXT, self.last_batch, Ordering::Relaxed);
        self.area.store_u16(LAST_BATCH_AT, head, Ordering::Release);
        self.last_batch = head;
        // A driver that offers a head twice may have more come back than the ring has entries. Those stay marked: it will see
        // them executed again, and nobody else will.
        if self.batch.len() < self.batch.capacity() {
            self.batch.push(head);
        }
    }

    /// The used index says that the batch was given back.
    #[inline]
    pub(crate) fn published(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.area.store_u8(entry(head) + INFLIGHT, 0, Ordering::Release);
        }
        self.area.store_u16(USED_AT, used, Ordering::Release);
    }
}

/// Where the entry of a descriptor begins. Heads are below the ring's size, and the region has as many entries.
#[inline]
fn entry(head: u16) -> usize {
    HEADER_BYTES + usize::from(head) * ENTRY_BYTES
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // of what the test made itself
mod tests {
    use super::super::InflightMemory;
    use super::*;
    use crate::ring::Format;
    use proptest::prelude::*;
    use resilver_sys::Mapping;

    const SIZE: u16 = 8;

    fn region() -> Area {
        let mapping = Mapping::anonymous(4096).unwrap();
        Area::new(&mapping, 0, super::super::stride(Format::Split, SIZE), 8).unwrap()
    }

    /// What is left of a region after a crash: a copy of its bytes.
    fn copy(area: &Area) -> Area {
        let copy = region();
        for at in (0..area.len()).step_by(8) {
            copy.store_u64(at, area.load_u64(at, Ordering::Relaxed), Ordering::Relaxed);
        }
        copy
    }

    fn again(area: &Area, used: u16) -> Vec<u16> {
        let copy = copy(area);
        let (_, again) = SplitInflight::recover(copy.clone(), SIZE, used);
        let (_, twice) = SplitInflight::recover(copy, SIZE, used);
        assert_eq!(again, twice, "a crash after the recovery finds the same");
        again.into_vec()
    }

    #[test]
    fn the_layout_is_that_of_the_document() {
        let area = region();
        let mut tracker = SplitInflight::fresh(area.clone(), SIZE, SIZE, 0x1234);
        tracker.taken(3);
        tracker.taken(5);
        tracker.completed(3);
        tracker.completed(5);
        let bytes = |at: usize, length: usize| -> Vec<u8> {
            (at..at + length).map(|at| area.load_u8(at, Ordering::Relaxed)).collect()
        };
        assert_eq!(bytes(0, 8), [0; 8]);
        assert_eq!(bytes(8, 8), [1, 0, 8, 0, 5, 0, 0x34, 0x12]);
        assert_eq!(bytes(16 + 5 * 16, 16), [1, 0, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        tracker.published(0x1236);
        assert_eq!(bytes(14, 2), [0x36, 0x12]);
        assert_eq!((bytes(16 + 3 * 16, 1), bytes(16 + 5 * 16, 1)), (vec![0], vec![0]));
        // Two queues of 8 entries, each at a multiple of 64.
        let (made, _file) = InflightMemory::make(Format::Split, 2, SIZE).unwrap();
        assert_eq!(made.mmap_size, 2 * 192);
    }

    #[test]
    fn a_fresh_region_on_a_ring_that_has_moved_loses_nothing_at_the_first_crash() {
        let area = region();
        let mut tracker = SplitInflight::fresh(area.clone(), SIZE, SIZE, 500);
        tracker.taken(0);
        assert_eq!(again(&area, 500), [0]);
    }

    #[test]
    fn whatever_a_front_end_writes_into_a_region_recovery_ends_and_stays_inside() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..500 {
            let area = region();
            for at in (0..area.len()).step_by(8) {
                seed = seed.wrapping_mul(0xd129_42b6_8a4c_2f4d).wrapping_add(0x1405_7b7e_f767_814f);
                area.store_u64(at, seed ^ seed >> 29, Ordering::Relaxed);
            }
            let (mut tracker, again) = SplitInflight::recover(area, SIZE, seed as u16);
            assert!(again.iter().all(|head| *head < SIZE));
            for _ in 0..3 {
                again.iter().for_each(|head| tracker.completed(*head));
            }
            tracker.published(1);
        }
    }

    proptest! {
        /// After a crash at any instant, what is executed again is what was taken and not given back, in the order in which it
        /// was taken.
        #[test]
        fn a_crash_at_any_instant_loses_and_repeats_nothing(
            start: u16,
            steps in prop::collection::vec((any::<bool>(), 0usize..8), 1..80),
        ) {
            let area = region();
            let mut tracker = SplitInflight::fresh(area.clone(), SIZE, SIZE, start);
            let (mut used, mut free) = (start, (0..SIZE).collect::<Vec<_>>());
            let (mut taken, mut batch): (Vec<u16>, Vec<u16>) = (Vec::new(), Vec::new());
            for (take, which) in steps {
                if take && !free.is_empty() {
                    let head = free.remove(which % free.len());
                    tracker.taken(head);
                    taken.push(head);
                } else if let Some(head) = taken.iter().filter(|head| !batch.contains(head)).nth(which) {
                    batch.push(*head);
                    tracker.completed(*head);
                } else {
                    // The ring says so; a crash may come before the first mark goes, or after any of them.
                    let before = copy(&area);
                    used = used.wrapping_add(batch.len() as u16);
                    taken.retain(|head| !batch.contains(head));
                    for head in &batch {
                        prop_assert_eq!(&again(&before, used), &taken);
                        before.store_u8(entry(*head) + INFLIGHT, 0, Ordering::Relaxed);
                    }
                    prop_assert_eq!(&again(&before, used), &taken);
                    tracker.published(used);
                    free.append(&mut batch);
                }
                prop_assert_eq!(&again(&area, used), &taken);
            }
        }
    }
}
