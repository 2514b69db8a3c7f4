//! `resilver serve` as a child, and a JSON-RPC client that shares no code with it.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

/// How long anything may take that takes a moment.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a job may take to reach a state.
const PATIENCE: Duration = Duration::from_secs(120);

/// An error that the server answered.
#[derive(Debug, Clone, PartialEq)]
pub struct RpcError {
    /// JSON-RPC's code.
    pub code: i64,
    /// What an operator reads.
    pub message: String,
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

/// A running server with a directory of its own; both are gone with it.
pub struct Server {
    child: Child,
    socket: UnixStream,
    calls: u64,
    directory: tempfile::TempDir,
}

impl Server {
    /// Starts one, and returns when it takes calls.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("resilver-e2e-").tempdir().unwrap();
        std::fs::create_dir(directory.path().join("vhost")).unwrap();
        let (child, socket) = launch(directory.path());
        Self { child, socket, calls: 0, directory }
    }

    /// Ends it by a signal and starts another one in the same directory, with the configuration `config.json` if it is there.
    /// Says how the first ended.
    ///
    /// # Panics
    /// If it does not end, or another one does not start.
    pub fn restart(&mut self, signal: Signal) -> ExitStatus {
        let status = self.end(signal);
        (self.child, self.socket) = launch(self.directory.path());
        status
    }

    /// A path in the server's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Its process.
    pub fn process(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// The socket of a controller.
    pub fn controller(&self, name: &str) -> PathBuf {
        self.path("vhost").join(name)
    }

    /// Calls a method.
    ///
    /// # Errors
    /// The server's answer.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn try_call(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        self.calls += 1;
        let request =
            json!({ "jsonrpc": "2.0", "id": self.calls, "method": method, "params": params });
        self.socket.write_all(request.to_string().as_bytes()).unwrap();
        let mut answers = serde_json::Deserializer::from_reader(&self.socket).into_iter::<Value>();
        let mut answer = answers.next().expect("an answer").expect("JSON");
        assert_eq!(answer["id"], self.calls, "{answer}");
        match answer.get("error") {
            None => Ok(answer["result"].take()),
            Some(error) => Err(RpcError {
                code: error["code"].as_i64().unwrap(),
                message: error["message"].as_str().unwrap().to_owned(),
            }),
        }
    }

    /// Calls a method that must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        let told = params.to_string();
        match self.try_call(method, params) {
            Ok(result) => result,
            Err(error) => panic!("{method} {told}: {error}\n{}", self.log()),
        }
    }

    /// Starts a mirror; again where the disk did not drain in time, as the error says: others may keep the machine's own disk busy,
    /// and then a guest's flush takes longer than a hold may.
    ///
    /// # Panics
    /// If it is refused for another reason, or again and again.
    pub fn start_mirror(&mut self, params: &Value) -> Value {
        const TIMED_OUT: i64 = -110;
        for _ in 0..10 {
            match self.try_call("bdev_mirror_start", params.clone()) {
                Ok(result) => return result,
                Err(error) if error.code == TIMED_OUT => eprintln!("{error}"),
                Err(error) => panic!("bdev_mirror_start {params}: {error}\n{}", self.log()),
            }
        }
        panic!("bdev_mirror_start {params}: the disk never drained\n{}", self.log());
    }

    /// Serves a file as the disk of a controller.
    pub fn serve_file(&mut self, bdev: &str, file: &Path, controller: &str) {
        self.call("bdev_uring_create", json!({ "name": bdev, "filename": file }));
        self.call("vhost_create_blk_controller", json!({ "ctrlr": controller, "dev_name": bdev }));
    }

    /// The job as it is now.
    ///
    /// # Panics
    /// If there is none.
    pub fn job(&mut self, id: &str) -> Value {
        let jobs = self.call("job_get_list", json!({ "job_id": id }));
        let job = jobs.get(0).cloned();
        job.unwrap_or_else(|| panic!("there is no job {id}: {jobs}"))
    }

    /// Waits until the job is as it should be.
    ///
    /// # Panics
    /// If it has ended otherwise, or does not get there.
    pub fn wait_for_job(&mut self, id: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let job = self.job(id);
            if is(&job) {
                return job;
            }
            assert!(job["status"] != "concluded", "concluded, not {what}: {job}\n{}", self.log());
            assert!(begun.elapsed() < PATIENCE, "not {what}: {job}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the job has this status.
    pub fn wait_for_status(&mut self, id: &str, status: &str) -> Value {
        self.wait_for_job(id, status, |job| job["status"] == status)
    }

    /// The bdev that a controller serves now.
    ///
    /// # Panics
    /// If there is no such controller.
    pub fn served_bdev(&mut self, controller: &str) -> String {
        let controllers = self.call("vhost_get_controllers", json!({ "name": controller }));
        let bdev = &controllers[0]["backend_specific"]["block"]["bdev"];
        bdev.as_str().unwrap_or_else(|| panic!("{controllers}")).to_owned()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("serve.log")).unwrap_or_default()
    }

    /// Stops it as an operator does. Its files are still there until what is returned goes.
    ///
    /// # Panics
    /// If it does not end well.
    #[must_use]
    pub fn stop(mut self) -> impl Drop {
        let status = self.end(Signal::TERM);
        assert!(status.success(), "resilver serve ended with {status}: {}", self.log());
        self
    }

    /// Ends it by a signal.
    fn end(&mut self, signal: Signal) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "it does not stop: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
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

/// Starts a server in a directory; gives it and a connection to it.
fn launch(directory: &Path) -> (Child, UnixStream) {
    let at = |name: &str| directory.join(name);
    let log = File::options().append(true).create(true).open(at("serve.log")).unwrap();
    let mut command = Command::new(binary());
    command
        .current_dir(directory)
        .arg("serve")
        .args([Path::new("--rpc-socket"), &at("rpc.sock")])
        .args([Path::new("--vhost-dir"), &at("vhost")])
        .args([Path::new("--state-dir"), &at("state")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    if at("config.json").exists() {
        command.args([Path::new("--config"), &at("config.json")]);
    }
    let mut starting = Starting { child: Some(command.spawn().unwrap()), log: at("serve.log") };
    let begun = Instant::now();
    let socket = loop {
        if let Ok(socket) = UnixStream::connect(at("rpc.sock")) {
            break socket;
        }
        let ended = starting.child.as_mut().unwrap().try_wait().unwrap();
        assert!(ended.is_none(), "resilver serve ended at once: {}", starting.log());
        assert!(begun.elapsed() < DEADLINE, "no RPC socket: {}", starting.log());
        std::thread::sleep(Duration::from_millis(5));
    };
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    (starting.child.take().unwrap(), socket)
}

/// A child that is killed if the server does not come up.
struct Starting {
    child: Option<Child>,
    log: PathBuf,
}

impl Starting {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The binary of the profile that the tests were built with, built if it is not.
///
/// # Panics
/// If it does not build.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.ancestors().nth(2).expect("a test is in target/<profile>/deps");
        let mut build = Command::new(env!("CARGO"));
        // As the whole workspace's, so that it shares its dependencies' features, and them, with the tests.
        build.current_dir(env!("CARGO_MANIFEST_DIR")).args([
            "build",
            "-q",
            "--workspace",
            "--bin",
            "resilver",
        ]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        build.arg("--target-dir").arg(profile.parent().expect("target/<profile>"));
        assert!(build.status().unwrap().success(), "resilver does not build");
        profile.join("resilver")
    })
}
