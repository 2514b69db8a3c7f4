//! What a bdev counts: operations, bytes, errors and latency by kind. One writer, the reactor of the disk; any readers.

use resilver_reactor::Nanos;
use resilver_reactor::stats::Cell;

use crate::io::IoKind;

/// Buckets of a [`Histogram`]: 4 to an octave from 128 ns to about 36 minutes.
pub const BUCKETS: usize = 96;
/// Buckets to an octave, as a power of two.
const SUB_BITS: u32 = 2;
/// Everything below 2^FIRST_BITS nanoseconds falls in bucket 0.
const FIRST_BITS: u32 = 7;

/// Latencies in log-linear buckets.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Cell; BUCKETS],
    sum_ns: Cell,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Cell::default()), sum_ns: Cell::default() }
    }
}

impl Histogram {
    /// Counts one latency.
    #[inline]
    pub fn record(&self, latency: Nanos) {
        self.buckets[bucket(latency.0)].add(1);
        self.sum_ns.add(latency.0);
    }

    /// The counts, lowest bucket first.
    #[must_use]
    pub fn counts(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|index| self.buckets[index].get())
    }

    /// The sum of all latencies.
    #[must_use]
    pub fn sum(&self) -> Nanos {
        Nanos(self.sum_ns.get())
    }
}

/// The bucket of a latency in nanoseconds.
#[inline]
fn bucket(ns: u64) -> usize {
    if ns < 1 << FIRST_BITS {
        return 0;
    }
    let octave = ns.ilog2();
    let sub = (ns >> (octave - SUB_BITS)) & ((1 << SUB_BITS) - 1);
    let index = ((octave - FIRST_BITS) << SUB_BITS) as usize + resilver_sys::usize_from(sub) + 1;
    index.min(BUCKETS - 1)
}

/// The upper bound of a bucket, exclusive.
#[must_use]
pub fn bucket_bound(index: usize) -> Nanos {
    let Ok(index) = u32::try_from(index) else { return Nanos::MAX };
    if index as usize + 1 >= BUCKETS {
        return Nanos::MAX;
    }
    let (octave, sub) =
        (FIRST_BITS + (index >> SUB_BITS), u64::from(index & ((1 << SUB_BITS) - 1)));
    Nanos((1 << octave) + (sub << (octave - SUB_BITS)))
}

/// Counters of one kind of I/O.
#[derive(Debug, Default)]
pub struct KindStats {
    /// Operations completed, failed ones included.
    pub ops: Cell,
    /// Bytes of those that succeeded.
    pub bytes: Cell,
    /// Operations that failed.
    pub errors: Cell,
    /// From submission to completion.
    pub latency: Histogram,
}

/// Counters of one bdev.
#[derive(Debug, Default)]
pub struct IoStats {
    kinds: [KindStats; IoKind::ALL.len()],
}

impl IoStats {
    /// The counters of one kind.
    #[inline]
    #[must_use]
    pub fn of(&self, kind: IoKind) -> &KindStats {
        &self.kinds[kind as usize]
    }

    /// Counts one completed I/O. Only the disk's reactor may call this.
    #[inline]
    pub fn record(&self, kind: IoKind, length: u64, latency: Nanos, ok: bool) {
        let stats = self.of(kind);
        stats.ops.add(1);
        stats.latency.record(latency);
        if ok {
            stats.bytes.add(length);
        } else {
            stats.errors.add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_falls_below_its_buckets_bound_and_not_below_the_one_before() {
        for shift in 0..63 {
            for ns in [(1u64 << shift) - 1, 1 << shift, (1 << shift) + (1 << shift) / 3] {
                let index = bucket(ns);
                assert!(ns < bucket_bound(index).0, "{ns} ns in bucket {index}");
                assert!(index == 0 || ns >= bucket_bound(index - 1).0, "{ns} ns in bucket {index}");
            }
        }
    }

    #[test]
    fn a_failed_operation_moves_no_bytes() {
        let stats = IoStats::default();
        stats.record(IoKind::Write, 4096, Nanos(1000), true);
        stats.record(IoKind::Write, 4096, Nanos(1000), false);
        let write = stats.of(IoKind::Write);
        assert_eq!((write.ops.get(), write.bytes.get(), write.errors.get()), (2, 4096, 1));
    }
}
