//! The suppress-and-look-again races of a split ring, in every order that the memory model allows (loom): the device is
//! [`SplitRing`] as it stands, the driver is what virtio 2.7.13 and 2.7.14 ask of one.
//!
//! Each side publishes an index and looks whether the other wants to hear of it; the other says what it wants and looks at
//! the index once more before it sleeps. Where a fence is missing both looks may come too early, and both sides sleep for
//! good: loom finds that as a deadlock.

use std::sync::Arc;

use loom::sync::Notify as Event;
use loom::thread;
use resilver_sys::area::without_fences;

use resilver_sys::Area;

use super::*;

/// Entries of the ring.
const SIZE: u16 = 2;

/// What the two sides share: the ring, and an event in each direction.
struct Machine {
    areas: RingAreas,
    kick: Event,
    interrupt: Event,
}

impl Machine {
    fn new() -> Arc<Self> {
        let entries = usize::from(SIZE);
        let areas = RingAreas {
            descriptors: Area::words(16 * entries),
            driver: Area::words(6 + 2 * entries),
            device: Area::words(6 + 8 * entries),
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

/// A polled device that sleeps when there is nothing to do, as the reactor lets it, until it has answered `requests`.
fn device(machine: &Machine, events: EventMode, requests: u16, unfenced: Unfenced) {
    let mut ring = SplitRing::new(machine.areas.clone(), SIZE, 0, events);
    ring.disarm(None);
    let mut answered = 0;
    while answered < requests {
        while let Some(head) = ring.pop().expect("a good driver") {
            ring.push_used(head, 1);
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

/// A driver that asks for one thing after the other and sleeps until each is answered.
fn driver(machine: &Machine, events: EventMode, requests: u16) {
    let (available, used) = (&machine.areas.driver, &machine.areas.device);
    let (used_event, avail_event) = (4 + 2 * usize::from(SIZE), 4 + 8 * usize::from(SIZE));
    let wish = |event: u16, flags: u16| match events {
        EventMode::Flags => available.store_u16(0, flags, Ordering::Relaxed),
        EventMode::Index => available.store_u16(used_event, event, Ordering::Relaxed),
    };
    let relaxed = Ordering::Relaxed;
    for request in 0..requests {
        // As it polls it wants no interrupts; event indexes can only say "as late as possible".
        wish(request.wrapping_sub(1), NO_INTERRUPT);
        available.store_u16(4 + 2 * usize::from(request % SIZE), request % SIZE, relaxed);
        available.store_u16(2, request + 1, Ordering::Release);
        loom::sync::atomic::fence(Ordering::SeqCst);
        let kick = match events {
            EventMode::Flags => used.load_u16(0, relaxed) & NO_NOTIFY == 0,
            EventMode::Index => crosses(used.load_u16(avail_event, relaxed), request + 1, request),
        };
        if kick {
            machine.kick.notify();
        }
        while used.load_u16(2, Ordering::Acquire) == request {
            wish(request, 0);
            loom::sync::atomic::fence(Ordering::SeqCst);
            if used.load_u16(2, Ordering::Acquire) == request {
                machine.interrupt.wait();
            }
        }
        let slot = 4 + 8 * usize::from(request % SIZE);
        assert_eq!(used.load_u32(slot, relaxed), u32::from(request % SIZE), "the used element");
    }
}

/// Runs every order; or, with a bound, every order in which a thread is interrupted at most so often where it could go on.
fn explore(events: EventMode, requests: u16, interruptions: Option<usize>, unfenced: Unfenced) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = interruptions;
    model.check(move || {
        let machine = Machine::new();
        let here = Arc::clone(&machine);
        let guest = thread::spawn(move || driver(&here, events, requests));
        device(&machine, events, requests, unfenced);
        guest.join().expect("the driver ends");
    });
}

#[test]
fn no_order_makes_both_sides_sleep_by_flags() {
    explore(EventMode::Flags, 1, None, Unfenced::Nothing);
}

#[test]
fn no_order_makes_both_sides_sleep_by_event_index() {
    explore(EventMode::Index, 1, None, Unfenced::Nothing);
}

/// What one request leaves behind is what the next one finds. Unbounded this takes hours.
#[test]
fn nor_does_a_second_request_by_flags() {
    explore(EventMode::Flags, 2, Some(3), Unfenced::Nothing);
}

#[test]
fn nor_does_a_second_request_by_event_index() {
    explore(EventMode::Index, 2, Some(3), Unfenced::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn arming_by_flags_needs_its_fence() {
    explore(EventMode::Flags, 1, None, Unfenced::Arm);
}

#[test]
#[should_panic(expected = "deadlock")]
fn arming_by_event_index_needs_its_fence() {
    explore(EventMode::Index, 1, None, Unfenced::Arm);
}

#[test]
#[should_panic(expected = "deadlock")]
fn publishing_by_flags_needs_its_fence() {
    explore(EventMode::Flags, 1, None, Unfenced::Publish);
}

#[test]
#[should_panic(expected = "deadlock")]
fn publishing_by_event_index_needs_its_fence() {
    explore(EventMode::Index, 1, None, Unfenced::Publish);
}
