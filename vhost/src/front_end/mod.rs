//! The front end: Resilver as the driver of somebody's vhost-user-blk disk.
//!
//! A [`Connection`] is the control side: it negotiates, shares memory and sets up rings, with blocking calls that have a
//! deadline. A [`DriverQueue`] is the data side of one ring: submit, publish, poll; it allocates nothing and makes no
//! system call but the kick that the device asks for. The two meet only when rings are set up, so a queue can live on
//! another thread.
//!
//! Invariants:
//! * A request's status byte is poisoned before it is submitted: a device that completes a request without writing its
//!   status is found out instead of looking successful.
//! * What the device writes (used index, head, length, status) is an allegation. It is checked, never used as an address,
//!   and a ring that lies is [`RingError`], not a panic.
//! * Rings and request headers lie behind the caller's data in memory of our own making, sealed against shrinking.
//!
//! Fault model: the back end may die at any moment. Requests in flight then stay in their slots, and
//! [`Connection::reconnect`] submits them again, oldest first, to whoever answers on the socket next. A back end that records
//! what is in flight ([`ConnectionConfig::inflight`]) is given its record back instead and resubmits by itself: it alone
//! knows which requests its predecessor had completed but not reported.
//!
//! To submit a request again that was carried out already is safe for a disk: nobody was told of its end, so nothing that
//! depends on it was ever submitted, and the same bytes arrive twice. What is not safe is a predecessor that still writes; a
//! back end must not answer while one of its own is at work on the disk (a lock on the file sees to that).

mod back_channel;
mod connection;
mod identity;
mod inflight;
mod link;
mod memory;
mod packed;
mod queue;
mod ring;
mod split;

pub use connection::{BlkConfig, Connection, ConnectionConfig, FrontEndError};
pub use memory::{DataBuffer, SharedMemory};
pub use queue::{DriverQueue, Finished, Request, RequestError, RingError, SubmitError};
pub use ring::RingHandle;
