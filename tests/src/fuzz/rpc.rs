//! A client that writes what it likes to the RPC socket: framing, requests, parameters of every method.
//!
//! Properties: how the bytes are cut into reads makes no difference; what is refused has an error that says so in JSON; a request
//! says the same when it is written again; parameters that a method takes once it takes again.

use resilver_rpc::jsonrpc::{FrameError, Request, Response, Splitter, VALUE_MAX};
use resilver_rpc::methods::Method;
use serde_json::Value;

use super::Input;

/// The values of a stream that is read in pieces, and how it ended.
fn split<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Vec<u8>>, Option<FrameError>) {
    let (mut splitter, mut values) = (Splitter::default(), Vec::new());
    for piece in pieces {
        splitter.feed(piece);
        loop {
            match splitter.next_value() {
                Ok(Some(value)) => values.push(value.to_vec()),
                Ok(None) => break,
                Err(error) => return (values, Some(error)),
            }
        }
    }
    (values, None)
}

fn take(value: Value) {
    let requests = match value {
        Value::Array(batch) => batch,
        one => vec![one],
    };
    for value in requests {
        let request = match Request::from_value(value) {
            Ok(request) => request,
            Err((id, error)) => {
                let response = serde_json::to_value(Response::error(id, error));
                assert!(response.is_ok_and(|response| response.get("error").is_some()));
                continue;
            }
        };
        let again = serde_json::to_value(&request).expect("a request is JSON");
        let again = Request::from_value(again).expect("what was a request is one");
        assert_eq!(format!("{request:?}"), format!("{again:?}"));
        let Some(method) = Method::find(&request.method) else { continue };
        let taken = method.check(request.params.clone());
        if let Err(error) = &taken {
            assert!(!error.message.is_empty() && serde_json::to_value(error).is_ok());
        }
        assert_eq!(taken.is_ok(), method.check(again.params).is_ok());
    }
}

/// Runs one stream. The first byte says how long the pieces are.
pub fn rpc(data: &[u8]) {
    let mut input = Input::new(data);
    let piece = usize::from(input.u8()) + 1;
    let stream = input.bytes(VALUE_MAX);
    let (values, error) = split([stream].into_iter());
    assert_eq!(split(stream.chunks(piece)), (values.clone(), error), "pieces of {piece}");
    for value in values {
        if let Ok(value) = serde_json::from_slice(&value) {
            take(value);
        }
    }
}
