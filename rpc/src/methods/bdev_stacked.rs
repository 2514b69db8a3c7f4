//! Bdevs stacked on others: passthru, delay, error.

use std::sync::Arc;

use resilver_bdev::delay::{Delay, DelayConfig};
use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::passthru::Passthru;
use resilver_bdev::{Bdev, IoError, IoKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bdev::made_by;
use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::modules::Made;
use crate::target::{Engaged, Space};

/// A base that nobody uses, and both names kept until the new bdev stands on it.
struct Base {
    bdev: Arc<dyn Bdev>,
    name: Engaged,
    _base: Engaged,
}

impl Base {
    fn take(caller: &Caller, name: &str, base: &str) -> Result<Self, RpcError> {
        let target = &caller.target;
        let name = target.engage_new_bdev(name)?;
        let engaged = target.engage(Space::Bdev, base)?;
        let bdev = target.bdev(base)?;
        target.graph().must_be_unused(base)?;
        Ok(Self { bdev, name, _base: engaged })
    }
}

/// Makes a bdev that passes everything on to another.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevPassthruCreate {
    /// Name of the bdev.
    name: String,
    /// Name of the bdev below; nobody else may use it meanwhile.
    base_bdev_name: String,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
}

impl Rpc for BdevPassthruCreate {
    const NAME: &'static str = "bdev_passthru_create";
    const EXAMPLE: &'static str = r#"{"name":"Pass0","base_bdev_name":"Malloc0"}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let base = Base::take(&caller, &self.name, &self.base_bdev_name)?;
        let bdev = Arc::new(Passthru::new(&self.name, base.bdev));
        let made = Made::new(bdev, base.name, self.uuid.clone(), made_by(&self));
        Ok(Answer::new(caller.target.insert_bdev(made)))
    }
}

/// Deletes a passthru bdev that nobody uses.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevPassthruDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevPassthruDelete {
    const NAME: &'static str = "bdev_passthru_delete";
    const EXAMPLE: &'static str = r#"{"name":"Pass0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "passthru").await?;
        Ok(Answer::done())
    }
}

/// Makes a bdev that answers later than the one below. For tests.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevDelayCreate {
    /// Name of the bdev.
    name: String,
    /// Name of the bdev below; nobody else may use it meanwhile.
    base_bdev_name: String,
    /// Added to most reads, microseconds.
    avg_read_latency: u64,
    /// Added to one read in a hundred, microseconds.
    p99_read_latency: u64,
    /// Added to most writes, microseconds.
    avg_write_latency: u64,
    /// Added to one write in a hundred, microseconds.
    p99_write_latency: u64,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
}

impl Rpc for BdevDelayCreate {
    const NAME: &'static str = "bdev_delay_create";
    const EXAMPLE: &'static str = r#"{"name":"Delay0","base_bdev_name":"Malloc0","avg_read_latency":100,"p99_read_latency":1000,
        "avg_write_latency":100,"p99_write_latency":1000}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let base = Base::take(&caller, &self.name, &self.base_bdev_name)?;
        let config = DelayConfig {
            avg_read_us: self.avg_read_latency,
            p99_read_us: self.p99_read_latency,
            avg_write_us: self.avg_write_latency,
            p99_write_us: self.p99_write_latency,
        };
        let bdev = Arc::new(Delay::new(&self.name, base.bdev, config)?);
        let made = Made::new(bdev, base.name, self.uuid.clone(), made_by(&self));
        Ok(Answer::new(caller.target.insert_bdev(made)))
    }
}

/// Deletes a delay bdev that nobody uses.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevDelayDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevDelayDelete {
    const NAME: &'static str = "bdev_delay_delete";
    const EXAMPLE: &'static str = r#"{"name":"Delay0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "delay").await?;
        Ok(Answer::done())
    }
}

/// What SPDK puts before the name of the base.
const ERROR_PREFIX: &str = "EE_";

/// Makes a bdev that fails on command; its name is `EE_` and that of the bdev below. For tests.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub(super) struct BdevErrorCreate {
    /// Name of the bdev below; nobody else may use it meanwhile.
    base_name: String,
    /// UUID of the bdev; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
}

impl Rpc for BdevErrorCreate {
    const NAME: &'static str = "bdev_error_create";
    const EXAMPLE: &'static str = r#"{"base_name":"Malloc0"}"#;
    const RESULT: &'static str = "the bdev's name";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let name = format!("{ERROR_PREFIX}{}", self.base_name);
        let base = Base::take(&caller, &name, &self.base_name)?;
        let injector = Arc::new(ErrorBdev::new(&name, base.bdev));
        let bdev = Arc::clone(&injector) as Arc<dyn Bdev>;
        let made = Made::new(bdev, base.name, self.uuid.clone(), made_by(&self));
        let made = Made { injector: Some(injector), ..made };
        Ok(Answer::new(caller.target.insert_bdev(made)))
    }
}

/// Deletes an error bdev that nobody uses.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevErrorDelete {
    /// Name of the bdev.
    name: String,
}

impl Rpc for BdevErrorDelete {
    const NAME: &'static str = "bdev_error_delete";
    const EXAMPLE: &'static str = r#"{"name":"EE_Malloc0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.delete_bdev(&self.name, "error").await?;
        Ok(Answer::done())
    }
}

/// Which I/O an injection is about.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum IoTypeName {
    /// Forget all injections; what was stalled goes on.
    Clear,
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Unmaps.
    Unmap,
    /// Flushes.
    Flush,
    /// Write-zeroes.
    WriteZeroes,
    /// All of them.
    All,
}

/// What befalls an I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum ErrorTypeName {
    /// It fails.
    #[default]
    Failure,
    /// It does not end until the injections are cleared.
    Pending,
    /// Not supported here.
    NvmeFailure,
    /// Not supported here.
    CorruptData,
    /// Not supported here.
    Nomem,
}

/// Makes I/O of an error bdev fail or stall.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevErrorInjectError {
    /// Name of the error bdev.
    name: String,
    /// Which I/O; `clear` forgets all injections.
    io_type: IoTypeName,
    /// What befalls it: `failure`, or `pending` for no answer until cleared.
    #[serde(default)]
    error_type: ErrorTypeName,
    /// How many I/Os; one if not given, 4294967295 for all until cleared.
    #[serde(default)]
    num: Option<u32>,
    /// Only I/O that touches bytes from here on. With `length`.
    #[serde(default)]
    offset: Option<u64>,
    /// Bytes of the range. With `offset`.
    #[serde(default)]
    length: Option<u64>,
    /// The error that `failure` ends with; 5 (EIO) if not given, 28 for ENOSPC.
    #[serde(default)]
    errno: Option<i32>,
}

impl BdevErrorInjectError {
    fn injection(&self, kind: Option<IoKind>) -> Result<Injection, RpcError> {
        let errno = self.errno.unwrap_or(IoError::IO.errno());
        let effect = match self.error_type {
            ErrorTypeName::Failure => Effect::Fail(IoError::from_errno(errno)),
            ErrorTypeName::Pending => Effect::Stall,
            other @ (ErrorTypeName::NvmeFailure
            | ErrorTypeName::CorruptData
            | ErrorTypeName::Nomem) => {
                let given = format!("{other:?}");
                return Err(RpcError::parameter("error_type", given, "'failure' or 'pending'"));
            }
        };
        let range = match (self.offset, self.length) {
            (None, None) => None,
            (offset, Some(length)) => Some((offset.unwrap_or(0), length)),
            (Some(offset), None) => Some((offset, u64::MAX - offset)),
        };
        let count = match self.num {
            None => 1,
            Some(u32::MAX) => FOREVER,
            Some(num) => u64::from(num),
        };
        Ok(Injection { kind, effect, count, range })
    }
}

impl Rpc for BdevErrorInjectError {
    const NAME: &'static str = "bdev_error_inject_error";
    const EXAMPLE: &'static str = r#"{"name":"EE_Malloc0","io_type":"write","error_type":"failure","num":3,"offset":65536,"length":4096}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let injector = caller.target.graph().bdev(&self.name)?.injector.clone();
        let Some(injector) = injector else {
            let expected = "a bdev of module 'error'; bdev_error_create makes one";
            return Err(RpcError::parameter("name", self.name, expected));
        };
        let kind = match self.io_type {
            IoTypeName::Clear => {
                injector.clear();
                return Ok(Answer::done());
            }
            IoTypeName::Read => Some(IoKind::Read),
            IoTypeName::Write => Some(IoKind::Write),
            IoTypeName::Unmap => Some(IoKind::Unmap),
            IoTypeName::Flush => Some(IoKind::Flush),
            IoTypeName::WriteZeroes => Some(IoKind::WriteZeroes),
            IoTypeName::All => None,
        };
        injector.inject(self.injection(kind)?)?;
        Ok(Answer::done())
    }
}
