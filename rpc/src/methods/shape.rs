//! Whether a value has the shape that a parameter's schema asks for, and that shape in words.
//!
//! The refusal of a wrong type is worded here, from the schema, so that it is the same for every parameter of every method
//! and never a type of the language that this is written in. Only what the methods use of JSON Schema is known; what is
//! not known fits, and serde has the last word.

use serde_json::Value;

/// Follows a reference of a schema into its definitions.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema.get("$ref").and_then(Value::as_str);
    let found = target.and_then(|it| root.pointer(it.trim_start_matches('#')));
    found.unwrap_or(schema)
}

/// The schemas of which one is enough.
fn alternatives(schema: &Value) -> Option<&Vec<Value>> {
    schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array)
}

/// The types that a schema names.
fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
        Some(_) | None => vec![],
    }
}

/// The least and the greatest of a schema's whole numbers.
fn bounds(schema: &Value) -> (i128, i128) {
    let (least, greatest): (i128, i128) = match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => (0, u8::MAX.into()),
        Some("uint16") => (0, u16::MAX.into()),
        Some("uint32") => (0, u32::MAX.into()),
        Some("int32") => (i32::MIN.into(), i32::MAX.into()),
        Some("int64") => (i64::MIN.into(), i64::MAX.into()),
        Some(_) | None => (0, u64::MAX.into()),
    };
    let bound = |name: &str| schema.get(name).and_then(Value::as_i64).map(i128::from);
    (bound("minimum").unwrap_or(least), bound("maximum").unwrap_or(greatest))
}

fn whole(value: &Value) -> Option<i128> {
    value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from))
}

/// Whether a value has the shape of a schema; `root` has the definitions.
pub(super) fn fits(root: &Value, schema: &Value, value: &Value) -> bool {
    let schema = resolve(root, schema);
    if let Some(any) = alternatives(schema) {
        return any.iter().any(|one| fits(root, one, value));
    }
    if let Some(constant) = schema.get("const") {
        return constant == value;
    }
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return words.contains(value);
    }
    let types = types(schema);
    let is = |kind: &&str| match *kind {
        "integer" => whole(value).is_some_and(|number| {
            let (least, greatest) = bounds(schema);
            (least..=greatest).contains(&number)
        }),
        "array" => value.as_array().is_some_and(|items| {
            schema.get("items").is_none_or(|item| items.iter().all(|it| fits(root, item, it)))
        }),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "number" => value.is_number(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        _ => true,
    };
    types.is_empty() || types.iter().any(is)
}

/// The shape of a schema in words: what would have been accepted.
pub(super) fn words(root: &Value, schema: &Value) -> String {
    let schema = resolve(root, schema);
    let quoted = |value: &Value| format!("'{}'", value.as_str().unwrap_or_default());
    if let Some(constant) = schema.get("const") {
        return quoted(constant);
    }
    let several: Vec<String> = match (alternatives(schema), schema.get("enum")) {
        (Some(any), _) => {
            any.iter().filter(|one| types(one) != ["null"]).map(|one| words(root, one)).collect()
        }
        (None, Some(Value::Array(all))) => all.iter().map(quoted).collect(),
        (None, _) => types(schema)
            .into_iter()
            .filter(|kind| *kind != "null")
            .map(|kind| word(root, schema, kind))
            .collect(),
    };
    several.join(" or ")
}

fn word(root: &Value, schema: &Value, kind: &str) -> String {
    match kind {
        "integer" => {
            let (least, greatest) = bounds(schema);
            format!("a whole number from {least} to {greatest}")
        }
        "boolean" => "true or false".to_owned(),
        "array" => match schema.get("items") {
            Some(item) => format!("an array, each of {}", words(root, item)),
            None => "an array".to_owned(),
        },
        "object" => "an object".to_owned(),
        "number" => "a number".to_owned(),
        _ => "a string".to_owned(),
    }
}
