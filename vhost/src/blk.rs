//! virtio-blk (virtio 5.2): the configuration space, and what a request asks.
//!
//! The rules are the specification's: sectors are always 512 bytes, whatever the block size; a write to a read-only disk
//! fails and writes nothing; flags that are not known make a request unsupported; what a completed write promises depends
//! on the cache mode that was negotiated.
//!
//! The offered features do not depend on what backs the disk at the moment: a disk may be switched over to another bdev
//! while its guest runs, and the guest has negotiated once and for all. So discard is always offered; a bdev that cannot
//! deallocate takes it and does nothing, which virtio permits.

use std::fmt;

use resilver_bdev::{BdevIo, IoError, IoKind, Limits, Tag};
use resilver_reactor::Context;

use crate::chain::{Buffers, Chain};
use crate::protocol::{
    BLK_RANGE_BYTES, CONFIG_BYTES_MAX, SECTOR, SERIAL_BYTES, blk_status, blk_type, features,
};
use crate::session::{POSTCOPY_FEATURES, PROTOCOL_FEATURES};

/// Most data segments of a request: what QEMU's devices offer with a ring of 128.
pub const SEG_MAX: u32 = 126;
/// Most ranges of one discard or write-zeroes request.
pub const RANGES_MAX: usize = 16;
/// Where the one writable field of the configuration space is: `writeback` (virtio 5.2.4).
pub const WRITEBACK_OFFSET: u32 = 32;
/// Write zeroes may deallocate.
const RANGE_UNMAP: u32 = 1;

/// What a device is, apart from what its guest negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkDevice {
    /// What backs it.
    pub limits: Limits,
    /// Guests may not write, whatever the bdev says.
    pub read_only: bool,
    /// Request queues.
    pub num_queues: u16,
    /// Packed rings are offered beside split ones.
    pub packed_ring: bool,
    /// A guest may come while its memory is still on its way.
    pub postcopy: bool,
}

/// What a completed write promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMode {
    /// It is durable after the next flush.
    WriteBack,
    /// It is durable.
    WriteThrough,
}

impl BlkDevice {
    /// Whether guests may write.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.limits.read_only
    }

    /// The features offered, vhost-user's own bit included.
    #[must_use]
    pub fn features(&self) -> u64 {
        let writable = if self.is_read_only() {
            features::RO
        } else {
            features::DISCARD | features::WRITE_ZEROES
        };
        let packed = if self.packed_ring { features::RING_PACKED } else { 0 };
        writable
            | packed
            | features::SEG_MAX
            | features::BLK_SIZE
            | features::TOPOLOGY
            | features::FLUSH
            | features::CONFIG_WCE
            | features::MQ
            | features::LOG_ALL
            | features::RING_INDIRECT_DESC
            | features::RING_EVENT_IDX
            | features::PROTOCOL_FEATURES
            | features::VERSION_1
    }

    /// The vhost-user protocol features offered.
    #[must_use]
    pub fn protocol_features(&self) -> u64 {
        PROTOCOL_FEATURES | if self.postcopy { POSTCOPY_FEATURES } else { 0 }
    }

    /// The configuration space (virtio 5.2.4), zero beyond its last field.
    #[must_use]
    pub fn config_space(&self, cache: CacheMode) -> [u8; CONFIG_BYTES_MAX] {
        let block = self.limits.block_size;
        let unmap = sectors(self.limits.max_unmap);
        let optimal = self.limits.optimal_io.checked_div(block).unwrap_or(0);
        let ranges = u32::try_from(RANGES_MAX).unwrap_or(1);
        let mut space = Space { bytes: [0; CONFIG_BYTES_MAX] };
        space.put(0, &(self.limits.size() / SECTOR).to_le_bytes());
        space.put(12, &SEG_MAX.to_le_bytes());
        space.put(20, &block.to_le_bytes());
        space.put(26, &1u16.to_le_bytes()); // smallest good I/O, blocks
        space.put(28, &optimal.to_le_bytes());
        space.put(WRITEBACK_OFFSET as usize, &[u8::from(cache == CacheMode::WriteBack)]);
        space.put(34, &self.num_queues.to_le_bytes());
        if !self.is_read_only() {
            space.put(36, &unmap.to_le_bytes());
            space.put(40, &ranges.to_le_bytes());
            space.put(44, &sectors(u64::from(block)).to_le_bytes()); // discard alignment
            space.put(48, &unmap.to_le_bytes());
            space.put(52, &ranges.to_le_bytes());
            // "May" must not be denied by a disk that could be switched over to one that does (virtio 5.2.6.2).
            space.put(56, &[1]);
        }
        space.bytes
    }
}

/// A length in sectors, as the configuration space can say it.
fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

/// The configuration space being filled.
struct Space {
    bytes: [u8; CONFIG_BYTES_MAX],
}

impl Space {
    fn put(&mut self, at: usize, value: &[u8]) {
        if let Some(field) = self.bytes.get_mut(at..at + value.len()) {
            field.copy_from_slice(value);
        }
    }
}

/// The cache mode that holds with these features and this `writeback` field (virtio 5.2.5.2, 5.2.6.2): without FLUSH the
/// guest cannot ask for durability, so every write must be durable; with CONFIG_WCE the field decides.
#[must_use]
pub fn cache_mode(negotiated: u64, writeback: CacheMode) -> CacheMode {
    let (flush, wce) = (negotiated & features::FLUSH != 0, negotiated & features::CONFIG_WCE != 0);
    match (flush, wce) {
        (false, false | true) => CacheMode::WriteThrough,
        (true, false) => CacheMode::WriteBack,
        (true, true) => writeback,
    }
}

/// A disk's serial, as GET_ID answers it: padded with zeroes, and not necessarily text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial(pub [u8; SERIAL_BYTES]);

impl Serial {
    /// What the operator gave, or the name of the disk's controller, cut to what GET_ID can carry.
    #[must_use]
    pub fn new(given: &str) -> Self {
        Self::padded(given.bytes())
    }

    /// What a device answered, whatever it left behind the first zero; some pad with spaces, as SPDK does.
    #[must_use]
    pub fn answered(bytes: [u8; SERIAL_BYTES]) -> Self {
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Self::padded(text.trim_ascii_end().iter().copied())
    }

    fn padded(bytes: impl Iterator<Item = u8>) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(bytes) {
            *to = from;
        }
        Self(serial)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(SERIAL_BYTES);
        self.0.get(..end).unwrap_or_default().escape_ascii().fmt(f)
    }
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestError {
    /// There is no whole header.
    Header,
    /// A buffer is not in guest memory.
    WildBuffer,
    /// More pieces than an I/O may have.
    TooManySegments,
    /// The data is not a whole number of blocks, or begins inside one.
    Misaligned,
    /// It leaves the disk.
    OutOfRange,
    /// The disk is read-only.
    ReadOnly,
    /// A type or flag that is not known or was not offered.
    Unsupported,
    /// The disk says so.
    Backend(IoError),
}

impl RequestError {
    /// The status that the guest gets.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Header
            | Self::WildBuffer
            | Self::TooManySegments
            | Self::Misaligned
            | Self::OutOfRange
            | Self::ReadOnly => blk_status::IOERR,
            Self::Unsupported => blk_status::UNSUPP,
            Self::Backend(error) if error == IoError::NOT_SUPPORTED => blk_status::UNSUPP,
            Self::Backend(_) => blk_status::IOERR,
        }
    }
}

/// One range of a discard or write-zeroes request, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// It may be deallocated.
    pub may_unmap: bool,
}

/// What a request asks, checked against the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Read or write this many bytes at this offset; the buffers are the chain's.
    Transfer {
        /// Read or write.
        kind: IoKind,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Flush.
    Flush,
    /// Unmap or write zeroes; so many of the ranges handed in are filled.
    Ranges {
        /// Which.
        kind: IoKind,
        /// How many.
        count: usize,
    },
    /// The serial.
    Identify,
}

/// Reads the request that `chain` holds. The ranges of a discard or write-zeroes request go to `ranges`.
///
/// # Errors
/// Says what is wrong with it; nothing has been done.
#[inline(always)]
pub fn parse(
    cx: &Context<'_>,
    chain: &mut Chain,
    limits: &Limits,
    read_only: bool,
    ranges: &mut [Range; RANGES_MAX],
) -> Result<Ask, RequestError> {
    match chain.buffers() {
        Buffers::Gathered => {}
        Buffers::Wild => return Err(RequestError::WildBuffer),
        Buffers::TooMany => return Err(RequestError::TooManySegments),
    }
    let header = chain.read(cx).ok_or(RequestError::Header)?;
    #[allow(clippy::cast_possible_truncation)] // type, reserved word, sector
    let (id, sector) = (header as u32, (header >> 64) as u64);
    let may_write = if read_only { Err(RequestError::ReadOnly) } else { Ok(()) };
    match id {
        blk_type::IN => transfer(limits, IoKind::Read, sector, chain.writable_bytes()),
        blk_type::OUT => {
            may_write?;
            transfer(limits, IoKind::Write, sector, chain.readable_bytes())
        }
        blk_type::FLUSH => Ok(Ask::Flush),
        blk_type::GET_ID => Ok(Ask::Identify),
        blk_type::DISCARD => {
            may_write?;
            parse_ranges(cx, chain, limits, IoKind::Unmap, ranges)
        }
        blk_type::WRITE_ZEROES => {
            may_write?;
            parse_ranges(cx, chain, limits, IoKind::WriteZeroes, ranges)
        }
        _ => Err(RequestError::Unsupported),
    }
}

#[inline]
fn transfer(limits: &Limits, kind: IoKind, sector: u64, length: u64) -> Result<Ask, RequestError> {
    let offset = sector.checked_mul(SECTOR).ok_or(RequestError::OutOfRange)?;
    fits(limits, kind, offset, length)?;
    Ok(Ask::Transfer { kind, offset, length })
}

/// Whether a range is one of the disk's.
#[inline]
fn fits(limits: &Limits, kind: IoKind, offset: u64, length: u64) -> Result<(), RequestError> {
    if !limits.aligns(offset, length) {
        return Err(RequestError::Misaligned);
    }
    let io = BdevIo { tag: Tag(0), kind, may_unmap: false, offset, length };
    if limits.admits(&io) { Ok(()) } else { Err(RequestError::OutOfRange) }
}

fn parse_ranges(
    cx: &Context<'_>,
    chain: &mut Chain,
    limits: &Limits,
    kind: IoKind,
    ranges: &mut [Range; RANGES_MAX],
) -> Result<Ask, RequestError> {
    let bytes = chain.readable_bytes();
    let count = bytes / BLK_RANGE_BYTES as u64;
    if count == 0 || !bytes.is_multiple_of(BLK_RANGE_BYTES as u64) {
        return Err(RequestError::Header);
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let wanted = ranges.get_mut(..count).ok_or(RequestError::TooManySegments)?;
    for range in wanted {
        let value = chain.read(cx).ok_or(RequestError::Header)?;
        #[allow(clippy::cast_possible_truncation)] // sector, sectors, flags
        let (sector, sectors, flags) = (value as u64, (value >> 64) as u32, (value >> 96) as u32);
        let known = match kind {
            IoKind::WriteZeroes => RANGE_UNMAP,
            IoKind::Unmap | IoKind::Read | IoKind::Write | IoKind::Flush => 0,
        };
        if flags & !known != 0 {
            return Err(RequestError::Unsupported);
        }
        let offset = sector.checked_mul(SECTOR).ok_or(RequestError::OutOfRange)?;
        let length = u64::from(sectors) * SECTOR;
        fits(limits, kind, offset, length)?;
        *range = Range { offset, length, may_unmap: flags & RANGE_UNMAP != 0 };
    }
    Ok(Ask::Ranges { kind, count })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What tests take for a disk.
    pub(crate) const DEVICE: BlkDevice = BlkDevice {
        limits: Limits {
            block_size: 512,
            num_blocks: 2048,
            max_transfer: 1 << 20,
            max_segments: 128,
            max_unmap: 1 << 30,
            unmap: true,
            zeroes_unmap: true,
            optimal_io: 4096,
            read_only: false,
        },
        read_only: false,
        num_queues: 2,
        packed_ring: false,
        postcopy: false,
    };

    /// One with large blocks.
    fn device() -> BlkDevice {
        let limits = Limits {
            block_size: 4096,
            num_blocks: 1000,
            max_unmap: 1 << 40,
            optimal_io: 65536,
            ..DEVICE.limits
        };
        BlkDevice { limits, num_queues: 4, ..DEVICE }
    }

    #[test]
    fn the_configuration_space_says_what_the_disk_is() {
        let space = device().config_space(CacheMode::WriteBack);
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 8000);
        assert_eq!((word(8), word(12), word(20), word(28)), (0, 126, 4096, 16));
        assert_eq!((space[32], space[34], space[35]), (1, 4, 0));
        assert_eq!((word(36), word(40), word(44)), (1 << 31, 16, 8));
        assert_eq!((word(48), word(52), space[56]), (1 << 31, 16, 1));
        assert!(space[57..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let device = BlkDevice { read_only: true, ..device() };
        let offered = device.features();
        assert_eq!(offered & (features::DISCARD | features::WRITE_ZEROES), 0);
        assert_ne!(offered & features::RO, 0);
        let space = device.config_space(CacheMode::WriteThrough);
        assert!(space[36..].iter().all(|byte| *byte == 0) && space[32] == 0);
    }

    #[test]
    fn the_cache_mode_is_total_over_what_can_be_negotiated() {
        let (flush, wce) = (features::FLUSH, features::CONFIG_WCE);
        let (back, through) = (CacheMode::WriteBack, CacheMode::WriteThrough);
        let table = [
            (0, through, through),
            (0, back, through),
            (wce, through, through),
            (wce, back, through),
            (flush, through, back),
            (flush, back, back),
            (flush | wce, through, through),
            (flush | wce, back, back),
        ];
        for (negotiated, writeback, expected) in table {
            assert_eq!(
                cache_mode(negotiated, writeback),
                expected,
                "{negotiated:#x} {writeback:?}"
            );
        }
    }

    #[test]
    fn a_serial_is_cut_to_twenty_bytes() {
        assert_eq!(&Serial::new("vm1").0, b"vm1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        let long = Serial::new("a-name-longer-than-twenty-bytes");
        assert_eq!(long.to_string(), "a-name-longer-than-t");
        assert_eq!(Serial::answered(*b"vm1\0what was there b"), Serial::new("vm1"));
        assert_eq!(Serial::answered(*b"vm1                 "), Serial::new("vm1"));
    }
}
