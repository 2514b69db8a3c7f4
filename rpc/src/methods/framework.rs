//! The target itself: its reactors, its methods, its version.

use resilver_reactor::{Idle, ReactorHandle};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Caller, METHODS, Rpc};
use crate::error::RpcError;
use crate::reactors::mask_of;

/// Lists reactors with what they have done. A tick is a nanosecond.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct FrameworkGetReactors {}

impl Rpc for FrameworkGetReactors {
    const NAME: &'static str = "framework_get_reactors";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "SPDK's object: tick_rate, pid, reactors with lcore, busy, idle, in_interrupt, lw_threads (the disks)";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let graph = caller.target.graph();
        let reactor = |reactor: &ReactorHandle| {
            let stats = reactor.stats();
            let here = graph.disks.iter().filter(|(_, it)| it.reactor.core() == reactor.core());
            let disks: Vec<Value> = here
                .map(|(id, it)| json!({ "id": id.0, "name": it.bdev.name(), "cpumask": mask_of(reactor.core()) }))
                .collect();
            json!({
                "lcore": reactor.core(),
                "busy": stats.busy_ns.get(),
                "idle": stats.idle_ns.get(),
                "in_interrupt": caller.target.reactors.idle() == Idle::Adaptive,
                "turns": stats.turns.get(),
                "sleeps": stats.sleeps.get(),
                "lw_threads": disks,
            })
        };
        let reactors: Vec<Value> = caller.target.reactors.handles().map(reactor).collect();
        Ok(Answer::new(json!({
            "tick_rate": 1_000_000_000_u64,
            "pid": std::process::id(),
            "reactors": reactors,
        })))
    }
}

/// Does nothing: the target is initialised when it takes calls. For SPDK's clients.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct FrameworkStartInit {}

impl Rpc for FrameworkStartInit {
    const NAME: &'static str = "framework_start_init";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "true";

    async fn call(self, _caller: Caller) -> Result<Answer, RpcError> {
        Ok(Answer::done())
    }
}

/// Does nothing: the target is initialised when it takes calls. For SPDK's clients.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct FrameworkWaitInit {}

impl Rpc for FrameworkWaitInit {
    const NAME: &'static str = "framework_wait_init";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "true";

    async fn call(self, _caller: Caller) -> Result<Answer, RpcError> {
        Ok(Answer::done())
    }
}

/// Lists the methods that can be called, with schemas if asked.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct RpcGetMethods {
    /// Only those that can be called now: all of them.
    #[serde(default, rename = "current")]
    _current: bool,
    /// With the names that methods had before: there are none.
    #[serde(default, rename = "include_aliases")]
    _include_aliases: bool,
    /// With documentation, the JSON schema of the parameters and an example each.
    #[serde(default)]
    schema: bool,
}

impl Rpc for RpcGetMethods {
    const NAME: &'static str = "rpc_get_methods";
    const EXAMPLE: &'static str = r#"{"schema":true}"#;
    const RESULT: &'static str = "an array of names; with schema, of objects: name, description, params (a JSON schema), example, result";

    async fn call(self, _caller: Caller) -> Result<Answer, RpcError> {
        if !self.schema {
            let names = METHODS.iter().map(|method| Value::from(method.name));
            return Ok(Answer::new(names.collect::<Vec<_>>()));
        }
        let full = METHODS.iter().map(|method| {
            json!({
                "name": method.name,
                "description": method.doc(),
                "params": method.schema(),
                "example": serde_json::from_str::<Value>(method.example).unwrap_or_default(),
                "result": method.result,
            })
        });
        Ok(Answer::new(full.collect::<Vec<_>>()))
    }
}

/// Names the target and its version, in the fields that SPDK's clients look for.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct SpdkGetVersion {}

impl Rpc for SpdkGetVersion {
    const NAME: &'static str = "spdk_get_version";
    const EXAMPLE: &'static str = "{}";
    const RESULT: &'static str = "an object: version, fields with major, minor, patch, suffix";

    async fn call(self, _caller: Caller) -> Result<Answer, RpcError> {
        let number = |text: &str| text.parse::<u32>().unwrap_or(0);
        Ok(Answer::new(json!({
            "version": concat!("Resilver ", env!("CARGO_PKG_VERSION")),
            "fields": {
                "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
                "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
                "patch": number(env!("CARGO_PKG_VERSION_PATCH")),
                "suffix": "",
            },
        })))
    }
}
