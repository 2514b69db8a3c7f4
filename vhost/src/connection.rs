//! One connection of a front end: receives messages, has the session judge them, and carries out what follows.
//!
//! Messages are handled one at a time and in order. Whatever takes time is waited for before the message is answered, so an
//! answer means that it has happened; while the disk holds a request that a message waits for, a front end that goes away
//! is noticed all the same.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use resilver_bdev::Reply as Callback;
use resilver_reactor::Sender;
use resilver_sys::{EventFd, TableFull};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::back_channel::BackChannel;
use crate::blk::Serial;
use crate::blk_session::{Command, Notifier};
use crate::dirty_log::{DirtyLog, LogError};
use crate::inflight::{Holds, InflightError, InflightMemory};
use crate::memory::{GuestMemory, GuestRegion, MemoryError};
use crate::message::{DecodeError, FdPresence, Message, RegionDescription, Reply, decode};
use crate::postcopy::{MemoryFile, PostCopy};
use crate::protocol::{device_state, protocol_features};
use crate::queue::LiveQueue;
use crate::ring::{Ring, RingAreas, RingSetupError};
use crate::session::{Action, Session, SessionError, has_reply, refusal};
use crate::sessions::{Intent, Obstacle, Seat, SessionInfo, Sessions};
use crate::socket::{Received, SocketError};
use crate::state_pipe::{Transfer, TransferError};
use crate::stats::VhostStats;

mod arrival;

/// How often a front end is looked at while a message of its waits for the disk.
const LOOK: Duration = Duration::from_millis(20);

/// How often it is counted which pages were waited for, while guest memory is on its way.
const COUNT_PAGES: Duration = Duration::from_millis(500);

/// Why a connection ended, or why a message was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    /// Nothing could be received or sent.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// It is not a message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The message may not be sent now, or asks for what is not there.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Its memory cannot be used.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its ring cannot be used.
    #[error(transparent)]
    Ring(#[from] RingSetupError),
    /// Its dirty log cannot be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The memory for requests in flight cannot be used.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The device state could not be saved or loaded.
    #[error(transparent)]
    State(#[from] TransferError),
    /// The reactor has no room for more regions.
    #[error("{0}; attach fewer guests with many memory slots to one reactor")]
    TableFull(#[from] TableFull),
    /// A descriptor is missing.
    #[error("a file descriptor is missing")]
    MissingDescriptor,
    /// What it is to be told of events with is no such thing.
    #[error("a descriptor for events cannot be used: {0}")]
    NoEvent(io::Error),
    /// The kernel refuses what a post-copy migration needs.
    #[error("a post-copy migration is not possible: {0}")]
    NoPostcopy(io::Error),
    /// A post-copy migration was to begin for memory whose pages the monitor cannot be told of any more.
    #[error("memory was shared before it was said that it arrives later")]
    SharedBefore,
    /// Memory of a guest whose post-copy migration was broken off here.
    #[error(
        "pages of this memory were still on their way when the last session ended, and who shares it now does not say that they \
         are; the guest has to be started anew"
    )]
    Unfinished,
    /// A ring was to start while it may not.
    #[error("the ring was not started: {0}")]
    InTheWay(Obstacle),
    /// The front end went away while its message waited for the disk.
    #[error("the front end went away while a message waited for requests in flight")]
    WentAway,
    /// The data side is not there any more.
    #[error("the disk is being closed")]
    DiskGone,
}

/// What goes back to the front end, and the descriptor that goes with it.
type Answer = (Reply, Option<OwnedFd>);

/// One connection.
pub(crate) struct Connection {
    seat: Rc<Seat>,
    session: Session,
    data: Sender<Command>,
    sessions: Rc<Sessions>,
    /// As the data side has it.
    memory: GuestMemory,
    /// The dirty log, whether it is written to or not, and who wants to hear of it.
    log: Option<DirtyLog>,
    log_event: Option<Arc<EventFd>>,
    /// Where requests in flight are tracked, if the front end wants that.
    inflight: Option<InflightMemory>,
    /// What GET_ID answers: of which disk a device state is.
    serial: Serial,
    /// The device state that is saved or loaded.
    transfer: Option<Transfer>,
    /// The post-copy migration by which the guest comes.
    postcopy: Option<PostCopy>,
    /// Since when its memory arrives.
    arriving_since: Option<Instant>,
    stats: Arc<VhostStats>,
    /// What the region of each ring can hold when it starts next.
    holds: Vec<Holds>,
    kicks: Vec<Option<Arc<EventFd>>>,
    calls: Vec<Option<Arc<EventFd>>>,
}

impl Connection {
    pub(crate) fn new(
        seat: Rc<Seat>,
        session: Session,
        num_queues: u16,
        data: Sender<Command>,
        sessions: Rc<Sessions>,
        stats: Arc<VhostStats>,
        serial: Serial,
    ) -> Self {
        let none = vec![None; usize::from(num_queues)];
        Self {
            seat,
            session,
            data,
            sessions,
            memory: GuestMemory::default(),
            log: None,
            log_event: None,
            inflight: None,
            serial,
            transfer: None,
            postcopy: None,
            arriving_since: None,
            stats,
            holds: vec![Holds::AnEarlierSession; usize::from(num_queues)],
            kicks: none.clone(),
            calls: none,
        }
    }

    /// Serves the front end until it closes the connection, which is no error, or breaks the protocol.
    pub(crate) async fn serve(&mut self) -> Result<(), ConnectionError> {
        while let Some(received) = self.next_message().await? {
            let taken = self.take(received).await;
            self.seat.set_info(SessionInfo {
                features: self.session.features(),
                queues: self.session.running().collect(),
                memory_regions: self.memory.len(),
            });
            taken?;
        }
        Ok(())
    }

    /// The next message.
    async fn next_message(&self) -> Result<Option<Received>, ConnectionError> {
        let mut receive = pin!(self.seat.socket.receive());
        while self.memory.is_arriving() {
            match tokio::time::timeout(COUNT_PAGES, &mut receive).await {
                Ok(received) => return Ok(received?),
                Err(_) => self.count_pages(),
            }
        }
        Ok(receive.await?)
    }

    async fn take(&mut self, received: Received) -> Result<(), ConnectionError> {
        let Received { header, body, fds } = received;
        let message = decode(header.request, &body, fds.len())?;
        debug!(?message, "from the front end");
        self.session.resize(self.sessions.limits());
        if let Some(action) = self.session.adopt_writeback(self.sessions.writeback()) {
            self.act(action, &mut std::iter::empty()).await?;
        }
        let outcome = self.carry_out(&message, fds).await;
        let acknowledges = header.needs_reply()
            && self.session.has_protocol_feature(protocol_features::REPLY_ACK)
            && !has_reply(header.request);
        let (reply, fd) = match outcome {
            Ok(Some(answer)) => answer,
            Ok(None) if acknowledges => (Reply::U64(0), None),
            Ok(None) => return Ok(()),
            Err(error) => {
                let refusal = refusal(header.request, acknowledges);
                let Some(reply) = refusal.filter(|_| error.may_be_answered()) else {
                    return Err(error);
                };
                let controller = self.sessions.controller();
                warn!(controller, "{} was refused: {error}", message.name());
                (reply, None)
            }
        };
        let bytes = reply.encode(header.request);
        self.seat.socket.send(&bytes, fd).await.map_err(SocketError::from)?;
        Ok(())
    }

    async fn carry_out(
        &mut self,
        message: &Message,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Answer>, ConnectionError> {
        let mut fds = fds.into_iter();
        let mut answer = None;
        let (writeback, postcopy) = (self.session.writeback(), self.session.postcopy());
        let actions = self.session.handle(message)?;
        if self.session.writeback() != writeback {
            self.sessions.set_writeback(self.session.writeback());
        }
        for action in actions {
            let done = self.act(action, &mut fds).await;
            if let Some(reply) = done.inspect_err(|_| self.undo_postcopy(postcopy))? {
                answer = Some(reply);
            }
        }
        Ok(answer)
    }

    async fn act(
        &mut self,
        action: Action,
        fds: &mut (impl Iterator<Item = OwnedFd> + ?Sized),
    ) -> Result<Option<Answer>, ConnectionError> {
        match action {
            Action::SetMemory(regions) => {
                let regions: Result<Vec<_>, _> =
                    regions.iter().map(|region| self.map(region, fds.next())).collect();
                self.set_memory(GuestMemory::new(regions?)?).await?;
            }
            Action::AddRegion(region) => {
                let mut memory = self.memory.clone();
                memory.add(self.map(&region, fds.next())?)?;
                self.set_memory(memory).await?;
            }
            Action::RemoveRegion(region) => {
                if let Some(mut memory) = self.staged() {
                    memory.remove(&region)?;
                    self.stage(memory);
                } else {
                    let mut memory = self.memory.clone();
                    memory.remove(&region)?;
                    self.set_memory(memory).await?;
                }
            }
            Action::StageMemory(regions) => {
                let mapped: Result<Vec<_>, _> =
                    regions.iter().map(|region| self.map_arriving(region, fds.next())).collect();
                let (mapped, told) = mapped?.into_iter().unzip();
                self.stage(GuestMemory::new(mapped)?);
                return Ok(Some((Reply::MemTable(told), None)));
            }
            Action::StageRegion(region) => {
                let mut memory = self.staged().unwrap_or_else(|| self.memory.clone());
                let (mapped, told) = self.map_arriving(&region, fds.next())?;
                memory.add(mapped)?;
                self.stage(memory);
                return Ok(Some((Reply::MemSlot(told), None)));
            }
            Action::UseStaged => self.use_staged().await?,
            Action::Advise => {
                let doorbell = self.sessions.disk().doorbell();
                let queues = u16::try_from(self.kicks.len()).unwrap_or(u16::MAX);
                let made = PostCopy::new(queues, doorbell)
                    .and_then(|postcopy| Ok((postcopy.descriptor()?, postcopy)));
                let (fd, postcopy) = made.map_err(ConnectionError::NoPostcopy)?;
                self.postcopy = Some(postcopy);
                return Ok(Some((Reply::Empty, Some(fd))));
            }
            Action::Listen => self.listen()?,
            Action::EndPostcopy => self.end_postcopy().await?,
            Action::SetLog { offset, size } => {
                let fd = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                let log =
                    DirtyLog::map(fd.as_fd(), offset, size)?.with_event(self.log_event.clone());
                log.covers(&self.memory)?;
                self.set_log(Some(log)).await?;
            }
            Action::SetLogEvent => {
                let fd = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                self.log_event = Some(event(fd)?);
                let event = self.log_event.clone();
                self.set_log(self.log.clone().map(|log| log.with_event(event))).await?;
            }
            Action::SetLogging => {
                self.log_covers(&self.memory)?;
                self.set_log(self.log.clone()).await?;
            }
            Action::Start(queue) => {
                let started = self.start(queue).await;
                started.inspect_err(|_| self.session.not_started(queue))?;
            }
            Action::Move(queue) => {
                let fetcher = self.fetcher(queue)?;
                self.fetch_ring(queue, &self.memory, fetcher.as_deref()).await?;
                if let Some(areas) = self.areas(queue, &self.memory)? {
                    self.ask(|reply| Command::MoveRing { queue, areas, reply }).await?;
                }
            }
            Action::Stop(queue) => {
                if let Some(live) = self.ask(|reply| Command::Stop { queue, reply }).await? {
                    self.session.stopped(queue, live.base());
                    if let Some(holds) = self.holds.get_mut(usize::from(queue)) {
                        *holds = Holds::Nothing;
                    }
                }
            }
            Action::SetNotifier(queue, which, fd) => {
                self.set_notifier(queue, which, fd, fds.next()).await?;
            }
            Action::Enable(queue, enabled) => {
                self.ask(|reply| Command::Enable { queue, enabled, reply }).await?;
            }
            Action::SetCache(cache) => self.ask(|reply| Command::SetCache(cache, reply)).await?,
            Action::GuestReset => self.ask(Command::GuestReset).await?,
            Action::SetBackChannel => {
                let fd = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                self.seat.set_back_channel(Some(BackChannel::new(fd)));
            }
            Action::MakeInflight(format, queues, entries) => {
                let (description, file) = InflightMemory::make(format, queues, entries)?;
                return Ok(Some((Reply::Inflight(description), Some(file))));
            }
            Action::SetInflight(description) => {
                let file = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                self.inflight = Some(InflightMemory::map(&description, &file)?);
            }
            Action::SaveState => {
                let fd = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                self.transfer = Some(Transfer::save(fd, &self.session.state(self.serial))?);
                return Ok(Some((Reply::U64(device_state::NO_FD), None)));
            }
            Action::LoadState => {
                let fd = fds.next().ok_or(ConnectionError::MissingDescriptor)?;
                self.transfer = Some(Transfer::load(fd)?);
                return Ok(Some((Reply::U64(device_state::NO_FD), None)));
            }
            Action::CheckState => {
                self.check_state().await?;
                return Ok(Some((Reply::U64(0), None)));
            }
            Action::Reply(reply) => return Ok(Some((reply, None))),
            Action::ReplyBase(queue) => {
                let base = self.session.base(queue);
                return Ok(Some((Reply::Vring { index: u32::from(queue), base }, None)));
            }
        }
        Ok(None)
    }

    /// Waits for the end of a transfer, and goes on with what came.
    async fn check_state(&mut self) -> Result<(), ConnectionError> {
        let transfer = self.transfer.take().ok_or(TransferError::Nothing)?;
        let Some(state) = transfer.finish().await? else { return Ok(()) };
        let cache = self.session.restore(&state, self.serial).map_err(TransferError::State)?;
        self.sessions.set_writeback(self.session.writeback());
        self.ask(|reply| Command::SetCache(cache, reply)).await
    }

    /// Where a ring is in `memory`; none if its addresses are not known.
    fn areas(&self, queue: u16, memory: &GuestMemory) -> Result<Option<RingAreas>, RingSetupError> {
        let Some(ring) = self.session.ring(queue) else { return Ok(None) };
        RingAreas::resolve(memory, ring.format, ring.size, &ring.addresses).map(Some)
    }

    /// Keeps `log`, and has the data side write to it if that is wanted. A front end may switch logging on before it gives a log:
    /// until then there is nowhere to log to.
    async fn set_log(&mut self, log: Option<DirtyLog>) -> Result<(), ConnectionError> {
        let used = log.clone().filter(|_| self.session.is_logged()).map(Box::new);
        // What comes back is unmapped here and not on the reactor.
        let _old = self.ask(|reply| Command::SetLog(used, reply)).await?;
        self.log = log;
        Ok(())
    }

    /// Refuses what would leave guest memory beyond the log in use: a page that cannot be marked is a page that is lost.
    fn log_covers(&self, memory: &GuestMemory) -> Result<(), LogError> {
        match &self.log {
            Some(log) if self.session.is_logged() => log.covers(memory),
            Some(_) | None => Ok(()),
        }
    }

    /// Changes the memory map of the data side, and where it has the rings.
    async fn set_memory(&mut self, memory: GuestMemory) -> Result<(), ConnectionError> {
        self.log_covers(&memory)?;
        let mut rings = Vec::new();
        for queue in self.session.running().collect::<Vec<_>>() {
            let fetcher = self.fetcher(queue)?;
            self.fetch_ring(queue, &memory, fetcher.as_deref()).await?;
            if let Some(areas) = self.areas(queue, &memory)? {
                rings.push((queue, areas));
            }
        }
        let new = Box::new(memory.clone());
        let changed = self.ask(|reply| Command::SetMemory { memory: new, rings, reply }).await?;
        // Either way what comes back is unmapped here and not on the reactor.
        let _old = changed.map_err(|(full, _new)| full)?;
        self.memory = memory;
        if let Some(postcopy) = &mut self.postcopy {
            postcopy.keep(&self.memory);
        }
        Ok(())
    }

    async fn start(&mut self, queue: u16) -> Result<(), ConnectionError> {
        let fetcher = self.fetcher(queue)?;
        self.fetch_ring(queue, &self.memory, fetcher.as_deref()).await?;
        let way = self.sessions.clear_way(&self.seat, Intent::Run).await;
        way.map_err(ConnectionError::InTheWay)?;
        let Some(ring) = self.session.ring(queue) else { return Ok(()) };
        let areas = RingAreas::resolve(&self.memory, ring.format, ring.size, &ring.addresses)?;
        let index = usize::from(queue);
        let (kick, call) = (self.kicks.get(index), self.calls.get(index));
        let mut live = Ring::new(ring.format, areas, ring.size, ring.base, ring.events)?;
        let holds = self.holds.get(index).copied().unwrap_or(Holds::AnEarlierSession);
        let again = match &self.inflight {
            Some(memory) => memory.take_over(queue, &mut live, holds)?,
            None => Box::default(),
        };
        if !again.is_empty() {
            let (controller, count) = (self.sessions.controller(), again.len());
            info!(
                controller,
                "queue {queue}: {count} requests that were in flight are executed again"
            );
        }
        let (kick, call) = (kick.cloned().flatten(), call.cloned().flatten());
        let live = LiveQueue::new(live, again, ring.indirect, kick, call);
        let live = Box::new(live.with_fetcher(fetcher));
        let enabled = ring.enabled;
        let started = self.ask(|reply| Command::Start { queue, live, enabled, reply }).await?;
        started.map_err(|_| ConnectionError::DiskGone)
    }

    async fn set_notifier(
        &mut self,
        queue: u16,
        which: Notifier,
        presence: FdPresence,
        fd: Option<OwnedFd>,
    ) -> Result<(), ConnectionError> {
        let event = match presence {
            FdPresence::Absent => None,
            FdPresence::Attached => {
                let fd = fd.ok_or(ConnectionError::MissingDescriptor)?;
                Some(event(fd)?)
            }
        };
        let kept = match which {
            Notifier::Kick => &mut self.kicks,
            Notifier::Call => &mut self.calls,
        };
        if let Some(kept) = kept.get_mut(usize::from(queue)) {
            kept.clone_from(&event);
        }
        self.ask(|reply| Command::SetNotifier { queue, which, event, reply }).await?;
        Ok(())
    }

    fn map(
        &self,
        region: &RegionDescription,
        fd: Option<OwnedFd>,
    ) -> Result<GuestRegion, ConnectionError> {
        let fd = fd.ok_or(ConnectionError::MissingDescriptor)?;
        if MemoryFile::of(&fd).is_some_and(|file| self.sessions.is_unfinished(file)) {
            return Err(ConnectionError::Unfinished);
        }
        Ok(GuestRegion::map(region, fd.as_fd())?)
    }

    /// Has the data side do something and waits until it is done, or until the front end has gone.
    async fn ask<T: Send + 'static>(
        &self,
        command: impl FnOnce(Callback<T>) -> Command,
    ) -> Result<T, ConnectionError> {
        let mut answer = send(&self.data, command)?;
        loop {
            match tokio::time::timeout(LOOK, &mut answer).await {
                Ok(answer) => return answer.map_err(|_| ConnectionError::DiskGone),
                Err(_) if self.seat.socket.is_closed() => return Err(ConnectionError::WentAway),
                Err(_) => {}
            }
        }
    }
}

/// Sends a command to the data side; what comes back is its answer.
pub(crate) fn send<T: Send + 'static>(
    data: &Sender<Command>,
    command: impl FnOnce(Callback<T>) -> Command,
) -> Result<oneshot::Receiver<T>, ConnectionError> {
    let (sender, receiver) = oneshot::channel();
    let reply = Box::new(move |value| drop(sender.send(value)));
    data.send(command(reply)).map_err(|_| ConnectionError::DiskGone)?;
    Ok(receiver)
}

/// What a front end wants to be told with, or tells us with.
fn event(fd: OwnedFd) -> Result<Arc<EventFd>, ConnectionError> {
    EventFd::from_peer(fd).map(Arc::new).map_err(ConnectionError::NoEvent)
}

impl ConnectionError {
    /// Whether the front end can be told that its message failed, and go on. The others leave nobody to tell, or nothing
    /// that could go on.
    fn may_be_answered(&self) -> bool {
        match self {
            Self::Session(_)
            | Self::Memory(_)
            | Self::Log(_)
            | Self::Ring(_)
            | Self::Inflight(_)
            | Self::State(_)
            | Self::TableFull(_)
            | Self::MissingDescriptor
            | Self::NoEvent(_)
            | Self::NoPostcopy(_)
            | Self::SharedBefore
            | Self::Unfinished
            | Self::InTheWay(_) => true,
            Self::Socket(_) | Self::Decode(_) | Self::WentAway | Self::DiskGone => false,
        }
    }
}
