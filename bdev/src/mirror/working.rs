//! The working bitmap: a mirror that brings over what a named bitmap of its source says.
//!
//! For a mirror that failed and goes on where it stopped, for the difference to an earlier copy, for a copy made by other
//! means. The bits are taken over while the disk is held for the mirror's insertion, and given back while it is held for its
//! end, so no write falls between two maps. What the bitmap holds afterwards is a [`BitmapMode`] (QEMU `BitmapSyncMode`):
//!
//! | mode | meanwhile | after a good end | after any other |
//! | --- | --- | --- | --- |
//! | always | the mirror's own map says what is dirty | what the target lacks | what the target lacks or may lose |
//! | never | goes on recording | as before, and all writes since | the same |
//! | on-success | goes on recording | what the target lacks | as before, and all writes since |

use std::sync::Arc;

use super::bugs::{Bug, planted};
use super::core::{Core, Leg};
use super::durable::Line;
use super::scope::SyncMode;
use super::{BdevError, MirrorConfig};
use crate::bitmap::Grid;
use crate::dirty_bitmap::DirtyBitmap;
use crate::job::Side;

/// What becomes of a working bitmap (QEMU `BitmapSyncMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BitmapMode {
    /// It is what the target lacks, however the mirror ends.
    Always,
    /// The mirror does not touch it.
    Never,
    /// It is what the target lacks if the mirror ends well.
    OnSuccess,
}

impl BitmapMode {
    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Never => "never",
            Self::OnSuccess => "on-success",
        }
    }
}

/// A bitmap that says what a mirror is to bring over.
#[derive(Debug, Clone)]
pub struct WorkingBitmap {
    /// The bitmap, which records the writes of the source's disk.
    pub bitmap: Arc<DirtyBitmap>,
    /// What becomes of it.
    pub mode: BitmapMode,
}

impl PartialEq for WorkingBitmap {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.bitmap, &other.bitmap) && self.mode == other.mode
    }
}

impl Eq for WorkingBitmap {}

impl WorkingBitmap {
    /// Refuses what cannot work.
    pub(super) fn validate(&self, config: &MirrorConfig, size: u64) -> Result<(), BdevError> {
        let invalid = |parameter, value: &str, expected: String| {
            Err(BdevError::Invalid { parameter, value: value.to_owned(), expected })
        };
        if config.sync != SyncMode::Full {
            let expected = format!("Sync mode '{}' not supported with bitmap.", config.sync.name());
            return invalid("sync", config.sync.name(), expected);
        }
        if config.target_is_zero {
            let expected = "does not go with a bitmap, whose target has a copy already".to_owned();
            return invalid("target_is_zero", "true", expected);
        }
        if self.bitmap.grid() != Grid::new(size, config.granularity) {
            let expected = "a bitmap of the source, with the mirror's granularity".to_owned();
            return invalid("bitmap", &self.bitmap.grid().size().to_string(), expected);
        }
        Ok(())
    }
}

impl Core {
    /// Takes the bitmap's bits over: the disk is held.
    pub(super) fn work_by(&mut self, working: &WorkingBitmap) {
        working.bitmap.load_into(&mut self.maps.dirty);
        working.bitmap.set_handed_over(working.mode == BitmapMode::Always);
    }

    /// Gives the bitmap what the target lacks, if that is its mode: the disk is held, and goes on with this leg.
    pub(super) fn give_back(&mut self, working: &WorkingBitmap, side: Side) {
        self.count_what_flies_as_dirty();
        if side == Side::Source {
            self.count_what_a_flush_has_not_answered_for();
        }
        let good = side == Side::Target || self.failure.is_none();
        match (working.mode, good) {
            (BitmapMode::Always, _) | (BitmapMode::OnSuccess, true) => {
                working.bitmap.store_from(&self.maps.dirty);
            }
            (BitmapMode::OnSuccess, false) | (BitmapMode::Never, _) => {}
        }
        if !planted(Bug::BitmapNotHandedBack) {
            working.bitmap.set_handed_over(false);
        }
    }

    /// What is in flight to the target when a mirror ends is nothing that it has.
    fn count_what_flies_as_dirty(&mut self) {
        self.drop_copies();
        for op in 0..self.ops.len() {
            let op = self.ops[op];
            if matches!(op.leg(Side::Target), Leg::Flying | Leg::Lost) {
                self.dirty(&self.grid.touched(op.offset, op.length));
            }
        }
    }
    /// A flush of the target that is in flight, or was given up, may fail when nobody is there to hear it, and with it what was
    /// written before and since. Where none is, what no flush has covered yet counts as brought over, as it does in QEMU.
    fn count_what_a_flush_has_not_answered_for(&mut self) {
        let Self { lines, maps, .. } = self;
        let line = &lines[Side::Target as usize];
        if line.line != Line::Idle {
            maps.dirty.merge(&line.undurable);
            maps.dirty.merge(&line.flushing);
        }
    }
}
