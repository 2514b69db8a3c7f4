//! What a gentle copier takes of a device beside a guest.
//!
//! A copy in flight costs a guest next to nothing on a device that does much at once, and nearly all where one thing is done after the
//! other, or by the processors that the guest runs on. Which of them it is shows in what the guest gets done: beside copies, and
//! while the copier rests for a moment. By that the copier reads less at once or more; where the least that is worth a copy still takes
//! more from the guest than it should, it rests for longer.
//!
//! Compared are rates, not latencies: they say what a guest keeps, whatever its depth. A guest that asks for little keeps it
//! all, whatever the copier does.
//!
//! | from | to | when |
//! | --- | --- | --- |
//! | off | copies | a gentle copier may begin |
//! | copies | settles | [`STRETCH`] is over, and the last copy has ended: the rest begins |
//! | settles | rests | [`SETTLED`] is over: what the guest gets done from now on is without copies |
//! | rests | copies | the rest is over; what was seen is compared |
//! | any | off | the copier has nothing to do, waits for something else, or is not gentle |

use resilver_reactor::Nanos;

/// What copies may take of the requests that the guest has answered in a time, percent: what is more is rested for.
const TAKEN: u64 = 35;
/// Copies that take more than this while they are made are to be smaller, those that take less than that larger.
const MUCH: u64 = 30;
const LITTLE: u64 = 15;
/// How long it is copied before it is rested: long beside the time of a request.
const STRETCH: Nanos = Nanos::from_millis(8);
/// The shortest rest, and how much of a rest goes by before it is counted: what was asked for beside a copy has been answered then.
const REST_LEAST: Nanos = Nanos::from_millis(2);
const SETTLED: Nanos = Nanos::from_millis(1);
/// Rests that are enough to compare, and requests that are enough in them.
const RESTS: u32 = 8;
const ANSWERS: u64 = 64;
/// Bytes that are read at once: at least, and at first; at most.
const LEAST: u64 = 128 << 10;
const MOST: u64 = 1 << 20;

/// What the copier does beside a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// Nothing, for other reasons.
    Off,
    /// It copies.
    Copies,
    /// It rests until then, and the guest still feels the last copies.
    Settles(Nanos),
    /// It rests until then.
    Rests(Nanos),
}

/// Requests that were answered in some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    time: Nanos,
    answers: u64,
}

impl Seen {
    const NOTHING: Self = Self { time: Nanos::ZERO, answers: 0 };

    fn add(&mut self, time: Nanos, answers: u64) {
        self.time = self.time + time;
        self.answers += answers;
    }
}

/// What a gentle copier takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    phase: Phase,
    since: Nanos,
    /// Requests answered in this phase.
    answers: u64,
    /// With the present window: beside copies, at rest, and how many rests that were.
    beside: Seen,
    at_rest: Seen,
    rests: u32,
    /// Percent of the guest's requests that copies take while they are made.
    lost: u64,
    window: u64,
}

impl Share {
    /// Before anything has been seen all is taken to be lost.
    pub(super) const NEW: Self = Self {
        phase: Phase::Off,
        since: Nanos::ZERO,
        answers: 0,
        beside: Seen::NOTHING,
        at_rest: Seen::NOTHING,
        rests: 0,
        lost: 100,
        window: LEAST,
    };

    /// Bytes to be read at once.
    pub(super) fn window(&self) -> u64 {
        self.window
    }

    /// A request of the guest was answered.
    #[inline]
    pub(super) fn answered(&mut self) {
        self.answers += 1;
    }

    /// The copier does nothing, or takes all that it can get.
    pub(super) fn off(&mut self) {
        self.phase = Phase::Off;
    }

    /// Until when the copier rests, whose last copy has ended if it `is_idle`; none if it may begin another.
    pub(super) fn rests_until(&mut self, is_idle: impl Fn() -> bool, now: Nanos) -> Option<Nanos> {
        match self.phase {
            Phase::Off => self.enter(Phase::Copies, now),
            Phase::Copies if now >= self.since + STRETCH && is_idle() => {
                let copied = now - self.since;
                self.beside.add(copied, self.answers);
                self.enter(Phase::Settles(now + self.rest(copied)), now);
            }
            Phase::Settles(until) if now >= self.since + SETTLED => {
                self.enter(Phase::Rests(until), now);
            }
            Phase::Rests(until) if now >= until => {
                self.at_rest.add(now - self.since, self.answers);
                self.rests += 1;
                self.compare();
                self.enter(Phase::Copies, now);
            }
            Phase::Copies | Phase::Settles(_) | Phase::Rests(_) => {}
        }
        match self.phase {
            // To be called again when it begins to count.
            Phase::Settles(_) => Some(self.since + SETTLED),
            Phase::Rests(until) => Some(until),
            Phase::Off | Phase::Copies => None,
        }
    }

    fn enter(&mut self, phase: Phase, now: Nanos) {
        (self.phase, self.since, self.answers) = (phase, now, 0);
    }

    /// How long it is rested after it was copied for so long: the copies may take [`TAKEN`] of the time of both.
    fn rest(&self, copied: Nanos) -> Nanos {
        let both = u128::from(copied.0) * u128::from(self.lost) / u128::from(TAKEN);
        let rest = both.saturating_sub(copied.0.into());
        Nanos(u64::try_from(rest).unwrap_or(u64::MAX)).max(REST_LEAST)
    }

    /// Compares, if enough was seen, and draws the consequence.
    fn compare(&mut self) {
        let (beside, at_rest) = (self.beside, self.at_rest);
        if self.rests < RESTS || beside.answers + at_rest.answers < ANSWERS {
            return;
        }
        // Answers of both in a time that is as long for both.
        let kept = u128::from(beside.answers) * u128::from(at_rest.time.0);
        let all = u128::from(at_rest.answers) * u128::from(beside.time.0);
        let lost = all.saturating_sub(kept) * 100 / all.max(1);
        self.lost = u64::try_from(lost).unwrap_or(100);
        (self.beside, self.at_rest, self.rests) = (Seen::NOTHING, Seen::NOTHING, 0);
        if self.lost > MUCH {
            self.window = (self.window / 2).max(LEAST);
        } else if self.lost < LITTLE {
            self.window = (self.window * 2).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest on some device, and a copier beside it, for so long that nothing changes any more: what is copied of the time, and
    /// kept of the guest's requests, percent, and the window in the end. `beside` says of how many of 100 requests a copy of so many bytes
    /// leaves it, and how long it takes.
    fn run(beside: impl Fn(u64) -> (u64, Nanos)) -> (u64, u64, u64) {
        const STEP: Nanos = Nanos::from_micros(10);
        let (mut share, mut copied, mut answers, mut work) = (Share::NEW, 0, 0, 0);
        let (mut copy, mut now) = (None::<(u64, Nanos)>, Nanos::ZERO);
        while now < Nanos::from_secs(4) {
            now = now + STEP;
            copy = copy.filter(|(_, end)| now < *end);
            if share.rests_until(|| copy.is_none(), now).is_none() && copy.is_none() {
                let (left, time) = beside(share.window());
                copy = Some((left, now + time));
            }
            work += copy.map_or(100, |(left, _)| left);
            let answered = work / 300; // one in 30 us where nothing is in its way
            work %= 300;
            (0..answered).for_each(|_| share.answered());
            if now > Nanos::from_secs(2) {
                copied += u64::from(copy.is_some());
                answers += answered;
            }
        }
        (copied / 2000, answers * 300 / 200_000, share.window())
    }

    #[test]
    fn where_copies_cost_the_guest_all_it_keeps_its_part_of_the_time() {
        for time in [50, 700, 3000].map(Nanos::from_micros) {
            let (copied, kept, window) = run(|_| (0, time));
            assert!((33..=37).contains(&copied) && kept >= 63, "{copied} {kept} by {time:?}");
            assert_eq!(window, LEAST);
        }
    }

    #[test]
    fn where_copies_cost_nothing_much_is_read_at_once_and_rests_are_short() {
        let (copied, kept, window) = run(|_| (100, Nanos::from_micros(300)));
        assert!(copied >= 75 && kept == 100, "{copied} {kept}");
        assert_eq!(window, MOST);
    }

    #[test]
    fn a_window_is_found_that_leaves_the_guest_its_part() {
        // Half of the device's time at 1 MiB, and what is read takes its time.
        let device = |window: u64| (100 * 1024 / (1024 + (window >> 10)), Nanos(window * 2));
        let (copied, kept, window) = run(device);
        assert_eq!(window, 256 << 10);
        assert!(copied >= 75 && kept >= 65, "{copied} {kept}");
    }

    #[test]
    fn what_was_copied_for_other_reasons_is_not_rested_for() {
        let mut share = Share::NEW;
        let at = Nanos::from_millis;
        assert_eq!(share.rests_until(|| true, at(0)), None);
        share.off();
        assert_eq!(share.rests_until(|| true, at(1000)), None, "a stretch begins anew");
        assert_eq!(share.rests_until(|| false, at(1010)), None, "a copy is in flight");
        assert_eq!(share.rests_until(|| true, at(1010)), Some(at(1011)), "until it can be counted");
        assert!(share.rests_until(|| true, at(1011)).is_some_and(|until| until > at(1025)));
    }
}
