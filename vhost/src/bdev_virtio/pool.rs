//! Things that are taken and put back by several threads, one of which looks at those that nobody has.
//!
//! Whoever looks has the thing taken out meanwhile. So one that is not there may be back in a moment, and nobody is told that there is
//! none because of a look: a mirror would be refused for want of a ring that is free.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;

/// The things that nobody has.
pub(super) struct Pool<T> {
    free: ArrayQueue<T>,
    /// Looks begun and ended: odd while one is under way.
    looks: AtomicU64,
}

impl<T> Pool<T> {
    /// Of these things, and no more than as many.
    pub(super) fn new(things: Vec<T>) -> Self {
        let free = ArrayQueue::new(things.len());
        for thing in things {
            // There is room for all.
            let _ = free.push(thing);
        }
        Self { free, looks: AtomicU64::new(0) }
    }

    /// One of them; waits for a look that may have it. Not for a reactor.
    pub(super) fn take(&self) -> Option<T> {
        loop {
            let before = self.looks.load(Ordering::SeqCst);
            if let Some(thing) = self.free.pop() {
                return Some(thing);
            }
            if before.is_multiple_of(2) && before == self.looks.load(Ordering::SeqCst) {
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// Puts one back that was taken.
    pub(super) fn put(&self, thing: T) {
        // There is room for all.
        let _ = self.free.push(thing);
    }

    /// Shows `visitor` all that are there, one after the other. One thread looks.
    pub(super) fn each(&self, mut visitor: impl FnMut(&mut T)) {
        for _ in 0..self.free.len() {
            self.looks.fetch_add(1, Ordering::SeqCst);
            let seen = self.free.pop().map(|mut thing| {
                visitor(&mut thing);
                self.put(thing);
            });
            self.looks.fetch_add(1, Ordering::SeqCst);
            if seen.is_none() {
                return;
            }
        }
    }

    /// How many there are, taken or not.
    pub(super) fn capacity(&self) -> usize {
        self.free.capacity()
    }

    /// How many nobody has; one less while it is looked at.
    pub(super) fn len(&self) -> usize {
        self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn what_is_looked_at_is_not_taken_for_gone() {
        let (pool, over) = (Pool::new(vec![0u64]), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    pool.each(|looks| *looks += 1);
                }
            });
            for turn in 0..100_000 {
                let thing = pool.take();
                let found = thing.is_some();
                if let Some(thing) = thing {
                    pool.put(thing);
                }
                if !found {
                    over.store(true, Ordering::Relaxed);
                    panic!("none in turn {turn}");
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        let thing = pool.take();
        assert!(thing.is_some() && pool.take().is_none() && pool.len() == 0);
    }
}
