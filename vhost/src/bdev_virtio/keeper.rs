//! The keeper: the thread that keeps a `virtio` bdev connected. It alone talks to the back end; it blocks, so it is no
//! reactor's, and each bdev has its own, because one that does not answer must not keep others waiting.
//!
//! It starts the rings that are ready, sees that the back end has gone or broken a ring, tries again with growing pauses for as
//! long as the bdev lives, and hears of a disk that has grown.
//!
//! **Who answers must be the same disk.** A back end that describes itself otherwise than its predecessor (but for having grown)
//! is refused with the reason, and asked again later: an operator may have started the wrong one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use resilver_sys::WaitSet;

use super::device::Device;
use super::ring_state::{Event, Phase, RingState};
use super::seat::Seat;
use super::shared::Shared;
use crate::blk::Serial;
use crate::front_end::{Connection, FrontEndError, RingHandle};

/// The pause after the first failed attempt; it doubles up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// The longest pause. A connection that lasted longer than that ends a series of failures.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often seats are looked at whose channels have gone and left requests in flight.
const LEFT_AGAIN: Duration = Duration::from_millis(5);
/// The longest sleep: bounds how long anything that was missed can stay missed.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contact {
    /// A back end serves the rings.
    Connected,
    /// None does, and requests wait for one.
    Reconnecting,
    /// None has for so long that requests fail until one is there again.
    Failing,
}

impl Contact {
    /// The word for it in what operators are shown.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Reconnecting => "reconnecting",
            Self::Failing => "failing",
        }
    }
}

/// How the connection is, for an operator.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub(super) contact: Contact,
    /// Since when it is connected or not.
    pub(super) since: Instant,
    /// Attempts to connect since the connection was lost.
    pub(super) attempts: u64,
    /// Connections after the first.
    pub(super) reconnects: u64,
    /// Why the connection was lost, or why the last attempt failed; empty where there is nothing to say.
    pub(super) reason: String,
}

/// A status that the keeper writes and the bdev shows.
#[derive(Debug, Clone)]
pub(super) struct StatusCell(Arc<Mutex<Status>>);

impl StatusCell {
    /// Of a fresh connection.
    pub(super) fn connected() -> Self {
        Self(Arc::new(Mutex::new(Status {
            contact: Contact::Connected,
            since: Instant::now(),
            attempts: 0,
            reconnects: 0,
            reason: String::new(),
        })))
    }

    pub(super) fn get(&self) -> Status {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ring of the export, whoever owns it now.
struct Ring {
    handle: RingHandle,
    state: Arc<RingState>,
}

/// Nobody serves the rings.
struct Outage {
    since: Instant,
    next_attempt: Instant,
}

/// What a keeper is made of.
pub(super) struct Keeper {
    name: String,
    connection: Connection,
    device: Device,
    serial: Option<Serial>,
    rings: Vec<Ring>,
    /// Seats whose channels have gone and left requests in flight.
    left: Vec<Seat>,
    shared: Arc<Shared>,
    status: StatusCell,
    /// After how long an outage requests fail; none waits for ever.
    patience: Option<Duration>,
    outage: Option<Outage>,
    /// The pause before the next attempt to connect.
    pause: Duration,
}

impl Keeper {
    /// A keeper of a connection that has started no ring yet.
    pub(super) fn new(
        name: String,
        connection: Connection,
        device: Device,
        rings: Vec<(RingHandle, Arc<RingState>)>,
        shared: Arc<Shared>,
        patience: Option<Duration>,
    ) -> Self {
        Self {
            name,
            serial: connection.serial(),
            connection,
            device,
            left: Vec::with_capacity(rings.len()),
            rings: rings.into_iter().map(|(handle, state)| Ring { handle, state }).collect(),
            shared,
            status: StatusCell::connected(),
            patience,
            outage: None,
            pause: PAUSE_MIN,
        }
    }

    /// Where it tells how the connection is.
    pub(super) fn status(&self) -> StatusCell {
        self.status.clone()
    }

    /// Starts all rings: of a fresh connection, so that a back end that refuses them is found out at once.
    pub(super) fn start_rings(&mut self) -> Result<(), FrontEndError> {
        for ring in &self.rings {
            if ring.state.phase() == Phase::Failing {
                ring.state.apply(Event::Resume);
            }
            // First the phase: from the first word on the back end may touch the ring.
            if ring.state.apply(Event::Start) {
                self.connection.start(&ring.handle)?;
            }
        }
        Ok(())
    }

    /// Keeps the connection until the bdev goes.
    pub(super) fn run(mut self) {
        let mut set = WaitSet::with_capacity(3);
        while !self.shared.has_quit() {
            self.shared.wake_event().drain();
            let attempt = self.outage.as_ref().map(|outage| outage.next_attempt);
            match attempt {
                None => self.watch(),
                Some(at) if at <= Instant::now() => self.attempt(),
                Some(_) => {}
            }
            self.give_up();
            self.look_after_left();
            self.look_after_free();
            self.sleep(&mut set);
        }
        self.connection.hang_up();
    }

    /// What has to be done while somebody serves the rings.
    fn watch(&mut self) {
        if self.rings.iter().any(|ring| ring.state.phase() == Phase::Broken) {
            let what = self.shared.take_broken().map_or_else(String::new, |what| what.to_string());
            return self.lost(&format!("it broke the rules of a ring: {what}"));
        }
        if self.connection.is_closed() {
            return self.lost("it closed the connection");
        }
        let result = match self.connection.config_changed() {
            Ok(true) => self.reread(),
            Ok(false) => self.start_rings(),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.lost(&error.to_string());
        }
    }

    /// The back end says that it has changed.
    fn reread(&mut self) -> Result<(), FrontEndError> {
        let config = self.connection.read_config()?;
        match self.device.successor(&config) {
            Ok(device) => self.adopt(device),
            Err(reason) => self.lost(&reason),
        }
        Ok(())
    }

    fn adopt(&mut self, device: Device) {
        if device != self.device {
            let (bdev, bytes) = (&self.name, device.geometry.size());
            tracing::info!(bdev, bytes, "the export has grown");
            self.device = device;
            self.shared.grown(bytes);
        }
    }

    /// The connection is of no use any more.
    fn lost(&mut self, reason: &str) {
        tracing::warn!(bdev = self.name, reason, "the connection to the export was lost");
        self.hang_up();
        let now = Instant::now();
        let mut status = self.status.lock();
        // One that breaks off again at once is not asked again at once.
        let lasted = now - status.since > PAUSE_MAX;
        self.pause = if lasted { PAUSE_MIN } else { longer(self.pause) };
        self.outage = Some(Outage { since: now, next_attempt: now + self.pause });
        (status.contact, status.since, status.attempts) = (Contact::Reconnecting, now, 0);
        reason.clone_into(&mut status.reason);
    }

    /// Hangs up, and has the rings made ready for another back end.
    fn hang_up(&mut self) {
        let broken = self.rings.iter().any(|ring| ring.state.phase() == Phase::Broken);
        let recorded = self.connection.records_inflight() && !broken;
        self.connection.hang_up();
        if !recorded {
            self.connection.forget_inflight();
        }
        let event = if recorded { Event::HangUpRecorded } else { Event::HangUp };
        for ring in &self.rings {
            ring.state.apply(event);
            ring.handle.wake();
        }
    }

    /// Tries to connect again.
    fn attempt(&mut self) {
        let error = match self.connect() {
            Ok(()) => return,
            Err(error) => error,
        };
        self.connection.hang_up();
        let mut status = self.status.lock();
        status.attempts += 1;
        if status.attempts == 1 || error != status.reason {
            tracing::warn!(bdev = self.name, reason = error, "the export is not there");
        }
        status.reason = error;
        if let Some(outage) = &mut self.outage {
            self.pause = longer(self.pause);
            outage.next_attempt = Instant::now() + self.pause;
        }
    }

    fn connect(&mut self) -> Result<(), String> {
        self.connection.reopen(Duration::ZERO).map_err(|error| error.to_string())?;
        let config = *self.connection.device();
        if usize::from(config.queues) < self.rings.len() {
            return Err(format!("it has {} rings now, and had more", config.queues));
        }
        let device = self.device.successor(&config)?;
        let serial = self.connection.serial();
        if serial != self.serial {
            let told = |serial: Option<Serial>| match serial {
                Some(serial) => format!("'{serial}'"),
                None => "not told".to_owned(),
            };
            let (now, then) = (told(serial), told(self.serial));
            return Err(format!("it is another disk: its serial is {now}, and was {then}"));
        }
        self.adopt(device);
        // Before the outage is over: of a back end that refuses rings nobody has anything, however often it answers.
        if let Err(error) = self.start_rings() {
            self.hang_up();
            return Err(error.to_string());
        }
        self.outage = None;
        let mut status = self.status.lock();
        let since = status.since.elapsed();
        tracing::info!(bdev = self.name, away = ?since, "the export is there again");
        (status.contact, status.since) = (Contact::Connected, Instant::now());
        status.reconnects += 1;
        status.reason.clear();
        Ok(())
    }

    /// Fails what waits, once an outage has lasted too long.
    fn give_up(&mut self) {
        let (Some(outage), Some(patience)) = (&self.outage, self.patience) else { return };
        if outage.since.elapsed() < patience {
            return;
        }
        // Nothing that the record says is in flight is wanted any more.
        self.connection.forget_inflight();
        for ring in &self.rings {
            if ring.state.apply(Event::GiveUp) {
                ring.handle.wake();
            }
        }
        let mut status = self.status.lock();
        if std::mem::replace(&mut status.contact, Contact::Failing) != Contact::Failing {
            tracing::error!(
                bdev = self.name,
                ?patience,
                "the export has not come back: its I/O fails"
            );
        }
    }

    /// Moves on the seats whose channels have gone.
    fn look_after_left(&mut self) {
        while let Some(seat) = self.shared.take_left() {
            self.left.push(seat);
        }
        let mut at = 0;
        while at < self.left.len() {
            if self.left[at].clear(&self.shared) {
                self.shared.take_back(self.left.swap_remove(at));
            } else {
                at += 1;
            }
        }
    }

    /// Makes rings ready that no channel has. Nobody would miss those, but a back end may serve none before it has all that
    /// come before it: SPDK does not (`vhost_blk_start`).
    fn look_after_free(&self) {
        let waits_for_owner = |ring: &Ring| {
            matches!(ring.state.phase(), Phase::Recorded | Phase::Lost | Phase::GivenUp)
        };
        if self.rings.iter().any(waits_for_owner) {
            self.shared.each_free(|seat| {
                seat.clear(&self.shared);
            });
        }
    }

    fn sleep(&self, set: &mut WaitSet) {
        let now = Instant::now();
        let mut longest = LONGEST_SLEEP;
        set.clear();
        set.add(self.shared.wake_event());
        match &self.outage {
            None => {
                set.add(&self.connection);
                if let Some(channel) = self.connection.back_channel_fd() {
                    set.add(channel);
                }
            }
            Some(outage) => {
                longest = longest.min(outage.next_attempt.saturating_duration_since(now));
                let over = self.patience.and_then(|patience| outage.since.checked_add(patience));
                if let Some(over) = over.filter(|over| *over > now) {
                    longest = longest.min(over - now);
                }
            }
        }
        if !self.left.is_empty() {
            longest = longest.min(LEFT_AGAIN);
        }
        set.sleep(Some(u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX)));
    }
}

/// The pause that follows a pause.
fn longer(pause: Duration) -> Duration {
    (pause * 2).min(PAUSE_MAX)
}
