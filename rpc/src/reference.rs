//! The reference pages, written from the tables: `docs/rpc.md`, `docs/metrics.md`.
//!
//! A test keeps them current; `RESILVER_BLESS=1 cargo test -p resilver-rpc reference` writes them anew.

use std::fmt::Write as _;

use serde_json::Value;

use crate::methods::{METHODS, Method};
use crate::metrics::METRICS;

const RPC_INTRODUCTION: &str = "\
# The RPC methods

Generated from the table of methods (`rpc/src/methods/`); do not edit.

JSON-RPC 2.0 on a Unix socket, framed as SPDK does it: JSON values one after another, with or without white space between
them; batches too. Requests of one connection are carried out one after another. Where SPDK has the method, ours has its
name, parameters and result, and SPDK's client (`pip install spdk`) drives it. Sizes and offsets are bytes unless a name or
a description says otherwise.

**Errors** have a `code`, a `message` for the operator, and `data` with the facts: `data.kind` names the case. Codes from
-32700 to -32600 are JSON-RPC's; all others are a negative errno:

| code | when |
| --- | --- |
| -32700, -32600 | what came is not JSON, or no request |
| -32601 | no such method |
| -32602 | a parameter is missing, unknown or not acceptable: `data.parameter`, `data.value`, `data.expected` |
| -32603 | something of the target is broken |
| -1 EPERM | the job is not in a state for that |
| -2 ENOENT | no such job or record |
| -11 EAGAIN | something else is changing it; try again |
| -16 EBUSY | it is used by something that excludes this |
| -17 EEXIST | the name is taken |
| -19 ENODEV | no such bdev or controller |
| -95 EOPNOTSUPP | it cannot do that, or not in this version |
| -110 ETIMEDOUT | it did not end in time |
| -116 ESTALE | the disk was superseded and holds old data |

A response may carry a member `warning` beside `result`: it was done, and there is something to know.

**Phases.** Mirrors have a `phase` beside QEMU's `status`, in the words of Cloud Hypervisor's block mirror: running (also while
paused), ready (also in standby), completing, completed, cancelling, failed. They differ there on purpose: a switch-over that is undone goes
back from completing to ready, and a job that was cancelled stays `cancelling` when it is over.
";

const METRICS_INTRODUCTION: &str = "\
# The metrics

Generated from the table of metrics (`rpc/src/metrics.rs`); do not edit.

`resilver serve --metrics ADDR:PORT` serves them at `/metrics` in Prometheus's text format. A mirror's series end when its
job is dismissed.

| metric | type | labels | |
| --- | --- | --- | --- |
";

/// `docs/rpc.md`.
#[must_use]
pub fn rpc_page() -> String {
    let mut page = RPC_INTRODUCTION.to_owned();
    for method in &METHODS {
        // Writing to a string cannot fail.
        let _ = write!(page, "\n## {}\n\n{}\n\n", method.name, method.doc());
        parameters(method, &mut page);
        let _ = write!(page, "Answers {}.\n\n```json\n{}\n```\n", method.result, example(method));
    }
    page
}

/// A call as it goes over the socket.
fn example(method: &Method) -> String {
    let params = serde_json::from_str::<Value>(method.example).unwrap_or_default();
    format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{}","params":{params}}}"#, method.name)
}

fn parameters(method: &Method, page: &mut String) {
    let schema = method.schema();
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return };
    if properties.is_empty() {
        return;
    }
    let required = schema.get("required").and_then(Value::as_array);
    let required: Vec<&str> = required.into_iter().flatten().filter_map(Value::as_str).collect();
    let optional = properties.keys().map(String::as_str).filter(|name| !required.contains(name));
    page.push_str("| parameter | type | |\n| --- | --- | --- |\n");
    for name in required.iter().copied().chain(optional) {
        let Some(parameter) = properties.get(name) else { continue };
        let mark = if required.contains(&name) { "" } else { "?" };
        let doc = parameter["description"].as_str().unwrap_or_default().replace('\n', " ");
        let kind = type_of(parameter, schema.get("$defs"));
        let _ = writeln!(page, "| `{name}`{mark} | {kind} | {doc}{} |", default_of(parameter));
    }
    page.push('\n');
}

/// The default, where it says something.
fn default_of(parameter: &Value) -> String {
    match parameter.get("default") {
        None | Some(Value::Null) => String::new(),
        Some(default) => format!(" Default: `{default}`."),
    }
}

/// A type in a few words.
fn type_of(parameter: &Value, definitions: Option<&Value>) -> String {
    if let Some(name) = parameter["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        let definition = definitions.and_then(|it| it.get(name));
        return definition.map_or_else(|| name.to_owned(), words);
    }
    let kinds = match &parameter["type"] {
        Value::String(kind) => vec![kind.as_str()],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => vec!["any"],
    };
    kinds.into_iter().filter(|kind| *kind != "null").collect::<Vec<_>>().join(" or ")
}

/// The words of an enumeration.
fn words(definition: &Value) -> String {
    let variants = definition["oneOf"].as_array().into_iter().flatten();
    let words = variants.filter_map(|it| it["const"].as_str()).map(|word| format!("`{word}`"));
    words.collect::<Vec<_>>().join(", ")
}

/// `docs/metrics.md`.
#[must_use]
pub fn metrics_page() -> String {
    let mut page = METRICS_INTRODUCTION.to_owned();
    for row in METRICS {
        let labels = row.labels.join(", ");
        let _ =
            writeln!(page, "| `{}` | {} | {labels} | {} |", row.name, row.kind.name(), row.help);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn is_current(name: &str, page: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
        if std::env::var_os("RESILVER_BLESS").is_some() {
            std::fs::write(&path, page).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == page,
            "docs/{name} is not current; RESILVER_BLESS=1 cargo test -p resilver-rpc reference writes it anew"
        );
    }

    #[test]
    fn the_reference_of_the_methods_is_current() {
        is_current("rpc.md", &rpc_page());
    }

    #[test]
    fn the_reference_of_the_metrics_is_current() {
        is_current("metrics.md", &metrics_page());
    }
}
