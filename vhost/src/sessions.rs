//! The sessions of one controller: how many there may be at a time, and which of them may run rings.
//!
//! There are two during a live migration: the destination's monitor connects and negotiates while the source's guest still
//! runs, and starts its rings when the source's have been stopped. Everybody else comes alone.
//!
//! Invariants, which hold whatever front ends do:
//! * Rings of one session run at a time. A guest that is started twice would ruin its file system.
//! * No ring starts while the disk still has requests of a session that has ended, because a late write of the old one could
//!   land on top of one of the new. That is a fact of the disk: it holds for every controller over it, one that was made
//!   again included.
//!
//! Whoever is in the way gets [`GRACE`] to go; then the newcomer is refused, with the reason in the log.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use resilver_bdev::{DiskHandle, Limits};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tracing::info;

use crate::back_channel::BackChannel;
use crate::blk::CacheMode;
use crate::postcopy::MemoryFile;
use crate::socket::Socket;

/// The most front ends of one controller at a time.
pub const SESSIONS_MAX: usize = 2;
/// With those that have gone and are not let go of yet. Each holds descriptors, of which the process has no more than so many for
/// all controllers, and who connects and hangs up again and again must not take those of others.
const SEATS_MAX: usize = 16;
/// How long a front end waits for what is in its way before it is refused.
pub const GRACE: Duration = Duration::from_secs(1);
/// How many files of guests that did not wholly arrive are remembered: those of several guests with memory in several pieces.
const UNFINISHED_MAX: usize = 64;
/// How often is looked whether it has gone.
const LOOK: Duration = Duration::from_millis(5);

/// What a front end has set up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionInfo {
    /// Negotiated virtio features.
    pub features: u64,
    /// Rings that are running.
    pub queues: Vec<u16>,
    /// Regions of guest memory.
    pub memory_regions: usize,
}

/// What a front end wants to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intent {
    /// Say its first message.
    Connect,
    /// Start a ring.
    Run,
}

/// What is in a front end's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// A session is about to end.
    Ending,
    /// One has ended, and the disk still has so many of its requests.
    InFlight(u32),
    /// Another session's rings are running.
    Running,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ending => f.write_str("the session before is still ending"),
            Self::InFlight(left) => write!(
                f,
                "{left} requests of a session that has ended are still in flight on a disk that does not answer"
            ),
            Self::Running => f.write_str(
                "another front end of this controller is running its rings; a disk that two guests share needs a controller \
                 for each",
            ),
        }
    }
}

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connected,
    /// It has ended; what the disk still has of it is waited for.
    Leaving,
}

/// One session, as the others see it.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) socket: Socket,
    phase: Cell<Phase>,
    /// Rings of it run, or are about to.
    runs: Cell<bool>,
    /// Requests that the disk had when it ended.
    left: Cell<u32>,
    info: RefCell<SessionInfo>,
    back_channel: RefCell<Option<BackChannel>>,
}

impl Seat {
    pub(crate) fn set_info(&self, info: SessionInfo) {
        self.runs.set(!info.queues.is_empty());
        self.info.replace(info);
    }

    pub(crate) fn set_back_channel(&self, channel: Option<BackChannel>) {
        self.back_channel.replace(channel);
    }

    /// The session has ended; the disk has so many requests of it.
    pub(crate) fn leaves(&self, left: u32) {
        self.phase.set(Phase::Leaving);
        self.left.set(left);
        self.runs.set(false);
        self.set_back_channel(None);
    }

    pub(crate) fn left(&self) -> u32 {
        self.left.get()
    }

    /// Whether requests may come to the disk, or be there, that this session will never hear of. Its socket tells before its
    /// task has noticed: a monitor that connects again has closed the connection before.
    fn is_ending(&self) -> bool {
        self.phase.get() == Phase::Leaving || self.socket.is_closed()
    }
}

/// What a controller and its sessions share on the control thread.
#[derive(Debug)]
pub(crate) struct Sessions {
    controller: String,
    disk: DiskHandle,
    limits: Cell<Limits>,
    /// As the last guest left it: a front end that reconnects does not say it again.
    writeback: Cell<CacheMode>,
    /// Memory of guests whose sessions ended before all of it had come.
    unfinished: RefCell<VecDeque<MemoryFile>>,
    seats: RefCell<Vec<Rc<Seat>>>,
    changed: Notify,
}

/// A place among a controller's sessions, given back when dropped.
pub(crate) struct Place {
    sessions: Rc<Sessions>,
    pub(crate) seat: Rc<Seat>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.sessions.seats.borrow_mut().retain(|seat| !Rc::ptr_eq(seat, &self.seat));
        self.sessions.changed.notify_waiters();
    }
}

impl Sessions {
    pub(crate) fn new(controller: String, disk: DiskHandle, limits: Limits) -> Self {
        Self {
            controller,
            disk,
            limits: Cell::new(limits),
            writeback: Cell::new(CacheMode::WriteBack),
            unfinished: RefCell::default(),
            seats: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// The controller's name.
    pub(crate) fn controller(&self) -> &str {
        &self.controller
    }

    pub(crate) fn disk(&self) -> &DiskHandle {
        &self.disk
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits.get()
    }

    /// The disk has another size: whoever listens is told. Answers what went wrong with those that could not be.
    pub(crate) fn resize(&self, limits: Limits) -> Vec<std::io::Error> {
        self.limits.set(limits);
        let tell = |seat: &Rc<Seat>| seat.back_channel.borrow().as_ref()?.config_changed().err();
        self.seats.borrow().iter().filter_map(tell).collect()
    }

    pub(crate) fn writeback(&self) -> CacheMode {
        self.writeback.get()
    }

    pub(crate) fn set_writeback(&self, writeback: CacheMode) {
        self.writeback.set(writeback);
    }

    /// A session has ended before all of its guest's memory had come, which is of these files. A monitor that connects again does
    /// not say that pages are still missing (QEMU 10), and a device that took holes for memory would fill them with zeroes.
    pub(crate) fn remember_unfinished(&self, files: impl Iterator<Item = MemoryFile>) {
        let mut unfinished = self.unfinished.borrow_mut();
        for file in files {
            if !unfinished.contains(&file) {
                unfinished.push_back(file);
            }
        }
        let surplus = unfinished.len().saturating_sub(UNFINISHED_MAX);
        unfinished.drain(..surplus);
    }

    /// Whether memory of this file may lack pages that nobody will bring when they are touched.
    pub(crate) fn is_unfinished(&self, file: MemoryFile) -> bool {
        self.unfinished.borrow().contains(&file)
    }

    /// Requests of sessions that have ended and that the disk still has, whatever controller they came through.
    pub(crate) fn left_in_flight(&self) -> u32 {
        self.disk.left_in_flight()
    }

    /// What this controller's sessions that have ended left on the disk.
    pub(crate) fn left_behind(&self) -> u32 {
        self.seats.borrow().iter().map(|seat| seat.left.get()).sum()
    }

    /// The front ends that are connected.
    pub(crate) fn infos(&self) -> Vec<SessionInfo> {
        let seats = self.seats.borrow();
        let connected = seats.iter().filter(|seat| seat.phase.get() == Phase::Connected);
        connected.map(|seat| seat.info.borrow().clone()).collect()
    }

    /// A place for one front end more; none where all are taken.
    pub(crate) fn admit(self: &Rc<Self>, socket: Socket) -> Option<Place> {
        let mut seats = self.seats.borrow_mut();
        let staying = seats.iter().filter(|seat| !seat.is_ending()).count();
        if staying >= SESSIONS_MAX || seats.len() >= SEATS_MAX {
            return None;
        }
        let seat = Rc::new(Seat {
            socket,
            phase: Cell::new(Phase::Connected),
            runs: Cell::new(false),
            left: Cell::new(0),
            info: RefCell::default(),
            back_channel: RefCell::default(),
        });
        seats.push(Rc::clone(&seat));
        Some(Place { sessions: Rc::clone(self), seat })
    }

    /// Waits until nothing is in the way of what `seat` wants to do, but no longer than [`GRACE`]. A session that may run is
    /// in the way of others from then on.
    pub(crate) async fn clear_way(&self, seat: &Rc<Seat>, intent: Intent) -> Result<(), Obstacle> {
        let begin = Instant::now();
        let mut told = false;
        while let Some(obstacle) = self.obstacle(seat, intent) {
            if begin.elapsed() >= GRACE {
                return Err(obstacle);
            }
            if obstacle != Obstacle::Ending && !std::mem::replace(&mut told, true) {
                info!(controller = self.controller, "a front end waits: {obstacle}");
            }
            let _ = timeout(LOOK, self.changed.notified()).await;
        }
        if intent == Intent::Run {
            seat.runs.set(true);
        }
        Ok(())
    }

    fn obstacle(&self, seat: &Rc<Seat>, intent: Intent) -> Option<Obstacle> {
        let (left, seats) = (self.disk.left_in_flight(), self.seats.borrow());
        let others = || seats.iter().filter(|other| !Rc::ptr_eq(other, seat));
        let left = left.max(others().map(|other| other.left.get()).sum());
        if left > 0 {
            return Some(Obstacle::InFlight(left));
        }
        if others().any(|other| other.is_ending()) {
            return Some(Obstacle::Ending);
        }
        let running = intent == Intent::Run && others().any(|other| other.runs.get());
        running.then_some(Obstacle::Running)
    }
}
