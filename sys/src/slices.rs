//! A payload kept in place: as many slices as an I/O can have, and how many it has. Made once and set again for each I/O, so
//! that nothing is allocated on the data path.

use crate::SEGMENTS;
use crate::region::BufferSlice;
use crate::zeroed::{Zeroed, zeroed};

/// The slices of one payload.
#[derive(Debug, Clone, Copy)]
pub struct Slices {
    items: [BufferSlice; SEGMENTS],
    len: usize,
}

// SAFETY: integers.
unsafe impl Zeroed for Slices {}

impl Slices {
    /// So many of no payload. Memory is taken where one is set.
    #[must_use]
    pub fn array(count: usize) -> Box<[Self]> {
        zeroed(count)
    }

    /// No payload.
    pub const NONE: Self = Self { items: [BufferSlice::EMPTY; SEGMENTS], len: 0 };

    /// Keeps a payload in place of what was there. It has at most [`SEGMENTS`] slices, as that of every I/O.
    #[inline]
    pub fn set(&mut self, payload: &[BufferSlice]) {
        self.items[..payload.len()].copy_from_slice(payload);
        self.len = payload.len();
    }

    /// The payload.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[BufferSlice] {
        &self.items[..self.len]
    }
}

impl FromIterator<BufferSlice> for Slices {
    /// A payload put together from at most [`SEGMENTS`] slices; those of no bytes are left out.
    fn from_iter<I: IntoIterator<Item = BufferSlice>>(slices: I) -> Self {
        let mut gathered = Self::NONE;
        for slice in slices.into_iter().filter(|slice| slice.length > 0) {
            gathered.items[gathered.len] = slice;
            gathered.len += 1;
        }
        gathered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_takes_the_place_of_the_one_before() {
        let of = |length| BufferSlice { length, ..BufferSlice::EMPTY };
        let mut kept: Slices = [of(1), of(0), of(2)].into_iter().collect();
        assert_eq!(kept.as_slice(), [of(1), of(2)]);
        kept.set(&[of(3)]);
        assert_eq!(kept.as_slice(), [of(3)]);
        kept.set(&[of(4); SEGMENTS]);
        assert_eq!(kept.as_slice().len(), SEGMENTS);
    }
}
