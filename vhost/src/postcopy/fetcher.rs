//! Who waits for pages in a reactor's place: a thread for each ring.
//!
//! The ring's reactor, or control before the ring starts, [asks](Fetcher::ask) for pages; the thread touches one after the other
//! and rings the reactor's doorbell when all that was asked for is there. Until then the ring is left alone
//! ([`Fetcher::is_idle`], one load a turn); rings of the same guest have threads of their own, so a page that does not come
//! keeps one ring.
//!
//! Waking the thread takes its asker a system call (a futex), once for each chain with a missing page. A thread that looks by itself,
//! every 50 µs say, would save that and cost a core's time for minutes; what follows is a trip over a network.
//!
//! A thread ends with its session, or with the migration; one that is in a fault then comes out of it when the regions' windows
//! are closed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;

use crossbeam::queue::ArrayQueue;
use resilver_reactor::Doorbell;

use super::pages::Wanted;

/// Pieces of memory that wait to be fetched. A chain that has more of them asks again.
const WANTED_MAX: usize = 64;
/// Bytes of the thread's stack: it calls nothing deep.
const STACK: usize = 128 << 10;

/// The pages that one ring waits for, and who fetches them.
#[derive(Debug)]
pub struct Fetcher {
    wanted: ArrayQueue<Wanted>,
    /// What was asked for and is not there yet.
    pending: AtomicU32,
    /// Pages fetched.
    fetched: AtomicU64,
    closed: AtomicBool,
    /// Of the ring's reactor.
    doorbell: Arc<Doorbell>,
    thread: OnceLock<Thread>,
}

impl Fetcher {
    /// One that has no thread: pages come when somebody who takes them with [`Fetcher::next`] says so.
    #[must_use]
    pub fn new(doorbell: Arc<Doorbell>) -> Self {
        Self {
            wanted: ArrayQueue::new(WANTED_MAX),
            pending: AtomicU32::new(0),
            fetched: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            doorbell,
            thread: OnceLock::new(),
        }
    }

    /// One with a thread.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub(crate) fn spawn(queue: u16, doorbell: Arc<Doorbell>) -> io::Result<Arc<Self>> {
        let fetcher = Arc::new(Self::new(doorbell));
        let its = Arc::clone(&fetcher);
        let thread = std::thread::Builder::new()
            .name(format!("fetch-{queue}"))
            .stack_size(STACK)
            .spawn(move || its.run())?;
        // Set once, here.
        let _ = fetcher.thread.set(thread.thread().clone());
        Ok(fetcher)
    }

    /// Asks for pages; false where there is no room to. [`Fetcher::wake`] has them fetched.
    #[must_use]
    pub fn ask(&self, wanted: Wanted) -> bool {
        self.pending.fetch_add(1, Ordering::Relaxed);
        let pushed = self.wanted.push(wanted).is_ok();
        if !pushed {
            self.answer();
        }
        pushed
    }

    /// Has the thread look at what was asked for.
    pub fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Whether all that was asked for is there.
    #[inline]
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    /// The next pages to fetch. To be followed by [`Fetcher::answer`].
    #[must_use]
    pub fn next(&self) -> Option<Wanted> {
        self.wanted.pop()
    }

    /// What [`Fetcher::next`] gave is there.
    pub fn answer(&self) {
        if self.pending.fetch_sub(1, Ordering::Release) == 1 {
            self.doorbell.ring();
        }
    }

    /// Pages fetched.
    pub(crate) fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Ends the thread, once it is out of the fault that it may be in.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    fn run(&self) {
        loop {
            while let Some(Wanted { region, pages }) = self.next() {
                for page in pages.filter(|page| !region.has(*page)) {
                    if self.closed.load(Ordering::Acquire) {
                        return;
                    }
                    region.fetch(page);
                    self.fetched.fetch_add(1, Ordering::Relaxed);
                }
                self.answer();
            }
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            std::thread::park();
        }
    }
}
