//! The reactor: one pinned thread, its pollers, and when it may sleep.
//!
//! A turn reads the clock, takes messages, and polls every poller once, those that have been quiet for long less often
//! ([`crate::roster`]). Under [`Idle::Spin`] that is all. Under [`Idle::Adaptive`], after [`ReactorConfig::spin_for`] without
//! work, every poller is armed, everything is looked at once more, and the thread sleeps until a descriptor, a message or the
//! nearest deadline. The first sleep after arming lasts at most [`FIRST_SLEEP`], because some drivers check for notifications
//! without a fence and may have missed that we armed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::{fmt, io, thread};

use resilver_sys::{Nudge, RegionTable, WaitSet};

use crate::doorbell::Doorbell;
use crate::mailbox::{MailboxFull, Receiver, Sender, mailbox};
use crate::poller::{Armed, Context, Poller, Work};
use crate::roster::Roster;
use crate::stats::ReactorStats;
use crate::time::{Clock, Nanos};

/// Messages a reactor's mailbox holds before it refuses more.
const MAILBOX_CAPACITY: usize = 1024;
/// Memory regions of one reactor: guests with many memory slots each.
const REGION_CAPACITY: usize = resilver_sys::region::REGIONS_MAX;
/// The longest first sleep after notifications were armed.
pub const FIRST_SLEEP: Nanos = Nanos::from_millis(1);
/// The longest sleep at all: a bound on how long anything that was missed can stay missed.
pub const LONGEST_SLEEP: Nanos = Nanos::from_millis(100);

/// What a reactor does when nothing is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idle {
    /// Polls for ever: the lowest latency, a whole core.
    Spin,
    /// Polls for a while, then sleeps until something happens.
    Adaptive,
}

/// How a reactor is set up.
#[derive(Debug, Clone)]
pub struct ReactorConfig {
    /// The core to pin to; none leaves the thread where the scheduler puts it.
    pub core: Option<usize>,
    /// What to do when idle.
    pub idle: Idle,
    /// How long [`Idle::Adaptive`] polls without finding work before it sleeps.
    pub spin_for: Nanos,
    /// The clock, replaceable by tests.
    pub clock: Clock,
}

impl Default for ReactorConfig {
    fn default() -> Self {
        Self {
            core: None,
            idle: Idle::Adaptive,
            spin_for: Nanos::from_micros(200),
            clock: Clock::monotonic(),
        }
    }
}

/// A poller on some reactor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PollerId(pub(crate) u64);

/// What to do with a poller that comes back.
type HandBack = Box<dyn FnOnce(Box<dyn Poller>) + Send>;

enum Message {
    Add(PollerId, Box<dyn Poller>),
    Remove(PollerId, HandBack),
    Stop,
}

/// Why a reactor could not be asked, or not be started.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    /// Its mailbox is full.
    #[error("reactor {core} does not keep up with its messages; try again")]
    MailboxFull {
        /// The reactor's core.
        core: usize,
    },
    /// The core does not exist or is not ours to use.
    #[error(
        "cannot pin a reactor to core {core}: it does not exist or this process may not run on it"
    )]
    Pin {
        /// The core asked for.
        core: usize,
    },
    /// The kernel refused a thread or descriptor.
    #[error("cannot start a reactor: {0}")]
    Start(#[from] io::Error),
}

/// Control's side of a reactor; cheap to clone.
#[derive(Clone)]
pub struct ReactorHandle {
    sender: Sender<Message>,
    doorbell: Arc<Doorbell>,
    stats: Arc<ReactorStats>,
    next_id: Arc<AtomicU64>,
    nudge: Nudge,
    core: usize,
}

impl fmt::Debug for ReactorHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReactorHandle").field("core", &self.core).finish_non_exhaustive()
    }
}

impl ReactorHandle {
    /// Moves a poller in.
    ///
    /// # Errors
    /// The mailbox is full; the poller is dropped.
    pub fn add(&self, poller: Box<dyn Poller>) -> Result<PollerId, ReactorError> {
        let id = PollerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        self.send(Message::Add(id, poller))?;
        Ok(id)
    }

    /// Asks for a poller back; `hand_back` is called with it on the reactor's thread, and should only pass it on. An unknown
    /// id is not answered.
    ///
    /// # Errors
    /// The mailbox is full.
    pub fn remove(
        &self,
        id: PollerId,
        hand_back: impl FnOnce(Box<dyn Poller>) + Send + 'static,
    ) -> Result<(), ReactorError> {
        self.send(Message::Remove(id, Box::new(hand_back)))
    }

    /// The doorbell, for mailboxes of pollers that live here.
    #[must_use]
    pub fn doorbell(&self) -> Arc<Doorbell> {
        Arc::clone(&self.doorbell)
    }

    /// The reactor's counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<ReactorStats> {
        &self.stats
    }

    /// The core it is pinned to, or its number where it is not pinned.
    #[must_use]
    pub fn core(&self) -> usize {
        self.core
    }

    /// Nudges it out of a system call that does not return, if it has made no turn since there were `before` of them and does not
    /// sleep. Answers how many turns there are now: what to say next time. See [`Nudge`].
    #[must_use]
    pub fn nudge_if_stuck(&self, before: u64) -> u64 {
        let turns = self.stats.turns.get();
        if turns == before && !self.doorbell.is_asleep() {
            self.nudge.nudge();
        }
        turns
    }

    fn send(&self, message: Message) -> Result<(), ReactorError> {
        self.sender
            .send(message)
            .map_err(|MailboxFull(_)| ReactorError::MailboxFull { core: self.core })
    }
}

/// A running reactor. Dropping it stops the thread and drops its pollers there.
#[derive(Debug)]
pub struct Reactor {
    handle: ReactorHandle,
    thread: Option<JoinHandle<()>>,
}

impl Reactor {
    /// Starts a reactor; returns once its thread is pinned. `number` names it where no core does.
    ///
    /// # Errors
    /// The core cannot be used, or the kernel refuses a thread or descriptor.
    pub fn start(config: ReactorConfig, number: usize) -> Result<Self, ReactorError> {
        let doorbell = Arc::new(Doorbell::new()?);
        let (sender, receiver) = mailbox(MAILBOX_CAPACITY, Arc::clone(&doorbell));
        let stats = Arc::new(ReactorStats::default());
        let core = config.core.unwrap_or(number);
        let (bell, counters) = (Arc::clone(&doorbell), Arc::clone(&stats));
        let (pinned_sender, pinned) = crossbeam::channel::bounded(1);
        let thread = thread::Builder::new().name(format!("reactor-{core}")).spawn(move || {
            let fits = config.core.is_none_or(pin);
            let nudge = Nudge::current();
            let starts = fits && nudge.is_ok();
            let _ = pinned_sender.send(fits.then_some(nudge));
            if starts {
                Loop::new(config, receiver, bell, counters).run();
            }
        })?;
        let nudge = pinned.recv().ok().flatten().ok_or(ReactorError::Pin { core })??;
        let next_id = Arc::new(AtomicU64::new(1));
        let handle = ReactorHandle { sender, doorbell, stats, next_id, nudge, core };
        Ok(Self { handle, thread: Some(thread) })
    }

    /// Control's side of it.
    #[must_use]
    pub fn handle(&self) -> &ReactorHandle {
        &self.handle
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // A reactor that is alive empties its mailbox, so this ends.
        while self.handle.send(Message::Stop).is_err() {
            thread::yield_now();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Pins this thread; false where the core does not exist or is outside our cpuset.
fn pin(core: usize) -> bool {
    // core_affinity panics on ids that a cpu_set_t cannot hold.
    core < 1024 && core_affinity::set_for_current(core_affinity::CoreId { id: core })
}

/// The state of the reactor's thread.
struct Loop {
    config: ReactorConfig,
    receiver: Receiver<Message>,
    doorbell: Arc<Doorbell>,
    stats: Arc<ReactorStats>,
    memory: RegionTable,
    roster: Roster,
    wait_set: WaitSet,
    /// When work was last found.
    last_busy: Nanos,
    /// Whether the last sleep ended with nothing to do, so that the next may be longer.
    slept_in_vain: bool,
}

impl Loop {
    fn new(
        config: ReactorConfig,
        receiver: Receiver<Message>,
        doorbell: Arc<Doorbell>,
        stats: Arc<ReactorStats>,
    ) -> Self {
        let last_busy = config.clock.now();
        Self {
            config,
            receiver,
            doorbell,
            stats,
            memory: RegionTable::with_capacity(REGION_CAPACITY),
            roster: Roster::default(),
            wait_set: WaitSet::with_capacity(64),
            last_busy,
            slept_in_vain: false,
        }
    }

    fn run(mut self) {
        let mut now = self.config.clock.now();
        while let Some(work) = self.turn(now) {
            let after = self.config.clock.now();
            self.account(work, now, after);
            now = after;
            let idle = now - self.last_busy >= self.config.spin_for && !self.roster.has_unseen();
            if self.config.idle == Idle::Adaptive && idle {
                self.sleep(now);
                let woken = self.config.clock.now();
                self.stats.idle_ns.add((woken - now).0);
                now = woken;
            }
        }
        let cx = Context { now, memory: &self.memory };
        self.roster.stop(&cx);
    }

    /// One turn; none when told to stop.
    fn turn(&mut self, now: Nanos) -> Option<Work> {
        let mut work = Work::Idle;
        while let Some(message) = self.receiver.receive() {
            self.take(message, now)?;
            work = Work::Busy;
        }
        // A mailbox of a quiet poller is not looked at every turn.
        if self.doorbell.was_rung() {
            self.roster.expect_anything();
        }
        let cx = Context { now, memory: &self.memory };
        Some(work.or(self.roster.poll(&cx)))
    }

    /// Carries out a message; none when it is the last.
    fn take(&mut self, message: Message, now: Nanos) -> Option<()> {
        let cx = Context { now, memory: &self.memory };
        match message {
            Message::Add(id, mut poller) => {
                poller.started(&cx);
                self.roster.add(id, poller, now);
            }
            Message::Remove(id, hand_back) => {
                if let Some(mut poller) = self.roster.remove(id) {
                    poller.stopped(&cx);
                    hand_back(poller);
                }
            }
            Message::Stop => return None,
        }
        self.stats.pollers.set(self.roster.len() as u64);
        Some(())
    }

    fn account(&mut self, work: Work, before: Nanos, after: Nanos) {
        let spent = (after - before).0;
        self.stats.turns.add(1);
        match work {
            Work::Busy => {
                self.last_busy = after;
                self.slept_in_vain = false;
                self.stats.busy_ns.add(spent);
            }
            Work::Idle | Work::Waiting => self.stats.idle_ns.add(spent),
        }
    }

    /// Arms everything, looks once more and sleeps.
    fn sleep(&mut self, now: Nanos) {
        let cx = Context { now, memory: &self.memory };
        self.wait_set.clear();
        self.doorbell.about_to_sleep(&mut self.wait_set);
        let (armed, count) = if self.receiver.is_empty() {
            self.roster.arm(&cx, &mut self.wait_set)
        } else {
            (Armed::Ready, 0)
        };
        let mut slept = false;
        if let Armed::Until(deadline) = armed {
            let longest = if self.slept_in_vain { LONGEST_SLEEP } else { FIRST_SLEEP };
            let length = deadline.map_or(longest, |deadline| (deadline - now).min(longest));
            self.stats.sleeps.add(1);
            self.wait_set.sleep(Some(length.0));
            slept = true;
        }
        self.doorbell.awake(slept);
        self.roster.disarm(&cx, count);
        self.roster.expect_anything();
        if slept {
            self.slept_in_vain = true;
        } else {
            // Someone was about to have work: go on polling for a whole span before asking again.
            self.last_busy = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    /// Counts what a reactor does to it.
    #[derive(Default)]
    struct Calls {
        polls: AtomicUsize,
        arms: AtomicUsize,
        started: AtomicUsize,
        stopped: AtomicUsize,
    }

    struct Probe(Arc<Calls>);

    impl Poller for Probe {
        fn started(&mut self, _cx: &Context<'_>) {
            self.0.started.fetch_add(1, Ordering::SeqCst);
        }
        fn poll(&mut self, _cx: &Context<'_>) -> Work {
            self.0.polls.fetch_add(1, Ordering::SeqCst);
            Work::Idle
        }
        fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
            self.0.arms.fetch_add(1, Ordering::SeqCst);
            Armed::Until(None)
        }
        fn disarm(&mut self, _cx: &Context<'_>) {}
        fn stopped(&mut self, _cx: &Context<'_>) {
            self.0.stopped.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn wait_until(condition: impl Fn() -> bool) {
        for _ in 0..10_000 {
            if condition() {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("the condition was not met within 10 s");
    }

    #[test]
    fn a_poller_is_moved_in_polled_and_handed_back() {
        let reactor = Reactor::start(ReactorConfig::default(), 0).unwrap();
        let calls = Arc::new(Calls::default());
        let id = reactor.handle().add(Box::new(Probe(Arc::clone(&calls)))).unwrap();
        wait_until(|| calls.polls.load(Ordering::SeqCst) > 3);
        let (sender, receiver) = crossbeam::channel::bounded(1);
        reactor.handle().remove(id, move |poller| sender.send(poller).unwrap()).unwrap();
        drop(receiver.recv_timeout(Duration::from_secs(10)).unwrap());
        assert_eq!(calls.started.load(Ordering::SeqCst), 1);
        assert_eq!(calls.stopped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_idle_reactor_sleeps_and_a_message_wakes_it() {
        let reactor = Reactor::start(ReactorConfig::default(), 0).unwrap();
        let stats = Arc::clone(reactor.handle().stats());
        wait_until(|| stats.sleeps.get() > 2);
        let calls = Arc::new(Calls::default());
        reactor.handle().add(Box::new(Probe(Arc::clone(&calls)))).unwrap();
        wait_until(|| calls.arms.load(Ordering::SeqCst) > 0);
        let (busy, idle) = stats.busy_idle_seconds();
        assert!(idle > busy);
    }

    #[test]
    fn a_spinning_reactor_never_arms() {
        let config = ReactorConfig { idle: Idle::Spin, ..ReactorConfig::default() };
        let reactor = Reactor::start(config, 0).unwrap();
        let calls = Arc::new(Calls::default());
        reactor.handle().add(Box::new(Probe(Arc::clone(&calls)))).unwrap();
        wait_until(|| calls.polls.load(Ordering::SeqCst) > 1000);
        drop(reactor);
        assert_eq!(calls.arms.load(Ordering::SeqCst), 0);
        assert_eq!(calls.stopped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn more_pollers_than_are_polled_in_the_time_before_a_sleep_do_not_keep_it_awake() {
        let spin_for = Nanos::from_micros(20);
        let config = ReactorConfig { spin_for, ..ReactorConfig::default() };
        let reactor = Reactor::start(config, 0).unwrap();
        let calls = Arc::new(Calls::default());
        for _ in 0..900 {
            reactor.handle().add(Box::new(Probe(Arc::clone(&calls)))).unwrap();
        }
        wait_until(|| reactor.handle().stats().sleeps.get() > 3);
    }

    #[test]
    fn a_core_that_does_not_exist_is_refused() {
        let config = ReactorConfig { core: Some(4096), ..ReactorConfig::default() };
        assert!(matches!(Reactor::start(config, 0), Err(ReactorError::Pin { core: 4096 })));
    }

    #[test]
    fn a_pinned_reactor_runs_where_it_was_told() {
        let config = ReactorConfig { core: Some(0), ..ReactorConfig::default() };
        let reactor = Reactor::start(config, 7).unwrap();
        assert_eq!(reactor.handle().core(), 0);
    }
}
