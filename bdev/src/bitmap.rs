//! Dirty bitmaps: which chunks of a disk something is true of.
//!
//! A [`Grid`] divides a disk into chunks of a power of two of bytes; the last may be short. A [`Bitmap`] keeps one bit a
//! chunk and, one level up, one bit for each word that is not zero, so that the next set chunk of a nearly clean disk is
//! found in a few loads and emptying a bitmap costs what is set in it. Chosen over a tree of more levels: two levels find
//! a bit in a disk of 16 TiB at 64 KiB within 64 Ki loads at worst and one as a rule.
//!
//! Invariants: a summary bit is set exactly where its word is not zero; `set` is the number of set bits; no bit beyond the
//! last chunk is ever set. Nothing is allocated after construction.

use std::ops::Range;

use resilver_sys::usize_from;

/// Bits of a word, as a power of two.
const WORD_SHIFT: u32 = 6;
/// The bit of a chunk within its word.
const WORD_MASK: u64 = (1 << WORD_SHIFT) - 1;
/// The most chunks of a bitmap: 128 MiB of bits, which is 64 TiB in chunks of 64 KiB (QEMU bounds the bits that a qcow2 image
/// stores to 512 MiB).
const CHUNKS_MAX: u64 = 1 << 30;

/// How a disk is divided into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    size: u64,
    shift: u32,
}

impl Grid {
    /// A disk of `size` bytes in chunks of `granularity` bytes, a power of two.
    #[must_use]
    pub fn new(size: u64, granularity: u32) -> Self {
        assert!(granularity.is_power_of_two(), "a granularity of {granularity} bytes");
        Self { size, shift: granularity.trailing_zeros() }
    }

    /// A disk of another size in chunks as large as these.
    #[must_use]
    pub fn resized(&self, size: u64) -> Self {
        Self { size, shift: self.shift }
    }

    /// What there should be instead of this granularity, for who asks for more chunks than a bitmap has.
    ///
    /// # Errors
    /// They are more.
    pub fn check(&self) -> Result<(), String> {
        if self.chunks() <= CHUNKS_MAX {
            return Ok(());
        }
        let chunks = self.chunks();
        Err(format!(
            "a larger one: the disk would have {chunks} chunks, and a bitmap has at most {CHUNKS_MAX}"
        ))
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of every chunk but the last.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Chunks of the disk.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        (self.size >> self.shift) + u64::from(!self.size.is_multiple_of(self.granularity()))
    }

    /// The chunks that have a byte of the range.
    #[inline]
    #[must_use]
    pub fn touched(&self, offset: u64, length: u64) -> Range<u64> {
        if length == 0 {
            return 0..0;
        }
        let last = offset.saturating_add(length - 1).min(self.size.saturating_sub(1));
        (offset >> self.shift)..(last >> self.shift) + 1
    }

    /// The chunks that lie in the range whole. A short last chunk does if the range reaches the disk's end.
    #[inline]
    #[must_use]
    pub fn covered(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset.saturating_add(length);
        let first = (offset >> self.shift) + u64::from(!offset.is_multiple_of(self.granularity()));
        let last = if end >= self.size { self.chunks() } else { end >> self.shift };
        first..last.max(first)
    }

    /// The bytes of some chunks.
    #[inline]
    #[must_use]
    pub fn bytes(&self, chunks: &Range<u64>) -> Range<u64> {
        let at = |chunk: u64| {
            if chunk >= self.chunks() { self.size } else { chunk << self.shift }
        };
        at(chunks.start)..at(chunks.end)
    }

    /// Bytes of `count` chunks, among them the last if `last` says so.
    pub(crate) fn bytes_of(&self, count: u64, last: bool) -> u64 {
        let missing = (self.chunks() << self.shift) - self.size;
        (count << self.shift) - if last { missing } else { 0 }
    }
}

/// One bit for each chunk of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bitmap {
    grid: Grid,
    words: Box<[u64]>,
    summary: Box<[u64]>,
    set: u64,
}

impl Bitmap {
    /// A bitmap with no bit set.
    #[must_use]
    pub fn empty(grid: Grid) -> Self {
        let words = usize_from(grid.chunks().div_ceil(1 << WORD_SHIFT));
        Self {
            grid,
            words: vec![0; words].into_boxed_slice(),
            summary: vec![0; words.div_ceil(1 << WORD_SHIFT)].into_boxed_slice(),
            set: 0,
        }
    }

    /// A bitmap with every bit set.
    #[must_use]
    pub fn full(grid: Grid) -> Self {
        let mut bitmap = Self::empty(grid);
        bitmap.set_range(&(0..grid.chunks()));
        bitmap
    }

    /// Set chunks.
    #[inline]
    #[must_use]
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Bytes of the set chunks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let last = self.grid.chunks().saturating_sub(1);
        self.grid.bytes_of(self.set, self.get(last))
    }

    /// Whether the chunk's bit is set; not beyond the end.
    #[inline]
    #[must_use]
    pub fn get(&self, chunk: u64) -> bool {
        self.words
            .get(usize_from(chunk >> WORD_SHIFT))
            .is_some_and(|word| word & (1 << (chunk & WORD_MASK)) != 0)
    }

    /// Sets the bits of some chunks.
    #[inline]
    pub fn set_range(&mut self, chunks: &Range<u64>) {
        // Most are of one chunk, and it was set before.
        if chunks.start + 1 != chunks.end || !self.get(chunks.start) {
            self.set_words(chunks);
        }
    }

    /// As [`Bitmap::set_range`]; apart, so that the usual case stays small where it is used.
    #[inline(never)]
    fn set_words(&mut self, chunks: &Range<u64>) {
        for_words(self.clip(chunks), |index, mask| self.put(index, self.words[index] | mask));
    }

    /// Clears the bits of some chunks.
    #[inline]
    pub fn clear_range(&mut self, chunks: &Range<u64>) {
        if self.set == 0 {
            return;
        }
        for_words(self.clip(chunks), |index, mask| self.put(index, self.words[index] & !mask));
    }

    /// How many of some chunks are set.
    #[inline]
    #[must_use]
    pub fn count_range(&self, chunks: &Range<u64>) -> u64 {
        if self.set == 0 {
            return 0;
        }
        let mut count = 0;
        for_words(self.clip(chunks), |index, mask| {
            let set = self.words[index] & mask;
            // Counting bits takes longer than looking whether there are any.
            if set != 0 {
                count += u64::from(set.count_ones());
            }
        });
        count
    }

    /// The first set chunk at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if self.set == 0 || from >= self.grid.chunks() {
            return None;
        }
        let index = usize_from(from >> WORD_SHIFT);
        let rest = self.words[index] & (u64::MAX << (from & WORD_MASK));
        if rest != 0 {
            return Some(chunk_of(index, rest));
        }
        let word = self.next_word(index + 1)?;
        Some(chunk_of(word, self.words[word]))
    }

    /// The first chunk at or after `from` whose bit is clear, or `end` if all before it are set.
    #[must_use]
    pub fn next_clear(&self, from: u64, end: u64) -> u64 {
        let mut chunk = from;
        while chunk < end {
            let word = self.words.get(usize_from(chunk >> WORD_SHIFT)).copied().unwrap_or(0);
            let clear = !word & (u64::MAX << (chunk & WORD_MASK));
            if clear != 0 {
                return chunk_of(usize_from(chunk >> WORD_SHIFT), clear).min(end);
            }
            chunk = (chunk | WORD_MASK) + 1;
        }
        end
    }

    /// Sets every bit that is set in `other`, a bitmap of the same grid.
    pub fn merge(&mut self, other: &Self) {
        other.each_word(|index, word| self.put(index, self.words[index] | word));
    }

    /// Sets every bit that is set in these words, the first word the lowest chunks.
    pub fn merge_words(&mut self, words: impl Iterator<Item = u64>) {
        for (index, word) in (0..self.words.len()).zip(words).filter(|(_, word)| *word != 0) {
            self.put(index, self.words[index] | word);
        }
    }

    /// The bits, 64 chunks a word, the first the lowest.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Clears every bit that is set in `other`, a bitmap of the same grid.
    pub fn subtract(&mut self, other: &Self) {
        other.each_word(|index, word| self.put(index, self.words[index] & !word));
    }

    /// Bytes of the chunks that are set here or in `other`, a bitmap of the same grid.
    #[must_use]
    pub fn union_bytes(&self, other: &Self) -> u64 {
        let mut count = self.set;
        other.each_word(|index, word| count += u64::from((word & !self.words[index]).count_ones()));
        let last = self.grid.chunks().saturating_sub(1);
        self.grid.bytes_of(count, self.get(last) || other.get(last))
    }

    /// Bytes of the chunks that are set here and not in `other`, a bitmap of the same grid.
    #[must_use]
    pub fn bytes_without(&self, other: &Self) -> u64 {
        let mut both = 0;
        self.each_word(|index, word| both += u64::from((word & other.words[index]).count_ones()));
        let last = self.grid.chunks().saturating_sub(1);
        self.grid.bytes_of(self.set - both, self.get(last) && !other.get(last))
    }

    /// Clears every bit.
    pub fn reset(&mut self) {
        let mut at = 0;
        while let Some(index) = self.next_word(at) {
            self.put(index, 0);
            at = index + 1;
        }
    }

    #[inline]
    fn clip(&self, chunks: &Range<u64>) -> Range<u64> {
        chunks.start..chunks.end.min(self.grid.chunks())
    }

    /// Replaces a word and keeps count and summary true. Where a guest writes again and again nothing changes.
    #[inline]
    fn put(&mut self, index: usize, word: u64) {
        let old = self.words[index];
        if old == word {
            return;
        }
        self.words[index] = word;
        self.set = self.set + u64::from(word.count_ones()) - u64::from(old.count_ones());
        let bit = 1 << (index as u64 & WORD_MASK);
        let summary = &mut self.summary[index >> WORD_SHIFT];
        *summary = if word == 0 { *summary & !bit } else { *summary | bit };
    }

    /// The first word at or after `index` that is not zero.
    fn next_word(&self, index: usize) -> Option<usize> {
        let mut group = index >> WORD_SHIFT;
        let mut rest = *self.summary.get(group)? & (u64::MAX << (index as u64 & WORD_MASK));
        while rest == 0 {
            group += 1;
            rest = *self.summary.get(group)?;
        }
        Some((group << WORD_SHIFT) + rest.trailing_zeros() as usize)
    }

    /// Calls `with` for each word that is not zero.
    fn each_word(&self, mut with: impl FnMut(usize, u64)) {
        let mut at = 0;
        while let Some(index) = self.next_word(at) {
            with(index, self.words[index]);
            at = index + 1;
        }
    }
}

/// The chunk of the lowest set bit of the `index`th word.
#[inline]
fn chunk_of(index: usize, word: u64) -> u64 {
    ((index as u64) << WORD_SHIFT) + u64::from(word.trailing_zeros())
}

/// Calls `with` for each word that has bits of `chunks`, and the mask of those bits.
#[inline]
pub(crate) fn for_words(chunks: Range<u64>, mut with: impl FnMut(usize, u64)) {
    let mut chunk = chunks.start;
    while chunk < chunks.end {
        let next = ((chunk | WORD_MASK) + 1).min(chunks.end);
        let ones = next - chunk;
        let mask = (u64::MAX >> (WORD_MASK + 1 - ones)) << (chunk & WORD_MASK);
        with(usize_from(chunk >> WORD_SHIFT), mask);
        chunk = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_touches_chunks_in_part_and_covers_them_whole() {
        let grid = Grid::new(10 * 4096 + 512, 4096);
        assert_eq!(grid.chunks(), 11);
        assert_eq!(grid.touched(4095, 2), 0..2);
        assert_eq!(grid.touched(4096, 0), 0..0);
        assert_eq!(grid.covered(4095, 4096), 1..1);
        assert_eq!(grid.covered(4095, 4098), 1..2);
        assert_eq!(grid.covered(40960, 512), 10..11, "the short last chunk");
        assert_eq!(grid.covered(40960, 511), 10..10);
        assert_eq!(grid.bytes(&(9..11)), 36864..41472);
    }

    #[test]
    fn a_short_last_chunk_counts_for_what_it_has() {
        let grid = Grid::new(3 * 4096 + 512, 4096);
        let mut bitmap = Bitmap::full(grid);
        assert_eq!(bitmap.bytes(), grid.size());
        bitmap.clear_range(&(0..3));
        assert_eq!(bitmap.bytes(), 512);
        bitmap.clear_range(&(3..4));
        assert_eq!((bitmap.bytes(), bitmap.count()), (0, 0));
    }

    #[test]
    fn a_sparse_bitmap_is_emptied_and_merged() {
        let grid = Grid::new(1 << 40, 65536);
        let (mut one, mut two) = (Bitmap::empty(grid), Bitmap::empty(grid));
        one.set_range(&(0..1));
        two.set_range(&(9_999_999..10_000_001));
        one.merge(&two);
        assert_eq!((one.count(), one.next_set(1)), (3, Some(9_999_999)));
        assert_eq!(two.union_bytes(&one), 3 << 16);
        one.subtract(&two);
        assert_eq!((one.count(), one.next_set(1)), (1, None));
        one.reset();
        assert_eq!(one, Bitmap::empty(grid));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Set(u64, u64),
        Clear(u64, u64),
        Reset,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            10 => (0..700u64, 0..200u64).prop_map(|(at, len)| Step::Set(at, at + len)),
            10 => (0..700u64, 0..200u64).prop_map(|(at, len)| Step::Clear(at, at + len)),
            1 => Just(Step::Reset),
        ];
        proptest::collection::vec(step, 1..40)
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set_of_chunks(steps in steps(), from in 0..700u64, len in 0..200u64) {
            let grid = Grid::new(700 * 512, 512);
            let mut bitmap = Bitmap::empty(grid);
            let mut model = std::collections::BTreeSet::new();
            for step in steps {
                match step {
                    Step::Set(start, end) => {
                        bitmap.set_range(&(start..end));
                        model.extend(start..end.min(700));
                    }
                    Step::Clear(start, end) => {
                        bitmap.clear_range(&(start..end));
                        model.retain(|chunk| !(start..end).contains(chunk));
                    }
                    Step::Reset => {
                        bitmap.reset();
                        model.clear();
                    }
                }
                prop_assert_eq!(bitmap.count(), model.len() as u64);
                prop_assert_eq!(bitmap.next_set(from), model.range(from..).next().copied());
                prop_assert_eq!(bitmap.get(from), model.contains(&from));
                let range = from..from + len;
                prop_assert_eq!(bitmap.count_range(&range), model.range(range.clone()).count() as u64);
                let clear = range.clone().find(|chunk| !model.contains(chunk)).unwrap_or(range.end);
                prop_assert_eq!(bitmap.next_clear(from, range.end), clear);
            }
        }
    }
}
