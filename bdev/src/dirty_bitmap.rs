//! Dirty bitmaps that an operator names: what was written to a disk since a moment of their choosing.
//!
//! The bits are words of atomics that control and one reactor share. The reactor sets bits for each write, discard and
//! write-zeroes before it is submitted, so a chunk is dirty before its bytes can change. Control reads counts at any time;
//! it changes bits, flags and the list of a disk's bitmaps only while that disk is held and drained
//! ([`crate::DiskCommand::Hold`]), so nothing in flight slips through between two bitmaps. All loads and stores are relaxed:
//! the mailbox that closes and opens the gate orders them.
//!
//! A mirror that works by a bitmap may be handed it over ([`DirtyBitmap::set_handed_over`]): its own map then says what is dirty, the
//! disk marks nothing, and what is left goes back at the mirror's end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use resilver_sys::usize_from;

use crate::bitmap::{Bitmap, Grid, for_words};

/// The smallest granularity, bytes (QEMU `qapi/block-core.json`, block-dirty-bitmap-add).
pub const BITMAP_GRANULARITY_MIN: u32 = 512;

/// One bit for each chunk of a disk, shared by control and a reactor.
#[derive(Debug)]
pub struct DirtyBitmap {
    grid: Grid,
    words: Box<[AtomicU64]>,
    recording: AtomicBool,
    handed_over: AtomicBool,
}

impl DirtyBitmap {
    /// A bitmap of a disk, all clean, recording or not.
    #[must_use]
    pub fn new(grid: Grid, recording: bool) -> Self {
        let words = usize_from(grid.chunks().div_ceil(64));
        Self {
            grid,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            recording: AtomicBool::new(recording),
            handed_over: AtomicBool::new(false),
        }
    }

    /// Another one with the same bits and the same flag.
    #[must_use]
    pub fn copy(&self) -> Self {
        let copy = Self::new(self.grid, self.recording());
        for (to, from) in copy.words.iter().zip(&self.words) {
            to.store(from.load(Relaxed), Relaxed);
        }
        copy
    }

    /// The same for a disk of another size: what is beyond the old end is clean (as QEMU's `bdrv_dirty_bitmap_truncate`).
    #[must_use]
    pub fn resized(&self, size: u64) -> Self {
        let other = Self::new(self.grid.resized(size), self.recording());
        other.merge(self);
        other
    }

    /// How it divides its disk.
    #[must_use]
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Whether writes are recorded.
    #[must_use]
    pub fn recording(&self) -> bool {
        self.recording.load(Relaxed)
    }

    /// Records writes from now on, or ceases to.
    pub fn set_recording(&self, recording: bool) {
        self.recording.store(recording, Relaxed);
    }

    /// A mirror keeps this bitmap's bits in its own map, or has given them back.
    pub fn set_handed_over(&self, handed_over: bool) {
        self.handed_over.store(handed_over, Relaxed);
    }

    /// These bytes are about to change. On a disk's reactor only.
    #[inline]
    pub fn mark(&self, offset: u64, length: u64) {
        if self.recording() && !self.handed_over.load(Relaxed) {
            self.set(offset, length);
        }
    }

    fn set(&self, offset: u64, length: u64) {
        if length == 0 || offset >= self.grid.size() {
            return;
        }
        for_words(self.grid.touched(offset, length), |index, mask| {
            let word = &self.words[index];
            // Most writes meet chunks that are dirty already: a load keeps the line shared with control.
            if word.load(Relaxed) & mask != mask {
                word.fetch_or(mask, Relaxed);
            }
        });
    }

    /// Makes everything clean.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Relaxed);
        }
    }

    /// Makes dirty what is dirty in `other`, whatever its granularity.
    pub fn merge(&self, other: &Self) {
        if self.grid == other.grid {
            for (to, from) in self.words.iter().zip(&other.words) {
                to.fetch_or(from.load(Relaxed), Relaxed);
            }
            return;
        }
        for (index, word) in other.words.iter().enumerate() {
            let mut bits = word.load(Relaxed);
            while bits != 0 {
                let chunk = index as u64 * 64 + u64::from(bits.trailing_zeros());
                let bytes = other.grid.bytes(&(chunk..chunk + 1));
                self.set(bytes.start, bytes.end - bytes.start);
                bits &= bits - 1;
            }
        }
    }

    /// Bytes of the dirty chunks.
    #[must_use]
    pub fn count_bytes(&self) -> u64 {
        let set = self.words.iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum();
        let last = self.grid.chunks().saturating_sub(1);
        let last_word = self.words.get(usize_from(last / 64));
        let last_set = last_word.is_some_and(|word| word.load(Relaxed) & (1 << (last % 64)) != 0);
        self.grid.bytes_of(set, last_set)
    }

    /// Makes dirty in `map`, a bitmap of the same grid, what is dirty here.
    pub fn load_into(&self, map: &mut Bitmap) {
        map.merge_words(self.words.iter().map(|word| word.load(Relaxed)));
    }

    /// Becomes what `map`, a bitmap of the same grid, is.
    pub fn store_from(&self, map: &Bitmap) {
        for (to, from) in self.words.iter().zip(map.words()) {
            to.store(*from, Relaxed);
        }
    }

    /// The bits, 64 chunks a word, the first the lowest.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.words.iter().map(|word| word.load(Relaxed))
    }

    /// Sets the bits as [`DirtyBitmap::words`] gave them; false if there are not as many as the grid has.
    #[must_use]
    pub fn set_words(&self, words: impl ExactSizeIterator<Item = u64>) -> bool {
        let fits = words.len() == self.words.len();
        for (to, from) in self.words.iter().zip(words) {
            to.store(from, Relaxed);
        }
        // Nothing is beyond the end, whatever was stored.
        if let (Some(last), tail @ 1..) = (self.words.last(), self.grid.chunks() % 64) {
            last.fetch_and((1 << tail) - 1, Relaxed);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn bitmap(size: u64, granularity: u32) -> DirtyBitmap {
        DirtyBitmap::new(Grid::new(size, granularity), true)
    }

    #[test]
    fn what_is_written_is_counted_and_what_is_not_recorded_is_not() {
        let bitmap = bitmap(1000 * KIB + 512, 4096);
        bitmap.mark(4000, 200);
        assert_eq!(bitmap.count_bytes(), 8192);
        bitmap.mark(1000 * KIB, 512);
        assert_eq!(bitmap.count_bytes(), 8192 + 512, "the last chunk is short");
        bitmap.set_recording(false);
        bitmap.mark(100 * KIB, 4096);
        bitmap.set_recording(true);
        bitmap.set_handed_over(true);
        bitmap.mark(200 * KIB, 4096);
        assert_eq!(bitmap.count_bytes(), 8192 + 512);
        bitmap.clear();
        assert_eq!(bitmap.count_bytes(), 0);
    }

    #[test]
    fn bitmaps_merge_across_granularities_both_ways() {
        let (fine, coarse) = (bitmap(1 << 20, 512), bitmap(1 << 20, 64 << 10));
        fine.mark(512, 512);
        fine.mark((1 << 20) - 512, 512);
        coarse.merge(&fine);
        assert_eq!((coarse.count_bytes(), fine.count_bytes()), (128 * KIB, 1024));
        fine.merge(&coarse);
        assert_eq!(fine.count_bytes(), 128 * KIB);
    }

    #[test]
    fn a_copy_keeps_its_own_bits_and_a_larger_one_is_clean_behind_the_old_end() {
        let bitmap = bitmap(1 << 20, 4096);
        bitmap.mark(0, 1 << 20);
        let copy = bitmap.copy();
        bitmap.clear();
        assert_eq!((copy.count_bytes(), copy.resized(2 << 20).count_bytes()), (1 << 20, 1 << 20));
        assert_eq!(copy.resized(512 << 10).count_bytes(), 512 << 10);
    }

    #[test]
    fn words_come_back_and_nothing_is_beyond_the_end() {
        let bitmap = bitmap(70 * 4096, 4096);
        bitmap.mark(65 * 4096, 4096);
        let words: Vec<u64> = bitmap.words().collect();
        let other = self::bitmap(70 * 4096, 4096);
        assert!(other.set_words(words.into_iter()));
        assert_eq!(other.count_bytes(), 4096);
        assert!(other.set_words(vec![u64::MAX; 2].into_iter()));
        assert_eq!(other.count_bytes(), 70 * 4096);
        assert!(!other.set_words(vec![0; 3].into_iter()));
        let mut map = Bitmap::empty(other.grid());
        other.set_words(vec![5, 1].into_iter()).then_some(()).unwrap();
        other.load_into(&mut map);
        assert_eq!((map.count(), map.get(2), map.get(64)), (3, true, true));
        map.clear_range(&(0..3));
        other.store_from(&map);
        assert_eq!(other.count_bytes(), 4096);
    }
}
