//! The conversation of a front end with its back end: messages out, replies in, each within a deadline.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use super::connection::{BlkConfig, FrontEndError, Negotiated};
use super::inflight::Inflight;
use super::memory::SharedMemory;
use super::ring::RingHandle;
use crate::message::{ConfigPiece, FdPresence, Header, InflightDescription, Message, Reply};
use crate::protocol::{FDS_MAX, HEADER_BYTES, SECTOR, features, flags, protocol_features};

/// Bytes of virtio-blk's configuration space up to and including write-zeroes (virtio 5.2.4).
const CONFIG_BYTES: usize = 60;
/// How long a socket that refuses is left alone before the next try.
const CONNECT_AGAIN: Duration = Duration::from_millis(20);
/// The virtio features that this driver can use.
const KNOWN: u64 = features::VERSION_1
    | features::PROTOCOL_FEATURES
    | features::RING_EVENT_IDX
    | features::RING_INDIRECT_DESC
    | features::RING_PACKED
    | features::SIZE_MAX
    | features::SEG_MAX
    | features::RO
    | features::BLK_SIZE
    | features::FLUSH
    | features::MQ
    | features::DISCARD
    | features::WRITE_ZEROES;
/// The features without which it cannot work.
const NEEDED: [(u64, &str); 2] = [
    (features::VERSION_1, "VIRTIO_F_VERSION_1"),
    (features::PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
];
/// The protocol features that it can always use.
pub(super) const PROTOCOL: u64 =
    protocol_features::MQ | protocol_features::REPLY_ACK | protocol_features::CONFIG;

/// The socket with its deadline.
pub(super) struct Link {
    pub(super) socket: UnixStream,
    pub(super) deadline: Duration,
}

impl Link {
    /// Connects, trying again while patience lasts: a back end that restarts takes a moment. Each call may take as long as the
    /// deadline from then on.
    pub(super) fn open(
        path: &Path,
        patience: Duration,
        deadline: Duration,
    ) -> Result<Self, FrontEndError> {
        let start = Instant::now();
        let socket = loop {
            match connect(path) {
                Ok(socket) => break socket,
                Err(source) if start.elapsed() >= patience => {
                    return Err(FrontEndError::Connect { path: path.to_owned(), source });
                }
                Err(_) => thread::sleep(CONNECT_AGAIN),
            }
        };
        let limited = socket.set_write_timeout(Some(deadline));
        limited.map_err(|source| FrontEndError::Os { what: "set a socket's deadline", source })?;
        Ok(Self { socket, deadline })
    }

    /// Whether the back end has closed the connection, or says what nobody has asked for: it is of no use then.
    pub(super) fn is_closed(&self) -> bool {
        is_closed(&self.socket)
    }

    /// Agrees on features: of what is offered, what this driver knows and the caller accepts, virtio's and the protocol's.
    pub(super) fn negotiate(
        &mut self,
        accept: u64,
        accept_protocol: u64,
    ) -> Result<Negotiated, FrontEndError> {
        let offered = self.query_u64(&Message::GetFeatures)?;
        let missing = NEEDED.iter().find(|(bit, _)| offered & bit == 0);
        if let Some((_, name)) = missing {
            return Err(FrontEndError::Missing(name));
        }
        let needed = NEEDED.iter().fold(0, |bits, (bit, _)| bits | bit);
        let mut features = offered & KNOWN & (accept | needed);
        if features & features::RING_INDIRECT_DESC == 0 {
            features &= !features::RING_PACKED;
        }
        let protocol = self.query_u64(&Message::GetProtocolFeatures)? & accept_protocol;
        if protocol & protocol_features::CONFIG == 0 {
            return Err(FrontEndError::Missing("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        let negotiated = Negotiated::new(features, protocol);
        // REPLY_ACK holds from the message after the one that agrees on it.
        self.send(&Message::SetProtocolFeatures(protocol), 0, &[])?;
        self.tell(&negotiated, &Message::SetOwner, &[])?;
        self.tell(&negotiated, &Message::SetFeatures(features), &[])?;
        Ok(negotiated)
    }

    /// Has the device describe itself.
    pub(super) fn read_config(
        &mut self,
        negotiated: &Negotiated,
    ) -> Result<BlkConfig, FrontEndError> {
        let whole = ConfigPiece { offset: 0, flags: 0, bytes: vec![0; CONFIG_BYTES] };
        let message = Message::GetConfig(whole);
        let space = match self.query(&message)? {
            Reply::Config(piece) if piece.bytes.len() == CONFIG_BYTES => piece.bytes,
            _ => {
                return Err(malformed(
                    &message,
                    "the configuration space is not what was asked for",
                ));
            }
        };
        let u32_at = |at: usize| {
            let field = space.get(at..).and_then(|rest| rest.first_chunk());
            field.map_or(0, |field| u32::from_le_bytes(*field))
        };
        let capacity = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
        let has = |bit: u64| negotiated.features & bit != 0;
        let sectors = |at: usize| u64::from(u32_at(at)).saturating_mul(SECTOR);
        let queues = if negotiated.protocol & protocol_features::MQ != 0 {
            u16::try_from(self.query_u64(&Message::GetQueueNum)?).unwrap_or(u16::MAX)
        } else {
            1
        };
        Ok(BlkConfig {
            capacity: capacity.saturating_mul(SECTOR),
            block_size: if has(features::BLK_SIZE) { u32_at(20) } else { 512 },
            segments_max: has(features::SEG_MAX).then(|| u32_at(12)).filter(|most| *most > 0),
            segment_bytes_max: has(features::SIZE_MAX).then(|| u32_at(8)).filter(|most| *most > 0),
            queues,
            read_only: has(features::RO),
            flush: has(features::FLUSH),
            discard_max: has(features::DISCARD).then(|| sectors(36)),
            write_zeroes_max: has(features::WRITE_ZEROES).then(|| sectors(48)),
            zeroes_unmap: has(features::WRITE_ZEROES) && u32_at(56).to_le_bytes()[0] == 1,
        })
    }

    /// Has the back end make the record of what is in flight in so many rings; none where it keeps no record after all.
    pub(super) fn make_inflight(
        &mut self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Option<Inflight>, FrontEndError> {
        let wanted = InflightDescription { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
        let message = Message::GetInflightFd(wanted);
        self.send(&message, 0, &[])?;
        match self.receive(&message)? {
            (Reply::Inflight(description), Some(fd)) => Ok(Inflight::new(fd, description)),
            (Reply::Inflight(InflightDescription { mmap_size: 0, .. }), None) => Ok(None),
            _ => Err(malformed(&message, "it is not a record with its descriptor")),
        }
    }

    /// Gives the back end the record, of its own or of its predecessor's making.
    pub(super) fn give_inflight(
        &mut self,
        negotiated: &Negotiated,
        inflight: &Inflight,
    ) -> Result<(), FrontEndError> {
        let message = Message::SetInflightFd(inflight.description());
        self.tell(negotiated, &message, &[inflight.fd()])
    }

    /// Shares the memory.
    pub(super) fn share(
        &mut self,
        negotiated: &Negotiated,
        memory: &SharedMemory,
    ) -> Result<(), FrontEndError> {
        let table = Message::SetMemTable(vec![memory.region()]);
        self.tell(negotiated, &table, &[memory.fd()])
    }

    /// Describes a ring and starts it at an index.
    pub(super) fn start(
        &mut self,
        negotiated: &Negotiated,
        ring: &RingHandle,
        base: u32,
    ) -> Result<(), FrontEndError> {
        let mut tell =
            |message: Message, fds: &[BorrowedFd<'_>]| self.tell(negotiated, &message, fds);
        let (index, fd) = (u32::from(ring.index()), FdPresence::Attached);
        tell(Message::SetVringNum { index, num: u32::from(ring.size()) }, &[])?;
        tell(Message::SetVringBase { index, base }, &[])?;
        tell(Message::SetVringAddr { index, addresses: ring.addresses() }, &[])?;
        tell(Message::SetVringCall { index, fd }, &[ring.call_fd()])?;
        tell(Message::SetVringKick { index, fd }, &[ring.kick_fd()])?;
        tell(Message::SetVringEnable { index, enable: 1 }, &[])?;
        // It may have been filled from the start.
        ring.kick_unless_full();
        Ok(())
    }

    /// Gives the back end the channel on which it sends.
    pub(super) fn give_back_channel(
        &mut self,
        negotiated: &Negotiated,
        theirs: BorrowedFd<'_>,
    ) -> Result<(), FrontEndError> {
        self.tell(negotiated, &Message::SetBackendReqFd, &[theirs])
    }

    /// Stops a ring; says how far the back end has taken it.
    pub(super) fn stop(&mut self, ring: u16) -> Result<u32, FrontEndError> {
        let message = Message::GetVringBase { index: u32::from(ring) };
        match self.query(&message)? {
            Reply::Vring { base, .. } => Ok(base),
            _ => Err(malformed(&message, "it is not a ring's state")),
        }
    }

    /// Sends what has no answer of its own, and waits for the acknowledgement where one was agreed on.
    fn tell(
        &mut self,
        negotiated: &Negotiated,
        message: &Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontEndError> {
        if negotiated.protocol & protocol_features::REPLY_ACK == 0 {
            return self.send(message, 0, fds);
        }
        self.send(message, flags::NEED_REPLY, fds)?;
        match self.receive(message)?.0 {
            Reply::U64(0) => Ok(()),
            Reply::U64(code) => Err(FrontEndError::Refused { message: message.name(), code }),
            _ => Err(malformed(message, "it is not an acknowledgement")),
        }
    }

    fn query_u64(&mut self, message: &Message) -> Result<u64, FrontEndError> {
        match self.query(message)? {
            Reply::U64(value) => Ok(value),
            _ => Err(malformed(message, "it is not a number")),
        }
    }

    fn query(&mut self, message: &Message) -> Result<Reply, FrontEndError> {
        self.send(message, 0, &[])?;
        Ok(self.receive(message)?.0)
    }

    fn send(
        &mut self,
        message: &Message,
        flags: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontEndError> {
        let bytes = message.encode(flags);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(FrontEndError::Config("a message of the front end carries one descriptor"));
        }
        let parts = [IoSlice::new(&bytes)];
        match rustix::net::sendmsg(self.socket.as_fd(), &parts, &mut rights, SendFlags::NOSIGNAL) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(self.lost(message, io::ErrorKind::WriteZero.into())),
            Err(error) => Err(self.lost(message, error.into())),
        }
    }

    /// The reply to a message, and the descriptor that came with it.
    fn receive(&mut self, message: &Message) -> Result<(Reply, Option<OwnedFd>), FrontEndError> {
        // For the whole of it: one that comes byte by byte is late too.
        let until = Instant::now() + self.deadline;
        let mut bytes = [0; HEADER_BYTES];
        let header = self.receive_header(&mut bytes, until);
        let fd = header.map_err(|source| self.lost(message, source))?;
        let header = Header::decode(&bytes).map_err(|_| {
            malformed(message, "its header is of another version, or its body too long")
        })?;
        if header.request != message.request() || !header.is_reply() {
            return Err(malformed(message, "it is not the reply to it"));
        }
        let mut body = vec![0; header.size as usize];
        self.fill(&mut body, until).map_err(|source| self.lost(message, source))?;
        // With NEED_REPLY every message has a number for an answer; the codec knows those that have something else.
        let reply = Reply::decode(header.request, &body)
            .map_err(|_| malformed(message, "its length does not fit the message"))?;
        Ok((reply, fd))
    }

    /// Fills a header; the descriptor comes with its first byte. More than one are closed but for the first.
    fn receive_header(
        &mut self,
        into: &mut [u8; HEADER_BYTES],
        until: Instant,
    ) -> io::Result<Option<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(into)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let came = loop {
            self.wait_at_most(until)?;
            match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                came => break came?,
            }
        };
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = rights.flatten().next();
        match into.get_mut(came.bytes..) {
            _ if came.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(rest) => self.fill(rest, until).map(|()| fd),
            None => Ok(fd),
        }
    }

    fn fill(&mut self, mut into: &mut [u8], until: Instant) -> io::Result<()> {
        while !into.is_empty() {
            self.wait_at_most(until)?;
            match self.socket.read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => into = into.split_at_mut(count).1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Bounds the next read.
    fn wait_at_most(&self, until: Instant) -> io::Result<()> {
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => self.socket.set_read_timeout(Some(left)),
        }
    }

    fn lost(&self, message: &Message, source: io::Error) -> FrontEndError {
        let message = message.name();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                FrontEndError::Deadline { message, deadline: self.deadline }
            }
            _ => FrontEndError::Lost { message, source },
        }
    }
}

/// Connects without waiting: to a socket whose queue is full, because whoever listens there hangs, a plain call waits for ever.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// As [`Link::is_closed`].
pub(super) fn is_closed(socket: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(socket, &mut [0u8; 1], flags) {
        Ok(_) => true,
        Err(error) => error != Errno::AGAIN && error != Errno::INTR,
    }
}

fn malformed(message: &Message, what: &'static str) -> FrontEndError {
    FrontEndError::Malformed { message: message.name(), what }
}
