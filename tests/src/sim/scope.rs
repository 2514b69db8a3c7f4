//! What the simulator does about mirrors that bring over less than everything.
//!
//! The oracle, by what the mirror promises:
//! * `full`: a clean chunk with nothing in flight is equal on both legs.
//! * `top`: the same, once the scan has told what is allocated in the top image; the rest is in the base, which both have. Where
//!   the target is a difference image without its base, a cluster that is written in part loses the rest.
//! * `none`: the same for the sectors that the guests have written since the mirror was inserted; those of a finished copy are
//!   of a moment since it was asked for. Other sectors are none of its business.
//! * `none` with an observer that things are dropped for: what the observer holds the source has held since the start.

use resilver_bdev::job::{CopyMode, JobVerb, ScanReport};
use resilver_bdev::mirror::{MirrorConfig, ObserverPolicy, SyncMode};

use super::disk::SimDisk;
use super::lock;
use super::rng::Rng;
use super::sector::{SECTOR, Sector};
use super::world::World;

/// What a mirror brings over, as the oracle knows.
#[derive(Debug)]
pub(super) struct Scope {
    mode: SyncMode,
    whole: bool,
    drops: bool,
    /// The oracle's moment at which the mirror was inserted.
    since: Option<u64>,
    /// Of each sector: allocated in the top image.
    top: Vec<bool>,
    /// What an observer held before anything was written there, and the oracle's moment.
    observed: Option<(u64, Vec<Sector>)>,
    /// The sectors that a finished copy must have, fixed when it is asked for.
    finished: Option<Vec<bool>>,
}

/// Draws what a mirror brings over.
pub(super) fn draw(rng: &mut Rng, config: &mut MirrorConfig, target_block: u32) {
    config.sync = rng.pick(&[
        SyncMode::Full,
        SyncMode::Full,
        SyncMode::Full,
        SyncMode::Full,
        SyncMode::Top,
        SyncMode::None,
    ]);
    match config.sync {
        SyncMode::Full => {}
        SyncMode::Top => {
            config.target_is_zero = false;
            if rng.chance(500) {
                config.diff_cluster = Some(config.granularity >> rng.below(2));
            }
        }
        SyncMode::None => {
            config.verify_before_complete = false;
            config.target_is_zero = false;
            if config.copy_mode == CopyMode::WriteBlocking {
                const POLICIES: [ObserverPolicy; 3] =
                    [ObserverPolicy::Block, ObserverPolicy::Track, ObserverPolicy::Drop];
                config.observer = rng.pick(&POLICIES);
            }
        }
    }
    if config.diff_cluster.is_some_and(|cluster| cluster < SECTOR as u32) {
        config.diff_cluster = Some(SECTOR as u32);
    }
    // No image has clusters smaller than the blocks of what it is on.
    config.diff_cluster = config.diff_cluster.filter(|cluster| *cluster >= target_block);
}

impl Scope {
    pub(super) fn new(config: &MirrorConfig, top: Vec<bool>) -> Self {
        let drops = config.observer == ObserverPolicy::Drop;
        let whole = config.sync == SyncMode::Full && config.bitmap.is_none();
        Self { mode: config.sync, whole, drops, since: None, top, observed: None, finished: None }
    }

    /// The verb that ends the job well, for an operator who wants this.
    pub(super) fn fits(&self, goal: JobVerb) -> JobVerb {
        match (self.mode, goal) {
            (SyncMode::None, JobVerb::Complete) => JobVerb::Finish,
            _ => goal,
        }
    }

    /// What the scan says of these sectors besides where holes are.
    pub(super) fn allocated(&self, from: usize, end: usize) -> Vec<ScanReport> {
        if self.mode != SyncMode::Top {
            return Vec::new();
        }
        let sector = |at: usize| ScanReport::Allocated {
            offset: (at * SECTOR) as u64,
            length: SECTOR as u64,
        };
        (from..end).filter(|at| self.top[*at]).map(sector).collect()
    }

    /// Whether a clean chunk is equal on both legs in this sector. `scanned` says that the scan has told all.
    pub(super) fn promises(&self, world: &World, sector: usize, scanned: bool) -> bool {
        match self.mode {
            SyncMode::Full => true,
            SyncMode::Top => scanned,
            SyncMode::None if self.drops => false,
            SyncMode::None => {
                let written = lock(&world.oracle).written(sector);
                self.since.is_some_and(|since| written > since)
            }
        }
    }

    /// Whether it is about the whole disk.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// Whether a finished copy must have this sector.
    pub(super) fn copy_has(&self, sector: usize) -> bool {
        self.finished.as_ref().is_none_or(|sectors| sectors[sector])
    }
}

impl World {
    /// Draws what of the source is allocated in its top image, and gives the target what the base has of the rest.
    pub(super) fn preset_scope(&mut self, config: &MirrorConfig, target: &SimDisk) -> Scope {
        let share = self.rng.pick(&[0, 200, 800]);
        let mut top = vec![true; self.source.sectors()];
        if config.sync == SyncMode::Top {
            for (sector, top) in top.iter_mut().enumerate().take(target.sectors()) {
                *top = self.rng.chance(share);
                if !*top {
                    let content = Some(self.source.content(sector));
                    target.preset(sector, content.filter(|_| !self.source.is_hole(sector)));
                }
            }
            if let Some(cluster) = config.diff_cluster {
                target.be_a_difference(cluster as usize / SECTOR);
            }
        }
        if config.bitmap.is_some() {
            self.preset_earlier_copy(target);
        }
        Scope::new(config, top)
    }

    /// The mirror has been inserted: from here on its promises count.
    pub(super) fn scope_begins(&mut self) {
        let (source, sectors) = (self.source.clone(), self.sectors);
        let now = lock(&self.oracle).moment();
        let Some(job) = self.control.job_mut() else { return };
        job.scope.since = Some(now);
        // What was written while the disk was asked to take the mirror in is in the top image too.
        for (sector, top) in job.scope.top.iter_mut().enumerate() {
            *top |= source.content(sector) != job.target.content(sector);
        }
        if job.scope.drops {
            let held = (0..sectors).map(|sector| job.target.content(sector)).collect();
            job.scope.observed = Some((0, held));
        }
        if job.scope.drops {
            let begun = lock(&self.oracle).begin_read();
            if let Some(job) = self.control.job_mut()
                && let Some((since, _)) = &mut job.scope.observed
            {
                *since = begun;
            }
        }
    }

    /// A copy was asked for: what it must have is what has been mirrored by now.
    pub(super) fn scope_finishes(&mut self) {
        let Some(job) = self.control.job() else { return };
        let promised =
            (0..self.sectors).map(|sector| job.scope.promises(self, sector, true)).collect();
        if let Some(job) = self.control.job_mut() {
            job.scope.finished.get_or_insert(promised);
        }
    }

    /// What an observer holds is what it held, or what the source has held since.
    pub(super) fn judge_observer(&self) {
        let Some(job) = self.control.job() else { return };
        let Some((since, held)) = &job.scope.observed else { return };
        let oracle = lock(&self.oracle);
        for (sector, held) in held.iter().enumerate() {
            let content = job.target.content(sector);
            if content == *held || job.target.changing(&(sector..sector + 1)) {
                continue;
            }
            if let Err(wrong) = oracle.check_since(sector, &content, *since) {
                self.trace.finding(format_args!("an observer holds what never was: {wrong}"));
            }
        }
    }

    /// The job is over, and so is the oracle's memory of its observer.
    pub(super) fn scope_ends(&self, scope: &Scope) {
        if let Some((since, _)) = &scope.observed {
            let _ = lock(&self.oracle).end_read(*since, 0, None);
        }
    }
}
