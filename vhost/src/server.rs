//! Controllers: a socket in the file system behind which a disk is served to one front end at a time.
//!
//! A controller lives on the control thread (a tokio `LocalSet`) and outlives its front ends: one that disconnects or breaks
//! the protocol is dropped, with the reason in the log, and the next one may connect. A second one waits in the socket's
//! backlog meanwhile.
//!
//! **Leaving.** When a connection ends, its session is abandoned on the reactor: rings and guest memory are touched no more.
//! Requests that the disk still has keep that memory mapped until they end. If that takes longer than [`GRACE`], new front
//! ends are refused with the reason, because a late write of the old session could land on top of one of the new session.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use resilver_bdev::{Consumer, ConsumerId, DiskCommand, DiskHandle, Limits, Reply};
use resilver_reactor::Sender;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::blk::{BlkDevice, CacheMode, serial};
use crate::blk_session::{BlkSession, Command, SessionConfig};
use crate::connection::{Connection, ConnectionError, send};
use crate::message::backend_notice;
use crate::protocol::{QUEUES_MAX, backend_request};
use crate::session::Session;
use crate::socket::Socket;
use crate::split::RingFault;
use crate::stats::VhostStats;

/// How long requests of an ended session are waited for before new front ends are refused.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long to wait before a disk whose mailbox was full is told again.
const AGAIN: Duration = Duration::from_millis(1);
/// How often a disk is told again before it counts as gone.
const TRIES: u32 = 1000;

/// How a controller is set up.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Its name, in the log and, where no serial is given, to the guest.
    pub name: String,
    /// Where its socket is.
    pub socket_path: PathBuf,
    /// Guests may not write.
    pub read_only: bool,
    /// What the guest sees as the disk's serial: the first 20 bytes.
    pub serial: Option<String>,
    /// The most request queues.
    pub num_queues: u16,
}

/// Why a controller could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// Somebody serves that socket.
    #[error(
        "'{path}' is served by another process or controller; choose another name or directory"
    )]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error("'{path}' exists and is not a socket; remove it or choose another name")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the socket '{path}': {source}")]
    Socket {
        /// The path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A number of queues that cannot be.
    #[error("num_queues is {0}: it must be between 1 and {QUEUES_MAX}")]
    NumQueues(u16),
    /// The disk keeps requests of the last session. The controller is gone nevertheless.
    #[error(
        "controller '{name}' was removed, but {in_flight} of its requests are still in flight on a disk that does not answer"
    )]
    StillInFlight {
        /// The controller.
        name: String,
        /// I/O that did not end.
        in_flight: u32,
    },
}

/// What a front end has set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// Negotiated virtio features.
    pub features: u64,
    /// Rings that are running.
    pub queues: Vec<u16>,
    /// Regions of guest memory.
    pub memory_regions: usize,
}

/// What there is to say about a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Its name.
    pub name: String,
    /// Where its socket is.
    pub socket_path: PathBuf,
    /// Guests may not write.
    pub read_only: bool,
    /// The front end that is connected.
    pub session: Option<SessionInfo>,
    /// Requests of the last session that the disk still has; new front ends are refused meanwhile.
    pub left_in_flight: u32,
}

/// The socket on which a back end sends (SET_BACKEND_REQ_FD).
#[derive(Debug)]
pub(crate) struct BackChannel(StdUnixStream);

impl BackChannel {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let stream = StdUnixStream::from(fd);
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// Says that the configuration space has changed. A front end that does not read its channel misses it.
    fn config_changed(&self) -> io::Result<()> {
        let notice = backend_notice(backend_request::CONFIG_CHANGE_MSG);
        let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
        rustix::net::send(&self.0, &notice, flags)?;
        Ok(())
    }
}

/// What a controller and its connection share on the control thread.
#[derive(Debug)]
pub(crate) struct Status {
    name: String,
    limits: Cell<Limits>,
    session: RefCell<Option<SessionInfo>>,
    back_channel: RefCell<Option<BackChannel>>,
    left_in_flight: Cell<u32>,
    /// As the last guest left it: a front end that reconnects does not say it again.
    writeback: Cell<CacheMode>,
}

impl Status {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits.get()
    }

    pub(crate) fn set_writeback(&self, writeback: CacheMode) {
        self.writeback.set(writeback);
    }

    pub(crate) fn set_session(&self, session: Option<SessionInfo>) {
        self.session.replace(session);
    }

    pub(crate) fn set_back_channel(&self, channel: Option<BackChannel>) {
        self.back_channel.replace(channel);
    }
}

/// A controller. Dropping it ends its connection and removes its socket, without waiting.
pub struct Controller {
    config: ControllerConfig,
    status: Rc<Status>,
    stats: Arc<VhostStats>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<u32>,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Controller {
    /// Makes the socket and serves `disk`, whose limits are `limits`, behind it. Must be called on a tokio `LocalSet`.
    ///
    /// # Errors
    /// The socket cannot be made, or is served by somebody.
    pub fn start(
        config: ControllerConfig,
        disk: DiskHandle,
        limits: Limits,
    ) -> Result<Self, VhostError> {
        if config.num_queues == 0 || config.num_queues > QUEUES_MAX {
            return Err(VhostError::NumQueues(config.num_queues));
        }
        let listener = bind(&config.socket_path)?;
        let status = Rc::new(Status {
            name: config.name.clone(),
            limits: Cell::new(limits),
            session: RefCell::default(),
            back_channel: RefCell::default(),
            left_in_flight: Cell::new(0),
            writeback: Cell::new(CacheMode::WriteBack),
        });
        let stats = Arc::new(VhostStats::default());
        let (stop, stopped) = oneshot::channel();
        let server = Server {
            config: config.clone(),
            disk,
            listener,
            status: Rc::clone(&status),
            stats: Arc::clone(&stats),
        };
        let task = tokio::task::spawn_local(server.run(stopped));
        Ok(Self { config, status, stats, stop, task })
    }

    /// Ends the connection, removes the socket, and waits for requests in flight, at most [`GRACE`].
    ///
    /// # Errors
    /// Requests are left on the disk; the controller is gone all the same.
    pub async fn stop(self) -> Result<(), VhostError> {
        let _ = self.stop.send(());
        match self.task.await {
            Ok(in_flight) if in_flight > 0 => {
                Err(VhostError::StillInFlight { name: self.config.name, in_flight })
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The disk has another size: the guest is told, if its front end listens.
    pub fn resize(&self, limits: Limits) {
        self.status.limits.set(limits);
        if let Some(channel) = self.status.back_channel.borrow().as_ref()
            && let Err(error) = channel.config_changed()
        {
            warn!(controller = self.config.name, "the guest was not told of the resize: {error}");
        }
    }

    /// What there is to say about it.
    #[must_use]
    pub fn info(&self) -> ControllerInfo {
        ControllerInfo {
            name: self.config.name.clone(),
            socket_path: self.config.socket_path.clone(),
            read_only: self.config.read_only,
            session: self.status.session.borrow().clone(),
            left_in_flight: self.status.left_in_flight.get(),
        }
    }

    /// Its counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<VhostStats> {
        &self.stats
    }
}

/// Makes the listening socket. One that a dead process left behind is replaced.
fn bind(path: &Path) -> Result<UnixListener, VhostError> {
    let failed = |source| VhostError::Socket { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(VhostError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => match StdUnixStream::connect(path) {
            Ok(_) => return Err(VhostError::SocketInUse { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
    }
    UnixListener::bind(path).map_err(failed)
}

/// Why a connection is over.
enum Ended {
    Closed,
    Refused(ConnectionError),
    RingBroken(u16, RingFault),
    Stopped,
}

/// The controller's task.
struct Server {
    config: ControllerConfig,
    disk: DiskHandle,
    listener: UnixListener,
    status: Rc<Status>,
    stats: Arc<VhostStats>,
}

impl Server {
    /// Serves one front end after another until told to stop. Answers how many requests the disk keeps.
    async fn run(self, mut stopped: oneshot::Receiver<()>) -> u32 {
        let left = loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = &mut stopped => break 0,
            };
            match accepted {
                Ok((stream, _)) => {
                    if let Some(left) = self.session(stream, &mut stopped).await {
                        break left;
                    }
                }
                Err(error) => {
                    // Out of descriptors, most likely: give others time to close theirs.
                    warn!(controller = self.config.name, "cannot accept a front end: {error}");
                    tokio::time::sleep(GRACE).await;
                }
            }
        };
        let _ = std::fs::remove_file(&self.config.socket_path);
        left
    }

    /// One front end, from its connection to the last of its requests. Some: the controller is to stop, with so many requests
    /// left on the disk.
    async fn session(
        &self,
        stream: UnixStream,
        stopped: &mut oneshot::Receiver<()>,
    ) -> Option<u32> {
        let name = &self.config.name;
        let (fault, mut broken) = oneshot::channel();
        let (consumer, data) = BlkSession::new(
            SessionConfig {
                num_queues: self.config.num_queues,
                read_only: self.config.read_only,
                serial: serial(self.config.serial.as_deref().unwrap_or(name)),
                stats: Arc::clone(&self.stats),
                on_fault: Box::new(move |what| {
                    let _ = fault.send(what);
                }),
            },
            self.disk.doorbell(),
        );
        let id = fresh_id();
        if !self.add(id, Box::new(consumer)).await {
            warn!(controller = name, "a front end was refused: the disk takes no more sessions");
            return None;
        }
        self.stats.sessions.add(1);
        info!(controller = name, "a front end has connected");
        let device = BlkDevice {
            limits: self.status.limits(),
            read_only: self.config.read_only,
            num_queues: self.config.num_queues,
        };
        let mut connection = Connection::new(
            Socket::new(stream),
            Session::new(device, self.status.writeback.get()),
            self.config.num_queues,
            data.clone(),
            Rc::clone(&self.status),
        );
        let ended = tokio::select! {
            result = connection.serve() => result.map_or_else(Ended::Refused, |()| Ended::Closed),
            Ok((queue, fault)) = &mut broken => Ended::RingBroken(queue, fault),
            _ = &mut *stopped => Ended::Stopped,
        };
        let stops = matches!(ended, Ended::Stopped);
        self.log_end(ended);
        self.status.set_session(None);
        self.status.set_back_channel(None);
        // First the data side lets go of guest memory, then the front end sees the connection closed.
        let removed = self.abandon(id, &data).await;
        drop(connection);
        self.drain(removed, stops, stopped).await
    }

    fn log_end(&self, ended: Ended) {
        let controller = &self.config.name;
        match ended {
            Ended::Closed | Ended::Stopped => info!(controller, "the front end's session is over"),
            Ended::Refused(reason) => warn!(controller, "the connection was closed: {reason}"),
            Ended::RingBroken(queue, fault) => {
                warn!(controller, "the connection was closed: queue {queue}: {fault}");
            }
        }
    }

    /// Puts a session on the disk.
    async fn add(&self, id: ConsumerId, consumer: Box<dyn Consumer>) -> bool {
        let (sender, receiver) = oneshot::channel();
        let reply: Reply<_> = Box::new(move |added| drop(sender.send(added)));
        self.tell(DiskCommand::AddConsumer(id, consumer, reply)).await;
        matches!(receiver.await, Ok(Ok(())))
    }

    /// Has a session let go of its guest, and asks for it back.
    async fn abandon(
        &self,
        id: ConsumerId,
        data: &Sender<Command>,
    ) -> oneshot::Receiver<Option<Box<dyn Consumer>>> {
        // The last command may still wait for a request that hangs; the mailbox has room for this one beside it.
        let in_flight = match send(data, Command::Abandon) {
            Ok(answer) => answer.await.unwrap_or(0),
            Err(_) => 0,
        };
        self.status.left_in_flight.set(in_flight);
        let (sender, receiver) = oneshot::channel();
        let reply: Reply<_> = Box::new(move |consumer| drop(sender.send(consumer)));
        self.tell(DiskCommand::RemoveConsumer(id, reply)).await;
        receiver
    }

    /// Waits for the last request of an ended session; refuses front ends if that takes long.
    async fn drain(
        &self,
        mut removed: oneshot::Receiver<Option<Box<dyn Consumer>>>,
        stops: bool,
        stopped: &mut oneshot::Receiver<()>,
    ) -> Option<u32> {
        let stop = |left: u32| stops.then_some(left);
        if tokio::time::timeout(GRACE, &mut removed).await.is_ok() {
            self.status.left_in_flight.set(0);
            return stop(0);
        }
        let left = self.status.left_in_flight.get();
        let controller = &self.config.name;
        warn!(controller, "{left} requests of the ended session are still in flight");
        if stops {
            return Some(left);
        }
        loop {
            tokio::select! {
                _ = &mut removed => {
                    self.status.left_in_flight.set(0);
                    info!(controller, "the last request of the ended session has ended");
                    return None;
                }
                Ok(_) = self.listener.accept() => warn!(
                    controller,
                    "a front end was refused: {left} requests of the session before are still in flight on a disk \
                     that does not answer"
                ),
                _ = &mut *stopped => return Some(left),
            }
        }
    }

    /// Sends a command to the disk. If it does not keep up for a second it has gone: then nobody answers.
    async fn tell(&self, command: DiskCommand) {
        let mut command = Box::new(command);
        for _ in 0..TRIES {
            match self.disk.send(*command) {
                Ok(()) => return,
                Err(back) => command = back,
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// A name for a session that no other has.
fn fresh_id() -> ConsumerId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    ConsumerId(NEXT.fetch_add(1, Ordering::Relaxed))
}
