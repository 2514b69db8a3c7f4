//! Named dirty bitmaps: who has which, and how they change.
//!
//! Every change is a list of actions, of one or of many, and is made whole or not at all. The actions are tried on a copy of the
//! registry first; then every disk that they are about is held and drained; they are tried once more on what is there then,
//! and the copy takes the registry's place in one step while nothing is in flight. An action that changes bits changes those of a
//! copy of its bitmap, so a failure leaves everything as it was.
//!
//! The target of a mirror is written by the job, which no disk sees: its bitmaps record nothing when the mirror starts, and stay as
//! they are until it ends.
//!
//! A persistent bitmap is marked as in use in the state directory before it records anything, and before any guest is held for it;
//! it is stored when the target stops or its bdev goes. One that is found in use was not stored: it is inconsistent and can only
//! be removed.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use resilver_bdev::bitmap::Grid;
use resilver_bdev::dirty_bitmap::BITMAP_GRANULARITY_MIN;
use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::mirror::{BitmapMode, GRANULARITY_DEFAULT, WorkingBitmap};
use resilver_bdev::{Bdev, DirtyBitmap, DiskCommand, DiskHandle};
use serde_json::{Value, json};

use crate::disks::{DiskId, ask};
use crate::error::{RpcError, code};
use crate::jobs::Job;
use crate::stored_bitmaps::{Finding, StoredBitmap};
use crate::target::{Engaged, Graph, Space, Target, Use};

/// The longest name, bytes (QEMU `BDRV_BITMAP_MAX_NAME_SIZE`).
const NAME_MAX: usize = 1023;

/// A named bitmap of a bdev.
#[derive(Debug, Clone)]
pub(crate) struct BitmapEntry {
    pub(crate) bitmap: Arc<DirtyBitmap>,
    pub(crate) persistent: bool,
    /// It was not stored when it was last in use.
    pub(crate) inconsistent: bool,
    /// The job that uses it.
    pub(crate) busy: Option<String>,
}

/// The bitmaps of all bdevs, by bdev and name.
pub(crate) type Registry = BTreeMap<String, BTreeMap<String, BitmapEntry>>;

/// A bitmap by the bdev that has it and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BitmapName {
    pub(crate) bdev: String,
    pub(crate) bitmap: String,
}

/// A change of the registry.
#[derive(Debug, Clone)]
pub(crate) enum BitmapAction {
    Add { name: BitmapName, granularity: Option<u32>, persistent: bool, disabled: bool },
    Remove(BitmapName),
    Clear(BitmapName),
    Record(BitmapName, bool),
    Merge { into: BitmapName, from: Vec<BitmapName> },
}

impl BitmapAction {
    fn name(&self) -> &BitmapName {
        match self {
            Self::Add { name, .. } | Self::Merge { into: name, .. } => name,
            Self::Remove(name) | Self::Clear(name) | Self::Record(name, _) => name,
        }
    }

    /// The bdevs that must not change meanwhile.
    fn bdevs(&self) -> impl Iterator<Item = &str> {
        let from = match self {
            Self::Merge { from, .. } => from.as_slice(),
            _ => &[],
        };
        from.iter().chain([self.name()]).map(|name| name.bdev.as_str())
    }
}

/// Why actions could not be carried out; none was.
#[derive(Debug)]
pub(crate) struct Failed {
    /// The place in the list of the action that failed, if it was one.
    pub(crate) index: Option<usize>,
    pub(crate) error: RpcError,
}

impl Failed {
    /// This action failed.
    pub(crate) fn at(index: usize) -> impl FnOnce(RpcError) -> Self {
        move |error| Self { index: Some(index), error }
    }
}

impl From<RpcError> for Failed {
    fn from(error: RpcError) -> Self {
        Self { index: None, error }
    }
}

fn not_found(name: &BitmapName) -> RpcError {
    let message = format!("Dirty bitmap '{}' not found on bdev '{}'", name.bitmap, name.bdev);
    let facts = json!({ "bdev": name.bdev, "bitmap": name.bitmap });
    RpcError::new(code::NOT_FOUND, "bitmap_not_found", message, facts)
}

/// A bitmap that may be changed, or used by a job.
fn usable<'a>(
    registry: &'a mut Registry,
    name: &BitmapName,
) -> Result<&'a mut BitmapEntry, RpcError> {
    let facts = json!({ "bdev": name.bdev, "bitmap": name.bitmap });
    let entry = registry.get_mut(&name.bdev).and_then(|it| it.get_mut(&name.bitmap));
    let entry = entry.ok_or_else(|| not_found(name))?;
    if let Some(job) = &entry.busy {
        let message = format!(
            "Bitmap '{}' is currently in use by another operation and cannot be used: job '{job}' works by it",
            name.bitmap
        );
        return Err(RpcError::new(code::BUSY, "bitmap_busy", message, facts));
    }
    if entry.inconsistent {
        let message = format!(
            "Bitmap '{}' is inconsistent and cannot be used: it was not stored when it was last in use; \
             bdev_dirty_bitmap_remove it",
            name.bitmap
        );
        return Err(RpcError::new(code::STATE, "bitmap_inconsistent", message, facts));
    }
    Ok(entry)
}

fn check_bitmap_name(name: &str) -> Result<(), RpcError> {
    match name.len() {
        0 => Err(RpcError::parameter("bitmap", name, "Bitmap name cannot be empty")),
        1..=NAME_MAX => Ok(()),
        _ => Err(RpcError::parameter("bitmap", name, "Bitmap name too long: 1023 bytes at most")),
    }
}

impl Graph {
    /// What records the writes of a disk over this bdev: its own bitmaps and those of the bdevs below it, which all have its
    /// offsets.
    pub(crate) fn bitmaps_below(&self, bdev: &dyn Bdev) -> Vec<Arc<DirtyBitmap>> {
        below(&self.bitmaps, bdev)
    }

    /// Carries an action out on a registry.
    fn try_action(&self, registry: &mut Registry, action: &BitmapAction) -> Result<(), RpcError> {
        let name = action.name();
        let bdev = &self.bdev(&name.bdev)?.bdev;
        self.must_not_be_a_target(&name.bdev)?;
        match action {
            BitmapAction::Add { granularity, persistent, disabled, .. } => {
                check_bitmap_name(&name.bitmap)?;
                let granularity = granularity.unwrap_or(GRANULARITY_DEFAULT);
                if granularity < BITMAP_GRANULARITY_MIN || !granularity.is_power_of_two() {
                    let expected = "Bitmap granularity must be power of 2 and at least 512";
                    return Err(RpcError::parameter("granularity", granularity, expected));
                }
                if *persistent && bdev.identity().is_none() {
                    let expected =
                        "false: only a bdev that is a file or a device can be known again";
                    return Err(RpcError::parameter("persistent", true, expected));
                }
                let own = registry.entry(name.bdev.clone()).or_default();
                if own.contains_key(&name.bitmap) {
                    let message = format!("Bitmap already exists: {}", name.bitmap);
                    let facts = json!({ "bdev": name.bdev, "bitmap": name.bitmap });
                    return Err(RpcError::new(code::EXISTS, "bitmap_exists", message, facts));
                }
                let grid = Grid::new(bdev.geometry().size(), granularity);
                grid.check().map_err(|expected| {
                    RpcError::parameter("granularity", granularity, expected)
                })?;
                own.insert(
                    name.bitmap.clone(),
                    BitmapEntry {
                        bitmap: Arc::new(DirtyBitmap::new(grid, !disabled)),
                        persistent: *persistent,
                        inconsistent: false,
                        busy: None,
                    },
                );
            }
            BitmapAction::Remove(_) => {
                match usable(registry, name) {
                    Err(error) if error.is("bitmap_inconsistent") => {}
                    other => drop(other?),
                }
                if let Some(own) = registry.get_mut(&name.bdev) {
                    own.remove(&name.bitmap);
                }
            }
            BitmapAction::Clear(_) => {
                let entry = usable(registry, name)?;
                entry.bitmap =
                    Arc::new(DirtyBitmap::new(entry.bitmap.grid(), entry.bitmap.recording()));
            }
            BitmapAction::Record(_, recording) => {
                let entry = usable(registry, name)?;
                let copy = entry.bitmap.copy();
                copy.set_recording(*recording);
                entry.bitmap = Arc::new(copy);
            }
            BitmapAction::Merge { from, .. } => {
                let merged = usable(registry, name)?.bitmap.copy();
                for other in from {
                    let source = &usable(registry, other)?.bitmap;
                    let (size, own) = (source.grid().size(), merged.grid().size());
                    if size != own {
                        let expected = format!(
                            "Bitmaps are of different sizes (destination size is {own}, source size is {size}) and can't be \
                             merged"
                        );
                        return Err(RpcError::parameter("bitmaps", other.bitmap.clone(), expected));
                    }
                    merged.merge(source);
                }
                usable(registry, name)?.bitmap = Arc::new(merged);
            }
        }
        Ok(())
    }

    /// Carries actions out on a copy of the registry.
    fn try_actions(&self, actions: &[BitmapAction]) -> Result<Registry, Failed> {
        let mut registry = self.bitmaps.clone();
        for (index, action) in actions.iter().enumerate() {
            self.try_action(&mut registry, action).map_err(Failed::at(index))?;
        }
        Ok(registry)
    }

    /// Refuses a bdev that a mirror writes, itself or through a bdev that is stacked on it.
    fn must_not_be_a_target(&self, bdev: &str) -> Result<(), RpcError> {
        let writes = |job: &&Job| job.legs().is_some_and(|(_, target)| has(target.as_ref(), bdev));
        match self.jobs.values().find(writes) {
            None => Ok(()),
            Some(job) => {
                let by = Use::MirrorTarget(job.id.clone()).to_string();
                Err(RpcError::busy(bdev, &format!("{by}; end that before its bitmaps change")))
            }
        }
    }

    /// The disks that record the writes of a bdev, those over bdevs stacked on it included.
    pub(crate) fn disks_above(&self, bdev: &str) -> impl Iterator<Item = (DiskId, DiskHandle)> {
        let above = self.disks.iter().filter(move |(_, disk)| has(disk.bdev.as_ref(), bdev));
        above.map(|(id, disk)| (*id, disk.handle.clone()))
    }

    /// A bitmap that a mirror is to work by, which is the mirror's from now on.
    pub(crate) fn take_bitmap(
        &mut self,
        name: &BitmapName,
        mode: BitmapMode,
        job: &str,
    ) -> Result<WorkingBitmap, RpcError> {
        let entry = usable(&mut self.bitmaps, name)?;
        if !entry.bitmap.recording() {
            let expected = format!("Bitmap '{}' is not enabled", name.bitmap);
            return Err(RpcError::parameter("bitmap", name.bitmap.clone(), expected));
        }
        entry.busy = Some(job.to_owned());
        Ok(WorkingBitmap { bitmap: Arc::clone(&entry.bitmap), mode })
    }

    /// A job is over: its bitmaps are nobody's.
    pub(crate) fn free_bitmaps(&mut self, job: &str) {
        for entry in self.bitmaps.values_mut().flat_map(BTreeMap::values_mut) {
            if entry.busy.as_deref() == Some(job) {
                entry.busy = None;
                entry.bitmap.set_handed_over(false);
            }
        }
    }

    /// Refuses a mirror's target whose bitmaps would miss what the mirror writes.
    pub(crate) fn must_not_record(&self, bdev: &dyn Bdev) -> Result<(), RpcError> {
        match self.bitmaps_below(bdev).iter().any(|bitmap| bitmap.recording()) {
            false => Ok(()),
            true => Err(RpcError::busy(
                bdev.name(),
                "a dirty bitmap records its writes, and a mirror's are not recorded; disable or remove it first",
            )),
        }
    }

    /// The bitmaps of a bdev, as QEMU's `query-block` shows them.
    pub(crate) fn bitmaps_json(&self, bdev: &str) -> Vec<Value> {
        let own = self.bitmaps.get(bdev).into_iter().flatten();
        own.map(|(name, entry)| {
            let mut json = json!({
                "name": name,
                "recording": entry.bitmap.recording() && !entry.inconsistent,
                "persistent": entry.persistent,
                "busy": entry.busy.is_some(),
                "granularity": entry.bitmap.grid().granularity(),
                "count": entry.bitmap.count_bytes(),
            });
            if entry.inconsistent {
                json["inconsistent"] = true.into();
            }
            if let Some(job) = &entry.busy {
                json["job_id"] = job.as_str().into();
            }
            json
        })
        .collect()
    }
}

/// Whether a bdev has this name, or is stacked on one that has.
fn has(bdev: &dyn Bdev, name: &str) -> bool {
    bdev.name() == name || bdev.children().iter().any(|child| has(child.as_ref(), name))
}

fn below(registry: &Registry, bdev: &dyn Bdev) -> Vec<Arc<DirtyBitmap>> {
    let own = registry.get(bdev.name()).into_iter().flat_map(BTreeMap::values);
    let usable = own.filter(|entry| !entry.inconsistent).map(|entry| Arc::clone(&entry.bitmap));
    let children = bdev.children();
    usable.chain(children.iter().flat_map(|child| below(registry, child.as_ref()))).collect()
}

/// Disks that are held; whatever happens, they go on.
#[derive(Default)]
struct Held(BTreeMap<DiskId, DiskHandle>);

impl Held {
    /// Lets a disk go on; these bitmaps record from now on, if any are given.
    fn release(handle: &DiskHandle, bitmaps: Option<Vec<Arc<DirtyBitmap>>>) {
        let mut release = DiskCommand::Release(bitmaps);
        // The mailbox of a disk empties with each turn of its reactor.
        while let Err(back) = handle.send(release) {
            release = *back;
            std::thread::yield_now();
        }
    }

    /// Lets all go on with the bitmaps that they have now.
    fn release_with_bitmaps(mut self, graph: &Graph) {
        for (id, handle) in std::mem::take(&mut self.0) {
            let disk = graph.disks.get(&id);
            Self::release(&handle, disk.map(|disk| graph.bitmaps_below(disk.bdev.as_ref())));
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for handle in self.0.values() {
            Self::release(handle, None);
        }
    }
}

impl Target {
    /// Holds every disk that records the writes of one of these bdevs, or none of them.
    async fn hold_disks(&self, bdevs: &BTreeSet<&str>) -> Result<Held, RpcError> {
        let mut held = Held::default();
        loop {
            // Looked for again after each wait: a controller may have put another bdev to use meanwhile.
            let next = {
                let graph = self.graph();
                let mut disks = bdevs.iter().flat_map(|bdev| graph.disks_above(bdev));
                let next = disks.find(|(id, _)| !held.0.contains_key(id));
                next.map(|(id, handle)| (id, handle, graph.job_on(id).is_some()))
            };
            let Some((id, handle, under_job)) = next else { return Ok(held) };
            let deadline = HOLD_DEADLINE;
            match ask(&handle, |reply| DiskCommand::Hold { under_job, deadline, reply }).await {
                Ok(drained) => drained?,
                // It was retired meanwhile: nobody writes there any more.
                Err(_) if !self.graph().disks.contains_key(&id) => continue,
                Err(error) => return Err(error),
            }
            held.0.insert(id, handle);
        }
    }

    /// Changes bitmaps, all or none of the actions.
    pub(crate) async fn change_bitmaps(
        self: &Rc<Self>,
        actions: &[BitmapAction],
    ) -> Result<(), Failed> {
        // Refused before any guest waits for it, if it can be.
        let planned = self.graph().try_actions(actions)?;
        let bdevs: BTreeSet<&str> = actions.iter().flat_map(BitmapAction::bdevs).collect();
        let names: Result<Vec<Engaged>, RpcError> =
            bdevs.iter().map(|bdev| self.engage(Space::Bdev, bdev)).collect();
        let _engaged = names?;
        let mut done = self.mark_in_use(actions, &planned);
        if done.is_ok() {
            done = self.change_held(actions, &bdevs).await;
        }
        self.forget_unused(actions);
        done
    }

    /// Has the disks of these bdevs held and makes the change.
    async fn change_held(
        &self,
        actions: &[BitmapAction],
        bdevs: &BTreeSet<&str>,
    ) -> Result<(), Failed> {
        let held = self.hold_disks(bdevs).await?;
        // Nobody else is asked between here and the end: what is tried now is what is done.
        let after = self.graph().try_actions(actions)?;
        self.graph_mut().bitmaps = after;
        held.release_with_bitmaps(&self.graph());
        Ok(())
    }

    /// Refuses a size that the bitmaps of a bdev cannot follow.
    pub(crate) fn bitmaps_may_have(&self, bdev: &str, size: u64) -> Result<(), RpcError> {
        let graph = self.graph();
        for (name, entry) in graph.bitmaps.get(bdev).into_iter().flatten() {
            let grid = entry.bitmap.grid().resized(size);
            if !entry.inconsistent && grid.check().is_err() {
                let (chunks, granularity) = (grid.chunks(), grid.granularity());
                let expected = format!(
                    "a smaller one: bitmap '{name}' would have {chunks} chunks of {granularity} bytes, more than a bitmap has; \
                     bdev_dirty_bitmap_remove it first"
                );
                return Err(RpcError::parameter("new_size", size, expected));
            }
        }
        Ok(())
    }

    /// The bitmaps of a bdev follow its size, but for those that say nothing any more.
    pub(crate) async fn resize_bitmaps(&self, bdev: &str, size: u64) -> Result<(), RpcError> {
        let fits = |entry: &BitmapEntry| entry.inconsistent || entry.bitmap.grid().size() == size;
        if self.graph().bitmaps.get(bdev).is_none_or(|own| own.values().all(fits)) {
            return Ok(());
        }
        let held = self.hold_disks(&BTreeSet::from([bdev])).await?;
        let mut graph = self.graph_mut();
        let own = graph.bitmaps.get_mut(bdev).into_iter().flat_map(BTreeMap::values_mut);
        for entry in own.filter(|entry| !entry.inconsistent) {
            entry.bitmap = Arc::new(entry.bitmap.resized(size));
        }
        held.release_with_bitmaps(&graph);
        Ok(())
    }

    /// New persistent bitmaps are in use before they record anything.
    fn mark_in_use(&self, actions: &[BitmapAction], after: &Registry) -> Result<(), Failed> {
        for (index, action) in actions.iter().enumerate() {
            let BitmapAction::Add { name, persistent: true, .. } = action else { continue };
            let Some(entry) = after.get(&name.bdev).and_then(|own| own.get(&name.bitmap)) else {
                continue;
            };
            let bdev = self.bdev(&name.bdev).map_err(Failed::at(index))?;
            self.store_bitmap(bdev.as_ref(), &name.bitmap, entry, true)
                .map_err(Failed::at(index))?;
        }
        Ok(())
    }

    /// Bitmaps that are gone, or did not come to be, are gone from the state directory too.
    fn forget_unused(&self, actions: &[BitmapAction]) {
        for action in actions {
            let (BitmapAction::Remove(name) | BitmapAction::Add { name, .. }) = action else {
                continue;
            };
            let graph = self.graph();
            let entry = graph.bitmaps.get(&name.bdev).and_then(|own| own.get(&name.bitmap));
            let file = graph.bdev(&name.bdev).ok().and_then(|entry| entry.bdev.identity());
            if let (false, Some(file)) = (entry.is_some_and(|entry| entry.persistent), file) {
                self.state.forget_bitmap(&file, &name.bitmap);
            }
        }
    }

    fn store_bitmap(
        &self,
        bdev: &dyn Bdev,
        name: &str,
        entry: &BitmapEntry,
        in_use: bool,
    ) -> Result<(), RpcError> {
        let Some(file) = bdev.identity() else { return Ok(()) };
        if !self.state.is_durable() {
            let expected = "false: the target runs without --state-dir, so nothing outlives it";
            return Err(RpcError::parameter("persistent", true, expected));
        }
        Ok(self.state.store_bitmap(&file, name, &entry.bitmap, in_use)?)
    }

    /// Stores the persistent bitmaps of a bdev that nobody writes any more.
    pub(crate) fn store_bitmaps(&self, bdev: &dyn Bdev) {
        let graph = self.graph();
        let own = graph.bitmaps.get(bdev.name()).into_iter().flatten();
        for (name, bitmap) in own.filter(|(_, it)| it.persistent && !it.inconsistent) {
            if let Err(error) = self.store_bitmap(bdev, name, bitmap, false) {
                tracing::error!(bdev = bdev.name(), bitmap = name, %error, "the bitmap could not be stored; it will be inconsistent");
            }
        }
    }

    /// A bdev goes, and its bitmaps with it; what is stored of them stays.
    pub(crate) fn put_bitmaps_away(&self, bdev: &dyn Bdev) {
        self.store_bitmaps(bdev);
        self.graph_mut().bitmaps.remove(bdev.name());
    }

    /// Refuses a file as a mirror's target if bitmaps that were stored for it would miss what the mirror writes.
    pub(crate) fn stored_must_not_record(&self, bdev: &dyn Bdev) -> Result<(), RpcError> {
        let Some(file) = bdev.identity() else { return Ok(()) };
        let stored = self.state.load_bitmaps(&file, bdev.geometry().size());
        match stored.iter().find(|stored| stored.bitmap.recording()) {
            None => Ok(()),
            Some(stored) => Err(RpcError::busy(
                bdev.name(),
                &format!(
                    "its stored dirty bitmap '{}' records its writes, and a mirror's are not recorded; bdev_uring_create it and \
                     disable or remove the bitmap first",
                    stored.name
                ),
            )),
        }
    }

    /// The bitmaps that were stored for a bdev's file are its again, and in use.
    pub(crate) fn load_bitmaps(&self, bdev: &dyn Bdev) {
        let Some(file) = bdev.identity() else { return };
        for stored in self.state.load_bitmaps(&file, bdev.geometry().size()) {
            let adopted = match stored.finding {
                Finding::MaybeAnothers => None,
                Finding::Whole | Finding::Nothing => Some(self.state.adopt_bitmap(&file, &stored)),
            };
            let StoredBitmap { name, bitmap, finding, .. } = stored;
            let mut entry = BitmapEntry {
                bitmap: Arc::new(bitmap),
                persistent: true,
                inconsistent: finding != Finding::Whole,
                busy: None,
            };
            let marked = adopted.map(|adopted| {
                adopted.map_err(RpcError::from)?;
                self.store_bitmap(bdev, &name, &entry, true)
            });
            if let Some(Err(error)) = marked {
                tracing::error!(bdev = bdev.name(), bitmap = name, %error, "a stored bitmap cannot be marked as in use and is given up");
                entry.inconsistent = true;
                self.state.forget_bitmap(&file, &name);
            }
            let mut graph = self.graph_mut();
            graph.bitmaps.entry(bdev.name().to_owned()).or_default().insert(name, entry);
        }
    }
}
