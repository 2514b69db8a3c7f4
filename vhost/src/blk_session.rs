//! The data side of a session: a [`Consumer`] that serves the rings of one front end.
//!
//! Control tells it what to do through a mailbox; every [`Command`] is answered, so that what control acknowledges to the
//! front end has happened. Control waits for one answer before it gives the next command.
//!
//! A ring is in one of these states, and moves only so:
//!
//! | state | may become | by |
//! | --- | --- | --- |
//! | empty | running, disabled | `Start` |
//! | running | disabled; draining; broken | `Enable`; `Stop`; a fault |
//! | disabled | running; draining | `Enable`; `Stop` |
//! | broken | draining | `Stop` |
//! | draining | empty | its last request |
//!
//! A disabled ring is left alone (vhost-user, "Ring states": for a block device, requests stay pending). A broken one goes on
//! finishing what it has; control closes the connection. After `Abandon` no guest memory is touched again: what is in flight
//! ends unseen, because a front end that comes back will submit it anew. A session whose guest memory was taken away under its
//! mapping, or whose front end has made the reactor wait, abandons itself: before it tells the guest of what it could not write,
//! and before it waits again.

use std::sync::Arc;

use resilver_bdev::{Completion, Consumer, IoKind, IoStats, Port, Reply, SEGMENTS_MAX};
use resilver_reactor::{Armed, Context, Doorbell, Receiver, Sender, Watch, Work, mailbox};
use resilver_sys::{BufferSlice, EventFd, TableFull, WaitSet, incidents};

use crate::blk::{CacheMode, RequestError, Serial};
use crate::chain::Chain;
use crate::dirty_log::DirtyLog;
use crate::memory::GuestMemory;
use crate::queue::{Ahead, LiveQueue, QUEUE_SHIFT, Retiring, Shared, Source};
use crate::ring::{RingAreas, RingFault};
use crate::stats::VhostStats;

/// Commands that wait: control gives one at a time, and one more when it gives up.
const COMMANDS: usize = 4;

/// Whether an enabled ring is meant (SET_VRING_ENABLE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enabled {
    /// Requests stay in the ring.
    No,
    /// Requests are served.
    Yes,
}

/// Which of a ring's descriptors is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notifier {
    /// The guest kicks.
    Kick,
    /// We interrupt.
    Call,
}

/// The answer to [`Command::SetMemory`]: the old map; or the new one, where the reactor has no room for its regions.
pub type MemoryReply = Reply<Result<Box<GuestMemory>, (TableFull, Box<GuestMemory>)>>;

/// What control tells a session.
pub enum Command {
    /// Serve a ring.
    Start {
        /// Which.
        queue: u16,
        /// The ring and its slots.
        live: Box<LiveQueue>,
        /// Whether it is enabled.
        enabled: Enabled,
        /// Done; or the ring back, where there is one already or no such ring.
        reply: Reply<Result<(), Box<LiveQueue>>>,
    },
    /// Stop serving a ring: answered when its last request has finished, which may take for ever. None: there is no such ring.
    Stop {
        /// Which.
        queue: u16,
        /// The ring, which knows where it stands.
        reply: Reply<Option<Box<LiveQueue>>>,
    },
    /// Enable or disable a ring.
    Enable {
        /// Which.
        queue: u16,
        /// What it is to be.
        enabled: Enabled,
        /// Done.
        reply: Reply<()>,
    },
    /// Change a descriptor of a ring that is being served.
    SetNotifier {
        /// Which ring.
        queue: u16,
        /// Which descriptor.
        which: Notifier,
        /// The new one.
        event: Option<Arc<EventFd>>,
        /// The old one, for control to close.
        reply: Reply<Option<Arc<EventFd>>>,
    },
    /// Change a ring's addresses while it is being served.
    MoveRing {
        /// Which.
        queue: u16,
        /// Where it is now.
        areas: RingAreas,
        /// Done.
        reply: Reply<()>,
    },
    /// Change the memory map, and with it where the rings are. New requests use the new map at once; answered, with the old
    /// map, when the last request that used that has finished.
    SetMemory {
        /// The new map.
        memory: Box<GuestMemory>,
        /// All rings that are being served, resolved in it.
        rings: Vec<(u16, RingAreas)>,
        /// Done.
        reply: MemoryReply,
    },
    /// All of guest memory has come: no page is looked for any more.
    Arrived(Reply<()>),
    /// Log what is written to guest memory from now on, here or no longer. Answered with the log before, which is written to
    /// no more.
    SetLog(Option<Box<DirtyLog>>, Reply<Option<Box<DirtyLog>>>),
    /// What completed writes promise from now on.
    SetCache(CacheMode, Reply<()>),
    /// The guest has reset its device.
    GuestReset(Reply<()>),
    /// The front end is gone. Answers how many requests the disk still has.
    Abandon(Reply<u32>),
}

/// How a session is set up.
pub struct SessionConfig {
    /// The most queues.
    pub num_queues: u16,
    /// Guests may not write.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: Serial,
    /// The controller's counters.
    pub stats: Arc<VhostStats>,
    /// Told of the first thing for which the session cannot go on.
    pub on_fault: Reply<SessionFault>,
}

/// Why a session cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionFault {
    /// A guest broke this ring.
    #[error("queue {0}: {1}")]
    Ring(u16, RingFault),
    /// The file behind guest memory, or behind its dirty log, was shortened after it was shared; or, in post-copy, what a request
    /// named changed while its pages came.
    #[error(
        "the front end has shortened the file behind its guest's memory or dirty log, or its guest has used memory that had not come"
    )]
    MemoryShrunk,
    /// Interrupting its guest has made the reactor wait.
    #[error("the front end's descriptor for interrupts of ring {0} made its writer wait")]
    InterruptStuck(u16),
    /// Telling it of what was written has.
    #[error("the front end's descriptor for its dirty log made its writer wait")]
    LogStuck,
}

/// A ring, as the table above has it.
enum Queue {
    Empty,
    Live { live: Box<LiveQueue>, phase: Phase },
}

impl Queue {
    fn is_stuck(&self) -> bool {
        matches!(self, Self::Live { live, .. } if live.is_stuck())
    }
}

enum Phase {
    Running,
    Disabled,
    Broken,
    Draining(Reply<Option<Box<LiveQueue>>>),
}

/// Where the session is in its life.
enum Life {
    Serving { on_fault: Option<Reply<SessionFault>> },
    Abandoned,
}

/// The data side of one session.
pub struct BlkSession {
    queues: Box<[Queue]>,
    /// Queues beyond this one are empty: what a turn looks at.
    used_queues: usize,
    shared: Shared,
    life: Life,
    /// The guest has reset its device, and the disk has not been told.
    reset: Option<Reply<()>>,
    /// Of [`incidents`], those after which this session was looked at. None: it is to be.
    incidents: Option<usize>,
    commands: Receiver<Command>,
}

impl BlkSession {
    /// A session without memory and rings, and the way to tell it more. `doorbell` is its reactor's.
    #[must_use]
    pub fn new(config: SessionConfig, doorbell: Arc<Doorbell>) -> (Self, Sender<Command>) {
        let (sender, commands) = mailbox(COMMANDS, doorbell);
        let SessionConfig { num_queues, read_only, serial, stats, on_fault } = config;
        let shared = Shared {
            memory: Box::default(),
            retiring: None,
            log: None,
            epoch: 0,
            cache: CacheMode::WriteThrough,
            read_only,
            serial,
            stats,
            chain: Chain::default(),
            ahead: Ahead::default(),
            scratch: Box::new([BufferSlice::EMPTY; SEGMENTS_MAX]),
        };
        let session = Self {
            queues: (0..num_queues).map(|_| Queue::Empty).collect(),
            used_queues: 0,
            shared,
            life: Life::Serving { on_fault: Some(on_fault) },
            reset: None,
            incidents: None,
            commands,
        };
        (session, sender)
    }

    fn take(&mut self, cx: &Context<'_>, command: Command) {
        match command {
            Command::Start { queue, live, enabled, reply } => {
                reply(self.start(queue, live, enabled));
            }
            Command::Stop { queue, reply } => self.stop(queue, reply),
            Command::Enable { queue, enabled, reply } => {
                if let Some(Queue::Live { phase, .. }) = self.queues.get_mut(usize::from(queue)) {
                    enable(phase, enabled);
                }
                reply(());
            }
            Command::SetNotifier { queue, which, event, reply } => {
                reply(match (self.live(queue), which) {
                    (Some(live), Notifier::Kick) => live.set_kick(event),
                    (Some(live), Notifier::Call) => live.set_call(event),
                    (None, Notifier::Kick | Notifier::Call) => event,
                });
            }
            Command::MoveRing { queue, areas, reply } => {
                self.move_ring(queue, areas);
                reply(());
            }
            Command::SetMemory { memory, rings, reply } => {
                self.set_memory(cx, memory, rings, reply);
            }
            Command::Arrived(reply) => {
                self.arrived();
                reply(());
            }
            Command::SetLog(log, reply) => {
                self.incidents = None;
                reply(std::mem::replace(&mut self.shared.log, log));
            }
            Command::SetCache(cache, reply) => {
                self.shared.cache = cache;
                reply(());
            }
            Command::GuestReset(reply) => self.reset = Some(reply),
            Command::Abandon(reply) => {
                self.abandon();
                reply(self.in_flight());
            }
        }
    }

    fn live(&mut self, queue: u16) -> Option<&mut LiveQueue> {
        match self.queues.get_mut(usize::from(queue))? {
            Queue::Live { live, .. } => Some(live),
            Queue::Empty => None,
        }
    }

    fn move_ring(&mut self, queue: u16, areas: RingAreas) {
        if let Some(Queue::Live { live, .. }) = self.queues.get_mut(usize::from(queue)) {
            live.move_to(areas, self.shared.log.as_deref());
        }
    }

    fn start(
        &mut self,
        queue: u16,
        mut live: Box<LiveQueue>,
        enabled: Enabled,
    ) -> Result<(), Box<LiveQueue>> {
        let index = usize::from(queue);
        let slot = self.queues.get_mut(index).filter(|queue| matches!(queue, Queue::Empty));
        let Some(slot) = slot else { return Err(live) };
        live.start(self.shared.log.as_deref());
        let phase = if enabled == Enabled::Yes { Phase::Running } else { Phase::Disabled };
        *slot = Queue::Live { live, phase };
        self.used_queues = self.used_queues.max(index + 1);
        Ok(())
    }

    fn stop(&mut self, queue: u16, reply: Reply<Option<Box<LiveQueue>>>) {
        match self.queues.get_mut(usize::from(queue)) {
            Some(Queue::Live { phase, .. }) if !matches!(phase, Phase::Draining(_)) => {
                *phase = Phase::Draining(reply);
            }
            Some(_) | None => reply(None),
        }
    }

    fn set_memory(
        &mut self,
        cx: &Context<'_>,
        mut memory: Box<GuestMemory>,
        rings: Vec<(u16, RingAreas)>,
        reply: MemoryReply,
    ) {
        if let Err(full) = memory.enter(cx.memory, &self.shared.memory) {
            return reply(Err((full, memory)));
        }
        self.incidents = None;
        for (queue, areas) in rings {
            self.move_ring(queue, areas);
        }
        let requests = self.live_queues().map(|live| u32::from(live.in_use())).sum();
        self.shared.epoch = self.shared.epoch.wrapping_add(1);
        let memory = std::mem::replace(&mut self.shared.memory, memory);
        self.shared.retiring = Some(Retiring { memory, requests, reply });
        self.advance_retiring(cx);
    }

    fn arrived(&mut self) {
        self.shared.memory.arrived();
        for queue in &mut self.queues {
            if let Queue::Live { live, .. } = queue {
                live.arrived();
            }
        }
    }

    /// Closes the regions of an earlier map when nothing uses them any more.
    fn advance_retiring(&mut self, cx: &Context<'_>) {
        if let Some(Retiring { memory, reply, .. }) =
            self.shared.retiring.take_if(|retiring| retiring.requests == 0)
        {
            memory.leave(cx.memory, &self.shared.memory);
            reply(Ok(memory));
        }
    }

    fn abandon(&mut self) {
        self.life = Life::Abandoned;
        for queue in &mut self.queues {
            if let Queue::Live { live, .. } = queue {
                live.abandon(&mut self.shared);
            }
        }
    }

    /// Abandons the guest if its front end has taken memory away or made a writer wait.
    #[inline]
    fn look_for_incidents(&mut self) {
        let now = Some(incidents());
        if now != self.incidents {
            self.incidents = now;
            self.judge_incidents();
        }
    }

    #[cold]
    fn judge_incidents(&mut self) {
        let Shared { memory, log, retiring, .. } = &self.shared;
        let log = log.as_deref();
        let lost = memory.has_shrunk()
            || retiring.as_ref().is_some_and(|it| it.memory.has_shrunk())
            || log.is_some_and(DirtyLog::has_shrunk);
        let stuck =
            || (0..).zip(&self.queues).find_map(|(queue, it)| it.is_stuck().then_some(queue));
        let fault = if lost {
            SessionFault::MemoryShrunk
        } else if let Some(queue) = stuck() {
            SessionFault::InterruptStuck(queue)
        } else if log.is_some_and(DirtyLog::is_stuck) {
            SessionFault::LogStuck
        } else {
            return;
        };
        if let Life::Serving { on_fault } = &mut self.life
            && let Some(tell) = on_fault.take()
        {
            tell(fault);
        }
        self.abandon();
    }

    fn live_queues(&self) -> impl Iterator<Item = &LiveQueue> {
        self.queues.iter().filter_map(|queue| match queue {
            Queue::Live { live, .. } => Some(&**live),
            Queue::Empty => None,
        })
    }

    /// Serves one ring for a turn.
    #[inline]
    fn serve(&mut self, cx: &Context<'_>, port: &mut Port<'_>, index: usize) -> usize {
        let Some(Queue::Live { live, phase }) = self.queues.get_mut(index) else { return 0 };
        #[allow(clippy::cast_possible_truncation)] // at most QUEUES_MAX
        let queue = index as u32;
        let moved =
            if live.in_use() > 0 { live.pump(cx, &mut self.shared, port, queue) } else { 0 };
        // While the disk is held requests stay in the ring.
        let room = port.free(IoKind::Read) > 0 || port.free(IoKind::Write) > 0;
        let source = match phase {
            _ if !room => return moved,
            Phase::Running if live.owed() == 0 => Source::Ring,
            // A ring that stops ends what an earlier session has left it, or nobody would.
            Phase::Running | Phase::Draining(_) => Source::Owed,
            Phase::Disabled | Phase::Broken => return moved,
        };
        let fetched = if self.shared.memory.is_arriving() {
            live.fetch_arriving(cx, &mut self.shared, port, queue, source)
        } else {
            live.fetch(cx, &mut self.shared, port, queue, source)
        };
        match fetched {
            Ok(fetched) => moved + fetched,
            Err(fault) => {
                live.break_off();
                if matches!(phase, Phase::Running) {
                    *phase = Phase::Broken;
                }
                if let Life::Serving { on_fault } = &mut self.life
                    && let Some(tell) = on_fault.take()
                {
                    #[allow(clippy::cast_possible_truncation)] // at most QUEUES_MAX
                    tell(SessionFault::Ring(index as u16, fault));
                }
                moved + 1
            }
        }
    }
}

/// What SET_VRING_ENABLE does to a ring's state.
fn enable(phase: &mut Phase, enabled: Enabled) {
    match (&*phase, enabled) {
        (Phase::Running, Enabled::No) => *phase = Phase::Disabled,
        (Phase::Disabled, Enabled::Yes) => *phase = Phase::Running,
        (Phase::Running, Enabled::Yes)
        | (Phase::Disabled, Enabled::No)
        | (Phase::Broken | Phase::Draining(_), Enabled::No | Enabled::Yes) => {}
    }
}

impl Consumer for BlkSession {
    fn poll(&mut self, cx: &Context<'_>, port: &mut Port<'_>) -> Work {
        let mut moved = 0;
        // Before a command exchanges what made the reactor wait.
        if matches!(self.life, Life::Serving { .. }) {
            self.look_for_incidents();
        }
        while let Some(command) = self.commands.receive() {
            self.take(cx, command);
            moved += 1;
        }
        if let Some(reply) = self.reset.take() {
            port.guest_reset();
            reply(());
        }
        if matches!(self.life, Life::Serving { .. }) {
            self.look_for_incidents();
        }
        if matches!(self.life, Life::Serving { .. }) {
            for index in 0..self.used_queues {
                moved += self.serve(cx, port, index);
            }
        }
        Work::from_count(moved)
    }

    fn complete(&mut self, cx: &Context<'_>, completion: Completion, stats: &IoStats) {
        let tag = completion.tag.0;
        let (queue, slot) = (tag >> QUEUE_SHIFT, tag & ((1 << QUEUE_SHIFT) - 1));
        let Some(Queue::Live { live, .. }) = self.queues.get_mut(queue as usize) else { return };
        #[allow(clippy::cast_possible_truncation)] // 16 bits
        let slot = slot as u16;
        match self.life {
            Life::Serving { .. } => {
                let result = completion.result.map_err(RequestError::Backend);
                live.complete(cx, &mut self.shared, slot, result, stats);
            }
            Life::Abandoned => live.complete_abandoned(&mut self.shared, slot),
        }
    }

    fn publish(&mut self, cx: &Context<'_>) {
        if matches!(self.life, Life::Serving { .. }) {
            self.look_for_incidents();
        }
        if matches!(self.life, Life::Abandoned) {
            return self.advance_retiring(cx);
        }
        for queue in self.queues.iter_mut().take(self.used_queues) {
            let Queue::Live { live, phase } = queue else { continue };
            live.publish(&self.shared);
            if matches!(phase, Phase::Draining(_))
                && live.in_use() == 0
                && live.owed() == 0
                // It is looked at first.
                && !live.is_stuck()
                && let Queue::Live { live, phase: Phase::Draining(reply) } =
                    std::mem::replace(queue, Queue::Empty)
            {
                reply(Some(live));
            }
        }
        if let Some(log) = &self.shared.log {
            log.tell();
        }
        self.advance_retiring(cx);
    }

    fn in_flight(&self) -> u32 {
        self.live_queues().map(LiveQueue::outstanding).sum()
    }

    fn detach(&mut self, cx: &Context<'_>) {
        let nothing = GuestMemory::default();
        if let Some(retiring) = self.shared.retiring.take() {
            retiring.memory.leave(cx.memory, &self.shared.memory);
        }
        self.shared.memory.leave(cx.memory, &nothing);
    }

    /// Rings that are being served; any other changes by a command, if nothing of it waits for room on the disk. Where memory is on its
    /// way a ring's may be missing.
    fn watch(&self, watch: &mut Watch) {
        if matches!(self.life, Life::Abandoned) {
            return;
        }
        if self.shared.memory.is_arriving() {
            return watch.give_up();
        }
        for queue in self.queues.iter().take(self.used_queues) {
            match queue {
                Queue::Live { live, .. } if live.in_use() > 0 => watch.give_up(),
                Queue::Live { phase: Phase::Draining(_), .. } => watch.give_up(),
                Queue::Live { live, phase: Phase::Running } => live.watch(watch),
                Queue::Live { phase: Phase::Disabled | Phase::Broken, .. } | Queue::Empty => {}
            }
        }
    }

    fn arm(&mut self, _cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if !self.commands.is_empty() {
            return Armed::Ready;
        }
        let mut armed = Armed::Until(None);
        if matches!(self.life, Life::Abandoned) {
            return armed;
        }
        for queue in self.queues.iter_mut().take(self.used_queues) {
            if let Queue::Live { live, phase: Phase::Running } = queue {
                armed = armed.and(live.arm(&self.shared, set));
            }
        }
        armed
    }

    fn disarm(&mut self, _cx: &Context<'_>) {
        if matches!(self.life, Life::Abandoned) {
            return;
        }
        for queue in self.queues.iter_mut().take(self.used_queues) {
            if let Queue::Live { live, .. } = queue {
                live.disarm(&self.shared);
            }
        }
    }
}

#[cfg(test)]
mod tests;
