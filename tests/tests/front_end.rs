//! The front end against a back end that is not ours: QEMU's storage daemon over a file.

// A test may fail by panicking, and says aloud that it skips.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::cast_possible_truncation)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use resilver_sys::{BufferSlice, RegionId, RegionTable, WaitSet};
use resilver_tests::e2e::StorageDaemon;
use resilver_tests::huge_pages::HugePages;
use resilver_vhost::front_end::{
    Connection, ConnectionConfig, DataBuffer, DriverQueue, Finished, FrontEndError, Request,
    RequestError, SubmitError,
};

const DISK: u64 = 8 << 20;
const BLOCK: u32 = 4096;

/// A disk image, and where its socket is.
struct Scratch {
    _directory: tempfile::TempDir,
    image: PathBuf,
    socket: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) =
            (directory.path().join("disk.raw"), directory.path().join("vhost.sock"));
        File::create(&image).unwrap().set_len(DISK).unwrap();
        Self { _directory: directory, image, socket }
    }

    fn serve(&self, export: &str) -> Option<StorageDaemon> {
        StorageDaemon::serve("front_end", &self.image, &self.socket, export)
    }

    fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut file = File::open(&self.image).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut bytes = vec![0; length];
        file.read_exact(&mut bytes).unwrap();
        bytes
    }
}

/// A connection whose data the test can reach.
struct Driver {
    connection: Connection,
    queues: Vec<DriverQueue>,
    table: RegionTable,
    region: RegionId,
}

impl Driver {
    fn connect(socket: &Path, config: ConnectionConfig) -> Result<Self, FrontEndError> {
        let (connection, queues) = Connection::connect(socket, config)?;
        let table = RegionTable::with_capacity(1);
        let region = table.insert(connection.memory().mapping().clone()).unwrap();
        Ok(Self { connection, queues, table, region })
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> DataBuffer {
        let length = bytes.len() as u32;
        self.table.write(BufferSlice { region: self.region, offset, length }, bytes).unwrap();
        DataBuffer { offset, length }
    }

    fn get(&self, buffer: DataBuffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.length as usize];
        let DataBuffer { offset, length } = buffer;
        self.table.read(BufferSlice { region: self.region, offset, length }, &mut bytes).unwrap();
        bytes
    }

    /// Submits and waits, asleep when nothing comes.
    fn run(&mut self, request: Request, data: &[DataBuffer]) -> Finished {
        self.queues[0].submit(request, data, 7).unwrap();
        self.queues[0].publish();
        let finished = wait(&mut self.queues[0]);
        assert_eq!(finished.tag, 7);
        finished
    }

    fn run_ok(&mut self, request: Request, data: &[DataBuffer]) -> u32 {
        let finished = self.run(request, data);
        assert_eq!(finished.result, Ok(()), "{request:?}");
        finished.written
    }
}

fn wait(queue: &mut DriverQueue) -> Finished {
    let start = Instant::now();
    let mut set = WaitSet::with_capacity(1);
    while start.elapsed() < Duration::from_secs(10) {
        if let Some(finished) = queue.pop().unwrap() {
            return finished;
        }
        if queue.arm() {
            set.clear();
            set.add(queue.call_fd());
            set.sleep(Some(100_000_000));
        }
        queue.disarm();
    }
    panic!("a request did not end within 10 s");
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

#[test]
fn memory_is_of_huge_pages_where_the_host_has_some_and_is_served_like_any_other() {
    let scratch = Scratch::new();
    let Some(_daemon) = scratch.serve("") else { return };
    // More than the tests beside this one take meanwhile.
    let Some(_pages) = HugePages::reserve("front_end", 64) else { return };
    let mut driver = Driver::connect(&scratch.socket, ConnectionConfig::default()).unwrap();
    let memory = driver.connection.memory();
    assert!(memory.huge_pages());
    assert_eq!(memory.mapping().len() % (2 << 20), 0);
    let bytes = pattern(3, BLOCK as usize);
    let last = driver.connection.memory().data_bytes() as u64 - u64::from(BLOCK);
    let data = driver.put(last, &bytes);
    driver.run_ok(Request::Write { offset: 8192 }, &[data]);
    assert_eq!(scratch.bytes(8192, bytes.len()), bytes);
    let data = DataBuffer { offset: 0, length: BLOCK };
    driver.run_ok(Request::Read { offset: 8192 }, &[data]);
    assert_eq!(driver.get(data), bytes);
}

/// Every request that virtio-blk has, over every shape of ring.
#[test]
fn what_is_written_through_a_ring_is_in_the_file_and_is_read_back() {
    let accept = [
        u64::MAX,
        ConnectionConfig::WITHOUT_INDIRECT,
        ConnectionConfig::WITHOUT_EVENT_INDEX,
        ConnectionConfig::WITHOUT_INDIRECT & ConnectionConfig::WITHOUT_EVENT_INDEX,
    ];
    for accept in accept {
        let scratch = Scratch::new();
        let Some(_daemon) = scratch.serve("") else { return };
        let config = ConnectionConfig { accept, queue_size: 32, ..ConnectionConfig::default() };
        let mut driver = Driver::connect(&scratch.socket, config).unwrap();
        assert_eq!(driver.connection.device().capacity, DISK);
        assert!(!driver.connection.device().read_only);

        let data = pattern(1, 3 * BLOCK as usize);
        // Apart from each other and in another order than on the disk.
        let parts = [(60_000, 0..512), (20_000, 512..8192), (40_000, 8192..12_288)]
            .map(|(at, part)| driver.put(at, &data[part]));
        driver.run_ok(Request::Write { offset: 8192 }, &parts);
        driver.run_ok(Request::Flush, &[]);
        assert!(scratch.bytes(8192, data.len()) == data);

        let back = DataBuffer { offset: 512, length: data.len() as u32 };
        assert_eq!(driver.run_ok(Request::Read { offset: 8192 }, &[back]), back.length + 1);
        assert!(driver.get(back) == data);

        let zeroes = Request::WriteZeroes { offset: 8192, length: 4096, may_unmap: true };
        driver.run_ok(zeroes, &[]);
        driver.run_ok(Request::Discard { offset: 12288, length: 4096 }, &[]);
        assert!(scratch.bytes(8192, 4096) == [0; 4096]);
        assert!(scratch.bytes(16384, 4096) == data[8192..]);

        let id = DataBuffer { offset: 0, length: 20 };
        driver.run_ok(Request::GetId, &[id]);
        assert!(driver.get(id).iter().any(|byte| *byte != 0));

        let beyond = driver.run(Request::Read { offset: DISK }, &[back]);
        assert_eq!(beyond.result, Err(RequestError::Io));
    }
}

#[test]
fn a_full_ring_takes_no_more_and_all_that_it_took_ends_once() {
    let scratch = Scratch::new();
    let Some(_daemon) = scratch.serve(",num-queues=2") else { return };
    let config = ConnectionConfig {
        queues: 2,
        queue_size: 64,
        accept: ConnectionConfig::WITHOUT_INDIRECT,
        ..ConnectionConfig::default()
    };
    let mut driver = Driver::connect(&scratch.socket, config).unwrap();
    let mut ended = vec![0; 1000];
    for index in 0..2 {
        let queue = &mut driver.queues[index];
        let (mut submitted, mut done, mut refused) = (0u64, 0, 0);
        while done < 500 {
            while submitted < 500 {
                let offset = submitted % 21 * 4096;
                let buffer = DataBuffer { offset, length: BLOCK };
                match queue.submit(Request::Write { offset }, &[buffer], submitted) {
                    Ok(()) => submitted += 1,
                    Err(SubmitError::Full) => {
                        // Three descriptors each out of 64.
                        assert_eq!(queue.in_flight(), 21);
                        refused += 1;
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            queue.publish();
            let finished = wait(queue);
            assert_eq!(finished.result, Ok(()));
            ended[index * 500 + finished.tag as usize] += 1;
            done += 1;
        }
        assert!(refused > 0);
        assert_eq!(queue.in_flight(), 0);
    }
    assert!(ended.iter().all(|count| *count == 1));
    assert_eq!(driver.connection.stop(&driver.queues[0]).unwrap(), 500);
}

#[test]
fn requests_in_flight_survive_a_back_end_that_is_killed_and_started_again() {
    let scratch = Scratch::new();
    let Some(daemon) = scratch.serve("") else { return };
    let config = ConnectionConfig { queue_size: 32, ..ConnectionConfig::default() };
    let mut driver = Driver::connect(&scratch.socket, config).unwrap();
    assert!(!driver.connection.is_closed());

    // Stopped, so that what is submitted is surely in flight when it dies.
    rustix::process::kill_process(daemon.process(), rustix::process::Signal::STOP).unwrap();
    for block in 0..16u64 {
        let buffer = driver.put(block * 4096, &pattern(block as u8, BLOCK as usize));
        driver.queues[0].submit(Request::Write { offset: block * 4096 }, &[buffer], block).unwrap();
    }
    driver.queues[0].publish();
    drop(daemon);
    assert!(driver.connection.is_closed());
    assert_eq!(driver.queues[0].pop(), Ok(None));

    std::fs::remove_file(&scratch.socket).unwrap();
    let Some(_daemon) = scratch.serve("") else { return };
    driver.connection.reconnect(&mut driver.queues).unwrap();
    let mut ended: Vec<u64> = (0..16).map(|_| wait(&mut driver.queues[0]).tag).collect();
    ended.sort_unstable();
    assert_eq!(ended, (0..16).collect::<Vec<_>>());
    for block in 0..16u64 {
        assert!(scratch.bytes(block * 4096, 4096) == pattern(block as u8, 4096));
    }
}

#[test]
fn a_request_that_does_not_fit_is_refused_before_it_reaches_the_ring() {
    let scratch = Scratch::new();
    let Some(_daemon) = scratch.serve("") else { return };
    let config = ConnectionConfig { segments: 2, data_bytes: 8192, ..ConnectionConfig::default() };
    let mut driver = Driver::connect(&scratch.socket, config).unwrap();
    let queue = &mut driver.queues[0];
    let buffer = DataBuffer { offset: 0, length: 512 };
    let read = Request::Read { offset: 0 };
    let out = DataBuffer { offset: 8192, length: 1 };
    let far = DataBuffer { offset: u64::MAX, length: 512 };
    let long = Request::Discard { offset: 0, length: 1 << 42 };
    assert_eq!(queue.submit(Request::Read { offset: 1 }, &[buffer], 0), Err(SubmitError::Range));
    assert_eq!(queue.submit(long, &[], 0), Err(SubmitError::Range));
    assert_eq!(queue.submit(read, &[buffer; 3], 0), Err(SubmitError::Segments(3)));
    assert_eq!(queue.submit(read, &[out], 0), Err(SubmitError::OutOfBounds));
    assert_eq!(queue.submit(read, &[far], 0), Err(SubmitError::OutOfBounds));
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn nobody_on_the_socket_and_a_silent_back_end_are_errors_in_bounded_time() {
    let scratch = Scratch::new();
    let config =
        ConnectionConfig { deadline: Duration::from_millis(100), ..ConnectionConfig::default() };
    let nobody = Driver::connect(&scratch.socket, config.clone()).err();
    assert!(matches!(nobody, Some(FrontEndError::Connect { .. })), "{nobody:?}");

    let listener = UnixListener::bind(&scratch.socket).unwrap();
    let silent = Driver::connect(&scratch.socket, config.clone()).err();
    assert!(
        matches!(silent, Some(FrontEndError::Deadline { message: "GET_FEATURES", .. })),
        "{silent:?}"
    );

    // Whatever is said in answer is checked: here a reply that claims 4 GiB.
    let babbler = std::thread::spawn(move || {
        let _silent = listener.accept().unwrap();
        let (mut socket, _) = listener.accept().unwrap();
        let mut reply = Vec::new();
        for word in [1u32, 5, u32::MAX] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        socket.write_all(&reply).unwrap();
        socket
    });
    let babble = Driver::connect(&scratch.socket, config).err();
    assert!(matches!(babble, Some(FrontEndError::Malformed { .. })), "{babble:?}");
    drop(babbler.join().unwrap());
}
