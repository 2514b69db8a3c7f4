//! The guest: a consumer that asks for anything a driver may ask for, and knows what it may be answered.
//!
//! It overlaps its writes, changes buffers that are in flight, cuts payloads at odd places, resets its device and leaves.
//! Every request must end exactly once, every byte read must be one the oracle allows, and a request may fail only if the
//! disk that serves it has failed one like it (which the world judges, since a guest does not know its disks).
//!
//! A guest reaches its disk in one of two ways: as a consumer of its own, or through a virtqueue that the real vhost
//! session serves. Behind the second it may be disconnected with requests in flight; it submits them again when it is back.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use resilver_bdev::disk::Consumer;
use resilver_bdev::{BdevIo, Completion, IoError, IoKind, IoStats, Limits, Port, Tag};
use resilver_reactor::{Armed, Context, Nanos, Work};
use resilver_sys::mapping::Mapping;
use resilver_sys::{BufferSlice, RegionId, RegionTable, WaitSet};
use resilver_vhost::inflight::InflightMemory;
use resilver_vhost::ring::Format;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::disk::{overlap, sectors_of};
use super::lock;
use super::oracle::{Oracle, Value};
use super::ring::{DriverRing, ENTRIES, RING_BYTES};
use super::rng::Rng;
use super::sector::{SECTOR, Sector, Stamp};
use super::trace::Trace;

/// Bytes of the buffer that each request of a guest has.
const BUFFER: u64 = 64 << 10;
/// What a read's buffer holds before the read: bytes that no disk has.
const POISON: u64 = 0xdead_dead_dead_dead;

/// How a guest reaches its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// It is a consumer of the disk itself.
    Port,
    /// Through a virtqueue and a vhost session. Where requests in flight are tracked, the ring stays as it is when the session
    /// ends, and the next session executes what was in flight; else all is laid out anew and asked again.
    Ring {
        /// Of the virtqueue.
        format: Format,
        /// With an in-flight region.
        tracked: bool,
    },
}

/// How a guest behaves.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// How it reaches its disk.
    pub transport: Transport,
    /// Requests in flight at most.
    pub depth: usize,
    /// How often each kind is asked for, in the order of [`IoKind::ALL`].
    pub weights: [u64; IoKind::ALL.len()],
    /// Polls in a thousand that bring another request.
    pub rate_per_mille: u32,
    /// The longest request, sectors.
    pub longest: u64,
    /// Requests in a thousand that go where the guest goes most.
    pub hot_per_mille: u32,
    /// Where that is.
    pub hot: Range<u64>,
    /// Polls in a thousand in which a buffer in flight is changed.
    pub scribble_per_mille: u32,
    /// Writes in a thousand that hold zeroes only; and sectors of the others.
    pub zero_per_mille: u32,
}

/// The memory in which a ring's requests in flight are tracked.
fn inflight(format: Format) -> InflightMemory {
    let (description, file) = InflightMemory::make(format, 1, ENTRIES).expect("a memory file");
    InflightMemory::map(&description, &file).expect("it maps")
}

/// A request of a scenario.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// What to do.
    pub kind: IoKind,
    /// First sector.
    pub sector: usize,
    /// Sectors.
    pub count: usize,
}

/// How a scenario's request ended.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// Which, counted from 0 as they were asked.
    pub number: usize,
    /// When it was submitted.
    pub submitted: Nanos,
    /// When it ended.
    pub ended: Nanos,
    /// How.
    pub result: Result<(), IoError>,
}

/// A request that failed.
#[derive(Debug, Clone, Copy)]
pub struct Failure {
    /// When it was submitted.
    pub since: Nanos,
    /// What it was.
    pub io: BdevIo,
    /// Why it failed.
    pub error: IoError,
}

/// How requests reach the disk.
trait Way {
    /// What may be asked.
    fn limits(&self) -> Limits;

    /// Whether another request of this kind may be sent now.
    fn has_room(&self, kind: IoKind) -> bool;

    /// Sends a request whose tag is its slot.
    fn send(&mut self, cx: &Context<'_>, io: BdevIo, slices: &[BufferSlice]);
}

impl Way for Port<'_> {
    fn limits(&self) -> Limits {
        *Port::limits(self)
    }

    fn has_room(&self, kind: IoKind) -> bool {
        self.free(kind) > 0
    }

    fn send(&mut self, cx: &Context<'_>, io: BdevIo, slices: &[BufferSlice]) {
        self.submit(cx, io, slices);
    }
}

/// A virtqueue as a way to the disk.
struct RingWay<'a> {
    ring: &'a mut DriverRing,
    limits: Limits,
    rng: &'a mut Rng,
}

impl Way for RingWay<'_> {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn has_room(&self, kind: IoKind) -> bool {
        let _ = kind;
        self.ring.has_room()
    }

    fn send(&mut self, cx: &Context<'_>, io: BdevIo, slices: &[BufferSlice]) {
        let _ = cx;
        self.ring.submit(io.tag.0 as usize, &io, slices, self.rng);
    }
}

/// The driver's side of a virtqueue.
struct Driver {
    /// What the guest's memory is made of.
    file: Arc<OwnedFd>,
    /// None while no session serves it, but for a ring that is tracked.
    ring: Option<DriverRing>,
    format: Format,
    /// What the front end keeps.
    inflight: Option<InflightMemory>,
    /// What the device told at its start.
    limits: Limits,
    rng: Rng,
}

#[derive(Debug)]
struct Request {
    io: BdevIo,
    slices: Vec<BufferSlice>,
    /// The oracle's name for a write.
    write: u32,
    /// The oracle's name for the moment of submission of a read or a flush.
    begun: u64,
    since: Nanos,
    /// The scenario's number for it.
    number: Option<usize>,
}

struct State {
    name: String,
    options: GuestOptions,
    /// Whether it asks for anything by itself.
    active: bool,
    rng: Rng,
    oracle: Arc<Mutex<Oracle>>,
    trace: Trace,
    mapping: Arc<Mapping>,
    region: RegionId,
    driver: Option<Driver>,
    requests: Vec<Option<Request>>,
    asked: usize,
    asks: VecDeque<(usize, Ask)>,
    answers: Vec<Answer>,
    failures: Vec<Failure>,
    reset: bool,
    ended: u64,
}

/// A guest; clones are the same guest. One clone is given to the disk as a consumer, another stays with the world.
#[derive(Clone)]
pub struct SimGuest(Arc<Mutex<State>>);

impl SimGuest {
    /// A guest whose buffers lie in memory of its own. `limits` are what its device tells it.
    ///
    /// # Panics
    /// The host has no memory.
    #[must_use]
    pub fn new(
        name: &str,
        options: GuestOptions,
        limits: &Limits,
        oracle: &Arc<Mutex<Oracle>>,
        mut rng: Rng,
        trace: &Trace,
    ) -> Self {
        let bytes = options.depth as u64 * BUFFER + RING_BYTES as u64;
        let file = memfd_create(name, MemfdFlags::CLOEXEC).expect("a memory file");
        ftruncate(&file, bytes).expect("a memory file's size");
        let mapping = Mapping::shared(file.as_fd(), 0, bytes).expect("memory for a guest");
        let driver = |format, tracked: bool| Driver {
            file: Arc::new(file),
            ring: None,
            format,
            inflight: tracked.then(|| inflight(format)),
            limits: *limits,
            rng: rng.fork(),
        };
        let driver = match options.transport {
            Transport::Port => None,
            Transport::Ring { format, tracked } => Some(driver(format, tracked)),
        };
        Self(Arc::new(Mutex::new(State {
            name: name.to_owned(),
            active: true,
            rng,
            oracle: Arc::clone(oracle),
            trace: trace.clone(),
            mapping,
            region: RegionId::NONE,
            driver,
            requests: (0..options.depth).map(|_| None).collect(),
            options,
            asked: 0,
            asks: VecDeque::new(),
            answers: Vec::new(),
            failures: Vec::new(),
            reset: false,
            ended: 0,
        })))
    }

    /// How it reaches its disk.
    #[must_use]
    pub fn transport(&self) -> Transport {
        lock(&self.0).options.transport
    }

    /// The file that its memory is, and its size.
    ///
    /// # Panics
    /// The guest has no virtqueue.
    #[must_use]
    pub fn memory_file(&self) -> (Arc<OwnedFd>, u64) {
        let state = lock(&self.0);
        let driver = state.driver.as_ref().expect("a guest with a virtqueue");
        (Arc::clone(&driver.file), state.mapping.len() as u64)
    }

    /// What its front end keeps of requests in flight.
    #[must_use]
    pub fn inflight(&self) -> Option<InflightMemory> {
        lock(&self.0).driver.as_ref()?.inflight.clone()
    }

    /// Where its ring lies: descriptors, available, used.
    ///
    /// # Panics
    /// No session is up.
    #[must_use]
    pub fn ring_addresses(&self) -> [u64; 3] {
        let state = lock(&self.0);
        let driver = state.driver.as_ref().expect("a guest with a virtqueue");
        driver.ring.as_ref().expect("a ring").addresses()
    }

    /// A session begins: the ring is laid out anew, and what was in flight when the last one ended is submitted again.
    pub fn plug(&self, memory: &RegionTable) {
        let mut state = lock(&self.0);
        let state = &mut *state;
        let Some(driver) = &mut state.driver else { return };
        if state.region == RegionId::NONE {
            let mapping = Arc::clone(&state.mapping);
            state.region = memory.insert(mapping).expect("room in the region table");
        }
        if driver.ring.is_some() {
            // What was in flight is in the in-flight region.
            return;
        }
        let at = state.options.depth as u64 * BUFFER;
        let mut ring = DriverRing::new(&state.mapping, at, driver.format);
        for (slot, request) in state.requests.iter_mut().enumerate() {
            let Some(request) = request else { continue };
            request.slices.iter_mut().for_each(|slice| slice.region = state.region);
            state.trace.line(format_args!("{}.{slot} asks again", state.name));
            ring.submit(slot, &request.io, &request.slices, &mut driver.rng);
        }
        driver.ring = Some(ring);
    }

    /// The session is gone, and with it the ring.
    pub fn unplug(&self) {
        if let Some(driver) = &mut lock(&self.0).driver
            && driver.inflight.is_none()
        {
            driver.ring = None;
        }
    }

    /// A turn of the driver: takes what has ended, asks for more.
    pub fn drive(&self, cx: &Context<'_>) {
        let mut state = lock(&self.0);
        let state = &mut *state;
        let Some(mut driver) = state.driver.take() else { return };
        if let Some(ring) = &mut driver.ring {
            loop {
                match ring.pop() {
                    Ok(Some(completion)) => state.end(cx, completion),
                    Ok(None) => break,
                    Err(wrong) => {
                        state.trace.finding(wrong);
                        break;
                    }
                }
            }
            let (limits, rng) = (driver.limits, &mut driver.rng);
            state.act(cx, &mut RingWay { ring, limits, rng });
        }
        state.driver = Some(driver);
    }

    /// Lets it ask by itself, or only what a scenario asks.
    pub fn set_active(&self, active: bool) {
        lock(&self.0).active = active;
    }

    /// Asks for one thing; the result is the number that its answer carries.
    pub fn ask(&self, ask: Ask) -> usize {
        let mut state = lock(&self.0);
        let number = state.asked;
        state.asked += 1;
        state.asks.push_back((number, ask));
        number
    }

    /// The answer to what was asked under this number, once there is one.
    #[must_use]
    pub fn answer(&self, number: usize) -> Option<Answer> {
        lock(&self.0).answers.iter().find(|answer| answer.number == number).copied()
    }

    /// Resets the device at the next poll.
    pub fn reset(&self) {
        lock(&self.0).reset = true;
    }

    /// Requests in flight or not yet submitted.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        let state = lock(&self.0);
        state.requests.iter().flatten().count() + state.asks.len()
    }

    /// Requests that have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        lock(&self.0).ended
    }

    /// Whether a request that changes one of the sectors is in flight.
    #[must_use]
    pub fn changing(&self, sectors: &Range<usize>) -> bool {
        let state = lock(&self.0);
        let mut requests = state.requests.iter().flatten();
        requests
            .any(|request| request.io.kind.mutates() && overlap(&sectors_of(&request.io), sectors))
    }

    /// The failed requests since the last question.
    #[must_use]
    pub fn take_failures(&self) -> Vec<Failure> {
        std::mem::take(&mut lock(&self.0).failures)
    }
}

impl State {
    /// Something to ask for, within what the disk accepts.
    fn invent(&mut self, limits: &Limits) -> Ask {
        let total: u64 = self.options.weights.iter().sum();
        let mut at = self.rng.below(total);
        let mut kind = IoKind::Read;
        for (candidate, weight) in IoKind::ALL.into_iter().zip(self.options.weights) {
            if at < weight {
                kind = candidate;
                break;
            }
            at -= weight;
        }
        let block = u64::from(limits.block_size) / SECTOR as u64;
        let longest = (self.longest(limits, kind) / SECTOR as u64 / block).max(1);
        let longest = longest.min((self.options.longest / block).max(1));
        let count = self.rng.between(1, longest).min(limits.num_blocks);
        let hot = self.rng.chance(self.options.hot_per_mille);
        let Range { start, end } =
            if hot { self.options.hot.clone() } else { 0..limits.num_blocks * block };
        let first = self.rng.between(start / block, (end / block).max(1) - 1);
        let first = first.min(limits.num_blocks - count);
        Ask { kind, sector: (first * block) as usize, count: (count * block) as usize }
    }

    /// The longest request of a kind, bytes.
    fn longest(&self, limits: &Limits, kind: IoKind) -> u64 {
        match kind {
            IoKind::Read | IoKind::Write => u64::from(limits.max_transfer).min(BUFFER),
            IoKind::Unmap | IoKind::WriteZeroes => limits.max_unmap,
            IoKind::Flush => 0,
        }
    }

    /// The buffer of a slot, cut in pieces at odd places.
    fn slices(&mut self, slot: usize, length: u64, limits: &Limits) -> Vec<BufferSlice> {
        let start = slot as u64 * BUFFER;
        let pieces = self.rng.between(1, u64::from(limits.max_segments).min(4));
        let mut cuts: Vec<u64> = (1..pieces).map(|_| self.rng.between(1, length - 1)).collect();
        cuts.extend([0, length]);
        cuts.sort_unstable();
        cuts.dedup();
        let slice = |pair: &[u64]| BufferSlice {
            region: self.region,
            length: (pair[1] - pair[0]) as u32,
            offset: start + pair[0],
        };
        cuts.windows(2).map(slice).collect()
    }

    fn submit(
        &mut self,
        cx: &Context<'_>,
        way: &mut dyn Way,
        slot: usize,
        ask: Ask,
        number: Option<usize>,
    ) {
        let Ask { kind, sector, count } = ask;
        let (offset, length) = match kind {
            IoKind::Flush => (0, 0),
            _ => ((sector * SECTOR) as u64, (count * SECTOR) as u64),
        };
        let may_unmap = kind == IoKind::WriteZeroes && self.rng.chance(500);
        let io = BdevIo { tag: Tag(slot as u32), kind, may_unmap, offset, length };
        let limits = way.limits();
        let slices = if kind.has_payload() { self.slices(slot, length, &limits) } else { vec![] };
        let mut request =
            Request { io, slices: slices.clone(), write: 0, begun: 0, since: cx.now, number };
        let sectors = sector..sector + count;
        match kind {
            IoKind::Read => {
                request.begun = lock(&self.oracle).begin_read();
                self.fill(cx, slot, &vec![POISON; count]);
            }
            IoKind::Write => {
                let words = self.payload(sector, count, &mut request);
                self.fill(cx, slot, &words);
                lock(&self.oracle).begin(request.write, sectors, |at| match words[at - sector] {
                    0 => Value::Zero,
                    _ => Value::Stamped { versions: 1, zero: false },
                });
            }
            IoKind::Flush => request.begun = lock(&self.oracle).begin_flush(),
            IoKind::Unmap | IoKind::WriteZeroes => {
                let value = if kind == IoKind::Unmap { Value::Any } else { Value::Zero };
                let mut oracle = lock(&self.oracle);
                request.write = oracle.next_write();
                oracle.begin(request.write, sectors, |_| value.clone());
            }
        }
        let (name, write) = (&self.name, request.write);
        self.trace
            .line(format_args!("{name}.{slot} asks {} {offset}+{length} w{write}", kind.name()));
        self.requests[slot] = Some(request);
        way.send(cx, io, &slices);
    }

    /// Changes buffers and asks for more, as the seed or the scenario says.
    fn act(&mut self, cx: &Context<'_>, way: &mut dyn Way) -> Work {
        let scribble = self.options.scribble_per_mille;
        if self.rng.chance(scribble) {
            self.scribble(cx);
        }
        let mut submitted = 0;
        let rate = self.options.rate_per_mille;
        while let Some(slot) = self.requests.iter().position(Option::is_none) {
            let (ask, number) = if let Some((number, ask)) = self.asks.front() {
                (*ask, Some(*number))
            } else if self.active && self.rng.chance(rate) {
                (self.invent(&way.limits()), None)
            } else {
                break;
            };
            if !way.has_room(ask.kind) {
                break;
            }
            if number.is_some() {
                self.asks.pop_front();
            }
            self.submit(cx, way, slot, ask, number);
            submitted += 1;
        }
        Work::from_count(submitted)
    }

    /// The words of a write's sectors.
    fn payload(&mut self, sector: usize, count: usize, request: &mut Request) -> Vec<u64> {
        let write = lock(&self.oracle).next_write();
        request.write = write;
        let all_zero = self.rng.chance(self.options.zero_per_mille);
        let word = |at: usize| Stamp { write, sector: (sector + at) as u16, version: 0 }.word();
        (0..count)
            .map(|at| {
                let zero = all_zero || self.rng.chance(self.options.zero_per_mille);
                if zero { 0 } else { word(at) }
            })
            .collect()
    }

    fn fill(&self, cx: &Context<'_>, slot: usize, words: &[u64]) {
        for (at, word) in words.iter().enumerate() {
            self.put(cx, slot, at * SECTOR, Sector::filled(*word).bytes());
        }
    }

    /// Writes into the buffer of a slot.
    fn put(&self, cx: &Context<'_>, slot: usize, at: usize, bytes: &[u8]) {
        let offset = slot as u64 * BUFFER + at as u64;
        let slice = BufferSlice { region: self.region, length: bytes.len() as u32, offset };
        cx.memory.write(slice, bytes).expect("a guest's own memory");
    }

    /// The sectors in the buffer of a slot.
    fn contents(&self, cx: &Context<'_>, slot: usize, count: usize) -> Vec<Sector> {
        let mut bytes = vec![0; count * SECTOR];
        let slice = BufferSlice {
            region: self.region,
            length: bytes.len() as u32,
            offset: slot as u64 * BUFFER,
        };
        cx.memory.read(slice, &mut bytes).expect("a guest's own memory");
        bytes.chunks_exact(SECTOR).map(Sector::of_bytes).collect()
    }

    /// Changes one sector, or half of one, of a buffer that is being written.
    fn scribble(&mut self, cx: &Context<'_>) {
        let writing = |(_, request): &(usize, &Option<Request>)| {
            request.as_ref().is_some_and(|request| request.io.kind == IoKind::Write)
        };
        let slots: Vec<usize> =
            self.requests.iter().enumerate().filter(writing).map(|(slot, _)| slot).collect();
        if slots.is_empty() {
            return;
        }
        let slot = self.rng.pick(&slots);
        let Some(request) = &self.requests[slot] else { return };
        let sectors = sectors_of(&request.io);
        let at = self.rng.below(sectors.len() as u64) as usize;
        let Some(stamp) = lock(&self.oracle).scribble(request.write, sectors.start + at) else {
            return;
        };
        let length = self.rng.pick(&[SECTOR, SECTOR / 2]);
        self.put(cx, slot, at * SECTOR, &Sector::filled(stamp.word()).bytes()[..length]);
    }

    fn end(&mut self, cx: &Context<'_>, completion: Completion) {
        let slot = completion.tag.0 as usize;
        let request = self.requests.get_mut(slot).and_then(Option::take);
        let Some(Request { io, write, begun, since, number, .. }) = request else {
            let name = &self.name;
            self.trace.finding(format_args!("{name}.{slot} ended twice, or was never asked"));
            return;
        };
        let result = completion.result;
        self.trace.line(format_args!("{}.{slot} ends {result:?}", self.name));
        self.ended += 1;
        if let Err(error) = result {
            self.failures.push(Failure { since, io, error });
        }
        if let Some(number) = number {
            self.answers.push(Answer { number, submitted: since, ended: cx.now, result });
        }
        let sectors = sectors_of(&io);
        let judged = match io.kind {
            IoKind::Read => {
                let content = result.is_ok().then(|| self.contents(cx, slot, sectors.len()));
                lock(&self.oracle).end_read(begun, sectors.start, content.as_deref())
            }
            IoKind::Flush => {
                if result.is_ok() {
                    lock(&self.oracle).end_flush(begun);
                }
                Ok(())
            }
            IoKind::Write | IoKind::Unmap | IoKind::WriteZeroes => {
                lock(&self.oracle).end(write, sectors, result.is_ok());
                Ok(())
            }
        };
        if let Err(wrong) = judged {
            self.trace.finding(format_args!("{}.{slot} read wrong data: {wrong}", self.name));
        }
    }
}

impl Consumer for SimGuest {
    fn poll(&mut self, cx: &Context<'_>, port: &mut Port<'_>) -> Work {
        let mut state = lock(&self.0);
        let state = &mut *state;
        if std::mem::take(&mut state.reset) {
            port.guest_reset();
        }
        state.act(cx, port)
    }

    fn complete(&mut self, cx: &Context<'_>, completion: Completion, stats: &IoStats) {
        let mut state = lock(&self.0);
        let slot = completion.tag.0 as usize;
        if let Some(Some(request)) = state.requests.get(slot) {
            let (io, latency) = (request.io, cx.now - request.since);
            stats.record(io.kind, io.length, latency, completion.result.is_ok());
        }
        state.end(cx, completion);
    }

    fn publish(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }

    fn in_flight(&self) -> u32 {
        lock(&self.0).requests.iter().flatten().count() as u32
    }

    fn attach(&mut self, cx: &Context<'_>) {
        let mut state = lock(&self.0);
        let mapping = Arc::clone(&state.mapping);
        state.region = cx.memory.insert(mapping).expect("room in the region table");
    }

    fn detach(&mut self, cx: &Context<'_>) {
        let state = lock(&self.0);
        if state.requests.iter().flatten().count() > 0 {
            let name = &state.name;
            state.trace.finding(format_args!("{name} was detached with requests in flight"));
        }
        cx.memory.remove(state.region);
    }

    fn arm(&mut self, cx: &Context<'_>, set: &mut WaitSet) -> Armed {
        let _ = (cx, set);
        Armed::Until(None)
    }

    fn disarm(&mut self, cx: &Context<'_>) {
        let _ = cx;
    }
}
