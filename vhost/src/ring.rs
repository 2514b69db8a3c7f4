//! What split and packed rings share: their parts in memory, descriptors, faults, and the one interface to either.
//!
//! [`Ring`] is an enum and not a trait object: which of the two it is was negotiated before the ring started, and each turn
//! asks it once for a batch, not once for a byte. [`crate::split`] and [`crate::packed`] are the two.
//!
//! **Life of a request**, in ring terms: *taken* (its descriptors were read; [`Taken`] is what must be remembered of them),
//! *pushed* (it goes into the batch that is given back next) and *published* (the driver sees the batch).

use resilver_reactor::Watch;
use resilver_sys::Area;

use crate::dirty_log::DirtyLog;
use crate::memory::{GuestMemory, MemoryError};
use crate::message::RingAddresses;
use crate::packed::PackedRing;
use crate::postcopy::pages::Wanted;
use crate::protocol::{RING_SIZE_MAX, descriptor_flags, vring_flags};
use crate::split::SplitRing;

/// Bytes of a descriptor, in either format.
pub const DESCRIPTOR_BYTES: usize = 16;

/// How a ring is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A descriptor table, an available ring and a used ring (virtio 2.7).
    Split,
    /// One ring of descriptors, which goes both ways (virtio 2.8, VIRTIO_F_RING_PACKED).
    Packed,
}

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
    /// Descriptors that the device has not given back are made available again.
    #[error(
        "the chain of {entries} descriptors at {at} runs into those that are still in use: the ring has {size}"
    )]
    Overrun {
        /// Where the chain begins.
        at: u16,
        /// Its descriptors.
        entries: u16,
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
    /// A table inside a table, with a successor, of an odd size, or not negotiated (virtio 2.7.5.3, 2.8.8).
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
    #[error("a split ring of {0} entries is not a power of two up to {RING_SIZE_MAX}")]
    SplitSize(u32),
    /// No entries, or too many (virtio 2.8.10.1).
    #[error("a packed ring of {0} entries does not have 1 to {RING_SIZE_MAX}")]
    PackedSize(u32),
    /// It is to go on at an entry that it does not have.
    #[error("a packed ring of {size} entries cannot go on at entry {index}")]
    Position {
        /// The entry.
        index: u16,
        /// Entries of the ring.
        size: u16,
    },
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
    /// In a split ring the next descriptor, where the flags say there is one; in a packed one the buffer's id.
    pub link: u16,
}

impl Descriptor {
    /// Takes one apart: the descriptor's first and second 8 bytes, each as a little-endian word.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // takes a word apart
    pub fn from_words(format: Format, first: u64, second: u64) -> Self {
        let (low, high) = ((second >> 32) as u16, (second >> 48) as u16);
        let (flags, link) = match format {
            Format::Split => (low, high),
            Format::Packed => (high, low),
        };
        Self { address: first, length: second as u32, flags, link }
    }

    /// Puts one together: its first and second 8 bytes, each as a little-endian word.
    #[inline]
    #[must_use]
    pub fn to_words(self, format: Format) -> (u64, u64) {
        let (low, high) = match format {
            Format::Split => (self.flags, self.link),
            Format::Packed => (self.link, self.flags),
        };
        let second = u64::from(self.length) | u64::from(low) << 32 | u64::from(high) << 48;
        (self.address, second)
    }

    /// Reads one from its bytes.
    #[inline]
    #[must_use]
    pub fn from_bytes(format: Format, bytes: &[u8; DESCRIPTOR_BYTES]) -> Self {
        let value = u128::from_le_bytes(*bytes);
        #[allow(clippy::cast_possible_truncation)] // takes the value apart
        Self::from_words(format, value as u64, (value >> 64) as u64)
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

/// The descriptors of one chain outside of any indirect table, one after the other.
pub trait Descriptors {
    /// How they are laid out, and those of an indirect table too.
    const FORMAT: Format;

    /// The most descriptors that a chain can have.
    fn most(&self) -> u16;

    /// Fetches the next one: in a split ring the one that the one before names, in a packed ring the one behind it. None outside
    /// the ring.
    fn fetch(&mut self) -> Option<Descriptor>;
}

/// What must be remembered of a request to give it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// What the driver knows it by: the head of its chain, or the buffer's id.
    pub id: u16,
    /// Descriptors of the ring that it takes; of interest for a packed ring.
    pub entries: u16,
    /// Where the in-flight region has it.
    pub record: u16,
}

/// The parts of a ring, resolved.
#[derive(Debug, Clone)]
pub struct RingAreas {
    /// Descriptor table, or descriptor ring.
    pub(crate) descriptors: Area,
    /// What the driver writes: the available ring, or the driver's event suppression.
    pub(crate) driver: Area,
    /// What the device writes: the used ring, or the device's event suppression.
    pub(crate) device: Area,
    /// Where writes are logged, where they are.
    pub(crate) log: Option<LogAddresses>,
}

/// One part of a ring, as it was described.
struct Part {
    name: &'static str,
    /// In the front end's addresses.
    address: u64,
    length: usize,
    alignment: usize,
}

/// Guest addresses of what a device writes of a ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogAddresses {
    /// Of the used ring, or of the device's event suppression: what SET_VRING_ADDR says.
    device: u64,
    /// Of the descriptor ring, which the device writes only in the packed format. The message has no field for it.
    descriptors: Option<u64>,
}

impl RingAreas {
    /// Resolves the addresses of a ring of `size` entries.
    ///
    /// # Errors
    /// The size is not a ring's, or a part is not in guest memory or not aligned (virtio 2.7, 2.8).
    pub fn resolve(
        memory: &GuestMemory,
        format: Format,
        size: u16,
        addresses: &RingAddresses,
    ) -> Result<Self, RingSetupError> {
        let [table, driver, device] = Self::parts(format, size, addresses)?;
        let logged = addresses.flags & vring_flags::LOG != 0;
        let log = logged.then(|| LogAddresses {
            device: addresses.log,
            descriptors: memory.guest_address_of(addresses.descriptors),
        });
        let area = |part: Part| memory.area(part.name, part.address, part.length, part.alignment);
        Ok(Self { descriptors: area(table)?, driver: area(driver)?, device: area(device)?, log })
    }

    /// Missing pages of a ring of `size` entries, while guest memory is on its way.
    ///
    /// # Errors
    /// The size is not a ring's.
    pub fn wanted(
        memory: &GuestMemory,
        format: Format,
        size: u16,
        addresses: &RingAddresses,
    ) -> Result<Vec<Wanted>, RingSetupError> {
        let parts = Self::parts(format, size, addresses)?;
        let wanted = |part: &Part| memory.wanted_at(part.address, part.length);
        Ok(parts.iter().filter_map(wanted).collect())
    }

    /// Descriptors, what the driver writes, and what the device writes (virtio 2.7, 2.8).
    fn parts(
        format: Format,
        size: u16,
        addresses: &RingAddresses,
    ) -> Result<[Part; 3], RingSetupError> {
        let (driver, device) = match format {
            Format::Split if !size.is_power_of_two() || size > RING_SIZE_MAX => {
                return Err(RingSetupError::SplitSize(u32::from(size)));
            }
            Format::Packed if size == 0 || size > RING_SIZE_MAX => {
                return Err(RingSetupError::PackedSize(u32::from(size)));
            }
            Format::Split => {
                let available = crate::split::available_bytes(size);
                let used = crate::split::used_bytes(size);
                (("available ring", available, 2), ("used ring", used, 4))
            }
            Format::Packed => {
                let bytes = crate::packed::EVENT_BYTES;
                (("driver's event area", bytes, 4), ("device's event area", bytes, 4))
            }
        };
        let table = ("descriptor table", usize::from(size) * DESCRIPTOR_BYTES, 16);
        let part = |address, (name, length, alignment)| Part { name, address, length, alignment };
        Ok([
            part(addresses.descriptors, table),
            part(addresses.available, driver),
            part(addresses.used, device),
        ])
    }

    /// Logs the device's own part, all of it: usually that is one page, and a few batches write to every part of it anyway.
    #[inline]
    pub(crate) fn log_device(&self, log: Option<&DirtyLog>) {
        if let Some((log, at)) = log.zip(self.log) {
            log.mark(at.device, self.device.len() as u64);
        }
    }

    /// Logs `length` bytes at byte `offset` of the descriptors.
    #[inline]
    pub(crate) fn log_descriptors(&self, log: Option<&DirtyLog>, offset: usize, length: usize) {
        if let Some((log, at)) = log.zip(self.log)
            && let Some(address) = at.descriptors
        {
            log.mark(address.saturating_add(offset as u64), length as u64);
        }
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

/// Whether moving an index from `old` to `new` passes the entry after `event` (virtio 2.7.7, `vring_need_event`).
#[inline]
pub(crate) fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The device side of one ring.
#[derive(Debug)]
pub enum Ring {
    /// A split one.
    Split(SplitRing),
    /// A packed one.
    Packed(PackedRing),
}

impl Ring {
    /// A ring of `size` entries that goes on at `base` (vhost-user, "Vring descriptor index/indices"). Nothing is written to it
    /// yet.
    ///
    /// # Errors
    /// The base is not in the ring.
    pub fn new(
        format: Format,
        areas: RingAreas,
        size: u16,
        base: u32,
        events: EventMode,
    ) -> Result<Self, RingSetupError> {
        Ok(match format {
            #[allow(clippy::cast_possible_truncation)] // an index of 16 bits
            Format::Split => Self::Split(SplitRing::new(areas, size, base as u16, events)),
            Format::Packed => Self::Packed(PackedRing::new(areas, size, base, events)?),
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.size(),
            Self::Packed(ring) => ring.size(),
        }
    }

    /// Where the ring stands: what GET_VRING_BASE answers.
    #[must_use]
    pub fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => u32::from(ring.next_available()),
            Self::Packed(ring) => ring.base(),
        }
    }

    /// Goes on with the same ring at other addresses: the memory table or the addresses have changed.
    pub fn move_to(&mut self, areas: RingAreas, log: Option<&DirtyLog>) {
        match self {
            Self::Split(ring) => ring.move_to(areas, log),
            Self::Packed(ring) => ring.move_to(areas, log),
        }
    }

    /// Puts a request into the batch that is given back next. `written` is what the device wrote, in bytes.
    #[inline]
    pub fn push_used(&mut self, taken: Taken, written: u32) {
        match self {
            Self::Split(ring) => ring.push_used(taken.id, written),
            Self::Packed(ring) => ring.push_used(taken, written),
        }
    }

    /// Makes the batch visible and says whether the driver wants to hear of it.
    #[inline]
    pub fn publish(&mut self, log: Option<&DirtyLog>) -> Notify {
        match self {
            Self::Split(ring) => ring.publish(log),
            Self::Packed(ring) => ring.publish(log),
        }
    }

    /// What the driver changes when it makes a chain available, if there is none.
    pub fn watch(&self, watch: &mut Watch) {
        match self {
            Self::Split(ring) => ring.watch(watch),
            Self::Packed(ring) => ring.watch(watch),
        }
    }

    /// Asks for a kick at the next request; false if there is one already, or the driver broke the ring.
    #[must_use]
    pub fn arm(&mut self, log: Option<&DirtyLog>) -> bool {
        match self {
            Self::Split(ring) => ring.arm(log),
            Self::Packed(ring) => ring.arm(log),
        }
    }

    /// Asks for no kicks.
    pub fn disarm(&mut self, log: Option<&DirtyLog>) {
        match self {
            Self::Split(ring) => ring.disarm(log),
            Self::Packed(ring) => ring.disarm(log),
        }
    }
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
        let address = 0x1122_3344_5566_7788;
        let split = Descriptor { address, length: 4096, flags: 3, link: 9 };
        let packed = Descriptor { flags: 9, link: 3, ..split };
        for (format, descriptor) in [(Format::Split, split), (Format::Packed, packed)] {
            assert_eq!(Descriptor::from_bytes(format, &bytes), descriptor);
            let (first, second) = descriptor.to_words(format);
            assert_eq!([first.to_le_bytes(), second.to_le_bytes()].concat(), bytes);
        }
    }
}
