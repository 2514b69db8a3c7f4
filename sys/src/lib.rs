//! The only unsafe code of Resilver.
//!
//! What lives here is what cannot be written safely anywhere: mappings that a guest shares and may write at any moment,
//! rings read through raw pointers, requests that the kernel carries out on our memory after the call has returned, and
//! the allocator that proves the hot path allocates nothing. Everything above this crate is safe Rust and stays sound
//! because of two rules kept here:
//!
//! * **An I/O names memory by (region, offset, length), never by pointer.** A [`BufferSlice`] is an allegation until a
//!   [`RegionTable`] has checked it; a stale or out-of-range slice is an error, not a fault.
//! * **Memory outlives the kernel's use of it.** A [`Ring`] leases every region it has I/O in until the completion is
//!   reaped, and so does [`Aio`]; a mapping with a lease on it is never unmapped, if need be it is leaked.
//!
//! No Rust reference to shared memory is ever formed: bytes move by copy, volatile or by the C library.

pub mod aio;
pub mod alloc_guard;
pub mod area;
pub mod file;
pub mod foreign;
mod incidents;
mod inline;
pub mod mapping;
pub mod nudge;
mod prefetch;
pub mod region;
pub mod sigbus;
pub mod slices;
pub mod uring;
pub mod userfault;
mod vector;
pub mod wait;
mod zeroed;

use std::time::Duration;

pub use aio::Aio;
pub use area::Area;
pub use incidents::incidents;
pub use mapping::{Mapping, MappingError};
pub use nudge::Nudge;
pub use prefetch::prefetch_value;
pub use region::{BadSlice, BufferSlice, RegionId, RegionTable, TableFull};
pub use slices::Slices;
pub use uring::{Ring, RingMode, SubmissionThread};
pub use userfault::{FaultRefusal, FaultWindow, OnFault, Userfault};
pub use vector::{Direction, SEGMENTS};
pub use wait::{EventFd, WaitSet};

/// The number of bytes of a memory page; what mappings are rounded to where the file does not ask for more.
pub const PAGE_SIZE: usize = 4096;

/// Lets others have this core, between two steps of work that is not a reactor's. On a host with fewer cores than threads a
/// reactor may be who waits for it, and the scheduler would take the core back at its next tick only, milliseconds later. It takes
/// a sleep: who yields and has slept before has run less than a reactor and goes on at once. Who has a core of their own sleep, too:
/// nobody can tell.
pub fn step_aside() {
    std::thread::sleep(ASIDE);
}

/// With the timer slack that the kernel adds, 50 µs, enough for a reactor to answer all that a guest has asked.
const ASIDE: Duration = Duration::from_micros(100);

/// Widens a `u64` to `usize`. Lossless: the crate builds for 64-bit hosts only (asserted below).
#[inline]
#[must_use]
#[allow(clippy::cast_possible_truncation)]
pub const fn usize_from(value: u64) -> usize {
    const { assert!(usize::BITS == 64) };
    value as usize
}
