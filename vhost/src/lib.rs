//! vhost-user-blk, from both sides: the back end that serves disks, and in [`front_end`] the initiator that uses them.
//!
//! A front end (a virtual machine monitor) connects to a controller's socket, shares its guest's memory and describes its
//! virtqueues; the back end here then reads requests from the rings and answers them from a disk. Two sides share the
//! work:
//!
//! * **Control** ([`server`], on the tokio thread) reads messages with [`message`], decides with the pure state machine
//!   [`session`], maps memory, and tells the data side.
//! * **Data** ([`blk_session`], on the disk's reactor) takes requests from [`split`] and [`packed`] rings, reads them as byte streams
//!   ([`chain`]), checks them ([`blk`]) and submits them to the disk.
//!
//! A guest that comes from another host may run here before its memory has: [`postcopy`] has threads wait for the pages.
//!
//! Invariants: nothing that a guest or a front end sends can panic, hang or reach outside guest memory; a broken ring or
//! message ends that connection, with a reason in the log, and nothing else. After a session is abandoned its guest's rings
//! are never touched again.

mod back_channel;
pub mod bdev_virtio;
pub mod blk;
pub mod blk_session;
pub mod chain;
mod connection;
pub mod device_state;
pub mod dirty_log;
pub mod front_end;
pub mod inflight;
pub mod memory;
pub mod message;
pub mod packed;
pub mod postcopy;
pub mod protocol;
pub mod queue;
mod request;
pub mod ring;
pub mod server;
pub mod session;
pub mod sessions;
mod socket;
pub mod split;
mod state_pipe;
pub mod stats;

pub use server::{Controller, ControllerConfig, ControllerInfo, VhostError};
pub use stats::VhostStats;
