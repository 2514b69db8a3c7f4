//! The disk: what a reactor polls for one bdev that is in use.
//!
//! A disk owns the root channel, the consumers that submit to it and, while one runs, the block job above it. A turn lets
//! every consumer fetch and submit, commits once, collects completions, hands each to its consumer, and lets consumers
//! publish. An I/O on memory thus begins and ends in one turn.
//!
//! **The gate.** Whatever changes the graph is a hold: the gate closes ([`Port::free`] answers 0, so requests stay in
//! their rings), the root drains, the change is made, the gate opens. A hold has a deadline; one that does not drain by
//! then is undone with a reason and nothing has changed.
//!
//! **Leaving.** A consumer that goes while its I/O hangs stays here, unpolled, until the last completion: its memory is
//! leased until then. Channels that a job released are polled the same way until they are empty.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam::queue::ArrayQueue;
use resilver_reactor::{
    Armed, Context, Doorbell, Nanos, Poller, Receiver, Sender, Watch, Work, mailbox,
};
use resilver_sys::{BufferSlice, RegionId, WaitSet};

use crate::channel::{CompletionBatch, IoChannel, Limits};
use crate::dirty_bitmap::DirtyBitmap;
use crate::io::{BdevIo, Completion, IoKind, Tag};
use crate::job::{
    BlockJob, Commit, JobEvent, JobInfo, JobVerb, JobWants, Scan, ScanReport, Side, VerbError,
};
use crate::stats::IoStats;

/// Consumers of one disk: controllers times sessions, two at once during a live migration.
pub const CONSUMERS_MAX: usize = 16;
/// Completions handled in one turn.
const BATCH: usize = 256;
/// Commands that wait for one disk.
const COMMANDS: usize = 64;
/// Events that wait for control. A job keeps what does not fit.
const EVENTS: usize = 64;
/// Places among them that only the end of a job may take.
const EVENTS_RESERVED: usize = 2;
/// Released channels that may still have I/O in flight.
const RELEASING: usize = 16;
/// I/Os of each kind that the root channel of a disk is opened for.
pub const DISK_DEPTH: u32 = 256;
/// Where the consumer's index begins in a [`Tag`].
const TAG_SHIFT: u32 = 24;
/// The slots that a consumer may name in a [`Tag`].
pub const CONSUMER_SLOTS: u32 = 1 << TAG_SHIFT;
/// How long a hold may take unless the operator says otherwise.
pub const HOLD_DEADLINE: Nanos = Nanos::from_secs(1);
/// How long a job that could not be dissolved rests before the next hold.
const HOLD_AGAIN: Nanos = Nanos::from_millis(200);

/// A consumer of a disk, named by control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConsumerId(pub u64);

/// An answer to a control thread. Called on the reactor's thread, once; it should only pass the value on.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// The answer to a change of the graph: the channel that was replaced, or what was to replace it and why it could not.
pub type Exchange<T> = Reply<Result<Box<dyn IoChannel>, (HoldError, T)>>;

/// A hold that was undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// The disk did not drain.
    #[error(
        "the disk did not drain within {deadline}: {in_flight} requests are still in flight; nothing was changed; look for \
         a hung device below it and try again"
    )]
    TimedOut {
        /// I/O that did not end.
        in_flight: u32,
        /// How long was waited.
        deadline: Nanos,
    },
    /// Another hold is under way.
    #[error("the disk's graph is being changed already; try again")]
    Busy,
    /// A job is above the disk and this change is not possible under it.
    #[error("a block job is running on the disk; cancel or complete it first")]
    JobRunning,
}

/// Something that submits I/O to a disk: the data side of a vhost session.
pub trait Consumer: Send {
    /// Fetches requests and submits them, as far as [`Port::free`] allows; takes its own messages.
    fn poll(&mut self, cx: &Context<'_>, port: &mut Port<'_>) -> Work;

    /// One of its I/Os has ended. The tag is the consumer's own. Records the I/O in `stats`.
    fn complete(&mut self, cx: &Context<'_>, completion: Completion, stats: &IoStats);

    /// The turn's completions are all in: publish them, notify once.
    fn publish(&mut self, cx: &Context<'_>);

    /// I/O submitted and not completed.
    fn in_flight(&self) -> u32;

    /// Called on the reactor's thread when it has moved in.
    fn attach(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    /// Called on the reactor's thread before it moves out; nothing is in flight.
    fn detach(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    /// As [`Poller::watch`]: adds what could give it work.
    fn watch(&self, watch: &mut Watch) {
        watch.give_up();
    }

    /// As [`Poller::arm`].
    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed;

    /// As [`Poller::disarm`].
    fn disarm(&mut self, cx: &Context<'_>);
}

/// A consumer's way to the disk for the length of a poll.
pub struct Port<'a> {
    root: &'a mut dyn IoChannel,
    limits: &'a Limits,
    index: usize,
    open: bool,
    submitted: &'a mut u32,
    reset: &'a mut bool,
    bitmaps: &'a [Arc<DirtyBitmap>],
}

impl Port<'_> {
    /// What the disk accepts. May differ from one poll to the next, after a resize.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        self.limits
    }

    /// How many more I/Os of this kind may be submitted now; none while the disk is held.
    #[inline]
    #[must_use]
    pub fn free(&self, kind: IoKind) -> u32 {
        if self.open { self.root.free(kind) } else { 0 }
    }

    /// Submits one I/O whose tag is below [`CONSUMER_SLOTS`]. Requires `free(io.kind) > 0` and [`Limits::admits`].
    #[inline]
    pub fn submit(&mut self, cx: &Context<'_>, mut io: BdevIo, payload: &[BufferSlice]) {
        debug_assert!(io.tag.0 < CONSUMER_SLOTS && self.limits.admits(&io));
        #[allow(clippy::cast_possible_truncation)] // index < CONSUMERS_MAX
        let index = self.index as u32;
        io.tag = Tag(index << TAG_SHIFT | io.tag.0);
        *self.submitted += 1;
        if io.kind.mutates() {
            for bitmap in self.bitmaps {
                bitmap.mark(io.offset, io.length);
            }
        }
        self.root.submit(cx, io, payload);
    }

    /// Says that the guest has reset the device: a job may have a policy for that. A front end that goes is no reset: it may
    /// come back, and in a live migration it does so elsewhere.
    pub fn guest_reset(&mut self) {
        *self.reset = true;
    }
}

/// How a job is started.
pub struct StartJob {
    /// The job, with channels of its own to all its disks.
    pub job: Box<dyn BlockJob>,
    /// Counters that apply if the job ends on its target.
    pub target_stats: Arc<IoStats>,
    /// Bitmaps that record from then on, if the job ends on its target.
    pub target_bitmaps: Vec<Arc<DirtyBitmap>>,
    /// Who looks for holes in the source.
    pub scan: Scan,
    /// How long the disk may take to drain.
    pub deadline: Nanos,
    /// The root channel that the job replaced, or the job back and the reason.
    pub reply: Exchange<Box<dyn BlockJob>>,
}

/// How a root channel is replaced, after a resize.
pub struct ReplaceRoot {
    /// The new channel.
    pub root: Box<dyn IoChannel>,
    /// How long the disk may take to drain.
    pub deadline: Nanos,
    /// The old channel, or the new one back and the reason.
    pub reply: Exchange<Box<dyn IoChannel>>,
}

/// What control tells a disk.
pub enum DiskCommand {
    /// A consumer moves in. It is handed back if there is no room.
    AddConsumer(ConsumerId, Box<dyn Consumer>, Reply<Result<(), Box<dyn Consumer>>>),
    /// A consumer is to leave; it comes back when nothing of it is in flight, which may take for ever. None: no such consumer.
    RemoveConsumer(ConsumerId, Reply<Option<Box<dyn Consumer>>>),
    /// Put a job above the disk.
    StartJob(StartJob),
    /// Change the root channel.
    ReplaceRoot(ReplaceRoot),
    /// Hold the disk until [`DiskCommand::Release`]: the answer comes when it has drained.
    Hold {
        /// Whether control knows a job above the disk. If the disk knows better (a job has just ended), it is not held: control
        /// would go on with what is no longer there.
        under_job: bool,
        /// How long the disk may take to drain.
        deadline: Nanos,
        /// The answer.
        reply: Reply<Result<(), HoldError>>,
    },
    /// Let a disk go on that is held, or about to be; these bitmaps record from now on, if any are given.
    Release(Option<Vec<Arc<DirtyBitmap>>>),
    /// Tell the job something.
    Verb(JobVerb, Reply<Result<(), VerbError>>),
    /// Ask about the job; none if there is none.
    Query(Reply<Option<JobInfo>>),
    /// A part of the source's allocation map, for the job.
    Scanned(Scan, ScanReport),
    /// The answer to [`JobEvent::CommitRequest`].
    Committed(Commit),
    /// The answer to [`JobEvent::RetractRequest`].
    Retracted(bool),
}

/// What a disk tells control.
#[allow(clippy::large_enum_variant)] // sent once a job; a box would be allocated on the reactor
pub enum DiskEvent {
    /// From the job.
    Job(JobEvent),
    /// The job has ended and the disk goes on with one of its legs.
    JobEnded {
        /// Which leg.
        side: Side,
        /// The last word about the job.
        info: JobInfo,
        /// Channels that still have I/O in flight; each comes as [`DiskEvent::Released`] when it is empty.
        releasing: usize,
    },
    /// A channel that a job had is empty now and may be closed.
    Released(Box<dyn IoChannel>),
}

impl fmt::Debug for DiskEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Job(event) => event.fmt(f),
            Self::JobEnded { side, info, releasing } => f
                .debug_struct("JobEnded")
                .field("side", side)
                .field("status", &info.status)
                .field("releasing", releasing)
                .finish(),
            Self::Released(_) => f.write_str("Released"),
        }
    }
}

/// The way from a disk to control.
struct Outbox {
    queue: ArrayQueue<DiskEvent>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Outbox {
    /// Whether a job may add an event. The last [`EVENTS_RESERVED`] places are for what happens once: the end of the job,
    /// the channels it released.
    fn has_room(&self) -> bool {
        self.queue.len() + EVENTS_RESERVED < self.queue.capacity()
    }

    fn push(&self, event: DiskEvent) {
        // Callers asked for room, and the disk is the one sender; so nothing is ever lost here.
        let lost = self.queue.push(event).is_err();
        debug_assert!(!lost, "a disk's outbox overflows");
        (self.wake)();
    }
}

/// Control's side of a disk; cheap to clone.
#[derive(Clone)]
pub struct DiskHandle {
    commands: Sender<DiskCommand>,
    outbox: Arc<Outbox>,
    left: Arc<AtomicU32>,
}

impl fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskHandle").field("commands", &self.commands).finish_non_exhaustive()
    }
}

impl DiskHandle {
    /// Sends a command. If the disk does not keep up, it comes back.
    ///
    /// # Errors
    /// The mailbox is full; here is the command.
    pub fn send(&self, command: DiskCommand) -> Result<(), Box<DiskCommand>> {
        self.commands.send(command).map_err(|full| Box::new(full.0))
    }

    /// What wakes the disk's reactor, for mailboxes of consumers.
    #[must_use]
    pub fn doorbell(&self) -> Arc<Doorbell> {
        self.commands.doorbell()
    }

    /// I/O in flight of consumers that are leaving: late writes of who is gone may still land.
    #[must_use]
    pub fn left_in_flight(&self) -> u32 {
        self.left.load(Ordering::Acquire)
    }

    /// The oldest event that control has not seen.
    #[must_use]
    pub fn next_event(&self) -> Option<DiskEvent> {
        self.outbox.queue.pop()
    }
}

/// What is at the top of the tree.
enum Root {
    /// The bdev's own channel.
    Plain(Box<dyn IoChannel>),
    /// A job above it.
    Job(Box<dyn BlockJob>),
    /// Being exchanged: never seen between turns.
    Nothing,
}

/// What a hold is for.
enum Hold {
    Start(StartJob),
    Replace(ReplaceRoot),
    Dissolve,
    UntilReleased(Reply<Result<(), HoldError>>),
}

/// Whether consumers may submit.
enum Gate {
    Open,
    Closed {
        hold: Hold,
        since: Nanos,
        deadline: Nanos,
    },
    /// Drained, and control is at work.
    Held,
}

/// Where a consumer is in its life.
enum Stay {
    Here,
    Leaving(Reply<Option<Box<dyn Consumer>>>),
}

struct Guest {
    id: ConsumerId,
    consumer: Box<dyn Consumer>,
    in_flight: u32,
    stay: Stay,
}

/// One bdev in use, as a reactor polls it.
pub struct Disk {
    root: Root,
    /// What consumers may ask: the root's limits, with the capacity that the guest knows.
    exposed: Limits,
    gate: Gate,
    guests: [Option<Guest>; CONSUMERS_MAX],
    /// Places beyond this one are empty: what a turn looks at.
    used_places: usize,
    /// I/O of guests that are leaving, as control sees it; and as it was last said.
    left: Arc<AtomicU32>,
    known_left: u32,
    releasing: Vec<Box<dyn IoChannel>>,
    commands: Receiver<DiskCommand>,
    outbox: Arc<Outbox>,
    done: CompletionBatch,
    stats: Arc<IoStats>,
    /// Counters that apply if the job ends on its target.
    target_stats: Option<Arc<IoStats>>,
    /// What records writes, and what will if the job ends on its target.
    bitmaps: Vec<Arc<DirtyBitmap>>,
    target_bitmaps: Vec<Arc<DirtyBitmap>>,
    /// The scan of the job's source.
    scan: Option<Scan>,
    /// A job whose hold was undone rests until then.
    hold_not_before: Nanos,
}

impl Disk {
    /// A disk over `root`, for the reactor that sleeps behind `doorbell`. `wake` is called on the reactor's thread when there
    /// is an event for control.
    #[must_use]
    pub fn new(
        root: Box<dyn IoChannel>,
        stats: Arc<IoStats>,
        doorbell: Arc<Doorbell>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Self, DiskHandle) {
        let (sender, commands) = mailbox(COMMANDS, doorbell);
        let outbox = Arc::new(Outbox { queue: ArrayQueue::new(EVENTS), wake: Box::new(wake) });
        let left = Arc::new(AtomicU32::new(0));
        let handle =
            DiskHandle { commands: sender, outbox: Arc::clone(&outbox), left: Arc::clone(&left) };
        let disk = Self {
            exposed: *root.limits(),
            root: Root::Plain(root),
            gate: Gate::Open,
            guests: std::array::from_fn(|_| None),
            used_places: 0,
            left,
            known_left: 0,
            releasing: Vec::with_capacity(RELEASING),
            commands,
            outbox,
            done: CompletionBatch::with_capacity(BATCH),
            stats,
            target_stats: None,
            bitmaps: Vec::new(),
            target_bitmaps: Vec::new(),
            scan: None,
            hold_not_before: Nanos::ZERO,
        };
        (disk, handle)
    }

    /// The same, with bitmaps that record what is written.
    #[must_use]
    pub fn with_bitmaps(mut self, bitmaps: Vec<Arc<DirtyBitmap>>) -> Self {
        self.bitmaps = bitmaps;
        self
    }

    /// Carries out one command.
    fn take(&mut self, cx: &Context<'_>, command: DiskCommand) {
        match command {
            DiskCommand::AddConsumer(id, mut consumer, reply) => {
                let free = self.guests.iter().position(Option::is_none);
                let Some(place) = free else { return reply(Err(consumer)) };
                consumer.attach(cx);
                self.guests[place] = Some(Guest { id, consumer, in_flight: 0, stay: Stay::Here });
                self.used_places = self.used_places.max(place + 1);
                reply(Ok(()));
            }
            DiskCommand::RemoveConsumer(id, reply) => {
                let here = |guest: &&mut Guest| guest.id == id && matches!(guest.stay, Stay::Here);
                match self.guests.iter_mut().flatten().find(here) {
                    Some(guest) => guest.stay = Stay::Leaving(reply),
                    None => reply(None),
                }
            }
            DiskCommand::StartJob(start) => match self.may_hold() {
                Err(error) => (start.reply)(Err((error, start.job))),
                Ok(()) => self.close(cx, start.deadline, Hold::Start(start)),
            },
            DiskCommand::ReplaceRoot(replace) => match self.may_hold() {
                Err(error) => (replace.reply)(Err((error, replace.root))),
                Ok(()) => self.close(cx, replace.deadline, Hold::Replace(replace)),
            },
            DiskCommand::Hold { under_job, deadline, reply } => match (&self.gate, &self.root) {
                (Gate::Open, root) if matches!(root, Root::Job(_)) == under_job => {
                    self.close(cx, deadline, Hold::UntilReleased(reply));
                }
                _ => reply(Err(HoldError::Busy)),
            },
            DiskCommand::Release(bitmaps) => {
                self.bitmaps = bitmaps.unwrap_or(std::mem::take(&mut self.bitmaps));
                if matches!(
                    self.gate,
                    Gate::Held | Gate::Closed { hold: Hold::UntilReleased(_), .. }
                ) {
                    self.gate = Gate::Open;
                }
            }
            DiskCommand::Verb(verb, reply) => reply(match &mut self.root {
                Root::Job(job) => job.verb(cx, verb),
                Root::Plain(_) | Root::Nothing => Err(VerbError::NotFound { job: String::new() }),
            }),
            DiskCommand::Query(reply) => reply(match &self.root {
                Root::Job(job) => Some(job.info(cx.now)),
                Root::Plain(_) | Root::Nothing => None,
            }),
            DiskCommand::Scanned(scan, report) => {
                if self.scan.as_ref().is_some_and(|of_job| of_job.is(&scan)) {
                    self.with_job(|job| job.scanned(cx, report));
                }
            }
            DiskCommand::Committed(record) => self.with_job(|job| job.committed(cx, record)),
            DiskCommand::Retracted(done) => self.with_job(|job| job.retracted(cx, done)),
        }
    }

    fn with_job(&mut self, tell: impl FnOnce(&mut dyn BlockJob)) {
        if let Root::Job(job) = &mut self.root {
            tell(job.as_mut());
        }
    }

    /// Whether control may change the graph now.
    fn may_hold(&self) -> Result<(), HoldError> {
        match (&self.gate, &self.root) {
            (Gate::Closed { .. } | Gate::Held, _) => Err(HoldError::Busy),
            (Gate::Open, Root::Job(_)) => Err(HoldError::JobRunning),
            (Gate::Open, Root::Plain(_) | Root::Nothing) => Ok(()),
        }
    }

    fn close(&mut self, cx: &Context<'_>, length: Nanos, hold: Hold) {
        self.gate = Gate::Closed { hold, since: cx.now, deadline: cx.now + length };
    }

    /// Moves a hold on: the change if the root has drained, its undoing if the deadline has passed.
    fn advance_hold(&mut self, cx: &Context<'_>) {
        let Gate::Closed { deadline, since, .. } = &self.gate else { return };
        let (length, late) = (*deadline - *since, cx.now >= *deadline);
        let in_flight = root_channel(&mut self.root).map_or(0, |root| root.in_flight());
        // A job may have changed its mind while the disk drained: what it waited for can have failed.
        let moot = matches!(
            (&self.gate, &self.root),
            (Gate::Closed { hold: Hold::Dissolve, .. }, Root::Job(job)) if job.wants() == JobWants::Nothing
        );
        if moot {
            self.gate = Gate::Open;
            return;
        }
        if in_flight > 0 && !late {
            return;
        }
        let Gate::Closed { hold, .. } = std::mem::replace(&mut self.gate, Gate::Open) else {
            return;
        };
        if in_flight > 0 {
            self.undo(cx, hold, in_flight, length);
        } else {
            self.change(cx, hold);
        }
    }

    fn undo(&mut self, cx: &Context<'_>, hold: Hold, in_flight: u32, deadline: Nanos) {
        let error = HoldError::TimedOut { in_flight, deadline };
        match hold {
            Hold::Start(start) => (start.reply)(Err((error, start.job))),
            Hold::Replace(replace) => (replace.reply)(Err((error, replace.root))),
            Hold::UntilReleased(reply) => reply(Err(error)),
            Hold::Dissolve => {
                self.hold_not_before = cx.now + HOLD_AGAIN;
                self.with_job(|job| job.hold_failed(cx, in_flight));
            }
        }
    }

    /// Changes the graph. Nothing is in flight at the root.
    fn change(&mut self, cx: &Context<'_>, hold: Hold) {
        let hold = match hold {
            Hold::UntilReleased(reply) => {
                self.gate = Gate::Held;
                return reply(Ok(()));
            }
            other => other,
        };
        match (hold, std::mem::replace(&mut self.root, Root::Nothing)) {
            (Hold::Start(mut start), Root::Plain(mut old)) => {
                old.detach(cx);
                start.job.attach(cx);
                self.exposed = same_geometry(start.job.limits(), &self.exposed);
                self.target_stats = Some(start.target_stats);
                self.target_bitmaps = start.target_bitmaps;
                self.scan = Some(start.scan);
                self.root = Root::Job(start.job);
                (start.reply)(Ok(old));
            }
            (Hold::Replace(mut replace), Root::Plain(mut old)) => {
                old.detach(cx);
                replace.root.attach(cx);
                self.exposed = replace.root.limits().in_blocks_of(self.exposed.block_size);
                self.root = Root::Plain(replace.root);
                (replace.reply)(Ok(old));
            }
            (Hold::Dissolve, Root::Job(job)) => self.dissolve(cx, job),
            // A hold is only closed over the root it fits (may_hold, and Dissolve by the job itself).
            (Hold::Start(_) | Hold::Replace(_) | Hold::Dissolve | Hold::UntilReleased(_), root) => {
                self.root = root
            }
        }
    }

    fn dissolve(&mut self, cx: &Context<'_>, job: Box<dyn BlockJob>) {
        let crate::job::Dissolved { survivor, released, regions, side, info } = job.dissolve(cx);
        self.scan.take().iter().for_each(Scan::stop);
        let target_stats = self.target_stats.take();
        if let (Side::Target, Some(stats)) = (side, target_stats) {
            self.stats = stats;
            self.bitmaps = std::mem::take(&mut self.target_bitmaps);
        }
        self.exposed = same_geometry(survivor.limits(), &self.exposed);
        self.root = Root::Plain(survivor);
        remove_regions(cx, &regions);
        let releasing = released.len();
        self.releasing.extend(released);
        self.outbox.push(DiskEvent::JobEnded { side, info, releasing });
    }

    /// Passes the job's events on and does what it wants.
    fn serve_job(&mut self, cx: &Context<'_>) {
        let Root::Job(job) = &mut self.root else { return };
        job.turn(cx);
        while self.outbox.has_room() {
            let Some(event) = job.take_event() else { break };
            self.outbox.push(DiskEvent::Job(event));
        }
        let wants = job.wants();
        let may = matches!(self.gate, Gate::Open)
            && cx.now >= self.hold_not_before
            && self.outbox.has_room();
        if wants == JobWants::Dissolve && may {
            self.close(cx, HOLD_DEADLINE, Hold::Dissolve);
        }
    }

    /// Polls released channels; those that are empty go back to control.
    fn poll_releasing(&mut self, cx: &Context<'_>) {
        let mut at = 0;
        while at < self.releasing.len() {
            let channel = &mut self.releasing[at];
            self.done.clear();
            channel.commit(cx);
            channel.poll(cx, &mut self.done);
            if channel.in_flight() == 0 && self.outbox.has_room() {
                let mut channel = self.releasing.swap_remove(at);
                channel.detach(cx);
                self.outbox.push(DiskEvent::Released(channel));
            } else {
                at += 1;
            }
        }
    }

    /// Lets every consumer fetch and submit; says whether anything moved.
    fn poll_guests(&mut self, cx: &Context<'_>) -> Work {
        let open = matches!(self.gate, Gate::Open);
        let Some(root) = root_channel(&mut self.root) else { return Work::Idle };
        let (mut work, mut reset) = (Work::Idle, false);
        for (index, slot) in self.guests.iter_mut().take(self.used_places).enumerate() {
            let Some(guest) = slot else { continue };
            if matches!(guest.stay, Stay::Leaving(_)) {
                continue;
            }
            let submitted = &mut guest.in_flight;
            let mut port = Port {
                root,
                limits: &self.exposed,
                index,
                open,
                submitted,
                reset: &mut reset,
                bitmaps: &self.bitmaps,
            };
            work = work.or(guest.consumer.poll(cx, &mut port));
        }
        root.commit(cx);
        if reset {
            self.with_job(|job| job.guest_reset(cx));
        }
        work
    }

    /// Collects completions and hands them out.
    fn poll_root(&mut self, cx: &Context<'_>) -> Work {
        let Some(root) = root_channel(&mut self.root) else { return Work::Idle };
        self.done.clear();
        root.poll(cx, &mut self.done);
        for completion in self.done.as_slice() {
            let index = (completion.tag.0 >> TAG_SHIFT) as usize;
            if let Some(Some(guest)) = self.guests.get_mut(index) {
                guest.in_flight -= 1;
                let tag = Tag(completion.tag.0 & (CONSUMER_SLOTS - 1));
                guest.consumer.complete(cx, Completion { tag, ..*completion }, &self.stats);
            }
        }
        Work::from_count(self.done.as_slice().len())
    }

    /// Lets consumers publish, and those go that leave with nothing in flight.
    fn publish(&mut self, cx: &Context<'_>) {
        let (mut left, mut leaves) = (0, false);
        for guest in self.guests.iter_mut().take(self.used_places).flatten() {
            guest.consumer.publish(cx);
            if matches!(guest.stay, Stay::Leaving(_)) {
                left += guest.in_flight;
                leaves = true;
            }
        }
        // Before the last of a consumer is handed back, so that who has it back sees that nothing is left.
        if left != self.known_left {
            self.known_left = left;
            self.left.store(left, Ordering::Release);
        }
        if leaves {
            self.let_go(cx);
        }
    }

    /// Hands back who leaves and has nothing in flight.
    fn let_go(&mut self, cx: &Context<'_>) {
        for slot in &mut self.guests {
            let gone =
                |guest: &mut Guest| guest.in_flight == 0 && matches!(guest.stay, Stay::Leaving(_));
            if let Some(Guest { mut consumer, stay, .. }) = slot.take_if(gone) {
                consumer.detach(cx);
                if let Stay::Leaving(reply) = stay {
                    reply(Some(consumer));
                }
            }
        }
    }

    /// What a turn that moved nothing waits for.
    fn waiting(&self) -> Work {
        let root = match &self.root {
            Root::Plain(channel) => channel.in_flight(),
            // A job has its own work, and times to keep.
            Root::Job(_) => return Work::Waiting,
            Root::Nothing => 0,
        };
        if root > 0 || !self.releasing.is_empty() { Work::Waiting } else { Work::Idle }
    }
}

/// The channel at the top of the tree.
fn root_channel(root: &mut Root) -> Option<&mut dyn IoChannel> {
    match root {
        Root::Plain(channel) => Some(channel.as_mut()),
        Root::Job(job) => Some(job.as_channel()),
        Root::Nothing => None,
    }
}

/// What `limits` allow, on the disk that the guest knows: neither a job nor a larger target changes its capacity or block
/// size under it.
fn same_geometry(limits: &Limits, known: &Limits) -> Limits {
    Limits { block_size: known.block_size, num_blocks: known.num_blocks, ..*limits }
}

fn remove_regions(cx: &Context<'_>, regions: &[RegionId]) {
    for region in regions {
        cx.memory.remove(*region);
    }
}

impl Poller for Disk {
    fn started(&mut self, cx: &Context<'_>) {
        if let Some(root) = root_channel(&mut self.root) {
            root.attach(cx);
        }
    }

    fn poll(&mut self, cx: &Context<'_>) -> Work {
        let mut work = Work::Idle;
        while let Some(command) = self.commands.receive() {
            self.take(cx, command);
            work = Work::Busy;
        }
        work = work.or(self.poll_guests(cx)).or(self.poll_root(cx));
        self.publish(cx);
        if matches!(self.root, Root::Job(_)) {
            self.serve_job(cx);
        }
        if !matches!(self.gate, Gate::Open) {
            self.advance_hold(cx);
            work = Work::Busy;
        }
        if !self.releasing.is_empty() {
            self.poll_releasing(cx);
        }
        if work == Work::Idle { self.waiting() } else { work }
    }

    /// An idle disk has no job, nothing in flight and an open gate: work comes from its consumers, if its channel has none.
    fn watch(&self, watch: &mut Watch) {
        if !matches!(&self.root, Root::Plain(root) if root.is_passive()) {
            return watch.give_up();
        }
        for guest in self.guests.iter().flatten() {
            guest.consumer.watch(watch);
        }
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        if !self.commands.is_empty() || !matches!(self.gate, Gate::Open) {
            return Armed::Ready;
        }
        let mut armed = match root_channel(&mut self.root) {
            Some(root) => root.arm(cx, set),
            None => Armed::Ready,
        };
        if let Root::Job(job) = &self.root
            && job.wants() == JobWants::Dissolve
        {
            // Its next hold is due then, or when control has made room for the news of it.
            let soon = cx.now + Nanos::from_millis(1);
            armed = armed.and(Armed::Until(Some(self.hold_not_before.max(soon))));
        }
        for guest in self.guests.iter_mut().flatten() {
            armed = armed.and(guest.consumer.arm(cx, set));
        }
        for releasing in &mut self.releasing {
            // A channel that hangs must not keep the reactor awake; a look every now and then will do.
            armed = armed.and(match releasing.arm(cx, set) {
                Armed::Ready => Armed::Until(Some(cx.now + Nanos::from_millis(1))),
                until @ Armed::Until(_) => until,
            });
        }
        armed
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        if let Some(root) = root_channel(&mut self.root) {
            root.disarm(cx);
        }
        for guest in self.guests.iter_mut().flatten() {
            guest.consumer.disarm(cx);
        }
        for releasing in &mut self.releasing {
            releasing.disarm(cx);
        }
    }

    fn stopped(&mut self, cx: &Context<'_>) {
        for guest in self.guests.iter_mut().flatten() {
            guest.consumer.detach(cx);
        }
        if let Some(root) = root_channel(&mut self.root) {
            root.detach(cx);
        }
        for releasing in &mut self.releasing {
            releasing.detach(cx);
        }
    }
}

#[cfg(test)]
mod tests;
