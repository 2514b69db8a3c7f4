//! A back end in the hands of a test: it answers what a front end says, and does with the rings what the test does, right or
//! wrong. It shares the codec with the product and nothing else.

use std::collections::VecDeque;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use resilver_sys::{Area, BufferSlice, EventFd, Mapping, RegionId, RegionTable};
use resilver_vhost::message::{
    ConfigPiece, Header, InflightDescription, Message, RegionDescription, Reply, RingAddresses,
    decode,
};
use resilver_vhost::protocol::{
    FDS_MAX, HEADER_BYTES, SERIAL_BYTES, blk_type, descriptor_flags, features, protocol_features,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::raw_guest::send;
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
    /// What it does when it is asked for that.
    pub identity: Identity,
    /// It fills the descriptors that it is kicked by, and has writers to them wait.
    pub jams: bool,
    /// A ring that it refuses to serve.
    pub refuses: Option<u32>,
}

/// How a back end answers who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// With its serial.
    Told,
    /// With this status alone.
    Fails(u8),
    /// By completing this descriptor.
    Lies(u32),
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
            identity: Identity::Told,
            jams: false,
            refuses: None,
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

/// What a back end does with one answer instead of sending it as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Twist {
    /// It sends it as it should be.
    #[default]
    None,
    /// From this byte on it says this; it may become longer.
    Patch(usize, Vec<u8>),
    /// It sends so many bytes of it and hangs up.
    Cut(usize),
    /// It says nothing, and goes on listening.
    Silence,
    /// So many descriptors of nothing come along, instead of what should.
    Descriptors(usize),
    /// It sends its bytes one by one, with so long a pause before each.
    Slowly(Duration),
}

/// What a connection has told.
#[derive(Default)]
struct Told {
    connections: usize,
    packed: bool,
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
    base: u32,
    addresses: Option<RingAddresses>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

struct Shared {
    face: Mutex<Face>,
    told: Mutex<Told>,
    twists: Mutex<VecDeque<Twist>>,
    /// The test has done with it.
    over: AtomicBool,
}

impl Shared {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().expect("no test thread has panicked")
    }
}

/// A listening back end. It serves one front end after the other, on a thread of its own, until it is dropped.
pub struct FakeBackEnd {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl FakeBackEnd {
    /// Listens at `path`.
    ///
    /// # Panics
    /// If it cannot; as everything here, because it is a test's.
    #[must_use]
    pub fn listen(path: &Path, face: Face) -> Self {
        let listener = Arc::new(UnixListener::bind(path).expect("a socket"));
        let shared = Arc::new(Shared {
            face: Mutex::new(face),
            told: Mutex::default(),
            twists: Mutex::default(),
            over: AtomicBool::new(false),
        });
        let (theirs, door) = (Arc::clone(&shared), Arc::clone(&listener));
        let thread = std::thread::spawn(move || {
            while let Ok((socket, _)) = door.accept() {
                let connections = theirs.told().connections + 1;
                let clone = socket.try_clone().expect("a descriptor");
                *theirs.told() = Told { connections, socket: Some(clone), ..Told::default() };
                // After the socket is where it can be shut down.
                if theirs.over.load(Ordering::SeqCst) {
                    return;
                }
                let _ended = converse(&socket, &theirs);
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
        });
        Self { shared, listener, thread: Some(thread) }
    }

    /// Does this with its next answers, one after the other.
    ///
    /// # Panics
    /// As [`FakeBackEnd::listen`].
    pub fn twist(&self, twists: impl IntoIterator<Item = Twist>) {
        self.shared.twists.lock().expect("no test thread has panicked").extend(twists);
    }

    /// Answers as it should from now on.
    ///
    /// # Panics
    /// As [`FakeBackEnd::listen`].
    pub fn behave(&self) {
        self.shared.twists.lock().expect("no test thread has panicked").clear();
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

    /// Closes the connection, as one that dies does, if there is one.
    pub fn hang_up(&self) {
        if let Some(socket) = &self.shared.told().socket {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
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
        let notice = backend_notice(backend_request::CONFIG_CHANGE_MSG);
        assert!(self.say(&notice), "a back channel, and a front end that listens");
    }

    /// Says anything on the back channel; whether it was taken. Waits for nothing.
    #[must_use]
    pub fn say(&self, bytes: &[u8]) -> bool {
        use rustix::net::SendFlags;
        let told = self.shared.told();
        let Some(channel) = &told.back_channel else { return false };
        let sent = rustix::net::send(channel, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent.is_ok_and(|count| count == bytes.len())
    }

    /// The ring in hand, if connection number `connection` (from 1) has enabled it.
    #[must_use]
    pub fn started(&self, connection: usize, index: usize) -> Option<FakeRing> {
        let told = self.shared.told();
        let (region, mapping) = told.memory.as_ref()?;
        let ring = told.rings.get(index).filter(|ring| ring.enabled)?;
        (told.connections == connection).then(|| FakeRing::new(ring, told.packed, *region, mapping))
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
        let twist = shared.twists.lock().expect("no test thread has panicked").pop_front();
        answer(socket, reply.encode(header.request), fd, twist.unwrap_or_default())?;
    }
}

/// Sends an answer, or what a twist makes of it; an error hangs up.
fn answer(
    mut socket: &UnixStream,
    mut bytes: Vec<u8>,
    fd: Option<OwnedFd>,
    twist: Twist,
) -> std::io::Result<()> {
    let mut fds: Vec<OwnedFd> = fd.into_iter().collect();
    match twist {
        Twist::None => {}
        Twist::Patch(at, patch) => {
            let at = at.min(bytes.len());
            bytes.resize(bytes.len().max(at + patch.len()), 0);
            bytes[at..at + patch.len()].copy_from_slice(&patch);
            let claimed = bytes.get(8..12).and_then(|size| size.try_into().ok());
            let claimed = u32::from_ne_bytes(claimed.unwrap_or_default()) as usize;
            if claimed > bytes.len().saturating_sub(HEADER_BYTES) {
                // Nobody has to wait for the rest.
                send(socket, &bytes, &[])?;
                return Err(std::io::ErrorKind::ConnectionAborted.into());
            }
        }
        Twist::Cut(kept) => {
            bytes.truncate(kept);
            send(socket, &bytes, &[])?;
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        Twist::Silence => return Ok(()),
        Twist::Descriptors(count) => {
            fds.clear();
            for _ in 0..count {
                fds.push(std::fs::File::open("/dev/null")?.into());
            }
        }
        Twist::Slowly(pause) => {
            for byte in bytes {
                std::thread::sleep(pause);
                socket.write_all(&[byte])?;
            }
            return Ok(());
        }
    }
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    send(socket, &bytes, &fds)
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
                Some(Reply::Vring { index: *index, base: ring.base })
            }
            Message::GetInflightFd(wanted) => {
                let flags = rustix::fs::MemfdFlags::CLOEXEC;
                let fd = rustix::fs::memfd_create("inflight", flags).expect("a memory descriptor");
                rustix::fs::ftruncate(&fd, 4096).expect("its size");
                let record = InflightDescription { mmap_size: 4096, ..*wanted };
                return (Some(Reply::Inflight(record)), Some(fd));
            }
            Message::SetVringEnable { index, .. } if face.refuses == Some(*index) => {
                return (Some(Reply::U64(1)), None);
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
            (Message::SetVringKick { index, .. }, fd) => {
                if let Some(fd) = fd.as_ref().filter(|_| face.jams) {
                    rustix::fs::fcntl_setfl(fd, rustix::fs::OFlags::RDWR).expect("its flags");
                    rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).expect("an eventfd");
                }
                self.ring(*index).kick = fd;
            }
            (Message::SetVringCall { index, .. }, fd) => self.ring(*index).call = fd,
            (Message::SetVringNum { index, num }, _) => self.ring(*index).size = *num as u16,
            (Message::SetVringBase { index, base }, _) => self.ring(*index).base = *base,
            (Message::SetFeatures(chosen), _) => {
                self.packed = chosen & features::RING_PACKED != 0;
            }
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
        let packed = self.packed;
        let told = self.ring(index);
        let mut ring = FakeRing::new(told, packed, region, &mapping);
        if let Some(request) = ring.take()
            && (request.kind, request.data.len()) == (blk_type::GET_ID, 1)
        {
            told.enabled = false;
            self.connections -= 1;
            match face.identity {
                Identity::Told => {
                    ring.write(request.data[0].0, &face.serial);
                    ring.complete(&request, 0);
                }
                Identity::Fails(status) => ring.complete(&request, status),
                Identity::Lies(id) => ring.use_up(id, 21),
            }
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

/// A ring as a device sees it.
pub struct FakeRing {
    size: u16,
    /// Of a packed ring all descriptors; its driver's and its device's event areas stand for the other two.
    descriptors: Area,
    available: Area,
    used: Area,
    /// The available index. Of a packed ring, the next descriptor to look at and its wrap counter in the highest bit; the other
    /// is the one to write next.
    taken: u16,
    packed: Option<u16>,
    /// Guest addresses of the three.
    parts: [u64; 3],
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

/// The wrap counter in a packed ring's position.
const WRAP: u16 = 1 << 15;
/// The flags that say whose a packed descriptor is.
const OWNER: u16 = descriptor_flags::AVAIL | descriptor_flags::USED;

/// The next place in a packed ring.
fn ahead(at: u16, size: u16) -> u16 {
    if (at & !WRAP) + 1 == size { (at & WRAP) ^ WRAP } else { at + 1 }
}

impl FakeRing {
    fn new(ring: &Ring, packed: bool, region: RegionDescription, mapping: &Arc<Mapping>) -> Self {
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
        let (driver, device) = if packed { (4, 4) } else { (6 + 2 * entries, 6 + 8 * entries) };
        Self {
            size: ring.size,
            descriptors: area(addresses.descriptors, 16 * entries),
            available: area(addresses.available, driver),
            used: area(addresses.used, device),
            taken: ring.base as u16,
            packed: packed.then_some((ring.base >> 16) as u16),
            parts: [addresses.descriptors, addresses.available, addresses.used]
                .map(|address| address - region.user_address + region.guest_address),
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

    /// Interrupts, for whatever reason.
    pub fn interrupt(&self) {
        self.call.signal();
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

    /// The next request; none if the driver has made no more available, or it is none that a driver makes.
    pub fn take(&mut self) -> Option<FakeRequest> {
        let place = 16 * usize::from(self.taken & !WRAP);
        let head = self.take_head()?;
        let parts = if self.packed.is_some() { self.table(place) } else { self.chain(head) };
        let mut parts = parts?.into_iter();
        let (header, _) = parts.next()?;
        let mut bytes = [0; 16];
        self.may_read(header, &mut bytes)?;
        let (status, _) = parts.next_back()?;
        Some(FakeRequest {
            head,
            kind: u32::from_le_bytes(*bytes.first_chunk()?),
            sector: u64::from_le_bytes(*bytes.last_chunk()?),
            data: parts.collect(),
            status,
        })
    }

    /// The next request's name in the ring, whatever is behind it.
    pub fn take_head(&mut self) -> Option<u16> {
        if self.packed.is_some() {
            let at = 16 * usize::from(self.taken & !WRAP);
            let flags = self.descriptors.load_u16(at + 14, Ordering::Acquire) & OWNER;
            let (avail, used) = (descriptor_flags::AVAIL, descriptor_flags::USED);
            if flags != if self.taken & WRAP != 0 { avail } else { used } {
                return None;
            }
            self.taken = ahead(self.taken, self.size);
            return Some(self.descriptors.load_u16(at + 12, Ordering::Relaxed));
        }
        if self.available() == self.taken {
            return None;
        }
        let at = 4 + 2 * usize::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some(self.available.load_u16(at, Ordering::Relaxed))
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

    /// Guest address and length of the parts of a chain of a split ring.
    fn chain(&self, head: u16) -> Option<Vec<(u64, u32)>> {
        let (mut parts, mut index) = (Vec::new(), head);
        while parts.len() < usize::from(self.size) && index < self.size {
            let at = 16 * usize::from(index);
            let flags = self.descriptors.load_u16(at + 12, Ordering::Relaxed);
            if flags & descriptor_flags::INDIRECT != 0 {
                return self.table(at);
            }
            let address = self.descriptors.load_u64(at, Ordering::Relaxed);
            parts.push((address, self.descriptors.load_u32(at + 8, Ordering::Relaxed)));
            if flags & descriptor_flags::NEXT == 0 {
                return Some(parts);
            }
            index = self.descriptors.load_u16(at + 14, Ordering::Relaxed);
        }
        None
    }

    /// The same, of the indirect table that the descriptor here names.
    fn table(&self, at: usize) -> Option<Vec<(u64, u32)>> {
        let length = self.descriptors.load_u32(at + 8, Ordering::Relaxed) as usize;
        let mut table = vec![0; if length <= 1 << 16 { length } else { return None }];
        self.may_read(self.descriptors.load_u64(at, Ordering::Relaxed), &mut table)?;
        let entry = |entry: &[u8]| {
            let (address, rest) = entry.split_first_chunk()?;
            Some((u64::from_le_bytes(*address), u32::from_le_bytes(*rest.first_chunk()?)))
        };
        table.chunks(16).map(entry).collect()
    }

    fn slice(&self, address: u64, length: usize) -> BufferSlice {
        let offset = address.wrapping_sub(self.region.guest_address);
        BufferSlice { region: self.memory, length: length as u32, offset }
    }

    /// Reads shared memory at a guest address.
    ///
    /// # Panics
    /// If it is not shared.
    pub fn read(&self, address: u64, into: &mut [u8]) {
        self.may_read(address, into).expect("shared memory");
    }

    fn may_read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        self.table.read(self.slice(address, into.len()), into).ok()
    }

    /// Writes shared memory at a guest address.
    ///
    /// # Panics
    /// If it is not shared.
    pub fn write(&self, address: u64, from: &[u8]) {
        assert!(self.may_write(address, from), "address {address:#x} is not shared");
    }

    /// Writes shared memory at a guest address, if it is any.
    #[must_use]
    pub fn may_write(&self, address: u64, from: &[u8]) -> bool {
        self.table.write(self.slice(address, from.len()), from).is_ok()
    }

    /// Guest address of the ring's parts: descriptors, available ring, used ring; of a packed ring the descriptors and the
    /// driver's and the device's event area.
    #[must_use]
    pub fn parts(&self) -> [u64; 3] {
        self.parts
    }

    /// Completes a request with a status byte.
    pub fn complete(&mut self, request: &FakeRequest, status: u8) {
        self.write(request.status, &[status]);
        self.use_up(u32::from(request.head), 1);
    }

    /// Puts an entry in the used ring, whatever it says, and interrupts.
    pub fn use_up(&mut self, id: u32, length: u32) {
        if let Some(position) = &mut self.packed {
            let at = 16 * usize::from(*position & !WRAP);
            let flags = if *position & WRAP != 0 { OWNER } else { 0 };
            *position = ahead(*position, self.size);
            self.descriptors.store_u16(at + 12, id as u16, Ordering::Relaxed);
            self.descriptors.store_u32(at + 8, length, Ordering::Relaxed);
            self.descriptors.store_u16(at + 14, flags, Ordering::Release);
            return self.call.signal();
        }
        let index = self.used();
        let at = 4 + 8 * usize::from(index % self.size);
        self.used.store_u32(at, id, Ordering::Relaxed);
        self.used.store_u32(at + 4, length, Ordering::Relaxed);
        self.set_used(index.wrapping_add(1));
    }

    /// Breaks the ring wherever its driver looks next; a packed one's in a lap of this wrap counter.
    pub fn ruin(&mut self, wrap: bool) {
        if self.packed.is_none() {
            return self.set_used(self.used().wrapping_add(0x4000));
        }
        for at in (0..16 * usize::from(self.size)).step_by(16) {
            self.descriptors.store_u16(at + 12, u16::MAX, Ordering::Relaxed);
            self.descriptors.store_u16(at + 14, if wrap { OWNER } else { 0 }, Ordering::Release);
        }
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

impl Drop for FakeBackEnd {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        self.hang_up();
        // One that has panicked has said so, and its test has failed by it.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
