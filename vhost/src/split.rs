//! The device side of a split virtqueue (virtio 2.7).
//!
//! The addresses of the three parts are resolved once ([`RingAreas`]); polling an empty ring is one load. Heads are popped
//! one by one, used elements are stored as they come, and [`SplitRing::publish`] makes a batch of them visible with one
//! store of the index and one decision about notifying.
//!
//! **Trust.** The driver can write all of this at any moment. Indexes are masked, an available index that runs ahead of the
//! ring is a [`RingFault`], and what is used of a descriptor is the copy that was checked. What the device must
//! remember (where it stands) is kept here and never read back.
//!
//! **Notifications.** While the ring is polled the driver is told not to kick. [`SplitRing::arm`] asks for kicks and looks
//! once more behind a sequentially consistent fence, so that a request made available meanwhile is not missed (virtio
//! 2.7.10, 2.7.23). The same fence stands between the used index and the look at whether the driver wants an interrupt.
//! `ring/model.rs` runs both in every order; without either fence it finds a deadlock.

use std::sync::atomic::Ordering;

use resilver_reactor::Watch;
use resilver_sys::area::fence;

use crate::dirty_log::DirtyLog;
use crate::inflight::SplitInflight;
use crate::ring::{
    DESCRIPTOR_BYTES, Descriptor, Descriptors, EventMode, Format, Notify, RingAreas, RingFault,
    crosses,
};

/// Available ring: flags, index, then the entries, then `used_event` (virtio 2.7.6).
pub(crate) const AVAILABLE_FLAGS: usize = 0;
pub(crate) const AVAILABLE_INDEX: usize = 2;
const AVAILABLE_RING: usize = 4;
/// Used ring: flags, index, then elements of 8 bytes, then `avail_event` (virtio 2.7.8).
pub(crate) const USED_FLAGS: usize = 0;
pub(crate) const USED_INDEX: usize = 2;
const USED_RING: usize = 4;
const USED_ELEMENT_BYTES: usize = 8;
/// Flags of either ring: its writer wants no interrupts, or no kicks.
pub(crate) const NO_NOTIFICATION: u16 = 1;

/// Where the entry for this index is in an available ring of `size` entries, a power of two.
#[inline]
pub(crate) fn available_entry(index: u16, size: u16) -> usize {
    AVAILABLE_RING + usize::from(index & (size - 1)) * 2
}

/// Where `used_event` is in an available ring.
#[inline]
pub(crate) fn used_event(size: u16) -> usize {
    AVAILABLE_RING + usize::from(size) * 2
}

/// Bytes of an available ring.
pub(crate) fn available_bytes(size: u16) -> usize {
    used_event(size) + 2
}

/// Where the element for this index is in a used ring of `size` entries, a power of two: the id, and 4 bytes on how much was
/// written.
#[inline]
pub(crate) fn used_element(index: u16, size: u16) -> usize {
    USED_RING + usize::from(index & (size - 1)) * USED_ELEMENT_BYTES
}

/// Where `avail_event` is in a used ring.
#[inline]
pub(crate) fn available_event(size: u16) -> usize {
    USED_RING + usize::from(size) * USED_ELEMENT_BYTES
}

/// Bytes of a used ring.
pub(crate) fn used_bytes(size: u16) -> usize {
    available_event(size) + 2
}

/// The device side of one split ring.
#[derive(Debug)]
pub struct SplitRing {
    areas: RingAreas,
    size: u16,
    events: EventMode,
    /// The next available entry to take.
    next_available: u16,
    /// The available index as last read.
    known_available: u16,
    /// The next used element to fill.
    next_used: u16,
    /// The used index as last published.
    published: u16,
    tracker: Option<SplitInflight>,
}

impl SplitRing {
    /// A ring of `size` entries that goes on at available entry `base`. Where the used ring stands is read from it, as the
    /// protocol has it for split rings (vhost-user, "VHOST_USER_SET_VRING_BASE"). Nothing is written to it yet.
    #[must_use]
    pub fn new(areas: RingAreas, size: u16, base: u16, events: EventMode) -> Self {
        let next_used = u16::from_le(areas.device.load_u16(USED_INDEX, Ordering::Acquire));
        Self {
            areas,
            size,
            events,
            next_available: base,
            known_available: base,
            next_used,
            published: next_used,
            tracker: None,
        }
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Tracks requests in flight from now on.
    pub(crate) fn track(&mut self, tracker: SplitInflight) {
        self.tracker = Some(tracker);
    }

    /// Where the used ring stands.
    pub(crate) fn used_index(&self) -> u16 {
        self.published
    }

    /// Goes on behind `count` entries that were taken and have not been given back: the in-flight region has those.
    pub(crate) fn resume_behind(&mut self, count: u16) {
        self.next_available = self.next_used.wrapping_add(count);
        self.known_available = self.next_available;
    }

    /// Where the ring stands: what GET_VRING_BASE answers.
    #[must_use]
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Goes on with the same ring at other addresses: the memory table or the addresses have changed.
    pub fn move_to(&mut self, areas: RingAreas, log: Option<&DirtyLog>) {
        self.areas = areas;
        self.disarm(log);
    }

    /// How many chains are available; the index is read again only where none is known.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingFault> {
        if self.known_available == self.next_available {
            let (index, next, size) = (self.available_index(), self.next_available, self.size);
            if index.wrapping_sub(next) > size {
                return Err(RingFault::IndexJump { index, next, size });
            }
            self.known_available = index;
        }
        Ok(self.known_available.wrapping_sub(self.next_available))
    }

    /// The available index, as it was when the ring was empty. Where it was not, a driver that takes its index back would hide what is
    /// known to be there.
    pub(crate) fn watch(&self, watch: &mut Watch) {
        if self.known_available != self.next_available {
            return watch.give_up();
        }
        watch.add(&self.areas.driver, AVAILABLE_INDEX, self.next_available.to_le());
    }

    /// The head of the next chain that the driver has made available.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<u16>, RingFault> {
        if self.available()? == 0 {
            return Ok(None);
        }
        let head = self.head(0);
        self.pop_known(head)?;
        Ok(Some(head))
    }

    /// Pops the next chain, which is available and whose head [`SplitRing::head`] has answered.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline(always)]
    pub(crate) fn pop_known(&mut self, head: u16) -> Result<(), RingFault> {
        debug_assert_ne!(self.known_available, self.next_available, "nothing is available");
        let size = self.size;
        if head >= size {
            return Err(RingFault::BadHead { head, size });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(())
    }

    /// Leaves in the ring what was popped last: it is popped again later.
    pub fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// What the driver wrote into the entry that comes `ahead` of the next one.
    #[inline]
    pub(crate) fn head(&self, ahead: u16) -> u16 {
        let at = available_entry(self.next_available.wrapping_add(ahead), self.size);
        u16::from_le(self.areas.driver.load_u16(at, Ordering::Relaxed))
    }

    /// Has the first descriptor of the chain at `head` prefetched.
    #[inline]
    pub(crate) fn prefetch(&self, head: u16) {
        self.areas.descriptors.prefetch(usize::from(head) * DESCRIPTOR_BYTES);
    }

    /// The request at `head` is about to be executed.
    #[inline]
    pub fn take(&mut self, head: u16) {
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
    }

    /// The available index, as the driver has published it.
    #[inline]
    fn available_index(&self) -> u16 {
        u16::from_le(self.areas.driver.load_u16(AVAILABLE_INDEX, Ordering::Acquire))
    }

    /// The chain at `head`.
    #[inline]
    #[must_use]
    pub fn chain(&self, head: u16) -> SplitChain<'_> {
        SplitChain { ring: self, next: head }
    }

    /// Stores a used element; [`SplitRing::publish`] makes it visible. `written` is what the device wrote, in bytes.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let (at, used) = (used_element(self.next_used, self.size), &self.areas.device);
        used.store_u32(at, u32::from(head).to_le(), Ordering::Relaxed);
        used.store_u32(at + 4, written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(tracker) = &mut self.tracker {
            tracker.completed(head);
        }
    }

    /// Makes all stored elements visible and says whether the driver wants to hear of it (virtio 2.7.7.2).
    #[inline]
    pub fn publish(&mut self, log: Option<&DirtyLog>) -> Notify {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Notify::No;
        }
        self.areas.device.store_u16(USED_INDEX, new.to_le(), Ordering::Release);
        self.published = new;
        if let Some(tracker) = &mut self.tracker {
            tracker.published(new);
        }
        self.areas.log_device(log);
        fence(Ordering::SeqCst);
        let available = &self.areas.driver;
        let wanted = match self.events {
            EventMode::Flags => {
                let flags = u16::from_le(available.load_u16(AVAILABLE_FLAGS, Ordering::Relaxed));
                flags & NO_NOTIFICATION == 0
            }
            EventMode::Index => {
                let at = used_event(self.size);
                let event = u16::from_le(available.load_u16(at, Ordering::Relaxed));
                crosses(event, new, old)
            }
        };
        if wanted { Notify::Yes } else { Notify::No }
    }

    /// Asks for a kick at the next request; false if there is one already, or the driver broke the index.
    #[must_use]
    pub fn arm(&mut self, log: Option<&DirtyLog>) -> bool {
        self.want_kicks(self.next_available, 0, log);
        fence(Ordering::SeqCst);
        self.available_index() == self.next_available
    }

    /// Asks for no kicks. With event indexes that can only be done by naming an entry as far away as possible, so a kick comes
    /// every 65536 requests and costs nothing here.
    pub fn disarm(&mut self, log: Option<&DirtyLog>) {
        self.want_kicks(self.next_available.wrapping_sub(1), NO_NOTIFICATION, log);
    }

    fn want_kicks(&self, event: u16, flags: u16, log: Option<&DirtyLog>) {
        let used = &self.areas.device;
        match self.events {
            EventMode::Flags => used.store_u16(USED_FLAGS, flags.to_le(), Ordering::Relaxed),
            EventMode::Index => {
                used.store_u16(available_event(self.size), event.to_le(), Ordering::Relaxed);
            }
        }
        self.areas.log_device(log);
    }
}

/// A chain of a split ring.
#[derive(Debug)]
pub struct SplitChain<'a> {
    ring: &'a SplitRing,
    next: u16,
}

impl Descriptors for SplitChain<'_> {
    const FORMAT: Format = Format::Split;

    #[inline]
    fn most(&self) -> u16 {
        self.ring.size
    }

    #[inline]
    fn fetch(&mut self) -> Option<Descriptor> {
        if self.next >= self.ring.size {
            return None;
        }
        let (at, table) = (usize::from(self.next) * DESCRIPTOR_BYTES, &self.ring.areas.descriptors);
        let first = u64::from_le(table.load_u64(at, Ordering::Relaxed));
        let second = u64::from_le(table.load_u64(at + 8, Ordering::Relaxed));
        let descriptor = Descriptor::from_words(Format::Split, first, second);
        self.next = descriptor.link;
        Some(descriptor)
    }
}
