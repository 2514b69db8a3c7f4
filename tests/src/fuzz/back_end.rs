//! A back end that says and does what it likes to us, its front end: answers that are bent, cut off or not given, a disk that
//! describes itself as none can be, rings that lie, memory that is written at any time, a back channel that babbles,
//! connections that end and begin again as another disk.
//!
//! It is met in one of two places. [`Machine`] drives the front end itself, rings and messages, call by call. [`Tenant`] uses
//! the `virtio` bdev as a disk on a reactor does, with the keeper on its own thread, so a program may run a little
//! differently each time.
//!
//! Properties: nothing panics, no call and no turn is without end; a request ends once, and not before it was submitted; all
//! that was submitted ends when a good back end comes, or when the bdev gives up; nothing but the payload of a read in flight
//! is ever written, and nothing of it once the read has ended; the keeper goes with its bdev.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use resilver_bdev::{Bdev, Detail, IoKind, Tag};
use resilver_sys::WaitSet;
use resilver_vhost::bdev_virtio::{Virtio, VirtioConfig};
use resilver_vhost::front_end::{Connection, ConnectionConfig, DataBuffer, DriverQueue, Request};
use resilver_vhost::message::backend_notice;
use resilver_vhost::protocol::{backend_request, blk_type, features, flags, protocol_features};

use super::Input;
use crate::driver::Driver;
use crate::fake_back_end::{Face, FakeBackEnd, FakeRequest, FakeRing, Identity, Twist};

/// Steps of one program.
const STEPS: usize = 128;
/// Rings that a front end here uses at most.
const RINGS: usize = 2;
/// How long the front end itself waits for an answer.
const DEADLINE: Duration = Duration::from_millis(50);
/// How long anything may take that ends: more than the 5 s for which a bdev waits for an answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Connections that one program breaks off: each costs a pause.
const LOSSES: usize = 3;
/// After how long without a request the good back end takes it that others have what is in flight; doubled each time.
const QUIET: Duration = Duration::from_millis(20);
/// The bdev's name; its keeper's thread is called after it.
const NAME: &str = "fuzz";

thread_local! {
    static DIRECTORY: tempfile::TempDir = tempfile::tempdir().expect("a directory");
}

/// Of these bits those that are not taken away.
fn choose(all: &[u64], away: u16) -> u64 {
    let kept = |(at, bit): (usize, &u64)| if away >> at & 1 == 0 { *bit } else { 0 };
    all.iter().enumerate().map(kept).fold(0, |bits, bit| bits | bit)
}

/// How a disk describes itself: most of the time as one that can be used.
fn face(input: &mut Input<'_>) -> Face {
    const FEATURES: [u64; 14] = [
        features::RING_PACKED,
        features::RING_INDIRECT_DESC,
        features::RING_EVENT_IDX,
        features::FLUSH,
        features::DISCARD,
        features::WRITE_ZEROES,
        features::SEG_MAX,
        features::SIZE_MAX,
        features::BLK_SIZE,
        features::MQ,
        features::TOPOLOGY,
        features::CONFIG_WCE,
        features::VERSION_1,
        features::PROTOCOL_FEATURES,
    ];
    const PROTOCOL: [u64; 6] = [
        protocol_features::INFLIGHT_SHMFD,
        protocol_features::REPLY_ACK,
        protocol_features::BACKEND_REQ,
        protocol_features::MQ,
        protocol_features::STATUS,
        protocol_features::CONFIG,
    ];
    let (away, protocol_away) = (input.u16(), u16::from(input.u8()));
    let mut face = Face::of_sectors(2048);
    face.features = choose(&FEATURES, away);
    face.protocol = choose(&PROTOCOL, protocol_away);
    if input.u8() == 255 {
        face.features |= features::RO;
    }
    let wild = input.u8() >= 224;
    let mut put = |at: usize, good: &[u32], bad: &[u32]| {
        let value = input.pick(if wild { bad } else { good });
        face.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    const ANY: [u32; 6] = [0, 1, 511, 512, 1 << 31, u32::MAX];
    put(0, &[2048, 2049, 8], &ANY);
    put(4, &[0], &[0, 1, u32::MAX]);
    put(8, &[65536, 4096, 512, 1000, 0], &ANY);
    put(12, &[126, 1, 2, 16], &ANY);
    put(20, &[512, 4096], &ANY);
    put(36, &[64, 8, 1], &ANY);
    put(48, &[64, 8, 1], &ANY);
    put(56, &[0, 1], &ANY);
    let queues = [u64::from(input.u8() % 3), 65535, 65536, u64::MAX];
    face.queues = if wild { input.pick(&queues) } else { 2 };
    face
}

/// What is done with one answer; silence where somebody waits for so long.
fn twist(input: &mut Input<'_>, silence: bool) -> Twist {
    let numbers = [0u64, 1, 2, u64::MAX, 1 << 63, 4096];
    match input.u8() % 9 {
        0 | 1 => Twist::None,
        2 => {
            let (at, length) = (usize::from(input.u8() % 80), usize::from(input.u8() % 16));
            Twist::Patch(at, input.bytes(length).to_vec())
        }
        3 => Twist::Cut(usize::from(input.u8() % 80)),
        4 => Twist::Descriptors(usize::from(input.u8() % 12)),
        5 if silence => Twist::Silence,
        5 | 6 => Twist::Patch(12, input.pick(&numbers).to_ne_bytes().to_vec()),
        7 => Twist::Patch(4, u32::from(input.u8()).to_ne_bytes().to_vec()),
        _ => Twist::Patch(8, input.pick(&numbers).to_ne_bytes()[..4].to_vec()),
    }
}

fn twists(input: &mut Input<'_>, silence: bool) -> Vec<Twist> {
    let Some(count) = usize::from(input.u8()).checked_sub(192) else { return Vec::new() };
    let honest = usize::from(input.u8() % 32);
    let mut twists = vec![Twist::None; honest];
    twists.extend((0..=count % 4).map(|_| twist(input, silence)));
    twists
}

/// The back end.
struct Hostile {
    back_end: FakeBackEnd,
    face: Face,
    /// The rings that it has in hand, and on which connection it got them.
    rings: [Option<(usize, FakeRing)>; RINGS],
    taken: Vec<(usize, FakeRequest)>,
    /// Buffers of requests that it has had, where it may write at any time.
    known: Vec<(u64, u32)>,
    losses: usize,
    /// Answers may be withheld.
    silence: bool,
}

impl Hostile {
    fn listen(input: &mut Input<'_>, silence: bool) -> (Self, PathBuf, bool) {
        let socket = DIRECTORY.with(|directory| directory.path().join("back-end"));
        let _ = std::fs::remove_file(&socket);
        let face = face(input);
        let back_end = FakeBackEnd::listen(&socket, face.clone());
        let twists = twists(input, silence);
        let twisted = !twists.is_empty();
        back_end.twist(twists);
        let (rings, taken, known) = (Default::default(), Vec::new(), Vec::new());
        (Self { back_end, face, rings, taken, known, losses: 0, silence }, socket, twisted)
    }

    /// The ring in hand, if the front end has it served now.
    fn ring(&mut self, index: usize) -> Option<&mut FakeRing> {
        let connection = self.back_end.connections();
        let slot = &mut self.rings[index];
        if slot.as_ref().is_none_or(|(on, _)| *on != connection) {
            let ring = self.back_end.started(connection, index)?;
            *slot = Some((connection, ring));
            self.taken.retain(|(of, _)| *of != index);
        }
        slot.as_mut().map(|(_, ring)| ring)
    }

    /// The front end has stopped a ring, or made it new.
    fn let_go(&mut self, index: usize) {
        self.rings[index] = None;
        self.taken.retain(|(of, _)| *of != index);
    }

    fn lose(&mut self) {
        if self.losses < LOSSES {
            self.losses += 1;
            self.back_end.hang_up();
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let index = usize::from(input.u8()) % RINGS;
        match input.u8() % 16 {
            0..=2 => self.take(index),
            3..=5 => self.complete(input),
            6 => {
                let known = self.taken.first().map_or(3, |(_, request)| u32::from(request.head));
                let any = [known, 0, 1, 15, 16, 511, 512, 0x8000, 0xffff, 0x1_0000, u32::MAX];
                let (id, length) = (input.pick(&any), input.u32());
                if self.may_break(id != known)
                    && let Some(ring) = self.ring(index)
                {
                    ring.use_up(id, length);
                }
            }
            7 => {
                let by = input.pick(&[1u16, 2, 16, 512, 513, 0x8000, 0xffff]);
                if self.may_break(true)
                    && let Some(ring) = self.ring(index)
                {
                    ring.set_used(ring.used().wrapping_add(by));
                }
            }
            8 => {
                let (part, at) = (usize::from(input.u8() % 3), u64::from(input.u16() % 8192));
                let length = usize::from(input.u8() % 32);
                let bytes = input.bytes(length);
                if self.may_break(true)
                    && let Some(ring) = self.ring(index)
                {
                    let _shared = ring.may_write(ring.parts()[part].wrapping_add(at), bytes);
                }
            }
            9 => {
                // Into buffers of requests that it has, or had.
                let bytes = [input.u8(); 700];
                let at = usize::from(input.u8());
                if let Some(&(address, length)) = self.known.get(at % self.known.len().max(1))
                    && let Some(ring) = self.ring(index)
                {
                    let length = (length as usize).min(bytes.len());
                    let _shared = ring.may_write(address, &bytes[..length]);
                }
            }
            10 => {
                if let Some(ring) = self.ring(index) {
                    ring.interrupt();
                }
            }
            11 => self.lose(),
            12 | 13 => self.babble(input),
            14 => {
                let mut face = self.face.clone();
                let at = usize::from(input.u8()) % face.config.len();
                let value = input.pick(&[0u8, 1, 2, 8, 16, 255]);
                match input.u8() % 6 {
                    0 => face.serial[0] ^= value,
                    1 => face.identity = Identity::Fails(value),
                    2 => face.identity = Identity::Lies(u32::from(value)),
                    3 => face.features ^= 1 << (at % 40),
                    _ => face.config[at] = value,
                }
                self.back_end.set_face(face);
            }
            _ => self.back_end.twist(twists(input, self.silence)),
        }
    }

    /// What breaks a ring costs a connection.
    fn may_break(&mut self, breaks: bool) -> bool {
        self.losses += usize::from(breaks);
        !breaks || self.losses <= LOSSES
    }

    fn take(&mut self, index: usize) {
        if let Some(request) = self.ring(index).and_then(FakeRing::take) {
            self.known.extend(&request.data);
            self.taken.push((index, request));
        }
    }

    fn complete(&mut self, input: &mut Input<'_>) {
        let (at, fill) = (usize::from(input.u8()), input.u8());
        let (status, length) = (input.pick(&[0u8, 0, 0, 1, 2, 3, 255]), input.u8());
        if self.taken.is_empty() {
            return;
        }
        let (index, request) = self.taken.remove(at % self.taken.len());
        let Some(ring) = self.ring(index) else { return };
        if matches!(request.kind, blk_type::IN | blk_type::GET_ID) {
            for (address, length) in &request.data {
                let _shared =
                    ring.may_write(*address, &vec![fill; (*length as usize).min(1 << 16)]);
            }
        }
        if status < 255 {
            let _shared = ring.may_write(request.status, &[status]);
        }
        let length = if length == 255 { u32::MAX } else { 1 };
        ring.use_up(u32::from(request.head), length);
    }

    /// Says something on the back channel.
    fn babble(&mut self, input: &mut Input<'_>) {
        let changed = backend_request::CONFIG_CHANGE_MSG;
        let mut bytes = backend_notice(changed).to_vec();
        match input.u8() % 5 {
            0 => {}
            1 => bytes[4] |= flags::NEED_REPLY as u8,
            2 => bytes = bytes.repeat(usize::from(input.u8()) + 1),
            3 => bytes.truncate(usize::from(input.u8()) % 12),
            _ => {
                let length = usize::from(input.u8() % 64);
                bytes = input.bytes(length).to_vec();
            }
        }
        let _taken = self.back_end.say(&bytes);
    }

    /// Is good from now on.
    fn repent(&mut self) {
        self.back_end.behave();
        self.back_end.set_face(self.face.clone());
    }

    /// Completes all that is in the rings, as a good one would; whether that was anything.
    fn serve(&mut self) -> bool {
        let mut served = false;
        for index in 0..RINGS {
            let mut heads: Vec<_> =
                self.taken.extract_if(.., |(of, _)| *of == index).map(|(_, it)| it.head).collect();
            let Some(ring) = self.ring(index) else { continue };
            heads.extend(std::iter::from_fn(|| ring.take_head()).take(1 << 10));
            served |= !heads.is_empty();
            for head in heads {
                ring.use_up(u32::from(head), 1);
            }
        }
        served
    }

    /// Does what no front end can overlook, so that the next one gets everything anew.
    fn ruin(&mut self, wrap: bool) {
        for index in 0..RINGS {
            if let Some(ring) = self.ring(index) {
                ring.ruin(wrap);
            }
        }
    }
}

/// A machine: the front end itself.
struct Machine {
    hostile: Hostile,
    connection: Connection,
    queues: Vec<DriverQueue>,
    /// Requests in flight, by ring.
    flying: Vec<HashSet<u64>>,
    tags: u64,
}

impl Machine {
    fn step(&mut self, input: &mut Input<'_>) {
        let begun = Instant::now();
        let index = usize::from(input.u8()) % self.queues.len();
        let queue = &mut self.queues[index];
        match input.u8() % 24 {
            0..=10 => self.hostile.step(input),
            11..=13 => {
                let offset = u64::from(input.u8()) * 512;
                let length = u64::from(input.u8()) * 512;
                // None asks for the serial: that is answered at once, by a connection of its own.
                let request = match input.u8() % 5 {
                    0 => Request::Read { offset },
                    1 => Request::Write { offset },
                    2 => Request::Flush,
                    3 => Request::Discard { offset, length },
                    _ => Request::WriteZeroes { offset, length, may_unmap: input.flag() },
                };
                let count = usize::from(input.u8() % 4);
                let data: Vec<_> = (0..count)
                    .map(|_| DataBuffer { offset: u64::from(input.u16()), length: 512 })
                    .collect();
                if queue.submit(request, &data, self.tags).is_ok() {
                    self.flying[index].insert(self.tags);
                    self.tags += 1;
                }
            }
            14 => queue.publish(),
            15 | 16 => self.pop(index),
            17 => {
                let _sleep = queue.arm();
                queue.disarm();
            }
            18 => {
                let _described = self.connection.read_config();
            }
            19 => {
                let _changed = self.connection.config_changed();
            }
            20 => {
                if let Ok(base) = self.connection.stop(queue) {
                    self.hostile.let_go(index);
                    let _resumed = self.connection.resume(queue, base);
                }
            }
            21 => {
                let _closed = self.connection.is_closed();
            }
            _ => self.reconnect(),
        }
        assert!(begun.elapsed() < PATIENCE, "a call that does not end");
        for (queue, flying) in self.queues.iter().zip(&self.flying) {
            assert_eq!(usize::from(queue.in_flight()), flying.len(), "requests come and go");
        }
    }

    fn reconnect(&mut self) {
        let _back = self.connection.reconnect(&mut self.queues);
        (0..RINGS).for_each(|index| self.hostile.let_go(index));
    }

    fn pop(&mut self, index: usize) {
        while let Ok(Some(finished)) = self.queues[index].pop() {
            assert!(self.flying[index].remove(&finished.tag), "{finished:?} was not in flight");
        }
    }

    /// A good back end comes, and everything ends.
    fn finish(mut self) {
        self.hostile.repent();
        self.connection.forget_inflight();
        let negotiated = self.connection.format();
        for queue in &mut self.queues {
            queue.publish();
        }
        let Ok(()) = self.connection.reconnect(&mut self.queues) else { return };
        assert_eq!(self.connection.format(), negotiated);
        (0..RINGS).for_each(|index| self.hostile.let_go(index));
        let begun = Instant::now();
        while self.flying.iter().any(|flying| !flying.is_empty()) {
            self.hostile.serve();
            (0..self.queues.len()).for_each(|index| self.pop(index));
            assert!(begun.elapsed() < PATIENCE, "requests do not end: {:?}", self.flying);
        }
    }
}

fn machine(input: &mut Input<'_>) {
    let flags = input.u8();
    let (mut hostile, socket, _) = Hostile::listen(input, true);
    let config = ConnectionConfig {
        queues: 1 + u16::from(flags & 1),
        queue_size: 1 << (input.u8() % 6),
        segments: 1 + u16::from(flags >> 1 & 3),
        data_bytes: 1 << 16,
        inflight: flags & 8 != 0,
        identify: flags & 16 != 0,
        back_channel: flags & 32 != 0,
        deadline: DEADLINE,
        ..ConnectionConfig::default()
    };
    let Ok((connection, queues)) = Connection::connect(&socket, config) else { return };
    // A front end that was not told when its rings began goes on before they have.
    let begun = Instant::now();
    while hostile.ring(0).is_none() && begun.elapsed() < DEADLINE {
        std::thread::yield_now();
    }
    let flying = vec![HashSet::new(); queues.len()];
    let mut machine = Machine { hostile, connection, queues, flying, tags: 0 };
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        machine.step(input);
    }
    machine.finish();
}

/// Payloads of the bdev's user: so many pieces of its memory, each with a gap behind it that is nobody's.
const PIECES: usize = 12;
const PIECE: u32 = 16 << 10;
const GAP: u32 = 4096;

/// Of the memory so much is a driver's.
const MEMORY: usize = PIECES * (PIECE + GAP) as usize;

/// What a piece is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Not at all.
    Idle,
    /// A write in flight reads it.
    Read(Tag),
    /// A read in flight may write so many of its bytes.
    Written(Tag, u32),
}

/// A user of the bdev, as a disk on a reactor is.
struct Tenant {
    hostile: Hostile,
    bdev: Virtio,
    driver: Option<Driver>,
    pieces: [Piece; PIECES],
    /// What the memory holds, but for what reads in flight may write.
    expected: Vec<u8>,
    /// A payload was lent to the bdev since the driver began: before that nobody knows of the memory.
    lent: bool,
    /// Requests in flight without a payload.
    bare: HashSet<Tag>,
}

impl Tenant {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 20 {
            0..=9 => self.hostile.step(input),
            10..=13 => self.submit(input),
            14..=16 => self.turn(),
            17 => {
                if let Some(driver) = &mut self.driver {
                    let (channel, cx) = driver.channel();
                    let _armed = channel.arm(&cx, &mut WaitSet::with_capacity(2));
                    channel.disarm(&cx);
                }
            }
            // The keeper's turn.
            18 => std::thread::sleep(Duration::from_micros(200)),
            _ => {
                self.drop_driver();
                self.open();
            }
        }
    }

    fn detail(&self, name: &str) -> Option<Detail> {
        self.bdev.details().into_iter().find_map(|(known, it)| (known == name).then_some(it))
    }

    fn open(&mut self) {
        if self.detail("free_queues") != Some(Detail::Number(0)) {
            self.driver = Some(Driver::with_memory(&self.bdev, 8, MEMORY));
            if std::mem::take(&mut self.lent) {
                self.expected.fill(0);
            }
        }
    }

    /// What is in flight then is nobody's.
    fn drop_driver(&mut self) {
        self.check();
        self.driver = None;
        self.bare.clear();
        self.pieces = [Piece::Idle; PIECES];
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let (kind, at) = (input.u8() % 6, usize::from(input.u8()) % PIECES);
        let Some(driver) = &mut self.driver else { return };
        let block = u64::from(driver.limits().block_size);
        let (offset, blocks) = (u64::from(input.u8()) * block, u64::from(input.u8()));
        let kinds =
            [IoKind::Read, IoKind::Write, IoKind::Flush, IoKind::Unmap, IoKind::WriteZeroes];
        let kind = kinds[usize::from(kind) % kinds.len()];
        if driver.free(kind) == 0 {
            return;
        }
        if !matches!(kind, IoKind::Read | IoKind::Write) {
            let tag = match kind {
                IoKind::Flush => driver.submit(kind, 0, 0, &[]),
                IoKind::Unmap => driver.submit(kind, offset, blocks * block, &[]),
                _ => driver.submit_zeroes(offset, blocks * block, input.flag()),
            };
            self.bare.insert(tag);
            return;
        }
        if self.pieces[at] != Piece::Idle {
            return;
        }
        let most = u64::from(PIECE.min(driver.limits().max_transfer)) / block;
        let length = (blocks % (most + 1) * block) as u32;
        // In two slices, as guests do.
        let half = length / 2 - length / 2 % 512;
        let from = start(at);
        let payload =
            [driver.slice(from, half), driver.slice(from + u64::from(half), length - half)];
        let payload = if half == 0 { &payload[1..] } else { &payload[..] };
        if kind == IoKind::Write {
            driver.fill(payload, u64::from(input.u8()));
            self.expected[within(at, length)].copy_from_slice(&driver.bytes(payload));
        }
        let tag = driver.submit(kind, offset, u64::from(length), payload);
        self.lent = true;
        self.pieces[at] =
            if kind == IoKind::Write { Piece::Read(tag) } else { Piece::Written(tag, length) };
    }

    fn turn(&mut self) {
        let Some(driver) = &mut self.driver else { return };
        driver.turn();
        for tag in driver.take_results().into_keys() {
            if self.bare.remove(&tag) {
                continue;
            }
            let of = |piece: &Piece| matches!(piece, Piece::Read(it) | Piece::Written(it, _) if *it == tag);
            let at = self.pieces.iter().position(of).expect("what has ended was in flight");
            let now = driver.bytes(&[driver.slice(start(at), PIECE)]);
            if let Piece::Written(_, length) = self.pieces[at] {
                self.expected[within(at, length)].copy_from_slice(&now[..length as usize]);
            }
            assert!(
                now == self.expected[within(at, PIECE)],
                "memory was written that was not read into"
            );
            self.pieces[at] = Piece::Idle;
        }
    }

    /// Whether all memory is as it should be, what is between the payloads too.
    fn check(&self) {
        let Some(driver) = self.driver.as_ref().filter(|_| self.lent) else { return };
        let mut now = driver.bytes(&[driver.slice(0, MEMORY as u32)]);
        for (at, piece) in self.pieces.iter().enumerate() {
            if let Piece::Written(_, length) = piece {
                now[within(at, *length)].copy_from_slice(&self.expected[within(at, *length)]);
            }
        }
        assert!(now == self.expected, "memory was written that nobody reads into");
    }

    /// A good back end comes, or none; everything ends.
    fn finish(mut self) {
        self.hostile.repent();
        let begun = Instant::now();
        let (mut quiet, mut patience, mut wrap) = (Instant::now(), QUIET, true);
        let mut connections = 0;
        while self.driver.as_ref().is_some_and(|driver| driver.in_flight() > 0) {
            self.turn();
            let before = std::mem::replace(&mut connections, self.hostile.back_end.connections());
            if self.hostile.serve() || before != connections {
                quiet = Instant::now();
            } else if quiet.elapsed() > patience {
                // What its predecessors had taken, nobody answers any more.
                self.hostile.ruin(wrap);
                (quiet, wrap) = (Instant::now(), !wrap);
                patience *= 2;
            }
            assert!(begun.elapsed() < PATIENCE, "{:?}", self.bdev.details());
            std::thread::yield_now();
        }
        self.turn();
        assert!(self.bare.is_empty(), "what has ended was not answered");
        self.drop_driver();
        drop(self.bdev);
        drop(self.hostile);
        while keeper_runs() {
            assert!(begun.elapsed() < 2 * PATIENCE, "the keeper outlives its bdev");
            std::thread::yield_now();
        }
    }
}

/// Where a piece begins.
fn start(at: usize) -> u64 {
    at as u64 * u64::from(PIECE + GAP)
}

/// So many bytes of a piece, from where it begins.
fn within(at: usize, length: u32) -> Range<usize> {
    let start = start(at) as usize;
    start..start + length as usize
}

fn keeper_runs() -> bool {
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    let mut tasks = std::fs::read_dir("/proc/self/task").expect("this process").flatten();
    tasks.any(|task| name(task).is_some_and(|name| name.trim() == format!("virtio-{NAME}")))
}

fn tenant(input: &mut Input<'_>) {
    let (hostile, socket, twisted) = Hostile::listen(input, false);
    // One that began with lies may describe itself otherwise for ever.
    let patience = (twisted || input.flag()).then_some(Duration::from_millis(30));
    let config = VirtioConfig {
        name: NAME.to_owned(),
        socket,
        num_queues: None,
        reconnect_timeout: patience,
    };
    let bdev = match Virtio::connect(config) {
        Ok(bdev) => bdev,
        Err(refused) => return assert!(refused.to_string().len() > 20, "{refused}"),
    };
    let mut tenant = Tenant {
        hostile,
        bdev,
        driver: None,
        pieces: [Piece::Idle; PIECES],
        expected: vec![0; MEMORY],
        lent: false,
        bare: HashSet::new(),
    };
    tenant.open();
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        tenant.step(input);
    }
    tenant.finish();
}

/// Runs one program.
pub fn back_end(data: &[u8]) {
    let mut input = Input::new(data);
    if input.flag() { tenant(&mut input) } else { machine(&mut input) }
}
