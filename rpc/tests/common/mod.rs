//! A target on a thread, for tests that call it through its socket.

#![allow(dead_code, unreachable_pub)] // each test program uses a part of it
#![allow(clippy::unwrap_used)] // a test may panic; clippy knows that only of functions it sees as tests

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use resilver_reactor::Idle;
use resilver_rpc::serve::{ServeConfig, UringMode};
use resilver_rpc::{Client, ClientError, RpcError, serve};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;

pub const MIB: u64 = 1 << 20;
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A target on a thread of its own.
pub struct Served {
    pub dir: PathBuf,
    pub client: Client,
    pub metrics: Option<std::net::SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub fn start(dir: &Path, state_dir: Option<PathBuf>) -> Self {
        let config = ServeConfig {
            rpc_socket: dir.join("rpc.sock"),
            vhost_dir: dir.join("vhost"),
            cores: None,
            idle: Idle::Adaptive,
            uring_mode: UringMode::Auto,
            sqpoll_core: None,
            metrics: Some("127.0.0.1:0".parse().unwrap()),
            state_dir,
            config: None,
        };
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let stopped = async {
                let _ = stopped.await;
            };
            serve::run(config, stopped, |it| ready.send(it.metrics).unwrap()).unwrap();
        });
        let metrics = is_ready.recv_timeout(DEADLINE).unwrap();
        let client = Client::connect(&dir.join("rpc.sock")).unwrap();
        let (stop, thread) = (Some(stop), Some(thread));
        Self { dir: dir.to_owned(), client, metrics, stop, thread }
    }

    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.client.call(method, params).unwrap_or_else(|error| panic!("{method}: {error}")).result
    }

    pub fn refused(&mut self, method: &str, params: Value) -> RpcError {
        match self.client.call(method, params.clone()) {
            Err(ClientError::Rpc(error)) => error,
            other => panic!("{method} {params} was not refused: {other:?}"),
        }
    }

    pub fn malloc(&mut self, name: &str, mib: u64) {
        let params = json!({ "name": name, "num_blocks": mib * MIB / 512, "block_size": 512 });
        assert_eq!(self.call("bdev_malloc_create", params), name);
    }

    /// A file of random size of data and holes, as a bdev.
    pub fn file(&mut self, name: &str, mib: u64) -> PathBuf {
        let path = self.dir.join(format!("{name}.raw"));
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&vec![0x5a; 3 << 20]).unwrap();
        file.set_len(mib * MIB).unwrap();
        self.call("bdev_uring_create", json!({ "name": name, "filename": path }));
        path
    }

    /// Waits for an event of a job; gives it.
    pub fn wait_for(&mut self, job: &str, is: impl Fn(&Value) -> bool) -> Value {
        let (begun, mut after) = (Instant::now(), 0);
        while begun.elapsed() < DEADLINE {
            let params = json!({ "after": after, "timeout_ms": 1000, "job_id": job });
            let page = self.call("job_get_events", params);
            after = page["sequence"].as_u64().unwrap();
            if let Some(event) = page["events"].as_array().unwrap().iter().find(|it| is(it)) {
                return event.clone();
            }
        }
        panic!("the event did not come; the jobs: {}", self.call("job_get_list", json!({})));
    }

    /// Waits until nobody uses a bdev: what a job had in flight there may take a moment to come back.
    pub fn wait_until_free(&mut self, bdev: &str) {
        let begun = Instant::now();
        loop {
            let found = self.call("bdev_get_bdevs", json!({ "name": bdev }));
            if found[0]["claimed"] == false {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "still in use: {found}");
        }
    }

    pub fn wait_for_status(&mut self, job: &str, status: &str) {
        self.wait_for(job, |event| event["status"] == status);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        let joined = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(joined, Some(Ok(()))), "the target failed");
    }
}

pub fn served() -> (TempDir, Served) {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::start(dir.path(), Some(dir.path().join("state")));
    (dir, served)
}
