//! What a reactor polls, and what it lends a poller for a turn.

use resilver_sys::{RegionTable, WaitSet};

use crate::time::Nanos;
use crate::watch::Watch;

/// What a poller is lent for the length of a call.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The time, read once at the beginning of the turn.
    pub now: Nanos,
    /// The memory regions of this reactor.
    pub memory: &'a RegionTable,
}

/// Whether a turn did anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Nothing was there to do. A poller that goes on answering this is polled less often.
    Idle,
    /// Nothing moved, but something is in flight whose end must be seen at once.
    Waiting,
    /// Something moved.
    Busy,
}

impl Work {
    /// Busy if anything was counted.
    #[must_use]
    pub fn from_count(count: usize) -> Self {
        if count == 0 { Self::Idle } else { Self::Busy }
    }

    /// What holds for two together: the busier of them.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        self.max(other)
    }
}

/// A poller's answer to "may we sleep?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Armed {
    /// No: work is ready, or is about to be and a sleep would cost more than the wait.
    Ready,
    /// Yes, until a descriptor it added becomes readable or the deadline passes.
    Until(Option<Nanos>),
}

impl Armed {
    /// What holds for two pollers together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Until(one), Self::Until(two)) => Self::Until(match (one, two) {
                (Some(one), Some(two)) => Some(one.min(two)),
                (one, two) => one.or(two),
            }),
            (Self::Ready, _) | (_, Self::Ready) => Self::Ready,
        }
    }
}

/// Bounded work, done again and again on one reactor.
pub trait Poller: Send {
    /// Called once on the reactor's thread before the first `poll`: register memory, bind rings to the thread.
    fn started(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    /// Does a bounded piece of work. Never blocks, never allocates.
    fn poll(&mut self, cx: &Context<'_>) -> Work;

    /// It has just answered [`Work::Idle`]: adds what could give it work, apart from messages. Until that changes it need
    /// not be polled to be found idle again. It is polled all the same, about every 100 ms; so what is neither in its watch nor a
    /// message is seen that late.
    fn watch(&self, watch: &mut Watch) {
        watch.give_up();
    }

    /// The reactor is about to sleep: enable notifications, add the descriptors that carry them, and look once more for
    /// work that came in meanwhile.
    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed;

    /// The reactor slept, or thought better of it: disable notifications again.
    fn disarm(&mut self, cx: &Context<'_>);

    /// Called once on the reactor's thread after the last `poll`, before the poller is handed back.
    fn stopped(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }
}
