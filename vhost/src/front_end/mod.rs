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
//! [`Connection::reconnect`] submits them again, oldest first, to whoever answers on the socket next.

mod connection;
mod link;
mod memory;
mod queue;

pub use connection::{BlkConfig, Connection, ConnectionConfig, FrontEndError};
pub use memory::{DataBuffer, SharedMemory};
pub use queue::{DriverQueue, Finished, Request, RequestError, RingError, SubmitError};
