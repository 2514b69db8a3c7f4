//! What a mirror brings over, and what it does for an observer that lags.
//!
//! **Scope.** `full` brings everything over. `top` brings over what the scan reports as allocated in the top image, and what the
//! guest writes. `none` brings over only what the guest writes: its target is no copy of the disk, so it can be finished,
//! but neither completed nor verified. A working bitmap names the chunks itself.
//!
//! **A difference image** as target (no base opened under it): whatever is written to a part of one of its clusters hides the
//! rest of that cluster in the base for good. So a chunk is whole clusters, is brought over whole before a part of it is
//! written, and is never skipped for reading zero already nor deallocated, which would let the base show through.
//!
//! **Observers.** With scope `none` and write-blocking copies the target may be somebody who watches. [`ObserverPolicy`] says
//! who waits when it lags: with `block` the guest does, as in any mirror; else writes trail (`trail`), and what cannot is dirty and
//! copied later (`track`), or is counted and forgotten (`drop`). A copy in flight that is in a guest's way is given up. An
//! observer's flushes are the job's own; the guest's do not wait for it.

use std::ops::Range;

use resilver_reactor::Nanos;

use super::bugs::{Bug, planted};
use super::core::{Core, Op};
use super::life::Refused;
use super::tables::Failed;
use crate::io::{IoError, IoKind};
use crate::job::{CopyMode, ErrorAction, JobVerb, Side};

/// What is brought over besides the guest's writes (QEMU `MirrorSyncMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SyncMode {
    /// Everything; with a bitmap, what it says.
    #[default]
    Full,
    /// What is allocated in the top image, as [`crate::job::ScanReport::Allocated`] tells.
    Top,
    /// Nothing.
    None,
}

impl SyncMode {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
        }
    }
}

/// Who waits for a target that only observes, and what is remembered for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ObserverPolicy {
    /// The guest waits for it.
    #[default]
    Block,
    /// Nobody waits; what it could not take is brought over later.
    Track,
    /// Nobody waits; what it could not take is counted and forgotten.
    Drop,
}

impl ObserverPolicy {
    /// The word that operators use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Track => "track",
            Self::Drop => "drop",
        }
    }
}

impl Core {
    /// Bytes that the job is about.
    pub(super) fn total_bytes(&self, left: u64) -> u64 {
        let done = self.counters.copied + self.counters.zero + self.counters.skipped;
        if self.brings_all() { self.grid.size() } else { done + left }
    }

    fn brings_all(&self) -> bool {
        self.config.sync == SyncMode::Full && !self.config.by_bitmap
    }

    /// Whether all that the scan has to say is known, where the job hangs on it.
    pub(super) fn scope_is_known(&self) -> bool {
        self.config.sync != SyncMode::Top || self.scanned_upto == u64::MAX
    }

    /// The scan found this allocated in the top image.
    pub(super) fn allocated_reported(&mut self, offset: u64, length: u64) {
        if self.config.sync == SyncMode::Top {
            let length = length.min(self.grid.size().saturating_sub(offset));
            self.dirty(&self.grid.touched(offset, length));
        }
    }

    /// Refuses verbs that this scope cannot follow.
    pub(super) fn refuse_out_of_scope(&self, verb: JobVerb) -> Result<(), Refused> {
        let new_writes_only = self.config.sync == SyncMode::None;
        match verb {
            JobVerb::Complete if new_writes_only => Err(Refused::NoCopyToSwitchTo),
            JobVerb::Verify(_) if new_writes_only => Err(Refused::NoCopyToVerify),
            JobVerb::Change(CopyMode::Background)
                if self.config.observer != ObserverPolicy::Block =>
            {
                Err(Refused::ObserverInBackground)
            }
            _ => Ok(()),
        }
    }

    /// Whether the request must not reach the difference image before the chunks that it touches in part have been brought
    /// over whole.
    pub(super) fn needs_fill(&self, op: &Op) -> bool {
        let Some(on_target) = &self.maps.on_target else { return false };
        let touched = self.grid.touched(op.offset, op.length);
        let covered = self.grid.covered(op.offset, op.length);
        let lacks = |chunk: u64| {
            !covered.contains(&chunk)
                && !planted(Bug::ClusterNotFilled)
                && !self.maps.dirty.get(chunk)
                && !on_target.get(chunk)
        };
        !touched.is_empty() && (lacks(touched.start) || lacks(touched.end - 1))
    }

    /// These bytes have been brought over; the chunks that they cover are whole there.
    pub(super) fn now_on_target(&mut self, bytes: &Range<u64>) {
        if let Some(on_target) = &mut self.maps.on_target {
            on_target.set_range(&self.grid.covered(bytes.start, bytes.end - bytes.start));
        }
    }

    /// A write that the observer could not take is counted and forgotten, if that is the policy. Whether it was.
    pub(super) fn drop_for_observer(
        &mut self,
        failed: Failed,
        operation: IoKind,
        bytes: &Range<u64>,
        error: IoError,
        now: Nanos,
    ) -> bool {
        let drops = self.config.observer == ObserverPolicy::Drop
            && failed == Failed::GuestWrite(Side::Target);
        if drops {
            self.count_dropped(bytes.end - bytes.start);
            self.log_error(Side::Target, operation, ErrorAction::Ignore, error, now);
        }
        drops
    }

    /// Counts a write that the observer does not get.
    pub(super) fn count_dropped(&mut self, bytes: u64) {
        self.counters.dropped_writes += 1;
        self.counters.dropped += bytes;
    }
}
