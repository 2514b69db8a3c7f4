//! The driver's side of a virtqueue, split or packed, that carries virtio-blk requests (virtio 1.2 §2.7, §2.8, §5.2.6).
//!
//! Written for the simulator and nobody else, so that the device side is met by a driver that shares no code with it. It cuts
//! requests into descriptors as the seed says, headers too, with or without an indirect table: a device must not
//! assume any framing (§2.7.4).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use resilver_bdev::{BdevIo, Completion, IoError, IoKind, Tag};
use resilver_sys::mapping::Mapping;
use resilver_sys::{Area, BufferSlice};
use resilver_vhost::ring::Format;

use super::rng::Rng;
use super::sector::SECTOR;

/// Where the guest sees the first byte of its memory.
pub const GUEST_BASE: u64 = 0x1000_0000;
/// Entries of the ring.
pub const ENTRIES: u16 = 256;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// Bytes of the descriptor table.
const TABLE: usize = ENTRIES as usize * DESCRIPTOR;
/// Where the available ring lies, after the descriptors.
const AVAILABLE: usize = TABLE;
/// Where the used ring lies.
const USED: usize = AVAILABLE + 4096;
/// Where the requests' headers lie, one envelope to a slot.
const ENVELOPES: usize = USED + 4096;
/// Bytes of an envelope: header at 0, range at 16, status at 32, indirect table at 64.
const ENVELOPE: usize = 512;
const RANGE_AT: usize = 16;
const STATUS_AT: usize = 32;
const INDIRECT_AT: usize = 64;
/// Most requests at once.
pub const SLOTS: usize = 32;
/// Bytes of guest memory that a ring takes.
pub const RING_BYTES: usize = ENVELOPES + SLOTS * ENVELOPE;

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const INDIRECT: u16 = 4;
/// Packed: the driver's mark and the device's.
const AVAIL: u16 = 1 << 7;
const USED_FLAG: u16 = 1 << 15;
const NO_STATUS: u8 = 0xff;

/// One descriptor, before it is written.
#[derive(Debug, Clone, Copy)]
struct Piece {
    address: u64,
    length: u32,
    flags: u16,
}

/// A ring and what is in it.
#[derive(Debug)]
pub struct DriverRing {
    area: Area,
    /// Where in the guest's memory the ring lies, bytes.
    at: u64,
    /// Per slot, the descriptors of its request.
    chains: Vec<Vec<u16>>,
    free: Vec<u16>,
    place: Place,
}

/// Where the driver stands.
#[derive(Debug)]
enum Place {
    /// The indexes that it writes and reads next.
    Split { next_available: u16, next_used: u16 },
    /// Descriptors that it writes and reads next, each with the wrap counter of its lap.
    Packed { next_available: (u16, bool), next_used: (u16, bool) },
}

/// The place `by` descriptors on.
fn ahead((index, wrap): (u16, bool), by: usize) -> (u16, bool) {
    let index = usize::from(index) + by;
    if index < usize::from(ENTRIES) {
        (index as u16, wrap)
    } else {
        ((index - usize::from(ENTRIES)) as u16, !wrap)
    }
}

impl DriverRing {
    /// An empty ring at byte `at` of the guest's memory, all of whose bytes there are reset.
    ///
    /// # Panics
    /// The memory is too small.
    #[must_use]
    pub fn new(mapping: &Arc<Mapping>, at: u64, format: Format) -> Self {
        let area = Area::new(mapping, at, RING_BYTES, 4096).expect("room for a ring");
        for word in (0..RING_BYTES).step_by(8) {
            area.store_u64(word, 0, Ordering::Relaxed);
        }
        Self {
            area,
            at,
            free: (0..ENTRIES).rev().collect(),
            chains: vec![Vec::new(); SLOTS],
            place: match format {
                Format::Split => Place::Split { next_available: 0, next_used: 0 },
                Format::Packed => Place::Packed { next_available: (0, true), next_used: (0, true) },
            },
        }
    }

    /// Guest addresses of descriptors, available and used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [0, AVAILABLE, USED].map(|part| GUEST_BASE + self.at + part as u64)
    }

    /// Whether another request certainly fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.free.len() >= 16
    }

    /// Puts a request into the ring.
    pub fn submit(&mut self, slot: usize, io: &BdevIo, slices: &[BufferSlice], rng: &mut Rng) {
        let mut pieces = self.envelope(slot, io, rng);
        let direction = if io.kind == IoKind::Read { DEVICE_WRITES } else { 0 };
        pieces.extend(slices.iter().map(|slice| Piece {
            address: GUEST_BASE + slice.offset,
            length: slice.length,
            flags: direction,
        }));
        let status = self.address(slot, STATUS_AT);
        pieces.push(Piece { address: status, length: 1, flags: DEVICE_WRITES });

        let indirect = rng.chance(500) && pieces.len() <= (ENVELOPE - INDIRECT_AT) / DESCRIPTOR;
        if indirect {
            let table = ENVELOPES + slot * ENVELOPE + INDIRECT_AT;
            let last = pieces.len() - 1;
            for (index, piece) in pieces.iter().enumerate() {
                let next = (index < last).then_some(index as u16 + 1);
                self.write_descriptor(table + index * DESCRIPTOR, *piece, next);
            }
            let length = (pieces.len() * DESCRIPTOR) as u32;
            let address = self.address(slot, INDIRECT_AT);
            pieces = vec![Piece { address, length, flags: INDIRECT }];
        }
        let split = self.free.len() - pieces.len();
        self.chains[slot] = self.free.split_off(split);
        match self.place {
            Place::Split { next_available, .. } => self.offer(slot, &pieces, next_available),
            Place::Packed { next_available, .. } => {
                self.offer_packed(slot, &pieces, next_available)
            }
        }
    }

    /// Links pieces into a chain of the descriptors of `slot` and makes its head available.
    fn offer(&mut self, slot: usize, pieces: &[Piece], index: u16) {
        for (place, piece) in pieces.iter().enumerate() {
            let chain = &self.chains[slot];
            let next = chain.get(place + 1).copied();
            self.write_descriptor(usize::from(chain[place]) * DESCRIPTOR, *piece, next);
        }
        let entry = AVAILABLE + 4 + 2 * usize::from(index % ENTRIES);
        self.area.store_u16(entry, self.chains[slot][0], Ordering::Relaxed);
        let index = index.wrapping_add(1);
        self.area.store_u16(AVAILABLE + 2, index, Ordering::Release);
        if let Place::Split { next_available, .. } = &mut self.place {
            *next_available = index;
        }
    }

    /// Writes pieces one behind the other, under the slot as the buffer's id; the flags of the first last.
    fn offer_packed(&mut self, slot: usize, pieces: &[Piece], first: (u16, bool)) {
        for (place, piece) in pieces.iter().enumerate().rev() {
            let (index, wrap) = ahead(first, place);
            let at = usize::from(index) * DESCRIPTOR;
            let more = if place + 1 < pieces.len() { NEXT } else { 0 };
            let flags = piece.flags | more | if wrap { AVAIL } else { USED_FLAG };
            self.area.store_u64(at, piece.address, Ordering::Relaxed);
            self.area.store_u32(at + 8, piece.length, Ordering::Relaxed);
            self.area.store_u16(at + 12, slot as u16, Ordering::Relaxed);
            self.area.store_u16(at + 14, flags, Ordering::Release);
        }
        if let Place::Packed { next_available, .. } = &mut self.place {
            *next_available = ahead(first, pieces.len());
        }
    }

    /// Takes one request that the device has finished; its tag is its slot. Nothing while there is none.
    ///
    /// # Errors
    /// What the device did wrong.
    pub fn pop(&mut self) -> Result<Option<Completion>, String> {
        let slot = match self.place {
            Place::Split { next_used, .. } => self.next_split(next_used)?,
            Place::Packed { next_used, .. } => self.next_packed(next_used)?,
        };
        let Some(slot) = slot else { return Ok(None) };
        let chain = std::mem::take(&mut self.chains[slot]);
        match &mut self.place {
            Place::Split { next_used, .. } => *next_used = next_used.wrapping_add(1),
            Place::Packed { next_used, .. } => *next_used = ahead(*next_used, chain.len()),
        }
        self.free.extend(chain);
        let status = ENVELOPES + slot * ENVELOPE + STATUS_AT;
        let result = match self.area.load_u8(status, Ordering::Relaxed) {
            0 => Ok(()),
            1 => Err(IoError::IO),
            2 => Err(IoError::NOT_SUPPORTED),
            status => return Err(format!("slot {slot} came back with status {status:#x}")),
        };
        Ok(Some(Completion { tag: Tag(slot as u32), result }))
    }

    /// The slot of the next used element.
    fn next_split(&self, next_used: u16) -> Result<Option<usize>, String> {
        if self.area.load_u16(USED + 2, Ordering::Acquire) == next_used {
            return Ok(None);
        }
        let entry = USED + 4 + 8 * usize::from(next_used % ENTRIES);
        let head = self.area.load_u32(entry, Ordering::Relaxed);
        let of_head =
            |chain: &Vec<u16>| chain.first().is_some_and(|first| u32::from(*first) == head);
        match self.chains.iter().position(of_head) {
            Some(slot) => Ok(Some(slot)),
            None => Err(format!("the device returned descriptor {head}, which it does not have")),
        }
    }

    /// The slot of the next used descriptor.
    fn next_packed(&self, (index, wrap): (u16, bool)) -> Result<Option<usize>, String> {
        let at = usize::from(index) * DESCRIPTOR;
        let flags = self.area.load_u16(at + 14, Ordering::Acquire);
        if (flags & AVAIL != 0, flags & USED_FLAG != 0) != (wrap, wrap) {
            return Ok(None);
        }
        let id = usize::from(self.area.load_u16(at + 12, Ordering::Relaxed));
        match self.chains.get(id).is_some_and(|chain| !chain.is_empty()) {
            true => Ok(Some(id)),
            false => Err(format!("the device returned buffer {id}, which it does not have")),
        }
    }

    /// Writes header, range and status of a request; gives the pieces that come before its data.
    fn envelope(&self, slot: usize, io: &BdevIo, rng: &mut Rng) -> Vec<Piece> {
        let base = ENVELOPES + slot * ENVELOPE;
        let request_type: u32 = match io.kind {
            IoKind::Read => 0,
            IoKind::Write => 1,
            IoKind::Flush => 4,
            IoKind::Unmap => 11,
            IoKind::WriteZeroes => 13,
        };
        let first = io.offset / SECTOR as u64;
        let ranged = matches!(io.kind, IoKind::Unmap | IoKind::WriteZeroes);
        self.area.store_u32(base, request_type, Ordering::Relaxed);
        self.area.store_u32(base + 4, 0, Ordering::Relaxed);
        self.area.store_u64(base + 8, if ranged { 0 } else { first }, Ordering::Relaxed);
        self.area.store_u8(base + STATUS_AT, NO_STATUS, Ordering::Relaxed);
        let header = self.address(slot, 0);
        let cut = rng.pick(&[16, 16, 1, 8, 15]);
        let mut pieces = vec![Piece { address: header, length: cut, flags: 0 }];
        if cut < 16 {
            pieces.push(Piece { address: header + u64::from(cut), length: 16 - cut, flags: 0 });
        }
        if ranged {
            let count = (io.length / SECTOR as u64) as u32;
            self.area.store_u64(base + RANGE_AT, first, Ordering::Relaxed);
            self.area.store_u32(base + RANGE_AT + 8, count, Ordering::Relaxed);
            self.area.store_u32(base + RANGE_AT + 12, u32::from(io.may_unmap), Ordering::Relaxed);
            let address = self.address(slot, RANGE_AT);
            pieces.push(Piece { address, length: 16, flags: 0 });
        }
        pieces
    }

    /// The guest address of a byte of a slot's envelope.
    fn address(&self, slot: usize, byte: usize) -> u64 {
        GUEST_BASE + self.at + (ENVELOPES + slot * ENVELOPE + byte) as u64
    }

    fn write_descriptor(&self, at: usize, piece: Piece, next: Option<u16>) {
        // In the packed format the last two fields are the other way round, and the link is an id that nobody reads.
        let (flags_at, link_at) = match self.place {
            Place::Split { .. } => (at + 12, at + 14),
            Place::Packed { .. } => (at + 14, at + 12),
        };
        let flags = piece.flags | if next.is_some() { NEXT } else { 0 };
        self.area.store_u64(at, piece.address, Ordering::Relaxed);
        self.area.store_u32(at + 8, piece.length, Ordering::Relaxed);
        self.area.store_u16(flags_at, flags, Ordering::Relaxed);
        self.area.store_u16(link_at, next.unwrap_or(0), Ordering::Relaxed);
    }
}
