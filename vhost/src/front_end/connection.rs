//! The control side of a front end: the conversation on the vhost-user socket.
//!
//! Calls block, each until the connection's deadline at most: a back end that does not answer is an error, not a wait.

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{io, thread};

use resilver_sys::MappingError;
use resilver_sys::area::AreaError;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::memory::SharedMemory;
use super::queue::{self, DriverQueue};
use super::wire::{self, Message};

/// Bytes of virtio-blk's configuration space up to and including write-zeroes (virtio 1.2 §5.2.4).
const CONFIG_BYTES: u32 = 60;
/// The largest reply a front end has to expect.
const REPLY_MAX: u32 = 4096;
/// How long a socket that refuses is left alone before the next try.
const CONNECT_AGAIN: Duration = Duration::from_millis(20);

/// How a front end connects.
#[derive(Debug, Clone)]
pub struct ConnectionConfig {
    /// Rings to set up, at most what the device has.
    pub queues: u16,
    /// Entries of each ring: a power of two, at most 32768.
    pub queue_size: u16,
    /// Buffers of one request, at most what the device says; 1 or more.
    pub segments: u16,
    /// Bytes of shared memory for the caller's data.
    pub data_bytes: usize,
    /// Virtio features that the driver accepts: all that it knows, unless bits are taken away.
    pub accept: u64,
    /// How long connecting, and any one call, may take.
    pub deadline: Duration,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            segments: 16,
            data_bytes: 1 << 20,
            accept: u64::MAX,
            deadline: Duration::from_secs(5),
        }
    }
}

impl ConnectionConfig {
    /// [`ConnectionConfig::accept`] without the event index.
    pub const WITHOUT_EVENT_INDEX: u64 = !wire::F_EVENT_INDEX;
    /// [`ConnectionConfig::accept`] without indirect descriptors.
    pub const WITHOUT_INDIRECT: u64 = !wire::F_INDIRECT;
}

/// Why a front end and its back end do not come together.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// Nobody answers on the socket.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The back end did not answer in time.
    #[error("the back end did not answer {message} within {deadline:?}")]
    Deadline {
        /// The vhost-user message.
        message: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The back end closed the connection, or the socket failed.
    #[error("the connection was lost at {message}: {source}")]
    Lost {
        /// The vhost-user message.
        message: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The answer is not what the protocol says.
    #[error("the back end's answer to {message} is malformed: {what}")]
    Malformed {
        /// The vhost-user message.
        message: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The back end says that it could not do it.
    #[error("the back end refused {message} with {code}")]
    Refused {
        /// The vhost-user message.
        message: &'static str,
        /// Its reply.
        code: u64,
    },
    /// A feature without which this front end cannot work, or that it relied on before a reconnect.
    #[error("the back end does not offer {0}")]
    Missing(&'static str),
    /// The configuration asks for what cannot be.
    #[error("{0}")]
    Config(&'static str),
    /// Shared memory could not be had.
    #[error("cannot share memory: {0}")]
    Memory(#[from] MappingError),
    /// A ring does not fit the memory.
    #[error("cannot lay out a ring: {0}")]
    Layout(#[from] AreaError),
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Its reason.
        source: io::Error,
    },
}

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Negotiated {
    /// All virtio features.
    features: u64,
    /// All protocol features.
    protocol: u64,
    /// Indirect descriptors.
    pub(super) indirect: bool,
    /// The event index.
    pub(super) event_index: bool,
}

/// What the device says of itself (virtio 1.2 §5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkConfig {
    /// Bytes of the disk.
    pub capacity: u64,
    /// Bytes of a block: the alignment that requests should have.
    pub block_size: u32,
    /// Most buffers of one request; none where the device does not say.
    pub segments_max: Option<u32>,
    /// Rings that the device has.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// Flush is understood.
    pub flush: bool,
    /// Largest discard, bytes; none where it is not understood.
    pub discard_max: Option<u64>,
    /// Largest write-zeroes, bytes; none where it is not understood.
    pub write_zeroes_max: Option<u64>,
}

/// A connected back end.
#[derive(Debug)]
pub struct Connection {
    path: PathBuf,
    config: ConnectionConfig,
    socket: UnixStream,
    negotiated: Negotiated,
    memory: SharedMemory,
    device: BlkConfig,
}

impl Connection {
    /// Connects to the socket at `path`, waiting for it within the deadline, and sets up the rings. They may be used at once.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn connect(
        path: &Path,
        config: ConnectionConfig,
    ) -> Result<(Self, Vec<DriverQueue>), FrontEndError> {
        if !config.queue_size.is_power_of_two() || config.queue_size > 1 << 15 {
            return Err(FrontEndError::Config(
                "a ring has a power of two of entries, at most 32768",
            ));
        }
        if config.queues == 0 || config.segments == 0 {
            return Err(FrontEndError::Config(
                "a front end has at least one ring and one buffer to a request",
            ));
        }
        let mut link = Link { socket: open(path, config.deadline)?, deadline: config.deadline };
        let negotiated = link.negotiate(config.accept)?;
        let device = link.read_config(&negotiated)?;
        if config.queues > device.queues {
            return Err(FrontEndError::Config("the device has fewer rings than were asked for"));
        }
        if device.segments_max.is_some_and(|most| u32::from(config.segments) > most) {
            return Err(FrontEndError::Config(
                "the device takes fewer buffers to a request than were asked for",
            ));
        }
        let ring_bytes = queue::bytes_needed(config.queue_size, config.segments, &negotiated);
        let mut memory =
            SharedMemory::new(config.data_bytes, ring_bytes * usize::from(config.queues))?;
        let queues = (0..config.queues)
            .map(|index| {
                DriverQueue::new(
                    index,
                    config.queue_size,
                    config.segments,
                    &negotiated,
                    &mut memory,
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        link.set_up(&negotiated, &memory, &queues)?;
        let connection =
            Self { path: path.to_owned(), config, socket: link.socket, negotiated, memory, device };
        Ok((connection, queues))
    }

    /// Connects again after the back end died or closed, and offers the requests in flight to the new one. All rings of the
    /// connection must be given. The old back end must be gone, or it could still write to the shared memory.
    ///
    /// # Errors
    /// As [`Connection::connect`]; also where the new back end offers less than the old one did. May be tried again.
    pub fn reconnect(&mut self, queues: &mut [DriverQueue]) -> Result<(), FrontEndError> {
        if queues.len() != usize::from(self.config.queues) {
            return Err(FrontEndError::Config(
                "all rings of the connection come along in a reconnect",
            ));
        }
        // The old end goes first: a back end that serves one front end at a time waits for that.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let deadline = self.config.deadline;
        let mut link = Link { socket: open(&self.path, deadline)?, deadline };
        let negotiated = link.negotiate(self.negotiated.features)?;
        if negotiated != self.negotiated {
            return Err(FrontEndError::Missing("a feature that it offered before"));
        }
        self.device = link.read_config(&negotiated)?;
        for queue in queues.iter_mut() {
            queue.restart();
        }
        link.set_up(&negotiated, &self.memory, queues)?;
        self.socket = link.socket;
        Ok(())
    }

    /// The shared memory, whose first [`SharedMemory::data_bytes`] are the caller's.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The device as it described itself when it was connected.
    #[must_use]
    pub fn device(&self) -> &BlkConfig {
        &self.device
    }

    /// Asks the device to describe itself again, after a resize.
    ///
    /// # Errors
    /// The connection is lost, or the answer malformed.
    pub fn read_config(&mut self) -> Result<BlkConfig, FrontEndError> {
        let mut link = self.link()?;
        self.device = link.read_config(&self.negotiated)?;
        Ok(self.device)
    }

    /// Whether the back end has closed the connection.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.socket, &mut [0u8; 1], flags) {
            Ok((bytes, _)) => bytes == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    /// Stops a ring: the back end completes what it has taken and answers with the next available index.
    ///
    /// # Errors
    /// The connection is lost, or the back end does not stop in time.
    pub fn stop(&mut self, queue: &DriverQueue) -> Result<u16, FrontEndError> {
        let reply =
            self.link()?.query(Message::GetVringBase, &wire::vring_state(queue.index(), 0), 8)?;
        u16::try_from(wire::u32_at(&reply, 4)).map_err(|_| FrontEndError::Malformed {
            message: Message::GetVringBase.name(),
            what: "the index has more than 16 bits",
        })
    }

    fn link(&self) -> Result<Link, FrontEndError> {
        let socket = self
            .socket
            .try_clone()
            .map_err(|source| FrontEndError::Os { what: "duplicate the socket", source })?;
        Ok(Link { socket, deadline: self.config.deadline })
    }
}

/// Connects, trying again until the deadline: a back end that restarts takes a moment.
fn open(path: &Path, deadline: Duration) -> Result<UnixStream, FrontEndError> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => {
                let limit = |set: fn(&UnixStream, Option<Duration>) -> io::Result<()>| {
                    set(&socket, Some(deadline)).map_err(|source| FrontEndError::Os {
                        what: "set a socket's deadline",
                        source,
                    })
                };
                limit(UnixStream::set_read_timeout)?;
                limit(UnixStream::set_write_timeout)?;
                return Ok(socket);
            }
            Err(source) if start.elapsed() >= deadline => {
                return Err(FrontEndError::Connect { path: path.to_owned(), source });
            }
            Err(_) => thread::sleep(CONNECT_AGAIN),
        }
    }
}

/// The socket with its deadline.
struct Link {
    socket: UnixStream,
    deadline: Duration,
}

impl Link {
    fn negotiate(&mut self, accept: u64) -> Result<Negotiated, FrontEndError> {
        const KNOWN: u64 = wire::F_VERSION_1
            | wire::F_PROTOCOL
            | wire::F_EVENT_INDEX
            | wire::F_INDIRECT
            | wire::F_SEG_MAX
            | wire::F_RO
            | wire::F_BLK_SIZE
            | wire::F_FLUSH
            | wire::F_MQ
            | wire::F_DISCARD
            | wire::F_WRITE_ZEROES;
        const PROTOCOL: u64 = wire::PROTOCOL_MQ | wire::PROTOCOL_REPLY_ACK | wire::PROTOCOL_CONFIG;
        let offered = self.query_word(Message::GetFeatures)?;
        for (bit, name) in
            [(wire::F_VERSION_1, "VERSION_1"), (wire::F_PROTOCOL, "PROTOCOL_FEATURES")]
        {
            if offered & bit == 0 {
                return Err(FrontEndError::Missing(name));
            }
        }
        let features = offered & KNOWN & (accept | wire::F_VERSION_1 | wire::F_PROTOCOL);
        let protocol = self.query_word(Message::GetProtocolFeatures)? & PROTOCOL;
        if protocol & wire::PROTOCOL_CONFIG == 0 {
            return Err(FrontEndError::Missing("CONFIG"));
        }
        self.tell(Message::SetProtocolFeatures, protocol, &wire::words(&[protocol]), &[])?;
        self.tell(Message::SetOwner, protocol, &[], &[])?;
        self.tell(Message::SetFeatures, protocol, &wire::words(&[features]), &[])?;
        Ok(Negotiated {
            features,
            protocol,
            indirect: features & wire::F_INDIRECT != 0,
            event_index: features & wire::F_EVENT_INDEX != 0,
        })
    }

    fn read_config(&mut self, negotiated: &Negotiated) -> Result<BlkConfig, FrontEndError> {
        const PAYLOAD_AT: usize = 12;
        let mut ask = Vec::new();
        for field in [0, CONFIG_BYTES, 0] {
            ask.extend_from_slice(&u32::to_ne_bytes(field));
        }
        ask.resize(PAYLOAD_AT + CONFIG_BYTES as usize, 0);
        let reply = self.query(Message::GetConfig, &ask, ask.len())?;
        let space = reply.get(PAYLOAD_AT..).unwrap_or_default();
        let has = |bit: u64| negotiated.features & bit != 0;
        let sectors = |at: usize| u64::from(wire::u32_at(space, at)).saturating_mul(512);
        let queues = if negotiated.protocol & wire::PROTOCOL_MQ != 0 {
            u16::try_from(self.query_word(Message::GetQueueNum)?).unwrap_or(u16::MAX)
        } else {
            1
        };
        Ok(BlkConfig {
            capacity: wire::u64_at(space, 0).saturating_mul(512),
            block_size: if has(wire::F_BLK_SIZE) { wire::u32_at(space, 20) } else { 512 },
            segments_max: has(wire::F_SEG_MAX).then(|| wire::u32_at(space, 12)),
            queues,
            read_only: has(wire::F_RO),
            flush: has(wire::F_FLUSH),
            discard_max: has(wire::F_DISCARD).then(|| sectors(36)),
            write_zeroes_max: has(wire::F_WRITE_ZEROES).then(|| sectors(48)),
        })
    }

    fn set_up(
        &mut self,
        negotiated: &Negotiated,
        memory: &SharedMemory,
        queues: &[DriverQueue],
    ) -> Result<(), FrontEndError> {
        let protocol = negotiated.protocol;
        // One region: the count and padding, then the region itself.
        let mut table = wire::words(&[1]);
        table.extend(wire::words(&memory.region()));
        self.tell(Message::SetMemTable, protocol, &table, &[memory.fd()])?;
        for queue in queues {
            let index = queue.index();
            let state = |value| wire::vring_state(index, value);
            self.tell(Message::SetVringNum, protocol, &state(u32::from(queue.size())), &[])?;
            self.tell(Message::SetVringBase, protocol, &state(0), &[])?;
            let [descriptors, used, available] = queue.ring_addresses();
            let mut address = state(0);
            address.extend(wire::words(&[descriptors, used, available, 0]));
            self.tell(Message::SetVringAddr, protocol, &address, &[])?;
            let number = wire::words(&[u64::from(index)]);
            self.tell(Message::SetVringCall, protocol, &number, &[queue.call_fd()])?;
            self.tell(Message::SetVringKick, protocol, &number, &[queue.kick_fd()])?;
            self.tell(Message::SetVringEnable, protocol, &state(1), &[])?;
            queue.kick();
        }
        Ok(())
    }

    /// Sends what has no answer of its own, and waits for the acknowledgement where there is one.
    fn tell(
        &mut self,
        message: Message,
        protocol: u64,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontEndError> {
        // REPLY_ACK holds from the message after the one that agrees on it.
        let acknowledged =
            protocol & wire::PROTOCOL_REPLY_ACK != 0 && message != Message::SetProtocolFeatures;
        self.send(message, if acknowledged { wire::NEED_REPLY } else { 0 }, payload, fds)?;
        if !acknowledged {
            return Ok(());
        }
        match wire::u64_at(&self.receive(message, 8)?, 0) {
            0 => Ok(()),
            code => Err(FrontEndError::Refused { message: message.name(), code }),
        }
    }

    fn query_word(&mut self, message: Message) -> Result<u64, FrontEndError> {
        Ok(wire::u64_at(&self.query(message, &[], 8)?, 0))
    }

    /// Sends a question and takes its answer of `expected` bytes.
    fn query(
        &mut self,
        message: Message,
        payload: &[u8],
        expected: usize,
    ) -> Result<Vec<u8>, FrontEndError> {
        self.send(message, 0, payload, &[])?;
        self.receive(message, expected)
    }

    fn send(
        &mut self,
        message: Message,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontEndError> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = wire::header(message, flags, length).to_vec();
        bytes.extend_from_slice(payload);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            rights.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = rustix::net::sendmsg(
            self.socket.as_fd(),
            &[IoSlice::new(&bytes)],
            &mut rights,
            SendFlags::NOSIGNAL,
        );
        match sent {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(self.lost(message, io::ErrorKind::WriteZero.into())),
            Err(error) => Err(self.lost(message, error.into())),
        }
    }

    fn receive(&mut self, message: Message, expected: usize) -> Result<Vec<u8>, FrontEndError> {
        let mut header = [0; wire::HEADER];
        self.socket.read_exact(&mut header).map_err(|source| self.lost(message, source))?;
        let malformed = |what| Err(FrontEndError::Malformed { message: message.name(), what });
        let [code, flags, length] = [0, 4, 8].map(|at| wire::u32_at(&header, at));
        if code != message as u32 {
            return malformed("it answers another message");
        }
        if flags & (wire::REPLY | wire::VERSION_MASK) != wire::REPLY | wire::VERSION {
            return malformed("its flags are not those of a reply");
        }
        if length > REPLY_MAX || length as usize != expected {
            return malformed("its length is wrong");
        }
        let mut payload = vec![0; expected];
        self.socket.read_exact(&mut payload).map_err(|source| self.lost(message, source))?;
        Ok(payload)
    }

    fn lost(&self, message: Message, source: io::Error) -> FrontEndError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                FrontEndError::Deadline { message: message.name(), deadline: self.deadline }
            }
            _ => FrontEndError::Lost { message: message.name(), source },
        }
    }
}
