//! What an RPC answers when it cannot do what was asked.
//!
//! Three parts: a stable `code` for programs, a `message` for the operator (what is wrong, and the way out where there is
//! one), and `data` with the same facts as fields; `data.kind` is the stable name of the case. Codes of JSON-RPC are
//! negative five-digit numbers; all others are a negative `errno`, as SPDK answers them. One match from each error type of
//! the crates below to a code stands here and nowhere else.

use std::io;

use resilver_bdev::{BdevError, HoldError, VerbError};
use resilver_reactor::ReactorError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The codes that are answered.
pub mod code {
    /// Not JSON (JSON-RPC 2.0 §5.1).
    pub const PARSE: i64 = -32700;
    /// JSON, but not a request.
    pub const INVALID_REQUEST: i64 = -32600;
    /// No such method.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// A parameter is missing, unknown or not acceptable.
    pub const INVALID_PARAMS: i64 = -32602;
    /// Something of ours is broken.
    pub const INTERNAL: i64 = -32603;
    /// `EPERM`: not in this state.
    pub const STATE: i64 = -1;
    /// `ENOENT`: no such job, controller or record.
    pub const NOT_FOUND: i64 = -2;
    /// `EAGAIN`: try again.
    pub const AGAIN: i64 = -11;
    /// `EBUSY`: used by something else.
    pub const BUSY: i64 = -16;
    /// `EEXIST`: the name is taken.
    pub const EXISTS: i64 = -17;
    /// `ENODEV`: no such bdev or controller.
    pub const NO_DEVICE: i64 = -19;
    /// `EOPNOTSUPP`: cannot be done with this, or not yet.
    pub const NOT_SUPPORTED: i64 = -95;
    /// `ETIMEDOUT`: did not end in time.
    pub const TIMED_OUT: i64 = -110;
    /// `ESTALE`: the disk holds old data.
    pub const SUPERSEDED: i64 = -116;
}

/// An error as it stands in a response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// Stable number of the case.
    pub code: i64,
    /// What is wrong and what to do.
    pub message: String,
    /// The facts as fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

impl RpcError {
    /// An error with the case's name and its facts; `facts` is an object.
    #[must_use]
    pub fn new(code: i64, kind: &str, message: impl Into<String>, facts: Value) -> Self {
        let mut data = match facts {
            Value::Object(map) => map,
            Value::Null
            | Value::Bool(_)
            | Value::Number(_)
            | Value::String(_)
            | Value::Array(_) => serde_json::Map::new(),
        };
        data.insert("kind".to_owned(), kind.into());
        Self { code, message: message.into(), data: Some(Value::Object(data)) }
    }

    /// Whether this is the case of that name.
    #[must_use]
    pub fn is(&self, kind: &str) -> bool {
        self.data.as_ref().is_some_and(|data| data["kind"] == kind)
    }

    /// A parameter that is not acceptable: its name, its value, what would have been accepted.
    #[must_use]
    pub fn parameter(name: &str, value: impl Into<Value>, expected: impl Into<String>) -> Self {
        let (value, expected) = (value.into(), expected.into());
        Self::new(
            code::INVALID_PARAMS,
            "invalid_parameter",
            format!("parameter '{name}' is {value}: {expected}"),
            json!({ "parameter": name, "value": value, "expected": expected }),
        )
    }

    /// A parameter that is not given and should be.
    #[must_use]
    pub fn missing(name: &str, expected: impl Into<String>) -> Self {
        let expected = expected.into();
        Self::new(
            code::INVALID_PARAMS,
            "invalid_parameter",
            format!("parameter '{name}' is missing: {expected}"),
            json!({ "parameter": name, "value": null, "expected": expected }),
        )
    }

    /// The same error under the parameter that the caller knows: an error about one of `ours` becomes one about `theirs`,
    /// which was given as `value`.
    #[must_use]
    pub(crate) fn told_as(self, ours: &[&str], theirs: &str, value: impl Into<Value>) -> Self {
        let data = self.data.as_ref();
        let field = |name: &str| data.and_then(|data| data.get(name)).and_then(Value::as_str);
        match (field("parameter"), field("expected")) {
            (Some(parameter), Some(expected)) if ours.contains(&parameter) => {
                Self::parameter(theirs, value, expected)
            }
            (_, _) => self,
        }
    }

    /// A parameter that is specified and not built yet: refused rather than ignored.
    #[must_use]
    pub fn not_yet(name: &str, value: impl Into<Value>, instead: &str) -> Self {
        let value = value.into();
        Self::new(
            code::NOT_SUPPORTED,
            "not_supported_yet",
            format!("parameter '{name}' = {value} is not supported by this version; {instead}"),
            json!({ "parameter": name, "value": value, "expected": instead }),
        )
    }

    /// A bdev that is used in a way that excludes what was asked.
    #[must_use]
    pub fn busy(name: &str, by: &str) -> Self {
        BdevError::Busy { name: name.to_owned(), by: by.to_owned() }.into()
    }

    /// No such controller.
    #[must_use]
    pub fn no_controller(name: &str) -> Self {
        Self::new(
            code::NO_DEVICE,
            "not_found",
            format!("there is no controller named '{name}'; vhost_get_controllers lists them"),
            json!({ "controller": name }),
        )
    }

    /// No such job.
    #[must_use]
    pub fn no_job(id: &str) -> Self {
        VerbError::NotFound { job: id.to_owned() }.into()
    }

    /// A job of this name exists already.
    #[must_use]
    pub(crate) fn job_exists(id: &str) -> Self {
        let message = format!(
            "Job ID '{id}' already in use; choose another job_id, or job_dismiss it if it is over"
        );
        Self::new(code::EXISTS, "job_exists", message, json!({ "job_id": id }))
    }

    /// Something that the reactors did not answer: the target is going down.
    #[must_use]
    pub fn gone() -> Self {
        Self::new(code::INTERNAL, "stopping", "the target is stopping", json!({}))
    }

    /// A file that control could not read or write.
    #[must_use]
    pub fn file(action: &str, path: &std::path::Path, error: &io::Error) -> Self {
        let path = path.display().to_string();
        Self::new(
            errno(error),
            "file",
            format!("{action} '{path}' failed: {error}"),
            json!({ "path": path, "errno": error.raw_os_error() }),
        )
    }
}

/// The code of an operating system's error.
fn errno(error: &io::Error) -> i64 {
    error.raw_os_error().map_or(code::INTERNAL, |errno| -i64::from(errno))
}

impl From<BdevError> for RpcError {
    fn from(error: BdevError) -> Self {
        let message = error.to_string();
        match error {
            BdevError::NotFound(name) => {
                Self::new(code::NO_DEVICE, "not_found", message, json!({ "bdev": name }))
            }
            BdevError::Exists(name) => {
                Self::new(code::EXISTS, "exists", message, json!({ "name": name }))
            }
            BdevError::Invalid { parameter, value, expected } => {
                // The crates below say numbers as text.
                let number = value.parse::<u64>().map(Value::from);
                Self::parameter(parameter, number.unwrap_or_else(|_| value.into()), expected)
            }
            BdevError::File { path, source, .. } => Self::new(
                errno(&source),
                "file",
                message,
                json!({ "path": path, "errno": source.raw_os_error() }),
            ),
            BdevError::Export { path, .. } => {
                Self::new(code::INTERNAL, "export", message, json!({ "path": path }))
            }
            BdevError::Locked { path, holder } => {
                Self::new(code::BUSY, "locked", message, json!({ "path": path, "holder": holder }))
            }
            BdevError::Busy { name, by } => {
                Self::new(code::BUSY, "busy", message, json!({ "bdev": name, "by": by }))
            }
            BdevError::NotSupported { name, module, operation } => Self::new(
                code::NOT_SUPPORTED,
                "not_supported",
                message,
                json!({ "bdev": name, "module": module, "operation": operation }),
            ),
            BdevError::Superseded { path, by, generation } => Self::new(
                code::SUPERSEDED,
                "superseded",
                message,
                json!({ "path": path, "by": by, "generation": generation }),
            ),
            BdevError::Resources { name, .. } => {
                Self::new(code::INTERNAL, "resources", message, json!({ "bdev": name }))
            }
        }
    }
}

impl From<VerbError> for RpcError {
    fn from(error: VerbError) -> Self {
        let message = error.to_string();
        match error {
            VerbError::State { job, status, verb } => Self::new(
                code::STATE,
                "job_state",
                message,
                json!({ "job_id": job, "status": status.name(), "verb": verb }),
            ),
            VerbError::AlreadyPaused => Self::new(code::STATE, "job_paused", message, json!({})),
            VerbError::NotPaused => Self::new(code::STATE, "job_not_paused", message, json!({})),
            VerbError::AlreadyVerifying { job } => {
                Self::new(code::BUSY, "job_verifying", message, json!({ "job_id": job }))
            }
            VerbError::NotVerifying { job } => {
                Self::new(code::STATE, "job_not_verifying", message, json!({ "job_id": job }))
            }
            VerbError::NotFound { job } => {
                Self::new(code::NOT_FOUND, "job_not_found", message, json!({ "job_id": job }))
            }
            VerbError::NotSupported { job, verb, .. } => Self::new(
                code::NOT_SUPPORTED,
                "job_verb_not_supported",
                message,
                json!({ "job_id": job, "verb": verb }),
            ),
        }
    }
}

impl From<HoldError> for RpcError {
    fn from(error: HoldError) -> Self {
        let message = error.to_string();
        match error {
            HoldError::TimedOut { in_flight, deadline } => Self::new(
                code::TIMED_OUT,
                "not_drained",
                message,
                json!({ "in_flight": in_flight, "deadline_seconds": deadline.as_secs_f64() }),
            ),
            HoldError::Busy => Self::new(code::AGAIN, "graph_changing", message, json!({})),
            HoldError::JobRunning => Self::new(code::BUSY, "job_running", message, json!({})),
        }
    }
}

impl From<ReactorError> for RpcError {
    fn from(error: ReactorError) -> Self {
        let (code, kind) = match &error {
            ReactorError::MailboxFull { .. } => (code::AGAIN, "reactor_busy"),
            ReactorError::Pin { .. } | ReactorError::Start(_) => (code::INTERNAL, "reactor"),
        };
        Self::new(code, kind, error.to_string(), json!({}))
    }
}
