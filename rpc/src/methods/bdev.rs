//! The leaf bdevs: null, malloc.

use std::sync::Arc;

use resilver_bdev::malloc::Malloc;
use resilver_bdev::null::Null;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::modules::{Call, Made};
use crate::target::Target;

/// Bytes of a MiB, in which SPDK's resize counts.
const MIB: u64 = 1 << 20;

/// The call that makes a bdev again, from the parameters it was made with.
pub(super) fn made_by<M: Rpc + Serialize>(params: &M) -> Call {
    Call { method: M::NAME, params: serde_json::to_value(params).unwrap_or_default() }
}

/// The first free name of this form, for a caller that gave none.
fn free_name(target: &Target, prefix: &str) -> String {
    let graph = target.graph();
    let mut number = 0_u64;
    while graph.name_taken(&format!("{prefix}{number}")) {
        number += 1;
    }
    format!("{prefix}{number}")
}

/// Parameters of SPDK about metadata beside the blocks, which its client sends even where there is none.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
struct NoMetadata {
    /// Metadata of a block; only 0.
    #[serde(default)]
    md_size: Option<u32>,
    /// Where metadata stands; only `false`.
    #[serde(default)]
    md_interleave: Option<bool>,
    /// Protection information; only 0.
    #[serde(default)]
    dif_type: Option<u32>,
    /// Where protection information stands; only `false`.
    #[serde(default)]
    dif_is_head_of_md: Option<bool>,
}

impl NoMetadata {
    /// Refuses blocks with metadata.
    fn check(&self) -> Result<(), RpcError> {
        let sizes = [("md_size", self.md_size), ("dif_type", self.dif_type)];
        if let Some((name, value)) = sizes.into_iter().find(|(_, it)| it.is_some_and(|it| it != 0))
        {
            return Err(RpcError::parameter(name, value, "0: blocks have no metadata"));
        }
        let flags =
            [("md_interleave", self.md_interleave), ("dif_is_head_of_md", self.dif_is_head_of_md)];
        match flags.into_iter().find(|(_, it)| *it == Some(true)) {
            Some((name, _)) => {
                Err(RpcError::parameter(name, true, "false: blocks have no metadata"))
            }
            None => Ok(()),
        }
    }
}

/// Makes a bdev that stores nothing: writes are dropped, reads leave the buffers as they are. For measuring everything
/// else.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevNullCreate {
    /// Name of the bdev.
    name: String,
    /// Blocks.
    num_blocks: u64,
    /// Bytes of a block: 512 or 4096.
    block_size: u32,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(flatten, skip_serializing)]
    metadata: NoMetadata,
}

impl Rpc for BdevNullCreate {
    const NAME: &'static str = "bdev_null_create";
    const EXAMPLE: &'static str = r#"{"name":"Null0","num_blocks":2097152,"block_size":512}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        self.metadata.check()?;
        let name = caller.target.engage_new_bdev(&self.name)?;
        let bdev = Arc::new(Null::new(&self.name, self.block_size, self.num_blocks)?);
        let made_by = made_by(&self);
        Ok(Answer::new(caller.target.insert_bdev(Made::new(bdev, name, self.uuid, made_by))))
    }
}

/// Deletes a null bdev that nobody uses.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevNullDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevNullDelete {
    const NAME: &'static str = "bdev_null_delete";
    const EXAMPLE: &'static str = r#"{"name":"Null0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "null").await?;
        Ok(Answer::done())
    }
}

/// What the crates below call a new size.
pub(super) const SIZES: &[&str] = &["size", "num_blocks"];

/// Changes the size of a null bdev. Guests are told.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevNullResize {
    /// Name of the bdev.
    name: String,
    /// New size in MiB, as SPDK counts it here.
    new_size: u64,
}

impl Rpc for BdevNullResize {
    const NAME: &'static str = "bdev_null_resize";
    const EXAMPLE: &'static str = r#"{"name":"Null0","new_size":2048}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let size = self.new_size.saturating_mul(MIB);
        let resized = caller.target.resize_bdev(&self.name, "null", size).await;
        resized.map_err(|error| error.told_as(SIZES, "new_size", self.new_size))?;
        Ok(Answer::done())
    }
}

/// Makes a bdev in memory. Its content is gone when the target stops.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevMallocCreate {
    /// Name of the bdev; `Malloc` and a number if not given.
    #[serde(default)]
    name: Option<String>,
    /// Blocks.
    num_blocks: u64,
    /// Bytes of a block: 512 or 4096.
    block_size: u32,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(flatten, skip_serializing)]
    metadata: NoMetadata,
}

impl Rpc for BdevMallocCreate {
    const NAME: &'static str = "bdev_malloc_create";
    const EXAMPLE: &'static str = r#"{"name":"Malloc0","num_blocks":131072,"block_size":512}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(mut self, caller: Caller) -> Result<Answer, RpcError> {
        self.metadata.check()?;
        let name = self.name.take().unwrap_or_else(|| free_name(&caller.target, "Malloc"));
        let engaged = caller.target.engage_new_bdev(&name)?;
        let bdev = Arc::new(Malloc::new(&name, self.block_size, self.num_blocks)?);
        self.name = Some(name);
        let made_by = made_by(&self);
        let made = Made::new(bdev, engaged, self.uuid, made_by);
        Ok(Answer::new(caller.target.insert_bdev(made)))
    }
}

/// Deletes a malloc bdev that nobody uses, and its content.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevMallocDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevMallocDelete {
    const NAME: &'static str = "bdev_malloc_delete";
    const EXAMPLE: &'static str = r#"{"name":"Malloc0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "malloc").await?;
        Ok(Answer::done())
    }
}
