//! Files and block devices through io_uring; reads and writes of files in memory within a call.

use std::path::PathBuf;

use resilver_bdev::uring::{Engine, UringConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bdev::{SIZES, made_by};
use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::files;
use crate::modules::Made;

fn yes() -> bool {
    true
}

/// What carries out reads and writes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EngineName {
    /// io_uring. On tmpfs a kernel worker thread has every request.
    IoUring,
    /// io_uring that is done when its call returns: files on tmpfs only, by direct I/O, from Linux 6.6 on.
    Inline,
    /// Linux AIO: files on tmpfs or ramfs only.
    Aio,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::IoUring => Self::IoUring,
            EngineName::Inline => Self::Inline,
            EngineName::Aio => Self::Aio,
        }
    }
}

/// Makes a bdev of a file or a block device. The file is locked while the bdev lives; one that was superseded by a
/// switch-over is refused.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(crate) struct BdevUringCreate {
    /// Name of the bdev.
    pub(crate) name: String,
    /// Path of the file or block device.
    pub(crate) filename: PathBuf,
    /// Bytes of a block; what direct I/O on the file needs, at least 512, if not given. Smaller ones than that are emulated: the
    /// blocks around them are read, merged and written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) block_size: Option<u32>,
    /// Refuse writes. Others may read the file too then.
    #[serde(default)]
    pub(crate) readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    #[serde(default = "yes")]
    pub(crate) direct: bool,
    /// What carries out reads and writes; if not given, `inline` for a file on tmpfs, `aio` where that cannot be had, and
    /// `io_uring` for any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) engine: Option<EngineName>,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uuid: Option<String>,
}

impl BdevUringCreate {
    /// Opens the file under a name that is engaged already. Where the caller has looked at the file's identity.
    pub(crate) async fn open(
        mut self,
        caller: &Caller,
        name: crate::target::Engaged,
    ) -> Result<Made, RpcError> {
        // The configuration that is saved must mean the same file wherever it is loaded.
        if let Ok(absolute) = std::path::absolute(&self.filename) {
            self.filename = absolute;
        }
        let bdev = files::open(UringConfig {
            name: self.name.clone(),
            path: self.filename.clone(),
            block_size: self.block_size,
            read_only: self.readonly,
            direct: self.direct,
            mode: caller.target.uring.clone(),
            engine: self.engine.map(Into::into),
        });
        Ok(Made::new(bdev.await?, name, self.uuid.clone(), made_by(&self)))
    }
}

impl Rpc for BdevUringCreate {
    const NAME: &'static str = "bdev_uring_create";
    const EXAMPLE: &'static str = r#"{"name":"disk0","filename":"/srv/vm1.raw"}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let name = caller.target.engage_new_bdev(&self.name)?;
        caller.target.check_file(&self.filename, self.readonly)?;
        let made = self.open(&caller, name).await?;
        // Two calls may have had the same file in mind; the lock let one of them through, but for readers.
        Ok(Answer::new(caller.target.insert_bdev(made)))
    }
}

/// Closes a uring bdev that nobody uses. The file stays.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevUringDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevUringDelete {
    const NAME: &'static str = "bdev_uring_delete";
    const EXAMPLE: &'static str = r#"{"name":"disk0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "uring").await?;
        Ok(Answer::done())
    }
}

/// Grows a file, and tells the guests.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevUringResize {
    /// Name of the bdev.
    name: String,
    /// New size in bytes; at least the present one.
    new_size: u64,
}

impl Rpc for BdevUringResize {
    const NAME: &'static str = "bdev_uring_resize";
    const EXAMPLE: &'static str = r#"{"name":"disk0","new_size":21474836480}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let resized = caller.target.resize_bdev(&self.name, "uring", self.new_size).await;
        resized.map_err(|error| error.told_as(SIZES, "new_size", self.new_size))?;
        Ok(Answer::done())
    }
}
