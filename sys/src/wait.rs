//! Waiting: the one place where a reactor thread may sleep, and the event descriptors that wake it.
//!
//! `ppoll` over a list built afresh at each sleep was chosen over a standing epoll set: descriptors that a guest handed us
//! live on in the guest after we close them, and an epoll set goes on reporting them under a number we may have given to
//! something else. Sleeping is idle by definition, so the longer call costs nobody.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;

use crate::incidents;

/// What a write to an event descriptor may do to its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writing {
    /// It returns at once.
    Immediate,
    /// It waits while the counter is full, so it is asked first whether it has room.
    MayWait,
}

/// An event counter that wakes a sleeper.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    writing: Writing,
    /// A write had to be interrupted: it is not written any more.
    stuck: AtomicBool,
}

impl EventFd {
    /// A fresh non-blocking counter at zero.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = rustix::event::eventfd(0, flags)?;
        Ok(Self { fd, writing: Writing::Immediate, stuck: AtomicBool::new(false) })
    }

    /// Takes a descriptor that a peer sent. Nothing is assumed of it: a write or read that fails or would block is nothing.
    /// Its `O_NONBLOCK` is left as it is, because the flag is the peer's too and the peer may rely on a blocking read.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        let immediate = rustix::fs::fcntl_getfl(&fd)
            .is_ok_and(|flags| flags.contains(rustix::fs::OFlags::NONBLOCK));
        let writing = if immediate { Writing::Immediate } else { Writing::MayWait };
        Self { fd, writing, stuck: AtomicBool::new(false) }
    }

    /// Takes a descriptor that a peer sent, if it is an eventfd, which is what front ends on Linux send. A write to anything else may
    /// take as long as its peer likes, and nobody can end that: to a file on a slow disk or of a file system in user space, and also to
    /// a pipe, whose lock its reader has while it brings in the page that it reads into.
    ///
    /// # Errors
    /// It is something else; it is closed. Where `/proc` does not say, it is taken for an eventfd.
    pub fn from_peer(fd: OwnedFd) -> io::Result<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        // Not by fstat, which asks a file system in user space.
        let is_event = link
            .map_or(true, |link| link.as_os_str().as_encoded_bytes() == b"anon_inode:[eventfd]");
        if is_event { Ok(Self::from_fd(fd)) } else { Err(io::Error::other("it is no eventfd")) }
    }

    /// Adds one, waking whoever waits. A full counter is as good as a signal, so errors are dropped.
    ///
    /// One system call, two for a peer's blocking descriptor. A peer that fills the counter between the two, or takes the
    /// non-blocking flag away, stops its caller until that is nudged ([`crate::Nudge`]), once: from then on nothing is written.
    #[inline]
    pub fn signal(&self) {
        if self.is_stuck() || (self.writing == Writing::MayWait && !self.has_room()) {
            return;
        }
        let written = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        if written == Err(rustix::io::Errno::INTR) {
            self.stuck.store(true, Ordering::Relaxed);
            incidents::add();
        }
    }

    /// The same for a thread that is not nudged, as one of the control side: whatever the descriptor's flags were, they are the
    /// peer's to change, so it is asked first whether it has room. A full counter wakes its reader already. What is left to
    /// the peer is the moment between the two calls.
    pub fn signal_unless_full(&self) {
        if self.has_room() {
            self.signal();
        }
    }

    /// Whether its peer has made a writer wait.
    #[inline]
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::OUT)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Takes the count, so that the descriptor is no longer readable; says whether there was one. Never waits, whatever the
    /// descriptor's flags say.
    #[inline]
    pub fn drain(&self) -> bool {
        const CURRENT_POSITION: u64 = u64::MAX;
        let mut count = [0; 8];
        let mut into = [io::IoSliceMut::new(&mut count)];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        rustix::io::preadv2(&self.fd, &mut into, CURRENT_POSITION, flags).is_ok()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
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
        let mut set = WaitSet::with_capacity(1);
        set.add(&event);
        let start = Instant::now();
        set.sleep(Some(20_000_000));
        assert!(start.elapsed() >= Duration::from_millis(20));
        event.signal();
        set.sleep(None);
        assert!(event.drain());
        assert!(!event.drain());
    }

    #[test]
    fn a_peers_blocking_descriptor_is_neither_waited_for_nor_made_non_blocking() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let peer = fd.try_clone().unwrap();
        let event = EventFd::from_fd(fd);
        assert!(!event.drain());
        rustix::io::write(&peer, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        assert!(event.drain());
        event.signal();
        assert!(event.drain());
        let flags = rustix::fs::fcntl_getfl(&peer).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    }

    #[test]
    fn a_peers_event_is_an_eventfd() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let event = EventFd::from_peer(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        event.unwrap().signal();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for other in [tempfile::tempfile().unwrap().into(), OwnedFd::from(socket), reader, writer] {
            assert!(EventFd::from_peer(other).is_err());
        }
    }

    #[test]
    fn a_writer_that_a_peer_has_stopped_is_nudged_out_and_stopped_only_once() {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = rustix::event::eventfd(0, flags).unwrap();
        let peer = fd.try_clone().unwrap();
        let event = EventFd::from_fd(fd);
        rustix::io::write(&peer, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&peer, rustix::fs::OFlags::RDWR).unwrap();
        let (sender, started) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            sender.send(crate::Nudge::current().unwrap()).unwrap();
            event.signal();
            event.signal();
            event.is_stuck()
        });
        let nudge = started.recv().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished(), "it waits");
        while !writer.is_finished() {
            nudge.nudge();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(writer.join().unwrap());
    }
}
