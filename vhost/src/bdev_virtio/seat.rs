//! A seat: a ring of the export with the bounce pool that belongs to it. A channel has one for as long as it lives.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use resilver_bdev::bounce::Bounce;

use super::ring_state::{Event, Phase, RingState};
use super::shared::Shared;
use crate::front_end::{DriverQueue, RingError};

/// A ring and what its owner needs with it.
pub(super) struct Seat {
    pub(super) queue: DriverQueue,
    pub(super) pool: Bounce,
    pub(super) state: Arc<RingState>,
}

impl Seat {
    /// The back end broke the rules of the ring: it is not looked at again until another one has it.
    pub(super) fn broke(&self, shared: &Shared, error: RingError) {
        if self.state.apply(Event::Break) {
            shared.broke(error);
        }
    }

    /// The back end has gone, and what it had completed was taken: the next one may have the ring with its record.
    pub(super) fn taken(&self, shared: &Shared) {
        if self.state.apply(Event::Taken) {
            shared.wake();
        }
    }

    /// The back end has gone, and nobody knows what it did: the next one is offered all of it again.
    pub(super) fn restart(&mut self, shared: &Shared) {
        self.queue.restart();
        if self.state.apply(Event::Restarted) {
            shared.wake();
        }
    }

    /// No back end has come: forgets what is in the ring. The owner has failed it, or nobody waits for it.
    pub(super) fn empty(&mut self, shared: &Shared) {
        self.queue.forget();
        if self.state.apply(Event::Emptied) {
            shared.wake();
        }
    }

    /// Moves on a seat that no channel has, so that what the last one left in flight ends and harms nobody; whether it is free.
    pub(super) fn clear(&mut self, shared: &Shared) -> bool {
        self.queue.publish();
        match self.state.phase() {
            Phase::Running | Phase::Stopped => self.take_all(shared),
            Phase::Recorded => {
                self.take_all(shared);
                self.taken(shared);
            }
            Phase::Lost => self.restart(shared),
            Phase::GivenUp => self.empty(shared),
            Phase::Broken | Phase::Failing => {}
        }
        self.queue.in_flight() == 0
    }

    fn take_all(&mut self, shared: &Shared) {
        loop {
            match self.queue.pop() {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => return self.broke(shared, error),
            }
        }
    }
}

/// A seat on loan: when the channel that has it goes, the seat goes back.
pub(super) struct Lent {
    seat: Option<Seat>,
    shared: Arc<Shared>,
}

impl Lent {
    /// Lends a seat.
    pub(super) fn new(seat: Seat, shared: Arc<Shared>) -> Self {
        Self { seat: Some(seat), shared }
    }

    /// What the bdev, the keeper and the channels share.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Deref for Lent {
    type Target = Seat;

    fn deref(&self) -> &Seat {
        self.seat.as_ref().expect("a seat stays until the loan ends")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Seat {
        self.seat.as_mut().expect("a seat stays until the loan ends")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            self.shared.take_back(seat);
        }
    }
}
