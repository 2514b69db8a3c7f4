//! Areas for the model checker: the words that a ring's two sides share, kept by loom.
//!
//! Only a protocol's index, flag and event words matter to its order, and those have 16 bits; so the memory is made of 16-bit
//! words, and a longer access is several, the last word first: a packed descriptor's flags, which say whether the rest is
//! valid, are there. That is weaker than the machine, which may only find more. Areas of a mapping do not share memory
//! here: a model makes each of its areas with [`Area::words`] and hands out clones.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::atomic::AtomicU16;

use super::AreaError;
use crate::mapping::Mapping;

thread_local! {
    static FENCES: Cell<bool> = const { Cell::new(true) };
}

/// A fence, unless [`without_fences`] says otherwise.
pub fn fence(order: Ordering) {
    if FENCES.get() {
        loom::sync::atomic::fence(order);
    }
}

/// Does something without its fences: to show that a model would notice.
pub fn without_fences<T>(act: impl FnOnce() -> T) -> T {
    FENCES.set(false);
    let result = act();
    FENCES.set(true);
    result
}

/// A piece of the model's memory; a clone is the same piece.
#[derive(Debug, Clone)]
pub struct Area {
    words: Arc<[AtomicU16]>,
}

macro_rules! accessors {
    ($load:ident, $store:ident, $int:ty) => {
        /// As of the real area.
        #[must_use]
        pub fn $load(&self, offset: usize, ordering: Ordering) -> $int {
            let mut bytes = [0; size_of::<$int>()];
            for (word, into) in bytes.chunks_exact_mut(2).enumerate().rev() {
                into.copy_from_slice(&self.word(offset / 2 + word).load(ordering).to_ne_bytes());
            }
            <$int>::from_ne_bytes(bytes)
        }

        /// As of the real area.
        pub fn $store(&self, offset: usize, value: $int, ordering: Ordering) {
            let bytes = value.to_ne_bytes();
            let (words, _) = bytes.as_chunks::<2>();
            for (word, from) in words.iter().enumerate() {
                self.word(offset / 2 + word).store(u16::from_ne_bytes(*from), ordering);
            }
        }
    };
}

impl Area {
    /// Nothing: a model has no caches.
    pub fn prefetch(&self, _offset: usize) {}

    /// `len` bytes of zeroes. Within a model only.
    #[must_use]
    pub fn words(len: usize) -> Self {
        Self { words: (0..len.div_ceil(2)).map(|_| AtomicU16::new(0)).collect() }
    }

    /// Memory of its own, whatever the mapping has.
    ///
    /// # Errors
    /// None; the real one has some.
    pub fn new(
        _mapping: &Arc<Mapping>,
        _offset: u64,
        len: usize,
        _alignment: usize,
    ) -> Result<Self, AreaError> {
        Ok(Self::words(len))
    }

    /// Bytes of the area.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        2 * self.words.len()
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        &self.words[at]
    }

    accessors!(load_u16, store_u16, u16);
    accessors!(load_u32, store_u32, u32);
    accessors!(load_u64, store_u64, u64);

    /// As of the real area.
    #[must_use]
    pub fn load_u8(&self, offset: usize, ordering: Ordering) -> u8 {
        self.word(offset / 2).load(ordering).to_ne_bytes()[offset % 2]
    }

    /// As of the real area.
    pub fn store_u8(&self, offset: usize, value: u8, ordering: Ordering) {
        let change = |word: u16| {
            let mut bytes = word.to_ne_bytes();
            bytes[offset % 2] = value;
            Some(u16::from_ne_bytes(bytes))
        };
        let _ = self.word(offset / 2).fetch_update(ordering, Ordering::Relaxed, change);
    }

    /// As of the real area.
    pub fn fetch_or_u8(&self, offset: usize, bits: u8) {
        let mut word = [0; 2];
        word[offset % 2] = bits;
        self.word(offset / 2).fetch_or(u16::from_ne_bytes(word), Ordering::Relaxed);
    }
}
