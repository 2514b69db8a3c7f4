//! The block-device layer: bdevs, the channels through which reactors use them, and the jobs that run over them.
//!
//! A [`Bdev`] is the control side of a block device: its name, geometry and where its channels come from. An
//! [`IoChannel`] is the data side: a reactor-local queue pair. Channels form a tree; a stacked channel owns its children's,
//! submits to them and polls them. Nothing ever calls its parent.
//!
//! A [`Disk`] is what a reactor polls: the root channel of one bdev, the consumers that use it (vhost sessions), the gate
//! that holds them while the graph changes, and at most one [`BlockJob`] inserted above the bdev.
//!
//! Invariants:
//! * `submit` never completes inline and is never called without a free slot; so the data path has no "busy" result.
//! * Every submitted I/O completes exactly once, also after its consumer has gone.
//! * The graph changes only when drained; a hold has a deadline.
//! * This crate knows no virtio and no JSON.

pub mod bitmap;
pub mod bounce;
pub mod channel;
pub mod delay;
pub mod device;
pub mod dirty_bitmap;
pub mod disk;
pub mod error;
pub mod identity;
pub mod io;
pub mod job;
pub mod ledger;
pub mod malloc;
pub mod mirror;
pub mod null;
pub mod offload;
pub mod passthru;
pub mod sectors;
pub mod slots;
pub mod stable_hash;
pub mod stats;
pub mod uring;
pub mod verify;

pub use channel::{CompletionBatch, IoChannel, Limits};
pub use device::{Bdev, BdevError, Detail, Extent, Geometry};
pub use dirty_bitmap::DirtyBitmap;
pub use disk::{
    Consumer, ConsumerId, DISK_DEPTH, Disk, DiskCommand, DiskEvent, DiskHandle, HoldError, Port,
    ReplaceRoot, Reply, StartJob,
};
pub use identity::FileIdentity;
pub use io::{BdevIo, Completion, IoError, IoKind, Tag};
pub use job::{BlockJob, JobEvent, JobInfo, JobStatus, JobVerb, VerbError};
pub use mirror::{Mirror, MirrorChannels, MirrorConfig};
pub use stats::IoStats;
pub use verify::{VerifyInfo, VerifyRequest, VerifyState};

/// The most buffer slices that one I/O may carry.
pub const SEGMENTS_MAX: usize = 128;
/// The same, as [`Limits`] counts it.
pub const SEGMENTS_MAX_U32: u32 = 128;
const _: () = assert!(SEGMENTS_MAX_U32 as usize == SEGMENTS_MAX);
