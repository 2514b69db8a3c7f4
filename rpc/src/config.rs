//! Configuration files: lists of RPC calls by subsystem, as SPDK's `save_config` writes them.
//!
//! Loading goes through the whole file. A call that fails takes only what depends on it with it: after a switch-over that
//! the file knows nothing of, one disk is refused and the others are served. All failures come back in one error.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::rc::Rc;

use resilver_bdev::FileIdentity;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{RpcError, code};
use crate::methods::{self, Caller};
use crate::modules::BdevEntry;
use crate::target::{Graph, Target, files_of};

/// The subsystems, in the order in which they are restored: the first make what the next refer to.
pub(crate) const SUBSYSTEMS: [(&str, &[&str]); 2] = [("bdev", &[]), ("vhost_blk", &["bdev"])];

/// A configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The subsystems in order.
    pub subsystems: Vec<Subsystem>,
}

/// The calls of one subsystem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Subsystem {
    /// Its name.
    pub subsystem: String,
    /// Its calls in order; `null` for none, as SPDK writes it for some.
    pub config: Option<Vec<Item>>,
}

/// One call, or a batch of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Item {
    /// A call.
    Call(ConfigCall),
    /// Calls that SPDK's newer clients send at once.
    Batch(Vec<ConfigCall>),
}

/// A call as it stands in a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfigCall {
    /// The method.
    pub method: String,
    /// Its parameters.
    #[serde(default)]
    pub params: Value,
}

/// Bytes of the largest file that is read. A disk takes some hundreds.
const SIZE_MAX: u64 = 64 << 20;

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no configuration.
    pub fn read(path: &Path) -> Result<Self, RpcError> {
        let mut text = Vec::new();
        let file = File::open(path).and_then(|file| file.take(SIZE_MAX + 1).read_to_end(&mut text));
        if file.map_err(|error| RpcError::file("reading", path, &error))? as u64 > SIZE_MAX {
            return Err(not_a_config(&format!("it has more than {SIZE_MAX} bytes")));
        }
        serde_json::from_slice(&text).map_err(|error| not_a_config(&error.to_string()))
    }

    /// Calls it consists of, in order.
    fn calls(&self) -> impl Iterator<Item = &ConfigCall> {
        let items = self.subsystems.iter().flat_map(|it| it.config.iter().flatten());
        items.flat_map(|item| match item {
            Item::Call(call) => std::slice::from_ref(call),
            Item::Batch(calls) => calls.as_slice(),
        })
    }
}

/// The error of something that should have been a configuration.
pub(crate) fn not_a_config(reason: &str) -> RpcError {
    let message = format!(
        "this is not a configuration: {reason}; one looks like \
         {{\"subsystems\":[{{\"subsystem\":\"bdev\",\"config\":[{{\"method\":…,\"params\":…}}]}}]}}"
    );
    RpcError::new(code::INVALID_PARAMS, "invalid_config", message, json!({}))
}

/// Carries out a configuration; says how many calls it made.
///
/// # Errors
/// Some calls failed, each told in `data.failures`; the others were carried out.
pub async fn load(target: &Rc<Target>, config: &Config) -> Result<usize, RpcError> {
    let (mut count, mut failures) = (0, Vec::new());
    for call in config.calls() {
        count += 1;
        // A file that loads files could load itself.
        let nested = call.method == "load_config";
        let params = call.params.clone();
        let result = if nested {
            Err(RpcError::parameter("method", "load_config", "any method but this within a file"))
        } else {
            methods::call(Caller::local(Rc::clone(target)), &call.method, params).await
        };
        if let Err(error) = result {
            tracing::error!(method = call.method, params = %call.params, %error, "configuration");
            failures.push(json!({ "method": call.method, "params": call.params, "error": error }));
        }
    }
    let Some(first) = failures.first() else { return Ok(count) };
    let message = format!(
        "{} of {count} calls of the configuration failed, the others were carried out; the first: {}: {}",
        failures.len(),
        first["method"].as_str().unwrap_or_default(),
        first["error"]["message"].as_str().unwrap_or_default(),
    );
    Err(RpcError::new(code::INTERNAL, "config_failed", message, json!({ "failures": failures })))
}

impl Target {
    /// The calls that would make one subsystem again; none for an unknown one.
    pub(crate) fn subsystem_config(&self, name: &str) -> Option<Vec<Value>> {
        let graph = self.graph();
        match name {
            "bdev" => {
                let mut entries: Vec<_> = graph.bdevs.values().collect();
                entries.sort_by_key(|entry| entry.order);
                let kept = entries.into_iter().filter(|entry| self.is_wanted(&graph, entry));
                Some(kept.map(|entry| json!(entry.made_by)).collect())
            }
            "vhost_blk" => {
                let controllers = graph.controllers.values();
                Some(controllers.map(|controller| graph.controller_call(controller)).collect())
            }
            _ => None,
        }
    }

    /// Whether a bdev belongs into a configuration: one that was superseded would be refused when it is loaded, and nobody
    /// misses it unless something is stacked on it.
    fn is_wanted(&self, graph: &Graph, entry: &BdevEntry) -> bool {
        let superseded = |file: &FileIdentity| self.state.check(file).is_err();
        let old = files_of(entry.bdev.as_ref()).iter().any(superseded);
        !old || !graph.uses_of(entry.bdev.name()).is_empty()
    }

    /// The calls that would make everything again.
    pub(crate) fn config(&self) -> Value {
        let subsystem = |(name, _): &(&str, &[&str])| json!({ "subsystem": name, "config": self.subsystem_config(name) });
        json!({ "subsystems": SUBSYSTEMS.iter().map(subsystem).collect::<Vec<_>>() })
    }
}
