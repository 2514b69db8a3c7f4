//! The suppress-and-look-again races of rings, in every order that the memory model allows (loom): the device is [`Ring`] as it
//! stands, the driver is what virtio 2.7.13, 2.7.14 and 2.8.21 ask of one.
//!
//! Each side publishes something and looks whether the other wants to hear of it; the other says what it wants and looks once
//! more before it sleeps. Where a fence is missing both looks may come too early, and both sides sleep for good: loom finds
//! that as a deadlock.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::Notify as Event;
use loom::thread;
use resilver_sys::area::without_fences;

use super::*;

/// Entries of the ring.
const SIZE: u16 = 2;
const ENTRIES: usize = SIZE as usize;

/// What the two sides share: the ring, and an event in each direction.
struct Machine {
    areas: RingAreas,
    kick: Event,
    interrupt: Event,
}

impl Machine {
    fn new() -> Arc<Self> {
        // Either format's parts fit.
        let areas = RingAreas {
            descriptors: Area::words(16 * ENTRIES),
            driver: Area::words(6 + 2 * ENTRIES),
            device: Area::words(6 + 8 * ENTRIES),
            log: None,
        };
        Arc::new(Self { areas, kick: Event::new(), interrupt: Event::new() })
    }
}

/// What the device does without its fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfenced {
    Nothing,
    Arm,
    Publish,
}

fn unless<T>(unfenced: bool, act: impl FnOnce() -> T) -> T {
    if unfenced { without_fences(act) } else { act() }
}

/// Takes the next request, of one descriptor.
fn take(ring: &mut Ring) -> Option<Taken> {
    match ring {
        Ring::Split(ring) => {
            let id = ring.pop().expect("a good driver")?;
            Some(Taken { id, ..Taken::default() })
        }
        Ring::Packed(ring) => {
            if !ring.has_next() {
                return None;
            }
            let id = ring.chain().fetch().expect("a descriptor").link;
            let record = ring.take(1).expect("a good driver");
            Some(Taken { id, entries: 1, record })
        }
    }
}

/// A polled device that sleeps when there is nothing to do, as the reactor lets it, until it has answered `requests`.
fn device(
    machine: &Machine,
    (format, events): (Format, EventMode),
    requests: u16,
    unfenced: Unfenced,
) {
    let base = if format == Format::Packed { 0x8000_8000 } else { 0 };
    let ring = Ring::new(format, machine.areas.clone(), SIZE, base, events);
    let mut ring = ring.expect("a base in the ring");
    ring.disarm(None);
    let mut answered = 0;
    while answered < requests {
        while let Some(taken) = take(&mut ring) {
            ring.push_used(taken, 1);
            answered += 1;
        }
        let notify = unless(unfenced == Unfenced::Publish, || ring.publish(None));
        if notify == Notify::Yes {
            machine.interrupt.notify();
        }
        if answered < requests {
            if unless(unfenced == Unfenced::Arm, || ring.arm(None)) {
                machine.kick.wait();
            }
            ring.disarm(None);
        }
    }
}

/// The driver's way with a ring, of whichever format.
struct Driver<'a> {
    areas: &'a RingAreas,
    events: EventMode,
    format: Format,
}

impl Driver<'_> {
    /// The index and the wrap counter of the ring's `request`th descriptor, as a packed ring's event areas have them.
    fn position(request: u16) -> u16 {
        request % SIZE | if request / SIZE % 2 == 0 { 1 << 15 } else { 0 }
    }

    /// The flags of that descriptor when it is available, and when it is used.
    fn flags(request: u16) -> (u16, u16) {
        let (avail, used) = (descriptor_flags::AVAIL, descriptor_flags::USED);
        if request / SIZE % 2 == 0 { (avail, avail | used) } else { (used, 0) }
    }

    /// Says that it wants to hear of this request's end, or of nothing.
    fn wish(&self, request: u16, wanted: bool) {
        let (area, relaxed) = (&self.areas.driver, Ordering::Relaxed);
        match (self.format, self.events) {
            (Format::Split, EventMode::Flags) => area.store_u16(0, u16::from(!wanted), relaxed),
            (Format::Split, EventMode::Index) => {
                let event = if wanted { request } else { request.wrapping_sub(1) };
                area.store_u16(4 + 2 * ENTRIES, event, relaxed);
            }
            (Format::Packed, EventMode::Index) if wanted => {
                area.store_u16(0, Self::position(request), relaxed);
                area.store_u16(2, 2, Ordering::Release);
            }
            (Format::Packed, _) => area.store_u16(2, u16::from(!wanted), relaxed),
        }
    }

    /// Makes a request available; true if the device is to be kicked.
    fn offer(&self, request: u16) -> bool {
        let RingAreas { descriptors, driver, device, .. } = self.areas;
        let relaxed = Ordering::Relaxed;
        match self.format {
            Format::Split => {
                driver.store_u16(4 + 2 * usize::from(request % SIZE), request % SIZE, relaxed);
                driver.store_u16(2, request + 1, Ordering::Release);
            }
            Format::Packed => {
                let at = 16 * usize::from(request % SIZE);
                descriptors.store_u16(at + 12, request % SIZE, relaxed);
                descriptors.store_u16(at + 14, Self::flags(request).0, Ordering::Release);
            }
        }
        loom::sync::atomic::fence(Ordering::SeqCst);
        match (self.format, self.events) {
            (Format::Split, EventMode::Flags) => device.load_u16(0, relaxed) & 1 == 0,
            (Format::Split, EventMode::Index) => {
                let event = device.load_u16(4 + 8 * ENTRIES, relaxed);
                crosses(event, request + 1, request)
            }
            (Format::Packed, _) => match device.load_u16(2, Ordering::Acquire) {
                0 => true,
                1 => false,
                _ => device.load_u16(0, relaxed) == Self::position(request),
            },
        }
    }

    /// Whether the device has given a request back.
    fn is_done(&self, request: u16) -> bool {
        match self.format {
            Format::Split => self.areas.device.load_u16(2, Ordering::Acquire) != request,
            Format::Packed => {
                let at = 16 * usize::from(request % SIZE) + 14;
                let both = descriptor_flags::AVAIL | descriptor_flags::USED;
                let flags = self.areas.descriptors.load_u16(at, Ordering::Acquire);
                flags & both == Self::flags(request).1
            }
        }
    }

    /// What the device says it gave back.
    fn id(&self, request: u16) -> u16 {
        let slot = usize::from(request % SIZE);
        match self.format {
            Format::Split => self.areas.device.load_u16(4 + 8 * slot, Ordering::Relaxed),
            Format::Packed => self.areas.descriptors.load_u16(16 * slot + 12, Ordering::Relaxed),
        }
    }
}

/// A driver that asks for one thing after the other and sleeps until each is answered.
fn driver(machine: &Machine, (format, events): (Format, EventMode), requests: u16) {
    let driver = Driver { areas: &machine.areas, events, format };
    for request in 0..requests {
        driver.wish(request, false);
        if driver.offer(request) {
            machine.kick.notify();
        }
        while !driver.is_done(request) {
            driver.wish(request, true);
            loom::sync::atomic::fence(Ordering::SeqCst);
            if !driver.is_done(request) {
                machine.interrupt.wait();
            }
        }
        assert_eq!(driver.id(request), request % SIZE, "the used element");
    }
}

/// Runs every order; or, with a bound, every order in which a thread is interrupted at most so often where it could go on.
fn explore(
    kind: (Format, EventMode),
    requests: u16,
    interruptions: Option<usize>,
    unfenced: Unfenced,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = interruptions;
    model.check(move || {
        let machine = Machine::new();
        let here = Arc::clone(&machine);
        let guest = thread::spawn(move || driver(&here, kind, requests));
        device(&machine, kind, requests, unfenced);
        guest.join().expect("the driver ends");
    });
}

macro_rules! races {
    ($name:ident, $format:ident, $events:ident) => {
        mod $name {
            use super::*;

            const KIND: (Format, EventMode) = (Format::$format, EventMode::$events);

            #[test]
            fn no_order_makes_both_sides_sleep() {
                explore(KIND, 1, None, Unfenced::Nothing);
            }

            /// What one request leaves behind is what the next one finds. Unbounded this takes hours.
            #[test]
            fn nor_does_a_second_request() {
                explore(KIND, 2, Some(3), Unfenced::Nothing);
            }

            #[test]
            #[should_panic(expected = "deadlock")]
            fn arming_needs_its_fence() {
                explore(KIND, 1, None, Unfenced::Arm);
            }

            #[test]
            #[should_panic(expected = "deadlock")]
            fn publishing_needs_its_fence() {
                explore(KIND, 1, None, Unfenced::Publish);
            }
        }
    };
}

races!(split_by_flags, Split, Flags);
races!(split_by_event_index, Split, Index);
races!(packed_by_flags, Packed, Flags);
races!(packed_by_event_index, Packed, Index);
