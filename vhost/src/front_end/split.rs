//! The driver's part of a split ring: descriptor table, available ring, used ring (virtio 2.7).

use std::sync::atomic::Ordering;

use resilver_sys::area::fence;

use super::FrontEndError;
use super::memory::{Carved, RING_ALIGNMENT, SharedMemory};
use super::queue::RingError;
use super::ring::Base;
use crate::message::RingAddresses;
use crate::ring::{DESCRIPTOR_BYTES, EventMode, crosses};
use crate::split::{
    AVAILABLE_FLAGS, AVAILABLE_INDEX, NO_NOTIFICATION, USED_FLAGS, USED_INDEX, available_bytes,
    available_entry, available_event, used_bytes, used_element, used_event,
};

/// One split ring.
#[derive(Debug)]
pub(super) struct SplitSide {
    pub(super) descriptors: Carved,
    pub(super) available: Carved,
    pub(super) used: Carved,
    size: u16,
    events: EventMode,
    /// The available index: with what is not published yet, and as the device knows it.
    next_available: u16,
    pub(super) published: u16,
    /// The used index: as far as taken, and as last seen.
    next_used: u16,
    seen_used: u16,
}

impl SplitSide {
    /// Bytes of shared memory that a ring takes, alignment included.
    pub(super) fn bytes_needed(size: u16) -> usize {
        let descriptors = usize::from(size) * DESCRIPTOR_BYTES;
        descriptors + available_bytes(size) + used_bytes(size) + 3 * RING_ALIGNMENT
    }

    /// A ring in `memory`.
    pub(super) fn new(
        size: u16,
        events: EventMode,
        memory: &mut SharedMemory,
    ) -> Result<Self, FrontEndError> {
        Ok(Self {
            descriptors: memory.carve(usize::from(size) * DESCRIPTOR_BYTES, RING_ALIGNMENT)?,
            available: memory.carve(available_bytes(size), RING_ALIGNMENT)?,
            used: memory.carve(used_bytes(size), RING_ALIGNMENT)?,
            size,
            events,
            next_available: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
        })
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        RingAddresses {
            flags: 0,
            descriptors: self.descriptors.user_address(),
            used: self.used.user_address(),
            available: self.available.user_address(),
            log: 0,
        }
    }

    pub(super) fn base(&self) -> Base {
        Base::UsedIndex(self.used.area.clone())
    }

    /// Puts a head in the available ring, unpublished.
    pub(super) fn offer(&mut self, head: u16) {
        let at = available_entry(self.next_available, self.size);
        self.available.area.store_u16(at, head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    pub(super) fn has_unpublished(&self) -> bool {
        self.published != self.next_available
    }

    /// Shows the device what was offered; whether it wants to be kicked for that.
    pub(super) fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.next_available);
        if old == self.published {
            return false;
        }
        self.available.area.store_u16(AVAILABLE_INDEX, self.published, Ordering::Release);
        // The store of the index must be seen before the wish for notifications is read, or both sides could sleep.
        fence(Ordering::SeqCst);
        let used = &self.used.area;
        match self.events {
            EventMode::Flags => used.load_u16(USED_FLAGS, Ordering::Relaxed) & NO_NOTIFICATION == 0,
            EventMode::Index => {
                let event = used.load_u16(available_event(self.size), Ordering::Relaxed);
                crosses(event, self.published, old)
            }
        }
    }

    /// What the device says that it has completed next, and how much it wrote.
    pub(super) fn pop(&mut self, in_flight: u16) -> Result<Option<(u32, u32)>, RingError> {
        if self.next_used == self.seen_used {
            self.seen_used = self.used.area.load_u16(USED_INDEX, Ordering::Acquire);
            let claimed = self.seen_used.wrapping_sub(self.next_used);
            if claimed == 0 {
                return Ok(None);
            }
            if claimed > in_flight {
                return Err(RingError::UsedIndex(claimed));
            }
        }
        let at = used_element(self.next_used, self.size);
        let id = self.used.area.load_u32(at, Ordering::Relaxed);
        let written = self.used.area.load_u32(at + 4, Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((id, written)))
    }

    /// Asks for interrupts; false if something has ended already.
    pub(super) fn arm(&mut self) -> bool {
        match self.events {
            EventMode::Flags => {
                self.available.area.store_u16(AVAILABLE_FLAGS, 0, Ordering::Relaxed);
            }
            EventMode::Index => self.set_used_event(self.next_used),
        }
        fence(Ordering::SeqCst);
        self.used.area.load_u16(USED_INDEX, Ordering::Acquire) == self.next_used
    }

    /// Asks for none.
    pub(super) fn disarm(&mut self) {
        match self.events {
            EventMode::Flags => {
                let available = &self.available.area;
                available.store_u16(AVAILABLE_FLAGS, NO_NOTIFICATION, Ordering::Relaxed);
            }
            // An index just passed: it comes round again after 65536 completions, which costs one idle interrupt.
            EventMode::Index => self.set_used_event(self.next_used.wrapping_sub(1)),
        }
    }

    fn set_used_event(&self, index: u16) {
        self.available.area.store_u16(used_event(self.size), index, Ordering::Relaxed);
    }

    /// Makes the ring new and empty; descriptors stay.
    pub(super) fn reset(&mut self) {
        for at in 0..self.used.area.len() / 2 {
            self.used.area.store_u16(2 * at, 0, Ordering::Relaxed);
        }
        self.available.area.store_u16(AVAILABLE_INDEX, 0, Ordering::Relaxed);
        (self.next_available, self.published, self.next_used, self.seen_used) = (0, 0, 0, 0);
    }
}
