//! The next chains of a split ring, looked at together before they are taken.
//!
//! Each step on the way to a request is a line in the guest's cache that says where the next one is: the entry of the ring, the
//! descriptor, its indirect table, the header. One request after the other waits for each of them; so the same step is made for some
//! requests together, and their lines come together. A packed ring lies in order, which processors see by themselves.
//!
//! **Trust.** The head that was read here is the one that is popped, and the beginning of a table that was fetched here the one that is
//! followed. The first descriptor of any other chain is a hint: the walk fetches it again, and says what is wrong with it.
//!
//! **Invariant.** The next entry here is the ring's next one, because nothing but a queue's `take` pops while there are any: who fetches
//! clears first, and whoever puts a chain back does not look ahead.

use resilver_reactor::Context;

use crate::chain::{Indirect, Table, WORD};
use crate::memory::GuestMemory;
use crate::ring::{Descriptors, RingFault};
use crate::split::SplitRing;

/// Chains that are looked at together: what a core can have on the way to it at a time.
const AHEAD: u16 = 16;

/// A chain whose turn comes soon.
#[derive(Debug)]
pub(super) struct Near {
    pub(super) head: u16,
    /// Whether it is a table, of which the beginning has been fetched.
    pub(super) begun: bool,
    pub(super) table: Table,
}

/// The chains that a turn takes next.
#[derive(Debug)]
pub(crate) struct Ahead {
    near: Box<[Near]>,
    /// The first that has not been taken, and the end of them.
    next: u16,
    end: u16,
}

impl Default for Ahead {
    fn default() -> Self {
        let near = |_| Near { head: 0, begun: false, table: Table::EMPTY };
        Self { near: (0..AHEAD).map(near).collect(), next: 0, end: 0 }
    }
}

impl Ahead {
    /// Forgets them all: they are of another ring or another turn.
    pub(super) fn clear(&mut self) {
        (self.next, self.end) = (0, 0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next == self.end
    }

    /// The next one, in the ring's order.
    #[inline]
    pub(super) fn next(&mut self) -> Option<&mut Near> {
        if self.next == self.end {
            return None;
        }
        self.next += 1;
        self.near.get_mut(usize::from(self.next) - 1)
    }

    /// Looks at the next chains of `ring`, at most so many.
    ///
    /// # Errors
    /// The driver broke the ring.
    #[inline(always)]
    pub(super) fn look(
        &mut self,
        cx: &Context<'_>,
        memory: &GuestMemory,
        ring: &mut SplitRing,
        indirect: Indirect,
        most: u16,
    ) -> Result<(), RingFault> {
        let count = ring.available()?.min(AHEAD).min(most);
        (self.next, self.end) = (0, count);
        let near = self.near.get_mut(..usize::from(count)).unwrap_or_default();
        for (near, ahead) in near.iter_mut().zip(0..) {
            (near.head, near.begun) = (ring.head(ahead), false);
            ring.prefetch(near.head);
        }
        // Of one alone there is nothing to wait for meanwhile.
        let several = count > 1;
        for near in near.iter_mut() {
            let Some(first) = ring.chain(near.head).fetch() else { continue };
            near.begun = indirect == Indirect::Allowed && near.table.enter(&first).is_ok();
            if several && let Some(slice) = memory.translate(first.address, first.length) {
                cx.memory.prefetch(slice);
            }
        }
        for near in near.iter_mut().filter(|near| near.begun) {
            let header = near.table.begin(cx, memory);
            near.begun = header.is_some();
            if let Some(address) = header.filter(|_| several)
                && let Some(header) = memory.translate(address, WORD)
            {
                cx.memory.prefetch(header);
            }
        }
        // The next look, in this turn or the next one, finds its descriptors here.
        let there = ring.available()?.min(count + AHEAD);
        for ahead in count..there {
            ring.prefetch(ring.head(ahead));
        }
        Ok(())
    }
}
