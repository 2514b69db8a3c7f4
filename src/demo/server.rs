//! The target of the demo: what `resilver serve` runs, on a thread of its own, driven through its JSON-RPC socket.
//!
//! In process rather than a child, so that nothing is left behind whatever becomes of the demo.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;
use std::{panic, thread};

use anyhow::{Context as _, anyhow};
use resilver_reactor::Idle;
use resilver_rpc::serve::UringMode;
use resilver_rpc::serve::{ServeConfig, ServeError};
use resilver_rpc::{Client, serve};
use serde_json::Value;
use tokio::sync::oneshot;

use super::Scratch;

/// How long a call may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running target.
pub(super) struct Server {
    client: Client,
    vhost_dir: PathBuf,
    /// Stops the target when it is dropped.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    /// Starts a target whose sockets and state are in the scratch directory.
    pub(super) fn start(scratch: &Scratch) -> anyhow::Result<Self> {
        let (rpc_socket, vhost_dir) = (scratch.path("rpc.sock"), scratch.path("vhost"));
        let config = ServeConfig {
            rpc_socket: rpc_socket.clone(),
            vhost_dir: vhost_dir.clone(),
            cores: None,
            idle: Idle::Adaptive,
            uring_mode: UringMode::Auto,
            sqpoll_core: None,
            metrics: None,
            state_dir: Some(scratch.path("state")),
            config: None,
        };
        let (stop, stopped) = oneshot::channel();
        let (is_ready, ready) = std::sync::mpsc::channel();
        let thread = thread::Builder::new().name("control".to_owned()).spawn(move || {
            let stopped = async move { drop(stopped.await) };
            serve::run(config, stopped, |_| {
                let _ = is_ready.send(());
            })
        })?;
        if ready.recv().is_err() {
            // It has hung up without a word: its result says why.
            return Err(end(thread).err().unwrap_or_else(|| anyhow!("the target ended at once")));
        }
        let client = Client::connect(&rpc_socket)?;
        client.set_timeout(Some(DEADLINE))?;
        Ok(Self { client, vhost_dir, stop: Some(stop), thread: Some(thread) })
    }

    /// The socket of a controller.
    pub(super) fn controller(&self, name: &str) -> PathBuf {
        self.vhost_dir.join(name)
    }

    /// Calls a method and waits for its result.
    pub(super) fn call(&mut self, method: &str, params: Value) -> anyhow::Result<Value> {
        let answer = self.client.call(method, params).with_context(|| method.to_owned())?;
        Ok(answer.result)
    }

    /// Stops the target and sees that it ends well.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        drop(self.stop.take());
        self.thread.take().map_or(Ok(()), end)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Whatever it says, something worse has been said already.
            let _ = thread.join();
        }
    }
}

fn end(thread: JoinHandle<Result<(), ServeError>>) -> anyhow::Result<()> {
    match thread.join() {
        Ok(result) => result.context("the target failed"),
        Err(panicked) => panic::resume_unwind(panicked),
    }
}
