//! Which rows of its tables a mirror has come to, one bit a letter: a simulator that never visits a row proves nothing of it.

use super::tables::on_hang;
use crate::job::{JobVerb, Side};

/// Rows by letter, `A` the lowest bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct RowSet(u32);

impl RowSet {
    /// The rows with these letters.
    #[must_use]
    pub const fn of(letters: &str) -> Self {
        let (mut set, mut at) = (0, 0);
        while at < letters.len() {
            set |= 1 << (letters.as_bytes()[at] - b'A');
            at += 1;
        }
        Self(set)
    }

    #[inline]
    pub(super) fn visit(&mut self, row: char) {
        self.0 |= 1 << (u32::from(row) - u32::from('A'));
    }

    /// Their letters.
    #[must_use]
    pub fn letters(self) -> String {
        ('A'..='Z').filter(|row| self.0 & Self::of(row.encode_utf8(&mut [0; 4])).0 != 0).collect()
    }
}

/// Rows of all three tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Rows {
    /// What a guest's write does.
    pub write: RowSet,
    /// What a failure does.
    pub failure: RowSet,
    /// What a verb does while a leg hangs.
    pub hang: RowSet,
}

impl Rows {
    /// Every row there is.
    pub const ALL: Self = Self {
        write: RowSet::of("ABCDEFORUV"),
        failure: RowSet::of("ABCDEFGHI"),
        hang: RowSet::of("ABC"),
    };

    /// Adds what another mirror has come to.
    pub fn merge(&mut self, other: Self) {
        self.write.0 |= other.write.0;
        self.failure.0 |= other.failure.0;
        self.hang.0 |= other.hang.0;
    }

    /// Adds the row of a verb that came while a leg hung: who made it hang knows, the mirror only sees that nothing ends.
    pub fn visit_hang(&mut self, verb: JobVerb, hung: Side) {
        self.hang.visit(on_hang(verb, hung).0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_rows_is_written_as_its_letters() {
        let mut set = RowSet::of("AUV");
        set.visit('C');
        assert_eq!(set.letters(), "ACUV");
        assert_eq!(RowSet::default().letters(), "");
    }
}
