//! The world: one disk poller, its guests, their disks and the operator, stepped by hand under a simulated clock.
//!
//! Everything runs on one thread and draws from one seed. A step is one turn of a reactor: the real [`Disk`] is polled, then
//! what it said is read and judged. If it has nothing to do it is armed, and the clock jumps to the nearest moment at
//! which anything can happen, so a deadline that somebody forgot to name shows as a run that does not converge.

use std::sync::{Arc, Mutex};

use resilver_bdev::disk::Consumer;
use resilver_bdev::mirror::ChunkState;
use resilver_bdev::sectors::Sectors;
use resilver_bdev::{
    Bdev, BdevError, ConsumerId, DISK_DEPTH, Disk, DiskCommand, DiskHandle, JobVerb,
};
use resilver_reactor::{Armed, Context, Doorbell, Nanos, Poller, Work};
use resilver_sys::{RegionTable, WaitSet};

use super::bitmap::Recorder;
use super::control::{Control, Job, MirrorPlan, Operator};
use super::disk::SimDisk;
use super::guest::{Failure, SimGuest, Transport};
use super::lock;
use super::oracle::Oracle;
use super::rng::Rng;
use super::sector::{SECTOR, Sector, Stamp};
use super::session::Session;
use super::swarm::{Swarm, change_weather, disk};
use super::trace::Trace;
use crate::watched::Watched;

/// The longest that a reactor sleeps without being told.
const LONGEST_SLEEP: Nanos = resilver_reactor::reactor::LONGEST_SLEEP;
/// Turns between two looks at the whole medium.
const CHECK_EVERY: u64 = 16;

/// Where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It has called and the disk has not answered.
    Coming,
    /// Its session is up.
    Here,
    /// It has hung up and its last requests are in flight.
    Leaving,
    /// Nothing of it is left in the disk.
    Away,
}

/// A guest and where it is.
pub struct Seat {
    /// The guest.
    pub guest: SimGuest,
    id: ConsumerId,
    place: Arc<Mutex<Place>>,
    /// The control side of its session, if it has a virtqueue.
    session: Option<Session>,
}

/// One simulated host.
pub struct World {
    /// The time.
    pub now: Nanos,
    /// What happened.
    pub trace: Trace,
    /// The guests.
    pub seats: Vec<Seat>,
    /// The disk that serves the guests.
    pub source: SimDisk,
    /// The control plane.
    pub control: Control,
    /// What records the writes of the disk.
    pub(super) recorder: Option<Recorder>,
    /// Another one, that the operator changes.
    pub(super) watched: Option<Recorder>,
    /// Bytes of a block as the guests know it: no switch-over changes it, whatever blocks a target has.
    block_size: u32,
    /// Sectors that the guests know of: no switch-over changes them, though a target may be larger.
    pub(super) sectors: usize,
    swarm: Swarm,
    pub(super) rng: Rng,
    pub(super) oracle: Arc<Mutex<Oracle>>,
    memory: RegionTable,
    doorbell: Arc<Doorbell>,
    disk: Disk,
    idle: Watched,
    handle: DiskHandle,
    wait_set: WaitSet,
    steps: u64,
}

impl World {
    /// The world of these options.
    ///
    /// # Panics
    /// The host refuses memory or descriptors.
    #[must_use]
    pub fn new(swarm: Swarm, mut rng: Rng, trace: Trace) -> Self {
        let source = SimDisk::new("source", swarm.source, rng.fork(), &trace);
        for sector in 0..source.sectors() {
            let stamp = Stamp { write: 0, sector: sector as u16, version: 0 };
            let content = match rng.chance(swarm.hole_per_mille) {
                true => None,
                false if rng.chance(100) => Some(Sector::zero()),
                false => Some(Sector::filled(stamp.word())),
            };
            source.preset(sector, content);
        }
        let contents = (0..source.sectors()).map(|sector| source.content(sector));
        let oracle = Arc::new(Mutex::new(Oracle::new(contents)));
        let memory = RegionTable::with_capacity(64);
        let doorbell = Arc::new(Doorbell::new().expect("an event descriptor"));
        let root = source.open_channel(DISK_DEPTH).expect("a simulated channel");
        let bell = Arc::clone(&doorbell);
        let (mut disk, handle) = Disk::new(root, Arc::clone(source.stats()), bell, || {});
        disk.started(&Context { now: Nanos::ZERO, memory: &memory });
        let mut world = Self {
            now: Nanos::ZERO,
            trace,
            seats: Vec::new(),
            block_size: source.limits().block_size,
            sectors: source.sectors(),
            source,
            control: Control::new(rng.fork()),
            recorder: None,
            watched: None,
            rng,
            oracle,
            memory,
            doorbell,
            disk,
            idle: Watched::default(),
            handle,
            wait_set: WaitSet::with_capacity(16),
            steps: 0,
            swarm,
        };
        for (index, options) in world.swarm.guests.clone().into_iter().enumerate() {
            let name = format!("guest{index}");
            let rng = world.rng.fork();
            let limits = *world.source.limits();
            let guest = SimGuest::new(&name, options, &limits, &world.oracle, rng, &world.trace);
            let id = ConsumerId(index as u64);
            let place = Arc::new(Mutex::new(Place::Away));
            world.seats.push(Seat { guest, id, place, session: None });
            world.connect(index);
        }
        world
    }

    /// What the guests may read is what the disk holds now: for a scenario that has given it another content.
    pub fn forget_content(&mut self) {
        let contents = (0..self.source.sectors()).map(|sector| self.source.content(sector));
        *lock(&self.oracle) = Oracle::new(contents);
    }

    /// Brings a guest's session up.
    fn connect(&mut self, index: usize) {
        let seat = &mut self.seats[index];
        *lock(&seat.place) = Place::Coming;
        self.trace.line(format_args!("guest{index} connects"));
        let (place, trace) = (Arc::clone(&seat.place), self.trace.clone());
        let reply = move |result: Result<(), Box<dyn Consumer>>| match result {
            Ok(()) => *lock(&place) = Place::Here,
            Err(_) => trace.finding("the disk has no room for a guest"),
        };
        let consumer: Box<dyn Consumer> = match seat.guest.transport() {
            Transport::Port => Box::new(seat.guest.clone()),
            Transport::Ring { format, .. } => {
                seat.guest.plug(&self.memory);
                let doorbell = Arc::clone(&self.doorbell);
                // Drawn aside, so that a seed's run is the same but for this.
                let mut aside = self.rng.clone().fork();
                let arrives = aside.chance(self.swarm.arrives_per_mille).then_some(aside);
                let (control, session) =
                    Session::new(&seat.guest, format, doorbell, arrives, &self.trace);
                seat.session = Some(control);
                Box::new(session)
            }
        };
        let command = DiskCommand::AddConsumer(seat.id, consumer, Box::new(reply));
        self.send(command);
    }

    /// Brings up the sessions of all guests that are away.
    fn bring_guests_back(&mut self) {
        for index in 0..self.seats.len() {
            let place = *lock(&self.seats[index].place);
            if place == Place::Away {
                self.connect(index);
            }
        }
    }

    /// Hangs a guest's session up.
    fn disconnect(&mut self, index: usize) {
        let seat = &mut self.seats[index];
        *lock(&seat.place) = Place::Leaving;
        self.trace.line(format_args!("guest{index} hangs up"));
        if let Some(mut session) = seat.session.take() {
            session.abandon();
            seat.guest.unplug();
        }
        let (place, trace) = (Arc::clone(&seat.place), self.trace.clone());
        let reply = move |consumer: Option<Box<dyn Consumer>>| {
            if consumer.is_none() {
                trace.finding("the disk does not know a guest that leaves");
            }
            *lock(&place) = Place::Away;
        };
        let command = DiskCommand::RemoveConsumer(seat.id, Box::new(reply));
        self.send(command);
    }

    /// Sends a command to the disk.
    pub(super) fn send(&mut self, command: DiskCommand) {
        if self.handle.send(command).is_err() {
            self.trace.finding("the disk's mailbox is full");
        }
    }

    /// Whether nothing has been found wrong.
    ///
    /// # Errors
    /// The first finding.
    pub fn verdict(&self) -> Result<(), String> {
        self.trace.first_finding().map_or(Ok(()), Err)
    }

    /// One turn.
    pub fn step(&mut self) {
        self.steps += 1;
        self.trace.set_now(self.now);
        for disk in self.control.disks().chain([&self.source]) {
            disk.advance(self.now, &self.memory);
        }
        self.control();
        if self.control.operator != Operator::Whimsical {
            self.bring_guests_back();
        }
        let cx = Context { now: self.now, memory: &self.memory };
        for Seat { guest, session, .. } in &mut self.seats {
            guest.drive(&cx);
            if let Some(session) = session {
                session.advance(guest);
            }
        }
        let polled = self.idle.poll(&mut self.disk, &self.doorbell, &cx);
        let work = polled.unwrap_or_else(|what| {
            self.trace.finding(format_args!("{what}"));
            Work::Busy
        });
        // Failures first: an event may change which disk they are judged by.
        self.judge_failures();
        self.read_answers();
        while let Some(event) = self.handle.next_event() {
            self.hear(event);
        }
        self.judge_cancel();
        self.judge_numbers();
        self.judge_verification(self.now);
        if self.steps.is_multiple_of(CHECK_EVERY) {
            self.check_medium();
        }
        self.pass_time(work);
    }

    /// Moves the clock: a little after a turn that did something, else to the next moment at which anything can happen.
    fn pass_time(&mut self, work: Work) {
        let little = Nanos(self.rng.between(100, 3_000));
        if work == Work::Busy {
            self.now = self.now + little;
            return;
        }
        let cx = Context { now: self.now, memory: &self.memory };
        self.wait_set.clear();
        let armed = self.disk.arm(&cx, &mut self.wait_set);
        self.disk.disarm(&cx);
        let Armed::Until(deadline) = armed else {
            self.now = self.now + little;
            return;
        };
        let landing = self.control.disks().chain([&self.source]).filter_map(SimDisk::next_event);
        let next = landing.chain(deadline).min().unwrap_or(Nanos::MAX);
        let next = next.min(self.now + self.patience());
        self.now = next.max(self.now + Nanos(1));
    }

    /// How long nothing may happen: guests that may ask at any moment are looked at often.
    fn patience(&mut self) -> Nanos {
        if self.rng.chance(900) { Nanos(self.rng.between(1_000, 50_000)) } else { LONGEST_SLEEP }
    }

    /// A request may fail only if a disk that served the guests failed one like it meanwhile.
    fn judge_failures(&mut self) {
        for seat in &self.seats {
            for Failure { since, io, error } in seat.guest.take_failures() {
                let mut serving = self.control.left.iter().chain([&self.source]);
                if !serving.any(|disk| disk.failed_since(since, &io)) {
                    self.trace.finding(format_args!("{io:?} failed with {error} for no reason"));
                }
            }
        }
    }

    /// The medium holds what the guests may read, the disks that may be authoritative hold it after a power loss, and clean
    /// chunks are equal.
    pub fn check_medium(&self) {
        let oracle = lock(&self.oracle);
        let (source_counts, target_counts) =
            self.control.job().map_or((true, false), Job::authoritative);
        let target = self.control.job().map(|job| &job.target).filter(|_| target_counts);
        let source = Some(&self.source).filter(|_| source_counts);
        for sector in 0..self.sectors {
            if let Err(wrong) = oracle.check_now(sector, &self.source.content(sector)) {
                self.trace.finding(format_args!("the medium is wrong: {wrong}"));
            }
            for disk in source.into_iter().chain(target) {
                let mut left = disk.after_power_loss(sector).into_iter();
                let lost = left.try_for_each(|left| oracle.check_after_power_loss(sector, &left));
                if let Err(lost) = lost {
                    let name = disk.name();
                    self.trace.finding(format_args!("a power loss on {name} loses data: {lost}"));
                }
            }
        }
        drop(oracle);
        if let Some(job) = self.control.job().filter(|job| job.is_inserted()) {
            self.check_chunks(job);
        }
        self.judge_observer();
        self.judge_recorders();
    }

    /// A clean chunk with nothing in flight in it is equal on both legs.
    fn check_chunks(&self, job: &Job) {
        let (size, granularity) = (self.source.sectors() * SECTOR, job.granularity() as usize);
        for chunk in 0..size.div_ceil(granularity) {
            let end = size.min((chunk + 1) * granularity) / SECTOR;
            let sectors = chunk * granularity / SECTOR..end;
            if job.probe.chunk_state(chunk as u64) != Some(ChunkState::Clean)
                || sectors.clone().any(|sector| job.target.is_rotten(sector))
                || self.source.changing(&sectors)
                || job.target.changing(&sectors)
                || self.seats.iter().any(|seat| seat.guest.changing(&sectors))
            {
                continue;
            }
            let scanned = job.scanned();
            let mut promised = sectors.filter(|sector| job.scope.promises(self, *sector, scanned));
            let differs =
                promised.find(|sector| self.source.content(*sector) != job.target.content(*sector));
            if let Some(sector) = differs {
                self.trace.finding(format_args!(
                    "chunk {chunk} is clean, but sector {sector} is {:?} on the source and {:?} on the target",
                    self.source.content(sector),
                    job.target.content(sector)
                ));
            }
        }
    }

    /// Faults come and go, guests reset, leave and return.
    fn disturb(&mut self) {
        let (swarm, rng) = (&self.swarm, &mut self.rng);
        if rng.chance(swarm.weather_per_mille) && swarm.source_faults.error_per_mille > 0 {
            let sectors = self.source.sectors();
            self.source.change_faults(|faults| change_weather(rng, faults, sectors));
        }
        if let Some(job) = self.control.job()
            && rng.chance(swarm.weather_per_mille)
        {
            let sectors = job.target.sectors();
            job.target.change_faults(|faults| change_weather(rng, faults, sectors));
        }
        if self.rng.chance(self.swarm.bitmap_per_mille) {
            self.change_bitmap_on_a_whim();
        }
        if self.rng.chance(self.swarm.upheaval_per_mille) {
            let index = self.rng.below(self.seats.len() as u64) as usize;
            let place = *lock(&self.seats[index].place);
            match place {
                Place::Here if self.rng.chance(500) => match &mut self.seats[index].session {
                    Some(session) => session.disturb(&mut self.rng),
                    None => self.seats[index].guest.reset(),
                },
                Place::Here => self.disconnect(index),
                Place::Away => self.connect(index),
                Place::Coming | Place::Leaving => {}
            }
        }
    }

    /// The safety phase: faults, guests and operator do what they like.
    ///
    /// # Errors
    /// The first finding.
    pub fn be_safe(&mut self) -> Result<(), String> {
        self.source.set_faults(self.swarm.source_faults.clone());
        for _ in 0..self.swarm.steps {
            self.disturb();
            self.step();
            self.verdict()?;
        }
        Ok(())
    }

    /// A disk as the guests' requests see it: those of larger blocks by way of a view in smaller ones.
    pub(super) fn in_guests_blocks(&self, disk: &SimDisk) -> Result<Arc<dyn Bdev>, BdevError> {
        Sectors::at_most(Arc::new(disk.clone()), self.block_size)
    }

    /// Turns on what the swarm has against targets.
    pub(super) fn spoil_target(&mut self) {
        if let Some(job) = self.control.job() {
            job.target.set_faults(self.swarm.target_faults.clone());
        }
    }

    /// A mirror as the swarm has them.
    pub(super) fn invent_mirror(&mut self) -> MirrorPlan {
        let limits = self.source.limits().in_blocks_of(self.block_size);
        let target = disk(&mut self.rng, Some(&limits));
        MirrorPlan::new(&mut self.rng, target, limits.block_size)
    }

    /// The liveness phase: nothing fails or dawdles any more, and everything must come to its end in time.
    ///
    /// # Errors
    /// The first finding, or what did not end.
    pub fn be_live(&mut self) -> Result<(), String> {
        self.control.operator = Operator::Quiet;
        for disk in self.control.disks().chain([&self.source]) {
            disk.heal();
            disk.release_stalled(self.now);
        }
        self.swarm.arrives_per_mille = 0;
        for seat in &mut self.seats {
            seat.guest.set_active(false);
            seat.session.iter_mut().for_each(Session::hurry);
        }
        self.run_until("every request ends", Nanos::from_secs(10), |world| {
            world.seats.iter().all(|seat| seat.guest.outstanding() == 0)
        })?;
        let goals = [JobVerb::Complete, JobVerb::Complete, JobVerb::Finish, JobVerb::Cancel];
        self.control.operator = Operator::Wants(self.rng.pick(&goals));
        self.run_until("the job ends", Nanos::from_secs(120), |world| {
            world.control.job().is_none() && world.control.releasing() == 0
        })?;
        self.check_medium();
        self.verdict()
    }

    /// Steps until `reached`, for at most so long.
    ///
    /// # Errors
    /// The first finding, or `what` did not come about.
    pub fn run_until(
        &mut self,
        what: &str,
        within: Nanos,
        reached: impl Fn(&Self) -> bool,
    ) -> Result<(), String> {
        let deadline = self.now + within;
        while !reached(self) {
            if self.now > deadline {
                return Err(format!("within {within}: {what}: did not come about"));
            }
            self.step();
            self.verdict()?;
        }
        Ok(())
    }

    /// Requests that have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.seats.iter().map(|seat| seat.guest.ended()).sum()
    }
}
