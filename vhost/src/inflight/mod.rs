//! The in-flight region: which requests were taken from a ring and not given back, in memory that outlives us.
//!
//! The front end keeps the region (vhost-user, "Inflight I/O tracking"): a back end makes it once, as a memory file, and every
//! back end after it, on a socket that was closed or after a crash, is given it again. So a request that was taken before
//! a crash is executed by the next back end, in the order in which it was taken, and one that was given back is not executed
//! again. The layout is that of the document and of the back ends that exist; a region made by another one is understood.
//!
//! | module | ring |
//! | --- | --- |
//! | `split` | entries by descriptor index; what was taken is read again from the descriptor table |
//! | `packed` | entries in a free list, with copies of the descriptors, which used ones overwrite in the ring |
//!
//! **Trust.** The front end can write the region. Every index read from it is checked, every walk is bounded by the number of
//! entries, and what it says of descriptors is as much an allegation as the descriptors are. One that makes no sense is
//! refused when a ring starts; one that changes later harms its own guest only.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use resilver_sys::area::AreaError;
use resilver_sys::{Area, Mapping, MappingError};

use crate::message::InflightDescription;
use crate::protocol::{QUEUES_MAX, RING_SIZE_MAX};
use crate::ring::{Format, Ring, Taken};

mod packed;
mod split;

pub(crate) use packed::{PackedInflight, RecordedChain};
pub(crate) use split::SplitInflight;

/// The one version of the layout. Zero: nobody has used the region.
const VERSION: u16 = 1;
/// Queue regions begin at multiples of this, as in the back ends that exist.
const ALIGNMENT: usize = 64;
/// Where the version is, in both layouts, and the number of entries.
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;

/// Why a region cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// It could not be mapped.
    #[error("the in-flight region cannot be mapped: {0}")]
    Mapping(#[from] MappingError),
    /// It could not be made.
    #[error("the in-flight region cannot be made: {0}")]
    Make(std::io::Error),
    /// It does not have the queues or the entries that a device can have.
    #[error(
        "an in-flight region for {queues} queues of {entries} entries: there are 1 to {QUEUES_MAX} queues of 1 to \
         {RING_SIZE_MAX} entries"
    )]
    Shape {
        /// Queues.
        queues: u16,
        /// Entries of each.
        entries: u16,
    },
    /// It is shorter than its queues need, or not aligned.
    #[error("the in-flight region of queue {queue} is not in the memory that was shared: {source}")]
    Area {
        /// Which.
        queue: u16,
        /// What is wrong.
        source: AreaError,
    },
    /// Another layout, or other content than this protocol leaves behind.
    #[error(
        "the in-flight region of queue {queue} {what}; reset the guest's device to start with a fresh one"
    )]
    Content {
        /// Which.
        queue: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// There is none for this queue.
    #[error("the in-flight region has no place for queue {queue} of {entries} entries")]
    NoPlace {
        /// Which.
        queue: u16,
        /// Entries of the ring.
        entries: u16,
    },
}

/// Bytes of one queue's region, rounded up to where the next begins.
fn stride(format: Format, entries: u16) -> usize {
    let (header, entry) = match format {
        Format::Split => (split::HEADER_BYTES, split::ENTRY_BYTES),
        Format::Packed => (packed::HEADER_BYTES, packed::ENTRY_BYTES),
    };
    (header + usize::from(entries) * entry).next_multiple_of(ALIGNMENT)
}

/// The regions of all queues, as mapped.
#[derive(Debug, Clone)]
pub struct InflightMemory {
    mapping: Arc<Mapping>,
    queues: u16,
    entries: u16,
}

impl InflightMemory {
    /// Makes a memory file for so many queues (GET_INFLIGHT_FD), and says what it is. It cannot be resized any more, so
    /// nobody can take it away from under a back end.
    ///
    /// # Errors
    /// A shape that no device has, or the kernel's refusal.
    pub fn make(
        format: Format,
        queues: u16,
        entries: u16,
    ) -> Result<(InflightDescription, OwnedFd), InflightError> {
        check_shape(queues, entries)?;
        let size = (stride(format, entries) * usize::from(queues)) as u64;
        let make = || -> rustix::io::Result<OwnedFd> {
            use rustix::fs::{MemfdFlags, SealFlags};
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = rustix::fs::memfd_create("resilver-inflight", flags)?;
            rustix::fs::ftruncate(&file, size)?;
            rustix::fs::fcntl_add_seals(
                &file,
                SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
            )?;
            Ok(file)
        };
        let file = make().map_err(|error| InflightError::Make(error.into()))?;
        let description = InflightDescription {
            mmap_size: size,
            mmap_offset: 0,
            num_queues: queues,
            queue_size: entries,
        };
        Ok((description, file))
    }

    /// Maps what a front end gives back (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// A shape that no device has, or a file that does not have the bytes.
    pub fn map(description: &InflightDescription, file: &OwnedFd) -> Result<Self, InflightError> {
        use std::os::fd::AsFd;
        let InflightDescription { mmap_size, mmap_offset, num_queues, queue_size } = *description;
        check_shape(num_queues, queue_size)?;
        let mapping = Mapping::shared(file.as_fd(), mmap_offset, mmap_size)?;
        Ok(Self { mapping, queues: num_queues, entries: queue_size })
    }

    /// The region of one queue.
    fn area(&self, format: Format, queue: u16, ring: u16) -> Result<Area, InflightError> {
        if queue >= self.queues || ring > self.entries {
            return Err(InflightError::NoPlace { queue, entries: ring });
        }
        let bytes = stride(format, self.entries);
        let offset = (bytes * usize::from(queue)) as u64;
        Area::new(&self.mapping, offset, bytes, align_of::<u64>())
            .map_err(|source| InflightError::Area { queue, source })
    }

    /// Has `ring` track its requests in the region of `queue`; answers those that are to be executed again, in order. What
    /// `holds` says decides whether the ring goes on where it was set up to, or behind what the region says was in flight.
    ///
    /// # Errors
    /// There is no such region, or it makes no sense.
    pub fn take_over(
        &self,
        queue: u16,
        ring: &mut Ring,
        holds: Holds,
    ) -> Result<Box<[Taken]>, InflightError> {
        let entries = self.entries;
        let refused = |what| InflightError::Content { queue, what };
        Ok(match ring {
            Ring::Split(ring) => {
                let (size, used) = (ring.size(), ring.used_index());
                let area = self.area(Format::Split, queue, size)?;
                if holds == Holds::Nothing || is_fresh(&area, queue, entries)? {
                    ring.track(SplitInflight::fresh(area, size, entries, used));
                    return Ok(Box::default());
                }
                let (tracker, heads) = SplitInflight::recover(area, size, used);
                ring.resume_behind(u16::try_from(heads.len()).unwrap_or(size));
                ring.track(tracker);
                let taken = |head: &u16| Taken { id: *head, entries: 1, record: *head };
                heads.iter().map(taken).collect()
            }
            Ring::Packed(ring) => {
                let area = self.area(Format::Packed, queue, ring.size())?;
                if holds == Holds::Nothing || is_fresh(&area, queue, entries)? {
                    ring.track(PackedInflight::fresh(area, entries, ring.used_position()));
                    return Ok(Box::default());
                }
                let (tracker, again) =
                    PackedInflight::recover(area, entries, ring).map_err(refused)?;
                ring.track(tracker);
                again
            }
        })
    }
}

/// What a region can hold when a ring starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// What an earlier connection or process left in flight: the region is believed, not the base that the front end gave, who
    /// does not know how far that one came.
    AnEarlierSession,
    /// Nothing: on this connection the ring has been stopped, and so drained, and the front end was told where it stands.
    Nothing,
}

fn check_shape(queues: u16, entries: u16) -> Result<(), InflightError> {
    let (all_queues, all_entries) = (1..=QUEUES_MAX, 1..=RING_SIZE_MAX);
    if all_queues.contains(&queues) && all_entries.contains(&entries) {
        Ok(())
    } else {
        Err(InflightError::Shape { queues, entries })
    }
}

/// Whether nobody has used the region.
fn is_fresh(area: &Area, queue: u16, entries: u16) -> Result<bool, InflightError> {
    let refused = |what| Err(InflightError::Content { queue, what });
    match area.load_u16(VERSION_AT, Ordering::Acquire) {
        0 => Ok(true),
        VERSION if area.load_u16(ENTRIES_AT, Ordering::Relaxed) == entries => Ok(false),
        VERSION => refused("has another number of entries than was said"),
        _ => refused("is of a version that is not known"),
    }
}
