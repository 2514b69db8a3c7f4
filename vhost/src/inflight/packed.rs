//! In-flight tracking of a packed ring (vhost-user, "Inflight I/O tracking", `QueueRegionPacked`).
//!
//! | offset | field |
//! | --- | --- |
//! | 0 | features, u64: none |
//! | 8 | version, u16 |
//! | 10 | desc_num, u16: entries |
//! | 12, 14 | free_head, old_free_head, u16 |
//! | 16, 18 | used_idx, old_used_idx, u16 |
//! | 20, 21 | used_wrap_counter, old_used_wrap_counter, u8 |
//! | 32 + 32 i | entry i: inflight, u8; nothing, u8; next, last, num, u16; counter, u64; id, flags, u16; len, u32; addr, u64 |
//!
//! A chain takes entries from a free list, one for each of its descriptors, and is known by its first. Its descriptors are
//! copied there, because the ring's own are overwritten by what is given back before them.
//!
//! **What holds at every instant.** The fields without `old_` run ahead; those with it are what is committed. A chain counts as
//! taken when `old_free_head` has moved behind its entries. A batch counts as given back when the driver can see it, which is
//! asked of the ring: if the descriptor at `old_used_idx` is no longer as the driver made it available, the batch was
//! published and is committed by whoever comes next; else it is rolled back, its requests are executed again, and marks that
//! were written behind that descriptor are taken back, or the driver would find them once it is published (the document
//! does not speak of those).
//!
//! Where the ring stands is one word of the region, stored at once: an index without its wrap counter is another position. Who
//! stores them one by one, as others may, with `old_used_wrap_counter` last, is understood all the same.
//!
//! Links of the free list are kept here too and never read back while we run.

use std::sync::atomic::Ordering;

use resilver_sys::Area;

use super::{ENTRIES_AT, VERSION, VERSION_AT};
use crate::packed::{OWNER, PackedChain, PackedRing, Position};
use crate::ring::{Descriptor, Descriptors, Format, Taken};

pub(super) const HEADER_BYTES: usize = 32;
pub(super) const ENTRY_BYTES: usize = 32;
const FREE_AT: usize = 12;
const OLD_FREE_AT: usize = 14;
const USED_AT: usize = 16;
const OLD_USED_AT: usize = 18;
const WRAP_AT: usize = 20;
const OLD_WRAP_AT: usize = 21;
/// The word that has the last four, and two bytes of padding.
const POSITIONS_AT: usize = 16;
/// In an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LENGTH: usize = 20;
const ADDRESS: usize = 24;

/// The tracker of one packed ring.
#[derive(Debug)]
pub(crate) struct PackedInflight {
    area: Area,
    /// Entries of the region.
    entries: u16,
    /// The next request's counter.
    counter: u64,
    /// The free list: its head, and of each entry the next. Of a chain that is taken too, whose entries hang together.
    free: u16,
    next: Box<[u16]>,
    /// Of the first entry of a chain that is taken: its last.
    last: Box<[u16]>,
    /// The first entries of the batch that is not published yet: room made once.
    batch: Vec<u16>,
    /// Where the ring stands but for that batch.
    committed: Position,
}

impl PackedInflight {
    /// Begins with a region that nobody has used, or that a ring which stopped has left, on a ring that stands at `used`.
    pub(super) fn fresh(area: Area, entries: u16, used: Position) -> Self {
        // Half of it is nobody's: who comes to that finds a region that nobody has used, as a ring that stopped leaves it anyway.
        area.store_u16(VERSION_AT, 0, Ordering::Release);
        // The list ends at the entry that there is not.
        let next: Box<[u16]> = (0..entries).map(|entry| entry + 1).collect();
        for (entry, next) in (0..).zip(&next) {
            area.store_u16(at(entry) + NEXT, *next, Ordering::Relaxed);
            area.store_u8(at(entry) + INFLIGHT, 0, Ordering::Relaxed);
        }
        area.store_u16(ENTRIES_AT, entries, Ordering::Relaxed);
        let mut tracker = Self::new(area, entries, 0, 0, next);
        tracker.store_free(0);
        tracker.commit(used);
        tracker.area.store_u16(VERSION_AT, VERSION, Ordering::Release);
        tracker
    }

    fn new(area: Area, entries: u16, counter: u64, free: u16, next: Box<[u16]>) -> Self {
        let last = vec![0; usize::from(entries)].into_boxed_slice();
        let batch = Vec::with_capacity(usize::from(entries));
        Self { area, entries, counter, free, next, last, batch, committed: Position::START }
    }

    /// Goes on with a region, and moves the ring to where it stands by it.
    ///
    /// # Errors
    /// What in the region makes no sense.
    pub(super) fn recover(
        area: Area,
        entries: u16,
        ring: &mut PackedRing,
    ) -> Result<(Self, Box<[Taken]>), &'static str> {
        let position = |index: usize, wrap: usize| Position {
            index: area.load_u16(index, Ordering::Acquire),
            wrap: area.load_u8(wrap, Ordering::Acquire) != 0,
        };
        let (mut used, mut old) = (position(USED_AT, WRAP_AT), position(OLD_USED_AT, OLD_WRAP_AT));
        if used.index >= ring.size() || old.index >= ring.size() {
            return Err("names a descriptor that the ring does not have");
        }
        let mut free = area.load_u16(OLD_FREE_AT, Ordering::Acquire);
        // Committed but for the wrap counter. A batch that goes once around the ring looks so, too, but moves the free list's head.
        if used.index == old.index && free == area.load_u16(FREE_AT, Ordering::Acquire) {
            old = used;
        }
        if used != old {
            let published = ring.flags(old.index) & OWNER != old.available();
            if published {
                free = area.load_u16(FREE_AT, Ordering::Acquire);
            } else {
                roll_back(ring, old, used);
                used = old;
            }
        }
        let next: Box<[u16]> =
            (0..entries).map(|entry| area.load_u16(at(entry) + NEXT, Ordering::Relaxed)).collect();
        let mut tracker = Self::new(area, entries, 0, free, next);
        let mut places = vec![false; usize::from(entries)];
        let free_entries = tracker.unmark_free(&mut places)?;
        let again = tracker.marked(&mut places)?;
        let outstanding: u32 = again.iter().map(|taken| u32::from(taken.entries)).sum();
        let outstanding = u16::try_from(outstanding).ok().filter(|sum| *sum <= ring.size());
        let outstanding = outstanding.ok_or("has more descriptors in flight than the ring has")?;
        if u32::from(outstanding) + u32::from(free_entries) != u32::from(entries) {
            return Err("has lost entries");
        }
        // In this order: with the head alone taken back, a batch around the whole ring would look committed.
        tracker.commit(used);
        tracker.store_free(free);
        ring.resume_at(used, outstanding);
        Ok((tracker, again))
    }

    /// Walks the free list and takes the mark off every entry in it; answers how many there are. Their `places` are taken.
    ///
    /// # Errors
    /// Links that lead outside, or round in a circle.
    fn unmark_free(&mut self, places: &mut [bool]) -> Result<u16, &'static str> {
        let (mut entry, mut count) = (self.free, 0);
        while entry != self.entries {
            let next = self.next.get(usize::from(entry)).copied();
            let next = next.ok_or("has a free list that leaves it")?;
            if !take_place(places, entry) {
                return Err("has a free list that goes round in a circle");
            }
            self.area.store_u8(at(entry) + INFLIGHT, 0, Ordering::Release);
            (entry, count) = (next, count + 1);
        }
        Ok(count)
    }

    /// The chains in flight, in the order of their counters. No entry may be in two, or be free as well: the free list would lose
    /// entries when they end, and the next chains find none. So every link is followed once.
    ///
    /// # Errors
    /// One that is, or a chain that leads outside.
    fn marked(&mut self, places: &mut [bool]) -> Result<Box<[Taken]>, &'static str> {
        let area = self.area.clone();
        let word = |entry: u16, field: usize| area.load_u16(at(entry) + field, Ordering::Relaxed);
        let counter = |entry: u16| area.load_u64(at(entry) + COUNTER, Ordering::Relaxed);
        let mut again = Vec::new();
        for first in 0..self.entries {
            if area.load_u8(at(first) + INFLIGHT, Ordering::Relaxed) != 1 {
                continue;
            }
            let entries = word(first, NUM);
            let (mut last, mut entry) = (first, first);
            for _ in 0..entries {
                let next = self.next.get(usize::from(entry)).copied();
                let next = next.ok_or("has a chain that leaves it")?;
                if !take_place(places, entry) {
                    return Err("has an entry in two places");
                }
                (last, entry) = (entry, next);
            }
            if entries == 0 {
                return Err("has a chain without entries");
            }
            if let Some(of_first) = self.last.get_mut(usize::from(first)) {
                *of_first = last;
            }
            again.push(Taken { id: word(last, ID), entries, record: first });
        }
        again.sort_by_cached_key(|taken| counter(taken.record));
        self.counter = again.last().map_or(0, |taken| counter(taken.record).wrapping_add(1));
        Ok(again.into_boxed_slice())
    }

    fn store_free(&self, free: u16) {
        self.area.store_u16(FREE_AT, free, Ordering::Release);
    }

    fn store_positions(&self, used: Position, old: Position) {
        let word = u64::from(used.index)
            | u64::from(old.index) << 16
            | u64::from(used.wrap) << 32
            | u64::from(old.wrap) << 40;
        self.area.store_u64(POSITIONS_AT, word, Ordering::Release);
    }

    /// What runs ahead is so.
    fn commit(&mut self, used: Position) {
        self.committed = used;
        self.area.store_u16(OLD_FREE_AT, self.free, Ordering::Release);
        self.store_positions(used, used);
    }

    /// A chain of `count` descriptors was taken; answers where it is recorded.
    #[inline]
    pub(crate) fn taken(&mut self, mut chain: PackedChain<'_>, count: u16) -> u16 {
        let first = self.free;
        let (mut entry, mut last) = (first, first);
        // There is a free entry for every descriptor that can be out, and the links are ours.
        for descriptor in std::iter::from_fn(|| chain.fetch()).take(usize::from(count)) {
            let Some(next) = self.next.get(usize::from(entry)).copied() else { break };
            let place = at(entry);
            self.area.store_u16(place + ID, descriptor.link, Ordering::Relaxed);
            self.area.store_u16(place + FLAGS, descriptor.flags, Ordering::Relaxed);
            self.area.store_u32(place + LENGTH, descriptor.length, Ordering::Relaxed);
            self.area.store_u64(place + ADDRESS, descriptor.address, Ordering::Relaxed);
            (last, entry) = (entry, next);
        }
        let place = at(first);
        self.area.store_u16(place + NUM, count, Ordering::Relaxed);
        self.area.store_u16(place + LAST, last, Ordering::Relaxed);
        self.area.store_u64(place + COUNTER, self.counter, Ordering::Relaxed);
        self.area.store_u8(place + INFLIGHT, 1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        if let Some(of_first) = self.last.get_mut(usize::from(first)) {
            *of_first = last;
        }
        self.free = entry;
        self.store_free(entry);
        self.area.store_u16(OLD_FREE_AT, entry, Ordering::Release);
        first
    }

    /// A chain goes into the batch. Its entries are not free before the batch is published: a request that is taken meanwhile
    /// must not overwrite what would have to be executed again.
    #[inline]
    pub(crate) fn completed(&mut self, record: u16) {
        if self.batch.len() < self.batch.capacity() {
            self.batch.push(record);
        }
    }

    /// The batch is about to be published; the ring will stand at `used` then.
    #[inline]
    pub(crate) fn publishing(&mut self, used: Position) {
        if self.batch.is_empty() {
            return;
        }
        for record in &self.batch {
            let Some(last) = self.last.get(usize::from(*record)).copied() else { continue };
            self.area.store_u16(at(last) + NEXT, self.free, Ordering::Release);
            if let Some(next) = self.next.get_mut(usize::from(last)) {
                *next = self.free;
            }
            self.free = *record;
        }
        self.store_free(self.free);
        self.store_positions(used, self.committed);
    }

    /// The batch was published.
    #[inline]
    pub(crate) fn published(&mut self, used: Position) {
        if self.batch.is_empty() {
            return;
        }
        for record in self.batch.drain(..) {
            self.area.store_u8(at(record) + INFLIGHT, 0, Ordering::Release);
        }
        self.commit(used);
    }

    /// The descriptors of a chain, as they were taken.
    #[inline]
    pub(crate) fn chain(&self, taken: Taken) -> RecordedChain<'_> {
        RecordedChain { tracker: self, entry: taken.record, most: taken.entries }
    }
}

/// Takes back marks that a batch which was not published has left in the ring.
fn roll_back(ring: &PackedRing, from: Position, to: Position) {
    let mut place = from.ahead(1, ring.size());
    // No batch is longer than the ring.
    for _ in 1..ring.size() {
        if place == to {
            return;
        }
        if ring.flags(place.index) & OWNER == place.used() {
            ring.take_back(place);
        }
        place = place.ahead(1, ring.size());
    }
}

/// Takes an entry's place; false if it was taken before.
fn take_place(places: &mut [bool], entry: u16) -> bool {
    places.get_mut(usize::from(entry)).is_some_and(|taken| !std::mem::replace(taken, true))
}

/// Where an entry begins. Entries are below the region's number of them.
#[inline]
fn at(entry: u16) -> usize {
    HEADER_BYTES + usize::from(entry) * ENTRY_BYTES
}

/// A chain that was taken by an earlier back end.
pub(crate) struct RecordedChain<'a> {
    tracker: &'a PackedInflight,
    entry: u16,
    most: u16,
}

impl Descriptors for RecordedChain<'_> {
    const FORMAT: Format = Format::Packed;

    fn most(&self) -> u16 {
        self.most
    }

    fn fetch(&mut self) -> Option<Descriptor> {
        let next = self.tracker.next.get(usize::from(self.entry)).copied()?;
        let (area, place) = (&self.tracker.area, at(self.entry));
        self.entry = next;
        Some(Descriptor {
            address: area.load_u64(place + ADDRESS, Ordering::Relaxed),
            length: area.load_u32(place + LENGTH, Ordering::Relaxed),
            flags: area.load_u16(place + FLAGS, Ordering::Relaxed),
            link: area.load_u16(place + ID, Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // of what the test made itself
mod tests {
    use super::super::stride;
    use super::*;
    use crate::ring::{EventMode, RingAreas};
    use proptest::prelude::*;
    use resilver_sys::Mapping;

    const SIZE: u16 = 12;
    const START: u32 = 0x8000_8000;

    fn area(bytes: usize) -> Area {
        Area::new(&Mapping::anonymous(bytes).unwrap(), 0, bytes, 8).unwrap()
    }

    fn region() -> Area {
        area(stride(Format::Packed, SIZE))
    }

    fn copy(from: &Area) -> Area {
        let copy = area(from.len());
        for at in (0..from.len()).step_by(8) {
            copy.store_u64(at, from.load_u64(at, Ordering::Relaxed), Ordering::Relaxed);
        }
        copy
    }

    fn ring(descriptors: &Area) -> PackedRing {
        let (driver, device) = (area(8), area(8));
        let areas = RingAreas { descriptors: descriptors.clone(), driver, device, log: None };
        PackedRing::new(areas, SIZE, START, EventMode::Flags).unwrap()
    }

    /// A ring's memory, its device and its region, with a driver that is as good as its word.
    struct Rig {
        descriptors: Area,
        ring: PackedRing,
        region: Area,
        tracker: PackedInflight,
        /// Where the driver goes on.
        next: Position,
        taken: Vec<Taken>,
        batch: Vec<Taken>,
        ids: u16,
    }

    impl Rig {
        fn new() -> Self {
            let (descriptors, region) = (area(16 * usize::from(SIZE)), region());
            let tracker = PackedInflight::fresh(region.clone(), SIZE, Position::START);
            let next = Position::START;
            let (taken, batch) = (Vec::new(), Vec::new());
            Self {
                ring: ring(&descriptors),
                descriptors,
                region,
                tracker,
                next,
                taken,
                batch,
                ids: 0,
            }
        }

        fn out(&self) -> u16 {
            self.taken.iter().map(|taken| taken.entries).sum()
        }

        /// The driver offers a chain, the device takes it.
        fn take(&mut self, entries: u16) {
            self.ids += 1;
            for part in 0..entries {
                let at = 16 * usize::from(self.next.index);
                let more = if part + 1 < entries { 1 } else { 0 };
                let address = u64::from(self.ids) << 32 | u64::from(part);
                self.descriptors.store_u64(at, address, Ordering::Relaxed);
                self.descriptors.store_u32(at + 8, 512, Ordering::Relaxed);
                self.descriptors.store_u16(at + 12, self.ids, Ordering::Relaxed);
                let flags = more | self.next.available();
                self.descriptors.store_u16(at + 14, flags, Ordering::Relaxed);
                self.next = self.next.ahead(1, SIZE);
            }
            let record = self.tracker.taken(self.ring.chain(), entries);
            self.ring.take(entries).unwrap();
            self.taken.push(Taken { id: self.ids, entries, record });
        }

        /// What a back end finds that comes after a crash here, with the region as it is in `region`.
        fn check(&self, region: &Area, expected: &[Taken]) {
            let descriptors = copy(&self.descriptors);
            for _ in 0..2 {
                // Twice: a crash after the recovery finds the same.
                let mut found = ring(&descriptors);
                let (tracker, again) =
                    PackedInflight::recover(region.clone(), SIZE, &mut found).unwrap();
                assert_eq!(&*again, expected);
                let used: Position = found.used_position();
                let out: u16 = expected.iter().map(|taken| taken.entries).sum();
                let next = used.ahead(out, SIZE);
                assert_eq!(
                    (found.base() as u16, found.next_index()),
                    (next.word(), self.next.index)
                );
                for taken in &*again {
                    let mut chain = tracker.chain(*taken);
                    for part in 0..taken.entries {
                        let descriptor = chain.fetch().unwrap();
                        let address = u64::from(taken.id) << 32 | u64::from(part);
                        assert_eq!((descriptor.address, descriptor.length), (address, 512));
                        assert_eq!(descriptor.flags & 1 == 1, part + 1 < taken.entries);
                    }
                }
                // Nothing that the driver will look at says more than it should.
                let mut at = used;
                for _ in 0..out {
                    assert_ne!(found.flags(at.index) & OWNER, at.used(), "{at:?}");
                    at = at.ahead(1, SIZE);
                }
            }
        }

        fn crash(&self, expected: &[Taken]) {
            self.check(&copy(&self.region), expected);
        }

        /// Gives the batch back, with a crash at every instant.
        fn publish(&mut self) {
            let batch = std::mem::take(&mut self.batch);
            let before = self.taken.clone();
            self.crash(&before);
            let entries: u16 = batch.iter().map(|taken| taken.entries).sum();
            let used = self.ring.used_position();
            let after = used.ahead(entries, SIZE);
            self.tracker.publishing(after);
            self.crash(&before);
            // All of the batch but what the driver looks at first.
            let mut at = used;
            for taken in &batch {
                if at != used {
                    let place = 16 * usize::from(at.index);
                    self.descriptors.store_u16(place + 12, taken.id, Ordering::Relaxed);
                    self.descriptors.store_u16(place + 14, at.used() | 2, Ordering::Relaxed);
                    self.crash(&before);
                }
                at = at.ahead(taken.entries, SIZE);
            }
            batch.iter().for_each(|taken| self.ring.push_used(*taken, 1));
            let _ = self.ring.publish(None);
            self.taken.retain(|taken| !batch.contains(taken));
            let after_it = self.taken.clone();
            let partly = copy(&self.region);
            for taken in &batch {
                self.check(&copy(&partly), &after_it);
                partly.store_u8(at_record(taken), 0, Ordering::Relaxed);
            }
            // As others commit, word by word.
            for (from, to) in [(FREE_AT, OLD_FREE_AT), (USED_AT, OLD_USED_AT)] {
                let word = partly.load_u16(from, Ordering::Relaxed);
                partly.store_u16(to, word, Ordering::Relaxed);
                self.check(&copy(&partly), &after_it);
            }
            self.tracker.published(after);
            self.crash(&after_it);
            let wrap = self.region.load_u8(WRAP_AT, Ordering::Relaxed);
            assert_eq!(self.region.load_u8(OLD_WRAP_AT, Ordering::Relaxed), wrap);
        }
    }

    fn at_record(taken: &Taken) -> usize {
        at(taken.record) + INFLIGHT
    }

    #[test]
    fn the_layout_is_that_of_the_document() {
        let mut rig = Rig::new();
        rig.take(2);
        let bytes = |at: usize, length: usize| -> Vec<u8> {
            (at..at + length).map(|at| rig.region.load_u8(at, Ordering::Relaxed)).collect()
        };
        assert_eq!(
            bytes(0, 22),
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 12, 0, 2, 0, 2, 0, 0, 0, 0, 0, 1, 1]
        );
        // inflight, nothing, next, last, num, counter
        assert_eq!(bytes(32, 16), [1, 0, 1, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // id, flags, len, addr of the second descriptor
        assert_eq!(bytes(32 + 32 + 16, 16), [1, 0, 128, 0, 0, 2, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(stride(Format::Packed, 128), 32 + 128 * 32 + 32);
    }

    #[test]
    fn a_chain_that_was_being_taken_is_still_the_drivers() {
        let mut rig = Rig::new();
        rig.take(3);
        let first = rig.taken.clone();
        let old_free = rig.region.load_u16(OLD_FREE_AT, Ordering::Relaxed);
        rig.take(2);
        // All of it was written, but for the last store.
        let region = copy(&rig.region);
        region.store_u16(OLD_FREE_AT, old_free, Ordering::Relaxed);
        let mut found = ring(&copy(&rig.descriptors));
        let (_, again) = PackedInflight::recover(region, SIZE, &mut found).unwrap();
        assert_eq!((&*again, found.next_index(), found.has_next()), (&*first, 3, true));
    }

    #[test]
    fn whatever_a_front_end_writes_into_a_region_recovery_ends_and_stays_inside() {
        let (mut seed, mut accepted) = (0x9e37_79b9_7f4a_7c15u64, 0);
        let mut draw = move || {
            seed = seed.wrapping_mul(0xd129_42b6_8a4c_2f4d).wrapping_add(0x1405_7b7e_f767_814f);
            seed ^ seed >> 29
        };
        for round in 0..4000 {
            let mut rig = Rig::new();
            (0..3).for_each(|chain| rig.take(chain + 1));
            // A few words of nonsense in a region that makes sense, or nothing but nonsense.
            let words = if round % 2 == 0 { 2 } else { 200 };
            for _ in 0..words {
                let at = draw() as usize % (rig.region.len() / 2) * 2;
                let value = if draw() % 4 == 0 { draw() } else { draw() % 14 };
                rig.region.store_u16(at, value as u16, Ordering::Relaxed);
            }
            let mut found = ring(&rig.descriptors);
            let recovered = PackedInflight::recover(rig.region.clone(), SIZE, &mut found);
            let Ok((mut tracker, again)) = recovered else { continue };
            accepted += 1;
            for taken in &*again {
                let mut chain = tracker.chain(*taken);
                for _ in 0..20 {
                    let _ = chain.fetch();
                }
            }
            for entries in 1..5 {
                tracker.taken(found.chain(), entries);
            }
            again.iter().for_each(|taken| tracker.completed(taken.record));
            tracker.publishing(found.used_position());
            tracker.published(found.used_position());
            tracker.taken(found.chain(), SIZE);
        }
        assert!(accepted > 100, "{accepted}");
    }

    /// An odd number of entries leaves no room behind the last: what is stored there is outside.
    const ODD: u16 = 13;

    /// A region of [`ODD`] entries with these links, of which those behind `free` are free, and these chains of so many entries.
    fn odd(links: &[u16], free: u16, chains: &[(u16, u16)]) -> Result<(), &'static str> {
        let region = area(stride(Format::Packed, ODD));
        let store = |at, value| region.store_u16(at, value, Ordering::Relaxed);
        store(VERSION_AT, VERSION);
        store(ENTRIES_AT, ODD);
        store(FREE_AT, free);
        store(OLD_FREE_AT, free);
        region.store_u8(WRAP_AT, 1, Ordering::Relaxed);
        region.store_u8(OLD_WRAP_AT, 1, Ordering::Relaxed);
        (0..).zip(links).for_each(|(entry, next)| store(at(entry) + NEXT, *next));
        for (first, entries) in chains {
            store(at(*first) + NUM, *entries);
            region.store_u8(at(*first) + INFLIGHT, 1, Ordering::Relaxed);
        }
        let descriptors = area(16 * usize::from(ODD));
        let (driver, device) = (area(8), area(8));
        let areas = RingAreas { descriptors, driver, device, log: None };
        let mut ring = PackedRing::new(areas, ODD, START, EventMode::Flags).unwrap();
        let (mut tracker, again) = PackedInflight::recover(region, ODD, &mut ring)?;
        again.iter().for_each(|taken| tracker.completed(taken.record));
        tracker.publishing(ring.used_position());
        tracker.published(ring.used_position());
        // As many as the ring has, one after the other.
        for _ in 0..ODD {
            tracker.taken(ring.chain(), 1);
        }
        Ok(())
    }

    #[test]
    fn an_entry_is_free_or_of_one_chain() {
        let in_order: Vec<u16> = (1..=ODD).collect();
        assert_eq!(odd(&in_order, 0, &[]), Ok(()));
        assert_eq!(odd(&in_order, 4, &[(0, 2), (2, 2)]), Ok(()));
        let [circle, two] =
            ["has a free list that goes round in a circle", "has an entry in two places"];
        // As many as there are, all told: nine that are free, and four of two chains, of which two are the free list's first.
        let mut links = in_order.clone();
        (links[9], links[11], links[12]) = (ODD, 12, 0);
        assert_eq!(odd(&links, 1, &[(11, 2), (12, 2)]), Err(two));
        (links[11], links[12]) = (1, 1);
        assert_eq!(odd(&links, 1, &[(11, 2), (12, 2)]), Err(two));
        // A chain that meets itself, and lists that do.
        assert_eq!(odd(&[1, 0], ODD, &[(0, 4)]), Err(two));
        assert_eq!(odd(&[1, 0], 0, &[]), Err(circle));
        assert_eq!(odd(&[ODD + 1], 0, &[]), Err("has a free list that leaves it"));
        assert_eq!(odd(&[ODD + 1], ODD, &[(0, 2)]), Err("has a chain that leaves it"));
        assert_eq!(odd(&[1], ODD, &[(0, 0)]), Err("has a chain without entries"));
    }

    proptest! {
        /// After a crash at any instant, what is executed again is what was taken and not given back, in the order in which it
        /// was taken, and the ring goes on where it was.
        #[test]
        fn a_crash_at_any_instant_loses_and_repeats_nothing(
            steps in prop::collection::vec((0u8..4, 0usize..6, 1u16..5), 1..60),
        ) {
            let mut rig = Rig::new();
            for (step, which, entries) in steps {
                let out: Vec<Taken> =
                    rig.taken.iter().filter(|taken| !rig.batch.contains(taken)).copied().collect();
                match step {
                    0 | 1 if rig.out() + entries <= SIZE => rig.take(entries),
                    2 if !out.is_empty() => {
                        let taken = out[which % out.len()];
                        rig.batch.push(taken);
                        rig.tracker.completed(taken.record);
                    }
                    _ if !rig.batch.is_empty() => rig.publish(),
                    _ => {}
                }
                let taken = rig.taken.clone();
                rig.crash(&taken);
            }
        }
    }
}
