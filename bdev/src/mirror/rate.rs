//! Speed: the limit on the copier, the rates an operator sees, and how errors are spaced out.
//!
//! All of it is arithmetic on the time it is given.

use resilver_reactor::Nanos;

use crate::io::{IoError, IoKind};
use crate::job::{ErrorAction, ErrorCounts, JobEvent, Side};

/// How much of a second's allowance may be spent at once.
const BURST: Nanos = Nanos::from_millis(100);
const SECOND: u64 = 1_000_000_000;
/// Samples after which nothing is left of a rate.
const FORGOTTEN: u64 = 256;

/// A limit on data copied, as a bucket of tokens that may be overdrawn once: whoever finds it in credit may start, and pays
/// when the size is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limiter {
    /// Bytes a second; 0 for no limit.
    speed: u64,
    /// Bytes in credit, or owed.
    credit: i64,
    /// When the credit was last brought up to date.
    at: Nanos,
}

impl Limiter {
    /// A limiter with a full allowance.
    pub(super) fn new(speed: u64, now: Nanos) -> Self {
        let mut limiter = Self { speed, credit: 0, at: now };
        limiter.credit = limiter.burst();
        limiter
    }

    /// Bytes a second; 0 for no limit.
    pub(super) fn speed(&self) -> u64 {
        self.speed
    }

    /// The most bytes that one operation should ask for.
    pub(super) fn largest(&self) -> u64 {
        if self.speed == 0 { u64::MAX } else { self.burst().unsigned_abs() }
    }

    /// Changes the limit. What is owed under the old one stays owed, in time rather than in bytes.
    pub(super) fn set_speed(&mut self, speed: u64, now: Nanos) {
        let owed = self.wait(now);
        self.speed = speed;
        self.at = now;
        self.credit = self.burst();
        if owed > Nanos::ZERO && speed > 0 {
            self.credit = -bytes_in(speed, owed.min(Nanos(SECOND)));
        }
    }

    /// When data may be copied: zero for now.
    pub(super) fn wait(&mut self, now: Nanos) -> Nanos {
        if self.speed == 0 {
            return Nanos::ZERO;
        }
        let earned = bytes_in(self.speed, now - self.at);
        if earned > 0 {
            self.credit = self.credit.saturating_add(earned).min(self.burst());
            self.at = now;
        }
        if self.credit > 0 {
            return Nanos::ZERO;
        }
        let owed = u128::from(self.credit.unsigned_abs()) + 1;
        let nanos = owed * u128::from(SECOND) / u128::from(self.speed);
        Nanos(u64::try_from(nanos).unwrap_or(u64::MAX)) + Nanos(1)
    }

    /// Charges for data.
    pub(super) fn charge(&mut self, bytes: u64) {
        if self.speed > 0 {
            self.credit = self.credit.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// Gives back what was charged for data that turned out to be zeroes.
    pub(super) fn refund(&mut self, bytes: u64) {
        if self.speed > 0 {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.credit = self.credit.saturating_add(bytes).min(self.burst());
        }
    }

    fn burst(&self) -> i64 {
        bytes_in(self.speed, BURST).max(1)
    }
}

/// The bytes that `speed` allows in a span.
fn bytes_in(speed: u64, span: Nanos) -> i64 {
    let bytes = u128::from(speed) * u128::from(span.0) / u128::from(SECOND);
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A rate in bytes a second, smoothed over about two seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Smoothed {
    /// Bytes since the last sample.
    new: u64,
    rate: u64,
}

impl Smoothed {
    fn sample(&mut self, span: Nanos) {
        let sampled = u128::from(self.new) * u128::from(SECOND) / u128::from(span.0.max(1));
        let sampled = u64::try_from(sampled).unwrap_or(u64::MAX);
        self.new = 0;
        if self.rate == 0 {
            self.rate = sampled;
            return;
        }
        // A span of many periods, of a reactor that slept, weighs as many samples.
        for _ in 0..(span.0 / Rates::PERIOD.0).min(FORGOTTEN) {
            self.rate = self.rate - self.rate.div_ceil(8) + sampled / 8;
        }
    }
}

/// What moves, how fast, and when it will be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Rates {
    copied: Smoothed,
    written: Smoothed,
    dirtied: Smoothed,
    sampled: Nanos,
}

impl Rates {
    /// How often the rates are sampled.
    pub(super) const PERIOD: Nanos = Nanos::from_millis(250);

    /// Bytes that became equal on both legs: copied, made zero or skipped.
    pub(super) fn copied(&mut self, bytes: u64) {
        self.copied.new = self.copied.new.saturating_add(bytes);
    }

    /// Bytes that the guest wrote.
    pub(super) fn written(&mut self, bytes: u64) {
        self.written.new = self.written.new.saturating_add(bytes);
    }

    /// Bytes that became dirty.
    pub(super) fn dirtied(&mut self, bytes: u64) {
        self.dirtied.new = self.dirtied.new.saturating_add(bytes);
    }

    /// Samples if it is time to.
    pub(super) fn tick(&mut self, now: Nanos) {
        let span = now - self.sampled;
        if span < Self::PERIOD {
            return;
        }
        self.sampled = now;
        self.copied.sample(span);
        self.written.sample(span);
        self.dirtied.sample(span);
    }

    /// Bytes a second made equal.
    pub(super) fn copy_rate(&self) -> u64 {
        self.copied.rate
    }

    /// Bytes a second written by the guest.
    pub(super) fn write_rate(&self) -> u64 {
        self.written.rate
    }

    /// Whether what is left gets less.
    pub(super) fn converging(&self) -> bool {
        self.copied.rate > self.dirtied.rate
    }

    /// Time until `left` bytes are done, if they get less.
    pub(super) fn eta(&self, left: u64) -> Option<Nanos> {
        if left == 0 {
            return Some(Nanos::ZERO);
        }
        let net = self.copied.rate.checked_sub(self.dirtied.rate).filter(|net| *net > 0)?;
        let nanos = u128::from(left) * u128::from(SECOND) / u128::from(net);
        Some(Nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

/// Ever longer rests of the copier while errors keep coming.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct BackOff {
    rest: Nanos,
    until: Nanos,
}

impl BackOff {
    const SHORTEST: Nanos = Nanos::from_millis(10);
    const LONGEST: Nanos = Nanos::from_secs(5);
    /// An error that comes this many rests after the last rest was over is a new trouble.
    const FORGET: u64 = 4;

    /// An error. Several during one rest count once.
    pub(super) fn failed(&mut self, now: Nanos) {
        if now < self.until {
            return;
        }
        let quiet = now - self.until;
        self.rest =
            if self.rest == Nanos::ZERO || quiet.0 > self.rest.0.saturating_mul(Self::FORGET) {
                Self::SHORTEST
            } else {
                (self.rest + self.rest).min(Self::LONGEST)
            };
        self.until = now + self.rest;
    }

    /// Until when the copier rests.
    pub(super) fn until(&self) -> Nanos {
        self.until
    }
}

/// What makes two errors alike.
type Likeness = (Side, IoKind, ErrorAction, IoError);

/// Errors counted for good, and gathered so that a lasting one makes one event a second.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ErrorLog {
    total: ErrorCounts,
    last: Option<Likeness>,
    count: u64,
    /// Errors like the last one are held back until then.
    quiet_until: Nanos,
}

impl ErrorLog {
    /// One event a second for errors that are alike.
    const SPACING: Nanos = Nanos(SECOND);

    /// Errors so far.
    pub(super) fn total(&self) -> ErrorCounts {
        self.total
    }

    /// Records an error. Answers with up to two events: the held-back count of another kind, and this one if it is new.
    pub(super) fn record(&mut self, like: Likeness, now: Nanos) -> [Option<JobEvent>; 2] {
        let counts = &mut self.total.counts[like.0 as usize][like.2 as usize];
        *counts = counts.saturating_add(1);
        if self.last == Some(like) && now < self.quiet_until {
            self.count += 1;
            return [None, None];
        }
        let held = if self.last == Some(like) { None } else { self.flush() };
        self.count += 1;
        self.last = Some(like);
        self.quiet_until = now + Self::SPACING;
        [held, self.flush()]
    }

    /// The event of errors held back, once it is time.
    pub(super) fn tick(&mut self, now: Nanos) -> Option<JobEvent> {
        if self.count == 0 || now < self.quiet_until {
            return None;
        }
        self.quiet_until = now + Self::SPACING;
        self.flush()
    }

    /// When errors held back are due.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        (self.count > 0).then_some(self.quiet_until)
    }

    fn flush(&mut self) -> Option<JobEvent> {
        let (side, operation, action, error) = self.last?;
        let count = std::mem::take(&mut self.count);
        (count > 0).then_some(JobEvent::Error { side, operation, action, error, count })
    }
}

/// Over which time it is looked whether the dirty bytes get less.
const SHRINKS_WITHIN: Nanos = Nanos::from_millis(500);

/// Whether what is dirty gets less by a gentle copier's work, beside a guest that makes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shrinking {
    since: Nanos,
    dirty: u64,
    yes: bool,
}

impl Default for Shrinking {
    fn default() -> Self {
        Self { since: Nanos::ZERO, dirty: u64::MAX, yes: true }
    }
}

impl Shrinking {
    /// So many bytes are dirty now. Whether they got less by a sixteenth in the last stretch.
    pub(super) fn seen(&mut self, dirty: u64, now: Nanos) -> bool {
        if now >= self.since + SHRINKS_WITHIN {
            self.yes = dirty < self.dirty - self.dirty / 16;
            (self.since, self.dirty) = (now, dirty);
        }
        self.yes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limited_copier_moves_what_it_may() {
        let mut limiter = Limiter::new(1_000_000, Nanos::ZERO);
        let (mut now, mut moved) = (Nanos::ZERO, 0);
        while now < Nanos::from_secs(10) {
            let wait = limiter.wait(now);
            if wait == Nanos::ZERO {
                limiter.charge(65536);
                moved += 65536;
            }
            now = now + wait;
        }
        assert!((10_000_000..10_300_000).contains(&moved), "{moved} bytes in 10 s");
    }

    #[test]
    fn zeroes_cost_nothing_and_no_limit_never_waits() {
        let mut limiter = Limiter::new(1000, Nanos::ZERO);
        for _ in 0..100 {
            assert_eq!(limiter.wait(Nanos::ZERO), Nanos::ZERO);
            limiter.charge(1 << 20);
            limiter.refund(1 << 20);
        }
        limiter.charge(1 << 20);
        assert!(limiter.wait(Nanos::ZERO) > Nanos::from_secs(1000));
        limiter.set_speed(0, Nanos::ZERO);
        assert_eq!(limiter.wait(Nanos::ZERO), Nanos::ZERO);
    }

    #[test]
    fn a_raised_speed_is_not_held_back_by_an_old_debt() {
        let mut limiter = Limiter::new(1000, Nanos::ZERO);
        limiter.charge(1 << 20);
        limiter.set_speed(1 << 30, Nanos::ZERO);
        assert!(limiter.wait(Nanos::ZERO) <= Nanos::from_millis(1100));
    }

    #[test]
    fn rests_grow_while_errors_last_and_begin_anew_afterwards() {
        let (mut back_off, mut now) = (BackOff::default(), Nanos::from_secs(1));
        let mut rests = Vec::new();
        for _ in 0..12 {
            back_off.failed(now);
            back_off.failed(now);
            rests.push(back_off.until() - now);
            now = back_off.until();
        }
        assert!(rests.is_sorted());
        assert_eq!((rests[0], rests[11]), (BackOff::SHORTEST, BackOff::LONGEST));
        now = now + Nanos::from_secs(60);
        back_off.failed(now);
        assert_eq!(back_off.until() - now, BackOff::SHORTEST);
    }

    #[test]
    fn a_lasting_error_is_one_event_a_second_and_none_is_lost() {
        let mut log = ErrorLog::default();
        let like = (Side::Target, IoKind::Write, ErrorAction::Ignore, IoError::IO);
        let count = |event: Option<JobEvent>| match event {
            Some(JobEvent::Error { count, .. }) => (1, count),
            _ => (0, 0),
        };
        let (mut events, mut errors) = (0, 0);
        for milli in 0..3500 {
            let now = Nanos::from_millis(milli);
            for event in log.record(like, now).into_iter().chain([log.tick(now)]) {
                let (more_events, more_errors) = count(event);
                events += more_events;
                errors += more_errors;
            }
        }
        let (_, held) = count(log.tick(Nanos::from_secs(60)));
        assert_eq!((events, errors + held), (4, 3500));
        assert_eq!(log.total().counts[1][1], 3500);
    }

    #[test]
    fn the_time_left_follows_the_net_rate() {
        let mut rates = Rates::default();
        rates.copied(1000);
        rates.dirtied(500);
        rates.tick(Nanos::from_secs(1));
        assert_eq!(rates.eta(500), Some(Nanos::from_secs(1)));
        assert!(rates.converging());
        let mut stuck = Rates::default();
        stuck.dirtied(10);
        stuck.tick(Nanos::from_secs(1));
        assert_eq!((stuck.eta(1), stuck.converging()), (None, false));
    }

    #[test]
    fn what_does_not_get_less_in_a_stretch_is_not_shrinking() {
        let mut shrinking = Shrinking::default();
        let mut at = |millis, dirty| shrinking.seen(dirty, Nanos::from_millis(millis));
        assert!(at(1000, 1600));
        assert!(at(1200, 1600), "the stretch is not over");
        assert!(at(1500, 1400));
        assert!(!at(2000, 1350));
        assert!(!at(2100, 10));
        assert!(at(2500, 10));
    }
}
