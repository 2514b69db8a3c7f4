//! The back end as a whole: a controller over a memory disk on a real reactor, driven by Resilver's own front end.

// A test may fail by panicking.
#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use resilver_bdev::error::{Effect, ErrorBdev, FOREVER, Injection};
use resilver_bdev::malloc::Malloc;
use resilver_bdev::{Bdev, IoError, IoKind};
use resilver_reactor::{Idle, ReactorConfig};
use resilver_sys::{BufferSlice, RegionId, RegionTable};
use resilver_tests::raw_guest::send;
use resilver_tests::served::{PATIENCE, Served, wait_until};
use resilver_vhost::VhostError;
use resilver_vhost::front_end::{
    Connection, ConnectionConfig, DataBuffer, DriverQueue, Finished, Request, RequestError,
};
use resilver_vhost::message::{FdPresence, Header, Message, RegionDescription, RingAddresses};
use resilver_vhost::protocol::backend_request::CONFIG_CHANGE_MSG;
use rustix::net::SendFlags;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 4096;

/// A connected guest with one buffer of 16 blocks for each of its slots.
struct Guest {
    connection: Connection,
    queues: Vec<DriverQueue>,
    memory: RegionTable,
    region: RegionId,
}

impl Guest {
    fn connect(served: &Served, config: ConnectionConfig) -> Self {
        let (connection, queues) = Connection::connect(&served.socket(), config).unwrap();
        let memory = RegionTable::with_capacity(1);
        let region = memory.insert(Arc::clone(connection.memory().mapping())).unwrap();
        Self { connection, queues, memory, region }
    }

    fn slice(&self, offset: u64, length: u32) -> BufferSlice {
        BufferSlice { region: self.region, length, offset }
    }

    fn fill(&self, offset: u64, bytes: &[u8]) {
        self.memory.write(self.slice(offset, bytes.len().try_into().unwrap()), bytes).unwrap();
    }

    fn bytes(&self, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.memory.read(self.slice(offset, length), &mut bytes).unwrap();
        bytes
    }

    /// Submits one request and polls until it has ended.
    fn run(&mut self, queue: usize, request: Request, data: &[DataBuffer]) -> Finished {
        self.queues[queue].submit(request, data, 7).unwrap();
        self.queues[queue].publish();
        let start = Instant::now();
        loop {
            if let Some(finished) = self.queues[queue].pop().unwrap() {
                return finished;
            }
            assert!(start.elapsed() < PATIENCE, "{request:?} does not end");
            std::hint::spin_loop();
        }
    }
}

fn at(offset: u64, length: u32) -> DataBuffer {
    DataBuffer { offset, length }
}

fn malloc() -> Arc<dyn Bdev> {
    Arc::new(Malloc::new("malloc0", BLOCK, BLOCKS).unwrap())
}

/// All combinations of what a driver may negotiate about its ring.
fn ring_features() -> [u64; 6] {
    let (index, indirect) =
        (ConnectionConfig::WITHOUT_EVENT_INDEX, ConnectionConfig::WITHOUT_INDIRECT);
    let split = ConnectionConfig::WITHOUT_PACKED;
    [u64::MAX, index, split, split & index, indirect, index & indirect]
}

#[test]
fn what_is_written_is_read_back_whatever_the_ring_and_the_reactors_idling() {
    let idling = [Idle::Spin, Idle::Adaptive].into_iter().cycle();
    for (accept, idle) in ring_features().into_iter().zip(idling) {
        let served =
            Served::with(&*malloc(), ReactorConfig { idle, ..ReactorConfig::default() }, |_| ());
        let config = ConnectionConfig { queues: 2, accept, ..ConnectionConfig::default() };
        let mut guest = Guest::connect(&served, config);
        assert_eq!(guest.connection.device().capacity, u64::from(BLOCK) * BLOCKS);
        for round in 0..200u64 {
            let queue = usize::from(round % 2 == 1);
            let offset = (round * 37 % BLOCKS) * u64::from(BLOCK);
            let pattern = vec![round as u8 + 1; BLOCK as usize];
            guest.fill(0, &pattern);
            let parts = [at(0, 1000), at(1000, 24), at(1024, 3072)];
            let written = guest.run(queue, Request::Write { offset }, &parts);
            assert_eq!((written.result, written.written), (Ok(()), 1));
            let read = guest.run(queue, Request::Read { offset }, &[at(8192, BLOCK)]);
            assert_eq!((read.result, read.written), (Ok(()), BLOCK + 1));
            assert_eq!(guest.bytes(8192, BLOCK), pattern);
        }
        assert_eq!(served.stats().requests.get(), 400);
        assert_eq!(served.io_stats().of(IoKind::Write).bytes.get(), 200 * u64::from(BLOCK));
    }
}

#[test]
fn a_sleeping_reactor_is_woken_by_a_kick_and_a_sleeping_guest_by_an_interrupt() {
    for accept in ring_features() {
        let served = Served::new(&*malloc());
        let config = ConnectionConfig { accept, ..ConnectionConfig::default() };
        let mut guest = Guest::connect(&served, config);
        for _ in 0..20 {
            // Longer than the reactor spins.
            std::thread::sleep(Duration::from_millis(3));
            let queue = &mut guest.queues[0];
            queue.submit(Request::Flush, &[], 1).unwrap();
            queue.publish();
            let start = Instant::now();
            while queue.pop().unwrap().is_none() {
                if queue.arm() {
                    let mut set = resilver_sys::WaitSet::with_capacity(1);
                    set.add(queue.call_fd());
                    set.sleep(Some(1_000_000_000));
                }
                queue.disarm();
                assert!(start.elapsed() < PATIENCE, "the interrupt was lost");
            }
        }
        assert!(served.stats().kicks.get() > 0, "the reactor never slept");
        assert!(served.stats().interrupts.get() > 0);
    }
}

#[test]
fn every_kind_of_request_is_served() {
    let served = Served::with(&*malloc(), ReactorConfig::default(), |config| {
        config.serial = Some("serial-0123456789-and-more".to_owned());
    });
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    let length = u64::from(BLOCK);
    let id = guest.run(0, Request::GetId, &[at(0, 20)]);
    assert_eq!((id.result, id.written), (Ok(()), 21));
    assert_eq!(guest.bytes(0, 20), b"serial-0123456789-an");
    guest.fill(0, &[9; 4096]);
    for offset in [0, length, 2 * length] {
        assert_eq!(guest.run(0, Request::Write { offset }, &[at(0, BLOCK)]).result, Ok(()));
    }
    let zeroes = Request::WriteZeroes { offset: 0, length, may_unmap: true };
    assert_eq!(guest.run(0, zeroes, &[]).result, Ok(()));
    let discard = Request::Discard { offset: length, length };
    assert_eq!(guest.run(0, discard, &[]).result, Ok(()));
    assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
    for (block, expected) in [(0, 0), (2, 9)] {
        let read = Request::Read { offset: block * length };
        assert_eq!(guest.run(0, read, &[at(0, BLOCK)]).result, Ok(()));
        assert_eq!(guest.bytes(0, BLOCK), [expected; 4096]);
    }
}

#[test]
fn what_does_not_fit_the_disk_fails_and_changes_nothing() {
    let served = Served::new(&*malloc());
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    let end = u64::from(BLOCK) * BLOCKS;
    for (request, data) in [
        (Request::Read { offset: end }, at(0, BLOCK)),
        (Request::Write { offset: end - 4096 }, at(0, 2 * BLOCK)),
        (Request::Read { offset: 512 }, at(0, BLOCK)),
        (Request::Write { offset: 0 }, at(0, 512)),
        (Request::Read { offset: u64::MAX - 511 }, at(0, BLOCK)),
    ] {
        let failed = guest.run(0, request, &[data]);
        assert_eq!((failed.result, failed.written), (Err(RequestError::Io), 1), "{request:?}");
    }
    let discard = Request::Discard { offset: end, length: 4096 };
    assert_eq!(guest.run(0, discard, &[]).result, Err(RequestError::Io));
    assert_eq!(guest.run(0, Request::Read { offset: 0 }, &[at(0, BLOCK)]).result, Ok(()));
    assert_eq!(served.io_stats().of(IoKind::Write).ops.get(), 0);
}

#[test]
fn a_read_only_controller_writes_nothing_of_any_kind() {
    let served =
        Served::with(&*malloc(), ReactorConfig::default(), |config| config.read_only = true);
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    assert!(guest.connection.device().read_only);
    assert_eq!(guest.connection.device().discard_max, None);
    let (offset, length) = (0, 4096);
    let zeroes = Request::WriteZeroes { offset, length, may_unmap: false };
    let error = Err(RequestError::Io);
    assert_eq!(guest.run(0, Request::Write { offset }, &[at(0, BLOCK)]).result, error);
    assert_eq!(guest.run(0, Request::Discard { offset, length }, &[]).result, error);
    assert_eq!(guest.run(0, zeroes, &[]).result, error);
    assert_eq!(guest.run(0, Request::Read { offset }, &[at(0, BLOCK)]).result, Ok(()));
}

#[test]
fn a_disk_error_reaches_the_guest_as_an_io_error() {
    let error = Arc::new(ErrorBdev::new("error0", malloc()));
    let served = Served::new(&*error);
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    let read = Request::Read { offset: 0 };
    error.inject(fail(IoKind::Read, Effect::Fail(IoError::NO_SPACE), 1)).unwrap();
    assert_eq!(guest.run(0, read, &[at(0, BLOCK)]).result, Err(RequestError::Io));
    assert_eq!(guest.run(0, read, &[at(0, BLOCK)]).result, Ok(()));
    assert_eq!(served.io_stats().of(IoKind::Read).errors.get(), 1);
}

fn fail(kind: IoKind, effect: Effect, count: u64) -> Injection {
    Injection { kind: Some(kind), effect, count, range: None }
}

#[test]
fn a_front_end_reconnects_and_finds_its_disk_as_it_left_it() {
    let served = Served::new(&*malloc());
    for round in 0..10u8 {
        let mut guest = Guest::connect(&served, ConnectionConfig::default());
        if round > 0 {
            let read = Request::Read { offset: 0 };
            assert_eq!(guest.run(0, read, &[at(0, BLOCK)]).result, Ok(()));
            assert_eq!(guest.bytes(0, BLOCK), [round; 4096]);
        }
        guest.fill(0, &[round + 1; 4096]);
        let write = Request::Write { offset: 0 };
        assert_eq!(guest.run(0, write, &[at(0, BLOCK)]).result, Ok(()));
    }
    assert_eq!(served.stats().sessions.get(), 10);
    wait_until("the session is over", || served.ask(|it| it.info().sessions.is_empty()));
}

#[test]
fn a_stopped_ring_says_where_it_stands() {
    // A packed ring stands there both ways, in its first lap.
    for (accept, stands) in [(ConnectionConfig::WITHOUT_PACKED, 5), (u64::MAX, 0x8005_8005)] {
        let served = Served::new(&*malloc());
        let config = ConnectionConfig { accept, ..ConnectionConfig::default() };
        let mut guest = Guest::connect(&served, config);
        for _ in 0..5 {
            guest.run(0, Request::Flush, &[]);
        }
        let info = served.ask(|controller| controller.info()).sessions.remove(0);
        assert_eq!((info.queues.as_slice(), info.memory_regions), ([0].as_slice(), 1));
        assert_eq!(guest.connection.stop(&guest.queues[0]).unwrap(), stands);
        guest.connection.resume(&guest.queues[0], stands).unwrap();
        assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
    }
}

#[test]
fn a_session_whose_io_hangs_ends_and_the_next_is_refused_until_it_has_landed() {
    let error = Arc::new(ErrorBdev::new("error0", malloc()));
    let served = Served::new(&*error);
    error.inject(fail(IoKind::Write, Effect::Stall, FOREVER)).unwrap();
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    guest.queues[0].submit(Request::Write { offset: 0 }, &[at(0, BLOCK)], 1).unwrap();
    guest.queues[0].publish();
    // The read behind it is served: a stuck write does not keep it back.
    guest.run(0, Request::Read { offset: 8192 }, &[at(8192, BLOCK)]);
    drop(guest);
    wait_until("the session is over", || served.ask(|it| it.info().left_in_flight == 1));
    // Refused: the connection is closed without an answer.
    let hasty = ConnectionConfig { deadline: Duration::from_secs(5), ..Default::default() };
    assert!(Connection::connect(&served.socket(), hasty).is_err());
    error.clear();
    wait_until("the write has landed", || served.ask(|it| it.info().left_in_flight == 0));
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
}

#[test]
fn a_resize_is_seen_by_who_asks_again() {
    let served = Served::new(&*malloc());
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    let bigger = Malloc::new("bigger", BLOCK, 2 * BLOCKS).unwrap();
    let limits = *bigger.open_channel(1).unwrap().limits();
    served.ask(move |controller| controller.resize(limits));
    let device = guest.connection.read_config().unwrap();
    assert_eq!(device.capacity, 2 * u64::from(BLOCK) * BLOCKS);
}

#[test]
fn a_stopped_controller_takes_its_socket_away_and_a_dead_ones_socket_is_replaced() {
    let mut served = Served::new(&*malloc());
    let socket = served.socket();
    let _guest = Guest::connect(&served, ConnectionConfig::default());
    assert!(UnixStream::connect(&socket).is_ok(), "a second front end waits");
    served.stop().unwrap();
    assert!(!socket.exists());
    // What a killed process leaves behind: a socket that nobody listens on.
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("vm1");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let path = stale.clone();
    let served = Served::with(&*malloc(), ReactorConfig::default(), move |config| {
        config.socket_path = path;
    });
    Guest::connect(&served, ConnectionConfig::default());
}

/// Whether the back end closes a connection over these bytes with so many descriptors.
fn is_closed_over(socket: &Path, bytes: &[u8], fds: usize) -> bool {
    let stream = UnixStream::connect(socket).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    send(&stream, bytes, &vec![null.as_fd(); fds]).unwrap();
    // GET_FEATURES: a connection that lives answers it.
    let question = Message::GetFeatures.encode(0);
    let _ = rustix::net::send(&stream, &question, SendFlags::NOSIGNAL);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    !matches!((&stream).read(&mut [0; 20]), Ok(20))
}

/// Descriptors of this process that stand for /dev/null.
fn nulls() -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.flatten()
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/null")))
        .count()
}

#[test]
fn a_message_that_is_none_closes_that_connection_and_nothing_else() {
    let served = Served::new(&*malloc());
    let (socket, before) = (served.socket(), nulls());
    assert!(!is_closed_over(&socket, &Message::SetOwner.encode(0), 0), "an honest message");
    let header = |request, flags, size| Header { request, flags, size }.encode();
    assert!(is_closed_over(&socket, &header(1, 2, 0), 0), "version 2");
    assert!(is_closed_over(&socket, &header(999, 1, 0), 0), "unknown");
    assert!(is_closed_over(&socket, &header(5, 1, u32::MAX), 0), "endless");
    assert!(is_closed_over(&socket, &Message::SetOwner.encode(0), 1), "a stray descriptor");
    assert!(is_closed_over(&socket, &Message::SetOwner.encode(0), 40), "many of them");
    assert!(is_closed_over(&socket, &Message::SetFeatures(1 << 35).encode(0), 0), "IN_ORDER");
    let kick = Message::SetVringKick { index: 200, fd: FdPresence::Absent };
    assert!(is_closed_over(&socket, &kick.encode(0), 0), "no such ring");
    let region =
        RegionDescription { guest_address: 0, size: 4096, user_address: 0, file_offset: 0 };
    // /dev/null is no memory.
    assert!(is_closed_over(&socket, &Message::AddMemReg(region).encode(0), 1), "not mappable");
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
    wait_until("all descriptors are closed", || nulls() == before);
}

#[test]
fn a_guest_that_breaks_its_ring_loses_its_connection_and_can_come_back() {
    let served = Served::new(&*malloc());
    let accept = ConnectionConfig::WITHOUT_PACKED;
    let guest = Guest::connect(&served, ConnectionConfig { accept, ..Default::default() });
    // The rings lie behind the data; one of these bytes is the available index of a split ring.
    let (begin, end) = (guest.connection.memory().data_bytes() as u64, 1u64 << 40);
    let length = (guest.connection.memory().mapping().len() as u64).min(end) - begin;
    guest.fill(begin, &vec![0xff; usize::try_from(length).unwrap()]);
    wait_until("the connection is closed", || guest.connection.is_closed());
    drop(guest);
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
}

#[test]
fn a_front_end_that_shrinks_its_memory_loses_its_connection() {
    let served = Served::new(&*malloc());
    let stream = UnixStream::connect(served.socket()).unwrap();
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create(c"shrinks", flags).unwrap();
    rustix::fs::ftruncate(&memory, 65536).unwrap();
    let region =
        RegionDescription { guest_address: 0, size: 65536, user_address: 0, file_offset: 0 };
    let addresses =
        RingAddresses { flags: 0, descriptors: 0, used: 8192, available: 16384, log: 0 };
    send(&stream, &Message::SetFeatures(1 << 32).encode(0), &[]).unwrap();
    send(&stream, &Message::AddMemReg(region).encode(0), &[memory.as_fd()]).unwrap();
    send(&stream, &Message::SetVringNum { index: 0, num: 64 }.encode(0), &[]).unwrap();
    send(&stream, &Message::SetVringAddr { index: 0, addresses }.encode(0), &[]).unwrap();
    let fd = FdPresence::Absent;
    send(&stream, &Message::SetVringKick { index: 0, fd }.encode(0), &[]).unwrap();
    wait_until("the ring is polled", || {
        served.ask(|it| it.info().sessions.iter().any(|session| session.queues == [0]))
    });
    rustix::fs::ftruncate(&memory, 0).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0, "the connection is closed");
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    assert_eq!(guest.run(0, Request::Flush, &[]).result, Ok(()));
}

#[test]
fn a_resize_is_told_on_the_back_channel() {
    let served = Served::new(&*malloc());
    let stream = UnixStream::connect(served.socket()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&stream, &Message::SetBackendReqFd.encode(0), &[theirs.as_fd()]).unwrap();
    send(&stream, &Message::GetFeatures.encode(0), &[]).unwrap();
    (&stream).read_exact(&mut [0; 20]).unwrap();
    let bigger = Malloc::new("bigger", BLOCK, 2 * BLOCKS).unwrap();
    let limits = *bigger.open_channel(1).unwrap().limits();
    served.ask(move |controller| controller.resize(limits));
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut notice = [0; 12];
    (&ours).read_exact(&mut notice).unwrap();
    assert_eq!(Header::decode(&notice), Ok(Header::new(CONFIG_CHANGE_MSG, 0, 0)));
}

#[test]
fn a_controller_that_is_stopped_over_a_hung_disk_says_so_and_is_gone() {
    let error = Arc::new(ErrorBdev::new("error0", malloc()));
    let mut served = Served::new(&*error);
    error.inject(fail(IoKind::Write, Effect::Stall, FOREVER)).unwrap();
    let mut guest = Guest::connect(&served, ConnectionConfig::default());
    guest.queues[0].submit(Request::Write { offset: 0 }, &[at(0, BLOCK)], 1).unwrap();
    guest.queues[0].publish();
    wait_until("the write hangs", || error.injected() == 1);
    let left = served.stop();
    assert!(matches!(left, Err(VhostError::StillInFlight { in_flight: 1, .. })), "{left:?}");
    assert!(!served.socket().exists());
}
