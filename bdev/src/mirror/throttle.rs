//! The throttle: how much a copier may do beside a guest whose latency has a ceiling.
//!
//! The guest's requests are timed, in a histogram of one window, from the reactor's last look before they came: what it does between
//! two looks, a copy in memory, say, is waited for by those that come meanwhile. At the end of each window
//! the copier's allowance follows its 99th percentile: halved above the ceiling, a little more below it (additive increase,
//! multiplicative decrease: what shares a link fairly shares a device as well). It grows only where it is used: one that grew
//! while something else held the copier back would take as long to be felt again. It never falls to nothing, so the copy
//! goes on; and it counts only while a guest is at work.

use resilver_reactor::Nanos;

/// Latencies by their magnitude, four buckets to a doubling.
const BUCKETS: usize = 128;
/// How long a window lasts if it has requests enough.
const WINDOW: Nanos = Nanos::from_millis(50);
/// And how long if it has not.
pub(super) const WINDOW_MAX: Nanos = Nanos::from_millis(500);
/// Requests that are enough.
const ENOUGH: u32 = 100;
/// Bytes a second that are always allowed, and that are allowed at first.
const FLOOR: u64 = 1 << 20;
const FIRST: u64 = 32 << 20;
/// By how many it grows in a window, and a sixteenth: small beside what it is, or it would be too much every other time.
const STEP: u64 = 256 << 10;
/// More than any device does.
const CAP: u64 = 16 << 30;

/// The latencies of a window, and what follows for the copier.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Throttle {
    ceiling: Option<Nanos>,
    counts: [u32; BUCKETS],
    total: u32,
    /// Bytes that the copier has moved in the window.
    moved: u64,
    since: Nanos,
    p99: Option<Nanos>,
    allowance: u64,
}

fn bucket(latency: Nanos) -> usize {
    let nanos = latency.0.max(4);
    let magnitude = nanos.ilog2();
    let quarter = (nanos >> (magnitude - 2)) & 3;
    (((magnitude - 2) as usize) * 4 + quarter as usize).min(BUCKETS - 1)
}

/// The longest latency of a bucket.
fn upper(bucket: usize) -> Nanos {
    let (magnitude, quarter) = (bucket as u64 / 4 + 2, bucket as u64 % 4);
    Nanos((5 + quarter) << (magnitude - 2))
}

impl Throttle {
    pub(super) fn new(ceiling: Option<Nanos>) -> Self {
        Self {
            ceiling,
            counts: [0; BUCKETS],
            total: 0,
            moved: 0,
            since: Nanos::ZERO,
            p99: None,
            allowance: FIRST,
        }
    }

    /// A guest's request was answered after so long.
    #[inline]
    pub(super) fn answered(&mut self, latency: Nanos) {
        self.counts[bucket(latency)] += 1;
        self.total += 1;
    }

    /// The copier moves so many bytes.
    pub(super) fn moves(&mut self, bytes: u64) {
        self.moved = self.moved.saturating_add(bytes);
    }

    /// Changes the ceiling. What it leaves the copier is found anew.
    pub(super) fn set_ceiling(&mut self, ceiling: Option<Nanos>) {
        (self.ceiling, self.allowance) = (ceiling, FIRST);
    }

    /// The latency that is not to be exceeded.
    pub(super) fn ceiling(&self) -> Option<Nanos> {
        self.ceiling
    }

    /// The 99th percentile of the last window that had requests.
    pub(super) fn p99(&self) -> Option<Nanos> {
        self.p99
    }

    /// Bytes a second that the copier may move beside the guest; none for as many as its pace allows.
    pub(super) fn allowance(&self) -> Option<u64> {
        self.ceiling.map(|_| self.allowance)
    }

    /// Ends the window if it is time; whether the allowance may have changed.
    pub(super) fn tick(&mut self, now: Nanos) -> bool {
        let age = now - self.since;
        if age < WINDOW || (self.total < ENOUGH && age < WINDOW_MAX) {
            return false;
        }
        self.since = now;
        let moved = u128::from(std::mem::take(&mut self.moved)) * 1_000_000_000;
        let used = moved * 2 >= u128::from(self.allowance) * u128::from(age.0);
        if self.total == 0 {
            self.p99 = None;
            return false;
        }
        // The first bucket with no more than one in a hundred beyond it.
        let mut left = self.total - self.total / 100;
        let p99 = self.counts.iter().position(|count| {
            left = left.saturating_sub(*count);
            left == 0
        });
        self.p99 = p99.map(upper);
        self.counts = [0; BUCKETS];
        self.total = 0;
        if let (Some(ceiling), Some(p99)) = (self.ceiling, self.p99) {
            self.allowance = match (p99 > ceiling, used) {
                (true, _) => (self.allowance / 2).max(FLOOR),
                (false, true) => (self.allowance + self.allowance / 16 + STEP).min(CAP),
                (false, false) => self.allowance,
            };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_at_most_a_quarter_too_long() {
        for nanos in [5u64, 17, 1000, 123_456, 50_000_000, 3_000_000_000] {
            let upper = upper(bucket(Nanos(nanos))).0;
            assert!(upper >= nanos && upper <= nanos * 5 / 4 + 1, "{nanos} in {upper}");
        }
    }

    /// A device whose guests wait longer the more is copied beside them.
    fn latency(moved_per_second: u64) -> Nanos {
        Nanos::from_micros(80 + moved_per_second / (1 << 20))
    }

    /// Runs a minute against that device; the share of windows above the ceiling in its second half, and the mean allowance.
    fn run(ceiling: Nanos) -> (f64, u64) {
        let mut throttle = Throttle::new(Some(ceiling));
        let (mut above, mut windows, mut moved) = (0u32, 0u32, 0u64);
        for milli in 0..60_000 {
            let now = Nanos::from_millis(milli);
            for _ in 0..10 {
                throttle.answered(latency(throttle.allowance));
            }
            throttle.moves(throttle.allowance / 1000);
            if throttle.tick(now) && milli > 30_000 {
                windows += 1;
                moved += throttle.allowance;
                above += u32::from(throttle.p99().unwrap() > ceiling);
            }
        }
        (f64::from(above) / f64::from(windows), moved / u64::from(windows))
    }

    #[test]
    fn the_ceiling_holds_and_what_it_leaves_is_used() {
        let (above, mean) = run(Nanos::from_micros(400));
        assert!(above < 0.2, "above the ceiling in {above} of the windows");
        // The device could copy 320 MiB/s under that ceiling.
        assert!(mean > 120 << 20, "{} MiB/s", mean >> 20);
    }

    #[test]
    fn an_allowance_that_is_not_used_does_not_grow() {
        let mut throttle = Throttle::new(Some(Nanos::from_millis(1)));
        for quarter in 1..100 {
            throttle.answered(Nanos::from_micros(100));
            throttle.moves(FIRST / 10);
            assert!(throttle.tick(Nanos::from_millis(quarter * 500)));
        }
        assert_eq!(throttle.allowance(), Some(FIRST));
    }

    #[test]
    fn a_ceiling_below_what_the_device_does_alone_leaves_the_copy_its_floor() {
        let (above, mean) = run(Nanos::from_micros(20));
        assert_eq!((above, mean), (1.0, FLOOR));
    }

    #[test]
    fn without_a_ceiling_nothing_is_throttled_and_the_latency_is_known_all_the_same() {
        let mut throttle = Throttle::new(None);
        throttle.answered(Nanos::from_micros(100));
        assert!(throttle.tick(Nanos::from_secs(1)));
        assert_eq!(throttle.allowance(), None);
        assert!(throttle.p99().unwrap() >= Nanos::from_micros(100));
        throttle.tick(Nanos::from_secs(2));
        assert_eq!(throttle.p99(), None, "a guest that rests has none");
    }
}
