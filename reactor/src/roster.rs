//! The roster: which pollers a turn polls.
//!
//! A reactor with a thousand disks has few that are busy. Polling all of them every turn would make the busy ones pay for the
//! rest: each look at an idle disk costs some cache misses, and the turn of a busy disk is a few microseconds long. So a poller
//! that has found nothing for a while is *quiet* and polled at a pace: every 8 µs at first, and at twice the interval each time
//! it has been idle for `PATIENCE` intervals, up to `SLOWEST`. What comes to a quiet poller is thus seen later by at most a
//! sixteenth of the time it was idle for, and by no more than 2 ms; unless there are so many that looking at them in time would
//! take the busy ones more than a few percent. Quiet pollers are polled one by one, `SPACING` apart, those first that have
//! waited longest: a thousand are seen every 5 ms, and no turn is longer than others because many are due in it, but for some
//! percent of the turn before, whose share it makes up for.
//!
//! Paces are kept only where somebody gains: on a reactor that has found no work for `REST` quiet pollers are polled as fast as
//! turns go. Whoever rings the doorbell, and the end of a sleep, gets everyone polled, some in each turn: to poll a thousand takes
//! most of a millisecond, and a message is for one of them. A poller that waits for what is in flight is not quiet
//! ([`Work::Waiting`]).
//!
//! In place of a poll a quiet poller that can say what would give it work has that looked at ([`Watch`]), which takes a fraction of
//! the time. It is polled all the same, about every `SURELY`.
//!
//! Each pace has a queue in order of what is due. A turn looks at their heads, so what it costs does not depend on how
//! many are quiet. Queues have room for every poller: nothing is allocated in a turn.
//!
//! Rejected: watching the kicks of quiet disks (their guests would pay an exit for each first request, and asking the kernel for
//! them costs the busy ones a system call); a fixed interval (too long for a disk that rests for microseconds, too short for a
//! thousand that rest for good).

use std::collections::VecDeque;

use crate::poller::{Armed, Context, Poller, Work};
use crate::reactor::PollerId;
use crate::time::Nanos;
use crate::watch::Watch;
use resilver_sys::{WaitSet, prefetch_value};

/// How often a poller is polled that has just become quiet.
const FASTEST: Nanos = Nanos::from_micros(8);
/// Paces, each with twice the interval of the one before.
const PACES: usize = 9;
/// How often a poller is polled that has been quiet for long.
pub const SLOWEST: Nanos = interval(PACES - 1);
/// A poller that has been idle for so many intervals of a pace goes over to it.
const PATIENCE: u64 = 16;
/// How long what a watch missed can stay missed, as [`crate::reactor::LONGEST_SLEEP`] is for a sleep; and by how much sooner some are
/// polled than others, lest all that were polled together were so again.
const SURELY: Nanos = Nanos::from_millis(100);
const SPREAD: u64 = 32;
/// The time between two looks at quiet pollers. A poll of an idle disk takes half a microsecond, most of it cache misses; a look at its
/// watch up to a fifth in a virtual machine, to find the page of a guest that nobody has looked at for long: no fetching ahead hides
/// that.
const SPACING: Nanos = Nanos::from_micros(5);
/// After a long turn the next one makes up for what was due meanwhile, or in so much of it: in a longer one somebody else had the
/// core.
const MADE_UP: Nanos = Nanos::from_millis(1);
/// Quiet pollers that a turn polls where everyone is to be polled: at least; and of turns that are longer one for so much of the last
/// one, which is about a quarter of it.
const AT_ONCE: u64 = 8;
const ONE_FOR: Nanos = Nanos::from_micros(2);
/// How long the reactor must have found no work for paces to be of no use.
const REST: Nanos = Nanos::from_micros(20);

/// The time between two polls at this pace.
const fn interval(pace: usize) -> Nanos {
    Nanos(FASTEST.0 << pace)
}

struct Seat {
    id: PollerId,
    poller: Box<dyn Poller>,
    /// When it last did something or waited for something.
    active: Nanos,
    /// When it is to be polled next, if it is quiet.
    due: Nanos,
    /// What is looked at in place of a poll, if it is quiet.
    watch: Box<Watch>,
    /// When it was last polled, if it is quiet.
    polled: Nanos,
    /// How many rings there were when it was last polled or looked at, if it is quiet.
    rings: u64,
}

impl Seat {
    /// Whether a look at its watch does in place of a poll.
    fn may_be_looked_at(&self, now: Nanos) -> bool {
        now - self.polled < SURELY - Nanos::from_millis(self.id.0 % SPREAD)
    }
}

/// The pollers of a reactor.
#[derive(Default)]
pub(crate) struct Roster {
    /// Polled every turn.
    busy: Vec<Seat>,
    /// Polled at a pace; each in order of what is due.
    quiet: [VecDeque<Seat>; PACES],
    /// When a turn last found work.
    worked: Nanos,
    /// When a quiet poller may be looked at next.
    next_quiet: Nanos,
    /// How often something may have come for any of them; and whether there are any that were not polled since.
    rings: u64,
    unseen: bool,
    /// When the last turn was.
    turned: Nanos,
}

impl Roster {
    /// Takes a poller in; it is polled every turn at first.
    pub(crate) fn add(&mut self, id: PollerId, poller: Box<dyn Poller>, now: Nanos) {
        let watch = Box::default();
        let rings = self.rings;
        self.busy.push(Seat { id, poller, active: now, due: now, watch, polled: now, rings });
        let len = self.len();
        for quiet in &mut self.quiet {
            quiet.reserve(len - quiet.len());
        }
        self.busy.reserve(len - self.busy.len());
    }

    /// Gives a poller up.
    pub(crate) fn remove(&mut self, id: PollerId) -> Option<Box<dyn Poller>> {
        if let Some(at) = self.busy.iter().position(|seat| seat.id == id) {
            return Some(self.busy.remove(at).poller);
        }
        self.quiet.iter_mut().find_map(|quiet| {
            let at = quiet.iter().position(|seat| seat.id == id)?;
            quiet.remove(at).map(|seat| seat.poller)
        })
    }

    /// How many pollers there are.
    pub(crate) fn len(&self) -> usize {
        self.busy.len() + self.quiet.iter().map(VecDeque::len).sum::<usize>()
    }

    /// Something may have come for any of them: the next turns poll all.
    pub(crate) fn expect_anything(&mut self) {
        self.rings += 1;
        self.unseen = true;
    }

    /// Whether something may have come for one that was not polled since.
    #[inline]
    pub(crate) fn has_unseen(&self) -> bool {
        self.unseen
    }

    /// One turn.
    #[inline]
    pub(crate) fn poll(&mut self, cx: &Context<'_>) -> Work {
        let mut work = self.poll_busy(cx);
        if self.unseen {
            work = work.or(self.poll_unseen(cx));
        } else if self.turned - self.worked >= REST {
            for pace in 0..PACES {
                work = work.or(self.poll_quiet(cx, pace));
            }
        } else {
            self.next_quiet = self.next_quiet.max(self.turned).max(cx.now - MADE_UP);
            while cx.now >= self.next_quiet
                && let Some(pace) = self.longest_due(cx.now)
            {
                self.next_quiet = self.next_quiet + SPACING;
                work = work.or(self.poll_quiet(cx, pace));
            }
        }
        self.turned = cx.now;
        if work == Work::Busy {
            self.worked = cx.now;
        }
        work
    }

    #[inline]
    fn poll_busy(&mut self, cx: &Context<'_>) -> Work {
        let (mut work, mut at) = (Work::Idle, 0);
        while let Some(seat) = self.busy.get_mut(at) {
            match seat.poller.poll(cx) {
                Work::Idle if cx.now - seat.active >= Nanos(FASTEST.0 * PATIENCE) => {
                    let mut seat = self.busy.swap_remove(at);
                    seat.watch.ask(&*seat.poller);
                    seat.polled = cx.now;
                    self.queue(seat, 0, cx.now);
                    continue;
                }
                Work::Idle => {}
                found => {
                    seat.active = cx.now;
                    work = work.or(found);
                }
            }
            at += 1;
        }
        work
    }

    /// The pace whose first poller is due, and has been for longer than those of the others.
    #[inline]
    fn longest_due(&self, now: Nanos) -> Option<usize> {
        let due = |pace: &usize| self.quiet[*pace].front().map(|seat| seat.due);
        (0..PACES)
            .filter(|pace| due(pace).is_some_and(|due| due <= now))
            .min_by_key(|pace| due(pace))
    }

    /// Polls some of those that were not since something may have come for them. They are at the heads of the queues; those first that
    /// have waited for most rings, or a ring in each turn would have only some polled.
    fn poll_unseen(&mut self, cx: &Context<'_>) -> Work {
        let mut work = Work::Idle;
        for _ in 0..((cx.now - self.turned).0 / ONE_FOR.0).max(AT_ONCE) {
            let rings = |pace: &usize| self.quiet[*pace].front().map(|seat| seat.rings);
            let first = (0..PACES).filter(|pace| rings(pace).is_some_and(|it| it < self.rings));
            let Some(pace) = first.min_by_key(|pace| rings(pace)) else {
                self.unseen = false;
                break;
            };
            work = work.or(self.poll_quiet(cx, pace));
        }
        work
    }

    /// Polls the first of a pace, if there is one and nothing shows that it has no work.
    fn poll_quiet(&mut self, cx: &Context<'_>, pace: usize) -> Work {
        let Some(mut seat) = self.quiet[pace].pop_front() else { return Work::Idle };
        if let Some(next) = self.quiet[pace].front() {
            next.watch.prefetch();
        }
        if let Some(after_next) = self.quiet[pace].get(1) {
            prefetch_value(&*after_next.watch);
        }
        // A watch shows no messages.
        let was_rung = seat.rings < self.rings;
        let work = if !was_rung && seat.may_be_looked_at(cx.now) && seat.watch.is_still() {
            Work::Idle
        } else {
            seat.polled = cx.now;
            seat.watch.poll(&mut *seat.poller, cx)
        };
        if work == Work::Idle {
            let slower = (pace + 1).min(PACES - 1);
            let long = cx.now - seat.active >= Nanos(interval(slower).0 * PATIENCE);
            self.queue(seat, if long { slower } else { pace }, cx.now);
        } else {
            seat.active = cx.now;
            self.busy.push(seat);
        }
        work
    }

    fn queue(&mut self, mut seat: Seat, pace: usize, now: Nanos) {
        seat.due = now + interval(pace);
        seat.rings = self.rings;
        self.quiet[pace].push_back(seat);
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Box<dyn Poller>> {
        self.busy.iter_mut().chain(self.quiet.iter_mut().flatten()).map(|seat| &mut seat.poller)
    }

    /// Arms all of them, until one of them has work. Answers how many were armed too, for [`Roster::disarm`].
    pub(crate) fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> (Armed, usize) {
        let (mut armed, mut count) = (Armed::Until(None), 0);
        for poller in self.all() {
            armed = armed.and(poller.arm(cx, set));
            count += 1;
            if armed == Armed::Ready {
                break;
            }
        }
        (armed, count)
    }

    /// Disarms those that were armed.
    pub(crate) fn disarm(&mut self, cx: &Context<'_>, count: usize) {
        for poller in self.all().take(count) {
            poller.disarm(cx);
        }
    }

    /// The reactor stops.
    pub(crate) fn stop(&mut self, cx: &Context<'_>) {
        for poller in self.all() {
            poller.stopped(cx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use resilver_sys::{Area, Mapping, RegionTable};

    /// What a test and its poller know of each other.
    #[derive(Default)]
    struct Shared {
        polls: AtomicU64,
        /// What the next polls find.
        finds: AtomicU64,
    }

    struct Probe(Arc<Shared>);

    /// A poller whose work comes with a word of memory, which its watch must not keep while it is polled.
    struct Watching {
        shared: Arc<Shared>,
        mapping: Arc<Mapping>,
        known: u16,
    }

    impl Watching {
        fn area(&self) -> Area {
            Area::new(&self.mapping, 0, 2, 2).unwrap()
        }
    }

    impl Poller for Watching {
        fn poll(&mut self, _cx: &Context<'_>) -> Work {
            self.shared.polls.fetch_add(1, Ordering::Relaxed);
            assert_eq!(Arc::strong_count(&self.mapping), 2, "the test's and this one");
            let known = self.area().load_u16(0, Ordering::Acquire);
            Work::from_count((std::mem::replace(&mut self.known, known) != known).into())
        }
        fn watch(&self, watch: &mut Watch) {
            watch.add(&self.area(), 0, self.known);
        }
        fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
            Armed::Until(None)
        }
        fn disarm(&mut self, _cx: &Context<'_>) {}
    }

    const WAITS: u64 = u64::MAX;

    impl Poller for Probe {
        fn poll(&mut self, _cx: &Context<'_>) -> Work {
            self.0.polls.fetch_add(1, Ordering::Relaxed);
            match self.0.finds.load(Ordering::Relaxed) {
                0 => Work::Idle,
                WAITS => Work::Waiting,
                some => {
                    self.0.finds.store(some - 1, Ordering::Relaxed);
                    Work::Busy
                }
            }
        }
        fn arm(&mut self, _cx: &Context<'_>, _set: &mut WaitSet) -> Armed {
            Armed::Until(None)
        }
        fn disarm(&mut self, _cx: &Context<'_>) {}
    }

    struct Bench {
        roster: Roster,
        memory: RegionTable,
        now: Nanos,
        next: u64,
    }

    impl Bench {
        fn new() -> Self {
            let memory = RegionTable::with_capacity(1);
            Self { roster: Roster::default(), memory, now: Nanos::ZERO, next: 0 }
        }

        fn add(&mut self, finds: u64) -> Arc<Shared> {
            let shared = Arc::new(Shared::default());
            shared.finds.store(finds, Ordering::Relaxed);
            self.move_in(Box::new(Probe(Arc::clone(&shared))));
            shared
        }

        fn add_watching(&mut self) -> (Arc<Shared>, Arc<Mapping>) {
            let shared = Arc::new(Shared::default());
            let mapping = Mapping::anonymous(4096).unwrap();
            let poller =
                Watching { shared: Arc::clone(&shared), mapping: Arc::clone(&mapping), known: 0 };
            self.move_in(Box::new(poller));
            (shared, mapping)
        }

        fn move_in(&mut self, poller: Box<dyn Poller>) {
            self.roster.add(PollerId(self.next), poller, self.now);
            self.next += 1;
        }

        fn turn(&mut self) -> Work {
            self.now = self.now + Nanos(1_000);
            self.roster.poll(&Context { now: self.now, memory: &self.memory })
        }

        fn turns_for(&mut self, span: Nanos) -> u64 {
            let end = self.now + span;
            let mut turns = 0;
            while self.now < end {
                self.turn();
                turns += 1;
            }
            turns
        }
    }

    fn polls(shared: &Shared) -> u64 {
        shared.polls.swap(0, Ordering::Relaxed)
    }

    fn forget<'a>(all: impl IntoIterator<Item = &'a Arc<Shared>>) {
        for shared in all {
            polls(shared);
        }
    }

    const LONG: Nanos = Nanos::from_millis(100);
    const ALWAYS: u64 = u64::MAX / 2;

    #[test]
    fn a_thousand_idle_pollers_cost_a_busy_one_a_fraction_of_a_poll_a_turn() {
        let mut bench = Bench::new();
        let busy = bench.add(ALWAYS);
        let idle: Vec<_> = (0..1000).map(|_| bench.add(0)).collect();
        bench.turns_for(LONG);
        polls(&busy);
        forget(&idle);
        let turns = bench.turns_for(LONG);
        assert_eq!(polls(&busy), turns);
        for idle in &idle {
            let seen = polls(idle);
            assert!((19..=21).contains(&seen), "polled {seen} times in {LONG}, not every 5 ms");
        }
    }

    #[test]
    fn a_hundred_idle_pollers_are_seen_at_their_pace() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let idle: Vec<_> = (0..100).map(|_| bench.add(0)).collect();
        bench.turns_for(LONG);
        forget(&idle);
        bench.turns_for(LONG);
        for idle in &idle {
            let seen = polls(idle);
            assert!(
                (45..=52).contains(&seen),
                "polled {seen} times in {LONG}, not every {SLOWEST}"
            );
        }
    }

    #[test]
    fn what_comes_is_seen_after_a_sixteenth_of_the_time_before_and_then_every_turn() {
        for idle_for in [1, 50, 100, 128, 200, 500, 1_000, 5_000, 20_000, 50_000] {
            let mut bench = Bench::new();
            bench.add(ALWAYS);
            let other = bench.add(0);
            bench.turns_for(Nanos::from_micros(idle_for));
            polls(&other);
            other.finds.store(1, Ordering::Relaxed);
            let came = bench.now;
            while other.finds.load(Ordering::Relaxed) > 0 {
                bench.turn();
            }
            let late = bench.now - came;
            let turn = Nanos(1_000);
            let bound = Nanos(idle_for * 1_000 / PATIENCE).min(SLOWEST) + turn;
            assert!(late <= bound, "{late} late after {idle_for} µs, more than {bound}");
            polls(&other);
            assert_eq!(bench.turns_for(Nanos::from_micros(100)), polls(&other));
        }
    }

    #[test]
    fn whoever_waits_is_polled_every_turn() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let waits = bench.add(WAITS);
        assert_eq!(bench.turns_for(LONG), polls(&waits));
    }

    #[test]
    fn what_a_watch_shows_is_seen_as_soon_and_polled_for_hardly_ever() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let watching: Vec<_> = (0..100).map(|_| bench.add_watching()).collect();
        bench.turns_for(LONG);
        forget(watching.iter().map(|(shared, _)| shared));
        bench.turns_for(Nanos(10 * SURELY.0));
        for (shared, _) in &watching {
            let seen = polls(shared);
            assert!((9..=15).contains(&seen), "polled {seen} times in ten times {SURELY}");
        }
        for (at, (shared, mapping)) in (1..).zip(&watching) {
            Area::new(mapping, 0, 2, 2).unwrap().store_u16(0, at, Ordering::Release);
            bench.turns_for(SLOWEST + Nanos(1_000));
            assert!(polls(shared) > 0, "not seen in {SLOWEST}");
        }
        bench.turns_for(LONG);
        bench.roster.expect_anything();
        forget(watching.iter().map(|(shared, _)| shared));
        bench.turns_for(Nanos::from_micros(13));
        for (shared, _) in &watching {
            assert_eq!(polls(shared), 1, "a ring is for them, too");
        }
    }

    #[test]
    fn a_poller_that_is_given_up_leaves_no_watch_behind() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let (_, mapping) = bench.add_watching();
        bench.turns_for(LONG);
        assert_eq!(Arc::strong_count(&mapping), 3, "a quiet poller is watched");
        let poller = bench.roster.remove(PollerId(1)).unwrap();
        assert_eq!(Arc::strong_count(&mapping), 2);
        drop(poller);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }

    #[test]
    fn a_ring_has_everyone_polled_once_in_the_next_turns_and_few_in_each() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let idle: Vec<_> = (0..100).map(|_| bench.add(0)).collect();
        bench.turns_for(LONG);
        for rings_again_after in [13, 5] {
            forget(&idle);
            bench.roster.expect_anything();
            for turn in 1..=rings_again_after {
                bench.turn();
                let seen: u64 = idle.iter().map(|idle| idle.polls.load(Ordering::Relaxed)).sum();
                assert_eq!(seen, (turn * AT_ONCE).min(100));
            }
            assert!(idle.iter().all(|idle| idle.polls.load(Ordering::Relaxed) <= 1));
        }
        bench.roster.expect_anything();
        forget(&idle);
        bench.turns_for(Nanos::from_micros(13));
        assert!(idle.iter().all(|idle| polls(idle) == 1), "those, too, that were polled before");
    }

    #[test]
    fn a_ring_in_each_turn_has_everyone_polled_in_turn() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let mut all: Vec<_> = (0..20).map(|_| bench.add(0)).collect();
        bench.turns_for(LONG);
        all.extend((0..20).map(|_| bench.add(0)));
        bench.turns_for(Nanos::from_micros(200));
        forget(&all);
        for _ in 0..50 {
            bench.roster.expect_anything();
            bench.turn();
        }
        for (at, shared) in all.iter().enumerate() {
            let seen = polls(shared);
            assert!((8..=12).contains(&seen), "{at} was polled {seen} times, of 400 in all");
        }
    }

    #[test]
    fn a_long_turn_makes_up_for_looks_and_polls_that_were_due() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let watching: Vec<_> = (0..200).map(|_| bench.add_watching()).collect();
        bench.turns_for(LONG);
        for (at, (shared, mapping)) in (1..).zip(&watching) {
            Area::new(mapping, 0, 2, 2).unwrap().store_u16(0, at, Ordering::Release);
            polls(shared);
            let mut turns = 0;
            while shared.polls.load(Ordering::Relaxed) == 0 {
                bench.now = bench.now + Nanos::from_micros(49);
                bench.turn();
                turns += 1;
            }
            assert!(turns <= SLOWEST.0 / 50_000 + 3, "{turns} of 50 us");
        }
        bench.turns_for(LONG);
        forget(watching.iter().map(|(shared, _)| shared));
        bench.roster.expect_anything();
        bench.now = bench.now + Nanos::from_micros(100);
        bench.turn();
        let seen: u64 = watching.iter().map(|(shared, _)| polls(shared)).sum();
        assert_eq!(seen, 50, "a quarter of the last turn");
    }

    #[test]
    fn after_a_turn_in_which_somebody_else_had_the_core_not_all_are_looked_at_at_once() {
        let mut bench = Bench::new();
        bench.add(ALWAYS);
        let watching: Vec<_> = (0..1000).map(|_| bench.add_watching()).collect();
        bench.turns_for(LONG);
        forget(watching.iter().map(|(shared, _)| shared));
        for (_, mapping) in &watching {
            Area::new(mapping, 0, 2, 2).unwrap().store_u16(0, 1, Ordering::Release);
        }
        bench.now = bench.now + Nanos::from_millis(20);
        bench.turn();
        let seen: u64 = watching.iter().map(|(shared, _)| polls(shared)).sum();
        assert_eq!(seen, MADE_UP.0 / SPACING.0 + 1);
    }

    #[test]
    fn on_a_reactor_at_rest_quiet_pollers_are_polled_as_fast_as_turns_go() {
        let mut bench = Bench::new();
        let idle: Vec<_> = (0..4).map(|_| bench.add(0)).collect();
        bench.turns_for(LONG);
        forget(&idle);
        let turns = bench.turns_for(LONG);
        let seen: u64 = idle.iter().map(|idle| polls(idle)).sum();
        assert_eq!(seen, turns, "one each turn");
    }

    #[test]
    fn none_is_lost_whatever_pace_it_has() {
        let mut bench = Bench::new();
        let all: Vec<_> = (0..20).map(|at| bench.add(at % 3)).collect();
        for at in 0..20u64 {
            bench.turns_for(Nanos::from_millis(at));
            assert_eq!(bench.roster.len(), 20 - usize::try_from(at).unwrap());
            assert!(bench.roster.remove(PollerId(at)).is_some());
            assert!(bench.roster.remove(PollerId(at)).is_none());
        }
        assert!(all.iter().all(|shared| Arc::strong_count(shared) == 1));
    }
}
