//! The device side of a packed virtqueue (virtio 2.8).
//!
//! One ring of descriptors goes both ways. A descriptor is available when its AVAIL flag is the wrap counter of the lap that
//! the device is in and its USED flag is not; the device gives a chain back by writing one descriptor, with both flags equal
//! to its own wrap counter, where the oldest chain that it has not given back began, and goes on behind as many
//! descriptors as that chain had.
//!
//! Chains that are given back are collected and written by [`PackedRing::publish`]: all of a batch first, the flags of its first
//! descriptor last. The driver looks at those first, so one store makes the whole batch visible.
//!
//! **Trust.** As for split rings: the driver can write all of this at any moment, so where the device stands is kept here. A
//! driver that makes descriptors available which were not given back breaks its ring ([`RingFault::Overrun`]).
//!
//! **Notifications.** Each side has an event area that the other reads: enabled, disabled, or from a descriptor on
//! (virtio 2.8.10). The fences are those of the split ring, and `ring/model.rs` runs
//! them in every order too.

use std::sync::atomic::Ordering;

use resilver_reactor::Watch;
use resilver_sys::Area;
use resilver_sys::area::fence;

use crate::dirty_log::DirtyLog;
use crate::inflight::{PackedInflight, RecordedChain};
use crate::protocol::descriptor_flags;
use crate::ring::{
    DESCRIPTOR_BYTES, Descriptor, Descriptors, EventMode, Format, Notify, RingAreas, RingFault,
    RingSetupError, Taken, crosses,
};

/// Bytes of an event area: the offset with its wrap counter, then the flags (virtio 2.8.14).
pub(crate) const EVENT_BYTES: usize = 4;
const EVENT_FLAGS_AT: usize = 2;
/// Event flags.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESCRIPTOR: u16 = 2;
const EVENT_MASK: u16 = 3;
/// Where a descriptor has its length, its id and its flags (virtio 2.8.13).
pub(crate) const LENGTH_AT: usize = 8;
pub(crate) const ID_AT: usize = 12;
pub(crate) const FLAGS_AT: usize = 14;
/// The wrap counter in an event's offset and in a base.
const WRAP: u16 = 1 << 15;

/// A place in the ring, and the wrap counter of the lap that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Position {
    /// Where both sides of a fresh ring begin (virtio 2.8.1).
    pub(crate) const START: Self = Self { index: 0, wrap: true };

    /// As event areas and bases have it.
    pub(crate) fn from_word(word: u16) -> Self {
        Self { index: word & !WRAP, wrap: word & WRAP != 0 }
    }

    pub(crate) fn word(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// The place `by` descriptors on in a ring of `size`; `by` is at most `size`.
    #[inline]
    #[must_use]
    pub(crate) fn ahead(self, by: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(by);
        match index.checked_sub(u32::from(size)) {
            #[allow(clippy::cast_possible_truncation)] // less than `size`
            Some(wrapped) => Self { index: wrapped as u16, wrap: !self.wrap },
            #[allow(clippy::cast_possible_truncation)] // less than `size`
            None => Self { index: index as u16, wrap: self.wrap },
        }
    }

    /// The flags by which the driver says that the descriptor here is available.
    #[inline]
    pub(crate) fn available(self) -> u16 {
        if self.wrap { descriptor_flags::AVAIL } else { descriptor_flags::USED }
    }

    /// The flags by which the device says that the descriptor here is used.
    #[inline]
    pub(crate) fn used(self) -> u16 {
        if self.wrap { descriptor_flags::AVAIL | descriptor_flags::USED } else { 0 }
    }
}

/// Both flags that say whose a descriptor is.
pub(crate) const OWNER: u16 = descriptor_flags::AVAIL | descriptor_flags::USED;

/// An event area: one side says there what it wants to hear, and the other reads it (virtio 2.8.14).
pub(crate) struct EventArea<'a>(pub(crate) &'a Area);

impl EventArea<'_> {
    /// Whether its writer wants to hear of a batch of `entries` descriptors that ends at `after` in a ring of `size`.
    #[inline]
    pub(crate) fn wants(
        &self,
        events: EventMode,
        after: Position,
        entries: u16,
        size: u16,
    ) -> bool {
        match u16::from_le(self.0.load_u16(EVENT_FLAGS_AT, Ordering::Acquire)) & EVENT_MASK {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if events == EventMode::Index => {
                let event =
                    Position::from_word(u16::from_le(self.0.load_u16(0, Ordering::Relaxed)));
                // In the arithmetic of this lap: an event of another lap lies a ring's length before.
                let lap = if event.wrap == after.wrap { 0 } else { size };
                let new = after.index;
                crosses(event.index.wrapping_sub(lap), new, new.wrapping_sub(entries))
            }
            _ => true,
        }
    }

    /// Asks to hear of what comes at `next`.
    pub(crate) fn ask(&self, events: EventMode, next: Position) {
        let flags = match events {
            EventMode::Flags => EVENT_ENABLE,
            EventMode::Index => {
                self.0.store_u16(0, next.word().to_le(), Ordering::Relaxed);
                EVENT_DESCRIPTOR
            }
        };
        self.0.store_u16(EVENT_FLAGS_AT, flags.to_le(), Ordering::Release);
    }

    /// Asks to hear of nothing.
    pub(crate) fn ask_nothing(&self) {
        self.0.store_u16(EVENT_FLAGS_AT, EVENT_DISABLE.to_le(), Ordering::Release);
    }
}

/// A chain in the batch.
#[derive(Debug, Clone, Copy)]
struct Used {
    id: u16,
    entries: u16,
    written: u32,
}

/// The device side of one packed ring.
#[derive(Debug)]
pub struct PackedRing {
    areas: RingAreas,
    size: u16,
    events: EventMode,
    /// The next descriptor to take.
    next_available: Position,
    /// Where the next used descriptor goes, as published.
    next_used: Position,
    /// Descriptors taken and not published as used.
    outstanding: u16,
    /// The batch: room made once.
    batch: Vec<Used>,
    tracker: Option<PackedInflight>,
}

impl PackedRing {
    /// A ring of `size` entries that goes on at `base`: the available position in the low half, the used one in the high.
    ///
    /// # Errors
    /// A position that is not in the ring.
    #[allow(clippy::cast_possible_truncation)] // takes a word apart
    pub fn new(
        areas: RingAreas,
        size: u16,
        base: u32,
        events: EventMode,
    ) -> Result<Self, RingSetupError> {
        let (available, used) = (base as u16, (base >> 16) as u16);
        let (next_available, next_used) =
            (Position::from_word(available), Position::from_word(used));
        for Position { index, .. } in [next_available, next_used] {
            if index >= size {
                return Err(RingSetupError::Position { index, size });
            }
        }
        Ok(Self {
            areas,
            size,
            events,
            next_available,
            next_used,
            outstanding: 0,
            batch: Vec::with_capacity(usize::from(size)),
            tracker: None,
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the ring stands, both ways.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_available.word()) | u32::from(self.next_used.word()) << 16
    }

    /// Where the next used descriptor goes, as published.
    pub(crate) fn used_position(&self) -> Position {
        self.next_used
    }

    /// Tracks requests in flight from now on.
    pub(crate) fn track(&mut self, tracker: PackedInflight) {
        self.tracker = Some(tracker);
    }

    /// Goes on at `used`, behind `outstanding` descriptors that were taken and have not been given back.
    pub(crate) fn resume_at(&mut self, used: Position, outstanding: u16) {
        self.next_used = used;
        self.next_available = used.ahead(outstanding, self.size);
        self.outstanding = outstanding;
    }

    /// Goes on with the same ring at other addresses.
    pub fn move_to(&mut self, areas: RingAreas, log: Option<&DirtyLog>) {
        self.areas = areas;
        self.disarm(log);
    }

    /// Whether the driver has made a chain available.
    #[inline]
    #[must_use]
    pub fn has_next(&self) -> bool {
        self.is_available(self.flags(self.next_available.index))
    }

    /// Whether these are the flags of the next descriptor when it is available.
    #[inline]
    fn is_available(&self, flags: u16) -> bool {
        flags & OWNER == self.next_available.available()
    }

    /// The flags of the next descriptor, if that is not available.
    pub(crate) fn watch(&self, watch: &mut Watch) {
        let flags = self.flags(self.next_available.index);
        if self.is_available(flags) {
            return watch.give_up();
        }
        let at = usize::from(self.next_available.index) * DESCRIPTOR_BYTES + FLAGS_AT;
        watch.add(&self.areas.descriptors, at, flags.to_le());
    }

    /// The flags of a descriptor, and with them what the driver wrote before it wrote them.
    #[inline]
    pub(crate) fn flags(&self, index: u16) -> u16 {
        let at = usize::from(index) * DESCRIPTOR_BYTES + FLAGS_AT;
        u16::from_le(self.areas.descriptors.load_u16(at, Ordering::Acquire))
    }

    /// Makes a descriptor look as it did before it was used, but for its contents: what a back end that was killed had begun to
    /// give back. See the in-flight region.
    pub(crate) fn take_back(&self, at: Position) {
        let flags = (self.flags(at.index) & !OWNER) | at.available();
        let offset = usize::from(at.index) * DESCRIPTOR_BYTES + FLAGS_AT;
        self.areas.descriptors.store_u16(offset, flags.to_le(), Ordering::Release);
    }

    /// Where the next chain begins.
    #[must_use]
    pub fn next_index(&self) -> u16 {
        self.next_available.index
    }

    /// The chain that is next.
    #[inline]
    #[must_use]
    pub fn chain(&self) -> PackedChain<'_> {
        PackedChain { areas: &self.areas, size: self.size, index: self.next_available.index }
    }

    /// The chain of a request that an earlier session had taken, as it was then; none where requests are not tracked.
    pub(crate) fn recorded(&self, taken: Taken) -> Option<RecordedChain<'_>> {
        self.tracker.as_ref().map(|tracker| tracker.chain(taken))
    }

    /// Takes the next chain, which has so many descriptors and is about to be executed; answers where it is recorded.
    ///
    /// # Errors
    /// It has descriptors that were not given back.
    #[inline]
    pub fn take(&mut self, entries: u16) -> Result<u16, RingFault> {
        let outstanding = self.outstanding.saturating_add(entries);
        if outstanding > self.size {
            let (at, size) = (self.next_available.index, self.size);
            return Err(RingFault::Overrun { at, entries, size });
        }
        let (areas, index) = (&self.areas, self.next_available.index);
        let chain = PackedChain { areas, size: self.size, index };
        let record = self.tracker.as_mut().map_or(0, |tracker| tracker.taken(chain, entries));
        self.outstanding = outstanding;
        self.next_available = self.next_available.ahead(entries, self.size);
        Ok(record)
    }

    /// Puts a chain into the batch.
    #[inline]
    pub fn push_used(&mut self, taken: Taken, written: u32) {
        // There are never more chains out than descriptors, and never more descriptors than the ring has.
        if self.batch.len() < self.batch.capacity() {
            self.batch.push(Used { id: taken.id, entries: taken.entries, written });
            if let Some(tracker) = &mut self.tracker {
                tracker.completed(taken.record);
            }
        }
    }

    /// Makes the batch visible and says whether the driver wants to hear of it (virtio 2.8.6, 2.8.21).
    #[inline]
    pub fn publish(&mut self, log: Option<&DirtyLog>) -> Notify {
        if self.batch.is_empty() {
            return Notify::No;
        }
        let entries = self.batch.iter().map(|used| used.entries).sum();
        let after = self.next_used.ahead(entries, self.size);
        if let Some(tracker) = &mut self.tracker {
            tracker.publishing(after);
        }
        let (first, ring) = (self.next_used, &self.areas.descriptors);
        let mut at = first;
        for used in self.batch.drain(..) {
            let offset = usize::from(at.index) * DESCRIPTOR_BYTES;
            ring.store_u32(offset + LENGTH_AT, used.written.to_le(), Ordering::Relaxed);
            ring.store_u16(offset + ID_AT, used.id.to_le(), Ordering::Relaxed);
            if at != first {
                // Something was always written: the status.
                let flags = at.used() | descriptor_flags::WRITE;
                ring.store_u16(offset + FLAGS_AT, flags.to_le(), Ordering::Relaxed);
            }
            self.areas.log_descriptors(log, offset, DESCRIPTOR_BYTES);
            at = at.ahead(used.entries, self.size);
        }
        let offset = usize::from(first.index) * DESCRIPTOR_BYTES;
        let flags = first.used() | descriptor_flags::WRITE;
        ring.store_u16(offset + FLAGS_AT, flags.to_le(), Ordering::Release);
        self.areas.log_descriptors(log, offset, DESCRIPTOR_BYTES);
        if let Some(tracker) = &mut self.tracker {
            tracker.published(after);
        }
        self.next_used = after;
        self.outstanding = self.outstanding.saturating_sub(entries);
        fence(Ordering::SeqCst);
        let wants = EventArea(&self.areas.driver).wants(self.events, after, entries, self.size);
        if wants { Notify::Yes } else { Notify::No }
    }

    /// Asks for a kick at the next request; false if there is one already.
    #[must_use]
    pub fn arm(&mut self, log: Option<&DirtyLog>) -> bool {
        EventArea(&self.areas.device).ask(self.events, self.next_available);
        self.areas.log_device(log);
        fence(Ordering::SeqCst);
        !self.has_next()
    }

    /// Asks for no kicks.
    pub fn disarm(&mut self, log: Option<&DirtyLog>) {
        EventArea(&self.areas.device).ask_nothing();
        self.areas.log_device(log);
    }
}

/// A chain of a packed ring.
#[derive(Debug)]
pub struct PackedChain<'a> {
    areas: &'a RingAreas,
    size: u16,
    index: u16,
}

impl Descriptors for PackedChain<'_> {
    const FORMAT: Format = Format::Packed;

    #[inline]
    fn most(&self) -> u16 {
        self.size
    }

    #[inline]
    fn fetch(&mut self) -> Option<Descriptor> {
        let (at, ring) = (usize::from(self.index) * DESCRIPTOR_BYTES, &self.areas.descriptors);
        let first = u64::from_le(ring.load_u64(at, Ordering::Relaxed));
        let second = u64::from_le(ring.load_u64(at + 8, Ordering::Relaxed));
        self.index += 1;
        if self.index == self.size {
            self.index = 0;
        }
        Some(Descriptor::from_words(Format::Packed, first, second))
    }
}
