//! What an export lets us ask: from how it describes itself to what a channel accepts.

use resilver_bdev::bounce::{CHUNK, CHUNKS_MAX};
use resilver_bdev::device::{BLOCK_SIZE_MAX, BLOCK_SIZE_MIN, SIZE_MAX};
use resilver_bdev::{Geometry, Limits, SEGMENTS_MAX, SEGMENTS_MAX_U32};

use crate::front_end::BlkConfig;

/// Largest unmap or write-zeroes that a channel takes, bytes; it is cut to what the export takes.
const MAX_RANGE: u64 = 1 << 30;
/// What a guest's file system uses as a page anyway.
const OPTIMAL_IO_MIN: u32 = 4096;

/// What a channel may ask of its export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) geometry: Geometry,
    pub(super) read_only: bool,
    /// Flushes are understood; else completed writes are durable (virtio 5.2.6.2).
    pub(super) flush: bool,
    /// Largest discard, bytes; 0 if it is not understood.
    pub(super) discard_max: u64,
    /// Largest write-zeroes, bytes; 0 if it is not understood and zeroes have to be written.
    pub(super) zeroes_max: u64,
    /// A write-zeroes that may unmap does so.
    pub(super) zeroes_unmap: bool,
    /// Most buffers of one request.
    pub(super) segments: u16,
    /// Bytes of the longest buffer.
    pub(super) segment_bytes: u32,
    /// Largest read or write, bytes.
    pub(super) max_transfer: u32,
}

impl Device {
    /// What an export that describes itself so can be used for, or why it cannot be used.
    pub(super) fn new(config: &BlkConfig) -> Result<Self, String> {
        let block = config.block_size;
        if !block.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block) {
            return Err(format!("it says that its blocks have {block} bytes"));
        }
        let wide = u64::from(block);
        let geometry = Geometry::new(block, config.capacity / wide).map_err(|_| {
            format!(
                "it says that it has {} bytes; a disk has one block of {block} bytes at least and {SIZE_MAX} bytes at most",
                config.capacity
            )
        })?;
        // A device that does not say takes one (virtio 5.2.5); so does one that says 0.
        let most = config.segments_max.unwrap_or(1).max(1);
        let segments =
            u16::try_from(most).unwrap_or(u16::MAX).min(u16::try_from(SEGMENTS_MAX).unwrap_or(1));
        let segment_bytes = config.segment_bytes_max.unwrap_or(CHUNK).min(CHUNK);
        let max_transfer = transfer_max(segments, segment_bytes, block);
        if max_transfer == 0 {
            return Err(format!(
                "a request has at most {segments} buffers of {segment_bytes} bytes there, which is less than a block"
            ));
        }
        // More than the largest transfer is made of would only make the rings' tables longer.
        let needed = max_transfer.div_ceil(CHUNK) * CHUNK.div_ceil(segment_bytes);
        let segments = u16::try_from(needed).unwrap_or(segments).min(segments);
        let whole_blocks = |most: Option<u64>| {
            let most = most.unwrap_or(0).min(MAX_RANGE);
            most - most % wide
        };
        Ok(Self {
            geometry,
            read_only: config.read_only,
            flush: config.flush,
            discard_max: whole_blocks(config.discard_max),
            zeroes_max: whole_blocks(config.write_zeroes_max),
            zeroes_unmap: config.zeroes_unmap,
            segments,
            segment_bytes,
            max_transfer,
        })
    }

    /// What a channel accepts.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            block_size: self.geometry.block_size,
            num_blocks: self.geometry.num_blocks,
            max_transfer: self.max_transfer,
            max_segments: SEGMENTS_MAX_U32,
            max_unmap: MAX_RANGE,
            unmap: self.discard_max > 0,
            zeroes_unmap: self.zeroes_max > 0 && self.zeroes_unmap,
            optimal_io: self.geometry.block_size.max(OPTIMAL_IO_MIN),
            read_only: self.read_only,
        }
    }

    /// What an export is that answers on the socket of this one: the same, perhaps grown; or why it is another.
    pub(super) fn successor(&self, config: &BlkConfig) -> Result<Self, String> {
        let next = Self::new(config)?;
        let (now, then) = (next.geometry, self.geometry);
        if now.size() < then.size() {
            return Err(format!("it has {} bytes now, and had {}", now.size(), then.size()));
        }
        for ((what, now), (_, then)) in next.properties().into_iter().zip(self.properties()) {
            if now != then {
                return Err(format!("its {what} is {now} now, and was {then}"));
            }
        }
        Ok(next)
    }

    /// What must stay as it is while the bdev lives, by the words of a message: all but the size.
    fn properties(&self) -> [(&'static str, String); 9] {
        let Self {
            geometry: Geometry { block_size, num_blocks: _ },
            read_only,
            flush,
            discard_max,
            zeroes_max,
            zeroes_unmap,
            segments,
            segment_bytes,
            max_transfer,
        } = *self;
        let flag = |set| if set { "on" } else { "off" }.to_owned();
        [
            ("block size", block_size.to_string()),
            ("read-only flag", flag(read_only)),
            ("flush support", flag(flush)),
            ("longest discard", discard_max.to_string()),
            ("longest write of zeroes", zeroes_max.to_string()),
            ("deallocation by zeroes", flag(zeroes_unmap)),
            ("number of segments", segments.to_string()),
            ("longest segment", segment_bytes.to_string()),
            ("longest transfer", max_transfer.to_string()),
        ]
    }
}

/// The largest transfer through chunks of the pool that so many buffers of so many bytes can carry, bytes.
fn transfer_max(segments: u16, segment_bytes: u32, block: u32) -> u32 {
    let chunks = u32::from(segments) / CHUNK.div_ceil(segment_bytes.max(1));
    let most = match chunks {
        0 => u32::from(segments).saturating_mul(segment_bytes).min(CHUNK),
        chunks => chunks.min(u32::try_from(CHUNKS_MAX).unwrap_or(1)) * CHUNK,
    };
    most - most % block
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BlkConfig = BlkConfig {
        capacity: 1 << 30,
        block_size: 512,
        segments_max: Some(126),
        segment_bytes_max: None,
        queues: 1,
        read_only: false,
        flush: true,
        discard_max: Some(16 << 20),
        write_zeroes_max: Some(16 << 20),
        zeroes_unmap: true,
    };

    #[test]
    fn a_transfer_is_as_long_as_its_buffers_allow() {
        for (segments, bytes, block, most) in [
            (126, CHUNK, 512, 1 << 20),
            (16, CHUNK, 512, 1 << 20),
            (15, CHUNK, 512, 15 << 16),
            (1, CHUNK, 512, 1 << 16),
            (126, 4096, 512, 7 << 16),
            (8, 4096, 4096, 32768),
            (2, 1000, 512, 1536),
            (2, 1000, 4096, 0),
            (1, 1, 512, 0),
        ] {
            assert_eq!(transfer_max(segments, bytes, block), most, "{segments} of {bytes}");
            // No chunk needs more buffers than are left for it.
            let whole = u32::from(segments) / CHUNK.div_ceil(bytes);
            assert!(most <= CHUNK || most <= whole * CHUNK);
        }
    }

    #[test]
    fn an_export_that_is_no_disk_is_refused_with_the_reason() {
        for (wrong, reason) in [
            (BlkConfig { capacity: 0, ..CONFIG }, "0 bytes"),
            (BlkConfig { capacity: u64::MAX, ..CONFIG }, "at most"),
            (BlkConfig { block_size: 0, ..CONFIG }, "blocks have 0 bytes"),
            (BlkConfig { block_size: 520, ..CONFIG }, "blocks have 520 bytes"),
            (BlkConfig { block_size: 1 << 20, ..CONFIG }, "blocks have 1048576"),
            (
                BlkConfig { segments_max: None, segment_bytes_max: Some(100), ..CONFIG },
                "less than a block",
            ),
        ] {
            let refused = Device::new(&wrong).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
    }

    #[test]
    fn what_an_export_does_not_say_or_cannot_do_is_not_asked_of_it() {
        let plain = BlkConfig {
            segments_max: None,
            discard_max: None,
            write_zeroes_max: Some(100),
            flush: false,
            ..CONFIG
        };
        let device = Device::new(&plain).unwrap();
        let limits = device.limits();
        assert_eq!((limits.max_transfer, limits.unmap, limits.zeroes_unmap), (CHUNK, false, false));
        assert!(!device.flush && device.zeroes_max == 0, "100 bytes are less than a block");
    }

    #[test]
    fn a_successor_may_have_grown_and_nothing_else() {
        let device = Device::new(&CONFIG).unwrap();
        assert_eq!(device.successor(&CONFIG), Ok(device));
        let grown = device.successor(&BlkConfig { capacity: 2 << 30, ..CONFIG }).unwrap();
        assert_eq!(grown.geometry.size(), 2 << 30);
        for (other, refusal) in [
            (
                BlkConfig { capacity: 1 << 29, ..CONFIG },
                "it has 536870912 bytes now, and had 1073741824",
            ),
            (BlkConfig { block_size: 4096, ..CONFIG }, "its block size is 4096 now, and was 512"),
            (BlkConfig { read_only: true, ..CONFIG }, "its read-only flag is on now, and was off"),
            (
                BlkConfig { segments_max: Some(4), ..CONFIG },
                "its number of segments is 4 now, and was 16",
            ),
            (
                BlkConfig { discard_max: Some(4096), ..CONFIG },
                "its longest discard is 4096 now, and was 16777216",
            ),
            (BlkConfig { flush: false, ..CONFIG }, "its flush support is off now, and was on"),
        ] {
            assert_eq!(device.successor(&other), Err(refusal.to_owned()));
        }
    }
}
