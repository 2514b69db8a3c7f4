//! The methods: one table, from which come the server, `rpc_get_methods`, the schemas, the reference page, the
//! completions of the command line, and the checks that every method is documented and its example works.
//!
//! A method is a struct: its fields are the parameters, its documentation is the method's. A new one is such a struct with
//! an `Rpc` beside it in the file of its family, and a row in [`METHODS`].

mod bdev;
mod bdev_file;
mod bdev_stacked;
mod bdev_stats;
mod bdev_virtio;
mod bitmap;
mod config;
mod framework;
mod job;
mod mirror;
mod shape;
mod state;
mod verify;
mod vhost;

use std::pin::Pin;
use std::rc::Rc;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::{RpcError, code};
use crate::subscriptions::Notifications;
use crate::target::Target;

/// What a method is called with beside its parameters.
#[derive(Clone)]
pub struct Caller {
    /// What is being served.
    pub(crate) target: Rc<Target>,
    /// Takes notifications for the caller's connection; closed when it goes. None for calls that come from nowhere.
    pub(crate) notifications: Option<Notifications>,
}

impl Caller {
    /// A caller without a connection: a configuration file.
    #[must_use]
    pub fn local(target: Rc<Target>) -> Self {
        Self { target, notifications: None }
    }
}

/// What a method answers when it succeeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The result.
    pub result: Value,
    /// What the operator should know although it succeeded.
    pub warning: Option<String>,
}

impl Answer {
    /// A result and nothing else.
    pub(crate) fn new(result: impl Into<Value>) -> Self {
        Self { result: result.into(), warning: None }
    }

    /// The result of what has no other.
    pub(crate) fn done() -> Self {
        Self::new(true)
    }
}

/// A method, typed.
pub(crate) trait Rpc: DeserializeOwned + JsonSchema + 'static {
    /// Its name.
    const NAME: &'static str;
    /// Parameters that work, as JSON.
    const EXAMPLE: &'static str;
    /// What comes back, for the reference page.
    const RESULT: &'static str;

    /// Does it.
    fn call(self, caller: Caller) -> impl Future<Output = Result<Answer, RpcError>>;
}

type Called = Pin<Box<dyn Future<Output = Result<Answer, RpcError>>>>;

/// A row of the table.
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// Parameters that work, as JSON.
    pub example: &'static str,
    /// What comes back.
    pub result: &'static str,
    /// Made when it is first asked for: that takes longer than most methods, on a core that a reactor may wait for.
    schema: LazyLock<Value>,
    parse: fn(&Value, Value) -> Result<(), RpcError>,
    call: fn(&'static Value, Caller, Value) -> Called,
}

/// All methods, by family.
pub static METHODS: [Method; 58] = [
    Method::of::<bdev::BdevNullCreate>(),
    Method::of::<bdev::BdevNullDelete>(),
    Method::of::<bdev::BdevNullResize>(),
    Method::of::<bdev::BdevMallocCreate>(),
    Method::of::<bdev::BdevMallocDelete>(),
    Method::of::<bdev_file::BdevUringCreate>(),
    Method::of::<bdev_file::BdevUringDelete>(),
    Method::of::<bdev_file::BdevUringResize>(),
    Method::of::<bdev_virtio::BdevVirtioCreate>(),
    Method::of::<bdev_virtio::BdevVirtioDelete>(),
    Method::of::<bdev_stacked::BdevPassthruCreate>(),
    Method::of::<bdev_stacked::BdevPassthruDelete>(),
    Method::of::<bdev_stacked::BdevDelayCreate>(),
    Method::of::<bdev_stacked::BdevDelayDelete>(),
    Method::of::<bdev_stacked::BdevErrorCreate>(),
    Method::of::<bdev_stacked::BdevErrorDelete>(),
    Method::of::<bdev_stacked::BdevErrorInjectError>(),
    Method::of::<bdev_stats::BdevGetBdevs>(),
    Method::of::<bdev_stats::BdevGetIostat>(),
    Method::of::<vhost::VhostCreateBlkController>(),
    Method::of::<vhost::VhostDeleteController>(),
    Method::of::<vhost::VhostGetControllers>(),
    Method::of::<mirror::BdevMirrorStart>(),
    Method::of::<mirror::BdevMirrorFinish>(),
    Method::of::<verify::BdevVerifyStart>(),
    Method::of::<bitmap::BitmapAdd>(),
    Method::of::<bitmap::BitmapRemove>(),
    Method::of::<bitmap::BitmapClear>(),
    Method::of::<bitmap::BitmapEnable>(),
    Method::of::<bitmap::BitmapDisable>(),
    Method::of::<bitmap::BitmapMerge>(),
    Method::of::<bitmap::BitmapGet>(),
    Method::of::<bitmap::Transaction>(),
    Method::of::<job::JobGetList>(),
    Method::of::<job::JobGetHistory>(),
    Method::of::<job::JobComplete>(),
    Method::of::<job::JobFinalize>(),
    Method::of::<job::JobPause>(),
    Method::of::<job::JobResume>(),
    Method::of::<job::JobCancel>(),
    Method::of::<job::JobDismiss>(),
    Method::of::<job::JobHold>(),
    Method::of::<job::JobRelease>(),
    Method::of::<job::JobSetSpeed>(),
    Method::of::<job::JobChange>(),
    Method::of::<job::JobGetEvents>(),
    Method::of::<job::JobSubscribe>(),
    Method::of::<state::StateGetRecords>(),
    Method::of::<state::StateForget>(),
    Method::of::<config::SaveConfig>(),
    Method::of::<config::LoadConfig>(),
    Method::of::<config::FrameworkGetSubsystems>(),
    Method::of::<config::FrameworkGetConfig>(),
    Method::of::<framework::FrameworkGetReactors>(),
    Method::of::<framework::FrameworkStartInit>(),
    Method::of::<framework::FrameworkWaitInit>(),
    Method::of::<framework::RpcGetMethods>(),
    Method::of::<framework::SpdkGetVersion>(),
];

impl Method {
    const fn of<M: Rpc>() -> Self {
        Self {
            name: M::NAME,
            example: M::EXAMPLE,
            result: M::RESULT,
            schema: LazyLock::new(|| schemars::schema_for!(M).to_value()),
            parse: |schema, params| parse::<M>(schema, params).map(|_| ()),
            call: |schema, caller, params| {
                Box::pin(async move { parse::<M>(schema, params)?.call(caller).await })
            },
        }
    }

    /// The method of this name.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        METHODS.iter().find(|method| method.name == name)
    }

    /// The schema of its parameters.
    #[must_use]
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// What it does: the documentation of its struct.
    #[must_use]
    pub fn doc(&self) -> String {
        self.schema().get("description").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// Refuses parameters that the method would not take.
    ///
    /// # Errors
    /// As the method itself would answer.
    pub fn check(&self, params: Value) -> Result<(), RpcError> {
        (self.parse)(&self.schema, params)
    }
}

/// Calls a method by name.
///
/// # Errors
/// The method's, or that there is none.
pub async fn call(caller: Caller, name: &str, params: Value) -> Result<Answer, RpcError> {
    let Some(method) = Method::find(name) else {
        return Err(RpcError::new(
            code::METHOD_NOT_FOUND,
            "method_not_found",
            format!("Method not found: '{name}'; rpc_get_methods lists what there is"),
            json!({ "method": name }),
        ));
    };
    (method.call)(&method.schema, caller, params).await
}

/// Reads parameters. What is missing, unknown or of a wrong type is told by comparison with the schema, which names all
/// that there is; the rest by serde.
fn parse<M: Rpc>(schema: &Value, params: Value) -> Result<M, RpcError> {
    let params = match params {
        Value::Null => Map::new(),
        Value::Object(params) => params,
        other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
            return Err(RpcError::parameter("params", other, "an object: parameters go by name"));
        }
    };
    let none = Map::new();
    let known = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let accepted: Vec<&str> = known.keys().map(String::as_str).collect();
    for (name, value) in &params {
        let Some(shape) = known.get(name) else {
            let expected = format!("{} does not know it; it takes {}", M::NAME, list(&accepted));
            return Err(RpcError::parameter(name, value.clone(), expected));
        };
        if !shape::fits(schema, shape, value) {
            let expected = format!("expected {}", shape::words(schema, shape));
            return Err(RpcError::parameter(name, value.clone(), expected));
        }
    }
    let required = schema.get("required").and_then(Value::as_array);
    let mut required = required.into_iter().flatten().filter_map(Value::as_str);
    if let Some(name) = required.find(|name| !params.contains_key(*name)) {
        let expected = format!("{} needs it; it takes {}", M::NAME, list(&accepted));
        return Err(RpcError::missing(name, expected));
    }
    let params = Value::Object(params);
    serde_path_to_error::deserialize(&params).map_err(|error| {
        // The parameter, and not the place in it.
        let path = error.path().to_string();
        let name = path.split(['.', '[']).next().unwrap_or_default();
        let value = params.get(name).cloned().unwrap_or(Value::Null);
        RpcError::parameter(name, value, error.inner().to_string())
    })
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no parameters".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_documented_and_its_example_is_what_it_takes() {
        for method in &METHODS {
            assert!(method.doc().len() > 20, "{} has no documentation", method.name);
            assert!(!method.result.is_empty(), "{} does not say what comes back", method.name);
            let example: Value = serde_json::from_str(method.example).expect(method.name);
            method.check(example).unwrap_or_else(|error| panic!("{}: {error}", method.name));
            let schema = method.schema();
            let parameters = schema.get("properties").and_then(Value::as_object);
            for (name, parameter) in parameters.into_iter().flatten() {
                let documented = parameter.get("description").is_some();
                assert!(documented, "parameter {name} of {} has no documentation", method.name);
            }
        }
    }

    #[test]
    fn a_value_of_a_wrong_type_is_refused_alike_everywhere() {
        let wrong = json!([[{ "no": "such" }]]);
        for method in &METHODS {
            let example: Value = serde_json::from_str(method.example).unwrap();
            let schema = method.schema();
            let parameters = schema.get("properties").and_then(Value::as_object);
            for (name, shape) in parameters.into_iter().flatten() {
                if shape::words(schema, shape).is_empty() {
                    continue; // It takes anything, and says itself what is wrong with it.
                }
                let mut params = example.clone();
                params[name] = wrong.clone();
                let error = method.check(params).unwrap_err();
                let data = error.data.unwrap();
                let told = (&data["parameter"], &data["value"]);
                assert_eq!(told, (&json!(name), &wrong), "{}", method.name);
                assert!(error.message.contains("]: expected "), "{}", error.message);
            }
        }
    }

    #[test]
    fn what_would_be_accepted_is_said_in_words() {
        let told = |method: &str, more: Value| {
            let method = Method::find(method).unwrap();
            let mut params: Value = serde_json::from_str(method.example).unwrap();
            params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            method.check(params).unwrap_err().message
        };
        for (more, message) in [
            (
                json!({ "speed": -1 }),
                "parameter 'speed' is -1: expected a whole number from 0 to 18446744073709551615",
            ),
            (
                json!({ "granularity": 1u64 << 32 }),
                "parameter 'granularity' is 4294967296: expected a whole number from 0 to 4294967295",
            ),
            (json!({ "unmap": "no" }), "parameter 'unmap' is \"no\": expected true or false"),
            (json!({ "source": 7 }), "parameter 'source' is 7: expected a string"),
            (
                json!({ "copy_mode": "x" }),
                "parameter 'copy_mode' is \"x\": expected 'background' or 'write-blocking'",
            ),
            (
                json!({ "on_target_error": "auto" }),
                "parameter 'on_target_error' is \"auto\": expected 'report' or 'ignore' or 'stop' or 'enospc'",
            ),
        ] {
            assert_eq!(told("bdev_mirror_start", more), message);
        }
        // What may be left out may be null.
        let params =
            json!({ "source": "a", "target": "b", "granularity": null, "bitmap_mode": null });
        Method::find("bdev_mirror_start").unwrap().check(params).unwrap();
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), METHODS.len());
    }

    #[test]
    fn a_bad_parameter_is_named_with_its_value_and_what_would_do() {
        let check = |params| {
            let error = Method::find("bdev_null_create").unwrap().check(params).unwrap_err();
            assert_eq!(error.code, code::INVALID_PARAMS);
            let data = error.data.unwrap();
            (data["parameter"].clone(), data["value"].clone(), error.message)
        };
        let (name, value, message) =
            check(json!({ "name": "a", "num_blocks": "x", "block_size": 512 }));
        assert_eq!((name, value), ("num_blocks".into(), "x".into()));
        assert!(message.contains("expected a whole number"), "{message}");
        let (name, value, message) =
            check(json!({ "nam": "a", "num_blocks": 1, "block_size": 512 }));
        assert_eq!((name, value), ("nam".into(), "a".into()));
        assert!(
            message.contains("name, num_blocks") || message.contains("block_size"),
            "{message}"
        );
        let (name, _, message) = check(json!({ "name": "a", "num_blocks": 1 }));
        assert_eq!(name, "block_size");
        assert!(message.contains("needs it"), "{message}");
        assert_eq!(check(json!([1])).0, "params");
    }
}
