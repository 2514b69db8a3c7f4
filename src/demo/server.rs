//! The server of the demo: `resilver serve`, as an operator starts it, driven through its JSON-RPC socket.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::Scratch;

/// How long the server may take to start, to answer and to stop.
const DEADLINE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A running server, killed with its owner.
pub(super) struct Server {
    child: Child,
    socket: UnixStream,
    vhost_dir: PathBuf,
    calls: u64,
}

impl Server {
    /// Starts a server whose sockets and state are in the scratch directory.
    pub(super) fn start(scratch: &Scratch) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find the resilver binary")?;
        let (rpc, vhost_dir) = (scratch.path("rpc.sock"), scratch.path("vhost"));
        std::fs::create_dir(&vhost_dir)?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg("--rpc-socket")
            .arg(&rpc)
            .arg("--vhost-dir")
            .arg(&vhost_dir)
            .arg("--state-dir")
            .arg(scratch.path("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start resilver serve")?;
        let begun = Instant::now();
        loop {
            if let Ok(socket) = UnixStream::connect(&rpc) {
                socket.set_read_timeout(Some(DEADLINE))?;
                return Ok(Self { child, socket, vhost_dir, calls: 0 });
            }
            if let Some(status) = child.try_wait()? {
                bail!("resilver serve ended at once: {status}");
            }
            ensure!(begun.elapsed() < DEADLINE, "resilver serve does not open its socket");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The socket of a controller.
    pub(super) fn controller(&self, name: &str) -> PathBuf {
        self.vhost_dir.join(name)
    }

    /// Calls a method and waits for its result.
    pub(super) fn call(&mut self, method: &str, params: Value) -> anyhow::Result<Value> {
        self.calls += 1;
        let request =
            json!({ "jsonrpc": "2.0", "id": self.calls, "method": method, "params": params });
        self.socket
            .write_all(request.to_string().as_bytes())
            .with_context(|| format!("cannot call {method}"))?;
        let mut answers = serde_json::Deserializer::from_reader(&self.socket).into_iter::<Value>();
        let answer = answers.next().context("the server hung up")?;
        let mut answer = answer.with_context(|| format!("no answer to {method}"))?;
        if let Some(error) = answer.get("error") {
            bail!("{method}: {}", error["message"].as_str().unwrap_or("no reason given"));
        }
        Ok(answer["result"].take())
    }

    /// Stops the server as an operator does, and sees that it ends well.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.terminate();
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "resilver serve ended with {status}");
                return Ok(());
            }
            ensure!(begun.elapsed() < DEADLINE, "resilver serve does not stop");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
