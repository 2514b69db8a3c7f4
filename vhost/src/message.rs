//! The vhost-user codec: bytes to typed messages and back, as pure functions.
//!
//! No socket and no descriptor is touched here: [`decode`] is told how many descriptors came along and says whether that
//! is right; whoever read them keeps them. Every size is checked against the message's layout; a body that is one byte
//! longer or shorter than it must be is refused. What a message means, and whether it may be sent now, is
//! [`crate::session`]'s to say. Both directions are here so that the front end uses the same codec.
//!
//! Fault model: the peer may send anything. Nothing here panics, allocates more than a message holds, or loops over a count
//! that was not checked first.

use crate::protocol::{
    BODY_BYTES_MAX, CONFIG_BYTES_MAX, FDS_MAX, HEADER_BYTES, TABLE_REGIONS_MAX, flags, request,
    vring_fd,
};

/// A message header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What is asked ([`request`]).
    pub request: u32,
    /// Version, reply and need-reply bits ([`flags`]).
    pub flags: u32,
    /// Bytes of the body.
    pub size: u32,
}

impl Header {
    /// A header with the version set.
    #[must_use]
    pub fn new(request: u32, flags: u32, size: u32) -> Self {
        Self { request, flags: flags | flags::VERSION, size }
    }

    /// Whether the sender wants an answer even where the message has none of its own.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & flags::NEED_REPLY != 0
    }

    /// Whether the message is an answer.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.request, self.flags, self.size];
        for (chunk, field) in bytes.chunks_exact_mut(4).zip(fields) {
            chunk.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Another version, or a body longer than any message has.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut body = Body::new(bytes);
        let header = Self { request: body.u32()?, flags: body.u32()?, size: body.u32()? };
        if header.flags & flags::VERSION_MASK != flags::VERSION {
            return Err(DecodeError::Version { flags: header.flags });
        }
        if header.size as usize > BODY_BYTES_MAX {
            return Err(DecodeError::TooLong { request: header.request, size: header.size });
        }
        Ok(header)
    }
}

/// Why a message was refused. The connection is closed with this as the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not version 1.
    #[error("the message's flags {flags:#x} are not those of version 1 of the protocol")]
    Version {
        /// The flags.
        flags: u32,
    },
    /// Longer than any message.
    #[error("message {request} claims a body of {size} bytes, more than any message has")]
    TooLong {
        /// The message.
        request: u32,
        /// Its claim.
        size: u32,
    },
    /// No message of this number is served.
    #[error("message {request} is not known here")]
    Unknown {
        /// The message.
        request: u32,
    },
    /// The body is longer or shorter than the message's layout.
    #[error("a body of {size} bytes does not fit message {request}")]
    Size {
        /// The message.
        request: u32,
        /// The body's length.
        size: usize,
    },
    /// More or fewer descriptors than the message carries.
    #[error("message {request} came with {fds} file descriptors instead of {expected}")]
    Descriptors {
        /// The message.
        request: u32,
        /// How many came.
        fds: usize,
        /// How many belong to it.
        expected: usize,
    },
    /// The body ended too soon.
    #[error("the message ends too soon")]
    Truncated,
}

/// One region of guest memory, as the front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionDescription {
    /// Where the guest sees it: what descriptors carry.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front end sees it: what ring addresses carry.
    pub user_address: u64,
    /// Where it begins in its file.
    pub file_offset: u64,
}

/// Addresses of a ring's parts, in the front end's own address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// [`crate::protocol::vring_flags`].
    pub flags: u32,
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
    /// Where writes to the used ring are logged: its guest address, if the flags say so.
    pub log: u64,
}

/// Whether a descriptor came with a kick, call or error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdPresence {
    /// It did.
    Attached,
    /// Bit 8: there is none; poll, or do not notify.
    Absent,
}

/// A piece of the configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigPiece {
    /// First byte.
    pub offset: u32,
    /// See [`crate::protocol::config_flags`].
    pub flags: u32,
    /// The bytes; what they are in a GET_CONFIG request is of no interest, their number is.
    pub bytes: Vec<u8>,
}

/// The memory in which requests in flight are recorded, whose descriptor comes along (vhost-user, "Inflight I/O
/// description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightDescription {
    /// Bytes of it.
    pub mmap_size: u64,
    /// Where it begins in its file, bytes.
    pub mmap_offset: u64,
    /// Rings that it records.
    pub num_queues: u16,
    /// Entries of each.
    pub queue_size: u16,
}

/// A request from the front end.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // named and documented in [`request`]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionDescription>),
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        addresses: RingAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        fd: FdPresence,
    },
    SetVringCall {
        index: u32,
        fd: FdPresence,
    },
    SetVringErr {
        index: u32,
        fd: FdPresence,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: u32,
    },
    SetBackendReqFd,
    GetConfig(ConfigPiece),
    SetConfig(ConfigPiece),
    PostcopyAdvise,
    PostcopyListen,
    PostcopyEnd,
    /// In post-copy: the monitor is ready to serve the faults of what message `of` has changed, if `result` is zero. An empty
    /// SET_MEM_TABLE says the same of a memory table.
    MemoryAck {
        of: u32,
        result: u64,
    },
    GetInflightFd(InflightDescription),
    SetInflightFd(InflightDescription),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionDescription),
    RemMemReg(RegionDescription),
    SetStatus(u64),
    GetStatus,
    SetDeviceStateFd {
        direction: u32,
        phase: u32,
    },
    CheckDeviceState,
}

/// Reads a message whose header said `request`, from its whole body and the number of descriptors that came with it.
///
/// # Errors
/// Says what does not fit.
pub fn decode(request: u32, body: &[u8], fds: usize) -> Result<Message, DecodeError> {
    let mut reader = Body::new(body);
    let message = decode_body(request, &mut reader).map_err(|error| match error {
        DecodeError::Truncated => DecodeError::Size { request, size: body.len() },
        other => other,
    })?;
    if !reader.rest.is_empty() {
        return Err(DecodeError::Size { request, size: body.len() });
    }
    let expected = message.descriptors();
    // An fd with REM_MEM_REG means nothing, but libblkio's client and older QEMU send one (vhost-user, REM_MEM_REG).
    let stray = matches!(message, Message::RemMemReg(_)) && fds == 1;
    if fds != expected && !stray {
        return Err(DecodeError::Descriptors { request, fds, expected });
    }
    Ok(message)
}

fn decode_body(id: u32, body: &mut Body<'_>) -> Result<Message, DecodeError> {
    Ok(match id {
        request::GET_FEATURES => Message::GetFeatures,
        request::SET_FEATURES => Message::SetFeatures(body.u64()?),
        request::SET_OWNER => Message::SetOwner,
        request::RESET_OWNER => Message::ResetOwner,
        request::SET_MEM_TABLE => Message::SetMemTable(body.table()?),
        request::SET_LOG_BASE => Message::SetLogBase { size: body.u64()?, offset: body.u64()? },
        request::SET_LOG_FD => Message::SetLogFd,
        request::SET_VRING_NUM => Message::SetVringNum { index: body.u32()?, num: body.u32()? },
        request::SET_VRING_ADDR => body.vring_addr()?,
        request::SET_VRING_BASE => Message::SetVringBase { index: body.u32()?, base: body.u32()? },
        request::GET_VRING_BASE => {
            let (index, _unused) = (body.u32()?, body.u32()?);
            Message::GetVringBase { index }
        }
        request::SET_VRING_KICK => {
            let (index, fd) = body.vring_fd()?;
            Message::SetVringKick { index, fd }
        }
        request::SET_VRING_CALL => {
            let (index, fd) = body.vring_fd()?;
            Message::SetVringCall { index, fd }
        }
        request::SET_VRING_ERR => {
            let (index, fd) = body.vring_fd()?;
            Message::SetVringErr { index, fd }
        }
        request::GET_PROTOCOL_FEATURES => Message::GetProtocolFeatures,
        request::SET_PROTOCOL_FEATURES => Message::SetProtocolFeatures(body.u64()?),
        request::GET_QUEUE_NUM => Message::GetQueueNum,
        request::SET_VRING_ENABLE => {
            Message::SetVringEnable { index: body.u32()?, enable: body.u32()? }
        }
        request::SET_BACKEND_REQ_FD => Message::SetBackendReqFd,
        request::GET_CONFIG => Message::GetConfig(body.config()?),
        request::SET_CONFIG => Message::SetConfig(body.config()?),
        request::POSTCOPY_ADVISE => Message::PostcopyAdvise,
        request::POSTCOPY_LISTEN => Message::PostcopyListen,
        request::POSTCOPY_END => Message::PostcopyEnd,
        request::NONE => Message::MemoryAck { of: id, result: body.u64()? },
        // QEMU acknowledges several slots at once, with a number under the last message's name.
        request::ADD_MEM_REG | request::REM_MEM_REG if body.rest.len() == size_of::<u64>() => {
            Message::MemoryAck { of: id, result: body.u64()? }
        }
        request::GET_INFLIGHT_FD => Message::GetInflightFd(body.inflight()?),
        request::SET_INFLIGHT_FD => Message::SetInflightFd(body.inflight()?),
        request::RESET_DEVICE => Message::ResetDevice,
        request::GET_MAX_MEM_SLOTS => Message::GetMaxMemSlots,
        request::ADD_MEM_REG => Message::AddMemReg(body.single_region()?),
        request::REM_MEM_REG => Message::RemMemReg(body.single_region()?),
        request::SET_STATUS => Message::SetStatus(body.u64()?),
        request::GET_STATUS => Message::GetStatus,
        request::SET_DEVICE_STATE_FD => {
            Message::SetDeviceStateFd { direction: body.u32()?, phase: body.u32()? }
        }
        request::CHECK_DEVICE_STATE => Message::CheckDeviceState,
        request => return Err(DecodeError::Unknown { request }),
    })
}

impl Message {
    /// Its number.
    #[must_use]
    pub fn request(&self) -> u32 {
        match self {
            Self::GetFeatures => request::GET_FEATURES,
            Self::SetFeatures(_) => request::SET_FEATURES,
            Self::SetOwner => request::SET_OWNER,
            Self::ResetOwner => request::RESET_OWNER,
            Self::SetMemTable(_) => request::SET_MEM_TABLE,
            Self::SetLogBase { .. } => request::SET_LOG_BASE,
            Self::SetLogFd => request::SET_LOG_FD,
            Self::SetVringNum { .. } => request::SET_VRING_NUM,
            Self::SetVringAddr { .. } => request::SET_VRING_ADDR,
            Self::SetVringBase { .. } => request::SET_VRING_BASE,
            Self::GetVringBase { .. } => request::GET_VRING_BASE,
            Self::SetVringKick { .. } => request::SET_VRING_KICK,
            Self::SetVringCall { .. } => request::SET_VRING_CALL,
            Self::SetVringErr { .. } => request::SET_VRING_ERR,
            Self::GetProtocolFeatures => request::GET_PROTOCOL_FEATURES,
            Self::SetProtocolFeatures(_) => request::SET_PROTOCOL_FEATURES,
            Self::GetQueueNum => request::GET_QUEUE_NUM,
            Self::SetVringEnable { .. } => request::SET_VRING_ENABLE,
            Self::SetBackendReqFd => request::SET_BACKEND_REQ_FD,
            Self::GetConfig(_) => request::GET_CONFIG,
            Self::SetConfig(_) => request::SET_CONFIG,
            Self::PostcopyAdvise => request::POSTCOPY_ADVISE,
            Self::PostcopyListen => request::POSTCOPY_LISTEN,
            Self::PostcopyEnd => request::POSTCOPY_END,
            Self::MemoryAck { of, .. } => *of,
            Self::GetInflightFd(_) => request::GET_INFLIGHT_FD,
            Self::SetInflightFd(_) => request::SET_INFLIGHT_FD,
            Self::ResetDevice => request::RESET_DEVICE,
            Self::GetMaxMemSlots => request::GET_MAX_MEM_SLOTS,
            Self::AddMemReg(_) => request::ADD_MEM_REG,
            Self::RemMemReg(_) => request::REM_MEM_REG,
            Self::SetStatus(_) => request::SET_STATUS,
            Self::GetStatus => request::GET_STATUS,
            Self::SetDeviceStateFd { .. } => request::SET_DEVICE_STATE_FD,
            Self::CheckDeviceState => request::CHECK_DEVICE_STATE,
        }
    }

    /// What the vhost-user document calls it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures(_) => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::ResetOwner => "RESET_OWNER",
            Self::SetMemTable(_) => "SET_MEM_TABLE",
            Self::SetLogBase { .. } => "SET_LOG_BASE",
            Self::SetLogFd => "SET_LOG_FD",
            Self::SetVringNum { .. } => "SET_VRING_NUM",
            Self::SetVringAddr { .. } => "SET_VRING_ADDR",
            Self::SetVringBase { .. } => "SET_VRING_BASE",
            Self::GetVringBase { .. } => "GET_VRING_BASE",
            Self::SetVringKick { .. } => "SET_VRING_KICK",
            Self::SetVringCall { .. } => "SET_VRING_CALL",
            Self::SetVringErr { .. } => "SET_VRING_ERR",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures(_) => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable { .. } => "SET_VRING_ENABLE",
            Self::SetBackendReqFd => "SET_BACKEND_REQ_FD",
            Self::GetConfig(_) => "GET_CONFIG",
            Self::SetConfig(_) => "SET_CONFIG",
            Self::PostcopyAdvise => "POSTCOPY_ADVISE",
            Self::PostcopyListen => "POSTCOPY_LISTEN",
            Self::PostcopyEnd => "POSTCOPY_END",
            Self::MemoryAck { .. } => "the acknowledgement of memory",
            Self::GetInflightFd(_) => "GET_INFLIGHT_FD",
            Self::SetInflightFd(_) => "SET_INFLIGHT_FD",
            Self::ResetDevice => "RESET_DEVICE",
            Self::GetMaxMemSlots => "GET_MAX_MEM_SLOTS",
            Self::AddMemReg(_) => "ADD_MEM_REG",
            Self::RemMemReg(_) => "REM_MEM_REG",
            Self::SetStatus(_) => "SET_STATUS",
            Self::GetStatus => "GET_STATUS",
            Self::SetDeviceStateFd { .. } => "SET_DEVICE_STATE_FD",
            Self::CheckDeviceState => "CHECK_DEVICE_STATE",
        }
    }

    /// How many descriptors belong to it.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        match self {
            Self::SetMemTable(regions) => regions.len(),
            Self::AddMemReg(_)
            | Self::SetBackendReqFd
            | Self::SetInflightFd(_)
            | Self::SetLogBase { .. }
            | Self::SetLogFd
            | Self::SetDeviceStateFd { .. } => 1,
            Self::SetVringKick { fd, .. }
            | Self::SetVringCall { fd, .. }
            | Self::SetVringErr { fd, .. } => usize::from(*fd == FdPresence::Attached),
            Self::GetFeatures
            | Self::SetFeatures(_)
            | Self::SetOwner
            | Self::ResetOwner
            | Self::SetVringNum { .. }
            | Self::SetVringAddr { .. }
            | Self::SetVringBase { .. }
            | Self::GetVringBase { .. }
            | Self::GetProtocolFeatures
            | Self::SetProtocolFeatures(_)
            | Self::GetQueueNum
            | Self::SetVringEnable { .. }
            | Self::GetConfig(_)
            | Self::SetConfig(_)
            | Self::PostcopyAdvise
            | Self::PostcopyListen
            | Self::PostcopyEnd
            | Self::MemoryAck { .. }
            | Self::GetInflightFd(_)
            | Self::ResetDevice
            | Self::GetMaxMemSlots
            | Self::RemMemReg(_)
            | Self::SetStatus(_)
            | Self::GetStatus
            | Self::CheckDeviceState => 0,
        }
    }

    /// The message's bytes, header included: what a front end sends, its descriptors beside it.
    #[must_use]
    pub fn encode(&self, flags: u32) -> Vec<u8> {
        framed(self.request(), flags, &self.body())
    }

    fn body(&self) -> Vec<u8> {
        match self {
            Self::GetFeatures
            | Self::SetOwner
            | Self::ResetOwner
            | Self::GetProtocolFeatures
            | Self::GetQueueNum
            | Self::SetBackendReqFd
            | Self::SetLogFd
            | Self::PostcopyAdvise
            | Self::PostcopyListen
            | Self::PostcopyEnd
            | Self::ResetDevice
            | Self::GetMaxMemSlots
            | Self::GetStatus
            | Self::CheckDeviceState => Vec::new(),
            Self::SetFeatures(value)
            | Self::SetProtocolFeatures(value)
            | Self::MemoryAck { result: value, .. }
            | Self::SetStatus(value) => value.to_ne_bytes().to_vec(),
            Self::SetMemTable(regions) => table_bytes(regions),
            Self::SetLogBase { size, offset } => {
                [size.to_ne_bytes(), offset.to_ne_bytes()].concat()
            }
            Self::SetVringNum { index, num } => words(&[*index, *num]),
            Self::SetDeviceStateFd { direction, phase } => words(&[*direction, *phase]),
            Self::SetVringAddr { index, addresses } => addresses_bytes(*index, addresses),
            Self::SetVringBase { index, base } => words(&[*index, *base]),
            Self::GetVringBase { index } => words(&[*index, 0]),
            Self::SetVringKick { index, fd }
            | Self::SetVringCall { index, fd }
            | Self::SetVringErr { index, fd } => vring_fd_bytes(*index, *fd),
            Self::SetVringEnable { index, enable } => words(&[*index, *enable]),
            Self::GetConfig(piece) | Self::SetConfig(piece) => config_bytes(piece),
            Self::GetInflightFd(description) | Self::SetInflightFd(description) => {
                inflight_bytes(description)
            }
            Self::AddMemReg(region) | Self::RemMemReg(region) => slot_bytes(region),
        }
    }
}

/// An answer of the back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, queues, slots, status, or zero and non-zero for done and refused.
    U64(u64),
    /// Where a ring stands.
    Vring {
        /// The ring.
        index: u32,
        /// The index of the next available entry.
        base: u32,
    },
    /// A piece of the configuration space.
    Config(ConfigPiece),
    /// Memory to track requests in flight in; its descriptor goes beside it.
    Inflight(InflightDescription),
    /// In post-copy: a memory table as it came, but with where the faults of each region will be counted from in place of its user
    /// address.
    MemTable(Vec<RegionDescription>),
    /// The same of one slot.
    MemSlot(RegionDescription),
    /// No body at all: the piece of the configuration space that was asked for does not exist; or what was asked for is the
    /// descriptor beside it.
    Empty,
}

impl Reply {
    /// The reply's bytes, header included, in answer to `request`.
    #[must_use]
    pub fn encode(&self, request: u32) -> Vec<u8> {
        let body = match self {
            Self::U64(value) => value.to_ne_bytes().to_vec(),
            Self::Vring { index, base } => words(&[*index, *base]),
            Self::Config(piece) => config_bytes(piece),
            Self::Inflight(description) => inflight_bytes(description),
            Self::MemTable(regions) => table_bytes(regions),
            Self::MemSlot(region) => slot_bytes(region),
            Self::Empty => Vec::new(),
        };
        framed(request, flags::REPLY, &body)
    }

    /// Reads the reply to `request`: what a front end does.
    ///
    /// # Errors
    /// The body does not fit.
    pub fn decode(request: u32, body: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Body::new(body);
        let reply = match request {
            request::GET_CONFIG | request::POSTCOPY_ADVISE if body.is_empty() => Self::Empty,
            request::SET_MEM_TABLE if body.len() > size_of::<u64>() => {
                Self::MemTable(reader.table()?)
            }
            request::ADD_MEM_REG if body.len() > size_of::<u64>() => {
                Self::MemSlot(reader.single_region()?)
            }
            request::GET_VRING_BASE => Self::Vring { index: reader.u32()?, base: reader.u32()? },
            request::GET_CONFIG => Self::Config(reader.config()?),
            request::GET_INFLIGHT_FD => Self::Inflight(reader.inflight()?),
            _ => Self::U64(reader.u64()?),
        };
        if reader.rest.is_empty() {
            Ok(reply)
        } else {
            Err(DecodeError::Size { request, size: body.len() })
        }
    }
}

/// A message of the back end that has no body, on the back channel.
#[must_use]
pub fn backend_notice(request: u32) -> [u8; HEADER_BYTES] {
    Header::new(request, 0, 0).encode()
}

fn framed(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = Header::new(request, flags, size).encode().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn push_region(body: &mut Vec<u8>, region: &RegionDescription) {
    let fields = [region.guest_address, region.size, region.user_address, region.file_offset];
    body.extend(fields.iter().flat_map(|value| value.to_ne_bytes()));
}

fn slot_bytes(region: &RegionDescription) -> Vec<u8> {
    let mut body = vec![0; 8];
    push_region(&mut body, region);
    body
}

fn table_bytes(regions: &[RegionDescription]) -> Vec<u8> {
    let mut body = words(&[u32::try_from(regions.len()).unwrap_or(u32::MAX), 0]);
    for region in regions {
        push_region(&mut body, region);
    }
    body
}

fn addresses_bytes(index: u32, addresses: &RingAddresses) -> Vec<u8> {
    let mut body = words(&[index, addresses.flags]);
    let fields = [addresses.descriptors, addresses.used, addresses.available, addresses.log];
    body.extend(fields.iter().flat_map(|value| value.to_ne_bytes()));
    body
}

fn vring_fd_bytes(index: u32, fd: FdPresence) -> Vec<u8> {
    let absent = if fd == FdPresence::Absent { vring_fd::NO_FD } else { 0 };
    ((u64::from(index) & vring_fd::INDEX_MASK) | absent).to_ne_bytes().to_vec()
}

fn config_bytes(piece: &ConfigPiece) -> Vec<u8> {
    let size = u32::try_from(piece.bytes.len()).unwrap_or(u32::MAX);
    let mut body = words(&[piece.offset, size, piece.flags]);
    body.extend_from_slice(&piece.bytes);
    body
}

/// As the front ends that exist lay it out: four bytes of padding at the end, which the document does not have.
fn inflight_bytes(description: &InflightDescription) -> Vec<u8> {
    let InflightDescription { mmap_size, mmap_offset, num_queues, queue_size } = description;
    let mut body = [mmap_size.to_ne_bytes(), mmap_offset.to_ne_bytes()].concat();
    body.extend([num_queues.to_ne_bytes(), queue_size.to_ne_bytes(), [0; 2], [0; 2]].concat());
    body
}

/// What of a body has not been read yet.
struct Body<'a> {
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (first, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<RegionDescription, DecodeError> {
        Ok(RegionDescription {
            guest_address: self.u64()?,
            size: self.u64()?,
            user_address: self.u64()?,
            file_offset: self.u64()?,
        })
    }

    fn single_region(&mut self) -> Result<RegionDescription, DecodeError> {
        let _padding = self.u64()?;
        self.region()
    }

    fn table(&mut self) -> Result<Vec<RegionDescription>, DecodeError> {
        let (count, _padding) = (self.u32()? as usize, self.u32()?);
        if count > TABLE_REGIONS_MAX.min(FDS_MAX) {
            return Err(DecodeError::Truncated);
        }
        (0..count).map(|_| self.region()).collect()
    }

    fn vring_addr(&mut self) -> Result<Message, DecodeError> {
        let index = self.u32()?;
        let addresses = RingAddresses {
            flags: self.u32()?,
            descriptors: self.u64()?,
            used: self.u64()?,
            available: self.u64()?,
            log: self.u64()?,
        };
        Ok(Message::SetVringAddr { index, addresses })
    }

    fn vring_fd(&mut self) -> Result<(u32, FdPresence), DecodeError> {
        let value = self.u64()?;
        let fd =
            if value & vring_fd::NO_FD == 0 { FdPresence::Attached } else { FdPresence::Absent };
        #[allow(clippy::cast_possible_truncation)] // 8 bits
        Ok(((value & vring_fd::INDEX_MASK) as u32, fd))
    }

    fn inflight(&mut self) -> Result<InflightDescription, DecodeError> {
        let description = InflightDescription {
            mmap_size: self.u64()?,
            mmap_offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        };
        if !self.rest.is_empty() {
            let _padding = self.u32()?;
        }
        Ok(description)
    }

    fn config(&mut self) -> Result<ConfigPiece, DecodeError> {
        let (offset, size, flags) = (self.u32()?, self.u32()? as usize, self.u32()?);
        if size > CONFIG_BYTES_MAX || size != self.rest.len() {
            return Err(DecodeError::Truncated);
        }
        let bytes = std::mem::take(&mut self.rest).to_vec();
        Ok(ConfigPiece { offset, flags, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INFLIGHT: InflightDescription =
        InflightDescription { mmap_size: 0, mmap_offset: 64, num_queues: 2, queue_size: 128 };

    fn region(seed: u64) -> RegionDescription {
        RegionDescription {
            guest_address: seed << 20,
            size: 4096 + seed,
            user_address: 0x7f00_0000_0000 + (seed << 20),
            file_offset: seed,
        }
    }

    /// One of every message.
    fn all() -> Vec<Message> {
        let addresses =
            RingAddresses { flags: 1, descriptors: 2, used: 3, available: 4, log: u64::MAX };
        let piece = ConfigPiece { offset: 32, flags: 1, bytes: vec![7; 60] };
        vec![
            Message::GetFeatures,
            Message::SetFeatures(u64::MAX - 3),
            Message::SetOwner,
            Message::ResetOwner,
            Message::SetMemTable((0..8).map(region).collect()),
            Message::SetLogBase { size: 4096, offset: 8192 },
            Message::SetLogFd,
            Message::SetVringNum { index: 1, num: 256 },
            Message::SetVringAddr { index: 2, addresses },
            Message::SetVringBase { index: 3, base: 65535 },
            Message::GetVringBase { index: 4 },
            Message::SetVringKick { index: 255, fd: FdPresence::Attached },
            Message::SetVringCall { index: 0, fd: FdPresence::Absent },
            Message::SetVringErr { index: 9, fd: FdPresence::Attached },
            Message::GetProtocolFeatures,
            Message::SetProtocolFeatures(1 << 16),
            Message::GetQueueNum,
            Message::SetVringEnable { index: 5, enable: 1 },
            Message::SetBackendReqFd,
            Message::GetConfig(piece.clone()),
            Message::SetConfig(piece),
            Message::PostcopyAdvise,
            Message::PostcopyListen,
            Message::PostcopyEnd,
            Message::MemoryAck { of: request::NONE, result: 1 },
            Message::MemoryAck { of: request::ADD_MEM_REG, result: 0 },
            Message::GetInflightFd(INFLIGHT),
            Message::SetInflightFd(InflightDescription { mmap_size: 1 << 20, ..INFLIGHT }),
            Message::ResetDevice,
            Message::GetMaxMemSlots,
            Message::AddMemReg(region(1)),
            Message::RemMemReg(region(2)),
            Message::SetStatus(15),
            Message::GetStatus,
            Message::SetDeviceStateFd { direction: 1, phase: 0 },
            Message::CheckDeviceState,
        ]
    }

    #[test]
    fn every_message_comes_back_as_it_went() {
        for message in all() {
            let bytes = message.encode(flags::NEED_REPLY);
            let (head, body) = bytes.split_first_chunk().unwrap();
            let header = Header::decode(head).unwrap();
            assert!(header.needs_reply() && !header.is_reply());
            assert_eq!(header.size as usize, body.len());
            assert_eq!(decode(header.request, body, message.descriptors()).unwrap(), message);
        }
    }

    #[test]
    fn a_body_one_byte_too_long_or_too_short_is_refused() {
        for message in all() {
            let bytes = message.encode(0);
            let mut body = bytes[HEADER_BYTES..].to_vec();
            let (request, fds) = (message.request(), message.descriptors());
            body.push(0);
            let longer = DecodeError::Size { request, size: body.len() };
            assert_eq!(decode(request, &body, fds), Err(longer), "{message:?}");
            body.pop();
            if body.pop().is_some() {
                let shorter = DecodeError::Size { request, size: body.len() };
                assert_eq!(decode(request, &body, fds), Err(shorter), "{message:?}");
            }
        }
    }

    #[test]
    fn a_descriptor_too_many_or_too_few_is_refused() {
        for message in all() {
            let bytes = message.encode(0);
            let (body, expected) = (&bytes[HEADER_BYTES..], message.descriptors());
            let wrong = |fds| decode(message.request(), body, fds).is_err();
            if !matches!(message, Message::RemMemReg(_)) {
                assert!(wrong(expected + 1), "{message:?}");
            }
            assert!(wrong(expected + 2) && (expected == 0 || wrong(expected - 1)), "{message:?}");
        }
    }

    #[test]
    fn an_inflight_description_is_taken_with_and_without_the_padding_of_its_structure() {
        let message = Message::SetInflightFd(INFLIGHT);
        let bytes = message.encode(0);
        let body = &bytes[HEADER_BYTES..];
        for length in [20, 24] {
            assert_eq!(decode(request::SET_INFLIGHT_FD, &body[..length], 1).as_ref(), Ok(&message));
        }
    }

    #[test]
    fn a_stray_descriptor_with_a_removal_is_taken() {
        let bytes = Message::RemMemReg(region(3)).encode(0);
        assert!(decode(request::REM_MEM_REG, &bytes[HEADER_BYTES..], 1).is_ok());
    }

    #[test]
    fn a_table_of_more_regions_than_there_may_be_is_refused_before_it_is_read() {
        let mut body = words(&[u32::MAX, 0]);
        body.extend([0; 64]);
        assert!(matches!(
            decode(request::SET_MEM_TABLE, &body, 2),
            Err(DecodeError::Size { request: request::SET_MEM_TABLE, size: 72 })
        ));
    }

    #[test]
    fn replies_come_back_as_they_went() {
        let piece = ConfigPiece { offset: 0, flags: 0, bytes: vec![1; 60] };
        let replies = [
            (request::GET_FEATURES, Reply::U64(1 << 32)),
            (request::GET_VRING_BASE, Reply::Vring { index: 1, base: 77 }),
            (request::GET_CONFIG, Reply::Config(piece)),
            (request::GET_INFLIGHT_FD, Reply::Inflight(INFLIGHT)),
            (request::GET_CONFIG, Reply::Empty),
            (request::POSTCOPY_ADVISE, Reply::Empty),
            (request::POSTCOPY_END, Reply::U64(0)),
            (request::SET_MEM_TABLE, Reply::U64(1)),
            (request::SET_MEM_TABLE, Reply::MemTable((0..8).map(region).collect())),
            (request::ADD_MEM_REG, Reply::MemSlot(region(1))),
        ];
        for (request, reply) in replies {
            let bytes = reply.encode(request);
            let (head, body) = bytes.split_first_chunk().unwrap();
            assert!(Header::decode(head).unwrap().is_reply());
            assert_eq!(Reply::decode(request, body).unwrap(), reply);
        }
    }

    #[test]
    fn another_version_and_an_endless_body_are_refused() {
        let mut header = Header { request: 1, flags: 2, size: 0 };
        assert_eq!(Header::decode(&header.encode()), Err(DecodeError::Version { flags: 2 }));
        header = Header::new(1, 0, u32::MAX);
        let refused = DecodeError::TooLong { request: 1, size: u32::MAX };
        assert_eq!(Header::decode(&header.encode()), Err(refused));
    }

    proptest! {
        /// Whatever arrives is a message or an error, and a message says the same when it is sent again.
        #[test]
        fn any_bytes_decode_or_are_refused(
            id in 0u32..64,
            body in proptest::collection::vec(any::<u8>(), 0..400),
            fds in 0usize..9,
        ) {
            if let Ok(message) = decode(id, &body, fds) {
                let again = message.encode(0);
                let twice = decode(id, &again[HEADER_BYTES..], message.descriptors());
                prop_assert_eq!(twice.unwrap(), message);
            }
        }
    }
}
