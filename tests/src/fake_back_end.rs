//! A back end in the hands of a test: it answers what a front end says, and does with the rings what the test does, right or
//! wrong. It shares the codec with the product and nothing else.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use resilver_sys::{Area, BufferSlice, EventFd, Mapping, RegionId, RegionTable};
use resilver_vhost::message::{
    ConfigPiece, Header, InflightDescription, Message, RegionDescription, Reply, RingAddresses,
    decode,
};
use resilver_vhost::protocol::{
    FDS_MAX, HEADER_BYTES, SERIAL_BYTES, blk_type, descriptor_flags, features, protocol_features,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::served::PATIENCE;

/// What a back end says of itself.
#[derive(Debug, Clone)]
pub struct Face {
    /// Virtio features.
    pub features: u64,
    /// Protocol features.
    pub protocol: u64,
    /// Rings.
    pub queues: u64,
    /// The configuration space.
    pub config: Vec<u8>,
    /// The disk's serial.
    pub serial: [u8; SERIAL_BYTES],
}

impl Face {
    /// A plain disk of so many sectors, with one ring.
    #[must_use]
    pub fn of_sectors(sectors: u64) -> Self {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&sectors.to_le_bytes());
        Self {
            features: features::VERSION_1 | features::PROTOCOL_FEATURES | features::FLUSH,
            protocol: protocol_features::CONFIG | protocol_features::REPLY_ACK,
            queues: 1,
            config,
            serial: *b"fake\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        }
    }

    /// The same with more features.
    #[must_use]
    pub fn and(mut self, features: u64, protocol: u64) -> Self {
        self.features |= features;
        self.protocol |= protocol;
        self
    }
}

/// What a connection has told.
#[derive(Default)]
struct Told {
    connections: usize,
    socket: Option<UnixStream>,
    heard: Vec<Message>,
    memory: Option<(RegionDescription, Arc<Mapping>)>,
    inflight: Option<OwnedFd>,
    back_channel: Option<OwnedFd>,
    rings: Vec<Ring>,
}

/// What it has told of a ring.
#[derive(Default)]
struct Ring {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

struct Shared {
    face: Mutex<Face>,
    told: Mutex<Told>,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().expect("no test thread has panicked")
    }
}

/// A listening back end. Its thread ends with the test's process.
pub struct FakeBackEnd {
    shared: Arc<Shared>,
}

impl FakeBackEnd {
    /// Listens at `path`.
    ///
    /// # Panics
    /// If it cannot; as everything here, because it is a test's.
    #[must_use]
    pub fn listen(path: &Path, face: Face) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let shared = Arc::new(Shared { face: Mutex::new(face), told: Mutex::default() });
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let connections = theirs.told().connections + 1;
                let clone = socket.try_clone().expect("a descriptor");
                *theirs.told() = Told { connections, socket: Some(clone), ..Told::default() };
                let _ended = converse(&socket, &theirs);
            }
        });
        Self { shared }
    }

    /// Says something else of itself from the next connection on.
    ///
    /// # Panics
    /// As [`FakeBackEnd::listen`].
    pub fn set_face(&self, face: Face) {
        *self.shared.face.lock().expect("no test thread has panicked") = face;
    }

    /// Has so many sectors from now on.
    ///
    /// # Panics
    /// As [`FakeBackEnd::listen`].
    pub fn grow(&self, sectors: u64) {
        let mut face = self.shared.face.lock().expect("no test thread has panicked");
        face.config[..8].copy_from_slice(&sectors.to_le_bytes());
    }

    /// Closes the connection, as one that dies does.
    ///
    /// # Panics
    /// If there is none.
    pub fn hang_up(&self) {
        let told = self.shared.told();
        let socket = told.socket.as_ref().expect("a connection");
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.told().connections
    }

    /// What this connection has said, in order.
    #[must_use]
    pub fn heard(&self) -> Vec<Message> {
        self.shared.told().heard.clone()
    }

    /// The inode of the record of what is in flight that this connection has given.
    #[must_use]
    pub fn inflight_inode(&self) -> Option<u64> {
        let told = self.shared.told();
        Some(rustix::fs::fstat(told.inflight.as_ref()?).ok()?.st_ino)
    }

    /// Says on the back channel that the configuration space has changed.
    ///
    /// # Panics
    /// If there is no back channel.
    pub fn say_config_changed(&self) {
        use resilver_vhost::message::backend_notice;
        use resilver_vhost::protocol::backend_request;
        let told = self.shared.told();
        let channel = told.back_channel.as_ref().expect("a back channel");
        let notice = backend_notice(backend_request::CONFIG_CHANGE_MSG);
        rustix::io::write(channel, &notice).expect("a front end that listens");
    }

    /// The ring in hand, if connection number `connection` (from 1) has enabled it.
    #[must_use]
    pub fn started(&self, connection: usize, index: usize) -> Option<FakeRing> {
        let told = self.shared.told();
        let (region, mapping) = told.memory.as_ref()?;
        let ring = told.rings.get(index).filter(|ring| ring.enabled)?;
        (told.connections == connection).then(|| FakeRing::new(ring, *region, mapping))
    }

    /// Waits until connection number `connection` (from 1) has enabled this ring, and takes it in hand.
    ///
    /// # Panics
    /// If that does not happen.
    #[must_use]
    pub fn ring(&self, connection: usize, index: usize) -> FakeRing {
        let begun = Instant::now();
        loop {
            if let Some(ring) = self.started(connection, index) {
                return ring;
            }
            assert!(begun.elapsed() < PATIENCE, "ring {index} was not started");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

fn converse(mut socket: &UnixStream, shared: &Shared) -> std::io::Result<()> {
    loop {
        let mut bytes = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let came = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if came.bytes == 0 {
            return Ok(());
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        socket.read_exact(&mut bytes[came.bytes..])?;
        let header = Header::decode(&bytes).expect("a header");
        let mut body = vec![0; header.size as usize];
        socket.read_exact(&mut body)?;
        let message = decode(header.request, &body, fds.len()).expect("a message");
        let face = shared.face.lock().expect("no test thread has panicked").clone();
        let (reply, fd) = shared.told().take(&face, &message, fds);
        let reply = match reply {
            Some(reply) => reply,
            None if header.needs_reply() => Reply::U64(0),
            None => continue,
        };
        let bytes = reply.encode(header.request);
        match fd {
            None => socket.write_all(&bytes)?,
            Some(fd) => send_with(socket, &bytes, &fd),
        }
    }
}

fn send_with(socket: &UnixStream, bytes: &[u8], fd: &OwnedFd) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    assert!(rights.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [std::io::IoSlice::new(bytes)];
    sendmsg(socket, &parts, &mut rights, SendFlags::NOSIGNAL).expect("a front end that listens");
}

impl Told {
    /// Takes a message; the answer, if it has one of its own.
    fn take(
        &mut self,
        face: &Face,
        message: &Message,
        mut fds: Vec<OwnedFd>,
    ) -> (Option<Reply>, Option<OwnedFd>) {
        self.heard.push(message.clone());
        let reply = match message {
            Message::GetFeatures => Some(Reply::U64(face.features)),
            Message::GetProtocolFeatures => Some(Reply::U64(face.protocol)),
            Message::GetQueueNum => Some(Reply::U64(face.queues)),
            Message::GetConfig(piece) => {
                let mut bytes = face.config.clone();
                bytes.resize(piece.bytes.len(), 0);
                Some(Reply::Config(ConfigPiece { bytes, ..*piece }))
            }
            Message::GetVringBase { index } => {
                let ring = self.ring(*index);
                ring.enabled = false;
                let base = u32::from(ring.base);
                Some(Reply::Vring { index: *index, base })
            }
            Message::GetInflightFd(wanted) => {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                let fd = rustix::fs::memfd_create("inflight", flags).expect("a memory descriptor");
                rustix::fs::ftruncate(&fd, 4096).expect("its size");
                let record = InflightDescription { mmap_size: 4096, ..*wanted };
                return (Some(Reply::Inflight(record)), Some(fd));
            }
            _ => None,
        };
        let fd = if fds.is_empty() { None } else { Some(fds.remove(0)) };
        match (message, fd) {
            (Message::SetMemTable(regions), Some(fd)) => {
                let mapping = Mapping::shared(fd.as_fd(), regions[0].file_offset, regions[0].size);
                self.memory = Some((regions[0], mapping.expect("memory")));
            }
            (Message::SetInflightFd(_), fd) => self.inflight = fd,
            (Message::SetBackendReqFd, fd) => self.back_channel = fd,
            (Message::SetVringKick { index, .. }, fd) => self.ring(*index).kick = fd,
            (Message::SetVringCall { index, .. }, fd) => self.ring(*index).call = fd,
            (Message::SetVringNum { index, num }, _) => self.ring(*index).size = *num as u16,
            (Message::SetVringBase { index, base }, _) => self.ring(*index).base = *base as u16,
            (Message::SetVringAddr { index, addresses }, _) => {
                self.ring(*index).addresses = Some(*addresses);
            }
            (Message::SetVringEnable { index, enable }, _) => {
                self.ring(*index).enabled = *enable == 1;
                self.answer_identity(face, *index);
            }
            _ => {}
        }
        (reply, None)
    }

    /// A connection that asks for the serial asks nothing else, and is none for a test.
    fn answer_identity(&mut self, face: &Face, index: u32) {
        let Some((region, mapping)) = self.memory.clone() else { return };
        let told = self.ring(index);
        let mut ring = FakeRing::new(told, region, &mapping);
        if let Some(request) = ring.take()
            && request.kind == blk_type::GET_ID
        {
            told.enabled = false;
            self.connections -= 1;
            ring.write(request.data[0].0, &face.serial);
            ring.complete(&request, 0);
        }
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        let index = index as usize;
        while self.rings.len() <= index {
            self.rings.push(Ring::default());
        }
        &mut self.rings[index]
    }
}

/// A split ring as a device sees it.
pub struct FakeRing {
    size: u16,
    descriptors: Area,
    available: Area,
    used: Area,
    taken: u16,
    region: RegionDescription,
    table: RegionTable,
    memory: RegionId,
    kick: EventFd,
    call: EventFd,
}

/// A request as a device finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeRequest {
    /// The head of its chain.
    pub head: u16,
    /// What is asked.
    pub kind: u32,
    /// Where on the disk.
    pub sector: u64,
    /// Its data buffers: guest address and length.
    pub data: Vec<(u64, u32)>,
    /// Guest address of its status byte.
    pub status: u64,
}

impl FakeRing {
    fn new(ring: &Ring, region: RegionDescription, mapping: &Arc<Mapping>) -> Self {
        let addresses = ring.addresses.expect("addresses");
        let entries = usize::from(ring.size);
        let area = |address: u64, length| {
            Area::new(mapping, address - region.user_address, length, 2).expect("shared memory")
        };
        let table = RegionTable::with_capacity(1);
        let memory = table.insert(Arc::clone(mapping)).expect("an empty table has room");
        let event = |fd: &Option<OwnedFd>| {
            EventFd::from_fd(fd.as_ref().expect("an eventfd").try_clone().expect("a descriptor"))
        };
        Self {
            size: ring.size,
            descriptors: area(addresses.descriptors, 16 * entries),
            available: area(addresses.available, 6 + 2 * entries),
            used: area(addresses.used, 6 + 8 * entries),
            taken: ring.base,
            region,
            table,
            memory,
            kick: event(&ring.kick),
            call: event(&ring.call),
        }
    }

    /// Whether the driver has kicked since this was asked last.
    #[must_use]
    pub fn was_kicked(&self) -> bool {
        self.kick.drain()
    }

    /// Whether the driver says that it wants interrupts (without the event index).
    #[must_use]
    pub fn wants_interrupts(&self) -> bool {
        self.available.load_u16(0, Ordering::Relaxed) == 0
    }

    /// Where the device began with the ring, or has come to.
    #[must_use]
    pub fn taken(&self) -> u16 {
        self.taken
    }

    /// The available index.
    #[must_use]
    pub fn available(&self) -> u16 {
        self.available.load_u16(2, Ordering::Acquire)
    }

    /// The next request; none if the driver has made no more available.
    pub fn take(&mut self) -> Option<FakeRequest> {
        if self.available() == self.taken {
            return None;
        }
        let at = 4 + 2 * usize::from(self.taken % self.size);
        let head = self.available.load_u16(at, Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        let mut parts = self.chain(head).into_iter();
        let (header, _) = parts.next()?;
        let mut bytes = [0; 16];
        self.read(header, &mut bytes);
        let (status, _) = parts.next_back()?;
        Some(FakeRequest {
            head,
            kind: u32::from_le_bytes(*bytes.first_chunk()?),
            sector: u64::from_le_bytes(*bytes.last_chunk()?),
            data: parts.collect(),
            status,
        })
    }

    /// Waits for the next request.
    ///
    /// # Panics
    /// If none comes.
    pub fn wait(&mut self) -> FakeRequest {
        let begun = Instant::now();
        loop {
            if let Some(request) = self.take() {
                return request;
            }
            assert!(begun.elapsed() < PATIENCE, "no request came");
            std::thread::yield_now();
        }
    }

    /// Guest address and length of the parts of a chain.
    fn chain(&self, head: u16) -> Vec<(u64, u32)> {
        let (mut parts, mut index) = (Vec::new(), head);
        loop {
            let at = 16 * usize::from(index);
            let address = self.descriptors.load_u64(at, Ordering::Relaxed);
            let length = self.descriptors.load_u32(at + 8, Ordering::Relaxed);
            let flags = self.descriptors.load_u16(at + 12, Ordering::Relaxed);
            if flags & descriptor_flags::INDIRECT != 0 {
                let mut table = vec![0; length as usize];
                self.read(address, &mut table);
                return table
                    .chunks(16)
                    .map(|entry| {
                        let length: [u8; 4] = entry[8..12].try_into().expect("4 bytes");
                        let address = *entry.first_chunk().expect("8 bytes");
                        (u64::from_le_bytes(address), u32::from_le_bytes(length))
                    })
                    .collect();
            }
            parts.push((address, length));
            if flags & descriptor_flags::NEXT == 0 {
                return parts;
            }
            index = self.descriptors.load_u16(at + 14, Ordering::Relaxed);
        }
    }

    fn slice(&self, address: u64, length: usize) -> BufferSlice {
        let offset = address - self.region.guest_address;
        BufferSlice { region: self.memory, length: length as u32, offset }
    }

    /// Reads shared memory at a guest address.
    ///
    /// # Panics
    /// If it is not shared.
    pub fn read(&self, address: u64, into: &mut [u8]) {
        self.table.read(self.slice(address, into.len()), into).expect("shared memory");
    }

    /// Writes shared memory at a guest address.
    ///
    /// # Panics
    /// If it is not shared.
    pub fn write(&self, address: u64, from: &[u8]) {
        self.table.write(self.slice(address, from.len()), from).expect("shared memory");
    }

    /// Completes a request with a status byte.
    pub fn complete(&mut self, request: &FakeRequest, status: u8) {
        self.write(request.status, &[status]);
        self.use_up(u32::from(request.head), 1);
    }

    /// Puts an entry in the used ring, whatever it says, and interrupts.
    pub fn use_up(&mut self, id: u32, length: u32) {
        let index = self.used();
        let at = 4 + 8 * usize::from(index % self.size);
        self.used.store_u32(at, id, Ordering::Relaxed);
        self.used.store_u32(at + 4, length, Ordering::Relaxed);
        self.set_used(index.wrapping_add(1));
    }

    /// The used index.
    #[must_use]
    pub fn used(&self) -> u16 {
        self.used.load_u16(2, Ordering::Relaxed)
    }

    /// Claims a used index, whatever it is, and interrupts.
    pub fn set_used(&mut self, index: u16) {
        self.used.store_u16(2, index, Ordering::Release);
        self.call.signal();
    }
}
