//! Which disks were superseded.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::{Answer, Caller, Rpc};
use crate::error::{RpcError, code};
use crate::state::StateError;

impl From<StateError> for RpcError {
    fn from(error: StateError) -> Self {
        Self::new(code::INTERNAL, "state", error.to_string(), json!({}))
    }
}

/// Lists the disks that were superseded in a switch-over and hold old data.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct StateGetRecords {}

impl Rpc for StateGetRecords {
    const NAME: &'static str = "state_get_records";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "an object: durable (whether there is a state directory), records: superseded, by, generation, job_id, time";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let state = &caller.target.state;
        Ok(Answer::new(json!({ "durable": state.is_durable(), "records": state.records() })))
    }
}

/// Forgets that a disk was superseded, so that it can be opened again: when it has been given new content, or when its old
/// content is wanted.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct StateForget {
    /// The disk's file, spelled in any way.
    path: PathBuf,
}

impl Rpc for StateForget {
    const NAME: &'static str = "state_forget";
    const EXAMPLE: &'static str = r#"{"path":"/srv/old/vm1.raw"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        if caller.target.state.forget(&self.path).await? {
            return Ok(Answer::done());
        }
        let path = self.path.display().to_string();
        let message =
            format!("no record says that '{path}' was superseded; state_get_records lists them");
        Err(RpcError::new(code::NOT_FOUND, "not_found", message, json!({ "path": path })))
    }
}
