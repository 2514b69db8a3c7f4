//! What the simulator does about named bitmaps, and mirrors that work by one.
//!
//! Beside the one that a mirror may work by, the disk has one that the operator changes at any moment, under a mirror or not: made
//! anew, cleared, enabled, disabled, merged into, each while the disk is held.
//!
//! The oracle:
//! * A bitmap that records has a dirty chunk wherever a write has succeeded since it was made; also under a mirror that leaves it
//!   alone.
//! * A bitmap that does not record stays as it is.
//! * Beside a mirror in mode `never`, and after one in mode `on-success` that failed, what was dirty before is dirty still.
//! * After one in mode `always`, or `on-success` that went well, a clean chunk is equal on both disks at that moment.
//! * After a switch-over the bitmap of the old disk says that nothing is missing on the new one.

use std::sync::Arc;

use resilver_bdev::bitmap::Grid;
use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::job::Side;
use resilver_bdev::mirror::{BitmapMode, SyncMode, WorkingBitmap};
use resilver_bdev::{DirtyBitmap, DiskCommand, JobInfo};

use super::control::{Heard, Job, MirrorPlan};
use super::disk::SimDisk;
use super::lock;
use super::sector::SECTOR;
use super::world::World;

/// A bitmap of the disk that serves the guests.
pub(super) struct Recorder {
    pub(super) bitmap: Arc<DirtyBitmap>,
    /// The oracle's moment since which it has recorded.
    since: u64,
    /// Chunks that were dirty at that moment.
    dirty: Vec<u64>,
    /// A mirror keeps its bits.
    handed_over: bool,
}

/// What the operator does with a bitmap.
#[derive(Debug, Clone, Copy)]
enum Verb {
    Add,
    Clear,
    Enable,
    Disable,
    Merge,
}

impl Recorder {
    fn chunks_of(bitmap: &DirtyBitmap) -> Vec<u64> {
        let words: Vec<u64> = bitmap.words().collect();
        let set = |chunk: &u64| words[(*chunk / 64) as usize] & (1 << (*chunk % 64)) != 0;
        (0..bitmap.grid().chunks()).filter(set).collect()
    }

    fn is_dirty(&self, sector: usize) -> bool {
        let chunk = (sector * SECTOR) as u64 / self.bitmap.grid().granularity();
        self.bitmap.words().nth((chunk / 64) as usize).is_some_and(|w| w & (1 << (chunk % 64)) != 0)
    }
}

impl World {
    /// A mirror that works by a bitmap begins with a held disk: the bitmap is made, and the target gets what is clean in it.
    pub(super) fn plan_by_bitmap(&mut self, plan: MirrorPlan) {
        let heard = self.control.heard();
        let reply = Box::new(move |held: Result<(), _>| {
            let held = held.is_ok();
            lock(&heard).push_back(Heard::Held(Box::new(plan), held));
        });
        self.send(DiskCommand::Hold { under_job: false, deadline: HOLD_DEADLINE, reply });
    }

    /// The disk is held: begins the mirror, or does not.
    pub(super) fn held_for_bitmap(&mut self, mut plan: MirrorPlan, held: bool) {
        if !held {
            return;
        }
        let size = self.source.limits().size();
        let bitmap = Arc::new(DirtyBitmap::new(Grid::new(size, plan.config.granularity), true));
        let share = self.rng.pick(&[0, 100, 800]);
        for chunk in 0..bitmap.grid().chunks() {
            if self.rng.chance(share) {
                let bytes = bitmap.grid().bytes(&(chunk..chunk + 1));
                bitmap.mark(bytes.start, bytes.end - bytes.start);
            }
        }
        let mode = self.rng.pick(&[BitmapMode::Always, BitmapMode::Never, BitmapMode::OnSuccess]);
        plan.config.bitmap = Some(WorkingBitmap { bitmap: Arc::clone(&bitmap), mode });
        plan.config.target_is_zero = false;
        let (since, dirty) = (lock(&self.oracle).moment(), Recorder::chunks_of(&bitmap));
        let recorder = Recorder { bitmap: Arc::clone(&bitmap), since, dirty, handed_over: false };
        self.recorder = Some(recorder);
        // No turn comes between the two.
        self.release_with_bitmaps();
        let started = self.start_mirror(&plan);
        if let Err(refused) = started {
            self.trace.line(format_args!("refused: {refused}"));
        }
        self.spoil_target();
    }

    /// Gives the target of a mirror by bitmap what an earlier copy gave it: all that is clean.
    pub(super) fn preset_earlier_copy(&self, target: &SimDisk) {
        let Some(recorder) = &self.recorder else { return };
        // A disk that has grown in a switch-over may be larger than the target, which is refused later.
        let sectors = self.source.sectors().min(target.sectors());
        for sector in (0..sectors).filter(|sector| !recorder.is_dirty(*sector)) {
            let content = Some(self.source.content(sector));
            target.preset(sector, content.filter(|_| !self.source.is_hole(sector)));
        }
    }

    /// The mirror has been inserted.
    pub(super) fn bitmap_begins(&mut self) {
        let mode = self.control.job().and_then(|job| job.bitmap_mode);
        if let Some(recorder) = &mut self.recorder {
            recorder.handed_over = mode == Some(BitmapMode::Always);
        }
    }

    /// The disk goes on with the bitmaps that it has now.
    fn release_with_bitmaps(&mut self) {
        let recorders = self.recorder.iter().chain(&self.watched);
        let bitmaps = recorders.map(|it| Arc::clone(&it.bitmap)).collect();
        self.send(DiskCommand::Release(Some(bitmaps)));
    }

    /// The operator is to change the bitmap that is theirs: the disk is held for that.
    pub(super) fn change_bitmap_on_a_whim(&mut self) {
        let under_job = self.control.job().is_some_and(Job::is_inserted);
        let heard = self.control.heard();
        let reply = Box::new(move |held: Result<(), _>| {
            lock(&heard).push_back(Heard::HeldForBitmap(held.is_ok()));
        });
        self.send(DiskCommand::Hold { under_job, deadline: HOLD_DEADLINE, reply });
    }

    /// The disk is held: changes the operator's bitmap, or does not.
    pub(super) fn held_for_change(&mut self, held: bool) {
        if !held {
            return;
        }
        let size = self.source.limits().size();
        let granularity = self.rng.pick(&[512, 4 << 10, 64 << 10]);
        let fresh = |recording| DirtyBitmap::new(Grid::new(size, granularity), recording);
        let verb =
            self.rng.pick(&[Verb::Add, Verb::Clear, Verb::Enable, Verb::Disable, Verb::Merge]);
        let bitmap = match (verb, &self.watched) {
            (Verb::Add, _) | (_, None) => fresh(true),
            (Verb::Clear, Some(old)) => DirtyBitmap::new(old.bitmap.grid(), old.bitmap.recording()),
            (Verb::Enable | Verb::Disable, Some(old)) => {
                let copy = old.bitmap.copy();
                copy.set_recording(matches!(verb, Verb::Enable));
                copy
            }
            (Verb::Merge, Some(old)) => {
                let (copy, other) = (old.bitmap.copy(), fresh(true));
                let sector = self.rng.below(self.source.sectors() as u64);
                other.mark(sector * SECTOR as u64, SECTOR as u64);
                copy.merge(&other);
                copy
            }
        };
        self.trace.line(format_args!("bitmap: {verb:?}"));
        // What was written before is no longer asked for where the bitmap was made anew; where it was not, it is in `dirty`.
        let (since, dirty) = (lock(&self.oracle).moment(), Recorder::chunks_of(&bitmap));
        self.watched =
            Some(Recorder { bitmap: Arc::new(bitmap), since, dirty, handed_over: false });
        self.release_with_bitmaps();
    }

    /// What has been written is dirty.
    pub(super) fn judge_recorders(&self) {
        for recorder in self.recorder.iter().chain(&self.watched).filter(|it| !it.handed_over) {
            self.judge_recorder(recorder);
        }
    }

    fn judge_recorder(&self, recorder: &Recorder) {
        let now = Recorder::chunks_of(&recorder.bitmap);
        if let Some(lost) = recorder.dirty.iter().find(|chunk| !now.contains(chunk)) {
            self.trace.finding(format_args!("the bitmap has forgotten chunk {lost}"));
        }
        if !recorder.bitmap.recording() {
            if now.len() != recorder.dirty.len() {
                self.trace.finding("a bitmap that is disabled has recorded");
            }
            return;
        }
        let oracle = lock(&self.oracle);
        for sector in 0..self.sectors {
            if oracle.written(sector) > recorder.since && !recorder.is_dirty(sector) {
                self.trace
                    .finding(format_args!("sector {sector} was written, and the bitmap is clean"));
            }
        }
    }

    /// A mirror has ended: what it left in its bitmap.
    pub(super) fn bitmap_ends(&mut self, job: &Job, side: Side, info: &JobInfo) {
        // After a switch-over it is the old disk's, as the other one is.
        self.watched = self.watched.take().filter(|_| side == Side::Source);
        let Some(mut recorder) = self.recorder.take() else { return };
        let good = side == Side::Target || info.failure.is_none();
        let gives_back = match job.bitmap_mode {
            Some(BitmapMode::Always) => true,
            Some(BitmapMode::OnSuccess) => good,
            Some(BitmapMode::Never) | None => false,
        };
        recorder.handed_over = false;
        if gives_back {
            let clean = (0..self.source.sectors()).filter(|sector| !recorder.is_dirty(*sector));
            for sector in clean.filter(|sector| !job.target.is_rotten(*sector)) {
                if self.source.content(sector) != job.target.content(sector) {
                    self.trace.finding(format_args!(
                        "sector {sector} is clean in the bitmap of a mirror that ended, and differs"
                    ));
                }
            }
            recorder.since = lock(&self.oracle).moment();
            recorder.dirty = Recorder::chunks_of(&recorder.bitmap);
        }
        self.recorder = Some(recorder).filter(|_| side == Side::Source);
    }
}

/// Whether a mirror of this plan may work by a bitmap.
pub(super) fn may_work_by_one(plan: &MirrorPlan) -> bool {
    plan.config.sync == SyncMode::Full
}
