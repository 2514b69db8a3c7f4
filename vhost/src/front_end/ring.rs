//! What the control side of a front end knows of a ring: where it is and what it is notified by.
//!
//! A [`DriverQueue`](super::DriverQueue) lives wherever it is polled; to tell a back end about its ring takes this much of it,
//! which never changes and may be shared by threads.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use resilver_sys::{Area, EventFd};

use super::FrontEndError;
use crate::message::RingAddresses;
use crate::split::USED_INDEX;

/// How it is told where a ring stands.
#[derive(Debug, Clone)]
pub(super) enum Base {
    /// By the used index of a split ring, at its place in this used ring.
    UsedIndex(Area),
    /// By the position in a packed ring, which its driver tells.
    Position(Arc<AtomicU32>),
}

/// A ring as it is described to a back end; cheap to clone.
#[derive(Debug, Clone)]
pub struct RingHandle {
    index: u16,
    size: u16,
    addresses: RingAddresses,
    base: Base,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

impl RingHandle {
    /// Ring number `index`.
    pub(super) fn new(
        index: u16,
        size: u16,
        addresses: RingAddresses,
        base: Base,
    ) -> Result<Self, FrontEndError> {
        let event = || {
            let made = EventFd::new();
            made.map(Arc::new)
                .map_err(|source| FrontEndError::Os { what: "make an eventfd", source })
        };
        Ok(Self { index, size, addresses, base, kick: event()?, call: event()? })
    }

    /// The ring's number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries of the ring.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Where the ring's parts are, as SET_VRING_ADDR says it.
    pub(super) fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Where a back end that begins with the ring goes on (vhost-user, "Vring descriptor index/indices"): behind what is
    /// completed. Of a fresh ring or a restarted one that is its beginning; of one whose back end recovers what was in flight it
    /// is what QEMU says too after a back end has died (`virtio_queue_restore_last_avail_idx`). Nobody may be serving the
    /// ring.
    pub(super) fn base(&self) -> u32 {
        match &self.base {
            Base::UsedIndex(used) => u32::from(used.load_u16(USED_INDEX, Ordering::Acquire)),
            Base::Position(position) => position.load(Ordering::Acquire),
        }
    }

    /// Wakes the device.
    pub(super) fn kick(&self) {
        self.kick.signal();
    }

    /// The same for a thread that nobody [nudges](resilver_sys::Nudge).
    pub(super) fn kick_unless_full(&self) {
        self.kick.signal_unless_full();
    }

    /// What the device is kicked by.
    pub(super) fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Wakes whoever sleeps on the ring, as an interrupt of the device does. For a thread that nobody
    /// [nudges](resilver_sys::Nudge).
    pub fn wake(&self) {
        self.call.signal_unless_full();
    }

    /// What becomes readable when the device interrupts.
    pub(super) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Takes the interrupts that have come.
    pub(super) fn drain_call(&self) {
        self.call.drain();
    }
}

#[cfg(test)]
impl RingHandle {
    /// Whether the device was kicked since this was asked last.
    pub(super) fn was_kicked(&self) -> bool {
        self.kick.drain()
    }
}
