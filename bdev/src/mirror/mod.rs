//! The mirror: a block job that brings a disk over to another one while its guest goes on.
//!
//! [`Mirror`] is a channel over three others: the source, a second one to the source for the copier's reads, and the
//! target. What is hard is decided in `core`, a state machine without I/O or clock, by the tables in `tables`; `channel`
//! performs it. The semantics are QEMU's `blockdev-mirror` (`qapi/block-core.json`, `block/mirror.c`), except that both legs
//! are written in parallel, that a guest's flush reaches the target, and that nothing waits for a target that hangs.
//!
//! Fault model: either leg may fail any request, for good or for once; may be full; may take for ever; may carry out a
//! write long after it was given up. The guest may change a buffer in flight and overlap its own requests. Control may be
//! slow. None of it loses an acknowledged write, makes a clean chunk differ, or fails a guest for the target's sake.

pub mod bugs;
mod channel;
mod copier;
mod core;
mod durable;
mod errors;
mod life;
mod pieces;
mod ranges;
mod rate;
mod rows;
mod scope;
mod share;
mod tables;
mod throttle;
mod trail;
mod verify;
mod working;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use resilver_reactor::Nanos;

pub use self::channel::{ChunkState, Mirror};
use self::core::{BOUNCE_UNIT, BOUNCE_UNITS_MAX};
pub use self::rows::{RowSet, Rows};
pub use self::scope::{ObserverPolicy, SyncMode};
pub use self::working::{BitmapMode, WorkingBitmap};
use crate::bitmap::Grid;
use crate::channel::{IoChannel, Limits};
use crate::device::BdevError;
use crate::disk::DISK_DEPTH;
use crate::io::IoKind;
use crate::job::{CopyMode, OnError};

/// The smallest granularity, bytes (QEMU `qapi/block-core.json`, granularity).
pub const GRANULARITY_MIN: u32 = 512;
/// The largest granularity, bytes.
pub const GRANULARITY_MAX: u32 = 64 << 20;
/// The granularity unless the operator says otherwise, bytes.
pub const GRANULARITY_DEFAULT: u32 = 64 << 10;

/// The most copies in flight.
const COPIES: u16 = 16;
/// Target writes that were given up and have not ended, before no more are risked: each may have cost the guest a time-out.
const QUARANTINE: u16 = 64;
/// Target writes that nobody waits for, because they trail or were given up, before the target gets no more: as many as a guest may
/// have in flight. Each that comes later makes a chunk dirty, most of which is copied for nothing: with 64 a mirror beside a guest
/// of 32 requests, on a target no slower than its source, copied 1.5 to 4.3 times its disk, where 1.1 to 1.2 are enough.
#[allow(clippy::cast_possible_truncation)] // a disk's depth is far less
const UNAWAITED: u16 = DISK_DEPTH as u16;
/// Reads that `copy_source` is opened for: the copier's and the comparison's.
pub const COPY_DEPTH: u32 = COPIES as u32 + verify::CHECKS as u32;
/// I/Os of each kind that `target` is opened for: the guest's, those that nobody waits for, the copier's, and the job's own flush.
pub const TARGET_DEPTH: u32 = DISK_DEPTH + UNAWAITED as u32 + COPIES as u32 + 1;

/// How a mirror is to work. The names are those of QEMU's `blockdev-mirror`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorConfig {
    /// The job's name, for refusals.
    pub job_id: String,
    /// How guest writes reach the target.
    pub copy_mode: CopyMode,
    /// Bytes of a chunk of the dirty bitmap: a power of two between [`GRANULARITY_MIN`] and [`GRANULARITY_MAX`].
    pub granularity: u32,
    /// The most bytes that the copier has in flight; 0 for 16 MiB, which is also the most that is used.
    pub buf_size: u64,
    /// Bytes of data that are copied in a second; 0 for no limit.
    pub speed: u64,
    /// What is done about errors of the source.
    pub on_source_error: OnError,
    /// What is done about errors of the target.
    pub on_target_error: OnError,
    /// A target I/O older than this has failed; none waits for ever.
    pub target_timeout: Option<Nanos>,
    /// Zeroes may be deallocated on the target.
    pub unmap: bool,
    /// The target is known to read zero: what is zero on the source is not written there.
    pub target_is_zero: bool,
    /// Switch over as soon as the operator completes; otherwise wait for finalize.
    pub auto_finalize: bool,
    /// Cancel when the guest resets its device.
    pub cancel_on_guest_reset: bool,
    /// Compare the legs whole before a switch-over, and undo it if they differ for good.
    pub verify_before_complete: bool,
    /// The copier leaves the guest this 99th percentile of its latency, as far as it is the copier's to leave.
    pub latency_ceiling: Option<Nanos>,
    /// A background copy that does not converge goes over to write-blocking by itself.
    pub auto_converge: bool,
    /// What is brought over besides the guest's writes.
    pub sync: SyncMode,
    /// Who waits for a target that only observes: other than `Block` with [`SyncMode::None`] and write-blocking only.
    pub observer: ObserverPolicy,
    /// What is to be brought over, instead of everything.
    pub bitmap: Option<WorkingBitmap>,
    /// The target is a difference image whose base is not opened, with clusters of so many bytes.
    pub diff_cluster: Option<u32>,
}

impl Default for MirrorConfig {
    fn default() -> Self {
        Self {
            job_id: String::new(),
            copy_mode: CopyMode::Background,
            granularity: GRANULARITY_DEFAULT,
            buf_size: 0,
            speed: 0,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            target_timeout: None,
            unmap: true,
            target_is_zero: false,
            auto_finalize: true,
            cancel_on_guest_reset: false,
            verify_before_complete: false,
            latency_ceiling: None,
            auto_converge: false,
            sync: SyncMode::Full,
            observer: ObserverPolicy::Block,
            bitmap: None,
            diff_cluster: None,
        }
    }
}

/// What a mirror works on. Nothing is in flight on any of them.
pub struct MirrorChannels {
    /// The guest's I/O, opened for [`DISK_DEPTH`].
    pub source: Box<dyn IoChannel>,
    /// The copier's reads, a second channel to the same bdev, opened for [`COPY_DEPTH`].
    pub copy_source: Box<dyn IoChannel>,
    /// The target, opened for [`TARGET_DEPTH`].
    pub target: Box<dyn IoChannel>,
    /// Copies from the source to the target that take no reading and no writing, if there are any ([`crate::offload`]).
    pub offload: Option<Box<dyn IoChannel>>,
}

/// Refuses what cannot work, so that it is said in the reply to the operator and not in an event.
fn validate(config: &MirrorConfig, channels: &MirrorChannels) -> Result<(), BdevError> {
    let invalid = |parameter, value: String, expected: &str| {
        Err(BdevError::Invalid { parameter, value, expected: expected.to_owned() })
    };
    let granularity = config.granularity;
    if !(GRANULARITY_MIN..=GRANULARITY_MAX).contains(&granularity) {
        return invalid(
            "granularity",
            granularity.to_string(),
            "expects a value in range [512B, 64MB]",
        );
    }
    if !granularity.is_power_of_two() {
        return invalid("granularity", granularity.to_string(), "expects a power of 2");
    }
    let (source, target) = (channels.source.limits(), channels.target.limits());
    if let Err(expected) = Grid::new(source.size(), granularity).check() {
        return invalid("granularity", granularity.to_string(), &format!("expects {expected}"));
    }
    if granularity < source.block_size {
        let expected = format!("expects at least the source's block size, {}", source.block_size);
        return invalid("granularity", granularity.to_string(), &expected);
    }
    if target.block_size > source.block_size {
        let expected = format!(
            "its blocks have {} bytes; expects blocks no larger than the source's, {}, or a view of smaller sectors over them",
            target.block_size, source.block_size
        );
        return invalid("target", target.block_size.to_string(), &expected);
    }
    if !source.block_size.is_multiple_of(target.block_size) {
        let expected = format!(
            "its blocks have {} bytes; expects a divisor of the source's, {}",
            target.block_size, source.block_size
        );
        return invalid("target", target.block_size.to_string(), &expected);
    }
    if target.size() < source.size() {
        let expected = format!(
            "it has {} bytes; expects at least the source's size, {} bytes",
            target.size(),
            source.size()
        );
        return invalid("target", target.size().to_string(), &expected);
    }
    if target.read_only {
        return invalid(
            "target",
            "read-only".to_owned(),
            "it is read-only; expects a target that can be written",
        );
    }
    validate_scope(config)?;
    if let Some(working) = &config.bitmap {
        working.validate(config, source.size())?;
    }
    check_depth(channels)
}

/// Refuses combinations that make no sense.
fn validate_scope(config: &MirrorConfig) -> Result<(), BdevError> {
    let invalid = |parameter, value: &str, expected: String| {
        Err(BdevError::Invalid { parameter, value: value.to_owned(), expected })
    };
    let none = config.sync == SyncMode::None;
    if config.observer != ObserverPolicy::Block
        && !(none && config.copy_mode == CopyMode::WriteBlocking)
    {
        let expected = "goes with sync 'none' and copy_mode 'write-blocking' only".to_owned();
        return invalid("observer_policy", config.observer.name(), expected);
    }
    if none && config.verify_before_complete {
        let expected =
            "does not go with sync 'none', whose target is no copy of the disk".to_owned();
        return invalid("verify_before_complete", "true", expected);
    }
    match config.diff_cluster {
        Some(cluster) if cluster == 0 || !config.granularity.is_multiple_of(cluster) => {
            let expected = format!(
                "Bitmap granularity {} is not a multiple of the target image's cluster size {cluster}",
                config.granularity
            );
            invalid("granularity", &config.granularity.to_string(), expected)
        }
        _ if config.sync == SyncMode::Top && config.target_is_zero => {
            let expected =
                "does not go with sync 'top', whose target has a base that shows".to_owned();
            invalid("target_is_zero", "true", expected)
        }
        Some(_) if config.sync != SyncMode::Top => {
            let expected = "goes with sync 'top' only".to_owned();
            invalid("diff_cluster", config.sync.name(), expected)
        }
        _ => Ok(()),
    }
}

/// Capacity is decided when a stack is built: the channels must have what the core will count on.
fn check_depth(channels: &MirrorChannels) -> Result<(), BdevError> {
    let needs = [
        ("source", channels.source.free(IoKind::Read), DISK_DEPTH),
        ("source", channels.source.free(IoKind::Write), DISK_DEPTH),
        ("copy source", channels.copy_source.free(IoKind::Read), COPY_DEPTH),
        ("target", channels.target.free(IoKind::Read), u32::from(verify::CHECKS)),
        ("target", channels.target.free(IoKind::Write), TARGET_DEPTH),
    ];
    for (name, free, needed) in needs {
        if free < needed {
            return Err(BdevError::Resources {
                name: name.to_owned(),
                reason: format!("its channel has {free} slots where a mirror needs {needed}"),
            });
        }
    }
    Ok(())
}

/// What the mirror accepts: the source's geometry, and no request that one of the legs would not take.
fn combined_limits(source: &Limits, target: &Limits) -> Limits {
    let segments = source.max_segments.min(target.max_segments);
    let bounced = BOUNCE_UNIT.saturating_mul(segments.min(BOUNCE_UNITS_MAX));
    Limits {
        max_transfer: source.max_transfer.min(target.max_transfer).min(bounced),
        max_unmap: source.max_unmap.min(target.max_unmap),
        zeroes_unmap: source.zeroes_unmap && target.zeroes_unmap,
        optimal_io: source.optimal_io.max(target.optimal_io),
        ..*source
    }
}
