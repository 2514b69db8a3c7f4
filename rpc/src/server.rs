//! The RPC server: a Unix socket, any number of clients, JSON-RPC 2.0.
//!
//! Requests of one connection are carried out one after another and answered in their order; those of different
//! connections run side by side. So a client that pipelines a call and one that depends on it may do so, and a client
//! that waits for events uses a second connection for everything else. A response that cannot be sent any more is
//! dropped: what was begun is finished all the same. What waits to be written is bounded: a client that does not read its
//! answers is not read from either.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;

use crate::error::{RpcError, code};
use crate::jsonrpc::{Request, Response, Splitter};
use crate::methods::{self, Caller};
use crate::subscriptions::{Notifications, QUEUE};
use crate::target::Target;

/// Bytes read at once.
const READ: usize = 64 << 10;
/// How long accepting rests when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on a path, where a socket that nobody listens on any more is replaced. Only the owner may connect.
///
/// # Errors
/// Somebody listens there, something else is there, or the kernel refuses.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let other = |what: &str| io::Error::new(io::ErrorKind::AddrInUse, what.to_owned());
        if !metadata.file_type().is_socket() {
            return Err(other("something that is not a socket is there"));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(other("another process listens there; stop it or choose another path"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Removes a socket when dropped.
#[derive(Debug)]
pub struct SocketFile(pub PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Serves clients until dropped. Must run on a `LocalSet`.
pub async fn serve(listener: UnixListener, target: Rc<Target>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(connection(stream, Rc::clone(&target)));
            }
            Err(error) => {
                tracing::warn!(%error, "an RPC client could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One client, until it goes. One that only stops asking still gets what was answered.
async fn connection(stream: UnixStream, target: Rc<Target>) {
    let (reader, writer) = stream.into_split();
    let (outgoing, queue) = channel(QUEUE);
    let (over, is_over) = oneshot::channel();
    tokio::task::spawn_local(write(writer, queue, is_over));
    let caller = Caller { target, notifications: Some(Notifications::new(outgoing.clone())) };
    read(reader, &caller, &outgoing).await;
    // The writer closes the queue, in which subscriptions have senders as well, writes what is in it, and ends.
    drop::<oneshot::Sender<()>>(over);
}

/// Reads requests and answers them, until the client asks no more or cannot be understood.
async fn read(mut reader: OwnedReadHalf, caller: &Caller, outgoing: &Sender<Value>) {
    let mut splitter = Splitter::default();
    let mut buffer = vec![0; READ];
    loop {
        let count = match reader.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        splitter.feed(buffer.get(..count).unwrap_or_default());
        loop {
            let parsed = match splitter.next_value() {
                Ok(None) => break,
                Ok(Some(text)) => serde_json::from_slice(text).map_err(|error| {
                    let message = format!("Parse error: {error}");
                    RpcError::new(code::PARSE, "json", message, Value::Null)
                }),
                Err(error) => Err(error.into()),
            };
            let (answer, go_on) = match parsed {
                Ok(value) => (answer(caller, value).await, true),
                // There is no telling where the next request would begin.
                Err(error) => (Some(to_json(&Response::error(Value::Null, error))), false),
            };
            if let Some(answer) = answer {
                let sent = outgoing.send(answer).await;
                if !go_on || sent.is_err() {
                    return;
                }
            }
        }
    }
}

/// Writes responses and notifications, until it is over, and then what is queued; or until the client has gone.
async fn write(
    mut writer: OwnedWriteHalf,
    mut queue: Receiver<Value>,
    mut is_over: oneshot::Receiver<()>,
) {
    loop {
        let next = tokio::select! {
            next = queue.recv() => next,
            _ = &mut is_over, if !queue.is_closed() => {
                queue.close();
                continue;
            }
        };
        let Some(value) = next else { return };
        let mut text = serde_json::to_vec(&value).unwrap_or_default();
        text.push(b'\n');
        if writer.write_all(&text).await.is_err() {
            return;
        }
    }
}

/// The most requests of a batch.
const BATCH_MAX: usize = 1024;

/// Answers a request or a batch; none where no answer is wanted.
async fn answer(caller: &Caller, value: Value) -> Option<Value> {
    let Value::Array(batch) = value else {
        return answer_one(caller, value).await.as_ref().map(to_json);
    };
    // Answers are longer than requests can be, and none is sent before all are there.
    if !(1..=BATCH_MAX).contains(&batch.len()) {
        let error = RpcError::new(
            code::INVALID_REQUEST,
            "invalid_request",
            format!("Invalid Request: a batch has 1 to {BATCH_MAX} requests, not {}", batch.len()),
            Value::Null,
        );
        return Some(to_json(&Response::error(Value::Null, error)));
    }
    let mut answers = Vec::with_capacity(batch.len());
    for value in batch {
        answers.extend(answer_one(caller, value).await.as_ref().map(to_json));
    }
    if answers.is_empty() { None } else { Some(answers.into()) }
}

async fn answer_one(caller: &Caller, value: Value) -> Option<Response> {
    let request = match Request::from_value(value) {
        Ok(request) => request,
        Err((id, error)) => return Some(Response::error(id, error)),
    };
    let called = methods::call(caller.clone(), &request.method, request.params).await;
    let id = request.id?;
    Some(match called {
        Ok(answer) => Response {
            jsonrpc: "2.0".into(),
            id,
            result: Some(answer.result),
            error: None,
            warning: answer.warning,
        },
        Err(error) => Response::error(id, error),
    })
}

fn to_json(response: &Response) -> Value {
    serde_json::to_value(response).unwrap_or_default()
}
