//! The target: all that control knows about what is being served.
//!
//! One control thread owns it; nothing here is shared with a reactor but handles. The graph is in one `RefCell` that is
//! borrowed for moments and never across an `await`. A method that waits in the middle of a change first *engages* the
//! names it is about: until its [`Engaged`] guard is dropped, another method that wants one of them is told to try again.
//! So two calls never change one object at once, and no call waits for another. One lock around all changes was rejected:
//! a controller that waits for a hung device would block the whole target.
//!
//! Who uses a bdev is never stored but asked of the graph ([`Graph::uses_of`]): there is nothing that could go stale.

use std::cell::{Ref, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use resilver_bdev::{Bdev, BdevError, FileIdentity, JobVerb};
use resilver_sys::RingMode;
use serde_json::{Value, json};

use crate::bitmaps::Registry;
use crate::controllers::ControllerEntry;
use crate::disks::{DiskEntry, DiskId};
use crate::error::{RpcError, code};
use crate::events::EventLog;
use crate::jobs::{Ended, Job};
use crate::modules::BdevEntry;
use crate::reactors::Reactors;
use crate::state::StateStore;
use crate::verify::VerifyJob;

/// How long a target that stops waits for its jobs.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a call waits for what an ended job has left in flight on a bdev: on a device that answers, a moment is enough.
const RELEASE_PATIENCE: Duration = Duration::from_millis(500);
/// How often they look.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What a target is made of.
pub struct TargetConfig {
    /// Where the controllers' sockets are made.
    pub vhost_dir: PathBuf,
    /// How requests for files reach the kernel.
    pub uring: RingMode,
    /// The reactors.
    pub reactors: Reactors,
    /// Which disks were superseded, and where that is kept.
    pub state: StateStore,
}

/// What is being served.
pub struct Target {
    pub(crate) vhost_dir: PathBuf,
    pub(crate) uring: RingMode,
    pub(crate) reactors: Reactors,
    pub(crate) state: StateStore,
    pub(crate) events: EventLog,
    graph: RefCell<Graph>,
    engaged: RefCell<BTreeSet<(Space, String)>>,
}

/// Kinds of names that can be engaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Space {
    Bdev,
    Controller,
    Job,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bdev => "bdev",
            Self::Controller => "controller",
            Self::Job => "job",
        })
    }
}

/// A name that a method is changing; free again when dropped.
pub(crate) struct Engaged {
    target: Rc<Target>,
    key: (Space, String),
}

impl Drop for Engaged {
    fn drop(&mut self) {
        self.target.engaged.borrow_mut().remove(&self.key);
    }
}

/// Everything that has a name.
#[derive(Default)]
pub(crate) struct Graph {
    pub(crate) bdevs: BTreeMap<String, BdevEntry>,
    pub(crate) disks: BTreeMap<DiskId, DiskEntry>,
    pub(crate) controllers: BTreeMap<String, ControllerEntry>,
    pub(crate) jobs: BTreeMap<String, Job>,
    /// Verifications of mirrors, by the name of their job.
    pub(crate) verifies: BTreeMap<String, VerifyJob>,
    /// Named dirty bitmaps.
    pub(crate) bitmaps: Registry,
    pub(crate) ended: Ended,
    pub(crate) next_disk: u64,
}

/// Why a bdev cannot be deleted, resized or taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// A controller serves it.
    Controller(String),
    /// Another bdev is stacked on it.
    Base(String),
    /// A mirror reads it.
    MirrorSource(String),
    /// A mirror writes it.
    MirrorTarget(String),
    /// A mirror that has ended still has I/O in flight on it, which the device does not end.
    Releasing(DiskId),
    /// A guest whose controller was removed still has so much I/O in flight on it, which the device does not end.
    LeftInFlight(u32),
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller(name) => write!(f, "controller '{name}' serves it"),
            Self::Base(name) => write!(f, "bdev '{name}' is stacked on it"),
            Self::MirrorSource(job) => write!(f, "it is the source of mirror job '{job}'"),
            Self::MirrorTarget(job) => write!(f, "it is the target of mirror job '{job}'"),
            Self::LeftInFlight(count) => write!(
                f,
                "{count} requests of a guest that has gone are still in flight on it; the device does not answer"
            ),
            Self::Releasing(_) => f.write_str(
                "I/O of a job that has ended is still in flight on it; the device does not answer",
            ),
        }
    }
}

impl Graph {
    /// The bdev of this name. A mirror is none that anybody could take: it belongs to its job.
    pub(crate) fn bdev(&self, name: &str) -> Result<&BdevEntry, RpcError> {
        let mirror = |job: &&Job| job.is_live() && job.mirror == name;
        match (self.bdevs.get(name), self.jobs.values().find(mirror)) {
            (Some(entry), _) => Ok(entry),
            (None, Some(job)) => Err(RpcError::busy(
                name,
                &format!("it is the mirror of job '{}' and goes with it", job.id),
            )),
            (None, None) => Err(BdevError::NotFound(name.to_owned()).into()),
        }
    }

    /// The live or concluded job of this id.
    pub(crate) fn job(&self, id: &str) -> Result<&Job, RpcError> {
        self.jobs.get(id).ok_or_else(|| RpcError::no_job(id))
    }

    /// The disk over this bdev, if it is in use.
    pub(crate) fn disk_of(&self, bdev: &str) -> Option<(DiskId, &DiskEntry)> {
        let found = self.disks.iter().find(|(_, disk)| disk.bdev.name() == bdev);
        found.map(|(id, disk)| (*id, disk))
    }

    /// The controllers of a disk.
    pub(crate) fn controllers_of(&self, disk: DiskId) -> impl Iterator<Item = &ControllerEntry> {
        self.controllers.values().filter(move |controller| controller.disk == disk)
    }

    /// The live job on a disk.
    pub(crate) fn job_on(&self, disk: DiskId) -> Option<&Job> {
        self.jobs.values().find(|job| job.disk == disk && job.is_live())
    }

    /// Refuses a controller whose disk has a live job.
    pub(crate) fn must_not_be_mirrored(&self, controller: &str) -> Result<(), RpcError> {
        let disk = self.controllers.get(controller).map(|it| it.disk);
        let Some(job) = disk.and_then(|disk| self.job_on(disk)) else { return Ok(()) };
        Err(RpcError::new(
            code::BUSY,
            "busy",
            format!(
                "controller '{controller}' serves the disk that job '{}' mirrors; job_complete or job_cancel it first",
                job.id
            ),
            json!({ "controller": controller, "job_id": job.id }),
        ))
    }

    /// Who uses a bdev.
    pub(crate) fn uses_of(&self, bdev: &str) -> Vec<Use> {
        let mut uses = Vec::new();
        let stacked = self
            .bdevs
            .iter()
            .filter(|(_, entry)| entry.bdev.children().iter().any(|child| child.name() == bdev));
        uses.extend(stacked.map(|(name, _)| Use::Base(name.clone())));
        for job in self.jobs.values().filter(|job| job.is_live()) {
            if job.source == bdev {
                uses.push(Use::MirrorSource(job.id.clone()));
            }
            if job.target == bdev {
                uses.push(Use::MirrorTarget(job.id.clone()));
            }
        }
        for (id, disk) in &self.disks {
            if disk.bdev.name() == bdev {
                uses.extend(self.controllers_of(*id).map(|it| Use::Controller(it.name.clone())));
                let left = disk.handle.left_in_flight();
                if left > 0 && self.controllers_of(*id).next().is_none() {
                    uses.push(Use::LeftInFlight(left));
                }
            }
            if disk.releasing.bdevs.contains_key(bdev) {
                uses.push(Use::Releasing(*id));
            }
        }
        uses
    }

    /// Refuses a bdev that anybody uses.
    pub(crate) fn must_be_unused(&self, bdev: &str) -> Result<(), RpcError> {
        match self.uses_of(bdev).first() {
            Some(first) => Err(RpcError::busy(bdev, &first.to_string())),
            None => Ok(()),
        }
    }

    /// Whether a bdev or the bdev that a mirror stands for has this name.
    pub(crate) fn name_taken(&self, name: &str) -> bool {
        self.bdevs.contains_key(name)
            || self.jobs.values().any(|job| job.is_live() && job.mirror == name)
    }

    /// The bdev that stands for this file.
    pub(crate) fn bdev_of_file(&self, file: &FileIdentity) -> Option<&Arc<dyn Bdev>> {
        let mut bdevs = self.bdevs.values().map(|entry| &entry.bdev);
        bdevs.find(|bdev| bdev.identity().is_some_and(|identity| identity.same_file(file)))
    }
}

impl Target {
    /// A target that serves nothing yet.
    #[must_use]
    pub fn new(config: TargetConfig) -> Rc<Self> {
        Rc::new(Self {
            vhost_dir: config.vhost_dir,
            uring: config.uring,
            reactors: config.reactors,
            state: config.state,
            events: EventLog::default(),
            graph: RefCell::default(),
            engaged: RefCell::default(),
        })
    }

    /// The graph, to look at.
    pub(crate) fn graph(&self) -> Ref<'_, Graph> {
        self.graph.borrow()
    }

    /// The graph, to change.
    pub(crate) fn graph_mut(&self) -> RefMut<'_, Graph> {
        self.graph.borrow_mut()
    }

    /// Keeps a name from all other methods until the guard is dropped.
    pub(crate) fn engage(self: &Rc<Self>, space: Space, name: &str) -> Result<Engaged, RpcError> {
        let key = (space, name.to_owned());
        if !self.engaged.borrow_mut().insert(key.clone()) {
            return Err(RpcError::new(
                code::AGAIN,
                "engaged",
                format!("{space} '{name}' is being changed by another call; try again"),
                json!({ "name": name }),
            ));
        }
        Ok(Engaged { target: Rc::clone(self), key })
    }

    /// Keeps the name of a bdev to be made; refuses one that is taken.
    pub(crate) fn engage_new_bdev(self: &Rc<Self>, name: &str) -> Result<Engaged, RpcError> {
        check_name("name", name)?;
        let engaged = self.engage(Space::Bdev, name)?;
        if self.graph().name_taken(name) {
            return Err(BdevError::Exists(name.to_owned()).into());
        }
        Ok(engaged)
    }

    /// Stops serving: gives up jobs, ends controllers, takes disks off their reactors.
    pub async fn stop(self: &Rc<Self>) {
        let jobs: Vec<String> = self.graph().jobs.keys().cloned().collect();
        for id in jobs {
            if let Some(job) = self.graph().jobs.get(&id) {
                job.stop_scan();
            }
            // One that is over, or about to be, refuses: just as well. A hold does not keep a target from stopping.
            let _ = self.mirror_verb(&id, JobVerb::Cancel).await;
        }
        self.jobs_have_ended().await;
        let controllers: Vec<String> = self.graph().controllers.keys().cloned().collect();
        for name in controllers {
            if let Err(error) = self.delete_controller(&name).await {
                tracing::warn!(controller = name, %error, "stopping");
            }
        }
        let disks: Vec<DiskId> = self.graph().disks.keys().copied().collect();
        for disk in disks {
            self.retire_disk(disk).await;
        }
        // Nobody writes any more, unless a disk hangs: then its bitmaps stay in use, and are inconsistent next time.
        let quiet: Vec<Arc<dyn Bdev>> = {
            let graph = self.graph();
            let recorded = |bdev: &&Arc<dyn Bdev>| graph.disks_above(bdev.name()).next().is_none();
            graph.bdevs.values().map(|entry| &entry.bdev).filter(recorded).cloned().collect()
        };
        for bdev in quiet {
            self.store_bitmaps(bdev.as_ref());
        }
    }

    /// Waits until no job is left, nor anything in flight that one has left: a bitmap that a job works by is whole only then.
    /// Not for ever: a device may hang.
    async fn jobs_have_ended(&self) {
        let left = || {
            let graph = self.graph();
            let releasing = graph.disks.values().any(|disk| disk.releasing.channels > 0);
            releasing || graph.jobs.values().any(Job::is_live)
        };
        wait_while(left, STOP_PATIENCE).await;
    }

    /// Waits while nobody uses a bdev but jobs that have ended: whoever heard of a job's end may delete its legs, or mirror them, at
    /// once.
    pub(crate) async fn let_go(&self, bdev: &str) {
        let only_releasing = || {
            let uses = self.graph().uses_of(bdev);
            !uses.is_empty() && uses.iter().all(|it| matches!(it, Use::Releasing(_)))
        };
        wait_while(only_releasing, RELEASE_PATIENCE).await;
    }

    /// The bdev of this name.
    pub(crate) fn bdev(&self, name: &str) -> Result<Arc<dyn Bdev>, RpcError> {
        Ok(Arc::clone(&self.graph().bdev(name)?.bdev))
    }
}

/// Waits while something is so, and no longer than this.
async fn wait_while(is_so: impl Fn() -> bool, patience: Duration) {
    let begun = Instant::now();
    while is_so() && begun.elapsed() < patience {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Every file or export below a bdev: its own, or those of the bdevs it is stacked on.
pub(crate) fn files_of(bdev: &dyn Bdev) -> Vec<FileIdentity> {
    match bdev.recorded_as() {
        Some(identity) => vec![identity],
        None => bdev.children().iter().flat_map(|child| files_of(child.as_ref())).collect(),
    }
}

/// Refuses names that could not be a socket's or a metric label's.
pub(crate) fn check_name(parameter: &str, name: &str) -> Result<(), RpcError> {
    let printable = name.chars().all(|c| c.is_ascii_graphic() && c != '/');
    if printable && !name.is_empty() && name.len() <= NAME_MAX && name != "." && name != ".." {
        return Ok(());
    }
    let expected = format!("1 to {NAME_MAX} printable characters without blanks and '/'");
    Err(RpcError::parameter(parameter, name, expected))
}

/// Characters of the longest name.
pub(crate) const NAME_MAX: usize = 64;

/// A fresh random UUID, from the kernel.
pub(crate) fn fresh_uuid() -> Value {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    uuid.trim().into()
}
