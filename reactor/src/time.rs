//! Time: nanoseconds since the process's clock began, and what measures them.

use std::fmt;
use std::ops::{Add, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A point in time, or a span, in nanoseconds. Arithmetic saturates: a clock never wraps a data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The beginning of the clock, or no time at all.
    pub const ZERO: Self = Self(0);
    /// Later than anything.
    pub const MAX: Self = Self(u64::MAX);

    /// A span of microseconds.
    #[must_use]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros.saturating_mul(1_000))
    }

    /// A span of milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// A span of seconds.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1_000_000_000))
    }

    /// The span in seconds.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // a display value
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

impl Add for Nanos {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Nanos {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&std::time::Duration::from_nanos(self.0), f)
    }
}

/// Where the time comes from.
#[derive(Debug, Clone)]
pub enum Clock {
    /// The host's monotonic clock, counted from the given instant.
    Monotonic(Instant),
    /// A clock that a test moves by hand.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    /// The host's clock, starting now.
    #[must_use]
    pub fn monotonic() -> Self {
        Self::Monotonic(Instant::now())
    }

    /// The time.
    #[inline]
    #[must_use]
    pub fn now(&self) -> Nanos {
        match self {
            Self::Monotonic(start) => {
                Nanos(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
            }
            Self::Manual(now) => Nanos(now.load(Ordering::Relaxed)),
        }
    }
}

/// Something that falls due at regular intervals.
#[derive(Debug, Clone, Copy)]
pub struct Timer {
    period: Nanos,
    next: Nanos,
}

impl Timer {
    /// A timer that first falls due one period after `now`.
    #[must_use]
    pub fn every(period: Nanos, now: Nanos) -> Self {
        Self { period, next: now + period }
    }

    /// Whether the timer has fallen due; if so it is set again. Periods missed meanwhile are not made up for.
    #[inline]
    pub fn due(&mut self, now: Nanos) -> bool {
        let due = now >= self.next;
        if due {
            self.next = now + self.period;
        }
        due
    }

    /// When it falls due next.
    #[must_use]
    pub fn deadline(&self) -> Nanos {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_falls_due_once_a_period_and_skips_what_it_missed() {
        let mut timer = Timer::every(Nanos(10), Nanos(5));
        assert!(!timer.due(Nanos(14)));
        assert!(timer.due(Nanos(15)));
        assert!(!timer.due(Nanos(15)));
        assert!(timer.due(Nanos(99)));
        assert_eq!(timer.deadline(), Nanos(109));
    }

    #[test]
    fn a_manual_clock_stands_still_until_moved() {
        let hand = Arc::new(AtomicU64::new(7));
        let clock = Clock::Manual(Arc::clone(&hand));
        assert_eq!(clock.now(), Nanos(7));
        hand.store(9, Ordering::Relaxed);
        assert_eq!(clock.now(), Nanos(9));
    }
}
