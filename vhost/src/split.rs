//! The device side of a split virtqueue (virtio 2.7).
//!
//! The addresses of the three parts are resolved once ([`RingAreas`]); polling an empty ring is one load. Heads are popped
//! one by one, used elements are stored as they come, and [`SplitRing::publish`] makes a batch of them visible with one
//! store of the index and one decision about notifying.
//!
//! **Trust.** The driver can write all of this at any moment. Indexes are masked, an available index that runs ahead of the
//! ring is a [`RingFault`], and every descriptor is fetched once, so what was checked is what is used. What the device must
//! remember (where it stands) is kept here and never read back.
//!
//! **Notifications.** While the ring is polled the driver is told not to kick. [`SplitRing::arm`] asks for kicks and looks
//! once more behind a sequentially consistent fence, so that a request made available meanwhile is not missed (virtio
//! 2.7.10, 2.7.23). The same fence stands between the used index and the look at whether the driver wants an interrupt.
//! `split/model.rs` runs both in every order; without either fence it finds a deadlock.

use std::sync::atomic::Ordering;

use resilver_sys::Area;
use resilver_sys::area::fence;

use crate::dirty_log::DirtyLog;
use crate::memory::{GuestMemory, MemoryError};
use crate::message::RingAddresses;
use crate::protocol::{RING_SIZE_MAX, descriptor_flags, vring_flags};

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;
/// Available ring: flags, index, then the entries, then `used_event`.
const AVAILABLE_INDEX: usize = 2;
const AVAILABLE_RING: usize = 4;
/// Used ring: flags, index, then elements of 8 bytes, then `avail_event`.
const USED_FLAGS: usize = 0;
const USED_INDEX: usize = 2;
const USED_RING: usize = 4;
const USED_ELEMENT_BYTES: usize = 8;
/// Available flags: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Used flags: the device wants no kicks.
const NO_NOTIFY: u16 = 1;

/// Why a ring cannot be used any further. The device is broken for its driver until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// More entries than the ring has.
    #[error("the available index {index} is more than {size} entries ahead of {next}")]
    IndexJump {
        /// What the driver wrote.
        index: u16,
        /// Where the device stands.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A head that is no descriptor.
    #[error("the available ring names descriptor {head} of a table of {size}")]
    BadHead {
        /// What the driver wrote.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A chain that cannot be followed to an end.
    #[error("the descriptor chain at {head} {what}")]
    BadChain {
        /// Where it begins.
        head: u16,
        /// What is wrong with it.
        what: ChainFault,
    },
}

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// It goes round in a circle, or is longer than its table.
    #[error("is longer than its table: a loop")]
    Loop,
    /// The next descriptor is outside the table.
    #[error("leaves its table")]
    NextOutside,
    /// A read-only buffer behind a writable one (virtio 2.7.4.2).
    #[error("has a device-readable buffer behind a writable one")]
    Order,
    /// A table inside a table, with a successor, of an odd size, or not negotiated (virtio 2.7.5.3).
    #[error("has an invalid indirect table")]
    Indirect,
    /// There is no byte to write the status to.
    #[error("has no room for a status")]
    NoStatus,
}

/// A ring that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum RingSetupError {
    /// Not a power of two, or too long (virtio 2.7).
    #[error("a ring of {0} entries is not a power of two up to {RING_SIZE_MAX}")]
    Size(u32),
    /// Its parts are not in guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// One descriptor, as fetched once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// [`descriptor_flags`].
    pub flags: u16,
    /// The next descriptor, where the flags say there is one.
    pub next: u16,
}

impl Descriptor {
    /// Takes one apart: the descriptor's first and second 8 bytes, each as a little-endian word.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // takes a word apart
    pub fn from_words(first: u64, second: u64) -> Self {
        Self {
            address: first,
            length: second as u32,
            flags: (second >> 32) as u16,
            next: (second >> 48) as u16,
        }
    }

    /// Reads one from its bytes.
    #[inline]
    #[must_use]
    pub fn from_bytes(bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let value = u128::from_le_bytes(*bytes);
        #[allow(clippy::cast_possible_truncation)] // takes the value apart
        Self::from_words(value as u64, (value >> 64) as u64)
    }

    /// Whether a flag is set.
    #[inline]
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether the device writes the buffer.
    #[inline]
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.has(descriptor_flags::WRITE)
    }
}

/// The parts of a ring, resolved.
#[derive(Debug, Clone)]
pub struct RingAreas {
    descriptors: Area,
    available: Area,
    used: Area,
    /// The used ring's guest address, where writes to it are logged.
    log: Option<u64>,
}

impl RingAreas {
    /// Resolves the addresses of a ring of `size` entries.
    ///
    /// # Errors
    /// The size is not a ring's, or a part is not in guest memory or not aligned (virtio 2.7).
    pub fn resolve(
        memory: &GuestMemory,
        size: u16,
        addresses: &RingAddresses,
    ) -> Result<Self, RingSetupError> {
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingSetupError::Size(u32::from(size)));
        }
        let entries = usize::from(size);
        let (table, available, used) = (
            entries * DESCRIPTOR_BYTES,
            AVAILABLE_RING + entries * 2 + 2,
            USED_RING + entries * USED_ELEMENT_BYTES + 2,
        );
        Ok(Self {
            descriptors: memory.area("descriptor table", addresses.descriptors, table, 16)?,
            available: memory.area("available ring", addresses.available, available, 2)?,
            used: memory.area("used ring", addresses.used, used, 4)?,
            log: (addresses.flags & vring_flags::LOG != 0).then_some(addresses.log),
        })
    }
}

/// How the driver wants to be told of used buffers, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventMode {
    /// By flags: all or nothing.
    Flags,
    /// By index (VIRTIO_F_EVENT_IDX).
    Index,
}

/// Whether a driver is to be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// Nothing was published, or the driver does not want it.
    No,
    /// It does.
    Yes,
}

/// The device side of one ring.
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
}

impl SplitRing {
    /// A ring of `size` entries that goes on at available entry `base`. Where the used ring stands is read from it, as the
    /// protocol has it for split rings (vhost-user, "VHOST_USER_SET_VRING_BASE"). Nothing is written to it yet.
    #[must_use]
    pub fn new(areas: RingAreas, size: u16, base: u16, events: EventMode) -> Self {
        let next_used = u16::from_le(areas.used.load_u16(USED_INDEX, Ordering::Acquire));
        Self {
            areas,
            size,
            events,
            next_available: base,
            known_available: base,
            next_used,
            published: next_used,
        }
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
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

    /// The head of the next chain that the driver has made available.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingFault> {
        if self.known_available == self.next_available {
            let index = self.available_index();
            if index == self.next_available {
                return Ok(None);
            }
            let (next, size) = (self.next_available, self.size);
            if index.wrapping_sub(next) > size {
                return Err(RingFault::IndexJump { index, next, size });
            }
            self.known_available = index;
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.areas.available.load_u16(AVAILABLE_RING + slot * 2, Ordering::Relaxed);
        let (head, size) = (u16::from_le(head), self.size);
        if head >= size {
            return Err(RingFault::BadHead { head, size });
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// The available index, as the driver has published it.
    #[inline]
    fn available_index(&self) -> u16 {
        u16::from_le(self.areas.available.load_u16(AVAILABLE_INDEX, Ordering::Acquire))
    }

    /// Fetches one descriptor of the ring's own table; none outside it.
    #[inline]
    #[must_use]
    pub fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let at = usize::from(index) * DESCRIPTOR_BYTES;
        let table = &self.areas.descriptors;
        let first = table.load_u64(at, Ordering::Relaxed);
        let second = table.load_u64(at + 8, Ordering::Relaxed);
        Some(Descriptor::from_words(u64::from_le(first), u64::from_le(second)))
    }

    /// Stores a used element; [`SplitRing::publish`] makes it visible. `written` is what the device wrote, in bytes.
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let (at, used) = (USED_RING + slot * USED_ELEMENT_BYTES, &self.areas.used);
        used.store_u32(at, u32::from(head).to_le(), Ordering::Relaxed);
        used.store_u32(at + 4, written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes all stored elements visible and says whether the driver wants to hear of it (virtio 2.7.7.2).
    #[inline]
    pub fn publish(&mut self, log: Option<&DirtyLog>) -> Notify {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Notify::No;
        }
        self.areas.used.store_u16(USED_INDEX, new.to_le(), Ordering::Release);
        self.published = new;
        self.log_used(log);
        fence(Ordering::SeqCst);
        let available = &self.areas.available;
        let wanted = match self.events {
            EventMode::Flags => {
                u16::from_le(available.load_u16(0, Ordering::Relaxed)) & NO_INTERRUPT == 0
            }
            EventMode::Index => {
                let at = AVAILABLE_RING + usize::from(self.size) * 2;
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
        self.want_kicks(self.next_available.wrapping_sub(1), NO_NOTIFY, log);
    }

    fn want_kicks(&self, event: u16, flags: u16, log: Option<&DirtyLog>) {
        let used = &self.areas.used;
        match self.events {
            EventMode::Flags => used.store_u16(USED_FLAGS, flags.to_le(), Ordering::Relaxed),
            EventMode::Index => {
                let at = USED_RING + usize::from(self.size) * USED_ELEMENT_BYTES;
                used.store_u16(at, event.to_le(), Ordering::Relaxed);
            }
        }
        self.log_used(log);
    }

    /// Logs the used ring, all of it: usually that is one page, and a few batches write to every part of it anyway.
    #[inline]
    fn log_used(&self, log: Option<&DirtyLog>) {
        if let Some((log, address)) = log.zip(self.areas.log) {
            log.mark(address, self.areas.used.len() as u64);
        }
    }
}

/// Whether moving an index from `old` to `new` passes the entry after `event` (virtio 2.7.7, `vring_need_event`).
#[inline]
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(all(test, feature = "model"))]
mod model;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_crossed_exactly_when_it_lies_in_the_step() {
        for old in [0u16, 1, 100, 65530, 65535] {
            for step in 1u16..20 {
                let new = old.wrapping_add(step);
                for ahead in 0u16..40 {
                    let event = old.wrapping_add(ahead);
                    assert_eq!(crosses(event, new, old), ahead < step, "{old} {step} {ahead}");
                }
                assert!(!crosses(old.wrapping_sub(1), new, old));
            }
        }
    }

    #[test]
    fn a_descriptor_is_read_as_virtio_lays_it_out() {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
        bytes[8..12].copy_from_slice(&4096u32.to_le_bytes());
        bytes[12..14].copy_from_slice(&3u16.to_le_bytes());
        bytes[14..].copy_from_slice(&9u16.to_le_bytes());
        let expected =
            Descriptor { address: 0x1122_3344_5566_7788, length: 4096, flags: 3, next: 9 };
        assert_eq!(Descriptor::from_bytes(&bytes), expected);
    }
}
