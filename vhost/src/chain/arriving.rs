//! Chains of a guest whose memory is on its way ([`crate::postcopy`]): they may name pages that are missing.
//!
//! Then a chain is not gathered: the table that is missing, or all that the chain names, is asked for, and later it is gathered from its
//! beginning. What is looked up is what was gathered, so no descriptor is fetched between the look and the use.

use resilver_reactor::Context;
use resilver_sys::BufferSlice;

use super::{Chain, Extent, Gather, Indirect};
use crate::memory::GuestMemory;
use crate::postcopy::pages::Wanted;
use crate::ring::{ChainFault, Descriptor, Descriptors};

/// Why a walk ended before its chain.
enum Stopped {
    Fault(ChainFault),
    /// At a table that is missing. It is all that was gathered.
    Missing,
}

impl From<ChainFault> for Stopped {
    fn from(fault: ChainFault) -> Self {
        Self::Fault(fault)
    }
}

/// Some of memory may be missing: a chain is gathered where all that it names has arrived. Else [`Chain::wanted`] says what has not.
pub(crate) enum Arrived {}

impl Gather for Arrived {
    const AHEAD: bool = false;

    fn gather<D: Descriptors>(
        chain: &mut Chain,
        cx: &Context<'_>,
        memory: &GuestMemory,
        descriptors: D,
        indirect: Indirect,
    ) -> Result<Option<Extent>, ChainFault> {
        chain.reset();
        let there = |chain: &mut Chain, table: &Descriptor| chain.has_table(memory, table);
        let extent = match chain.walk(cx, memory, descriptors, indirect, there) {
            Ok(walked) => walked,
            Err(Stopped::Missing) => return Ok(None),
            Err(Stopped::Fault(fault)) => return Err(fault),
        };
        chain.set_status_aside(memory)?;
        let missing = chain.wanted(memory).next().is_some();
        Ok((!missing).then_some(extent))
    }
}

impl Chain {
    /// The missing pages of what was gathered last.
    pub fn wanted<'a>(&'a self, memory: &'a GuestMemory) -> impl Iterator<Item = Wanted> + 'a {
        let gathered = self.slices.get(..self.len).unwrap_or_default().iter();
        gathered.chain([&self.status]).filter_map(|slice| memory.wanted(slice))
    }

    /// Goes on if all of a table is there; else the table is gathered, and nothing else.
    fn has_table(&mut self, memory: &GuestMemory, table: &Descriptor) -> Result<(), Stopped> {
        let pieces = || memory.slices(table.address, table.length);
        if pieces().all(|slice| memory.wanted(&slice).is_none()) {
            return Ok(());
        }
        self.reset();
        self.status = BufferSlice::EMPTY;
        pieces().for_each(|slice| self.push(slice, false));
        Err(Stopped::Missing)
    }
}
