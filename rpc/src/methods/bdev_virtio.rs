//! Exports of other processes over vhost-user-blk.

use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::{Bdev, BdevError};
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig, export_at};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::bdev::made_by;
use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::modules::Made;
use crate::target::Target;

/// How often it is tried to take on a new size that could not be taken on.
const FOLLOW_AGAIN: Duration = Duration::from_secs(1);

/// Makes a bdev of the disk that another process exports over vhost-user-blk: a storage daemon, SPDK, another Resilver. If that
/// process goes, requests wait until it is there again.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevVirtioCreate {
    /// Name of the bdev.
    name: String,
    /// Path of the export's socket.
    socket: PathBuf,
    /// Rings to use. A disk that is served takes one, a mirror's target one, a mirror's source three. As many as the export has, but
    /// not more than 4, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_queues: Option<u16>,
    /// How long the export may be away, in milliseconds, before requests fail until it is there again. 0 waits for ever.
    #[serde(default)]
    reconnect_timeout_ms: u64,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
}

impl Rpc for BdevVirtioCreate {
    const NAME: &'static str = "bdev_virtio_create";
    const EXAMPLE: &'static str = r#"{"name":"nvme0","socket":"/run/spdk/nvme0.sock"}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(mut self, caller: Caller) -> Result<Answer, RpcError> {
        let name = caller.target.engage_new_bdev(&self.name)?;
        // The configuration that is saved must mean the same socket wherever it is loaded.
        if let Ok(absolute) = std::path::absolute(&self.socket) {
            self.socket = absolute;
        }
        caller.target.check_export(&export_at(&self.socket))?;
        let config = VirtioConfig {
            name: self.name.clone(),
            socket: self.socket.clone(),
            num_queues: self.num_queues,
            reconnect_timeout: (self.reconnect_timeout_ms > 0)
                .then(|| Duration::from_millis(self.reconnect_timeout_ms)),
        };
        // An export may take its time to answer, and may be one of this target's own.
        let connected = tokio::task::spawn_blocking(move || Virtio::connect(config)).await;
        let bdev: Result<Virtio, BdevError> = connected.map_err(|_| RpcError::gone())?;
        let bdev = Arc::new(bdev?);
        let (sender, sizes) = watch::channel(bdev.geometry().size());
        bdev.watch_size(move |size| {
            // Nobody follows a bdev that goes.
            let _ = sender.send(size);
        });
        let made = Made::new(bdev, name, self.uuid.clone(), made_by(&self));
        let name = caller.target.insert_bdev(made);
        tokio::task::spawn_local(follow(Rc::downgrade(&caller.target), name.clone(), sizes));
        Ok(Answer::new(name))
    }
}

/// Has a bdev, and the guests that it serves, follow its export when that grows. Ends with the bdev.
async fn follow(target: Weak<Target>, name: String, mut sizes: watch::Receiver<u64>) {
    while sizes.changed().await.is_ok() {
        let mut told = false;
        // A newer size may come while an older one has to wait: a job is above the bdev, or no ring is free for the change.
        while sizes.has_changed().is_ok() {
            let size = *sizes.borrow_and_update();
            let Some(target) = target.upgrade() else { return };
            match target.resize_bdev(&name, "virtio", size).await {
                Ok(()) => break,
                Err(error) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!(bdev = name, size, %error, "the export has grown, the bdev not yet");
                }
                Err(_) => {}
            }
            drop(target);
            tokio::time::sleep(FOLLOW_AGAIN).await;
        }
    }
}

/// Disconnects from an export that nobody uses. The export stays.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevVirtioDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevVirtioDelete {
    const NAME: &'static str = "bdev_virtio_delete";
    const EXAMPLE: &'static str = r#"{"name":"nvme0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "virtio").await?;
        Ok(Answer::done())
    }
}
