//! The control side of a guest's vhost session: gives the real [`BlkSession`] its memory and ring, and changes them under load.
//!
//! It stands for the vhost-user server: one command at a time, each answered before the next. What it may do to a session
//! that runs is what front ends do: replace the memory table, stop and start the ring, disable and enable it, change the
//! cache mode, reset the device.
//!
//! Some guests arrive by post-copy: until all of their memory has come, pages come late, in an order and after a time that the seed
//! says. They are there for the guest, which shares its memory file with the device; for the device a page that was not asked for
//! and brought is a bus error, and a finding.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use resilver_reactor::{Doorbell, Sender};
use resilver_sys::{EventFd, FaultRefusal, PAGE_SIZE};
use resilver_vhost::VhostStats;
use resilver_vhost::blk::{CacheMode, Serial};
use resilver_vhost::blk_session::{BlkSession, Command, Enabled, SessionConfig};
use resilver_vhost::chain::Indirect;
use resilver_vhost::inflight::{Holds, InflightMemory};
use resilver_vhost::memory::{GuestMemory, GuestRegion};
use resilver_vhost::message::{RegionDescription, RingAddresses};
use resilver_vhost::postcopy::fetcher::Fetcher;
use resilver_vhost::postcopy::pages::{RegionPages, Wanted};
use resilver_vhost::queue::LiveQueue;
use resilver_vhost::ring::{EventMode, Format, Ring, RingAreas};

use super::guest::SimGuest;
use super::lock;
use super::ring::{ENTRIES, GUEST_BASE};
use super::rng::Rng;
use super::trace::Trace;

/// A packed ring at its beginning, both ways.
const FRESH_PACKED: u32 = 0x8000_8000;

/// What control does to a session, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A new memory table, with the same memory in it.
    Memory,
    Start,
    Stop,
    Enable(Enabled),
    Cache(CacheMode),
    Reset,
    /// All of memory has come.
    Arrived,
}

/// Brings the pages of a guest that arrives: late, and only those that were asked for.
struct Pager {
    fetcher: Arc<Fetcher>,
    /// The guest's memory.
    file: Arc<OwnedFd>,
    /// The region that the device uses now.
    region: Option<(GuestRegion, Arc<RegionPages>)>,
    /// Under the device's mappings. None where the kernel cannot: then a page that is used too soon is not noticed.
    refusal: Option<FaultRefusal>,
    /// What is being brought.
    bringing: Option<Wanted>,
    rng: Rng,
    /// Turns in a thousand that bring a page.
    rate_per_mille: u32,
    hurries: bool,
}

impl Pager {
    fn new(file: Arc<OwnedFd>, doorbell: Arc<Doorbell>, mut rng: Rng) -> Self {
        let rate_per_mille = rng.pick(&[50, 300, 900]);
        let fetcher = Arc::new(Fetcher::new(doorbell));
        let refusal = FaultRefusal::new().ok();
        Self {
            fetcher,
            file,
            region: None,
            refusal,
            bringing: None,
            rng,
            rate_per_mille,
            hurries: false,
        }
    }

    /// A region whose pages come late.
    fn hide(&mut self, region: GuestRegion) -> GuestRegion {
        if self.refusal.as_ref().is_some_and(|it| it.cover_all(region.mapping()).is_err()) {
            self.refusal = None;
        }
        let pages = Arc::new(RegionPages::new(region.mapping(), None));
        let region = region.arriving(Arc::clone(&pages));
        self.region = Some((region.clone(), pages));
        region
    }

    /// Lets the device use a page. One of a mapping that it has no more nobody will use.
    fn bring(&self, wanted: &Wanted, page: usize) {
        if let Some((region, pages)) = &self.region
            && Arc::ptr_eq(pages, &wanted.region)
            && !pages.has(page)
        {
            // One that the guest has not touched yet is not there at all.
            let at = (page * PAGE_SIZE) as u64;
            let mut byte = [0];
            rustix::io::pread(&self.file, &mut byte, at).expect("a guest's memory");
            rustix::io::pwrite(&self.file, &byte, at).expect("a guest's memory");
            if let Some(refusal) = &self.refusal {
                refusal.admit(region.mapping(), page).expect("a page that is there");
            }
        }
        wanted.region.arrived(page);
    }

    /// Brings at once what a ring needs before it starts: control waits for it.
    fn bring_all(&self, wanted: Vec<Wanted>) {
        for wanted in wanted {
            wanted.pages.clone().for_each(|page| self.bring(&wanted, page));
        }
    }

    /// A turn.
    fn turn(&mut self) {
        while self.hurries
            && let Some(wanted) = self.bringing.take().or_else(|| self.fetcher.next())
        {
            self.bring_all(vec![wanted]);
            self.fetcher.answer();
        }
        if !self.rng.chance(self.rate_per_mille) {
            return;
        }
        let Some(mut wanted) = self.bringing.take().or_else(|| self.fetcher.next()) else { return };
        // From either end: nobody may count on an order.
        let page =
            if self.rng.chance(500) { wanted.pages.next() } else { wanted.pages.next_back() };
        if let Some(page) = page {
            self.bring(&wanted, page);
        }
        if wanted.pages.is_empty() {
            self.fetcher.answer();
        } else {
            self.bringing = Some(wanted);
        }
    }
}

/// Whether the last command was answered, and what is to be kept of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Awaited,
    Here,
    /// The ring was stopped and stands there.
    Stopped(u32),
}

/// The control side of one session.
pub struct Session {
    sender: Sender<Command>,
    steps: VecDeque<Step>,
    answer: Arc<Mutex<Answer>>,
    memory: GuestMemory,
    /// Where the ring goes on.
    format: Format,
    /// What the front end keeps of requests in flight, and what that can hold when the ring starts.
    inflight: Option<InflightMemory>,
    holds: Holds,
    base: u32,
    addresses: RingAddresses,
    kick: Arc<EventFd>,
    /// While the guest arrives.
    pager: Option<Pager>,
    trace: Trace,
}

impl Session {
    /// A session for `guest`, whose ring is empty, and its data side. The guest arrives by post-copy if `arrives` says when its pages
    /// come.
    ///
    /// # Panics
    /// The host refuses a descriptor.
    #[must_use]
    pub fn new(
        guest: &SimGuest,
        format: Format,
        doorbell: Arc<Doorbell>,
        arrives: Option<Rng>,
        trace: &Trace,
    ) -> (Self, BlkSession) {
        let pager =
            arrives.map(|rng| Pager::new(guest.memory_file().0, Arc::clone(&doorbell), rng));
        let fault_trace = trace.clone();
        let config = SessionConfig {
            num_queues: 1,
            read_only: false,
            serial: Serial::new("sim"),
            stats: Arc::new(VhostStats::default()),
            on_fault: Box::new(move |fault| {
                fault_trace.finding(format_args!("the session is over: {fault}"));
            }),
        };
        let (session, sender) = BlkSession::new(config, doorbell);
        let [descriptors, available, used] = guest.ring_addresses();
        let control = Self {
            sender,
            steps: VecDeque::from([Step::Memory, Step::Cache(CacheMode::WriteBack), Step::Start]),
            answer: Arc::new(Mutex::new(Answer::Here)),
            memory: GuestMemory::default(),
            format,
            inflight: guest.inflight(),
            holds: Holds::AnEarlierSession,
            base: if format == Format::Split { 0 } else { FRESH_PACKED },
            addresses: RingAddresses { flags: 0, descriptors, used, available, log: 0 },
            kick: Arc::new(EventFd::new().expect("an event descriptor")),
            pager,
            trace: trace.clone(),
        };
        (control, session)
    }

    /// Gives the next command if the last was answered.
    pub fn advance(&mut self, guest: &SimGuest) {
        if let Some(pager) = &mut self.pager {
            pager.turn();
            if self.memory.has_shrunk() {
                self.trace.finding("a page was used that had not come");
            }
        }
        match *lock(&self.answer) {
            Answer::Awaited => return,
            Answer::Here => {}
            Answer::Stopped(base) => self.base = base,
        }
        let Some(step) = self.steps.pop_front() else { return };
        *lock(&self.answer) = Answer::Awaited;
        self.trace.line(format_args!("control: {step:?}"));
        let command = self.command(step, guest);
        self.give(command);
    }

    /// Does something to the session.
    pub fn disturb(&mut self, rng: &mut Rng) {
        if !self.steps.is_empty() || *lock(&self.answer) == Answer::Awaited {
            return;
        }
        if let Some(pager) = &mut self.pager
            && pager.rng.chance(300)
        {
            self.steps.push_back(Step::Arrived);
            return;
        }
        let cache = rng.pick(&[CacheMode::WriteBack, CacheMode::WriteThrough]);
        self.steps.extend(
            rng.pick(&[
                [Some(Step::Memory), None],
                [Some(Step::Stop), Some(Step::Start)],
                [Some(Step::Enable(Enabled::No)), Some(Step::Enable(Enabled::Yes))],
                [Some(Step::Cache(cache)), None],
                [Some(Step::Reset), None],
            ])
            .into_iter()
            .flatten(),
        );
    }

    /// Pages that are asked for come at once from now on.
    pub fn hurry(&mut self) {
        if let Some(pager) = &mut self.pager {
            pager.hurries = true;
        }
    }

    /// The front end is gone.
    pub fn abandon(&mut self) {
        self.give(Command::Abandon(Box::new(|_in_flight| {})));
    }

    fn give(&self, command: Command) {
        if self.sender.send(command).is_err() {
            self.trace.finding("a session's mailbox is full");
        }
    }

    fn command(&mut self, step: Step, guest: &SimGuest) -> Command {
        match step {
            Step::Memory => {
                let rings = if self.memory.is_empty() { vec![] } else { vec![0] };
                let region = map(guest);
                let region = match &mut self.pager {
                    Some(pager) => pager.hide(region),
                    None => region,
                };
                self.memory = GuestMemory::new(vec![region]).expect("one region overlaps nothing");
                self.bring_ring();
                let rings = rings.into_iter().map(|queue| (queue, self.areas())).collect();
                let trace = self.trace.clone();
                let answered = self.answered();
                let reply = Box::new(move |result: Result<_, (_, _)>| {
                    if result.is_err() {
                        trace.finding("no room for a guest's memory");
                    }
                    answered(());
                });
                Command::SetMemory { memory: Box::new(self.memory.clone()), rings, reply }
            }
            Step::Start => {
                self.bring_ring();
                let (base, events) = (self.base, EventMode::Flags);
                let ring = Ring::new(self.format, self.areas(), ENTRIES, base, events);
                let mut ring = ring.expect("a ring goes on where it stopped");
                let again = match &self.inflight {
                    Some(memory) => {
                        memory.take_over(0, &mut ring, self.holds).unwrap_or_else(|wrong| {
                            self.trace.finding(wrong);
                            Box::default()
                        })
                    }
                    None => Box::default(),
                };
                self.holds = Holds::Nothing;
                let kick = Some(Arc::clone(&self.kick));
                let fetcher = self.pager.as_ref().map(|pager| Arc::clone(&pager.fetcher));
                let live = LiveQueue::new(ring, again, Indirect::Allowed, kick, None);
                let live = Box::new(live.with_fetcher(fetcher));
                let (trace, answered) = (self.trace.clone(), self.answered());
                let reply = Box::new(move |result: Result<(), _>| {
                    if result.is_err() {
                        trace.finding("a ring that was stopped cannot be started");
                    }
                    answered(());
                });
                Command::Start { queue: 0, live, enabled: Enabled::Yes, reply }
            }
            Step::Stop => {
                let (trace, answer) = (self.trace.clone(), Arc::clone(&self.answer));
                let reply = Box::new(move |live: Option<Box<LiveQueue>>| match live {
                    Some(live) => *lock(&answer) = Answer::Stopped(live.base()),
                    None => trace.finding("a ring that runs cannot be stopped"),
                });
                Command::Stop { queue: 0, reply }
            }
            Step::Enable(enabled) => {
                Command::Enable { queue: 0, enabled, reply: Box::new(self.answered()) }
            }
            Step::Cache(mode) => Command::SetCache(mode, Box::new(self.answered())),
            Step::Arrived => {
                self.pager = None;
                self.memory.arrived();
                Command::Arrived(Box::new(self.answered()))
            }
            Step::Reset => Command::GuestReset(Box::new(self.answered())),
        }
    }

    fn answered(&self) -> impl FnOnce(()) + Send + 'static {
        let answer = Arc::clone(&self.answer);
        move |()| *lock(&answer) = Answer::Here
    }

    /// Waits for the ring's own pages.
    fn bring_ring(&self) {
        if let Some(pager) = &self.pager {
            let wanted = RingAreas::wanted(&self.memory, self.format, ENTRIES, &self.addresses);
            pager.bring_all(wanted.expect("a well-made ring"));
        }
    }

    fn areas(&self) -> RingAreas {
        RingAreas::resolve(&self.memory, self.format, ENTRIES, &self.addresses)
            .expect("a well-placed ring")
    }
}

/// The guest's memory as its front end would describe it.
fn map(guest: &SimGuest) -> GuestRegion {
    let (file, size) = guest.memory_file();
    let description = RegionDescription {
        guest_address: GUEST_BASE,
        size,
        user_address: GUEST_BASE,
        file_offset: 0,
    };
    GuestRegion::map(&description, file.as_fd()).expect("a guest's memory maps")
}
