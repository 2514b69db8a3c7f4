//! Speed: the limit on the copier, the rates an operator sees, and when it will be done.
//!
//! All of it is arithmetic on the time it is given.

use resilver_reactor::Nanos;

use crate::job::EtaConfidence;

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
    /// The allowance of how long a time may be spent at once.
    burst: Nanos,
    /// Bytes in credit, or owed.
    credit: i64,
    /// When the credit was last brought up to date.
    at: Nanos,
}

impl Limiter {
    /// A limiter with a full allowance.
    pub(super) fn new(speed: u64, now: Nanos) -> Self {
        let mut limiter = Self { speed, burst: BURST, credit: 0, at: now };
        limiter.credit = limiter.burst();
        limiter
    }

    /// A limiter that lets an operation start only when all before it are paid for.
    pub(super) fn even(speed: u64, now: Nanos) -> Self {
        Self { speed, burst: Nanos::ZERO, credit: 1, at: now }
    }

    /// Forgets what is owed.
    pub(super) fn forgive(&mut self, now: Nanos) {
        (self.credit, self.at) = (self.burst(), now);
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
        bytes_in(self.speed, self.burst).max(1)
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
    /// How far samples are from the rate, smoothed the same way.
    spread: u64,
}

impl Smoothed {
    fn sample(&mut self, span: Nanos) {
        let sampled = u128::from(self.new) * u128::from(SECOND) / u128::from(span.0.max(1));
        let sampled = u64::try_from(sampled).unwrap_or(u64::MAX);
        self.new = 0;
        if self.rate == 0 {
            (self.rate, self.spread) = (sampled, sampled / 2);
            return;
        }
        let off = sampled.abs_diff(self.rate);
        // A span of many periods, of a reactor that slept, weighs as many samples.
        for _ in 0..(span.0 / Rates::PERIOD.0).min(FORGOTTEN) {
            self.rate = self.rate - self.rate.div_ceil(8) + sampled / 8;
            self.spread = self.spread - self.spread.div_ceil(8) + off / 8;
        }
    }
}

/// What moves, how fast, and when it will be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Rates {
    copied: Smoothed,
    /// Of these, what had to be read.
    worked: Smoothed,
    written: Smoothed,
    dirtied: Smoothed,
    sampled: Nanos,
    /// When the first sample was taken that has anything.
    known_since: Option<Nanos>,
}

impl Rates {
    /// How often the rates are sampled.
    pub(super) const PERIOD: Nanos = Nanos::from_millis(250);

    /// Bytes that became equal on both legs: copied, made zero or skipped.
    pub(super) fn copied(&mut self, bytes: u64) {
        self.copied.new = self.copied.new.saturating_add(bytes);
    }

    /// Bytes among them that had to be read, and took their time.
    pub(super) fn worked(&mut self, bytes: u64) {
        self.worked.new = self.worked.new.saturating_add(bytes);
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
        if self.worked.new > 0 {
            self.known_since = self.known_since.or(Some(now));
        }
        self.copied.sample(span);
        self.worked.sample(span);
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
        self.net() > 0
    }

    /// Bytes a second by which what is left gets less. A hole costs next to nothing, so what is left are the bytes to be read.
    fn net(&self) -> u64 {
        self.worked.rate.saturating_sub(self.dirtied.rate)
    }

    /// Time until `left` bytes have been read and copied, if they get less, and how sure that is.
    pub(super) fn eta(&self, left: u64, now: Nanos) -> Option<(Nanos, EtaConfidence)> {
        if left == 0 {
            return Some((Nanos::ZERO, EtaConfidence::High));
        }
        let net = Some(self.net()).filter(|net| *net > 0)?;
        let nanos = u128::from(left) * u128::from(SECOND) / u128::from(net);
        let eta = Nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let known = now - self.known_since.unwrap_or(now);
        let spread = u128::from(self.worked.spread) + u128::from(self.dirtied.spread);
        let percent = spread * 100 / u128::from(net);
        let confidence = match (known.0 / SECOND, percent) {
            (10.., 0..=15) => EtaConfidence::High,
            (2.., 0..=50) => EtaConfidence::Medium,
            _ => EtaConfidence::Low,
        };
        Some((eta, confidence))
    }
}

/// Over which time it is looked whether the dirty bytes get less.
const SHRINKS_WITHIN: Nanos = Nanos::from_millis(200);

/// Whether a gentle copier gets on beside a guest that makes more to do: how large the disk is must not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shrinking {
    since: Nanos,
    /// What was left and had been done then.
    left: u64,
    done: u64,
    yes: bool,
}

impl Shrinking {
    /// Of a job that has yet to begin.
    pub(super) const NEW: Self = Self { since: Nanos::ZERO, left: u64::MAX, done: 0, yes: true };

    /// So many bytes are left now and so many were done, and how it goes on is to be seen.
    pub(super) fn from(left: u64, done: u64, now: Nanos) -> Self {
        Self { since: now, left, done, yes: true }
    }

    /// Whether a stretch is over, and it is to be [seen](Self::seen) how it went.
    pub(super) fn is_due(&self, now: Nanos) -> bool {
        now >= self.since + SHRINKS_WITHIN
    }

    /// A stretch is over; so many bytes are left now, and so many were done.
    pub(super) fn seen(&mut self, left: u64, done: u64, few: u64, now: Nanos) {
        let progress = self.left.saturating_sub(left);
        let yes = left <= few || progress > done.saturating_sub(self.done) / 4;
        *self = Self { since: now, left, done, yes };
    }

    /// Whether of what was done in the last stretch more than a quarter need not be done again, or as few are left as will do.
    pub(super) fn yes(&self) -> bool {
        self.yes
    }
}

/// Over which time it is looked whether copying is for nothing.
const CHASE: Nanos = Nanos::from_secs(3);

/// Whether the copier runs after a guest that it does not catch: how large the disk is, and how slow the copy, must not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Chase {
    /// When it was last looked, and what was left and had been copied then.
    from: Option<(Nanos, u64, u64)>,
}

impl Chase {
    /// Nothing is dirty, or nothing is being copied.
    pub(super) fn over(&mut self) {
        self.from = None;
    }

    /// So many bytes are left, and so many were copied since the job began. Whether of what was copied in a stretch that now
    /// ends, seven eighths or more are to be copied again.
    pub(super) fn is_vain(&mut self, left: u64, done: u64, now: Nanos) -> bool {
        match self.from {
            Some((since, _, _)) if now < since + CHASE => false,
            from => {
                self.from = Some((now, left, done));
                from.is_some_and(|(_, left_then, done_then)| {
                    left_then.saturating_sub(left) < done.saturating_sub(done_then) / 8
                })
            }
        }
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
    fn the_time_left_follows_the_net_rate_of_what_is_read() {
        let mut rates = Rates::default();
        let second = Nanos::from_secs(1);
        rates.copied(1_000_000);
        rates.worked(1000);
        rates.dirtied(500);
        rates.tick(second);
        assert_eq!(rates.eta(500, second), Some((second, EtaConfidence::Low)));
        assert!(rates.converging());
        let mut stuck = Rates::default();
        stuck.dirtied(10);
        stuck.tick(second);
        assert_eq!((stuck.eta(1, second), stuck.converging()), (None, false));
    }

    #[test]
    fn an_estimate_is_trusted_when_its_rates_are_old_and_steady() {
        let confidence = |rate: fn(u64) -> u64| {
            let mut rates = Rates::default();
            let mut seen = Vec::new();
            for quarter in 1..=80 {
                let now = Nanos::from_millis(quarter * 250);
                rates.worked(rate(quarter));
                rates.tick(now);
                seen.push(rates.eta(1 << 30, now).map(|(_, confidence)| confidence));
            }
            seen
        };
        let steady = confidence(|_| 1 << 20);
        assert_eq!((steady[0], steady[79]), (Some(EtaConfidence::Low), Some(EtaConfidence::High)));
        assert!(steady.contains(&Some(EtaConfidence::Medium)));
        let wild = confidence(|quarter| if quarter % 4 == 0 { 4 << 20 } else { 1 });
        assert_eq!(wild[79], Some(EtaConfidence::Low));
    }

    #[test]
    fn what_is_undone_as_fast_as_it_is_done_is_not_shrinking_however_much_is_left() {
        let mut shrinking = Shrinking::from(1 << 40, 0, Nanos::ZERO);
        let mut at = |millis, left, done| {
            let now = Nanos::from_millis(millis);
            if shrinking.is_due(now) {
                shrinking.seen(left, done, 0, now);
            }
            shrinking.yes()
        };
        let left = 1 << 40;
        assert!(at(199, left, 100), "the stretch is not over");
        assert!(at(200, left - 50, 100));
        assert!(!at(400, left - 60, 200));
        assert!(!at(500, left - 150, 300));
        assert!(at(600, left - 160, 300));
        assert!(!at(800, left - 160, 300), "nothing is done");
        assert!(at(1000, 0, 400) && at(1200, 0, 400), "nothing is left");
        shrinking.seen(6, 400, 5, Nanos::from_millis(1400));
        assert!(!shrinking.yes());
        shrinking.seen(5, 400, 5, Nanos::from_millis(1600));
        assert!(shrinking.yes(), "few enough");
    }

    #[test]
    fn a_chase_is_vain_by_what_the_guest_undoes_and_not_by_how_much_is_left() {
        let vain = |copied: u64, dirtied: u64, pauses: bool| {
            let (mut chase, mut left, mut done) = (Chase::default(), 1 << 40, 0);
            (0..60).any(|second| {
                (left, done) = (left - copied + dirtied, done + copied);
                if pauses && second % 2 == 0 {
                    chase.over();
                }
                chase.is_vain(left, done, Nanos::from_secs(second))
            })
        };
        assert!(vain(100, 100, false));
        assert!(vain(100, 300, false));
        assert!(!vain(100, 0, false), "a long way");
        assert!(!vain(100, 80, false), "slow");
        assert!(!vain(0, 100, false), "a copier that rests");
        assert!(!vain(100, 100, true), "one that catches up now and then");
    }
}
