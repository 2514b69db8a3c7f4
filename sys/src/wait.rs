//! Waiting: the one place where a reactor thread may sleep, and the event descriptors that wake it.
//!
//! `ppoll` over a list built afresh at each sleep was chosen over a standing epoll set: descriptors that a guest handed us
//! live on in the guest after we close them, and an epoll set goes on reporting them under a number we may have given to
//! something else. Sleeping is idle by definition, so the longer call costs nobody.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;

/// An event counter that wakes a sleeper.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A fresh non-blocking counter at zero.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(rustix::event::eventfd(0, flags)?))
    }

    /// Takes a descriptor that a peer sent. Nothing is assumed of it: a write or read that fails or would block is nothing.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Adds one, waking whoever waits. A full counter is as good as a signal, so errors are dropped.
    #[inline]
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the count, so that the descriptor is no longer readable. Only for descriptors known not to block.
    #[inline]
    pub fn drain(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0, &mut count);
    }

    /// Whether reads and writes of the descriptor return at once (`O_NONBLOCK`).
    #[must_use]
    pub fn is_nonblocking(&self) -> bool {
        rustix::fs::fcntl_getfl(&self.0)
            .is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Descriptors to sleep on, gathered anew for each sleep.
#[derive(Debug, Default)]
pub struct WaitSet {
    entries: Vec<libc::pollfd>,
}

impl WaitSet {
    /// An empty set with room for `capacity` descriptors before it allocates.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { entries: Vec::with_capacity(capacity) }
    }

    /// Forgets all descriptors.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Wakes the next sleep when `fd` becomes readable. The caller keeps the descriptor open until then; a closed one ends
    /// the sleep at once.
    pub fn add(&mut self, fd: impl AsFd) {
        let fd = fd.as_fd().as_raw_fd();
        self.entries.push(libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    }

    /// Sleeps until a descriptor is ready or `timeout_ns` nanoseconds have passed; none waits for good. An interrupted sleep
    /// counts as over.
    pub fn sleep(&mut self, timeout_ns: Option<u64>) {
        let timeout = timeout_ns.map(|ns| libc::timespec {
            tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(ns % 1_000_000_000).unwrap_or(0),
        });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the array is ours and its length is passed with it; `timeout` is null or outlives the call; a null signal
        // mask changes nothing.
        unsafe {
            libc::ppoll(
                self.entries.as_mut_ptr(),
                self.entries.len() as libc::nfds_t,
                timeout,
                std::ptr::null(),
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_signalled_event_ends_the_sleep() {
        let event = EventFd::new().unwrap();
        assert!(event.is_nonblocking());
        let mut set = WaitSet::with_capacity(1);
        set.add(&event);
        let start = Instant::now();
        set.sleep(Some(20_000_000));
        assert!(start.elapsed() >= Duration::from_millis(20));
        event.signal();
        set.sleep(None);
        event.drain();
    }
}
