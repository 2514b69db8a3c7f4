//! Configuration: saved as the calls that make it again.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Caller, Rpc};
use crate::config::{Config, SUBSYSTEMS, load, not_a_config};
use crate::error::RpcError;

/// Refuses a path that means something other than a file: a device would be replaced by one, a pipe read for ever.
fn no_device(path: &Path) -> Result<(), RpcError> {
    let is_other = std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
    if is_other || path.file_name().is_none() {
        let expected = "a regular file, not a directory, a device or a pipe";
        return Err(RpcError::parameter("filename", path.display().to_string(), expected));
    }
    Ok(())
}

/// Writes the configuration as a list of calls by subsystem, in SPDK's shape. After a switch-over controllers are on their
/// new disks, and a disk that was superseded and that nobody uses is left out.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct SaveConfig {
    /// File to write, durably; it is replaced as a whole. Only answered if not given.
    #[serde(default)]
    filename: Option<PathBuf>,
}

impl Rpc for SaveConfig {
    const NAME: &'static str = "save_config";
    const EXAMPLE: &'static str = r#"{"filename":"/etc/resilver/target.json"}"#;
    const RESULT: &'static str = "the configuration: subsystems, each with subsystem and config";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let config = caller.target.config();
        if let Some(path) = self.filename {
            let mut text = serde_json::to_vec_pretty(&config).unwrap_or_default();
            text.push(b'\n');
            let write = move || {
                no_device(&path)?;
                let written = crate::state::replace_file(&path, &text);
                written.map_err(|error| RpcError::file("writing", &path, &error))
            };
            tokio::task::spawn_blocking(write).await.map_err(|_| RpcError::gone())??;
        }
        Ok(Answer::new(config))
    }
}

/// Carries out a configuration. Calls that fail take only what depends on them with them; the error lists them.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct LoadConfig {
    /// File to read.
    #[serde(default)]
    filename: Option<PathBuf>,
    /// The subsystems themselves, as `save_config` answers them.
    #[serde(default)]
    subsystems: Option<Value>,
}

impl Rpc for LoadConfig {
    const NAME: &'static str = "load_config";
    const EXAMPLE: &'static str = r#"{"filename":"/etc/resilver/target.json"}"#;
    const RESULT: &'static str = "the number of calls that were carried out";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let config = match (self.filename, self.subsystems) {
            (Some(path), None) => {
                let read = move || no_device(&path).and_then(|()| Config::read(&path));
                tokio::task::spawn_blocking(read).await.map_err(|_| RpcError::gone())??
            }
            (None, Some(subsystems)) => serde_json::from_value(json!({ "subsystems": subsystems }))
                .map_err(|error| not_a_config(&error.to_string()))?,
            (Some(_), Some(_)) | (None, None) => {
                let expected = "either 'filename' or 'subsystems'";
                return Err(RpcError::parameter("filename", Value::Null, expected));
            }
        };
        Ok(Answer::new(load(&caller.target, &config).await?))
    }
}

/// Lists the subsystems and what they depend on. SPDK's client asks this to save a configuration.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct FrameworkGetSubsystems {}

impl Rpc for FrameworkGetSubsystems {
    const NAME: &'static str = "framework_get_subsystems";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "an array of objects: subsystem, depends_on";

    async fn call(self, _caller: Caller) -> Result<Answer, RpcError> {
        let list =
            SUBSYSTEMS.map(|(name, depends)| json!({ "subsystem": name, "depends_on": depends }));
        Ok(Answer::new(list.to_vec()))
    }
}

/// The calls that would make one subsystem again.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct FrameworkGetConfig {
    /// The subsystem.
    name: String,
    /// Whether calls may be grouped. They never are.
    #[serde(default, rename = "with_batches")]
    _with_batches: bool,
}

impl Rpc for FrameworkGetConfig {
    const NAME: &'static str = "framework_get_config";
    const EXAMPLE: &'static str = r#"{"name":"bdev"}"#;
    const RESULT: &'static str = "an array of objects: method, params";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        match caller.target.subsystem_config(&self.name) {
            Some(calls) => Ok(Answer::new(calls)),
            None => {
                let names = SUBSYSTEMS.map(|(name, _)| name).join(", ");
                Err(RpcError::parameter("name", self.name, format!("one of {names}")))
            }
        }
    }
}
