//! A queue whose guest's memory is on its way ([`crate::postcopy`]).
//!
//! Apart from the rest, so that the path of every other request is as long as without it: a branch for each look at a ring. What both
//! paths use is inlined by order (`inline(always)` in `queue.rs`, `chain.rs`, `split.rs`, `request.rs` and `blk.rs`): of a function that
//! has a second caller the compiler makes a call, in the first one too, which were 150 instructions for each request.

use std::sync::Arc;

use resilver_bdev::Port;
use resilver_reactor::Context;

use super::{LiveQueue, NO_SLOT, Next, PER_TURN, Shared, Source};
use crate::chain::Arrived;
use crate::postcopy::fetcher::Fetcher;
use crate::ring::RingFault;

/// What a queue waits for.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    /// Who fetches missing pages.
    fetcher: Option<Arc<Fetcher>>,
    /// The next request waits for pages that were asked for.
    waits: bool,
}

impl Arriving {
    /// Whether the next request waits for pages that are not there yet.
    pub(super) fn is_waiting(&mut self) -> bool {
        self.waits = self.waits && self.fetcher.as_ref().is_some_and(|it| !it.is_idle());
        self.waits
    }
}

impl LiveQueue {
    /// The same, with somebody to fetch the pages that its requests name.
    #[must_use]
    pub fn with_fetcher(self, fetcher: Option<Arc<Fetcher>>) -> Self {
        Self { arriving: Arriving { fetcher, waits: false }, ..self }
    }

    /// All of the guest's memory has come.
    pub(crate) fn arrived(&mut self) {
        self.arriving = Arriving::default();
    }

    /// As [`LiveQueue::fetch`]. A request that names a missing page stays where it is, with all behind it, until the page is there.
    ///
    /// # Errors
    /// The driver broke the ring, or the chains that are owed.
    #[cold]
    #[inline(never)]
    pub(crate) fn fetch_arriving(
        &mut self,
        cx: &Context<'_>,
        shared: &mut Shared,
        port: &mut Port<'_>,
        queue: u32,
        source: Source,
    ) -> Result<usize, RingFault> {
        let (_, most) = PER_TURN;
        let mut count = 0;
        while count < usize::from(most) && self.free != NO_SLOT && !self.arriving.is_waiting() {
            let next = match source {
                Source::Ring => self.take::<Arrived>(cx, shared)?,
                Source::Owed => self.take_again::<Arrived>(cx, shared)?,
            };
            let taken = match next {
                Next::Taken(taken) => taken,
                Next::Nothing => break,
                Next::Missing => {
                    self.wait_for_pages(shared);
                    break;
                }
            };
            self.begin(cx, shared, port, queue, taken);
            count += 1;
        }
        Ok(count)
    }

    /// Asks for what the chain that was gathered last lacks.
    fn wait_for_pages(&mut self, shared: &Shared) {
        let Some(fetcher) = &self.arriving.fetcher else { return };
        // What there is no room for is asked for when the rest is there.
        let _all = shared.chain.wanted(&shared.memory).all(|wanted| fetcher.ask(wanted));
        fetcher.wake();
        self.arriving.waits = true;
    }
}
