//! The driver's part of a packed ring: one ring of descriptors and two event areas (virtio 2.8).
//!
//! Every request is one descriptor, which names an indirect table; so a slot's number is its buffer's id, and the ring cannot
//! be fuller than there are slots. Drivers that chain in the ring itself exist elsewhere and test the back end; what this one
//! saves is their bookkeeping. Without indirect descriptors a split ring is used.
//!
//! A batch becomes visible with the flags of its first descriptor, which are written last: the device stops at the first one
//! that is not available.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use resilver_sys::area::fence;

use super::FrontEndError;
use super::memory::{Carved, RING_ALIGNMENT, SharedMemory};
use super::ring::Base;
use crate::message::RingAddresses;
use crate::packed::{EVENT_BYTES, EventArea, FLAGS_AT, ID_AT, LENGTH_AT, OWNER, Position};
use crate::protocol::descriptor_flags;
use crate::ring::{DESCRIPTOR_BYTES, EventMode};

/// One packed ring.
#[derive(Debug)]
pub(super) struct PackedSide {
    pub(super) ring: Carved,
    /// What the driver wants to hear, and what the device does.
    driver: Carved,
    pub(super) device: Carved,
    size: u16,
    events: EventMode,
    next_available: Position,
    /// The first descriptor of the batch, and how many are in it.
    first: Position,
    batched: u16,
    next_used: Position,
    /// Where a back end would go on, for whoever talks to it.
    base: Arc<AtomicU32>,
}

impl PackedSide {
    /// Bytes of shared memory that a ring takes, alignment included.
    pub(super) fn bytes_needed(size: u16) -> usize {
        usize::from(size) * DESCRIPTOR_BYTES + 2 * EVENT_BYTES + 3 * RING_ALIGNMENT
    }

    /// A ring in `memory`.
    pub(super) fn new(
        size: u16,
        events: EventMode,
        memory: &mut SharedMemory,
    ) -> Result<Self, FrontEndError> {
        let mut side = Self {
            ring: memory.carve(usize::from(size) * DESCRIPTOR_BYTES, RING_ALIGNMENT)?,
            driver: memory.carve(EVENT_BYTES, RING_ALIGNMENT)?,
            device: memory.carve(EVENT_BYTES, RING_ALIGNMENT)?,
            size,
            events,
            next_available: Position::START,
            first: Position::START,
            batched: 0,
            next_used: Position::START,
            base: Arc::default(),
        };
        side.reset();
        Ok(side)
    }

    pub(super) fn addresses(&self) -> RingAddresses {
        RingAddresses {
            flags: 0,
            descriptors: self.ring.user_address(),
            used: self.device.user_address(),
            available: self.driver.user_address(),
            log: 0,
        }
    }

    pub(super) fn base(&self) -> Base {
        Base::Position(Arc::clone(&self.base))
    }

    /// Puts a request's table into the ring, unpublished.
    pub(super) fn offer(&mut self, id: u16, address: u64, length: u32) {
        let at = usize::from(self.next_available.index) * DESCRIPTOR_BYTES;
        let ring = &self.ring.area;
        ring.store_u64(at, address, Ordering::Relaxed);
        ring.store_u32(at + LENGTH_AT, length, Ordering::Relaxed);
        ring.store_u16(at + ID_AT, id, Ordering::Relaxed);
        if self.batched == 0 {
            self.first = self.next_available;
        } else {
            self.make_available(self.next_available, Ordering::Relaxed);
        }
        self.batched += 1;
        self.next_available = self.next_available.ahead(1, self.size);
    }

    fn make_available(&self, at: Position, ordering: Ordering) {
        let flags = descriptor_flags::INDIRECT | at.available();
        self.ring.area.store_u16(
            usize::from(at.index) * DESCRIPTOR_BYTES + FLAGS_AT,
            flags,
            ordering,
        );
    }

    pub(super) fn has_unpublished(&self) -> bool {
        self.batched > 0
    }

    /// Shows the device what was offered; whether it wants to be kicked for that.
    pub(super) fn publish(&mut self) -> bool {
        let batched = std::mem::take(&mut self.batched);
        if batched == 0 {
            return false;
        }
        self.make_available(self.first, Ordering::Release);
        // As in a split ring.
        fence(Ordering::SeqCst);
        EventArea(&self.device.area).wants(self.events, self.next_available, batched, self.size)
    }

    fn is_used(&self) -> bool {
        let at = usize::from(self.next_used.index) * DESCRIPTOR_BYTES;
        let flags = self.ring.area.load_u16(at + FLAGS_AT, Ordering::Acquire);
        flags & OWNER == self.next_used.used()
    }

    /// What the device says that it has completed next, and how much it wrote.
    pub(super) fn pop(&mut self) -> Option<(u32, u32)> {
        if !self.is_used() {
            return None;
        }
        let at = usize::from(self.next_used.index) * DESCRIPTOR_BYTES;
        let id = self.ring.area.load_u16(at + ID_AT, Ordering::Relaxed);
        let written = self.ring.area.load_u32(at + LENGTH_AT, Ordering::Relaxed);
        self.next_used = self.next_used.ahead(1, self.size);
        self.tell_base();
        Some((u32::from(id), written))
    }

    /// Behind what was completed and seen, for both directions: what is in flight behind it a back end knows by its record.
    fn tell_base(&self) {
        let word = u32::from(self.next_used.word());
        self.base.store(word | word << 16, Ordering::Release);
    }

    /// Asks for interrupts; false if something has ended already.
    pub(super) fn arm(&mut self) -> bool {
        EventArea(&self.driver.area).ask(self.events, self.next_used);
        fence(Ordering::SeqCst);
        !self.is_used()
    }

    /// Asks for none.
    pub(super) fn disarm(&mut self) {
        EventArea(&self.driver.area).ask_nothing();
    }

    /// Makes the ring new and empty.
    pub(super) fn reset(&mut self) {
        for at in 0..usize::from(self.size) {
            self.ring.area.store_u16(at * DESCRIPTOR_BYTES + FLAGS_AT, 0, Ordering::Relaxed);
        }
        for at in [0, 2] {
            self.device.area.store_u16(at, 0, Ordering::Relaxed);
        }
        let start = Position::START;
        (self.next_available, self.first, self.next_used, self.batched) = (start, start, start, 0);
        self.tell_base();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_end::connection::Negotiated;
    use crate::front_end::memory::DataBuffer;
    use crate::front_end::queue::{DriverQueue, Finished, Request, RequestError, RingError};
    use crate::packed::PackedRing;
    use crate::protocol::features;
    use crate::ring::{Descriptors, Notify, RingAreas, Taken};
    use proptest::prelude::*;

    const SIZE: u16 = 4;
    const BUFFER: DataBuffer = DataBuffer { offset: 0, length: 512 };
    const FEATURES: u64 = features::RING_PACKED | features::RING_INDIRECT_DESC;

    /// Both ends of one ring: ours, and the one that serves.
    struct Pair {
        queue: DriverQueue,
        areas: RingAreas,
        device: PackedRing,
        events: EventMode,
    }

    impl Pair {
        fn new(features: u64) -> Self {
            let negotiated = Negotiated::new(FEATURES | features, 0);
            let bytes = crate::front_end::queue::bytes_needed(SIZE, 2, &negotiated);
            let mut memory = SharedMemory::new(4096, bytes).unwrap();
            let queue = DriverQueue::new(0, SIZE, 2, &negotiated, &mut memory).unwrap();
            let events = if features == 0 { EventMode::Flags } else { EventMode::Index };
            let areas = queue.packed().areas();
            let device = PackedRing::new(areas.clone(), SIZE, queue.handle().base(), events);
            Self { areas, device: device.unwrap(), queue, events }
        }

        /// A back end that begins where it is told to.
        fn replace_device(&mut self) {
            let base = self.queue.handle().base();
            self.device = PackedRing::new(self.areas.clone(), SIZE, base, self.events).unwrap();
        }

        fn submit(&mut self, tag: u64) {
            self.queue.submit(Request::Read { offset: 512 * tag }, &[BUFFER], tag).unwrap();
        }

        fn take(&mut self) -> Option<u16> {
            if !self.device.has_next() {
                return None;
            }
            let descriptor = self.device.chain().fetch().unwrap();
            assert!(descriptor.has(descriptor_flags::INDIRECT));
            assert_eq!(descriptor.length, 3 * 16, "header, buffer, status");
            self.device.take(1).unwrap();
            Some(descriptor.link)
        }

        /// Completes a request without a status; whether the driver is to be interrupted.
        fn complete(&mut self, id: u16) -> bool {
            self.device.push_used(Taken { id, entries: 1, record: 0 }, 513);
            self.device.publish(None) == Notify::Yes
        }

        fn pop(&mut self) -> Option<u64> {
            let finished = self.queue.pop().unwrap()?;
            let Finished { result, written, tag } = finished;
            assert_eq!((result, written), (Err(RequestError::NoStatus), 513));
            Some(tag)
        }
    }

    impl PackedSide {
        fn areas(&self) -> RingAreas {
            let (driver, device) = (self.driver.area.clone(), self.device.area.clone());
            RingAreas { descriptors: self.ring.area.clone(), driver, device, log: None }
        }
    }

    #[test]
    fn a_batch_is_seen_when_it_is_published_and_not_before() {
        let mut pair = Pair::new(0);
        // Several laps of the ring.
        for lap in 0..5 {
            for tag in 0..3 {
                pair.submit(3 * lap + tag);
            }
            assert!(pair.queue.has_unpublished() && pair.take().is_none());
            pair.queue.publish();
            assert!(!pair.queue.has_unpublished());
            let ids: Vec<u16> = std::iter::from_fn(|| pair.take()).collect();
            assert_eq!(ids.len(), 3);
            // In another order.
            for id in ids.into_iter().rev() {
                pair.complete(id);
            }
            for tag in (0..3).rev() {
                assert_eq!(pair.pop(), Some(3 * lap + tag));
            }
            assert_eq!((pair.pop(), pair.queue.in_flight()), (None, 0));
        }
    }

    #[test]
    fn a_device_that_lies_about_its_ring_is_an_error_of_the_queue() {
        for id in [SIZE, u16::MAX] {
            let mut pair = Pair::new(0);
            pair.submit(1);
            pair.queue.publish();
            pair.take().unwrap();
            pair.complete(id);
            assert_eq!(pair.queue.pop(), Err(RingError::NotInFlight(u32::from(id))));
        }
        // The same request twice.
        let mut pair = Pair::new(0);
        pair.submit(1);
        pair.submit(2);
        pair.queue.publish();
        let id = pair.take().unwrap();
        pair.take().unwrap();
        pair.complete(id);
        pair.complete(id);
        assert!(pair.pop().is_some());
        assert_eq!(pair.queue.pop(), Err(RingError::NotInFlight(u32::from(id))));
    }

    #[test]
    fn each_side_hears_of_what_it_asked_for_and_of_nothing_else() {
        for features in [0, features::RING_EVENT_IDX] {
            let mut pair = Pair::new(features);
            for tag in 0..10 {
                pair.device.disarm(None);
                pair.submit(tag);
                pair.queue.publish();
                assert!(!pair.queue.handle().was_kicked(), "it polls");
                let id = pair.take().unwrap();
                assert!(!pair.complete(id), "we poll");
                assert_eq!(pair.pop(), Some(tag));

                assert!(pair.device.arm(None));
                pair.submit(tag);
                pair.queue.publish();
                assert!(pair.queue.handle().was_kicked());
                let id = pair.take().unwrap();
                assert!(pair.queue.arm());
                assert!(pair.complete(id));
                assert!(!pair.queue.arm(), "something has ended");
                assert_eq!(pair.pop(), Some(tag));
                pair.queue.disarm();
            }
        }
    }

    #[test]
    fn a_restart_offers_what_is_in_flight_again_oldest_first() {
        let mut pair = Pair::new(features::RING_EVENT_IDX);
        for tag in 0..3 {
            pair.submit(tag);
        }
        pair.queue.publish();
        let ids: Vec<u16> = std::iter::from_fn(|| pair.take()).collect();
        pair.complete(ids[1]);
        assert_eq!(pair.pop(), Some(1));
        pair.submit(3);
        pair.queue.restart();
        pair.replace_device();
        let again: Vec<u16> = std::iter::from_fn(|| pair.take()).collect();
        assert_eq!(again, [ids[0], ids[2], ids[1]], "the freed one was taken again");
        for id in again {
            pair.complete(id);
        }
        let tags: Vec<u64> = std::iter::from_fn(|| pair.pop()).collect();
        assert_eq!((tags, pair.queue.in_flight()), (vec![0, 2, 3], 0));
    }

    /// Where all that was taken is completed, the next back end goes on behind it with the ring as it is.
    #[test]
    fn another_back_end_goes_on_where_the_ring_stands() {
        let mut pair = Pair::new(0);
        for tag in 0..11 {
            pair.submit(tag);
            pair.queue.publish();
            let id = pair.take().unwrap();
            pair.complete(id);
            assert_eq!(pair.pop(), Some(tag));
            pair.replace_device();
        }
    }

    proptest! {
        /// Whatever is submitted, however it is batched and in whichever order it completes: every request ends once.
        #[test]
        fn requests_are_neither_lost_nor_given_twice(
            steps in prop::collection::vec((0u8..4, 0usize..4), 1..200),
        ) {
            let mut pair = Pair::new(features::RING_EVENT_IDX);
            let (mut submitted, mut taken, mut ended) = (0u64, Vec::new(), Vec::new());
            for (step, which) in steps {
                match step {
                    0 if pair.queue.has_room(1) => {
                        pair.submit(submitted);
                        submitted += 1;
                    }
                    0 => prop_assert_eq!(pair.queue.in_flight(), SIZE),
                    1 => pair.queue.publish(),
                    2 => taken.extend(std::iter::from_fn(|| pair.take())),
                    _ if which < taken.len() => {
                        let id = taken.remove(which);
                        pair.complete(id);
                        ended.extend(std::iter::from_fn(|| pair.pop()));
                    }
                    _ => {}
                }
            }
            pair.queue.publish();
            taken.extend(std::iter::from_fn(|| pair.take()));
            for id in taken {
                pair.complete(id);
            }
            ended.extend(std::iter::from_fn(|| pair.pop()));
            ended.sort_unstable();
            prop_assert_eq!(ended, (0..submitted).collect::<Vec<_>>());
            prop_assert_eq!(pair.queue.in_flight(), 0);
        }
    }
}
