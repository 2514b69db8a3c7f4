//! What a reactor counts about itself. Written by the reactor alone, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::time::Nanos;

/// A counter with one writer: no locked instruction is needed to add to it.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds to the counter. Only the one writer may call this; a second one would lose counts, nothing worse.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Overwrites the value: a gauge.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one reactor.
#[derive(Debug, Default)]
pub struct ReactorStats {
    /// Nanoseconds spent in turns that did something.
    pub busy_ns: CachePadded<Cell>,
    /// Nanoseconds spent in turns that found nothing, and asleep.
    pub idle_ns: Cell,
    /// Turns.
    pub turns: Cell,
    /// Times it went to sleep.
    pub sleeps: Cell,
    /// Pollers it holds.
    pub pollers: Cell,
}

impl ReactorStats {
    /// Seconds busy and idle so far.
    #[must_use]
    pub fn busy_idle_seconds(&self) -> (f64, f64) {
        (Nanos(self.busy_ns.get()).as_secs_f64(), Nanos(self.idle_ns.get()).as_secs_f64())
    }
}
