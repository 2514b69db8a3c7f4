//! A guest that arrives by post-copy migration, and its monitor: its rings are full of requests, and its memory comes page by page,
//! when somebody waits for it.
//!
//! The guest's memory is two files. In `source` everything is as the guest left it; `destination` is shared with the target and
//! begins as holes. The monitor's pager takes faults from the userfaultfd that the target gave it and brings each page after a
//! while, or never, as the test says. What the target wrote is carried back afterwards, so that the guest may move again.
//!
//! The rings are the simulator's: written by a driver that shares no code with the device.

use std::collections::BTreeSet;
use std::io::{IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use resilver_bdev::{BdevIo, Completion};
use resilver_sys::{BufferSlice, Mapping, RegionTable, Userfault};
use resilver_vhost::message::{
    FdPresence, Header, Message, RegionDescription, Reply, RingAddresses,
};
use resilver_vhost::protocol::{HEADER_BYTES, features, flags};
use resilver_vhost::ring::Format;
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::raw_guest::{memory_file, send};
use crate::served::PATIENCE;
use crate::sim::lock;
use crate::sim::ring::{DriverRing, ENTRIES, GUEST_BASE, RING_BYTES, SLOTS};
use crate::sim::rng::Rng;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;
/// Bytes of a request's buffer.
pub const BUFFER: u64 = 5 * PAGE;
/// Bytes of memory that a ring and its buffers take.
const SHARE: u64 = (RING_BYTES as u64).next_multiple_of(PAGE) + SLOTS as u64 * BUFFER;
/// A ring that nobody has used: split, and packed both ways.
const FRESH: [u32; 2] = [0, 0x8000_8000];

/// How pages come.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    /// The longest that one takes, microseconds.
    pub most_us: u64,
    /// Pages that do not come until the pager is told otherwise.
    pub withheld: BTreeSet<u64>,
}

/// A memory file of huge pages.
fn huge_file(size: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("guest", flags).expect("a memfd");
    ftruncate(&file, size.next_multiple_of(HUGE_PAGE)).expect("memory");
    file
}

/// What the monitor's threads share.
struct Shared {
    source: OwnedFd,
    destination: OwnedFd,
    /// The destination, mapped.
    mapping: Arc<Mapping>,
    /// Bytes of the pages that come.
    page: u64,
    /// Pages that were brought. Held while one is, so that half a page is never carried back.
    placed: Mutex<BTreeSet<u64>>,
    pace: Mutex<Pace>,
    /// Faults that were taken.
    faults: AtomicU64,
    /// A page was there before it was brought: the target has filled a hole.
    filled: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    /// Whether the file has a page. hugetlbfs does not say.
    fn has(&self, page: u64) -> bool {
        let at = page * PAGE;
        self.page == PAGE && seek(&self.destination, SeekFrom::Data(at)).is_ok_and(|it| it == at)
    }

    /// Brings a page, if it has not come.
    ///
    /// A page of a memfd is written by a system call, which shows it to the target when it is whole, as UFFDIO_COPY does. Written
    /// through a mapping it is there as zeros first, and what the target puts into it is overwritten. hugetlbfs takes no writes.
    fn place(&self, page: u64) {
        let mut placed = lock(&self.placed);
        if placed.insert(page) {
            self.filled.fetch_or(self.has(page), Ordering::Relaxed);
            let mut bytes = vec![0; usize::try_from(self.page).expect("a page")];
            let at = page * self.page;
            let length = rustix::io::pread(&self.source, &mut bytes, at).expect("the source");
            if self.page == PAGE {
                let wrote = rustix::io::pwrite(&self.destination, &bytes[..length], at);
                assert_eq!(wrote.expect("the destination"), length);
                return;
            }
            let table = RegionTable::with_capacity(1);
            let region = table.insert(Arc::clone(&self.mapping)).expect("room for a region");
            let to =
                BufferSlice { region, length: u32::try_from(length).expect("a page"), offset: at };
            table.write(to, &bytes[..length]).expect("the destination");
        }
    }
}

/// Serves faults until told to stop: `base` is where the target counts them from.
fn serve(shared: &Shared, faults: &Userfault, base: u64, mut rng: Rng) {
    let mut waiting = BTreeSet::new();
    while !shared.stop.load(Ordering::Acquire) {
        while let Some(address) = faults.next_fault() {
            shared.faults.fetch_add(1, Ordering::Relaxed);
            waiting.insert((address - base) / shared.page);
        }
        let pace = lock(&shared.pace).clone();
        let next = waiting.iter().copied().find(|page| !pace.withheld.contains(page));
        let Some(page) = next else {
            std::thread::sleep(Duration::from_micros(100));
            continue;
        };
        std::thread::sleep(Duration::from_micros(rng.below(pace.most_us + 1)));
        shared.place(page);
        waiting.remove(&page);
        // An error: the target has gone.
        let _ = faults.wake(base + page * shared.page, shared.page);
    }
}

/// A guest between two hosts.
pub struct ArrivingGuest {
    format: Format,
    source: OwnedFd,
    memory: Arc<Mapping>,
    rings: Vec<DriverRing>,
    bases: Vec<u32>,
    /// Bytes of the destination's pages.
    page: u64,
    rng: Rng,
}

impl ArrivingGuest {
    /// One with so many rings, all empty.
    ///
    /// # Panics
    /// If there is no memory to be had; as everything here, because it is a test's.
    #[must_use]
    pub fn new(format: Format, queues: u16, seed: u64) -> Self {
        let size = SHARE * u64::from(queues);
        let source = memory_file(size);
        let memory = Mapping::shared(source.as_fd(), 0, size).expect("guest memory");
        let ring = |queue: u16| DriverRing::new(&memory, u64::from(queue) * SHARE, format);
        let rings = (0..queues).map(ring).collect();
        let fresh = FRESH[usize::from(format == Format::Packed)];
        let bases = vec![fresh; usize::from(queues)];
        Self { format, source, memory, rings, bases, page: PAGE, rng: Rng::new(seed) }
    }

    /// The same, and where it arrives its memory is of huge pages of 2 MiB, which come whole.
    #[must_use]
    pub fn in_huge_pages(self) -> Self {
        Self { page: HUGE_PAGE, ..self }
    }

    /// Where a ring begins in guest memory, bytes.
    #[must_use]
    pub fn ring(queue: usize) -> u64 {
        queue as u64 * SHARE
    }

    /// Where the buffer of a slot is.
    #[must_use]
    pub fn buffer(queue: usize, slot: usize) -> u64 {
        Self::ring(queue) + (RING_BYTES as u64).next_multiple_of(PAGE) + slot as u64 * BUFFER
    }

    /// Bytes of guest memory.
    ///
    /// # Panics
    /// If they cannot be read.
    #[must_use]
    pub fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        assert_eq!(rustix::io::pread(&self.source, &mut bytes, at).expect("memory"), length);
        bytes
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.source, bytes, at).expect("memory"), bytes.len());
    }

    /// Makes a request available whose data is the slot's buffer.
    pub fn offer(&mut self, queue: usize, slot: usize, io: &BdevIo) {
        // The ring wants slices and names no region.
        let table = RegionTable::with_capacity(1);
        let region = table.insert(Arc::clone(&self.memory)).expect("room for a region");
        let cut = self.rng.between(1, io.length - 1);
        let at = Self::buffer(queue, slot);
        let piece = |offset: u64, length: u64| BufferSlice {
            region,
            length: u32::try_from(length).expect("a short buffer"),
            offset: at + offset,
        };
        let slices = [piece(0, cut), piece(cut, io.length - cut)];
        self.rings[queue].submit(slot, io, &slices, &mut self.rng);
    }

    /// The next request of a ring that has ended.
    ///
    /// # Panics
    /// If the device did something wrong.
    pub fn ended(&mut self, queue: usize) -> Option<Completion> {
        self.rings[queue].pop().expect("a device that keeps to the rules")
    }

    /// It arrives at the target behind `socket`. Its rings start there as its pages come.
    #[must_use]
    pub fn arrive(&mut self, socket: &Path, pace: Pace) -> Arrival {
        let size = self.memory.len() as u64;
        let monitor = Monitor::connect(socket);
        monitor.negotiate(self.format);
        let faults = Userfault::from_fd(monitor.advise());
        monitor.tell(&Message::PostcopyListen, &[]);
        let destination = if self.page == PAGE { memory_file(size) } else { huge_file(size) };
        let mapping = Mapping::shared(destination.as_fd(), 0, size).expect("guest memory");
        let shared = Arc::new(Shared {
            mapping,
            page: self.page,
            source: self.source.try_clone().expect("a descriptor"),
            destination,
            placed: Mutex::default(),
            pace: Mutex::new(pace),
            faults: AtomicU64::new(0),
            filled: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let region = RegionDescription {
            guest_address: GUEST_BASE,
            size,
            user_address: GUEST_BASE,
            file_offset: 0,
        };
        let base = monitor.share(&region, shared.destination.as_fd());
        let its = Arc::clone(&shared);
        let rng = Rng::new(self.rng.draw());
        let pager = std::thread::spawn(move || serve(&its, &faults, base, rng));
        let arrival = Arrival { monitor, shared, pager: Some(pager), queues: self.rings.len() };
        for (queue, ring) in self.rings.iter().enumerate() {
            arrival.start(queue, ring.addresses(), self.bases[queue]);
        }
        arrival
    }

    /// Carries back what the target has written: to the source, which is then as the guest would find its memory.
    ///
    /// # Panics
    /// If the files cannot be read or written, or the target has filled a hole.
    pub fn see(&self, arrival: &Arrival) {
        let placed = lock(&arrival.shared.placed);
        assert!(!arrival.shared.filled.load(Ordering::Relaxed), "the target has filled a hole");
        let mut bytes = vec![0; usize::try_from(self.page).expect("a page")];
        for page in placed.iter() {
            let (from, at) = (&arrival.shared.destination, page * self.page);
            rustix::io::pread(from, &mut bytes, at).expect("the destination");
            let end = usize::try_from(self.memory.len() as u64 - at).expect("64 bits");
            self.put(at, &bytes[..bytes.len().min(end)]);
        }
    }

    /// Its rings stop where they stand, and it may go on elsewhere.
    ///
    /// # Panics
    /// If they do not.
    pub fn leave(&mut self, arrival: Arrival) {
        for (queue, base) in self.bases.iter_mut().enumerate() {
            *base = arrival.stop(queue);
        }
        self.see(&arrival);
    }
}

/// The monitor's connection.
pub struct Monitor(UnixStream);

impl Monitor {
    /// Connects.
    ///
    /// # Panics
    /// If nobody listens; as everything here, because it is a test's.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("somebody listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        Self(stream)
    }

    /// Says something, and with these flags.
    ///
    /// # Panics
    /// If nobody is there to hear it.
    pub fn say(&self, message: &Message, flags: u32, fds: &[BorrowedFd<'_>]) {
        send(&self.0, &message.encode(flags), fds).expect("the target listens");
    }

    /// The next answer, and the descriptor beside it. None if the connection was closed.
    ///
    /// # Panics
    /// If it is no answer.
    #[must_use]
    pub fn answer(&self) -> (Option<Reply>, Option<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; HEADER_BYTES];
        let mut into = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let came = rustix::net::recvmsg(&self.0, &mut into, &mut control, flags);
        if came.map_or(0, |came| came.bytes) < HEADER_BYTES {
            return (None, None);
        }
        let fd = control.drain().find_map(|it| match it {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let header = Header::decode(&bytes).expect("a header");
        let mut body = vec![0; header.size as usize];
        (&self.0).read_exact(&mut body).expect("a body");
        (Reply::decode(header.request, &body).ok(), fd)
    }

    /// Says something and waits for the answer.
    ///
    /// # Panics
    /// If nobody is there to hear it.
    #[must_use]
    pub fn ask(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Option<Reply> {
        self.say(message, flags::NEED_REPLY, fds);
        self.answer().0
    }

    /// Says something and insists that it is done.
    ///
    /// # Panics
    /// If it is refused.
    pub fn tell(&self, message: &Message, fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(message, fds), Some(Reply::U64(0)), "{message:?}");
    }

    /// Agrees on all protocol features, and on rings of this format.
    ///
    /// # Panics
    /// If something is refused.
    pub fn negotiate(&self, format: Format) {
        self.say(&Message::SetOwner, 0, &[]);
        let offered = self.ask(&Message::GetProtocolFeatures, &[]);
        let Some(Reply::U64(offered)) = offered else { panic!("no features: {offered:?}") };
        self.say(&Message::SetProtocolFeatures(offered), 0, &[]);
        let packed = if format == Format::Packed { features::RING_PACKED } else { 0 };
        let wanted = features::VERSION_1
            | features::PROTOCOL_FEATURES
            | features::RING_INDIRECT_DESC
            | features::FLUSH;
        self.tell(&Message::SetFeatures(wanted | packed), &[]);
    }

    /// POSTCOPY_ADVISE; the descriptor that is the answer.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn advise(&self) -> OwnedFd {
        self.say(&Message::PostcopyAdvise, 0, &[]);
        let (reply, fd) = self.answer();
        assert_eq!(reply, Some(Reply::Empty));
        fd.expect("a userfaultfd")
    }

    /// Shares memory as QEMU does in post-copy; answers where the target counts its faults from.
    fn share(&self, region: &RegionDescription, fd: BorrowedFd<'_>) -> u64 {
        self.say(&Message::SetMemTable(vec![*region]), 0, &[fd]);
        let Some(Reply::MemTable(told)) = self.answer().0 else { panic!("no table") };
        let [base] = told.as_slice() else { panic!("another table: {told:?}") };
        let expected = RegionDescription { user_address: base.user_address, ..*region };
        assert_eq!((*base, base.user_address % PAGE), (expected, 0));
        self.say(&Message::SetMemTable(vec![]), 0, &[]);
        base.user_address
    }
}

/// A guest that is arriving. Dropped, its monitor dies.
pub struct Arrival {
    monitor: Monitor,
    shared: Arc<Shared>,
    pager: Option<JoinHandle<()>>,
    queues: usize,
}

impl Arrival {
    fn start(&self, queue: usize, [descriptors, available, used]: [u64; 3], base: u32) {
        let index = u32::try_from(queue).expect("few queues");
        let addresses = RingAddresses { flags: 0, descriptors, used, available, log: 0 };
        // Nobody waits for an answer: a ring starts when its pages have come.
        for message in [
            Message::SetVringNum { index, num: u32::from(ENTRIES) },
            Message::SetVringBase { index, base },
            Message::SetVringAddr { index, addresses },
            Message::SetVringKick { index, fd: FdPresence::Absent },
            Message::SetVringEnable { index, enable: 1 },
        ] {
            self.monitor.say(&message, 0, &[]);
        }
    }

    /// GET_VRING_BASE.
    ///
    /// # Panics
    /// If it is not answered.
    #[must_use]
    pub fn stop(&self, queue: usize) -> u32 {
        let index = u32::try_from(queue).expect("few queues");
        match self.monitor.ask(&Message::GetVringBase { index }, &[]) {
            Some(Reply::Vring { base, .. }) => base,
            other => panic!("GET_VRING_BASE is answered with {other:?}"),
        }
    }

    /// Says something that is answered with zero.
    ///
    /// # Panics
    /// If it is not.
    pub fn tell(&self, message: &Message) {
        self.monitor.tell(message, &[]);
    }

    /// Changes how pages come.
    pub fn set_pace(&self, pace: Pace) {
        *lock(&self.shared.pace) = pace;
    }

    /// Faults that the target has had.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }

    /// The monitor dies: no fault is served any more, and the connection is closed.
    pub fn kill(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(pager) = self.pager.take() {
            let _ = pager.join();
        }
        let _ = self.monitor.0.shutdown(std::net::Shutdown::Both);
    }

    /// The memory as the target has it, to be shared again.
    ///
    /// # Panics
    /// If there are no descriptors left.
    #[must_use]
    pub fn memory(&self) -> OwnedFd {
        self.shared.destination.try_clone().expect("a descriptor")
    }

    /// Whether the file has a page: one that never came is a hole, or whoever brings it would find it taken.
    #[must_use]
    pub fn has(&self, page: u64) -> bool {
        self.shared.has(page)
    }

    /// The rest of the memory comes, asked for or not, and post-copy is over.
    ///
    /// # Panics
    /// If the target does not say so.
    pub fn finish(&self) {
        for page in 0..(SHARE * self.queues as u64).div_ceil(self.shared.page) {
            self.shared.place(page);
        }
        self.set_pace(Pace::default());
        self.tell(&Message::PostcopyEnd);
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until all of `count` requests of each ring have ended, and hands each to `judge` with its queue.
///
/// # Panics
/// If they do not.
pub fn collect(
    guest: &mut ArrivingGuest,
    arrival: &Arrival,
    queues: impl Iterator<Item = usize> + Clone,
    count: usize,
    mut judge: impl FnMut(&ArrivingGuest, usize, Completion),
) {
    let begin = Instant::now();
    let mut left = count * queues.clone().count();
    while left > 0 {
        guest.see(arrival);
        for queue in queues.clone() {
            while let Some(completion) = guest.ended(queue) {
                judge(guest, queue, completion);
                left -= 1;
            }
        }
        assert!(begin.elapsed() < PATIENCE, "{left} requests do not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}
