//! The RPC client of the command line and the tests: blocking, one call at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::error::RpcError;
use crate::jsonrpc::{FrameError, Request, Response, Splitter};
use crate::methods::Answer;

/// Bytes read at once.
const READ: usize = 64 << 10;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "cannot reach a target at '{path}': {source}; start one with `resilver serve`, or name its socket with --rpc-socket"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the target broke: {0}")]
    Io(#[from] io::Error),
    /// What came is no response.
    #[error("the target's answer cannot be read: {0}")]
    Frame(#[from] FrameError),
    /// What came is no response either.
    #[error("the target's answer cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// The target said no.
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

/// A connection to a target.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    splitter: Splitter,
    last_id: u64,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(failed)?;
        Ok(Self { stream, splitter: Splitter::default(), last_id: 0 })
    }

    /// Bounds the wait for an answer; none waits for ever.
    ///
    /// # Errors
    /// The duration is zero.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    /// The target's, or the connection's.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Answer, ClientError> {
        self.last_id += 1;
        let request = serde_json::to_vec(&Request::new(self.last_id, method, params))?;
        self.stream.write_all(&request)?;
        loop {
            let value = self.next_value()?;
            // Notifications have no id.
            if value.get("id").is_none() {
                continue;
            }
            let response: Response = serde_json::from_value(value)?;
            if let Some(error) = response.error {
                return Err(error.into());
            }
            if response.id == self.last_id {
                let result = response.result.unwrap_or_default();
                return Ok(Answer { result, warning: response.warning });
            }
        }
    }

    /// The next notification of a subscription.
    ///
    /// # Errors
    /// The connection's.
    pub fn next_notification(&mut self) -> Result<Value, ClientError> {
        loop {
            let mut value = self.next_value()?;
            if value.get("method").is_some() {
                return Ok(value["params"].take());
            }
        }
    }

    fn next_value(&mut self) -> Result<Value, ClientError> {
        let mut buffer = vec![0; READ];
        loop {
            if let Some(text) = self.splitter.next_value()? {
                return Ok(serde_json::from_slice(text)?);
            }
            let count = match self.stream.read(&mut buffer) {
                // A signal that the caller takes; with a time-out the kernel does not begin anew by itself.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.splitter.feed(buffer.get(..count).unwrap_or_default());
        }
    }
}
