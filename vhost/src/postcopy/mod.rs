//! A guest whose memory is still on its way: the destination of a post-copy migration (vhost-user, "Postcopy").
//!
//! The guest runs here before its pages have come, and whoever touches a missing page waits. A reactor may not, so it never
//! touches one:
//!
//! * Each region of guest memory has a map of the pages that are known to be there ([`pages`]), and what a chain names is looked up
//!   in it before the chain is taken from its ring (`queue.rs`). What is missing is asked for, and the ring is left
//!   alone until it is there; nothing of it is half done.
//! * A thread for each ring waits in the reactor's place ([`fetcher`]), on a second mapping of the region, a window. Only the windows
//!   are registered with the userfaultfd that the monitor serves. They are what it is told of as our mappings.
//! * The mappings that the reactor uses are registered with another userfaultfd, which has nobody wait: a fault of ours
//!   above, or a guest that changes a descriptor at the right moment, ends the guest's session and stops nobody.
//! * A ring starts, or moves, when all of its own pages are there.
//!
//! When the monitor says that all has come, or the session ends, the windows are closed: whoever waits in one is let go, and the holes
//! that the memory has are left to whoever may fill them. A target that filled one with zeroes would corrupt a guest that
//! goes on without it.
//!
//! **Trust.** A userfaultfd gives its holder power over the address space that it belongs to: it can be registered for other
//! memory of this process, and fill what was never touched there. So a monitor that may do post-copy is trusted as much as
//! the target itself, and a controller offers it only if its operator says so.

pub mod fetcher;
pub mod pages;

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use resilver_reactor::Doorbell;
use resilver_sys::{FaultRefusal, FaultWindow, Mapping, OnFault, Userfault};

use crate::memory::{GuestMemory, GuestRegion, MemoryError};
use crate::message::RegionDescription;
use fetcher::Fetcher;
use pages::RegionPages;

/// Which file memory is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryFile {
    device: u64,
    inode: u64,
}

impl MemoryFile {
    /// The file behind a descriptor; none where the kernel does not say.
    pub(crate) fn of(fd: &OwnedFd) -> Option<Self> {
        let stat = rustix::fs::fstat(fd).ok()?;
        Some(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// Whether this process may have missing pages served.
///
/// # Errors
/// The kernel's reason: see [`Userfault::open`].
pub(crate) fn is_possible() -> io::Result<()> {
    Userfault::open(OnFault::Wait).and_then(|_| FaultRefusal::new()).map(drop)
}

/// What a session has for it, from POSTCOPY_ADVISE to POSTCOPY_END or its own end.
pub(crate) struct PostCopy {
    /// What the monitor serves.
    faults: Arc<Userfault>,
    /// What stands under the reactor's mappings.
    refusal: FaultRefusal,
    /// Every region that is in use or staged, and its file.
    regions: Vec<(Arc<RegionPages>, Option<MemoryFile>)>,
    /// Memory that the monitor has not acknowledged: nobody may touch it yet.
    staged: Option<GuestMemory>,
    /// By ring, from its first start on.
    fetchers: Vec<Option<Arc<Fetcher>>>,
    /// Of the disk's reactor.
    doorbell: Arc<Doorbell>,
    /// Pages fetched, as last counted.
    counted: Cell<u64>,
}

impl PostCopy {
    /// Prepares for it.
    ///
    /// # Errors
    /// The kernel's reason: see [`Userfault::open`].
    pub(crate) fn new(num_queues: u16, doorbell: Arc<Doorbell>) -> io::Result<Self> {
        Ok(Self {
            faults: Arc::new(Userfault::open(OnFault::Wait)?),
            refusal: FaultRefusal::new()?,
            regions: Vec::new(),
            staged: None,
            fetchers: vec![None; usize::from(num_queues)],
            doorbell,
            counted: Cell::new(0),
        })
    }

    /// What the monitor gets: it reads there which pages are waited for, and wakes who waits.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.faults.try_clone_fd()
    }

    /// Maps a region whose pages come later; answers what the monitor is told of it: the address of its window for the user's.
    ///
    /// # Errors
    /// It cannot be mapped, or is of a file that is not memory.
    pub(crate) fn map(
        &mut self,
        description: &RegionDescription,
        fd: &OwnedFd,
    ) -> Result<(GuestRegion, RegionDescription), MemoryError> {
        let RegionDescription { guest_address, size, file_offset, .. } = *description;
        let refused = |source| MemoryError::Mapping { guest_address, source };
        let region = GuestRegion::map(description, fd.as_fd())?;
        let covered = self.refusal.cover(region.mapping());
        covered.map_err(|source| MemoryError::NotArriving { guest_address, source })?;
        let window = Mapping::shared(fd.as_fd(), file_offset, size)
            .and_then(|mapping| FaultWindow::new(mapping, Arc::clone(&self.faults)));
        let pages = RegionPages::new(region.mapping(), Some(window.map_err(refused)?));
        let pages = Arc::new(pages);
        self.regions.push((Arc::clone(&pages), MemoryFile::of(fd)));
        let told = RegionDescription { user_address: pages.base(), ..*description };
        Ok((region.arriving(pages), told))
    }

    /// The memory that was staged, to change it.
    pub(crate) fn staged(&self) -> Option<&GuestMemory> {
        self.staged.as_ref()
    }

    /// Keeps memory until the monitor has acknowledged it.
    pub(crate) fn stage(&mut self, memory: GuestMemory) {
        self.staged = Some(memory);
    }

    /// The memory that the monitor has acknowledged.
    pub(crate) fn take_staged(&mut self) -> Option<GuestMemory> {
        self.staged.take()
    }

    /// Closes the windows of regions that neither `memory` has nor what is staged.
    pub(crate) fn keep(&mut self, memory: &GuestMemory) {
        let staged = self.staged.as_ref();
        self.regions.retain(|(region, _)| {
            let kept = memory.has_pages(region) || staged.is_some_and(|it| it.has_pages(region));
            if !kept {
                region.close();
            }
            kept
        });
    }

    /// Who fetches the pages of a ring.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub(crate) fn fetcher(&mut self, queue: u16) -> io::Result<Option<Arc<Fetcher>>> {
        let Some(place) = self.fetchers.get_mut(usize::from(queue)) else { return Ok(None) };
        if place.is_none() {
            *place = Some(Fetcher::spawn(queue, Arc::clone(&self.doorbell))?);
        }
        Ok(place.clone())
    }

    /// Pages fetched.
    pub(crate) fn fetched(&self) -> u64 {
        self.fetchers.iter().flatten().map(|fetcher| fetcher.fetched()).sum()
    }

    /// The files of all regions.
    pub(crate) fn files(&self) -> impl Iterator<Item = MemoryFile> {
        self.regions.iter().filter_map(|(_, file)| *file)
    }

    /// Pages fetched since this was last asked.
    pub(crate) fn take_fetched(&self) -> u64 {
        let fetched = self.fetched();
        fetched - self.counted.replace(fetched)
    }
}

impl Drop for PostCopy {
    fn drop(&mut self) {
        // First those who wait are told to go: what they would touch next would not be waited for.
        for fetcher in self.fetchers.iter().flatten() {
            fetcher.close();
        }
        for (region, _) in &self.regions {
            region.close();
        }
    }
}
