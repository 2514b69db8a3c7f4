//! Reactors: pinned threads that poll.
//!
//! A reactor owns a list of [`Poller`]s and asks each of them, turn after turn, for a bounded piece of work. Pollers are
//! built on a control thread, moved in through the reactor's mailbox and handed back the same way; while one is inside, no
//! other thread touches it, so nothing on the data path needs a lock.
//!
//! Invariants:
//! * This crate knows no block devices, and `poll` neither blocks nor allocates.
//! * A poller that finds nothing for long is polled less often while others are busy ([`roster`]), or what would give it work is
//!   looked at in its place ([`watch`]).
//! * The clock is read once a turn; pollers are given the time in their [`Context`].
//! * A message sent to a sleeping reactor wakes it ([`doorbell`]); the protocol is model-checked.

pub mod doorbell;
pub mod mailbox;
#[cfg(not(loom))]
pub mod poller;
#[cfg(not(loom))]
pub mod reactor;
#[cfg(not(loom))]
pub mod roster;
#[cfg(not(loom))]
pub mod stats;
pub mod time;
#[cfg(not(loom))]
pub mod watch;

#[cfg(not(loom))]
pub use doorbell::Doorbell;
#[cfg(not(loom))]
pub use mailbox::{MailboxFull, Receiver, Sender, mailbox};
#[cfg(not(loom))]
pub use poller::{Armed, Context, Poller, Work};
#[cfg(not(loom))]
pub use reactor::{Idle, PollerId, Reactor, ReactorConfig, ReactorError, ReactorHandle};
#[cfg(not(loom))]
pub use stats::ReactorStats;
pub use time::{Clock, Nanos, Timer};
#[cfg(not(loom))]
pub use watch::Watch;
