//! The life of a target: set up, ready, serving, stopped by a signal.
//!
//! Stopping is orderly: no new calls, running mirrors given up on their source (a switch-over whose record is written is
//! good on either side: both legs have every acknowledged write), controllers drained for at most [`STOP_DEADLINE`],
//! reactors stopped, sockets removed.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use resilver_reactor::{Idle, ReactorError};
use resilver_sys::{RingMode, SubmissionThread};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use crate::config::{self, Config};
use crate::error::RpcError;
use crate::metrics_http;
use crate::reactors::{CpuMask, Reactors};
use crate::server::{self, SocketFile};
use crate::state::{StateError, StateStore};
use crate::target::{Target, TargetConfig};

/// How long controllers may take to drain when the target stops.
pub const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Who submits io_uring requests to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UringMode {
    /// [`UringMode::Sqpoll`] where a core was named for it, else [`UringMode::Enter`]: a submission thread that has to
    /// share its core with a spinning reactor is worse than none.
    #[default]
    Auto,
    /// The reactor, at most one call a turn.
    Enter,
    /// A kernel thread that polls.
    Sqpoll,
}

impl UringMode {
    /// The rings' mode; starts the submission thread if there is to be one.
    fn start(self, core: Option<u32>) -> Result<RingMode, ServeError> {
        match (self, core) {
            (Self::Enter, _) | (Self::Auto, None) => Ok(RingMode::Enter),
            (Self::Sqpoll, None) => Err(ServeError::SqpollCore),
            (Self::Auto | Self::Sqpoll, Some(core)) => SubmissionThread::start(core)
                .map(RingMode::SubmissionThread)
                .map_err(io_error("start a submission thread on core", core)),
        }
    }
}

/// How a target is started.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where it takes calls.
    pub rpc_socket: PathBuf,
    /// Where the controllers' sockets are made.
    pub vhost_dir: PathBuf,
    /// The reactors' cores; one reactor that is not pinned if none are named.
    pub cores: Option<CpuMask>,
    /// What reactors do when idle.
    pub idle: Idle,
    /// Who submits io_uring requests to the kernel.
    pub uring_mode: UringMode,
    /// The core of the kernel's submission thread.
    pub sqpoll_core: Option<u32>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where it is kept which disks were superseded.
    pub state_dir: Option<PathBuf>,
    /// Calls to carry out first.
    pub config: Option<PathBuf>,
}

/// What there is to say when a target is ready.
#[derive(Debug)]
pub struct Ready {
    /// Where metrics are served, with the port that the kernel chose if none was named.
    pub metrics: Option<SocketAddr>,
    /// What went wrong with the configuration; what it did not touch is served.
    pub config: Result<usize, RpcError>,
}

/// Why a target could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A reactor.
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The configuration cannot be read.
    #[error(transparent)]
    Config(#[from] RpcError),
    /// A submission thread without a core.
    #[error(
        "uring mode sqpoll needs a core for the kernel's submission thread; name one with --sqpoll-core that no reactor \
         spins on, or use --uring-mode enter"
    )]
    SqpollCore,
    /// A socket or directory.
    #[error("cannot {action} '{name}': {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

fn io_error(action: &'static str, name: impl ToString) -> impl FnOnce(io::Error) -> ServeError {
    let name = name.to_string();
    move |source| ServeError::Io { action, name, source }
}

/// Serves until a signal asks to stop, or `stop` is done. `on_ready` is called when calls are taken.
///
/// # Errors
/// It could not be started.
pub fn run(
    config: ServeConfig,
    stop: impl Future<Output = ()>,
    on_ready: impl FnOnce(&Ready),
) -> Result<(), ServeError> {
    raise_descriptor_limit();
    // Reactors pin themselves, so their threads are started first: what a pinned thread starts inherits its core.
    let reactors = Reactors::start(config.cores, config.idle)?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("start", "a runtime"))?;
    let served = LocalSet::new().block_on(&runtime, serve(config, reactors, stop, on_ready));
    // A scan of a hung file may still sit on a blocking thread; it is not waited for.
    runtime.shutdown_background();
    served
}

/// As many descriptors as we may have: each disk and each guest takes some, and the usual limit is meant for programs that call
/// `select`.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of descriptors could not be raised");
    }
}

async fn serve(
    config: ServeConfig,
    reactors: Reactors,
    stop: impl Future<Output = ()>,
    on_ready: impl FnOnce(&Ready),
) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("watch", "SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("watch", "SIGINT"))?;
    let uring = config.uring_mode.start(config.sqpoll_core)?;
    let state = match &config.state_dir {
        Some(dir) => StateStore::open(dir)?,
        None => StateStore::default(),
    };
    for dir in [Some(config.vhost_dir.as_path()), config.rpc_socket.parent()].into_iter().flatten()
    {
        if !dir.as_os_str().is_empty() {
            std::fs::create_dir_all(dir).map_err(io_error("make", dir.display()))?;
        }
    }
    // A file that cannot be read is a mistake of the command line; calls in it that fail are not.
    let calls = config.config.as_deref().map(Config::read).transpose()?;
    let listener = server::listen(&config.rpc_socket)
        .map_err(io_error("listen on", config.rpc_socket.display()))?;
    let _socket = SocketFile(config.rpc_socket);
    let target = Target::new(TargetConfig { vhost_dir: config.vhost_dir, uring, reactors, state });
    tokio::task::spawn_local(crate::reactors::watch(Rc::downgrade(&target)));
    let mut ready = Ready { metrics: None, config: Ok(0) };
    if let Some(address) = config.metrics {
        let serving = metrics_http::serve(address, Rc::clone(&target)).await;
        ready.metrics = Some(serving.map_err(io_error("serve metrics on", address))?);
    }
    if let Some(calls) = calls {
        ready.config = config::load(&target, &calls).await;
    }
    let serving = tokio::task::spawn_local(server::serve(listener, Rc::clone(&target)));
    on_ready(&ready);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = stop => {}
    }
    tracing::info!("stopping");
    serving.abort();
    if tokio::time::timeout(STOP_DEADLINE, target.stop()).await.is_err() {
        tracing::warn!("some requests did not end in time; their device may hang");
    }
    Ok(())
}
