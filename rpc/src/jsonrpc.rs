//! JSON-RPC 2.0 as SPDK frames it on a stream: JSON values one after another, with or without white space between them.
//!
//! [`Splitter`] finds where one value ends and the next begins. It keeps its place between reads, so a value that comes in
//! many pieces is looked at once, and it refuses what could only waste memory: a value that does not begin with a brace or
//! bracket, one larger than [`VALUE_MAX`], one nested deeper than [`DEPTH_MAX`]. Whether what it cut out is JSON at all is
//! for serde_json to say. Deserialising the stream directly was rejected: it scans an incomplete value anew on every read.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{RpcError, code};

/// Bytes of the largest request or batch.
pub const VALUE_MAX: usize = 16 << 20;
/// The deepest nesting: what serde_json accepts.
pub const DEPTH_MAX: usize = 127;

/// Why a stream cannot be read on: there is no telling where the next value would begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something else than an object or array.
    #[error("a request begins with '{{' or '[', not with byte {0:#04x}")]
    NotAValue(u8),
    /// Too long.
    #[error("a request is at most {VALUE_MAX} bytes long")]
    TooLarge,
    /// Too deep.
    #[error("a request is nested at most {DEPTH_MAX} levels deep")]
    TooDeep,
}

impl From<FrameError> for RpcError {
    fn from(error: FrameError) -> Self {
        let message = format!("Parse error: {error}");
        Self::new(code::PARSE, "framing", message, Value::Null)
    }
}

/// Where the scanner is within a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Between values.
    Between,
    /// Within a value, outside strings.
    Inside,
    /// In a string.
    String,
    /// In a string, behind a backslash.
    Escape,
}

/// Cuts a stream of bytes into top-level JSON values.
#[derive(Debug)]
pub struct Splitter {
    buffer: Vec<u8>,
    /// Bytes of the buffer that have been looked at.
    scanned: usize,
    /// Where the value under way begins.
    start: usize,
    depth: usize,
    place: Place,
}

impl Default for Splitter {
    fn default() -> Self {
        Self { buffer: Vec::new(), scanned: 0, start: 0, depth: 0, place: Place::Between }
    }
}

impl Splitter {
    /// Adds what was read.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole value; none if it has not all come yet.
    ///
    /// # Errors
    /// The stream cannot be read on.
    pub fn next_value(&mut self) -> Result<Option<&[u8]>, FrameError> {
        while let Some(&byte) = self.buffer.get(self.scanned) {
            if self.place == Place::Between {
                self.start = self.scanned;
            }
            self.scanned += 1;
            if self.step(byte)? {
                let value = self.start..self.scanned;
                self.start = self.scanned;
                return Ok(self.buffer.get(value));
            }
            if self.scanned - self.start > VALUE_MAX {
                return Err(FrameError::TooLarge);
            }
        }
        if self.place == Place::Between {
            self.start = self.scanned;
        }
        Ok(None)
    }

    /// Whether a value has begun and not ended.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.place != Place::Between
    }

    /// Looks at one byte; true if it ends a value.
    fn step(&mut self, byte: u8) -> Result<bool, FrameError> {
        self.place = match (self.place, byte) {
            (Place::Between, b' ' | b'\t' | b'\r' | b'\n') => Place::Between,
            (Place::Between | Place::Inside, b'{' | b'[') => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    return Err(FrameError::TooDeep);
                }
                Place::Inside
            }
            (Place::Between, other) => return Err(FrameError::NotAValue(other)),
            (Place::Inside, b'}' | b']') => {
                self.depth -= 1;
                if self.depth == 0 {
                    self.place = Place::Between;
                    return Ok(true);
                }
                Place::Inside
            }
            (Place::Inside, b'"') | (Place::Escape, _) => Place::String,
            (Place::Inside, _) | (Place::String, b'"') => Place::Inside,
            (Place::String, b'\\') => Place::Escape,
            (Place::String, _) => Place::String,
        };
        Ok(false)
    }
}

/// A request, or a notification if it has no id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// "2.0".
    pub jsonrpc: String,
    /// What to do.
    pub method: String,
    /// Parameters by name.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub params: Value,
    /// How the caller finds the response. Absent: no response is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub id: Option<Value>,
}

/// An id that is there, `null` included: `null` is an id like any other, a missing one is none.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Request {
    /// A request that wants a response.
    #[must_use]
    pub fn new(id: u64, method: &str, params: Value) -> Self {
        Self { jsonrpc: "2.0".into(), method: method.into(), params, id: Some(id.into()) }
    }

    /// The request in a value.
    ///
    /// # Errors
    /// It is not one; with the id, as far as it could be told.
    pub fn from_value(value: Value) -> Result<Self, (Value, RpcError)> {
        let id = value.get("id").cloned().unwrap_or(Value::Null);
        let refuse = |why: String| {
            let message = format!("Invalid Request: {why}");
            (
                id.clone(),
                RpcError::new(code::INVALID_REQUEST, "invalid_request", message, Value::Null),
            )
        };
        let request: Self =
            serde_json::from_value(value).map_err(|error| refuse(error.to_string()))?;
        if request.jsonrpc != "2.0" {
            return Err(refuse(format!("jsonrpc is '{}', not '2.0'", request.jsonrpc)));
        }
        match request.id {
            None | Some(Value::Null | Value::Number(_) | Value::String(_)) => Ok(request),
            Some(_) => Err(refuse("an id is a number, a string or null".into())),
        }
    }
}

/// A response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// "2.0".
    pub jsonrpc: String,
    /// The request's.
    pub id: Value,
    /// What came of it, if it went well.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub result: Option<Value>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
    /// Done, but there is something that the operator should know. Not part of JSON-RPC, which lets a response carry more
    /// members; clients that do not know it are not disturbed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

impl Response {
    /// The response to a request that failed.
    #[must_use]
    pub fn error(id: Value, error: RpcError) -> Self {
        Self { jsonrpc: "2.0".into(), id, result: None, error: Some(error), warning: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>, FrameError> {
        let mut splitter = Splitter::default();
        let mut values = Vec::new();
        for piece in pieces {
            splitter.feed(piece);
            while let Some(value) = splitter.next_value()? {
                values.push(value.to_vec());
            }
        }
        Ok(values)
    }

    #[test]
    fn values_need_nothing_between_them_and_braces_in_strings_do_not_count() {
        let text = br#"{"a":"}]\""}[1,{"b":"\\"}] {}"#;
        let values = split(&[text]).unwrap();
        let expected: [&[u8]; 3] = [br#"{"a":"}]\""}"#, br#"[1,{"b":"\\"}]"#, b"{}"];
        assert_eq!(values, expected);
    }

    #[test]
    fn what_cannot_be_a_request_is_refused_at_once() {
        assert_eq!(split(&[b"  x"]), Err(FrameError::NotAValue(b'x')));
        assert_eq!(split(&[&[b'['; DEPTH_MAX + 1]]), Err(FrameError::TooDeep));
        let mut large = vec![b' '; VALUE_MAX + 2];
        large[0] = b'[';
        assert_eq!(split(&[&large]), Err(FrameError::TooLarge));
    }

    #[test]
    fn a_missing_id_is_a_notification_and_a_null_id_is_not() {
        let parse = |text| Request::from_value(serde_json::from_str(text).unwrap());
        assert_eq!(parse(r#"{"jsonrpc":"2.0","method":"m"}"#).unwrap().id, None);
        let null = parse(r#"{"jsonrpc":"2.0","method":"m","id":null}"#).unwrap();
        assert_eq!(null.id, Some(Value::Null));
        let (id, error) = parse(r#"{"jsonrpc":"1.0","method":"m","id":7}"#).unwrap_err();
        assert_eq!((id, error.code), (7.into(), code::INVALID_REQUEST));
    }

    /// JSON values of some depth, whose strings are full of what a careless scanner trips over.
    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            r#"[a\\"{}\[\]\n\u{e9}]{0,8}"#.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(r#"[a"\\}]{0,4}"#, inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_stream_splits_into_the_values_it_was_made_of(
            values in prop::collection::vec(json().prop_filter("a container", |value| value.is_array() || value.is_object()), 0..6),
            pretty in any::<bool>(),
            gap in "[ \r\n\t]{0,3}",
            piece in 1usize..40,
        ) {
            let mut stream = Vec::new();
            for value in &values {
                let text = if pretty { serde_json::to_vec_pretty(value) } else { serde_json::to_vec(value) };
                stream.extend(text.unwrap());
                stream.extend(gap.as_bytes());
            }
            let pieces: Vec<&[u8]> = stream.chunks(piece).collect();
            let parsed: Vec<Value> = split(&pieces)
                .unwrap()
                .iter()
                .map(|text| serde_json::from_slice(text).unwrap())
                .collect();
            prop_assert_eq!(parsed, values);
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let _ = split(&pieces);
        }
    }
}
