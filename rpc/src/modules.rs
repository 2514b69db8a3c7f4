//! Bdevs as control keeps them: how each was made, how it is shown, deleted and resized.
//!
//! What a bdev was made with is kept as the RPC that would make it again: that is what `save_config` writes.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use resilver_bdev::disk::HOLD_DEADLINE;
use resilver_bdev::error::ErrorBdev;
use resilver_bdev::{Bdev, BdevError, DISK_DEPTH, Detail, DiskCommand, FileIdentity, ReplaceRoot};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::disks::ask;
use crate::error::RpcError;
use crate::state::identify;
use crate::target::{Engaged, Graph, Space, Target, fresh_uuid};

/// A bdev and what control knows of it.
pub(crate) struct BdevEntry {
    pub(crate) bdev: Arc<dyn Bdev>,
    pub(crate) uuid: Value,
    /// The call that makes it.
    pub(crate) made_by: Call,
    pub(crate) order: u64,
    /// The switch of its faults, for a bdev of module `error`.
    pub(crate) injector: Option<Arc<ErrorBdev>>,
}

/// A method and its parameters, as configuration files hold them.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Call {
    pub(crate) method: &'static str,
    pub(crate) params: Value,
}

/// A bdev that was made and is not in the graph yet, with its name kept for it.
pub(crate) struct Made {
    pub(crate) bdev: Arc<dyn Bdev>,
    pub(crate) name: Engaged,
    pub(crate) uuid: Option<String>,
    pub(crate) made_by: Call,
    pub(crate) injector: Option<Arc<ErrorBdev>>,
}

impl Made {
    /// A bdev without faults to inject.
    pub(crate) fn new(
        bdev: Arc<dyn Bdev>,
        name: Engaged,
        uuid: Option<String>,
        made_by: Call,
    ) -> Self {
        Self { bdev, name, uuid, made_by, injector: None }
    }
}

impl Target {
    /// Puts a new bdev into the graph.
    pub(crate) fn insert_bdev(&self, made: Made) -> String {
        let name = made.bdev.name().to_owned();
        let uuid = made.uuid.clone().map_or_else(fresh_uuid, Value::from);
        self.load_bitmaps(made.bdev.as_ref());
        let mut graph = self.graph_mut();
        let order = graph.bdevs.values().map(|entry| entry.order).max().unwrap_or(0) + 1;
        let Made { bdev, made_by, injector, name: _engaged, uuid: _ } = made;
        let entry = BdevEntry { bdev, uuid, made_by, order, injector };
        graph.bdevs.insert(name.clone(), entry);
        drop(graph);
        name
    }

    /// Takes a bdev of this module that nobody uses out of the graph and closes it.
    pub(crate) async fn delete_bdev(
        self: &Rc<Self>,
        name: &str,
        module: &str,
    ) -> Result<(), RpcError> {
        let _engaged = self.engage(Space::Bdev, name)?;
        self.graph().must_be(name, module)?;
        self.let_go(name).await;
        self.graph().must_be_unused(name)?;
        let entry = self.graph_mut().bdevs.remove(name);
        if let Some(entry) = entry {
            self.put_bitmaps_away(entry.bdev.as_ref());
        }
        Ok(())
    }

    /// Changes the size of a bdev and of what is served from it.
    pub(crate) async fn resize_bdev(
        self: &Rc<Self>,
        name: &str,
        module: &str,
        size: u64,
    ) -> Result<(), RpcError> {
        let _engaged = self.engage(Space::Bdev, name)?;
        let bdev = self.graph().must_be(name, module)?;
        let users = self.graph().uses_of(name);
        if let Some(other) =
            users.iter().find(|user| !matches!(user, crate::target::Use::Controller(_)))
        {
            return Err(RpcError::busy(name, &format!("{other}; end that before the resize")));
        }
        self.bitmaps_may_have(name, size)?;
        // Before it is larger, and after it is smaller: no write goes beyond what is recorded.
        if size > bdev.geometry().size() {
            self.resize_bitmaps(name, size).await?;
        }
        let file = Arc::clone(&bdev);
        let resized = tokio::task::spawn_blocking(move || file.resize(size)).await;
        if let Err(error) = resized.map_err(|_| RpcError::gone())? {
            self.resize_bitmaps(name, bdev.geometry().size()).await?;
            return Err(error.into());
        }
        if let Some(entry) = self.graph_mut().bdevs.get_mut(name)
            && let Some(blocks) = entry.made_by.params.get_mut("num_blocks")
        {
            *blocks = bdev.geometry().num_blocks.into();
        }
        let Some((disk, handle)) =
            self.graph().disk_of(name).map(|(id, it)| (id, it.handle.clone()))
        else {
            return self.resize_bitmaps(name, bdev.geometry().size()).await;
        };
        let root = bdev.open_channel(DISK_DEPTH)?;
        // The guest's block size does not change with the size, also on a disk whose own blocks are smaller.
        let known = self.graph().disks.get(&disk).map_or(0, |entry| entry.limits.block_size);
        let limits = root.limits().in_blocks_of(known);
        let replaced = ask(&handle, |reply| {
            DiskCommand::ReplaceRoot(ReplaceRoot { root, deadline: HOLD_DEADLINE, reply })
        });
        match replaced.await {
            Ok(replaced) => drop(replaced.map_err(|(error, _root)| RpcError::from(error))?),
            // It was retired meanwhile: the next to use the bdev finds its new size.
            Err(_) if !self.graph().disks.contains_key(&disk) => {}
            Err(error) => return Err(error),
        }
        if let Some(entry) = self.graph_mut().disks.get_mut(&disk) {
            entry.limits = limits;
        }
        for controller in self.graph().controllers_of(disk) {
            controller.resize(limits);
        }
        self.resize_bitmaps(name, limits.size()).await
    }

    /// Refuses a file that a bdev stands for already, unless both only read it; and one that was superseded.
    pub(crate) fn check_file(&self, path: &Path, read_only: bool) -> Result<(), RpcError> {
        self.check_file_is_free(path, read_only)?;
        match identify(path) {
            Ok(file) => Ok(self.state.check(&file)?),
            // Opening it will say the same with the module's hint.
            Err(_) => Ok(()),
        }
    }

    /// Refuses a file that a bdev stands for already, unless both only read it.
    pub(crate) fn check_file_is_free(&self, path: &Path, read_only: bool) -> Result<(), RpcError> {
        let Ok(file) = identify(path) else { return Ok(()) };
        let graph = self.graph();
        match graph.bdev_of_file(&file) {
            Some(bdev) if !(read_only && bdev.read_only()) => Err(BdevError::Locked {
                path: PathBuf::from(path),
                holder: format!("bdev '{}' of this target stands for the same file", bdev.name()),
            }
            .into()),
            Some(_) | None => Ok(()),
        }
    }
}

impl Target {
    /// Refuses an export that a bdev stands for already, and one that was superseded.
    pub(crate) fn check_export(&self, export: &FileIdentity) -> Result<(), RpcError> {
        self.state.check(export)?;
        let graph = self.graph();
        let mut bdevs = graph.bdevs.values().map(|entry| &entry.bdev);
        let same = |bdev: &&Arc<dyn Bdev>| {
            bdev.link().is_some() && bdev.recorded_as().is_some_and(|it| it.same_file(export))
        };
        match bdevs.find(same) {
            Some(bdev) => Err(BdevError::Locked {
                path: export.path.clone(),
                holder: format!("bdev '{}' of this target stands for the same export", bdev.name()),
            }
            .into()),
            None => Ok(()),
        }
    }
}

impl Graph {
    /// The bdev of this name, if it is of this module.
    fn must_be(&self, name: &str, module: &str) -> Result<Arc<dyn Bdev>, RpcError> {
        let bdev = &self.bdev(name)?.bdev;
        if bdev.module() == module {
            return Ok(Arc::clone(bdev));
        }
        let expected = format!("a bdev of module '{module}'; this one is '{}'", bdev.module());
        Err(RpcError::parameter("name", name, expected))
    }

    /// A bdev as SPDK's `bdev_get_bdevs` shows it.
    pub(crate) fn bdev_json(&self, entry: &BdevEntry) -> Value {
        let bdev = &entry.bdev;
        let geometry = bdev.geometry();
        let (module, writable) = (bdev.module(), !bdev.read_only());
        let uses: Vec<String> = self.uses_of(bdev.name()).iter().map(ToString::to_string).collect();
        let mut facts = Map::new();
        for (name, detail) in bdev.details() {
            facts.insert(name.to_owned(), detail_json(&detail));
        }
        let children: Vec<String> = bdev.children().iter().map(|it| it.name().to_owned()).collect();
        if let [base] = children.as_slice() {
            facts.insert("base_bdev_name".into(), base.clone().into());
        }
        json!({
            "name": bdev.name(),
            "aliases": [entry.uuid],
            "product_name": product_name(module),
            "block_size": geometry.block_size,
            "num_blocks": geometry.num_blocks,
            "uuid": entry.uuid,
            "assigned_rate_limits":
                { "rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0, "w_mbytes_per_sec": 0 },
            "claimed": !uses.is_empty(),
            "claimed_by": uses,
            "zoned": false,
            "supported_io_types": {
                "read": true, "write": writable, "unmap": writable, "flush": true, "write_zeroes": writable,
                "reset": false, "nvme_admin": false, "nvme_io": false, "compare": false, "copy": false,
            },
            "read_only": !writable,
            "driver_specific": { module: facts },
        })
    }
}

impl Graph {
    /// A disk whose guest knows this block size goes on with this bdev, which may be a view of the one that was made: from
    /// now on it stands for that, and is made again with the guest's block size from a saved configuration.
    pub(crate) fn goes_on_as(&mut self, bdev: &Arc<dyn Bdev>, block_size: u32) {
        let Some(entry) = self.bdevs.get_mut(bdev.name()) else { return };
        let own = entry.bdev.geometry();
        if own.block_size == block_size {
            return;
        }
        entry.bdev = Arc::clone(bdev);
        // A target may be larger than its source, by less than a block of it.
        if own.size().is_multiple_of(u64::from(block_size)) {
            self.remember_block_size(bdev.as_ref(), block_size);
        }
    }

    /// The call that makes a bdev again gives it this block size; that of its base, where it takes it from there.
    fn remember_block_size(&mut self, bdev: &dyn Bdev, block_size: u32) {
        let size = bdev.geometry().size();
        if let Some(entry) = self.bdevs.get_mut(bdev.name())
            && let Some(params) = entry.made_by.params.as_object_mut()
            && bdev.children().is_empty()
        {
            params.insert("block_size".into(), block_size.into());
            if let Some(blocks) = params.get_mut("num_blocks") {
                *blocks = (size / u64::from(block_size)).into();
            }
        }
        for child in bdev.children() {
            self.remember_block_size(child.as_ref(), block_size);
        }
    }

    /// The mirrors of live jobs, as `bdev_get_bdevs` shows them: a mirror has the size of its source.
    pub(crate) fn mirrors_json(&self) -> impl Iterator<Item = Value> {
        self.jobs.values().filter(|job| job.is_live()).filter_map(|job| {
            let geometry = self.bdevs.get(&job.source)?.bdev.geometry();
            Some(json!({
                "name": job.mirror,
                "aliases": [],
                "product_name": "Mirror",
                "block_size": geometry.block_size,
                "num_blocks": geometry.num_blocks,
                "claimed": true,
                "claimed_by": [format!("it belongs to mirror job '{}'", job.id)],
                "zoned": false,
                "driver_specific": {
                    "mirror": { "job_id": job.id, "source": job.source, "target": job.target },
                },
            }))
        })
    }
}

fn detail_json(detail: &Detail) -> Value {
    match detail {
        Detail::Text(text) => text.clone().into(),
        Detail::Number(number) => (*number).into(),
        Detail::Flag(flag) => (*flag).into(),
    }
}

/// What SPDK calls a bdev of this module.
fn product_name(module: &str) -> &str {
    match module {
        "null" => "Null disk",
        "malloc" => "Malloc disk",
        "uring" => "URING bdev",
        "virtio" => "VirtioBlk Disk",
        "passthru" => "passthru",
        "delay" => "delay",
        "error" => "Error Injection Disk",
        other => other,
    }
}
