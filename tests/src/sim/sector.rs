//! Sectors: the unit in which the simulator knows what is written where.
//!
//! Every sector that a guest writes is filled with one repeated 64-bit word that names the write, the sector and the
//! version of the buffer it came from. So a wrong sector says by itself where its bytes belong, and a sector torn between
//! two versions of a buffer shows as one of two words.

use std::fmt;
use std::sync::Arc;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Bytes of a word.
const WORD: usize = 8;

/// Names the bytes of one sector of one write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The write.
    pub write: u32,
    /// The sector it was meant for.
    pub sector: u16,
    /// How often the guest had changed its buffer since submission.
    pub version: u8,
}

impl Stamp {
    const MARK: u64 = 0xa5 << 56;

    /// The word that fills the sector; never zero.
    #[must_use]
    pub fn word(self) -> u64 {
        Self::MARK
            | u64::from(self.write) << 24
            | u64::from(self.sector) << 8
            | u64::from(self.version)
    }

    /// The stamp that a word spells.
    #[must_use]
    pub fn of_word(word: u64) -> Option<Self> {
        let stamp =
            Self { write: (word >> 24) as u32, sector: (word >> 8) as u16, version: word as u8 };
        (stamp.word() == word).then_some(stamp)
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}@{}.{}", self.write, self.sector, self.version)
    }
}

/// The content of one sector.
#[derive(Clone, PartialEq, Eq)]
pub struct Sector {
    bytes: Arc<[u8; SECTOR]>,
    /// The word that fills it, if one does.
    word: Option<u64>,
}

impl Sector {
    /// A sector of zeroes.
    #[must_use]
    pub fn zero() -> Self {
        Self::filled(0)
    }

    /// A sector filled with one word.
    #[must_use]
    pub fn filled(word: u64) -> Self {
        let mut bytes = [0; SECTOR];
        for chunk in bytes.chunks_exact_mut(WORD) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Self { bytes: Arc::new(bytes), word: Some(word) }
    }

    /// The sector with these bytes.
    ///
    /// # Panics
    /// Not [`SECTOR`] bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let bytes: [u8; SECTOR] = bytes.try_into().expect("a sector's length");
        let mut words = bytes.chunks_exact(WORD);
        let first = words.next().unwrap_or_default();
        let word = words.all(|word| word == first).then(|| word_of(first));
        Self { bytes: Arc::new(bytes), word }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// The word that fills it, if one does.
    #[must_use]
    pub fn word(&self) -> Option<u64> {
        self.word
    }

    /// All its words.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.bytes.chunks_exact(WORD).map(word_of)
    }

    /// The first half of one sector and the second of another: what tearing gives.
    #[must_use]
    pub fn torn(first: &Self, second: &Self) -> Self {
        let mut bytes = *first.bytes;
        bytes[SECTOR / 2..].copy_from_slice(&second.bytes[SECTOR / 2..]);
        Self::of_bytes(&bytes)
    }
}

fn word_of(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

impl fmt::Debug for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = None;
        for word in self.words().filter(|word| last.replace(*word) != Some(*word)) {
            match (word, Stamp::of_word(word)) {
                (0, _) => f.write_str("[zero]")?,
                (_, Some(stamp)) => write!(f, "[{stamp:?}]")?,
                (_, None) => write!(f, "[{word:#x}]")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_back_from_its_word_and_a_torn_sector_shows_both_words() {
        let one = Stamp { write: 77, sector: 3, version: 0 };
        let two = Stamp { version: 1, ..one };
        assert_eq!(Stamp::of_word(one.word()), Some(one));
        assert_eq!(Stamp::of_word(0), None);
        let torn = Sector::torn(&Sector::filled(one.word()), &Sector::filled(two.word()));
        assert_eq!(torn.word(), None);
        assert_eq!(format!("{torn:?}"), "[w77@3.0][w77@3.1]");
    }
}
