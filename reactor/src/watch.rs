//! Watches: what somebody else writes when he has work for a poller that has none.
//!
//! Polling a disk whose guest asks for nothing walks from the disk to its session, to its queues and to a ring, and meets a cache
//! miss at each step, only to find one word of guest memory as it was. The address of that word and its value are all that is
//! needed to know as much, and the next one's can be fetched ahead. A poller that is quiet is asked for its [`Watch`] and is not
//! polled while what it names stays the same; messages need not be in it, since whoever sends one rings the doorbell.
//!
//! A word keeps its memory mapped. So a watch is given up before its poller is polled, which may let memory go: the last to hold it
//! must not be the reactor, for which unmapping takes too long.
//!
//! Rejected: fetching ahead all that a poll reads (some thirty lines for each disk, and every layer has to name its own).

use std::sync::atomic::Ordering;

use resilver_sys::Area;

use crate::poller::{Context, Poller, Work};

/// The most words of one watch: a disk whose guests have more rings is polled.
pub const WORDS_MAX: usize = 8;

/// A word of shared memory, and what it was.
#[derive(Debug)]
struct Word {
    area: Area,
    offset: u32,
    value: u16,
}

/// What can give a poller work that has none, apart from messages: a change of any of these words, or what only a poll can tell.
#[derive(Debug, Default)]
pub struct Watch {
    words: [Option<Word>; WORDS_MAX],
    /// How many there are; none where only a poll can tell.
    count: Option<usize>,
}

impl Watch {
    /// Polls `poller`, and asks it anew what to watch if it is idle.
    pub fn poll(&mut self, poller: &mut dyn Poller, cx: &Context<'_>) -> Work {
        self.give_up();
        let work = poller.poll(cx);
        if work == Work::Idle {
            self.ask(poller);
        }
        work
    }

    /// Asks a poller that has just been found idle what to watch.
    pub(crate) fn ask(&mut self, poller: &dyn Poller) {
        self.begin();
        poller.watch(self);
    }

    /// Begins anew: nothing can, so far.
    fn begin(&mut self) {
        self.give_up();
        self.count = Some(0);
    }

    /// A change of the 16-bit word at byte `offset` of `area` from `value`, too. Where there are more words than [`WORDS_MAX`] only a
    /// poll can tell.
    pub fn add(&mut self, area: &Area, offset: usize, value: u16) {
        let Some(count) = &mut self.count else { return };
        match (self.words.get_mut(*count), u32::try_from(offset)) {
            (Some(free), Ok(offset)) => {
                *free = Some(Word { area: area.clone(), offset, value });
                *count += 1;
            }
            (Some(_) | None, _) => self.give_up(),
        }
    }

    /// Only a poll can tell. What was named is given up.
    pub fn give_up(&mut self) {
        for word in self.words.iter_mut().take(self.count.take().unwrap_or(0)) {
            *word = None;
        }
    }

    /// Whether the poller need not be polled to know that it has no work. What was written before a word that has changed is for the
    /// poll to see, which reads it again.
    #[inline]
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.count.is_some()
            && self.words().all(|Word { area, offset, value }| {
                area.load_u16(*offset as usize, Ordering::Relaxed) == *value
            })
    }

    /// Has the words fetched, for a look at them soon.
    #[inline]
    pub(crate) fn prefetch(&self) {
        for word in self.words() {
            word.area.prefetch(word.offset as usize);
        }
    }

    #[inline]
    fn words(&self) -> impl Iterator<Item = &Word> {
        self.words.iter().take(self.count.unwrap_or(0)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use resilver_sys::Mapping;

    fn area() -> Area {
        Area::new(&Mapping::anonymous(4096).unwrap(), 0, 64, 2).unwrap()
    }

    fn nothing() -> Watch {
        let mut watch = Watch::default();
        watch.begin();
        watch
    }

    #[test]
    fn any_change_of_any_word_ends_the_stillness() {
        let areas: Vec<_> = (0..WORDS_MAX).map(|_| area()).collect();
        let mut watch = nothing();
        for area in &areas {
            watch.add(area, 2, 0);
        }
        watch.prefetch();
        assert!(watch.is_still());
        for area in &areas {
            area.store_u16(0, 1, Ordering::Release);
            assert!(watch.is_still(), "another word");
            area.store_u16(2, 1, Ordering::Release);
            assert!(!watch.is_still());
            area.store_u16(2, 0, Ordering::Release);
        }
        assert!(watch.is_still());
    }

    #[test]
    fn what_had_changed_already_when_it_was_named_is_a_change() {
        let area = area();
        area.store_u16(4, 8, Ordering::Release);
        let mut watch = nothing();
        watch.add(&area, 4, 7);
        assert!(!watch.is_still());
    }

    #[test]
    fn more_words_than_there_is_room_for_are_polled_for() {
        let area = area();
        let mut watch = nothing();
        for _ in 0..=WORDS_MAX {
            watch.add(&area, 0, 0);
        }
        assert!(watch.count.is_none());
        watch.add(&area, 0, 0);
        assert!(!watch.is_still(), "it stays so");
    }

    #[test]
    fn where_nothing_can_come_nothing_has() {
        assert!(nothing().is_still());
    }

    #[test]
    fn before_anything_was_said_only_a_poll_can_tell() {
        assert!(!Watch::default().is_still());
    }

    #[test]
    fn what_is_given_up_is_kept_no_longer() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let area = Area::new(&mapping, 0, 64, 2).unwrap();
        let mut watch = nothing();
        watch.add(&area, 0, 0);
        watch.add(&area, 2, 0);
        assert_eq!(Arc::strong_count(&mapping), 4);
        watch.give_up();
        assert_eq!(Arc::strong_count(&mapping), 2);
    }
}
