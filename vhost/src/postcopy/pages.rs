//! Which pages of a region of guest memory have come.
//!
//! A bit for each page, in the size of the region's file's pages: none is set to begin with, a [`super::fetcher`] sets one when it
//! has touched the page, and none is ever taken back: a monitor lets no page go while a guest's memory is on its way (QEMU
//! keeps the balloon from it). Reactors read the bits, fetchers and nobody else set them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use resilver_sys::userfault::page_of;
use resilver_sys::{FaultWindow, Mapping};

/// Pages of one word of the map.
const WORD: usize = u64::BITS as usize;

/// The pages of one region.
#[derive(Debug)]
pub struct RegionPages {
    /// What a touched page is waited for in. None where somebody else says what has come: a simulator.
    window: Option<FaultWindow>,
    here: Box<[AtomicU64]>,
}

impl RegionPages {
    /// The pages of the region that `mapping` maps, none of which is known to be there.
    #[must_use]
    pub fn new(mapping: &Mapping, window: Option<FaultWindow>) -> Self {
        // A mapping that begins within a page has one more than its length makes.
        let pages = page_of(mapping, mapping.len() as u64) + 1;
        let here = (0..pages.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect();
        Self { window, here }
    }

    /// Where the region begins in the window, as the monitor is told it. Zero without one.
    pub(crate) fn base(&self) -> u64 {
        self.window.as_ref().map_or(0, FaultWindow::base)
    }

    /// Whether this page has come.
    #[inline]
    #[must_use]
    pub fn has(&self, page: usize) -> bool {
        let word = self.here.get(page / WORD);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % WORD) & 1 == 1)
    }

    /// This page has come.
    pub fn arrived(&self, page: usize) {
        if let Some(word) = self.here.get(page / WORD) {
            word.fetch_or(1 << (page % WORD), Ordering::Release);
        }
    }

    /// Waits for a page.
    pub(crate) fn fetch(&self, page: usize) {
        if let Some(window) = &self.window {
            window.touch(page);
        }
        self.arrived(page);
    }

    /// Lets everybody go who waits for a page, now and later: nobody uses the region any more, or all of it has come.
    pub(crate) fn close(&self) {
        if let Some(window) = &self.window {
            window.close();
        }
    }

    /// Whether the file was found shortened.
    pub(crate) fn has_shrunk(&self) -> bool {
        self.window.as_ref().is_some_and(|window| window.mapping().poisoned())
    }
}

/// Pages of one region that are wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Whose.
    pub region: Arc<RegionPages>,
    /// Which: from the first to the last that is missing.
    pub pages: Range<usize>,
}

impl Wanted {
    /// Those of the `length` bytes at byte `offset` of what `mapping` maps that are missing; none if all are there.
    #[must_use]
    pub(crate) fn of(
        region: &Arc<RegionPages>,
        mapping: &Mapping,
        offset: u64,
        length: u64,
    ) -> Option<Self> {
        let last = page_of(mapping, offset.saturating_add(length.max(1) - 1));
        let first = (page_of(mapping, offset)..=last).find(|page| !region.has(*page))?;
        Some(Self { region: Arc::clone(region), pages: first..last + 1 })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_is_wanted_are_the_pages_that_have_not_come() {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x20_0000).unwrap();
        // It begins in the middle of its file's second page.
        let mapping = Mapping::shared(fd.as_fd(), 0x1800, 0x10_0000).unwrap();
        let pages = Arc::new(RegionPages::new(&mapping, None));
        let wanted =
            |offset, length| Wanted::of(&pages, &mapping, offset, length).map(|it| it.pages);
        assert_eq!(wanted(0, 1), Some(0..1));
        assert_eq!(wanted(0x7ff, 2), Some(0..2));
        assert_eq!(wanted(0x800, 0x1000), Some(1..2));
        assert_eq!(wanted(0xf_ffff, 1), Some(0x100..0x101));
        pages.arrived(0);
        pages.arrived(2);
        assert_eq!(wanted(0, 0x800), None);
        assert_eq!(wanted(0, 0x2800), Some(1..3), "the one behind it is looked at again");
        pages.arrived(1);
        assert_eq!(wanted(0, 0x2800), None);
        assert_eq!(wanted(0, 0x2801), Some(3..4));
        pages.arrived(usize::MAX);
    }
}
