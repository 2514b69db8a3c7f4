//! Controllers: disks as vhost-user-blk sockets.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Answer, Caller, Rpc};
use crate::controllers::{NUM_QUEUES, NewController};
use crate::error::RpcError;
use crate::reactors::CpuMask;

/// Serves a bdev to a virtual machine on the socket `DIR/<ctrlr>` (`serve --vhost-dir`), or on one that the machine has made.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct VhostCreateBlkController {
    /// Name of the controller and of its socket.
    ctrlr: String,
    /// Name of the bdev.
    dev_name: String,
    /// Cores that may poll the disk, as a mask (`0x6`) or a list (`[1,2]`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpumask: Option<String>,
    /// Guests may not write.
    #[serde(default)]
    readonly: bool,
    /// Offer packed rings beside split ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    packed_ring: bool,
    /// Guests may come by post-copy migration: they run here while their memory is still on its way. Their monitors must then be
    /// trusted as much as the target itself: the userfaultfd that they are given reaches all of its memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    postcopy: bool,
    /// Only `vhost_user_blk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    transport: Option<String>,
    /// What the guest sees as the disk's serial, at most 20 bytes; made from the name if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// Absolute path of a socket on which the front end listens (QEMU: `-chardev socket,server=on`): the controller connects
    /// there, tries until somebody listens, and again whenever the connection is lost. Not given: it listens itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connect: Option<PathBuf>,
    /// The most request queues; 8 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_queues: Option<u16>,
}

/// Bytes of the longest serial (virtio 5.2.6, VIRTIO_BLK_T_GET_ID).
const SERIAL_MAX: usize = 20;

impl Rpc for VhostCreateBlkController {
    const NAME: &'static str = "vhost_create_blk_controller";
    const EXAMPLE: &'static str = r#"{"ctrlr":"vm1.sock","dev_name":"disk0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        if let Some(other) = self.transport.as_deref().filter(|it| *it != "vhost_user_blk") {
            return Err(RpcError::parameter("transport", other, "'vhost_user_blk'"));
        }
        if let Some(serial) = self.serial.as_deref().filter(|it| it.len() > SERIAL_MAX) {
            let expected = format!("at most {SERIAL_MAX} bytes: a guest sees no more");
            return Err(RpcError::parameter("serial", serial, expected));
        }
        if let Some(path) = self.connect.as_deref().filter(|it| !it.is_absolute()) {
            let given = path.display().to_string();
            return Err(RpcError::parameter("connect", given, "an absolute path"));
        }
        let mask = self.cpumask.as_deref().map(|text| {
            CpuMask::parse(text).map_err(|expected| RpcError::parameter("cpumask", text, expected))
        });
        let new = NewController {
            mask: mask.transpose()?,
            read_only: self.readonly,
            num_queues: self.num_queues.unwrap_or(NUM_QUEUES),
            packed_ring: self.packed_ring,
            postcopy: self.postcopy,
            params: serde_json::to_value(&self).unwrap_or_default(),
            serial: self.serial,
            name: self.ctrlr,
            bdev: self.dev_name,
            connect: self.connect,
        };
        caller.target.create_controller(new).await?;
        Ok(Answer::done())
    }
}

/// Ends a controller. Its bdev stays. Refused while its disk is mirrored: complete or cancel the job first.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct VhostDeleteController {
    /// Name of the controller.
    ctrlr: String,
}

impl Rpc for VhostDeleteController {
    const NAME: &'static str = "vhost_delete_controller";
    const EXAMPLE: &'static str = r#"{"ctrlr":"vm1.sock"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        // Only here: a target that stops gives jobs up first, and must not be refused.
        caller.target.graph().must_not_be_mirrored(&self.ctrlr)?;
        caller.target.delete_controller(&self.ctrlr).await?;
        Ok(Answer::done())
    }
}

/// Lists controllers. After a switch-over `backend_specific.block.bdev` is the new bdev. While a guest is live-migrated there are two
/// `sessions`, of which one has `queues` that run; `left_in_flight` counts requests of guests that have gone and that the disk does
/// not end: new front ends are refused meanwhile.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct VhostGetControllers {
    /// Name of one controller; all if not given.
    #[serde(default)]
    name: Option<String>,
}

impl Rpc for VhostGetControllers {
    const NAME: &'static str = "vhost_get_controllers";
    const EXAMPLE: &'static str = r#"{"name":"vm1.sock"}"#;
    const RESULT: &'static str =
        "an array of SPDK's objects: ctrlr, cpumask, socket, sessions, backend_specific and more";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let graph = caller.target.graph();
        let list: Vec<Value> = match &self.name {
            None => graph.controllers.values().map(|it| graph.controller_json(it)).collect(),
            Some(name) => match graph.controllers.get(name) {
                Some(controller) => vec![graph.controller_json(controller)],
                None => return Err(RpcError::no_controller(name)),
            },
        };
        Ok(Answer::new(list))
    }
}
