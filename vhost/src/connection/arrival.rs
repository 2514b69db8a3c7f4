//! What a connection does in a post-copy migration: shares memory in two steps, has the pages of rings fetched before they
//! start, and says how it went.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use super::{Connection, ConnectionError};
use crate::blk_session::Command;
use crate::memory::{GuestMemory, GuestRegion};
use crate::message::RegionDescription;
use crate::postcopy::fetcher::Fetcher;
use crate::ring::RingAreas;
use crate::session::PostcopyState;

/// How often is looked whether the pages of a ring have come.
const LOOK: Duration = Duration::from_millis(1);

impl Connection {
    /// Maps a region whose pages come later; answers what the monitor is told of it.
    pub(super) fn map_arriving(
        &mut self,
        description: &RegionDescription,
        fd: Option<OwnedFd>,
    ) -> Result<(GuestRegion, RegionDescription), ConnectionError> {
        let fd = fd.ok_or(ConnectionError::MissingDescriptor)?;
        let postcopy = self.postcopy.as_mut().ok_or(ConnectionError::SharedBefore)?;
        Ok(postcopy.map(description, &fd)?)
    }

    /// Memory that waits for the monitor's acknowledgement.
    pub(super) fn staged(&self) -> Option<GuestMemory> {
        self.postcopy.as_ref()?.staged().cloned()
    }

    /// Has memory wait for it.
    pub(super) fn stage(&mut self, memory: GuestMemory) {
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.stage(memory);
            postcopy.keep(&self.memory);
        }
    }

    /// The monitor has acknowledged it.
    pub(super) async fn use_staged(&mut self) -> Result<(), ConnectionError> {
        match self.postcopy.as_mut().and_then(|postcopy| postcopy.take_staged()) {
            Some(memory) => self.set_memory(memory).await,
            None => Ok(()),
        }
    }

    /// Memory arrives later from now on.
    pub(super) fn listen(&mut self) -> Result<(), ConnectionError> {
        if !self.memory.is_empty() {
            return Err(ConnectionError::SharedBefore);
        }
        self.arriving_since = Some(Instant::now());
        let controller = self.sessions.controller();
        info!(
            controller,
            "the guest runs before its memory has come: pages are fetched as they are needed"
        );
        Ok(())
    }

    /// All of it has come.
    pub(super) async fn end_postcopy(&mut self) -> Result<(), ConnectionError> {
        self.ask(Command::Arrived).await?;
        self.memory.arrived();
        self.leave_postcopy("all of the guest's memory has come");
        Ok(())
    }

    /// The session ends, and the data side touches no page any more.
    pub(crate) fn break_off_postcopy(&mut self) {
        if let Some(postcopy) = &self.postcopy {
            self.sessions.remember_unfinished(postcopy.files());
        }
        self.leave_postcopy("the session ended while the guest's memory was on its way");
    }

    /// Lets go of what a post-copy migration has, and says how it went.
    fn leave_postcopy(&mut self, how: &str) {
        self.count_pages();
        let taken = (self.postcopy.take(), self.arriving_since.take());
        let (Some(postcopy), Some(since)) = taken else { return };
        let (controller, pages) = (self.sessions.controller(), postcopy.fetched());
        let seconds = since.elapsed().as_secs_f64();
        info!(
            controller,
            "{how}, after {seconds:.1} s; the disk has waited for {pages} of its pages"
        );
    }

    /// Counts the pages that were fetched since this was last done.
    pub(super) fn count_pages(&self) {
        if let Some(postcopy) = &self.postcopy {
            self.stats.fetched_pages.add(postcopy.take_fetched());
        }
    }

    /// Who fetches the pages of a ring; none where all are there.
    pub(super) fn fetcher(&mut self, queue: u16) -> Result<Option<Arc<Fetcher>>, ConnectionError> {
        let listening = self.session.postcopy().is_listening();
        let Some(postcopy) = self.postcopy.as_mut().filter(|_| listening) else { return Ok(None) };
        postcopy.fetcher(queue).map_err(ConnectionError::NoPostcopy)
    }

    /// Waits until all pages of a ring are there that has, or is to have, its place in `memory`; or until the front end has gone.
    pub(super) async fn fetch_ring(
        &self,
        queue: u16,
        memory: &GuestMemory,
        fetcher: Option<&Fetcher>,
    ) -> Result<(), ConnectionError> {
        let (Some(ring), Some(fetcher)) = (self.session.ring(queue), fetcher) else {
            return Ok(());
        };
        // What the reactor has asked for may keep the thread; what is asked for comes behind that, and is asked for once.
        let mut asked = false;
        loop {
            let missing = RingAreas::wanted(memory, ring.format, ring.size, &ring.addresses)?;
            if missing.is_empty() {
                return Ok(());
            }
            if !asked || fetcher.is_idle() {
                asked = missing.into_iter().all(|wanted| fetcher.ask(wanted));
                fetcher.wake();
            }
            if self.seat.socket.is_closed() {
                return Err(ConnectionError::WentAway);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A message could not be carried out: the migration is where it was, and what was mapped for nothing goes.
    pub(super) fn undo_postcopy(&mut self, before: PostcopyState) {
        self.session.undo_postcopy(before);
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.keep(&self.memory);
        }
    }
}
