//! The session: what each message of a front end means, as a pure state machine.
//!
//! [`Session::handle`] takes a message and answers with the [`Action`]s that follow from it, in order. Nothing is mapped, read or
//! waited for here, so the same code runs in the server, in tests and under a fuzzer. A message is judged before anything is
//! changed: one that is refused leaves the session as it was.
//!
//! A ring's states and transitions are [`transition`]'s table (vhost-user, "Ring states"): it starts with its kick
//! descriptor, once its size and addresses are known, and stops with GET_VRING_BASE or a reset. Whether it is *enabled* is
//! independent of that and survives a stop.

use resilver_bdev::Limits;

use crate::blk::{BlkDevice, CacheMode, Serial, WRITEBACK_OFFSET, cache_mode};
use crate::blk_session::{Enabled, Notifier};
use crate::chain::Indirect;
use crate::device_state::{DeviceState, StateError};
use crate::message::{
    ConfigPiece, FdPresence, InflightDescription, Message, RegionDescription, Reply, RingAddresses,
};
use crate::protocol::{
    MEMORY_SLOTS_MAX, RING_SIZE_MAX, config_flags, device_state, device_status, features,
    protocol_features, request,
};
use crate::ring::{EventMode, Format};

mod postcopy;

pub use postcopy::{PostcopyEvent, PostcopyState};

/// The protocol features offered.
pub const PROTOCOL_FEATURES: u64 = protocol_features::MQ
    | protocol_features::LOG_SHMFD
    | protocol_features::REPLY_ACK
    | protocol_features::BACKEND_REQ
    | protocol_features::CONFIG
    | protocol_features::INFLIGHT_SHMFD
    | protocol_features::RESET_DEVICE
    | protocol_features::CONFIGURE_MEM_SLOTS
    | protocol_features::STATUS
    | protocol_features::DEVICE_STATE;

/// The one that is offered only where the operator wants it: see [`crate::postcopy`].
pub const POSTCOPY_FEATURES: u64 = protocol_features::PAGEFAULT;

/// Where a ring is in its life, as the front end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingState {
    /// Not started.
    Stopped,
    /// Told to start before its size and addresses were known.
    Kicked,
    /// Served by the data side.
    Running,
}

/// What a message does to a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingEvent {
    /// SET_VRING_NUM.
    Size,
    /// SET_VRING_ADDR.
    Addresses,
    /// SET_VRING_BASE.
    Base,
    /// SET_VRING_KICK.
    Kick,
    /// GET_VRING_BASE, or a reset.
    Stop,
}

/// Whether all is known that a ring needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Its size or its addresses are missing.
    Incomplete,
    /// It may start.
    Complete,
}

/// What follows for the data side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Nothing,
    /// Start serving it.
    Start,
    /// Go on at other addresses.
    Move,
    /// Stop serving it.
    Stop,
}

/// The table of a ring's states. None: the event is not allowed in that state.
#[must_use]
pub fn transition(
    state: RingState,
    event: RingEvent,
    readiness: Readiness,
) -> Option<(RingState, Step)> {
    use RingEvent::{Addresses, Base, Kick, Size, Stop};
    use RingState::{Kicked, Running, Stopped};
    Some(match (state, event, readiness) {
        (Stopped, Size | Addresses | Base, Readiness::Incomplete | Readiness::Complete) => {
            (Stopped, Step::Nothing)
        }
        (Stopped, Kick, Readiness::Incomplete) => (Kicked, Step::Nothing),
        (Stopped, Kick, Readiness::Complete) => (Running, Step::Start),
        (Kicked, Size | Addresses | Base | Kick, Readiness::Incomplete) => (Kicked, Step::Nothing),
        (Kicked, Size | Addresses | Base | Kick, Readiness::Complete) => (Running, Step::Start),
        (Stopped | Kicked, Stop, Readiness::Incomplete | Readiness::Complete) => {
            (Stopped, Step::Nothing)
        }
        (Running, Addresses, Readiness::Incomplete | Readiness::Complete) => (Running, Step::Move),
        (Running, Kick, Readiness::Incomplete | Readiness::Complete) => (Running, Step::Nothing),
        (Running, Stop, Readiness::Incomplete | Readiness::Complete) => (Stopped, Step::Stop),
        (Running, Size | Base, Readiness::Incomplete | Readiness::Complete) => return None,
    })
}

/// What is to be done about a message. Descriptors that came with it are the executor's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Replace the whole memory table; one descriptor for each region, in order.
    SetMemory(Vec<RegionDescription>),
    /// Map one region more.
    AddRegion(RegionDescription),
    /// The same two in post-copy: map what arrives later, and answer where. It is used when the monitor has acknowledged it.
    StageMemory(Vec<RegionDescription>),
    /// One region more.
    StageRegion(RegionDescription),
    /// Use the memory that was staged.
    UseStaged,
    /// Answer with a userfaultfd.
    Advise,
    /// Memory that is shared from now on arrives later.
    Listen,
    /// All of memory has arrived.
    EndPostcopy,
    /// Let one go.
    RemoveRegion(RegionDescription),
    /// The descriptor that came holds the dirty log, in these bytes.
    SetLog {
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Signal the descriptor that came when pages were marked in the dirty log.
    SetLogEvent,
    /// Log to guest memory's dirty log, or no longer, as [`Session::is_logged`] says.
    SetLogging,
    /// Serve a ring, as [`Session::ring`] describes it.
    Start(u16),
    /// Go on with a ring at the addresses that [`Session::ring`] has now.
    Move(u16),
    /// Stop a ring; tell [`Session::stopped`] where it stands.
    Stop(u16),
    /// Keep the descriptor that came, or drop the one that was there.
    SetNotifier(u16, Notifier, FdPresence),
    /// Enable or disable a ring.
    Enable(u16, Enabled),
    /// What completed writes promise from now on.
    SetCache(CacheMode),
    /// The guest has reset its device.
    GuestReset,
    /// The descriptor that came is the channel on which the back end sends.
    SetBackChannel,
    /// Make memory to track requests in flight in, for rings of a format: so many, of so many entries. Answer with it.
    MakeInflight(Format, u16, u16),
    /// Track requests in flight in the memory that came.
    SetInflight(InflightDescription),
    /// Write what the device is to the pipe that came.
    SaveState,
    /// Read what it is to be from the pipe that came.
    LoadState,
    /// See how that went, take on what was read with [`Session::restore`], and answer.
    CheckState,
    /// Answer.
    Reply(Reply),
    /// Answer where a ring stands, once it has stopped.
    ReplyBase(u16),
}

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Features that were not offered.
    #[error("features {unknown:#x} were not offered")]
    Features {
        /// Those.
        unknown: u64,
    },
    /// Ring features were changed under running rings.
    #[error("features {changed:#x} cannot change while a ring is running")]
    FeaturesInUse {
        /// Those.
        changed: u64,
    },
    /// A message of a protocol feature that was not negotiated.
    #[error("{0} belongs to a protocol feature that was not negotiated")]
    NotNegotiated(&'static str),
    /// A message of a post-copy migration at the wrong time.
    #[error("it came while {0}")]
    Postcopy(PostcopyState),
    /// No such ring.
    #[error("there is no ring {index}; there are {num_queues}")]
    NoRing {
        /// What was named.
        index: u32,
        /// How many there are.
        num_queues: u16,
    },
    /// Not a ring's size.
    #[error(
        "a ring of {0} entries: there are at most {RING_SIZE_MAX}, in a split ring a power of two"
    )]
    RingSize(u32),
    /// A field is out of range.
    #[error("{field} is {value}, which is out of range")]
    Value {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The ring is running.
    #[error("message {request} for ring {index}, which is running")]
    RingRunning {
        /// The message.
        request: u32,
        /// The ring.
        index: u16,
    },
    /// The memory for requests in flight was to be changed under running rings.
    #[error("the in-flight region cannot change while a ring is running")]
    InflightInUse,
    /// The device state was to be saved or loaded under running rings.
    #[error("the device state is saved and loaded while all rings are stopped, and one is running")]
    StateInUse,
    /// A piece of the configuration space that is not writable.
    #[error("{length} bytes at {offset} of the configuration space cannot be written")]
    ConfigReadOnly {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: usize,
    },
}

/// What the front end has said about a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ring {
    state: RingState,
    enabled: Enabled,
    size: u16,
    addresses: Option<RingAddresses>,
    base: u32,
}

impl Ring {
    fn new(enabled: Enabled) -> Self {
        Self { state: RingState::Stopped, enabled, size: 0, addresses: None, base: 0 }
    }

    fn readiness(&self) -> Readiness {
        if self.size > 0 && self.addresses.is_some() {
            Readiness::Complete
        } else {
            Readiness::Incomplete
        }
    }
}

/// All that the data side needs to serve a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSetup {
    /// Entries.
    pub size: u16,
    /// Where it is, in the front end's addresses.
    pub addresses: RingAddresses,
    /// Where it goes on (vhost-user, "Vring descriptor index/indices").
    pub base: u32,
    /// How it is laid out.
    pub format: Format,
    /// Whether it is enabled.
    pub enabled: Enabled,
    /// How the guest wants to be told of used buffers.
    pub events: EventMode,
    /// Whether it may use indirect tables.
    pub indirect: Indirect,
}

/// The state of one connection.
#[derive(Debug, Clone)]
pub struct Session {
    device: BlkDevice,
    /// Negotiated virtio features, vhost-user's own bit included.
    features: u64,
    protocol_features: u64,
    status: u8,
    /// The `writeback` field of the configuration space. Front ends read it before they negotiate, keep what they read or wrote
    /// for as long as they live, and never hear of a reset's choice; so it begins as it will be and only its guest changes it.
    writeback: CacheMode,
    rings: Vec<Ring>,
    /// A ring was started since the last reset, or the driver said that it is ready: there is a guest that could reset the
    /// device.
    driven: bool,
    postcopy: PostcopyState,
}

impl Session {
    /// A fresh connection to `device`, whose cache is as the last guest left it.
    #[must_use]
    pub fn new(device: BlkDevice, writeback: CacheMode) -> Self {
        let rings = (0..device.num_queues).map(|_| Ring::new(Enabled::No)).collect();
        Self {
            device,
            features: 0,
            protocol_features: 0,
            status: 0,
            writeback,
            rings,
            driven: false,
            postcopy: PostcopyState::Off,
        }
    }

    /// What the guest wants of the cache.
    #[must_use]
    pub fn writeback(&self) -> CacheMode {
        self.writeback
    }

    /// The negotiated virtio features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a protocol feature was negotiated.
    #[must_use]
    pub fn has_protocol_feature(&self, feature: u64) -> bool {
        self.protocol_features & feature != 0
    }

    /// Where it is in a post-copy migration.
    #[must_use]
    pub fn postcopy(&self) -> PostcopyState {
        self.postcopy
    }

    /// What a message was to do could not be done: it is where it was before that.
    pub fn undo_postcopy(&mut self, before: PostcopyState) {
        self.postcopy = before;
    }

    /// Whether what the device writes to guest memory is to be logged.
    #[must_use]
    pub fn is_logged(&self) -> bool {
        self.features & features::LOG_ALL != 0
    }

    /// The disk has another size now.
    pub fn resize(&mut self, limits: Limits) {
        self.device.limits = limits;
    }

    /// What a ring is, once its size and addresses are known.
    #[must_use]
    pub fn ring(&self, queue: u16) -> Option<RingSetup> {
        let ring = self.rings.get(usize::from(queue))?;
        let events = match self.features & features::RING_EVENT_IDX {
            0 => EventMode::Flags,
            _ => EventMode::Index,
        };
        let indirect = match self.features & features::RING_INDIRECT_DESC {
            0 => Indirect::Refused,
            _ => Indirect::Allowed,
        };
        let Ring { size, base, enabled, .. } = *ring;
        let (addresses, format) = (ring.addresses?, self.format());
        Some(RingSetup { size, addresses, base, format, enabled, events, indirect })
    }

    /// How the rings are laid out, as negotiated.
    fn format(&self) -> Format {
        match self.features & features::RING_PACKED {
            0 => Format::Split,
            _ => Format::Packed,
        }
    }

    /// The rings that are running.
    pub fn running(&self) -> impl Iterator<Item = u16> {
        let running = |(_, ring): &(u16, &Ring)| ring.state == RingState::Running;
        (0..).zip(&self.rings).filter(running).map(|(queue, _)| queue)
    }

    /// What the device is, for another back end to go on with.
    #[must_use]
    pub fn state(&self, serial: Serial) -> DeviceState {
        DeviceState {
            block_size: self.device.limits.block_size,
            capacity: self.device.limits.size(),
            features: self.features,
            serial,
            status: self.status,
            writeback: self.writeback,
        }
    }

    /// Goes on with what another back end was. Answers what completed writes promise from now on.
    ///
    /// # Errors
    /// It was another device. Nothing has changed.
    pub fn restore(
        &mut self,
        state: &DeviceState,
        serial: Serial,
    ) -> Result<CacheMode, StateError> {
        state.fits(&self.device, serial)?;
        (self.status, self.writeback) = (state.status, state.writeback);
        Ok(cache_mode(self.features, self.writeback))
    }

    /// A ring that was to start could not be.
    pub fn not_started(&mut self, queue: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            ring.state = RingState::Stopped;
        }
    }

    /// The guest has chosen another cache mode in another session: it is the same guest, before or after its migration.
    /// While rings run here it is this session that knows.
    #[must_use]
    pub fn adopt_writeback(&mut self, writeback: CacheMode) -> Option<Action> {
        if self.writeback == writeback || self.running().next().is_some() {
            return None;
        }
        self.writeback = writeback;
        Some(self.cache_action())
    }

    /// A ring has stopped and stands there.
    pub fn stopped(&mut self, queue: u16, base: u32) {
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            ring.base = base;
        }
    }

    /// Where a ring stands.
    #[must_use]
    pub fn base(&self, queue: u16) -> u32 {
        self.rings.get(usize::from(queue)).map_or(0, |ring| ring.base)
    }

    /// Takes one message.
    ///
    /// # Errors
    /// Why it is refused. The session is as it was.
    pub fn handle(&mut self, message: &Message) -> Result<Vec<Action>, SessionError> {
        Ok(match message {
            Message::GetFeatures => number(self.device.features()),
            Message::SetFeatures(wanted) => self.set_features(*wanted)?,
            Message::GetProtocolFeatures => number(self.device.protocol_features()),
            Message::SetProtocolFeatures(wanted) => {
                offered(*wanted, self.device.protocol_features())?;
                self.protocol_features = *wanted;
                Vec::new()
            }
            // RESET_OWNER is deprecated; front ends that send it mean nothing by it (vhost-user, "VHOST_USER_RESET_OWNER").
            Message::SetOwner | Message::ResetOwner => Vec::new(),
            // Empty, it is an acknowledgement.
            Message::SetMemTable(regions)
                if self.postcopy == PostcopyState::Mapped && regions.is_empty() =>
            {
                vec![self.at(PostcopyEvent::Acknowledge, Action::UseStaged)?]
            }
            Message::SetMemTable(regions) if self.postcopy.is_listening() => {
                vec![self.at(PostcopyEvent::Map, Action::StageMemory(regions.clone()))?]
            }
            Message::SetMemTable(regions) => vec![Action::SetMemory(regions.clone())],
            Message::GetMaxMemSlots => number(MEMORY_SLOTS_MAX as u64),
            Message::AddMemReg(region) if self.postcopy.is_listening() => {
                vec![self.at(PostcopyEvent::Map, Action::StageRegion(*region))?]
            }
            Message::AddMemReg(region) => vec![Action::AddRegion(*region)],
            Message::RemMemReg(region) => vec![Action::RemoveRegion(*region)],
            Message::SetLogBase { size, offset } => self.set_log(*offset, *size),
            Message::SetLogFd => vec![Action::SetLogEvent],
            Message::GetQueueNum => number(u64::from(self.device.num_queues)),
            Message::SetVringNum { index, num } => self.set_size(*index, *num)?,
            Message::SetVringAddr { index, addresses } => {
                self.change(message, *index, RingEvent::Addresses, |ring| {
                    ring.addresses = Some(*addresses);
                })?
            }
            Message::SetVringBase { index, base } => {
                if self.format() == Format::Split && *base > u32::from(u16::MAX) {
                    return Err(out_of_range("the ring's base", u64::from(*base)));
                }
                self.change(message, *index, RingEvent::Base, |ring| ring.base = *base)?
            }
            Message::GetVringBase { index } => {
                let mut actions = self.change(message, *index, RingEvent::Stop, |_| ())?;
                actions.push(Action::ReplyBase(self.queue(*index)?));
                actions
            }
            Message::SetVringKick { index, fd } => {
                let notifier = Action::SetNotifier(self.queue(*index)?, Notifier::Kick, *fd);
                let mut actions = vec![notifier];
                actions.extend(self.change(message, *index, RingEvent::Kick, |_| ())?);
                actions
            }
            Message::SetVringCall { index, fd } => {
                vec![Action::SetNotifier(self.queue(*index)?, Notifier::Call, *fd)]
            }
            // Nothing is ever signalled there: a broken ring ends the connection.
            Message::SetVringErr { index, .. } => self.queue(*index).map(|_| Vec::new())?,
            Message::SetVringEnable { index, enable } => self.enable(*index, *enable)?,
            Message::SetBackendReqFd => vec![Action::SetBackChannel],
            Message::GetConfig(piece) => vec![Action::Reply(self.get_config(piece))],
            Message::SetConfig(piece) => self.set_config(piece)?,
            Message::PostcopyAdvise if !self.has_protocol_feature(protocol_features::PAGEFAULT) => {
                return Err(SessionError::NotNegotiated(message.name()));
            }
            Message::PostcopyAdvise => vec![self.at(PostcopyEvent::Advise, Action::Advise)?],
            Message::PostcopyListen => vec![self.at(PostcopyEvent::Listen, Action::Listen)?],
            Message::PostcopyEnd => {
                let end = self.at(PostcopyEvent::End, Action::EndPostcopy)?;
                vec![end, Action::Reply(Reply::U64(0))]
            }
            Message::MemoryAck { result: 0, .. } => {
                vec![self.at(PostcopyEvent::Acknowledge, Action::UseStaged)?]
            }
            Message::MemoryAck { result, .. } => {
                return Err(out_of_range("the acknowledgement of memory", *result));
            }
            Message::GetInflightFd(_) | Message::SetInflightFd(_)
                if !self.has_protocol_feature(protocol_features::INFLIGHT_SHMFD) =>
            {
                return Err(SessionError::NotNegotiated(message.name()));
            }
            Message::GetInflightFd(wanted) => {
                vec![Action::MakeInflight(self.format(), wanted.num_queues, wanted.queue_size)]
            }
            Message::SetInflightFd(_) if self.running().next().is_some() => {
                return Err(SessionError::InflightInUse);
            }
            Message::SetInflightFd(description) => vec![Action::SetInflight(*description)],
            Message::SetDeviceStateFd { direction, phase } => {
                vec![self.transfer(*direction, *phase)?]
            }
            Message::CheckDeviceState => vec![Action::CheckState],
            Message::ResetDevice => {
                let mut actions = self.reset();
                actions.extend(self.guest_reset());
                actions
            }
            Message::SetStatus(status) => self.set_status(*status)?,
            Message::GetStatus => number(u64::from(self.status)),
        })
    }

    /// What follows from a message of a post-copy migration, if it may come now.
    fn at(&mut self, event: PostcopyEvent, action: Action) -> Result<Action, SessionError> {
        let refused = SessionError::Postcopy(self.postcopy);
        self.postcopy = postcopy::transition(self.postcopy, event).ok_or(refused)?;
        Ok(action)
    }

    fn queue(&self, index: u32) -> Result<u16, SessionError> {
        let num_queues = self.device.num_queues;
        u16::try_from(index)
            .ok()
            .filter(|queue| *queue < num_queues)
            .ok_or(SessionError::NoRing { index, num_queues })
    }

    /// Changes what is known of a ring and its state.
    fn change(
        &mut self,
        message: &Message,
        index: u32,
        event: RingEvent,
        set: impl FnOnce(&mut Ring),
    ) -> Result<Vec<Action>, SessionError> {
        let queue = self.queue(index)?;
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { return Ok(Vec::new()) };
        let mut changed = *ring;
        set(&mut changed);
        let running = SessionError::RingRunning { request: message.request(), index: queue };
        let (state, step) = transition(ring.state, event, changed.readiness()).ok_or(running)?;
        changed.state = state;
        *ring = changed;
        Ok(match step {
            Step::Nothing => Vec::new(),
            Step::Start => {
                self.driven = true;
                vec![Action::Start(queue)]
            }
            Step::Move => vec![Action::Move(queue)],
            Step::Stop => vec![Action::Stop(queue)],
        })
    }

    fn set_size(&mut self, index: u32, num: u32) -> Result<Vec<Action>, SessionError> {
        // virtio 2.7, 2.8.10.1.
        let fits = |size: &u16| match self.format() {
            Format::Split => size.is_power_of_two() && *size <= RING_SIZE_MAX,
            Format::Packed => (1..=RING_SIZE_MAX).contains(size),
        };
        let size = u16::try_from(num).ok().filter(fits).ok_or(SessionError::RingSize(num))?;
        let message = Message::SetVringNum { index, num };
        self.change(&message, index, RingEvent::Size, |ring| ring.size = size)
    }

    fn enable(&mut self, index: u32, enable: u32) -> Result<Vec<Action>, SessionError> {
        let queue = self.queue(index)?;
        let enabled = match enable {
            0 => Enabled::No,
            1 => Enabled::Yes,
            other => return Err(out_of_range("the ring's enable", u64::from(other))),
        };
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            ring.enabled = enabled;
        }
        Ok(vec![Action::Enable(queue, enabled)])
    }

    fn set_features(&mut self, wanted: u64) -> Result<Vec<Action>, SessionError> {
        offered(wanted, self.device.features())?;
        let changed = wanted ^ self.features;
        let of_rings = changed
            & (features::RING_EVENT_IDX | features::RING_INDIRECT_DESC | features::RING_PACKED);
        if of_rings != 0 && self.running().next().is_some() {
            return Err(SessionError::FeaturesInUse { changed: of_rings });
        }
        self.features = wanted;
        let mut actions = Vec::new();
        if changed != 0 {
            actions.push(self.cache_action());
        }
        // Asked for again, it is looked at again: the log that it was refused for is too small still, or is not.
        if (changed | wanted) & features::LOG_ALL != 0 {
            actions.push(Action::SetLogging);
        }
        if wanted & features::PROTOCOL_FEATURES == 0 {
            // Without the bit nobody will send SET_VRING_ENABLE (vhost-user, "Ring states").
            for (queue, ring) in (0..).zip(&mut self.rings) {
                ring.enabled = Enabled::Yes;
                if ring.state == RingState::Running {
                    actions.push(Action::Enable(queue, Enabled::Yes));
                }
            }
        }
        Ok(actions)
    }

    /// This message is answered where the log is shared memory, wanted or not (vhost-user, "Communication"); elsewhere only for
    /// REPLY_ACK.
    fn set_log(&self, offset: u64, size: u64) -> Vec<Action> {
        let mut actions = vec![Action::SetLog { offset, size }];
        if self.has_protocol_feature(protocol_features::LOG_SHMFD) {
            actions.extend(number(0));
        }
        actions
    }

    fn transfer(&self, direction: u32, phase: u32) -> Result<Action, SessionError> {
        if !self.has_protocol_feature(protocol_features::DEVICE_STATE) {
            return Err(SessionError::NotNegotiated("SET_DEVICE_STATE_FD"));
        }
        if self.running().next().is_some() {
            return Err(SessionError::StateInUse);
        }
        match (direction, phase) {
            (device_state::SAVE, device_state::STOPPED) => Ok(Action::SaveState),
            (device_state::LOAD, device_state::STOPPED) => Ok(Action::LoadState),
            (device_state::SAVE | device_state::LOAD, other) => {
                Err(out_of_range("the migration's phase", u64::from(other)))
            }
            (other, _) => Err(out_of_range("the transfer's direction", u64::from(other))),
        }
    }

    fn cache_action(&self) -> Action {
        Action::SetCache(cache_mode(self.features, self.writeback))
    }

    fn get_config(&self, piece: &ConfigPiece) -> Reply {
        // Before anything is negotiated it says what a driver that takes all will find.
        let features = if self.features == 0 { self.device.features() } else { self.features };
        let space = self.device.config_space(cache_mode(features, self.writeback));
        let begin = piece.offset as usize;
        let bytes = begin
            .checked_add(piece.bytes.len())
            .and_then(|end| space.get(begin..end))
            .filter(|bytes| !bytes.is_empty());
        match bytes {
            Some(bytes) => Reply::Config(ConfigPiece { bytes: bytes.to_vec(), ..*piece }),
            None => Reply::Empty,
        }
    }

    fn set_config(&mut self, piece: &ConfigPiece) -> Result<Vec<Action>, SessionError> {
        let length = piece.bytes.len();
        let refused = SessionError::ConfigReadOnly { offset: piece.offset, length };
        let field = WRITEBACK_OFFSET
            .checked_sub(piece.offset)
            .and_then(|at| piece.bytes.get(at as usize).copied());
        let writeback = match (piece.flags, field) {
            (config_flags::WRITABLE, Some(value)) if length == 1 => {
                if self.features & features::CONFIG_WCE == 0 {
                    return Err(refused);
                }
                value
            }
            (config_flags::LIVE_MIGRATION, Some(value)) => value,
            (config_flags::LIVE_MIGRATION, None) => return Ok(Vec::new()),
            _ => return Err(refused),
        };
        self.writeback =
            if writeback == 0 { CacheMode::WriteThrough } else { CacheMode::WriteBack };
        Ok(vec![self.cache_action()])
    }

    fn set_status(&mut self, status: u64) -> Result<Vec<Action>, SessionError> {
        let status = u8::try_from(status).map_err(|_| out_of_range("the device status", status))?;
        let was = std::mem::replace(&mut self.status, status);
        self.driven |= status & device_status::DRIVER_OK != 0;
        // Zero is a reset, but a device that was never set up has nothing to reset.
        if status != 0 || was == 0 {
            return Ok(Vec::new());
        }
        let mut actions = self.reset();
        if !self.has_protocol_feature(protocol_features::RESET_DEVICE) {
            actions.extend(self.guest_reset());
        }
        Ok(actions)
    }

    /// What follows from a reset that is the guest's. QEMU (10.0) resets the device when it connects, before there is a guest, and
    /// several times for one reset of the machine; and it sets the status to zero whenever it stops the device, to pause the
    /// machine or to migrate it. So a reset counts once after the device was in use, and a front end that has RESET_DEVICE is
    /// taken to mean a pause by a status of zero.
    fn guest_reset(&mut self) -> Option<Action> {
        std::mem::take(&mut self.driven).then_some(Action::GuestReset)
    }

    /// Stops all rings and forgets what was said about them. Memory, descriptors and features stay: the session goes on.
    fn reset(&mut self) -> Vec<Action> {
        let mut actions: Vec<_> = self.running().map(Action::Stop).collect();
        let enabled = match self.features & features::PROTOCOL_FEATURES {
            0 => Enabled::Yes,
            _ => Enabled::No,
        };
        self.rings.fill(Ring::new(enabled));
        self.status = 0;
        actions.push(self.cache_action());
        actions
    }
}

fn number(value: u64) -> Vec<Action> {
    vec![Action::Reply(Reply::U64(value))]
}

fn offered(wanted: u64, offer: u64) -> Result<(), SessionError> {
    match wanted & !offer {
        0 => Ok(()),
        unknown => Err(SessionError::Features { unknown }),
    }
}

fn out_of_range(field: &'static str, value: u64) -> SessionError {
    SessionError::Value { field, value }
}

/// Whether a message has an answer of its own, so that none is added for REPLY_ACK. In post-copy those that share memory have one
/// too, which is added to nothing either.
#[must_use]
pub fn has_reply(id: u32) -> bool {
    matches!(
        id,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_MAX_MEM_SLOTS
            | request::GET_VRING_BASE
            | request::GET_CONFIG
            | request::POSTCOPY_ADVISE
            | request::POSTCOPY_END
            | request::GET_INFLIGHT_FD
            | request::GET_STATUS
            | request::SET_DEVICE_STATE_FD
            | request::CHECK_DEVICE_STATE
    )
}

/// How a message is answered that was refused: most only where an acknowledgement is wanted. None: the connection ends over it.
#[must_use]
pub fn refusal(id: u32, acknowledges: bool) -> Option<Reply> {
    match id {
        request::SET_DEVICE_STATE_FD => {
            Some(Reply::U64(device_state::NO_FD | device_state::FAILED))
        }
        request::CHECK_DEVICE_STATE | request::POSTCOPY_END => Some(Reply::U64(1)),
        // Without the descriptor that it waits for the monitor gives its migration up.
        request::POSTCOPY_ADVISE => Some(Reply::Empty),
        _ => acknowledges.then_some(Reply::U64(1)),
    }
}

#[cfg(test)]
mod tests;
