//! The world of a fuzzed guest: its memory with what is not its own around it, a disk, a session on a reactor that is stepped by
//! hand, and the control side that moves, stops and takes away. What must hold at all times is asserted here.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver as Inbox, channel};
use std::sync::{Arc, Mutex};

use resilver_bdev::{Consumer, ConsumerId, Disk, DiskCommand, DiskHandle, IoError, Limits, Reply};
use resilver_reactor::{Context, Doorbell, Nanos, Poller, Sender};
use resilver_sys::{EventFd, Mapping, RegionTable, WaitSet};
use resilver_vhost::VhostStats;
use resilver_vhost::blk::Serial;
use resilver_vhost::blk_session::{
    BlkSession, Command, Enabled, MemoryReply, SessionConfig, SessionFault,
};
use resilver_vhost::chain::Indirect;
use resilver_vhost::dirty_log::DirtyLog;
use resilver_vhost::inflight::{Holds, InflightMemory};
use resilver_vhost::memory::GuestMemory;
use resilver_vhost::message::RingAddresses;
use resilver_vhost::protocol::vring_flags;
use resilver_vhost::queue::LiveQueue;
use resilver_vhost::ring::{EventMode, Format, Ring, RingAreas};

use super::disk::{Conduct, FuzzedDisk, lock};
use crate::guest_memory::MemoryFile;
use crate::watched::Watched;

const PAGE: u64 = 4096;
/// The guest's memory: two regions that adjoin for the guest; in the file a page that is not the guest's stands before,
/// between and behind them.
pub(super) const BASE: u64 = 0x10_0000;
pub(super) const FIRST: u64 = 8 * PAGE;
const SECOND: u64 = 4 * PAGE;
pub(super) const END: u64 = BASE + FIRST + SECOND;
const FIRST_IN_FILE: u64 = PAGE;
const SECOND_IN_FILE: u64 = PAGE + FIRST + PAGE;
const FILE: u64 = SECOND_IN_FILE + SECOND + PAGE;
/// The dirty log: a bit for each page, somewhere in its file.
const LOG_BYTES: u64 = END / PAGE / 8 + 1;
const LOG_IN_FILE: u64 = 100;
/// What is on pages that are not the guest's.
const CANARY: u8 = 0xc3;
/// Queues, and how far one's parts are from the other's.
pub(super) const QUEUES: u16 = 2;
const QUEUE_SPAN: u64 = 4 * PAGE;
/// Entries of the longest ring.
const RING_MAX: u16 = 64;
/// A queue's parts, from where it begins. What the device writes of a split ring is on a page of its own, so that a mark of one
/// part is not taken for one of another.
pub(super) const AVAILABLE: u64 = 0x400;
pub(super) const USED: u64 = 0x3800;
/// Turns that anything may take that a working disk has been given: far more than there are requests.
const PATIENCE: usize = 2000;

/// What the disk accepts: small enough that requests are cut into parts.
pub(super) const LIMITS: Limits = Limits {
    block_size: 512,
    num_blocks: 64,
    max_transfer: 8192,
    max_segments: 4,
    max_unmap: 4096,
    unmap: true,
    zeroes_unmap: true,
    optimal_io: 4096,
    read_only: false,
};

/// What is settled before the guest begins.
pub(super) struct Setup {
    pub(super) read_only: bool,
    /// The guest is being migrated: what is written to its memory is logged.
    pub(super) logged: bool,
    /// Requests in flight are tracked.
    pub(super) tracked: bool,
    pub(super) format: Format,
    pub(super) size: u16,
    pub(super) events: EventMode,
    pub(super) indirect: Indirect,
}

impl Setup {
    /// Where a fresh ring goes on: a packed one is in its first lap, both ways.
    pub(super) fn first_base(&self) -> u32 {
        if self.format == Format::Packed { 0x8000_8000 } else { 0 }
    }
}

/// An answer that control waits for before it gives the next command.
enum Waiting {
    Stop(u16, Inbox<Option<Box<LiveQueue>>>),
    Memory(Inbox<Result<Box<GuestMemory>, ()>>),
}

/// One session, as control knows it.
struct Link {
    commands: Sender<Command>,
    stats: Arc<VhostStats>,
    fault: Inbox<SessionFault>,
    waiting: Option<Waiting>,
    /// Where the queues that run began.
    started: [Option<u32>; QUEUES as usize],
    /// Of queues that have been stopped: requests taken from split rings, packed rings that kept descriptors, and how many
    /// there were.
    taken: u64,
    kept: u64,
    stops: u64,
}

pub(super) struct Bench {
    setup: Setup,
    file: Arc<MemoryFile>,
    /// The guest's memory as it would be if only the guest had written to it.
    shadow: Arc<MemoryFile>,
    table: RegionTable,
    /// Memory of somebody else, in the same reactor's table.
    neighbour: MemoryFile,
    log: MemoryFile,
    inflight: Option<(InflightMemory, MemoryFile)>,
    disk: Disk,
    idle: Watched,
    handle: DiskHandle,
    doorbell: Arc<Doorbell>,
    pub(super) conduct: Arc<Mutex<Conduct>>,
    memory: Box<GuestMemory>,
    link: Link,
    sessions: u64,
    now: u64,
}

fn answer<T: Send + 'static>() -> (Reply<T>, Inbox<T>) {
    let (sender, inbox) = channel();
    (Box::new(move |value| drop(sender.send(value))), inbox)
}

/// Where a queue's parts begin, in guest addresses.
pub(super) fn begin(queue: u16) -> u64 {
    BASE + u64::from(queue) * QUEUE_SPAN
}

/// Where bytes of guest memory are in its file; none where they are not all in one region.
pub(super) fn in_file(address: u64, length: usize) -> Option<u64> {
    let end = address.checked_add(length as u64)?;
    if address >= BASE && end <= BASE + FIRST {
        Some(address - BASE + FIRST_IN_FILE)
    } else if address >= BASE + FIRST && end <= END {
        Some(address - BASE - FIRST + SECOND_IN_FILE)
    } else {
        None
    }
}

/// The file of a guest's memory, with what is not the guest's around it.
pub(super) fn guest_memory() -> MemoryFile {
    let file = MemoryFile::new(FILE);
    for canary in [0, PAGE + FIRST, FILE - PAGE] {
        file.put(canary, &[CANARY; PAGE as usize]);
    }
    file
}

/// What is not the guest's is as it was; of a file that was shortened only what it has left.
pub(super) fn check_canaries(file: &MemoryFile, shortened: bool) {
    for canary in [0, PAGE + FIRST, FILE - PAGE] {
        if shortened && canary > PAGE + FIRST {
            continue;
        }
        let page = file.get(canary, PAGE as usize);
        assert!(page.iter().all(|byte| *byte == CANARY), "memory of nobody's was written");
    }
}

/// A session that is not known to any disk yet, and control's end of it.
fn session(doorbell: &Arc<Doorbell>) -> (BlkSession, Link) {
    let stats = Arc::new(VhostStats::default());
    let (on_fault, fault) = answer();
    let config = SessionConfig {
        num_queues: QUEUES,
        read_only: false,
        serial: Serial::new("fuzz"),
        stats: Arc::clone(&stats),
        on_fault,
    };
    let (session, commands) = BlkSession::new(config, Arc::clone(doorbell));
    let (waiting, started) = (None, [None; QUEUES as usize]);
    let link = Link { commands, stats, fault, waiting, started, taken: 0, kept: 0, stops: 0 };
    (session, link)
}

impl Bench {
    pub(super) fn new(setup: Setup) -> Self {
        let (file, shadow) = (Arc::new(guest_memory()), Arc::new(MemoryFile::new(FILE)));
        let table = RegionTable::with_capacity(8);
        let neighbour = MemoryFile::new(FILE);
        let mapping = Mapping::shared(neighbour.fd(), 0, FILE).expect("a mapping");
        table.insert(mapping).expect("an empty table has room");
        let inflight = setup.tracked.then(|| {
            let made = InflightMemory::make(setup.format, QUEUES, RING_MAX);
            let (description, fd): (_, OwnedFd) = made.expect("memory for requests in flight");
            let memory = InflightMemory::map(&description, &fd).expect("a mapping of it");
            (memory, MemoryFile::of(fd))
        });
        let conduct = Arc::new(Mutex::new(Conduct::default()));
        let doorbell = Arc::new(Doorbell::new().expect("a doorbell"));
        let limits = Limits { read_only: setup.read_only, ..LIMITS };
        let guest = [Arc::clone(&file), Arc::clone(&shadow)];
        let root = FuzzedDisk::new(limits, Arc::clone(&conduct), guest);
        let (disk, handle) =
            Disk::new(Box::new(root), Arc::default(), Arc::clone(&doorbell), || ());
        let (first, link) = session(&doorbell);
        let mut bench = Self {
            setup,
            file,
            shadow,
            table,
            neighbour,
            log: MemoryFile::new(PAGE),
            inflight,
            disk,
            idle: Watched::default(),
            handle,
            doorbell,
            conduct,
            memory: Box::default(),
            link,
            sessions: 0,
            now: 0,
        };
        let base = bench.setup.first_base();
        bench.connect(first, [base; QUEUES as usize]);
        bench
    }

    /// A front end has come: the session moves in, with memory and rings that go on at these entries.
    fn connect(&mut self, session: BlkSession, bases: [u32; QUEUES as usize]) {
        self.sessions += 1;
        let (reply, added) = answer();
        let consumer: Box<dyn Consumer> = Box::new(session);
        let add = DiskCommand::AddConsumer(ConsumerId(self.sessions), consumer, reply);
        assert!(self.handle.send(add).is_ok());
        self.turn();
        assert!(added.try_recv().is_ok_and(|added| added.is_ok()));
        self.set_memory(true);
        self.settle();
        if self.setup.logged {
            let log = DirtyLog::map(self.log.fd(), LOG_IN_FILE, LOG_BYTES).expect("a dirty log");
            assert!(log.covers(&self.memory).is_ok());
            self.ask(|reply| Command::SetLog(Some(Box::new(log)), reply));
        }
        for (queue, base) in (0..).zip(bases) {
            self.start(queue, base);
        }
    }

    /// The front end goes without a word. From the moment when the session knows, nothing is written to the guest's memory.
    fn disconnect(&mut self) {
        self.link.waiting = None;
        lock(&self.conduct).answers = 0;
        self.ask(Command::Abandon);
        let before = self.file.get(0, FILE as usize);
        // A read that went well would rightly land in its buffer.
        *lock(&self.conduct) = Conduct { result: Err(IoError::IO), ..Conduct::default() };
        self.leave();
        assert!(before == self.file.get(0, FILE as usize), "an abandoned guest's memory changed");
        *lock(&self.conduct) = Conduct::default();
    }

    /// The session moves out, and leaves nothing behind.
    fn leave(&mut self) {
        let (reply, removed) = answer();
        let remove = DiskCommand::RemoveConsumer(ConsumerId(self.sessions), reply);
        assert!(self.handle.send(remove).is_ok());
        let gone = (0..PATIENCE).any(|_| {
            self.turn();
            removed.try_recv().is_ok_and(|consumer| consumer.is_some())
        });
        assert!(gone, "the session never leaves");
        assert_eq!(self.table.len(), 1, "the guest's memory is still known");
    }

    /// The connection breaks, or we were killed, and the front end comes again.
    pub(super) fn reconnect(&mut self, bases: [u32; QUEUES as usize]) {
        self.disconnect();
        let (session, link) = session(&self.doorbell);
        self.link = link;
        self.connect(session, bases);
    }

    pub(super) fn turn(&mut self) {
        self.now += 1000;
        let cx = Context { now: Nanos(self.now), memory: &self.table };
        self.idle.poll(&mut self.disk, &self.doorbell, &cx).expect("no work that comes unseen");
        match &self.link.waiting {
            Some(Waiting::Stop(queue, inbox)) => {
                if let Ok(live) = inbox.try_recv() {
                    let queue = *queue;
                    self.link.waiting = None;
                    self.stopped(queue, live);
                }
            }
            Some(Waiting::Memory(inbox)) => {
                if let Ok(changed) = inbox.try_recv() {
                    self.link.waiting = None;
                    assert!(changed.is_ok(), "the region table has room");
                }
            }
            None => {}
        }
    }

    /// The reactor would sleep, and thinks better of it.
    pub(super) fn nap(&mut self) {
        let cx = Context { now: Nanos(self.now), memory: &self.table };
        let _armed = self.disk.arm(&cx, &mut WaitSet::with_capacity(8));
        self.disk.disarm(&cx);
    }

    /// Turns until control has its answer. The disk works.
    fn settle(&mut self) {
        for _ in 0..PATIENCE {
            if self.link.waiting.is_none() {
                return;
            }
            self.turn();
        }
        panic!("control waits for ever");
    }

    /// Whether control may give a command: it waits for one answer before it gives the next.
    pub(super) fn is_idle(&self) -> bool {
        self.link.waiting.is_none()
    }

    fn tell(&mut self, command: Command) {
        assert!(self.link.commands.send(command).is_ok(), "control gives one command at a time");
    }

    /// Gives a command that is answered in the same turn.
    pub(super) fn ask<T: Send + 'static>(
        &mut self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> T {
        let (reply, inbox) = answer();
        self.tell(command(reply));
        self.turn();
        inbox.try_recv().expect("an answer in the same turn")
    }

    fn areas(&self, memory: &GuestMemory, queue: u16) -> RingAreas {
        let begin = begin(queue);
        let (used, available) = (begin + USED, begin + AVAILABLE);
        let flags = vring_flags::LOG;
        let addresses = RingAddresses { flags, descriptors: begin, used, available, log: used };
        let Setup { format, size, .. } = self.setup;
        RingAreas::resolve(memory, format, size, &addresses).expect("parts in the first region")
    }

    /// Changes the memory map: with or without its second region.
    pub(super) fn set_memory(&mut self, whole: bool) {
        let mut regions = vec![self.file.region(BASE, FIRST, FIRST_IN_FILE)];
        if whole {
            regions.push(self.file.region(BASE + FIRST, SECOND, SECOND_IN_FILE));
        }
        let memory = Box::new(GuestMemory::new(regions).expect("regions that do not overlap"));
        self.memory.clone_from(&memory);
        let started = (0..QUEUES).filter(|queue| self.is_started(*queue));
        let rings = started.map(|queue| (queue, self.areas(&memory, queue))).collect();
        let (sender, inbox) = channel();
        let reply: MemoryReply =
            Box::new(move |changed| drop(sender.send(changed.map_err(|_| ()))));
        self.tell(Command::SetMemory { memory, rings, reply });
        self.link.waiting = Some(Waiting::Memory(inbox));
    }

    /// Resolves a ring's addresses anew.
    pub(super) fn move_ring(&mut self, queue: u16) {
        let areas = self.areas(&self.memory, queue);
        self.ask(|reply| Command::MoveRing { queue, areas, reply });
    }

    pub(super) fn is_started(&self, queue: u16) -> bool {
        self.link.started[usize::from(queue)].is_some()
    }

    /// Starts a queue, unless its base, or what the region of requests in flight says of it, makes no sense.
    pub(super) fn start(&mut self, queue: u16, base: u32) {
        let areas = self.areas(&self.memory, queue);
        let Setup { format, size, events, .. } = self.setup;
        let Ok(mut ring) = Ring::new(format, areas, size, base, events) else {
            assert!(format == Format::Packed, "a split ring goes on anywhere");
            return;
        };
        let mut again = Box::default();
        if let Some((memory, _)) = &self.inflight {
            match memory.take_over(queue, &mut ring, Holds::AnEarlierSession) {
                Ok(found) => again = found,
                Err(_) => return,
            }
        }
        let (kick, call) = (EventFd::new(), EventFd::new());
        let (kick, call) = (kick.ok().map(Arc::new), call.ok().map(Arc::new));
        self.link.started[usize::from(queue)] = Some(ring.base());
        let live = Box::new(LiveQueue::new(ring, again, self.setup.indirect, kick, call));
        let enabled = Enabled::Yes;
        let begun = self.ask(|reply| Command::Start { queue, live, enabled, reply });
        assert!(begun.is_ok(), "queue {queue} was not running");
    }

    pub(super) fn stop(&mut self, queue: u16) {
        let (reply, inbox) = answer();
        self.tell(Command::Stop { queue, reply });
        self.link.waiting = Some(Waiting::Stop(queue, inbox));
    }

    fn stopped(&mut self, queue: u16, live: Option<Box<LiveQueue>>) {
        let base = self.link.started[usize::from(queue)].take();
        let (Some(live), Some(base)) = (live, base) else {
            panic!("queue {queue} was running");
        };
        match self.setup.format {
            Format::Split => {
                self.link.taken += u64::from((live.base() as u16).wrapping_sub(base as u16));
            }
            // Where it takes from is where it gives back to, once it has given back all that it took.
            Format::Packed => {
                let (taken, given) = (live.base() as u16, (live.base() >> 16) as u16);
                self.link.kept += u64::from(base as u16 == (base >> 16) as u16 && taken != given);
            }
        }
        self.link.stops += 1;
    }

    /// What the guest writes. It has no other memory to write to.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        if let Some(at) = in_file(address, bytes.len()) {
            self.file.put(at, bytes);
            self.shadow.put(at, bytes);
        }
    }

    /// What the front end writes to the region of requests in flight, which it may as well.
    pub(super) fn write_inflight(&self, at: u64, bytes: &[u8]) {
        if let Some((_, file)) = &self.inflight
            && at + (bytes.len() as u64) <= file.size()
        {
            file.put(at, bytes);
        }
    }

    /// Everything comes to its end, and was as it should be.
    pub(super) fn finish(mut self) {
        *lock(&self.conduct) = Conduct::default();
        self.settle();
        for queue in 0..QUEUES {
            if self.is_started(queue) {
                self.stop(queue);
                self.settle();
            }
        }
        let Link { taken, kept, stops, stats, fault, .. } = &self.link;
        // A ring breaks at a chain that it cannot follow, and breaks again when it is started anew; control, which closes the
        // connection then, is told once.
        let most = if fault.try_recv().is_ok() { *stops } else { 0 };
        let (begun, ended) = (taken + stats.resubmitted.get(), stats.requests.get());
        if self.setup.format == Format::Split {
            let broken = begun.checked_sub(ended);
            assert!(broken.is_some_and(|broken| broken <= most), "{begun} begun, {ended} ended");
        }
        assert!(*kept <= most, "{kept} rings have kept what they took");
        self.leave();
        check_canaries(&self.file, false);
        let neighbour = self.neighbour.get(0, FILE as usize);
        assert!(neighbour.iter().all(|byte| *byte == 0), "another's memory was written");
        self.check_log();
    }

    /// What differs from what the guest wrote was written by the device, and must be marked. What an abandoned guest's
    /// requests had written so far need not be: who goes without a word is not being migrated.
    fn check_log(&self) {
        let log = self.log.get(0, PAGE as usize);
        let (before, log) = log.split_at(LOG_IN_FILE as usize);
        let (bits, behind) = log.split_at(LOG_BYTES as usize);
        assert!(before.iter().chain(behind).all(|byte| *byte == 0), "beside the log");
        if !self.setup.logged || self.sessions > 1 {
            return;
        }
        let (file, shadow) = (self.file.get(0, FILE as usize), self.shadow.get(0, FILE as usize));
        let page = PAGE as usize;
        for address in (BASE..END).step_by(page) {
            let at = in_file(address, page).expect("a page of the guest's") as usize;
            let marked = bits[(address / PAGE / 8) as usize] >> (address / PAGE % 8) & 1 == 1;
            let written = file[at..at + page] != shadow[at..at + page];
            assert!(marked || !written, "the page at {address:#x} was written and is not marked");
        }
    }
}
