//! A count of what peers have done that their sessions have to end for: memory that was taken away under its mapping
//! ([`crate::Mapping::poisoned`]), a descriptor that made its writer wait ([`crate::EventFd::is_stuck`]).
//!
//! Both are found in the middle of something else, one of them in a signal handler, by who cannot say whose they are. A session that
//! sees the count change looks at what is its own: one load a turn, and no look at each region and descriptor.

use std::sync::atomic::{AtomicUsize, Ordering};

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// One more; what says whose it is was stored before.
pub(crate) fn add() {
    COUNT.fetch_add(1, Ordering::Release);
}

/// How many there were.
#[inline]
#[must_use]
pub fn incidents() -> usize {
    COUNT.load(Ordering::Acquire)
}
