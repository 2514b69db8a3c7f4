//! Slots: a fixed set of numbered places for what a channel has in progress.
//!
//! The number goes down as the tag of a child's I/O, or into a ring, and comes back with the completion. Items are made once
//! and used again in place, so nothing is allocated and nothing large is moved on the data path.

use std::ops::{Index, IndexMut};

/// A fixed set of places. A claimed one belongs to its claimer until it is given back.
#[derive(Debug)]
pub struct Slots<T> {
    items: Box<[T]>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    /// `count` places, each as `make` makes it.
    #[must_use]
    pub fn new(count: usize, make: impl FnMut() -> T) -> Self {
        let items: Box<[T]> = std::iter::repeat_with(make).take(count).collect();
        // The lowest number is claimed first: few places in use stay few cache lines.
        let free = (0..u32::try_from(count).unwrap_or(u32::MAX)).rev().collect();
        Self { items, free }
    }

    /// A free place; none if all are claimed.
    #[inline]
    pub fn claim(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Gives a place back.
    #[inline]
    pub fn release(&mut self, slot: u32) {
        debug_assert!(!self.free.contains(&slot), "slot {slot} was given back twice");
        self.free.push(slot);
    }

    /// The numbers of all places, claimed or not.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // as many as there are numbers
    pub fn numbers(&self) -> std::ops::Range<u32> {
        0..self.items.len() as u32
    }

    /// Places claimed.
    #[must_use]
    pub fn claimed(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

impl<T> Index<u32> for Slots<T> {
    type Output = T;
    #[inline]
    fn index(&self, slot: u32) -> &T {
        &self.items[slot as usize]
    }
}

impl<T> IndexMut<u32> for Slots<T> {
    #[inline]
    fn index_mut(&mut self, slot: u32) -> &mut T {
        &mut self.items[slot as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_claimed_once_until_it_is_given_back() {
        let mut slots = Slots::new(2, || 0u8);
        let (one, two) = (slots.claim().unwrap(), slots.claim().unwrap());
        assert_ne!(one, two);
        assert_eq!((slots.claim(), slots.claimed()), (None, 2));
        slots[one] = 7;
        slots.release(one);
        assert_eq!(slots.claim(), Some(one));
        assert_eq!((slots[one], slots[two]), (7, 0));
    }
}
