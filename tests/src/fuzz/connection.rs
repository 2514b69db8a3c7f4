//! Front ends on a real socket: a controller with its sessions, connections and disk, on one thread, so that a program always
//! runs the same way but for what the kernel's socket does with it.
//!
//! What `messages` and `ring` do apart comes together here: descriptors of every kind behind messages of every kind, memory
//! that is mapped, shortened and taken away under running rings, regions and logs that are not what was said, two front ends
//! at a time. Properties: nothing panics; nothing outside what was shared is written; an answer is an answer to what was
//! asked; when all have gone the reactor has nothing of theirs, and the next front end is served.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use resilver_bdev::Disk;
use resilver_reactor::{Context, Doorbell, Nanos};
use resilver_sys::RegionTable;
use resilver_vhost::message::{
    FdPresence, Header, InflightDescription, Message, RegionDescription, RingAddresses,
};
use resilver_vhost::protocol::{
    self, BODY_BYTES_MAX, FDS_MAX, HEADER_BYTES, features, flags, vring_flags,
};
use resilver_vhost::ring::Format;
use resilver_vhost::server::Role;
use resilver_vhost::session::{POSTCOPY_FEATURES, PROTOCOL_FEATURES};
use resilver_vhost::{Controller, ControllerConfig};
use rustix::event::{EventfdFlags, eventfd};
use tokio::task::{LocalSet, yield_now};

use super::Input;
use super::bench::{AVAILABLE, BASE, FIRST, LIMITS, QUEUES, USED, begin, in_file};
use super::disk::{Conduct, FuzzedDisk};
use super::messages::message;
use super::ring::{Cursor, request};
use crate::guest_memory::MemoryFile;
use crate::raw_guest::send;
use crate::watched::Watched;

/// Entries of a ring, unless a front end says otherwise.
const SIZE: u16 = 16;
/// Steps of one program.
const STEPS: usize = 128;
/// Front ends that are connected at a time: one more than are served.
const CLIENTS: usize = 3;
/// Rounds of all tasks after which what was sent has been dealt with, or waits for something that will not come.
const ROUNDS: usize = 12;
/// How long ending may take: far more than the second for which a controller waits by itself.
const PATIENCE: Duration = Duration::from_secs(15);

const FEATURES: u64 = features::VERSION_1
    | features::PROTOCOL_FEATURES
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX
    | features::FLUSH;

thread_local! {
    /// A task of this thread has panicked: tokio keeps that to itself.
    static PANICKED: Cell<bool> = const { Cell::new(false) };
    static DIRECTORY: tempfile::TempDir = tempfile::tempdir().expect("a directory");
}

fn notice_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICKED.set(true);
            before(info);
        }));
    });
}

/// What the front ends have to send.
struct World {
    memory: Arc<MemoryFile>,
    log: File,
    inflight: MemoryFile,
    event: File,
    null: File,
    socket: PathBuf,
    clients: Vec<Option<UnixStream>>,
    cursors: [Cursor; QUEUES as usize],
    shortened: bool,
    /// All of the memory's file was handed over with a message that may say anything of it: as a log, say. Whatever is
    /// written to it then was the front end's to lose.
    given_away: bool,
}

/// Descriptors of these kinds are of the guest's memory.
const MEMORY_KINDS: u8 = 3;

impl World {
    fn new(socket: PathBuf, format: Format) -> Self {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an event");
        Self {
            memory: Arc::new(super::bench::guest_memory()),
            log: MemoryFile::new(4096).file(),
            inflight: MemoryFile::new(8192),
            event: event.into(),
            null: File::open("/dev/null").expect("/dev/null"),
            socket,
            clients: (0..CLIENTS).map(|_| None).collect(),
            cursors: [Cursor::new(format, SIZE); QUEUES as usize],
            shortened: false,
            given_away: false,
        }
    }

    /// The descriptor of this kind.
    fn fd(&self, kind: u8) -> BorrowedFd<'_> {
        match kind % 8 {
            0..MEMORY_KINDS => self.memory.fd(),
            3 => self.log.as_fd(),
            4 => self.inflight.fd(),
            5 | 6 => self.event.as_fd(),
            _ => self.null.as_fd(),
        }
    }

    /// Has a front end send bytes. One that is not connected connects first; one that was hung up on is no more.
    fn send(&mut self, client: usize, bytes: &[u8], kinds: &[u8]) {
        let stream = self.clients[client].take().unwrap_or_else(|| {
            let stream = UnixStream::connect(&self.socket).expect("the controller listens");
            stream.set_nonblocking(true).expect("a socket");
            stream
        });
        let fds: Vec<_> = kinds.iter().map(|kind| self.fd(*kind)).collect();
        if send(&stream, bytes, &fds).is_ok() {
            self.clients[client] = Some(stream);
        }
    }

    fn say(&mut self, client: usize, message: &Message, kinds: &[u8]) {
        self.send(client, &message.encode(flags::NEED_REPLY), kinds);
    }

    /// Takes what has been answered.
    fn listen(&mut self) {
        for slot in &mut self.clients {
            let Some(stream) = slot else { continue };
            let mut answers = Vec::new();
            let ended = !matches!(stream.read_to_end(&mut answers), Err(error)
                if error.kind() == std::io::ErrorKind::WouldBlock);
            let mut rest = answers.as_slice();
            while let Some((head, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(head).expect("an answer's header");
                assert!(header.is_reply(), "{header:?}");
                rest = behind.get(header.size as usize..).expect("an answer's body");
            }
            assert!(rest.is_empty(), "half an answer");
            if ended {
                *slot = None;
            }
        }
    }

    fn region(second: bool) -> RegionDescription {
        let (address, size) = if second { (BASE + FIRST, 4 * 4096) } else { (BASE, FIRST) };
        let file_offset = in_file(address, 1).expect("a region's place");
        RegionDescription { guest_address: address, user_address: address, size, file_offset }
    }

    /// All that a ring needs, in the order in which QEMU says it.
    fn ring(&mut self, client: usize, queue: u16, num: u32) {
        let (index, begin) = (u32::from(queue), begin(queue));
        let (used, available) = (begin + USED, begin + AVAILABLE);
        let flags = vring_flags::LOG;
        let addresses = RingAddresses { flags, descriptors: begin, used, available, log: used };
        let base = self.cursors[usize::from(queue)].base();
        self.say(client, &Message::SetVringNum { index, num }, &[]);
        self.say(client, &Message::SetVringBase { index, base }, &[]);
        self.say(client, &Message::SetVringAddr { index, addresses }, &[]);
        self.say(client, &Message::SetVringCall { index, fd: FdPresence::Attached }, &[5]);
        self.say(client, &Message::SetVringKick { index, fd: FdPresence::Attached }, &[5]);
        self.say(client, &Message::SetVringEnable { index, enable: 1 }, &[]);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let client = usize::from(input.u8()) % CLIENTS;
        let queue = u16::from(input.u8()) % QUEUES;
        let index = u32::from(queue);
        match input.u8() % 20 {
            0 | 1 => {
                // Anything, with any descriptors; also a body that is longer or shorter than the header says.
                let (request, body, fds) = message(input);
                let wrong = if input.u8() == 255 { u32::from(input.u8()) } else { 0 };
                let size = u32::try_from(body.len()).unwrap_or_default() + wrong;
                let flags = if input.u8() == 255 { input.u32() } else { flags::NEED_REPLY };
                let mut bytes = Header { request, flags: flags | 1, size }.encode().to_vec();
                bytes.extend(&body);
                let kinds: Vec<u8> = (0..fds.min(FDS_MAX + 1)).map(|_| input.u8()).collect();
                self.given_away |= kinds.iter().any(|kind| kind % 8 < MEMORY_KINDS);
                self.send(client, &bytes, &kinds);
            }
            2 => {
                let mut wanted = FEATURES | features::LOG_ALL;
                if self.cursors[0].format == Format::Packed {
                    wanted |= features::RING_PACKED;
                }
                let wanted = wanted & !input.u64();
                self.say(
                    client,
                    &Message::SetProtocolFeatures(PROTOCOL_FEATURES | POSTCOPY_FEATURES),
                    &[],
                );
                self.say(client, &Message::SetFeatures(wanted), &[]);
            }
            3 | 4 => {
                let regions: Vec<_> =
                    (0..=input.u8() % 2).map(|at| Self::region(at == 1)).collect();
                let kinds = vec![0; regions.len()];
                self.say(client, &Message::SetMemTable(regions), &kinds);
            }
            5 => self.say(client, &Message::AddMemReg(Self::region(input.flag())), &[0]),
            6 => self.say(client, &Message::RemMemReg(Self::region(input.flag())), &[]),
            7 | 8 => self.ring(client, queue, input.pick(&[u32::from(SIZE), 64, 1, 128, 0])),
            9 => self.say(client, &Message::GetVringBase { index }, &[]),
            10 => {
                let fd = input.pick(&[FdPresence::Attached, FdPresence::Absent]);
                let kinds: &[u8] = if fd == FdPresence::Attached { &[5] } else { &[] };
                self.say(client, &Message::SetVringKick { index, fd }, kinds);
            }
            11 => {
                let (size, offset) = (input.pick(&[64u64, 34, 1, 4096]), u64::from(input.u8()));
                self.say(client, &Message::SetLogBase { size, offset }, &[3]);
            }
            12 => {
                let description = InflightDescription {
                    mmap_size: input.pick(&[8192u64, 4096, 64, 1 << 40]),
                    mmap_offset: u64::from(input.u8()),
                    num_queues: input.pick(&[QUEUES, 1, 256, 0]),
                    queue_size: input.pick(&[64u16, 16, 1024, 0]),
                };
                self.say(client, &Message::GetInflightFd(description), &[]);
                self.say(client, &Message::SetInflightFd(description), &[4]);
            }
            13 => {
                let (at, length) = (u64::from(input.u16()), usize::from(input.u8() % 32));
                let bytes = input.bytes(length);
                if input.flag() {
                    self.inflight.put(at % 8000, bytes);
                } else {
                    self.write(BASE + at, bytes);
                }
            }
            14 | 15 => {
                let memory = Arc::clone(&self.memory);
                let cursor = &mut self.cursors[usize::from(queue)];
                let write = |at: u64, bytes: &[u8]| {
                    if let Some(at) = in_file(at, bytes.len()) {
                        memory.put(at, bytes);
                    }
                };
                request(input, queue, cursor, write);
                let _kicked = rustix::io::write(&self.event, &1u64.to_ne_bytes());
            }
            16 => {
                // The file behind the memory loses its end, with the second region.
                let kept = in_file(BASE + FIRST, 1).unwrap_or_default();
                self.shortened |= self.memory.file().set_len(kept).is_ok();
            }
            17 => self.clients[client] = None,
            18 => {
                let message = input.pick(&[0u8, 1, 2, 3, 4, 5, 6, 7]);
                let message = match message {
                    0 => Message::ResetDevice,
                    1 => Message::SetStatus(u64::from(input.u8() % 16)),
                    2 => Message::SetVringEnable { index, enable: u32::from(input.u8() % 3) },
                    3 => Message::ResetOwner,
                    // A migration in post-copy: what is shared later has all its pages, and nobody serves a fault.
                    4 => Message::PostcopyAdvise,
                    5 => Message::PostcopyListen,
                    6 => Message::PostcopyEnd,
                    _ => Message::MemoryAck {
                        of: input.pick(&[
                            protocol::request::NONE,
                            protocol::request::ADD_MEM_REG,
                            protocol::request::REM_MEM_REG,
                        ]),
                        result: u64::from(input.u8() / 128),
                    },
                };
                self.say(client, &message, &[]);
            }
            _ => {
                // Bytes that are no message, or the beginning of one.
                let length = usize::from(input.u8()).min(BODY_BYTES_MAX);
                let bytes = input.bytes(length);
                self.send(client, bytes, &[]);
            }
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Some(at) = in_file(address, bytes.len()) {
            self.memory.put(at, bytes);
        }
    }
}

/// Lets all tasks run for so many rounds.
async fn run(rounds: usize) {
    for _ in 0..rounds {
        yield_now().await;
    }
}

async fn program(input: &mut Input<'_>) {
    let socket = DIRECTORY.with(|directory| directory.path().join("fuzz"));
    let format = if input.flag() { Format::Packed } else { Format::Split };
    let mut world = World::new(socket.clone(), format);
    let conduct = Arc::new(Mutex::new(Conduct::default()));
    let guest = [Arc::clone(&world.memory), Arc::new(MemoryFile::new(world.memory.size()))];
    let doorbell = Arc::new(Doorbell::new().expect("a doorbell"));
    let root = FuzzedDisk::new(LIMITS, conduct, guest);
    let bell = Arc::clone(&doorbell);
    let (mut disk, handle) = Disk::new(Box::new(root), Arc::default(), bell, || ());
    let table = Rc::new(RefCell::new(RegionTable::with_capacity(600)));
    let reactor = tokio::task::spawn_local({
        let table = Rc::clone(&table);
        async move {
            let mut idle = Watched::default();
            for now in 0.. {
                let polled = idle.poll(
                    &mut disk,
                    &doorbell,
                    &Context { now: Nanos(now), memory: &table.borrow() },
                );
                polled.expect("no work that comes unseen");
                yield_now().await;
            }
        }
    });
    let config = ControllerConfig {
        name: "fuzz".to_owned(),
        socket_path: socket,
        read_only: false,
        serial: None,
        num_queues: QUEUES,
        packed_ring: true,
        postcopy: true,
        role: Role::Listen,
    };
    let controller = Controller::start(config, handle, LIMITS).expect("a controller");
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        world.step(input);
        run(ROUNDS).await;
        world.listen();
    }
    world.clients.fill_with(|| None);
    let begin = Instant::now();
    while !(controller.info().sessions.is_empty() && table.borrow().is_empty()) {
        assert!(begin.elapsed() < PATIENCE, "front ends that have gone are still there");
        run(1).await;
    }
    world.say(0, &Message::GetFeatures, &[]);
    let mut answer = [0; HEADER_BYTES + 8];
    let client = world.clients[0].as_mut().expect("a front end that may connect");
    while client.read_exact(&mut answer).is_err() {
        assert!(begin.elapsed() < PATIENCE, "the next front end is not served");
        run(1).await;
    }
    world.clients.fill_with(|| None);
    controller.stop().await.expect("nothing is in flight");
    reactor.abort();
    if !world.given_away {
        super::bench::check_canaries(&world.memory, world.shortened);
    }
}

/// Runs one program.
pub fn connection(data: &[u8]) {
    notice_panics();
    PANICKED.set(false);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(1)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, program(&mut Input::new(data)));
    assert!(!PANICKED.get(), "a task has panicked");
}
