//! Controllers: vhost-user-blk sockets over disks.
//!
//! A controller belongs to a disk, not to a bdev: after a switch-over it goes on over the new bdev and nothing here changes.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use resilver_bdev::Limits;
use resilver_vhost::protocol::QUEUES_MAX;
use resilver_vhost::server::{Controller, ControllerConfig, ControllerInfo, Role, VhostError};
use resilver_vhost::stats::VhostStats;
use serde_json::{Value, json};

use crate::disks::DiskId;
use crate::error::{RpcError, code};
use crate::reactors::CpuMask;
use crate::target::{Graph, Space, Target, check_name};

/// Request queues that a controller offers unless the call says otherwise.
pub(crate) const NUM_QUEUES: u16 = 8;

/// A controller as control keeps it.
pub(crate) struct ControllerEntry {
    pub(crate) name: String,
    pub(crate) disk: DiskId,
    /// The call that makes it, but for the bdev, which may change.
    params: Value,
    controller: Controller,
}

/// A controller to be made.
pub(crate) struct NewController {
    pub(crate) name: String,
    pub(crate) bdev: String,
    /// The socket on which its front end listens; none: the controller listens.
    pub(crate) connect: Option<PathBuf>,
    pub(crate) mask: Option<CpuMask>,
    pub(crate) read_only: bool,
    pub(crate) serial: Option<String>,
    pub(crate) num_queues: u16,
    pub(crate) packed_ring: bool,
    pub(crate) postcopy: bool,
    pub(crate) params: Value,
}

impl ControllerEntry {
    /// Tells the guest about a new size.
    pub(crate) fn resize(&self, limits: Limits) {
        self.controller.resize(limits);
    }

    /// Its counters.
    pub(crate) fn stats(&self) -> &Arc<VhostStats> {
        self.controller.stats()
    }
}

impl From<VhostError> for RpcError {
    fn from(error: VhostError) -> Self {
        let message = error.to_string();
        match error {
            VhostError::SocketInUse { path } => {
                Self::new(code::BUSY, "socket_in_use", message, json!({ "path": path }))
            }
            VhostError::NotASocket { path } => {
                Self::new(code::EXISTS, "not_a_socket", message, json!({ "path": path }))
            }
            VhostError::Socket { path, source } => Self::file("making the socket", &path, &source),
            VhostError::NumQueues(given) => {
                Self::parameter("num_queues", given, format!("from 1 to {QUEUES_MAX} queues"))
            }
            VhostError::NoPostcopy(source) => Self::new(
                code::NOT_SUPPORTED,
                "no_postcopy",
                message,
                json!({ "errno": source.raw_os_error() }),
            ),
            VhostError::StillInFlight { name, in_flight } => Self::new(
                code::TIMED_OUT,
                "still_in_flight",
                message,
                json!({ "controller": name, "in_flight": in_flight }),
            ),
        }
    }
}

impl Target {
    /// Makes a controller over a bdev, which gets a disk if it has none.
    pub(crate) async fn create_controller(
        self: &Rc<Self>,
        new: NewController,
    ) -> Result<(), RpcError> {
        check_name("ctrlr", &new.name)?;
        let _name = self.engage(Space::Controller, &new.name)?;
        let _bdev = self.engage(Space::Bdev, &new.bdev)?;
        if self.graph().controllers.contains_key(&new.name) {
            let message =
                format!("a controller named '{}' exists already; choose another name", new.name);
            return Err(RpcError::new(
                code::EXISTS,
                "exists",
                message,
                json!({ "name": new.name }),
            ));
        }
        self.graph().must_be_exportable(&new.bdev)?;
        let bdev = self.bdev(&new.bdev)?;
        if bdev.read_only() && !new.read_only {
            let expected = format!("true: bdev '{}' is read-only", new.bdev);
            return Err(RpcError::parameter("readonly", false, expected));
        }
        let disk = self.disk_over(&bdev, new.mask)?;
        let found = self.graph().disks.get(&disk).map(|disk| (disk.handle.clone(), disk.limits));
        let (handle, limits) = found.ok_or_else(RpcError::gone)?;
        let config = ControllerConfig {
            role: if new.connect.is_some() { Role::Connect } else { Role::Listen },
            socket_path: new.connect.unwrap_or_else(|| self.vhost_dir.join(&new.name)),
            name: new.name.clone(),
            read_only: new.read_only,
            serial: new.serial,
            num_queues: new.num_queues,
            packed_ring: new.packed_ring,
            postcopy: new.postcopy,
        };
        match Controller::start(config, handle, limits) {
            Ok(controller) => {
                let NewController { name, params, .. } = new;
                let entry = ControllerEntry { name: name.clone(), disk, params, controller };
                self.graph_mut().controllers.insert(name, entry);
                Ok(())
            }
            Err(error) => {
                self.retire_disk(disk).await;
                Err(error.into())
            }
        }
    }

    /// Ends a controller; what its guest had in flight is waited for, for a while.
    pub(crate) async fn delete_controller(self: &Rc<Self>, name: &str) -> Result<(), RpcError> {
        let _name = self.engage(Space::Controller, name)?;
        let entry = self.graph_mut().controllers.remove(name);
        let entry = entry.ok_or_else(|| RpcError::no_controller(name))?;
        let stopped = entry.controller.stop().await;
        self.retire_disk(entry.disk).await;
        if stopped.is_err() {
            self.retire_when_left(entry.disk);
        }
        Ok(stopped?)
    }
}

impl Graph {
    /// Refuses a bdev that a controller cannot have: one that something else writes.
    fn must_be_exportable(&self, bdev: &str) -> Result<(), RpcError> {
        use crate::target::Use;
        let excludes = |it: &&Use| {
            !matches!(it, Use::Controller(_) | Use::MirrorSource(_) | Use::LeftInFlight(_))
        };
        match self.uses_of(bdev).iter().find(excludes) {
            Some(other) => Err(RpcError::busy(bdev, &other.to_string())),
            None => Ok(()),
        }
    }

    /// The name of the bdev behind a controller now.
    fn bdev_behind(&self, controller: &ControllerEntry) -> &str {
        self.disks.get(&controller.disk).map_or("", |disk| disk.bdev.name())
    }

    /// The call that makes a controller again.
    pub(crate) fn controller_call(&self, controller: &ControllerEntry) -> Value {
        let mut params = controller.params.clone();
        params["dev_name"] = self.bdev_behind(controller).into();
        json!({ "method": "vhost_create_blk_controller", "params": params })
    }

    /// A controller as SPDK's `vhost_get_controllers` shows it.
    pub(crate) fn controller_json(&self, entry: &ControllerEntry) -> Value {
        let ControllerInfo { name, socket_path, role, read_only, sessions, left_in_flight } =
            entry.controller.info();
        let core = self.disks.get(&entry.disk).map_or(0, |disk| disk.reactor.core());
        let sessions: Vec<Value> = sessions
            .iter()
            .map(|session| {
                json!({
                    "name": name,
                    "features": session.features,
                    "queues": session.queues,
                    "memory_regions": session.memory_regions,
                })
            })
            .collect();
        let stats = entry.stats();
        json!({
            "ctrlr": name,
            "cpumask": crate::reactors::mask_of(core),
            "delay_base_us": 0,
            "iops_threshold": 0,
            "socket": socket_path,
            "connects": role == Role::Connect,
            "sessions": sessions,
            "left_in_flight": left_in_flight,
            "requests": stats.requests.get(),
            "backend_specific": {
                "block": { "bdev": self.bdev_behind(entry), "readonly": read_only, "transport": "vhost_user_blk" },
            },
        })
    }
}
