//! Starting a mirror: everything that can be refused is refused here, before the guest's disk is touched.
//!
//! The order matters. Names are engaged first, so that nobody changes the legs meanwhile; the target is opened (or made) and
//! looked at; the disk is put on a reactor if nobody uses the source yet; the job is entered in the graph; only then is the
//! disk asked to take it in. Whatever fails on the way is undone, a file that was made for it included. Once the job runs,
//! the source's holes are looked for on a blocking thread.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::identity::FileIdentity;
use resilver_bdev::job::{Scan, ScanReport};
use resilver_bdev::mirror::{
    BitmapMode, COPY_DEPTH, Mirror, MirrorChannels, MirrorConfig, SyncMode, TARGET_DEPTH,
};
use resilver_bdev::offload;
use resilver_bdev::sectors::Sectors;
use resilver_bdev::{Bdev, DISK_DEPTH, DiskCommand, DiskHandle, JobStatus, StartJob};
use resilver_sys::step_aside;
use serde_json::json;

use crate::bitmaps::BitmapName;
use crate::disks::{DiskId, ask};
use crate::error::RpcError;
use crate::events::unix_seconds;
use crate::holds::Holds;
use crate::jobs::{Job, Stage, untouched};
use crate::modules::Made;
use crate::target::{Engaged, Space, Target, Use, check_name, files_of};

/// How long a scan waits for room in a disk's mailbox before it tries again.
const SCAN_PAUSE: Duration = Duration::from_millis(1);

/// A mirror to be started. Its target is in the graph already, or made and not yet in it.
pub(crate) struct MirrorStart {
    pub(crate) source: String,
    pub(crate) mirror: String,
    pub(crate) config: MirrorConfig,
    pub(crate) auto_dismiss: bool,
    /// Copies may be left to the file system.
    pub(crate) copy_offload: bool,
    /// A bitmap of the source that says what is to be brought over.
    pub(crate) bitmap: Option<(String, BitmapMode)>,
}

/// The target of a mirror to be started.
pub(crate) enum TargetLeg {
    /// A bdev of the graph, by name.
    Given(String),
    /// A bdev made for the job.
    Made(Made),
}

/// Where the target of a job came from: what was made for it goes with it, unless the disk goes on with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The operator made it.
    Given,
    /// The job did.
    Made,
}

/// A file that is removed again unless it is kept.
pub(crate) struct NewFile {
    path: Option<PathBuf>,
}

impl NewFile {
    /// Makes a sparse file, on a blocking thread.
    pub(crate) async fn create(path: &Path, size: u64) -> Result<Self, RpcError> {
        let file = path.to_owned();
        let made = tokio::task::spawn_blocking(move || resilver_bdev::uring::create(&file, size));
        made.await.map_err(|_| RpcError::gone())??;
        Ok(Self { path: Some(path.to_owned()) })
    }

    /// The file stays.
    pub(crate) fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Ours, and nobody has seen it; if it cannot be removed the next attempt says that it exists.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Frees the bitmaps of a job that does not come to be.
struct FreedBitmaps {
    target: Rc<Target>,
    job: Option<String>,
}

impl Drop for FreedBitmaps {
    fn drop(&mut self) {
        if let Some(job) = &self.job {
            self.target.graph_mut().free_bitmaps(job);
        }
    }
}

/// Names that a start keeps until the job is in the graph.
pub(crate) struct StartNames {
    _job: Engaged,
    _mirror: Engaged,
    _source: Engaged,
}

impl Target {
    /// Keeps the names of a mirror to be started, and looks at its source.
    pub(crate) async fn engage_mirror(
        self: &Rc<Self>,
        start: &MirrorStart,
    ) -> Result<(StartNames, Arc<dyn Bdev>), RpcError> {
        let id = &start.config.job_id;
        check_job_id(id)?;
        check_name("name", &start.mirror)?;
        let source = self.bdev(&start.source)?;
        let job = self.engage(Space::Job, id)?;
        let engaged = self.engage(Space::Bdev, &start.source)?;
        self.let_go(&start.source).await;
        {
            let graph = self.graph();
            if graph.jobs.contains_key(id) || graph.verifies.contains_key(id) {
                return Err(RpcError::job_exists(id));
            }
            // Controllers are what a mirror is for; any other use excludes it.
            let others = graph.uses_of(&start.source);
            if let Some(other) = others.iter().find(|other| !matches!(other, Use::Controller(_))) {
                return Err(RpcError::busy(&start.source, &other.to_string()));
            }
        }
        // Last, because an earlier mirror of the same disk would have the same name by default.
        let mirror = self.engage_new_bdev(&start.mirror)?;
        Ok((StartNames { _job: job, _mirror: mirror, _source: engaged }, source))
    }

    /// Starts a mirror.
    pub(crate) async fn start_mirror(
        self: &Rc<Self>,
        mut start: MirrorStart,
        names: StartNames,
        leg: TargetLeg,
    ) -> Result<(), RpcError> {
        let source = self.bdev(&start.source)?;
        let (target, origin, _engaged) = match &leg {
            TargetLeg::Given(name) => {
                if *name == start.source {
                    return Err(itself(name));
                }
                let engaged = self.engage(Space::Bdev, name)?;
                self.let_go(name).await;
                self.graph().must_be_unused(name)?;
                (self.bdev(name)?, Origin::Given, Some(engaged))
            }
            TargetLeg::Made(made) => {
                self.stored_must_not_record(made.bdev.as_ref())?;
                (Arc::clone(&made.bdev), Origin::Made, None)
            }
        };
        check_legs(source.as_ref(), target.as_ref())?;
        self.graph().must_not_record(target.as_ref())?;
        // The guest's block size stays what it is wherever the disk goes.
        let target = Sectors::at_most(target, source.geometry().block_size)?;
        let offload = if start.copy_offload {
            offload::between(source.as_ref(), target.as_ref())
        } else {
            None
        };
        // Each of these steps takes some tenths of a millisecond.
        let open = |bdev: &dyn Bdev, depth| {
            step_aside();
            bdev.open_channel(depth)
        };
        let channels = MirrorChannels {
            source: open(source.as_ref(), DISK_DEPTH)?,
            copy_source: open(source.as_ref(), COPY_DEPTH)?,
            target: open(target.as_ref(), TARGET_DEPTH)?,
            offload,
        };
        step_aside();
        let (id, auto_finalize) = (start.config.job_id.clone(), start.config.auto_finalize);
        let (sync, observer) = (start.config.sync, start.config.observer);
        let mut freed = FreedBitmaps { target: Rc::clone(self), job: Some(id.clone()) };
        if let Some((bitmap, mode)) = &start.bitmap {
            let name = BitmapName { bdev: start.source.clone(), bitmap: bitmap.clone() };
            let working = self.graph_mut().take_bitmap(&name, *mode, &id)?;
            #[allow(clippy::cast_possible_truncation)] // made from 32 bits
            let granularity = working.bitmap.grid().granularity() as u32;
            start.config.granularity = granularity;
            start.config.bitmap = Some(working);
        }
        let mut mirror = Box::new(Mirror::new(start.config, channels)?);
        step_aside();
        mirror.prepare();
        let disk = self.disk_over(&source, None)?;
        let scan = Scan::default();
        let job = Job {
            id: id.clone(),
            source: source.name().to_owned(),
            target: target.name().to_owned(),
            stage: Stage::Live {
                source: Arc::clone(&source),
                target: Arc::clone(&target),
                scan: scan.clone(),
            },
            origin,
            mirror: start.mirror,
            disk,
            sync,
            bitmap: start.bitmap,
            observer,
            auto_finalize,
            auto_dismiss: start.auto_dismiss,
            holds: Holds::default(),
            info: untouched(mirror.as_ref()),
            warnings: Vec::new(),
            started: unix_seconds(),
            ready: None,
        };
        self.events.add("job_status_change", &id, job.status_facts());
        self.graph_mut().jobs.insert(id.clone(), job);
        // From here on the graph itself keeps others from the legs.
        drop(names);
        if let TargetLeg::Made(made) = leg {
            self.insert_bdev(made);
        }
        let handle = self.graph().disks.get(&disk).map(|disk| disk.handle.clone());
        let started = match handle {
            Some(handle) => {
                self.insert_job(&handle, mirror, target.as_ref(), &scan).await.map(|()| handle)
            }
            None => Err(RpcError::gone()),
        };
        match started {
            Ok(handle) => {
                freed.job = None;
                tracing::info!(
                    job = id,
                    source = source.name(),
                    target = target.name(),
                    "mirror started"
                );
                if sync != SyncMode::None {
                    tokio::task::spawn_blocking(move || {
                        find_holes(source.as_ref(), &handle, &scan)
                    });
                }
                Ok(())
            }
            Err(error) => {
                self.undo_start(&id, disk).await;
                Err(error)
            }
        }
    }

    /// Has the disk take the job in; the channel it had goes.
    async fn insert_job(
        &self,
        handle: &DiskHandle,
        job: Box<Mirror>,
        target: &dyn Bdev,
        scan: &Scan,
    ) -> Result<(), RpcError> {
        let target_stats = Arc::clone(target.stats());
        let target_bitmaps = self.graph().bitmaps_below(target);
        let inserted = ask(handle, |reply| {
            DiskCommand::StartJob(StartJob {
                job,
                target_stats,
                target_bitmaps,
                scan: scan.clone(),
                deadline: HOLD_DEADLINE,
                reply,
            })
        });
        drop(inserted.await?.map_err(|(error, _job)| RpcError::from(error))?);
        Ok(())
    }

    async fn undo_start(&self, id: &str, disk: DiskId) {
        let job = self.graph_mut().jobs.remove(id);
        if let Some(Job { origin: Origin::Made, target, .. }) = job {
            let made = self.graph_mut().bdevs.remove(&target);
            if let Some(made) = made {
                self.put_bitmaps_away(made.bdev.as_ref());
            }
        }
        self.events.add("job_status_change", id, json!({ "status": JobStatus::Null.name() }));
        self.retire_disk(disk).await;
    }
}

/// Refuses legs that would be one file, in QEMU's words where it has them.
fn check_legs(source: &dyn Bdev, target: &dyn Bdev) -> Result<(), RpcError> {
    let targets = files_of(target);
    let same =
        files_of(source).into_iter().find(|one| targets.iter().any(|other| one.same_file(other)));
    if same.is_some() {
        return Err(itself(target.name()));
    }
    let known = |files: Vec<FileIdentity>| files.into_iter().filter_map(|it| it.known_by);
    let targets: Vec<_> = known(targets).collect();
    match known(files_of(source)).find(|one| targets.contains(one)) {
        Some(by) => Err(RpcError::parameter(
            "target",
            target.name(),
            format!(
                "the host knows source and target as one device ({by}); if they are two, give one another serial or name"
            ),
        )),
        None => Ok(()),
    }
}

fn itself(target: &str) -> RpcError {
    RpcError::parameter("target", target, "Can't mirror node into itself; name another disk")
}

/// Refuses job ids that QEMU would not take.
pub(crate) fn check_job_id(id: &str) -> Result<(), RpcError> {
    let mut characters = id.chars();
    let first = characters.next().is_some_and(|it| it.is_ascii_alphabetic());
    if first && characters.all(|it| it.is_ascii_alphanumeric() || matches!(it, '-' | '.' | '_')) {
        return check_name("job_id", id);
    }
    let expected = format!(
        "Invalid job ID '{id}'; it begins with a letter and goes on with letters, digits, '-', '.', '_'"
    );
    Err(RpcError::parameter("job_id", id, expected))
}

/// Tells a job where its source has holes. Blocks on the file system; ends with the job.
fn find_holes(source: &dyn Bdev, disk: &DiskHandle, scan: &Scan) {
    let size = source.geometry().size();
    let mut offset = 0;
    while offset < size {
        let extent = match source.extent(offset) {
            Ok(extent) => extent,
            Err(error) => {
                // Without the map everything is read, and zeroes are found that way.
                tracing::warn!(source = source.name(), %error, "the holes of the source cannot be found");
                break;
            }
        };
        let end = extent.offset.saturating_add(extent.length).min(size);
        if end <= offset {
            break;
        }
        if extent.hole {
            let begin = extent.offset.max(offset);
            report(
                disk,
                scan,
                ScanReport::Hole { offset: begin, length: end.saturating_sub(begin) },
            );
        }
        report(disk, scan, ScanReport::Upto(end));
        offset = end;
        if scan.is_stopped() {
            return;
        }
    }
    report(disk, scan, ScanReport::Done);
}

/// Sends one report, waiting for room.
fn report(disk: &DiskHandle, scan: &Scan, report: ScanReport) {
    while !scan.is_stopped() && disk.send(DiskCommand::Scanned(scan.clone(), report)).is_err() {
        std::thread::sleep(SCAN_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_ids_are_those_that_qemu_takes() {
        for good in ["a", "disk0", "Vm-1.disk_2"] {
            assert!(check_job_id(good).is_ok(), "{good}");
        }
        for bad in ["", "9bad", "a b", "-x", "a/b", &"a".repeat(65)] {
            assert!(check_job_id(bad).is_err(), "{bad}");
        }
    }
}
