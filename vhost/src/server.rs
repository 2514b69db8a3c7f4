//! Controllers: a socket in the file system behind which a disk is served.
//!
//! Most listen and front ends connect. Some connect to a socket on which the front end listens, again and again until somebody
//! does, and again when the connection is lost ([`Role`]). All the same otherwise.
//!
//! A controller lives on the control thread (a tokio `LocalSet`) and outlives its front ends: one that disconnects or breaks
//! the protocol is dropped, with the reason in the log, and the next one may connect. How many there may be at a time, and
//! who may run rings, is [`crate::sessions`]'s to say.
//!
//! **Leaving.** When a connection ends, its session is abandoned on the reactor: rings and guest memory are touched no more.
//! Requests that the disk still has keep that memory mapped until they end. If that takes longer than [`GRACE`], new front
//! ends are refused with the reason, because a late write of the old session could land on top of one of the new session.

use std::convert::Infallible;
use std::fmt;
use std::io;
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
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::blk::{BlkDevice, Serial};
use crate::blk_session::{BlkSession, Command, SessionConfig, SessionFault};
use crate::connection::{Connection, ConnectionError, send};
use crate::postcopy;
use crate::protocol::QUEUES_MAX;
use crate::session::Session;
use crate::sessions::{GRACE, Intent, Place, SESSIONS_MAX, Seat, SessionInfo, Sessions};
use crate::socket::Socket;
use crate::stats::VhostStats;

/// How long to wait before a disk whose mailbox was full is told again.
const AGAIN: Duration = Duration::from_millis(1);
/// How often a disk is told again before it counts as gone.
const TRIES: u32 = 1000;

/// The first pause before a front end that could not be reached is tried again; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(20);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Who connects to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The controller makes the socket, and front ends connect.
    Listen,
    /// The front end has made the socket and listens (QEMU: `-chardev socket,server=on`).
    Connect,
}

/// How a controller is set up.
#[derive(Debug, Clone)]
pub struct ControllerConfig {
    /// Its name, in the log and, where no serial is given, to the guest.
    pub name: String,
    /// Where its socket is.
    pub socket_path: PathBuf,
    /// Who has made that, and who connects.
    pub role: Role,
    /// Guests may not write.
    pub read_only: bool,
    /// What the guest sees as the disk's serial: the first 20 bytes.
    pub serial: Option<String>,
    /// The most request queues.
    pub num_queues: u16,
    /// Packed rings are offered beside split ones.
    pub packed_ring: bool,
    /// Its monitors may bring guests whose memory is still on its way, and are trusted for it: see [`crate::postcopy`].
    pub postcopy: bool,
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
    /// Guest memory cannot arrive later on this host.
    #[error(
        "post-copy migrations need userfaultfd, which this process cannot have: {0}; it takes Linux 5.11 or later and a sandbox \
         (seccomp) that allows the system call 'userfaultfd', but no privilege"
    )]
    NoPostcopy(io::Error),
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

/// What there is to say about a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Its name.
    pub name: String,
    /// Where its socket is.
    pub socket_path: PathBuf,
    /// Who has made that.
    pub role: Role,
    /// Guests may not write.
    pub read_only: bool,
    /// The front ends that are connected.
    pub sessions: Vec<SessionInfo>,
    /// Requests of ended sessions that the disk still has, whatever controller they came through; new front ends are refused
    /// meanwhile.
    pub left_in_flight: u32,
}

/// A controller. Dropping it ends its connections and removes its socket, without waiting.
pub struct Controller {
    config: ControllerConfig,
    sessions: Rc<Sessions>,
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
    /// Makes the socket, or begins to look for the front end's, and serves `disk`, whose limits are `limits`, behind it. Must be
    /// called on a tokio `LocalSet`.
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
        if config.postcopy {
            postcopy::is_possible().map_err(VhostError::NoPostcopy)?;
        }
        let listener = match config.role {
            Role::Listen => Some(bind(&config.socket_path)?),
            Role::Connect => None,
        };
        let sessions = Rc::new(Sessions::new(config.name.clone(), disk, limits));
        let stats = Arc::new(VhostStats::default());
        let (stop, stopped) = oneshot::channel();
        let server = Rc::new(Server {
            config: config.clone(),
            sessions: Rc::clone(&sessions),
            stats: Arc::clone(&stats),
        });
        let task = tokio::task::spawn_local(server.run(listener, stopped));
        Ok(Self { config, sessions, stats, stop, task })
    }

    /// Ends the connections, removes the socket, and waits for requests in flight, at most [`GRACE`].
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
        for error in self.sessions.resize(limits) {
            warn!(controller = self.config.name, "the guest was not told of the resize: {error}");
        }
    }

    /// What there is to say about it.
    #[must_use]
    pub fn info(&self) -> ControllerInfo {
        ControllerInfo {
            name: self.config.name.clone(),
            socket_path: self.config.socket_path.clone(),
            role: self.config.role,
            read_only: self.config.read_only,
            sessions: self.sessions.infos(),
            left_in_flight: self.sessions.left_in_flight(),
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
    Fault(SessionFault),
    Stopped,
}

/// What a controller's tasks share.
struct Server {
    config: ControllerConfig,
    sessions: Rc<Sessions>,
    stats: Arc<VhostStats>,
}

impl Server {
    /// Serves front ends until told to stop. Answers how many requests the disk keeps.
    async fn run(
        self: Rc<Self>,
        listener: Option<UnixListener>,
        mut stopped: oneshot::Receiver<()>,
    ) -> u32 {
        let (stop, stops) = watch::channel(());
        let mut tasks = JoinSet::new();
        let serve = async {
            match &listener {
                Some(listener) => self.listen(listener, &mut tasks, &stops).await,
                None => self.connect(&mut tasks, &stops).await,
            }
        };
        tokio::select! {
            never = serve => match never {},
            _ = &mut stopped => {}
        }
        if listener.is_some() {
            let _ = std::fs::remove_file(&self.config.socket_path);
        }
        drop((listener, stop, stops));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = timeout(GRACE, all).await;
        // What is left waits by itself for the last request: its memory is unmapped here and not on the reactor.
        tasks.detach_all();
        self.sessions.left_behind()
    }

    /// Takes front ends as they come.
    async fn listen(
        self: &Rc<Self>,
        listener: &UnixListener,
        tasks: &mut JoinSet<()>,
        stops: &watch::Receiver<()>,
    ) -> Infallible {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tasks.spawn_local(Rc::clone(self).receive(stream, stops.clone()));
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: give others time to close theirs.
                        warn!(controller = self.config.name, "cannot accept a front end: {error}");
                        tokio::time::sleep(GRACE).await;
                    }
                },
                Some(_ended) = tasks.join_next() => {}
            }
        }
    }

    /// Looks for the front end until it listens, and again when it is lost. The disk has ended what the last session left it
    /// before the next begins.
    async fn connect(
        self: &Rc<Self>,
        tasks: &mut JoinSet<()>,
        stops: &watch::Receiver<()>,
    ) -> Infallible {
        let (controller, path) = (&self.config.name, &self.config.socket_path);
        let (mut pause, mut known) = (PAUSE, None);
        loop {
            match UnixStream::connect(path).await {
                Ok(stream) => {
                    known = None;
                    let begin = Instant::now();
                    tasks.spawn_local(Rc::clone(self).receive(stream, stops.clone()));
                    while tasks.join_next().await.is_some() {}
                    // One that hangs up at once is as one that does not listen.
                    if begin.elapsed() > PAUSE_MAX {
                        pause = PAUSE;
                    }
                }
                Err(error) => {
                    if known != Some(error.kind()) {
                        warn!(
                            controller,
                            "no front end at '{}' ({error}); it is tried until one listens there",
                            path.display()
                        );
                    }
                    known = Some(error.kind());
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// A front end that has connected: refused, or served until it ends.
    async fn receive(self: Rc<Self>, stream: UnixStream, mut stops: watch::Receiver<()>) {
        let controller = &self.config.name;
        let Some(place) = self.sessions.admit(Socket::new(stream)) else {
            return warn!(
                controller,
                "a front end was refused: {SESSIONS_MAX} are connected already, and only during a live migration is there \
                 more than one; or many have gone that are not let go of yet"
            );
        };
        let way = tokio::select! {
            way = self.sessions.clear_way(&place.seat, Intent::Connect) => way,
            _ = stops.changed() => return,
        };
        match way {
            Ok(()) => self.serve(place, stops).await,
            Err(obstacle) => warn!(controller, "a front end was refused: {obstacle}"),
        }
    }

    /// One front end, from its first message to the last of its requests.
    async fn serve(&self, place: Place, mut stops: watch::Receiver<()>) {
        let name = &self.config.name;
        let serial = Serial::new(self.config.serial.as_deref().unwrap_or(name));
        let (fault, broken) = oneshot::channel();
        let (consumer, data) = BlkSession::new(
            SessionConfig {
                num_queues: self.config.num_queues,
                read_only: self.config.read_only,
                serial,
                stats: Arc::clone(&self.stats),
                on_fault: Box::new(move |what| {
                    let _ = fault.send(what);
                }),
            },
            self.sessions.disk().doorbell(),
        );
        let id = fresh_id();
        if !self.add(id, Box::new(consumer)).await {
            return warn!(
                controller = name,
                "a front end was refused: the disk takes no more sessions"
            );
        }
        self.stats.sessions.add(1);
        info!(controller = name, "a front end has connected");
        let device = BlkDevice {
            limits: self.sessions.limits(),
            read_only: self.config.read_only,
            num_queues: self.config.num_queues,
            packed_ring: self.config.packed_ring,
            postcopy: self.config.postcopy,
        };
        let mut connection = Connection::new(
            Rc::clone(&place.seat),
            Session::new(device, self.sessions.writeback()),
            self.config.num_queues,
            data.clone(),
            Rc::clone(&self.sessions),
            Arc::clone(&self.stats),
            serial,
        );
        let ended = tokio::select! {
            result = connection.serve() => result.map_or_else(Ended::Refused, |()| Ended::Closed),
            Ok(fault) = broken => Ended::Fault(fault),
            _ = stops.changed() => Ended::Stopped,
        };
        self.log_end(ended);
        // First the data side lets go of guest memory, then the front end sees the connection closed.
        let removed = self.abandon(id, &data, &place.seat).await;
        connection.break_off_postcopy();
        drop(connection);
        place.seat.socket.close();
        self.drain(removed, place).await;
    }

    fn log_end(&self, ended: Ended) {
        let controller = &self.config.name;
        match ended {
            Ended::Closed | Ended::Stopped => info!(controller, "the front end's session is over"),
            Ended::Refused(reason) => warn!(controller, "the connection was closed: {reason}"),
            Ended::Fault(fault) => warn!(controller, "the connection was closed: {fault}"),
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
        seat: &Seat,
    ) -> oneshot::Receiver<Option<Box<dyn Consumer>>> {
        // The last command may still wait for a request that hangs; the mailbox has room for this one beside it.
        let in_flight = match send(data, Command::Abandon) {
            Ok(answer) => answer.await.unwrap_or(0),
            Err(_) => 0,
        };
        seat.leaves(in_flight);
        let (sender, receiver) = oneshot::channel();
        let reply: Reply<_> = Box::new(move |consumer| drop(sender.send(consumer)));
        self.tell(DiskCommand::RemoveConsumer(id, reply)).await;
        receiver
    }

    /// Waits for the last request of an ended session, for ever if need be.
    async fn drain(&self, mut removed: oneshot::Receiver<Option<Box<dyn Consumer>>>, place: Place) {
        if timeout(GRACE, &mut removed).await.is_ok() {
            return;
        }
        let (controller, left) = (&self.config.name, place.seat.left());
        warn!(controller, "{left} requests of the ended session are still in flight");
        let _ = removed.await;
        info!(controller, "the last request of the ended session has ended");
    }

    /// Sends a command to the disk. If it does not keep up for a second it has gone: then nobody answers.
    async fn tell(&self, command: DiskCommand) {
        let mut command = Box::new(command);
        for _ in 0..TRIES {
            match self.sessions.disk().send(*command) {
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
