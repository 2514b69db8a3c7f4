//! What the parts of a `virtio` bdev share: its control side, its keeper and its channels, each on a thread of its own.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;
use resilver_sys::EventFd;

use super::pool::Pool;
use super::seat::Seat;
use crate::front_end::RingError;

/// Told the size of an export that has grown, in bytes; on the keeper's thread.
pub(super) type Watcher = Box<dyn Fn(u64) + Send + Sync>;

/// Shared by all parts.
pub(super) struct Shared {
    /// Seats that no channel has.
    free: Pool<Seat>,
    /// Seats whose channels have gone and left requests in flight: the keeper sees to them.
    left: ArrayQueue<Seat>,
    /// Wakes the keeper.
    wake: EventFd,
    /// The bdev has gone.
    quit: AtomicBool,
    /// Bytes of the export.
    capacity: AtomicU64,
    watcher: OnceLock<Watcher>,
    /// What a back end did to a ring that it broke.
    broken: ArrayQueue<RingError>,
}

impl Shared {
    /// For as many seats as are given.
    pub(super) fn new(seats: Vec<Seat>, capacity: u64) -> std::io::Result<Self> {
        Ok(Self {
            left: ArrayQueue::new(seats.len()),
            free: Pool::new(seats),
            wake: EventFd::new()?,
            quit: AtomicBool::new(false),
            capacity: AtomicU64::new(capacity),
            watcher: OnceLock::new(),
            broken: ArrayQueue::new(1),
        })
    }

    /// A seat for a channel.
    pub(super) fn take_seat(&self) -> Option<Seat> {
        self.free.take()
    }

    /// Shows `visitor` every seat that no channel has, one after the other.
    pub(super) fn each_free(&self, visitor: impl FnMut(&mut Seat)) {
        self.free.each(visitor);
    }

    /// A channel has gone. There is room for all seats among those that are left, too.
    pub(super) fn take_back(&self, mut seat: Seat) {
        if seat.queue.in_flight() == 0 {
            seat.pool.reclaim();
            self.free.put(seat);
        } else {
            let _ = self.left.push(seat);
            self.wake();
        }
    }

    /// A seat that is to be seen to.
    pub(super) fn take_left(&self) -> Option<Seat> {
        self.left.pop()
    }

    /// Seats that there are, and how many of them are free.
    pub(super) fn seats(&self) -> (usize, usize) {
        (self.free.capacity(), self.free.len())
    }

    /// Wakes the keeper.
    pub(super) fn wake(&self) {
        self.wake.signal();
    }

    /// What the keeper sleeps on.
    pub(super) fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    /// The bdev goes.
    pub(super) fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether the bdev has gone.
    pub(super) fn has_quit(&self) -> bool {
        self.quit.load(Ordering::SeqCst)
    }

    /// A back end broke the rules of a ring.
    pub(super) fn broke(&self, error: RingError) {
        // There is one keeper to tell, and one reason is enough for it.
        let _ = self.broken.push(error);
        self.wake();
    }

    /// What a back end did to a ring, if it broke one since this was asked last.
    pub(super) fn take_broken(&self) -> Option<RingError> {
        self.broken.pop()
    }

    /// The export has grown; whoever watches is told.
    pub(super) fn grown(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::Relaxed);
        if let Some(told) = self.watcher.get() {
            told(bytes);
        }
    }

    /// Has `told` called whenever the export has grown. Only the first watcher is heard.
    pub(super) fn watch(&self, told: Watcher) {
        let _ = self.watcher.set(told);
    }

    /// Bytes of the export.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }
}
